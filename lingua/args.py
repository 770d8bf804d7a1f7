"""YAML and command line -> typed dataclasses, checked whole; every error names its key.

The order: defaults of the dataclass < the file named by `config=` < `key=value` on the command line.

`${oc.env:NAME}` in a value is a variable of the environment. For one that looks like a secret it is refused, since
configs are saved (config.yaml, params.json, wandb): what needs HF_TOKEN or WANDB_API_KEY reads it by itself. `~` at the
start of a path is the home folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import os
import re
import shutil
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import OmegaConfBaseException

from lingua.errors import UserError

T, R, P = TypeVar("T"), TypeVar("R"), ParamSpec("P")

# What only secrets have in their names, words that only secrets are called, and words that flags are called, too.
_SECRET_PART = re.compile(
    r"secret|passw|passphrase|credential|connection_?string"
    r"|(access|account|api|auth|master|private|signing|ssh|storage)_?key",
    re.IGNORECASE,
)
_SECRET_WORDS = {"dsn", "jwt", "pass", "pwd", "webhook"}
_POSSIBLY_SECRET_WORDS = {"auth", "cookie", "cookies", "key", "keys", "pat", "private", "sas", "tokens"}
_COUNTING_WORDS = {"count", "len", "length", "limit", "max", "min", "n", "num", "number", "per", "size", "total"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_NUMBER = re.compile(r"[+-]?[0-9.]{1,20}(e[+-]?[0-9]+)?|true|false", re.IGNORECASE)


def looks_secret(name: str, value: str | None = None) -> bool:
    """Whether a variable of this name should stay out of logs and saved configs.

    Words of the name count, not its ending: HF_TOKEN and accessKey are secrets, NCCL_IB_PKEY and X_MAX_TOKENS are not.
    A `value` that is a number, true or false makes a name such as USE_AUTH or SORT_KEY none, but not a password's.
    """
    words = {word.lower() for word in _WORD.findall(name)}
    if words & _SECRET_WORDS or _SECRET_PART.search(name):
        return True
    possible = words & _POSSIBLY_SECRET_WORDS or any(word.endswith("token") for word in words)
    if not possible or words & _COUNTING_WORDS:
        return False
    return value is None or _NUMBER.fullmatch(value) is None


def without_credentials(line: str) -> str:
    """`line` without user and password in its URLs, which HF_ENDPOINT may have (even without https://)."""
    return re.sub(r"(?<=//)[^/\s]*@|[^/\s]+:[^/\s]+@", "", line)


def refuse_secrets(section: Any, key: str) -> None:
    """Raises UserError, one line that names the key, for text in nested mappings whose name looks like a secret's."""
    for name, value in section.items() if isinstance(section, Mapping) else ():
        if isinstance(value, str) and looks_secret(str(name), value):
            raise UserError(
                f"{key}.{name}: looks like a secret, and the config is saved in dump_dir; export it in the shell"
            )
        refuse_secrets(value, f"{key}.{name}")


def _environment_resolver(name: str, *default: str | None) -> str | None:
    """`${oc.env:NAME}`, but not for secrets: the value would be saved with the config."""
    if looks_secret(name, os.environ.get(name)):
        raise UserError(
            f"${{oc.env:{name}}} looks like a secret, and the config is saved in dump_dir; leave it in the environment"
        )
    if name not in os.environ and not default:
        raise UserError(f"the environment variable {name} is not set")
    return os.environ.get(name, *default)


@contextlib.contextmanager
def refusing_secrets() -> Iterator[None]:
    """`${oc.env:HF_TOKEN}` is a UserError within: of what is resolved here, all is saved.

    OmegaConf has one table of resolvers for the process: afterwards `oc.env` is what it was before.
    """
    resolvers = BaseContainer._resolvers
    before = resolvers.get("oc.env")
    OmegaConf.register_resolver("oc.env", _environment_resolver, replace=True)
    try:
        yield
    finally:
        OmegaConf.clear_resolver("oc.env")
        if before is not None:
            resolvers["oc.env"] = before


# Keys, in whatever section, whose values are files and folders: `~` at their start is the user's home folder, as in a
# shell, which does not see it in key=~/value.
PATH_KEYS = {
    *("anaconda", "ckpt", "ckpt_dir", "dir", "dump_dir", "folder", "hf_dir", "include_path", "init_ckpt_path"),
    *("metric_log_dir", "out", "out_dir", "path", "plot", "prompt_file", "root_dir", "trace_folder"),
}


def user_path(path: str) -> Path:
    """The type of a path among a script's arguments."""
    return Path(os.path.expanduser(path))


def _expand_paths(section: Any) -> None:
    """Expands the values of PATH_KEYS in a dataclass instance or mapping, at any depth, in place."""
    values = vars(section) if dataclasses.is_dataclass(section) else section
    for name, value in values.items():
        if name in PATH_KEYS and isinstance(value, str):
            values[name] = os.path.expanduser(value)
        elif name in PATH_KEYS and isinstance(value, list):
            values[name] = [os.path.expanduser(path) if isinstance(path, str) else path for path in value]
        elif (dataclasses.is_dataclass(value) or isinstance(value, dict)) and name != "env":
            _expand_paths(value)


def _in_one_line(function: Callable[P, R]) -> Callable[P, R]:
    """What users give may hold line breaks; what they are told about it does not."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            raise UserError(" ".join(str(error).split())) from None

    return wrapper


@_in_one_line
@refusing_secrets()
def parse_args(cls: type[T], argv: list[str] | None = None) -> T:
    """An instance of dataclass `cls` from `key=value` arguments (default: the command line).

    Raises UserError, one line, for anything that does not fit `cls`.
    """
    argv = sys.argv[1:] if argv is None else argv
    for argument in argv:
        if not re.match(r"[^=\s][^=]*=", argument):
            raise UserError(f"argument {argument!r}: wanted key=value, such as optim.lr=1e-4")
    files = [argument.partition("=")[2] for argument in argv if argument.startswith("config=")]
    if len(files) > 1:
        raise UserError(f"config: given {len(files)} times; one file can be read")
    config = OmegaConf.structured(cls)
    for file in files:
        config = _merge(cls, config, read_yaml(file), file)
    for argument in argv:
        if not argument.startswith("config="):
            config = _merge(cls, config, read_argument(argument, cls), "command line")
    return _to_object(config)


@_in_one_line
@refusing_secrets()
def from_dict(cls: type[T], values: Mapping[str, Any], origin: str) -> T:
    """An instance of dataclass `cls` from nested dictionaries, such as `to_dict` gives.

    Raises UserError for what does not fit, with `origin` as where the values come from.
    """
    return _to_object(_merge(cls, OmegaConf.structured(cls), OmegaConf.create(escape(dict(values))), origin))


def to_dict(args: object) -> dict[str, Any]:
    """Plain, JSON-ready values of a dataclass instance."""
    return dataclasses.asdict(args)


def to_yaml(args: object) -> str:
    """YAML that `config=` reads back as the same values."""
    return OmegaConf.to_yaml(OmegaConf.create(escape(to_dict(args))))


def escape(value: Any) -> Any:
    """Values as they are, for OmegaConf, which would take ${...} in a string for an interpolation."""
    if isinstance(value, dict):
        return {key: escape(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [escape(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
    return value


@_in_one_line
def read_yaml(file: str) -> DictConfig:
    """Raises UserError where the file is missing or no YAML mapping, with the line."""
    file = os.path.expanduser(file)
    try:
        if not Path(file).is_file():
            raise UserError(f"config: no file '{file}' (from {os.getcwd()})")
    except OSError as error:
        raise UserError(f"config: {first_line(error)}") from None
    try:
        loaded = OmegaConf.load(file)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else file
        raise UserError(f"{where}: not YAML ({getattr(error, 'problem', None) or first_line(error)})") from None
    except Exception as error:  # of the disk, the encoding, or any kind out of the constructors of YAML tags
        raise UserError(f"{file}: cannot be read ({first_line(error)})") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{file}: wanted a mapping of keys to values")
    return loaded


def read_argument(argument: str, cls: type) -> DictConfig:
    """One `key=value`. The value is YAML, but where `cls` has a string there it is the text as it stands (unless that
    is quoted, or null): nothing of a folder's name is lost to YAML's own signs. Raises UserError, one line.
    """
    key, _, text = argument.partition("=")
    error = None
    try:
        given = OmegaConf.from_dotlist([argument])
        value = OmegaConf.select(given, key) if "${" not in text else text
    except Exception as caught:  # of any kind, as in read_yaml
        given, value, error = None, text, caught
    quoted = isinstance(value, str) and len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    is_list = isinstance(value, DictConfig | ListConfig) and text[0] in "{["  # which is told to be no string
    if _is_text(cls, key) and not (error is None and (value is None or quoted or is_list)):
        try:
            given = OmegaConf.create()
            OmegaConf.update(given, key, text)
            error = None
        except Exception as caught:
            error = caught
    if error is not None:
        raise UserError(f"{key}: {text!r} cannot be read (from command line; {first_line(error)})") from None
    return given


def _is_text(cls: type, key: str) -> bool:
    """Whether dataclass `cls` has a string at `key`, such as `data.root_dir`."""
    kind: Any = cls
    for name in key.split("."):
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(name)
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        else:
            return False
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        if typing.get_origin(kind) in (typing.Union, types.UnionType) and len(options) == 1:
            kind = options[0]
    return kind is str


def _merge(cls: type, config: DictConfig, given: Any, origin: str) -> DictConfig:
    _check(cls, OmegaConf.to_container(given, resolve=False), "", origin)
    try:
        return OmegaConf.merge(config, given)
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, origin)) from None


@_in_one_line
@refusing_secrets()
def check_config(cls: type, config: DictConfig, origin: str) -> None:
    """Raises UserError, one line, for keys that `cls` does not have and values that do not fit. Interpolations are
    left as they are, since what they name may not be there yet.
    """
    _merge(cls, OmegaConf.structured(cls), config, origin)


def _to_object(config: DictConfig) -> Any:
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise UserError(f"{missing[0]}: not set, and it has no default")
        args = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, None)) from None
    _expand_paths(args)
    return args


def _explain(error: OmegaConfBaseException, origin: str | None) -> str:
    where = f" (from {origin})" if origin else ""
    message = first_line(error)
    match = re.match(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", message)
    if match:
        kind = {"Integer": "a whole number", "Float": "a number"}.get(match[2], match[2])
        message = f"'{match[1]}' is not {kind}"
    match = re.match(r"Value '(.*)' is not a valid bool", message)
    if match:
        message = f"'{match[1]}' is neither true nor false"
    message = re.sub(
        r"^Incompatible value 'None' for field of type '(\w+)'", r"null, but a value of type \1 is wanted", message
    )
    return f"{error.full_key}: {message}{where}"


def first_line(error: BaseException) -> str:
    """Of an error's message; the name of its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _check(kind: Any, value: Any, key: str, origin: str) -> None:
    """What OmegaConf lets pass or explains badly: unknown keys, values where a section belongs, numbers as booleans."""
    where = f" (from {origin})"
    optional = type(None) in typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType) and optional:
        if value is None:
            return
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{key}: '{value}' where a section of keys and values is wanted{where}")
        hints = typing.get_type_hints(kind)
        for name, inner in value.items():
            full = f"{key}.{name}" if key else str(name)
            if name not in hints:
                close = difflib.get_close_matches(str(name), hints, n=1)
                hint = f"did you mean {key + '.' if key else ''}{close[0]}?" if close else f"known: {', '.join(hints)}"
                raise UserError(f"{full}: unknown key; {hint}{where}")
            _check(hints[name], inner, full, origin)
    elif typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise UserError(f"{key}: '{value}' where a mapping of names to values is wanted{where}")
        for name, inner in value.items():
            wanted = typing.get_args(kind)[1]
            if inner is None and wanted in (int, float, str, bool):
                raise UserError(
                    f"{key}: '{name}' has no value; wanted 'name: value', with a space after the colon{where}"
                )
            _check(wanted, inner, f"{key}.{name}", origin)
    elif typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise UserError(f"{key}: '{value}' where a list is wanted{where}")
    elif kind is bool and isinstance(value, int | float) and not isinstance(value, bool):
        raise UserError(f"{key}: '{value}' is neither true nor false{where}")
    elif kind in (int, float, str, bool) and isinstance(value, dict | list):
        raise UserError(f"{key}: '{value}' where a single value is wanted{where}")
    elif kind in (int, float) and _is_too_large(kind, value):
        raise UserError(f"{key}: {str(value)[:30]} is too large for 64 bits ({len(str(value))} digits){where}")


def _is_too_large(kind: type, value: Any) -> bool:
    """Whether a whole number, or the text of one, is beyond what torch and the hardware compute with."""
    try:
        number = int(value) if isinstance(value, int | str) else 0
    except ValueError:  # no whole number; what it is is told elsewhere
        return False
    return not -(2**63) <= number < 2**63 if kind is int else abs(number) >= 10**308


def check_path(key: str, path: str | None) -> None:
    """Raises UserError for what cannot be the name of a file or folder, whether there is one or not."""
    try:
        os.lstat(path or ".")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:  # too long, a loop of links; null bytes
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{key}: {path[:100]!r} cannot be a path ({reason})") from None


def write_whole(file: Path, text: str) -> None:
    """Writes a file beside its place and renames it into it: it is whole or it is not there."""
    beside = file.with_name(f"{file.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.rename(file)


def check_writable(key: str, folder: Path, needed: int) -> None:
    """Raises UserError if `folder` cannot be made or written to, or has less than `needed` bytes free."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{key}: '{existing}' is a file, not a folder")
    if os.statvfs(existing).f_flag & os.ST_RDONLY or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{key}: '{existing}' is read-only; name a folder that can be written to")
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{key}: '{existing}' has {free / 2**20:,.1f} MiB free, and {needed / 2**20:,.1f} MiB are needed at once; "
            "make room, or name a folder elsewhere"
        )
