"""Register classes with transformers once it is imported, without importing it."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def when_imported(module: str, do: Callable[[], None]) -> None:
    """Call `do` once a module is imported: now if it already is, else right after its import."""
    if module in sys.modules:
        do()
    else:
        sys.meta_path.insert(0, _Watch(module, do))


class _Watch(MetaPathFinder):
    """Finds one module as usual and calls `do` after its import."""

    def __init__(self, module: str, do: Callable[[], None]):
        self.module, self.do = module, do

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.do()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
