"""Builds in forked children, so that killing one costs no new import of torch: used by test_resume.py.

    python build_server.py LOG      then one JSON request a line; every answer is the child's wait status

A request: "options" of the build; then either "failpoint", as THINET_DEPLOY_FAILPOINT; or "kills", a file with the
renames at which a child of this request's run was killed or that it finished, so that it is killed at the next one; or
"seconds", after which the child is killed wherever it is. "trace" takes the renames' labels.
"""

import itertools
import json
import os
import re
import select
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # a thread pool does not survive a fork

import onnxruntime  # noqa: E402, F401 - loaded before the fork
import openvino  # noqa: E402, F401
import torch  # noqa: E402

from thinet_deploy import artifact, pipeline, store  # noqa: E402
from thinet_deploy.export import check_exportable  # noqa: E402
from thinet_deploy.options import make_options  # noqa: E402
from thinet_deploy.stages import deploy as deploy_stage  # noqa: E402

FAILPOINT = "THINET_DEPLOY_FAILPOINT"


def label(source: Path, target: Path, root: Path) -> str:
    """What a rename is for, without random names: "dense~/report.json", where ~ is a folder in the making."""
    texts = (path.relative_to(root).as_posix() for path in (source, target))
    return " → ".join(
        re.sub(r"\.tmp-[a-z0-9_]{8}\b", "~", re.sub(r"\.tmp-([a-z]+)-[a-z0-9_]{8}", r"\1~", t)) for t in texts
    )


class Renames:
    """Stands around artifact.rename: notes every rename, and arms the fail-point for the next that was not hit yet."""

    def __init__(self, root: Path, trace: Path, kills: Path | None, usual: dict[str, int]) -> None:
        self.root, self.trace, self.kills, self.usual = root, trace, kills, usual
        self.number, self.rename = itertools.count(1), artifact.rename
        seen = [tuple(line.split("\t")) for line in kills.read_text().splitlines()] if kills else []
        self.done = Counter(name for event, name, _ in seen if event == "done")
        self.hit = {(event, name, times) for event, name, times in seen}

    def __call__(self, source: Path, target: Path) -> None:
        number, name = next(self.number), label(source, target, self.root)
        times = self.done[name]
        if self.kills and times < self.usual.get(name, 1):
            for side in ("before", "after"):
                if (side, name, str(times)) not in self.hit:
                    os.environ[FAILPOINT] = f"{number}:{side}"
                    self._note(self.kills, (side, name, times), *[("done", name, times)] * (side == "after"))
                    break
        self.done[name] += 1
        if self.kills and os.environ.get(FAILPOINT, "") != f"{number}:before":
            self._note(self.kills, *[("done", name, times)] * (os.environ.get(FAILPOINT, "") != f"{number}:after"))
        self._note(self.trace, (name,))
        self.rename(source, target)

    @staticmethod
    def _note(file: Path, *lines: tuple[object, ...]) -> None:
        with file.open("a") as stream:
            stream.writelines("\t".join(map(str, line)) + "\n" for line in lines)


def child(request: dict[str, Any]) -> None:
    """The build; never returns."""
    options = make_options(request["options"])
    os.environ[FAILPOINT] = request.get("failpoint", "")
    kills = Path(request["kills"]) if "kills" in request else None
    watch = Renames(options.out, Path(request["trace"]), kills, request.get("usual", {}))
    for module in (artifact, store):
        vars(module)["rename"] = watch
    # What is measured does not matter here, only that it is measured again or kept.
    deploy_stage.ENGINE_SECONDS, deploy_stage.ENGINE_ROUNDS, deploy_stage.TORCH_ROUNDS = 0.01, 1, 7
    pipeline.build(options)
    os._exit(0)


def serve(log: Path) -> None:
    """Answer requests until stdin ends."""
    torch.set_num_threads(1)
    check_exportable(torch.nn.Conv2d(1, 2, 3), (1, 8, 8), opset=20)  # the exporter's own imports take a second
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            try:
                child(request)
            except BaseException:  # noqa: BLE001 - a child must never go on as a second server
                import traceback

                traceback.print_exc()
            os._exit(1)
        if "seconds" in request:
            _kill_later(pid, request["seconds"])
        _, status = os.waitpid(pid, 0)
        print(status, flush=True)


def _kill_later(pid: int, seconds: float) -> None:
    """Kill a child with SIGKILL after a time, unless it ends before."""
    descriptor = os.pidfd_open(pid)
    ended, _, _ = select.select([descriptor], [], [], seconds)
    if not ended:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    os.close(descriptor)
    time.sleep(0)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
