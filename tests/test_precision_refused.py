"""`build --precision`: what is refused, or told, before any work is done."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thinet_deploy.errors import DataError, MissingError, TargetError, UnknownNameError
from thinet_deploy.options import Options, make_options
from thinet_deploy.pipeline import build
from thinet_deploy.precision import plan
from thinet_deploy.stages import precision as precision_stage
from thinet_deploy.target import load_profile

MakeOptions = Callable[..., Options]


def test_fp16_is_refused_on_cpus_before_anything_is_written(tiny_options: MakeOptions, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"cpu cannot compute in fp16: ONNX Runtime widens"):
        build(tiny_options(tmp_path / "run", target="cpu", precision="fp16"))
    assert not (tmp_path / "run").exists()


def test_bf16_is_refused_where_the_cpu_has_none(
    tiny_options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision_stage, "fingerprint", lambda: {"cpu": {"flags": ["avx2", "avx_vnni"]}})
    with pytest.raises(TargetError, match="neither AVX512_BF16 nor AMX") as refused:
        build(tiny_options(tmp_path / "run", target="cpu", precision="bf16"))
    assert "--precision int8" in refused.value.hint
    assert not (tmp_path / "run").exists()


def test_a_cpu_without_vnni_gets_weights_of_seven_bits() -> None:
    old = plan.plan_precision(load_profile("cpu"), "int8", ["avx2"])
    assert old.layout.weight_most == 63
    assert "no VNNI" in old.notes[0]
    assert plan.plan_precision(load_profile("cpu"), "int8", ["avx512_vnni"]).layout.weight_most == 127


def test_without_onnxruntime_int8_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingError, match="fp16, int8 needs ONNX Runtime") as missing:
        plan.plan_precision(load_profile("jetson"), None, [])
    assert missing.value.exit_code == 3
    assert plan.plan_precision(load_profile("cpu"), "fp32", []).files == ()


def test_an_unknown_precision_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as unknown:
        make_options({"precision": "int6"})
    assert "Did you mean 'int8'?" in unknown.value.hint


@pytest.mark.usefixtures("quick")
def test_too_few_images_are_refused_or_told(cli: Callable[..., Any], workplace: Path) -> None:
    """Twelve training images, of which two are held out."""
    arguments = ["build", "--data", "data", "--model", "net.py:headless", "--epochs", 1, "--finetune-epochs", 0]
    asked = cli(*arguments, "--precision", "int8", "--out", "a")
    assert asked.code == DataError.exit_code == 2
    assert "--precision int8: there are 10 calibration images, and at least 16 are needed" in asked.err
    assert not Path("a").exists()
    told = cli(*arguments, "--target", "jetson", "--controls", "none", "--out", "b")
    assert told.code == 0, told.err
    assert "No fp16 or int8 file: there are 10 calibration images" in told.out
