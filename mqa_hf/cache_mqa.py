"""The cache of the fast decoding loop: buffers that are written in place.

    B rows, G key/value heads, S positions that there is room for, D query/key head width, Dv value head width

transformers' dynamic cache copies everything it holds at each step, and its static cache is read whole whatever is in
use. This one keeps keys [B, G, S, D] and values [B, G, S, Dv] with a count of the positions in use, and grows.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_mqa import MQAConfig, of_layer

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0


def to_float8(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., D] -> the same in float8 and the scale of each vector [...], by which it is to be multiplied."""
    scale = states.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / FLOAT8_MAX
    return (states / scale).to(FLOAT8), scale.squeeze(-1)


def from_float8(states: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What [`to_float8`] was given, rounded."""
    return (states.float() * scale[..., None]).to(dtype)


class DecodeLayer(CacheLayerMixin):
    """Keys and values of one layer in buffers that are written in place.

    Rows of `update` may be fewer than those of the buffers: each is then written to `copies` rows in sequence, or to
    the first of them only (`copy` false).
    """

    is_sliding = False

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device, copy: bool):
        super().__init__()
        rows, heads, capacity, width, value_width = shape
        self.copy = copy
        self.length = 0
        # Zeros, because a mask hides what is not in use only as long as it is a number.
        self.keys: torch.Tensor = torch.zeros(rows, heads, capacity, width, dtype=dtype, device=device)
        self.values: torch.Tensor = torch.zeros(rows, heads, capacity, value_width, dtype=dtype, device=device)
        scales = (rows, heads, capacity) if dtype == FLOAT8 else (0,)
        self.key_scales = torch.zeros(scales, dtype=torch.float32, device=device)
        self.value_scales = torch.zeros(scales, dtype=torch.float32, device=device)
        self.is_initialized = True

    def buffers(self) -> dict[str, torch.Tensor]:
        names = ("keys", "values", *(("key_scales", "value_scales") if self.keys.dtype == FLOAT8 else ()))
        return {name: getattr(self, name) for name in names}

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do: the sizes are known from the configuration."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, T = key_states.shape[0], key_states.shape[2]
        first, end = self.length, self.length + T
        if end > self.capacity:
            self.grow(max(end, 2 * self.capacity))
        if self.keys.dtype == FLOAT8:
            given = {}
            for name, states in (("key", key_states), ("value", value_states)):
                given[name + "s"], given[name + "_scales"] = to_float8(states)
        else:
            given = {"keys": key_states, "values": value_states}
        every = self.keys.shape[0] // rows
        for name, buffer in self.buffers().items():
            for copy in range(every if self.copy else 1):
                buffer[copy::every, :, first:end].copy_(given[name])
        self.length = end
        if first == 0:
            return key_states, value_states
        return self.read(self.keys, self.key_scales, every, key_states.dtype), self.read(
            self.values, self.value_scales, every, key_states.dtype
        )

    def read(self, states: torch.Tensor, scales: torch.Tensor, every: int, dtype: torch.dtype) -> torch.Tensor:
        """What is held of every so-manieth row, [rows, G, length, D]."""
        states = states[::every, :, : self.length]
        if states.dtype == FLOAT8:
            return from_float8(states, scales[::every, :, : self.length], dtype)
        return states

    def grow(self, capacity: int) -> None:
        for name, old in self.buffers().items():
            new = old.new_zeros(*old.shape[:2], capacity, *old.shape[3:])
            new[:, :, : self.length].copy_(old[:, :, : self.length])
            setattr(self, name, new)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for name, buffer in self.buffers().items():
            setattr(self, name, buffer.index_select(0, beam_idx.to(buffer.device)))

    def reset(self) -> None:
        self.length = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class DecodeCache(Cache):
    """A cache for `generate(past_key_values=...)` that decoding extends in place, without a copy per step.

    It can be given again with a longer text, whose beginning it then holds already.

    Args:
        config: of the decoder.
        rows: rows of the batch.
        capacity: positions to allocate; more are allocated when they are needed.
        dtype, device: of the model; `torch.float8_e4m3fn` stores a scale for each key and value beside.
        cross: for the keys and values of an encoder's output.
        copy: whether a prompt that stands for several rows is written to each of them.
    """

    def __init__(
        self,
        config: MQAConfig,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
        cross: bool = False,
        copy: bool = True,
    ):
        names = ("cross_qk_head_dim", "cross_v_head_dim") if cross else ("qk_head_dim", "v_head_dim")
        heads = config.cross_num_key_value_heads if cross else config.num_key_value_heads
        layers: list[Any] = []  # transformers names other types of layers here
        for i in range(config.num_hidden_layers):
            widths = (of_layer(getattr(config, name), i) for name in names)
            layers.append(DecodeLayer((rows, heads, capacity, *widths), dtype, torch.device(device), copy))
        super().__init__(layers=layers)

    @property
    def decode_layers(self) -> list[DecodeLayer]:
        """`layers` by their type, which transformers does not know."""
        layers: Any = self.layers
        return layers

    @property
    def rows(self) -> int:
        return self.decode_layers[0].keys.shape[0]

    @property
    def capacity(self) -> int:
        return self.decode_layers[0].capacity

    @property
    def dtype(self) -> torch.dtype:
        return self.decode_layers[0].keys.dtype

    def set_length(self, length: int) -> None:
        """Say how many positions are in use."""
        for layer in self.decode_layers:
            layer.length = length

    def grow(self, capacity: int) -> None:
        for layer in self.decode_layers:
            layer.grow(capacity)
