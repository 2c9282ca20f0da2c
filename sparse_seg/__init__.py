"""Semantic segmentation that pays for detail only where detail is.

What it offers is imported when it is first asked for: PyTorch takes seconds, which `sparse-seg --help`
does without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparse_seg.version import __version__

if TYPE_CHECKING:
    from sparse_seg.checkpoint import load_model as load_model
    from sparse_seg.checkpoint import save_model as save_model
    from sparse_seg.export.runner import in_runtime as in_runtime
    from sparse_seg.export.segmentor import RuntimeSegmentor as RuntimeSegmentor
    from sparse_seg.lab.predict.segment import Segmentation as Segmentation
    from sparse_seg.lab.predict.segment import segment as segment
    from sparse_seg.run.build import build_model as build_model
    from sparse_seg.run.network import SelectiveNetwork as SelectiveNetwork
    from sparse_seg.run.selective import selective as selective

_MODULES = {
    "RuntimeSegmentor": "export.segmentor",
    "Segmentation": "lab.predict.segment",
    "SelectiveNetwork": "run.network",
    "build_model": "run.build",
    "in_runtime": "export.runner",
    "load_model": "checkpoint",
    "save_model": "checkpoint",
    "segment": "lab.predict.segment",
    "selective": "run.selective",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = found
        return found
    try:
        return importlib.import_module(f"{__name__}.{name}")  # a room, as sparse_seg.conversion
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return __all__
