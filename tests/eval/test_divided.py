"""`mqa-hf benchmark` by several processes, which divide the model."""

import json
import os
import socket
import subprocess
import sys

import pytest
from transformers import LlamaConfig

from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.eval.divided import of_rank

SHAPE = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


def timed(directory, ranks, *options):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}"]
    command += ["-m", "mqa_hf", "benchmark", directory / "shape", "--device", "cpu", "--output", directory / "times"]
    return subprocess.run(
        [str(word) for word in (*command, *options)], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


@pytest.mark.parametrize("heads", [4, 3])
def test_two_processes_time_a_divided_model(heads, tmp_path):
    shape = {**SHAPE, "hidden_size": 16 * heads}
    config = LlamaConfig(**shape, num_attention_heads=heads, num_key_value_heads=heads)
    config.save_pretrained(tmp_path / "shape")
    done = timed(tmp_path, 2, "--cells", "2x16", "--tokens", "4", "--rounds", "1", "--engines", "mqa-hf,dynamic")
    if heads == 3:
        assert done.returncode != 0
        assert f"2 processes do not divide the 3 query heads of {tmp_path / 'shape'}" in done.stderr
        assert "MQAError" not in done.stderr
        return
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "times").read_text().splitlines()]
    assert [(r["kv_heads"], r["engine"], r["ranks"]) for r in records] == [
        (heads, "mqa-hf", 2),
        (heads, "dynamic", 2),
        (1, "mqa-hf", 2),
        (1, "dynamic", 2),
    ]
    for r in records:
        held = 2 if r["kv_heads"] == 4 else 1  # of 2 query heads, and half of the MLP, the head and the embedding
        layer = 64 * 16 * (2 * 2 + 2 * held) + 3 * 64 * 48
        weights, norms = 4 * (2 * layer + 64 * 64), 4 * 5 * 64
        assert r["bytes_per_step"] == weights + 4 * 2 * 2 * 16 * 2 * held * 16
        embedding = r["weight_bytes"] - weights - norms
        assert embedding in (4 * 64 * 64, 4 * 128 * 64)  # transformers 5.17 does not divide it


def test_a_rank_reads_its_heads_and_the_shared_one():
    whole = MQAConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=1)
    own = of_rank(whole, 4)
    assert (own.num_attention_heads, own.num_key_value_heads, own.intermediate_size, own.vocab_size) == (1, 1, 24, 32)
    assert of_rank(whole, 1) is whole
