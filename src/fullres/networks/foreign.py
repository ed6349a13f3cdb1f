"""Networks of other authors, by way of spandrel, an optional package (`fullres[spandrel]`).

spandrel (MIT) recognises more than forty architectures by the names in a state dict and brings
their modules; the package spandrel_extra_arches, where it is installed, adds some more, whose
licences allow less. Only tensors reach either: the file is read by `fullres.io.checkpoint`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fullres.errors import NetworkError
from fullres.io.checkpoint import Checkpoint
from fullres.networks.layers import pad_to_multiple
from fullres.networks.spec import Network, Spec

if TYPE_CHECKING:
    from spandrel import ArchRegistry, ImageModelDescriptor

EXTRA = "spandrel_extra_arches"
REMEDY = "more than forty others with spandrel: pip install 'fullres[spandrel]'"
"""What an error about an unknown architecture adds where spandrel is not installed."""

_SINGLY = {"DDColor", "IPT", "SeemoRe"}
"""Architectures that take one picture, not a batch of several."""
_CONDITIONED = {"DRUNet", "DnCNN"}
"""Architectures that may take the noise level as one more channel, which spandrel makes up."""

_BLIND = {"FBCNN"}
"""Architectures that estimate the JPEG quality where it is not given."""

_REFUSED = {
    "FaceSR": "restores aligned pictures of one face, not pictures of any kind",
    "Inpainting": "fills in what a mask marks, and needs the mask beside the picture",
}
_TASKS = {"SR": "super-resolution", "Restoration": "restoration"}


class Foreign(nn.Module):
    """Another author's module, made to take pictures of any size and in any number.

    Shapes: (B, C, H, W) to (B, C', scale * H, scale * W), values in [0, 1] as the module takes
    and gives them. A picture is extended by reflection at the bottom and right to the size that
    the module requires, and its result cropped.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Callable[[nn.Module, Tensor], Tensor],
        scale: int = 1,
        multiple: int = 1,
        minimum: int = 1,
        square: bool = False,
        singly: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.call = call
        """How the module is run on one batch: normalises, adds a noise map, takes one output."""
        self.scale = scale
        self.multiple = multiple
        self.minimum = minimum
        """Smallest side that the module takes, in pixels."""
        self.square = square
        """Whether the module takes only squares."""
        self.singly = singly
        """Whether the pictures of a batch run one after the other."""

    def _get_name(self) -> str:
        """By which reports and errors know the network: its own, not the wrapper's."""
        return str(self.model._get_name())  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        extended = self._extended(x)
        x = x.clone() if extended is x else extended  # some modules scale their input in place
        if self.singly and len(x) > 1:
            y = torch.cat([self.call(self.model, picture) for picture in torch.split(x, 1)])
        else:
            y = self.call(self.model, x)
        return y[..., : height * self.scale, : width * self.scale]

    def _extended(self, x: Tensor) -> Tensor:
        height, width = (max(side, self.minimum) for side in x.shape[-2:])
        if self.square:
            side = max(height, width)
            return pad_to_multiple(x, side + -side % self.multiple)
        if (height, width) != x.shape[-2:]:
            x = pad_to_multiple(x, self.minimum)[..., :height, :width]
        return pad_to_multiple(x, self.multiple)


def load(checkpoint: Checkpoint) -> Network | None:
    """The network that a checkpoint holds, in eval mode, in float32; None if none is known.

    The training size of such a network is not known.

    Raises:
        NetworkError: the weights do not fit the architecture that they look like, are not finite,
            or belong to a network that does not make a picture from a picture.
    """
    registry = architectures()
    failures = []
    if registry is None:
        return None
    for state in checkpoint.candidates():
        for support in registry.architectures("detection"):
            name = support.architecture.name
            try:
                with _quiet():
                    if not support.detect(state):
                        continue
                    descriptor = support.architecture.load(dict(state))
            except Exception as error:  # noqa: BLE001 - what a stranger's code makes of any names
                failures.append(f"{name} ({_first_line(error)})")
            else:
                return network_of(descriptor)
    if failures:
        raise NetworkError(
            f"looks to spandrel like {' or '.join(dict.fromkeys(failures[:3]))}, and cannot be "
            "loaded as such; take the file as it was published"
        )
    return None


def network_of(descriptor: ImageModelDescriptor[Any]) -> Network:
    """A network of spandrel's descriptor, which it shares its parameters with.

    Raises:
        NetworkError: it does not make a picture from a picture, or has NaN or infinity in it.
    """
    name, purpose = descriptor.architecture.name, descriptor.purpose
    if purpose not in _TASKS:
        reason = _REFUSED.get(purpose, f"is made for {purpose}")
        raise NetworkError(f"is {name}, which {reason}; fullres cannot run it")
    channels, given = descriptor.input_channels, descriptor.output_channels
    if channels != given:
        raise NetworkError(
            f"is {name}, which makes {given} channels of {channels}; fullres cannot run it, for it "
            "gives back pictures with the channels that they have"
        )
    state = descriptor.model.state_dict()
    broken = [n for n, t in state.items() if not bool(t.isfinite().all())]
    if broken:
        raise NetworkError(
            f"is {name} with NaN or infinity in {len(broken)} of its tensors ({broken[0]}, …); "
            "take a checkpoint from before its training diverged"
        )
    conditioned = is_conditioned(descriptor)
    told = descriptor.architecture.id in _BLIND
    spec = Spec(
        architecture=name,
        hyperparameters=_plain(getattr(descriptor.model, "hyperparameters", {})),
        in_channels=channels + conditioned,
        out_channels=given,
        scale=descriptor.scale,
        multiple=descriptor.size_requirements.multiple_of,
        condition="noise level" if conditioned else "JPEG quality" if told else None,
        blind=told,
        task=_TASKS[purpose],
    )
    return Network(wrapped(descriptor).eval(), spec)


def wrapped(descriptor: ImageModelDescriptor[Any]) -> Foreign:
    """A descriptor's module made to take pictures of any size, sharing its parameters."""
    needs = descriptor.size_requirements
    # what the public call adds (inference mode, clamping) would hide the network from autograd
    call: Callable[[nn.Module, Tensor], Tensor] = descriptor._call_fn
    if is_conditioned(descriptor):
        call = nn.Module.__call__
    elif descriptor.architecture.id in _BLIND:
        call = partial(_told_the_quality, channels=descriptor.input_channels)
    return Foreign(
        descriptor.model,
        call,
        scale=descriptor.scale,
        multiple=needs.multiple_of,
        minimum=max(needs.minimum, 1),
        square=needs.square,
        singly=descriptor.architecture.id in _SINGLY,
    )


def _told_the_quality(model: nn.Module, x: Tensor, channels: int) -> Tensor:
    """FBCNN (Jiang et al., ICCV 2021): it takes 1 - quality / 100, or estimates it."""
    picture, quality = x[:, :channels], x[:, channels:, 0, 0]
    y: Tensor = (model(picture, 1 - quality) if x.shape[1] > channels else model(picture))[0]
    return y


def is_conditioned(descriptor: ImageModelDescriptor[Any]) -> bool:
    """Whether its input has one more channel, the noise level."""
    if descriptor.architecture.id not in _CONDITIONED:
        return False
    first = next(m for m in descriptor.model.modules() if isinstance(m, nn.Conv2d))
    return bool(first.in_channels == descriptor.input_channels + 1)


def installed() -> bool:
    """Whether spandrel is there."""
    return find_spec("spandrel") is not None


def version() -> str:
    """Of spandrel."""
    found: str = import_module("spandrel").__version__
    return found


def architectures() -> ArchRegistry | None:
    """The architectures and, where they are installed, the extra ones."""
    if not installed():
        return None
    with _quiet():
        registry: ArchRegistry = import_module("spandrel").MAIN_REGISTRY.copy()
        if find_spec(EXTRA) is not None:
            extra = import_module(EXTRA).EXTRA_REGISTRY
            registry.add(*extra, ignore_duplicates=True)
    return registry


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings about a stranger's code are not for the user to read."""
    # with derivatives, a weight that is computed from others (weight norm) could not be copied
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def _plain(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are numbers, words or lists of them; the rest are classes and functions."""
    kinds = (int, float, str, list, tuple, NoneType)
    return {k: v for k, v in hyperparameters.items() if isinstance(v, kinds)}


def _first_line(error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [""])[0].rstrip(".:")
    return f"{type(error).__name__}: {reason}"[:120]
