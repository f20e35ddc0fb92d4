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
    if attention.rotary:
        query = rotate(query, *step.angles(), attention.head_dim)
    wide, plain = attention.absorb(query)
    if isinstance(held, ExpandedLayer):
        latent = rounded_latent(made, attention.bits)[:, None]
        step.write(held.keys, torch.cat((attention.rebuilt(latent, step.angles()), latent[:, None]), -1))
        both = step.visible(held.keys)
        keys, latents = both.split(held.widths, -1)
        key = keys if plain is None else both
    else:
        assert isinstance(held, LatentLayer)
        for name, new in held.packed(made[:, None, None]).items():
            step.write(getattr(held, name), new)
        seen = {name: step.visible(buffer) for name, buffer in held.buffers().items()}
        key = latents = held.unpacked(seen, step.dtype)
        if wide is not None:
            keys = attention.rebuilt(latents[:, 0], step.key_angles())
            key = keys if plain is None else torch.cat((keys, latents), -1)
    query = torch.cat([part for part in (wide, plain) if part is not None], -1)
    mask = step.mask(attention.sliding_window, i, query.dtype)
    return read(attention, grouped(query.squeeze(2), key, latents, mask, attention.scaling))


def cross_attention(step: "DecodeStep", attention: MQALatentAttention, query: torch.Tensor, i: int) -> torch.Tensor:
    """[B, H·D] -> [B, H·Dv], the rows of a prompt reading the latents of its source together."""
    assert step.cross is not None
    held = step.cross.decode_layers[i]
    assert isinstance(held, LatentLayer)
    _, mapped = attention.absorb(query.view(len(query), -1, 1, attention.head_dim))
    assert mapped is not None
    latents = held.unpacked(held.buffers(), step.dtype)
    folded = mapped.reshape(step.cross.rows, -1, attention.kv_latent_dim)
    return read(attention, grouped(folded, latents, latents, step.source_seen(), attention.scaling))


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
