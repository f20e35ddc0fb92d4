"""Fast decoding behind `generate()`.

transformers prepares everything as ever: prompts, masks, logits processors, stopping criteria. What is replaced is the
loop (`_sample`, `_beam_search`): an engine (`engine_mqa.py`) runs the model's own `forward` over the prompt, and then
steps of embedding, layers, logits (`step_mqa.py`), processors (`rules_mqa.py`), choice of the token and bookkeeping
(`sampling_mqa.py`, `beams_mqa.py`), all on the device and captured in a CUDA graph (`graph_mqa.py`). The host launches
steps and reads whether all rows have ended a little later. On a CPU the same step runs eagerly.

What the loop cannot do goes to transformers' own loop; `model.decoding` has the switches.
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

AHEAD = 2  # steps that the host launches before it looks whether the first of them was the last


@dataclass
class Decoding:
    """How a model's `generate()` decodes; `model.decoding` is one.

    Args:
        enabled: whether the fast loop is used where it can be. `False`: transformers' own loop, always.
        graphs: whether steps are captured in CUDA graphs.
        kernels: whether the Triton kernels are used where they can be.
        checked: whether what transformers computes with this model is known to be right: false at first where
            transformers is newer than any that was tested; the first call of `generate()` then looks.
        cache_dtype: of keys and values; `torch.float8_e4m3fn` halves the cache (with a scale per key and value, which
            costs a little quality). Default: that of the model.
        keys: of a model with latents, whether a step rebuilds the keys of all tokens from them (`"rebuilt"`: the cache
            holds latents alone) or the cache holds the keys, too (`"expanded"`); `"auto"` takes the faster way that
            the memory has room for. A [`DecodeCache`] that is given has its own way.

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
        """The engine of the last call, which the next one may use; `None` while a call has it."""
        return next(iter(self.kept), None)

    def take(self) -> Engine | None:
        """The same, for this thread alone: no other finds it, nor a later call what an interruption leaves."""
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
    """What `_sample` and `_beam_search` are to return, of a call that [`unsupported`] has nothing against."""
    device = model.lm_head.weight.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        call = read_call(model, input_ids, processors, criteria, config, arguments, beams)
        engine = Engine.acquire(model, call)
        engine.prefill(call)
        steps, last = StepsAhead(engine, streamer), call.max_new_tokens
        steps.follow()
        while engine.new_tokens < last:
            steps.settle(AHEAD if steps.on_device else 0)
            if engine.ended:
                break
            if call.out_of_time():
                if not engine.text.end_soon():
                    break
                last = engine.new_tokens + 1
            if engine.beyond_positions:
                steps.settle(0)  # no step after the end may be launched, which would look up what there is not
                if engine.ended:
                    break
            engine.step()
            steps.follow()
        steps.settle(0)
        if streamer is not None:
            streamer.end()
        return engine.result(call)


class StepsAhead:
    """Steps that are launched and may not have run yet; a streamer gets the tokens of those that have."""

    def __init__(self, engine: Engine, streamer: BaseStreamer | None):
        self.engine, self.streamer, self.streamed = engine, streamer, 0
        self.on_device = engine.text.on_device
        self.pending: deque[tuple[torch.cuda.Event | None, torch.Tensor | None]] = deque()
        rows, count = engine.request.rows, 0 if streamer is None else AHEAD + 2
        self.slots = deque(torch.zeros(rows, dtype=torch.long, pin_memory=self.on_device) for _ in range(count))

    def follow(self) -> None:
        """Note the step that has just been launched."""
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
        """Wait until at most so many steps are under way; stream what is done."""
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
    """`generate()` with the loop of this file where it can be used; a base before `GenerationMixin`."""

    decoding: Decoding
    relies_on: tuple[str, ...] = ()  # private methods of `GenerationMixin` without which what is generated is wrong

    def train(self, mode: bool = True) -> Any:
        """Training needs the memory that decoding keeps."""
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
            logger.warning_once(f"generate() decodes with transformers' own, slower loop: {obstacle()}.")
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
        """What the fast loop gives, or `None` where transformers' own has to be taken."""
        if not self.decoding.enabled:
            return None
        call = input_ids, logits_processor, stopping_criteria, generation_config
        reason = unsupported(self, *call, arguments, synced_gpus, beams)
        if reason is not None:
            logger.warning_once(f"generate() decodes with transformers' own, slower loop: {reason}.")
            return None
        return decode(self, *call, arguments, beams, streamer)
