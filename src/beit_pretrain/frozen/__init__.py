"""What the frozen features of every layer are worth: one pass over the data, then linear probes and kNN."""
