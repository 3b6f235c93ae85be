"""What is loaded when, the public API, file sizes, docstrings."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from package_modules import CORE, MODULES, TREES

import thinet_deploy

# Neither `import thinet_deploy` nor --help may load one of these.
HEAVY = {
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "ncnn",
    "coremltools",
    "executorch",
    "litert_torch",
    "scipy",
    "sklearn",
    "torchvision",
    "timm",
    "matplotlib",
    "torchmetrics",
    "pycocotools",
}
MAX_LINES = 400
# What all tests of a device need stands before the first of them.
MAX_LINES_OF_A_TEST = 500


def _loaded_by(code: str) -> set[str]:
    """First names of all modules that are loaded when `code` has run in a new interpreter."""
    report = "\nimport json, sys\nprint('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    # -I: neither the current folder nor PYTHONPATH, so that the installed package is what gets imported.
    done = subprocess.run([sys.executable, "-I", "-c", code + report], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_loads_nothing_heavy() -> None:
    loaded = _loaded_by("import thinet_deploy")
    assert CORE in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"], ["targets"]], ids=" ".join)
def test_the_command_line_loads_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["thinet-deploy", *{arguments!r}]
from thinet_deploy.cli import main
try:
    code = main()
except SystemExit as end:
    code = end.code
assert not code, code
"""
    loaded = _loaded_by(code)
    assert CORE in loaded
    assert not loaded & HEAVY


def test_public_api_is_pinned() -> None:
    """A change of the public API is meant: it changes public_api.txt and CHANGELOG.md too."""
    pinned = (Path(__file__).parent / "public_api.txt").read_text(encoding="utf-8").split()
    assert pinned == sorted(pinned), "public_api.txt is sorted"
    assert sorted(thinet_deploy.__all__) == pinned
    for name in pinned:
        assert getattr(thinet_deploy, name) is not None, name


def _written_files() -> list[Path]:
    """Modules of the package, and the tests beside this one."""
    return [*MODULES.values(), *Path(__file__).parent.glob("*.py")]


def _most_lines(file: Path) -> int:
    return MAX_LINES_OF_A_TEST if file.name.startswith("test_") else MAX_LINES


def test_files_are_short() -> None:
    lengths = {str(file): len(file.read_text(encoding="utf-8").splitlines()) for file in _written_files()}
    allowed = {file: _most_lines(Path(file)) for file in lengths}
    assert {file: length for file, length in lengths.items() if length > allowed[file]} == {}


def _public_without_docstring(module: str, node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[str]:
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        overload = any(ast.unparse(decorator).endswith("overload") for decorator in child.decorator_list)
        if ast.get_docstring(child) is None and not overload:
            yield f"{module}.{prefix}{child.name}"
        if isinstance(child, ast.ClassDef):
            yield from _public_without_docstring(module, child, f"{prefix}{child.name}.")


def test_everything_public_has_a_docstring() -> None:
    without = [module for module in MODULES if ast.get_docstring(TREES[module]) is None]
    for module, tree in TREES.items():
        without += _public_without_docstring(module, tree)
    assert not without
