"""The models that a job needs: their sources, and the order of their downloads."""
