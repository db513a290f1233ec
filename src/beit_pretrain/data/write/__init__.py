"""From folders and tars of images to WebDataset shards."""
