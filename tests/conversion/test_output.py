"""What a conversion writes is whole, loads, and holds nothing that is not the source's."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sources import CASES, LLAMA, make_model, save
from tokenizer import write_tokenizer, write_whisper_processor
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import mqa_hf.base.output as writing
import mqa_hf.conversion.saving as saving
from mqa_hf import convert
from mqa_hf.base.code import runtime_files
from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import write_whole


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = save(make_model("llama", LLAMA), tmp_path_factory.mktemp("original") / "source")
    write_tokenizer(directory)
    return directory


@pytest.fixture
def source(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "source"))


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "elsewhere" / "secret.txt"
    path.parent.mkdir()
    path.write_text("a secret")
    return path


def refused(source, output, match, **options):
    """The conversion ends with this message, and leaves nothing."""
    others = set(output.parent.iterdir())
    with pytest.raises(MQAError, match=match):
        convert(source, output, **options)
    assert set(output.parent.iterdir()) == others


# What is written loads.


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("tokenizer.json", "{}", "the tokenizer in .* cannot be loaded"),
        ("tokenizer.json", None, "tokenizer.json cannot be read"),  # None: cut after 500 bytes
        ("tokenizer.json", "[]", "tokenizer.json holds a list"),
        ("special_tokens_map.json", "{", "special_tokens_map.json cannot be read"),
        ("special_tokens_map.json", '{"bos_token": 3}', "the tokenizer in .* cannot be loaded"),
        ("added_tokens.json", "[", "added_tokens.json cannot be read"),
        ("added_tokens.json", "[" * 200_000, "added_tokens.json cannot be read"),
        ("added_tokens.json", '{"a": "b"}', "the tokenizer in .* cannot be loaded"),
        ("generation_config.json", "[]", "generation_config.json holds a list"),
        ("generation_config.json", "{", "generation_config.json cannot be read"),
        ("preprocessor_config.json", "{", "preprocessor_config.json cannot be read"),
        (
            "preprocessor_config.json",
            '{"processor_class": "WhisperProcessor"}',
            "the processor in .* cannot be loaded",
        ),
        ("tokenizer_config.json", '{"tokenizer_class": 3}', "the tokenizer in .* cannot be loaded"),
    ],
)
def test_a_source_that_does_not_load_is_refused_by_name(source, tmp_path, name, content, match):
    content = (source / name).read_text()[:500] if content is None else content
    (source / name).write_text(content)
    refused(source, tmp_path / "output", match)


@pytest.mark.parametrize(
    "value", [3, None, True, "x.X", [3], [{"a": 1}], ["x"], {"AutoTokenizer": 3}, {"AutoTokenizer": {}}]
)
def test_an_auto_map_that_names_no_classes_is_refused(source, tmp_path, value):
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": value}))
    refused(source, tmp_path / "output", "tokenizer_config.json: auto_map names no classes")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [False, 3, "floaty", {"a": 1}])
def test_a_dtype_that_is_none_is_refused(source, tmp_path, key, value):
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype", None)
    (source / "config.json").write_text(json.dumps({**config, key: value}))
    refused(source, tmp_path / "output", r"config\.json")


def test_a_source_without_a_tokenizer_is_fine(source, tmp_path):
    for path in source.glob("tokenizer*"):
        path.unlink()
    convert(source, tmp_path / "output")
    AutoModelForCausalLM.from_pretrained(tmp_path / "output")


@pytest.mark.parametrize("family", ["phi3", "mistral", "qwen2", "llama"])
def test_a_tokenizer_whose_class_depends_on_the_model_type_stays_what_it_is(tmp_path, family):
    """For some model types transformers does not follow `tokenizer_class`; for the result's type it does."""
    fields = next(fields for model_type, _, fields in CASES if model_type == family)
    source = save(make_model(family, fields), tmp_path / "source")
    tokens = ["<unk>", "<s>", "</s>", *"▁abcdefghijklmnopqrstuvwxyz"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    backend.save(str(source / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    before = (source / "tokenizer_config.json").read_bytes()
    convert(source, tmp_path / "output")
    theirs, ours = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("source", "output"))
    for text in ("ab cd", " ab  cd "):
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
    if family == "llama":  # where nothing depends on it, not a byte is changed
        assert (tmp_path / "output" / "tokenizer_config.json").read_bytes() == before


def test_a_processor_that_does_not_name_its_class_is_found_again(tmp_path):
    config = WhisperConfig(
        vocab_size=400, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=6,
        decoder_attention_heads=6, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8,
        max_source_positions=50, max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    source = save(WhisperForConditionalGeneration(config), tmp_path / "source")
    write_whisper_processor(source, 8, 100)
    for path in source.glob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.pop("processor_class", None):
            path.write_text(json.dumps(content))
    if not (source / "preprocessor_config.json").is_file():  # as it was written before processors had one file
        settings = json.loads((source / "processor_config.json").read_text())
        (source / "preprocessor_config.json").write_text(json.dumps(settings["feature_extractor"]))
        (source / "processor_config.json").unlink()
    convert(source, tmp_path / "output")
    theirs, ours = (AutoProcessor.from_pretrained(tmp_path / name) for name in ("source", "output"))
    assert type(ours) is type(theirs)
    sound = torch.linspace(-1, 1, 1600).numpy()
    a, b = (p(sound, sampling_rate=16_000, return_tensors="pt").input_features for p in (theirs, ours))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_code_of_the_result_that_is_not_complete_is_an_error(source, tmp_path, monkeypatch):
    monkeypatch.setattr(
        saving, "runtime_files", lambda model: [path for path in runtime_files(model) if path.name != "cache_mqa.py"]
    )
    refused(source, tmp_path / "output", r"needs cache_mqa\.py, which is missing")


def test_code_of_a_tokenizer_is_carried_over_and_not_run(source, tmp_path):
    (source / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokens.Mine", null]}}')
    (source / "tokens.py").write_text(f"from .more import x\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    (source / "more.py").write_text(f"from .tokens import Mine\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    convert(source, tmp_path / "output")
    assert (tmp_path / "output" / "tokens.py").read_bytes() == (source / "tokens.py").read_bytes()
    assert (tmp_path / "output" / "more.py").is_file()
    assert not (tmp_path / "ran").exists()
    (source / "more.py").unlink()
    refused(source, tmp_path / "again", r"needs more\.py, which is missing")
    (source / "more.py").write_bytes(b"\xff\xfe")
    refused(source, tmp_path / "again", r"more\.py cannot be read")


# Nothing from outside the source gets into the result.


@pytest.mark.parametrize(
    "name",
    ["LICENSE", "tokenizer_x", "tokenizer.json", "generation_config.json", "config.json", "README.md", "vocab.txt"],
)
@pytest.mark.parametrize("kind", ["absolute", "relative", "through a link", "into nothing"])
def test_a_link_that_leaves_the_source_is_refused(source, secret, tmp_path, name, kind):
    path = source / name
    if path.exists():
        secret.write_bytes(path.read_bytes())  # so that nothing but the link is wrong
        path.unlink()
    if kind == "absolute":
        path.symlink_to(secret)
    elif kind == "relative":
        path.symlink_to(f"../elsewhere/{secret.name}")
    elif kind == "through a link":
        (source / "notes").symlink_to(secret.parent)
        path.symlink_to(f"notes/{secret.name}")
    elif name == "config.json":
        pytest.skip("a source without one is none")
    else:
        path.symlink_to(tmp_path / "nothing")
    where = secret if kind != "into nothing" else tmp_path / "nothing"
    refused(source, tmp_path / "output", f"{name} links to {where}, outside of the checkpoint")


def test_chat_templates_that_are_links_to_elsewhere_are_refused(source, secret, tmp_path):
    templates = source / "additional_chat_templates"
    (secret.parent / "tools.jinja").write_text("a secret")
    templates.symlink_to(secret.parent)
    refused(source, tmp_path / "output", r"tools\.jinja links to .*elsewhere/tools\.jinja, outside")
    templates.unlink()
    templates.mkdir()
    (templates / "tools.jinja").symlink_to(secret)
    refused(source, tmp_path / "output", r"tools\.jinja links to .*secret\.txt, outside")
    (templates / "tools.jinja").unlink()
    (templates / "tools.jinja").write_text("{{ messages }}")
    (templates / "others").symlink_to(secret.parent)
    convert(source, tmp_path / "output")
    copied = [path.name for path in (tmp_path / "output" / "additional_chat_templates").iterdir()]
    assert copied == ["tools.jinja"]


@pytest.mark.parametrize("reference", ["../elsewhere/code", "{elsewhere}/code", "sub/../../elsewhere/code", "code"])
def test_code_that_lies_elsewhere_is_refused(source, secret, tmp_path, reference):
    code = secret.parent / "code.py"
    code.write_text("")
    (source / "sub").mkdir()
    (source / "code.py").symlink_to(code)
    reference = reference.format(elsewhere=secret.parent)
    (source / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": [f"{reference}.X", None]}})
    )
    refused(source, tmp_path / "output", f"code.py links to {code}, outside of the checkpoint")


def test_an_import_that_leads_elsewhere_is_refused(source, secret, tmp_path):
    (secret.parent / "code.py").write_text("")
    (source / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokens.Mine", null]}}')
    for name in (f".{secret.parent}/code", "./../elsewhere/code"):
        (source / "tokens.py").write_text(f"from {name} import x\n")
        refused(source, tmp_path / "output", "code.py links to .*elsewhere/code.py, outside of the checkpoint")


def test_links_within_the_source_and_to_it_are_followed(source, tmp_path):
    (source / "terms.txt").write_text("terms")
    (source / "LICENSE").symlink_to("terms.txt")
    (tmp_path / "link").symlink_to(source)
    convert(tmp_path / "link", tmp_path / "output")
    copied = tmp_path / "output" / "LICENSE"
    assert copied.read_text() == "terms"
    assert not copied.is_symlink()


def test_weights_may_lie_on_another_disk(source, tmp_path):
    (tmp_path / "disk").mkdir()
    (source / "model.safetensors").rename(tmp_path / "disk" / "weights")
    (source / "model.safetensors").symlink_to(tmp_path / "disk" / "weights")
    convert(source, tmp_path / "output")
    assert not (tmp_path / "output" / "model.safetensors").is_symlink()
    AutoModelForCausalLM.from_pretrained(tmp_path / "output")


def in_the_cache(source, root):
    """The files of a checkpoint as huggingface_hub lays them out: links in a snapshot to blobs beside it."""
    repository = root / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, repository / "blobs" / f"{number:040}")
        link.symlink_to(os.path.relpath(repository / "blobs" / f"{number:040}", link.parent))
    return snapshot


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_own_blobs(source, secret, tmp_path):
    (source / "LICENSE").write_text("terms")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokens.Mine", None]}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "tokens.py").write_text("")
    snapshot = in_the_cache(source, tmp_path / "hub")
    convert(snapshot, tmp_path / "output")
    for name in ("LICENSE", "tokenizer.json", "tokens.py", "additional_chat_templates/tools.jinja"):
        assert (tmp_path / "output" / name).read_bytes() == (source / name).read_bytes()
        assert not (tmp_path / "output" / name).is_symlink()
    assert "license: mit" in (tmp_path / "output" / "README.md").read_text()

    blob = (snapshot / "LICENSE").resolve()
    blob.unlink()
    refused(snapshot, tmp_path / "again", "LICENSE links to .*, which does not exist")
    blob.symlink_to(secret)
    refused(snapshot, tmp_path / "again", f"LICENSE links to {secret}, outside")
    (snapshot / "LICENSE").unlink()
    other = in_the_cache(source, tmp_path / "other")
    (snapshot / "LICENSE").symlink_to(other / "LICENSE")
    refused(snapshot, tmp_path / "again", "LICENSE links to .*other/models--someone--tiny/blobs/.*, outside")


# What killed processes leave.


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_what_a_killed_process_left_is_removed_and_said(source, tmp_path, capfd):
    for name in (".output.partial-abcd_123", ".output.old-00000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half of it")
    (tmp_path / ".output.lock").touch()
    (tmp_path / "output").mkdir()
    convert(source, tmp_path / "output")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "source"]
    said = capfd.readouterr().err
    assert (
        f"{tmp_path}/output: an earlier run was killed; removed .output.old-00000000, .output.partial-abcd_123\n"
        in said
    )
    convert(source, tmp_path / "output", overwrite=True)
    assert "an earlier run" not in capfd.readouterr().err


def test_directories_of_other_outputs_are_left_alone(source, tmp_path):
    names = (
        ".output.partial",
        ".output.partial-abcd_123.partial-abcd_123",
        ".outputs.partial-abcd_123",
        ".output.uptrain",
        "output.partial-abcd_123",
        ".output.partial-abcd_1234",
        ".output.old-work",
    )
    for name in names:
        (tmp_path / name).mkdir()
    convert(source, tmp_path / "output")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((*names, "output", "source"))


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import mqa_hf.conversion.converter as c, mqa_hf.base.output as writing
{change}
from mqa_hf.cli import main
main()
"""


def start(change, *words):
    program = PROGRAM.format(change=change)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", program, "convert", *map(str, words)], **pipes)


WAITING = """
plain = c.write_card
def slow(*arguments):
    print("at the end", flush=True)
    input()
    return plain(*arguments)
c.write_card = slow
"""


def test_two_processes_that_write_the_same_output_do_not_disturb_each_other(source, tmp_path):
    output = tmp_path / "output"
    convert(source, output, kv_heads=2)
    before = contents(output)
    first = start(WAITING, source, output, "--kv-heads", "3", "--overwrite")
    assert "at the end\n" in iter(first.stdout.readline, "")
    (partial,) = tmp_path.glob(".output.partial-*")
    seen = contents(partial)
    with pytest.raises(MQAError, match=r"another process is writing .*output; wait for it"):
        convert(source, output, overwrite=True)
    assert contents(output) == before
    assert contents(partial) == seen
    first.communicate("\n", timeout=60)
    assert first.returncode == 0
    assert json.loads((output / "config.json").read_text())["num_key_value_heads"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "source"]


KILLED = """
writing._swap = lambda *paths: False
plain, calls = Path.replace, []
def replace(self, target):
    calls.append(target)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, target)
Path.replace = replace
"""


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_process_that_is_killed_between_two_renames_loses_nothing(source, tmp_path, call, capfd):
    """Where the file system cannot swap two names: before the first, the second and the third renaming."""
    output = tmp_path / "output"
    convert(source, output, kv_heads=2)
    before = contents(output)
    killed = start(KILLED.format(call=call), source, output, "--kv-heads", "3", "--overwrite")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert output.exists() == (call != 2)
    assert len(list(tmp_path.glob(".output.*"))) > 1
    with pytest.raises(MQAError, match="exists and is not empty"):
        convert(source, output)
    said = capfd.readouterr().err
    assert ("restored the previous content" in said) == (call == 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "source"]
    if call < 3:
        assert contents(output) == before
    else:
        assert json.loads((output / "config.json").read_text())["num_key_value_heads"] == 3
    convert(source, output, overwrite=True)
    assert json.loads((output / "config.json").read_text())["num_key_value_heads"] == 1


@pytest.mark.parametrize("call", [1, 2])
def test_a_failed_replacement_puts_the_old_one_back(source, tmp_path, monkeypatch, call):
    output = tmp_path / "output"
    convert(source, output, kv_heads=2)
    before = contents(output)
    plain, calls = Path.replace, []

    def replace(self, target):
        calls.append(target)
        if len(calls) == call:
            raise KeyboardInterrupt
        return plain(self, target)

    monkeypatch.setattr(writing, "_swap", lambda *paths: False)
    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        convert(source, output, overwrite=True)
    assert len(calls) == (1 if call == 1 else 3)
    assert contents(output) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "source"]


@pytest.mark.skipif(sys.platform != "linux", reason="names are swapped by Linux alone")
def test_a_replacement_is_one_step(source, tmp_path, monkeypatch):
    output = tmp_path / "output"
    convert(source, output, kv_heads=2)
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    if not writing._swap(one, other):
        pytest.skip("this file system cannot swap names")
    monkeypatch.setattr(Path, "replace", lambda *paths: pytest.fail("renamed"))
    convert(source, output, overwrite=True)
    assert json.loads((output / "config.json").read_text())["num_key_value_heads"] == 1


def test_without_locks_nothing_is_removed(source, tmp_path, monkeypatch):
    """What another process may be writing is left alone where nobody can tell."""

    def flock(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(writing.fcntl, "flock", flock)
    (tmp_path / ".output.partial-abcd_123").mkdir()
    convert(source, tmp_path / "output")
    convert(source, tmp_path / "output", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".output.partial-abcd_123", "output", "source"]


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    write_whole(tmp_path / "results.json", "before")
    (tmp_path / ".results.json.partial").write_text("left by a killed process, and longer than what follows")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "results.json", "\ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    write_whole(tmp_path / "results.json", "after")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["after"]
