"""The modules of the installed package and what they import: the same tests check the checkout and the wheel."""

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CORE = "thinet_deploy"
CONVERTERS = f"{CORE}.converters"
PROFILES = f"{CORE}.profiles"


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
