"""From a workflow to an endpoint of RunPod in one command, and back: see `worker.up.up_command`."""
