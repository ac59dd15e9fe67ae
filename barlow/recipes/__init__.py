"""One file a recipe: its docstring tells what, by which command, how long and how good; its body is a value."""

from barlow.config import Pretrain
from barlow.recipes import cifar10, shapes

PRETRAIN: dict[str, Pretrain] = {"shapes": shapes.recipe, "cifar10": cifar10.recipe}  # the first is the default
