"""Convert a schedule to the arguments of transformers' Trainer."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available, is_wandb_available

from mqa_hf.base.devices import processes

from .options import Run

NAMES = {field.name for field in fields(TrainingArguments)}
# The option's name before and after about transformers 5.20.
CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in NAMES)


def warmup_steps(share: float, steps: int) -> int:
    """Number of warmup steps: the given share, but at least 10 steps or a fifth of a short training.

    Adam's first steps move each weight by the full learning rate, which is too much for a student near its teacher.
    """
    return max(math.ceil(share * steps), min(10, steps // 5)) if share else 0


def training_arguments(run: Run, steps: int, directory: Path) -> TrainingArguments:
    """Arguments for a training of `steps` steps, with its checkpoints in `directory`."""
    assert run.learning_rate is not None, "a job is resolved first"
    micro, accumulation = run.split(processes().num_processes)
    gpu = torch.cuda.is_available()
    bf16 = gpu and torch.cuda.is_bf16_supported() if run.bf16 is None else run.bf16
    found = [
        name
        for name, is_there in (("tensorboard", is_tensorboard_available()), ("wandb", is_wandb_available()))
        if is_there
    ]
    workers = run.workers if run.workers is not None else (4 if gpu else 0)
    checkpointing: dict[str, Any] = {CHECKPOINTING: True} if run.gradient_checkpointing else {}
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        use_cpu=not torch.accelerator.is_available(),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=run.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=warmup_steps(run.warmup, steps),
        weight_decay=run.weight_decay,
        adam_beta2=0.95,
        bf16=bf16,
        **checkpointing,
        save_strategy="steps",
        save_steps=run.save_every or steps + 1,  # 0: by time, see `SaveByTime`
        save_total_limit=run.keep,
        eval_strategy="steps" if run.evaluate_every else "no",
        eval_steps=run.evaluate_every or None,
        logging_steps=run.log_every or max(1, steps // 50),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=gpu,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        report_to=found if run.report_to is None else list(run.report_to),
        disable_tqdm=True,
        seed=run.seed,
    )
    # Trainer would use DataParallel on several GPUs; here each process has one (accelerate launch).
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
