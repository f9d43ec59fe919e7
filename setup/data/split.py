"""Which rows are held out: decided by each row's own content, so that appending or removing rows moves no other.

Equal rows fall on the same side whatever their format or key order, so the split makes no exact leak.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

__all__ = ["SPLIT_RULE", "is_held_out", "split_version"]

SPLIT_RULE = 1
"""Version of the rule below; a change makes every token cache anew."""


def is_held_out(digest: bytes, share: float) -> bool:
    """Returns whether a row is held out: the first 8 bytes of its digest, as a share of their range, lie below `share`.

    A larger share keeps every row that a smaller one held out.

    Args:
        digest: sha256 of the normalised row (`Row.digest`).
        share: from 0 (none) to 1.
    """
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split_version(held_out: Iterable[bytes]) -> str:
    """Returns the name of a held-out set: RULE-HASH, equal exactly where the same rows are held out.

    Args:
        held_out: digests, in any order; repeated rows count as often as they occur.
    """
    together = hashlib.sha256()
    for digest in sorted(held_out):
        together.update(digest)
    return f"{SPLIT_RULE}-{together.hexdigest()[:16]}"
