"""Which pictures are found, where results go, what is done already, and what goes wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fullres.batch import Batch, Job, find, is_done, run, waiting
from fullres.errors import FullresError, ImageError


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names, time=1_000_000_000):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")
        os.utime(name, (time, time))


def results(batch):
    return {job.source.as_posix(): job.target.as_posix() for job in batch.jobs}


def test_a_picture_goes_next_to_itself(here):
    touch("photo.jpg")
    batch = find("photo.jpg")
    assert results(batch) == {"photo.jpg": "photo-restored.jpg"}
    assert batch.alone
    assert results(find("photo.jpg", suffix="-clean")) == {"photo.jpg": "photo-clean.jpg"}


def test_a_target_is_a_file_or_a_folder(here):
    touch("in/photo.jpg", "in/other.JPG")
    Path("there.d").mkdir()
    assert results(find("in/photo.jpg", "out.png")) == {"in/photo.jpg": "out.png"}
    assert results(find("in/photo.jpg", "there.d")) == {"in/photo.jpg": "there.d/photo.jpg"}
    assert results(find("in/photo.jpg", "new/")) == {"in/photo.jpg": "new/photo.jpg"}
    assert results(find("in/photo.jpg", "new")) == {"in/photo.jpg": "new/photo.jpg"}
    assert results(find("in/photo.jpg", "new", "-x")) == {"in/photo.jpg": "new/photo-x.jpg"}
    with pytest.raises(ImageError, match=r"out\.png: is a file's name, but several pictures"):
        find("in", "out.png")


def test_a_folder_keeps_its_structure(here):
    touch("in/b.jpg", "in/sub/a.PNG", "in/notes.txt", "in/.hidden.jpg", "in/.thumbs/a.jpg")
    assert results(find("in")) == {
        "in/b.jpg": "in-restored/b.jpg",
        "in/sub/a.PNG": "in-restored/sub/a.PNG",
    }
    assert results(find("in/", "out")) == {"in/b.jpg": "out/b.jpg", "in/sub/a.PNG": "out/sub/a.PNG"}
    assert results(find("in", suffix="-x"))["in/b.jpg"] == "in-x/b.jpg"
    assert not find("in").alone


def test_the_folder_one_is_in(here, monkeypatch):
    touch("in/b.jpg")
    monkeypatch.chdir("in")
    target = find(".").jobs[0].target
    assert target == here / "in-restored" / "b.jpg"


def test_several_folders_keep_their_names(here):
    touch("a/x.jpg", "b/x.jpg", "x.jpg")
    assert results(find(["a", "b", "x.jpg"], "out")) == {
        "a/x.jpg": "out/a/x.jpg",
        "b/x.jpg": "out/b/x.jpg",
        "x.jpg": "out/x.jpg",
    }
    assert results(find(["a", "b"])) == {
        "a/x.jpg": "a-restored/x.jpg",
        "b/x.jpg": "b-restored/x.jpg",
    }


def test_patterns(here):
    touch("in/b.jpg", "in/sub/a.jpg", "in/c.png", "in/sub/.h.jpg", "odd[1].jpg")
    assert results(find("in/*.jpg")) == {"in/b.jpg": "in/b-restored.jpg"}
    assert results(find("in/**/*.jpg", "out")) == {
        "in/b.jpg": "out/b.jpg",
        "in/sub/a.jpg": "out/sub/a.jpg",
    }
    assert results(find("odd[1].jpg")) == {"odd[1].jpg": "odd[1]-restored.jpg"}
    absolute = find(f"{here}/in/**/*.jpg", "out")
    assert sorted(job.target.as_posix() for job in absolute.jobs) == ["out/b.jpg", "out/sub/a.jpg"]


def test_own_results_are_left_out(here):
    touch("a.jpg", "a-restored.jpg", "a-restored-compare.png", "b-restored.jpg")
    batch = find("*.*")
    assert list(results(batch)) == ["a.jpg", "b-restored.jpg"]  # no b.jpg: not a result of ours
    assert batch.passed_over == 2
    touch("all/in/a.jpg", "all/in-restored/a.jpg", "all/in/out/a.jpg")
    assert list(results(find("all"))) == ["all/in/a.jpg", "all/in/out/a.jpg"]
    assert list(results(find("all/in", "all/in/out"))) == ["all/in/a.jpg"]
    assert list(results(find("all/in/**/*.jpg", "all/in/out"))) == ["all/in/a.jpg"]
    assert results(find("a-restored.jpg")) == {"a-restored.jpg": "a-restored-restored.jpg"}


def test_nothing_there(here):
    Path("empty").mkdir()
    with pytest.raises(ImageError, match=r"missing\.jpg: no such file or folder"):
        find("missing.jpg")
    with pytest.raises(ImageError, match=r"empty: no pictures found \(looked for .*\.jpg"):
        find("empty")
    with pytest.raises(ImageError, match=r"\*\.jpg: no pictures found"):
        find("*.jpg")


def test_two_pictures_with_one_result_are_refused(here):
    touch("a/x.jpg", "b/x.jpg", "x.jpg", "x.png")
    with pytest.raises(ImageError, match=r"a/x\.jpg and b/x\.jpg would both become out/x\.jpg"):
        find(["a/x.jpg", "b/x.jpg"], "out")
    with pytest.raises(ImageError, match=r"x-restored-compare\.png"):
        find("x.*", comparison=True)


def test_a_result_never_replaces_a_picture(here):
    touch("in/a.jpg", "b.jpg")
    Path("link.jpg").symlink_to("in/a.jpg")
    Path("hard.jpg").hardlink_to("in/a.jpg")
    Path("folder").symlink_to("in")
    refused = "would replace this picture"
    for target in (
        "in/a.jpg",
        "in/../in/a.jpg",
        "in",
        "link.jpg",
        "hard.jpg",
        here / "in" / "a.jpg",
    ):
        with pytest.raises(ImageError, match=refused):
            find("in/a.jpg", target)
    for source, target in (("in", "folder"), ("in", "."), ("link.jpg", "in/a.jpg")):
        if (source, target) != ("in", "."):
            with pytest.raises(ImageError, match=refused):
                find(source, target)
    with pytest.raises(ImageError, match=refused):
        find("b.jpg", suffix="")
    with pytest.raises(ImageError, match=refused):
        find("in", suffix="")


def test_what_is_done_already(here):
    touch("in/a.jpg", "in/b.jpg", "in/c.jpg", time=2_000_000_000)
    touch("in-restored/a.jpg", time=2_000_000_001)
    touch("in-restored/b.jpg", time=1_999_999_999)
    batch = find("in")
    assert [job.source.name for job in waiting(batch, False)] == ["b.jpg", "c.jpg"]
    assert waiting(batch, True) == list(batch.jobs)
    assert is_done(batch.jobs[0].target, batch.jobs[0])
    compared = find("in", comparison=True)
    assert [job.source.name for job in waiting(compared, False)] == ["a.jpg", "b.jpg", "c.jpg"]


def test_an_existing_result_of_the_only_picture_is_not_replaced(here):
    touch("a.jpg")
    touch("a-restored.jpg")
    with pytest.raises(ImageError, match=r"a-restored\.jpg: exists already; .*--overwrite"):
        waiting(find("a.jpg"), False)
    assert len(waiting(find("a.jpg"), True)) == 1


class Recorder:
    def __init__(self):
        self.events = []

    def begin(self, batch: Batch, waiting: int) -> None:
        self.events.append(("begin", len(batch.jobs), waiting))

    def picture(self, job: Job, pixels: int) -> None: ...

    def tile(self, pixels: int) -> None: ...

    def end(self, outcome) -> None:
        self.events.append(("end", outcome.job.source.name, outcome.error is None))


def test_failures_are_reported_and_the_others_done(here):
    touch("in/a.jpg", "in/b.jpg", "in/c.jpg", "in/d.jpg", "in/old.jpg", time=2_000_000_000)
    touch("in-restored/a.jpg", time=2_000_000_001)
    touch("in-restored/old.jpg", time=1_000_000_000)

    def work(job):
        if job.source.name == "b.jpg":
            raise FullresError("in/b.jpg: broken")
        if job.source.name == "c.jpg":
            raise PermissionError(13, "Permission denied", "in-restored/c.jpg")
        return 12

    progress = Recorder()
    report = run(find("in"), work, progress=progress)
    assert report.already_done == 1
    assert [outcome.job.source.name for outcome in report.restored] == ["d.jpg"]
    assert [str(outcome.error) for outcome in report.failed] == [
        "in/b.jpg: broken",
        "in-restored/c.jpg: Permission denied",
        "in-restored/old.jpg: exists already; allow it to be replaced with --overwrite",
    ]
    assert report.megapixels == 12e-6
    assert progress.events == [
        ("begin", 5, 4),
        ("end", "b.jpg", False),
        ("end", "c.jpg", False),
        ("end", "d.jpg", True),
        ("end", "old.jpg", False),
    ]
    assert Path("in-restored/old.jpg").read_bytes() == b""


def test_a_fault_of_the_program_is_not_hidden(here):
    touch("a.jpg")

    def work(job):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(find("a.jpg"), work)


def test_another_map_can_spread_the_work(here):
    touch("in/a.jpg", "in/b.jpg")
    order = []

    def backwards(function, jobs):
        return iter([function(job) for job in reversed(list(jobs))][::-1])

    report = run(find("in"), lambda job: order.append(job.source.name) or 1, map=backwards)
    assert order == ["b.jpg", "a.jpg"]
    assert [outcome.job.source.name for outcome in report.outcomes] == ["a.jpg", "b.jpg"]
