"""Print the largest logit differences in float32 for every tested family and configuration:

    python tests/helpers/family_table.py

`exact`: converted with all heads, compared with the source. `mean`: pooled to one head, compared with the source's
class with its heads overwritten by their mean.
"""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from seq2seq_sources import SEQ2SEQ_CASES, make_seq2seq, overwrite_with_mean, seq2seq_difference
from sources import CASES, largest_difference, make_model, overwrite_heads_with_mean, save
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq
from transformers.utils import logging

from mqa_hf import convert, inspect
from mqa_hf.conversion.loading import capped

ATTENTIONS = ("decoder", "cross", "encoder")


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print("| family | configuration | logits up to | exact | mean |\n|---|---|---|---|---|")
    for model_type, what, config in CASES:
        model = make_model(model_type, config)
        measure(model_type, what, model, AutoModelForCausalLM, largest_difference, overwrite_heads_with_mean, {})
    for model_type, what, config in SEQ2SEQ_CASES:
        auto = AutoModelForSpeechSeq2Seq if model_type == "whisper" else AutoModelForSeq2SeqLM
        model = make_seq2seq(model_type, config)

        def overwrite(model, kv_heads):
            overwrite_with_mean(model, kv_heads, ATTENTIONS)

        measure(model_type, what, model, auto, seq2seq_difference, overwrite, {"attention": ATTENTIONS})


def measure(model_type, what, model, auto, difference, overwrite, options) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        source = save(model, root / "source")
        heads = inspect(source)["num_key_value_heads"]
        differences = []
        for kv_heads in (heads, 1):
            # Correct in every version: transformers 5.17's UMT5 loses its bias with sdpa, and Falcon's eager
            # attention adds ALiBi twice.
            implementation = "eager" if options else None
            theirs = capped(auto.from_pretrained(source, attn_implementation=implementation).eval())
            if kv_heads != heads:
                overwrite(theirs, kv_heads)
            chosen = options if kv_heads == 1 else {}
            convert(source, root / f"to-{kv_heads}", kv_heads=kv_heads, overwrite=True, **chosen)
            differences.append(difference(auto.from_pretrained(root / f"to-{kv_heads}").eval(), theirs))
    (exact, size), (mean, _) = differences
    print(f"| {model_type} | {what} | {size:.1f} | {exact:.1e} | {mean:.1e} |", flush=True)


if __name__ == "__main__":
    main()
