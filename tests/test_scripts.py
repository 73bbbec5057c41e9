"""Shell scripts, batch scripts, the Docker image and the services of docker/compose.yaml."""

import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = sorted(
    path.relative_to(REPOSITORY)
    for folder in ("launch", "slurm", "tests")
    for path in (REPOSITORY / folder).rglob("*.sh")
)
BIN = Path(sys.executable).parent


def lint(*words: str) -> str:
    done = subprocess.run([BIN / words[0], *words[1:]], cwd=REPOSITORY, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_shell_scripts_pass_shellcheck():
    assert lint("shellcheck", "--shell=bash", "--severity=warning", *map(str, SCRIPTS)) == ""


def test_the_image_passes_hadolint():
    assert lint("hadolint", "docker/Dockerfile") == ""


def test_the_docker_context_is_exactly_what_the_dockerfile_copies():
    lines = (REPOSITORY / "docker" / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]}
    allowed = {
        line[1:]
        for line in (REPOSITORY / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert copied == allowed
    assert all((REPOSITORY / path).exists() for path in copied)


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.parts[0] == "slurm"], ids=str)
def test_every_batch_script_trains_an_existing_configuration(script):
    (config,) = [line for line in (REPOSITORY / script).read_text().splitlines() if line.startswith("CONFIG=")]
    value = subprocess.run(
        ["bash", "-c", f'unset CONFIG; {config}; printf %s "$CONFIG"'], capture_output=True, text=True
    )
    assert (REPOSITORY / value.stdout).is_file()
    assert value.stdout


@pytest.mark.parametrize("config", sorted((REPOSITORY / "configs").glob("[!b]*.yaml")), ids=lambda path: path.name)
def test_every_configuration_is_valid(config, monkeypatch, capsys):
    from distrain.__main__ import main

    monkeypatch.setattr("sys.argv", ["distrain", "--config", str(config), "--print-config"])
    assert main() == 0
    assert "name: " in capsys.readouterr().out


@pytest.mark.slow
def test_the_tracking_server_answers_under_the_host_name_that_the_trainer_uses(tmp_path):
    services = yaml.safe_load((REPOSITORY / "docker" / "compose.yaml").read_text())["services"]
    uri = services["trainer"]["environment"]["MLFLOW_TRACKING_URI"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = shlex.join(services["mlflow"]["command"])
    for original, replacement in (
        ("0.0.0.0", "127.0.0.1"),
        ("5000", port),
        ("/database", str(tmp_path)),
        ("/artifacts", f"{tmp_path}/artifacts"),
    ):
        words = words.replace(original, replacement)
    command = shlex.split(words)
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    with subprocess.Popen(
        [BIN / command[0], *command[1:]], cwd=tmp_path, env=environment, start_new_session=True
    ) as server:
        try:
            deadline = time.monotonic() + 400
            while not is_listening(int(port)):
                assert time.monotonic() < deadline
                time.sleep(0.5)
            name = uri.removeprefix("http://").replace("5000", port)
            url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get?experiment_id=0"
            with urllib.request.urlopen(urllib.request.Request(url, headers={"Host": name})) as response:
                assert b"Default" in response.read()
        finally:
            os.killpg(server.pid, 9)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
