"""The command `up`: create an endpoint on RunPod for a workflow, show it, and remove it. See `worker.up.up_command`."""
