"""Convert checkpoints to and from Hugging Face folders and PEFT adapters."""
