"""Training recipes: one typed, validated file a training run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fullres.errors import FullresError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Recipe(BaseModel):
    """Everything that decides the outcome of a training run, except the pictures themselves."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Name of the trained model."""
    task: Literal["denoise"]
    """What the model does to a picture."""
    network: str
    """Architecture, as `fullres networks` lists it."""
    hyperparameters: dict[str, Any]
    """Arguments of `create_network`."""
    data: Path
    """Folder of clean pictures, searched recursively."""
    held_out: int = Field(default=4, ge=1)
    """Pictures of the folder, evenly spaced by name, kept for validation."""
    crop: int = Field(default=96, ge=8)
    """Side of the square training crops in pixels: the model's training size."""
    batch: int = Field(default=8, ge=1)
    """Crops per step."""
    sigma: tuple[float, float] = (0.0, 50.0)
    """Range of the noise's standard deviation, on the scale 0 to 255; one draw per crop."""
    zoom: float = Field(default=0.0, ge=0, le=1)
    """Share of the crops that are enlarged, by 1 to 2, which makes for smoother pictures."""
    colour: float = Field(default=0.0, ge=0, le=1)
    """Share of the crops whose channels are shuffled and whose saturation changes, by 0 to 2."""
    contrast: float = Field(default=0.0, ge=0, le=1)
    """Share of the crops whose contrast is raised, by 1 to 4 about a random value, and clipped."""
    steps: int = Field(ge=1)
    """Optimiser steps."""
    warmup: int = Field(default=500, ge=0)
    """Steps over which the learning rate rises linearly."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW; falls to `final_learning_rate` along a cosine."""
    final_learning_rate: float = Field(default=1e-6, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = Field(default=0.1, gt=0)
    """Largest norm of the gradient."""
    ema: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the moving average of the weights, which is what gets exported."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Data type of the forward pass (autocast)."""
    compile: bool = False
    """Compile the network with `torch.compile`."""
    validate_every: int = Field(default=1000, ge=1)
    save_every: int = Field(default=250, ge=1)
    seed: int = 0


def read_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe, a TOML file, and apply changes written `key=value` (values as in TOML).

    A relative `data` folder counts from the recipe's own folder.

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
    if "data" in fields:
        fields["data"] = path.parent / fields["data"]
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise FullresError(f"{change!r}: a change of the recipe is written key=value")
        fields[key] = _parse(value)
    try:
        return Recipe(**fields)
    except ValidationError as error:
        rules = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()
        )
        raise FullresError(
            f"{path}: {rules}; known keys: {', '.join(Recipe.model_fields)}"
        ) from None


def _parse(value: str) -> Any:
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value
