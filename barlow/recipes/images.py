"""python launchers/pretrain.py images --data.dir DIR: where to begin with images of your own. 200 epochs at 96 px.

ResNet-18 with everything else as in the Barlow Twins paper (projector, lambda, LARS, views), but for the stem, which
leaves more of a small image. DIR is a folder of shards (launchers/shards.py folder:IMAGES DIR --size 96). Learns from
the split `train`; give --data.splits unlabeled if that is where your images are. How long it takes and what it reaches
depends on them, and nobody has measured it on a set of ours."""

from barlow.config import Data, Model, Pretrain, Views

recipe = Pretrain(
    epochs=200,
    batch_size=256,
    data=Data(dir="data/images", splits=("train",)),
    views=Views(size=96),
    model=Model(backbone="resnet18", stem="small"),
)
