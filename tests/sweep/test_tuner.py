"""The search over settings: what it proposes, what a kill leaves, what is refused. No run is trained here."""

import math
import re
import sys
from functools import cache

import optuna
import pytest

from distrain.errors import UserError
from distrain.sweep.halving import Halving
from distrain.sweep.ranges import Range
from distrain.sweep.search_space import SearchSpace
from distrain.sweep.sweep import Sweep
from distrain.sweep.tuner import Tuner, load_optuna, only_tuner

SETTINGS = (
    "data.train=train.parquet", "data.val=val.parquet", "data.image_size=8", "data.val_resize=8", "model.num_classes=3",
    "model.name=densenet_bc_10_4", "train.epochs=2", "schedule.warmup_epochs=0.5", "optimizer.lr=0.05",
)  # fmt: skip
TWO = ("optimizer.lr=log:0.001..1", "schedule.warmup_epochs=0..1")
FOUR = (*TWO, "optimizer.weight_decay=log:1e-6..1e-2", "optimizer.momentum=0.5..0.99")
PLANTED = {
    "optimizer.lr": (0.2, lambda value: math.log10(value) / 3),
    "schedule.warmup_epochs": (0.3, lambda value: value),
    "optimizer.weight_decay": (1e-3, lambda value: math.log10(value) / 4),
    "optimizer.momentum": (0.8, lambda value: value / 0.5),
}
"""The best value of each setting, and its scale, on which a range is about 1 long."""


@cache  # to read the configuration takes a while
def search_space(*specs):
    return SearchSpace(None, SETTINGS, specs)


class Search:
    """A search in a folder, of members whose training is simulated."""

    def __init__(self, folder, *specs, seed=0, count=40, parallel=1):
        self.space = search_space(*(specs or TWO))
        self.seed, self.count, self.parallel = seed, count, parallel
        self.sweep = Sweep.create(folder, None, {}, Halving())
        self.tuner = self.restart()

    def restart(self):
        """Open the folder as another process does."""
        self.sweep = Sweep.open(self.sweep.folder)
        self.tuner = Tuner(self.sweep, self.space, self.seed, self.count, self.parallel)
        return self.tuner

    def step(self):
        """Propose members and record the results of those that are due."""
        self.tuner.propose()
        for member, _ in self.sweep.due():
            record(self.sweep, member, simulated_error(member.parameters))

    def run(self):
        while len(self.sweep.members) < self.count or self.sweep.due():
            self.step()
        self.tuner.propose()
        return self

    @property
    def trials(self):
        return self.tuner._study.get_trials()

    @property
    def proposed(self):
        return [member.parameters for member in self.sweep.members]


def record(sweep, member, error, **about):
    sweep.claim_folder(member).mkdir(parents=True, exist_ok=True)
    sweep.record(member, error, **about)


def distances(values):
    return [abs(PLANTED[key][1](value) - PLANTED[key][1](PLANTED[key][0])) for key, value in values.items()]


def simulated_error(values):
    return sum(distance**2 for distance in distances(values))


@pytest.fixture
def search(tmp_path):
    return Search(tmp_path / "tuned")


def states(search):
    return [trial.state.name for trial in search.trials]


def test_a_planted_optimum_is_found_and_mostly_better_than_by_random_draws_with_simulated_training(tmp_path):
    wins = 0
    for seed in range(4):
        search = Search(tmp_path / str(seed), *FOUR, seed=seed).run()
        best = min(search.proposed, key=simulated_error)
        assert max(distances(best)) < 0.2
        wins += simulated_error(best) < min(simulated_error(search.space.draw(seed, index)) for index in range(40))
    assert wins >= 3


def test_the_first_trial_is_the_configuration_if_its_values_are_in_the_ranges(search, tmp_path):
    search.step()
    assert search.proposed == [{"optimizer.lr": 0.05, "schedule.warmup_epochs": 0.5}]
    other = Search(tmp_path / "other", "optimizer.lr=0.1..1", "schedule.warmup_epochs=0..1")
    other.step()
    assert 0.1 <= other.proposed[0]["optimizer.lr"] <= 1
    assert other.space.default is None


def test_a_search_that_is_restarted_after_every_trial_proposes_the_same(search, tmp_path):
    search.count = 15
    search.restart()
    search.run()
    other = Search(tmp_path / "other", count=15)
    while len(other.sweep.members) < 15:
        other.restart()
        other.step()
    assert other.proposed == search.proposed
    assert len({values["optimizer.lr"] for values in search.proposed}) == 15


def test_as_many_members_are_unfinished_as_train_at_a_time(tmp_path):
    search = Search(tmp_path, count=5, parallel=3)
    assert search.tuner.propose() == 2
    assert search.tuner.propose() == 2
    assert [member.name for member, _ in search.sweep.due()] == [f"tune-{number:06d}" for number in range(3)]
    record(search.sweep, search.sweep.members[1], 0.5)
    assert search.tuner.propose() == 1
    assert states(search) == ["RUNNING", "COMPLETE", "RUNNING", "RUNNING"]


def test_a_larger_number_extends_the_search(search):
    search.count = 2
    search.restart()
    search.run()
    search.count = 3
    search.restart()
    search.run()
    assert states(search) == ["COMPLETE"] * 3


class Killed(BaseException):
    pass


def test_a_kill_before_sweep_json_is_written_loses_no_trial(search, monkeypatch):
    search.step()

    def killed(member):
        raise Killed

    monkeypatch.setattr(search.sweep, "append", killed)
    with pytest.raises(Killed):
        search.tuner.propose()
    chosen = search.trials[1].params
    search.restart()
    search.tuner.propose()
    assert search.proposed[1] == chosen
    assert states(search) == ["COMPLETE", "RUNNING"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_kill_between_two_settings_of_a_trial_loses_none(search, monkeypatch, number):
    for _ in range(number):
        search.step()
    suggest = optuna.trial.Trial.suggest_float

    def killed(self, name, *rest, **options):
        if name == "schedule.warmup_epochs":
            raise Killed
        return suggest(self, name, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.trial.Trial, "suggest_float", killed)
        with pytest.raises(Killed):
            search.tuner.propose()
    lr = search.trials[number].params["optimizer.lr"]
    search.restart()
    search.tuner.propose()
    assert search.proposed[number]["optimizer.lr"] == lr
    assert number or search.proposed == [search.space.default]
    assert len(search.trials) == number + 1


def test_a_result_recorded_before_a_kill_is_told_once(search):
    search.tuner.propose()
    record(search.sweep, search.sweep.members[0], 0.25)
    for _ in range(2):
        search.restart()
        search.tuner.propose()
    assert [(trial.state.name, trial.value) for trial in search.trials] == [("COMPLETE", 0.25), ("RUNNING", None)]
    assert [member.name for member, _ in search.sweep.due()] == ["tune-000001"]


def test_a_failed_member_is_a_failed_trial(search):
    search.tuner.propose()
    record(search.sweep, search.sweep.members[0], None, reason="training diverged")
    search.tuner.propose()
    assert states(search) == ["FAIL", "RUNNING"]


def test_values_are_as_their_ranges_say(tmp_path):
    specs = (
        "batch.per_lane=4..16:4", "batch.lanes=log:2..8", "optimizer.momentum=log:0.1..0.9:0.1",
        "optimizer.nesterov=choice:true,false", "optimizer.name=choice:sgd,lars", "model.options.dropout=0..0.5",
        "model.options.growth_rate=4..12",
    )  # fmt: skip
    space = search_space(*specs)
    sweep = Sweep.create(tmp_path, None, {}, Halving())
    tuner = Tuner(sweep, space, 0, 30, 1)
    while tuner.propose():
        for member, _ in sweep.due():
            record(sweep, member, 0.5)
    drawn = [member.parameters for member in sweep.members] + [space.draw(0, index) for index in range(100)]
    for values in drawn:
        assert values.keys() == space.ranges.keys()
        assert all(values[key] in found for key, found in space.ranges.items())
    seen = {key: {values[key] for values in drawn} for key in space.ranges}
    assert seen["batch.per_lane"] == {4, 8, 12, 16}
    assert seen["batch.lanes"] == set(range(2, 9))
    assert seen["optimizer.momentum"] == {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9}
    assert seen["optimizer.nesterov"] == {True, False}
    assert seen["optimizer.name"] == {"sgd", "lars"}
    assert {type(value) for key in ("batch.per_lane", "batch.lanes") for value in seen[key]} == {int}


def test_a_member_is_a_run_with_the_settings(tmp_path):
    space = search_space("optimizer.nesterov=choice:true,false", "model.options.growth_rate=4..12")
    small, large = (
        space.member(index, {"optimizer.nesterov": False, "model.options.growth_rate": 4 + index}) for index in range(2)
    )
    assert small.arguments == [
        "model.name=densenet_bc_10_4", 'model.options={"growth_rate": 4}', "optimizer.nesterov=false",
    ]  # fmt: skip
    assert 0 < small.params < large.params


def test_members_of_the_same_settings_are_trained_once(tmp_path):
    search = Search(tmp_path, "optimizer.nesterov=choice:true,false", count=12)
    while search.tuner.propose():
        for member, _ in search.sweep.due():
            record(search.sweep, member, 0.5)
    assert len(search.sweep.members) == 12
    assert len(search.sweep.trained) == 2


def test_settings_that_do_not_go_together_become_a_member_whose_run_says_so():
    space = search_space("data.image_size=4..8", "model.options.growth_rate=4..12")
    assert space.member(0, {"data.image_size": 4}).flops > 0
    assert space.member(0, {"data.image_size": 1}).flops == 0


def test_random_members_are_a_function_of_the_seed_and_their_number():
    space, equal = search_space(*TWO), SearchSpace(None, SETTINGS, TWO)
    drawn = [space.draw(3, index) for index in range(20)]
    assert [equal.draw(3, index) for index in range(20)] == drawn
    assert len({values["optimizer.lr"] for values in drawn + [space.draw(4, index) for index in range(1, 20)]}) == 39


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("1..16", {"uniform": [1, 16]}),
        ("0.5..2", {"uniform": [0.5, 2]}),
        ("-1..1:0.5", {"uniform": [-1, 1], "step": 0.5}),
        ("log:1e-4..1", {"log": [1e-4, 1]}),
        ("log:8..256:8", {"log": [8, 256], "step": 8}),
        ("choice:1,2,4", {"choice": [1, 2, 4]}),
    ],
)
def test_a_range_as_text_is_that_of_a_file(text, entry):
    def read(word):
        return int(word) if word.lstrip("-").isdecimal() else float(word)

    assert Range.from_text(text, "here", read) == Range.parse(entry, "here")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("optimizer.lr", "--vary optimizer.lr: write KEY=RANGE"),
        ("optimizer.lr=1", "--vary optimizer.lr=1: write LOW..HIGH or log:LOW..HIGH"),
        ("optimizer.lr=-1..1", "--vary optimizer.lr=-1..1: optimizer.lr=-1.0: must be at least 0"),
        ("optimizer.lr=1..0", "--vary optimizer.lr=1..0: uniform needs LOW < HIGH"),
        ("optimizer.lr=log:0..1", "--vary optimizer.lr=log:0..1: log needs LOW < HIGH, both above 0"),
        ("optimizer.lr=0..x", "--vary optimizer.lr=0..x: must be a number, not 'x'"),
        ("optimizer.lr=0..1:", "--vary optimizer.lr=0..1:: must be a number, not ''"),
        ("optimizer.lrr=0..1", "--vary optimizer.lrr=0..1: unknown key optimizer.lrr: did you mean optimizer.lr?"),
        ("optimizer.betas=0..1", "optimizer.betas has several values: only a setting of one value can be varied"),
        ("optimizer.name=choice:sgd,adamm", "optimizer.name=adamm is not known: did you mean adamw?"),
        ("batch.lanes=1..2.5", "--vary batch.lanes=1..2.5: must be an integer, not '2.5'"),
        ("model.options.dropout=0..2", "dropout=2 is a probability: it must be in [0, 1)"),
        ("model.options.growth=1..2", "unknown key model.options.growth: did you mean model.options.growth_rate?"),
        ("model.name=choice:a,b", "model.name cannot be varied: the sweep sets it"),
        ("run.dir=choice:a,b", "run.dir cannot be varied: the sweep sets it"),
        ("train.stop_epoch=0..1", "train.stop_epoch cannot be varied: the sweep sets it"),
    ],
)
def test_a_range_that_no_run_could_have_is_refused(spec, message):
    with pytest.raises(UserError, match=re.escape(message)):
        search_space(spec)


def test_a_setting_is_varied_once():
    with pytest.raises(UserError, match=r"optimizer.lr is varied twice: leave one out"):
        search_space(TWO[0], "optimizer.lr=0..1")


def test_a_study_that_does_not_belong_to_the_sweep_is_refused(search):
    search.step()
    path = search.sweep.folder / "optuna.db"
    path.unlink()
    with pytest.raises(UserError, match=r"optuna.db: has 0 trials, and sweep.json 1 members: restore it"):
        search.restart()
    path.write_bytes(b"no database at all, but long enough to be looked at" * 100)
    with pytest.raises(UserError, match=r"optuna.db: cannot be used as an optuna study: .*: restore it"):
        search.restart()


def test_only_one_process_tunes_a_folder(tmp_path):
    with only_tuner(tmp_path), pytest.raises(UserError, match="another process tunes in it"), only_tuner(tmp_path):
        pass
    with only_tuner(tmp_path):
        pass


def test_a_missing_optuna_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=re.escape("optuna is not installed: pip install 'distrain[sweep]'")):
        load_optuna()
