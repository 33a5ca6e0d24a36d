"""A graph in ComfyUI's API format: what it names, whether it is safe, what ComfyUI says against it."""
