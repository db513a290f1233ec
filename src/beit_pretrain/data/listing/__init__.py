"""Listing a source: which images it has, and the class of each."""
