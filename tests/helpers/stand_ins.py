"""References in place of kernels, so that the step that calls these runs on a CPU, in float64."""

from mqa_hf import step_mqa
from mqa_hf.kernel_append_mqa import naive_append
from mqa_hf.kernel_attend_mqa import naive_attend
from mqa_hf.kernel_norm_mqa import naive_normalise
from mqa_hf.weights_mqa import Projections


def use_references(monkeypatch):
    """In the step of models with key/value heads; latents and experts have more kernels."""
    monkeypatch.setattr(step_mqa, "append", naive_append)
    monkeypatch.setattr(step_mqa, "attend", naive_attend)
    monkeypatch.setattr(step_mqa, "normalise", naive_normalise)
    monkeypatch.setattr(step_mqa, "available", lambda device: True)
    monkeypatch.setattr(step_mqa, "compile_all", lambda run: None)
    monkeypatch.setattr(step_mqa, "Projections", lambda act, triton, rows: Projections(act, False, rows))
