"""A small model from scratch, in the class and with the tokenizer that it is asked for."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mqa_hf.conversion import convert
from mqa_hf.finetune.pretrain import pretrain

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "tie_word_embeddings": True,
}


def test_a_small_model_learns_its_text_and_can_be_converted(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("all work and no play makes a dull model. " * 400)
    options = {"config": CONFIG, "text": str(text), "validation": str(text), "vocab_size": 300}
    options |= {"sequence_length": 32, "batch_tokens": 256}
    short = pretrain(tmp_path / "short", tokens=256, **options)
    long = pretrain(tmp_path / "long", tokens=256 * 60, learning_rate=1e-2, **options)
    assert long["tokens"] == 256 * 60
    assert long["loss"] < short["loss"] - 1
    again = pretrain(tmp_path / "again", tokens=256, **options)
    assert again == pytest.approx(short)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "long")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "long")
    assert type(model).__name__ == "LlamaForCausalLM"
    ids = tokenizer("all work and no play", return_tensors="pt").input_ids
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert loss < long["loss"] + 1.5
    report = convert(tmp_path / "long", tmp_path / "ours", method="shared", calibration=text, sequence_length=32)
    assert report["num_key_value_heads"] == {"before": 4, "after": 1}
