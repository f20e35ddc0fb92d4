"""Source checkpoint -> multi-query checkpoint."""

from .converter import convert
from .errors import ConversionError
from .inspection import inspect

__all__ = ["ConversionError", "convert", "inspect"]
