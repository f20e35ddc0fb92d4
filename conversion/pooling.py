"""Making one key/value head out of several without looking at data.

`mean`, `first` and `random` are the three that Ainslie et al. compare (GQA, arXiv 2305.13245, section 3.2 and
figure 4). A projection of G heads of width D has the shape [G·D, d] (its bias [G·D]); neighbouring heads share a new
one, as the query heads of a group are neighbours.
"""

import math
from collections.abc import Callable

import torch

from .errors import ConversionError

Pool = Callable[[torch.Tensor, torch.Generator, float], torch.Tensor]


def mean(heads: torch.Tensor, generator: torch.Generator, std: float) -> torch.Tensor:
    """[groups, m, D, …] -> [groups, D, …]: the mean of the m heads of a group."""
    return heads.mean(dim=1)


def first(heads: torch.Tensor, generator: torch.Generator, std: float) -> torch.Tensor:
    """The first head of each group."""
    return heads[:, 0]


def random(heads: torch.Tensor, generator: torch.Generator, std: float) -> torch.Tensor:
    """Normal weights as a new model would have, zero biases: the floor to compare with."""
    shape = (heads.shape[0], *heads.shape[2:])
    if heads.ndim == 3:
        return torch.zeros(shape)
    return torch.normal(0.0, std, shape, generator=generator)


METHODS: dict[str, Pool] = {"mean": mean, "first": first, "random": random}


def check_heads(num_attention_heads: int, source_heads: int, kv_heads: int) -> None:
    """Raises ConversionError where `kv_heads` does not divide what the source has."""
    if kv_heads < 1 or source_heads % kv_heads:
        divisors = [str(n) for n in range(1, source_heads + 1) if source_heads % n == 0]
        raise ConversionError(
            f"--kv-heads {kv_heads} does not divide the source's {source_heads} key/value heads "
            f"({num_attention_heads} query heads); possible: {', '.join(divisors)}"
        )


def pool_layer(
    tensors: dict[str, torch.Tensor],
    *,
    source_heads: int,
    kv_heads: int,
    method: str,
    generator: torch.Generator,
    std: float,
) -> dict[str, float]:
    """Pool the key and value projections of one canonical layer, in place.

    Args:
        tensors: the layer's tensors by canonical name; `k_proj` and `v_proj` are replaced (`weight`, `bias`, and
            `scale`, the weight of a norm over the keys).
        source_heads, kv_heads: K/V heads before and after.
        method: a key of `METHODS`.
        generator, std: for `random`.

    Returns:
        `key_error` and `value_error`: the Frobenius norm of what the new heads differ by from the heads they stand
        for, relative to the norm of those heads.
    """
    errors = {"key_error": 0.0, "value_error": 0.0}
    for name, tensor in tensors.items():
        projection = name.rsplit(".", 2)[-2]
        if projection not in ("k_proj", "v_proj") or (kv_heads == source_heads and method != "random"):
            continue
        width = tensor.shape[0] // source_heads
        heads = tensor.float().unflatten(0, (kv_heads, source_heads // kv_heads, width))
        pooled = METHODS[method](heads, generator, std)
        if name.endswith(".weight"):
            distance = (heads - pooled.unsqueeze(1)).norm() / heads.norm()
            errors["key_error" if projection == "k_proj" else "value_error"] = (
                float(distance) if math.isfinite(distance) else 0.0
            )
        elif method == "random" and name.endswith(".scale"):  # of a norm over the keys
            pooled = torch.ones_like(pooled)
        tensors[name] = pooled.flatten(0, 1).to(tensor.dtype)
    return errors
