"""`--method latent`: one latent for all heads through the whole conversion."""

import pytest
import torch
from calibrated_sources import CHOSEN, SMALL, load, make
from sources import batch, largest_difference

from mqa_hf import convert
from mqa_hf.conversion.canonical import decoder_of
from mqa_hf.conversion.latent_sizes import most_keys, most_numbers
from mqa_hf.conversion.loading import load_model

LATENT = {"method": "latent", **SMALL}


def everything(source, tmp_path):
    """The r and W with which nothing is lost, and the configuration of the canonical model with all its heads."""
    heads = convert(source, tmp_path / "probe", method="first").attentions["decoder"].before
    stack = decoder_of(load_model(tmp_path / "probe").config)
    W = max(most_keys(stack, heads, i, "decoder") for i in range(stack.num_hidden_layers))
    return most_numbers(stack, heads), W


@pytest.mark.parametrize("what", CHOSEN)
def test_with_all_keys_and_values_in_the_latent_nothing_is_lost(what, tmp_path):
    source, theirs = make(what, tmp_path)
    r, W = everything(source, tmp_path)
    report = convert(source, tmp_path / "ours", latent=r, **({"key_width": W} if W else {}), **LATENT)
    ours = load(tmp_path / "ours")
    assert ours.config.num_key_value_heads == 1
    assert ours.config.kv_latent_dim == r
    difference, size = largest_difference(ours, theirs)
    assert difference <= 2e-3 * size
    assert max(layer.attention_error for layer in report.layers) < 1e-3
    assert max(layer.discarded_key_energy for layer in report.layers) < 1e-6
    assert report.held_out_loss.after == pytest.approx(report.held_out_loss.before, abs=1e-3)


@pytest.mark.parametrize("what", CHOSEN)
def test_a_latent_is_nearer_than_a_fitted_head_of_as_many_bytes(what, tmp_path):
    source, theirs = make(what, tmp_path)
    ids = batch(8)[0]
    distances = {}
    for method in ("shared", "latent"):
        convert(source, tmp_path / "ours", overwrite=True, **{**SMALL, "method": method})
        ours = load(tmp_path / "ours")
        with torch.no_grad():
            distances[method] = float((ours(ids).logits - theirs(ids).logits).norm())
    assert distances["latent"] < 1.1 * distances["shared"]
