"""Weights in memory, and on the GPU, before the first job needs them."""
