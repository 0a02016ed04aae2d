import pytest

from hpc_resume.provenance.drift import Drift, changed_packages, environment_drift, source_drift
from hpc_resume.provenance.listing import FileChanges

BEFORE = {
    "python": "3.11.4",
    "system": "Linux 5.14.0 x86_64",
    "hostname": "gpu01",
    "gpu": "A100",
    "torch": {"version": "2.6.0+cu124", "cuda": "12.4", "git": "abc"},
    "precision": {"matmul": "highest"},
    "packages": {"torch": "2.6.0", "numpy": "1.26.4", "rich": "13.1.0", "h5py": "3.10.0", "x": "1", "y": "1"}
    | dict.fromkeys("abc", "1.0"),
    "modules": ["gcc/13"],
    "variables": {"OMP_NUM_THREADS": "4"},
    "slurm": {"SLURM_JOB_ID": "1"},
}


def now(**changes):
    return {**BEFORE, **changes}


def packages(**changes):
    return now(packages={**BEFORE["packages"], **changes})


def grades(after, imported=()):
    return [(each.what, each.grade) for each in environment_drift(BEFORE, after, imported=imported)]


def test_the_same_does_not_differ():
    assert environment_drift(BEFORE, now()) == []


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (now(hostname="gpu02"), ("host", "harmless")),
        (now(slurm={"SLURM_JOB_ID": "2"}), ("SLURM_JOB_ID", "harmless")),
        (now(system="Linux 6.1.0 x86_64"), ("kernel", "harmless")),
        (now(system="Linux 5.14.0 aarch64"), ("kernel", "look")),
        (now(python="3.11.9"), ("Python", "harmless")),
        (now(python="3.12.0"), ("Python", "look")),
        (now(python="4.0.0"), ("Python", "stop")),
        (now(gpu="H100"), ("GPU", "look")),
        ({key: value for key, value in BEFORE.items() if key != "gpu"}, ("GPU", "look")),
        (now(torch={**BEFORE["torch"], "cuda": "12.6"}), ("CUDA", "look")),
        (now(torch={**BEFORE["torch"], "git": "def"}), ("torch's commit", "look")),
        (now(precision={"matmul": "high"}), ("precision of float32 matmul", "look")),
        (now(modules=["gcc/14", "gcc/13"]), ("module gcc/14", "look")),
        (now(modules=[]), ("module gcc/13", "look")),
        (now(variables={"OMP_NUM_THREADS": "8"}), ("OMP_NUM_THREADS", "harmless")),
        (
            now(variables={"OMP_NUM_THREADS": "4", "NVIDIA_TF32_OVERRIDE": "1"}),
            ("NVIDIA_TF32_OVERRIDE", "look"),
        ),
        (packages(torch="2.6.1"), ("torch", "look")),
        (packages(torch="2.7.0"), ("torch", "look")),
        (packages(torch="3.0.0"), ("torch", "stop")),
        (packages(rich="14.0.0"), ("rich", "harmless")),
        (packages(new="1.0"), ("new", "harmless")),
    ],
)
def test_how_much_a_difference_matters(after, expected):
    assert grades(after) == [expected]


def test_packages_that_are_imported_matter_more():
    assert grades(packages(rich="14.0.0"), {"rich"}) == [("rich", "look")]
    assert grades(packages(rich="13.1.2"), {"rich"}) == [("rich", "harmless")]
    assert grades(packages(numpy="1.26.5"), {"numpy"}) == [("numpy", "look")]
    assert changed_packages(BEFORE, packages(rich="14.0.0", new="1")) == {"rich", "new"}


def test_what_matters_most_comes_first():
    after = packages(torch="3.0.0", rich="14") | {"gpu": "H100", "hostname": "b"}
    assert [each.grade for each in environment_drift(BEFORE, after)] == [
        "stop",
        "look",
        "harmless",
        "harmless",
    ]


def test_a_checkpoint_that_says_little_is_compared_by_that():
    little = {"python": "3.11.4", "packages": {"torch": "2.6.0", "hpc_resume": "0.1"}, "gpu": "V100"}
    found = environment_drift(little, BEFORE)
    assert [(each.what, each.grade) for each in found] == [("GPU", "look")]
    assert environment_drift({}, BEFORE) == environment_drift(BEFORE, {}) == []


@pytest.mark.parametrize(
    "nonsense", [{"packages": 3, "torch": [], "modules": "x", "python": None}, {"slurm": 1}]
)
def test_nonsense_says_nothing(nonsense):
    environment_drift(nonsense, BEFORE)
    environment_drift({**BEFORE, **nonsense}, BEFORE)


def test_sources():
    one, two = (
        {"digest": "a" * 16, "git": {"commit": "1" * 40}},
        {"digest": "b" * 16, "git": {"commit": "2" * 40}},
    )
    changes = FileChanges(added=("new.py",), removed=(), changed=("train.py",))
    assert [str(each) for each in source_drift(one, two, changes)] == [
        f"source: {'a' * 16} → {'b' * 16} (train.py, +new.py)",
        "commit: 111111111111 → 222222222222",
    ]
    assert source_drift(one, one) == []
    assert source_drift({}, two) == []
    (altered,) = source_drift(one, {**one, "altered": ["train.py"]})
    assert altered == Drift(what="source", before="a" * 16, now="not what was kept: train.py", grade="look")
