"""The time of a fit by phase, for a shape of any size:

    python -m mqa_hf.eval.fitting_times llama-2-7b
    python -m mqa_hf.eval.fitting_times llama-2-70b --layers 80 --kv-heads 1

Weights are made as they are read and dropped when they would be written, so nothing of the model's size is stored.
The rest is the conversion's own walk over the layers, on random tokens. Its speed depends on neither.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from types import SimpleNamespace
from typing import Annotated, Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from mqa_hf.base.commands import run_job
from mqa_hf.base.devices import check_device
from mqa_hf.base.errors import MQAError
from mqa_hf.base.options import Job, Option
from mqa_hf.base.records import Record
from mqa_hf.base.shapes import SHAPES
from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.conversion import calibration
from mqa_hf.conversion.calibration import Calibration
from mqa_hf.conversion.canonical import canonical_shapes
from mqa_hf.conversion.convert import FITTED
from mqa_hf.conversion.pooling import choose_attentions
from mqa_hf.conversion.states import Examples, FitOptions, Stream
from mqa_hf.conversion.walk import walk

from .latent_choices import latent_models
from .shapes import fitted, read_shape
from .timing import wait_for

PHASES: dict[str, tuple[Any, str]] = {
    "weights to the device": (Stream, "layer"),
    "moments": (calibration, "look"),
    "moments of latents": (calibration, "look_for_latent"),
    "heads": (calibration, "fit_heads"),
    "latents": (calibration, "fit_latent"),
    "refit": (calibration, "refit"),
    "training": (calibration, "train"),
    "comparison": (calibration, "compare"),
    "tokens through the layer": (Stream, "advance"),
}
STD = 0.02  # of random weights


class FittingRecord(Record):
    """Seconds of a fit, all in all and by phase, and the most memory on the device, in bytes."""

    file = "fitting.jsonl"

    shape: str
    layers: int
    method: str
    tokens: int
    seconds: float
    phases: dict[str, float]
    peak_memory_bytes: int | None
    device: str
    command: str


@dataclass(frozen=True)
class FittingTiming(Job[FittingRecord]):
    """Time the fit of a shape, with random weights."""

    name = "fitting-times"

    shape: Annotated[str, Option("Published shape by name.", choices=tuple(SHAPES))]
    _: KW_ONLY
    method: Annotated[str, Option("Method of the fit.", choices=FITTED)] = "shared"
    kv_heads: Annotated[int, Option("New key/value heads.", min=1)] = 1
    latent: Annotated[int, Option("Width of latents.", min=1)] = 256
    key_width: Annotated[int, Option("Key components rebuilt from latents.", min=2)] = 1024
    fit_steps: Annotated[int, Option("Training steps of each latent after the closed form.", min=0)] = 0
    layers: Annotated[int | None, Option("Number of layers. Default: all.", min=1)] = None
    tokens: Annotated[int, Option("Calibration tokens.", min=1)] = 131_072
    sequence_length: Annotated[int, Option("Tokens per sequence.", min=4)] = 512
    device: Annotated[str | None, Option("Default: cuda if available, else cpu.")] = None

    def resolve(self) -> "FittingTiming":
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(device)
        layers = SHAPES[self.shape].get("num_hidden_layers")
        if layers is None:
            raise MQAError(f"{self.shape} does not say its layers as `num_hidden_layers`; give another shape")
        return replace(self, device=device, layers=min(self.layers or layers, layers))

    def run(self) -> FittingRecord:
        job = self.resolve()
        assert job.device is not None
        shape = {**SHAPES[job.shape], "num_hidden_layers": job.layers}
        with mock.patch.dict(SHAPES, {job.shape: shape}):
            config = read_shape(job.shape)[1]
        if not isinstance(config, MQAConfig):
            raise MQAError(f"{job.shape} is no decoder-only model of this package; give another shape")
        if job.method == "latent":
            [pooled] = latent_models(config, [job.latent], [job.key_width], None).values()
        else:
            pooled = fitted(config, job.kv_heads)
        rows = -(-job.tokens // job.sequence_length)
        held_out = max(rows // 16, 1)
        tokens = torch.randint(0, config.vocab_size, (rows + held_out, job.sequence_length))
        options = FitOptions(job.method, steps=job.fit_steps, held_out=held_out, device=job.device)
        device = torch.device(job.device)
        phases: dict[str, float] = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        maker = Calibration(config, pooled, Examples(tokens), choose_attentions(config, None), options)
        with timed_phases(phases, device):
            walk(made_as_read(config, device), maker, Nowhere())
        seconds = time.perf_counter() - start
        return FittingRecord(
            shape=job.shape, layers=config.num_hidden_layers, method=job.method, tokens=job.tokens, seconds=seconds,
            phases=phases | {"waiting for weights, and the rest": seconds - sum(phases.values())},
            peak_memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU", command=job.command(),
        )  # fmt: skip

    def show(self, result: FittingRecord, console: Console) -> None:
        memory = "" if result.peak_memory_bytes is None else f", {result.peak_memory_bytes / 2**30:.1f} GiB at most"
        table = Table(
            title=f"{result.shape}, {result.layers} layers, {result.method}, {result.tokens:,} tokens, "
            f"{result.device}: {result.seconds:.1f} s{memory}",
            title_justify="left",
        )
        table.add_column("phase")
        table.add_column("seconds", justify="right")
        for name, seconds in result.phases.items():
            table.add_row(name, f"{seconds:.1f}")
        console.print(table)


@contextmanager
def timed_phases(seconds: dict[str, float], device: torch.device) -> Iterator[None]:
    """Add up the seconds of the functions in [`PHASES`]; calls inside others count for those."""
    inside = False

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal inside
            if inside:
                return function(*arguments, **options)
            inside, start = True, now(device)
            try:
                return function(*arguments, **options)
            finally:
                inside = False
                seconds[name] = seconds.get(name, 0.0) + now(device) - start

        return run

    with ExitStack() as stack:
        for name, (owner, attribute) in PHASES.items():
            stack.enter_context(mock.patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        yield


def now(device: torch.device) -> float:
    wait_for(device)
    return time.perf_counter()


def made_as_read(config: MQAConfig, device: torch.device) -> SimpleNamespace:
    """What [`walk`] reads of a plan: the tensors of a part are random numbers, made when they are read."""
    shapes = canonical_shapes(config)
    parts: list[tuple[Any, list[str]]] = [(None, [name for name in shapes if ".layers." not in name])]
    parts += [(("", i), [n for n in shapes if f".layers.{i}." in n]) for i in range(config.num_hidden_layers)]

    def read(part: Any) -> dict[str, torch.Tensor]:
        found = {}
        for name in part.names:
            made = torch.ones(shapes[name], dtype=torch.bfloat16, device=device)
            found[name] = (made if made.ndim == 1 else made.normal_(std=STD)).cpu()
        return found

    return SimpleNamespace(
        parts=[SimpleNamespace(layer=layer, names=names) for layer, names in parts],
        reading=SimpleNamespace(read=read),
        written=lambda part, canonical: canonical,
        zeros=(),
        tensors={},
    )


class Nowhere:
    """A writer that keeps nothing."""

    def __init__(self) -> None:
        self.total_bytes = 0
        self.nonfinite: dict[str, int] = {}

    def write(self, tensors: dict[str, torch.Tensor]) -> int:
        return 0

    def finish(self) -> None:
        pass


if __name__ == "__main__":
    run_job(FittingTiming)
