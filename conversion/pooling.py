"""Merge several key/value heads into one without calibration.

`mean`, `first` and `random` are the methods that Ainslie et al. compare (GQA, arXiv 2305.13245, section 3.2 and
figure 4). A projection of G heads of width D has the shape [G·D, d] (its bias [G·D]); neighbouring heads share a new
one, as the query heads of a group are neighbours.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from mqa_hf.base.errors import ConversionError
from mqa_hf.configuration_mqa import MQAConfig

from .canonical import CanonicalConfig, heads_of, with_stacks
from .matching import Layer
from .operations import at_least_float32

Pool = Callable[[torch.Tensor, torch.Generator, float], torch.Tensor]


def mean(heads: torch.Tensor, generator: torch.Generator, std: float) -> torch.Tensor:
    """[groups, m, D, …] -> [groups, D, …]: the mean of the m heads of a group."""
    return heads.mean(dim=1)


def first(heads: torch.Tensor, generator: torch.Generator, std: float) -> torch.Tensor:
    """The first head of each group."""
    return heads[:, 0]


def random(heads: torch.Tensor, generator: torch.Generator, std: float) -> torch.Tensor:
    """Normal weights as in a new model, and zero biases: a baseline."""
    shape = (heads.shape[0], *heads.shape[2:])
    if heads.ndim == 3:
        return torch.zeros(shape)
    return torch.normal(0.0, std, shape, generator=generator)


METHODS: dict[str, Pool] = {"mean": mean, "first": first, "random": random}


def attention_of(name: str) -> str:
    """The attention that a canonical tensor belongs to: decoder, cross or encoder."""
    if ".cross_attn." in name:
        return "cross"
    return "encoder" if name.startswith("model.encoder.") else "decoder"


def choose_attentions(config: CanonicalConfig, attentions: Sequence[str] | None) -> list[str]:
    """The attentions to pool: the requested ones, or by default those that a decode step reads.

    Those are the decoder's own and, with an encoder, the cross-attention (arXiv 2305.13245, section 2.1; the encoder
    runs once, in parallel). The first paper pooled all three (arXiv 1911.02150, section 4).

    Raises:
        ConversionError: for an attention that the model does not have.
    """
    known = heads_of(config)
    if attentions is None:
        return [name for name in known if name != "encoder"]
    unknown = [name for name in attentions if name not in known]
    if unknown or not attentions:
        raise ConversionError(f"`attention` {','.join(attentions)}: this model's attentions are {', '.join(known)}")
    return list(dict.fromkeys(attentions))


def check_divides(heads: int, kv_heads: int, where: str = "") -> None:
    """Raise ConversionError if `kv_heads` does not divide the source's heads."""
    if kv_heads < 1 or heads % kv_heads:
        divisors = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise ConversionError(
            f"`kv_heads` must divide the source's {heads} key/value heads{where}, got {kv_heads}; use one of "
            f"{', '.join(divisors)}"
        )


def with_heads(config: CanonicalConfig, kv_heads: int, attentions: Sequence[str]) -> CanonicalConfig:
    """The same configuration with `kv_heads` key/value heads in the named attentions.

    Raises:
        ConversionError: if `kv_heads` does not divide the source's heads.
    """
    for name in attentions:
        check_divides(
            heads_of(config)[name], kv_heads, "" if isinstance(config, MQAConfig) else f" of {name} attention"
        )
    fields: dict[str, dict[str, int]] = {}
    for name in attentions:
        field = "cross_num_key_value_heads" if name == "cross" else "num_key_value_heads"
        fields.setdefault("encoder" if name == "encoder" else "decoder", {})[field] = kv_heads
    return with_stacks(config, **fields)


def relative(distance: float, size: float) -> float | None:
    """A norm relative to another; 0 if `size` is 0, `None` if one is not finite."""
    if not math.isfinite(distance) or not math.isfinite(size):
        return None
    return distance / size if size else 0.0


def pool_layer(
    tensors: dict[str, torch.Tensor],
    *,
    before: Mapping[str, int],
    after: Mapping[str, int],
    attentions: Sequence[str],
    method: str,
    generator: torch.Generator,
    std: float,
) -> dict[str, float | None]:
    """Pool the key and value projections of one canonical layer, in place.

    Args:
        tensors: the layer's tensors by canonical name; `k_proj` and `v_proj` are replaced (`weight`, `bias`, and
            `scale`, the weight of a norm over the keys).
        before, after: K/V heads of each attention, as [`heads_of`] gives them.
        attentions: the attentions to pool; others are unchanged.
        method: a key of `METHODS`.
        generator, std: for `random`.

    Returns:
        `key_error` and `value_error`, and with cross-attention `cross_key_error` and `cross_value_error`: the
        Frobenius norm of the difference between the new heads and the heads that they replace, relative to the norm of
        the latter; `None` if not finite.
    """
    errors: dict[str, float | None] = {}
    for name, tensor in tensors.items():
        projection = name.rsplit(".", 2)[-2]
        if projection not in ("k_proj", "v_proj", "k_norm"):
            continue
        attention = attention_of(name)
        source_heads, kv_heads = before[attention], after[attention]
        norm = projection == "k_norm"  # its weight has a row per head
        error = ("cross_" if attention == "cross" else "") + ("value" if projection == "v_proj" else "key") + "_error"
        errors.setdefault(error, 0.0)
        if attention not in attentions or (kv_heads == source_heads and method != "random"):
            continue
        width = tensor.shape[0] // source_heads
        heads = at_least_float32(tensor).unflatten(0, (kv_heads, source_heads // kv_heads, width))
        pooled = METHODS[method](heads, generator, std)
        if name.endswith(".weight") and not norm:
            distance, size = float((heads - pooled.unsqueeze(1)).norm()), float(heads.norm())
            errors[error] = relative(distance, size)
        elif method == "random" and name.endswith((".scale", "k_norm.weight")):  # of a norm over the keys
            pooled = torch.ones_like(pooled)
        elif method == "random" and norm:
            pooled = torch.zeros_like(pooled)
        tensors[name] = pooled.flatten(0, 1)
    return errors


class Pooling:
    """Makes the heads of methods without calibration, layer by layer.

    Args:
        config, pooled: canonical, with the source's heads and with the requested ones.
        attentions: the attentions to convert.
        method: a key of `METHODS`.
        seed: of `random`.
    """

    def __init__(
        self, config: CanonicalConfig, pooled: CanonicalConfig, attentions: Sequence[str], method: str, seed: int
    ):
        self.before, self.after, self.attentions, self.method = heads_of(config), heads_of(pooled), attentions, method
        self.std = config.initializer_range
        self.generator = torch.Generator().manual_seed(seed)

    def ahead(self, layer: Layer, tensors: dict[str, torch.Tensor]) -> None:
        """Nothing can be prepared."""

    def outside(self, tensors: dict[str, torch.Tensor]) -> None:
        """Ignore tensors outside the layers."""

    def convert(
        self, layer: Layer, tensors: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, float | None]]:
        """Convert the tensors of a layer; returns them and the errors of [`pool_layer`]."""
        tensors = dict(tensors)
        errors = pool_layer(
            tensors,
            before=self.before,
            after=self.after,
            attentions=self.attentions,
            method=self.method,
            generator=self.generator,
            std=self.std,
        )
        return tensors, errors
