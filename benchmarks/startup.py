"""How long from the command to the first step, at a first start and after a preemption, and where does the time go?

    python benchmarks/startup.py [--quick] [--rounds 5]

In turns: the launcher with a rank that begins; the same command again, which goes on from the checkpoint that the first
has left when it was told to stop; a minimal script of torchvision's ImageFolder, a DataLoader and timm's network up to
its first step; the same with lightly's transform and loss; and `import torch` alone, below which none can be. On a GPU
Wide-ResNet-50-2 at batch 512, compiled and not; else ResNet-18 at batch 16. Wall seconds by phase, and the CPU seconds
of all processes together: what counts where several ranks share cores. Five minutes on two cores; on a GPU not
timed yet."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from barlow.data.shapes import render
from barlow.data.writing.plan import Request
from barlow.data.writing.write import write
from measure import ROOT, Row, asked, device, peer, ratio, report, significant, spread

HERE = Path(__file__).resolve().parent
SIZE = 96
SMALL = "--model.backbone resnet18 --model.projector 512 512 --batch-size 16 --device cpu"
LARGE = "--model.backbone wide_resnet50_2 --model.projector 8192 8192 8192 --batch-size 512 --device cuda"
SAME = "shapes --data.source= --data.splits train --views.size 96 --model.width 1 --knn.every-epochs 0"
SAME += " --knn.no-baselines --log-every 1 --checkpoint.every-minutes 0 --cluster local"
LATER = "a later step"
PHASES = "launcher", "python", "imports", "join", "build", "preflight", "data", "restore", "begin", "first step", LATER


@dataclass
class Start:
    """What one start took, in seconds of the clock and of all CPUs together; of ours also each phase."""

    wall: float
    cpu: float
    phases: dict[str, tuple[float, float]] = field(default_factory=dict)


def main() -> None:
    parser = asked(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="starts of each kind")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        kinds = kinds_of(Path(folder), given.quick)
        found: dict[str, list[Start]] = {name: [] for name in kinds}
        for _ in range(1 if given.quick else given.rounds):
            for name, start in kinds.items():
                found[name].append(start())
    first = next(name for name in found if name.startswith("first start"))
    rows = [row for name, starts in found.items() for row in rows_of(name, starts, found[first])]
    report("startup", rows, given.quick, ("torchvision", "timm", "lightly"))


def kinds_of(folder: Path, quick: bool) -> dict[str, Callable[[], Start]]:
    """In the order of a turn: a run that goes on has begun before."""
    gpu = device().type == "cuda"
    batch, model = (512, "wide_resnet50_2") if gpu else (16, "resnet18")
    make_images(folder, 2 * batch if quick else 8 * batch)
    kinds: dict[str, Callable[[], Start]] = {}
    for name, flags in {"": "", ", not compiled": "--speed.compile off"}.items() if gpu else [("", "")]:
        pretrain = Pretrain(folder, f"{LARGE if gpu else SMALL} {flags}")
        kinds |= {f"first start{name}": pretrain.begin, f"resumption{name}": pretrain.go_on}
    script = [str(HERE / "minimal.py"), str(folder / "images" / "train"), str(batch), model]
    kinds["timm, ImageFolder"] = lambda: until_step(script)
    if not quick:
        if peer("lightly"):
            kinds["the same with lightly"] = lambda: until_step([*script, "lightly"])
        kinds["import torch"] = lambda: until_step(["-c", "import time, torch; print('step', time.monotonic())"])
    return kinds


def make_images(folder: Path, count: int) -> None:
    """The same images as files, and as shards."""
    from PIL import Image

    for number in range(count):
        place = folder / "images" / "train" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(number, 0, SIZE)[0]).save(place / f"{number}.jpg", quality=95)
    write(Request(f"folder:{folder / 'images'}", folder / "shards"))


class Pretrain:
    """Our command, given for a new run or again for the last one."""

    def __init__(self, folder: Path, flags: str) -> None:
        self.runs, self.made = folder / "runs", 0
        self.words = [*SAME.split(), *flags.split()]
        self.words += ["--data.dir", str(folder / "shards"), "--runs-dir", str(self.runs)]

    def begin(self) -> Start:
        self.made += 1
        return self.go_on()

    def go_on(self) -> Start:
        name = f"{len(self.words)}-{self.made}"
        began = time.monotonic()
        done = launch([*self.words, "--run", name])
        of_launcher = json.loads(done.splitlines()[-1])["cpu"]
        last = json.loads((self.runs / name / "phases_0.jsonl").read_text().splitlines()[-1])
        wall = {"launcher": last["began"] - began} | last["wall"]
        phases = {
            name: (wall[name], (last["cpu"] | {"launcher": of_launcher})[name]) for name in PHASES if name in wall
        }
        before = [phases[name] for name in phases if name != LATER]
        return Start(sum(wall for wall, _ in before), sum(cpu for _, cpu in before), phases)


def launch(words: list[str], **more: str) -> str:
    """The launcher of phases.py to its end; what it says."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), **more}
    done = subprocess.run(
        [sys.executable, str(HERE / "phases.py"), *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if '"cpu"' not in done.stdout:
        raise SystemExit(f"the run came to no step:\n{done.stdout}{done.stderr}")
    return done.stdout


def until_step(words: list[str]) -> Start:
    cpu, began = cpu_of_children(), time.monotonic()
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as script:
        assert script.stdout is not None
        assert script.stdin is not None
        told = next((line for line in script.stdout if line.startswith("step ")), "")
        script.stdin.close()
    if not told:
        raise SystemExit(f"{words[0]} came to no step")
    return Start(float(told.split()[1]) - began, cpu_of_children() - cpu, {})


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def rows_of(name: str, starts: list[Start], base: list[Start]) -> list[Row]:
    """The whole, then its phases."""
    whole: Row = {"what": name, "phase": "all", **spread([start.wall for start in starts], "s", 1.0)}
    whole |= {"cpu_s": significant(median(start.cpu for start in starts))}
    for column, of in {"times_first_start": "wall", "cpu_times_first_start": "cpu"}.items():
        whole[column] = ratio([getattr(start, of) for start in starts], [getattr(start, of) for start in base])
    rows = [whole]
    for phase in starts[0].phases:
        taken = [start.phases[phase] for start in starts]
        rows.append({"what": name, "phase": phase, **spread([wall for wall, _ in taken], "s", 1.0)})
        rows[-1]["cpu_s"] = significant(median(cpu for _, cpu in taken))
    return rows


if __name__ == "__main__":
    main()
