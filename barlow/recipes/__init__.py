"""One file a recipe: its docstring tells what, by which command, how long and how good; its body is values, one for
each launcher. The first is the launcher's default."""

from barlow.config import Finetune, FixMatch, Pretrain, Request, Visualize
from barlow.recipes import cifar10, shapes

PRETRAIN: dict[str, Pretrain] = {"shapes": shapes.recipe, "cifar10": cifar10.recipe}
FINETUNE: dict[str, Finetune] = {"shapes": shapes.finetune}
FIXMATCH: dict[str, FixMatch] = {"shapes": shapes.fixmatch}
REQUEST: dict[str, Request] = {"shapes": shapes.request}
VISUALIZE: dict[str, Visualize] = {"shapes": shapes.visualize}
