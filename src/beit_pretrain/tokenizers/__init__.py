"""Visual tokenizers: the interface, DALL-E's dVAE, a dVAE to train, and the token cache."""
