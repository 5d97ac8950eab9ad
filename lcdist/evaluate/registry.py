"""The parts that an evaluation can have, by name; `parts.py` says how one is added."""

from lcdist.evaluate.perplexity import PERPLEXITY

PART_KINDS = {kind.name: kind for kind in (PERPLEXITY,)}
