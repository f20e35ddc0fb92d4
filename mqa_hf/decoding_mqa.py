"""Fast decoding behind `generate()`: one step, captured in a CUDA graph and replayed without Python in between.

    B rows decoded, k rows of each prompt (beams or returned sequences), P = B / k prompts, V vocabulary, W columns of
    the buffer of tokens

transformers prepares everything as ever: prompts, masks, logits processors, stopping criteria. What is replaced is the
loop (`_sample`, `_beam_search`): after the prefill, which is the model's own `forward`, a step is embedding, layers,
logits (`step_mqa.py`), processors (`rules_mqa.py`), choice of the token and bookkeeping, all on the device. The host
launches steps and reads whether all rows have ended a little later. On a CPU the same step runs eagerly.

What the loop cannot do goes to transformers' own loop; `model.decoding` has the switches.
"""

import gc
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput, GenerationMixin
from transformers.utils import logging

from .cache_mqa import DecodeCache
from .compat_mqa import TESTED, one_cache, self_check
from .rules_mqa import CACHE, Rule, among, as_key, decoder_of, mentions, obstacle, rule_of, unsupported
from .step_mqa import Step

logger = logging.get_logger(__name__)

ROOM = 2048  # positions beyond the prompt that are allocated at first, where more may come
# Whether the continuations that a beam search samples are ordered by their likelihood (transformers 5.24).
SORTS_SAMPLES = mentions(GenerationMixin, "_get_top_k_continuations", "sort")
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

    Buffers and graph are kept for the next call of the same shape; [`Decoding.release`] frees them.
    """

    enabled: bool = True
    graphs: bool = True
    kernels: bool = True
    cache_dtype: torch.dtype | None = None
    checked: bool = TESTED
    decoder: Any = field(default=None, repr=False, compare=False)

    def release(self) -> None:
        """Free the buffers and the graph of the last call."""
        self.decoder = None

    def __deepcopy__(self, memo: dict) -> "Decoding":
        return Decoding(self.enabled, self.graphs, self.kernels, self.cache_dtype, self.checked)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "decoder": None}


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
        rules: Sequence[Rule],
        eos: torch.Tensor | None,
        pad: torch.Tensor | None,
        sample: bool,
        beams: Any = None,
    ):
        options = model.decoding
        device = model.lm_head.weight.device
        self.settings, self.rules, self.sample, self.eos, self.pad = settings, rules, sample, eos, pad
        self.owned = True  # whether the cache is nobody else's
        self.pointers: tuple[int, ...] = ()  # where the weights are that the graph reads
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
            self.penalties = torch.ones(width + 1, device=device)  # by how much the score of n new tokens is divided
            self.longest = torch.ones(1, device=device)  # the same, of as many as there can be
            self.own = torch.arange(rows, dtype=torch.int32, device=device)

    def start(self, prompt: torch.Tensor, fill: int, limit: int, longest: int) -> None:
        """Begin a text: prompt [B, T] of at most `limit` tokens in the end; columns after it hold `fill`. Beams that
        may yet improve are judged by the length `longest`.
        """
        T = prompt.shape[1]
        self.fill = fill
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
            power = self.beams.length_penalty
            self.penalties.copy_(torch.tensor([1.0] + [float(n) ** power for n in range(1, len(self.penalties))]))
            self.longest.fill_(float(max(longest - T, 1)) ** power)

    def advance(self) -> None:
        """Launch one step: the first one as it is, which warms everything up, later ones by replaying a graph."""
        self.step.host_length += 1
        if not self.captures or not self.warm:
            if not self.warm:
                self.step.compile()
                self.warm = True
            return self.run_watched() if self.captures else self.run()
        if self.graph is None:
            graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
            gc.disable()  # the end of another graph, found by the collector, would break the capture
            try:
                with own_workspaces(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self.run()
            except RuntimeError as error:
                torch.cuda.synchronize()
                logger.warning_once(f"decoding runs without a CUDA graph, which could not be captured: {error}")
                self.captures = False
                return self.run()
            finally:
                if collects:
                    gc.enable()
            self.graph = graph
        self.graph.replay()

    def run_watched(self) -> None:
        """Run the step once as it is; where something in it waits for the device, it will not be captured."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.run()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]
        if waits:
            self.captures = False
            logger.warning_once(f"decoding runs without a CUDA graph, because a step waits for the device: {waits[0]}")

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
        if self.rules or self.sample:  # the largest is the same in any type
            logits = logits.float()
        for rule in self.rules:
            logits = rule(logits, self.tokens, self.cursor)
        token = draw(logits).argmax(-1) if self.sample else logits.argmax(-1)
        if self.eos is not None:
            token = torch.where(self.unfinished, token, self.pad)  # type: ignore[arg-type]
            self.unfinished &= ~among(token, self.eos)
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
        logs = logits.float().log_softmax(-1)
        for rule in self.rules:
            logs = rule(logs, self.tokens, self.cursor)
        n = max(2, 1 + (0 if self.eos is None else len(self.eos))) * k
        if self.sample:
            logs = (logs.view(P, k, V) + self.scores[:, :, None]).view(P, -1)
            chosen = draw(logs).topk(n).indices
            top = logs.gather(1, chosen)
            if SORTS_SAMPLES:
                top, order = top.sort(-1, descending=True)
                chosen = chosen.gather(1, order)
            parents, tokens = chosen // V, chosen % V
        else:  # the best of each beam, then the best of those
            few = min(n, V)
            best, tokens = logs.topk(few)
            top, chosen = (best.view(P, k, few) + self.scores[:, :, None]).view(P, -1).topk(n)
            parents, tokens = chosen // few, tokens.view(P, -1).gather(1, chosen)
        hits = (self.cursor + 1 >= self.limit).expand_as(tokens)
        if self.eos is not None:
            hits = hits | among(tokens, self.eos)

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
        rows.index_copy_(1, self.step.length.long(), self.own[:, None])  # where the next position will be written
        self.cursor += 1

        never = early == "never" and self.beams.length_penalty > 0.0
        possible = self.scores[:, :1] / (self.longest if never else self.penalties[self.cursor - self.prompt])
        worst = torch.where(self.done, self.done_scores.min(1, keepdim=True).values, -1.0e9)
        self.open &= (possible > worst).any(-1, keepdim=True)
        going = self.open.any() & ~hits.all()
        if early is True:
            going &= ~self.done.all()
        self.end(~going)

    def prepare(self) -> None:
        """Make the step ready for as many positions as the cache has room for; a graph of anything else goes."""
        step = self.step
        reach = int(step.positions.max()) + step.cache.capacity + 1 - step.host_length
        if step.prepare(reach):
            self.graph = None

    def grow(self, capacity: int) -> None:
        """Make room for more positions; the graph is captured anew."""
        self.step.cache.set_length(self.step.host_length)
        self.step.cache.grow(capacity)
        self.fit()
        self.prepare()

    def fit(self) -> None:
        """Give the other buffers room for as many positions as the cache has room for."""
        more = self.step.cache.capacity + 1 - self.tokens.shape[1]
        if more <= 0:
            return
        self.graph = None
        self.tokens = nn.functional.pad(self.tokens, (0, more), value=self.fill)
        if self.beams is not None:
            self.done_tokens = nn.functional.pad(self.done_tokens, (0, more), value=self.fill)
            if self.step.rows is not None:
                self.step.rows = nn.functional.pad(self.step.rows, (0, more))
            lengths = range(len(self.penalties), self.tokens.shape[1] + 1)
            extra = self.penalties.new_tensor([float(n) ** self.beams.length_penalty for n in lengths])
            self.penalties = torch.cat((self.penalties, extra))


@contextmanager
def own_workspaces() -> Iterator[None]:
    """Within it, cuBLAS takes a new workspace, which belongs to the graph that is captured.

    PyTorch keeps one workspace a stream. A graph that was captured with one from before, say from the memory of an
    earlier graph, reads freed memory when that graph is gone and something clears the workspaces, as torch.compile
    does when it captures graphs itself (`clear_cublas_manager` in torch/_inductor/cudagraph_trees.py).
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def draw(scores: torch.Tensor) -> torch.Tensor:
    """Numbers whose largest are a sample without replacement from softmax(scores), as `torch.multinomial` draws."""
    probabilities = scores.softmax(-1)
    return probabilities / torch.empty_like(probabilities).exponential_()


def taken(beams: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[P, k, W] and [P, n] -> [P, n, W]."""
    return beams.gather(1, index[..., None].expand(-1, -1, beams.shape[-1]))


@torch.inference_mode(False)  # buffers and joined weights outlive the call
@torch.no_grad()
def decode(model: Any, *arguments: Any) -> Any:
    """[`decode_on_device`] on the device of the model."""
    device = model.lm_head.weight.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return decode_on_device(model, *arguments)


def decode_on_device(
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
    given = arguments.get(CACHE)
    given = given if isinstance(given, DecodeCache) else None
    if given is not None and given.rows != B:
        raise ValueError(f"the DecodeCache that is given has {given.rows} rows, and {B} are to be decoded")
    arguments = {name: every(value, copies) for name, value in arguments.items() if value is not None}
    embedded = arguments.get("inputs_embeds")
    prompt = embedded.shape[1] if embedded is not None and not model.config.is_encoder_decoder else T
    prompt = max(prompt, given.get_seq_length() + 1 if given is not None else 0)
    limit = min([config.max_length, *(c.max_length for c in criteria if hasattr(c, "max_length"))])
    reach = prompt + limit - T  # positions that may be needed
    capacity = -(-min(reach, prompt + ROOM) // 64) * 64

    keys, rules = zip(*map(rule_of, processors)) if processors else ((), ())
    eos = next((c.eos_token_id for c in criteria if hasattr(c, "eos_token_id")), None)
    clocks = [c for c in criteria if hasattr(c, "max_time")]
    fill = config._pad_token_tensor
    if beams:
        fill = config._pad_token_tensor or eos[0] if eos is not None else -1
    eos = None if eos is None else eos.to(device)
    pad = None if config._pad_token_tensor is None else config._pad_token_tensor.to(device)
    cache_type = options.cache_dtype or model.lm_head.weight.dtype
    source = arguments["encoder_outputs"][0].shape[1] if model.config.is_encoder_decoder else 0
    room = -(-source // 64) * 64
    settings = (
        B, copies, config.do_sample, as_key(eos), as_key(pad), keys,
        (beams, config.early_stopping, config.length_penalty), room, cache_type, options.graphs, options.kernels,
    )  # fmt: skip

    if given is not None and given.capacity < prompt:
        given.grow(-(-prompt // 64) * 64)
    # Taken, so that no other thread finds it, nor a later call what an interruption leaves; given back at the end.
    decoder, options.decoder = options.decoder, None
    if decoder is not None and (decoder.settings, decoder.pointers) != (settings, pointers(model, decoder.step.cache)):
        decoder = None
    if decoder is not None and (
        decoder.step.cache is not given if given is not None
        else not decoder.owned or not capacity <= decoder.step.cache.capacity <= 2 * capacity + ROOM
    ):  # fmt: skip
        decoder = None
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
        arguments[CACHE] = EncoderDecoderCache(cache, step.cross)
    else:
        arguments[CACHE] = cache
    decoder.fit()
    decoder.start(input_ids, int(fill) if fill is not None else 0, limit, config.max_length)

    outputs = model._prefill(input_ids[::copies], config, arguments)
    logits = outputs.logits[:, -1].repeat_interleave(copies, 0)
    del outputs
    held = cache.get_seq_length()
    place(model, step, arguments, held, copies)
    if beams:
        whole = decoder.own[:, None].div(copies, rounding_mode="floor").mul(copies).repeat(1, cache.capacity + 1)
        step.rows = whole if step.rows is None else step.rows.copy_(whole)
    decoder.fit()
    decoder.prepare()
    decoder.pointers = pointers(model, cache)
    decoder.choose(logits)

    new, last, farthest = 1, limit - T, int(step.positions.max())
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
        if any(time.time() - clock.initial_timestamp > clock.max_time for clock in clocks):
            late = True
            if not beams:
                break
            decoder.limit.zero_()  # the last step: all beams end with it
        if stack.embed_positions is not None and farthest + new > stack.embed_positions.num_embeddings:
            settle(0)  # a step after the end would look up a position that there is not
            if decoder.host_ended:
                break
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
    decoder.pointers = pointers(model, cache)  # it may have grown
    result = copied(decoder, config, T + new, given, stack.config, copies)
    options.decoder = decoder
    return result


def copied(decoder: Decoder, config: Any, length: int, given: DecodeCache | None, stack: Any, copies: int) -> Any:
    """What a call returns, none of it in buffers that the next call writes to."""
    step = decoder.step
    if decoder.beams is not None:
        found = config.num_return_sequences
        end = int(decoder.done_lengths[:, :found].max())
        return decoder.done_tokens[:, :found, :end].clone().flatten(0, 1)
    sequences: Any = decoder.tokens[:, :length].clone()
    if not config.return_dict_in_generate:
        return sequences
    kept: Any = given if given is not None else plain_cache(step.cache, stack, step.dtype)
    if step.cross is None:
        return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE: kept})
    kept = EncoderDecoderCache(kept, plain_cache(step.cross, None, step.dtype, copies))
    return GenerateEncoderDecoderOutput(sequences=sequences, **{CACHE: kept})


def pointers(model: Any, cache: DecodeCache) -> tuple[int, ...]:
    """Where everything lies that a graph reads and does not own."""
    layers: Any = cache.layers
    held = [buffer.data_ptr() for layer in layers for buffer in layer.buffers().values()]
    return (*(parameter.data_ptr() for parameter in model.parameters()), *held)


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
    elif mask is not None and (step.config.positions_from_mask or (several and model.config.num_mel_bins)):
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


def plain_cache(cache: DecodeCache, config: Any, dtype: torch.dtype, copies: int = 1) -> DynamicCache:
    """The same keys and values as transformers keeps them, each row `copies` times."""
    plain = DynamicCache(config=config) if config is not None else DynamicCache()
    layers: Any = cache.layers
    for i, layer in enumerate(layers):
        keys = layer.read(layer.keys, layer.key_scales, 1, dtype)
        values = layer.read(layer.values, layer.value_scales, 1, dtype)
        plain.update(keys.repeat_interleave(copies, 0), values.repeat_interleave(copies, 0), i)
    return plain


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
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        *,
        beams: bool,
        **arguments: Any,
    ) -> Any:
        """What the fast loop gives, or `None` where transformers' own has to be taken."""
        if not self.decoding.enabled:
            return None
        call = input_ids, logits_processor, stopping_criteria, generation_config
        reason = unsupported(self, *call, arguments, synced_gpus, beams)
        if reason is not None:
            logger.warning_once(f"generate() decodes with transformers' own, slower loop: {reason}.")
            return None
        return decode(self, *call, streamer, arguments, beams)
