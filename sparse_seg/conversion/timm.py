"""timm: backbones `resnet18`..`resnet101` and the `d` variants (deep stem, avg-pool shortcuts)."""

from sparse_seg.conversion.plan import Tensors
from sparse_seg.conversion.torchvision import classifier_plan

plan = classifier_plan


def detect(tensors: Tensors) -> bool:
    """Whether the names are timm's alone; its plain ResNets are named, and are, as torchvision's."""
    return "layer1.0.conv1.weight" in tensors and "conv1.0.weight" in tensors
