"""The RunPod SDK: its modes, its job loop, its progress posts."""
