"""The engine of our own, on transformers."""
