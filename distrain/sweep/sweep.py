"""The folder of a sweep: its members, who trains them, and what they reached.

    sweep.json            the members, and the settings that they share
    runs/NAME/            the run of a member, an ordinary one
    claims/NAME/          attempts/ and beat: who trains it; log.txt: what the run printed; result.json: its end

Any number of processes, on any number of hosts, work on one folder. Each claims a member before it trains it, as a run
is claimed: a claim holds while its process lives. A member whose process is lost is claimed again, and continues from
its checkpoint.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from distrain.errors import UserError
from distrain.files import read_json, write_json
from distrain.resilience.claim import Claim, newest_attempt
from distrain.sweep.population import Member
from distrain.sweep.sampling import Sampler

_FILE = "sweep.json"
_CURE = "restore it from a copy, or begin another sweep with another --out"


class Sweep:
    """The members of a sweep and what is known of each. Raises OSError where its folder cannot be used."""

    def __init__(self, folder: Path, members: Sequence[Member]) -> None:
        self.folder = folder
        self.members = tuple(members)
        first: dict[str, Member] = {}
        keys = {member.name: json.dumps([member.network, member.options], sort_keys=True) for member in self.members}
        self._finished: set[str] = set()
        self._trained = {member.name: first.setdefault(keys[member.name], member).name for member in self.members}

    @classmethod
    def open(cls, folder: Path) -> "Sweep":
        """Raises UserError if there is no sweep in `folder`, or its file is damaged."""
        content = read_json(folder / _FILE, _CURE)
        if not content:
            raise UserError(f"{folder}: no sweep: give the folder that `sweep run --out` made")
        try:
            return cls(folder, [Member(**member) for member in content["members"]])
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / _FILE}: written by another release: {_CURE}") from error

    @classmethod
    def create(cls, folder: Path, members: Sequence[Member], settings: Mapping[str, Any]) -> "Sweep":
        """Begin a sweep, go on with the same one, or extend it by more `members`.

        Raises UserError if the folder's sweep has other settings or other members.
        """
        content = read_json(folder / _FILE, _CURE)
        if content:
            _require_same(folder, content, members, settings)
        if len(members) > len(content.get("members", ())):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / _FILE, {"settings": dict(settings), "members": [asdict(member) for member in members]})
        return cls.open(folder)

    @property
    def trained(self) -> list[Member]:
        """The members without those that equal an earlier one, which are not trained again."""
        return [member for member in self.members if self._trained[member.name] == member.name]

    def twin(self, member: Member) -> Member:
        """The member that is trained for this one: itself, or an earlier one that equals it."""
        return next(one for one in self.members if one.name == self._trained[member.name])

    def current(self) -> list[Member]:
        """All members as they are now. One whose process was killed counts as running until it is claimed again."""
        now = {member.name: self._look(member) for member in self.trained}
        return [
            replace(member, status=twin.status, error=twin.error, seconds=twin.seconds, reason=twin.reason)
            for member in self.members
            for twin in [now[self._trained[member.name]]]
        ]

    def run_folder(self, member: Member) -> Path:
        return self.folder / "runs" / member.name

    def claim_folder(self, member: Member) -> Path:
        return self.folder / "claims" / member.name

    def claim(self, member: Member) -> Claim | None:
        """The right to train a member; None if another process trains it, or it is finished."""
        folder = self.claim_folder(member)
        if self.is_finished(member):
            return None
        try:
            claim = Claim(folder, 1, 0, 0)
        except UserError:  # its process is alive
            return None
        if self.is_finished(member):  # meanwhile
            claim.end("finished by another process", False)
            return None
        return claim

    def is_claimed(self, member: Member) -> bool:
        """Whether a process claims the member, which may be lost."""
        attempt = newest_attempt(self.claim_folder(member))
        return attempt is not None and attempt.end is None

    def is_finished(self, member: Member) -> bool:
        """Whether the member is done, or has failed."""
        if member.name not in self._finished and (self.claim_folder(member) / "result.json").exists():
            self._finished.add(member.name)
        return member.name in self._finished

    def finish(self, member: Member) -> None:
        """Record what a member reached."""
        result = {name: getattr(member, name) for name in ("status", "error", "seconds", "reason")}
        write_json(self.claim_folder(member) / "result.json", result)

    def _look(self, member: Member) -> Member:
        path = self.claim_folder(member) / "result.json"
        with suppress(TypeError):
            result = read_json(path, "delete it; the member's run is then looked at again")
            if result:
                return replace(member, **result)
        return replace(member, status="running" if self.is_claimed(member) else "waiting")


def sample_members(samplers: Sequence[Sampler], seed: int, count: int) -> list[Member]:
    """The first `count` networks of each space. Raises UserError if two spaces have one name."""
    names = [sampler.space.name for sampler in samplers]
    if len(set(names)) < len(names):
        raise UserError(f"two spaces are called {max(names, key=names.count)}: rename a file")
    return [
        Member(
            space=sampler.space.name,
            index=index,
            network=sample.network,
            options=sample.options,
            parameters=sample.parameters,
            flops=sample.cost.flops,
            params=sample.cost.params,
            activations=sample.cost.conv_activations,
        )
        for sampler in samplers
        for index in range(count)
        for sample in [sampler.sample(seed, index)]
    ]


def _require_same(
    folder: Path, content: Mapping[str, Any], members: Sequence[Member], settings: Mapping[str, Any]
) -> None:
    before = content.get("settings", {})
    for name in sorted(before.keys() | settings.keys()):
        if before.get(name) != settings.get(name):
            raise UserError(
                f"{folder}: this sweep was begun with {name}={before.get(name)}, not {settings.get(name)}: use that, "
                "or begin another with another --out"
            )
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
