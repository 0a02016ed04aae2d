import datetime as dt
import re
from pathlib import Path
from types import NoneType

import pytest
import yaml

from hpc_resume.config import Config
from hpc_resume.errors import ConfigError
from hpc_resume.rundir import RunDirectory
from hpc_resume.settings import CheckpointSettings, NodeType, StopSettings
from hpc_resume.values import parse_assignments, parse_setting, parse_value


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_no_settings_at_all_are_complete():
    config = Config()
    assert config.node_types == (NodeType(),)
    assert Config.load() == config
    assert config.origin("seed") == "default"


def test_flag_beats_variable_beats_later_file_beats_earlier_file_beats_default(tmp_path):
    site = write(tmp_path / "site.yaml", "seed: 1\ncheckpoint: {every_steps: 1, threads: 7, every_s: 9}\n")
    run = write(tmp_path / "run.yaml", "seed: 2\ncheckpoint: {every_steps: 2}\n")
    environ = {"HPC_RESUME_SEED": "3", "HPC_RESUME_CHECKPOINT__EVERY_STEPS": "3", "PATH": "/bin"}
    config = Config.load([site, run], overrides={"seed": 4}, environ=environ)
    assert (config.seed, config.checkpoint.every_steps, config.checkpoint.threads) == (4, 3, 7)
    assert config.stop.agreement_s == 30
    assert config.origin("seed") == "flag"
    assert config.origin("checkpoint.every_steps") == "variable HPC_RESUME_CHECKPOINT__EVERY_STEPS"
    assert config.origin("checkpoint.threads") == str(site)
    assert config.origin("checkpoint.direct") == "default"  # no file says it, though both have its group
    assert config.origin("stop.agreement_s") == "default"
    assert Config.load([site, run]).seed == 2
    assert Config.load([run, site]).seed == 1


def test_overrides_are_dotted_or_nested_and_reach_into_lists():
    dotted = Config.load(overrides={"node_types.0.ranks": 3, "slurm.account": 17})
    nested = Config.load(overrides={"node_types": [{"ranks": 3}], "slurm": {"account": "17"}})
    assert dotted == nested
    assert dotted.node_types[0].ranks == 3


def test_overriding_does_not_touch_what_was_given():
    given = {"slurm": {"additional_parameters": {"a": 1}}}
    Config.load(overrides={**given, "slurm.additional_parameters.b": 2})
    assert given == {"slurm": {"additional_parameters": {"a": 1}}}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"nam": "x"}, ["nam", "did you mean name?"]),
        ({"checkpoint": {"evry_steps": 3}}, ["checkpoint.evry_steps", "did you mean every_steps?"]),
        ({"checkpoint_every_s": 3}, ["checkpoint_every_s", "did you mean checkpoint.every_s?"]),
        ({"node_types": [{}, {"rank": 3}]}, ["node_types.1.rank", "did you mean ranks?"]),
        ({"stop": {"qqqq": 3}}, ["stop.qqqq", "Here are: agreement_s, watchdog_s"]),
        ({"node_types": [{"ranks": 0}]}, ["node_types.0.ranks", "greater than or equal to 1", "0"]),
        ({"node_types": []}, ["node_types", "at least 1"]),
        ({"node_types": [{"ranks": 3, "nodes": 2, "tasks_per_node": 4}]}, ["ranks is 3", "2 x 4"]),
        ({"time_limit_s": 60}, ["warning_lead_s is 120", "60 s", "say 15"]),
        ({"node_types": [{"name": "a", "time_limit_s": 60}]}, ["warning_lead_s is 120", "node_types.0 (a)"]),
        ({"time_limit_s": "soon"}, ["time_limit_s", "soon"]),
        ({"time_limit_s": float("nan")}, ["time_limit_s", "finite"]),
        ({"name": "a/b"}, ["name", "a/b"]),
        ({"run_dir": "runs/{user}"}, ["run_dir", "only {name}"]),
        ({"scheduler": "pbs"}, ["scheduler", "'local' or 'slurm'", "pbs"]),
        ({"environment": {"setup": "module load x"}}, ["environment.setup", "list", "module load x"]),
    ],
)
def test_what_is_wrong_is_named_with_what_would_be_right(values, words):
    with pytest.raises(ConfigError) as caught:
        Config(**values)
    for word in words:
        assert word in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_every_problem_is_listed_once_with_its_origin(tmp_path):
    path = write(tmp_path / "a.yaml", "sed: 1\nnode_types: [{ranks: 0}]\n")
    with pytest.raises(ConfigError) as caught:
        Config.load(path, overrides={"checkpoint.threads": 0})
    message = str(caught.value)
    assert message.startswith("3 settings are wrong:")
    assert f"{path}: sed: no such setting; did you mean seed?" in message
    assert "flag: checkpoint.threads" in message


def test_a_group_that_is_wrong_as_a_whole_is_named_with_its_file(tmp_path):
    path = write(tmp_path / "a.yaml", "slurm: {container: {args: [--nv]}}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: slurm\.container: mounts and args belong to an image"):
        Config.load(path)


def test_a_nearly_right_variable_is_refused_and_foreign_ones_are_not_ours():
    with pytest.raises(ConfigError, match="did you mean HPC_RESUME_CHECKPOINT__EVERY_STEPS"):
        Config.load(environ={"HPC_RESUME_CHECKPOINT_EVERY_STEPS": "3"})
    with pytest.raises(ConfigError, match="did you mean HPC_RESUME_CHECKPOINT__EVERY_STEPS"):
        Config.load(environ={"HPC_RESUME_CHEKPOINT__EVERY_STEPS": "3"})
    foreign = {"HPC_RESUME_JOB_STATE": "x", "HPC_RESUME_CONFIG": "y", "HPC_RESUME_BENCH": "1", "HOME": "/"}
    assert Config.load(environ=foreign) == Config()


def test_a_missing_file_is_named_with_its_nearest_neighbour(tmp_path):
    write(tmp_path / "local.yaml", "")
    with pytest.raises(
        ConfigError, match=r"locl\.yaml: no such configuration file; did you mean .*local\.yaml"
    ):
        Config.load(tmp_path / "locl.yaml")


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "just words", "seed: 1\nseed: 2\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        Config.load(write(tmp_path / "a.yaml", text))


def test_an_empty_file_is_the_defaults(tmp_path):
    assert Config.load(write(tmp_path / "a.yaml", "# nothing\n")) == Config()


@pytest.mark.parametrize(
    ("spelling", "seconds"),
    [(90, 90), ("90", 90), ("1:30", 90), ("01:30:00", 5400), ("1-12:00:00", 129600), ("2-00", 172800)],
)
def test_times_are_seconds_or_slurms_spelling(spelling, seconds):
    assert Config(time_limit_s=spelling, warning_lead_s=1).time_limit_s == seconds


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ({}, (1, 1, 1)),
        ({"ranks": 4}, (4, 1, 4)),
        ({"nodes": 2, "tasks_per_node": 4}, (8, 2, 4)),
        ({"nodes": 2, "ranks": 8}, (8, 2, 4)),
        ({"nodes": 3}, (3, 3, 1)),
    ],
)
def test_ranks_and_shape_follow_from_each_other(given, shape):
    node_type = NodeType(**given)
    assert (node_type.ranks, node_type.nodes, node_type.tasks_per_node) == shape


def test_the_run_directory_is_absolute_and_named(tmp_path):
    assert Config(name="gpt").run_directory(tmp_path) == tmp_path / "runs" / "gpt"
    assert Config(run_dir="/x/{name}", name="a").run_directory(tmp_path) == Path("/x/a")


def test_what_is_stored_loads_as_the_same_settings(tmp_path):
    config = Config(name="a", node_types=[{"ranks": 2}, {"nodes": 2}], entry={"kwargs": {"lr": 1e-3}})
    path = config.store(RunDirectory(tmp_path))
    assert path == tmp_path / "configs" / f"{config.digest()}.yaml"
    before = path.stat().st_mtime_ns
    assert config.store(tmp_path) == path
    assert path.stat().st_mtime_ns == before
    loaded = Config.load(path)
    assert loaded == config
    assert loaded.digest() == config.digest() != Config().digest()


def test_replace_checks_again_and_remembers():
    config = Config.load(overrides={"seed": 3}).replace(name="b")
    assert (config.seed, config.name, config.origin("seed"), config.origin("name")) == (
        3,
        "b",
        "flag",
        "call",
    )
    with pytest.raises(ConfigError, match="warning_lead_s"):
        config.replace(time_limit_s=1)


def test_what_was_given_in_the_call_comes_from_there_even_if_it_is_the_default():
    config = Config(name="run", checkpoint={"every_s": 60}, stop=StopSettings(agreement_s=1), node_types=[{}])
    given = ("name", "checkpoint.every_s", "stop.agreement_s", "node_types.0.ranks")
    assert {config.origin(key) for key in given} == {"call"}
    assert {config.origin(key) for key in ("seed", "checkpoint.threads", "stop.watchdog_s")} == {"default"}
    changed = config.replace(checkpoint={"threads": 3})
    assert {changed.origin(key) for key in (*given, "checkpoint.threads")} == {"call"}
    assert {changed.origin(key) for key in ("seed", "checkpoint.direct", "budget")} == {"default"}


def test_a_name_is_filled_in_only_where_none_was_given():
    assert Config().named("a").name == Config(seed=1).named("a").name == "a"
    assert Config(name="run").named("a").name == "run"
    assert Config.load(overrides={"name": "run"}).named("a").name == "run"
    assert Config().named("a").named("b").name == "a"


def test_replace_leaves_the_rest_of_a_group_as_a_flag_over_a_file_does(tmp_path):
    path = write(
        tmp_path / "a.yaml",
        "checkpoint: {longest_chain: 0, every_s: 60}\nnode_types: [{ranks: 8, name: a}]\n"
        "environment: {modules: [gcc, cuda], variables: {A: x}}\n",
    )
    changes = {
        "checkpoint": {"every_steps": 5},
        "node_types.0.ranks": 3,
        "environment": {"variables": {"B": "y"}},
        "environment.modules.1": "rocm",
        "slurm.account": "lab",
    }
    over_the_file = Config.load(path, overrides=changes)
    config = Config(**yaml.safe_load(path.read_text()))
    before = config.model_dump()
    assert config.replace(**changes) == Config.load(path).replace(**changes) == over_the_file
    assert config.model_dump() == before
    checkpoint = over_the_file.checkpoint
    assert (checkpoint.longest_chain, checkpoint.every_s, checkpoint.every_steps) == (0, 60, 5)
    assert over_the_file.environment.variables == {"A": "x", "B": "y"}
    assert over_the_file.environment.modules == ("gcc", "rocm")
    assert (over_the_file.node_types[0].name, over_the_file.node_types[0].tasks_per_node) == ("a", 3)


def test_a_group_as_an_object_takes_the_place_of_the_old_one():
    config = Config(checkpoint={"longest_chain": 0}).replace(checkpoint=CheckpointSettings(every_steps=5))
    assert config == Config(checkpoint={"every_steps": 5})


#: What YAML takes for a number, a bool or a date.
SPELLINGS = [
    "00123", "2024_01", "1e3", "1_2", "0x10", "0b11", "1.10", "+5", "on", "no", "True", "2024-01-01", "2024-13-01",
    "0x_", "1:30:00",
]  # fmt: skip


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_text_is_what_was_written(tmp_path, text):
    path = write(
        tmp_path / "a.yaml",
        f"run_dir: {text} # a remark\n"
        f"slurm: {{account: {text}, srun_args: [{text}], container: [{text}]}}\n"
        f"node_types: [{{partition: {text}}}]\n"
        f"environment: {{variables: {{TAG: {text}, {text}: '1'}}}}\n"
        f"data: {{paths: {text}}}\n",
    )
    config = Config.load(
        path,
        overrides={"slurm.qos": parse_setting(text), "environment.modules": parse_setting(f"[{text}]")},
        environ={"HPC_RESUME_SLURM__NODELIST": text},
    )
    slurm, environment = config.slurm, config.environment
    assert (config.run_dir, config.node_types[0].partition) == (text, text)
    assert (slurm.account, slurm.srun_args, slurm.container.words) == (text, (text,), (text,))
    assert (slurm.qos, slurm.nodelist) == (text, text)
    assert (environment.variables, environment.modules) == ({"TAG": text, text: "1"}, (text,))
    assert config.data.paths == (text,)
    assert Config.load(config.store(tmp_path)) == config


def test_numbers_bools_and_arguments_are_what_yaml_says(tmp_path):
    path = write(
        tmp_path / "a.yaml",
        "seed: 1_000\ncheckpoint: {direct: off, every_s: 1e3, threads: 0x10}\n"
        "data: {check: off}\nslurm: {account: null, requeue: no}\nnode_types: [{ranks: 8, nodes: 2}]\n"
        "entry: {kwargs: {steps: 10_000, lr: [1e-3], on: {day: 2024-01-01, flag: yes}}}\n",
    )
    config = Config.load(path)
    assert (config.seed, config.data.check, config.slurm.account, config.slurm.requeue) == (
        1000, "off", None, False,
    )  # fmt: skip
    checkpoint = config.checkpoint
    assert (checkpoint.direct, checkpoint.every_s, checkpoint.threads) == (False, 1000, 16)
    assert config.node_types[0].tasks_per_node == 4
    assert config.entry.kwargs == {
        "steps": 10_000, "lr": [1e-3], "on": {"day": dt.date(2024, 1, 1), "flag": True},
    }  # fmt: skip
    assert kinds(config.model_dump()) <= {str, int, float, bool, NoneType, dt.date}


def kinds(value):
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return set().union(*map(kinds, inner)) if isinstance(value, (dict, list, tuple)) else {type(value)}


def test_a_parameter_of_sbatch_is_what_was_written_but_a_bool_and_a_plain_number():
    text = "{account: 007, begin: 2024-01-01, nice: 5, gres: 1e3, exclusive: on, hold: no, x: null}"
    given = Config.load(overrides={"slurm.additional_parameters": parse_setting(text)})
    assert given.slurm.additional_parameters == {
        "account": "007", "begin": "2024-01-01", "nice": 5, "gres": "1e3", "exclusive": True, "hold": False, "x": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "text", "words"),
    [
        ("seed", "on1", "but is 'on1'"),
        ("checkpoint.threads", "0x0", "but is 0"),
        ("scheduler", "off", "but is False"),
        ("environment.modules", "1_0", "list, but is '1_0'"),
        ("slurm.account.x", "1", "is a single value"),
    ],
)
def test_what_is_wrong_is_shown_as_it_was_taken(setting, text, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        Config.load(overrides={"slurm.account": parse_setting("1"), setting: parse_setting(text)})


def test_text_in_arguments_stays_text_when_it_is_stored(tmp_path):
    config = Config(entry={"kwargs": {"tag": "1e3", "other": "010", "lr": 1e-7}})
    loaded = Config.load(config.store(tmp_path))
    assert loaded.entry.kwargs == config.entry.kwargs
    assert loaded.digest() == config.digest()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("10_000", 10_000),
        ("on", True),
        ("0x_", "0x_"),
        ("2024-13-01", "2024-13-01"),
        ("3E5", 3e5),
        ("3", 3),
        ("[1, 2]", [1, 2]),
        ("{a: 1}", {"a": 1}),
        ("a: b", "a: b"),
        ("[broken", "[broken"),
        ("true", True),
        ("null", None),
        ("runs/x", "runs/x"),
        ("", None),
    ],
)
def test_values_are_read_as_yaml(text, value):
    assert parse_value(text) == value


def test_numbers_with_an_exponent_are_numbers_in_a_file(tmp_path):
    path = write(tmp_path / "a.yaml", "entry: {kwargs: {lr: 1e-3, name: 1e}}\n")
    assert Config.load(path).entry.kwargs == {"lr": 1e-3, "name": "1e"}


def test_assignments():
    assert parse_assignments(["a=1", "b=x=y"], flag="--set") == {"a": 1, "b": "x=y"}
    with pytest.raises(ConfigError, match="--set lr: no assignment"):
        parse_assignments(["lr"], flag="--set")
    with pytest.raises(ConfigError, match="twice"):
        parse_assignments(["a=1", "a=2"], flag="--set")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_shipped_file_is_valid_and_commented(path):
    Config.load(path)
    lines = path.read_text().splitlines()
    assert sum("#" in line for line in lines) >= 5
    assert yaml.safe_load(path.read_text())


def test_ways_to_continue():
    config = Config.load(
        overrides={
            "continuation": "chain",
            "slurm.array_elements": 3,
            "node_types": [{"name": "a", "wait_limit_s": "2:00:00"}, {"name": "b"}],
        }
    )
    assert (config.continuation, config.slurm.array_elements) == ("chain", 3)
    assert [node_type.wait_limit_s for node_type in config.node_types] == [7200, None]
    assert Config().continuation == "requeue"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"continuation": "resubmit"}, "'requeue', 'chain', 'array', 'exit' or 'login'"),
        ({"continuation": "array", "node_types": [{"name": "a"}, {"name": "b"}]}, "continuation: chain"),
        ({"scheduler": "slurm", "node_types": [{"name": "a"}, {"name": "a"}]}, "give each its own"),
        ({"slurm": {"array_elements": 1}}, "greater than or equal to 2"),
        ({"node_types": [{"wait_limit_s": 0}]}, "greater than 0"),
    ],
)
def test_ways_to_continue_that_cannot_be(settings, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        Config.load(overrides=settings)


def test_node_types_say_micro_batch_and_precision():
    config = Config.load(overrides={"node_types": [{"micro_batch": 4, "precision": "bf16"}]})
    assert (config.node_types[0].micro_batch, config.node_types[0].precision) == (4, "bf16")
    assert (NodeType().micro_batch, NodeType().precision) == (None, None)
    with pytest.raises(ConfigError, match=r"node_types\.0\.precision.*'bf16', 'fp16' or 'fp32'.*'half'"):
        Config.load(overrides={"node_types": [{"precision": "half"}]})
    with pytest.raises(ConfigError, match="micro_batch"):
        Config.load(overrides={"node_types": [{"micro_batch": 0}]})


def test_a_change_of_precision_is_not_allowed_by_default():
    assert not Config().allow_precision_change
    assert Config.load(environ={"HPC_RESUME_ALLOW_PRECISION_CHANGE": "true"}).allow_precision_change


def test_paths_of_data_begin_where_the_run_is_submitted():
    config = Config(data={"paths": ["images", "/abs", "$TMPDIR/x", "~/y"], "validation": "val.csv"})
    found = config.data.anchored(Path("/here"))
    assert found.paths == ("/here/images", "/abs", "$TMPDIR/x", "~/y")
    assert found.validation == ("/here/val.csv",)
    assert found.anchored(Path("/there")) == found


@pytest.mark.parametrize(
    ("text", "seconds"), [("24:00:00", 86400), ("90:00", 5400), ("1-12:00:00", 129600), ("1e3", 1000)]
)
def test_times_in_files_and_flags_are_read_as_slurm_reads_them(tmp_path, text, seconds):
    path = write(tmp_path / "run.yaml", f"time_limit_s: {text}\n")
    assert Config.load(path).time_limit_s == seconds
    assert Config.load(overrides={"time_limit_s": parse_value(text)}).time_limit_s == seconds


def test_a_time_that_slurm_does_not_know_is_no_number(tmp_path):
    path = write(tmp_path / "run.yaml", "time_limit_s: 1:00:00:00\n")  # 60 hours to the base of 60
    with pytest.raises(ConfigError, match=r"time_limit_s: .*'1:00:00:00'"):
        Config.load(path)


def test_validation_has_its_settings():
    config = Config(validation={"nonfinite": "stop", "tolerance": {"bf16": 0.1}, "norm_factor": None})
    assert (config.validation.nonfinite, config.validation.tolerance.bf16) == ("stop", 0.1)
    assert config.validation.tolerance.fp32 == Config().validation.tolerance.fp32
    assert config.validation.norm_factor is None
    for wrong in (
        {"nonfinite": "never"},
        {"norm_factor": 1},
        {"tolerance": {"fp32": 0}},
        {"nonfinite_in_a_row": 0},
    ):
        with pytest.raises(ConfigError, match=r"validation\."):
            Config(validation=wrong)
