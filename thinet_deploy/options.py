"""What the user asks for: the same names on the command line, in a --config file and in Python."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .errors import InputError, UnknownNameError
from .interfaces import Precision, Reconstruction, Selection

# Networks of given widths (models/presets.py); the other two take the widths that are asked for.
FixedPreset = Literal["thinet-tiny", "thinet-70", "thinet-50", "thinet-30"]
Preset = Literal["thinet-conv", "thinet-gap", FixedPreset]
HEAD_REPLACED = ("thinet-gap", "thinet-tiny")
# --weights of that name: torchvision's for this network.
DEFAULT = "default"
USUAL_RATE = 0.01  # of fine-tuning, for a batch of 32
RecipeName = Literal["iccv2017", "tpami2019", "best"]
Controls = Literal["none", "unpruned", "all"]


def _parts(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


class Options(BaseModel):
    """Options of `build` and `prune`.

    Attributes:
        target: name of a target profile, or a path to one.
        model: a name of `models.loading.MODELS`, or "file.py:factory"; empty for the embedded default.
        data: folder with train/ and val/ or test/, or in VOC's layout; None for the embedded digits.
        unlabelled: folder of images to calibrate on and to learn from the original on, in place of train/ in `data`.
        transfer_to: folder with train/ and val/ or test/ of other classes: the network is pruned on `data` and then
            fine-tuned to these, beside other ways to get there (the papers' transfer table).
        weights: trained weights of the dense network; "default" for torchvision's; None to train it here.
        preprocess: TOML file; None for the usual one.
        input_shape: channels, height and width of the input, for a model that does not say.
        preset: what to make; None for thinet-gap where the network has a fully connected head. Some say all widths.
        recipe: "best": all layers at once, chosen by elimination, reconstructed without training, widths put where they
            help most, the original trained on as teacher; or the papers' (layer by layer, with fine-tuning between).
        method: how filters are chosen, if not as the recipe says; with several ("a,b,c" or a tuple) all are made and
            compared, and the first is the one that ships.
        reconstruction: how their consumers make up for those that go, if not as the recipe says.
        calibration_images: for the statistics of "best".
        keep: keep ratio r of every pruned layer.
        macs: budget instead: "2x" for half as many multiply-accumulates, or their number, such as "300M".
        size: budget instead: of the weights, such as "5MB" (4 bytes each, 2^20 bytes in a MB, biases not counted).
        latency: budget instead: of time on the first of the target's engines that runs here, such as "8ms".
        speedup: the same as a ratio: "2x" for half of the time that the original takes.
        round_to: widths are multiples of this number, or of what the target profile knows to be fast ("target");
            budgets are reached all the same. None for the target's, halved in layers too narrow for it; for 1 in the
            papers' recipes.
        gcos: make convolutions of the pruned network grouped, with shuffles (this project's gcos, docs/adr/0011): 4
            groups on the smallest maps, 2 on the next.
        gcos_layer: pattern of module names → groups, for another layout.
        keep_layer: pattern of module names, such as "layer4.*" → keep ratio of these layers.
        ignore: patterns of module names that stay whole.
        prune_shortcuts: prune residual streams too.
        drop_branches: let residual branches vanish altogether where that costs least: they add their mean then.
        epochs: of training the dense network (and, for given weights, what they are taken to have had).
        layer_epochs: of fine-tuning after each pruned layer, where the recipe goes layer by layer; None for the
            papers': 1, and another at a tenth of the rate in front of a pool; with branches 1 after each block.
        finetune_epochs: of fine-tuning at the end, for ThiNet-Conv and again for ThiNet-GAP; None for 15, or the
            papers': 12, and 9 in networks with branches.
        transfer_epochs: of all fine-tuning to the images of `transfer_to`; None for as many as `finetune_epochs`.
        controls: what the thin networks are compared with: "unpruned": the original, trained for as many epochs more
            as they were, which is also what they learn from; "all": also their architecture from scratch, for as many
            epochs as all training that went into them, their teacher's too; "none": nothing, so that they learn from
            the original as it is.
        lr: learning rate of training from fresh weights: of the original and of the control from scratch.
        finetune_lr: learning rate of fine-tuning; if not given, the papers' in their recipes, else see `trial`.
        train: settings of all training by name, such as {"precision": "bf16"}: see `training.Recipe`.
        batch_size: images per training step; if not given, the recipe's.
        trainer: "file.py:fit", the user's own training instead of ours.
        precision: what engines compute in; None for fp32 where they are made here, and, where TensorRT makes them on
            the device, for a file in each type that it computes in.
        max_drop: points of top-1, on held-out training images, that INT8 may cost; the worst layers return to fp32.
        threads: CPU threads of an engine while its latency is measured.
        require: what the network that ships has to reach, such as "latency<=8ms": see `contract`.
        seed: same seed, same widths and same kept filters.
        dla: which of a Jetson's DLAs takes the layers that it can, one image at a time; None for the GPU alone.
        device: where the bundle is to be built, verified and measured too: "ssh://user@host:port" or "adb:SERIAL";
            a budget of time is met there, over ssh only.
        device_python: the Python there.
        out: the run directory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    target: str = "cpu"
    model: str = ""
    data: Path | None = None
    unlabelled: Path | None = None
    transfer_to: Path | None = None
    weights: Path | None = None
    preprocess: Path | None = None
    input_shape: tuple[int, int, int] | None = None
    preset: Preset | None = None
    recipe: RecipeName = "best"
    method: Annotated[tuple[Selection, ...], BeforeValidator(_parts)] = ()
    reconstruction: Reconstruction | None = None
    calibration_images: int = Field(default=2000, ge=1)
    keep: float = Field(default=0.5, gt=0, le=1)
    macs: str | None = Field(default=None, pattern=r"^([0-9]+(\.[0-9]+)?(x|k|M|G|B)|[0-9]{4,})$")
    size: str | None = Field(default=None, pattern=r"^[0-9]+(\.[0-9]+)?(kB|MB|GB)$")
    latency: str | None = Field(default=None, pattern=r"^[0-9]+(\.[0-9]+)?(us|ms|s)$")
    speedup: str | None = Field(default=None, pattern=r"^[0-9]+(\.[0-9]+)?x$")
    round_to: Annotated[int, Field(ge=1)] | Literal["target"] | None = None
    gcos: bool = False
    gcos_layer: dict[str, Annotated[int, Field(ge=2, le=8)]] = Field(default_factory=dict)
    keep_layer: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    prune_shortcuts: bool = False
    drop_branches: bool = False
    epochs: int = Field(default=20, ge=0)
    layer_epochs: int | None = Field(default=None, ge=0)
    finetune_epochs: int | None = Field(default=None, ge=0)
    transfer_epochs: int | None = Field(default=None, ge=0)
    controls: Controls = "unpruned"
    lr: float = Field(default=0.03, gt=0)
    finetune_lr: float | None = Field(default=None, gt=0)
    train: dict[str, str | float] = Field(default_factory=dict)
    batch_size: int = Field(default=32, ge=1)
    trainer: str | None = None
    precision: Precision | None = None
    max_drop: float = Field(default=1.0, ge=0)
    threads: int = Field(default=1, ge=1)
    require: tuple[str, ...] = ()
    seed: int = 0
    dla: int | None = Field(default=None, ge=0)
    device: str | None = None
    device_python: str = "python3"
    out: Path = Path("thinet-run")

    @model_validator(mode="before")
    @classmethod
    def _as_the_recipe_says(cls, values: dict[str, Any]) -> dict[str, Any]:
        papers = {"batch_size": 128, "finetune_lr": 1e-3}
        return {**({} if values.get("recipe", "best") == "best" else papers), **values}

    @property
    def layerwise(self) -> bool:
        """Whether every layer is fine-tuned before the next one is pruned."""
        return self.recipe != "best"

    @property
    def distils(self) -> bool:
        """Whether fine-tuning learns from the original."""
        return self.recipe == "best"

    @property
    def rate(self) -> float:
        """Learning rate of fine-tuning where none is tried."""
        return self.finetune_lr or USUAL_RATE

    @property
    def methods(self) -> tuple[Selection, ...]:
        """The methods in use, each once."""
        usual: dict[RecipeName, Selection] = {"iccv2017": "thinet", "tpami2019": "thinet-omp", "best": "elimination"}
        return tuple(dict.fromkeys(self.method)) or (usual[self.recipe],)

    @property
    def selection(self) -> Selection:
        """The method in use, or the first of several."""
        return self.methods[0]

    def only(self, method: Selection) -> Options:
        """The same with one method."""
        return self.model_copy(update={"method": (method,)})

    @property
    def rebuilding(self) -> Reconstruction:
        """The reconstruction in use."""
        return self.reconstruction or ("scale" if self.layerwise else "full")

    def most_macs(self, present: int) -> float | None:
        """The budget of multiply-accumulates for a network that has `present` now; None without one."""
        if self.macs is None:
            return None
        if self.macs.endswith("x"):
            return present / max(float(self.macs[:-1]), 1e-9)
        number = self.macs.rstrip("kMGB")
        return float(number) * {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}[self.macs[len(number) :]]

    @property
    def most_bytes(self) -> float | None:
        """The budget of weights in bytes; None without one."""
        if self.size is None:
            return None
        return float(self.size[:-2]) * {"kB": 2**10, "MB": 2**20, "GB": 2**30}[self.size[-2:]]

    @property
    def most_ms(self) -> float | None:
        """The budget of time in milliseconds; None without one."""
        if self.latency is None:
            return None
        number = self.latency.rstrip("ums")
        return float(number) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[self.latency[len(number) :]]

    @property
    def times_faster(self) -> float | None:
        """The speed-up asked for; None without one."""
        return float(self.speedup[:-1]) if self.speedup else None

    @property
    def timed(self) -> bool:
        """Whether the budget is one of time."""
        return bool(self.latency or self.speedup)

    @property
    def widths(self) -> str:
        """What was asked of the widths, for people: "r=0.5", "MACs 2x" …"""
        if self.timed:
            return self.latency or f"{self.speedup} faster"
        budgets = [f"MACs {self.macs}"] * bool(self.macs) + [f"size {self.size}"] * bool(self.size)
        return ", ".join(budgets) or f"r={self.keep:g}"

    @property
    def fixed(self) -> bool:
        """Whether the preset says all widths."""
        return self.preset in get_args(FixedPreset)

    def title(self, *, head: bool = False, method: str = "", alone: bool = False) -> str:
        """What a thin network is called in tables.

        Args:
            head: whether its head was replaced.
            method: that chose its filters, if several are compared.
            alone: whether there is no row for the pruned network with its old head, which says the widths.
        """
        more: list[str] = [method] if method and len(self.methods) > 1 else []
        if self.fixed:
            name = f"ThiNet-{str(self.preset).removeprefix('thinet-').capitalize()}"
            more[:0] = [] if head or self.preset not in HEAD_REPLACED else ["its head as it was"]
        else:
            name = "ThiNet-GAP" if head else "ThiNet-Conv"
            more[:0] = [] if head and not alone else [self.widths]
        more += ["gcos"] if self.gcos or self.gcos_layer else []
        return f"{name} ({', '.join(more)})" if more else name


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
        if first["type"] == "literal_error" and name in _CHOICES:
            raise UnknownNameError(name, str(first["input"]), get_args(_CHOICES[name])) from error
        form = first["type"] == "string_pattern_mismatch"  # nobody reads regular expressions
        why = "it is not in one of the forms below" if form else first["msg"][0].lower() + first["msg"][1:]
        raise InputError(
            f"--{name.replace('_', '-')} is {first['input']}: {why}.",
            hint=_HINTS.get(name, "See `thinet-deploy build --help`."),
        ) from error


BUDGETS = ("latency", "speedup", "macs", "size")


def check_one_budget(given: Mapping[str, Any]) -> None:
    """Raise InputError where what the user gave has --keep, at whatever value, beside a budget."""
    if given.get("keep") and (budget := next((name for name in BUDGETS if given.get(name)), "")):
        raise InputError(
            f"--keep and --{budget} are two ways to say how much stays, but one was expected.",
            hint="--keep-layer keeps more of some layers within a budget.",
        )


_CHOICES = {
    "preset": Preset,
    "recipe": RecipeName,
    "method": Selection,
    "reconstruction": Reconstruction,
    "controls": Controls,
    "precision": Precision,
}
_HINTS = {
    "macs": "--macs 2x halves the multiply-accumulates; --macs 300M and --macs 1.5G are numbers of them.",
    "round_to": "--round-to 16, or --round-to target for the number in the target's profile.",
    "size": "--size 5MB, --size 800kB: of the weights, 4 bytes each.",
    "latency": "--latency 8ms, --latency 800us: of one image on the target's engine.",
    "speedup": "--speedup 2x: twice as fast as the original on the target's engine.",
    "keep": "--keep 0.5: as few multiply-accumulates as with half of the filters in each pruned layer.",
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
    for name in ("data", "unlabelled", "transfer_to", "weights", "preprocess", "out", "model", "trainer", "target"):
        value = values.get(name)
        if isinstance(value, str) and (name not in _NAMES or ".py:" in value or ".toml" in value):
            values[name] = value if (name, value) == ("weights", DEFAULT) else str(path.parent / value)
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


def parse_setting(text: str) -> tuple[str, str]:
    """Turn "precision=bf16" into ("precision", "bf16").

    Raises:
        InputError: it is no such thing.
    """
    name, _, value = text.partition("=")
    if not (name and value):
        raise InputError(f"--train is {text!r}, but NAME=VALUE was expected.", hint="Such as precision=bf16.")
    return name.strip().replace("-", "_"), value.strip()


def parse_layer(text: str) -> tuple[str, float]:
    """Turn "layer4.*=0.7" into ("layer4.*", 0.7).

    Raises:
        InputError: it is no such thing.
    """
    pattern, _, ratio = text.rpartition("=")
    try:
        return pattern, float(ratio if pattern else "")
    except ValueError:
        raise InputError(
            f"--keep-layer is {text!r}, but PATTERN=R was expected.", hint='Such as "layer4.*=0.7".'
        ) from None


def parse_groups(text: str) -> tuple[str, int]:
    """Turn "features.2*=4" into ("features.2*", 4).

    Raises:
        InputError: it is no such thing.
    """
    pattern, _, groups = text.rpartition("=")
    if not pattern or not groups.isdigit():
        raise InputError(f"--gcos-layer is {text!r}, but PATTERN=GROUPS was expected.", hint='Such as "features.2*=4".')
    return pattern, int(groups)


_PARSED: dict[str, Callable[[str], tuple[str, Any]]] = {
    "keep_layer": parse_layer,
    "gcos_layer": parse_groups,
    "train": parse_setting,
}


def spelled_out(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options as `Options` takes them, from what people write: "3x224x224", one pattern, a list of "PATTERN=R"."""
    found = dict(values)
    for name in (*_PARSED, "ignore", "require"):
        each = [found[name]] if isinstance(found.get(name), str) else found.get(name)
        if isinstance(each, list | tuple) and all(isinstance(one, str) for one in each):
            found[name] = dict(map(_PARSED[name], each)) if name in _PARSED else tuple(each)
    if isinstance(found.get("input_shape"), str):
        found["input_shape"] = parse_shape(found["input_shape"])
    return found
