"""python launchers/pretrain.py shapes: the embedded set, small enough for two CPU cores. What `make demo` runs."""

from barlow.config import BarlowTwins, Checkpoint, Data, Knn, Lars, Model, Pretrain, Views

recipe = Pretrain(
    epochs=8,
    batch_size=256,
    data=Data(dir="data/shapes", source="shapes"),
    views=Views(size=48, scale=(0.3, 1.0)),
    model=Model(backbone="resnet18", stem="small", width=0.5, projector=(512, 512, 512)),
    objective=BarlowTwins(lambd=0.02),
    optim=Lars(lr=0.5, eta=0.02, clip=True, warmup_epochs=1),
    checkpoint=Checkpoint(every_steps=50),
    knn=Knn(every_epochs=4, baselines=True),
)
