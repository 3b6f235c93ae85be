"""weights.py: files of tensors go in and come out; what is not made for the network is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from thinet_deploy.errors import WeightsError
from thinet_deploy.models.weights import load_weights, save_weights

State = dict[str, torch.Tensor]


class Net(nn.Module):
    """A parameter of its own, a convolution, BatchNorm with buffers, and a part called `module` on request."""

    def __init__(self, seed: int, part: str = "conv", width: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.scale = nn.Parameter(torch.randn(2))
            setattr(self, part, nn.Conv2d(2, width, 3))
            self.bn = nn.BatchNorm2d(width)
            for tensor in (self.bn.weight, self.bn.bias, self.bn.running_mean, self.bn.running_var):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 2)
            assert self.bn.num_batches_tracked is not None
            self.bn.num_batches_tracked += seed


def equal(one: nn.Module, other: nn.Module, but: str = "-") -> bool:
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items() if not name.endswith(but))


def write(state: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture(params=["w.safetensors", "w.pth", "w.pt", "w.bin"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


def test_there_and_back(tmp_path: Path) -> None:
    one, other = Net(1), Net(2)
    assert not equal(one, other)
    save_weights(one, tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    assert equal(one, other)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    """Hashes of stages depend on it."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        save_weights(Net(seed), tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_shared_and_strided_tensors_are_saved(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    expected = torch.arange(9.0).view(3, 3).t()
    net[0].weight = net[1].weight = nn.Parameter(expected)
    save_weights(net, tmp_path / "w.safetensors")
    fresh = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    load_weights(fresh, tmp_path / "w.safetensors")
    assert all(torch.equal(weight, expected) for weight in fresh.state_dict().values())


WRAPPINGS: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "DataParallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "torch.compile": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "compiled DataParallel": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
    "DDP, compiled": lambda state: {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
    "without num_batches_tracked": lambda state: {n: t for n, t in state.items() if not n.endswith("tracked")},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_files_of_others(wrap: Callable[[State], Any], path: Path) -> None:
    one, other = Net(1), Net(2)
    load_weights(other, write(wrap(one.state_dict()), path))
    assert equal(one, other, but="tracked")
    assert int(other.bn.num_batches_tracked or 0) in {1, 2}


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_checkpoints_of_training(key: str, tmp_path: Path) -> None:
    one, other = Net(1), Net(2)
    write({key: one.state_dict(), "epoch": 3, "best": 0.5, "names": ["a"]}, tmp_path / "w.pth")
    load_weights(other, tmp_path / "w.pth")
    assert equal(one, other)


def test_a_part_called_module_keeps_its_name(path: Path) -> None:
    """What DataParallel puts before all names is not what a network calls one of its parts."""
    one, other = Net(1, part="module"), Net(2, part="module")
    load_weights(other, write(one.state_dict(), path))
    assert equal(one, other)


def test_other_number_types_become_the_networks(path: Path) -> None:
    one, other = Net(1), Net(2)
    load_weights(other, write({name: tensor.double() for name, tensor in one.state_dict().items()}, path))
    assert equal(one, other)
    assert other.scale.dtype == torch.float32


def renamed(state: State, before: str, after: str) -> State:
    return {after if name == before else name: tensor for name, tensor in state.items()}


MISMATCHES: dict[str, tuple[Callable[[State], Any], tuple[str, ...]]] = {
    "shape": (
        lambda state: {**state, "conv.weight": torch.zeros(4, 2, 3, 3)},
        ("conv.weight: the file has (4, 2, 3, 3), the model (3, 2, 3, 3)",),
    ),
    "missing": (lambda state: {n: t for n, t in state.items() if n != "bn.bias"}, ("bn.bias: missing in the file",)),
    "too many": (lambda state: {**state, "head.weight": torch.zeros(1)}, ("head.weight: not in the model",)),
    "renamed": (
        lambda state: renamed(state, "scale", "gain"),
        ("scale: missing in the file", "gain: not in the model"),
    ),
    "half wrapped": (lambda state: renamed(state, "scale", "module.scale"), ("module.scale: not in the model",)),
    "many": (
        lambda state: {f"other.{index}": torch.zeros(1) for index in range(20)},
        ("scale: missing in the file", "… and 22 more"),
    ),
    "scalar": (lambda state: {**state, "scale": torch.tensor(1.0)}, ("scale: the file has (), the model (2,)",)),
}


@pytest.mark.parametrize(("change", "words"), MISMATCHES.values(), ids=MISMATCHES.keys())
def test_mismatches_are_named_and_change_nothing(
    change: Callable[[State], Any], words: tuple[str, ...], path: Path
) -> None:
    net = Net(2)
    with pytest.raises(WeightsError, match="was made for another architecture") as caught:
        load_weights(net, write(change(Net(1).state_dict()), path))
    assert [word for word in words if word not in str(caught.value)] == []
    assert str(caught.value).count("\n") <= 8, "not a wall of names"
    assert equal(net, Net(2))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_refused(value: float, path: Path) -> None:
    state, net = Net(1).state_dict(), Net(2)
    state["scale"][0] = value
    with pytest.raises(WeightsError, match=r"has NaN or infinity in scale\.") as caught:
        load_weights(net, write(state, path))
    assert "diverged" in caught.value.hint
    assert equal(net, Net(2))


def test_a_mask_may_be_infinite_and_8_bits_are_read(path: Path) -> None:
    net = nn.Linear(2, 2)
    net.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    load_weights(net, write(net.state_dict(), path))
    eight = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in nn.Linear(2, 2).state_dict().items()}
    load_weights(nn.Linear(2, 2), write(eight, path))
    with pytest.raises(WeightsError, match="NaN or infinity in mask"):
        load_weights(net, write({**net.state_dict(), "mask": torch.tensor([0.0, torch.nan])}, path))


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"epoch": 3}, torch.zeros(3), {"state_dict": None}, {"state_dict": {"a": 1}}, None, {1: torch.zeros(1)}],
    ids=str,
)
def test_other_contents(content: object, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no state_dict|another architecture") as caught:
        load_weights(Net(1), write(content, tmp_path / "w.pth"))
    assert caught.value.hint


@pytest.mark.parametrize("length", [0, 4, 9, 60, 200])
def test_truncated_safetensors(length: int, tmp_path: Path) -> None:
    save_weights(Net(1), tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[:length])
    with pytest.raises(WeightsError, match=r"cannot be read as weights: \w"):
        load_weights(Net(1), tmp_path / "w.safetensors")


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(Exception, match="The disk is full"):
        save_weights(Net(1), tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []
