"""Latents to plan and to time: a configuration for each size that is asked for.

r numbers of a latent, W key components that are rebuilt from it, G key/value heads, R rotated components of a head
"""

from collections.abc import Sequence

from mqa_hf.base.errors import MQAError
from mqa_hf.configuration_mqa import LATENT_BLOCK, MQAConfig
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
    """The configuration of each latent, by what it is.

    Args:
        config: with all the source's heads.
        latents: r. Default: as many numbers as a key and a value of one head have.
        key_widths: W. Default: four times R, or what all heads have if that is less.
        bits: of a stored number of the latent. Default: 16.

    Raises:
        MQAError: for sizes that a latent of this model cannot have.
    """
    decoder = decoder_of(config)
    check_own_heads(config)
    heads, rotated = decoder.num_key_value_heads, any(decoder.rope_layers)
    if key_widths is not None and not rotated:
        raise MQAError("`key_widths` are of rotary positions; here keys are not rebuilt, a latent is key and value")
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
    """Raises MQAError for sizes that are none."""
    heads = decoder.num_key_value_heads
    most, keys = most_numbers(decoder, heads), heads * decoder.rotary_dim
    if r > most:
        raise MQAError(f"`latents` {r} is more than the {most} numbers that hold all keys and values of a token")
    if r < 1 or (bits < 16 and r % LATENT_BLOCK):
        raise MQAError(f"`latents` must be multiples of {LATENT_BLOCK} with `latent_bits` {bits}; got {r}")
    if W % 2 or keys < W:
        raise MQAError(f"`key_widths` must be even and at most the {keys} rotated components of all keys; got {W}")


def with_latent(config: Config, r: int, W: int, bits: int) -> Config:
    """The same model with latents in place of the keys and values that its decoder caches."""
    attentions, decoder = choose_attentions(config, None), decoder_of(config)
    layers = range(decoder.num_hidden_layers)
    sizes: dict[str, tuple[list[int], list[int]]] = {}
    for name in attentions:
        most = [most_keys(decoder, decoder.num_key_value_heads, i, name) for i in layers]
        sizes[name] = [r for _ in layers], [min(W, n) for n in most]
    return latent_config(config, with_heads(config, 1, attentions), attentions, sizes, bits)
