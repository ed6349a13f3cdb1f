"""What local operations cost on a GPU, beside a copy of the map and beside the global network.

    python benchmarks/gpu.py [CASE…] [--tables copy,overhead,half] [--repeats 15]

Three tables. `copy`: kernels at 64 channels of 720 × 1280, window 384, against a copy of the same
map on the same device, times by CUDA events; the share is the time of the copy over that of the
kernel, so it is the share of the measured copy bandwidth where a map is read and written once.
Beside stands the reference in torch's operations, or the global operation that becomes local. The
error is the largest against float64, over the largest magnitude. `overhead`: a pass of each network
in its local form over one in its global form at 720 × 1280, picture and result on the device.
`half`: whether a pass in half precision at 2160 × 3840 is free of NaN and infinities, and the
memory it takes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cases import SMALLER, cases, form
from fullres.bench import picture
from fullres.measure import machine, median_ratio, table
from fullres.ops.box import (
    local_mean,
    local_mean_reference,
    local_mean_var,
    local_mean_var_reference,
    local_normalise,
)
from fullres.ops.windows import transposed_attention
from fullres.tiles import is_out_of_memory

SHAPE, WINDOW = (1, 64, 720, 1280), (384, 384)
SIZE, LARGE = (720, 1280), (2160, 3840)
DTYPES = ("float32", "float16", "bfloat16")
Call = Callable[[], object]


def timed(calls: dict[str, Call], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call on the device, turn by turn, after three that are not counted."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-3, repeats):
        for name, call in calls.items():
            # other data in L2, and the device busy until the call is queued
            flush = torch.empty(2**28, dtype=torch.int8, device="cuda").zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(2_000_000)
            begin.record()
            call()
            end.record()
            end.synchronize()
            del flush
            if turn >= 0:
                found[name].append(begin.elapsed_time(end) / 1000)
    return found


# Kernels --------------------------------------------------------------------------------------

COPY_HEADER = (
    "memory",
    "type",
    "kernel",
    "time",
    "copy",
    "share of copy bandwidth",
    "beside",
    "error",
)


def kernels(x: Tensor) -> dict[str, tuple[Call, str, Call]]:
    """Each kernel, and what stands beside it, by name."""
    weight, bias = torch.rand(2, x.shape[1], device=x.device).unbind()
    q, k, v = (y[:, :48].contiguous(memory_format=_memory(x)) for y in (x, x.flip(1), x))
    temperature = torch.ones(1, device=x.device)
    return {
        "local mean": (
            lambda: local_mean(x, WINDOW),
            "reference",
            lambda: local_mean_reference(x, WINDOW),
        ),
        "local mean and variance": (
            lambda: local_mean_var(x, WINDOW),
            "reference",
            lambda: local_mean_var_reference(x, WINDOW),
        ),
        "local normalisation": (
            lambda: local_normalise(x, WINDOW, weight, bias),
            "global",
            lambda: F.instance_norm(x, None, None, weight.to(x.dtype), bias.to(x.dtype)),
        ),
        "transposed attention, 48 channels": (
            lambda: transposed_attention(q, k, v, temperature, WINDOW),
            "global",
            lambda: transposed_attention(q, k, v, temperature),
        ),
    }


def _memory(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _error(x: Tensor) -> float:
    """Largest error of the local mean of a few channels, over their largest magnitude."""
    few = x[:, :8]
    exact = local_mean_reference(few.double(), WINDOW)
    return float((local_mean(few, WINDOW).double() - exact).abs().max() / few.abs().max())


def copy_rows(repeats: int) -> Iterator[tuple[str, ...]]:
    for name, memory in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
        for dtype in DTYPES:
            x = (torch.rand(SHAPE, device="cuda") + 1).to(getattr(torch, dtype))
            x = x.to(memory_format=memory)
            room = torch.empty_like(x)
            error = f"{_error(x):.0e}"
            for kernel, (call, what, beside) in kernels(x).items():
                calls: dict[str, Call] = {"copy": lambda r=room, x=x: r.copy_(x)}
                took = timed(calls | {"kernel": call, "beside": beside}, repeats)
                share = 100 * median_ratio(took, "copy", "kernel")
                times = {n: f"{1e6 * statistics.median(t):.0f} µs" for n, t in took.items()}
                middle = statistics.median(took["copy"])
                rate = 2 * x.numel() * x.element_size() / middle / 1e12
                yield (
                    *(name, dtype, kernel, times["kernel"]),
                    *(f"{times['copy']}, {rate:.2f} TB/s", f"{share:.0f} %"),
                    f"{what}: {times['beside']}",
                    error if kernel == "local mean" else "",
                )


# Networks -------------------------------------------------------------------------------------

OVERHEAD_HEADER = ("network", "picture", "type", "global", "local", "local ÷ global")


def overhead_rows(names: list[str], repeats: int) -> Iterator[tuple[str, ...]]:
    for case in names:
        for dtype in ("float32", "bfloat16"):
            size = SMALLER.get(case, SIZE)
            try:
                took = _passes(case, dtype, size, repeats)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                yield case, f"{size[0]} × {size[1]}", dtype, "out of memory", "", ""
                continue
            times = (f"{1e3 * statistics.median(took[k]):.2f} ms" for k in ("global", "local"))
            ratio = f"{median_ratio(took, 'local', 'global'):.3f}"
            yield case, f"{size[0]} × {size[1]}", dtype, *times, ratio


@torch.inference_mode()
def _passes(case: str, dtype: str, size: tuple[int, int], repeats: int) -> dict[str, list[float]]:
    with ExitStack() as stack:
        calls: dict[str, Call] = {}
        for kind in ("global", "local"):
            made = stack.enter_context(form(case, kind, "cuda", dtype))
            x = picture(made.spec, size).to("cuda", getattr(torch, dtype))
            calls[kind] = partial(made.module, x * made.spec.value_range)
        return timed(calls, repeats)


HALF_HEADER = ("network", "picture", "type", "all finite", "peak memory")


@torch.inference_mode()
def half_rows(names: list[str]) -> Iterator[tuple[str, ...]]:
    for case in names:
        for dtype in ("float16", "bfloat16"):
            with form(case, "local", "cuda", dtype) as made:
                torch.cuda.reset_peak_memory_stats()
                try:
                    result = made(LARGE)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    found = "out of memory"
                else:
                    found = "yes" if bool(result.isfinite().all()) else "NO"
            peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            yield case, f"{LARGE[0]} × {LARGE[1]}", dtype, found, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(cases())}")
    parser.add_argument("--tables", default="copy,overhead,half")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    wanted = options.tables.split(",")
    unknown = (set(options.cases) - set(cases())) | (set(wanted) - {"copy", "overhead", "half"})
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        print("There is no CUDA device here: nothing was measured.")
        return
    print(f"{machine('cuda')}; medians of {options.repeats} turns")
    names = options.cases or [case for case in cases() if case not in SMALLER]
    tables = {
        "copy": (COPY_HEADER, lambda: copy_rows(options.repeats)),
        "overhead": (OVERHEAD_HEADER, lambda: overhead_rows(names, options.repeats)),
        "half": (HALF_HEADER, lambda: half_rows(names)),
    }
    for name in wanted:
        header, rows = tables[name]
        print()
        for line in table(header, rows()):
            print(line, flush=True)


if __name__ == "__main__":
    main()
