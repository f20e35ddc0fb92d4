"""Moments of an attention on the calibration tokens, in the notation of `fitting.py`.

B sequences, T tokens of each, S tokens attended to, H query heads, G old and K new key/value heads, d hidden size,
J rotary frequencies
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mqa_hf.attention_mqa import attention_weights
from mqa_hf.latent_mqa import MQALatentAttention
from mqa_hf.layer_mqa import Attention, MQAAttention, MQADecoderLayer, project

from . import fitting
from .normalised import Vectors, own_angles, vectors_of
from .states import Stream, old_heads

FLOAT32_NOISE = 1e-6  # of the largest eigenvalue
ENOUGH = 4  # calibration tokens per hidden dimension; with fewer, moments are mostly noise


@dataclass
class Seen:
    """Moments of an attention.

    Attributes:
        queries, keys: E[x x'] [d + 1, d + 1] of the inputs of queries and of keys.
        mixed: E[x̄ x̄'] [K, d, d] of the attention-averaged inputs, for the query heads of each new head; [K, d + 1,
            d + 1], with a 1 appended to inputs, if the bias of values does not fold.
        spread, energy: [K, J, m, m] for the m old heads of each new one, and [G, J]; `None` if nothing is rotated.
        vectors: of queries and keys, if these are normalised; see [`normalised.Vectors`].
        tokens: number of tokens.
        rank: number of directions of the keys' inputs that the tokens span.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mixed: torch.Tensor
    spread: torch.Tensor | None
    energy: torch.Tensor | None
    vectors: Vectors | None
    tokens: int
    rank: int


def projected(
    stream: Stream, attention: Attention, h: torch.Tensor, source: torch.Tensor, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries at the `chosen` positions and keys, rotated: [B, H, chosen, D] and [B, G, S, D]."""
    angles, scale = stream.angles, None if attention.cross else stream.query_scale
    here = None if angles is None else (angles[0][:, :, chosen], angles[1][:, :, chosen])
    if isinstance(attention, MQALatentAttention):
        query = attention.queries(h[:, chosen], here)
        key = attention.keys_by_head(attention.latents(source), angles)
    else:
        query = attention.clipped(project(attention.q_proj, h[:, chosen], attention.query_width))
        key = attention.clipped(project(attention.k_proj, source, attention.qk_head_dim))
        query, key = attention.placed_queries(query, here), attention.placed_keys(key, angles)
    return query if scale is None else query * scale[:, :, chosen], key


def sampled_weights(
    attention: Attention, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention weights [B, H, chosen, S] of the queries at the `chosen` positions, and the mask's rows for them."""
    mask = mask_rows(attention, mask, chosen, key.shape[2])
    return attention_weights(query, key, mask, attention.scaling, attention.softcap, attention.sinks), mask


def mask_rows(attention: Attention, mask: torch.Tensor | None, chosen: torch.Tensor, length: int) -> torch.Tensor:
    """The rows [B or 1, H or 1, chosen or 1, S] of an additive mask for queries at the `chosen` positions; without a
    mask, each sees all tokens up to itself, or all if the attention is not causal."""
    if mask is not None:
        return mask if mask.shape[2] == 1 else mask[:, :, chosen]
    rows = torch.zeros(len(chosen), length, device=chosen.device)
    if attention.is_causal:
        later = torch.arange(length, device=chosen.device) > chosen[:, None]
        rows = rows.masked_fill(later, torch.finfo(torch.float).min)
    return rows[None, None]


def second_moment(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Σ x x' [d + 1, d + 1] of the tokens [B, T, d] that are `kept` [B, T], with a 1 appended to each.

    The products of a batch are in float32, sums of batches in float64: rounding adds about 1e-7 of each input's energy
    (in TF32 too, where inputs are rounded to within 5e-4), while [`fitting.shrunk`] adds 1e-4 of it.
    """
    flat = x[kept]
    return with_ones(flat.mT @ flat, flat.sum(0, dtype=torch.float64), len(flat))


def with_ones(products: torch.Tensor, sums: torch.Tensor, count: float | torch.Tensor) -> torch.Tensor:
    """Σ x x' [d + 1, d + 1] of x with a 1 appended, in float64, from Σ x x' [d, d], Σ x [d] and the number of x.

    GPUs multiply rows of d + 1 numbers, which are not aligned, several times as slowly as rows of d.
    """
    found = nn.functional.pad(products.double(), (0, 1, 0, 1))
    found[-1, :-1] = found[:-1, -1] = sums
    found[-1, -1] = count
    return found


def choose_queries(stream: Stream, length: int, generator: torch.Generator) -> torch.Tensor:
    """Sample the positions at which attention is computed."""
    return torch.randperm(length, generator=generator)[: stream.options.queries].to(stream.device)


class Spread:
    """The spread of rotated keys about the mean of those that a query sees, and the energy of queries, by frequency.

    See [`fitting.rotary_gram`].
    """

    def __init__(self, new: int, old: int, J: int, device: torch.device):
        m = old // new
        self.new, self.J, self.count = new, J, 0
        self.spread = torch.zeros(new, J, m, m, dtype=torch.complex128, device=device)
        self.energy = torch.zeros(old, J, dtype=torch.float64, device=device)

    def add(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, ok: torch.Tensor) -> None:
        """Add the queries [B, H, n, D] that are `ok` [B, n], with their rows of the mask; `key` is [B, G, S, D]."""
        B, G, J = len(key), key.shape[1], self.J
        visible = (mask > torch.finfo(torch.float).min / 2).double()[:, :1].expand(B, -1, -1, -1)[:, 0]
        visible = visible / visible.sum(-1, keepdim=True).clamp(min=1) * ok[..., None]  # [B, n, S]
        q = query[..., : 2 * J].double().square().unflatten(-1, (2, J)).sum(3)  # [B, H, n, J]
        self.energy += (q * ok[:, None, :, None]).sum((0, 2)).view(G, -1, J).sum(1)
        k = key[..., : 2 * J].double().transpose(1, 2).flatten(2)  # [B, S, G · 2 J]
        # The sums of k k* over keys, by how often each is seen, less those of the means that queries see.
        self.spread += self.products(k * visible.sum(1)[..., None].sqrt()) - self.products(visible @ k)
        self.count += int(ok.sum())

    def products(self, k: torch.Tensor) -> torch.Tensor:
        """Σ k k* [K, J, m, m] of real and imaginary parts [B, n, G · 2 J]."""
        m = self.spread.shape[-1]
        # As one product of real numbers: libraries multiply small complex matrices slowly.
        parts = k.view(-1, self.new, m, 2, self.J).permute(1, 4, 0, 3, 2).flatten(3)  # [K, J, B · n, 2 m]
        products = (parts.mT @ parts).unflatten(-1, (2, m)).unflatten(-3, (2, m))  # [K, J, 2, m, 2, m]
        real = products[:, :, 0, :, 0] + products[:, :, 1, :, 1]
        return torch.complex(real, products[:, :, 1, :, 0] - products[:, :, 0, :, 1])


def look(
    stream: Stream,
    teacher: MQADecoderLayer,
    student: MQADecoderLayer,
    site: str,
    new: int,
    generator: torch.Generator,
) -> Seen:
    """Gather moments of the teacher's attention on the student's hidden states.

    Args:
        stream: the tokens before the layer.
        teacher, student: the layer with all its heads, and the converted one.
        site: name of the attention's module.
        new: number of new key/value heads.
        generator: for sampling queries.
    """
    attention: MQAAttention = getattr(teacher, site)
    d, H = stream.config.hidden_size, stream.config.num_attention_heads
    J = stream.config.rotary_dim // 2 if attention.rotary else 0
    options: dict[str, Any] = {"dtype": torch.float64, "device": stream.device}
    queries, keys = (torch.zeros(d + 1, d + 1, **options) for _ in range(2))
    e = d if attention.config.folds_value_bias else d + 1
    mixed = torch.zeros(new, e, e, **options)
    rotated = Spread(new, old_heads(attention), J, stream.device)
    count = 0
    vectors = vectors_of(stream, attention)
    memory = stream.memory if site == "cross_attn" else None
    for rows in stream.batches():
        h, source, mask = stream.at(student, site, rows)
        valid = stream.valid(rows)
        known = valid if memory is None else memory.valid(rows)
        chosen = choose_queries(stream, h.shape[1], generator)
        queries += second_moment(h, valid)
        if attention.cross:
            keys += second_moment(source, known)
        query, key = projected(stream, attention, h, source, chosen)
        weights, here = sampled_weights(attention, query, key, mask, chosen)
        ok = valid[:, chosen]
        inputs = nn.functional.pad(source, (0, e - d), value=1.0)
        average = (weights.flatten(1, 2) @ inputs).view(len(h), new, H // new, -1, e)
        average = average.permute(1, 0, 3, 2, 4)[:, ok].flatten(1, 2)  # [K, queries, e]
        mixed += (average.mT @ average).double()
        count += average.shape[1]
        if vectors is not None:
            vectors.add(h, source, valid, known)
            if J and attention.norm_after_rotation:
                query, key = vectors.rotated(h, source, own_angles(stream, attention), chosen)
        if J:
            rotated.add(query, key, here, ok)
    keys = keys if attention.cross else queries.clone()
    tokens = float(queries[-1, -1]), float(keys[-1, -1])
    if vectors is not None:
        vectors.finish(*tokens)
    queries, keys, mixed = queries / tokens[0], keys / tokens[1], mixed / count
    rank = numerical_rank(keys[:-1, :-1])
    for moment in (queries, keys):
        moment[:-1, :-1] = fitting.shrunk(moment[:-1, :-1])
    sampled = rotated.count or 1
    return Seen(
        queries,
        keys,
        fitting.shrunk(mixed),
        rotated.spread / sampled if J else None,
        rotated.energy / sampled if J else None,
        vectors,
        int(min(tokens)),
        rank,
    )


def numerical_rank(moment: torch.Tensor) -> int:
    """Numerical rank of a moment of float32 inputs, each scaled to the same energy."""
    energy = moment.diagonal()
    scale = fitting.inverse(energy.sqrt())
    moment = scale[:, None] * moment * scale
    # No eigenvalue is above these norms. If all are above the limit, a Cholesky factor shows it sooner.
    least = FLOAT32_NOISE * torch.minimum(moment.abs().sum(0).max(), moment.norm())
    shifted = moment.clone()
    shifted.diagonal().sub_(least)
    if torch.linalg.cholesky_ex(shifted)[1] == 0:
        return len(moment)
    spectrum = torch.linalg.eigvalsh(moment)
    return int((spectrum > FLOAT32_NOISE * spectrum[-1]).sum())


def doubts(attention: MQAAttention, seen: Any, where: str) -> dict[str, str | None]:
    """Reasons to doubt a fit, with the attention they apply to."""
    found: dict[str, str | None] = {}
    d = seen.queries.shape[0] - 1
    if seen.tokens < ENOUGH * d:
        few = f"{seen.tokens:,} calibration tokens are few for a hidden size of {d}"
        found[f"{few}; {ENOUGH * d:,} or more are better"] = None
    elif seen.rank < d:
        spanned = f"the calibration text spans only some of the {d} directions of an attention's input"
        found[spanned] = f"{seen.rank} in {where}"
    H = attention.o_proj.in_features // attention.v_head_dim
    by_head = attention.o_proj.weight.view(-1, H, attention.v_head_dim).square().sum((0, 2))
    q = attention.q_proj.weight.view(H, attention.qk_head_dim, -1).square().sum((1, 2))
    dead = int(((by_head == 0) | (q == 0)).sum())
    if dead:
        found["query heads that are all zeros do not influence the fit"] = f"{dead} in {where}"
    return found
