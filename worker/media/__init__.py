"""A job's input files and output files."""
