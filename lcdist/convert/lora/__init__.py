"""Import, export, merge and unmerge LoRA adapters in PEFT format."""
