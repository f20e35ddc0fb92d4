"""Fast decoding behind `generate()`: one step, captured in a CUDA graph and replayed without Python in between.

    B rows decoded, k rows of each prompt (beams or returned sequences), P = B / k prompts, V vocabulary, H query heads,
    G key/value heads, D and Dv head widths

transformers prepares everything as ever: prompts, masks, logits processors, stopping criteria. What is replaced is the
loop (`_sample`, `_beam_search`): after the prefill, which is the model's own `forward`, a step is embedding, layers,
logits, processors, choice of the token and bookkeeping, all on the device with lengths in device memory. The host
launches steps and reads whether all rows have ended one step late. On a CPU the same step runs eagerly.

What the loop cannot do (see [`unsupported`]) goes to transformers' own loop; `model.decoding` has the switches.
"""

import math
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, EncoderDecoderCache
from transformers.generation import logits_process, stopping_criteria
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput
from transformers.utils import logging

from .kernels_mqa import (
    ACTIVATIONS,
    FLOAT8,
    FLOAT8_MAX,
    MAX_HEAD_WIDTH,
    MAX_SMALL_ROWS,
    activate,
    append,
    attend,
    available,
    project,
)

logger = logging.get_logger(__name__)

ROOM = 2048  # positions beyond the prompt that are allocated at first, where more may come
AHEAD = 2  # steps that the host launches before it looks whether the first of them was the last
WIDE = 16384  # outputs from which the kernel for a few rows reads weights faster than cuBLAS does (measured, H100)
KNOWN_ARGUMENTS = {
    "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "encoder_outputs",
    "decoder_attention_mask", "decoder_position_ids", "inputs_embeds",
}  # fmt: skip


class DecodeLayer(CacheLayerMixin):
    """Keys and values of one layer in buffers that are written in place.

    Rows of `update` may be fewer than those of the buffers: each is then written to `copies` rows in sequence, or to
    the first of them only (`copy` false).
    """

    is_sliding = False

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device, copy: bool):
        super().__init__()
        rows, heads, capacity, width, value_width = shape
        self.copy = copy
        self.length = 0
        self.keys: torch.Tensor = torch.empty(rows, heads, capacity, width, dtype=dtype, device=device)
        self.values: torch.Tensor = torch.empty(rows, heads, capacity, value_width, dtype=dtype, device=device)
        scales = (rows, heads, capacity) if dtype == FLOAT8 else (0,)
        self.key_scales = torch.empty(scales, dtype=torch.float32, device=device)
        self.value_scales = torch.empty(scales, dtype=torch.float32, device=device)
        self.is_initialized = True

    def buffers(self) -> dict[str, torch.Tensor]:
        names = ("keys", "values", *(("key_scales", "value_scales") if self.keys.dtype == FLOAT8 else ()))
        return {name: getattr(self, name) for name in names}

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do: the sizes are known from the configuration."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, T = key_states.shape[0], key_states.shape[2]
        first, end = self.length, self.length + T
        if end > self.capacity:
            self.grow(max(end, 2 * self.capacity))
        if self.keys.dtype == FLOAT8:
            given = {}
            for name, states in (("key", key_states), ("value", value_states)):
                scale = states.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / FLOAT8_MAX
                given[name + "s"], given[name + "_scales"] = (states / scale).to(FLOAT8), scale.squeeze(-1)
        else:
            given = {"keys": key_states, "values": value_states}
        every = self.keys.shape[0] // rows
        for name, buffer in self.buffers().items():
            for copy in range(every if self.copy else 1):
                buffer[copy::every, :, first:end].copy_(given[name])
        self.length = end
        if first == 0:
            return key_states, value_states
        return self.read(self.keys, self.key_scales, every, key_states.dtype), self.read(
            self.values, self.value_scales, every, key_states.dtype
        )

    def read(self, states: torch.Tensor, scales: torch.Tensor, every: int, dtype: torch.dtype) -> torch.Tensor:
        """What is held of every so-manieth row, [rows, G, length, D]."""
        states = states[::every, :, : self.length]
        if states.dtype == FLOAT8:
            return (states.float() * scales[::every, :, : self.length, None]).to(dtype)
        return states

    def grow(self, capacity: int) -> None:
        for name, old in self.buffers().items():
            new = old.new_empty(*old.shape[:2], capacity, *old.shape[3:])
            new[:, :, : self.length].copy_(old[:, :, : self.length])
            setattr(self, name, new)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for name, buffer in self.buffers().items():
            setattr(self, name, buffer.index_select(0, beam_idx.to(buffer.device)))

    def reset(self) -> None:
        self.length = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class DecodeCache(Cache):
    """A cache for `generate(past_key_values=...)` that decoding extends in place, without a copy per step.

    It can be given again with a longer text, whose beginning it then holds already.

    Args:
        config: of the decoder.
        rows: rows of the batch.
        capacity: positions to allocate; more are allocated when they are needed.
        dtype, device: of the model; `torch.float8_e4m3fn` stores a scale for each key and value beside.
        cross: for the keys and values of an encoder's output.
        copy: whether a prompt that stands for several rows is written to each of them.
    """

    def __init__(
        self,
        config: Any,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
        cross: bool = False,
        copy: bool = True,
    ):
        names = ("cross_qk_head_dim", "cross_v_head_dim") if cross else ("qk_head_dim", "v_head_dim")
        heads = config.cross_num_key_value_heads if cross else config.num_key_value_heads
        layers = []
        for i in range(config.num_hidden_layers):
            width, value_width = (w[i] if isinstance(w, (list, tuple)) else w for w in map(config.__getattribute__, names))
            layers.append(DecodeLayer((rows, heads, capacity, width, value_width), dtype, torch.device(device), copy))
        super().__init__(layers=layers)

    @property
    def rows(self) -> int:
        return self.layers[0].keys.shape[0]

    @property
    def capacity(self) -> int:
        return self.layers[0].keys.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].keys.dtype

    def set_length(self, length: int) -> None:
        """Say how many positions are in use."""
        for layer in self.layers:
            layer.length = length

    def grow(self, capacity: int) -> None:
        for layer in self.layers:
            layer.grow(capacity)


@dataclass
class Decoding:
    """How a model's `generate()` decodes; `model.decoding` is one.

    Args:
        enabled: whether the fast loop is used where it can be. `False`: transformers' own loop, always.
        graphs: whether steps are captured in CUDA graphs.
        kernels: whether the Triton kernels are used where they can be.
        cache_dtype: of keys and values; `torch.float8_e4m3fn` halves the cache (with a scale per key and value, which
            costs a little quality). Default: that of the model.

    Buffers and graph are kept for the next call of the same shape; [`Decoding.release`] frees them.
    """

    enabled: bool = True
    graphs: bool = True
    kernels: bool = True
    cache_dtype: torch.dtype | None = None
    decoder: Any = field(default=None, repr=False, compare=False)

    def release(self) -> None:
        """Free the buffers and the graph of the last call."""
        self.decoder = None

    def __deepcopy__(self, memo: dict) -> "Decoding":
        return Decoding(self.enabled, self.graphs, self.kernels, self.cache_dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "decoder": None}


# ---- what the loop can do -------------------------------------------------------------------------------------------

Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (scores [B, V], tokens [B, W], cursor [1])

# Processors of the scores alone.
STATELESS = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper", "TopPLogitsWarper", "TopKLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
        "EpsilonLogitsWarper", "EtaLogitsWarper", "LogitNormalization", "InfNanRemoveLogitsProcessor",
        "SuppressTokensLogitsProcessor", "EncoderRepetitionPenaltyLogitsProcessor",
    )
)  # fmt: skip


def columns(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[V]: which columns of the scores are among `tokens`."""
    return torch.isin(torch.arange(scores.shape[-1], device=scores.device), tokens)


def written(tokens: torch.Tensor, cursor: torch.Tensor, first: int = 0) -> torch.Tensor:
    """The tokens from `first` to the cursor; columns outside repeat the last one before it, which changes nothing."""
    at = torch.arange(first, tokens.shape[1], device=tokens.device)
    return tokens[:, first:].gather(1, torch.minimum(at, cursor - 1).sub(first).clamp(min=0).expand(len(tokens), -1))


def rule_of(processor: Any) -> tuple[Any, Rule] | None:
    """A logits processor as a function that a captured step can hold, with a key of what it does; or `None`."""
    kind, p = type(processor), processor
    if kind in STATELESS:
        return as_key(p), lambda scores, tokens, cursor: p(tokens, scores)
    if kind is logits_process.RepetitionPenaltyLogitsProcessor and (
        p.prompt_ignore_length is None or isinstance(p.prompt_ignore_length, int)
    ):
        first = p.prompt_ignore_length or 0

        def penalise(scores: torch.Tensor, tokens: torch.Tensor, cursor: torch.Tensor) -> torch.Tensor:
            seen = written(tokens, cursor, first)
            score = scores.gather(1, seen)
            score = torch.where(score < 0, score * p.penalty, score / p.penalty)
            return torch.where(cursor > first, scores.scatter(1, seen, score), scores)

        return as_key(p), penalise
    if kind is logits_process.NoRepeatNGramLogitsProcessor:
        n = p.ngram_size

        def no_repeat(scores: torch.Tensor, tokens: torch.Tensor, cursor: torch.Tensor) -> torch.Tensor:
            windows = tokens.unfold(1, n, 1)
            last = (cursor - n + 1).clamp(min=0) + torch.arange(n - 1, device=tokens.device)
            same = (windows[..., :-1] == tokens.gather(1, last.expand(len(tokens), -1))[:, None]).all(-1)
            same &= torch.arange(windows.shape[1], device=tokens.device) + n <= cursor
            V = scores.shape[-1]
            banned = torch.zeros(len(scores), V + 1, dtype=torch.bool, device=scores.device)
            banned.scatter_(1, torch.where(same, windows[..., -1].clamp(max=V), V), True)
            return scores.masked_fill(banned[:, :V], -math.inf)

        return as_key(p), no_repeat
    if kind in (logits_process.SequenceBiasLogitsProcessor, logits_process.NoBadWordsLogitsProcessor):
        if any(len(sequence) > 1 for sequence in p.sequence_bias):
            return None

        def biased(scores: torch.Tensor, tokens: torch.Tensor, cursor: torch.Tensor) -> torch.Tensor:
            return scores + p.length_1_bias

        return as_key(p), biased
    if kind in (logits_process.MinLengthLogitsProcessor, logits_process.MinNewTokensLengthLogitsProcessor):
        least = p.min_length if hasattr(p, "min_length") else p.prompt_length_to_skip + p.min_new_tokens

        def prolong(scores: torch.Tensor, tokens: torch.Tensor, cursor: torch.Tensor) -> torch.Tensor:
            return scores.masked_fill((cursor < least) & columns(scores, p.eos_token_id), -math.inf)

        return as_key(p), prolong
    if kind is logits_process.SuppressTokensAtBeginLogitsProcessor:

        def suppress(scores: torch.Tensor, tokens: torch.Tensor, cursor: torch.Tensor) -> torch.Tensor:
            return scores.masked_fill((cursor == p.begin_index) & columns(scores, p.begin_suppress_tokens), -math.inf)

        return as_key(p), suppress
    if kind in (logits_process.ForcedBOSTokenLogitsProcessor, logits_process.ForcedEOSTokenLogitsProcessor):
        first_token = kind is logits_process.ForcedBOSTokenLogitsProcessor
        when = 1 if first_token else p.max_length - 1
        which = p.bos_token_id if first_token else p.eos_token_id

        def force(scores: torch.Tensor, tokens: torch.Tensor, cursor: torch.Tensor) -> torch.Tensor:
            forced = torch.where(columns(scores, torch.as_tensor(which, device=scores.device)), 0.0, -math.inf)
            return torch.where(cursor == when, forced, scores)

        return as_key(p), force
    return None


def as_key(value: Any) -> Any:
    """What tells two processors or settings apart, hashable."""
    if isinstance(value, torch.Tensor):
        return tuple(value.flatten().tolist()), value.dtype
    if isinstance(value, dict):
        return tuple(sorted((str(k), as_key(v)) for k, v in value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(map(as_key, value))
    if isinstance(value, (int, float, str, bool, type(None), torch.dtype, torch.device)):
        return value
    return type(value).__name__, as_key(vars(value))


def unsupported(
    model: Any, processors: Any, criteria: Any, config: Any, arguments: dict[str, Any], synced: bool, beams: bool
) -> str | None:
    """Why transformers' own loop has to be taken, or `None`."""
    stack = decoder_of(model).config
    if synced or config.is_assistant:
        return "synced_gpus and assisted decoding need it"
    if model.training:
        return "the model is in training mode"
    for name in ("output_attentions", "output_hidden_states", "output_scores", "output_logits"):
        if getattr(config, name):
            return f"{name} is asked for"
    if beams and config.return_dict_in_generate:
        return "beam indices are asked for"
    if not config.use_cache:
        return "use_cache is off"
    if config.cache_implementation not in (None, "dynamic"):
        return f"cache_implementation is {config.cache_implementation!r}"
    extra = [name for name, value in arguments.items() if name not in KNOWN_ARGUMENTS and value is not None]
    if extra:
        return f"the step has no place for {', '.join(extra)}"
    cache = arguments.get("past_key_values")
    if getattr(cache, "_is_user_defined", False) and not (isinstance(cache, DecodeCache) and not beams):
        return f"a {type(cache).__name__} is given"
    if (stack.rope_parameters or {}).get("rope_type") in ("dynamic", "longrope"):
        return "rotary frequencies depend on the length"
    for processor in processors:
        if rule_of(processor) is None:
            return f"{type(processor).__name__} is in use"
    known = (
        stopping_criteria.MaxLengthCriteria,
        stopping_criteria.EosTokenCriteria,
        stopping_criteria.MaxTimeCriteria,
    )
    for criterion in criteria:
        if type(criterion) not in known:
            return f"{type(criterion).__name__} is in use"
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        return "the model is spread over several devices"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "modules have hooks"
    several = model.config.is_encoder_decoder
    for name, fits in (
        ("attention_mask", contiguous if several else left_padded),
        ("decoder_attention_mask", left_padded),
    ):
        mask = arguments.get(name)
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2 and fits(mask)):
            return f"{name} is not that of padding" + (" on the left" if fits is left_padded else "")
    return None


def contiguous(mask: torch.Tensor) -> bool:
    """Whether the ones of each row [B, S] are one run."""
    padded = nn.functional.pad(mask.bool().int(), (1, 1))
    return bool(((padded.diff(dim=1) == 1).sum(1) == 1).all())


def left_padded(mask: torch.Tensor) -> bool:
    """Whether the ones of each row [B, T] are one run that reaches the end."""
    return bool(mask[:, -1].all()) and contiguous(mask)


def decoder_of(model: Any) -> Any:
    """The stack of layers that writes."""
    return model.model.decoder if model.config.is_encoder_decoder else model.model


# ---- one step -------------------------------------------------------------------------------------------------------


def fused(parameters: list[Any], sizes: list[int]) -> torch.Tensor | None:
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
    width = one[0].numel()
    offsets = [sum(sizes[:i]) * width for i in range(len(sizes))]
    storage = one.untyped_storage()
    joined = storage.nbytes() == total * width * one.element_size() and all(
        p is None or (p.untyped_storage().data_ptr() == storage.data_ptr() and p.storage_offset() == offset)
        for p, offset in zip(parameters, offsets)
    )
    if joined:
        return one.data.as_strided((total, *one.shape[1:]), one.stride(), 0)
    whole = one.data.new_zeros(total, *one.shape[1:])
    for p, part in zip(parameters, whole.split(sizes)):
        if p is not None:
            part.copy_(p.data)
            p.data = part
    return whole


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
            self.slopes = torch.tensor(self.config.alibi_slopes, dtype=torch.float32, device=self.device)
        self.plans: dict[int, tuple[torch.Tensor, torch.Tensor | None] | None] = {}
        self.masks: dict[Any, Any] = {}

    def prepare(self, reach: int) -> None:
        """Tables for positions below `reach`, and joined weights; called before the first step of each text."""
        self.plans = {}
        if self.stack.rotary_emb is not None and (self.cos is None or len(self.cos) < reach):
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
        """Joined weight [ΣN, K] and bias [ΣN] of plain projections; `None` where one is something else (LoRA, int8)."""
        key = id(modules[0])
        if key not in self.plans:
            plain = all(type(m) is nn.Linear and not m._forward_hooks and not m._forward_pre_hooks for m in modules)
            plain = plain and len({(m.weight.dtype, m.weight.device) for m in modules}) == 1
            sizes = [m.out_features for m in modules] if plain else []
            self.plans[key] = None
            if plain:
                weight = fused([m.weight for m in modules], sizes)
                assert weight is not None
                self.plans[key] = weight, fused([m.bias for m in modules], sizes)
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
        """act(norm(x) · Wᵀ + b) + residual, W the joined weights of `modules`; `gated`: the first one times the second.

        Args:
            x: [B, K].
            activation: a module; `residual`: [B, N].
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
        if fits and len(x) == 1 and known:
            options: dict[str, Any] = {}
            if norm is not None:
                rms = isinstance(norm, nn.RMSNorm)
                options = {"norm": "rms_norm" if rms else "layer_norm", "norm_weight": norm.weight, "eps": norm.eps}
                options["norm_bias"] = None if rms else norm.bias
            return project(x, weight, bias, activation=name, gated=gated, residual=residual, **options)
        y = x if norm is None else norm(x)
        if fits and len(x) <= MAX_SMALL_ROWS and len(weight) >= WIDE and x.element_size() == 2:
            return project(y, weight, bias, activation=name, gated=gated, residual=residual)
        if residual is not None and bias is None:
            return torch.addmm(residual, y, weight.t())
        out = nn.functional.linear(y, weight, bias)
        if activation is not None and fits:
            out = activate(out, name, gated)  # type: ignore[arg-type]
        elif activation is not None:
            first, *second = out.chunk(2, -1) if gated else (out,)
            out = activation(first) * second[0] if gated else activation(first)
        return out if residual is None else residual + out

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B] the newest tokens -> [B, V] logits in float32; their keys and values are written to the cache."""
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
        if stack.project_out is None:
            logits = self.linear(x, (self.model.lm_head,), norm=stack.norm)
        else:
            logits = self.linear(stack.leave(x), (self.model.lm_head,))
        if config.logit_scale != 1.0:
            logits = logits * config.logit_scale
        return logits.float()

    def layer(self, layer: Any, x: torch.Tensor, i: int) -> torch.Tensor:
        kind, attention = layer.residual, layer.self_attn
        post = kind == "post_norm"
        first = None if post else layer.input_layernorm
        joined = self.linear(x, (attention.q_proj, attention.k_proj, attention.v_proj), norm=first)
        attended = self.self_attention(attention, joined, i)
        before = x
        x = self.linear(attended, (attention.o_proj,), residual=x)
        if kind in ("sequential", "post_norm"):
            if post:
                x = layer.input_layernorm(x)
            if self.cross is not None:
                cross = layer.cross_attn
                query = self.linear(x, (cross.q_proj,), norm=None if post else layer.cross_attn_layernorm)
                x = self.linear(self.cross_attention(cross, query, i), (cross.o_proj,), residual=x)
                x = layer.cross_attn_layernorm(x) if post else x
            inner = self.inner(layer.mlp, x, None if post else layer.post_attention_layernorm)
        else:
            inner = self.inner(layer.mlp, before, first if kind == "parallel_shared_norm" else layer.post_attention_layernorm)
        x = self.linear(inner, (layer.mlp.down_proj,), residual=x)
        return layer.post_attention_layernorm(x) if post else x

    def inner(self, mlp: Any, x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        gated = mlp.gate_proj is not None
        modules = (mlp.gate_proj, mlp.up_proj) if gated else (mlp.up_proj,)
        return self.linear(x, modules, norm=norm, activation=mlp.act_fn, gated=gated)

    def self_attention(self, attention: Any, joined: torch.Tensor, i: int) -> torch.Tensor:
        """[B, H·D + G·D + G·Dv] -> [B, H·Dv]."""
        held = self.cache.layers[i]
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
                bfloat16_from_start=bfloat16_from_start, table=table, **scales,
            )  # fmt: skip
            return out.flatten(1)
        q, k, v = joined.split([H * D, G * D, joined.shape[1] - (H + G) * D], -1)
        query, key, value = (part.view(len(part), -1, 1, width) for part, width in ((q, D), (k, D), (v, attention.v_head_dim)))
        if attention.rotary:
            query, key = attention.rotate(query, *self.masks["angles"]), attention.rotate(key, *self.masks["angles"])
        for name, new in (("key", key), ("value", value)):
            if scales:
                scale = new.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / FLOAT8_MAX
                self.write(scales[name + "_scales"], scale.squeeze(-1))
                new = (new / scale).to(FLOAT8)
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
            states = (states.float() * scales[:, :, :span, None]).to(self.dtype)
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
            bias = ((self.slopes / scale).bfloat16()[:, None] * place[:, None]).float()[:, :, None] * scale
        if bias is not None:
            bias = bias.to(dtype)
            mask = bias if mask is None else torch.where(mask, bias, torch.finfo(dtype).min)
        self.masks[key] = mask
        return mask

    def cross_attention(self, attention: Any, query: torch.Tensor, i: int) -> torch.Tensor:
        """[B, H·D] -> [B, H·Dv], the rows of a prompt reading the keys and values of its source together."""
        assert self.cross is not None and self.source_length is not None
        held = self.cross.layers[i]
        query = query.view(len(query), -1, attention.qk_head_dim)
        if self.triton:
            out = attend(
                query, held.keys, held.values, self.source_length, attention.scaling, capacity=held.capacity,
                start=self.source_start, fold=self.copies,
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


# ---- the loop -------------------------------------------------------------------------------------------------------


class Decoder:
    """Buffers, step and graph of one shape of call: `rows` rows, `copies` of them for each prompt.

    Args:
        settings: hashable; a decoder serves another call only where they are equal.
        rules: logits processors, of [`rule_of`].
        eos: token ids that end a row, or `None`; `pad` is written after them.
        beams: the generation configuration, for beam search.
    """

    def __init__(
        self,
        model: Any,
        settings: Any,
        rows: int,
        copies: int,
        width: int,
        rules: list[Rule],
        eos: torch.Tensor | None,
        pad: torch.Tensor | None,
        sample: bool,
        beams: Any = None,
    ):
        options = model.decoding
        device = model.lm_head.weight.device
        self.settings, self.rules, self.sample, self.eos, self.pad = settings, rules, sample, eos, pad
        self.copies = copies
        self.owned = True  # whether the cache is nobody else's
        self.on_device = device.type == "cuda"
        graph = options.graphs and self.on_device
        self.step = Step(model, rows, copies, graph, options.kernels)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captures, self.warm = graph, False
        self.tokens = torch.zeros(rows, width, dtype=torch.long, device=device)
        self.token = torch.zeros(rows, dtype=torch.long, device=device)
        self.cursor = torch.zeros(1, dtype=torch.long, device=device)
        self.unfinished = torch.ones(rows, dtype=torch.bool, device=device)
        self.ended = torch.zeros(1, dtype=torch.long, device=device)  # the cursor at which all rows had ended, or 0
        self.host_ended = torch.zeros(1, dtype=torch.long, pin_memory=True) if self.on_device else self.ended
        self.beams = beams
        if beams is not None:
            P, k = rows // copies, copies
            self.limit = torch.zeros(1, dtype=torch.long, device=device)
            self.prompt = torch.zeros(1, dtype=torch.long, device=device)
            self.scores = torch.zeros(P, k, device=device)
            self.done_tokens = torch.zeros(P, k, width, dtype=torch.long, device=device)
            self.done_scores = torch.zeros(P, k, device=device)
            self.done_lengths = torch.zeros(P, k, dtype=torch.long, device=device)
            self.done = torch.zeros(P, k, dtype=torch.bool, device=device)
            self.open = torch.ones(P, 1, dtype=torch.bool, device=device)
            self.penalties = torch.ones(0, device=device)
            self.own = torch.arange(rows, dtype=torch.int32, device=device)

    def start(self, prompt: torch.Tensor, fill: int, limit: int) -> None:
        """Begin a text: prompt [B, T] of at most `limit` tokens in the end; columns after it hold `fill`."""
        T = prompt.shape[1]
        self.tokens.fill_(fill)
        self.tokens[:, :T] = prompt
        self.cursor.fill_(T)
        self.unfinished.fill_(True)
        self.ended.zero_()
        self.host_ended.zero_()
        if self.beams is not None:
            self.limit.fill_(limit)
            self.prompt.fill_(T)
            self.scores.fill_(-1e9)[:, 0] = 0  # all beams are the same at first: only one of them counts
            self.done_tokens.copy_(self.tokens.view_as(self.done_tokens))
            self.done_scores.fill_(-1e9)
            self.done_lengths.fill_(T)
            self.done.fill_(False)
            self.open.fill_(True)
            powers = [1.0] + [float(n) ** self.beams.length_penalty for n in range(1, self.tokens.shape[1] + 1)]
            self.penalties = torch.tensor(powers, device=self.scores.device)
            self.longest = float(max(limit - T, 1)) ** self.beams.length_penalty
            self.graph = None  # it holds those two

    def advance(self) -> None:
        """Launch one step: the first one as it is, which warms everything up, later ones by replaying a graph."""
        self.step.host_length += 1
        if not self.captures or not self.warm:
            self.warm = True
            return self.run()
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self.run()
            except RuntimeError as error:
                torch.cuda.synchronize()
                logger.warning_once(f"decoding runs without a CUDA graph, which could not be captured: {error}")
                self.captures = False
                return self.run()
            self.graph = graph
        self.graph.replay()

    def run(self) -> None:
        self.choose(self.step.forward(self.token))

    def choose(self, logits: torch.Tensor) -> None:
        """[B, V] logits -> the next token of each row, with all that follows from it."""
        if self.beams is None:
            self.choose_token(logits)
        else:
            self.choose_beams(logits)
        if self.on_device:
            self.host_ended.copy_(self.ended, non_blocking=True)

    def choose_token(self, logits: torch.Tensor) -> None:
        for rule in self.rules:
            logits = rule(logits, self.tokens, self.cursor)
        token = draw(logits).argmax(-1) if self.sample else logits.argmax(-1)
        if self.eos is not None:
            token = torch.where(self.unfinished, token, self.pad)  # type: ignore[arg-type]
            self.unfinished &= ~torch.isin(token, self.eos)
        self.token.copy_(token)
        self.tokens.index_copy_(1, self.cursor, token[:, None])
        self.cursor += 1
        if self.eos is not None:
            self.end(~self.unfinished.any())

    def end(self, now: torch.Tensor) -> None:
        """Remember where the text ended, the first time that `now` [] holds."""
        self.ended.copy_(torch.where((self.ended == 0) & now, self.cursor, self.ended))

    def choose_beams(self, logits: torch.Tensor) -> None:
        """One step of beam search with the arithmetic of transformers' `_beam_search`, and no shape that changes."""
        P, k = self.scores.shape
        V = logits.shape[-1]
        early = self.beams.early_stopping
        logs = logits.log_softmax(-1)
        for rule in self.rules:
            logs = rule(logs, self.tokens, self.cursor)
        logs = (logs.view(P, k, V) + self.scores[:, :, None]).view(P, -1)
        n = max(2, 1 + (0 if self.eos is None else len(self.eos))) * k
        if self.sample:
            chosen = draw(logs).topk(n).indices
            top = logs.gather(1, chosen)
        else:
            top, chosen = logs.topk(n)
        parents, tokens = chosen // V, chosen % V
        hits = (self.cursor + 1 >= self.limit).expand_as(tokens)
        if self.eos is not None:
            hits = hits | torch.isin(tokens, self.eos)

        running = top + hits.float() * -1.0e9
        kept = running.topk(k).indices
        just = hits & (torch.arange(n, device=hits.device) < k)
        final = top / self.penalties[self.cursor + 1 - self.prompt]
        if early is True:
            final += self.done.all(-1, keepdim=True).float() * -1.0e9
        final += (~self.open).float() * -1.0e9
        final += (~just).float() * -1.0e9

        # The best of what had ended before and what ends now, until the search is over.
        merged = torch.cat((self.done_scores, final), 1)
        best = merged.topk(k).indices
        old, new = best.clamp(max=k - 1), (best - k).clamp(min=0)
        was, over = best < k, self.ended != 0
        hypotheses = self.tokens.view(P, k, -1)
        fresh = taken(hypotheses, parents.gather(1, new))
        fresh.index_copy_(2, self.cursor, tokens.gather(1, new)[..., None])
        fresh = torch.where(was[..., None], taken(self.done_tokens, old), fresh)
        self.done_tokens.copy_(torch.where(over, self.done_tokens, fresh))
        lengths = torch.where(was, self.done_lengths.gather(1, old), self.cursor + 1)
        self.done_lengths.copy_(torch.where(over, self.done_lengths, lengths))
        self.done_scores.copy_(torch.where(over, self.done_scores, merged.gather(1, best)))
        self.done.copy_(torch.where(over, self.done, torch.cat((self.done, just), 1).gather(1, best)))

        parents, tokens = parents.gather(1, kept), tokens.gather(1, kept)
        self.scores.copy_(running.gather(1, kept))
        hypotheses.copy_(taken(hypotheses, parents).index_copy_(2, self.cursor, tokens[..., None]))
        self.token.copy_(tokens.view(-1))
        rows = self.step.rows
        assert rows is not None
        rows.view(P, k, -1).copy_(taken(rows.view(P, k, -1), parents))
        rows.index_copy_(1, self.step.length.long().clamp(max=rows.shape[1] - 1), self.own[:, None])
        self.cursor += 1

        never = early == "never" and self.beams.length_penalty > 0.0
        possible = self.scores[:, :1] / (self.longest if never else self.penalties[self.cursor - self.prompt])
        worst = torch.where(self.done, self.done_scores.min(1, keepdim=True).values, -1.0e9)
        self.open &= (possible > worst).any(-1, keepdim=True)
        going = self.open.any() & ~hits.all()
        if early is True:
            going &= ~self.done.all()
        self.end(~going)

    def grow(self, capacity: int) -> None:
        """Make room for more positions; the graph is captured anew."""
        self.graph = None
        self.step.cache.grow(capacity)
        self.step.prepare(capacity + 1)
        more = capacity + 1 - self.tokens.shape[1]
        self.tokens = nn.functional.pad(self.tokens, (0, more))
        if self.beams is not None:
            self.done_tokens = nn.functional.pad(self.done_tokens, (0, more))
            self.step.rows = nn.functional.pad(self.step.rows, (0, more))  # type: ignore[arg-type]
            extra = [float(n) ** self.beams.length_penalty for n in range(len(self.penalties), self.tokens.shape[1] + 1)]
            self.penalties = torch.cat((self.penalties, self.penalties.new_tensor(extra)))


def draw(scores: torch.Tensor) -> torch.Tensor:
    """Whose largest entries are a sample without replacement from softmax(scores); the draws of `torch.multinomial`."""
    probabilities = scores.softmax(-1)
    return probabilities / torch.empty_like(probabilities).exponential_()


def taken(beams: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[P, k, W] and [P, n] -> [P, n, W]."""
    return beams.gather(1, index[..., None].expand(-1, -1, beams.shape[-1]))


def decode(
    model: Any,
    input_ids: torch.Tensor,
    processors: Any,
    criteria: Any,
    config: Any,
    streamer: Any,
    arguments: dict[str, Any],
    beams: bool,
) -> Any:
    """What `_sample` and `_beam_search` are to return, of a call that [`unsupported`] has nothing against."""
    stack, options = decoder_of(model), model.decoding
    copies = max(config.num_beams, config.num_return_sequences)
    B, T = input_ids.shape
    device = model.lm_head.weight.device
    given = arguments.get("past_key_values")
    given = given if isinstance(given, DecodeCache) else None
    input_ids = input_ids.to(device)
    arguments = {name: every(value, copies) for name, value in arguments.items() if value is not None}
    embedded = arguments.get("inputs_embeds")
    prompt = embedded.shape[1] if embedded is not None and not model.config.is_encoder_decoder else T
    prompt = max(prompt, given.get_seq_length() + 1 if given is not None else 0)
    limit = config.max_length
    reach = prompt + limit - T  # positions that may be needed
    capacity = -(-min(reach, prompt + ROOM) // 64) * 64

    rules = [rule for _, rule in map(rule_of, processors)]  # type: ignore[misc]
    eos = next((c.eos_token_id for c in criteria if hasattr(c, "eos_token_id")), None)
    clock = next((c for c in criteria if hasattr(c, "max_time")), None)
    fill = config._pad_token_tensor
    if beams:
        fill = config._pad_token_tensor or eos[0] if eos is not None else -1
    eos = None if eos is None else eos.to(device)
    pad = None if config._pad_token_tensor is None else config._pad_token_tensor.to(device)
    cache_type = options.cache_dtype or model.lm_head.weight.dtype
    source = arguments["encoder_outputs"][0].shape[1] if model.config.is_encoder_decoder else 0
    room = -(-source // 64) * 64
    settings = (
        B, copies, config.do_sample, as_key(eos), as_key(pad), tuple(key for key, _ in map(rule_of, processors)),  # type: ignore[misc]
        (beams, config.early_stopping, config.length_penalty), room, cache_type, options.graphs, options.kernels,
        tuple(parameter.data_ptr() for parameter in model.parameters()),
    )  # fmt: skip

    decoder = options.decoder
    if decoder is not None and decoder.settings != settings:
        decoder = options.decoder = None
    if decoder is not None and (
        decoder.step.cache is not given if given is not None
        else not decoder.owned or not capacity <= decoder.step.cache.capacity <= 2 * capacity + ROOM
    ):  # fmt: skip
        decoder = options.decoder = None
    if decoder is None:
        cache = given
        if cache is None:
            cache = DecodeCache(stack.config, B, capacity, cache_type, device, copy=not beams)
        decoder = Decoder(
            model, settings, B, copies, cache.capacity + 1, rules, eos, pad, config.do_sample,
            config if beams else None,
        )  # fmt: skip
        decoder.owned = given is None
        decoder.step.cache = cache
        if model.config.is_encoder_decoder:
            cross_type = model.lm_head.weight.dtype
            decoder.step.cross = DecodeCache(stack.config, B // copies, room, cross_type, device, cross=True)
    step, cache = decoder.step, decoder.step.cache
    if given is None:
        cache.set_length(0)
    if step.cross is not None:
        step.cross.set_length(0)
        arguments["past_key_values"] = EncoderDecoderCache(cache, step.cross)
    else:
        arguments["past_key_values"] = cache
    options.decoder = None  # what is interrupted is not used again
    decoder.start(input_ids, int(fill) if fill is not None else 0, limit)

    outputs = model._prefill(input_ids[::copies], config, arguments)
    logits = outputs.logits[:, -1].float().repeat_interleave(copies, 0)
    del outputs
    held = cache.get_seq_length()
    place(model, step, arguments, held, copies)
    if beams:
        step.rows = decoder.own[:, None].div(copies, rounding_mode="floor").mul(copies).repeat(1, cache.capacity)
    if cache.capacity + 1 > decoder.tokens.shape[1]:
        decoder.grow(cache.capacity)
    step.prepare(int(step.positions.max()) + cache.capacity + 1 - held)
    decoder.choose(logits)

    new, last = 1, limit - T
    pending: deque[tuple[Any, torch.Tensor | None]] = deque()
    slots = deque(torch.zeros(B, dtype=torch.long, pin_memory=decoder.on_device) for _ in range(AHEAD + 2))

    def settle(most: int) -> None:
        """Wait until at most so many steps are under way; stream what is done."""
        while len(pending) > most:
            event, token = pending.popleft()
            if event is not None:
                event.synchronize()
            if token is not None and not (decoder.host_ended and sent[0] >= int(decoder.host_ended) - T):
                streamer.put(token.clone())
                sent[0] += 1

    sent = [0]

    def follow() -> None:
        token = None
        if streamer is not None:
            token = slots[0]
            slots.rotate()
            token.copy_(decoder.token, non_blocking=True)
        event = torch.cuda.Event() if decoder.on_device else None
        if event is not None:
            event.record()
        pending.append((event, token))

    follow()
    late = False
    while new < last and not late:
        settle(AHEAD if decoder.on_device else 0)
        if decoder.host_ended:
            break
        if clock is not None and time.time() - clock.initial_timestamp > clock.max_time:
            late = True
            if not beams:
                break
            decoder.limit.zero_()  # the last step: all beams end with it
        if step.host_length + 1 > cache.capacity:
            decoder.grow(-(-min(2 * cache.capacity, held + last) // 64) * 64)
        decoder.advance()
        follow()
        new += 1
    settle(0)
    if streamer is not None:
        streamer.end()
    if decoder.host_ended:
        new = int(decoder.host_ended) - T
    cache.set_length(held + new - 1)
    options.decoder = decoder
    if beams:
        found = config.num_return_sequences
        end = int(decoder.done_lengths[:, :found].max())
        return decoder.done_tokens[:, :found, :end].flatten(0, 1)
    sequences = decoder.tokens[:, : T + new].clone()
    if not config.return_dict_in_generate:
        return sequences
    kept: Any = given if given is not None else plain_cache(cache, stack.config)
    if step.cross is None:
        return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=kept)
    kept = EncoderDecoderCache(kept, plain_cache(step.cross, None))
    return GenerateEncoderDecoderOutput(sequences=sequences, past_key_values=kept)


def every(value: Any, copies: int) -> Any:
    """Of an argument that was repeated for each of `copies` rows, one."""
    if copies == 1:
        return value
    if isinstance(value, torch.Tensor):
        return value[::copies] if value.ndim and len(value) > 1 else value
    if hasattr(value, "last_hidden_state"):
        return type(value)(last_hidden_state=value.last_hidden_state[::copies])
    return value


def place(model: Any, step: Step, arguments: dict[str, Any], held: int, copies: int) -> None:
    """Tell the step where the rows stand after the prefill."""
    several = model.config.is_encoder_decoder
    mask = arguments.get("decoder_attention_mask" if several else "attention_mask")
    positions = arguments.get("decoder_position_ids" if several else "position_ids")
    step.host_length = held
    step.length.fill_(held)
    step.start.zero_()
    step.padded = False
    if mask is not None:
        first = mask.long().argmax(1).to(step.start.device)
        step.padded = bool(first.any())
        step.start.copy_(first.repeat_interleave(copies))
    if positions is not None:
        after = positions[:, -1].to(step.positions.device) + 1
        step.positions.copy_(after.repeat_interleave(copies) if len(after) > 1 else after.expand_as(step.positions))
    elif mask is not None and step.config.positions_from_mask:
        step.positions.copy_((held - step.start).long())
    else:
        step.positions.fill_(held)
    if step.cross is not None:
        S, P = step.cross.get_seq_length(), step.cross.rows
        seen = None if model.config.num_mel_bins else arguments.get("attention_mask")
        if step.source_start is None:
            step.source_start = torch.zeros(P, dtype=torch.int32, device=step.device)
            step.source_length = torch.zeros(P, dtype=torch.int32, device=step.device)
        assert step.source_length is not None
        first = torch.zeros(P, dtype=torch.long) if seen is None else seen.long().argmax(1)
        step.source_start.copy_(first)
        step.source_length.copy_(first + S if seen is None else first + seen.sum(1))


def plain_cache(cache: DecodeCache, config: Any) -> DynamicCache:
    """The same keys and values as transformers keeps them."""
    plain = DynamicCache(config=config) if config is not None else DynamicCache()
    for i, layer in enumerate(cache.layers):
        type_ = torch.get_default_dtype() if layer.keys.dtype == FLOAT8 else layer.keys.dtype
        read = (layer.read(layer.keys, layer.key_scales, 1, type_), layer.read(layer.values, layer.value_scales, 1, type_))
        plain.update(*(states.clone() for states in read), i)
    return plain


class FastDecoding:
    """`generate()` with the loop of this file where it can be used; a base before `GenerationMixin`."""

    decoding: Decoding

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **arguments: Any,
    ) -> Any:
        if self._decodes_fast(logits_processor, stopping_criteria, generation_config, arguments, synced_gpus, False):
            return decode(
                self, input_ids, logits_processor, stopping_criteria, generation_config, streamer, arguments, False
            )
        return super()._sample(  # type: ignore[misc]
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **arguments
        )

    def _beam_search(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        **arguments: Any,
    ) -> Any:
        if self._decodes_fast(logits_processor, stopping_criteria, generation_config, arguments, synced_gpus, True):
            return decode(self, input_ids, logits_processor, stopping_criteria, generation_config, None, arguments, True)
        return super()._beam_search(  # type: ignore[misc]
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, **arguments
        )

    def _decodes_fast(
        self, processors: Any, criteria: Any, config: Any, arguments: dict[str, Any], synced: bool, beams: bool
    ) -> bool:
        if not self.decoding.enabled:
            return False
        reason = unsupported(self, processors, criteria, config, arguments, synced, beams)
        if reason is not None:
            logger.warning_once(f"generate() decodes with transformers' own, slower loop: {reason}.")
        return reason is None
