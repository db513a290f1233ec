"""Image bytes to what a network sees: decoding, crops, jitter, masks, label maps."""
