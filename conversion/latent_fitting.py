"""The best latent of a layer in closed form, one function per formula; float64.

One latent c = Z x replaces the keys and values of all heads. Values are computed from it; keys are rebuilt from it and
then rotated. The loss is the error of the attention's output: an error of a key counts by how much it changes the
output, and an error of a value by what the output projection makes of it.

    H query heads, G heads of keys and values in P parts, h of a the query heads of head a, D head width, R rotated
    components of it, Dv value width, d hidden size, r latent width

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
    """Error of an attention's output when a latent replaces its input x: P terms for keys, then P for values.

    A term is tr A (C - C Z' (Z C Z')⁻¹ Z C), with the metric A of errors and the moment C of the inputs.

    Attributes:
        metrics: A [2 P, d, d]: W_K' M W_K of the heads of each part with M of [`key_metric`], then W_V' N W_V with N
            of [`value_metric`].
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


def turned_moments(
    moments: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], share: torch.Tensor
) -> torch.Tensor:
    """E_δ[R_δ Q R_δ'] [..., D, D]: the moment of queries as keys δ tokens before them see it.

    q_n' R_n' R_t k = (R_δ q_n)' k with δ = n - t, where R_n is the rotation at position n.

    Args:
        moments: Q [..., D, D].
        angles: cosines and sines [n, R] of n offsets δ, the first half of the sines negated.
        share: [n], the share of each offset; adds up to 1.
    """
    total, D = torch.zeros_like(moments), moments.shape[-1]
    for cos, sin, weight in zip(*angles, share):
        once = rotate(moments[None], cos.view(1, 1, 1, -1), sin.view(1, 1, 1, -1), D)
        total += weight * rotate(once.mT, cos.view(1, 1, 1, -1), sin.view(1, 1, 1, -1), D)[0].mT
    return total


def key_metric(moments: torch.Tensor, effects: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    """M_a = scale² Σ_{h of a} e_h E[q_h q_h'] [G, D, D]: the effect of an error of a key on the output.

    Args:
        moments: of [`query_moments`], turned where keys are rotated.
        effects: e_h [H], the squared change of the output with one of the head's logits, summed over its keys.
        heads: G.
        scale: factor on the logits.
    """
    weighted = effects[:, None, None] * moments
    return scale**2 * weighted.unflatten(0, (heads, -1)).sum(1)


def value_metric(w_o: torch.Tensor, heads: int) -> torch.Tensor:
    """N_a = Σ_{h of a} W_O,h' W_O,h [G, Dv, Dv]: the effect of an error of a value on the output."""
    return (w_o.mT @ w_o).unflatten(0, (heads, -1)).sum(1)


def pulled_back(metric: torch.Tensor, weight: torch.Tensor, parts: int) -> torch.Tensor:
    """Σ_a W_a' M_a W_a [P, d, d] over the heads of each part, from metrics M [G, D, D] and maps W [G, D, d]."""
    found = weight.new_empty(parts, weight.shape[-1], weight.shape[-1])
    for i, (M, W) in enumerate(zip(metric.chunk(parts), weight.chunk(parts))):
        found[i] = W.flatten(0, 1).mT @ (M @ W).flatten(0, 1)
    return found


def encoder(loss: Loss, moment: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The latent with the least loss if all terms i of the loss have the same inputs.

    With C^½ (Σ ρ_i A_i) C^½ = v s² v', Z = v' C^-½ of the largest s (Eckart and Young 1936), so that Z C Z' = I.
    ρ_i = tr A_i C_i / tr A_i C corrects each term for its inputs having the moment C_i instead of C.

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
    """Reduce Σ_i left_i(Z), each term with its own inputs, by L-BFGS from the Z [r, d] of [`encoder`].

    There is no closed form for several inputs. The steps are in float32, in coordinates in which C (`moment`) is the
    identity. In the result, Z C Z' = I again; if it is not better, Z is returned.
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
    better = loss.left(found).sum() < loss.left(Z).sum()  # may be false: float32
    return found if better else Z


def whitened(Y: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows with the same span."""
    return torch.linalg.qr(Y.mT)[0].mT


def decoder(weight: torch.Tensor, moment: torch.Tensor, Z: torch.Tensor) -> torch.Tensor:
    """Ŵ = W · C · Z' (Z · C · Z')⁻¹ [..., r]: the least-squares map from Z x to W x, W [..., d]."""
    cross = moment @ Z.mT
    return weight @ cross @ pseudo_inverse(Z @ cross)


def for_rounding(importance: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """T [r, r] for which rounding T c with one step for all numbers costs least; c has covariance I.

    Rounding makes equal errors in all directions of T c. If T scales direction i of c, of importance λ_i, by a_i, the
    loss Σ λ_i / a_i² for Σ a_i² fixed is least for a_i⁴ ∝ λ_i. A random rotation then gives each number an equal share
    of all directions.

    Args:
        importance: [r, r], the cost of an error of c, as a quadratic form.
        generator: for the rotation.
    """
    energies, axes = torch.linalg.eigh(importance)
    sizes = energies.clamp(min=1e-3 * energies[-1].clamp(min=1e-300)) ** 0.25
    sizes = sizes / sizes.square().mean().sqrt()
    normal = torch.randn(importance.shape, generator=generator, dtype=torch.float64).to(importance.device)
    return torch.linalg.qr(normal)[0] @ (sizes[:, None] * axes.mT)
