"""Number types and devices by name, and the processes of a job."""

from typing import TYPE_CHECKING

import torch

from .datasheets import DEVICES
from .errors import MQAError
from .options import NUMBER_TYPES

if TYPE_CHECKING:
    from accelerate import PartialState

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in NUMBER_TYPES}


def check_device(device: str) -> None:
    """Raise MQAError if a device is unavailable."""
    if device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise MQAError(f"`device` {device}: PyTorch sees no CUDA device; use `device` cpu")
    try:
        made = torch.empty(0, device=device)
    except Exception as error:  # PyTorch raises several types for unknown names and backends
        raise MQAError(f"`device` {device}: {str(error).splitlines()[0]}") from error
    if made.is_meta:
        raise MQAError("`device` meta cannot compute; use cpu or cuda")


def peak_rate() -> float | None:
    """16-bit matrix operations per second of the current GPU, from its data sheet; `None` if unknown."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower().replace(" ", "")
    # The longest name first: "a100-40gb" before "a10".
    for key in sorted(DEVICES, key=len, reverse=True):
        if key.split("-")[0] in name:
            return DEVICES[key].rate
    return None


def processes() -> "PartialState":
    """State of this process among those of the job; accelerate has to be told if it runs on a CPU."""
    from datetime import timedelta

    from accelerate import PartialState

    # One process may tokenise or convert for long while the others wait.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))
