"""The best shared key/value head in closed form, one function per formula; float64.

One shared head replaces m old ones. Averaging keeps what they have in common coordinate by coordinate,
though nothing aligns the coordinates of two heads: any invertible map of a head's keys (per rotary frequency: any
complex factor) can be undone in its queries, and any map of its values in the output projection. Fitted heads use
that freedom: the best subspace follows from an eigendecomposition of moments of the layer's actual inputs.

    m old heads of one new head, d hidden size, D key width, Dv value width, J frequencies; rank, width of the new head

    x    [d + 1] input of the attention with a 1 appended, which carries biases;  S = E[x x'] [d + 1, d + 1]
    w_k  [m, D, d + 1], w_v [m, Dv, d]                projections of the old heads
    w_q  [n, D, d + 1], w_o [n, d, Dv], head_of [n]   of the query heads of the new head, and their old heads

All inputs and outputs are float64. Directions outside the range of rank-deficient moments are left out.
"""

from dataclasses import dataclass

import torch

# Smaller eigenvalues, relative to the largest, are rounding errors.
RANK_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Keys:
    """Fitted keys and queries of one new head.

    Attributes:
        w_k: [rank, d + 1].
        w_q: [n, rank, d + 1].
        discarded: the share of the weighted key energy that the subspace leaves out.
    """

    w_k: torch.Tensor
    w_q: torch.Tensor
    discarded: float


@dataclass(frozen=True)
class Values:
    """Fitted values and output projection of one new head: w_v [rank, d], w_o [n, d, rank]; `discarded` as above."""

    w_v: torch.Tensor
    w_o: torch.Tensor
    discarded: float


def root(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric square roots of positive semidefinite matrices [..., n, n]."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT


def shrunk(moment: torch.Tensor, amount: float = 1e-4) -> torch.Tensor:
    """A moment with its diagonal raised by `amount` of itself.

    Calibration tokens do not span all inputs. The directions that they lack get a small weight, so that nothing is
    lost if there is room for all. The amount is relative because some diagonal entries are larger by orders.
    """
    return moment + amount * torch.diag_embed(moment.diagonal(dim1=-2, dim2=-1))


def covariance(moment: torch.Tensor) -> torch.Tensor:
    """Cov(x) [d, d] of the moment E[x x'] [d + 1, d + 1] of inputs with a 1 appended."""
    mean = moment[:-1, -1]
    return moment[:-1, :-1] - torch.outer(mean, mean)


def subspace(stacked: torch.Tensor, moment: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best rank-`rank` factors of A C^½ in the Frobenius norm (Eckart and Young 1936), from the eigenvectors of
    A C A', or of C^½ A'A C^½ if A has more rows than columns.

    Args:
        stacked: A [rows, d].
        moment: C [d, d].

    Returns:
        U [rows, rank] and singular values s [rank] with zero columns where the matrix has no more rank, and the share
        of the squared norm that they leave out.
    """
    form = gram(stacked, moment)
    s2, vectors = torch.linalg.eigh(form)
    energy, kept, u = form.diagonal().sum(), s2.flip(0)[:rank].clamp(min=0).sqrt(), vectors.flip(1)[:, :rank]
    kept = torch.where(kept > kept[:1] * RANK_TOLERANCE**0.5, kept, torch.zeros_like(kept))
    if len(u) < len(stacked):
        u = stacked @ (root(moment) @ u) * inverse(kept)
    u = u * (kept > 0)
    missing = rank - u.shape[1]
    if missing > 0:
        u, kept = torch.nn.functional.pad(u, (0, missing)), torch.nn.functional.pad(kept, (0, missing))
    discarded = 1.0 - float(kept.square().sum() / energy) if energy > 0 else 0.0
    return u, kept, max(discarded, 0.0)


def gram(stacked: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """A C A' [rows, rows] of A [rows, d] and C [d, d], or C^½ A'A C^½ [d, d], of the same spectrum, if smaller."""
    if len(stacked) <= len(moment):
        found = stacked @ moment @ stacked.mT
    else:
        half = root(moment)
        found = half @ (stacked.mT @ stacked) @ half
    return (found + found.mT) / 2


def inverse(s: torch.Tensor) -> torch.Tensor:
    """1 / s, or 0 where s is 0."""
    return torch.where(s > 0, 1.0 / torch.where(s > 0, s, torch.ones_like(s)), torch.zeros_like(s))


def rotary_gram(spread: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """G_j[a, b] = √(P_aj P_bj) F_j[a, b]: spread F [J, m, m] and energy P [J, m] -> [J, m, m], Hermitian.

    Softmax ignores what all keys of a query have in common. F_j is therefore not E[k k*] but the spread of the rotated
    keys that a query sees about their mean, E_n[Σ_t u_nt k_t k_t* - k̄_n k̄_n*], with u_n uniform over these keys.
    """
    weight = energy.sqrt().to(spread.dtype)
    return weight[..., None] * spread * weight[:, None]


def choose_frequencies(energies: torch.Tensor, pairs: int) -> torch.Tensor:
    """Number of components per frequency [J], with `pairs` in all, chosen by energy.

    Args:
        energies: [J, m], eigenvalues of each frequency's Gram matrix, largest first.
    """
    J, m = energies.shape
    best = energies.flatten().argsort(descending=True, stable=True)[:pairs]
    return torch.bincount(best // m, minlength=J)


def rotary_keys(
    w_k: torch.Tensor,
    w_q: torch.Tensor,
    head_of: torch.Tensor,
    spread: torch.Tensor,
    energy: torch.Tensor,
    counts: torch.Tensor,
) -> Keys:
    r"""Rotated keys: components j and j + J form the complex number w_j, J = D/2.

    Only a complex factor per frequency commutes with the rotation, so each frequency j has its own subspace of
    the m heads. With the query energy P_aj = Σ_{h of a} E|q_hj|² and the spread F_j of the keys, the Hermitian Gram
    matrix G_j[a, b] = √(P_aj P_bj) F_j[a, b] has the top eigenvectors U (as many as the frequency has components), and

        shared rows   α_jc = Σ_a conj(U_ac) √P_aj w_aj
        new queries   q̂_hjc = conj(b_jc) q_hj,   b_jc = U_{a(h) c} / √P_{a(h) j}

    scaled so that the mean of |b|² over the heads is 1.

    Args:
        spread, energy: [J, m, m] complex and [J, m]; see [`rotary_gram`].
        counts: [J], components of each frequency; see [`choose_frequencies`].

    Returns:
        The real parts of all components, by frequency, then the imaginary ones: w_k [2·Σ counts, d + 1].
    """
    J = w_k.shape[1] // 2
    keys = torch.complex(w_k[:, :J], w_k[:, J:])  # [m, J, d + 1]
    queries = torch.complex(w_q[:, :J], w_q[:, J:])  # [n, J, d + 1]
    frequencies, rows, b, discarded = rotary_components(spread, energy, counts)
    k = torch.einsum("cm,mcd->cd", rows, keys[:, frequencies])
    q = b.conj().mT[head_of][..., None] * queries[:, frequencies]  # [n, c, d + 1]
    return Keys(torch.cat((k.real, k.imag)), torch.cat((q.real, q.imag), dim=1), discarded)


def rotary_components(
    spread: torch.Tensor, energy: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """The components of [`rotary_keys`]: frequencies [C], ascending; α [C, m]; b [C, m]; the energy left out."""
    energies, vectors = torch.linalg.eigh(rotary_gram(spread, energy))  # ascending
    energies, vectors = energies.flip(-1).clamp(min=0), vectors.flip(-1)
    kept, total = energies[torch.arange(energies.shape[1]) < counts.cpu()[:, None]].sum(), energies.sum()
    frequencies = torch.arange(len(counts)).repeat_interleave(counts.cpu())
    nth = torch.cat([torch.arange(n) for n in counts.tolist()]) if len(frequencies) else frequencies
    U = vectors[frequencies, :, nth]  # [C, m]
    weight = energy[frequencies].sqrt()
    # A head without queries at a frequency does not count there, and its (zero) queries need no key.
    b = U * inverse(weight)
    scale = b.abs().square().mean(dim=1, keepdim=True).sqrt()
    rows = U.conj() * weight * scale
    discarded = 1.0 - float(kept / total) if total > 0 else 0.0
    return frequencies, rows, b * inverse(scale), max(discarded, 0.0)


def reduced(
    old: torch.Tensor, stacked: torch.Tensor, moment: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """One projection Ŵ that replaces those of several heads, from the best subspace of their weighted stack.

    With stacked · moment^½ = U s V', Ŵ = s⁻¹ U' stacked, scaled to the energy that an old head has on average.

    Args:
        old: [m, D, d], W_i.
        stacked: [m·D, d], the same, weighted by their use.
        moment: [d, d], of the inputs.

    Returns:
        Ŵ [rank, d], the maps W_i · moment · Ŵ' [m, D, rank], and the share of energy that is left out.
    """
    m, D, _ = old.shape
    U, s, discarded = subspace(stacked, moment, rank)
    white = inverse(s)[:, None] * (U.mT @ stacked)
    scale = torch.einsum("mad,de,mae->", old, moment, old).clamp(min=0).div(m * D).sqrt()
    scale = scale if scale > 0 else torch.ones_like(scale)
    return white * scale, torch.einsum("mad,de,re->mar", old, moment, white) / scale, discarded


def query_moments(w_q: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """E[q q'] = W_Q S W_Q' [H, D, D] of each query head, before rotation."""
    return torch.einsum("had,de,hbe->hab", w_q, moment, w_q)


def weighted_keys(w_k: torch.Tensor, head_of: torch.Tensor, energies: torch.Tensor) -> torch.Tensor:
    """The stack of Σ_i^½ W_K,i [m·D, d] with Σ_i = Σ_{h of i} E[q_h q_h'], `energies` [n, D, D]."""
    m, D, _ = w_k.shape
    sigma = torch.zeros(m, D, D, dtype=w_k.dtype, device=w_k.device).index_add_(0, head_of, energies)
    return (root(sigma) @ w_k).flatten(0, 1)


def plain_keys(
    w_k: torch.Tensor, w_q: torch.Tensor, head_of: torch.Tensor, energies: torch.Tensor, seen: torch.Tensor, rank: int
) -> Keys:
    """Unrotated keys; any invertible map of a key head can be undone in its queries.

    `energies` are E[q_h q_h'] [n, D, D]. C = Cov(x) is that of the inputs of keys, whose moment is `seen`: softmax
    ignores a constant added to every key. With Σ_i = Σ_{h of i} E[q_h q_h'], the stack of Σ_i^½ W_K,i C^½ = U s V'
    gives Ŵ_K = s⁻¹ U' Σ^½ W_K, whose keys have covariance I, and
    Ŵ_Q,h = (W_K,i(h) C Ŵ_K')' W_Q,h. Keys are scaled to the energy that those of an old head have on average.
    """
    stacked = weighted_keys(w_k[..., :-1], head_of, energies)
    rows, mapped, discarded = reduced(w_k[..., :-1], stacked, covariance(seen), rank)
    queries = torch.einsum("nar,nad->nrd", mapped[head_of], w_q)
    return Keys(torch.nn.functional.pad(rows, (0, 1)), queries, discarded)


def weighted_values(w_v: torch.Tensor, w_o: torch.Tensor, head_of: torch.Tensor) -> torch.Tensor:
    """The stack of (Σ_{h of i} W_O,h' W_O,h)^½ W_V,i [m·Dv, d]."""
    m, Dv, _ = w_v.shape
    A = torch.zeros(m, Dv, Dv, dtype=w_v.dtype, device=w_v.device).index_add_(0, head_of, w_o.mT @ w_o)
    return (root(A) @ w_v).flatten(0, 1)


def spectrum(stacked: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """The energies that the components of a stack carry, largest first."""
    return torch.linalg.eigvalsh(gram(stacked, moment)).flip(0).clamp(min=0)


def values(w_v: torch.Tensor, w_o: torch.Tensor, head_of: torch.Tensor, mixed: torch.Tensor, rank: int) -> Values:
    """Values and output projection.

    A head's output is W_O W_V x̄ with the attention-averaged input x̄; `mixed` = E[x̄ x̄'] [d, d] over queries and heads.
    The stack of (Σ_{h of i} W_O,h' W_O,h)^½ W_V,i mixed^½ = U s V' gives Ŵ_V = s⁻¹ U' (…)^½ W_V and
    Ŵ_O,h = W_O,h W_V,i(h) mixed Ŵ_V'. Values are scaled to the energy that those of an old head have on average.
    """
    rows, mapped, discarded = reduced(w_v, weighted_values(w_v, w_o, head_of), mixed, rank)
    return Values(rows, torch.einsum("nda,nar->ndr", w_o, mapped[head_of]), discarded)


def refit(outputs: torch.Tensor, errors: torch.Tensor, ridge: float = 1e-3) -> torch.Tensor:
    """The change of the output projection by ridge regression.

    (Y'Z + λ W) (Z'Z + λ I)⁻¹ = W + E'Z (Z'Z + λ I)⁻¹ with E = Y - Z W', the errors of the projection W. Rounding E'Z
    costs little where the errors are small; Y'Z in float32 would change directions that the tokens hardly span.

    Args:
        outputs: Z'Z [r, r], of the new heads' outputs on the student's own inputs.
        errors: E'Z [d, r], of the attention's output, with that of the teacher's layer on the same inputs as Y.

    Returns:
        E'Z (Z'Z + λ I)⁻¹ [d, r] with λ = `ridge` times the mean of the diagonal of Z'Z.
    """
    strength = ridge * outputs.diagonal().mean()
    if strength <= 0:
        return torch.zeros_like(errors)
    eye = torch.eye(outputs.shape[0], dtype=outputs.dtype, device=outputs.device)
    return torch.linalg.solve(outputs + strength * eye, errors, left=False)
