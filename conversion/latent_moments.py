"""Moments of an attention on the calibration tokens, for fitting a latent.

B sequences, T tokens of each, n sampled queries of these, S tokens attended to, H query heads, G heads of keys and
values in P parts with moments of their own, Dv value width, d hidden size, r latent width, R rotated components of a
head, J = R / 2 rotary frequencies
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mqa_hf.layer_mqa import Attention, MQAAttention, MQADecoderLayer, project
from mqa_hf.positions_mqa import rotate

from . import fitting
from .moments import Spread, choose_queries, numerical_rank, old_heads, projected, sampled_weights
from .states import Stream

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
        vectors: of queries and keys, if these are not linear in the inputs; see [`Vectors`].
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
    vectors: "Vectors | None"
    tokens: int
    rank: int


class Vectors:
    """Moments of normalised queries q [B, H, T, D] and keys k [B, G, S, D] before their rotation.

    The norm makes them non-linear in the input x, so keys are replaced by their regression on x. If the source
    normalises after the rotation, gains that differ within a rotated pair do not commute with it; their mean does.

    Attributes:
        queries: E[q q'] [H, D, D].
        keys, felt: E[k x'] [G, D, d + 1], over all keys and weighted as `LatentSeen.felt` is.
        energy: E[k²] [G].
        factor: on the queries, [`query_factor`].
    """

    def __init__(self, attention: MQAAttention, factor: float, device: torch.device):
        H, G, D = attention.config.num_attention_heads, old_heads(attention), attention.qk_head_dim
        d = attention.config.hidden_size
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.attention, self.factor = attention, factor
        self.queries, self.energy = torch.zeros(H, D, D, **options), torch.zeros(G, **options)
        self.keys, self.felt = torch.zeros(G, D, d + 1, **options), torch.zeros(G, D, d + 1, **options)

    def of_queries(self, h: torch.Tensor) -> torch.Tensor:
        """[B, T, d] -> [B, H, T, D]."""
        attention = self.attention
        return gained(attention, project(attention.q_proj, h, attention.qk_head_dim), keys=False) * self.factor

    def of_keys(self, source: torch.Tensor) -> torch.Tensor:
        """[B, S, d] -> [B, G, S, D]."""
        attention = self.attention
        return gained(attention, project(attention.k_proj, source, attention.qk_head_dim), keys=True)

    def add(
        self,
        h: torch.Tensor,
        source: torch.Tensor,
        valid: torch.Tensor,
        known: torch.Tensor,
        weight: torch.Tensor,
    ) -> None:
        """Add sequences with inputs of queries h [B, T, d] and of keys [B, S, d], where they are not padding, and the
        `weight` [B, P, S] of each key for `felt`."""
        q = self.of_queries(h).transpose(1, 2)[valid]  # [n, H, D]
        self.queries += torch.einsum("nha,nhb->hab", q, q).double()
        k = self.of_keys(source)  # [B, G, S, D]
        one = nn.functional.pad(source, (0, 1), value=1.0)
        flat = k.transpose(1, 2)[known]
        self.energy += flat.square().sum((0, 2)).double()
        self.keys += torch.einsum("nga,nd->gad", flat, one[known]).double()
        by_head = weight.repeat_interleave(k.shape[1] // weight.shape[1], 1)
        self.felt += torch.einsum("bgsa,bsd->gad", k * by_head[..., None], one).double()

    def finish(self, queries: float, keys: float, felt: torch.Tensor) -> None:
        """Divide sums by the number of queries and of keys, and by the weights [P]."""
        self.queries /= queries
        self.energy /= keys
        self.keys /= keys
        self.felt /= felt.clamp(min=1e-300).repeat_interleave(len(self.felt) // len(felt))[:, None, None]

    def regression(self, moments: torch.Tensor, felt: float) -> torch.Tensor:
        """The maps [G, D, d + 1] from inputs with moments [P, d + 1, d + 1] to keys, with the share `felt` of the
        weighted moments."""
        cross = (1 - felt) * self.keys + felt * self.felt
        each = moments.repeat_interleave(len(cross) // len(moments), 0)
        return torch.linalg.solve(each, cross, left=False)

    def unexplained(self, maps: torch.Tensor, moment: torch.Tensor) -> float:
        """The share of the keys' energy that the maps leave out."""
        linear = 2 * (maps * self.keys).sum((1, 2)) - torch.einsum("gad,de,gae->g", maps, moment, maps)
        return float(1 - linear.sum() / self.energy.sum().clamp(min=1e-300))


def gained(attention: MQAAttention, x: torch.Tensor, keys: bool) -> torch.Tensor:
    """Queries or keys before their rotation: normalised, with the gains of the source."""
    norm = attention.k_norm if keys else attention.q_norm
    assert norm is not None
    if not attention.norm_after_rotation:
        return norm(x)
    bare = norm.bare(x)
    return bare * pair_gains(attention)[:, None] if keys else bare


def rotary_scaling(stream: Stream, attention: MQAAttention) -> float:
    """The factor that the layer's rotary type applies to queries and keys."""
    if not attention.rotary:
        return 1.0
    assert stream.shell.rotary_emb is not None
    known = stream.shell.rotary_emb.attention_scaling
    if not isinstance(known, list):
        return float(known)
    return known[list(stream.config.rope_by_type).index(stream.config.layer_types[attention.layer_idx])]


def query_factor(stream: Stream, attention: MQAAttention) -> float:
    """A factor on the new attention's queries. A norm after the rotation removes the rotary type's factor from queries
    and keys; the new attention, which normalises before it, would have both."""
    return rotary_scaling(stream, attention) ** -2 if attention.norm_after_rotation else 1.0


def pair_gains(attention: MQAAttention) -> torch.Tensor:
    """[G, D]: the products of the gains of queries and keys that follow the rotation, as their mean over the query
    heads and over the two components of a pair."""
    assert attention.q_norm is not None
    assert attention.k_norm is not None
    G, D, R = old_heads(attention), attention.qk_head_dim, attention.config.rotary_dim
    one = torch.ones(1, device=attention.k_proj.weight.device)
    of_queries, of_keys = (one if n.weight is None else n.weight for n in (attention.q_norm, attention.k_norm))
    gains = of_queries.expand(attention.config.num_attention_heads, D).unflatten(0, (G, -1)).mean(1) * of_keys
    turned = gains[:, :R].unflatten(1, (2, R // 2)).mean(1)
    return torch.cat((turned, turned, gains[:, R:]), dim=1)


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
    normed = attention.k_norm is not None
    vectors = Vectors(attention, query_factor(stream, attention), stream.device) if normed else None
    memory = stream.memory if site == "cross_attn" else None
    seen_queries = 0
    for rows in stream.batches():
        h, source, mask = stream.at(student, site, rows)
        valid = stream.valid(rows)
        known = valid if memory is None else memory.valid(rows)
        chosen = choose_queries(stream, h.shape[1], generator)
        ok = valid[:, chosen]
        for moment, x, kept in ((queries, h, valid), (keys, source, known)):
            flat = nn.functional.pad(x[kept].double(), (0, 1), value=1.0)
            moment += flat.mT @ flat
        query, key = projected(stream, attention, h, source)
        weights, here = sampled_weights(attention, query, key, mask, chosen)
        weights = weights * ok[:, None, :, None]
        values = project(attention.v_proj, source, attention.v_head_dim)
        change = logit_effects(attention, weights, values)  # [B, H, n, S]
        effects += change.sum((0, 2, 3)).double()
        sharpness += weights.square().sum((0, 2, 3)).double()
        seen_queries += int(ok.sum())
        by_key = change.sum(2).unflatten(1, (P, -1)).sum(2)  # [B, P, S]
        one = nn.functional.pad(source, (0, 1), value=1.0)
        average = (weights.flatten(1, 2) @ one).unflatten(1, (P, -1))  # [B, P, H / P · n, d + 1]
        for part in range(P):
            flat = (one * by_key[:, part, :, None].sqrt()).flatten(0, 1)
            felt[part] += (flat.mT @ flat).double()
            flat = average[:, part].flatten(0, 1)
            mixed[part] += (flat.mT @ flat).double()
        if J:
            rotated.add(query, key, here, chosen, ok)
        if vectors is not None:
            vectors.add(h, source, valid, known, by_key)
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


def own_angles(stream: Stream, attention: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [1, 1, T, R] of a layer's own frequencies, among those of all layer types."""
    assert stream.angles is not None
    config = stream.config
    half = config.rotary_dim // 2
    first, total = config.first_frequency(attention.layer_idx), stream.angles[0].shape[-1] // 2
    cos, sin = (
        torch.cat((x[..., first : first + half], x[..., total + first : total + first + half]), dim=-1)
        for x in stream.angles
    )
    return cos, sin


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
        here = mask if mask.shape[2] == 1 else mask[:, :, chosen]
        rotated.add(k, rotate(k, *angles, R), here, chosen, stream.valid(rows)[:, chosen])
    return rotated.spread[0] / (rotated.count or 1)
