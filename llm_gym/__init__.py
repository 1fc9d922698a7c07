"""Gymnasium for language models, and a trainer that any Gymnasium user can read."""
