"""What a user's file runs: itself and the user's own modules that it imports, at whatever depth."""

from __future__ import annotations

import ast
import importlib.util
import site
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from ..artifact import sha256_of

_OURS = __name__.partition(".")[0]


def sources(file: Path) -> dict[str, str]:
    """SHA-256 of a user's file and of what it imports that is no installed package, by path.

    What lies beside it (beside a link to it), and what else of the user's own is on the import path: a folder in
    PYTHONPATH, a package that is installed for editing. Paths are from the folder that the import starts at.
    """
    folder = file.parent.resolve()
    left, seen, found = [(folder, folder / file.name)], set[Path](), dict[str, str]()
    elsewhere: dict[str, list[Path]] = {}
    while left:
        root, path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        name = path.relative_to(root).as_posix()
        found[name] = found.get(name, "") + sha256_of(path)  # two folders may have one of the same name
        for module in dict.fromkeys(_imported(path, root)):
            if (top := module[0]) not in elsewhere:
                elsewhere[top] = list(_elsewhere(top))
            for place in dict.fromkeys((folder, root, *elsewhere[top])):
                left += [(place, each) for each in _files_of(place, module)]
    return found


def _imported(path: Path, folder: Path) -> Iterator[tuple[str, ...]]:
    """The modules that a file's import statements name, as parts; names that are imported from them too."""
    package = path.relative_to(folder).parent.parts
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # loading it says so
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = (*above, *(node.module or "").split(".")) if node.module else above
            yield from ((*base, alias.name) for alias in node.names)


def _elsewhere(name: str) -> Iterator[Path]:
    """The folders on the import path that have a module, unless it is an installed package or ours."""
    if name == _OURS:
        return
    spec = None
    with suppress(Exception):  # of whoever finds modules here
        spec = importlib.util.find_spec(name)
    places = [*(getattr(spec, "submodule_search_locations", None) or [getattr(spec, "origin", None)])]
    for path in (Path(each).absolute() for each in places if isinstance(each, str)):
        if path.exists() and not any(path.resolve().is_relative_to(each) for each in _installed()):
            yield path.parent


@cache
def _installed() -> tuple[Path, ...]:
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return tuple(Path(each).resolve() for each in (*places, *site.getsitepackages(), site.getusersitepackages()))


def _files_of(folder: Path, module: tuple[str, ...]) -> Iterator[Path]:
    """The files in a folder that importing a module runs: its packages' and its own."""
    for end in range(1, len(module) + 1):
        place = folder.joinpath(*module[:end])
        yield from (path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file())
