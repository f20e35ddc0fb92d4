"""Fitting a model's shared heads layer by layer, on the hidden states of calibration tokens.

The walk over the checkpoint yields one canonical layer at a time. The hidden states at its input (`states.py`) come
from the *converted* layers below. The layer with all its heads is the teacher, which gives the inputs of each
attention (`moments.py`) and its target output. The moments give the new heads (`heads.py`) and the error of each width
(`budget.py`). Then the states pass through the converted layer. The source's class is not needed, and only one layer
and the states are held in memory.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property, wraps
from typing import Any

import torch
from torch import nn

from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig
from mqa_hf.latent_mqa import MQALatentAttention
from mqa_hf.layer_mqa import Attention, MQAAttention, MQADecoderLayer, scaled_logits

from .budget import curves_of
from .canonical import CanonicalConfig, heads_of, stacks_of
from .convert import FITTED
from .heads import FittedHeads, compare, fit_heads, folded_bias, new_attention, pooled_heads, refit
from .latent_moments import LatentSeen, look_for_latent
from .latents import LatentCurves, fit_latent, latent_curves
from .local_training import train
from .matching import Layer
from .moments import Seen, doubts, look
from .states import Examples, FitOptions, Stream, Tensors, layer_config
from .widths import Curves

FAR_WORSE = 2.0  # rise of the loss on one calibration text as a multiple of that on the others
SMALL_RISE = 0.1  # nats per token, below which no text counts as worse


def on_tensor_cores(method: Callable[..., Any]) -> Callable[..., Any]:
    """Compute products of float32 in TF32 on a GPU: inputs are rounded to 11 bits, sums are in float32.

    Fits do not notice: sums over tokens average the rounding, and `fitting.shrunk` adds far more to a moment.
    """

    @wraps(method)
    def run(self: "Calibration", *arguments: Any) -> Any:
        before = None
        if self.device.type == "cuda":
            # Reading it is an error if the process uses PyTorch's other switches, which cannot be mixed with this one.
            with suppress(RuntimeError):
                before = torch.get_float32_matmul_precision()
        if before is None:
            return method(self, *arguments)
        torch.set_float32_matmul_precision("high")
        try:
            return method(self, *arguments)
        finally:
            torch.set_float32_matmul_precision(before)

    return run


class Calibration:
    """Passes the calibration tokens through the model and fits the heads layer by layer.

    Args:
        config: canonical configuration with all heads of the source.
        pooled: the same with the requested heads and widths. If it has `rope_frequencies`, they are chosen here, layer
            by layer.
        examples: calibration tokens.
        attentions: the attentions to convert; keys of `heads_of`.
        options: see [`FitOptions`].

    Attributes:
        frequencies: those chosen so far, by stack and layer; only for stacks where they are chosen.
    """

    def __init__(
        self,
        config: CanonicalConfig,
        pooled: CanonicalConfig,
        examples: Examples,
        attentions: Sequence[str],
        options: FitOptions,
    ):
        self.options, self.attentions, self.held_out = options, attentions, examples.held_out
        self.heads = heads_of(pooled)
        self.device = torch.device(options.device)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.streams: dict[str, Stream] = {}
        self.pooled: dict[str, MQAConfig] = {}
        if isinstance(config, MQASeq2SeqConfig):
            assert examples.source is not None
            encoder = Stream("model.encoder.", config.encoder, examples.source, examples.source_valid, options)
            decoder = Stream("model.decoder.", config.decoder, examples.tokens, examples.valid, options, encoder)
            self.streams = {"encoder": encoder, "decoder": decoder}
            self.pooled = {name: layer_config(stack) for name, stack in stacks_of(pooled).items()}
            if config.share_embeddings:
                encoder.shell.embed_tokens = decoder.shell.embed_tokens
        else:
            assert isinstance(pooled, MQAConfig)
            self.streams[""] = Stream("model.", config, examples.tokens, examples.valid, options)
            self.pooled[""] = layer_config(pooled)
        self.last = list(self.streams.values())[-1]
        last = self.last.config
        self.head = nn.Linear(last.embedding_size, last.vocab_size, bias=last.lm_head_bias).to(self.device)
        if config.tie_word_embeddings and self.last.shell.embed_tokens is not None:
            self.head.weight = self.last.shell.embed_tokens.weight
        self.frequencies = {
            name: copy.deepcopy(stack.rope_frequencies)
            for name, stack in stacks_of(pooled).items()
            if stack.rope_frequencies is not None
        }
        self.notes: dict[str, list[str]] = {}  # warning: places
        self.moved: dict[Layer, Tensors] = {}  # copies of the next layer on the GPU
        self.copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def ahead(self, layer: Layer, tensors: Tensors) -> None:
        """Copy a layer to the GPU while another one is converted, if there is memory for both."""
        if self.copying is not None:
            with torch.cuda.stream(self.copying), suppress(torch.OutOfMemoryError):
                self.moved[layer] = {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def outside(self, tensors: Tensors) -> None:
        """Store the tensors outside the layers: embeddings, final norms, head."""
        own = {f"lm_head.{name}": p for name, p in self.head.named_parameters()}
        for stream in self.streams.values():
            own |= {f"{stream.prefix}{name}": p for name, p in stream.shell.named_parameters()}
        for name, tensor in tensors.items():
            if name in own:
                own[name].data.copy_(tensor)

    def sites(self, stack: str) -> list[tuple[str, str]]:
        """The attentions of a layer: module name and key of `heads_of`."""
        if stack == "encoder":
            return [("self_attn", "encoder")]
        return [("self_attn", "decoder"), *([("cross_attn", "cross")] if stack else [])]

    def enter(self, layer: Layer, tensors: Tensors) -> tuple[Stream, MQADecoderLayer]:
        """The tokens at the input of the layer, and the layer with all its heads."""
        stack, number = layer
        stream = self.streams[stack]
        if number == 0:
            stream.start()
        moved = self.moved.pop(layer, {})
        made = stream.layer(stream.config, number, moved or tensors)
        for tensor in moved.values():  # their memory must not be used for the next ones before they are read
            tensor.record_stream(torch.cuda.current_stream(self.device))
        return stream, made

    @torch.no_grad()
    @on_tensor_cores
    def convert(self, layer: Layer, tensors: Tensors) -> tuple[Tensors, dict[str, float]]:
        """Convert a layer and compare its attentions with the teacher's on held-out tokens.

        Args:
            layer: the stack, "" in a decoder-only model, else "encoder" or "decoder", and the number.
            tensors: of the canonical layer, with all its heads.

        Returns:
            Its tensors with fewer heads, and the report.
        """
        stack, number = layer
        stream, teacher = self.enter(layer, tensors)
        pooled = self.pooled[stack]
        student = stream.student(teacher, pooled)
        prefix = f"{stream.prefix}layers.{number}."
        result: Tensors = dict(tensors)
        report: dict[str, float] = {}
        for site, attention in self.sites(stack):
            old = getattr(teacher, site)
            if attention not in self.attentions:
                if (pooled.value_bias, pooled.output_bias) != (stream.config.value_bias, stream.config.output_bias):
                    bias = getattr(student, site).o_proj.bias.data = folded_bias(old)
                    result[f"{prefix}{site}.o_proj.bias"] = bias
                continue
            fit = self.new_heads(layer, teacher, student, site, attention)
            config = pooled
            if site == "self_attn" and pooled.rope_frequencies is not None:
                chosen = self.frequencies[stack or "decoder"]
                chosen[number] = fit.frequencies
                config = copy.copy(pooled)
                config.rope_frequencies = chosen
            new = new_attention(config, number, fit.tensors, old)
            setattr(student, site, new)
            if self.options.refit:
                refit(stream, teacher, student, site)
            if self.options.steps and isinstance(new, MQALatentAttention):
                train(stream, teacher, student, site, self.options.steps, self.generator)
            name = "cross_" if site == "cross_attn" else ""
            errors = compare(stream, teacher, student, site, self.generator)
            report |= {f"{name}{key}": value for key, value in errors.items()}
            if self.options.method in FITTED:
                if fit.unexplained_key_energy is not None:
                    report["unexplained_key_energy"] = fit.unexplained_key_energy
                report[f"{name}discarded_key_energy"] = fit.discarded_key_energy
                report[f"{name}discarded_value_energy"] = fit.discarded_value_energy
            result = {n: t for n, t in result.items() if f".{site}." not in n or ".relative_bias." in n}
            result |= {f"{prefix}{site}.{n}": t.cpu() for n, t in new.state_dict().items() if "relative_bias" not in n}
        stream.advance(teacher, student)
        return result, report

    def new_heads(
        self, layer: Layer, teacher: MQADecoderLayer, student: MQADecoderLayer, site: str, attention: str
    ) -> FittedHeads:
        stack, number = layer
        stream, old = self.streams[stack], getattr(teacher, site)
        if self.options.method not in FITTED:
            prefix = f"{stream.prefix}{site}."
            return pooled_heads(old, prefix, attention, self.heads, self.options.method, self.generator)
        new: Attention = getattr(student, site)
        seen: Seen | LatentSeen
        if isinstance(new, MQALatentAttention):
            seen = look_for_latent(stream, teacher, student, site, self.generator)
        else:
            seen = look(stream, teacher, student, site, self.heads[attention], self.generator)
        for said, where in doubts(old, seen, f"{stack} {site} of layer {number}".strip()).items():
            self.notes.setdefault(said, []).extend([where] if where else [])
        if isinstance(seen, LatentSeen):
            return fit_latent(stream, teacher, student, site, seen, self.generator)
        assert isinstance(new, MQAAttention)
        choose = self.pooled[stack].rope_frequencies is not None
        return fit_heads(old, seen, new.qk_head_dim, new.v_head_dim, choose)

    @torch.no_grad()
    @on_tensor_cores
    def survey(self, layer: Layer, tensors: Tensors) -> dict[str, Curves] | dict[str, LatentCurves]:
        """Pass the tokens through a layer; returns the error of each width of its attentions, by key of `heads_of`."""
        stream, teacher = self.enter(layer, tensors)
        curves: dict[str, Any] = {}
        for site, name in self.sites(layer[0]):
            if name in self.attentions and self.options.method == "latent":
                curves[name] = latent_curves(stream, teacher, site, self.generator)
            elif name in self.attentions:
                curves[name] = curves_of(stream, teacher, site, self.heads[name], self.generator)
        stream.advance(teacher, teacher)
        return curves

    @cached_property
    @torch.no_grad()
    def losses(self) -> dict[str, Any]:
        """Mean cross-entropy in nats per held-out token, before and after, of all parts of the text and of each (if
        there are several), and the number of tokens."""
        stream = self.last
        held = slice(stream.fitted_rows, len(stream.tokens))
        labels = stream.tokens[held, 1:].to(self.device)
        labels = labels.masked_fill(~stream.valid(held)[:, 1:], -100)
        counts = (labels != -100).sum(1).tolist()
        sums: dict[str, list[float]] = {}
        for name, states in (("before", stream.original), ("after", stream.states[held])):
            sums[name] = []
            for i, x in enumerate(states):
                logits = self.head(stream.shell.leave(x[None].to(self.device)))[0, :-1]
                logits = scaled_logits(logits, stream.config)
                sums[name].append(float(nn.functional.cross_entropy(logits.float(), labels[i], reduction="sum")))

        def mean(rows: Sequence[int]) -> dict[str, float]:
            total = max(1, sum(counts[i] for i in rows))
            return {name: sum(values[i] for i in rows) / total for name, values in sums.items()}

        found: dict[str, Any] = {**mean(range(len(counts))), "tokens": sum(counts)}
        names = list(dict.fromkeys(self.held_out))
        if len(names) > 1:
            found["parts"] = {p: mean([i for i, own in enumerate(self.held_out) if own == p]) for p in names}
        return found

    def warnings(self) -> list[str]:
        """Reasons to doubt the fit, a sentence each."""
        found = [text + (f": {', '.join(where[:4])}" if where else "") for text, where in self.notes.items()]
        rises = {name: loss["after"] - loss["before"] for name, loss in self.losses.get("parts", {}).items()}
        for name, rise in rises.items():
            others = [other for part, other in rises.items() if part != name]
            usual = sum(others) / len(others)
            if rise > FAR_WORSE * max(usual, SMALL_RISE):
                found.append(
                    f"the loss on {name} rises by {rise:.2f} nats per token, on the other calibration texts by "
                    f"{usual:.2f}; give it more weight if such text matters"
                )
        return found
