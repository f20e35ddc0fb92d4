"""Moments of queries and keys that are normalised, before their rotation.

B sequences, T tokens of each, S tokens attended to, H query heads, G heads of keys, D head width, d hidden size, R
rotated components of a head, P parts of keys with weights of their own
"""

from typing import Any

import torch
from torch import nn

from mqa_hf.layer_mqa import Attention, MQAAttention, project
from mqa_hf.positions_mqa import angles_of, rotate

from .states import Stream, old_heads


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
        weight: torch.Tensor | None = None,
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
        if weight is None:
            return
        by_head = weight.repeat_interleave(k.shape[1] // weight.shape[1], 1)
        self.felt += torch.einsum("bgsa,bsd->gad", k * by_head[..., None], one).double()

    def finish(self, queries: float, keys: float, felt: torch.Tensor | None = None) -> None:
        """Divide sums by the number of queries and of keys, and by the weights [P]."""
        self.queries /= queries
        self.energy /= keys
        self.keys /= keys
        if felt is not None:
            self.felt /= felt.clamp(min=1e-300).repeat_interleave(len(self.felt) // len(felt))[:, None, None]

    def rotated(
        self, h: torch.Tensor, source: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], chosen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[`Vectors.of_queries`] of the `chosen` positions and [`Vectors.of_keys`], rotated by the layer's own
        angles."""
        D, (cos, sin) = self.attention.qk_head_dim, angles
        queries = rotate(self.of_queries(h[:, chosen]), cos[:, :, chosen], sin[:, :, chosen], D)
        return queries, rotate(self.of_keys(source), cos, sin, D)

    def regression(self, moments: torch.Tensor, felt: float = 0.0) -> torch.Tensor:
        """The maps [G, D, d + 1] from inputs with moments [P, d + 1, d + 1] to keys, with the share `felt` of the
        weighted moments."""
        cross = (1 - felt) * self.keys + felt * self.felt
        each = moments.repeat_interleave(len(cross) // len(moments), 0)
        return torch.linalg.solve(each, cross, left=False)

    def unexplained(self, maps: torch.Tensor, moment: torch.Tensor) -> float:
        """The share of the keys' energy that the maps leave out."""
        linear = 2 * (maps * self.keys).sum((1, 2)) - torch.einsum("gad,de,gae->g", maps, moment, maps)
        return float(1 - linear.sum() / self.energy.sum().clamp(min=1e-300))


def vectors_of(stream: Stream, attention: MQAAttention) -> Vectors | None:
    """Empty moments of an attention with normalised queries and keys; `None` if they are not normalised."""
    if attention.k_norm is None:
        return None
    return Vectors(attention, query_factor(stream, attention), stream.device)


def query_maps(vectors: Vectors, maps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of the maps of a new attention's normalised queries, with the gains of the norm unless it has biases.

    Args:
        vectors: moments of the source's queries.
        maps: [H, N, D], from the source's normalised queries times their gains.
    """
    attention, norm = vectors.attention, vectors.attention.q_norm
    assert norm is not None
    maps = maps * vectors.factor
    if attention.norm_after_rotation or norm.weight is None:
        return {"q_map.weight": maps}  # the gains are in the keys, or there are none
    if norm.bias is None:
        return {"q_map.weight": maps * norm.weight[:, None]}
    return {"q_map.weight": maps, "q_norm.weight": norm.weight, "q_norm.bias": norm.bias}


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


def own_angles(stream: Stream, attention: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [1, 1, T, R] of a layer's own frequencies, among those of all layer types."""
    assert stream.angles is not None
    return angles_of(stream.config, attention.layer_idx, stream.angles)
