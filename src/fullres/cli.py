"""The command `fullres`: one command a public function."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fullres.errors import FullresError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Restore full-resolution photographs with networks trained on small crops.",
)


def main() -> None:
    """Run the command line; what a user is meant to read is printed without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a × must not end a run on an old terminal
    try:
        app(prog_name="fullres")
    except FullresError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as end:
        code = 130 if isinstance(end, KeyboardInterrupt) else end.code
        if code == 130:
            typer.echo("stopped; the same command goes on from here", err=True)
        sys.exit(code)


def _size(text: str) -> Any:
    """`384`, or `384x512` for height and width."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise typer.BadParameter(f"{text!r} is not a size: write 384, or 384x512 (height x width)")
    return int(text) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def _version(wanted: bool) -> None:
    if wanted:
        import fullres

        typer.echo(f"fullres {fullres.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


NetworkOption = Annotated[
    str, typer.Option("--network", "-n", help="A bundled network or the path of a checkpoint.")
]
WindowOption = Annotated[
    Any,
    typer.Option(
        parser=_size,
        metavar="SIZE",
        help="Local window in pixels, 384 or 384x512 (height x width); 1.5 x the training size "
        "if not given.",
    ),
]
TrainSizeOption = Annotated[
    Any,
    typer.Option(
        parser=_size,
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
        parser=_size,
        metavar="SIZE",
        help="Pixels between the overlapping windows of attention; as few windows as cover the "
        "picture if not given.",
    ),
]


@app.command()
def restore(
    paths: Annotated[
        list[str], typer.Argument(help="Pictures, folders or glob patterns.", show_default=False)
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Result of a single picture, or a folder. Without it results go next to the "
            "picture (photo-restored.jpg) or next to the folder (FOLDER-restored).",
        ),
    ] = None,
    network: NetworkOption = "denoise-small",
    right: Annotated[
        str | None,
        typer.Option(
            help="Right view of a dual-pixel picture, or the folder of the right views, under "
            "the same names."
        ),
    ] = None,
    bayer: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="The pictures are mosaics: RGGB, BGGR, GRBG or GBRG."),
    ] = None,
    noise_level: Annotated[
        float | None,
        typer.Option(help="Standard deviation of the noise, 0 to 255, for networks that ask."),
    ] = None,
    jpeg_quality: Annotated[
        int | None,
        typer.Option(help="Quality the JPEGs were saved with, for networks that ask."),
    ] = None,
    window: WindowOption = None,
    train_size: TrainSizeOption = None,
    only: OnlyOption = None,
    stride: StrideOption = None,
    as_it_is: Annotated[
        bool, typer.Option("--global", help="Run the network as it is, not converted to local.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="auto, or a device as torch names it: cpu, cuda, cuda:1, mps.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto, float16, bfloat16, float32 or float64; auto is float32.")
    ] = "auto",
    tile: Annotated[
        int | None,
        typer.Option(min=16, help="Side of tiles in pixels; from the free memory if not given."),
    ] = None,
    suffix: Annotated[
        str | None, typer.Option(help="Added to the names of results instead of -restored.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")] = (
        False
    ),
    compare: Annotated[
        bool, typer.Option("--compare", help="Also write before/after pictures NAME-compare.png.")
    ] = False,
    bits: Annotated[
        int | None, typer.Option(help="Bits per channel: 8, 16 or 32; as the picture if not given.")
    ] = None,
    quality: Annotated[
        int, typer.Option(min=1, max=100, help="Quality of lossy formats, 1 to 100.")
    ] = 95,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors.")] = False,
) -> None:
    """Restore pictures; folders are searched recursively and keep their structure.

    Results that exist already are left alone, so a stopped run goes on where it was.
    """
    from fullres.console import Display, show_log
    from fullres.restore import restore as restore_pictures

    with Display(quiet) as display:
        show_log(display.console)
        report = restore_pictures(
            paths[0] if len(paths) == 1 else paths,
            output,
            network,
            right=right,
            bayer=bayer,
            noise_level=noise_level,
            jpeg_quality=jpeg_quality,
            local=not as_it_is,
            window=window,
            train_size=train_size,
            only=only or (),
            stride=stride,
            device=device,
            dtype=dtype,
            tile=tile,
            suffix=suffix,
            overwrite=overwrite,
            compare=compare,
            bits=bits,
            quality=quality,
            progress=display,
        )
        display.summarise(report)
    if report.failed:
        raise typer.Exit(1)


@app.command()
def inspect(
    file: Annotated[
        str, typer.Argument(help="A checkpoint or a bundled network.", show_default=False)
    ],
    plan: Annotated[
        bool, typer.Option("--plan", help="Also show what the local conversion would do.")
    ] = False,
    window: WindowOption = None,
    train_size: TrainSizeOption = None,
    only: OnlyOption = None,
    stride: StrideOption = None,
) -> None:
    """Show the architecture, size and training size of a network, and its conversion plan."""
    from fullres.networks.catalog import open_network
    from fullres.networks.inspect import describe

    opened = open_network(file)
    typer.echo(describe(opened))
    if plan:
        from fullres.local import plan as plan_conversion
        from fullres.restore import settings_for

        settings = settings_for(opened, True, window, train_size, only or (), stride)
        assert settings is not None
        typer.echo(f"\n{plan_conversion(opened.module, settings)}")


@app.command()
def networks() -> None:
    """List the networks that fullres knows and the weights that come with it."""
    from fullres.networks.inspect import networks_table

    typer.echo(networks_table())


@app.command()
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NETWORK]...",
            help="Architectures, bundled networks or checkpoints; without any, all that are known "
            "and not slow here.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        Any,
        typer.Option(parser=_size, metavar="SIZE", help="Size of the picture, height x width."),
    ] = "720x1280",
    window: WindowOption = None,
    train_size: TrainSizeOption = None,
    device: Annotated[
        str, typer.Option(help="auto, or a device as torch names it: cpu, cuda, cuda:1, mps.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto, float16, bfloat16, float32 or float64; auto is float32.")
    ] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Passes of which the median counts.")] = 3,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as Markdown.")
    ] = False,
) -> None:
    """Measure networks on this machine: time, overhead of local conversion, peak memory.

    Times are medians of passes that take turns. Peak memory is what a pass adds to the resident
    memory of a process of its own, on CUDA to what torch has allocated.
    """
    from fullres.bench import bench as measure
    from fullres.bench import show
    from fullres.measure import machine

    typer.echo(f"{machine(device)}\n")
    found = measure(
        names or (),
        size,
        device=device,
        dtype=dtype,
        repeats=repeats,
        window=window,
        train_size=train_size,
    )
    left = show(found, markdown)
    for one in left:
        typer.echo(f"{one.name}: {one.reason}", err=bool(names))
    if left and names:
        raise typer.Exit(1)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, a TOML file.", show_default=False)],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes of the recipe.", show_default=False),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; runs/NAME if not given.", show_default=False),
    ] = None,
) -> None:
    """Train a network; a run that was stopped goes on from its last checkpoint."""
    from rich.console import Console

    from fullres.console import show_log

    try:
        from fullres.training.recipe import read_recipe
    except ModuleNotFoundError as error:
        raise FullresError(
            f"training needs the package {error.name}: pip install 'fullres[train]'"
        ) from error
    from fullres.training.train import train as train_network

    settings = read_recipe(recipe, changes or ())
    show_log(Console(highlight=False, markup=False, soft_wrap=True))
    typer.echo(train_network(settings, run or Path("runs") / settings.name))
