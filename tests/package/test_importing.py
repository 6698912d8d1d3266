"""How an import of the package ends: interruptions, and copies of the package that are in each other's way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import hear_interrupts

import recsys_kernels

PACKAGE = Path(recsys_kernels.__file__).parent

# A torch that is interrupted while it is imported, and whose import does with that what a test wants.
INTERRUPTED = """
import os, signal
def press():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(10**7): pass
"""


def run(code: str, *path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=120,
        preexec_fn=hear_interrupts,
    )


@pytest.mark.parametrize(
    "torch_import",
    ["press()", "try: press()\nexcept BaseException: pass", "try: press()\nexcept BaseException: raise ImportError"],
    ids=["raised", "swallowed", "another error"],
)
def test_an_interruption_is_one_line_where_nobody_catches_it(torch_import: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(f"{INTERRUPTED}\n{torch_import}\nfrom types import ModuleType as Tensor\n")
    # The rest of the package would not get on with this torch; this is its first import.
    package = tmp_path / "recsys_kernels"
    package.mkdir()
    shutil.copy2(PACKAGE / "_importing.py", package)
    (package / "__init__.py").write_text("from . import _importing\nwith _importing.explained():\n    import torch\n")
    done = run("import recsys_kernels\nprint('went on')", tmp_path, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "recsys_kernels: interrupted while it was imported; nothing was done\n"
    caught = "import signal\ntry: import recsys_kernels\nexcept KeyboardInterrupt: print('caught')\n"
    done = run(
        f"{caught}print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n1 / 0", tmp_path, cwd=tmp_path
    )
    assert done.stdout.split() == ["caught", "True"]
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr  # other errors look as they always do


def test_a_handler_of_the_program_stays(tmp_path: Path) -> None:
    code = (
        "import signal\nmine = lambda *_: None\nsignal.signal(signal.SIGINT, mine)\n"
        "import recsys_kernels\nprint(signal.getsignal(signal.SIGINT) is mine)"
    )
    done = run(code, PACKAGE.parent, cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


def copied(folder: Path, with_library: bool) -> Path:
    """A copy of the package in a folder, as an installation or a checkout has it."""
    ignored = shutil.ignore_patterns("__pycache__", *(() if with_library else ("_C.*",)))
    shutil.copytree(PACKAGE, folder / "recsys_kernels", ignore=ignored)
    return folder / "recsys_kernels"


def test_two_copies_in_one_process_are_named(tmp_path: Path) -> None:
    second = copied(tmp_path, with_library=True)
    code = (
        "import sys, recsys_kernels\n"
        "for name in list(sys.modules):\n"
        "    if name.startswith('recsys_kernels'): del sys.modules[name]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import recsys_kernels"
    )
    done = run(code, PACKAGE.parent, cwd=Path("/"))
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: this process has loaded another copy of recsys_kernels already, {PACKAGE},")
    assert f"this copy is {second}." in last


def test_a_checkout_without_a_library_names_the_installed_copy(tmp_path: Path) -> None:
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    copied(checkout, with_library=False)
    (checkout / "setup.py").write_text("")
    code = "import recsys_kernels as rk\nprint(rk.doctor()['backends']['cpu'])"
    done = run(code, checkout, cwd=checkout)
    reason = f"this is the source checkout {checkout}, in which no library is built"
    assert done.stdout.splitlines()[-1] == f"{reason}; `pip install -e .` there builds it"
    assert reason in done.stderr  # the warning of the import
    installed = copied(site, with_library=True)
    done = run(code, checkout, site, cwd=checkout)
    advice = f"the installed copy {installed} has one: start Python in another folder to use it"
    assert done.stdout.splitlines()[-1] == f"{reason}; {advice}"
    done = run(code, checkout, site, cwd=tmp_path)
    assert "no C++ compiler" not in done.stdout
