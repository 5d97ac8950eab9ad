"""Write a configuration for a model, a length and a number of GPUs.

Rates, batches and options are those of `configs/README.md`, which has their sources. The mesh is
the smallest that fits the GPUs' memory by the plan.
"""

import contextlib
import json
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass

from lcdist.config import ConfigError
from lcdist.config.rope import RopePlain
from lcdist.config.schema import Config
from lcdist.config.source import Source
from lcdist.config.stages import parse_with_source
from lcdist.hardware.gpu_specs import Hardware
from lcdist.plan.plan import Plan, make_plan

EXTEND, LORA = "extend", "lora"
RECIPES = {EXTEND: "train all weights", LORA: "train LoRA adapters, embeddings and norms"}
_CAPTIONS = {EXTEND: "Trains all weights", LORA: "Trains adapters, embeddings and norms"}
GIB = 2**30
MOST_GPUS = 1024
# Samples of a step in LongLoRA and YaRN at up to 65,536 tokens; longer ones share as many tokens.
SAMPLES, TOKENS_OF_A_STEP = 64, 2**21
CONSTANT = ["lr = 2e-5", "weight_decay = 0.0", 'schedule = "constant"', "warmup_steps = 20"]
# The weights have to adapt to these methods, beyond a longer rotation.
ADAPT = {
    "coca": ["lr = 1e-4", "min_lr = 1e-5", "warmup_steps = 10"],
    "lssar": ["lr = 1e-4", "min_lr = 1e-5", "warmup_steps = 10"],
    "landmark": ["lr = 2e-5", "warmup_steps = 30"],
}
# It counts distances in tokens of a block and in blocks: none grows beyond the model's context.
UNSCALED = {"tensorized"}


@dataclass(frozen=True)
class Mesh:
    """Hold the sizes of a mesh, in ranks; `data` is the data-parallel size."""

    tensor: int
    context: int
    data: int


@dataclass(frozen=True)
class Recipe:
    """Write the configuration of one model, length and number of GPUs.

    Attributes:
        kind: A key of RECIPES.
        method: Attention method.
        source: The model.
        folder: The import that the run starts from.
        length: Of the training, in tokens.
        gpus: Number of ranks.
        hardware: Each GPU.
        data: Folder of tokens.
        before: Commands that make folder and data, as comments say them.
    """

    kind: str
    method: str
    source: Source
    folder: str
    length: int
    gpus: int
    hardware: Hardware
    data: str
    before: tuple[str, ...]

    def fit(self) -> str:
        """Return the text of the configuration, on the smallest mesh that fits.

        Raises:
            ConfigError: If there is no mesh on which the run is legal.
            ValueError: If none fits the memory; the message says what does.
        """
        mesh, plan = self._smallest(self.gpus)
        if _fits(plan):
            return self.text(mesh, plan)
        memory = plan.memory
        raise ValueError(
            f"--gpus {self.gpus}: {self.length:,} tokens need {memory.device_bytes / GIB:.1f} GiB "
            f"on each {self.hardware.name}, and {memory.usable_bytes / GIB:.1f} GiB may be filled; "
            f"{self._remedy()}"
        )

    def _remedy(self) -> str:
        """Return what would fit."""
        gpus, or_lora = self.gpus, ", or the recipe lora" if self.kind == EXTEND else ""
        while 2 * gpus <= MOST_GPUS:
            gpus *= 2
            with contextlib.suppress(ConfigError):
                if _fits(self._smallest(gpus)[1]):
                    return f"use --gpus {gpus}{or_lora}"
        return f"use a smaller --length{or_lora}"

    def _smallest(self, gpus: int) -> tuple[Mesh, Plan]:
        """Return the smallest mesh that fits, else the one that needs the least memory.

        Raises:
            ConfigError: If the run is legal on none: the mistakes on the first.
        """
        legal: list[tuple[Mesh, Plan]] = []
        mistakes: list[ConfigError] = []
        for mesh in self._meshes(gpus):
            try:
                plan = make_plan(self._config(mesh), gpus, self.hardware)
            except ConfigError as error:
                # Most often heads that cannot be divided so.
                mistakes.append(error)
                continue
            if _fits(plan):
                return mesh, plan
            legal.append((mesh, plan))
        if not legal:
            raise mistakes[0]
        return min(legal, key=lambda each: each[1].memory.device_bytes)

    def _meshes(self, gpus: int) -> Iterator[Mesh]:
        """Yield meshes, those with the fewest ranks to a sample first.

        Tensor parallelism, which sends within a node, has at most eight ranks.
        """
        for ranks in (size for size in range(1, gpus + 1) if gpus % size == 0):
            if gpus // ranks <= self._samples or ranks == gpus:
                for tensor in (size for size in (1, 2, 4, 8) if ranks % size == 0):
                    yield Mesh(tensor, ranks // tensor, gpus // ranks)

    @property
    def _samples(self) -> int:
        return max(1, min(SAMPLES, TOKENS_OF_A_STEP // self.length))

    def _config(self, mesh: Mesh) -> Config:
        return parse_with_source(tomllib.loads(self.text(mesh)), self.source)

    def text(self, mesh: Mesh, plan: Plan | None = None) -> str:
        """Return the configuration; `plan` adds what is known about it to the comments."""
        samples = -(-self._samples // mesh.data) * mesh.data
        times = self.length / self.source.seqlen
        lines = [
            *textwrap.wrap(
                f"{_CAPTIONS[self.kind]} of {self.source.name}, made for "
                f"{self.source.seqlen:,} tokens, at {self.length:,} tokens with the attention "
                f"method {self.method}. Keys that are not here have the defaults of "
                "lcdist/config/schema.py.",
                width=98,
                initial_indent="# ",
                subsequent_indent="# ",
            ),
            f"# GPUs: {self.gpus} ({self.hardware.name})",
            *(f"# {line}" for line in self.before),
            "",
            "[model]",
            "# Architecture, vocabulary and weights.",
            f"from = {json.dumps(self.folder)}",
            *self._rope(times),
            "",
            "[attention]",
            f'method = "{self.method}"',
            *self._options(),
            *self._lora(),
            "",
            "[parallel]",
            *self._mesh_lines(mesh, plan),
            "# Longest wait of a rank for others, in seconds.",
            "timeout = 1800.0",
            "",
            "[data]",
            f"path = {json.dumps(self.data)}",
            "",
            "[train]",
            f"seqlen = {self.length}",
            "steps = 1000",
            "micro_batch_size = 1",
            f"# Samples a step, over all ranks: {samples * self.length:,} tokens.",
            f"global_batch_size = {samples}",
            *self._saving(plan),
            "",
            "[optim]",
            *(ADAPT.get(self.method, CONSTANT)),
            "",
            "[checkpoint]",
            "# Steps between two saves; the newest ones are kept.",
            "every = 50",
            "",
            "[evaluate]",
            f"lengths = {self._lengths()}",
            f"tokens = {max(2**20, 8 * self.length)}",
            "",
            "[log]",
            f"folder = {json.dumps(f'runs/{self.source.name}-{self.kind}-{self.length}')}",
        ]
        return "\n".join(lines) + "\n"

    def _rope(self, times: float) -> list[str]:
        rope = self.source.model.rope
        if times <= 1 or self.method in UNSCALED:
            return []
        rule = "pi" if self.kind == LORA else "yarn"
        if not isinstance(rope, RopePlain):
            rule = rope.scaling
        factor = f"{times:.10g}"
        return [
            "",
            "[model.rope]",
            f"# The model's own rotation, made for a context {factor} times as long.",
            f'extend = "{rule}:{factor}"',
        ]

    def _options(self) -> list[str]:
        if self.method == "scca":
            chunk = "# Half of the heads see chunks shifted by half a chunk."
            return [chunk, 'pattern = "fixed"', f"chunk_size = {self.length // 4}"]
        if self.method == "tensorized":
            return ["# Tokens of a block; attention reads blocks by their means.", "modes = [512]"]
        return []

    def _lora(self) -> list[str]:
        if self.kind != LORA:
            return []
        return [
            "",
            "[lora]",
            "# As in LongLoRA (arXiv:2309.12307).",
            "rank = 8",
            "alpha = 16.0",
            'targets = ["q", "k", "v", "o"]',
            "embeddings = true",
            "norms = true",
        ]

    def _mesh_lines(self, mesh: Mesh, plan: Plan | None) -> list[str]:
        lines = []
        if plan is not None:
            used, usable = plan.memory.device_bytes / GIB, plan.memory.usable_bytes / GIB
            lines = [
                "# The smallest mesh that fits by the plan, which counts "
                f"{used:.1f} of {usable:.1f} GiB a GPU.",
                f"# Data-parallel ranks: {mesh.data}.",
            ]
        lines += [f"tp_size = {mesh.tensor}", f"cp_size = {mesh.context}"]
        return [*lines, *(["sequence_parallel = true"] if mesh.tensor > 1 else [])]

    def _saving(self, plan: Plan | None) -> list[str]:
        lines = ['dtype = "bf16"']
        if plan is not None:
            kinds = dict.fromkeys(part.recompute for part, _ in plan.memory.layer_parts)
            lines.append(
                f"# Left to the plan, here: recompute {' and '.join(kinds)}"
                f"{', offload to the host' if plan.memory.offloads else ''}."
            )
        return [*lines, 'recompute = "auto"']

    def _lengths(self) -> list[int]:
        first = min(self.source.seqlen, self.length)
        lengths = [first]
        while lengths[-1] * 2 < self.length:
            lengths.append(lengths[-1] * 2)
        return lengths if lengths[-1] == self.length else [*lengths, self.length]


def _fits(plan: Plan) -> bool:
    return plan.memory.device_bytes <= plan.memory.usable_bytes
