"""python benchmarks/few_labels.py [--data cifar10:DIR] [--form full|small] [--seeds 3] [--runs-dir DIR] [--at-once K]

What 40, 250 and 4,000 labels of CIFAR-10 come to: a classifier on a pretrained backbone, and FixMatch from it; and what
as many labels again are worth to the classifier, asked for by each rule. Every number is val top-1 of a run that a
launcher made; one backbone is pretrained, then seeds draw the labels and train. `full` is the recipe cifar10, for a GPU
(hours); `small` a narrow network and short runs, for two CPU cores (two hours). The same command again goes on where it
stopped."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from barlow.files import read_json
from measure import ROOT, Row, asked, device, report

RULES = ("kmeans", "k-centre", "typical", "random")


@dataclass(frozen=True)
class Form:
    """Flags of each launcher, over those of its recipe."""

    recipe: str = "cifar10"
    labels: tuple[int, ...] = (4, 25, 400)  # a class
    requested: tuple[int, ...] = (4, 25)  # of these; as many again are asked for
    pretrain: str = ""
    finetune: str = ""
    fixmatch: str = ""
    finetune_for: dict[int, str] = field(default_factory=dict)  # so many labels a class
    fixmatch_for: dict[int, str] = field(default_factory=dict)


FORMS = {
    "full": Form(finetune_for={4: "--batch-size 40", 400: "--batch-size 256 --epochs 50 --evaluate-every 10"}),
    "small": Form(
        pretrain="--model.backbone resnet18 --model.stem dense --model.width 0.25 --model.projector 512 512 "
        "--optim.no-clip --epochs 20 --optim.warmup-epochs 1 --knn.every-epochs 5 --log-every 100",
        finetune="--epochs 60 --optim.lr 1e-3 --optim.lr-backbone 1e-3 --view.kind crop --view.scale 0.5 1.0 "
        "--evaluate-every 0 --log-every 100",
        fixmatch="--precision bf16 --batches two --align 0.99 --threshold 0.5 --lambda-u 5 --optim.lr 0.1 "
        "--optim.lr-backbone 0.1 --epochs 20 --batch-size 32 --data.limit 22400 --ema 0.99 --view.kind crop "
        "--view.scale 0.5 1.0 --evaluate-every 0 --log-every 100",
        finetune_for={4: "--batch-size 40 --epochs 100", 400: "--batch-size 250 --epochs 50"},
        fixmatch_for={400: "--optim.lr 0.03 --optim.lr-backbone 0.03 --lambda-u 3"},
    ),
    "quick": Form(
        recipe="shapes",
        labels=(4,),
        requested=(4,),
        pretrain="--epochs 1 --data.limit 256 --batch-size 64 --knn.every-epochs 0 --knn.no-baselines",
        finetune="--epochs 1 --val-limit 64",
        fixmatch="--epochs 1 --data.limit 256 --batch-size 12 --val-limit 64",
        finetune_for={4: "--batch-size 48"},
    ),
}


@dataclass(frozen=True)
class Runs:
    form: Form
    folder: Path
    threads: int

    def make(self, launcher: str, name: str, *flags: str) -> dict[str, float]:
        """The run's results, made now unless it has finished."""
        command = [sys.executable, str(ROOT / "launchers" / f"{launcher}.py"), self.form.recipe, "--run", name]
        command += ["--runs-dir", str(self.folder), "--cluster", "local", "--preflight.no-hashes"]
        words = [word for flag in flags for word in flag.split()]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "BARLOW_CORES": str(self.threads)}
        began = time.perf_counter()
        done = subprocess.run([*command, *words], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(command + words)}\n{done.stdout[-2000:]}{done.stderr}")
        found = read_json(self.folder / name / "results.json")
        print(
            f"{name}: {found.get('val_top1', found.get('knn_top1', 0)):.2f} in {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        return found

    def classifier(self, name: str, per_class: int, seed: int, *labels: str) -> dict[str, float]:
        """Its val top-1."""
        flags = (self.form.finetune, self.form.finetune_for.get(per_class, ""), drawn(per_class, seed), *labels)
        found = self.make("finetune", name, f"--from {self.folder}/pretrain", *flags)
        return {"classifier": found["val_top1"]}

    def plain(self, per_class: int, seed: int) -> dict[str, float]:
        """And that of FixMatch from it."""
        name = f"{per_class}-{seed}"
        classifier = self.classifier(f"{name}-classifier", per_class, seed)
        origin = f"--from {self.folder}/{name}-classifier"
        flags = (self.form.fixmatch, self.form.fixmatch_for.get(per_class, ""), drawn(per_class, seed))
        found = self.make("fixmatch", f"{name}-fixmatch", origin, *flags)
        return classifier | {"FixMatch": found["val_top1"]}

    def with_request(self, rule: str, per_class: int, seed: int, count: int) -> dict[str, float]:
        """A classifier with the labels that a rule asks for too."""
        name = f"{per_class}-{seed}-{rule}"
        flags = (f"--rule {rule} --count {count} --pool train --oracle", drawn(per_class, seed))
        self.make("label_request", name, f"--from {self.folder}/pretrain", *flags)
        return self.classifier(f"{name}-classifier", per_class, seed, f"--labels {self.folder}/{name}/request.csv")


def drawn(per_class: int, seed: int) -> str:
    """The seed's labels, and its training."""
    return f"--seed {seed} --labelled.seed {seed} --labelled.per-class {per_class}"


def rows(found: dict[tuple[str, int], list[dict[str, float]]], classes: int) -> Iterator[Row]:
    """In per cent, mean and range over seeds; and by how much a method is above the plain classifier, or a rule above
    chance, with the same labels to begin with."""
    for (rule, per_class), seeds in found.items():
        for method in seeds[0]:
            top1 = [each[method] for each in seeds]
            control = found["random", per_class] if rule else seeds
            row: Row = {
                "labels": per_class * classes,
                "asked_for": per_class * classes if rule else 0,
                "by": rule,
            }
            row |= {"method": method, "top1": round(statistics.mean(top1), 2)}
            row |= {"least": round(min(top1), 2), "most": round(max(top1), 2), "seeds": len(top1)}
            gained = [a - b["classifier"] for a, b in zip(top1, control, strict=True)]
            row |= {"gain": round(statistics.mean(gained), 2), "than": "random" if rule else "classifier"}
            row |= {"gain_least": round(min(gained), 2), "gain_most": round(max(gained), 2)}
            yield row


def main(options: argparse.Namespace) -> None:
    form = FORMS["quick" if options.quick else options.form]
    folder = Path(options.runs_dir).absolute()
    runs = Runs(form, folder, max(1, len(os.sched_getaffinity(0)) // options.at_once))
    whole = Runs(form, folder, len(os.sched_getaffinity(0)))
    source = "shapes" if options.quick else options.data
    data = f"--data.source {source} --data.dir {folder}/shards"
    pretrained = whole.make("pretrain", "pretrain", form.pretrain, data)
    seeds, classes = range(options.seeds), len(read_json(folder / "shards" / "index.json")["classes"])
    with ThreadPoolExecutor(options.at_once) as pool:
        plain = {("", n): [pool.submit(runs.plain, n, seed) for seed in seeds] for n in form.labels}
        asking = {
            (rule, n): [pool.submit(runs.with_request, rule, n, s, n * classes) for s in seeds]
            for n in form.requested
            for rule in RULES
        }
        found = {key: [future.result() for future in futures] for key, futures in (plain | asking).items()}
    table = list(rows(found, classes))
    for row in table:
        row |= {"network": options.form, "knn": round(pretrained.get("knn_top1", 0), 2)}
    report("few_labels", table, options.quick)


if __name__ == "__main__":
    parser = asked(__doc__)
    parser.add_argument("--data", default="cifar10:data/cifar10", help="as of launchers/shards.py")
    parser.add_argument("--form", choices=["full", "small"], default="full" if device().type == "cuda" else "small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs-dir", default="runs/few-labels")
    parser.add_argument("--at-once", type=int, default=1 if device().type == "cuda" else 2)
    main(parser.parse_args())
