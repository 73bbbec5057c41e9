"""A model of the commit protocol: the operations of two ranks in two attempts at a run, on a disk that caches, in every
order, with at most one fault anywhere.

SAVE is what a rank does to save, in the words of a recording of the real program (recording_operations.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

START = {0: ("claim", "clear", "choose", "agree"), 1: ("agree",)}
SAVE = {
    0: (
        "agree", "agree", "write data", "flush data", "agree", "write metadata", "flush metadata", "rename metadata",
        "flush draft", "write manifest", "flush manifest", "rename manifest", "flush draft",
        "check attempts", "rename draft to final", "flush checkpoints", "agree", "check attempts",
        "rename final to removed", "flush checkpoints", "remove",
    ),
    1: ("agree", "agree", "write data", "flush data", "agree", "agree"),
}  # fmt: skip
STEPS = 2  # saves of each attempt, at steps that follow the restored one
KEEP = 1  # checkpoints that are not pruned

SHARED_WRITES = ("rename draft to final", "rename final to removed")
FILES = {"write data": "data", "write metadata": "metadata", "write manifest": "manifest"}
FLUSHES = {"flush data": "data", "flush metadata": "metadata", "flush manifest": "manifest"}


Program = dict[int, list[tuple[int, str]]]
"""By rank: (number of the save, operation); the start is number 0."""


def make_program(without: str = "", instead: str = "") -> Program:
    """What the ranks do, or would do if they did `instead` something else of an operation, or nothing."""
    saves = {rank: [(number, operation) for number in range(1, STEPS + 1) for operation in SAVE[rank]] for rank in SAVE}
    program = {rank: [(0, operation) for operation in START[rank]] + saves[rank] for rank in SAVE}
    changed = {without: [instead] if instead else []}
    return {rank: [(n, each) for n, old in program[rank] for each in changed.get(old, [old])] for rank in program}


@dataclass(frozen=True)
class Folder:
    """A checkpoint in the making, committed or being removed. `files` are (file, rank, is on the disk)."""

    attempt: int
    step: int
    name: str
    """draft, final or removed."""
    durable_name: str
    """Its name on the disk, to which a power cut may return."""
    files: frozenset[tuple[str, int, bool]]

    @property
    def is_whole(self) -> bool:
        wanted = {("data", 0), ("data", 1), ("metadata", 0), ("manifest", 0)}
        return {(file, rank) for file, rank, _ in self.files} == wanted

    @property
    def is_on_disk(self) -> bool:
        return self.is_whole and all(durable for _, _, durable in self.files)


@dataclass(frozen=True)
class Rank:
    position: int = 0
    alive: bool = True
    failed: bool = False  # an operation of the current save has failed on this rank
    skipped: bool = False  # the current save is given up


@dataclass(frozen=True)
class State:
    folders: frozenset[Folder] = frozenset()
    claimed: int = 0  # the newest attempt on the disk
    reported: int = 0  # the largest step that a rank knows to be committed
    chosen: tuple[int, int] = (0, 0)  # the step that each attempt restored
    ranks: tuple[tuple[Rank, Rank], ...] = ((Rank(), Rank()),)
    fault: str = ""
    stale_writes: int = 0  # of attempt 1 to what the attempts share, since attempt 2 has claimed the run

    def with_rank(self, attempt: int, rank: int, **changes: object) -> "State":
        ranks = [list(pair) for pair in self.ranks]
        ranks[attempt - 1][rank] = replace(ranks[attempt - 1][rank], **changes)  # type: ignore[arg-type]
        return replace(self, ranks=tuple((pair[0], pair[1]) for pair in ranks))

    def with_folder(self, old: Folder | None, new: Folder | None) -> "State":
        folders = self.folders - {old} if old else self.folders
        return replace(self, folders=frozenset(folders | {new} if new else folders))

    def rename(self, old: str, new: str, steps: set[int]) -> "State":
        """Rename the folders of these steps; the disk may still have the old name."""
        renamed = {folder: replace(folder, name=new) for folder in self.folders if folder.name == old}
        return replace(
            self,
            folders=frozenset(
                renamed.get(folder, folder) if folder.step in steps else folder for folder in self.folders
            ),
        )

    def remove(self) -> "State":
        """Remove what has been renamed for it. A folder whose old name the disk still has may come back empty."""
        kept = frozenset(folder for folder in self.folders if folder.name != "removed")
        emptied = {
            replace(folder, files=frozenset())
            for folder in self.folders
            if folder.name == "removed" and folder.durable_name == "final"
        }
        return replace(self, folders=kept | emptied)

    def find(self, **wanted: object) -> Folder | None:
        return next(
            (folder for folder in self.folders if all(getattr(folder, key) == wanted[key] for key in wanted)), None
        )


class Model:
    """The transitions between states under a program."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def search(self) -> tuple[int, str]:
        """Visit every reachable state. Returns their number and the first violation found, "" if there is none."""
        seen, stack = {State()}, [State()]
        while stack:
            state = stack.pop()
            steps = [*self._steps(state)]
            if not steps and any(self._runs(me, rank) for pair in state.ranks for rank, me in enumerate(pair)):
                return len(seen), "a rank waits forever"
            faults = [] if state.fault else [*self._kills(state), *_lose_power(state)]
            for after in (*steps, *faults, *self._starts(state)):
                if after not in seen:
                    if found := violation(after):
                        return len(seen), found
                    seen.add(after)
                    stack.append(after)
        return len(seen), ""

    def _runs(self, me: Rank, rank: int) -> bool:
        return me.alive and me.position < len(self._program[rank])

    def _next(self, me: Rank, rank: int) -> tuple[int, str]:
        return self._program[rank][me.position] if self._runs(me, rank) else (0, "")

    def _steps(self, state: State) -> Iterator[State]:
        """One operation of one rank, or an exchange of two."""
        for attempt, pair in enumerate(state.ranks, 1):
            yield from self._exchange(state, attempt)
            for rank, me in enumerate(pair):
                number, operation = self._next(me, rank)
                if operation and operation != "agree":
                    yield from self._operate(state, attempt, rank, number, operation)

    def _kills(self, state: State) -> Iterator[State]:
        for attempt, pair in enumerate(state.ranks, 1):
            for rank, me in enumerate(pair):
                if self._runs(me, rank):
                    yield replace(state, fault="kill").with_rank(attempt, rank, alive=False)

    def _starts(self, state: State) -> Iterator[State]:
        """A launcher starts attempt 2: after the first has ended, or because it takes it for lost."""
        if len(state.ranks) > 1:
            return
        again = replace(state, ranks=(*state.ranks, (Rank(), Rank())))
        if not any(self._runs(me, rank) for rank, me in enumerate(state.ranks[0])):
            yield again
        elif not state.fault and state.claimed:
            yield replace(again, fault="taken for lost")

    def _exchange(self, state: State, attempt: int) -> Iterator[State]:
        """Both ranks exchange how they fared, or one finds the other gone."""
        pair = state.ranks[attempt - 1]
        waits = [self._next(me, rank)[1] == "agree" for rank, me in enumerate(pair)]
        for rank in (0, 1):
            if waits[rank] and not self._runs(pair[1 - rank], 1 - rank):
                yield state.with_rank(attempt, rank, alive=False)
        if not all(waits):
            return
        failed, after = any(me.failed for me in pair), state
        for rank, me in enumerate(pair):
            number = self._next(me, rank)[0]
            left = [entry for entry in self._program[rank][me.position + 1 :] if entry[0] == number]
            is_last = not any(operation == "agree" for _, operation in left)
            if number and is_last and not failed and not me.skipped:
                after = replace(after, reported=max(after.reported, after.chosen[attempt - 1] + number))
            skipped = (me.skipped or failed) and bool(left)
            after = after.with_rank(attempt, rank, position=me.position + 1, failed=False, skipped=skipped)
        if failed:
            after = after.with_folder(after.find(attempt=attempt, name="draft"), None)
        yield after

    def _operate(self, state: State, attempt: int, rank: int, number: int, operation: str) -> Iterator[State]:
        me = state.ranks[attempt - 1][rank]
        left = [entry for entry in self._program[rank][me.position + 1 :] if entry[0] == number]
        done = state.with_rank(attempt, rank, position=me.position + 1, skipped=me.skipped and bool(left))
        if me.skipped or me.failed:
            yield done
            return
        # Once a save is committed, an error only leaves something to be removed later.
        is_agreed_on = any(operation == "agree" for _, operation in left)
        failed = done.with_rank(attempt, rank, failed=is_agreed_on, skipped=not is_agreed_on and bool(left))
        yield _effect(state, done, failed, attempt, rank, state.chosen[attempt - 1] + number, operation)
        if not state.fault and number:
            yield replace(failed, fault="error")


def _effect(state: State, done: State, failed: State, attempt: int, rank: int, step: int, operation: str) -> State:
    """What a successful operation leads to."""
    draft = state.find(attempt=attempt, name="draft", step=step)
    if attempt < state.claimed and operation in SHARED_WRITES:
        done = replace(done, stale_writes=done.stale_writes + 1)
    if operation == "claim":
        return replace(done, claimed=attempt)
    if operation == "clear":
        return done.rename("draft", "removed", {folder.step for folder in state.folders})
    if operation == "delete drafts file by file":  # seen between two of its files
        torn = {f: replace(f, files=frozenset(e for e in f.files if e[0] != "data")) for f in state.folders}
        return replace(done, folders=frozenset(torn[f] if f.name == "draft" else f for f in state.folders))
    if operation == "choose":
        chosen = list(state.chosen)
        chosen[attempt - 1] = max((f.step for f in state.folders if f.name == "final" and f.is_whole), default=0)
        return replace(done, chosen=(chosen[0], chosen[1]))
    if operation == "check attempts":
        return done if state.claimed == attempt else done.with_rank(attempt, rank, alive=False)
    if operation == "flush checkpoints":
        return replace(done, folders=frozenset(replace(f, durable_name=f.name) for f in state.folders))
    if operation == "rename final to removed":
        finals = sorted(folder.step for folder in state.folders if folder.name == "final")
        return done.rename("final", "removed", set(finals[:-KEEP]))
    if operation == "remove":
        return done.remove()
    if operation == "write data" and draft is None:
        return done.with_folder(None, Folder(attempt, step, "draft", "draft", frozenset({("data", rank, False)})))
    return _effect_on_draft(state, done, failed, rank, draft, operation)


def _effect_on_draft(
    state: State, done: State, failed: State, rank: int, draft: Folder | None, operation: str
) -> State:
    if draft is None:
        return failed  # a newer attempt has removed it
    if operation == "write manifest" and {("data", 0), ("data", 1), ("metadata", 0)} != {e[:2] for e in draft.files}:
        return failed
    if operation in FILES:
        return done.with_folder(draft, replace(draft, files=draft.files | {(FILES[operation], rank, False)}))
    if operation in FLUSHES:
        file = FLUSHES[operation]
        files = draft.files - {(file, rank, False)} | {(file, rank, True)}
        return done.with_folder(draft, replace(draft, files=files))
    if operation == "rename draft to final":
        if state.find(name="final", step=draft.step) is not None:
            return done.with_folder(draft, None)  # never overwritten
        return done.with_folder(draft, replace(draft, name="final"))
    return done


def _lose_power(state: State) -> Iterator[State]:
    """All ranks die, and of what is not flushed every combination survives."""
    dead = tuple((Rank(alive=False), Rank(alive=False)) for _ in state.ranks)
    results = [replace(state, fault="power", ranks=dead, folders=frozenset())]
    for folder in state.folders:
        flushed = frozenset(entry for entry in folder.files if entry[2])
        variants = {
            replace(folder, name=name, durable_name=name, files=files)
            for name in (folder.name, folder.durable_name)
            for files in (folder.files, flushed)
        }
        results = [result.with_folder(None, variant) for result in results for variant in variants]
    yield from results


def violation(state: State) -> str:
    """What must never be, if it is."""
    finals = {folder.step for folder in state.folders if folder.name == "final"}
    for folder in state.folders:
        if folder.name == "final" and not folder.is_on_disk:
            return f"step {folder.step} is committed, and a power cut may leave it torn"
    if max(finals, default=0) < state.reported:
        return f"step {state.reported} was reported as committed and is lost"
    main, restored = state.ranks[-1][0], state.chosen[len(state.ranks) - 1]
    loads = main.alive and main.position == len(START[0]) - 1 and state.claimed == len(state.ranks)
    if loads and restored and restored not in finals:
        return f"step {restored} is removed while the newest attempt loads it"
    if state.stale_writes > 1:
        return "attempt 1 writes although attempt 2 has taken over"
    return ""
