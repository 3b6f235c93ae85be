"""`build --from RUN` goes on from what `prune` left, whatever happened meanwhile; edited code is run anew."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from thinet_deploy.artifact import sha256_of
from thinet_deploy.bundle import verify_bundle
from thinet_deploy.errors import InputError
from thinet_deploy.models.loading import load_function
from thinet_deploy.options import Options
from thinet_deploy.pipeline import build, build_from, prune

pytestmark = pytest.mark.usefixtures("quick_module")


@pytest.fixture
def options(tiny_options: Callable[..., Options], tiny: Path, tmp_path: Path) -> Callable[..., Options]:
    """For a network and weights of the user's own, in tmp_path; without training."""
    shutil.copy(tiny / "net.py", tmp_path)
    save_weights(tmp_path, seed=0)
    usual = {"model": f"{tmp_path / 'net.py'}:plain", "weights": tmp_path / "w.pth", "preset": "thinet-conv"}
    usual |= {"finetune_epochs": 0, "controls": "none"}
    return lambda **changes: tiny_options(tmp_path / "run", **{**usual, **changes})


def save_weights(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    factory: Any = load_function(f"{folder / 'net.py'}:plain", "factory")
    torch.save(factory(num_classes=3).state_dict(), folder / "w.pth")


def edit(file: Path) -> None:
    """The network says twice as much, with the same weights; which class it says stays as it is."""
    text = file.read_text()
    assert "        return logits\n" in text
    file.write_text(text.replace("        return logits\n", "        return 2 * logits\n", 1))


def test_an_edited_network_is_exported_anew(options: Callable[..., Options], tmp_path: Path) -> None:
    before = sha256_of(build(options()).bundle / "model.onnx")
    edit(tmp_path / "net.py")
    done = build(options())
    assert sha256_of(done.bundle / "model.onnx") != before
    assert all(hop.passed for hop in done.hops)
    assert verify_bundle(done.bundle)["exit_code"] == 0


def test_the_users_training_is_of_the_network_that_prune_left(options: Callable[..., Options], tmp_path: Path) -> None:
    thin = prune(options())
    mine = Path(shutil.copy(thin / "model.safetensors", thin / "mine.safetensors"))  # where a user may well save it
    left = sha256_of(thin)
    first = build_from(tmp_path / "run", mine)
    onnx = sha256_of(first.bundle / "model.onnx")
    build(options(keep=0.3))  # replaces what `prune` had pruned
    assert [row.label for row in build_from(tmp_path / "run", mine).table.rows] == [
        row.label for row in first.table.rows
    ]
    edit(tmp_path / "net.py")
    second = build_from(tmp_path / "run", mine)
    assert sha256_of(second.bundle / "model.onnx") != onnx
    assert "net.py:plain has changed since `prune`" in " ".join(second.notes)
    assert "has changed" not in " ".join(first.notes)
    assert sha256_of(thin) == left
    prune(options(keep=0.3))
    assert sha256_of(tmp_path / "run" / "thin.old1") == left
    assert not (thin / "mine.safetensors").exists()


def test_the_last_prune_says_where_things_are(options: Callable[..., Options], tmp_path: Path) -> None:
    """What it was asked counts, also where it had nothing to make."""
    prune(options())
    moved = (tmp_path / "w.pth").rename(tmp_path / "moved.pth")
    thin = prune(options(weights=moved, target="ios"))
    done = build_from(tmp_path / "run", thin / "model.safetensors")
    assert done.table.target == "ios"


def test_another_original_is_refused(options: Callable[..., Options], tmp_path: Path) -> None:
    mine = Path(shutil.copy(prune(options()) / "model.safetensors", tmp_path / "mine.safetensors"))
    save_weights(tmp_path, seed=1)
    build(options())
    with pytest.raises(InputError, match="has not the thin network and its original any more") as raised:
        build_from(tmp_path / "run", mine)
    assert "same `thinet-deploy prune` again" in raised.value.hint
