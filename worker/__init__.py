"""A RunPod serverless worker for ComfyUI whose image holds no weights."""

__version__ = "1.0.0"
