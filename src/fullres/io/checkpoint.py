"""Checkpoint files: PyTorch (.pth, .pt, .ckpt, old and new) and safetensors.

Nothing that a file brings is ever imported or called. Classes that a checkpoint names beside its
tensors (options, configurations, numpy scalars) are replaced by an inert stand-in.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import threading
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fullres.errors import NetworkError

_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PICKLES = 4  # magic number, version, system, then the object itself
_PICTURES = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"RIFF": "WebP",
    b"BM": "BMP",
}

# fmt: off
_WRAPPERS = (
    "params_ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema", "average",
    "params", "state_dict", "model_state_dict", "model_state", "model", "module", "_orig_mod",
    "generator", "model_g", "net_g", "netG", "network", "net",
)
# fmt: on
"""Names under which weights are published, as keys or as dotted prefixes; best first."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds."""

    path: Path
    """The file."""
    content: dict[Any, Any]
    """Nested dictionaries; the leaves that count are tensors on the CPU."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Metadata of a safetensors file, or what fullres wrote into a state of its training."""

    def candidates(self) -> Iterator[dict[str, Tensor]]:
        """Every flat state dict the file may mean, the most likely first.

        Nested dictionaries are opened, averaged weights before plain ones. A dotted prefix is
        stripped where all names share it or where it is a customary wrapper (`module.`,
        `model.`), so that a network is never mistaken for one of its parts.
        """
        for state in _states(self.content):
            yield from _stripped(state)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint, recognised by its content, without running anything it contains.

    Tensors stay mapped to the file where the format allows, so copy what is to be kept.

    Raises:
        NetworkError: the file is missing, damaged, no checkpoint, or holds no tensors.
    """
    path = Path(path)
    head = _head(path)
    metadata: dict[str, str] = {}
    content: Any
    if head.startswith(_ZIP):
        content = _read_zip(path)
    elif head.startswith(_LEGACY):
        content = _read_legacy(path)
    elif head[4:9] == b"\0\0\0\0{" or (path.suffix == ".safetensors" and head):
        content, metadata = _read_safetensors(path)
    else:
        raise NetworkError(f"{path}: {_mistaken(head)}")
    if not isinstance(content, dict):
        content = {}
    if isinstance(told := content.get("fullres"), dict):
        metadata = {name: value for name, value in told.items() if isinstance(value, str)}
    checkpoint = Checkpoint(path, content, metadata)
    if not any(checkpoint.candidates()):
        raise NetworkError(
            f"{path}: holds no named tensors; save the network's state_dict(), "
            "not the network object or its options"
        )
    return checkpoint


def _head(path: Path) -> bytes:
    if path.is_dir():
        raise NetworkError(f"{path}: is a folder; name the checkpoint file in it")
    try:
        with path.open("rb") as file:
            return file.read(512)
    except FileNotFoundError:
        raise NetworkError(f"{path}: no such checkpoint; check the path") from None
    except OSError as error:
        raise NetworkError(f"{path}: cannot be read: {error.strerror}; check the file") from None


def _mistaken(head: bytes) -> str:
    expected = "expected a PyTorch checkpoint (.pth, .pt, .ckpt) or .safetensors"
    if not head:
        return "is empty (0 bytes); copy or download it again"
    for magic, kind in _PICTURES.items():
        if head.startswith(magic):
            return f"is a picture ({kind}); {expected}"
    if head[:1] == b"\x80":
        return "is a pickle that torch.save did not write; save the state dict with torch.save"
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it, or save it again with a recent PyTorch"
    text = head.decode("utf-8", errors="ignore")
    whole = len(text.encode()) > len(head) - 4  # the last character may be cut
    if whole and all(c.isprintable() or c.isspace() for c in text):
        begin = " ".join(text.split())[:40]
        return (
            f"is text (it begins {begin!r}), perhaps a web page or a pointer saved in place of "
            f"the weights; {expected}, download it again"
        )
    return f"is in no format known here; {expected}"


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Whatever the bytes make a parser raise, the file is at fault."""
    try:
        yield
    except NetworkError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise NetworkError(
            f"{path}: is truncated or damaged ({reason}); copy or download it again"
        ) from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    with _blaming(path), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def _read_zip(path: Path) -> Any:
    with _blaming(path), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.endswith("constants.pkl") for name in names):
            raise NetworkError(
                f"{path}: is a TorchScript archive, a program; load it with torch.jit.load and "
                "save its state_dict() with torch.save"
            )
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if not pickles:
            raise NetworkError(f"{path}: is a zip archive without a checkpoint; unpack it first")
        # torch does not compare checksums, so flipped bits would pass as weights
        broken = archive.testzip()
        if broken:
            raise ValueError(f"{broken} does not match its checksum")
        with archive.open(pickles[0]) as file:
            named = _named_globals(path, file)
        # given a path named .safetensors, torch would not look at the content
        return _load(path, named, mmap=path.suffix != ".safetensors")


def _read_legacy(path: Path) -> Any:
    named: set[str] = set()
    with _blaming(path):
        with path.open("rb") as file:
            for _ in range(_LEGACY_PICKLES):
                named |= _named_globals(path, file)
        return _load(path, named, mmap=False)


def _named_globals(path: Path, file: IO[bytes]) -> set[str]:
    """Dotted names of the classes and functions that the pickle at the file's position wants."""
    named = set()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "PROTO" and int(argument or 0) > 2:
            raise NetworkError(
                f"{path}: is written with pickle protocol {argument}; save it again with "
                "torch.save's own protocol, 2, or as .safetensors"
            )
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            # protocol 2 spells standard modules as Python 2 did
            module, name = NAME_MAPPING.get(
                (module, name), (IMPORT_MAPPING.get(module, module), name)
            )
            named.add(f"{module}.{name}")
    return named


class _Inert:
    """Stands for any object whose class a file names: takes every argument, holds nothing."""

    def __init__(self, *_arguments: object) -> None: ...

    def __setstate__(self, _state: object) -> None: ...


def _inert_mapping(*_arguments: object) -> dict[Any, Any]:
    return {}


_stand_ins = threading.Lock()  # torch keeps its list of permitted classes for the whole process


def _load(path: Path, named: set[str], *, mmap: bool) -> Any:
    # torch prefers its own safe classes to a stand-in of the same name
    inert: list[Any] = [
        (_inert_mapping if name == "collections.defaultdict" else _Inert, name) for name in named
    ]
    try:
        with _stand_ins, torch.serialization.safe_globals(inert), path.open("rb") as file:
            return torch.load(
                path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap
            )
    except pickle.UnpicklingError:
        foreign = sorted(n for n in named if not n.startswith(("torch.", "collections.")))
        if not foreign:
            raise
        wanted = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
        raise NetworkError(
            f"{path}: is refused, for it wants more than tensors ({wanted}); save its state dict "
            "alone, or get the weights from a source you trust"
        ) from None


def _rank(name: object) -> int:
    return _WRAPPERS.index(name) if name in _WRAPPERS else len(_WRAPPERS)


def _states(content: dict[Any, Any]) -> Iterator[dict[str, Tensor]]:
    """The tensors of each nested dictionary, depth first, the best named first."""
    pending, seen = [content], set[int]()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        # a file can give a dictionary attributes that hide its methods, hence dict.items
        items = sorted(dict.items(node), key=lambda item: _rank(item[0]))
        state = {name: value.detach() for name, value in items if _is_weight(name, value)}
        if state:
            yield state
        pending.extend(value for _, value in reversed(items) if isinstance(value, dict))


def _is_weight(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _stripped(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The state dict itself, then without one dotted prefix, without two, and so on."""
    pending = [state]
    while pending:
        state = pending.pop()
        yield state
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in state.items():
            prefix, dot, rest = name.partition(".")
            if dot:
                groups.setdefault(prefix, {})[rest] = value
        wrappers = [p for p in groups if p in _WRAPPERS or len(groups[p]) == len(state)]
        pending.extend(groups[p] for p in sorted(wrappers, key=_rank, reverse=True))
