"""Training: small models from scratch, to convert and to compare with."""
