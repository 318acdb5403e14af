"""Comparisons of solvers, orders and grids."""
