"""What trainings write beside their weights, and into model cards."""

import json
from pathlib import Path

import pytest

from mqa_hf.base.card import with_section
from mqa_hf.base.errors import MQAError
from mqa_hf.finetune.card import HEADING, add_training_section
from mqa_hf.finetune.records import PretrainingRecord, UptrainingRecord

ROOT = Path(__file__).parents[2]
PUBLISHED = json.loads((ROOT / "docs" / "uptraining-smollm2.json").read_text())["uptraining"]
CARD = """---
license: mit
---

# A model

## Use

```bash
## Made by a comment in code
run
```

## Made by

a command
"""


def test_what_earlier_versions_wrote_can_be_read():
    record = UptrainingRecord.of(PUBLISHED, "uptraining.json")
    assert record.options["losses"] == [["kl", 1.0]]
    assert record.validation.after["kl"] < record.validation.before["kl"]
    assert record.log["main"] == PUBLISHED["log"]["main"]
    shipped = PretrainingRecord.read(ROOT / "eval" / "shakespeare")
    assert shipped.parameters == 3_541_248
    assert shipped.version == 1


def test_a_record_is_the_same_when_it_is_read_again(tmp_path):
    record = UptrainingRecord.of(PUBLISHED, "uptraining.json")
    record.write(tmp_path)
    assert UptrainingRecord.read(tmp_path) == record
    written = json.loads((tmp_path / "uptraining.json").read_text())
    assert written == {**PUBLISHED, "version": 1, "student": None}


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"tokens": "many"}', '{"version": 2}'])
def test_a_file_that_is_no_record_is_said(tmp_path, content):
    (tmp_path / "uptraining.json").write_text(content)
    with pytest.raises(MQAError, match=r"uptraining\.json"):
        UptrainingRecord.read(tmp_path)


def test_a_section_takes_the_place_of_the_one_before_and_leaves_the_rest():
    once = with_section(CARD, "## Training", "first\n\n### Details\n\nmore")
    assert once == f"{CARD}\n## Training\n\nfirst\n\n### Details\n\nmore\n"
    again = with_section(once + "\n## Quality\n\ntables\n", "## Training", "second")
    assert again == f"{CARD}\n## Training\n\nsecond\n\n## Quality\n\ntables\n"
    assert with_section(CARD, "## Made by", "hand").endswith("run\n```\n\n## Made by\n\nhand\n")
    assert with_section("", "## Use", "words") == "## Use\n\nwords\n"


def test_a_card_keeps_what_others_wrote_when_a_model_is_trained_again(tmp_path):
    card = tmp_path / "README.md"
    card.write_bytes(CARD.encode() + b"\nw\xf6rds in another encoding. No training has followed.\n")
    record = UptrainingRecord.of(PUBLISHED, "uptraining.json")
    add_training_section(tmp_path, record, None)
    with card.open("a") as file:
        file.write("\n## Quality and speed\n\ntables\n")
    add_training_section(tmp_path, record, None)
    content = card.read_bytes()
    assert content.count(HEADING.encode()) == 1
    assert content.endswith(b"## Quality and speed\n\ntables\n")
    assert b"w\xf6rds in another encoding. Training followed." in content
    assert f"{PUBLISHED['validation']['after']['kl']:.3f} |".encode() in content
