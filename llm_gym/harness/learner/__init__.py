"""From a batch to a step of the optimizer, in the memory that there is."""
