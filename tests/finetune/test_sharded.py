"""Student and teacher sharded over processes (FSDP2), as accelerate does with finetune/accelerate/fsdp2.yaml."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "options",
    [[], ["attention"], ["bf16"], ["latent"], ["latent", "attention"]],
    ids=["losses of tokens", "attention", "16 bits", "latents", "attention of latents"],
)
def test_sharding_does_not_change_losses_and_gradients(options):
    words = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run(
        [sys.executable, *words, str(Path(__file__).with_name("sharded_worker.py")), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
