"""What the files of mobile engines hold: formats by hand, files that are damaged, layers that do not add up."""

import struct
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from thinet_deploy.errors import ThinetDeployError
from thinet_deploy.precision import held as holding
from thinet_deploy.precision.executed import Executed, Proof, prove_precision, types_in
from thinet_deploy.precision.held import READERS, Kernel, held

FLAGS = {"fp32": 0, "fp16": 0x01306B47, "int8": 0x000D4B38}
BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
PARAM = """7767517
5 5
Input            input  0 1 input
Convolution      first  1 1 input a 0=3 1=3 5=1 6=81
ReLU             relu   1 1 a b
ConvolutionDepthWise second 1 1 b c 0=3 1=3 5=0 6=27 7=3
InnerProduct     last   1 1 c logits 0=4 1=1 2=12
"""
WEIGHTS = ((81, 3), (27, 0), (12, 4))  # numbers in each layer's weight and bias


def ncnn(folder: Path, kinds: tuple[str, ...], param: str = PARAM) -> Path:
    path, data = folder / "net.param", b""
    for kind, (weights, biases) in zip(kinds, WEIGHTS, strict=True):
        size = weights * BYTES[kind]
        data += struct.pack("<I", FLAGS[kind]) + bytes(-(-size // 4) * 4) + bytes(4 * biases)
    path.write_text(param)
    path.with_suffix(".bin").write_bytes(data)
    return path


PLAIN = """BatchNorm        bn     1 1 a0 a1 0=7
PReLU            prelu  1 1 a1 a2 0=7
GroupNorm        group  1 1 a2 a3 0=2 1=8 2=1e-5 3=1
LayerNorm        layer  1 1 a3 a4 0=16 1=1e-5 2=1
MemoryData       mean   0 1 a5 0=1 1=1 2=6
"""


def test_layers_whose_numbers_have_no_flag_are_walked_over(tmp_path: Path) -> None:
    """Normalisations that no convolution takes up, and the constants that vanished branches leave."""
    path = ncnn(tmp_path, ("fp16",) * 3, PARAM + PLAIN)
    data = path.with_suffix(".bin")
    data.write_bytes(data.read_bytes() + bytes(4 * (4 * 7 + 7 + 2 * 8 + 2 * 16 + 6)))
    assert [each.kind for each in held("ncnn", path, ["a", "b", "c"])] == ["fp16"] * 3


@pytest.mark.parametrize("kinds", [("fp32",) * 3, ("fp16",) * 3, ("fp16", "fp32", "int8")], ids="-".join)
def test_the_flags_of_an_ncnn_file_are_read_layer_by_layer(kinds: tuple[str, ...], tmp_path: Path) -> None:
    found = held("ncnn", ncnn(tmp_path, kinds), ["a", "b", "c"])
    assert [(each.names, each.kind) for each in found] == [((n,), k) for n, k in zip("abc", kinds, strict=True)]


def test_a_cut_or_a_strange_file_is_no_proof(tmp_path: Path) -> None:
    path = ncnn(tmp_path, ("fp16",) * 3)
    whole = path.with_suffix(".bin").read_bytes()
    path.with_suffix(".bin").write_bytes(whole[:-8])
    with pytest.raises(ThinetDeployError, match=rf"net\.bin has {len(whole) - 8} bytes, where its layers take"):
        held("ncnn", path, ["a", "b", "c"])
    path.with_suffix(".bin").write_bytes(whole[:40])
    with pytest.raises(ThinetDeployError, match="cannot be read back"):
        held("ncnn", path, ["a", "b", "c"])


def test_an_operator_that_is_not_known_is_no_proof_and_no_failure(tmp_path: Path) -> None:
    path = ncnn(tmp_path, ("fp16",) * 3, PARAM.replace("ReLU ", "Novel"))
    unread = [Kernel((each,), holding.UNREAD) for each in "bc"]
    assert held("ncnn", path, ["a", "b", "c"]) == [Kernel(("a",), "fp16"), *unread], "what stands before it is read"
    assert types_in("ncnn", path, "fp16") == frozenset(), "nothing here can tell"
    layers = tuple(Executed(each, 1, "fp16", holding.UNREAD) for each in "abc")
    assert Proof("ncnn", layers).wrong == ()
    assert Proof("ncnn", layers).describe() == "not read back 100.0 % of the MACs"


@pytest.mark.parametrize(
    ("kinds", "wrong"),
    [
        (["int8", "int8"], []),
        (["int8", "fp32"], ["second"]),
        (["int8 weights, fp32 inputs", "int8"], ["first"]),
        (["int8"], ["first", "second"]),  # one is not to be found: nothing is vouched for
        ([], ["first", "second"]),
        (["int8", "int8", "fp32"], ["first", "second"]),
        (["int8", "int8", "int8"], []),  # a layer in two parts
    ],
)
def test_no_layer_is_taken_for_int8_that_may_be_another(
    kinds: list[str], wrong: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [
        make_node("Conv", ["x", "first.weight"], ["a"], name="node_a"),
        make_node("Conv", ["a", "second.weight"], ["y"], name="node_b"),
    ]
    stored = [numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), f"{n}.weight") for n in ("first", "second")]
    ports = [make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 4, 4]) for name in ("x", "y")]
    net = make_model(make_graph(nodes, "g", ports[:1], ports[1:], stored), opset_imports=[make_opsetid("", 18)])
    monkeypatch.setitem(READERS, "litert", lambda _: iter(kinds))
    proof = prove_precision("litert", Path("none"), net, "int8")
    assert [each.layer for each in proof.wrong] == wrong


@pytest.mark.parametrize(("runtime", "module"), [("litert", "ai_edge_litert"), ("coreml", "coremltools")])
@pytest.mark.slow
def test_a_damaged_file_is_one_message(runtime: str, module: str, tmp_path: Path) -> None:
    pytest.importorskip(module, reason=f"{module} is not installed")
    (tmp_path / "net").write_bytes(b"not a network")
    with pytest.raises(ThinetDeployError, match="cannot be read back"):
        held(runtime, tmp_path / "net", ["a"])


def test_a_program_without_xnnpack_vouches_for_nothing(tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="executorch is not installed")
    (tmp_path / "net.pte").write_bytes(b"ET12" + bytes(100))
    assert [each.kind for each in held("executorch", tmp_path / "net.pte", ["a"])] == [holding.UNKNOWN]
