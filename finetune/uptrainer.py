"""Run an uptraining: load student and teacher, train in one or two stages, and write the result."""

import copy
import json
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, set_seed

from mqa_hf.base.devices import processes
from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import REPORT_FILE, stamps
from mqa_hf.base.hub import CHAT_TEMPLATES, PICKLES, SAFETENSORS, make_repository, push
from mqa_hf.base.output import resolve_output, written_beside
from mqa_hf.base.text import load_tokenizer
from mqa_hf.conversion.companions import check_loads, copy_files, inside
from mqa_hf.conversion.loading import load_model

from .architecture import checkpoint_config
from .card import add_training_section
from .checkpoints import begin
from .data import TrainingSet, set_up_logs, training_set
from .losses import Objective, attention_names, check_liger, core
from .records import UptrainingRecord, Validation
from .teacher import describe_teacher, load_teacher
from .trainer import train
from .uptrain import Uptraining


def carry_out(job: Uptraining) -> UptrainingRecord:
    """Train a converted checkpoint and write it to the output of a resolved job."""
    state = processes()
    set_up_logs()
    source = Path(job.student)
    target = resolve_output(job.output, source, job.overwrite)
    config = checkpoint_config(source)
    check(job, config)
    carried_over(source)  # check before training
    files = [str(source), *([str(job.teacher)] if job.taught else []), *(part.source for part in job.parts)]
    known = [stamp for path in files for stamp in stamps(path)]
    begin(job.place, {"student": str(source.resolve()), "files": known, **job.decisive()}, job.restart)

    student = load_model(source, config=config if job.dropout else without_dropout(config), dtype=torch.float32)
    student.config.use_cache = False
    tokenizer = tokenizer_of(source, config.get_text_config(decoder=True).vocab_size)
    teacher = teacher_of(job, student)
    text = training_set(tokenizer, config, job, source)
    if job.push_to_hub and state.is_main_process:
        job = replace(job, push_to_hub=make_repository(job.push_to_hub, job.private))
    set_seed(job.seed)  # adapters are initialised at random
    logs: dict[str, list[dict[str, float]]] = {}
    main: Uptraining = job
    if job.attention_tokens:
        student, logs["attention"] = attention_stage(job, student, teacher, text)
        teacher = teacher_of(job, student)  # the first one may be sharded by now
        main = replace(job, tokens=int(job.tokens or 0) - job.attention_tokens, seed=(job.seed + 1) % 2**32)
    trained = select_parameters(student, teacher, job)
    objective = Objective(job.losses, teacher, liger=job.liger, compile=job.compile)
    if job.attention_tokens and job.streaming:  # skip the rows of the first stage
        text = replace(text, rows=training_set(tokenizer, config, main).rows)
    logs["main"] = train("uptraining", trained, objective, main, text, job.place / "main")

    record = describe(job, text.row_tokens, logs)
    if state.is_main_process:
        write(job, target, config, record)
    state.wait_for_everyone()  # not for the upload, which may take longer than a barrier waits
    if job.push_to_hub and state.is_main_process:
        push(target, job.push_to_hub, "Train with mqa-hf")
    return record


def check(job: Uptraining, config: Any) -> None:
    """Raise MQAError if the student cannot be trained as requested."""
    if job.train == "lora":
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise MQAError("`train` lora needs PEFT: pip install 'mqa-hf[training]'") from error
    if job.liger:
        check_liger()
    if config.is_encoder_decoder and not config.model_type.startswith("mqa"):
        raise MQAError("encoder-decoder models are trained in this package's class; convert with `target` mqa")
    stack = config.get_text_config(decoder=True)
    longest = getattr(stack, "max_position_embeddings", None)
    bounded = getattr(stack, "position_embedding", "rotary") in ("learned", "rotary")
    if bounded and longest and job.sequence_length > longest:
        raise MQAError(f"`sequence_length` {job.sequence_length} is more than the {longest} positions of the model")
    if job.taught:
        describe_teacher(str(job.teacher), job.teacher_revision)


def tokenizer_of(directory: Path, size: int) -> Any:
    """Load the tokenizer of a checkpoint whose model has a vocabulary of `size`."""
    tokenizer = load_tokenizer(directory)
    if len(tokenizer) > size:
        raise MQAError(f"the tokenizer in {directory} has {len(tokenizer)} entries, but the model {size}")
    return tokenizer


def teacher_of(job: Uptraining, student: PreTrainedModel) -> PreTrainedModel | None:
    if not job.taught:
        return None
    return load_teacher(str(job.teacher), job.teacher_revision, Path(job.student), student, job.place / "teacher")


def select_parameters(model: PreTrainedModel, teacher: PreTrainedModel | None, job: Uptraining) -> nn.Module:
    """Freeze what is not trained; with LoRA, put adapters on every linear layer of the stack and on its experts."""
    if "attention" in job.losses:
        return only_attention(model, teacher)
    if job.train == "all":
        return model.requires_grad_(True)
    if job.train == "lora":
        import peft

        adapters = peft.LoraConfig(
            r=job.lora_rank,
            lora_alpha=2 * job.lora_rank,
            target_modules="all-linear",
            target_parameters=sorted(experts_of(model)) or None,
        )
        return peft.get_peft_model(model, adapters)
    return only_attention(model, teacher)


def experts_of(model: PreTrainedModel) -> set[str]:
    """Endings of the names of tensors that hold the matrices of all experts of a layer."""
    named = model.named_parameters()
    return {".".join(name.split(".")[-3:]) for name, p in named if ".experts." in name and p.ndim == 3}


def only_attention(model: PreTrainedModel, teacher: PreTrainedModel | None) -> PreTrainedModel:
    model.requires_grad_(False)
    if teacher is not None:
        names = attention_names(model, core(teacher))
    else:
        names = [
            name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in ("self_attn", "cross_attn", "attn")
        ]
    for name in names:
        model.get_submodule(name).requires_grad_(True)
    return model


def without_dropout(config: Any) -> Any:
    """A copy of a configuration with every dropout probability 0, in all of its stacks."""
    config = copy.deepcopy(config)
    parts = (getattr(config, name, None) for name in config.sub_configs)
    for stack in (config, *(part for part in parts if part is not None)):
        for name, value in vars(stack).items():
            if re.search(r"dropout|_pdrop|layerdrop", name) and isinstance(value, float):
                setattr(stack, name, 0.0)
    return config


def attention_stage(
    job: Uptraining, student: PreTrainedModel, teacher: PreTrainedModel | None, text: TrainingSet
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """The first stage: train only attention layers, each on the teacher's outputs."""
    objective = Objective({"attention": 1.0}, teacher, compile=job.compile)
    short = replace(job, tokens=job.attention_tokens)
    model, directory = only_attention(student, teacher), job.place / "attention"
    logged = train("attention", model, objective, short, text, directory)
    return load_model(directory / "final", config=student.config, dtype=torch.float32), logged


def describe(job: Uptraining, row_tokens: float, logs: dict[str, list[dict[str, float]]]) -> UptrainingRecord:
    """The content of `uptraining.json`."""
    measured = [line for lines in logs.values() for line in lines if "eval_lm" in line]

    def losses(line: dict[str, float]) -> dict[str, float | None]:
        return {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}

    names = ("mqa-hf", "transformers", "torch", "accelerate", "datasets")
    return UptrainingRecord(
        student=str(job.student),
        options=job.decisive(),
        tokens=round(job.steps(row_tokens) * job.rows * row_tokens),
        validation=Validation(before=losses(measured[0]), after=losses(measured[-1])) if measured else None,
        log={phase: [{**line} for line in lines] for phase, lines in logs.items()},
        versions={name: version(name) for name in names},
        command=job.command(),
    )


def write(job: Uptraining, target: Path, config: Any, record: UptrainingRecord) -> None:
    """Write the trained checkpoint beside its place: the student's other files and the trained weights."""
    source, final = Path(job.student), job.place / "main" / "final"
    if job.train == "lora":
        import peft

        base = job.place / "attention" / "final" if job.attention_tokens else source
        model: Any = peft.PeftModel.from_pretrained(
            load_model(base, config=config, dtype=torch.float32), final
        ).merge_and_unload()
    else:
        model = load_model(final, config=config, dtype=torch.float32)
    model = model.to(config.dtype or torch.float32)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with written_beside(target, size, job.overwrite) as partial:
        copy_files(source, carried_over(source), partial)
        settings = {path.name: path.read_bytes() for kind in ("*.json", "*.py") for path in partial.glob(kind)}
        model.save_pretrained(partial)
        for name, content in settings.items():
            (partial / name).write_bytes(content)  # unchanged, including code; not the index of shards
        for logs in job.place.glob("*/runs"):
            shutil.copytree(logs, partial / "runs" / logs.parent.name)
        record.write(partial)
        if not (partial / REPORT_FILE).is_file():  # marks what may be replaced
            (partial / REPORT_FILE).write_text(json.dumps({"source": str(source)}) + "\n")
        add_training_section(partial, record, job.push_to_hub)
        check_loads(partial, source)
    with suppress(OSError):
        shutil.rmtree(job.place)


def carried_over(student: Path) -> list[Path]:
    """All files of a student but its weights; raises MQAError for links to other places."""
    left_out = (*SAFETENSORS, *PICKLES)
    found = [p for p in student.iterdir() if p.is_file() and not any(p.match(pattern) for pattern in left_out)]
    found += student.glob(CHAT_TEMPLATES)
    for path in found:
        inside(student, path)
    return found
