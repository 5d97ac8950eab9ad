"""The parts that an evaluation can have, by name; `parts.py` says how one is added."""

from lcdist.evaluate.longppl import LONGPPL
from lcdist.evaluate.perplexity import PERPLEXITY
from lcdist.evaluate.position import POSITION
from lcdist.evaluate.tasks.retrieval import NEEDLE, PASSKEY
from lcdist.evaluate.tasks.ruler_part import RULER_PART

_KINDS = (PERPLEXITY, POSITION, LONGPPL, PASSKEY, NEEDLE, RULER_PART)
PART_KINDS = {kind.name: kind for kind in _KINDS}
