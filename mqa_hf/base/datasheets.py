"""Peak figures of devices by name."""

from dataclasses import dataclass


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
