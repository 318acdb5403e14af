"""A run: its configuration, training, folder and evaluation."""
