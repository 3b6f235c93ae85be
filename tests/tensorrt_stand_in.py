"""TensorRT without its library: the real bindings' classes, names and signatures, with objects that only pretend.

Run in a process of its own with one version's bindings on the path, it lets tensorrt_builder.py build an engine. Each
attribute has to exist in that version, and each call has to fit a signature that the bindings document.

    python tensorrt_stand_in.py FOLDER DTYPE SETTINGS    prints what was called, and the report or the error
"""

import inspect
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorrt_bindings as trt  # type: ignore[import-not-found]  # downloaded by test_tensorrt.py

from thinet_deploy.on_device.tensorrt_builder import BuildError, Settings, build

CALLED: list[str] = []
# What the inspector calls the type of a tensor.
DATATYPE = "Datatype" if trt.__version__.startswith("11") else "Format/Datatype"
WORLD: dict[str, Any] = {
    "INetworkDefinition.num_inputs": 1,
    "INetworkDefinition.num_layers": 2,
    "ILayer.num_outputs": 1,
    "ILayer.name": "conv1",
    "ITensor.name": "input",
    "ITensor.shape": (-1, 3, 8, 8),
    "OnnxParser.num_errors": 1,
    "ParserError.node": 4,
    "ParserError.desc": "no such operator",
    "ParserError.node_operator": "Frobnicate",
    "ParserError.node_name": "layer7",
    "IBuilderConfig.can_run_on_DLA": False,
    "EngineInspector.get_engine_information": json.dumps({"Layers": [{"Outputs": [{DATATYPE: "Half"}]}]}),
}


class StandIn:
    """An object of a class of the bindings: it has what the real one has, and takes what the real one takes."""

    def __init__(self, kind: type) -> None:
        self.__dict__.update(kind=kind, own={})

    def __bytes__(self) -> bytes:
        return bytes(self.own.get("bytes", b"bytes of an engine or a cache"))

    def __getattr__(self, name: str) -> Any:
        kind: type = self.__dict__["kind"]
        member, place = getattr(kind, name), f"{kind.__name__}.{name}"
        CALLED.append(place)
        if not isinstance(member, property):
            return lambda *given, **named: self._call(place, member.__doc__, given, named)
        assert member.fget is not None
        return self.own[name] if name in self.own else result(place, _returned(member.fget.__doc__), (self,))

    def _call(self, place: str, documented: str | None, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What stands for an object of TensorRT is the same one every time."""
        found = called(place, documented, (self, *given), named)
        return found if callable(WORLD.get(place)) else self.own.setdefault(f"{place}{given}{named}", found)

    def __setattr__(self, name: str, value: Any) -> None:
        kind: type = self.__dict__["kind"]
        member, place = getattr(kind, name), f"{kind.__name__}.{name}"
        CALLED.append(place)
        assert isinstance(member, property), f"{place} is no property"
        assert member.fset is not None, f"{place} cannot be set"
        called(place, member.fset.__doc__, (self, value), {})
        self.__dict__["own"][name] = value


def called(place: str, documented: str | None, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What a call gives; TypeError where no documented signature takes these arguments."""
    texts = re.findall(r"\((.*)\) -> (\S.*)$", documented or "", re.MULTILINE)
    for parameters, returned in texts:
        if fits(list(_parameters(parameters)), given, named):
            if place == "Builder.build_serialized_network":
                _pretend_to_build(given[2])
            return result(place, returned, given, named)
    raise TypeError(f"{place} takes {texts}, not {given[1:]} {named}")


def _parameters(text: str) -> Iterator[tuple[str, str, bool]]:
    """(name, type, optional) of each parameter."""
    for part in re.split(r", (?=\w+:)", text):
        name, _, kind = part.partition(": ")
        kind, _, default = kind.partition(" = ")
        yield name, kind, bool(default)


def fits(parameters: list[tuple[str, str, bool]], given: tuple[Any, ...], named: dict[str, Any]) -> bool:
    names = [name for name, _, _ in parameters]
    if len(given) > len(parameters) or not set(named) <= set(names[len(given) :]):
        return False
    values = {**dict(zip(names, given, strict=False)), **named}
    return all(is_a(values[name], kind) if name in values else optional for name, kind, optional in parameters)


def is_a(value: Any, kind: str) -> bool:
    """Whether a value is of a type as the bindings write it."""
    kind = kind.rpartition(".")[2].rpartition("::")[2].removeprefix("IParser")
    if isinstance(value, StandIn):
        return kind.lower() == "buffer" or value.__dict__["kind"].__name__ == kind
    simple: dict[str, Any] = {"int": int, "SupportsInt": int, "str": str, "bool": bool, "buffer": bytes}
    simple |= {"Buffer": bytes, "Dims": tuple, "tuple": tuple, "list": list, "object": object}
    return isinstance(value, simple.get(kind) or getattr(trt, kind))


def _returned(documented: str | None) -> str:
    return (documented or "").strip().rpartition("-> ")[2]


def result(place: str, returned: str, given: tuple[Any, ...] = (), named: dict[str, Any] | None = None) -> Any:
    """A result of the type that is documented, from WORLD where it says something."""
    if place in WORLD:
        return WORLD[place](*given, **(named or {})) if callable(WORLD[place]) else WORLD[place]
    name = returned.rpartition(".")[2].rpartition("::")[2]
    simple: dict[str, Any] = {"None": None, "bool": True, "int": 3, "str": "text"}
    if name in simple:
        return simple[name]
    return StandIn(getattr(trt, name if hasattr(trt, name) else name.removeprefix("I")))


def _pretend_to_build(config: StandIn) -> None:
    monitor = config.__dict__["own"].get("progress_monitor")
    if monitor is None:
        return
    base = trt.IProgressMonitor
    for name in ("phase_start", "step_complete", "phase_finish"):
        documented = [p[0] for p in _parameters(re.findall(r"\((.*)\) ->", getattr(base, name).__doc__)[0])]
        assert list(inspect.signature(getattr(type(monitor), name)).parameters) == documented, name
    monitor.phase_start("Building", None, 2)
    assert monitor.step_complete("Building", 0) is True
    monitor.phase_finish("Building")


def stand_in() -> types.SimpleNamespace:
    """The module as the builder sees it."""
    names = {name: getattr(trt, name) for name in dir(trt) if not name.startswith("_")}

    def constructor(kind: type) -> Any:
        def make(*given: Any, **named: Any) -> StandIn:
            CALLED.append(kind.__name__)
            made = StandIn(kind)
            called(kind.__name__, vars(kind)["__init__"].__doc__, (made, *given), named)
            made.own["given"] = given
            return made

        return make

    made = {name: constructor(getattr(trt, name)) for name in ("Builder", "OnnxParser", "Runtime")}
    return types.SimpleNamespace(**{**names, **made, "__version__": trt.__version__})


def main(folder: Path, dtype: str, asked: dict[str, Any]) -> None:
    """Build once, and print what happened."""
    WORLD["ITensor.dtype"] = getattr(trt.DataType, dtype)
    WORLD["OnnxParser.parse_from_file"] = asked.pop("readable", True)
    cache = folder / "cache" if asked.pop("with_cache", False) else None
    steps: list[Any] = []
    settings = Settings(**{**asked, "batch": tuple(asked.get("batch", (1, 1, 32))), "cache": cache})
    try:
        report = build(stand_in(), folder / "net.onnx", folder / "net.engine", settings, lambda *s: steps.append(s))
        print(json.dumps({"called": CALLED, "report": report, "steps": steps}))
    except BuildError as error:
        print(json.dumps({"called": CALLED, "error": str(error)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
