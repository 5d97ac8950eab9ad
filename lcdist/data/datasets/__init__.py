"""Datasets: samples by number, from token folders, mixtures or synthetic text."""
