"""Open the tokenizer, the format of prompts and the text that cases are made with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lcdist.config.evaluate import EvaluateConfig
from lcdist.data.datasets.build import held_out_folder
from lcdist.data.datasets.split import TokenSplit
from lcdist.data.meta import META, REMAKE, check_vocabulary, read_meta
from lcdist.data.tokenizers.files import TextTokenizer, open_tokenizer
from lcdist.distributed.verify import refuse_damaged
from lcdist.evaluate.loaded_model import LoadedModel
from lcdist.evaluate.tasks.formats import PlainFormat, open_format
from lcdist.evaluate.tasks.haystack import Essay, essay
from lcdist.evaluate.tasks.predict import check_can_answer

# Each case begins at another place of so many times the longest length of text.
_LENGTHS_OF_TEXT = 4


@dataclass(frozen=True)
class TaskInputs:
    """Hold the tokenizer, format and text that cases are made with.

    Attributes:
        asked: what to measure.
        form: writes questions as tokens, and reads answers.
        text: of the held-out split; None: there is none, as for an imported model.
    """

    asked: EvaluateConfig
    form: PlainFormat
    text: Essay | None


def task_inputs(loaded: LoadedModel, with_text: bool) -> TaskInputs:
    """Open the tokenizer of a model and, where asked for, its held-out text.

    Raises:
        ValueError: the model cannot generate, there is no tokenizer, or it does not fit.
    """
    check_can_answer(loaded)
    config = loaded.plan.config
    folder = held_out_folder(config.data)
    tokenizer = open_tokenizer(folder)
    form = open_format(tokenizer, config.evaluate.prompt, [folder, loaded.checkpoint.path])
    text = None
    if (folder / META).is_file():
        meta, vocab_size = read_meta(folder), config.model.vocab_size
        check_vocabulary(meta, vocab_size, vocab_size - loaded.plan.shape.text_vocab_size)
        if with_text and "valid" in meta.tokens:
            if config.checkpoint.verify == "full":
                refuse_damaged(folder, meta.sha256 or {}, meta.files, META, REMAKE)
            tokens = _LENGTHS_OF_TEXT * max(config.evaluate.lengths)
            text = held_out_essay(folder, tokenizer, tokens, form.specials)
    return TaskInputs(config.evaluate, form, text)


def held_out_essay(
    folder: Path, tokenizer: TextTokenizer, tokens: int, refused: Sequence[str] = ()
) -> Essay | None:
    """Return the first documents of the valid split as one text; None if they have no word.

    Args:
        folder: made by `lcdist tokenize`.
        tokenizer: of the folder.
        tokens: of the text, at most.
        refused: what no word may contain.
    """
    split = TokenSplit(folder, "valid")
    documents, left = list[str](), tokens
    for number in range(split.num_documents):
        found = split.document(number)[:left].tolist()
        documents.append(tokenizer.decode(found))
        left -= len(found)
        if left <= 0:
            break
    try:
        return essay(" ".join(documents), refused)
    except ValueError:
        return None
