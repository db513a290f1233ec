"""The verbs `demo` and `compare`: complete experiments from images to a report."""
