"""Residual networks recast as Itô processes, and ensembles of them that vote."""
