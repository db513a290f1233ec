"""`bench gpu`: measure all there is to know about a machine with a GPU, in stages, within a time limit."""
