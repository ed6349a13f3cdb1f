"""Training recipes: one typed, validated file a training run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fullres.data.degrade import Degradation, create_degradation
from fullres.errors import FullresError
from fullres.training.losses import LOSSES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Share = Annotated[float, Field(ge=0, le=1)]


class Table(BaseModel):
    """A table of a recipe: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Table):
    """Where pictures come from."""

    root: Path
    """Folder of the dataset; a relative one counts from the recipe's own folder."""
    layout: str = "auto"
    """Name of a layout as `fullres.data.datasets.layouts` lists them."""
    split: str = "train"
    """Part of the dataset, for layouts that have several."""


class Stage(Table):
    """A part of the training with crops of one size."""

    steps: int = Field(ge=1)
    """Optimiser steps."""
    crop: int = Field(ge=8)
    """Side of the square crops in pixels, of the target divided by the scale."""
    batch: int = Field(ge=1)
    """Crops per step, of all processes together."""


class Augment(Table):
    """Random changes of the crops."""

    flip: bool = True
    """Mirror half of the crops left to right, and, where they are not turned, half of them top to
    bottom."""
    turn: bool = True
    """Turn the crops by 0, 1, 2 or 3 quarters."""
    zoom: Share = 0.0
    """Share of the crops that are enlarged, by 1 to 2, which makes for smoother pictures."""
    colour: Share = 0.0
    """Share of the crops whose channels are shuffled and whose saturation changes, by 0 to 2."""
    contrast: Share = 0.0
    """Share of the crops whose contrast is raised, by 1 to 4 about a random value, and clipped."""


class Schedule(Table):
    """The learning rate: warm-up, constant, then falling."""

    peak: float = Field(default=1e-3, gt=0)
    final: float = Field(default=1e-6, ge=0)
    warmup: int = Field(default=0, ge=0)
    """Steps over which it rises linearly."""
    hold: int = Field(default=0, ge=0)
    """Steps at the peak, the warm-up included, before it falls."""
    milestones: tuple[int, ...] = ()
    """Steps at which it halves; without any it falls to `final` along a cosine."""


class Optimiser(Table):
    """What moves the weights."""

    name: Literal["adam", "adamw"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the moving average of the weights, which then is what gets tested and exported."""


class Recipe(Table):
    """Everything that decides the outcome of a training run, except the pictures themselves."""

    name: str
    """Name of the trained model."""
    source: str = ""
    """Where the settings come from: paper, section."""
    task: str
    """What the model does to a picture."""
    network: str
    """Architecture, as `fullres networks` lists it."""
    hyperparameters: dict[str, Any] = {}
    """Arguments of `create_network`."""
    start: Path | None = None
    """Checkpoint whose weights training starts from; random weights if not given."""
    data: Data
    """Pictures to train on."""
    validation: Data | None = None
    """Pictures to validate on; `held_out` ones of the training pictures if not given."""
    held_out: int = Field(default=4, ge=1)
    """Pictures of the training data, evenly spaced by name, kept for validation."""
    degradation: dict[str, Any] | None = None
    """How clean pictures are degraded: its `name`, its parameters. None for data with pairs."""
    versions: int = Field(default=4, ge=1)
    """Degraded versions of each picture, where the degradation varies over the whole picture."""
    stages: tuple[Stage, ...] = Field(min_length=1)
    """In turn; several make patch sizes grow."""
    augment: Augment = Augment()
    losses: dict[str, float] = {"psnr": 1.0}
    """Weights of the losses: psnr, l1, charbonnier, edge, fft, mse."""
    schedule: Schedule = Schedule()
    optimiser: Optimiser = Optimiser()
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the forward pass (mixed precision)."""
    compile: bool = False
    """Compile the network with `torch.compile`."""
    validate_every: int = Field(default=1000, ge=1)
    validation_pictures: int | None = Field(default=20, ge=1)
    """Most pictures to validate on, evenly spaced by name; all if not given."""
    validation_side: int | None = Field(default=None, ge=8)
    """Longest side of validation pictures in pixels, cut from the middle; whole if not given."""
    save_every: int = Field(default=250, ge=1)
    keep: Literal["float32", "float16"] = "float32"
    """Data type that the trained weights are stored in."""
    seed: int = 0
    workers: int = Field(default=0, ge=0)
    """Processes that prepare batches beside each training process."""
    devices: int = Field(default=1, ge=1)
    """Processes that train, each on a device of its own (DDP); the batch is shared out."""
    accelerator: str = "auto"
    """As Lightning names it: auto, cpu, cuda, mps."""

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def train_size(self) -> int:
        """Side of the last stage's crops: what global statistics were learned on."""
        return self.stages[-1].crop

    def stage(self, step: int) -> Stage:
        """The stage that a step, counted from 0, belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def make_degradation(self) -> Degradation | None:
        """The degradation; None for data with pairs."""
        return create_degradation(**self.degradation) if self.degradation else None

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        try:
            self.make_degradation()
        except FullresError as error:
            raise ValueError(str(error)) from None
        unknown = [name for name in self.losses if name not in LOSSES]
        if unknown:
            raise ValueError(f"unknown loss {unknown[0]!r}; known: {', '.join(LOSSES)}")
        for stage in self.stages:
            if stage.batch % self.devices:
                raise ValueError(
                    f"a batch of {stage.batch} cannot be shared out to {self.devices} devices"
                )
        return self


def read_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe, a TOML file, and apply changes.

    Args:
        path: the file.
        changes: each `key=value`, values as in TOML; `data.root=FOLDER` reaches into a table,
            `stages.0.steps=100` into a list, and `data=FOLDER` is short for `data.root=FOLDER`.
            Folders in changes count from the working folder.

    Raises:
        FullresError: the file is missing, no TOML, or breaks a rule of `Recipe`; says which.
    """
    path = Path(path)
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FullresError(f"{path}: no such recipe") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FullresError(f"{path}: not a TOML file: {error}") from None
    for key in ("data", "validation"):
        if isinstance(table := fields.get(key), dict) and isinstance(table.get("root"), str):
            table["root"] = path.parent / table["root"]
    if isinstance(fields.get("start"), str):
        fields["start"] = path.parent / fields["start"]
    for change in changes:
        _apply(fields, change)
    try:
        return Recipe(**fields)
    except ValidationError as error:
        rules = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'recipe'}: {problem['msg']}"
            for problem in error.errors()
        )
        raise FullresError(
            f"{path}: {rules}; known keys: {', '.join(Recipe.model_fields)}"
        ) from None


def _apply(fields: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise FullresError(f"{change!r}: a change of the recipe is written key=value")
    value = _parse(text)
    if key in ("data", "validation") and isinstance(value, str):
        key += ".root"
    *outer, last = key.split(".")
    table: Any = fields
    try:
        for name in outer:
            table = table[int(name)] if isinstance(table, list) else table.setdefault(name, {})
        table[int(last) if isinstance(table, list) else last] = value
    except (IndexError, ValueError, TypeError, AttributeError):
        raise FullresError(f"{change!r}: the recipe has no {key}") from None


def _parse(value: str) -> Any:
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value
