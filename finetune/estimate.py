"""Steps, parameters, memory and disk space of an uptraining, before anything is loaded."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from mqa_hf.base.files import read_json
from mqa_hf.base.hub import locate
from mqa_hf.base.output import resolve_output
from mqa_hf.conversion.canonical import on_meta
from mqa_hf.conversion.families import canonical_config
from mqa_hf.conversion.source import load_config

from .architecture import checkpoint_config
from .data import check_there, mean_tokens, training_rows, training_set
from .order import check_rows
from .uptrain import Uptraining
from .uptrainer import check, only_attention, select_parameters, tokenizer_of

FLOAT32 = 4  # bytes


def estimate(job: Uptraining) -> dict[str, Any]:
    """Forecast of a resolved job.

    Returns:
        Names say their units. Memory is that of a process with all of it: weights, gradients, AdamW's two moments and
        the teacher, without activations, which grow with `micro_batch`. Disk is that of the checkpoints that are kept
        while it is trained.
    """
    source = Path(job.student)
    config = checkpoint_config(source)
    target = resolve_output(job.output, source, job.overwrite)
    check(job, config)
    speech = bool(getattr(config, "num_mel_bins", None))
    if not speech:
        check_there(job)
    tokenizer = tokenizer_of(source, config.get_text_config(decoder=True).vocab_size)
    row_tokens: float = job.sequence_length
    if speech:
        row_tokens = training_set(tokenizer, config, job, source).row_tokens
    elif config.is_encoder_decoder:
        row_tokens = mean_tokens(
            training_rows(
                *(job.parts, tokenizer, job.sequence_length, 1000),
                columns=job.columns,
                pairs=True,
                streaming=job.streaming,
                seed=job.seed,
            )
        )
    student = on_meta(config)
    teacher = on_meta(teacher_config(job, config)) if job.taught else None
    held, first = count(student), 0
    if job.attention_tokens:
        first = trained(only_attention(student, teacher))
    model = select_parameters(student, teacher, job)
    learnt = trained(model)
    saved = count(student) - held if job.train == "lora" else held  # only the adapters
    checkpoint = FLOAT32 * (saved + 2 * learnt) + (FLOAT32 * (held + 2 * first) if job.attention_tokens else 0)
    width = 2 if torch.cuda.is_available() else FLOAT32
    steps = job.steps(row_tokens)
    if not job.streaming:
        check_rows(job, steps)
    return {
        "student": str(source),
        "teacher": job.teacher if job.taught else None,
        "output": str(target),
        "checkpoints": str(job.place),
        "steps": steps,
        "rows": steps * job.rows,
        "tokens_per_step": round(job.rows * row_tokens),
        "parameters": held,
        "trained_parameters": learnt,
        "memory_bytes": FLOAT32 * (count(model) + 3 * max(learnt, first)) + width * (count(teacher) if teacher else 0),
        "checkpoint_disk_bytes": checkpoint * (job.keep + 1),
    }


def teacher_config(job: Uptraining, student: PreTrainedConfig) -> PreTrainedConfig:
    """The teacher's configuration in the student's class."""
    directory, _ = locate(str(job.teacher), job.teacher_revision, weights=False)
    config = load_config(directory)
    if student.model_type.startswith("mqa") and not config.model_type.startswith("mqa"):
        return canonical_config(config, read_json(directory / "config.json"))
    return config


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
