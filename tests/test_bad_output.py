"""Places that cannot be written, disks that are full, and folders that are not what a command takes: one message,
exit code 2, and what was there stays as it was."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from thinet_deploy.artifact import sha256_of, write_json
from thinet_deploy.intervals import Interval
from thinet_deploy.reports.table import Row, Table, Time
from thinet_deploy.store import Run

Cli = Callable[..., Any]
GOOD = ["--data", "data", "--model", "net.py:tiny", "--epochs", "1"]


def refused(cli: Cli, *arguments: object) -> str:
    """The message, which is on stdout as JSON too."""
    done = cli(*arguments, "--json")
    assert done.code == 2, done
    said = json.loads(done.out)
    assert said["exit_code"] == 2
    text = f"{said['error']}\n{said['hint']}".rstrip("\n")
    assert done.err.endswith(f"Error: {text}\n")
    assert done.err.count("Error:") == 1
    return str(text)


# ---------------------------------------------------------------------------------------------- --out


def foreign_folder() -> str:
    Path("out").mkdir()
    Path("out/thesis.doc").write_text("ten years of work")
    return "out"


def foreign_run_json() -> str:
    """Other tools call a file run.json as well."""
    write_json(Path("out/run.json"), {"id": "wandb-1"})
    return "out"


def newer_run() -> str:
    write_json(Path("out/run.json"), {"format": "thinet-deploy/run-2", "version": 2})
    return "out"


def dangling_link() -> str:
    Path("out").symlink_to("/proc/nonexistent/deep")
    return "out"


OUT: dict[str, tuple[Callable[[], str], tuple[str, ...]]] = {
    "a file": (lambda: "net.py", ("net.py is a file, but a folder was expected",)),
    "inside a file": (lambda: "net.py/run", ("net.py/run cannot be written: Not a directory",)),
    "no such place": (lambda: "/proc/nonexistent/run", ("/proc/nonexistent/run cannot be written", "--out")),
    "dangling link": (dangling_link, ("out cannot be written",)),
    "name too long": (lambda: "x" * 300, ("cannot be written: File name too long",)),
    "foreign": (foreign_folder, ("out is not empty and is no run of thinet-deploy", "thesis.doc", "--out")),
    "foreign run.json": (foreign_run_json, ("out is no run of thinet-deploy",)),
    "other format": (newer_run, ("out is no run of thinet-deploy",)),
}


@pytest.mark.parametrize("command", ["build", "prune"])
@pytest.mark.parametrize(("prepare", "words"), OUT.values(), ids=OUT.keys())
def test_a_place_that_cannot_be_written(
    prepare: Callable[[], str], words: tuple[str, ...], command: str, cli: Cli, workplace: Path
) -> None:
    out = prepare()
    before = sha256_of(workplace)
    text = refused(cli, command, *GOOD, "--out", out)
    assert [word for word in words if word not in text] == [], text
    assert sha256_of(workplace) == before


def test_bad_input_leaves_a_finished_run_as_it_was(cli: Cli, workplace: Path) -> None:
    assert cli("prune", *GOOD, "--out", "run").code == 0
    before = sha256_of(workplace / "run")
    (workplace / "w.pth").write_text("no weights")
    for wrong in (
        "--keep 2",
        "--data nowhere",
        "--weights w.pth",
        "--model vgg61",
        "--preset thin",
        "--model net.py:x",
    ):
        refused(cli, "build", *GOOD, "--out", "run", *wrong.split())
    refused(cli, "build", "--from", "run", "--weights", "gone.pth")
    refused(cli, "build", "--from", "run", "--weights", "w.pth")
    assert sha256_of(workplace / "run") == before


FROM = {
    "no weights": ("--from run", "--from takes --weights"),
    "more options": ("--from run --weights w.pth --keep 0.3", "--from takes --weights"),
    "no weights file": ("--from run --weights w.pth", "There is no weights file w.pth"),
    "no run": ("--from data --weights net.py", "data is no run of thinet-deploy"),
    "nowhere": ("--from gone --weights net.py", "gone is no run of thinet-deploy"),
    "not pruned": ("--from empty --weights net.py", "Prune first"),
}


@pytest.mark.parametrize(("arguments", "words"), FROM.values(), ids=FROM.keys())
def test_from(arguments: str, words: str, cli: Cli, workplace: Path) -> None:
    Run(workplace / "empty")
    assert words in refused(cli, "build", *arguments.split())
    assert not (workplace / "run").exists()


# ---------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(workplace: Path) -> Iterator[Path]:
    """A disk of 16 MB of its own, at workplace/disk."""
    disk = workplace / "disk"
    disk.mkdir()
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def leave(disk: Path, free: int) -> None:
    """Fill the disk up to `free` bytes."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    room = os.statvfs(disk)
    filler.write_bytes(b"\0" * max(0, room.f_bavail * room.f_frsize - free))


def whole_stages(run: Path) -> set[str]:
    """Names of the finished stages, after a check that none is half."""
    records = {path.stem: json.loads(path.read_text()) for path in (run / ".records").glob("*.json")}
    for name, record in records.items():
        files = [path for path in (run / name).rglob("*") if path.is_file()]
        assert {path.relative_to(run / name).as_posix(): sha256_of(path) for path in files} == record["files"], name
    return set(records)


@pytest.mark.usefixtures("quick")
def test_a_full_disk(cli: Cli, workplace: Path, small_disk: Path) -> None:
    """With a little more room each time, a build gets a little further, and in the end it is done."""
    command = ["build", *GOOD, "--finetune-epochs", 1, "--out", small_disk / "run"]
    reached, full = set[str](), 0
    for free in range(0, 8 << 20, 32 << 10):
        leave(small_disk, free)
        done = cli(*command)
        if done.code == 0:
            break
        full += 1
        assert done.code == 2, done
        assert "The disk is full" in done.err, done.err
        assert "run the same command again" in done.err
        assert [path.name for path in small_disk.rglob(".tmp-*")] == []
        stages = whole_stages(small_disk / "run")
        assert stages >= reached, "what was finished is kept"
        reached = stages
    else:
        pytest.fail("8 MB were not enough")
    assert full >= 4, "the disk has to be full at several places for this test to mean something"
    assert whole_stages(small_disk / "run") >= {"dense", "prune", "onnx", "engines", "bundle", "report"}
    assert cli("compare", small_disk / "run").code == 0
    assert cli("verify", small_disk / "run" / "bundle").code == 0


# ---------------------------------------------------------------------------------------------- compare, verify


def write_run(root: Path, machine: str = "a", threads: int = 1) -> Path:
    """A finished run with an invented table."""
    time = Time(1.0, 0.9, 1.1)
    row = Row("original", "Original", {"top-1": Interval(90, 40, 99)}, 1000, 2000, time, time, {"openvino": time}, 4096)
    where = (machine, f"Processor {machine}", threads)
    table = Table("cpu", "tiny", "photos", 6, *where, 2, 32, ("openvino",), (row,), ())
    Run(root)
    write_json(root / "report" / "table.json", table.to_json())
    return root


def test_compare(cli: Cli, workplace: Path) -> None:
    for name in "abc":
        write_run(workplace / name, machine=name.replace("b", "a"))
    assert cli("compare", "a", "b").code == 0
    text = refused(cli, "compare", "a", "b", "c")
    assert "different machines: Processor a (a), Processor c (c)" in text
    assert "--across-machines" in text
    done = cli("compare", "a", "c", "--across-machines", "--json")
    assert done.code == 0
    assert [table["machine"] for table in json.loads(done.out)] == ["a", "c"]
    write_run(workplace / "threads", machine="a", threads=8)
    text = refused(cli, "compare", "a", "threads")
    assert "different numbers of threads: 1 (and 2 in torch), 8 (and 2 in torch)" in text
    assert cli("compare", "a", "threads", "--baseline", "a", "--across-machines").code == 0


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("gone", "gone is no run of thinet-deploy"),
        ("data", "data is no run of thinet-deploy"),
        ("net.py", "net.py is no run of thinet-deploy"),
        ("unfinished", "unfinished has no table yet"),
        ("damaged", "damaged/report/table.json is damaged"),
        ("other", "other/report/table.json is damaged, or of another version: 'rows'"),
    ],
)
def test_compare_what_is_no_finished_run(run: str, words: str, cli: Cli, workplace: Path) -> None:
    Run(workplace / "unfinished")
    (write_run(workplace / "damaged") / "report" / "table.json").write_text("{")
    write_json(write_run(workplace / "other") / "report" / "table.json", {"runtimes": []})
    assert words in refused(cli, "compare", write_run(workplace / "good"), run)


@pytest.mark.parametrize("bundle", ["gone", "data", "net.py", "empty"])
def test_verify_what_is_no_bundle(bundle: str, cli: Cli, workplace: Path) -> None:
    (workplace / "empty").mkdir()
    text = refused(cli, "verify", bundle)
    assert f"{bundle} is no bundle: it has no manifest.json." in text
