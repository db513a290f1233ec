"""BEiT in Flax (nnx): reads every checkpoint that torch's networks read; needs `pip install 'beit_pretrain[flax]'`."""
