"""The cache of the fast decoding loop: buffers that are written in place.

    B rows, G key/value heads, S allocated positions, D query/key head width, Dv value head width, r latent width,
    W key width

transformers' dynamic cache copies all its contents at each step, and its static cache is always read in full. This one
holds keys [B, G, S, D] and values [B, G, S, Dv] with the number of positions in use, and grows. For models with
latents it holds the latents [B, 1, S, r], alone or with the keys rebuilt from them.
"""

from abc import abstractmethod
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_mqa import MQAConfig, of_layer
from .packing_mqa import pack_latent, unpack_latent

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
KEYS = ("rebuilt", "expanded")  # keys of latents: rebuilt at each step, or cached


def to_float8(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., D] -> the same in float8, and the scale [...] to multiply each vector by."""
    scale = states.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / FLOAT8_MAX
    return (states / scale).to(FLOAT8), scale.squeeze(-1)


def from_float8(states: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Invert [`to_float8`], up to rounding."""
    return (states.float() * scale[..., None]).to(dtype)


class DecodeLayer(CacheLayerMixin):
    """The cache of one layer, in buffers [rows, G, S, ...] that are written in place.

    If fewer rows are written than the buffers have, each is written to several consecutive rows, or only to the first
    of them (`copy` false).
    """

    is_sliding = False

    def __init__(self, copy: bool):
        super().__init__()
        self.copy = copy
        self.length = 0
        self.is_initialized = True

    @abstractmethod
    def buffers(self) -> dict[str, torch.Tensor]:
        """Buffers by attribute name."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Type of the stored numbers, or of the scales of packed ones."""

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
        """Do nothing: sizes come from the configuration."""

    def extend(self, new: dict[str, torch.Tensor]) -> int:
        """Append new tensors [B, G, T, ...] to the buffers of the same names.

        Returns:
            The number of buffer rows per row of the input.
        """
        rows, _, T = next(iter(new.values())).shape[:3]
        first, end = self.length, self.length + T
        if end > self.capacity:
            self.grow(max(end, 2 * self.capacity))
        every = self.shape[0] // rows
        for name, states in new.items():
            if states.shape[1] != getattr(self, name).shape[1]:
                raise ValueError(
                    f"the cache has {getattr(self, name).shape[1]} heads and gets {states.shape[1]}; let `generate()` "
                    "make the cache of a model that is divided among ranks"
                )
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
    """Keys [rows, G, S, D] and values [rows, G, S, Dv]; in float8, with one scale per vector."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device, copy: bool):
        super().__init__(copy)
        rows, heads, capacity, width, value_width = shape
        # Zeros, because a mask does not hide NaN in unused positions.
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
        """Keys and values in use, [rows, G, length, ...], of every `every`-th row."""
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
    """Rotated keys [rows, 1, S, W] rebuilt from latents and the latents [rows, 1, S, r], side by side in `keys`, like
    keys of a partly rotated head."""

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
    """Latents alone. With 16 bits `codes` are the latents [rows, 1, S, r]; with 8 or 4 bits they are packed by
    `packing_mqa.py` to [rows, 1, S, r · bits / 8], with `scales` and `offsets` [rows, 1, S].
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
        raise ValueError("this cache holds latents, got keys and values; make it from the model's config")

    def packed(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        """What to write to each buffer for latents [..., r]."""
        if self.bits == 16:
            return {"codes": latents}
        return dict(zip(("codes", "scales", "offsets"), pack_latent(latents.to(self.dtype), self.bits)))

    def unpacked(self, held: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The latents [..., r] from the contents of the buffers."""
        return (held["codes"] if self.bits == 16 else unpack_latent(**held, bits=self.bits)).to(dtype)

    def append_latents(self, made: torch.Tensor) -> None:
        """Append latents [B, T, r]."""
        self.extend(self.packed(made[:, None]))

    def latents(
        self, dtype: torch.dtype | None = None, rows: int | None = None, some: slice = slice(None)
    ) -> torch.Tensor:
        """Latents in use, [B, 1, length, r], of the prompts `some`, if the cache has copies of `rows` prompts; by
        default, of all rows."""
        every = 1 if rows is None else self.shape[0] // rows
        held = {name: buffer[::every, :, : self.length][some] for name, buffer in self.buffers().items()}
        return self.unpacked(held, dtype or self.dtype)


class DecodeCache(Cache):
    """A cache for `generate(past_key_values=...)` that decoding extends in place, without a copy per step.

    Pass it again with a longer text to continue; the part it already holds is not computed again.

    Args:
        config: configuration of the decoder.
        rows: rows of the batch.
        capacity: positions to allocate; the cache grows when more are needed.
        dtype, device: of the model. `torch.float8_e4m3fn` also stores a scale for each key and value.
        cross: whether it holds the keys and values of an encoder's output.
        copy: whether a prompt shared by several rows is written to each of them.
        keys: for models with latents: `"rebuilt"` holds only latents, at `kv_latent_bits`; `"expanded"` also holds the
            rotated keys rebuilt from them, both at `dtype`. Without rotary positions only latents are held. If rotary
            frequencies depend on the length of the text, keys are held as they were first rotated, as in
            transformers' caches.

    Attributes:
        positions: int32 [rows, capacity], the position of each token; `None` if no keys are rebuilt from the cache.

    Raises:
        ValueError: for latents in float8, or an unknown `keys`.
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
                f"latents cannot be cached in float8: they are stored as fitted, kv_latent_bits="
                f"{config.kv_latent_bits}; leave cache_dtype at None"
            )
        names = ("cross_qk_head_dim", "cross_v_head_dim") if cross else ("qk_head_dim", "v_head_dim")
        heads = config.cross_num_key_value_heads if cross else config.num_key_value_heads
        place = dtype, torch.device(device), copy
        self.positions: torch.Tensor | None = None
        sizes: Any
        layers: list[Any] = []  # transformers' annotation names other types
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
        """`layers`, typed as [`DecodeLayer`]."""
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
        """As the argument; `"rebuilt"` if there is nothing to rebuild."""
        return KEYS[any(isinstance(layer, ExpandedLayer) for layer in self.decode_layers)]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        held = 0 if self.positions is None else self.positions.nbytes
        return held + sum(layer.nbytes for layer in self.decode_layers)

    def set_length(self, length: int) -> None:
        """Set the number of positions in use."""
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
        """Store the positions [B, T] of the tokens that layers write next -> positions of all tokens, [B, S]."""
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
        """Set the position of each token n from `first` on to `offsets` [rows] + n."""
        if self.positions is not None:
            n = torch.arange(first, self.get_seq_length(), device=offsets.device)
            self.positions[:, first : first + len(n)] = offsets[:, None] + n
