"""Training: recipes are checked, batches repeat, a killed run ends as one never killed."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from skimage import io as skio

from fullres.errors import FullresError
from fullres.networks.catalog import open_network
from fullres.training.crops import read_pictures, training_batch
from fullres.training.recipe import read_recipe
from fullres.training.train import train

PROJECT = Path(__file__).parents[2]

TOML = """
name = "tiny"
task = "denoise"
network = "nafnet"
data = "pictures"
held_out = 1
crop = 16
batch = 2
steps = 12
warmup = 2
validate_every = 6
save_every = 3
zoom = 0.5
colour = 0.5

[hyperparameters]
width = 4
middle_blk_num = 1
enc_blk_nums = [1]
dec_blk_nums = [1]
"""


@pytest.fixture
def recipe_file(tmp_path):
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    cat = skimage.data.chelsea()
    for name, left in (("a.png", 0), ("b.png", 100), ("more/c.png", 200)):
        skio.imsave(tmp_path / "pictures" / name, cat[:64, left : left + 80], check_contrast=False)
    path = tmp_path / "tiny.toml"
    path.write_text(TOML)
    return path


def weights(path):
    return open_network(path).module.state_dict()


def test_the_shipped_recipes_are_valid():
    recipes = sorted((PROJECT / "recipes").glob("*.toml"))
    assert recipes
    for path in recipes:
        assert read_recipe(path).name == path.stem


def test_changes_are_typed_and_checked(recipe_file):
    recipe = read_recipe(recipe_file, ["steps=5", "precision=bfloat16", "sigma=[1, 2.5]"])
    assert (recipe.steps, recipe.precision, recipe.sigma) == (5, "bfloat16", (1.0, 2.5))
    assert recipe.data == recipe_file.parent / "pictures"
    for change, words in [
        ("steps=none", "steps: Input should be a valid integer"),
        ("stepps=4", "stepps: Extra inputs.*known keys: name, task"),
        ("steps", "written key=value"),
        ("ema=1.5", "ema"),
    ]:
        with pytest.raises(FullresError, match=words):
            read_recipe(recipe_file, [change])
    with pytest.raises(FullresError, match="no such recipe"):
        read_recipe(recipe_file.parent / "none.toml")
    recipe_file.write_text("steps = = 4")
    with pytest.raises(FullresError, match="not a TOML file"):
        read_recipe(recipe_file)


def test_pictures_that_do_not_fit_are_named(recipe_file):
    recipe = read_recipe(recipe_file)
    with pytest.raises(FullresError, match=r"a\.png: 64 × 80 pixels is smaller than a crop of 70"):
        read_pictures(recipe.model_copy(update={"crop": 70}))
    with pytest.raises(FullresError, match="3 pictures are too few"):
        read_pictures(recipe.model_copy(update={"held_out": 3}))
    with pytest.raises(FullresError, match="no such folder"):
        read_pictures(recipe.model_copy(update={"data": Path("nowhere")}))


def test_batches_are_a_function_of_the_step(recipe_file):
    recipe = read_recipe(recipe_file)
    pictures, held_out = read_pictures(recipe)
    assert (len(pictures), len(held_out)) == (2, 1)
    first, again, other = (training_batch(recipe, pictures, step) for step in (4, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert first[1].shape == (2, 3, 16, 16)
    assert first[1].min() >= 0
    assert first[1].max() <= 1


def test_the_noise_has_the_standard_deviation_asked_for(recipe_file):
    recipe = read_recipe(recipe_file, ["sigma=[25, 25]", "batch=64"])
    pictures, _ = read_pictures(recipe)
    noisy, clean = training_batch(recipe, pictures, 0)
    assert abs(float((noisy - clean).std()) * 255 - 25) < 0.5
    assert abs(float((noisy - clean).mean()) * 255) < 0.5


def test_a_trained_model_opens_with_its_training_size(recipe_file, tmp_path):
    recipe = read_recipe(recipe_file)
    path = train(recipe, tmp_path / "run")
    network = open_network(path)
    assert network.spec.train_size == 16
    assert network.spec.task == "denoise"
    assert dict(network.spec.hyperparameters)["width"] == 4
    with (tmp_path / "run" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [6, 12]
    assert all(np.isfinite(float(row["psnr_25"])) for row in rows)


def test_training_learns(recipe_file, tmp_path):
    changes = ["steps=150", "validate_every=150", "learning_rate=5e-3", "ema=0.9", "sigma=[50, 50]"]
    train(read_recipe(recipe_file, changes), tmp_path / "run")
    with (tmp_path / "run" / "log.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["psnr_50"]) > 20  # the noisy picture has 14.2 dB


def test_a_killed_run_ends_as_one_never_killed(recipe_file, tmp_path):
    changes = ["steps=40", "save_every=3"]
    recipe = read_recipe(recipe_file, changes)
    whole = weights(train(recipe, tmp_path / "whole"))
    script = (
        "import sys; from fullres.training.recipe import read_recipe; "
        "from fullres.training.train import train; "
        "train(read_recipe(sys.argv[1], sys.argv[3:]), sys.argv[2])"
    )
    run = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(recipe_file), str(run), *changes],
        env={**os.environ, "PYTHONPATH": str(PROJECT / "src")},
    )
    while process.poll() is None and not (run / "state.pt").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped_at = torch.load(run / "state.pt", weights_only=True)["step"]
    assert 0 < stopped_at < 40
    resumed = weights(train(recipe, run))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_another_recipe_does_not_resume_the_run(recipe_file, tmp_path):
    train(read_recipe(recipe_file), tmp_path / "run")
    with pytest.raises(FullresError, match=r"state\.pt.*another recipe.*batch"):
        train(read_recipe(recipe_file, ["batch=3"]), tmp_path / "run")
