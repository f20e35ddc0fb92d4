"""The model card of a converted checkpoint."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedConfig

from mqa_hf.base.card import public, public_command

from .canonical import PIPELINES, auto_class
from .convert import FileOptions
from .record import ConversionRecord


def write_card(
    directory: Path, record: ConversionRecord, source: Path | None, config: PreTrainedConfig, job: FileOptions
) -> list[str]:
    """Write `README.md`: what was changed, by which command, and how to load the result.

    The original is named by its hub id: `base_model` of the job, that of the source, or for a local source the
    `base_model` of its card. A local path is named by its last part alone.

    Args:
        directory: the result's.
        record: of the conversion.
        source: the source's card, if any. Licence, language, data sets and pipeline tag are copied from it.
        config: of the result.
        job: what it says of the original goes before what is known.

    Returns:
        What the card lacks, as warnings.
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
    if job.base_model is not None:
        inherited["base_model"] = job.base_model
    if job.license is not None:
        inherited = {k: v for k, v in inherited.items() if not k.startswith("license")} | {"license": job.license}
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
        text=public(record.held_out_loss.text or "") if record.held_out_loss else "",
        place=job.push_to_hub or "DIRECTORY_OR_ID",
        trust=", trust_remote_code=True" if own else "",
        changed=[n for n, heads in record.attentions.items() if heads.before != heads.after or n in record.latents],
        stored="16 bit" + "".join(f", latents {count}" for count in bits),
        **{**dict(record), "source": original, "command": public_call(record, original)},
    )
    card.save(directory / "README.md")
    lacking = bool(job.push_to_hub) and "license" not in inherited
    return ["the card has no licence; give `license`"] if lacking else []


def public_call(record: ConversionRecord, original: str) -> str:
    """The command or Python call of the conversion, with names in place of paths."""
    if record.command.startswith("mqa-hf "):
        return public_command(record.command, {record.source: original})
    said = record.command.replace(repr(record.source), repr(original))
    return re.sub(r"'[^'\n]*'", lambda found: repr(public(found[0][1:-1])), said)
