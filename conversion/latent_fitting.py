"""The best latent of a layer in closed form, one function a formula; float64.

One latent c = Z x stands for the keys and values of all heads: values are read from it, keys are rebuilt from it, and
then rotated. What matters is what an error does to the attention's output, so keys are measured by how much the output
changes with them, and values by what the output projection makes of them.

    H query heads, G heads of keys and values, D head width, R of it rotated, J = R / 2 frequencies, Dv value width,
    d hidden size, r latent width, C rebuilt complex components of keys

    x    [d + 1] input of the attention with a 1 appended, which carries biases;  S = E[x x'] [d + 1, d + 1]
    w_q  [H, D, d + 1], w_k [G, D, d + 1], w_v [G, Dv, d], w_o [H, d, Dv]

Everything takes and gives float64.
"""

from dataclasses import dataclass

import torch

from mqa_hf.positions_mqa import rotate

from .fitting import RANK_TOLERANCE, inverse


@dataclass(frozen=True)
class Metrics:
    """Quadratic forms of what a layer's output loses where x is replaced by a part of it.

    For an error E of the stacked keys [G·D, d] it is tr E' M E C, and tr E' N E C_mix for one of the stacked values.

    Attributes:
        keys: W_K' M W_K [d, d].
        values: W_V' N W_V [d, d].
        seen: C = Cov(x) [d, d] of the inputs of keys.
        mixed: C_mix = E[x̄ x̄'] [d, d] of attention-averaged inputs.
    """

    keys: torch.Tensor
    values: torch.Tensor
    seen: torch.Tensor
    mixed: torch.Tensor


def query_moments(w_q: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """E[q q'] [H, D, D] of each query head, before rotation."""
    return torch.einsum("had,de,hbe->hab", w_q, moment, w_q)


def turned_moments(
    moments: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], share: torch.Tensor
) -> torch.Tensor:
    """E_δ[R_δ Q R_δ'] [..., D, D]: how keys that stand δ tokens before a query meet it.

    q_n' R_n' R_t k = (R_δ q_n)' k with δ = n - t.

    Args:
        moments: Q [..., D, D].
        angles: cosines and sines [n, R] of n offsets δ, the first half of the sines negated.
        share: [n], how often each offset occurs; adds up to 1.
    """
    total, D = torch.zeros_like(moments), moments.shape[-1]
    for cos, sin, weight in zip(*angles, share):
        once = rotate(moments[None], cos.view(1, 1, 1, -1), sin.view(1, 1, 1, -1), D)
        total += weight * rotate(once.mT, cos.view(1, 1, 1, -1), sin.view(1, 1, 1, -1), D)[0].mT
    return total


def key_metric(moments: torch.Tensor, effects: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    """M_a = scale² Σ_{h of a} e_h E[q_h q_h'] [G, D, D]: what an error of a key does to the output.

    Args:
        moments: of [`query_moments`], turned where keys are rotated.
        effects: e_h [H], the squared change of the output with one of the head's logits, summed over its keys.
        heads: G.
        scale: of the logits.
    """
    weighted = effects[:, None, None] * moments
    return scale**2 * weighted.unflatten(0, (heads, -1)).sum(1)


def value_metric(w_o: torch.Tensor, heads: int) -> torch.Tensor:
    """N_a = Σ_{h of a} W_O,h' W_O,h [G, Dv, Dv]."""
    return (w_o.mT @ w_o).unflatten(0, (heads, -1)).sum(1)


def pulled_back(metric: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Σ_a W_a' M_a W_a [d, d] of metrics [G, D, D] and projections [G, D, d]."""
    return torch.einsum("gad,gab,gbe->de", weight, metric, weight)


def encoder(metrics: Metrics, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The latent that keeps most of keys and values together.

    With C^½ (W_K' M W_K + ρ W_V' N W_V) C^½ = v s² v', Z = v' C^-½ of the largest s: the best rank r in the sum of
    both metrics (Eckart and Young 1936), white on C. ρ = tr N C_mix / tr N C brings the values' inputs to the keys'.

    Returns:
        Z [rank, d] and the energies s² [d], largest first.
    """
    C, values = metrics.seen, metrics.values
    spread = (values * C).sum()
    rho = (values * metrics.mixed).sum() / spread if spread > 0 else torch.ones_like(spread)
    energies, axes = torch.linalg.eigh(C)
    size = torch.where(energies > RANK_TOLERANCE * energies[-1], energies, torch.zeros_like(energies)).sqrt()
    half = axes * size
    inner = half.mT @ (metrics.keys + rho * values) @ half
    s2, v = torch.linalg.eigh((inner + inner.mT) / 2)
    s2, v = s2.flip(0).clamp(min=0), v.flip(1)
    return v[:, :rank].mT @ (axes * inverse(size)).mT, s2


def decoder(weight: torch.Tensor, moment: torch.Tensor, Z: torch.Tensor) -> torch.Tensor:
    """Ŵ = W · moment · Z' (Z · moment · Z')⁻¹ [..., r]: least squares from the latent, W [..., d]."""
    cross = moment @ Z.mT
    return weight @ cross @ torch.linalg.pinv(Z @ cross, hermitian=True, rtol=RANK_TOLERANCE)


def lost(metrics: Metrics, Z: torch.Tensor) -> tuple[float, float]:
    """What keys and values lose with a latent, in squared change of the output.

    tr(K (C - C Z' (Z C Z')⁻¹ Z C)) for the keys, and the same of values with C_mix.
    """

    def left(form: torch.Tensor, moment: torch.Tensor) -> float:
        cross = moment @ Z.mT
        kept = cross @ torch.linalg.pinv(Z @ cross, hermitian=True, rtol=RANK_TOLERANCE) @ cross.mT
        return max(float((form * (moment - kept)).sum()), 0.0)

    return left(metrics.keys, metrics.seen), left(metrics.values, metrics.mixed)
