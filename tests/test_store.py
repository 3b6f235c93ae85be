"""store.py and artifact.py: stages are whole or absent, and made anew exactly when they have to be."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from thinet_deploy.artifact import sha256_of, write_bytes
from thinet_deploy.errors import OutputError
from thinet_deploy.shared_run import SharedRun
from thinet_deploy.store import Checkpoint, Run, Stage, open_run

HOLDS = """
import sys
from pathlib import Path
from thinet_deploy.store import Run
with Run(Path(sys.argv[1])).locked():
    print("in")
"""
WRITES = """
import sys
from pathlib import Path
from thinet_deploy.artifact import write_bytes
write_bytes(Path(sys.argv[1]), b"new")
"""
Make = Callable[[Path, Checkpoint], None]


def writes(**files: str) -> Make:
    """A stage that writes files; a double underscore stands for a folder."""

    def make(folder: Path, _: Checkpoint) -> None:
        for name, text in files.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    return make


def refuses(folder: Path, _: Checkpoint) -> None:
    (folder / "half").write_text("half")
    raise ValueError("in the middle of it")


def never(folder: Path, _: Checkpoint) -> None:
    raise AssertionError("this stage should have been reused")


def visible(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


# ---------------------------------------------------------------------------------------------- stages


def test_a_stage_is_made_once(run: Run) -> None:
    made = run.stage("one", {"a": 1}, writes(x="x", sub__y="y"))
    assert not made.reused
    assert visible(made.folder) == {"x", "sub/y"}
    again = Run(run.root).stage("one", {"a": 1}, never)
    assert again.reused
    assert (again.folder, again.digest) == (made.folder, made.digest)


def test_changed_inputs_make_it_anew_and_replace_it_as_a_whole(run: Run) -> None:
    before = run.stage("one", {"a": 1}, writes(x="x", old="old"))
    after = run.stage("one", {"a": 2}, writes(x="other"))
    assert not after.reused
    assert after.digest != before.digest
    assert visible(after.folder) == {"x"}
    assert not run.stage("one", {"a": 1}, writes(x="x")).reused, "only the last result is kept"


def test_stages_with_equal_inputs_are_told_apart(run: Run) -> None:
    assert run.stage("one", {}, writes(x="1")).digest != run.stage("two", {}, writes(x="2")).digest


@pytest.mark.parametrize("damage", ["deleted", "modified", "folder", "record", "no record"])
def test_damage_makes_a_stage_anew(run: Run, damage: str) -> None:
    stage = run.stage("one", {}, writes(x="x", sub__y="y"))
    record = run.root / ".records" / "one.json"
    if damage == "deleted":
        (stage.folder / "x").unlink()
    elif damage == "modified":
        (stage.folder / "sub" / "y").write_text("Y")
    elif damage == "folder":
        stage.folder.rename(run.root / "elsewhere")
    elif damage == "record":
        record.write_text(record.read_text()[:-20])
    else:
        record.unlink()
    again = run.stage("one", {}, writes(x="x", sub__y="y"))
    assert not again.reused
    assert again.digest == stage.digest
    assert visible(again.folder) == {"x", "sub/y"}


def test_what_depends_on_a_stage_depends_on_what_that_depends_on(run: Run) -> None:
    """Equal files do not make equal stages: the code that reads them may be another."""
    before = run.stage("one", {"code": 1}, writes(x="x"))
    after = run.stage("one", {"code": 2}, writes(x="x"))
    assert after.digest != before.digest


def test_files_of_others_stay(run: Run) -> None:
    stage = run.stage("one", {"a": 1}, writes(x="x"))
    (stage.folder / "sub").mkdir()
    (stage.folder / "sub" / "mine.pt").write_text("days of training")
    assert run.stage("one", {"a": 1}, never).digest == stage.digest
    cached = stage.folder / "__pycache__" / "x.pyc"
    cached.parent.mkdir()
    cached.write_text("bytecode")
    other = run.stage("one", {"a": 2}, writes(x="y"))
    assert visible(other.folder) == {"x"}
    assert visible(run.root / "one.old1") == {"x", "sub/mine.pt", "__pycache__/x.pyc"}
    (other.folder / "notes").write_text("mine")
    run.discard("one")
    assert visible(run.root / "one.old2") == {"x", "notes"}
    run.stage("one", {"a": 3}, writes(x="z"))
    cached.parent.mkdir()
    cached.write_text("bytecode")
    run.stage("one", {"a": 4}, writes(x="z"))
    assert not (run.root / "one.old3").exists(), "bytecode is nobody's work"


def test_a_stage_is_kept_whatever_it_was_made_from_but_not_damaged(run: Run) -> None:
    stage = run.stage("one", {"a": 1}, writes(x="x"))
    found = run.kept("one")
    assert found is not None
    assert (found.folder, found.digest) == (stage.folder, stage.digest)
    (stage.folder / "x").write_text("y")
    assert run.kept("one") is None
    assert run.kept("two") is None


def test_an_exception_leaves_no_folder_and_the_stage_can_be_made_later(run: Run) -> None:
    before = visible(run.root)
    with pytest.raises(ValueError, match="in the middle"):
        run.stage("one", {}, refuses)
    assert visible(run.root) == before
    assert [path.name for path in run.root.iterdir() if path.name.startswith(".tmp-")] == []
    assert not run.stage("one", {}, writes(x="x")).reused


def test_an_exception_keeps_the_earlier_result(run: Run) -> None:
    run.stage("one", {"a": 1}, writes(x="x"))
    with pytest.raises(ValueError, match="in the middle"):
        run.stage("one", {"a": 2}, refuses)
    assert run.stage("one", {"a": 1}, never).reused


def test_a_full_disk_is_named(run: Run) -> None:
    def make(folder: Path, _: Checkpoint) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="disk is full"):
        run.stage("one", {}, make)
    assert not (run.root / "one").exists()


def test_a_discarded_stage_is_gone(run: Run) -> None:
    run.stage("one", {}, writes(x="x"))
    run.discard("one")
    run.discard("one")
    assert not (run.root / "one").exists()
    assert not run.stage("one", {}, writes(x="x")).reused


# ---------------------------------------------------------------------------------------------- the folder


def test_leftovers_of_a_kill_are_cleared(run: Run) -> None:
    stage = run.stage("one", {}, writes(x="x"))
    for name in (".tmp-one-abc/.tmp-inner", ".tmp-one-abc/sub/file", ".tmp-one-abc-old/x", "one/.tmp-xyz"):
        (run.root / name).parent.mkdir(parents=True, exist_ok=True)
        (run.root / name).write_text("half")
    with run.locked():
        assert [path for path in run.root.rglob("*") if ".tmp-" in path.as_posix()] == []
        assert run.stage("one", {}, never).digest == stage.digest


def test_a_run_inside_a_run_is_left_alone(run: Run) -> None:
    def make(folder: Path, _: Checkpoint) -> None:
        with run.locked():
            (folder / "x").write_text("x")

    inner = Run(run.root / "inner")
    assert visible(inner.stage("one", {}, make).folder) == {"x"}


def test_a_second_process_is_refused_while_the_first_works(run: Run) -> None:
    command = [sys.executable, "-c", HOLDS, str(run.root)]
    (run.root / ".tmp-mine").write_text("work in progress")
    with run.locked():
        (run.root / ".tmp-mine").write_text("work in progress")
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode != 0
        assert "OutputError: Another thinet-deploy works in" in second.stderr
        assert (run.root / ".tmp-mine").exists(), "the second process must not clear the first one's work"
    assert subprocess.run(command, capture_output=True, text=True, check=False).stdout == "in\n"


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"not empty and is no run .*thesis\.txt"):
        Run(tmp_path)
    assert visible(tmp_path) == {"thesis.txt"}
    with pytest.raises(OutputError, match="is no run"):
        open_run(tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        Run(tmp_path / "thesis.txt")


def test_a_folder_whose_making_was_killed_is_taken(tmp_path: Path) -> None:
    (tmp_path / ".tmp-run.json").write_text("{")
    with Run(tmp_path).locked():
        assert open_run(tmp_path) == tmp_path
    assert visible(tmp_path) == {"run.json", ".lock"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            Run(tmp_path / "run")
    finally:
        tmp_path.chmod(0o700)


# ---------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensors = {
        "half": torch.arange(3).half(),
        "scalar": torch.tensor(5),
        "not contiguous": torch.arange(6.0).view(2, 3).t(),
        "nan": torch.tensor([float("nan"), float("-inf")]),
    }
    checkpoint = Checkpoint(tmp_path / "sub" / "c.safetensors", "key")
    assert checkpoint.load() is None
    checkpoint.save({"old": torch.zeros(1)}, {"epochs": 1})
    checkpoint.save(tensors, {"epochs": 2, "plan": {"ŵ": [1, 2]}})
    loaded = checkpoint.load()
    assert loaded is not None
    assert loaded[1] == {"epochs": 2, "plan": {"ŵ": [1, 2]}}
    assert set(loaded[0]) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[0][name].dtype == tensor.dtype
        assert torch.equal(loaded[0][name].nan_to_num(), tensor.nan_to_num())


def test_a_checkpoint_of_other_inputs_or_damaged_is_ignored(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    path = tmp_path / "c.safetensors"
    Checkpoint(path, "key").save({"x": torch.ones(100)}, {})
    assert Checkpoint(path, "other").load() is None
    whole = path.read_bytes()
    for damaged in (b"", whole[:4], whole[:-1], b"\xff" * 8 + whole[8:], whole[:8] + b"[" + whole[9:]):
        path.write_bytes(damaged)
        assert Checkpoint(path, "key").load() is None
    path.write_bytes(whole)
    assert Checkpoint(path, "key").load() is not None


def test_a_failed_stage_keeps_its_checkpoint_and_a_finished_one_does_not(run: Run) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    seen: list[object] = []

    def make(folder: Path, checkpoint: Checkpoint) -> None:
        seen.append(loaded[1] if (loaded := checkpoint.load()) else None)
        if len(seen) < 3:
            checkpoint.save({"x": torch.ones(1)}, {"steps": len(seen)})
            raise ValueError("killed")

    for _ in range(2):
        with pytest.raises(ValueError, match="killed"):
            run.stage("one", {}, make)
    run.stage("one", {}, make)
    assert seen == [None, {"steps": 1}, {"steps": 2}]
    assert list((run.root / ".partial").iterdir()) == []


# ---------------------------------------------------------------------------------------------- one file


@pytest.mark.parametrize(("side", "expected"), [("before", b"old"), ("after", b"new")])
def test_a_kill_leaves_the_old_or_the_new_file(tmp_path: Path, side: str, expected: bytes) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    environment = {**os.environ, "THINET_DEPLOY_FAILPOINT": f"1:{side}"}
    killed = subprocess.run([sys.executable, "-c", WRITES, str(path)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == expected
    write_bytes(path, b"newest")
    assert path.read_bytes() == b"newest"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="disk is full"):
        write_bytes(path, b"new")
    assert visible(tmp_path) == {"file"}
    assert path.read_bytes() == b"old"


def test_the_hash_of_a_folder_depends_on_names_and_contents(tmp_path: Path) -> None:
    def digest(**files: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        writes(**files)(folder, Checkpoint(folder, ""))
        return sha256_of(folder)

    assert digest(a="1", b__c="2") == digest(b__c="2", a="1")
    assert len({digest(a="1"), digest(b="1"), digest(a="2"), digest(a="1", b="1"), digest(b__a="1")}) == 5


def test_what_is_kept_from_before_is_told_before_the_next_work_and_at_the_end(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []

    def work(last: int) -> None:
        told.clear()
        run = SharedRun(tmp_path / "run", lambda stage, done, total, note="": told.append((stage, note)))
        with run.locked():
            for name, inputs in (("dense", {}), ("prune", {}), ("conv", {"last": last})):
                run.stage(name, inputs, lambda *_, name=name: told.append(("made", name)))
            run.alone("report", {}, lambda *_: told.append(("made", "report")))

    work(last=0)
    assert told == [("made", name) for name in ("dense", "prune", "conv", "report")]
    work(last=1)
    assert told == [("Taking from before", "dense, prune"), ("made", "conv"), ("Taking from before", "report")]
    work(last=1)
    assert told == [("Taking from before", "dense, prune, conv, report")]


def test_a_stage_that_the_world_spoiled_is_made_anew(tmp_path: Path) -> None:
    run, made = SharedRun(tmp_path / "run"), list[str]()

    def measure(folder: Path, _: Checkpoint) -> None:
        made.append("hot" if not made else "cool")
        (folder / "state").write_text(made[-1])

    def cool(stage: Stage) -> bool:
        return (stage.folder / "state").read_text() == "cool"

    with run.locked():
        found = [run.alone("latency", {}, measure, cool).reused for _ in range(3)]
    assert (found, made) == ([False, False, True], ["hot", "cool"])
