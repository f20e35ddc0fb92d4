"""`conversion.json`: what a conversion was asked for, what it found, and what it lost."""

from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from mqa_hf.base.files import REPORT_FILE, TRAINING_FILE
from mqa_hf.base.records import Record

N = TypeVar("N", int, float)
Size = Annotated[int, Field(ge=0, lt=2**63)]
Sizes = Size | Annotated[list[Size], Field(min_length=1)]


class BeforeAfter(BaseModel, Generic[N]):
    """A number of the source and of the result."""

    before: N
    after: N


class Latent(BaseModel):
    """What an attention caches of a token in place of keys and values; sizes are lists where layers differ.

    Attributes:
        width: numbers of the latent.
        bits: of a stored number.
        heads: key/value heads that it stands for.
        key_components: of rotated keys that are rebuilt from it.
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
    """A size, or the least and the largest of those that layers have."""
    if isinstance(sizes, int):
        return f"{sizes:,}"
    return f"{min(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"


class HeldOutLoss(BeforeAfter[float]):
    """Cross-entropy in nats a token on so many held-out tokens of the calibration text."""

    tokens: int | None = None
    text: str | None = None


class Nonfinite(BaseModel):
    """NaN and infinite entries by tensor, of the source and of the result."""

    read: dict[str, int]
    written: dict[str, int]


class _Sparse(BaseModel):
    """Fields that were never set are not written; those that are no number are null."""

    model_config = ConfigDict(ser_json_inf_nan="null")

    @model_serializer(mode="wrap")
    def _set_only(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if name in {*self.model_fields_set, "version"}}


class LayerRecord(_Sparse):
    """What became of a layer; `stack` names that of an encoder-decoder model. Errors that are no number are `None`.

    Attributes:
        key_error, value_error: norm of what the new heads differ by from the old ones, relative to that of the old.
        attention_error: of the attention's output on held-out tokens, likewise.
        attention_kl: divergence of the attention weights from the old ones in nats, there.
        discarded_key_energy, discarded_value_energy: the share that fitted heads leave out.
        cross_...: the same of cross-attention.
    """

    layer: int
    stack: str | None = None
    key_error: float | None = None
    value_error: float | None = None
    cross_key_error: float | None = None
    cross_value_error: float | None = None
    attention_error: float | None = None
    attention_kl: float | None = None
    discarded_key_energy: float | None = None
    discarded_value_energy: float | None = None
    cross_attention_error: float | None = None
    cross_attention_kl: float | None = None
    cross_discarded_key_energy: float | None = None
    cross_discarded_value_energy: float | None = None

    def errors(self) -> dict[str, float]:
        """Those that are known, by name."""
        return {
            name: value
            for name, value in self
            if name not in ("layer", "stack") and name in self.model_fields_set and value is not None
        }


class Origin(Record):
    """What a checkpoint was made from; of one that was trained without a conversion, all that is recorded.

    Attributes:
        source: directory or hub id.
        revision: the commit, of a hub id.
    """

    file = REPORT_FILE

    source: str
    revision: str | None = None


class ConversionRecord(_Sparse, Origin):
    """What a conversion did.

    Attributes:
        family, output: model types of the source and of the result.
        options: those that made a difference.
        num_attention_heads: query heads of the decoder.
        num_key_value_heads: of the decoder's self-attention.
        attentions: key/value heads of each attention: decoder, cross, encoder; 1 where there is a latent.
        latents: what attentions have in place of keys and values.
        kv_bytes_per_token, cross_kv_bytes_per_token: of the cache at 16 bits, and of latents at theirs, for a token
            and a source token.
        parameters: of the result.
        layers: of each layer, what was lost.
        versions: of the libraries.
        command: that makes it again.
        nonfinite: with `allow_nonfinite`.
        held_out_loss: where heads or output projections were fitted.
        warnings: what makes the result doubtful, in sentences.
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
    """What `inspect` says of a training, from `uptraining.json`."""

    file = TRAINING_FILE

    tokens: int
    validation: Losses | None
    command: str | None
