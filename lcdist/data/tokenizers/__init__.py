"""Tokenizers: sentencepiece, Hugging Face tokenizer.json, and bytes."""
