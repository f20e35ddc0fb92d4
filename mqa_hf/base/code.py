"""The files of this package that a checkpoint carries, so that its classes load where the package is not installed."""

import sys
from pathlib import Path
from typing import Any


def runtime_files(model: Any) -> list[Path]:
    """The files that loading a class with `trust_remote_code=True` imports; none for a transformers class.

    These are the module of the class and its relative imports, as transformers finds them.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    if not model.__module__.startswith("mqa_hf."):
        return []
    module = sys.modules[model.__module__].__file__
    assert module is not None
    return sorted({Path(path) for path in (module, *get_relative_import_files(module))})
