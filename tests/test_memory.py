"""Pages of memory: huge ones where Linux grants them, kept ones where training wants them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fullres.memory import peak_memory

GRANT = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.skipif(
    not GRANT.exists() or "[never]" in GRANT.read_text(), reason="no huge pages on this system"
)
def test_tensors_lie_on_huge_pages():
    code = """
from fullres.memory import use_huge_pages
use_huge_pages()
import torch
x = torch.ones(64 * 2**20)
print(open("/proc/self/smaps_rollup").read())
"""
    kept = int(re.search(r"AnonHugePages:\s+(\d+) kB", run(code, THP_MEM_ALLOC_ENABLE="1"))[1])
    assert kept > 200_000
    refused = int(re.search(r"AnonHugePages:\s+(\d+) kB", run(code, THP_MEM_ALLOC_ENABLE="0"))[1])
    if "[madvise]" in GRANT.read_text():
        assert refused < 100_000  # what the user set stays


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about glibc")
def test_freed_memory_is_kept_inside_and_returned_outside():
    code = """
import torch
from fullres.memory import freed_memory_kept

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

before = resident()
with freed_memory_kept():
    x = torch.ones(64 * 2**20)
    del x
    inside = resident() - before
print(inside, resident() - before)
"""
    inside, outside = map(int, run(code).split())
    assert inside > 200
    assert outside < 50


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about glibc")
@pytest.mark.parametrize(("all_of_it", "expected"), [(False, 15), (True, 0)])
def test_where_memory_is_short_large_blocks_are_returned(all_of_it, expected):
    code = f"""
import torch
from fullres.memory import freed_memory_kept, freed_memory_returned

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

with freed_memory_kept(), freed_memory_returned(all_of_it={all_of_it}):
    before = resident()
    large, small = torch.ones(16 * 2**20), torch.ones(4 * 2**20)
    del small, large
    print(resident() - before)
    before = resident()
with freed_memory_kept():
    x = torch.ones(64 * 2**20)
    del x
    print(resident() - before)
"""
    returned, kept = map(int, run(code).split())
    assert abs(returned - expected) < 8
    assert kept > 200


class Picky(nn.Module):
    """Copied and pickled without what was added to it."""

    def __getstate__(self):
        return {}

    def __setstate__(self, state):
        super().__init__()
        self.__dict__.update(state)

    def forward(self, x):
        return x * self.local_factor


def test_what_was_added_to_a_module_is_there_in_the_pass():
    module = Picky()
    module.local_factor = 2
    assert peak_memory(module, (1, 3, 8, 8), torch.float32, "cpu") == 2 * 4 * 3 * 64


def test_what_a_pass_leaves_in_a_module_does_not_reach_it():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.mean = torch.zeros(1, 3, 1, 1)

        def forward(self, x):
            self.mean = self.mean.type_as(x) + 0
            return self.conv(x) + self.mean

    module = Keeps()
    before = module.mean
    peak_memory(module, (1, 3, 32, 32), torch.float32, "cpu")
    assert module.mean is before
