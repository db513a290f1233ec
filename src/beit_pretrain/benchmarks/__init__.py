"""Measurements: speed, memory, parity; nothing imports them."""
