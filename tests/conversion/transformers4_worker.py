"""The logits of checkpoints in transformers 4: a folder that holds it, the token ids, the checkpoints."""

import sys

sys.path.insert(0, sys.argv[1])

import torch
import transformers
from transformers import AutoModelForCausalLM

assert transformers.__version__.startswith("4."), transformers.__version__
ids = torch.load(sys.argv[2])
for directory in sys.argv[3:]:
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="eager", output_loading_info=True
        )
        with torch.no_grad():
            found = {"logits": model.float().eval()(ids).logits}
        found |= {name: sorted(map(str, loading[name])) for name in ("missing_keys", "unexpected_keys")}
    except Exception as error:  # reported by the process that waits
        found = {"error": f"{type(error).__name__}: {error}"}
    torch.save(found, f"{directory}/transformers4.pt")
