"""The model card of a converted checkpoint."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError

PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": None,  # translation, summarisation and more; the source's card says which
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
}


def write_card(directory: Path, report: dict[str, Any], source: Path, auto_class: str) -> None:
    """Write `README.md`: what was changed, by which command, and how to load the result.

    Licence, language and the like are carried over from the source's card where it has one. `auto_class` is what loads
    the result.
    """
    own = report["output"].startswith("mqa")
    inherited: dict[str, Any] = {}
    if (source / "README.md").is_file():
        try:
            known = ModelCard.load(source / "README.md").data.to_dict()
        except (ValueError, HFValidationError, yaml.YAMLError):
            known = {}
        inherited = {
            k: known[k] for k in ("license", "license_name", "license_link", "language", "pipeline_tag") if k in known
        }
    is_id = not Path(report["source"]).exists()
    data = ModelCardData(
        **{"pipeline_tag": PIPELINES[auto_class], **inherited},
        library_name="transformers",
        base_model=report["source"] if is_id else None,
        tags=["mqa-hf", "multi-query-attention"] if own else ["mqa-hf"],
    )
    card = ModelCard.from_template(
        data,
        template_str=files("mqa_hf.conversion").joinpath("model_card.md.jinja").read_text(),
        name=Path(report["source"]).name,
        auto_class=auto_class,
        trust=", trust_remote_code=True" if own else "",
        changed=[name for name, heads in report["attentions"].items() if heads["before"] != heads["after"]],
        **report,
    )
    card.save(directory / "README.md")
