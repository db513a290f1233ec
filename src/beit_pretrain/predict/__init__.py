"""A trained network on a person's images."""
