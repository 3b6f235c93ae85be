"""A folder of images of all kinds, and how they are read."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from thinet_deploy.data.dataset import ImageSet
from thinet_deploy.data.preprocess import Augment, Preprocess

PREPROCESS = Preprocess(
    resize=12, crop=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), augment=Augment(mirror=True, pad=1)
)


def write_folder(root: Path) -> Path:
    """Every file format and pixel mode, in two classes; val/ has other pixels than train/."""
    for split, offset in (("train", 0), ("val", 7)):
        for label, name in enumerate(("first", "second")):
            place = root / split / name
            place.mkdir(parents=True)
            ramp = np.add.outer(np.arange(14), np.arange(0, 180, 9)) + 40 * label + offset
            grey = Image.fromarray(ramp.astype(np.uint8))
            grey.convert("RGB").save(place / "a.jpg")
            grey.convert("RGB").save(place / "b.PNG")
            grey.save(place / "c.png")
            grey.convert("RGBA").save(place / "d.png")
            grey.convert("P").save(place / "e.png")
            Image.fromarray(ramp.astype(np.uint16) * 257).save(place / "f.png")
            Image.fromarray(ramp.astype(np.uint16) * 257).save(place / "g.tif")
            grey.convert("CMYK").save(place / "h.jpeg")
            grey.save(place / "i.pgm")
            grey.save(place / "j.bmp")
            grey.save(place / "k.webp", lossless=True)
            (place / "notes.txt").write_text("no image")
    return root


def everything(images: ImageSet) -> NDArray[np.float32]:
    """The inputs that all images make."""
    return images.inputs(np.arange(len(images)))
