"""TransMLA (arXiv 2502.07864): one rotary key for all heads, and one latent for the rest of keys and for values.

H query heads, G key/value heads, D head width, d hidden size, J rotary frequencies
F frequencies folded into one, m components of the rotary key, 2 J or a divisor of it

x   [d + 1] input of the attention with a 1 appended;  S = E[x x']
W_K [G·D, d + 1], W_V [G·Dv, d + 1]
B   [G·D, m] orthonormal, the components of all heads' keys that remain rotary
"""

from collections.abc import Iterator

import torch

from mqa_hf.layer_mqa import MQAAttention

from .common import (
    SHARES,
    Calibration,
    Peer,
    affine,
    attentions_of,
    components,
    dominant,
    linear,
    mean_loss,
    moments,
    renewed,
    swapped,
)

COLLAPSE = (1, 2)  # the rotary key is as wide as a head's, or half of it
SEARCH_ROWS = 16  # sequences for choosing F


def rotary_basis(
    W_K: torch.Tensor, S: torch.Tensor, heads: int, J: int, fold: int, collapse: int = 1, kept: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """B and the frequency of each of its pairs of components [m / 2] (RoRoPE and FreqFold).

    A real rotation among the heads commutes with the rotary rotation of a frequency. The principal components of
    (k_1j, ..., k_Gj), real and imaginary parts together, therefore concentrate the heads' keys at each frequency j.
    FreqFold treats F neighbouring frequencies as one, with F times the heads; F / `collapse` of their components
    remain rotary, at every `collapse`-th frequency.

    Args:
        kept: components of each fold. Default: F / `collapse`.
    """
    D, folds = len(W_K) // heads, J // fold
    kept = fold // collapse if kept is None else kept
    order = torch.arange(heads * D, device=W_K.device).view(heads, D)[:, : 2 * J]
    order = order.reshape(heads, 2, folds, fold).permute(2, 1, 0, 3).flatten(2)  # [J/F, 2, G·F], rows of W_K
    both = W_K[order]
    U, _ = dominant((both @ S @ both.mT).sum(1), kept)  # [J/F, G·F, kept]
    i = torch.arange(folds, device=W_K.device)
    B = W_K.new_zeros(2, len(W_K), folds, kept)
    for part in (0, 1):
        B[part][order[:, part], i[:, None]] = U
    c = torch.arange(kept, device=W_K.device)
    return torch.cat((B[0].flatten(1), B[1].flatten(1)), 1), (i[:, None] * fold + c * collapse % fold).flatten()


def decoupled(attention: MQAAttention, B: torch.Tensor, frequencies: torch.Tensor) -> MQAAttention:
    """The attention with a rotary key B' W_K x for all heads and unrotated keys (I - B B') W_K x.

    Queries are q_h for the unrotated keys and B_g' q_h for the rotary key, with g the key/value head of h.
    """
    W_K, W_Q = affine(attention.k_proj), affine(attention.q_proj)
    D, m = attention.qk_head_dim, B.shape[1]
    G, H = len(W_K) // D, len(W_Q) // D
    queries = W_Q.view(H, D, -1)
    own = B.view(G, D, m).repeat_interleave(H // G, 0)
    rotary = torch.einsum("hdm,hdx->hmx", own, queries)
    shared = (B.mT @ W_K)[None].expand(G, -1, -1)
    plain = (W_K - B @ (B.mT @ W_K)).view(G, D, -1)
    J = attention.config.rotary_dim // 2
    return renewed(
        attention,
        q_proj=linear(torch.cat((rotary, queries), 1).flatten(0, 1), attention.q_proj),
        k_proj=linear(torch.cat((shared, plain), 1).flatten(0, 1), attention.k_proj),
        qk_head_dim=m + D,
        query_width=m + D,
        rotated_width=m + D,
        rotated=torch.cat((frequencies, frequencies + J)),
    )


def joint(plain: torch.Tensor, W_V: torch.Tensor, S: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unrotated keys and values of joint rank r (balanced joint principal components).

    With α² = E|W_K,nope x|² / E|W_V x|² and the largest eigenvectors P of N S N', N = [W_K,nope / α; W_V],
    N̂ = P P' N.
    """
    energy = [torch.einsum("ax,xy,ay->", rows, S, rows) for rows in (plain, W_V)]
    alpha = (energy[0] / energy[1]).sqrt() if min(energy) > 0 else 1.0
    N = torch.cat((plain / alpha, W_V))
    P, _ = dominant(N @ S @ N.mT, rank)
    keys, values = (P @ (P.mT @ N)).split((len(plain), len(W_V)))
    return keys * alpha, values


def compressed(attention: MQAAttention, m: int, S: torch.Tensor, rank: int) -> MQAAttention:
    """A [`decoupled`] attention whose plain keys and values come from a latent of rank r."""
    W_K, W_V = affine(attention.k_proj), affine(attention.v_proj)
    heads = W_K.view(-1, attention.qk_head_dim, W_K.shape[1])
    plain, values = joint(heads[:, m:].flatten(0, 1), W_V, S, rank)
    keys = torch.cat((heads[:, :m], plain.view(len(heads), -1, W_K.shape[1])), 1).flatten(0, 1)
    return renewed(attention, k_proj=linear(keys, attention.k_proj), v_proj=linear(values, attention.v_proj))


def folded(calibration: Calibration, collapse: int) -> list[MQAAttention]:
    """The decoupled attentions with the best F, doubled from `collapse` while the loss on calibration text falls."""
    model = calibration.model
    config = model.config
    J = config.rotary_dim // 2
    best: tuple[float, list[MQAAttention]] | None = None
    fold = collapse
    while fold <= J and J % fold == 0:
        made = []
        for attention, S in zip(attentions_of(model), calibration.moments):
            W_K = affine(attention.k_proj)
            made.append(decoupled(attention, *rotary_basis(W_K, S, config.num_key_value_heads, J, fold, collapse)))
        with swapped(model, made):
            loss = mean_loss(model, calibration.rows[:SEARCH_ROWS])
        if best is not None and loss >= best[0]:
            break
        best, fold = (loss, made), 2 * fold
    assert best is not None
    return best[1]


def transmla_peers(calibration: Calibration) -> Iterator[Peer]:
    """TransMLA without training, without the norms of DeepSeek's class and without low-rank queries."""
    model = calibration.model
    J = model.config.rotary_dim // 2
    for collapse in COLLAPSE:
        if J % collapse:
            continue
        made = folded(calibration, collapse)
        with swapped(model, made):
            seen = moments(model, calibration.rows)
        m = 2 * J // collapse
        for share in SHARES:
            rank = round(share * components(model) / len(made)) - m
            if rank < 1:
                continue
            smaller = [compressed(attention, m, S, rank) for attention, S in zip(made, seen)]
            yield Peer(f"TransMLA ({m} rotary), {share:.0%}", 2 * len(made) * (m + rank), smaller)
