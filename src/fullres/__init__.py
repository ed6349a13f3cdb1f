"""Restore full-resolution photographs and video with networks trained on small crops.

>>> import fullres as fr
>>> net = fr.create_network("nafnet", width=8, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1])
>>> with fr.convert(net.module, fr.Local(train_size=64)) as conversion:
...     len(conversion.converted)
5
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fullres.batch import Report
    from fullres.errors import ConversionError, FullresError, ImageError, NetworkError
    from fullres.evaluate import evaluate
    from fullres.evaluation.results import Evaluation
    from fullres.local import Conversion, Local, NothingToConvert, Plan, convert, plan
    from fullres.networks.catalog import create_network, networks, open_network
    from fullres.networks.spec import Network, Spec
    from fullres.restore import restore

    __version__: str

_HOMES = {
    "Conversion": "fullres.local",
    "ConversionError": "fullres.errors",
    "Evaluation": "fullres.evaluation.results",
    "FullresError": "fullres.errors",
    "ImageError": "fullres.errors",
    "Local": "fullres.local",
    "Network": "fullres.networks.spec",
    "NetworkError": "fullres.errors",
    "NothingToConvert": "fullres.local",
    "Plan": "fullres.local",
    "Report": "fullres.batch",
    "Spec": "fullres.networks.spec",
    "convert": "fullres.local",
    "create_network": "fullres.networks.catalog",
    "evaluate": "fullres.evaluate",
    "networks": "fullres.networks.catalog",
    "open_network": "fullres.networks.catalog",
    "plan": "fullres.local",
    "restore": "fullres.restore",
}

__all__ = [
    "Conversion",
    "ConversionError",
    "Evaluation",
    "FullresError",
    "ImageError",
    "Local",
    "Network",
    "NetworkError",
    "NothingToConvert",
    "Plan",
    "Report",
    "Spec",
    "__version__",
    "convert",
    "create_network",
    "evaluate",
    "networks",
    "open_network",
    "plan",
    "restore",
]


class _Package(ModuleType):
    """This package, some of whose functions, `restore` say, share their names with parts of it."""

    def __setattr__(self, name: str, value: Any) -> None:
        # importing a part binds it here under its name, which would hide the function
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            value = _version()
        elif name in _HOMES:
            value = getattr(import_module(_HOMES[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fullres")
    except PackageNotFoundError:  # run from its source, not installed
        return "unknown"
