"""A client: sends a workflow to an endpoint or to a local worker, shows its progress, saves the outputs.

It uses only the standard library and nothing of the worker: copy this folder anywhere and run `python -m client --help`.
"""
