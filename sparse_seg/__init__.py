"""Semantic segmentation that pays for detail only where detail is.

What it offers is imported when it is first asked for: PyTorch takes seconds, which `sparse-seg --help`
does without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparse_seg.version import __version__

if TYPE_CHECKING:
    from sparse_seg.checkpoint import load_model, save_model
    from sparse_seg.export.runner import in_runtime
    from sparse_seg.export.segmentor import RuntimeSegmentor
    from sparse_seg.lab.predict.segment import Segmentation, segment
    from sparse_seg.run.build import build_model
    from sparse_seg.run.network import SelectiveNetwork
    from sparse_seg.run.selective import selective

__all__ = [
    "RuntimeSegmentor",
    "Segmentation",
    "SelectiveNetwork",
    "__version__",
    "build_model",
    "in_runtime",
    "load_model",
    "save_model",
    "segment",
    "selective",
]
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
