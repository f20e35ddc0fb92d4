"""The latent of one attention: its tensors, and the error of each size.

H query heads, G heads of keys and values in P parts, D head width, R rotated components of it, J = R / 2 rotary
frequencies, Dv value width, d hidden size, r latent width, W key width (W / 2 rebuilt complex components)
"""

from dataclasses import dataclass

import torch

from mqa_hf.layer_mqa import MQAAttention, MQADecoderLayer

from . import fitting, latent_fitting
from .budget import output_sizes
from .heads import FittedHeads, augmented
from .latent_fitting import Loss
from .latent_moments import LatentSeen, look_for_latent, spread_of
from .normalised import own_angles, query_factor, rotary_scaling
from .states import Stream, old_heads

# Measured on SmolLM2 (docs/latents.md): errors of keys count twice as much as to first order; half of the moment of
# their inputs is weighted by the effect of their logits.
KEY_WEIGHT = 2.0
FELT = 0.5


@dataclass(frozen=True)
class LatentCurves:
    """The loss of each size of one attention's latent: the squared relative error of the attention's output, times the
    output's share of the residual stream.

    Attributes:
        latent: [d + 1], with a latent of 0, 1, ... numbers and all keys rebuilt.
        keys: [G·R/2 + 1], with 0, 1, ... rebuilt complex components of keys and a lossless latent.
    """

    latent: torch.Tensor
    keys: torch.Tensor


@dataclass(frozen=True)
class Projections:
    """w_q [H, D, d + 1], w_k [G, D, d + 1], w_v [G, Dv, d] and w_o [H, d, Dv] of an attention, in float64."""

    w_q: torch.Tensor
    w_k: torch.Tensor
    w_v: torch.Tensor
    w_o: torch.Tensor

    @classmethod
    def of(cls, attention: MQAAttention, seen: LatentSeen) -> "Projections":
        """Those of the attention; normalised keys are replaced by their regression on the input."""
        H, G = attention.config.num_attention_heads, old_heads(attention)
        w_k = augmented(attention.k_proj).unflatten(0, (G, -1))
        if seen.vectors is not None:
            w_k = seen.vectors.regression((1 - FELT) * seen.keys + FELT * seen.felt, FELT)
        return cls(
            augmented(attention.q_proj).unflatten(0, (H, -1)),
            w_k,
            attention.v_proj.weight.double().unflatten(0, (G, -1)),
            attention.o_proj.weight.double().unflatten(1, (H, -1)).transpose(0, 1),
        )


@dataclass(frozen=True)
class Inputs:
    """Covariances [2 P, d, d] and means [2 P, d] of the inputs of each part: first of keys, then of values.

    A latent loses nothing of the means, which become biases: softmax ignores what all keys have in common, and its
    weights add up to 1. With attention sinks neither is so, and the means count as 0.
    """

    moments: torch.Tensor
    means: torch.Tensor

    @classmethod
    def of(cls, seen: LatentSeen, sinks: bool) -> "Inputs":
        P, d = len(seen.mixed), len(seen.keys) - 1
        moments, means = seen.keys.new_empty(2 * P, d, d), seen.keys.new_empty(2 * P, d)
        for p in range(P):
            for i, one in ((p, (1 - FELT) * seen.keys + FELT * seen.felt[p]), (P + p, seen.mixed[p])):
                means[i] = 0.0 if sinks else one[:-1, -1]
                moments[i] = one[:-1, :-1] - torch.outer(means[i], means[i])
        return cls(moments, means)

    @property
    def center(self) -> torch.Tensor:
        """[d, d]: covariance of the inputs of all keys, for [`latent_fitting.encoder`]."""
        return self.moments[: len(self.moments) // 2].mean(0)


def query_moments(seen: LatentSeen, w: Projections) -> torch.Tensor:
    """E[q q'] [H, D, D] of each query head, before rotation."""
    if seen.vectors is not None:
        return seen.vectors.queries
    return fitting.query_moments(w.w_q, seen.queries)


def key_metric(stream: Stream, attention: MQAAttention, seen: LatentSeen, w: Projections) -> torch.Tensor:
    """M [G, D, D]: the effect of an error of each head's keys on the output."""
    moments = query_moments(seen, w)
    G, scale = old_heads(attention), attention.scaling
    if not attention.rotary:
        return latent_fitting.key_metric(moments, seen.effects, G, scale)
    angles, share, scaling = offsets(stream, attention)
    return latent_fitting.turned_moments(
        latent_fitting.key_metric(moments, seen.effects, G, scale * scaling**2), angles, share
    )


def offsets(stream: Stream, attention: MQAAttention) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor, float]:
    """Angles of the offsets between queries and the keys that they see, the share of each offset, and the factor that
    the rotary type applies to queries and keys, divided out of the angles."""
    angles, scaling = own_angles(stream, attention), rotary_scaling(stream, attention)
    T = angles[0].shape[2]
    n = min(T, attention.sliding_window or T)
    share = torch.arange(T, T - n, -1, dtype=torch.float64, device=stream.device)
    cos, sin = (a[0, 0, :n].double() / scaling for a in angles)
    return (cos, sin), share / share.sum(), scaling


def loss_of(w: Projections, M: torch.Tensor, inputs: Inputs) -> Loss:
    """The error of the attention's output as a function of the latent; M of [`key_metric`]."""
    P = len(inputs.moments) // 2
    metrics = torch.empty_like(inputs.moments)
    metrics[:P] = latent_fitting.pulled_back(KEY_WEIGHT * M, w.w_k[..., :-1], P)
    metrics[P:] = latent_fitting.pulled_back(latent_fitting.value_metric(w.w_o, len(w.w_v)), w.w_v, P)
    return Loss(metrics, inputs.moments)


def energy_by_frequency(attention: MQAAttention, seen: LatentSeen, w: Projections) -> torch.Tensor:
    """P_aj = Σ_{h of a} e_h E|q_hj|² [J, G]: the effect of an error of a rotated key on the output, by frequency."""
    J, G = attention.config.rotary_dim // 2, old_heads(attention)
    moments = query_moments(seen, w)[:, : 2 * J, : 2 * J]
    power = moments.diagonal(dim1=1, dim2=2).unflatten(1, (2, J)).sum(1)  # [H, J]
    return (seen.effects[:, None] * power).unflatten(0, (G, -1)).sum(1).T


def fit_latent(
    stream: Stream,
    teacher: MQADecoderLayer,
    student: MQADecoderLayer,
    site: str,
    seen: LatentSeen,
    generator: torch.Generator,
) -> FittedHeads:
    """Fit the projections of the new attention.

    Args:
        stream: the tokens before the layer.
        teacher, student: the layer with all its heads, and the converted one, whose attention has the sizes to fit.
        site: name of the attention's module.
        seen: moments of the teacher's attention.
        generator: for sampling queries, and for a rotation.
    """
    attention, new = getattr(teacher, site), getattr(student, site)
    w, inputs = Projections.of(attention, seen), Inputs.of(seen, attention.sinks is not None)
    M = key_metric(stream, attention, seen, w)
    loss = loss_of(w, M, inputs)
    rank, P = new.kv_latent_dim, len(seen.mixed)
    Z, _ = latent_fitting.encoder(loss, inputs.center, rank)
    if rank < len(loss.metrics[0]):
        Z = latent_fitting.descended(loss, inputs.center, Z)
    center = seen.keys[:-1, -1] if attention.sinks is None else torch.zeros_like(seen.keys[:-1, -1])
    K, keys_offset = decoded(w.w_k[..., :-1], inputs.moments[:P], inputs.means[:P], Z, center)
    V, values_offset = decoded(w.w_v, inputs.moments[P:], inputs.means[P:], Z, center)
    constant = w.w_k[..., -1] + keys_offset
    groups = len(w.w_o) // len(w.w_v)
    if new.bits < 16:
        T = latent_fitting.for_rounding(importance(w, M, seen, K, V), generator)
        back = torch.linalg.inv(T)
        Z, K, V = T @ Z, K @ back, V @ back
    fitted = {
        "q_proj.weight": attention.q_proj.weight,
        "kv_proj.weight": Z,
        "kv_proj.bias": -Z @ center,
        "v_up.weight": V,
        "o_proj.weight": attention.o_proj.weight,
        "o_proj.bias": torch.einsum("hdv,hv->d", w.w_o, values_offset.repeat_interleave(groups, 0)),
    }
    if attention.q_proj.bias is not None:
        fitted["q_proj.bias"] = attention.q_proj.bias
    if attention.sinks is not None:
        fitted["sinks"] = attention.sinks
    if attention.q_norm is not None:
        fitted |= query_norm(stream, attention)
    R = attention.config.rotary_dim if attention.rotary else 0
    if new.k_up is not None:  # no bias: softmax ignores what all keys share
        fitted["k_up.weight"] = K[:, R:]
    frequencies: list[int] = []
    if R:
        keys = torch.cat((K[:, :R], constant[:, :R, None]), dim=-1)  # [G, R, r + 1]
        spread = spread_of(stream, student, site, keys, Z, center, generator)
        energy = energy_by_frequency(attention, seen, w)
        rows, factors, frequencies = rebuilt_keys(keys, spread, energy, new.qk_head_dim)
        fitted |= {"k_proj.weight": rows[:, :-1], "k_proj.bias": rows[:, -1], "query_factors": factors}
    frequencies = [attention.config.first_frequency(attention.layer_idx) + j for j in frequencies] if R else []
    left, total = loss.left(Z), loss.total
    keys_left, values_left = (
        float(left[part].sum() / total[part].sum().clamp(min=1e-300)) for part in (slice(P), slice(P, None))
    )
    unexplained = None if seen.vectors is None else seen.vectors.unexplained(w.w_k, seen.keys)
    return FittedHeads(fitted, frequencies, keys_left, values_left, unexplained)


def query_norm(stream: Stream, attention: MQAAttention) -> dict[str, torch.Tensor]:
    """The norm of the new attention's queries; gains that follow the rotation are in the keys."""
    norm = attention.q_norm
    assert norm is not None
    found: dict[str, torch.Tensor] = {}
    if norm.weight is None or attention.norm_after_rotation:
        shape = attention.config.num_attention_heads, attention.qk_head_dim
        found["q_norm.weight"] = torch.full(shape, query_factor(stream, attention))
    else:
        found["q_norm.weight"] = norm.weight
    return found if norm.bias is None else {**found, "q_norm.bias": norm.bias}


def decoded(
    weight: torch.Tensor, moments: torch.Tensor, means: torch.Tensor, Z: torch.Tensor, center: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps from the latent Z (x - `center`) in place of the heads' maps from x, and their offsets.

    Args:
        weight: [G, N, d], the heads' maps.
        moments, means: covariances [P, d, d] about means [P, d] of the inputs of each part.

    Returns:
        [G, N, r] and [G, N].
    """
    P, shape = len(moments), weight.shape[:2]
    weight = weight.unflatten(0, (P, -1)).flatten(1, 2)
    maps = latent_fitting.decoder(weight, moments, Z)
    offset = torch.einsum("pnd,pd->pn", weight, means) - torch.einsum("pnr,pr->pn", maps, (means - center) @ Z.mT)
    return maps.view(*shape, -1), offset.view(shape)


def importance(w: Projections, M: torch.Tensor, seen: LatentSeen, K: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """[r, r]: the cost of an error of a single latent, with maps K [G, D, r] to keys and V [G, Dv, r] to values; M of
    [`key_metric`]."""
    N = latent_fitting.value_metric(seen.sharpness.sqrt()[:, None, None] * w.w_o, len(V))
    keys = latent_fitting.pulled_back(M, K, 1)
    return (keys + latent_fitting.pulled_back(N, V, 1))[0]


def rebuilt_keys(
    keys: torch.Tensor, spread: torch.Tensor, energy: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Choose the rotated key components to rebuild.

    Args:
        keys: [G, R, r + 1], the maps to keys from a latent with a 1 appended.
        spread, energy: [J, G, G] complex and [J, G]; see [`fitting.rotary_gram`].
        width: W.

    Returns:
        Rows [W, r + 1], factors b [2, G, W / 2] of each head, and frequencies.
    """
    J = keys.shape[1] // 2
    spectrum = torch.linalg.eigvalsh(fitting.rotary_gram(spread, energy)).flip(-1).clamp(min=0)
    counts = fitting.choose_frequencies(spectrum, width // 2)
    frequencies, alpha, b, _ = fitting.rotary_components(spread, energy, counts)
    complex_keys = torch.complex(keys[:, :J], keys[:, J:])
    rows = torch.einsum("cm,mcd->cd", alpha, complex_keys[:, frequencies])
    factors = b.T
    return torch.cat((rows.real, rows.imag)), torch.stack((factors.real, factors.imag)), frequencies.tolist()


def latent_curves(stream: Stream, teacher: MQADecoderLayer, site: str, generator: torch.Generator) -> LatentCurves:
    """The error of each size of one attention's latent; `stream` is at the layer's input."""
    attention: MQAAttention = getattr(teacher, site)
    seen = look_for_latent(stream, teacher, teacher, site, generator)
    share, energy = output_sizes(stream, teacher, site)
    relative = share / energy if energy else 0.0
    w, inputs = Projections.of(attention, seen), Inputs.of(seen, attention.sinks is not None)
    loss = loss_of(w, key_metric(stream, attention, seen, w), inputs)
    _, s2 = latent_fitting.encoder(loss, inputs.center, 1)
    keys = torch.zeros(1)
    if seen.spread is not None:
        gram = fitting.rotary_gram(seen.spread, energy_by_frequency(attention, seen, w))
        # Half of the square on average, because the phase between an error and a query is arbitrary.
        energies = torch.linalg.eigvalsh(gram).clamp(min=0).flatten().sort(descending=True).values
        keys = left_out(energies * (KEY_WEIGHT * attention.scaling**2 / 2))
    return LatentCurves(left_out(s2) * relative, keys * relative)


def left_out(energies: torch.Tensor) -> torch.Tensor:
    """[n + 1]: the sum of all but the first 0, 1, ... of n energies, given largest first."""
    return torch.cat((energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1))).cpu()
