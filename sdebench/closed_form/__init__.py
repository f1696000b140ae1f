"""Exact algebra in numpy float64; nothing here samples paths.

`gaussian_mixture` and `quadratic` are the public algebra of mixtures and tilts;
`log_quadratics` is the same in the row form of the coefficient tables. `schedule`,
`base_process` and `tilting` make classes G and F of them, `linear_quadratic`,
`hamiltonian`, `collocation` and `affine_chain` class L, in continuous time and for N
steps. `geometric`, `square_root`, `jacobi` and `polynomial_tilt` are class P, `benes`
class B, `empirical` class E, `manufactured` and `radial` class M; `line_diffusion`,
`grid_chain`, `polynomial_expectation` and `funnel` serve class N. `work` and
`density_powers` are about log Z.
"""
