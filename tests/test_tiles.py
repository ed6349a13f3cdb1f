"""The tile plan partitions the picture, tiles hide their seams, memory bounds them."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import fullres as fr
from fullres.memory import _control_group_rooms, free_memory, peak_memory
from fullres.tiles import (
    Grid,
    choose_tiles,
    halo_for,
    largest_run,
    paste,
    run_tiles,
    tiles_within,
)

SIDES = st.integers(1, 700)


@st.composite
def grids(draw):
    multiple = draw(st.sampled_from([1, 2, 8, 16, 24]))
    window = draw(st.none() | st.tuples(st.integers(1, 200), st.integers(1, 200)))
    return Grid((draw(SIDES), draw(SIDES)), halo_for(window, multiple), multiple)


def kept_count(grid, tiles):
    count = torch.zeros(grid.size, dtype=torch.int64)
    for tile in tiles:
        count[tile.rows.start : tile.rows.stop, tile.columns.start : tile.columns.stop] += 1
    return count


def check_tiles(grid, tiles):
    assert (kept_count(grid, tiles) == 1).all()
    assert sum(tile.pixels for tile in tiles) == math.prod(grid.size)
    for tile in tiles:
        for span, length, halo in zip((tile.rows, tile.columns), grid.size, grid.halo, strict=True):
            assert 0 <= span.run_start <= span.start < span.stop <= span.run_stop <= length
            assert span.start % grid.multiple == span.run_start % grid.multiple == 0
            assert span.run_stop == length or (span.run_stop - span.run_start) % grid.multiple == 0
            assert span.start - span.run_start >= min(halo, span.start)
            assert span.run_stop - span.stop >= min(halo, length - span.stop)
            # at a border as anywhere, a window of twice the halo fits
            assert span.run >= min(2 * halo, length)


@given(grids(), st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=150, deadline=None)
def test_tiles_of_a_given_size_partition_the_picture(grid, height, width):
    tiles = grid.tiles((height, width))
    check_tiles(grid, tiles)
    assert all(tile.rows.kept <= height + grid.multiple for tile in tiles)


@given(grids(), st.integers(1, 700 * 700))
@settings(max_examples=150, deadline=None)
def test_tiles_within_a_number_of_pixels_partition_the_picture_and_keep_to_it(grid, pixels):
    tiles = tiles_within(grid, pixels)
    check_tiles(grid, tiles)
    smallest = [max(side + -side % grid.multiple, 64) + grid.multiple for side in grid.halo]
    runs = [min(a + 2 * h, side) for a, h, side in zip(smallest, grid.halo, grid.size, strict=True)]
    assert largest_run(tiles).run_pixels <= max(pixels, math.prod(runs))
    if pixels >= math.prod(grid.size):
        assert len(tiles) == 1


@given(grids(), st.integers(64, 300))
@settings(max_examples=80, deadline=None)
def test_halves_keep_the_same_pixels(grid, side):
    for tile in grid.tiles((side, side))[:3]:
        halves = grid.halves(tile)
        count = kept_count(grid, halves)
        assert count.max() == 1
        assert count.sum() == tile.pixels
        assert largest_run(halves).run_pixels <= tile.run_pixels


def test_strips_as_wide_as_the_picture_where_they_cost_less():
    grid = Grid((4000, 3000), (128, 128), 8)
    strips, squares = tiles_within(grid, 5_000_000), tiles_within(grid, 3_000_000)
    assert {tile.columns.kept for tile in strips} == {3000}
    assert {tile.columns.kept for tile in squares} != {3000}


@pytest.mark.parametrize("pixels", [300_000, 1_000_000, 3_000_000, 5_000_000])
def test_no_other_tiles_within_the_same_pixels_cost_less(pixels):
    grid = Grid((2000, 1500), (136, 136), 8)
    chosen = sum(tile.run_pixels for tile in tiles_within(grid, pixels))
    for rows in range(136, 2000, 88):
        for columns in range(136, 1500, 88):
            tiles = grid.tiles((rows, columns))
            if largest_run(tiles).run_pixels <= pixels:
                assert chosen <= 1.05 * sum(tile.run_pixels for tile in tiles)


def test_halo_is_half_the_window_and_the_reach_of_convolutions():
    assert halo_for((384, 512), 16) == (256, 320)
    assert halo_for(None, 24) == (72, 72)


def test_the_whole_picture_is_one_tile_where_memory_holds_it():
    grid = Grid((3000, 4000), (136, 136), 8)
    per_pixel = 800
    assert len(choose_tiles(grid, lambda h, w: per_pixel * h * w, 10**10, 2 * 10**10)) == 1
    tiles = choose_tiles(grid, lambda h, w: per_pixel * h * w, 10**9, 2 * 10**9)
    check_tiles(grid, tiles)
    assert 0.5e9 < per_pixel * largest_run(tiles).run_pixels <= 1e9


def test_a_network_that_needs_more_than_in_proportion_still_fits():
    grid = Grid((3000, 4000), (64, 64), 8)
    peak = lambda h, w: (h * w) ** 2 // 1000  # noqa: E731
    tiles = choose_tiles(grid, peak, 10**9, 2 * 10**9)
    largest = largest_run(tiles)
    assert peak(largest.rows.run, largest.columns.run) <= 10**9


def test_too_little_memory_for_any_tile_is_a_sentence():
    grid = Grid((3000, 4000), (136, 136), 8)
    with pytest.raises(fr.FullresError, match="free memory is too little: a tile of 408 × 408"):
        choose_tiles(grid, lambda h, w: 800 * h * w, 10**7, 2 * 10**7)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: tried 9")])
def test_out_of_memory_halves_the_tiles_and_says_so(caplog, error):
    grid, kept, tried = Grid((512, 512), (16, 16), 8), [], []

    def run(tile):
        tried.append(tile)
        if tile.run_pixels > 200 * 300:
            raise error
        kept.append(tile)

    done = []
    limit = run_tiles(grid.tiles((512, 256)), grid, run, done.append)
    assert (kept_count(grid, kept) == 1).all()
    assert sum(done) == 512 * 512
    assert limit == 272 * 272
    assert len(tried) == len(kept) + 2  # no tile as large as one that failed is tried again
    assert [record.message for record in caplog.records] == [
        "out of memory at 272 × 512 pixels: smaller tiles",
        "out of memory at 272 × 272 pixels: smaller tiles",
    ]


def test_out_of_memory_with_the_smallest_tile_is_a_sentence():
    grid = Grid((512, 512), (64, 64), 8)

    def run(tile):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(fr.FullresError, match="out of memory even with a tile of"):
        run_tiles(grid.tiles((512, 512)), grid, run, lambda pixels: None)


def test_other_errors_of_a_network_are_not_taken_for_a_lack_of_memory():
    grid = Grid((8, 8), (0, 0), 1)

    def run(tile):
        raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match="sizes do not match"):
        run_tiles(grid.tiles((8, 8)), grid, run, lambda pixels: None)


def tiled(module, x: Tensor, grid: Grid, kept, scale=1):
    out = torch.full((x.shape[0], *(side * scale for side in grid.size)), torch.nan)

    def write(top, left, y):
        out[:, top : top + y.shape[1], left : left + y.shape[2]] = y

    def run(tile):
        rows, columns = tile.rows, tile.columns
        part = x[:, rows.run_start : rows.run_stop, columns.run_start : columns.run_stop]
        paste(write, tile, module(part[None])[0])

    run_tiles(grid.tiles(kept), grid, run, lambda pixels: None)
    return out


@torch.inference_mode()
def test_a_local_network_shows_no_seams():
    torch.manual_seed(0)
    net = fr.create_network("nafnet", width=4, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1])
    for name, parameter in net.module.named_parameters():
        if name.endswith(("beta", "gamma")):
            nn.init.normal_(parameter, std=0.5)
        if ".sca." in name:
            nn.init.normal_(parameter)
    x = torch.rand(3, 301, 379) * torch.linspace(0.1, 1, 379)
    local = fr.Local(train_size=32)
    with fr.convert(net.module, local):
        whole = net.module(x[None])[0]
        grid = Grid((301, 379), halo_for(local.window, net.spec.multiple), net.spec.multiple)
        parts = tiled(net.module, x, grid, (128, 160))
        narrow = tiled(net.module, x, Grid(grid.size, (8, 8), grid.multiple), (128, 160))
    assert (whole - x).std() > 0.05  # the network does something
    assert (parts - whole).abs().max() < 0.25 / 255
    assert (narrow - whole).abs().max() > 10 * (parts - whole).abs().max()


@torch.inference_mode()
def test_tiles_of_a_convolution_and_an_upscaler_are_exact():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 5, padding=2)
    x = torch.rand(3, 150, 170)
    grid = Grid((150, 170), (8, 8), 4)
    torch.testing.assert_close(tiled(conv, x, grid, (32, 64)), conv(x[None])[0])
    up = nn.Upsample(scale_factor=3, mode="nearest")
    torch.testing.assert_close(tiled(up, x, grid, (32, 64), 3), up(x[None])[0])


def test_peak_memory_of_known_networks():
    map_bytes = 4 * 8 * 100 * 120
    net = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
    # the input is held by the caller, and each layer holds what it reads and what it writes
    assert peak_memory(net, (1, 8, 100, 120), torch.float32, "cpu") == 3 * map_bytes
    assert peak_memory(nn.ReLU(), (1, 8, 100, 120), torch.float32, "cpu") == 2 * map_bytes
    assert peak_memory(nn.ReLU(inplace=True), (1, 8, 100, 120), torch.float32, "cpu") == map_bytes
    half = peak_memory(nn.ReLU(), (1, 8, 100, 120), torch.float16, "cpu")
    assert half == map_bytes


def test_peak_memory_costs_no_memory_and_grows_with_the_picture():
    net = fr.create_network("nafnet", width=8, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]).module
    huge = peak_memory(net, (1, 3, 100_000, 100_000), torch.float32, "cpu")
    small = peak_memory(net, (1, 3, 1_000, 1_000), torch.float32, "cpu")
    assert huge > 10**12
    assert huge == pytest.approx(10_000 * small, rel=0.01)


def test_peak_memory_of_a_network_that_looks_at_values():
    class Looks(nn.Module):
        def forward(self, x):
            return x + 1 if float(x.mean()) < 0.5 else x

    assert peak_memory(Looks(), (1, 3, 1024, 512), torch.float32, "cpu") == pytest.approx(
        2 * 4 * 3 * 1024 * 512, rel=0.01
    )


def test_free_memory_is_what_the_machine_has():
    import psutil

    free = free_memory(torch.device("cpu"))
    assert 0 < free <= psutil.virtual_memory().total


def test_the_limit_of_a_control_group_counts(tmp_path):
    groups = tmp_path / "cgroup"
    groups.write_text("0::/user/app\n")
    mount = tmp_path / "mount"
    (mount / "user" / "app").mkdir(parents=True)
    for folder, most in ((mount / "user", "5000"), (mount / "user" / "app", "max")):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text("4000\n")
        (folder / "memory.stat").write_text("anon 3000\ninactive_file 700\n")
    assert _control_group_rooms(groups, mount) == [1700]
    assert _control_group_rooms(tmp_path / "absent", mount) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_free_memory_of_a_gpu():
    assert 0 < free_memory(torch.device("cuda")) <= torch.cuda.mem_get_info()[1]
