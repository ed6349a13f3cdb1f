"""What importing fullres costs, offers and drags in, and which way its parts import."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import fullres as fr

PACKAGE = Path(fr.__file__).parent

PUBLIC = [
    "Conversion",
    "ConversionError",
    "Evaluation",
    "FullresError",
    "ImageError",
    "Local",
    "Network",
    "NetworkError",
    "NothingToConvert",
    "Plan",
    "Report",
    "Spec",
    "__version__",
    "convert",
    "create_network",
    "evaluate",
    "networks",
    "open_network",
    "plan",
    "restore",
]

HEAVY = [
    "av",
    "gradio",
    "lightning",
    "matplotlib",
    "numba",
    "onnx",
    "onnxscript",
    "psutil",
    "pydantic",
    "pytorch_lightning",
    "pyvips",
    "ray",
    "rich",
    "safetensors",
    "scipy",
    "skimage",
    "spandrel",
    "typer",
]

ORDER = [
    {"__main__"},
    {"cli", "web"},
    {"cli_study"},
    {"console", "studies"},
    {"evaluate"},
    {"evaluation", "bench"},
    {"restore", "training", "export"},
    {"batch", "budget", "feed", "measure", "options"},
    {"data"},
    {"io", "tiles", "patches", "memory", "local", "networks", "metrics"},
    {"ops", "shadow", "weights"},
    {"errors"},
]
"""Every part imports from rows below its own alone."""

ALLOWED = {("cli", "fullres"), ("networks", "io.checkpoint")}
"""Besides, a name of the package itself, and the files of checkpoints."""


def run_python(code: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return process.stdout


def test_public_names():
    assert sorted(fr.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(fr))
    for name in PUBLIC:
        assert getattr(fr, name) is not None
    with pytest.raises(AttributeError, match="restor"):
        fr.restor  # noqa: B018


def test_names_that_parts_of_the_package_share_are_the_functions():
    code = """
import fullres.restore, fullres.networks.catalog
import fullres as fr
from fullres import networks, restore
from fullres.restore import restore as same
print(restore is fr.restore is same and callable(restore))
print(networks is fr.networks and "nafnet" in networks())
import fullres.networks.spec
print(fr.networks is networks)
"""
    assert run_python(code).split() == 3 * ["True"]
    code = "import fullres as fr; print('nafnet' in fr.networks(), callable(fr.restore))"
    assert run_python(code).split() == 2 * ["True"]


def test_import_loads_nothing_heavy():
    loaded = json.loads(
        run_python("import json, sys, fullres; print(json.dumps(list(sys.modules)))")
    )
    assert not {name.split(".")[0] for name in loaded} & {*HEAVY, "torch", "numpy"}


def test_a_network_is_opened_and_converted_without_what_pictures_need():
    code = """
import json, sys
import fullres as fr
net = fr.create_network("nafnet", width=8, enc_blk_nums=[1], dec_blk_nums=[1])
fr.convert(net.module, fr.Local(train_size=64))
print(json.dumps(list(sys.modules)))
"""
    loaded = {name.split(".")[0] for name in json.loads(run_python(code))}
    assert not loaded & {"av", "gradio", "lightning", "matplotlib", "ray", "typer", "pydantic"}
    assert not loaded & {"pyvips", "rich", "skimage", "psutil"}


def test_import_costs_no_more_than_importing_torch_plus_50_ms():
    code = "import time; t = time.process_time(); import {}; print(time.process_time() - t)"
    times = {"torch": [], "fullres": []}
    for _ in range(3):
        for module, taken in times.items():
            taken.append(float(run_python(code.format(module))))
    assert statistics.median(times["fullres"]) < statistics.median(times["torch"]) + 0.05


def test_help_does_not_load_torch():
    code = """
import sys
sys.argv = ["fullres", "restore", "--help"]
from fullres.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
print("torch" in sys.modules)
"""
    assert run_python(code).splitlines()[-1] == "False"


def imports_of(path: Path) -> set[str]:
    """Modules of fullres that a file imports, without the leading `fullres.`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from fullres.io import colour` may import a module or a name: both are covered
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {
            name.removeprefix("fullres.") for name in names if name.split(".")[0] == "fullres"
        }
    return found


def rank(part: str) -> int:
    return next(i for i, parts in enumerate(ORDER) if part in parts)


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    inside = path.relative_to(PACKAGE).with_suffix("").parts
    for imported in imports_of(path):
        part = imported.split(".")[0]
        if part == inside[0]:
            continue
        if any(
            inside[0] == importer and f"{imported}.".startswith(f"{allowed}.")
            for importer, allowed in ALLOWED
        ):
            continue
        assert rank(inside[0]) < rank(part), f"{'.'.join(inside)} imports {imported}"


def test_the_direction_test_sees_imports():
    assert "local.Local" in imports_of(PACKAGE / "restore.py")
    assert "console.Display" in imports_of(PACKAGE / "cli.py")
    assert rank("local") == rank("networks") == rank("io")


def test_every_part_has_its_place():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert parts <= set.union(*ORDER)


def test_type_checkers_are_told():
    assert (PACKAGE / "py.typed").exists()
