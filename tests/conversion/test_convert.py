"""What a conversion writes, and from which forms of a source."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from isolated import run_without_the_package
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from seq2seq_sources import T5, make_seq2seq
from sources import LLAMA, batch, largest_difference, make_model, save
from tokenizer import CHAT_TEMPLATE, write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.dynamic_module_utils import custom_object_save
from uploads import record_uploads

import mqa_hf
from mqa_hf import convert, inspect
from mqa_hf.base.code import runtime_files
from mqa_hf.base.errors import ConversionWarning, MQAError
from mqa_hf.conversion.checkpoint import CheckpointReader, CheckpointWriter, TensorInfo
from mqa_hf.conversion.record import ConversionRecord

GROUPED = {**LLAMA, "num_key_value_heads": 3}


@pytest.fixture
def model():
    return make_model("llama", GROUPED)


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.mark.parametrize("form", ["sharded", "bin", "old bin", "sharded bin", "base model"])
def test_every_form_of_source_gives_the_same(form, model, tmp_path):
    source = tmp_path / "source"
    save(model, source, max_shard_size="40KB" if "sharded" in form else "5GB")
    if form == "base model":
        tensors = load_file(source / "model.safetensors")
        head = tensors.pop("lm_head.weight")
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        save_file({**tensors, "lm_head.weight": head}, source / "model.safetensors", metadata={"format": "pt"})
    if "bin" in form:
        for path in list(source.glob("*.safetensors")):
            new = source / path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
            torch.save(load_file(path), new, _use_new_zipfile_serialization=form != "old bin")
            path.unlink()
        for path in list(source.glob("*.index.json")):
            text = path.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            (source / "pytorch_model.bin.index.json").write_text(text)
            path.unlink()
    convert(source, tmp_path / "ours", kv_heads=3)
    assert largest_difference(load(tmp_path / "ours"), model)[0] <= 1e-4


def test_the_output_is_sharded_by_size(model, tmp_path):
    source = save(model, tmp_path / "source")
    convert(source, tmp_path / "one", kv_heads=3)
    convert(source, tmp_path / "many", kv_heads=3, max_shard_size="50KB")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert {path.name for path in shards} == set(index["weight_map"].values())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    parts = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in parts.values())
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    load(tmp_path / "many")


def test_the_writer_gives_what_safetensors_reads(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b.c": torch.randn(7).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "view": torch.arange(12.0).view(3, 4).t(),
    }
    writer = CheckpointWriter(tmp_path, {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in tensors.items()}, "5GB")
    for name in reversed(tensors):
        writer.write({name: tensors[name]})
    writer.finish()
    torch.testing.assert_close(load_file(tmp_path / "model.safetensors"), tensors, rtol=0, atol=0)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert CheckpointReader(tmp_path).tensors["b.c"] == TensorInfo((7,), torch.bfloat16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", None])
def test_dtype(dtype, model, tmp_path):
    save(model.to(torch.bfloat16), tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours", dtype=dtype)
    expected = getattr(torch, dtype or "bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "ours" / "model.safetensors").values()} == {expected}
    loaded = load(tmp_path / "ours")
    assert loaded.dtype == loaded.config.dtype == expected


def test_a_head_that_differs_from_the_embedding_is_kept_although_the_config_ties_them(tmp_path):
    model = make_model("llama", {**LLAMA, "tie_word_embeddings": False})
    source = save(model, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    convert(source, tmp_path / "ours", kv_heads=6)
    ours = load(tmp_path / "ours")
    assert not ours.config.tie_word_embeddings
    assert largest_difference(ours, model)[0] <= 1e-4


def test_an_equal_second_copy_of_a_tied_head_is_left_out(tmp_path):
    model = make_model("llama", {**LLAMA, "tie_word_embeddings": True})
    source = save(model, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "ours", kv_heads=6)
    assert "lm_head.weight" not in load_file(tmp_path / "ours" / "model.safetensors")
    assert largest_difference(load(tmp_path / "ours"), model)[0] <= 1e-4


def test_tokenizer_template_and_generation_config_come_along(model, tmp_path):
    model.generation_config.temperature = 0.6
    model.generation_config.do_sample = True
    source = save(model, tmp_path / "source")
    write_tokenizer(source)
    (source / "LICENSE").write_text("terms")
    convert(source, tmp_path / "ours")
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").chat_template == CHAT_TEMPLATE
    assert load(tmp_path / "ours").generation_config.temperature == 0.6
    assert (tmp_path / "ours" / "LICENSE").read_text() == "terms"


def test_a_tokenizer_that_does_not_name_its_class(tmp_path):
    """Older GPT-2 checkpoints leave the class to the model type, which a conversion changes."""
    config = {"vocab_size": 101, "n_embd": 48, "n_layer": 1, "n_head": 6}
    source = save(make_model("gpt2", config), tmp_path / "source")
    tokenizer = write_tokenizer(source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(source, tmp_path / "ours")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert loaded("some text").input_ids == tokenizer("some text").input_ids


def test_a_tokenizer_with_code_of_its_own_brings_it_along(model, tmp_path):
    source = save(model, tmp_path / "source")
    (source / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokens.Mine", null]}}')
    (source / "tokens.py").write_text("from .more import thing\n")
    (source / "more.py").write_text("thing = 1\n")
    (source / "unrelated.py").write_text("")
    convert(source, tmp_path / "ours")
    assert (tmp_path / "ours" / "tokens.py").read_text() == "from .more import thing\n"
    assert (tmp_path / "ours" / "more.py").is_file()
    assert not (tmp_path / "ours" / "unrelated.py").exists()


def test_a_native_result_needs_no_code(model, tmp_path):
    source = save(model, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_old.OldForCausalLM"}
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "native", target="native")
    assert "auto_map" not in json.loads((tmp_path / "native" / "config.json").read_text())


def test_the_report(model, tmp_path):
    source = save(model, tmp_path / "source")
    returned = convert(source, tmp_path / "ours", method="first")
    report = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    assert ConversionRecord.read(tmp_path / "ours") == returned
    assert ConversionRecord.of(report, "it") == returned
    assert set(report["layers"][0]) == {"layer", "key_error", "value_error"}
    assert not {"nonfinite", "held_out_loss"} & set(report)
    assert report["num_key_value_heads"] == {"before": 3, "after": 1}
    assert report["kv_bytes_per_token"] == {"before": 2 * 3 * 3 * 16, "after": 2 * 3 * 16}
    weight = model.model.layers[1].self_attn.k_proj.weight.view(3, 8, 48)
    expected = (weight - weight[:1]).norm() / weight.norm()
    assert report["layers"][1]["key_error"] == pytest.approx(expected.item(), rel=1e-5)
    assert report["parameters"] == sum(p.numel() for p in load(tmp_path / "ours").parameters())


def test_the_command_in_the_report_makes_the_same_checkpoint(model, tmp_path):
    source = save(model, tmp_path / "source")
    report = convert(source, tmp_path / "ours", method="random", seed=7, dtype="bfloat16")
    again = str(tmp_path / "again")
    command = report.command.replace("OUTPUT", again).split()
    subprocess.run([sys.executable, "-m", "mqa_hf.cli", *command[1:]], check=True, capture_output=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "again")]
    assert weights[0] == weights[1]


def test_the_model_card(model, tmp_path):
    source = save(model, tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: [de]\ndatasets: [a/b]\n---\n# Original\n")
    report = convert(source, tmp_path / "ours")
    card = ModelCard.load(tmp_path / "ours" / "README.md")
    assert card.data.datasets == ["a/b"]
    assert card.data.base_model is None
    assert str(tmp_path) not in str(card)  # nobody else has this folder
    assert report.command.replace(str(source), "source") in card.text
    assert card.data.license == "mit"
    assert card.data.language == ["de"]
    assert card.data.library_name == "transformers"
    (source / "README.md").write_text("---\nbase_model: someone/original\n---\n# Trained further\n")
    convert(source, tmp_path / "ours", overwrite=True)
    card = ModelCard.load(tmp_path / "ours" / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("someone/original", "finetune")
    assert "mqa-hf convert someone/original OUTPUT" in card.text
    assert "| cache, bytes per token (16 bit) | 288 | 96 |" in card.text
    said = {"base_model": "me/mine", "license": "apache-2.0"}
    report = convert(source, tmp_path / "ours", overwrite=True, **said)
    card = ModelCard.load(tmp_path / "ours" / "README.md")
    assert (card.data.base_model, card.data.license) == ("me/mine", "apache-2.0")
    assert "--base-model me/mine --license apache-2.0" in report.command
    with pytest.raises(MQAError, match="`base_model` takes a hub id such as name/model, got 'a b'"):
        convert(source, tmp_path / "other", base_model="a b")


CARD = """
import json
directory, program = json.loads(sys.argv[1])
exec(program.replace("DIRECTORY_OR_ID", directory))
print(json.dumps(type(model).__name__))
"""


@pytest.mark.parametrize("name", ["MQAForCausalLM", "LlamaForCausalLM", "MQAForConditionalGeneration"])
def test_the_program_of_the_card_asks_no_question(name, tmp_path):
    made = make_seq2seq("t5", T5) if "Conditional" in name else make_model("llama", LLAMA)
    source = save(made, tmp_path / "source")
    write_tokenizer(source)
    convert(source, tmp_path / "ours", target="mqa" if name.startswith("MQA") else "native")
    (program,) = re.findall(r"```python\n(.*?)```", (tmp_path / "ours" / "README.md").read_text(), re.DOTALL)
    assert run_without_the_package(CARD, tmp_path / "ours", program, scratch=tmp_path) == name


PROBE = """
import json, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoConfig
directory, ids, again = json.loads(sys.argv[1])
ids = torch.tensor(ids)
model, info = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
assert AutoConfig.from_pretrained(directory, trust_remote_code=True).model_type == "mqa"
base = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
tokens = model.eval().generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
model.save_pretrained(again)
with torch.no_grad():
    logits, shape = model(ids).logits[0, -1, :5].tolist(), list(base(ids).last_hidden_state.shape)
print(json.dumps({"tokens": tokens.tolist(), "attention": model.config._attn_implementation,
                  "logits": logits, "base": shape}))
"""


def test_it_loads_as_remote_code_where_the_package_is_not_importable(model, tmp_path):
    source = save(model, tmp_path / "source")
    convert(source, tmp_path / "ours")
    ours = load(tmp_path / "ours")
    ids = batch()[0][:1]
    found = run_without_the_package(PROBE, tmp_path / "ours", ids.tolist(), tmp_path / "again", scratch=tmp_path)
    expected = ours.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert found["tokens"] == expected.tolist()
    assert found["attention"] == "mqa"
    assert found["base"] == [1, 14, 48]
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found["logits"]), ours(ids).logits[0, -1, :5])
    # Saved by the remote-code class, it is as complete as before.
    once_more = run_without_the_package(PROBE, tmp_path / "again", ids.tolist(), tmp_path / "thrice", scratch=tmp_path)
    assert once_more == found


def test_a_window_of_a_decoder_only_model(model, tmp_path):
    source = save(model, tmp_path / "source")
    convert(source, tmp_path / "ours", kv_heads=3, window=5)
    ours = load(tmp_path / "ours")
    ids = batch()[0]
    distance = torch.arange(14)[:, None] - torch.arange(14)
    mask = torch.where((distance >= 0) & (distance < 5), 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask.expand(3, 1, -1, -1)).logits
        torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=1e-4)
        cache = ours(ids, use_cache=True).past_key_values
    assert {layer.keys.shape[2] for layer in cache.layers} == {4}
    assert "sees only the last 5 positions" in (tmp_path / "ours" / "README.md").read_text()


def test_save_load_save_is_stable(model, tmp_path):
    source = save(model, tmp_path / "source")
    convert(source, tmp_path / "ours")
    load(tmp_path / "ours").save_pretrained(tmp_path / "one")
    load(tmp_path / "one").save_pretrained(tmp_path / "two")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {"configuration_mqa.py", "attention_mqa.py", "modeling_mqa.py", "config.json"} <= names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    torch.testing.assert_close(
        load_file(tmp_path / "ours" / "model.safetensors"), load_file(tmp_path / "two" / "model.safetensors")
    )
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "one")]
    assert configs[0] == configs[1]


def test_the_runtime_files_are_what_transformers_copies(tmp_path):
    for name, fields in (
        ("MQAForCausalLM", {}),
        ("MQAForConditionalGeneration", {}),
        ("MQAForSpeechSeq2Seq", {"encoder": {"causal": False, "num_mel_bins": 8}}),
    ):
        kind = getattr(mqa_hf, name)
        with torch.device("meta"):
            model = kind(kind.config_class(**fields))
        (tmp_path / name).mkdir()
        custom_object_save(model, tmp_path / name)
        needed = runtime_files(kind)
        assert {path.name for path in needed} == {path.name for path in (tmp_path / name).iterdir()}
        for path in needed:
            assert not re.search(r"^\s*(from|import) mqa_hf", path.read_text(), re.MULTILINE)
    assert runtime_files(LlamaForCausalLM) == []


def test_inspect_reads_no_weights(model, tmp_path):
    source = save(model, tmp_path / "source")
    (source / "model.safetensors").unlink()
    result = inspect(source)
    assert result["family"] == "llama"
    assert result["convertible"]
    assert result["native"] == "llama"
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert result["kv_bytes_per_token"] == {"now": 288, "after": 96}
    assert "must divide the source's 3 key/value heads, got 2" in inspect(source, kv_heads=2)["reason"]


def test_inspect_says_what_a_converted_checkpoint_is(model, tmp_path):
    convert(save(model, tmp_path / "source"), tmp_path / "ours")
    result = inspect(tmp_path / "ours")
    assert result["num_key_value_heads"] == 1
    assert not result["convertible"]
    assert result["conversion"]["family"] == "llama"


def test_inspect_says_why_a_family_cannot_be_converted(model, tmp_path):
    source = save(model, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    result = inspect(source)
    assert not result["convertible"]
    assert "unsupported model type 'lama'" in result["reason"]


@pytest.mark.parametrize("arguments", [[], ["--json"], ["--kv-heads", "2"]])
def test_the_inspect_command(arguments, model, tmp_path):
    source = save(model, tmp_path / "source")
    result = subprocess.run(
        [sys.executable, "-m", "mqa_hf.cli", "inspect", str(source), *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "llama" in result.stdout
    if arguments == ["--json"]:
        assert json.loads(result.stdout)["num_key_value_heads"] == 3


def test_pushing_uploads_the_whole_directory(model, tmp_path, monkeypatch):
    calls = record_uploads(monkeypatch)
    source = save(model, tmp_path / "source")
    with pytest.warns(ConversionWarning, match="the card has no licence; give `license`"):
        convert(source, tmp_path / "ours", push_to_hub="me/mqa", private=True)
    assert calls[0] == ("me/mqa", {"private": True, "exist_ok": True})
    assert {"config.json", "model.safetensors", "modeling_mqa.py", "README.md"} <= calls[1][2]


def test_a_hub_id_is_converted_from_the_cache_with_its_commit(model, tmp_path, monkeypatch):
    """Laid out as huggingface_hub caches a repository: with it, a hub id resolves without a network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    save(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    result = subprocess.run(
        [sys.executable, "-m", "mqa_hf.cli", "convert", "someone/tiny", str(tmp_path / "ours"), "--revision", "v1"],
        env={"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    assert report["source"] == "someone/tiny"
    assert report["revision"] == commit
    assert "base_model: someone/tiny" in (tmp_path / "ours" / "README.md").read_text()


def test_a_second_run_needs_overwrite_and_gives_the_same(model, tmp_path):
    source = save(model, tmp_path / "source")
    convert(source, tmp_path / "ours")
    before = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    (tmp_path / "ours" / "leftover.safetensors").write_text("")
    convert(source, tmp_path / "ours", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source"]
    shutil.rmtree(tmp_path / "ours")
    assert mqa_hf.__version__
