"""Weights of published files that are packed in 4 bits, and layers of them that no class loads.

E experts, n outputs and 32·B inputs of an expert
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mqa_hf.base.errors import ConversionError

from .checkpoint import Reader, TensorInfo, nonfinite_in
from .families import PREDICTION_FIELDS

# The numbers of E2M1, the 4-bit format of MXFP4 (Open Compute Project, Microscaling Formats, section 5.3.3).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
EXPONENT_BIAS = 127
BLOCK = 32  # numbers with a scale
BLOCKS, SCALES = "_blocks", "_scales"

_PREDICTION_NAMES = re.compile(r"(?:model\.)?(?:mtp\.|mtp_\w+\.|layers\.(?P<layer>\d+)\.).*")


def is_mxfp4(raw: Mapping[str, Any]) -> bool:
    """Whether `config.json` describes experts in MXFP4."""
    return (raw.get("quantization_config") or {}).get("quant_method") == "mxfp4"


class PackedReader:
    """A [`Reader`] of the same tensors, with those in MXFP4 unpacked to bfloat16, which is exact.

    "x_blocks" [E, n, B, 16] and "x_scales" [E, n, B], both uint8, become "x" [E, 32·B, n], as gpt-oss's class has it.

    Args:
        reader: of the packed tensors.
        allow_nonfinite: read tensors with NaN or infinite entries too.

    Raises:
        ConversionError: if one of the two is missing or shapes do not fit.
    """

    def __init__(self, reader: Reader, allow_nonfinite: bool = False):
        self.reader, self.allow_nonfinite = reader, allow_nonfinite
        self.nonfinite = reader.nonfinite  # the same object, which grows with each `read`
        self.tensors: dict[str, TensorInfo] = {}
        self.packed: set[str] = set()
        for name, info in reader.tensors.items():
            whole = name.removesuffix(BLOCKS).removesuffix(SCALES)
            if whole == name or info.dtype != torch.uint8:
                self.tensors[name] = info
                continue
            blocks, scales = (reader.tensors.get(whole + suffix) for suffix in (BLOCKS, SCALES))
            if blocks is None or scales is None:
                other = whole + (SCALES if name.endswith(BLOCKS) else BLOCKS)
                raise ConversionError(f"the weights are incomplete: {name} is there, and {other} is missing")
            if len(blocks.shape) != 4 or blocks.shape != (*scales.shape, BLOCK // 2):
                raise ConversionError(
                    f"{whole}{BLOCKS} has the shape {list(blocks.shape)} and {whole}{SCALES} {list(scales.shape)}; "
                    f"MXFP4 has {BLOCK // 2} bytes to a scale"
                )
            E, n, B, _ = blocks.shape
            self.packed.add(whole)
            self.tensors[whole] = TensorInfo((E, BLOCK * B, n), torch.bfloat16)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors, on the CPU; valid until the result is dropped."""
        names = list(names)
        parts = ([n + BLOCKS, n + SCALES] if n in self.packed else [n] for n in names)
        found = self.reader.read(name for part in parts for name in part)
        packed = [n for n in names if n in self.packed]
        whole = {n: unpacked(found.pop(n + BLOCKS), found.pop(n + SCALES)) for n in packed}
        self.nonfinite |= nonfinite_in(
            whole, self.allow_nonfinite, lambda name: f"{name}{SCALES} are NaN or infinite; fetch the source again, or"
        )
        return {n: whole[n] if n in whole else found[n] for n in names}


def check_packed(reader: Reader, raw: Mapping[str, Any], experts: int | None) -> None:
    """Raise ConversionError for tensors in MXFP4 that are incomplete or do not fit a configuration.

    Args:
        reader: of the packed tensors.
        raw: the content of `config.json`.
        experts: of a layer; `None`: without experts.
    """
    found = PackedReader(reader)
    if found.packed and not is_mxfp4(raw):
        raise ConversionError(
            f"{min(found.packed)}{BLOCKS} is packed, and config.json has no quantization_config with the quant_method "
            "mxfp4"
        )
    for name in sorted(found.packed):
        if found.tensors[name].shape[0] != experts:
            raise ConversionError(
                f"{name}{BLOCKS} has {found.tensors[name].shape[0]} experts, and the configuration {experts}"
            )


def unpacked(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[E, n, B, 16] bytes, the lower four bits first, and [E, n, B] exponents -> bfloat16 [E, 32·B, n]."""
    numbers = torch.tensor([*E2M1, *(-x for x in E2M1)], dtype=torch.bfloat16)
    E, n, B, _ = blocks.shape
    whole = torch.empty(E, n, BLOCK * B, dtype=torch.bfloat16)
    for out, byte, scale in zip(whole, blocks, scales):  # an expert at a time, as indices take 8 bytes
        pairs = torch.stack((numbers[(byte & 15).int()], numbers[(byte >> 4).int()]), dim=-1)
        torch.ldexp(pairs.flatten(-2), scale.int()[..., None] - EXPONENT_BIAS, out=out.view(n, B, BLOCK))
    return whole.mT


def prediction_layers(names: Iterable[str], raw: Mapping[str, Any], layers: int) -> list[str]:
    """The tensors of layers that predict further tokens (DeepSeek-V3, arXiv 2412.19437), which the classes of
    transformers do not load.

    Args:
        names: of all tensors.
        raw: the content of `config.json`, which says how many there are.
        layers: of the model itself.

    Raises:
        ConversionError: if one of its fields is no number of layers.
    """
    given = {field: raw.get(field) or 0 for field in PREDICTION_FIELDS}
    for field, number in given.items():
        if not isinstance(number, int) or number < 0:
            raise ConversionError(f"{field} in config.json must be a number of layers, got {number!r}")
    count = max(given.values())
    found = ((name, _PREDICTION_NAMES.fullmatch(name)) for name in names) if count else ()
    return [
        name
        for name, match in found
        if match and (match["layer"] is None or layers <= int(match["layer"]) < layers + count)
    ]
