"""Attention to latents in a decoding step: queries are mapped to what is kept, one latent serves all heads.

    B rows decoded, k rows of each prompt, P = B / k prompts, S positions, H query heads, D head width, Dv value head
    width, r latent width, W rebuilt components of keys

The arithmetic is that of `latent_mqa.py`, absorbed. What a row keeps is a latent a token, from which the W components
are rebuilt at each step, or these and the latent side by side (`cache_mqa.py`).
"""

import os
from typing import TYPE_CHECKING, Any

import torch

from .attention_mqa import grouped
from .cache_mqa import ExpandedLayer, LatentLayer
from .configuration_mqa import of_layer
from .kernel_append_mqa import append
from .kernel_attend_mqa import MAX_HEAD_WIDTH, attend
from .latent_mqa import MQALatentAttention
from .packing_mqa import rounded_latent
from .positions_mqa import rotate
from .rules_mqa import contiguous_positions, decoder_stack

if TYPE_CHECKING:
    from .step_mqa import DecodeStep


def self_attention(step: "DecodeStep", attention: MQALatentAttention, joined: torch.Tensor, i: int) -> torch.Tensor:
    """[B, H·D + r] -> [B, H·Dv]; what is kept of the new token is written to the cache."""
    held = step.cache.decode_layers[i]
    query, made = joined.split([joined.shape[1] - attention.kv_latent_dim, attention.kv_latent_dim], -1)
    query = query.view(len(query), -1, 1, attention.head_dim)
    if isinstance(held, ExpandedLayer):
        return read(attention, with_keys(step, attention, held, query, rounded_latent(made, attention.bits), i))
    assert isinstance(held, LatentLayer)
    return read(attention, alone(step, attention, held, query, made, i))


def with_keys(
    step: "DecodeStep", attention: MQALatentAttention, held: ExpandedLayer, query: torch.Tensor, latent: torch.Tensor,
    i: int,
) -> torch.Tensor:  # fmt: skip
    """Queries [B, H, 1, D] and rounded latents [B, r] of the new tokens -> what each head mixes, [B, H·r]."""
    assert attention.k_proj is not None
    W, part = attention.qk_head_dim, attention.k_up is not None
    if step.triton and max(attention.kv_latent_dim, held.shape[-1] if part else W) <= MAX_HEAD_WIDTH:
        # Queries are mapped before they are rotated, which gives the same.
        joined = [absorbed(attention, query).flatten(1), step.linear(latent, (attention.k_proj,)), latent]
        keys, values = held.keys if part else held.keys[..., :W], held.keys[..., W:]
        mapped = append(
            torch.cat([*joined, latent] if part else joined, -1), query.shape[1], keys, values, step.length,
            cos=step.cos, sin=step.sin, positions=step.positions, frequency=attention.rotated,
        )  # fmt: skip
        return attend(mapped, keys, values, step.length, attention.scaling, **step.seen(attention, i)).flatten(1)
    key = attention.rebuilt(latent[:, None], step.angles())
    step.write(held.keys, torch.cat((key, latent[:, None, None]), -1))
    keys = step.visible(held.keys)
    query = absorbed(attention, rotate(query, *step.angles(), attention.head_dim)).squeeze(2)
    mask = step.mask(attention.sliding_window, i, query.dtype)
    return grouped(query, keys if part else keys[..., :W], keys[..., W:], mask, attention.scaling)


def alone(
    step: "DecodeStep", attention: MQALatentAttention, held: LatentLayer, query: torch.Tensor, made: torch.Tensor,
    i: int,
) -> torch.Tensor:  # fmt: skip
    """The same where the cache keeps latents alone, with latents [B, r] that are not rounded yet."""
    for name, new in held.packed(made[:, None, None]).items():
        step.write(getattr(held, name), new)
    if attention.rotary:
        query = rotate(query, *step.angles(), attention.head_dim)
    seen = {name: step.visible(buffer) for name, buffer in held.buffers().items()}
    keys = latents = held.unpacked(seen, step.dtype)
    if attention.k_proj is not None:
        keys = attention.rebuilt(latents[:, 0], step.key_angles())
        keys = keys if attention.k_up is None else torch.cat((keys, latents), -1)
    mask = step.mask(attention.sliding_window, i, query.dtype)
    return grouped(absorbed(attention, query).squeeze(2), keys, latents, mask, attention.scaling)


def cross_attention(step: "DecodeStep", attention: MQALatentAttention, query: torch.Tensor, i: int) -> torch.Tensor:
    """[B, H·D] -> [B, H·Dv], the rows of a prompt reading the latents of its source together."""
    assert step.cross is not None
    held = step.cross.decode_layers[i]
    assert isinstance(held, LatentLayer)
    latents = held.unpacked(held.buffers(), step.dtype)
    mapped = absorbed(attention, query.view(len(query), -1, 1, attention.head_dim))
    folded = mapped.reshape(step.cross.rows, -1, attention.kv_latent_dim)
    return read(attention, grouped(folded, latents, latents, step.source_seen(), attention.scaling))


def absorbed(attention: MQALatentAttention, query: torch.Tensor) -> torch.Tensor:
    """Queries [B, H, 1, D] for rebuilt components and the latent, as many of the two as there are, side by side."""
    return torch.cat([part for part in attention.absorb(query) if part is not None], -1)


def read(attention: MQALatentAttention, mixed: torch.Tensor) -> torch.Tensor:
    """The values [B, H·Dv] that the heads read of their mixtures of latents, H·r numbers a row."""
    heads = attention.config.num_attention_heads
    return attention.v_up.read(mixed.view(-1, 1, heads, attention.kv_latent_dim)).flatten(1)


def keys_to_keep(model: Any, arguments: dict[str, Any], rows: int, capacity: int) -> str:
    """What the cache of a call keeps, as [`DecodeCache`] has it, for `capacity` positions of `rows`.

    - A step that rebuilds keys counts their positions back from the newest: where some are skipped, keys are kept.
    - Keys that no kernel rebuilds are written to memory and read again at each step: kept, they save that, if there is
      room for them.
    """
    config = decoder_stack(model).config
    if config.kv_latent_dim is None or not any(config.rope_layers):
        return "rebuilt"
    if not contiguous_positions(model, arguments):
        return "expanded"
    if model.decoding.keys != "auto":
        return model.decoding.keys
    widths = [config.qk_head_dim, config.kv_latent_dim]
    numbers = sum(of_layer(width, i) for width in widths for i in range(config.num_hidden_layers))
    size = numbers * rows * capacity * model.lm_head.weight.element_size()
    return "expanded" if size < room(model) else "rebuilt"


def room(model: Any) -> float:
    """Bytes that a cache may take of a device: most of what is free on an accelerator with what the engine of the last
    call would free, half of the memory of a computer."""
    device, engine = model.lm_head.weight.device, model.decoding.engine
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return 0.8 * (free + unused + (0 if engine is None or not engine.owned else engine.cache.nbytes))
    try:
        return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not known of this system
        return float("inf")
