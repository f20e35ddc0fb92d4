from pathlib import Path

import torch
from sources import LLAMA, make_model, save

from mqa_hf.eval.speed import contenders, time_per_token


def test_every_contender_is_timed_over_the_same_context(tmp_path: Path):
    source = save(make_model("llama", {**LLAMA, "num_key_value_heads": 3}), tmp_path / "source")
    models = contenders(source, torch.float32, "cpu")
    assert list(models) == ["Llama, 6 query and 3 K/V heads", "Llama, 1 K/V head", "mqa-hf, 1 K/V head"]
    seconds = time_per_token(models, batch=2, context=8, steps=3, warmup=1)
    assert [len(times) for times in seconds.values()] == [3, 3, 3]
    assert all(t > 0 for times in seconds.values() for t in times)
