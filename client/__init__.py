"""A client: sends a workflow to an endpoint or to a local worker, shows how far it is, saves what comes back.

The standard library alone, and nothing of the worker: copy this folder anywhere and say `python -m client --help`.
"""
