"""ONNX files of a few nodes, made where onnx is installed, for tests of engines."""

from pathlib import Path

import numpy as np
import pytest

from thinet_deploy.bundle import BundleSpec, EngineFile
from thinet_deploy.interfaces import TensorSpec


def pooled_onnx(path: Path, width: int = 8, size: int = 16) -> Path:
    """One convolution of `width` filters and a global pool, for images of `size` pixels on a side."""
    onnx = pytest.importorskip("onnx", reason="the engines of these tests are made with onnx")
    make = onnx.helper
    weight = np.random.default_rng(0).standard_normal((width, 3, 3, 3)).astype("float32")
    nodes = [make.make_node("Conv", ["x", "w"], ["c"]), make.make_node("GlobalAveragePool", ["c"], ["y"])]
    ends = [make.make_tensor_value_info(n, 1, ["batch", *s]) for n, s in (("x", [3, size, size]), ("y", [width, 1, 1]))]
    graph = make.make_graph(nodes, "tiny", ends[:1], ends[1:], [onnx.numpy_helper.from_array(weight, "w")])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), path)
    return path


def scored_onnx(path: Path) -> Path:
    """One convolution, a global pool, flatten."""
    onnx = pytest.importorskip("onnx", reason="the engines of these tests are made with onnx")
    make = onnx.helper
    weight = np.random.default_rng(0).standard_normal((5, 3, 3, 3)).astype("float32")
    names = ("x", "c", "g", "y")
    kinds = zip(("Conv", "GlobalAveragePool", "Flatten"), names, names[1:], strict=False)
    nodes = [make.make_node(kind, [a, "w"] if kind == "Conv" else [a], [b]) for kind, a, b in kinds]
    ends = [make.make_tensor_value_info(n, 1, ["batch", *s]) for n, s in (("x", [3, 12, 12]), ("y", [5]))]
    graph = make.make_graph(nodes, "tiny", ends[:1], ends[1:], [onnx.numpy_helper.from_array(weight, "w")])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), path)
    return path


def scored_spec(folder: Path, images: int) -> BundleSpec:
    """A bundle of the network of `scored_onnx`, with an engine of OpenVINO and one of ONNX Runtime."""
    reference = pytest.importorskip("onnx.reference", reason="onnx is not installed")
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    source = scored_onnx(folder / "tiny.onnx")
    openvino.save_model(openvino.convert_model(source), folder / "tiny.xml", compress_to_fp16=False)
    x = np.random.default_rng(1).standard_normal((images, 3, 12, 12)).astype("float32")
    return BundleSpec(
        model="tiny",
        target="cpu",
        onnx=source,
        engines=(
            EngineFile("openvino", folder / "tiny.xml", "fp32", 1e-4),
            EngineFile("onnxruntime", source, "fp32", 1e-4),
        ),
        inputs=(TensorSpec("x", ("batch", 3, 12, 12), "float32"),),
        outputs=(TensorSpec("y", ("batch", 5), "float32"),),
        golden_inputs={"x": x},
        golden_outputs={"y": np.asarray(next(iter(reference.ReferenceEvaluator(str(source)).run(None, {"x": x}))))},
        tolerance=1e-4,
    )
