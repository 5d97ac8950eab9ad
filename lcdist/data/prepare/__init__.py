"""Prepare token folders from text, JSONL or parquet files."""
