"""What LLaMA-Factory imports at its start and uses for sound alone."""
