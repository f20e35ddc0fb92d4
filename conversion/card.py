"""The model card of a converted checkpoint."""

import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedConfig

from .canonical import PIPELINES, auto_class
from .record import ConversionRecord


def write_card(directory: Path, record: ConversionRecord, source: Path | None, config: PreTrainedConfig) -> None:
    """Write `README.md`: what was changed, by which command, and how to load the result.

    Licence, language, data sets and pipeline tag are copied from the card at `source`, if any. `config` is that of the
    result.

    The original is named by its hub id: that of the source, or for a local one the `base_model` of its card. A local
    path is named by its last part alone.
    """
    own, loaded_by = record.output.startswith("mqa"), auto_class(config)
    inherited: dict[str, Any] = {}
    if source is not None:
        try:
            known = ModelCard.load(source).data.to_dict()
        except (ValueError, HFValidationError, yaml.YAMLError):
            known = {}
        inherited = {
            k: known[k]
            for k in ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
            if k in known
        }
        inherited |= {"base_model": known["base_model"]} if isinstance(known.get("base_model"), str) else {}
    is_id = " " not in record.source and not Path(record.source).exists()
    if is_id:
        inherited["base_model"] = record.source
    original = inherited.get("base_model") or Path(record.source).name
    relation = {"base_model_relation": "finetune"} if "base_model" in inherited else {}
    data = ModelCardData(
        **{"pipeline_tag": PIPELINES[loaded_by], **inherited, **relation},
        library_name="transformers",
        tags=["mqa-hf", "multi-query-attention"] if own else ["mqa-hf"],
    )
    bits = {latent.bits for latent in record.latents.values()} - {16}
    card = ModelCard.from_template(
        data,
        template_str=files("mqa_hf.conversion").joinpath("model_card.md.jinja").read_text(),
        name=Path(record.source).name,
        auto_class=loaded_by.__name__,
        language="bash" if record.command.startswith("mqa-hf ") else "python",
        trust=", trust_remote_code=True" if own else "",
        changed=[n for n, heads in record.attentions.items() if heads.before != heads.after or n in record.latents],
        stored="16 bit" + "".join(f", latents {count}" for count in bits),
        **{**dict(record), "source": original, "command": without_paths(record.command, record.source, original)},
    )
    card.save(directory / "README.md")


def without_paths(command: str, source: str, original: str) -> str:
    """The command with the source's and the output's names in place of their paths."""
    if not command.startswith("mqa-hf "):
        return command.replace(repr(source), repr(original))
    words = shlex.split(command)
    words = [original if word == source else Path(word).name if Path(word).is_absolute() else word for word in words]
    return shlex.join(words)
