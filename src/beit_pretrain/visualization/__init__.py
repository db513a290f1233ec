"""Pictures: grids, attention maps, token maps, overlays, plots."""
