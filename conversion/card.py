"""The model card of a converted checkpoint."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError


def write_card(directory: Path, report: dict[str, Any], source: Path) -> None:
    """Write `README.md`: what was changed, by which command, and how to load the result.

    Licence, language and the like are carried over from the source's card where it has one.
    """
    inherited: dict[str, Any] = {}
    if (source / "README.md").is_file():
        try:
            known = ModelCard.load(source / "README.md").data.to_dict()
        except (ValueError, HFValidationError, yaml.YAMLError):
            known = {}
        inherited = {k: known[k] for k in ("license", "license_name", "license_link", "language") if k in known}
    is_id = not Path(report["source"]).exists()
    data = ModelCardData(
        **inherited,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=report["source"] if is_id else None,
        tags=["mqa-hf", "multi-query-attention"] if report["output"] == "mqa" else ["mqa-hf"],
    )
    card = ModelCard.from_template(
        data,
        template_str=files("mqa_hf.conversion").joinpath("model_card.md.jinja").read_text(),
        name=Path(report["source"]).name,
        remote_code=report["output"] == "mqa",
        **report,
    )
    card.save(directory / "README.md")
