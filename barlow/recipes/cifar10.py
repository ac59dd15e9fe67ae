"""python launchers/pretrain.py cifar10 --data.source cifar10:DIR: ResNet-18 with the 32 px stem, 200 epochs.

The CIFAR settings of Barlow Twins: LARS with a larger trust coefficient and clipped rates, no blur, small projector.
What others publish for ResNet-18 at 200 epochs: kNN 84.2 % (batch 128), 81.9 % (batch 512).

Then, with 40, 250 or 4,000 labels (4, 25, 400 a class): launchers/finetune.py cifar10 --from runs/cifar10,
launchers/fixmatch.py cifar10 --from runs/cifar10-finetune, launchers/label_request.py cifar10 --from runs/cifar10."""

from barlow.config import (
    Adam,
    BarlowTwins,
    Data,
    Finetune,
    FixMatch,
    Head,
    Labelled,
    Lars,
    Model,
    Pretrain,
    Request,
    Sgd,
    View,
    Views,
    Visualize,
    Weak,
)

recipe = Pretrain(
    epochs=200,
    batch_size=256,
    data=Data(dir="data/cifar10", splits=("train",)),
    views=Views(size=32, scale=(0.2, 1.0), a=View(blur=0.0), b=View(blur=0.0, solarize=0.2)),
    model=Model(backbone="resnet18", stem="cifar", projector=(2048, 2048, 2048), zero_init_residual=True),
    objective=BarlowTwins(lambd=0.0051, scale=0.1),
    optim=Lars(lr=0.3, lr_biases=0.3, weight_decay=1e-4, eta=0.02, clip=True),
)
labelled = Labelled(per_class=25)
finetune = Finetune(
    epochs=200,
    batch_size=125,
    labelled=labelled,
    view=Weak(kind="shift"),
    head=Head(widths=()),
    optim=Adam(lr=1e-3, lr_backbone=1e-4, weight_decay=1e-4, schedule="cosine"),
    evaluate_every=20,
)
fixmatch = FixMatch(
    epochs=40,
    threshold=0.95,
    batches="two",
    ema=0.999,
    labelled=labelled,
    data=Data(splits=("train",)),
    view=Weak(kind="shift"),
    head=Head(widths=()),
    optim=Sgd(lr=0.03, lr_backbone=0.03, weight_decay=5e-4),
    evaluate_every=5,
)
request = Request(rule="typical", count=250, pool=("train",), oracle=True, labelled=labelled)
visualize = Visualize()
