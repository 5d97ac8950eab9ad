"""Conversations as text by a chat template, with the places of the assistant's answers in it.

A template that marks answers with `{% generation %}` says itself where they are. Otherwise each
conversation is rendered up to every answer, with the prompt for one, and with that answer: what the
second adds to the first is the answer with the token that ends it, as far as it stays the same when
another message follows. A template that renders the beginning of a conversation in another way once
more follows is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from os.path import commonprefix
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lcdist.data.prepare.corpus import CONVERSATIONS, SourceFile
from lcdist.data.prepare.readers import Answers, RecordError
from lcdist.utils.errors import shortened

# Keys of a record that may hold a conversation, in order of priority.
FIELDS = ("messages", "conversations")
# Roles of the second spelling, {"from": .., "value": ..}.
ROLES = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}
# Unicode reserves these for use inside a program: no text has them.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_REMEDY = (
    "mark the answers in the template with {% generation %} and {% endgeneration %}, and give it "
    "with --chat-template FILE"
)


@dataclass(frozen=True)
class ChatTemplate:
    """Read conversations and render them.

    Attributes:
        source: the template, in Jinja.
        tokens: texts of the tokens that the template may name, such as "eos_token".
        specials: texts of the tokens that no message may contain.
        field: key of the messages; "": the first of `FIELDS` that a record has.
    """

    source: str
    tokens: Mapping[str, str]
    specials: Sequence[str]
    field: str = ""

    def read(self, record: Mapping[str, Any]) -> tuple[str, Answers]:
        """Return the text of a conversation and the places of its answers.

        Raises:
            RecordError: the record is not a conversation with an answer, or the template refuses
                it.
        """
        messages, tools = messages_of(record, self.field), record.get("tools")
        for number, message in enumerate(messages, 1):
            _check_text(number, message, self.specials)
        if not any(message["role"] == "assistant" for message in messages):
            raise RecordError("a conversation without a message of the assistant")
        text = self._render(messages, tools)
        if _marks_answers(self.source):
            text, answers = _without_marks(text)
        else:
            answers = self._answers(text, messages, tools)
        if not any(start < stop for start, stop in answers):
            raise RecordError("a conversation in which the chat template marks no answer")
        return text, answers

    def prompt(self, content: str) -> str:
        """Return a message of the user and the prompt for an answer; RecordError if refused."""
        return self._without_generation_marks([_user(content)], prompt=True)

    def end_of_turn(self) -> str | None:
        """Return the text of the token that ends an answer; None if no token does."""
        messages = [_user("?"), {"role": "assistant", "content": _END_OF_CONTENT}]
        rest = self._without_generation_marks(messages).partition(_END_OF_CONTENT)[2]
        places = {special: rest.find(special) for special in self.specials}
        return min(
            (s for s, at in places.items() if at >= 0), key=lambda s: places[s], default=None
        )

    def _without_generation_marks(self, messages: Sequence[Any], prompt: bool = False) -> str:
        return _without_marks(self._render(messages, None, prompt))[0]

    def _render(self, messages: Sequence[Any], tools: Any, prompt: bool = False) -> str:
        """Render messages; prompt: and the prompt for an answer."""
        words = {"messages": messages, "tools": tools, "add_generation_prompt": prompt}
        try:
            return compile_template(self.source).render(**self.tokens, **words)
        except Exception as error:  # a template is a program, which may raise anything
            raise RecordError(f"the chat template refuses it ({shortened(str(error))})") from error

    def _answers(self, whole: str, messages: Sequence[Any], tools: Any) -> Answers:
        """Return the places of the answers in the `whole` text of a template without marks."""
        answers = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], tools, prompt=True)
            through = self._render(messages[: number + 1], tools)
            # What follows a turn is no part of it: another message, or how a conversation ends.
            following = messages[number + 1 : number + 2] or [_QUESTION]
            after = self._render([*messages[: number + 1], *following], tools)
            turn = through.removeprefix(before)
            if not (through.startswith(before) and after.startswith(before)):
                raise _unclear(number, "renders what comes before it in another way later")
            content = (message.get("content") or "").strip()
            has_prompt = before != self._render(messages[:number], tools)
            if not (has_prompt or turn.lstrip().startswith(content)):
                raise _unclear(number, "writes more than the answer and has no prompt for it")
            text = "" if message.get("tool_calls") else content
            length = self._length_of_turn(turn, after.removeprefix(before), text)
            if not (length and whole.startswith(before + turn[:length])):
                raise _unclear(
                    number, "writes it in another way when more follows, or does not end it"
                )
            answers.append((len(before), len(before) + length))
        return tuple(answers)

    def _length_of_turn(self, turn: str, after: str, content: str) -> int:
        """Return the length of a turn with the token that ends it, 0 if it cannot be told.

        Args:
            turn: all that an answer adds to the text.
            after: the same where another message follows.
            content: of the answer, which ends with the next token for that; "": more may follow it.
        """
        if after.startswith(turn):
            text = turn.rstrip()
            return len(text) if text.endswith(tuple(self.specials)) else len(turn)
        shared = commonprefix([turn, after])
        if not content or content not in shared:
            return 0
        start = shared.index(content) + len(content)
        places = {special: shared.find(special, start) for special in self.specials}
        return min((at + len(special) for special, at in places.items() if at >= 0), default=0)


# No template writes it: what follows it in the text is not part of an answer.
_END_OF_CONTENT = "\ufdd2"


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


# Stands for what a user says next.
_QUESTION = {"role": "user", "content": "?"}


def _unclear(number: int, what: str) -> RecordError:
    """Return the error of an answer whose place a template does not tell."""
    return RecordError(f"message {number + 1}: the chat template {what}; {_REMEDY}")


def check_files(files: Sequence[SourceFile]) -> None:
    """Raise ValueError if a file is of a kind that holds no conversations."""
    other = next((file for file in files if file.kind not in CONVERSATIONS), None)
    if other is not None:
        raise ValueError(
            f"{other.path}: --conversations reads {', '.join(CONVERSATIONS)}; convert it to one of "
            "them, or leave it out"
        )


def messages_of(record: Mapping[str, Any], field: str = "") -> list[dict[str, Any]]:
    """Return the messages of a record, each with a role; raise RecordError if there are none."""
    names = (field,) if field else FIELDS
    found = next((record[name] for name in names if isinstance(record.get(name), list)), None)
    if not found:
        keys = f"; it has {', '.join(list(record)[:8])}" if record else ""
        listed = " or ".join(f'"{name}"' for name in names)
        raise RecordError(f"no list of messages under {listed}{keys}")
    return [_message(number, message) for number, message in enumerate(found, 1)]


def _message(number: int, message: Any) -> dict[str, Any]:
    """Return a message with its role and content, in the first spelling."""
    if not isinstance(message, dict):
        raise RecordError(f"message {number}: not an object with a role and its content")
    if "role" not in message and isinstance(message.get("from"), str):
        origin = message["from"]
        role = ROLES.get(origin, origin if origin in ROLES.values() else None)
        if role is None:
            raise RecordError(
                f'message {number}: "from" is {shortened(origin)!r}; it may be {", ".join(ROLES)}'
            )
        message = {"role": role, "content": message.get("value")}
    if not isinstance(message.get("role"), str):
        raise RecordError(f"message {number}: its role is not text")
    if not isinstance(message.get("content"), str) and not (
        message.get("content") is None and message.get("tool_calls")
    ):
        raise RecordError(f"message {number}: its content is not text")
    return message


def _check_text(number: int, message: Mapping[str, Any], specials: Sequence[str]) -> None:
    """Raise RecordError if a message has the text of a special token, which would become one."""
    text = message.get("content") or ""
    found = next((special for special in (*specials, _BEGIN, _END) if special in text), None)
    if found is not None:
        raise RecordError(f"message {number}: its content has the text of the token {found!r}")


class _Generation(Extension):
    """The tag `{% generation %}`: what is inside is an answer."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Return a call that puts marks around what is inside."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = nodes.CallBlock(self.call_method("mark"), [], [], body)
        return call.set_lineno(line)

    def mark(self, caller: Any) -> str:
        """Return the text inside between marks."""
        return f"{_BEGIN}{caller()}{_END}"


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


@lru_cache(maxsize=8)
def _environment() -> ImmutableSandboxedEnvironment:
    """Return the environment of Hugging Face's templates.

    It has no `strftime_now`: with the date in it, no two days would give the same tokens.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    environment.globals["raise_exception"] = _raise_exception
    return environment


@lru_cache(maxsize=8)
def compile_template(source: str) -> Template:
    """Return a template; raise ValueError, with the line, if it is not Jinja."""
    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.message}") from error


@lru_cache(maxsize=8)
def _marks_answers(source: str) -> bool:
    """Return whether a template has the tag `{% generation %}`."""
    names = [(kind, value) for _, kind, value in _environment().lex(source) if kind != "whitespace"]
    pairs = zip(names, names[1:], strict=False)
    return any(a == "block_begin" and b == ("name", "generation") for (a, _), b in pairs)


def _without_marks(text: str) -> tuple[str, Answers]:
    """Return a rendered text without marks, and the places of what was between them."""
    pieces, answers, length = [], [], 0
    for number, piece in enumerate(text.split(_BEGIN)):
        answer, _, rest = piece.partition(_END) if number else ("", "", piece)
        if number:
            answers.append((length, length + len(answer)))
        pieces += [answer, rest]
        length += len(answer) + len(rest)
    return "".join(pieces), tuple(answers)
