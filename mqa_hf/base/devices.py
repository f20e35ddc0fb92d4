"""Number types and devices by name, and the processes of a job."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .errors import MQAError
from .options import NUMBER_TYPES

if TYPE_CHECKING:
    from accelerate import PartialState

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in NUMBER_TYPES}


@dataclass(frozen=True)
class Device:
    """Memory in bytes, bandwidth in bytes and matrix rate in 16-bit operations per second."""

    name: str
    memory: float
    bandwidth: float
    rate: float


# Data sheets; a step reaches 80 to 90 % of the bandwidth at best.
DEVICES = {
    device.name: device
    for device in (
        Device("h100", 80e9, 3.35e12, 989e12),
        Device("h200", 141e9, 4.8e12, 989e12),
        Device("b200", 180e9, 8.0e12, 2250e12),
        Device("a100-80gb", 80e9, 2.04e12, 312e12),
        Device("a100-40gb", 40e9, 1.56e12, 312e12),
        Device("mi300x", 192e9, 5.3e12, 1307e12),
        Device("l40s", 48e9, 0.864e12, 362e12),
        Device("l4", 24e9, 0.3e12, 121e12),
        Device("a10", 24e9, 0.6e12, 125e12),
        Device("rtx4090", 24e9, 1.008e12, 165e12),
        Device("t4", 16e9, 0.32e12, 65e12),
    )
}


def check_device(device: str) -> None:
    """Raises MQAError for a device on which nothing can be computed."""
    try:
        made = torch.empty(0, device=device)
    except Exception as error:  # whatever PyTorch raises for a name, or for a backend that is not there
        raise MQAError(f"`device` {device}: {str(error).splitlines()[0]}") from error
    if made.is_meta:
        raise MQAError("`device` meta holds no numbers; use cpu or cuda")


def peak_rate() -> float | None:
    """16-bit matrix operations a second on the data sheet of the GPU that is here."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower().replace(" ", "")
    # The longest name first: "a100-40gb" before "a10".
    for key in sorted(DEVICES, key=len, reverse=True):
        if key.split("-")[0] in name:
            return DEVICES[key].rate
    return None


def processes() -> "PartialState":
    """What this process is among those of the job; on a CPU too, which accelerate has to be told."""
    from datetime import timedelta

    from accelerate import PartialState

    # One process may tokenise or convert for long while the others wait.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))
