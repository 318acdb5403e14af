"""Comparisons of solvers, orders, grids and the laws of outputs."""
