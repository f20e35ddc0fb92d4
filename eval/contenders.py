"""What is timed: models with random weights and caches with random numbers, since speed depends on neither.

Engines are `mqa-hf` (this package's loop), `dynamic` (transformers' loop with its growing cache) and `static`
(transformers' loop with a static cache, compiled), the last two with the class of transformers that can hold the
model, or with ours where there is none. Types that are converted in their own class only are timed in that class, with
transformers' loops.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, PreTrainedConfig, StaticCache

from mqa_hf.base.errors import MQAError
from mqa_hf.cache_mqa import DecodeCache
from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig
from mqa_hf.conversion.canonical import decoder_of
from mqa_hf.conversion.families import family_of
from mqa_hf.conversion.pooling import choose_attentions, with_heads
from mqa_hf.modeling_mqa import MQAForCausalLM
from mqa_hf.modeling_mqa_seq2seq import MQAForConditionalGeneration

from .benchmark import WARMUP, Benchmark
from .shapes import Config, OwnShape, Weights, attention_layers, read_shape


@dataclass(frozen=True)
class Contender:
    """A model to time.

    Attributes:
        shape: as it was given.
        original: whether it has as many key/value heads as the shape.
        engine: one of [`ENGINES`].
        kv_heads: key/value heads.
        config: of this package; of a model in its own class only its attention.
        run_config: of the class that the engine runs.
        weights: of a model in its own class.
    """

    shape: str
    original: bool
    engine: str
    kv_heads: int
    config: Config
    run_config: PreTrainedConfig
    weights: Weights | None = None

    @property
    def name(self) -> str:
        return f"{type(self.run_config).__name__.removesuffix('Config')}, {self.kv_heads} K/V heads, {self.engine}"


def contenders_of(job: Benchmark) -> list[Contender]:
    """All models of a benchmark.

    Raises:
        MQAError: where a shape is none, or cannot be timed as asked.
    """
    found: list[Contender] = []
    for shape in map(str, job.shapes):
        source, config = read_shape(shape)
        check(job, shape, config)
        if isinstance(config, OwnShape):
            found += own_contenders(shape, config, job.head_counts, job.engines or ["dynamic"])
            continue
        if job.window is not None:
            decoder = decoder_of(config)
            decoder.sliding_window = job.window
            decoder.layer_types = ["sliding_attention"] * decoder.num_hidden_layers
        ours = contenders(shape, source, config, job.head_counts, job.engines or ["mqa-hf", "dynamic"])
        # With a window all run our class; transformers' would not have it.
        found += ours if job.window is None else [replace(c, run_config=c.config) for c in ours]
    return found


def check(job: Benchmark, shape: str, config: Config | OwnShape) -> None:
    """Raises MQAError for what cannot be timed of a shape."""
    several = isinstance(config, MQASeq2SeqConfig)
    if max(job.beams) > 1 and not several:
        raise MQAError(f"`beams` is for encoder-decoder shapes; tokens of a beam search are not streamed ({shape})")
    if job.largest_batch and (several or torch.device(job.device or "cpu").type == "cpu"):
        raise MQAError(f"`largest_batch` is for decoder-only shapes on a GPU ({shape}, {job.device})")
    if job.window is not None and isinstance(config, OwnShape):
        raise MQAError(f"`window` is for models in this package's class; {shape} runs in its own")
    if isinstance(config, MQASeq2SeqConfig):
        if config.num_mel_bins is not None:
            raise MQAError(f"{shape} reads speech, which is not timed; `mqa-hf plan` says what it can gain")
        check_positions(shape, config.encoder, job.contexts[-1], f"`context` {job.contexts[-1]}")
        check_positions(shape, config.decoder, job.tokens, f"`tokens` {job.tokens}")
    elif isinstance(config, MQAConfig):
        written = WARMUP + job.tokens - 1
        said = f"`context` {job.contexts[-1]} and {WARMUP} + {job.tokens} `tokens`"
        check_positions(shape, config, job.contexts[-1] + written, said)


def check_positions(shape: str, config: MQAConfig, needed: int, said: str) -> None:
    """Raises MQAError where a stack has not as many learned positions as are needed."""
    if config.position_embedding == "learned" and needed > config.max_position_embeddings:
        raise MQAError(f"{shape} has {config.max_position_embeddings:,} positions; {said} need {needed:,}")


def contenders(
    shape: str,
    source: PreTrainedConfig,
    config: Config,
    kv_heads: Sequence[int | None],
    engines: Sequence[str],
) -> list[Contender]:
    """Every number of heads (`None`: as many as the source has) with every engine."""
    original = decoder_of(config).num_key_value_heads
    found = []
    for heads in dict.fromkeys(n or original for n in kv_heads):
        if original % heads:
            raise MQAError(f"`kv_heads` {heads} must divide the {original} key/value heads of {shape}")
        ours = config if heads == original else with_heads(config, heads, choose_attentions(config, None))
        theirs: PreTrainedConfig = ours
        if heads == original:
            theirs = source
        elif not isinstance(ours, MQASeq2SeqConfig) and source.model_type != ours.model_type:
            native = family_of(source.model_type).native
            with suppress(MQAError):  # the class has no place for this model with fewer heads
                theirs = native(source, ours) if native is not None else ours
        for engine in engines:
            found.append(
                Contender(shape, heads == original, engine, heads, ours, ours if engine == "mqa-hf" else theirs)
            )
    return found


def own_contenders(
    shape: str, own: OwnShape, kv_heads: Sequence[int | None], engines: Sequence[str]
) -> list[Contender]:
    """The same for a model in its own class, which transformers' loops run."""
    if "mqa-hf" in engines:
        raise MQAError(
            f"{shape}: {own.run_config.model_type} runs in its own class, with transformers' loops only ({own.why}); "
            "use `engines` dynamic, static or both"
        )
    original = own.config.num_key_value_heads
    found = []
    for heads in dict.fromkeys(n or original for n in kv_heads):
        fewer = own.with_heads(heads)
        for engine in engines:
            config, run_config = fewer.config, fewer.run_config
            found.append(Contender(shape, fewer is own, engine, heads, config, run_config, fewer.weights))
    return found


def random_model(contender: Contender, dtype: torch.dtype, device: str | torch.device) -> Any:
    """The model, with random weights."""
    classes: dict[bool, Any] = {False: AutoModelForCausalLM, True: AutoModelForSeq2SeqLM}
    several = isinstance(contender.config, MQASeq2SeqConfig)
    with torch.device(device):
        if contender.run_config is contender.config:
            cls: Any = MQAForConditionalGeneration if several else MQAForCausalLM
            model = cls._from_config(contender.run_config, dtype=dtype)
            model.decoding.enabled = contender.engine == "mqa-hf"
        else:
            model = classes[several].from_config(contender.run_config, dtype=dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if several:
        model.generation_config.decoder_start_token_id = 0
    return model.eval()


def filled_cache(contender: Contender, model: Any, batch: int, context: int, capacity: int) -> Any:
    """A cache in which `context` positions are random numbers."""
    config, dtype, device = decoder_of(contender.config), model.dtype, model.device
    if contender.engine == "mqa-hf":
        cache = DecodeCache(config, batch, capacity, model.decoding.cache_dtype or dtype, device)
        layers: Any = cache.layers
        for layer in layers:
            for states in layer.buffers().values():
                for row in states:  # float8 has no random numbers of its own, and a whole copy may not fit
                    row.copy_(torch.randn(row.shape, dtype=dtype, device=device))
        cache.set_length(context)
        return cache
    text = contender.run_config.get_text_config(decoder=True)
    other: Any = DynamicCache(config=text)
    if contender.engine == "static":
        other = StaticCache(config=text, max_cache_len=capacity)
    for i in attention_layers(text):
        shapes = [(batch, contender.kv_heads, context, w) for w in (config.qk_head_dim, config.v_head_dim)]
        other.update(*(torch.randn(shape, dtype=dtype, device=device) for shape in shapes), i)
    return other


def cache_bytes(cache: Any) -> int:
    tensors = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor) and t.ndim > 2]
    return sum(t.numel() * t.element_size() for t in tensors)
