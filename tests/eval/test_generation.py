"""What checkpoints write, beside the original."""

import json

import pytest
import torch
import typer
from tokenizer import write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from mqa_hf.conversion import convert
from mqa_hf.eval.generation import first_choices, main, repetition


def test_the_original_agrees_with_itself_and_a_pooled_model_less(tmp_path):
    config = LlamaConfig(
        vocab_size=93,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "source")
    write_tokenizer(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "same", kv_heads=4)
    convert(tmp_path / "source", tmp_path / "mean")
    (tmp_path / "text.txt").write_text("some words to begin with, and more of them " * 20)
    app = typer.Typer()
    app.command()(main)
    words = [str(tmp_path / name) for name in ("source", "same", "mean")]
    words += ["--text", str(tmp_path / "text.txt"), "--prompts", "6", "--prompt-tokens", "8", "--tokens", "12"]
    result = CliRunner().invoke(app, [*words, "--device", "cpu", "--output", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    source, same, mean = json.loads((tmp_path / "out.json").read_text())
    for one in (source, same):
        assert one["agreeing_tokens"] == 12
        assert one["same_first_choice"] == 1
        assert one["chrf"] == pytest.approx(100)
    assert mean["agreeing_tokens"] < 12
    assert mean["same_first_choice"] < 1
    assert mean["chrf"] < 100


def test_first_choices_are_those_of_the_logits():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 50, (3, 9))
    with torch.no_grad():
        expected = torch.stack([model(ids[:, :n]).logits[:, -1].argmax(-1) for n in range(4, 9)], dim=1)
    assert torch.equal(first_choices(model, ids[:, :4], ids[:, 4:]), expected)


def test_repetition_counts_what_stood_before():
    assert repetition(torch.tensor([[1, 2, 3, 4, 5, 6, 7]])) == 0
    assert repetition(torch.tensor([[1] * 7])) == pytest.approx(3 / 4)
