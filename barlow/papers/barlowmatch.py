"""BarlowMatch's chain: which runs it takes, what each is asked to do, and which of them each needs. Torch-free.

pretrain; a classifier on its backbone; FixMatch from that; a request for labels by the backbone, and with the answers
both again; pictures of what FixMatch's classifier looks at; the paper's table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from barlow.config import Data, Reproduce, Run, Table
from barlow.data.shards import Index
from barlow.engine.origin import copies, settled
from barlow.errors import UserError

ROWS = ("Barlow Twins + classifier", "Barlow Twins + classifier + FixMatch")
PAPER = (97.89, 32.80, 35.22, 99.23, 33.70, 36.69)
"""Table 1, row by row: train, validation, validation with the labels asked for."""
Config = TypeVar("Config", bound=Run)


@dataclass(frozen=True)
class Part:
    """A run of the chain."""

    name: str
    stage: str
    config: Any  # a Run of the stage's kind
    needs: tuple[str, ...] = ()
    alone: bool = False
    """It has work for one rank."""


def parts(chain: Reproduce, index: Index) -> list[Part]:
    """All runs, each after those that it needs, with configs that leave nothing open.

    Where nobody has answered the requests yet, and the shards do not know the answers, what needs them is left out."""
    if chain.scale < 1:
        chain = smaller(chain, index)
    pretrain = Part("pretrain", "pretrain", of_chain(chain, "pretrain", chain.pretrain))
    found = [pretrain, *classifiers(chain, pretrain, "", ())]
    for rule in chain.rules:
        name = f"request-{rule}"
        request = replace(of_chain(chain, name, chain.request), rule=rule, oracle=known(chain, index))
        request = settled(replace(request, from_run=place(chain, "pretrain")), asdict(pretrain.config))
        found.append(Part(name, "request", request, ("pretrain",)))
        if request.oracle or chain.answered:
            answers = chain.answered or (f"{place(chain, name)}/request.csv",)
            found += classifiers(chain, pretrain, f"-{rule}", answers)
    fixmatch = next(part.config for part in found if part.name == "fixmatch")
    pictures = replace(of_chain(chain, "pictures", chain.visualize), from_run=place(chain, "fixmatch"))
    found.append(Part("pictures", "visualize", settled(pictures, asdict(fixmatch)), ("fixmatch",), alone=True))
    return [*found, table(chain, index, found)]


def classifiers(chain: Reproduce, pretrain: Part, label: str, answers: tuple[str, ...]) -> Iterator[Part]:
    """A classifier, and FixMatch from it, with these labels besides those of the shards."""
    request = (f"request{label}",) if label else ()
    first = replace(of_chain(chain, f"finetune{label}", chain.finetune), labels=answers)
    first = settled(replace(first, from_run=place(chain, "pretrain")), asdict(pretrain.config))
    yield Part(f"finetune{label}", "finetune", first, ("pretrain", *request))
    kept = tuple(map(str, copies(Path(place(chain, f"finetune{label}")), answers)))  # whatever becomes of the answers
    second = replace(of_chain(chain, f"fixmatch{label}", chain.fixmatch), labels=kept)
    second = settled(replace(second, from_run=place(chain, f"finetune{label}")), asdict(first))
    yield Part(f"fixmatch{label}", "fixmatch", second, (f"finetune{label}",))


def table(chain: Reproduce, index: Index, found: list[Part]) -> Part:
    """The last one: what all have come to."""
    judged = [part.name for part in found if part.stage in ("finetune", "fixmatch")]
    rules = [rule for rule in chain.rules if f"finetune-{rule}" in judged]
    whole = Table(
        run=f"{chain.run},table",
        runs_dir=chain.runs_dir,
        title="Top-1 accuracy in per cent, as Table 1 of BarlowMatch has it",
        rows=ROWS,
        columns=tuple(rules),
        runs=tuple(f"{chain.run},{part}" for part in judged_in_order(rules)),
        paper=PAPER,
        notes=tuple(notes(chain, index)),
    )
    return Part("table", "table", whole, tuple(judged), alone=True)


def judged_in_order(rules: Sequence[str]) -> list[str]:
    return [stage + label for stage in ("finetune", "fixmatch") for label in ("", *(f"-{rule}" for rule in rules))]


def notes(chain: Reproduce, index: Index) -> Iterator[str]:
    """What the numbers rest on."""
    unlabelled = index.images(chain.data.splits)
    used = min(unlabelled, chain.data.limit or unlabelled)
    of = f" of {unlabelled:,}" if used < unlabelled else ""
    yield f"Data: {index.source}, {len(index.classes)} classes, {used:,}{of} unlabelled images of {index.size} px."
    lengths = ", ".join(f"{name} {getattr(chain, name).epochs}" for name in ("pretrain", "finetune", "fixmatch"))
    yield f"Network: {chain.pretrain.model.backbone} of width {chain.pretrain.model.width:g}. Epochs: {lengths}."
    if known(chain, index) and not chain.answered:
        yield "Requests were answered with the labels that the shards have."


def known(chain: Reproduce, index: Index) -> bool:
    """Whether the shards know the answers to requests from the pool."""
    return all(index.split(name).labeled == index.split(name).count for name in chain.request.pool)


def place(chain: Reproduce, part: str) -> str:
    return str(Path(chain.runs_dir).expanduser().resolve() / f"{chain.run},{part}")


def of_chain(chain: Reproduce, name: str, config: Config) -> Config:
    """The config of one run, with what the chain says for all of them."""
    own: Any = config
    shared = {key: getattr(chain.data, key) for key in ("dir", "workers", "stage", "mean", "std")}
    if isinstance(own.data, Data):
        shared |= {key: getattr(chain.data, key) for key in ("splits", "cache", "limit")}
    data = replace(own.data, **shared)
    run = {"run": f"{chain.run},{name}", "runs_dir": chain.runs_dir, "seed": chain.seed, "device": chain.device}
    if hasattr(own, "labelled"):
        run["labelled"] = chain.labelled
    changed: Config = replace(own, data=data, **run)
    return changed


def smaller(chain: Reproduce, index: Index) -> Reproduce:
    """A rehearsal: data and epochs by `scale`, widths and batches by its root, within what still makes sense.

    Where nobody knows the labels of the pool, requests are made of the labelled images instead, most of which are then
    taken to be unlabelled."""
    scale, root = chain.scale, chain.scale**0.5
    unlabelled = index.images(chain.data.splits)
    splits = chain.labelled.splits
    there = sum(index.split(name).labeled for name in splits) // max(1, len(index.classes))  # a class
    if not there:
        named = " and ".join(splits)
        raise UserError(f"--scale {scale:g}: a rehearsal needs labels, and {named} of {index.folder} has none")
    if there < 2:
        raise UserError(f"--scale {scale:g}: a rehearsal takes two labels a class or more, {index.folder} has {there}")
    per_class = chain.labelled.per_class or min(max(4, round(there * scale)), there // 2)
    limit = min(unlabelled, max(256, round(unlabelled * scale)))
    pool = chain.request.pool if known(chain, index) else splits
    left = index.images(pool) - per_class * len(index.classes)
    few = per_class * len(index.classes)
    val = max(128, round(index.split("val").count * scale))

    def epochs(count: int) -> int:
        return max(2, round(count * scale))

    def width(count: int, least: int = 32) -> int:
        return max(least, 8 * round(count * root / 8))

    head = replace(chain.finetune.head, widths=tuple(width(n) for n in chain.finetune.head.widths))
    model = replace(
        chain.pretrain.model,
        width=max(0.125, round(chain.pretrain.model.width * root, 3)),
        projector=tuple(width(n) for n in chain.pretrain.model.projector),
    )
    pretrain = replace(
        chain.pretrain,
        epochs=epochs(chain.pretrain.epochs),
        batch_size=width(chain.pretrain.batch_size),
        model=model,
        optim=replace(chain.pretrain.optim, warmup_epochs=min(1, chain.pretrain.optim.warmup_epochs)),
        knn=replace(chain.pretrain.knn, every_epochs=0),
    )
    finetune = replace(
        chain.finetune,
        epochs=epochs(chain.finetune.epochs),
        batch_size=min(chain.finetune.batch_size, few),
        head=head,
        evaluate_every=0,
        val_limit=val,
    )
    fixmatch = replace(
        chain.fixmatch,
        epochs=epochs(chain.fixmatch.epochs),
        batch_size=min(width(chain.fixmatch.batch_size, 8), limit // chain.fixmatch.mu),
        head=head,
        evaluate_every=0,
        val_limit=val,
    )
    request = replace(
        chain.request,
        count=min(max(2 * len(index.classes), round(chain.request.count * scale)), left // 2, limit),
        pool=pool,
        limit=limit,
    )
    return replace(
        chain,
        data=replace(chain.data, limit=limit),
        labelled=replace(chain.labelled, per_class=per_class),
        pretrain=pretrain,
        finetune=finetune,
        fixmatch=fixmatch,
        request=request,
        visualize=replace(chain.visualize, count=min(chain.visualize.count, 6)),
    )
