"""Memory and time of a conversion of some size; `pytest -m slow -s tests/conversion/test_scale.py` prints the figures.

Llama-2-7B's shape cut to 8 layers: 3.8 GB in bfloat16 on disk, twice that while the test runs. On a CUDA device
`pytest -m gpu -s tests/conversion/test_scale.py` fits heads, then latents, for all 32 layers: 13.5 GB on disk, twice.
"""

import shutil
import subprocess
import sys
import time

import pytest
import torch
from tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from mqa_hf import convert

GIB = 2**30

RUN = """
import re, sys
from mqa_hf import convert
convert(sys.argv[1], sys.argv[2])
# Not ru_maxrss: that starts with the peak of the process that this one was forked from.
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))
"""


@pytest.mark.slow
def test_peak_memory_and_time_of_a_sharded_conversion(tmp_path):
    config = LlamaConfig(num_hidden_layers=8, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    source = tmp_path / "source"
    model.save_pretrained(source, max_shard_size="1GB")
    del model
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert 3.5e9 < size < 4e9

    copying, converting, peak = [], [], 0
    for _ in range(3):  # in turns, so that a machine whose speed drifts treats both alike
        start = time.perf_counter()
        subprocess.run(["cp", "-r", source, tmp_path / "copy"], check=True)
        copying.append(time.perf_counter() - start)
        shutil.rmtree(tmp_path / "copy")
        start = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-c", RUN, source, tmp_path / "ours"], check=True, capture_output=True, text=True
        )
        converting.append(time.perf_counter() - start)
        peak = max(peak, int(result.stdout.split()[-1]) * 1024)
        shutil.rmtree(tmp_path / "ours")
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import mqa_hf.conversion"], check=True)
    imports = time.perf_counter() - start
    copy, conversion = sorted(copying)[1], sorted(converting)[1]
    print(
        f"\n{size / 1e9:.2f} GB, peak {peak / GIB:.2f} GiB, converted in {conversion:.1f} s (of which {imports:.1f} s "
        f"importing libraries), copied by cp in {copy:.1f} s: {conversion / copy:.2f} times, "
        f"{(conversion - imports) / copy:.2f} times without the imports"
    )
    assert peak < 1.5 * GIB


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "bound"), [({"method": "shared"}, 24), ({"method": "latent", "latent": 256, "key_width": 1024}, 48)]
)
def test_fitting_a_7b_model(options, bound, tmp_path):
    config = LlamaConfig(dtype="bfloat16")
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "source", max_shard_size="2GB")
    write_tokenizer(tmp_path / "source")
    del model
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    report = convert(tmp_path / "source", tmp_path / "ours", calibration_tokens=131_072, device="cuda", **options)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated()
    print(f"\n{options}, 131,072 tokens: {seconds:.0f} s, {peak / GIB:.1f} GiB on the device")
    assert len(report.layers) == 32
    assert peak < bound * GIB
