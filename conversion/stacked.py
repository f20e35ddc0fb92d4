"""Tensors that a source stores child by child, such as experts or the norms of heads, read as one tensor each."""

import re
from collections.abc import Iterable
from functools import reduce

import torch

from mqa_hf.base.errors import ConversionError, listing

from .checkpoint import Reader, TensorInfo
from .families import Family
from .matching import spelled

_CHILD = re.compile(r"(?P<module>.+)\.(?P<number>\d+)\.(?P<tensor>.+)")
_OWN = re.compile(r"(?P<module>.+)\.(?P<tensor>[^.]+)")


class StackedReader:
    """A [`Reader`] of the same tensors, with those of `Family.stacked` joined.

    "…norms.0.weight" [D] to "…norms.9.weight" become "…norms.weight" [10, D]; gates and inputs of experts [f, d]
    become "…experts.gate_up_proj" [E, 2 f, d]. Types may differ, and become one that holds all of them. If shapes
    differ, or if there is a joined tensor as well, the tensors stay as they are; no rule matches them.

    Attributes:
        reader: the reader that is read from.

    Raises:
        ConversionError: if a child lacks one of the tensors.
    """

    def __init__(self, reader: Reader, family: Family):
        self.reader = reader
        self.nonfinite = reader.nonfinite  # the same object, which grows with each `read`
        joined = {stacked.module: stacked.joined for stacked in family.stacked}
        single = {stacked.module for stacked in family.stacked if not stacked.numbered}
        children: dict[tuple[str, str], dict[tuple[int, str], str]] = {}
        for name in reader.tensors:
            for pattern in (_CHILD, _OWN):
                found = pattern.fullmatch(name)
                module = "" if found is None else spelled(found["module"], family)[0]
                if found is None or module not in joined or (module in single) != (pattern is _OWN):
                    continue
                number = int(found["number"]) if pattern is _CHILD else 0
                for whole, rows in joined[module].items():
                    if found["tensor"] in rows:
                        children.setdefault((found["module"], whole), {})[number, found["tensor"]] = name
        self._parts: dict[str, list[list[str]]] = {}
        self.tensors = dict(reader.tensors)
        missing: list[str] = []
        for (module, whole), names in children.items():
            rows = joined[spelled(module, family)[0]][whole]
            count = min(1 + max(number for number, _ in names), len(names) + 1)  # enough to find a gap
            wanted = [[(number, row) for row in rows] for number in range(count)]
            alone = spelled(module, family)[0] in single
            lost = [(n, row) for child in wanted for n, row in child if (n, row) not in names]
            missing += [f"{module}.{row}" if alone else f"{module}.{n}.{row}" for n, row in lost]
            infos = [reader.tensors[name] for name in names.values()]
            shape, joint, dtype = infos[0].shape, f"{module}.{whole}", common({info.dtype for info in infos})
            alike = dtype is not None and all(info.shape == shape for info in infos)
            if missing or not shape or not alike or joint in reader.tensors:
                continue
            for name in names.values():
                del self.tensors[name]
            self._parts[joint] = [[names[key] for key in child] for child in wanted]
            assert dtype is not None
            self.tensors[joint] = TensorInfo((count, len(rows) * shape[0], *shape[1:]), dtype)
        if missing:
            raise ConversionError(f"the weights do not fit config.json: tensors missing: {listing(missing)}")

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors, on the CPU; valid until the result is dropped."""
        names = list(names)
        files = (file for name in names for child in self._parts.get(name, [[name]]) for file in child)
        found = self.reader.read(files)
        return {name: self._joined(name, found) if name in self._parts else found[name] for name in names}

    def _joined(self, name: str, found: dict[str, torch.Tensor]) -> torch.Tensor:
        info = self.tensors[name]
        whole = torch.empty(info.shape, dtype=info.dtype)
        for child, parts in zip(whole, self._parts[name]):
            for rows, part in zip(child.split(len(child) // len(parts)), parts):
                rows.copy_(found.pop(part))
        return whole


def common(dtypes: set[torch.dtype]) -> torch.dtype | None:
    """The smallest type that holds all of these; `None` if there is none (float8)."""
    try:
        return next(iter(dtypes)) if len(dtypes) == 1 else reduce(torch.promote_types, dtypes)
    except RuntimeError:
        return None
