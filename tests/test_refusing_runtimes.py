"""What does not take a network is left out and named, and nothing of an earlier build passes for this one."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from thinet_deploy.artifact import Artifact
from thinet_deploy.bundle import read_manifest
from thinet_deploy.errors import ConversionError
from thinet_deploy.interfaces import Conversion
from thinet_deploy.options import Options
from thinet_deploy.pipeline import build
from thinet_deploy.registry import convert
from thinet_deploy.reports import texts
from thinet_deploy.reports.table import read_table
from thinet_deploy.stages import deploy as deploy_stage
from thinet_deploy.timing.latency import TorchLatency
from thinet_deploy.timing.torch_latency import measure_torch

MakeOptions = Callable[..., Options]
WHY = "openvino failed: no rule for Frobnicate in model.onnx."


@pytest.mark.usefixtures("quick")
def test_a_runtime_that_refuses_a_network_is_left_out_named_and_tried_again(
    tiny_options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    refusing = {"openvino"}

    def picky(runtime: str, job: Conversion, *args: Any, **options: Any) -> Artifact:
        if runtime in refusing and job.source.stem != "original":
            raise ConversionError(WHY.replace("model", f"{tmp_path}/model"), hint="See the log.")
        return convert(runtime, job, *args, **options)

    monkeypatch.setattr(deploy_stage, "convert", picky)
    options = tiny_options(tmp_path / "run", "plain", controls="none")
    done = build(options)
    assert {each.runtime for each in read_manifest(done.bundle).engines} == {"onnxruntime"}
    assert f"No engine for openvino: {WHY}" in done.notes
    assert f"No engine for openvino: {WHY}" in read_manifest(done.bundle).notes
    assert not (tmp_path / "run" / "engines" / "openvino").exists()
    refusing.clear()
    done = build(options)
    assert {each.runtime for each in read_manifest(done.bundle).engines} == {"openvino", "onnxruntime"}
    assert not any(note.startswith("No engine") for note in done.notes)
    refusing.update({"openvino", "onnxruntime"})
    with pytest.raises(ConversionError, match="no rule for Frobnicate"):
        build(options.model_copy(update={"keep": 0.8}))
    assert (tmp_path / "run" / "conv").exists(), "results are kept"
    assert not (tmp_path / "run" / "bundle").exists(), "the earlier build's would pass for this one's"
    assert not (tmp_path / "run" / "report").exists()


@pytest.mark.usefixtures("quick")
def test_networks_that_cannot_be_timed_in_training_are_built_all_the_same(
    tiny_options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = False

    def measure(models: Mapping[str, nn.Module], shape: Sequence[int], **how: Any) -> list[TorchLatency]:
        return measure_torch(models, shape if fits else (*shape, 1), **how)

    monkeypatch.setattr(deploy_stage, "measure_torch", measure)
    options = tiny_options(tmp_path / "run", "plain", controls="none")
    done = build(options)
    (note,) = (note for note in done.notes if note.startswith("No forward and backward times: "))
    assert "original cannot be run forward and backward: " in note
    assert done.table == read_table(done.run)
    assert done.bundle.exists()
    row = done.table.shipped
    assert (row.forward, row.backward) == (None, None)
    assert "| not run |" in texts.to_markdown([done.table])
    fits = True
    again = build(options)
    assert again.table.shipped.forward is not None, "tried again"
    assert not any("forward and backward" in note for note in again.notes)
