"""A page that says its own checksum, so that an edited one is known without a list of it."""

from __future__ import annotations

import hashlib
import re

_SEAL = re.compile(rb"\n<!-- SHA-256 of the page above: ([0-9a-f]{64}) -->\n\Z")


def sealed(page: str) -> bytes:
    """A page, in UTF-8, with its checksum as a last line."""
    content = page.encode()
    digest = hashlib.sha256(content).hexdigest()
    return content + f"\n<!-- SHA-256 of the page above: {digest} -->\n".encode()


def is_sealed(content: bytes) -> bool:
    """Whether a page is as it was written; False for one without a checksum."""
    seal = _SEAL.search(content)
    if seal is None:
        return False
    return hashlib.sha256(content[: seal.start()]).hexdigest().encode() == seal[1]
