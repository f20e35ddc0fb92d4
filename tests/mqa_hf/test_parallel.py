"""Tensor parallelism of transformers: two processes give the logits and tokens of one."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from latents import randomise

from mqa_hf import MQAConfig, MQAForCausalLM, MQAForConditionalGeneration, MQASeq2SeqConfig
from mqa_hf.parallel_mqa import tensor_plan

STACK = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "expert_intermediate_size": 32}
CASES = {
    "one head, by layer": {"qk_head_dim": [8, 16], "v_head_dim": [16, 8], "output_bias": True, "mlp_bias": True},
    "two heads, a gate, caps": {"num_key_value_heads": 2, "attention_gate": True, "attention_softcap": 2.0},
    "norms and sinks": {"qk_norm": "head", "attention_sinks": True, "lm_head_bias": True},
    "latent": {"kv_latent_dim": 16, "qk_head_dim": 8, "rope_frequencies": [[0, 1, 2, 3]] * 2},
    "experts": {**EXPERTS, "shared_expert_intermediate_size": 32, "expert_layers": [False, True]},
    "experts with biases": {**EXPERTS, "expert_bias": True, "expert_limit": 2.0, "router_bias": True},
    "biases of ALiBi": {"position_embedding": "alibi", "alibi_slopes": [0.5, 0.4, 0.3, 0.2, 0.1, 0.05]},
    "relative biases": {"position_embedding": "relative"},
    "an encoder and a decoder": {
        "num_key_value_heads": 2,
        "position_embedding": "relative",
        "cross_num_key_value_heads": 2,
    },
    "learned positions, plain MLP": {"position_embedding": "learned", "gated_mlp": False, "tie_word_embeddings": True},
}
FAST = "one head, by layer"  # the others take as long again each
names = [name if name == FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
PROGRAM = """
import json, os, sys, torch
import mqa_hf
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.distributed import DistributedConfig

directory, output = sys.argv[1:]
ranks = int(os.environ["WORLD_SIZE"])
several = AutoConfig.from_pretrained(directory).is_encoder_decoder
auto = AutoModelForSeq2SeqLM if several else AutoModelForCausalLM
model = auto.from_pretrained(directory, distributed_config=DistributedConfig(tp_size=ranks)).eval()
ids = torch.randint(5, 90, (2, 17), generator=torch.Generator().manual_seed(1)).to(model.device)
with torch.no_grad():
    logits = model(ids, **({"decoder_input_ids": ids} if several else {})).logits
logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
fast = model.decoding.engine is not None
ended = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=int(tokens[0, -4]))
for _ in range(2):  # the second time with the engine of the first
    engine = model.decoding.engine
    again = model.generate(ids, max_new_tokens=8, do_sample=False)
reused = fast and model.decoding.engine is engine
if fast and os.environ["RANK"] == "0":
    model.decoding.release()  # this rank builds its engine anew, the other keeps its graph
anew = model.generate(ids, max_new_tokens=8, do_sample=False)
kept = fast and model.decoding.engine.graph.captured is not None
torch.manual_seed(int(os.environ["RANK"]))
sampled = model.generate(ids, max_new_tokens=8, do_sample=True)
both = [torch.empty_like(sampled) for _ in range(ranks)]
torch.distributed.all_gather(both, sampled)
beams = model.generate(ids, max_new_tokens=8, do_sample=False, num_beams=2)
model.decoding.enabled = False
slow = model.generate(ids, max_new_tokens=8, do_sample=False)
held = {n: list((p.to_local() if hasattr(p, "to_local") else p).shape) for n, p in model.named_parameters()}
if os.environ["RANK"] == "0":
    found = {"logits": logits, "tokens": tokens, "beams": beams, "slow": slow}
    found |= {"ended": ended, "again": again, "anew": anew}
    found = {name: tensor.cpu() for name, tensor in found.items()}
    torch.save({**found, "held": held, "device": ids.device.type, "fast": fast, "kept": kept, "reused": reused,
                "sampled": torch.stack(both).cpu()}, output)
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("name", names)
def test_two_ranks_give_the_tokens_of_one(name, tmp_path):
    assert divided(CASES[name], 2, tmp_path, CUDA_VISIBLE_DEVICES="") == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_several_gpus_give_the_tokens_of_one(name, ranks, tmp_path):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    eight_heads = {"hidden_size": 64, "num_attention_heads": 8}
    slopes = {"alibi_slopes": [0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.04, 0.03]} if "ALiBi" in name else {}
    assert divided({**eight_heads, **CASES[name], **slopes}, ranks, tmp_path) == "cuda"


SUMS = """
import os, torch
import torch.distributed as dist
from mqa_hf.parallel_mqa import Sums

rank = int(os.environ["LOCAL_RANK"])
device = torch.device("cuda", rank)
torch.cuda.set_device(device)
dist.init_process_group("nccl", device_id=device)
group = dist.group.WORLD
for rows, width in ((1, 4096), (3, 8192), (64, 8192), (1, 24), (256, 4096)):
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        sums = Sums(group, rows, width, dtype, device)
        torch.manual_seed(rank)
        parts = torch.randn(40, rows, width, device=device).to(dtype)
        expected = parts.clone()
        dist.all_reduce(expected)
        found = torch.zeros_like(parts)

        def run():
            for part, out in zip(parts, found):  # one after the other: a sum must not read the next one's numbers
                room = sums.room(rows, width)
                out.copy_(sums(part.clone() if room is None else room.copy_(part)))

        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        for _ in range(10):
            found.zero_()
            graph.replay()
            limit = 1e-5 if dtype == torch.float32 else 0.05
            assert (found.float() - expected.float()).abs().max() <= limit, (rows, dtype)
        both = [torch.empty_like(found) for _ in range(dist.get_world_size())]
        dist.all_gather(both, found)
        assert all(torch.equal(one, both[0]) for one in both)
        linked = dtype != torch.float16 and torch.cuda.can_device_access_peer(rank, (rank + 1) % dist.get_world_size())
        assert (sums.shared is not None) == linked, (rows, dtype)
dist.destroy_process_group()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4])
def test_sums_over_gpus_equal_those_of_nccl(ranks, tmp_path):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    (tmp_path / "sums.py").write_text(SUMS)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}",
               f"--master_port={free_port()}", str(tmp_path / "sums.py")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_heads_that_the_ranks_do_not_divide(tmp_path):
    result = run({"num_attention_heads": 3}, 2, tmp_path, CUDA_VISIBLE_DEVICES="")[1]
    assert result.returncode != 0
    assert "the number of ranks must divide the number of query heads" in result.stderr


def run(fields, ranks, directory, **env):
    """The model with these fields, and what `PROGRAM` says on `ranks` processes."""
    torch.manual_seed(1)
    stack = {**STACK, **fields}
    if "cross_num_key_value_heads" in fields:
        encoder = {**stack, "causal": False, "cross_num_key_value_heads": None}
        config = MQASeq2SeqConfig(encoder=encoder, decoder=stack, decoder_start_token_id=0, pad_token_id=0)
        model = randomise(MQAForConditionalGeneration(config)).eval()
    else:
        model = randomise(MQAForCausalLM(MQAConfig(**stack))).eval()
    model.save_pretrained(directory / "model")
    (directory / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}",
               f"--master_port={free_port()}", directory / "program.py", directory / "model",
               directory / "found"]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return model, subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, check=False)


def divided(fields, ranks, directory, **env):
    """The device that `ranks` processes ran on, once what they computed and hold is what it should be."""
    model, result = run(fields, ranks, directory, **env)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "not sharded" not in result.stderr
    assert "not applied" not in result.stderr
    found = torch.load(directory / "found")
    ids = torch.randint(5, 90, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        several = model.config.is_encoder_decoder
        expected = model(ids, **({"decoder_input_ids": ids} if several else {})).logits
    torch.testing.assert_close(found["logits"], expected, rtol=0, atol=1e-4)
    own = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(found["tokens"], own)
    assert torch.equal(found["slow"], own)
    assert torch.equal(found["again"], own)
    assert torch.equal(found["anew"], own)
    assert found["reused"] == found["fast"]
    ended = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=int(own[0, -4]))
    assert torch.equal(found["ended"], ended)
    assert torch.equal(found["beams"], model.generate(ids, max_new_tokens=8, do_sample=False, num_beams=2))
    decoder = model.config.get_text_config(decoder=True)
    assert found["fast"] == (not any(decoder.expert_layers))
    assert found["kept"] == (found["fast"] and found["device"] == "cuda")
    assert not found["fast"] or (found["sampled"] == found["sampled"][0]).all()
    held, plan = found["held"], tensor_plan(decoder)
    stack = "model.decoder." if several else "model."
    for pattern, style in plan.items():
        names = [n for n in held if n.startswith(stack + pattern.replace("*", "1") + ".") and n.endswith("weight")]
        for full in names:
            whole, own = model.get_parameter(full).shape, held[full]
            at = 0 if style == "colwise" else 1
            assert own[at] * ranks == whole[at], (full, json.dumps(own))
    assert held[stack + "layers.1.self_attn.o_proj.weight"][0] == decoder.hidden_size
    return found["device"]
