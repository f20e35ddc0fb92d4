"""How fast decoding is, through the door that people use: `mqa-hf benchmark`.

Everything is timed around `generate()`: a streamer notes when each token arrives. The cache is filled with random
numbers instead of reading a prompt, which would take longer than all the rest; weights are random too, since speed
does not depend on either. Beside the time stands what the step had to read, and the time that the device needs for
that at least (`roofline.py`).

Engines are `mqa-hf` (this package's loop), `dynamic` (transformers' loop with its growing cache) and `static`
(transformers' loop with a static cache, compiled), the last two with the class of transformers that can hold the
model, or with ours where there is none. Types that are converted in their own class only are timed in that class, with
transformers' loops.
"""

import gc
import json
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, PreTrainedConfig, StaticCache
from transformers.generation.streamers import BaseStreamer

from mqa_hf import MQAForCausalLM, MQAForConditionalGeneration, MQASeq2SeqConfig, __version__
from mqa_hf.base.datasheets import Device
from mqa_hf.base.devices import DTYPES, check_device
from mqa_hf.base.errors import MQAError
from mqa_hf.base.shapes import unique_names
from mqa_hf.cache_mqa import DecodeCache
from mqa_hf.conversion.families import family_of
from mqa_hf.conversion.plan import decoder_of
from mqa_hf.conversion.pooling import choose_attentions, with_heads
from mqa_hf.rules_mqa import CACHE

from .roofline import largest_batch, measured_device, step_cost
from .shapes import Config, OwnShape, Weights, attention_layers, read_shape

ENGINES = ("mqa-hf", "dynamic", "static")
WARMUP = 8  # tokens that are not counted


@dataclass(frozen=True)
class Contender:
    """A model to time: `config` of this package, and the configuration of the class that `engine` runs.

    `original` says whether it has as many key/value heads as the shape; `weights` how many weights it has, where
    `config` is only its attention.
    """

    shape: str
    original: bool
    engine: str
    kv_heads: int
    config: Config
    run: PreTrainedConfig
    weights: Weights | None = None

    @property
    def name(self) -> str:
        return f"{type(self.run).__name__.removesuffix('Config')}, {self.kv_heads} K/V heads, {self.engine}"


class Clock(BaseStreamer):
    """Notes when tokens arrive; the first call is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def contenders(
    shape: str, source: PreTrainedConfig, config: Config, kv_heads: list[int], engines: list[str]
) -> list[Contender]:
    """Every number of heads (0: as many as the source has) with every engine."""
    original = decoder_of(config).num_key_value_heads
    found = []
    for heads in dict.fromkeys(n or original for n in kv_heads):
        if original % heads:
            raise MQAError(f"--kv-heads {heads} must divide the {original} key/value heads of {shape}")
        ours = config if heads == original else with_heads(config, heads, choose_attentions(config, None))
        theirs: PreTrainedConfig = ours
        if heads == original:
            theirs = source
        elif not isinstance(ours, MQASeq2SeqConfig) and source.model_type != ours.model_type:
            native = family_of(source.model_type).native
            with suppress(MQAError):  # the class has no place for this model with fewer heads
                theirs = native(source, ours) if native is not None else ours
        for engine in engines:
            found.append(
                Contender(shape, heads == original, engine, heads, ours, ours if engine == "mqa-hf" else theirs)
            )
    return found


def own_contenders(shape: str, own: OwnShape, kv_heads: list[int], engines: list[str]) -> list[Contender]:
    """The same for a model in its own class, which transformers' loops run."""
    if "mqa-hf" in engines:
        raise MQAError(
            f"{shape}: {own.run.model_type} runs in its own class, with transformers' loops only ({own.why}); use "
            "--engines dynamic, static or both"
        )
    original = own.config.num_key_value_heads
    models = [own.with_heads(heads) for heads in dict.fromkeys(n or original for n in kv_heads)]
    return [
        Contender(
            shape, fewer is own, engine, fewer.config.num_key_value_heads, fewer.config, fewer.run, fewer.weights
        )
        for fewer in models
        for engine in engines
    ]


def build(contender: Contender, dtype: torch.dtype, device: str) -> Any:
    """The model, with random weights."""
    classes: dict[bool, Any] = {False: AutoModelForCausalLM, True: AutoModelForSeq2SeqLM}
    several = isinstance(contender.config, MQASeq2SeqConfig)
    with torch.device(device):
        if contender.run is contender.config:
            cls: Any = MQAForConditionalGeneration if several else MQAForCausalLM
            model = cls._from_config(contender.run, dtype=dtype)
            model.decoding.enabled = contender.engine == "mqa-hf"
        else:
            model = classes[several].from_config(contender.run, dtype=dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if several:
        model.generation_config.decoder_start_token_id = 0
    return model.eval()


def filled_cache(contender: Contender, model: Any, batch: int, context: int, capacity: int) -> Any:
    """A cache in which `context` positions are random numbers."""
    config, dtype, device = decoder_of(contender.config), model.dtype, model.device
    if contender.engine == "mqa-hf":
        cache = DecodeCache(config, batch, capacity, model.decoding.cache_dtype or dtype, device)
        layers: Any = cache.layers
        for layer in layers:
            for states in layer.buffers().values():
                for row in states:  # float8 has no random numbers of its own, and a whole copy may not fit
                    row.copy_(torch.randn(row.shape, dtype=dtype, device=device))
        cache.set_length(context)
        return cache
    text = contender.run.get_text_config(decoder=True)
    other: Any = DynamicCache(config=text)
    if contender.engine == "static":
        other = StaticCache(config=text, max_cache_len=capacity)
    for i in attention_layers(text):
        shapes = [(batch, contender.kv_heads, context, w) for w in (config.qk_head_dim, config.v_head_dim)]
        other.update(*(torch.randn(shape, dtype=dtype, device=device) for shape in shapes), i)
    return other


def cache_bytes(cache: Any) -> int:
    tensors = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor) and t.ndim > 2]
    return sum(t.numel() * t.element_size() for t in tensors)


def settle(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def time_tokens(contender: Contender, model: Any, batch: int, context: int, tokens: int) -> dict[str, Any]:
    """Time `tokens` steps of `batch` rows that start with `context` positions in the cache.

    Returns:
        `step_sec` of each step, `warmup_sec` (what the first steps took longer), `cache_bytes`, `weight_bytes`,
        `peak_memory_bytes`.
    """
    settle(model.device)
    capacity = context + WARMUP + tokens + 1
    cache = filled_cache(contender, model, batch, context - 1, capacity)
    prompt = torch.randint(1, decoder_of(contender.config).vocab_size, (batch, context), device=model.device)
    clock = Clock()
    began = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        **{CACHE: cache},
        max_new_tokens=WARMUP + tokens,
        do_sample=False,
        streamer=clock,
    )
    times = [began, *clock.times[1:]]  # the prompt itself is the first piece
    steps = [after - before for before, after in pairwise(times)]
    counted = steps[WARMUP:]
    record = {
        "step_sec": counted,
        "warmup_sec": max(0.0, sum(steps[:WARMUP]) - WARMUP * statistics.median(counted)),
        "cache_bytes": cache_bytes(cache),
        "weight_bytes": sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values()),
    }
    if model.device.type == "cuda":
        record["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    if contender.engine == "mqa-hf":
        model.decoding.release()
    return record


def time_to_first_token(model: Any, vocab: int, batch: int, context: int) -> float:
    """Seconds from a prompt of `context` tokens to the first new one, the better of two."""
    prompt = torch.randint(1, vocab, (batch, context), device=model.device)
    seconds = []
    for _ in range(2):
        settle(model.device)
        began = time.perf_counter()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if hasattr(model, "decoding"):
        model.decoding.release()
    return min(seconds)


def time_seq2seq(
    model: Any, vocab: int, batch: int, source: int, tokens: int, beams: int, repeats: int = 3
) -> dict[str, Any]:
    """Time decoding of `tokens` tokens with a source of `source`, what the last three quarters take longer, and the
    encoder (`encoder_sec`)."""
    settle(model.device)
    prompt = torch.randint(1, vocab, (batch, source), device=model.device)
    few = max(1, tokens // 4)
    seconds: dict[int, list[float]] = {few: [], tokens: []}
    began = time.perf_counter()
    for i in range(repeats + 1):
        for n in seconds:
            start = time.perf_counter()
            model.generate(prompt, max_new_tokens=n, do_sample=False, num_beams=beams)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                seconds[n].append(time.perf_counter() - start)
        if i == 0:
            first = time.perf_counter() - began
    encoder, reading = model.get_encoder(), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        encoder(prompt, attention_mask=torch.ones_like(prompt))
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        reading.append(time.perf_counter() - start)
    steps = [(b - a) / (tokens - few) for a, b in zip(*seconds.values())]
    usual = statistics.median(seconds[few]) + statistics.median(seconds[tokens])
    record = {"step_sec": steps, "warmup_sec": max(0.0, first - usual)}
    record["total_sec"] = statistics.median(seconds[tokens])
    record["encoder_sec"] = statistics.median(reading[1:])
    if model.device.type == "cuda":
        record["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    if hasattr(model, "decoding"):
        model.decoding.release()
    return record


def said(contender: Contender, batch: int, context: int, beams: int) -> dict[str, Any]:
    """What a record is of."""
    return {
        "shape": contender.shape,
        "original": contender.original,
        "model": contender.name,
        "engine": contender.engine,
        "kv_heads": contender.kv_heads,
        "batch": batch,
        "context": context,
        "beams": beams,
    }


def finish(
    record: dict[str, Any], contender: Contender, batch: int, context: int, beams: int, source: int, device: Device
) -> dict[str, Any]:
    """Add what follows from the times and the shape."""
    steps = record.pop("step_sec")
    median = statistics.median(steps)
    tenths = statistics.quantiles(steps, n=10) if len(steps) > 1 else steps * 9
    itemsize = DTYPES[record["dtype"]].itemsize
    cost = step_cost(decoder_of(contender.config), batch * beams, context, source, itemsize, contender.weights)
    floor = cost.seconds(device)
    return {
        **said(contender, batch, context, beams),
        "time_per_token_ms": 1000 * median,
        "time_per_token_p10_ms": 1000 * tenths[0],
        "time_per_token_p90_ms": 1000 * tenths[-1],
        "tokens_per_sec": batch / median,
        "bytes_per_step": cost.weight_bytes + cost.cache_bytes,
        "floor_ms": 1000 * floor,
        "floor_share": floor / median,
        "bandwidth_share": (cost.weight_bytes + cost.cache_bytes) / median / device.bandwidth,
        **record,
    }


class Bench:
    """Runs cells, holding as few models as can be."""

    def __init__(self, dtype: str, device: str, tokens: int, prefill_limit: int):
        if dtype not in DTYPES:
            raise MQAError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.dtype, self.device, self.tokens, self.prefill_limit = dtype, device, tokens, prefill_limit
        self.limits = measured_device(device)
        self.models: dict[tuple, Any] = {}
        self.facts = {
            "dtype": dtype,
            "device": self.limits.name,
            "copy_bandwidth": self.limits.bandwidth,
            "matmul_rate": self.limits.rate,
            "versions": {
                "mqa-hf": __version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }

    def model(self, contender: Contender) -> Any:
        key = (contender.shape, type(contender.run), contender.kv_heads, contender.engine == "mqa-hf")
        if key not in self.models:
            if self.device != "cpu":
                self.models.clear()
                settle(torch.device(self.device))
            self.models[key] = build(contender, DTYPES[self.dtype], self.device)
        return self.models[key]

    @torch.no_grad()
    def cell(self, contender: Contender, batch: int, context: int, beams: int = 1) -> dict[str, Any]:
        several = isinstance(contender.config, MQASeq2SeqConfig)
        facts, vocab = self.facts, decoder_of(contender.config).vocab_size
        try:
            model = self.model(contender)
            if several:
                record = {"source": context, **time_seq2seq(model, vocab, batch, context, self.tokens, beams)}
                return finish({**record, **facts}, contender, batch, self.tokens * 5 // 8, beams, context, self.limits)
            record = time_tokens(contender, model, batch, context, self.tokens)
            if batch * context <= self.prefill_limit:
                record["time_to_first_token_sec"] = time_to_first_token(model, vocab, batch, context)
            return finish({**record, **facts}, contender, batch, context, beams, 0, self.limits)
        except torch.OutOfMemoryError as error:
            self.models.clear()
            gone = str(error).split(". ")[0]
        except Exception as error:  # whatever a class raises whose cache holds more than keys and values
            if contender.weights is None:
                raise
            raise MQAError(
                f"{contender.shape}: {contender.run.model_type} does not run from a cache of {context} positions with "
                f"--engines {contender.engine}: {error}"
            ) from error
        settle(torch.device(self.device))
        return {**said(contender, batch, context, beams), "error": gone, **facts}

    def largest(self, contender: Contender, context: int) -> dict[str, Any]:
        """The cell with the largest batch that fits."""
        config = decoder_of(contender.config)
        itemsize = DTYPES[self.dtype].itemsize
        capacity = context + WARMUP + self.tokens + 1
        batch = largest_batch(config, capacity, self.limits.memory, 0, itemsize, contender.weights)
        record = {**said(contender, 0, context, 1), "error": "it does not fit at all", **self.facts}
        while batch > 0:
            record = self.cell(contender, batch, context)
            if "error" not in record:
                break
            batch = min(batch - 1, int(batch * 0.94))
        return {**record, "largest_batch": True}


def run(
    bench: Bench, found: list[Contender], cells: list[tuple[int, int, int]], rounds: int, largest: list[int]
) -> Iterator[dict[str, Any]]:
    """All cells (batch, context, beams), one record each, then the largest batch at each context of `largest`.

    With several rounds the contenders take turns, and of each the run with the middle time is kept.
    """
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        task = progress.add_task("timing", total=(len(cells) * rounds + len(largest)) * len(found))
        if rounds == 1:
            for contender in found:
                for cell in cells:
                    progress.update(task, description=f"{contender.name}, batch {cell[0]}, context {cell[1]}")
                    yield bench.cell(contender, *cell)
                    progress.advance(task)
                for n in largest:
                    progress.update(task, description=f"{contender.name}, largest batch, context {n}")
                    yield bench.largest(contender, n)
                    progress.advance(task)
            return
        for cell in cells:
            turns: list[list[dict[str, Any]]] = [[] for _ in found]
            for _ in range(rounds):
                for contender, records in zip(found, turns):
                    progress.update(task, description=f"{contender.name}, batch {cell[0]}, context {cell[1]}")
                    records.append(bench.cell(contender, *cell))
                    progress.advance(task)
            for records in turns:
                middle = sorted(records, key=lambda r: r.get("time_per_token_ms", 0.0))[len(records) // 2]
                yield middle


def labels(records: list[dict[str, Any]]) -> list[str]:
    """What each record is of, as far as it differs from others: the shape, the model, or both."""
    shapes, pairs = {r["shape"] for r in records}, {(r["shape"], r["model"]) for r in records}
    if len(shapes) == 1:
        return [r["model"] for r in records]
    names = dict(zip(sorted(shapes), unique_names(sorted(shapes))))
    if len(pairs) == len(shapes):
        return [names[r["shape"]] for r in records]
    return [f"{names[r['shape']]}: {r['model']}" for r in records]


def table(records: list[dict[str, Any]], title: str) -> Table:
    """A row for each record; columns that no record has anything for are left out."""
    rows = []
    for r, name in zip(records, labels(records)):
        said = {
            "model": name,
            "batch": f"{r['batch']}{' (largest)' if r.get('largest_batch') else ''}" if "batch" in r else "-",
            "context": f"{r['source']} to {r['context']}" if "source" in r else str(r.get("context", "-")),
            "beams": str(r.get("beams", "-")),
        }
        if "error" in r:
            rows.append({**said, "ms/token": r["error"][:40]})
            continue
        rows.append(
            {
                **said,
                "ms/token": f"{r['time_per_token_ms']:.2f}",
                "p10 to p90": f"{r['time_per_token_p10_ms']:.2f} to {r['time_per_token_p90_ms']:.2f}",
                "tokens/s": f"{r['tokens_per_sec']:,.0f}",
                "first token, s": f"{r['time_to_first_token_sec']:.3f}" if "time_to_first_token_sec" in r else "-",
                "encoder, ms": f"{1000 * r['encoder_sec']:.2f}" if "encoder_sec" in r else "-",
                "warm-up, s": f"{r['warmup_sec']:.1f}",
                "cache, GB": f"{r['cache_bytes'] / 1e9:.2f}" if "cache_bytes" in r else "-",
                "peak, GB": f"{r['peak_memory_bytes'] / 1e9:.2f}" if "peak_memory_bytes" in r else "-",
                "floor, ms": f"{r['floor_ms']:.2f}",
                "of the floor": f"{100 * r['floor_share']:.0f}%",
                "of copy": f"{100 * r['bandwidth_share']:.0f}%",
            }
        )
    shown = Table(title=title, title_justify="left")
    nothing = {name for row in rows for name in row if all(row.get(name, "-") == "-" for row in rows)}
    if all(row["beams"] == "1" for row in rows):
        nothing.add("beams")
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in nothing]
    for name in names:
        shown.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*(row.get(name, "") for name in names))
    return shown


def plots(records: list[dict[str, Any]], directory: Path) -> list[Path]:
    """Time per token over the context for each batch, and tokens per second over the batch for each context."""
    try:
        import matplotlib
    except ImportError as error:
        raise MQAError("--plots needs matplotlib; pip install 'mqa-hf[benchmark]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    good = [{**r, "label": name} for r, name in zip(records, labels(records)) if "error" not in r]
    shapes = ", ".join(dict.fromkeys(Path(r["shape"]).name for r in good))
    written = []
    for over, per, quantity, label in (
        ("context", "batch", "time_per_token_ms", "ms per token"),
        ("batch", "context", "tokens_per_sec", "tokens per second"),
    ):
        for fixed in sorted({r[per] for r in good if not r.get("largest_batch")}):
            figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
            for model in dict.fromkeys(r["label"] for r in good):
                some = [r for r in good if r["label"] == model and r[per] == fixed and not r.get("largest_batch")]
                some = sorted(some, key=lambda r: r[over])
                if some:
                    axes.plot([r[over] for r in some], [r[quantity] for r in some], marker="o", label=model)
            axes.set(xlabel=over, ylabel=label, title=f"{shapes}, {good[0]['device']}, {per} {fixed}")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.grid(True, which="both", alpha=0.3)
            axes.legend(fontsize=8)
            path = directory / f"{quantity}_{per}_{fixed}.png"
            figure.savefig(path, dpi=150)
            pyplot.close(figure)
            written.append(path)
    return written


def benchmark(
    shapes: list[str],
    kv_heads: list[int],
    engines: list[str] | None,
    cells: list[tuple[int, int, int]],
    tokens: int,
    dtype: str,
    device: str,
    window: int | None,
    largest: list[int],
    prefill_limit: int,
    rounds: int | None,
    output: Path | None,
    plot_directory: Path | None,
    command: str = "",
) -> list[dict[str, Any]]:
    """The command: a table, one JSON line per cell in `output`, pictures in `plot_directory`.

    All shapes, heads and engines are timed in one run and, with several `rounds` (the default on a CPU), in turns.
    `engines`: default mqa-hf and dynamic, of models in their own class dynamic. `command` is noted in each record.
    """
    unknown = [engine for engine in engines or () if engine not in ENGINES]
    if unknown:
        raise MQAError(f"--engines takes {', '.join(ENGINES)}, got {', '.join(unknown)}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise MQAError(f"--device {device}: PyTorch sees no CUDA device; use --device cpu")
    check_device(device)
    bench = Bench(dtype, device, tokens, prefill_limit)
    found: list[Contender] = []
    for shape in dict.fromkeys(shapes):
        source, config = read_shape(shape)
        several = isinstance(config, MQASeq2SeqConfig)
        if any(beams > 1 for *_, beams in cells) and not several:
            raise MQAError(
                f"--beams is for encoder-decoder shapes; tokens of a beam search are not streamed ({shape})"
            )
        if largest and (device == "cpu" or several):
            raise MQAError(f"--largest-batch is for decoder-only shapes on a GPU ({shape}, {device})")
        if isinstance(config, OwnShape):
            if window is not None:
                raise MQAError(f"--window is for models in this package's class; {shape} runs in its own")
            found += own_contenders(shape, config, kv_heads, engines or ["dynamic"])
            continue
        if window is not None:
            if window < 2:
                raise MQAError(f"--window must be at least 2 positions; got {window}")
            decoder = decoder_of(config)
            decoder.layer_types, decoder.sliding_window = ["sliding_attention"] * decoder.num_hidden_layers, window
        ours = contenders(shape, source, config, kv_heads, engines or ["mqa-hf", "dynamic"])
        # With a window all run our class; transformers' would not have it.
        found += ours if window is None else [replace(c, run=c.config) for c in ours]
    rounds = rounds or (3 if device == "cpu" else 1)
    records = []
    console = Console()
    for record in run(bench, found, cells, rounds, largest):
        record["command"] = command
        records.append(record)
        if output is not None:
            with output.open("a") as lines:
                lines.write(json.dumps(record) + "\n")
    limits = f"copy {bench.limits.bandwidth / 1e12:.2f} TB/s, matrix product {bench.limits.rate / 1e12:.1f} TFLOP/s"
    title = f"{', '.join(shapes)}, {dtype}, {bench.limits.name} ({limits})" + (f", window {window}" if window else "")
    console.width = max(console.width, 250)  # the table takes what it needs
    console.print(table(records, title))
    if plot_directory is not None:
        for path in plots(records, plot_directory):
            console.print(f"wrote {path}", highlight=False)
    return records
