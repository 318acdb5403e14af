"""Presets: YAML with comments, at most forty lines each."""
