"""torch_latency.py: models measured forward and backward, each in a process of its own. Times are never asserted."""

import copy
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from thinet_deploy.errors import InputError, MissingError, ModelError, ThinetDeployError
from thinet_deploy.timing import latency, torch_latency, torch_worker


def test_a_model_whose_outputs_are_no_numbers_has_no_valid_time() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    model[1].bias.data.fill_(float("nan"))
    (found,) = torch_latency.measure_torch({"original": model}, (3, 2, 2), batch=1)
    assert found.forward.summary["invalid"] == ["the outputs hold NaN or infinity"]
    assert found.launch_share is None, "unmeasured is not 0"


def test_models_are_measured_forward_and_backward_and_left_as_they_were() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")

    def model(width: int) -> Any:
        nn = torch.nn
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Dropout(), nn.Flatten())

    models = {"original": model(8), "thin": model(2)}
    models["thin"][0].weight.requires_grad_(False)
    models["thin"].eval()
    before = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in models.items()}
    random_state = torch.get_rng_state()
    seen: list[tuple[Any, ...]] = []
    found = torch_latency.measure_torch(models, (3, 8, 8), batch=4, progress=lambda *state: seen.append(state))
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, m in models.items():
        assert all(torch.equal(value, before[name][key]) for key, value in m.state_dict().items())
        assert all(parameter.grad is None for parameter in m.parameters())
    assert not models["thin"].training
    assert not models["thin"][0].weight.requires_grad
    assert [(f.model, f.device, f.batch) for f in found] == [("original", "cpu", 4), ("thin", "cpu", 4)]
    for one in found:
        for part in (one.forward, one.backward):
            assert len(part.rounds_ms) == part.summary["n"] == 7
            assert len(part.summary["interval_ms"]) == 2
    assert found[0].speedup is None
    assert found[1].speedup is not None
    assert len(seen) == 7
    json.dumps(latency.report(models=found, environment={}).to_json(), allow_nan=False)


def test_each_model_has_a_process_and_memory_of_its_own(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")

    class Signs(torch.nn.Module):  # type: ignore[misc,name-defined]  # of a module that may be missing
        """Leaves the number of its process."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.layer, self.path = torch.nn.Conv2d(3, width, 3), tmp_path / str(width)

        def forward(self, x: Any) -> Any:
            print("to nobody's output")
            self.path.write_text(str(os.getpid()), encoding="utf-8")
            return self.layer(x)

    models = {"original": Signs(128), "thin": Signs(2)}
    wide, thin = torch_latency.measure_torch(models, (3, 64, 64), batch=8, threads=1)
    pids = {(tmp_path / name).read_text(encoding="utf-8") for name in ("2", "128")}
    assert len(pids - {str(os.getpid())}) == 2
    assert not any(Path("/proc", pid).exists() and _runs(pid) for pid in pids), "they end with the measurement"
    if Path("/proc/self/status").exists():
        maps = 4 * 8 * 62 * 62  # bytes of one channel of the output
        assert wide.peak_memory_bytes
        assert thin.peak_memory_bytes
        assert wide.peak_memory_bytes > 2 * 128 * maps, "the output and its gradient"
        assert wide.peak_memory_bytes - thin.peak_memory_bytes > 126 * maps


def _runs(pid: str) -> bool:
    deadline = time.monotonic() + 10
    while Path("/proc", pid).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return Path("/proc", pid).exists()


def test_a_model_of_a_users_file_can_be_timed(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    from thinet_deploy.models.loading import load_function
    from thinet_deploy.timing.things import Model, find

    (tmp_path / "bad.py").write_text("not python")
    with pytest.raises(ModelError):  # a file that has nothing to do with the model
        load_function(f"{tmp_path / 'bad.py'}:make", "factory")
    (tmp_path / "beside.py").write_text("WIDTH = 4\n")
    (tmp_path / "random.py").write_text("raise RuntimeError('stood in for the standard library')\n")
    (tmp_path / "net.py").write_text(  # with what does not survive pickle, and a program that has to be seen failing
        "import subprocess, threading\nimport torch\nfrom beside import WIDTH\nLOCK = threading.Lock()\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.layer = torch.nn.Conv2d(3, WIDTH, 1)\n"
        "    def forward(self, x):\n        assert subprocess.run(['false']).returncode == 1\n"
        "        with LOCK:\n            return {'out': [torch.ops.aten.relu(self.layer(x))]}\n"
        "def make():\n    return Net()\n"
    )
    found = find(f"{tmp_path / 'net.py'}:make", (3, 8, 8), "fp32")
    assert isinstance(found, Model)
    (row,) = torch_latency.measure_torch({"original": found.module}, (3, 8, 8), batch=2)
    assert row.backward.summary["n"] == 7


def test_what_a_model_does_wrong_is_said() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")

    class Wrong(torch.nn.Module):  # type: ignore[misc,name-defined]  # of a module that may be missing
        """Does it in its forward pass."""

        def __init__(self, what: Any) -> None:
            super().__init__()
            self.layer, self.what = torch.nn.Conv2d(3, 2, 1), what

        def forward(self, x: Any) -> Any:
            if callable(self.what):
                self.what(7)
            return self.layer(x)

    def refused(what: Any) -> ThinetDeployError:
        with pytest.raises(ThinetDeployError) as stop:
            torch_latency.measure_torch({"mine": Wrong(what)}, (3, 8, 8), batch=1)
        return stop.value

    def fails(_: int) -> None:
        raise ValueError("no such branch")

    assert refused(fails).what == "mine cannot be run forward and backward: ValueError: no such branch"
    assert refused(sys.exit).what == "mine cannot be run forward and backward: SystemExit: 7"
    assert refused(os._exit).what == "The process that trains mine ended by itself."
    lock = refused(threading.Lock())
    assert lock.what.startswith("mine cannot be sent to a process of its own to be timed: cannot pickle")
    assert "survive pickle" in lock.hint


def test_parametrized_weights_are_timed_as_they_are() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(3, 4, 3)))
    (row,) = torch_latency.measure_torch({"original": model}, (3, 8, 8), batch=2)
    assert row.forward.summary["min_ms"] > 0
    assert hasattr(model[0], "parametrizations"), "the model itself stays as it was"


def test_nested_outputs_and_too_few_rounds() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    one = torch.ones(1)
    assert len(list(torch_worker.tensors({"main": one, "auxiliary": (one, None, [one])}))) == 3
    with pytest.raises(InputError, match="3 rounds are too few"):
        torch_latency.measure_torch({}, (3, 8, 8), rounds=3)


def test_modes_change_how_a_model_runs_and_not_what_it_says() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from thinet_deploy.timing.torch_modes import Mode, in_mode, laid_out

    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8)
    model = torch.nn.Conv2d(3, 4, 3)
    said = model(images).detach()
    types: dict[Mode, Any] = {"eager": torch.float32, "channels-last": torch.float32, "amp": torch.bfloat16}
    for mode, dtype in types.items():
        taken = laid_out(images, mode)
        output = in_mode(copy.deepcopy(model), taken, mode)(taken)
        assert output.dtype == dtype
        assert taken.is_contiguous(memory_format=torch.channels_last) == (mode != "eager")
        torch.testing.assert_close(output.float(), said, atol=0.05, rtol=0.05)
    (found,) = torch_latency.measure_torch({"original": model}, (3, 8, 8), batch=2, mode="amp")
    assert (found.mode, found.backward.summary["n"]) == ("amp", 7)


def test_a_mode_that_cannot_be_is_refused() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    models = {"original": torch.nn.Conv2d(3, 4, 3)}
    with pytest.raises(MissingError, match="no CUDA graph on a CPU"):
        torch_latency.measure_torch(models, (3, 8, 8), mode="cuda-graph")
    with pytest.raises(InputError, match="no mode called 'amb'"):
        torch_latency.measure_torch(models, (3, 8, 8), mode="amb")  # type: ignore[arg-type]


def test_cuda_is_timed_with_events_or_refused() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    models = {"original": torch.nn.Conv2d(3, 4, 3)}
    if not torch.cuda.is_available():
        with pytest.raises(MissingError, match="no CUDA device"):
            torch_latency.measure_torch(models, (3, 8, 8), device="cuda")
        return
    (found,) = torch_latency.measure_torch(models, (3, 8, 8), device="cuda")
    assert found.forward.summary["min_ms"] > 0
    assert models["original"].weight.device.type == "cpu"
