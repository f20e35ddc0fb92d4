"""Fitting a model's shared heads layer by layer, on the hidden states of calibration tokens.

The walk over the checkpoint brings one canonical layer at a time. Here the calibration tokens stand at that layer's
input, as the *converted* layers below left them. The layer with all its heads is the teacher: it shows what each
attention sees (moments for `fitting.py`) and what it should give (the target of the refitted output projection). Then
the tokens pass the converted layer. No class of the source is needed; one layer and the states are all that is held.

    B sequences, T tokens of each, S tokens attended to, H query heads, G old and K new key/value heads, d hidden size,
    J rotary frequencies
"""

import copy
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mqa_hf.attention_mqa import ATTENTION_NAME, eager_attention_forward
from mqa_hf.base.errors import ConversionError
from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig
from mqa_hf.modeling_mqa import MQAAttention, MQADecoderLayer, MQAModel, project

from . import fitting
from .pooling import CanonicalConfig, heads_of, pool_layer
from .widths import Curves, rotated_pairs

Tensors = dict[str, torch.Tensor]
ENOUGH = 4  # calibration tokens for each dimension of the hidden states; below, moments are mostly noise
MAPPED_ABOVE = 8 * 2**30  # bytes of hidden states that are kept in memory; more lie in a mapped file


@dataclass(frozen=True)
class FitOptions:
    """How heads are fitted.

    Attributes:
        method: "shared", or one of those that look at no data, whose output projection is then refitted.
        refit: whether the output projection is refitted.
        queries: positions of each sequence at which attention is looked at.
        batch: sequences that pass a layer at once.
        held_out: the last sequences, which nothing is fitted on; the report is about them.
        device: where layers run.
        seed: of the choice of those positions.
        scratch: directory for hidden states that memory should not hold.
    """

    method: str = "shared"
    refit: bool = True
    queries: int = 64
    batch: int = 8
    held_out: int = 8
    device: str = "cpu"
    seed: int = 0
    scratch: Path | None = None


@dataclass(frozen=True)
class Examples:
    """Token ids [N, T]; `valid` [N, T] is false for padding, which stands on the right (`None`: there is none).

    For an encoder-decoder model they are the decoder's input, and `source`, `source_valid` [N, S] the encoder's.
    """

    tokens: torch.Tensor
    valid: torch.Tensor | None = None
    source: torch.Tensor | None = None
    source_valid: torch.Tensor | None = None


@dataclass
class Seen:
    """What one attention sees of the calibration tokens; the notation is that of `fitting.py`.

    Attributes:
        queries, keys: E[x x'] [d + 1, d + 1] of the inputs of queries and of keys.
        mixed: E[x̄ x̄'] [K, d, d] of the attention-averaged inputs, for the query heads of each new head.
        spread, energy: [K, J, m, m] for the m old heads of each new one, and [G, J]; `None` where nothing is rotated.
        tokens: how many were looked at.
        rank: directions of the keys' inputs that the tokens span.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mixed: torch.Tensor
    spread: torch.Tensor | None
    energy: torch.Tensor | None
    tokens: int
    rank: int


@dataclass
class Fit:
    """A fitted attention: its tensors by name, the frequencies of its rotated pairs, and what was left out."""

    tensors: Tensors
    frequencies: list[int]
    discarded_key_energy: float
    discarded_value_energy: float


@dataclass
class Stack:
    """The calibration tokens on their way through one stack of layers."""

    prefix: str  # of its tensors' canonical names
    config: MQAConfig
    pooled: MQAConfig
    tokens: torch.Tensor
    valid: torch.Tensor | None
    shell: MQAModel
    states: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [N, T, d] of the student
    original: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # of the teacher, held-out rows only
    memory: "Stack | None" = None  # the encoder of a decoder
    angles: tuple[torch.Tensor, torch.Tensor] | None = None
    first: MQADecoderLayer | None = None  # whose relative bias all layers share


def layer_config(config: MQAConfig) -> MQAConfig:
    config = copy.deepcopy(config)
    config._attn_implementation = ATTENTION_NAME
    return config


def old_heads(attention: MQAAttention) -> int:
    return attention.k_proj.out_features // attention.qk_head_dim


class Calibration:
    """The calibration tokens on their way through the model.

    Args:
        config: canonical, with all the source's heads.
        pooled: with the heads and widths that are asked for. Where its `rope_frequencies` are set, they are chosen
            here, layer by layer.
        examples: calibration tokens.
        attentions: those that get fewer heads; keys of `heads_of`.
        options: see [`FitOptions`].
    """

    def __init__(
        self,
        config: CanonicalConfig,
        pooled: CanonicalConfig,
        examples: Examples,
        attentions: Sequence[str],
        options: FitOptions,
    ):
        self.options, self.attentions = options, attentions
        self.heads = heads_of(pooled)
        self.device = torch.device(options.device)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.stacks: dict[str, Stack] = {}
        if isinstance(config, MQASeq2SeqConfig):
            assert isinstance(pooled, MQASeq2SeqConfig)
            assert examples.source is not None
            encoder = self.stack(
                "model.encoder.", config.encoder, pooled.encoder, examples.source, examples.source_valid
            )
            self.stacks["encoder"] = encoder
            decoder = self.stack("model.decoder.", config.decoder, pooled.decoder, examples.tokens, examples.valid)
            self.stacks["decoder"] = decoder
            decoder.memory = encoder
            if config.share_embeddings:
                encoder.shell.embed_tokens = decoder.shell.embed_tokens
        else:
            assert isinstance(pooled, MQAConfig)
            self.stacks[""] = self.stack("model.", config, pooled, examples.tokens, examples.valid)
        self.last = list(self.stacks.values())[-1]
        last = self.last.config
        self.head = nn.Linear(last.embedding_size, last.vocab_size, bias=last.lm_head_bias).to(self.device)
        if config.tie_word_embeddings and self.last.shell.embed_tokens is not None:
            self.head.weight = self.last.shell.embed_tokens.weight
        self.fitted_rows = len(examples.tokens) - options.held_out
        self.notes: dict[str, list[str]] = {}  # what to warn of: where it was seen

    def stack(
        self, prefix: str, config: MQAConfig, pooled: MQAConfig, tokens: torch.Tensor, valid: torch.Tensor | None
    ) -> Stack:
        empty: dict[str, Any] = {"num_hidden_layers": 0, "layer_types": [], "rope_layers": []}
        shell = MQAModel(MQAConfig(**{**config.to_dict(), **empty})).float().eval().to(self.device)
        # The shell makes masks and positions for every layer; explicit ones, of which rows can be taken.
        shell.config = copy.deepcopy(config)
        shell.config._attn_implementation = "eager"
        return Stack(prefix, layer_config(config), layer_config(pooled), tokens, valid, shell)

    # -- what stands outside the layers ---------------------------------------------------------------------------

    def take(self, tensors: Tensors) -> None:
        """Keep those tensors outside the layers that the tokens pass: embeddings, final norms, head."""
        own = {f"lm_head.{name}": p for name, p in self.head.named_parameters()}
        for stack in self.stacks.values():
            own |= {f"{stack.prefix}{name}": p for name, p in stack.shell.named_parameters()}
        for name, tensor in tensors.items():
            if name in own:
                own[name].data.copy_(tensor)

    def room(self, *shape: int) -> torch.Tensor:
        """An empty float32 tensor, in a mapped file where it is large."""
        count = torch.Size(shape).numel()
        if 4 * count <= MAPPED_ABOVE or self.options.scratch is None:
            return torch.empty(shape)
        free = shutil.disk_usage(self.options.scratch).free
        if free < 4 * count:
            raise ConversionError(
                f"the hidden states of the calibration tokens take {4 * count:,} bytes at {self.options.scratch}, "
                f"where {free:,} are free; lower `calibration_tokens`"
            )
        # Once it is mapped, it needs no name.
        with tempfile.NamedTemporaryFile(dir=self.options.scratch, prefix=".states-") as file:
            return torch.from_file(file.name, shared=True, size=count).view(shape)

    @torch.no_grad()
    def start(self, stack: Stack) -> None:
        """Embed a stack's tokens; what its layers share are positions."""
        N, T = stack.tokens.shape
        position_ids = torch.arange(T, device=self.device)[None]
        embed = stack.shell.embed_tokens
        assert embed is not None
        stack.states = self.room(N, T, stack.config.hidden_size)
        for rows in self.rows(0, N):
            stack.states[rows] = stack.shell.enter(embed(stack.tokens[rows].to(self.device)), position_ids).cpu()
        stack.original = stack.states[-self.options.held_out :].clone()
        x = stack.states[:1].to(self.device)
        stack.angles = None if stack.shell.rotary_emb is None else stack.shell.rotary_emb(x, position_ids)
        if stack.memory is not None:  # the encoder has ended
            encoder = stack.memory
            for states in (encoder.states, encoder.original):
                for rows in self.rows(0, len(states)):
                    states[rows] = encoder.shell.leave(states[rows].to(self.device)).cpu()

    def rows(self, start: int, stop: int) -> Iterator[slice]:
        for i in range(start, stop, self.options.batch):
            yield slice(i, min(i + self.options.batch, stop))

    def batches(self, stack: Stack, held_out: bool = False) -> Iterator[slice]:
        bounds = (self.fitted_rows, len(stack.tokens)) if held_out else (0, self.fitted_rows)
        return self.rows(*bounds)

    def valid(self, stack: Stack, rows: slice) -> torch.Tensor:
        """[B, T]: which tokens are no padding."""
        if stack.valid is None:
            return torch.ones(stack.tokens[rows].shape, dtype=torch.bool, device=self.device)
        return stack.valid[rows].to(self.device)

    def masks(self, stack: Stack, layer: MQADecoderLayer, rows: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The additive masks [B or 1, H or 1, T, S] of a layer's self- and cross-attention for some sequences."""
        x = torch.empty((*stack.tokens[rows].shape, 1), device=self.device)
        known = None if stack.valid is None else self.valid(stack, rows)
        position_ids = torch.arange(x.shape[1], device=self.device)[None]
        ready = stack.shell.make_masks(x, known, position_ids, None)
        T = x.shape[1]  # an encoder without padding needs no mask; here each has one
        ready = {name: torch.zeros(1, 1, T, T, device=self.device) if m is None else m for name, m in ready.items()}
        biased = stack.shell.position_bias(ready, known, x, None)
        kind = stack.config.layer_types[layer.self_attn.layer_idx]
        if stack.first is not None:
            biased(stack.first, kind)
        own, cross = biased(layer, kind), None
        if stack.memory is not None:
            source = self.valid(stack.memory, rows)
            cross = torch.zeros(source.shape, device=self.device).masked_fill(~source, torch.finfo(torch.float).min)
            cross = cross[:, None, None]
        return own, cross

    # -- one layer ------------------------------------------------------------------------------------------------

    def sites(self, stack_name: str) -> list[tuple[str, str]]:
        """The attentions of a layer: module, and name among `heads_of`."""
        if stack_name == "encoder":
            return [("self_attn", "encoder")]
        return [("self_attn", "decoder"), *([("cross_attn", "cross")] if stack_name else [])]

    def build(
        self, config: MQAConfig, stack: Stack, number: int, tensors: Tensors, strict: bool = True
    ) -> MQADecoderLayer:
        prefix = f"{stack.prefix}layers.{number}."
        layer = MQADecoderLayer(config, number).float().eval()
        known = layer.state_dict()  # a key bias that softmax does not see is among the tensors, but not in the layer
        state = {name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items()}
        state = {name: t for name, t in state.items() if name in known and (strict or t.shape == known[name].shape)}
        layer.load_state_dict(state, strict=strict)
        layer = layer.to(self.device)
        if number == 0 and layer.self_attn.relative_bias is not None and not config.relative_per_layer:
            stack.first = layer
        return layer

    def enter(self, stack_name: str, number: int, tensors: Tensors) -> tuple[Stack, MQADecoderLayer]:
        """The stack of a layer, its tokens at the layer's input, and the layer with all its heads."""
        stack = self.stacks[stack_name]
        if number == 0:
            self.start(stack)
        return stack, self.build(stack.config, stack, number, tensors)

    @torch.no_grad()
    def fit(self, stack_name: str, number: int, tensors: Tensors) -> tuple[Tensors, dict[str, float]]:
        """The converted layer, and how far its attentions are from the teacher's on held-out tokens.

        Args:
            stack_name: "" in a decoder-only model, else "encoder" or "decoder".
            number: of the layer.
            tensors: of the canonical layer with all its heads.

        Returns:
            Its tensors with fewer heads, and the report.
        """
        stack, teacher = self.enter(stack_name, number, tensors)
        student = self.build(stack.pooled, stack, number, tensors, strict=False)
        prefix = f"{stack.prefix}layers.{number}."
        result: Tensors = dict(tensors)
        report: dict[str, float] = {}
        for site, attention in self.sites(stack_name):
            old = getattr(teacher, site)
            if attention not in self.attentions:
                if stack.pooled.value_bias != stack.config.value_bias:
                    result[f"{prefix}{site}.o_proj.bias"] = getattr(student, site).o_proj.bias.data = self.folded_bias(
                        old
                    )
                continue
            new = getattr(student, site)
            if self.options.method == "shared":
                seen = self.look(stack, teacher, student, site, self.heads[attention])
                self.check(old, seen, f"{stack_name} {site} of layer {number}".strip())
                choose = stack.pooled.rope_frequencies is not None
                fit = self.fit_heads(old, seen, new.qk_head_dim, new.v_head_dim, choose)
            else:
                fit = self.pooled_heads(stack, old, site, attention)
            if site == "self_attn" and stack.pooled.rope_frequencies is not None:
                stack.pooled.rope_frequencies[number] = fit.frequencies
            new = self.attention(stack, stack.pooled, number, site, fit.tensors, old)
            setattr(student, site, new)
            if self.options.refit:
                self.refit(stack, teacher, student, site)
            name = "cross_" if site == "cross_attn" else ""
            report |= {f"{name}{key}": value for key, value in self.compare(stack, teacher, student, site).items()}
            if self.options.method == "shared":
                report[f"{name}discarded_key_energy"] = fit.discarded_key_energy
                report[f"{name}discarded_value_energy"] = fit.discarded_value_energy
            result = {n: t for n, t in result.items() if f".{site}." not in n or ".relative_bias." in n}
            result |= {f"{prefix}{site}.{n}": t.cpu() for n, t in new.state_dict().items() if "relative_bias" not in n}
        self.advance(stack, teacher, student)
        return result, report

    def attention(
        self, stack: Stack, config: MQAConfig, number: int, site: str, fitted: Tensors, old: MQAAttention
    ) -> MQAAttention:
        """The new attention: fitted projections, the bias of the old values in that of the output."""
        new = MQAAttention(config, number, cross=site == "cross_attn").float().eval()
        state = {name: t.float() for name, t in fitted.items()}
        state |= {f"relative_bias.{n}": t for n, t in (old.relative_bias or nn.Identity()).state_dict().items()}
        if new.o_proj.bias is not None:
            state["o_proj.bias"] = self.folded_bias(old)
        new.load_state_dict(state)
        return new.to(self.device)

    def inputs(self, stack: Stack, layer: MQADecoderLayer, site: str, x: torch.Tensor, mask: Any) -> torch.Tensor:
        """The input of a layer's attention [B, T, d]; that of cross-attention is what its self-attention leaves."""
        post = layer.residual == "post_norm"
        h = x if post else layer.input_layernorm(x)
        if site == "self_attn":
            return h
        x = x + layer.added(layer.self_attn(h, position_embeddings=stack.angles, attention_mask=mask)[0])
        return layer.input_layernorm(x) if post else layer.cross_attn_layernorm(x)

    def at(
        self, stack: Stack, layer: MQADecoderLayer, site: str, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where the student's tokens stand at an attention: its input, what it attends to, and the mask."""
        own, cross = self.masks(stack, layer, rows)
        h = self.inputs(stack, layer, site, stack.states[rows].to(self.device), own)
        if site == "self_attn":
            return h, h, own
        assert stack.memory is not None
        assert cross is not None
        return h, stack.memory.states[rows].to(self.device), cross

    def projected(
        self, stack: Stack, attention: MQAAttention, h: torch.Tensor, source: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, rotated: [B, H, T, D] and [B, G, S, D]."""
        query = project(attention.q_proj, h, attention.qk_head_dim)
        key = project(attention.k_proj, source, attention.qk_head_dim)
        if attention.rotary and stack.angles is not None:
            query, key = attention.rotate(query, *stack.angles), attention.rotate(key, *stack.angles)
        return query, key

    def weights(
        self, attention: MQAAttention, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, chosen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention weights [B, H, chosen, S] of some queries, and the mask's rows for them."""
        nothing = torch.zeros(*key.shape[:3], 1, device=self.device)
        mask = mask if mask.shape[2] == 1 else mask[:, :, chosen]
        _, weights = eager_attention_forward(attention, query[:, :, chosen], key, nothing, mask, attention.scaling)
        return weights, mask

    def look(self, stack: Stack, teacher: MQADecoderLayer, student: MQADecoderLayer, site: str, new: int) -> Seen:
        """Gather what the teacher's attention sees where the student's tokens stand."""
        attention: MQAAttention = getattr(teacher, site)
        d, H = stack.config.hidden_size, stack.config.num_attention_heads
        G = old_heads(attention)
        J = stack.config.rotary_dim // 2 if attention.rotary else 0
        options: dict[str, Any] = {"dtype": torch.float64, "device": self.device}
        queries, keys = (torch.zeros(d + 1, d + 1, **options) for _ in range(2))
        mixed = torch.zeros(new, d, d, **options)
        spread = torch.zeros(new, J, G // new, G // new, dtype=torch.complex128, device=self.device)
        energy = torch.zeros(G, J, **options)
        counts = dict.fromkeys(("queries", "keys", "mixed", "spread"), 0)
        cross = site == "cross_attn"
        for rows in self.batches(stack):
            h, source, mask = self.at(stack, student, site, rows)
            valid = self.valid(stack, rows)
            known = self.valid(stack.memory, rows) if cross and stack.memory is not None else valid
            chosen = torch.randperm(h.shape[1], generator=self.generator)[: self.options.queries].to(self.device)
            for name, moment, x, kept in (("queries", queries, h, valid), ("keys", keys, source, known)):
                flat = nn.functional.pad(x[kept].double(), (0, 1), value=1.0)
                moment += flat.mT @ flat
                counts[name] += len(flat)
            query, key = self.projected(stack, attention, h, source)
            weights, here = self.weights(attention, query, key, mask, chosen)
            ok = valid[:, chosen]
            average = (weights.flatten(1, 2) @ source).view(len(h), new, H // new, -1, d)
            average = average.permute(1, 0, 3, 2, 4)[:, ok].flatten(1, 2).double()  # [K, queries, d]
            mixed += average.mT @ average
            counts["mixed"] += average.shape[1]
            if J:
                visible = (here > torch.finfo(torch.float).min / 2).double()[:, :1].expand(len(h), -1, -1, -1)[:, 0]
                visible = (visible / visible.sum(-1, keepdim=True))[ok]  # [queries, S]
                owner = ok.nonzero()[:, 0]
                k = torch.complex(key[..., :J].double(), key[..., J : 2 * J].double())  # [B, G, S, J]
                q = query[:, :, chosen].transpose(1, 2)[ok][..., : 2 * J].double()  # [queries, H, 2 J]
                energy += q.square().unflatten(-1, (2, J)).sum((0, 2)).view(G, -1, J).sum(1)
                share = torch.zeros(len(h), visible.shape[1], **options)
                share.index_add_(0, owner, visible)  # [B, S], how often each key is seen
                by_head = k.view(len(h), new, G // new, -1, J).permute(1, 4, 0, 3, 2)  # [K, J, B, S, m]
                flat_k = by_head.flatten(2, 3)
                spread += (flat_k * share.flatten()[:, None]).mT @ flat_k.conj()
                for b in range(len(h)):
                    mean = visible[owner == b].to(k.dtype) @ by_head[:, :, b]  # [K, J, queries, m]
                    spread -= mean.mT @ mean.conj()
                counts["spread"] += len(visible)
        queries, keys, mixed = queries / counts["queries"], keys / counts["keys"], mixed / counts["mixed"]
        spectrum = torch.linalg.eigvalsh(keys[:-1, :-1])
        rank = int((spectrum > fitting.RANK_TOLERANCE * spectrum[-1]).sum())
        for moment in (queries, keys):
            moment[:-1, :-1] = fitting.shrunk(moment[:-1, :-1])
        rotated = counts["spread"] or 1
        return Seen(
            queries,
            keys,
            fitting.shrunk(mixed),
            spread / rotated if J else None,
            energy / rotated if J else None,
            min(counts["queries"], counts["keys"]),
            rank,
        )

    def check(self, attention: MQAAttention, seen: Seen, where: str) -> None:
        """Note what makes a fit doubtful."""
        d = seen.queries.shape[0] - 1
        if seen.tokens < ENOUGH * d:
            few = f"{seen.tokens:,} calibration tokens are few for a hidden size of {d}"
            self.notes.setdefault(f"{few}; {ENOUGH * d:,} or more are better", [])
        elif seen.rank < d:
            spanned = f"the calibration text does not span what an attention can see, of {d} directions"
            self.notes.setdefault(spanned, []).append(f"{seen.rank} in {where}")
        H = attention.o_proj.in_features // attention.v_head_dim
        by_head = attention.o_proj.weight.view(-1, H, attention.v_head_dim).square().sum((0, 2))
        q = attention.q_proj.weight.view(H, attention.qk_head_dim, -1).square().sum((1, 2))
        dead = int(((by_head == 0) | (q == 0)).sum())
        if dead:
            self.notes.setdefault("query heads of zeros have no say in the fit", []).append(f"{dead} in {where}")

    def groups(self, attention: MQAAttention, new: int) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Of each new head: the old heads and the query heads that share it, and whose each of the latter was."""
        G, g = old_heads(attention), attention.num_key_value_groups
        m = G // new
        head_of = torch.arange(m, device=self.device).repeat_interleave(g)
        for i in range(new):
            yield slice(i * m, (i + 1) * m), slice(i * m * g, (i + 1) * m * g), head_of

    def fit_heads(self, attention: MQAAttention, seen: Seen, width_k: int, width_v: int, choose: bool) -> Fit:
        """Projections and biases of the new attention.

        Args:
            attention: with all its heads.
            seen: what it sees.
            width_k, width_v: of a new head.
            choose: whether the frequencies of rotated components are chosen by energy, instead of all alike.
        """
        config = attention.config
        d, H = config.hidden_size, config.num_attention_heads
        G, new = old_heads(attention), seen.mixed.shape[0]
        D, Dv, m = attention.qk_head_dim, attention.v_head_dim, G // new
        R = config.rotary_dim if attention.rotary else 0
        pairs = rotated_pairs(width_k, R, D, m)

        def augmented(linear: nn.Linear) -> torch.Tensor:
            bias = torch.zeros(linear.out_features, 1, device=self.device)
            bias = bias if linear.bias is None else linear.bias[:, None]
            return torch.cat((linear.weight, bias), dim=1).double()

        w_q = augmented(attention.q_proj).view(H, D, d + 1)
        w_k = augmented(attention.k_proj).view(G, D, d + 1)
        w_v = attention.v_proj.weight.double().view(G, Dv, d)
        w_o = attention.o_proj.weight.double().view(d, H, Dv).transpose(0, 1)
        counts = torch.zeros(0, dtype=torch.long)
        if R:
            assert seen.spread is not None
            assert seen.energy is not None
            counts = torch.full((R // 2,), 2 * pairs // R)
            if choose:
                energy = seen.energy.view(new, m, -1).transpose(1, 2)
                grams = [fitting.rotary_gram(f, p) for f, p in zip(seen.spread, energy)]
                spectrum = torch.stack([torch.linalg.eigvalsh(g) for g in grams]).sum(0).flip(-1).clamp(min=0)
                counts = fitting.choose_frequencies(spectrum, pairs)
        keys, queries, vals, outs = [], [], [], []
        discarded_k = discarded_v = 0.0
        for group, (heads, qs, head_of) in enumerate(self.groups(attention, new)):
            parts = []
            if R:
                assert seen.spread is not None
                assert seen.energy is not None
                spread, power = seen.spread[group], seen.energy[heads].T
                parts.append(fitting.rotary_keys(w_k[heads, :R], w_q[qs, :R], head_of, spread, power, counts))
            if R < D:
                rank = width_k - 2 * pairs
                plain = fitting.plain_keys(w_k[heads, R:], w_q[qs, R:], head_of, seen.queries, seen.keys, rank)
                parts.append(plain)
            keys.append(torch.cat([p.w_k for p in parts]))
            queries.append(torch.cat([p.w_q for p in parts], dim=1))
            fit_v = fitting.values(w_v[heads], w_o[qs], head_of, seen.mixed[group], width_v)
            vals.append(fit_v.w_v)
            outs.append(fit_v.w_o)
            discarded_k += max(p.discarded for p in parts) / new
            discarded_v += fit_v.discarded / new
        q, k, v = torch.cat(queries).flatten(0, 1), torch.cat(keys), torch.cat(vals)
        fitted = {"q_proj.weight": q[:, :-1], "k_proj.weight": k[:, :-1], "v_proj.weight": v}
        fitted["o_proj.weight"] = torch.cat(outs).transpose(0, 1).flatten(1)  # [H, d, width] -> [d, H·width]
        if attention.q_proj.bias is not None:
            fitted["q_proj.bias"] = q[:, -1]
        if attention.k_proj.bias is not None:
            fitted["k_proj.bias"] = k[:, -1]
        frequencies = torch.arange(len(counts)).repeat_interleave(counts.cpu()).tolist()
        return Fit(fitted, frequencies, discarded_k, discarded_v)

    def pooled_heads(self, stack: Stack, attention: MQAAttention, site: str, name: str) -> Fit:
        """The heads of a method that looks at no data; `name` among `heads_of`."""
        prefix = f"{stack.prefix}{site}."
        state = {f"{prefix}{n}": t.cpu() for n, t in attention.state_dict().items() if "relative_bias" not in n}
        pool_layer(
            state,
            before={name: old_heads(attention)},
            after=self.heads,
            attentions=[name],
            method=self.options.method,
            generator=self.generator,
            std=attention.config.initializer_range,
        )
        fitted = {n.removeprefix(prefix): t for n, t in state.items()}
        fitted.pop("v_proj.bias", None)
        return Fit(fitted, [], 0.0, 0.0)

    def folded_bias(self, attention: MQAAttention) -> torch.Tensor:
        """The bias of the output [d] with that of the values in it: attention weights add up to 1."""
        output, value = attention.o_proj, attention.v_proj
        bias = torch.zeros(output.out_features, device=self.device) if output.bias is None else output.bias.clone()
        if value.bias is not None:
            heads = value.bias.view(-1, attention.v_head_dim).repeat_interleave(attention.num_key_value_groups, dim=0)
            bias += output.weight @ heads.flatten()
        return bias

    def heads_output(
        self, stack: Stack, attention: MQAAttention, h: torch.Tensor, source: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs of an attention's heads side by side [B, T, H·Dv], and of the attention [B, T, d]."""
        seen: list[torch.Tensor] = []
        hook = attention.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        output, _ = attention(
            h,
            position_embeddings=stack.angles,
            attention_mask=mask,
            encoder_hidden_states=source if attention.cross else None,
        )
        hook.remove()
        return seen[0], output

    def refit(self, stack: Stack, teacher: MQADecoderLayer, student: MQADecoderLayer, site: str) -> None:
        """Refit the student's output projection (and bias, where it has one) to the teacher's attention output."""
        old, new = getattr(teacher, site), getattr(student, site)
        projection = new.o_proj
        r, d = projection.in_features, projection.out_features
        biased = projection.bias is not None
        zz = torch.zeros(r + 1, r + 1, dtype=torch.float64, device=self.device)
        yz = torch.zeros(d, r + 1, dtype=torch.float64, device=self.device)
        for rows in self.batches(stack):
            at, kept = self.at(stack, student, site, rows), self.valid(stack, rows)
            z = self.heads_output(stack, new, *at)[0][kept]
            y = self.heads_output(stack, old, *at)[1][kept]
            z = nn.functional.pad(z.double(), (0, 1), value=1.0)
            zz += z.mT @ z
            yz += y.double().mT @ z
        n = zz[-1, -1]
        zz, yz = zz / n, yz / n
        mean_z, mean_y = zz[:-1, -1], yz[:, -1]
        zz, yz = zz[:-1, :-1], yz[:, :-1]
        if biased:  # a bias takes the means
            zz, yz = zz - torch.outer(mean_z, mean_z), yz - torch.outer(mean_y, mean_z)
        weight = fitting.refit(zz, yz, projection.weight.double())
        projection.weight.data.copy_(weight)
        if biased:
            projection.bias.data.copy_(mean_y - weight @ mean_z)

    def compare(self, stack: Stack, teacher: MQADecoderLayer, student: MQADecoderLayer, site: str) -> dict[str, float]:
        """On the held-out tokens: relative error of an attention's output, and the mean divergence
        KL(teacher || student) of its weights in nats, over heads and queries."""
        old, new = getattr(teacher, site), getattr(student, site)
        distance = size = divergence = 0.0
        count = 0
        for rows in self.batches(stack, held_out=True):
            h, source, mask = self.at(stack, student, site, rows)
            kept = self.valid(stack, rows)
            expected = self.heads_output(stack, old, h, source, mask)[1][kept]
            found = self.heads_output(stack, new, h, source, mask)[1][kept]
            distance += float((found - expected).double().square().sum())
            size += float(expected.double().square().sum())
            chosen = torch.randperm(h.shape[1], generator=self.generator)[: self.options.queries].to(self.device)
            p, q = (
                self.weights(a, *self.projected(stack, a, h, source), mask, chosen)[0]
                .transpose(1, 2)[kept[:, chosen]]
                .clamp(min=1e-30)
                for a in (old, new)
            )
            divergence += float((p * (p / q).log()).sum(-1).double().sum())
            count += p.shape[0] * p.shape[1]
        error = (distance / size) ** 0.5 if size else 0.0
        return {"attention_error": error, "attention_kl": divergence / max(count, 1)}

    def run(self, stack: Stack, layer: MQADecoderLayer, x: torch.Tensor, memory: Any, rows: slice) -> torch.Tensor:
        own, cross = self.masks(stack, layer, rows)
        return layer(x.to(self.device), own, memory, cross, position_embeddings=stack.angles).cpu()

    def advance(self, stack: Stack, teacher: MQADecoderLayer, student: MQADecoderLayer) -> None:
        """Let the tokens pass the student, and the held-out ones the teacher beside it."""
        memory = stack.memory
        for rows in self.rows(0, len(stack.states)):
            source = None if memory is None else memory.states[rows].to(self.device)
            stack.states[rows] = self.run(stack, student, stack.states[rows], source, rows)
        for rows in self.batches(stack, held_out=True):
            own = slice(rows.start - self.fitted_rows, rows.stop - self.fitted_rows)
            source = None if memory is None else memory.original[own].to(self.device)
            stack.original[own] = self.run(stack, teacher, stack.original[own], source, rows)

    # -- the choice of widths -------------------------------------------------------------------------------------

    @torch.no_grad()
    def survey(self, stack_name: str, number: int, tensors: Tensors) -> dict[str, Curves]:
        """What each width of a layer's attentions would leave out; the tokens pass the teacher.

        Returns:
            By name among `heads_of`.
        """
        stack, teacher = self.enter(stack_name, number, tensors)
        curves = {}
        for site, name in self.sites(stack_name):
            if name not in self.attentions:
                continue
            old: MQAAttention = getattr(teacher, site)
            new = self.heads[name]
            m = old_heads(old) // new
            seen = self.look(stack, teacher, teacher, site, new)
            D, Dv = old.qk_head_dim, old.v_head_dim
            keys, values = (
                self.left(old, seen, component, most) for component, most in (("keys", m * D), ("values", m * Dv))
            )
            costs = []
            for width_k, width_v in ((D, m * Dv), (m * D, Dv)):
                fit = self.fit_heads(old, seen, width_k, width_v, choose=True)
                config = self.widened(stack.config, old, number, new, width_k, width_v, fit.frequencies)
                student = copy.copy(teacher)
                student._modules = dict(teacher._modules)
                setattr(student, site, self.attention(stack, config, number, site, fit.tensors, old))
                error = self.compare(stack, teacher, student, site)["attention_error"]
                costs.append(error**2)
            share = self.share(stack, teacher, site)
            curves[name] = Curves(keys, values, D, Dv, costs[0] * share, costs[1] * share)
        self.advance(stack, teacher, teacher)
        return curves

    def left(self, attention: MQAAttention, seen: Seen, what: str, most: int) -> torch.Tensor:
        """[most + 1]: the share of energy that 0, 1, ... components leave out, all new heads together."""
        spectra: list[torch.Tensor] = []
        config, new = attention.config, seen.mixed.shape[0]
        H, G, d = config.num_attention_heads, old_heads(attention), config.hidden_size
        R = config.rotary_dim if attention.rotary else 0
        for group, (heads, qs, head_of) in enumerate(self.groups(attention, new)):
            if what == "values":
                w_v = attention.v_proj.weight.double().view(G, -1, d)[heads]
                w_o = attention.o_proj.weight.double().view(d, H, -1).transpose(0, 1)[qs]
                spectra.append(fitting.spectrum(fitting.weighted_values(w_v, w_o, head_of), seen.mixed[group]))
            elif R:
                assert seen.spread is not None
                assert seen.energy is not None
                gram = fitting.rotary_gram(seen.spread[group], seen.energy[heads].T)
                energies = torch.linalg.eigvalsh(gram).clamp(min=0)
                spectra.append(energies.flatten().repeat_interleave(2) / 2)
            else:  # (of partly rotated heads, only the rotated part is looked at)
                w_q = attention.q_proj.weight.double().view(H, -1, d)[qs]
                w_k = attention.k_proj.weight.double().view(G, -1, d)[heads]
                q_moment, k_cov = seen.queries[:-1, :-1], fitting.covariance(seen.keys)
                spectra.append(fitting.spectrum(fitting.weighted_keys(w_k, w_q, head_of, q_moment), k_cov))
        spectrum = sum(s.sort(descending=True).values for s in spectra)
        assert isinstance(spectrum, torch.Tensor)
        spectrum = nn.functional.pad(spectrum, (0, max(0, most - len(spectrum))))[:most]
        total = spectrum.sum().clamp(min=1e-300)
        return torch.cat((torch.ones(1), (1 - spectrum.cumsum(0) / total).clamp(min=0).cpu().float()))

    def widened(
        self, config: MQAConfig, old: MQAAttention, number: int, new: int, key: int, value: int, pairs: list[int]
    ) -> MQAConfig:
        config = copy.copy(config)
        if old.cross:
            config.cross_num_key_value_heads, config.cross_qk_head_dim, config.cross_v_head_dim = new, key, value
        else:
            config.num_key_value_heads, config.qk_head_dim, config.v_head_dim = new, key, value
            if old.rotary:
                config.rope_frequencies = [pairs] * config.num_hidden_layers
        config.output_bias = config.value_bias or config.output_bias
        config.value_bias = False
        return config

    def share(self, stack: Stack, layer: MQADecoderLayer, site: str) -> float:
        """The size of an attention's output relative to that of the stream it is added to and ends in, on held-out
        tokens: what a relative error of the output means for the layers above."""
        output = stream = 0.0
        for rows in self.batches(stack, held_out=True):
            kept = self.valid(stack, rows)
            y = self.heads_output(stack, getattr(layer, site), *self.at(stack, layer, site, rows))[1][kept]
            output += float(y.double().square().sum())
            stream += float((stack.states[rows].to(self.device)[kept] + y).double().square().sum())
        return (output / stream) ** 0.5 if stream else 0.0

    # -- the whole ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Mean cross-entropy in nats on the held-out tokens, before and after, and how many they are."""
        stack = self.last
        held = slice(self.fitted_rows, len(stack.tokens))
        labels = stack.tokens[held, 1:].to(self.device)
        labels = labels.masked_fill(~self.valid(stack, held)[:, 1:], -100)
        result: dict[str, float] = {}
        count = int((labels != -100).sum())
        for name, states in (("before", stack.original), ("after", stack.states[held])):
            total = 0.0
            for i, x in enumerate(states):
                logits = self.head(stack.shell.leave(x[None].to(self.device)))[0, :-1] * stack.config.logit_scale
                total += float(nn.functional.cross_entropy(logits.float(), labels[i], reduction="sum"))
            result[name] = total / count
        return {**result, "tokens": count}

    def warnings(self) -> list[str]:
        """What makes the fit doubtful, in sentences."""
        return [text + (f": {', '.join(where[:4])}" if where else "") for text, where in self.notes.items()]
