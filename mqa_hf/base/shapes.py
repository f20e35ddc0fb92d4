"""Shapes of published models by name, so that plans and timings need no checkpoint.

Each holds the sizes in the checkpoint's `config.json`, for the class of its `model_type`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import MQAError


def llama(
    model_type: str, vocab: int, d: int, f: int, layers: int, heads: int, kv_heads: int, length: int, **more: Any
):
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": length,
        **more,
    }


def gpt2(d: int, layers: int, heads: int):
    return {"model_type": "gpt2", "n_embd": d, "n_layer": layers, "n_head": heads}


def opt(d: int, layers: int, heads: int):
    return {
        "model_type": "opt",
        "hidden_size": d,
        "ffn_dim": 4 * d,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "word_embed_proj_dim": d,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": gpt2(768, 12, 12),
    "gpt2-xl": gpt2(1600, 48, 25),
    "opt-1.3b": opt(2048, 24, 32),
    "opt-6.7b": opt(4096, 32, 32),
    "opt-30b": opt(7168, 48, 56),
    "pythia-6.9b": {
        "model_type": "gpt_neox",
        "vocab_size": 50432,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "bloom-7b1": {"model_type": "bloom", "vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32},
    "mpt-7b": {"model_type": "mpt", "vocab_size": 50432, "d_model": 4096, "n_layers": 32, "n_heads": 32},
    "smollm2-135m": llama("llama", 49152, 576, 1536, 30, 9, 3, 8192, tie_word_embeddings=True),
    "smollm2-1.7b": llama("llama", 49152, 2048, 8192, 24, 32, 32, 8192, tie_word_embeddings=True),
    "llama-2-7b": llama("llama", 32000, 4096, 11008, 32, 32, 32, 4096),
    "llama-2-13b": llama("llama", 32000, 5120, 13824, 40, 40, 40, 4096),
    "llama-2-70b": llama("llama", 32000, 8192, 28672, 80, 64, 8, 4096),
    "llama-3.1-8b": llama("llama", 128256, 4096, 14336, 32, 32, 8, 131072),
    "qwen3-8b": llama("qwen3", 151936, 4096, 12288, 36, 32, 8, 40960, head_dim=128, rope_theta=1e6, rms_norm_eps=1e-6),
    "gemma-2-9b": llama(
        "gemma2", 256000, 3584, 14336, 42, 16, 8, 8192, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096
    ),
    "gemma-3-12b": llama(
        "gemma3_text",
        262208,
        3840,
        15360,
        48,
        16,
        8,
        131072,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=1024,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "qwen3-30b-a3b": llama(
        "qwen3_moe",
        151936,
        2048,
        6144,
        48,
        32,
        4,
        40960,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
    ),
    "mixtral-8x7b": llama(
        "mixtral", 32000, 4096, 14336, 32, 32, 8, 32768, num_local_experts=8, num_experts_per_tok=2, rope_theta=1e6
    ),
    "gpt-oss-20b": llama(
        "gpt_oss",
        201088,
        2880,
        2880,
        24,
        64,
        8,
        131072,
        head_dim=64,
        sliding_window=128,
        num_local_experts=32,
        num_experts_per_tok=4,
    ),
    "olmo-2-7b": llama("olmo2", 100352, 4096, 11008, 32, 32, 32, 4096, rope_theta=5e5, rms_norm_eps=1e-6),
    "mistral-7b": llama("mistral", 32000, 4096, 14336, 32, 32, 8, 32768),
    "qwen2.5-7b": llama("qwen2", 152064, 3584, 18944, 28, 28, 4, 32768),
    "t5-large": {"model_type": "t5", "d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
    # Six layers each way, d = 1024, 8 heads of 128, d_ff 4096 (Shazeer 2019, arXiv 1911.02150, section 4.1).
    "shazeer-2019": {
        "model_type": "t5",
        "d_model": 1024,
        "d_kv": 128,
        "d_ff": 4096,
        "num_layers": 6,
        "num_heads": 8,
        "vocab_size": 32768,
    },
}


def unique_names(checkpoints: Sequence[str]) -> list[str]:
    """The shortest distinct endings of paths or hub ids."""
    parts = [Path(said).resolve().parts if Path(said).exists() else Path(said).parts for said in checkpoints]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(part[-depth:]).replace("/", "") for part in parts]
        if len(set(names)) == len(names):
            return names
    raise MQAError(f"a checkpoint is given twice: {', '.join(checkpoints)}")
