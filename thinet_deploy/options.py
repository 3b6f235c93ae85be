"""What the user asks for: the same names on the command line, in a --config file and in Python."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import InputError, UnknownNameError

Preset = Literal["thinet-conv", "thinet-gap"]


class Options(BaseModel):
    """Options of `build` and `prune`.

    Attributes:
        target: name of a target profile, or a path to one.
        model: "vgg16", "vgg-small" or "file.py:factory"; empty for the embedded default.
        data: folder with train/ and val/ or test/; None for the embedded digits.
        weights: trained weights of the dense network; None to train it here.
        preprocess: TOML file; None for the usual one.
        input_shape: channels, height and width of the input, for a model that does not say.
        preset: what to make; None for thinet-gap where the network has a fully connected head.
        keep: keep ratio r of every pruned layer.
        epochs: of training the dense network (and, for given weights, what they are taken to have had).
        layer_epochs: of fine-tuning after each pruned layer.
        finetune_epochs: of fine-tuning at the end, for ThiNet-Conv and again for ThiNet-GAP.
        lr: learning rate of training; pruned layers are fine-tuned at a third of it.
        batch_size: images per training step.
        trainer: "file.py:fit", the user's own training instead of ours.
        threads: CPU threads of an engine while its latency is measured.
        seed: same seed, same widths and same kept filters.
        out: the run directory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    target: str = "cpu"
    model: str = ""
    data: Path | None = None
    weights: Path | None = None
    preprocess: Path | None = None
    input_shape: tuple[int, int, int] | None = None
    preset: Preset | None = None
    keep: float = Field(default=0.5, gt=0, le=1)
    epochs: int = Field(default=20, ge=0)
    layer_epochs: int = Field(default=1, ge=0)
    finetune_epochs: int = Field(default=15, ge=0)
    lr: float = Field(default=0.03, gt=0)
    batch_size: int = Field(default=32, ge=1)
    trainer: str | None = None
    threads: int = Field(default=1, ge=1)
    seed: int = 0
    out: Path = Path("thinet-run")


def make_options(values: dict[str, Any]) -> Options:
    """Options from values by name.

    Raises:
        UnknownNameError: there is no such option.
        InputError: a value is out of range (named, with what was expected).
    """
    for name in values:
        if name not in Options.model_fields:
            raise UnknownNameError("option", name, Options.model_fields)
    try:
        return Options.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "literal_error":
            raise UnknownNameError(name, str(first["input"]), get_args(Preset)) from error
        raise InputError(
            f"--{name.replace('_', '-')} is {first['input']}: {first['msg'][0].lower()}{first['msg'][1:]}.",
            hint=_HINTS.get(name, "See `thinet-deploy build --help`."),
        ) from error


_HINTS = {
    "keep": "--keep is the share of filters that stay in each pruned layer: 0.5 keeps half of them.",
}


def read_config(path: Path) -> dict[str, Any]:
    """Options from a --config TOML file; paths in it are relative to the file.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as TOML: {error}.", hint="--config takes option = value lines."
        ) from error
    values = {name.replace("-", "_"): value for name, value in values.items()}
    for name in ("data", "weights", "preprocess", "out", "model", "trainer", "target"):
        value = values.get(name)
        if isinstance(value, str) and (name not in _NAMES or ".py:" in value or value.endswith(".toml")):
            values[name] = str(path.parent / value)
    return values


# Options that are paths only when they say so: file.py:function, or a profile's file.toml.
_NAMES = ("model", "trainer", "target")


def parse_shape(text: str) -> tuple[int, int, int]:
    """Turn "3x224x224" into (3, 224, 224).

    Raises:
        InputError: it is no such thing.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text.lower())
    if match is None:
        raise InputError(
            f"--input-shape is {text!r}, but channels x height x width was expected.", hint="Such as 3x224x224."
        )
    return int(match[1]), int(match[2]), int(match[3])
