"""The installed package: what pyproject.toml, the pinned versions and the Docker image say of it, and a built wheel."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def normalize(requirement: str) -> str:
    """The name of a distribution in a requirement, as PyPI compares names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]).lower()


def test_every_declared_dependency_has_a_pinned_version():
    project = PYPROJECT["project"]
    declared = [
        *project["dependencies"],
        *(name for names in project["optional-dependencies"].values() for name in names),
    ]
    lines = (ROOT / "docker" / "constraints.txt").read_text().splitlines()
    pinned = {normalize(line) for line in lines if "==" in line and not line.startswith("#")}
    assert {normalize(requirement) for requirement in declared} - pinned == set()


def test_the_image_installs_every_package_in_its_dependency_layer():
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    for pattern in PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]:
        assert f" {pattern.rstrip('*')}/__init__.py" in dockerfile


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The bin folder of a fresh environment with a wheel of this checkout, and the dependencies of the running one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in ("distrain", "launch"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source]
    subprocess.run([*pip, *build], check=True)
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    # A path in a .pth file is not searched for other .pth files: an editable installation stays invisible.
    packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    Path(packages, "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    return environment / "bin"


def run(installed: Path, folder: Path, *words: str) -> str:
    """The output of a command of the fresh environment, run in `folder`."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    variables |= {"OMP_NUM_THREADS": "1", "PATH": f"{installed}:{os.environ['PATH']}"}
    done = subprocess.run(
        [installed / words[0], *words[1:]], cwd=folder, env=variables, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_outside_of_the_checkout_has_all_modules_and_data(installed, tmp_path):
    code = "import distrain, launch; print(distrain.__path__[0], launch.__path__[0], sep='\\n')"
    folders = [Path(line) for line in run(installed, tmp_path, "python", "-c", code).splitlines()]
    for folder in folders:
        assert folder.is_relative_to(installed.parent)
        source = ROOT / folder.name
        expected = {
            path.relative_to(source)
            for path in source.rglob("*")
            if path.is_file() and path.suffix in (".py", ".sh", ".json", ".typed")
        }
        assert {path for path in expected if not (folder / path).is_file()} == set()


@pytest.mark.slow
def test_a_wheel_outside_of_the_checkout_shows_help(installed, tmp_path):
    assert "launch" in run(installed, tmp_path, "distrain", "--help")
    for command in ("local", "ssh", "slurm", "doctor", "node"):
        assert f"usage: distrain launch {command} " in run(installed, tmp_path, "distrain", "launch", command, "--help")
        assert f"usage: python -m launch {command} " in run(
            installed, tmp_path, "python", "-m", "launch", command, "--help"
        )


@pytest.mark.slow
def test_a_wheel_outside_of_the_checkout_trains(installed, tmp_path, settings):
    words = ("distrain", "launch", "local", "--ranks", "2", f"run.dir={tmp_path}", "run.name=run")
    output = run(installed, tmp_path, *words, *settings, "train.epochs=1")
    assert "done: top-1" in output
    assert (tmp_path / "run" / "attempts").is_dir()
