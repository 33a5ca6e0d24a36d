"""The running ComfyUI: its process, its protocol, its custom nodes."""
