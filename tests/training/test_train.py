"""Training: recipes are checked, batches repeat, a killed run ends as one never killed."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from skimage import io as skio

from fullres.data.datasets import Pair, open_dataset
from fullres.data.degrade import degrade_folder, parse_degradation
from fullres.errors import FullresError
from fullres.networks.catalog import open_network
from fullres.networks.spec import Spec
from fullres.training import train as training
from fullres.training.batches import Crops, Pictures, Steps, hold_out
from fullres.training.recipe import read_recipe
from fullres.training.train import learning_rate, train

PROJECT = Path(__file__).parents[2]
SPEC = Spec("nafnet", {}, in_channels=3, out_channels=3)

TOML = """
name = "tiny"
task = "denoise"
network = "nafnet"
held_out = 1
validate_every = 6
save_every = 3
degradation = { name = "noise", sigma = [0, 50] }

[data]
root = "pictures"

[[stages]]
steps = 12
crop = 16
batch = 2

[augment]
zoom = 0.5
colour = 0.5

[optimiser]
ema = 0.9
clip = 0.1

[schedule]
warmup = 2

[hyperparameters]
width = 4
middle_blk_num = 1
enc_blk_nums = [1]
dec_blk_nums = [1]
"""


@pytest.fixture
def recipe_file(tmp_path):
    (tmp_path / "pictures").mkdir()
    cat = skimage.data.chelsea()
    for name, left in (("a.png", 0), ("b.png", 100), ("c.png", 200)):
        skio.imsave(tmp_path / "pictures" / name, cat[:64, left : left + 80], check_contrast=False)
    path = tmp_path / "tiny.toml"
    path.write_text(TOML)
    return path


def weights(path):
    return open_network(path).module.state_dict()


def same(first, second, **close):
    return all(torch.allclose(second[name], value, **close) for name, value in first.items())


def crops_of(recipe):
    pairs, _ = hold_out(recipe, list(open_dataset(recipe.data.root, "clean").pairs))
    return Crops(recipe, pairs, SPEC)


def run_command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "fullres", "train", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(PROJECT / "src")},
        **options,
    )


# Recipes --------------------------------------------------------------------------------------


def test_changes_are_typed_and_checked(recipe_file):
    recipe = read_recipe(
        recipe_file,
        ["stages.0.steps=5", "precision=bfloat16", "degradation.sigma=[1, 2.5]", "data=elsewhere"],
    )
    assert recipe.steps == 5
    assert recipe.precision == "bfloat16"
    assert recipe.make_degradation().sigma == (1, 2.5)
    assert recipe.data.root == Path("elsewhere")
    assert read_recipe(recipe_file).data.root == recipe_file.parent / "pictures"
    for change, words in [
        ("stages.0.steps=none", "stages.0.steps: Input should be a valid integer"),
        ("stepps=4", "stepps: Extra inputs.*known keys: name, source, task"),
        ("steps", "written key=value"),
        ("stages.1.steps=4", "no stages.1"),
        ("name.first=4", "no name.first"),
        ("optimiser.ema=1.5", "ema"),
        ("losses.l3=1", "unknown loss 'l3'; known: psnr, l1"),
        ("degradation.name=fog", "unknown degradation 'fog'; known: noise"),
        ("degradation.sigma=[9, 3]", "sigma"),
        ("devices=3", "batch of 2 cannot be shared out to 3 devices"),
    ]:
        with pytest.raises(FullresError, match=words):
            read_recipe(recipe_file, [change])
    with pytest.raises(FullresError, match="no such recipe"):
        read_recipe(recipe_file.parent / "none.toml")
    recipe_file.write_text("steps = = 4")
    with pytest.raises(FullresError, match="not a TOML file"):
        read_recipe(recipe_file)


def test_the_learning_rate_warms_up_holds_and_falls(recipe_file):
    recipe = read_recipe(
        recipe_file,
        ["stages.0.steps=110", "schedule.warmup=5", "schedule.hold=10", "schedule.final=1e-5"],
    )
    rates = [learning_rate(recipe, step) for step in range(111)]
    assert rates[:6] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1e-3])
    assert rates[10] == 1e-3
    assert rates[60] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[110] == pytest.approx(1e-5)
    torch_rates = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimiser := torch.optim.SGD([torch.zeros(1)], lr=1e-3), T_max=100, eta_min=1e-5
    )
    for step in range(10, 110):
        assert rates[step] == pytest.approx(torch_rates.get_last_lr()[0])
        optimiser.step()
        torch_rates.step()
    stones = read_recipe(recipe_file, ["schedule.milestones=[3, 5]", "schedule.warmup=0"])
    assert [learning_rate(stones, step) for step in (2, 3, 4, 5)] == [1e-3, 5e-4, 5e-4, 2.5e-4]


def test_patches_grow_by_stages(recipe_file):
    recipe_file.write_text(TOML + "\n[[stages]]\nsteps = 4\ncrop = 24\nbatch = 1\n")
    recipe = read_recipe(recipe_file)
    assert (recipe.steps, recipe.train_size) == (16, 24)
    crops = crops_of(recipe)
    places = list(Steps(recipe, 10, 14))
    assert [len(batch) for batch in places] == [2, 2, 1, 1]
    assert [crops[batch[0]][0].shape[-1] for batch in places] == [16, 16, 24, 24]


# Batches --------------------------------------------------------------------------------------


def test_pictures_that_do_not_fit_are_named(recipe_file):
    with pytest.raises(FullresError, match="3 pictures are too few"):
        crops_of(read_recipe(recipe_file, ["held_out=3"]))
    with pytest.raises(FullresError, match="no such folder"):
        train(read_recipe(recipe_file, ["data=nowhere"]), recipe_file.parent / "run")


def test_pictures_smaller_than_a_crop_are_reflected(recipe_file):
    crops = crops_of(
        read_recipe(
            recipe_file,
            [
                *("stages.0.crop=100", "degradation.sigma=[0, 0]"),
                *(f"augment.{name}=false" for name in ("turn", "flip")),
                *(f"augment.{name}=0" for name in ("zoom", "colour")),
            ],
        )
    )
    _, target = crops[0, 0]
    assert target.shape == (3, 100, 100)
    assert torch.equal(target[:, 64:], target[:, 28:64].flip(1))
    assert torch.equal(target[:, :, 80:], target[:, :, 60:80].flip(2))


def test_grey_networks_are_trained_on_the_brightness(recipe_file):
    recipe = read_recipe(recipe_file, ["augment.zoom=0", "augment.colour=0"])
    grey = Crops(recipe, crops_of(recipe).pairs, replace(SPEC, in_channels=1, out_channels=1))
    colour = crops_of(recipe)[3, 1][1]
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    degraded, target = grey[3, 1]
    assert degraded.shape == (1, 16, 16)
    torch.testing.assert_close(target, (colour * weights).sum(0, keepdim=True))


def test_views_of_a_dual_pixel_are_never_turned(recipe_file, tmp_path):
    """Columns stay in order in both views and the target, whatever is augmented."""
    x = np.broadcast_to(np.arange(40, dtype=np.uint8) * 6, (32, 40))
    for name in ("left", "right", "target"):
        skio.imsave(tmp_path / f"{name}.png", x, check_contrast=False)
    pair = Pair("x", tmp_path / "left.png", tmp_path / "target.png", tmp_path / "right.png")
    recipe_file.write_text(TOML.replace('degradation = { name = "noise", sigma = [0, 50] }', ""))
    recipe = read_recipe(recipe_file, ["augment.zoom=0", "augment.colour=0"])
    crops = Crops(recipe, [pair], replace(SPEC, in_channels=2, out_channels=1))
    for place in PLACES[:16]:
        degraded, target = crops[place]
        assert degraded.shape == (2, 16, 16)
        assert (target.diff(dim=2) > 0).all()
        assert torch.equal(degraded, target.expand(2, -1, -1))


@pytest.mark.parametrize(
    ("flip", "turn", "ways"),
    [(True, True, 8), (True, False, 4), (False, True, 4), (False, False, 1)],
)
def test_squares_are_laid_in_all_ways_that_are_allowed(recipe_file, tmp_path, flip, turn, ways):
    square = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name in ("input", "target"):
        skio.imsave(tmp_path / f"{name}.png", square, check_contrast=False)
    changes = [f"augment.flip={flip}".lower(), f"augment.turn={turn}".lower(), "augment.zoom=0"]
    recipe = read_recipe(recipe_file, [*changes, "augment.colour=0"])
    pair = Pair("x", tmp_path / "input.png", tmp_path / "target.png")
    crops = Crops(recipe, [pair], replace(SPEC, in_channels=1, out_channels=1))
    assert len({crops[place][1].numpy().tobytes() for place in PLACES}) == ways


def test_crops_are_a_function_of_their_place(recipe_file):
    crops = crops_of(read_recipe(recipe_file))
    first, again, other = crops[4, 1], crops[4, 1], crops[4, 0]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert first[1].shape == (3, 16, 16)
    assert first[1].min() >= 0
    assert first[1].max() <= 1


def test_processes_share_out_the_places(recipe_file):
    recipe = read_recipe(recipe_file, ["stages.0.batch=6", "devices=3"])
    alone = list(Steps(recipe.model_copy(update={"devices": 1}), 2, 5))
    shared = [list(Steps(recipe, 2, 5, rank)) for rank in range(3)]
    assert [[*a, *b, *c] for a, b, c in zip(*shared, strict=True)] == alone


def test_the_noise_has_the_standard_deviation_asked_for(recipe_file):
    crops = crops_of(read_recipe(recipe_file, ["degradation.sigma=[25, 25]"]))
    noise = torch.stack([degraded - clean for degraded, clean in map(crops.__getitem__, PLACES)])
    assert abs(float(noise.std()) * 255 - 25) < 0.5
    assert abs(float(noise.mean()) * 255) < 0.5


PLACES = [(step, place) for step in range(8) for place in range(8)]


def test_both_crops_of_a_pair_lie_at_the_same_place(recipe_file, tmp_path):
    """Equal pictures give equal crops; at scale 2 the target's lies at twice the place."""
    clean = [(p.name, p.target) for p in open_dataset(tmp_path / "pictures", "clean").pairs]
    degrade_folder(clean, tmp_path / "equal", parse_degradation("noise sigma=[0,0]"))
    changes = [f"data={tmp_path / 'equal'}", "data.layout=pairs"]
    text = TOML.replace('degradation = { name = "noise", sigma = [0, 50] }', "")
    recipe_file.write_text(text)
    recipe = read_recipe(recipe_file, changes)
    pairs = list(open_dataset(tmp_path / "equal", "pairs").pairs)
    for place in PLACES[:16]:
        degraded, target = Crops(recipe, pairs, SPEC)[place]
        assert torch.equal(degraded, target)
    x = np.arange(32 * 40, dtype=np.uint16).reshape(32, 40) * 40
    for name, picture in (("lr", x), ("hr", x.repeat(2, 0).repeat(2, 1))):
        (tmp_path / "double" / name).mkdir(parents=True)
        skio.imsave(tmp_path / "double" / name / "x.png", picture, check_contrast=False)
    pairs = list(open_dataset(tmp_path / "double", "pairs", scale=2).pairs)
    recipe = read_recipe(recipe_file, [*changes, "augment.zoom=0", "augment.colour=0"])
    for place in PLACES[:16]:
        degraded, target = Crops(recipe, pairs, replace(SPEC, scale=2))[place]
        assert torch.equal(target, degraded.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_little_memory_changes_nothing(recipe_file):
    paths = [p.target for p in open_dataset(recipe_file.parent / "pictures", "clean").pairs]
    much, little = Pictures(2**30), Pictures(1)
    for path in paths * 2:
        assert np.array_equal(much.get(path), little.get(path))
        assert np.array_equal(much.get(path), skio.imread(path).transpose(2, 0, 1))


def test_versions_of_a_picture_are_not_split(recipe_file, tmp_path):
    clean = [(p.name, p.target) for p in open_dataset(tmp_path / "pictures", "clean").pairs]
    degrade_folder(clean, tmp_path / "pairs", parse_degradation("noise"), versions=3)
    recipe = read_recipe(recipe_file, ["versions=3"])
    training_pairs, held_out = hold_out(recipe, list(open_dataset(tmp_path / "pairs").pairs))
    assert [pair.name for pair in held_out] == ["a_v0"]
    assert {pair.name[0] for pair in training_pairs} == {"b", "c"}


# Runs -----------------------------------------------------------------------------------------


def test_a_trained_model_opens_with_its_training_size(recipe_file, tmp_path):
    recipe = read_recipe(recipe_file)
    path = train(recipe, tmp_path / "run")
    for checkpoint in (path, tmp_path / "run" / "state.ckpt"):
        network = open_network(checkpoint)
        assert network.spec.train_size == 16
        assert network.spec.task == "denoise"
        assert dict(network.spec.hyperparameters)["width"] == 4
    assert same(weights(path), weights(tmp_path / "run" / "state.ckpt"))
    with (tmp_path / "run" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [6, 12]
    assert all(math.isfinite(float(row["psnr_local"])) for row in rows)
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_training_learns(recipe_file, tmp_path):
    changes = ["stages.0.steps=150", "validate_every=150", "schedule.peak=5e-3"]
    train(read_recipe(recipe_file, [*changes, "degradation.sigma=[50, 50]"]), tmp_path / "run")
    with (tmp_path / "run" / "log.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["psnr_global"]) > 20  # the noisy picture has 14.2 dB


def test_degradations_that_vary_are_made_beforehand(recipe_file, tmp_path):
    recipe = read_recipe(recipe_file, ['degradation={name="defocus", radius=[0, 3]}', "versions=2"])
    train(recipe, tmp_path / "run")
    made = sorted(p.name for p in (tmp_path / "run" / "degraded" / "input").iterdir())
    assert made == [f"{name}_v{version}.png" for name in "abc" for version in (0, 1)]


def test_a_killed_run_ends_as_one_never_killed(recipe_file, tmp_path):
    changes = ["stages.0.steps=40", "precision=bfloat16", "validate_every=10"]
    recipe = read_recipe(recipe_file, changes)
    whole = weights(train(recipe, tmp_path / "whole"))
    run = tmp_path / "killed"
    process = run_command(recipe_file, *changes, "--run", run)
    while process.poll() is None and not (run / "state.ckpt").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped_at = torch.load(run / "state.ckpt", weights_only=True)["step"]
    assert 0 < stopped_at < 40
    resumed = weights(train(recipe, run))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    with (run / "log.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [10, 20, 30, 40]


def test_two_processes_train_as_one_does(recipe_file, tmp_path):
    changes = ["accelerator=cpu", "losses={l1=1.0}"]
    alone = weights(train(read_recipe(recipe_file, changes), tmp_path / "alone"))
    run = tmp_path / "shared"
    process = run_command(recipe_file, *changes, "devices=2", "--run", run)
    assert process.wait(timeout=240) == 0
    assert same(alone, weights(run / "tiny.safetensors"), rtol=1e-3, atol=1e-5)
    with (run / "log.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [6, 12]


def test_a_gradient_that_is_not_finite_moves_nothing(recipe_file, tmp_path, monkeypatch, caplog):
    real = training.weighted
    calls = iter(range(1000))

    def spoiled(*arguments):
        loss = real(*arguments)
        return loss * math.nan if next(calls) == 5 else loss

    monkeypatch.setattr(training, "weighted", spoiled)
    path = train(read_recipe(recipe_file), tmp_path / "run")
    assert all(value.isfinite().all() for value in weights(path).values())
    assert [r.message for r in caplog.records if "not finite" in r.message] == [
        "step 5: the gradient is not finite; skipped"
    ]


def test_another_recipe_does_not_resume_the_run(recipe_file, tmp_path):
    train(read_recipe(recipe_file), tmp_path / "run")
    with pytest.raises(FullresError, match=r"state\.ckpt.*another recipe.*augment"):
        train(read_recipe(recipe_file, ["augment.zoom=0"]), tmp_path / "run")


def test_training_starts_from_a_checkpoint(recipe_file, tmp_path):
    first = train(read_recipe(recipe_file), tmp_path / "first")
    still = [f"start={first}", "stages.0.steps=1", "schedule.peak=1e-12"]
    second = train(read_recipe(recipe_file, still), tmp_path / "second")
    assert same(weights(first), weights(second), atol=1e-9)
    with pytest.raises(FullresError, match=r"tiny\.safetensors: is a nafnet, the recipe trains"):
        train(read_recipe(recipe_file, [*still, "network=hinet", "hyperparameters={}"]), tmp_path)


def test_pairs_and_degradations_exclude_each_other(recipe_file, tmp_path):
    clean = [(p.name, p.target) for p in open_dataset(tmp_path / "pictures", "clean").pairs]
    degrade_folder(clean, tmp_path / "pairs", parse_degradation("noise"))
    with pytest.raises(FullresError, match="leave out its degradation"):
        train(read_recipe(recipe_file, [f"data={tmp_path / 'pairs'}"]), tmp_path / "run")
    recipe_file.write_text(TOML.replace('degradation = { name = "noise", sigma = [0, 50] }', ""))
    with pytest.raises(FullresError, match="the recipe needs a degradation"):
        train(read_recipe(recipe_file), tmp_path / "run")
