"""A conversion is killed at random moments; `pytest -m slow -s tests/conversion/test_kill.py` prints where they were.

One process imports the libraries and forks for each conversion, so that most are killed while they write. The seed is
printed; `MQA_HF_KILLS=50` makes it shorter.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter

import pytest
from sources import LLAMA, make_model, save
from tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from mqa_hf import convert

# Reads lines [words, seconds until it is killed or null]; writes how the command ended, and after what time.
DRIVER = """
import json, os, signal, sys, time
import mqa_hf.conversion
from mqa_hf.cli import main

print("ready", flush=True)
for line in sys.stdin:
    words, seconds = json.loads(line)
    begin = time.perf_counter()
    child = os.fork()
    if not child:
        sys.argv = ["mqa-hf", *words]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            main()
        except SystemExit as error:
            os._exit(error.code or 0)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # it has not been waited for, so the number is still its own
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([status, time.perf_counter() - begin]), flush=True)
"""


def files(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def phase(home, replaced):
    """Where a process was killed, by what it left."""
    left = list(home.glob(".output.partial-*"))
    if not left:
        return "before writing" if not replaced else "after the old one was removed"
    if replaced:
        return "removing the old one"
    names = {path.name for path in left[0].iterdir()}
    if "config.json" in names:
        return "loading the result, swapping"
    return "weights, report, card" if "model.safetensors.index.json" in names else "tokenizer and the like"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_process_that_is_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    home, output, source = tmp_path / "home", tmp_path / "home" / "output", tmp_path / "source"
    save(make_model("llama", {**LLAMA, "num_hidden_layers": 12}), source)
    write_tokenizer(source)
    whole, others = {}, (1, 2, 3)
    for heads in others:  # what may stand at the output: one of these, byte for byte, which load
        convert(source, tmp_path / str(heads), kv_heads=heads, max_shard_size="50KB")
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path / str(heads), output_loading_info=True)
        assert not any(info.values())
        AutoTokenizer.from_pretrained(tmp_path / str(heads))
        whole[heads] = files(tmp_path / str(heads))

    errors = tmp_path / "errors"
    with errors.open("w") as stderr:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        )

    def run(heads, seconds):
        words = ["convert", source, output, "--overwrite", "--kv-heads", heads, "--max-shard-size", "50KB"]
        driver.stdin.write(json.dumps([list(map(str, words)), seconds]) + "\n")
        driver.stdin.flush()
        return json.loads(driver.stdout.readline())

    def standing():
        found = files(output)
        return next((heads for heads, expected in whole.items() if found == expected), None)

    try:
        assert driver.stdout.readline() == "ready\n"
        seed = int(os.environ.get("MQA_HF_SEED", time.time_ns() % 2**32))
        draw, phases = random.Random(seed), Counter()
        home.mkdir()
        length = min(run(1, None)[1] for _ in range(4))
        kills, cleared, in_time = int(os.environ.get("MQA_HF_KILLS", 200)), 0, 0
        while phases.total() < kills:
            before = standing()
            assert before is not None
            after = next(h for h in draw.sample(others, 3) if h != before)
            status, _ = run(after, draw.uniform(*draw.choice(((0.3, 1.05), (0.8, 1.05)))) * length)
            assert status in (0, -9)
            found = standing()
            assert found in (before, after), f"kill {phases.total()}, seed {seed}: {sorted(os.listdir(home))}"
            if status == 0:
                in_time += 1
            else:
                phases[phase(home, found == after)] += 1
            if draw.random() < 0.5:  # otherwise the next one is killed over what this one has left
                left = any(home.glob(".output.partial-*"))
                status, took = run(before, None)
                assert status == 0
                length += (took - length) / 4  # of a machine that does other things as well
                assert os.listdir(home) == ["output"]
                assert standing() == before
                cleared += left
        assert run(1, None)[0] == 0
        assert os.listdir(home) == ["output"]
    finally:
        driver.stdin.close()
        driver.wait(timeout=60)
    said = errors.read_text()
    assert "Traceback" not in said
    print(f"\nseed {seed}: {kills} kills, {dict(phases.most_common())}; {in_time} more had ended before")
    print(f"{cleared} runs to the end found something left and cleared it; there was a whole checkpoint each time")
    assert said.count("an earlier run was killed") >= cleared
    assert sum(phases.values()) - phases["before writing"] > kills / 2
