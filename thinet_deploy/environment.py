"""What this machine is: a fingerprint that goes beside every number, and `doctor`, which says what is missing.

Nothing here imports a runtime, and no path, user or host name gets into a fingerprint.
"""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from .artifact import hash_json
from .interfaces import Precision
from .on_device.sensors import cpu_limit
from .target import load_profile

_PACKAGES = (
    *("thinet-deploy", "torch", "torchvision", "timm", "numpy", "onnx", "onnxscript", "onnxslim"),
    *("onnxruntime", "onnxruntime-gpu", "openvino", "nncf", "tensorrt", "tensorrt-rtx", "ncnn", "pnnx"),
    *("coremltools", "executorch", "litert-torch", "ai-edge-litert"),
)
# As /proc/cpuinfo spells them; the others do not change how a network runs.
_FLAGS = {
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni"),
    *("avx_vnni_int8", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
}
_NATIVE: dict[Precision, set[str]] = {
    "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"},
    "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
    "int8": {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm"},
}
_LOW_DISK_GB = 5
# Package → extra that installs it.
_OTHERS = {
    "ncnn": "ncnn",
    "ai-edge-litert": "litert",
    "executorch": "executorch",
    "coremltools": "coreml",
    "tensorrt-rtx": "tensorrt-rtx",
}


@dataclass(frozen=True)
class Check:
    """One line of `doctor`.

    Attributes:
        name: what was looked for.
        status: "ok", "missing" (the advice says how to get it), or "note" (nothing is wrong).
        found: what is there.
        advice: what to do, empty when there is nothing to do.
    """

    name: str
    status: Literal["ok", "missing", "note"]
    found: str
    advice: str = ""


def fingerprint() -> dict[str, Any]:
    """Hardware and software of this machine, JSON-ready; None where something cannot be read."""
    return {
        "os": _os(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "ram_bytes": _ram_bytes(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "gpus": _gpus(),
        "jetson": _jetson(),
    }


def machine_id(fingerprint: dict[str, Any]) -> str:
    """12 hex digits over what decides speed; equal ids may be compared, software versions are not part of it."""
    cpu = fingerprint["cpu"]
    jetson = fingerprint["jetson"] or {}
    return hash_json(
        {
            "os": [fingerprint["os"]["name"], (fingerprint["os"]["version"] or "").split(".")[0]],
            "machine": fingerprint["machine"],
            "cpu": {key: cpu[key] for key in ("model", "physical_cores", "usable_cores", "limit_cpus", "flags")},
            "ram": ram_class(fingerprint["ram_bytes"]),
            "gpus": [gpu["name"] for gpu in fingerprint["gpus"]],
            "jetson": [jetson.get("model"), jetson.get("power_mode")],
        }
    )[:12]


def cache_folder() -> Path:
    """Where what takes long to get is kept between runs: $THINET_CACHE, or ~/.cache/thinet-deploy."""
    return Path(os.environ.get("THINET_CACHE") or Path.home() / ".cache" / "thinet-deploy")


def cpu_precisions(flags: Iterable[str]) -> tuple[Precision, ...]:
    """The precisions a CPU with these flags computes in natively; "fp32" always comes first."""
    have = set(flags)
    return ("fp32", *(precision for precision, needs in _NATIVE.items() if needs & have))


def doctor() -> list[Check]:
    """What works on this machine, what is missing, and how to get it."""
    return [
        _python_check(),
        _package_check("torch", "pip install thinet-deploy"),
        _package_check("onnx", "pip install thinet-deploy"),
        _package_check("onnxruntime", 'pip install "thinet-deploy[onnxruntime]"', "onnxruntime-gpu"),
        _package_check("openvino", 'pip install "thinet-deploy[openvino]"'),
        _tensorrt_check(),
        _cpu_check(),
        _others_check(),
        _gpu_check(),
        _jetson_check(),
        _cuda_check(),
        _tool_check("ssh", "to reach a Jetson or Raspberry Pi: apt install openssh-client"),
        _tool_check("adb", "to reach an Android device: apt install adb, or Android's SDK Platform-Tools"),
        _disk_check(),
    ]


# --------------------------------------------------------------------------------------- readers


def _read(path: str) -> str:
    """The text of a system file without surrounding blanks and NULs, or "" when it is not there or not ours to read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _run(*command: str) -> str:
    """What a program prints on stdout, or "" when it is not there, fails or takes more than five seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# --------------------------------------------------------------------------------------- facts


def _os() -> dict[str, str | None]:
    release = dict(re.findall(r'^(ID|VERSION_ID)="?([^"\n]*)"?$', _read("/etc/os-release"), re.MULTILINE))
    return {"system": platform.system(), "name": release.get("ID"), "version": release.get("VERSION_ID")}


def _cpu() -> dict[str, Any]:
    usable = _usable_cpus()
    return {
        **cpu_facts(_read("/proc/cpuinfo"), platform.processor() or platform.machine()),
        "physical_cores": _physical_cores(usable),
        "logical_cores": os.cpu_count(),
        "usable_cores": len(usable),
        "limit_cpus": cpu_limit(_read),
        "governor": _read(f"/sys/devices/system/cpu/cpu{min(usable)}/cpufreq/scaling_governor") or None,
        "turbo": _turbo(),
    }


def cpu_facts(info: str, unnamed: str) -> dict[str, Any]:
    """Model and flags of a CPU.

    Args:
        info: the text of /proc/cpuinfo.
        unnamed: what it is called where that text has no name.
    """
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", info, re.MULTILINE)
    return {"model": _cpu_model(info, unnamed), "flags": sorted(_FLAGS & set(found[1].split())) if found else []}


def _cpu_model(info: str, unnamed: str) -> str:
    """Names alone are hidden by hypervisors ("AMD EPYC") and absent on Arm, so the numbers go with them."""
    keys = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part")
    found = {key: dict.fromkeys(re.findall(rf"^{key}\s*: *(.+?) *$", info, re.MULTILINE)) for key in keys}
    name = "/".join(found.pop("model name")) or unnamed
    details = ", ".join(f"{key} {'/'.join(values)}" for key, values in found.items() if values)
    return f"{name} ({details})" if details else name


def _usable_cpus() -> set[int]:
    """The CPUs that the scheduler lets this process use."""
    if sys.platform == "linux":
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _physical_cores(cpus: set[int]) -> int | None:
    """How many cores lie under these CPUs: those with the same siblings are one core."""
    siblings = {_read(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") for n in cpus}
    return None if "" in siblings else len(siblings)


def _turbo() -> bool | None:
    if no_turbo := _read("/sys/devices/system/cpu/intel_pstate/no_turbo"):
        return no_turbo == "0"
    boost = _read("/sys/devices/system/cpu/cpufreq/boost")
    return boost == "1" if boost else None


def _ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def ram_class(ram_bytes: int | None) -> int | None:
    """Quarters of a doubling: a kernel that keeps some more memory for itself does not make another machine."""
    return round(4 * math.log2(ram_bytes / 2**30)) if ram_bytes else None


def _gpus() -> list[dict[str, str]]:
    """NVIDIA GPUs as nvidia-smi reports them."""
    fields = ("name", "driver_version", "memory.total", "compute_cap")
    lines = _run("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader").splitlines()
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


JETSON_FILES = ("/proc/device-tree/model", "/etc/nv_tegra_release")
_DPKG = ("dpkg-query", "-W", "-f=${Package} ${Version}\n")
# One question each: dpkg-query fails as a whole where one of several names fits no package.
JETSON_COMMANDS = ((*_DPKG, "libnvinfer*"), (*_DPKG, "nvidia-l4t-core"), ("nvpmodel", "-q"))


def _jetson() -> dict[str, str | None] | None:
    return jetson_facts(_read, _run)


def jetson_facts(read: Callable[[str], str], run: Callable[..., str]) -> dict[str, str | None] | None:
    """Model, L4T, TensorRT and power mode of a Jetson; None on other machines.

    Args:
        read: gives the text of one of JETSON_FILES, "" where it is not there.
        run: gives what one of JETSON_COMMANDS prints, "" where it fails.
    """
    model, release = map(read, JETSON_FILES)
    if "Jetson" not in model and not release:
        return None
    l4t = re.search(r"# R(\d+).*?REVISION: ([\d.]+)", release)
    *packages, modes = (run(*command) for command in JETSON_COMMANDS)
    versions = dict(re.findall(r"^(\S+) (\S+)$", "\n".join(packages), re.MULTILINE))
    mode = re.search(r"NV Power Mode: *(\S+)", modes)
    return {
        "model": model or None,
        "l4t": f"{l4t[1]}.{l4t[2]}" if l4t else None,
        "nvidia-l4t-core": versions.get("nvidia-l4t-core"),
        "tensorrt": next((v for name, v in versions.items() if re.fullmatch(r"libnvinfer\d+", name)), None),
        "power_mode": mode[1] if mode else None,
    }


# --------------------------------------------------------------------------------------- checks


def _python_check() -> Check:
    good = sys.version_info >= (3, 11)
    return Check("Python", "ok" if good else "missing", platform.python_version(), "" if good else "Use Python 3.11+.")


def _package_check(name: str, advice: str, *others: str) -> Check:
    for package in (name, *others):
        if version := _version(package):
            return Check(name, "ok", f"{package} {version}" if others else version)
    return Check(name, "missing", "not installed", advice)


def _tensorrt_check() -> Check:
    """JetPack brings its own TensorRT, which one from pip would shadow."""
    advice = 'pip install "thinet-deploy[tensorrt]" (needs an NVIDIA GPU)'
    if jetson := _jetson():
        own, installed = jetson["tensorrt"] or "", _version("tensorrt") or ""
        if own and installed and _major(own) != _major(installed):
            found = f"{installed}, which shadows JetPack's {own}"
            return Check("tensorrt", "missing", found, "pip uninstall tensorrt: engines need JetPack's own.")
        advice = "apt install python3-libnvinfer, and make the environment with: python3 -m venv --system-site-packages"
    return _package_check("tensorrt", advice)


def _others_check() -> Check:
    """Runtimes that only some targets want."""
    there = {name: version for name in _OTHERS if (version := _version(name))}
    found = ", ".join(f"{name} {version}" for name, version in there.items()) or "none"
    extras = ", ".join(extra for name, extra in _OTHERS.items() if name not in there)
    advice = f'For targets that want them: pip install "thinet-deploy[EXTRA]", with {extras}.' if extras else ""
    return Check("other runtimes", "note", found, advice)


def _cpu_check() -> Check:
    flags = _cpu()["flags"]
    return Check(
        "CPU",
        "note",
        f"{', '.join(cpu_precisions(flags))} computed natively ({', '.join(flags) or 'no flags readable'})",
    )


def _gpu_check() -> Check:
    if gpus := _gpus():
        found = "; ".join(f"{g['name']}, compute capability {g['compute_cap']}, {g['memory.total']}" for g in gpus)
        return Check("NVIDIA GPU", "ok", found)
    return Check("NVIDIA GPU", "note", "none seen by nvidia-smi", "Only targets with a GPU need one; training is slow.")


def _jetson_check() -> Check:
    facts = _jetson()
    if facts is None:
        return Check("Jetson", "note", "this machine is none")
    stack = load_profile("jetson").stack_of(facts["l4t"] or "")
    found = ", ".join(f"{key} {value}" for key, value in [("stack", stack and stack.name), *facts.items()] if value)
    if not facts["tensorrt"]:
        return Check("Jetson", "missing", f"{found}, no TensorRT", "apt install nvidia-jetpack brings it, with CUDA.")
    if stack and stack.tensorrt and _major(facts["tensorrt"]) != _major(stack.tensorrt):
        advice = f"Engines for {stack.name} need the TensorRT that comes with it: apt install nvidia-jetpack."
        return Check("Jetson", "missing", f"{found}, but {stack.name} brings TensorRT {stack.tensorrt}", advice)
    return Check("Jetson", "ok", found)


def _major(version: str) -> str:
    return version.partition(".")[0]


def _cuda_check() -> Check:
    """CUDA as its own files say; programs that bring their own (torch, TensorRT from pip) do not need it."""
    text = _read("/usr/local/cuda/version.json") or _read("/usr/local/cuda/version.txt")
    if version := re.search(r"\d+\.\d+(\.\d+)?", text[text.find('"cuda"') :] if '"cuda"' in text else text):
        return Check("CUDA", "ok", version[0])
    if _jetson():
        return Check("CUDA", "missing", "not in /usr/local/cuda", "apt install nvidia-jetpack")
    return Check("CUDA", "note", "not in /usr/local/cuda", "torch and TensorRT from pip bring their own.")


def _tool_check(name: str, advice: str) -> Check:
    if shutil.which(name):
        return Check(name, "ok", "installed")
    return Check(name, "missing", "not installed", advice)


def _disk_check() -> Check:
    free_gb = shutil.disk_usage(".").free / 1e9
    if free_gb >= _LOW_DISK_GB:
        return Check("disk space", "ok", f"{free_gb:.0f} GB free in this folder")
    advice = f"A run can need {_LOW_DISK_GB} GB: free some, or give another folder with --out."
    return Check("disk space", "note", f"{free_gb:.1f} GB free in this folder", advice)
