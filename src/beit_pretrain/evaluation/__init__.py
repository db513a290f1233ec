"""Features of every layer, kNN, linear probes."""
