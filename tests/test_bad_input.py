"""What the user got wrong ends as one clear message with exit code 2, before anything has been written.

Every case goes through the real command line, as `thinet-deploy build --data data --model net.py:tiny --out run` with
one thing wrong.
"""

import io
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from thinet_deploy.models.loading import load_function

GOOD = "build --data data --model net.py:tiny --epochs 1 --out run"
JPG, PNG = Path("data/train/dark/0.jpg"), Path("data/val/light/1.png")
READING = re.compile(r"^Reading \w+ images: done( \([\d,]+\))?\n", re.MULTILINE)  # progress, which is no complaint
Prepare = Callable[[], object]


def nothing() -> None:
    """Nothing has to be prepared."""


def write(name: str, text: str) -> Prepare:
    return lambda: Path(name).write_text(text)


def preprocess(**fields: str) -> Prepare:
    lines = {"resize": "16", "crop": "[16, 16]", **fields}
    return write("pre.toml", "\n".join(f"{name} = {value}" for name, value in lines.items() if value))


def remove(folder: str) -> Prepare:
    def prepare() -> None:
        for path in sorted(Path(folder).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        Path(folder).rmdir()

    return prepare


def both(*steps: Prepare) -> Prepare:
    return lambda: [step() for step in steps]


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def corrupt(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20] = b"\xff" * 20
    path.write_bytes(data)


def state(factory: str = "tiny") -> dict[str, torch.Tensor]:
    make: Any = load_function(f"net.py:{factory}", "factory")
    return make().state_dict()  # type: ignore[no-any-return]


def truncated_safetensors() -> None:
    save_file(state(), "w.safetensors")
    cut(Path("w.safetensors"))


def truncated_pth() -> None:
    torch.save(state(), "w.pth")
    cut(Path("w.pth"))


class Payload:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("sentinel"), "executed"))


def attack_in_zip() -> None:
    torch.save({"state_dict": Payload()}, "w.pth")


def attack_in_pickle() -> None:
    Path("w.pth").write_bytes(pickle.dumps({"weight": Payload()}))


def whole_module() -> None:
    make: Any = load_function("net.py:tiny", "factory")
    torch.save(make(), "w.pth")


def without_a_tensor() -> None:
    short = state()
    del short["classifier.0.bias"]
    torch.save({**short, "classifier.9.bias": torch.zeros(1)}, "w.pth")


# id → (what is wrong with the files, arguments after GOOD, what the message has to say)
DATA: dict[str, tuple[Prepare, str, tuple[str, ...]]] = {
    "no folder": (nothing, "--data nowhere", ("There is no folder nowhere", "train/ and val/")),
    "a file": (nothing, "--data net.py", ("There is no folder net.py",)),
    "no train": (remove("data/train"), "", ("data needs the folders train/ and val/ (or test/)", "has val")),
    "no val": (remove("data/val"), "", ("data needs the folders train/ and val/ (or test/)", "has train")),
    "empty folder": (remove("data/train/dark"), "", ("data/train has 1 class folder,", "at least 2")),
    "one class": (both(remove("data/train/dark"), remove("data/val/dark")), "", ("has 1 class folder,",)),
    "no images in class": (
        both(remove("data/train/dark"), lambda: Path("data/train/dark").mkdir(), write("data/train/dark/a.txt", "")),
        "",
        ("class folder data/train/dark has no images", ".jpg"),
    ),
    "classes differ": (lambda: Path("data/val/dark").rename("data/val/drak"), "", ("different classes: dark, drak",)),
    "text named jpg": (write(str(JPG), "hello"), "", (f"{JPG} is not an image",)),
    "empty file": (write(str(PNG), ""), "", (f"{PNG} is not an image",)),
    "truncated jpeg": (lambda: cut(JPG), "", (f"{JPG} cannot be read as an image", "truncated")),
    "corrupt png": (lambda: corrupt(PNG), "", (f"{PNG} cannot be read as an image",)),
    "broken link": (
        both(JPG.unlink, lambda: JPG.symlink_to("gone.jpg")),
        "",
        (f"{JPG} cannot be read as an image", "No such file"),
    ),
    "folder named jpg": (both(JPG.unlink, JPG.mkdir), "", (f"{JPG} cannot be read as an image",)),
}
WEIGHTS = {
    "missing": (nothing, "--weights w.pth", ("There is no weights file w.pth",)),
    "a folder": (nothing, "--weights data", ("There is no weights file data",)),
    "other architecture": (
        lambda: save_file(state("wider"), "w.safetensors"),
        "--weights w.safetensors",
        ("another architecture", "features.0.weight: the file has (5, 3, 3, 3), the model (4, 3, 3, 3)", "--model"),
    ),
    "other classes": (
        lambda: torch.save(state("three_classes"), "w.pth"),
        "--weights w.pth",
        ("classifier.2.weight: the file has (3, 8), the model (2, 8)", "number of classes"),
    ),
    "tensor missing": (
        without_a_tensor,
        "--weights w.pth",
        ("classifier.0.bias: missing in the file", "classifier.9.bias: not in the model"),
    ),
    "truncated safetensors": (truncated_safetensors, "--weights w.safetensors", ("w.safetensors cannot be read",)),
    "truncated pth": (truncated_pth, "--weights w.pth", ("w.pth cannot be read as weights", "truncated")),
    "text": (write("w.safetensors", "hello"), "--weights w.safetensors", ("cannot be read as weights",)),
    "empty": (write("w.pth", ""), "--weights w.pth", ("w.pth cannot be read as weights",)),
    "attack in zip": (attack_in_zip, "--weights w.pth", ("w.pth is refused", "execute code", "safetensors")),
    "attack in pickle": (attack_in_pickle, "--weights w.pth", ("w.pth is refused", "execute code")),
    "whole module": (whole_module, "--weights w.pth", ("w.pth is refused", "model.state_dict()")),
    "nested": (
        lambda: torch.save({"epoch": 3, "net": {"w": torch.ones(2)}}, "w.pth"),
        "--weights w.pth",
        ("holds no state_dict of tensors, but has one in net", 'torch.load("w.pth")["net"]'),
    ),
    "no tensors": (lambda: torch.save({"epoch": 3}, "w.pth"), "--weights w.pth", ("holds no state_dict",)),
}
VALUES: dict[str, tuple[Prepare, str, tuple[str, ...]]] = {
    **{
        f"keep {value}": (nothing, f"--keep {value}", (f"--keep is {float(value)}", "--keep 0.5"))
        for value in ("0", "1.5", "-1", "nan", "inf")
    },
    "keep text": (nothing, "--keep half", ("--keep", "valid number")),
    "lr inf": (nothing, "--lr inf", ("--lr is inf", "finite")),
    "epochs -1": (nothing, "--epochs -1", ("--epochs is -1", "greater than or equal to 0")),
    "batch size 0": (nothing, "--batch-size 0", ("--batch-size is 0", "greater than or equal to 1")),
    "threads 0": (nothing, "--threads 0", ("--threads is 0", "greater than or equal to 1")),
    "seed text": (nothing, "--seed x", ("--seed", "valid integer")),
    "model": (nothing, "--model vgg61", ("no model called 'vgg61'", "Did you mean 'vgg16'?", "file.py:factory")),
    "target": (nothing, "--target jetsom", ("no target called 'jetsom'", "Did you mean 'jetson'?")),
    "preset": (nothing, "--preset thinet-gab", ("no preset called 'thinet-gab'", "Did you mean 'thinet-gap'?")),
    "option": (nothing, "--finetune-epoch 1", ("--finetune-epoch", "Did you mean '--finetune-epochs'?")),
    "short option": (nothing, "-Z", ("-Z", "--target")),
    "no value": (nothing, "--keep", ("--keep", "requires an argument")),
    "extra word": (nothing, "more", ("more", "build --help")),
    **{
        f"shape {shape}": (nothing, f"--input-shape {shape}", (f"--input-shape is '{shape}'", "3x224x224"))
        for shape in ("224", "3x224", "3x0x224", "3x-1x5", "axbxc", "3x²x4", "3x224x224x1", "3x" + "9" * 5000 + "x3")
    },
    "shape of 5 channels": (nothing, "--input-shape 5x16x16", ("1 or 3 channels", "5x16x16")),
    "profile missing": (nothing, "--target mine.toml", ("mine.toml cannot be read", "thinet-deploy targets")),
    "profile no toml": (write("mine.toml", "= ="), "--target mine.toml", ("mine.toml is not valid TOML",)),
    "profile broken": (write("mine.toml", "id = 'x'\nos = 'dos'"), "--target mine.toml", ("mine.toml", "os:")),
    "config missing": (nothing, "--config c.toml", ("c.toml cannot be read",)),
    "config no toml": (write("c.toml", "keep: 1"), "--config c.toml", ("c.toml cannot be read as TOML",)),
    "config option": (write("c.toml", "kep = 1"), "--config c.toml", ("no option called 'kep'", "Did you mean 'keep'")),
    "config value": (write("c.toml", "lr = 'fast'"), "--config c.toml", ("--lr is fast", "valid number")),
    "config list": (write("c.toml", "input-shape = [3, 16]"), "--config c.toml", ("--input-shape",)),
    "trainer missing": (nothing, "--trainer mine.py:fit", ("There is no file mine.py",)),
    "trainer no function": (nothing, "--trainer fit", ("'fit' names no function", "file.py:function")),
    "trainer of other name": (nothing, "--trainer net.py:fit", ("no function in net.py called 'fit'",)),
    "from without weights": (nothing, "--from run", ("--from takes --weights",)),
}
PREPROCESS = {
    "missing": (nothing, ("pre.toml cannot be read",)),
    "no toml": (write("pre.toml", "resize: 3"), ("pre.toml cannot be read as TOML",)),
    "unknown field": (preprocess(mena="[0.5]"), ("no field in pre.toml called 'mena'", "Did you mean 'mean'?")),
    "unknown field inside": (preprocess(augment="{miror = true}"), ("no field in pre.toml", "Did you mean 'mirror'?")),
    "crop too large": (preprocess(crop="[17, 16]"), ("crop (17, 16) is larger than the resized image (16, 16)",)),
    "few means": (preprocess(mean="[0.5]"), ("mean and std need 3 values for colour RGB",)),
    "grey with three": (preprocess(colour="'GRAY'"), ("mean and std need 1 values for colour GRAY",)),
    "std zero": (preprocess(std="[0, 1, 1]"), ("std, resize and crop must be positive",)),
    "mean nan": (preprocess(mean="[nan, 0, 0]"), ("mean", "finite")),
    "colour": (preprocess(colour="'rgb'"), ("colour", "'RGB', 'BGR' or 'GRAY'")),
    "no crop": (preprocess(crop=""), ("crop", "required", "crop = [224, 224]")),
}
MODELS = {
    "file missing": ("gone.py:tiny", ("There is no file gone.py",)),
    "no factory named": ("net.py", ("'net.py' names no function", "file.py:function")),
    "other factory": ("net.py:tny", ("no function in net.py called 'tny'", "Did you mean 'tiny'?")),
    "not callable": ("net.py:answer", ("no function in net.py called 'answer'",)),
    "raises": ("net.py:broken", ("failed to build the network", "the roof is on fire")),
    "no module": ("net.py:weights_only", ("returned OrderedDict", "torch.nn.Module")),
    "outputs": ("net.py:three_classes", ("gives (1, 3) for an image, but (1, 2)", "num_classes")),
    "image too small": ("net.py:large", ("cannot take an image of 3x16x16", "--input-shape")),
    "no shape": ("net.py:shapeless", ("does not say which images it takes", "--input-shape 3x224x224")),
    "syntax": ("bad.py:make", ("bad.py failed to load: SyntaxError",)),
    "a program": ("program.py:make", ("program.py failed to load: SystemExit", "__main__")),
    "no name for data": ("", ("--data needs --model",)),
}
CASES: dict[str, tuple[Prepare, str, tuple[str, ...]]] = {
    **{f"data: {name}": case for name, case in DATA.items()},
    **{f"weights: {name}": case for name, case in WEIGHTS.items()},
    **VALUES,
    **{f"preprocess: {name}": (make, "--preprocess pre.toml", words) for name, (make, words) in PREPROCESS.items()},
    **{f"model: {name}": (nothing, f"--model={model}", words) for name, (model, words) in MODELS.items()},
    "gap without head": (nothing, "--model net.py:headless --preset thinet-gap", ("ThiNet-GAP", "thinet-conv")),
    "shape against preprocess": (
        preprocess(),
        "--preprocess pre.toml --input-shape 3x32x32",
        ("3x32x32 does not fit pre.toml", "3x16x16"),
    ),
}


@pytest.mark.parametrize(("prepare", "arguments", "words"), CASES.values(), ids=CASES.keys())
def test_one_message_and_nothing_written(
    prepare: Prepare, arguments: str, words: tuple[str, ...], cli: Callable[..., Any], workplace: Path
) -> None:
    Path("bad.py").write_text("def make(:\n")
    Path("program.py").write_text("import sys\nsys.exit('usage: program')\n")
    prepare()
    before = sorted(path for path in workplace.rglob("*") if "__pycache__" not in path.parts)
    done = cli(*GOOD.split(), "--json", *arguments.split())
    assert done.code == 2, done
    said = json.loads(done.out)
    assert set(said) == {"error", "hint", "exit_code"}
    assert said["exit_code"] == 2
    assert said["hint"], f"what is to be done? {said}"
    text = said["error"] + "\n" + said["hint"]
    assert [word for word in words if word not in text] == [], text
    assert READING.sub("", done.err) == f"Error: {text}\n", "one message, the same on stderr, nothing else"
    assert sorted(path for path in workplace.rglob("*") if "__pycache__" not in path.parts) == before


def test_the_table_starts_from_what_works(cli: Callable[..., Any], workplace: Path) -> None:
    """Without the one thing wrong, the checks pass and work begins."""
    done = cli(*GOOD.replace("build", "prune").split())
    assert done.code == 0, done.err
    assert (workplace / "run" / "thin" / "plan.json").exists()


def test_the_attacks_are_attacks(workplace: Path) -> None:
    """What is refused above does execute code for whoever unpickles it."""
    attack_in_pickle()
    pickle.loads(Path("w.pth").read_bytes())
    assert Path("sentinel").read_text() == "executed"


@pytest.mark.parametrize("command", ["bild", "bulid", "prun", "compar", "doktor"])
def test_unknown_command(command: str, cli: Callable[..., Any]) -> None:
    done = cli(command, "--json")
    assert done.code == 2
    assert "Did you mean" in json.loads(done.out)["error"]


@pytest.mark.parametrize(
    ("name", "arguments"), [("data", "--data nowhere"), ("attack", "--weights w.pth"), ("option", "--targt cpu")]
)
def test_as_a_program(name: str, arguments: str, workplace: Path) -> None:
    attack_in_zip()
    command = [sys.executable, "-m", "thinet_deploy", *GOOD.split(), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=workplace)
    assert done.returncode == 2
    assert done.stdout == ""
    assert READING.sub("", done.stderr).startswith("Error: ")
    assert "Traceback" not in done.stderr
    assert not Path("sentinel").exists()
    assert not Path("run").exists()


def test_error_texts_are_not_markup(cli: Callable[..., Any], workplace: Path) -> None:
    """rich would swallow [names] in brackets, and break long lines."""
    done = cli("build", "--data", "[bold]x[/bold]" + "y" * 200, "--model", "vgg16")
    assert "[bold]x[/bold]" + "y" * 200 in done.err


def test_config_paths_are_relative_to_the_file(cli: Callable[..., Any], workplace: Path) -> None:
    (workplace / "sub").mkdir()
    lines = {"data": "../data", "model": "../net.py:tiny", "out": "../elsewhere", "weights": "gone.pth"}
    (workplace / "sub" / "c.toml").write_text("".join(f"{name} = '{value}'\n" for name, value in lines.items()))
    assert "There is no weights file sub/gone.pth" in cli("prune", "--config", "sub/c.toml").err


def test_damaged_weights_in_memory(workplace: Path) -> None:
    """Every prefix of a .pth file is refused in our words."""
    from thinet_deploy.errors import WeightsError
    from thinet_deploy.models.weights import load_weights

    make: Any = load_function("net.py:tiny", "factory")
    whole = io.BytesIO()
    torch.save(state(), whole)
    data = whole.getvalue()
    for length in range(0, len(data), max(1, len(data) // 97)):
        Path("w.pth").write_bytes(data[:length])
        with pytest.raises(WeightsError):
            load_weights(make(), Path("w.pth"))
