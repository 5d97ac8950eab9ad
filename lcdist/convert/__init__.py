"""Plain LLaMA-family models in and out: Hugging Face folders to checkpoints of a run, and back."""
