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

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mqa_hf.base.devices import DEVICES, Device
from mqa_hf.base.errors import MQAError
from mqa_hf.configuration_mqa import MQAConfig, of_layer
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig
from mqa_hf.conversion.families import family_of, native_config
from mqa_hf.conversion.plan import decoder_of
from mqa_hf.conversion.pooling import choose_attentions, with_heads

from .shapes import Config, OwnShape, Weights, read_shape

TARGETS = ("mqa", "native")


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


def choices(config: Config, kv_heads: list[int], widths: list[int]) -> dict[str, MQAConfig]:
    """Decoder configurations by name: the original, then every number of heads at every width."""
    decoder = decoder_of(config)
    original = decoder.num_key_value_heads
    found = {f"original ({original})": decoder}
    for heads in kv_heads:
        if heads > original or original % heads:
            raise MQAError(f"--kv-heads {heads} must divide the {original} key/value heads of the source")
        for width in widths:
            if heads * width >= original and (heads, width) != (original, 1):
                continue  # as large as the original
            pooled = decoder_of(with_heads(config, heads, choose_attentions(config, None)))
            changed = {**pooled.to_dict()}
            for name in ("qk_head_dim", "v_head_dim", "cross_qk_head_dim", "cross_v_head_dim"):
                value = changed[name]
                changed[name] = [width * v for v in value] if isinstance(value, list) else width * value
            name = f"{heads}" if width == 1 else f"{heads}, width x{width}"
            if heads != original:
                found[name] = MQAConfig(**changed)
    return found


def own_choices(shape: OwnShape, kv_heads: list[int]) -> dict[str, OwnShape]:
    """A model in its own class by name: as it is, then with every number of heads."""
    original = shape.config.num_key_value_heads
    fewer = {f"{heads}": shape.with_heads(heads) for heads in kv_heads if heads != original}
    return {f"original ({original})": shape, **fewer}


def plan(
    config: Config | OwnShape,
    kv_heads: list[int],
    widths: list[int],
    batch: int,
    context: int,
    device: Device,
    source: int = 0,
    itemsize: int = 2,
) -> list[dict]:
    """One record per choice of heads and width; the keys say what and in which unit."""
    records: list[dict] = []
    if isinstance(config, OwnShape):
        models = {name: (own.config, own.weights) for name, own in own_choices(config, kv_heads).items()}
    else:
        models = {name: (stack, weights_of(stack)) for name, stack in choices(config, kv_heads, widths).items()}
    for title, (decoder, weights) in models.items():
        cost = step_cost(decoder, batch, context, source, itemsize, weights)
        step = cost.seconds(device)
        rows = largest_batch(decoder, context, device.memory, source, itemsize, weights) if device.memory else 0
        most = rows / step_cost(decoder, rows, context, source, itemsize, weights).seconds(device) if rows else 0.0
        first = records[0] if records else None
        records.append(
            {
                "kv_heads": title,
                "kv_bytes_per_token": decoder.kv_bytes_per_token * itemsize // 2,
                "cross_kv_bytes_per_token": decoder.cross_kv_bytes_per_token * itemsize // 2,
                **asdict(cost),
                "bytes_per_operation": cost.bytes_per_operation,
                "prefill_bytes_per_operation": prefill_ratio(decoder, batch, context, itemsize, weights),
                "floor_ms": 1000 * step,
                "tokens_per_sec": batch / step,
                "speedup": (batch / step) / first["tokens_per_sec"] if first else 1.0,
                "largest_batch": rows,
                "largest_batch_tokens_per_sec": most,
                "largest_batch_speedup": most / first["largest_batch_tokens_per_sec"]
                if first and first["largest_batch_tokens_per_sec"]
                else (1.0 if rows else 0.0),
            }
        )
    return records


def show(
    name: str,
    kv_heads: list[int] | None,
    widths: list[int] | None,
    batch: int,
    context: int,
    device_name: str,
    source: int,
    dtype: str,
    as_json: bool,
    target: str | None = None,
) -> None:
    """The command: a table of [`plan`], or JSON.

    Args:
        name: of a shape or a checkpoint.
        kv_heads: default: those of 1, 2, 4, 8 that divide the original's.
        widths: default: 1 and 2, of native targets 1.
        target: the class that holds the result, as of a conversion. Default: this package's, where it can.
        batch, context, device_name, source, dtype, as_json: as of the command.
    """
    itemsize = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}.get(dtype)
    if itemsize is None:
        raise MQAError(f"--dtype must be float32, bfloat16, float16 or float8, got {dtype!r}")
    if device_name == "measured":
        device = measured_device("cuda" if torch.cuda.is_available() else "cpu")
    elif device_name in DEVICES:
        device = DEVICES[device_name]
    else:
        raise MQAError(f"--device must be measured or one of {', '.join(DEVICES)}, got {device_name!r}")
    if target not in (None, *TARGETS):
        raise MQAError(f"--target must be one of {', '.join(TARGETS)}, got {target!r}")
    original, config = read_shape(name)
    if target == "mqa":
        family_of(original.model_type)  # an error where it has its own class only
    native = target == "native" or isinstance(config, OwnShape)
    if native and widths is not None and widths != [1]:
        raise MQAError("--widths is for --target mqa: the heads of transformers' classes have the source's width")
    attention = config.config if isinstance(config, OwnShape) else decoder_of(config)
    if kv_heads is None:
        kv_heads = [n for n in (1, 2, 4, 8) if attention.num_key_value_heads % n == 0]
    if target == "native" and not isinstance(config, OwnShape):
        for decoder in list(choices(config, kv_heads, [1]).values())[1:]:
            native_config(original, decoder)
    source = source if isinstance(config, MQASeq2SeqConfig) else 0
    records = plan(config, kv_heads, widths or ([1] if native else [1, 2]), batch, context, device, source, itemsize)
    if as_json:
        print(json.dumps({"device": asdict(device), "choices": records}, indent=2))
        return
    table = Table(
        title=f"{name}, {dtype}, batch {batch}, context {context}" + (f", source {source}" if source else "")
        + f", {device.name} ({device.bandwidth / 1e12:.2f} TB/s, {device.rate / 1e12:.0f} TFLOP/s)",
        title_justify="left",
    )  # fmt: skip
    for column in (
        "key/value heads", "cache, bytes/token", "read, GB/step", "bytes/operation", "floor, ms", "tokens/s",
        "speed-up", "largest batch", "tokens/s there", "speed-up there",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "key/value heads" else "right")
    for r in records:
        table.add_row(
            r["kv_heads"], f"{r['kv_bytes_per_token']:,}", f"{(r['weight_bytes'] + r['cache_bytes']) / 1e9:.2f}",
            f"{r['bytes_per_operation']:.3f}", f"{r['floor_ms']:.2f}", f"{r['tokens_per_sec']:,.0f}",
            f"{r['speedup']:.2f}", f"{r['largest_batch']:,}" if device.memory else "-",
            f"{r['largest_batch_tokens_per_sec']:,.0f}" if r["largest_batch"] else "-",
            f"{r['largest_batch_speedup']:.2f}" if r["largest_batch"] else "-",
        )  # fmt: skip
    Console(width=150).print(table)
    first = records[0]
    print(
        f"Reading a prompt, or training, takes {first['prefill_bytes_per_operation']:.4f} bytes per operation; the "
        f"device does {device.rate / device.bandwidth:.0f} operations in the time of a byte, so below "
        f"{device.bandwidth / device.rate:.4f} arithmetic is the limit, above it memory."
    )
