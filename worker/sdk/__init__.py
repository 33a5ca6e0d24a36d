"""The RunPod SDK's side: its modes, its job loop, its progress posts."""
