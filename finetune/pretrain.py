"""Pretrain a small model from scratch: to convert it, and to compare with.

    mqa-hf pretrain OUTPUT --config '{"model_type": "llama", "hidden_size": 512, "num_attention_heads": 8, ...}' \
        --dataset train.jsonl --validation validation.jsonl --tokens 100000000

trains a byte-level BPE tokenizer on the text, then the model, and leaves a checkpoint that loads like any other. It is
the same job as `mqa-hf uptrain`, without a student and a teacher: resumed, shared by processes, shown alike.
"""

import copy
import itertools
import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.utils import logging

import mqa_hf
from mqa_hf import MQAForConditionalGeneration, MQASeq2SeqConfig
from mqa_hf.base.devices import DTYPES, processes
from mqa_hf.base.errors import MQAError
from mqa_hf.base.output import resolve_output, written_beside
from mqa_hf.base.text import load_tokenizer, one_column
from mqa_hf.conversion.converter import RUNTIME_FILES
from mqa_hf.conversion.families import canonical_config
from mqa_hf.conversion.loading import load_model

from .data import Part, mixture, read_batches
from .losses import Objective
from .training import Schedule, as_options, begin, train
from .uptrain import examples, stamps

END, PAD = "<|endoftext|>", "<|pad|>"
SENTINELS = [f"<extra_id_{n}>" for n in range(100)]
REPORT = "pretraining.json"
TOKENIZER_TEXTS = 200_000  # documents that the tokenizer is trained on, at most


@dataclass(frozen=True)
class Pretraining:
    """What a model is trained on, beside its [`Schedule`].

    Attributes:
        config: `model_type` and fields of that configuration; the vocabulary is the tokenizer's.
        dataset, columns, streaming, validation, validation_tokens: as in [`Uptraining`].
        tokenizer: directory of one that is there; `None`: one is trained on the text, with `vocab_size` entries.
        equal_parameters: a configuration; the feed-forward layers of `config` become so wide that the model has as
            many parameters as this one (arXiv 1911.02150, section 4.1).
    """

    config: dict[str, Any]
    dataset: tuple[Part, ...]
    columns: tuple[str, ...] = ()
    streaming: bool = False
    validation: str | None = None
    validation_tokens: int = 131_072
    tokenizer: str | None = None
    vocab_size: int = 8192
    equal_parameters: dict[str, Any] | None = None


def train_tokenizer(texts: Iterable[str], size: int, pairs: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (arXiv 1508.07909) with `size` entries, the end of a document among them; for an
    encoder-decoder model also padding and T5's sentinels, and each text is ended."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, PAD, *SENTINELS] if pairs else [END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if pairs:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 0)])
    pad = PAD if pairs else END
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=pad)


def configuration(fields: dict[str, Any]) -> PreTrainedConfig:
    """What `--config` says; raises MQAError where that is no configuration."""
    try:
        return AutoConfig.for_model(**copy.deepcopy(fields))
    except Exception as error:  # whatever the checks of a configuration raise
        raise MQAError(f"--config is no configuration: {error}") from error


def build(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model with random weights in the class of its `model_type`, with an encoder in this package's class."""
    config = configuration(fields)
    if not config.is_encoder_decoder:
        end = tokenizer.eos_token_id
        known = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None, "vocab_size": len(tokenizer)}
        config = configuration({**known, **fields})
        if config.vocab_size < len(tokenizer):
            raise MQAError(f"--config has vocab_size {config.vocab_size}, and the tokenizer {len(tokenizer)}")
        return AutoModelForCausalLM.from_config(config)
    if not config.model_type.startswith("mqa"):
        config = canonical_config(config, fields)
    known = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    for stack in (config.encoder, config.decoder):
        stack.vocab_size = len(tokenizer)
        stack.pad_token_id = tokenizer.pad_token_id
    config.decoder_start_token_id = config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = tokenizer.eos_token_id
    assert isinstance(config, MQASeq2SeqConfig)
    return MQAForConditionalGeneration(config)


def feed_forward_names(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Where a configuration says how wide feed-forward layers are: (dictionary, name) of each."""
    names = ("intermediate_size", "d_ff", "ffn_dim", "n_inner")
    stacks = [fields, *(fields[side] for side in ("encoder", "decoder") if isinstance(fields.get(side), dict))]
    return [{"in": stack, "name": name} for stack in stacks for name in names if name in stack]


def parameters(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
    with torch.device("meta"):
        return build(fields, tokenizer).num_parameters()


def widened(fields: dict[str, Any], other: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """`fields` with feed-forward layers as wide as gives the parameters of `other`, to the nearest multiple of 8.

    Raises:
        MQAError: where `fields` does not say how wide they are.
    """
    fields = copy.deepcopy(fields)
    places = feed_forward_names(fields)
    if not places:
        raise MQAError("--equal-parameters needs a --config that says how wide its feed-forward layers are")
    widths = [place["in"][place["name"]] for place in places]
    goal, now = parameters(other, tokenizer), parameters(fields, tokenizer)
    for place, width in zip(places, widths):
        place["in"][place["name"]] = width + 8
    each = (parameters(fields, tokenizer) - now) / 8  # a parameter count is linear in the width
    more = round((goal - now) / each / 8) * 8
    for place, width in zip(places, widths):
        place["in"][place["name"]] = width + more
    if min(widths) + more < 8:
        raise MQAError(f"no feed-forward width makes {now:,} parameters {goal:,}")
    return fields


def pretrain(
    output: str | Path,
    what: Pretraining,
    schedule: Schedule,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    restart: bool = False,
) -> dict[str, Any]:
    """Train a model from scratch and write it with its tokenizer.

    Args:
        output: directory to write.
        what: model and data.
        schedule: how long and how.
        dtype: of the weights that are written; they are trained in float32.
        overwrite: replace a model that was pretrained at `output`.
        restart: begin again where an unfinished run lies.

    Returns:
        What stands in `pretraining.json`: options, parameters, loss, the log.

    Raises:
        MQAError: for what cannot be, and where training diverges.
    """
    if dtype not in DTYPES:
        raise MQAError(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    state = processes()
    logging.disable_progress_bar()
    target = resolve_output(output, Path(what.dataset[0].source), overwrite, REPORT)
    job = target.with_name(f".{target.name}.pretrain")
    pairs = bool(configuration(what.config).is_encoder_decoder)
    if not pairs:
        one_column(what.columns, "--columns")
    files = stamps([part.source for part in what.dataset])
    begin(job, {"files": files, **asdict(what), **as_options(schedule)}, restart)

    with state.main_process_first():
        tokenizer = find_tokenizer(what, job / "tokenizer", pairs, schedule.seed)
    fields = what.config
    if what.equal_parameters is not None:
        fields = widened(fields, what.equal_parameters, tokenizer)
    set_seed(schedule.seed)
    model = build(fields, tokenizer)
    rows, validation, collate, schedule = examples(tokenizer, model.config, what, schedule)
    log = train("pretraining", model, Objective({"lm": 1.0}), schedule, rows, collate, job / "main", validation)

    measured = [line["eval_lm"] for line in log if "eval_lm" in line]
    report = {
        "options": {**asdict(what), **as_options(schedule)},
        "config": fields,
        "parameters": model.num_parameters(),
        "tokens": round(schedule.steps * schedule.step_tokens),
        "loss": measured[-1] if measured else None,
        "log": log,
    }
    if state.is_main_process:
        trained = load_model(job / "main" / "final", config=model.config, dtype=DTYPES[dtype])
        trained.config.use_cache = True
        with written_beside(target, 4 * trained.num_parameters(), overwrite, REPORT) as partial:
            trained.save_pretrained(partial)
            for name in RUNTIME_FILES.get(type(trained).__name__, ()):
                shutil.copyfile(Path(mqa_hf.__file__).parent / name, partial / name)
            tokenizer.save_pretrained(partial)
            if (job / "main" / "runs").is_dir():
                shutil.copytree(job / "main" / "runs", partial / "runs")
            (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        with suppress(OSError):
            shutil.rmtree(job)
    state.wait_for_everyone()
    return report


def find_tokenizer(what: Pretraining, directory: Path, pairs: bool, seed: int) -> PreTrainedTokenizerBase:
    """The tokenizer that is there, or the one that a run has trained, or one trained now."""
    if what.tokenizer is not None:
        return load_tokenizer(what.tokenizer)
    if not (directory / "tokenizer.json").is_file():
        rows = (
            row
            for batch in read_batches(mixture(what.dataset, what.columns, what.streaming, seed))
            for row in zip(*batch.values())
        )
        texts = (text for row in itertools.islice(rows, TOKENIZER_TEXTS) for text in row if text)
        train_tokenizer(texts, what.vocab_size, pairs).save_pretrained(directory)
    return load_tokenizer(directory)


def read_config(text: str) -> dict[str, Any]:
    """A configuration from JSON, from a file with it, or of a published shape by its name."""
    from mqa_hf.base.shapes import SHAPES

    if text in SHAPES:
        return dict(SHAPES[text])
    if not text.lstrip().startswith(("{", "[")) and Path(text).is_file():
        text = Path(text).read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except ValueError as error:
        raise MQAError(f"--config is neither JSON, nor a file, nor one of {', '.join(SHAPES)}: {error}") from error
    if not isinstance(found, dict) or "model_type" not in found:
        raise MQAError("--config needs a model_type")
    return found


if __name__ == "__main__":
    import sys

    from mqa_hf.cli import main

    sys.argv.insert(1, "pretrain")
    main()
