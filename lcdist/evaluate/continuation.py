"""Continue texts with a loaded model, on any mesh."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from lcdist.data.datasets.build import held_out_folder
from lcdist.data.tokenizers.files import TextTokenizer, bos_prefix, open_tokenizer
from lcdist.distributed.mesh import Mesh, world_size
from lcdist.distributed.rank_zero import run_on_rank_zero
from lcdist.evaluate.loaded_model import LoadedModel, load_model
from lcdist.inference.generate import generate_batch
from lcdist.inference.settings import Figures, Generation, Watch
from lcdist.inference.text_stream import TextStream, TextWatch

# Tokens whose keys and values are kept at once: 16 GiB of a model of 8 billion parameters in bf16.
CACHED_TOKENS = 2**17
DEFAULT = Generation()


@dataclass
class Continued:
    """Texts and their continuations.

    Attributes:
        texts: Prompt and continuation each.
        figures: What they took on this rank.
    """

    texts: list[str]
    figures: Figures


def continue_tokens(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    how: Generation,
    watch: Watch | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt; all ranks call it, with the same prompts.

    Data-parallel ranks share the prompts. As many are continued at once as fit CACHED_TOKENS.

    Args:
        loaded: the model.
        prompts: tokens, without landmarks.
        how: limits and sampling.
        watch: what is told of this rank's progress.

    Returns:
        New tokens for each prompt, the same on all ranks.
    """
    mesh = loaded.mesh
    own = [list(prompt) for prompt in prompts[mesh.dp_rank :: mesh.dp_size]]
    found = []
    for batch in _batches(own, how.max_new_tokens):
        tensors = [torch.tensor(p, dtype=torch.int64, device=mesh.device) for p in batch]
        texts = generate_batch(loaded.chunks[0], tensors, how, watch)
        found += [t[len(p) :].tolist() for t, p in zip(texts, batch, strict=True)]
    return _of_all_ranks(found, len(prompts), mesh)


def _batches(prompts: Sequence[list[int]], new: int) -> list[list[list[int]]]:
    """Split prompts into batches whose caches fit, in their order; a long prompt is alone."""
    batches: list[list[list[int]]] = []
    room = 0
    for prompt in prompts:
        needed = len(prompt) + new
        if needed > room:
            batches.append([])
            room = CACHED_TOKENS
        batches[-1].append(prompt)
        room -= needed
    return batches


def _of_all_ranks(found: list[list[int]], count: int, mesh: Mesh) -> list[list[int]]:
    """Return all data-parallel ranks' results in the order of the prompts."""
    if mesh.dp_size == 1:
        return found
    by_rank: list[list[list[int]]] = [[]] * mesh.dp_size
    dist.all_gather_object(by_rank, found, group=mesh.dp_group)
    return [by_rank[i % mesh.dp_size][i // mesh.dp_size] for i in range(count)]


def generate_text(
    path: Path | str,
    prompts: Sequence[str],
    overrides: Sequence[str] = (),
    how: Generation = DEFAULT,
    *,
    stop: Sequence[str] = (),
    watch: TextWatch | None = None,
) -> Continued:
    """Continue prompts with a checkpoint's model; by default the whole world is tensor parallel.

    Args:
        path: a checkpoint, or a run folder for its latest.
        prompts: the texts; those of rank 0 count.
        overrides: `section.key=value`, over the checkpoint's own configuration.
        how: limits and sampling, by default 128 tokens, each the most likely one; the end of a text
            is added to what stops it.
        stop: texts of one token each that end a continuation.
        watch: what is called with a single text as it grows.

    Raises:
        ValueError: an attention method of the model cannot decode, or `how` does not fit it.
    """
    loaded = load_model(Path(path), overrides, [f"parallel.tp_size={world_size()}"])
    prompts = run_on_rank_zero(lambda: list(prompts))
    check_decodes(loaded, how)
    tokenizer = open_tokenizer(held_out_folder(loaded.plan.config.data))
    ends = {_stop_token(text, tokenizer) for text in stop}
    if tokenizer.eos_id is not None:
        ends.add(tokenizer.eos_id)
    how = replace(how, stops=how.stops | ends)
    prompt_ids = [[*bos_prefix(tokenizer), *tokenizer.encode(prompt)] for prompt in prompts]
    figures: list[Figures] = []
    text_watch = watch or TextWatch()
    stream = None
    if text_watch.on_text is not None and len(prompts) == 1:
        stream = TextStream(tokenizer, prompt_ids[0], text_watch.on_text)
    on_token = None if stream is None else lambda token, _: stream.add(token)
    new = continue_tokens(
        loaded, prompt_ids, how, Watch(text_watch.progress, on_token, figures.append)
    )
    if stream is not None:
        stream.end()
    texts = [
        tokenizer.decode([token for token in [*prompt, *more] if token != tokenizer.eos_id])
        for prompt, more in zip(prompt_ids, new, strict=True)
    ]
    return Continued(texts, Figures.total(figures))


def check_decodes(loaded: LoadedModel, how: Generation) -> None:
    """Raise ValueError if the model's attention cannot decode, or not with these settings."""
    for layer in loaded.plan.layers:
        if "decode" not in layer.method.supports:
            raise ValueError(f"attention method '{layer.method.name}' cannot generate text")
    blocks = how.device_blocks
    if blocks is None:
        return
    most = [getattr(layer.options, "top_k", None) for layer in loaded.plan.layers]
    chosen = [top_k for top_k in most if top_k is not None]
    if not chosen:
        raise ValueError(
            f"--device-blocks {blocks}: only landmark attention with attention.top_k reads chosen "
            "blocks; leave the option out, or give attention.top_k=NUMBER"
        )
    if blocks < max(chosen):
        raise ValueError(
            f"--device-blocks {blocks}: a token reads attention.top_k = {max(chosen)} blocks, and "
            f"all of them must be on the device: give --device-blocks {max(chosen)} or more"
        )


def _stop_token(text: str, tokenizer: TextTokenizer) -> int:
    """Return the token of a text that ends a continuation; raise ValueError if it is not one."""
    tokens = tokenizer.encode(text)
    if len(tokens) != 1:
        raise ValueError(
            f"--stop {text!r}: is {len(tokens)} tokens of the model's vocabulary; it must be one"
        )
    return tokens[0]
