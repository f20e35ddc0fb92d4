"""The exactness rule and the mean rule, for every row of the table."""

import pytest
import torch
from seq2seq_sources import SEQ2SEQ_CASES
from sources import (
    CASES,
    FALCON_RW,
    IDS,
    batch,
    kv_heads_of,
    largest_difference,
    make_model,
    overwrite_heads_with_mean,
    save,
)
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from mqa_hf import convert
from mqa_hf.base.errors import ConversionWarning, MQAError
from mqa_hf.conversion.families import FAMILIES, canonical_config
from mqa_hf.conversion.families.native_only import MIXTURES
from mqa_hf.conversion.loading import capped

TOLERANCE = 1e-4  # on logits of order 10, float32
# What `--target native` refuses in families that have a native home.
NOT_NATIVE = {
    "gpt_neo: untied",
    "gpt_neo: windows",
    "opt: no biases, bare norms",
    "opt: post-norm, projected",
    "opt: projected, no final norm",
    "stablelm: a norm for each head",
}
BY_FAMILY = {family: fields for family, _, fields in reversed(CASES)}  # the first case of each
# (model type, switch, value, what the refusal says)
REFUSED = [
    ("bloom", "apply_residual_connection_post_layernorm", True, "residual stream"),
    ("bloom", "slow_but_exact", True, "omits biases"),
    ("codegen", "n_head", 6, "multiple of 4"),
    ("codegen", "rotary_dim", 0, "rotary_dim=0"),
    ("falcon", "new_decoder_architecture", True, "cannot run"),  # with parallel_attn=False
    ("falcon", "num_kv_heads", 2, "needs new_decoder_architecture"),
    ("falcon", "num_ln_in_parallel_attn", 2, "num_ln_in_parallel_attn"),
    ("gemma", "use_bidirectional_attention", True, "causal"),
    ("mpt", "attn_config", {"alibi": False}, "alibi=False"),
    ("mpt", "attn_config", {"alibi_bias_max": 16}, "alibi_bias_max=16"),
    ("mpt", "attn_config", {"attn_type": "multiquery_attention"}, "multiquery_attention"),
    ("mpt", "attn_config", {"prefix_lm": True}, "prefix_lm"),
    ("mpt", "attn_config", {"qk_ln": True}, "qk_ln"),
    ("mpt", "attn_config", {"rope": True}, "unknown switches.*rope"),
    ("mpt", "expansion_ratio", 2, "expansion_ratio=2"),
    ("mpt", "logit_scale", 0.5, "logit_scale=0.5"),
    ("mpt", "no_bias", False, "no_bias=False"),
    ("mpt", "norm_type", "rmsnorm", "rmsnorm"),
    ("gpt_oss", "swiglu_alpha", 2.0, "swiglu_alpha=2.0"),
    ("olmoe", "clip_qkv", 8.0, "clip_qkv=8.0"),
    ("phi3", "attention_bias", True, "no such bias"),
    ("xglm", "add_cross_attention", True, "encoder-decoder"),
    ("xglm", "d_model", 45, "must be even"),
    ("xglm", "pad_token_id", 5, "zeroes the sinusoid of position 3"),
]


def converted(source, output, **options):
    convert(source, output, **options)
    return capped(AutoModelForCausalLM.from_pretrained(output).eval())


def generate(model, **options):
    ids, mask = batch()
    model.generation_config.eos_token_id = None
    return model.generate(ids, attention_mask=mask, max_new_tokens=12, pad_token_id=0, **options)


def test_every_family_has_a_case():
    assert {family for family, _, _ in [*CASES, *SEQ2SEQ_CASES]} == set(FAMILIES)


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
        theirs = capped(AutoModelForCausalLM.from_pretrained(source).eval())
        if heads > 1:
            overwrite_heads_with_mean(theirs, kv_heads)
        ours = converted(source, tmp_path / f"ours-{kv_heads}", kv_heads=kv_heads)
        difference, size = largest_difference(ours, theirs)
        assert difference <= TOLERANCE, f"{difference} on logits up to {size}"
        assert ours.model.layers[0].self_attn.k_proj.weight.shape[0] == kv_heads * ours.config.head_dim


@pytest.mark.parametrize(("model_type", "what", "config"), CASES, ids=IDS)
def test_the_native_target_computes_what_ours_does(model_type, what, config, tmp_path):
    if model_type in MIXTURES:
        pytest.skip("see test_coverage.py")
    source = save(make_model(model_type, config), tmp_path / "source")
    if FAMILIES[model_type].native is None or f"{model_type}: {what}" in NOT_NATIVE:
        with pytest.raises(MQAError, match="`target` native"):
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


@pytest.mark.parametrize(("model_type", "switch", "value", "reason"), REFUSED)
def test_what_cannot_be_expressed_is_refused_with_a_reason(model_type, switch, value, reason):
    fields = BY_FAMILY[model_type]
    if model_type == "falcon":
        fields = {**fields, **FALCON_RW}
    source = AutoConfig.for_model(model_type, **{**fields, switch: value})
    with pytest.raises(MQAError, match=reason):
        canonical_config(source, {})


def test_a_new_falcon_pools_to_a_few_heads_in_its_own_class_and_an_old_one_does_not(tmp_path):
    new, old = (
        make_model("falcon", CASES[IDS.index(f"falcon: {what}")][2]) for what in ("grouped, one norm", "alibi")
    )
    native = converted(save(new, tmp_path / "new"), tmp_path / "native", target="native", kv_heads=1)
    assert native.config.num_kv_heads == 1
    with pytest.raises(MQAError, match="4 key/value heads without new_decoder_architecture"):
        convert(save(old, tmp_path / "old"), tmp_path / "refused", target="native", kv_heads=4)


@pytest.mark.parametrize("model_type", ["bloom", "falcon", "mpt"])
def test_alibi_over_a_long_text(model_type, tmp_path):
    """Falcon's class rounds biases to bfloat16, which shows beyond 256 positions and with slopes of many heads."""
    fields = dict(CASES[IDS.index("falcon: alibi")][2] if model_type == "falcon" else BY_FAMILY[model_type])
    fields |= {name: 512 for name in ("max_position_embeddings", "max_seq_len") if name in fields}
    theirs = make_model(model_type, fields)
    ours = converted(save(theirs, tmp_path / "source"), tmp_path / "ours", kv_heads=kv_heads_of(theirs))
    ids, mask = batch(length=400)
    with torch.no_grad():
        difference = (ours(ids, attention_mask=mask).logits - theirs(ids, attention_mask=mask).logits)[mask.bool()]
    assert difference.abs().max() <= TOLERANCE


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


@torch.no_grad()
def test_bloom_counts_positions_where_a_mask_has_holes(tmp_path):
    theirs = make_model("bloom", BY_FAMILY["bloom"])
    ours = converted(save(theirs, tmp_path / "source"), tmp_path / "ours", kv_heads=kv_heads_of(theirs))
    ids, mask = batch()
    mask[:, 8:10] = 0
    expected = theirs(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(ours(ids, attention_mask=mask).logits[mask.bool()], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("model_type", ["falcon", "bloom"])
@torch.no_grad()
def test_alibi_in_a_window_does_not_depend_on_the_cache(model_type, tmp_path):
    fields = CASES[IDS.index("falcon: alibi")][2] if model_type == "falcon" else BY_FAMILY["bloom"]
    source = save(make_model(model_type, fields), tmp_path / "source")
    convert(source, tmp_path / "ours", window=4)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids, mask = batch()
    arguments = {"attention_mask": mask, "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    expected = ours.generate(ids, use_cache=False, **arguments)
    torch.testing.assert_close(ours.generate(ids, **arguments), expected)


@pytest.mark.parametrize("model_type", ["gemma", "granite", "xglm", "biogpt"])
@torch.no_grad()
def test_embeddings_of_the_model_s_own_carry_their_scale(model_type, tmp_path):
    theirs = make_model(model_type, BY_FAMILY[model_type])
    ours = converted(save(theirs, tmp_path / "source"), tmp_path / "ours", kv_heads=kv_heads_of(theirs))
    ids = batch()[0]
    torch.testing.assert_close(ours(inputs_embeds=ours.get_input_embeddings()(ids)).logits, ours(ids).logits)


@pytest.mark.parametrize(("model_type", "what", "config"), CASES, ids=IDS)
@torch.no_grad()
def test_a_source_of_16_bits_computes_the_same_in_float32(model_type, what, config, tmp_path):
    """What is settled in the weights is not rounded once more where the result is float32."""
    theirs = make_model(model_type, config)
    source = save(theirs.bfloat16(), tmp_path / "source")
    convert(source, tmp_path / "ours", kv_heads=kv_heads_of(theirs), dtype="float32")
    read, ours = (
        capped(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)).eval()
        for path in (source, tmp_path / "ours")
    )
    difference, size = largest_difference(ours, read)
    assert difference <= TOLERANCE, f"{difference} on logits up to {size}"


@torch.no_grad()
def test_vectors_that_are_given_as_embeddings_are_scaled_where_the_source_scales_them(tmp_path):
    for model_type in BY_FAMILY:
        if model_type not in CONFIG_MAPPING:
            continue
        theirs = make_model(model_type, BY_FAMILY[model_type])
        ours = converted(
            save(theirs, tmp_path / model_type), tmp_path / f"{model_type}-ours", kv_heads=kv_heads_of(theirs)
        )
        given = torch.randn(2, 7, ours.config.embedding_size)
        difference = (ours(inputs_embeds=given).logits - theirs(inputs_embeds=given).logits).abs().max()
        assert difference <= TOLERANCE, model_type


@torch.no_grad()
def test_opt_in_gpt_bigcode_is_warned_of_and_right_with_positions(tmp_path):
    source = save(make_model("opt", BY_FAMILY["opt"]), tmp_path / "source")
    with pytest.warns(ConversionWarning, match="for left-padded rows pass position_ids"):
        report = convert(source, tmp_path / "native", target="native")
    assert "Warning: opt counts positions" in (tmp_path / "native" / "README.md").read_text()
    assert len(report.warnings) == 1
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native").eval()
    ours = converted(source, tmp_path / "ours")
    ids, mask = batch()
    assert not mask[:, 0].all()
    expected = ours(ids, attention_mask=mask).logits[mask.bool()]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = native(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_what_is_folded_is_rounded_once(dtype, tmp_path):
    theirs = make_model("gemma", BY_FAMILY["gemma"]).bfloat16()
    source = save(theirs, tmp_path / "source")
    convert(source, tmp_path / "ours", kv_heads=kv_heads_of(theirs), dtype=dtype)
    convert(source, tmp_path / "native", kv_heads=kv_heads_of(theirs), dtype=dtype, target="native")
    ours, native, original = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("ours", "native", "source")
    )
    norm = "model.layers.1.input_layernorm.weight"
    exact = original[norm].float() + 1
    assert torch.equal(ours[norm].float(), exact if dtype else exact.bfloat16().float())
    for name, tensor in original.items():
        assert torch.equal(native[name].float(), tensor.float()), name


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
