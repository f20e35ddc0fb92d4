"""The latent of one attention: what it is fitted on, its tensors, and what each width would lose.

B sequences, T tokens of each, H query heads, G heads of keys and values, D head width, R of it rotated, d hidden size,
r latent width, C rebuilt complex components of keys
"""

from dataclasses import dataclass

import torch

from mqa_hf.layer_mqa import MQAAttention, MQADecoderLayer

from . import fitting, latent_fitting
from .budget import share_of_stream
from .heads import FittedHeads, augmented, heads_output
from .latent_fitting import Metrics
from .moments import Seen, look, old_heads, spread_of
from .states import Stream


@dataclass(frozen=True)
class LatentCurves:
    """What each size of one attention's latent would lose, in squared change of the output relative to it, times the
    output's share of the stream that it is added to.

    Attributes:
        latent: [d + 1], with 0, 1, ... numbers of the latent and all keys rebuilt.
        keys: [G·R/2 + 1], with 0, 1, ... rebuilt complex components of keys and nothing lost by the latent.
    """

    latent: torch.Tensor
    keys: torch.Tensor


def projections(attention: MQAAttention) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """w_q [H, D, d + 1], w_k [G, D, d + 1], w_v [G, Dv, d] and w_o [H, d, Dv] in float64."""
    H, G = attention.config.num_attention_heads, old_heads(attention)
    w_q, w_k = augmented(attention.q_proj), augmented(attention.k_proj)
    w_o = attention.o_proj.weight.double()
    return (
        w_q.unflatten(0, (H, -1)),
        w_k.unflatten(0, (G, -1)),
        attention.v_proj.weight.double().unflatten(0, (G, -1)),
        w_o.unflatten(1, (H, -1)).transpose(0, 1),
    )


def metrics_of(stream: Stream, attention: MQAAttention, seen: Seen) -> Metrics:
    """How much the output changes with keys and values."""
    w_q, w_k, w_v, w_o = projections(attention)
    assert seen.effects is not None
    G, scale = old_heads(attention), attention.scaling
    moments = latent_fitting.query_moments(w_q, seen.queries)
    if attention.rotary:
        angles, share, scaling = offsets(stream, attention)
        by_head = (seen.effects[:, None, None] * moments).unflatten(0, (G, -1)).sum(1)
        M = (scale * scaling**2) ** 2 * latent_fitting.turned_moments(by_head, angles, share)
    else:
        M = latent_fitting.key_metric(moments, seen.effects, G, scale)
    N = latent_fitting.value_metric(w_o, G)
    return Metrics(
        latent_fitting.pulled_back(M, w_k[..., :-1]),
        latent_fitting.pulled_back(N, w_v),
        fitting.covariance(seen.keys),
        seen.mixed[0],
    )


def offsets(stream: Stream, attention: MQAAttention) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor, float]:
    """Angles of the offsets between queries and the keys that they see, how often each occurs, and the factor that the
    rotary type puts on both, which is taken out of the angles."""
    assert stream.angles is not None
    assert stream.shell.rotary_emb is not None
    scaling = float(stream.shell.rotary_emb.attention_scaling)
    T = stream.angles[0].shape[2]
    n = min(T, attention.sliding_window or T)
    share = torch.arange(T, T - n, -1, dtype=torch.float64, device=stream.device)
    cos, sin = (a[0, 0, :n].double() / scaling for a in stream.angles)
    return (cos, sin), share / share.sum(), scaling


def energy_by_frequency(attention: MQAAttention, seen: Seen) -> torch.Tensor:
    """P_aj = Σ_{h of a} e_h E|q_hj|² [J, G]: what an error of a rotated key does to the output, by frequency."""
    assert seen.effects is not None
    J, G = attention.config.rotary_dim // 2, old_heads(attention)
    w_q = augmented(attention.q_proj).unflatten(0, (attention.config.num_attention_heads, -1))[:, : 2 * J]
    power = torch.einsum("had,de,hae->ha", w_q, seen.queries, w_q).unflatten(1, (2, J)).sum(1)  # [H, J]
    return (seen.effects[:, None] * power).unflatten(0, (G, -1)).sum(1).T


def fit_latent(
    stream: Stream,
    teacher: MQADecoderLayer,
    student: MQADecoderLayer,
    site: str,
    seen: Seen,
    rank: int,
    width: int,
    generator: torch.Generator,
) -> FittedHeads:
    """Projections of the new attention.

    Args:
        stream: the tokens before the layer.
        teacher, student: the layer with all its heads, and the converted one, of which it is about `site`.
        seen: what the attention sees.
        rank: r.
        width: W = 2 C, rebuilt components of keys; 0 where nothing is rotated.
        generator: of the queries that are looked at.
    """
    attention: MQAAttention = getattr(teacher, site)
    _, w_k, w_v, _ = projections(attention)
    metrics = metrics_of(stream, attention, seen)
    Z, _ = latent_fitting.encoder(metrics, rank)
    if len(Z) < rank:
        Z = torch.nn.functional.pad(Z, (0, 0, 0, rank - len(Z)))
    mean = seen.keys[:-1, -1]
    K = latent_fitting.decoder(w_k[..., :-1], metrics.seen, Z)  # [G, D, r]
    constant = w_k[..., -1] + (w_k[..., :-1] - K @ Z) @ mean  # [G, D]: the mean of the keys stays
    V = latent_fitting.decoder(w_v, metrics.mixed, Z)
    R = attention.config.rotary_dim if attention.rotary else 0
    fitted = {
        "q_proj.weight": attention.q_proj.weight,
        "kv_proj.weight": Z,
        "v_up.weight": V,
        "o_proj.weight": attention.o_proj.weight,
    }
    if attention.q_proj.bias is not None:
        fitted["q_proj.bias"] = attention.q_proj.bias
    if w_k.shape[1] > R:  # (what these keys have in common is seen by no query)
        fitted["k_up.weight"] = K[:, R:]
    frequencies: list[int] = []
    missing = 0.0
    if R:
        keys = torch.cat((K[:, :R], constant[:, :R, None]), dim=-1)  # [G, R, r + 1]
        spread = spread_of(stream, student, site, attention, keys, Z, generator)
        rows, factors, frequencies, missing = rebuilt_keys(keys, spread, energy_by_frequency(attention, seen), width)
        fitted |= {"k_proj.weight": rows[:, :-1], "k_proj.bias": rows[:, -1], "query_factors": factors}
    keys_lost, values_lost = latent_fitting.lost(metrics, Z)
    keys_all, values_all = (
        float((a * b).sum()) for a, b in ((metrics.keys, metrics.seen), (metrics.values, metrics.mixed))
    )
    return FittedHeads(
        fitted,
        frequencies,
        max(keys_lost / keys_all if keys_all else 0.0, missing),
        values_lost / values_all if values_all else 0.0,
    )


def rebuilt_keys(
    keys: torch.Tensor, spread: torch.Tensor, energy: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, list[int], float]:
    """The components that are rebuilt of rotated keys.

    Args:
        keys: [G, R, r + 1], from a latent with a 1 appended.
        spread, energy: [J, G, G] complex and [J, G]; see [`fitting.rotary_gram`].
        width: W.

    Returns:
        Rows [W, r + 1], factors b [2, G, W / 2] of each head, frequencies, and the energy that is left out.
    """
    J = keys.shape[1] // 2
    spectrum = torch.linalg.eigvalsh(fitting.rotary_gram(spread, energy)).flip(-1).clamp(min=0)
    counts = fitting.choose_frequencies(spectrum, width // 2)
    frequencies, alpha, b, missing = fitting.rotary_components(spread, energy, counts)
    complex_keys = torch.complex(keys[:, :J], keys[:, J:])
    rows = torch.einsum("cm,mcd->cd", alpha, complex_keys[:, frequencies])
    factors = b.T
    return torch.cat((rows.real, rows.imag)), torch.stack((factors.real, factors.imag)), frequencies.tolist(), missing


def latent_curves(stream: Stream, teacher: MQADecoderLayer, site: str, generator: torch.Generator) -> LatentCurves:
    """What each size of one attention's latent would lose; the tokens stand before the layer."""
    attention: MQAAttention = getattr(teacher, site)
    seen = look(stream, teacher, teacher, site, 1, generator, effects=True)
    metrics = metrics_of(stream, attention, seen)
    size = output_energy(stream, teacher, site)
    share = share_of_stream(stream, teacher, site)
    _, s2 = latent_fitting.encoder(metrics, 1)
    keys = torch.zeros(1)
    if attention.rotary:
        assert seen.spread is not None
        gram = fitting.rotary_gram(seen.spread[0], energy_by_frequency(attention, seen))
        # An error of a complex component meets queries of any phase: half of its square.
        energies = torch.linalg.eigvalsh(gram).clamp(min=0).flatten().sort(descending=True).values
        keys = left(energies * (attention.scaling**2 / 2))
    return LatentCurves(left(s2) * (share / size), keys * (share / size))


def left(energies: torch.Tensor) -> torch.Tensor:
    """[n + 1]: what remains of energies, largest first, without the first 0, 1, ... of them."""
    return torch.cat((energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1))).cpu()


def output_energy(stream: Stream, layer: MQADecoderLayer, site: str) -> float:
    """E‖y‖² of an attention's output on held-out tokens."""
    total, count = 0.0, 0
    for rows in stream.batches(held_out=True):
        y = heads_output(stream, getattr(layer, site), *stream.at(layer, site, rows))[1][stream.valid(rows)]
        total, count = total + float(y.double().square().sum()), count + len(y)
    return total / count if total else 1.0
