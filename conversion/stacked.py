"""Tensors that a source stores child by child, such as experts or the norms of heads, read as one tensor each."""

import re
from collections.abc import Iterable

import torch

from .checkpoint import Reader, TensorInfo
from .families import Family
from .matching import spelled

_CHILD = re.compile(r"(?P<module>.+)\.(?P<number>\d+)\.(?P<tensor>.+)")


class StackedReader:
    """A [`Reader`] of the same tensors, with those of `Family.stacked` joined.

    "…norms.0.weight" [D] to "…norms.9.weight" become "…norms.weight" [10, D]; gates and inputs of experts [f, d]
    become "…experts.gate_up_proj" [E, 2 f, d]. If numbers have gaps, or shapes or types differ, the tensors stay as
    they are; no rule matches them.

    Attributes:
        reader: the reader that is read from.
    """

    def __init__(self, reader: Reader, family: Family):
        self.reader = reader
        self.nonfinite = reader.nonfinite  # the same object, which grows with each `read`
        joined = {stacked.module: stacked.joined for stacked in family.stacked}
        children: dict[tuple[str, str], dict[tuple[int, int], str]] = {}
        for name in reader.tensors:
            found = _CHILD.fullmatch(name)
            if found is None:
                continue
            module, number, tensor = found["module"], int(found["number"]), found["tensor"]
            for whole, rows in joined.get(spelled(module, family)[0], {}).items():
                if tensor in rows:
                    children.setdefault((module, whole), {})[number, rows.index(tensor)] = name
        self._parts: dict[str, list[list[str]]] = {}
        self.tensors = dict(reader.tensors)
        for (module, whole), names in children.items():
            height = len(joined[spelled(module, family)[0]][whole])
            count, infos = len(names) // height, {reader.tensors[name] for name in names.values()}
            if set(names) != {(n, i) for n in range(count) for i in range(height)} or len(infos) > 1:
                continue
            (info,) = infos
            for name in names.values():
                del self.tensors[name]
            self._parts[f"{module}.{whole}"] = [[names[n, i] for i in range(height)] for n in range(count)]
            shape = (count, height * info.shape[0], *info.shape[1:])
            self.tensors[f"{module}.{whole}"] = TensorInfo(shape, info.dtype)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors, on the CPU; valid until the result is dropped."""
        names = list(names)
        files = (file for name in names for child in self._parts.get(name, [[name]]) for file in child)
        found = self.reader.read(files)
        return {
            name: torch.stack([torch.cat([found[part] for part in child]) for child in self._parts[name]])
            if name in self._parts
            else found[name]
            for name in names
        }
