"""Compare a wheel with the tree: every file of the three package folders is in it, and nothing else.

python tests/wheel_check.py dist/*.whl
"""

import sys
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
# Folder in the tree → where it is installed.
FOLDERS = {
    "thinet_deploy": "thinet_deploy",
    "converters": "thinet_deploy/converters",
    "profiles": "thinet_deploy/profiles",
}


def files_of_tree() -> set[str]:
    """The paths that a wheel made from this tree has to contain."""
    return {
        f"{installed}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, installed in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def files_of_wheel(wheel: Path) -> set[str]:
    """The paths in a wheel, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    return {name for name in names if not PurePosixPath(name).parts[0].endswith(".dist-info")}


def main(arguments: list[str]) -> int:
    """Print what differs; 0 when nothing does."""
    if len(arguments) != 1:
        print(f"One wheel is needed, not {len(arguments)}.", file=sys.stderr)
        return 2
    expected, found = files_of_tree(), files_of_wheel(Path(arguments[0]))
    for name in sorted(expected - found):
        print(f"missing in the wheel: {name} (see [tool.setuptools] in pyproject.toml)", file=sys.stderr)
    for name in sorted(found - expected):
        print(f"only in the wheel: {name}", file=sys.stderr)
    if expected != found:
        return 1
    print(f"{arguments[0]} holds exactly the {len(found)} files of {', '.join(FOLDERS)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
