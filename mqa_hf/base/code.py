"""The files of this package that a checkpoint carries, so that its classes load where the package is not installed."""

import sys
from pathlib import Path
from typing import Any


def runtime_files(model: Any) -> list[Path]:
    """What `from_pretrained(..., trust_remote_code=True)` of a class imports; nothing of a class of transformers.

    That is the module of the class and all that it imports of its own kind, as transformers finds it.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    if not model.__module__.startswith("mqa_hf."):
        return []
    module = sys.modules[model.__module__].__file__
    assert module is not None
    return sorted({Path(path) for path in (module, *get_relative_import_files(module))})
