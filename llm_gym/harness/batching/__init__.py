"""Sequences laid end to end in micro-batches, what they begin with in common once."""
