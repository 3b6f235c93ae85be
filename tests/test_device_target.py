"""Whether a device is what --target says, and which of its stacks it has: on facts of boards that are not here."""

from __future__ import annotations

from pathlib import Path

import pytest
from boards import a_machine

from thinet_deploy.devices import site as device_site
from thinet_deploy.devices.site import Machine
from thinet_deploy.errors import MissingError, TargetError, UnknownNameError
from thinet_deploy.pipeline import _check_stack
from thinet_deploy.precision.plan import PrecisionPlan
from thinet_deploy.precision.weights import S8S8
from thinet_deploy.target import load_profile


def checked(machine: Machine, target: str = "jetson") -> str:
    stack = device_site.check_target(machine, load_profile(target)).stack
    assert stack is not None
    return stack.name


@pytest.mark.parametrize(
    ("release", "tensorrt", "stack"),
    [
        ("# R35 (release), REVISION: 4.1", "8.5.2.2", "jetpack-5.1"),
        ("# R36 (release), REVISION: 3.0", "8.6.2", "jetpack-6.0"),
        ("# R36 (release), REVISION: 4.3", "10.3.0", "jetpack-6.2"),
        ("# R39 (release), REVISION: 9.9", "11.4.1", "jetpack-7.2.2"),  # found by its TensorRT
    ],
)
def test_the_stack_is_that_of_the_device(release: str, tensorrt: str, stack: str) -> None:
    machine = a_machine(files={"/etc/nv_tegra_release": release}, modules={"tensorrt": tensorrt})
    assert checked(machine) == stack


def test_tensorrt_11_on_jetpack_6_is_refused() -> None:
    with pytest.raises(TargetError, match=r"has TensorRT 11\.4\.1, but L4T 36\.4\.3 \(jetpack-6\.2\) brings 10\.3\.0"):
        checked(a_machine(modules={"tensorrt": "11.4.1"}))


def test_a_stack_that_nobody_knows_is_named_with_those_that_are_known() -> None:
    old = a_machine(files={"/etc/nv_tegra_release": "# R35 (release), REVISION: 1.0"}, modules={"tensorrt": "8.4.1"})
    said = (
        r"has TensorRT 8\.4\.1 and L4T 35\.1\.0, which is no stack that target jetson knows: jetpack-5\.1 \(8\.5\.2\), "
    )
    with pytest.raises(TargetError, match=said) as stop:
        checked(old)
    assert "Update it" in stop.value.hint


@pytest.mark.parametrize(
    ("target", "opset", "ir"),
    [
        ("jetson@jetpack-5.1", 17, 8),
        ("jetson-orin@jetpack-6.0", 17, 8),
        ("jetson", 20, 9),
        ("jetson-thor@jetpack-7.2.2", 20, 9),
    ],
)
def test_a_stack_can_be_named(target: str, opset: int, ir: int) -> None:
    """Without a device it decides what the ONNX files are."""
    from thinet_deploy.stages.precision import file_notes

    profile = load_profile(target)
    assert (profile.opset, profile.ir_version) == (opset, ir)
    files = {"net": {"fp16": {"kept": {}, "path": "net-fp16.onnx"}}}
    plan = PrecisionPlan("fp32", ("onnxruntime",), ("fp16",), S8S8)
    (note,) = file_notes(files, {"net": "Net"}, profile, plan)
    built = "tensorrt_builder.py typed/model-fp16.onnx engines/tensorrt-fp16/model.engine --precision fp16"
    assert built in note


def test_a_stack_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"no stack of target jetson called 'jetpack-5\.2'"):
        load_profile("jetson@jetpack-5.2")
    own = tmp_path / "me@home" / "board.toml"
    own.parent.mkdir()
    own.write_text('extends = "jetson"\nid = "my-board"\n')
    assert load_profile(str(own)).stack == load_profile("jetson").stack


def test_a_named_stack_that_the_device_does_not_have_is_refused() -> None:
    target = device_site.check_target(a_machine(), load_profile("jetson@jetpack-5.1"))
    assert target.stack is not None
    assert target.stack.name == "jetpack-6.2"
    _check_stack(a_machine(), target, "jetpack-6.2")
    _check_stack(a_machine(), target, "jetson")
    with pytest.raises(TargetError, match=r"names jetpack-5\.1, but ssh://orin has jetpack-6\.2") as stop:
        _check_stack(a_machine(), target, "jetpack-5.1")
    assert "Leave @jetpack-5.1 out" in stop.value.hint


def test_another_board_is_refused() -> None:
    assert checked(a_machine(), "jetson-orin-nano") == "jetpack-6.2"
    with pytest.raises(TargetError, match=r"is no jetson-agx-orin.*Jetson Orin Nano"):
        checked(a_machine(), "jetson-agx-orin")


def test_tensorrt_alone_is_enough_for_run_py() -> None:
    assert checked(a_machine(modules={"onnxruntime": None})) == "jetpack-6.2"


def test_a_board_on_which_run_py_could_check_nothing_is_refused_before_the_training() -> None:
    pi = a_machine(
        files={"/proc/device-tree/compatible": "raspberrypi,5-model-b", "/proc/device-tree/model": "Raspberry Pi 5"},
        modules={"onnxruntime": None, "tensorrt": None},
    )
    with pytest.raises(MissingError, match="none of ncnn, onnxruntime") as stop:
        device_site.check_target(pi, load_profile("raspberry-pi-5"))
    assert "python3 -m pip install ncnn" in stop.value.hint


def test_a_missing_runtime_is_named_with_how_to_get_it() -> None:
    with pytest.raises(MissingError, match="python3 there finds no tensorrt") as stop:
        checked(a_machine(modules={"tensorrt": None}))
    assert "apt install python3-libnvinfer" in stop.value.hint
    with pytest.raises(MissingError, match="none of onnxruntime, ncnn") as stop:
        device_site.check_runtimes(a_machine(modules={"onnxruntime": None}), ["onnxruntime", "ncnn"])
    assert "python3 -m pip install onnxruntime" in stop.value.hint
