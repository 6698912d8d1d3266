"""The command line: the main job, its output, and what it does with bad input and interruptions."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_data import World, criteo_lines, write_criteo
from support import hear_interrupts

import recsys_kernels as rk
from recsys_kernels import cli
from recsys_kernels.jobs.compress import cost, plots, report
from recsys_kernels.jobs.compress import run as job
from recsys_kernels.jobs.compress.variants import BASELINE, VARIANTS
from recsys_kernels.models import files
from recsys_kernels.models.files import WEIGHTS
from recsys_kernels.models.train import TrainSettings

NAMES = [BASELINE, *(variant.name for variant in VARIANTS)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "ROUNDS", 8)
    monkeypatch.setattr(cost, "WARM_UP", 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ml").mkdir()
    return World().write_100k(tmp_path / "ml")


def compress(*arguments: object) -> int:
    return cli.main(["compress", "--epochs", "1", "--dim", "8", *map(str, arguments)])


def python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, **options)


def one_line(text: str) -> str:
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("recsys-kernels: ")
    return lines[0]


def test_job_prints_and_writes_everything(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert compress("--data", folder, "--rows", 500, "--out", out, "--save", "int8") == 0
    printed = capsys.readouterr()
    assert printed.err == ""  # no progress bar where there is no terminal
    for text in (
        "AUC",
        "log loss",
        "8-bit tables",
        "4-bit tables",
        "MLP QAT",
        "MLP pruned",
        "plain torch",
        "cost only",
    ):
        assert text in printed.out
    assert {path.name for path in out.iterdir()} == report.FILES
    numbers = json.loads((out / report.NUMBERS).read_text())
    assert [variant["name"] for variant in numbers["variants"]] == NAMES
    assert numbers["saved"] == "int8"
    for variant in numbers["variants"]:
        for costs in (variant, variant["grown"]):
            assert list(costs["latency"]) == ["1", "64", "512"]
            for latency in costs["latency"].values():
                assert 0 < latency["p50_us"] <= latency["p99_us"]
            assert 0 < costs["table_bytes"] < costs["total_bytes"]
    sizes = {variant["name"]: variant["table_bytes"] for variant in numbers["variants"]}
    assert sizes[BASELINE] == sizes["fp32"] > sizes["int8"] > sizes["int4"] == sizes["int4-mlp"]
    assert sizes["int8"] == sizes["int8-mlp"] == sizes["int8-mlp-static"] == sizes["int8-mlp-qat"]
    mlps = {variant["name"]: variant["total_bytes"] - variant["table_bytes"] for variant in numbers["variants"]}
    assert mlps[BASELINE] == mlps["int8"] == mlps["int4"] > 2 * mlps["int8-mlp"] == 2 * mlps["int4-mlp"]
    # A scale and a zero point for each of 2 + 3 layers.
    assert mlps["int8-mlp-static"] == mlps["int8-mlp-qat"] == mlps["int8-mlp"] + 5 * 8
    assert sizes["int8"] == sizes["pruned"] == sizes["int8-pruned"]
    assert mlps["int8"] > 2 * mlps["pruned"] > 3 * mlps["int8-pruned"]
    grown = numbers["variants"][0]["grown"]["table_bytes"]
    assert grown == 500 * 8 * 4 * len(numbers["model"]["tables"])
    assert numbers["variants"][0]["auc"] == pytest.approx(numbers["variants"][1]["auc"], abs=1e-6)


def test_page_is_self_contained_and_the_model_serves(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert compress("--data", folder, "--out", out) == 0
    page = (out / report.PAGE).read_text()
    assert not re.search(r"<(script|link|img|iframe)\b|@import|\bsrc=|url\((?!#)", page)
    assert page.count("<svg") == 4
    assert 'name="viewport"' in page
    assert (out / report.PICTURE).read_bytes().startswith(b"\x89PNG")
    # The example on the page is real: it runs as it stands.
    code = re.search(r"<pre>(.*?)</pre>", page, re.DOTALL)
    assert code is not None
    text = code[1].replace("&#39;", "'").replace("&quot;", '"').replace("model.predict", "answer = model.predict")
    names: dict[str, Any] = {}
    exec(text, names)
    assert names["answer"].shape == (1,)
    assert 0 < float(names["answer"]) < 1
    # A second run replaces its own report and nothing else.
    assert compress("--data", folder, "--out", out, "--save", "fp32") == 0
    assert rk.load_model(out).model.config.embedding == "float32"
    (out / "notes.txt").write_text("mine")
    assert compress("--data", folder, "--out", out) == 2
    assert (out / "notes.txt").read_text() == "mine"


def test_criteo_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = write_criteo(tmp_path / "day.tsv", criteo_lines())
    assert compress("--data", path, "--out", out, "--limit", 200) == 0
    model = rk.load_model(out)
    assert model.predict([{"C1": "00000003", "I1": 4}]).shape == (1,)
    assert json.loads((out / report.NUMBERS).read_text())["data"]["parts"]["test"]["rows"] == 20


@pytest.mark.parametrize(
    ("arguments", "form", "pattern", "sparsity"),
    [
        ([], "pruned", "block4x1", 0.8),
        (["--sparsity", 0.5, "--pattern", "unstructured"], "int8-pruned", "unstructured", 0.5),
        (["--pattern", "2:4"], "int8-pruned", "2:4", 0.5),
        (["--pattern", "1:4"], "pruned", "1:4", 0.75),
    ],
)
def test_pruned_mlps(
    arguments: list[object],
    form: str,
    pattern: str,
    sparsity: float,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert compress("--data", folder, "--out", out, "--save", form, *arguments) == 0
    numbers = json.loads((out / report.NUMBERS).read_text())
    assert (numbers["pruning"]["pattern"], numbers["pruning"]["sparsity"]) == (pattern, sparsity)
    head = rk.load_model(out).model.head
    layers = [*head.bottom, *head.top]
    assert {type(layer) for layer in layers} == {rk.SparseLinear}
    assert {layer.activation for layer in layers} == {"dynamic" if form == "int8-pruned" else None}
    assert [layer.epilogue for layer in layers] == ["relu"] * 4 + [None]
    stored = "unstructured" if pattern == "1:4" else pattern
    assert [layer.pattern for layer in layers] == [stored] * 4 + ["unstructured"]
    pruned = layers[:-1]
    kept = sum(int(layer.dequantize().count_nonzero()) for layer in pruned)
    share = 1 - kept / sum(layer.in_features * layer.out_features for layer in pruned)
    assert share == pytest.approx(sparsity, abs=0.02)  # of some blocks or fours there is not all
    assert layers[-1].nnz == layers[-1].in_features
    text = " ".join(capsys.readouterr().out.split())
    best = numbers["chosen_pruned"]
    if best is None:
        assert f"no form pruned by {sparsity:.0%} ({pattern}) keeps the validation AUC within 0.002" in text
    else:
        assert f"of those pruned by {sparsity:.0%} ({pattern}) take {best}: the smallest" in text
    page = " ".join((out / report.PAGE).read_text().split())
    assert ("No pruned form is recommended" in page) == (best is None)


def _holding(folder: Path) -> list[object]:
    (folder / "out").mkdir()
    (folder / "out" / "thesis").write_text("")
    return ["--out", folder / "out"]


BAD: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "no data": (lambda folder: ["--data", folder / "x"], "x: no such file or folder"),
    "no layout": (lambda folder: ["--data", folder.parent], r"looked for u\.data"),
    "no such form": (lambda folder: ["--save", "int2", "--out", folder / "o"], "there are fp32, int8, int4"),
    "save nowhere": (lambda folder: ["--save", "int8"], "--save: needs --out DIR"),
    "foreign files": (_holding, "holds other files"),
    "too many rows": (lambda folder: ["--data", folder, "--rows", 10**12], r"GiB are free; about \d+ rows would fit"),
    "too many threads": (lambda folder: ["--threads", 10**6], r"this machine has \d+ cores"),
    "seed too large": (lambda folder: ["--seed", 2**64], "--seed 18446744073709551616: is above"),
    "too wide": (lambda folder: ["--data", folder, "--dim", 10**13], "not enough memory"),
    "too few left": (lambda folder: ["--data", folder, "--limit", 2], "cannot be split by time"),
    "no such pattern": (lambda folder: ["--pattern", "dots"], "--pattern: pattern must be 'unstructured'"),
    "all pruned": (lambda folder: ["--sparsity", 1], "--sparsity: sparsity must be at least 0 and below 1, but is 1"),
    "not 2:4": (lambda folder: ["--sparsity", 0.9, "--pattern", "2:4"], "--sparsity: .*None or 0.5 with the pattern"),
    "out is empty": (lambda folder: ["--out", ""], "--out: is empty; name a folder"),
    "out is the current folder": (lambda folder: ["--out", "."], r"\.: is the current folder"),
    "out is the current folder's name": (lambda folder: ["--out", Path.cwd()], "is the current folder"),
    "out is a mount point": (lambda folder: ["--out", "/"], "/: is a mount point.*name a folder inside it"),
    "no folders there": (lambda folder: ["--out", "/proc/x"], r"/proc: no folder can be made there"),
    "out under a file": (lambda folder: ["--out", folder / "u.data" / "out"], "u.data"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = BAD[case]
    assert compress(*make(folder)) == 2
    printed = capsys.readouterr()
    assert re.search(message, one_line(printed.err))
    assert printed.out == ""


@pytest.mark.parametrize("arguments", [["shrink"], ["compress", "--rows", "-1"], ["compress", "--epochs", "many"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: recsys-kernels" in capsys.readouterr().err


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(text in printed.err for text in ("usage: recsys-kernels", "compress", "doctor", "--version"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"recsys-kernels {rk.__version__}\n"


@pytest.mark.parametrize("command", ["doctor", "--help", "compress"])
def test_a_reader_who_has_gone_is_no_error(command: str, folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from recsys_kernels.cli import main; from recsys_kernels.jobs.compress import cost\n"
        "cost.ROUNDS = 4; sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out"
    arguments = ["--data", str(folder), "--epochs", "1", "--out", str(out)] if command == "compress" else []
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, command, *arguments],
            stdout=write,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            timeout=60,
        )
    finally:
        os.close(write)
    assert done.stderr == b""
    assert done.returncode == 0
    assert command != "compress" or {path.name for path in out.iterdir()} == report.FILES


@pytest.mark.parametrize("text", ["DefaultCPUAllocator: can't allocate memory: tried 8", "could not be allocated"])
def test_out_of_memory_is_one_line(
    text: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(job, "run", fail)
    assert compress("--data", folder) == 2
    assert "not enough memory" in one_line(capsys.readouterr().err)
    text = "shapes differ"
    with pytest.raises(RuntimeError, match="shapes differ"):
        compress("--data", folder)


def test_disk_full_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "overview.png")

    monkeypatch.setattr(plots, "overview", full)  # the last file: all others are written by then
    assert compress("--data", folder, "--out", tmp_path / "out") == 2
    assert "No space left on device" in one_line(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["ml"]


def test_a_failed_run_leaves_no_folders(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "p" / "q" / "r"
    assert compress("--data", folder / "nowhere", "--out", out) == 2
    assert "no such file" in one_line(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["ml"]

    def full(*args: object, **options: object) -> None:
        assert out.parent.exists()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write says it, without a name

    monkeypatch.setattr(plots, "overview", full)
    assert compress("--data", folder, "--out", out) == 2
    assert one_line(capsys.readouterr().err) == f"recsys-kernels: {out}: No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["ml"]


def test_an_interrupt_while_torch_is_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "recsys_kernels", "compress"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        preexec_fn=hear_interrupts,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == "importing\n"
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130
        assert child.stderr.read() == "recsys_kernels: interrupted while it was imported; nothing was done\n"


def test_interrupt_while_writing_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plots, "overview", interrupt)
    assert compress("--data", folder, "--out", tmp_path / "out") == 130
    assert "nothing was written" in one_line(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["ml"]


@pytest.mark.parametrize("existed", [False, True])
def test_interrupt_after_writing_says_that_the_report_is_there(
    existed: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert not existed or compress("--data", folder, "--out", out) == 0

    rename = os.rename

    def interrupt(source: Path, place: Path) -> None:
        rename(source, place)
        if place == out:
            raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "rename", interrupt)
    assert compress("--data", folder, "--out", out) == 130
    assert one_line(capsys.readouterr().err) == f"recsys-kernels: interrupted; the report in {out} is complete"
    assert {path.name for path in out.iterdir()} == report.FILES


def test_write_beyond_the_file_size_limit(folder: Path, tmp_path: Path) -> None:
    """The real thing: the operating system refuses the write in the middle of the weights."""
    code = (
        "import sys; from recsys_kernels.cli import main; from recsys_kernels.jobs.compress import cost\n"
        "cost.ROUNDS = 4; sys.exit(main(sys.argv[1:]))"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    arguments = ["compress", "--data", folder, "--epochs", 1, "--out", tmp_path / "out"]
    done = python(code, *arguments, preexec_fn=limit)
    assert done.returncode == 2, done.stderr
    assert one_line(done.stderr) == f"recsys-kernels: {tmp_path / 'out' / WEIGHTS}: File too large"
    assert [path.name for path in tmp_path.iterdir()] == ["ml"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_stop_cleanly(number: signal.Signals, code: int, folder: Path, tmp_path: Path) -> None:
    # Stops in the middle of the report, with the model already in the scratch folder.
    program = (
        "import sys, time\n"
        "from recsys_kernels.cli import main\n"
        "from recsys_kernels.jobs.compress import cost, plots\n"
        "cost.ROUNDS = 4\n"
        "plots.overview = lambda report: (print('writing', flush=True), time.sleep(60))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["compress", "--data", str(folder), "--epochs", "1", "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=hear_interrupts,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert any("writing" in line for line in child.stdout)
        child.send_signal(number)
        assert child.wait(30) == code
        assert "nothing was written" in one_line(child.stderr.read())
    assert [path.name for path in tmp_path.iterdir()] == ["ml"]


@pytest.mark.parametrize("module", ["pandas", "matplotlib", "safetensors"])
def test_missing_extra_is_named(module: str) -> None:
    code = (
        f"import sys; sys.modules['{module}'] = None; from recsys_kernels.cli import main; sys.exit(main(['compress']))"
    )
    done = python(code)
    assert done.returncode == 2
    assert f'needs {module}: pip install "recsys_kernels[demo]"' in one_line(done.stderr)


def test_import_does_not_touch_the_extra() -> None:
    code = (
        "import sys, recsys_kernels, recsys_kernels.cli\n"
        "loaded = lambda: print(*sorted({n.split('.')[0] for n in sys.modules}))\n"
        "loaded(); recsys_kernels.load_model; loaded()"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    package, serving = (set(line.split()) & set(cli.DEMO_MODULES) - {"jinja2"} for line in done.stdout.splitlines())
    assert not package  # torch brings jinja2 itself
    assert not serving


def test_serving_needs_only_safetensors(folder: Path, tmp_path: Path) -> None:
    assert compress("--data", folder, "--out", tmp_path / "out") == 0
    code = (
        "import sys\n"
        "for name in sys.argv[2].split(): sys.modules[name] = None\n"
        "from recsys_kernels import *\n"
        "print(float(load_model(sys.argv[1]).predict([{'user': '3', 'item': 5.0}])))"
    )
    others = set(cli.DEMO_MODULES) - {"jinja2", "safetensors"}
    done = python(code, tmp_path / "out", " ".join(others))
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 1
    done = python(code, tmp_path / "out", "safetensors")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == 'ModuleNotFoundError: model files need safetensors: pip install "recsys_kernels[demo]"'


def test_module_is_the_same_command() -> None:
    command = [sys.executable, "-m", "recsys_kernels", "compress", "--data", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2
    assert "nowhere: no such file or folder" in one_line(done.stderr)


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["compress", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    options = "data limit cache epochs batch-size dim seed sparsity pattern rows threads out save"
    assert all(f"--{option} " in text for option in options.split())
    assert "rk.load_model" in text


def test_doctor_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    assert torch.__version__ in capsys.readouterr().out


def test_every_side_follows_every_other_one() -> None:
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in "abcd"}
    times = cost._alternate(sides, dict.fromkeys(sides, [()] * cost.POOL), 600)
    assert {name: len(taken) for name, taken in times.items()} == dict.fromkeys("abcd", 600)
    rounds = [calls[start : start + 4] for start in range(0, len(calls), 4)]
    assert all(sorted(turn) == list("abcd") for turn in rounds)
    pairs = Counter(pair for turn in rounds for pair in itertools.pairwise(turn))
    # Each of the 12 ordered pairs is next to each other in a quarter of the 601 rounds.
    assert len(pairs) == 12
    assert all(100 < count < 200 for count in pairs.values())
    first = calls.copy()
    calls.clear()
    cost._alternate(sides, dict.fromkeys(sides, [()] * cost.POOL), 600)
    assert calls == first


def test_grown_ids_are_skewed_and_in_range() -> None:
    batch = cost.Batch(
        torch.zeros(4, 1), torch.zeros(4000, dtype=torch.int64), torch.arange(0, 4001, 1000), torch.zeros(4)
    )
    for rows in (1, 2, 1000, 99_991):
        ids = cost.grown_batches({4: [batch]}, rows, seed=0)[4][0].indices
        assert 0 <= int(ids.min()) <= int(ids.max()) < rows
    counts = ids.bincount().sort(descending=True).values
    # Zipf with exponent 1: the first of 99,991 ids has about 1 / ln(99,991) x ln 2 = 6 % of the draws.
    assert 0.04 < counts[0] / 4000 < 0.08
    assert (counts > 0).sum() > 1000


def test_movielens_keeps_its_auc() -> None:
    result = job.run(job.JobSettings(training=TrainSettings(epochs=2)))
    assert len(result.data) == 100_000
    assert result.quality[BASELINE].auc > 0.765
    assert result.boosted_quality.auc > 0.765
    assert not (-result.lead).surely_above(0.0)  # a model worth compressing at least matches the trees
    assert not result.test_is_small
    # The tables matter, or keeping the AUC would say nothing about them.
    assert result.quality[BASELINE].auc - result.without_tables.auc > 0.02
    assert abs(result.change["fp32"].value) < 1e-5
    for name in ("int8", "int8-mlp", "int8-mlp-static", "int8-mlp-qat", result.chosen):
        assert abs(result.change[name].value) < 0.001, name
    assert result.chosen in ("int8-mlp", "int4-mlp")
    assert result.chosen_pruned in ("pruned", "int8-pruned")
    for name in ("pruned", "int8-pruned"):
        assert abs(result.change[name].value) < 0.002, name
    heads = {name: side.total_bytes - side.table_bytes for name, side in result.cost.items()}
    assert heads["pruned"] < heads["fp32"] / 3
    assert heads["int8-pruned"] < heads["int8-mlp"] / 2
    # Training the static form brings it closer to the model that it imitates.
    batches = [result.data.batch(result.data.rows("test"))[:3]]
    outputs = {
        name: _probabilities(result.models[name], batches) for name in ("fp32", "int8-mlp-static", "int8-mlp-qat")
    }
    errors = {name: (out - outputs["fp32"]).square().mean() for name, out in outputs.items()}
    assert 0 < errors["int8-mlp-qat"] < errors["int8-mlp-static"]


def _probabilities(model: Any, batches: list[Any]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([model(*batch) for batch in batches]).sigmoid()
