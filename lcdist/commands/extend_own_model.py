"""The main job with a model of the user's own: from Hugging Face's format, extended, and back.

Imported by extend.py beside it.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lcdist.commands.extend_steps import Job, console
from lcdist.config import dump, load
from lcdist.config.rope import Rope
from lcdist.config.schema import Config
from lcdist.convert.huggingface.export_model import export_model
from lcdist.convert.huggingface.fit_config import fit_config, open_user_model
from lcdist.convert.huggingface.import_model import import_model
from lcdist.convert.lora.merge import merge
from lcdist.distributed.mesh import end_world
from lcdist.plan import make_plan
from lcdist.utils.atomic import write_file

MODEL_SECTION = "model."


class OwnModel(Job):
    """A Hugging Face folder is imported, extended, evaluated and exported."""

    titles = ("import", "tokenizing", "extending", "perplexity by length, before and after")
    titles += ("a sample", "export", "report")
    stages = ("extend",)

    def __init__(self, folder: Path, ranks: int, source: Path, text: str) -> None:
        super().__init__(folder, ranks)
        self.source, self.text = source, text
        self.hf = open_user_model(source)
        self.name = source.resolve().name

    def run(self, file: Path, words: Sequence[str]) -> bool:
        """All stages in order; whether anything was left to do. Raises at the first failure.

        file: a configuration for some other model. words: `section.key=value` over it.
        """
        config = self._config(file, words)
        # Every contradiction now, and not from a launcher in the middle of the job.
        make_plan(config, self.ranks)
        source = str(self.source.resolve())
        self.claim_name({"extend": dump(config), "text": self.text, "model": source})
        resolved = self.folder / "extend.toml"
        write_file(resolved, dump(config))
        labels = {
            "before_label": f"{self.name} as it came, made for {self.hf.seqlen} tokens",
            "after_label": f"extended to {config.train.seqlen} with {config.attention.method}",
        }
        self._about(config)
        done = [
            self._import("model", self.hf.model.vocab_size),
            self._grown(config) and self._import("grown", config.model.vocab_size),
            self.tokenize(self.text, "--tokenizer", str(self.source)),
        ]
        self.check_text(config)
        done += [
            self.train("extend", "extending", [str(resolved)], config),
            self.evaluate(config, "model", [f"data.path={self.folder / 'data'}"], labels),
            self.sample(),
            self._export(config),
        ]
        return self.report(any(done))

    def _config(self, file: Path, words: Sequence[str]) -> Config:
        of_model = [word for word in words if word.startswith(MODEL_SECTION)]
        own = [f"log.folder={self.folder / 'extend'}", f"data.path={self.folder / 'data'}"]
        own += [f"parallel.cp_size={self.ranks}"]
        config = load(file, [*own, *(word for word in words if word not in of_model)])
        config = fit_config(config, self.hf, of_model, self.ranks)
        start = self.folder / ("grown" if self._grown(config) else "model")
        return replace(config, checkpoint=replace(config.checkpoint, load=str(start)))

    def _grown(self, config: Config) -> bool:
        """Whether landmarks need a row that the model lacks: perplexity before is without it."""
        return config.model.vocab_size > self.hf.model.vocab_size

    def _import(self, name: str, vocab_size: int) -> bool:
        """The checkpoint `name`, of so many tokens."""
        out, told = self.folder / name, self._told()
        if out.exists() and name in told:
            return False
        self.title("import", f" of {self.source}")
        _clear(out)
        done = import_model(self.source, out, [f"model.vocab_size={vocab_size}"])
        end_world()
        console.print(f"{done.num_parameters:,} parameters; {done.difference}")
        self._tell(name, f"{done.num_parameters:,} parameters; {done.difference}")
        return True

    def _export(self, config: Config) -> bool:
        """The extended model as a Hugging Face folder, its adapters merged."""
        out, merged = self.folder / "exported", self.folder / "merged"
        if out.exists() and "exported" in self._told():
            return False
        self.title("export")
        _clear(out)
        source = self.folder / "extend"
        if config.lora.rank:
            _clear(merged)
            merge(source, merged)
            end_world()
            source = merged
        done = export_model(source, out)
        end_world()
        _clear(merged)
        console.print(f"{done.difference}")
        self._tell("exported", str(done.difference))
        return True

    def _about(self, config: Config) -> None:
        """What the report says of the model and of what was made of it."""
        lora, tuned = config.lora, "all weights"
        if lora.rank:
            beside = [key for key in ("embeddings", "norms", "head") if getattr(lora, key)]
            tuned = f"LoRA of rank {lora.rank} on {', '.join(lora.targets)}, merged at the end"
            tuned += f"; {' and '.join(beside)} whole" if beside else ""
        self._tell("source", self.name)
        self._tell("seqlen", self.hf.seqlen)
        self._tell("rotation", [_words(self.hf.model.rope), _words(config.model.rope)])
        self._tell("trained", tuned)

    def _told(self) -> dict[str, Any]:
        file = self.folder / "conversion.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def _tell(self, key: str, value: Any) -> None:
        table = {**self._told(), key: value}
        write_file(self.folder / "conversion.json", json.dumps(table, indent=1) + "\n")


def _words(rope: Rope) -> str:
    """A rotation in a line."""
    table = asdict(rope)
    kind = table.pop("scaling")
    numbers = [f"{key} {value:g}" for key, value in table.items() if isinstance(value, float)]
    return ", ".join([kind, *numbers])


def _clear(folder: Path) -> None:
    """Remove what an interrupted stage of this job has left."""
    if folder.exists():
        shutil.rmtree(folder)
