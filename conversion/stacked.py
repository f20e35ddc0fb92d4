"""Norms with a tensor for each head (StableLM), read as one tensor with a row for each."""

from collections.abc import Iterable

import torch

from .checkpoint import Reader, TensorInfo
from .families import Family
from .matching import spelled


class StackedReader:
    """A [`Reader`] of the same tensors, with those of `Family.stacked` as one.

    "…norms.0.weight" [D] to "…norms.9.weight" become "…norms.weight" [10, D]. If the numbers have gaps, or shapes or
    types differ, the tensors stay as they are; no rule matches them.

    Attributes:
        reader: the reader that is read from.
    """

    def __init__(self, reader: Reader, family: Family):
        self.reader = reader
        self.nonfinite = reader.nonfinite  # the same object, which grows with each `read`
        heads: dict[str, dict[int, str]] = {}
        for name in reader.tensors:
            module, _, rest = name.rpartition(".norms.")
            number, _, kind = rest.partition(".")
            if number.isdecimal() and spelled(f"{module}.norms", family)[0] in family.stacked:
                heads.setdefault(f"{module}.norms.{kind}", {})[int(number)] = name
        self._heads = {
            whole: [parts[i] for i in range(len(parts))]
            for whole, parts in heads.items()
            if set(parts) == set(range(len(parts))) and len({reader.tensors[part] for part in parts.values()}) == 1
        }
        within = {part for parts in self._heads.values() for part in parts}
        self.tensors = {name: info for name, info in reader.tensors.items() if name not in within}
        for whole, parts in self._heads.items():
            info = reader.tensors[parts[0]]
            self.tensors[whole] = TensorInfo((len(parts), *info.shape), info.dtype)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors, on the CPU; valid until the result is dropped."""
        names = list(names)
        found = self.reader.read(part for name in names for part in self._heads.get(name, [name]))
        return {
            name: torch.stack([found[part] for part in self._heads[name]]) if name in self._heads else found[name]
            for name in names
        }
