"""Checkpoints that are written while training goes on, with `torch.distributed.checkpoint`.

    checkpoint-N/weights/      trained weights, by name
    checkpoint-N/optimizer/    states of the optimizer, by name of their weight
    checkpoint-N/*             schedule, random states and the Trainer's state, as the Trainer writes them

Training waits until weights and states are copied to the CPU's memory; a thread writes them. They can be read with
another number of processes. The folder has its name once it is complete.
"""

import shutil
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import TrainerCallback
from transformers.trainer_utils import sort_checkpoints

from mqa_hf.base.devices import processes
from mqa_hf.base.errors import MQAError

WEIGHTS, OPTIMIZER = "weights", "optimizer"
SHARE = 0.03  # of the time of training that may be spent in checkpoints
LEAST, MOST = 300.0, 900.0  # seconds between checkpoints
LOOK = 10.0  # seconds between looks at the clock
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Without PyTorch's warning that there is one process, also if it is told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


class Saver:
    """Writes checkpoints of one training, one at a time.

    Args:
        directory: where they are.
        keep: number of checkpoints to keep.
    """

    def __init__(self, directory: Path, keep: int):
        self.directory, self.keep = directory, keep
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None
        # Collectives of the thread need a group of their own, and its tensors are on the CPU.
        self.group = dist.new_group(backend="gloo") if processes().num_processes > 1 else None
        for left in directory.glob("checkpoint-*.partial") if processes().is_main_process else ():
            shutil.rmtree(left, ignore_errors=True)

    def begin(self, step: int) -> Path:
        """An empty folder for the checkpoint of a step, after the last one is written."""
        self.settle()
        partial = self.directory / f"checkpoint-{step}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        return partial

    def write(self, partial: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy weights and states, and write them to a folder of [`Saver.begin`] in the background."""
        stage = BlockingAsyncStager().stage
        weights = stage(get_model_state_dict(model, options=TRAINED))
        states = stage(get_optimizer_state_dict(model, optimizer, options=TRAINED))
        self.pending = self.thread.submit(self._write, partial, {WEIGHTS: weights, OPTIMIZER: states})

    def _write(self, partial: Path, parts: dict[str, dict[str, Any]]) -> None:
        for name, part in parts.items():  # the processes wait for each other in here
            with quiet():
                dcp.save(part, checkpoint_id=partial / name, process_group=self.group, no_dist=self.group is None)
        if processes().is_main_process:
            target = partial.with_suffix("")
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            for old in sort_checkpoints(str(self.directory))[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)

    def settle(self) -> None:
        """Wait for the checkpoint that is being written; raises MQAError if it cannot be."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (Exception, CheckpointException) as error:
            raise MQAError(f"a checkpoint in {self.directory} cannot be written: {cause(error)}") from error

    @contextmanager
    def working(self) -> Iterator[None]:
        """Wait for the last checkpoint at the end, also after an error."""
        try:
            yield
            self.settle()
        finally:
            self.thread.shutdown()


def is_whole(checkpoint: str | Path) -> bool:
    """Whether a checkpoint was written by a [`Saver`]."""
    return (Path(checkpoint) / WEIGHTS).is_dir()


def read_weights(checkpoint: str | Path, model: nn.Module) -> None:
    """Load the trained weights of a checkpoint into a model."""
    state = get_model_state_dict(model, options=TRAINED)
    _load(state, Path(checkpoint) / WEIGHTS)
    set_model_state_dict(model, state, options=TRAINED)


def read_optimizer(checkpoint: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the states of a checkpoint into an optimizer of the model."""
    state = get_optimizer_state_dict(model, optimizer, options=TRAINED)  # zeros where there was no gradient yet
    _load(state, Path(checkpoint) / OPTIMIZER, DefaultLoadPlanner(allow_partial_load=True))
    set_optimizer_state_dict(model, optimizer, state, options=TRAINED)


def _load(state: dict[str, Any], place: Path, planner: DefaultLoadPlanner | None = None) -> None:
    try:
        with quiet():
            dcp.load(state, checkpoint_id=place, planner=planner, no_dist=not dist.is_initialized())
    except (Exception, CheckpointException) as error:
        said = f"the checkpoint {place.parent} cannot be read: {cause(error)}; start over with `restart`"
        raise MQAError(said) from error


def cause(error: BaseException) -> BaseException:
    """The first process's error; a CheckpointException, which is no Exception, holds those of all processes."""
    if isinstance(error, CheckpointException):
        return next((failure[0] for failure in error.failures.values()), error)
    return error


class SaveByTime(TrainerCallback):
    """Saves a checkpoint so often that training waits for at most `SHARE` of its time, but at least every `MOST`
    seconds. The first one comes after `LEAST` seconds."""

    def __init__(self) -> None:
        self.waited = 0.0  # seconds, for the last checkpoint
        self.next_look = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.first, self.start = state.global_step, time.monotonic()
        self.last, self.next_look = self.start, state.global_step + 1

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < self.next_look:
            return
        now = time.monotonic()
        pace = (now - self.start) / (state.global_step - self.first)
        due = now - self.last >= min(MOST, max(LEAST, self.waited / SHARE))
        # Clocks differ between processes, which must save together.
        decided = [due, max(1, int(LOOK / max(pace, 1e-9)))]
        if processes().num_processes > 1:
            dist.broadcast_object_list(decided, src=0)
        control.should_save = control.should_save or bool(decided[0])
        self.next_look = state.global_step + decided[1]
        self.last = time.monotonic() if control.should_save else self.last

    def on_save(self, args, state, control, **kwargs):
        now = time.monotonic()
        self.waited, self.last = now - self.last, now
