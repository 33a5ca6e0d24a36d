"""The volume's models as ComfyUI sees them: symlinks in its models folder."""
