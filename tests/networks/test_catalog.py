from __future__ import annotations

import json
import pkgutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from fullres.errors import NetworkError
from fullres.networks import nafnet
from fullres.networks.catalog import bundled, create_network, networks, open_network
from fullres.networks.instantiate import _task_of, create
from fullres.networks.spec import count

OPTIONS = {"width": 4, "middle_blk_num": 1, "enc_blk_nums": [1, 2], "dec_blk_nums": [1, 1]}


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return create_network("nafnet", **OPTIONS).module.state_dict()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, state):
    """A folder of named weights, as the package's own."""
    folder = tmp_path_factory.mktemp("shelf")
    metadata = {
        "network": "nafnet",
        "hyperparameters": json.dumps(OPTIONS),
        "task": "denoise",
        "train_size": "96",
    }
    save_file(state, folder / "denoise-tiny.safetensors", metadata)
    return folder


def save(content, path):
    torch.save(content, path)
    return path


def refusal(*arguments, **options):
    with pytest.raises(NetworkError) as caught:
        open_network(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Discovery ------------------------------------------------------------------------------------


def test_every_file_that_names_an_architecture_is_found():
    sources = Path(nafnet.__file__).parent.glob("*.py")
    named = {s.stem for s in sources if "\nARCHITECTURE = " in s.read_text(encoding="utf-8")}
    assert set(networks()) == named
    assert "nafnet" in named


@pytest.mark.parametrize("name", sorted(networks()))
def test_an_architecture_describes_itself(name):
    architecture = networks()[name]
    assert architecture.name == name
    assert architecture.tasks
    with torch.device("meta"):
        network = create(architecture, {})
    assert not network.module.training
    assert network.spec.architecture == name
    state = network.module.state_dict()
    detected = architecture.hyperparameters(state)
    assert detected is not None
    assert detected.items() <= network.spec.hyperparameters.items()


@pytest.mark.parametrize("name", sorted(networks()))
def test_any_state_dict_can_be_asked_about(name):
    with torch.device("meta"):
        names = sorted(create(networks()[name], {}).module.state_dict())

    @settings(deadline=None, max_examples=50)
    @given(st.sets(st.sampled_from(names)), st.lists(st.integers(0, 3), max_size=5))
    def ask(chosen, shape):
        state = {n: torch.empty(shape) for n in chosen}
        hyperparameters = networks()[name].hyperparameters(state)
        assert hyperparameters is None or isinstance(hyperparameters, dict)

    ask()


def test_modules_of_the_package_are_files():
    folder = Path(nafnet.__file__).parent
    for module in pkgutil.iter_modules([str(folder)]):
        assert import_module(f"fullres.networks.{module.name}")


@given(st.lists(st.integers(0, 99), min_size=1))
def test_count_is_one_more_than_the_largest_number(numbers):
    assert count({f"body.{n}.weight": torch.ones(1) for n in numbers}, "body.") == max(numbers) + 1


# Creation -------------------------------------------------------------------------------------


def test_create_takes_published_options_and_completes_them():
    network = create_network("nafnet", width=4, enc_blk_nums=[1], dec_blk_nums=[2])
    assert isinstance(network.module, nafnet.NAFNet)
    assert not network.module.training
    assert network.spec.hyperparameters == {
        "img_channel": 3,
        "width": 4,
        "middle_blk_num": 1,
        "enc_blk_nums": (1,),
        "dec_blk_nums": (2,),
    }


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("nafnett", {}, ["'nafnett'", "did you mean 'nafnet'?", "known are", "nafnet"]),
        ("", {}, ["known are", "nafnet"]),
        ("nafnet", {"widht": 4}, ["did you mean 'width'?", "middle_blk_num, enc_blk_nums"]),
        ("nafnet", {"width": "4"}, ["width must be a whole number, not '4'"]),
        ("nafnet", {"width": 4.0}, ["width must be a whole number, not 4.0"]),
        ("nafnet", {"width": True}, ["width must be a whole number, not True"]),
        ("nafnet", {"enc_blk_nums": 3}, ["enc_blk_nums must be a list (each a whole number)"]),
        ("nafnet", {"enc_blk_nums": [1, None]}, ["enc_blk_nums must be a list"]),
        ("nafnet", {"enc_blk_nums": "1111"}, ["enc_blk_nums must be a list"]),
        ("nafnet", {"width": 0}, ["NAFNet", "must be positive"]),
        ("nafnet", {"enc_blk_nums": [1]}, ["same number of levels"]),
    ],
)
def test_create_refuses_in_a_sentence(name, options, words):
    with pytest.raises(NetworkError) as caught:
        create_network(name, **options)
    assert all(word in str(caught.value) for word in words)


# Opening --------------------------------------------------------------------------------------


def assert_same(network, state):
    opened = network.module.state_dict()
    assert list(opened) == list(state)
    for name, value in state.items():
        assert opened[name].dtype == torch.float32
        assert opened[name].equal(value.float())


@pytest.mark.parametrize(
    "nest",
    [
        pytest.param(lambda s: s, id="plain"),
        pytest.param(lambda s: {"params": s}, id="params"),
        pytest.param(lambda s: {"params_ema": s, "params": {}}, id="params_ema"),
        pytest.param(lambda s: {f"module.{n}": v for n, v in s.items()}, id="module."),
        pytest.param(lambda s: {"model": s, "epoch": 3, "args": {"lr": 0.1}}, id="model"),
        pytest.param(
            lambda s: {
                "state_dict": {
                    **{f"model.{n}": v for n, v in s.items()},
                    "loss.vgg.0.weight": torch.ones(8, 3, 3, 3),
                },
                "hyper_parameters": {"width": 4},
                "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
            },
            id="Lightning",
        ),
        pytest.param(
            lambda s: {
                "step": 3,
                "network": {n: v + 1 for n, v in s.items()},
                "average": s,
                "optimiser": {"state": {0: {"exp_avg": torch.ones(3)}}},
            },
            id="training state",
        ),
    ],
)
def test_published_nestings(tmp_path, state, nest):
    network = open_network(save(nest(state), tmp_path / "w.pth"))
    assert_same(network, state)
    assert network.spec.architecture == "nafnet"
    assert network.spec.hyperparameters["enc_blk_nums"] == (1, 2)
    assert (network.spec.task, network.spec.train_size) == (None, 256)
    assert not network.module.training
    assert all(parameter.requires_grad for parameter in network.module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_open_as_float32(tmp_path, state, dtype):
    stored = {name: value.to(dtype) for name, value in state.items()}
    assert_same(open_network(save(stored, tmp_path / "w.pth")), stored)


def test_the_file_may_be_overwritten_while_the_network_lives(tmp_path, state):
    path = save(state, tmp_path / "w.pth")
    network = open_network(str(path))
    path.write_bytes(bytes(path.stat().st_size))
    assert_same(network, state)


def test_a_name_on_the_shelf(shelf, state):
    assert bundled(shelf) == ("denoise-tiny",)
    network = open_network("denoise-tiny", folder=shelf)
    assert_same(network, state)
    assert (network.spec.task, network.spec.train_size) == ("denoise", 96)


def test_bundled_weights_open():
    for name in bundled():
        assert open_network(name).spec.train_size


def test_train_size_given_by_the_caller(shelf):
    path = shelf / "denoise-tiny.safetensors"
    assert open_network(path, train_size=128).spec.train_size == 128
    assert "at least 1" in refusal(path, train_size=0)


def test_metadata_that_is_not_ours_is_ignored(tmp_path, state):
    path = tmp_path / "w.safetensors"
    save_file(state, path, {"format": "pt", "network": "x", "train_size": "big"})
    assert open_network(path).spec.train_size == 256


@pytest.mark.parametrize("hyperparameters", ["", "[1]", "{width: 4}"])
def test_broken_metadata(tmp_path, state, hyperparameters):
    path = tmp_path / "w.safetensors"
    save_file(state, path, {"network": "nafnet", "hyperparameters": hyperparameters})
    assert "no JSON object" in refusal(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("denoise-tini", ["did you mean 'denoise-tiny'?", "one of the bundled networks"]),
        ("nafnet", ["is an architecture, not weights", "denoise-tiny"]),
        ("denoise-tiny.pth", ["no such checkpoint"]),
        ("folder/denoise-tiny", ["no such checkpoint"]),
    ],
)
def test_unknown_names(shelf, name, words):
    message = refusal(name, folder=shelf)
    assert all(word in message for word in words)


def test_an_empty_shelf(tmp_path):
    assert "bundled networks: none" in refusal("denoise", folder=tmp_path)


def test_unknown_architecture(tmp_path):
    path = save(nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU()).state_dict(), tmp_path / "w.pth")
    message = refusal(path)
    assert message.startswith(f"{path}: is of no known architecture: 225 parameters in 3 tensors")
    assert "(0.weight, 0.bias, 1.weight); known are" in message
    assert "NAFNet" in message


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: without(s, "ending.bias"), "lacks 1 (ending.bias)"),
        (
            lambda s: without(s, *[n for n in s if n.startswith("encoders.0.0.conv")]),
            "lacks 10 (encoders.0.0.conv1.weight, encoders.0.0.conv1.bias, "
            "encoders.0.0.conv2.weight, …)",
        ),
        (lambda s: s | {"tail.weight": torch.ones(1)}, "has unexpected 1 (tail.weight)"),
        (
            lambda s: s | {"ending.bias": torch.ones(5)},
            "has unlike 1 (ending.bias is (5,), not (3,))",
        ),
        (
            lambda s: s | {"ending.bias": torch.ones(3, dtype=torch.int8)},
            "ending.bias is int8 (3,), not (3,)",
        ),
        (lambda s: s | {"ending.bias": torch.full((3,), torch.nan)}, "NaN or infinity in 1 of"),
        (lambda s: s | {"ending.bias": torch.full((3,), torch.inf)}, "(ending.bias)"),
    ],
)
def test_a_state_dict_that_does_not_fit(tmp_path, state, change, words):
    path = save(change(state), tmp_path / "w.pth")
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert "NAFNet" in message
    assert words in message


@pytest.mark.parametrize("content", [b"", b"not weights", b"\x89PNG\r\n\x1a\n"])
def test_files_that_are_no_checkpoints(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    assert refusal(tmp_path / "w.pth").startswith(f"{tmp_path / 'w.pth'}: is ")


def test_a_folder(tmp_path):
    assert "is a folder" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "file", "task"),
    [
        ("restormer", "motion_deblurring.pth", "deblur"),
        ("restormer", "single_image_defocus_deblurring.pth", "defocus"),
        ("restormer", "gaussian_color_denoising_blind.pth", "denoise"),
        ("restormer", "deraining.pth", "derain"),
        ("restormer", "mine.pth", None),
        ("nafnet", "NAFNet-GoPro-width32.pth", "deblur"),
        ("nafnet", "NAFNet-SIDD-width64.pth", "denoise"),
        ("nafnet", "deraining.pth", None),
        ("hinet", "HINet-Rain13k.pth", "derain"),
        ("panet", "CAR_q10.pt", "jpeg"),
        ("spdnet", "anything.pth", "derain"),
    ],
)
def test_the_name_of_a_published_file_tells_its_task(architecture, file, task):
    found = networks()[architecture]
    assert (_task_of(Path(file).stem, found) or _only(found.tasks)) == task


def _only(tasks):
    return tasks[0] if len(tasks) == 1 else None
