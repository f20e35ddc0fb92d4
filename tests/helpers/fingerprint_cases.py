"""What `fingerprint.py` runs. DIR stands for its temporary directory, and `at(NAME)` for a source's place in it."""

import json
from typing import Any

from sources import LLAMA

TEXT, PAIRS = "DIR/text.jsonl", "DIR/pairs.jsonl"
QWEN3 = {**LLAMA, "num_hidden_layers": 2, "num_key_value_heads": 3, "head_dim": 8}


def at(name: str) -> str:
    """The directory of a source that is called as in `sources.IDS` or `seq2seq_sources.SEQ2SEQ_IDS`."""
    return "DIR/sources/" + "".join(c if c.isalnum() else "-" for c in name)


FIT = ["--calibration", TEXT, "--calibration-tokens", 512, "--sequence-length", 16]
FIT_PAIRS = ["--calibration", PAIRS, "--calibration-columns", "en,de", *FIT[2:]]
SHARED = ["--method", "shared", *FIT]
# (name, source, options)
CONVERSIONS: list[tuple[str, str, list[Any]]] = [
    ("llama-mean", "llama: multi-head", []),
    ("llama-first", "llama: biases", ["--method", "first", "--kv-heads", 2]),
    ("llama-shared", "llama: multi-head", [*SHARED, "--seed", 5]),
    ("llama-all-heads", "llama: multi-head", ["--kv-heads", 6]),
    ("llama-widths", "llama: multi-head", [*SHARED, "--key-width", 1.5, "--value-width", 0.5, "--no-refit"]),
    ("llama-budget", "llama: multi-head", [*SHARED, "--cache-budget", "40%"]),
    ("llama-refit", "llama: grouped", ["--refit", "--seed", 4, *FIT]),
    ("llama-window", "llama: tied", ["--window", 5, "--kv-heads", 3]),
    ("llama-native", "llama: multi-head", ["--target", "native", "--max-shard-size", "40KB"]),
    ("llama-native-shared", "llama: wide heads", ["--target", "native", *SHARED]),
    ("mistral-window", "mistral: window 5", []),
    ("gpt2-random", "gpt2: as published", ["--method", "random", "--seed", 3]),
    ("gpt2-bfloat16", "gpt2: untied, n_inner", ["--dtype", "bfloat16"]),
    ("gpt2-shared", "gpt2: as published", [*SHARED, "--head-width", 2]),
    ("bigcode", "gpt_bigcode: multi-head", ["--dtype", "float16"]),
    ("neox-shared", "gpt_neox: parallel, quarter rotary", SHARED),
    ("codegen", "codegen: as published", ["--kv-heads", 2]),
    ("phi3", "phi3: window 5, grouped", []),
    ("falcon", "falcon: grouped, two norms", []),
    ("falcon-native", "falcon: multi-head", ["--target", "native"]),
    ("bloom", "bloom: five heads", []),
    ("bloom-shared", "bloom: eight heads", [*SHARED, "--kv-heads", 2]),
    ("mpt", "mpt: six heads", []),
    ("opt", "opt: post-norm, projected", []),
    ("gpt-neo", "gpt_neo: windows", []),
    ("cohere2", "cohere2: windows and layers without rotation", []),
    ("granite", "granite: multipliers", []),
    ("gemma", "gemma: multi-head, wide heads", []),
    ("qwen3-native", "qwen3: grouped", ["--target", "native"]),
    ("t5-mean", "t5: v1.0", ["--attention", "decoder,cross,encoder"]),
    ("t5-shared", "t5: v1.1 and Flan, gated", ["--method", "shared", *FIT_PAIRS]),
    ("umt5", "umt5: a bias for each layer", ["--kv-heads", 3]),
    ("bart-mean", "bart: as published", ["--window", 6]),
    ("bart-budget", "bart: as published", ["--method", "shared", "--cache-budget", "50%", *FIT_PAIRS]),
    ("bart-spans", "bart: as published", ["--refit", *FIT]),
    ("marian", "marian: two vocabularies", []),
    ("whisper", "whisper: speaks", []),
]


STEPS = ["--sequence-length", 16, "--batch-tokens", 128, "--micro-batch", 4, "--log-every", 1, "--workers", 0]
STEPS += ["--report-to", "none"]
VALIDATION = ["--validation-tokens", 256]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
TRAININGS: dict[str, list[Any]] = {
    "llama-trained": [
        *("uptrain", "DIR/llama-shared", "DIR/llama-trained", "--dataset", TEXT, "--validation", TEXT),
        *("--tokens", 1024, "--attention-tokens", 512, "--loss", "kl=1,hidden=0.5", *VALIDATION, *STEPS),
    ],
    "gpt2-lora": [
        *("uptrain", "DIR/gpt2-random", "DIR/gpt2-lora", "--dataset", f"{TEXT}=1", "--teacher", "none"),
        *("--tokens", 512, "--train", "lora", "--lora-rank", 4, "--seed", 1, *STEPS),
    ],
    "t5-trained": [
        *("uptrain", "DIR/t5-mean", "DIR/t5-trained", "--dataset", PAIRS, "--columns", "en,de"),
        *("--validation", PAIRS, "--tokens", 1024, "--loss", "kl=1,lm=0.5", *VALIDATION, *STEPS),
        *("--sequence-length", 64, "--micro-batch", 2, "--learning-rate", 1e-3, "--gradient-checkpointing"),
    ],
    "pretrained": [
        *("pretrain", "DIR/pretrained", "--config", json.dumps({"model_type": "llama", **SMALL})),
        *("--dataset", TEXT, "--validation", TEXT, "--tokens", 1024, "--vocab-size", 300, *VALIDATION, *STEPS),
    ],
}


MEASURE = ["--tokens", 600, "--window", 16, "--prompts", 4, "--prompt-tokens", 8, "--new-tokens", 8]
EVALUATIONS: dict[str, list[Any]] = {
    "text": [at("llama: multi-head"), "DIR/llama-shared", "DIR/llama-trained", "--text", TEXT, *MEASURE],
    "translation": [
        *(
            at("t5: v1.0"),
            "DIR/t5-mean",
            "DIR/t5-trained",
            "--text",
            PAIRS,
            "--columns",
            "en,de",
            "--beams",
            2,
            *MEASURE,
        ),
    ],
}


ENDS = {"eos_token_id": [11, 31, 53, 60, 71]}
DRAW = {"do_sample": True}
# (checkpoint, rows, options of `generate`)
GENERATIONS: list[tuple[str, int, dict[str, Any]]] = [
    *((name, 1, {}) for name in ("llama-mean", "llama-widths", "llama-budget", "gpt2-bfloat16", "neox-shared")),
    *((name, 3, {}) for name in ("llama-shared", "gpt2-shared", "bloom", "mpt", "opt", "granite", "falcon")),
    *((name, 3, {}) for name in ("llama-window", "mistral-window", "gpt-neo", "cohere2", "llama-native")),
    ("llama-shared", 2, ENDS),
    ("llama-shared", 2, {"eos_token_id": 11, "min_new_tokens": 15}),
    ("llama-shared", 2, {"repetition_penalty": 1.4}),
    ("llama-shared", 2, {"no_repeat_ngram_size": 2}),
    ("llama-shared", 2, {"bad_words_ids": [[5], [9]], "suppress_tokens": [6, 7]}),
    ("llama-shared", 2, {"prefill_chunk_size": 4}),
    ("llama-shared", 2, {"use_cache": False}),
    ("llama-shared", 1, {"prompt_lookup_num_tokens": 3}),
    ("llama-shared", 2, {**DRAW, "top_k": 8, "num_return_sequences": 2}),
    ("llama-shared", 2, {**DRAW, "temperature": 0.7, "top_p": 0.8}),
    ("llama-window", 2, {**DRAW, "min_p": 0.1, "repetition_penalty": 1.2, **ENDS}),
    ("llama-shared", 2, {"num_beams": 4}),
    ("gpt2-shared", 2, {"num_beams": 3, "early_stopping": True, "num_return_sequences": 2, **ENDS}),
    ("bloom", 2, {"num_beams": 3, "length_penalty": -1.0, "repetition_penalty": 1.5, "eos_token_id": [11, 31]}),
    ("mistral-window", 2, {**DRAW, "num_beams": 2}),
    *((name, 3, {"no_repeat_ngram_size": 2}) for name in ("bloom", "opt", "granite", "cohere2")),
    *((name, 3, {"no_repeat_ngram_size": 2}) for name in ("t5-mean", "t5-shared", "umt5", "bart-mean", "bart-budget")),
    ("t5-shared", 3, {"num_beams": 3, "num_return_sequences": 2}),
    ("bart-mean", 3, {"num_beams": 4, "early_stopping": True, **ENDS}),
    ("bart-budget", 2, {**DRAW, "top_k": 5}),
    ("whisper", 2, {"language": "en"}),
    ("whisper", 2, {"language": "de", "task": "translate", "num_beams": 3}),
]


PLANS: dict[str, list[Any]] = {
    "llama-2-7b": ["llama-2-7b", "--batch", 4],
    "shazeer-2019": ["shazeer-2019", "--device", "l4", "--kv-heads", "1,2", "--widths", "1"],
    "qwen3": [at("qwen3: grouped"), "--dtype", "float32"],
}
INSPECTIONS: dict[str, list[Any]] = {
    "source": [at("llama: grouped"), "--kv-heads", 3],
    "encoder-decoder": [at("bart: as published")],
    "conversion": ["DIR/bart-budget"],
    "trained": ["DIR/llama-trained"],
}

SOURCE = at("llama: multi-head")
CONVERT = ["convert", SOURCE, "DIR/refused"]
UPTRAIN = ["uptrain", "DIR/llama-mean", "DIR/refused", "--dataset", TEXT]
REFUSED: list[list[Any]] = [
    [*CONVERT, "--kv-heads", 4],
    [*CONVERT, "--kv-heads", 0],
    [*CONVERT, "--method", "median"],
    [*CONVERT, "--head-width", 2],
    [*CONVERT, "--window", 1],
    [*CONVERT, "--dtype", "int8"],
    [*CONVERT, "--attention", "cross"],
    [*CONVERT, *SHARED, "--cache-budget", "1%"],
    [*CONVERT, "--target", "native", *SHARED, "--head-width", 2],
    ["convert", "DIR/llama-mean", "DIR/refused"],
    ["convert", "DIR/nowhere", "DIR/refused"],
    ["convert", SOURCE, "DIR/llama-mean"],
    ["plan", "llama-2-7b", "--kv-heads", "3"],
    ["plan", "nothing-7b"],
    ["benchmark", SOURCE, "--cells", "1x2x3"],
    [*UPTRAIN],
    [*UPTRAIN, "--tokens", 1024, "--loss", "mse"],
    [*UPTRAIN, "--tokens", 1024, "--train", "some"],
    [*UPTRAIN, "--alpha", 2],
    ["evaluate", SOURCE, "DIR/llama-mean", "--text", "DIR/no.txt", "--output", "DIR/refused"],
    ["evaluate", SOURCE, "--text", TEXT, "--window", 1000, "--output", "DIR/refused"],
]
