"""The command `fullres study`: one command a study."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fullres.options import NetworkOption, TrainSizeOption, WindowOption, read_size

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Repeat a study of the TLC paper on your own networks and pictures: a table and a plot.",
)

DataArgument = Annotated[
    str,
    typer.Argument(
        help="A data set, or a folder with the folders input and target.", show_default=False
    ),
]
LayoutOption = Annotated[str, typer.Option(help="Layout of the data set; auto finds out.")]
SplitOption = Annotated[str, typer.Option(help="Split of the data set: train, val or test.")]
OutputOption = Annotated[
    str, typer.Option("--output", "-o", help="Folder for NAME.md, NAME.csv and NAME.png.")
]
ProtocolOption = Annotated[
    str | None,
    typer.Option(help="How pictures are measured; as is usual for the data set if not given."),
]
NoiseOption = Annotated[
    float | None,
    typer.Option(help="Standard deviation of the noise, 0 to 255, for networks that ask."),
]
QualityOption = Annotated[
    int | None, typer.Option(help="Quality the JPEGs were saved with, for networks that ask.")
]
DeviceOption = Annotated[
    str, typer.Option(help="auto, or a device as torch names it: cpu, cuda, cuda:1, mps.")
]
DtypeOption = Annotated[
    str, typer.Option(help="auto, float16, bfloat16, float32 or float64; auto is float32.")
]


@app.command()
def statistics(
    data: DataArgument,
    network: NetworkOption = "denoise-small",
    training: Annotated[
        str | None,
        typer.Option(help="Data set that crops are cut from; DATA's training split if not given."),
    ] = None,
    crops: Annotated[int, typer.Option(min=2, help="Training crops.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the places of the crops.")] = 0,
    layer: Annotated[
        str | None,
        typer.Option(help="Operation to draw; the one with the largest distance if not given."),
    ] = None,
    window: WindowOption = None,
    train_size: TrainSizeOption = None,
    layout: LayoutOption = "auto",
    split: SplitOption = "test",
    noise_level: NoiseOption = None,
    jpeg_quality: QualityOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    output: OutputOption = "study",
) -> None:
    """Compare what global operations aggregate over training crops and over full pictures.

    A folder of single pictures will do: they are taken as the degraded ones.
    """
    from fullres.studies.statistics import statistics as study

    _begin()
    found = study(
        network,
        data,
        training,
        layout=layout,
        split=split,
        crops=crops,
        seed=seed,
        layer=layer,
        window=window,
        train_size=train_size,
        noise_level=noise_level,
        jpeg_quality=jpeg_quality,
        device=device,
        dtype=dtype,
        output=output,
    )
    typer.echo(str(found))


@app.command()
def window(
    data: DataArgument,
    network: NetworkOption = "denoise-small",
    factor: Annotated[
        list[float] | None,
        typer.Option(
            help="Side of a window over the training size; may be repeated. From 0.5 to 4 if not "
            "given."
        ),
    ] = None,
    train_size: TrainSizeOption = None,
    protocol: ProtocolOption = None,
    layout: LayoutOption = "auto",
    split: SplitOption = "test",
    noise_level: NoiseOption = None,
    jpeg_quality: QualityOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    output: OutputOption = "study",
) -> None:
    """Compare windows of several sizes; the best is chosen on half of the pictures."""
    from fullres.studies.window import FACTORS
    from fullres.studies.window import window as study

    _begin()
    found = study(
        network,
        data,
        factor or FACTORS,
        layout=layout,
        split=split,
        train_size=train_size,
        protocol=protocol,
        noise_level=noise_level,
        jpeg_quality=jpeg_quality,
        device=device,
        dtype=dtype,
        output=output,
    )
    typer.echo(str(found))


@app.command()
def modules(
    data: DataArgument,
    network: Annotated[
        list[str],
        typer.Option(
            "--network", "-n", help="A bundled network or the path of a checkpoint; repeated."
        ),
    ],
    size: Annotated[
        Any,
        typer.Option(
            parser=read_size,
            metavar="SIZE",
            help="Size of the picture that multiply-adds are counted for, height x width.",
        ),
    ] = "720x1280",
    window: WindowOption = None,
    train_size: TrainSizeOption = None,
    protocol: ProtocolOption = None,
    layout: LayoutOption = "auto",
    split: SplitOption = "test",
    noise_level: NoiseOption = None,
    jpeg_quality: QualityOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    output: OutputOption = "study",
) -> None:
    """Compare networks before and after conversion: gain on every picture, multiply-adds."""
    from fullres.studies.modules import modules as study

    _begin()
    found = study(
        network,
        data,
        layout=layout,
        split=split,
        size=size,
        window=window,
        train_size=train_size,
        protocol=protocol,
        noise_level=noise_level,
        jpeg_quality=jpeg_quality,
        device=device,
        dtype=dtype,
        output=output,
    )
    typer.echo(str(found))


@app.command()
def methods(
    data: DataArgument,
    network: NetworkOption = "denoise-small",
    overlap: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="Of the patches, in pixels; may be repeated. 0, a sixteenth and a half of the "
            "training size if not given.",
        ),
    ] = None,
    window: WindowOption = None,
    train_size: TrainSizeOption = None,
    protocol: ProtocolOption = None,
    layout: LayoutOption = "auto",
    split: SplitOption = "test",
    noise_level: NoiseOption = None,
    jpeg_quality: QualityOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    output: OutputOption = "study",
) -> None:
    """Compare whole pictures, local conversion and patches: metrics, time, seams."""
    from fullres.studies.methods import methods as study

    _begin()
    found = study(
        network,
        data,
        overlap or None,
        layout=layout,
        split=split,
        window=window,
        train_size=train_size,
        protocol=protocol,
        noise_level=noise_level,
        jpeg_quality=jpeg_quality,
        device=device,
        dtype=dtype,
        output=output,
    )
    typer.echo(str(found))


def _begin() -> None:
    from rich.console import Console

    from fullres.console import show_log
    from fullres.studies.figures import check_matplotlib

    check_matplotlib()
    show_log(Console(highlight=False, markup=False, soft_wrap=True))
