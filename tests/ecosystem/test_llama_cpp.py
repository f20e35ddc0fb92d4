"""llama.cpp: the tokens of `--target native` are those of transformers.

Needs llama.cpp's converter and its Python bindings, in an environment with this package:

    pip install llama-cpp-python gguf sentencepiece
    LLAMA_CPP=SOURCES pytest -m slow tests/ecosystem/test_llama_cpp.py

where SOURCES is a checkout of llama.cpp, or vendor/llama.cpp of llama-cpp-python's sources.
"""

import os
import subprocess
import sys

import pytest
import torch
from sources import LLAMA, make_model, save
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mqa_hf import convert

SOURCES = os.environ.get("LLAMA_CPP")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SOURCES is None, reason="needs llama.cpp's sources; set LLAMA_CPP"),
]
SHAPE = {
    "vocab_size": 512, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96,
    "max_position_embeddings": 512, "num_hidden_layers": 3,
}  # fmt: skip
SOURCE_TYPES = {
    "llama": {**LLAMA, **SHAPE, "head_dim": 32},
    "qwen2": SHAPE,
    "qwen3": {**SHAPE, "head_dim": 32},
}
# The converter knows published tokenizers by hashes; ours is none of them.
PROGRAM = """
import runpy, sys
sources, sys.argv = sys.argv[1], ["convert_hf_to_gguf.py", *sys.argv[2:]]
sys.path[:0] = [sources, f"{sources}/gguf-py"]
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "default"
runpy.run_path(f"{sources}/convert_hf_to_gguf.py", run_name="__main__")
"""
PROMPT = torch.randint(5, 90, (1, 24), generator=torch.Generator().manual_seed(1))
COUNT = 16


def make_source(model_type, directory):
    """A source with a byte-level tokenizer, which llama.cpp takes only with merges."""
    source = save(make_model(model_type, SOURCE_TYPES[model_type]), directory / "source")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["the query reads one key and one value"], vocab_size=280, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="a", eos_token="b")
    tokenizer.save_pretrained(source)
    return source


def to_gguf(directory, output):
    command = [sys.executable, "-c", PROGRAM, SOURCES, str(directory), "--outfile", str(output), "--outtype", "f32"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("model_type", SOURCE_TYPES)
def test_native_checkpoints(model_type, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    convert(make_source(model_type, tmp_path), tmp_path / "native", target="native")
    result = to_gguf(tmp_path / "native", tmp_path / "native.gguf")
    assert result.returncode == 0, result.stderr[-2000:]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native").eval()
    tokens = model.generate(PROMPT, max_new_tokens=COUNT, do_sample=False, eos_token_id=-1, pad_token_id=0)
    theirs = llama_cpp.Llama(
        str(tmp_path / "native.gguf"), n_ctx=256, logits_all=True, verbose=False, type_k=0, type_v=0
    )  # caches in float32
    assert theirs.metadata[f"{theirs.metadata['general.architecture']}.attention.head_count_kv"] == "1"
    found = theirs.generate(PROMPT[0].tolist(), temp=0.0, repeat_penalty=1.0)
    assert [token for _, token in zip(range(COUNT), found)] == tokens[0, PROMPT.shape[1] :].tolist()


def test_the_converter_refuses_our_own_class(tmp_path):
    convert(make_source("llama", tmp_path), tmp_path / "ours")
    result = to_gguf(tmp_path / "ours", tmp_path / "ours.gguf")
    assert result.returncode != 0
    assert "MQAForCausalLM is not supported" in result.stdout + result.stderr
