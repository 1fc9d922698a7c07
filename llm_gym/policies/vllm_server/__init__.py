"""vLLM servers, started here or elsewhere."""
