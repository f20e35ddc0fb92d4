"""The engine of the fast decoding loop: buffers, the step that fills them, and its CUDA graph.

B rows decoded, k rows of each prompt (beams or returned sequences), P = B / k prompts, T tokens of the prompt
"""

import weakref
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from .beams_mqa import BeamSearch
from .cache_mqa import DecodeCache, KeyValueLayer, LatentLayer
from .graph_mqa import StepGraph
from .parallel_mqa import config_of_rank, local, ranks_of
from .request_mqa import ROOM, Call, round_up
from .rules_mqa import CACHE, decoder_stack
from .sampling_mqa import Sampler, Text
from .step_mqa import DecodeStep

Generated = torch.Tensor | GenerateDecoderOnlyOutput | GenerateEncoderDecoderOutput


class Engine:
    """Decodes calls of one request: [`Engine.acquire`], [`Engine.prefill`], [`Engine.step`] for each further token,
    [`Engine.result`].

    An engine serves one call at a time. After an error it is dropped, and the next call builds another one.

    Attributes:
        cache: keys and values of self-attention; `owned` if the caller did not give it.
        text: the tokens so far, and the choice of the next ones.
        decode_step: the forward pass.
        new_tokens: launched steps, the prefill's token included.
    """

    def __init__(self, model: Any, call: Call):
        request, config, head = call.request, config_of_rank(decoder_stack(model)), model.lm_head.weight
        self.model, self.request = weakref.proxy(model), request
        cache, cross, device = call.cache, None, head.device
        if cache is None:
            dtype, copy = request.cache_dtype, request.beams is None
            cache = DecodeCache(config, request.rows, call.capacity, dtype, device, copy=copy, keys=request.keys)
        if model.config.is_encoder_decoder:
            prompts = request.rows // request.copies
            cross = DecodeCache(config, prompts, request.source_capacity, head.dtype, device, cross=True)
        self.cache, self.owned = cache, call.cache is None
        self.decode_step = DecodeStep(model, request, cache, cross)
        self.text: Text
        places = request, call.rules, cache.capacity + 1, device, ranks_of(model)
        if request.beams is None:
            self.text = Sampler(*places)
        else:
            self.text = BeamSearch(*places, self.decode_step.reorder)
        self.graph = StepGraph(self.decode_step.graph)
        self.pointers: tuple[int, ...] = ()  # addresses of everything the last call read
        self.prompt = self.held = self.new_tokens = self.first_position = self.most_positions = 0

    @classmethod
    def acquire(cls, model: Any, call: Call) -> "Engine":
        """Take the engine of the last call if it serves this one, or build a new one. No other call gets it until
        [`Engine.result`] returns it.
        """
        if call.cache is not None and call.cache.capacity < call.prompt:
            call.cache.grow(round_up(call.prompt))
        engine = model.decoding.take()
        if engine is not None and not engine.serves(call):
            engine = None  # free it before another one is allocated
        return engine or cls(model, call)

    def serves(self, call: Call) -> bool:
        """Whether the call can use these buffers: equal request, similar size, weights at the same addresses."""
        if self.request != call.request or self.pointers != self.read():
            return False
        if call.cache is not None:
            return self.cache is call.cache
        return self.owned and call.capacity <= self.cache.capacity <= 2 * call.capacity + ROOM

    def read(self) -> tuple[int, ...]:
        """Addresses of everything that a graph reads and does not own."""
        held = [buffer.data_ptr() for layer in self.cache.decode_layers for buffer in layer.buffers().values()]
        return (*(local(parameter).data_ptr() for parameter in self.model.parameters()), *held)

    def prefill(self, call: Call) -> None:
        """Run the model over the prompt, and choose the first token of each row."""
        step, copies, arguments = self.decode_step, self.request.copies, dict(call.arguments)
        if self.owned:
            self.cache.set_length(0)
        arguments[CACHE] = self.cache
        if step.cross is not None:
            step.cross.set_length(0)
            arguments[CACHE] = EncoderDecoderCache(self.cache, step.cross)
        self.widen()
        self.text.start(call.input_ids, call.limit, call.config.max_length)

        outputs = self.model._prefill(call.input_ids[::copies], call.config, arguments)
        logits = outputs.logits[:, -1].repeat_interleave(copies, 0)
        del outputs
        self.prompt, self.held = call.input_ids.shape[1], self.cache.get_seq_length()
        self.widen()
        step.place(arguments, self.held)
        self.prepare()
        self.text.next(logits)
        self.new_tokens = 1
        self.first_position, self.most_positions = int(step.positions.max()), self.held + call.max_new_tokens

    def step(self) -> None:
        """Launch one step: the forward pass of the newest tokens, and the choice of the next ones."""
        if self.decode_step.host_length + 1 > self.cache.capacity:
            self.grow(round_up(min(2 * self.cache.capacity, self.most_positions)))
        self.decode_step.advance()
        if not self.graph.warm:
            self.decode_step.compile()
        self.graph(self.run)
        self.new_tokens += 1

    def run(self) -> None:
        self.text.next(self.decode_step.forward(self.text.newest))

    @property
    def ended(self) -> int:
        """Number of new tokens at which all rows had ended, as far as the host knows, or 0."""
        return max(int(self.text.host_ended) - self.prompt, 0)

    @property
    def beyond_positions(self) -> bool:
        """Whether the next step would look up a learned position that does not exist."""
        table = decoder_stack(self.model).embed_positions
        return table is not None and self.first_position + self.new_tokens > table.num_embeddings

    def grow(self, capacity: int) -> None:
        """Make room for more positions; the graph is captured anew."""
        self.cache.set_length(self.decode_step.host_length)
        self.cache.grow(capacity)
        self.widen()
        self.prepare()

    def widen(self) -> None:
        """Grow the other buffers to the capacity of the cache."""
        width = self.cache.capacity + 1
        if width > self.text.tokens.shape[1]:
            self.graph.forget()
            self.text.grow(width)
            self.decode_step.widen()

    def prepare(self) -> None:
        if self.decode_step.prepare():
            self.graph.forget()

    def result(self, call: Call) -> Generated:
        """End the call; return its result, which shares no buffers with the next call."""
        new, config = self.ended or self.new_tokens, call.config
        self.cache.set_length(self.held + new - 1)
        self.cache.note_steps(self.held, self.decode_step.positions - self.decode_step.host_length)
        self.pointers = self.read()
        sequences = self.text.result(self.prompt + new, config.num_return_sequences)
        result: Generated = sequences
        if self.request.beams is None and config.return_dict_in_generate:
            result = self.with_cache(sequences, call.cache)
        self.model.decoding.keep(self)
        return result

    def with_cache(self, sequences: Any, given: DecodeCache | None) -> Generated:
        """Tokens and the cache: the caller's own, or one of transformers' classes."""
        cross, dtype = self.decode_step.cross, self.decode_step.dtype
        stack = decoder_stack(self.model)
        cache: Any = given if given is not None else dynamic_cache(self.cache, stack, dtype)
        if cross is None:
            return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE: cache})
        cache = EncoderDecoderCache(cache, dynamic_cache(cross, stack, dtype, self.request.copies, cross=True))
        return GenerateEncoderDecoderOutput(sequences=sequences, **{CACHE: cache})


def dynamic_cache(
    cache: DecodeCache, stack: Any, dtype: torch.dtype, copies: int = 1, cross: bool = False
) -> DynamicCache:
    """Copy a cache of this stack of layers to transformers' class, each row `copies` times."""
    plain = DynamicCache() if cross else DynamicCache(config=stack.config)
    angles = None
    if cache.positions is not None:
        like = torch.empty(0, dtype=dtype, device=cache.positions.device)
        angles = stack.rotary_emb(like, cache.positions[:, : cache.get_seq_length()])
    for i, layer in enumerate(cache.decode_layers):
        if isinstance(layer, LatentLayer):
            attention = stack.layers[i].cross_attn if cross else stack.layers[i].self_attn
            keys, values = attention.as_cached(layer.latents(dtype), angles)
        else:
            assert isinstance(layer, KeyValueLayer)
            keys, values = layer.contents(dtype)
        plain.update(keys.repeat_interleave(copies, 0), values.repeat_interleave(copies, 0), i)
    return plain
