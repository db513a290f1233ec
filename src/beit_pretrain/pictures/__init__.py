"""What people look at: grids of images, label maps, attention, tokens, curves."""
