"""Uptraining: a short training of a converted checkpoint that wins its quality back.

GQA (arXiv 2305.13245, section 3.2) trained converted models on 5% of the tokens of their pretraining. Here the
original is the teacher, whose distribution says more about each token than the token itself; fewer tokens then do.

    mqa-hf uptrain CONVERTED OUTPUT --dataset text.jsonl --tokens 10000000
    accelerate launch -m mqa_hf.finetune.uptrain CONVERTED OUTPUT --dataset text.jsonl --tokens 10000000

are the same on one process and on many. The job keeps its checkpoints in `.OUTPUT.uptrain` beside the output, goes on
from the last one when the same command is given again, and removes them once OUTPUT is whole.
"""

import copy
import itertools
import json
import math
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.utils import logging

from mqa_hf import convert, inspect
from mqa_hf.base.devices import processes
from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import REPORT_FILE, TRAINING_FILE, read_json, stamp
from mqa_hf.base.hub import CHAT_TEMPLATES, PICKLES, SAFETENSORS
from mqa_hf.base.output import resolve_output, written_beside
from mqa_hf.base.text import load_tokenizer
from mqa_hf.conversion.companions import check_loads, copy_files, inside
from mqa_hf.conversion.loading import load_model

from .card import add_training_section
from .data import CollatePairs, Part, collate_packed, starts_with_last, training_rows
from .losses import LOSSES, Objective, attention_names, check_liger, core
from .training import Schedule, as_options, begin, train

TRAINED = ("all", "attention", "lora")
# Times the hidden size, which counts as 512 at least; see docs/uptraining.md for the measurements.
LEARNING_RATES = {"all": 0.35, "attention": 0.7, "lora": 2.0}
NARROW = 512


@dataclass(frozen=True)
class Uptraining:
    """What a converted checkpoint is trained on, beside its [`Schedule`].

    Attributes:
        dataset: parts of the mixture.
        columns: that hold the text; two for translation.
        streaming: whether it is fetched on the way.
        validation: data set that the losses are measured on, its first `validation_tokens`.
        teacher, teacher_revision: directory or hub id of the original; `None`: none.
        losses: weights, see [`Objective`].
        attention_tokens: of a first stage that fits each attention layer to the teacher's.
        train: all, attention or lora.
        lora_rank: of the adapters, which are merged at the end.
        dropout: whether the student's dropout works while it trains. `None`: unless it learns from its teacher, whose
            distribution is that of a model without noise (docs/uptraining.md).
        liger: whether the losses of tokens run on Liger's kernels.
    """

    dataset: tuple[Part, ...]
    columns: tuple[str, ...] = ()
    streaming: bool = False
    validation: str | None = None
    validation_tokens: int = 131_072
    teacher: str | None = None
    teacher_revision: str | None = None
    losses: tuple[tuple[str, float], ...] = (("lm", 1.0),)
    attention_tokens: int = 0
    train: str = "all"
    lora_rank: int = 32
    dropout: bool | None = None
    liger: bool = False


def default_learning_rate(train: str, hidden_size: int) -> float:
    """The peak of the learning rate: falls with the width of the model, as pretraining rates do."""
    return float(f"{LEARNING_RATES.get(train, 0.35) / max(hidden_size, NARROW):.2g}")


def parse_losses(text: str) -> tuple[tuple[str, float], ...]:
    """`kl`, or `kl=1,hidden=0.5`."""
    found = []
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            found.append((name, float(weight) if weight else 1.0))
        except ValueError:
            raise MQAError(f"--loss takes names with weights such as kl=1,hidden=0.5; got {text!r}") from None
    unknown = [name for name, weight in found if name not in LOSSES or not 0 < weight < math.inf]
    if unknown:
        raise MQAError(f"--loss takes {', '.join(LOSSES)}, each with a weight above 0; got {text!r}")
    return tuple(found)


def without_dropout(config: Any) -> Any:
    """A copy of a configuration, with all of its stacks, in which every probability of dropout is 0."""
    config = copy.deepcopy(config)
    parts = (getattr(config, name, None) for name in config.sub_configs)
    for stack in (config, *(part for part in parts if part is not None)):
        for name, value in vars(stack).items():
            if re.search(r"dropout|_pdrop|layerdrop", name) and isinstance(value, float):
                setattr(stack, name, 0.0)
    return config


def uptrain(
    student: str | Path,
    output: str | Path,
    what: Uptraining,
    schedule: Schedule,
    *,
    overwrite: bool = False,
    restart: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Train a converted checkpoint and write it, whole, to `output`.

    Args:
        student: directory of the checkpoint.
        output: directory to write.
        what: data, teacher and losses.
        schedule: how long and how.
        overwrite: replace a converted checkpoint at `output`.
        restart: begin again where an unfinished run lies.
        command: that is shown in the model card.

    Returns:
        What stands in `uptraining.json`: options, losses before and after, the log.

    Raises:
        MQAError: for what cannot be, said before anything is trained; and where training diverges.
    """
    state = processes()
    logging.disable_progress_bar()  # of every file that is read and written
    source = Path(student)
    if not (source / "config.json").is_file():
        raise MQAError(f"{source} is no checkpoint: it has no config.json")
    target = resolve_output(output, source, overwrite)
    job = target.with_name(f".{target.name}.uptrain")
    config = AutoConfig.from_pretrained(source)
    check(what, schedule, config)
    if what.teacher is not None:
        describe_teacher(what.teacher, what.teacher_revision)
    carried_over(source)  # before the training rather than after it
    if what.dropout is None:
        what = replace(what, dropout=dict(what.losses).keys() == {"lm"})
    files = [source, *([] if what.teacher is None else [what.teacher]), *(part.source for part in what.dataset)]
    begin(
        job,
        {"student": str(source.resolve()), "files": stamps(files), **asdict(what), **as_options(schedule)},
        restart,
    )

    tuned = load_model(source, config=config if what.dropout else without_dropout(config), dtype=torch.float32)
    tuned.config.use_cache = False
    teacher = load_teacher(what, source, tuned, job / "teacher")
    tokenizer = tokenizer_of(source, getattr(config, "decoder", config).vocab_size)
    rows, validation, collate, schedule = examples(tokenizer, config, what, schedule)
    set_seed(schedule.seed)  # adapters begin at random
    logs: dict[str, list[dict[str, float]]] = {}
    if what.attention_tokens:
        tuned, logs["attention"] = attention_stage(job, tuned, teacher, what, schedule, rows, collate, validation)
        teacher = load_teacher(what, source, tuned, job / "teacher")  # the first may be in shards by now
    trained = select_parameters(tuned, teacher, what)
    objective = Objective(dict(what.losses), teacher, liger=what.liger)
    main = schedule
    if what.attention_tokens:
        main = replace(schedule, tokens=schedule.tokens - what.attention_tokens, seed=schedule.seed + 1)
        if what.streaming:  # other rows than the first stage's
            rows = examples(tokenizer, config, what, main)[0]
    logs["main"] = train("uptraining", trained, objective, main, rows, collate, job / "main", validation)

    report = describe(source, what, schedule, logs, command)
    if state.is_main_process:
        finish(source, target, job, config, what, report, overwrite)
    state.wait_for_everyone()
    return report


def check(what: Uptraining, schedule: Schedule, config: Any) -> None:
    """Raise MQAError for options that cannot be together."""
    if what.train not in TRAINED:
        raise MQAError(f"--train must be one of {', '.join(TRAINED)}; got {what.train!r}")
    if what.train == "lora":
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise MQAError("--train lora needs PEFT: pip install 'mqa-hf[training]'") from error
    if what.liger:
        check_liger()
    if "attention" in dict(what.losses) and what.train == "lora":
        raise MQAError("--loss attention trains attention layers themselves; with --train lora use --attention-tokens")
    if what.attention_tokens < 0:
        raise MQAError(f"--attention-tokens must be at least 0; got {what.attention_tokens}")
    if schedule.tokens <= what.attention_tokens:
        raise MQAError(
            f"--attention-tokens {what.attention_tokens:,} must be fewer than all tokens, {schedule.tokens:,}"
        )
    if what.attention_tokens and what.teacher is None:
        raise MQAError("--attention-tokens needs a teacher; pass --teacher")
    if config.is_encoder_decoder and not config.model_type.startswith("mqa"):
        raise MQAError("encoder-decoder models are trained in this package's class; convert with --target mqa")
    if getattr(config, "num_mel_bins", None):
        raise MQAError("speech models are not trained on text")
    stack = getattr(config, "decoder", config)
    longest = getattr(stack, "max_position_embeddings", None)
    bounded = getattr(stack, "position_embedding", "rotary") in ("learned", "rotary")
    if bounded and longest and schedule.sequence_length > longest:
        raise MQAError(
            f"--sequence-length {schedule.sequence_length} is more than the {longest} positions of the model"
        )


def stamps(files: list[Any]) -> list[Any]:
    """What tells of each file, and of each checkpoint's configuration and weights, whether it is still the same."""
    found = []
    for path in map(Path, files):
        parts = (
            sorted(p for p in path.glob("*") if p.suffix in (".json", ".safetensors", ".bin"))
            if path.is_dir()
            else [path]
        )
        found += [list(stamp(str(p))) for p in parts]
    return found


def tokenizer_of(directory: Path, size: int) -> Any:
    """The tokenizer of a checkpoint whose model has `size` words."""
    tokenizer = load_tokenizer(directory)
    if len(tokenizer) > size:
        raise MQAError(f"the tokenizer in {directory} has {len(tokenizer)} words and the model {size}")
    return tokenizer


def row_tokens(rows: Any, schedule: Schedule) -> Schedule:
    """The schedule for pairs, of which only what the decoder writes is counted: the mean of the first 1,000."""
    lengths = [len(row["labels"]) for row in itertools.islice(iter(rows), 1000)]
    return replace(schedule, row_tokens=sum(lengths) / len(lengths))


def examples(tokenizer: Any, config: Any, what: Any, schedule: Schedule) -> tuple[Any, Any, Any, Schedule]:
    """Training rows, validation rows, how they become batches, and the schedule with what a row is.

    Args:
        tokenizer: of transformers.
        config: of the model.
        what: [`Uptraining`] or `Pretraining`, which has the same text.
        schedule: whose `row_tokens` are not known yet.
    """
    pairs = bool(config.is_encoder_decoder)
    common: dict[str, Any] = {"columns": what.columns, "pairs": pairs, "seed": schedule.seed}
    rows_of_length = math.ceil(what.validation_tokens / schedule.sequence_length)
    with processes().main_process_first():
        # Pairs are short or long; so many there may be use for.
        wanted = schedule.tokens if pairs else schedule.steps * schedule.rows
        rows = training_rows(
            what.dataset, tokenizer, schedule.sequence_length, wanted, streaming=what.streaming, **common
        )
        validation = None
        if what.validation is not None:
            part = (Part(what.validation),)
            validation = training_rows(part, tokenizer, schedule.sequence_length, rows_of_length, **common)
    if pairs:
        fixed = schedule.sequence_length if what.streaming else None
        collate = CollatePairs(config.pad_token_id, config.decoder_start_token_id, fixed, starts_with_last(config))
        return rows, validation, collate, row_tokens(rows, schedule)
    return rows, validation, collate_packed, schedule


def describe_teacher(name: str, revision: str | None) -> dict[str, Any]:
    """What [`inspect`] says of the teacher; raises MQAError where there is none."""
    try:
        return inspect(name, revision=revision)
    except MQAError as error:
        raise MQAError(f"the teacher {name} cannot be had; say where it is with --teacher. {error}") from error


def load_teacher(what: Uptraining, source: Path, student: PreTrainedModel, directory: Path) -> PreTrainedModel | None:
    """The original, in the student's class: layers go by the same names, and packed rows mean the same to both.

    A checkpoint of another class is converted with all its heads, which changes nothing but names, to `directory`.
    """
    if what.teacher is None:
        return None
    name, revision = what.teacher, what.teacher_revision
    own = student.config.model_type.startswith("mqa")
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    with processes().main_process_first():
        description = describe_teacher(name, revision)
        if own and not description["family"].startswith("mqa"):
            if not (directory / "config.json").is_file():
                heads = description["num_key_value_heads"]
                convert(name, directory, kv_heads=heads, revision=revision, overwrite=True)
            name, revision = str(directory), None
        theirs = load_tokenizer(name, revision)
        if load_tokenizer(source).get_vocab() != theirs.get_vocab():
            raise MQAError(f"the teacher {name} has another tokenizer than the student; it must be the original")
    return load_model(name, dtype=dtype, revision=revision)


def select_parameters(model: PreTrainedModel, teacher: PreTrainedModel | None, what: Uptraining) -> nn.Module:
    """Freeze what is not trained; with LoRA, put adapters on every linear layer of the stack."""
    if "attention" in dict(what.losses):
        return only_attention(model, teacher)
    if what.train == "all":
        return model.requires_grad_(True)
    if what.train == "lora":
        import peft

        adapters = peft.LoraConfig(r=what.lora_rank, lora_alpha=2 * what.lora_rank, target_modules="all-linear")
        adapted = peft.get_peft_model(model, adapters)
        return adapted
    return only_attention(model, teacher)


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


def attention_stage(
    job: Path,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    what: Uptraining,
    schedule: Schedule,
    rows: Any,
    collate: Any,
    validation: Any,
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """The first stage: attention layers alone, each by itself, to the teacher's outputs."""
    objective = Objective({"attention": 1.0}, teacher)
    short = replace(schedule, tokens=what.attention_tokens)
    model = only_attention(student, teacher)
    logged = train("attention", model, objective, short, rows, collate, job / "attention", validation)
    return load_model(job / "attention" / "final", config=student.config, dtype=torch.float32), logged


def describe(
    source: Path, what: Uptraining, schedule: Schedule, logs: dict[str, list[dict[str, float]]], command: str | None
) -> dict[str, Any]:
    measured = [line for lines in logs.values() for line in lines if "eval_lm" in line]

    def losses(line: dict[str, float]) -> dict[str, float]:
        return {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}

    return {
        "student": str(source),
        "options": {**asdict(what), **as_options(schedule)},
        "tokens": round(schedule.steps * schedule.step_tokens),
        "validation": {"before": losses(measured[0]), "after": losses(measured[-1])} if measured else None,
        "log": logs,
        "versions": {name: version(name) for name in ("mqa-hf", "transformers", "torch", "accelerate", "datasets")},
        "command": command,
    }


def finish(
    source: Path, target: Path, job: Path, config: Any, what: Uptraining, report: dict[str, Any], overwrite: bool
) -> None:
    """Write the trained checkpoint beside its place: everything of the student's but the weights, and those."""
    final = job / "main" / "final"
    dtype = config.dtype or torch.float32
    if what.train == "lora":
        import peft

        base = job / "attention" / "final" if what.attention_tokens else source
        model: Any = peft.PeftModel.from_pretrained(
            load_model(base, config=config, dtype=torch.float32), final
        ).merge_and_unload()
    else:
        model = load_model(final, config=config, dtype=torch.float32)
    model = model.to(dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with written_beside(target, size, overwrite) as partial:
        copy_files(source, carried_over(source), partial)
        settings = {path.name: path.read_bytes() for kind in ("*.json", "*.py") for path in partial.glob(kind)}
        model.save_pretrained(partial)
        for name, content in settings.items():
            (partial / name).write_bytes(content)  # as the student has them, its code too; not the index of shards
        for logs in job.glob("*/runs"):
            shutil.copytree(logs, partial / "runs" / logs.parent.name)
        (partial / TRAINING_FILE).write_text(json.dumps(report, indent=2, default=str) + "\n")
        if not (partial / REPORT_FILE).is_file():  # marks what may be replaced
            (partial / REPORT_FILE).write_text(json.dumps({"source": str(source)}) + "\n")
        add_training_section(partial, report)
        check_loads(partial, source)
    with suppress(OSError):
        shutil.rmtree(job)


def carried_over(student: Path) -> list[Path]:
    """All files of a student but its weights; raises MQAError for one that is a link to elsewhere."""
    left_out = (*SAFETENSORS, *PICKLES)
    found = [p for p in student.iterdir() if p.is_file() and not any(p.match(pattern) for pattern in left_out)]
    found += student.glob(CHAT_TEMPLATES)
    for path in found:
        inside(student, path)
    return found


def original_of(student: Path) -> tuple[str, str | None]:
    """The source that `conversion.json` names, and its revision; raises MQAError where it names none."""
    path = student / REPORT_FILE
    said = read_json(path) if path.is_file() else {}
    if not isinstance(said.get("source"), str) or not isinstance(said.get("revision"), str | None):
        raise MQAError(
            f"{student} does not say what it was converted from (no source in {REPORT_FILE}); name its original with "
            "--teacher, or train without one: --teacher none"
        )
    return said["source"], said.get("revision")


if __name__ == "__main__":
    import sys

    from mqa_hf.cli import main

    sys.argv.insert(1, "uptrain")
    main()
