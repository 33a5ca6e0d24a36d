"""What goes into a job and what comes out of it, as files."""
