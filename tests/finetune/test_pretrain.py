"""A small model from scratch, in the class and with the tokenizer that it is asked for."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from typer.testing import CliRunner

from mqa_hf import convert
from mqa_hf.base.errors import MQAError
from mqa_hf.cli import app
from mqa_hf.finetune.architecture import build, widened
from mqa_hf.finetune.pretrain import pretrain, read_config
from mqa_hf.finetune.tokenizer import train_tokenizer

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "tie_word_embeddings": True,
}
STACK = {k: v for k, v in CONFIG.items() if k not in ("model_type", "tie_word_embeddings")} | {
    "num_key_value_heads": 1
}
ENCODER_DECODER = {
    "model_type": "mqa_seq2seq",
    "encoder": {**STACK, "causal": False},
    "decoder": {**STACK, "cross_num_key_value_heads": 1},
    "share_embeddings": True,
    "tie_word_embeddings": True,
}
SHORT = {"sequence_length": 32, "batch_tokens": 256, "report_to": "none"}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("all work and no play makes a dull model. " * 400)
    return str(path)


def test_a_small_model_learns_its_text_and_can_be_converted(tmp_path, text):
    data = {"dataset": text, "validation": text, "validation_tokens": 1024, "vocab_size": 300}
    short = pretrain(tmp_path / "short", config=CONFIG, **data, tokens=256, **SHORT)
    long = pretrain(tmp_path / "long", config=CONFIG, **data, tokens=256 * 60, learning_rate=1e-2, **SHORT)
    assert long.tokens == 256 * 60
    assert long.loss < short.loss - 1
    again = pretrain(tmp_path / "again", config=json.dumps(CONFIG), **data, tokens=256, **SHORT)
    assert again.loss == pytest.approx(short.loss)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "long")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "long")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.use_cache
    ids = tokenizer("all work and no play", return_tensors="pt").input_ids
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert loss < long.loss + 1.5
    report = convert(tmp_path / "long", tmp_path / "ours", method="shared", calibration=text, sequence_length=32)
    assert report.num_key_value_heads.model_dump() == {"before": 4, "after": 1}


def test_weights_are_written_as_asked(tmp_path, text):
    given = {"config": CONFIG, "dataset": text, "vocab_size": 300, "tokens": 512, **SHORT}
    for dtype in ("float32", "float16"):
        pretrain(tmp_path / dtype, **given, dtype=dtype)
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("float32", "float16"))
    assert all(torch.equal(rounded[name], weight.half()) for name, weight in exact.items())
    with pytest.raises(MQAError, match="`dtype` must be one of float32, float16, bfloat16; got 'int8'"):
        pretrain(tmp_path / "none", **given, dtype="int8")
    assert not (tmp_path / ".none.pretrain").exists()


@pytest.mark.parametrize(
    "config",
    [
        {**STACK, "model_type": "mqa", "num_key_value_heads": 2, "position_embedding": "learned"},
        {**STACK, "model_type": "mqa", "layer_types": ["sliding_attention"], "sliding_window": 8},
        {**STACK, "model_type": "mqa", "num_attention_heads": 2, "head_dim": 32, "qk_head_dim": 64},
    ],
    ids=["learned positions", "window", "fewer, wider heads"],
)
def test_every_canonical_configuration_can_be_trained(tmp_path, text, config):
    pretrain(tmp_path / "out", config=config, dataset=text, vocab_size=300, tokens=512, **SHORT)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for name, value in config.items():
        assert getattr(model.config, name) == value
    assert (tmp_path / "out" / "modeling_mqa.py").is_file()


def test_a_model_with_capped_attention_trains_with_its_cap(tmp_path):
    tokenizer = train_tokenizer(["some text"], 300)
    model = build({**CONFIG, "model_type": "gemma2", "head_dim": 8, "attn_logit_softcapping": 1.0}, tokenizer)
    assert model.config._attn_implementation != "sdpa"  # which ignores the cap in some versions of transformers


@pytest.mark.parametrize("kind", ["translation", "spans"])
def test_an_encoder_decoder_model_is_trained_on_pairs_and_on_hidden_spans(tmp_path, text, kind):
    rows = [{"en": f"word {i} of text", "de": f"Wort {i} im Text"} for i in range(80)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, columns = (str(tmp_path / "pairs.jsonl"), ("en", "de")) if kind == "translation" else (text, ())
    data = {"dataset": source, "columns": columns, "validation": source, "vocab_size": 420}
    how = {"tokens": 256 * 30, "learning_rate": 5e-3, **SHORT}
    report = pretrain(tmp_path / "out", config=ENCODER_DECODER, **data, **how)
    measured = [line["eval_lm"] for line in report.log if "eval_lm" in line]
    assert measured[-1] < measured[0] - 1
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer("word 3 of text", return_tensors="pt")
    assert inputs.input_ids[0, -1] == tokenizer.eos_token_id
    written = model.generate(**inputs, max_new_tokens=8)
    assert written[0, 0] == tokenizer.pad_token_id == model.config.decoder_start_token_id


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nonesuch"}, "is not a valid configuration"),
        ({**CONFIG, "vocab_size": 10}, "has vocab_size 10, but the tokenizer"),
        ({**CONFIG, "num_attention_heads": 5}, "is not a valid configuration|divisible|multiple"),
        ({**CONFIG, "num_hidden_layer": 2}, "llama has no num_hidden_layer; did you mean num_hidden_layers"),
        ({**ENCODER_DECODER, "encoder": {**STACK, "causal": False, "heads": 2}}, "mqa has no heads"),
        ({**CONFIG, "num_hidden_layers": 5_000_000_000}, "num_hidden_layers is 5,000,000,000, more layers than any"),
        ({**CONFIG, "intermediate_size": 10**13}, "gives a model of 960,000,000,013,312 parameters"),
        ({**CONFIG, "intermediate_size": 10**30}, "cannot be built"),
        ({**CONFIG, "hidden_act": "nonesuch"}, "cannot be built: .*nonesuch"),
        ({**CONFIG, "rms_norm_eps": float("nan")}, "NaN is not a number"),
        ({**CONFIG, "hidden_act": {1, 2}}, "is not JSON"),
        ({"hidden_size": 32}, "needs a model_type"),
        ({"model_type": "whisper"}, "whisper is a speech model"),
        ({"model_type": "llava"}, "cannot be built"),
    ],
)
def test_a_configuration_that_is_none_is_said(tmp_path, text, config, message):
    with pytest.raises(MQAError, match=message):
        pretrain(tmp_path / "out", config=config, dataset=text, vocab_size=300, tokens=256, **SHORT)
    assert not (tmp_path / "out").exists()


def test_feed_forward_layers_are_widened_to_equal_parameters(tmp_path):
    tokenizer = train_tokenizer(["some text"], 300)
    multi_head = {**CONFIG, "num_key_value_heads": 4}
    multi_query = {**CONFIG, "num_key_value_heads": 1}
    wide = widened(multi_query, multi_head, tokenizer)
    # 2 matrices of 32 x 24 are gone; 3 of 32 x f come, and f is a multiple of 8.
    assert wide["intermediate_size"] == 48 + 16
    assert multi_query["intermediate_size"] == 48
    with pytest.raises(MQAError, match="the width of its feed-forward"):
        widened({"model_type": "llama"}, multi_head, tokenizer)


def test_a_name_a_file_or_json_is_a_configuration(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert read_config(str(tmp_path / "config.json")) == CONFIG
    assert read_config(json.dumps(CONFIG)) == CONFIG
    assert read_config("shazeer-2019")["num_heads"] == 8
    assert read_config(json.dumps({**CONFIG, "name": "long/" * 100}))["hidden_size"] == 32
    (tmp_path / "latin.json").write_bytes(b'{"model_type": "w\xf6rd"}')
    deep = "[" * 100_000
    for wrong in ("{", "[]", "nothing", "long" * 2000, deep, str(tmp_path), str(tmp_path / "latin.json")):
        with pytest.raises(MQAError, match="`config`"):
            read_config(wrong)


def test_the_command_refuses_what_is_there_and_goes_on_with_what_is_not_done(tmp_path, text, monkeypatch):
    words = [
        "pretrain",
        str(tmp_path / "out"),
        "--config",
        json.dumps(CONFIG),
        "--dataset",
        text,
        "--vocab-size",
        "300",
    ]
    words += ["--tokens", "2048", "--sequence-length", "32", "--batch-tokens", "256", "--report-to", "none"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "parameters, 2,048 tokens" in result.stdout
    assert isinstance(CliRunner().invoke(app, words).exception, MQAError)
    assert CliRunner().invoke(app, [*words, "--overwrite"]).exit_code == 0
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("mine")
    words[1] = str(tmp_path / "own")
    assert isinstance(CliRunner().invoke(app, [*words, "--overwrite"]).exception, MQAError)
    assert (tmp_path / "own" / "thesis.txt").read_text() == "mine"
