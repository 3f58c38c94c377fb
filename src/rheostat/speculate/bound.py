"""What speculation could gain at most where time is bytes read. Integers in, one number out."""

from __future__ import annotations


def speedup_bound(
    *, acceptance: float, draft_length: int, plain_bytes: int, draft_bytes: int, check_bytes: int
) -> float:
    """Upper bound of tokens/s relative to plain decoding.

    A round reads `draft_length` drafts and one check, and writes 1 + acceptance * draft_length tokens; plain decoding
    reads `plain_bytes` for each.

    Args:
        acceptance: accepted tokens / drafted tokens.
        draft_length: tokens drafted a round.
        plain_bytes: weights and cache, as plain decoding reads them for one token.
        draft_bytes: the same as a drafted token reads them.
        check_bytes: the same as a checking pass reads them.
    """
    return plain_bytes * (1 + acceptance * draft_length) / (draft_length * draft_bytes + check_bytes)
