"""Typed configuration: TOML in, one tree of frozen dataclasses out."""

from lcdist.config.load import ConfigError, dump, load, parse

__all__ = ["ConfigError", "dump", "load", "parse"]
