"""What pre-training is worth: the same network with it, without it, and with a control."""
