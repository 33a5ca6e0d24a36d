from ..missing import missing
from . import optical_flow

__getattr__ = missing(__name__)
