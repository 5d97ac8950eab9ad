"""Evaluate a checkpoint with lm-evaluation-harness, without exporting it.

    import lm_eval
    from lcdist.evaluate.harness import CheckpointLM

    found = lm_eval.simple_evaluate(model=CheckpointLM("runs/first"), tasks=["lambada_openai"])

On several ranks every rank runs the same program (`launch/run.py`) and asks the same questions; by
default they are context parallel. The harness returns the results on rank 0, and None on others. It
is optional: `pip install 'lcdist[harness]'`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)

from lcdist.data.datasets.build import held_out_folder
from lcdist.data.tokenizers.files import bos_prefix, open_tokenizer
from lcdist.distributed.mesh import world_size
from lcdist.evaluate.continuation import check_decodes, continue_tokens
from lcdist.evaluate.loaded_model import load_model
from lcdist.evaluate.scoring import Pair, score_continuations
from lcdist.inference.sampling import Sampling
from lcdist.inference.settings import Generation

MAX_NEW_TOKENS = 256
# What a task may ask of a generation; others are refused.
_KNOWN = {
    *("until", "do_sample", "temperature", "top_k", "top_p"),
    *("max_gen_toks", "max_new_tokens", "max_tokens"),
}


@register_model("lcdist")
class CheckpointLM(TemplateLM):
    """A checkpoint as a model of the harness.

    Args:
        path: a checkpoint, or a run folder for its latest.
        overrides: `section.key=value`, over the checkpoint's own configuration: a list, or a text
            with spaces between them.
        max_length: tokens of the longest context; beyond it the beginning is cut off. By default
            the length that the model was trained at.
        seed: of the sampling, for tasks that sample.
        harness: what the harness gives every model, such as batch_size and device: not used.
    """

    def __init__(
        self,
        path: str | Path,
        overrides: str | Sequence[str] = (),
        max_length: int | None = None,
        seed: int = 0,
        **harness: Any,
    ) -> None:
        super().__init__()
        unknown = harness.keys() - {"batch_size", "max_batch_size", "device"}
        if unknown:
            raise ValueError(f"CheckpointLM: {', '.join(sorted(unknown))}: no such argument")
        words = overrides.split() if isinstance(overrides, str) else list(overrides)
        self._loaded = load_model(Path(path), words, [f"parallel.cp_size={world_size()}"])
        config = self._loaded.plan.config
        self._tokenizer = open_tokenizer(held_out_folder(config.data))
        self.max_length = max_length or config.train.seqlen
        self._seed = seed

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, by which the harness's cache tells one from another."""
        return self._tokenizer.fingerprint

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Token that a text without context begins with: bos if texts have it, else eos."""
        return (bos_prefix(self._tokenizer) or [self.eot_token_id])[0]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **more: Any
    ) -> list[int]:
        """Return the tokens of a text; it begins as the documents that the model was trained on."""
        tokens = self._tokenizer.encode(string)
        prefix = [] if add_special_tokens is False else bos_prefix(self._tokenizer)
        return tokens if tokens[: len(prefix)] == prefix else [*prefix, *tokens]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], **more: Any
    ) -> list[tuple[float, bool]]:
        """Return log-likelihood, and whether it is the most likely, of each continuation."""
        return score_continuations(self._loaded, [self._cut(c, new) for _, c, new in requests])

    def _cut(self, context: Sequence[int], new: Sequence[int]) -> Pair:
        """Return a pair without the beginning of its context, if it is too long."""
        room = self.max_length + 1 - len(new)
        if room < 1:
            raise ValueError(
                f"max_length = {self.max_length}: a continuation has {len(new)} tokens; raise it"
            )
        return context[-room:], new

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each text, in windows of max_length tokens."""
        pairs, owners = list[Pair](), list[int]()
        for number, request in enumerate(requests):
            [text] = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, windows):
                pairs.append(window)
                owners.append(number)
        found = [0.0] * len(requests)
        scores = score_continuations(self._loaded, pairs, find_greedy=False)
        for owner, (score, _) in zip(owners, scores, strict=True):
            found[owner] += score
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each text, up to what ends it."""
        found = []
        for request in requests:
            text, options = request.args
            how, until = self._generation(options)
            room = self.max_length - how.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"max_length = {self.max_length}: {how.max_new_tokens} new tokens leave no "
                    "room for a context; raise it, or lower max_gen_toks of gen_kwargs"
                )
            [new] = continue_tokens(self._loaded, [self.tok_encode(text)[-room:]], how)
            known = [token for token in new if token not in how.stops]
            found.append(_before(self._tokenizer.decode(known), until))
        return found

    def _generation(self, options: Mapping[str, Any]) -> tuple[Generation, list[str]]:
        """Return how a task wants a text continued, and the texts that end it."""
        unknown = options.keys() - _KNOWN
        if unknown:
            raise ValueError(f"gen_kwargs: {', '.join(sorted(unknown))}: not known to lcdist")
        names = ("max_gen_toks", "max_new_tokens", "max_tokens")
        tokens = next((int(options[name]) for name in names if name in options), MAX_NEW_TOKENS)
        until = options.get("until") or []
        temperature = float(options.get("temperature") or 0.0)
        if not options.get("do_sample", temperature > 0):
            temperature = 0.0
        elif not temperature:
            temperature = 1.0
        top_k, top_p = options.get("top_k") or None, float(options.get("top_p") or 1.0)
        how = Generation(
            tokens, Sampling(temperature, self._seed, top_k, top_p), frozenset({self.eot_token_id})
        )
        check_decodes(self._loaded, how)
        return how, [until] if isinstance(until, str) else list(until)


def _before(text: str, ends: Sequence[str]) -> str:
    """Return the text up to the first of the texts that end it."""
    places = [text.find(end) for end in ends if end and end in text]
    return text[: min(places)] if places else text
