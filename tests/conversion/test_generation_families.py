"""One model of each family generates, greedily and with beams, what the source's class does."""

import pytest
import torch
from sources import CASES, IDS, batch, kv_heads_of, make_model, save
from transformers import AutoModelForCausalLM

from mqa_hf import convert

TOKENS = 24
FIRST = {family: fields for family, _, fields in reversed(CASES)}


@pytest.mark.parametrize("model_type", FIRST)
def test_it_generates_what_the_source_does(model_type, tmp_path):
    room = {
        name: 96 for name in ("max_position_embeddings", "n_positions", "max_seq_len") if name in FIRST[model_type]
    }
    theirs = make_model(model_type, FIRST[model_type] | room)
    convert(save(theirs, tmp_path / "source"), tmp_path / "ours", kv_heads=kv_heads_of(theirs))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids, mask = batch()
    for num_beams in (1, 4):
        tokens = [
            model.generate(
                ids,
                attention_mask=mask,
                num_beams=num_beams,
                use_cache=use_cache,
                do_sample=False,
                min_new_tokens=TOKENS,
                max_new_tokens=TOKENS,
                pad_token_id=0,
            )
            for model, use_cache in ((theirs, True), (ours, True), (ours, False))
            if use_cache or num_beams == 1
        ]
        assert tokens[0].shape == (len(ids), ids.shape[1] + TOKENS)
        for other in tokens[1:]:
            torch.testing.assert_close(other, tokens[0])
        by_length = (ours.config.rope_parameters or {}).get("rope_type") in ("dynamic", "longrope")
        fast = not by_length or model_type == "phimoe"  # which never uses its long factors
        assert (ours.decoding.engine is not None) == fast
        ours.decoding.release()


def test_phi3_generates_across_the_limit_of_its_short_rotary_frequencies(tmp_path):
    """Beyond it all keys are rotated anew. (5.17's own class loses the context there; without a cache it does not.)"""
    theirs = make_model("phi3", dict(CASES[IDS.index("phi3: longrope")][2], original_max_position_embeddings=20))
    convert(save(theirs, tmp_path / "source"), tmp_path / "ours", kv_heads=kv_heads_of(theirs))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids, mask = batch()
    options = {"min_new_tokens": 20, "max_new_tokens": 20, "pad_token_id": 0, "do_sample": False}
    expected = theirs.generate(ids, attention_mask=mask, use_cache=False, **options)
    torch.testing.assert_close(ours.generate(ids, attention_mask=mask, **options), expected)
