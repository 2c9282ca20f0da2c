"""Named parts. A new backbone, head, mask policy or dataset is one file and one line in a table below.

An entry is "module:attribute", imported when it is first looked up; listing names imports nothing.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from sparse_seg.errors import ConfigError, choose_one, did_you_mean, shown


def arguments_of(part: Any) -> dict[str, inspect.Parameter]:
    """What a part takes, by name; one that hands others on (`**options`) takes those of its base class."""
    own = dict(inspect.signature(part).parameters)
    rest = [name for name, one in own.items() if one.kind is one.VAR_KEYWORD]
    base = inspect.signature(part.__mro__[1]).parameters if rest and isinstance(part, type) else {}
    return {name: one for name, one in {**base, **own}.items() if name not in rest}


class UnknownPart(ConfigError, KeyError):
    """A registry has no part of that name. Also a KeyError, as a `Mapping` needs."""

    __str__ = Exception.__str__  # KeyError's shows the message's repr


class Registry(Mapping[str, Any]):
    """Parts of one kind by name.

    Args:
        kind: what the parts are, for messages.
        table: name to "module:attribute".
    """

    def __init__(self, kind: str, table: Mapping[str, str]) -> None:
        self.kind, self.declared = kind, tuple(table)
        self._parts: dict[str, Any] = dict(table)

    def register(self, name: str, part: Any = None) -> Any:
        """Add a part from outside this package; without `part`, a decorator that does.

        Raises:
            ValueError: the name is taken.
        """
        if part is None:
            return functools.partial(self.register, name)
        if name in self:
            raise ValueError(f"there is a {self.kind} {name!r} already; choose another name")
        self._parts[name] = part
        return part

    def make(
        self,
        name: str,
        arguments: Mapping[str, Any],
        options: Mapping[str, Any],
        key: str,
        taken: Mapping[str, str],
    ) -> Any:
        """A part of our arguments and of the options that a config gives under `key`.

        Args:
            taken: arguments that keys of their own set, and these keys.

        Raises:
            ConfigError: the part has no argument of an option's name, a key of its own sets it, or the part
                refuses the options. Where none is given, that error is a fault of the code and stays.
        """
        own = arguments_of(self[name]).values()
        known = [one.name for one in own if one.default is not one.empty and one.name not in taken]
        for option in options:
            if option in taken:
                raise ConfigError(f"{key}.{option}: {taken[option]} sets it; set that key in its place")
            if option not in known:
                near = did_you_mean(option, known) or (f"; it has {', '.join(known)}" if known else "")
                raise ConfigError(f"{key}.{option}: the {self.kind} {name!r} has no such option{near}")
        try:
            return self[name](**arguments, **options)
        except (TypeError, ValueError) as error:
            if not options:
                raise
            raise ConfigError(f"{key} is {shown(dict(options))}, which does not fit: {error}") from None

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise UnknownPart(f"unknown {self.kind} {choose_one(name, self)}")
        part = self._parts[name]
        if isinstance(part, str):
            module, _, attribute = part.partition(":")
            part = self._parts[name] = getattr(importlib.import_module(module), attribute)
        return part

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


BACKBONES = Registry(
    "backbone",
    {
        "resnet18": "sparse_seg.networks.resnet:resnet18",
        "resnet34": "sparse_seg.networks.resnet:resnet34",
        "resnet50": "sparse_seg.networks.resnet:resnet50",
        "resnet101": "sparse_seg.networks.resnet:resnet101",
        "efficientnet_lite0": "sparse_seg.networks.efficientnet_lite:efficientnet_lite0",
        "efficientnet_lite1": "sparse_seg.networks.efficientnet_lite:efficientnet_lite1",
        "efficientnet_lite2": "sparse_seg.networks.efficientnet_lite:efficientnet_lite2",
    },
)
HEADS = Registry(
    "head",
    {
        "lite": "sparse_seg.networks.heads:LiteHead",
        "deeplabv3": "sparse_seg.networks.heads:DeepLabV3Head",
        "deeplabv3plus": "sparse_seg.networks.heads:DeepLabV3PlusHead",
        "lraspp": "sparse_seg.networks.heads:LRASPPHead",
        "fcn": "sparse_seg.networks.heads:FCNHead",
    },
)
POOLING_HEADS = ("deeplabv3", "deeplabv3plus")  # those with ASPP, which pools each image
POLICIES = Registry(
    "mask policy",
    {
        "uniform": "sparse_seg.masks.uniform:UniformPolicy",
        "random": "sparse_seg.masks.random:RandomPolicy",
        "edge": "sparse_seg.masks.edge:EdgePolicy",
        "confidence": "sparse_seg.masks.confidence:ConfidencePolicy",
        "gain": "sparse_seg.masks.gain:GainPolicy",
        "learned": "sparse_seg.masks.learned:LearnedPolicy",
        "oracle": "sparse_seg.masks.oracle:OraclePolicy",
        "previous": "sparse_seg.masks.previous:PreviousPolicy",
    },
)
DATASETS = Registry(
    "dataset",
    {
        "cityscapes": "sparse_seg.data.cityscapes:Cityscapes",
        "camvid": "sparse_seg.data.camvid:CamVid",
        "scenes": "sparse_seg.data.scenes:ScenesDataset",
        "voc": "sparse_seg.data.voc:VOC",
        "ade20k": "sparse_seg.data.ade20k:ADE20K",
        "folder": "sparse_seg.data.folder:FolderDataset",
    },
)
