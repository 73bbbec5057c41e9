"""Log files for the output of every rank."""

from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, LogsDest, Std


class RankLogs(DefaultLogsSpecs):
    """Writes each rank's output to FOLDER/NODE-RANK.out and .err, and to the console."""

    def __init__(self, folder: Path, node: str) -> None:
        super().__init__(log_dir=str(folder), tee=Std.ALL)
        self._folder = folder
        self._node = node

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """The log files of this node's ranks; `envs` maps a local rank to its environment."""
        out, err, errors = {}, {}, {}
        for local, environment in envs.items():
            stem = f"{self._folder}/{self._node}-{environment['RANK']}"
            out[local], err[local], errors[local] = f"{stem}.out", f"{stem}.err", f"{stem}.json"
            environment["TORCHELASTIC_ERROR_FILE"] = errors[local]
        return LogsDest(out, err, dict(out), dict(err), errors, "/dev/null", "/dev/null")
