"""What a checkpoint says of how it was made is true."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sources import LLAMA, make_model, save
from tokenizer import write_tokenizer
from typer.testing import CliRunner

from mqa_hf import convert, inspect
from mqa_hf.base.errors import MQAError
from mqa_hf.cli import app
from mqa_hf.conversion.record import ConversionRecord, Latent
from mqa_hf.finetune.uptrain import original_of, uptrain

FIT = {"calibration_tokens": 512, "sequence_length": 16}
METHODS = [
    {},
    {"kv_heads": 2, "dtype": "bfloat16"},
    {"method": "first", "window": 5},
    {"method": "random", "seed": 3},
    {"method": "mean", "refit": True, "seed": 4, **FIT},
    {"method": "random", "refit": True, "seed": 7, **FIT},
    {"method": "shared", "seed": 5, **FIT},
    {"method": "shared", "refit": False, "seed": 6, "head_width": 1.5, **FIT},
    {"method": "shared", "cache_budget": "40%", **FIT},
    {"method": "latent", "latent": 32, "key_width": 16, "latent_bits": 4, "fit_steps": 3, "seed": 8, **FIT},
    {"target": "native", "max_shard_size": "40KB"},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A source with a tokenizer, and text of two kinds."""
    root = tmp_path_factory.mktemp("record")
    write_tokenizer(save(make_model("llama", LLAMA), root / "source"))
    words = ["one key", "and one value", "for all heads", "of a layer", "are read"]
    rows = [" ".join(words[(i * k) % 5] for k in range(1, 30)) for i in range(90)]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return root


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_the_recorded_command_makes_the_same_weights_again(options, home, tmp_path):
    if options.get("calibration_tokens"):
        options = {**options, "calibration": str(home / "text.jsonl")}
    report = convert(home / "source", tmp_path / "first", **options)
    words = shlex.split(report.command.replace("OUTPUT", str(tmp_path / "again")))
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, result.output
    first, again = weights(tmp_path / "first"), weights(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert json.loads((tmp_path / "again" / "conversion.json").read_text())["options"] == report.options


@pytest.mark.parametrize(
    ("options", "refitted"),
    [
        ({}, False),
        ({"refit": True}, True),
        ({"method": "shared"}, True),
        ({"method": "shared", "refit": False}, False),
    ],
    ids=str,
)
def test_it_says_whether_outputs_were_refitted_and_what_a_loss_was_measured_on(options, refitted, home, tmp_path):
    text = str(home / "text.jsonl")
    calibrated = options and {**options, "calibration": text, **FIT}
    report = convert(home / "source", tmp_path / "ours", **(calibrated or {}))
    assert report.options["refit"] is refitted
    card = (tmp_path / "ours" / "README.md").read_text()
    assert ("refitted" in card) is refitted
    if calibrated:
        measured = report.held_out_loss
        assert (measured.text, measured.tokens) == (text, 2 * 15)  # two rows of 16, whose first is not predicted
        assert f"{measured.tokens} other tokens" in card.replace("\n", " ")
        shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "ours")], terminal_width=300).output
        assert "30 tokens of" in shown


def test_a_latent_is_said_in_place_of_heads(home, tmp_path):
    """Three layers of 32 numbers at 4 bits, 16 bytes and two 16-bit numbers for scale and offset."""
    options = {"method": "latent", "latent": 32, "key_width": 16, "latent_bits": 4, "fit_steps": 3, **FIT}
    report = convert(home / "source", tmp_path / "ours", calibration=str(home / "text.jsonl"), **options)
    latent = {"width": 32, "bits": 4, "heads": 6, "key_components": 16}
    assert {name: found.model_dump() for name, found in report.latents.items()} == {"decoder": latent}
    assert ConversionRecord.read(tmp_path / "ours") == report
    assert report.kv_bytes_per_token.after == 3 * (16 + 4)
    said = "one latent of 32 numbers at 4 bits, 16 rebuilt key components"
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "# source with one latent for all heads" in card
    assert f"| key/value heads | 6 | {said} |" in card
    assert "| cache, bytes per token (16 bit, latents 4) | 576 | 60 |" in card
    assert "nats per token. No training has followed.\n" in card
    assert "and trained for 3 steps on the layer's own output" in card
    assert f"{report.held_out_loss.before:.3f} to {report.held_out_loss.after:.3f}" in card
    found = inspect(tmp_path / "ours")
    assert found["latents"] == {"decoder": latent}
    assert found["kv_bytes_per_token"] == {"now": 60}
    assert found["reason"] == f"it is a conversion of {home / 'source'}"
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "ours")], terminal_width=300).output
    assert f"{said}, of 6 heads" in " ".join(shown.split())
    assert "num key value heads" not in shown
    (tmp_path / "ours" / "conversion.json").unlink()
    found = inspect(tmp_path / "ours")
    assert found["reason"] == "it has a latent in place of keys and values; convert the original instead"
    with pytest.raises(MQAError, match="it has a latent in place of keys and values"):
        convert(tmp_path / "ours", tmp_path / "again")


def test_sizes_of_layers_are_said_as_a_span():
    latent = Latent(width=[32, 64, 64], bits=16, heads=4, key_components=[0, 1024, 8])
    assert latent.in_words() == "one latent of 32 to 64 numbers, 0 to 1,024 rebuilt key components"
    assert latent.name == "latent 32 to 64, keys 0 to 1,024"
    assert Latent(width=[32, 32], bits=8, heads=4).in_words() == "one latent of 32 numbers at 8 bits"


def train(home: Path, student: Path, output: Path, teacher: str) -> None:
    text = str(home / "text.jsonl")
    data = {"dataset": text, "validation": text, "validation_tokens": 64}
    how = {"tokens": 256, "sequence_length": 16, "batch_tokens": 128, "report_to": "none"}
    uptrain(student, output, teacher=teacher, **data, **how)


def test_a_trained_checkpoint_says_so_and_keeps_the_code_that_it_came_with(home, tmp_path):
    convert(home / "source", tmp_path / "ours")
    code = tmp_path / "ours" / "attention_mqa.py"
    code.write_text(code.read_text() + "\n# changed by hand\n")
    train(home, tmp_path / "ours", tmp_path / "trained", str(home / "source"))
    for path in (tmp_path / "ours").glob("*.py"):
        assert path.read_bytes() == (tmp_path / "trained" / path.name).read_bytes(), path.name
    result = inspect(tmp_path / "trained")
    assert result["conversion"]["source"] == str(home / "source")
    assert result["training"]["tokens"] == 256
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "trained")], terminal_width=200).output
    assert "256 tokens" in shown
    assert "kl on validation text" in shown
    assert inspect(tmp_path / "ours")["training"] is None
    (tmp_path / "trained" / "uptraining.json").write_text('{"tokens": 256}')
    with pytest.raises(MQAError, match=r"uptraining\.json .*: command: field required, validation: field required"):
        inspect(tmp_path / "trained")


def test_a_model_that_was_trained_and_never_converted_can_be_inspected(home, tmp_path):
    train(home, home / "source", tmp_path / "trained", "none")
    result = inspect(tmp_path / "trained")
    assert result["conversion"] is None
    assert result["training"]["tokens"] == 256
    assert "was trained from" in result["reason"]
    assert CliRunner().invoke(app, ["inspect", str(tmp_path / "trained")]).exit_code == 0


def test_a_student_that_was_never_converted_is_said_before_anything_runs(home, tmp_path):
    with pytest.raises(MQAError, match=r"has no source in conversion.json.*`teacher` none"):
        original_of(home / "source")
    words = ["uptrain", str(home / "source"), str(tmp_path / "out"), "--dataset", str(home / "text.jsonl")]
    result = CliRunner().invoke(app, [*words, "--tokens", "128"])
    assert isinstance(result.exception, MQAError)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_that_is_not_there_is_said_before_anything_runs(home, tmp_path):
    convert(home / "source", tmp_path / "ours")
    with pytest.raises(MQAError, match=r"the teacher .*gone cannot be loaded"):
        train(home, tmp_path / "ours", tmp_path / "trained", str(tmp_path / "gone"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kv_bytes_per_token": {"before": 96, "after": "few"}}, r"kv_bytes_per_token\.after: .*integer"),
        ({"layers": [{"layer": 0, "key_error": "none"}]}, r"layers\.0\.key_error: .*number"),
        ({"layers": 2}, r"layers: .*list"),
        ({"command": None}, r"command: .*string"),
        ({"version": 99}, r"has version 99, but this mqa-hf reads 1 at most"),
    ],
    ids=str,
)
def test_a_record_with_a_wrong_field_is_one_message_with_file_and_field(change, match, home, tmp_path):
    convert(home / "source", tmp_path / "ours")
    path = tmp_path / "ours" / "conversion.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for read in (inspect, ConversionRecord.read):
        with pytest.raises(MQAError, match=rf"conversion\.json .*{match}") as caught:
            read(tmp_path / "ours")
        assert len(str(caught.value).splitlines()) == 1
