"""`mqa-hf inspect`: describe a checkpoint and what its conversion would give."""

import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from mqa_hf.base.options import Job, Option, as_flags, function

from .convert import Conversion

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Inspection(Job[dict[str, Any]]):
    """Describe a checkpoint and what its conversion would give, without reading weights.

    Returns:
        Always: `source`, `family`, `convertible`, `reason` (why it cannot be converted, or only natively, else
        `None`), `conversion` and `training` (the content of `conversion.json` of a converted checkpoint and
        `uptraining.json` of a trained one, else `None`). If the configuration is supported: `layers`,
        `num_attention_heads`, `num_key_value_heads`, `head_dim`, `parameters` and `kv_bytes_per_token` (at 16 bits, or
        a latent's own bits; `now` and, if convertible, `after`); for a native conversion, only what its
        `conversion.json` has. `latents`, if any: width, bits, heads and rebuilt key components by attention. If
        convertible: `native`, the model type of the transformers class that can hold the result, or `False`.

    Raises:
        MQAError: if `source` is not a checkpoint.
    """

    name = "inspect"

    source: Annotated[str | os.PathLike[str], Option("Directory or hub id of an original or converted checkpoint.")]
    _: KW_ONLY
    kv_heads: Annotated[
        int, Option("Number of key/value heads of the conversion; must divide the source's number.", min=1)
    ] = 1
    ignore_switch: Annotated[
        Sequence[str],
        Option("Unknown switch in config.json to accept, as it does not change the outputs; may be repeated."),
    ] = ()
    revision: Annotated[str | None, Option("Branch, tag or commit of a hub id.")] = None

    def run(self) -> dict[str, Any]:
        from .description import describe

        return describe(self)

    def show(self, result: dict[str, Any], console: "Console") -> None:
        from rich.table import Table

        from .record import Latent, LayerRecord

        latents = {name: Latent.model_validate(said) for name, said in result.get("latents", {}).items()}
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name in (
            "source",
            "family",
            "encoder_layers",
            "layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        ):
            if name == "num_key_value_heads" and "decoder" in latents:
                continue
            if name in result:
                table.add_row(name.replace("_", " "), str(result[name]))
        for attention, latent in latents.items():
            title = "keys and values" if attention == "decoder" else f"keys and values of {attention} attention"
            table.add_row(title, f"{latent.in_words()}, of {latent.heads} heads")
        if "parameters" in result:
            table.add_row("parameters", f"{result['parameters']:,}")
            for name in ("kv_bytes_per_token", "cross_kv_bytes_per_token"):
                if name in result:
                    cache = result[name]
                    after = (
                        f" -> {cache['after']:,} with {self.kv_heads} key/value head(s)" if "after" in cache else ""
                    )
                    title = "cache bytes per token" if name.startswith("kv") else "cache bytes per source token"
                    table.add_row(title, f"{cache['now']:,}{after}")
        answer = "yes" if result["convertible"] else "no"
        reason = as_flags(result["reason"] or "", Conversion)
        table.add_row("can be converted", f"{answer}: {reason}" if reason else answer)
        if result.get("native") is not None:
            table.add_row("native target", result["native"] or "none")
        if result["conversion"]:
            conversion = result["conversion"]
            table.add_row("made by", conversion["command"])
            if "held_out_loss" in conversion:
                loss = conversion["held_out_loss"]
                measured = f" ({loss['tokens']:,} tokens of {loss['text']})" if "tokens" in loss else ""
                table.add_row("held-out loss", f"{loss['before']:.3f} -> {loss['after']:.3f} nats per token{measured}")
            for name in list(LayerRecord.model_fields)[2:]:
                errors = [layer[name] for layer in conversion["layers"] if layer.get(name) is not None]
                if errors:
                    table.add_row(name.replace("_", " "), f"{min(errors):.3f} to {max(errors):.3f} over the layers")
        if result["training"]:
            training = result["training"]
            table.add_row("trained on", f"{training['tokens']:,} tokens")
            for name, loss in ((training["validation"] or {}).get("after") or {}).items():
                before = training["validation"]["before"].get(name)
                table.add_row(
                    f"{name} on validation text", f"{loss:.3f}" if before is None else f"{before:.3f} -> {loss:.3f}"
                )
            if training["command"]:
                table.add_row("trained by", training["command"])
        console.print(table)


inspect = function(Inspection)
