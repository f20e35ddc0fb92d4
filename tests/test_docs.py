"""Documentation that is made from the code is as the code makes it, and its commands are those that there are."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from family_page import page
from tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

from mqa_hf.cli import app
from mqa_hf.conversion.families import FAMILIES
from mqa_hf.conversion.families.checkpoints import CHECKPOINTS

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), DOCS.parent / "README.md"]


def commands(path):
    """The words of each `mqa-hf ...` in the blocks of a page; lines that end in a backslash go on in the next."""
    blocks = re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("mqa-hf ")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_on_a_page_is_understood(path):
    group = get_command(app)
    for _, name, *words in commands(path):
        command = group.get_command(None, name)
        assert command is not None, name
        command.make_context(name, list(words)).close()


def test_the_tutorial_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    shape = {"vocab_size": 93, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2)).save_pretrained("original")
    write_tokenizer(Path("original"))
    for name in ("text", "held-out"):
        rows = [{"text": f"{name}: row {n} of a text that goes on for some words " * 3} for n in range(60)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _, *words in commands(DOCS / "tutorial.md"):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{words}: {result.output} {result.exception}"
    assert "Quality and speed" in Path("trained/README.md").read_text()
    found = json.loads(Path("evaluation/evaluation.json").read_text())
    assert [c["name"] for c in found["checkpoints"]] == ["original", "mean", "shared", "wide", "trained"]
    (code,) = re.findall(r"^```python\n(.*?)^```", (DOCS / "tutorial.md").read_text(), re.MULTILINE | re.DOTALL)
    code = code.replace(", trust_remote_code=True", "")  # the package is imported here
    exec(code, {"AutoModelForCausalLM": AutoModelForCausalLM, "AutoTokenizer": AutoTokenizer})


def test_the_page_of_families_is_that_of_the_table():
    made = "python tests/helpers/family_page.py > docs/families.md"
    assert (DOCS / "families.md").read_text() == page(), f"run {made}"


def test_every_family_names_official_checkpoints():
    assert set(CHECKPOINTS) == set(FAMILIES)
