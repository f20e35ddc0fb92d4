"""Sources with normalised queries and keys, caps, sinks, windows or experts in configurations that no checkpoint has.

Each type has a few configurations, the same at every run. To draw more: MQA_FUZZ=50 pytest FILE
"""

import os

import pytest
import torch
from odd_sources import ODD, OLDER, odd, odd_mixture, odd_older
from sources import EXPERTS, batch, kv_heads_of, largest_difference, make_model, save
from transformers import AutoModelForCausalLM

from mqa_hf import convert

SEEDS = range(int(os.environ.get("MQA_FUZZ", "2")))
TOLERANCE = 1e-4  # on logits of order 10


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("model_type", [*ODD, *OLDER, *EXPERTS])
def test_with_all_heads_it_is_the_source(model_type, seed, tmp_path):
    make = odd_mixture if model_type in EXPERTS else odd_older if model_type in OLDER else odd
    theirs = make_model(model_type, make(model_type, seed))
    theirs.set_attn_implementation("eager")  # which knows caps and sinks
    convert(save(theirs, tmp_path / "source"), tmp_path / "ours", kv_heads=kv_heads_of(theirs))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    difference, size = largest_difference(ours, theirs)
    assert size > 1
    assert difference <= TOLERANCE, f"{difference} on logits up to {size}"
    for model in (ours, theirs):
        model.generation_config.eos_token_id = None
    ids, mask = batch()
    for given in (mask, torch.ones_like(mask)):
        for beams in (1, 3):
            found, expected = (
                model.generate(
                    ids, attention_mask=given, num_beams=beams, max_new_tokens=9, do_sample=False, pad_token_id=0
                )
                for model in (ours, theirs)
            )
            assert torch.equal(found, expected), (beams, bool(given.all()))
