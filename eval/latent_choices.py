"""Latents to plan and to time: one configuration per requested size.

r latent width, W key width (components rebuilt from the latent), G key/value heads, R rotated components of a head
"""

from collections.abc import Sequence

from mqa_hf.base.errors import MQAError
from mqa_hf.configuration_checks_mqa import LATENT_BLOCK
from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.conversion.canonical import decoder_of, latents_of
from mqa_hf.conversion.families import check_own_heads
from mqa_hf.conversion.latent_sizes import latent_config, most_keys, most_numbers
from mqa_hf.conversion.pooling import choose_attentions, with_heads

from .shapes import Config


def latent_models(
    config: Config,
    latents: Sequence[int] | None,
    key_widths: Sequence[int] | None,
    bits: Sequence[int] | None,
) -> dict[str, Config]:
    """Make the configuration of each latent, by the latent's name.

    Args:
        config: with all heads of the source.
        latents: r. Default: the width of one head's key and value together.
        key_widths: W. Default: 4R, or GR if that is less.
        bits: per stored number of the latent. Default: 16.

    Raises:
        MQAError: for sizes that a latent of this model cannot have.
    """
    decoder = decoder_of(config)
    check_own_heads(config)
    heads, rotated = decoder.num_key_value_heads, any(decoder.rope_layers)
    if key_widths is not None and not rotated:
        raise MQAError("`key_widths` needs rotary positions: without them no keys are rebuilt; leave it out")
    found: dict[str, Config] = {}
    for count in bits or (16,):
        step = 1 if count == 16 else LATENT_BLOCK
        default = max(min(2 * decoder.head_dim, most_numbers(decoder, heads)) // step, 1) * step
        for r in latents or (default,):
            for W in key_widths or (min(heads, 4) * decoder.rotary_dim,):
                check_latent(decoder, r, W if rotated else 0, count)
                made = with_latent(config, r, W, count)
                found[latents_of(made)["decoder"].name] = made
    return found


def check_latent(decoder: MQAConfig, r: int, W: int, bits: int) -> None:
    """Raise MQAError for invalid sizes."""
    heads = decoder.num_key_value_heads
    most, keys = most_numbers(decoder, heads), heads * decoder.rotary_dim
    if r > most:
        raise MQAError(f"`latents` must be at most {most}, the width of all keys and values of a token; got {r}")
    if r < 1 or (bits < 16 and r % LATENT_BLOCK):
        raise MQAError(f"`latents` must be multiples of {LATENT_BLOCK} with `latent_bits` {bits}; got {r}")
    if W % 2 or keys < W:
        raise MQAError(f"`key_widths` must be even and at most the {keys} rotated components of all keys; got {W}")


def with_latent(config: Config, r: int, W: int, bits: int) -> Config:
    """Replace the keys and values that the decoder caches by latents."""
    attentions, decoder = choose_attentions(config, None), decoder_of(config)
    layers = range(decoder.num_hidden_layers)
    sizes: dict[str, tuple[list[int], list[int]]] = {}
    for name in attentions:
        most = [most_keys(decoder, decoder.num_key_value_heads, i, name) for i in layers]
        sizes[name] = [r for _ in layers], [min(W, n) for n in most]
    return latent_config(config, with_heads(config, 1, attentions), attentions, sizes, bits)
