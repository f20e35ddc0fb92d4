"""Training with transformers' Trainer: it shows progress and can be killed at any step and resumed."""

import json
import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainerCallback, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from mqa_hf.base.devices import processes
from mqa_hf.base.errors import MQAError

from .arguments import training_arguments
from .callbacks import LastStep, Progress, SaveWhenTold
from .checkpoints import check_disk, last_checkpoint
from .data import IGNORED, TrainingSet
from .losses import LOSSES, Objective, core, uncompiled
from .options import Run
from .order import POOL, by_like_length, in_order
from .saving import SaveByTime, Saver, is_whole, read_optimizer, read_weights

DIVERGED = 1.5, 1.0  # diverged: a loss above 1.5 times the first one plus 1 nat


class LossTrainer(Trainer):
    """transformers' Trainer with an [`Objective`], whose losses are summed over tokens of all processes."""

    objective: Objective
    model: nn.Module

    def __init__(self, objective: Objective, **kwargs: Any):
        super().__init__(**kwargs)
        self.objective = objective
        self.saver: Saver | None = None  # `None`: the Trainer writes checkpoints itself (DeepSpeed, FSDP1)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of the whole step
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
        loss = outputs["loss"] * self.accelerator.num_processes  # as gradients are averaged over processes
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
        """Raise MQAError if training has diverged. All processes see the same numbers."""
        first = loss
        if math.isfinite(loss) and math.isfinite(grad_norm):
            logged = [(int(line["step"]), line["loss"]) for line in self.state.log_history if "loss" in line]
            # Steps of pairs differ in their lengths, so compare means over many steps.
            first, loss = ends(logged, POOL if by_like_length(self.train_dataset) else 1)
            share, more = DIVERGED
            if loss <= share * abs(first) + more:
                return
        if self.saver is not None:
            self.saver.settle()
        began = f"; it was {first:.4g} at first" if math.isfinite(first) else ""
        kept = last_checkpoint(Path(str(self.args.output_dir)))
        raise MQAError(
            f"training diverged: at step {self.state.global_step} the loss is {loss:.4g} and the norm of the "
            f"gradient {grad_norm:.4g}{began}. "
            + (f"{kept} has the last finite weights. " if kept else "")
            + f"Lower `learning_rate` ({self.args.learning_rate:g}) or raise `batch_tokens`, and start over with "
            f"`restart`"
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        local = [p.to_local() if hasattr(p, "to_local") else p for p in self.model.parameters()]
        finite = torch.stack([p.isfinite().all() for p in local if p.numel()]).all().to(self.args.device)
        if not bool(self.accelerator.gather(finite).all()):
            self._check(math.nan, math.nan)
        if self.args.should_save:
            check_disk(Path(str(self.args.output_dir)), 3 * sum(p.numel() * p.element_size() for p in local))
        if self.saver is None:
            super()._save_checkpoint(model, trial)
            return
        partial = self.saver.begin(self.state.global_step)
        self._save_rng_state(str(partial))
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), partial / SCHEDULER_NAME)
            self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
        self.saver.write(partial, self.model, self.own_optimizer)

    @property
    def own_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)  # type: ignore[return-value]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if is_whole(resume_from_checkpoint):
            read_weights(resume_from_checkpoint, self.model)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_whole(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        read_optimizer(checkpoint, self.model, self.own_optimizer)
        assert self.lr_scheduler is not None
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The mean of each loss over the tokens of the evaluation rows, during training."""
        model = self.model_wrapped
        model.eval()
        total: Any = 0
        with torch.no_grad(), self.compute_loss_context_manager(), uncompiled():
            for inputs in self._shared_batches(self.eval_dataset if eval_dataset is None else eval_dataset):
                _, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
                total = total + outputs["sums"]
        model.train()
        metrics = self._means(total, "eval_")
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _shared_batches(self, rows: Any) -> Iterator[dict[str, torch.Tensor]]:
        """This process's share of the rows in batches. All processes get the same number of batches, as sharded models
        need; rows added for that have no labels."""
        size = self.args.per_device_eval_batch_size
        count = -(-len(rows) // (size * self.accelerator.num_processes))
        first = self.accelerator.process_index * count * size
        for start in range(first, first + count * size, size):
            there = [i < len(rows) for i in range(start, start + size)]
            batch = self.data_collator([rows[i if known else 0] for i, known in enumerate(there, start)])
            batch["labels"][~torch.tensor(there)] = IGNORED
            yield batch


def ends(logged: Sequence[tuple[int, float]], window: int) -> tuple[float, float]:
    """Mean losses of the first and of the last steps, at least `window` of each if there are as many.

    Args:
        logged: for each log line, the step and the mean loss since the previous line.
        window: number of steps.
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


def sum_in_float32(accelerator: Any) -> None:
    """Let FSDP2 sum gradients and return losses in float32; accelerate sets 16 bits for both and for weights."""
    plugin = accelerator.state.fsdp_plugin
    if isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )


def prepare_teacher(trainer: Trainer, teacher: PreTrainedModel) -> nn.Module:
    """Shard the teacher (and offload it) like the student, as the accelerate configuration says."""
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
    return teacher.to(accelerator.device)


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compile the layers of each stack of a model in place, with `options` of torch.compile.

    Layers of a stack share their compiled code, so that compiling takes as long for many layers as for a few; what is
    around them is little.
    """
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            inside.update(module.modules())
            for layer in module:
                layer.compile(**options)


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Disable cuDNN's attention kernels, which PyTorch from 2.11 on prefers on Hopper GPUs: with a mask, their
    backward pass gives NaN for lengths that are 64 more than a multiple of 128 (pytorch/pytorch#196678)."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def operations_per_token(model: nn.Module, teacher: nn.Module | None, length: int) -> float:
    """Operations per token: 6 per weight, 2 per weight of the teacher, and those of attention."""
    config = core(model).config
    stack = config.get_text_config(decoder=True)
    attention = 6 * stack.num_hidden_layers * length * stack.hidden_size
    own = 6 * sum(p.numel() for p in model.parameters()) + attention
    return own + (0 if teacher is None else 2 * sum(p.numel() for p in teacher.parameters()) + attention / 3)


def train(
    name: str,
    model: nn.Module,
    objective: Objective,
    run: Run,
    text: TrainingSet,
    directory: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Train a model, or resume a killed training; the result is saved in `directory/final`.

    Args:
        name: name of the phase, for messages.
        model: its parameters that require gradients are trained in place.
        objective: the losses; its teacher is moved to the device and sharded like the model.
        run: the schedule.
        text: the rows; losses are measured on its validation rows at the start, the end and in between.
        directory: directory of the phase.
        callbacks: transformers callbacks in addition to progress.

    Returns:
        The log.

    Raises:
        MQAError: if training diverges, there are fewer rows than a step takes, or the disk is full.
        SystemExit: on SIGTERM, after a checkpoint.
    """
    state = processes()
    history = directory / "final" / "history.json"
    if history.is_file():
        with suppress(ValueError):  # a partly written one is made again
            logged = json.loads(history.read_text())
            if isinstance(logged, list):
                return logged
    rows, steps = text.rows, run.steps(text.row_tokens)
    if hasattr(rows, "__len__") and len(rows) < run.rows:
        raise MQAError(
            f"the text gives {len(rows)} rows of {run.sequence_length} tokens, but a step takes {run.rows}; "
            "lower `batch_tokens` or add text"
        )
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    if state.is_main_process:
        check_disk(directory, (size + 2 * trained) * (run.keep + 1))
    if hasattr(rows, "__len__"):
        rows = in_order(rows, run, steps)
    set_seed(run.seed)
    operations = operations_per_token(model, objective.teacher, run.sequence_length)
    if run.compile:
        compile_layers(model)
        if objective.teacher is not None:
            compile_layers(objective.teacher)
    saving = SaveWhenTold()
    progress = Progress(name, run.rows * text.row_tokens, operations)
    trainer = LossTrainer(
        objective,
        model=model,
        args=training_arguments(run, steps, directory),
        train_dataset=rows,
        eval_dataset=text.validation,
        data_collator=text.collate,
        callbacks=[
            progress,
            *([] if run.save_every else [SaveByTime()]),
            LastStep(text.validation is not None),
            saving,
            *callbacks,
        ],
    )
    # Graphs are not split between the buckets of DDP's gradients: a layer is a small one already.
    with torch._dynamo.config.patch(optimize_ddp=False):
        carry_out(trainer, saving, directory)
    trainer.save_model(str(directory / "final"))
    if state.is_main_process:
        history.write_text(json.dumps(trainer.state.log_history))
    state.wait_for_everyone()
    return trainer.state.log_history


@contextmanager
def saved_aside(trainer: LossTrainer, directory: Path) -> Iterator[None]:
    """Let the trainer write checkpoints in the background, if it can."""
    fsdp1 = trainer.is_fsdp_enabled and not getattr(trainer.accelerator, "is_fsdp2", False)
    if trainer.is_deepspeed_enabled or fsdp1:
        yield
        return
    trainer.saver = Saver(directory, trainer.args.save_total_limit or 1)
    with trainer.saver.working():
        yield


def carry_out(trainer: LossTrainer, saving: SaveWhenTold, directory: Path) -> None:
    """Train from the last checkpoint in `directory`, or from the start, after preparing the teacher."""
    objective = trainer.objective
    if trainer.is_fsdp_enabled:
        sum_in_float32(trainer.accelerator)
    with objective.attach(trainer.model), without_cudnn_attention():
        if objective.teacher is not None:
            objective.teacher = prepare_teacher(trainer, objective.teacher)  # type: ignore[arg-type]
        with processes().main_process_first():
            found = last_checkpoint(directory)
        trainer.args.eval_on_start = trainer.eval_dataset is not None and found is None
        with saving.listening(), saved_aside(trainer, directory):
            trainer.train(resume_from_checkpoint=found)
        if saving.told and trainer.state.global_step < trainer.state.max_steps:
            raise SystemExit(128 + signal.SIGTERM)
    unset_hf_deepspeed_config()  # otherwise models loaded later would be sharded
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
