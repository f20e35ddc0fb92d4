"""One of two processes: a model, sharded or not, goes on from a checkpoint as if it had not been interrupted.

saving_worker.py sharded|replicated DIRECTORY
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mqa_hf import MQAConfig, MQAForCausalLM
from mqa_hf.finetune.saving import Saver, read_optimizer, read_weights


def make(seed):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = MQAForCausalLM(MQAConfig(**sizes, num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=True))
    model.model.layers[0].mlp.requires_grad_(False)
    wrapped = model
    if sys.argv[1] == "sharded":
        for layer in model.model.layers:
            fully_shard(layer)
        wrapped = fully_shard(model)
    else:
        wrapped = DistributedDataParallel(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, wrapped, torch.optim.AdamW(trained, lr=1e-2)


def train(wrapped, optimizer, steps):
    for step in steps:
        ids = torch.randint(1, 90, (2, 12), generator=torch.Generator().manual_seed(2 * step + dist.get_rank()))
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in model.named_parameters()}
    return {name: p.clone() for name, p in whole.items()}


def main():
    dist.init_process_group("gloo")
    directory = Path(sys.argv[2])
    model, wrapped, optimizer = make(0)
    train(wrapped, optimizer, range(3))
    saver = Saver(directory, keep=1)
    for step in (2, 3):
        saver.write(saver.begin(step), model, optimizer)
    expected = weights(model)
    train(wrapped, optimizer, range(3, 5))  # while it is written
    with saver.working():
        saver.settle()
    if dist.get_rank() == 0:
        assert [path.name for path in directory.iterdir()] == ["checkpoint-3"]
        torch.save(expected, directory / "expected.pt")
    after = weights(model)
    other, wrapped, optimizer = make(0)
    for p in other.parameters():  # weights that are not trained are not in the checkpoint
        with torch.no_grad():
            p.mul_(2.0 if p.requires_grad else 1.0)
    read_weights(directory / "checkpoint-3", other)
    read_optimizer(directory / "checkpoint-3", other, optimizer)
    for name, p in weights(other).items():
        assert torch.equal(p, expected[name]), name
    train(wrapped, optimizer, range(3, 5))
    for name, p in weights(other).items():
        assert torch.equal(p, after[name]), name
    dist.barrier()
    dist.destroy_process_group()


main()
