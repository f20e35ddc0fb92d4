"""The comparison of methods runs every one of them and ends at the original's loss."""

import io
import json
import subprocess
import sys

import pytest
import torch
from native_sources import make_native
from rich.console import Console
from sources import LLAMA, make_model, save
from tokenizer import write_tokenizer

from mqa_hf.base.errors import MQAError
from mqa_hf.eval.kernels import KernelTiming
from mqa_hf.eval.methods import MethodComparison, MethodRecord


def test_every_method_is_measured(tmp_path):
    source = save(
        make_model("llama", {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 4}), tmp_path / "source"
    )
    write_tokenizer(source)
    text = tmp_path / "text.txt"
    text.write_text("all work and no play makes a dull model. " * 100)
    command = [sys.executable, "-m", "mqa_hf.eval.methods", source, "--calibration", text, "--validation", text]
    command += ["--calibration-tokens", "512", "--tokens", "256", "--sequence-length", "32"]
    output = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True).stdout
    records = [MethodRecord(**record) for record in json.loads(output)]
    assert records[0].conversion == "original"
    rows = {record.conversion: record for record in records[1:]}
    assert len(rows) == 2 * 6 + 3
    assert rows["shared + refit, 1 head 2 wide"].cache_bytes == rows["mean, 2 head(s)"].cache_bytes
    assert rows["shared + refit, cache of 2 heads"].cache_bytes <= rows["mean, 2 head(s)"].cache_bytes
    job = MethodComparison(source, calibration=str(text), validation=[str(text)])
    console = Console(width=120, record=True, file=io.StringIO())
    job.show(records, console)
    table = console.export_text()
    assert "100.0%" in next(line for line in table.splitlines() if "original" in line)
    assert " 0.0%" in next(line for line in table.splitlines() if "mean, 1 head(s)" in line)


def test_what_cannot_be_compared_is_said(tmp_path):
    source = save(make_native("qwen3"), tmp_path / "source")
    given = {"calibration": "a.txt", "validation": ["a.txt"]}
    with pytest.raises(MQAError, match="`device` abacus"):
        MethodComparison(source, **given, device="abacus").run()
    with pytest.raises(MQAError, match="there is no directory"):
        MethodComparison(tmp_path / "nothing", **given).run()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs here")
def test_the_kernel_is_timed_on_a_gpu_only():
    with pytest.raises(MQAError, match="the kernel needs a CUDA device"):
        KernelTiming().run()
    with pytest.raises(MQAError, match="`kv_heads` 3 must divide the 32 query `heads`"):
        KernelTiming(kv_heads=[3]).run()
    assert KernelTiming(batch=[1, 256], context=[512, 32768], kv_heads=[8], largest=1.0).sizes == [
        (8, 1, 512), (8, 1, 32768), (8, 256, 512)
    ]  # fmt: skip
