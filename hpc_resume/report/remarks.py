"""What attempts found about states and checkpoints, in words, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable

from hpc_resume.files import JsonObject


def remark(event: JsonObject) -> str:
    """Put one of the :data:`REMARKS` into words.

    Parameters
    ----------
    event
        Of an attempt's journal.
    """
    told = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in event.items()}
    return REMARKS[event["event"]](lambda key: told.get(key, "?"))


#: By the event's kind.
REMARKS: dict[str, Callable[[Callable[[str], str]], str]] = {
    "held_back": lambda of: (
        f"the checkpoint of step {of('step')} was held back: {of('what')}; look at the learning rate and at the loss "
        "of the steps before"
    ),
    "not_finite": lambda of: f"step {of('step')} is not finite: {of('what')}; the settings ignore that",
    "nan_noticed": lambda of: f"from step {of('step')} on there is NaN in {of('what')}",
    "norm_jumped": lambda of: (
        f"at step {of('step')} the norm of {of('module')} was {of('norm')}, after {of('before')} before; look at the loss"
    ),
    "probe_differs": lambda of: (
        f"with {of('checkpoint')} the probe gave something else than before the save: {of('why')}; look at the code, "
        "the probe's data, versions and the node"
    ),
    "probe_failed": lambda of: f"the probe failed, so that checkpoints have no value of it: {of('why')}",
    "unreadable": lambda of: f"{of('checkpoint')} was passed over: {of('reason')}",
    "left_in_place": lambda of: f"{of('checkpoint')} was passed over: {of('reason')}",
    "quarantined": lambda of: f"{of('checkpoint')} was set aside: {of('reason')}",
}
