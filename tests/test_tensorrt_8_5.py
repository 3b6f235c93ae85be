"""TensorRT 8.5, of which no bindings can be had: what is used of 8.6's is in the source of 8.5's, and is used alike.

On 8.6's bindings builder and engine class run as they would on 8.5's; what they touch there is compared with what was
read in the source (tensorrt_8_5.py).
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tensorrt_8_5 import LATER, MEMBERS, VALUES
from tensorrt_versions import Version, as_tensorrt, fake_engine, version_of, with_bindings
from tiny_onnx import scored_onnx

from thinet_deploy.on_device import tensorrt_builder, tensorrt_engine

BUILDS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("FLOAT", {}),
    "fp16 with a cache": ("HALF", {"precision": "fp16", "with_cache": True, "workspace_mb": 512}),
    "int8": ("INT8", {"precision": "int8"}),
    "one batch, on a DLA": ("HALF", {"precision": "fp16", "batch": (1, 1, 1), "dla_core": 0}),
    "a file that it cannot read": ("FLOAT", {"readable": False}),
}
ENGINE = """
import json, sys
import numpy as np
from tensorrt_stand_in import CALLED
from thinet_deploy.on_device import engines

engine = engines.open_engine("tensorrt", sys.argv[1], 1, "fp32")
for batch in (1, 3, 70):
    engine.run({"x": np.zeros((batch, 3, 12, 12), "float32")})
engine.describe()
engine.close()
print(json.dumps({"called": CALLED}))
"""
# What 8.6 says of each member: parameters' names from its signature, or whether a property can be set.
SAYS = """
import json, re, sys
from tensorrt_stand_in import _parameters, trt

def of(name):
    owner, _, member = name.partition(".")
    found = vars(getattr(trt, owner))[member or "__init__"]
    if isinstance(found, property):
        return found.fset is not None
    words = re.search(r"\\((.*)\\) ->", found.__doc__).group(1)
    return [each for each, _, _ in _parameters(words)][1:]

print(json.dumps({name: of(name) for name in json.loads(sys.argv[1])}))
"""


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Version:
    """The oldest bindings that can be had."""
    return version_of("8.6", tmp_path_factory.mktemp("libraries"))


def called_by(version: Version, *command: object) -> set[str]:
    done = with_bindings(version, *command)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1])["called"])


@pytest.mark.parametrize("build", BUILDS)
def test_what_the_builder_calls_is_in_8_5(build: str, oldest: Version, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"")
    dtype, settings = BUILDS[build]
    script = Path(__file__).with_name("tensorrt_stand_in.py")
    called = called_by(oldest, script, tmp_path, dtype, json.dumps(settings))
    assert called
    assert called <= set(MEMBERS)


@pytest.mark.parametrize("dla", [False, True])
def test_what_the_engine_class_calls_is_in_8_5(
    dla: bool, oldest: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    engine = tmp_path / "net.engine"
    engine.write_bytes(fake_engine(scored_onnx(tmp_path / "tiny.onnx").read_bytes(), oldest.exact))
    engine.with_suffix(".build.json").write_text('{"dla_core": 1}' if dla else "{}")
    monkeypatch.setenv("PYTHONPATH", str(as_tensorrt(tmp_path / "modules")))
    called = called_by(oldest, "-c", ENGINE, engine)
    assert ("Runtime.DLA_core" in called) == dla
    assert called <= set(MEMBERS)


def test_8_6_takes_the_same_parameters(oldest: Version) -> None:
    """So that the signatures, which the objects above insist on, are those of 8.5 too."""
    done = with_bindings(oldest, "-c", SAYS, json.dumps(list(MEMBERS)))
    assert done.returncode == 0, done.stderr
    said = {name: tuple(each) if isinstance(each, list) else each for name, each in json.loads(done.stdout).items()}
    assert said == MEMBERS


def test_the_names_in_the_module_are_those_of_8_5() -> None:
    text = "".join(inspect.getsource(each) for each in (tensorrt_builder, tensorrt_engine))
    used = set(re.findall(r"\btrt\.([A-Z]\w*(?:\.[A-Z]\w*)*)", text))
    assert {"Builder", "MemoryPoolType.WORKSPACE", "TensorIOMode.INPUT", "ILogger.Severity"} <= used
    known = {*MEMBERS, *VALUES, *(f"{kind}.{value}" for kind, values in VALUES.items() for value in values)}
    assert {name for name in used if name.partition(".")[0] not in LATER} <= known


def test_the_flags_that_8_takes_are_there() -> None:
    """They are looked up by name, so that the test above does not see them."""
    assert {"FP16", "INT8"} <= set(VALUES["BuilderFlag"])
    assert "BF16" not in VALUES["BuilderFlag"], "bf16 is refused there"
    assert "EXPLICIT_BATCH" in VALUES["NetworkDefinitionCreationFlag"]
