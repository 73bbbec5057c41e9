"""The folder of a sweep: its members, who trains them, and what they reached.

    sweep.json            the members, and the settings that they share
    runs/NAME/            the run of a member, an ordinary one
    claims/NAME/          attempts/ and beat: who trains it; log.txt: what the run printed; result.json: its errors
    tuner/, optuna.db     of `sweep tune` only: who chooses members; the study, see tuner.py

Any number of processes, on any number of hosts, work on one folder. Each claims a member before it trains it, as a run
is claimed: a claim holds while its process lives. A member whose process is lost is claimed again, and continues from
its checkpoint.
"""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from distrain.errors import UserError
from distrain.files import read_json, write_json
from distrain.resilience.claim import Claim, newest_attempt
from distrain.sweep.halving import Halving, wanted_rounds
from distrain.sweep.population import Member, Status
from distrain.sweep.sampling import Sampler

_FILE = "sweep.json"
_RESULT = "result.json"
_LATEST = 20  # results from which the pace is known
_CURE = "restore it from a copy, or begin another sweep with another --out"


@dataclass(frozen=True)
class Result:
    """What a member has reached."""

    errors: tuple[float | None, ...] = ()
    """At the end of each round that it has finished; None for the one in which it failed."""
    seconds: float | None = None
    reason: str = ""

    @property
    def has_failed(self) -> bool:
        return bool(self.errors) and self.errors[-1] is None


class Sweep:
    """The members of a sweep and what is known of each. Raises OSError where its folder cannot be used."""

    def __init__(self, folder: Path, members: Sequence[Member], halving: Halving) -> None:
        self.folder = folder
        self.halving = halving
        self._final: dict[str, Result] = {}
        self._set_members(members)

    def _set_members(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        first: dict[str, Member] = {}
        keys = [json.dumps([one.network, one.options, one.settings], sort_keys=True) for one in self.members]
        self._twins = {one.name: first.setdefault(key, one) for one, key in zip(self.members, keys, strict=True)}

    @classmethod
    def open(cls, folder: Path) -> "Sweep":
        """Raises UserError if there is no sweep in `folder`, or its file is damaged."""
        content = read_json(folder / _FILE, _CURE)
        if not content:
            raise UserError(f"{folder}: no sweep: give the folder that `sweep run --out` made")
        try:
            halving = Halving(tuple(content["halve_at"]), content["fraction"])
            return cls(folder, [Member(**member) for member in content["members"]], halving)
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / _FILE}: written by another release: {_CURE}") from error

    @classmethod
    def create(
        cls, folder: Path, members: Sequence[Member] | None, settings: Mapping[str, Any], halving: Halving
    ) -> "Sweep":
        """Begin a sweep, continue the same one, or extend it by more `members`; None: it has those that it has.

        Raises UserError if the folder's sweep has other settings or other members.
        """
        shared = {"settings": dict(settings), "halve_at": list(halving.epochs), "fraction": halving.fraction}
        content = read_json(folder / _FILE, _CURE)
        if content:
            _require_same_settings(folder, content, shared)
            if members is not None:
                _require_same_members(folder, content, members)
        if not content or len(members or ()) > len(content.get("members", ())):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / _FILE, {**shared, "members": [asdict(member) for member in members or ()]})
        return cls.open(folder)

    def append(self, member: Member) -> None:
        """Extend the sweep by one member. Only for the one process that does so; others see it when they open it."""
        members = [*self.members, member]
        content = read_json(self.folder / _FILE, _CURE)
        write_json(self.folder / _FILE, {**content, "members": [asdict(one) for one in members]})
        self._set_members(members)

    @property
    def name(self) -> str:
        """Of its MLflow run: that of the folder, and a hash that tells it from other folders of that name."""
        identity = f"{self.folder.resolve()} {self.members[0].name} {self.members[0].options}"
        return f"{self.folder.resolve().name}-{zlib.crc32(identity.encode()):08x}"

    @property
    def trained(self) -> list[Member]:
        """The members without those that equal an earlier one, which are not trained again."""
        return [member for member in self.members if self.twin(member).name == member.name]

    def twin(self, member: Member) -> Member:
        """The member that is trained for this one: itself, or an earlier one that equals it."""
        return self._twins[member.name]

    def current(self) -> list[Member]:
        """All members as they are now. One whose process was killed counts as running until it is claimed again."""
        results = self.results()
        wanted = self._wanted(results)
        found = []
        for member in self.members:
            twin = self.twin(member)
            result = results[twin.name]
            done = len(result.errors)
            status: Status
            if result.has_failed:
                status = "failed"
            elif done == self.halving.rounds:
                status = "done"
            elif done == wanted[twin.name]:
                status = "pruned" if max(wanted.values()) > done else "waiting"
            else:
                status = "running" if self.is_claimed(twin) else "waiting"
            error = result.errors[-1] if result.errors else None
            found.append(replace(member, status=status, error=error, seconds=result.seconds, reason=result.reason))
        return found

    def due(self) -> list[tuple[Member, int]]:
        """The members that are to train further, by this process or another, each with the number of its next round."""
        results = self.results()
        wanted = self._wanted(results)
        next_round = {name: len(result.errors) for name, result in results.items() if not result.has_failed}
        return [
            (member, next_round[member.name])
            for member in self.trained
            if next_round.get(member.name, math.inf) < wanted[member.name]
        ]

    def results(self) -> dict[str, Result]:
        """What each trained member has reached."""
        return {member.name: self.result(member) for member in self.trained}

    def result(self, member: Member) -> Result:
        """What a trained member has reached. Raises UserError if the file is damaged."""
        if member.name not in self._final:
            path = self.claim_folder(member) / _RESULT
            cure = "delete it; the member's run is then looked at again"
            content = read_json(path, cure)
            if not content:
                return Result()
            try:
                result = Result(tuple(content["errors"]), content["seconds"], content["reason"])
            except (KeyError, TypeError) as error:
                raise UserError(f"{path}: not a result: {cure}") from error
            if not result.has_failed and len(result.errors) < self.halving.rounds:
                return result
            self._final[member.name] = result
        return self._final[member.name]

    def pace(self) -> float | None:
        """Seconds between the latest results of all processes; None before there are two."""
        paths = (self.claim_folder(member) / _RESULT for member in self.trained)
        times = sorted(path.stat().st_mtime for path in paths if path.exists())[-_LATEST:]
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None

    def run_folder(self, member: Member) -> Path:
        return self.folder / "runs" / member.name

    def claim_folder(self, member: Member) -> Path:
        return self.folder / "claims" / member.name

    def claim(self, member: Member, number: int) -> Claim | None:
        """The right to train a member in round `number`; None if another process does or has done that."""
        if len(self.result(member).errors) > number:
            return None
        try:
            claim = Claim(self.claim_folder(member), 1, 0, 0)
        except UserError:  # its process is alive
            return None
        if len(self.result(member).errors) > number:  # meanwhile
            claim.end("finished by another process", False)
            return None
        return claim

    def is_claimed(self, member: Member) -> bool:
        """Whether a process claims the member, which may be lost."""
        attempt = newest_attempt(self.claim_folder(member))
        return attempt is not None and attempt.end is None

    def record(self, member: Member, error: float | None, seconds: float | None = None, reason: str = "") -> None:
        """Record the error at the end of a member's next round, or None and the reason why it failed in it."""
        result = {"errors": [*self.result(member).errors, error], "seconds": seconds, "reason": reason}
        write_json(self.claim_folder(member) / _RESULT, result)

    def _wanted(self, results: Mapping[str, Result]) -> dict[str, int]:
        return wanted_rounds({name: result.errors for name, result in results.items()}, self.halving)


def sample_members(samplers: Sequence[Sampler], seed: int, count: int) -> list[Member]:
    """The first `count` networks of each space. Raises UserError if two spaces have one name."""
    names = [sampler.space.name for sampler in samplers]
    if len(set(names)) < len(names):
        raise UserError(f"two spaces are called {max(names, key=names.count)}: rename a file")
    return [sampler.sample(seed, index) for sampler in samplers for index in range(count)]


def _require_same_settings(folder: Path, content: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
    before, now = (
        {**one["settings"], "--halve-at": one["halve_at"], "--fraction": one["fraction"]} for one in (content, shared)
    )
    for name in ["--halve-at", *sorted(before.keys() | now.keys())]:
        if before.get(name) != now.get(name):
            begun = f"with {name}={before[name]}" if name in before else f"without {name}"
            chosen = f", not {now[name]}" if name in before.keys() & now.keys() else ""
            raise UserError(
                f"{folder}: this sweep was begun {begun}{chosen}: use that, or begin another with another --out"
            )


def _require_same_members(folder: Path, content: Mapping[str, Any], members: Sequence[Member]) -> None:
    known = {(entry["space"], entry["index"]): entry for entry in content.get("members", ())}
    chosen = {(member.space, member.index): member for member in members}
    if missing := known.keys() - chosen.keys():
        space, index = min(missing)
        raise UserError(f"{folder}: this sweep has {space} {index}, which is not chosen now: name all spaces, and --n")
    for key, entry in known.items():
        if json.loads(json.dumps(chosen[key].options)) != entry["options"]:
            raise UserError(
                f"{folder}: {key[0]} {key[1]} of this sweep is another network: the space, its conditions or --seed "
                "changed: restore them, or begin another sweep with another --out"
            )
