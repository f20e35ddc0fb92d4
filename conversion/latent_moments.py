"""Moments of an attention on the calibration tokens, for fitting a latent.

B sequences, T tokens of each, n sampled queries of these, S tokens attended to, H query heads, G heads of keys and
values in P parts with moments of their own, Dv value width, d hidden size, r latent width, R rotated components of a
head, J = R / 2 rotary frequencies
"""

from dataclasses import dataclass

import torch

from mqa_hf.layer_mqa import MQAAttention, MQADecoderLayer, project
from mqa_hf.positions_mqa import rotate

from . import fitting
from .moments import (
    Spread,
    choose_queries,
    mask_rows,
    numerical_rank,
    projected,
    sampled_weights,
    second_moment,
    with_ones,
)
from .normalised import Vectors, own_angles, vectors_of
from .states import Stream, old_heads

PARTS = 8  # at most; each needs d² matrices


@dataclass
class LatentSeen:
    """Moments of an attention with weights p_nt of query n on token t, values v_t and v̄_n = Σ_t p_nt v_t.

    Attributes:
        queries, keys: E[x x'] [d + 1, d + 1] of the inputs of queries and of keys.
        felt: E[x x'] [P, d + 1, d + 1] of the inputs of keys, each weighted by the effect of its logits on the output.
        mixed: E[x̄ x̄'] [P, d + 1, d + 1] of the attention-averaged inputs.
        effects: [H], E_n Σ_t p_nt² ‖W_O (v_t - v̄_n)‖²: the squared change of the output with a logit of the head.
        sharpness: [H], E_n Σ_t p_nt²: the share of independent squared errors of values that averaging leaves.
        spread: [J, G, G], for [`fitting.rotary_gram`]; `None` if nothing is rotated.
        vectors: of queries and keys, if these are not linear in the inputs; see [`normalised.Vectors`].
        tokens: number of tokens.
        rank: number of directions of the keys' inputs that the tokens span.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    felt: torch.Tensor
    mixed: torch.Tensor
    effects: torch.Tensor
    sharpness: torch.Tensor
    spread: torch.Tensor | None
    vectors: Vectors | None
    tokens: int
    rank: int


def parts_of(heads: int) -> int:
    """P for this number of key/value heads: the largest divisor up to `PARTS`."""
    return next(n for n in range(min(heads, PARTS), 0, -1) if heads % n == 0)


def look_for_latent(
    stream: Stream, teacher: MQADecoderLayer, student: MQADecoderLayer, site: str, generator: torch.Generator
) -> LatentSeen:
    """Gather moments of the teacher's attention on the student's hidden states; see [`moments.look`]."""
    attention: MQAAttention = getattr(teacher, site)
    d, H, G = stream.config.hidden_size, stream.config.num_attention_heads, old_heads(attention)
    P = parts_of(G)
    J = stream.config.rotary_dim // 2 if attention.rotary else 0

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=stream.device)

    queries, keys, felt, mixed = (
        zeros(d + 1, d + 1),
        zeros(d + 1, d + 1),
        zeros(P, d + 1, d + 1),
        zeros(P, d + 1, d + 1),
    )
    effects, sharpness = zeros(H), zeros(H)
    rotated = Spread(1, G, J, stream.device)
    vectors = vectors_of(stream, attention)
    memory = stream.memory if site == "cross_attn" else None
    seen_queries = 0
    for rows in stream.batches():
        h, source, mask = stream.at(student, site, rows)
        valid = stream.valid(rows)
        known = valid if memory is None else memory.valid(rows)
        chosen = choose_queries(stream, h.shape[1], generator)
        ok = valid[:, chosen]
        queries += second_moment(h, valid)
        if attention.cross:
            keys += second_moment(source, known)
        query, key = projected(stream, attention, h, source, chosen)
        weights, here = sampled_weights(attention, query, key, mask, chosen)
        weights = weights * ok[:, None, :, None]
        values = project(attention.v_proj, source, attention.v_head_dim)
        change = logit_effects(attention, weights, values)  # [B, H, n, S]
        effects += change.sum((0, 2, 3)).double()
        sharpness += weights.square().sum((0, 2, 3)).double()
        seen_queries += int(ok.sum())
        by_key = change.sum(2).unflatten(1, (P, -1)).sum(2)  # [B, P, S]
        average = (weights.flatten(1, 2) @ source).unflatten(1, (P, -1))  # [B, P, H / P · n, d]
        shares = weights.flatten(1, 2).sum(-1).unflatten(1, (P, -1))  # of 1: less with sinks
        for part in range(P):
            felt[part] += weighted_moment(source, by_key[:, part].sqrt())
            mixed[part] += weighted_moment(average[:, part], ends=shares[:, part])
        if J:
            rotated.add(query, key, here, ok)
        if vectors is not None:
            vectors.add(h, source, valid, known, by_key)
    keys = keys if attention.cross else queries.clone()
    if vectors is not None:
        vectors.finish(float(queries[-1, -1]), float(keys[-1, -1]), felt[:, -1, -1])
    queries, keys, tokens = queries / queries[-1, -1], keys / keys[-1, -1], int(keys[-1, -1])
    felt = felt / felt[:, -1:, -1:].clamp(min=1e-300)
    rank = numerical_rank(keys[:-1, :-1])
    mixed = mixed / mixed[:, -1:, -1:]
    for moment in (queries, keys, felt, mixed):
        moment[..., :-1, :-1] = fitting.shrunk(moment[..., :-1, :-1])
    return LatentSeen(
        queries,
        keys,
        felt,
        mixed,
        effects / seen_queries,
        sharpness / seen_queries,
        rotated.spread[0] / (rotated.count or 1) if J else None,
        vectors,
        tokens,
        rank,
    )


def weighted_moment(
    x: torch.Tensor, weights: torch.Tensor | None = None, ends: torch.Tensor | None = None
) -> torch.Tensor:
    """Σ y y' [d + 1, d + 1] of y = w [x, e], for x [B, n, d] with `weights` and `ends` [B, n], 1 by default."""
    flat, one = x.flatten(0, 1), x.new_ones(x.shape[:2])
    weight, end = ((one if given is None else given).flatten()[:, None] for given in (weights, ends))
    flat, end = flat if weights is None else flat * weight, end * weight
    sums = (flat * end).sum(0, dtype=torch.float64)
    return with_ones(flat.mT @ flat, sums, end.double().square().sum())


def logit_effects(attention: MQAAttention, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """p_nt² ‖W_O (v_t - v̄_n)‖² [B, H, n, S]: the squared change of the output with each logit.

    Args:
        weights: p [B, H, n, S].
        values: v [B, G, S, Dv].
    """
    H = weights.shape[1]
    w_o = attention.o_proj.weight.unflatten(1, (H, -1)).transpose(0, 1)  # [H, d, Dv]
    gram = w_o.mT @ w_o
    v = values.repeat_interleave(H // values.shape[1], 1)
    mapped = v @ gram  # [B, H, S, Dv]
    mean = weights @ v
    distance = (mapped * v).sum(-1)[:, :, None] - 2 * mean @ mapped.mT + (mean @ gram * mean).sum(-1, keepdim=True)
    return weights.square() * distance.clamp(min=0)


def spread_of(
    stream: Stream,
    layer: MQADecoderLayer,
    site: str,
    keys: torch.Tensor,
    Z: torch.Tensor,
    center: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """The spread [J, G, G] of keys that are rebuilt from latents; see [`fitting.rotary_gram`].

    Args:
        layer, site: the converted layer, and the name of its attention.
        keys: [G, R, r + 1], the maps to keys from a latent with a 1 appended.
        Z, center: [r, d] and [d]; the latent is Z (x - center).
    """
    G, R, _ = keys.shape
    assert stream.angles is not None
    angles = own_angles(stream, getattr(layer, site))
    rotated = Spread(1, G, R // 2, stream.device)
    weight, constant = keys[..., :-1].float(), keys[..., -1].float()
    Z, center = Z.float(), center.float()
    for rows in stream.batches():
        h, source, mask = stream.at(layer, site, rows)
        k = torch.einsum("bsr,gdr->bgsd", (source - center) @ Z.mT, weight) + constant[:, None]
        chosen = choose_queries(stream, h.shape[1], generator)
        here = mask_rows(getattr(layer, site), mask, chosen, k.shape[2])
        rotated.add(k[:, :, chosen], rotate(k, *angles, R), here, stream.valid(rows)[:, chosen])
    return rotated.spread[0] / (rotated.count or 1)
