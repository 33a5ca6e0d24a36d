"""Workflows in ComfyUI's API format that run on the tiny weights, one for each kind of result."""
