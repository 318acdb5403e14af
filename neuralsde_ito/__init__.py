"""Trained ResNets as ensembles of Itô processes: recast, solve, fine-tune, attack, and report honestly."""
