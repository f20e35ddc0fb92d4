"""How one tensor of a source checkpoint becomes canonical tensors, and back.

An operation is a small frozen class with two methods, inverse to each other:

    to_canonical(tensor, config)    one source tensor -> a tuple of canonical tensors
    from_canonical(tensors, config) the tuple -> the source tensor (for `--target native`)

In that tuple `None` stands for a bias that the canonical model left out; it is zero.

`config` is the canonical configuration of the side that is read or written: H = `num_attention_heads` query heads,
G = `num_key_value_heads`, D = `head_dim`, d = `hidden_size`, f = `intermediate_size`. The methods look at no values,
so they also run on `meta` tensors, which is how shapes are checked before any weight is read.
"""

from dataclasses import dataclass

import torch

from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.modeling_mqa import sinusoids

Tensors = tuple[torch.Tensor, ...]
Given = tuple[torch.Tensor | None, ...]


def _filled(tensors: Given, rows: tuple[int, ...]) -> list[torch.Tensor]:
    like = next(t for t in tensors if t is not None)
    return [like.new_zeros(n, *like.shape[1:]) if t is None else t for t, n in zip(tensors, rows)]


def _qkv_rows(config: MQAConfig) -> tuple[int, int, int]:
    H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return H * D, G * D, G * D


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 or wider, so that results are rounded only once, when they are written."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


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
class SinusoidTable:
    """[rows, d]: sinusoidal positions as a table, left out if it equals the formula ([`is_formula`]).

    Attributes:
        padded: whether its first `position_offset` rows are those of padding, which has no position (FSMT).
    """

    padded: bool = False

    def to_canonical(self, tensor: torch.Tensor, config: MQAConfig) -> Tensors:
        return (tensor,)

    def as_learned(self, config: MQAConfig) -> "DropRows":
        """The operation that makes a table of learned positions of it."""
        return DropRows(config.position_offset if self.padded else 0)

    def is_formula(self, tensor: torch.Tensor, config: MQAConfig) -> bool:
        """Whether a table equals the paper's formula up to 1e-6; a table in 16 bits does not, as it is rounded."""
        (tensor,) = self.as_learned(config).to_canonical(tensor, config)
        expected = sinusoids(torch.arange(len(tensor))[None].double(), config)[0]
        return bool(((tensor.double() - expected).abs() <= 1e-6).all())

    def from_canonical(self, tensors: Given, config: MQAConfig) -> torch.Tensor:
        raise NotImplementedError("no class of transformers stores a table of sinusoids")


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
class AddOne:
    """[d]: a norm that multiplies by 1 + weight (Gemma, Nemotron) <-> one that multiplies by its weight."""

    def to_canonical(self, tensor: torch.Tensor, config: MQAConfig) -> Tensors:
        return (at_least_float32(tensor) + 1,)

    def from_canonical(self, tensors: Given, config: MQAConfig) -> torch.Tensor:
        return at_least_float32(_only(tensors)) - 1


@dataclass(frozen=True)
class SplitGateUp:
    """[2·f, …]: all gate rows, then all up rows (Phi-3, GLM)."""

    def to_canonical(self, tensor: torch.Tensor, config: MQAConfig) -> Tensors:
        return tuple(tensor.chunk(2))

    def from_canonical(self, tensors: Given, config: MQAConfig) -> torch.Tensor:
        return torch.cat(_filled(tensors, (config.intermediate_size,) * 2))


@dataclass(frozen=True)
class ExpertColumns:
    """Experts stored for products from the left <-> as [`MQAExperts`] has them.

    Attributes:
        transposed: whether a tensor is [E, in, out] instead of [E, out, in]; a bias [E, out] is not.
        interleaved: whether gates and inputs are in neighbouring outputs (gpt-oss), instead of gates first.
    """

    transposed: bool = True
    interleaved: bool = False

    def to_canonical(self, tensor: torch.Tensor, config: MQAConfig) -> Tensors:
        rows = tensor.transpose(1, 2) if self.transposed else tensor
        return (rows.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2) if self.interleaved else rows.contiguous(),)

    def from_canonical(self, tensors: Given, config: MQAConfig) -> torch.Tensor:
        raise NotImplementedError("models with experts are written tensor by tensor in their own class")


@dataclass(frozen=True)
class ExpertRows:
    """DBRX's experts below each other: [1, 2·E·f, d], gates of all experts, then inputs, to [E, 2·f, d]; `outputs`
    [E·f, d] to [E, d, f]."""

    outputs: bool = False

    def to_canonical(self, tensor: torch.Tensor, config: MQAConfig) -> Tensors:
        E, d = config.num_experts, tensor.shape[-1]
        assert E is not None
        if self.outputs:
            return (tensor.view(E, -1, d).transpose(1, 2).contiguous(),)
        return (tensor.view(2, E, -1, d).transpose(0, 1).flatten(1, 2),)

    def from_canonical(self, tensors: Given, config: MQAConfig) -> torch.Tensor:
        raise NotImplementedError("models with experts are written tensor by tensor in their own class")


@dataclass(frozen=True)
class SplitStacked:
    """[(H + G + G)·D, …]: all query rows, then all key rows, then all value rows; `transposed` for `Conv1D`."""

    transposed: bool = False

    def to_canonical(self, tensor: torch.Tensor, config: MQAConfig) -> Tensors:
        tensor = tensor.t() if self.transposed else tensor
        return tuple(tensor.split(_qkv_rows(config)))

    def from_canonical(self, tensors: Given, config: MQAConfig) -> torch.Tensor:
        stacked = torch.cat(_filled(tensors, _qkv_rows(config)))
        return stacked.t() if self.transposed else stacked


@dataclass(frozen=True)
class SplitGrouped:
    """[G·(H/G + 2)·D, …]: for each key/value head the rows of its query heads, its key and its value.

    With G = H, these are the query, key and value of each head (GPT-NeoX, BLOOM); with G = 1, all queries, then one
    key and one value (GPT-BigCode, Falcon-7B). Falcon-40B is in between.
    """

    def to_canonical(self, tensor: torch.Tensor, config: MQAConfig) -> Tensors:
        H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        groups = tensor.unflatten(0, (G, H // G + 2, D))
        return groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)

    def from_canonical(self, tensors: Given, config: MQAConfig) -> torch.Tensor:
        shape = (config.num_key_value_heads, -1, config.head_dim)
        return torch.cat([t.unflatten(0, shape) for t in _filled(tensors, _qkv_rows(config))], dim=1).flatten(0, 2)


@dataclass(frozen=True)
class DeinterleaveRotary:
    """[heads·D, …]: rotary pairs in neighbouring rows (2j, 2j+1) <-> in rows j and j + R/2, of R rotated rows.

    Queries and keys are permuted alike, so their products stay the same.
    """

    def to_canonical(self, tensor: torch.Tensor, config: MQAConfig) -> Tensors:
        return (self._take(tensor, self._order(config), config),)

    def from_canonical(self, tensors: Given, config: MQAConfig) -> torch.Tensor:
        tensor = _only(tensors)
        return self._take(tensor, self._order(config).argsort(), config)

    @staticmethod
    def _order(config: MQAConfig) -> torch.Tensor:
        D, R = config.head_dim, config.rotary_dim
        return torch.cat([torch.arange(0, R, 2), torch.arange(1, R, 2), torch.arange(R, D)])

    @staticmethod
    def _take(tensor: torch.Tensor, order: torch.Tensor, config: MQAConfig) -> torch.Tensor:
        heads = tensor.unflatten(0, (-1, config.head_dim))
        return heads[:, order.to(tensor.device)].flatten(0, 1)


@dataclass(frozen=True)
class SplitCodeGen:
    """[3·H·D, …]: four blocks, each of the query, value and key rows of H/4 heads; rotary pairs in neighbouring rows.

    CodeGen was trained on four cores, each of which held one block.
    """

    def to_canonical(self, tensor: torch.Tensor, config: MQAConfig) -> Tensors:
        query, value, key = tensor.unflatten(0, (4, 3, -1)).transpose(0, 1).flatten(1, 2)
        rotary = DeinterleaveRotary()
        return *rotary.to_canonical(query, config), *rotary.to_canonical(key, config), value

    def from_canonical(self, tensors: Given, config: MQAConfig) -> torch.Tensor:
        query, key, value = _filled(tensors, _qkv_rows(config))
        rotary = DeinterleaveRotary()
        parts = rotary.from_canonical((query,), config), value, rotary.from_canonical((key,), config)
        return torch.stack(parts).unflatten(1, (4, -1)).transpose(0, 1).flatten(0, 2)


@dataclass(frozen=True)
class HeadNormWeights:
    """The weight or bias of a norm of queries or keys <-> [heads, D], a row for each head.

    Attributes:
        keys: whether the norm is that of keys.
        shared: whether the source has one row [D] for all heads; otherwise [heads·D] or [heads, D].
        add_one: whether the norm multiplies by 1 + weight.
        interleaved: whether rotary pairs are neighbours, as in [`DeinterleaveRotary`].
    """

    keys: bool
    shared: bool = True
    add_one: bool = False
    interleaved: bool = False

    def to_canonical(self, tensor: torch.Tensor, config: MQAConfig) -> Tensors:
        heads = config.num_key_value_heads if self.keys else config.num_attention_heads
        rows = tensor.expand(heads, -1) if self.shared else tensor.reshape(heads, -1)
        if self.interleaved:
            (flat,) = DeinterleaveRotary().to_canonical(rows.reshape(-1), config)
            rows = flat.unflatten(0, (heads, -1))
        return (at_least_float32(rows) + 1 if self.add_one else rows.contiguous(),)

    def from_canonical(self, tensors: Given, config: MQAConfig) -> torch.Tensor:
        rows = _only(tensors)
        if self.add_one:
            rows = at_least_float32(rows) - 1
        if self.interleaved:
            rows = DeinterleaveRotary().from_canonical((rows.flatten(),), config).unflatten(0, (len(rows), -1))
        return rows[0] if self.shared else rows if self.interleaved else rows.flatten()


@dataclass(frozen=True)
class SwapHalves:
    """[heads·D, …]: the halves of each head swapped, for rotations in the other direction (nanochat)."""

    def to_canonical(self, tensor: torch.Tensor, config: MQAConfig) -> Tensors:
        first, second = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).unbind(1)
        return (torch.stack((second, first), 1).flatten(0, 2),)

    def from_canonical(self, tensors: Given, config: MQAConfig) -> torch.Tensor:
        return self.to_canonical(_only(tensors), config)[0]


Operation = (
    Copy
    | Transpose
    | Flatten
    | SinusoidTable
    | DropRows
    | AddOne
    | SplitGateUp
    | ExpertColumns
    | ExpertRows
    | SplitStacked
    | SplitGrouped
    | SplitCodeGen
    | DeinterleaveRotary
    | HeadNormWeights
    | SwapHalves
)
