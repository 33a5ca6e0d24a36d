"""Load weights into memory, and onto the GPU, before the first job needs them."""
