"""Configs: what wins, what is refused and how it is told, saved and read again."""

import ast
import dataclasses
import functools
import json
import math
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer

from apps.main.train import TrainArgs
from lingua.args import PATH_KEYS, from_dict, looks_secret, parse_args, read_yaml, refuse_secrets, to_dict, to_yaml
from lingua.errors import UserError


@dataclass
class Inner:
    size: int = 1
    rate: float = 0.5
    flag: bool = True
    label: str = "x"
    maybe: int | None = None
    perhaps: str | None = None
    names: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] | None = None


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    steps: int = 10
    name: str = "run"
    anything: Any | None = None


@dataclass
class Needy:
    wanted: int
    inner: Inner = field(default_factory=Inner)


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> str:
        path = tmp_path / "some.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


def block(key: str, value: str) -> str:
    """YAML of one key, its dots as sections."""
    names = key.split(".")
    return "\n".join("  " * depth + f"{name}:" for depth, name in enumerate(names)) + f" {value}\n"


def one_line(message: str) -> bool:
    return "\n" not in message and "\r" not in message and message != ""


def refusal(argv: list[str], cls: type = Outer) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        parse_args(cls, argv)
    assert type(caught.value) is UserError
    message = str(caught.value)
    assert one_line(message)
    return message


# --- what wins ---------------------------------------------------------------------------------------------------


def test_nothing_given_leaves_the_defaults():
    assert parse_args(Outer, []) == Outer()
    assert parse_args(TrainArgs, []) == TrainArgs()


def test_the_command_line_wins_over_the_file_over_the_defaults(write):
    file = write("steps: 20\nname: file\ninner:\n  size: 2\n  rate: 3\n")
    for place in range(3):
        argv = ["name=line", "inner.size=5"]
        argv.insert(place, f"config={file}")
        expected = Outer(steps=20, name="line", inner=Inner(size=5, rate=3.0))
        assert parse_args(Outer, argv) == expected
    assert parse_args(Outer, ["steps=1", "steps=2"]).steps == 2


def test_mappings_are_merged_and_lists_replaced(write):
    file = write("inner: {weights: {a: 1, b: 2}, names: [x, y], extra: {p: {q: 1}}}")
    inner = parse_args(
        Outer, [f"config={file}", "inner.weights.b=3", "inner.weights.c=4", "inner.names=[z]", "inner.extra.p.r=[1,2]"]
    ).inner
    assert inner.weights == {"a": 1.0, "b": 3.0, "c": 4.0}
    assert inner.names == ["z"]
    assert inner.extra == {"p": {"q": 1, "r": [1, 2]}}
    assert type(inner.extra["p"]["r"]) is list


def test_arguments_come_from_the_command_line_where_none_are_given(monkeypatch):
    monkeypatch.setattr("sys.argv", ["program", "steps=7"])
    assert parse_args(Outer).steps == 7


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("steps=5", Outer(steps=5)),
        ("steps=-5", Outer(steps=-5)),
        ("inner.rate=1e-4", Outer(inner=Inner(rate=1e-4))),
        ("inner.rate=2", Outer(inner=Inner(rate=2.0))),
        ("inner.flag=false", Outer(inner=Inner(flag=False))),
        ("inner.flag=False", Outer(inner=Inner(flag=False))),
        ("inner.maybe=3", Outer(inner=Inner(maybe=3))),
        ("inner.maybe=null", Outer()),
        ("inner.perhaps=null", Outer()),
        ("inner.label=4,12,20", Outer(inner=Inner(label="4,12,20"))),
        ("inner.label=4", Outer(inner=Inner(label="4"))),
        ("inner.label=a=b", Outer(inner=Inner(label="a=b"))),
        ('inner.label=""', Outer(inner=Inner(label=""))),
        ("name=2020-01-01", Outer(name="2020-01-01")),
        ("name=${steps}", Outer(name="10")),
        ("inner.weights={a: 1, b.c: 0.5}", Outer(inner=Inner(weights={"a": 1.0, "b.c": 0.5}))),
        ("inner.names=[a, b]", Outer(inner=Inner(names=["a", "b"]))),
        ("inner={size: 3, flag: false}", Outer(inner=Inner(size=3, flag=False))),
        ("inner={}", Outer()),
        ("anything={a: [1, {b: null}]}", Outer(anything={"a": [1, {"b": None}]})),
        ("inner.extra=null", Outer()),
    ],
)
def test_values_that_are_taken(argument, expected, write):
    parsed = parse_args(Outer, [argument])
    assert parsed == expected
    assert type(parsed.inner.rate) is float
    if argument.count("=") == 1:
        assert parse_args(Outer, ["config=" + write(block(*argument.split("=")))]) == expected


def test_the_environment_can_be_used_but_not_its_secrets(monkeypatch, write):
    monkeypatch.setenv("SCRATCH_DISK", "/scratch")
    assert parse_args(Outer, ["name=${oc.env:SCRATCH_DISK}/run"]).name == "/scratch/run"
    assert parse_args(Outer, ["config=" + write("name: ${oc.env:SCRATCH_DISK}/run")]).name == "/scratch/run"
    monkeypatch.delenv("SCRATCH_DISK")
    assert parse_args(Outer, ["name=${oc.env:SCRATCH_DISK,/tmp}/run"]).name == "/tmp/run"
    assert parse_args(Outer, ["inner.perhaps=${oc.env:SCRATCH_DISK,null}"]).inner.perhaps is None


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("SCRATCH_DISK", raising=False)
    message = refusal(["name=${oc.env:SCRATCH_DISK}/run"])
    assert message.startswith("name: ")
    assert "SCRATCH_DISK" in message


SECRETS = ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "my_password", "GITHUB_AUTH", "SENTRY_DSN"]


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("default", ["", ",none"])
def test_secrets_are_refused(monkeypatch, write, name, default):
    monkeypatch.setenv(name, "hunter2")
    for argv in (
        [f"name=${{oc.env:{name}{default}}}"],
        [f"anything={{a: [{{b: '${{oc.env:{name}{default}}}'}}]}}"],
        ["config=" + write(f"name: x${{oc.env:{name}{default}}}y")],
        [f"inner.label={name}", f"name=${{oc.env:${{inner.label}}{default}}}"],
    ):
        message = refusal(argv)
        assert "hunter2" not in message
        assert name in message
        assert "looks like a secret" in message
        assert message.startswith(("name: ", "anything.a[0].b: "))


def test_a_config_of_the_users_own_reads_any_variable(monkeypatch):
    """Nothing of ours is registered with OmegaConf, but while a config of ours is resolved."""
    monkeypatch.setenv("MY_TOKEN", "hunter2")
    own = OmegaConf.create({"token": "${oc.env:MY_TOKEN}", "other": "${oc.env:NOT_SET,x}"})
    before = dict(BaseContainer._resolvers)
    assert parse_args(Outer, ["name=${oc.env:NOT_SET,y}"]).name == "y"
    refusal(["name=${oc.env:MY_TOKEN}"])
    assert dict(BaseContainer._resolvers) == before
    assert OmegaConf.to_container(own, resolve=True) == {"token": "hunter2", "other": "x"}
    monkeypatch.delitem(BaseContainer._resolvers, "oc.env")  # which a program may do
    assert parse_args(Outer, []).name == "run"
    assert not OmegaConf.has_resolver("oc.env")


OTHER_SECRETS = ["OPENAI_API_KEY", "SSH_KEY", "accessToken", "HFToken", "HFTOKEN", "GITHUB_PAT", "API_KEYS", "db.pwd"]
NO_SECRETS = [
    *("HOME", "OMP_NUM_THREADS", "NCCL_DEBUG", "SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES", "AUTHOR", "RANK", "PATH"),
    *("NCCL_IB_PKEY", "X_MAX_TOKENS", "num_keys", "MONKEY", "TOKENIZERS_PARALLELISM", "NCCL_CUMEM_HOST_ENABLE"),
]


def test_which_names_look_secret():
    for name in [*SECRETS, *OTHER_SECRETS]:
        assert looks_secret(name), name
        assert looks_secret(name, "abc"), name
    for name in NO_SECRETS:
        assert not looks_secret(name), name
        assert not looks_secret(name, "abc"), name


@pytest.mark.parametrize("value", ["1", "-2", "0.5", "1e-3", "true", "False"])
def test_numbers_are_no_secrets_but_in_passwords(value):
    for name in ("PAD_TOKEN", "SORT_KEY", "USE_AUTH", "NCCL_IB_PKEY", "X_MAX_TOKENS"):
        assert not looks_secret(name, value), name
        refuse_secrets({name: value}, "env")
    for name in ("DB_PASSWORD", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY"):
        assert looks_secret(name, value), name
        with pytest.raises(ValueError, match=rf"^env\.{name}: looks like a secret"):
            refuse_secrets({name: value}, "env")


# --- home folders ------------------------------------------------------------------------------------------------


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_home_folder_in_every_path_key(home):
    keys = [
        *("dump_dir", "data.root_dir", "data.tokenizer.path", "checkpoint.path", "checkpoint.init_ckpt_path"),
        *("profiling.trace_folder",),
    ]
    (home / "c.yaml").write_text("data: {root_dir: ~/of the file}\neval: {validation: {root_dir: ~/val}}\n")
    args = parse_args(TrainArgs, ["config=~/c.yaml"])
    assert args.data.root_dir == f"{home}/of the file"
    assert args.eval == {"validation": {"root_dir": f"{home}/val"}}
    args = parse_args(TrainArgs, [*(f"{key}=~/a/{key}" for key in keys), "name=~/n", "env.path=~/e"])
    for key in keys:
        assert functools.reduce(getattr, key.split("."), args) == f"{home}/a/{key}"
    assert (args.name, args.env["path"]) == ("~/n", "~/e")
    assert from_dict(TrainArgs, {"dump_dir": "~"}, "here").dump_dir == str(home)
    # As in a shell: what only has the sign in it, or names nobody's home.
    for text in ("a/~/b", "./~", "~nobody-of-this-name/x"):
        assert parse_args(TrainArgs, [f"dump_dir={text}"]).dump_dir == text


# Keys of text that name no file.
NO_PATHS = {
    *("account", "constraint", "device", "dtype", "exclude", "float8_filter", "float8_recipe", "fsdp_type"),
    *("init_std_factor", "launcher", "layers", "mem", "model_dtype", "name", "on_error", "partition", "prompt"),
    *("prompts", "qos", "scheduler", "script", "sources", "spawn_method", "statistics", "until", "value_rounding"),
    *("value_update", "values_device", "x"),
}


def test_every_key_of_text_is_a_path_or_is_not():
    """A new key has to say which."""
    root, keys = Path(__file__).parents[2], set()
    for file in [*root.glob("lingua/**/*.py"), *root.glob("apps/**/*.py")]:
        for section in ast.walk(ast.parse(file.read_text())):
            if isinstance(section, ast.ClassDef) and section.name.endswith("Args") and section.decorator_list:
                fields = [line for line in section.body if isinstance(line, ast.AnnAssign)]
                keys |= {line.target.id for line in fields if re.search(r"\bstr\b(?!,)", ast.unparse(line.annotation))}
    keys -= {"env"}  # any variables
    assert keys - PATH_KEYS == NO_PATHS
    assert PATH_KEYS - keys == {"dir", "include_path"}  # of wandb, and of lm-eval


# --- what is refused ---------------------------------------------------------------------------------------------

# Key, value as written, the beginning of the message after "<key>: ".
WRONG = [
    ("stepz", "1", "unknown key; did you mean steps?"),
    ("qqq", "1", "unknown key; known: inner, steps, name, anything"),
    ("inner.sise", "1", "unknown key; did you mean inner.size?"),
    ("inner.qqq", "1", "unknown key; known: size, "),
    ("inner", "5", "'5' where a section"),
    ("inner", "null", "'None' where a section"),
    ("inner", "[1]", "'[1]' where a section"),
    ("inner", "???", "'???' where a section"),
    ("inner", "${anything}", "'${anything}' where a section"),
    ("steps", "abc", "'abc' is not a whole number"),
    ("steps", "1.5", "'1.5' is not a whole number"),
    ("steps", "true", "'True' is not a whole number"),
    ("steps", "null", "null, but a value of type int"),
    ("steps", "{a: 1}", "'{'a': 1}' where a single value"),
    ("steps", "[1]", "'[1]' where a single value"),
    ("inner.maybe", "abc", "'abc' is not a whole number"),
    ("inner.maybe", "1.5", "'1.5' is not a whole number"),
    ("inner.maybe", "[1]", "'[1]' where a single value"),
    ("inner.maybe", str(2**63), "9223372036854775808 is too large for 64 bits"),
    ("inner.size", f"'{10**400}'", f"{str(10**400)[:30]} is too large for 64 bits (401 digits)"),
    ("inner.rate", str(10**400), f"{str(10**400)[:30]} is too large for 64 bits (401 digits)"),
    ("inner.rate", "fast", "'fast' is not a number"),
    ("inner.rate", "true", "'True' is not a number"),
    ("inner.rate", "null", "null, but a value of type float"),
    ("inner.flag", "maybe", "'maybe' is neither true nor false"),
    ("inner.flag", "1", "'1' is neither true nor false"),
    ("inner.flag", "0.0", "'0.0' is neither true nor false"),
    ("inner.flag", "null", "null, but a value of type bool"),
    ("inner.label", "null", "null, but a value of type str"),
    ("inner.label", "[4, 12]", "'[4, 12]' where a single value"),
    ("inner.label", "{a: 1}", "'{'a': 1}' where a single value"),
    ("inner.names", "a", "'a' where a list"),
    ("inner.names", "{a: 1}", "'{'a': 1}' where a list"),
    ("inner.weights", "a", "'a' where a mapping"),
    ("inner.weights", "[a]", "'['a']' where a mapping"),
    ("inner.weights", "null", "'None' where a mapping"),
    ("inner.weights.a", "much", "'much' is not a number"),
    ("inner.weights.a", "{b: 1}", "'{'b': 1}' where a single value"),
    ("inner.extra", "a", "'a' where a mapping"),
]


@pytest.mark.parametrize(("key", "value", "problem"), WRONG, ids=[f"{key}={value}" for key, value, _ in WRONG])
def test_wrong_keys_and_values_are_named(write, key, value, problem):
    message = refusal([f"{key}={value}"])
    assert message.startswith(f"{key}: {problem}")
    assert message.endswith("(from command line)")

    file = write(block(key, value))
    message = refusal([f"config={file}"])
    assert message.startswith(f"{key}: {problem}")
    assert message.endswith(f"(from {file})")


@pytest.mark.parametrize("argument", ["inner.weights.a=null", "inner.weights={a: }", "inner.weights={a:1}"])
def test_a_name_without_a_value_is_named(argument):
    message = refusal([argument])
    assert message.startswith("inner.weights")
    assert message.removeprefix("inner.weights").startswith((".a: ", ": 'a"))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("${nope}", "nope"),
        ("${name}", "ecursive"),
        ("${nope:1}", "nope"),
        ("${oc.decode:'[1'}", ""),
    ],
)
def test_interpolations_that_fail_name_their_key(write, value, problem):
    for argv in ([f"name={value}"], ["config=" + write(f'name: "{value}"')]):
        message = refusal(argv)
        assert message.startswith("name: ")
        assert problem in message


def test_an_interpolation_of_the_wrong_type_names_its_key():
    assert refusal(["steps=${name}"]).startswith("steps: ")


@pytest.mark.parametrize("argument", ["x", "", "=1", " steps=1", "steps 5", "--help", "-h"])
def test_what_is_no_key_and_value_is_shown(argument):
    assert refusal([argument]).startswith(f"argument '{argument}': wanted key=value")


@pytest.mark.parametrize(
    "value",
    ["[", "{a: 1", "${", "'a", "!!int abc", "!!float", "!!int", "!!timestamp 2020-01-01", "1" * 5000, "&a [*a]"],
)
def test_values_that_are_no_yaml_name_their_argument(value):
    message = refusal(["steps=5", f"inner.size={value}"])
    assert "inner.size" in message
    assert "command line" in message or message.startswith("argument")


@pytest.mark.parametrize("key", ["[", "a[", "]", "[]", "inner.[", "..", "inner..size", ".", "inner.", "steps.", "a[0]"])
def test_odd_keys_are_refused(key):
    refusal([f"{key}=1"])


@pytest.mark.parametrize("breaker", ["\n", "\r", "\r\n"], ids=repr)
def test_line_breaks_in_what_is_given_do_not_break_the_message(breaker, write):
    for argv in (
        [f"a{breaker}b=1"],
        [f"{breaker}=1"],
        [f"inner.size={json.dumps('a' + breaker + 'b')}"],
        [f"inner.flag={json.dumps('a' + breaker + 'b')}"],
        [f"inner={json.dumps('a' + breaker + 'b')}"],
        [f"inner={{{json.dumps('a' + breaker + 'b')}: 1}}"],
        [f"inner.weights={{{json.dumps('a' + breaker + 'b')}: x}}"],
        ["config=" + write(json.dumps({"inner": f"a{breaker}b"}))],
        [f"config=/no{breaker}where"],
        ["steps", f"x{breaker}y"],
    ):
        refusal(argv)


def test_a_missing_value_is_named():
    assert refusal([], Needy).startswith("wanted: not set")
    assert parse_args(Needy, ["wanted=1"]) == Needy(wanted=1)


# --- the file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("steps: 1\nname: [a\n", 3),
        ("steps: 1\n\tname: a\n", 2),
        ("steps: 1\nname: 'a\n", 3),
        ("steps: 1\nsteps: 2\n", 2),
        ("steps: 1\n---\nsteps: 2\n", 2),
        ("steps: 1\nname: *a\n", 2),
        ("steps: 1\nname: !what x\n", 2),
        ("steps: 1\nname: !!python/object/apply:os.getcwd []\n", 2),
        ("steps: 1\n? [a]\n: 1\n", 2),
        ("steps: 1\nname: a: b\n", 2),
    ],
)
def test_a_syntax_error_tells_file_and_line(write, text, line):
    file = write(text)
    assert refusal([f"config={file}"]).startswith(f"{file}:{line}: not YAML (")


@pytest.mark.parametrize(
    "text",
    [
        "- steps\n",
        "5",
        "null: 1",
        "steps: !!int abc",
        "steps: !!int",
        "steps: !!float",
        "steps: " + "1" * 5000,
        "name: ${a",
        "name: !!timestamp 2020-01-01",
        "name: !!set {a}",
        b"name: \xff",
        b"\xff\xfes\0",
        b'name: "a\0"',
        "just words",
    ],
    ids=lambda text: repr(text)[:40],
)
def test_other_files_that_do_not_fit_are_named(write, text):
    file = write(text)
    assert file in refusal([f"config={file}"])


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "---\n", "null\n"])
def test_an_empty_file_gives_the_defaults(write, text):
    assert parse_args(Outer, ["config=" + write(text)]) == Outer()


@pytest.mark.parametrize("file", ["", "/nonexistent/x.yaml", "/tmp", "a\0b", "a" * 5000, "/etc/hostname/x.yaml"])
def test_a_missing_file_is_named(file):
    message = refusal([f"config={file}"])
    assert message.startswith(("config: no file", "config: "))


def test_two_files_are_one_too_many(write):
    file = write("steps: 1")
    assert refusal([f"config={file}", f"config={file}"]).startswith("config: given 2 times")


def test_read_yaml_gives_a_mapping(write):
    assert read_yaml(write("a: {b: 1}")) == {"a": {"b": 1}}


# --- saved and read again ----------------------------------------------------------------------------------------

TRICKY = [
    "",
    " ",
    "null",
    "~",
    "true",
    "on",
    "1",
    "1.5",
    "1e5",
    "1_000",
    "0x10",
    "12:30",
    "4,12",
    "- a",
    "a: b",
    "#a",
    "'",
    '"',
]
TRICKY += [
    "[1]",
    "{a}",
    "&a",
    "*a",
    "!a",
    "%a",
    "@a",
    "a\nb",
    "a\n",
    "\ta",
    "\\",
    "\\n",
    r"layers\.[0-9]+\.",
    "é中😀",
    "\x00",
    "\x85",
]
TRICKY += [
    "${a}",
    "${",
    "\\${a}",
    r"\\${a}\\",
    "x\\",
    "${oc.env:HOME}",
    "$${a}",
    "<<",
    "=",
    "2020-01-01",
    ".inf",
    ".nan",
    "0o17",
    "None",
    "$",
    "$a",
    "{}",
    "a" * 300,
    "b " * 200,
]
TEXTS = st.one_of(st.sampled_from(TRICKY), st.text(st.characters(exclude_categories=["Cs"]), max_size=20)).filter(
    lambda text: text != "???"
)
WHOLE_NUMBERS = st.integers(-(2**63), 2**63 - 1)
OUTER = st.builds(
    Outer,
    inner=st.builds(
        Inner,
        size=WHOLE_NUMBERS,
        rate=st.floats(allow_nan=False),
        flag=st.booleans(),
        label=TEXTS,
        maybe=st.none() | WHOLE_NUMBERS,
        perhaps=st.none() | TEXTS,
        names=st.lists(TEXTS, max_size=3),
        weights=st.dictionaries(TEXTS, st.floats(allow_nan=False), max_size=3),
        extra=st.none()
        | st.dictionaries(
            TEXTS, st.none() | st.booleans() | st.integers() | TEXTS | st.lists(TEXTS, max_size=2), max_size=3
        ),
    ),
    steps=WHOLE_NUMBERS,
    name=TEXTS,
)


@given(args=OUTER)
def test_what_is_saved_is_read_again(args, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "saved.yaml"
    path.write_text(to_yaml(args), encoding="utf-8")
    assert parse_args(Outer, [f"config={path}"]) == args
    as_dict = to_dict(args)
    assert as_dict == dataclasses.asdict(args)
    assert from_dict(Outer, json.loads(json.dumps(as_dict)), "params.json") == args


def test_the_training_config_is_saved_and_read_again(tmp_path):
    args = parse_args(
        TrainArgs,
        ["data.sources={a: 1, b c: 2.5}", "model.productkey_args.layers=4", "logging.wandb={project: p, tags: [x]}"],
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(args))
    assert parse_args(TrainArgs, [f"config={path}"]) == args
    assert json.loads(json.dumps(to_dict(args))) == dataclasses.asdict(args)


def test_a_dollar_that_is_no_interpolation_is_saved_and_read_again(tmp_path):
    args = parse_args(Outer, [r"name=cost \${5}"])
    assert args.name == "cost ${5}"
    assert to_dict(args)["name"] == "cost ${5}"
    assert from_dict(Outer, to_dict(args), "params.json") == args
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(args))
    assert parse_args(Outer, [f"config={path}"]) == args


def test_numbers_that_are_none_are_saved(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(Outer(inner=Inner(rate=math.nan))))
    assert math.isnan(parse_args(Outer, [f"config={path}"]).inner.rate)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 1}, "stepz: unknown key; did you mean steps? (from params.json)"),
        ({"steps": "many"}, "steps: 'many' is not a whole number (from params.json)"),
        ({"inner": {"size": None}}, "inner.size: null, but a value of type int is wanted (from params.json)"),
        ({"inner": 3}, "inner: '3' where a section of keys and values is wanted (from params.json)"),
    ],
    ids=repr,
)
def test_dictionaries_are_checked_alike(values, message):
    with pytest.raises(ValueError, match=".") as caught:
        from_dict(Outer, values, "params.json")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- anything at all ---------------------------------------------------------------------------------------------


def all_keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for name, kind in typing.get_type_hints(cls).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            keys += all_keys(kind, f"{prefix}{name}.")
    return keys


PIECES = st.sampled_from([*"ab01.-_ :,[]{}\"'\\$&*!?|>%@`#=~+/é"]) | st.sampled_from(
    [
        "${",
        "}",
        "${oc.env:",
        "???",
        "null",
        "true",
        "1e",
        "!!int",
        "!!float ",
        "!!python/",
        "<<",
        ".inf",
        "name",
        ": ",
        "- ",
    ]
)
BREAKS = st.sampled_from([*"\n\r\t\x00\x0b\x0c\x1c\x85\u2028"])


def arguments(pieces):
    text = st.lists(pieces, max_size=6).map("".join)
    key = st.sampled_from(all_keys(Outer)) | st.tuples(st.sampled_from(all_keys(Outer)), text).map("".join) | text
    return st.lists(st.tuples(key, text).map("=".join) | text, min_size=1, max_size=3)


def check_arguments(argv: list[str]) -> None:
    try:
        result = parse_args(Outer, argv)
    except ValueError as error:
        result = error
    if isinstance(result, ValueError):
        assert type(result) is UserError
        assert one_line(str(result)), repr(str(result))
    else:
        assert type(result) is Outer
        json.dumps(to_dict(result))


@given(argv=arguments(PIECES))
def test_any_argument_is_taken_or_refused_in_one_line(argv):
    check_arguments(argv)


@given(argv=arguments(PIECES | BREAKS))
def test_any_argument_with_line_breaks_is_taken_or_refused_in_one_line(argv):
    check_arguments(argv)


@given(text=st.lists(st.sampled_from(all_keys(Outer)) | PIECES | BREAKS, max_size=12).map("".join))
def test_any_file_is_taken_or_refused_in_one_line(text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode())
    check_arguments([f"config={path}"])
