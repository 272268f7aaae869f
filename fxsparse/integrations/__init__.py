"""Training engines: a callback each for Lightning and for the Hugging Face Trainer (optional extras)."""
