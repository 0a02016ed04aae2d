import threading
import time

import pytest

from hpc_resume.provenance.crew import Crew


def test_items_that_are_found_on_the_way_are_done_too():
    crew = Crew(lambda number: number, threads=3, look=lambda: None)
    crew.add([3])
    found = []
    for number in crew.results():
        found.append(number)
        crew.add([number - 1] * (number > 0))
    assert sorted(found) == [0, 1, 2, 3]


def test_items_that_are_found_on_the_way_are_done_beside_each_other():
    meet = threading.Barrier(3)
    crew = Crew(lambda number: meet.wait(30) if number else 0, threads=3, look=lambda: None)
    crew.add([0])
    found = []
    for result in crew.results():
        found.append(result)
        crew.add([1, 1, 1] if len(found) == 1 else [])
    assert len(found) == 4


def test_nothing_to_do_is_done_at_once():
    assert list(Crew(lambda item: item, threads=3, look=lambda: None).results()) == []


def test_what_the_work_raises_is_raised():
    def work(number):
        if number == 5:
            raise KeyError(number)
        return number

    crew = Crew(work, threads=2, look=lambda: None)
    crew.add(range(10))
    with pytest.raises(KeyError):
        list(crew.results())
    assert crew.halted


def test_who_looks_around_may_leave_though_a_thread_hangs():
    gate = threading.Event()

    def look():
        raise SystemExit

    crew = Crew(lambda _: gate.wait(30), threads=1, look=look)
    crew.add(range(3))
    began = time.monotonic()
    with pytest.raises(SystemExit):
        list(crew.results())
    assert time.monotonic() - began < 10
    gate.set()
