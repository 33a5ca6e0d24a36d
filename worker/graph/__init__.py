"""A graph in ComfyUI's API format: validation, the models and files that it names, and ComfyUI's refusals."""
