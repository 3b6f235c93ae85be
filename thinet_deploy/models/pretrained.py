"""Trained weights by name (`--weights default`): torchvision's, trained on ImageNet, downloaded once."""

from __future__ import annotations

import importlib
from pathlib import Path, PurePosixPath

import torch

from ..errors import MissingError, WeightsError, first_line
from ..interfaces import Progress, silent

# Ours → torchvision's name for the same network with the same parameter names.
NETWORKS = {
    "vgg16": "vgg16",
    "vgg16_bn": "vgg16_bn",
    "alexnet-owt": "alexnet",
    "squeezenet1_0": "squeezenet1_0",
    "squeezenet1_1": "squeezenet1_1",
    "resnet50": "resnet50",
}
# The first version of each: what all of these have, and trained with the preprocessing that is usual here (256, 224).
VERSION = "IMAGENET1K_V1"


def default_weights(model: str, progress: Progress = silent) -> Path:
    """The file with a network's trained weights for 1,000 classes, downloaded if it is not there.

    Args:
        model: its name.
        progress: told of the download.

    Raises:
        WeightsError: torchvision has no weights for it.
        MissingError: torchvision is not installed or does not run, or the file cannot be downloaded.
    """
    if model not in NETWORKS:
        raise WeightsError(
            f"There are no default weights for {model}: torchvision has none of this very network.",
            hint=f"It has them for {', '.join(NETWORKS)}. Give a file of your own with --weights FILE, or none at all "
            "to train the network here.",
        )
    return download(_url(NETWORKS[model]), Path(torch.hub.get_dir()) / "checkpoints", progress)


def _url(name: str) -> str:
    try:
        models = importlib.import_module("torchvision.models")
    except ModuleNotFoundError as error:
        raise MissingError(
            "--weights default needs torchvision, which knows where the weights are.",
            hint=f"Install the release that goes with torch {torch.__version__}: pip install torchvision. Or give a "
            "file: --weights FILE.",
        ) from error
    except Exception as error:  # of another build than torch, it raises what its compiled part raises
        raise MissingError(
            f"torchvision does not run beside torch {torch.__version__}: {first_line(error)}",
            hint="Install the release and build that go with this torch: see pytorch.org/get-started. Or give a file: "
            "--weights FILE.",
        ) from error
    return str(models.get_model_weights(name)[VERSION].url)


def download(url: str, folder: Path, progress: Progress = silent) -> Path:
    """The file of a URL in a folder; it gets its name when it is whole and its checksum, part of the name, is right.

    Raises:
        MissingError: it cannot be had.
    """
    path = folder / PurePosixPath(url).name
    if path.is_file():
        return path
    progress(f"Downloading {path.name}", 0, 1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2], progress=False)
    except (OSError, RuntimeError) as error:  # no network, a full disk; a wrong checksum
        raise MissingError(
            f"{url} could not be downloaded: {first_line(error)}",
            hint=f"Try again with a network, or put the file at {path} by other means, or give one: --weights FILE.",
        ) from error
    progress(f"Downloading {path.name}", 1, 1)
    return path
