"""What user code may import from Dayfly: its context, and hooks for being forked."""

from dayfly.context import Context
from dayfly.hooks import after_fork, before_zygote

__all__ = ["Context", "__version__", "after_fork", "before_zygote"]
__version__ = "0.1.0"
