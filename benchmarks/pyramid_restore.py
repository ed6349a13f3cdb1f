"""`fullres restore` of a photograph through networks that model long range explicitly.

    python benchmarks/pyramid_restore.py [--write] [CASE…]

PANet for denoising, PA-EDSR ×2 and GRL-tiny, of published size with random weights, in local form,
on a photograph of 1024 × 768 and on one of 501 × 333. Every run is the command itself, in a process
of its own: time and memory are those of the whole command, start and file included. Results must be
finite, of the right size, and not flat. With `--write` the table goes to `pyramid_restore.md`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import fullres as fr
from fullres.io.image import open_image
from fullres.measure import machine, table

GRL_TINY = {
    "embed_dim": 64,
    "depths": (4, 4, 4, 4),
    "num_heads_window": (2, 2, 2, 2),
    "num_heads_stripe": (2, 2, 2, 2),
    "mlp_ratio": 2,
    "local_connection": False,
    "window_size": 16,
    "stripe_size": (64, 128),
    "anchor_window_down_factor": 4,
    "img_size": 256,
    "upsampler": "",
    "upscale": 1,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "PANet, denoising": ("panet", {}),
    "GRL-tiny, denoising": ("grl", GRL_TINY),
    "PA-EDSR ×2": ("pa_edsr", {"scale": 2}),
}
FILES = {"grl": "dn_grl_tiny_c3.pth"}
"""Names that tell what weights do not, as those of published files."""
SIZES = ((501, 333), (1024, 768))
HEADER = ("network", "picture (width × height)", "time", "peak memory", "result")
PAGE = Path(__file__).with_suffix(".md")


def photograph(size: tuple[int, int], path: Path) -> None:
    """A photograph that comes with scikit-image, at a size."""
    from skimage import data

    Image.fromarray(data.astronaut()).resize(size, Image.Resampling.LANCZOS).save(path)


def checkpoint(name: str, hyperparameters: dict[str, Any], path: Path) -> fr.Network:
    """A file of random weights, as its architecture draws them."""
    torch.manual_seed(0)
    network = fr.create_network(name, **hyperparameters)
    torch.save({"params": network.module.state_dict()}, path)
    return network


def run(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def row(case: str, size: tuple[int, int], folder: Path) -> tuple[str, ...]:
    name, hyperparameters = CASES[case]
    picture, weights, target = (
        folder / "photo.png",
        folder / FILES.get(name, "net.pth"),
        folder / "out.tif",
    )
    photograph(size, picture)
    network = checkpoint(name, hyperparameters, weights)
    command = [sys.executable, "-m", "fullres", "restore", str(picture), "--output", str(target)]
    options = ["--network", str(weights), "--overwrite", "--bits", "32"]
    if network.spec.train_size is None:
        options += ["--train-size", "128"]
    seconds, peak = run([*command, *options])
    with open_image(target) as source:
        result = source.read(0, 0, source.height, source.width)
    scale = network.spec.scale
    assert tuple(result.shape) == (3, scale * size[1], scale * size[0]), result.shape
    assert result.isfinite().all()
    assert result.std() > 0
    shape = f"{result.shape[2]} × {result.shape[1]}, finite"
    return case, f"{size[0]} × {size[1]}", f"{seconds:.0f} s", f"{peak / 2**30:.1f} GiB", shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(map(repr, CASES))}; or all")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    options = parser.parse_args()
    lines = [machine("cpu"), ""]

    def rows() -> Iterator[tuple[str, ...]]:
        for size in SIZES:
            for case in options.cases or CASES:
                with tempfile.TemporaryDirectory() as folder:
                    yield row(case, size, Path(folder))

    print(*lines, sep="\n")
    for line in table(HEADER, rows()):
        print(line, flush=True)
        lines.append(line)
    if options.write:
        command = "`python benchmarks/pyramid_restore.py --write`"
        title = "# Restoring photographs through networks of long range"
        PAGE.write_text("\n".join([title, "", f"By {command} on:", "", *lines, ""]), "utf-8")


if __name__ == "__main__":
    main()
