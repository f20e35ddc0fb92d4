"""The forward pass of one new token per row, with static buffers and lengths in device memory.

    B rows decoded, k rows of each prompt (beams or returned sequences), P = B / k prompts, V vocabulary, S positions,
    H query heads, G key/value heads, D and Dv head widths

The layers are those of `modeling_mqa.py`; what is different is that nothing has a shape that changes, that projections
of the same input are one matrix product, and that norms, rotation, writes to the cache, activations and residuals are
part of the kernels around them where there are any (`kernels_mqa.py`).
"""

import weakref
from typing import Any

import torch
from torch import nn

from .cache_mqa import FLOAT8, DecodeCache, DecodeLayer, from_float8, to_float8
from .kernels_mqa import (
    ACTIVATIONS,
    MAX_HEAD_WIDTH,
    MAX_SMALL_ROWS,
    activate,
    append,
    attend,
    available,
    compile_all,
    normalise,
    project,
)
from .rules_mqa import decoder_of

WIDE = 16384  # outputs from which the kernel for a few rows reads weights faster than cuBLAS does (measured, H100)


def plain(module: nn.Module) -> bool:
    """Whether a module is a matrix product and nothing else (no adapter, no quantised weight, no hook)."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.element_size() > 1
        and module.weight.is_contiguous()
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def are_joined(parameters: list[Any], sizes: list[int]) -> bool:
    """Whether parameters stand one after the other in a storage of their own."""
    one = next(p for p in parameters if p is not None)
    width, storage = one[0].numel(), one.untyped_storage()
    offsets = [sum(sizes[:i]) * width for i in range(len(sizes))]
    return storage.nbytes() == sum(sizes) * width * one.element_size() and all(
        p is None or (p.untyped_storage().data_ptr() == storage.data_ptr() and p.storage_offset() == offset)
        for p, offset in zip(parameters, offsets)
    )


def joinable(parameters: list[Any], sizes: list[int]) -> bool:
    """Whether parameters may become views of one tensor: not where they are views already that another relies on, as
    those of optimisers that keep all weights in one buffer, nor where other processes share them.
    """
    present = [p for p in parameters if p is not None]
    alone = all(
        p.untyped_storage().nbytes() == p.numel() * p.element_size()
        and not p.is_inference()
        and not (p.device.type == "cpu" and p.is_shared())
        for p in present
    )
    return len(parameters) == 1 or not present or alone or are_joined(parameters, sizes)


def joined(parameters: list[Any], sizes: list[int]) -> torch.Tensor | None:
    """Parameters one after the other along their first dimension, as one tensor that they become views of.

    A missing one (`None`, for a bias) is a gap of zeros. The second call finds what the first one did.

    Args:
        parameters: tensors of `sizes[i]` rows each, or `None`.
    """
    present = [p for p in parameters if p is not None]
    if not present:
        return None
    if len(parameters) == 1:
        return present[0].data
    one, total = present[0], sum(sizes)
    if are_joined(parameters, sizes):
        return one.data.as_strided((total, *one.shape[1:]), one.stride(), 0)
    whole = one.data.new_zeros(total, *one.shape[1:])
    for p, part in zip(parameters, whole.split(sizes)):
        if p is not None:
            part.copy_(p.data)
            p.data = part
    return whole


def left_is_faster(x: torch.Tensor) -> bool:
    """Whether the weights are better on the left of the product: for a few rows of float32 on a CPU, where MKL takes
    1.3 to 2.9 times as long with them on the right (measured, 2 to 32 rows).
    """
    return x.device.type == "cpu" and x.dtype == torch.float32 and 1 < len(x) <= 32


def few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = torch.mm(weight, x.t()).t().contiguous()
    return out if bias is None else out.add_(bias)


class Step:
    """The forward pass of one new token per row.

    `length` counts the positions of the cache that are in use, the new token's included; `positions` are those of the
    position embeddings; `start` is the first position of each row that is no padding; `rows` tells which row of the
    cache holds each position (beams).
    """

    def __init__(self, model: Any, rows: int, copies: int, graph: bool, kernels: bool):
        self.model = weakref.proxy(model)
        self.stack = decoder_of(self.model)
        self.config = self.stack.config
        self.copies = copies
        self.graph = graph
        one = model.lm_head.weight
        self.device, self.dtype = one.device, one.dtype
        widths = [
            width
            for layer in self.stack.layers
            for attention in (layer.self_attn, getattr(layer, "cross_attn", None))
            if attention is not None
            for width in (attention.qk_head_dim, attention.v_head_dim)
        ]
        self.triton = kernels and available(self.device) and max(widths) <= MAX_HEAD_WIDTH
        long: dict[str, Any] = {"dtype": torch.long, "device": self.device}
        self.length = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.host_length = 0  # the same, where steps run eagerly
        self.start = torch.zeros(rows, dtype=torch.int32, device=self.device)
        self.positions = torch.zeros(rows, **long)
        self.counters = torch.zeros(rows * self.config.num_attention_heads, dtype=torch.int32, device=self.device)
        self.padded = False
        self.rows: torch.Tensor | None = None
        self.cache: DecodeCache = None  # type: ignore[assignment]
        self.cross: DecodeCache | None = None
        self.source_start: torch.Tensor | None = None
        self.source_length: torch.Tensor | None = None
        self.cos: torch.Tensor | None = None
        self.sin: torch.Tensor | None = None
        self.tables: dict[int, torch.Tensor] = {}
        self.slopes: torch.Tensor | None = None
        if self.config.position_embedding == "alibi":
            slopes = torch.tensor(self.config.alibi_slopes, dtype=torch.float32, device=self.device)
            rounded = self.config.alibi_bfloat16
            self.slopes = (slopes / self.config.attention_scale).bfloat16().float() if rounded else slopes
        self.plans: dict[int, tuple[torch.Tensor, torch.Tensor | None] | None] = {}
        self.masks: dict[Any, Any] = {}

    def prepare(self, reach: int) -> bool:
        """Tables for positions below `reach`, and joined weights; called before the first step of each text.

        Returns:
            Whether a graph that was captured before is not to be used: a table has been replaced by a larger one, or a
            module may do something else than it did (an adapter that can be switched).
        """
        before = {key: plan is not None for key, plan in self.plans.items()}
        self.plans = {}
        replaced = self.stack.rotary_emb is not None and (self.cos is None or len(self.cos) < reach)
        if replaced:
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            cos, sin = self.stack.rotary_emb(like, torch.arange(reach, device=self.device)[None])
            self.cos, self.sin = cos[0, 0].contiguous(), sin[0, 0].contiguous()
        for i, layer in enumerate(self.stack.layers):
            if layer.self_attn.relative_bias is not None:
                table = self.stack.distance_bias(layer.self_attn.relative_bias)
                if i in self.tables:
                    self.tables[i].copy_(table)
                else:
                    self.tables[i] = table
        for layer in self.stack.layers:
            for modules in self.groups(layer):
                self.weights(modules)
        self.weights((self.model.lm_head,))
        now = {key: plan is not None for key, plan in self.plans.items()}
        return replaced or now != before or not all(now.values())

    @staticmethod
    def groups(layer: Any) -> list[tuple]:
        """The projections of a layer that have the same input."""
        attention, mlp = layer.self_attn, layer.mlp
        groups = [(attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,), (mlp.down_proj,)]
        groups.append((mlp.up_proj,) if mlp.gate_proj is None else (mlp.gate_proj, mlp.up_proj))
        if hasattr(layer, "cross_attn"):
            groups += [(layer.cross_attn.q_proj,), (layer.cross_attn.o_proj,)]
        return groups

    def weights(self, modules: tuple) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Joined weight [ΣN, K] and bias [ΣN] of plain projections; `None` where one is not plain (LoRA, int8)."""
        key = id(modules[0])
        if key not in self.plans:
            self.plans[key] = None
            if all(plain(module) for module in modules) and len({m.weight.dtype for m in modules}) == 1:
                sizes = [m.out_features for m in modules]
                weights, biases = [m.weight for m in modules], [m.bias for m in modules]
                if joinable(weights, sizes) and joinable(biases, sizes):
                    weight = joined(weights, sizes)
                    assert weight is not None
                    self.plans[key] = weight, joined(biases, sizes)
        return self.plans[key]

    def linear(
        self,
        x: torch.Tensor,
        modules: tuple,
        norm: nn.Module | None = None,
        activation: Any = None,
        gated: bool = False,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """act(norm(x) · Wᵀ + b) + residual with the joined weights of `modules`.

        Args:
            x: [B, K].
            activation: a module, applied to all outputs; with `gated` to those of the first of two modules, which are
                multiplied with those of the second.
            residual: [B, N]; the result may be written to it.
        """
        found, name = self.weights(modules), None
        if activation is not None:
            name = self.config.hidden_act if self.config.hidden_act in ACTIVATIONS else None
        if found is None:
            y = x if norm is None else norm(x)
            parts = [module(y) for module in modules]
            if activation is not None:
                parts[0] = activation(parts[0])
            out = parts[0] * parts[1] if gated else torch.cat(parts, -1) if len(parts) > 1 else parts[0]
            return out if residual is None else residual + out
        weight, bias = found
        fits = self.triton and (activation is None or name is not None) and weight.dtype == x.dtype
        known = norm is None or type(norm) in (nn.RMSNorm, nn.LayerNorm)
        normal: Any = (None, None, None, 0.0)
        if norm is not None and known:
            rms = isinstance(norm, nn.RMSNorm)
            normal = "rms_norm" if rms else "layer_norm", norm.weight, None if rms else norm.bias, norm.eps
        if fits and len(x) == 1 and known:
            return project(x, weight, bias, *normal, activation=name, gated=gated, residual=residual)
        if norm is None:
            y = x
        elif self.triton and known:
            y = normalise(x, *normal)
        else:
            y = norm(x)
        if fits and len(x) <= MAX_SMALL_ROWS and len(weight) >= WIDE and x.element_size() == 2:
            return project(y, weight, bias, activation=name, gated=gated, residual=residual)
        if residual is not None and bias is None and y.is_cuda:
            return torch.addmm(residual, y, weight.t(), out=residual)
        out = few_rows(y, weight, bias) if left_is_faster(y) else nn.functional.linear(y, weight, bias)
        if activation is not None and fits:
            out = activate(out, name, gated)  # type: ignore[arg-type]
        elif activation is not None:
            first, *second = out.chunk(2, -1) if gated else (out,)
            out = activation(first) * second[0] if gated else activation(first)
        return out if residual is None else residual + out

    def compile(self) -> None:
        """Compile the kernels of a step side by side; the step's own buffers are left alone."""
        if self.triton:
            x = torch.zeros(len(self.positions), self.config.hidden_size, dtype=self.dtype, device=self.device)
            compile_all(
                lambda: [self.layer(layer, x, i) for i, layer in enumerate(self.stack.layers)] + [self.head(x)]
            )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B] the newest tokens -> [B, V] logits; their keys and values are written to the cache."""
        stack, config = self.stack, self.config
        self.length += 1
        self.masks = {}
        x = stack.enter(stack.embed_tokens(tokens)[:, None], self.positions[:, None]).squeeze(1)
        if self.cos is not None and not self.triton:
            assert self.sin is not None
            self.masks["angles"] = self.cos[self.positions][:, None, None], self.sin[self.positions][:, None, None]
        for i, layer in enumerate(stack.layers):
            x = self.layer(layer, x, i)
            if config.clamp_float16 and x.dtype == torch.float16:
                x = x.clamp(-64504, 64504)
        self.positions += 1
        return self.head(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """[B, d] -> [B, V]."""
        if self.stack.project_out is None:
            logits = self.linear(x, (self.model.lm_head,), norm=self.stack.norm)
        else:
            logits = self.linear(self.stack.leave(x), (self.model.lm_head,))
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        return logits

    def layer(self, layer: Any, x: torch.Tensor, i: int) -> torch.Tensor:
        kind, attention = layer.residual, layer.self_attn
        post = kind == "post_norm"
        first = None if post else layer.input_layernorm
        joined = self.linear(x, (attention.q_proj, attention.k_proj, attention.v_proj), norm=first)
        attended = self.self_attention(attention, joined, i)
        if kind in ("parallel", "parallel_shared_norm"):
            norm = first if kind == "parallel_shared_norm" else layer.post_attention_layernorm
            inner = self.inner(layer.mlp, x, norm)
            x = self.add(x, attended, attention.o_proj)
        else:
            x = self.add(x, attended, attention.o_proj)
            if post:
                x = layer.input_layernorm(x)
            if self.cross is not None:
                cross = layer.cross_attn
                query = self.linear(x, (cross.q_proj,), norm=None if post else layer.cross_attn_layernorm)
                x = self.add(x, self.cross_attention(cross, query, i), cross.o_proj)
                x = layer.cross_attn_layernorm(x) if post else x
            inner = self.inner(layer.mlp, x, None if post else layer.post_attention_layernorm)
        x = self.add(x, inner, layer.mlp.down_proj)
        return layer.post_attention_layernorm(x) if post else x

    def add(self, x: torch.Tensor, inner: torch.Tensor, module: nn.Module) -> torch.Tensor:
        """The residual stream after a sub-layer that ends in this projection; it may be written to."""
        if self.config.residual_multiplier == 1.0:
            return self.linear(inner, (module,), residual=x)
        return torch.add(x, self.linear(inner, (module,)), alpha=self.config.residual_multiplier)

    def inner(self, mlp: Any, x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        gated = mlp.gate_proj is not None
        modules = (mlp.gate_proj, mlp.up_proj) if gated else (mlp.up_proj,)
        return self.linear(x, modules, norm=norm, activation=mlp.act_fn, gated=gated)

    def self_attention(self, attention: Any, joined: torch.Tensor, i: int) -> torch.Tensor:
        """[B, H·D + G·D + G·Dv] -> [B, H·Dv]."""
        held: Any = self.cache.layers[i]
        H, G, D = self.config.num_attention_heads, held.keys.shape[1], attention.qk_head_dim
        scales = {name: buffer for name, buffer in held.buffers().items() if name.endswith("scales")}
        table = self.tables.get(i, self.tables.get(0))
        bfloat16_from_start = self.config.positions_from_mask if self.config.alibi_bfloat16 else None
        if self.triton:
            turned = {"cos": self.cos, "sin": self.sin, "frequency": attention.rotated} if attention.rotary else {}
            query = append(
                joined, H, held.keys, held.values, self.length, positions=self.positions, head=attention.head_dim,
                **turned, **scales,
            )  # fmt: skip
            out = attend(
                query, held.keys, held.values, self.length, attention.scaling, capacity=held.capacity,
                start=self.start, rows=self.rows, window=attention.sliding_window, slopes=self.slopes,
                bfloat16_from_start=bfloat16_from_start, table=table, counters=self.counters, **scales,
            )  # fmt: skip
            return out.flatten(1)
        q, k, v = joined.split([H * D, G * D, joined.shape[1] - (H + G) * D], -1)
        query, key, value = (
            part.view(len(part), -1, 1, width) for part, width in ((q, D), (k, D), (v, attention.v_head_dim))
        )
        if attention.rotary:
            query, key = attention.rotate(query, *self.masks["angles"]), attention.rotate(key, *self.masks["angles"])
        for name, new in (("key", key), ("value", value)):
            if scales:
                new, scale = to_float8(new)
                self.write(scales[name + "_scales"], scale)
            self.write(getattr(held, name + "s"), new)
        span = held.capacity if self.graph else self.host_length
        keys, values = self.visible(held, "key", span), self.visible(held, "value", span)
        mask = self.mask(span, attention.sliding_window, table, bfloat16_from_start, query.dtype)
        return grouped(query.squeeze(2), keys, values, mask, attention.scaling)

    def write(self, buffer: torch.Tensor, new: torch.Tensor) -> None:
        """Put [B, G, 1, ...] at the newest position of [B, G, S, ...]."""
        if self.graph:
            if buffer.dtype == FLOAT8:  # PyTorch has no such copy of this type
                buffer, new = buffer.view(torch.uint8), new.view(torch.uint8)
            buffer.index_copy_(2, self.length.long() - 1, new)
        else:
            buffer[:, :, self.host_length - 1 : self.host_length] = new

    def visible(self, held: DecodeLayer, name: str, span: int) -> torch.Tensor:
        """The first positions [B, G, span, D] of the keys or values, as numbers of the model's type."""
        states, scales = getattr(held, name + "s")[:, :, :span], getattr(held, name + "_scales")
        if states.dtype == FLOAT8:
            states = from_float8(states, scales[:, :, :span], self.dtype)
        if self.rows is not None:
            at = torch.arange(span, device=self.device)
            states = states.transpose(1, 2)[self.rows[:, :span].long(), at].transpose(1, 2)
        return states

    def mask(
        self, span: int, window: int | None, table: torch.Tensor | None, rounded: bool | None, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """The mask [B or 1, 1 or H, 1, span] that layers of the same kind share, boolean or additive."""
        key = (window, None if table is None else table.data_ptr())
        if key in self.masks:
            return self.masks[key]
        mask, at = None, torch.arange(span, device=self.device)
        if self.graph or self.padded or window:
            first = self.start[:, None]
            if window:
                first = torch.maximum(first, self.length - window)
            mask = ((at >= first) & (at < self.length))[:, None, None]
        bias = None
        if table is not None:
            bias = table[:, (self.length - 1 - at).clamp(0, table.shape[1] - 1)][None, :, None]
        elif self.slopes is not None and rounded is None:
            bias = (self.slopes[:, None] * (at - self.length + 1))[None, :, None]
        elif self.slopes is not None:
            place = at - self.start[:, None] if rounded else at[None]
            scale = self.config.attention_scale
            bias = (self.slopes.bfloat16()[:, None] * place[:, None]).float()[:, :, None] * scale
        if bias is not None:
            bias = bias.to(dtype)
            mask = bias if mask is None else torch.where(mask, bias, torch.finfo(dtype).min)
        self.masks[key] = mask
        return mask

    def cross_attention(self, attention: Any, query: torch.Tensor, i: int) -> torch.Tensor:
        """[B, H·D] -> [B, H·Dv], the rows of a prompt reading the keys and values of its source together."""
        assert self.cross is not None
        assert self.source_length is not None
        held: Any = self.cross.layers[i]
        query = query.view(len(query), -1, attention.qk_head_dim)
        if self.triton:
            out = attend(
                query, held.keys, held.values, self.source_length, attention.scaling, capacity=held.capacity,
                start=self.source_start, fold=self.copies, counters=self.counters,
            )  # fmt: skip
            return out.flatten(1)
        if "source" not in self.masks:
            assert self.source_start is not None
            at = torch.arange(held.capacity, device=self.device)
            seen = (at >= self.source_start[:, None]) & (at < self.source_length[:, None])
            self.masks["source"] = seen[:, None, None]
        P, k, H = len(held.keys), self.copies, query.shape[1]
        G = held.keys.shape[1]
        folded = query.view(P, k, G, H // G, -1).transpose(1, 2).reshape(P, G * k * (H // G), -1)
        out = grouped(folded, held.keys, held.values, self.masks["source"], attention.scaling)
        return out.view(P, G, k, H // G, -1).transpose(1, 2).reshape(P * k, -1)


def grouped(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """[B, H, D] against [B, G, S, D] and [B, G, S, Dv] -> [B, H·Dv], the queries of a group as those of one head."""
    B, H, D = query.shape
    G = keys.shape[1]
    if mask is not None and mask.shape[1] > 1:
        mask = mask.reshape(len(mask), G, H // G, -1)
    out = nn.functional.scaled_dot_product_attention(
        query.view(B, G, H // G, D), keys, values, attn_mask=mask, scale=scale
    )
    return out.reshape(B, -1)
