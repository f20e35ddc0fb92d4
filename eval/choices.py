"""Choices of heads, widths and latents for a model, and the cost of a decode step with each."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from mqa_hf.base.datasheets import DEVICES, Device
from mqa_hf.base.errors import MQAError
from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig
from mqa_hf.conversion.canonical import decoder_of, latents_of
from mqa_hf.conversion.families import family_of, native_config

from .attention_sizes import Keys, kv_bytes, rebuilds
from .latent_choices import latent_models
from .plan import MEASURED, Planning
from .roofline import StepCost, largest_batch, measured_device, prefill_ratio, step_cost, weights_of
from .shapes import Config, OwnShape, Weights, fitted, read_shape

KV_HEADS = (1, 2, 4, 8)  # compared by default
WIDTHS = ("qk_head_dim", "v_head_dim", "cross_qk_head_dim", "cross_v_head_dim")
# Fraction of the data sheet's matrix rate that attention to latents reaches: 34 to 49% on an H200 (docs/speed.md).
ATTAINED = 0.4


class Choice(BaseModel):
    """The cost of a decode step with some key/value heads or a latent; weight and cache costs are of [`StepCost`].

    Attributes:
        kv_heads: the choice, in words.
        latent: the latent, in words; `None` with heads.
        keys: whether keys are rebuilt from the latent at each step or cached beside it; `None` if no keys are rebuilt.
        cache_limit: whether reading the cache (`"bytes"`) or computing with it (`"operations"`) takes longer.
        expected_ms: `floor_ms` with attention to latents at [`ATTAINED`] of the matrix rate.
        speedup: over the original at the same batch, from `floor_ms`; `largest_batch_speedup` at the largest batch
            that fits each.
        largest_batch: rows that fit into the device's memory; 0 if its size is unknown.
    """

    model_config = ConfigDict(frozen=True)

    kv_heads: str
    latent: str | None = None
    keys: Keys | None = None
    kv_bytes_per_token: int
    cross_kv_bytes_per_token: int
    weight_bytes: float
    cache_bytes: int
    weight_operations: float
    cache_operations: float
    bytes_per_operation: float
    prefill_bytes_per_operation: float
    floor_ms: float
    cache_limit: Literal["bytes", "operations"]
    expected_ms: float
    tokens_per_sec: float
    speedup: float
    largest_batch: int
    largest_batch_tokens_per_sec: float
    largest_batch_speedup: float


class DecodingPlan(BaseModel):
    """The device, the choices with the original first, and notes on the latents among them."""

    model_config = ConfigDict(frozen=True)

    device: Device
    choices: list[Choice]
    notes: list[str] = []


def make_plan(job: Planning) -> DecodingPlan:
    """Make the plan that the job asks for."""
    original, config = read_shape(str(job.shape))
    if job.target == "mqa":
        family_of(original.model_type)  # raises if the type keeps its own class
    native = job.target == "native" or isinstance(config, OwnShape)
    widths = job.widths if job.widths is not None else (1,) if native else (1, 2)
    if native and set(widths) != {1}:
        raise MQAError("`widths` needs `target` mqa: heads in transformers' classes keep the source's width")
    if native and job.asks_latents:
        raise MQAError("latents need `target` mqa: transformers' classes have key/value heads")
    attention = config.config if isinstance(config, OwnShape) else decoder_of(config)
    kv_heads = job.kv_heads
    if kv_heads is None:
        some = job.asks_heads or not job.asks_latents
        counts = [attention.num_key_value_heads, attention.cross_num_key_value_heads or 0]
        kv_heads = [n for n in KV_HEADS if some and not any(count % n for count in counts)]
    if isinstance(config, OwnShape):
        models = own_models(config, kv_heads)
    else:
        models = canonical_models(config, kv_heads, widths)
        for decoder, _ in list(models.values())[1:] if native else ():
            native_config(original, decoder)
        if job.asks_latents:
            models |= planned_latents(config, job)
        elif not job.asks_heads and not native:
            models |= usual_latent(config, job)
    if job.device == MEASURED:
        device = measured_device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        device = DEVICES[job.device]
    source = job.source if isinstance(config, MQASeq2SeqConfig) else 0
    choices = compare(models, job.batch, job.context, device, source, job.itemsize)
    return DecodingPlan(device=device, choices=choices, notes=[*notes_of(choices)])


def planned_latents(config: Config, job: Planning) -> dict[str, tuple[MQAConfig, Weights]]:
    """Make decoders with the requested latents, and their weights, by name."""
    every = latent_models(config, job.latents, job.key_widths, job.latent_bits)
    return {name: (decoder_of(c), weights_of(decoder_of(c))) for name, c in every.items()}


def usual_latent(config: Config, job: Planning) -> dict[str, tuple[MQAConfig, Weights]]:
    """Make the latent that is compared by default; none if it would save nothing."""
    try:
        found = planned_latents(config, job)
    except MQAError:  # fitted heads, or already latents
        return {}
    most = decoder_of(config).kv_bytes_per_token
    return {name: model for name, model in found.items() if model[0].kv_bytes_per_token < most}


def canonical_models(
    config: Config, kv_heads: Sequence[int], widths: Sequence[int]
) -> dict[str, tuple[MQAConfig, Weights]]:
    """Make decoders and their weights by name: the original, then every number of heads at every width."""
    decoder = decoder_of(config)
    original = decoder.num_key_value_heads
    found = {f"original ({original_words(decoder)})": decoder}
    for heads in kv_heads:
        if heads > original or original % heads:
            raise MQAError(f"`kv_heads` {heads} must divide the {original} key/value heads of the source")
        for width in widths:
            if heads * width >= original:
                continue  # no smaller than the original
            changed = decoder_of(fitted(config, heads)).to_dict()
            for name in WIDTHS:
                value = changed[name]
                changed[name] = [width * v for v in value] if isinstance(value, list) else width * value
            found[f"{heads}" if width == 1 else f"{heads}, width x{width}"] = MQAConfig(**changed)
    return {name: (stack, weights_of(stack)) for name, stack in found.items()}


def own_models(shape: OwnShape, kv_heads: Sequence[int]) -> dict[str, tuple[MQAConfig, Weights]]:
    """Same for a model in its own class: the original, then every number of heads."""
    original = shape.config.num_key_value_heads
    fewer = {f"{heads}": shape.with_heads(heads) for heads in kv_heads if heads != original}
    models = {f"original ({original})": shape, **fewer}
    return {name: (own.config, own.weights) for name, own in models.items()}


def original_words(decoder: MQAConfig) -> str:
    """Name the number of heads, or the latent."""
    known = latents_of(decoder).values()
    return ", ".join(latent.in_words() for latent in known) or str(decoder.num_key_value_heads)


def compare(
    models: dict[str, tuple[MQAConfig, Weights]],
    batch: int,
    context: int,
    device: Device,
    source: int = 0,
    itemsize: int = 2,
) -> list[Choice]:
    """Compute the cost of a decode step of each model, compared with the first.

    A model whose keys are rebuilt from latents appears twice: with rebuilt keys and with expanded (cached) keys.
    """
    found: list[Choice] = []
    for name, (decoder, weights) in models.items():
        ways: tuple[Keys | None, ...] = ("rebuilt", "expanded") if rebuilds(decoder) else (None,)
        for keys in ways:
            way: Keys = keys or "rebuilt"
            cost = step_cost(decoder, batch, context, source, itemsize, weights, way)
            step = cost.seconds(device)
            rows = largest_batch(decoder, context, device.memory, source, itemsize, weights, way)
            rows = rows if device.memory else 0
            full = step_cost(decoder, rows, context, source, itemsize, weights, way)
            most = rows / full.seconds(device) if rows else 0.0
            first = found[0] if found else None
            speedup, most_speedup = 1.0, 1.0 if rows else 0.0
            if first is not None:
                speedup = (batch / step) / first.tokens_per_sec
                if first.largest_batch_tokens_per_sec:
                    most_speedup = most / first.largest_batch_tokens_per_sec
            own, cross = kv_bytes(decoder, way, itemsize)
            found.append(
                Choice(
                    kv_heads=name if keys is None else f"{name} {keys}",
                    latent=name if decoder.latent else None,
                    keys=keys,
                    kv_bytes_per_token=own,
                    cross_kv_bytes_per_token=cross,
                    **asdict(cost),
                    bytes_per_operation=cost.bytes_per_operation,
                    prefill_bytes_per_operation=prefill_ratio(decoder, batch, context, itemsize, weights),
                    floor_ms=1000 * step,
                    cache_limit=cost.cache_limit(device),
                    expected_ms=1000 * (expected(cost, device) if decoder.latent else step),
                    tokens_per_sec=batch / step,
                    speedup=speedup,
                    largest_batch=rows,
                    largest_batch_tokens_per_sec=most,
                    largest_batch_speedup=most_speedup,
                )
            )
    return found


def expected(cost: StepCost, device: Device) -> float:
    """Seconds of a step with attention to the cache at [`ATTAINED`] of the matrix rate."""
    weights, (reading, computing) = cost.parts(device)
    return max(weights) + max(reading, computing / ATTAINED)


def notes_of(choices: Sequence[Choice]) -> Iterator[str]:
    """Say how fast each latent will be compared with the original, and where it saves memory but no time."""
    first = choices[0]
    names = dict.fromkeys(choice.latent for choice in choices if choice.latent not in (None, first.latent))
    if names:
        yield f"Expected time of a decode step, with attention to a latent at {ATTAINED:.0%} of the matrix rate:"
    for name in names:
        ways = [choice for choice in choices if choice.latent == name]
        times = [f"{c.expected_ms:.2f} ms" + (f" with {c.keys} keys" if c.keys else "") for c in ways]
        said = f"- {name}: {' or '.join(times)}, compared with {first.expected_ms:.2f} ms for the original"
        slow = [c for c in ways if c.expected_ms > first.expected_ms]
        if slow:
            which = f"with {slow[0].keys} keys it" if len(slow) < len(ways) else "it"
            room = (
                f" ({slow[0].largest_batch:,} rows rather than {first.largest_batch:,})" if first.largest_batch else ""
            )
            said += f"; {which} saves memory{room}, not time"
        yield said
