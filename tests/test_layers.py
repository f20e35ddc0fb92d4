"""Which part imports which: downwards only. CONTRIBUTING.md has the picture."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    "travelling code",
    "mqa_hf.base",
    "mqa_hf.conversion",
    "mqa_hf.finetune",
    "mqa_hf.eval",
    "mqa_hf.serving",
    "mqa_hf.cli",
)
FOLDERS = {"mqa_hf": "mqa_hf"} | {name: f"mqa_hf.{name}" for name in ("conversion", "finetune", "eval", "serving")}
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    """The name that a file is imported by."""
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *parts]).removesuffix(".__init__")


def layer_of(module: str) -> int:
    """The layer of a module of this package; the package itself is on top, since it offers everything."""
    if module.rpartition(".")[2].count("_mqa"):
        return 0
    return next((i for i, layer in enumerate(LAYERS) if (module + ".").startswith(layer + ".")), len(LAYERS))


def imports_of(path: Path) -> list[str]:
    """What a file imports, wherever in it, by full names; imports for type checkers alone are none."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checking = [
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    ]
    found: list[str] = []
    for node in ast.walk(tree):
        if node in checking:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            where = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                inner = f"{where}.{alias.name}"
                found.append(inner if inner in MODULES else where)
    return found


MODULES = {module_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_its_own_layer_and_those_below(path):
    module = module_of(path)
    if module == "mqa_hf":
        return
    upwards = [n for n in imports_of(path) if n.split(".")[0] == "mqa_hf" and layer_of(n) > layer_of(module)]
    assert not upwards, f"{module} imports {upwards}"


@pytest.mark.parametrize("path", [p for p in FILES if layer_of(module_of(p)) == 0], ids=lambda path: path.name)
def test_what_travels_with_a_checkpoint_needs_only_torch_and_transformers(path):
    known = {"torch", "transformers", "triton", "mqa_hf"}
    import sys

    others = {n.split(".")[0] for n in imports_of(path)} - known - set(sys.stdlib_module_names)
    assert not others
    assert all(layer_of(n) == 0 for n in imports_of(path) if n.startswith("mqa_hf"))


def test_every_module_has_a_layer():
    assert {layer_of(module) for module in MODULES} == set(range(len(LAYERS) + 1))
