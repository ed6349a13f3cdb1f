"""An architecture made into a network, with random weights or with those of a checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fullres.errors import NetworkError
from fullres.io.checkpoint import Checkpoint
from fullres.networks import foreign
from fullres.networks.arguments import complete
from fullres.networks.spec import Architecture, Network, Spec, State


def create(architecture: Architecture, hyperparameters: Mapping[str, Any]) -> Network:
    """A network with random weights, in eval mode.

    Raises:
        NetworkError: a hyperparameter is unknown or impossible.
    """
    arguments = complete(architecture.build, hyperparameters, architecture.title)
    module = _build(architecture, arguments)
    return Network(module.eval(), _spec(architecture, arguments, {}))


def load(checkpoint: Checkpoint, architectures: Collection[Architecture]) -> Network:
    """The network that a checkpoint holds, in eval mode, in the module's own precision.

    The first candidate that any architecture claims decides; among its claims the best fit does.
    What none claims, or fits, is left to spandrel's architectures, where spandrel is installed.

    Raises:
        NetworkError: nothing is claimed, the claimed weights do not fit, or are not finite.
    """
    for state in checkpoint.candidates():
        claims = _claims(state, checkpoint, architectures)
        if claims:
            best = min(claims, key=lambda claim: claim.misfits)
            other = best.differences["lacks"] or best.differences["has unexpected"]
            network = _foreign(checkpoint, forgiving=True) if other else None
            if network is not None:
                return network
            spec = _spec(*best[:2], checkpoint.metadata)
            task = spec.task or _task_of(checkpoint.path.stem, best.architecture)
            return Network(_restored(best), replace(spec, task=task))
    network = _foreign(checkpoint)
    if network is not None:
        return network
    state = max(checkpoint.candidates(), key=_parameters)
    known = ", ".join(architecture.title for architecture in architectures)
    more = "those of spandrel" if foreign.installed() else foreign.REMEDY
    raise NetworkError(
        f"is of no known architecture: {_parameters(state):,} parameters in {len(state)} tensors "
        f"({_some(state)}); known are {known}, and {more}"
    )


def _foreign(checkpoint: Checkpoint, forgiving: bool = False) -> Network | None:
    """The network as one of spandrel's; None if it is none, or is not in order and `forgiving`."""
    try:
        network = foreign.load(checkpoint)
    except NetworkError:
        if forgiving:
            return None
        raise
    return network and replace(network, spec=_as_told(network.spec, checkpoint.metadata))


class _Claim(NamedTuple):
    """A state dict taken for one of an architecture's."""

    architecture: Architecture
    arguments: dict[str, Any]
    module: nn.Module  # without memory, on the meta device
    state: State
    differences: dict[str, list[str]]

    @property
    def misfits(self) -> int:
        return sum(map(len, self.differences.values()))


def _claims(
    state: State, checkpoint: Checkpoint, architectures: Collection[Architecture]
) -> list[_Claim]:
    claims, metadata = [], checkpoint.metadata
    for architecture in architectures:
        adapted = architecture.adapt(state)
        if "hyperparameters" in metadata and metadata.get("network") == architecture.name:
            found: dict[str, Any] | None = _declared(metadata["hyperparameters"])
        else:
            found = architecture.hyperparameters(adapted)
            if found is not None:
                told = architecture.published(checkpoint.path.stem, checkpoint.content)
                found = {**found, **told}
        if found is not None:
            arguments = complete(architecture.build, found, architecture.title)
            with torch.device("meta"):
                module = _build(architecture, arguments)
            differences = _differences(module.state_dict(), adapted)
            claims.append(_Claim(architecture, arguments, module, adapted, differences))
    return claims


def _declared(hyperparameters: str) -> dict[str, Any]:
    try:
        declared = json.loads(hyperparameters)
    except json.JSONDecodeError:
        declared = None
    if not isinstance(declared, dict):
        raise NetworkError("its metadata 'hyperparameters' is no JSON object; export it again")
    return declared


def _differences(expected: State, state: State) -> dict[str, list[str]]:
    shared = [name for name in expected if name in state]
    return {
        "lacks": [name for name in expected if name not in state],
        "has unexpected": [name for name in state if name not in expected],
        "has unlike": [
            f"{name} is {_kind(state[name])}, not {_kind(expected[name])}"
            for name in shared
            if _kind(state[name]) != _kind(expected[name])
        ],
    }


def _kind(tensor: Tensor) -> str:
    # float16 weights serve a float32 network, quantised integers do not
    number = "" if tensor.is_floating_point() else f"{tensor.dtype} ".removeprefix("torch.")
    return f"{number}{tuple(tensor.shape)}"


def _restored(claim: _Claim) -> nn.Module:
    title, expected = claim.architecture.title, claim.module.state_dict()
    if claim.misfits:
        words = "; ".join(f"{k} {len(v)} ({_some(v)})" for k, v in claim.differences.items() if v)
        raise NetworkError(
            f"looks like {title} but of its {len(expected)} tensors {words}; it is incomplete or "
            "of a variant, so take the file as it was published"
        )
    # copies, so that nothing stays mapped to a file that may be overwritten
    weights = {
        name: claim.state[name].to(like.dtype, copy=True, memory_format=torch.contiguous_format)
        for name, like in expected.items()
    }
    broken = [name for name, weight in weights.items() if not bool(weight.isfinite().all())]
    if broken:
        raise NetworkError(
            f"is {title} with NaN or infinity in {len(broken)} of its tensors ({_some(broken)}); "
            "take a checkpoint from before its training diverged"
        )
    module = claim.module
    if any(name not in expected for name, _ in module.named_buffers()):
        module = _build(claim.architecture, claim.arguments)  # unsaved buffers need their values
    module.load_state_dict(weights, assign=True)
    return module.eval()


def _build(architecture: Architecture, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        return architecture.build(**arguments)
    except (ValueError, RuntimeError, OverflowError) as error:
        reason = str(error).strip().split("\n")[0]
        raise NetworkError(f"{architecture.title} cannot be built: {reason}") from None


def _spec(
    architecture: Architecture, arguments: Mapping[str, Any], metadata: Mapping[str, str]
) -> Spec:
    spec = architecture.spec(arguments)
    task = architecture.tasks[0] if len(architecture.tasks) == 1 else None
    published = replace(
        spec, task=spec.task or task, train_size=spec.train_size or architecture.train_size
    )
    return _as_told(published, metadata)


_TASKS = {
    "defocus": "defocus",
    "demosaic": "demosaic",
    "deblur|gopro|hide|reds|motion": "deblur",
    "derain|rain": "derain",
    "dehaz|haz": "dehaze",
    "denois|sidd|sigma": "denoise",
    "jpeg|car": "jpeg",
}
"""Words in the names of published files, and the task that each tells."""


def _task_of(stem: str, architecture: Architecture) -> str | None:
    """The task that a file's name tells, if it is one of those that weights were published for."""
    for words, task in _TASKS.items():
        if task in architecture.tasks and re.search(words, stem, re.IGNORECASE):
            return task
    return None


def _as_told(spec: Spec, metadata: Mapping[str, str]) -> Spec:
    size = metadata.get("train_size", "")
    return replace(
        spec,
        task=metadata.get("task", spec.task),
        train_size=int(size) if size.isdecimal() else spec.train_size,
    )


def _parameters(state: State) -> int:
    return sum(tensor.numel() for tensor in state.values())


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:3]) + (", …" if len(names) > 3 else "")
