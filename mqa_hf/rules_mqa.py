"""What the fast decoding loop supports, and logits processors as functions that can be captured in a graph.

B rows, V vocabulary, W columns of the token buffer, `cursor` the number of written columns
"""

import inspect
import math
from collections.abc import Callable, Hashable
from functools import cache as remembered
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import CacheLayerMixin
from transformers.generation import GenerationMixin, logits_process, stopping_criteria

from .cache_mqa import DecodeCache, KeyValueLayer, LatentLayer
from .compat_mqa import cache_name
from .parallel_mqa import STYLES, config_of_rank, forward_of_rank

CACHE = cache_name()
KNOWN_ARGUMENTS = {
    "attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "encoder_outputs",
    "decoder_attention_mask", "decoder_position_ids", "inputs_embeds", "tokenizer",
}  # fmt: skip
# (scores [B, V], tokens [B, W], cursor [1]) -> scores
LogitsRule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Processors that read only the scores.
STATELESS = {
    "TemperatureLogitsWarper", "TopPLogitsWarper", "TopKLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
    "EpsilonLogitsWarper", "EtaLogitsWarper", "LogitNormalization", "InfNanRemoveLogitsProcessor",
    "SuppressTokensLogitsProcessor", "EncoderRepetitionPenaltyLogitsProcessor",
}  # fmt: skip
# Classes of transformers that the loop reimplements, and the attributes it reads.
READ = {
    "RepetitionPenaltyLogitsProcessor": ("penalty", "prompt_ignore_length"),
    "NoRepeatNGramLogitsProcessor": ("ngram_size",),
    "SequenceBiasLogitsProcessor": ("sequence_bias",),
    "NoBadWordsLogitsProcessor": ("sequence_bias",),
    "MinLengthLogitsProcessor": ("min_length", "eos_token_id"),
    "MinNewTokensLengthLogitsProcessor": ("prompt_length_to_skip", "min_new_tokens", "eos_token_id"),
    "SuppressTokensAtBeginLogitsProcessor": ("begin_index", "begin_suppress_tokens"),
    "ForcedBOSTokenLogitsProcessor": ("bos_token_id",),
    "ForcedEOSTokenLogitsProcessor": ("max_length", "eos_token_id"),
    "MaxLengthCriteria": ("max_length",),
    "EosTokenCriteria": ("eos_token_id",),
    "MaxTimeCriteria": ("max_time", "initial_timestamp"),
}


def kind_of(thing: Any) -> str | None:
    """The class name of a logits processor or stopping criterion, if it is exactly a supported class."""
    name, modules = type(thing).__name__, (logits_process.__name__, stopping_criteria.__name__)
    known = name in STATELESS or all(hasattr(thing, attribute) for attribute in READ.get(name, ("",)))
    return name if type(thing).__module__ in modules and known else None


def columns(scores: torch.Tensor, tokens: torch.Tensor | int) -> torch.Tensor:
    """Which columns of the scores are among `tokens`, [V]."""
    return among(torch.arange(scores.shape[-1], device=scores.device), tokens)


def among(x: torch.Tensor, tokens: torch.Tensor | int) -> torch.Tensor:
    """Which entries of x are among `tokens`; `torch.isin` waits for the device if there are many."""
    return x == tokens if isinstance(tokens, int) else (x[..., None] == tokens).any(-1)


def marked(scores: torch.Tensor, tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Which columns of each row are among those `tokens` [B, W] that are `kept`, [B, V]."""
    V = scores.shape[-1]
    columns = torch.where(kept, tokens.clamp(max=V), V)
    return torch.zeros(len(scores), V + 1, dtype=torch.bool, device=scores.device).scatter_(1, columns, True)[:, :V]


def rule_of(processor: Any) -> tuple[Hashable, LogitsRule] | None:
    """A logits processor as a function that can be captured, with a hashable key; `None` if unsupported."""
    kind, p = kind_of(processor), processor
    if kind in STATELESS:
        return as_key(p), lambda scores, tokens, cursor: p(tokens, scores)
    if kind == "RepetitionPenaltyLogitsProcessor":

        def penalise(scores: torch.Tensor, tokens: torch.Tensor, cursor: torch.Tensor) -> torch.Tensor:
            first, at = p.prompt_ignore_length, torch.arange(tokens.shape[1], device=tokens.device)
            after = at >= (first.to(at.device)[:, None] if isinstance(first, torch.Tensor) else first or 0)
            seen = marked(scores, tokens, (after & (at < cursor)).expand_as(tokens))
            return torch.where(seen, torch.where(scores < 0, scores * p.penalty, scores / p.penalty), scores)

        return as_key(p), penalise
    if kind == "NoRepeatNGramLogitsProcessor":
        n = p.ngram_size

        def no_repeat(scores: torch.Tensor, tokens: torch.Tensor, cursor: torch.Tensor) -> torch.Tensor:
            if n > tokens.shape[1]:  # longer than the text can become
                return scores
            windows = tokens.unfold(1, n, 1)
            last = (cursor - n + 1).clamp(min=0) + torch.arange(n - 1, device=tokens.device)
            same = (windows[..., :-1] == tokens.gather(1, last.expand(len(tokens), -1))[:, None]).all(-1)
            same &= torch.arange(windows.shape[1], device=tokens.device) + n <= cursor
            return scores.masked_fill(marked(scores, windows[..., -1], same), -math.inf)

        return as_key(p), no_repeat
    if kind in ("SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor"):
        if any(len(sequence) > 1 for sequence in p.sequence_bias):
            return None
        return (kind, as_key(p.sequence_bias)), lambda scores, tokens, cursor: p(tokens, scores)
    if kind in ("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor"):
        least = p.min_length if hasattr(p, "min_length") else p.prompt_length_to_skip + p.min_new_tokens

        def prolong(scores: torch.Tensor, tokens: torch.Tensor, cursor: torch.Tensor) -> torch.Tensor:
            return scores.masked_fill((cursor < least) & columns(scores, p.eos_token_id), -math.inf)

        return as_key(p), prolong
    if kind == "SuppressTokensAtBeginLogitsProcessor":

        def suppress(scores: torch.Tensor, tokens: torch.Tensor, cursor: torch.Tensor) -> torch.Tensor:
            return scores.masked_fill((cursor == p.begin_index) & columns(scores, p.begin_suppress_tokens), -math.inf)

        return as_key(p), suppress
    if kind in ("ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor"):
        first_token = kind == "ForcedBOSTokenLogitsProcessor"
        when = 1 if first_token else p.max_length - 1
        which = p.bos_token_id if first_token else p.eos_token_id

        def force(scores: torch.Tensor, tokens: torch.Tensor, cursor: torch.Tensor) -> torch.Tensor:
            forced = torch.where(columns(scores, which), 0.0, -math.inf)
            return torch.where(cursor == when, forced, scores)

        return as_key(p), force
    return None


def as_key(value: Any) -> Hashable:
    """A hashable key that tells two processors or settings apart."""
    if isinstance(value, torch.Tensor):
        return tuple(value.flatten().tolist()), value.dtype
    if isinstance(value, dict):
        return tuple(sorted((str(k), as_key(v)) for k, v in value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(map(as_key, value))
    if isinstance(value, (int, float, str, bool, type(None), torch.dtype, torch.device)):
        return value
    if hasattr(value, "item"):  # a numpy scalar
        return value.item()
    return type(value).__name__, as_key(vars(value)) if hasattr(value, "__dict__") else repr(value)


def altered(module: nn.Module) -> bool:
    """Whether a module has hooks or a replaced `forward`, which a decode step would skip."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    harmless = ("output_capturing", "make_inputs_require_grads")  # transformers leaves these behind
    changes = [
        h
        for h in hooks
        if not any(n in f"{getattr(h, '__module__', '')}.{getattr(h, '__qualname__', '')}" for n in harmless)
    ]
    forward = vars(module).get("forward")
    return (
        bool(changes)
        or hasattr(module, "_hf_hook")
        or not (forward is None or hasattr(forward, "_torchdynamo_orig_callable") or forward_of_rank(module))
    )


def cache_of_rank(cache: DecodeCache, stack: Any) -> bool:
    """Whether a cache has as many heads as this rank."""
    heads = config_of_rank(stack).num_key_value_heads
    return all(not isinstance(held, KeyValueLayer) or held.keys.shape[1] == heads for held in cache.decode_layers)


def undivided_only(model: Any, criteria: StoppingCriteriaList, arguments: dict[str, Any]) -> str | None:
    """Why a call of a model that is divided among ranks needs transformers' loop, or `None`."""
    cache = arguments.get(CACHE)
    reasons = (
        (any(decoder_stack(model).config.expert_layers), "experts are divided among ranks"),
        (getattr(model, "hf_quantizer", None) is not None, "the model is quantised and divided among ranks"),
        (not set(model.tp_plan.values()) <= STYLES, "the plan of tensor parallelism is not this package's"),
        (
            isinstance(cache, DecodeCache) and not cache_of_rank(cache, decoder_stack(model)),
            "the cache has the heads of all ranks",
        ),
        (any(hasattr(criterion, "max_time") for criterion in criteria), "clocks of ranks differ, and max_time is set"),
    )
    return next((reason for holds, reason in reasons if holds), None)


def unsupported(
    model: Any,
    input_ids: torch.Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    arguments: dict[str, Any],
    synced: bool,
    beams: bool,
) -> str | None:
    """Why a call needs transformers' loop, or `None`."""
    stack = decoder_stack(model).config
    if synced or config.is_assistant:
        return "synced_gpus or assisted decoding is requested"
    if model.training:
        return "the model is in training mode"
    if (getattr(model, "_tp_size", None) or 1) > 1:
        reason = undivided_only(model, criteria, arguments)
        if reason is not None:
            return reason
    for name in ("output_attentions", "output_hidden_states", "output_scores", "output_logits"):
        if getattr(config, name):
            return f"{name} is requested"
    if beams and config.return_dict_in_generate:
        return "beam indices are requested"
    if not config.use_cache:
        return "use_cache is off"
    if config.cache_implementation not in (None, "dynamic"):
        return f"cache_implementation is {config.cache_implementation!r}"
    extra = [name for name, value in arguments.items() if name not in KNOWN_ARGUMENTS and value is not None]
    if extra:
        return f"the fast loop does not support {', '.join(extra)}"
    cache = arguments.get(CACHE)
    given = cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length() > 0)
    if given and not (isinstance(cache, DecodeCache) and not beams):
        return f"the cache is a {type(cache).__name__}"
    alone = given and isinstance(cache, DecodeCache) and cache.positions is not None
    if alone and not contiguous_positions(model, arguments, cache):
        return "position_ids have gaps, and the cache holds latents without keys"
    if stack.rope_by_length:
        return "rotary frequencies depend on the length of the text"
    for processor in processors:
        if rule_of(processor) is None:
            return f"{type(processor).__name__} is in use"
    kinds = [kind_of(criterion) for criterion in criteria]
    if None in kinds:
        return f"{type(criteria[kinds.index(None)]).__name__} is in use"
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        return "the model is spread over several devices"
    device = next(iter(devices))
    if input_ids.device != device:
        return "prompt and model are on different devices"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    if "prepare_inputs_for_generation" in vars(model) or any(map(altered, model.modules())):
        return "modules have hooks or a replaced forward"
    if kinds.count("EosTokenCriteria") > 1:
        return "there are several EosTokenCriteria"
    several = model.config.is_encoder_decoder
    if several and config.prefill_chunk_size is not None:
        return "prefill_chunk_size is set"
    for name, fits in (
        ("attention_mask", contiguous if several else left_padded),
        ("decoder_attention_mask", left_padded),
    ):
        mask = arguments.get(name)
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2 and fits(mask)):
            return f"{name} masks more than padding" + (" on the left" if fits is left_padded else "")
    return None


def takes(owner: type, name: str, *parameters: str) -> bool:
    """Whether a method exists and begins with these parameters after `self`."""
    method = getattr(owner, name, None)
    if method is None:
        return False
    found = list(inspect.signature(method).parameters)
    return found[1 : 1 + len(parameters)] == list(parameters)


def mentions(owner: type, name: str, attribute: str) -> bool:
    """Whether the code of a method mentions an attribute."""
    method = getattr(owner, name, None)
    return method is not None and attribute in inspect.unwrap(method).__code__.co_names


@remembered
def obstacle() -> str | None:
    """Why the fast loop cannot be used with this version of transformers, or `None`."""
    call = ("input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus")
    checks = {
        "GenerationMixin._sample": takes(GenerationMixin, "_sample", *call, "streamer"),
        "GenerationMixin._beam_search": takes(GenerationMixin, "_beam_search", *call),
        "GenerationMixin._prefill": takes(
            GenerationMixin, "_prefill", "input_ids", "generation_config", "model_kwargs"
        ),
        "the mark of the caller's cache": mentions(
            GenerationMixin, "_prepare_cache_for_generation", "_is_user_defined"
        ),
        "the padding token of generate()": mentions(GenerationMixin, "_prepare_special_tokens", "_pad_token_tensor"),
        "CacheLayerMixin": not any(getattr(kind, "__abstractmethods__", None) for kind in (KeyValueLayer, LatentLayer))
        and takes(CacheLayerMixin, "get_mask_sizes", "query_length"),
    }
    changed = [name for name, holds in checks.items() if not holds]
    if not changed:
        return None
    return f"transformers {transformers.__version__} has changed {', '.join(changed)}"


def contiguous(mask: torch.Tensor) -> bool:
    """Whether the ones of each row [B, S] are contiguous."""
    padded = nn.functional.pad(mask.bool().int(), (1, 1))
    return bool(((padded.diff(dim=1) == 1).sum(1) == 1).all())


def left_padded(mask: torch.Tensor) -> bool:
    """Whether the ones of each row [B, T] are contiguous and reach the end."""
    return bool(mask[:, -1].all()) and contiguous(mask)


def contiguous_positions(model: Any, arguments: dict[str, Any], cache: DecodeCache | None = None) -> bool:
    """Whether each token that is not padding has the position after the previous token's, as a step that rebuilds all
    keys assumes. Cached tokens count, too, if the cache holds no keys.
    """
    prefix = "decoder_" if model.config.is_encoder_decoder else ""
    mask, positions = arguments.get(prefix + "attention_mask"), arguments.get(prefix + "position_ids")
    if cache is not None and cache.positions is not None and cache.get_seq_length():
        held = cache.get_seq_length()
        if positions is None:  # the model's default
            positions = torch.arange(held + 1 if mask is None else mask.shape[1])[None]
            if mask is not None and decoder_stack(model).config.positions_from_mask:
                positions = mask.long().cumsum(1) - 1
        new = positions.shape[1] - held if positions.shape[1] > held else positions.shape[1]
        known, positions = cache.positions[:, :held], positions[:, -new:].to(cache.positions.device)
        known = known[:: max(len(known) // len(positions), 1)] if len(positions) > 1 else known
        positions = torch.cat((known, positions.expand(len(known), -1)), 1)
    if positions is None:
        return True
    steps = positions.diff(dim=1) == 1
    if mask is not None:
        seen = nn.functional.pad(mask.bool(), (max(positions.shape[1] - mask.shape[1], 0), 0), value=True)
        seen = seen[:, -positions.shape[1] :].to(steps.device)
        steps = steps | ~(seen[:, 1:] & seen[:, :-1])
    return bool(steps.all())


def decoder_stack(model: Any) -> Any:
    """The decoder: the stack of layers that generates."""
    return model.model.decoder if model.config.is_encoder_decoder else model.model
