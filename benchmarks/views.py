"""How fast do both views of a batch come: ours, and what else makes such views on the same device?

    OMP_WAIT_POLICY=passive python benchmarks/views.py [--quick]

uint8 images are on the device; timed is a pair of normalised views of each, by the Barlow Twins recipe: our kernel
(bfloat16), our reference in torch's operations, kornia, torchvision's v2 transforms, and on a CPU also PIL, an image at
a time. `parameters` says whose they are: torchvision draws them once for a batch, which is another and weaker
augmentation, so it also runs image by image. Not the same on all: only ours has a counter for every sample, and PIL's
blur is an approximation. PIL and torchvision run in one process here: what a DataLoader's workers make of the cores is
another benchmark's question. Two minutes on a CPU, on a GPU not timed yet; --quick some seconds. (Passive: where cores
are shared, torch's threads that spin while they wait cost all but PIL a hundred times as much.)
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import nn
from torchvision.transforms import InterpolationMode, v2

from barlow import config, kernels
from barlow.data.views import pair, way
from measure import Row, asked, device, in_turns, peer, ratio, report, significant, spread

MEAN, STD = (0.48, 0.45, 0.40), (0.31, 0.27, 0.24)
TAPS = 17  # of the blur, as ours has
BICUBIC = InterpolationMode.BICUBIC
Run = Callable[[], object]


def main(quick: bool) -> None:
    here = device()
    on_gpu = here.type == "cuda"
    kornia = peer("kornia")
    print(way(here))
    rounds, calls = (1 if quick else 10 if on_gpu else 7), (5 if on_gpu else 1)
    rows: list[Row] = []
    whole = [(32, 512), (96, 512), (224, 128)] if on_gpu else [(32, 64), (96, 32)]
    for size, batch in [(32, 8)] if quick else whole:
        runs = runs_of(size, batch, here, kornia)
        seconds = in_turns({name: run for name, (_, run) in runs.items()}, rounds, calls, warmup=1)
        first = next(iter(runs))
        for name, (parameters, _) in runs.items():
            rate = significant(batch / sorted(seconds[name])[len(seconds[name]) // 2])
            rows.append(
                {"size": size, "batch": batch, "device": here.type, "views": name, "parameters": parameters}
                | {"images_per_sec": rate, "times_as_long": ratio(seconds[name], seconds[first])}
                | spread(seconds[name])
            )
    report("views", rows, quick, ("torchvision", "kornia", "pillow"))


def runs_of(size: int, batch: int, here: torch.device, kornia: ModuleType | None) -> dict[str, tuple[str, Run]]:
    """Whose parameters are drawn, and what to run; the first is what the others are compared with."""
    images = torch.randint(256, (batch, size, size, 3), dtype=torch.uint8).to(here)
    ids, planes = torch.arange(batch, device=here), images.permute(0, 3, 1, 2)
    views = config.Views(size=size)
    runs: dict[str, tuple[str, Run]] = {}
    if kernels.load("views", here):
        runs["ours, fused"] = "a sample", lambda: pair(images, ids, views, 0, 0, MEAN, STD, torch.bfloat16, "fused")
    runs["ours, reference"] = "a sample", lambda: pair(images, ids, views, 0, 0, MEAN, STD, by="reference")
    if kornia:
        theirs = [in_kornia(kornia, views, view).to(here) for view in (views.a, views.b)]
        runs["kornia"] = "a sample", lambda: [each(planes.float() / 255) for each in theirs]
    both = [in_torchvision(views, view, [v2.ToDtype(torch.float32, scale=True)]) for view in (views.a, views.b)]
    runs["torchvision v2, batch"] = "a batch", lambda: [each(planes) for each in both]
    runs["torchvision v2, images"] = "a sample", lambda: [torch.stack([each(x) for x in planes]) for each in both]
    if here.type == "cpu":
        pictures = [v2.functional.to_pil_image(x) for x in planes]
        tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        in_pil = [in_torchvision(views, view, tensor) for view in (views.a, views.b)]
        runs["torchvision v2, PIL"] = "a sample", lambda: [torch.stack([each(x) for x in pictures]) for each in in_pil]
    return runs


def in_torchvision(views: config.Views, view: config.View, last: list[nn.Module]) -> nn.Module:
    """In 8 bits up to the last operations, as torchvision advises."""
    strength = (views.brightness, views.contrast, views.saturation, views.hue)
    return v2.Compose(
        [
            v2.RandomResizedCrop(views.size, views.scale, views.ratio, BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(view.flip),
            v2.RandomApply([v2.ColorJitter(*strength)], view.jitter),
            v2.RandomGrayscale(view.gray),
            v2.RandomApply([v2.GaussianBlur(TAPS, views.sigma)], view.blur),
            v2.RandomSolarize(128, view.solarize),
            *last,
            v2.Normalize(MEAN, STD),
        ]
    )


def in_kornia(kornia: ModuleType, views: config.Views, view: config.View) -> nn.Sequential:
    """With parameters of its own for each sample, though one order of the colours for all of a batch."""
    A = kornia.augmentation
    strength = (views.brightness, views.contrast, views.saturation, views.hue)
    return nn.Sequential(
        A.RandomResizedCrop((views.size, views.size), views.scale, views.ratio, resample="bicubic"),
        A.RandomHorizontalFlip(p=view.flip),
        A.ColorJiggle(*strength, p=view.jitter),
        A.RandomGrayscale(p=view.gray),
        A.RandomGaussianBlur((TAPS, TAPS), views.sigma, p=view.blur),
        A.RandomSolarize(thresholds=0.0, additions=0.0, p=view.solarize),
        A.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )


if __name__ == "__main__":
    main(asked(__doc__).parse_args().quick)
