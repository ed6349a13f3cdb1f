from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fullres.errors import NetworkError
from fullres.io.checkpoint import read_checkpoint

WEIGHTS = {"head.weight": torch.arange(6.0).reshape(2, 3), "head.bias": torch.ones(2)}
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(content, path, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def first(path):
    return next(read_checkpoint(path).candidates())


def assert_weights(state, expected=WEIGHTS):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value)


@FORMATS
def test_plain_state_dict(tmp_path, zipped):
    checkpoint = read_checkpoint(save(WEIGHTS, tmp_path / "w.pth", zipped))
    assert checkpoint.metadata == {}
    assert_weights(next(checkpoint.candidates()))


def test_safetensors_with_metadata(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.safetensors", {"task": "denoise"})
    checkpoint = read_checkpoint(tmp_path / "w.safetensors")
    assert checkpoint.metadata == {"task": "denoise"}
    assert_weights(next(checkpoint.candidates()))


@pytest.mark.parametrize("zipped", [True, False, None], ids=["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.ckpt", "w"])
def test_the_content_decides_not_the_suffix(tmp_path, zipped, name):
    if zipped is None:
        save_file(WEIGHTS, tmp_path / name)
    else:
        save(WEIGHTS, tmp_path / name, zipped)
    assert_weights(first(tmp_path / name))


@pytest.mark.parametrize("outer", ["params", "state_dict", "model", "net_g", "weights of my own"])
def test_nested_once(tmp_path, outer):
    path = save({outer: WEIGHTS, "epoch": 3, "name": "x"}, tmp_path / "w.pth")
    assert_weights(first(path))


def test_averaged_weights_come_before_plain_ones(tmp_path):
    averaged = {name: value + 1 for name, value in WEIGHTS.items()}
    path = save({"params": WEIGHTS, "params_ema": averaged}, tmp_path / "w.pth")
    states = [state for state in read_checkpoint(path).candidates() if "head.weight" in state]
    assert len(states) == 2
    assert_weights(states[0], averaged)
    assert_weights(states[1], WEIGHTS)


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model.net.", "my_own."])
def test_prefixes_are_stripped_step_by_step(tmp_path, prefix):
    path = save({prefix + name: value for name, value in WEIGHTS.items()}, tmp_path / "w.pth")
    states = [state for state in read_checkpoint(path).candidates() if "head.weight" in state]
    assert_weights(states[0])


def test_a_part_is_not_offered_as_the_whole(tmp_path):
    state = {f"first.{n}": v for n, v in WEIGHTS.items()}
    state |= {f"second.{n}": v for n, v in WEIGHTS.items()}
    path = save(state, tmp_path / "w.pth")
    assert [set(candidate) for candidate in read_checkpoint(path).candidates()] == [set(state)]


def test_whole_training_state(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    state = {"epoch": 3, "best": torch.tensor(31.5), "optimizer": optimizer.state_dict()}
    path = save({**state, "state_dict": model.state_dict()}, tmp_path / "w.ckpt")
    candidates = list(read_checkpoint(path).candidates())
    assert [set(c) for c in candidates[:2]] == [{"best"}, {"weight", "bias"}]


def test_a_dictionary_that_contains_itself(tmp_path):
    content = {"params": WEIGHTS}
    content["self"] = content
    assert_weights(first(save(content, tmp_path / "w.pth")))


@FORMATS
def test_harmless_objects_beside_the_weights(tmp_path, zipped):
    content = {
        "args": argparse.Namespace(lr=1e-3, noise=argparse.Namespace(sigma=25)),
        "psnr": np.float64(31.5),
        "seen": collections.defaultdict(list, {"a": [1]}),
        "kind": collections.defaultdict,
        "state_dict": WEIGHTS,
    }
    assert_weights(first(save(content, tmp_path / "w.ckpt", zipped)))


@FORMATS
def test_objects_of_a_class_that_is_not_installed(tmp_path, zipped, monkeypatch):
    module = types.ModuleType("made_up.config")
    module.Config = type("Config", (), {"__module__": "made_up.config"})
    monkeypatch.setitem(sys.modules, "made_up", types.ModuleType("made_up"))
    monkeypatch.setitem(sys.modules, "made_up.config", module)
    config = module.Config()
    config.depth = 4
    path = save({"config": config, "params": WEIGHTS}, tmp_path / "w.ckpt", zipped)
    monkeypatch.undo()
    assert_weights(first(path))
    assert "made_up" not in sys.modules


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@FORMATS
@pytest.mark.parametrize("function", [os.system, os.mkdir, eval, exec, io.open, pickle.loads])
def test_a_malicious_file_runs_nothing(tmp_path, zipped, function, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argument = {
        os.system: "touch owned",
        eval: "open('owned', 'w')",
        exec: "open('owned', 'w')",
        pickle.loads: pickle.dumps(Call(os.mkdir, "owned")),
    }.get(function, "owned")
    arguments = (argument, "w") if function is io.open else (argument,)
    path = save({"x": Call(function, *arguments), "params": WEIGHTS}, tmp_path / "w.pth", zipped)
    try:
        assert_weights(first(path))
    except NetworkError as error:
        assert "wants more than tensors" in str(error)  # noqa: PT017
    assert [file.name for file in tmp_path.iterdir()] == ["w.pth"]


def test_the_attack_would_work_on_a_careless_reader(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save({"x": Call(os.mkdir, "owned")}, tmp_path / "w.pth")
    torch.load(path, weights_only=False)
    assert (tmp_path / "owned").is_dir()


def test_permissions_of_the_process_are_left_as_they_were(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    first(save({"args": argparse.Namespace(), "params": WEIGHTS}, tmp_path / "w.pth"))
    assert set(torch.serialization.get_safe_globals()) == before


def refusal(path):
    with pytest.raises(NetworkError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_missing_file(tmp_path):
    assert "no such checkpoint" in refusal(tmp_path / "absent.pth")


def test_folder(tmp_path):
    assert "is a folder" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", "is empty", id="0 bytes"),
        pytest.param(b"<!DOCTYPE html>\n<html>sign in</html>", "'<!DOCTYPE html>", id="web page"),
        pytest.param(b"weights {not json} here", "is text", id="text with a brace"),
        pytest.param("Größe: 3\n".encode() * 99, "is text", id="text"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(99), "is a picture (PNG)", id="PNG"),
        pytest.param(b"\xff\xd8\xff\xe0" + bytes(99), "is a picture (JPEG)", id="JPEG"),
        pytest.param(pickle.dumps({"a": 1}), "torch.save did not write", id="plain pickle"),
        pytest.param(bytes(257) + b"ustar" + bytes(99), "is a tar archive", id="tar"),
        pytest.param(bytes(range(129, 256)), "no format known", id="binary"),
        pytest.param(b"PK\x03\x04" + bytes(99), "truncated or damaged", id="start of a zip"),
    ],
)
def test_files_of_other_kinds(tmp_path, content, words):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    assert words in refusal(path)


def test_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("weights.txt", "1 2 3")
    assert "zip archive without a checkpoint" in refusal(tmp_path / "w.pth")


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_archive(tmp_path):
    torch.jit.script(torch.nn.Linear(3, 2)).save(str(tmp_path / "w.pt"))
    assert "is a TorchScript archive" in refusal(tmp_path / "w.pt")


@FORMATS
@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {1: torch.ones(2)}])
def test_no_named_tensors(tmp_path, zipped, content):
    assert "holds no named tensors" in refusal(save(content, tmp_path / "w.pth", zipped))


def test_a_pickled_network_object(tmp_path):
    assert "state_dict()" in refusal(save(torch.nn.Linear(3, 2), tmp_path / "w.pth"))


def test_another_pickle_protocol(tmp_path):
    torch.save(WEIGHTS, tmp_path / "w.pth", pickle_protocol=4)
    assert "pickle protocol 4" in refusal(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "content",
    [
        b"garbage",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 8) + b'{"a":3} ',
        struct.pack("<Q", 100) + b'{"a": {"dtype": "F32"',
    ],
)
def test_bad_safetensors_header(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    assert "truncated or damaged" in refusal(tmp_path / "w.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    content = {"args": argparse.Namespace(a=1), "params": WEIGHTS}
    save(content, folder / "zip.pth")
    save(content, folder / "legacy.pth", zipped=False)
    save_file(WEIGHTS, folder / "it.safetensors")
    return folder


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.sampled_from(["zip.pth", "legacy.pth", "it.safetensors"]), data=st.data())
def test_truncated_anywhere(saved, tmp_path, name, data):
    content = (saved / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert refusal(path)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.sampled_from(["zip.pth", "legacy.pth", "it.safetensors"]), data=st.data())
def test_a_flipped_byte_is_read_or_refused(saved, tmp_path, name, data):
    content = bytearray((saved / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path / name
    path.write_bytes(content)
    try:
        assert all(isinstance(state, dict) for state in read_checkpoint(path).candidates())
    except NetworkError as error:
        assert str(error).startswith(str(path))  # noqa: PT017


def test_flipped_bits_in_the_weights_are_noticed(saved, tmp_path):
    content = (saved / "zip.pth").read_bytes()
    numbers = WEIGHTS["head.weight"].numpy().tobytes()
    assert numbers in content
    path = tmp_path / "w.pth"
    path.write_bytes(content.replace(numbers, numbers[:-1] + b"\x01"))
    assert "checksum" in refusal(path)
