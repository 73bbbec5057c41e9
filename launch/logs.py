"""Where the output of every rank goes."""

from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, LogsDest, Std


class RankLogs(DefaultLogsSpecs):
    """Whole in FOLDER/NODE-RANK.out and .err, and on the screen too."""

    def __init__(self, folder: Path, node: str) -> None:
        super().__init__(log_dir=str(folder), tee=Std.ALL)
        self._folder = folder
        self._node = node

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Names for the ranks of this node; `envs` is the environment of each, by local rank."""
        out, err, errors = {}, {}, {}
        for local, environment in envs.items():
            stem = f"{self._folder}/{self._node}-{environment['RANK']}"
            out[local], err[local], errors[local] = f"{stem}.out", f"{stem}.err", f"{stem}.json"
            environment["TORCHELASTIC_ERROR_FILE"] = errors[local]
        return LogsDest(out, err, dict(out), dict(err), errors, "/dev/null", "/dev/null")
