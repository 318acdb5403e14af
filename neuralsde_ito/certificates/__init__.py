"""Certificates by randomised smoothing: L2 balls around images in which the smoothed vote provably keeps its class."""
