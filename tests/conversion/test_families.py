"""The exactness rule and the mean rule, for every row of the table."""

import pytest
import torch
from sources import (
    CASES,
    IDS,
    batch,
    kv_heads_of,
    largest_difference,
    make_model,
    overwrite_heads_with_mean,
    save,
)
from transformers import AutoModelForCausalLM

from mqa_hf.conversion import ConversionError, convert
from mqa_hf.conversion.families import FAMILIES

TOLERANCE = 1e-4  # on logits of order 10, float32


def converted(source, output, **options):
    convert(source, output, **options)
    return AutoModelForCausalLM.from_pretrained(output).eval()


def generate(model, **options):
    ids, mask = batch()
    model.generation_config.eos_token_id = None
    return model.generate(ids, attention_mask=mask, max_new_tokens=12, pad_token_id=0, **options)


def test_every_family_has_a_case():
    assert {family for family, _, _ in CASES} == set(FAMILIES)


@pytest.mark.parametrize(("model_type", "what", "config"), CASES, ids=IDS)
def test_with_all_heads_it_is_the_source(model_type, what, config, tmp_path):
    theirs = make_model(model_type, config)
    ours = converted(save(theirs, tmp_path / "source"), tmp_path / "ours", kv_heads=kv_heads_of(theirs))
    difference, size = largest_difference(ours, theirs)
    assert size > 1
    assert difference <= TOLERANCE, f"{difference} on logits up to {size}"
    for use_cache in (True, False):
        torch.testing.assert_close(
            generate(ours, use_cache=use_cache, do_sample=False),
            generate(theirs, use_cache=use_cache, do_sample=False),
        )


@pytest.mark.parametrize(("model_type", "what", "config"), CASES, ids=IDS)
def test_the_mean_is_the_source_with_its_heads_overwritten_by_their_mean(model_type, what, config, tmp_path):
    theirs = make_model(model_type, config)
    heads = kv_heads_of(theirs)
    source = save(theirs, tmp_path / "source")
    for kv_heads in {1, heads // 2 if heads % 2 == 0 else 1}:
        theirs = AutoModelForCausalLM.from_pretrained(source).eval()
        if heads > 1:
            overwrite_heads_with_mean(theirs, kv_heads)
        ours = converted(source, tmp_path / f"ours-{kv_heads}", kv_heads=kv_heads)
        difference, size = largest_difference(ours, theirs)
        assert difference <= TOLERANCE, f"{difference} on logits up to {size}"
        assert ours.model.layers[0].self_attn.k_proj.weight.shape[0] == kv_heads * ours.config.head_dim


@pytest.mark.parametrize(("model_type", "what", "config"), CASES, ids=IDS)
def test_the_native_target_computes_what_ours_does(model_type, what, config, tmp_path):
    source = save(make_model(model_type, config), tmp_path / "source")
    refusals = ("post-norm, projected", "projected, no final norm", "no biases, bare norms")
    if FAMILIES[model_type].native is None or what in refusals:
        with pytest.raises(ConversionError, match="--target native"):
            convert(source, tmp_path / "native", target="native")
        assert not (tmp_path / "native").exists()
        return
    ours = converted(source, tmp_path / "ours")
    native = converted(source, tmp_path / "native", target="native")
    assert type(native).__module__.startswith("transformers.models.")
    ids, mask = batch()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    arguments = {"attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        difference = (ours(ids, **arguments).logits - native(ids, **arguments).logits)[mask.bool()].abs().max()
    assert difference <= TOLERANCE
    torch.testing.assert_close(generate(ours, do_sample=False), generate(native, do_sample=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [CASES[0], CASES[IDS.index("gpt2: as published")]], ids=["rms", "layer"])
def test_in_16_bits_it_is_as_close_to_the_truth_as_the_source_class(case, dtype, tmp_path):
    """Norms and attention round in other places there, so the logits of the two differ by rounding."""
    theirs = make_model(case[0], case[2])
    ours = converted(save(theirs, tmp_path / "source"), tmp_path / "ours", kv_heads=6)
    ids = batch(8)[0]
    with torch.no_grad():
        truth = theirs.double()(ids).logits
        distances = [(model.to(dtype)(ids).logits - truth).square().mean().sqrt() for model in (ours, theirs)]
    assert 0 < distances[0] <= 1.1 * distances[1]


def test_first_takes_the_first_head_of_each_group(tmp_path):
    theirs = make_model("llama", dict(CASES[0][2]))
    ours = converted(save(theirs, tmp_path / "source"), tmp_path / "ours", kv_heads=2, method="first")
    weight = theirs.model.layers[1].self_attn.v_proj.weight.view(6, 8, 48)
    torch.testing.assert_close(ours.model.layers[1].self_attn.v_proj.weight, weight[[0, 3]].reshape(16, 48))


def test_random_depends_on_the_seed_alone(tmp_path):
    source = save(make_model("llama", CASES[0][2]), tmp_path / "source")
    one, same, other = (
        converted(source, tmp_path / name, method="random", seed=seed).model.layers[0].self_attn.k_proj.weight
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )
    torch.testing.assert_close(one, same)
    assert (one - other).abs().max() > 0.01
    assert abs(one.std().item() - 0.02) < 0.002
