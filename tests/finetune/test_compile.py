"""`compile` compiles one layer of a stack for all of them, and changes nothing."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM

from mqa_hf import MQAConfig, MQAForCausalLM
from mqa_hf.finetune.losses import Objective, uncompiled
from mqa_hf.finetune.trainer import compile_layers

SIZES = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
WINDOWS = {"layer_types": ["full_attention", "sliding_attention"] * 3, "sliding_window": 8}
LATENT = {"kv_latent_dim": 24, "qk_head_dim": 10, "rope_frequencies": [[0, 0, 1, 2, 3]] * 6, "head_dim": 8}


def step(student, objective, inputs):
    with torch.no_grad():
        taught = objective.teacher(**{name: x for name, x in inputs.items() if name != "labels"})
    outputs = student(**inputs, taught=taught, count=36.0)
    outputs["loss"].backward()
    return outputs["loss"]


KL, ATTENTION = {"kl": 1.0, "lm": 0.5}, {"attention": 1.0}
CASES = [(KL, {}), (KL, WINDOWS), (KL, LATENT), (ATTENTION, {})]


@pytest.mark.parametrize(("loss", "options"), CASES, ids=["heads", "windows", "latents", "attention"])
def test_layers_share_their_compiled_code_and_losses_and_gradients_stay(loss, options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    student = MQAForCausalLM(MQAConfig(**SIZES, num_hidden_layers=6, num_key_value_heads=1, **options))
    teacher = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=6, num_key_value_heads=4))
    if loss is ATTENTION:
        teacher = MQAForCausalLM(MQAConfig(**SIZES, num_hidden_layers=6, num_key_value_heads=4))
    twin = copy.deepcopy(student)
    generator = torch.Generator().manual_seed(1)
    inputs = {name: torch.randint(0, 90, (2, 20), generator=generator) for name in ("input_ids", "labels")}
    inputs["position_ids"] = torch.cat((torch.arange(12), torch.arange(8)))[None].expand(2, -1)
    objective = Objective(loss, teacher, compile=not options and loss is KL)
    counter = CompileCounterWithBackend("aot_eager")
    plain = Objective(loss, teacher)
    with plain.attach(twin):
        expected = step(twin, plain, inputs)
    for model in (student, teacher):
        compile_layers(model, backend=counter)
    with objective.attach(student):
        assert counter.frame_count == 0  # the check of the head compiled nothing
        found = step(student, objective, inputs)
        compiled = counter.frame_count
        with uncompiled(), torch.no_grad():  # as losses on held-out rows, whose batches have other sizes
            few = {name: x[:1] for name, x in inputs.items()}
            taught = objective.teacher(**{name: x for name, x in few.items() if name != "labels"})
            student(**few, taught=taught, count=18.0)
        assert counter.frame_count == compiled
    assert 2 <= compiled <= 10  # of 12 layers; some are cut in two, and windows differ
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for (name, p), q in zip(student.named_parameters(), twin.parameters()):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=name)
