"""How all ranks come to one step: rank 0 decides, the others wait for its word."""

import datetime as dt

import pytest

from hpc_resume.run.agreement import Agreement


class Store:
    """One on which the answers of both ranks are there; it notes how long it was waited on."""

    def __init__(self):
        self.keys = {"begun/0/0": "4", "begun/0/1": "5", "step/0": "5"}
        self.waits = []

    def set(self, key, value):
        self.keys[key] = value

    def get(self, key):
        return self.keys[key]

    def wait(self, _, patience):
        self.waits.append(patience)


@pytest.mark.parametrize(("rank", "patience_s"), [(0, 30.0), (1, 35.0)])
def test_the_others_wait_longer_than_rank_0_which_decides(rank, patience_s):
    """Else an answer that comes at the last moment gives rank 0 an appointment, and the others none."""
    store = Store()
    how = {"patience_s": 30.0, "on_request": lambda *_: None, "on_failure": lambda *_: None}
    agreement = Agreement(store, store, rank=rank, world_size=2, **how)
    assert agreement._exchange(0, 4 + rank) == 5
    assert store.waits == [dt.timedelta(seconds=patience_s)]
