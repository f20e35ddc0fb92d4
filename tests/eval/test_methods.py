"""The comparison of methods runs every one of them and ends at the original's loss."""

import json
import subprocess
import sys

from sources import LLAMA, make_model, save
from tokenizer import write_tokenizer


def test_every_method_is_measured(tmp_path):
    source = save(
        make_model("llama", {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 4}), tmp_path / "source"
    )
    write_tokenizer(source)
    text = tmp_path / "text.txt"
    text.write_text("all work and no play makes a dull model. " * 100)
    command = [sys.executable, "-m", "mqa_hf.eval.methods", source, "--calibration", text, "--validation", text]
    command += ["--calibration-tokens", "512", "--tokens", "256", "--sequence-length", "32"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = {row["conversion"]: row for row in map(json.loads, (x for x in output.splitlines() if x.startswith("{")))}
    assert len(rows) == 2 * 6 + 3
    assert rows["shared + refit, 1 head 2 wide"]["cache_bytes"] == rows["mean, 2 head(s)"]["cache_bytes"]
    assert rows["shared + refit, cache of 2 heads"]["cache_bytes"] <= rows["mean, 2 head(s)"]["cache_bytes"]
    assert "original" in output
