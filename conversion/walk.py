"""Read, pool or fit, and write one layer after the other."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mqa_hf.base.console import NORMAL, progress_bar, verbosity
from mqa_hf.base.errors import ConversionError

from .calibration import Calibration
from .checkpoint import Writer
from .matching import Layer
from .plan import Part, Plan, Reading, Tensors
from .record import LayerRecord


class HeadMaker(Protocol):
    """Makes the new heads of a layer: [`Pooling`], or [`Calibration`], which fits them."""

    def ahead(self, layer: Layer, tensors: Tensors) -> None:
        """Prepare for the tensors of a layer, in another thread, while the one before is converted."""

    def outside(self, tensors: Tensors) -> None:
        """Take tensors outside the layers, which come first."""

    def convert(self, layer: Layer, tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
        """Convert the tensors of a layer; returns them and their errors."""


def walk(plan: Plan, maker: HeadMaker, writer: Writer) -> list[LayerRecord]:
    """Read, convert and write one layer after the other, and tensors outside the layers one by one.

    While a layer is converted, the next one is read and the last one is written.

    Returns:
        The errors of each layer from `maker`.
    """
    count = sum(part.layer is not None for part in plan.parts)
    records: list[LayerRecord] = []

    @torch.no_grad()  # which holds in one thread only
    def write(part: Part, canonical: Tensors) -> int:
        return writer.write(plan.written(part, canonical))

    with _progress(DownloadColumn(), TransferSpeedColumn()) as bar, torch.no_grad(), ThreadPoolExecutor(1) as behind:
        task = bar.add_task("embeddings", total=writer.total_bytes)
        written: Future[int] | None = None
        for part, canonical in read_ahead(plan.reading, plan.parts, maker):
            if part.layer is None:
                maker.outside(canonical)
            else:
                stack, number = part.layer
                bar.update(task, description=f"layer {len(records) + 1}/{count}")
                with decomposable(part.layer):
                    canonical, errors = maker.convert(part.layer, canonical)
                if errors and isinstance(maker, Calibration) and verbosity() >= NORMAL:
                    said = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in errors.items())
                    bar.console.print(f"{stack} layer {number}: {said}".strip(), highlight=False, soft_wrap=True)
                records.append(
                    LayerRecord.model_validate({"layer": number, **({"stack": stack} if stack else {}), **errors})
                )
            if written is not None:
                bar.advance(task, written.result())
            written = behind.submit(write, part, canonical)
        if written is not None:
            bar.advance(task, written.result())
        bar.advance(task, writer.write({name: torch.zeros(plan.tensors[name].shape) for name in plan.zeros}))
    writer.finish()
    return records


def read_ahead(reading: Reading, parts: Sequence[Part], maker: HeadMaker) -> Iterator[tuple[Part, Tensors]]:
    """The parts and their canonical tensors, each read while the one before is in use."""

    @torch.no_grad()
    def read(part: Part) -> Tensors:
        canonical = reading.read(part)
        if part.layer is not None:
            maker.ahead(part.layer, canonical)
        return canonical

    with ThreadPoolExecutor(1) as ahead:
        found = [ahead.submit(read, part) for part in parts[:1]]
        for part, following in zip(parts, [*parts[1:], None]):
            canonical = found.pop().result()
            if following is not None:
                found.append(ahead.submit(read, following))
            yield part, canonical


def survey(reading: Reading, calibration: Calibration) -> dict[str, list[Any]]:
    """Walk over the layers without writing; returns the result of [`Calibration.survey`] per attention and layer."""
    curves: dict[str, list[Any]] = {}
    with _progress() as bar, torch.no_grad():
        task = bar.add_task("surveying layers", total=len(reading.parts))
        for part, canonical in read_ahead(reading, reading.parts, calibration):
            if part.layer is None:
                calibration.outside(canonical)
            else:
                with decomposable(part.layer):
                    found = calibration.survey(part.layer, canonical)
                for name, its in found.items():
                    curves.setdefault(name, []).append(its)
            bar.advance(task)
    return curves


@contextmanager
def decomposable(layer: Layer) -> Iterator[None]:
    """Raise ConversionError in place of LAPACK's errors."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        stack, number = layer
        raise ConversionError(
            f"nothing can be fitted in {stack + ' ' if stack else ''}layer {number}: its activations are too large "
            f"or too small for float64; check its weights, or use a `method` without calibration"
        ) from error


def _progress(*columns: ProgressColumn) -> Progress:
    return progress_bar(TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
