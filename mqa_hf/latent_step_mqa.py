"""Attention to latents in a decode step: queries are mapped to the cached latent, which all heads share.

    B rows decoded, k rows of each prompt, P = B / k prompts, S positions, H query heads, D head width, Dv value head
    width, r latent width, W key width

The arithmetic is the absorbed form of `latent_mqa.py`. The cache holds one latent per token, from which the W
components are rebuilt at each step, or both side by side (`cache_mqa.py`).
"""

import os
from typing import TYPE_CHECKING, Any

import torch

from .attention_mqa import grouped
from .cache_mqa import KEYS, ExpandedLayer, LatentLayer
from .configuration_mqa import of_layer
from .kernel_append_mqa import append
from .kernel_attend_mqa import MAX_HEAD_WIDTH, attend
from .kernel_latent_append_mqa import append_latent, read_latent
from .kernel_latent_mqa import attend_latent, latent_angles
from .kernel_latent_plan_mqa import hopper_sizes, latent_bytes
from .kernel_launch_mqa import available, hopper, shared_memory
from .latent_mqa import Angles, HeadLinear, MQALatentAttention
from .packing_mqa import rounded_latent
from .parallel_mqa import least, ranks_of
from .rules_mqa import contiguous_positions, decoder_stack
from .weights_mqa import plain as is_plain

if TYPE_CHECKING:
    from .step_mqa import DecodeStep

# H100: bytes per second; operations per second of the Hopper kernel, of the kernel for all devices, and of that in
# float32; seconds per layer to write the keys of a step, and to round its latent if fewer bits are stored.
BANDWIDTH, OPERATIONS = 3e12, {"hopper": 3.6e14, "any": 1e14, "float32": 3e13}
KEEPING, ROUNDING = 2e-5, 4e-5


class KernelTables:
    """Tables that kernels read besides weights, at fixed addresses while a graph is in use.

    Attributes:
        frequencies: int32 [W / 2] per layer that rotates: the frequency of each complex component, among those of all
            layer types.
        own: the same among those of the layer's type.
        turns: cosines and sines of queries, by the first frequency of each layer type.
        biases: float32 [W] per layer whose keys a kernel rebuilds.
        angles: from [`latent_angles`], for all positions.
    """

    def __init__(self) -> None:
        self.frequencies: dict[int, torch.Tensor] = {}
        self.own: dict[int, torch.Tensor] = {}
        self.turns: dict[int, Angles] = {}
        self.biases: dict[int, torch.Tensor] = {}
        self.angles: torch.Tensor | None = None

    def prepare(self, step: "DecodeStep", positions: int | None) -> None:
        """Read the current weights, and the angles of `positions` positions if more are needed."""
        rotating: list[Any] = [layer.self_attn for layer in step.layers if rebuilds(layer.self_attn)]
        for attention in rotating:
            i = attention.layer_idx
            if i not in self.frequencies:
                self.frequencies[i] = attention.rotated[: attention.qk_head_dim // 2].int()
                self.own[i] = attention.components()[: attention.qk_head_dim // 2].int()
                self.biases[i] = torch.zeros(attention.qk_head_dim, dtype=torch.float32, device=step.device)
            if alone_by_kernel(attention):
                self.biases[i].copy_(attention.k_proj.bias)
        if rotating and positions is not None and step.request.keys == "rebuilt":
            assert step.stack.rotary_emb is not None
            like = torch.empty(0, dtype=torch.float32, device=step.device)
            cos, sin = step.stack.rotary_emb(like, torch.arange(positions, device=step.device)[None])
            self.angles = latent_angles(cos[0, 0], sin[0, 0], step.dtype)
            self.turns = {}
            for attention in rotating:
                cos, sin = attention.of_layer_type((step.cos, step.sin))
                self.turns.setdefault(attention.first_frequency, (cos.contiguous(), sin.contiguous()))


def rebuilds(attention: Any) -> bool:
    """Whether keys are rebuilt from latents."""
    return isinstance(attention, MQALatentAttention) and attention.k_proj is not None


def plain_maps(attention: MQALatentAttention) -> bool:
    """Whether the maps per head are unmodified: no adapter, no trained copy in their place."""
    return all(type(module) is HeadLinear for module in (attention.k_up, attention.v_up) if module is not None)


def alone_by_kernel(attention: MQALatentAttention) -> bool:
    """Whether the kernel attends to latents alone: not if the map to keys has an adapter or quantised weights."""
    rebuilt = attention.k_proj is None or is_plain(attention.k_proj)
    return rebuilt and plain_maps(attention) and attention.kv_latent_dim <= MAX_HEAD_WIDTH


def kept_by_kernel(attention: MQALatentAttention) -> bool:
    """Whether the kernels attend to cached keys."""
    width = attention.qk_head_dim + (0 if attention.k_up is None else attention.kv_latent_dim)
    return plain_maps(attention) and max(width, attention.kv_latent_dim) <= MAX_HEAD_WIDTH


def self_attention(step: "DecodeStep", attention: MQALatentAttention, joined: torch.Tensor, i: int) -> torch.Tensor:
    """[B, H·D + r] -> [B, H·Dv]; the new token is written to the cache."""
    held: Any = step.cache.decode_layers[i]
    keys = isinstance(held, ExpandedLayer)
    joined = with_queries(step, attention, joined)
    if step.triton and held.dtype == step.dtype and (kept_by_kernel if keys else alone_by_kernel)(attention):
        mixed = (attend_to_keys if keys else attend_to_latents)(step, attention, held, joined)
        return read_latent(mixed, attention.v_up.weight)
    query, made = joined.split([joined.shape[1] - attention.kv_latent_dim, attention.kv_latent_dim], -1)
    query = query.view(len(query), -1, 1, attention.head_dim)
    query = attention.turned(query, step.angles() if attention.rotary else None)
    key, latents = (with_keys if keys else alone)(step, attention, held, made)
    mask = step.mask(attention.sliding_window, i, query.dtype)
    mixed = grouped(
        absorbed(attention, query), key, latents, mask, attention.scaling, attention.softcap, attention.sinks
    )
    return read(attention, mixed)


def with_queries(step: "DecodeStep", attention: MQALatentAttention, joined: torch.Tensor) -> torch.Tensor:
    """[B, H·D + r], with the queries normalised and scaled if the model does so."""
    scale = step.query_scale()
    if attention.q_norm is None and scale is None:
        return joined
    query, made = joined.split([joined.shape[1] - attention.kv_latent_dim, attention.kv_latent_dim], -1)
    query = attention.normed(query.view(len(query), -1, 1, attention.head_dim)).squeeze(2)
    return torch.cat(((query if scale is None else query * scale).flatten(1), made), -1)


def with_keys(
    step: "DecodeStep", attention: MQALatentAttention, held: ExpandedLayer, made: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write new latents [B, r] and their keys; return all keys and latents [B, 1, S, ...] to attend to."""
    latent = rounded_latent(made, attention.bits)[:, None]
    step.write(held.keys, torch.cat((attention.rebuilt(latent, step.angles()), latent[:, None]), -1))
    both = step.visible(held.keys).to(step.dtype)
    keys, latents = both.split(held.widths, -1)
    return keys if attention.k_up is None else both, latents


def alone(
    step: "DecodeStep", attention: MQALatentAttention, held: LatentLayer, made: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same as [`with_keys`], for a cache that holds only latents."""
    for name, new in held.packed(made[:, None, None]).items():
        step.write(getattr(held, name), new)
    latents = held.unpacked({name: step.visible(buffer) for name, buffer in held.buffers().items()}, step.dtype)
    if attention.k_proj is None:
        return latents, latents
    keys = attention.rebuilt(latents[:, 0], step.key_angles())
    return keys if attention.k_up is None else torch.cat((keys, latents), -1), latents


def attend_to_keys(
    step: "DecodeStep", attention: MQALatentAttention, held: ExpandedLayer, joined: torch.Tensor
) -> torch.Tensor:
    """[B, H·D + r] -> each head's mixture of latents [B, H, r], by kernels that read cached keys."""
    assert attention.k_proj is not None
    r, W, part = attention.kv_latent_dim, attention.qk_head_dim, attention.k_up is not None
    latent = rounded_latent(joined[:, -r:], attention.bits)
    # Queries are mapped before they are rotated, with the same result.
    query = absorbed(attention, joined[:, :-r].view(len(joined), -1, 1, attention.head_dim))
    new = [query.flatten(1), step.linear(latent, (attention.k_proj,)), latent]
    keys, values = held.keys if part else held.keys[..., :W], held.keys[..., W:]
    query = append(
        torch.cat([*new, latent] if part else new, -1), query.shape[1], keys, values, step.length,
        cos=step.cos, sin=step.sin, positions=step.positions, frequency=attention.rotated,
    )  # fmt: skip
    seen = step.seen(attention, attention.layer_idx)
    return attend(
        query, keys, values, step.length, attention.scaling, softcap=attention.softcap, sinks=attention.sinks, **seen
    )


def attend_to_latents(
    step: "DecodeStep", attention: MQALatentAttention, held: LatentLayer, joined: torch.Tensor
) -> torch.Tensor:
    """Same as [`attend_to_keys`], by the kernel that rebuilds keys."""
    codes, packing = rows_of(held)
    options, asked = step.seen(attention, attention.layer_idx), {}
    if attention.k_proj is not None:
        tables, i = step.kernel_tables, attention.layer_idx
        cos, sin = tables.turns[attention.first_frequency]
        asked = {
            "factors": attention.query_factors, "cos": cos, "sin": sin, "frequency": tables.own[i],
            "positions": step.positions,
        }  # fmt: skip
        options.update(
            weight=attention.k_proj.weight, bias=tables.biases[i], angles=tables.angles,
            frequency=tables.frequencies[i], positions=step.positions,
        )  # fmt: skip
    wide, plain = append_latent(
        joined, attention.config.num_attention_heads, codes, step.length, r=attention.kv_latent_dim,
        k_up=None if attention.k_up is None else attention.k_up.weight, **packing, **asked,
    )  # fmt: skip
    options.update(softcap=attention.softcap, sinks=attention.sinks)
    return attend_latent(codes, step.length, attention.scaling, wide=wide, plain=plain, **packing, **options)


def cross_attention(step: "DecodeStep", attention: MQALatentAttention, query: torch.Tensor, i: int) -> torch.Tensor:
    """[B, H·D] -> [B, H·Dv]; the rows of a prompt read the latents of its source together."""
    assert step.cross is not None
    held = step.cross.decode_layers[i]
    assert isinstance(held, LatentLayer)
    if step.triton and alone_by_kernel(attention):
        assert step.source_length is not None
        assert attention.k_up is not None
        codes, packing = rows_of(held)
        heads = attention.config.num_attention_heads
        _, plain = append_latent(query, heads, None, step.length, k_up=attention.k_up.weight)
        mixed = attend_latent(
            codes, step.source_length, attention.scaling, plain=plain, **packing, capacity=held.capacity,
            start=step.source_start, fold=step.request.copies, counters=step.counters,
        )  # fmt: skip
        return read_latent(mixed, attention.v_up.weight)
    mapped = absorbed(attention, query.view(len(query), -1, 1, attention.head_dim))
    latents = held.unpacked(held.buffers(), step.dtype)
    folded = mapped.reshape(step.cross.rows, -1, attention.kv_latent_dim)
    return read(attention, grouped(folded, latents, latents, step.source_seen(), attention.scaling))


def rows_of(held: LatentLayer) -> tuple[torch.Tensor, dict[str, Any]]:
    """Buffers in the form that kernels take: the first, and those that belong to it."""
    codes, *packing = (buffer.squeeze(1) for buffer in held.buffers().values())
    return codes, dict(zip(("scales", "offsets"), packing))


def absorbed(attention: MQALatentAttention, query: torch.Tensor) -> torch.Tensor:
    """Map queries [B, H, 1, D] to the rebuilt components and the latent, if present, side by side [B, H, ...]."""
    return torch.cat([part for part in attention.absorb(query) if part is not None], -1).squeeze(2)


def read(attention: MQALatentAttention, mixed: torch.Tensor) -> torch.Tensor:
    """Compute the heads' values [B, H·Dv] from their mixtures of latents, H·r numbers per row."""
    heads = attention.config.num_attention_heads
    return attention.v_up.read(mixed.view(-1, 1, heads, attention.kv_latent_dim)).flatten(1)


def keys_to_keep(model: Any, arguments: dict[str, Any], rows: int, capacity: int) -> str:
    """Choose `keys` of [`DecodeCache`] for the cache of a call, with `capacity` positions in each of `rows`.

    - A step that rebuilds keys counts positions back from the newest, so keys are cached if positions have gaps.
    - Keys that no kernel rebuilds would be written to memory and read again at each step, so they are cached if there
      is memory for them.
    - A kernel that rebuilds keys reads r · bits / 8 bytes per token instead of 2(W + r), and computes 2rW more.
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
    if size >= least(room(model), ranks_of(model), model.lm_head.weight.device):
        return "rebuilt"
    if not (model.decoding.kernels and available(model.lm_head.weight.device)):
        return "expanded"
    layers = [layer.self_attn for layer in decoder_stack(model).layers if rebuilds(layer.self_attn)]
    if not all(map(alone_by_kernel, layers)):
        return "expanded"
    if not all(map(kept_by_kernel, layers)):
        return "rebuilt"
    like, tokens = model.lm_head.weight, rows * capacity
    times = {keys: sum(seconds(keys, attention, like, tokens) for attention in layers) for keys in KEYS}
    return min(times, key=times.__getitem__)


def seconds(keys: str, attention: MQALatentAttention, like: torch.Tensor, tokens: int) -> float:
    """Estimate the seconds of a step in one layer with `tokens` in the cache: the larger of reading and computing,
    plus writing the new token.

    Args:
        like: a weight, for its type and device.
    """
    r, W, H = attention.kv_latent_dim, attention.qk_head_dim, attention.config.num_attention_heads
    computed, size, kind = 2 * H * (W + r), (W + r) * like.element_size(), "hopper"
    if keys == "rebuilt":
        computed, size = computed + 2 * r * W, latent_bytes(r, attention.bits, like.dtype)
        part, plain = attention.k_up is not None, attention.softcap is None and attention.sinks is None
        if not (plain and hopper(like.device)) or not hopper_sizes(
            r, W, attention.bits, H, part, like.dtype, shared_memory(like.device)
        ):
            kind = "any"
    if like.dtype == torch.float32:
        kind = "float32"
    kept = KEEPING + ROUNDING * (attention.bits < 16) if keys == "expanded" else 0.0
    return tokens * max(size / BANDWIDTH, computed / OPERATIONS[kind]) + kept


def room(model: Any) -> float:
    """Bytes that a cache may take: most of the free memory of an accelerator, counting the last call's engine as free;
    half of a computer's memory on a CPU.
    """
    device, engine = model.lm_head.weight.device, model.decoding.engine
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return 0.8 * (free + unused + (0 if engine is None or not engine.owned else engine.cache.nbytes))
    try:
        return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # unknown on this system
        return float("inf")
