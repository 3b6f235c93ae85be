"""Which precision goes where: what engines compute in, which typed files are written, or why it cannot be."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from importlib import util

from ..environment import cpu_precisions
from ..errors import MissingError, TargetError
from ..interfaces import Precision
from ..registry import CONVERTERS, converter, host_runtimes, runs_here
from ..target import TargetProfile
from .upgrade import NEW as BF16_OPSET
from .weights import S8S8, U8S7, U8S8, Layout

# What these compute in on the CPU here, so that an engine can be checked; all others, in what their converters can be
# asked for. ONNX Runtime turns every FP16 and BF16 weight back to FP32, and OpenVINO's f16 may be bf16.
_COMPUTES: dict[str, frozenset[Precision]] = {
    "openvino": frozenset({"fp32", "bf16", "int8"}),
    "onnxruntime": frozenset({"fp32", "int8"}),
}


@dataclass(frozen=True)
class PrecisionPlan:
    """What to make.

    Attributes:
        engines: what the engines that are made here compute in.
        runtimes: that can, in the target's order.
        files: typed ONNX files to write, for the engines here or for the device to build its own from.
        layout: of the Q/DQ pairs in INT8.
        notes: what the user has to know.
    """

    engines: Precision
    runtimes: tuple[str, ...]
    files: tuple[Precision, ...]
    layout: Layout
    notes: tuple[str, ...] = ()


def plan_precision(
    target: TargetProfile, asked: Precision | None, cpu_flags: Collection[str], dla: int | None = None
) -> PrecisionPlan:
    """Decide before any work starts.

    Without a wish, engines made here are fp32, and a target that builds TensorRT engines gets a file for each shorter
    type it computes in, to choose from by measuring.

    Args:
        target: to build for.
        asked: by the user.
        cpu_flags: of this machine, as /proc/cpuinfo spells them.
        dla: the DLA that is to take the layers that it can; only what it computes in is written then.

    Raises:
        TargetError: the target, or this machine if it is the target, cannot compute in it; nothing makes such engines;
            there is no such DLA.
        MissingError: what makes them, or ONNX Runtime, which runs the calibration images, is not installed.
    """
    if asked:
        target.require_precision(asked)
    if dla is not None:
        target.require_dla(dla, asked)
    runtimes = tuple(host_runtimes(target))
    if runs_here(target):
        plan = _here(target, asked or "fp32", runtimes, cpu_flags)
    elif target.builds_on_device:
        if asked == "bf16":
            _require_bf16_files(target)
        # BF16 is as fast as FP16 and rounds more: who needs its range asks for it.
        short: tuple[Precision, ...] = ("fp16", "int8") if dla is None else target.dla_precisions
        usual = short if "tensorrt" in target.runtimes else ()
        wanted = (asked,) if asked else tuple(each for each in usual if each in target.precisions.supported)
        plan = PrecisionPlan("fp32", runtimes, tuple(each for each in wanted if each != "fp32"), _layout(target, ()))
    else:
        plan = _for_device(target, asked or "fp32", runtimes)
    if plan.files and util.find_spec("onnxruntime") is None:
        raise MissingError(
            f"{', '.join(plan.files)} needs ONNX Runtime here, to run the calibration images.",
            hint='Install it: pip install "thinet-deploy[onnxruntime]"',
        )
    return plan


def _require_bf16_files(target: TargetProfile) -> None:
    """Raise TargetError where the target's stack does not read what a file in bf16 takes."""
    newest = target.stack.opset_max if target.stack else target.opset
    if newest >= BF16_OPSET:
        return
    reads = f"TensorRT of {target.stack.name}" if target.stack else f"what reads it on {target.id}"
    better = [f"--target {target.id}@{each.name}" for each in target.stacks if each.opset_max >= BF16_OPSET]
    raise TargetError(
        f"An ONNX file in bf16 takes opset {BF16_OPSET}, the first that has convolutions in it, and {reads} is known "
        f"to read opset {newest} at most.",
        hint="Use --precision fp16: it is as fast, and layers that would overflow in it stay in fp32."
        + (f" Or build for a later stack: {' or '.join(better)}." if better else ""),
    )


def _here(
    target: TargetProfile, precision: Precision, runtimes: tuple[str, ...], cpu_flags: Collection[str]
) -> PrecisionPlan:
    native, notes = cpu_precisions(cpu_flags), []
    if precision == "bf16" and "bf16" not in native:
        raise TargetError(
            "This CPU does not compute in bf16: it has neither AVX512_BF16 nor AMX.",
            hint=f"Use --precision {'int8' if 'int8' in native else 'fp32'}.",
        )
    if precision == "int8" and "int8" not in native:
        notes.append("This CPU has no VNNI: INT8 may be no faster than fp32 here. Weights have 7 bits for its sake.")
    able, unable = _able(runtimes, precision)
    if unable:
        notes.append(f"No engine for {', '.join(unable)}: it does not compute in {precision} on a CPU.")
    files: tuple[Precision, ...] = ("int8",) if precision == "int8" else ()
    return PrecisionPlan(precision, able, files, _layout(target, native), tuple(notes))


def _for_device(target: TargetProfile, precision: Precision, runtimes: tuple[str, ...]) -> PrecisionPlan:
    """For a phone or a board whose engines are made here, as plain files."""
    able, unable = _able(runtimes, precision)
    makers = [each for each in _able(target.runtimes, precision)[0] if each not in runtimes]
    if not able and not makers and precision != "fp32":
        raise TargetError(
            f"{target.id} has {', '.join(target.runtimes)}, and for none of them engines are made in {precision} here.",
            hint="Use --precision fp32.",
        )
    if not able and precision != "fp32":
        there = " or ".join(makers)
        raise MissingError(
            f"There can be no {precision} engine for {target.id}: what makes one for {there} is not installed.",
            hint=f'Install it: pip install "thinet-deploy[{converter(makers[0]).CONTRACT.extra}]".',
        )
    notes = [f"No {precision} engine for {each}{_why_not(each, precision)}." for each in unable]
    files: tuple[Precision, ...] = ("int8",) if precision == "int8" else ()
    return PrecisionPlan(precision, able, files, _layout(target, ()), tuple(notes))


def _why_not(runtime: str, precision: Precision) -> str:
    """Its converter's reason; else it could be made, and the CPU here could not check it."""
    contract = converter(runtime).CONTRACT
    return ": this machine could not check it" if precision in contract.precisions else contract.why_not(precision)


def _able(runtimes: tuple[str, ...], precision: Precision) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of some runtimes those whose engines can be made, and checked, in a precision, and the others."""

    def can(runtime: str) -> bool:
        asked_for = converter(runtime).CONTRACT.precisions
        return precision in asked_for and precision in _COMPUTES.get(runtime, asked_for)

    known = [each for each in runtimes if each in CONVERTERS]
    return tuple(each for each in known if can(each)), tuple(each for each in known if not can(each))


def _layout(target: TargetProfile, native: Collection[str]) -> Layout:
    if "tensorrt" in target.runtimes:
        return S8S8
    return U8S8 if "int8" in native or not runs_here(target) else U8S7
