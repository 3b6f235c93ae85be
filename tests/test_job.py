"""What a build starts from: the identity of its stages, and what is found out before any work begins."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from thinet_deploy.artifact import write_json
from thinet_deploy.errors import DataError, InputError, ModelError, TargetError, UnknownNameError, WeightsError
from thinet_deploy.intervals import Interval
from thinet_deploy.models.loading import build_model
from thinet_deploy.models.weights import save_weights
from thinet_deploy.options import Options, make_options, read_config, spelled_out
from thinet_deploy.pipeline import prune
from thinet_deploy.stages import job as jobs
from thinet_deploy.stages.job import check_trainable, load_job
from thinet_deploy.stages.tools import REPORT, remarks
from thinet_deploy.tasks.base import Accuracy

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.input_shape = (1, 8, 8)
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, num_classes))
        {line}

    def forward(self, x):
        return self.net(x)
"""
MakeOptions = Callable[..., Options]


def test_two_factories_of_one_file_do_not_share_results(tiny_options: MakeOptions, tmp_path: Path) -> None:
    one, other, again = (load_job(tiny_options(tmp_path, name)).identity for name in ("plain", "residual", "plain"))
    assert one == again
    assert one != other
    assert load_job(Options(out=tmp_path)).identity["model"] == "vgg-small"


def test_a_network_that_cannot_train_on_one_image_needs_larger_batches(
    tiny_options: MakeOptions, tmp_path: Path
) -> None:
    with pytest.raises(
        ModelError, match=r"norm_of_points cannot take a training batch of 1 of 1x8x8: Expected more"
    ) as no:
        load_job(tiny_options(tmp_path, "norm_of_points", batch_size=1))
    assert "--batch-size 2" in no.value.hint
    load_job(tiny_options(tmp_path, "norm_of_points", batch_size=2))
    load_job(tiny_options(tmp_path, "plain", batch_size=1))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("self.net.requires_grad_(False)", "has frozen all of its parameters"),
        ("import threading; self.lock = threading.Lock()", "cannot be copied: cannot pickle '_thread.lock' object"),
        ("self.net.append(nn.Softmax(1))", "gives probabilities, but scores were expected"),
    ],
)
def test_a_network_that_cannot_be_trained_as_it_is_is_refused(
    line: str, words: str, tiny_options: MakeOptions, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(NET.format(line=line))
    with pytest.raises(ModelError, match=words):
        load_job(tiny_options(tmp_path / "run").model_copy(update={"model": f"{file}:Net"}))


def test_a_frozen_network_that_is_only_pruned_may_stay_so(tiny_options: MakeOptions, tmp_path: Path) -> None:
    file, weights = tmp_path / "mine.py", tmp_path / "w.safetensors"
    file.write_text(NET.format(line="self.net.requires_grad_(False)"))
    options = tiny_options(tmp_path / "run").model_copy(update={"model": f"{file}:Net", "weights": weights})
    save_weights(build_model(options.model, input_shape=None, num_classes=3, seed=0), weights)
    job = load_job(options)
    with pytest.raises(ModelError, match="has frozen all of its parameters"):
        check_trainable(job, job.fresh())


def test_that_there_are_no_images_is_the_first_thing_to_know(tiny_options: MakeOptions, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(NET.format(line="del self.input_shape"))
    options = tiny_options(tmp_path / "run").model_copy(update={"model": f"{file}:Net"})
    with pytest.raises(InputError, match="does not say which images it takes"):
        load_job(options)
    with pytest.raises(DataError, match="There is no folder"):
        load_job(options.model_copy(update={"data": tmp_path / "nowhere"}))


def test_what_is_frozen_and_an_original_that_knows_nothing_are_told(tiny_options: MakeOptions, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(NET.format(line="self.net[0].requires_grad_(False)"))
    job = load_job(tiny_options(tmp_path / "run").model_copy(update={"model": f"{file}:Net"}))

    def told(right: int) -> list[str]:
        value = Interval(right, right - 10, right + 10)
        write_json(tmp_path / REPORT, {"accuracy": asdict(Accuracy({"top-1": value}, 40))})
        return list(remarks(job, tmp_path))

    assert [note for note in told(95) if "frozen" not in note] == []
    assert told(95)[-1].endswith("mine.py:Net has frozen: net.0.weight, net.0.bias.")
    both = tmp_path / "both.pth"
    state = job.fresh().state_dict()
    extra = {"epoch": 3, "momentum": {"a": torch.zeros(1)}, 0: {"b": torch.zeros(1)}}
    torch.save({"state_dict": state, "state_dict_ema": dict(state), **extra}, both)
    given = replace(job, options=job.options.model_copy(update={"weights": both}))
    (note,) = (note for note in remarks(given, tmp_path) if "also holds" in note)
    assert note.startswith("both.pth also holds state_dict_ema, which may be better")
    torch.save(state, tmp_path / "plain.pth")
    save_weights(job.fresh(), tmp_path / "plain.safetensors")
    for name in ("plain.pth", "plain.safetensors"):
        given = replace(job, options=job.options.model_copy(update={"weights": tmp_path / name}))
        assert not [note for note in remarks(given, tmp_path) if "also holds" in note], name
    assert told(35)[0].startswith("The original has 35.00 % of 40 test images right, which guessing among 3")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"ignore": ["nomatch*"]}, UnknownNameError, "no layer for --ignore called 'nomatch*'"),
        (
            {"keep_layer": {"nolayer": 0.5}},
            UnknownNameError,
            "for --keep-layer, called 'nolayer'",
        ),
        ({"macs": "0M"}, InputError, "--macs 0M would leave nothing"),
        ({"speedup": "0x", "target": "cpu"}, InputError, "something faster than the original was expected"),
        ({"layer_epochs": 2}, InputError, "--recipe best prunes all layers at once"),
        ({"drop_branches": True, "reconstruction": "none"}, InputError, "which --reconstruction none does not find"),
        ({"macs": "0.5x"}, InputError, "--macs 0.5x asks for no less than the original has"),
        ({"size": "9MB"}, InputError, "--size 9MB asks for no less than the original has"),
        ({"device": "ssh://nowhere.invalid"}, InputError, "a budget of time is met, but `prune` was given none"),
        ({"max_drop": 2.0, "precision": "bf16"}, InputError, "--max-drop is what INT8 may cost"),
        ({"finetune_lr": 0.1, "finetune_epochs": 0}, InputError, "--finetune-lr is of fine-tuning, but there is none"),
        ({"device_python": "python3.9"}, InputError, "--device-python is of a device, but there is none"),
    ],
)
def test_what_asks_for_nothing_is_refused_before_the_training(
    changes: dict[str, object], error: type[InputError], words: str, tiny_options: MakeOptions, tmp_path: Path
) -> None:
    with pytest.raises(error) as refused:
        prune(tiny_options(tmp_path / "run", "plain", **changes))
    assert words in refused.value.what
    assert not (tmp_path / "run" / "dense").exists()


def test_a_config_file_may_spell_options_as_the_command_line_does(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        'ignore = "features.1*"\nkeep-layer = ["a=0.7", "b=1"]\ntrain = "ema=0.9"\ninput-shape = "3x32x32"\n'
        "gcos-layer = { c = 4 }\n"
    )
    found = make_options(spelled_out(read_config(tmp_path / "c.toml")))
    assert (found.ignore, found.keep_layer, found.gcos_layer) == (("features.1*",), {"a": 0.7, "b": 1.0}, {"c": 4})
    assert (found.train, found.input_shape) == ({"ema": "0.9"}, (3, 32, 32))
    with pytest.raises(InputError, match="PATTERN=R was expected"):
        spelled_out({"keep_layer": ["a"]})


@pytest.mark.parametrize("budget", ["macs", "size", "latency", "speedup"])
def test_two_ways_to_say_how_much_stays_are_refused(
    budget: str, tiny_options: MakeOptions, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    value = {"macs": "2x", "size": "1kB", "latency": "1ms", "speedup": "2x"}[budget]
    with pytest.raises(InputError, match=f"--keep and --{budget} are two ways"):
        load_job(tiny_options(tmp_path, keep=0.4, **{budget: value}))
    told = cli("prune", "--model", "x.py:y", "--keep", 0.5, f"--{budget}", value)
    assert (told.code, f"--keep and --{budget} are two ways" in told.err) == (2, True), "the default counts too"


def test_what_needs_no_image_is_refused_before_any_is_read(
    tiny_options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("images are read")

    monkeypatch.setattr(jobs, "load_folder", never)
    with pytest.raises(WeightsError, match="no weights file"):
        load_job(tiny_options(tmp_path, weights=tmp_path / "none.pth"))
    with pytest.raises(TargetError):
        load_job(tiny_options(tmp_path, target="cpu", precision="fp16"))


def test_options_that_are_remembered_are_taken_again(tiny_options: MakeOptions, tmp_path: Path) -> None:
    """`build --from` goes on with all options of `prune`, the share that nobody gave among them."""
    asked = tiny_options(tmp_path, macs="2x")
    assert load_job(make_options(asked.model_dump())).options == asked


OLD_FORM = """
from torch import nn

def net(num_classes):
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.utils.weight_norm(nn.Conv2d(4, 6, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, num_classes),
    )
    net.input_shape = (1, 8, 8)
    return net
"""


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_network_that_cannot_be_copied_is_refused(tiny_options: MakeOptions, tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text(OLD_FORM)
    with pytest.raises(ModelError, match="cannot be copied") as no:
        load_job(tiny_options(tmp_path / "run", model=f"{tmp_path / 'old.py'}:net"))
    assert "parametrizations.weight_norm" in no.value.hint
