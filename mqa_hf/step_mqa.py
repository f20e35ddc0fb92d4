"""The forward pass of one new token per row, with static buffers and lengths in device memory.

    B rows decoded, k rows of each prompt (beams or returned sequences), P = B / k prompts, V vocabulary, S positions,
    H query heads, G key/value heads, D and Dv head widths

The layers are those of `layer_mqa.py`, but no shape changes, projections of the same input are one matrix product, and
norms, rotation, cache writes, activations and residuals are fused into the kernels around them, where available
(`kernel_*_mqa.py`).
"""

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import latent_step_mqa
from .attention_mqa import HeadNorm, grouped
from .beams_mqa import gather_beams
from .cache_mqa import FLOAT8, DecodeCache, KeyValueLayer, from_float8, to_float8
from .experts_mqa import MQAMLP, MQAMixture
from .experts_step_mqa import by_kernel, mixture, plain_mixture
from .kernel_append_mqa import append
from .kernel_attend_mqa import MAX_HEAD_WIDTH, attend
from .kernel_launch_mqa import available, compile_all
from .kernel_norm_mqa import normalise
from .latent_mqa import Angles, MQALatentAttention, QueryMap
from .layer_mqa import scaled_logits
from .parallel_mqa import embedded, gathered
from .positions_mqa import distance_bias, query_scale
from .request_mqa import Request
from .rules_mqa import decoder_stack
from .weights_mqa import HeadNorms, Projections, plain_norms

if TYPE_CHECKING:
    from .layer_mqa import MQAAttention, MQADecoderLayer
    from .modeling_mqa import MQAModel


class DecodeStep:
    """The forward pass of one new token per row.

    Args:
        model: a model with a language-model head; held weakly.
        request: the request of the call.
        cache, cross: caches of self-attention and of cross-attention, if any.

    Attributes:
        length: [1], the positions of the cache in use, the new token's included; `host_length` is the same on the
            host, for eager steps.
        positions: [B], for the position embeddings.
        start: [B], the first position of each row that is not padding.
        rows: [B, S], the row of the cache that holds each position (beams).
        source_start, source_length: [P], the first position of an encoder's output that is not padding, and the end.
    """

    def __init__(self, model: Any, request: Request, cache: DecodeCache, cross: DecodeCache | None):
        self.model = weakref.proxy(model)
        self.stack: MQAModel = decoder_stack(self.model)
        self.config = self.stack.config
        self.request, self.cache, self.cross = request, cache, cross
        B, head = request.rows, model.lm_head.weight
        self.device, self.dtype = head.device, head.dtype
        self.triton = request.kernels and available(self.device) and max(self.widths()) <= MAX_HEAD_WIDTH
        # In a graph shapes must not change, and nothing is read back; without kernels the choice of experts is.
        fixed = all(by_kernel(self, module) for module in self.mixtures())
        self.graph = request.graphs and self.device.type == "cuda" and fixed
        self.linear = Projections(self.config.hidden_act, self.triton, B)
        self.host_length = 0
        self.padded = False
        self.length = self.zeros(1)
        self.start = self.zeros(B)
        self.positions = torch.zeros(B, dtype=torch.long, device=self.device)
        self.counters = self.zeros(B * self.config.num_attention_heads)
        self.rows = None if request.beams is None else self.zeros(B, cache.capacity + 1)
        self.own = torch.arange(B, dtype=torch.int32, device=self.device)
        self.source_start = None if cross is None else self.zeros(cross.rows)
        self.source_length = None if cross is None else self.zeros(cross.rows)
        self.cos: torch.Tensor | None = None
        self.sin: torch.Tensor | None = None
        self.tables: dict[int, torch.Tensor] = {}
        self.kernel_tables = latent_step_mqa.KernelTables()
        self.norms = HeadNorms()
        self.slopes: torch.Tensor | None = None
        if self.config.position_embedding == "alibi":
            slopes = torch.tensor(self.config.alibi_slopes, dtype=torch.float32, device=self.device)
            rounded = self.config.alibi_bfloat16
            self.slopes = (slopes / self.config.attention_scale).bfloat16().float() if rounded else slopes
        self.begin()
        self.trial = False  # whether kernels are only being compiled, and the cache must not be written to

    @property
    def layers(self) -> "list[MQADecoderLayer]":
        layers: Any = self.stack.layers
        return layers

    def zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.device)

    def widths(self) -> Iterator[int]:
        """Widths of all cached heads."""
        yield 0
        for layer in self.layers:
            for attention in (layer.self_attn, getattr(layer, "cross_attn", None)):
                if attention is not None and not isinstance(attention, MQALatentAttention):
                    yield from (attention.qk_head_dim, attention.v_head_dim)

    # -- before and between steps ---------------------------------------------------------------------------------

    def place(self, arguments: dict[str, Any], held: int) -> None:
        """Continue after a prefill that left `held` positions in the cache.

        Args:
            arguments: arguments of the model's `forward`, for one row of each prompt: masks and positions.
        """
        several, copies = self.model.config.is_encoder_decoder, self.request.copies
        mask = arguments.get("decoder_attention_mask" if several else "attention_mask")
        positions = arguments.get("decoder_position_ids" if several else "position_ids")
        self.host_length = held
        self.length.fill_(held)
        self.start.zero_()
        self.padded = False
        if mask is not None:
            first = mask.long().argmax(1).to(self.device)
            self.padded = bool(first.any())
            self.start.copy_(first.repeat_interleave(copies))
        if positions is not None:
            after = positions[:, -1].to(self.device) + 1
            self.positions.copy_(after.repeat_interleave(copies) if len(after) > 1 else after.expand_as(self.start))
        elif mask is not None and (self.config.positions_from_mask or (several and self.model.config.num_mel_bins)):
            self.positions.copy_((held - self.start).long())
        else:
            self.positions.fill_(held)
        if self.rows is not None:
            self.rows.copy_(self.own[:, None].div(copies, rounding_mode="floor").mul(copies).expand_as(self.rows))
        if self.cross is not None:
            self.place_source(None if self.model.config.num_mel_bins else arguments.get("attention_mask"))

    def place_source(self, seen: torch.Tensor | None) -> None:
        """Set the mask [P, S] of an encoder's output; without one, all of it is attended to."""
        assert self.cross is not None
        assert self.source_start is not None
        assert self.source_length is not None
        first = torch.zeros(self.cross.rows, dtype=torch.long) if seen is None else seen.long().argmax(1)
        self.source_start.copy_(first)
        self.source_length.copy_(first + self.cross.get_seq_length() if seen is None else first + seen.sum(1))

    def prepare(self) -> bool:
        """Make tables for the capacity of the cache, and join weights; called before the first step of each text, and
        when the cache has grown.

        Returns:
            Whether a captured graph is invalid, because a table was replaced by a larger one or a module may have
            changed.
        """
        reach = int(self.positions.max()) + self.cache.capacity + 1 - self.host_length
        replaced = self.stack.rotary_emb is not None and (self.cos is None or len(self.cos) < reach)
        if replaced:
            assert self.stack.rotary_emb is not None
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            cos, sin = self.stack.rotary_emb(like, torch.arange(reach, device=self.device)[None])
            self.cos, self.sin = cos[0, 0].contiguous(), sin[0, 0].contiguous()
        if self.triton:
            self.kernel_tables.prepare(self, reach if replaced else None)
            self.norms.prepare(self.heads())
        for i, layer in enumerate(self.layers):
            if layer.self_attn.relative_bias is not None:
                table = distance_bias(self.config, layer.self_attn.relative_bias)
                if i in self.tables:
                    self.tables[i].copy_(table)
                else:
                    self.tables[i] = table
        changed = self.linear.prepare((*self.groups(), (self.model.lm_head,)))
        return replaced or changed or not self.plain()

    def plain(self) -> bool:
        """Whether the modules that are not in [`DecodeStep.groups`] are unmodified: no adapter in their place."""
        return (
            isinstance(self.stack.embed_tokens, nn.Embedding)
            and all(map(latent_step_mqa.plain_maps, self.latent_attentions()))
            and all(map(plain_norms, self.heads()))
            and all(attention.q_map is None or type(attention.q_map) is QueryMap for attention in self.heads())
            and all(map(plain_mixture, self.mixtures()))
        )

    def mixtures(self) -> Iterator[MQAMixture]:
        for layer in self.layers:
            if isinstance(layer.mlp, MQAMixture):
                yield layer.mlp

    def heads(self) -> "Iterator[MQAAttention]":
        """The self-attentions that cache keys and values."""
        for layer in self.layers:
            if not isinstance(layer.self_attn, MQALatentAttention):
                yield layer.self_attn

    def latent_attentions(self) -> Iterator[MQALatentAttention]:
        for layer in self.layers:
            for attention in (layer.self_attn, getattr(layer, "cross_attn", None)):
                if isinstance(attention, MQALatentAttention):
                    yield attention

    def groups(self) -> Iterator[tuple[nn.Module, ...]]:
        """The projections that have the same input."""
        for layer in self.layers:
            attention = layer.self_attn
            yield read_by(attention)
            beside = attention.k_proj if isinstance(attention, MQALatentAttention) else attention.gate_proj
            if beside is not None:
                yield (beside,)
            yield (attention.o_proj,)
            mlp = layer.mlp.shared if isinstance(layer.mlp, MQAMixture) else layer.mlp
            if mlp is not None:
                yield (mlp.down_proj,)
                yield (mlp.up_proj,) if mlp.gate_proj is None else (mlp.gate_proj, mlp.up_proj)
            if hasattr(layer, "cross_attn"):
                yield (layer.cross_attn.q_proj,)
                yield (layer.cross_attn.o_proj,)

    def reorder(self, parents: torch.Tensor) -> None:
        """Make each beam continue the beam `parents` [P, k] of its prompt; it writes to its own row from now on."""
        assert self.rows is not None
        rows = self.rows.view(*parents.shape, -1)
        rows.copy_(gather_beams(rows, parents))
        self.rows.index_copy_(1, self.length.long(), self.own[:, None])  # where the next position will be written

    def widen(self) -> None:
        """Grow `rows` to the capacity of the cache."""
        if self.rows is not None:
            self.rows = nn.functional.pad(self.rows, (0, self.cache.capacity + 1 - self.rows.shape[1]))

    def advance(self) -> None:
        """Count one more position in use; called before the [`DecodeStep.forward`] that fills it."""
        self.host_length += 1

    # -- the step -------------------------------------------------------------------------------------------------

    def compile(self) -> None:
        """Compile the kernels of a step in parallel, without changing the step's buffers."""
        if self.triton:
            x = torch.zeros(len(self.positions), self.config.hidden_size, dtype=self.dtype, device=self.device)
            self.trial = True
            try:
                compile_all(lambda: [self.layer(layer, x, i) for i, layer in enumerate(self.layers)] + [self.head(x)])
            finally:
                self.trial = False

    def begin(self) -> None:
        """Clear what the layers of one step share."""
        self.newest_angles: Angles | None = None
        self.newest_scale: torch.Tensor | None = None
        self.all_angles: Angles | None = None
        self.masks: dict[tuple[int | None, int | None], torch.Tensor | None] = {}
        self.source_mask: torch.Tensor | None = None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B] the newest tokens -> [B, V] logits; their keys and values are written to the cache."""
        stack, config = self.stack, self.config
        self.length += 1
        self.begin()
        assert stack.embed_tokens is not None
        x = stack.enter(embedded(tokens, stack.embed_tokens)[:, None], self.positions[:, None]).squeeze(1)
        for i, layer in enumerate(self.layers):
            x = self.layer(layer, x, i)
            if config.clamp_float16 and x.dtype == torch.float16:
                x = x.clamp(-64504, 64504)
        self.positions += 1
        return self.head(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """[B, d] -> [B, V]."""
        if self.stack.project_out is None and self.stack.head_transform is None:
            logits = self.linear(x, (self.model.lm_head,), norm=self.stack.norm)
        else:
            logits = self.linear(self.stack.leave(x), (self.model.lm_head,))
        logits = gathered(logits, self.model.lm_head.weight, self.config.vocab_size)
        return scaled_logits(logits, self.config)

    def layer(self, layer: "MQADecoderLayer", x: torch.Tensor, i: int) -> torch.Tensor:
        for branches, after, leave in layer.residuals(cross=self.cross is not None):
            # The input of two sub-layers must not be overwritten before both have read it.
            inner = [self.branch(layer, module, norm, x, i) for norm, module in branches]
            for values, projection in inner:
                x = self.add(x, values, projection, leave)
            x = x if after is None else after(x)
        return x

    def branch(
        self, layer: "MQADecoderLayer", module: nn.Module, norm: nn.Module | None, x: torch.Tensor, i: int
    ) -> tuple[torch.Tensor, nn.Module | None]:
        """The input of the last projection of a sub-layer, and that projection; or its output, and `None`."""
        if isinstance(module, MQAMixture):
            return mixture(self, module, x if norm is None else self.linear.normed(x, norm)), None
        if isinstance(module, MQAMLP):
            return self.inner(module, x, norm), module.down_proj
        if module is layer.self_attn:
            own = layer.self_attn
            joined = self.linear(x, read_by(own), norm=norm)
            if isinstance(own, MQALatentAttention):
                return latent_step_mqa.self_attention(self, own, joined, i), own.o_proj
            mixed = self.self_attention(own, own.clipped(joined), i)
            if own.gate_proj is not None:
                mixed = mixed * self.linear(x, (own.gate_proj,), norm=norm).sigmoid()
            return mixed, own.o_proj
        cross = layer.cross_attn
        query = self.linear(x, (cross.q_proj,), norm=norm)
        if isinstance(cross, MQALatentAttention):
            return latent_step_mqa.cross_attention(self, cross, query, i), cross.o_proj
        return self.cross_attention(cross, query, i), cross.o_proj

    def add(
        self, x: torch.Tensor, inner: torch.Tensor, module: nn.Module | None, norm: nn.Module | None = None
    ) -> torch.Tensor:
        """The residual stream after a sub-layer that ends in this projection and then this norm; it may be written in
        place. Without a projection, `inner` is what the sub-layer adds."""
        if module is not None and self.config.residual_multiplier == 1.0 and norm is None:
            return self.linear(inner, (module,), residual=x)
        output = inner if module is None else self.linear(inner, (module,))
        if norm is not None:
            output = self.linear.normed(output, norm)
        return torch.add(x, output, alpha=self.config.residual_multiplier)

    def inner(self, mlp: "MQAMLP", x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        if mlp.gate_proj is None:
            return self.linear(x, (mlp.up_proj,), norm=norm, activation=mlp.act_fn)
        return self.linear(x, (mlp.gate_proj, mlp.up_proj), norm=norm, activation=mlp.act_fn, gated=True)

    def self_attention(self, attention: "MQAAttention", joined: torch.Tensor, i: int) -> torch.Tensor:
        """[B, H·D + G·D + G·Dv] -> [B, H·Dv]."""
        held: Any = self.cache.decode_layers[i]
        G, D = held.keys.shape[1], attention.qk_head_dim
        H = (joined.shape[1] - G * (D + attention.v_head_dim)) // attention.query_width  # of this rank
        scaled = held.keys.dtype == FLOAT8
        key_scales, value_scales = (held.key_scales, held.value_scales) if scaled else (None, None)
        if self.triton and plain_norms(attention):
            joined = joined if attention.q_map is None else self.mapped(attention, joined)
            turned: dict[str, Any] = {}
            if attention.rotary:
                turned = {"cos": self.cos, "sin": self.sin, "frequency": attention.rotated}
            query = append(
                joined, H, held.keys, held.values, self.length, positions=self.positions,
                head=attention.rotated_width, key_scales=key_scales, value_scales=value_scales, **turned,
                **self.norms(attention),
            )  # fmt: skip
            scale = self.query_scale()
            out = attend(
                query if scale is None else query * scale, held.keys, held.values, self.length, attention.scaling,
                **self.seen(attention, i), key_scales=key_scales, value_scales=value_scales,
                softcap=attention.softcap, sinks=attention.sinks,
            )  # fmt: skip
            return out.flatten(1)
        widths = attention.query_width, D, attention.v_head_dim
        parts = joined.split([heads * width for heads, width in zip((H, G, G), widths)], -1)
        query, key, value = (part.view(len(part), -1, 1, width) for part, width in zip(parts, widths))
        query, key = attention.placed(query, key, self.angles() if attention.rotary else None)
        scale = self.query_scale()
        query = query if scale is None else query * scale[:, None]
        for name, new in (("key", key), ("value", value)):
            if scaled:
                new, scale = to_float8(new)
                self.write(getattr(held, name + "_scales"), scale)
            self.write(getattr(held, name + "s"), new)
        keys, values = self.numbers(held, "key"), self.numbers(held, "value")
        mask = self.mask(attention.sliding_window, i, query.dtype)
        return grouped(query.squeeze(2), keys, values, mask, attention.scaling, attention.softcap, attention.sinks)

    def mapped(self, attention: "MQAAttention", joined: torch.Tensor) -> torch.Tensor:
        """[B, H·head_dim + ...] -> [B, H·D + ...], with the queries normalised and mapped, for the kernels."""
        H, width = self.config.num_attention_heads, attention.query_width
        query, others = joined.split([H * width, joined.shape[1] - H * width], -1)
        norm, maps = attention.q_norm, attention.q_map
        bare = type(norm) is HeadNorm and norm.weight is None and norm.bias is None and not norm.joint
        if not (bare and type(maps) is QueryMap):
            query = attention.own_queries(query.view(len(query), H, 1, width))
            return torch.cat((query.flatten(1), others), -1)
        assert norm is not None
        kind, D = "layer_norm" if norm.centred else "rms_norm", attention.qk_head_dim
        query = normalise(query.reshape(-1, width), kind, None, None, norm.eps).view(-1, H, width)
        if width != D:
            joined = torch.cat((others.new_empty(len(others), H * D), others), -1)
        out = joined[:, : H * D].view(-1, H, D)
        torch.bmm(query.transpose(0, 1), maps.weight.mT, out=out.transpose(0, 1))
        return joined

    def query_scale(self) -> torch.Tensor | None:
        """[B, 1, 1], the factor on the queries of a step; `None` if there is none."""
        if self.config.query_scaling_beta is None:
            return None
        if self.newest_scale is None:
            self.newest_scale = query_scale(self.positions, self.config).to(self.dtype)[:, None, None]
        return self.newest_scale

    def seen(self, attention: "MQAAttention | MQALatentAttention", i: int) -> dict[str, Any]:
        """Arguments of [`attend`] for the part of the cache that a layer attends to."""
        return {
            "capacity": self.cache.capacity, "start": self.start, "rows": self.rows,
            "window": attention.sliding_window, "slopes": self.slopes, "table": self.table(i),
            "bfloat16_from_start": self.bfloat16_from_start, "counters": self.counters,
        }  # fmt: skip

    @property
    def span(self) -> int:
        """Number of cache positions that PyTorch operations read."""
        return self.cache.capacity if self.graph else self.host_length

    def angles(self) -> Angles:
        """Cosines and sines [B, 1, 1, R] of the newest positions."""
        if self.newest_angles is None:
            self.newest_angles = self.angles_at(self.positions[:, None])
        return self.newest_angles

    def key_angles(self) -> Angles:
        """Same for all positions of the cache, [B, 1, span, R]; those of padding are meaningless."""
        if self.all_angles is None:
            at = torch.arange(self.span, device=self.device) + (self.positions - self.length + 1)[:, None]
            self.all_angles = self.angles_at(at.clamp(min=0))
        return self.all_angles

    def angles_at(self, positions: torch.Tensor) -> Angles:
        assert self.cos is not None
        assert self.sin is not None
        return self.cos[positions][:, None], self.sin[positions][:, None]

    def write(self, buffer: torch.Tensor, new: torch.Tensor) -> None:
        """Write [B, G, 1, ...] to the newest position of [B, G, S, ...]."""
        if self.trial:
            return
        if self.graph:
            if buffer.dtype == FLOAT8:  # PyTorch does not support this copy in float8
                buffer, new = buffer.view(torch.uint8), new.view(torch.uint8)
            buffer.index_copy_(2, self.length.long() - 1, new.to(buffer.dtype))
        else:
            buffer[:, :, self.host_length - 1 : self.host_length] = new

    def numbers(self, held: KeyValueLayer, name: str) -> torch.Tensor:
        """The keys or values [B, G, span, D] in the model's type."""
        states, scales = getattr(held, name + "s"), getattr(held, name + "_scales")
        if states.dtype == FLOAT8:
            states = from_float8(states[:, :, : self.span], scales[:, :, : self.span], self.dtype)
        return self.visible(states)

    def visible(self, states: torch.Tensor) -> torch.Tensor:
        """The first positions [B, G, span, ...] of a buffer, from the rows that hold them."""
        states = states[:, :, : self.span]
        if self.rows is not None:
            at = torch.arange(self.span, device=self.device)
            states = states.transpose(1, 2)[self.rows[:, : self.span].long(), at].transpose(1, 2)
        return states

    def table(self, i: int) -> torch.Tensor | None:
        """The biases of a layer by distance; by default those of the first layer."""
        return self.tables.get(i, self.tables.get(0))

    @property
    def bfloat16_from_start(self) -> bool | None:
        """As in [`attend`]."""
        return self.config.positions_from_mask if self.config.alibi_bfloat16 else None

    def mask(self, window: int | None, i: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The mask [B or 1, 1 or H, 1, span] that layers of the same kind share, boolean or additive."""
        table, rounded = self.table(i), self.bfloat16_from_start
        key = (window, None if table is None else table.data_ptr())
        if key in self.masks:
            return self.masks[key]
        mask, at = None, torch.arange(self.span, device=self.device)
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

    def cross_attention(self, attention: "MQAAttention", query: torch.Tensor, i: int) -> torch.Tensor:
        """[B, H·D] -> [B, H·Dv]; the rows of a prompt read the keys and values of its source together."""
        assert self.cross is not None
        assert self.source_length is not None
        held: Any = self.cross.decode_layers[i]
        query = query.view(len(query), -1, attention.qk_head_dim)
        if self.triton:
            out = attend(
                query, held.keys, held.values, self.source_length, attention.scaling, capacity=held.capacity,
                start=self.source_start, fold=self.request.copies, counters=self.counters,
            )  # fmt: skip
            return out.flatten(1)
        P, k, H = len(held.keys), self.request.copies, query.shape[1]
        G = held.keys.shape[1]
        folded = query.view(P, k, G, H // G, -1).transpose(1, 2).reshape(P, G * k * (H // G), -1)
        out = grouped(folded, held.keys, held.values, self.source_seen(), attention.scaling)
        return out.view(P, G, k, H // G, -1).transpose(1, 2).reshape(P * k, -1)

    def source_seen(self) -> torch.Tensor:
        """The mask [P, 1, 1, S] of an encoder's output."""
        if self.source_mask is None:
            assert self.cross is not None
            assert self.source_start is not None
            assert self.source_length is not None
            at = torch.arange(self.cross.capacity, device=self.device)
            seen = (at >= self.source_start[:, None]) & (at < self.source_length[:, None])
            self.source_mask = seen[:, None, None]
        return self.source_mask


def read_by(attention: "MQAAttention | MQALatentAttention") -> tuple[nn.Module, ...]:
    """The input projections of a self-attention, which are joined."""
    if isinstance(attention, MQALatentAttention):
        return attention.q_proj, attention.kv_proj
    return attention.q_proj, attention.k_proj, attention.v_proj
