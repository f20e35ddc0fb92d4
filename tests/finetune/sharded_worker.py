"""One of two processes: student and teacher sharded with FSDP2, against losses and gradients of one process."""

import copy
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mqa_hf import MQAConfig, MQAForCausalLM
from mqa_hf.finetune.data import IGNORED
from mqa_hf.finetune.losses import Objective
from mqa_hf.finetune.trainer import sum_in_float32

LATENT = {"kv_latent_dim": 24, "qk_head_dim": 10, "rope_frequencies": [[0, 0, 1, 2, 3]] * 2, "head_dim": 8}


def model(heads, **options):
    config = MQAConfig(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=heads,
        initializer_range=0.3,
        tie_word_embeddings=True,
        **options,
    )
    return MQAForCausalLM(config).eval()


def sharded(whole, mesh):
    policy = MixedPrecisionPolicy()
    if "bf16" in sys.argv:  # as accelerate makes it, and training changes it
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        plugin.set_mixed_precision("bf16")
        accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
        sum_in_float32(accelerator)
        policy = plugin.mixed_precision_policy
        assert policy.param_dtype == torch.bfloat16
    for layer in whole.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(whole, mesh=mesh, mp_policy=policy)


def step(student, teacher, inputs, count):
    with torch.no_grad():
        taught = teacher(input_ids=inputs["input_ids"])
    outputs = student(**inputs, taught=taught, count=count)
    outputs["loss"].backward()
    return outputs


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    student, teacher = model(1, **(LATENT if "latent" in sys.argv else {})), model(4)
    teacher.requires_grad_(False)
    twin, other = copy.deepcopy(student), copy.deepcopy(teacher)
    ids, labels = torch.randint(1, 90, (4, 12)), torch.randint(1, 90, (4, 12))
    labels[3] = IGNORED
    weights = {"attention": 1.0} if "attention" in sys.argv else {"kl": 1.0, "lm": 0.5, "hidden": 0.5}
    whole = Objective(weights, other, 90 * 5)
    with whole.attach(twin):
        expected = step(twin, other, {"input_ids": ids, "labels": labels}, 36.0)

    mesh = dist.init_device_mesh("cpu", (2,)) if hasattr(dist, "init_device_mesh") else None
    ours = slice(2 * rank, 2 * rank + 2)
    objective = Objective(weights, teacher, 90 * 5)
    with objective.attach(student):
        student = sharded(student, mesh)
        objective.teacher = sharded(teacher, mesh)
        got = step(student, objective.teacher, {"input_ids": ids[ours], "labels": labels[ours]}, 36.0 / 2)
    sums = got["sums"].clone()
    dist.all_reduce(sums)
    bound = 3e-2 if "bf16" in sys.argv else 1e-4
    assert sums.dtype == got["loss"].dtype == torch.float32
    torch.testing.assert_close(sums, expected["sums"], rtol=bound, atol=bound)
    for (name, p), q in zip(student.named_parameters(), twin.parameters()):
        if q.grad is None:
            continue
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        assert grad.dtype == torch.float32
        assert (grad - q.grad).norm() <= max(bound, 1e-3) * 3 * q.grad.norm(), name
    dist.barrier()
    dist.destroy_process_group()


main()
