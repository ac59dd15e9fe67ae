"""How fast do batches come, and what would a user pick instead?

    python benchmarks/loader.py [--quick] [--threads 1 4]

On shards and JPEG files of the same 5,000 shapes (96 px; JPEG of quality 95, and raw), to a consumer that does nothing,
random batches of 512: as uint8 from our Loader and cache, FFCV's own Loader, torchvision's ImageFolder in a DataLoader,
and NVIDIA's DALI where it is installed; as two augmented views from our feed (which the device makes, a CPU in one
thread) and from the recipe of the Barlow Twins reference (PIL, in a DataLoader's workers). `time_of_ours` is the time
that an image takes over what it takes our Loader, or our feed, in the same round. Then the time from starting Python to
the first batch. Ten minutes on two cores, 200 MB of disk. --quick: a few JPEG images, fifteen seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from barlow import config
from barlow.data.cache import cached
from barlow.data.feed import feed
from barlow.data.loader import Batch, Loader
from barlow.data.shapes import render
from barlow.data.shards import Index, read_index
from barlow.data.views import pair
from barlow.data.writing.plan import Request
from barlow.data.writing.write import write
from measure import asked, device, in_turns, peer, ratio, report, significant, spread

SIZE, SPLIT = 96, "train"
Run = Callable[[], None]


@dataclass(frozen=True)
class Data:
    folder: Path
    batch: int

    @property
    def index(self) -> Index:
        return read_index(self.folder)

    @property
    def files(self) -> str:
        """A folder a class of the very bytes that are in the shard."""
        return str(self.folder / "files")

    def positions(self, n: int) -> list[np.ndarray]:
        """Of n random batches: all images before any again."""
        count = self.index.split(SPLIT).count
        return np.split(np.random.default_rng(0).permutation(np.arange(n * self.batch) % count), n)


def main() -> None:
    parser = asked(__doc__)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--threads", type=int, nargs="+", default=sorted({1, min(4, cores), cores}), help="numbers to compare at"
    )
    parser.add_argument("--first-batch", nargs=4, metavar=("LOADER", "FOLDER", "BATCH", "THREADS"), help="for children")
    arguments = parser.parse_args()
    if arguments.first_batch:
        name, folder, batch, threads = arguments.first_batch
        LOADERS[name].make(Data(Path(folder), int(batch)), int(threads), 1)()
        return
    quick = arguments.quick
    threads = [min(2, cores)] if quick else arguments.threads
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for encoding in ("jpeg",) if quick else ("jpeg", "raw"):
            data = Data(prepare(Path(folder), encoding, 64 if quick else 5000), 16 if quick else 512)
            for count in threads:
                rows += compare(data, count, quick, starts=3 if count == max(threads) and not quick else 0)
    packages = ("ffcv", "numba", "numpy", "torchvision", "pillow", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
    report("loader", rows, quick, packages)


def prepare(root: Path, encoding: str, count: int) -> Path:
    """Shards of shapes; beside those of JPEG their files, as ImageFolder reads them."""
    source, out = root / "pictures", root / encoding
    if not source.exists():
        (source / "all").mkdir(parents=True)
        for i in range(count):
            Image.fromarray(render(i, 0, SIZE)[0]).save(source / "all" / f"{i}.bmp")
    write(Request(f"folder:{source}", out, jpeg_quality=95 if encoding == "jpeg" else None))
    if encoding == "jpeg":
        loader = Loader(read_index(out), [SPLIT], workers=1)  # whose files stay mapped while it is there
        (out / "files" / "all").mkdir(parents=True)
        for i, (address, size) in enumerate(zip(loader.samples.addresses, loader.samples.sizes, strict=True)):
            (out / "files" / "all" / f"{i}.jpg").write_bytes(ctypes.string_at(int(address), int(size)))
    return out


def compare(data: Data, threads: int, quick: bool, starts: int) -> list[dict[str, object]]:
    """A row for each loader that can read this encoding."""
    encoding = data.index.encoding
    chosen = {name: loader for name, loader in LOADERS.items() if loader.can(encoding)}
    runs: dict[str, Run] = {}
    images: dict[str, int] = {}
    busy: dict[str, list[float]] = {name: [] for name in chosen}
    for name, loader in chosen.items():  # ours has run before FFCV's is made, which edits numba's type of byte arrays
        n = threads * (1 if quick else loader.batches * (3 if encoding == "raw" else 1))
        images[name] = n * data.batch
        runs[name] = partial(clocked, loader.make(data, threads, n), busy[name])
        runs[name]()
    seconds = in_turns(runs, rounds=1 if quick else 8, warmup=0)
    each = {name: [value / images[name] for value in seconds[name]] for name in runs}
    rows = []
    for name, loader in chosen.items():
        rates = spread([1 / value for value in each[name]], "images_per_sec", 1)
        ours = each["ours" if loader.gives == "uint8" else "ours, fed"]
        cpu = statistics.median(busy[name][1:]) / images[name]
        begun = [first_batch(name, data, threads) for _ in range(starts)]
        row: dict[str, object] = {"gives": loader.gives, "encoding": encoding, "threads": threads, "loader": name}
        row |= {**rates, "time_of_ours": ratio(each[name], ours), "cpu_us_per_image": significant(cpu * 1e6)}
        rows.append(row | {"first_batch_s": round(statistics.median(begun), 1) if begun else ""})
        if not quick:
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    for run in runs.values():
        del run
    return rows


def clocked(run: Run, busy: list[float]) -> None:
    began = cpu_seconds()
    run()
    busy.append(cpu_seconds() - began)


def cpu_seconds() -> float:
    """Of this process and of its workers."""
    ticks = 0
    for worker in multiprocessing.active_children():
        with contextlib.suppress(OSError):  # it has just ended
            numbers = Path(f"/proc/{worker.pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(numbers[11]) + int(numbers[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def first_batch(name: str, data: Data, threads: int) -> float:
    """Seconds of a process of its own, from the start of Python, imports and compilation included."""
    arguments = ["--first-batch", name, str(data.folder), str(data.batch), str(threads)]
    start = time.perf_counter()
    subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


# ----------------------------------------------------------------------------------------------------- the loaders


def ours(data: Data, threads: int, n: int, cache: str = "none") -> Run:
    loader = Loader(data.index, [SPLIT], workers=threads, pin=device().type == "cuda")
    source = cached(loader, cache, device(), 1 << 40, lambda done, count: None)

    def run() -> None:
        for _ in source.batches(data.positions(n)):
            pass

    return run


def ours_fed(data: Data, threads: int, n: int) -> Run:
    """Two views on the device: on a GPU from pinned memory, one batch ahead."""
    index, views = data.index, config.Views(size=SIZE)
    loader = Loader(index, [SPLIT], workers=threads, pin=device().type == "cuda")

    def make(batch: Batch, at: int) -> list[torch.Tensor]:
        return pair(batch.images, batch.ids, views, 0, at, index.mean, index.std)

    def run() -> None:
        torch.set_num_threads(1)  # each epoch of FFCV's sets it to its own
        for _ in feed(loader.batches(data.positions(n)), make, device(), 0):
            pass

    return run


def ffcv(data: Data, threads: int, n: int) -> Run:
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader as FfcvLoader
    from ffcv.loader import OrderOption
    from ffcv.transforms import Squeeze, ToTensor

    split = data.index.split(SPLIT)
    numbers = [IntDecoder(), ToTensor(), Squeeze()]
    loader = FfcvLoader(
        str(split.files[0].path),
        data.batch,
        num_workers=threads,
        order=OrderOption.RANDOM,
        indices=np.arange(n * data.batch) % split.count,
        pipelines={"image": [SimpleRGBImageDecoder(), ToTensor()], "label": numbers, "id": numbers},
    )

    def run() -> None:
        for _ in loader:
            pass

    return run


def torchvision(data: Data, threads: int, n: int, transform: Callable[[Any], Any]) -> Run:
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(data.files, transform)
    sampler = RandomSampler(folder, replacement=True, num_samples=n * data.batch)
    pin = device().type == "cuda"
    loader = DataLoader(
        folder, data.batch, sampler=sampler, num_workers=threads, pin_memory=pin, persistent_workers=True
    )

    def run() -> None:
        for _ in loader:
            pass

    return run


def pixels(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def reference_views(data: Data, threads: int, n: int) -> Run:
    """The recipe of the Barlow Twins reference, at 96 px: PIL in every step."""
    from torchvision import transforms as t

    def view(blur: float, solarize: float) -> Callable[[Any], torch.Tensor]:
        jitter = t.ColorJitter(0.4, 0.4, 0.2, 0.1)
        soft = t.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(0.1, 2)))))
        steps = [t.RandomResizedCrop(SIZE, interpolation=t.InterpolationMode.BICUBIC), t.RandomHorizontalFlip()]
        steps += [t.RandomApply([jitter], 0.8), t.RandomGrayscale(0.2), t.RandomApply([soft], blur)]
        steps += [t.RandomApply([t.Lambda(ImageOps.solarize)], solarize), t.ToTensor()]
        return t.Compose([*steps, t.Normalize(data.index.mean, data.index.std)])

    first, second = view(1.0, 0.0), view(0.1, 0.2)
    return torchvision(data, threads, n, lambda image: (first(image), second(image)))


def dali(data: Data, threads: int, n: int, where: str) -> Run:
    """Its CPU decoder, or with "mixed" the GPU's."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=data.batch, num_threads=threads, device_id=0 if where == "mixed" else None)
    def pipeline() -> Any:
        encoded, labels = fn.readers.file(file_root=data.files, random_shuffle=True)
        return fn.decoders.image(encoded, device=where, output_type=types.RGB), labels

    built = pipeline()
    built.build()

    def run() -> None:
        for _ in range(n):
            built.run()[0].as_tensor()

    return run


@dataclass(frozen=True)
class Contestant:
    make: Callable[[Data, int, int], Run]
    batches: int
    """A round, for each thread."""
    gives: str = "uint8"
    raw: bool = False
    """It reads raw shards too."""
    needs: str = ""
    """A package, or a GPU."""

    def can(self, encoding: str) -> bool:
        if self.needs == "cuda":
            return device().type == "cuda"
        return (self.raw or encoding != "raw") and (not self.needs or peer(self.needs) is not None)


LOADERS = {
    "ours": Contestant(ours, 40, raw=True),
    "ours, cache ram": Contestant(partial(ours, cache="ram"), 120),
    "ours, cache gpu": Contestant(partial(ours, cache="gpu"), 120, needs="cuda"),
    "ours, fed": Contestant(ours_fed, 40 if torch.cuda.is_available() else 1, gives="two views"),
    "ffcv": Contestant(ffcv, 40, raw=True),
    "torchvision, PIL": Contestant(partial(torchvision, transform=pixels), 4),
    "torchvision, reference views": Contestant(reference_views, 1, gives="two views"),
    "dali, on CPU": Contestant(partial(dali, where="cpu"), 20, needs="nvidia.dali"),
}
if torch.cuda.is_available():
    LOADERS["dali, on GPU"] = Contestant(partial(dali, where="mixed"), 20, needs="nvidia.dali")


if __name__ == "__main__":
    main()
