"""Models of this package's own classes, trained with all their heads, are sources like any other."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from mqa_hf import MQAConfig, MQAForCausalLM, MQAForConditionalGeneration, MQASeq2SeqConfig, convert, inspect
from mqa_hf.base.errors import MQAError

STACK = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.3,
}
IDS = torch.randint(0, 61, (3, 11), generator=torch.Generator().manual_seed(0))


def pooled(weight):
    """The mean of four heads, four times."""
    return weight.unflatten(0, (4, -1)).mean(0, keepdim=True).expand(4, -1, -1).flatten(0, 1)


@pytest.fixture(params=["decoder", "encoder-decoder"])
def model(request):
    if request.param == "decoder":
        return MQAForCausalLM(MQAConfig(**STACK)).eval()
    stack = {**STACK, "position_embedding": "relative"}
    encoder, decoder = {**stack, "causal": False}, {**stack, "cross_num_key_value_heads": 4}
    return MQAForConditionalGeneration(MQASeq2SeqConfig(encoder=encoder, decoder=decoder)).eval()


def logits(model):
    more = {"decoder_input_ids": IDS[:, :7]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def load(model, directory):
    auto = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(directory).eval()


def test_with_all_heads_it_is_the_same_and_with_one_the_mean(model, tmp_path):
    model.save_pretrained(tmp_path / "source")
    assert inspect(tmp_path / "source")["convertible"]
    convert(tmp_path / "source", tmp_path / "same", kv_heads=4)
    assert torch.equal(logits(load(model, tmp_path / "same")), logits(model))
    convert(tmp_path / "source", tmp_path / "mean")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("k_proj" in name or "v_proj" in name) and "encoder.layers" not in name:
                parameter.copy_(pooled(parameter))
    mean = load(model, tmp_path / "mean")
    assert mean.config.kv_bytes_per_token * 4 == model.config.kv_bytes_per_token
    torch.testing.assert_close(logits(mean), logits(model), atol=1e-5, rtol=1e-5)


def test_what_cannot_become_fewer_is_said(tmp_path):
    MQAForCausalLM(MQAConfig(**STACK, qk_head_dim=16)).save_pretrained(tmp_path / "wide")
    with pytest.raises(MQAError, match=r"heads are 16 wide; only heads of head_dim \(8\)"):
        convert(tmp_path / "wide", tmp_path / "output")
    said = inspect(tmp_path / "wide")
    assert (said["convertible"], said["kv_bytes_per_token"]) == (False, {"now": 2 * 2 * 4 * (16 + 8)})
    MQAForCausalLM(MQAConfig(**STACK, qk_head_dim=[8, 8])).save_pretrained(tmp_path / "listed")
    assert inspect(tmp_path / "listed")["convertible"]
    MQAForCausalLM(MQAConfig(**STACK)).save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sinks": 3}))
    with pytest.raises(MQAError, match=r"unknown switches in config\.json: sinks"):
        convert(tmp_path / "source", tmp_path / "output")
    assert not inspect(tmp_path / "source")["convertible"]
