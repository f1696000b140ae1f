"""Where a number comes from: versions, commit, machine, code.

Nothing that identifies a person or a place goes into results: no host name, no user
name, no absolute path.
"""

from __future__ import annotations

import datetime
import hashlib
import platform
import re
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
MEASURING = ("closed_form", "simulate", "measure")
"""Rooms whose code decides the numbers, besides problems and estimators."""
CATALOGUE = ("problems", "estimators")
NOT_MEASURING = frozenset(
    {"cli", "console", "plan", "progress", "provenance", "run", "store"}
)
"""Modules of the package that cannot change a measured number."""


@cache
def version(distribution: str) -> str:
    """Return a distribution's version, without importing it; "" if not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str | None:
    """Return the output of a git command in the checkout, or None if it fails."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=PACKAGE.parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@cache
def commit() -> str:
    """Return the commit of the checkout (``+dirty`` if edited), else the version.

    An installed wheel may lie inside somebody else's checkout, whose commit would say
    nothing: only a ``.git`` beside the package counts.
    """
    found = _git("rev-parse", "HEAD") if (PACKAGE.parent / ".git").exists() else None
    if not found:
        return f"v{version('sdebench')}"
    edited = _git("status", "--porcelain", "--", "sdebench", *CATALOGUE)
    return f"{found}+dirty" if edited else found


@cache
def machine() -> str:
    """Return processor model, number of cores and memory, e.g. "…, 2 cores, 24 GiB"."""
    import psutil

    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    memory = psutil.virtual_memory().total / 2**30
    return f"{model}, {cores} cores, {memory:.0f} GiB, {platform.system()}"


def provenance() -> dict[str, Any]:
    """Return the columns that say what made a row, on what machine and when."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "sdebench_version": version("sdebench"),
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "numba", "torch")},
        "machine": machine(),
        "created": now.isoformat(timespec="seconds"),
    }


@cache
def _shared_code() -> bytes:
    """Return the digest of all code that every measured number depends on."""
    files = [f for f in PACKAGE.glob("*.py") if f.stem not in NOT_MEASURING]
    for room in MEASURING:
        files += (PACKAGE / room).rglob("*.py")
    for room in CATALOGUE:
        files += (PACKAGE / room).glob("_*.py")
    digest = hashlib.sha1(usedforsecurity=False)
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    for name in ("numpy", "scipy", "numba", "torch"):
        digest.update(f"{name} {version(name)}".encode())
    return digest.digest()


@cache
def _room(room: str) -> dict[str, str]:
    """Return the source text of each file of the catalogue, by name."""
    return {
        file.stem: file.read_text(encoding="utf-8")
        for file in sorted((PACKAGE / room).glob("*.py"))
        if not file.stem.startswith("_")
    }


@cache
def code_fingerprint(problem: str, estimator: str) -> str:
    """Return a digest of the code that decides the numbers of a pair.

    It covers the shared code, versions of the numerical libraries, the files of the
    problem and of the estimator, and those of the catalogue that they mention.  A
    stored cell with another fingerprint is out of date; adding a file to the catalogue
    leaves all other cells valid.
    """
    digest = hashlib.sha1(_shared_code(), usedforsecurity=False)
    for room, name in zip(CATALOGUE, (problem, estimator), strict=True):
        texts = _room(room)
        waiting, seen = [name], set()
        while waiting:
            stem = waiting.pop()
            if stem in seen or stem not in texts:
                continue
            seen.add(stem)
            waiting += [s for s in re.findall(r"\w+", texts[stem]) if s in texts]
        for stem in sorted(seen):
            digest.update(stem.encode() + texts[stem].encode())
    return digest.hexdigest()


def scrub(text: str) -> str:
    """Return ``text`` without the absolute folders of this machine."""
    folders = {
        str(PACKAGE.parent): "",
        sys.prefix: "<python>",
        sys.base_prefix: "<python>",
        str(Path.cwd()): ".",
        str(Path.home()): "~",
    }
    for folder in sorted(folders, key=len, reverse=True):
        if len(folder) > 1:
            text = text.replace(folder, folders[folder])
    return text
