"""Our reading of FFCV's file layout against FFCV's own definitions, and its decoder against hostile bytes."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import pytest
import torch

from barlow.data import layout
from barlow.data.decode import compile_decode


@pytest.fixture(scope="module", autouse=True)
def threads_of_torch() -> Iterator[None]:
    """FFCV's package sets torch's thread count on import."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def numbers(dtype: np.dtype) -> list[tuple[int, object]]:
    """Offsets and types down to the single numbers, without the names."""
    if dtype.fields is None:
        return [(0, dtype)]
    return [(field[1] + at, kind) for field in dtype.fields.values() for at, kind in numbers(field[0])]


def test_the_layout_is_ffcvs() -> None:
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField

    sample = types.get_metadata_type([RGBImageField(), IntField(), IntField()])
    theirs = [types.HeaderType, types.FieldDescType, types.ALLOC_TABLE_TYPE, sample]
    ours = [layout.HEADER, layout.FIELD, layout.PLACE, layout.SAMPLE]
    for a, b in zip(ours, theirs, strict=True):
        assert a.itemsize == b.itemsize
        assert numbers(a) == numbers(b)
    assert layout.VERSION == types.CURRENT_VERSION
    assert [types.TYPE_ID_HANDLER[number] for number, _ in layout.FIELDS] == [RGBImageField, IntField, IntField]
    from ffcv.fields.rgb_image import IMAGE_MODES

    assert dict(IMAGE_MODES) == {"jpg": layout.JPEG, "raw": layout.RAW}


def decode(data: np.ndarray, height: int = 64, width: int = 96, mode: int = layout.JPEG) -> tuple[int, np.ndarray]:
    """What decode() answers, and the image; fails if it wrote anywhere else."""
    around = np.full((height * 3, width, 3), 77, np.uint8)
    images = around[height : 2 * height][None]
    address, size, modes = np.array([data.ctypes.data]), np.array([data.size]), np.array([mode], np.uint8)
    answer = compile_decode()(address, size, modes, images)
    assert (around[:height] == 77).all()
    assert (around[2 * height :] == 77).all()
    return answer, images[0]


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return cv2.resize(coarse, (96, 64), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def encoded(picture: np.ndarray) -> np.ndarray:
    return cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].reshape(-1)


def test_decodes_rgb_of_any_shape(picture: np.ndarray, encoded: np.ndarray) -> None:
    answer, image = decode(encoded)
    assert answer == -1
    assert np.abs(image.astype(int) - picture).mean() < 6
    answer, image = decode(picture.reshape(-1), mode=layout.RAW)
    assert answer == -1
    np.testing.assert_array_equal(image, picture)


def test_answers_with_the_first_that_failed(encoded: np.ndarray) -> None:
    broken = np.zeros(100, np.uint8)
    data = [encoded, encoded, broken, encoded, broken]
    addresses, sizes = np.array([d.ctypes.data for d in data]), np.array([d.size for d in data])
    images = np.empty((5, 64, 96, 3), np.uint8)
    run = compile_decode()
    assert run(addresses, sizes, np.zeros(5, np.uint8), images) == 2
    assert run(addresses[3:], sizes[3:], np.zeros(2, np.uint8), images[3:]) == 1
    assert run(addresses[:2], sizes[:2], np.zeros(2, np.uint8), images[:2]) == -1
    assert run(addresses[:0], sizes[:0], np.zeros(0, np.uint8), images[:0]) == -1


def test_missing_bytes_never_go_unnoticed(encoded: np.ndarray) -> None:
    for size in range(0, len(encoded), 7):
        assert decode(encoded[:size].copy())[0] == 0, size


@pytest.mark.parametrize("shape", [(63, 96), (64, 95), (65, 96), (32, 48), (128, 192), (96, 64), (2000, 2000)])
def test_other_dimensions_are_refused(shape: tuple[int, int]) -> None:
    data = cv2.imencode(".jpg", np.zeros((*shape, 3), np.uint8))[1].reshape(-1)
    assert decode(data)[0] == 0
    assert decode(data, *shape)[0] == -1


def test_other_kinds_of_jpeg_decode(picture: np.ndarray, encoded: np.ndarray) -> None:
    gray = cv2.imencode(".jpg", picture[..., 0])[1].reshape(-1)
    progressive = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].reshape(-1)
    assert decode(gray)[0] == decode(progressive)[0] == -1
    assert np.abs(decode(progressive)[1].astype(int) - picture).mean() < 5


def test_no_bytes_make_it_write_elsewhere(encoded: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    noticed = 0
    for _ in range(3000):
        data = encoded.copy()
        for at in rng.integers(0, len(data) if rng.random() < 0.5 else 700, rng.integers(1, 4)):
            data[at] ^= np.uint8(1 << rng.integers(0, 8))
        noticed += decode(data)[0] == 0
    assert noticed > 300
    assert all(decode(rng.integers(0, 256, n, dtype=np.uint8))[0] == 0 for n in range(1, 300))
