"""Checkpoints of other formats are refused in one line and left as they are; those of other releases are used."""

import json
import shutil
import zlib
from pathlib import Path

import pytest
from support.processes import train

from distrain.checkpoint import MANIFEST, committed


@pytest.fixture
def run_folder(finished, tmp_path) -> Path:
    return shutil.copytree(finished[1], tmp_path / "run")


def edit_manifests(run_folder: Path, edit) -> None:
    for path in committed(run_folder / "checkpoints"):
        manifest = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(json.dumps(edit(manifest)))


def as_format_1(manifest: dict) -> dict:
    """A manifest as the first release wrote it."""
    identity = {
        key.replace("ema.", "average.").replace("augment.", "data."): value
        for key, value in manifest["identity"].items()
    }
    return {"step": manifest["step"], "files": manifest["files"], "identity": identity}


def as_format_3(manifest: dict) -> dict:
    return with_checksum({**manifest, "format": 3})


def as_another_release(manifest: dict) -> dict:
    """A manifest of this format from a release that had one setting less."""
    identity = {key: value for key, value in manifest["identity"].items() if key != "augment.lighting"}
    return with_checksum({**manifest, "identity": identity, "versions": {"distrain": "99.0", "torch": "1.0"}})


def with_checksum(manifest: dict) -> dict:
    content = {key: value for key, value in manifest.items() if key != "crc32"}
    return {**content, "crc32": zlib.crc32(json.dumps(content, sort_keys=True).encode())}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_older_run_is_refused_with_the_new_names_of_its_settings(finished, run_folder):
    edit_manifests(run_folder, as_format_1)
    before = contents(run_folder)
    refused = train(run_folder, *finished[0])
    assert refused.code == 78
    assert len(refused.output.splitlines()) == 1
    assert refused.output.startswith(
        "distrain: this run was saved in state format 1, and this release reads format 2: continue it with the release "
        "that started it, or start a new run with another run.name (average.decay is now ema.decay, "
        "average.every_steps is now ema.every_steps, data.auto_augment is now augment.auto_augment, "
    )
    assert "data.crop is now augment.crop" in refused.output
    assert contents(run_folder) == before


def test_a_newer_run_is_refused_with_the_advice_to_upgrade(finished, run_folder):
    edit_manifests(run_folder, as_format_3)
    before = contents(run_folder)
    refused = train(run_folder, *finished[0])
    assert refused.code == 78
    assert refused.output == (
        "distrain: this run was saved in state format 3, and this release reads format 2: upgrade distrain, or start a "
        "new run with another run.name\n"
    )
    assert contents(run_folder) == before


def test_a_run_of_another_release_with_the_same_format_resumes_and_says_so(finished, run_folder):
    edit_manifests(run_folder, as_another_release)
    resumed = train(run_folder, *finished[0])
    assert resumed.code == 0, resumed.output
    assert "saved by distrain 99.0, torch 1.0, resumed by distrain " in resumed.output
