"""The README and the guides: their Python runs, their commands exist, their links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import load_file
from small_data import World

from recsys_kernels import cli

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PROJECT = load_file(ROOT / "pyproject.toml")["project"]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def named(pages: list[Path]) -> list[object]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


@pytest.mark.parametrize("page", named([page for page in PAGES if blocks(page, "python")]))
def test_python_blocks_run_in_order(page: Path, tmp_path: Path) -> None:
    """All blocks of a page are one program, in a process of its own."""
    (tmp_path / "ml-small").mkdir()
    # What the pages call ml-small.
    World().write_20m(tmp_path / "ml-small")
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(page, "python")))
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in the shell blocks, without variables and the virtual environment's folder."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for command in shlex.join(shlex.split(line, comments=True)).split(" '&&' "):
                words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
                if words:
                    yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def check_pip(arguments: list[str]) -> None:
    assert arguments.pop(0) == "install"
    extras = PROJECT["optional-dependencies"]
    pinned = {requirement.split(";")[0].strip() for requirement in extras["cuda-build"]}
    for argument in arguments:
        if extra := re.fullmatch(r"\.\[(\w+)\]", argument):
            assert extra[1] in extras
        else:
            known = {"-e", ".", "torch==2.13.0", "torch==2.13.0+cpu", "ninja", *pinned}
            assert argument in known, f"pip install {argument}: pyproject.toml does not know it"


def check_python(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        assert arguments[:2] == ["-m", "venv"]
        return
    assert (ROOT / arguments[0]).is_file(), arguments
    if arguments[0] == "bench/report.py":
        source = (ROOT / arguments[0]).read_text()
        assert all(f'"{word}"' in source for word in arguments if word.startswith("--"))


def check_pytest(arguments: list[str]) -> None:
    for argument in arguments:
        if "/" in argument or argument in ("bench", "tests"):
            assert (ROOT / argument).exists(), argument


def check_command(words: list[str]) -> None:
    """Raises where a command of the pages cannot be what the repository has."""
    program, arguments = words[0], words[1:]
    if program == "recsys-kernels":
        cli.parser().parse_args(arguments)
    elif program == "pip":
        check_pip(arguments)
    elif program in ("python", "python3"):
        check_python(arguments)
    elif program == "pytest":
        check_pytest(arguments)
    elif program == "bash":
        assert (ROOT / arguments[0]).is_file(), arguments
    else:
        raise AssertionError(f"a command that this test does not know: {shlex.join(words)}")


@pytest.mark.parametrize("page", named([page for page in PAGES if blocks(page, "bash")]))
def test_commands_exist(page: Path) -> None:
    found = list(commands(page))
    assert found
    for words in found:
        check_command(words)


def test_wrong_commands_are_found() -> None:
    wrong = [
        ["recsys-kernels", "compress", "--tiny"],
        ["pip", "install", ".[dmeo]"],
        ["pip", "install", "torch==1.0"],
        ["python", "bench/nothing.py"],
        ["python", "bench/report.py", "--fast"],
        ["pytest", "tests/nothing"],
        ["bash", "run.sh"],
        ["make"],
    ]
    for words in wrong:
        with pytest.raises((AssertionError, SystemExit)):
            check_command(words)


def test_both_commands_of_the_readme_set_up_from_nothing() -> None:
    """Each is one line that starts with an environment of its own, and torch is there before the build asks for it."""
    lines = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    assert len(lines) == 2
    for line, last in zip(lines, ("recsys-kernels compress --out report", "pytest"), strict=True):
        steps = line.split(" && ")
        assert steps[0] == "python3 -m venv .venv"
        assert steps[1] == ".venv/bin/pip install torch==2.13.0+cpu"
        assert steps[2].startswith(".venv/bin/pip install ")
        assert steps[3:] == [f".venv/bin/{last}"]


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https:)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_public_name_is_in_the_reference() -> None:
    import recsys_kernels as rk

    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"^::: recsys_kernels\.([\w.]+)$", pages, re.MULTILINE))
    public = {name for name in rk.__all__ if name != "functional"}
    assert documented == public | {f"functional.{name}" for name in rk.functional.__all__}
