"""The catalogue of problems: one file each."""
