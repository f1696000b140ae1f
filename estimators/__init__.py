"""The catalogue of estimators: one file each."""
