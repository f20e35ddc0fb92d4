"""The loss that the comparison prints is the one that the model itself gives."""

import pytest
import torch
from sources import LLAMA, make_model, save
from tokenizer import write_tokenizer

from mqa_hf.conversion import convert
from mqa_hf.eval.loss import cache_bytes, main, mean_loss


def test_the_mean_loss_is_the_model_s_own():
    model = make_model("llama", LLAMA)
    tokens = torch.randint(3, 101, (5, 12))
    expected = model(tokens, labels=tokens).loss.item()
    assert mean_loss(model, tokens, batch=2) == pytest.approx(expected, rel=1e-5)
    assert cache_bytes(model) == 2 * 3 * 6 * 8 * 4


def test_checkpoints_side_by_side(tmp_path, capsys):
    source = save(make_model("llama", LLAMA), tmp_path / "source")
    write_tokenizer(source)
    convert(source, tmp_path / "ours")
    main([source, tmp_path / "ours"], None, 200, 20, "cpu")
    printed = capsys.readouterr().out
    assert "source" in printed
    assert "576 (16 bit)" in printed
    assert "96 (16 bit)" in printed
