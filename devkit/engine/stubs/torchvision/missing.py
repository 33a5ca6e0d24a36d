import torch


def missing(module):
    """Make a module's `__getattr__`: each name can be imported, and says what it is when it is used."""

    def __getattr__(name):
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")

        def __init__(self, *args, **kwargs):
            raise NotImplementedError(f"{module} is a stand-in here: {name} is not available")

        return type(name, (torch.nn.Module,), {"__init__": __init__, "__module__": module})

    return __getattr__
