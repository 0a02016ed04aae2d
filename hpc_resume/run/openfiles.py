"""How many files this process may have open: reading a checkpoint of many ranks takes one for each shard, and more."""

from __future__ import annotations

import contextlib
import resource

#: More are not asked for: some hard limits are a thousand million, and there are programs that try to close them all.
_ENOUGH = 1 << 16


def raise_limit() -> None:
    """Raise the soft limit to the hard one, or to as many as are enough; where that is refused, it stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
