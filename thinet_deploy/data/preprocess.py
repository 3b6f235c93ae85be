"""Preprocessing as data: it goes with the model, into the plan and the bundle."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import DataError, UnknownNameError

_EXAMPLE = "Such as: resize = 256, crop = [224, 224]; also colour, range, mean, std, interpolation, augment."
_WHITE = 65_535  # of 16 bits
_TIFF_BITS = 258  # the tag of the bits of each channel
_INTERPOLATION = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Placing(NamedTuple):
    """How an image comes onto the canvas; all in pixels.

    Attributes:
        part: of the image that is used: left, top, right, bottom.
        size: width and height that it is resized to.
        corner: left and top of the canvas in that.
    """

    part: tuple[int, int, int, int]
    size: tuple[int, int]
    corner: tuple[int, int]


class Augment(BaseModel):
    """What training may do to an image, beyond the random crop out of the resized image.

    Attributes:
        mirror: flip left and right at random; wrong for digits and text.
        pad: zeros added on every side before the random crop, in pixels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mirror: bool = True
    pad: int = Field(default=0, ge=0)


class Preprocess(BaseModel):
    """From an image file to the network's input; the same in training, calibration and on the device.

    An image is converted to `colour`, resized, centre-cropped, scaled to `range`, and normalised:
    (value - mean) / std per channel, in the order of `colour`.

    Attributes:
        colour: channel order of the network's input; GRAY has one channel.
        range: the values before mean and std are applied, 0..1 or 0..255.
        mean: per channel, in units of `range`.
        std: per channel, in units of `range`.
        resize: one number: the shorter side (the papers' "keep"); two: height and width ("fixed"). Pixels.
        crop: height and width of the network's input, cut from the centre. Pixels.
        interpolation: how to resize.
        augment: what training may do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    colour: Literal["RGB", "BGR", "GRAY"] = "RGB"
    range: Literal["0..1", "0..255"] = "0..1"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resize: int | tuple[int, int]
    crop: tuple[int, int]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    augment: Augment = Augment()

    @model_validator(mode="after")
    def _consistent(self) -> Preprocess:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need {self.channels} values for colour {self.colour}")
        if min(self.std) <= 0 or min(self.crop) < 1 or min(self.canvas) < 1:
            raise ValueError("std, resize and crop must be positive")
        if self.canvas[0] < self.crop[0] or self.canvas[1] < self.crop[1]:
            raise ValueError(f"crop {self.crop} is larger than the resized image {self.canvas}")
        return self

    @property
    def channels(self) -> int:
        """Channels of the network's input."""
        return 1 if self.colour == "GRAY" else 3

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of the resized image from which crops are cut, in pixels."""
        return (self.resize, self.resize) if isinstance(self.resize, int) else self.resize

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the network's input."""
        return (self.channels, *self.crop)

    def read(self, image: Image.Image) -> NDArray[np.uint8]:
        """Decode, convert and resize one image; the middle `canvas` of it.

        Returns:
            uint8 of shape (height, width, channels), in the order of `colour`.

        Raises:
            DataError: its pixels have more than 16 bits, so that nobody knows which value is white.
        """
        image = _eight_bits(image).convert("L" if self.colour == "GRAY" else "RGB")
        pixels = self._placed(image, _INTERPOLATION[self.interpolation])
        pixels = pixels.reshape(*self.canvas, self.channels)
        return pixels[..., ::-1] if self.colour == "BGR" else pixels

    def read_classes(self, image: Image.Image) -> NDArray[np.uint8]:
        """A map of class indices, such as a mask, placed as `read` places the image; nothing in between is made up.

        Returns:
            uint8 of shape (height, width).
        """
        return self._placed(image, Image.Resampling.NEAREST)

    def _placed(self, image: Image.Image, how: Image.Resampling) -> NDArray[np.uint8]:
        part, size, (left, top) = self.placing(image.size)
        if part != (0, 0, *image.size):
            image = image.crop(part)
        if image.size != size:
            image = image.resize(size, how)
        height, width = self.canvas
        return np.asarray(image, dtype=np.uint8)[top : top + height, left : left + width]

    def placing(self, size: tuple[int, int]) -> Placing:
        """Where an image of this width and height comes to lie on the canvas."""
        height, width = self.canvas
        if not isinstance(self.resize, int):
            return Placing((0, 0, *size), (width, height), (0, 0))
        part = _less_long(size)
        used = (part[2] - part[0], part[3] - part[1])
        scale = self.resize / min(used)
        grown = (max(width, round(used[0] * scale)), max(height, round(used[1] * scale)))
        return Placing(part, grown, ((grown[0] - width) // 2, (grown[1] - height) // 2))

    def centre_crop(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Cut the network's input from the centre of images (n, height, width, channels)."""
        return _centre(images, *self.crop)

    def normalise(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Scale and normalise crops (n, height, width, channels) into float32 (n, channels, height, width)."""
        scaled = images.astype(np.float32) / (255.0 if self.range == "0..1" else 1.0)
        normal = (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        # A copy always: with one channel the channels-last strides would pass for contiguous, and torch goes by them.
        return normal.astype(np.float32).transpose(0, 3, 1, 2).copy(order="C")


def check_depth(image: Image.Image) -> None:
    """Raise DataError for pixels of more than 16 bits, as far as that can be told without decoding them."""
    if image.mode == "F":
        raise _too_deep("are floating-point numbers", image.mode)
    # Pillow gives some 16 bits as mode I too: from .pgm, and signed ones from .tif.
    if image.mode == "I" and (bits := max(getattr(image, "tag_v2", {}).get(_TIFF_BITS, (16,)))) > 16:
        raise _too_deep(f"are integers of {bits} bits", image.mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Sixteen bits per pixel scaled to eight; Pillow's own conversion would cut off all above 255."""
    check_depth(image)
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    wide = np.asarray(image).astype(np.int64)
    if wide.min() < 0 or wide.max() > _WHITE:
        raise _too_deep(f"go from {wide.min()} to {wide.max()}", image.mode)
    return Image.fromarray(((wide + 128) // 257).astype(np.uint8))


def _too_deep(what: str, mode: str) -> DataError:
    return DataError(
        f"The pixels {what} (Pillow's mode {mode}), and nothing says which value is white. Expected are 8 or 16 bits.",
        hint=f"Convert the image to 8 or 16 bits, with 0 for black and 255 or {_WHITE} for white.",
    )


def _less_long(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The middle of a very long image: resizing all of it could take gigabytes, and no more than a square is used."""
    limit = 8 * min(size)
    left, top = max(0, size[0] - limit) // 2, max(0, size[1] - limit) // 2
    return left, top, size[0] - left, size[1] - top


def _centre(images: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    top = (images.shape[-3] - height) // 2
    left = (images.shape[-2] - width) // 2
    return images[..., top : top + height, left : left + width, :]


def default_preprocess(input_shape: tuple[int, int, int]) -> Preprocess:
    """The usual preprocessing for a network's input (channels, height, width).

    ImageNet's mean and std. From 64 pixels up the shorter side is resized to 8/7 of the crop, as in the
    papers (256 for 224); below that the whole image is used and training pads it by an eighth.
    """
    channels, height, width = input_shape
    if channels not in (1, 3):
        raise DataError(
            f"Images have 1 or 3 channels, but the network's input is {channels}x{height}x{width}.",
            hint="Give --input-shape 3x224x224 or 1x32x32, as your network expects.",
        )
    small = min(height, width) < 64
    canvas = (height, width) if small else (height * 8 // 7, width * 8 // 7)
    resize = canvas[0] if height == width and not small else canvas
    colours: dict[str, object] = {} if channels == 3 else {"colour": "GRAY", "mean": (0.5,), "std": (0.5,)}
    return Preprocess.model_validate(
        {
            **colours,
            "resize": resize,
            "crop": (height, width),
            "augment": Augment(pad=min(height, width) // 8 if small else 0),
        }
    )


def load_preprocess(path: Path) -> Preprocess:
    """Read a --preprocess TOML file.

    Raises:
        DataError: the file is missing, is no TOML, or a field is wrong (named).
        UnknownNameError: there is no such field; the nearest is offered.
    """
    try:
        return Preprocess.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{path} cannot be read as TOML: {error}.", hint=_EXAMPLE) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = Preprocess.model_fields if len(first["loc"]) == 1 else Augment.model_fields
            raise UnknownNameError(f"field in {path}", str(first["loc"][-1]), known) from error
        raise DataError(f"{path}: {place}{first['msg'].removeprefix('Value error, ')}.", hint=_EXAMPLE) from error
