"""Fast decoding behind `generate()`.

transformers prepares prompts, masks, logits processors and stopping criteria as usual. Only the loop (`_sample`,
`_beam_search`) is replaced: an engine (`engine_mqa.py`) runs the model's `forward` over the prompt, then decode steps
of embedding, layers, logits (`step_mqa.py`), processors (`rules_mqa.py`), choice of the token and bookkeeping
(`sampling_mqa.py`, `beams_mqa.py`), all on the device and captured in a CUDA graph (`graph_mqa.py`). The host launches
steps and reads a little later whether all rows have ended. On a CPU the same step runs eagerly.

Calls that this loop does not support use transformers' loop; `model.decoding` holds the options.
"""

from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerationMixin
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .cache_mqa import KEYS
from .compat_mqa import TESTED, one_cache, self_check
from .engine_mqa import Engine, Generated
from .request_mqa import read_call
from .rules_mqa import CACHE, obstacle, unsupported

logger = logging.get_logger(__name__)

AHEAD = 2  # steps that the host launches before it checks whether the first of them was the last


@dataclass
class Decoding:
    """How `generate()` decodes; set on `model.decoding`.

    Args:
        enabled: use the fast loop where it is supported. `False`: always use transformers' loop.
        graphs: capture steps in CUDA graphs.
        kernels: use the Triton kernels where they are supported.
        checked: whether the model is known to run correctly with this version of transformers. False at first if
            transformers is newer than the tested versions; the first call of `generate()` then runs a self-check.
        cache_dtype: type of keys and values; `torch.float8_e4m3fn` halves the cache (with a scale per key and value,
            at a small loss of quality). Default: the model's type.
        keys: for models with latents: `"rebuilt"` caches only latents, and each step rebuilds the keys of all tokens;
            `"expanded"` also caches the keys; `"auto"` takes what an estimate says is faster and fits in memory. A
            [`DecodeCache`] passed to `generate()` has its own setting.

    Buffers and graph are kept for the next call of the same shape; [`Decoding.release`] frees them.
    """

    enabled: bool = True
    graphs: bool = True
    kernels: bool = True
    cache_dtype: torch.dtype | None = None
    keys: str = "auto"
    checked: bool = TESTED
    kept: list[Engine] = field(default_factory=list, init=False, repr=False, compare=False)  # one at most

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "keys" and value not in ("auto", *KEYS):
            raise ValueError(f"keys must be one of auto, {', '.join(KEYS)}, got {value!r}")
        super().__setattr__(name, value)

    @property
    def engine(self) -> Engine | None:
        """The engine of the last call, which the next call may reuse; `None` while a call uses it."""
        return next(iter(self.kept), None)

    def take(self) -> Engine | None:
        """Take the engine out, so that no other thread uses it, and no later call if this one is interrupted."""
        try:
            return self.kept.pop()
        except IndexError:
            return None

    def keep(self, engine: Engine) -> None:
        self.kept[:] = [engine]

    def release(self) -> None:
        """Free the buffers and the graph of the last call."""
        self.kept.clear()

    def __deepcopy__(self, memo: dict) -> "Decoding":
        return replace(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": []}


@torch.inference_mode(False)  # buffers and joined weights outlive the call
@torch.no_grad()
def decode(
    model: Any,
    input_ids: torch.Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    arguments: dict[str, Any],
    beams: bool,
    streamer: BaseStreamer | None,
) -> Generated:
    """Run a call that [`unsupported`] allows, and return what `_sample` or `_beam_search` returns."""
    device = model.lm_head.weight.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        call = read_call(model, input_ids, processors, criteria, config, arguments, beams)
        engine = Engine.acquire(model, call)
        engine.prefill(call)
        steps, last = StepsAhead(engine, streamer), call.max_new_tokens
        steps.follow()
        steps.settle(0)
        while engine.new_tokens < last:
            steps.settle(AHEAD if steps.on_device else 0)
            if steps.ended:
                break
            if call.out_of_time():
                if not engine.text.end_soon():
                    break
                last = engine.new_tokens + 1
            if engine.beyond_positions:
                steps.settle(0)  # a step after the end would look up a position that does not exist
                if steps.ended:
                    break
            engine.step()
            steps.follow()
        steps.settle(0)
        if streamer is not None:
            streamer.end()
        return engine.result(call)


class StepsAhead:
    """Launched steps that may not have run yet; the streamer gets the tokens of those that have."""

    def __init__(self, engine: Engine, streamer: BaseStreamer | None):
        self.engine, self.streamer, self.streamed = engine, streamer, 0
        self.on_device = engine.text.on_device
        self.pending: deque[tuple[torch.cuda.Event | None, torch.Tensor | None]] = deque()
        rows, count = engine.request.rows, 0 if streamer is None else AHEAD + 2
        self.slots = deque(torch.zeros(rows, dtype=torch.long, pin_memory=self.on_device) for _ in range(count))

    @property
    def ended(self) -> bool:
        """Whether all rows have ended. Ranks that share a model ask only of steps that are not pending: if one knew of
        a later step than another, it would launch fewer, and the others would wait for it forever.
        """
        known, shared = self.engine.ended, self.engine.text.ranks is not None
        return 0 < known <= self.engine.new_tokens - (len(self.pending) if shared else 0)

    def follow(self) -> None:
        """Record the step that was just launched."""
        token, event = None, None
        if self.streamer is not None:
            token = self.slots[0]
            self.slots.rotate()
            token.copy_(self.engine.text.newest, non_blocking=True)
        if self.on_device:
            event = torch.cuda.Event()
            event.record()
        self.pending.append((event, token))

    def settle(self, most: int) -> None:
        """Wait until at most `most` steps are pending; stream the tokens of finished ones."""
        while len(self.pending) > most:
            event, token = self.pending.popleft()
            if event is not None:
                event.synchronize()
            if self.streamer is None or token is None:
                continue
            if not self.engine.ended or self.streamed < self.engine.ended:
                self.streamer.put(token.clone())
                self.streamed += 1


class FastDecoding:
    """`generate()` with the loop of this file where it is supported; a base class before `GenerationMixin`."""

    decoding: Decoding
    relies_on: tuple[str, ...] = ()  # private methods of `GenerationMixin` that correct output needs

    def train(self, mode: bool = True) -> Any:
        """Set training mode, and free the memory kept for decoding."""
        if mode:
            self.decoding.release()
        return super().train(mode)  # type: ignore[misc]

    @wraps(GenerationMixin.generate)
    def generate(self, *arguments: Any, **options: Any) -> Any:
        given = one_cache(options.pop("past_key_values", None), options.pop("cache", None))
        if given is not None:
            options[CACHE] = given
        if not self.decoding.checked:
            self_check(self)
            self.decoding.checked = True
        if obstacle() is not None and self.decoding.enabled:
            logger.warning_once(f"generate() uses transformers' slower loop: {obstacle()}.")
        return super().generate(*arguments, **options)  # type: ignore[misc]

    def _sample(self, *arguments: Any, **options: Any) -> Any:
        if obstacle() is None:
            found = self._decode_fast(*arguments, beams=False, **options)
            if found is not None:
                return found
        return super()._sample(*arguments, **options)  # type: ignore[misc]

    def _beam_search(self, *arguments: Any, **options: Any) -> Any:
        if obstacle() is None:
            found = self._decode_fast(*arguments, beams=True, **options)
            if found is not None:
                return found
        return super()._beam_search(*arguments, **options)  # type: ignore[misc]

    def _decode_fast(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        *,
        beams: bool,
        **arguments: Any,
    ) -> Generated | None:
        """Decode with the fast loop; return `None` if transformers' loop is needed."""
        if not self.decoding.enabled:
            return None
        call = input_ids, logits_processor, stopping_criteria, generation_config
        reason = unsupported(self, *call, arguments, synced_gpus, beams)
        if reason is not None:
            logger.warning_once(f"generate() uses transformers' slower loop: {reason}.")
            return None
        return decode(self, *call, arguments, beams, streamer)
