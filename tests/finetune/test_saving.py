"""Checkpoints that are written while training goes on."""

import os
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from transformers import TrainerControl

from mqa_hf import MQAConfig, MQAForCausalLM
from mqa_hf.base.errors import MQAError
from mqa_hf.finetune import saving
from mqa_hf.finetune.saving import LEAST, MOST, SaveByTime, Saver, read_optimizer, read_weights


@pytest.mark.parametrize("kind", ["sharded", "replicated"])
def test_two_processes_go_on_from_a_checkpoint_and_one_process_reads_it(kind, tmp_path):
    words = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    worker = str(Path(__file__).with_name("saving_worker.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words, worker, kind, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    sizes = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = MQAForCausalLM(MQAConfig(**sizes, num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=True))
    model.model.layers[0].mlp.requires_grad_(False)
    read_weights(tmp_path / "checkpoint-3", model)
    expected = torch.load(tmp_path / "expected.pt")
    for name, p in model.named_parameters():
        assert not p.requires_grad or torch.equal(p, expected[name]), name


@pytest.fixture
def small():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_training_goes_on_while_a_checkpoint_is_written(small, tmp_path, monkeypatch):
    """What is written are the weights and states of the step at which it was asked for."""
    (model, optimizer), go, plain = small, threading.Event(), dcp.save
    monkeypatch.setattr(dcp, "save", lambda *args, **options: (go.wait(), plain(*args, **options))[1])
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    moment = optimizer.state[model[0].weight]["exp_avg"].clone()
    saver = Saver(tmp_path, keep=2)
    saver.write(saver.begin(7), model, optimizer)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert not (tmp_path / "checkpoint-7").exists()
    go.set()
    with saver.working():
        pass
    read_weights(tmp_path / "checkpoint-7", model)
    read_optimizer(tmp_path / "checkpoint-7", model, optimizer)
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], moment)


def test_a_checkpoint_that_cannot_be_written_ends_training_with_the_reason(small, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp, "save", full)
    saver = Saver(tmp_path, keep=2)
    saver.write(saver.begin(1), *small)
    with pytest.raises(MQAError, match=r"a checkpoint in .* cannot be written: .*No space left on device"):
        saver.begin(2)
    assert not (tmp_path / "checkpoint-1").exists()


def test_what_a_killed_process_left_is_removed_and_old_checkpoints_go(small, tmp_path):
    (tmp_path / "checkpoint-3.partial").mkdir()
    saver = Saver(tmp_path, keep=2)
    for step in (4, 5, 6):
        saver.write(saver.begin(step), *small)
    saver.settle()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-6"]


def saved_at(monkeypatch, seconds, pace, cost):
    """The times of checkpoints in a training with `pace` seconds a step and `cost` seconds a checkpoint."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(saving.time, "monotonic", lambda: clock.now)
    callback, control, state = SaveByTime(), TrainerControl(), SimpleNamespace(global_step=0)
    callback.on_train_begin(None, state, control)
    found = []
    while clock.now < seconds:
        clock.now += pace
        state.global_step += 1
        control.should_save = False
        callback.on_step_end(None, state, control)
        if control.should_save:
            found.append(clock.now)
            clock.now += cost
            callback.on_save(None, state, control)
    return found


def test_checkpoints_come_by_time(monkeypatch):
    assert saved_at(monkeypatch, LEAST - 20, pace=1, cost=1) == []  # a short job has none
    cheap = saved_at(monkeypatch, 3600, pace=0.5, cost=1)
    assert [round(b - a) for a, b in zip([0, *cheap], cheap)] == pytest.approx([LEAST] * len(cheap), abs=12)
    dear = saved_at(monkeypatch, 7200, pace=2, cost=20)
    assert 20 * len(dear) <= 0.03 * 7200 + 20
    late = saved_at(monkeypatch, 7200, pace=2, cost=120)
    assert max(b - a for a, b in pairwise(late)) <= MOST + 120 + 12
    assert saved_at(monkeypatch, 4000, pace=1200, cost=1) == [1200, 2401, 3602, 4803]  # steps longer than that


def test_a_weight_without_a_gradient_so_far_is_no_obstacle(tmp_path):
    def make():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    model, optimizer = make()
    model[0](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    saver = Saver(tmp_path, keep=1)
    saver.write(saver.begin(1), model, optimizer)
    saver.settle()
    other, again = make()
    read_weights(tmp_path / "checkpoint-1", other)
    read_optimizer(tmp_path / "checkpoint-1", other, again)
    assert torch.equal(again.state[other[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])
    (tmp_path / "checkpoint-1" / "weights" / ".metadata").unlink()
    with pytest.raises(MQAError, match=r"checkpoint-1 cannot be read: .*; start over with `restart`"):
        read_weights(tmp_path / "checkpoint-1", other)
