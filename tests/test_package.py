"""The distribution: what an installation contains and what it does not."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_packages_are_the_folders_with_an_init(project):
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    expected = {"mqa_hf" if name == "mqa_hf" else f"mqa_hf.{name}" for name in folders}
    settings = project["tool"]["setuptools"]
    assert set(settings["packages"]) == expected
    assert settings["package-dir"] == {name: name.rpartition(".")[2] for name in expected}


def test_the_wheel_is_complete_and_takes_no_other_names(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        check=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"mqa_hf"}
    for folder in ("mqa_hf", "conversion", "eval"):
        for path in (ROOT / folder).iterdir():
            if path.suffix in (".py", ".jinja") or path.name == "py.typed":
                place = f"mqa_hf/{path.name}" if folder == "mqa_hf" else f"mqa_hf/{folder}/{path.name}"
                assert place in names


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["inspect", "--help"]])
def test_every_option_is_explained(arguments):
    result = subprocess.run(
        [sys.executable, "-m", "mqa_hf.cli", *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200", "TERM": "dumb"},
    )
    options = [line for line in result.stdout.splitlines() if "--" in line and "│" in line]
    assert all(len(line.strip("│ ").split()) > 3 for line in options), result.stdout
