"""The commands themselves: help that teaches, JSON that parses, progress on stderr only, exit codes."""

import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from rich.console import Console

import thinet_deploy.cli.app as commands
from thinet_deploy import environment
from thinet_deploy.cli import targets as cli_targets
from thinet_deploy.cli.progress import bars
from thinet_deploy.options import Options

Cli = Callable[..., Any]
GOOD = ["--data", "data", "--model", "net.py:tiny", "--epochs", "1", "--out", "run"]
COMMANDS = ("build", "prune", "count", "latency", "staircase", "compare", "verify", "targets", "doctor")


def strict_json(text: str) -> Any:
    """Parse one JSON document; NaN and Infinity are none."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


# ---------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_teaches(command: str, flag: str, cli: Cli) -> None:
    done = cli(*command.split(), flag)
    assert done.code == 0
    assert done.err == ""
    usage = f"thinet-deploy {command}".strip()
    text = " ".join(done.out.replace("│", " ").split())
    assert f"Usage: {usage}" in text
    example = text.replace(f"Usage: {usage}", "")
    assert f"{usage} " in example, "an example to copy"


def test_help_of_all_names_the_commands_and_exit_codes(cli: Cli) -> None:
    text = cli("--help").out
    assert [command for command in COMMANDS if f"│ {command} " not in text] == []
    codes = "0 done, 1 a gate failed, a budget is out of reach or a requirement is not met, 2 the input is wrong"
    assert f"Exit codes: {codes}" in " ".join(text.split())


def test_no_command_shows_the_help(cli: Cli) -> None:
    done = cli()
    assert done.code == 2
    assert "Usage: thinet-deploy" in done.out + done.err
    assert "Error" not in done.out + done.err


def test_build_has_every_option(cli: Cli) -> None:
    text = cli("build", "--help").out
    flags = {"--" + name.replace("_", "-") for name in Options.model_fields}
    assert {flag for flag in flags if f" {flag} " not in text} == set()
    for default in ("cpu", "0.5", "20", "thinet-run"):
        assert f"[default: {default}]" in " ".join(text.replace("│", " ").split()), (
            "rich takes [words] in brackets for markup"
        )


# ---------------------------------------------------------------------------------------------- targets, doctor


def test_targets(cli: Cli) -> None:
    done = cli("targets")
    assert (done.code, done.err) == (0, "")
    assert all(name in done.out for name in ("cpu", "jetson", "raspberry-pi-5", "android", "ios", "nvidia-gpu"))
    listed = strict_json(cli("targets", "--json").out)
    assert {"cpu", "jetson"} <= {profile["id"] for profile in listed}


@pytest.mark.parametrize("arguments", [["jetson"], ["jetson", "--json"], ["--json", "jetson"]])
def test_one_target(arguments: list[str], cli: Cli) -> None:
    done = cli("targets", *arguments)
    assert (done.code, done.err) == (0, "")
    profile = strict_json(done.out)
    assert profile["id"] == "jetson"
    assert profile["sources"], "facts come with sources"


def test_an_alias_is_that_target(cli: Cli) -> None:
    assert strict_json(cli("targets", "pi5").out)["id"] == "raspberry-pi-5"


def test_doctor(cli: Cli) -> None:
    done = cli("doctor")
    assert (done.code, done.err) == (0, "")
    assert "torch" in done.out
    checks = strict_json(cli("doctor", "--json").out)
    assert {"name", "status", "found", "advice"} <= set(checks[0])
    assert all(check["advice"] for check in checks if check["status"] == "missing"), "how to get it"


def test_brackets_are_no_markup(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_version", lambda package: None)
    assert 'pip install "thinet-deploy[openvino]"' in cli("doctor").out


@pytest.mark.parametrize("command", ["targets", "doctor"])
def test_a_narrow_terminal_cuts_nothing(command: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_targets, "stdout", lambda: Console(width=80))
    text = cli(command).out
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


# ---------------------------------------------------------------------------------------------- builds


@pytest.mark.usefixtures("quick")
def test_build_prune_and_from(cli: Cli, workplace: Path) -> None:
    """One document on stdout, progress on stderr; a second run says the same from what is kept."""
    done = cli("prune", *GOOD, "--json")
    assert done.code == 0, done.err
    pruned = strict_json(done.out)
    assert pruned["folder"] == "run/thin"
    assert pruned["proof"]["passed"]
    assert "Reading training images: done" in done.err
    assert "done" not in done.out

    done = cli("build", *GOOD, "--finetune-epochs", 1, "--json")
    assert done.code == 0, done.err
    built = strict_json(done.out)
    assert {"run", "bundle", "table", "parity", "notes", "contract"} == set(built)
    assert [row["name"] for row in built["table"]["rows"]] == ["original", "longer", "conv", "gap"]
    assert all(hop["passed"] for hop in built["parity"])
    assert built["contract"] == []
    again = cli("build", *GOOD, "--finetune-epochs", 1, "--json")
    assert strict_json(again.out) == built, "all stages are kept, with their samples"
    assert "Measuring" not in again.err

    text = cli("build", *GOOD, "--finetune-epochs", 1)
    assert "ThiNet-Conv (r=0.5)" in text.out
    assert "Bundle: run/bundle" in text.out
    assert "ThiNet" not in text.err
    thin = strict_json(cli("build", "--from", "run", "--weights", "run/thin/model.safetensors", "--json").out)
    assert [row["name"] for row in thin["table"]["rows"]] == ["original", "own"]

    for output in ("markdown", "csv", "json", "html", "table"):
        shown = cli("compare", "run", "run", "--format", output)
        assert (shown.code, shown.err) == (0, "")
        assert "Original" in shown.out
    assert len(strict_json(cli("compare", "run", "--json").out)) == 1
    checked = cli("verify", "run/bundle", "--json")
    assert (checked.code, strict_json(checked.out)["exit_code"]) == (0, 0)
    (workplace / "run" / "bundle" / "labels.txt").write_text("cat\ndog\n")
    damaged = cli("verify", "run/bundle", "--json")
    assert damaged.code == strict_json(damaged.out)["exit_code"] != 0


def test_a_trainer_of_the_users_own(cli: Cli, workplace: Path) -> None:
    Path("mine.py").write_text("def fit(model, images, epochs):\n    print(len(images), epochs)\n")
    done = cli("prune", *GOOD, "--trainer", "mine.py:fit")
    assert done.code == 0, done.err
    Path("mine.py").write_text("def fit(model, images):\n    raise ValueError('diverged')\n")
    done = cli("prune", *GOOD, "--trainer", "mine.py:fit", "--out", "other")
    assert done.code == 2
    assert "mine.py:fit failed in Training the original: ValueError: diverged" in done.err
    assert {path.name for path in Path("other").iterdir() if not path.name.startswith(".")} <= {
        "run.json",
        "options.json",
        "logs",
    }
    assert "ValueError: diverged" in Path("other/logs/trainer.log").read_text()


def test_what_the_users_code_prints_does_not_spoil_the_document(cli: Cli, workplace: Path) -> None:
    Path("mine.py").write_text("print('loading')\ndef fit(model, images):\n    print('epoch 1')\n")
    done = cli("prune", *GOOD, "--trainer", "mine.py:fit", "--json")
    assert strict_json(done.out)["folder"] == "run/thin"
    assert "epoch 1" in done.err


def test_config_and_command_line(cli: Cli, workplace: Path) -> None:
    """The command line wins over the file."""
    Path("c.toml").write_text("keep = 0.9\nepochs = 0\ninput-shape = '3x16x16'\nout = 'sub/run'\n")
    done = cli("prune", "--config", "c.toml", "--data", "data", "--model", "net.py:tiny", "--keep", "0.25", "--json")
    assert done.code == 0, done.err
    report = strict_json(done.out)
    assert report["folder"] == "sub/run/thin"
    assert [(layer["before"], layer["after"]) for layer in report["layers"]] == [(4, 1)]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_for_each_finished_stage_and_bars_for_those_in_flight(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(commands, "_ERR", Console(file=screen, force_terminal=terminal, width=80, color_system=None))
    with bars(commands._ERR) as report:
        for _ in range(2):  # the same stage again starts anew
            for done in range(400):
                report("Training", done, 400, f"epoch {done}/400, loss [1]" if done else "")
            time.sleep(0.2)
            report("Training", 400, 400, "loss [0]")
        report("Reading", 7, 7)
        report("Measuring", 1, 3)
    lines = screen.getvalue().replace("\r", "\n").split("\n")
    finished = [line.rstrip() for line in lines if "done" in line]
    assert [line.removeprefix("\x1b[2K") for line in finished] == [
        *["Training: done (loss [0])"] * 2,
        "Reading: done",
    ]
    assert ("left" in screen.getvalue()) == terminal
    if terminal:
        assert "epoch 399/400, loss [1]" in screen.getvalue()
        assert "Training" not in lines[-1] + lines[-2]


# ---------------------------------------------------------------------------------------------- as a process


def test_progress_and_results_go_different_ways(workplace: Path) -> None:
    command = [sys.executable, "-m", "thinet_deploy", "prune", *GOOD, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert strict_json(done.stdout)["folder"] == "run/thin"
    assert "Reading training images: done" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr, "no colours where nobody sees them"


def test_interrupted(workplace: Path) -> None:
    """Ctrl-C ends with 130 and says how to go on."""
    Path("mine.py").write_text(
        "import pathlib, time\ndef fit(model, images):\n    pathlib.Path('started').touch()\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "thinet_deploy", "prune", *GOOD, "--trainer", "mine.py:fit"]
    child = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        cwd=workplace,
        start_new_session=True,
        # A shell starts what runs in the background with Ctrl-C ignored, and children inherit that.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    deadline = time.monotonic() + 120
    while not Path("started").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "Interrupted. Run the same command again to go on" in err
    assert "Traceback" not in err
    assert list(Path("run").glob(".tmp-*")) == []


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m thinet_deploy targets --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "["
    assert "Traceback" not in done.stderr
