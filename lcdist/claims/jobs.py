"""Jobs of the claims: trainings, and how each trained model is read.

A job is the unit that can be run alone, on another machine if you like, and goes on where it was
interrupted. All trainings from random weights take the same number of steps. They read the same
samples in the same order, but for the stages of a growing power.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# Blocks of landmark attention at the training length, its landmarks included.
_BLOCKS = 8
TOP_K = (1, 2, 4, 8)
PATTERNS = ("fixed", "flow", "longmixed", "s2")
# Begins the names of jobs that adapt a trained model.
ADAPTED = "extend-"
# How many times the length models of SCCA are extended to.
EXTENDED = 4
# Powers of a re-weighting that grows in training, at equal steps each.
POWERS = (1, 3, 7, 15)


@dataclass(frozen=True)
class Read:
    """One way to read a trained model.

    Attributes:
        name: of the reading.
        words: overrides of the trained configuration.
        passkey: whether to ask for passkeys too.
        short_passkey: whether to ask for them only up to half the longest length: with dynamic NTK
            each new token reads the whole text again.
        host_memory: whether passkeys are read with blocks in host memory (landmark attention).
    """

    name: str
    words: tuple[str, ...] = ()
    passkey: bool = True
    short_passkey: bool = False
    host_memory: bool = False


@dataclass(frozen=True)
class Job:
    """A training and the readings of its result.

    Attributes:
        name: of the job and its folder.
        words: overrides of the profile's configuration.
        reads: how the result is read.
        start: job whose result is adapted by LoRA to EXTENDED times its length; empty: none.
        powers: if given, stages of equal length with these powers of the re-weighting.
        equal_flops: whether as many steps are taken as cost what those of the pattern s2 cost.
    """

    name: str
    words: tuple[str, ...]
    reads: tuple[Read, ...]
    start: str = ""
    powers: tuple[int, ...] = ()
    equal_flops: bool = False


def all_jobs(length: int, lora: int = 8) -> tuple[Job, ...]:
    """Return the jobs of models trained at `length` tokens, in an order in which they can be run.

    Args:
        length: a multiple of 32.
        lora: rank of the adapters.
    """
    ntk = ("model.rope.scaling=dynamic", "model.rope.factor=4.0")
    ntk += (f"model.rope.original_seqlen={length}",)

    def with_ntk(name: str) -> tuple[Read, ...]:
        return Read(name), Read(f"{name}-ntk", ntk, short_passkey=True)

    def lssar(name: str, *words: str, later: bool = False) -> Job:
        reads = (Read(name),)
        if later:
            reweighted = ("attention.reweight=true", "attention.power=15.0")
            reads += (Read(f"{name}-read-p15", reweighted),)
        return Job(name, ("attention.method=lssar", *words), reads)

    def tensorized(name: str, *words: str) -> Job:
        method = ("attention.method=tensorized", f"attention.modes=[{length // 8}]")
        return Job(name, (*method, *words), (Read(name),))

    return (
        Job("full", ("attention.method=full",), with_ntk("full")),
        *(
            Job(
                f"coca-{variant}",
                ("attention.method=coca", f"attention.variant={variant}"),
                with_ntk(f"coca-{variant}"),
            )
            for variant in ("slack", "strict")
        ),
        Job(
            "length-scaled",
            ("attention.method=full", f"attention.length_scale={length}"),
            (Read("length-scaled"),),
        ),
        lssar("lssa", "attention.reweight=false", later=True),
        lssar("lssar-p3", "attention.power=3.0", later=True),
        lssar("lssar-p15", "attention.power=15.0"),
        # The second differs from the first in its powers alone: its rate falls in the same way.
        *(
            Job(name, ("attention.method=lssar",), (Read(name),), powers=powers)
            for name, powers in (
                ("lssar-growing", POWERS),
                ("lssar-staged", POWERS[-1:] * len(POWERS)),
            )
        ),
        tensorized("tensorized-mode"),
        tensorized("tensorized-global", "attention.pe=global"),
        tensorized("tensorized-layers", "attention.layers=full@-1"),
        _landmark(length),
        *_extensions(length, lora),
    )


def _landmark(length: int) -> Job:
    reads = [Read("landmark")]
    for top_k in TOP_K:
        words = (f"attention.top_k={top_k}", "attention.select_tokens=1")
        reads.append(Read(f"landmark-k{top_k}", words, host_memory=True))
    method = ("attention.method=landmark", f"attention.block_size={length // _BLOCKS}")
    return Job("landmark", method, tuple(reads))


def _extensions(length: int, lora: int) -> list[Job]:
    """Return the jobs that extend the job `full` with SCCA's patterns and with full attention."""
    longer = EXTENDED * length
    common = (
        *(f"train.seqlen={longer}", "model.rope.scaling=pi", f"model.rope.factor={EXTENDED}.0"),
        *(f"lora.rank={lora}", f"lora.alpha={2 * lora}"),
        *("lora.embeddings=true", "lora.norms=true"),
    )
    found = []
    for pattern in (*PATTERNS, "full"):
        name = f"{ADAPTED}{pattern}"
        method: tuple[str, ...] = ("attention.method=full",)
        if pattern != "full":
            # Four chunks, as LongLoRA (arXiv:2309.12307).
            chunk = f"attention.chunk_size={longer // 4}"
            method = ("attention.method=scca", f"attention.pattern={pattern}", chunk)
        words = (*common, *method)
        found.append(Job(name, words, (Read(name, passkey=False),), start="full"))
        if pattern != "s2":
            same = f"{name}-flops"
            reads = (Read(same, passkey=False),)
            found.append(Job(same, words, reads, start="full", equal_flops=True))
    return found


def jobs_named(jobs: Sequence[Job], names: Sequence[str]) -> list[Job]:
    """Return the jobs of these names, each behind the job that it starts from; all if none.

    Raises:
        ValueError: there is no job of a name.
    """
    by_name = {job.name: job for job in jobs}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(f"--only {unknown[0]}: there is no such job; jobs: {', '.join(by_name)}")
    wanted = set(names or by_name)
    wanted |= {by_name[name].start for name in wanted} - {""}
    return [job for job in jobs if job.name in wanted]
