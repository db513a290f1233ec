"""Images to visual tokens: the protocol, DALL-E's dVAE, our own, the token cache."""
