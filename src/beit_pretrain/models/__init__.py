"""Networks: BEiT on timm, masked autoencoder, UPerNet, linear probes."""
