"""Whose pictures a study takes, and how a network gets them."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from fullres.data.datasets import Dataset, open_dataset
from fullres.data.pairing import Pair
from fullres.errors import FullresError
from fullres.evaluation.examples import Example
from fullres.feed import Given, as_input, open_feed, stacked
from fullres.io.image import open_image
from fullres.memory import free_memory
from fullres.metrics import Protocol
from fullres.metrics import protocol as named
from fullres.networks.catalog import open_network
from fullres.networks.spec import Network, Spec
from fullres.restore import Restorer, Size

AnyNetwork = Network | str | os.PathLike[str]
"""An open network, the name of a bundled one, or a checkpoint."""
Data = Dataset | str | os.PathLike[str]
"""A data set or its folder."""


def network_of(network: AnyNetwork) -> Network:
    """The network, opened if it is not."""
    return network if isinstance(network, Network) else open_network(os.fspath(network))


def dataset_of(data: Data, layout: str, split: str, network: Network) -> Dataset:
    """The data set, opened if it is not, in the network's scale."""
    if isinstance(data, Dataset):
        return data
    scale = network.spec.scale
    return open_dataset(data, layout, split, scale=None if scale == 1 else scale)


def protocol_of(protocol: str | Protocol | None, dataset: Dataset) -> Protocol:
    """The protocol that is asked for, or the one that is usual for the data set."""
    return protocol if isinstance(protocol, Protocol) else named(protocol or dataset.protocol)


def degraded_of(pair: Pair) -> Path:
    """The file of the degraded picture; of a folder of single pictures these are it."""
    return pair.degraded or pair.target


def input_of(pair: Pair, spec: Spec, given: Given) -> Tensor:
    """What the network takes for the degraded picture of a pair: (B, in_channels, H, W), in [0, 1].

    Raises:
        FullresError: the picture cannot be read or does not fit the network.
    """
    if pair.degraded_key is not None:
        raise FullresError(
            f"{pair.degraded}: studies read pictures from files of their own; unpack the blocks"
        )
    right = pair.right if spec.views == 2 else None
    with open_feed(degraded_of(pair), right, spec, given) as feed:
        return feed.read(0, 0, *feed.size)


def as_network_takes(example: Example, spec: Spec, condition: float | None) -> Tensor:
    """The degraded picture as a network takes it, (B, in_channels, H, W)."""
    if spec.views == 2 and example.right is not None:
        return stacked(example.degraded, example.right, spec)
    return as_input(example.degraded, spec, condition, example.path)


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width."""
    with open_image(path) as source:
        return source.height, source.width


def side_of(size: Size | None) -> tuple[int, int]:
    """Height and width of a size that a `Local` holds."""
    assert isinstance(size, tuple)
    return size


def check_memory(restorer: Restorer, size: tuple[int, int], path: Path) -> None:
    """Refuse a picture that memory does not hold in one piece, and the study needs so.

    Raises:
        FullresError: it does not.
    """
    needed, free = restorer.peak(*size), free_memory(restorer.device)
    if needed > free:
        raise FullresError(
            f"{path}: needs {needed / 1e9:.1f} GB in one piece and {free / 1e9:.1f} GB are free; "
            "give smaller pictures"
        )
