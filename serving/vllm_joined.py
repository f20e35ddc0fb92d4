"""Linear layers of the same input as one product, as vLLM's own models have them."""

from typing import Any

import torch
from torch import nn

from mqa_hf.experts_mqa import MQAMLP
from mqa_hf.layer_mqa import MQAAttention
from mqa_hf.weights_mqa import joined


class Joined(nn.Module):
    """Linear layers as one. Their weights become views of one matrix, which vLLM then fills as it loads them.

    Args:
        parts: vLLM's linear layers, without quantisation, before their weights are loaded.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, *parts: Any):
        super().__init__()
        self.rows = [part.weight.shape[0] for part in parts]
        for name in ("weight", "bias"):
            # A buffer outside of checkpoints: vLLM looks for every parameter there.
            whole = joined([getattr(part, name) for part in parts], self.rows)
            self.register_buffer(name, whole, persistent=False)
        for part in parts:
            part.quant_method = None  # vLLM would rearrange weights that nothing reads

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return nn.functional.linear(x, self.weight, self.bias).split(self.rows, dim=-1)


class JoinedMLP(MQAMLP):
    """An MLP whose gate and input are one product."""

    joined: Joined

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.joined(x)
        return self.act_fn(gate) * up


class JoinedAttention(MQAAttention):
    """Attention whose queries, keys and values are one product."""

    joined: Joined

    def projected(self, x: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert x is states, "keys and values of another input"
        widths = self.query_width, self.qk_head_dim, self.v_head_dim
        query, key, value = (
            part.unflatten(-1, (-1, width)).transpose(1, 2) for part, width in zip(self.joined(x), widths)
        )
        return query, key, value


def join(model: nn.Module) -> None:
    """Join what can be joined in the layers of a canonical stack whose linear layers are vLLM's."""
    for module in list(model.modules()):
        if type(module) is MQAMLP and module.gate_proj is not None:
            module.__class__ = JoinedMLP
            module.joined = Joined(module.gate_proj, module.up_proj)
        elif type(module) is MQAAttention:
            module.__class__ = JoinedAttention
            module.joined = Joined(module.q_proj, module.k_proj, module.v_proj)
