"""A RunPod serverless worker for ComfyUI whose image contains no weights."""

__version__ = "1.0.0"
