"""How fast is a step from views that lie on the device, and what does each of our measures bring?

    python benchmarks/step.py [--quick] [--profile] [--only NAME ...]

Forward, loss, backward and optimizer, in turns in one process: the reference recipe's step (benchmarks/
reference_recipe.py), the same with lightly's loss, then ours with one measure after another. `ratio` is the rate over
the reference recipe's in the same round. cuDNN is set as each has it: free to time its algorithms in the reference
recipe, deterministic in ours. `tuned by timing` lets inductor choose reductions by measuring, `cuDNN free to choose`
lets cuDNN: what it costs us that an interrupted run has the bits of another. With --profile also where the time of the
last one goes, by kind of kernel (GPU only). Two minutes on two CPU cores; not timed on a GPU yet, where the
batch is halved if its memory is less than 120 GB. A setting is written as soon as it is measured; --only measures
those whose name begins so. --quick: ten seconds, and writes no file.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from barlow import config, kernels
from barlow.config import Speed
from barlow.data.views import pair
from barlow.engine import speed
from barlow.errors import UserError
from barlow.models import backbone as backbones
from barlow.models.resnet import choose_norms
from barlow.objectives.barlow_twins import BarlowTwins
from barlow.optim.groups import weights_and_biases
from barlow.optim.lars import Lars
from measure import Row, asked, device, in_turns, peer, ratio, report, significant, spread
from reference_recipe import Step, Views, as_published, as_trained

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Run = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    name: str
    model: config.Model
    batch: int
    size: int


GPU = (
    Setting("WRN-50-2 small 8192x3", config.Model("wide_resnet50_2", "small", projector=(8192,) * 3), 512, 96),
    Setting("ResNet-34 dense 1024x3", config.Model("resnet34", "dense", projector=(1024,) * 3), 1024, 96),
    Setting("ResNet-50 imagenet 8192x3", config.Model("resnet50", "imagenet", projector=(8192,) * 3), 1024, 96),
    Setting("ResNet-18 dense 2048x3", config.Model("resnet18", "dense", projector=(2048,) * 3), 1024, 96),
)
CPU = (Setting("ResNet-18 small 512x3", config.Model("resnet18", "small", projector=(512,) * 3), 32, 96),)
QUICK = (Setting("ResNet-10 small 64x3", config.Model("resnet10t", "small", width=0.25, projector=(64,) * 3), 8, 32),)


def main(quick: bool, profile: bool, only: list[str]) -> None:
    torch.set_num_threads(1)  # of the CPU: on busy cores, two threads mostly wait for each other
    settings = QUICK if quick else GPU if device().type == "cuda" else CPU
    for setting in chosen(settings, only):
        if device().type == "cuda" and torch.cuda.mem_get_info()[1] < 120e9:
            setting = Setting(setting.name, setting.model, setting.batch // 2, setting.size)
        report("step", compare(setting, quick, profile), quick, packages=("torchvision", "lightly"), part="model")


def chosen(settings: Sequence[Setting], only: Sequence[str]) -> list[Setting]:
    found = [each for each in settings if not only or each.name.startswith(tuple(only))]
    if not found:
        raise SystemExit(f"--only {' '.join(only)}: none of {', '.join(each.name for each in settings)} begins so")
    return found


def compare(setting: Setting, quick: bool, profile: bool) -> list[Row]:
    fresh()
    gpu = device().type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, Run] = {}
        for name, make in contestants(setting, Path(folder), quick).items():
            runs[name] = make()
            for _ in range(4 if gpu else 2):  # compiles, and records CUDA graphs at the third
                runs[name]()
        seconds = in_turns(runs, rounds=2 if quick else 10 if gpu else 9, calls=10 if gpu else 1, warmup=0)
    rows: list[Row] = []
    for name, taken in seconds.items():
        row: Row = {"model": setting.name, "batch": setting.batch, "size": setting.size, "step": name}
        row |= {**spread(taken), "images_per_sec": significant(setting.batch / sorted(taken)[len(taken) // 2])}
        rows.append(row | {"ratio": ratio(seconds["reference recipe"], taken)})
    if profile and gpu:
        for kind, ms in by_kind(list(runs.values())[-1], steps=5).items():
            print(f"{setting.name}: {kind} {ms:.2f} ms a step")
    return rows


def fresh() -> None:
    """Before contestants are compiled: of those before nothing is left, neither code nor memory; and that dynamo has
    had enough of a function is an error, for it would run eager under the name of compiled."""
    torch.compiler.reset()
    if hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit"):
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()


def contestants(setting: Setting, folder: Path, quick: bool) -> dict[str, Callable[[], Run]]:
    """Each makes its own network, and gives a step to call."""
    fixed = views_of(setting)
    found: dict[str, Callable[[], Run]] = {"reference recipe": partial(reference, setting, fixed, None)}
    if lightly := peer("lightly.loss"):
        found["reference, lightly's loss"] = partial(reference, setting, fixed, lightly.BarlowTwinsLoss())

    def add(name: str, knobs: Speed, **options: Any) -> None:
        found[name] = partial(ours, setting, fixed, folder / str(len(found)), knobs, **options)

    add("ours, eager", Speed(compile="off"))
    if quick or not compiles():
        return found
    fused = "fused" if kernels.load("lars", device()) else "foreach"
    no_graphs, all_of_it = Speed(compile="on", graphs="off"), Speed(compile="on")
    add("+ compile", no_graphs)
    if device().type == "cuda":
        add("+ compile, tuned by timing", no_graphs, tuned=True)
        add("+ compile, cuDNN free to choose", no_graphs, around=as_published)
        if fused == "fused":
            add("+ compile, fused LARS", no_graphs, backend=fused)
        if kernels.load("norm", device()):
            add("+ compile, fused norms", replace(no_graphs, norms="fused"), backend=fused)
        add("+ CUDA graphs", all_of_it, backend=fused)
        if kernels.load("norm", device()):
            add("+ CUDA graphs, fused norms", replace(all_of_it, norms="fused"), backend=fused)
    add("+ views, from uint8", all_of_it, backend=fused, from_images=True)
    return found


def compiles() -> bool:
    try:
        return not speed.why_not(Speed(compile="on"), device())
    except UserError as error:
        print(f"nothing is compiled: {error}")
        return False


def reference(setting: Setting, fixed: Views, loss: Any) -> Run:
    objective = network(setting)
    step = Step(objective.backbone, objective.projector, loss, device())
    return partial(step, [view.contiguous() for view in fixed])


def ours(
    setting: Setting,
    fixed: Views,
    folder: Path,
    knobs: Speed,
    backend: str = "foreach",
    tuned: bool = False,
    from_images: bool = False,
    around: Callable[[Run], Run] = as_trained,
) -> Run:
    objective = network(setting).to(device()).to(memory_format=torch.channels_last)
    choose_norms(objective.backbone, device(), knobs.norms)
    optimizer = Lars(weights_and_biases(objective), lr=0.1, weight_decay=1e-6, backend=backend)
    forward: Callable[..., Any] = speed.compiled(objective, knobs, device(), folder, print)
    if tuned:
        forward = torch.compile(objective, dynamic=False)
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    views = [view.to(dtype) for view in fixed]
    fed: Callable[[], Views] = lambda: views  # noqa: E731
    if from_images:
        fed = partial(made, images_of(setting), config.Views(size=setting.size), dtype)
    return around(partial(step_of, forward, optimizer, fed))


def step_of(forward: Callable[..., Any], optimizer: Lars, fed: Callable[[], Views]) -> Tensor:
    """As the stage and the loop make it."""
    with torch.autocast(device().type, torch.bfloat16, enabled=device().type == "cuda"):
        loss: Tensor = forward(fed())[0]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def network(setting: Setting) -> BarlowTwins:
    """Of a class of its own: dynamo keeps what it compiles by the code of `forward`, and takes what it finds there for
    whatever network it fits. No contestant is to run what was compiled for another."""
    torch.manual_seed(0)
    objective = BarlowTwins(backbones.build(setting.model), config.BarlowTwins(), setting.model.projector)
    shared = BarlowTwins.forward
    own = FunctionType(shared.__code__.replace(), shared.__globals__, shared.__name__)
    objective.__class__ = type(BarlowTwins.__name__, (BarlowTwins,), {"forward": own})
    return objective


def views_of(setting: Setting) -> list[Tensor]:
    """Both views on the device, in the layout of ours."""
    torch.manual_seed(1)
    shape = (setting.batch, 3, setting.size, setting.size)
    return [torch.randn(shape, device=device()).to(memory_format=torch.channels_last) for _ in range(2)]


def images_of(setting: Setting) -> Tensor:
    torch.manual_seed(1)
    shape = (setting.batch, setting.size, setting.size, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8).to(device())


def made(images: Tensor, views: config.Views, dtype: torch.dtype) -> list[Tensor]:
    ids = torch.arange(len(images), device=images.device)
    return pair(images, ids, views, 0, 0, MEAN, STD, dtype)


# ------------------------------------------------------------------------------------------------ where the time goes

KINDS = {  # what is looked for in a kernel's name, in this order
    "LARS": ("lars",),
    "views": ("views",),
    "convolutions and products": ("conv", "gemm", "cutlass", "xmma", "nvjet", "cudnn", "wgrad", "dgrad", "splitk"),
    "reductions": ("reduce", "batch_norm"),
    "pointwise": ("elementwise", "vectorized"),
    "copies": ("memcpy", "memset"),
}


def by_kind(run: Run, steps: int) -> dict[str, float]:
    """Milliseconds a step by kind of kernel, and of the gaps in which none runs."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    events: Iterable[Any] = profiler.events() or ()
    spans = [
        (each.time_range.start, each.time_range.end, each.name)
        for each in events
        if each.device_type == torch.autograd.DeviceType.CUDA
    ]
    return {kind: us / 1e3 / steps for kind, us in shared_out(sorted(spans)).items()}


def shared_out(spans: Iterable[tuple[float, float, str]]) -> dict[str, float]:
    """Time by kind, of spans (begin, end, name) by their begin; what overlaps counts once."""
    found = dict.fromkeys([*KINDS, "other", "gaps"], 0.0)
    until: float | None = None
    for begin, end, name in spans:
        if until is not None and begin > until:
            found["gaps"] += begin - until
        begin = begin if until is None else max(begin, until)
        if end > begin:
            found[kind_of(name)] += end - begin
        until = end if until is None else max(until, end)
    return found


def kind_of(kernel: str) -> str:
    """By its name, which inductor begins with what the kernel is and ends with what is fused in it."""
    name = kernel.lower()
    if name.startswith("triton_"):
        own = {"red": "reductions", "per": "reductions", "poi": "pointwise", "tem": "convolutions and products"}
        return own.get(name.split("_")[1], "other")
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


if __name__ == "__main__":
    parser = asked(__doc__)
    parser.add_argument("--profile", action="store_true", help="also where the time goes, by kind of kernel")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="settings whose name begins so")
    arguments = parser.parse_args()
    main(arguments.quick, arguments.profile, arguments.only)
