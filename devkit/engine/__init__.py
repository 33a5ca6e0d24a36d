"""A real ComfyUI for the CPU and tiny weights for it, built once into a cache; README.md says what it is for."""
