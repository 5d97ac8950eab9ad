"""Four exchanges between context-parallel ranks: ring, shift, gather, swap.

Each is linear, so each has an exact adjoint: that is its backward. Each posts its messages and
returns, so that what is computed before the wait hides them. A group is a process group, one rank
of a `VirtualGroup`, or None for a single process.
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
