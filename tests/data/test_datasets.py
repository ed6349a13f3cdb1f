from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from hypothesis import given
from hypothesis import strategies as st

from fullres.data.datasets import Block, Clip, Dataset, layouts, open_dataset, read_block
from fullres.data.layouts import LAYOUTS
from fullres.data.pairing import natural
from fullres.errors import FullresError
from fullres.metrics import PROTOCOLS

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def plant(root: Path, *names: str) -> Path:
    """Empty files; braces in a name stand for alternatives, as in a shell."""
    for name in names:
        braces = re.search(r"\{([^}]*)\}", name)
        if braces:
            start, stop = braces.span()
            plant(root, *(name[:start] + part + name[stop:] for part in braces[1].split(",")))
            continue
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def found(root: Path, dataset: Dataset) -> list[tuple[str, ...]]:
    """Names and relative paths of all pairs."""
    return [
        (
            pair.name,
            *(
                path.relative_to(root).as_posix()
                for path in (pair.degraded, pair.target, pair.right)
                if path is not None
            ),
        )
        for pair in dataset.pairs
    ]


def facts(dataset: Dataset) -> tuple[str, str, str, str, int]:
    return dataset.name, dataset.layout, dataset.task, dataset.protocol, dataset.scale


GOPRO = (
    "train/GOPR0372_07_00/{blur,blur_gamma,sharp}/000047.png",
    "test/GOPR0384_11_{10,9}/{blur,blur_gamma,sharp}/000{001,002}.png",
)


def test_gopro(tmp_path):
    root = plant(tmp_path / "GOPRO_Large", *GOPRO)
    dataset = open_dataset(root)
    assert facts(dataset) == ("GoPro", "gopro", "deblur", "gopro", 1)
    places = [f"GOPR0384_11_{scene}" for scene in (9, 10)]
    assert found(root, dataset) == [
        (f"{place}/{frame}", f"test/{place}/blur/{frame}.png", f"test/{place}/sharp/{frame}.png")
        for place in places
        for frame in ("000001", "000002")
    ]
    scene = root / "test" / places[0]
    assert dataset.clips[0] == Clip(
        places[0],
        (scene / "blur/000001.png", scene / "blur/000002.png"),
        (scene / "sharp/000001.png", scene / "sharp/000002.png"),
    )
    assert [clip.name for clip in dataset.clips] == places
    assert found(root, open_dataset(root, split="train")) == [
        (
            "GOPR0372_07_00/000047",
            "train/GOPR0372_07_00/blur/000047.png",
            "train/GOPR0372_07_00/sharp/000047.png",
        )
    ]
    assert open_dataset(root / "test").pairs == dataset.pairs


def test_gopro_with_gamma(tmp_path):
    root = plant(tmp_path, *GOPRO)
    dataset = open_dataset(root, "gopro-gamma", "train")
    assert found(root, dataset)[0][1] == "train/GOPR0372_07_00/blur_gamma/000047.png"


def test_hide(tmp_path):
    root = plant(
        tmp_path,
        "train/{1,2}fromGOPR1.png",
        "test/test-close-ups/3fromGOPR1.png",
        "test/test-long-shot/20fromGOPR1.png",
        "GT/{1,2,3,20}fromGOPR1.png",
        "train.txt",
        "test.txt",
    )
    dataset = open_dataset(root)
    assert facts(dataset) == ("HIDE", "hide", "deblur", "hide", 1)
    assert found(root, dataset) == [
        ("3fromGOPR1", "test/test-close-ups/3fromGOPR1.png", "GT/3fromGOPR1.png"),
        ("20fromGOPR1", "test/test-long-shot/20fromGOPR1.png", "GT/20fromGOPR1.png"),
    ]
    assert [pair.name for pair in open_dataset(root, split="train").pairs] == [
        "1fromGOPR1",
        "2fromGOPR1",
    ]


def test_reds(tmp_path):
    root = plant(
        tmp_path,
        "val/val_{blur,sharp}/00{0,1}/000000{08,09,10,19}.png",
        "val/val_blur_jpeg/00{0,1}/000000{08,09,10,19}.jpg",
        "val/val_sharp_bicubic/X4/00{0,1}/000000{08,09,10,19}.png",
        "train/train_{blur,sharp}/000/00000000.png",
    )
    dataset = open_dataset(root)
    assert facts(dataset) == ("REDS", "reds", "deblur", "reds", 1)
    assert found(root, dataset)[0] == (
        "000/00000008",
        "val/val_blur/000/00000008.png",
        "val/val_sharp/000/00000008.png",
    )
    assert [(clip.name, len(clip.degraded)) for clip in dataset.clips] == [("000", 4), ("001", 4)]
    tenth = open_dataset(root, "reds-jpeg")
    assert [pair.name for pair in tenth.pairs] == [
        f"{clip}/000000{frame}" for clip in ("000", "001") for frame in ("09", "19")
    ]
    assert tenth.clips == ()
    assert tenth.pairs[0].degraded == root / "val/val_blur_jpeg/000/00000009.jpg"
    assert len(open_dataset(root, "reds-jpeg", "val").pairs) == 8
    low = open_dataset(root, "reds-sr")
    assert facts(low) == ("REDS (x4)", "reds-sr", "super-resolution", "sr", 4)
    assert low.clips[1].degraded[0] == root / "val/val_sharp_bicubic/X4/001/00000008.png"
    assert len(open_dataset(root, split="train").pairs) == 1


def test_realblur(tmp_path):
    folder = "RealBlur-J_ECC_IMCORR_centroid_itensity_ref/scene{:03}"
    root = plant(tmp_path, *(f"{folder.format(s)}/{{gt/gt,blur/blur}}_1.png" for s in (1, 4, 10)))
    for split, scenes in (("train", (1,)), ("test", (10, 4))):
        lines = [
            f"{folder.format(s)}/gt/gt_1.png {folder.format(s)}/blur/blur_1.png" for s in scenes
        ]
        (root / f"RealBlur_J_{split}_list.txt").write_text("\n".join(lines) + "\n")
    dataset = open_dataset(root)
    assert facts(dataset) == ("RealBlur-J", "realblur-j", "deblur", "realblur", 1)
    assert found(root, dataset) == [
        (
            f"scene{s:03}/1",
            f"{folder.format(s)}/blur/blur_1.png",
            f"{folder.format(s)}/gt/gt_1.png",
        )
        for s in (4, 10)
    ]
    assert [pair.name for pair in open_dataset(root, split="train").pairs] == ["scene001/1"]
    with pytest.raises(FullresError, match=r"expected RealBlur_R_test_list\.txt; found RealBlur-J"):
        open_dataset(root, "realblur-r")
    (root / folder.format(4) / "blur" / "blur_1.png").unlink()
    with pytest.raises(FullresError, match=r"blur_1\.png: no such file, named in line 2 of Real"):
        open_dataset(root)


def test_realblur_with_a_broken_list(tmp_path):
    (tmp_path / "RealBlur_R_test_list.txt").write_text("a.png\n")
    with pytest.raises(FullresError, match=r"line 1 should name two pictures, not: a\.png"):
        open_dataset(tmp_path)


DPDD = (
    "dd_dp_dataset_png/test_c/source/1P0A16{93,95}.png",
    "dd_dp_dataset_png/test_c/target/1P0A16{94,96}.png",
    "dd_dp_dataset_png/test_l/source/1P0A16{93,95}_L.png",
    "dd_dp_dataset_png/test_r/source/1P0A16{93,95}_R.png",
)


def test_dpdd(tmp_path):
    root = plant(tmp_path, *DPDD)
    base = "dd_dp_dataset_png/test"
    dataset = open_dataset(root)
    assert facts(dataset) == ("DPDD", "dpdd", "defocus", "dpdd", 1)
    assert found(root, dataset) == [
        ("1P0A1693", f"{base}_c/source/1P0A1693.png", f"{base}_c/target/1P0A1694.png"),
        ("1P0A1695", f"{base}_c/source/1P0A1695.png", f"{base}_c/target/1P0A1696.png"),
    ]
    dual = open_dataset(root / "dd_dp_dataset_png", "dpdd-dual")
    assert found(root, dual)[1] == (
        "1P0A1695",
        f"{base}_l/source/1P0A1695_L.png",
        f"{base}_c/target/1P0A1696.png",
        f"{base}_r/source/1P0A1695_R.png",
    )
    with pytest.raises(FullresError, match=r"expected val_c/source and val_c/target; found test"):
        open_dataset(root, split="val")
    (root / f"{base}_c/target/1P0A1694.png").unlink()
    with pytest.raises(FullresError, match=r"1 pictures, but .*source has 2"):
        open_dataset(root)


def test_dpdd_without_the_right_view(tmp_path):
    root = plant(tmp_path, *DPDD)
    (root / "dd_dp_dataset_png/test_r/source/1P0A1693_R.png").unlink()
    with pytest.raises(FullresError, match=r"no partner in .*test_r.* for 1P0A1693_L\.png"):
        open_dataset(root, "dpdd-dual")


def test_sidd_scenes(tmp_path):
    scene = "Data/0001_001_S6_00100_00060_3200_L"
    root = plant(tmp_path, f"{scene}/0001_{{NOISY,GT}}_SRGB_01{{0,1}}.PNG")
    dataset = open_dataset(root, split="train")
    assert facts(dataset) == ("SIDD", "sidd", "denoise", "sidd", 1)
    assert found(root, dataset) == [
        (
            f"0001_001_S6_00100_00060_3200_L/{shot}",
            f"{scene}/0001_NOISY_SRGB_{shot}.PNG",
            f"{scene}/0001_GT_SRGB_{shot}.PNG",
        )
        for shot in ("010", "011")
    ]
    with pytest.raises(FullresError, match=r"expected ValidationNoisyBlocksSrgb\.mat and .* Data/"):
        open_dataset(root)


def test_sidd_blocks(tmp_path):
    blocks = np.random.default_rng(0).integers(0, 256, (2, 2, 2, 3, 4, 3), dtype=np.uint8)
    names = ("ValidationNoisyBlocksSrgb", "ValidationGtBlocksSrgb")
    for name, values in zip(names, blocks, strict=True):
        scipy.io.savemat(tmp_path / f"{name}.mat", {name: values})
    dataset = open_dataset(tmp_path)
    assert [pair.name for pair in dataset.pairs] == ["00/00", "00/01", "01/00", "01/01"]
    pair = dataset.pairs[2]
    assert pair.degraded == tmp_path / f"{names[0]}.mat"
    assert (pair.degraded_key, pair.target_key) == (Block(names[0], 1, 0), Block(names[1], 1, 0))
    np.testing.assert_array_equal(read_block(pair.degraded, pair.degraded_key), blocks[0, 1, 0])
    np.testing.assert_array_equal(read_block(pair.target, pair.target_key), blocks[1, 1, 0])


def test_sidd_blocks_that_do_not_fit(tmp_path):
    names = ("ValidationNoisyBlocksSrgb", "ValidationGtBlocksSrgb")
    for count, name in enumerate(names, start=1):
        values = np.zeros((count, 1, 2, 2, 3), np.uint8)
        scipy.io.savemat(tmp_path / f"{name}.mat", {name: values})
    with pytest.raises(FullresError, match=r"holds \(2, 1\) pictures, but .* holds \(1, 1\)"):
        open_dataset(tmp_path)
    scipy.io.savemat(tmp_path / f"{names[0]}.mat", {"other": np.zeros(3)})
    with pytest.raises(FullresError, match=rf"expected an array {names[0]} .* found other \(1,"):
        open_dataset(tmp_path)
    (tmp_path / f"{names[0]}.mat").write_bytes(b"none")
    with pytest.raises(FullresError, match="is no readable MATLAB file"):
        open_dataset(tmp_path)


def test_sidd_blocks_without_scipy(tmp_path, monkeypatch):
    root = plant(tmp_path, "Validation{Noisy,Gt}BlocksSrgb.mat")
    monkeypatch.setitem(sys.modules, "scipy.io.matlab", None)
    with pytest.raises(FullresError, match=r"Srgb\.mat: reading it takes SciPy"):
        open_dataset(root)


def test_dvd(tmp_path):
    root = plant(
        tmp_path,
        "quantitative_datasets/{IMG_0003,IMG_0030,IMG_0001}/{input,GT}/0000{0,1}.jpg",
    )
    dataset = open_dataset(root)
    assert facts(dataset) == ("DVD", "dvd", "deblur", "rgb", 1)
    assert [clip.name for clip in dataset.clips] == ["IMG_0003", "IMG_0030"]
    video = root / "quantitative_datasets" / "IMG_0003"
    assert dataset.clips[0].degraded == (video / "input/00000.jpg", video / "input/00001.jpg")
    assert dataset.clips[0].target == (video / "GT/00000.jpg", video / "GT/00001.jpg")
    train = open_dataset(root / "quantitative_datasets", split="train")
    assert [pair.name for pair in train.pairs] == ["IMG_0001/00000", "IMG_0001/00001"]
    with pytest.raises(FullresError, match="for the split val; found IMG_0001/"):
        open_dataset(root, split="val")


@pytest.mark.parametrize("name", ["SRF", "EDSR"])
def test_two_resolutions(tmp_path, name):
    forms = {
        "SRF": ("image_SRF_{2,3}/img_00{1,2}_SRF_2_{HR,LR,bicubic}.png",),
        "EDSR": ("HR/img_00{1,2}.png", "LR_bicubic/X{2,3}/img_00{1,2}x2.png"),
    }
    root = plant(tmp_path / "Set5", *forms[name])
    dataset = open_dataset(root, scale=2)
    assert facts(dataset) == ("Set5", "set5", "super-resolution", "sr", 2)
    expected = {
        "SRF": (
            "img_001_SRF_2",
            "image_SRF_2/img_001_SRF_2_LR.png",
            "image_SRF_2/img_001_SRF_2_HR.png",
        ),
        "EDSR": ("img_001", "LR_bicubic/X2/img_001x2.png", "HR/img_001.png"),
    }
    assert found(root, dataset)[0] == expected[name]
    assert len(dataset.pairs) == 2
    with pytest.raises(FullresError, match="holds the scales 2, 3; choose one with scale=N"):
        open_dataset(root)
    with pytest.raises(FullresError, match="has no scale 4; choose among 2, 3"):
        open_dataset(root, scale=4)


def test_two_resolutions_of_one_scale_need_not_name_it(tmp_path):
    root = plant(tmp_path / "own", "HR/baby.png", "LR_bicubic/X4/babyx4.png")
    assert facts(open_dataset(root)) == ("own", "sr", "super-resolution", "sr", 4)
    folder = plant(tmp_path / "image_SRF_3", "a_{HR,LR}.png")
    assert facts(open_dataset(folder))[1:] == ("sr", "super-resolution", "sr", 3)


@pytest.mark.parametrize(
    ("folder", "layout", "task", "protocol"),
    [
        ("Urban100", "urban100", "denoise", "colour-denoising"),
        ("CBSD68", "cbsd68", "denoise", "colour-denoising"),
        ("kodak", "kodak24", "denoise", "colour-denoising"),
        ("McM", "mcmaster", "denoise", "colour-denoising"),
        ("Set12", "set12", "denoise", "grey-denoising"),
        ("BSD68", "bsd68", "denoise", "grey-denoising"),
        ("LIVE1", "live1", "jpeg", "jpeg"),
        ("classic5", "classic5", "jpeg", "jpeg"),
        ("Set5", "set5", "super-resolution", "sr"),
        ("Set14", "set14", "super-resolution", "sr"),
        ("Manga109", "manga109", "super-resolution", "sr"),
        ("BSDS100", "bsd100", "super-resolution", "sr"),
        ("holidays", "clean", "restoration", "rgb"),
    ],
)
def test_clean_sets(tmp_path, folder, layout, task, protocol):
    root = plant(tmp_path / folder, "{10,2}.png", "b.bmp", ".hidden.png", "notes.txt")
    dataset = open_dataset(root)
    assert facts(dataset)[1:] == (layout, task, protocol, 1)
    assert found(root, dataset) == [("2", "2.png"), ("10", "10.png"), ("b", "b.bmp")]
    assert all(pair.degraded is None for pair in dataset.pairs)
    assert facts(open_dataset(root, scale=3))[2:] == ("super-resolution", "sr", 3)


def test_clean_pictures_in_a_folder_of_their_own(tmp_path):
    root = plant(tmp_path / "LIVE1", "refimgs/bikes.bmp", "info.txt")
    assert found(root, open_dataset(root)) == [("bikes", "refimgs/bikes.bmp")]


def test_clean_pictures_further_down_are_left_out_and_named(tmp_path, caplog):
    root = plant(tmp_path / "photos", "a.png", "2024/{b,c}.jpg", "2025/may/d.tif", "2025/notes.txt")
    assert [pair.name for pair in open_dataset(root, "clean").pairs] == ["a"]
    (line,) = caplog.messages
    assert "photos: left out" in line
    assert "2024/b.jpg, 2024/c.jpg, 2025/may/d.tif;" in line
    caplog.clear()
    assert len(open_dataset(root / "2024", "clean").pairs) == 2
    assert not caplog.messages


def test_clean_pictures_of_one_name(tmp_path):
    root = plant(tmp_path, "a.{png,jpg}")
    with pytest.raises(FullresError, match=r"a\.\w+ and .*a\.\w+ have the same name"):
        open_dataset(root)


def test_rain13k(tmp_path):
    root = plant(
        tmp_path, "train/{input,target}/1.jpg", "test/{Rain100H,Test2800}/{input,target}/{1,2}.png"
    )
    dataset = open_dataset(root)
    assert facts(dataset) == ("Rain13k", "rain13k", "derain", "derain", 1)
    assert found(root, dataset)[1:3] == [
        ("Rain100H/2", "test/Rain100H/input/2.png", "test/Rain100H/target/2.png"),
        ("Test2800/1", "test/Test2800/input/1.png", "test/Test2800/target/1.png"),
    ]
    assert found(root, open_dataset(root, split="train")) == [
        ("1", "train/input/1.jpg", "train/target/1.jpg")
    ]
    one = open_dataset(root / "test" / "Rain100H")
    assert facts(one) == ("Rain100H", "rain13k", "derain", "derain", 1)
    assert [pair.name for pair in one.pairs] == ["1", "2"]
    with pytest.raises(FullresError, match="for the split val; found test/, train/"):
        open_dataset(root, split="val")


def test_spa(tmp_path):
    root = plant(tmp_path, "real_test_1000/rain/00{0,1}.png", "real_test_1000/gt/00{0,1}gt.png")
    expected = [
        (f"00{n}", f"real_test_1000/rain/00{n}.png", f"real_test_1000/gt/00{n}gt.png")
        for n in range(2)
    ]
    assert [pair[1:] for pair in found(root, open_dataset(root))] == [e[1:] for e in expected]
    (root / "real_test_1000.txt").write_text(
        "".join(f"/{degraded} /{target}\n" for _, degraded, target in expected)
    )
    dataset = open_dataset(root)
    assert facts(dataset) == ("SPA-Data", "spa", "derain", "derain", 1)
    assert found(root, dataset) == expected


def test_sots(tmp_path):
    root = plant(
        tmp_path / "SOTS",
        "indoor/hazy/140{0,1}_{1,2,10}.png",
        "indoor/gt/140{0,1}.png",
        "outdoor/hazy/0001_0.8_0.2.jpg",
        "outdoor/clear/000{1,2}.png",
    )
    dataset = open_dataset(root)
    assert facts(dataset) == ("SOTS", "reside", "dehaze", "dehaze", 1)
    assert found(root, dataset) == [
        (f"indoor/{n}_{k}", f"indoor/hazy/{n}_{k}.png", f"indoor/gt/{n}.png")
        for n in (1400, 1401)
        for k in (1, 2, 10)
    ] + [("outdoor/0001_0.8_0.2", "outdoor/hazy/0001_0.8_0.2.jpg", "outdoor/clear/0001.png")]
    inside = open_dataset(root / "indoor")
    assert [pair.name for pair in inside.pairs][:3] == ["1400_1", "1400_2", "1400_10"]
    assert open_dataset(tmp_path).pairs == dataset.pairs
    (root / "indoor/gt/1401.png").unlink()
    with pytest.raises(FullresError, match=r"no partner in .*gt for 1401_1\.png, 1401_2\.png"):
        open_dataset(root)


def test_reside_to_train(tmp_path):
    root = plant(tmp_path, "ITS/hazy/1_{1,2}_0.9.png", "ITS/clear/1.png")
    assert [pair.name for pair in open_dataset(root, split="train").pairs] == [
        "ITS/1_1_0.9",
        "ITS/1_2_0.9",
    ]
    with pytest.raises(FullresError, match=r"expected indoor or outdoor .*; found ITS/"):
        open_dataset(root)


def test_clips(tmp_path):
    root = plant(tmp_path, "train/a/{blur,sharp}/1.png", "test/b{2,10}/{blur,sharp}/{2,10}.png")
    dataset = open_dataset(root)
    assert facts(dataset)[1:] == ("clips", "deblur", "rgb", 1)
    assert [clip.name for clip in dataset.clips] == ["b2", "b10"]
    assert dataset.clips[0].target == (root / "test/b2/sharp/2.png", root / "test/b2/sharp/10.png")
    assert [pair.name for pair in open_dataset(root, split="train").pairs] == ["a/1"]


@pytest.mark.parametrize(
    ("degraded", "target", "task"),
    [
        ("input", "target", "restoration"),
        ("blur", "sharp", "deblur"),
        ("Noisy", "GT", "denoise"),
        ("hazy", "clear", "dehaze"),
        ("rain", "norain", "derain"),
        ("lq", "hq", "restoration"),
    ],
)
def test_pairs(tmp_path, degraded, target, task):
    root = plant(tmp_path / "mine", f"{degraded}/a/{{2,10}}.jpg", f"{target}/a/{{2,10}}.png")
    dataset = open_dataset(root)
    assert facts(dataset) == ("mine", "pairs", task, "rgb", 1)
    assert found(root, dataset) == [
        ("a/2", f"{degraded}/a/2.jpg", f"{target}/a/2.png"),
        ("a/10", f"{degraded}/a/10.jpg", f"{target}/a/10.png"),
    ]
    assert open_dataset(root, "pairs", "train").pairs == dataset.pairs


def test_pairs_of_a_split(tmp_path):
    root = plant(tmp_path, "train/{input,gt}/1.png", "test/{input,gt}/2.png")
    assert found(root, open_dataset(root)) == [("2", "test/input/2.png", "test/gt/2.png")]
    with pytest.raises(FullresError, match="for the split val; found test/, train/"):
        open_dataset(root, split="val")


@pytest.mark.parametrize(
    ("degraded", "target"),
    [
        ("babyx2.png", "baby.png"),
        ("norain-1x2.png", "norain-1.png"),
        ("rain-1.png", "norain-1.png"),
        ("7_blur.png", "7.png"),
        ("7_blurry.png", "7_sharp.jpg"),
        ("01_outdoor_hazy.jpg", "01_outdoor_GT.jpg"),
        ("blur_3.png", "gt_3.png"),
        ("000.png", "000gt.png"),
    ],
)
def test_pairs_whose_names_differ_by_a_word(tmp_path, degraded, target):
    root = plant(tmp_path, f"input/{degraded}", f"gt/{target}")
    assert found(root, open_dataset(root)) == [
        (Path(target).stem, f"input/{degraded}", f"gt/{target}")
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("input/{a,b}.png", "gt/a.png"), r"input: no partner in .*gt for b\.png"),
        (("input/a.png", "gt/{a,b,c}.png"), r"gt: no partner in .*input for b\.png, c\.png"),
        (("input/a.png", "gt/rainbow.png"), r"no partner in .*gt for a\.png"),
        (("input/a{x2,x4}.png", "gt/a.png"), r"ax2\.png, .*ax4\.png could each be its partner"),
        (("input/a.png", "gt/a.{png,jpg}"), r"a\.\w+, .*a\.\w+ could each be its partner"),
        (("input/a.png", "{gt,clean}/a.png"), "clean, gt could each be meant"),
        (("input/a.png", "gt/notes.txt"), r"gt: expected pictures; found notes\.txt"),
    ],
)
def test_pairs_that_do_not_fit(tmp_path, names, message):
    with pytest.raises(FullresError, match=message):
        open_dataset(plant(tmp_path, *names))


def test_low_resolutions_need_a_scale(tmp_path):
    root = plant(tmp_path, "LR/a.png", "HR/a.png")
    with pytest.raises(FullresError, match="name the scale of these low resolutions"):
        open_dataset(root, "pairs")
    assert facts(open_dataset(root, "pairs", scale=3))[1:] == ("pairs", "super-resolution", "sr", 3)
    root = plant(tmp_path / "named", "LR/ax4.png", "HR/a.png")
    assert open_dataset(root, "pairs").scale == 4


def test_two_given_folders(tmp_path):
    plant(tmp_path, "phone/1_blur.png", "tripod/1.png")
    dataset = open_dataset(tmp_path / "phone", target_folder=tmp_path / "tripod")
    assert facts(dataset)[1:] == ("pairs", "restoration", "rgb", 1)
    assert found(tmp_path, dataset) == [("1", "phone/1_blur.png", "tripod/1.png")]
    with pytest.raises(FullresError, match="layout=gopro: knows where its targets are"):
        open_dataset(tmp_path / "phone", "gopro", target_folder=tmp_path / "tripod")
    with pytest.raises(FullresError, match="nowhere: expected pictures; found no such folder"):
        open_dataset(tmp_path / "phone", target_folder=tmp_path / "nowhere")


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_layout_says_what_it_expected_and_found(tmp_path, layout, split):
    root = plant(tmp_path, "stray/notes.txt", "report.pdf")
    with pytest.raises(FullresError) as caught:
        open_dataset(root, layout, split)
    message = str(caught.value)
    assert message.startswith(f"{root}: expected ")
    assert "found stray/, report.pdf" in message
    assert layouts()[layout] in message
    assert "\n" not in message


def test_nothing_fits(tmp_path):
    root = plant(tmp_path, "stray/notes.txt", "report.pdf")
    with pytest.raises(FullresError, match=r"fits no layout.*found stray/, report\.pdf; open"):
        open_dataset(root)


def test_wrong_arguments(tmp_path):
    root = plant(tmp_path, "a.png")
    with pytest.raises(FullresError, match="nowhere: no such folder"):
        open_dataset(root / "nowhere")
    with pytest.raises(FullresError, match="layout=gopr: choose auto or one of gopro, gopro-gamma"):
        open_dataset(root, "gopr")
    with pytest.raises(FullresError, match="split=dev: choose one of train, val, test"):
        open_dataset(root, split="dev")
    gopro = plant(root / "GOPRO_Large", *GOPRO)
    with pytest.raises(FullresError, match="its scale is 1, not 2"):
        open_dataset(gopro, scale=2)


def test_layouts_have_one_name_and_one_line_each():
    lines = layouts()
    assert len(lines) == len(LAYOUTS)
    assert all(line and "\n" not in line for line in lines.values())
    assert {layout.protocol for layout in LAYOUTS} <= PROTOCOLS.keys()


@given(st.lists(st.integers(0, 10**6), unique=True))
def test_numbers_sort_by_value(numbers):
    assert sorted((f"img{n}.png" for n in numbers), key=natural) == [
        f"img{n}.png" for n in sorted(numbers)
    ]


@given(st.lists(st.text(), unique=True), st.randoms())
def test_any_names_have_one_order(names, random):
    shuffled = random.sample(names, len(names))
    assert sorted(shuffled, key=natural) == sorted(names, key=natural)


@pytest.mark.parametrize(
    ("folder", "protocol"),
    [
        ("urban100", "colour-denoising"),
        ("mcmaster", "colour-denoising"),
        ("set12", "grey-denoising"),
        ("classic5", "jpeg"),
    ],
)
def test_real_folders(folder, protocol):
    root = SHARED / folder
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    dataset = open_dataset(root)
    assert (dataset.layout, dataset.protocol) == (folder, protocol)
    assert {pair.target for pair in dataset.pairs} == {
        path for path in root.iterdir() if not path.name.startswith(".")
    }
    numbers = [[int(n) for n in re.findall(r"\d+", pair.name)] for pair in dataset.pairs]
    assert numbers == sorted(numbers)
