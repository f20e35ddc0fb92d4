"""`transformers serve` answers with what `generate()` writes. Needs `pip install "transformers[serving]"`:

pytest -m slow tests/ecosystem/test_transformers_serve.py
"""

import sys

import pytest
from servers import free_port, post, served
from sources import LLAMA, make_model, save
from tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cli.serve import is_serve_available

from mqa_hf import convert

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_serve_available(), reason='needs pip install "transformers[serving]"'),
]
MESSAGES = [{"role": "user", "content": "and the"}]
COUNT = 8


@pytest.mark.parametrize(
    "options", [{"kv_heads": 1}, {"method": "latent", "latent": 16}, {"target": "native"}], ids=str
)
def test_it_answers_with_the_tokens_of_generate(options, tmp_path):
    source = save(make_model("llama", {**LLAMA, "vocab_size": 93}), tmp_path / "source")
    write_tokenizer(source)
    fit = {"calibration_tokens": 1024, "sequence_length": 32} if "method" in options else {}
    convert(source, tmp_path / "ours", **options, **fit)
    module = "transformers.cli.transformers" if "target" in options else "mqa_hf.serving.transformers_serve"
    port = free_port()
    command = [sys.executable, "-m", module, *(["serve"] if "target" in options else []), str(tmp_path / "ours"),
               "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    body = {
        "model": str(tmp_path / "ours"),
        "messages": MESSAGES,
        "max_tokens": COUNT,
        "temperature": 0,
        "stream": False,
    }
    with served(command, port, tmp_path, HF_HUB_OFFLINE="1"):
        answer = post(port, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**ids, max_new_tokens=COUNT, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert answer
    assert answer == tokenizer.decode(tokens, skip_special_tokens=True)
