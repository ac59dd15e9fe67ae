"""Every knob. Frozen, torch-free values: a recipe is one, the command line overrides it by name, nothing else does."""

from barlow.config.finetune import Finetune
from barlow.config.fixmatch import FixMatch
from barlow.config.looking import Request, Visualize
from barlow.config.parts import (
    Adam,
    BarlowTwins,
    Checkpoint,
    Data,
    Head,
    Knn,
    Labelled,
    Lars,
    Model,
    Network,
    Preflight,
    Sgd,
    Shards,
    Speed,
    Strong,
    View,
    Views,
    Watch,
    Weak,
)
from barlow.config.pretrain import Pretrain
from barlow.config.reproduce import Reproduce, Table
from barlow.config.runs import Classifying, Run, Training

__all__ = [
    "Adam",
    "BarlowTwins",
    "Checkpoint",
    "Classifying",
    "Data",
    "Finetune",
    "FixMatch",
    "Head",
    "Knn",
    "Labelled",
    "Lars",
    "Model",
    "Network",
    "Preflight",
    "Pretrain",
    "Reproduce",
    "Request",
    "Run",
    "Sgd",
    "Shards",
    "Speed",
    "Strong",
    "Table",
    "Training",
    "View",
    "Views",
    "Visualize",
    "Watch",
    "Weak",
]
