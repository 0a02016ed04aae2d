"""The order in which DDP sums gradients over the ranks: the same in each step.

DDP sums in buckets of many parameters, and lays them out anew after an attempt's first step. From three ranks on, the
order in which a number's parts are added depends on where in its bucket it stands, so the first step after a restart
would round otherwise than the same step of an uninterrupted run. Summed parameter by parameter, it does not.
"""

# No postponed annotations: register_comm_hook looks at those of a hook.

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

#: Two numbers have one sum.
_COMMUTES = 2


def keep_order(modules: Iterable[torch.nn.Module]) -> list[str]:
    """Have all DDP modules sum parameter by parameter, before their first step.

    Parameters
    ----------
    modules
        Those that are tracked.

    Returns
    -------
    list of str
        Names of DDP modules that have a hook of their own, which decides instead.
    """
    own = []
    for module in modules:
        for name, part in module.named_modules():
            if not isinstance(part, DistributedDataParallel) or part.process_group.size() <= _COMMUTES:
                continue
            try:
                part.register_comm_hook(part.process_group, _one_by_one)
            except RuntimeError:  # there may be one only
                own.append(name or type(part.module).__name__)
    return own


def _one_by_one(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket's gradients over the ranks, each by itself."""
    buffer = bucket.buffer()
    buffer.div_(group.size())
    parts = [buffer] if buffer.is_sparse else bucket.gradients()
    works = [dist.all_reduce(part, group=group, async_op=True) for part in parts]
    futures = [work.get_future() for work in works]
    # On a GPU they are done in their order, and futures can't be collected over streams.
    done = futures[-1] if buffer.is_cuda else torch.futures.collect_all(futures)
    averaged: torch.futures.Future[torch.Tensor] = done.then(lambda _: buffer)
    return averaged
