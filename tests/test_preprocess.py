"""preprocess.py: what a network sees of an image, whatever the image's size and mode."""

import contextlib
import struct
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from thinet_deploy.data.image_files import check_header, decode
from thinet_deploy.data.preprocess import Augment, Preprocess, default_preprocess, load_preprocess
from thinet_deploy.errors import DataError, UnknownNameError

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
SIDES = st.one_of(st.integers(1, 60), st.sampled_from([1, 2, 997, 4000]))
SMALL = st.integers(1, 40)
COLOURS = st.sampled_from(["RGB", "BGR", "GRAY"])


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


@st.composite
def preprocesses(draw: st.DrawFn) -> Preprocess:
    height, width = draw(SMALL), draw(SMALL)
    resize = draw(st.one_of(st.just(max(height, width) + draw(SMALL)), st.tuples(st.just(height), st.just(width))))
    colour = draw(COLOURS)
    channels = 1 if colour == "GRAY" else 3
    numbers = st.floats(-300, 300, width=32)
    return Preprocess.model_validate(
        {
            "colour": colour,
            "range": draw(st.sampled_from(["0..1", "0..255"])),
            "mean": draw(st.tuples(*[numbers] * channels)),
            "std": draw(st.tuples(*[st.floats(2**-6, 300, width=32)] * channels)),
            "resize": resize,
            "crop": (height, width),
            "interpolation": draw(st.sampled_from(["bilinear", "bicubic"])),
            "augment": Augment(mirror=draw(st.booleans()), pad=draw(st.integers(0, 8))),
        }
    )


@given(preprocesses(), SIDES, SIDES)
@settings(max_examples=60, deadline=None)
def test_any_image_becomes_an_input(preprocess: Preprocess, height: int, width: int) -> None:
    pixels = preprocess.read(picture(height, width))
    assert pixels.shape == (*preprocess.canvas, preprocess.channels)
    assert pixels.dtype == np.uint8
    inputs = preprocess.normalise(preprocess.centre_crop(pixels[None]))
    assert inputs.shape == (1, *preprocess.input_shape)
    assert inputs.dtype == np.float32
    assert inputs.flags.c_contiguous
    assert np.isfinite(inputs).all()


@pytest.mark.parametrize("colour", ["GRAY", "RGB"])
@pytest.mark.parametrize("count", [1, 5])
def test_an_input_has_the_strides_of_a_fresh_array(colour: str, count: int) -> None:
    """Torch takes other strides, which one channel allows, for channels-last, and computes otherwise."""
    channels = 1 if colour == "GRAY" else 3
    preprocess = Preprocess.model_validate(
        {"colour": colour, "mean": (0,) * channels, "std": (1,) * channels, "resize": (6, 7), "crop": (6, 7)}
    )
    inputs = preprocess.normalise(np.zeros((count, 6, 7, channels), np.uint8))
    assert inputs.flags.c_contiguous
    assert inputs.strides == np.empty((count, channels, 6, 7), np.float32).strides


@given(st.integers(8, 60), st.integers(8, 60), st.integers(4, 40), st.sampled_from(["bilinear", "bicubic"]))
@settings(max_examples=60, deadline=None)
def test_one_number_keeps_the_aspect_ratio(height: int, width: int, side: int, how: str) -> None:
    """The shorter side becomes `resize`, and the middle is cut out of the whole image resized."""
    image = picture(height, width)
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    whole = np.asarray(image.resize(size, Image.Resampling[how.upper()]))
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    expected = whole[top : top + side, left : left + side]
    found = Preprocess.model_validate({"resize": side, "crop": (side, side), "interpolation": how}).read(image)
    assert (found == expected).all()


def test_two_numbers_are_height_and_width() -> None:
    halves = np.zeros((10, 20, 3), np.uint8)
    halves[:, 10:] = 255
    pixels = Preprocess(resize=(6, 4), crop=(6, 4)).read(Image.fromarray(halves))
    assert pixels.shape == (6, 4, 3)
    assert (pixels[:, 0] == 0).all()
    assert (pixels[:, -1] == 255).all()


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    image = picture(24, 24)
    assert (Preprocess(resize=24, crop=(24, 24), interpolation="bicubic").read(image) == np.asarray(image)).all()
    assert (Preprocess(resize=(24, 24), crop=(20, 20)).read(image) == np.asarray(image)).all()


def test_a_very_long_image_needs_no_memory() -> None:
    """Resized as a whole it would have 6,400 × 64 million pixels; its middle is all that is used."""
    image = picture(100, 10_000)
    thin = image.crop((4900, 0, 5100, 1)).resize((100_000, 1), Image.Resampling.NEAREST)
    assert Preprocess(resize=64, crop=(64, 64)).read(thin).shape == (64, 64, 3)
    middle = Preprocess(resize=64, crop=(64, 64)).read(image.crop((4500, 0, 5500, 100)))
    assert (Preprocess(resize=64, crop=(64, 64)).read(image) == middle).all()


def test_the_centre_is_the_centre() -> None:
    images = np.arange(2 * 7 * 9 * 1, dtype=np.uint8).reshape(2, 7, 9, 1)
    crop = Preprocess(colour="GRAY", mean=(0,), std=(1,), resize=(7, 9), crop=(3, 3)).centre_crop(images)
    assert (crop == images[:, 2:5, 3:6]).all()


def test_bgr_is_rgb_reversed() -> None:
    image = picture(20, 31)
    fields: dict[str, Any] = {"resize": 16, "crop": (16, 16)}
    rgb, bgr = (Preprocess(colour=colour, **fields).read(image) for colour in ("RGB", "BGR"))
    assert (rgb[..., ::-1] == bgr).all()
    assert (rgb != bgr).any()


def test_mean_and_std_follow_the_order_of_colour() -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    inputs = Preprocess(colour="BGR", range="0..255", mean=(1, 2, 3), std=(1, 1, 2), resize=(8, 8), crop=(8, 8))
    assert inputs.normalise(inputs.read(red)[None])[0, :, 0, 0].tolist() == [-1, -2, 126]


@given(preprocesses(), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_normalise_is_the_formula(preprocess: Preprocess, seed: int) -> None:
    shape = (2, *preprocess.crop, preprocess.channels)
    images: Pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    found = preprocess.normalise(images)
    unit = 255.0 if preprocess.range == "0..1" else 1.0
    for channel in range(preprocess.channels):
        expected = (images[..., channel] / unit - preprocess.mean[channel]) / preprocess.std[channel]
        slack = 1e-5 * (256 + abs(preprocess.mean[channel])) / preprocess.std[channel]
        assert np.abs(found[:, channel] - expected).max() <= slack


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "LA", "YCbCr", "I", "I;16"])
@pytest.mark.parametrize("colour", ["RGB", "GRAY"])
def test_every_mode_is_read(mode: str, colour: str) -> None:
    """The same grey ramp in every mode looks the same."""
    ramp = np.broadcast_to(np.arange(0, 256, 16, dtype=np.uint8), (16, 16))
    grey = Image.fromarray(ramp)
    if mode in {"I", "I;16"}:
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
        image = image.convert("I") if mode == "I" else image
    else:
        image = grey.convert("RGB").convert(mode) if mode in {"P", "CMYK", "RGBA", "YCbCr"} else grey.convert(mode)
    assert image.mode == mode
    preprocess = Preprocess.model_validate(
        {"resize": (16, 16), "crop": (16, 16), "colour": colour}
        | ({"mean": (0.5,), "std": (0.5,)} if colour == "GRAY" else {})
    )
    found = preprocess.read(image).astype(int)
    slack = {"1": 255, "P": 51}.get(mode, 2)
    assert np.abs(found - ramp[..., None]).max() <= slack
    assert found.std() > 40, "not all white or black"


GREY = Preprocess(colour="GRAY", mean=(0.5,), std=(0.5,), resize=(16, 16), crop=(16, 16))
RAMP = np.broadcast_to(np.arange(0, 256, 16), (16, 16))


@pytest.mark.parametrize(
    "pixels", [RAMP / 255.0, RAMP.astype(float), RAMP * 2**16, RAMP - 1], ids=["to 1", "to 255", "wide", "signed"]
)
def test_pixels_whose_white_nobody_knows_are_refused(pixels: np.ndarray[Any, Any]) -> None:
    image = Image.fromarray(pixels.astype(np.float32 if pixels.dtype.kind == "f" else np.int32))
    with pytest.raises(DataError, match=rf"mode {image.mode}\).* 8 or 16 bits\.\nConvert "):
        GREY.read(image)


@pytest.mark.parametrize("bits", [np.float32, np.int32, np.uint32])
@pytest.mark.parametrize("check", [check_header, lambda path: decode(path, GREY)], ids=["header", "pixels"])
def test_a_file_of_32_bits_is_refused_by_name_before_any_work(
    check: Callable[[Path], object], bits: type, tmp_path: Path
) -> None:
    """Whatever its values: black would be what a file with 0 to 255 is seen as."""
    path = tmp_path / "deep.tif"
    write_tiff(path, RAMP.astype(bits))
    with pytest.raises(DataError, match=r"deep\.tif: The pixels are .*mode [FI]\)"):
        check(path)


@pytest.mark.parametrize("name", ["wide.tif", "wide.png", "wide.pgm"])
def test_a_file_of_16_bits_is_read_right(name: str, tmp_path: Path) -> None:
    image = Image.fromarray((RAMP * 257).astype(np.uint16))
    image.save(tmp_path / name)
    check_header(tmp_path / name)
    assert (decode(tmp_path / name, GREY)[..., 0] == RAMP).all()


def test_a_tiff_of_signed_16_bits_is_read_where_nothing_is_below_black(tmp_path: Path) -> None:
    path = tmp_path / "signed.tif"
    write_tiff(path, (RAMP // 2 * 257).astype(np.int16))
    assert Image.open(path).mode == "I"
    assert (decode(path, GREY)[..., 0] == RAMP // 2).all()
    write_tiff(path, (RAMP - 1).astype(np.int16))
    with pytest.raises(DataError, match=r"signed\.tif: The pixels go from -1 to 239 .*mode I\)"):
        decode(path, GREY)


def write_tiff(path: Path, pixels: np.ndarray[Any, Any]) -> None:
    """A TIFF of one channel, also of kinds that Pillow does not write."""
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    height, width = pixels.shape
    tags = {256: width, 257: height, 258: 8 * pixels.itemsize, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    tags |= {279: pixels.nbytes, 339: kind}
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    body = np.ascontiguousarray(pixels).tobytes()
    path.write_bytes(
        struct.pack("<2sHI", b"II", 42, 8 + len(body)) + body + struct.pack("<H", len(tags)) + rows + b"\0" * 4
    )


@given(preprocesses())
@settings(max_examples=40, deadline=None)
def test_toml_there_and_back(tmp_path_factory: pytest.TempPathFactory, preprocess: Preprocess) -> None:
    def toml(value: object) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(toml, value)) + "]"
        return str(value).lower() if isinstance(value, bool) else repr(value)

    fields = preprocess.model_dump(mode="json")
    text = "\n".join(f"{name} = {toml(value)}" for name, value in fields.items())
    assert tomllib.loads(text) == fields
    path = tmp_path_factory.getbasetemp() / "pre.toml"
    path.write_text(text)
    assert load_preprocess(path) == preprocess
    assert Preprocess.model_validate(fields) == preprocess


@pytest.mark.parametrize(
    ("shape", "canvas", "resize", "pad"),
    [
        ((3, 224, 224), (256, 256), 256, 0),
        ((3, 299, 299), (341, 341), 341, 0),
        ((3, 224, 112), (256, 128), (256, 128), 0),
        ((3, 32, 32), (32, 32), (32, 32), 4),
        ((1, 28, 28), (28, 28), (28, 28), 3),
        ((1, 1, 1), (1, 1), (1, 1), 0),
    ],
)
def test_defaults(shape: tuple[int, int, int], canvas: tuple[int, int], resize: object, pad: int) -> None:
    preprocess = default_preprocess(shape)
    assert preprocess.input_shape == shape
    assert preprocess.canvas == canvas
    assert preprocess.resize == resize
    assert preprocess.augment == Augment(mirror=True, pad=pad)
    assert preprocess.mean == ((0.5,) if shape[0] == 1 else (0.485, 0.456, 0.406))


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_no_default_for_other_channels(channels: int) -> None:
    with pytest.raises(DataError, match="1 or 3 channels"):
        default_preprocess((channels, 32, 32))


@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_text_is_read_or_refused_in_our_words(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(f"resize = 8\ncrop = [8, 8]\n{text}", encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(DataError, UnknownNameError):
        load_preprocess(path)
