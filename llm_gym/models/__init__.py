"""What engines and trainer must know of a transformers model: its plain tensors, its folder, a small copy of it."""
