"""Tiny models of the types that are converted in their own class only.

`python tests/helpers/native_sources.py` prints how many model types of the installed transformers are in each table.
"""

import torch
import transformers
from sources import make_model
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from mqa_hf.conversion.families import FAMILIES, NATIVE_ONLY, OWN, REFUSED

BASE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Spellings that several mixtures of experts share.
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK = {**ROUTED, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
HYBRID = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "full_attention"]}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 24, "mamba_n_groups": 1, "mamba_chunk_size": 8}

CONFIGS: dict[str, dict] = {
    "afmoe": {**EXPERTS, "num_shared_experts": 1, "num_dense_layers": 1, **WINDOWS},
    "apertus1p5_text": {"output_vocab_size": 80},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "bamba": {**MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1, 2]},
    "beam": {**EXPERTS, **WINDOWS},
    "bitnet": {"hidden_size": 64},
    "cohere2_moe": {**EXPERTS, **WINDOWS},
    "cohere_compass_text": {"hidden_size": 64, **WINDOWS, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        "full_attention": None}},
    "dbrx": {"hidden_size": 64, "d_model": 64, "n_heads": 8, "n_layers": 2, "max_seq_len": 64,
             "attn_config": {"kv_n_heads": 4, "rope_theta": 1e4, "clip_qkv": 8},
             "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}},
    "dots1": {**DEEPSEEK},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    "exaone_moe": {**EXPERTS, **WINDOWS, "num_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 96},
    "flex_olmo": {**EXPERTS},
    "flint": {**EXPERTS, **WINDOWS},
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "sliding_window": 5,
                     "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 101, "hidden_size_per_layer_input": 8,
                     "laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0], "altup_num_inputs": 2},
    "glm4_moe": {**DEEPSEEK},
    "gpt_oss": {**LOCAL, **WINDOWS},
    "granitemoe": {**LOCAL},
    "granitemoe_swa": {**LOCAL, **WINDOWS, "shared_intermediate_size": 32},
    "granitemoehybrid": {**LOCAL, **MAMBA, "num_hidden_layers": 3, "layer_types": ["mamba", "attention", "attention"],
                         "shared_intermediate_size": 32},
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 32},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hy_v3": {**EXPERTS, "num_shared_experts": 1, "first_k_dense_replace": 1},
    "jamba": {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
              "use_mamba_kernels": False, "num_hidden_layers": 4, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kolibri1": {**LOCAL, "moe_intermediate_size": 24, **WINDOWS},
    "laguna": {**EXPERTS, **WINDOWS},
    "lara_mini": {**EXPERTS, **HYBRID, **DELTA, "shared_expert_intermediate_size": 24},
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "full_attention"],
             "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**EXPERTS, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "full_attention"],
                 "num_dense_layers": 1},
    "lfm3": {**EXPERTS, "num_hidden_layers": 3},
    "llama4_text": {**LOCAL, "intermediate_size_mlp": 56, "interleave_moe_layer_step": 2, "attention_chunk_size": 8},
    "mellum": {**EXPERTS, **WINDOWS},
    "minimax": {**LOCAL, **HYBRID, "block_size": 8},
    "minimax_m2": {**LOCAL},
    "mixtral": {**LOCAL},
    "nemotron_h": {**ROUTED, "num_hidden_layers": 4,
                   "layers_block_type": ["linear_attention", "full_attention", "moe", "full_attention"],
                   "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 24, "n_groups": 1, "chunk_size": 8,
                   "moe_shared_expert_intermediate_size": 24, "use_mamba_kernels": False},
    "olmo_hybrid": {"hidden_size": 64, **HYBRID, **DELTA},
    "olmoe": {"hidden_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {**LOCAL},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_5_moe_text": {**EXPERTS, **HYBRID, **DELTA, "shared_expert_intermediate_size": 24},
    "qwen3_5_text": {**HYBRID, **DELTA},
    "qwen3_moe": {**EXPERTS},
    "qwen3_next": {**EXPERTS, **HYBRID, **DELTA, "shared_expert_intermediate_size": 24},
    "qwen4_exp_text": {**EXPERTS, **HYBRID, **DELTA, "shared_expert_intermediate_size": 24, "indexer_n_heads": 2,
                       "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 48, "attention_window_size": 8},
    "solar_open": {**DEEPSEEK},
    "zamba": {**MAMBA, "num_hidden_layers": 4, "attention_head_dim": 8,
              "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {**MAMBA, "mamba_ngroups": 1, "mamba_headdim": 24, "n_mamba_heads": 4,
               "num_hidden_layers": 4, "attention_head_dim": 8,
               "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "use_mem_rope": True, "chunk_size": 8},
}  # fmt: skip


def installed_types() -> set[str]:
    """The causal and sequence-to-sequence model types of this transformers."""
    return {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES} - set(OWN)


def make_native(model_type: str) -> PreTrainedModel:
    return make_model(model_type, {**BASE, **CONFIGS[model_type]})


@torch.no_grad()
def overwrite_with_mean(model: PreTrainedModel, kv_heads: int) -> list[str]:
    """Give a model's K/V heads, of width 8, the mean of their group; the names of the parameters that hold them."""
    rows = 8 * model.config.num_key_value_heads
    changed = []
    for name, parameter in model.named_parameters():
        if name.endswith("Wqkv.weight"):
            parts = [parameter[-2 * rows : -rows], parameter[-rows:]]
        elif (
            name.split(".")[-2] in ("k_proj", "v_proj", "k_norm")
            and parameter.shape[0] == rows
            and "linear" not in name
        ):
            parts = [parameter]
        else:
            continue
        changed.append(name)
        for part in parts:
            for group in part.unflatten(0, (-1, 8)).chunk(kv_heads):
                group.copy_(group.mean(0, keepdim=True).expand_as(group))
    return changed


def main() -> None:
    installed = installed_types()
    tables = {"in the family table": FAMILIES, "in their own class only": NATIVE_ONLY, "refused": REFUSED}
    print(f"transformers {transformers.__version__}: {len(installed)} model types")
    for what, table in tables.items():
        print(f"  {len(installed & set(table)):4} {what}")
    rest = installed.difference(*tables.values())
    print(f"  {len(rest):4} in no table: {', '.join(sorted(rest)) or 'none'}")


if __name__ == "__main__":
    main()
