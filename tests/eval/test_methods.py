"""The comparison of methods runs every one of them and ends at the original's loss."""

import io
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from native_sources import make_native
from rich.console import Console
from sources import BLOOM, LLAMA, make_model, save
from tokenizer import write_tokenizer

from mqa_hf.base.datasheets import Device
from mqa_hf.base.errors import MQAError
from mqa_hf.base.text import load_tokenizer
from mqa_hf.base.tokens import calibration_tokens
from mqa_hf.conversion.loading import load_model
from mqa_hf.eval.by_position import LossByPosition
from mqa_hf.eval.expert_kernels import ExpertTiming
from mqa_hf.eval.kernels import KernelTiming
from mqa_hf.eval.latent_kernels import LatentKernelTiming, Size, record
from mqa_hf.eval.methods import MethodComparison, MethodRecord
from mqa_hf.eval.methods_picture import MethodPicture, read
from mqa_hf.eval.peers.common import mean_loss
from mqa_hf.eval.vllm_times import VLLMTiming


def test_every_method_is_measured(tmp_path):
    source = save(
        make_model("llama", {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 4}), tmp_path / "source"
    )
    write_tokenizer(source)
    text = tmp_path / "text.txt"
    text.write_text("all work and no play makes a dull model. " * 100)
    command = [sys.executable, "-m", "mqa_hf.eval.methods", source, "--calibration", text, "--validation", text]
    command += ["--calibration-tokens", "512", "--tokens", "256", "--sequence-length", "32"]
    command += ["--peers", "--output", tmp_path / "results.jsonl", "--picture", tmp_path / "methods.png"]
    output = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True).stdout
    records = [MethodRecord(**record) for record in json.loads(output)]
    assert records == read(tmp_path / "results.jsonl")
    assert records[0].conversion == "original"
    peers = {record.method.partition(" ")[0] for record in records if record.peer}
    assert peers == {"by", "KIVI", "Palu", "CARE", "MHA2MLA", "TransMLA"}
    rows = {record.conversion: record for record in records[1:] if not record.peer}
    assert len(rows) == 2 * 6 + 3 + 3 + 2
    assert rows["latent, 24 numbers"].cache_bytes == rows["mean, 1 head(s)"].cache_bytes
    assert rows["shared + refit, 1 head 2 wide"].cache_bytes == rows["mean, 2 head(s)"].cache_bytes
    assert rows["shared + refit, cache of 2 heads"].cache_bytes <= rows["mean, 2 head(s)"].cache_bytes
    drawn = (tmp_path / "methods.png").read_bytes()
    MethodPicture([tmp_path / "results.jsonl"], picture=tmp_path / "again.png").run()
    assert drawn == (tmp_path / "again.png").read_bytes()
    both = [tmp_path / "results.jsonl"] * 2
    MethodPicture(both, picture=tmp_path / "two.png", texts=["text"], without="first|random").run()
    assert (tmp_path / "two.png").read_bytes() != drawn
    with pytest.raises(MQAError, match="no results on `texts` prose"):
        MethodPicture(both, picture=tmp_path / "two.png", texts=["prose"]).run()
    with pytest.raises(MQAError, match="is no regular expression"):
        MethodPicture(both, picture=tmp_path / "two.png", without="(").run()
    job = MethodComparison(source, calibration=str(text), validation=[str(text)], sequence_length=32, peers=True)
    console = Console(width=120, record=True, file=io.StringIO())
    job.show(records, console)
    table = console.export_text()
    assert "100.0%" in next(line for line in table.splitlines() if "original" in line)
    assert " 0.0%" in next(line for line in table.splitlines() if "mean, 1 head(s)" in line)
    assert "these are 100% (128 whole), 100% (32 whole) of all" in " ".join(table.split())
    assert "Left out" not in table
    few = [record for record in records if not record.peer or record.method == "KIVI (32 whole)"]
    job.show(few, console)
    assert "no rotary positions: MHA2MLA, TransMLA." in " ".join(console.export_text().split())


def test_what_cannot_be_compared_is_said(tmp_path):
    source = save(make_native("falcon_h1"), tmp_path / "source")
    given = {"calibration": "a.txt", "validation": ["a.txt"]}
    with pytest.raises(MQAError, match="`device` abacus"):
        MethodComparison(source, **given, device="abacus").run()
    with pytest.raises(MQAError, match="does not exist"):
        MethodComparison(tmp_path / "nothing", **given).run()
    with pytest.raises(MQAError, match="`sweep` and `peers` are two tables"):
        MethodComparison(source, **given, sweep=True, peers=True).run()
    with pytest.raises(MQAError, match=r"`output` .* must be a new file"):
        MethodComparison(source, **given, output=source / "config.json").run()
    with pytest.raises(MQAError, match=r"`picture` .* must end in \.png or \.svg"):
        MethodComparison(source, **given, picture=tmp_path / "picture.txt").run()


def test_a_file_of_something_else_is_not_drawn(tmp_path):
    lines = tmp_path / "results.jsonl"
    for text, said in (("", "its first line is not the original's"), ("[]", "line 1 is no object"), ("{", "line 1")):
        lines.write_text(text)
        with pytest.raises(MQAError, match=said):
            MethodPicture([lines], picture=tmp_path / "picture.png").run()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs here")
def test_the_kernel_is_timed_on_a_gpu_only():
    with pytest.raises(MQAError, match="the kernel needs a CUDA device"):
        KernelTiming().run()
    with pytest.raises(MQAError, match="`kv_heads` 3 must divide the 32 query `heads`"):
        KernelTiming(kv_heads=[3]).run()
    with pytest.raises(MQAError, match="the kernel needs a CUDA device"):
        ExpertTiming().run()
    with pytest.raises(MQAError, match="gpt2 has no experts"):
        ExpertTiming(shapes=["gpt2"]).run()
    with pytest.raises(MQAError, match="`batch` 99999 is more than the kernel's 16384 rows for mixtral-8x7b"):
        ExpertTiming(shapes=["mixtral-8x7b"], batch=[1, 99999]).run()
    assert KernelTiming(batch=[1, 256], context=[512, 32768], kv_heads=[8], largest=1.0).sizes == [
        (8, 1, 512), (8, 1, 32768), (8, 256, 512)
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs here")
def test_what_vllm_cannot_time_is_said(tmp_path):
    with pytest.raises(MQAError, match="is no decoder-only model"):
        VLLMTiming("t5-large").resolve()
    with pytest.raises(MQAError, match="`kv_heads` 5 must divide the 32"):
        VLLMTiming("llama-2-7b", kv_heads=5).resolve()
    with pytest.raises(MQAError, match="`cells` takes pairs"):
        VLLMTiming("llama-2-7b", cells=["1"]).resolve()
    with pytest.raises(MQAError, match="no class that vLLM knows"):
        VLLMTiming("pythia-6.9b", kv_heads=1).resolve()
    assert VLLMTiming("pythia-6.9b", kv_heads=1, plugin=True).resolve().plugin
    if find_spec("vllm") is None:
        with pytest.raises(MQAError, match="this needs vLLM"):
            VLLMTiming("llama-2-7b").run()
        return
    [record] = VLLMTiming(save(make_model("llama", LLAMA), tmp_path / "llama"), cells=["1x8"], tokens=2).run()
    assert record.time_per_token_ms > 0


def test_the_kernel_of_latents_is_timed_on_a_gpu_only():
    with pytest.raises(MQAError, match="the kernel needs a CUDA device"):
        LatentKernelTiming().run()
    with pytest.raises(MQAError, match="`components` must be even, got 3"):
        LatentKernelTiming(components=[0, 3]).run()
    with pytest.raises(MQAError, match="`latent` must be a multiple of 32 for 8 and 4 `bits`, got 100"):
        LatentKernelTiming(latent=[100], bits=[8]).run()


def test_the_floor_of_a_latent_is_the_larger_of_bytes_and_operations():
    """Llama-2-7B's shape on a device of 2.4 TB/s and 800 TFLOP/s."""
    device = Device("a GPU", 8e10, 2.4e12, 8e14)
    rotary = record(Size(64, 4096, 32, 256, 512, 16), 300e-6, (50e-6, None), device)
    assert (rotary.bound, round(rotary.floor_ns, 4)) == ("operations", 0.3891)  # 2 · (256 · 512 + 32 · 768) / 8e5
    assert rotary.floor_share == pytest.approx(0.3891 * 64 * 4096e-9 / 300e-6, rel=1e-3)
    plain = record(Size(64, 4096, 32, 256, 0, 8), 40e-6, (50e-6, 1e-3), device)
    assert (plain.bound, round(plain.floor_ns, 4)) == ("bytes", 0.1083)  # 260 / 2400


def test_the_loss_by_position_is_that_of_the_model(tmp_path):
    source = save(make_model("llama", LLAMA), tmp_path / "source")
    write_tokenizer(source)
    text = tmp_path / "text.txt"
    text.write_text("all work and no play makes a dull model. " * 200)
    job = LossByPosition([source, source], text=str(text), length=24, tokens=96)
    (found,) = job.run().values()
    model = load_model(source, dtype=torch.float32)
    rows = calibration_tokens(load_tokenizer(source), str(text), 96, 24, model.config.vocab_size, seed=0)
    assert found == pytest.approx([mean_loss(model, rows)], rel=1e-6)
    assert LossByPosition([Path("a")], text="b", length=3000).parts() == [
        (0, 512),
        (512, 1024),
        (1024, 2048),
        (2048, 2999),
    ]
    with pytest.raises(MQAError, match=r"`length` must be at most .*got 100,000"):
        LossByPosition([source], text=str(text), length=100_000).run()
    unlimited = save(make_model("bloom", BLOOM), tmp_path / "bloom")
    assert LossByPosition([unlimited], text=str(text), length=100_000).resolve().length == 100_000
