"""Source checkpoint -> multi-query checkpoint."""
