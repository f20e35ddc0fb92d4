"""Print, for every family and configuration that the tests cover, the largest logit differences in float32:

    python tests/helpers/family_table.py

`exact`: converted with all heads, against the source. `mean`: pooled to one head, against the source's class with its
heads overwritten by their mean.
"""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from sources import CASES, largest_difference, make_model, overwrite_heads_with_mean, save
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from mqa_hf.conversion import convert, inspect


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print("| family | configuration | logits up to | exact | mean |\n|---|---|---|---|---|")
    for model_type, what, config in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            theirs = make_model(model_type, config)
            source = save(theirs, root / "source")
            heads = inspect(source)["num_key_value_heads"]
            differences = []
            for kv_heads in (heads, 1):
                if kv_heads != heads:
                    theirs = AutoModelForCausalLM.from_pretrained(source).eval()
                    overwrite_heads_with_mean(theirs, kv_heads)
                convert(source, root / f"to-{kv_heads}", kv_heads=kv_heads, overwrite=True)
                ours = AutoModelForCausalLM.from_pretrained(root / f"to-{kv_heads}").eval()
                differences.append(largest_difference(ours, theirs))
        (exact, size), (mean, _) = differences
        print(f"| {model_type} | {what} | {size:.1f} | {exact:.1e} | {mean:.1e} |", flush=True)


if __name__ == "__main__":
    main()
