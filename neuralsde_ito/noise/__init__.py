"""Noise with an address: keys, normals, and the Brownian path that is built from them."""
