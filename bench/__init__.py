"""Benchmarks: each script runs alone and compares with a reference that it measures in the same run."""
