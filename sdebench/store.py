"""Durable results: one small Parquet file per cell.

``<folder>/<suite>/cells/<key>.parquet`` holds one row.  A file appears under its name
only when it is complete and on disk (temporary file, fsync, rename), so that a process
killed at any moment leaves whole files and nothing else.  Each file carries the version
of its format and a digest of its row: damage is detected, never read as numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdebench.errors import ResultsError

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1
CELLS = "cells"
VERSION_KEY, DIGEST_KEY, CODE_KEY = (
    b"sdebench_schema",
    b"sdebench_sha1",
    b"sdebench_code",
)
SORT = (
    *("problem", "problem_parameters", "estimator", "estimator_options", "point"),
    *("backend", "dtype", "n_steps", "n_paths", "n_replicates", "scheme", "seed"),
)


def cell_file(folder: Path, key: str) -> Path:
    """Return the file of the cell with this key in a suite's folder."""
    return folder / CELLS / f"{key}.parquet"


def _digest(row: dict[str, Any]) -> bytes:
    text = json.dumps(row, sort_keys=True, default=repr)  # floats: every bit counts
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest().encode()


def _plain(value: Any) -> Any:
    """Return numpy scalars and arrays, tuples and the like as plain Python values."""
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value


def write(path: Path, row: dict[str, Any], code: str = "") -> None:
    """Write one row durably: after the return it survives a crash of the machine.

    Parameters
    ----------
    path : the file, ``….parquet``; its folder is made if need be.
    row : flat; numbers, text, None, and lists of numbers or text.
    code : fingerprint of the code that made the row, see `read_code`.

    Raises
    ------
    ResultsError
        When the disk is full or not writable; no partial file is left behind.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = {name: _plain(value) for name, value in row.items()}
    large = {k for k, v in plain.items() if isinstance(v, int) and v >= 2**63}
    table = pa.table(
        {
            k: pa.array([v], pa.uint64() if k in large else None)
            for k, v in plain.items()
        }
    )
    marks = {
        VERSION_KEY: str(SCHEMA_VERSION).encode(),
        DIGEST_KEY: _digest(table.to_pylist()[0]),
        CODE_KEY: code.encode(),
    }
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            pq.write_table(
                table.replace_schema_metadata(marks),
                file,
                use_dictionary=False,
                write_statistics=False,
                compression="none",
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise ResultsError(
            f"cannot write {path}: {error.strerror or error}; everything finished "
            "before is safe: make room or choose another --folder, then run again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable, where the system lets us open a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _open(path: Path) -> tuple[dict[str, Any], dict[bytes, bytes]]:
    """Return the row and the marks of a file, all checked."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def bad(what: str, instead: str = "") -> ResultsError:
        return ResultsError(
            f"{path} {what}: {instead}delete it and run again, which measures only the "
            "missing cells"
        )

    try:
        content = path.read_bytes()  # first, so that a missing file says so
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        # A damaged footer can be read as a request for gigabytes: parse the bytes that
        # there are, and treat every complaint of the reader as damage.
        file = pq.ParquetFile(pa.BufferReader(content))
        marks = dict(file.schema_arrow.metadata or {})
        found = marks.get(VERSION_KEY, b"").decode(errors="replace")
        if found == str(SCHEMA_VERSION):
            rows = file.read(use_threads=False).to_pylist()
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise bad("is truncated or damaged") from error
    if not found:
        raise bad("is a Parquet file but not results of sdebench")
    if found != str(SCHEMA_VERSION):
        raise bad(
            f"has results format {found}, but this version of sdebench reads format "
            f"{SCHEMA_VERSION}",
            "use the version that wrote it, or ",
        )
    if len(rows) != 1 or _digest(rows[0]) != marks.get(DIGEST_KEY):
        raise bad("is damaged, its content does not match its checksum")
    return rows[0], marks


def read(path: Path) -> dict[str, Any]:
    """Return the row of one file, exactly as written.

    Raises
    ------
    ResultsError
        For a file that is missing, truncated, damaged or of another version.
    """
    return _open(path)[0]


def read_code(path: Path) -> tuple[dict[str, Any], str]:
    """Return the row of one file and the fingerprint of the code that made it."""
    row, marks = _open(path)
    return row, marks.get(CODE_KEY, b"").decode()


def sweep(folder: Path) -> int:
    """Remove temporary files of processes that no longer run; return their number."""
    removed = 0
    for file in (folder / CELLS).glob(".*.tmp"):
        process = file.name.split(".")[-2]
        if process.isdigit() and not _runs(int(process)):
            with contextlib.suppress(OSError):
                file.unlink()
                removed += 1
    return removed


def _runs(process: int) -> bool:
    import psutil

    try:
        # A killed process stays a zombie until its parent asks for it.
        status: str = psutil.Process(process).status()
    except psutil.AccessDenied:
        return True
    except psutil.Error:
        return False
    return status not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def to_frame(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Return rows as a frame; a missing number is NaN, all else is kept as it is."""
    import pandas as pd

    return pd.DataFrame(list(rows))


def load(folder: str | Path = "results") -> pd.DataFrame:
    """Return all results under a folder: one row per cell, in a fixed order.

    Parameters
    ----------
    folder : a suite's folder (``results/quick``) or the folder above it, which holds
        several; of a cell that is in two suites the newer row counts.

    Raises
    ------
    ResultsError
        When there are none, or a file is truncated, damaged or of another version;
        the message names the file and what to do.
    """
    folder = Path(folder)
    files = sorted(folder.glob(f"{CELLS}/*.parquet"))
    files += sorted(folder.glob(f"*/{CELLS}/*.parquet"))
    if not files:
        raise ResultsError(f"no results in {folder}; make some with: sdebench run")
    rows: dict[str, dict[str, Any]] = {}
    for file in files:
        row = read(file)
        known = rows.get(file.stem)
        if known is None or str(known.get("created")) < str(row.get("created")):
            rows[file.stem] = row
    frame = to_frame(sorted(rows.values(), key=_order))
    suites = dict.fromkeys(file.parent.parent.name for file in files)
    frame.attrs["command"] = "; ".join(
        command(suite, seed) for suite in suites for seed in frame["seed"].unique()
    )
    return frame


def command(suite: str, seed: int, **patterns: str | Sequence[str] | None) -> str:
    """Return the command that makes a suite's results."""
    words = ["sdebench", "run", suite, *(["--seed", str(seed)] if seed else [])]
    for option, given in patterns.items():
        for pattern in [given] if isinstance(given, str) else given or ():
            words += [f"--{option}", pattern]
    return shlex.join(words)


def _order(row: dict[str, Any]) -> tuple[tuple[bool, Any], ...]:
    return tuple((row.get(k) is not None, row.get(k)) for k in SORT)
