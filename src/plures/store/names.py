"""Names of variants and aliases, and the references made of them: `support`, `support@3`, `support@prod`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from plures.core.errors import WrongUse

ALLOWED = "ASCII letters, digits, '_', '-' and single inner '.', 1 to 128 of them, a letter or digit first"
_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9_-])?")
_NUMBER = re.compile(r"[0-9]{1,9}")  # more digits than this no version has, and SQLite holds 19 at most
_IDENTITY = re.compile(r"[0-9a-f]{64}")
TEXT_LIMIT = 10_000


@dataclass(frozen=True)
class Ref:
    """A reference taken apart: `number` for `name@3`, `alias` for `name@prod`, neither for the latest version."""

    name: str
    number: int | None = None
    alias: str | None = None


def shown(value: object) -> str:
    """`value` in quotes, in ASCII and on one line, shortened: look-alike letters and control characters show."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:76]}...{text[-1]}"


def check_name(name: object, what: str = "name") -> str:
    """`name` itself, where it may name a variant.

    Raises: WrongUse where it is not text of `ALLOWED`; names become folders and parts of URLs elsewhere.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise WrongUse(f"{what} {shown(name)} is not allowed; use {ALLOWED}")
    return name


def check_alias(alias: object) -> str:
    """`alias` itself, where it may be one: a name that is not all digits, which would read as a version number.

    Raises: WrongUse.
    """
    checked = check_name(alias, "alias")
    if checked.isdigit():
        raise WrongUse(f"alias {checked!r} is all digits and would read as a version number; add a letter")
    return checked


def check_text(text: object, what: str, empty: bool = False) -> str:
    """`text` itself, where it can be stored and shown; `empty` says whether '' may be.

    Raises: WrongUse where it is no text, is empty, is longer than 10 000 characters, or is not valid Unicode.
    """
    if not isinstance(text, str) or not (text or empty) or len(text) > TEXT_LIMIT or "\x00" in text:
        raise WrongUse(f"{what} {shown(text)} is not allowed; use text of at most {TEXT_LIMIT} characters, without NUL")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise WrongUse(f"{what} {shown(text)} is not valid Unicode; replace the half characters in it") from error
    return text


def is_identity(text: str) -> bool:
    """Whether `text` is the identity of a variant, 64 hexadecimal digits."""
    return _IDENTITY.fullmatch(text) is not None


def parse(ref: object) -> Ref:
    """The parts of a reference; whether it names anything is another question.

    Raises: WrongUse where it is not `name`, `name@3` or `name@alias`.
    """
    if not isinstance(ref, str):
        raise WrongUse(f"reference {shown(ref)} is not text; use 'name', 'name@3' or 'name@alias'")
    name, at, which = ref.partition("@")
    check_name(name)
    if not at:
        return Ref(name)
    if _NUMBER.fullmatch(which):
        return Ref(name, number=int(which))
    if not which or which.isdigit() or not _NAME.fullmatch(which):
        raise WrongUse(f"reference {shown(ref)} is not one; use 'name', 'name@3' or 'name@alias'")
    return Ref(name, alias=which)
