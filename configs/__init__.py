"""Presets: commented YAML, at most forty lines each."""
