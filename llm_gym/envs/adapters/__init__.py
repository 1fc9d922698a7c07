"""Environments of other packages and of other machines, as ones of this package."""
