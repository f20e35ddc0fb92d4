"""The distribution: what an installation contains and what it does not."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_packages_are_the_folders_with_an_init(project):
    tops = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    folders = {path.parent.relative_to(ROOT) for top in tops for path in (ROOT / top).rglob("__init__.py")}
    settings = project["tool"]["setuptools"]
    assert set(settings["packages"]) == {
        ".".join(("mqa_hf", *f.parts)).replace("mqa_hf.mqa_hf", "mqa_hf") for f in folders
    }
    assert settings["package-dir"] == {("mqa_hf" if top == "mqa_hf" else f"mqa_hf.{top}"): top for top in tops}


def test_the_wheel_is_complete_and_takes_no_other_names(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        check=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"mqa_hf"}
    demo = {path for path in (ROOT / "eval" / "shakespeare").rglob("*") if path.is_file()}
    assert demo
    for folder in ("mqa_hf", "conversion", "eval", "finetune"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".jinja", ".yaml") or path.name == "py.typed" or path in demo:
                place = path.relative_to(ROOT / folder if folder == "mqa_hf" else ROOT)
                assert f"mqa_hf/{place}" in names


def test_the_citation_and_the_changelog_have_the_version(project):
    version = project["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.mark.slow
def test_the_release_installs_in_a_clean_environment(tmp_path, project):
    """The wheel that is built from the sdist converts, away from the repository; dependencies come from an index."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", ROOT]
    subprocess.run(build, check=True, capture_output=True)
    version = project["project"]["version"]
    assert {path.name for path in (tmp_path / "dist").iterdir()} == {
        f"mqa_hf-{version}.tar.gz",
        f"mqa_hf-{version}-py3-none-any.whl",
    }
    with tarfile.open(tmp_path / "dist" / f"mqa_hf-{version}.tar.gz") as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "eval/shakespeare/config.json"} <= names
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    here = {"cwd": tmp_path, "check": True, "capture_output": True, "text": True}
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    constraints = ["--constraint", ROOT / "constraints.txt"]
    subprocess.run([tmp_path / "venv/bin/pip", "install", "--quiet", *constraints, wheel], **here)
    command = tmp_path / "venv/bin/mqa-hf"
    assert subprocess.run([command, "--version"], **here).stdout.split()[1] == version
    (model,) = (tmp_path / "venv").rglob("shakespeare/config.json")
    subprocess.run([command, "convert", model.parent, "converted"], **here)
    assert (tmp_path / "converted" / "config.json").is_file()


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
