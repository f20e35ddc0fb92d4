"""What a decode step reads and computes, and its minimum time: `mqa-hf plan`.

    b rows, n positions in the cache, d hidden size, h query heads, G key/value heads

The analysis is that of Shazeer 2019 (arXiv 1911.02150, sections 2.4.1 and 3.1). Training and prefill handle all n
positions at once: the weights are read once for b·n tokens, and the ratio of memory accesses to arithmetic operations
is small, Θ(1/k + 1/(b·n)) with head width k. Decoding reads all weights and all keys and values for one token per row:
Θ(n/d + 1/b) with multi-head attention, which is near 1 if n is near d or b near 1, and Θ(1/d + n/(d·h) + 1/b) with one
key/value head. Here the constants are counted from a configuration:

    bytes = weights + b · (keys and values of n positions)        operations = 2 · b · (weights + 2 · h · n · widths)
    time ≥ max(weights / bandwidth, operations / rate) + max((keys and values) / bandwidth, operations / rate)

For a mixture of experts, a step reads the experts that b tokens choose, assumed independent. `attention_sizes.py`
counts latents.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mqa_hf.base.datasheets import Device
from mqa_hf.configuration_mqa import MQAConfig

from .attention_sizes import Keys, cross_attention, kv_bytes, own_attention
from .shapes import Weights


@dataclass(frozen=True)
class StepCost:
    """What one decode step of a batch reads and computes.

    Attributes:
        weight_bytes: bytes of the matrices read, the language-model head included, the embedding excluded.
        cache_bytes: bytes of keys and values, or latents, read, those of an encoder's output included.
        weight_operations, cache_operations: multiplications and additions with each.
    """

    weight_bytes: float
    cache_bytes: float
    weight_operations: float
    cache_operations: float

    @property
    def bytes_per_operation(self) -> float:
        return (self.weight_bytes + self.cache_bytes) / (self.weight_operations + self.cache_operations)

    def seconds(self, device: Device) -> float:
        """The minimum time of the step."""
        return sum(max(part) for part in self.parts(device))

    def parts(self, device: Device) -> tuple[tuple[float, float], tuple[float, float]]:
        """Seconds to read and to compute, for the weights and for the cache."""
        return (
            (self.weight_bytes / device.bandwidth, self.weight_operations / device.rate),
            (self.cache_bytes / device.bandwidth, self.cache_operations / device.rate),
        )

    def cache_limit(self, device: Device) -> Literal["bytes", "operations"]:
        """Whether reading the cache or computing with it takes longer."""
        _, (reading, computing) = self.parts(device)
        return "bytes" if reading >= computing else "operations"


def step_weights(config: MQAConfig) -> int:
    """Weights that every step multiplies with: without those of routed experts, and without those for keys and values
    of an encoder's output, computed once."""
    d, matrices = config.hidden_size, 3 if config.gated_mlp else 2
    total = config.embedding_size * config.vocab_size
    for mixed in config.expert_layers:
        shared = config.shared_expert_intermediate_size or 0
        total += matrices * d * (shared if mixed else config.intermediate_size)
        total += d * ((config.num_experts or 0) + config.shared_expert_gate) if mixed else 0
    if config.embedding_size != d:
        total += 2 * d * config.embedding_size
    if config.head_transform is not None:
        total += d * d
    for i in range(config.num_hidden_layers):
        own = own_attention(config, i)
        total += own.step_weights + (d * own.H * own.Dv if config.attention_gate else 0)
        cross = cross_attention(config, i)
        total += 0 if cross is None else cross.step_weights
    return total


def weights_of(config: MQAConfig) -> Weights:
    """Weights of a decoder, without biases and norms."""
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.embedding_size
    positions = config.max_position_embeddings * config.hidden_size if config.position_embedding == "learned" else 0
    every = (cross_attention(config, i) for i in range(config.num_hidden_layers))
    cross = sum(found.projections for found in every if found is not None)
    width, mixtures = config.expert_intermediate_size or 0, sum(config.expert_layers)
    experts = 3 * config.hidden_size * width * (config.num_experts or 0) * mixtures
    chosen = config.num_experts_per_tok / config.num_experts if config.num_experts and mixtures else 1.0
    return Weights(step_weights(config), experts, chosen, embedding + positions + cross)


def step_cost(
    config: MQAConfig,
    batch: int,
    context: int,
    source: int = 0,
    itemsize: int = 2,
    weights: Weights | None = None,
    keys: Keys = "rebuilt",
) -> StepCost:
    """Bytes and operations of a step.

    Args:
        config: configuration of the decoder.
        batch: rows, including beams.
        context: positions in the cache.
        source: positions of the encoder's output, if any.
        itemsize: bytes per number.
        weights: weights of a model of which `config` describes only the attention.
        keys: whether keys of a latent are rebuilt at each step or cached.
    """
    weights = weights or weights_of(config)
    cached = computed = repeated = 0
    for i, kind in enumerate(config.layer_types):
        seen = min(context, config.sliding_window or context) if kind == "sliding_attention" else context
        for attention, tokens in ((own_attention(config, i), seen), (cross_attention(config, i), source)):
            if attention is not None:
                cached += attention.bytes(keys, itemsize) * tokens
                computed += attention.products(keys) * tokens
                repeated += attention.repeated
    return StepCost(
        weight_bytes=weights.read(batch) * itemsize,
        cache_bytes=batch * cached,
        weight_operations=2.0 * batch * (weights.of_a_token + repeated),
        cache_operations=2.0 * batch * computed,
    )


def prefill_ratio(
    config: MQAConfig, batch: int, length: int, itemsize: int = 2, weights: Weights | None = None
) -> float:
    """Bytes per operation if `length` positions of `batch` rows are computed at once, as in training."""
    weights, tokens = weights or weights_of(config), batch * length
    layers = [own_attention(config, i) for i in range(config.num_hidden_layers)]
    kept = sum(4 * x.d + (x.H + x.G) * (x.D + x.Dv) + x.r + x.rebuilt for x in layers)
    # Per head, whatever is cached; causal: half of 2 · length.
    operations = 2.0 * tokens * weights.of_a_token + tokens * length * sum(x.H * (x.D + x.Dv) for x in layers)
    return itemsize * (weights.read(tokens) + tokens * kept) / operations


def largest_batch(
    config: MQAConfig,
    context: int,
    memory: float,
    source: int = 0,
    itemsize: int = 2,
    weights: Weights | None = None,
    keys: Keys = "rebuilt",
) -> int:
    """Rows of `context` positions whose cache fits beside the weights, with 4 % of the memory left for the rest."""
    own, cross = kv_bytes(config, keys, itemsize)
    row = own * context + cross * source
    total = (weights or weights_of(config)).total
    return max(0, int((0.96 * memory - total * itemsize) // row))


def measured_device(device: str | torch.device = "cuda") -> Device:
    """Measure this machine's device: bandwidth of a large copy (bytes read and written), rate of a matrix product."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    size, side, dtype = (1 << 31, 8192, torch.bfloat16) if on_gpu else (1 << 27, 1024, torch.float32)
    a = torch.ones(size // 4, device=device)
    b = torch.empty_like(a)
    x, y = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    bandwidth = 2 * size / fastest(lambda: torch.mul(a, 1.5, out=b), device)
    rate = 2 * side**3 / fastest(lambda: x @ y, device)
    if not on_gpu:
        threads = torch.get_num_threads()
        return Device(f"{processor()}, {threads} thread{'s' if threads > 1 else ''}", 0.0, bandwidth, rate)
    return Device(
        torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory, bandwidth, rate
    )


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or no name given
        return platform.processor() or platform.machine()


def fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest call within half a second, in which a GPU reaches its clock rate."""
    seconds: list[float] = []
    until = time.perf_counter() + 0.5
    while len(seconds) < 5 or time.perf_counter() < until:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1000)
        else:
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
    return min(seconds)
