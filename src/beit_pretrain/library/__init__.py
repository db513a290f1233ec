"""Models, configuration and image processor under the names of Hugging Face's BEiT, for Python."""
