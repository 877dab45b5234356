"""What every stage shares: a config that knows its digest, finished work that is found, and the ways in.

A stage is a function `stage(config) -> Receipt`. It is called from a test or a notebook as it is, from a shell by
`command_line`, and from a kfp component by `in_component`.
"""

import hashlib
import json
from typing import Any


def content_digest(*parts: Any) -> str:
    """Return 16 hexadecimal digits that identify JSON content."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
