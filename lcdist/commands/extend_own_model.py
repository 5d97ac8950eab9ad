"""`lcdist extend --model`: import a Hugging Face model, extend it, and export it."""

import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lcdist.commands.extend_choice import Asked, Choice, Chooser, Speed, duration
from lcdist.commands.extend_probe import probe_speed
from lcdist.commands.extend_steps import ExtendJob, console, launcher
from lcdist.commands.extend_times import (
    commands_elsewhere,
    errors_table,
    length_rows,
    lengths_table,
    refusal,
)
from lcdist.config import dump, load
from lcdist.config.rope import Rope
from lcdist.config.schema import Config
from lcdist.convert.huggingface.export_model import export_model
from lcdist.convert.huggingface.fit_config import fit_config, open_user_model
from lcdist.convert.huggingface.import_model import import_model
from lcdist.convert.lora.merge import merge
from lcdist.distributed.mesh import end_world
from lcdist.rundir.paths import METRICS_FILE
from lcdist.rundir.records import read_records
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

    def run(
        self,
        file: Path,
        settings_at: Callable[[int], list[str]],
        overrides: Sequence[str],
        asked: Asked,
        command: tuple[str, str],
    ) -> bool:
        """Run all stages in order; raise at the first failure.

        Args:
            file: a configuration, written for another model.
            settings_at: returns `section.key=value` for a length: of the method and of LoRA.
            overrides: the user's `section.key=value`.
            asked: length and minutes.
            command: what the user typed, and what gives the length to it, for another machine.

        Returns:
            Whether any stage had to run.
        """
        self.file, self.settings_at, self.overrides = file, settings_at, overrides
        source = str(self.source.resolve())
        job = {"text": self.text, "model": source, "asked": asked.to_table()}
        choice = self._chosen_before(job) or self._choose(asked, command)
        config = self._config_at(choice.length, choice.settings)
        self.claim_folder({"extend": dump(config), **job, "choice": asdict(choice)})
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
        fresh.append(self.train("extend", "extending", [str(config_file)], config))
        if fresh[-1]:
            self._print_time(choice)
        fresh += [
            self.evaluate(config, "model", [f"data.path={self.folder / 'data'}"], labels),
            self.sample(),
            self._export(config),
        ]
        return self.report(any(fresh))

    # --- length and steps -------------------------------------------------------------------------

    def _chosen_before(self, job: Mapping[str, Any]) -> Choice | None:
        """Return the choice of an interrupted or finished job; None for a new one."""
        before = self.read_job()
        if "choice" not in before:
            return None
        if any(before[key] != value for key, value in job.items()):
            self.refuse_folder()
        return Choice(**before["choice"])

    def _choose(self, asked: Asked, command: tuple[str, str]) -> Choice:
        """Choose length and steps, and say so; raise ValueError, with a table, if nothing fits."""
        chooser = Chooser(self._config_at, self.ranks, self.hf.seqlen, asked, self._probe)
        choice = chooser.choose()
        if choice is not None:
            for line in choice.said:
                console.print(line, soft_wrap=True)
            return choice
        lengths = {factor * self.hf.seqlen for factor in (2, 4, 8)} | {asked.length or 0}
        lengths = sorted(length for length in lengths if length > self.hf.seqlen)
        rows = length_rows(lengths, chooser)
        for line in chooser.reasons:
            console.print(line, soft_wrap=True)
        console.print(lengths_table(rows))
        console.print(errors_table())
        for line in commands_elsewhere(rows, *command):
            console.print(line, soft_wrap=True)
        raise ValueError(refusal(chooser.reasons, rows))

    def _probe(self, length: int, more: Sequence[str]) -> Speed:
        """Time training steps at short lengths, on all ranks, with more `section.key=value`."""
        console.print("Timing short steps of this model on this machine.")

        def config_at(short: int) -> Config:
            words = self._words_at(short, more)
            attention = load(self.file, words).attention
            return replace(whole, attention=attention, train=replace(whole.train, seqlen=short))

        def start(words: Sequence[str]) -> None:
            self.start([*launcher(self.ranks), "-m", "lcdist", *words])

        whole = self._config_at(length, more)
        return probe_speed(length, config_at, self.ranks, start)

    def _print_time(self, choice: Choice) -> None:
        """Print how long the training took, beside what was expected."""
        records = read_records(self.folder / "extend" / METRICS_FILE)
        seconds = [record.time.step for record in records]
        console.print(
            f"{len(seconds)} steps took {duration(sum(seconds))}, a step "
            f"{duration(statistics.median(seconds))}; expected were "
            f"{duration(choice.steps * choice.step_seconds)}, a step "
            f"{duration(choice.step_seconds)}",
            soft_wrap=True,
        )

    def _words_at(self, length: int, more: Sequence[str]) -> list[str]:
        """Return all `section.key=value` of a training at `length` tokens, the user's last."""
        lengths = [self.hf.seqlen]
        while 2 * lengths[-1] < length:
            lengths.append(2 * lengths[-1])
        evaluated = [f"train.seqlen={length}", f"evaluate.lengths={[*lengths, length]}"]
        paths = [f"log.folder={self.folder / 'extend'}", f"data.path={self.folder / 'data'}"]
        words = [*paths, f"parallel.cp_size={self.ranks}", *evaluated, *self.settings_at(length)]
        overrides = [word for word in self.overrides if not word.startswith(MODEL_SECTION)]
        return [*words, *more, *overrides, f"train.seqlen={length}"]

    def _config_at(self, length: int, more: Sequence[str] = ()) -> Config:
        """Return the configuration of a training at `length`, with the shape of this model."""
        config = load(self.file, self._words_at(length, more))
        config = fit_config(config, self.hf, self.overrides, self.ranks)
        start = self.folder / ("grown" if self._needs_landmark_row(config) else "model")
        return replace(config, checkpoint=replace(config.checkpoint, load=str(start)))

    # --- stages -----------------------------------------------------------------------------------

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
