"""`lcdist tokenize`: convert text to a folder of tokens."""

import argparse
import os
from pathlib import Path

from lcdist.data.prepare.corpus import CONVERSATIONS, SUFFIXES, Source, standard_library
from lcdist.data.prepare.prepare import prepare
from lcdist.data.prepare.settings import TokenizeSettings
from lcdist.data.prepare.summary import summary_lines
from lcdist.data.tokenizers.chat import read_chat_template
from lcdist.data.tokenizers.huggingface import SpecialTokens
from lcdist.utils.progress import BYTES, progress_console, show_progress

# Pieces of the tokenizer that is trained if the user names neither a size nor a tokenizer.
VOCAB_SIZE = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the source, the output folder, the tokenizer and how documents are read."""
    parser.add_argument(
        "source",
        help="folder or file: text, .jsonl, .jsonl.gz, .jsonl.zst, .parquet; 'stdlib' for the "
        "source code of Python's standard library",
    )
    parser.add_argument("folder", help="folder of tokens to create")
    parser.add_argument("--vocab-size", type=int, help="number of pieces of a tokenizer to train")
    parser.add_argument(
        "--tokenizer", help="a sentencepiece .model, a tokenizer.json, a model's folder, or 'bytes'"
    )
    parser.add_argument("--bos-token", help="bos token, for a tokenizer.json that names none")
    parser.add_argument("--eos-token", help="eos token, for a tokenizer.json that names none")
    parser.add_argument(
        "--add-bos", action=argparse.BooleanOptionalAction, help="begin documents with bos"
    )
    parser.add_argument(
        "--valid-fraction", type=float, default=0.05, help="fraction of documents held out"
    )
    parser.add_argument("--suffix", action="append", help="suffix of the files to read, as .txt")
    parser.add_argument(
        "--follow-links", action="store_true", help="read folders behind symbolic links"
    )
    parser.add_argument(
        "--hidden", action="store_true", help="read folders whose names begin with a dot"
    )
    parser.add_argument(
        "--field", default="text", help="field of a JSON record, or column of a parquet file"
    )
    parser.add_argument(
        "--conversations",
        action="store_true",
        help="records of .jsonl are conversations, under messages, conversations or --field; a run "
        "is trained on their answers alone",
    )
    parser.add_argument(
        "--chat-template", help="file with the chat template, for a tokenizer without one"
    )
    parser.add_argument(
        "--document-bytes", type=int, help="cut plain text into documents of this size (1 MiB)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the held-out split")
    parser.add_argument(
        "--on-error", choices=["refuse", "skip"], default="refuse", help="for damaged records"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")


def run(arguments: argparse.Namespace) -> int:
    """Tokenize with a progress bar, and print what was written."""
    source, settings = _source(arguments), _settings(arguments)
    with show_progress(BYTES, progress_console()) as progress:
        prepared = prepare(
            source,
            arguments.folder,
            settings,
            tokenizer=arguments.tokenizer,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    for line in summary_lines(prepared):
        print(line)
    return 0


def _source(arguments: argparse.Namespace) -> Source:
    if arguments.source == "stdlib":
        return standard_library()
    default = CONVERSATIONS if arguments.conversations else SUFFIXES
    suffixes = tuple(arguments.suffix) if arguments.suffix else default
    return Source(
        Path(arguments.source),
        suffixes,
        follow_links=arguments.follow_links,
        hidden=arguments.hidden,
    )


def _settings(arguments: argparse.Namespace) -> TokenizeSettings:
    vocab_size = arguments.vocab_size
    if vocab_size is None and arguments.tokenizer is None:
        vocab_size = VOCAB_SIZE
    template = None
    if arguments.conversations:
        if arguments.tokenizer is None:
            raise ValueError(
                "--conversations needs a tokenizer with tokens for turns: name a model's folder "
                "with --tokenizer"
            )
        template = read_chat_template(arguments.tokenizer, arguments.chat_template)
    elif arguments.chat_template is not None:
        raise ValueError("--chat-template renders conversations: add --conversations")
    return TokenizeSettings(
        vocab_size=vocab_size,
        valid_fraction=arguments.valid_fraction,
        seed=arguments.seed,
        on_error=arguments.on_error,
        field=arguments.field,
        document_bytes=arguments.document_bytes,
        special_tokens=SpecialTokens(arguments.bos_token, arguments.eos_token, arguments.add_bos),
        chat_template=template,
        workers=arguments.workers,
    )
