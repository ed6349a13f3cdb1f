"""Networks by name, by hyperparameters and from checkpoints."""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.resources import as_file, files
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fullres.errors import NetworkError
from fullres.io.checkpoint import read_checkpoint
from fullres.networks.arguments import suggestion
from fullres.networks.instantiate import create, load
from fullres.networks.spec import Architecture, Network

_SUFFIX = ".safetensors"


@cache
def networks() -> Mapping[str, Architecture]:
    """Every architecture by name: each file of this package that has an `ARCHITECTURE`.

    >>> networks()["nafnet"].tasks
    ('deblur', 'denoise')
    """
    names = sorted(file.name for file in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = [import_module(f"{__package__}.{name}") for name in names]
    found = [module.ARCHITECTURE for module in modules if hasattr(module, "ARCHITECTURE")]
    return MappingProxyType({architecture.name: architecture for architecture in found})


def bundled(folder: str | os.PathLike[str] | None = None) -> tuple[str, ...]:
    """Names that `open_network` takes: the weights that come with fullres, or those in `folder`."""
    source = files("fullres.weights") if folder is None else Path(folder)
    names = (entry.name for entry in source.iterdir())
    return tuple(sorted(n.removesuffix(_SUFFIX) for n in names if n.endswith(_SUFFIX)))


def create_network(name: str, /, **hyperparameters: Any) -> Network:
    """A network with random weights, in eval mode.

    Args:
        name: an architecture, a key of `networks()`.
        hyperparameters: named as in the published option files; those left out are as published.

    Raises:
        NetworkError: the name or a hyperparameter is unknown or impossible; lists the known ones.

    >>> network = create_network("nafnet", width=8, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1])
    >>> network.spec.multiple
    4
    """
    architecture = networks().get(name)
    if architecture is None:
        raise NetworkError(
            f"no architecture is named {name!r}{suggestion(name, networks())}; "
            f"known are {', '.join(networks())}"
        )
    return create(architecture, hyperparameters)


def open_network(
    name_or_path: str | os.PathLike[str],
    train_size: int | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
) -> Network:
    """A trained network in eval mode, on the CPU, half precision widened to float32.

    Architecture and hyperparameters are read from the checkpoint's metadata where fullres wrote
    it, and otherwise from the names and shapes of its tensors.

    Args:
        name_or_path: bundled weights by name, or the path of a checkpoint.
        train_size: side in pixels of the crops it was trained on, where better known than by the
            checkpoint's metadata or the architecture's publication.
        folder: where names are looked up; the weights that come with fullres if not given.

    Raises:
        NetworkError: the name is unknown, the file is no checkpoint, damaged, of an unknown
            architecture, or does not fit its architecture.
    """
    if train_size is not None and train_size < 1:
        raise NetworkError(f"train_size must be at least 1 pixel, not {train_size}")
    with _checkpoint_path(name_or_path, folder) as path:
        checkpoint = read_checkpoint(path)
        try:
            network = load(checkpoint, networks().values())
        except NetworkError as error:
            raise NetworkError(f"{path}: {error}") from None
    if train_size is None:
        return network
    return replace(network, spec=replace(network.spec, train_size=train_size))


@contextmanager
def _checkpoint_path(
    name_or_path: str | os.PathLike[str], folder: str | os.PathLike[str] | None
) -> Iterator[Path]:
    names = bundled(folder)
    if name_or_path in names:
        source = files("fullres.weights") if folder is None else Path(folder)
        with as_file(source / f"{name_or_path}{_SUFFIX}") as path:
            yield path
        return
    path = Path(name_or_path)
    is_name = isinstance(name_or_path, str) and path.name == name_or_path and not path.suffix
    if is_name and not path.exists():
        is_kind = name_or_path in networks()
        problem = "is an architecture, not weights" if is_kind else "is no bundled network"
        raise NetworkError(
            f"{name_or_path!r} {problem}{suggestion(path.name, names)}; give the path of a "
            f"checkpoint, or one of the bundled networks: {', '.join(names) or 'none'}"
        )
    yield path
