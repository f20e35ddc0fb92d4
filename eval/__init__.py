"""Quality and speed of converted models."""
