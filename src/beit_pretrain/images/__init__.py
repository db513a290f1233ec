"""From a file's bytes to what a network sees: decoding, crops, views, masks."""
