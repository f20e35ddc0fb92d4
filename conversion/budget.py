"""The error of each width of an attention's heads, from which `widths.py` allocates a cache budget."""

import copy

import torch
from torch import nn

from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.layer_mqa import MQAAttention, MQADecoderLayer

from . import fitting
from .heads import attended, compare, fit_heads, groups, key_maps, new_attention, value_maps
from .moments import Seen, look
from .states import Stream, old_heads
from .widths import Curves, fold_value_bias, map_queries


def curves_of(stream: Stream, teacher: MQADecoderLayer, site: str, new: int, generator: torch.Generator) -> Curves:
    """The error that each width of one attention leaves.

    Args:
        stream: the tokens before the layer.
        teacher: the layer with all its heads.
        site: name of the attention's module.
        new: number of new key/value heads.
        generator: for sampling queries.
    """
    old: MQAAttention = getattr(teacher, site)
    m = old_heads(old) // new
    seen = look(stream, teacher, teacher, site, new, generator)
    D, Dv = old.qk_head_dim, old.v_head_dim
    keys, values = (left_out(old, seen, component, most) for component, most in (("keys", m * D), ("values", m * Dv)))
    costs = []
    for width_k, width_v in ((D, m * Dv), (m * D, Dv)):
        fit = fit_heads(old, seen, width_k, width_v, choose=True)
        config = _one_attention(stream.config, old, new, width_k, width_v, fit.frequencies)
        student = copy.copy(teacher)
        student._modules = dict(teacher._modules)
        setattr(student, site, new_attention(config, old.layer_idx, fit.tensors, old))
        error = compare(stream, teacher, student, site, generator)["attention_error"]
        costs.append(error**2)
    share = share_of_stream(stream, teacher, site)
    return Curves(keys, values, D, Dv, costs[0] * share, costs[1] * share)


def left_out(attention: MQAAttention, seen: Seen, what: str, most: int) -> torch.Tensor:
    """[most + 1]: the share of energy that 0, 1, ... components leave out, over all new heads."""
    spectra: list[torch.Tensor] = []
    config, new = attention.config, seen.mixed.shape[0]
    H, d = config.num_attention_heads, config.hidden_size
    R = config.rotary_dim if attention.rotary else 0
    _, w_k, moments = key_maps(attention, seen)
    for group, (heads, qs, head_of) in enumerate(groups(attention, new)):
        if what == "values":
            w_v = value_maps(attention)[heads]
            w_o = attention.o_proj.weight.double().view(d, H, -1).transpose(0, 1)[qs]
            spectra.append(fitting.spectrum(fitting.weighted_values(w_v, w_o, head_of), seen.mixed[group]))
        elif R:
            assert seen.spread is not None
            assert seen.energy is not None
            gram = fitting.rotary_gram(seen.spread[group], seen.energy[heads].T)
            energies = torch.linalg.eigvalsh(gram).clamp(min=0)
            spectra.append(energies.flatten().repeat_interleave(2) / 2)
        else:  # for partly rotated heads, only the rotated part counts
            stacked = fitting.weighted_keys(w_k[heads, :, :-1], head_of, moments[qs])
            spectra.append(fitting.spectrum(stacked, fitting.covariance(seen.keys)))
    spectrum = sum(s.sort(descending=True).values for s in spectra)
    assert isinstance(spectrum, torch.Tensor)
    spectrum = nn.functional.pad(spectrum, (0, max(0, most - len(spectrum))))[:most]
    total = spectrum.sum().clamp(min=1e-300)
    return torch.cat((torch.ones(1), (1 - spectrum.cumsum(0) / total).clamp(min=0).cpu().float()))


def _one_attention(
    config: MQAConfig, old: MQAAttention, new: int, key: int, value: int, pairs: list[int]
) -> MQAConfig:
    """The configuration of an attention with `new` heads of these widths and frequencies."""
    config = copy.copy(config)
    if old.cross:
        config.cross_num_key_value_heads, config.cross_qk_head_dim, config.cross_v_head_dim = new, key, value
    else:
        config.num_key_value_heads, config.qk_head_dim, config.v_head_dim = new, key, value
        if old.rotary:
            config.rope_frequencies = [pairs] * config.num_hidden_layers
        map_queries(config)
    fold_value_bias(config)
    return config


def share_of_stream(stream: Stream, layer: MQADecoderLayer, site: str) -> float:
    """The size of an attention's output relative to the residual stream after it, on held-out tokens: how much a
    relative error of the output matters to later layers."""
    return output_sizes(stream, layer, site)[0]


def output_sizes(stream: Stream, layer: MQADecoderLayer, site: str) -> tuple[float, float]:
    """The share of [`share_of_stream`], and E‖y‖² of the output y on the same tokens; 0 without tokens or output."""
    output = ended = 0.0
    count = 0
    for rows in stream.batches(held_out=True):
        kept = stream.valid(rows)
        y = attended(stream, getattr(layer, site), *stream.at(layer, site, rows))[kept]
        output += float(y.double().square().sum())
        ended += float((stream.states[rows].to(stream.device)[kept] + y).double().square().sum())
        count += len(y)
    return (output / ended) ** 0.5 if ended else 0.0, output / count if count else 0.0
