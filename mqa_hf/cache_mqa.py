"""The cache of the fast decoding loop: buffers that are written in place.

    B rows, G key/value heads, S positions that there is room for, D query/key head width, Dv value head width,
    r latent width, W rebuilt components of keys

transformers' dynamic cache copies everything it holds at each step, and its static cache is read whole whatever is in
use. This one keeps keys [B, G, S, D] and values [B, G, S, Dv] with a count of the positions in use, and grows. Of
models with latents it keeps these, [B, 1, S, r], alone or with the keys that were rebuilt from them.
"""

from abc import abstractmethod
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_mqa import MQAConfig, of_layer
from .packing_mqa import pack_latent, unpack_latent

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
KEYS = ("rebuilt", "expanded")  # the ways to have the keys of latents


def to_float8(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., D] -> the same in float8 and the scale of each vector [...], by which it is to be multiplied."""
    scale = states.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / FLOAT8_MAX
    return (states / scale).to(FLOAT8), scale.squeeze(-1)


def from_float8(states: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What [`to_float8`] was given, rounded."""
    return (states.float() * scale[..., None]).to(dtype)


class DecodeLayer(CacheLayerMixin):
    """What one layer keeps, in buffers [rows, G, S, ...] that are written in place.

    Rows that are written may be fewer than those of the buffers: each is then written to `copies` rows in sequence, or
    to the first of them only (`copy` false).
    """

    is_sliding = False

    def __init__(self, copy: bool):
        super().__init__()
        self.copy = copy
        self.length = 0
        self.is_initialized = True

    @abstractmethod
    def buffers(self) -> dict[str, torch.Tensor]:
        """By the names of the attributes that hold them."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the numbers that are kept, or of the scales of those that are packed."""

    @property
    def shape(self) -> torch.Size:
        return next(iter(self.buffers().values())).shape

    @property
    def capacity(self) -> int:
        return self.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers().values())

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do: the sizes are known from the configuration."""

    def extend(self, new: dict[str, torch.Tensor]) -> int:
        """Write what [B, G, T, ...] comes next to the buffers of the same names.

        Returns:
            How many rows of the buffers each of the B rows has.
        """
        rows, _, T = next(iter(new.values())).shape[:3]
        first, end = self.length, self.length + T
        if end > self.capacity:
            self.grow(max(end, 2 * self.capacity))
        every = self.shape[0] // rows
        for name, states in new.items():
            for copy in range(every if self.copy else 1):
                getattr(self, name)[copy::every, :, first:end].copy_(states)
        self.length = end
        return every

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


class KeyValueLayer(DecodeLayer):
    """Keys [rows, G, S, D] and values [rows, G, S, Dv], in float8 with a scale of each."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device, copy: bool):
        super().__init__(copy)
        rows, heads, capacity, width, value_width = shape
        # Zeros, because a mask hides what is not in use only as long as it is a number.
        self.keys = torch.zeros(rows, heads, capacity, width, dtype=dtype, device=device)
        self.values = torch.zeros(rows, heads, capacity, value_width, dtype=dtype, device=device)
        scales = (rows, heads, capacity) if dtype == FLOAT8 else (0,)
        self.key_scales = torch.zeros(scales, dtype=torch.float32, device=device)
        self.value_scales = torch.zeros(scales, dtype=torch.float32, device=device)

    def buffers(self) -> dict[str, torch.Tensor]:
        names = ("keys", "values", *(("key_scales", "value_scales") if self.keys.dtype == FLOAT8 else ()))
        return {name: getattr(self, name) for name in names}

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.length
        if self.keys.dtype == FLOAT8:
            given = {}
            for name, states in (("key", key_states), ("value", value_states)):
                given[name + "s"], given[name + "_scales"] = to_float8(states)
        else:
            given = {"keys": key_states, "values": value_states}
        every = self.extend(given)
        return (key_states, value_states) if first == 0 else self.contents(key_states.dtype, every)

    def contents(self, dtype: torch.dtype, every: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in use [rows, G, length, ...] of every so-manieth row."""
        return (
            self.read(self.keys, self.key_scales, every, dtype),
            self.read(self.values, self.value_scales, every, dtype),
        )

    def read(self, states: torch.Tensor, scales: torch.Tensor, every: int, dtype: torch.dtype) -> torch.Tensor:
        states = states[::every, :, : self.length]
        if states.dtype == FLOAT8:
            return from_float8(states, scales[::every, :, : self.length], dtype)
        return states


class ExpandedLayer(KeyValueLayer):
    """Rotated keys [rows, 1, S, W] that were rebuilt from latents and the latents [rows, 1, S, r], side by side in
    `keys`: so they are the keys of heads of which a part is not rotated."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, copy: bool):
        rows, capacity, width, latent = shape
        super().__init__((rows, 1, capacity, width + latent, 0), dtype, device, copy)
        self.widths = width, latent

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        super().update(torch.cat((key_states, value_states), dim=-1), value_states[..., :0])
        every = self.shape[0] // len(key_states)
        return self.contents(key_states.dtype, every)

    def contents(self, dtype: torch.dtype, every: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        keys, latents = super().contents(dtype, every)[0].split(self.widths, dim=-1)
        return keys, latents


class LatentLayer(DecodeLayer):
    """Latents and nothing else: `codes` are the latents themselves [rows, 1, S, r], or with 8 or 4 bits what
    `packing_mqa.py` makes of them [rows, 1, S, r · bits / 8], with `scales` and `offsets` [rows, 1, S].
    """

    def __init__(self, shape: tuple[int, int, int], bits: int, dtype: torch.dtype, device: torch.device, copy: bool):
        super().__init__(copy)
        rows, capacity, latent = shape
        self.bits = bits
        width, kind = (latent, dtype) if bits == 16 else (latent * bits // 8, torch.uint8)
        self.codes = torch.zeros(rows, 1, capacity, width, dtype=kind, device=device)
        each = (rows, 1, 0 if bits == 16 else capacity)
        self.scales = torch.zeros(each, dtype=dtype, device=device)
        self.offsets = torch.zeros(each, dtype=dtype, device=device)

    def buffers(self) -> dict[str, torch.Tensor]:
        names = ("codes",) if self.bits == 16 else ("codes", "scales", "offsets")
        return {name: getattr(self, name) for name in names}

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise ValueError("this cache keeps latents, and keys and values are given; make it from the model's config")

    def packed(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is to be written to each buffer for latents [..., r]."""
        if self.bits == 16:
            return {"codes": latents}
        return dict(zip(("codes", "scales", "offsets"), pack_latent(latents.to(self.dtype), self.bits)))

    def unpacked(self, held: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The latents [..., r] of what the buffers hold."""
        return (held["codes"] if self.bits == 16 else unpack_latent(**held, bits=self.bits)).to(dtype)

    def update_latents(self, made: torch.Tensor) -> torch.Tensor:
        """Extend by new latents [B, T, r] -> all latents [B, 1, S, r], rounded; the first ones as they are."""
        first = self.length
        every = self.extend(self.packed(made[:, None]))
        return made[:, None] if first == 0 else self.latents(made.dtype, every)

    def latents(self, dtype: torch.dtype | None = None, every: int = 1) -> torch.Tensor:
        """Those in use [rows, 1, length, r] of every so-manieth row."""
        held = {name: buffer[::every, :, : self.length] for name, buffer in self.buffers().items()}
        return self.unpacked(held, dtype or self.dtype)


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
        keys: of a model with latents, `"rebuilt"` keeps latents alone, at `kv_latent_bits`; `"expanded"` keeps the
            rotated keys that are rebuilt from them, too, and both at `dtype`. Without rotary positions there are none,
            and latents are kept alone; where rotary frequencies depend on the length of the text, keys are kept with
            those of their time, as in the caches of transformers.

    Attributes:
        positions: int32 [rows, capacity], the position of each token; `None` where no keys are rebuilt from the cache.

    Raises:
        ValueError: for latents in float8, or another `keys`.
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
        keys: str = "rebuilt",
    ):
        if keys not in KEYS:
            raise ValueError(f"keys must be one of {', '.join(KEYS)}, got {keys!r}")
        latents = config.cross_kv_latent_dim if cross else config.kv_latent_dim
        if latents is not None and dtype == FLOAT8:
            raise ValueError(
                f"a latent is kept in the bits that it was fitted for, kv_latent_bits={config.kv_latent_bits}, not in "
                "float8; leave cache_dtype at None"
            )
        names = ("cross_qk_head_dim", "cross_v_head_dim") if cross else ("qk_head_dim", "v_head_dim")
        heads = config.cross_num_key_value_heads if cross else config.num_key_value_heads
        place = dtype, torch.device(device), copy
        self.positions: torch.Tensor | None = None
        sizes: Any
        layers: list[Any] = []  # transformers names other types of layers here
        for i in range(config.num_hidden_layers):
            width, value_width = (of_layer(getattr(config, name), i) for name in names)
            r, rotated = of_layer(latents, i), not cross and config.rope_layers[i]
            if r is None:
                sizes = rows, heads, capacity, width, value_width
                layers.append(KeyValueLayer(sizes, *place))
            elif rotated and (keys == "expanded" or config.rope_by_length):
                layers.append(ExpandedLayer((rows, capacity, width, r), *place))
            else:
                layers.append(LatentLayer((rows, capacity, r), config.kv_latent_bits, *place))
                if rotated and self.positions is None:
                    self.positions = torch.zeros(rows, capacity, dtype=torch.int32, device=device)
        super().__init__(layers=layers)

    @property
    def decode_layers(self) -> list[DecodeLayer]:
        """`layers` by their type, which transformers does not know."""
        layers: Any = self.layers
        return layers

    @property
    def rows(self) -> int:
        return self.decode_layers[0].shape[0]

    @property
    def capacity(self) -> int:
        return self.decode_layers[0].capacity

    @property
    def dtype(self) -> torch.dtype:
        return self.decode_layers[0].dtype

    @property
    def keys(self) -> str:
        """As the argument; `"rebuilt"` where there is nothing to rebuild."""
        return KEYS[any(isinstance(layer, ExpandedLayer) for layer in self.decode_layers)]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        held = 0 if self.positions is None else self.positions.nbytes
        return held + sum(layer.nbytes for layer in self.decode_layers)

    def set_length(self, length: int) -> None:
        """Say how many positions are in use."""
        for layer in self.decode_layers:
            layer.length = length

    def grow(self, capacity: int) -> None:
        for layer in self.decode_layers:
            layer.grow(capacity)
        if self.positions is not None:
            more = capacity - self.positions.shape[1]
            self.positions = torch.nn.functional.pad(self.positions, (0, more))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.positions is not None:
            self.positions = self.positions.index_select(0, beam_idx.to(self.positions.device))

    def note(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Note the positions [B, T] of tokens that the layers are about to write -> those of all tokens, [B, S]."""
        assert self.positions is not None
        first = self.get_seq_length()
        end = first + position_ids.shape[1]
        if end > self.capacity:
            self.grow(max(end, 2 * self.capacity))
        every = self.rows // len(position_ids)
        for copy in range(every):
            self.positions[copy::every, first:end] = position_ids
        return self.positions[::every, :end]

    def note_steps(self, first: int, offsets: torch.Tensor) -> None:
        """Note that each token n from `first` on stands at position `offsets` [rows] + n."""
        if self.positions is not None:
            n = torch.arange(first, self.get_seq_length(), device=offsets.device)
            self.positions[:, first : first + len(n)] = offsets[:, None] + n
