"""The notebooks of the documentation run; the one for a GPU with a smaller model, fewer tokens and on a CPU."""

from importlib.resources import files
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "docs" / "notebooks"


def run(name, **parameters):
    """The cells of a notebook after a run; `parameters` replace those of its second cell."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    if parameters:
        assert "Parameters" in notebook.cells[1].source
        notebook.cells[1].source = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    nbclient.NotebookClient(notebook, timeout=500, kernel_name="python3").execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cells):
    """The losses that the notebook for a CPU shows."""
    return eval(cells[3].outputs[-1]["data"]["text/plain"])


def test_the_notebook_for_a_cpu():
    cells = run("cpu.ipynb")
    losses = shown(cells)
    assert losses["latent"] < losses["fitted"] < losses["mean"]
    assert "latent |" in cells[-1].outputs[-1]["text"]
    said = str([cell.outputs for cell in cells])
    assert 'install "ipywidgets"' not in said
    stored = [cell for cell in nbformat.read(NOTEBOOKS / "cpu.ipynb", as_version=4).cells if cell.cell_type == "code"]
    assert shown(stored) == pytest.approx(losses, abs=0.02)
    assert "/tmp" not in str(stored)
    assert "site-packages" not in str(stored)


@pytest.mark.slow
def test_the_notebook_for_a_gpu():
    model = files("mqa_hf.eval") / "shakespeare"
    text, held_out = (str(model / "text" / f"{name}.jsonl.xz") for name in ("train", "held-out"))
    small = {"calibration_tokens": 4096, "tokens": 4096, "fit_steps": 0, "length": 64, "cells": ["1x16"], "latent": 64}
    cells = run("gpu.ipynb", source=str(model), text=text, held_out=held_out, device="cpu", **small)
    assert "latent" in cells[-1].outputs[-1]["text"]
