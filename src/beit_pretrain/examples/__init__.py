"""The demo and the comparison: whole runs from images to a report."""
