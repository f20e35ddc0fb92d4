"""The choices of heads and width that there are for a model, and what a decoding step of each costs."""

from collections.abc import Sequence
from dataclasses import asdict

import torch
from pydantic import BaseModel, ConfigDict

from mqa_hf.base.datasheets import DEVICES, Device
from mqa_hf.base.errors import MQAError
from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig
from mqa_hf.conversion.canonical import decoder_of
from mqa_hf.conversion.families import family_of, native_config
from mqa_hf.conversion.pooling import choose_attentions, with_heads

from .plan import MEASURED, Planning
from .roofline import largest_batch, measured_device, prefill_ratio, step_cost, weights_of
from .shapes import Config, OwnShape, Weights, read_shape

KV_HEADS = (1, 2, 4, 8)  # that are compared where none are asked for
WIDTHS = ("qk_head_dim", "v_head_dim", "cross_qk_head_dim", "cross_v_head_dim")


class Choice(BaseModel):
    """What a decoding step costs with some heads of some width; [`StepCost`] has the first four numbers.

    Attributes:
        kv_heads: what is chosen, in words.
        speedup: over the original, at the same batch; `largest_batch_speedup` at the largest that fits each.
        largest_batch: rows that fit into the device's memory; 0 where that is not known.
    """

    model_config = ConfigDict(frozen=True)

    kv_heads: str
    kv_bytes_per_token: int
    cross_kv_bytes_per_token: int
    weight_bytes: float
    cache_bytes: int
    weight_operations: float
    cache_operations: float
    bytes_per_operation: float
    prefill_bytes_per_operation: float
    floor_ms: float
    tokens_per_sec: float
    speedup: float
    largest_batch: int
    largest_batch_tokens_per_sec: float
    largest_batch_speedup: float


class DecodingPlan(BaseModel):
    """The device, and the choices that there are, the original first."""

    model_config = ConfigDict(frozen=True)

    device: Device
    choices: list[Choice]


def make_plan(job: Planning) -> DecodingPlan:
    """Do the job."""
    original, config = read_shape(str(job.shape))
    if job.target == "mqa":
        family_of(original.model_type)  # an error where it has its own class only
    native = job.target == "native" or isinstance(config, OwnShape)
    widths = job.widths if job.widths is not None else (1,) if native else (1, 2)
    if native and set(widths) != {1}:
        raise MQAError("`widths` is for `target` mqa: the heads of transformers' classes have the source's width")
    attention = config.config if isinstance(config, OwnShape) else decoder_of(config)
    kv_heads = job.kv_heads
    if kv_heads is None:
        kv_heads = [n for n in KV_HEADS if attention.num_key_value_heads % n == 0]
    if isinstance(config, OwnShape):
        models = own_models(config, kv_heads)
    else:
        models = canonical_models(config, kv_heads, widths)
        for decoder, _ in list(models.values())[1:] if native else ():
            native_config(original, decoder)
    if job.device == MEASURED:
        device = measured_device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        device = DEVICES[job.device]
    source = job.source if isinstance(config, MQASeq2SeqConfig) else 0
    return DecodingPlan(device=device, choices=compare(models, job.batch, job.context, device, source, job.itemsize))


def canonical_models(
    config: Config, kv_heads: Sequence[int], widths: Sequence[int]
) -> dict[str, tuple[MQAConfig, Weights]]:
    """Decoders and their weights by name: the original, then every number of heads at every width."""
    decoder = decoder_of(config)
    original = decoder.num_key_value_heads
    found = {f"original ({original})": decoder}
    for heads in kv_heads:
        if heads > original or original % heads:
            raise MQAError(f"`kv_heads` {heads} must divide the {original} key/value heads of the source")
        for width in widths:
            if heads * width >= original:
                continue  # as large as the original
            changed = decoder_of(with_heads(config, heads, choose_attentions(config, None))).to_dict()
            for name in WIDTHS:
                value = changed[name]
                changed[name] = [width * v for v in value] if isinstance(value, list) else width * value
            found[f"{heads}" if width == 1 else f"{heads}, width x{width}"] = MQAConfig(**changed)
    return {name: (stack, weights_of(stack)) for name, stack in found.items()}


def own_models(shape: OwnShape, kv_heads: Sequence[int]) -> dict[str, tuple[MQAConfig, Weights]]:
    """The same of a model in its own class: as it is, then with every number of heads."""
    original = shape.config.num_key_value_heads
    fewer = {f"{heads}": shape.with_heads(heads) for heads in kv_heads if heads != original}
    models = {f"original ({original})": shape, **fewer}
    return {name: (own.config, own.weights) for name, own in models.items()}


def compare(
    models: dict[str, tuple[MQAConfig, Weights]],
    batch: int,
    context: int,
    device: Device,
    source: int = 0,
    itemsize: int = 2,
) -> list[Choice]:
    """What a step of each model costs; the first one is what the others are compared with."""
    found: list[Choice] = []
    for name, (decoder, weights) in models.items():
        cost = step_cost(decoder, batch, context, source, itemsize, weights)
        step = cost.seconds(device)
        rows = largest_batch(decoder, context, device.memory, source, itemsize, weights) if device.memory else 0
        most = rows / step_cost(decoder, rows, context, source, itemsize, weights).seconds(device) if rows else 0.0
        first = found[0] if found else None
        speedup, most_speedup = 1.0, 1.0 if rows else 0.0
        if first is not None:
            speedup = (batch / step) / first.tokens_per_sec
            if first.largest_batch_tokens_per_sec:
                most_speedup = most / first.largest_batch_tokens_per_sec
        found.append(
            Choice(
                kv_heads=name,
                kv_bytes_per_token=decoder.kv_bytes_per_token * itemsize // 2,
                cross_kv_bytes_per_token=decoder.cross_kv_bytes_per_token * itemsize // 2,
                **asdict(cost),
                bytes_per_operation=cost.bytes_per_operation,
                prefill_bytes_per_operation=prefill_ratio(decoder, batch, context, itemsize, weights),
                floor_ms=1000 * step,
                tokens_per_sec=batch / step,
                speedup=speedup,
                largest_batch=rows,
                largest_batch_tokens_per_sec=most,
                largest_batch_speedup=most_speedup,
            )
        )
    return found
