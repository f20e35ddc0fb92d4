"""Source checkpoint -> multi-query checkpoint."""

from .converter import convert
from .errors import ConversionError, ConversionWarning
from .inspection import inspect

__all__ = ["ConversionError", "ConversionWarning", "convert", "inspect"]
