"""Read and write checkpoints tensor by tensor, without holding either in memory as a whole."""

import errno
import json
import math
import os
import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from mqa_hf.base.errors import ConversionError, listing

# (single file, index of shards), in the order of preference
LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def unsuited(self) -> str | None:
        """Why a weight cannot be converted, as a predicate; `None` if it can."""
        if self.dtype.is_floating_point and self.dtype.itemsize >= 2:
            return None
        return f"is stored as {self.dtype}; convert from 16-, 32- or 64-bit floats"


def count_nonfinite(tensor: torch.Tensor) -> int:
    """Number of NaN and infinite entries; 0 for integers and 8-bit floats, which are not checked."""
    if not tensor.is_floating_point() or tensor.element_size() < 2 or not tensor.numel():
        return 0
    if all(torch.isfinite(value) for value in tensor.aminmax()):  # memory-bound; propagates NaN
        return 0
    return int((~tensor.isfinite()).sum())


def nonfinite_in(tensors: Mapping[str, torch.Tensor], allowed: bool, said: Callable[[str], str]) -> dict[str, int]:
    """Number of NaN and infinite entries by tensor name, for tensors that have any.

    Args:
        tensors: the tensors read.
        allowed: whether there may be any.
        said: the part of the message after "entries of", from the name of a tensor.

    Raises:
        ConversionError: if there are any, unless `allowed`.
    """
    found = {name: count for name, tensor in tensors.items() if (count := count_nonfinite(tensor))}
    if found and not allowed:
        name, count = next(iter(found.items()))
        raise ConversionError(
            f"{count:,} of the {tensors[name].numel():,} entries of {said(name)} convert it anyway with "
            "`allow_nonfinite`"
        )
    return found


def check_range(name: str, tensor: torch.Tensor, cast: torch.Tensor, allow_nonfinite: bool) -> int:
    """Number of entries of a tensor that are not finite after a cast.

    Raises:
        ConversionError: if there are any, unless `allow_nonfinite`.
    """
    count = count_nonfinite(cast)
    if count and not allow_nonfinite:
        raise ConversionError(
            f"{count:,} of the {cast.numel():,} entries of {name} are too large for {cast.dtype} (up to "
            f"{float(tensor.abs().max()):.4g}; its maximum is {torch.finfo(cast.dtype).max:.4g}); use `dtype` "
            "bfloat16 or float32"
        )
    return count


class Reader(Protocol):
    """The tensors of a source.

    Attributes:
        tensors: name -> shape and dtype.
        nonfinite: name -> NaN and infinite entries of the tensors that were read, where there are any.
    """

    tensors: dict[str, TensorInfo]

    @property
    def nonfinite(self) -> dict[str, int]: ...

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors, on the CPU; valid until the result is dropped."""


class Writer(Protocol):
    """Receives the tensors of a result.

    Attributes:
        total_bytes: size of all planned tensors.
        nonfinite: name -> NaN and infinite entries of the tensors that were written, where there are any.
    """

    total_bytes: int
    nonfinite: dict[str, int]

    def write(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Take tensors, cast to the planned dtype; returns the number of bytes."""

    def finish(self) -> None:
        """Check that all tensors were written."""


class CheckpointReader:
    """The tensors of a checkpoint directory: safetensors or `pytorch_model.bin`, one file or sharded.

    Opening reads headers only. Each `read` maps the files it needs and unmaps them afterwards, so that pages do not
    accumulate in memory.

    Args:
        allow_nonfinite: read tensors with NaN or infinite entries too.

    Attributes:
        tensors: name -> shape and dtype.
        files: the weight files.
        nonfinite: name -> NaN and infinite entries of the tensors that were read, where there are any.

    Raises:
        ConversionError: for missing, truncated, inconsistent or unsafe files, and for NaN or infinite entries.
    """

    def __init__(self, directory: Path, allow_nonfinite: bool = False):
        self.directory = directory
        self.allow_nonfinite = allow_nonfinite
        self.nonfinite: dict[str, int] = {}
        self.files, indexed = self._find_files()
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, Path] = {}
        for path in self.files:
            for name, info in self._header(path).items():
                if name in self.tensors:
                    raise ConversionError(f"tensor {name} is in both {self._file_of[name].name} and {path.name}")
                self.tensors[name] = info
                self._file_of[name] = path
        if indexed is not None:
            self._check_index(indexed)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors, on the CPU; valid until the result is dropped."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file_of[name], []).append(name)
        tensors: dict[str, torch.Tensor] = {}
        for path, wanted in by_file.items():
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    tensors.update({name: file.get_tensor(name) for name in wanted})
            else:
                state = load_bin(path)
                tensors.update({name: state[name] for name in wanted})
        self.nonfinite |= nonfinite_in(
            tensors,
            self.allow_nonfinite,
            lambda name: f"{name} in {self._file_of[name].name} are NaN or infinite; fetch the source again, or",
        )
        return tensors

    def _find_files(self) -> tuple[list[Path], dict[str, str] | None]:
        for single, index in LAYOUTS:
            if (self.directory / single).is_file():
                return [self.directory / single], None
            if (self.directory / index).is_file():
                try:
                    weight_map = json.loads((self.directory / index).read_text(encoding="utf-8"))["weight_map"]
                    files = sorted({self.directory / name for name in weight_map.values()})
                    outside = [path.name for path in files if path.parent != self.directory]
                    missing = [path.name for path in files if not path.is_file()]
                except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                    raise ConversionError(f"{index} is not an index of shards: {str(error)[:200]}") from error
                if outside:
                    raise ConversionError(f"{index} names files outside its own directory: {listing(outside)}")
                if missing:
                    raise ConversionError(f"{index} names missing shards: {listing(missing)}")
                return files, weight_map
        wanted = ", ".join(name for layout in LAYOUTS for name in layout)
        raise ConversionError(f"no weights in {self.directory}: looked for {wanted}")

    def _header(self, path: Path) -> dict[str, TensorInfo]:
        if path.suffix != ".safetensors":
            return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in load_bin(path).items()}
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                unknown = {s.get_dtype() for s in slices.values()} - set(DTYPES)
                if unknown:
                    raise ConversionError(
                        f"{path.name} holds tensors of type {listing(unknown)}, which are not supported"
                    )
                return {n: TensorInfo(tuple(s.get_shape()), DTYPES[s.get_dtype()]) for n, s in slices.items()}
        except OSError as error:
            raise ConversionError(f"{path} cannot be read: {error}") from error
        except SafetensorError as error:
            raise ConversionError(
                f"{path.name} is truncated or corrupted ({path.stat().st_size:,} bytes; {error}); fetch it again"
            ) from error

    def _check_index(self, indexed: Mapping[str, str]) -> None:
        gone = [name for name, file in indexed.items() if self._file_of.get(name) != self.directory / file]
        if gone:
            raise ConversionError(f"the index names tensors that its shards do not contain: {listing(gone)}")
        extra = set(self.tensors) - set(indexed)
        if extra:
            raise ConversionError(f"the shards contain tensors that the index does not name: {listing(extra)}")


def load_bin(path: Path) -> dict[str, torch.Tensor]:
    """Load the state dict of a `.bin` file, memory-mapped, without running code from it.

    Raises:
        ConversionError: if the file is corrupted or holds anything but tensors.
    """
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # the format since PyTorch 1.6; an older file cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path.name} is corrupted or a pickle of more than tensors; it was not loaded, as it could run code "
            f"({_first_line(error)})"
        ) from error
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ConversionError(f"{path.name} is truncated or corrupted: {_first_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ConversionError(f"{path.name} does not hold a state dict of tensors")
    odd = [
        str(name) for name, t in state.items() if not isinstance(name, str) or t.is_meta or t.layout != torch.strided
    ]
    if odd:
        raise ConversionError(f"{path.name} holds tensors that are sparse, on meta or without a name: {listing(odd)}")
    return state


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def _reserve(file: BinaryIO, offset: int, size: int) -> None:
    """Reserve disk space, so that a full disk fails before the work."""
    try:
        os.posix_fallocate(file.fileno(), offset, size)
    except (AttributeError, OSError) as error:  # the system or the file system has no such call
        if getattr(error, "errno", None) not in (None, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        file.truncate(offset + size)


def shards(tensors: Mapping[str, TensorInfo], max_shard_size: int | str) -> StateDictSplit:
    """Assign tensors to files; raises ConversionError for an invalid size."""
    try:
        if float(str(max_shard_size).strip().upper().rstrip("KMGTB")) <= 0:
            raise ValueError
        return split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda info: info.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ConversionError(
            f"`max_shard_size` {max_shard_size!r} is not a size: it must be a positive number with a unit, such as "
            "5GB or 500MB"
        ) from error


class CheckpointWriter:
    """Writes safetensors shards whose layout is fixed in advance.

    The writer of safetensors holds a whole shard in memory; here each tensor is written to its place at once, in any
    order, so that memory does not depend on the shard size. The format is eight bytes of header length, a JSON
    header and the raw tensors: https://github.com/huggingface/safetensors#format

    Args:
        directory: an existing directory for the shards.
        tensors: name -> shape and dtype, in the order of the files.
        max_shard_size: bytes, or text such as "5GB".
        allow_nonfinite: write tensors with NaN or infinite entries too.

    Attributes:
        nonfinite: name -> NaN and infinite entries of the tensors that were written, where there are any.

    Raises:
        ConversionError: for an invalid size, and for numbers that the planned dtype cannot hold.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, TensorInfo],
        max_shard_size: int | str,
        allow_nonfinite: bool = False,
    ):
        self.allow_nonfinite = allow_nonfinite
        self.nonfinite: dict[str, int] = {}
        split = shards(tensors, max_shard_size)
        self.total_bytes = sum(info.nbytes for info in tensors.values())
        self._tensors = dict(tensors)
        self._pending = set(tensors)
        self._places: dict[str, tuple[Path, int]] = {}
        for file_name, names in split.filename_to_tensors.items():
            self._start_file(directory / file_name, names)
        if split.is_sharded:
            index = {
                "metadata": {
                    "total_size": self.total_bytes,
                    "total_parameters": sum(math.prod(info.shape) for info in tensors.values()),
                },
                "weight_map": split.tensor_to_filename,
            }
            (directory / LAYOUTS[0][1]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _start_file(self, path: Path, names: list[str]) -> None:
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            info = self._tensors[name]
            header[name] = {
                "dtype": SAFETENSORS_DTYPES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.nbytes],
            }
            offset += info.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            if offset:
                _reserve(file, 8 + len(encoded), offset)
        for name in names:
            self._places[name] = (path, 8 + len(encoded) + header[name]["data_offsets"][0])

    def write(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Write tensors, cast to the planned dtype; returns the number of bytes."""
        written = 0
        by_file: dict[Path, list[str]] = {}
        for name in tensors:
            by_file.setdefault(self._places[name][0], []).append(name)
        for path, names in by_file.items():
            with open(path, "r+b", buffering=0) as file:
                for name in names:
                    info, tensor = self._tensors[name], tensors[name]
                    assert tuple(tensor.shape) == info.shape, f"{name}: {tuple(tensor.shape)} for {info.shape}"
                    file.seek(self._places[name][1])
                    cast = tensor.to(info.dtype)
                    if count := check_range(name, tensor, cast, self.allow_nonfinite):
                        self.nonfinite[name] = count
                    raw = cast.contiguous().flatten().view(torch.uint8)
                    view = memoryview(raw.numpy())  # type: ignore[arg-type]
                    while view:
                        view = view[file.write(view) :]
                    written += info.nbytes
                    self._pending.discard(name)
        return written

    def finish(self) -> None:
        assert not self._pending, f"planned but never written: {listing(self._pending)}"
