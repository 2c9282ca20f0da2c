"""ADE20K's scene parsing benchmark (`ADEChallengeData2016`): 150 classes, `images/` and `annotations/`."""

from pathlib import Path

from sparse_seg.data.dataset import IGNORE_INDEX, ClassList, SegmentationDataset
from sparse_seg.data.listing import pair_files
from sparse_seg.data.palette import default_palette

# In the order of the benchmark's objectInfo150.txt, each by its first name.
_LIST = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person,
earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea,
mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion,
base, box, column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace,
refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door, stairway,
river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove,
palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light,
truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track,
apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship,
fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall,
tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal,
bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
"""
_NAMES = tuple(" ".join(name.split()) for name in _LIST.split(","))
_FOLDERS = {"train": "training", "val": "validation"}

ADE20K_CLASSES = ClassList(_NAMES, default_palette(len(_NAMES) + 1)[1:])


class ADE20K(SegmentationDataset):
    """ADE20K's 150 classes, 1..150 on disk; 0, which is everything else, is ignored.

    Args:
        root: the folder that holds `images` and `annotations`.
        split: `train` or `val`, or the name of a folder in both.

    Raises:
        DataError: a folder is missing or holds no image.
    """

    classes = ADE20K_CLASSES
    train_ids = {0: IGNORE_INDEX} | {number + 1: number for number in range(len(_NAMES))}

    def __init__(self, root: str | Path, split: str) -> None:
        folder = _FOLDERS.get(split, split)
        super().__init__(
            *pair_files(Path(root, "images", folder), Path(root, "annotations", folder), (".jpg",))
        )
