"""Runs: configuration, folder, training and clean evaluation."""
