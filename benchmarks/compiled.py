"""What torch.compile would gain: the same forms of networks compiled and eager, in turn.

    python benchmarks/compiled.py [CASE…] [--size 384x512] [--repeats 5] [--threads N]

NAFNet and the U-Net with group norm if no case is named, in float32. Kernels of ours run as they
are, in calls that break the compiled graph. Times and ratios are medians over turns. The first pass
of a compiled form includes compiling it; TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 in the environment
makes sure that nothing is left from before.
"""

from __future__ import annotations

from functools import partial

import torch

from cases import form, options, size_of, times
from fullres.bench import picture
from fullres.measure import Size, interleaved, median_ratio, seconds, table

KINDS = ("plain kept", "global", "local")
HEADER = (
    "network",
    "form",
    "picture",
    "eager",
    "compiled",
    "eager ÷ compiled",
    "first pass compiled",
    "largest difference",
)


@torch.inference_mode()
def row(case: str, kind: str, size: Size, repeats: int) -> tuple[str, ...]:
    with form(case, kind) as found:
        x = picture(found.spec, size) * found.spec.value_range
        if kind != "plain kept":
            x = x.contiguous(memory_format=torch.channels_last)
        forms = {"eager": found.module, "compiled": torch.compile(found.module)}
        first = seconds(partial(forms["compiled"], x))
        results = [run(x) for run in forms.values()]
        took = interleaved({name: partial(run, x) for name, run in forms.items()}, repeats)
    return (
        case,
        kind,
        f"{size[0]} × {size[1]}",
        times(took["eager"]),
        times(took["compiled"]),
        f"{median_ratio(took, 'eager', 'compiled'):.2f}",
        times([first]),
        f"{(results[0] - results[1]).abs().max() / found.spec.value_range:.0e}",
    )


def main() -> None:
    given = options(__doc__, size=(384, 512), repeats=5)
    rows = (
        row(case, kind, size_of(case, given), given.repeats)
        for case in given.cases or ("nafnet", "unet-gn")
        for kind in KINDS
    )
    for line in table(HEADER, rows):
        print(line, flush=True)


if __name__ == "__main__":
    main()
