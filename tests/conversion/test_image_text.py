"""Multimodal checkpoints: the language model is converted in place, and everything else is copied."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sources import need, save
from tokenizer import write_tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText

from mqa_hf import benchmark, convert, inspect, plan
from mqa_hf.base.errors import ConversionError, MQAError
from mqa_hf.conversion.families import IMAGE_TEXT
from mqa_hf.conversion.passthrough import own_class
from mqa_hf.conversion.source import Source
from mqa_hf.finetune.uptrain import uptrain

TEXT = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.3,
    "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8, "num_channels": 3,
}  # fmt: skip
QWEN = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 64, "patch_size": 8,
    "spatial_merge_size": 1, "temporal_patch_size": 1,
}  # fmt: skip
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 1, 2]}}
TOKENS = {"image_token_id": 99, "video_token_id": 98, "vision_start_token_id": 97}
CASES = {
    "llava": {
        "text_config": {"model_type": "llama", **TEXT}, "vision_config": {"model_type": "clip_vision_model", **VISION},
        "image_token_index": 99, "image_seq_length": 4,
    },
    "llava_onevision": {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {"model_type": "siglip_vision_model", **VISION}, "image_token_index": 99,
    },
    "gemma3": {
        "text_config": {**TEXT, "query_pre_attn_scalar": 8, "sliding_window": 8}, "vision_config": VISION,
        "mm_tokens_per_image": 4, "image_token_index": 99,
    },
    "paligemma": {
        "text_config": {"model_type": "gemma", **TEXT}, "projection_dim": 64, "hidden_size": 64,
        "vision_config": {"model_type": "siglip_vision_model", **VISION, "projection_dim": 64},
        "image_token_index": 99,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **TEXT}, "image_token_index": 99, "spatial_merge_size": 1,
        "vision_config": {"model_type": "pixtral", **VISION, "head_dim": 8},
    },
    "idefics3": {
        "text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION, "scale_factor": 1,
        "image_token_id": 99,
    },
    "internvl": {
        "text_config": {"model_type": "qwen2", **TEXT}, "image_token_id": 99,
        "vision_config": {**VISION, "image_size": [16, 16], "patch_size": [8, 8]},
    },
    "qwen2_vl": {
        "text_config": {**TEXT, **SECTIONS}, **TOKENS,
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "patch_size": 8},
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, **SECTIONS}, **TOKENS,
        "vision_config": {**QWEN, "fullatt_block_indexes": [0], "window_size": 16},
    },
    "qwen3_vl": {
        "text_config": {**TEXT, **SECTIONS}, **TOKENS,
        "vision_config": {**QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
}  # fmt: skip
IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


def make(kind, tmp_path):
    need(kind)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **CASES[kind])).eval()
    return save(model, tmp_path / "source"), model


def load(directory):
    model, info = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert {name: found for name, found in info.items() if found} == {}
    return model.eval()


@torch.no_grad()
def logits(model, **image):
    return model(input_ids=IDS, **image).logits


@torch.no_grad()
def overwrite(model):
    """Give the language model's key and value heads their mean; returns how many tensors that changed."""
    changed = 0
    for name, parameter in model.named_parameters():
        if name.split(".")[-2] in ("k_proj", "v_proj") and ("language_model" in name or "text_model" in name):
            heads = parameter.unflatten(0, (4, -1))
            heads.copy_(heads.mean(0, keepdim=True).expand_as(heads))
            changed += 1
    return changed


@pytest.mark.parametrize("kind", CASES)
def test_with_its_heads_it_is_the_source_and_with_one_the_mean(kind, tmp_path):
    source, model = make(kind, tmp_path)
    said = inspect(source)
    assert said["convertible"]
    assert "in place" in said["reason"]
    assert said["kv_bytes_per_token"] == {"now": 256, "after": 64}
    convert(source, tmp_path / "same", kv_heads=4, target="native")
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "same"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    original = logits(model)
    assert torch.equal(logits(load(tmp_path / "same")), original)
    report = convert(source, tmp_path / "mean", target="native")
    assert report.num_key_value_heads.model_dump() == {"before": 4, "after": 1}
    written = json.loads((tmp_path / "mean" / "config.json").read_text())["text_config"]
    assert written["num_key_value_heads"] == 1
    if "rope_type" in written["rope_parameters"]:  # older versions and servers read only the old names
        assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
        assert (written["rope_scaling"] or {}).get("mrope_section") == written["rope_parameters"].get("mrope_section")
    mean = load(tmp_path / "mean")
    assert type(mean) is type(model)
    assert mean.config.get_text_config().rope_parameters == model.config.get_text_config().rope_parameters
    assert mean.config.get_text_config().num_key_value_heads == 1
    assert overwrite(model) >= 4
    expected = logits(model)
    assert (logits(mean) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (expected - original).abs().max() > 0.1


def test_images_are_seen(tmp_path):
    source, model = make("llava", tmp_path)
    convert(source, tmp_path / "mean", target="native")
    overwrite(model)
    ids = IDS[:1].clone()
    ids[0, 2:6] = 99
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    mean = load(tmp_path / "mean")
    with torch.no_grad():
        found, expected = (m(input_ids=ids, pixel_values=pixels).logits for m in (mean, model))
        other = mean(input_ids=ids, pixel_values=-pixels).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (other - found).abs().max() > 1e-2


def test_what_is_not_possible_is_said(tmp_path):
    source, _ = make("llava", tmp_path)
    with pytest.raises(MQAError, match="multimodal; its language model is converted in place; use `target` native"):
        convert(source, tmp_path / "ours")
    with pytest.raises(MQAError, match="calibration needs a canonical model"):
        convert(source, tmp_path / "ours", target="native", method="shared")
    with pytest.raises(MQAError, match="divide"):
        convert(source, tmp_path / "ours", target="native", kv_heads=3)
    assert not (tmp_path / "ours").exists()
    choices = plan(str(source), context=64, batch=2, device="l4").choices
    assert [choice.kv_heads for choice in choices][:2] == ["original (4)", "1"]
    with pytest.raises(MQAError, match="is multimodal, and only models of text are timed"):
        benchmark(source, engines=["dynamic"], device="cpu")


def test_processors_are_copied_and_checked_if_their_libraries_are_there(tmp_path):
    source, _ = make("qwen2_5_vl", tmp_path)
    write_tokenizer(source)
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    (source / "preprocessor_config.json").write_text(json.dumps(settings))
    (source / "video_preprocessor_config.json").write_text(
        json.dumps({"video_processor_type": "Qwen2VLVideoProcessor"})
    )
    report = convert(source, tmp_path / "mean", target="native")
    copied = {path.name for path in (tmp_path / "mean").iterdir()}
    assert {"preprocessor_config.json", "video_preprocessor_config.json", "tokenizer.json"} <= copied
    unchecked = any("processor was copied unchecked" in said for said in report.warnings)
    assert unchecked == (find_spec("torchvision") is None)


def test_other_classes_and_language_models_are_refused(tmp_path):
    source, model = make("llava", tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["LlavaModel"]}))
    with pytest.raises(MQAError, match="it is a LlavaModel, and only LlavaForConditionalGeneration is supported"):
        convert(source, tmp_path / "ours", target="native")
    with pytest.raises(MQAError, match="it is a LlavaModel, and only"):
        convert(model.model, target="native")
    fused = {key: value for key, value in TEXT.items() if key != "head_dim"} | {"model_type": "phi3"}
    (source / "config.json").write_text(json.dumps(config | {"text_config": fused}))
    with pytest.raises(MQAError, match="language model, a phi3, has no separate key and value projections"):
        convert(source, tmp_path / "ours", target="native")
    heads = {"model_type": "gpt_neox", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    (source / "config.json").write_text(json.dumps(config | {"text_config": heads}))
    with pytest.raises(MQAError, match="language model, a gpt_neox, has as many key/value heads as query heads"):
        convert(source, tmp_path / "ours", target="native")
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(MQAError, match="is multimodal, and only models of text and of pairs of texts are trained"):
        uptrain(source, tmp_path / "trained", dataset="none.txt", tokens=500, teacher="none")


@pytest.mark.parametrize("kind", sorted(IMAGE_TEXT))
def test_only_keys_and_values_depend_on_the_heads(kind):
    """Of each class, with the configuration that transformers gives it."""
    need(kind)
    config = AutoConfig.for_model(kind)
    heads = config.get_text_config(decoder=True).num_key_value_heads
    try:
        own = own_class(Source("source", Path(), None, config, {}), 1)
    except ConversionError as error:  # the defaults of some classes contradict each other in some versions
        assert kind in ("aya_vision", "idefics3", "smolvlm")
        pytest.skip(str(error))
    assert (own.config.num_key_value_heads, own.pooled.num_key_value_heads) == (heads, 1)
    assert own.output.get_text_config(decoder=True).num_key_value_heads == 1
