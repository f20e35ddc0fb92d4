"""Print the page of supported families, made from the family table and the tested configurations:

python tests/helpers/family_page.py > docs/families.md
"""

import copy
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

from seq2seq_sources import SEQ2SEQ_CASES
from sources import CASES
from transformers import AutoConfig

from mqa_hf.base.errors import MQAError
from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig
from mqa_hf.conversion.families import FAMILIES, IMAGE_TEXT, NATIVE_ONLY, REFUSED
from mqa_hf.conversion.families.base import SourceConfig
from mqa_hf.conversion.families.checkpoints import CHECKPOINTS
from mqa_hf.conversion.families.native_only import MIXTURES

HEAD = """# Families

`python tests/helpers/family_page.py` makes this page from the family table; a test checks that it is current.

Converted with all its heads, each family reproduces the float32 logits of its own class for every tested
configuration. Pooled with the mean, it reproduces those of its own class with the heads overwritten by their mean.
[exactness.md](exactness.md) lists the largest differences. The column *needs* lists required values; other values
raise an error that names the switch. Unknown switches in `config.json` (`--ignore-switch NAME` accepts a switch that
has no effect) and quantised checkpoints are refused; gpt-oss's experts in MXFP4 are unpacked.
"""
OWN_CLASS = """The canonical model cannot express these model types. `--target native` pools their key and value
projections and copies the rest. The tests check pooling with the mean, and that a conversion with all heads
equals the source byte for byte."""
IN_PLACE = """`--target native` pools the key and value projections of the language model and copies the rest, image
encoder and processor included. The result loads with the same auto class. Only mean, first and random heads are
possible. The tests convert LLaVA, LLaVA-OneVision, Gemma 3, PaliGemma, Mistral 3, Idefics 3, InternVL, Qwen2-VL,
Qwen2.5-VL and Qwen3-VL; of the other classes they check that only keys and values depend on the number of heads."""
OTHERS = "All other causal and sequence-to-sequence model types of transformers 5.17 to 5.24, and the reasons."
COLUMNS = (
    "family",
    "official checkpoints, for example",
    "heads",
    "`--target native`",
    "needs",
    "tested configurations",
)


def table(families: list[str], cases: list[tuple[str, str, dict]]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(row(name, [(w, c) for f, w, c in cases if f == name]))} |" for name in families]
    return "\n".join(lines)


def row(name: str, cases: list[tuple[str, dict]]) -> tuple[str, ...]:
    family, native = FAMILIES[name], "same class" if name in MIXTURES else "none"
    needs: dict[str, str] = {}
    for _, fields in cases:
        source = AutoConfig.for_model(name, **json.loads(json.dumps(fields)))
        recorder = SourceConfig(source)
        canonical = family.config(recorder)
        needs |= {f"`{switch}={value!r}`": reason for switch, (value, reason) in recorder.required.items()}
        config = MQASeq2SeqConfig(**canonical) if "decoder" in canonical else MQAConfig(**canonical)
        if family.native is not None and native == "none" and isinstance(config, MQAConfig):
            pooled = copy.deepcopy(config)
            pooled.num_key_value_heads = 1
            with suppress(MQAError):  # no class of transformers fits this configuration
                target = family.native(source, pooled).model_type
                native = "same class" if target == name else f"`{target}`"
    return (
        f"`{name}`",
        *CHECKPOINTS[name],
        native,
        "; ".join(f"{switch} ({reason})" for switch, reason in needs.items()),
        "; ".join(what for what, _ in cases),
    )


def grouped(reasons: dict[str, str]) -> str:
    """A line for each reason, with its model types."""
    types: dict[str, list[str]] = {}
    for model_type, reason in sorted(reasons.items()):
        types.setdefault(reason, []).append(model_type)
    return "\n".join(f"- {', '.join(f'`{name}`' for name in names)}: {reason}." for reason, names in types.items())


def page() -> str:
    seq2seq = sorted({family for family, _, _ in SEQ2SEQ_CASES})
    decoders = sorted(set(FAMILIES) - set(seq2seq))
    parts = [
        HEAD,
        f"## Decoder-only ({len(decoders)})\n\n{table(decoders, CASES)}\n",
        f"## Encoder-decoder ({len(seq2seq)})\n\n{table(seq2seq, SEQ2SEQ_CASES)}\n",
        f"## In their own class only ({len(NATIVE_ONLY)})\n\n{OWN_CLASS}\n",
        grouped({name: row.why for name, row in NATIVE_ONLY.items()}) + "\n",
        f"## Multimodal, converted in place ({len(IMAGE_TEXT)})\n\n{IN_PLACE}\n",
        f"{', '.join(f'`{name}`' for name in sorted(IMAGE_TEXT))}.\n",
        f"## Refused ({len(REFUSED)})\n\n{OTHERS}\n",
        grouped(REFUSED) + "\n",
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
