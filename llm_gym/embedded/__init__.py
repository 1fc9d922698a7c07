"""Where the embedded model lives: a tiny Qwen3 made by `examples/embedded_model`."""

from pathlib import Path

PATH = Path(__file__).parent
"""The folder, in the usual Hugging Face layout."""
