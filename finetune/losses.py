"""Losses of a student: next token, teacher's distribution, hidden states, attention outputs.

    B batch, T tokens, d hidden size, V vocabulary, N = B·T

The losses are computed inside the student's own `forward`, which [`Objective.attach`] replaces during training, so
that wrappers (DDP, FSDP, DeepSpeed, PEFT, `torch.compile`) have its parameters in place. Logits are computed in chunks
of tokens and, if there are many, recomputed in the backward pass, so that neither the student's nor the teacher's
[N, V] is ever allocated.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mqa_hf.base.errors import MQAError

from .data import IGNORED
from .options import LOSSES

CHUNK_ELEMENTS = 2**27  # logits of one chunk: half a gigabyte in float32


def core(model: nn.Module) -> PreTrainedModel:
    """The model with its head, without the PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, return-value]


def logits_size(model: PreTrainedModel) -> int:
    weight: Any = model.get_output_embeddings().weight
    return weight.shape[0]


def logits_of(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [..., V] in float32 of the last hidden state [..., d], as the class's own `forward` makes them.

    [`check_head`] verifies this for the class.
    """
    scale, cap = after_head(model)
    logits = model.get_output_embeddings()(hidden).float()
    if scale != 1:
        logits = logits * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap


def after_head(model: PreTrainedModel) -> tuple[float, float | None]:
    """The scale of the logits, and the soft cap applied afterwards."""
    config = model.config.get_text_config(decoder=True)
    scaling = getattr(config, "logits_scaling", 1.0)
    divided = 1 / scaling if config.model_type != "hyperclovax" else scaling  # which multiplies by it
    scale = getattr(config, "logit_scale", 1.0) * divided
    return scale, getattr(config, "logit_softcap", None) or getattr(config, "final_logit_softcapping", None)


def check_liger() -> None:
    if importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available():
        raise MQAError("`liger` needs a CUDA device and Liger's kernels: pip install liger-kernel")


def uncompiled() -> Any:
    """A context in which compiled modules run as they are: for calls of other shapes or without gradients, which would
    be compiled for themselves."""
    return torch.compiler.set_stance("force_eager")


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raise MQAError if the class computes other logits than [`logits_of`]."""
    device = model.get_output_embeddings().weight.device
    words = logits_size(model)
    ids = torch.arange(8, device=device)[None] % words
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if getattr(model.config, "num_mel_bins", None):
        stack = model.config.encoder
        shape = 1, stack.num_mel_bins, 2 * stack.max_position_embeddings
        inputs = {"input_features": torch.zeros(shape, device=device), "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    training = model.training
    model.eval()
    with uncompiled():
        ours = logits_of(model, model.base_model(**inputs).last_hidden_state)
        theirs = model(**inputs).logits.float()
    model.train(training)
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
    if not error < 1e-2:
        raise MQAError(
            f"{type(model).__name__} changes its logits after the head in an unsupported way (they differ by "
            f"{error:.1%}); convert with `target` mqa, which folds this into the weights"
        )


def kept_elements(device: torch.device, chunk: int) -> int:
    """Number of logits kept for the backward pass instead of recomputed: a twentieth of the device's memory, at 4
    bytes each for student and teacher; at least a chunk."""
    if device.type != "cuda":
        return chunk
    return max(chunk, torch.cuda.get_device_properties(device).total_memory // 20 // 8)


def chunk_losses(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    student: Callable[[torch.Tensor], torch.Tensor],
    teacher: Callable[[torch.Tensor], torch.Tensor] | None,
    learn_lm: bool = True,
    sums: "Callable[..., torch.Tensor] | None" = None,
) -> torch.Tensor:
    """Sums over tokens with a label, in nats: cross-entropy, and KL(teacher ‖ student) at temperature 1.

    Args:
        hidden: [n, d] of the student.
        labels: [n].
        teacher_hidden: [n, d'] of the teacher.
        student, teacher: from hidden states to logits.
        learn_lm: whether the cross-entropy needs gradients.
        sums: [`sums_of_logits`], or a compiled form of it.

    Returns:
        [2].
    """
    told = None
    if teacher is not None and teacher_hidden is not None:
        with torch.no_grad():
            told = teacher(teacher_hidden)
    return (sums or sums_of_logits)(student(hidden), labels, told, learn_lm)


def sums_of_logits(
    logits: torch.Tensor, labels: torch.Tensor, told: torch.Tensor | None, learn_lm: bool
) -> torch.Tensor:
    """[`chunk_losses`] of the logits [n, V] of student and teacher."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    lm = F.nll_loss(log_p if learn_lm else log_p.detach(), labels, ignore_index=IGNORED, reduction="sum")
    if told is None:
        return torch.stack((lm, lm.detach() * 0))
    log_q = F.log_softmax(told.detach().float(), dim=-1)
    q = log_q.exp()
    negative_entropy = (q * log_q).sum(-1)
    divergence = negative_entropy - (q * log_p).sum(-1)  # not as a dot product: autocast makes those in 16 bits
    return torch.stack((lm, (divergence * (labels != IGNORED)).sum()))


@dataclass
class Objective:
    """A weighted sum of losses, each in its own unit per token.

    lm         | cross-entropy of the next token, nats
    kl         | KL(teacher ‖ student) of the next token's distribution at temperature 1, nats (arXiv 1503.02531)
    hidden     | 1 - cosine of the hidden states after each layer, mean over layers (as DistilBERT, arXiv 1910.01108)
    attention  | relative squared error of each attention layer's output at a token, where it is given the teacher's
               | input; mean over layers. It stands alone, and trains attention layers, each by itself.

    Args:
        weights: weights of the losses by name.
        teacher: frozen; needed by all but `lm`. Called through its sharding wrapper, like the student.
        chunk_elements: maximum number of logits at once.
        liger: train with Liger's fused head and loss; evaluation does not use them.
        compile: compile the losses of a chunk.
    """

    weights: dict[str, float]
    teacher: nn.Module | None = None
    chunk_elements: int = CHUNK_ELEMENTS
    liger: bool = False
    compile: bool = False
    _seen: dict[str, Any] = field(default_factory=dict, repr=False)  # caught by hooks in a forward pass
    _given: dict[str, Any] = field(default_factory=dict, repr=False)  # inputs that hooks substitute

    def __post_init__(self) -> None:
        unknown = set(self.weights) - set(LOSSES)
        if unknown or not self.weights or min(self.weights.values()) <= 0:
            raise MQAError(f"`loss` takes {', '.join(LOSSES)}, each with a weight above 0; got {self.weights}")
        if set(self.weights) - {"lm"} and self.teacher is None:
            raise MQAError(f"`loss` {', '.join(self.weights)} needs a teacher; pass `teacher`, or `loss` lm")
        if self.layerwise and len(self.weights) > 1:
            raise MQAError(
                "`loss` attention gives each layer the teacher's input, so it cannot be combined with other losses; "
                "use it alone, or first with `attention_tokens`"
            )
        if self.liger:
            check_liger()

    @functools.cached_property
    def _sums(self) -> Callable[..., torch.Tensor]:
        return torch.compile(sums_of_logits) if self.compile else sums_of_logits

    @property
    def layerwise(self) -> bool:
        return "attention" in self.weights

    @contextmanager
    def attach(self, student: nn.Module) -> Iterator[None]:
        """Replace `forward` of student and teacher by [`student_forward`] and [`teacher_forward`] in this context."""
        inner = core(student)
        models = [inner, *([] if self.teacher is None else [core(self.teacher)])]
        if self.teacher is not None:
            check_same(inner, models[1])
        for model in models:
            check_head(model)
        hooks = []
        if self.layerwise:
            for name in attention_names(inner, models[1]):
                hooks += [
                    models[1].get_submodule(name).register_forward_hook(self._catch(name), with_kwargs=True),
                    inner.get_submodule(name).register_forward_pre_hook(self._replace(name), with_kwargs=True),
                    inner.get_submodule(name).register_forward_hook(self._catch(name), with_kwargs=True),
                ]
        inner.forward = functools.partial(self.student_forward, inner)
        if self.teacher is not None:
            models[1].forward = functools.partial(self.teacher_forward, models[1])
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for model in models:
                model.__dict__.pop("forward", None)

    def _catch(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            self._seen[name] = x, kwargs.get("encoder_hidden_states"), y

        return hook

    def _replace(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            if name not in self._given:
                return args, kwargs
            x, encoded, _ = self._given[name]
            kwargs = {**kwargs, **({} if encoded is None else {"encoder_hidden_states": encoded})}
            return (x, *args[1:]) if args else args, kwargs if args else {**kwargs, "hidden_states": x}

        return hook

    def teacher_forward(
        self, model: PreTrainedModel, hidden: torch.Tensor | None = None, **inputs: torch.Tensor
    ) -> Any:
        """The teacher's hidden states for a batch, with the inputs and outputs of its attention layers; or, for
        `hidden` [n, d], its logits [n, V]."""
        if hidden is not None:
            return logits_of(model, hidden)
        self._seen = {}
        states = "hidden" in self.weights
        outputs = model.base_model(**inputs, use_cache=False, output_hidden_states=states)
        seen, self._seen = self._seen, {}
        return {"last": outputs.last_hidden_state, "states": hidden_states(outputs), "attention": seen}

    def student_forward(
        self,
        model: PreTrainedModel,
        labels: torch.Tensor,
        count: torch.Tensor | float = 1.0,
        taught: dict[str, Any] | None = None,
        **inputs: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The losses of a batch.

        Args:
            labels: [B, T], the token to predict at each position; already shifted.
            count: predicted tokens of the whole step, over all processes.
            taught: output of [`teacher_forward`] for the batch.

        Returns:
            `loss`: the weighted sum of all losses, divided by `count`. `sums`: each of [`LOSSES`], then the tokens.
        """
        self._seen, self._given = {}, {} if taught is None else taught["attention"]
        states = "hidden" in self.weights
        outputs = model.base_model(**inputs, use_cache=False, output_hidden_states=states)
        counted = labels != IGNORED
        zero = outputs.last_hidden_state.new_zeros((), dtype=torch.float32)
        if isinstance(model, FSDPModule) or hasattr(next(model.parameters()), "ds_id"):
            # FSDP2 and ZeRO gather a layer's weights again when the backward pass comes to its output.
            zero = outputs.last_hidden_state.sum().float() * 0.0
        losses = dict.fromkeys(LOSSES, zero)
        if self.layerwise:
            losses["attention"] = self.attention_loss(counted, inputs.get("attention_mask"))
            if not torch.is_grad_enabled():  # in evaluation, also run the model with its own inputs
                self._given = {}
                outputs = model.base_model(**inputs, use_cache=False, output_hidden_states=states)
        if states:
            assert taught is not None
            pairs = list(zip(hidden_states(outputs), taught["states"], strict=True))
            away = [1 - F.cosine_similarity(s.float(), t.float(), dim=-1) for s, t in pairs]
            losses["hidden"] = (torch.stack(away).mean(0) * counted).sum()
        if not self.layerwise or not torch.is_grad_enabled():
            losses["lm"], losses["kl"] = self.token_losses(model, outputs.last_hidden_state, labels, taught)
        self._seen = {}  # keep `_given`: checkpointed layers run again in the backward pass
        total = sum((self.weights[name] * losses[name] for name in self.weights), zero)
        sums = torch.stack([*(losses[name].detach() for name in LOSSES), counted.sum().float()])
        return {"loss": total / count, "sums": sums}

    def token_losses(
        self, model: PreTrainedModel, hidden: torch.Tensor, labels: torch.Tensor, taught: dict[str, Any] | None
    ) -> torch.Tensor:
        """[2]: the sums of [`chunk_losses`] over all chunks of a batch; `hidden` [B, T, d]."""
        if self.liger and torch.is_grad_enabled():
            return self.liger_losses(model, hidden.flatten(0, 1), labels.flatten(), taught)
        size = max(1, self.chunk_elements // logits_size(model))
        student, teacher = functools.partial(logits_of, model), None
        pieces: list[Sequence[Any]] = [hidden.flatten(0, 1).split(size), labels.flatten().split(size)]
        if taught is not None:
            assert self.teacher is not None
            frozen = self.teacher

            def teacher(states: torch.Tensor) -> torch.Tensor:
                return frozen(hidden=states)

            pieces.append(taught["last"].flatten(0, 1).split(size))
        else:
            pieces.append([None] * len(pieces[0]))
        again = labels.numel() * logits_size(model) > kept_elements(hidden.device, self.chunk_elements)
        total: Any = 0
        for states, targets, told in zip(*pieces):
            given = (states, targets, told, student, teacher, "lm" in self.weights, self._sums)
            if again and torch.is_grad_enabled():
                total = total + checkpoint(chunk_losses, *given, use_reentrant=False)
            else:
                total = total + chunk_losses(*given)
        return total

    def liger_losses(
        self, model: PreTrainedModel, hidden: torch.Tensor, labels: torch.Tensor, taught: dict[str, Any] | None
    ) -> torch.Tensor:
        """[2]: the same sums by Liger's kernels (arXiv 2410.10989), for losses with a weight; `hidden` [N, d]."""
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

        scale, cap = after_head(model)
        head: Any = model.get_output_embeddings()
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden.dtype
        hidden = (hidden * scale).to(dtype)
        weight = head.weight.to(dtype)
        losses = [hidden.new_zeros((), dtype=torch.float32)] * 2
        if "lm" in self.weights:
            entropy = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum", softcap=cap)
            losses[0] = entropy(weight, hidden, labels, head.bias).float()
        if "kl" in self.weights:
            assert taught is not None
            teacher = core(self.teacher)  # type: ignore[arg-type]
            told: Any = teacher.get_output_embeddings()
            if cap is not None or head.bias is not None or hasattr(told.weight, "to_local"):
                raise MQAError("`liger` does not support KL with capped or biased logits or a sharded teacher")
            states = (taught["last"].flatten(0, 1) * after_head(teacher)[0]).to(dtype)
            divergence = LigerFusedLinearJSD(jsd_beta=0.0, ignore_index=IGNORED)
            mean = divergence(hidden, weight, states, told.weight.to(dtype), labels)
            losses[1] = mean.float() * (labels != IGNORED).sum()
        return torch.stack(losses)

    def attention_loss(self, counted: torch.Tensor, source_mask: torch.Tensor | None) -> torch.Tensor:
        """The sum over tokens of each attention layer's relative squared error, mean over layers.

        Args:
            counted: [B, T], mask of the decoder tokens that count.
            source_mask: [B, S], mask of the encoder's tokens.
        """
        errors = []
        for name, (_, _, y) in self._seen.items():
            target = self._given[name][2].float()
            encoder = source_mask is not None and ".encoder." in f".{name}"
            weight = source_mask.float() if encoder and source_mask is not None else counted.float()
            # Relative per token, so that no value depends on the rest of the batch.
            error = (y.float() - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)
            errors.append((error * weight).sum() * (counted.sum() / weight.sum().clamp_min(1)))
        return torch.stack(errors).mean()


def hidden_states(outputs: Any) -> tuple[torch.Tensor, ...]:
    """Hidden states after the embedding and each layer, of the decoder if there are two stacks."""
    found = outputs.get("hidden_states") or outputs.get("decoder_hidden_states")
    return tuple(found or ())


def attention_names(student: nn.Module, teacher: nn.Module) -> list[str]:
    """The converted attentions: modules whose parameters differ in shape from the teacher's or, with latents, in
    name."""
    shapes = {name: p.shape for name, p in teacher.named_parameters()}
    known = {name for name, _ in teacher.named_modules()}
    names = set()
    for name, parameter in student.named_parameters():
        owner = name.rpartition(".")[0]
        parts = next(student.get_submodule(owner).children(), None)
        module = owner if parts is not None else owner.rpartition(".")[0]  # some parameters are the attention's own
        if "layers." in name and module in known and shapes.get(name) != parameter.shape:
            names.add(module)
    if not names:
        raise MQAError(
            "`loss` attention and `attention_tokens` need a student whose attention layers have the names of the "
            "teacher's and other shapes"
        )
    return [name for name, _ in student.named_modules() if name in names]


def check_same(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise MQAError if teacher and student differ in vocabulary or number of layers."""
    for what, one, other in (
        ("words", *map(logits_size, (student, teacher))),
        ("layers", *(getattr(m.config, "num_hidden_layers", 0) for m in (student, teacher))),
    ):
        if one != other:
            raise MQAError(f"the student has {one} {what} and the teacher {other}; they must be of the same model")
