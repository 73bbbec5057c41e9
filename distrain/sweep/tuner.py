"""Adaptive search: the members of a sweep are the trials of an optuna study.

Only the process that tunes a folder writes the study, DIR/optuna.db; those that train members know nothing of it. A
trial is in the study before its member is in sweep.json, and a member's result is recorded before the study is told:
after a kill the next process does the step that is missing.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrain.errors import UserError
from distrain.resilience.claim import LAUNCH_VARIABLE, Claim
from distrain.rng import Stream, hash64
from distrain.sweep.population import Member
from distrain.sweep.ranges import Range, Value
from distrain.sweep.search_space import SearchSpace
from distrain.sweep.sweep import Sweep

if TYPE_CHECKING:
    from optuna.trial import Trial

_STUDY = "tune"
_FILE = "optuna.db"


class Tuner:
    """Chooses the settings of members by their errors: TPE (Bergstra et al., NeurIPS 2011).

    The first trial is the configuration's own values, if all lie in their ranges. Every proposal is a function of the
    seed, its number, and the trials that are finished or running at that time. Which these are depends on when members
    end, so that with several at a time, or after a kill, a search need not propose what it would have proposed.
    """

    def __init__(self, sweep: Sweep, space: SearchSpace, seed: int, count: int, parallel: int) -> None:
        """Open the study of a sweep, or begin it. `count` members in all, `parallel` of them train at a time.

        Raises UserError if optuna is missing, or its file is damaged or of another sweep.
        """
        self._optuna = load_optuna()
        self._sweep = sweep
        self._space = space
        self._seed = seed
        self._count = count
        self._parallel = parallel
        self._untold: set[int] = set()
        self._begun: Any = None
        """The trial that a killed process began and added no member for."""
        self._study = self._open()

    def propose(self) -> int:
        """Tell the study all recorded results, and extend the sweep until enough members are unfinished.

        Returns how many members the sweep will still be extended by.
        """
        while True:
            members = self._sweep.current()
            self._tell(members)
            unfinished = [member for member in members if member.status in ("waiting", "running")]
            if len(members) >= self._count or len(unfinished) >= self._parallel:
                return max(0, self._count - len(members))
            self._sweep.append(self._ask(len(members)))

    def _open(self) -> Any:
        path = self._sweep.folder / _FILE
        cure = "restore it and sweep.json from one copy, or begin another sweep with another --out"
        try:
            study = self._optuna.create_study(storage=f"sqlite:///{path}", study_name=_STUDY, load_if_exists=True)
            trials = study.get_trials(deepcopy=False)
        except Exception as error:  # of the database library, which optuna may change
            reason = str(error).split("\n")[0]
            raise UserError(f"{path}: cannot be used as an optuna study: {reason}: {cure}") from error
        states = self._optuna.trial.TrialState
        begun = [trial for trial in trials if trial.state != states.WAITING]
        self._untold = {trial.number for trial in begun if trial.state == states.RUNNING}
        members = len(self._sweep.members)
        if len(begun) < members or {trial.number for trial in begun[members:]} - ({members} & self._untold):
            raise UserError(f"{path}: has {len(begun)} trials, and sweep.json {members} members: {cure}")
        self._begun = begun[-1] if len(begun) > members else None
        if not trials and (default := self._space.default) is not None:
            study.enqueue_trial(default)
        return study

    def _tell(self, members: Sequence[Member]) -> None:
        for member in members:
            if member.index in self._untold and member.status in ("done", "failed"):
                failed = self._optuna.trial.TrialState.FAIL if member.status == "failed" else None
                self._study.tell(member.index, member.error, failed)
                self._untold.remove(member.index)

    def _ask(self, number: int) -> Member:
        """The member of the next trial: one that was begun before a kill and has no member yet, or a new one."""
        seed = int(hash64(self._seed, Stream.SPACE, number) >> 32)
        self._study.sampler = self._optuna.samplers.TPESampler(seed=seed)
        if self._begun is None:
            trial = self._study.ask()
        else:  # optuna has no public way to ask again for a trial; one opened by its id keeps the values it has
            trial = self._optuna.trial.Trial(self._study, self._begun._trial_id)
        self._begun = None
        self._untold.add(number)
        return self._space.member(number, {key: _suggest(trial, key, one) for key, one in self._space.ranges.items()})


def load_optuna() -> Any:
    """The library. Raises UserError if it is not installed."""
    try:
        import optuna
    except ImportError as error:
        cure = "pip install 'distrain[sweep]', or use --halve-at"
        raise UserError(f"sweep tune: optuna is not installed: {cure}") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@contextmanager
def only_tuner(folder: Path) -> Iterator[None]:
    """While this process alone extends the sweep in `folder`. Raises UserError if another one does."""
    os.environ.pop(LAUNCH_VARIABLE, None)  # a claim of the same launcher would be taken over
    try:
        claim = Claim(folder / "tuner", 1, 0, 0)
    except UserError as error:
        raise UserError(f"{folder}: another process tunes in it: wait for it, stop it, or use another --out") from error
    try:
        yield
    finally:
        claim.end("the process ended", False)


def _suggest(trial: "Trial", name: str, values: Range) -> Value:
    """A value of the trial. optuna has no multiples on a logarithmic scale: it knows the number before rounding."""
    if values.kind == "choice":
        choice: Any = trial.suggest_categorical(name, values.choices)
        return choice
    low, high = map(float, values.ends)
    if values.kind == "log":
        return values.round(trial.suggest_float(name, low, high, log=True))
    return values.round(trial.suggest_float(name, low, high, step=values.step or None))
