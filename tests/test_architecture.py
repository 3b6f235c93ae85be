"""What holds the architecture: imports run in one direction, without cycles, and what is copied stands alone."""

import sys
from pathlib import Path

import pytest
from package_modules import CONVERTERS, CORE, IMPORTS, MODULES, PROFILES, Import

from thinet_deploy.runner import COMPANIONS

# A module may import from its own level and from lower ones. Names are relative to thinet_deploy; a sub-package stands
# for all its modules. The package itself (its __init__, the public API) is above all: nothing inside imports it.
LEVELS = {
    4: {
        "cli",
        "cli_options",
        "cli_build",
        "cli_errors",
        "cli_targets",
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
        "trial",
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
        "torch_worker",
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
        "table",
        "comparison",
        "contract",
        "plots",
        "counting",
        "layer_networks",
        "layer_times",
        "staircase",
        "timers",
        "device_timer",
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
        "turns",
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
