"""The code blocks of README.md run.

A bash block runs when `<!-- test -->` stands on the line before it, every python block does unless
`<!-- no test: reason -->` stands there; `<!-- slow test -->` marks a block of either kind as slow. All blocks run in
one empty folder, in the order of the text, so that a later block can use what an earlier one made.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
TIMEOUT_S = 600
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A code block of the README."""

    line: int
    language: str
    mark: str
    code: str


def _blocks(text: str) -> list[Block]:
    return [
        Block(text[: match.start("code")].count("\n"), match["language"], match["mark"] or "", match["code"])
        for match in BLOCK.finditer(text)
    ]


def _parameters() -> list[object]:
    if not README.exists():
        return [pytest.param(None, marks=pytest.mark.skip(reason="README.md is not beside the tests"))]
    parameters: list[object] = []
    for block in _blocks(README.read_text(encoding="utf-8")):
        wanted = block.mark in {"test", "slow test"} or (block.language == "python" and "no test" not in block.mark)
        if block.language not in {"bash", "python"} or not wanted:
            continue
        marks = [pytest.mark.slow] if block.mark == "slow test" else []
        parameters.append(pytest.param(block, id=f"{block.language}-line-{block.line}", marks=marks))
    return parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("block", _parameters())
def test_block_runs(block: Block, folder: Path) -> None:
    command = {"bash": ["bash", "-euo", "pipefail"], "python": [sys.executable, "-I"]}[block.language]
    binaries = Path(sys.executable).parent
    done = subprocess.run(
        [*command, "-c", block.code],
        cwd=folder,
        env={**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"README.md, line {block.line}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def test_marks_are_understood() -> None:
    """A mistyped mark would leave a block untested in silence."""
    if not README.exists():
        pytest.skip("README.md is not beside the tests")
    known = re.compile(r"|test|slow test|no test: .+")
    assert [block for block in _blocks(README.read_text(encoding="utf-8")) if not known.fullmatch(block.mark)] == []


def test_blocks_are_found() -> None:
    text = "Text\n\n<!-- test -->\n```bash\nls\n```\n\n```python\nx = 1\n\ny = 2\n```\n"
    assert _blocks(text) == [Block(4, "bash", "test", "ls\n"), Block(8, "python", "", "x = 1\n\ny = 2\n")]
