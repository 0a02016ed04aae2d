"""How configurations differ, whoever wrote them and whatever stands in them."""

import hashlib

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hpc_resume.config import Config
from hpc_resume.errors import IntegrityError
from hpc_resume.provenance.configuration import Change, changes, flat, read_configuration, sentences
from hpc_resume.rundir import RunDirectory


def values(**settings):
    return Config(**settings).model_dump(mode="json")


def told(old, new):
    return [(each.name, each.old, each.new, each.grade) for each in changes(old, new)]


def test_the_same_settings_differ_in_nothing():
    assert changes(values(), values()) == ()
    reasons = values(why="a longer warm-up", allow_config_change="an ablation", run_dir="elsewhere")
    assert changes(values(), reasons) == ()


def test_what_must_not_change_comes_first_then_what_is_trained():
    old = values(
        entry={"target": "a.py:train", "kwargs": {"lr": 1e-3, "gone": 1}}, time_limit_s=60, warning_lead_s=9
    )
    new = values(
        entry={"target": "a.py:train", "kwargs": {"lr": 1e-4, "new": [1]}},
        time_limit_s=90,
        warning_lead_s=9,
        seed=1,
    )
    assert told(old, new) == [
        ("seed", 0, 1, "stop"),
        ("entry.kwargs.gone", 1, None, "look"),
        ("entry.kwargs.lr", 1e-3, 1e-4, "look"),
        ("entry.kwargs.new", None, [1], "look"),
        ("time_limit_s", 60.0, 90.0, "harmless"),
    ]
    assert sentences(changes(old, new)) == (
        "seed was 0, is 1; gone was 1, is not set; lr was 0.001, is 0.0001; new was not set, is [1]; "
        "besides time_limit_s (nothing that is trained depends on it)"
    )


def test_node_types_go_by_their_names():
    one, two = {"name": "a", "ranks": 2, "precision": "bf16"}, {"name": "b", "partition": "old"}
    assert told(values(node_types=[one, two]), values(node_types=[two, one])) == []
    assert told(values(node_types=[one]), values(node_types=[{**one, "precision": "fp16"}])) == [
        ("node_types.a.precision", "bf16", "fp16", "look")
    ]
    assert told(values(node_types=[one]), values(node_types=[one, two])) == [
        ("node_types.b.name", None, "b", "harmless"),
        ("node_types.b.partition", None, "old", "harmless"),
    ]


def test_what_another_version_does_not_know_is_its_default():
    old = values()
    del old["budget"], old["why"]
    old["what_is_no_more"] = {"a": 1}
    assert changes(old, values()) == ()
    assert told(old, values(budget={"crashes": 4})) == [("budget.crashes", None, 4, "harmless")]


def test_what_may_be_a_password_is_not_shown():
    old, new = (values(environment={"variables": {"KEY": text}}) for text in ("secret", "hidden"))
    (change,) = changes(old, new)
    assert (change.old, change.new, change.grade) == (None, None, "harmless")
    assert change.sentence == "environment.variables.KEY is another one"


def test_long_values_are_cut_and_still_differ():
    old, new = (values(entry={"target": "a:b", "kwargs": {"text": "x" * 10_000 + end}}) for end in "ab")
    (change,) = changes(old, new)
    assert change.old != change.new
    assert len(change.old) < 400


def stored(tmp_path, text):
    run = RunDirectory(tmp_path)
    run.configs.mkdir(exist_ok=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    (run.configs / f"{digest}.yaml").write_text(text)
    return run, digest


def test_what_was_stored_is_read(tmp_path):
    shared = [1, 2]
    config = Config(seed=3, entry={"target": "a:b", "kwargs": {"one": shared, "two": shared}})
    run = RunDirectory(tmp_path)
    config.store(run)
    read = read_configuration(run, config.digest())
    assert read is not None
    assert changes(read, config.model_dump(mode="json")) == ()
    assert read_configuration(run, "0" * 16) is None
    assert read_configuration(run, "../../etc/passwd") is None
    (run.configs / f"{config.digest()}.yaml").write_text("seed: 3\n")
    with pytest.raises(IntegrityError, match="its digest is not its name"):
        read_configuration(run, config.digest())


BOMB = "a: &a [x, x]\n" + "\n".join(
    f"{c}: &{c} [*{b}, *{b}, *{b}, *{b}]" for b, c in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: &a {b: *a}",
        "[" * 5000,
        "{a: " * 100 + "1" + "}" * 100,
        "seed: !!python/object/apply:os.system [true]",
        "- 1",
        "x: '" + "y" * 300_000 + "'",
        "\n".join(f"k{n}: 1" for n in range(5000)),
        "\x00",
    ],
)
def test_what_is_made_up_costs_nothing_and_runs_nothing(tmp_path, text):
    def compare():
        return changes(read_configuration(*stored(tmp_path, text)) or {}, values())

    with pytest.raises(IntegrityError):
        compare()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


@given(JSON, JSON)
def test_equal_arguments_never_differ_and_different_ones_always_do(one, other):
    def arguments(value):
        return {"entry": {"kwargs": {"x": value}}}

    assert changes(arguments(one), arguments(yaml.safe_load(yaml.safe_dump(one)))) == ()
    found = changes(arguments(one), arguments(other))
    assert all(each.grade == "look" for each in found)
    if flat(arguments(one)) != flat(arguments(other)):
        assert found


def test_names_are_short_where_people_wrote_them():
    assert Change(name="entry.kwargs.lr", old=1, new=2, grade="look").short == "lr"
