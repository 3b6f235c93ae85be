"""The way to a device: what --device may be, and that no name or path becomes part of a command."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ssh_bundles import wait_for

from thinet_deploy.devices import site
from thinet_deploy.devices.address import find_device
from thinet_deploy.devices.device import Local, json_lines
from thinet_deploy.devices.ssh import Ssh
from thinet_deploy.errors import DeviceError, InputError
from thinet_deploy.on_device import agent

WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
NAMES = st.text("ab'\"$(){};|&<>*? \\\n~#!-é", min_size=1, max_size=12).filter(lambda name: name not in {".", ".."})


@pytest.mark.parametrize(
    ("address", "device"),
    [
        ("ssh://orin", Ssh("orin")),
        ("ssh://me@orin.local:2222", Ssh("orin.local", "me", 2222)),
        ("ssh://me@192.168.55.1/", Ssh("192.168.55.1", "me")),
        ("ssh://me@[fe80::1]:22", Ssh("fe80::1", "me", 22)),
    ],
)
def test_addresses(address: str, device: Ssh) -> None:
    assert find_device(address) == device
    assert device.name == address.removesuffix("/")


@pytest.mark.parametrize(
    "address",
    [
        *("orin", "ssh://", "ssh://me@", "ssh://orin:0", "ssh://orin:99999", "ssh://orin/home", "adb"),
        *(
            "ssh://-oProxyCommand=id",
            "ssh://-l@orin",
            "ssh://me:secret@orin",
            "ssh://o$(id)",
            "ssh://o;id",
            "ssh://a b",
        ),
        *("ssh://me@-F", "ssh://o\nid", "ssh://`id`@orin", "SSH://orin"),
    ],
)
def test_what_is_no_address_is_refused_before_ssh_is_called(address: str) -> None:
    with pytest.raises(InputError, match="but ssh://user@host:port or adb:SERIAL was expected") as stop:
        find_device(address)
    assert stop.value.exit_code == 2


@settings(deadline=None)  # a process each: how long that takes is the machine's affair
@given(st.lists(WORDS, min_size=1, max_size=4))
def test_a_remote_shell_gets_back_the_words_that_were_given(words: list[str]) -> None:
    *_, mark, host, line = Ssh("orin", "me", 22).argv(words)
    assert (mark, host) == ("--", "orin")
    assert shlex.split(line) == words
    shown = subprocess.run(["sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    assert shown.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1] == words


def test_host_keys_are_left_to_the_user() -> None:
    words = " ".join(Ssh("orin").argv(["true"]))
    assert "StrictHostKeyChecking" not in words
    assert "UserKnownHostsFile" not in words
    assert "BatchMode=yes" in words


@settings(deadline=None)
@given(NAMES, st.binary(max_size=300))
def test_files_of_any_name_go_there_and_come_back(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: bytes
) -> None:
    folder, device = tmp_path_factory.mktemp("files"), Local()
    (folder / "source").write_bytes(data)
    device.push(folder / "source", f"{folder}/{name}/{name}")
    assert (folder / name / name).read_bytes() == data
    device.pull(f"{folder}/{name}/{name}", folder / "back" / "copy")
    assert (folder / "back" / "copy").read_bytes() == data
    assert len(list(folder.rglob("*"))) == 5, "nothing else was made"


def test_half_a_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that ends in the midst of a file looks to `cat` like the end of the file."""
    source, target = tmp_path / "source", tmp_path / "there" / "file"
    source.write_bytes(b"x" * 1000)
    argv = Local.argv

    def of_the_whole(self: Local, command: list[str]) -> list[str]:
        return [*argv(self, command)[:-1], "2000"]

    monkeypatch.setattr(Local, "argv", of_the_whole)
    with pytest.raises(DeviceError, match="came only in part"):
        Local().push(source, str(target))
    assert not target.exists()


def test_what_cannot_be_written_or_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(DeviceError, match="could not be written there"):
        Local().push(tmp_path / "file", f"{tmp_path}/file/below")
    with pytest.raises(DeviceError, match=r"could not be read there.*No such file"):
        Local().pull(f"{tmp_path}/none", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


# ------------------------------------------------------------------------------------------ on the device


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of other tests are those of another machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def ask(*words: object) -> tuple[list[str], dict[str, object]]:
    done = subprocess.run(
        [sys.executable, agent.__file__, *map(str, words)], capture_output=True, text=True, check=True
    )
    *lines, answer = done.stdout.strip().splitlines()
    return [line for line in lines if line], json.loads(answer)


def test_a_job_is_done_once_and_its_output_is_there_for_everyone_who_asks(tmp_path: Path) -> None:
    place, marker = tmp_path / "jobs" / "one", tmp_path / "marker"
    command = ["sh", "-c", f"echo started >> {marker}; sleep 0.5; echo ready"]
    first, second = (
        subprocess.Popen([sys.executable, agent.__file__, "job", str(place), "", *command], stdout=subprocess.PIPE)
        for _ in range(2)
    )
    said = [process.communicate()[0].decode().split("\n")[0] for process in (first, second)]
    assert said == ["ready", "ready"]
    assert ask("job", place, "", *command)[0] == ["ready"]
    assert marker.read_text() == "started\n"
    ask("forget", place)
    ask("job", place, "", *command)
    assert marker.read_text() == "started\n" * 2


@pytest.mark.parametrize("damage", ["emptied", "removed", "log of sums lost"])
def test_a_job_whose_work_was_damaged_is_done_again(tmp_path: Path, damage: str) -> None:
    place, made, marker = tmp_path / "jobs" / "one", tmp_path / "made", tmp_path / "marker"
    command = ["sh", "-c", f"echo started >> {marker}; mkdir -p {made}; echo engine > {made}/engine"]
    ask("job", place, made, *command)
    ask("job", place, made, *command)
    assert marker.read_text() == "started\n", "what is whole is kept"
    if damage == "emptied":
        (made / "engine").write_bytes(b"")
    elif damage == "removed":
        shutil.rmtree(made)
    else:
        (place / "made").write_bytes(b"")
    assert ask("job", place, made, *command)[1]["code"] == 0
    assert marker.read_text() == "started\n" * 2
    assert (made / "engine").read_text() == "engine\n"


def test_only_a_job_that_has_ended_is_forgotten(tmp_path: Path) -> None:
    place, end = tmp_path / "jobs" / "long", tmp_path / "end"
    command = ["sh", "-c", f"echo $$; until [ -e {end} ]; do sleep 0.05; done"]
    first = subprocess.Popen([sys.executable, agent.__file__, "job", str(place), "", *command], stdout=subprocess.PIPE)
    assert first.stdout is not None
    number = first.stdout.readline().decode().strip()
    ask("forget", place)
    end.touch()
    assert ask("job", place, "", *command)[0] == [number]
    first.communicate()
    ask("forget", place)
    assert ask("job", place, "", *command)[0] != [number]
    ask("forget", tmp_path / "jobs" / "none")


def test_what_an_ended_job_said_is_forgotten_once_all_who_follow_it_have_read_it(tmp_path: Path) -> None:
    place, end = tmp_path / "jobs" / "read", tmp_path / "end"
    command = ["sh", "-c", f"echo $$; until [ -e {end} ]; do sleep 0.05; done"]
    words = [sys.executable, agent.__file__]
    reader = subprocess.Popen([*words, "job", str(place), "", *command], stdout=subprocess.PIPE)
    assert reader.stdout is not None
    number = reader.stdout.readline()
    os.kill(reader.pid, signal.SIGSTOP)
    end.touch()
    wait_for((place / "code").exists)
    other = subprocess.Popen([*words, "forget", str(place)], stdout=subprocess.DEVNULL)
    time.sleep(0.5)
    assert other.poll() is None, "it waits"
    os.kill(reader.pid, signal.SIGCONT)
    assert json.loads(reader.communicate()[0].splitlines()[-1])["code"] == 0
    assert other.wait() == 0
    assert ask("job", place, "", *command)[0] != [number.decode().strip()]


def test_jobs_run_one_at_a_time_and_say_for_whom_they_wait(tmp_path: Path) -> None:
    end, marker = tmp_path / "end", tmp_path / "marker"
    long = f"echo first >> {marker}; until [ -e {end} ]; do sleep 0.05; done; echo ended >> {marker}; echo $$"
    words = [sys.executable, agent.__file__, "job"]
    first = subprocess.Popen([*words, str(tmp_path / "a" / "latency-1"), "", "sh", "-c", long], stdout=subprocess.PIPE)
    wait_for(marker.exists)
    place, command = str(tmp_path / "b" / "verify-2"), ["sh", "-c", f"echo second >> {marker}; echo done"]
    second = subprocess.Popen([*words, place, "", *command], stdout=subprocess.PIPE)
    assert second.stdout is not None
    (told,) = json_lines(second.stdout.readline())
    end.touch()
    number = first.communicate()[0].split()[0].decode()
    assert told == {"progress": [0, 1, f"waits for latency-1, process {number} there"]}
    assert second.communicate()[0].startswith(b"done\n")
    assert marker.read_text().split() == ["first", "ended", "second"]
    with Path(place, "out").open("rb") as out:
        assert out.readlines()[-1] == b"done\n"


def test_a_job_that_failed_is_tried_again(tmp_path: Path) -> None:
    command = ["sh", "-c", f"echo no >&2; test -e {tmp_path}/there"]
    _, answer = ask("job", tmp_path / "jobs" / "a", "", *command)
    assert (answer["code"], answer["err"]) == (1, "no")
    (tmp_path / "there").touch()
    assert ask("job", tmp_path / "jobs" / "a", "", *command)[1]["code"] == 0


def test_a_job_outlives_who_started_it(tmp_path: Path) -> None:
    place = tmp_path / "jobs" / "long"
    command = ["sh", "-c", "echo begun; sleep 1; echo ended"]
    first = subprocess.Popen([sys.executable, agent.__file__, "job", str(place), "", *command], stdout=subprocess.PIPE)
    assert first.stdout is not None
    assert first.stdout.readline() == b"begun\n"
    first.kill()
    first.communicate()
    assert ask("job", place, "", *command)[0] == ["begun", "ended"]


def test_sums_leave_out_what_came_in_part(tmp_path: Path) -> None:
    (tmp_path / "a'b $(c)").write_bytes(b"1")
    (tmp_path / "half.partial").write_bytes(b"2")
    assert ask("sums", tmp_path)[1] == {"a'b $(c)": agent.sha256_of(tmp_path / "a'b $(c)")}
    assert ask("sums", tmp_path / "none")[1] == {}


def test_nothing_in_a_home_folder_stands_in_for_the_standard_library(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('not me')")
    request = json.dumps({"modules": [], "files": [], "commands": []})
    done = subprocess.run(
        [sys.executable, "-", "look", request],
        input=Path(agent.__file__).read_bytes(),
        cwd=tmp_path,
        capture_output=True,
        check=True,
        env={**os.environ, "XDG_CACHE_HOME": ""},
    )
    assert json.loads(done.stdout)["root"] == str(Path.home() / ".cache" / "thinet-deploy")


def test_a_program_that_hangs_is_not_waited_for() -> None:
    start = time.monotonic()
    assert agent.run(["sleep", "60"], 0.1) == ""
    assert time.monotonic() - start < 30


def test_a_python_with_a_relative_path_runs_jobs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    machine = site.reach(Local(), os.path.relpath(sys.executable))
    assert Path(machine.facts["executable"]).is_absolute()
    (tmp_path / "hello.py").write_text("print('hello')")
    place = site.Site(machine, str(tmp_path / "place"))
    Local().push(site.SCRIPT, f"{place.folder}/agent.py")
    code, done = place.job("greet", [str(tmp_path / "hello.py")])
    assert (code, done.out.strip()) == (0, b"hello")


def test_a_log_ends_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "err").write_text("chatter\n" * 400_000 + "the reason\n")
    assert agent.last_words(tmp_path / "err").endswith("the reason")
    assert agent.last_words(tmp_path / "none") == ""


def test_of_a_line_that_was_cut_off_nothing_is_made() -> None:
    text = b'noise\n{"progress": [1, 2, "half"]}\n{"progress": [2, 2, "wh'
    assert list(json_lines(text)) == [{"progress": [1, 2, "half"]}]
