"""`--weights default`: who has some, the download from a local server, and what it says without one."""

import hashlib
import io
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from thinet_deploy.errors import MissingError, WeightsError
from thinet_deploy.models import pretrained
from thinet_deploy.models.loading import MODELS, build_model
from thinet_deploy.models.pretrained import NETWORKS, default_weights, download
from thinet_deploy.options import DEFAULT, read_config

Cli = Callable[..., Any]


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without a line about each."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the base class
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A real web server: its address, and the folder that it serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    web = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}", folder
    web.shutdown()
    web.server_close()


@pytest.fixture
def nowhere(server: tuple[str, Path]) -> str:
    """An address that nobody answers at."""
    web = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    web.server_close()
    return f"http://127.0.0.1:{web.server_port}"


def put(folder: Path, content: bytes, digest: str = "") -> str:
    name = f"net-{digest or hashlib.sha256(content).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(content)
    return name


def test_a_file_is_downloaded_once(server: tuple[str, Path], tmp_path: Path) -> None:
    address, served = server
    name = put(served, b"weights")
    path = download(f"{address}/{name}", tmp_path / "kept" / "here")
    assert path.read_bytes() == b"weights"
    (served / name).unlink()
    assert download(f"{address}/{name}", tmp_path / "kept" / "here") == path


def test_a_damaged_file_is_not_kept(server: tuple[str, Path], tmp_path: Path) -> None:
    address, served = server
    name = put(served, b"half of the wei", digest="0123abcd")
    with pytest.raises(MissingError, match="could not be downloaded: invalid hash value"):
        download(f"{address}/{name}", tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []


def test_without_a_network_it_says_what_to_do(nowhere: str, server: tuple[str, Path], tmp_path: Path) -> None:
    for address, why in ((nowhere, "refused"), (server[0], "404")):
        with pytest.raises(MissingError, match=why) as found:
            download(f"{address}/net-0123abcd.pth", tmp_path)
        assert str(tmp_path / "net-0123abcd.pth") in found.value.hint
        assert "--weights FILE" in found.value.hint


def test_only_networks_of_torchvision_have_some() -> None:
    assert NETWORKS.keys() <= MODELS.keys()
    for name in ("resnet50-caffe", "thinet-tiny", "net.py:make"):
        with pytest.raises(WeightsError, match=f"no default weights for {name}") as found:
            default_weights(name)
        assert "squeezenet1_1" in found.value.hint


def test_without_torchvision_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)  # which makes its import fail
    with pytest.raises(MissingError, match="needs torchvision") as found:
        default_weights("vgg16")
    assert "--weights FILE" in found.value.hint


def test_a_torchvision_of_another_build_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms is missing')\n"
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingError, match=r"beside torch .*: operator torchvision::nms is missing") as found:
        default_weights("vgg16")
    assert "--weights FILE" in found.value.hint


@pytest.mark.parametrize("name", NETWORKS)
def test_torchvision_knows_where_they_are(name: str, zoo: ModuleType) -> None:
    del zoo
    assert pretrained._url(NETWORKS[name]).startswith("https://")


def test_default_weights_go_the_whole_way(
    zoo: ModuleType,
    server: tuple[str, Path],
    cli: Cli,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchvision's own network saved as torchvision saves it, served, downloaded, loaded, pruned."""
    torch.manual_seed(0)
    state, buffer = zoo.get_model("squeezenet1_1", weights=None, num_classes=2).state_dict(), io.BytesIO()
    torch.save(state, buffer)
    name = put(server[1], buffer.getvalue())
    monkeypatch.setattr(pretrained, "_url", lambda _: f"{server[0]}/{name}")
    monkeypatch.setenv("TORCH_HOME", str(workplace / "cache"))
    done = cli(
        *("prune", "--model", "squeezenet1_1", "--weights", DEFAULT, "--data", "data", "--input-shape", "3x32x32"),
        *("--method", "random", "--reconstruction", "none", "--out", "run"),
    )
    assert done.code == 0, done.err
    assert f"Downloading {name}: done" in done.err
    assert (workplace / "cache" / "hub" / "checkpoints" / name).is_file()
    model = build_model("squeezenet1_1", input_shape=(3, 32, 32), num_classes=2, seed=0)
    from thinet_deploy.models.weights import load_weights

    load_weights(model, workplace / "run" / "dense" / "model.safetensors")
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_no_network_is_exit_code_3(nowhere: str, cli: Cli, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_url", lambda _: f"{nowhere}/vgg16-397923af.pth")
    monkeypatch.setenv("TORCH_HOME", str(workplace / "cache"))
    done = cli("prune", "--model", "squeezenet1_1", "--weights", DEFAULT, "--data", "data", "--input-shape", "3x32x32")
    assert done.code == 3
    assert "could not be downloaded" in done.err
    assert "Traceback" not in done.err


def test_a_config_file_may_say_default_too(tmp_path: Path) -> None:
    for text, expected in (("default", "default"), ("net.pth", str(tmp_path / "net.pth"))):
        (tmp_path / "c.toml").write_text(f'weights = "{text}"\n')
        assert read_config(tmp_path / "c.toml")["weights"] == expected
