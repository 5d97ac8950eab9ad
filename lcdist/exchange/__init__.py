"""Four exchanges between context-parallel ranks: ring, shift, gather, swap.

Each exchange is linear, so its backward is its exact adjoint. Each call posts its messages and
returns at once, so that computation before the wait overlaps with communication. A group is a
process group, one rank of a `VirtualGroup`, or None for a single process.
"""

from lcdist.exchange.clock import Stopwatch
from lcdist.exchange.gather import gather
from lcdist.exchange.p2p import Group, group_rank, group_size
from lcdist.exchange.pending import Pending
from lcdist.exchange.ring import GradRing, Visit, ring, ring_with_gradients
from lcdist.exchange.shift import Interval, shift
from lcdist.exchange.swap import swap
from lcdist.exchange.traffic import Traffic, traffic
from lcdist.exchange.virtual import VirtualGroup, VirtualGroupAborted, VirtualRank

__all__ = [
    "Group",
    "GradRing",
    "Interval",
    "Pending",
    "Stopwatch",
    "Traffic",
    "VirtualGroup",
    "VirtualGroupAborted",
    "VirtualRank",
    "Visit",
    "gather",
    "group_rank",
    "group_size",
    "ring",
    "ring_with_gradients",
    "shift",
    "swap",
    "traffic",
]
