"""Checks of a robustness figure, and evidence that others can verify."""
