"""Checks hyperparameters against the typed arguments of a network's class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from torch import nn

from fullres.errors import NetworkError


def complete(
    build: Callable[..., nn.Module], given: Mapping[str, Any], title: str
) -> dict[str, Any]:
    """All arguments of `build`: those given, checked, and its defaults; lists become tuples.

    Raises:
        NetworkError: an argument is unknown, missing or of the wrong type.
    """
    known = inspect.signature(build, eval_str=True).parameters
    for name in given:
        if name not in known:
            raise NetworkError(
                f"{title} has no hyperparameter {name!r}{suggestion(name, known)}; "
                f"it takes {', '.join(known)}"
            )
    arguments = {}
    for name, parameter in known.items():
        hint, value = parameter.annotation, given.get(name, parameter.default)
        if value is inspect.Parameter.empty:
            raise NetworkError(f"{title} needs the hyperparameter {name!r}: {_words(hint)}")
        if not _fits(value, hint):
            raise NetworkError(f"{title}: {name} must be {_words(hint)}, not {value!r}")
        arguments[name] = _frozen(value)
    return arguments


def suggestion(name: str, known: Iterable[str]) -> str:
    """The known name that was probably meant, as ` (did you mean 'x'?)`, or nothing.

    >>> suggestion("widht", ["depth", "width"])
    " (did you mean 'width'?)"
    """
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _fits(value: object, hint: Any) -> bool:
    kind, options = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, option) for option in options)
    if kind is Literal:
        return value in options
    if kind in (Sequence, list, tuple):
        return isinstance(value, list | tuple) and all(_fits(v, options[0]) for v in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _words(hint: Any) -> str:
    kind, options = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(map(_words, options))
    if kind is Literal:
        return f"one of {', '.join(map(repr, options))}"
    if kind in (Sequence, list, tuple):
        return f"a list (each {_words(options[0])})"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    return "none" if kind is NoneType else names.get(kind, kind.__name__)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
