"""Keys and values of low rank, rebuilt before rotation: Palu (arXiv 2407.21118) and CARE (arXiv 2603.17946).

L layers, G key/value heads in n groups, D head width, d hidden size, r rank

x   [d] input of the attention;  C = E[x x'] [d, d]
W   [rows, d] projection of a group of heads
"""

import heapq
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from mqa_hf.conversion.fitting import inverse
from mqa_hf.layer_mqa import MQAAttention

from .common import SHARES, Calibration, Peer, attentions_of, components, dominant, linear, renewed
from .quantised import bits_of, rounded

HEADS_OF_A_GROUP = 4  # of Palu
BITS = 4  # of Palu's quantised latents
DAMPING = 0.1  # of CARE, as in its published code


def factors(W: torch.Tensor, C: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rows, r] and B [r, d] with the least E|W x - A B x|² (Palu, SVD with whitening).

    With C = L L' and W L = U s V': A = U_r s_r^½, B = s_r^½ V_r' L⁻¹ = s_r^-½ U_r' W. U and s² are eigenvectors and
    eigenvalues of W C W', so that neither L nor its inverse is needed.
    """
    U, squares = dominant(W @ C @ W.mT, rank)
    s = squares.sqrt()
    return U * s.sqrt(), inverse(s.sqrt())[:, None] * (U.mT @ W)


def grouped(W: torch.Tensor, C: torch.Tensor, ranks: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """[`factors`] of each of n groups of rows, as one pair: A [rows, Σ r] with a block of each group, B [Σ r, d]."""
    pairs = [factors(group, C, rank) for group, rank in zip(W.chunk(len(ranks)), ranks, strict=True)]
    return torch.block_diag(*(A for A, _ in pairs)), torch.cat([B for _, B in pairs])


def by_importance(importance: torch.Tensor, total: int, most: int) -> list[int]:
    """Ranks from 1 to `most`, in proportion to importance (Palu, automatic rank allocation).

    The remainder from rounding and from `most` goes to the others one by one.
    """
    shares = (1 + importance.double() / importance.double().sum() * (total - len(importance))).tolist()
    ranks = [min(most, int(share)) for share in shares]
    order = sorted(range(len(ranks)), key=lambda i: shares[i] - ranks[i])
    while sum(ranks) < min(total, most * len(ranks)):
        for i in order:
            if ranks[i] < most and sum(ranks) < total:
                ranks[i] += 1
    return ranks


class Rebuilt(nn.Module):
    """A projection through a latent quantised to a few bits: A q(B x) + bias."""

    def __init__(self, down: nn.Linear, up: nn.Linear, bits: int):
        super().__init__()
        self.down, self.up, self.bits = down, up, bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(rounded(self.down(x), self.bits))


def projection(old: nn.Linear, A: torch.Tensor, B: torch.Tensor, bits: int | None = None) -> nn.Module:
    """A projection A B in place of an old one, whose bias is kept.

    With `bits`, the latent is quantised after a random rotation, which is folded into the factors; Palu does so with a
    Hadamard matrix (low-rank-aware quantisation).
    """
    bias = torch.zeros(len(A), 1).to(A) if old.bias is None else old.bias.detach().to(A)[:, None]
    if bits is None:
        return linear(torch.cat((A @ B, bias), 1), old)
    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(len(B), len(B), dtype=B.dtype, generator=generator))
    Q = Q.to(B)
    down = linear(nn.functional.pad(Q @ B, (0, 1)), old)
    return Rebuilt(down, linear(torch.cat((A @ Q.mT, bias), 1), old), bits)


def group_size(heads: int) -> int:
    """Heads per group: the largest number up to four that divides the heads."""
    return max(n for n in range(1, HEADS_OF_A_GROUP + 1) if heads % n == 0)


def palu_peers(calibration: Calibration) -> Iterator[Peer]:
    """Palu: groups of heads decomposed together, whitened; ranks by the Fisher information of W_K and W_V."""
    model = calibration.model
    heads = model.config.num_key_value_heads
    groups = heads // group_size(heads)
    attentions = attentions_of(model)
    most = attentions[0].k_proj.out_features // groups
    for share in SHARES:
        total = max(round(share * components(model)) // groups, 2 * len(attentions))
        ranks = by_importance(calibration.fisher.flatten(), total, most)
        for bits in (None, BITS):
            made, size = [], 0
            for i, attention in enumerate(attentions):
                C = calibration.moments[i][:-1, :-1]
                new = {}
                for name, rank in zip(("k_proj", "v_proj"), ranks[2 * i : 2 * i + 2]):
                    old = getattr(attention, name)
                    pair = grouped(old.weight.detach().double(), C, [rank] * groups)
                    new[name] = projection(old, *pair, bits)
                    size += 16 * rank * groups if bits is None else bits_of(rank * groups, bits)
                made.append(renewed(attention, **new))
            name = "Palu" if bits is None else f"Palu at {bits} bits"
            yield Peer(f"{name}, {share:.0%} of the ranks", size // 8, made)


def greedy(spectra: Sequence[torch.Tensor], total: int) -> list[int]:
    """CARE's ranks of each layer (adjusted-rank allocation): one by one to the layer with the largest gain,

        σ²_{r+1} / Σ_{i>r} σ²_i · √((L - l) / ((L + 1) / 2)) / √(r / r_min),

    layer l counted from 0, between half and twice the mean rank.

    Args:
        spectra: σ² of each layer, largest first.
    """
    L, mean = len(spectra), total // len(spectra)
    least, most = max(1, mean // 2), 2 * mean
    ranks = [least] * L

    def gain(layer: int) -> tuple[float, int]:
        squares, r = spectra[layer], ranks[layer]
        left = float(squares[r:].sum())
        share = float(squares[r]) / left if left > 0 else 0.0
        return -share * ((L - layer) * 2 / (L + 1)) ** 0.5 / (r / least) ** 0.5, layer

    limits = [min(most, len(squares)) for squares in spectra]
    queue = [gain(layer) for layer in range(L) if ranks[layer] < limits[layer]]
    heapq.heapify(queue)
    for _ in range(total - sum(ranks)):
        if not queue:
            break
        _, layer = heapq.heappop(queue)
        ranks[layer] += 1
        if ranks[layer] < limits[layer]:
            heapq.heappush(queue, gain(layer))
    return ranks


def damped(C: torch.Tensor) -> torch.Tensor:
    """C + λ mean(diag C) I."""
    return C + DAMPING * C.diagonal().mean() * torch.eye(len(C)).to(C)


def care_peers(calibration: Calibration) -> Iterator[Peer]:
    """CARE: all heads of a layer decomposed together, whitened by a damped covariance.

    Keys and values get half of the ranks each, which are divided among the layers.
    """
    model = calibration.model
    attentions: list[MQAAttention] = attentions_of(model)
    covariances = [damped(moment[:-1, :-1]) for moment in calibration.moments]
    names = ("k_proj", "v_proj")
    weights = {name: [getattr(a, name).weight.detach().double() for a in attentions] for name in names}

    def spectrum(W: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvalsh(W @ C @ W.mT).flip(0).clamp(min=0).cpu()

    spectra = {name: list(map(spectrum, weights[name], covariances)) for name in names}
    for share in SHARES:
        total = round(share * components(model)) // 2
        ranks = {name: greedy(spectra[name], total) for name in names}
        made = []
        for i, attention in enumerate(attentions):
            new = {}
            for name in names:
                pair = factors(weights[name][i], covariances[i], ranks[name][i])
                new[name] = projection(getattr(attention, name), *pair)
            made.append(renewed(attention, **new))
        yield Peer(f"CARE, {share:.0%}", 2 * sum(map(sum, ranks.values())), made)
