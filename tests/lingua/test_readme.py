"""lingua/README.md shows code that is there, and a command that works."""

import re
import shlex
import textwrap

from tests.helpers.training import REPOSITORY

README = REPOSITORY / "lingua" / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def without_blank_lines(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if line.strip())


def test_the_code_is_that_of_the_files():
    names = ("token_memory.py", "memories.py", "optim.py")
    files = [without_blank_lines((REPOSITORY / "lingua" / name).read_text()) for name in names]
    shown = [without_blank_lines(block) for block in blocks("python")]
    assert len(shown) == 7
    for block in shown:  # methods are shown without their class's indentation
        assert any(text in file for file in files for text in (block, textwrap.indent(block, "    "))), block


def test_files_that_are_named_are_there():
    named = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", README.read_text()))
    assert len(named) > 10
    folders = (REPOSITORY, REPOSITORY / "lingua", REPOSITORY / "lingua" / "product_key")
    assert [name for name in named if not any((folder / name).is_file() for folder in folders)] == []


def test_the_command_is_checked_like_any_other():
    from apps.main.config import TrainArgs
    from lingua.args import parse_args
    from lingua.transformer import validate_transformer_args

    [command] = blocks("bash")
    program, *arguments = shlex.split(command.replace("\\\n", ""))[2:]
    assert program == "apps.main.train"
    args = parse_args(TrainArgs, arguments)
    validate_transformer_args(args.model)
    assert args.model.memories["tokens"]["layers"] == "0,1"
