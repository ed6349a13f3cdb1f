"""The example that the README begins with."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_photograph_is_denoised_and_deblurred(tmp_path):
    process = subprocess.run(
        [sys.executable, EXAMPLES / "restore.py", tmp_path],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    scores = re.findall(r"(\w+), PSNR in dB: ([\d.]+) before, ([\d.]+) after", process.stdout)
    gains = {name: float(after) - float(before) for name, before, after in scores}
    assert gains["denoised"] > 8
    assert gains["deblurred"] > 1
    assert len(list(tmp_path.glob("*-compare.png"))) == 2
