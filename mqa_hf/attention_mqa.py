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

ATTENTION_NAME = "mqa"


def project(linear: nn.Linear, x: torch.Tensor, width: int) -> torch.Tensor:
    """[B, T, d] -> [B, heads, T, width]."""
    return linear(x).view(*x.shape[:2], -1, width).transpose(1, 2)


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

    Returns:
        The output [B, T, H, Dv], and the weights [B, H, T, S] if requested.
    """
    if output_attentions:
        return eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout)
    B, H, T, D = query.shape
    G = key.shape[1]
    g = H // G

    if T == 1:
        if attention_mask is not None and attention_mask.shape[1] > 1:
            attention_mask = attention_mask.reshape(attention_mask.shape[0], G, g, -1)
        out = nn.functional.scaled_dot_product_attention(
            query.reshape(B, G, g, D), key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
        return out.reshape(B, 1, H, out.shape[-1]), None

    causal = attention_mask is None and bool(module.is_causal if is_causal is None else is_causal)
    if causal and key.shape[2] > T:  # prefill of a static cache: positions beyond T are empty
        key, value = key[:, :, :T], value[:, :, :T]
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
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same, in plain matrix products with a softmax in at least float32; shapes as in [`mqa_attention_forward`].

    Returns:
        The output [B, T, H, Dv] and the weights [B, H, T, S].
    """
    B, H, T, D = query.shape
    G, S = key.shape[1:3]
    if attention_mask is None and T > 1 and module.is_causal:
        # Aligned to the upper left, like PyTorch's `is_causal`: a static cache may be longer than its contents.
        attention_mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril()[None, None]
    scaling = D**-0.5 if scaling is None else scaling

    folded = query.reshape(B, G, H // G * T, D)
    weights = (torch.matmul(folded, key.transpose(2, 3)) * scaling).reshape(B, H, T, S)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
    elif attention_mask is not None:
        weights = weights + attention_mask
    precise = torch.promote_types(query.dtype, torch.float32)
    weights = nn.functional.softmax(weights, dim=-1, dtype=precise).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    out = torch.matmul(weights.reshape(B, G, H // G * T, S), value).reshape(B, H, T, -1)
    return out.transpose(1, 2), weights


def grouped(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """[B, H, D] against [B, G, S, D] and [B, G, S, Dv] -> [B, H·Dv], with the queries of a group as one head's."""
    B, H, D = query.shape
    G = keys.shape[1]
    if mask is not None and mask.shape[1] > 1:
        mask = mask.reshape(len(mask), G, H // G, -1)
    out = nn.functional.scaled_dot_product_attention(
        query.view(B, G, H // G, D), keys, values, attn_mask=mask, scale=scale
    )
    return out.reshape(B, -1)


AttentionInterface.register(ATTENTION_NAME, mqa_attention_forward)
# Without a mask function of the same name, transformers passes no mask, and padding would be attended to.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
