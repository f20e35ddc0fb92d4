"""Self-attention in windows, with a cache and without."""

import pytest
import torch
from sources import LLAMA, make_model, save
from transformers import AutoModelForCausalLM

from mqa_hf import convert
from mqa_hf.base.errors import MQAError


@pytest.mark.parametrize("window", [2, 3, 20])
@torch.no_grad()
def test_a_window_with_a_cache_is_that_without_one(window, tmp_path):
    convert(save(make_model("llama", LLAMA), tmp_path / "source"), tmp_path / "ours", window=window)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = torch.randint(3, 101, (2, 12), generator=torch.Generator().manual_seed(0))
    whole = model(ids, use_cache=False).logits
    out = model(ids[:, :5], use_cache=True)
    steps = [out.logits]
    for t in range(5, 12):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-4)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    model.decoding.enabled = False
    assert torch.equal(model.generate(ids, **options), expected)


def test_a_window_of_one_position_is_refused(tmp_path):
    """transformers' caches keep all of a window but the current position, and of nothing everything."""
    source = save(make_model("llama", LLAMA), tmp_path / "source")
    with pytest.raises(MQAError, match=r"`window` must be a whole number at least 2.*got 1"):
        convert(source, tmp_path / "ours", window=1)
    mistral = save(make_model("mistral", {**LLAMA, "sliding_window": 1}), tmp_path / "mistral")
    with pytest.raises(MQAError, match=r"sliding_window must be at least 2.*got 1"):
        convert(mistral, tmp_path / "ours")
