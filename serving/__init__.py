"""Other software that serves converted checkpoints."""
