"""From what people have (folders, tars, archives) to WebDataset shards with an index and a manifest."""
