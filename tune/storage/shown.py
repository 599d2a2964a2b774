"""What may be shown of addresses, errors and names from outside: no credentials, no control characters.

Everything that is printed, logged, tracked or kept in a journal passes through here. An address keeps scheme, host,
port and path. One that cannot be read is not shown at all, since nobody can tell where its password ends.
"""

import re
import shlex
import unicodedata
from collections.abc import Sequence
from urllib.parse import urlsplit

HIDDEN = "(an address that is not shown)"
_NAMES_IN_MLFLOW = ("models:/", "runs:/")
"""Addresses that hold an @ and no credentials."""
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*"
_URL_IN_TEXT = re.compile(rf"""(?<![\w/])(?:{_SCHEME}:/|//(?=[^\s/]*@))[^\s'"<>`]*""")
_RUN_PAGE = re.compile(r"/experiments/\w+/runs/\w+")
_URL_IN_QUOTES = re.compile(rf"""(['"`])({_SCHEME}:/(?:(?!\1).)*?)\1""")
_URL_WITH_SPACES = re.compile(rf"{_SCHEME}:/(?:(?!\w://)[^\n])*@\S*")
_USER_IN_TEXT = re.compile(r"""[^\s'"<>`()]+:[^\s'"<>`]*@[^\s'"<>`]+""")
_QUERY_IN_TEXT = re.compile(r"""\?[^\s'"<>`?]*=[^\s'"<>`]*""")
_SECRET_IN_TEXT = re.compile(
    r"""(?i)\b((?:\w*password|\w*passwd|\bpwd|\w*secret\w*|\w*access_key\w*|\w*token)\s*[=:]\s*)(?:'[^']*'|"[^"]*"|[^\s,;&)]+)"""
)


def host_of(url: str) -> str:
    """The host of an http or https address, alone: its path may be all that protects it. Empty if it is none."""
    try:
        parts = urlsplit(url)
        return (parts.hostname or "") if parts.scheme in ("http", "https") else ""
    except ValueError:
        return ""


def shown_url(url: str) -> str:
    """The scheme, host, port and path of an address; `HIDDEN` if it is not plain enough to tell them apart."""
    if url.startswith(_NAMES_IN_MLFLOW):
        return printable(url)
    scheme, separator, rest = url.partition("://")
    if not separator:
        is_mistyped = re.match(rf"{_SCHEME}:/|//[^/]*@", url) or re.search(r":.*@", url)
        return HIDDEN if is_mistyped else printable(url)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return HIDDEN
    user, at, host = parts.netloc.rpartition("@")
    after = rest[len(parts.netloc) :]
    is_plain = "@" not in after and "@" not in user and not re.search(r"""[\s\\'"<>`{}|^]""", parts.netloc)
    if not re.fullmatch(_SCHEME, scheme) or not is_plain or (at and not host):
        return HIDDEN
    if (host.count(":") > 1 and not host.startswith("[")) or (host.endswith(":") and port is None and at):
        return HIDDEN
    page = f"#{parts.fragment}" if _RUN_PAGE.fullmatch(parts.fragment) else ""
    return printable(f"{scheme}://{host}{parts.path}{page}")


def is_readable(url: str) -> bool:
    """Whether an address can be told apart into user, password, host, port and path; a path is no address."""
    return shown_url(url) != HIDDEN and ("#" not in url or "://" not in url)


def without_secrets(text: str) -> str:
    """The text with every address reduced to what may be shown, and without what is called a password, key or token."""
    text = _URL_IN_QUOTES.sub(lambda found: f"{found[1]}{shown_url(found[2])}{found[1]}", text)
    text = _URL_WITH_SPACES.sub(lambda found: _hidden_if_broken(found[0]), text)
    text = _URL_IN_TEXT.sub(lambda found: _shown_with_end(found[0]), text)
    text = _USER_IN_TEXT.sub(lambda found: found[0] if _has_name_in_mlflow(found[0]) else HIDDEN, text)
    text = _QUERY_IN_TEXT.sub("?…", text)
    return _SECRET_IN_TEXT.sub(r"\1…", text)


def _hidden_if_broken(text: str) -> str:
    """The text up to an @, hidden if a space or a quote stands between: a password may hold them."""
    is_broken = re.search(r"""[\s'"<>`]""", text.rpartition("@")[0]) and not _has_name_in_mlflow(text)
    return HIDDEN if is_broken else text


def _has_name_in_mlflow(word: str) -> bool:
    return word.startswith(_NAMES_IN_MLFLOW)


def _shown_with_end(url: str) -> str:
    """`shown_url` of an address in a sentence, whose punctuation is no part of it."""
    bare = url.rstrip(".,;:)]}!")
    return shown_url(bare) + url[len(bare) :]


def printable(text: str) -> str:
    r"""The text with control, direction and other invisible characters written as escapes, such as \x1b; tabs stay."""
    return "".join(_escaped(letter) if _is_hidden(letter) else letter for letter in text)


def _is_hidden(letter: str) -> bool:
    return letter != "\t" and unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")


def shown(text: str) -> str:
    """One line or several that may be printed, logged or tracked, whatever they came from."""
    return "\n".join(printable(line) for line in without_secrets(text).split("\n"))


def command(words: Sequence[str]) -> str:
    """A command line that people can paste into a shell, in one line."""
    return printable(shlex.join(words))
