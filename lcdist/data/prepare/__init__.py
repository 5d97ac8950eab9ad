"""Tokenize text, JSONL or parquet files into token folders."""
