"""The kernels of views.cu, emulated on the CPU in three orders of a block's threads, against draw.py and views.py.

Parameters are compared bit for bit. Pixels are compared in 0..1: every operation is continuous (a hue at the ends of
its circle, a value at the half where it is inverted: both sides give the same colour), so the rounding of float32 is
all that may differ, at no pixel more than elsewhere: 3e-6 here, 1e-5 on a GPU, which contracts and divides faster.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from barlow import kernels
from barlow.config import View, Views
from barlow.data import fused_views, views
from barlow.data.draw import ORDERS, Kind, Params, both, draw, draw_kind
from barlow.data.views import apply
from barlow.kernels import build
from tests.data.test_draw import same, unchanged
from tests.data.test_views import noise
from tests.kernels.emulator import ORDERS as THREAD_ORDERS

MEAN, STD = (0.48, 0.45, 0.40), (0.31, 0.27, 0.24)
PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
ALWAYS = View(1, 1, 1, 1, 1)
STRONG = Views(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5, a=View(jitter=1))
CLOSE = 3e-6


@pytest.fixture(params=list(THREAD_ORDERS))
def fused(emulated: Callable[..., Any], request: pytest.FixtureRequest) -> Any:
    return emulated("views", request.param)


@pytest.fixture
def shuffled(emulated: Callable[..., Any]) -> Any:
    return emulated("views", "shuffled")


def made(fused: Any, images: Tensor, params: Params, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the kernel makes of one view's parameters, on a sheet whose margins must stay as they are."""
    n, margin = len(images), 64
    sheet = torch.full((n * size * size * 3 + 2 * margin,), 7.0, dtype=dtype)
    out = sheet[margin:-margin].view(1, n, size, size, 3)
    fused_views.apply(fused, images, fused_views.pack(params)[None], out, *PLAIN)
    assert (sheet[:margin] == 7).all()
    assert (sheet[-margin:] == 7).all()
    return out[0].permute(0, 3, 1, 2)


def differs(fused: Any, images: Tensor, params: Params, size: int) -> float:
    """From the definition, at the worst pixel."""
    return (made(fused, images, params, size) - apply(images, params, size, *PLAIN)).abs().max().item()


# -------------------------------------------------------------------------------------------------------------- draw


ODD = [
    (Views(), 96, 96),
    (Views(), 32, 128),
    (Views(scale=(0.01, 1.0), ratio=(0.1, 10.0), hue=0.5, brightness=1.7), 57, 91),  # many first attempts fail
    (Views(scale=(0.8, 1.0), ratio=(0.1, 10.0)), 48, 64),  # and some tenth ones
    (Views(scale=(0.0001, 0.001), sigma=(0.0, 0.0), b=ALWAYS), 32, 32),  # boxes of a pixel and of none
    (Views(scale=(1, 1), ratio=(1, 1), contrast=0, a=View(0, 0, 0, 0, 0)), 75, 75),
    (Views(ratio=(2.0, 3.0)), 40, 40),
    (Views(scale=(0.3, 0.3), ratio=(0.001, 900.0), saturation=123.4), 1000, 3000),
]


@pytest.mark.parametrize(("ranges", "height", "width"), ODD)
def test_parameters_are_the_same_bits(shuffled: Any, ranges: Views, height: int, width: int) -> None:
    ids = torch.cat([torch.arange(300) * 77_777, torch.tensor([0, 2**31, 2**32 - 1, 2**32, 2**40 + 5])])
    for seed, epoch in ((0, 0), (2024, 5), (-3, 1), (2**40 + 9, 2**32 - 1)):
        table = fused_views.draw(shuffled, both(ranges), (0, 1), seed, epoch, ids, height, width)
        for view in (0, 1):
            assert same(fused_views.unpack(table[view]), draw(ranges, view, seed, epoch, ids, height, width))


def test_lanes_have_parameters_of_their_own(shuffled: Any) -> None:
    ids, kinds = torch.arange(40), [both(Views())[0]] * 3
    table = fused_views.draw(shuffled, kinds, (7, 0, 65_535), 1, 2, ids, 96, 64)
    for row, lane in enumerate((7, 0, 65_535)):
        assert same(fused_views.unpack(table[row]), draw_kind(kinds[0], lane, 1, 2, ids, 96, 64))


@pytest.mark.parametrize("n", [1, 63, 65])
def test_a_sample_s_parameters_do_not_depend_on_its_batch(fused: Any, n: int) -> None:
    ids = torch.arange(65) * 3
    whole = fused_views.draw(fused, both(Views()), (0, 1), 0, 0, ids, 96, 96)
    sheet = torch.cat([ids[:n], torch.full((200,), -1)])
    assert torch.equal(fused_views.draw(fused, both(Views()), (0, 1), 0, 0, sheet[:n], 96, 96), whole[:, :n])


def test_a_table_is_the_same_as_params() -> None:
    p = draw(STRONG, 1, 0, 0, torch.arange(50), 96, 96)
    table = fused_views.pack(p)
    assert table.shape == (50, fused_views.COLUMNS)
    back = fused_views.unpack(table)
    assert same(back, p)
    assert all(getattr(back, f.name).dtype == getattr(p, f.name).dtype for f in fields(Params))


# ------------------------------------------------------------------------------------------------------------- apply


@pytest.mark.parametrize(
    ("size", "height", "width"),
    [(32, 32, 32), (48, 96, 96), (96, 96, 96), (96, 32, 32), (50, 61, 128), (33, 57, 40), (7, 40, 3), (1, 9, 9)],
)
def test_views_are_those_of_the_definition(fused: Any, size: int, height: int, width: int) -> None:
    n = 5
    images, ids = noise(n, height, width, fade=0.5), torch.arange(n) + 11
    for ranges in (Views(size=size), replace(STRONG, size=size, a=ALWAYS)):
        ours = fused_views.make(fused, images, ids, both(ranges), 0, 0, *PLAIN, torch.float32)
        theirs = views.pair(images, ids, ranges, 0, 0, *PLAIN)
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape == (n, 3, size, size)
            assert (a - b).abs().max() < CLOSE
    assert fused.launches == ["views_draw", "views_apply"] * 2


@pytest.mark.parametrize("size", [24, 80, 96])
def test_boxes_to_the_edges(fused: Any, size: int) -> None:
    height, width = 57, 80
    corners = [
        (0, 0, height, width),
        (56, 79, 1, 1),
        (0, 0, 1, 1),
        (55, 77, 2, 3),
        (0, 79, height, 1),
        (20, 0, 3, width),
    ]
    p = replace(unchanged(6, height, width), boxes=torch.tensor(corners, dtype=torch.int32))
    for flip in (False, True):
        assert differs(fused, noise(6, height, width), replace(p, flip=torch.full((6,), flip)), size) < CLOSE


@pytest.mark.parametrize("at_the_end", [False, True])
def test_nothing_beside_the_images_is_read(shuffled: Any, at_the_end: bool) -> None:
    """They lie between two pages that nobody may touch; a child of this process tries."""
    page, count = mmap.PAGESIZE, 2 * 25 * 25 * 3
    memory = mmap.mmap(-1, 3 * page)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = 2 * page - count if at_the_end else page
    images = torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=offset).view(2, 25, 25, 3)
    corners = [(0, 0, 2, 3), (24, 24, 1, 1), (0, 0, 25, 25), (23, 0, 2, 25), (0, 22, 25, 3)]
    for address in (first, first + 2 * page):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(page), 0) == 0
    child = os.fork()
    if child == 0:
        try:
            for box in corners:
                p = replace(unchanged(2, 25, 25), boxes=torch.tensor([box] * 2, dtype=torch.int32))
                made(shuffled, images, p, 9)
                made(shuffled, images, p, 33)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_source_as_large_as_the_view_is_copied(fused: Any) -> None:
    images = noise(2, 48, 48)
    ours = made(fused, images, unchanged(2, 48, 48), 48)
    assert (ours - images.permute(0, 3, 1, 2) / 255).abs().max() < 1e-6


@pytest.mark.parametrize("operation", range(4))
def test_each_operation_on_colours(fused: Any, operation: int) -> None:
    values = torch.linspace(-0.5, 0.5, 7) if operation == 3 else torch.tensor([0, 0.3, 0.7, 1, 1.4, 2, 3])
    factors = unchanged(7, 40, 40).factors
    factors[:, operation] = values
    assert differs(fused, colours(7), replace(unchanged(7, 40, 40), factors=factors), 40) < CLOSE


def colours(n: int) -> Tensor:
    """uint8 [n, 40, 40, 3] with gray, black, white and pure pixels, and ties between channels."""
    x = noise(n, 40, 40, seed=9)
    x[:, 0] = x[:, 0, :, :1]
    x[:, 1, :, 1], x[:, 2, :, 2], x[:, 3, :, 2] = x[:, 1, :, 0], x[:, 2, :, 1], x[:, 3, :, 0]
    x[:, 4] = torch.tensor([0, 255], dtype=torch.uint8).repeat(20)[:, None]
    x[:, 5] = (x[:, 5] > 127) * 255
    return x


def test_colours_in_each_of_the_24_orders(shuffled: Any) -> None:
    ids = torch.arange(24)
    factors = draw(STRONG, 0, 0, 0, ids, 40, 40).factors
    p = replace(unchanged(24, 40, 40), order=torch.tensor(ORDERS), factors=factors, gray=ids % 5 == 1)
    assert differs(shuffled, colours(24), p, 40) < CLOSE


@pytest.mark.parametrize("size", [40, 33, 8, 4])
def test_blur(fused: Any, size: int) -> None:
    sigma = torch.tensor([0.0, 0.1, 0.77, 2.0])
    assert differs(fused, noise(4, 40, 40), replace(unchanged(4, 40, 40), sigma=sigma), size) < CLOSE


def test_solarize_and_grayscale(fused: Any) -> None:
    on = torch.tensor([True, False, True, False])
    p = unchanged(4, 40, 40)
    assert differs(fused, colours(4), replace(p, gray=on), 40) < CLOSE
    assert differs(fused, colours(4), replace(p, solarize=on), 40) < CLOSE
    assert differs(fused, colours(4), replace(p, solarize=on, gray=~on), 40) < CLOSE


@pytest.mark.parametrize("size", [48, 33])
def test_bfloat16_is_float32_rounded(fused: Any, size: int) -> None:
    images, p = noise(3, 40, 40), draw(Views(size=size), 1, 0, 0, torch.arange(3), 40, 40)
    assert torch.equal(made(fused, images, p, size, torch.bfloat16), made(fused, images, p, size).bfloat16())


def test_views_are_normalised(shuffled: Any) -> None:
    images, ids = noise(3, 40, 40), torch.arange(3)
    ours = fused_views.make(shuffled, images, ids, both(Views(size=32)), 0, 0, MEAN, STD, torch.float32)
    for a, b in zip(ours, views.pair(images, ids, Views(size=32), 0, 0, MEAN, STD), strict=True):
        assert (a - b).abs().max() < 1e-5


def test_a_canvas_too_large_for_shared_memory_is_in_global_memory(emulated: Callable[..., Any]) -> None:
    """In turns: two blocks make six views, each on a canvas of its own."""
    images, ids = noise(3, 40, 40), torch.arange(3)
    roomy, narrow = emulated("views"), emulated("views", "shuffled", shared_limit=9000)
    launch, canvases = narrow.launch, torch.empty(0)

    def on_canvases_of_nan(name: str, *arguments: Any) -> None:
        nonlocal canvases
        if name == "views_apply_large":
            canvases = arguments[-1].fill_(torch.nan)
        launch(name, *arguments)

    narrow.launch = on_canvases_of_nan
    both_ways = [
        fused_views.make(each, images, ids, both(Views(size=48)), 0, 0, MEAN, STD, torch.float32)
        for each in (roomy, narrow)
    ]
    for a, b in zip(*both_ways, strict=True):
        assert torch.equal(a, b)
    assert canvases.shape == (2, 48 * 145)
    assert canvases.view(2, 48, 145)[..., :144].isfinite().all()


def test_224_pixels(shuffled: Any) -> None:
    images = noise(2, 128, 100, fade=0.5)
    p = draw(Views(size=224, a=ALWAYS), 0, 0, 0, torch.arange(2), 128, 100)
    assert differs(shuffled, images, p, 224) < CLOSE


def test_a_view_does_not_depend_on_its_batch(fused: Any) -> None:
    images, p = noise(5, 40, 40), draw(Views(size=32), 0, 0, 0, torch.arange(5), 40, 40)
    whole = made(fused, images, p, 32)
    rows = torch.tensor([4, 1, 1])
    assert torch.equal(made(fused, images[rows], p[rows], 32), whole[rows])


def test_an_empty_batch_launches_nothing(shuffled: Any) -> None:
    images, ids = torch.zeros(0, 96, 96, 3, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
    empty = fused_views.make(shuffled, images, ids, both(Views(size=48)), 0, 0, *PLAIN)
    assert [tuple(x.shape) for x in empty] == [(0, 3, 48, 48)] * 2
    assert shuffled.launches == []


def test_a_canvas_in_shared_memory_is_known_as_such() -> None:
    """In what NVRTC makes of it: a load from what might be any memory is slower, and takes longer addresses."""
    try:
        text = build.compile_source(build.source("views"), "views", "compute_90").decode()
    except build.UnavailableError as why:
        pytest.skip(str(why))
    entries = {part.split("(")[0]: part for part in text.split(".entry ")[1:]}
    assert "ld.shared.f32" in entries["views_apply"]
    for name in ("views_draw", "views_apply", "views_apply_large"):
        spaces = set(re.findall(r"\b(?:ld|st)\.(\w+)", entries[name]))
        assert spaces <= {"shared", "global", "param"}, name


# ------------------------------------------------------------------------------------------------------- other kinds


def test_large_and_small_crops(shuffled: Any) -> None:
    """As SwAV has them, the small ones among the large ones here: a launch for each size, and each at its place."""
    large, small = Views(size=48, scale=(0.14, 1.0)), Views(size=24, scale=(0.05, 0.14))
    kinds = [both(small)[0], *both(large), *[both(small)[1]] * 5]
    images, ids = noise(3, 96, 96), torch.arange(3) + 5
    ours = fused_views.make(shuffled, images, ids, kinds, 3, 1, MEAN, STD, torch.float32)
    assert shuffled.launches == ["views_draw", "views_apply", "views_apply"]
    theirs = views.make(images, ids, kinds, 3, 1, MEAN, STD)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.is_contiguous(memory_format=torch.channels_last)
        assert (a - b).abs().max() < 2e-5
    assert not torch.equal(ours[3], ours[4])


def test_weak_and_strong_views(shuffled: Any) -> None:
    weak = Kind(Views(size=32, scale=(0.8, 1.0)), View(flip=0.5, jitter=0, gray=0, blur=0))
    strong = Kind(Views(size=32, scale=(0.2, 1.0), brightness=0.8), View(jitter=1))
    images, ids = noise(4, 40, 40), torch.arange(4)
    ours = fused_views.make(shuffled, images, ids, [weak, strong], 0, 0, *PLAIN, torch.float32)
    assert shuffled.launches == ["views_draw", "views_apply"]
    for a, b in zip(ours, views.make(images, ids, [weak, strong], 0, 0, *PLAIN), strict=True):
        assert (a - b).abs().max() < CLOSE


# ---------------------------------------------------------------------------------------------------------- on a GPU


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("ranges", "height", "width"), ODD)
def test_a_gpu_draws_the_same_bits(ranges: Views, height: int, width: int) -> None:
    device = torch.device("cuda", 0)
    found, ids = kernels.load("views", device), torch.arange(20_000) * 77_777
    assert found is not None, kernels.why_not("views", device)
    table = fused_views.draw(found, both(ranges), (0, 1), 5, 1, ids.to(device), height, width).cpu()
    for view in (0, 1):
        assert same(fused_views.unpack(table[view]), draw(ranges, view, 5, 1, ids, height, width))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("size", "side"), [(32, 32), (48, 96), (64, 96), (96, 96), (96, 57), (128, 128), (224, 128)])
def test_a_gpu_makes_the_same_views_without_a_wait(size: int, side: int) -> None:
    images, ids = noise(512, side, side, fade=0.5).cuda(), torch.arange(512, device="cuda")
    for ranges in (Views(size=size), replace(STRONG, size=size, a=ALWAYS)):
        theirs = views.pair(images, ids, ranges, 0, 0, *PLAIN, by="reference")
        views.pair(images, ids, ranges, 0, 0, *PLAIN, by="fused")  # compiles, and makes the constants
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours = views.pair(images, ids, ranges, 0, 0, *PLAIN, by="fused")
            rounded = views.pair(images, ids, ranges, 0, 0, *PLAIN, dtype=torch.bfloat16, by="fused")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for a, b, c in zip(ours, theirs, rounded, strict=True):
            assert (a - b).abs().max() < 1e-5
            assert torch.equal(c, a.bfloat16())
            assert c.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@gpu
def test_a_gpu_s_views_do_not_depend_on_their_batch_and_come_again() -> None:
    images, ids = noise(300, 96, 96).cuda(), torch.arange(300, device="cuda")
    whole = views.pair(images, ids, Views(), 0, 0, *PLAIN, by="fused")
    part = views.pair(images[100:103], ids[100:103], Views(), 0, 0, *PLAIN, by="fused")
    again = views.pair(images, ids, Views(), 0, 0, *PLAIN, by="fused")
    for a, b, c in zip(whole, part, again, strict=True):
        assert torch.equal(a[100:103], b)
        assert torch.equal(a, c)
