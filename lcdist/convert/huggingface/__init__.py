"""Import and export Hugging Face folders: config, rotary scaling, weights, tokenizer."""
