import logging
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.forking import Ranks
from support.processes import SMALL, environment, free_port, read_metrics

from distrain.errors import TemporaryError, UserError
from distrain.masking import MaskingFormatter, mask_secrets, print_masked_traceback, remember_secrets
from distrain.parallel.environment import Environment, read_environment


def distrain(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", "distrain", *arguments], capture_output=True, text=True, env=environment
    )


def test_help_shows_the_first_run_the_tools_and_the_exit_codes():
    shown = distrain("--help").stdout
    for expected in (
        "python -m distrain shards fetch cifar10 --out data/cifar10",
        "torchrun --nproc-per-node 2 -m distrain --config configs/quickstart.yaml",
        "models",
        "shards",
        "78  a mistake in the configuration",
    ):
        assert expected in shown


@pytest.mark.parametrize("tool", ["models", "shards", "bench"])
def test_every_tool_explains_itself(tool):
    shown = distrain(tool, "--help")
    assert shown.returncode == 0
    assert "COMMAND" in shown.stdout


def test_a_mistake_is_one_line_and_exit_78():
    refused = distrain("--config", "configs/quickstart.yaml", "batch.lane=3")
    assert refused.returncode == 78
    assert refused.stderr == "distrain: batch.lane=3: unknown key batch.lane: did you mean batch.lanes?\n"
    assert refused.stdout == ""


def test_an_unknown_model_is_refused_before_any_work_with_the_nearest_name():
    refused = distrain("--config", "configs/quickstart.yaml", "model.name=regnety_16g")
    assert refused.returncode == 78
    assert refused.stderr == "distrain: model 'regnety_16g' is not known: did you mean regnety_16gf?\n"


def test_settings_may_come_before_between_and_after_options():
    shown = distrain(
        "train.epochs=7", "--config", "configs/quickstart.yaml", "run.seed=3", "--print-config", "augment.flip=0"
    )
    assert shown.returncode == 0
    assert all(line in shown.stdout for line in ("  epochs: 7.0 ", "  seed: 3 ", "  flip: 0.0 "))


def test_print_config_shows_the_whole_configuration_and_does_nothing_else():
    shown = distrain("--config", "configs/quickstart.yaml", "--print-config")
    assert shown.returncode == 0
    assert "  name: densenet " in shown.stdout
    assert "  lanes: 2 " in shown.stdout
    assert shown.stderr == ""


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "RANK=0 is set in the environment and WORLD_SIZE is not: unset it"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set in the environment and RANK is not: unset it"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x in the environment is not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2 in the environment: ranks count from 0"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set in the environment and MASTER_ADDR is not"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 in the environment is not a number"),
    ],
)
def test_variables_left_over_from_another_launcher_are_refused(variables, message):
    with pytest.raises(UserError) as caught:
        read_environment(variables)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_variables_left_over_that_make_a_start_wait_are_named_at_once(on_dataset, tmp_path, rank):
    left = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "distrain", *SMALL, *on_dataset, "batch.lanes=2", f"run.dir={tmp_path}"]
    started = subprocess.Popen(
        [*command, "run.name=run"], env={**environment(), **left}, stderr=subprocess.PIPE, text=True
    )
    try:
        expected = (
            f"distrain: rank {rank} waits for all 2 ranks to connect to 127.0.0.1:{left['MASTER_PORT']}, as RANK,"
        )
        assert any(line.startswith(expected) for line in started.stderr)
    finally:
        started.kill()
        started.communicate()


def test_the_environment_says_which_rank_this_is_and_whether_a_launcher_says_so():
    variables = {
        "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h",
        "MASTER_PORT": "4711",
    }  # fmt: skip
    found = read_environment(variables)
    assert (found.rank, found.world, found.local_rank, found.local_world, found.launched) == (3, 8, 1, 2, True)
    alone = {name: value for name, value in variables.items() if name.startswith("MASTER")}
    assert read_environment(alone) == Environment(0, 1, local_rank=0, local_world=1, launched=False)
    assert read_environment({}) == read_environment(alone)
    one = {"RANK": "0", "WORLD_SIZE": "1"}
    assert read_environment({**one, **alone}).launched
    assert not read_environment({**one, "MASTER_PORT": "4711"}).launched
    assert not read_environment({**one, "MASTER_ADDR": "h"}).launched


def test_empty_variables_and_those_of_slurm_and_mpi_are_ignored():
    found = read_environment({"RANK": "", "WORLD_SIZE": " ", "SLURM_PROCID": "3", "OMPI_COMM_WORLD_RANK": "1"})
    assert (found.rank, found.world, found.ignored) == (0, 1, ("RANK", "WORLD_SIZE"))


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("at http://me:s3cret@h:5000/x: refused", "at http://***@h:5000/x: refused"),
        ("https://t0kens3cret@github.com", "https://***@github.com"),
        ("postgresql://u:s3/c#r?e@h/db", "postgresql://***@h/db"),
        (
            "url='https://h/k?X-Amz-Signature=s3cret&X-Amz-Expires=9'",
            "url='https://h/k?X-Amz-Signature=***&X-Amz-Expires=9'",
        ),
        ("https://h/k?token=s3cret: index not found", "https://h/k?token=***: index not found"),
        ("Authorization: Bearer s3cret.x", "Authorization: Bearer ***"),
        ("key wJalrXUtnFEMI refused", "key *** refused"),
        ("http://h:8080/a@b/x and s3://bucket/a@b?c=1", "http://h:8080/a@b/x and s3://bucket/a@b?c=1"),
        ("no bucket KEY:p/w0rd-1@bucket, no port p%2Fw0rd-1@h", "no bucket KEY:***@bucket, no port ***@h"),
        ("signed by s1gnature", "signed by ***"),
    ],
)
def test_secrets_are_masked_and_other_text_is_not(monkeypatch, text, masked):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setattr("sys.argv", ["distrain", "data.val=s3://KEY:p%2Fw0rd-1@bucket/x"])
    monkeypatch.setattr("distrain.masking._remembered", set())
    remember_secrets("https://h/x?sig=s1gnature&a=1")
    assert mask_secrets(text) == masked
    assert mask_secrets(masked) == masked
    assert str(UserError(text)) == str(TemporaryError(text)) == masked


def test_short_values_and_those_of_other_variables_are_no_secrets(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "short")
    monkeypatch.setenv("MY_PASSWORD", "6chars")
    monkeypatch.setenv("ORDINARY", "visible-value")
    assert mask_secrets("short 6chars visible-value") == "short *** visible-value"


def test_tracebacks_and_log_lines_have_no_secrets(capsys):
    try:
        raise ConnectionError("http://me:s3cret@host refused")
    except ConnectionError as error:
        print_masked_traceback(type(error), error, error.__traceback__)
        record = logging.LogRecord("x", 30, "x", 1, "at %s", ("http://h/x?token=s3cret",), sys.exc_info())
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last):\n")
    assert printed.endswith("ConnectionError: http://***@host refused\n")
    logged = MaskingFormatter("distrain: %(message)s").format(record)
    assert logged.startswith("distrain: at http://h/x?token=***\nTraceback")
    assert "s3cret" not in logged


def test_what_python_prints_by_itself_is_masked():
    program = (
        "import logging, sys, threading, warnings\n"
        "from distrain.masking import mask_reports\n"
        "mask_reports()\n"
        "url = sys.argv.pop()\n"
        "class Final:\n"
        "    def __del__(self): raise OSError(url)\n"
        "def crash(): raise OSError(url)\n"
        "warnings.warn('one: ' + url)\n"
        "logging.getLogger('library').warning('two: %s', url)\n"
        "thread = threading.Thread(target=crash)\n"
        "thread.start()\n"
        "thread.join()\n"
        "Final()\n"
        "crash()\n"
    )
    command = [sys.executable, "-c", program, "http://me:s3cret@host"]
    errors = subprocess.run(command, capture_output=True, text=True, env=environment()).stderr
    assert errors.count("http://***@host") == 5, errors
    assert "s3cret" not in errors


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_tool_ends_at_a_signal_in_one_line_even_inside_a_library(number, code):
    program = (
        "import sys, time\n"
        "from distrain.__main__ import entry\n"
        "from distrain.checkpoint import cli\n"
        "def wait(args):\n"
        "    print('begun', flush=True)\n"
        "    try: time.sleep(60)\n"
        "    except KeyboardInterrupt: time.sleep(60)\n"
        "cli.add_arguments = lambda parser: parser.set_defaults(run=wait)\n"
        "sys.argv = ['distrain', 'checkpoints']\n"
        "entry()\n"
    )
    tool = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert tool.stdout.readline() == "begun\n"
    tool.send_signal(number)
    errors = tool.communicate(timeout=30)[1]
    assert errors == "distrain: interrupted; what it has written is kept, run the same command again\n"
    assert tool.returncode == code


def test_a_run_whose_output_cannot_be_written_trains_to_its_end(on_dataset, tmp_path):
    short = ("batch.lanes=2", "batch.per_lane=4", "train.epochs=0.2", "evaluate.batch=64")
    arguments = [*SMALL, *on_dataset, *short, f"run.dir={tmp_path}", "run.name=run"]
    assert Ranks(arguments, environment(), 1, free_port(), Path("/dev/full")).wait(120) == 0
    assert read_metrics(tmp_path / "run")[-1]["step"] == 5


def test_a_terminal_that_cannot_show_a_name_gets_it_escaped():
    command = [
        sys.executable,
        "-m",
        "distrain",
        "--print-config",
        "data.train=a",
        "data.val=b",
        *SMALL,
        "run.name=Größe",
    ]
    env = {**environment(), "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(command, capture_output=True, text=True, env=env)
    assert shown.returncode == 0, shown.stderr
    assert r"Gr\xf6\xdfe" in shown.stdout


def test_closed_standard_streams_are_no_crash():
    command = f"exec {shlex.quote(sys.executable)} -m distrain --version >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], env=environment()).returncode == 0
