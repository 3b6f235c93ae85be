"""`thinet-deploy latency`: engines, bundles, runs and models are told apart, measured, and refused with a reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_onnx import pooled_onnx, scored_onnx

from thinet_deploy.artifact import write_json
from thinet_deploy.bundle import BundleSpec, EngineFile, write_bundle
from thinet_deploy.errors import BundleError, InputError, UnknownNameError
from thinet_deploy.export import INPUT
from thinet_deploy.interfaces import TensorSpec
from thinet_deploy.timing import things
from thinet_deploy.timing.things import Engines, Model, find

Cli = Callable[..., Any]
FAST = ("--seconds", "0.05", "--rounds", "6")


def tiny_bundle(folder: Path) -> Path:
    source = pooled_onnx(folder / "net.onnx")
    place = folder / "bundle"
    place.mkdir()
    x = np.ones((1, 3, 16, 16), "float32")
    spec = BundleSpec(
        model="tiny",
        target="cpu",
        onnx=source,
        engines=(EngineFile("onnxruntime", source, "fp32", 1e-5),),
        inputs=(TensorSpec("x", ("batch", 3, 16, 16), "float32"),),
        outputs=(TensorSpec("y", ("batch", 8, 1, 1), "float32"),),
        golden_inputs={"x": x},
        golden_outputs={"y": np.zeros((1, 8, 1, 1), "float32")},
        tolerance=1e-5,
    )
    write_bundle(place, spec)
    return place


def test_an_engine_says_itself_which_images_it_takes(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    source = pooled_onnx(tmp_path / "net.onnx")
    openvino.save_model(openvino.convert_model(source), tmp_path / "net.xml", compress_to_fp16=False)
    for path, runtime in ((source, "onnxruntime"), (tmp_path / "net.xml", "openvino")):
        found = find(str(path), None, "fp32")
        assert isinstance(found, Engines)
        assert [ref.runtime for ref in found.refs] == [runtime]
        assert {name: array.shape for name, array in found.inputs.items()} == {"x": (1, 3, 16, 16)}


def test_a_file_is_not_said_to_compute_in_what_it_does_not(cli: Cli, tmp_path: Path) -> None:
    path = scored_onnx(tmp_path / "net.onnx")
    for asked in ("int8", "fp16"):
        told = cli("latency", path, "--precision", asked, "--seconds", "0.1")
        assert told.code == 2
        assert f"computes in fp32 on onnxruntime here, and --precision is {asked}" in told.err


def test_two_engines_are_measured_in_turn_also_at_a_frame_rate(cli: Cli, tmp_path: Path) -> None:
    wide, thin = pooled_onnx(tmp_path / "wide.onnx", 64), pooled_onnx(tmp_path / "thin.onnx", 4)
    done = cli("latency", wide, thin, *FAST, "--fps", 100, "--out", tmp_path / "out.json")
    assert done.code == 0
    assert done.out.count("times as fast as wide onnxruntime fp32") == 2
    assert done.out.count(", 100 a second") == 2
    document = json.loads((tmp_path / "out.json").read_text())
    assert [(row["model"], row["fps"]) for row in document["engines"]] == [
        ("wide", 0),
        ("thin", 0),
        ("wide", 100),
        ("thin", 100),
    ]
    assert document["environment"]["cpu"]
    assert all(row["energy"] is None or row["energy"]["joules_per_run"] for row in document["engines"])


def test_engines_and_models_of_other_images_are_not_compared_with_each_other(cli: Cli, tmp_path: Path) -> None:
    small, large = pooled_onnx(tmp_path / "small.onnx"), pooled_onnx(tmp_path / "large.onnx", size=24)
    twin = pooled_onnx(tmp_path / "twin.onnx")
    done = cli("latency", small, large, twin, *FAST, "--json")
    faster = {row["model"]: row["speedup"] for row in json.loads(done.out)["engines"]}
    assert faster["small"] is faster["large"] is None, "nothing was measured in turn with them before them"
    assert faster["twin"]["baseline"] == "small onnxruntime fp32"


def test_the_original_is_what_others_are_compared_with_wherever_it_stands(cli: Cli, tmp_path: Path) -> None:
    thin, original = pooled_onnx(tmp_path / "thin.onnx", 4), pooled_onnx(tmp_path / "original.onnx", 64)
    done = cli("latency", thin, original, *FAST, "--json")
    faster = {row["model"]: row["speedup"] for row in json.loads(done.out)["engines"]}
    assert faster["thin"]["baseline"] == "original onnxruntime fp32"
    assert faster["original"] is None


def test_models_are_compared_with_the_first_of_them(cli: Cli, workplace: Path) -> None:
    done = cli("latency", "net.py:tiny", "net.py:wider", *FAST)
    assert done.code == 0, done.err
    assert done.out.count("times as fast as net.py:tiny torch forward and backward") == 1


def test_a_model_is_measured_forward_and_backward(cli: Cli, workplace: Path) -> None:
    done = cli("latency", "net.py:tiny", *FAST, "--json")
    (model,) = json.loads(done.out)["models"]
    assert model["forward"]["summary"]["n"] == model["backward"]["summary"]["n"] == 7
    text = cli("latency", "net.py:tiny", *FAST)
    assert "forward " in text.out
    assert "backward " in text.out
    assert model["threads"] == 1
    before = torch.get_num_threads()
    (model,) = json.loads(cli("latency", "net.py:tiny", *FAST, "--threads", 2, "--json").out)["models"]
    assert model["threads"] == 2
    assert torch.get_num_threads() == before
    paced = cli("latency", "net.py:tiny", *FAST, "--fps", 30)
    assert (paced.code, "--fps paces engines" in paced.err) == (2, True)
    wrong = cli("latency", "net.py:shapeless", *FAST)
    assert wrong.code == 2
    assert "does not say which images it takes" in wrong.err
    assert cli("latency", "net.py:shapeless", "--input-shape", "3x16x16", *FAST).code == 0


def test_a_bundle_is_measured_on_its_golden_input_unless_damaged(cli: Cli, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    done = cli("latency", bundle, *FAST, "--batch", 2)
    assert done.code == 0
    assert "tiny, onnxruntime fp32, batch 2, threads: 1" in done.out
    (bundle / "model.onnx").write_bytes(b"not what it was")
    with pytest.raises(BundleError, match=r"damaged: model\.onnx"):
        find(str(bundle), None, "fp32")


def test_the_bundle_measures_itself_with_the_same_code(tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-I", str(tiny_bundle(tmp_path) / "run.py"), "latency", "--seconds", "1", "--json"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    (row,) = report["engines"]
    assert row["summary"]["invalid"] == []
    assert set(row) >= {"machine", "memory", "energy", "clocks_ms", "rounds_ms", "load_ms", "first_ms"}


def run_of(folder: Path, precision: str = "fp32", **engines: Path) -> Path:
    """What is looked at of a finished run; network → file for ONNX Runtime."""
    write_json(folder / "run.json", {})
    made = {f"{name}/onnxruntime": {"path": str(path)} for name, path in engines.items()}
    write_json(folder / "engines" / "engines.json", made)
    write_json(folder / "report" / "table.json", {"precision": precision})
    (folder / "parity").mkdir()
    np.savez(folder / "parity" / "original.npz", input=np.ones((4, 3, 16, 16), "float32"))
    return folder


def test_engines_of_a_run_compute_in_what_its_table_says(tmp_path: Path) -> None:
    found = find(str(run_of(tmp_path, "int8", original=Path("a.onnx"), conv=Path("b.onnx"))), None, "fp32")
    assert isinstance(found, Engines)
    assert [(ref.model, ref.runtime, ref.precision) for ref in found.refs] == [
        ("original", "onnxruntime", "int8"),
        ("conv", "onnxruntime", "int8"),
    ]
    assert [array.shape for array in found.inputs.values()] == [(1, 3, 16, 16)]


def test_every_run_is_compared_with_its_own_original(cli: Cli, tmp_path: Path) -> None:
    runs = [
        run_of(
            tmp_path / name,
            original=pooled_onnx(tmp_path / f"{name}_wide.onnx", wide),
            conv=pooled_onnx(tmp_path / f"{name}_thin.onnx", 4),
        )
        for name, wide in (("a", 64), ("b", 16))
    ]
    # Their input is called "input", as in all runs.
    for path in tmp_path.glob("*.onnx"):
        onnx = pytest.importorskip("onnx", reason="an input gets another name")
        model = onnx.load(path)
        model.graph.input[0].name = model.graph.node[0].input[0] = INPUT
        onnx.save(model, path)
    done = cli("latency", *runs, *FAST, "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["engines"]
    assert [(row["thing"], row["model"]) for row in rows] == [(str(r), m) for r in runs for m in ("original", "conv")]
    against = [row["speedup"] and row["speedup"]["baseline"] for row in rows]
    assert against == [None, f"{runs[0]}: original onnxruntime fp32", None, f"{runs[1]}: original onnxruntime fp32"]


def test_files_of_one_name_are_told_apart(cli: Cli, tmp_path: Path) -> None:
    for name, width in (("dense", 64), ("thin", 4)):
        (tmp_path / name).mkdir()
        pooled_onnx(tmp_path / name / "model.onnx", width)
    done = cli("latency", tmp_path / "dense" / "model.onnx", tmp_path / "thin" / "model.onnx", *FAST)
    assert f"times as fast as {tmp_path / 'dense' / 'model.onnx'}: model" in done.out
    assert f"\n{tmp_path / 'thin' / 'model.onnx'}: model, onnxruntime" in done.out


def test_a_shape_fills_in_what_a_file_leaves_open(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="an input gets another shape")
    model = onnx.load(pooled_onnx(tmp_path / "fixed.onnx"))
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "side"
    onnx.save(model, tmp_path / "open.onnx")
    with pytest.raises(InputError, match="does not say which images"):
        find(str(tmp_path / "open.onnx"), None, "fp32")
    found = find(str(tmp_path / "open.onnx"), (3, 24, 20), "fp32")
    assert isinstance(found, Engines)
    assert found.inputs["x"].shape == (1, 3, 24, 20)
    for name, said in (("fixed", "3x16x16"), ("open", r"3x\?x\?")):
        with pytest.raises(InputError, match=f"takes images of {said}, but --input-shape is 1x24x20"):
            find(str(tmp_path / f"{name}.onnx"), (1, 24, 20), "fp32")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("net.py:tiny", "--precision", "bf16"), "--precision is of engine files, and net.py:tiny is none"),
        (("vgg-small", "--fps", "inf"), "have to be finite numbers"),
        (("vgg-small", "--out", "."), "is a folder, but the name of a file was expected"),
    ],
)
def test_what_would_be_lost_or_do_nothing_is_refused_first(
    given: tuple[str, ...], words: str, cli: Cli, workplace: Path
) -> None:
    del workplace
    told = cli("latency", *given)
    assert (told.code, words in told.err) == (2, True), told.err


def test_what_was_measured_is_shown_even_if_it_cannot_be_kept(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = cli("latency", pooled_onnx(tmp_path / "net.onnx"), *FAST, "--out", tmp_path / "file" / "times.json")
    assert told.code == 2
    assert "net, onnxruntime fp32" in told.out


def test_what_cannot_be_measured_is_explained(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {})
    with pytest.raises(InputError, match="has no engines to time"):
        find(str(tmp_path), None, "fp32")
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(InputError, match="neither an engine"):
        find(str(tmp_path / "text.txt"), None, "fp32")
    with pytest.raises(UnknownNameError, match="Did you mean 'vgg16'"):
        find("vgg61", None, "fp32")
    for name in ("bad.xml", "bad.onnx"):
        (tmp_path / name).write_bytes(b"garbage")
        with pytest.raises(InputError, match="cannot be read"):
            find(str(tmp_path / name), None, "fp32")
    (tmp_path / "net.tflite").write_bytes(b"garbage")
    with pytest.raises(InputError, match="which images it takes"):
        find(str(tmp_path / "net.tflite"), None, "fp32")
    shaped = find(str(tmp_path / "net.tflite"), (3, 8, 8), "fp32")
    assert isinstance(shaped, Engines)
    assert shaped.inputs[INPUT].shape == (1, 3, 8, 8)


def test_a_time_that_does_not_hold_ends_with_1(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def noise(path: Path, shape: Any) -> dict[str, Any]:
        return {"x": np.full((1, 3, 16, 16), np.nan, "float32")}

    monkeypatch.setattr(things, "_noise", noise)
    done = cli("latency", pooled_onnx(tmp_path / "net.onnx"), pooled_onnx(tmp_path / "thin.onnx", 4), *FAST)
    assert done.code == 1
    assert "times as fast" not in done.out
    assert "INVALID because the outputs hold NaN or infinity" in done.out


def test_a_bundle_whose_times_do_not_hold_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from thinet_deploy.on_device import runner

    whole = runner.measure

    def hot(*given: Any, **how: Any) -> dict[str, Any]:
        rows = whole(*given, **how)
        for row in rows.values():
            row["summary"]["invalid"] = ["the processor throttled"]
        return rows

    bundle = str(tiny_bundle(tmp_path))
    assert runner.latency(bundle, 1, 1, 0.05, 6)["exit_code"] == 0
    monkeypatch.setattr(runner, "measure", hot)
    assert runner.latency(bundle, 1, 1, 0.05, 6)["exit_code"] == 1


def test_a_containers_limit_is_the_default_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from thinet_deploy.on_device import runner, sensors

    monkeypatch.setattr(runner.os, "sched_getaffinity", lambda _: set(range(32)), raising=False)  # type: ignore[attr-defined]
    for limit, threads in ((None, 32), (2.0, 2), (2.5, 3), (0.5, 1), (64.0, 32)):
        monkeypatch.setattr(sensors, "cpu_limit", lambda limit=limit: limit)
        assert runner.usable_cores() == threads


def test_models_by_name() -> None:
    found = find("vgg-small", None, "fp32")
    assert isinstance(found, Model)
    assert found.input_shape == (3, 32, 32)
