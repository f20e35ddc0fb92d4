"""Tiny models of every family, with the switches that published checkpoints use and some that they do not.

Shared by the tests and by `python tests/helpers/family_table.py`, which prints the largest logit differences.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mqa_hf.conversion.loading import capped

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
MHA = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
NEOX_JAPANESE = {k: v for k, v in MHA.items() if k != "intermediate_size"}
NEO = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_layers": 3,
    "num_heads": 6,
    "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 1], [["local"], 1]],
    "window_size": 5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
XGLM = {
    "vocab_size": VOCAB,
    "d_model": 48,
    "ffn_dim": 80,
    "num_layers": 3,
    "attention_heads": 6,
    "max_position_embeddings": 64,
}
BLOOM = {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 3, "n_head": 8}
MPT = {"vocab_size": VOCAB, "d_model": 64, "n_layers": 3, "n_heads": 8, "max_seq_len": 64}
FALCON = {
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FALCON_RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
WIDE = {"hidden_size": 60, "num_attention_heads": 6, "head_dim": 16}  # head_dim is not hidden_size / heads
MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def rope(rope_type: str, **parameters) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


ABSENT = object()
# Mixtures of experts; the spellings of Mixtral, of Qwen and of DeepSeek's relatives.
_CHOSEN = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_ROUTED = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 3, "topk_group": 2,
           "routed_scaling_factor": 1.7, "norm_topk_prob": True}  # fmt: skip
EXPERTS = {
    "mixtral": {"num_local_experts": 5, "sliding_window": 5},
    "qwen2_moe": {**_CHOSEN, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2},
    "qwen3_moe": {**_CHOSEN, "head_dim": 8, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "olmoe": {"num_experts": 5, "num_experts_per_tok": 3},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "dots1": {**_ROUTED, "n_shared_experts": 2, "first_k_dense_replace": 1, "head_dim": 8, "sliding_window": 5,
              "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "glm4_moe": {**_ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8, "use_qk_norm": True,
                 "attention_bias": True, "norm_topk_prob": False},
    "solar_open": {**_ROUTED, "n_shared_experts": 1, "head_dim": 8},
    "exaone_moe": {**_CHOSEN, "num_experts": 6, "n_group": 2, "topk_group": 1, "num_shared_experts": 1,
                   "first_k_dense_replace": 1, "head_dim": 8, "sliding_window": 5,
                   "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "ernie4_5_moe": {"moe_num_experts": 5, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "mellum": {**_CHOSEN, "head_dim": 8, "sliding_window": 5, "rope_parameters": {
        "full_attention": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0,
                           "original_max_position_embeddings": 16},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}},
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "hy_v3": {**_CHOSEN, "head_dim": 8, "num_shared_experts": 1, "router_scaling_factor": 1.5,
              "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "cohere2_moe": {"num_experts": 5, "num_experts_per_tok": 2, "head_dim": 8, "logit_scale": 1.0, "sliding_window": 5,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                    "mlp_layer_types": ["dense", "sparse", "sparse"], "prefix_dense_intermediate_size": 40},
    "granitemoe": {"num_local_experts": 4, "attention_multiplier": 0.3, "logits_scaling": 0.5},
    "granitemoeshared": {"num_local_experts": 4, "attention_multiplier": 0.3, "shared_intermediate_size": 40},
    "granitemoe_swa": {"num_local_experts": 4, "attention_multiplier": 0.3, "shared_intermediate_size": 40,
                       "sliding_window": 5, "layer_rope_theta": [100.0, 1000.0, 0.0],
                       "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "minimax_m2": {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 8},
    "afmoe": {**_CHOSEN, "num_shared_experts": 2, "num_dense_layers": 1, "head_dim": 8, "route_scale": 1.5,
              "mup_enabled": True, "sliding_window": 5,
              "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "aria_text": {"moe_num_experts": 5, "moe_topk": 2, "moe_num_shared_experts": 2},
    "dbrx": {"intermediate_size": ABSENT, "num_key_value_heads": ABSENT, "tie_word_embeddings": False,
             "d_model": 48, "n_heads": 6, "n_layers": 3, "max_seq_len": 64,
             "attn_config": {"kv_n_heads": 3, "rope_theta": 1e4, "clip_qkv": 0.7},
             "ffn_config": {"hidden_size": 48, "ffn_hidden_size": 24, "moe_num_experts": 5, "moe_top_k": 2}},
    "flint": {**_CHOSEN, "head_dim": 8, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1],
              "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gpt_oss": {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 8, "swiglu_limit": 7.0,
                "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                **rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False)},
    "kolibri1": {**_CHOSEN, "intermediate_size": ABSENT, "head_dim": 8, "shared_expert_intermediate_size": 40,
                 "norm_topk_prob": True, "sliding_window": 5,
                 "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phimoe": {"num_local_experts": 5, "router_jitter_noise": 0.1, "attention_bias": True, "lm_head_bias": True,
               "sliding_window": 7, **rope("longrope", short_factor=[1.0, 1.1, 1.2, 1.3], short_mscale=1.2,
               long_factor=[2.0, 3.0, 4.0, 5.0], long_mscale=1.2, original_max_position_embeddings=10)},
}  # fmt: skip


def mixture_of(config: dict, base: dict = LLAMA) -> dict:
    """A configuration of `EXPERTS`, whole; a field that is `ABSENT` is left out."""
    whole = {**base, "num_key_value_heads": 3, **config}
    return {name: value for name, value in whole.items() if value is not ABSENT}


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
    (
        "exaone",
        "as published",
        {
            **LLAMA,
            "num_key_value_heads": 2,
            **rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        },
    ),
    ("helium", "interleaved", {**LLAMA, "head_dim": 8, "pad_token_id": 3}),
    ("gpt2", "as published", GPT),
    ("gpt2", "untied, n_inner", {**GPT, "tie_word_embeddings": False, "n_inner": 72}),
    ("gpt2", "scaled by layer", {**GPT, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    ("gpt2", "unscaled", {**GPT, "scale_attn_weights": False}),
    ("openai-gpt", "as published", GPT),
    ("openai-gpt", "untied, swish", {**GPT, "tie_word_embeddings": False, "afn": "swish"}),
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
    ("gpt_neox", "parallel, quarter rotary", MHA | {"hidden_size": 96}),
    ("gpt_neox", "sequential", {**MHA, "use_parallel_residual": False, **rope("default", partial_rotary_factor=1.0)}),
    ("gpt_neox", "no attention bias, tied", {**MHA, "attention_bias": False, "tie_word_embeddings": True,
                                             **rope("default", partial_rotary_factor=0.5)}),
    ("gpt_neox", "linear rope", {**MHA, **rope("linear", factor=2.0, partial_rotary_factor=0.5)}),
    ("gptj", "as published", {**GPT, "rotary_dim": 4}),
    ("gptj", "odd fraction", {**GPT, "n_embd": 60, "rotary_dim": 6, "n_inner": 72}),
    ("phi", "multi-head", {**LLAMA, "hidden_size": 96}),
    ("phi", "grouped, rotary 0.4", {**LLAMA, "hidden_size": 60, "num_key_value_heads": 2,
                                    **rope("default", partial_rotary_factor=0.4)}),
    ("gpt_neo", "windows", NEO),
    ("gpt_neo", "untied", {**NEO, "tie_word_embeddings": False, "intermediate_size": 72}),
    ("gpt_neo", "all global", {**NEO, "attention_types": [[["global"], 3]]}),
    ("codegen", "as published", {**GPT, "n_embd": 64, "n_head": 8, "rotary_dim": 4}),
    ("codegen", "twelve heads, tied", {**GPT, "n_embd": 96, "n_head": 12, "rotary_dim": 8, "n_inner": 72,
                                       "tie_word_embeddings": True}),
    ("xglm", "as published", XGLM),
    ("xglm", "unscaled, untied", {**XGLM, "scale_embedding": False, "tie_word_embeddings": False,
                                  "activation_function": "relu"}),
    ("biogpt", "as published", {**MHA, "pad_token_id": 1}),
    ("biogpt", "unscaled, untied", {**MHA, "pad_token_id": 1, "scale_embedding": False, "tie_word_embeddings": False}),
    ("bloom", "eight heads", BLOOM),
    ("bloom", "five heads", {**BLOOM, "hidden_size": 40, "n_head": 5}),
    ("bloom", "fourteen heads, untied", {**BLOOM, "hidden_size": 56, "n_head": 14, "tie_word_embeddings": False}),
    ("mpt", "eight heads", MPT),
    ("mpt", "six heads", {**MPT, "d_model": 48, "n_heads": 6}),
    ("mpt", "clipped", {**MPT, "attn_config": {"clip_qkv": 0.6}}),
    ("mpt", "softmax scale, untied", {**MPT, "tie_word_embeddings": False, "attn_config": {"softmax_scale": 0.2}}),
    ("falcon", "multi-query", FALCON),
    ("falcon", "grouped, two norms", {**FALCON, "hidden_size": 48, "num_attention_heads": 6, "num_kv_heads": 2,
                                      "new_decoder_architecture": True, "tie_word_embeddings": False}),
    ("falcon", "grouped, one norm", {**FALCON, "num_kv_heads": 5, "new_decoder_architecture": True,
                                     "num_ln_in_parallel_attn": 1, "activation": "gelu_pytorch_tanh"}),
    ("falcon", "multi-head", {**FALCON, "multi_query": False, "bias": True, "ffn_hidden_size": 72}),
    ("falcon", "alibi", {**FALCON, **FALCON_RW, "hidden_size": 64, "num_attention_heads": 16}),
    ("falcon", "alibi, parallel, five heads", {**FALCON, **FALCON_RW, "parallel_attn": True}),
    ("falcon", "alibi, multi-query, no biases", {**FALCON, **FALCON_RW, "multi_query": True, "bias": False,
                                                 "hidden_size": 48, "num_attention_heads": 6}),
    ("stablelm", "quarter rotary", {**LLAMA, "hidden_size": 96}),
    ("stablelm", "qkv bias, grouped", {**LLAMA, "num_key_value_heads": 2, "use_qkv_bias": True,
                                       **rope("default", partial_rotary_factor=0.5)}),
    ("stablelm", "parallel, tied", {**LLAMA, "hidden_size": 96, "use_parallel_residual": True,
                                    "tie_word_embeddings": True}),
    ("persimmon", "no qk norm", {**MHA, "qk_layernorm": False}),
    ("persimmon", "whole rotary, tied", {**MHA, "qk_layernorm": False, "tie_word_embeddings": True,
                                         **rope("linear", factor=2.0, partial_rotary_factor=1.0)}),
    ("olmo", "as published", LLAMA),
    ("olmo", "biases, grouped, tied", {**LLAMA, "num_key_value_heads": 2, "attention_bias": True,
                                       "tie_word_embeddings": True}),
    ("olmo", "clipped", {**LLAMA, "clip_qkv": 0.6}),
    ("gemma", "multi-head, wide heads", {**LLAMA, "head_dim": 16}),
    ("gemma", "multi-query", {**LLAMA, "num_key_value_heads": 1, "head_dim": 8}),
    ("gemma", "biases, untied", {**LLAMA, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": False}),
    ("phi3", "multi-head", LLAMA),
    ("phi3", "window 5, grouped", {**LLAMA, "num_key_value_heads": 2, "sliding_window": 5}),
    ("phi3", "longrope", {**LLAMA, "original_max_position_embeddings": 10,
                          **rope("longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 3.0, 4.0, 5.0])}),
    ("phi3", "partial longrope, tied", {**LLAMA, "num_key_value_heads": 3, "tie_word_embeddings": True,
                                        "original_max_position_embeddings": 32,
                                        **rope("longrope", short_factor=[1.0, 1.1, 1.2], long_factor=[2.0, 3.0, 4.0],
                                               partial_rotary_factor=0.75)}),
    ("cohere", "multi-head", {**LLAMA, "logit_scale": 0.25}),
    ("cohere", "grouped, biases, untied", {**LLAMA, "num_key_value_heads": 2, "logit_scale": 0.25,
                                           "attention_bias": True, "tie_word_embeddings": False}),
    ("cohere2", "windows and layers without rotation", {**LLAMA, "num_key_value_heads": 3, "logit_scale": 0.25,
                                                        "sliding_window": 5, "sliding_window_pattern": 2}),
    ("glm", "partial interleaved rotary", {**LLAMA, "num_key_value_heads": 2, "head_dim": 8}),
    ("glm", "no bias, wide heads", {**LLAMA, "head_dim": 16, "attention_bias": False, "tie_word_embeddings": True}),
    ("starcoder2", "window 5", {**LLAMA, "num_key_value_heads": 2, "sliding_window": 5}),
    ("starcoder2", "no biases, untied", {**LLAMA, "use_bias": False, "tie_word_embeddings": False}),
    ("nemotron", "half rotary", {**LLAMA, "num_key_value_heads": 2}),
    ("nemotron", "biases, wide heads", {**LLAMA, "head_dim": 16, "attention_bias": True, "mlp_bias": True,
                                        "tie_word_embeddings": True}),
    ("granite", "multipliers", {**LLAMA, "num_key_value_heads": 2, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
                                "residual_multiplier": 0.22, "attention_multiplier": 0.3, "attention_bias": True,
                                "mlp_bias": True, "tie_word_embeddings": True}),
    ("granite", "none", {**LLAMA}),
    ("ctrl", "as published", {**GPT, "dff": 72}),
    ("ctrl", "untied", {**GPT, "dff": 80, "tie_word_embeddings": False, "n_head": 4}),
    ("gpt_neox_japanese", "as published", NEOX_JAPANESE),
    ("gpt_neox_japanese", "half rotary, untied", {
        **NEOX_JAPANESE, "intermediate_multiple_size": 2, "tie_word_embeddings": False,
        **rope("default", partial_rotary_factor=0.5)}),
    ("modernbert-decoder", "as published", {**MHA, "local_attention": 10, "pad_token_id": 0}),
    ("modernbert-decoder", "biases, untied", {
        **MHA, "local_attention": 8, "pad_token_id": 0, "norm_bias": True, "attention_bias": True, "mlp_bias": True,
        "classifier_bias": True, "decoder_bias": False, "tie_word_embeddings": False}),
    ("cohere", "normalised queries and keys", {**LLAMA, "num_key_value_heads": 3, "use_qk_norm": True,
                                               "logit_scale": 1.0}),
    ("persimmon", "normalised queries and keys", {**MHA, "qk_layernorm": True}),
    ("phi", "normalised queries and keys", {**LLAMA, "hidden_size": 60, "num_key_value_heads": 2,
                                            "qk_layernorm": True, **rope("default", partial_rotary_factor=0.4)}),
    ("stablelm", "a norm for each head", {**LLAMA, "num_key_value_heads": 3, "qk_layernorm": True,
                                          "use_parallel_residual": True,
                                          **rope("default", partial_rotary_factor=0.5)}),
    ("apertus", "grouped", {**LLAMA, "num_key_value_heads": 2}),
    ("apertus", "biases, tied, no scaled rotation", {**LLAMA, "attention_bias": True, "tie_word_embeddings": True,
                                                     **rope("default")}),
    ("internlm3", "grouped", {**LLAMA, "num_key_value_heads": 2, "head_dim": 8}),
    ("iquestcoder", "wide heads", {**LLAMA, "head_dim": 16}),
    ("qwen3", "grouped", {**LLAMA, "num_key_value_heads": 2, "head_dim": 16}),
    ("qwen3", "biases, upper window, tied", {
        **LLAMA, "head_dim": 8, "attention_bias": True, "use_sliding_window": True, "sliding_window": 4,
        "max_window_layers": 1, "tie_word_embeddings": True}),
    ("olmo2", "grouped", {**LLAMA, "num_key_value_heads": 3}),
    ("olmo2", "biases", {**LLAMA, "attention_bias": True}),
    ("olmo3", "windows, two rotations", {**LLAMA, "num_key_value_heads": 2, **MIXED, "rope_parameters": {
        "full_attention": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0,
                           "original_max_position_embeddings": 16},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}}),
    ("olmo3", "windows, one rotation", {**LLAMA, **MIXED}),
    ("exaone4", "windows, half of the layers rotated", {**LLAMA, "num_key_value_heads": 2, **MIXED}),
    ("exaone4", "no windows", {**LLAMA, "sliding_window": None, "layer_types": ["full_attention"] * 3}),
    ("hunyuan_v1_dense", "grouped", {**LLAMA, "num_key_value_heads": 3, "head_dim": 8}),
    ("hunyuan_v1_dense", "alpha, biases", {**LLAMA, "head_dim": 16, "attention_bias": True,
                                           **rope("dynamic", alpha=3.0, factor=1.0)}),
    ("nanochat", "capped logits", {**LLAMA, "num_key_value_heads": 3}),
    ("nanochat", "no cap", {**LLAMA, "final_logit_softcapping": None, **rope("yarn", factor=4.0,
                                                                           original_max_position_embeddings=16)}),
    ("gemma2", "caps, windows", {**LLAMA, "num_key_value_heads": 2, "head_dim": 8, **MIXED,
                                 "query_pre_attn_scalar": 12, "attn_logit_softcapping": 5.0,
                                 "final_logit_softcapping": 9.0}),
    ("gemma2", "no caps", {**LLAMA, "head_dim": 16, "attn_logit_softcapping": None, "final_logit_softcapping": None,
                           "sliding_window": 5, "tie_word_embeddings": False}),
    ("gemma3_text", "windows, two rotations", {**LLAMA, "num_key_value_heads": 2, "head_dim": 8, **MIXED,
                                               "query_pre_attn_scalar": 12}),
    ("gemma3_text", "wide heads, scaled rotation", {
        **LLAMA, "head_dim": 16, **MIXED, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}}),
    ("vaultgemma", "caps, windows", {**LLAMA, "num_key_value_heads": 3, "head_dim": 8, **MIXED,
                                     "query_pre_attn_scalar": 6, "attn_logit_softcapping": 4.0}),
    ("glm4", "partial interleaved rotary", {**LLAMA, "num_key_value_heads": 2, "head_dim": 8}),
    ("glm4", "biases", {**LLAMA, "head_dim": 16, "attention_bias": True}),
    ("ministral3", "scaled queries", {**LLAMA, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": None,
                                      **rope("yarn", factor=4.0, original_max_position_embeddings=4,
                                             llama_4_scaling_beta=0.5)}),
    ("ministral3", "window 5", {**LLAMA, "head_dim": 8, "sliding_window": 5,
                                **rope("default", original_max_position_embeddings=8, llama_4_scaling_beta=0.1)}),
    ("hyperclovax", "norms on both sides, multipliers", {
        **LLAMA, "num_key_value_heads": 2, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
        "residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    ("hyperclovax", "norms before only", {**LLAMA, "use_post_norm": False, "attention_bias": True}),
    ("granite_swa", "sinks, windows", {**LLAMA, "num_key_value_heads": 3, **MIXED, "attention_multiplier": 0.3}),
    ("granite_swa", "two rotations, a layer without", {**LLAMA, **MIXED, "attention_multiplier": 0.3,
                                                       "layer_rope_theta": [100.0, 1000.0, 0.0]}),
    *((family, "experts", mixture_of(config)) for family, config in EXPERTS.items()),
]  # fmt: skip
IDS = [f"{family}: {what}" for family, what, _ in CASES]


def need(model_type: str) -> None:
    """Skip a test that asks for a type which this transformers does not know."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")


def make_model(model_type: str, config: dict) -> PreTrainedModel:
    """A model of random weights, biases and norms, large enough that logits are of order 10."""
    need(model_type)
    fields = json.loads(json.dumps(config))  # configurations change nested dictionaries in place
    configuration = AutoConfig.for_model(model_type, **fields, dtype="float32")
    model = capped(AutoModelForCausalLM.from_config(configuration).eval())
    if model_type == "gpt_neox_japanese" and configuration.rope_parameters.get("partial_rotary_factor", 1.0) < 1.0:
        width = configuration.hidden_size // configuration.num_attention_heads
        if 2 * len(model.gpt_neox_japanese.rotary_emb.inv_freq) == width:
            pytest.skip(f"transformers {transformers.__version__} makes angles for whole heads of {model_type}")
    rescale(model)
    return model


@torch.no_grad()
def rescale(model: PreTrainedModel) -> None:
    """Random weights, biases and norms, large enough that logits are of order 10."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue  # a table of sinusoids
        if parameter.ndim > 1:
            scale = 2.0 if any(part in name for part in ("lm_head", "embed", "wte", "shared")) else 1.5
            parameter.normal_(0.0, scale / parameter.shape[-1] ** 0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.3, generator=generator)
        else:
            parameter.normal_(1.0, 0.2, generator=generator)


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


def kv_heads_of(model: PreTrainedModel) -> int:
    config = model.config
    if config.model_type == "falcon" and config.new_decoder_architecture:
        return config.num_kv_heads
    if config.model_type in ("falcon", "gpt_bigcode"):
        return 1 if config.multi_query else config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


# Types with a weight of the norm of keys for each head.
KEY_NORMS = ("cohere", "flex_olmo", "minimax_m2", "olmo2", "olmo3", "olmoe")


def key_and_value_rows(name: str, rows: int, model: PreTrainedModel) -> list[torch.Tensor]:
    """The rows [heads, width] of each K/V head in a weight or bias, one tensor for keys and one for values."""
    family, H, G = model.config.model_type, model.config.num_attention_heads, kv_heads_of(model)
    index = torch.arange(rows)
    if (
        ".k_proj." in name
        or ".v_proj." in name
        or (family in ("cohere", "flex_olmo", "minimax_m2", "olmo2", "olmo3", "olmoe") and ".k_norm." in name)
    ):
        return [index.view(G, -1)]
    if family == "ctrl" and (".Wk." in name or ".Wv." in name):
        return [index.view(G, -1)]
    if family in ("gpt2", "openai-gpt", "mpt") and ("c_attn" in name or "Wqkv" in name):
        return list(index.view(3, H, -1)[1:])
    if "c_attn" in name or "query_key_value" in name:
        if family == "falcon" or (family == "gpt_bigcode" and G == 1):
            blocks = index.view(G, H // G + 2, -1)
            return [blocks[:, -2], blocks[:, -1]]
        per_head = index.view(H, 3, -1)
        return [per_head[:, 1], per_head[:, 2]]
    if "qkv_proj" in name and family == "codegen":
        _, value, key = (index.view(4, 3, H // 4, -1)[:, part].reshape(H, -1) for part in range(3))
        return [key, value]
    if "qkv_proj" in name or (family == "dbrx" and "Wqkv" in name):
        key, value = index[rows * H // (H + 2 * G) :].chunk(2)
        return [key.view(G, -1), value.view(G, -1)]
    return []


@torch.no_grad()
def overwrite_heads_with_mean(model: PreTrainedModel, kv_heads: int) -> None:
    """Give a source model's K/V heads the mean of their group, in its own layout and class."""
    for module in model.modules():
        if type(module).__name__ == "StableLmLayerNormPerHead" and module.num_heads == kv_heads_of(model):
            norms = [norm.weight for norm in module.norms]
            for group in torch.arange(len(norms)).chunk(kv_heads):
                mean = torch.stack([norms[i] for i in group]).mean(0)
                for i in group:
                    norms[i].copy_(mean)
    for name, parameter in model.named_parameters():
        transposed = model.config.model_type in ("gpt2", "openai-gpt") and parameter.ndim == 2
        weight = parameter.T if transposed else parameter
        for heads in key_and_value_rows(name, len(weight), model):
            for group in heads.chunk(kv_heads):
                weight[group] = weight[group].mean(0, keepdim=True).expand(len(group), *weight[group].shape[1:])
