"""Every causal and sequence-to-sequence model type of transformers is in one table; the conversions in own classes."""

import json

import pytest
import torch
from native_sources import CONFIGS, installed_types, make_native, overwrite_with_mean
from safetensors.torch import load_file, save_file
from sources import GPT, LLAMA, batch, make_model, save
from transformers import AutoConfig, AutoModelForCausalLM

from mqa_hf import convert, inspect
from mqa_hf.base.errors import MQAError
from mqa_hf.conversion.families import FAMILIES, IMAGE_TEXT, NATIVE_ONLY, OWN_CLASS, REFUSED, refused

# Types whose row is still to come: they may be in no table yet.
INSTALLED = installed_types()
HERE = [model_type for model_type in CONFIGS if model_type in INSTALLED]
TOLERANCE = 1e-4  # on logits of order 10


def test_every_model_type_is_in_exactly_one_table():
    tables = (set(FAMILIES), set(NATIVE_ONLY), set(IMAGE_TEXT), set(REFUSED))
    assert sum(map(len, tables)) == len(set.union(*tables))
    assert not INSTALLED - set.union(*tables)


def test_every_type_of_the_native_table_has_a_case():
    assert set(CONFIGS) == set(OWN_CLASS) - set(IMAGE_TEXT)


@pytest.mark.parametrize("model_type", sorted(INSTALLED & set(REFUSED)))
def test_the_reasons_hold(model_type):
    """Reasons that the configurations of transformers can confirm."""
    reason = REFUSED[model_type]
    if refused.LATENT in reason:
        assert "kv_lora_rank" in json.dumps(AutoConfig.for_model(model_type).get_text_config().to_dict())
    if "as many key/value heads as query heads" in reason:
        assert not hasattr(AutoConfig.for_model(model_type), "num_key_value_heads")
    if reason in (refused.MULTIMODAL, refused.MULTIMODAL_TEXT):
        assert AutoConfig.for_model(model_type).get_text_config().model_type in {*FAMILIES, *NATIVE_ONLY}
    if reason == refused.MULTIMODAL_OTHER:
        assert AutoConfig.for_model(model_type).get_text_config().model_type not in {*FAMILIES, *NATIVE_ONLY}
    if reason == refused.NO_ATTENTION:
        assert "num_key_value_heads" not in AutoConfig.for_model(model_type).to_dict()


def loaded(directory):
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert {name: found for name, found in info.items() if found} == {}
    return model.eval()


@torch.no_grad()
def logits(model):
    """Without and with padding; in float64 where state-space layers magnify the rounding of float32."""
    model = model.double() if model.config.model_type in ("zamba", "zamba2") else model
    ids, mask = batch()
    return [model(ids).logits, model(ids, attention_mask=mask).logits[mask.bool()]]


@pytest.mark.parametrize("model_type", HERE)
def test_with_its_own_heads_it_is_the_source_byte_for_byte(model_type, tmp_path):
    source = save(make_native(model_type), tmp_path / "source")
    report = convert(source, tmp_path / "same", kv_heads=4, target="native")
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "same"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.flatten().view(torch.uint8), after[name].flatten().view(torch.uint8)), name
    theirs, ours = loaded(source), loaded(tmp_path / "same")
    assert type(ours) is type(theirs)
    for mine, expected in zip(logits(ours), logits(theirs)):
        assert torch.equal(mine, expected)
    assert {layer.key_error for layer in report.layers if layer.key_error is not None} == {0.0}


@pytest.mark.parametrize("model_type", HERE)
def test_the_mean_is_the_source_with_its_heads_overwritten_by_their_mean(model_type, tmp_path):
    source = save(make_native(model_type), tmp_path / "source")
    before = logits(loaded(source))[0]
    for kv_heads in (2, 1):
        theirs = AutoModelForCausalLM.from_pretrained(source).eval()
        changed = overwrite_with_mean(theirs, kv_heads)
        report = convert(source, tmp_path / f"to-{kv_heads}", kv_heads=kv_heads, target="native")
        ours = loaded(tmp_path / f"to-{kv_heads}")
        assert ours.config.num_key_value_heads == kv_heads
        assert type(ours) is type(theirs)
        assert (logits(theirs)[0] - before).abs().max() > 0.01, "the heads do not matter"
        for mine, expected in zip(logits(ours), logits(theirs)):
            assert 0.1 < expected.abs().max() < 100
            assert (mine - expected).abs().max() <= TOLERANCE
        assert report.num_key_value_heads.model_dump() == {"before": 4, "after": kv_heads}
        assert report.kv_bytes_per_token.before * kv_heads == report.kv_bytes_per_token.after * 4
        shapes = {name: parameter.shape for name, parameter in ours.named_parameters()}
        for name, parameter in theirs.named_parameters():
            assert (shapes[name] == parameter.shape) == (name not in changed), name


@pytest.mark.parametrize("model_type", HERE)
def test_the_result_generates(model_type, tmp_path):
    convert(save(make_native(model_type), tmp_path / "source"), tmp_path / "ours", target="native")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ours.generation_config.eos_token_id = None
    ids, mask = batch()
    tokens = ours.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert tokens.shape == (ids.shape[0], ids.shape[1] + 8)


@pytest.fixture
def falcon_h1(tmp_path):
    return save(make_native("falcon_h1"), tmp_path / "source")


def refused_with(source, match, **options):
    with pytest.raises(MQAError, match=match):
        convert(source, source.parent / "output", **options)
    assert not (source.parent / "output").exists()


def edit(source, change):
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def edit_config(source, **fields):
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_another_name_of_a_family(tmp_path):
    source = save(make_model("gpt2", GPT), tmp_path / "source")
    edit_config(source, model_type="gpt-sw3")
    report = convert(source, tmp_path / "output")
    assert report.num_key_value_heads.model_dump() == {"before": 6, "after": 1}
    assert inspect(source)["native"] == "gpt_bigcode"


def test_the_canonical_target_is_refused_with_the_way_out(falcon_h1):
    refused_with(
        falcon_h1,
        "falcon_h1 can only be converted in its own class: its layers combine attention with a state-space model; use "
        "`target` native",
    )


@pytest.mark.parametrize("target", ["mqa", "native"])
def test_a_refused_type_says_why(target, tmp_path):
    source = save(make_model("llama", LLAMA), tmp_path / "source")
    for model_type, match in (("mamba", "no keys and values"), ("deepseek_v3", "latent"), ("bert", "BERT-like")):
        edit_config(source, model_type=model_type)
        refused_with(source, f"{model_type} cannot be converted: .*{match}", target=target)


def test_rows_that_do_not_fit(falcon_h1):
    name = "model.layers.1.self_attn.k_proj.weight"
    edit(falcon_h1, lambda tensors: tensors.update({name: torch.zeros(40, 48)}))
    match = rf"{name} has the shape \[40, 48\]; 4 key/value heads of width 8 need \[32, 48\]"
    refused_with(falcon_h1, match, target="native")


def test_a_projection_that_is_missing(falcon_h1):
    edit(falcon_h1, lambda tensors: tensors.pop("model.layers.1.self_attn.v_proj.weight"))
    refused_with(falcon_h1, r"tensors missing for: model\.layers\.1\.self_attn\.v_proj\.weight", target="native")


def test_heads_that_do_not_divide(falcon_h1):
    refused_with(
        falcon_h1, "`kv_heads` must divide the source's 4 key/value heads, got 3", kv_heads=3, target="native"
    )


def test_quantised_weights(falcon_h1):
    edit_config(falcon_h1, quantization_config={"quant_method": "gptq", "bits": 4})
    refused_with(falcon_h1, "quantised", target="native")


def test_a_switch_that_adds_to_the_heads(tmp_path):
    source = save(make_native("zamba2"), tmp_path / "source")
    edit_config(source, use_shared_attention_adapter=True)
    refused_with(source, "use_shared_attention_adapter=True is not supported: its adapters", target="native")


def test_layers_that_the_class_leaves_out_are_pooled_like_the_others(falcon_h1, tmp_path):
    """Checkpoints carry layers for the prediction of further tokens, which other software runs."""
    name = "mtp.layers.0.self_attn.k_proj.weight"
    weight = torch.randn(32, 48)
    edit(falcon_h1, lambda tensors: tensors.update({name: weight}))
    convert(falcon_h1, tmp_path / "ours", target="native")
    torch.testing.assert_close(
        load_file(tmp_path / "ours" / "model.safetensors")[name], weight.view(4, 8, 48).mean(0), atol=1e-6, rtol=0
    )


def test_another_dtype_leaves_integers_alone(falcon_h1, tmp_path):
    edit(falcon_h1, lambda tensors: tensors.update({"counts": torch.arange(3)}))
    convert(falcon_h1, tmp_path / "ours", target="native", dtype="bfloat16")
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    assert torch.equal(tensors.pop("counts"), torch.arange(3))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16


def test_random_heads_keep_a_norm_over_the_keys_alive(tmp_path):
    convert(save(make_native("olmoe"), tmp_path / "source"), tmp_path / "ours", target="native", method="random")
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    assert torch.equal(tensors["model.layers.0.self_attn.k_norm.weight"], torch.ones(8))
    assert 0.015 < tensors["model.layers.0.self_attn.k_proj.weight"].std() < 0.025


def test_layers_that_share_their_weights_have_a_cache_each(tmp_path):
    source = save(make_native("zamba"), tmp_path / "source")  # two of its four layers attend, with the same weights
    assert inspect(source)["kv_bytes_per_token"] == {"now": 2 * 2 * 4 * 16, "after": 2 * 2 * 16}


def test_inspection_says_the_same(falcon_h1):
    result = inspect(falcon_h1)
    theirs = AutoModelForCausalLM.from_pretrained(falcon_h1)
    assert (result["convertible"], result["native"]) == (True, "falcon_h1")
    assert (
        result["reason"]
        == "only with mqa-hf convert --target native: its layers combine attention with a state-space model"
    )
    assert result["parameters"] == theirs.num_parameters()
    assert result["kv_bytes_per_token"] == {"now": 2 * 2 * 4 * 16, "after": 2 * 2 * 16}
    assert (result["layers"], result["num_key_value_heads"], result["head_dim"]) == (2, 4, 8)
    edit_config(falcon_h1, model_type="mamba")
    result = inspect(falcon_h1)
    assert not result["convertible"]
    assert "no keys and values" in result["reason"]
