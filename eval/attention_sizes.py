"""What one attention of a layer reads and computes, counted from a configuration.

    d hidden size, H query heads, G key/value heads, D and Dv widths of a key and a value head, r latent width,
    W key width, P components of a key head that are not rotated and computed from the latent

For each cached token and row, in multiplications, with as many additions:

    heads                 | G (D + Dv) numbers        | H (D + Dv)
    latent, rebuilt keys  | r numbers at `bits`       | r W + H (W + r), and H r where P > 0
    latent, expanded keys | W + r numbers             | H (W + r), and H r where P > 0

Without rotation W is 0, and there is only one way to cache a latent.
"""

from dataclasses import dataclass
from typing import Literal

from mqa_hf.configuration_mqa import MQAConfig, of_layer

Keys = Literal["rebuilt", "expanded"]  # at each step, or once and cached beside the latent


@dataclass(frozen=True)
class AttentionSizes:
    """Sizes of an attention, named as above; r is 0 for heads.

    Attributes:
        cross: whether it attends to an encoder's output, whose keys and values are computed once and not in a step.
        rebuilt: W.
        plain: P.
        bits: per stored number of the latent.
        mapped: width of a query before its map to D; 0 without maps.
    """

    d: int
    H: int
    G: int
    D: int
    Dv: int
    cross: bool
    r: int = 0
    rebuilt: int = 0
    plain: int = 0
    bits: int = 16
    mapped: int = 0

    @property
    def projections(self) -> int:
        """Weights that compute keys and values, or the latent."""
        return self.d * (self.r or self.G * (self.D + self.Dv))

    @property
    def step_weights(self) -> int:
        """Weights that a step multiplies with."""
        found = self.d * self.H * ((self.mapped or self.D) + self.Dv) + self.H * self.mapped * self.D
        found += 0 if self.cross else self.projections
        if self.r:
            found += self.r * self.rebuilt + self.G * (self.rebuilt + (self.plain + self.Dv) * self.r)
        return found

    @property
    def repeated(self) -> int:
        """Multiplications beyond one per weight, where query heads share the latent's map of a key/value head."""
        return (self.H - self.G) * (self.plain + self.Dv) * self.r if self.r else 0

    def products(self, keys: Keys) -> int:
        """Multiplications per row and cached token."""
        if not self.r:
            return self.H * (self.D + self.Dv)
        absorbed = self.H * self.r if self.plain else 0
        rebuilding = self.r * self.rebuilt if keys == "rebuilt" else 0
        return rebuilding + self.H * (self.rebuilt + self.r) + absorbed

    def bytes(self, keys: Keys, itemsize: int) -> int:
        """Bytes of a cached token, with `itemsize` bytes per number of the model. Latents are never kept in float8."""
        if not self.r:
            return self.G * (self.D + self.Dv) * itemsize
        itemsize = max(itemsize, 2)
        if keys == "expanded" and self.rebuilt:
            return (self.rebuilt + self.r) * itemsize
        if self.bits == 16:
            return self.r * itemsize
        return self.r * self.bits // 8 + 2 * itemsize


def own_attention(config: MQAConfig, layer: int) -> AttentionSizes:
    """The self-attention of a layer."""
    d, H, Dv = config.hidden_size, config.num_attention_heads, of_layer(config.v_head_dim, layer)
    width = of_layer(config.qk_head_dim, layer)
    if config.kv_latent_dim is None:
        mapped = config.head_dim if config.query_maps else 0
        return AttentionSizes(d, H, config.num_key_value_heads, width, Dv, cross=False, mapped=mapped)
    rotated = config.rotary_dim if config.rope_layers[layer] else 0
    return AttentionSizes(
        *(d, H, config.kv_latent_heads or H, config.head_dim, Dv),
        cross=False,
        r=of_layer(config.kv_latent_dim, layer),
        rebuilt=width,
        plain=config.head_dim - rotated,
        bits=config.kv_latent_bits,
    )


def cross_attention(config: MQAConfig, layer: int) -> AttentionSizes | None:
    """The cross-attention of a layer, if there is one."""
    G, d, H = config.cross_num_key_value_heads, config.hidden_size, config.num_attention_heads
    if not G:
        return None
    Dv = of_layer(config.cross_v_head_dim, layer)
    if config.cross_kv_latent_dim is None:
        return AttentionSizes(d, H, G, of_layer(config.cross_qk_head_dim, layer), Dv, cross=True)
    return AttentionSizes(
        *(d, H, config.kv_latent_heads or H, config.head_dim, Dv),
        cross=True,
        r=of_layer(config.cross_kv_latent_dim, layer),
        plain=config.head_dim,
        bits=config.kv_latent_bits,
    )


def kv_bytes(config: MQAConfig, keys: Keys = "rebuilt", itemsize: int = 2) -> tuple[int, int]:
    """Bytes of a cached token in all layers, as if none were sliding, and of a token of an encoder's output."""
    layers = range(config.num_hidden_layers)
    cross = [found for i in layers if (found := cross_attention(config, i)) is not None]
    own = sum(own_attention(config, i).bytes(keys, itemsize) for i in layers)
    return own, sum(found.bytes(keys, itemsize) for found in cross)


def rebuilds(config: MQAConfig) -> bool:
    """Whether keys are rebuilt from a latent, which can then be cached in two ways."""
    layers = range(config.num_hidden_layers)
    return config.kv_latent_dim is not None and any(of_layer(config.qk_head_dim, i) for i in layers)
