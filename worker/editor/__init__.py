"""The editor's own workflow format, converted to the graph that the editor would send."""
