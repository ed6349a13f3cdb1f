"""The layouts of data sets, as their owners lay them out: one entry of `LAYOUTS` each.

The functions that the entries name find the files; none reads a picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fullres.data import deblurring, sidd, weather
from fullres.data.folders import (
    clips_fit,
    find_clean,
    find_clips,
    find_pairs,
    find_resolutions,
    find_set,
    holds_clean,
    pairs_fit,
    plain,
    resolutions,
)
from fullres.data.pairing import Found, Request


@dataclass(frozen=True)
class Layout:
    """One way to lay out a data set."""

    name: str
    title: str | None
    """Name of the data set; None: that of its folder."""
    task: str
    protocol: str
    """The usual protocol of evaluation."""
    expects: str
    """What has to be in the folder, in one line."""
    fits: Callable[[Path], bool]
    """Whether a folder looks like it; the first of `LAYOUTS` that does is opened."""
    find: Callable[[Request], Found]


def _set_fits(root: Path, names: tuple[str, ...]) -> bool:
    named = plain(root.resolve().name) in names
    return named and (holds_clean(root) or bool(resolutions(root)))


def _set(title: str, task: str, protocol: str, *others: str) -> Layout:
    """A well-known set of clean pictures, known by the name of its folder."""
    name = plain(title)
    expects = f"a folder of clean pictures (auto: named {title})"
    fits = partial(_set_fits, names=(name, *others))
    return Layout(name, title, task, protocol, expects, fits, find_set)


LAYOUTS = (
    Layout(
        "gopro",
        "GoPro",
        "deblur",
        "gopro",
        "{train,test}/GOPR*/{blur,sharp}/*.png",
        partial(deblurring.gopro_fits, degraded="blur"),
        partial(deblurring.find_gopro, degraded="blur"),
    ),
    Layout(
        "gopro-gamma",
        "GoPro (gamma)",
        "deblur",
        "gopro",
        "{train,test}/GOPR*/{blur_gamma,sharp}/*.png",
        partial(deblurring.gopro_fits, degraded="blur_gamma"),
        partial(deblurring.find_gopro, degraded="blur_gamma"),
    ),
    Layout(
        "hide",
        "HIDE",
        "deblur",
        "hide",
        "train/*.png, test/{test-close-ups,test-long-shot}/*.png and GT/*.png",
        deblurring.hide_fits,
        deblurring.find_hide,
    ),
    Layout(
        "reds",
        "REDS",
        "deblur",
        "reds",
        "{train,val}/{train,val}_{blur,sharp}/000/00000000.png; test is val, whose targets are out",
        partial(deblurring.reds_fits, kind="blur"),
        partial(deblurring.find_reds, kind="blur"),
    ),
    Layout(
        "reds-jpeg",
        "REDS (JPEG)",
        "deblur",
        "reds",
        "{train,val}/{train,val}_{blur_jpeg,sharp}/000/*; test is every tenth frame of val",
        partial(deblurring.reds_fits, kind="blur_jpeg"),
        partial(deblurring.find_reds, kind="blur_jpeg", tenth=True),
    ),
    Layout(
        "reds-sr",
        "REDS (x4)",
        "super-resolution",
        "sr",
        "{train,val}/{train,val}_sharp_bicubic/X4/000/*.png and {train,val}_sharp; test is val",
        partial(deblurring.reds_fits, kind="sharp_bicubic/X4"),
        partial(deblurring.find_reds, kind="sharp_bicubic/X4", scale=4),
    ),
    Layout(
        "dvd",
        "DVD",
        "deblur",
        "rgb",
        "quantitative_datasets/*/{input,GT}/*.jpg, or the same in train and test",
        deblurring.dvd_fits,
        deblurring.find_dvd,
    ),
    Layout(
        "realblur-j",
        "RealBlur-J",
        "deblur",
        "realblur",
        "RealBlur_J_{train,test}_list.txt and the pictures that it names",
        partial(deblurring.realblur_fits, camera="J"),
        partial(deblurring.find_realblur, camera="J"),
    ),
    Layout(
        "realblur-r",
        "RealBlur-R",
        "deblur",
        "realblur",
        "RealBlur_R_{train,test}_list.txt and the pictures that it names",
        partial(deblurring.realblur_fits, camera="R"),
        partial(deblurring.find_realblur, camera="R"),
    ),
    Layout(
        "dpdd",
        "DPDD",
        "defocus",
        "dpdd",
        "{train,val,test}_c/{source,target}/*.png",
        partial(deblurring.dpdd_fits, views="c"),
        deblurring.find_dpdd,
    ),
    Layout(
        "dpdd-dual",
        "DPDD (dual-pixel)",
        "defocus",
        "dpdd",
        "{train,val,test}_{l,r}/source/*.png and {train,val,test}_c/target/*.png",
        partial(deblurring.dpdd_fits, views="lr"),
        deblurring.find_dpdd_dual,
    ),
    Layout(
        "sidd",
        "SIDD",
        "denoise",
        "sidd",
        "Data/0001_*/*_{NOISY,GT}_SRGB_*.PNG to train; Validation{Noisy,Gt}BlocksSrgb.mat",
        sidd.sidd_fits,
        sidd.find_sidd,
    ),
    Layout(
        "spa",
        "SPA-Data",
        "derain",
        "derain",
        "real_test_1000.txt (real_world.txt to train) and the pictures that it names",
        weather.spa_fits,
        weather.find_spa,
    ),
    Layout(
        "rain13k",
        "Rain13k",
        "derain",
        "derain",
        "train/{input,target} and test/{" + ",".join(weather.RAIN_TESTS) + "}/{input,target}",
        weather.rain13k_fits,
        weather.find_rain13k,
    ),
    Layout(
        "reside",
        None,
        "dehaze",
        "dehaze",
        "{indoor,outdoor}/{hazy,gt}, hazy/1400_1.png for gt/1400.png; {ITS,OTS}/{hazy,clear}",
        weather.reside_fits,
        weather.find_reside,
    ),
    _set("Set5", "super-resolution", "sr"),
    _set("Set14", "super-resolution", "sr"),
    _set("Manga109", "super-resolution", "sr"),
    _set("BSD100", "super-resolution", "sr", "b100", "bsds100"),
    _set("Urban100", "denoise", "colour-denoising"),
    _set("CBSD68", "denoise", "colour-denoising"),
    _set("Kodak24", "denoise", "colour-denoising", "kodak"),
    _set("McMaster", "denoise", "colour-denoising", "mcm"),
    _set("Set12", "denoise", "grey-denoising"),
    _set("BSD68", "denoise", "grey-denoising"),
    _set("LIVE1", "jpeg", "jpeg"),
    _set("classic5", "jpeg", "jpeg"),
    Layout(
        "sr",
        None,
        "super-resolution",
        "sr",
        "image_SRF_{2,3,4}/*_{HR,LR}.png, or HR/*.png and LR_bicubic/X{2,3,4}/*x{2,3,4}.png",
        lambda root: bool(resolutions(root)),
        find_resolutions,
    ),
    Layout(
        "clips",
        None,
        "restoration",
        "rgb",
        "CLIP/{input,blur,noisy,...} and CLIP/{target,gt,sharp,...}, or the same in {train,test}",
        clips_fit,
        find_clips,
    ),
    Layout(
        "pairs",
        None,
        "restoration",
        "rgb",
        "{input,blur,noisy,hazy,rain,...} and {target,gt,sharp,clean,...}, or in {train,test}",
        pairs_fit,
        find_pairs,
    ),
    Layout(
        "clean",
        None,
        "restoration",
        "rgb",
        "a folder of clean pictures",
        holds_clean,
        find_clean,
    ),
)
"""From the most to the least specific: the first that fits a folder is taken."""
