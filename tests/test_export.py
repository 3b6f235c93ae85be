"""export.py: the ONNX file is what was asked for, computes what torch computes, and tells nothing of this machine."""

import site
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.external_data_helper import convert_model_to_external_data
from torch import nn
from torch.nn import functional as F

from thinet_deploy.errors import ModelError, TargetError
from thinet_deploy.export import INPUT, OUTPUT, check_exportable, export_onnx, inspect, run_onnx
from thinet_deploy.models.vgg import vgg_small

SHAPE = (1, 8, 8)
Forward = Callable[["Net", "torch.Tensor"], "torch.Tensor"]


class Net(nn.Module):
    """A convolution, then what a test asks for."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.small, self.large = nn.Linear(4, 3), nn.Linear(4 * 8 * 8, 3)
        self.how = forward
        with torch.no_grad():
            self.norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            self.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.how(self, x)


def export(forward: Forward, path: Path, opset: int = 20, ir_version: int = 9) -> tuple[Net, Path]:
    net = Net(forward).eval()
    export_onnx(net, SHAPE, path, opset=opset, ir_version=ir_version)
    return net, path


def mean(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.small(torch.relu(net.norm(net.conv(x))).mean((2, 3)))  # type: ignore[no-any-return]


WORKING: dict[str, Forward] = {
    "mean": mean,
    "gap": lambda net, x: net.small(F.adaptive_avg_pool2d(net.conv(x), 1).flatten(1)),
    "view": lambda net, x: net.large(net.conv(x).view(x.size(0), -1)),
    "reshape": lambda net, x: net.large(net.conv(x).reshape(x.shape[0], -1)),
    "flatten": lambda net, x: net.large(torch.flatten(net.conv(x), 1)),
    "pools": lambda net, x: net.small(F.avg_pool2d(F.max_pool2d(net.conv(x), 3, 2, ceil_mode=True), 4).flatten(1)),
    "zeros": lambda net, x: mean(net, x) + torch.zeros(x.shape[0], 3),
    "concat": lambda net, x: net.large(torch.cat([net.conv(x)[:, :2], net.conv(-x)[:, 2:]], 1).flatten(1)),
}
FROZEN: dict[str, Forward] = {
    "int": lambda net, x: net.large(net.conv(x).reshape(int(x.shape[0]), -1)),
    "branch": lambda net, x: mean(net, x) if x.shape[0] == 2 else mean(net, 2 * x),
    "loop": lambda net, x: torch.stack([net.large(net.conv(x)[i].flatten()) for i in range(x.shape[0])]),
    "one row": lambda net, x: mean(net, x).mean(0, keepdim=True),
}


@pytest.mark.parametrize("name", WORKING)
def test_any_batch_size_computes_what_torch_computes(name: str, tmp_path: Path) -> None:
    net, path = export(WORKING[name], tmp_path / "net.onnx")
    for batch in (1, 2, 7):
        images = np.random.default_rng(batch).standard_normal((batch, *SHAPE)).astype(np.float32)
        with torch.inference_mode():
            expected = net(torch.from_numpy(images)).numpy()
        got = run_onnx(path, images)["logits"]
        assert got.shape == (batch, 3)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_batch_size_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"batch size is frozen.*2x|batch size is frozen.*→ 1x3") as failure:
        export(FROZEN[name], tmp_path / "net.onnx")
    assert "forward() must" in failure.value.hint
    assert list(tmp_path.iterdir()) == [], "a refused file must not stay"
    with pytest.raises(ModelError, match="batch size is frozen"):
        check_exportable(Net(FROZEN[name]), SHAPE, opset=20)


@pytest.mark.parametrize("small", [1e-6, 1e-8, 1e-12])
@pytest.mark.parametrize("opset", [17, 20])
def test_what_keeps_a_division_finite_stays_however_small_it_is(small: float, opset: int, tmp_path: Path) -> None:
    """Nothing but zeros comes out of the network, as of a dark image: without the small number it is 0 / 0."""

    def normalised(net: Net, x: torch.Tensor) -> torch.Tensor:
        found = torch.relu(net.norm(net.conv(x))).mean((2, 3)) * 0
        apart = found - found.mean(1, keepdim=True)
        spread = torch.sqrt((apart * apart).mean(1, keepdim=True) + small)
        said: torch.Tensor = net.small(found / (found.abs().sum(1, keepdim=True) + small) + apart / spread)
        return said

    net, path = export(normalised, tmp_path / "net.onnx", opset, 8 if opset == 17 else 9)
    x = torch.zeros(3, *SHAPE)
    with torch.inference_mode():
        np.testing.assert_allclose(run_onnx(path, x.numpy())[OUTPUT], net(x), atol=1e-6)


def test_what_cannot_be_exported_is_explained_in_one_line(tmp_path: Path) -> None:
    def impossible(net: Net, x: torch.Tensor) -> torch.Tensor:
        return mean(net, torch.from_numpy(np.sort(x.numpy())))

    with pytest.raises(ModelError, match=r"cannot be exported to ONNX: \S+") as failure:
        export(impossible, tmp_path / "net.onnx")
    assert "\n" not in failure.value.what
    assert list(tmp_path.iterdir()) == []


def test_the_exporters_first_reason_is_given_and_not_how_far_it_got(tmp_path: Path) -> None:
    def attending(net: Net, x: torch.Tensor) -> torch.Tensor:
        rows = net.conv(x).flatten(2)
        said: torch.Tensor = net.small(F.scaled_dot_product_attention(rows, rows, rows).mean(2))
        return said

    with pytest.raises(ModelError, match="exported to ONNX: only 4D query, key, and value are supported"):
        export(attending, tmp_path / "net.onnx")


@pytest.mark.parametrize(("opset", "ir_version"), [(17, 8), (18, 8), (19, 9), (20, 9), (20, 10), (21, 10)])
def test_opset_and_ir_version_are_as_asked(opset: int, ir_version: int, tmp_path: Path) -> None:
    _, path = export(mean, tmp_path / "net.onnx", opset, ir_version)
    proto = onnx.load(path)
    assert proto.ir_version == ir_version
    assert [(item.domain, item.version) for item in proto.opset_import if item.domain in ("", "ai.onnx")] == [
        ("", opset)
    ]
    found = inspect(path)
    assert (found.opset, found.ir_version) == (opset, ir_version)
    assert [(spec.name, spec.shape, spec.dtype) for spec in (*found.inputs, *found.outputs)] == [
        (INPUT, ("batch", *SHAPE), "float32"),
        (OUTPUT, ("batch", 3), "float32"),
    ]
    assert found.operators["Conv"] == 1


def test_an_opset_that_nobody_writes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="up to opset 16, but 17 is the oldest"):
        export(mean, tmp_path / "net.onnx", 16, 8)
    assert list(tmp_path.iterdir()) == []


def test_nothing_in_the_file_tells_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export_onnx(vgg_small(), (3, 32, 32), path, opset=20, ir_version=9)
    data = path.read_bytes()
    places = [Path.cwd(), Path.home(), Path(__file__).parent, tmp_path, *map(Path, site.getsitepackages())]
    words = [str(place).encode() for place in places if len(str(place)) > 4]
    for word in (*words, b"site-packages", b"thinet", b".py", b'File "', b"stack_trace", b"tests/"):
        assert word not in data, word
    proto = onnx.load(path)
    parts = [proto, proto.graph, *proto.graph.node, *proto.graph.initializer, *proto.graph.value_info, *proto.functions]
    assert all(not part.doc_string and not part.metadata_props for part in parts)


def test_nothing_in_the_branches_of_a_file_tells_of_this_machine(tmp_path: Path) -> None:
    def branching(net: Net, x: torch.Tensor) -> torch.Tensor:
        either = torch.cond(x.mean() > 0, torch.relu, torch.tanh, (net.conv(x),))
        said: torch.Tensor = net.small(either.mean((2, 3)))
        return said

    net, path = export(branching, tmp_path / "net.onnx")
    data = path.read_bytes()
    assert b"If" in data
    for word in (b"stack_trace", b".py", b"tests/"):
        assert word not in data
    x = torch.randn(2, *SHAPE)
    with torch.inference_mode():
        np.testing.assert_allclose(run_onnx(path, x.numpy())[OUTPUT], net(x), atol=1e-5)


def test_the_same_network_gives_the_same_file(tmp_path: Path) -> None:
    files = [export(mean, tmp_path / f"{index}.onnx")[1].read_bytes() for index in range(2)]
    assert files[0] == files[1]


def test_weights_in_another_file_are_refused(tmp_path: Path) -> None:
    _, path = export(mean, tmp_path / "net.onnx")
    proto = onnx.load(path)
    convert_model_to_external_data(proto, location="net.data", size_threshold=0)
    onnx.save(proto, path)
    assert (tmp_path / "net.data").exists()
    with pytest.raises(ModelError, match="keeps weights in another file"):
        inspect(path)


def test_files_that_are_not_sound_are_refused(tmp_path: Path) -> None:
    _, path = export(mean, tmp_path / "net.onnx")
    proto = onnx.load(path)
    proto.graph.node[0].doc_string = "/home/me/net.py"
    onnx.save(proto, path)
    with pytest.raises(ModelError, match="notes of the exporter"):
        inspect(path)
    proto.graph.node[0].doc_string = ""
    proto.graph.node[0].op_type = "Konv"
    onnx.save(proto, path)
    with pytest.raises(ModelError, match="no sound ONNX file"):
        inspect(path)
    path.write_bytes(b"garbage")
    with pytest.raises(ModelError, match="no sound ONNX file"):
        inspect(path)
    with pytest.raises(ModelError, match="no sound ONNX file"):
        inspect(tmp_path / "absent.onnx")


def test_exporting_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    net = Net(mean)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.random.get_rng_state()
    export_onnx(net, SHAPE, tmp_path / "net.onnx", opset=20, ir_version=9)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
