"""Alternatives to a conversion, each by its paper's formulas and without training, at equal cache bytes.

    quantised.py   the original with a quantised cache: per token; KIVI (arXiv 2402.02750)
    low_rank.py    keys and values of low rank, rebuilt before rotation: Palu (arXiv 2407.21118) and CARE (arXiv
                   2603.17946)
    mha2mla.py     multi-head latent attention by MHA2MLA (arXiv 2502.14837)
    transmla.py    multi-head latent attention by TransMLA (arXiv 2502.07864)

All run on the canonical model with all its heads, so on every family that can be converted.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from mqa_hf.modeling_mqa import MQAForCausalLM

from .common import Calibration, Peer, mean_loss, swapped
from .low_rank import care_peers, palu_peers
from .mha2mla import mha2mla_peers
from .quantised import WINDOWS, kivi_peers, token_peers, whole_share
from .transmla import transmla_peers

__all__ = ["PEERS", "ROTARY_PEERS", "Calibration", "Peer", "mean_loss", "notes", "peers_of", "swapped"]

PEERS: dict[str, Callable[[Calibration], Iterator[Peer]]] = {
    "by token": token_peers,
    "KIVI": kivi_peers,
    "Palu": palu_peers,
    "CARE": care_peers,
    "MHA2MLA": mha2mla_peers,
    "TransMLA": transmla_peers,
}
ROTARY_PEERS = ("MHA2MLA", "TransMLA")  # need rotary positions, else left out


def notes(found: Sequence[str], tokens: int) -> str:
    """The note below a table of peers.

    Args:
        found: names of the peers.
        tokens: tokens per row that losses were measured on.
    """
    shares = ", ".join(f"{whole_share(tokens, window):.0%} ({window} whole)" for window in WINDOWS)
    said = (
        "KIVI's bytes are those of a long text, without its latest tokens, which stay whole; these are "
        f"{shares} of all that is attended to in rows of {tokens} tokens."
    )
    missing = [name for name in ROTARY_PEERS if not any(one.startswith(name) for one in found)]
    if missing:
        said += f" Left out, since there are no rotary positions: {', '.join(missing)}."
    return said


def peers_of(model: MQAForCausalLM, rows: torch.Tensor) -> Iterator[Peer]:
    """Make all peers of a model, one after another.

    Args:
        model: with all its heads, on the device for calibration.
        rows: token ids [N, T] to calibrate on.
    """
    calibration = Calibration(model, rows)
    rotary = model.config.position_embedding == "rotary" and all(model.config.rope_layers)
    for name, make in PEERS.items():
        if rotary or name not in ROTARY_PEERS:
            yield from make(calibration)
