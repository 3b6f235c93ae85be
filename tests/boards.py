"""Facts of boards that are not here, as `device_site.reach` brings them."""

from __future__ import annotations

from typing import Any

from thinet_deploy.devices.site import Machine
from thinet_deploy.devices.ssh import Ssh
from thinet_deploy.environment import JETSON_COMMANDS


def a_machine(**facts: Any) -> Machine:
    """An Orin Nano with JetPack 6.2, and what is different about it."""
    files = {
        "/proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit",
        "/etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081",
        "/proc/cpuinfo": "",
        "/proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005",
    }
    modules = {"numpy": "1.26", "tensorrt": "10.3.0", "onnxruntime": "1.19.2"}
    usual: dict[str, Any] = {
        "machine": "aarch64",
        "kernel": "5.15",
        "python": "3.10.12",
        "cores": 6,
        "memory_bytes": 8 << 30,
        "files": {**files, **facts.pop("files", {})},
        "modules": {**modules, **facts.pop("modules", {})},
        "commands": {" ".join(command): "" for command in JETSON_COMMANDS} | facts.pop("commands", {}),
    }
    return Machine(Ssh("orin"), "python3", {**usual, **facts})


# What a Raspberry Pi 5 says of itself; its CPU has no name there.
PI_FILES = {
    "/proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0",
    "/proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712",
    "/etc/nv_tegra_release": "",
    "/proc/cpuinfo": "Features\t: fp asimd asimdhp asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n",
}
