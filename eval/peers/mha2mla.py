"""MHA2MLA (arXiv 2502.14837): a few rotary components per head, and one latent for everything that is not rotated.

G key/value heads, D head width, J rotary frequencies, of which `pairs` are kept per head
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from mqa_hf.layer_mqa import MQAAttention, project
from mqa_hf.modeling_mqa import MQAForCausalLM

from .common import SHARES, Calibration, Peer, affine, attentions_of, components, dominant, linear, renewed, watch

FRACTIONS = (8, 4)  # one of this many frequencies is kept; one of eight in the paper's models


def contributions(model: MQAForCausalLM, rows: torch.Tensor) -> list[torch.Tensor]:
    """Bound on each frequency's contribution to the logits, Σ_{h of g} E|q_hj| E|k_gj|, per layer: [G, J].

    The paper's 2-norm contribution, summed over grouped queries.
    """
    attentions = attentions_of(model)
    J = model.config.rotary_dim // 2
    sums: list[Any] = [[0.0, 0.0] for _ in attentions]

    def see(i: int, x: torch.Tensor) -> None:
        a = attentions[i]
        for n, projection in enumerate((a.q_proj, a.k_proj)):
            heads = project(projection, x, a.qk_head_dim)
            norms = torch.hypot(heads[..., :J], heads[..., J : 2 * J])  # [B, heads, T, J]
            sums[i][n] += norms.double().sum((0, 2))

    watch(model, rows, see)
    G = model.config.num_key_value_heads
    return [q.view(G, -1, J).sum(1) * k / rows.numel() ** 2 for q, k in sums]


def kept_components(contribution: torch.Tensor, pairs: int) -> torch.Tensor:
    """Which rotary components of each head are kept, those with the largest contributions: [G, 2 J]."""
    kept = torch.zeros_like(contribution, dtype=torch.bool)
    kept.scatter_(1, contribution.argsort(dim=1, descending=True, stable=True)[:, :pairs], True)
    return torch.cat((kept, kept), 1)


def rotate_kept(
    attention: MQAAttention, kept: torch.Tensor, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Rotate queries or keys [B, heads, T, D] in the components that are kept [G, 2 J] of the head they belong to."""
    (cos, sin), kept = angles, kept.repeat_interleave(x.shape[1] // len(kept), 0)[:, None]
    return attention.rotate(x, (torch.where(kept, cos, 1.0), torch.where(kept, sin, 0.0)))


def partly_rotary(attention: MQAAttention, kept: torch.Tensor, rank: int) -> MQAAttention:
    """The attention with [W_K,nope; W_V] of rank r by their joint singular value decomposition (SVD-joint).

    [W_K,nope; W_V] = U s V' becomes U_r U_r' [W_K,nope; W_V]; biases are kept.
    """
    keys, values = affine(attention.k_proj), affine(attention.v_proj)
    G, D = len(kept), attention.qk_head_dim
    plain = torch.ones(G, D, dtype=torch.bool, device=keys.device)
    plain[:, : kept.shape[1]] = ~kept
    plain = plain.flatten()
    stacked = torch.cat((keys[plain], values))
    U, _ = dominant(stacked[:, :-1] @ stacked[:, :-1].mT, rank)
    stacked[:, :-1] = U @ (U.mT @ stacked[:, :-1])
    keys[plain], values = stacked.split((int(plain.sum()), len(values)))
    return renewed(
        attention,
        k_proj=linear(keys, attention.k_proj),
        v_proj=linear(values, attention.v_proj),
        rotate=partial(rotate_kept, attention, kept),
    )


def mha2mla_peers(calibration: Calibration) -> Iterator[Peer]:
    """MHA2MLA without fine-tuning."""
    model = calibration.model
    attentions, config = attentions_of(model), model.config
    found = contributions(model, calibration.rows)
    for fraction in FRACTIONS:
        pairs = max(1, config.rotary_dim // 2 // fraction)
        kept = [kept_components(contribution, pairs) for contribution in found]
        rotary = 2 * pairs * config.num_key_value_heads
        for share in SHARES:
            rank = round(share * components(model) / len(attentions)) - rotary
            if rank < 1:
                continue
            made = [partly_rotary(attention, of, rank) for attention, of in zip(attentions, kept)]
            size = 2 * len(attentions) * (rotary + rank)
            yield Peer(f"MHA2MLA ({2 * pairs} rotary a head), {share:.0%}", size, made)
