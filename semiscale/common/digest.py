"""Compute digests of JSON content."""

import hashlib
import json
from typing import Any


def content_digest(*parts: Any) -> str:
    """Return 16 hexadecimal digits that identify JSON content."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
