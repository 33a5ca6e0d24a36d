"""Which models a workflow means, where they are, and getting them there."""
