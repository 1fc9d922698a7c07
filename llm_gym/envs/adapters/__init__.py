"""Environments of other suites and of other machines, as ones of this package (docs/adapters.md, docs/services.md)."""
