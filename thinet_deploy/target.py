"""Target profiles: what a network is built for, as checked data (profiles/*.toml).

A fact that is not known is absent. Every group of facts that is given names its source, date and confidence
in `[[sources]]`. A profile of the user may extend another: tables merge, everything else replaces.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from datetime import date
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import TargetError, UnknownNameError
from .interfaces import Precision

Runtime = Literal[
    "tensorrt", "tensorrt-rtx", "openvino", "onnxruntime", "ort", "ncnn", "litert", "executorch", "coreml", "torch"
]
Confidence = Literal["documented", "third-party", "check"]

EXPORT_OPSET = 20
"""The newest ONNX opset an export uses: what the oldest TensorRT 10 reads; nothing we export needs a later one."""

_IR_OF_OPSET = {17: 8, 18: 8, 19: 9, 20: 9}
# What is said of the world and so needs a source; the other fields are names or our own policy.
_FACTS = (
    *("soc", "part_numbers", "cpu", "gpu", "dla", "memory", "power_modes"),
    *("stacks", "runtimes", "precisions", "channel_grid"),
)
# What names one profile and must not pass to another that extends it.
_OWN = ("id", "aliases")


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cpu(_Table):
    """`isa`: the flags every such CPU has, as /proc/cpuinfo spells them."""

    isa: tuple[str, ...]


class Gpu(_Table):
    """`compute_capability`: CUDA's, such as "8.7"."""

    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d$")]


class Dla(_Table):
    """`cores`: the most that any variant has, 0 for none."""

    cores: Annotated[int, Field(ge=0)]


class Memory(_Table):
    """`total_mb`: nominal MiB of each variant sold; `unified`: shared by CPU and GPU."""

    unified: bool
    total_mb: tuple[Annotated[int, Field(gt=0)], ...] = ()


class Stack(_Table):
    """One software stack a target can run; absent versions are not known.

    Attributes:
        name: such as "jetpack-6.2".
        l4t: how its L4T (Jetson Linux) versions begin, such as "36.4"; those we are sure of.
        opset_max: newest ONNX opset it reads.
        ir_max: newest ONNX IR version it reads.
        strong_typing: TensorRT's strongly typed networks: not there, on request, or the only kind.
        dla: whether this stack can drive a DLA.
        default: the stack to build for unless another is named.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    l4t: tuple[str, ...] = ()
    cuda: str | None = None
    tensorrt: str | None = None
    openvino: str | None = None
    onnxruntime: str | None = None
    opset_max: Annotated[int, Field(ge=17)]
    ir_max: Annotated[int, Field(ge=8)]
    strong_typing: Literal["none", "opt-in", "always"] | None = None
    dla: bool | None = None
    default: bool = False


class Precisions(_Table):
    """What engines may compute in; `forbidden` gives the reason for each precision that is refused."""

    supported: tuple[Precision, ...]
    recommended: Precision
    forbidden: dict[Precision, str] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.recommended not in self.supported:
            raise ValueError(f"recommended = {self.recommended!r} is not among supported")
        if both := set(self.supported) & set(self.forbidden):
            raise ValueError(f"both supported and forbidden: {', '.join(sorted(both))}")
        return self


class Build(_Table):
    """Where engines are built, with how much workspace (MiB) and how much RAM must stay free (MiB)."""

    where: Literal["host", "device"]
    workspace_mb: Annotated[int, Field(gt=0)] | None = None
    ram_guard_mb: Annotated[int, Field(gt=0)] | None = None


class Probe(_Table):
    """A file to read or a command to run, whose text `pattern` (a regular expression) must match somewhere."""

    file: str | None = None
    command: tuple[str, ...] = ()
    pattern: str

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if bool(self.file) == bool(self.command):
            raise ValueError("give either file or command")
        return self

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return pattern


class Source(_Table):
    """Where facts come from: `facts` are fields such as "memory", "memory.total_mb" or "stacks.jetpack-6.2"."""

    facts: Annotated[tuple[str, ...], Field(min_length=1)]
    source: Annotated[str, Field(min_length=1)]
    as_of: date
    confidence: Confidence


class TargetProfile(_Table):
    """One target: its facts, their sources, and our policy for building for it.

    Attributes:
        id: the name given to --target; `aliases` work as well.
        runtimes: in order of preference.
        channel_grid: widths that are a multiple of this are cheap; 1 when nothing is known.
        connect: how the device is reached; absent when it cannot be reached from here.
        detect: probes that all match on such a device.
    """

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    aliases: tuple[str, ...] = ()
    family: str
    vendor: str | None = None
    soc: str | None = None
    part_numbers: tuple[str, ...] = ()
    os: Literal["linux", "android", "ios", "windows", "macos"]
    arch: Literal["x86_64", "aarch64"]
    abi: str | None = None
    cpu: Cpu | None = None
    gpu: Gpu | None = None
    dla: Dla | None = None
    memory: Memory | None = None
    power_modes: tuple[str, ...] = ()
    stacks: tuple[Stack, ...] = ()
    runtimes: Annotated[tuple[Runtime, ...], Field(min_length=1)]
    precisions: Precisions
    channel_grid: Annotated[int, Field(ge=1)] = 1
    build: Build
    connect: Literal["ssh", "adb", "local"] | None = None
    detect: tuple[Probe, ...] = ()
    sources: tuple[Source, ...]

    @field_validator("stacks")
    @classmethod
    def _one_default(cls, stacks: tuple[Stack, ...]) -> tuple[Stack, ...]:
        names = [stack.name for stack in stacks]
        if len(set(names)) < len(names):
            raise ValueError("two stacks have the same name")
        if len(stacks) > 1 and sum(stack.default for stack in stacks) != 1:
            raise ValueError("exactly one of several stacks must have default = true")
        return stacks

    @model_validator(mode="after")
    def _facts_have_sources(self) -> Self:
        given = self._given_facts()
        sourced = {fact for source in self.sources for fact in source.facts}
        if unknown := sourced - given:
            raise ValueError(f"[[sources]] speaks of what is not stated: {', '.join(sorted(unknown))}")
        if bare := {fact for fact in given if "." not in fact} - {_head(fact) for fact in sourced}:
            raise ValueError(f"no [[sources]] entry covers {', '.join(sorted(bare))}")
        return self

    def _given_facts(self) -> set[str]:
        heads = {fact for fact in _FACTS if fact in self.model_fields_set}
        tables = {head: getattr(self, head) for head in heads}
        inner = {f"{h}.{sub}" for h, t in tables.items() if isinstance(t, _Table) for sub in t.model_fields_set}
        return heads | inner | {f"stacks.{stack.name}" for stack in self.stacks}

    @property
    def stack(self) -> Stack | None:
        """The stack to build for: the default one, or the only one; None when no stack is known."""
        return next((stack for stack in self.stacks if stack.default or len(self.stacks) == 1), None)

    @property
    def opset(self) -> int:
        """The ONNX opset to export: `EXPORT_OPSET`, or lower when the stack reads no more."""
        return min(self.stack.opset_max, EXPORT_OPSET) if self.stack else EXPORT_OPSET

    @property
    def ir_version(self) -> int:
        """The ONNX IR version to write: the one that came with `opset`, never above the stack's."""
        paired = _IR_OF_OPSET[self.opset]
        return min(paired, self.stack.ir_max) if self.stack else paired

    @property
    def is_local(self) -> bool:
        """Whether the engine runs on this machine."""
        return self.connect == "local"

    @property
    def builds_on_device(self) -> bool:
        """Whether the engine must be built where it runs (which is here when `is_local`)."""
        return self.build.where == "device"

    def on_stack(self, name: str) -> TargetProfile:
        """The same target with another of its stacks as the default.

        Raises:
            UnknownNameError: the target has no stack of that name.
        """
        names = [stack.name for stack in self.stacks]
        if name not in names:
            raise UnknownNameError(f"stack of target {self.id}", name, names)
        stacks = tuple(stack.model_copy(update={"default": stack.name == name}) for stack in self.stacks)
        return self.model_copy(update={"stacks": stacks})

    def stack_of(self, l4t: str) -> Stack | None:
        """The stack with this version of Jetson Linux, if it is known."""
        return next((s for s in self.stacks if any(f"{l4t}.".startswith(f"{each}.") for each in s.l4t)), None)

    def require_precision(self, precision: Precision) -> None:
        """Raise TargetError, with the reason, when engines for this target cannot compute in `precision`."""
        if precision in self.precisions.supported:
            return
        reason = self.precisions.forbidden.get(precision, "its profile does not list it")
        raise TargetError(
            f"Target {self.id} cannot compute in {precision}: {reason}.",
            hint=f"Use --precision {self.precisions.recommended}; supported: {', '.join(self.precisions.supported)}.",
        )

    @property
    def dla_precisions(self) -> tuple[Precision, ...]:
        """What a DLA can be asked for: before TensorRT 11 it took INT8 from calibration tables only, not from Q/DQ."""
        return ("fp16", "int8") if self.stack and self.stack.strong_typing == "always" else ("fp16",)

    def require_dla(self, core: int, precision: Precision | None = None) -> None:
        """Raise TargetError when there is no such DLA here, its stack cannot drive one, or not in this precision."""
        why = ""
        if self.dla and core >= self.dla.cores:
            why = f"it has {self.dla.cores or 'none'}"
        elif self.stack and self.stack.dla is False:
            why = f"{self.stack.name} cannot drive one"
        elif not self.dla and not any(stack.dla for stack in self.stacks):
            why = "its profile knows of none"
        elif precision and precision not in self.dla_precisions:
            with_stack = f"with {self.stack.name} " if self.stack else ""
            why = f"{with_stack}it takes ONNX files in {' and '.join(self.dla_precisions)} only, not in {precision}"
        if why:
            raise TargetError(f"DLA {core} was asked for on {self.id}: {why}.", hint="Leave it out: the GPU does it.")

    def source_of(self, fact: str) -> Source | None:
        """The source of a fact such as "memory.total_mb": the entry that names it, else its whole group's."""
        for name in (fact, _head(fact)):
            for source in self.sources:
                if name in source.facts:
                    return source
        return None


def profile_names() -> list[str]:
    """Ids of the built-in targets, sorted."""
    return sorted(_builtin())


def load_profile(name_or_path: str) -> TargetProfile:
    """The target profile of that id or alias, or of a .toml file; "NAME@STACK" takes another stack than its default.

    Raises:
        UnknownNameError: no built-in target has that id or alias, or the target no such stack.
        TargetError: a file that cannot be read, is not TOML or does not hold; names file and field.
    """
    name, at, stack = (name_or_path, "", "") if name_or_path.endswith(".toml") else name_or_path.partition("@")
    profile, _ = _load(_find(name, Path()), ())
    return profile.on_stack(stack) if at else profile


def _builtin() -> dict[str, Traversable]:
    folder = resources.files(f"{__package__}.profiles")
    return {entry.name.removesuffix(".toml"): entry for entry in folder.iterdir() if entry.name.endswith(".toml")}


def _find(name_or_path: str, folder: Path) -> Traversable:
    """The file of a built-in id or alias, or the path itself (relative to `folder`)."""
    if name_or_path.endswith(".toml"):
        return (folder / Path(name_or_path).expanduser()).resolve()
    files = _builtin()
    names = dict(_names(files))
    if name_or_path not in names:
        raise UnknownNameError("target", name_or_path, names)
    return files[names[name_or_path]]


def _names(files: Mapping[str, Traversable]) -> Iterator[tuple[str, str]]:
    for name, file in files.items():
        yield name, name
        for alias in _parse(file).get("aliases", ()):
            yield alias, name


def _load(file: Traversable, above: tuple[str, ...]) -> tuple[TargetProfile, dict[str, Any]]:
    """The checked profile in `file` and its merged table; `above` are the files that extend it."""
    if str(file) in above:
        chain = " → ".join(Path(name).name for name in (*above, str(file)))
        raise TargetError(f"Target profiles extend each other in a circle: {chain}.", hint="Remove one `extends`.")
    own = _parse(file)
    table = own
    if (parent := own.pop("extends", None)) is not None:
        if not isinstance(parent, str):
            raise TargetError(f"{file}: extends must be the name of a target or a .toml file, not {parent!r}.")
        folder = file.parent if isinstance(file, Path) else Path()
        _, base = _load(_find(parent, folder), (*above, str(file)))
        table = _extend(base, own)
    return _validate(table, file), table


def _parse(file: Traversable) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise TargetError(
            f"The target profile {file} cannot be read: {error.strerror}.",
            hint="Give the path of a .toml file, or the name of a target: `thinet-deploy targets` lists them.",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"{file} is not valid TOML: {error}.", hint="Mend the file at that place.") from error


def _extend(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` over `base`. A source of the base does not vouch for a fact that `own` states anew."""
    inherited = {key: value for key, value in base.items() if key not in _OWN}
    merged = _merge(inherited, own)
    kept = [s | {"facts": [f for f in s["facts"] if _head(f) not in own]} for s in base["sources"]]
    if isinstance(mine := own.get("sources", []), list):
        merged["sources"] = [*mine, *(source for source in kept if source["facts"])]
    return merged


def _merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _validate(table: dict[str, Any], file: Traversable) -> TargetProfile:
    try:
        return TargetProfile.model_validate(table)
    except ValidationError as error:
        problems = [_explain(e["loc"], e["type"], e["msg"]) for e in error.errors()]
        raise TargetError(
            f"The target profile {file} does not hold: {'; '.join(problems)}.",
            hint=f"Known fields: {', '.join(TargetProfile.model_fields)}, extends.",
        ) from error


def _explain(place: tuple[int | str, ...], kind: str, message: str) -> str:
    field = ".".join(str(part) for part in place)
    text = "there is no such field" if kind == "extra_forbidden" else message.removeprefix("Value error, ")
    return f"{field}: {text}" if field else text


def _head(fact: str) -> str:
    return fact.partition(".")[0]
