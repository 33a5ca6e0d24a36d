"""The engine: ComfyUI as a child process, and its protocol."""
