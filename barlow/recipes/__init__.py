"""One file a recipe: its docstring tells what, by which command, how long and how good; its body is values, one for
each launcher. The first is the launcher's default."""

from barlow.config import Finetune, FixMatch, Pretrain, Reproduce, Request, Visualize
from barlow.recipes import barlowmatch, cifar10, images, shapes

PRETRAIN: dict[str, Pretrain] = {
    "shapes": shapes.recipe,
    "images": images.recipe,
    "cifar10": cifar10.recipe,
    "barlowmatch": barlowmatch.recipe,
    "barlowmatch-code": barlowmatch.code_recipe,
}
FINETUNE: dict[str, Finetune] = {
    "shapes": shapes.finetune,
    "cifar10": cifar10.finetune,
    "barlowmatch": barlowmatch.finetune,
    "barlowmatch-code": barlowmatch.code_finetune,
}
FIXMATCH: dict[str, FixMatch] = {
    "shapes": shapes.fixmatch,
    "cifar10": cifar10.fixmatch,
    "barlowmatch": barlowmatch.fixmatch,
    "barlowmatch-code": barlowmatch.code_fixmatch,
}
REQUEST: dict[str, Request] = {
    "shapes": shapes.request,
    "cifar10": cifar10.request,
    "barlowmatch": barlowmatch.request,
}
VISUALIZE: dict[str, Visualize] = {
    "shapes": shapes.visualize,
    "cifar10": cifar10.visualize,
    "barlowmatch": barlowmatch.visualize,
}
REPRODUCE: dict[str, Reproduce] = {"barlowmatch": barlowmatch.chain, "barlowmatch-code": barlowmatch.code_chain}
