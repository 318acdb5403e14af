"""A residual block as an SDE, and the solvers that take a state through it."""
