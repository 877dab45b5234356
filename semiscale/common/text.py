"""Make text safe to print, as one printable line without credentials."""

import re
import reprlib

# A key of a Parquet file may have millions of characters.
MAX_LINE_CHARS = 2000
# Length of a refused value in an error's message.
_MAX_VALUE_CHARS = 200
# Credentials in `s3://key:secret@bucket` and `http://user:password@proxy`. A secret key may contain slashes. A port is
# no credential.
_USER = re.compile(r"(?<=://)(?:[^/\s'\"@:]*:(?!\d+/)[^\s'\"]*|[^/\s'\"@]*)@")
# Signatures in links that grant access by themselves.
_PERMISSION = re.compile(r"(?i)\b((?:X-(?:Amz|Goog)-)?(?:Signature|Credential|Security-Token)|sig|token)=[^&\s'\"]+")

# The limits keep six values of a list and two levels. Nested YAML aliases can stand for more values than fit in memory.
_values = reprlib.Repr()
_values.maxstring = _values.maxother = _MAX_VALUE_CHARS
_values.maxlevel = 2


def count_noun(count: int, noun: str) -> str:
    """Format a count of things: `1 tar`, `1,200 tars`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def to_single_line(text: str) -> str:
    """Return text as one line of printable characters, without credentials.

    No character of it can move a terminal's cursor or begin another log line. A text above MAX_LINE_CHARS is shortened.
    """
    line = redact_credentials(" ".join(text.splitlines()))
    line = line if line.isprintable() else "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
    return line if len(line) <= MAX_LINE_CHARS else f"{line[:MAX_LINE_CHARS]}…"


def redact_credentials(text: str) -> str:
    """Return text without the credentials in its URIs and links."""
    return _PERMISSION.sub(r"\1=…", _USER.sub("…@", text))


def has_credentials(uri: str) -> bool:
    """Return whether a URI contains credentials.

    No store reads them from a URI, and every log and receipt would repeat them.
    """
    return bool(_USER.search(uri))


def truncated_repr(value: object) -> str:
    """Return the `repr` of a value, shortened and without credentials."""
    return redact_credentials(_values.repr(value))
