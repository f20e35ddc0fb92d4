"""Time decoding through `generate()`: a streamer records when each token arrives.

The cache is filled with random numbers instead of reading a prompt, which would take longer than everything else.
Records also hold what a step reads, and its minimum time on the device (`roofline.py`).
"""

import gc
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from mqa_hf.base.console import first_rank, progress_bar, say
from mqa_hf.base.devices import DTYPES
from mqa_hf.base.errors import MQAError
from mqa_hf.cache_mqa import DecodeCache
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig
from mqa_hf.conversion.canonical import decoder_of
from mqa_hf.parallel_mqa import local
from mqa_hf.rules_mqa import CACHE

from .attention_sizes import Keys
from .benchmark import WARMUP, Benchmark, Cell
from .benchmark_record import BenchmarkRecord
from .contenders import Contender, cache_bytes, contenders_of, filled_cache, random_model
from .roofline import measured_device
from .timing_plots import draw_times


class TokenClock(BaseStreamer):
    """Records when tokens arrive; the first call is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass
class Times:
    """Measurements of a cell, in seconds and bytes.

    Attributes:
        step_sec: time of each step.
        warmup_sec: extra time of the first steps.
        total_sec, encoder_sec: for an encoder-decoder model, all tokens including the encoder, and the encoder alone.
        keys: how this package's loop kept the keys of a latent.
    """

    step_sec: list[float]
    warmup_sec: float
    cache_bytes: int | None = None
    weight_bytes: int | None = None
    peak_memory_bytes: int | None = None
    time_to_first_token_sec: float | None = None
    total_sec: float | None = None
    encoder_sec: float | None = None
    keys: Keys | None = None


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clear_memory(device: torch.device) -> None:
    """Free unused memory, and reset its peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def time_tokens(contender: Contender, model: Any, batch: int, context: int, tokens: int) -> Times:
    """Time `tokens` steps of `batch` rows that start with `context` positions in the cache."""
    clear_memory(model.device)
    capacity = context + WARMUP + tokens + 1
    cache = filled_cache(contender, model, batch, context - 1, capacity)
    prompt = torch.randint(1, decoder_of(contender.config).vocab_size, (batch, context), device=model.device)
    clock = TokenClock()
    began = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        **{CACHE: cache},
        max_new_tokens=WARMUP + tokens,
        do_sample=False,
        streamer=clock,
    )
    arrived = [began, *clock.times[1:]]  # the first call is the prompt itself
    steps = [after - before for before, after in pairwise(arrived)]
    counted = steps[WARMUP:]
    found = Times(
        step_sec=counted,
        warmup_sec=max(0.0, sum(steps[:WARMUP]) - WARMUP * statistics.median(counted)),
        cache_bytes=cache_bytes(cache),
        keys=kept_keys(cache),
        weight_bytes=sum(
            {p.data_ptr(): p.numel() * p.element_size() for p in map(local, model.parameters())}.values()
        ),
        peak_memory_bytes=peak_memory(model.device),
    )
    if contender.engine == "mqa-hf":
        model.decoding.release()
    return found


def time_to_first_token(model: Any, vocab: int, batch: int, context: int) -> float:
    """Seconds from a prompt of `context` tokens to the first new one, the shorter of two runs."""
    prompt = torch.randint(1, vocab, (batch, context), device=model.device)
    seconds = []
    for _ in range(2):
        clear_memory(model.device)
        began = time.perf_counter()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)
        wait_for(model.device)
        seconds.append(time.perf_counter() - began)
    if hasattr(model, "decoding"):
        model.decoding.release()
    return min(seconds)


def time_seq2seq(model: Any, vocab: int, batch: int, source: int, tokens: int, beams: int, repeats: int = 3) -> Times:
    """Time decoding of `tokens` tokens with a source of `source`: the extra time of the last three quarters."""
    clear_memory(model.device)
    prompt = torch.randint(1, vocab, (batch, source), device=model.device)
    few = max(1, tokens // 4)
    seconds: dict[int, list[float]] = {few: [], tokens: []}
    began, first = time.perf_counter(), 0.0
    for i in range(repeats + 1):
        for n in seconds:
            start = time.perf_counter()
            model.generate(prompt, max_new_tokens=n, do_sample=False, num_beams=beams)
            wait_for(model.device)
            if i:
                seconds[n].append(time.perf_counter() - start)
        if i == 0:
            first = time.perf_counter() - began
    encoder, reading = model.get_encoder(), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        encoder(prompt, attention_mask=torch.ones_like(prompt))
        wait_for(model.device)
        reading.append(time.perf_counter() - start)
    usual = statistics.median(seconds[few]) + statistics.median(seconds[tokens])
    found = Times(
        step_sec=[(b - a) / (tokens - few) for a, b in zip(*seconds.values())],
        warmup_sec=max(0.0, first - usual),
        total_sec=statistics.median(seconds[tokens]),
        encoder_sec=statistics.median(reading[1:]),
        peak_memory_bytes=peak_memory(model.device),
    )
    if hasattr(model, "decoding"):
        engine = model.decoding.engine
        found.keys = None if engine is None else kept_keys(engine.cache)
        model.decoding.release()
    return found


def kept_keys(cache: Any) -> Keys | None:
    """How a cache of this package's loop keeps the keys of latents."""
    if not isinstance(cache, DecodeCache):
        return None
    return "expanded" if cache.keys == "expanded" else "rebuilt"


class CellTimer:
    """Times cells of a benchmark, with as few models in memory as possible.

    Args:
        job: the resolved benchmark.
        command: stored in each record.
    """

    def __init__(self, job: Benchmark, command: str):
        assert job.device is not None
        assert job.dtype is not None
        self.job, self.device, self.dtype = job, torch.device(job.device), DTYPES[job.dtype]
        self.limits = measured_device(self.device)
        self.models: dict[tuple, Any] = {}
        self.facts: dict[str, Any] = {
            "dtype": job.dtype,
            "device": self.limits.name,
            "copy_bandwidth": self.limits.bandwidth,
            "matmul_rate": self.limits.rate,
            "versions": {
                "mqa-hf": metadata.version("mqa-hf"),
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "command": command,
        }

    def model(self, contender: Contender) -> Any:
        cached = contender.kv_heads if contender.latent is None else contender.latent.name
        key = (contender.shape, type(contender.run_config), cached, contender.engine == "mqa-hf")
        if key not in self.models:
            if self.device.type != "cpu":
                self.models.clear()
                clear_memory(self.device)
            self.models[key] = random_model(contender, self.dtype, self.device)
        model = self.models[key]
        if hasattr(model, "decoding"):
            model.decoding.keys = contender.keys
        return model

    @torch.no_grad()
    def cell(self, contender: Contender, cell: Cell) -> BenchmarkRecord:
        """Time a cell; if memory runs out, the record holds the error."""
        try:
            return self.timed(contender, cell)
        except Exception as error:
            if not out_of_memory(error) or contender.ranks > 1:  # the other ranks would wait
                raise
            self.models.clear()
            said = str(error).split(". ")[0]
        clear_memory(self.device)
        return self.failed(contender, cell, said)

    def timed(self, contender: Contender, cell: Cell) -> BenchmarkRecord:
        batch, context, beams = cell
        tokens, vocab = self.job.tokens, decoder_of(contender.config).vocab_size
        model = self.model(contender)
        several = isinstance(contender.config, MQASeq2SeqConfig)
        try:
            if several:
                times = time_seq2seq(model, vocab, batch, context, tokens, beams)
            else:
                times = time_tokens(contender, model, batch, context, tokens)
                if batch * context <= self.job.prefill_limit:
                    times.time_to_first_token_sec = time_to_first_token(model, vocab, batch, context)
        except Exception as error:  # a class of transformers that cannot run this raises anything
            if contender.run_config is contender.config or out_of_memory(error):
                raise
            given = f"a source of {context} tokens" if several else f"a cache of {context} positions"
            raise MQAError(
                f"{contender.shape}: {contender.run_config.model_type} does not run from {given} with `engines` "
                f"{contender.engine}: {error}"
            ) from error
        if several:
            # The mean step has five eighths of the tokens in its cache, because the first quarter is not counted.
            return self.record(contender, Cell(batch, tokens * 5 // 8, beams), times, context)
        return self.record(contender, cell, times)

    def record(self, contender: Contender, cell: Cell, times: Times, source: int | None = None) -> BenchmarkRecord:
        """Make the record of a cell from its times and the shape."""
        measured = asdict(times)
        steps = measured.pop("step_sec")
        median = statistics.median(steps)
        tenths = statistics.quantiles(steps, n=10) if len(steps) > 1 else steps * 9
        rows, itemsize = cell.batch * cell.beams, self.dtype.itemsize
        keys = measured.pop("keys")
        cost = contender.cost(rows, cell.context, source or 0, itemsize, keys)
        floor, size = cost.seconds(self.limits), cost.weight_bytes + cost.cache_bytes
        return BenchmarkRecord(
            **identity(contender, cell),
            source=source,
            keys=keys if contender.rebuilds else None,
            time_per_token_ms=1000 * median,
            time_per_token_p10_ms=1000 * tenths[0],
            time_per_token_p90_ms=1000 * tenths[-1],
            tokens_per_sec=cell.batch / median,
            bytes_per_step=size,
            floor_ms=1000 * floor,
            floor_share=floor / median,
            bandwidth_share=size / median / self.limits.bandwidth,
            **measured,
            **self.facts,
        )

    def failed(self, contender: Contender, cell: Cell, why: str) -> BenchmarkRecord:
        return BenchmarkRecord(**identity(contender, cell), error=why, **self.facts)

    def largest(self, contender: Contender, context: int) -> BenchmarkRecord:
        """Time the largest batch that fits."""
        capacity = context + WARMUP + self.job.tokens + 1
        memory, itemsize = self.limits.memory, self.dtype.itemsize
        batch = contender.largest_batch(capacity, memory, itemsize)
        found = self.failed(contender, Cell(0, context), "one row does not fit into memory")
        while batch > 0:
            found = self.cell(contender, Cell(batch, context))
            if found.error is None:
                break
            batch = min(batch - 1, int(batch * 0.94))
        return found.model_copy(update={"largest_batch": True})


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; on a CPU, PyTorch has no exception class for that."""
    said = str(error)
    on_cpu = isinstance(error, RuntimeError) and ("can't allocate memory" in said or "calculation overflowed" in said)
    return isinstance(error, torch.OutOfMemoryError) or on_cpu


def identity(contender: Contender, cell: Cell) -> dict[str, Any]:
    """Fields that identify a record."""
    return {
        "shape": contender.shape,
        "original": contender.original,
        "model": contender.name,
        "engine": contender.engine,
        "kv_heads": contender.kv_heads if contender.latent is None else None,
        "latent": contender.latent,
        "ranks": contender.ranks,
        **cell._asdict(),
    }


def timed_cells(timer: CellTimer, contenders: Sequence[Contender], job: Benchmark) -> Iterator[BenchmarkRecord]:
    """Time all cells, one record each, then the largest batch at each context if requested.

    With several rounds the contenders alternate, and each keeps the run with the median time.
    """
    cells, rounds = job.workload, job.rounds or 1
    contexts = job.contexts if job.largest_batch else []
    with progress_bar(transient=True) as progress:
        task = progress.add_task("timing", total=(len(cells) * rounds + len(contexts)) * len(contenders))

        def timed(contender: Contender, cell: Cell) -> BenchmarkRecord:
            progress.update(task, description=f"{contender.name}, batch {cell.batch}, context {cell.context}")
            found = timer.cell(contender, cell)
            progress.advance(task)
            return found

        def largest_of(contender: Contender) -> Iterator[BenchmarkRecord]:
            for context in contexts:
                progress.update(task, description=f"{contender.name}, largest batch, context {context}")
                yield timer.largest(contender, context)
                progress.advance(task)

        if rounds == 1:
            for contender in contenders:
                for cell in cells:
                    yield timed(contender, cell)
                yield from largest_of(contender)
            return
        for cell in cells:
            turns: list[list[BenchmarkRecord]] = [[] for _ in contenders]
            for _ in range(rounds):
                for contender, records in zip(contenders, turns):
                    records.append(timed(contender, cell))
            for records in turns:
                yield sorted(records, key=lambda r: r.time_per_token_ms or 0.0)[len(records) // 2]
        for contender in contenders:
            yield from largest_of(contender)


def measure(job: Benchmark, command: str) -> list[BenchmarkRecord]:
    """Run a resolved benchmark: all shapes, heads and engines, alternating over several rounds."""
    contenders = contenders_of(job)
    timer, found = CellTimer(job, command), []
    for record in timed_cells(timer, contenders, job):
        found.append(record)
        if job.output is not None and first_rank():
            record.append(Path(job.output))
    if job.plots is not None and first_rank():
        for path in draw_times(found, Path(job.plots)):
            say(f"wrote {path}")
    return found
