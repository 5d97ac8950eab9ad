"""The parts that an evaluation can have, by name; `parts.py` says how one is added."""

from lcdist.evaluate.perplexity import PERPLEXITY
from lcdist.evaluate.tasks.retrieval import NEEDLE, PASSKEY
from lcdist.evaluate.tasks.ruler_part import RULER_PART

PART_KINDS = {kind.name: kind for kind in (PERPLEXITY, PASSKEY, NEEDLE, RULER_PART)}
