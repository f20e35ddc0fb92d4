"""How one tensor of a source checkpoint becomes canonical tensors, and back.

An operation is a small frozen class with two methods, inverse to each other:

    to_canonical(tensor, config)    one source tensor -> a tuple of canonical tensors
    from_canonical(tensors, config) the tuple -> the source tensor (for `--target native`)

In that tuple `None` stands for a bias that the canonical model left out; it is zero.

`config` is the canonical configuration of the side that is read or written: H = `num_attention_heads` query heads,
G = `num_key_value_heads`, D = `head_dim`, d = `hidden_size`. The methods only move rows, so they also run on `meta`
tensors, which is how shapes are checked before any weight is read.
"""

from dataclasses import dataclass

import torch

from mqa_hf.configuration_mqa import MQAConfig

Tensors = tuple[torch.Tensor, ...]
Given = tuple[torch.Tensor | None, ...]


def _filled(tensors: Given, rows: tuple[int, ...]) -> list[torch.Tensor]:
    like = next(t for t in tensors if t is not None)
    return [like.new_zeros(n, *like.shape[1:]) if t is None else t for t, n in zip(tensors, rows)]


def _only(tensors: Given) -> torch.Tensor:
    (tensor,) = tensors
    assert tensor is not None
    return tensor


@dataclass(frozen=True)
class Copy:
    """Any shape, as it is."""

    def to_canonical(self, tensor: torch.Tensor, config: MQAConfig) -> Tensors:
        return (tensor,)

    def from_canonical(self, tensors: Given, config: MQAConfig) -> torch.Tensor:
        tensor = _only(tensors)
        return tensor


@dataclass(frozen=True)
class Transpose:
    """[in, out] of transformers' `Conv1D` <-> [out, in] of `nn.Linear`; a bias stays as it is."""

    def to_canonical(self, tensor: torch.Tensor, config: MQAConfig) -> Tensors:
        return (tensor.t(),)

    def from_canonical(self, tensors: Given, config: MQAConfig) -> torch.Tensor:
        tensor = _only(tensors)
        return tensor.t()


@dataclass(frozen=True)
class Flatten:
    """[1, n] <-> [n]."""

    def to_canonical(self, tensor: torch.Tensor, config: MQAConfig) -> Tensors:
        return (tensor.flatten(),)

    def from_canonical(self, tensors: Given, config: MQAConfig) -> torch.Tensor:
        return _only(tensors).unsqueeze(0)


@dataclass(frozen=True)
class DropRows:
    """[rows + n, d] -> [rows, d]: the first n rows are never looked up (OPT starts its positions at 2)."""

    rows: int

    def to_canonical(self, tensor: torch.Tensor, config: MQAConfig) -> Tensors:
        return (tensor[self.rows :],)

    def from_canonical(self, tensors: Given, config: MQAConfig) -> torch.Tensor:
        tensor = _only(tensors)
        return torch.cat(_filled((None, tensor), (self.rows, tensor.shape[0])))


@dataclass(frozen=True)
class SplitStacked:
    """[(H + G + G)·D, …]: all query rows, then all key rows, then all value rows; `transposed` for `Conv1D`."""

    transposed: bool = False

    def to_canonical(self, tensor: torch.Tensor, config: MQAConfig) -> Tensors:
        tensor = tensor.t() if self.transposed else tensor
        return tuple(tensor.split(self._rows(config)))

    def from_canonical(self, tensors: Given, config: MQAConfig) -> torch.Tensor:
        stacked = torch.cat(_filled(tensors, self._rows(config)))
        return stacked.t() if self.transposed else stacked

    @staticmethod
    def _rows(config: MQAConfig) -> tuple[int, int, int]:
        H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        return H * D, G * D, G * D


@dataclass(frozen=True)
class SplitPerHead:
    """[H·3·D, …]: for each head its query, key and value rows (GPT-NeoX)."""

    def to_canonical(self, tensor: torch.Tensor, config: MQAConfig) -> Tensors:
        per_head = tensor.unflatten(0, (config.num_attention_heads, 3, config.head_dim))
        return tuple(per_head[:, i].flatten(0, 1) for i in range(3))

    def from_canonical(self, tensors: Given, config: MQAConfig) -> torch.Tensor:
        shape = (config.num_attention_heads, config.head_dim)
        filled = _filled(tensors, (shape[0] * shape[1],) * 3)
        return torch.stack([t.unflatten(0, shape) for t in filled], dim=1).flatten(0, 2)


@dataclass(frozen=True)
class SplitBigCode:
    """GPT-BigCode's fused rows: stacked with one shared head, per head with as many as query heads."""

    def _operation(self, config: MQAConfig) -> SplitStacked | SplitPerHead:
        return SplitStacked() if config.num_key_value_heads == 1 else SplitPerHead()

    def to_canonical(self, tensor: torch.Tensor, config: MQAConfig) -> Tensors:
        return self._operation(config).to_canonical(tensor, config)

    def from_canonical(self, tensors: Given, config: MQAConfig) -> torch.Tensor:
        return self._operation(config).from_canonical(tensors, config)


@dataclass(frozen=True)
class DeinterleaveRotary:
    """[heads·D, …]: rotary pairs in neighbouring rows (2j, 2j+1) <-> in rows j and j + R/2, R rotated rows a head.

    Queries and keys are permuted alike, so their products stay the same.
    """

    def to_canonical(self, tensor: torch.Tensor, config: MQAConfig) -> Tensors:
        return (self._take(tensor, self._order(config), config),)

    def from_canonical(self, tensors: Given, config: MQAConfig) -> torch.Tensor:
        tensor = _only(tensors)
        return self._take(tensor, self._order(config).argsort(), config)

    @staticmethod
    def _order(config: MQAConfig) -> torch.Tensor:
        D = config.head_dim
        R = int(D * config.rope_parameters.get("partial_rotary_factor", 1.0))
        return torch.cat([torch.arange(0, R, 2), torch.arange(1, R, 2), torch.arange(R, D)])

    @staticmethod
    def _take(tensor: torch.Tensor, order: torch.Tensor, config: MQAConfig) -> torch.Tensor:
        heads = tensor.unflatten(0, (-1, config.head_dim))
        return heads[:, order.to(tensor.device)].flatten(0, 1)


Operation = Copy | Transpose | Flatten | DropRows | SplitStacked | SplitPerHead | SplitBigCode | DeinterleaveRotary
