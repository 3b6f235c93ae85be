"""What holds the architecture: import direction, cycles, laziness, the public API, file sizes, docstrings.

Everything is read from the installed package, so that the same tests check the checkout and the wheel.
"""

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import thinet_deploy
from thinet_deploy.runner import COMPANIONS

CORE = "thinet_deploy"
CONVERTERS = f"{CORE}.converters"
PROFILES = f"{CORE}.profiles"

# A module may import from its own level and from lower ones. Names are relative to thinet_deploy; a sub-package stands
# for all its modules. The package itself (its __init__, the public API) is above all: nothing inside imports it.
LEVELS = {
    4: {
        "cli",
        "cli_options",
        "cli_processes",
        "cli_progress",
        "cli_tables",
        "cli_scatter",
        "cli_count",
        "cli_compare",
        "cli_device",
        "cli_latency",
        "cli_staircase",
        "__main__",
    },
    3: {
        "pipeline",
        "deployment",
        "device_stage",
        "android_stage",
        "networks",
        "stages",
        "build_table",
        "parity_stage",
        "bundle_stage",
        "deploy_stage",
        "prune_stage",
        "gcos_stage",
        "transfer",
        "transfer_stage",
        "precision_stage",
        "feasibility_stage",
        "latency_stage",
        "staircase_stage",
        "tools",
        "job",
    },
    2: {
        "pruning",
        "precision",
        "training",
        "norms",
        "ledger",
        "export",
        "registry",
        "verify",
        "latency",
        "torch_latency",
        "torch_modes",
        "things",
        "bundle",
        "apps",
        "device_site",
        "android_site",
        "report",
        "hops",
        "html_report",
        "report_plots",
        "comparison",
        "contract",
        "plots",
        "counting",
        "layer_networks",
        "layer_times",
        "staircase",
    },
    1: {
        "artifact",
        "store",
        "seeds",
        "environment",
        "target",
        "data",
        "crops",
        "voc",
        "voc_boxes",
        "voc_masks",
        "tasks",
        "detections",
        "image_files",
        "device",
        "devices",
        "ssh",
        "adb",
        "distillation",
        "intervals",
        "surfaces",
        "isolation",
        "parallel",
        "preprocess",
        "program",
        "reproduce",
        "tensorrt_builder",
        "models",
        "on_device",
        "runner",
        "cuda",
        "engine",
        "engines",
        "runner_text",
        "samples",
        "self_test",
        "sensors",
        "serving",
        "tensorrt_engine",
        "options",
        "shared_run",
    },
    0: {"errors", "interfaces"},
}
TOP_LEVEL = 5
# What a converter may know of the core; nothing in the core names a converter (the registry finds them by name).
# Two of them are shared by several converters: how a program is read, how TensorRT builds.
FOR_CONVERTERS = {
    f"{CORE}.{name}" for name in ("interfaces", "artifact", "target", "errors", "program", "tensorrt_builder")
}
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
# A table of networks with what is expected of each is read row by row.
MAX_LINES_OF_A_TEST = 550


@dataclass(frozen=True)
class Import:
    """One import of a module."""

    target: str  # a module of the package, or the first name of a foreign one
    line: int
    in_function: bool


def _modules() -> dict[str, Path]:
    """Every module of the package: dotted name → file."""
    modules = {}
    for package in (CORE, CONVERTERS, PROFILES):
        spec = importlib.util.find_spec(package)
        assert spec is not None, package
        assert spec.origin is not None, package
        folder = Path(spec.origin).parent
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            if parts[0] in {"assets", "converters", "integrations", "profiles"}:  # data, or with a turn of their own
                continue
            modules[".".join((package, *parts)).removesuffix(".__init__")] = file
    return modules


MODULES = _modules()
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _statements(node: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """All import statements that run, and whether they do so only when a function is called."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, in_function
        elif isinstance(child, ast.If) and _is_type_checking(child.test):
            for other in child.orelse:
                yield from _statements(other, in_function)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _statements(child, in_function or inside)


def _targets(module: str, statement: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The full dotted names that a statement imports from; of `from a import b` a.b where that is a module."""
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names)
        return
    base = statement.module or ""
    if statement.level:
        package = module.split(".") if _is_package(module) else module.split(".")[:-1]
        parents = package[: len(package) - statement.level + 1]
        base = ".".join([*parents, base] if base else parents)
    for alias in statement.names:
        full = f"{base}.{alias.name}"
        yield full if full in MODULES else base


def _is_package(module: str) -> bool:
    return MODULES[module].name == "__init__.py"


def _imports(module: str) -> list[Import]:
    """The imports of a module; packages that are run on the way to a target count as imported too."""
    found = []
    for statement, in_function in _statements(TREES[module]):
        for target in _targets(module, statement):
            if target.split(".")[0] != CORE:
                found.append(Import(target.split(".")[0], statement.lineno, in_function))
                continue
            parts = target.split(".")
            reached = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
            # A package that holds the importing module is being imported anyway.
            passed = [name for name in reached[:-1] if not f"{module}.".startswith(f"{name}.")]
            found += [Import(name, statement.lineno, in_function) for name in [*passed, reached[-1]] if name != module]
    return found


IMPORTS = {module: _imports(module) for module in MODULES}


def _level(module: str) -> int | None:
    """The declared level of a core module; None when it has none."""
    if module == CORE:
        return TOP_LEVEL
    first = module.split(".")[1]
    return next((level for level, names in LEVELS.items() if first in names), None)


def _is_core(module: str) -> bool:
    return not f"{module}.".startswith((f"{CONVERTERS}.", f"{PROFILES}."))


def _at(module: str, found: Import) -> str:
    return f"{MODULES[module].name}:{found.line} imports {found.target}"


def test_every_core_module_has_a_level() -> None:
    without = sorted(module for module in MODULES if _is_core(module) and _level(module) is None)
    assert not without, f"Decide where these belong, and add them to LEVELS in {Path(__file__).name}: {without}"


def test_imports_of_our_own_modules_exist() -> None:
    missing = [
        _at(module, found)
        for module, imports in IMPORTS.items()
        for found in imports
        if found.target.split(".")[0] == CORE and found.target not in MODULES
    ]
    assert not missing


def test_imports_run_down_or_along_a_level() -> None:
    upward = []
    for module in filter(_is_core, MODULES):
        for found in IMPORTS[module]:
            if found.target not in MODULES or not _is_core(found.target):
                continue
            own, other = _level(module), _level(found.target)
            if own is not None and other is not None and other > own:
                upward.append(f"{_at(module, found)} (level {own} → {other})")
    assert not upward


def test_no_import_cycles() -> None:
    graph = {m: sorted({found.target for found in IMPORTS[m] if found.target in MODULES}) for m in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "import cycle: " + " → ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for target in graph[module]:
            visit(target, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_the_core_imports_no_converter() -> None:
    direct = [
        _at(module, found)
        for module in filter(_is_core, MODULES)
        for found in IMPORTS[module]
        if f"{found.target}.".startswith(f"{CONVERTERS}.")
    ]
    assert not direct, "the core reaches converters by name, through registry.py"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith(CONVERTERS)))
def test_converters_know_little_and_load_late(module: str) -> None:
    known = FOR_CONVERTERS | {CONVERTERS}
    ours = [_at(module, found) for found in IMPORTS[module] if found.target in MODULES and found.target not in known]
    assert not ours, f"a converter may import from {sorted(FOR_CONVERTERS)} only"
    light = sys.stdlib_module_names | {"numpy", CORE}
    heavy = [
        _at(module, found)
        for found in IMPORTS[module]
        if not found.in_function and found.target.split(".")[0] not in light
    ]
    assert not heavy, "a converter imports its runtime inside the function that needs it"


@pytest.mark.parametrize("name", ["runner", *COMPANIONS, "tensorrt_builder", "on_device", "detections"])
def test_what_runs_on_devices_stands_alone(name: str) -> None:
    """It is copied to devices and runs there without this package; only run.py has files beside it."""
    beside = {f"{CORE}.{each}" for each in COMPANIONS} if name in ("runner", *COMPANIONS) else set()
    ours = {found.target for found in IMPORTS[f"{CORE}.{name}"] if found.target.startswith(f"{CORE}.")}
    assert not ours - beside
    early = {found.target for found in IMPORTS[f"{CORE}.{name}"] if not found.in_function}
    assert early - beside <= sys.stdlib_module_names | {"numpy"}


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
    if f"{CORE}.cli" not in MODULES:
        pytest.skip("cli.py is not there yet")
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
    assert f"{CORE}" in loaded
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
