"""`fullres study`: what a person types and gets."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import fullres as fr
from fullres import cli


@pytest.fixture
def checkpoint(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    hyperparameters = {"width": 4, "enc_blk_nums": [1], "dec_blk_nums": [1]}
    net = fr.create_network("nafnet", **hyperparameters)
    metadata = {"network": "nafnet", "hyperparameters": json.dumps(hyperparameters)}
    path = tmp_path / "small.safetensors"
    save_file(net.module.state_dict(), path, {**metadata, "train_size": "16"})
    return path


@pytest.fixture
def fullres(monkeypatch, capfd):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fullres", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("statistics", ["--crops", 5, "--window", 20]),
        ("window", ["--factor", 1, "--factor", 2]),
        ("modules", ["--size", 32]),
        ("methods", ["--overlap", 2]),
    ],
)
def test_a_study_prints_its_table_and_leaves_its_files(
    fullres, checkpoint, pairs, tmp_path, leaves, name, options
):
    folder, _ = pairs((40, 64), (33, 50))
    out = tmp_path / "out"
    code, printed, err = fullres("study", name, folder, "-n", checkpoint, *options, "-o", out)
    assert (code, err) == (0, "")
    assert leaves(out, name)
    table = (out / f"{name}.md").read_text(encoding="utf-8").split("\n\n", 1)[1]
    assert table.strip() in printed


def test_what_does_not_fit_is_one_sentence(fullres, checkpoint, tmp_path):
    code, _, err = fullres("study", "window", tmp_path / "none", "-n", checkpoint)
    assert code == 1
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_help_loads_neither_torch_nor_matplotlib():
    code = """
import sys
sys.argv = ["fullres", "study", "window", "--help"]
from fullres.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
print({"torch", "matplotlib"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "set()"
