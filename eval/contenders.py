"""The models that are timed, with random weights and random cache contents, because speed depends on neither.

Engines are `mqa-hf` (this package's loop), `dynamic` (transformers' loop with its growing cache) and `static`
(transformers' loop with a static cache, compiled). The last two run a class of transformers that can hold the model,
or else this package's class. Model types that keep their own class are timed in it, with transformers' loops.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, PreTrainedConfig, StaticCache

from mqa_hf.base.errors import MQAError
from mqa_hf.cache_mqa import DecodeCache
from mqa_hf.configuration_mqa import MQAConfig, of_layer
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig
from mqa_hf.conversion.canonical import decoder_of, latents_of, with_fields
from mqa_hf.conversion.families import IMAGE_TEXT, family_of
from mqa_hf.conversion.record import Latent
from mqa_hf.latent_step_mqa import keys_to_keep
from mqa_hf.modeling_mqa import MQAForCausalLM
from mqa_hf.modeling_mqa_seq2seq import MQAForConditionalGeneration
from mqa_hf.parallel_mqa import config_of_rank, tensor_plan
from mqa_hf.rules_mqa import decoder_stack

from .attention_sizes import Keys, rebuilds
from .benchmark import AUTO, WARMUP, Benchmark
from .divided import divided_model, of_rank, ranks_of_job
from .latent_choices import latent_models
from .roofline import StepCost, largest_batch, step_cost
from .shapes import Config, OwnShape, Weights, attention_layers, fitted, read_shape

AT_ONCE = 2**26  # numbers of a cache buffer that are filled at once


@dataclass(frozen=True)
class Contender:
    """A model to time.

    Attributes:
        shape: as given.
        original: whether it has the shape's number of key/value heads.
        engine: one of [`ENGINES`].
        kv_heads: key/value heads; 1 with a latent.
        config: this package's configuration; for a model in its own class, only its attention.
        run_config: the configuration of the class that the engine runs.
        weights: weights of a model in its own class.
        keys: keys of latents in this package's loop, as `model.decoding.keys`.
        ranks: processes that the model is divided among; costs are those of one.
    """

    shape: str
    original: bool
    engine: str
    kv_heads: int
    config: Config
    run_config: PreTrainedConfig
    weights: Weights | None = None
    keys: str = AUTO
    ranks: int = 1

    @property
    def latent(self) -> Latent | None:
        """Latent of the decoder's self-attention, or of its cross-attention if only that has one."""
        return next(iter(latents_of(self.config).values()), None)

    @property
    def rebuilds(self) -> bool:
        """Whether keys are rebuilt from a latent."""
        return rebuilds(decoder_of(self.config))

    @property
    def name(self) -> str:
        cached = f"{self.kv_heads} K/V heads" if self.latent is None else self.latent.name
        keys = "" if self.keys == AUTO else f" {self.keys}"
        return f"{type(self.run_config).__name__.removesuffix('Config')}, {cached}{keys}, {self.engine}"

    def cost(self, batch: int, context: int, source: int = 0, itemsize: int = 2, keys: Keys | None = None) -> StepCost:
        """What a step reads and computes, with keys of latents kept as in `keys`."""
        config, way = self.cached(keys)
        return step_cost(config, batch, context, source, itemsize, self.weights, way)

    def largest_batch(self, context: int, memory: float, itemsize: int) -> int:
        """Rows whose cache fits into memory, with the smallest way to keep keys."""
        config, way = self.cached(None)
        return largest_batch(config, context, memory, 0, itemsize, self.weights, way)

    def cached(self, keys: Keys | None) -> tuple[MQAConfig, Keys]:
        """The decoder with latents as the engine stores them, and how the engine keeps their keys."""
        plan = None if self.run_config is self.config else self.run_config.base_model_tp_plan or {}
        config = of_rank(decoder_of(self.config), self.ranks, plan)
        if self.engine != "mqa-hf":  # transformers' caches hold the model's type, and all keys
            return with_fields(config, kv_latent_bits=16), "expanded"
        return config, keys or ("expanded" if self.keys == "expanded" else "rebuilt")


def contenders_of(job: Benchmark) -> list[Contender]:
    """Make all models of a benchmark.

    Raises:
        MQAError: if a shape is invalid, or cannot be timed as asked.
    """
    found: list[Contender] = []
    ways = tuple(dict.fromkeys(job.keys))
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
        if job.asks_latents:
            every = latent_models(config, job.latents, job.key_widths, job.latent_bits)
            engines = job.engines or ["mqa-hf", "dynamic"]
            ours += [Contender(shape, False, engine, 1, c, c) for c in every.values() for engine in engines]
        # With a window all engines run this package's class; transformers' would ignore it.
        ours = ours if job.window is None else [replace(c, run_config=c.config) for c in ours]
        ranks = ranks_of_job()  # and transformers' plans divide key/value heads
        ours = [replace(c, ranks=ranks, run_config=c.config if c.kv_heads % ranks else c.run_config) for c in ours]
        for c in ours:
            found += [replace(c, keys=way) for way in ways] if c.rebuilds and c.engine == "mqa-hf" else [c]
    if ways != (AUTO,) and not any(c.rebuilds and c.engine == "mqa-hf" for c in found):
        raise MQAError("`keys` needs latents whose keys this package's loop rebuilds; leave it out")
    return found


def check(job: Benchmark, shape: str, config: Config | OwnShape) -> None:
    """Raise MQAError for what cannot be timed of a shape."""
    several = isinstance(config, MQASeq2SeqConfig)
    if max(job.beams) > 1 and not several:
        raise MQAError(f"`beams` needs encoder-decoder shapes, because beam search does not stream tokens ({shape})")
    if job.largest_batch and (several or torch.device(job.device or "cpu").type == "cpu"):
        raise MQAError(f"`largest_batch` needs decoder-only shapes on a GPU ({shape}, {job.device})")
    if isinstance(config, OwnShape) and config.run_config.model_type in IMAGE_TEXT:
        raise MQAError(f"{shape} is multimodal, and only models of text are timed; use `mqa-hf plan`")
    if ranks_of_job() > 1:
        check_ranks(job, shape, config, ranks_of_job())
    if job.asks_latents and isinstance(config, OwnShape):
        raise MQAError(f"latents need a model in this package's class; {shape} keeps its own")
    if job.window is not None and isinstance(config, OwnShape):
        raise MQAError(f"`window` needs a model in this package's class; {shape} keeps its own")
    if isinstance(config, MQASeq2SeqConfig):
        if config.num_mel_bins is not None:
            raise MQAError(f"{shape} is a speech model, which cannot be timed; use `mqa-hf plan`")
        check_positions(shape, config.encoder, job.contexts[-1], f"`context` {job.contexts[-1]}")
        check_positions(shape, config.decoder, job.tokens, f"`tokens` {job.tokens}")
    elif isinstance(config, MQAConfig):
        written = WARMUP + job.tokens - 1
        said = f"`context` {job.contexts[-1]} and {WARMUP} + {job.tokens} `tokens`"
        check_positions(shape, config, job.contexts[-1] + written, said)


def check_ranks(job: Benchmark, shape: str, config: Config | OwnShape, ranks: int) -> None:
    """Raise MQAError if a model cannot be divided among these ranks."""
    if not isinstance(config, MQAConfig):
        raise MQAError(f"several processes time decoder-only models of this package's class; {shape} is none")
    if any(config.expert_layers):
        raise MQAError(f"several processes do not time mixtures of experts; {shape} is one")
    if config.tie_word_embeddings:
        raise MQAError(f"several processes do not time models whose head is their embedding, as in {shape}")
    counts = {heads or config.num_key_value_heads for heads in job.head_counts} - {1}
    for count, kind in ((config.num_attention_heads, "query"), *((n, "key/value") for n in sorted(counts))):
        if count % ranks:
            raise MQAError(f"{ranks} processes do not divide the {count} {kind} heads of {shape}")


def check_positions(shape: str, config: MQAConfig, needed: int, said: str) -> None:
    """Raise MQAError if a stack has too few learned positions."""
    if config.position_embedding == "learned" and needed > config.max_position_embeddings:
        raise MQAError(f"{shape} has {config.max_position_embeddings:,} positions; {said} need {needed:,}")


def contenders(
    shape: str,
    source: PreTrainedConfig,
    config: Config,
    kv_heads: Sequence[int | None],
    engines: Sequence[str],
) -> list[Contender]:
    """Every number of heads (`None`: the source's) with every engine."""
    original = decoder_of(config).num_key_value_heads
    found = []
    for heads in dict.fromkeys(n or original for n in kv_heads):
        if original % heads:
            raise MQAError(f"`kv_heads` {heads} must divide the {original} key/value heads of {shape}")
        ours = config if heads == original else fitted(config, heads)
        theirs: PreTrainedConfig = ours
        if heads == original:
            theirs = source
        elif not isinstance(ours, MQASeq2SeqConfig) and source.model_type != ours.model_type:
            native = family_of(source.model_type).native
            with suppress(MQAError):  # the class does not support this model with fewer heads
                theirs = native(source, ours) if native is not None else ours
        for engine in engines:
            found.append(
                Contender(shape, heads == original, engine, heads, ours, ours if engine == "mqa-hf" else theirs)
            )
    return found


def own_contenders(
    shape: str, own: OwnShape, kv_heads: Sequence[int | None], engines: Sequence[str]
) -> list[Contender]:
    """Same for a model in its own class, which transformers' loops run."""
    if "mqa-hf" in engines:
        raise MQAError(
            f"{shape}: {own.run_config.model_type} keeps its own class and runs only in transformers' loops "
            f"({own.why}); use `engines` dynamic, static or both"
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
    cls: Any = MQAForConditionalGeneration if several else MQAForCausalLM
    ours = contender.run_config is contender.config

    def made() -> Any:
        make = cls._from_config if ours else classes[several].from_config
        return make(contender.run_config, dtype=dtype)

    if contender.ranks > 1:
        if isinstance(contender.run_config, MQAConfig):  # its fields may have been changed since the plan was made
            contender.run_config.base_model_tp_plan = tensor_plan(contender.run_config)  # type: ignore[misc]
        model = divided_model(made, contender.ranks, device)
    else:
        with torch.device(device):
            model = made()
    if ours:
        model.decoding.enabled = contender.engine == "mqa-hf"
        model.decoding.keys = contender.keys
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if several:
        model.generation_config.decoder_start_token_id = 0
    return model.eval()


def filled_cache(contender: Contender, model: Any, batch: int, context: int, capacity: int) -> Any:
    """A cache in which `context` positions are random numbers."""
    config, dtype, device = decoder_of(contender.config), model.dtype, model.device
    if contender.engine == "mqa-hf":
        keys = keys_to_keep(model, {}, batch, capacity) if contender.keys == AUTO else contender.keys
        own = config_of_rank(decoder_stack(model))
        cache = DecodeCache(own, batch, capacity, model.decoding.cache_dtype or dtype, device, keys=keys)
        layers: Any = cache.layers
        for layer in layers:
            for name, states in layer.buffers().items():
                # float8 cannot be filled with random numbers, and a copy of the whole buffer may not fit.
                for rows in states.split(max(1, AT_ONCE * len(states) // max(1, states.numel()))):
                    fill(rows, name, dtype)
        cache.set_length(context)
        cache.note_steps(0, torch.zeros(batch, dtype=torch.int32, device=device))
        return cache
    text = contender.run_config.get_text_config(decoder=True)
    other: Any = DynamicCache(config=text)
    if contender.engine == "static":
        other = StaticCache(config=text, max_cache_len=capacity)
    heads = max(1, contender.kv_heads // contender.ranks)
    if contender.run_config is contender.config:
        heads = config_of_rank(decoder_stack(model)).num_key_value_heads
    for i in attention_layers(text):
        shapes = [(batch, heads, context, w) for w in cached_widths(config, i)]
        other.update(*(torch.randn(shape, dtype=dtype, device=device) for shape in shapes), i)
    return other


def fill(rows: torch.Tensor, name: str, dtype: torch.dtype) -> None:
    """Fill a cache buffer with random numbers; latents in 8 or 4 bits get a scale that keeps them small."""
    if rows.dtype == torch.uint8:
        rows.random_(256)
    elif name == "scales":
        rows.fill_(2**-7)
    else:
        rows.copy_(torch.randn(rows.shape, dtype=dtype, device=rows.device))


def cached_widths(config: MQAConfig, layer: int) -> tuple[int, int]:
    """Widths that transformers' caches hold as keys and values of a layer."""
    if config.kv_latent_dim is None:
        return of_layer(config.qk_head_dim, layer), of_layer(config.v_head_dim, layer)
    rebuilt, latent = of_layer(config.qk_head_dim, layer), of_layer(config.kv_latent_dim, layer)
    return (rebuilt, latent) if rebuilt else (latent, 0)


def cache_bytes(cache: Any) -> int:
    if isinstance(cache, DecodeCache):
        return cache.nbytes
    tensors = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor) and t.ndim > 2]
    return sum(t.numel() * t.element_size() for t in tensors)
