"""Power cuts: the run's folder lies on a file system in a file, which is shut down as it is."""

import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
import time
from pathlib import Path

from distrain.errors import UserError

_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN of ext4 and xfs
_WITHOUT_FLUSHING = 2  # neither data nor the journal: what is on the disk stays, all else is lost
_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS of unshare(2)
_CAP_SYS_ADMIN = 21
_BYTES = 8 << 30  # of the sparse image
_UNMOUNT_S = 20.0  # for killed processes to release their files


def why_impossible() -> str:
    """Why power cuts cannot be simulated here; empty if they can."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    if not int(status["CapEff"], 16) >> _CAP_SYS_ADMIN & 1:  # as root in many containers
        return "no right to mount a file system"
    if missing := [name for name in ("mkfs.ext4", "mount", "umount", "losetup") if shutil.which(name) is None]:
        return f"{missing[0]} not found"
    if subprocess.run(["losetup", "--find"], capture_output=True).returncode:
        return "no loop device"
    return ""


def hide_mounts() -> None:
    """Hide what this process mounts from now on from all but the processes that it starts.

    A container that starts beside it copies all mounts that it sees, and keeps a file system as a power cut has left
    it, so that it fails where it is mounted again, too. Raises UserError.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_MOUNTS):
        raise UserError(f"soak: unshare: {os.strerror(ctypes.get_errno())}")
    _run("mount", "--make-rprivate", "/")


class Disk:
    """An ext4 file system in the file `image`, mounted at `folder`."""

    def __init__(self, image: Path, folder: Path) -> None:
        self._image = image
        self.folder = folder

    def mount(self) -> None:
        """Mount it, after making it if it does not exist. Raises UserError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.folder.is_mount():
            return
        if not self._image.exists():
            new = self._image.with_name(f"{self._image.name}.tmp")
            with new.open("wb") as file:
                file.truncate(_BYTES)
            _run("mkfs.ext4", "-q", "-F", "-m", "0", str(new))
            new.rename(self._image)
        _run("mount", "-o", "loop,noatime", str(self._image), str(self.folder))

    def cut_power(self) -> None:
        """Lose everything that is not on the disk. Until it is mounted again, every call fails."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", _WITHOUT_FLUSHING))
        finally:
            os.close(descriptor)

    def unmount(self) -> None:
        """Unmount it. Raises UserError if a process still uses it."""
        until = time.monotonic() + _UNMOUNT_S
        while self.folder.is_mount():
            try:
                _run("umount", str(self.folder))
            except UserError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"soak: {' '.join(command)}: {' '.join(done.stderr.split())}")
