"""The beginning of a run, for trying things out: nothing of it is kept."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from tempfile import TemporaryDirectory

from distrain.config import Config
from distrain.data.index import Index
from distrain.data.loading.loader import Batch
from distrain.data.loading.requests import train_requests
from distrain.data.loading.setup import load_indexes, make_loader, make_plan, make_quarantine
from distrain.data.sampling.plan import Plan
from distrain.learner import Learner, build_network, open_learner
from distrain.parallel.group import Group
from distrain.recipe.distillation import open_teacher
from distrain.run import split_batches


@dataclass(frozen=True)
class ShortRun:
    """What `train_step` needs, from the first step on."""

    train_index: Index
    val_index: Index
    plan: Plan
    learner: Learner
    batches: Generator[Batch, None, None]


@contextmanager
def open_short_run(config: Config, group: Group, info: Callable[[str], None], steps: int = 1) -> Iterator[ShortRun]:
    """Open a run of at least so many steps, with random weights. All ranks call this.

    Raises UserError if configuration and data do not belong together.
    """
    train_index, val_index = load_indexes(config)
    with TemporaryDirectory() as folder:
        config = deepcopy(config)
        config.run.dir = folder
        config.train.epochs = max(config.train.epochs, (steps + 1) * config.batch.size / len(train_index))
        plan, name = make_plan(config, train_index), "torch" if config.data.loader == "auto" else config.data.loader
        quarantine = make_quarantine(config, train_index, "train")
        network, teacher = build_network(config, group.device), open_teacher(config, train_index)
        learner = open_learner(config, group, network, None, info, train_index, teacher)
        requests = train_requests(config, plan, train_index, group.lanes(config.batch.lanes))
        with (
            closing(make_loader(config, name, train_index, quarantine, group.device)) as loader,
            closing(split_batches(loader.stream(requests), learner.splits)) as batches,
        ):
            yield ShortRun(train_index, val_index, plan, learner, batches)
