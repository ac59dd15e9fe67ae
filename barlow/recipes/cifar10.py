"""python launchers/pretrain.py cifar10 --data.source cifar10:DIR: ResNet-18 with the 32 px stem, 200 epochs.

The CIFAR settings of Barlow Twins: LARS with a larger trust coefficient and clipped rates, no blur, small projector.
What others publish for ResNet-18 at 200 epochs: kNN 84.2 % (batch 128), 81.9 % (batch 512)."""

from barlow.config import BarlowTwins, Data, Lars, Model, Pretrain, View, Views

recipe = Pretrain(
    epochs=200,
    batch_size=256,
    data=Data(dir="data/cifar10", splits=("train",)),
    views=Views(size=32, scale=(0.2, 1.0), a=View(blur=0.0), b=View(blur=0.0, solarize=0.2)),
    model=Model(backbone="resnet18", stem="cifar", projector=(2048, 2048, 2048), zero_init_residual=True),
    objective=BarlowTwins(lambd=0.0051, scale=0.1),
    optim=Lars(lr=0.3, lr_biases=0.3, weight_decay=1e-4, eta=0.02, clip=True),
)
