"""python launchers/pretrain.py shapes: the embedded set, small enough for two CPU cores. What `make demo` runs.

A minute there; kNN top-1 of 12 classes: 56.3, 73.1 and 72.3 % with seeds 0 to 2, raw pixels 18.0 %, untrained 15.1 %.
Another processor rounds otherwise, which moves these by some points: seed 0 came to 52.8 % on a second one.

What makes a short run on a small set work: a small network, a small projector and small views, so that there are many
steps; colours that change more than in photographs, for here they never tell what is in the picture; fast biases."""

from barlow.config import (
    Adam,
    BarlowTwins,
    Checkpoint,
    Data,
    Finetune,
    FixMatch,
    Head,
    Knn,
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
    epochs=16,
    batch_size=128,
    log_every=50,
    data=Data(dir="data/shapes", source="shapes"),
    views=Views(size=48, scale=(0.25, 1.0), saturation=0.8, hue=0.5, a=View(blur=0.0), b=View(blur=0.0, solarize=0.4)),
    model=Model(backbone="resnet10t", stem="small", width=0.25, projector=(256, 256)),
    objective=BarlowTwins(lambd=0.008),
    optim=Lars(lr=6.0, lr_biases=1.2, warmup_epochs=2),
    checkpoint=Checkpoint(every_steps=200),
    knn=Knn(every_epochs=4, size=64, baselines=True),
)
finetune = Finetune(
    epochs=20,
    batch_size=120,
    size=64,
    labelled=Labelled(per_class=20),
    view=Weak(scale=(0.5, 1.0)),
    head=Head(widths=(256,)),
    optim=Adam(lr=1e-3, lr_backbone=1e-3, schedule="cosine"),
    checkpoint=Checkpoint(every_steps=200),
)
fixmatch = FixMatch(
    epochs=4,
    batch_size=24,
    size=64,
    labelled=Labelled(per_class=20),
    view=Weak(scale=(0.5, 1.0)),
    head=Head(widths=(256,)),
    optim=Sgd(lr=0.03, lr_backbone=0.03),
    data=Data(),
    checkpoint=Checkpoint(every_steps=200),
)
request = Request(count=240, labelled=Labelled(per_class=20), size=64)
visualize = Visualize()
