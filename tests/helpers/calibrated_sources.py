"""Tiny sources with a tokenizer and a text, which are fitted on it."""

import json

from seq2seq_sources import SEQ2SEQ_CASES, make_seq2seq
from sources import CASES, IDS, make_model, save
from tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from mqa_hf.base.text import documents

SMALL = {"calibration_tokens": 1024, "sequence_length": 32}
CHOSEN = [
    "llama: multi-head",
    "llama: grouped",
    "llama: biases",
    "llama: wide heads",
    "llama: rope yarn",
    "smollm3: layers without rotation",
    "mistral: window 5",
    "qwen2: grouped",
    "gpt2: as published",
    "opt: post-norm, projected",
    "gpt_neox: parallel, quarter rotary",
    "gpt_neox_japanese: as published",
    "gptj: as published",
    "bloom: five heads",
    "mpt: six heads",
    "gemma: multi-head, wide heads",
    "gpt_neo: windows",
    "xglm: as published",
]
NORMALISED = [
    "cohere: normalised queries and keys",
    "exaone4: windows, half of the layers rotated",
    "gemma3_text: wide heads, scaled rotation",
    "hunyuan_v1_dense: alpha, biases",
    "nanochat: no cap",
    "olmo2: biases",
    "olmo3: windows, two rotations",
    "persimmon: normalised queries and keys",
    "qwen3: grouped",
]


def make(what, tmp_path):
    model_type, _, config = CASES[IDS.index(what)]
    theirs = make_model(model_type, config)
    source = save(theirs, tmp_path / "source")
    write_tokenizer(source)
    return source, theirs


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory).eval()


SEQ2SEQ = ["t5", "mt5", "umt5", "bart", "marian", "pegasus", "m2m_100", "blenderbot"]


def make_pair_source(model_type, tmp_path):
    """A tiny encoder-decoder model with a tokenizer, and pairs of texts of different lengths."""
    config = next(config for name, _, config in SEQ2SEQ_CASES if name == model_type)
    theirs = make_seq2seq(model_type, config)
    source = save(theirs, tmp_path / "source")
    write_tokenizer(source)
    words = documents(None)[3].split()
    lines = [
        {"en": " ".join(words[9 * i : 9 * i + 2 + i % 5]), "de": " ".join(words[9 * i + 4 : 9 * i + 6 + i % 3])}
        for i in range(60)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return source, theirs, {"calibration": str(tmp_path / "pairs.jsonl"), "calibration_columns": ["en", "de"]}


def load_seq2seq(directory):
    return AutoModelForSeq2SeqLM.from_pretrained(directory, attn_implementation="eager").eval()
