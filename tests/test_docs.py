"""Documentation that is made from the code is as the code makes it, and its commands are those that there are."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from family_page import page
from seq2seq_sources import BART, make_seq2seq
from sources import need, save
from tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

from mqa_hf.cli import app
from mqa_hf.conversion.families import FAMILIES
from mqa_hf.conversion.families.checkpoints import CHECKPOINTS

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), DOCS.parent / "README.md"]


BLOCK = re.compile(r"^(<!-- not run by a test: .*? -->\n)?```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Sizes for a test; the last one that is said counts.
SIZES = {
    "convert": "--calibration-tokens 1024 --sequence-length 32",
    "uptrain": "--tokens 1024 --sequence-length 32 --batch-tokens 256 --validation-tokens 128 --report-to none",
    "pretrain": "--tokens 1024 --sequence-length 32 --batch-tokens 256 --vocab-size 300 --report-to none",
    "evaluate": "--tokens 512 --window 32 --prompts 2 --prompt-tokens 8 --new-tokens 4",
    "benchmark": "--batch 1,2 --context 16 --tokens 2 --output times.jsonl --device cpu",
}


def commands(path, marked=True):
    """The words of each `mqa-hf ...` in the blocks of a page; lines that end in a backslash go on in the next.

    Those that `accelerate launch` runs are among them. Without `marked`, blocks that are said to be run by no test are
    left out.
    """
    text = path.read_text()
    blocks = [block for mark, block in BLOCK.findall(text) if marked or not mark]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = []
    for words in (shlex.split(line, comments=True) for line in lines):
        if words[:4] == ["accelerate", "launch", "-m", "mqa_hf"]:
            words = ["mqa-hf", *words[4:]]
        if words[:1] == ["mqa-hf"]:
            found.append([word for word in words if word != "..."])
    return found


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A directory with what the pages speak of, tiny."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    shape = {"vocab_size": 93, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2)).save_pretrained("original")
    write_tokenizer(Path("original"))
    for name in ("text", "held-out"):
        rows = [{"text": f"{name}: row {n} of a text that goes on for some words " * 3} for n in range(60)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(words):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, f"{words}: {result.output} {result.exception}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_on_a_page_is_understood(path):
    group = get_command(app)
    for _, name, *words in commands(path):
        command = group.get_command(None, name)
        assert command is not None, name
        command.make_context(name, list(words)).close()


def test_the_tutorial_runs_as_it_stands(workspace):
    for _, *words in commands(DOCS / "tutorial.md"):
        run(words)
    assert "Quality and speed" in Path("trained/README.md").read_text()
    found = json.loads(Path("evaluation/evaluation.json").read_text())
    assert [c["name"] for c in found["checkpoints"]] == ["original", "mean", "shared", "wide", "trained"]
    (code,) = re.findall(r"^```python\n(.*?)^```", (DOCS / "tutorial.md").read_text(), re.MULTILINE | re.DOTALL)
    code = code.replace(", trust_remote_code=True", "")  # the package is imported here
    exec(code, {"AutoModelForCausalLM": AutoModelForCausalLM, "AutoTokenizer": AutoTokenizer})


@pytest.mark.parametrize("name", ["../README.md", "choosing.md", "evaluation.md", "serving.md", "uptraining.md"])
def test_the_commands_of_a_page_run(workspace, name):
    """As they stand there, but for names and sizes."""
    save(make_seq2seq("bart", {**BART, "eos_token_id": 2}), Path("translator"))
    write_tokenizer(Path("translator"))
    pairs = [{"en": f"row {n} of words", "de": f"words of row {n}"} for n in range(60)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    Path("shape.json").write_text(json.dumps({**LlamaConfig(hidden_size=32, intermediate_size=48,
        num_attention_heads=4, num_hidden_layers=1).to_diff_dict()}))  # fmt: skip
    recipe = yaml.safe_load(re.findall(r"^```yaml\n(.*?)^```", (DOCS / "uptraining.md").read_text(), re.M | re.S)[0])
    recipe["source"] = "original"
    for step in ("convert", "uptrain", "evaluate"):
        sizes = iter(SIZES[step].split())
        recipe[step] |= {option.removeprefix("--"): value for option, value in zip(sizes, sizes)}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    run(["convert", "original", "converted"])

    for number, (_, command, *words) in enumerate(commands(DOCS / name, marked=False)):
        if command == "demo":  # tests/eval/test_demo.py runs it
            continue
        output = "converted" if command == "evaluate" else f"output-{number}"
        names = {"ORIGINAL": "original", "DIRECTORY_OR_ID": "original", "CONVERTED": "converted", "OUTPUT": output}
        if name == "../README.md":
            names = {"SOURCE": "original", "CONVERTED": "fitted", "LATENT": "latent", "TRAINED": "trained"}
        if {"--calibration-columns", "--attention"} & set(words):
            names["DIRECTORY_OR_ID"] = "translator"
        if command == "benchmark":
            names["llama-2-7b"] = "original"
        sizes = [*SIZES.get(command, "").split(), *(["--latent", "32"] if "latent" in words else [])]
        run([command, *(names.get(word, word) for word in words), *sizes])


def test_the_python_of_the_readme_runs(workspace):
    (code,) = re.findall(r"^```python\n(.*?)^```", (DOCS.parent / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    for old, new in {
        '"SOURCE"': '"original"',
        'calibration="text.jsonl"': 'calibration="text.jsonl", calibration_tokens=1024, sequence_length=32',
        ", trust_remote_code=True": "",  # the package is imported here
    }.items():
        assert old in code
        code = code.replace(old, new)
    exec(code, {})
    assert Path("CONVERTED/config.json").is_file()


def test_the_page_of_families_is_that_of_the_table():
    for model_type in FAMILIES:
        need(model_type)
    made = "python tests/helpers/family_page.py > docs/families.md"
    assert (DOCS / "families.md").read_text() == page(), f"run {made}"


def test_every_family_names_official_checkpoints():
    assert set(CHECKPOINTS) == set(FAMILIES)
