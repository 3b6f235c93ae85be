"""reproduce.py, which lies beside every engine: how it was made, and a program that makes it again."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from pprint import pformat

from .artifact import Artifact, write_bytes
from .interfaces import Conversion

SCRIPT = "reproduce.py"
_LOCAL = ("source", "folder", "cache", "calibration")  # places on this machine, which are nobody's business
_TEXT = '''"""Makes {name} again: python {script} SOURCE FOLDER{images}

SOURCE is the file that it was made from ({suffix}), FOLDER an empty folder for the result{with_images}.
Made by {made_by}, with thinet-deploy {version} on Python {python}, {machine}.
"""

import sys
from pathlib import Path

from thinet_deploy import registry
from thinet_deploy.artifact import sha256_of
from thinet_deploy.interfaces import Conversion

RUNTIME = {runtime!r}
SOURCE_SHA256 = {source!r}
ENGINE_SHA256 = {engine!r}
JOB = {job}

if len(sys.argv) != {words}:
    sys.exit(__doc__)
source, folder = Path(sys.argv[1]), Path(sys.argv[2]).absolute()
images = Path(sys.argv[3]) if len(sys.argv) == 4 else None
if sha256_of(source) != SOURCE_SHA256:
    sys.exit(f"{{source}} is not the file that the engine was made from, whose SHA-256 is {{SOURCE_SHA256}}.")
folder.mkdir(parents=True, exist_ok=True)
made = registry.convert(RUNTIME, Conversion(source, folder, calibration=images, **JOB), folder)
same = "the same bytes" if made.sha256 == ENGINE_SHA256 else "other bytes (compare the outputs)"
print(f"{{made.path}}: {{same}}, made by {{made.made_by}}")
'''


def write_script(job: Conversion, artifact: Artifact, engine: Path) -> None:
    """Write reproduce.py into the job's folder.

    Args:
        job: that was done.
        artifact: its result.
        engine: the engine's main file.
    """
    settings = {name: value for name, value in asdict(job).items() if name not in _LOCAL}
    if job.target and job.target.endswith(".toml"):  # a profile of the user's own, which has to lie in the folder again
        settings["target"] = Path(job.target).name
    text = _TEXT.format(
        name=engine.name,
        script=SCRIPT,
        suffix=job.source.suffix,
        made_by=artifact.made_by,
        version=metadata.version("thinet-deploy"),
        python=platform.python_version(),
        machine=platform.machine(),
        runtime=artifact.kind,
        source=artifact.inputs[0],
        engine=artifact.sha256,
        job=pformat(settings),
        images=" IMAGES" if job.calibration else "",
        with_images=f", IMAGES the file {job.calibration.name} of calibration images" if job.calibration else "",
        words=4 if job.calibration else 3,
    )
    write_bytes(job.folder / SCRIPT, text.encode())
