"""The command `fullres`: one command a public function."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fullres.cli_study import app as studies
from fullres.errors import FullresError
from fullres.options import (
    NetworkOption,
    OnlyOption,
    StrideOption,
    TrainSizeOption,
    WindowOption,
    read_size,
)

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
        typer.Option(parser=read_size, metavar="SIZE", help="Size of the picture, height x width."),
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
def evaluate(
    network: Annotated[
        str,
        typer.Argument(help="A bundled network or the path of a checkpoint.", show_default=False),
    ],
    data: Annotated[
        str,
        typer.Argument(
            help="Folder of a data set: pairs, or clean pictures to --degrade.", show_default=False
        ),
    ],
    layout: Annotated[
        str, typer.Option(help="How the folder is laid out, pairs or gopro for instance.")
    ] = "auto",
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    protocol: Annotated[
        str | None,
        typer.Option(help="How pictures are measured; as is usual for the data if not given."),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            "--mode",
            "-m",
            metavar="MODE",
            help="global, local, patches, or patches-16 for patches that overlap by 16 pixels; "
            "may be repeated. The first three if not given.",
        ),
    ] = None,
    how: Annotated[
        str | None,
        typer.Option(
            "--degrade",
            metavar="TEXT",
            help="How clean pictures are degraded, such as 'noise sigma=[25,25]'.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of --degrade.")] = 0,
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
    patch_size: Annotated[
        Any,
        typer.Option(
            parser=read_size,
            metavar="SIZE",
            help="Size of patches; the training size if not given.",
        ),
    ] = None,
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
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for CSV, JSON, Markdown and a contact sheet; a run that was stopped goes "
            "on there.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Drop the results that the folder holds.")
    ] = False,
    per_picture: Annotated[
        bool, typer.Option("--per-picture", help="Also print a table with a line a picture.")
    ] = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print all rows as CSV, and nothing else.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print settings, means and rows as JSON, nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Measure how well a network restores a data set: as it is, local, and in patches.

    Memory is, on CUDA, the peak that torch has allocated; elsewhere that of the tensors, estimated.
    """
    from fullres.console import Display, show_log
    from fullres.data.degrade import parse_degradation
    from fullres.evaluate import MODES
    from fullres.evaluate import evaluate as evaluate_network

    with Display(quiet or as_csv or as_json) as display:
        show_log(display.console)
        found = evaluate_network(
            network,
            data,
            modes=mode or MODES,
            protocol=protocol,
            layout=layout,
            split=split,
            degradation=parse_degradation(how) if how else None,
            seed=seed,
            noise_level=noise_level,
            jpeg_quality=jpeg_quality,
            window=window,
            train_size=train_size,
            only=only or (),
            stride=stride,
            patch_size=patch_size,
            device=device,
            dtype=dtype,
            tile=tile,
            output=output,
            overwrite=overwrite,
            progress=display,
        )
    if as_csv or as_json:
        typer.echo(found.csv() if as_csv else found.json(), nl=False)
        return
    typer.echo(found.table())
    if per_picture:
        typer.echo(f"\n{found.per_picture()}")


@app.command()
def degrade(
    pictures: Annotated[str, typer.Argument(help="Folder of clean pictures.", show_default=False)],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder for the pairs, in input and target.")
    ],
    how: Annotated[
        str,
        typer.Option(
            "--degrade",
            help="A degradation and its parameters, such as 'noise sigma=[0,50]', defocus, "
            "'shake shift=[0,6]', motion, 'jpeg quality=[10,40]', rain, haze.",
        ),
    ],
    versions: Annotated[
        int, typer.Option(min=1, help="Degraded pictures to make of each clean one.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="The same seed makes the same pictures.")] = 0,
    bits: Annotated[int, typer.Option(help="Bits per channel of the results: 8 or 16.")] = 8,
) -> None:
    """Make pairs of degraded and clean pictures, to train and to evaluate on.

    Pairs that are there already stay, so a stopped run goes on where it was.
    """
    from fullres.console import Display, show_log
    from fullres.data.datasets import open_dataset
    from fullres.data.degrade import degrade_folder, parse_degradation

    made = parse_degradation(how)
    with Display() as display:
        show_log(display.console)
        degrade_folder(
            [(pair.name, pair.target) for pair in open_dataset(pictures, "clean").pairs],
            output,
            made,
            seed=seed,
            versions=versions,
            bits=bits,
            progress=lambda name: display.console.print(name, highlight=False),
        )


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


app.add_typer(studies, name="study")
