import pytest

from hpc_resume.policy.exits import after_exit


@pytest.mark.parametrize(
    ("codes", "decision", "word"),
    [
        ([0], "done", "finished"),
        ([0, 0, 0], "done", "finished"),
        ([75], "continue", "rank 0 left"),
        ([75, 75], "continue", "ranks 0, 1 left"),
        ([0, 75], "continue", "rank 1 left"),
        ([1, 75], "continue", "rank 1 left"),
        ([-9, 0], "continue", "rank 0 killed by signal 9"),
        ([137], "continue", "killed by signal 9"),
        ([1, -15], "continue", "rank 1 killed by signal 15"),
        ([128 + 64], "continue", "signal 64"),
        ([1], "stop", "rank 0 failed with exit code 1"),
        ([0, 3], "stop", "rank 1 failed with exit code 3"),
        ([2, 2], "stop", "ranks 0, 1 failed with exit code 2"),
        ([128], "stop", "exit code 128"),
        ([255], "stop", "exit code 255"),
        ([], "stop", "no rank"),
    ],
)
def test_the_most_hopeful_code_decides(codes, decision, word):
    outcome = after_exit(codes)
    assert outcome.decision == decision
    assert word in outcome.why
