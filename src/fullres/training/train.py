"""The training loop, with mixed precision, several processes, and exact resume."""

from __future__ import annotations

import csv
import json
import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from fullres.data.datasets import Pair, open_dataset
from fullres.data.degrade import degrade_folder, picture_random
from fullres.data.reading import read_picture, with_channels
from fullres.errors import FullresError
from fullres.local import Local, NothingToConvert, convert
from fullres.memory import freed_memory_kept
from fullres.networks.catalog import create_network, open_network
from fullres.networks.spec import Network, Spec
from fullres.training.batches import Crops, Steps, hold_out
from fullres.training.losses import weighted
from fullres.training.recipe import Data, Recipe

log = logging.getLogger(__name__)

_DECISIVE = (
    *("network", "hyperparameters", "data", "degradation", "versions", "augment", "losses"),
    *("seed", "held_out"),
)
"""What a resumed run must not change; the schedule may be drawn out or cut short."""
_PRECISION = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}


def train(recipe: Recipe, run: str | Path) -> Path:
    """Train as the recipe says; a run that was stopped goes on from its last checkpoint.

    Every crop is a function of the recipe and the step alone, so a resumed run ends as one that
    was never stopped.

    Args:
        recipe: what to train on what.
        run: folder of the run: `state.ckpt` to resume from, `log.csv`, TensorBoard's files in
            `tensorboard/`, and at the end the model.

    Returns:
        The trained model, `run/NAME.safetensors`.

    Raises:
        FullresError: the pictures do not serve, or the folder holds the run of another recipe.
    """
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    fabric = Fabric(
        accelerator=recipe.accelerator,
        devices=recipe.devices,
        strategy="ddp" if recipe.devices > 1 else "auto",
        precision=_PRECISION[recipe.precision],  # type: ignore[arg-type]
    )
    fabric.launch()
    with freed_memory_kept(), _tensorboard(run, fabric) as board:
        return _train(fabric, recipe, run, board)


def _train(fabric: Fabric, recipe: Recipe, run: Path, board: Any) -> Path:
    torch.manual_seed(recipe.seed)
    network = _network(recipe)
    pairs, held_out = _pairs(recipe, run, fabric)
    crops = Crops(recipe, pairs, network.spec)
    module = InTraining(network.module).train().to(memory_format=torch.channels_last)
    average = AveragedModel(network.module, use_buffers=True)
    average.to(fabric.device)
    optimiser = _optimiser(recipe, module)
    model, optimiser = fabric.setup(module, optimiser)
    forward = torch.compile(model) if recipe.compile else model
    state = {"model": network.module, "average": average.module, "optimiser": optimiser}
    step = _resume(fabric, recipe, run, state)
    average.n_averaged.fill_(step)
    record = Record(run / "log.csv", board, step)

    while step < recipe.steps:
        # a part of the run that ends with a checkpoint
        last = min(step - step % recipe.save_every + recipe.save_every, recipe.steps)
        places = Steps(recipe, step, last, fabric.global_rank)
        for degraded, target in DataLoader(crops, batch_sampler=places, num_workers=recipe.workers):
            set_learning_rate(optimiser, learning_rate(recipe, step))
            x = degraded.to(fabric.device, memory_format=torch.channels_last)
            outputs = [y.float() for y in forward(x)]
            loss = weighted(recipe.losses, outputs, target.to(fabric.device))
            optimiser.zero_grad(set_to_none=True)
            fabric.backward(loss)
            if _clipped(fabric, recipe, model, optimiser):
                optimiser.step()
            else:
                log.warning("step %d: the gradient is not finite; skipped", step)
            step += 1
            # a slow average would hold the random weights of the start for long
            decay = min(recipe.optimiser.ema, (1 + step) / (10 + step))
            average.multi_avg_fn = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            average.update_parameters(network.module)
            if step % recipe.validate_every == 0 or step == recipe.steps:
                fabric.barrier()
                if fabric.is_global_zero:
                    scores = validate(recipe, average.module, network.spec, held_out)
                    record(step, float(loss.detach()), scores)
                fabric.barrier()
        _save(fabric, recipe, run, state, step)
    return _export(fabric, recipe, run, average.module)


class InTraining(nn.Module):
    """A network that gives all the pictures it restores on its way, the best first."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = getattr(self.network, "outputs", None)
        return tuple(outputs(x)) if outputs else (self.network(x),)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Of a step, counted from 0.

    Source of the cosine: Loshchilov and Hutter, *SGDR*, ICLR 2017, equation 5.
    """
    schedule = recipe.schedule
    if step < schedule.warmup:
        return schedule.peak * (step + 1) / schedule.warmup
    start = max(schedule.warmup, schedule.hold)
    if step < start:
        return schedule.peak
    if schedule.milestones:
        return float(schedule.peak * 0.5 ** sum(step >= stone for stone in schedule.milestones))
    progress = (step - start) / max(recipe.steps - start, 1)
    fall = schedule.peak - schedule.final
    return schedule.final + fall * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Of all parameters."""
    for group in optimiser.param_groups:
        group["lr"] = rate


def _network(recipe: Recipe) -> Network:
    """What the recipe trains: random weights, or those it starts from."""
    if recipe.start is None:
        network = create_network(recipe.network, **recipe.hyperparameters)
    else:
        network = open_network(recipe.start)
        if network.spec.architecture != recipe.network:
            raise FullresError(
                f"{recipe.start}: is a {network.spec.architecture}, the recipe trains a "
                f"{recipe.network}; start from another checkpoint"
            )
    if network.spec.frames_lost is not None:
        raise FullresError(f"{recipe.network}: restores video; training on clips is not supported")
    return network


def _pairs(recipe: Recipe, run: Path, fabric: Fabric) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and pairs to validate on."""
    training = _found(recipe, recipe.data, run / "degraded", fabric)
    if recipe.validation is None:
        return hold_out(recipe, training)
    held_out = _found(recipe, recipe.validation, run / "degraded-validation", fabric)
    every = max(len(held_out) // (recipe.validation_pictures or len(held_out)), 1)
    return training, held_out[::every][: recipe.validation_pictures]


def _found(recipe: Recipe, data: Data, folder: Path, fabric: Fabric) -> list[Pair]:
    """Pairs of a dataset; clean pictures of which whole versions are degraded become pairs."""
    pairs = list(open_dataset(data.root, data.layout, data.split).pairs)
    degradation = recipe.make_degradation()
    clean = all(pair.degraded is None for pair in pairs)
    if clean and degradation is None:
        raise FullresError(
            f"{data.root}: holds clean pictures alone; the recipe needs a degradation, or data "
            "with pairs"
        )
    if not clean and degradation is not None:
        raise FullresError(
            f"{data.root}: holds pairs, and the recipe degrades clean pictures; "
            "leave out its degradation or name a folder of clean pictures"
        )
    if degradation is None or not degradation.needs_whole:
        return pairs
    if fabric.is_global_zero:
        log.info("degrading %d pictures, %d versions each", len(pairs), recipe.versions)
        pictures = [(pair.name, pair.target) for pair in pairs]
        degrade_folder(pictures, folder, degradation, seed=recipe.seed, versions=recipe.versions)
    fabric.barrier()
    return list(open_dataset(folder, "pairs").pairs)


@torch.inference_mode()
def validate(
    recipe: Recipe, network: nn.Module, spec: Spec, pairs: Sequence[Pair]
) -> dict[str, float]:
    """Mean PSNR in dB on whole pictures, of the network as it is and converted to local.

    While global statistics are learned on crops, the second rises above the first.
    """
    network = network.eval()
    scores = {"psnr_global": _mean_psnr(recipe, network, spec, pairs)}
    try:
        with convert(network, Local(recipe.train_size)):
            scores["psnr_local"] = _mean_psnr(recipe, network, spec, pairs)
    except NothingToConvert:
        pass
    return scores


def _mean_psnr(recipe: Recipe, network: nn.Module, spec: Spec, pairs: Sequence[Pair]) -> float:
    values = []
    device = next(network.parameters()).device
    for pair in pairs:
        degraded, target = read_pair(pair, recipe, spec)
        x = degraded.to(device).contiguous(memory_format=torch.channels_last)
        error = (network(x).float().cpu().clamp(0, 1) - target).square().mean()
        values.append(-10 * math.log10(max(float(error), 1e-10)))
    return sum(values) / len(values)


def read_pair(pair: Pair, recipe: Recipe, spec: Spec) -> tuple[Tensor, Tensor]:
    """Degraded and target picture, (1, C, H, W); degraded by the picture's name if need be."""
    target = with_channels(read_picture(pair.target, pair.target_key), spec.out_channels)
    if pair.degraded is None:
        degradation = recipe.make_degradation()
        assert degradation is not None
        height, width = (side // spec.scale * spec.scale for side in target.shape[1:])
        target = target[:, :height, :width]
        degraded = degradation(target, picture_random(recipe.seed, pair.name))
    else:
        views = [read_picture(pair.degraded, pair.degraded_key)]
        views += [read_picture(pair.right)] if pair.right else []
        degraded = torch.cat([with_channels(view, spec.out_channels) for view in views])
        # where a target is a little larger than its picture, it is so on both sides (RESIDE)
        target = _middle(target, [spec.scale * side for side in degraded.shape[1:]])
    if recipe.validation_side:
        side = recipe.validation_side
        degraded = _middle(degraded, [side, side])
        target = _middle(target, [side * spec.scale] * 2)
    return degraded[None], target[None]


def _middle(x: Tensor, size: Sequence[int]) -> Tensor:
    (height, top), (width, left) = (
        (side, max(length - side, 0) // 2) for length, side in zip(x.shape[1:], size, strict=True)
    )
    return x[:, top : top + height, left : left + width]


def _optimiser(recipe: Recipe, module: nn.Module) -> torch.optim.Optimizer:
    kinds: dict[str, type[torch.optim.Adam]] = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    return kinds[recipe.optimiser.name](
        module.parameters(),
        lr=recipe.schedule.peak,
        betas=recipe.optimiser.betas,
        weight_decay=recipe.optimiser.weight_decay,
    )


def _clipped(
    fabric: Fabric, recipe: Recipe, model: nn.Module, optimiser: torch.optim.Optimizer
) -> bool:
    """Clip the gradient to the recipe's norm; whether it is finite."""
    norm = fabric.clip_gradients(
        model,
        optimiser,
        max_norm=recipe.optimiser.clip or math.inf,
        error_if_nonfinite=False,
    )
    # with float16, infinities belong to the search for the loss's scale: the scaler skips them
    return norm is None or bool(norm.isfinite()) or recipe.precision == "float16"


def _resume(fabric: Fabric, recipe: Recipe, run: Path, state: dict[str, Any]) -> int:
    """Load `run/state.ckpt` if it is there; the step to go on from."""
    path = run / "state.ckpt"
    if not path.exists():
        return 0
    rest = fabric.load(path, state)
    before, now = json.loads(rest["recipe"]), json.loads(recipe.model_dump_json())
    changed = [key for key in _DECISIVE if before.get(key) != now[key]]
    if changed:
        raise FullresError(
            f"{path}: was trained by another recipe, which differs in {', '.join(changed)}; "
            "resume with that one or train in another folder"
        )
    log.info("resumed %s at step %d of %d", path, rest["step"], recipe.steps)
    return int(rest["step"])


def _save(fabric: Fabric, recipe: Recipe, run: Path, state: dict[str, Any], step: int) -> None:
    """Everything that the run goes on from; opens with `open_network` too."""
    whole = {**state, "step": step, "recipe": recipe.model_dump_json()}
    whole["fullres"] = _description(recipe)
    part = run / "state.ckpt.part"
    fabric.save(part, whole)
    if fabric.is_global_zero:
        part.replace(run / "state.ckpt")
    fabric.barrier()


def _description(recipe: Recipe) -> dict[str, str]:
    """What `open_network` is told beside the weights."""
    return {
        "network": recipe.network,
        "hyperparameters": json.dumps(recipe.hyperparameters),
        "task": recipe.task,
        "train_size": str(recipe.train_size),
    }


def _export(fabric: Fabric, recipe: Recipe, run: Path, network: nn.Module) -> Path:
    from safetensors.torch import save

    path = run / f"{recipe.name}.safetensors"
    if fabric.is_global_zero:
        # in half precision, weights are off by 2 ** -12 of their size at most
        kind = getattr(torch, recipe.keep)
        state = network.state_dict().items()
        weights = {name: value.detach().to("cpu", kind).contiguous() for name, value in state}
        part = path.with_name(f"{path.name}.part")
        part.write_bytes(save(weights, _description(recipe)))
        part.replace(path)
    fabric.barrier()
    return path


class Record:
    """Rows of `log.csv` and the same for TensorBoard."""

    def __init__(self, path: Path, board: Any, step: int) -> None:
        self.path, self.board = path, board
        self.started, self.first = time.monotonic(), step
        if path.exists():  # what was logged after the checkpoint comes again
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
            self._write(rows, "w")

    def __call__(self, step: int, loss: float, scores: dict[str, float]) -> None:
        """Log a step that was validated."""
        pace = (time.monotonic() - self.started) / (step - self.first)
        row = {"step": step, "loss": loss, **scores, "seconds_per_step": pace}
        for name, value in row.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()
        rounded = {name: round(value, 4) for name, value in row.items()}
        self._write([rounded], "a")
        log.info("%s", rounded)

    def _write(self, rows: list[dict[str, Any]], mode: str) -> None:
        if not rows and mode == "w":
            self.path.unlink()
            return
        new = mode == "w" or not self.path.exists()
        with self.path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            if new:
                writer.writeheader()
            writer.writerows(rows)


@contextmanager
def _tensorboard(run: Path, fabric: Fabric) -> Iterator[Any]:
    """A writer of TensorBoard files, on the first process."""
    if not fabric.is_global_zero:
        yield None
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its dependencies
        from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(run / "tensorboard")
    try:
        yield writer
    finally:
        writer.close()
