"""Every operation gives PIL's bits, at every strength it can have, whatever the other images of the batch get."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from barlow.data import operations
from barlow.data.operations import Op, Policy, apply
from barlow.data.resample import METHODS

SIZES = ((32, 32), (96, 96), (33, 47))
RESAMPLING = {name: Image.Resampling[name.upper()] for name in METHODS}
LEVELS = np.linspace(0, 1, 35, dtype=np.float32).tolist()
FACTORS = [0.0, 1.0, *(np.linspace(0, 2, 29, dtype=np.float32) + np.float32(0.013)).tolist()]


@lru_cache(maxsize=8)
def pictures(height: int, width: int, n: int = 8) -> Tensor:
    """uint8 [n, 3, h, w]: smooth ones, noise, few values, a narrow range, one colour, black and white."""
    generator = torch.Generator().manual_seed(height * width)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    x = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) * 255
    x[1] = torch.randint(0, 256, x[1].shape, generator=generator)
    x[2] = torch.randint(0, 4, x[2].shape, generator=generator) * 85
    x[3] = 100 + x[3] / 9
    x[4] = torch.tensor([0.0, 255.0, 77.0])[:, None, None]
    x[5] = (x[5] > 128) * 255
    x[6, :, 0, 0], x[6, :, 1:] = 9, 10  # two values
    return x.to(torch.uint8)


def policy(n: int, op: Op | Tensor, amount: float | Tensor, method: int | Tensor = 0, at: float | Tensor = 0) -> Policy:
    """One operation an image."""
    return Policy(
        op=torch.as_tensor(op).expand(n)[:, None],
        amount=torch.as_tensor(amount, dtype=torch.float32).expand(n)[:, None],
        method=torch.as_tensor(method).expand(n)[:, None],
        centre=torch.as_tensor(at, dtype=torch.float32).expand(n, 2)[:, None],
    )


def in_pil(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    changed = [np.array(change(Image.fromarray(x.permute(1, 2, 0).numpy()))) for x in images]
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2)


def blended(change: Callable[[Image.Image], Image.Image]) -> Callable[[float, Image.Image], Image.Image]:
    return lambda share, image: Image.blend(image, change(image), share)


def sheared(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def central(image: Image.Image, share: float, method: str = "bicubic") -> Image.Image:
    w, h = image.size
    x, y = round((1 - share) * (w / 2)), round((1 - share) * (h / 2))
    return image.crop((x, y, w - x, h - y)).resize((w, h), RESAMPLING[method])


def square(share: float, image: Image.Image) -> Image.Image:
    half, middle = int(share * min(image.size) / 2), (image.width // 2, image.height // 2)
    (x0, y0), (x1, y1) = [[m + s * half for m in middle] for s in (-1, 1)]
    image.paste((127, 127, 127), (x0, y0, x1, y1))
    return image


SHIFTS = (np.arange(-35, 36, dtype=np.float32) / 100).tolist()
PIL: dict[Op, tuple[list[float], Callable[[float, Image.Image], Image.Image]]] = {
    Op.IDENTITY: ([0.0, 1.0], lambda _, image: image),
    Op.AUTOCONTRAST: (LEVELS, blended(ImageOps.autocontrast)),
    Op.EQUALIZE: (LEVELS, blended(ImageOps.equalize)),
    Op.INVERT: (LEVELS, blended(ImageOps.invert)),
    Op.POSTERIZE: ([k + 0.3 for k in range(1, 8)] + [8.0], lambda bits, image: ImageOps.posterize(image, int(bits))),
    Op.SOLARIZE: (LEVELS, lambda share, image: ImageOps.solarize(image, int(share * 256))),
    Op.BRIGHTNESS: (FACTORS, lambda x, image: ImageEnhance.Brightness(image).enhance(x)),
    Op.CONTRAST: (FACTORS, lambda x, image: ImageEnhance.Contrast(image).enhance(x)),
    Op.COLOR: (FACTORS, lambda x, image: ImageEnhance.Color(image).enhance(x)),
    Op.SHARPNESS: (FACTORS, lambda x, image: ImageEnhance.Sharpness(image).enhance(x)),
    Op.SMOOTH: (LEVELS, blended(lambda image: image.filter(ImageFilter.SMOOTH))),
    Op.BLUR: (LEVELS, blended(lambda image: image.filter(ImageFilter.BLUR))),
    Op.ROTATE: ([float(x) for x in range(-45, 46)], lambda x, image: image.rotate(x)),
    Op.SHEAR_X: (SHIFTS, lambda x, image: sheared(image, (1, x, 0, 0, 1, 0))),
    Op.SHEAR_Y: (SHIFTS, lambda x, image: sheared(image, (1, 0, 0, x, 1, 0))),
    Op.TRANSLATE_X: (SHIFTS, lambda x, image: sheared(image, (1, 0, np.floor(x * image.width + 0.5), 0, 1, 0))),
    Op.TRANSLATE_Y: (SHIFTS, lambda x, image: sheared(image, (1, 0, 0, 0, 1, np.floor(x * image.height + 0.5)))),
    Op.RESCALE: ([0.5 + level / 2 for level in LEVELS], lambda x, image: central(image, x)),
    Op.CUTOUT: ([level / 2 for level in LEVELS], square),
}


@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.name)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_an_operation_is_pil_s_at_every_strength(op: Op, height: int, width: int) -> None:
    images = pictures(height, width)
    amounts, change = PIL[op]
    method = METHODS.index("bicubic")
    for amount in (float(np.float32(x)) for x in amounts):
        ours = apply(images, policy(len(images), op, amount, method, at=0.5))
        assert torch.equal(ours, in_pil(images, partial(change, amount))), amount


@pytest.mark.parametrize("method", METHODS)
def test_rescaling_is_pil_s_with_each_of_its_filters(method: str) -> None:
    for height, width in SIZES:
        images = pictures(height, width)
        for share in np.linspace(0.5, 1, 9, dtype=np.float32).tolist():
            ours = apply(images, policy(len(images), Op.RESCALE, share, METHODS.index(method)))
            assert torch.equal(ours, in_pil(images, partial(central, method=method, share=share))), share


def test_a_translation_by_pixels_and_parts_of_them_goes_to_the_nearest() -> None:
    images = pictures(32, 32)
    for pixels in np.arange(-9.9, 10, 0.3):
        ours = apply(images, policy(len(images), Op.TRANSLATE_X, pixels / 32))
        assert torch.equal(ours, in_pil(images, partial(sheared, matrix=(1, 0, pixels, 0, 1, 0))))


@pytest.mark.parametrize("side", [4, 5, 6, 8])
def test_small_images_are_no_exception(side: int) -> None:
    images = pictures(side, side)
    for op, (amounts, change) in PIL.items():
        amount = amounts[2 * len(amounts) // 3]
        ours = apply(images, policy(len(images), op, amount, METHODS.index("bicubic"), at=0.5))
        assert torch.equal(ours, in_pil(images, partial(change, amount))), op.name


def mixed(n: int, depth: int = 2, seed: int = 0) -> Policy:
    """Any operations, with amounts of which most mean something to each."""
    generator = torch.Generator().manual_seed(seed)
    op = torch.randint(0, len(Op), (n, depth), generator=generator)
    amount = torch.rand(n, depth, generator=generator)
    amount = torch.where(op == Op.ROTATE, amount * 90 - 45, amount)
    amount = torch.where(op == Op.POSTERIZE, amount * 8 + 1, amount)
    amount = torch.where((op >= Op.SHEAR_X) & (op <= Op.TRANSLATE_Y), amount * 0.6 - 0.3, amount)
    amount = torch.where(op == Op.RESCALE, amount / 2 + 0.5, amount)
    method = torch.randint(0, len(METHODS), (n, depth), generator=generator)
    return Policy(op, amount, method, torch.rand(n, depth, 2, generator=generator))


def many(n: int, side: int = 32) -> Tensor:
    return pictures(side, side).repeat(n // 8 + 1, 1, 1, 1)[:n]


def test_what_an_image_gets_does_not_depend_on_its_batch() -> None:
    images, p = many(300), mixed(300)
    whole = apply(images, p)
    assert torch.equal(whole, torch.cat([apply(images[:150], p[:150]), apply(images[150:], p[150:])]))
    rows = torch.tensor([299, 7, 64, 63, 7])
    assert torch.equal(apply(images[rows], p[rows]), whole[rows])
    assert not torch.equal(whole, images)


def test_operations_come_one_after_another() -> None:
    images, p = many(200), mixed(200, depth=3)
    x = images
    for k in range(3):
        x = apply(x, p[:, k : k + 1])
    assert torch.equal(apply(images, p), x)


def test_what_is_given_stays_as_it_is() -> None:
    images, p = many(100), mixed(100)
    before = images.clone()
    apply(images, p)
    assert torch.equal(images, before)
    assert apply(images[:0], p[:0]).shape == (0, 3, 32, 32)


# ---------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.parametrize("side", [32, 48])
def test_the_way_of_a_gpu_gives_the_same(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    images, p = many(400, side), mixed(400)
    expected = apply(images, p)
    monkeypatch.setattr(operations, "may_ask", lambda x: False)
    assert torch.equal(apply(images, p), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("side", [32, 96, 128])
def test_a_gpu_gives_the_same_bits_without_a_wait(side: int) -> None:
    images, p = many(1000, side), mixed(1000)
    there = images.cuda(), Policy(p.op.cuda(), p.amount.cuda(), p.method.cuda(), p.centre.cuda())
    apply(*there)  # makes the constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = apply(*there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(ours.cpu(), apply(images, p))
