"""Hidden states of the calibration tokens at each layer of a stack, in memory or in a mapped file.

B sequences, T tokens of each, S tokens attended to, H query heads, d hidden size
"""

import copy
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.initialization import no_init_weights

from mqa_hf.attention_mqa import ATTENTION_NAME
from mqa_hf.base.errors import ConversionError
from mqa_hf.configuration_checks_mqa import PER_LAYER
from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.layer_mqa import MQAAttention, MQADecoderLayer, make_attention
from mqa_hf.modeling_mqa import MQAModel
from mqa_hf.modeling_mqa_seq2seq import MQAAudioEncoder
from mqa_hf.positions_mqa import BIAS_POSITIONS, query_scale

Tensors = dict[str, torch.Tensor]
MAPPED_ABOVE = 8 * 2**30  # bytes of hidden states kept in memory; larger ones are in a mapped file
ON_DEVICE = 0.25  # of its free memory, for hidden states


@dataclass(frozen=True)
class FitOptions:
    """Options of the fit.

    Attributes:
        method: "shared", "latent", or a method without calibration whose output projections are refitted.
        refit: whether to refit output projections.
        steps: training steps of each latent on the layer's own output, after the closed form.
        queries: positions per sequence at which attention is sampled.
        batch: sequences per forward pass of a layer.
        held_out: number of last sequences, used only for the report.
        device: where layers run.
        seed: random seed of those positions.
        scratch: directory for large hidden states.
    """

    method: str = "shared"
    refit: bool = True
    steps: int = 0
    queries: int = 64
    batch: int = 8
    held_out: int = 8
    device: str = "cpu"
    seed: int = 0
    scratch: Path | None = None


@dataclass(frozen=True)
class Examples:
    """Token ids [N, T]; `valid` [N, T] is false for padding, which is on the right (`None`: no padding).

    For an encoder-decoder model they are the decoder's input, and `source`, `source_valid` [N, S] the encoder's; for
    speech, `source` are the features [N, mels, frames].
    `held_out` names the part of the text that each of the last rows is from, which are not fitted on.
    """

    tokens: torch.Tensor
    valid: torch.Tensor | None = None
    source: torch.Tensor | None = None
    source_valid: torch.Tensor | None = None
    held_out: Sequence[str] = ()


def layer_config(config: MQAConfig) -> MQAConfig:
    config = copy.deepcopy(config)
    config._attn_implementation = ATTENTION_NAME
    config._experts_implementation = "eager"  # layers run without the model that would choose
    return config


class Stream:
    """Hidden states of the calibration tokens before a layer of one stack, after the *converted* layers below.

    Args:
        prefix: prefix of the stack's canonical tensor names.
        config: configuration of the stack, with all heads of the source.
        tokens, valid: ids [N, T], and a mask that is false for padding (`None`: no padding); of an audio encoder,
            features [N, mels, 2 T].
        options: options of the fit.
        memory: stream of the encoder, for the decoder of an encoder-decoder model.

    Attributes:
        states: [N, T, d], after the student's layers.
        original: [held out, T, d], after the teacher's layers.
        known: outputs of the student's heads [N, T, H·Dv] in this layer, before the output projection, by attention.
        shell: the stack without layers: embeddings, positions, masks, last norm.
    """

    def __init__(
        self,
        prefix: str,
        config: MQAConfig,
        tokens: torch.Tensor,
        valid: torch.Tensor | None,
        options: FitOptions,
        memory: "Stream | None" = None,
    ):
        self.prefix, self.config, self.options, self.memory = prefix, layer_config(config), options, memory
        self.tokens, self._valid = tokens, valid
        self.device = torch.device(options.device)
        self.fitted_rows = len(tokens) - options.held_out
        audio = config.num_mel_bins is not None
        self.count, self.length = len(tokens), tokens.shape[-1] // 2 if audio else tokens.shape[1]
        empty: dict[str, Any] = {name: [] for name in PER_LAYER if isinstance(getattr(config, name), (list, tuple))}
        shell = (MQAAudioEncoder if audio else MQAModel)(
            MQAConfig(**{**config.to_dict(), "num_hidden_layers": 0, **empty})
        )
        self.shell: MQAModel = shell.float().eval().to(self.device)
        # The shell makes masks and positions for every layer. "eager" masks are tensors, so that rows can be taken.
        self.shell.config = copy.deepcopy(config)
        self.shell.config._attn_implementation = "eager"
        self.states = self.original = torch.empty(0)
        self.known: dict[str, torch.Tensor] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._masks: dict[int, torch.Tensor] = {}
        self.angles: tuple[torch.Tensor, torch.Tensor] | None = None
        self.query_scale: torch.Tensor | None = None
        self.first: MQADecoderLayer | None = None  # whose relative bias all layers share

    @torch.no_grad()
    def start(self) -> None:
        """Embed the tokens and compute the positions that all layers share."""
        N, T = self.count, self.length
        position_ids = torch.arange(T, device=self.device)[None]
        embed: Any = self.shell.heard if isinstance(self.shell, MQAAudioEncoder) else self.shell.embed_tokens
        self.states = self.room(N, T, self.config.hidden_size)
        for rows in self.rows(0, N):
            self.states[rows] = self.shell.enter(embed(self.tokens[rows].to(self.device)), position_ids)
        self.original = self.states[-self.options.held_out :].clone()
        x = self.states[:1].to(self.device)
        self.angles = None if self.shell.rotary_emb is None else self.shell.rotary_emb(x, position_ids)
        if self.config.query_scaling_beta is not None:
            self.query_scale = query_scale(position_ids[:, None, :, None], self.config)
        if self.memory is not None:  # the encoder's last layer is done
            for states in (self.memory.states, self.memory.original):
                for rows in self.rows(0, len(states)):
                    states[rows] = self.memory.shell.leave(states[rows].to(self.device))

    def room(self, *shape: int) -> torch.Tensor:
        """An empty float32 tensor: on the device if there is plenty of room, in a mapped file if it is large."""
        count = torch.Size(shape).numel()
        if self.device.type == "cuda" and 4 * count < torch.cuda.mem_get_info(self.device)[0] * ON_DEVICE:
            return torch.empty(shape, device=self.device)
        scratch = self.options.scratch
        if 4 * count <= MAPPED_ABOVE or scratch is None:
            return torch.empty(shape)
        free = shutil.disk_usage(scratch).free
        if free < 4 * count:
            raise ConversionError(
                f"the hidden states of the calibration tokens need {4 * count:,} bytes in {scratch}, which has "
                f"{free:,} free; lower `calibration_tokens`"
            )
        # A mapped file needs no name.
        with tempfile.NamedTemporaryFile(dir=scratch, prefix=".states-") as file:
            return torch.from_file(file.name, shared=True, size=count).view(shape)

    def rows(self, start: int, stop: int) -> Iterator[slice]:
        for i in range(start, stop, self.options.batch):
            yield slice(i, min(i + self.options.batch, stop))

    def batches(self, held_out: bool = False) -> Iterator[slice]:
        """Batches of the sequences to fit on, or of the held-out ones."""
        return self.rows(self.fitted_rows, self.count) if held_out else self.rows(0, self.fitted_rows)

    def valid(self, rows: slice) -> torch.Tensor:
        """[B, T]: mask of the tokens that are not padding."""
        if self._valid is None:
            return torch.ones(rows.stop - rows.start, self.length, dtype=torch.bool, device=self.device)
        return self._valid[rows].to(self.device)

    @property
    def placing(self) -> dict[str, Any]:
        """Arguments of layers and attentions that depend on the positions."""
        scale = {} if self.query_scale is None else {"query_scale": self.query_scale}
        return {"position_embeddings": self.angles, **scale}

    def plain(self, layer: MQADecoderLayer) -> bool:
        """Whether a layer's self-attention needs no mask: tokens see all up to themselves, or in an encoder all."""
        number = layer.self_attn.layer_idx
        if self._valid is not None or self.config.position_embedding in BIAS_POSITIONS:
            return False
        window = self.config.sliding_window if self.config.layer_types[number] == "sliding_attention" else None
        return window is None or (self.config.causal and window >= self.length)

    def mask(self, layer: MQADecoderLayer, rows: slice) -> torch.Tensor | None:
        """The additive mask [B or 1, H or 1, T, T] of a layer's self-attention for some sequences; `None` if it needs
        none."""
        if self.plain(layer):
            return None
        shared = self._masks.get(id(layer))
        if shared is not None and len(shared) in (1, rows.stop - rows.start):
            return shared
        x = torch.empty(rows.stop - rows.start, self.length, 1, device=self.device)
        known = None if self._valid is None else self.valid(rows)
        position_ids = torch.arange(x.shape[1], device=self.device)[None]
        ready = self.shell.make_masks(x, known, position_ids, None)
        T = x.shape[1]  # an encoder without padding has no mask to add a bias to
        ready = {name: torch.zeros(1, 1, T, T, device=self.device) if m is None else m for name, m in ready.items()}
        biased = self.shell.position_bias(ready, known, x, None)
        kind = self.config.layer_types[layer.self_attn.layer_idx]
        if self.first is not None:
            biased(self.first, kind)
        made: torch.Tensor = biased(layer, kind)
        if self._valid is None:
            self._masks[id(layer)] = made
        return made

    def cross_mask(self, rows: slice) -> torch.Tensor | None:
        """The additive mask [B, 1, 1, S] of cross-attention."""
        if self.memory is None:
            return None
        source = self.memory.valid(rows)
        mask = torch.zeros(source.shape, device=self.device).masked_fill(~source, torch.finfo(torch.float).min)
        return mask[:, None, None]

    def layer(self, config: MQAConfig, number: int, tensors: Tensors) -> MQADecoderLayer:
        """Make a layer from canonical tensors."""
        with no_init_weights(), self.device:
            layer = MQADecoderLayer(config, number).float().eval()
        prefix = f"{self.prefix}layers.{number}."
        known = layer.state_dict()  # without the key bias, which softmax ignores
        state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        layer.load_state_dict({name: tensor for name, tensor in state.items() if name in known})
        if number == 0 and layer.self_attn.relative_bias is not None and not config.relative_per_layer:
            self.first = layer
        return layer

    def student(self, teacher: MQADecoderLayer, config: MQAConfig) -> MQADecoderLayer:
        """The same layer with attentions of another configuration, which take those of its tensors that fit."""
        student = copy.copy(teacher)
        student._modules = dict(teacher._modules)
        for site in ("self_attn", "cross_attn"):
            old = getattr(teacher, site, None)
            if old is None:
                continue
            with no_init_weights(), self.device:
                new = make_attention(config, old.layer_idx, cross=old.cross).float().eval()
            known = new.state_dict()
            held = {name: t for name, t in old.state_dict().items() if name in known and t.shape == known[name].shape}
            new.load_state_dict(held, strict=False)
            setattr(student, site, new)
        if self.first is teacher:
            self.first = student
        return student

    def walk(
        self,
        layer: MQADecoderLayer,
        x: torch.Tensor,
        source: torch.Tensor | None,
        rows: slice,
        known: Mapping[str, torch.Tensor],
        until: str | None = None,
    ) -> torch.Tensor:
        """Pass x [B, T, d] through a layer, or up to the input of the attention `until`.

        Args:
            source: states of the encoder.
            known: outputs of the layer's heads, as in `Stream.known`, which are not computed again.
        """
        for branches, after, leave in layer.residuals(cross=self.memory is not None):
            total = x
            for norm, module in branches:
                h = x if norm is None else norm(x)
                if until is not None and module is getattr(layer, until):
                    return h
                if module is layer.mlp:
                    output = module(h)
                else:
                    site = "self_attn" if module is layer.self_attn else "cross_attn"
                    if site in known:
                        output = module.o_proj(known[site][rows].to(self.device))  # type: ignore[operator]
                    elif site == "self_attn":
                        output = module(h, attention_mask=self.mask(layer, rows), **self.placing)[0]
                    else:
                        output = module(h, attention_mask=self.cross_mask(rows), encoder_hidden_states=source)[0]
                total = total + layer.added(output if leave is None else leave(output))
            x = total if after is None else after(total)
        assert until is None, f"a layer without {until}"
        return x

    def at(
        self, layer: MQADecoderLayer, site: str, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The student's states at an attention: its input, what it attends to, and the mask."""
        source = None if self.memory is None else self.memory.states[rows].to(self.device)
        h = self.walk(layer, self.states[rows].to(self.device), source, rows, self.known, until=site)
        if site == "self_attn":
            return h, h, self.mask(layer, rows)
        assert source is not None
        return h, source, self.cross_mask(rows)

    def keep(self, site: str, width: int) -> torch.Tensor:
        """An empty tensor [N, T, `width`] in `known`."""
        N, T = self.count, self.length
        held = self._buffers.get(site)
        if held is None or held.shape[-1] != width:
            held = self._buffers[site] = self.room(N, T, width)
        self.known[site] = held
        return held

    def advance(self, teacher: MQADecoderLayer, student: MQADecoderLayer) -> None:
        """Pass the tokens through the student, and the held-out ones also through the teacher."""
        memory = self.memory
        for rows in self.rows(0, len(self.states)):
            source = None if memory is None else memory.states[rows].to(self.device)
            self.states[rows] = self.walk(student, self.states[rows].to(self.device), source, rows, self.known)
        for rows in self.batches(held_out=True):
            own = slice(rows.start - self.fitted_rows, rows.stop - self.fitted_rows)
            source = None if memory is None else memory.original[own].to(self.device)
            self.original[own] = self.walk(teacher, self.original[own].to(self.device), source, rows, {})
        self.known.clear()
        self._masks.clear()


def old_heads(attention: MQAAttention) -> int:
    """G, the key/value heads of an attention."""
    return attention.k_proj.out_features // attention.qk_head_dim
