"""A training job on transformers' Trainer: it shows where it is, can be killed at any step and goes on from there.

Under the directory of a job stand `options.json` (a job goes on only with the options that it began with) and a folder
for each phase with the checkpoints of transformers' Trainer; `final` is the phase's result.
"""

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from rich.console import Console
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_tensorboard_available, is_wandb_available
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import get_last_checkpoint

from mqa_hf.base.devices import peak_rate, processes
from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import read_json

from .data import IGNORED
from .losses import LOSSES, Objective, core

NAMES = {field.name for field in fields(TrainingArguments)}
# Its name in transformers before and after 5.20 or so.
CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in NAMES)
DIVERGED = 1.5, 1.0  # a loss above this share of the first one, and so many more nats, is none that comes back
OPTIONS_FILE = "options.json"
POOL = 50  # steps whose pairs are sorted by length together, as transformers has it


@dataclass(frozen=True)
class Schedule:
    """How a model is trained, whatever on.

    Attributes:
        tokens: to train on (of the decoder), in whole steps.
        sequence_length: of a row.
        batch_tokens: of a step, on all processes and over gradient accumulation; rounded to whole rows. Pairs count
            as `sequence_length` each here.
        micro_batch: rows at once on a process. Default: all of a step's, as many as 16,384 tokens at most.
        learning_rate: at its peak, of AdamW (0.9, 0.95); down to a tenth along a cosine.
        warmup: share of the steps, below 1.
        weight_decay: of matrices.
        bf16: autocast; weights and optimizer stay in float32. Default: where the device has it.
        gradient_checkpointing, compile: as in transformers.
        save_every: steps between checkpoints; 0: about 20 times in a job.
        keep: checkpoints that are kept.
        evaluate_every: steps between evaluations; 0: at the start and at the end only.
        log_every: steps between log lines; 0: about 50 in a job.
        seed: of the order of rows, and of dropout.
        workers: processes that read data.
        report_to: `tensorboard`, `wandb`, both or `none`. Default: which are installed.
        row_tokens: that a row predicts in the mean. Default: `sequence_length`, as packed rows do.
    """

    tokens: int
    sequence_length: int = 512
    batch_tokens: int = 32_768
    micro_batch: int | None = None
    learning_rate: float = 1e-3
    warmup: float = 0.02
    weight_decay: float = 0.1
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    save_every: int = 0
    keep: int = 2
    evaluate_every: int = 0
    log_every: int = 0
    seed: int = 0
    workers: int | None = None
    report_to: str | None = None
    row_tokens: float | None = None

    def __post_init__(self) -> None:
        for name, value, holds, said in (
            ("learning-rate", self.learning_rate, 0 < self.learning_rate < math.inf, "a number above 0"),
            ("warmup", self.warmup, 0 <= self.warmup < 1, "a share of the steps, at least 0 and below 1"),
            ("weight-decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "a number, at least 0"),
            ("seed", self.seed, 0 <= self.seed < 2**32, "at least 0 and below 2**32"),
        ):
            if not holds:
                raise MQAError(f"--{name} must be {said}; got {value:g}")
        unknown = set((self.report_to or "none").split(",")) - {"tensorboard", "wandb", "none"}
        if unknown:
            raise MQAError(f"--report-to takes tensorboard, wandb and none; got {self.report_to!r}")

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return max(1, self.batch_tokens // self.sequence_length)

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.step_tokens)

    @property
    def step_tokens(self) -> float:
        return self.rows * (self.row_tokens or self.sequence_length)

    def split(self, count: int) -> tuple[int, int]:
        """Rows at once on a process, and how often before a step.

        Raises:
            MQAError: where they do not divide a step's rows.
        """
        share = self.rows // count
        if share * count != self.rows:
            raise MQAError(
                f"a step of {self.rows} rows of {self.sequence_length} tokens cannot be shared by {count} "
                f"processes; set --batch-tokens to a multiple of {count * self.sequence_length:,}"
            )
        micro = self.micro_batch
        if micro is None:
            most = max(1, 16_384 // self.sequence_length)
            micro = next(n for n in range(min(share, most), 0, -1) if share % n == 0)
        if share % micro:
            raise MQAError(f"--micro-batch {micro} must divide the {share} rows that a process has in a step")
        return micro, share // micro

    def arguments(self, directory: Path) -> TrainingArguments:
        micro, accumulation = self.split(processes().num_processes)
        gpu = torch.cuda.is_available()
        bf16 = gpu and torch.cuda.is_bf16_supported() if self.bf16 is None else self.bf16
        found = [
            name
            for name, is_there in (("tensorboard", is_tensorboard_available()), ("wandb", is_wandb_available()))
            if is_there
        ]
        workers = self.workers if self.workers is not None else (4 if gpu else 0)
        checkpointing: dict[str, Any] = {CHECKPOINTING: True} if self.gradient_checkpointing else {}
        arguments = TrainingArguments(
            output_dir=str(directory),
            max_steps=self.steps,
            use_cpu=not torch.accelerator.is_available(),
            per_device_train_batch_size=micro,
            per_device_eval_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            learning_rate=self.learning_rate,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            warmup_steps=self.warmup,
            weight_decay=self.weight_decay,
            adam_beta2=0.95,
            bf16=bf16,
            **checkpointing,
            torch_compile=self.compile,
            save_strategy="steps",
            save_steps=self.save_every or max(1, self.steps // 20),
            save_total_limit=self.keep,
            eval_strategy="steps" if self.evaluate_every else "no",
            eval_steps=self.evaluate_every or None,
            logging_steps=self.log_every or max(1, self.steps // 50),
            logging_first_step=True,
            logging_nan_inf_filter=False,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
            train_sampling_strategy="sequential",
            dataloader_pin_memory=gpu,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            report_to=found if self.report_to is None else self.report_to.split(","),
            disable_tqdm=True,
            seed=self.seed,
        )
        # Several GPUs are for several processes (accelerate launch); Trainer would put copies on all of them.
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1
        return arguments


class Progress(TrainerCallback):
    """A line for each log: tokens, tokens per second, model FLOP utilisation, losses, time left."""

    def __init__(self, name: str, schedule: Schedule, operations: float):
        """`operations`: floating-point operations a token, forward and backward, the teacher's included."""
        self.name, self.schedule, self.operations = name, schedule, operations
        self.console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
        self.start, self.first = time.monotonic(), 0
        self.peak = peak_rate()

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.first = time.monotonic(), state.global_step
        if state.global_step and state.is_world_process_zero:
            self.console.print(f"{self.name}: goes on from step {state.global_step} of {state.max_steps}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        done = state.global_step - self.first
        if not state.is_world_process_zero or logs is None or not ("loss" in logs or "eval_lm" in logs):
            return
        size = self.schedule.step_tokens
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
        self.console.print("  ".join(words))


class LastStep(TrainerCallback):
    """Evaluate after it; no checkpoint, since the result is saved at once."""

    def __init__(self, evaluate: bool):
        self.evaluate = evaluate

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            control.should_evaluate |= self.evaluate
            control.should_save = False


class SaveWhenTold(TrainerCallback):
    """Where the process is told to stop (SIGTERM), a checkpoint after the step at hand, and the end.

    Several processes get the signal at different steps, and would wait for each other; they stop where they are.
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


class LossTrainer(Trainer):
    """transformers' Trainer with an [`Objective`]: its losses are summed over tokens, whichever process has them."""

    objective: Objective
    model: nn.Module

    def __init__(self, objective: Objective, **kwargs: Any):
        super().__init__(**kwargs)
        self.objective = objective
        self.model_accepts_loss_kwargs = True  # what compute_loss gives is over the tokens of the whole step
        self._sums: Any = 0
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        count = torch.stack([batch["labels"].ne(IGNORED).sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(count).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if num_items_in_batch is None:
            num_items_in_batch = inputs["labels"].ne(IGNORED).sum()
        taught = None
        if self.objective.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                taught = self.objective.teacher(**{k: v for k, v in inputs.items() if k != "labels"})
        outputs = model(**inputs, count=num_items_in_batch, taught=taught)
        if torch.is_grad_enabled():  # DeepSpeed's engine is never in evaluation mode
            self._sums = self._sums + outputs["sums"]
        loss = outputs["loss"] * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if torch.is_tensor(self._sums) and "loss" in logs:
            logs.update(self._means(self._sums, ""))
            self._sums = 0
        super().log(logs, start_time)
        if "loss" in logs:
            self._check(logs["loss"], logs.get("grad_norm", 0.0))

    def _means(self, sums: torch.Tensor, prefix: str) -> dict[str, float]:
        total = self.accelerator.reduce(sums.clone(), "sum").tolist()
        means = {name: total[i] / max(total[-1], 1) for i, name in enumerate(LOSSES)}
        return {prefix + name: mean for name, mean in means.items() if mean or name in self.objective.weights}

    def _check(self, loss: float, grad_norm: float) -> None:
        """Stop where training has diverged. All processes see the same numbers."""
        first = loss
        if math.isfinite(loss) and math.isfinite(grad_norm):
            logged = [(int(line["step"]), line["loss"]) for line in self.state.log_history if "loss" in line]
            # Steps of pairs differ by how long these are: there, means over all lengths are compared.
            first, loss = ends(logged, POOL if by_like_length(self.train_dataset) else 1)
            share, more = DIVERGED
            if loss <= share * abs(first) + more:
                return
        began = f"; it began at {first:.4g}" if math.isfinite(first) else ""
        kept = last_checkpoint(Path(str(self.args.output_dir)))
        raise MQAError(
            f"training has diverged: at step {self.state.global_step} the loss is {loss:.4g} and the norm of the "
            f"gradient {grad_norm:.4g}{began}. "
            + (f"{kept} has the last weights that are numbers. " if kept else "")
            + f"Lower --learning-rate ({self.args.learning_rate:g}) or raise --batch-tokens, and begin again with "
            "--restart"
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        local = [p.to_local() if hasattr(p, "to_local") else p for p in self.model.parameters()]
        finite = torch.stack([p.isfinite().all() for p in local if p.numel()]).all().to(self.args.device)
        if not bool(self.accelerator.gather(finite).all()):
            self._check(math.nan, math.nan)
        if self.args.should_save:
            check_disk(Path(str(self.args.output_dir)), 3 * sum(p.numel() * p.element_size() for p in local))
        super()._save_checkpoint(model, trial)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The mean of each loss over the tokens of the evaluation rows, while it trains."""
        model = self.model_wrapped
        model.eval()
        total: Any = 0
        with torch.no_grad(), self.compute_loss_context_manager():
            for inputs in self._shared_batches(self.eval_dataset if eval_dataset is None else eval_dataset):
                _, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
                total = total + outputs["sums"]
        model.train()
        metrics = self._means(total, "eval_")
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _shared_batches(self, rows: Any) -> Iterator[dict[str, torch.Tensor]]:
        """This process's share of the rows in batches. All processes have as many batches, as a sharded model needs;
        what is too much has no labels."""
        size = self.args.per_device_eval_batch_size
        count = -(-len(rows) // (size * self.accelerator.num_processes))
        first = self.accelerator.process_index * count * size
        for start in range(first, first + count * size, size):
            there = [i < len(rows) for i in range(start, start + size)]
            batch = self.data_collator([rows[i if known else 0] for i, known in enumerate(there, start)])
            batch["labels"][~torch.tensor(there)] = IGNORED
            yield batch


def ends(logged: Sequence[tuple[int, float]], window: int) -> tuple[float, float]:
    """Mean losses of the first and of the last steps, at least `window` of each (fewer where there are no more).

    Args:
        logged: step, and mean loss of the steps since the line before.
        window: steps.
    """

    def mean(lines: Sequence[tuple[int, float]]) -> float:
        total, steps = 0.0, 0
        for count, loss in lines:
            total, steps = total + count * loss, steps + count
            if steps >= window:
                break
        return total / steps

    counts = [step - before for before, (step, _) in zip([0, *(step for step, _ in logged)], logged)]
    lines = [(max(count, 1), loss) for count, (_, loss) in zip(counts, logged)]
    return mean(lines), mean(lines[::-1])


def check_disk(directory: Path, size: float) -> None:
    """Raise MQAError where a checkpoint of `size` bytes does not fit."""
    there = next(parent for parent in (directory, *directory.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise MQAError(f"a checkpoint takes {size:,.0f} bytes, and {there} has {free:,} free")


def last_checkpoint(directory: Path) -> str | None:
    """The newest checkpoint that is whole: its state, which is written last, can be read. Others are removed."""
    while (found := get_last_checkpoint(str(directory)) if directory.is_dir() else None) is not None:
        with suppress(OSError, ValueError):
            json.loads((Path(found) / "trainer_state.json").read_text())
            return found
        shutil.rmtree(found)
    return None


def sum_in_float32(accelerator: Any) -> None:
    """Let FSDP2 sum gradients and return losses in float32; accelerate has 16 bits for both beside the weights'."""
    plugin = accelerator.state.fsdp_plugin
    if isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )


def prepare_teacher(trainer: Trainer, teacher: PreTrainedModel) -> nn.Module:
    """The teacher where the student's shards are: sharded (and offloaded) as the accelerate configuration says."""
    accelerator = trainer.accelerator
    teacher.requires_grad_(False).eval()
    if trainer.is_deepspeed_enabled:
        import copy

        import deepspeed

        settings = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
        if settings.get("zero_optimization", {}).get("stage", 0) != 3:
            settings["zero_optimization"] = {"stage": 0}
        for name in ("optimizer", "scheduler"):
            settings.pop(name, None)
        engine, *_ = deepspeed.initialize(model=teacher, config=settings)
        engine.eval()
        return engine
    if trainer.is_fsdp_enabled and getattr(accelerator, "is_fsdp2", False):
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, teacher)
    if trainer.is_fsdp_enabled:
        return accelerator.prepare_model(teacher, evaluation_mode=True)
    teacher.to(accelerator.device)
    if trainer.args.torch_compile:
        teacher.compile()
    return teacher


def begin(directory: Path, options: dict[str, Any], restart: bool) -> None:
    """Open a job's directory, or find it again.

    Raises:
        MQAError: where one with other options lies there.
    """
    state = processes()
    with state.main_process_first():
        if not state.is_main_process:
            return
        if restart:
            shutil.rmtree(directory, ignore_errors=True)
        options = json.loads(json.dumps(options, default=str))
        path = directory / OPTIONS_FILE
        before = read_json(path) if path.is_file() else {}
        gone_far = any(directory.glob("*/*/trainer_state.json")) or any(directory.glob("*/final/history.json"))
        if gone_far:
            changed = [n for n in sorted({*before, *options}) if before.get(n) != options.get(n)]
            if changed:
                said = ", ".join(
                    f"{n} was {before.get(n)!r} and is {options.get(n)!r}" for n in changed if n != "files"
                )
                said += "; " * (bool(said) and "files" in changed)
                said += "files of the student, the teacher or the text have changed" * ("files" in changed)
                raise MQAError(
                    f"{directory} holds an unfinished run with other options: {said}. Go on with the same, or begin "
                    "again with --restart"
                )
            return
        if before != options:
            shutil.rmtree(directory, ignore_errors=True)  # a tokenizer or a teacher of other options
        try:
            directory.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(options, indent=2) + "\n")
        except OSError as error:
            raise MQAError(f"{directory} cannot be written: {error}") from error


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """PyTorch's other attention kernels only: from 2.11 on it prefers cuDNN's on Hopper GPUs, whose backward pass
    gives NaN with a mask where lengths are 64 more than a multiple of 128 (pytorch/pytorch#196678)."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def operations_per_token(model: nn.Module, teacher: nn.Module | None, length: int) -> float:
    """Multiplications and additions a token: 6 for each weight, 2 for each of the teacher's, and attention's own."""
    config = core(model).config
    stack = getattr(config, "decoder", config)
    attention = 6 * stack.num_hidden_layers * length * stack.hidden_size
    own = 6 * sum(p.numel() for p in model.parameters()) + attention
    return own + (0 if teacher is None else 2 * sum(p.numel() for p in teacher.parameters()) + attention / 3)


def train(
    name: str,
    model: nn.Module,
    objective: Objective,
    schedule: Schedule,
    rows: Any,
    collate: Callable,
    directory: Path,
    validation: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Train a model, or go on where a job was killed; the result stands in `directory/final`.

    Args:
        name: of the phase, for people.
        model: whose parameters that require gradients are trained, in place.
        objective: what on; its teacher is moved to the device, and sharded as the model is.
        schedule: how long and how.
        rows, collate: examples and how they become a batch.
        directory: of the phase.
        validation: examples that the losses are measured on, at the start, at the end and on the way.
        callbacks: of transformers, more than those that show progress.

    Returns:
        What was logged.

    Raises:
        MQAError: where training diverges, rows are fewer than a step takes, or the disk is full.
        SystemExit: where the process was told to stop (SIGTERM), after a checkpoint.
    """
    state = processes()
    history = directory / "final" / "history.json"
    if history.is_file():
        with suppress(ValueError):  # one that was being written is made again
            return json.loads(history.read_text())
    if hasattr(rows, "__len__") and len(rows) < schedule.rows:
        raise MQAError(
            f"the text gives {len(rows)} rows of {schedule.sequence_length} tokens, and a step takes {schedule.rows}; "
            "lower --batch-tokens or add text"
        )
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    if state.is_main_process:
        check_disk(directory, (size + 2 * trained) * (schedule.keep + 1))
    if hasattr(rows, "__len__"):
        rows = in_order(rows, schedule)
    set_seed(schedule.seed)
    operations = operations_per_token(model, objective.teacher, schedule.sequence_length)
    saving = SaveWhenTold()
    trainer = LossTrainer(
        objective,
        model=model,
        args=schedule.arguments(directory),
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=collate,
        callbacks=[Progress(name, schedule, operations), LastStep(validation is not None), saving, *callbacks],
    )
    if trainer.is_fsdp_enabled:
        sum_in_float32(trainer.accelerator)
    with objective.attach(model), without_cudnn_attention():
        if objective.teacher is not None:
            objective.teacher = prepare_teacher(trainer, objective.teacher)  # type: ignore[arg-type]
        with state.main_process_first():
            found = last_checkpoint(directory)
        trainer.args.eval_on_start = validation is not None and found is None
        with saving.listening():
            trainer.train(resume_from_checkpoint=found)
        if saving.told and trainer.state.global_step < trainer.state.max_steps:
            raise SystemExit(128 + signal.SIGTERM)
    unset_hf_deepspeed_config()  # or what is read next would come in shards
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(directory / "final"))
    if state.is_main_process:
        history.write_text(json.dumps(trainer.state.log_history))
    state.wait_for_everyone()
    return trainer.state.log_history


def in_order(rows: Any, schedule: Schedule) -> Any:
    """The rows of all steps, the same for any number of processes: all of them shuffled, all again, and so on.

    The pairs of a step are of like length, as in arXiv 1706.03762, section 5.1: most of a step would be padding.
    """
    generator = np.random.default_rng(schedule.seed)
    wanted = schedule.steps * schedule.rows
    passes = -(-wanted // len(rows))
    order = np.concatenate([generator.permutation(len(rows)) for _ in range(passes)])[:wanted]
    if by_like_length(rows):
        columns = rows.with_format("arrow")
        lengths = sum(pc.list_value_length(columns[name]).to_numpy() for name in ("input_ids", "labels"))
        pool = POOL * schedule.rows
        order = np.concatenate([by_length(part, lengths, schedule.rows, generator) for part in cut(order, pool)])
    return rows.select(order)


def by_like_length(rows: Any) -> bool:
    """Whether they are pairs, and not streamed."""
    return hasattr(rows, "__len__") and "labels" in rows.column_names


def cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return np.split(order, range(size, len(order), size))


def by_length(order: np.ndarray, lengths: Any, rows: int, generator: np.random.Generator) -> np.ndarray:
    """The same rows, those of like length in one step of so many; steps in random order."""
    steps = cut(order[np.argsort(lengths[order], kind="stable")], rows)
    return np.concatenate([steps[i] for i in generator.permutation(len(steps))])


def as_options(schedule: Schedule) -> dict[str, Any]:
    """What decides the result; how often it is logged, kept and shown does not."""
    said = asdict(schedule)
    shown = {"keep", "log_every", "report_to", "workers", "save_every", "row_tokens"}
    return {f.name: said[f.name] for f in fields(schedule) if f.name not in shown}
