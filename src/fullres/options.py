"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def read_size(text: str) -> Any:
    """`384`, or `384x512` for height and width."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise typer.BadParameter(f"{text!r} is not a size: write 384, or 384x512 (height x width)")
    return int(text) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


NetworkOption = Annotated[
    str, typer.Option("--network", "-n", help="A bundled network or the path of a checkpoint.")
]
WindowOption = Annotated[
    Any,
    typer.Option(
        parser=read_size,
        metavar="SIZE",
        help="Local window in pixels, 384 or 384x512 (height x width); 1.5 x the training size "
        "if not given.",
    ),
]
TrainSizeOption = Annotated[
    Any,
    typer.Option(
        parser=read_size,
        metavar="SIZE",
        help="Size of the crops the network was trained on, if it does not say.",
    ),
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Make only these modules local; a pattern such as 'encoder.*', may be repeated.",
    ),
]
StrideOption = Annotated[
    Any,
    typer.Option(
        parser=read_size,
        metavar="SIZE",
        help="Pixels between the overlapping windows of attention; as few windows as cover the "
        "picture if not given.",
    ),
]
