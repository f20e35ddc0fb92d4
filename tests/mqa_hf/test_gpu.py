"""What only a CUDA device shows; `pytest -m gpu` there."""

import copy

import pytest
import torch
from torch import nn
from transformers.cache_utils import Cache

from mqa_hf import MQAConfig, MQAForCausalLM, MQAForConditionalGeneration, MQASeq2SeqConfig
from mqa_hf.attention_mqa import eager_attention_forward, mqa_attention_forward

pytestmark = pytest.mark.gpu


STACK = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
POSITIONS = {
    "rotary": {},
    "alibi": {"position_embedding": "alibi", "alibi_slopes": [2.0**-i for i in range(1, 9)]},
}


@pytest.fixture(scope="module", params=["rotary", "alibi", "encoder-decoder"])
def model(request):
    torch.manual_seed(0)
    if request.param in POSITIONS:
        return MQAForCausalLM(MQAConfig(**STACK, **POSITIONS[request.param])).eval().cuda()
    stack = {**STACK, "position_embedding": "relative"}
    config = MQASeq2SeqConfig(
        encoder={**stack, "causal": False},
        decoder={**stack, "cross_num_key_value_heads": 1},
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return MQAForConditionalGeneration(config).eval().cuda()


def prompts():
    torch.manual_seed(0)
    ids = torch.randint(1, 1000, (3, 40), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return {"input_ids": ids, "attention_mask": mask, "do_sample": False, "max_new_tokens": 24}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.float16, 1e-2), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("G", [1, 2, 8])
@pytest.mark.parametrize(("T", "S"), [(1, 300), (128, 128), (16, 300)])
@pytest.mark.parametrize("masked", [False, True])
def test_against_float64(dtype, bound, G, T, S, masked):
    layer = nn.Module()
    layer.is_causal = True
    shapes = ((2, 8, T, 64), (2, G, S, 64), (2, G, S, 64))
    query, key, value = (torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes)
    mask = None
    if masked or T == 16:
        mask = torch.ones(T, S, dtype=torch.bool, device="cuda").tril(S - T).repeat(2, 1, 1, 1)
        mask[1, ..., :5] = False
        mask[..., -1] = True
    out, _ = mqa_attention_forward(layer, query, key, value, mask, scaling=0.125)
    expected, _ = eager_attention_forward(layer, query.double(), key.double(), value.double(), mask, scaling=0.125)
    assert (out - expected).norm() / expected.norm() < bound


def waiting(move):
    def moved(*args, **kwargs):
        torch.cuda.synchronize()
        move(*args, **kwargs)
        torch.cuda.synchronize()

    return moved


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "static"},  # transformers compiles the decoding step
        {"cache_implementation": "offloaded"},
        {"prefill_chunk_size": 16},
        {"use_cache": False},
    ],
    ids=str,
)
def test_greedy_tokens_do_not_depend_on_the_cache(model, options, monkeypatch):
    for name in ("offload", "prefetch"):  # their streams do not wait for each other's copies in transformers
        monkeypatch.setattr(Cache, name, waiting(getattr(Cache, name)))
    if model.config.is_encoder_decoder and "prefill_chunk_size" in options:
        pytest.skip("an encoder-decoder model has no long prompt to cut")
    arguments = prompts()
    torch.testing.assert_close(model.generate(**arguments, **options), model.generate(**arguments))


def test_a_graph_outlives_the_workspaces_of_graphs_before_it(model):
    """cuBLAS's workspace that stands in the memory of another graph goes with that graph."""
    arguments = prompts()
    expected = model.generate(**arguments)
    model.decoding.release()
    torch._C._cuda_clearCublasWorkspaces()
    other = copy.deepcopy(model)
    other.generate(**arguments)  # captures a graph, and with it a workspace
    model.generate(**arguments)
    other.decoding.release()
    del other
    torch._C._cuda_clearCublasWorkspaces()  # as torch.compile does when it captures graphs itself
    torch.cuda.empty_cache()
    taken = [torch.full((2**20,), float("nan"), device="cuda") for _ in range(64)]
    torch.testing.assert_close(model.generate(**arguments), expected)
    assert len(taken) == 64


def test_device_map_auto_takes_the_device(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map="auto")
    assert loaded.device.type == "cuda"
    arguments = prompts()
    torch.testing.assert_close(loaded.generate(**arguments), model.generate(**arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_in_16_bits_it_is_as_near_to_float64_as_plain_products(model, dtype):
    arguments = {name: value for name, value in prompts().items() if torch.is_tensor(value)}
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = arguments["input_ids"]
    seen = arguments["attention_mask"].bool()
    truth = copy.deepcopy(model).double()(**arguments).logits[seen]
    short = copy.deepcopy(model).to(dtype)
    distances = []
    for implementation in ("mqa", "eager"):
        short.set_attn_implementation(implementation)
        distances.append((short(**arguments).logits[seen] - truth).norm() / truth.norm())
    assert 0 < distances[0] <= 1.2 * distances[1] < 0.3
