"""What holds the architecture: imports run in one direction, without cycles, and what is copied stands alone."""

import sys
from pathlib import Path

import pytest
from package_modules import CONVERTERS, CORE, IMPORTS, MODULES, PROFILES, Import

from thinet_deploy.on_device.runner import COMPANIONS

ON_DEVICE = f"{CORE}.on_device"

# Folders and modules of the package from the top down: each may import from itself and from what stands below it.
# The package itself (its __init__, the public API) is above all: nothing inside imports it.
ORDER = (
    *("__main__", "cli", "pipeline", "stages"),
    *("reports", "devices", "timing", "verify", "export", "precision", "pruning", "norms", "training"),
    *("registry", "bundle", "apps", "shared_run", "store", "models", "data", "environment", "reproduce", "target"),
    *("isolation", "program", "parallel", "tasks", "options", "artifact", "on_device"),
    *("counting", "intervals", "seeds", "interfaces", "errors"),
)
# What a converter may know of the core; nothing in the core names a converter (the registry finds them by name).
# Two of them are shared by several converters: how a program is read, how TensorRT builds.
FOR_CONVERTERS = {
    f"{CORE}.{name}"
    for name in ("interfaces", "artifact", "target", "errors", "program", "on_device", "on_device.tensorrt_builder")
}


def _place(module: str) -> int:
    """In ORDER, 0 at the top; -1 for the package itself."""
    return -1 if module == CORE else ORDER.index(module.split(".")[1])


def _is_core(module: str) -> bool:
    return not f"{module}.".startswith((f"{CONVERTERS}.", f"{PROFILES}."))


def _at(module: str, found: Import) -> str:
    return f"{MODULES[module].name}:{found.line} imports {found.target}"


def test_every_core_module_has_a_place() -> None:
    names = {module.split(".")[1] for module in MODULES if _is_core(module) and module != CORE}
    assert names == set(ORDER), f"Decide where these belong in ORDER in {Path(__file__).name}"


def test_imports_of_our_own_modules_exist() -> None:
    missing = [
        _at(module, found)
        for module, imports in IMPORTS.items()
        for found in imports
        if found.target.split(".")[0] == CORE and found.target not in MODULES
    ]
    assert not missing


def test_imports_run_down() -> None:
    upward = [
        _at(module, found)
        for module in filter(_is_core, MODULES)
        for found in IMPORTS[module]
        if found.target in MODULES and _is_core(found.target) and _place(found.target) < _place(module)
    ]
    assert not upward, f"see ORDER in {Path(__file__).name}"


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


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith(f"{ON_DEVICE}.")))
def test_what_runs_on_devices_stands_alone(module: str) -> None:
    """It is copied to devices and runs there without this package; only run.py has files beside it."""
    with_companions = {f"{ON_DEVICE}.{name}" for name in ("runner", *COMPANIONS)}
    beside = with_companions if module in with_companions else set()
    ours = {found.target for found in IMPORTS[module] if found.target.startswith(f"{CORE}.")}
    assert not ours - beside
    early = {found.target for found in IMPORTS[module] if not found.in_function}
    assert early - beside <= sys.stdlib_module_names | {"numpy"}
