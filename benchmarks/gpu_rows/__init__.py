"""The rows of `benchmarks/gpu.py`: what is checked and measured on a GPU, and how one row is run alone."""
