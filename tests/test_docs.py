"""Documentation that is made from the code is as the code makes it."""

from pathlib import Path

from family_page import page

from mqa_hf.conversion.families import FAMILIES
from mqa_hf.conversion.families.checkpoints import CHECKPOINTS

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_of_families_is_that_of_the_table():
    made = "python tests/helpers/family_page.py > docs/families.md"
    assert (DOCS / "families.md").read_text() == page(), f"run {made}"


def test_every_family_names_official_checkpoints():
    assert set(CHECKPOINTS) == set(FAMILIES)
