"""Text and numbers that are none end each command with one message."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizer import write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from mqa_hf import convert
from mqa_hf.base.errors import MQAError
from mqa_hf.cli import app

SIZES = {"vocab_size": 93, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
NO_TEXT = "has no column ('text' )?of text; its columns: text"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wrong")
    LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1)).save_pretrained(directory / "source")
    write_tokenizer(directory / "source")
    convert(directory / "source", directory / "one")
    (directory / "text.jsonl").write_text((json.dumps({"text": "some words of a text"}) + "\n") * 40)
    return directory


def lines(*cells, count=40):
    return "".join(json.dumps({"text": cell}) + "\n" for cell in cells for _ in range(count)).encode()


def parquet(cell):
    """A column of bytes that claims to be text."""
    column = pa.array([cell] * 40, pa.binary()).view(pa.string())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": column}), sink)
    return sink.getvalue().to_pybytes()


# Name of the file, what is in it, what is said.
TEXTS = {
    "numbers": ("numbers.jsonl", lines(5), NO_TEXT),
    "lists": ("lists.jsonl", lines(["a", "b"]), NO_TEXT),
    "objects": ("objects.jsonl", lines({"a": "b"}), NO_TEXT),
    "nulls": ("nulls.jsonl", lines(None), f"{NO_TEXT}|no row of 16 tokens"),
    "texts and an object": ("mixed.jsonl", lines("words", {"a": "b"}), "cannot be read|has no"),
    "another column": ("other.jsonl", b'{"body": 1}\n', r"of text; its columns: body \(int64\)"),
    "no UTF-8 in plain text": ("latin.txt", b"some w\xf6rds " * 40, "latin.txt is not UTF-8 at byte 6; save it"),
    "half of UTF-16": ("half.txt", "words".encode("utf-16")[:-1], "half.txt is not UTF-16 at byte 10"),
    "no UTF-8 in JSON": ("latin.jsonl", lines("some words").replace(b"words", b"w\xf6rds"), "cannot be read"),
    "no UTF-8 in parquet": ("latin.parquet", parquet(b"some w\xf6rds of a text"), "cannot be read"),
    "no parquet": ("broken.parquet", b"PAR1", "cannot be read"),
    "no JSON": ("broken.jsonl", b'{"text": "a"', "cannot be read"),
    "nothing": ("empty.jsonl", b"", "is empty"),
    "no rows": ("rows.csv", b"text\n", "cannot be read|no row of 16 tokens|has no rows|has no column"),
    "a directory": ("directory.jsonl", None, "is a directory; give a file"),
}
QUICK = ("--sequence-length", "16", "--batch-tokens", "32", "--tokens", "64", "--report-to", "none")
PRETRAIN = ("--config", json.dumps({"model_type": "llama", **SIZES, "num_hidden_layers": 1, "vocab_size": 300}))
COMMANDS = {
    "uptrain": ("uptrain", "one", "OUTPUT", *QUICK, "--dataset"),
    "uptrain, streaming": ("uptrain", "one", "OUTPUT", *QUICK, "--streaming", "--dataset"),
    "pretrain": ("pretrain", "OUTPUT", *PRETRAIN, *QUICK, "--vocab-size", "300", "--dataset"),
    "convert": ("convert", "source", "OUTPUT", "--method", "shared", "--sequence-length", "16", "--calibration"),
    "evaluate": ("evaluate", "source", "one", "--output", "OUTPUT", "--window", "16", "--text"),
}


def refused(place, words, message):
    """The command fails with the message, and writes no checkpoint."""
    names = {"OUTPUT": place / "output", "one": place / "one", "source": place / "source"}
    result = CliRunner().invoke(app, [str(names.get(word, word)) for word in words])
    assert isinstance(result.exception, MQAError), f"{result.exception!r}\n{result.output}"
    assert re.search(message, str(result.exception)), str(result.exception)
    assert "Traceback" not in str(result.exception)
    assert not (place / "output" / "config.json").exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("text", TEXTS)
def test_text_that_is_none_is_said(place, tmp_path, text, command):
    name, content, message = TEXTS[text]
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    refused(place, [*COMMANDS[command], str(tmp_path / name)], message)


@pytest.mark.parametrize("command", ["uptrain", "pretrain"])
def test_validation_text_with_other_columns_is_said_by_its_own_name(place, tmp_path, command):
    (tmp_path / "other.jsonl").write_text('{"body": "words"}\n')
    words = [*COMMANDS[command], str(place / "text.jsonl"), "--validation", str(tmp_path / "other.jsonl")]
    refused(place, words, r"--validation \S+other\.jsonl has no column 'text' of text; its columns: body")


@pytest.mark.parametrize("command", COMMANDS)
def test_columns_of_other_types_hold_no_prompt_and_answer(place, tmp_path, command):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "completion": 3}) + "\n")
    columns = "--calibration-columns" if command == "convert" else "--columns"
    words = [*COMMANDS[command], str(tmp_path / "rows.jsonl"), columns, "prompt,completion"]
    refused(place, words, r"has no column 'prompt', 'completion' of text; its columns: prompt \(string\), completion")


def test_chats_need_a_tokenizer(place, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "q"}]}) + "\n")
    words = [*COMMANDS["pretrain"], str(tmp_path / "rows.jsonl"), "--columns", "messages"]
    refused(place, words, "messages hold chats, .* pass --tokenizer")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *(("weight", value, "weights above 0; got") for value in ("nan", "inf", "-1", "0")),
        *(
            ("--warmup", value, "--warmup must be a number at least 0 and below 1")
            for value in ("nan", "-0.1", "1", "inf")
        ),
        *(("--learning-rate", value, "--learning-rate must be a number above 0") for value in ("nan", "inf", "0")),
        *(("--weight-decay", value, "--weight-decay must be a number at least 0") for value in ("nan", "inf", "-1")),
        ("--seed", "-1", "--seed must be a whole number at least 0"),
        ("--loss", "kl=inf", "--loss takes .*each with a weight above 0"),
        ("--loss", "kl=nan", "--loss takes .*each with a weight above 0"),
        ("--loss", "kl=1,kl=2", "--loss takes each name once; got 'kl=1,kl=2'"),
        ("--lora-rank", "8", "--lora-rank 8 is for --train lora, not all"),
        ("--report-to", "tensorboard,none", "--report-to none cannot be combined with others; got tensorboard, none"),
        ("--tokens", str(2**50), r"--tokens must be a whole number at least 1 and below 2\*\*50"),
        ("--tokens", "10000000000000", "--tokens 10,000,000,000,000 are [0-9,]+ rows, but at most 1,073,741,824"),
        ("--batch-tokens", str(2**31), "--batch-tokens must be a whole number"),
    ],
)
def test_numbers_of_a_training_that_are_none_are_said(place, option, value, message):
    text = str(place / "text.jsonl")
    more = [f"{text}={value}"] if option == "weight" else [text, option, value]
    refused(place, [*COMMANDS["uptrain"], *more], message)


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1"])
def test_a_share_of_the_pretraining_that_is_none_is_said(place, value):
    words = ["uptrain", "one", "OUTPUT", "--dataset", str(place / "text.jsonl"), "--alpha", value]
    refused(place, [*words, "--pretraining-tokens", "1000"], "--alpha must be a number above 0")


def test_a_share_of_the_pretraining_that_no_number_holds_is_said(place):
    words = ["uptrain", "one", "OUTPUT", "--dataset", str(place / "text.jsonl"), "--alpha", "1e308"]
    refused(place, [*words, "--pretraining-tokens", "1000"], r"--alpha 1e\+308 of .* it must be below 2\*\*50")


def test_a_dry_run_refuses_more_rows_than_are_put_in_order(place):
    words = [*COMMANDS["uptrain"], str(place / "text.jsonl"), "--tokens", "10000000000000", "--dry-run"]
    refused(place, words, "--tokens 10,000,000,000,000 are [0-9,]+ rows")


def test_a_log_that_is_not_installed_is_said(place, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = [*COMMANDS["uptrain"], str(place / "text.jsonl"), "--report-to", "wandb"]
    refused(place, words, "--report-to wandb is not installed: pip install wandb")


@pytest.mark.parametrize("text", ["nosuch.jsonl", "nosuch.txt", "no/such/text"])
@pytest.mark.parametrize(
    ("command", "dry"), [*((command, False) for command in COMMANDS), ("uptrain", True), ("convert", True)]
)
def test_a_text_that_is_not_there_is_said(place, command, text, dry):
    words = [*COMMANDS[command], text]
    refused(place, words + ["--dry-run"] * dry, f"{text} does not exist")


@pytest.mark.parametrize("dry", [False, True])
def test_calibration_tokens_that_are_too_few_are_said(place, dry):
    words = [*COMMANDS["convert"], str(place / "text.jsonl"), "--calibration-tokens", "31"] + ["--dry-run"] * dry
    refused(place, words, "--calibration-tokens must be at least two sequences of 16 tokens, got 31; raise it to 32")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "0"])
@pytest.mark.parametrize("option", ["--head-width", "--key-width", "--value-width"])
def test_a_width_that_is_none_is_said(place, option, value):
    words = ["convert", "source", "OUTPUT", "--method", "shared", option, value]
    refused(place, words, "must be a number above 0; got")


@pytest.mark.parametrize("value", ["nan", "inf", "nan%", "-1", "abc"])
def test_a_cache_budget_that_is_none_is_said(place, value):
    refused(place, ["convert", "source", "OUTPUT", "--method", "shared", "--cache-budget", value], "--cache-budget")


@pytest.mark.parametrize("device", ["meta", "nowhere", "cuda:99", "mps", "hpu", "cpu:x"])
@pytest.mark.parametrize("command", [("convert", "source", "OUTPUT"), ("benchmark", "source")])
def test_a_device_that_holds_no_numbers_is_said(place, command, device):
    refused(place, [*command, "--device", device], f"--device {device}")


@pytest.mark.parametrize("command", [("convert", "source", "OUTPUT"), ("benchmark", "source")])
def test_a_machine_without_cuda_is_said(place, command, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(place, [*command, "--device", "cuda"], "--device cuda: PyTorch sees no CUDA device; use --device cpu")
