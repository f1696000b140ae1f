"""Results on disk: exact, atomic, and honest about damage."""

from __future__ import annotations

import errno
import math
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdebench import store
from sdebench.errors import ResultsError

ROW = {
    "problem": "ou_linear",
    "estimator": "pathwise",
    "reason": "ragged “α ≤ β” \N{SNOWMAN}\n",
    "mean": [0.1, -0.0, float("nan"), float("inf"), -float("inf"), 5e-324],
    "parameter_names": ["β", ""],
    "truth_discrete": None,
    "empty": [],
    "nan": float("nan"),
    "inf": -float("inf"),
    "third": 1 / 3,
    "seed": 2**63 - 1,
    "flag": True,
    "status": "ok",
    "created": "2026-01-01T00:00:00+00:00",
}


@pytest.fixture
def file(tmp_path):
    path = store.cell_file(tmp_path, "a" * 40)
    store.write(path, ROW, "code")
    return path


def test_round_trip_is_exact(file):
    row, code = store.read_code(file)
    assert repr(row) == repr(ROW)  # repr: tells -0.0 and nan, and types
    assert code == "code"
    assert math.copysign(1, row["mean"][1]) == -1


def test_numpy_values_become_plain(tmp_path):
    path = tmp_path / "x.parquet"
    row = {"a": np.float64(0.1), "b": np.arange(3.0), "c": (1, 2), "d": np.bool_(True)}
    store.write(path, row | {"e": [np.float64(2.0)], "seed": 2**64 - 1})
    expected = {"a": 0.1, "b": [0.0, 1.0, 2.0], "c": [1, 2], "d": True, "e": [2.0]}
    assert store.read(path) == expected | {"seed": 2**64 - 1}


def test_frame_keeps_values(file, tmp_path):
    store.write(store.cell_file(tmp_path, "b" * 40), ROW | {"problem": "a", "nan": 1.0})
    frame = store.load(tmp_path)
    assert frame["problem"].tolist() == ["a", "ou_linear"]
    assert repr(frame["mean"][1]) == repr(ROW["mean"])
    assert frame["inf"].tolist() == [-math.inf, -math.inf]
    assert frame["truth_discrete"].isna().all()
    assert frame["reason"][0] == ROW["reason"]


def test_load_above_suites_keeps_the_newer_of_two(file, tmp_path):
    quick, full = tmp_path / "r" / "quick", tmp_path / "r" / "full"
    newer = ROW | {"created": "2026-02-01T00:00:00+00:00", "problem": "new"}
    store.write(store.cell_file(quick, "k"), newer)
    store.write(store.cell_file(full, "k"), ROW)
    store.write(store.cell_file(full, "l"), ROW)
    assert store.load(tmp_path / "r")["problem"].tolist() == ["new", "ou_linear"]


def test_nothing_there(tmp_path):
    with pytest.raises(ResultsError, match=r"no results in .*sdebench run"):
        store.load(tmp_path / "absent")


@pytest.mark.parametrize("keep", [0, 3, 4, 100, -1, -8, -200])
def test_truncated(file, tmp_path, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ResultsError, match="truncated or damaged") as error:
        store.load(tmp_path)
    assert file.name in str(error.value)
    assert "run again" in str(error.value)


def test_every_damaged_byte_is_noticed(file):
    """No flipped bit may turn into another number.

    Bytes that carry no information (unused fields of the format) may change; then
    the row must be the same.
    """
    content = file.read_bytes()
    expected = repr(store.read(file))
    noticed = 0
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        file.write_bytes(damaged)
        try:
            assert repr(store.read(file)) == expected
        except ResultsError:
            noticed += 1
    assert noticed > 100


def test_other_version(tmp_path, monkeypatch):
    path = store.cell_file(tmp_path, "k")
    with monkeypatch.context() as other:
        other.setattr(store, "SCHEMA_VERSION", 2)
        store.write(path, ROW)
    with pytest.raises(ResultsError, match=r"k\.parquet has results format 2.* 1: use"):
        store.load(tmp_path)


def test_foreign_file(tmp_path):
    path = store.cell_file(tmp_path, "k")
    path.parent.mkdir()
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(ResultsError, match="not results of sdebench"):
        store.load(tmp_path)


def failing(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file(file, monkeypatch, step):
    monkeypatch.setattr(store.os, step, failing)
    with pytest.raises(ResultsError, match="No space left on device"):
        store.write(file, ROW | {"problem": "new"})
    monkeypatch.undo()
    assert store.read(file)["problem"] == "ou_linear"
    assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_full_disk_while_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(pq, "write_table", failing)
    with pytest.raises(ResultsError, match="No space left on device"):
        store.write(store.cell_file(tmp_path, "k"), ROW)
    assert list(tmp_path.rglob("*")) == [tmp_path / "cells"]


def test_folder_is_a_file(tmp_path):
    (tmp_path / "cells").write_text("")
    with pytest.raises(ResultsError, match="cannot write"):
        store.write(store.cell_file(tmp_path, "k"), ROW)


def test_sweep_removes_only_what_dead_processes_left(file, tmp_path):
    mine = file.with_name(f".x.{os.getpid()}.tmp")
    dead = file.with_name(f".x.{2**22 + 1}.tmp")  # above the largest process id
    mine.touch()
    dead.touch()
    assert store.sweep(tmp_path) == 1
    assert mine.exists()
    assert not dead.exists()
    assert file.exists()
