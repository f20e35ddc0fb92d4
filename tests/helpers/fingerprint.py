"""Print, as JSON with sorted keys, what this package computes, so that two commits can be compared to the bit.

    python tests/helpers/fingerprint.py > before.json
    python tests/helpers/fingerprint.py > after.json
    diff before.json after.json

Both runs on one machine, with the same versions of everything else: the last bits of a product of matrices depend on
them. One core, about a minute. Only the command line, the files that it writes and transformers' Auto classes are
used, so the script runs unchanged on commits whose modules differ; to run it on another commit, give its path to that
commit's Python. What belongs to a run alone is left out: versions, times and the temporary directory, called DIR.
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch and transformers are imported: no GPU, no network, and no remote code that another commit has left.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="fingerprint-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["COLUMNS"] = "1000"

import torch
import yaml
from fingerprint_cases import (
    CONVERSIONS,
    EVALUATIONS,
    GENERATIONS,
    INSPECTIONS,
    PAIRS,
    PLANS,
    QWEN3,
    REFUSED,
    TEXT,
    TRAININGS,
    at,
)
from safetensors.torch import load_file
from seq2seq_sources import SEQ2SEQ_CASES, SEQ2SEQ_IDS, WHISPER, make_seq2seq
from sources import CASES, IDS, make_model
from tokenizer import write_tokenizer, write_whisper_processor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import disable_progress_bar

DIR = Path(os.environ["HF_HOME"])


def place(name: str) -> Path:
    return Path(name.replace("DIR", str(DIR)))


def run(*words: Any) -> str:
    """What `mqa-hf WORDS` prints, in this process; the one place that knows where the command line is."""
    sys.argv = ["mqa-hf", *(str(word).replace("DIR", str(DIR)) for word in words)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        command_line()(sys.argv[1:], standalone_mode=False)
    return printed.getvalue()


def command_line() -> Any:
    from typer.main import get_command

    import mqa_hf.cli

    return get_command(mqa_hf.cli.app)


# Texts and sources

SENTENCES = """The query reads one key and one value for all heads of a layer; few bytes move, so tokens come fast.
Big jumps vex Quick wizards (1905, 24 x 6 = 144) while cozy mice hid."""


def write_texts() -> None:
    draw, words = random.Random(0), SENTENCES.split()
    texts = [[draw.choice(words) for _ in range(draw.randint(6, 30))] for _ in range(200)]
    place(TEXT).write_text("".join(json.dumps({"text": " ".join(text)}) + "\n" for text in texts))
    pairs = [{"en": " ".join(text[:7]), "de": " ".join(reversed(text[1:6]))} for text in texts]
    place(PAIRS).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def write_source(name: str) -> None:
    directory = place(at(name))
    if directory.exists():
        return
    torch.manual_seed(0)
    if name == "whisper: speaks":
        generation: Any
        _, generation = write_whisper_processor(directory, mels=16, frames=40)
        tokens = {key: getattr(generation, key) for key in ("eos_token_id", "pad_token_id", "decoder_start_token_id")}
        vocabulary = generation.no_timestamps_token_id + 52
        model: PreTrainedModel = make_seq2seq("whisper", {**WHISPER, "vocab_size": vocabulary, **tokens})
        model.generation_config = generation
    else:
        if name in SEQ2SEQ_IDS:
            family, _, config = SEQ2SEQ_CASES[SEQ2SEQ_IDS.index(name)]
            model = make_seq2seq(family, config)
        else:
            family, _, config = ("qwen3", "", QWEN3) if name == "qwen3: grouped" else CASES[IDS.index(name)]
            model = make_model(family, config)
        write_tokenizer(directory)
    model.save_pretrained(directory)


# What is in files


def clean(value: Any, *dropped: str) -> Any:
    """JSON without what belongs to one run: versions, times, the temporary directory, and what else is named."""
    unwanted = {"versions", "transformers_version", *dropped}
    if isinstance(value, dict):
        return {k: clean(v, *dropped) for k, v in value.items() if k not in unwanted and not timed(k)}
    if isinstance(value, list):
        return [clean(v, *dropped) for v in value]
    return value.replace(str(DIR), "DIR") if isinstance(value, str) else value


def lines(printed: str) -> list[str]:
    return [line.rstrip() for line in clean(printed).splitlines()]


def timed(key: str) -> bool:
    return key.endswith(("_runtime", "_per_second"))


def parsed(path: Path, *dropped: str) -> Any:
    return clean(json.loads(path.read_text()), *dropped)


def tensors(directory: Path) -> dict[str, dict[str, str]]:
    """Of each file of tensors: data type, shape and a hash of the bytes of each, by name."""
    return {
        path.name: {name: described(tensor) for name, tensor in load_file(path).items()}
        for path in sorted(directory.glob("*.safetensors"))
    }


def described(tensor: torch.Tensor) -> str:
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()[:32]}"


def checkpoint(directory: Path) -> dict[str, Any]:
    """Tensors and configuration of a checkpoint, and the names of its files other than modules."""
    found = {"tensors": tensors(directory), "config": parsed(directory / "config.json")}
    found["files"] = sorted(path.name for path in directory.iterdir() if path.suffix != ".py")
    if (directory / "generation_config.json").exists():
        found["generation_config"] = parsed(directory / "generation_config.json")
    return found


# Conversions


def conversions() -> dict[str, Any]:
    """What each conversion writes and says, and whether its recorded command makes the same tensors again."""
    found = {}
    for name, of, options in CONVERSIONS:
        torch.manual_seed(0)
        output = DIR / name
        write_source(of)
        printed = run("convert", at(of), output, *options)
        record = json.loads((output / "conversion.json").read_text())
        words = shlex.split(record["command"].replace("OUTPUT", str(DIR / "again" / name)))
        run(*words[1:])
        found[name] = {
            **checkpoint(output),
            "conversion": clean(record),
            "made again": tensors(output) == tensors(DIR / "again" / name),
            "said": lines(printed)[-1],
        }
    return found


@torch.no_grad()
def families() -> dict[str, dict[str, str]]:
    """Of every line of the tables of sources, with half of its heads: hashes of what is written, and a few tokens."""
    found = {}
    for name, of in [*zip(IDS, CASES), *zip(SEQ2SEQ_IDS, SEQ2SEQ_CASES)]:
        if of[0] not in CONFIG_MAPPING:
            continue
        write_source(name)
        heads = json.loads(run("inspect", at(name), "--json"))["num_key_value_heads"]
        output = DIR / "families" / at(name).rpartition("/")[2]
        run("convert", at(name), output, "--kv-heads", heads // 2 if heads % 2 == 0 else 1)
        model = load(output)
        found[name] = {"tensors": digest(tensors(output)), "config": digest(parsed(output / "config.json"))}
        found[name] |= {"tokens": spelled(model.generate(**prompts(model, 2), max_new_tokens=8)), **state(model)}
    return found


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


# Training and evaluation


def trainings() -> dict[str, Any]:
    """The logs of trainings, in full precision, and what they write."""
    found = {}
    for name, words in TRAININGS.items():
        torch.manual_seed(0)
        printed = run(*words)
        report = "pretraining.json" if words[0] == "pretrain" else "uptraining.json"
        found[name] = {
            **checkpoint(DIR / name),
            "report": parsed(DIR / name / report, "command", "student"),
            "said": lines(printed)[-1],
        }
    return found


def evaluations() -> dict[str, Any]:
    """All numbers of evaluations of an original and two checkpoints, and the tables that are printed."""
    found = {}
    for name, words in EVALUATIONS.items():
        output = DIR / f"evaluation-{name}"
        printed = run("evaluate", *words, "--output", output)
        numbers = parsed(output / "evaluation.json", "command", "given", "checkpoint")
        found[name] = {"numbers": numbers, "said": lines(printed)}
    return found


def recipe() -> dict[str, Any]:
    """What a recipe of all steps writes."""
    sizes = {"sequence_length": 16}
    steps = {
        "source": str(place(at("gpt2: as published"))),
        "output": str(DIR / "recipe"),
        "convert": {"method": "shared", "calibration": str(place(TEXT)), "calibration_tokens": 512, **sizes},
        "uptrain": {"dataset": [str(place(TEXT))], "tokens": 512, "batch_tokens": 128, "report_to": "none", **sizes},
        "evaluate": {
            "text": str(place(TEXT)),
            "tokens": 200,
            "window": 16,
            "prompts": 2,
            "prompt_tokens": 4,
            "new_tokens": 4,
        },
    }
    (DIR / "recipe.yaml").write_text(yaml.safe_dump(steps))
    run("recipe", DIR / "recipe.yaml")
    return {
        "converted": tensors(DIR / "recipe" / "converted"),
        "trained": tensors(DIR / "recipe" / "trained"),
        "evaluation": parsed(DIR / "recipe" / "evaluation" / "evaluation.json", "command", "given", "checkpoint"),
    }


# Generation


class Pieces(BaseStreamer):
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(spelled(value))

    def end(self) -> None:
        self.pieces.append("end")


def spelled(tokens: torch.Tensor) -> str:
    return " ".join(map(str, tokens.reshape(-1).tolist()))


def load(directory: Path) -> Any:
    """A checkpoint, whose texts end where they are told to and not by chance."""
    kind = json.loads((directory / "config.json").read_text())["architectures"][0]
    auto: Any = AutoModelForCausalLM
    if "ConditionalGeneration" in kind:
        auto = AutoModelForSeq2SeqLM
    if "whisper" in directory.name:
        auto = AutoModelForSpeechSeq2Seq
    model = auto.from_pretrained(directory, trust_remote_code=True).eval()
    if "whisper" not in directory.name:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model


def prompts(model: Any, rows: int) -> dict[str, torch.Tensor]:
    """Token ids and their mask: rows with padding on the left, of an encoder-decoder model on the right; or sound."""
    generator = torch.Generator().manual_seed(5)
    if getattr(model.config, "num_mel_bins", None):
        return {"input_features": torch.randn(rows, model.config.num_mel_bins, 40, generator=generator)}
    ids = torch.randint(3, 80, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 3 * row] = 0
    if model.config.is_encoder_decoder:
        mask = mask.flip(1)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generations() -> dict[str, Any]:
    """Tokens by every kind of decoding; logits and scores of each checkpoint; what a streamer gets; a cache reused."""
    models = {name: load(DIR / name) for name in dict.fromkeys(name for name, _, _ in GENERATIONS)}
    found: dict[str, Any] = {"tokens": {}}
    for name, rows, options in GENERATIONS:
        torch.manual_seed(7)
        tokens = models[name].generate(**prompts(models[name], rows), **{"max_new_tokens": 24, **options})
        what = f"{name}, {rows} rows, {json.dumps(options)}"
        found["tokens"][what] = [spelled(row) for row in tokens]
    found["state"] = {name: state(model) for name, model in models.items()}
    found["streamed"] = {name: streamed(models[name]) for name in ("llama-shared", "bart-mean")}
    found["continued"] = continued(models["llama-shared"])
    return found


@torch.no_grad()
def state(model: Any) -> dict[str, str]:
    """Hashes of the logits of one forward pass and of scores that `generate()` returns."""
    given = prompts(model, 2)
    more = {"decoder_input_ids": torch.arange(3, 19).view(2, 8)} if model.config.is_encoder_decoder else {}
    out = model.generate(**given, max_new_tokens=6, output_scores=True, return_dict_in_generate=True)
    return {
        "class": type(model).__name__,
        "logits": described(model(**given, **more).logits),
        "scores": described(torch.stack(out.scores)),
    }


def streamed(model: Any) -> list[str]:
    streamer = Pieces()
    model.generate(**prompts(model, 1), max_new_tokens=9, streamer=streamer)
    return streamer.pieces


def continued(model: Any) -> list[str]:
    """Tokens that go on from the cache of a call before."""
    first = model.generate(**prompts(model, 1), max_new_tokens=6, return_dict_in_generate=True)
    second = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=6)
    return [spelled(first.sequences), spelled(second)]


# The command line


def plans() -> dict[str, Any]:
    return {name: said("plan", words) for name, words in PLANS.items()}


def inspections() -> dict[str, Any]:
    return {name: said("inspect", words) for name, words in INSPECTIONS.items()}


def said(command: str, words: list[Any]) -> dict[str, Any]:
    """What a command prints, for a person and as JSON."""
    return {"json": clean(json.loads(run(command, *words, "--json"))), "said": lines(run(command, *words))}


def refusals() -> dict[str, str]:
    """What is said of requests that cannot be met."""
    found = {}
    for words in REFUSED:
        try:
            answer = run(*words)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        found[shlex.join(map(str, words))] = clean(answer)
    return found


def options() -> dict[str, Any]:
    """The options of each command with their defaults, and its page of help without the frames."""
    found = {}
    for name, command in command_line().commands.items():
        settings = {}
        page = [" ".join(line.replace("─", " ").split()) for line in run(name, "--help").splitlines()]
        for option in command.params:
            default = option.default if isinstance(option.default, (bool, int, float)) else str(option.default)
            settings[option.name] = {
                "spellings": [*option.opts, *option.secondary_opts],
                "required": option.required,
                "default": default,
                "help": option.help,
            }
        found[name] = {"page": page, "options": settings}
    return found


SECTIONS: tuple[Callable[[], Any], ...] = (
    *(conversions, families, trainings, evaluations, recipe, generations),
    *(plans, inspections, refusals, options),
)


class Logged(logging.Handler):
    """Keeps what is warned of, such as why the slower loop decodes."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.add(record.getMessage())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    torch.set_num_threads(1)
    disable_progress_bar()
    logged = Logged()
    logging.getLogger().addHandler(logged)
    try:
        parser.parse_args()
        write_texts()
        found = {section.__name__: section() for section in SECTIONS}
        found["logged"] = sorted(map(clean, logged.messages))
    finally:
        shutil.rmtree(DIR)
    print(json.dumps(found, indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
