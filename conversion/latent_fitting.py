"""The best latent of a layer in closed form, one function per formula; float64.

One latent c = Z x stands for the keys and values of all heads: values are read from it, keys are rebuilt from it, and
then rotated. What matters is what an error does to the attention's output, so keys are measured by how much the output
changes with them, and values by what the output projection makes of them.

    H query heads, G heads of keys and values, D head width, R of it rotated, J = R / 2 frequencies, Dv value width,
    d hidden size, r latent width, C rebuilt complex components of keys

    x    [d + 1] input of the attention with a 1 appended, which carries biases;  S = E[x x'] [d + 1, d + 1]
    w_q  [H, D, d + 1], w_k [G, D, d + 1], w_v [G, Dv, d], w_o [H, d, Dv]

All inputs and outputs are float64.
"""

from dataclasses import dataclass

import torch

from mqa_hf.positions_mqa import rotate

from .fitting import RANK_TOLERANCE, inverse


@dataclass(frozen=True)
class Loss:
    """What a layer's output loses where x is replaced by what a latent keeps of it: P terms for keys and P for values.

    A term is tr A (C - C Z' (Z C Z')⁻¹ Z C): the metric A of an error, and the moment C of the inputs that it meets.

    Attributes:
        metrics: A [2 P, d, d], W_K' M W_K of the heads of each part, then W_V' N W_V.
        moments: C [2 P, d, d], centred for keys, attention-averaged for values.
    """

    metrics: torch.Tensor
    moments: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """[2 P]: each term without a latent."""
        return torch.stack([(A * C).sum() for A, C in zip(self.metrics, self.moments)])

    def left(self, Z: torch.Tensor) -> torch.Tensor:
        """[2 P]: each term with a latent Z [r, d]."""
        found = []
        for A, C in zip(self.metrics, self.moments):
            cross = C @ Z.mT
            kept = pseudo_inverse(Z @ cross) @ (cross.mT @ A @ cross)
            found.append((A * C).sum() - kept.trace())
        return torch.stack(found).clamp(min=0)


def pseudo_inverse(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.pinv(matrix, hermitian=True, rtol=RANK_TOLERANCE)


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


def pulled_back(metric: torch.Tensor, weight: torch.Tensor, parts: int) -> torch.Tensor:
    """Σ_a W_a' M_a W_a [P, d, d] over the heads of each part, of metrics [G, D, D] and projections [G, D, d]."""
    found = weight.new_empty(parts, weight.shape[-1], weight.shape[-1])
    for i, (M, W) in enumerate(zip(metric.chunk(parts), weight.chunk(parts))):
        found[i] = W.flatten(0, 1).mT @ (M @ W).flatten(0, 1)
    return found


def encoder(loss: Loss, moment: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The latent that keeps most of keys and values together if all terms have the same inputs.

    With C^½ (Σ ρ_i A_i) C^½ = v s² v', Z = v' C^-½ of the largest s (Eckart and Young 1936), white on C.
    ρ_i = tr A_i C_i / tr A_i C brings the inputs of each term to C.

    Args:
        moment: C [d, d].

    Returns:
        Z [rank, d] and the energies s² [d], largest first.
    """
    met = torch.stack([(A * moment).sum() for A in loss.metrics])
    rho = torch.where(met > 0, loss.total / met.clamp(min=1e-300), torch.zeros_like(met))
    half, back = roots(moment)
    whole = torch.zeros_like(moment)
    for weight, A in zip(rho, loss.metrics):
        whole += weight * A
    inner = half.mT @ whole @ half
    s2, v = torch.linalg.eigh((inner + inner.mT) / 2)
    return v.flip(1)[:, :rank].mT @ back, s2.flip(0).clamp(min=0)


def roots(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q with Q Q' = C, and its pseudo-inverse: [d, d] each."""
    energies, axes = torch.linalg.eigh(moment)
    size = torch.where(energies > RANK_TOLERANCE * energies[-1], energies, torch.zeros_like(energies)).sqrt()
    return axes * size, (axes * inverse(size)).mT


def descended(loss: Loss, moment: torch.Tensor, Z: torch.Tensor, steps: int = 30) -> torch.Tensor:
    """Z [r, d] with less of Σ_i left_i(Z), each term with its own inputs, white on C again.

    There is no closed form for several inputs; L-BFGS from [`encoder`], in float32 and where C is the identity.
    """
    half, back = roots(moment)
    total = loss.total.sum().clamp(min=1e-300)
    met, kept = (torch.empty(loss.moments.shape, device=Z.device) for _ in range(2))
    for i, (A, C) in enumerate(zip(loss.metrics, loss.moments)):
        C = back @ C @ back.mT
        met[i], kept[i] = C, C @ (half.mT @ A @ half) @ C / total
    Y = (Z @ half).float().clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([Y], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def gained() -> torch.Tensor:
        optimizer.zero_grad()
        inner = Y @ met @ Y.mT
        ridge = 1e-6 * inner.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        inner = inner + ridge * torch.eye(len(Y), device=Y.device)
        value = -torch.linalg.solve(inner, Y @ kept @ Y.mT).diagonal(dim1=-2, dim2=-1).sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(gained)
    found = whitened(Y.detach().double()) @ back
    better = loss.left(found).sum() < loss.left(Z).sum()  # (never where float32 was not enough)
    return found if better else Z


def whitened(Y: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows with the same span."""
    return torch.linalg.qr(Y.mT)[0].mT


def decoder(weight: torch.Tensor, moment: torch.Tensor, Z: torch.Tensor) -> torch.Tensor:
    """Ŵ = W · C · Z' (Z · C · Z')⁻¹ [..., r]: least squares from the latent, W [..., d]."""
    cross = moment @ Z.mT
    return weight @ cross @ pseudo_inverse(Z @ cross)


def for_rounding(importance: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """T [r, r] for a latent T c that loses least where all of it is rounded alike, c white.

    Rounded with one step, T c gets an error of like size in each direction. With importance λ_i of the directions of
    c, the loss Σ λ_i / a_i² for Σ a_i² fixed is least for a_i⁴ ∝ λ_i; a random rotation then gives each number a like
    share of all directions.

    Args:
        importance: [r, r], what an error of c costs.
        generator: of the rotation.
    """
    energies, axes = torch.linalg.eigh(importance)
    sizes = energies.clamp(min=1e-3 * energies[-1].clamp(min=1e-300)) ** 0.25
    sizes = sizes / sizes.square().mean().sqrt()
    normal = torch.randn(importance.shape, generator=generator, dtype=torch.float64).to(importance.device)
    return torch.linalg.qr(normal)[0] @ (sizes[:, None] * axes.mT)
