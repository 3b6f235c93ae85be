from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from thinet_deploy import environment
from thinet_deploy.environment import Check, cpu_precisions, doctor, fingerprint, machine_id

XEON = """processor\t: 0
model name\t: Intel(R) Xeon(R) Gold 6338
cpu family\t: 6
model\t\t: 106
stepping\t: 6
flags\t\t: fpu vme sse4_2 avx avx2 fma avx512f avx512_vnni
"""
PI = """processor\t: 0
Features\t: fp asimd evtstrm fphp asimdhp asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd0b
"""
ORIN_FILES = {
    "/proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit",
    "/etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64",
    "/proc/cpuinfo": PI,
}
ORIN_COMMANDS = {
    "dpkg-query": "libnvinfer10 10.3.0.30-1+cuda12.5\nlibnvinfer-dev 1\nnvidia-l4t-core 36.4.3-20250107174145",
    "nvpmodel": "NV Power Mode: 15W\n0",
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces what this machine shows by given files, programs' outputs and package versions."""

    def pretend(
        files: dict[str, str] | None = None,
        commands: dict[str, str] | None = None,
        packages: dict[str, str] | None = None,
    ) -> None:
        monkeypatch.setattr(environment, "_read", lambda path: (files or {}).get(path, ""))
        monkeypatch.setattr(environment, "_run", lambda *command: (commands or {}).get(command[0], ""))
        monkeypatch.setattr(environment, "_version", (packages or {}).get)
        monkeypatch.setattr(environment, "_usable_cpus", lambda: {0, 1, 2, 3})

    return pretend


def found(name: str) -> Check:
    return next(check for check in doctor() if check.name == name)


def test_a_fingerprint_of_this_machine_is_json_and_stable() -> None:
    first = fingerprint()
    assert json.loads(json.dumps(first)) == first
    assert first["cpu"]["usable_cores"] >= 1
    assert first["packages"]["onnx"]
    assert machine_id(first) == machine_id(fingerprint())


def strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        tree = [*tree, *tree.values()]
    if isinstance(tree, list):
        for branch in tree:
            yield from strings(branch)
    elif isinstance(tree, str):
        yield tree


def test_a_fingerprint_holds_no_local_paths() -> None:
    for text in strings(fingerprint()):
        assert not text.startswith(("/", "~", "\\"))
        assert str(Path.home()) not in text
        assert str(Path.cwd()) not in text


def test_a_machine_that_shows_nothing_still_has_a_fingerprint(machine: Callable[..., None]) -> None:
    machine()
    shown = fingerprint()
    assert shown["cpu"]["flags"] == []
    assert shown["cpu"]["physical_cores"] is None
    assert (shown["cpu"]["governor"], shown["cpu"]["turbo"], shown["cpu"]["limit_cpus"]) == (None, None, None)
    assert (shown["gpus"], shown["jetson"], shown["packages"]) == ([], None, {})
    assert len(machine_id(shown)) == 12
    assert len(doctor()) > 8


def test_readers_survive_what_is_missing_or_fails(tmp_path: Path) -> None:
    assert environment._read(str(tmp_path / "none")) == ""
    assert environment._read(str(tmp_path)) == ""
    assert environment._run("a-program-that-is-not-there") == ""
    assert environment._run("false") == ""
    assert environment._run("echo", "x") == "x"
    assert environment._version("a-package-that-is-not-there") is None
    (tmp_path / "model").write_bytes(b"NVIDIA Jetson\0")
    assert environment._read(str(tmp_path / "model")) == "NVIDIA Jetson"


def test_cpu_of_an_x86_machine(machine: Callable[..., None]) -> None:
    siblings = {
        f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 2},{n % 2 + 2}" for n in range(4)
    }
    machine(
        {
            "/proc/cpuinfo": XEON + XEON.replace(": 0", ": 1"),
            "/sys/fs/cgroup/cpu.max": "150000 100000",
            "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance",
            "/sys/devices/system/cpu/intel_pstate/no_turbo": "1",
            **siblings,
        }
    )
    cpu = fingerprint()["cpu"]
    assert cpu["model"] == "Intel(R) Xeon(R) Gold 6338 (cpu family 6, model 106, stepping 6)"
    assert cpu["flags"] == ["avx", "avx2", "avx512_vnni", "avx512f", "fma", "sse4_2"]
    assert (cpu["usable_cores"], cpu["physical_cores"]) == (4, 2)
    assert (cpu["limit_cpus"], cpu["governor"], cpu["turbo"]) == (1.5, "performance", False)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"/sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 0.5),
    ],
)
def test_cgroup_limits(machine: Callable[..., None], files: dict[str, str], expected: float | None) -> None:
    machine(files)
    assert fingerprint()["cpu"]["limit_cpus"] == expected


def test_an_arm_cpu_is_named_by_its_numbers(machine: Callable[..., None]) -> None:
    machine({"/proc/cpuinfo": PI})
    cpu = fingerprint()["cpu"]
    assert "CPU implementer 0x41, CPU part 0xd0b" in cpu["model"]
    assert cpu_precisions(cpu["flags"]) == ("fp32", "fp16", "int8")


def test_a_gpu_is_read_from_nvidia_smi(machine: Callable[..., None]) -> None:
    machine(commands={"nvidia-smi": "NVIDIA H200, 575.57.08, 143771 MiB, 9.0\nnot a row"})
    assert fingerprint()["gpus"] == [
        {"name": "NVIDIA H200", "driver_version": "575.57.08", "memory.total": "143771 MiB", "compute_cap": "9.0"}
    ]
    assert "compute capability 9.0" in found("NVIDIA GPU").found


def test_a_jetson_is_detected(machine: Callable[..., None]) -> None:
    machine(ORIN_FILES, ORIN_COMMANDS)
    assert fingerprint()["jetson"] == {
        "model": "NVIDIA Jetson Orin Nano Developer Kit",
        "l4t": "36.4.3",
        "nvidia-l4t-core": "36.4.3-20250107174145",
        "tensorrt": "10.3.0.30-1+cuda12.5",
        "power_mode": "15W",
    }
    assert found("Jetson").status == "ok"
    # TensorRT from pip would shadow the one of JetPack.
    assert "--system-site-packages" in found("tensorrt").advice
    assert "pip install" not in found("tensorrt").advice


def test_doctor_knows_which_jetpack_this_is(machine: Callable[..., None]) -> None:
    cuda = {"/usr/local/cuda/version.json": '{"cuda_cccl": {"version": "1.0"}, "cuda": {"version": "12.6.68"}}'}
    machine({**ORIN_FILES, **cuda}, ORIN_COMMANDS)
    assert "stack jetpack-6.2, " in found("Jetson").found
    assert (found("CUDA").status, found("CUDA").found) == ("ok", "12.6.68")


def test_doctor_says_what_a_jetson_without_its_sdk_lacks(machine: Callable[..., None]) -> None:
    machine(ORIN_FILES, {"dpkg-query": "nvidia-l4t-core 36.4.3"})
    for name in ("Jetson", "CUDA"):
        assert found(name).status == "missing"
        assert "apt install nvidia-jetpack" in found(name).advice


def test_packages_that_are_not_there_hide_no_others() -> None:
    """dpkg-query prints what it found and fails, and then nothing of it counts."""
    facts = environment.jetson_facts(
        lambda path: ORIN_FILES.get(path, ""),
        lambda *command: "" if "libnvinfer*" in command else "nvidia-l4t-core 36.4.3-2025",
    )
    assert facts is not None
    assert (facts["nvidia-l4t-core"], facts["tensorrt"]) == ("36.4.3-2025", None)


def test_doctor_finds_a_tensorrt_that_cannot_be_right(machine: Callable[..., None]) -> None:
    machine(ORIN_FILES, ORIN_COMMANDS, {"tensorrt": "11.4.1"})
    assert (found("tensorrt").status, found("tensorrt").advice[:13]) == ("missing", "pip uninstall")
    machine(ORIN_FILES, {"dpkg-query": "libnvinfer11 11.4.1-1+cuda13.0\nnvidia-l4t-core 36.4.3"})
    assert found("Jetson").status == "missing"
    assert "jetpack-6.2 brings TensorRT 10.3.0" in found("Jetson").found


def test_doctor_lists_other_runtimes_and_how_to_get_the_rest(machine: Callable[..., None]) -> None:
    machine(packages={"ncnn": "1.0"})
    check = found("other runtimes")
    assert (check.status, check.found) == ("note", "ncnn 1.0")
    assert "litert, executorch, coreml, tensorrt-rtx" in check.advice


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(shown: dict[str, Any]) -> None:
        *folders, last = path.split(".")
        for folder in folders:
            shown = shown[folder]
        shown[last] = value

    return apply


@pytest.mark.parametrize(
    "apply",
    [
        change("cpu.model", "another"),
        change("cpu.usable_cores", -1),
        change("cpu.flags", ["another"]),
        change("cpu.limit_cpus", 0.015),
        change("ram_bytes", 2**60),
        change("gpus", [{"name": "another"}]),
        change("jetson", {"model": "another", "power_mode": "15W"}),
        change("os.version", "99.1"),
    ],
)
def test_machine_id_changes_with_what_decides_speed(apply: Callable[[dict[str, Any]], None]) -> None:
    shown = fingerprint()
    other = copy.deepcopy(shown)
    apply(other)
    assert machine_id(other) != machine_id(shown)


def test_machine_id_ignores_software_and_small_changes_of_memory() -> None:
    shown = fingerprint() | {"ram_bytes": 8 * 2**30}
    other = copy.deepcopy(shown)
    other.update(kernel="other", python="3.12.0", packages={}, ram_bytes=8 * 2**30 - 300 * 2**20)
    other["cpu"]["governor"] = "powersave"
    assert machine_id(other) == machine_id(shown)


def test_precisions_of_a_cpu() -> None:
    assert cpu_precisions([]) == ("fp32",)
    assert cpu_precisions(["avx2"]) == ("fp32",)
    assert cpu_precisions(["avx_vnni"]) == ("fp32", "int8")
    assert cpu_precisions(["avx512_bf16", "avx512_vnni"]) == ("fp32", "bf16", "int8")
    assert cpu_precisions(["amx_bf16", "avx512_fp16"]) == ("fp32", "fp16", "bf16")


def test_doctor_says_how_to_get_what_is_missing(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    for name, extra in {"openvino": "openvino", "onnxruntime": "onnxruntime", "tensorrt": "tensorrt"}.items():
        assert found(name).status == "missing"
        assert f'pip install "thinet-deploy[{extra}]"' in found(name).advice
    assert "openssh-client" in found("ssh").advice
    assert "adb" in found("adb").advice
    assert found("torch").status == found("onnx").status == "missing"
    for check in doctor():
        assert check.status != "missing" or check.advice, check.name


def test_doctor_reports_what_is_there(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine({"/proc/cpuinfo": XEON}, packages={"openvino": "2026.4.1", "onnxruntime-gpu": "1.31.1"})
    monkeypatch.setattr(shutil, "which", lambda name: os.fspath("/somewhere/" + name))
    assert (found("openvino").status, found("openvino").found, found("openvino").advice) == ("ok", "2026.4.1", "")
    assert found("onnxruntime").found == "onnxruntime-gpu 1.31.1"
    assert found("ssh") == Check("ssh", "ok", "installed")
    assert found("CPU").found.startswith("fp32, int8 computed natively")
    assert found("NVIDIA GPU").status == "note"  # nothing is wrong with a machine without one


def test_doctor_warns_of_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**9))
    assert found("disk space").status == "note"
    assert "--out" in found("disk space").advice
