"""Every supported encoding gives the same RGB pixels; everything else is refused by name."""

from __future__ import annotations

import array

import cv2
import numpy as np
import pytest

from selfalign_core.robot.images import (
    SUPPORTED_ENCODINGS,
    decode_compressed,
    decode_image,
    decode_resized,
    resize_with_pad,
)


def picture(height: int = 12, width: int = 10) -> np.ndarray:
    """A smooth picture in which R, G and B differ everywhere."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 9, 100 + columns * 5, 250 - rows * 7], axis=-1).astype(np.uint8)


def encoded(rgb: np.ndarray, encoding: str) -> np.ndarray:
    alpha = np.full((*rgb.shape[:2], 1), 77, np.uint8)
    return {
        "rgb8": rgb,
        "bgr8": rgb[..., ::-1],
        "rgba8": np.concatenate([rgb, alpha], axis=-1),
        "bgra8": np.concatenate([rgb[..., ::-1], alpha], axis=-1),
        "mono8": rgb[..., :1],
    }[encoding]


def padded(pixels: np.ndarray, padding: int) -> bytes:
    rows = pixels.reshape(pixels.shape[0], -1)
    return np.pad(rows, ((0, 0), (0, padding)), constant_values=255).tobytes()


@pytest.mark.parametrize("encoding", SUPPORTED_ENCODINGS)
@pytest.mark.parametrize("padding", [0, 5])
def test_decode_gives_rgb_whatever_the_encoding_and_padding(encoding: str, padding: int) -> None:
    rgb = picture()
    pixels = encoded(rgb, encoding)
    step = pixels.shape[1] * pixels.shape[2] + padding
    image = decode_image(padded(pixels, padding), height=12, width=10, step=step, encoding=encoding)
    expected = np.repeat(rgb[..., :1], 3, axis=-1) if encoding == "mono8" else rgb
    np.testing.assert_array_equal(image, expected)
    assert image.dtype == np.uint8 and image.flags.c_contiguous


@pytest.mark.parametrize("encoding", SUPPORTED_ENCODINGS)
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("size", [(9, 9), (7, 5), (12, 10), (30, 20), (8, 16)])
def test_decoding_at_a_size_gives_the_pixels_of_decoding_then_resizing(encoding, padding, size) -> None:
    pixels = encoded(picture(), encoding)
    step = pixels.shape[1] * pixels.shape[2] + padding
    message = {"height": 12, "width": 10, "step": step, "encoding": encoding}
    data = bytearray(padded(pixels, padding))
    image = decode_resized(data, **message, size=size)
    np.testing.assert_array_equal(image, resize_with_pad(decode_image(data, **message), *size))
    assert image.flags.c_contiguous
    before = image.copy()
    data[:] = bytes(len(data))
    np.testing.assert_array_equal(image, before)  # nothing of the message is shared


@pytest.mark.parametrize("encoding", ["16UC1", "mono16", "32FC1"])
def test_depth_is_refused_at_a_size_too(encoding: str) -> None:
    with pytest.raises(ValueError, match=f"'{encoding}' .a depth or 16-bit encoding"):
        decode_resized(bytes(240), height=12, width=10, step=20, encoding=encoding, size=(6, 6))


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, lambda data: array.array("B", data)])
def test_decode_takes_any_buffer_and_does_not_alias_it(wrap) -> None:
    source = bytearray(picture().tobytes())
    data = wrap(source)
    image = decode_image(data, height=12, width=10, step=30, encoding="rgb8")
    np.testing.assert_array_equal(image, picture())
    assert image.flags.owndata


def test_decode_accepts_a_last_row_without_its_padding() -> None:
    data = padded(picture(), 2)[:-2]
    image = decode_image(data, height=12, width=10, step=32, encoding="rgb8")
    np.testing.assert_array_equal(image, picture())


@pytest.mark.parametrize("encoding", ["16UC1", "mono16", "32FC1", "yuv422", "RGB8", ""])
def test_other_encodings_are_refused_by_name(encoding: str) -> None:
    with pytest.raises(ValueError, match="encoding: found") as caught:
        decode_image(bytes(2 * 120), height=12, width=10, step=20, encoding=encoding)
    assert repr(encoding) in str(caught.value) and "rgb8" in str(caught.value)


@pytest.mark.parametrize(
    ("size", "step", "message"),
    [
        (359, 30, "data: found 359 bytes; expected 360"),
        (361, 30, "data: found 361 bytes; expected 360"),
        (0, 30, "data: found 0 bytes"),
        (360, 29, "step: found 29 bytes; expected at least 30"),
        (360, 0, "step: found 0"),
    ],
)
def test_wrong_length_or_step_is_refused(size: int, step: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_image(bytes(size), height=12, width=10, step=step, encoding="rgb8")


def test_empty_image_is_refused() -> None:
    with pytest.raises(ValueError, match="0 x 10"):
        decode_image(b"", height=0, width=10, step=30, encoding="rgb8")


def test_compressed_png_is_exact_and_jpeg_is_close() -> None:
    rgb = picture(24, 30)
    _, png = cv2.imencode(".png", rgb[..., ::-1])
    np.testing.assert_array_equal(decode_compressed(png.tobytes()), rgb)
    _, jpeg = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    assert np.abs(decode_compressed(jpeg.tobytes()).astype(int) - rgb).mean() < 4


def test_bad_compressed_images_are_refused() -> None:
    _, depth = cv2.imencode(".png", np.full((4, 4), 40_000, np.uint16))
    with pytest.raises(ValueError, match="16-bit PNG"):
        decode_compressed(depth.tobytes())
    with pytest.raises(ValueError, match="JPEG or PNG"):
        decode_compressed(b"GIF89a" + bytes(20))
    with pytest.raises(ValueError, match="0 bytes"):
        decode_compressed(b"")
    with pytest.raises(ValueError, match="damaged JPEG"):
        decode_compressed(b"\xff\xd8\xff\xe0" + bytes(40))


def test_resize_keeps_the_aspect_ratio_and_pads_with_black() -> None:
    image = np.full((480, 640, 3), 200, np.uint8)
    fitted = resize_with_pad(image, 224, 224)
    assert fitted.shape == (224, 224, 3) and fitted.dtype == np.uint8
    assert (fitted[:28] == 0).all() and (fitted[-28:] == 0).all()
    assert (fitted[28:-28] == 200).all()


def test_resize_pads_a_tall_image_at_the_sides_and_enlarges() -> None:
    fitted = resize_with_pad(np.full((20, 10, 3), 90, np.uint8), 40, 40)
    assert (fitted[:, :10] == 0).all() and (fitted[:, 30:] == 0).all() and (fitted[:, 10:30] == 90).all()


def test_resize_of_the_right_size_changes_nothing() -> None:
    np.testing.assert_array_equal(resize_with_pad(picture(), 12, 10), picture())


def test_shrinking_averages_instead_of_skipping_pixels() -> None:
    checkerboard = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    fitted = resize_with_pad(np.repeat(checkerboard[..., None], 3, axis=-1), 16, 16)
    assert np.abs(fitted.astype(int) - 127).max() <= 1


def test_resize_refuses_what_is_not_an_rgb_image() -> None:
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        resize_with_pad(np.zeros((4, 4), np.uint8), 2, 2)
