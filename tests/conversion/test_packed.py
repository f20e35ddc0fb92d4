"""gpt-oss in MXFP4, and the layers of published files that no class loads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from sources import EXPERTS, largest_difference, make_model, mixture_of, need, save
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mqa_hf import convert
from mqa_hf.base.errors import MQAError

SIZES = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 6}
QUANTISED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


@pytest.fixture
def packed(tmp_path):
    """The directory of a model whose experts are packed, and the model with them unpacked by transformers."""
    need("gpt_oss")
    model = make_model("gpt_oss", {**mixture_of(EXPERTS["gpt_oss"]), **SIZES}).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    packed, state = {}, model.state_dict()
    for name in [n for n in state if n.endswith(("gate_up_proj", "down_proj"))]:
        E, inputs, outputs = state[name].shape
        shape = (E, outputs, inputs // 32)
        packed[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        packed[f"{name}_scales"] = torch.randint(121, 125, shape, dtype=torch.uint8, generator=generator)
        state[name].copy_(convert_moe_packed_tensors(packed[f"{name}_blocks"], packed[f"{name}_scales"]))
    source = save(model, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not n.endswith(("gate_up_proj", "down_proj"))}
    save_file(kept | packed, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTISED}))
    whole = save(model.float(), tmp_path / "whole")  # read again, as its frequencies were rounded to bfloat16
    return source, AutoModelForCausalLM.from_pretrained(whole, attn_implementation="eager").eval()


def test_packed_experts_are_unpacked_exactly(packed, tmp_path):
    source, theirs = packed
    convert(source, tmp_path / "ours", kv_heads=3, dtype="float32")
    assert "quantization_config" not in json.loads((tmp_path / "ours" / "config.json").read_text())
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    for (mine, gate_up), (its, expected) in zip(
        [(n, p) for n, p in ours.named_parameters() if n.endswith("gate_up_proj")],
        [(n, p) for n, p in theirs.named_parameters() if n.endswith("gate_up_proj")],
        strict=True,
    ):
        assert mine == its
        rows = expected.transpose(1, 2)
        assert torch.equal(gate_up, torch.cat((rows[:, ::2], rows[:, 1::2]), dim=1))
    difference, size = largest_difference(ours, theirs)
    assert difference <= 1e-4 < 1 < size, (difference, size)


def test_in_its_own_class_they_stay_packed(packed, tmp_path):
    source, _ = packed
    convert(source, tmp_path / "same", kv_heads=3, target="native")
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "same"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    written = json.loads((tmp_path / "same" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "mxfp4"


@pytest.mark.parametrize("target", ["mqa", "native"])
def test_scales_that_are_missing_or_do_not_fit(target, packed, tmp_path):
    source, _ = packed
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    for changed, said in (({}, f"{name} is missing"), ({name: tensors[name][:, :-1].contiguous()}, "MXFP4 has 16")):
        rest = {n: t for n, t in tensors.items() if n != name}
        save_file(rest | changed, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(MQAError, match=said):
            convert(source, tmp_path / "ours", target=target)
        assert not (tmp_path / "ours").exists()


def test_scales_that_are_no_numbers(packed, tmp_path):
    source, _ = packed
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj_scales"][0, 0, 0] = 255
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MQAError, match=r"down_proj_scales are NaN or infinite.*`allow_nonfinite`"):
        convert(source, tmp_path / "ours", dtype="float32")
    convert(source, tmp_path / "ours", dtype="float32", allow_nonfinite=True)


def test_packed_experts_that_the_configuration_does_not_know(packed, tmp_path):
    source, _ = packed
    config = json.loads((source / "config.json").read_text())
    for changed, said in (
        ({"quantization_config": None}, "no quantization_config"),
        ({"num_local_experts": 6}, "has 5 experts, and the configuration 6"),
    ):
        (source / "config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(MQAError, match=said):
            convert(source, tmp_path / "ours", target="native")


@pytest.mark.parametrize("layers", ["1", [1], -1, 1.5])
def test_a_number_of_layers_that_is_none(layers, packed, tmp_path):
    source, _ = packed
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": layers}))
    with pytest.raises(MQAError, match=r"num_nextn_predict_layers in config\.json must be a number of layers"):
        convert(source, tmp_path / "ours")


def test_the_long_factors_that_phimoe_never_uses(tmp_path):
    source = save(make_model("phimoe", mixture_of(EXPERTS["phimoe"])), tmp_path / "source")
    convert(source, tmp_path / "ours")
    assert not AutoConfig.from_pretrained(tmp_path / "ours").rope_by_length


def test_other_quantised_weights_are_refused(packed):
    source, _ = packed
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(MQAError, match="quantised"):
        convert(source, source.parent / "ours")


@pytest.mark.parametrize("target", ["mqa", "native"])
@pytest.mark.parametrize(
    ("model_type", "name"), [("glm4_moe", "model.layers.3.{}"), ("exaone_moe", "mtp.layers.0.{}")]
)
def test_layers_that_predict_further_tokens_are_left_out(model_type, name, target, tmp_path):
    theirs = make_model(model_type, mixture_of(EXPERTS[model_type]))
    source = save(theirs, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    beside = {name.format(f"self_attn.{p}_proj.weight"): tensors[f"model.layers.2.self_attn.{p}_proj.weight"].clone()
              for p in "qkvo"}  # fmt: skip
    beside[name.format("eh_proj.weight")] = torch.randn(48, 96)
    save_file(tensors | beside, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    if target == "mqa":
        (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
        with pytest.raises(MQAError, match=r"not in this configuration.*eh_proj"):
            convert(source, tmp_path / "ours", kv_heads=3)
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    convert(source, tmp_path / "ours", kv_heads=3, target=target)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    difference, _ = largest_difference(ours, theirs)
    assert difference <= 1e-4
