"""Foreign code in processes of its own: it may hang, crash or run out of memory.

A task that takes too long is ended with its process, which is replaced; the others go
on.  Without a time limit everything runs in this process, one task after the other.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from threadpoolctl import threadpool_limits

from sdebench.errors import NotApplicableError
from sdebench.estimator import Estimator
from sdebench.validate.report import describe

OK, FAILED, TIMEOUT, CRASHED = "ok", "failed", "timed out", "crashed"
NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True)
class Candidate:
    """An estimator that a process can build: its file's specification, or a pickle."""

    spec: str | None
    pickle: bytes | None
    file: str | None

    def build(self) -> Estimator:
        """Return the estimator."""
        if self.spec is not None:
            from sdebench import registry

            return registry.estimator(self.spec)
        import cloudpickle

        built: Estimator = cloudpickle.loads(self.pickle)
        return built


class Result(NamedTuple):
    """What became of a task; ``reason`` and ``traceback`` where it failed."""

    status: str
    value: Any = None
    reason: str = ""
    traceback: str = ""


Task = Callable[[Estimator], Any]
"""Called with the estimator; must be picklable."""


def perform(task: Task, candidate: Candidate) -> Result:
    """Run one task; an exception becomes a result."""
    try:
        # The matrices are small: more threads would only wait for each other.
        with threadpool_limits(1, user_api="blas"):
            return Result(OK, task(candidate.build()))
    except NotApplicableError as error:
        return Result(NOT_APPLICABLE, reason=str(error))
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        return Result(FAILED, None, describe(error, candidate.file), text)


def _start() -> None:
    """Keep torch to one thread, as the other processes do."""
    import torch

    torch.set_num_threads(1)
    os.dup2(2, 1)  # what the code under test prints is no part of the report


def run_tasks(
    tasks: Sequence[Task],
    candidate: Candidate,
    *,
    jobs: int,
    time_limit: float | None,
) -> Iterator[tuple[int, Result]]:
    """Yield (index, result) as tasks finish.

    Parameters
    ----------
    jobs : worker processes; time_limit : seconds for one task, None for no processes.
    """
    if time_limit is None:
        for i, task in enumerate(tasks):
            yield i, perform(task, candidate)
        return
    from concurrent.futures import FIRST_COMPLETED, TimeoutError, wait

    from joblib.externals.loky.backend.context import get_context
    from pebble import ProcessExpired, ProcessPool

    # loky's processes do not import the caller's main module: no guard is needed.
    pool = ProcessPool(jobs, initializer=_start, context=get_context("loky"))
    try:
        futures: dict[Any, int] = {
            pool.schedule(perform, args=(task, candidate), timeout=time_limit): i
            for i, task in enumerate(tasks)
        }
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    result = future.result()
                except TimeoutError:
                    reason = f"still running after {time_limit:g} s, so it was ended"
                    result = Result(TIMEOUT, reason=reason)
                except ProcessExpired as error:
                    reason = f"its process died (exit code {error.exitcode})"
                    result = Result(CRASHED, reason=reason)
                yield futures[future], result
    finally:
        pool.stop()
        pool.join()
