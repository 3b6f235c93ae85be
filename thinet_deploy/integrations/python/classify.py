"""Classifies images with an engine of this bundle. Needs Python 3.8, numpy, Pillow and the engine's runtime.

    python app/python/classify.py photo.jpg     the three likeliest classes
    python app/python/classify.py check         is an image preprocessed as in training?

In an app: `classifier = Classifier("path/of/the/bundle")`, then `classifier.classify(Image.open("photo.jpg"))`.
Engines are opened by engines.py of the bundle, which knows every runtime that it ships engines for.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

# The numbers that Pillow has for them; their names lie elsewhere in old versions, such as those of JetPack.
FILTERS = {"bilinear": 2, "bicubic": 3}


class Classifier:
    """An engine of a bundle, from images to classes.

    Args:
        bundle: its folder.
        runtime: whose engine; the first one that is installed here where none is named.
        threads: of the processor that one image may use.
    """

    def __init__(self, bundle: str, runtime: str = "", threads: int = 1) -> None:
        self.bundle = Path(bundle)
        self.manifest = json.loads((self.bundle / "manifest.json").read_text(encoding="utf-8"))
        self.how = self.manifest["preprocess"]
        self.labels = self.manifest["labels"]
        self.engine = self._open(runtime, threads)

    def _open(self, runtime: str, threads: int) -> Any:
        engines, errors = (_of_bundle(self.bundle, name) for name in ("engines", "engine"))
        reasons = []
        for entry in self.manifest["engines"]:
            if runtime in ("", entry["runtime"]):
                path = str(self.bundle / entry["path"])
                try:
                    return engines.open_engine(entry["runtime"], path, threads, entry["precision"])
                except errors.RunnerError as error:
                    reasons.append(str(error))
        raise SystemExit(" ".join(["No engine of this bundle can run here.", *reasons]))

    def classify(self, image: Image.Image) -> list[tuple[str, float]]:
        """The classes with their probabilities, the likeliest first."""
        outputs = self.engine.run({self.manifest["inputs"][0]["name"]: preprocess(image, self.how)[None]})
        scores = outputs[self.manifest["outputs"][0]["name"]][0].astype("float64")
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        return [(self.labels[index], float(shares[index])) for index in np.argsort(-shares, kind="stable")]


def preprocess(image: Image.Image, how: dict[str, Any]) -> Any:
    """From an image to the network's input, float32 (channels, height, width), as in training.

    Args:
        image: in any of Pillow's modes with 8 or 16 bits.
        how: the content of preprocess.json.

    Raises:
        ValueError: nothing says which value of its pixels is white.
    """
    image = _eight_bits(image).convert("L" if how["colour"] == "GRAY" else "RGB")
    shorter = how["resize"] if isinstance(how["resize"], int) else 0
    height, width = (shorter, shorter) if shorter else how["resize"]
    size = (width, height)
    if shorter:
        image = _less_long(image)
        scale = shorter / min(image.size)
        size = (max(shorter, round(image.width * scale)), max(shorter, round(image.height * scale)))
    pixels = np.asarray(image.resize(size, FILTERS[how["interpolation"]]))
    pixels = _middle(_middle(pixels.reshape(size[1], size[0], -1), height, width), *how["crop"])
    if how["colour"] == "BGR":
        pixels = pixels[..., ::-1]
    values = pixels.astype(np.float32) / (255.0 if how["range"] == "0..1" else 1.0)
    normal = (values - np.array(how["mean"], np.float32)) / np.array(how["std"], np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1))


def _less_long(image: Image.Image) -> Image.Image:
    """The middle of a very long image, of which no more than a square is used."""
    limit = 8 * min(image.size)
    left, top = max(0, image.width - limit) // 2, max(0, image.height - limit) // 2
    return image.crop((left, top, image.width - left, image.height - top))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Sixteen bits per pixel scaled to eight; Pillow's own conversion would cut off all above 255."""
    if image.mode not in ("F", "I") and not image.mode.startswith("I;16"):
        return image
    wide = np.asarray(image).astype(np.int64)
    bits = max(getattr(image, "tag_v2", {}).get(258, (16,)))  # BitsPerSample of TIFF
    if image.mode == "F" or bits > 16 or wide.min() < 0 or wide.max() > 65535:
        raise ValueError("its pixels are of more than 16 bits, and nothing says which value is white")
    return Image.fromarray(((wide + 128) // 257).astype(np.uint8))


def _middle(pixels: Any, height: int, width: int) -> Any:
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def _of_bundle(bundle: Path, name: str) -> ModuleType:
    """NAME.py of the bundle; the folder becomes a package, so that no file in it stands in for another module."""
    package = ModuleType(f"bundle_{hash(str(bundle.resolve())):x}".replace("-", "_"))
    package.__path__ = [str(bundle)]
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"{package.__name__}.{name}")


def check(bundle: Path) -> int:
    """Compare the golden picture's input with what training makes of it; the exit code."""
    how = json.loads((bundle / "preprocess.json").read_text(encoding="utf-8"))
    golden = bundle / "app" / "golden"
    with Image.open(golden / "picture.ppm") as image:
        got = preprocess(image, how).ravel()
    expected = np.fromfile(golden / "picture.f32", "<f4")
    differ = int((got != expected).sum()) if got.size == expected.size else got.size
    print(f"{'FAILED' if differ else 'passed'}  preprocessing: {differ} of {got.size} values differ")
    return int(differ > 0)


def main(arguments: list[str]) -> int:
    """The command line."""
    bundle = Path(__file__).resolve().parents[2]
    if arguments == ["check"]:
        return check(bundle)
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    classifier = Classifier(str(bundle))
    try:
        with Image.open(arguments[0]) as image:
            found = classifier.classify(image)[:3]
    except (OSError, ValueError) as error:
        raise SystemExit(f"{arguments[0]} cannot be read as an image: {error}") from error
    for label, share in found:
        print(f"{100 * share:6.2f} %  {label}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
