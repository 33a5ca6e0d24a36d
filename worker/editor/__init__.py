"""Convert a workflow in the editor's format to the graph that the editor would send."""
