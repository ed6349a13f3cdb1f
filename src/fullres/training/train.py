"""The training loop: AdamW on the PSNR, a moving average of the weights, exact resume."""

from __future__ import annotations

import csv
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fullres.errors import FullresError
from fullres.memory import freed_memory_kept
from fullres.networks.catalog import create_network
from fullres.training.crops import Picture, read_pictures, to_tensor, training_batch
from fullres.training.recipe import Recipe

log = logging.getLogger(__name__)

_DECISIVE = (
    "network",
    "hyperparameters",
    "crop",
    "batch",
    "sigma",
    "zoom",
    "colour",
    "contrast",
    "seed",
)
"""What a resumed run must not change; the schedule may be drawn out or cut short."""


def train(recipe: Recipe, run: str | Path) -> Path:
    """Train as the recipe says; a run that was stopped goes on from its last checkpoint.

    Every batch is a function of the recipe's seed and the step alone, so a resumed run sees the
    same crops and noise as one that was never stopped.

    Args:
        recipe: what to train on what.
        run: folder of the run: `state.pt` to resume from, `log.csv`, and at the end the model.

    Returns:
        The trained model, `run/NAME.safetensors`.

    Raises:
        FullresError: the pictures do not serve, or the folder holds the run of another recipe.
    """
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    with freed_memory_kept():
        return _train(recipe, run)


def _train(recipe: Recipe, run: Path) -> Path:
    training, held_out = read_pictures(recipe)
    torch.manual_seed(recipe.seed)
    network = create_network(recipe.network, **recipe.hyperparameters).module.train()
    network.to(memory_format=torch.channels_last)
    average = {name: value.clone() for name, value in network.state_dict().items()}
    optimiser = torch.optim.AdamW(
        network.parameters(),
        lr=recipe.learning_rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
    )
    step = _resume(recipe, run, network, average, optimiser)
    forward = torch.compile(network) if recipe.compile else network
    started, started_at = time.monotonic(), step

    while step < recipe.steps:
        noisy, clean = training_batch(recipe, training, step)
        for group in optimiser.param_groups:
            group["lr"] = _learning_rate(recipe, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            restored = forward(noisy)
        loss = _psnr_loss(restored.float(), clean)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
        if torch.isfinite(norm):
            optimiser.step()
        else:
            log.warning("step %d: gradient is not finite; skipped", step)
        step += 1
        _follow(average, network, min(recipe.ema, (1 + step) / (10 + step)))

        if step % recipe.validate_every == 0 or step == recipe.steps:
            row = {"step": step, "loss": round(float(loss.detach()), 4)}
            row |= _validate(recipe, network, average, held_out)
            row["seconds_per_step"] = round((time.monotonic() - started) / (step - started_at), 4)
            _log_row(run / "log.csv", row)
            log.info("%s", row)
        if step % recipe.save_every == 0 or step == recipe.steps:
            _save(recipe, run, network, average, optimiser, step)
    return _export(recipe, run, average)


def _psnr_loss(restored: Tensor, clean: Tensor) -> Tensor:
    """Negative mean PSNR in dB, each crop on its own, so that all noise levels weigh alike."""
    error = (restored - clean).square().mean((1, 2, 3))
    return 10 * torch.log10(error + 1e-8).mean()


def _learning_rate(recipe: Recipe, step: int) -> float:
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    fall = recipe.learning_rate - recipe.final_learning_rate
    return recipe.final_learning_rate + fall * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def _follow(average: dict[str, Tensor], network: nn.Module, decay: float) -> None:
    for name, value in network.state_dict().items():
        average[name].lerp_(value, 1 - decay)


@torch.no_grad()
def _validate(
    recipe: Recipe, network: nn.Module, average: dict[str, Tensor], pictures: list[Picture]
) -> dict[str, float]:
    """PSNR in dB of the averaged weights on crops of the held-out pictures, by noise level."""
    current = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(average)
    row = {}
    for sigma in (15, 25, 50):
        values = []
        for index, picture in enumerate(pictures):
            random = np.random.default_rng([recipe.seed, sigma, index])
            top, left = (max(side - 512, 0) // 2 for side in picture.shape[:2])
            clean = to_tensor(picture[None, top : top + 512, left : left + 512])
            noise = random.standard_normal(clean.shape, np.float32) * np.float32(sigma / 255)
            restored = network(clean + torch.from_numpy(noise)).clamp(0, 1)
            values.append(-10 * math.log10(float((restored - clean).square().mean())))
        row[f"psnr_{sigma}"] = round(float(np.mean(values)), 3)
    network.load_state_dict(current)
    return row


def _resume(
    recipe: Recipe,
    run: Path,
    network: nn.Module,
    average: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
) -> int:
    """Load `run/state.pt` if it is there; the step to go on from."""
    path = run / "state.pt"
    if not path.exists():
        return 0
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    before, now = json.loads(state["recipe"]), json.loads(recipe.model_dump_json())
    changed = [key for key in _DECISIVE if before.get(key) != now[key]]
    if changed:
        raise FullresError(
            f"{path}: was trained by another recipe, which differs in {', '.join(changed)}; "
            "resume with that one or train in another folder"
        )
    network.load_state_dict(state["network"])
    average.update(state["average"])
    optimiser.load_state_dict(state["optimiser"])
    log.info("resumed %s at step %d of %d", path, state["step"], recipe.steps)
    return int(state["step"])


def _save(
    recipe: Recipe,
    run: Path,
    network: nn.Module,
    average: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
    step: int,
) -> None:
    state = {
        "recipe": recipe.model_dump_json(),
        "step": step,
        "network": network.state_dict(),
        "average": average,
        "optimiser": optimiser.state_dict(),
    }
    torch.save(state, run / "state.pt.part")
    (run / "state.pt.part").replace(run / "state.pt")


def _log_row(path: Path, row: dict[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def _export(recipe: Recipe, run: Path, average: dict[str, Tensor]) -> Path:
    from safetensors.torch import save

    path = run / f"{recipe.name}.safetensors"
    metadata = {
        "network": recipe.network,
        "hyperparameters": json.dumps(recipe.hyperparameters),
        "task": recipe.task,
        "train_size": str(recipe.crop),
    }
    # half precision: opened as float32, the weights are off by 2 ** -12 of their size at most
    weights = {name: value.half().contiguous() for name, value in average.items()}
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(save(weights, metadata))
    part.replace(path)
    return path
