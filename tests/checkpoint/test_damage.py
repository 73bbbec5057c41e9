"""Whatever is damaged in a run's folder, a start continues with the right weights or says in one line why not."""

import os
import random
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from support.forked_runs import train_forked

from distrain.__main__ import main
from distrain.checkpoint.files import committed
from distrain.errors import UserError
from distrain.identity import require_no_lost_checkpoints
from distrain.resilience.claim import Claim


@pytest.fixture(scope="module")
def unfinished(settings, tmp_path_factory):
    """The settings of a run, its folder when it was stopped after 14 of 17 steps, and the weights it ends with."""
    chosen = (*settings, "train.epochs=1", "checkpoint.keep=5", "evaluate.every_epochs=0.4")
    folder = tmp_path_factory.mktemp("unfinished")
    stopped = train_forked(folder / "run", *chosen, "resilience.faults=[sigkill@train.step:15]")
    assert stopped.code == -9, stopped.output
    assert len(committed(stopped.folder / "checkpoints")) > 1
    stacks = stopped.folder / "stacks"
    stacks.mkdir(exist_ok=True)
    (stacks / "rank0.txt").write_text("stack\n")
    (stopped.folder / "quarantine.jsonl").write_text(
        '{"time": "2026-01-01T00:00:00Z", "split": "train", "sample": 1, "reason": "old"}\n'
    )
    whole = train_forked(shutil.copytree(stopped.folder, folder / "whole"), *chosen)
    assert whole.code == 0, whole.output
    return chosen, stopped.folder, whole.digest


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size + 1))


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def fill_with_zeros(path: Path, rng: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def append(path: Path, rng: random.Random) -> None:
    added = [
        b"[]\n",
        b'{"step": "x"}\n',
        b"null\n",
        bytes(64) + b"\n",
        b"\xff\xfe\n",
        b'{"split": "train", "sample": []}\n',
    ]
    path.write_bytes(path.read_bytes() + rng.choice(added))


def replace_by_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def replace_by_fifo(path: Path, rng: random.Random) -> None:
    remove(path)
    os.mkfifo(path)


def replace_by_link(path: Path, rng: random.Random) -> None:
    moved = path.with_name(f"{path.name}.moved")
    path.rename(moved)
    path.symlink_to(moved)


def lose(path: Path, rng: random.Random) -> None:
    remove(path)


def replace_by_file(path: Path, rng: random.Random) -> None:
    remove(path)
    path.write_bytes(b"x" * rng.randrange(2))


def swap(path: Path, rng: random.Random) -> None:
    others = [other for other in sorted(path.parent.iterdir()) if other.is_file() and other != path]
    if others:
        other = rng.choice(others)
        path.rename(path.with_name("swapped"))
        other.rename(path)
        path.with_name("swapped").rename(other)


def duplicate(path: Path, rng: random.Random) -> None:
    copy = path.with_name(
        rng.choice([f"{path.name}.copy", f"copy of {path.name}", f"{path.name}.tmp", f"{path.name}.bad"])
    )
    if path.is_dir():
        shutil.copytree(path, copy, symlinks=True)
    else:
        shutil.copy(path, copy)


def add_foreign(path: Path, rng: random.Random) -> None:
    folder = path.parent if path.is_file() else path
    names = ["notes.txt", "\udcff\udcfe", "a\nb", "step-00000003.x", "step-00000009", "step-1", ".nfs0001"]
    new = folder / rng.choice(names)
    kind = rng.choice(["folder", "FIFO", "file", "link"])
    if kind == "folder":
        new.mkdir()
    elif kind == "FIFO":
        os.mkfifo(new)
    elif kind == "file":
        new.touch()
    else:
        new.symlink_to("nowhere")


ON_FILES = (
    flip, flip, truncate, empty, fill_with_zeros, append, replace_by_folder, replace_by_fifo, replace_by_link, lose,
    swap, duplicate, add_foreign,
)  # fmt: skip
ON_FOLDERS = lose, replace_by_file, replace_by_fifo, replace_by_link, duplicate, add_foreign


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one thing in a run's folder."""
    path = rng.choice(sorted(folder.rglob("*")))
    if path.is_dir():
        kind = rng.choice(ON_FOLDERS)
    elif path.is_file():
        kind = rng.choice(ON_FILES)
    else:
        kind = lose
    kind(path, rng)
    return f"{kind.__name__} {path.relative_to(folder)!r}"


def require_good_end(unfinished, folder: Path, has_checkpoint: bool, capsys, monkeypatch) -> None:
    """Verify and start a damaged run; it must end as it would have, or say in one line why it cannot."""
    chosen, _, digest = unfinished
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["distrain", "checkpoints", "verify", str(folder)])
    main()
    verified = capsys.readouterr().out.splitlines()
    intact = [line.partition(":")[0] for line in verified if line.endswith(": intact")]
    result = train_forked(folder, *chosen)
    assert "Traceback" not in result.output, result.output
    resumed = [line for line in result.output.splitlines() if line.startswith("resuming at step ")]
    if result.code == 0:
        assert result.digest == digest, result.output
        if intact:
            assert resumed == [f"resuming at step {int(intact[-1][-8:])} of 17"], (verified, result.output)
        else:
            assert not has_checkpoint, (verified, result.output)
    else:
        assert result.code in (1, 78), result.output
        assert result.output.splitlines()[-1].startswith("distrain: "), result.output


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 50))])
def test_a_damaged_run_folder_ends_well(unfinished, tmp_path, seed, capsys, monkeypatch):
    rng = random.Random(seed)
    folder = shutil.copytree(unfinished[1], tmp_path / "run")
    for _ in range(rng.choice([1, 1, 2, 3])):
        print(damage(folder, rng))
    has_checkpoint = any(folder.glob("checkpoints/step-*/"))
    require_good_end(unfinished, folder, has_checkpoint, capsys, monkeypatch)


@pytest.mark.parametrize("pattern", ["manifest.json", ".metadata", "*.distcp"])
def test_a_run_continues_without_the_checkpoint_that_lost_a_file(unfinished, tmp_path, pattern, capsys, monkeypatch):
    folder = shutil.copytree(unfinished[1], tmp_path / "run")
    next(max(folder.glob("checkpoints/step-*")).glob(pattern)).unlink()
    require_good_end(unfinished, folder, True, capsys, monkeypatch)


def test_a_file_in_place_of_the_checkpoints_does_not_start_the_run_over(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(NotADirectoryError):
        committed(tmp_path / "checkpoints")


@pytest.mark.parametrize(("committed_before", "is_refused"), [(0, False), (7, True)])
def test_a_run_whose_checkpoints_are_gone_does_not_start_over(tmp_path, committed_before, is_refused):
    Claim(tmp_path, 1, committed_before, 0).end("killed", True)
    refusal = pytest.raises(UserError, match="began from step 7, and there is no checkpoint now")
    with refusal if is_refused else nullcontext():
        require_no_lost_checkpoints(tmp_path)


def test_a_start_after_the_checkpoints_are_gone_is_refused(unfinished, tmp_path):
    folder = shutil.copytree(unfinished[1], tmp_path / "run")
    for checkpoint in folder.glob("checkpoints/step-*"):
        shutil.rmtree(checkpoint)
    Claim(folder, 2, 8, 0).end("killed", True)
    refused = train_forked(folder, *unfinished[0])
    assert refused.code == 78
    assert "began from step 8, and there is no checkpoint now" in refused.output.splitlines()[-1]


@pytest.mark.parametrize("content", ["{}", '{"format": 2, "versions": {}}', "[]"])
def test_the_identity_of_a_run_without_checkpoints_is_checked(unfinished, tmp_path, content):
    folder = shutil.copytree(unfinished[1], tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    (folder / "identity.json").write_text(content)
    refused = train_forked(folder, *unfinished[0])
    assert refused.code == 78
    (line,) = [line for line in refused.output.splitlines() if line.startswith("distrain: ")]
    assert "identity.json: " in line
