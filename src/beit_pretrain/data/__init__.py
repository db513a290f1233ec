"""From shards to batches: which sample stands at which position, its bytes, batches, data modules."""
