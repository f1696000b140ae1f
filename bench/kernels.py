"""asv: time and peak memory of the kernels on both backends."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.cases import N_STEPS, PROCESSES, process, runner

N_PATHS = 1024
BACKENDS = ["numba", "torch"]


class Simulate:
    """Forward paths of one block set: 1024 paths, 200 steps."""

    param_names = ("backend", "process")
    params = (BACKENDS, list(PROCESSES))

    def setup(self, backend: str, name: str) -> None:
        self.run = runner(process(name), n_paths=N_PATHS, backend=backend)
        self.run()

    def time_forward(self, backend: str, name: str) -> None:
        self.run()


class Single:
    """Forward paths in float32."""

    param_names = ("process",)
    params = (["linear_2", "linear_10", "mixture_9"],)

    def setup(self, name: str) -> None:
        self.run = runner(process(name), n_paths=N_PATHS, dtype="float32")
        self.run()

    def time_forward(self, name: str) -> None:
        self.run()


class Gradient:
    """Per-path gradients, their own forward pass included."""

    param_names = ("backend", "estimator", "process")
    params = (
        BACKENDS,
        ["pathwise", "reinforce", "adjoint_matching"],
        ["linear_2", "mixture_9"],
    )

    def setup(self, backend: str, estimator: str, name: str) -> None:
        problem = process(name)
        self.run = runner(problem, (estimator,), n_paths=N_PATHS, backend=backend)
        self.run()

    def time_gradient(self, backend: str, estimator: str, name: str) -> None:
        self.run()


class Memory:
    """Peak memory of paths and of per-path gradients."""

    param_names = ("backend", "work")
    params = (BACKENDS, ["forward", "pathwise", "reinforce", "adjoint_matching"])

    def setup(self, backend: str, work: str) -> None:
        estimators = () if work == "forward" else (work,)
        problem = process("linear_10")
        self.run = runner(problem, estimators, n_paths=N_PATHS, backend=backend)

    def peakmem_block(self, backend: str, work: str) -> None:
        self.run()


class Noise:
    """A million counter-based normals."""

    param_names = ("backend", "dtype")
    params = (["numba", "numpy", "torch"], ["float64", "float32"])

    def setup(self, backend: str, dtype: str) -> None:
        from sdebench.simulate.noise import normals

        self.normals: Any = normals
        self.time_normals(backend, dtype)

    def time_normals(self, backend: str, dtype: str) -> None:
        self.normals(1, 0, 0, 4096, 0, 256, 1, backend=backend, dtype=dtype)


class Moments:
    """Streaming moments to order four of blocks of 256 paths."""

    param_names = ("components", "covariance")
    params = ([5, 100], [False, True])

    def setup(self, components: int, covariance: bool) -> None:
        from sdebench.measure.moments import StreamingMoments

        self.block = np.random.default_rng(1).standard_normal((components, 256))
        self.stream = StreamingMoments(components, 1, with_covariance=covariance)
        self.stream.set_shift(self.block)
        self.stream.update(0, self.block)

    def time_update(self, components: int, covariance: bool) -> None:
        self.stream.update(0, self.block)


class Truth:
    """Exact gradient at a point, from a problem just made."""

    number = 1
    param_names = ("problem",)
    params = (["ou_linear", "ou_quadratic_hard", "nine_modes", "follmer_mixture"],)

    def setup(self, name: str) -> None:
        import sdebench

        self.make: Any = lambda: sdebench.problem(name)
        self.problem = self.make()

    def time_gradient(self, name: str) -> None:
        self.make().truth.gradient("halfway")

    def time_tables(self, name: str) -> None:
        self.problem.tables(
            self.problem.theta("halfway"), self.problem.time_grid(N_STEPS)
        )


class Start:
    """Start-up in a new process."""

    repeat = 5
    number = 1

    def timeraw_import(self) -> str:
        return "import sdebench"

    def timeraw_first_simulation_from_cache(self) -> str:
        return "import sdebench; sdebench.simulate('ou_linear', n_paths=256)"

    def setup(self) -> None:
        import sdebench

        sdebench.simulate("ou_linear", n_paths=256)
