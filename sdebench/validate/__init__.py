"""Validation: a user's own estimator or problem against the exact answers."""
