"""The registered environments."""
