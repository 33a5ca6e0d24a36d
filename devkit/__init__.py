"""What developers need and the worker's image does not hold: a real ComfyUI for the CPU, tiny weights, workflows."""
