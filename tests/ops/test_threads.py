"""Jobs run once each, on the threads that torch computes with, and failures reach the caller."""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fullres.ops import threads
from fullres.ops.threads import split, spread


@pytest.fixture(params=["torch's workers", "our own"])
def _either(request, monkeypatch):
    if request.param == "our own":
        monkeypatch.setattr(threads, "_parallel", lambda: threads._pooled)
    elif threads._parallel() is threads._pooled:
        pytest.skip("torch has another OpenMP here")


@given(count=st.integers(1, 200), parts=st.integers(1, 50))
def test_split_covers_all_evenly(count, parts):
    runs = split(count, parts)
    assert [i for run in runs for i in range(*run)] == list(range(count))
    lengths = [last - first for first, last in runs]
    assert len(runs) == min(parts, count)
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.usefixtures("_either")
@pytest.mark.parametrize("count", [0, 1, 2, 7, 500])
def test_each_job_runs_once(count):
    done = []
    spread([(done.append, i) for i in range(count)])
    assert sorted(done) == list(range(count))


@pytest.mark.usefixtures("_either")
def test_jobs_run_side_by_side():
    meeting = threading.Barrier(torch.get_num_threads(), timeout=60)
    spread([(meeting.wait,)] * torch.get_num_threads())


@pytest.mark.usefixtures("_either")
def test_a_failure_reaches_the_caller():
    def fail():
        raise ZeroDivisionError("job 3")

    with pytest.raises(ZeroDivisionError, match="job 3"):
        spread([(int,), (int,), (int,), (fail,), (int,)])
    spread([(int,)] * 9)


@pytest.mark.usefixtures("_either")
def test_callers_on_several_threads_do_not_meet():
    done = [[] for _ in range(4)]

    def caller(mine):
        for i in range(20):
            spread([(mine.append, (i, j)) for j in range(5)])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(caller, done))
    assert all(sorted(mine) == [(i, j) for i in range(20) for j in range(5)] for mine in done)


def test_without_gnu_s_interface_the_threads_are_our_own(monkeypatch):
    def nothing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", nothing)
    assert threads._parallel.__wrapped__() is threads._pooled
