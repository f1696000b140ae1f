"""Measurement: replicates, streaming moments, bias tests, tails and cost."""

from sdebench.callable_module import make_callable
from sdebench.measure.cell import Measurement, measure, measure_group

__all__ = ["Measurement", "measure", "measure_group"]

make_callable(__name__, measure)
