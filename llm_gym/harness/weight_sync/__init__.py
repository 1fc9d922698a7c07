"""New weights to the engine, and the proof that they arrived."""
