"""What a run asks of its data: refused by launchers before it starts, and for a whole chain at once. Torch-free."""

from __future__ import annotations

from barlow.config import Finetune, FixMatch, Pretrain, Request, Run, Visualize
from barlow.data import order
from barlow.data.shards import Index
from barlow.errors import UserError
from barlow.labels import table


def fits(config: Run, index: Index) -> None:
    """A UserError that says what is missing from these shards, or too much for them."""
    match config:
        case Pretrain():
            order.steps_per_epoch(index.images(config.data.splits, config.data.limit), config.batch_size)
        case Finetune():
            order.steps_per_epoch(len(table.learnable(config, index).ids), config.batch_size)
        case FixMatch():
            table.learnable(config, index)
            order.unlabelled_steps(index.images(config.data.splits, config.data.limit), config.mu, config.batch_size)
        case Request():
            table.asked(config, index)
        case Visualize():
            split = index.split(config.split)
            last = split.first_id + split.count - 1
            if wrong := [i for i in config.ids if not split.first_id <= i <= last]:
                raise UserError(f"--ids {wrong[0]}: samples of {config.split} are {split.first_id} to {last}")
