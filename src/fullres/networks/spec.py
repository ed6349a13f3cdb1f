"""What is known of a network beyond its weights, and how an architecture describes itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

State = Mapping[str, Tensor]
"""A state dict: flat names, tensors whose shapes tell the hyperparameters."""


@dataclass(frozen=True)
class Spec:
    """A network's contract with whoever runs it.

    Pictures are (B, in_channels, H, W) to (B, out_channels, scale * H, scale * W), any H and W;
    a video network takes and gives (B, T, C, H, W).
    """

    architecture: str
    """Name of the architecture, a key of `networks()`."""
    hyperparameters: Mapping[str, Any]
    """All arguments of the architecture, as `create_network` takes them."""
    in_channels: int
    """Channels of the input, those of all views and of the condition among them."""
    out_channels: int
    """Channels of the output."""
    scale: int = 1
    """Height and width of the output over those of the input."""
    multiple: int = 1
    """Side that the network pads its input to a multiple of, in pixels: align tiles to it."""
    value_range: float = 1.0
    """White: inputs and outputs lie between 0 and this value."""
    frames_lost: tuple[int, int] | None = None
    """Frames that a video network drops at the start and at the end; None for pictures."""
    views: int = 1
    """Pictures that an input stacks; 2 for the left and right view of a dual-pixel camera."""
    condition: Literal["noise level", "JPEG quality"] | None = None
    """What the last channel of the input tells, the same at every pixel: the standard deviation
    of the noise (white is 1), or the quality of the JPEG over 100."""
    blind: bool = False
    """Whether a network with a condition also runs without that channel, which then is not among
    `in_channels`, and estimates it."""
    mosaic: Literal["samples", "interpolated"] = "samples"
    """How a network that restores mosaics takes them: samples with 0 for the colours that are not
    there, or colours interpolated by Malvar's gradient-corrected filters."""
    task: str | None = None
    """What the weights do to a picture, where it is known."""
    train_size: int | None = None
    """Side of the training crops in pixels, where it is known."""


@dataclass(frozen=True)
class Network:
    """A module, ready to run (in eval mode), and its spec."""

    module: nn.Module
    """Maps pictures to restored pictures as the spec says."""
    spec: Spec
    """What is known of the module beyond its weights."""


@dataclass(frozen=True)
class Architecture:
    """A kind of network. Each file of this package that defines one names it `ARCHITECTURE`."""

    name: str
    """Name for `create_network`; the file has the same."""
    title: str
    """Name as the paper writes it."""
    paper: str
    """Title, venue and year of the paper."""
    authors: str
    """Authors of the paper."""
    weights: str
    """Where the published weights come from."""
    licence: str
    """Licence of the published weights."""
    tasks: tuple[str, ...]
    """Tasks that weights were published for; a single one is taken for granted."""
    train_size: int
    """Side of the crops in pixels that the published weights were trained on."""
    build: Callable[..., nn.Module]
    """The module's class; typed arguments, named as in the published option files.

    In eval mode the module gives the restored picture alone. Arguments that cannot be are a
    ValueError. Tensors made in the constructor are parameters or buffers.
    """
    hyperparameters: Callable[[State], dict[str, Any] | None]
    """Reads `build`'s arguments from a state dict's names and shapes.

    None if the state dict is of another architecture; arguments that leave no trace in names
    and shapes are left out. It must stand any state dict.
    """
    spec: Callable[[Mapping[str, Any]], Spec]
    """The spec of a network with these hyperparameters, all given."""
    published: Callable[[str, Mapping[Any, Any]], Mapping[str, Any]] = lambda stem, content: {}
    """Arguments that neither names nor shapes tell but a file does as it was published: by its
    name without suffix, and by what it holds beside the weights."""
    adapt: Callable[[State], State] = dict
    """Renames or drops what published state dicts have beside or unlike the module's own names."""


def count(state: State, prefix: str) -> int:
    """How many modules of a list a state dict holds: 1 + the largest number after `prefix`.

    >>> count({"body.0.weight": ..., "body.11.weight": ..., "tail.weight": ...}, "body.")
    12
    """
    numbers = (name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix))
    return max((int(n) + 1 for n in numbers if n.isdecimal() and len(n) < 4), default=0)
