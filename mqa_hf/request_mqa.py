"""The request that a call of `generate()` makes to the fast decoding loop.

B rows decoded, k rows of each prompt (beams or returned sequences), P = B / k prompts, T tokens of the prompt
"""

import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, MaxTimeCriteria, StoppingCriteriaList

from .cache_mqa import DecodeCache
from .latent_step_mqa import keys_to_keep
from .rules_mqa import CACHE, LogitsRule, rule_of

ROOM = 2048  # at most this many positions beyond the prompt are allocated at first


def round_up(positions: int) -> int:
    """Round up to a multiple of 64."""
    return -(-positions // 64) * 64


def first_capacity(prompt: int, new: int) -> int:
    """Positions to allocate at first, given the maximum number of new tokens."""
    return round_up(prompt + min(new, ROOM))


@dataclass(frozen=True)
class BeamOptions:
    """How beams are compared; `early_stopping` and `length_penalty` are those of transformers."""

    early_stopping: bool | str
    length_penalty: float


@dataclass(frozen=True)
class Request:
    """Everything that an engine is built for: calls with equal requests can share its buffers and its graph.

    Attributes:
        rows: rows decoded, B.
        copies: rows of each prompt, k.
        rules: hashable keys of the logits processors, from [`rule_of`].
        eos: token ids that end a row; `pad` is written after them.
        sample: whether tokens are sampled.
        beams: `None` without beam search.
        source_capacity: allocated positions of an encoder's output; 0 without an encoder.
        cache_dtype: type of keys and values of self-attention.
        keys: as in [`DecodeCache`].
        graphs, kernels: as in [`Decoding`].
    """

    rows: int
    copies: int
    rules: tuple[Hashable, ...]
    eos: tuple[int, ...] | None
    pad: int | None
    sample: bool
    beams: BeamOptions | None
    source_capacity: int
    cache_dtype: torch.dtype
    keys: str
    graphs: bool
    kernels: bool

    @property
    def fill(self) -> int:
        """The token in columns that are not written yet."""
        if self.beams is None:
            return self.pad or 0
        return -1 if self.eos is None else self.pad or self.eos[0]


@dataclass(frozen=True, eq=False)
class Call:
    """One call: its request, and what is specific to the call.

    Attributes:
        rules: logits processors as functions, in the order of `request.rules`.
        input_ids: [B, T].
        arguments: arguments of the model's `forward`, for one row of each prompt.
        cache: the caller's cache, if it is a `DecodeCache`.
        prompt: positions of the prompt.
        limit: maximum number of tokens of a text, the prompt included.
        clocks: stopping criteria on time.
    """

    request: Request
    rules: tuple[LogitsRule, ...]
    input_ids: torch.Tensor
    arguments: dict[str, Any]
    config: GenerationConfig
    cache: DecodeCache | None
    prompt: int
    limit: int
    clocks: tuple[MaxTimeCriteria, ...]

    @property
    def max_new_tokens(self) -> int:
        return self.limit - self.input_ids.shape[1]

    @property
    def capacity(self) -> int:
        """Positions to allocate at first."""
        return first_capacity(self.prompt, self.max_new_tokens)

    def out_of_time(self) -> bool:
        return any(time.time() - clock.initial_timestamp > clock.max_time for clock in self.clocks)


def read_call(
    model: Any,
    input_ids: torch.Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    arguments: dict[str, Any],
    beams: bool,
) -> Call:
    """Read a call of `_sample` or `_beam_search` (`beams`) that [`unsupported`] allows.

    Raises:
        ValueError: if the caller's cache has another number of rows.
    """
    options, dtype = model.decoding, model.lm_head.weight.dtype
    copies = max(config.num_beams, config.num_return_sequences)
    B, T = input_ids.shape
    cache = arguments.get(CACHE)
    cache = cache if isinstance(cache, DecodeCache) else None
    if cache is not None and cache.rows != B:
        raise ValueError(f"the DecodeCache has {cache.rows} rows for a batch of {B}; make one with rows={B}")
    arguments = {name: one_of_each(value, copies) for name, value in arguments.items() if value is not None}
    prompt, source = T, 0
    if model.config.is_encoder_decoder:
        source = arguments["encoder_outputs"][0].shape[1]
    elif "inputs_embeds" in arguments:
        prompt = arguments["inputs_embeds"].shape[1]
    if cache is not None:
        prompt = max(prompt, cache.get_seq_length() + 1)
    keys, rules = [], []
    for processor in processors:
        found = rule_of(processor)
        assert found is not None  # `unsupported` has checked
        keys.append(found[0])
        rules.append(found[1])
    eos = next((c.eos_token_id for c in criteria if hasattr(c, "eos_token_id")), None)
    pad = config._pad_token_tensor
    limit = min([config.max_length, *(c.max_length for c in criteria if hasattr(c, "max_length"))])
    if cache is not None:
        kept = cache.keys
    else:
        kept = keys_to_keep(model, arguments, B, first_capacity(prompt, limit - T))
    request = Request(
        rows=B,
        copies=copies,
        rules=tuple(keys),
        eos=None if eos is None else tuple(eos.flatten().tolist()),
        pad=None if pad is None else int(pad),
        sample=config.do_sample,
        beams=BeamOptions(config.early_stopping, config.length_penalty) if beams else None,
        source_capacity=round_up(source),
        cache_dtype=options.cache_dtype or dtype,
        keys=kept,
        graphs=options.graphs,
        kernels=options.kernels,
    )
    return Call(
        request=request,
        rules=tuple(rules),
        input_ids=input_ids,
        arguments=arguments,
        config=config,
        cache=cache,
        prompt=prompt,
        limit=limit,
        clocks=tuple(c for c in criteria if hasattr(c, "max_time")),
    )


def one_of_each(value: Any, copies: int) -> Any:
    """Undo the repetition of an argument for each of `copies` rows."""
    if copies == 1:
        return value
    if isinstance(value, torch.Tensor):
        return value[::copies] if value.ndim and len(value) > 1 else value
    if hasattr(value, "last_hidden_state"):
        return type(value)(last_hidden_state=value.last_hidden_state[::copies])
    return value
