"""The networks: BEiT on timm, attention, UPerNet."""
