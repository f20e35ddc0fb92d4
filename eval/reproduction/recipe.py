"""A recipe of the papers' experiments: what is trained, how the first model is converted, and what is measured."""

import copy
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from mqa_hf.base.errors import MQAError, listing
from mqa_hf.base.files import read_yaml

FIRST = "multi-head"  # the model that others are compared with, and that is converted
SHIPPED = files("mqa_hf.eval.reproduction") / "recipes"

Options = dict[str, Any]  # of a command of `mqa-hf`


class Heads(BaseModel):
    """Attention layers of a model, if they differ from the shape's."""

    model_config = ConfigDict(extra="forbid")

    heads: PositiveInt | None = None
    kv_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    window: PositiveInt | None = None


class Conversion(BaseModel):
    """Options of `mqa-hf convert`, and the training that follows.

    Attributes:
        loss: loss of the training.
        shares: fractions of the pretraining tokens to train on, each from the start.
    """

    model_config = ConfigDict(extra="allow")

    loss: str
    shares: list[PositiveFloat] | None = Field(None, min_length=1)

    @property
    def options(self) -> Options:
        return dict(self.model_extra or {})


class Recipe(BaseModel):
    """The content of a recipe file.

    Attributes:
        shape: fields of a configuration, with an encoder and a decoder or of one stack.
        models: models to pretrain, by name.
        tokens: tokens that each is trained on.
        train, pretrain, uptrain: options of both kinds of training, and of one.
        evaluate: options of `mqa-hf evaluate`, for models that translate.
        calibrate: options of `mqa-hf convert` with fitted heads.
        times: options of `mqa-hf benchmark`.
        shares: fractions of the tokens that conversions are trained on.
        convert: conversions of the first model, by name.
    """

    model_config = ConfigDict(extra="forbid")

    shape: Options
    vocab_size: PositiveInt
    models: dict[str, Heads]
    seeds: list[int] = Field(min_length=1)
    tokens: PositiveInt
    train: Options
    columns: str | None = None
    pretrain: Options = {}
    uptrain: Options = {}
    evaluate: Options | None = None
    calibrate: Options | None = None
    times: Options | None = None
    shares: list[PositiveFloat] | None = Field(None, min_length=1)
    convert: dict[str, Conversion] = {}

    @property
    def splits(self) -> tuple[str, ...]:
        """Columns of the text that are read."""
        return ("train", "validation", *(("test",) if self.evaluate is not None else ()))

    def shares_of(self, name: str) -> list[float]:
        """Number of tokens that a conversion is trained on."""
        return self.convert[name].shares or self.shares or []


def read_recipe(name: str) -> Recipe:
    """Read a recipe of this package by name, or from a file.

    Raises:
        MQAError: if it does not exist, is incomplete, or has unknown fields.
    """
    path: Any = Path(name) if name.endswith((".yaml", ".yml")) else SHIPPED / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.name.removesuffix(".yaml") for p in SHIPPED.iterdir()))
        raise MQAError(f"{name!r} is not a recipe; give a YAML file or one of {known}")
    content = read_yaml(path)
    needed = [field for field, said in Recipe.model_fields.items() if said.is_required()]
    if not isinstance(content, dict) or not set(needed) <= set(content):
        raise MQAError(f"{name} needs {', '.join(needed)}")
    unknown = [str(key) for key in content if key not in Recipe.model_fields]
    if unknown:
        raise MQAError(f"{name}: {', '.join(unknown)}: a recipe has {', '.join(Recipe.model_fields)}")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, e['loc']))}: {e['msg'][:1].lower()}{e['msg'][1:]}" for e in error.errors())
        raise MQAError(f"{name}: {listing(wrong, 4)}") from error
    if FIRST not in recipe.models:
        raise MQAError(f"{name} needs a model called {FIRST} to compare with")
    if recipe.convert and (recipe.shares is None or recipe.calibrate is None):
        raise MQAError(f"{name} has convert and also needs shares and calibrate")
    return recipe


def configured(shape: dict[str, Any], heads: Heads | None = None) -> dict[str, Any]:
    """Make a configuration of `shape` with other attention layers in all its stacks.

    Args:
        shape: fields of a configuration, with an encoder and a decoder or of one stack.
        heads: query heads and their width (default: the shape's), key/value heads (default: as many as query heads),
            and the window of the decoder's self-attention (default: none).
    """
    shape, heads = copy.deepcopy(shape), heads or Heads()
    stacks = [shape[side] for side in ("encoder", "decoder")] if "decoder" in shape else [shape]
    for stack in stacks:
        stack["head_dim"] = heads.head_dim or stack["hidden_size"] // stack["num_attention_heads"]
        stack["num_attention_heads"] = heads.heads or stack["num_attention_heads"]
        stack["num_key_value_heads"] = heads.kv_heads or stack["num_attention_heads"]
        if "cross_num_key_value_heads" in stack:
            stack["cross_num_key_value_heads"] = stack["num_key_value_heads"]
    if heads.window is not None:
        stacks[-1]["layer_types"] = ["sliding_attention"] * stacks[-1]["num_hidden_layers"]
        stacks[-1]["sliding_window"] = heads.window
    return shape
