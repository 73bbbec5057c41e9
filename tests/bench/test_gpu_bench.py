"""`bench gpu`, rehearsed on a CPU."""

import json
import math
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from support.processes import README, readme_command

from distrain import config
from distrain.__main__ import main
from distrain.bench.gpu import cli, host, machine, stage, steps
from distrain.bench.gpu.host import decoding
from distrain.bench.gpu.profile import summarize
from distrain.bench.gpu.setup import REHEARSAL, Record, Setup
from distrain.bench.gpu.stage import STAGES
from distrain.processes import process_ticks

KEYS = [
    "stage", "ok", "started", "seconds", "limit_s", "rehearsal", "device", "overrides", "results", "summary",
    "not_measured", "messages", "errors",
]  # fmt: skip
NEEDED = {  # a part of the name of a result of each stage
    "versions": "versions", "resume": "resume", "waits": "ddp", "memory": "needed_bytes", "speed": "regnety_400mf",
    "profile": "torchvision", "recompute": "densenet_bc_22_12, batch 4", "decode": "beside 1 threads",
    "checkpoint": "checkpoint", "digests": "train.deterministic=true", "tests": "tests",
}  # fmt: skip
# Packages that a machine with a GPU may lack; none of them can be imported.
ABSENT = ("deepspeed", "mlflow", "nvidia.dali", "nvidia.nvimgcodec", "s3fs", "aiohttp", "sklearn",
          "pandas", "safetensors", "scipy", "optuna", "onnx", "boto3")  # fmt: skip


def bench(monkeypatch, *words) -> int:
    monkeypatch.setattr("sys.argv", ["distrain", "bench", "gpu", *map(str, words)])
    return main()


def rehearse(monkeypatch, out: Path, stages: str, *words: str) -> tuple[int, list[dict]]:
    """Rehearse some stages in this process. Returns the exit code and the lines of the results."""
    code = bench(monkeypatch, "--rehearse", "--device", "cpu", "--out", out, "--stages", stages, *words)
    return code, [json.loads(line) for line in out.read_text().splitlines()]


def numbers(value) -> list[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, (int, float)) else []


@pytest.fixture(scope="module")
def without_optional_packages(tmp_path_factory) -> Path:
    """A folder for PYTHONPATH in which none of ABSENT can be imported."""
    folder = tmp_path_factory.mktemp("absent")
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Present(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        f"        return None if name in {ABSENT} else super().find_spec(name, path, target)\n"
        "sys.meta_path = [Present if finder is PathFinder else finder for finder in sys.meta_path]\n"
    )
    return folder


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory, without_optional_packages) -> tuple[dict[str, dict], str]:
    """The results of all stages by name, and what was printed, where nothing optional is installed."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.jsonl"
    path = os.pathsep.join([str(without_optional_packages), str(README.parent)])
    _, *words = readme_command("python -m distrain bench gpu")
    done = subprocess.run(
        [sys.executable, *words, "--rehearse", "--device", "cpu"],
        cwd=out.parent, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {line["stage"]: line for line in map(json.loads, out.read_text().splitlines())}, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_rehearsal_runs_every_stage_and_finds_finite_numbers(rehearsed):
    lines, _ = rehearsed
    assert list(lines) == list(STAGES)
    for name, line in lines.items():
        assert list(line) == KEYS
        assert line["ok"], line
        assert line["rehearsal"]
        assert not line["errors"]
        assert any(NEEDED[name] in key for key in line["results"]) or "needs a GPU" in " ".join(line["not_measured"])
        assert all(math.isfinite(number) for number in numbers(line))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_rehearsal_says_what_it_could_not_measure_and_invents_nothing(rehearsed):
    lines, printed = rehearsed
    assert "copies between host and GPU: not measured: needs a GPU" in lines["versions"]["not_measured"]
    assert "recovery from too little memory: not measured: needs a GPU" in lines["memory"]["not_measured"]
    assert "zero3: not measured: DeepSpeed is not installed" in lines["waits"]["not_measured"]
    assert "peak_bytes" not in json.dumps(lines["speed"])
    shown = " ".join(printed.replace("│", " ").split())
    assert "a rehearsal on toy sizes: its numbers mean nothing" in shown
    assert "zero3: not measured: DeepSpeed is not installed" in shown


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_rehearsal_resumes_a_real_training_and_compares_with_other_libraries(rehearsed):
    lines, _ = rehearsed
    resumed = lines["resume"]["results"]["resume"]
    assert resumed["equal"]
    assert resumed["stopped_at"] < resumed["steps"]
    compared = lines["speed"]["results"]["regnety_400mf, batch 2, pass 1"]
    assert list(compared) == ["torchvision", "timm", "distrain train.memory_format=contiguous train.dense_block=fused"]
    assert compared["torchvision"]["vs_torchvision"] == 1
    assert all(len(one["rounds"]) == REHEARSAL.rounds for one in compared.values())


def only(monkeypatch, **limits: float) -> None:
    """Let these be all stages, in this order, with these limits in seconds."""
    monkeypatch.setattr(cli, "STAGES", {name: replace(STAGES[name], limit_s=limit) for name, limit in limits.items()})


def test_a_stage_that_fails_is_reported_and_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    only(monkeypatch, recompute=100, versions=100)
    code, (failed, versions) = rehearse(monkeypatch, tmp_path / "out", "versions,recompute", "model.name=densnet121")
    assert code == 1
    assert (failed["stage"], failed["ok"], versions["stage"], versions["ok"]) == ("recompute", False, "versions", True)
    assert "model 'densnet121' is not known: did you mean densenet121?" in failed["errors"][0]
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "FAILED: none: UserError: model 'densnet121' is not known: did you mean densenet121?" in shown


SLEEPER = """
import subprocess, sys, time
from pathlib import Path
from distrain.bench.gpu.setup import Record
Record(Path(sys.argv[1])).add("found", 7, "found 7 by then")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(sys.argv[2]).write_text(str(child.pid))
print("still waiting", flush=True)
time.sleep(600)
"""


def ends(pid: int) -> bool:
    """Whether a process ends soon."""
    until = time.monotonic() + 100
    while process_ticks(pid) is not None and time.monotonic() < until:
        time.sleep(0.05)
    return process_ticks(pid) is None


def test_a_stage_past_its_limit_is_killed_with_all_it_started_and_keeps_what_it_found(monkeypatch, tmp_path, capsys):
    started = tmp_path / "started"
    programs = {"digests": SLEEPER, "checkpoint": ""}
    only(monkeypatch, digests=1, checkpoint=100)
    monkeypatch.setattr(
        cli, "command_of", lambda name, record, words: [sys.executable, "-c", programs[name], str(record), str(started)]
    )
    code, (killed, after) = rehearse(monkeypatch, tmp_path / "out", "digests,checkpoint")
    assert (code, killed["ok"], after["ok"]) == (1, False, True)
    assert (killed["results"], killed["summary"]) == ({"found": 7}, ["found 7 by then"])
    assert killed["errors"] == ["killed after 20 s; its last output: still waiting"]
    assert ends(int(started.read_text()))
    assert "FAILED: killed after 20 s" in capsys.readouterr().out


def test_a_stage_that_dies_is_reported_with_its_last_lines(monkeypatch, tmp_path):
    only(monkeypatch, digests=100)
    died = [sys.executable, "-c", "import sys; sys.exit('no driver')"]
    monkeypatch.setattr(cli, "command_of", lambda name, record, words: died)
    code, (line,) = rehearse(monkeypatch, tmp_path / "out", "digests")
    assert (code, line["errors"]) == (1, ["exited with code 1: no driver"])


def test_results_are_appended(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "command_of", lambda name, record, words: ["true"])
    for count in (1, 2):
        code, lines = rehearse(monkeypatch, tmp_path / "out", "memory")
        assert (code, len(lines)) == (0, count)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--stages", "versions,profle"), "--stages profle is not known: did you mean profile?"),
        (("--out", "/nowhere/results"), "--out /nowhere/results: cannot be written: No such file or directory"),
        (("train.compil=true",), "unknown key train.compil: did you mean train.compile?"),
        (("--device", "cuda"), "--device cuda: PyTorch finds no GPU on this machine: leave it out, or name cpu"),
    ],
)
def test_invalid_arguments_are_rejected_before_anything_is_measured(monkeypatch, tmp_path, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "run_stage", None)
    assert bench(monkeypatch, *words) == 78
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_stages_run_in_their_own_order_and_are_listed_with_their_limits(monkeypatch, capsys):
    assert cli.select("tests,versions,speed") == ["versions", "speed", "tests"]
    assert cli.select(None) == list(STAGES)
    assert bench(monkeypatch, "--list") == 0
    listed = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert listed == [[name, f"{found.limit_s:g}"] for name, found in STAGES.items()]


def test_all_stages_together_take_less_than_nine_minutes():
    assert sum(found.limit_s for found in STAGES.values()) <= 9 * 60 - 10  # for the start and the end


def test_help_names_every_stage_and_what_must_be_installed(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        bench(monkeypatch, "--help")
    shown = capsys.readouterr().out
    for expected in (*(f"  {name} " for name in STAGES), "omegaconf", "--rehearse", "exit codes"):
        assert expected in shown


def test_waits_are_counted_by_the_innermost_line_of_distrain_or_deepspeed():
    root = Path(steps.__file__).parents[3]

    def call_from(file: str, line: int) -> None:
        text = "called a synchronizing CUDA operation (Triggered internally at ...)"
        exec(compile("\n" * (line - 1) + "warnings.warn(text)", file, "exec"), {"warnings": warnings, "text": text})

    with steps.counted_waits(has_gpu=False) as counts:
        call_from(f"{root}/distrain/learner.py", 7)
        call_from(f"{root}/distrain/learner.py", 7)
        call_from("/site-packages/deepspeed/runtime/engine.py", 9)
        call_from("/site-packages/torch/optim/sgd.py", 3)
        warnings.warn("something else", stacklevel=1)
    assert counts == {"distrain/learner.py:7": 2, "deepspeed/runtime/engine.py:9": 1, "elsewhere": 1}


def test_a_profile_counts_overlapping_kernels_once():
    spans = [("a", 0.0, 4.0), ("b", 2.0, 5.0), ("a", 8.0, 10.0)]
    found = summarize(spans, steps=2)
    assert (found["launches_per_step"], found["step_ms"], found["busy_share"]) == (1.5, 5.0, 0.7)
    assert [(one["name"], one["ms_per_step"], one["per_step"]) for one in found["top"]] == [
        ("a", 3, 1),
        ("b", 1.5, 0.5),
    ]


def test_a_stage_is_not_measured_where_what_it_needs_is_absent(monkeypatch, tmp_path):
    monkeypatch.setattr(stage, "find_spec", lambda name: None if name in ("webdataset", "pytest") else name)
    assert stage.main(["tests", str(tmp_path / "record.json"), "--rehearse"]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["not_measured"] == ["tests: not measured: pytest, webdataset not installed"]


def test_tests_that_need_a_gpu_are_found_and_reported(tmp_path):
    record = Record(tmp_path / "record.json")
    machine.run_tests(Setup(REHEARSAL, [], tmp_path, record))
    assert not record.errors
    assert set(record.results["tests"].values()) == {"SKIPPED"}
    assert any("test_the_memory_format_is_measured_on_a_gpu" in name for name in record.results["tests"])
    assert not any("dali" in name for name in record.results["tests"])
    assert record.not_measured == ["tests: not measured: needs a GPU"]


@pytest.mark.parametrize(
    ("text", "not_measured", "errors"),
    [
        ("import pytest\nimport absent\n", ["test_x.py: not measured: absent is not installed"], []),
        ("import pytest\n1 / 0\n", [], ["test_x.py: pytest exited with code 2"]),
    ],
)
def test_a_file_of_tests_that_cannot_be_imported_is_reported(monkeypatch, tmp_path, text, not_measured, errors):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_x.py").write_text(text + "pytestmark = pytest.mark.gpu\n")
    monkeypatch.setattr(machine, "_TESTS", folder)
    record = Record(tmp_path / "record.json")
    machine.run_tests(Setup(REHEARSAL, [], tmp_path, record))
    assert [line.removeprefix("tests/") for line in record.not_measured[1:]] == not_measured
    assert [line.removeprefix("tests/") for line in record.errors] == errors


BESIDE = ("run.name=run", "model.name=unused", "batch.lanes=1", "batch.per_lane=4", "data.threads=1")


def test_images_are_decoded_until_the_context_ends(on_dataset, tmp_path):
    settings = config.load(None, [*on_dataset, *BESIDE, f"run.dir={tmp_path}"])
    with decoding(settings, 1) as decoded:
        first = decoded[0]
    assert first >= 4
    with decoding(settings, 0) as decoded:
        assert decoded == [0]


def test_a_measurement_is_not_taken_without_the_decoding_beside_it(on_dataset, tmp_path, monkeypatch):
    settings = config.load(None, [*on_dataset, *BESIDE, f"run.dir={tmp_path}"])
    monkeypatch.setattr(host, "make_loader", lambda *args: Path("/nowhere").read_text())
    with pytest.raises(FileNotFoundError), decoding(settings, 1):
        raise AssertionError("the context was entered")


def test_an_attempt_that_fails_is_recorded_and_the_next_one_runs(tmp_path):
    record = Record(tmp_path / "record.json")
    with record.attempt("first"):
        raise RuntimeError("no\nengine")
    with record.attempt("second"):
        record.add("second", 1.0)
    assert (record.errors, record.results) == (["first: RuntimeError: no engine"], {"second": 1.0})
