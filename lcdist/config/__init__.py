"""Typed configuration: TOML in, one tree of frozen dataclasses out."""

from lcdist.config.dump import dump
from lcdist.config.load import ConfigError, load, parse

__all__ = ["ConfigError", "dump", "load", "parse"]
