"""What a decoding step has to read and compute, and how fast it can be at best: `mqa-hf plan`.

    b rows, n positions in the cache, d hidden size, h query heads, G key/value heads

The analysis is that of Shazeer 2019 (arXiv 1911.02150, sections 2.4.1 and 3.1). Training, or reading a prompt, handles
all n positions at once: the weights are read once for b·n tokens, and the ratio of memory accesses to arithmetic
operations is Θ(1/k + 1/(b·n)), with k the head width: small. Incremental decoding reads all weights and all keys and
values for one token per row: Θ(n/d + 1/b) with multi-head attention, which is near 1 where n is near d or b near 1,
and Θ(1/d + n/(d·h) + 1/b) with one key/value head. Here the constants are counted instead, from a configuration:

    bytes = weights + b · (keys and values of n positions)        operations = 2 · b · (weights + 2 · h · n · widths)
    time ≥ max(weights / bandwidth, matrix operations / rate) + (keys and values) / bandwidth

Of a mixture of experts, a step reads those that b tokens choose, here independently of each other.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mqa_hf.base.datasheets import Device
from mqa_hf.configuration_mqa import MQAConfig, of_layer

from .shapes import Weights


@dataclass(frozen=True)
class StepCost:
    """What one decoding step of a batch reads and computes.

    Attributes:
        weight_bytes: of the matrices that are read, the head's included, the embedding's not.
        cache_bytes: keys and values that are read, those of an encoder's output included.
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
        """The least time that the step can take."""
        weights = max(self.weight_bytes / device.bandwidth, self.weight_operations / device.rate)
        return weights + max(self.cache_bytes / device.bandwidth, self.cache_operations / device.rate)


def step_weights(config: MQAConfig) -> int:
    """Weights that a step multiplies with; keys and values of an encoder's output are computed once, not in a step."""
    d, f, H = config.hidden_size, config.intermediate_size, config.num_attention_heads
    total = (
        config.embedding_size * config.vocab_size + (3 if config.gated_mlp else 2) * d * f * config.num_hidden_layers
    )
    if config.embedding_size != d:
        total += 2 * d * config.embedding_size
    for i in range(config.num_hidden_layers):
        qk, v = of_layer(config.qk_head_dim, i), of_layer(config.v_head_dim, i)
        total += d * (H + config.num_key_value_heads) * qk + d * (H + config.num_key_value_heads) * v
        if config.cross_num_key_value_heads:
            total += d * H * (of_layer(config.cross_qk_head_dim, i) + of_layer(config.cross_v_head_dim, i))
    return total


def weights_of(config: MQAConfig) -> Weights:
    """Of a decoder, to within biases and norms."""
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.embedding_size
    positions = config.max_position_embeddings * config.hidden_size if config.position_embedding == "learned" else 0
    cross = 0
    if config.cross_num_key_value_heads:
        for i in range(config.num_hidden_layers):
            widths = of_layer(config.cross_qk_head_dim, i) + of_layer(config.cross_v_head_dim, i)
            cross += config.hidden_size * config.cross_num_key_value_heads * widths
    return Weights(step_weights(config), looked_up=embedding + positions + cross)


def step_cost(
    config: MQAConfig, batch: int, context: int, source: int = 0, itemsize: int = 2, weights: Weights | None = None
) -> StepCost:
    """Bytes and operations of a step.

    Args:
        config: of the decoder.
        batch: rows, beams counted.
        context: positions in the cache.
        source: positions of the encoder's output, for a decoder with one.
        itemsize: bytes of a number.
        weights: of a model of which `config` says the attention only.
    """
    weights = weights or weights_of(config)
    cached = computed = 0
    H, G = config.num_attention_heads, config.num_key_value_heads
    for i, kind in enumerate(config.layer_types):
        seen = min(context, config.sliding_window or context) if kind == "sliding_attention" else context
        width = of_layer(config.qk_head_dim, i) + of_layer(config.v_head_dim, i)
        cached += G * width * seen
        computed += H * width * seen
        if config.cross_num_key_value_heads:
            width = of_layer(config.cross_qk_head_dim, i) + of_layer(config.cross_v_head_dim, i)
            cached += config.cross_num_key_value_heads * width * source
            computed += H * width * source
    operations = 2.0 * batch * weights.of_a_token
    return StepCost(weights.read(batch) * itemsize, batch * cached * itemsize, operations, 2.0 * batch * computed)


def prefill_ratio(
    config: MQAConfig, batch: int, length: int, itemsize: int = 2, weights: Weights | None = None
) -> float:
    """Bytes per operation where `length` positions of `batch` rows are computed at once, as in training."""
    weights, tokens = weights or weights_of(config), batch * length
    H, G = config.num_attention_heads, config.num_key_value_heads
    heads = sum(
        of_layer(config.qk_head_dim, i) + of_layer(config.v_head_dim, i) for i in range(config.num_hidden_layers)
    )
    activations = tokens * (config.num_hidden_layers * (4 * config.hidden_size) + (H + G) * heads)
    # Causal: half of 2 · length.
    operations = 2.0 * tokens * weights.of_a_token + tokens * length * H * heads
    return itemsize * (weights.read(tokens) + activations) / operations


def largest_batch(
    config: MQAConfig,
    context: int,
    memory: float,
    source: int = 0,
    itemsize: int = 2,
    weights: Weights | None = None,
) -> int:
    """Rows of `context` positions whose cache fits beside the weights, with 4 % of the memory left for the rest."""
    row = (config.kv_bytes_per_token * context + config.cross_kv_bytes_per_token * source) * itemsize / 2
    total = (weights or weights_of(config)).total
    return max(0, int((0.96 * memory - total * itemsize) // row))


def measured_device(device: str | torch.device = "cuda") -> Device:
    """The device that is here: bandwidth of a large copy, counting bytes read and written, and of a matrix product."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    size, side, dtype = (1 << 31, 8192, torch.bfloat16) if on_gpu else (1 << 27, 1024, torch.float32)
    a = torch.ones(size // 4, device=device)
    b = torch.empty_like(a)
    x, y = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    bandwidth = 2 * size / fastest(lambda: torch.mul(a, 1.5, out=b), device)
    rate = 2 * side**3 / fastest(lambda: x @ y, device)
    if not on_gpu:
        return Device(f"{processor()}, {torch.get_num_threads()} threads", 0.0, bandwidth, rate)
    return Device(
        torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory, bandwidth, rate
    )


def processor() -> str:
    """What the CPU calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor that says nothing
        return platform.processor() or platform.machine()


def fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several calls, over half a second, in which a GPU comes up to its clock."""
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
