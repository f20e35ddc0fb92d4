"""The new heads of one attention: fitted or pooled, their output projection refitted, and compared with the old ones.

B sequences, T tokens of each, H query heads, G old and K new key/value heads, d hidden size
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.initialization import no_init_weights

from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.layer_mqa import Attention, MQAAttention, MQADecoderLayer, make_attention

from . import fitting
from .moments import Seen, choose_queries, projected, sampled_weights, with_ones
from .normalised import query_maps
from .pooling import pool_layer
from .states import Stream, Tensors, old_heads
from .widths import rotated_pairs


@dataclass
class FittedHeads:
    """Tensors of an attention by name, the frequencies of its rotated pairs, the discarded energy, and the share of
    normalised keys that no linear map of the input gives (`None`: keys are not normalised)."""

    tensors: Tensors
    frequencies: list[int]
    discarded_key_energy: float
    discarded_value_energy: float
    unexplained_key_energy: float | None = None


def groups(attention: MQAAttention, new: int) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """For each new head: its old heads, its query heads, and the old head of each query head."""
    G, g = old_heads(attention), attention.num_key_value_groups
    m = G // new
    head_of = torch.arange(m, device=attention.k_proj.weight.device).repeat_interleave(g)
    for i in range(new):
        yield slice(i * m, (i + 1) * m), slice(i * m * g, (i + 1) * m * g), head_of


def augmented(linear: nn.Linear) -> torch.Tensor:
    """A projection with its bias as the last column."""
    bias = torch.zeros(linear.out_features, 1, device=linear.weight.device)
    bias = bias if linear.bias is None else linear.bias[:, None]
    return torch.cat((linear.weight, bias), dim=1).double()


def value_maps(attention: MQAAttention) -> torch.Tensor:
    """[G, Dv, d]: maps from the inputs of `Seen.mixed` to the values of the old heads; [G, Dv, d + 1] with a bias that
    does not fold."""
    weight = attention.v_proj.weight.double() if attention.config.folds_value_bias else augmented(attention.v_proj)
    return weight.unflatten(0, (-1, attention.v_head_dim))


def _shared_out(seen: Seen, R: int, pairs: int, choose: bool) -> torch.Tensor:
    """[J]: number of rotated components per frequency, chosen by energy or equal."""
    if not R:
        return torch.zeros(0, dtype=torch.long)
    if not choose:
        return torch.full((R // 2,), 2 * pairs // R)
    assert seen.spread is not None
    assert seen.energy is not None
    new, _, m, _ = seen.spread.shape
    energy = seen.energy.view(new, m, -1).transpose(1, 2)
    grams = [fitting.rotary_gram(f, p) for f, p in zip(seen.spread, energy)]
    spectrum = torch.stack([torch.linalg.eigvalsh(g) for g in grams]).sum(0).flip(-1).clamp(min=0)
    return fitting.choose_frequencies(spectrum, pairs)


def fit_heads(attention: MQAAttention, seen: Seen, width_k: int, width_v: int, choose: bool) -> FittedHeads:
    """Fit projections and biases of the new attention.

    Args:
        attention: the attention with all its heads.
        seen: its moments.
        width_k, width_v: widths of a new head.
        choose: whether to choose the frequencies of rotated components by energy instead of equally.
    """
    config = attention.config
    d, H = config.hidden_size, config.num_attention_heads
    G, new = old_heads(attention), seen.mixed.shape[0]
    D, Dv, m = attention.qk_head_dim, attention.v_head_dim, G // new
    R = config.rotary_dim if attention.rotary else 0
    pairs = rotated_pairs(width_k, R, D, m)
    w_q, w_k, energies = key_maps(attention, seen)
    w_v = value_maps(attention)
    w_o = attention.o_proj.weight.double().view(d, H, Dv).transpose(0, 1)
    counts = _shared_out(seen, R, pairs, choose)
    keys, queries, vals, outs = [], [], [], []
    discarded_k = discarded_v = 0.0
    for group, (heads, qs, head_of) in enumerate(groups(attention, new)):
        parts = []
        if R:
            assert seen.spread is not None
            assert seen.energy is not None
            spread, power = seen.spread[group], seen.energy[heads].T
            parts.append(fitting.rotary_keys(w_k[heads, :R], w_q[qs, :R], head_of, spread, power, counts))
        if R < D:
            rank = width_k - 2 * pairs
            plain = fitting.plain_keys(w_k[heads, R:], w_q[qs, R:], head_of, energies[qs, R:, R:], seen.keys, rank)
            parts.append(plain)
        keys.append(torch.cat([p.w_k for p in parts]))
        queries.append(torch.cat([p.w_q for p in parts], dim=1))
        fit_v = fitting.values(w_v[heads], w_o[qs], head_of, seen.mixed[group], width_v)
        vals.append(fit_v.w_v)
        outs.append(fit_v.w_o)
        discarded_k += max(p.discarded for p in parts) / new
        discarded_v += fit_v.discarded / new
    q, k, v = torch.cat(queries), torch.cat(keys), torch.cat(vals)
    fitted = {"k_proj.weight": k[:, :-1], "v_proj.weight": v[:, :d]}
    if not attention.config.folds_value_bias:
        fitted["v_proj.bias"] = v[:, d]
    fitted["o_proj.weight"] = torch.cat(outs).transpose(0, 1).flatten(1)  # [H, d, width] -> [d, H·width]
    fitted |= query_tensors(attention, seen, q)
    if attention.k_proj.bias is not None or seen.vectors is not None:
        fitted["k_proj.bias"] = k[:, -1]
    if attention.sinks is not None:
        fitted["sinks"] = attention.sinks
    first = config.first_frequency(attention.layer_idx) if R else 0
    frequencies = (first + torch.arange(len(counts)).repeat_interleave(counts.cpu())).tolist()
    unexplained = None if seen.vectors is None else seen.vectors.unexplained(w_k, seen.keys)
    return FittedHeads(fitted, frequencies, discarded_k, discarded_v, unexplained)


def query_tensors(attention: MQAAttention, seen: Seen, q: torch.Tensor) -> Tensors:
    """Tensors of the new queries, for the maps q [H, width, d + 1] from the input; normalised queries keep their
    projection, and q [H, width, D + 1] are maps from them."""
    if seen.vectors is None:
        weight, bias, beside = q[..., :-1].flatten(0, 1), q[..., -1].flatten(), {}
    else:
        weight, bias, beside = attention.q_proj.weight, attention.q_proj.bias, query_maps(seen.vectors, q[..., :-1])
    biased = {} if attention.q_proj.bias is None else {"q_proj.bias": bias}
    return {"q_proj.weight": weight, **biased, **beside}


def key_maps(attention: MQAAttention, seen: Seen) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maps to the queries and keys of the old heads, and moments of the queries.

    Returns:
        w_q [H, D, d + 1], w_k [G, D, d + 1] and E[q q'] [H, D, D]. Normalised keys are replaced by their regression on
        the input; w_q is then [H, D, D + 1], from the normalised queries.
    """
    H, G = attention.config.num_attention_heads, old_heads(attention)
    if seen.vectors is None:
        w_q = augmented(attention.q_proj).unflatten(0, (H, -1))
        w_k = augmented(attention.k_proj).unflatten(0, (G, -1))
        return w_q, w_k, fitting.query_moments(w_q, seen.queries)
    D = attention.qk_head_dim
    one = torch.eye(D, D + 1, dtype=torch.float64, device=seen.keys.device)
    return one.expand(H, D, D + 1), seen.vectors.regression(seen.keys[None]), seen.vectors.queries


def pooled_heads(
    attention: MQAAttention, prefix: str, name: str, after: Mapping[str, int], method: str, generator: torch.Generator
) -> FittedHeads:
    """Heads of a method without calibration; `prefix` of the attention's tensors, `name` as in `heads_of`."""
    state = {f"{prefix}{n}": t.cpu() for n, t in attention.state_dict().items() if "relative_bias" not in n}
    pool_layer(
        state,
        before={name: old_heads(attention)},
        after=after,
        attentions=[name],
        method=method,
        generator=generator,
        std=attention.config.initializer_range,
    )
    fitted = {n.removeprefix(prefix): t for n, t in state.items()}
    if attention.config.folds_value_bias:
        fitted.pop("v_proj.bias", None)
    return FittedHeads(fitted, [], 0.0, 0.0)


def folded_bias(attention: MQAAttention) -> torch.Tensor:
    """The output bias [d] with the value bias folded in, if it folds: as attention weights sum to 1."""
    output, value = attention.o_proj, attention.v_proj
    bias = torch.zeros(output.out_features, device=output.weight.device)
    bias = bias if output.bias is None else output.bias.clone()
    if value.bias is not None and attention.config.folds_value_bias:
        heads = value.bias.view(-1, attention.v_head_dim).repeat_interleave(attention.num_key_value_groups, dim=0)
        bias += output.weight @ heads.flatten()
    return bias


def new_attention(config: MQAConfig, number: int, fitted: Tensors, old: MQAAttention) -> Attention:
    """The new attention with the fitted projections; the old value bias is added to the output bias, if it folds."""
    device = old.k_proj.weight.device
    with no_init_weights(), device:
        new = make_attention(config, number, cross=old.cross).float().eval()
    state = dict(fitted)
    state |= {f"relative_bias.{n}": t for n, t in (old.relative_bias or nn.Identity()).state_dict().items()}
    if new.o_proj.bias is not None:
        state["o_proj.bias"] = folded_bias(old) + state.get("o_proj.bias", 0.0)
    new.load_state_dict(state)
    return new


def attended(
    stream: Stream, attention: Attention, h: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """The output of an attention [B, T, d]."""
    own = {"encoder_hidden_states": source} if attention.cross else stream.placing
    return attention(h, attention_mask=mask, **own)[0]


def heads_output(
    stream: Stream, attention: Attention, h: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """The outputs of an attention's heads side by side [B, T, H·Dv], before the output projection."""
    projection, attention.o_proj = attention.o_proj, nn.Identity()  # type: ignore[assignment]
    try:
        return attended(stream, attention, h, source, mask)
    finally:
        attention.o_proj = projection


def refit(stream: Stream, teacher: MQADecoderLayer, student: MQADecoderLayer, site: str) -> None:
    """Refit the student's output projection (and bias, if any) to the teacher's attention output, and keep the outputs
    of its heads in `Stream.known`."""
    old, new = getattr(teacher, site), getattr(student, site)
    projection = new.o_proj
    r, d = projection.in_features, projection.out_features
    zz = torch.zeros(r + 1, r + 1, dtype=torch.float64, device=stream.device)
    ez = torch.zeros(d, r + 1, dtype=torch.float64, device=stream.device)
    known = stream.keep(site, r)
    for rows in stream.rows(0, stream.count):
        at, kept = stream.at(student, site, rows), stream.valid(rows)
        made = heads_output(stream, new, *at)
        known[rows] = made
        if rows.start < stream.fitted_rows:
            kept = kept & (torch.arange(rows.start, rows.stop, device=kept.device) < stream.fitted_rows)[:, None]
            error = (attended(stream, old, *at) - projection(made))[kept]
            z = made[kept]
            zz += with_ones(z.mT @ z, z.sum(0, dtype=torch.float64), len(z))
            ez[:, :-1] += (error.mT @ z).double()
            ez[:, -1] += error.sum(0, dtype=torch.float64)
    n = zz[-1, -1]
    zz, ez = zz / n, ez / n
    mean_z, mean_error = zz[:-1, -1], ez[:, -1]
    zz, ez = zz[:-1, :-1], ez[:, :-1]
    if projection.bias is not None:  # which takes the means
        zz, ez = zz - torch.outer(mean_z, mean_z), ez - torch.outer(mean_error, mean_z)
    change = fitting.refit(zz, ez)
    projection.weight.data += change
    if projection.bias is not None:
        projection.bias.data += mean_error - change @ mean_z


def compare(
    stream: Stream, teacher: MQADecoderLayer, student: MQADecoderLayer, site: str, generator: torch.Generator
) -> dict[str, float]:
    """Relative error of an attention's output on the held-out tokens, and the mean divergence KL(teacher || student)
    of its weights in nats over heads and queries."""
    old, new = getattr(teacher, site), getattr(student, site)
    distance = size = divergence = 0.0
    count = 0
    for rows in stream.batches(held_out=True):
        h, source, mask = stream.at(student, site, rows)
        kept = stream.valid(rows)
        expected = attended(stream, old, h, source, mask)[kept]
        found = attended(stream, new, h, source, mask)[kept]
        distance += float((found - expected).double().square().sum())
        size += float(expected.double().square().sum())
        chosen = choose_queries(stream, h.shape[1], generator)
        p, q = (
            sampled_weights(a, *projected(stream, a, h, source, chosen), mask, chosen)[0]
            .transpose(1, 2)[kept[:, chosen]]
            .clamp(min=1e-30)
            for a in (old, new)
        )
        divergence += float((p * (p / q).log()).sum(-1).double().sum())
        count += p.shape[0] * p.shape[1]
    error = (distance / size) ** 0.5 if size else 0.0
    return {"attention_error": error, "attention_kl": divergence / max(count, 1)}
