"""Compute digests of JSON content."""

import hashlib
import json
from typing import Any


def content_digest(*parts: Any) -> str:
    """Return 16 hexadecimal digits that identify JSON content.

    The digest is BLAKE2b with 8 bytes over the JSON text of the list of parts. Sorted keys and a text without spaces
    make it the same on every machine.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
