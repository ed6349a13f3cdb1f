"""The recipes that come with fullres are valid, build their networks, and are in the table."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest
import torch

from fullres.data.datasets import layouts
from fullres.networks.catalog import create_network, networks
from fullres.training.recipe import Recipe, read_recipe
from fullres.training.train import learning_rate

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes"
FILES = {str(path.relative_to(FOLDER)): path for path in sorted(FOLDER.rglob("*.toml"))}
PUBLISHED = [key for key in FILES if "/" in key]
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
CLEAN = {
    *("clean", "set5", "set14", "manga109", "bsd100", "urban100", "cbsd68", "kodak24"),
    *("mcmaster", "set12", "bsd68", "live1", "classic5"),
}
"""Layouts of clean pictures; all others have pairs."""
CHANGE = re.compile(r"[\w.]+=[\w.,\[\]-]+")
NOT_TRAINED = {"rnn_mbp"}
"""Needs clips, which recipes have no settings for."""


def falls(recipe: Recipe) -> list[int]:
    """Steps at which the learning rate is lower than before, once it has warmed up."""
    steps = range(recipe.schedule.warmup + 5000, recipe.steps, 5000)
    return [step for step in steps if learning_rate(recipe, step) < learning_rate(recipe, step - 1)]


def fall(recipe: Recipe) -> str:
    """How the learning rate falls, in a word."""
    if not recipe.schedule.milestones:
        return "cosine"
    return "halving" if falls(recipe) else "constant"


def row(key: str, recipe: Recipe) -> str:
    """A recipe's line in the table of the documentation."""
    losses = (name if w == 1 else f"{w:g} {name}" for name, w in recipe.losses.items())
    cells = (
        f"[{key.removesuffix('.toml')}](../recipes/{key})",
        recipe.task,
        f"{recipe.steps:,}".replace(",", " "),
        ", ".join(str(stage.crop) for stage in recipe.stages),
        ", ".join(str(stage.batch) for stage in recipe.stages),
        f"{recipe.optimiser.name}, {recipe.schedule.peak:g}, {fall(recipe)}",
        " + ".join(losses),
    )
    return f"| {' | '.join(cells)} |"


@pytest.fixture(params=FILES)
def key(request):
    return request.param


@pytest.fixture
def recipe(key):
    return read_recipe(FILES[key])


def test_the_name_is_that_of_the_file_after_its_folder(key, recipe):
    assert recipe.name == key.removesuffix(".toml").replace("/", "-")


def test_the_network_can_be_built_and_fits_task_and_degradation(recipe):
    with torch.device("meta"):
        spec = create_network(recipe.network, **recipe.hyperparameters).spec
    assert recipe.task in networks()[recipe.network].tasks
    degradation = recipe.make_degradation()
    assert spec.scale == (degradation.scale if degradation else 1)
    assert spec.value_range == 1
    assert all(stage.crop % spec.multiple == 0 for stage in recipe.stages)
    assert recipe.hyperparameters.get("img_size", recipe.train_size) == recipe.train_size
    views = 2 if recipe.data.layout == "dpdd-dual" else 1
    assert (spec.views, spec.in_channels) == (views, views * spec.out_channels)


def test_layouts_exist_and_have_pairs_where_nothing_is_degraded(recipe):
    for data in filter(None, (recipe.data, recipe.validation)):
        if data.layout != "auto":
            assert data.layout in layouts()
            assert (data.layout in CLEAN) == (recipe.degradation is not None)


@pytest.mark.parametrize("key", PUBLISHED)
def test_a_published_setting_names_its_source_and_what_it_is_tested_on(key):
    recipe = read_recipe(FILES[key])
    assert re.search(r"20\d\d|arXiv", recipe.source)
    assert key.split("/")[0] == recipe.network
    assert recipe.validation is not None
    assert (recipe.data.split, recipe.validation.split) == ("train", "test")
    assert recipe.optimiser.ema == 0


@pytest.mark.parametrize("key", PUBLISHED)
def test_the_changes_that_a_recipe_names_are_valid(key):
    comments = re.findall(r"^#     (.*)", FILES[key].read_text(encoding="utf-8"), re.MULTILINE)
    for comment in comments:
        changes = comment.split()
        assert all(map(CHANGE.fullmatch, changes))
        changed = read_recipe(FILES[key], changes)
        with torch.device("meta"):
            spec = create_network(changed.network, **changed.hyperparameters).spec
        degradation = changed.make_degradation()
        assert spec.scale == (degradation.scale if degradation else 1)
        assert changed.name != read_recipe(FILES[key]).name


def test_every_network_has_a_recipe():
    trained = {read_recipe(path).network for path in FILES.values()}
    assert trained == set(networks()) - NOT_TRAINED


def test_crops_grow_where_they_change():
    recipe = read_recipe(FILES["restormer/motion-deblurring.toml"])
    changes = [
        step for step in range(1, recipe.steps) if recipe.stage(step) != recipe.stage(step - 1)
    ]
    assert changes == [92_000, 156_000, 204_000, 240_000, 276_000]
    assert recipe.train_size == 384


@pytest.mark.parametrize(
    ("keys", "thousands"),
    [
        ("grl/denoising-*", (100, 150, 175, 200)),
        ("grl/super-resolution-*", (100, 150, 175, 200)),
        ("grl/jpeg-*", (50, 100, 125, 150)),
        ("grl/defocus-*", (20, 40, 60, 70)),
        ("grl/demosaicing-*", (400, 700, 850, 900, 950)),
        ("grl/deblurring-*", ()),
        ("panet/*", (200, 400, 600, 800)),
        ("pa_edsr/*", (200, 400, 600, 800)),
    ],
)
def test_the_rate_is_halved_where_the_options_say(keys, thousands):
    chosen = fnmatch.filter(FILES, keys)
    assert chosen
    for key in chosen:
        recipe = read_recipe(FILES[key])
        assert falls(recipe) == [1000 * n for n in thousands]
        last = recipe.schedule.peak / 2 ** len(thousands)
        assert learning_rate(recipe, recipe.steps - 1) == pytest.approx(last)


def test_crops_are_turned_and_flipped_as_published():
    changed = {key: read_recipe(path).augment for key, path in FILES.items() if "/" in key}
    unturned = {key for key, augment in changed.items() if not augment.turn}
    unflipped = {key for key, augment in changed.items() if not augment.flip}
    assert unflipped == set(fnmatch.filter(FILES, "nafnet/sidd-*"))
    assert unturned == unflipped | set(fnmatch.filter(FILES, "mprnet/*"))


def test_the_table_of_the_documentation_tells_every_recipe():
    told = [line for line in PAGE.splitlines() if line.startswith("| [")]
    assert told == [row(key, read_recipe(path)) for key, path in FILES.items()]
