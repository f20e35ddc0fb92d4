"""Shapes for plans and timings: the attention of a model and its number of weights, from a name or a checkpoint."""

import copy
import math
import os
from dataclasses import dataclass

from torch import nn
from transformers import AutoConfig, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import read_json
from mqa_hf.base.hub import locate
from mqa_hf.base.shapes import SHAPES
from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig
from mqa_hf.conversion.canonical import decoder_of
from mqa_hf.conversion.families import ONLY_OWN_CLASS, canonical_config
from mqa_hf.conversion.passthrough import own_class
from mqa_hf.conversion.pooling import choose_attentions, with_heads
from mqa_hf.conversion.source import Source, read_source
from mqa_hf.conversion.widths import map_queries

Config = MQAConfig | MQASeq2SeqConfig
# Configuration fields for the experts of a layer, and for those that a token is routed to.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k")


@dataclass(frozen=True)
class Weights:
    """Number of weights of a model.

    Attributes:
        always: weights that every step multiplies with, the language-model head included.
        experts: weights of all routed experts.
        chosen: fraction of the experts that a token is routed to.
        looked_up: weights of embeddings that are not the head.
    """

    always: int
    experts: int = 0
    chosen: float = 1.0
    looked_up: int = 0

    @property
    def total(self) -> int:
        return self.always + self.experts + self.looked_up

    @property
    def of_a_token(self) -> float:
        return self.always + self.chosen * self.experts

    def read(self, tokens: int) -> float:
        """Weights that a step reads if its tokens choose their experts independently."""
        return self.always + (1 - (1 - self.chosen) ** tokens) * self.experts


@dataclass(frozen=True)
class OwnShape:
    """A model that keeps its own class of transformers (`families/native_only.py`), with some number of heads.

    Attributes:
        source: the checkpoint.
        run_config: the configuration of its class with these heads.
        config: only the attention of the layers with keys and values, and their windows.
        weights: weights of the model. States of layers without keys and values are not counted.
    """

    source: Source
    run_config: PreTrainedConfig
    config: MQAConfig
    weights: Weights

    @property
    def why(self) -> str:
        """Why this package's class and loop do not support it, as a clause."""
        return ONLY_OWN_CLASS[self.run_config.model_type].why

    def with_heads(self, kv_heads: int) -> "OwnShape":
        return self if kv_heads == self.config.num_key_value_heads else own_shape(self.source, kv_heads)


def own_shape(source: Source, kv_heads: int) -> OwnShape:
    """Give a source in its own class fewer key/value heads; raise MQAError if that is not possible."""
    own = own_class(source, kv_heads)
    config = copy.deepcopy(own.pooled)
    windows = list(attention_layers(source.config).values())
    config.sliding_window = max((w for w in windows if w is not None), default=None)
    config.layer_types = ["full_attention" if w is None else "sliding_attention" for w in windows]
    model, head = own.model, own.model.get_output_embeddings()
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    looked_up = sum(w.numel() for w in tables if head is None or w is not head.weight)
    experts = sum(math.prod(shape) for name, shape in own.shapes.items() if ".experts." in name)
    total = sum(math.prod(shape) for shape in own.shapes.values())
    chosen = chosen_share(source.config) if experts else 1.0
    return OwnShape(source, own.output, config, Weights(total - looked_up - experts, experts, chosen, looked_up))


def chosen_share(config: PreTrainedConfig) -> float:
    """Fraction of a layer's experts that a token is routed to."""
    text = config.get_text_config(decoder=True)
    said = getattr(text, "ffn_config", text)  # of DBRX
    counts = [
        next((n for n in (getattr(said, name, None) for name in names) if isinstance(n, int)), None)
        for names in (CHOSEN, EXPERTS)
    ]
    if counts[0] is None or not counts[1]:
        raise MQAError(f"{config.model_type}: config.json does not give the number of experts per token")
    return min(1.0, counts[0] / counts[1])


def attention_layers(config: PreTrainedConfig) -> dict[int, int | None]:
    """The layers with a cache of keys and values in a class of transformers, and the window of each."""
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return {i: getattr(x, "sliding_window", None) for i, x in enumerate(layers) if isinstance(x, DynamicLayer)}


def read_shape(name: str) -> tuple[PreTrainedConfig, Config | OwnShape]:
    """Read a shape by name or from a checkpoint: the source's configuration and the canonical one.

    Raises:
        MQAError: if it is neither a name in [`SHAPES`] nor a supported checkpoint.
    """
    source, config = _read(name)
    attention = config.config if isinstance(config, OwnShape) else decoder_of(config)
    if not attention.kv_bytes_per_token:
        raise MQAError(f"{name} has no layers with keys and values to compare; give another shape")
    return source, config


def _read(name: str) -> tuple[PreTrainedConfig, Config | OwnShape]:
    if name in SHAPES:
        raw = dict(SHAPES[name])
        config = AutoConfig.for_model(**raw)
        return config, canonical_config(config, raw)
    try:
        directory, commit = locate(name, weights=False)
    except MQAError as error:
        if os.path.exists(name):
            raise
        raise MQAError(f"{error}. Known shapes are {', '.join(SHAPES)}") from error
    raw = read_json(directory / "config.json")
    for ours in (MQAConfig, MQASeq2SeqConfig):
        if raw.get("model_type") == ours.model_type:
            config = ours.from_pretrained(directory)
            return config, config
    source = read_source(name, directory, commit)
    if source.config.model_type in ONLY_OWN_CLASS:
        return source.config, own_shape(source, source.config.get_text_config(decoder=True).num_key_value_heads)
    return source.config, canonical_config(source.config, source.raw)


def fitted(config: Config, heads: int) -> Config:
    """The configuration with heads of the source's width as they are fitted: with maps of normalised queries."""
    fewer = with_heads(config, heads, choose_attentions(config, None))
    map_queries(decoder_of(fewer))
    return fewer
