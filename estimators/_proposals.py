"""Controls that paths may have whose weights lead to the tilted path law."""

PROPOSALS = {"zero": "none", "given": "theta", "optimal": "optimal"}
"""The simulated control of each ``proposal``: no control, the given one, or u*."""
