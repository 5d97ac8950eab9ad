"""`lcdist extend --model`: import a Hugging Face model, extend it, and export it."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lcdist.commands.extend_steps import ExtendJob, console
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


class OwnModelJob(ExtendJob):
    """Import a Hugging Face folder, extend, evaluate and export the model."""

    titles = ("import", "tokenizing", "extending", "perplexity by length, before and after")
    titles += ("a sample", "export", "report")
    runs = ("extend",)

    def open(self, source: Path, text: str) -> None:
        """Read the model's config.

        Args:
            source: Hugging Face folder with its tokenizer.
            text: folder or file of text.
        """
        self.source, self.text = source, text
        self.hf = open_user_model(source)
        self.name = source.resolve().name

    def run(self, file: Path, settings: Sequence[str]) -> bool:
        """Run all stages in order; raise at the first failure.

        Args:
            file: a configuration, written for another model.
            settings: `section.key=value` overrides.

        Returns:
            Whether any stage had to run.
        """
        config = self._fit_config(file, settings)
        # Report conflicting settings now instead of in the middle of the job.
        make_plan(config, self.ranks)
        source = str(self.source.resolve())
        self.claim_folder({"extend": dump(config), "text": self.text, "model": source})
        config_file = self.folder / "extend.toml"
        write_file(config_file, dump(config))
        labels = {
            "before_label": f"{self.name} as it came, made for {self.hf.seqlen} tokens",
            "after_label": f"extended to {config.train.seqlen} with {config.attention.method}",
        }
        self._record_facts(config)
        fresh = [self._import("model", self.hf.model.vocab_size)]
        if self._needs_landmark_row(config):
            fresh.append(self._import("grown", config.model.vocab_size))
        fresh.append(self.tokenize(self.text, "--tokenizer", str(self.source)))
        self.check_held_out_text(config)
        fresh += [
            self.train("extend", "extending", [str(config_file)], config),
            self.evaluate(config, "model", [f"data.path={self.folder / 'data'}"], labels),
            self.sample(),
            self._export(config),
        ]
        return self.report(any(fresh))

    def _fit_config(self, file: Path, settings: Sequence[str]) -> Config:
        """Return the configuration in `file` with the shape and paths of this model."""
        model_settings = [word for word in settings if word.startswith(MODEL_SECTION)]
        paths = [f"log.folder={self.folder / 'extend'}", f"data.path={self.folder / 'data'}"]
        others = [word for word in settings if word not in model_settings]
        config = load(file, [*paths, f"parallel.cp_size={self.ranks}", *others])
        config = fit_config(config, self.hf, model_settings, self.ranks)
        start = self.folder / ("grown" if self._needs_landmark_row(config) else "model")
        return replace(config, checkpoint=replace(config.checkpoint, load=str(start)))

    def _needs_landmark_row(self, config: Config) -> bool:
        """Return whether landmarks need an embedding row that the model does not have.

        The perplexity before the extension is measured without that row.
        """
        return config.model.vocab_size > self.hf.model.vocab_size

    def _import(self, name: str, vocab_size: int) -> bool:
        """Import the model as the checkpoint `name` with `vocab_size` tokens."""
        out = self.folder / name
        if out.exists() and name in self._facts():
            return False
        self.print_title("import", f" of {self.source}")
        _remove(out)
        imported = import_model(self.source, out, [f"model.vocab_size={vocab_size}"])
        end_world()
        summary = f"{imported.num_parameters:,} parameters; {imported.difference}"
        console.print(summary)
        self._record(name, summary)
        return True

    def _export(self, config: Config) -> bool:
        """Export the extended model as a Hugging Face folder, its adapters merged."""
        out, merged = self.folder / "exported", self.folder / "merged"
        if out.exists() and "exported" in self._facts():
            return False
        self.print_title("export")
        _remove(out)
        source = self.folder / "extend"
        if config.lora.rank:
            _remove(merged)
            merge(source, merged)
            end_world()
            source = merged
        exported = export_model(source, out)
        end_world()
        _remove(merged)
        console.print(f"{exported.difference}")
        self._record("exported", str(exported.difference))
        return True

    def _record_facts(self, config: Config) -> None:
        """Record what the report says about the model and its extension."""
        lora, trained = config.lora, "all weights"
        if lora.rank:
            in_full = [key for key in ("embeddings", "norms", "head") if getattr(lora, key)]
            trained = f"LoRA of rank {lora.rank} on {', '.join(lora.targets)}, merged at the end"
            trained += f"; {' and '.join(in_full)} whole" if in_full else ""
        self._record("source", self.name)
        self._record("seqlen", self.hf.seqlen)
        self._record("rotation", [_describe(self.hf.model.rope), _describe(config.model.rope)])
        self._record("trained", trained)

    def _facts(self) -> dict[str, Any]:
        file = self.folder / "conversion.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def _record(self, key: str, value: Any) -> None:
        table = {**self._facts(), key: value}
        write_file(self.folder / "conversion.json", json.dumps(table, indent=1) + "\n")


def _describe(rope: Rope) -> str:
    """Return a rotation as one line of text."""
    table = asdict(rope)
    kind = table.pop("scaling")
    numbers = [f"{key} {value:g}" for key, value in table.items() if isinstance(value, float)]
    return ", ".join([kind, *numbers])


def _remove(folder: Path) -> None:
    """Remove what an interrupted stage of this job left behind."""
    if folder.exists():
        shutil.rmtree(folder)
