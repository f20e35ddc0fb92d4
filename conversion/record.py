"""`conversion.json`: options, result and errors of a conversion."""

from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from mqa_hf.base.files import REPORT_FILE, TRAINING_FILE
from mqa_hf.base.records import Record

N = TypeVar("N", int, float)
Size = Annotated[int, Field(ge=0, lt=2**63)]
Sizes = Size | Annotated[list[Size], Field(min_length=1)]


class BeforeAfter(BaseModel, Generic[N]):
    """A number for the source and the result."""

    before: N
    after: N


class Latent(BaseModel):
    """What an attention caches per token in place of keys and values; sizes are lists if layers differ.

    Attributes:
        width: latent width.
        bits: bits per stored number.
        heads: key/value heads that it replaces.
        key_components: rotated key components rebuilt from it.
    """

    width: Sizes
    bits: Size
    heads: Size
    key_components: Sizes = 0

    @property
    def name(self) -> str:
        """As "latent 128 at 4 bits, keys 512", in tables."""
        bits, keys = f" at {self.bits} bits" if self.bits < 16 else "", f", keys {span(self.key_components)}"
        return f"latent {span(self.width)}{bits}" + (keys if self.key_components else "")

    def in_words(self) -> str:
        """As "one latent of 128 numbers at 4 bits, 512 rebuilt key components"."""
        said = f"one latent of {span(self.width)} numbers" + (f" at {self.bits} bits" if self.bits < 16 else "")
        return f"{said}, {span(self.key_components)} rebuilt key components" if self.key_components else said


def span(sizes: Sizes) -> str:
    """A size as text, or the range over layers."""
    if isinstance(sizes, int):
        return f"{sizes:,}"
    return f"{min(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"


class HeldOutLoss(BeforeAfter[float]):
    """Cross-entropy in nats per token on held-out tokens of the calibration text, and of each part of a mixture."""

    tokens: int | None = None
    text: str | None = None
    parts: dict[str, BeforeAfter[float]] = {}


class Nonfinite(BaseModel):
    """NaN and infinite entries by tensor, of the source and of the result."""

    read: dict[str, int]
    written: dict[str, int]


class _Sparse(BaseModel):
    """Unset fields are not written; NaN and infinity become null."""

    model_config = ConfigDict(ser_json_inf_nan="null")

    @model_serializer(mode="wrap")
    def _set_only(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if name in {*self.model_fields_set, "version"}}


class LayerRecord(_Sparse):
    """Errors of a layer; `stack` is set for encoder-decoder models. Errors that are not finite are `None`.

    Attributes:
        key_error, value_error: norm of the difference between new and old heads, relative to the old.
        attention_error: relative error of the attention's output on held-out tokens.
        attention_kl: divergence of the attention weights from the old ones in nats, on the same tokens.
        discarded_key_energy, discarded_value_energy: the share that fitted heads leave out.
        unexplained_key_energy: the share of normalised keys that no linear map of the attention's input gives.
        cross_...: the same for cross-attention.
    """

    layer: int
    stack: str | None = None
    key_error: float | None = None
    value_error: float | None = None
    cross_key_error: float | None = None
    cross_value_error: float | None = None
    attention_error: float | None = None
    attention_kl: float | None = None
    unexplained_key_energy: float | None = None
    discarded_key_energy: float | None = None
    discarded_value_energy: float | None = None
    cross_attention_error: float | None = None
    cross_attention_kl: float | None = None
    cross_discarded_key_energy: float | None = None
    cross_discarded_value_energy: float | None = None

    def errors(self) -> dict[str, float]:
        """The known errors by name."""
        return {
            name: value
            for name, value in self
            if name not in ("layer", "stack") and name in self.model_fields_set and value is not None
        }


class Origin(Record):
    """The origin of a checkpoint; all that is recorded for one trained without conversion.

    Attributes:
        source: directory or hub id.
        revision: the commit of a hub id.
    """

    file = REPORT_FILE

    source: str
    revision: str | None = None


class ConversionRecord(_Sparse, Origin):
    """The record of a conversion.

    Attributes:
        family, output: model types of the source and of the result.
        options: options that decide the result.
        num_attention_heads: query heads of the decoder.
        num_key_value_heads: key/value heads of the decoder's self-attention.
        attentions: key/value heads of each attention: decoder, cross, encoder; 1 where there is a latent.
        latents: latents by attention, if any.
        kv_bytes_per_token, cross_kv_bytes_per_token: cache bytes per token and per source token, at 16 bits; latents
            at their own bits.
        parameters: number of parameters of the result.
        layers: errors of each layer.
        versions: versions of the libraries.
        command: command that repeats the conversion.
        nonfinite: NaN and infinite entries, with `allow_nonfinite`.
        held_out_loss: loss before and after, if heads or output projections were fitted.
        warnings: reasons to doubt the result, a sentence each.
    """

    family: str
    output: str
    options: dict[str, Any]
    num_attention_heads: int
    num_key_value_heads: BeforeAfter[int]
    attentions: dict[str, BeforeAfter[int]]
    latents: dict[str, Latent] = {}
    kv_bytes_per_token: BeforeAfter[int]
    cross_kv_bytes_per_token: BeforeAfter[int] = BeforeAfter(before=0, after=0)
    parameters: int
    layers: list[LayerRecord]
    versions: dict[str, str]
    command: str
    nonfinite: Nonfinite | None = None
    held_out_loss: HeldOutLoss | None = None
    warnings: list[str] = []


class Losses(BaseModel):
    """Losses on validation text, by name."""

    before: dict[str, float | None]
    after: dict[str, float | None] | None = None


class TrainingSummary(Record):
    """The part of `uptraining.json` that `inspect` shows."""

    file = TRAINING_FILE

    tokens: int
    validation: Losses | None
    command: str | None
