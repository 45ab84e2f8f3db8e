"""What user code may import from Dayfly; see `dayfly.context.Context`."""

from dayfly.context import Context

__all__ = ["Context", "__version__"]
__version__ = "0.1.0"
