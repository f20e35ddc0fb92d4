"""How transformers divides a stack among the ranks of tensor and pipeline parallelism, and what a decode step needs to
know of it.

B rows decoded, N outputs of a projection on this rank, H query heads, G key/value heads
"""

import copy
import socket
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .configuration_checks_mqa import BIAS_POSITIONS
from .kernel_launch_mqa import collecting

STYLES = {"colwise", "rowwise", "colwise_gather_output", "embedding_rowwise"}  # that a decode step knows
ONE_SHOT = 2**17  # bytes up to which each GPU reads all of the others' numbers (measured, two H200)
LEAST_SHARED = 2**20  # numbers
SPLIT = 16  # numbers of each GPU's share are a multiple of this
PIPELINE = {
    "embed_tokens": (["input_ids"], ["inputs_embeds"]),
    "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
    "norm": (["hidden_states"], ["hidden_states"]),
}


def tensor_plan(config: Any) -> dict[str, str]:
    """The plan of a stack, by patterns of module names, as transformers names its styles.

    Query heads are divided. Each rank has the shared key/value head whole; with several, each has some. Attention with
    latents, or with norms, sinks, maps or biases that belong to single heads, runs whole on each rank.
    """
    plan: dict[str, str] = {}
    biased = config.position_embedding in BIAS_POSITIONS  # by query head
    if not (config.latent or config.qk_norm or config.attention_sinks or biased):
        plan |= attention_plan("self_attn", config.num_key_value_heads)
        if config.attention_gate:
            plan["layers.*.self_attn.gate_proj"] = "colwise"
    if config.cross_num_key_value_heads and config.cross_kv_latent_dim is None:
        plan |= attention_plan("cross_attn", config.cross_num_key_value_heads)
    if not all(config.expert_layers):
        plan |= mlp_plan("mlp", config.gated_mlp)
    if any(config.expert_layers):
        plan["layers.*.mlp.experts"] = "moe_tp_experts"
        plan["layers.*.mlp.experts.gate_up_proj"] = "packed_colwise"
        plan["layers.*.mlp.experts.down_proj"] = "rowwise"
        if config.expert_bias:  # each rank would add the biases of outputs
            plan = {name: style for name, style in plan.items() if ".experts" not in name}
        if config.shared_expert_intermediate_size:
            plan |= mlp_plan("mlp.shared", config.gated_mlp)
    return plan


def attention_plan(name: str, heads: int) -> dict[str, str]:
    plan = {f"layers.*.{name}.q_proj": "colwise", f"layers.*.{name}.o_proj": "rowwise"}
    if heads > 1:
        plan |= {f"layers.*.{name}.{projection}": "colwise" for projection in ("k_proj", "v_proj")}
    return plan


def mlp_plan(name: str, gated: bool) -> dict[str, str]:
    projections = ("gate_proj", "up_proj") if gated else ("up_proj",)
    return {**{f"layers.*.{name}.{p}": "colwise" for p in projections}, f"layers.*.{name}.down_proj": "rowwise"}


def divided(weight: Any) -> bool:
    """Whether a weight is divided among the ranks of tensor parallelism, along one dimension."""
    if not isinstance(weight, torch.Tensor) or len(getattr(weight, "placements", ())) != 1:
        return False
    own: Any = weight
    return type(own._local_tensor) in (torch.Tensor, nn.Parameter)  # not quantised


def local(weight: Any) -> Any:
    """This rank's part of a weight, with the storage that the weight has; the weight itself if it is not divided."""
    return weight._local_tensor if divided(weight) else weight


def summed_over(weight: Any) -> Any:
    """The ranks among which the inputs of a projection are divided, if they are."""
    return weight.device_mesh.get_group() if divided(weight) and weight.placements[0].is_shard(1) else None


def ranks_of(model: nn.Module) -> Any:
    """The ranks among which a model is divided, if it is."""
    weights: Any = model.parameters()
    return next((weight.device_mesh.get_group() for weight in weights if divided(weight)), None)


class Sums:
    """Sums over ranks of what they computed for [B, d].

    GPUs of one machine add what is in each other's memory (PyTorch's symmetric memory), which takes half as long as
    NCCL for a few rows: 7 us against 16 for 1 x 8,192 on two H200. All ranks must make it at the same time.

    Args:
        ranks: a process group.
        rows, width: B and d at most.
        kernels: whether to use symmetric memory where it is available.
    """

    def __init__(
        self, ranks: Any, rows: int, width: int, dtype: torch.dtype, device: torch.device, kernels: bool = True
    ):
        self.ranks = ranks
        numbers = 1 << (max(rows * width, LEAST_SHARED) - 1).bit_length()  # of few sizes, which are kept
        self.shared = symmetric_memory(ranks, numbers, dtype, device) if kernels else None

    def room(self, rows: int, width: int) -> torch.Tensor | None:
        """A tensor [rows, width] for the numbers to add, if they are to be in shared memory."""
        fits = self.shared is not None and rows * width % (SPLIT * self.ranks.size()) == 0
        return self.shared[: rows * width].view(rows, width) if fits and not collecting() else None  # type: ignore[index]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Add x over the ranks; it may be overwritten. While kernels are compiled, ranks do not wait."""
        if collecting():
            return x
        if self.shared is None or x.data_ptr() != self.shared.data_ptr():
            return summed(x, self.ranks)
        operations, name = torch.ops.symm_mem, self.ranks.group_name
        if x.numel() * x.element_size() <= ONE_SHOT:
            return operations.one_shot_all_reduce(x, "sum", name)
        operations.two_shot_all_reduce_(x, "sum", name)
        return x.clone()  # the next sum overwrites it


@cache
def symmetric_memory(ranks: Any, numbers: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """A tensor that the GPUs of all ranks can read, or `None` where they cannot.

    Ranks agree on each step, because one that goes on alone waits for the others forever.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float32):
        return None
    here = float(zlib.crc32(machine().encode()))
    found = None
    with suppress(ImportError, RuntimeError, AttributeError):
        import torch.distributed._symmetric_memory as symmetric

        found = symmetric.empty(numbers, dtype=dtype, device=device)
    one_machine = least(here, ranks, device) == -least(-here, ranks, device)
    allocated = least(float(found is not None), ranks, device)
    if found is None or not (allocated and one_machine):
        return None
    linked = False
    with suppress(RuntimeError):  # GPUs without a direct link
        symmetric.rendezvous(found, ranks)
        linked = True
    return found if least(float(linked), ranks, device) else None


def machine() -> str:
    """A name of this machine since it was started."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text() + socket.gethostname()
    return socket.gethostname()


def summed(x: torch.Tensor, ranks: Any) -> torch.Tensor:
    """Add x over the ranks, in place, by NCCL or Gloo."""
    dist.all_reduce(x, group=ranks)
    return x


def least(value: float, ranks: Any, device: torch.device) -> float:
    """The smallest value of all ranks, so that they choose alike."""
    if ranks is None:
        return value
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MIN, group=ranks)
    return float(found)


def embedded(tokens: torch.Tensor, embedding: nn.Module) -> torch.Tensor:
    """Embed tokens [B] -> [B, d]; the rows of the embedding may be divided, and each rank adds those that it has."""
    weight: Any = getattr(embedding, "weight", None)
    if not (type(embedding) is nn.Embedding and divided(weight) and weight.placements[0].is_shard(0)):
        return embedding(tokens)
    rows, mesh = weight._local_tensor, weight.device_mesh
    at = tokens - mesh.get_local_rank() * -(-len(weight) // mesh.size())
    own = (at >= 0) & (at < len(rows))
    found = nn.functional.embedding(at.clamp(0, len(rows) - 1), rows) * own[:, None]
    return summed(found, mesh.get_group())


def gathered(x: torch.Tensor, weight: Any, size: int) -> torch.Tensor:
    """The outputs [B, `size`] of a projection whose outputs `x` [B, N] are divided as the rows of `weight` are."""
    if x.shape[-1] == size or not divided(weight):
        return x
    count = weight.device_mesh.size()
    most = -(-size // count)  # rows of the first ranks; the last ones may have fewer
    part = nn.functional.pad(x, (0, most - x.shape[-1])).contiguous()
    parts = part.new_empty(count * len(x), most)
    if not collecting():
        dist.all_gather(list(parts.split(len(x))), part, group=weight.device_mesh.get_group())
    return parts.view(count, len(x), most).transpose(0, 1).reshape(len(x), -1)[:, :size]


def forward_of_rank(module: nn.Module) -> bool:
    """Whether `forward` was replaced by transformers, to divide the module among ranks."""
    name = getattr(vars(module).get("forward"), "__qualname__", "")
    return name.endswith("install_forward.<locals>.tp_forward")


def config_of_rank(stack: Any) -> Any:
    """The configuration of a stack with the number of key/value heads that this rank has."""
    own, layer = copy.copy(stack.config), stack.layers[0]
    for name, part in (("num_key_value_heads", "self_attn"), ("cross_num_key_value_heads", "cross_attn")):
        projection = getattr(getattr(layer, part, None), "v_proj", None)
        weight: Any = getattr(projection, "weight", None)
        if divided(weight):
            setattr(own, name, getattr(own, name) // weight.device_mesh.size())
    return own
