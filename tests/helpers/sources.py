"""Tiny models of every family, with the switches that published checkpoints use and some that they do not.

Shared by the tests and by `python tests/helpers/family_table.py`, which prints the largest logit differences.
"""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 101

LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GPT = {
    "vocab_size": VOCAB,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "ffn_dim": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
NEOX = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
WIDE = {"hidden_size": 60, "num_attention_heads": 6, "head_dim": 16}  # head_dim is not hidden_size / heads


def rope(rope_type: str, **parameters) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


# (model type, what is special about it, configuration)
CASES: list[tuple[str, str, dict]] = [
    ("llama", "multi-head", LLAMA),
    ("llama", "grouped", {**LLAMA, "num_key_value_heads": 3}),
    ("llama", "multi-query", {**LLAMA, "num_key_value_heads": 1}),
    ("llama", "tied", {**LLAMA, "tie_word_embeddings": True}),
    ("llama", "biases", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    ("llama", "wide heads", {**LLAMA, **WIDE}),
    ("llama", "five heads", {**LLAMA, "hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5}),
    ("llama", "rope linear", {**LLAMA, **rope("linear", factor=4.0)}),
    ("llama", "rope dynamic", {**LLAMA, **rope("dynamic", factor=2.0), "max_position_embeddings": 8}),
    ("llama", "rope yarn", {**LLAMA, **rope("yarn", factor=4.0, original_max_position_embeddings=16)}),
    (
        "llama",
        "rope llama3",
        {
            **LLAMA,
            **rope(
                "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
            ),
        },
    ),
    (
        "llama",
        "rope longrope",
        {
            **LLAMA,
            **rope(
                "longrope",
                short_factor=[1.0, 1.1, 1.2, 1.3],
                long_factor=[2.0, 3.0, 4.0, 5.0],
                factor=4.0,
                original_max_position_embeddings=10,
            ),
        },
    ),
    ("mistral", "full", {**LLAMA, "num_key_value_heads": 2, "sliding_window": None}),
    ("mistral", "window 5", {**LLAMA, "num_key_value_heads": 2, "sliding_window": 5}),
    ("ministral", "mixed windows", {**LLAMA, "head_dim": 8, "sliding_window": 5,
                                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    ("qwen2", "grouped", {**LLAMA, "num_key_value_heads": 2}),
    ("qwen2", "upper window", {**LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("seed_oss", "biases", {**LLAMA, "attention_bias": True, "attention_out_bias": False, "head_dim": 8}),
    ("seed_oss", "output bias", {**LLAMA, "attention_bias": True, "attention_out_bias": True, "head_dim": 16}),
    (
        "cwm",
        "windows",
        {
            **LLAMA,
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            **rope(
                "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
            ),
        },
    ),
    ("smollm3", "layers without rotation", {**LLAMA, "no_rope_layer_interval": 2, "pad_token_id": 0}),
    ("arcee", "plain MLP", LLAMA),
    ("jais2", "layer norms", {**LLAMA, "head_dim": 8}),
    ("ernie4_5", "interleaved", {**LLAMA, "num_key_value_heads": 2, "head_dim": 8}),
    ("ernie4_5", "biases", {**LLAMA, "num_key_value_heads": 2, "head_dim": 16, "use_bias": True}),
    ("helium", "interleaved", {**LLAMA, "head_dim": 8, "pad_token_id": 3}),
    ("gpt2", "as published", GPT),
    ("gpt2", "untied, n_inner", {**GPT, "tie_word_embeddings": False, "n_inner": 72}),
    ("gpt2", "scaled by layer", {**GPT, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    ("gpt2", "unscaled", {**GPT, "scale_attn_weights": False}),
    ("gpt-sw3", "another name of gpt2", GPT),
    ("gpt_bigcode", "multi-query", {**GPT, "multi_query": True}),
    ("gpt_bigcode", "multi-head", {**GPT, "multi_query": False}),
    ("opt", "pre-norm", {**OPT, "word_embed_proj_dim": 48}),
    ("opt", "post-norm, projected", {**OPT, "word_embed_proj_dim": 20, "do_layer_norm_before": False}),
    ("opt", "projected, no final norm", {**OPT, "word_embed_proj_dim": 20, "_remove_final_layer_norm": True}),
    (
        "opt",
        "no biases, bare norms",
        {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    ),
    ("gpt_neox", "parallel, quarter rotary", NEOX | {"hidden_size": 96}),
    ("gpt_neox", "sequential", {**NEOX, "use_parallel_residual": False, **rope("default", partial_rotary_factor=1.0)}),
    ("gpt_neox", "no attention bias, tied", {**NEOX, "attention_bias": False, "tie_word_embeddings": True,
                                             **rope("default", partial_rotary_factor=0.5)}),
    ("gpt_neox", "linear rope", {**NEOX, **rope("linear", factor=2.0, partial_rotary_factor=0.5)}),
    ("gptj", "as published", {**GPT, "rotary_dim": 4}),
    ("gptj", "odd fraction", {**GPT, "n_embd": 60, "rotary_dim": 6, "n_inner": 72}),
    ("phi", "multi-head", {**LLAMA, "hidden_size": 96}),
    ("phi", "grouped, rotary 0.4", {**LLAMA, "hidden_size": 60, "num_key_value_heads": 2,
                                    **rope("default", partial_rotary_factor=0.4)}),
]  # fmt: skip
IDS = [f"{family}: {what}" for family, what, _ in CASES]


def make_model(model_type: str, config: dict) -> PreTrainedModel:
    """A model of random weights, biases and norms, large enough that logits are of order 10."""
    fields = json.loads(json.dumps(config))  # configurations change nested dictionaries in place
    configuration = AutoConfig.for_model(model_type, **fields, dtype="float32")
    model = AutoModelForCausalLM.from_config(configuration).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = 2.0 if "lm_head" in name or "embed" in name or "wte" in name else 1.5
                parameter.normal_(0.0, scale / parameter.shape[-1] ** 0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3, generator=generator)
            else:
                parameter.normal_(1.0, 0.2, generator=generator)
    return model


def save(model: PreTrainedModel, directory: Path, **kwargs) -> Path:
    model.save_pretrained(directory, **kwargs)
    return directory


def batch(rows: int = 3, length: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and a mask of left-padded rows, 0, 3 and 6 columns of padding."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 3 * row] = 0
    return ids, mask


@torch.no_grad()
def largest_difference(ours: PreTrainedModel, theirs: PreTrainedModel) -> tuple[float, float]:
    """(largest logit difference, largest logit) over full rows, padded rows, and padded rows with positions given."""
    ids, mask = batch()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    difference = size = 0.0
    for arguments in ({}, {"attention_mask": mask}, {"attention_mask": mask, "position_ids": positions}):
        seen = arguments.get("attention_mask", torch.ones_like(mask)).bool()
        expected = theirs(ids, **arguments).logits[seen]
        difference = max(difference, (ours(ids, **arguments).logits[seen] - expected).abs().max().item())
        size = max(size, expected.abs().max().item())
    return difference, size


@torch.no_grad()
def overwrite_heads_with_mean(model: PreTrainedModel, kv_heads: int) -> None:
    """Give a source model's K/V heads the mean of their group, in its own layout and class."""
    config = model.config
    for name, parameter in model.named_parameters():
        if config.model_type in ("gpt2", "gpt_bigcode", "gpt_neox"):
            if "c_attn" not in name and "query_key_value" not in name:
                continue
            heads = config.num_attention_heads
            width = config.hidden_size // heads
            weight = parameter.T if config.model_type == "gpt2" and parameter.ndim == 2 else parameter
            if config.model_type == "gpt2":
                per_head = weight.view(3, heads, width, *weight.shape[1:])
                parts = [per_head[1], per_head[2]]
            else:
                per_head = weight.view(heads, 3, width, *weight.shape[1:])
                parts = [per_head[:, 1], per_head[:, 2]]
        elif "k_proj" in name or "v_proj" in name:
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            parts = [parameter.view(heads, -1, *parameter.shape[1:])]
        else:
            continue
        for part in parts:
            for group in part.chunk(kv_heads):
                group.copy_(group.mean(0, keepdim=True).expand_as(group))
