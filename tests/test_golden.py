"""One small job, end to end, against numbers that were written down: a change of structure cannot move them unseen.

The source's weights are small integers over powers of two, so every machine makes the same ones, and means of 2 and 4
heads are exact. Whoever changes on purpose what is computed puts in the new numbers, which the failing test shows.
"""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from mqa_hf.cli import app

WORDS = ["the query", "reads one key", "and one value", "for all heads", "of the layer"]

KEY = [133, -300, 257, 7, 16, -40]  # 1,024 times the first values of the second layer's key head
TRAINING = {
    "lm": [5.41742, 5.3595, 5.6174, 5.27072],
    "kl": [1.02196, 0.954301, 0.815755, 0.815679],
    "hidden": [0.247356, 0.235594, 0.214434, 0.215613],
    "grad_norm": [1.26031, 1.31575, 1.20193, 0.850307],
    "attention": [0.932764, 0.906405, 0.916056, 0.848195],
}
# Nats a token, bits a byte, nats from the original
EVALUATION = {
    "source": [5.63393, 8.12805, 0],
    "mean": [5.47599, 7.90019, 1.0944],
    "trained": [5.43099, 7.83526, 0.794225],
}
PROMPTS = [
    [26, 91, 67, 54, 80, 56, 65, 58],
    [24, 80, 41, 20, 26, 80, 68, 30],
    [23, 87, 70, 4, 22, 72, 8, 43],
]
CONTINUATIONS = [
    [50, 60, 10, 21, 81, 55, 55, 70, 86, 86],
    [55, 17, 60, 5, 3, 21, 81, 55, 47, 85],
    [85, 87, 89, 24, 76, 33, 28, 89, 24, 76],
]


@torch.no_grad()
def write_source(directory: Path) -> dict[str, torch.Tensor]:
    """A Llama of two layers and four heads, with a tokenizer; returned are its weights."""
    shape = {"vocab_size": 93, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, tie_word_embeddings=False))
    draw = np.random.RandomState(0)  # whose numbers numpy promises never to change
    for name, weight in sorted(model.named_parameters()):
        integers = torch.from_numpy(draw.randint(-128, 128, weight.shape)).float()
        weight.copy_(integers / (32 if "embed" in name else 256) if weight.ndim > 1 else 1 + integers / 1024)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def run(*words) -> None:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The weights of a source, and where it, its conversion and what was trained of that are."""
    home = tmp_path_factory.mktemp("golden")
    weights = write_source(home / "source")
    text = home / "text.jsonl"
    rows = [" ".join(WORDS[(i * k) % 5] for k in range(1, 9)) for i in range(120)]
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    run("convert", home / "source", home / "mean")
    schedule = "--tokens 1024 --attention-tokens 512 --sequence-length 16 --batch-tokens 128 --micro-batch 4"
    schedule += " --learning-rate 0.003 --loss kl=1,hidden=0.5 --log-every 1 --report-to none --workers 0 --no-bf16"
    run("uptrain", home / "mean", home / "trained", "--dataset", text, *shlex.split(schedule))
    run("evaluate", home / "source", home / "mean", home / "trained", "--output", home / "evaluation", "--text", text,
        *shlex.split("--tokens 500 --window 16 --prompts 0"))  # fmt: skip
    return home, weights


def test_a_mean_head_is_the_mean_exactly_and_all_else_is_the_source(job):
    home, source = job
    found = load_file(home / "mean" / "model.safetensors")
    assert found.keys() == source.keys()
    for name, weight in source.items():
        pooled = name.endswith(("k_proj.weight", "v_proj.weight"))
        expected = weight.view(4, 8, 32).double().mean(0).float() if pooled else weight
        assert torch.equal(found[name], expected), name
    key = found["model.layers.1.self_attn.k_proj.weight"]
    assert (1024 * key[0, :6]).tolist() == KEY


def test_losses_of_training(job):
    home, _ = job
    log = json.loads((home / "trained" / "uptraining.json").read_text())["log"]
    found = {
        name: [line[name] for line in log["main"] if name in line] for name in ("lm", "kl", "hidden", "grad_norm")
    }
    found["attention"] = [line["attention"] for line in log["attention"] if "attention" in line]
    assert found == {name: pytest.approx(values, rel=1e-3) for name, values in TRAINING.items()}


def test_numbers_of_an_evaluation(job):
    home, _ = job
    checkpoints = json.loads((home / "evaluation" / "evaluation.json").read_text())["checkpoints"]
    found = {one["name"]: [one["next_token"][name] for name in ("loss", "bits_per_byte", "kl")] for one in checkpoints}
    assert found == {name: pytest.approx(values, rel=1e-3) for name, values in EVALUATION.items()}


@pytest.mark.parametrize("name", ["mean", "trained"])
def test_greedy_tokens(name, job):
    """Of prompts after which no second token is near the first, so that rounding cannot change a choice."""
    home, _ = job
    model = AutoModelForCausalLM.from_pretrained(home / name).eval()
    tokens = model.generate(torch.tensor(PROMPTS), max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert tokens[:, 8:].tolist() == CONTINUATIONS
    with torch.no_grad():
        first, second = model(tokens).logits[:, 7:-1].topk(2).values.unbind(-1)
    assert (first - second).min() > 0.15
