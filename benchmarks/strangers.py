"""Local conversion of every architecture that spandrel can build: the page docs/strangers.md.

    python benchmarks/strangers.py --write          # all, into docs/strangers.md
    python benchmarks/strangers.py RCAN SwinIR      # some, on the terminal

Each architecture of spandrel's registry, and of spandrel_extra_arches where it is installed, is
built small with random weights, opened as a checkpoint would be, planned, converted and checked
(`stranger_laws.py`). What goes wrong is a row of the table too.
"""

from __future__ import annotations

import argparse
import sys
import time
import typing
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fullres as fr
from fullres.io.checkpoint import Checkpoint
from fullres.networks import foreign
from fullres.networks.catalog import networks
from fullres.networks.instantiate import load
from stranger_laws import Stranger, examined, in_words

PAGE = Path(__file__).parents[1] / "docs" / "strangers.md"

_SWIN = {"embed_dim": 12, "depths": (2,), "num_heads": (2,), "window_size": 8}
SMALL: dict[str, dict[str, Any]] = {
    "ATD": {"embed_dim": 12, "depths": (2,), "num_heads": (2,), "num_tokens": 8},
    "CIDNet": {"channels": [8, 8, 16, 32], "heads": [1, 2, 2, 4]},
    "CRAFT": {"embed_dim": 24, "depths": [2], "num_heads": [6], "upscale": 2},
    "DAT": {"embed_dim": 16, "depth": [2], "num_heads": [2]},
    "DDColor": {
        "encoder_name": "convnext-t",
        "num_output_channels": 2,
        "num_queries": 16,
        "dec_layers": 1,
    },
    "DCTLSA": {"nf": 20, "upscale": 2},
    "DITN_Real": {"dim": 12, "ITL_blocks": 1, "SAL_blocks": 1, "upscale": 2},
    "DRCT": {**_SWIN, "gc": 8},
    "DRUNet": {"in_nc": 4, "out_nc": 3, "nc": [8, 8, 16, 16], "nb": 2},
    "DnCNN": {"nc": 8, "nb": 4},
    "FBCNN": {"nc": [8, 8, 16, 512], "nb": 2},
    "FDAT": {"embed_dim": 24, "num_groups": 1},
    "FFTformer": {"dim": 12, "num_blocks": [1, 1, 1], "num_refinement_blocks": 1},
    "GRL": {
        "embed_dim": 24,
        "depths": [2],
        "num_heads_window": [2],
        "num_heads_stripe": [2],
        "local_connection": True,
    },
    "Generator": {"num_channels": 8, "num_blocks": 1},
    "HAT": {**_SWIN, "upscale": 2, "num_feat": 16, "squeeze_factor": 6},
    "IPT": {"n_feats": 8, "patch_size": 24, "num_layers": 1, "num_heads": 2},
    "KBNet_l": {
        "dim": 48,
        "num_blocks": [1] * 4,
        "num_refinement_blocks": 1,
    },
    "KBNet_s": {"width": 8, "middle_blk_num": 1, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]},
    "LaMa": {"in_nc": 4},
    "M3SNet": {"width": 8, "enc_blk_nums": [1, 1, 1, 1]},
    "MIRNet_v2": {"n_feat": 16, "n_MRB": 1},
    "MMRRDBNet_test": {
        "num_in_ch": 3,
        "num_out_ch": 3,
        "num_feat": 8,
        "num_block": 1,
        "num_grow_ch": 8,
        "num_feats": [8, 8, 16, 16],
        "num_blocks": [1, 1, 1, 1],
    },
    "MPRNet": {"n_feat": 8, "scale_unetfeats": 4, "scale_orsnetfeats": 4, "num_cab": 1},
    "MixDehazeNet": {"embed_dims": [8, 16, 32, 16, 8], "depths": [1] * 5},
    "MoESR": {"dim": 16, "n_blocks": 1, "n_block": 1},
    "MoSR": {"n_block": 2, "dim": 16},
    "NAFNet": {"width": 8, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]},
    "OmniSR": {"num_feat": 16, "up_scale": 2},
    "PLKSR": {"dim": 16, "n_blocks": 1},
    "RCAN": {"n_resgroups": 1, "n_resblocks": 2, "n_feats": 16},
    "RGT": {"embed_dim": 16, "depth": [2], "num_heads": [2]},
    "RRDBNet": {"num_filters": 8, "num_blocks": 1},
    "RealPLKSR": {"dim": 16, "n_blocks": 1},
    "RestoreFormer": {
        "ch": 32,
        "ch_mult": (1, 1, 2),
        "num_res_blocks": 1,
        "embed_dim": 32,
        "n_embed": 16,
        "z_channels": 32,
        "head_size": 2,
    },
    "Restormer": {
        "dim": 8,
        "num_blocks": [1] * 4,
        "num_refinement_blocks": 1,
        "heads": [1, 1, 2, 2],
    },
    "RetinexFormer": {"n_feat": 8, "stage": 1},
    "SAFMN": {"dim": 16, "n_blocks": 2},
    "SAFMN_BCIE": {"dim": 16, "n_blocks": 1, "num_layers": 1},
    "SCUNet": {"config": [1] * 7},
    "SPAN": {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 8, "upscale": 2},
    "SRFormer": _SWIN,
    "SRVGGNetCompact": {"num_feat": 8, "num_conv": 2},
    "SeemoRe": {"num_layers": 1, "embedding_dim": 16, "num_experts": 3},
    "Swin2SR": {**_SWIN, "upsampler": "pixelshuffle"},
    "SwinIR": _SWIN,
    "Uformer": {
        "embed_dim": 8,
        "depths": [1] * 9,
        "num_heads": [1, 1, 2, 2, 2, 2, 2, 1, 1],
    },
    "UnetUpsampler": {
        "dim": 16,
        "image_size": None,
        "input_image_size": None,
        "style_network": {"dim_in": 16, "dim_out": 64, "depth": 1},
    },
}
"""Arguments of classes that are large by default, or that have arguments without a default."""


@dataclass
class Row:
    """One line of the table."""

    name: str
    opens: str = ""
    found: str = ""
    converted: str = ""
    kept: str = ""
    note: str = ""
    """What could not be checked."""
    faults: list[str] = field(default_factory=list)
    """What does not hold."""


def candidates() -> Iterator[tuple[Any, type[nn.Module], str]]:
    """Every architecture with each class that it may build, and a name for both."""
    registry = foreign.architectures()
    assert registry is not None, foreign.REMEDY
    for support in registry:
        architecture = support.architecture
        built = typing.get_args(type(architecture).__orig_bases__[0])[0]
        classes = typing.get_args(built) or (built,)
        for cls in classes:
            several = f" ({cls.__name__})" if len(classes) > 1 else ""
            yield architecture, cls, f"{architecture.name}{several}"


def rows_of(architecture: Any, cls: type[nn.Module], name: str) -> list[Row]:
    """Build, open, convert and check one architecture; whatever happens is in a row.

    Where fullres opens its checkpoints with a network of its own, that one has a row as well.
    """
    rows = [Row(name)]
    try:
        torch.manual_seed(0)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = randomised(cls(**SMALL.get(cls.__name__, {})))
            opened = opening(state)
            stranger = Stranger.of_descriptor(architecture.load(dict(state)))
        rows[0].opens = opened if isinstance(opened, str) else "yes"
        ours = isinstance(opened, fr.Network) and opened.spec.architecture in networks()
        if ours:
            rows[0].opens = "as fullres' own"
            rows.append(Row(f"{name}, fullres' own", "yes"))
        examine(stranger, rows[0])
        if ours:
            examine(Stranger.of_network(opened), rows[1])
    except Exception as error:  # noqa: BLE001 - one that fails is a row of the table
        rows[-1].faults.append(in_words(error))
    return rows


def randomised(module: nn.Module) -> dict[str, Tensor]:
    """Random weights; no layer starts as the zero that would hide what lies behind it."""
    state = module.state_dict()
    for value in state.values():
        if value.is_floating_point() and value.numel() > 1 and not value.count_nonzero():
            value.copy_(0.1 * torch.randn(value.shape))
    return state


def opening(state: dict[str, Tensor]) -> fr.Network | str:
    """What `open_network` makes of a checkpoint with this state dict, or why it refuses it."""
    try:
        return load(Checkpoint(Path("stranger.pth"), state), networks().values())
    except fr.NetworkError as error:
        return f"no: {str(error).partition(';')[0]}"


def examine(stranger: Stranger, row: Row) -> None:
    plan = stranger.plan()
    row.found = counted(op for op in plan.operations if op.is_global)
    row.converted = counted(plan.converted)
    row.kept = "; ".join(
        f"{counted(op for op in plan.still_global if op.reason == reason)}: {reason}"
        for reason in dict.fromkeys(op.reason for op in plan.still_global)
    )
    row.note, row.faults = examined(stranger, plan)


def counted(operations: Iterable[Any]) -> str:
    counts = Counter(op.kind for op in operations)
    return ", ".join(kind if n == 1 else f"{n} {kind}" for kind, n in counts.items())


HEAD = """\
# Other people's networks

fullres opens checkpoints of every architecture that [spandrel](https://github.com/chaiNNer-org/spandrel)
knows (`pip install 'fullres[spandrel]'`), {extra}, and makes
local what is global in them, as in any `nn.Module`. This table is made, and every line of it
checked, by

    python benchmarks/strangers.py --write

with spandrel {version}. Each network is built small, with random weights, and then:

- its checkpoint is opened; what does not make a picture from a picture is refused, with the reason;
- at the training size, and at a larger size under a window as large, local and global agree;
- it reverts bit for bit, takes other sizes, and takes a batch as it takes single pictures;
- its memory is told without running it;
- a change at one end of a long picture reaches the middle if, and only if, the plan says that
  something is global; once local, if and only if something stays so.

"Hold" means all of that. An operation stays global for a reason, and the plan says so.

"""


def page(rows: Sequence[Row]) -> str:
    """The rows as a page of the documentation."""
    extra = "and of its extra package where that is installed"
    cells = [
        ("architecture", "opens", "global operations", "become local", "stay, because", "laws")
    ]
    cells.append(("---",) * 6)
    for row in rows:
        laws = "; ".join([*filter(None, [row.note]), *row.faults]) or "hold"
        cells.append((row.name, row.opens, row.found or "none", row.converted, row.kept, laws))
    lines = (f"| {' | '.join(c.replace('|', '/') for c in row)} |" for row in cells)
    body = "\n".join(" ".join(line.split()) for line in lines)
    return HEAD.format(version=foreign.version(), extra=extra) + body + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="architectures or classes; all if none is given")
    parser.add_argument("--write", action="store_true", help="write docs/strangers.md")
    options = parser.parse_args()
    rows = []
    for architecture, cls, name in candidates():
        if options.names and not {architecture.id, cls.__name__} & {*options.names}:
            continue
        start = time.perf_counter()
        rows += rows_of(architecture, cls, name)
        took = time.perf_counter() - start
        print(f"{name}: {'; '.join(rows[-1].faults) or 'done'} ({took:.0f} s)", file=sys.stderr)
    text = page(rows)
    if options.write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
