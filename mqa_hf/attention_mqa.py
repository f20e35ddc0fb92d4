"""Attention without repeated keys and values: query heads are folded onto the key/value head that they share.

    B batch, T query tokens, S key tokens, H query heads, G key/value heads, g = H / G, D and Dv head widths

transformers' grouped attention repeats K and V to H heads where PyTorch's kernels need it, which costs the memory
traffic that fewer key/value heads should save (Shazeer 2019, arXiv 1911.02150, section 3). Here

- a decode step (T = 1) treats the g query heads of a group as g queries of one head: [B, G, g, D] against
  [B, G, S, D], without copies;
- a longer input runs on views of K and V that are expanded along the head axis (stride 0).

Attention and mask are registered under the name "mqa", for `attn_implementation="mqa"`.
"""

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .configuration_mqa import MQAConfig

ATTENTION_NAME = "mqa"
OWN = {ATTENTION_NAME}  # attention functions that take values of any width, caps and sinks
AT_ONCE = 2**26  # logits that are capped at once
ALIGNED = 8  # PyTorch's flash attention takes widths that are multiples of this


class HeadNorm(nn.Module):
    """Norm of queries or keys [B, heads, T, width]: of each head by itself, or of all heads together; `weight` and
    `bias` [heads, width]."""

    def __init__(self, config: MQAConfig, heads: int, width: int):
        super().__init__()
        self.centred = config.qk_norm_type == "layer_norm"
        self.joint = config.qk_norm == "joint"
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(heads, width)) if config.qk_norm_affine else None
        self.bias = nn.Parameter(torch.zeros(heads, width)) if config.qk_norm_bias else None

    def bare(self, x: torch.Tensor) -> torch.Tensor:
        """The norm without its weight and bias."""
        over = (1, 3) if self.joint else (3,)
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.centred:
            y = y - y.mean(over, keepdim=True)
        return (y * torch.rsqrt(y.square().mean(over, keepdim=True) + self.eps)).to(x.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bare(x)
        if self.weight is not None:
            y = y * self.weight[:, None]
        return y if self.bias is None else y + self.bias[:, None]


def project(linear: nn.Linear, x: torch.Tensor, width: int) -> torch.Tensor:
    """[B, T, d] -> [B, heads, T, width]; raises ValueError if a rank of tensor parallelism has parts of heads."""
    made = linear(x)
    if made.shape[-1] % width:
        raise ValueError(
            f"a rank has {made.shape[-1]} outputs of a projection to heads of width {width}: the number of ranks must "
            "divide the number of query heads, and that of key/value heads if there are several"
        )
    return made.view(*x.shape[:2], -1, width).transpose(1, 2)


def mqa_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    output_attentions: bool = False,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scaled dot-product attention over shared key/value heads.

    Args:
        module: the attention layer; its `is_causal` is used if the argument is `None`.
        query: [B, H, T, D].
        key: [B, G, S, D], S ≥ T.
        value: [B, G, S, Dv].
        attention_mask: boolean (true: attend) or additive, [B or 1, 1 or H, T, S]; `None` is causal for T > 1, all
            of S for T = 1.
        output_attentions: also return the weights, which takes T·S memory per head.
        softcap: cap of the logits.
        s_aux: [H], a logit of each head that takes part in its softmax and has no value.

    Returns:
        The output [B, T, H, Dv], and the weights [B, H, T, S] if requested.
    """
    if output_attentions:
        return eager_attention_forward(
            module, query, key, value, attention_mask, scaling, dropout, softcap=softcap, s_aux=s_aux
        )
    B, H, T, D = query.shape
    G = key.shape[1]
    g = int(H // G)  # a tensor while torch.jit.trace runs
    causal = attention_mask is None and bool(module.is_causal if is_causal is None else is_causal)
    if causal and key.shape[2] > T > 1:  # prefill of a static cache: positions beyond T are empty
        key, value = key[:, :, :T], value[:, :, :T]
    if softcap is not None:
        rows = max(1, AT_ONCE // (B * H * key.shape[2]))
        mask = causal_mask(T, T, query.device) if causal and T > 1 else attention_mask
        parts = []
        for i, some in enumerate(query.split(rows, dim=2)):
            seen = mask if mask is None else mask[:, :, i * rows : (i + 1) * rows]
            weights = attention_weights(some, key, seen, scaling, softcap, s_aux)
            parts.append(mixed(nn.functional.dropout(weights, dropout), value).transpose(1, 2))
        return torch.cat(parts, dim=1), None
    if s_aux is not None:
        width, scaling = value.shape[-1], D**-0.5 if scaling is None else scaling
        wide = with_sink(query, key, value, attention_mask, s_aux / scaling, causal and T > 1)
        out, _ = mqa_attention_forward(module, *wide, dropout, scaling, causal)
        return out[:, out.shape[1] - T :, :, :width], None

    if T == 1:
        if attention_mask is not None and attention_mask.shape[1] > 1:
            attention_mask = attention_mask.reshape(attention_mask.shape[0], G, g, -1)
        out = nn.functional.scaled_dot_product_attention(
            query.reshape(B, G, g, D), key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
        return out.reshape(B, 1, H, out.shape[-1]), None

    if g == 1 or (query.is_cuda and attention_mask is None and D == value.shape[-1] <= 256):
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, causal, scale=scaling, enable_gqa=g > 1
        )
        return out.transpose(1, 2), None
    masks = [attention_mask] * G
    if attention_mask is not None and attention_mask.shape[1] > 1:
        masks = list(attention_mask.split(g, dim=1))
    out = torch.cat(
        [
            nn.functional.scaled_dot_product_attention(
                query[:, i * g : (i + 1) * g],
                key[:, i : i + 1].expand(-1, g, -1, -1),
                value[:, i : i + 1].expand(-1, g, -1, -1),
                masks[i],
                dropout,
                causal,
                scale=scaling,
            )
            for i in range(G)
        ],
        dim=1,
    )
    return out.transpose(1, 2), None


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same, in plain matrix products with a softmax in at least float32; shapes as in [`mqa_attention_forward`].

    Returns:
        The output [B, T, H, Dv] and the weights [B, H, T, S].
    """
    T, S = query.shape[2], key.shape[2]
    if attention_mask is None and T > 1 and module.is_causal:
        attention_mask = causal_mask(T, S, query.device)
    weights = attention_weights(query, key, attention_mask, scaling, softcap, s_aux)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return mixed(weights, value).transpose(1, 2), weights


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """[B, H, T, D] and [B, G, S, D] -> [B, H, T, S]; the softmax is in float32 at least."""
    B, H, T, D = query.shape
    G, S = key.shape[1:3]
    scaling = D**-0.5 if scaling is None else scaling
    folded = query.reshape(B, G, H // G * T, D)
    weights = (torch.matmul(folded, key.transpose(2, 3)) * scaling).reshape(B, H, T, S)
    if softcap is not None:
        weights = (weights / softcap).tanh() * softcap
    if mask is not None and mask.dtype == torch.bool:
        weights = weights.masked_fill(~mask, torch.finfo(weights.dtype).min)
    elif mask is not None:
        weights = weights + mask
    if sinks is not None:
        weights = torch.cat((weights, sinks.to(weights.dtype)[None, :, None, None].expand(B, H, T, 1)), dim=-1)
    precise = torch.promote_types(query.dtype, torch.float32)
    return nn.functional.softmax(weights, dim=-1, dtype=precise).to(query.dtype)[..., :S]


def mixed(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[B, H, T, S] and [B, G, S, Dv] -> [B, H, T, Dv]."""
    B, H, T, S = weights.shape
    G = value.shape[1]
    return torch.matmul(weights.reshape(B, G, H // G * T, S), value).reshape(B, H, T, -1)


def causal_mask(T: int, S: int, device: torch.device) -> torch.Tensor:
    """[1, 1, T, S], aligned to the upper left, like PyTorch's `is_causal`: a static cache may be longer than its
    contents."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril()[None, None]


def with_sink(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Queries, keys, values and mask with another key in front, whose product with the queries of each head is `sinks`
    [H] and whose value is 0. If `causal`, a query is put in front, too, so that those behind it see the new key.
    """
    B, H, T, D = query.shape
    own = query.new_zeros(B, H, T, ALIGNED)
    own[..., 0] = sinks.to(query.dtype)[:, None]
    query = torch.cat((query, own), dim=-1)
    if causal:
        query = nn.functional.pad(query, (0, 0, 1, 0))
    key = nn.functional.pad(key, (0, ALIGNED, 1, 0))
    key[:, :, 0, D] = 1.0
    value = nn.functional.pad(value, (0, ALIGNED if value.shape[-1] == D else 0, 1, 0))
    if mask is not None:
        mask = nn.functional.pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0.0)
    return query, key, value, mask


def grouped(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, H, D] against [B, G, S, D] and [B, G, S, Dv] -> [B, H·Dv], with the queries of a group as one head's."""
    B, H, D = query.shape
    G = keys.shape[1]
    if softcap is not None or sinks is not None:
        weights = attention_weights(query[:, :, None], keys, mask, scale, softcap, sinks)
        return mixed(weights, values).flatten(1)
    if mask is not None and mask.shape[1] > 1:
        mask = mask.reshape(len(mask), G, H // G, -1)
    out = nn.functional.scaled_dot_product_attention(
        query.view(B, G, H // G, D), keys, values, attn_mask=mask, scale=scale
    )
    return out.reshape(B, -1)


AttentionInterface.register(ATTENTION_NAME, mqa_attention_forward)
# Without a mask function of the same name, transformers passes no mask, and padding would be attended to.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
