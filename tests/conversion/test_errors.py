"""Bad input ends with one clear message, leaves what was there, and leaves nothing half-written."""

import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sources import LLAMA, make_model, save
from typer.testing import CliRunner

import mqa_hf.conversion.converter as converter
import mqa_hf.conversion.pooling as pooling
from mqa_hf import convert
from mqa_hf.base.errors import MQAError
from mqa_hf.cli import app


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original")
    model = make_model("llama", LLAMA)
    save(model, root / "one")
    save(model, root / "sharded", max_shard_size="40KB")
    return root


@pytest.fixture
def source(original, tmp_path):
    return Path(shutil.copytree(original / "one", tmp_path / "source"))


@pytest.fixture
def sharded(original, tmp_path):
    return Path(shutil.copytree(original / "sharded", tmp_path / "source"))


def refused(source, match, **options):
    """The conversion fails with this message and the directory of the output stays as it was."""
    output = Path(source).parent / "output"
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} if output.exists() else None
    others = set(output.parent.iterdir())
    with pytest.raises(MQAError, match=match):
        convert(source, output, **options)
    if before is None:
        assert not output.exists()
    else:
        assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert set(output.parent.iterdir()) == others


def edit_config(source, **fields):
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_weights(source, change):
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def test_heads_that_do_not_divide(source):
    refused(source, r"`kv_heads` must divide the source's 6 .*got 4; use one of 1, 2, 3, 6", kv_heads=4)


def test_more_heads_than_the_source_has(source):
    refused(source, "`kv_heads` must divide .* got 12", kv_heads=12)


@pytest.mark.parametrize(
    ("option", "value"), [("method", "median"), ("target", "vllm"), ("dtype", "float8"), ("max_shard_size", "many")]
)
def test_an_option_that_is_none_of_its_values(source, option, value):
    refused(source, f"`{option}` .*{value}", **{option: value})


@pytest.mark.parametrize("size", [10**9, 10**30])
def test_sizes_that_no_tensor_has(source, size):
    edit_config(source, vocab_size=size, intermediate_size=size, hidden_size=size, head_dim=size)
    refused(source, "llama model that cannot be built|refuses")


def test_an_unknown_family(source):
    edit_config(source, model_type="lama")
    refused(source, "unsupported model type 'lama'; supported are afmoe, apertus, arcee")


def test_a_converted_checkpoint_as_the_source(source, tmp_path):
    convert(source, tmp_path / "ours")
    with pytest.raises(MQAError, match="already a converted checkpoint"):
        convert(tmp_path / "ours", tmp_path / "again")


def test_a_switch_that_nothing_reads(source):
    edit_config(source, attention_sink_size=4)
    refused(source, "attention_sink_size=4.*`ignore_switch`")
    convert(source, source.parent / "output", ignore_switch=["attention_sink_size"])


def test_a_switch_without_a_canonical_equivalent(tmp_path):
    source = save(make_model("olmoe", {**LLAMA, "num_experts": 4, "clip_qkv": 8.0}), tmp_path / "source")
    refused(source, "clip_qkv=8.0 is not supported")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rope_theta": "x"}, "rope_theta is the string 'x', not a number"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "rope_parameters.factor is the string '2'"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan, not a finite number"),
        ({"rope_parameters": {"rope_theta": math.inf}}, "rope_parameters.rope_theta is inf, not a finite number"),
        ({"time_step_limit": [0.0, math.nan]}, "time_step_limit is nan"),
    ],
)
def test_a_configuration_with_numbers_that_are_none(source, fields, said):
    edit_config(source, **fields)
    refused(source, f"config.json: {said}")


def test_quantised_weights(source):
    edit_config(source, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(source, "quantised")


def test_a_missing_tensor(source):
    edit_weights(source, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(source, r"missing for: model\.layers\.1\.mlp\.up_proj\.weight")


def test_a_tensor_that_no_rule_claims(source):
    edit_weights(source, lambda tensors: tensors.update({"model.layers.1.adapter.weight": torch.zeros(3)}))
    refused(source, r"not in this configuration: model\.layers\.1\.adapter\.weight")


def test_a_layer_too_many(source):
    edit_config(source, num_hidden_layers=2)
    refused(source, r"not in this configuration: model\.layers\.2\.")


def test_a_bias_that_the_configuration_does_not_have(source):
    edit_weights(source, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}))
    refused(source, r"not in this configuration: model\.layers\.0\.self_attn\.q_proj\.bias")


def test_a_misshapen_tensor(source):
    edit_weights(
        source, lambda tensors: tensors.update({"model.layers.0.self_attn.k_proj.weight": torch.ones(40, 48)})
    )
    refused(source, r"model\.layers\.0\.self_attn\.k_proj\.weight has the shape \[40, 48\]")


def test_a_fused_tensor_that_does_not_split(tmp_path):
    source = save(
        make_model("gpt2", {"vocab_size": 101, "n_embd": 48, "n_layer": 1, "n_head": 6}), tmp_path / "source"
    )
    name = "transformer.h.0.attn.c_attn.weight"
    edit_weights(source, lambda tensors: tensors.update({name: torch.ones(48, 100)}))
    refused(source, r"c_attn\.weight has the shape \[48, 100\]")


@pytest.mark.parametrize("size", [4, 100, -1000])
def test_a_truncated_file(source, size):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(source, r"model\.safetensors is truncated or corrupted")


def test_a_corrupted_header(source):
    path = source / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[10:20] = b"##########"
    path.write_bytes(data)
    refused(source, r"model\.safetensors is truncated or corrupted")


def test_a_shard_that_is_not_there(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(sharded, f"names missing shards: {shard.name}")


def test_an_index_that_names_more_than_the_shards_hold(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = sorted(set(index["weight_map"].values()))[0]
    path.write_text(json.dumps(index))
    refused(sharded, r"index names tensors that its shards do not contain: model\.extra")


def test_shards_that_hold_more_than_the_index_names(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    refused(sharded, r"that the index does not name: model\.norm\.weight")


def test_an_index_that_leads_outside(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    refused(sharded, "outside its own directory")


def test_an_index_that_is_not_one(sharded):
    (sharded / "model.safetensors.index.json").write_text("[1, 2]")
    refused(sharded, "not an index of shards")


@pytest.mark.parametrize("name", ["x" * 5_000, "a\0b"], ids=["long", "zero byte"])
def test_an_index_with_names_that_no_file_can_have(sharded, name):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    refused(sharded, "not an index of shards|names missing shards")


@pytest.mark.parametrize("file", ["model.safetensors.index.json", "config.json"])
def test_json_that_nests_too_deep(sharded, file):
    (sharded / file).write_text("[" * 100_000 + "]" * 100_000)
    refused(sharded, "not an index of shards|config.json cannot be read")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_with_code_in_it(source, tmp_path):
    (source / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(tmp_path / "ran")}, source / "pytorch_model.bin")
    refused(source, r"pytorch_model\.bin is corrupted or a pickle of more than tensors")
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    refused(source, r"pytorch_model\.bin is corrupted or a pickle of more than tensors")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "odd",
    [{7: torch.ones(2)}, {"a": torch.eye(3).to_sparse()}, {"a": torch.ones(2, device="meta")}],
    ids=["integer key", "sparse", "meta"],
)
def test_a_bin_file_of_tensors_that_are_none(source, odd):
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(tensors | odd, source / "pytorch_model.bin")
    refused(source, r"pytorch_model\.bin holds tensors that are sparse, on meta or without a name: (7|a)")


def test_a_truncated_bin_file(source):
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    path = source / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-2000])
    refused(source, r"pytorch_model\.bin is truncated or corrupted")


def test_no_weights(source):
    (source / "model.safetensors").unlink()
    refused(source, "no weights in .*looked for model.safetensors")


def test_no_checkpoint(tmp_path):
    (tmp_path / "source").mkdir()
    refused(tmp_path / "source", "no config.json")
    refused(tmp_path / "nowhere", "does not exist")
    with pytest.raises(MQAError, match="neither a directory nor a model that can be fetched"):
        convert("someone/nothing", tmp_path / "output")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("not json", "config.json cannot be read"),
        ("[]", "config.json holds a list"),
        ('{"model_type": ["llama"]}', "unsupported model type"),
        ('{"architectures": ["T5ForConditionalGeneration"]}', "config.json has no model_type"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "transformers refuses .*config.json"),
    ],
)
def test_a_configuration_that_is_none(source, content, match):
    (source / "config.json").write_text(content)
    refused(source, match)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads|zero"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000, more layers than any"),
        ({"hidden_size": -48}, "hidden_size"),
        ({"intermediate_size": 0}, "intermediate_size must be a positive integer, got 0"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer"),
        ({"hidden_act": "wave"}, "hidden_act must be one of .*got 'wave'"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type 'spiral'"),
        ({"num_key_value_heads": 4}, "divisible|divide"),
    ],
)
def test_values_that_describe_no_model(source, fields, match):
    edit_config(source, **fields)
    refused(source, match)


def test_options_about_nothing(source):
    refused(
        source,
        "`ignore_switch` atention_sink_size: config.json has no such switch",
        ignore_switch=["atention_sink_size"],
    )
    refused(source, "`private` needs `push_to_hub`", private=True)
    refused(source, "`seed` must be", seed=2**64)
    refused(source, "`max_shard_size` '-1GB' is not a size: .* positive .* such as 5GB", max_shard_size="-1GB")


def test_weights_that_are_no_floats(source):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(source, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    refused(source, f"{name} is stored as torch.int8")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads every file")
def test_a_file_that_may_not_be_read(source):
    (source / "model.safetensors").chmod(0)
    refused(source, "cannot be read: .*ermission")


def test_a_tokenizer_that_is_none(source):
    (source / "tokenizer.json").write_text("{}")
    refused(source, "the tokenizer in .* cannot be loaded")
    (source / "tokenizer_config.json").write_text("not json")
    refused(source, "tokenizer_config.json cannot be read")


def test_a_tokenizer_whose_code_is_missing(source):
    (source / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokens.Mine", null]}}')
    refused(source, "needs tokens.py, which is missing")


def test_a_revision_of_a_directory(source):
    refused(source, "`revision` main is for hub ids", revision="main")


def test_a_directory_that_is_not_empty(source, tmp_path):
    output = tmp_path / "output"
    convert(source, output, kv_heads=2)
    refused(source, "exists and is not empty; pass `overwrite`")
    assert convert(source, output, overwrite=True).num_key_value_heads.after == 1
    assert json.loads((output / "config.json").read_text())["num_key_value_heads"] == 1


@pytest.mark.parametrize("name", ["thesis.tex", "config.json"])
def test_overwrite_replaces_only_what_a_conversion_wrote(source, tmp_path, name):
    output = tmp_path / "output"
    output.mkdir()
    (output / name).write_text("years of work")
    refused(source, "was not written by a conversion", overwrite=True)


def test_what_appears_at_the_output_meanwhile_is_kept(source, tmp_path, monkeypatch):
    output = tmp_path / "output"

    def write_card(*arguments):
        output.mkdir()
        (output / "thesis.tex").write_text("years of work")
        return []

    monkeypatch.setattr(converter, "write_card", write_card)
    with pytest.raises(MQAError, match="exists and is not empty"):
        convert(source, output)
    assert [path.name for path in output.iterdir()] == ["thesis.tex"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "source"]


def test_a_failure_leaves_no_new_parents(source, tmp_path, monkeypatch):
    monkeypatch.setattr(converter, "write_card", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(source, tmp_path / "new" / "parents" / "output")
    assert not (tmp_path / "new").exists()


def test_outputs_that_cannot_be(source, tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for output, match in (
        (tmp_path / "loop", "cannot write"),
        (tmp_path / ("n" * 300), "cannot write|was not written"),
        ("nul\0", "must be a path"),
        (".", "working directory"),
        ("/proc/", "mount point"),
    ):
        with pytest.raises(MQAError, match=match):
            convert(source, output)


def test_an_empty_directory_is_a_fine_output(source, tmp_path):
    (tmp_path / "output").mkdir()
    convert(source, tmp_path / "output")


def test_a_file_where_the_directory_goes(source, tmp_path):
    (tmp_path / "output").write_text("")
    with pytest.raises(MQAError, match="is a file"):
        convert(source, tmp_path / "output")


@pytest.mark.parametrize("output", [".", "inside", ".."])
def test_source_and_output_apart(source, output):
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    with pytest.raises(MQAError, match=r"same directory|must not contain each other"):
        convert(source, source / output, overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before


def test_a_disk_that_is_too_small(source, monkeypatch):
    usage = shutil.disk_usage(source)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(source, "bytes, but .* has 1,000 free")


def test_a_disk_that_fills_up(source, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(converter, "write_card", full)
    refused(source, "no space left")


def test_an_error_while_replacing_keeps_what_was_there(source, tmp_path, monkeypatch):
    output = tmp_path / "output"
    convert(source, output, kv_heads=2)

    def fail(*arguments, **options):
        raise RuntimeError("interrupted")

    before = (output / "model.safetensors").read_bytes()
    monkeypatch.setattr(pooling, "pool_layer", fail)
    with pytest.raises(RuntimeError):
        convert(source, output, overwrite=True)
    assert (output / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "source"]


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_nothing(source, tmp_path, sign):
    """The command is stopped while it is between two layers."""
    program = (
        "import signal, time, mqa_hf.conversion.pooling as c; plain = c.pool_layer\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "def slow(*a, **k):\n    print('pooling', flush=True); time.sleep(30)\n"
        "c.pool_layer = slow\n"
        "from mqa_hf.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "convert", str(source), str(tmp_path / "output")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().strip() == "pooling"
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".output.partial-")]
    time.sleep(0.2)
    process.send_signal(sign)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert sign != signal.SIGINT or "Nothing was kept; OUTPUT is unchanged." in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_the_command_ends_with_one_message_and_a_code(source, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "mqa_hf.cli", "convert", str(source), str(tmp_path / "output"), "--kv-heads", "4"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: --kv-heads must divide")
    assert "Traceback" not in result.stderr
    assert CliRunner().invoke(app, ["convert"]).exit_code == 2
