"""Peak memory of a piece of work, as the growth of the process's resident set."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType


class PeakMemory:
    """Context manager: ``bytes`` is the peak growth of resident memory inside it.

    On Linux the high-water mark is reset and read exactly; elsewhere the growth of
    the process's lifetime peak is taken, a lower bound.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._before = 0

    def __enter__(self) -> PeakMemory:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status("VmRSS")
        except OSError:
            self._before = _lifetime_peak()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            peak = _status("VmHWM")
        except OSError:
            peak = _lifetime_peak()
        self.bytes = max(peak - self._before, 0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"{field} not found")


def _lifetime_peak() -> int:
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
