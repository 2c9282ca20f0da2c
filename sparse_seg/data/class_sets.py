"""Classes by the name of their dataset, or from a file: for networks whose files do not tell them."""

from __future__ import annotations

from pathlib import Path

from sparse_seg.data.class_file import ClassFile, read_class_file
from sparse_seg.data.dataset import ClassList
from sparse_seg.data.palette import default_palette
from sparse_seg.errors import ConfigError, choose_one
from sparse_seg.registry import DATASETS

CLASS_SETS = ("voc", "cityscapes", "camvid", "ade20k", "coco-stuff")

# COCO's 80 things, then the 91 kinds of stuff (Caesar et al., CVPR 2018), as the 164k version numbers them
_COCO_STUFF = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball
bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife,
spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair,
couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone,
microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier,
toothbrush, banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet,
ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt,
door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, fog,
food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat,
metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-other,
plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea,
shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table,
tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other, wall-panel,
wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood
"""


def read_classes(name: str | Path) -> ClassFile:
    """The classes of a set in `CLASS_SETS`, or of a `classes.yaml`.

    Raises:
        ConfigError: no such set or file, or the file says what cannot be.
    """
    if name == "coco-stuff":
        names = tuple(" ".join(part.split()) for part in _COCO_STUFF.split(","))
        classes = ClassList(names, default_palette(len(names) + 1)[1:])
        return ClassFile(classes, {number: number for number in range(len(names))}, {})
    if name in CLASS_SETS:
        dataset = DATASETS[str(name)]
        return ClassFile(dataset.classes, dataset.train_ids, {})
    if not Path(name).is_file():
        raise ConfigError(f"unknown classes {choose_one(str(name), CLASS_SETS)}, or a classes.yaml file")
    return read_class_file(name)
