"""Pixels of any kind, in files and in arrays, become 8 bits: the same picture, or a refusal."""

import io
import struct
import zlib

import ml_dtypes
import numpy as np
import pytest
from PIL import Image, ImageOps

from ait_jax.data.image_folder import DataError, Fit, decode
from ait_jax.data.pixels import TURNS, eight_bits, grey_or_rgb, orientation

GREY = np.random.default_rng(0).integers(0, 256, (8, 9), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (8, 9, 3), dtype=np.uint8)


def encoded(image, suffix, **options):
    contents = io.BytesIO()
    image.save(contents, suffix, **options)
    return contents.getvalue()


def tiff(pixels, tags=(), **options):
    """A TIFF of `pixels`, some of its tags (of one short number) overwritten afterwards."""
    contents = bytearray(encoded(Image.fromarray(pixels), "TIFF", **options))
    for tag, value in dict(tags).items():
        entry = contents.index(tag.to_bytes(2, "little") + b"\3\0\1\0\0\0")
        contents[entry + 8 : entry + 10] = value.to_bytes(2, "little")
    return bytes(contents)


def grey(contents):
    return decode(contents, "it", Fit((8, 9, 1)))[..., 0]


# Arrays -------------------------------------------------------------------------------------------


def test_16_bits_are_scaled_and_rounded():
    every = np.arange(65536, dtype=np.uint16)
    wanted = np.round(every / 257).astype(np.uint8)
    for dtype in ("<u2", ">u2"):
        got = eight_bits(every.astype(dtype), "it")
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(eight_bits(every[:256] * 257, "it"), np.arange(256))
    twelve = np.arange(4096, dtype=np.uint16)
    np.testing.assert_array_equal(
        eight_bits(twelve, "it", largest=4095), np.round(twelve * (255 / 4095))
    )


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, np.float64, ">f4", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3]
)
def test_floats_between_0_and_1_are_scaled(dtype):
    floats = (np.arange(256) / 255).astype(dtype)
    got = eight_bits(floats.reshape(4, 64), "it")
    assert got.dtype == np.uint8 and got.shape == (4, 64)
    np.testing.assert_array_equal(got.ravel(), np.rint(floats.astype(np.float32) * 255))
    if np.dtype(dtype).kind == "f":  # The others hold fewer values.
        np.testing.assert_array_equal(got.ravel(), np.arange(256))
    for constant in (0, 1):
        assert np.all(eight_bits(np.full((2, 2), constant, dtype), "it") == 255 * constant)


def test_floats_that_a_computation_left_a_little_outside():
    edges = np.array([-1e-6, 1 + 1e-6, -0.0], np.float32)
    assert eight_bits(edges, "it").tolist() == [0, 255, 0]


def test_uint8_and_bool():
    assert eight_bits(GREY, "it") is GREY
    np.testing.assert_array_equal(eight_bits(GREY > 99, "it"), 255 * (GREY > 99))


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint32, np.complex64])
def test_types_without_a_known_range_are_refused(dtype):
    for largest in (1, 100):
        with pytest.raises(DataError, match=rf"it has .* {np.dtype(dtype)}, .* allowed are uint8,"):
            eight_bits(np.full((2, 2, 1), largest, dtype), "it")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((0, 255), "from 0 to 255 "),
        ((0, 1.01), "from 0 to 1.01 "),
        ((-1, 1), "from -1 to 1 "),
        ((0, 65535), "from 0 to 65535 "),
        ((0, np.nan), "NaN or infinite"),
        ((0, np.inf), "NaN or infinite"),
        ((-np.inf, 1), "NaN or infinite"),
    ],
)
def test_floats_that_are_no_shares_of_white_are_refused(values, said):
    pixels = np.array(values, np.float32).reshape(1, 2)
    for source in (pixels[..., None], encoded(Image.fromarray(pixels), "TIFF")):
        with pytest.raises(DataError, match="it has") as caught:
            decode(source, "it", Fit((1, 2, 1)))
        assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1
    if np.isfinite(values).all() and values[0] == 0:
        # As the message advises.
        assert eight_bits(pixels / values[1], "it").ravel().tolist() == [0, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_of_all_types_are_one_picture(channels):
    pixels = COLOUR[..., :channels]
    for fit in (None, Fit((8, 9, channels)), Fit((6, 6, 4 - channels)), Fit((6, 6, 3), 7)):
        wanted = decode(pixels, "it", fit)
        for same in (pixels * np.uint16(257), pixels / np.float32(255), pixels / 255):
            np.testing.assert_array_equal(decode(same, "it", fit), wanted)


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", [None, Fit((8, 9, 1)), Fit((8, 9, 3)), Fit((5, 5, 1), 7)])
def test_files_of_all_depths_are_one_picture(fit):
    deep = GREY * np.uint16(257)
    wanted = decode(encoded(Image.fromarray(GREY), "PNG"), "it", fit)
    files = {
        "PNG 16": encoded(Image.fromarray(deep), "PNG"),
        "PGM 16": encoded(Image.fromarray(deep), "PPM"),
        "JPEG 2000 16": encoded(Image.fromarray(deep), "JPEG2000"),
        "TIFF 16": tiff(deep),
        "TIFF 16, compressed": tiff(deep, compression="tiff_adobe_deflate"),
        "TIFF 16, big-endian": encoded(Image.fromarray(deep.astype(">u2")), "TIFF"),
        "TIFF float": tiff(GREY / np.float32(255)),
        "PFM": encoded(Image.fromarray(GREY / np.float32(255)), "PPM"),
    }
    modes = set()
    for name, contents in files.items():
        with Image.open(io.BytesIO(contents)) as image:
            modes.add(image.mode)
        np.testing.assert_array_equal(decode(contents, name, fit), wanted, err_msg=name)
    assert {"I", "I;16", "I;16B", "F"} <= modes  # PNGs have been of mode I in older Pillows.


def png16(pixels):
    """A PNG of 16 bits with 3 or 4 channels, which Pillow does not write."""

    def chunk(name, content):
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    )


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_16_bits(channels):
    """Pillow keeps their upper 8 bits, which are at most one level off."""
    deep = np.random.default_rng(2).integers(0, 65536, (8, 9, channels), dtype=np.uint16)
    got = decode(png16(deep), "it", Fit((8, 9, 3)))
    assert np.abs(got.astype(int) - np.round(deep[..., :3] / 257)).max() <= 1
    exact = np.dstack([COLOUR, COLOUR])[..., :channels] * np.uint16(257)
    np.testing.assert_array_equal(decode(png16(exact), "it", Fit((8, 9, 3))), COLOUR)


def test_12_bits():
    """Two pixels share three bytes."""
    twelve = np.linspace(0, 4095, 72).round().astype(np.uint16)
    first, second = twelve[::2], twelve[1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1)
    contents = bytearray(tiff(np.zeros((1, 72), np.uint16), {258: 12}))
    with Image.open(io.BytesIO(contents)) as image:
        (offset,) = image.tag_v2[273]
    contents[offset : offset + packed.size] = packed.astype(np.uint8).tobytes()
    with Image.open(io.BytesIO(contents)) as image:
        assert image.mode == "I;16" and np.asarray(image).max() == 4095
    got = decode(bytes(contents), "it", Fit((1, 72, 1)))
    np.testing.assert_array_equal(got.ravel(), np.round(twelve * (255 / 4095)))


@pytest.mark.parametrize("value", [0, 1, 255, 40000])
def test_32_bits_and_signs_are_refused(value):
    """Whatever they hold: a dark image of 32 bits looks like a bright one of 8."""
    wide = np.full((8, 9), value, np.int32)
    signed = tiff(np.full((8, 9), value, np.uint16), tiffinfo={339: 2})
    for contents in (tiff(wide), signed):
        with Image.open(io.BytesIO(contents)) as image:
            assert image.mode == "I"
        with pytest.raises(DataError, match=r"it is a TIFF of mode 'I', .* 8 or 16 bits without"):
            grey(contents)


def test_16_bits_of_formats_with_offsets_are_refused():
    values = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": 9, "NAXIS2": 8}
    lines = [f"{name:8}= {value:>20}".ljust(80) for name, value in values.items()]
    fits = "".join([*lines, "END"]).ljust(2880).encode() + bytes(2880)
    with pytest.raises(DataError, match="it is a FITS of mode 'I;16', whose range is not known"):
        grey(fits)


def test_white_at_zero():
    """Pillow turns round what has 8 bits, and leaves what has more as it is."""
    wanted = 255 - GREY
    np.testing.assert_array_equal(grey(tiff(GREY, {262: 0})), wanted)
    for deep in (GREY * np.uint16(257), GREY / np.float32(255)):
        with pytest.raises(DataError, match=r"it is a TIFF .* in which 0 is white: save it with 0"):
            grey(tiff(deep, {262: 0}))


def in_mode(mode):
    image = Image.fromarray(COLOUR)
    if mode in ("La", "RGBa"):
        image = image.convert(mode[:-1] + "A")
        image.putalpha(Image.fromarray(GREY | 1))
    elif mode == "PA":
        image = image.convert("P")
    elif mode == "LAB":
        return Image.frombytes("LAB", (9, 8), COLOUR.tobytes())
    return image.convert(mode)


EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "RGBa")


@pytest.mark.parametrize("mode", EIGHT_BITS)
def test_modes_of_8_bits_are_as_pillow_converts_them(mode):
    image = in_mode(mode)
    assert image.mode == mode
    for channels, target in ((1, "L"), (3, "RGB")):
        got = grey_or_rgb(image, channels, "it")
        assert got.mode == target and got.tobytes() == image.convert(target).tobytes()
    kept = grey_or_rgb(image, None, "it")
    assert kept.mode == ("L" if mode in ("1", "L", "LA") else "RGB")


@pytest.mark.parametrize(("mode", "by_way_of"), [("La", "LA"), ("LAB", "RGB")])
def test_modes_that_pillow_cannot_convert_to_grey(mode, by_way_of):
    image = in_mode(mode)
    with pytest.raises(ValueError, match="not supported"):
        image.convert("L")
    for channels, target in ((1, "L"), (3, "RGB")):
        got = grey_or_rgb(image, channels, "it")
        assert got.tobytes() == image.convert(by_way_of).convert(target).tobytes()


def test_lab_in_a_file():
    # L, a and b of sRGB's red, under D50.
    pixels = np.full((8, 9, 3), (round(54.29 * 2.55), 81, 70), np.uint8)
    contents = encoded(Image.frombytes("LAB", (9, 8), pixels.tobytes()), "TIFF")
    got = decode(contents, "it", Fit((8, 9, 3))).astype(int)
    assert np.abs(got - (255, 0, 0)).max() < 8
    assert np.abs(grey(contents).astype(int) - 76).max() < 5


@pytest.mark.parametrize("suffix", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_dropped(suffix):
    """Not blended: the colours of clear pixels are as they are stored."""
    image = Image.fromarray(np.dstack([COLOUR, GREY]), "RGBA")
    options = {"lossless": True, "exact": True} if suffix == "WEBP" else {}
    got = decode(encoded(image, suffix, **options), "it", Fit((8, 9, 3)))
    np.testing.assert_array_equal(got, COLOUR)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("transparency", [3, bytes(range(200))])
def test_palettes_with_transparency(transparency):
    palette = Image.fromarray(COLOUR).quantize(200)
    wanted = np.asarray(palette.convert("RGB"))
    contents = encoded(palette, "PNG", transparency=transparency)
    np.testing.assert_array_equal(decode(contents, "it", Fit((8, 9, 3))), wanted)


@pytest.mark.parametrize("suffix", ["GIF", "TIFF", "PNG", "WEBP"])
def test_the_first_frame_counts(suffix):
    first, second = Image.new("RGB", (9, 8), (200, 0, 0)), Image.new("RGB", (9, 8), (0, 0, 200))
    contents = encoded(first, suffix, save_all=True, append_images=[second])
    with Image.open(io.BytesIO(contents)) as image:
        assert image.n_frames == 2
    got = decode(contents, "it", Fit((8, 9, 3))).astype(int)
    assert np.abs(got - (200, 0, 0)).max() < 5


@pytest.mark.parametrize("image", [GREY * np.uint16(257), GREY / np.float32(255), COLOUR])
def test_files_cut_short_are_refused(image):
    contents = encoded(Image.fromarray(image), "TIFF")
    with pytest.raises(DataError, match="it cannot be decoded"):
        decode(contents[: len(contents) * 2 // 3], "it", Fit((8, 9, 3)))


# Orientation --------------------------------------------------------------------------------------


def turned(image, suffix, value, **options):
    exif = Image.Exif()
    exif[274] = value
    return encoded(image, suffix, exif=exif, **options)


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "WEBP"])
def test_all_orientations(suffix, value):
    contents = turned(Image.fromarray(COLOUR), suffix, value)
    with Image.open(io.BytesIO(contents)) as image:
        stored = np.asarray(image.convert("RGB"))
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert (upright.shape != stored.shape) == (value >= 5)
    said = []

    def on_turned(name, orientation):
        said.append((name, orientation))

    got = decode(contents, "it", Fit(stored.shape), on_turned=on_turned)
    np.testing.assert_array_equal(got, stored)
    assert said == ([("it", value)] if value > 1 else [])
    said.clear()
    fit = Fit(upright.shape, upright=True)
    np.testing.assert_array_equal(decode(contents, "it", fit, on_turned=on_turned), upright)
    assert not said


def test_deep_images_are_turned_too():
    deep = Image.fromarray(GREY * np.uint16(257))
    got = decode(turned(deep, "PNG", 6), "it", Fit((9, 8, 1), upright=True))
    np.testing.assert_array_equal(got[..., 0], np.rot90(GREY, -1))


@pytest.mark.parametrize("upright", [False, True])
def test_a_tiff_is_turned_once(upright):
    """By Pillow itself, which torchvision has no say in either."""
    contents = turned(Image.fromarray(COLOUR), "TIFF", 6)
    got = decode(contents, "it", Fit((9, 8, 3), upright=upright))
    np.testing.assert_array_equal(got, np.rot90(COLOUR, -1))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientations_that_do_not_exist(value):
    contents = turned(Image.fromarray(COLOUR), "PNG", value)
    got = decode(contents, "it", Fit((8, 9, 3), upright=True))
    np.testing.assert_array_equal(got, COLOUR)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_metadata_does_not_spoil_an_image():
    image = Image.fromarray(COLOUR)
    for exif in (b"Exif\0\0broken", b"Exif\0\0MM\0\x2a\xff\xff\xff\xff", b"Exif\0\0"):
        contents = encoded(image, "JPEG", exif=exif)
        with Image.open(io.BytesIO(contents)) as opened:
            wanted = np.asarray(opened)
            assert orientation(opened) == 1
        got = decode(contents, "it", Fit((8, 9, 3), upright=True))
        np.testing.assert_array_equal(got, wanted)


def test_the_table_of_turns_is_whole():
    assert sorted(TURNS) == list(range(2, 9)) and len(set(TURNS.values())) == 7
