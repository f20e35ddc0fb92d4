"""Trainer callbacks: progress, the last evaluation, and saving on SIGTERM."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainerCallback

from mqa_hf.base.console import say
from mqa_hf.base.devices import peak_rate, processes

from .options import LOSSES


class Progress(TrainerCallback):
    """Prints a line per log: tokens, tokens per second, model FLOP utilisation, losses, time left."""

    def __init__(self, name: str, step_tokens: float, operations: float):
        """`operations`: floating-point operations per token, forward and backward, including the teacher's."""
        self.name, self.step_tokens, self.operations = name, step_tokens, operations
        self.start, self.first = time.monotonic(), 0
        self.peak = peak_rate()

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.first = time.monotonic(), state.global_step
        if state.global_step and state.is_world_process_zero:
            say(f"{self.name}: resumes from step {state.global_step} of {state.max_steps}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        done = state.global_step - self.first
        if not state.is_world_process_zero or logs is None or not ("loss" in logs or "eval_lm" in logs):
            return
        size = self.step_tokens
        words = [f"{self.name} {state.global_step}/{state.max_steps}"]
        words += [
            f"{name} {logs[name]:.4g}"
            for name in ("loss", *LOSSES, "grad_norm", *(f"eval_{n}" for n in LOSSES))
            if name in logs
        ]
        if "loss" in logs and done > 0:
            rate = done * size / max(time.monotonic() - self.start, 1e-9)
            words.append(f"{state.global_step * size:,.0f} tokens, {rate:,.0f}/s")
            if self.peak:
                share = rate * self.operations / (self.peak * args.world_size)
                words.append(f"MFU {share:.0%}")
            left = (state.max_steps - state.global_step) * size / rate
            words.append(f"{int(left // 3600)}:{int(left // 60 % 60):02}:{int(left % 60):02} left")
        say("  ".join(words))


class LastStep(TrainerCallback):
    """Evaluates after the last step, without a checkpoint, as the result is saved right away."""

    def __init__(self, evaluate: bool):
        self.evaluate = evaluate

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            control.should_evaluate |= self.evaluate
            control.should_save = False


class SaveWhenTold(TrainerCallback):
    """On SIGTERM, saves a checkpoint after the current step and stops.

    Several processes would get the signal at different steps and wait for each other, so they stop at once.
    """

    def __init__(self) -> None:
        self.told = False

    def on_step_end(self, args, state, control, **kwargs):
        if self.told and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        if processes().num_processes > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "told", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
