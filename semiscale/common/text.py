"""Make text safe to print: one line, printable, and without credentials."""

import re
import reprlib

MAX_LINE_CHARS = 2000  # characters of a line; a key of a Parquet file may have millions
_SHOWN = 200  # characters of a value that is refused
# Of s3://key:secret@bucket and http://user:password@proxy, and of links that carry their own permission.
# A secret key may hold slashes; a port is none.
_USER = re.compile(r"(?<=://)(?:[^/\s'\"@:]*:(?!\d+/)[^\s'\"]*|[^/\s'\"@]*)@")
_PERMISSION = re.compile(r"(?i)\b((?:X-(?:Amz|Goog)-)?(?:Signature|Credential|Security-Token)|sig|token)=[^&\s'\"]+")

_values = reprlib.Repr()  # six values of a list: aliases that multiply end here
_values.maxstring = _values.maxother = _SHOWN
_values.maxlevel = 2


def to_single_line(text: str) -> str:
    """Return text as one line of printable characters: none moves a terminal's cursor or begins another log line."""
    line = redact_credentials(" ".join(text.splitlines()))
    line = line if line.isprintable() else "".join(one if one.isprintable() else repr(one)[1:-1] for one in line)
    return line if len(line) <= MAX_LINE_CHARS else f"{line[:MAX_LINE_CHARS]}…"


def redact_credentials(text: str) -> str:
    """Return text without the credentials that URIs and links in it carry."""
    return _PERMISSION.sub(r"\1=…", _USER.sub("…@", text))


def has_credentials(uri: str) -> bool:
    """Say whether a URI carries credentials, which nothing reads there and everything would write on."""
    return bool(_USER.search(uri))


def truncated_repr(value: object) -> str:
    """Return a value as Python writes it, cut short: nested YAML aliases stand for more than any memory holds."""
    return redact_credentials(_values.repr(value))
