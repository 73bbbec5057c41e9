"""`launch doctor`: check the health of all hosts of a job at once.

Runs as the ranks of a job, started by launch/check.py with the arguments of a training.
"""

import hashlib
import os
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from distrain import config
from distrain.arguments import AnyOrder, add_run_arguments
from distrain.config import Config
from distrain.data.loading.setup import load_indexes
from distrain.data.storage.remote import cache_folder
from distrain.errors import EXIT_DONE, EXIT_USER, UserError
from distrain.parallel.consistency import digest_code
from distrain.parallel.environment import read_environment
from distrain.parallel.group import Group
from launch.node import HOST_VARIABLE

_WRITE_BYTES = 64 << 20
_MIN_FREE = 10**9  # bytes
_MIN_DISK_RATE = 10**7  # bytes/s
_MIN_LINK_RATE = 5 * 10**7  # bytes/s, less than half of gigabit Ethernet
_MAX_CLOCK_SKEW_S = 0.5
_MAX_GPU_USED = 0.1  # fraction of a GPU's memory
_PATIENCE_S = 60.0  # for a host to answer
_MIN_SPEED = 0.5  # fraction of the median speed of all hosts' GPUs

Facts = dict[str, Any]


def collect_facts(settings: Config, group: Group) -> list[Facts]:
    """The facts of every host, and of its connections to the others, on every rank."""
    environment = read_environment()
    local_rank, local_world = environment.local_rank, environment.local_world
    ranks = group.gather((os.environ.get("GROUP_RANK", "0"), local_rank, measure_matmul(group.device)))
    own = examine_host(settings) if local_rank == 0 else {}
    hosts = [facts for facts in group.gather(own) if facts]
    first_ranks = list(range(0, group.world, local_world))
    for number, facts in enumerate(hosts):
        speeds = [speed for node, _, speed in ranks if int(node) == number]
        facts["gmacs"] = min(speeds)
        facts["ranks"] = len(speeds)
    look_for_token(settings.run.folder, group, hosts, first_ranks)
    measure_clocks(group, hosts, first_ranks)
    measure_links(group, hosts, first_ranks)
    all_reduce = measure_all_reduce(group)
    for facts in hosts:
        facts["all_reduce_rate"] = all_reduce
    return hosts


def examine_host(settings: Config) -> Facts:
    """The facts this host can find without the others. What fails is listed in `errors`."""
    facts: Facts = {"host": os.environ.get(HOST_VARIABLE, socket.gethostname()), "errors": []}

    def attempt(name: str, find: Callable[[], Any]) -> None:
        try:
            facts[name] = find()
        except (OSError, UserError) as error:
            facts["errors"].append(f"{name}: {error}")

    attempt("code", digest_code)
    attempt("config", lambda: hashlib.sha256(config.to_yaml(settings).encode()).hexdigest()[:12])
    attempt("data", lambda: " ".join(index.digest[:12] for index in load_indexes(settings)))
    attempt("cache folder", lambda: str(cache_folder(settings.download)))
    folders = {"run": settings.run.folder} | ({"cache": Path(facts["cache folder"])} if "cache folder" in facts else {})
    for name, folder in folders.items():
        attempt(f"{name}_free", partial(free_bytes, folder))
        attempt(f"{name}_write_rate", partial(measure_write_rate, folder))
    facts["torch"] = torch.__version__
    if torch.cuda.is_available():
        facts["gpus"] = torch.cuda.device_count()
        facts["gpu"] = torch.cuda.get_device_name()
        attempt("driver", lambda: Path("/sys/module/nvidia/version").read_text().strip())
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        memory = [torch.cuda.mem_get_info(device) for device in range(facts["gpus"])]
        facts["gpu_used"] = max(1 - available / total for available, total in memory)
    return facts


def look_for_token(folder: Path, group: Group, hosts: Sequence[Facts], first_ranks: Sequence[int]) -> None:
    """Add to each host whether it finds in its run folder what the first host has written there."""
    token = Path(f".doctor-{uuid.uuid4().hex}")
    if group.is_main:
        with suppress(OSError):  # among the errors already
            (folder / token).write_text(socket.gethostname())
    token, written = group.broadcast((token, (folder / token).exists()))
    found = group.gather(not written or (folder / token).exists())
    if group.is_main:
        with suppress(OSError):
            (folder / token).unlink(missing_ok=True)
    for facts, rank in zip(hosts, first_ranks, strict=True):
        facts["run_shared"] = found[rank]


def free_bytes(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(folder).free


def measure_write_rate(folder: Path) -> float:
    """Bytes per second of a write that is flushed to the disk."""
    with tempfile.TemporaryFile(dir=folder) as file:
        data = os.urandom(1 << 20) * (_WRITE_BYTES >> 20)
        start = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return _WRITE_BYTES / (time.perf_counter() - start)


def measure_matmul(device: torch.device) -> float:
    """10^9 multiply-adds per second of a matrix product, the fastest of 10."""
    on_gpu = device.type == "cuda"
    side = 4096 if on_gpu else 384
    matrix = torch.ones(side, side, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        matrix @ matrix
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return side**3 / best / 1e9


def measure_clocks(group: Group, hosts: Sequence[Facts], first_ranks: Sequence[int]) -> None:
    """Add to each host the offset of its clock from that of the first host, seconds."""
    skews = {0: 0.0}
    for number, rank in enumerate(first_ranks[1:], start=1):
        best = float("inf")
        for _ in range(5):
            clock = torch.zeros(1, dtype=torch.float64)
            if group.rank == 0:
                sent = time.time()
                dist.send(clock, rank, group=group.control)
                dist.recv(clock, rank, group=group.control)
                received = time.time()
                if received - sent < best:
                    best = received - sent
                    skews[number] = clock.item() - (sent + received) / 2
            elif group.rank == rank:
                dist.recv(clock, 0, group=group.control)
                clock.fill_(time.time())
                dist.send(clock, 0, group=group.control)
    for number, skew in group.broadcast(skews).items():
        hosts[number]["clock_s"] = skew


def measure_links(group: Group, hosts: Sequence[Facts], first_ranks: Sequence[int]) -> None:
    """Add to each host the rate of the faster of its links to its two neighbors in a ring, bytes per second.

    The faster one, because a slow host slows down both of its own links but only one of each neighbor's.
    """
    count = len(first_ranks)
    pairs = [(number, (number + 1) % count) for number in range(count if count > 2 else count - 1)]
    rates: dict[int, float] = {}
    for one, other in pairs:
        rate = group.max(measure_link(group, first_ranks[one], first_ranks[other]))
        for number in (one, other):
            rates[number] = max(rate, rates.get(number, 0.0))
    for number, rate in rates.items():
        hosts[number]["link_rate"] = rate


def measure_link(group: Group, one: int, other: int) -> float:
    """Bytes per second of a transfer from one rank to another and back; 0 on all other ranks."""
    if group.rank not in (one, other):
        return 0.0
    peer = other if group.rank == one else one
    rate = 0.0
    for size in (1 << 18, 1 << 24):
        data = torch.empty(size, dtype=torch.uint8)
        start = time.perf_counter()
        for sender in (one, other):
            (dist.send if group.rank == sender else dist.recv)(data, peer, group=group.control)
        seconds = time.perf_counter() - start
        rate = 2 * size / seconds
        slow = torch.tensor(float(seconds > 0.1))
        (dist.send if group.rank == one else dist.recv)(slow, peer, group=group.control)
        if slow:  # already known to be slow: the larger transfer would take long
            break
    return rate


def measure_all_reduce(group: Group) -> float:
    """Bytes per second over each rank's link in an all-reduce, as a ring over all ranks would need."""
    if group.world == 1:
        return 0.0
    data = torch.zeros(1 << 26 if group.device.type == "cuda" else 1 << 20, device=group.device)
    best = float("inf")
    for _ in range(3):
        group.barrier()
        start = time.perf_counter()
        dist.all_reduce(data)
        if group.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * (group.world - 1) / group.world * data.nbytes / best


def find_unhealthy(hosts: Sequence[Facts]) -> dict[str, list[str]]:
    """The reasons why hosts are unhealthy, by host; healthy ones are not in it."""
    found: dict[str, list[str]] = {facts["host"]: list(facts["errors"]) for facts in hosts}

    def note(facts: Facts, text: str) -> None:
        found[facts["host"]].append(text)

    for name in ("code", "config", "data", "torch", "driver", "nccl", "gpu", "gpus", "ranks"):
        usual = Counter(facts[name] for facts in hosts if name in facts).most_common(1)
        for facts in hosts:
            if name in facts and facts[name] != usual[0][0]:
                note(facts, f"different {name}: {facts[name]}, other hosts have {usual[0][0]}")
    speeds = [facts["gmacs"] for facts in hosts if "gpu" in facts]
    for facts in hosts:
        if "gpu" in facts and facts["gmacs"] < _MIN_SPEED * median(speeds):
            note(facts, f"slow GPU: {facts['gmacs']:,.0f} GMAC/s, the median is {median(speeds):,.0f}")
    for facts in hosts:
        for name in ("run", "cache"):
            if facts.get(f"{name}_write_rate", _MIN_DISK_RATE) < _MIN_DISK_RATE:
                note(facts, f"slow disk: {name} folder writes {show_rate(facts[f'{name}_write_rate'])}")
            if facts.get(f"{name}_free", _MIN_FREE) < _MIN_FREE:
                note(facts, f"disk almost full: {name} folder has {decimal(facts[f'{name}_free'])} free")
        if not facts.get("run_shared", True):
            note(
                facts, f"run.dir is not shared: a file that {hosts[0]['host']} writes to the run's folder is not there"
            )
        if abs(facts["clock_s"]) > _MAX_CLOCK_SKEW_S:
            note(facts, f"clock is {facts['clock_s']:+.1f} s off")
        if facts.get("link_rate", _MIN_LINK_RATE) < _MIN_LINK_RATE:
            note(facts, f"slow network: {show_rate(facts['link_rate'])}")
        if facts.get("gpu_used", 0.0) > _MAX_GPU_USED:
            note(facts, f"other processes use {facts['gpu_used']:.0%} of a GPU's memory")
    return {host: reasons for host, reasons in found.items() if reasons}


def tabulate(hosts: Sequence[Facts]) -> Table:
    """A row per host."""
    table = Table(title="hosts")
    columns: dict[str, Callable[[Facts], str]] = {
        "host": lambda facts: facts["host"],
        "ranks": lambda facts: str(facts["ranks"]),
        "GPU": lambda facts: f"{facts['gpus']} {facts['gpu']}" if "gpu" in facts else "none",
        "GMAC/s": lambda facts: f"{facts['gmacs']:,.0f}",
        "link": lambda facts: show_rate(facts["link_rate"]) if "link_rate" in facts else "",
        "all-reduce": lambda facts: show_rate(facts["all_reduce_rate"]),
        "clock s": lambda facts: f"{facts['clock_s']:+.3f}",
        "run free, write": lambda facts: show_disk(facts, "run"),
        "cache free, write": lambda facts: show_disk(facts, "cache"),
        "code": lambda facts: facts.get("code", "")[:7],
    }
    for name in columns:
        table.add_column(name, justify="left" if name in ("host", "GPU", "code") else "right")
    for facts in hosts:
        table.add_row(*(show(facts) for show in columns.values()))
    return table


def show_rate(rate: float) -> str:
    """1500000 becomes 1.5 MB/s."""
    return f"{decimal(round(rate))}/s"


def show_disk(facts: Facts, name: str) -> str:
    if f"{name}_write_rate" not in facts:
        return "?"
    return f"{decimal(facts[f'{name}_free'])}, {show_rate(facts[f'{name}_write_rate'])}"


def main() -> int:
    """Check the hosts as one of the ranks of a job. Returns 0 if all are healthy, 78 otherwise."""
    parser = AnyOrder(prog="python -m launch.doctor")
    add_run_arguments(parser)
    args = parser.parse_args()
    settings = config.load(args.config, args.overrides)
    with Group(patience=_PATIENCE_S) as group:
        hosts = collect_facts(settings, group)
        unhealthy = find_unhealthy(hosts)
        if group.is_main:
            Console(width=None if sys.stdout.isatty() else 140).print(tabulate(hosts))
            for host, reasons in unhealthy.items():
                for reason in reasons:
                    print(f"unhealthy: {host}: {reason}", flush=True)
            if not unhealthy:
                print(f"all {len(hosts)} hosts are healthy", flush=True)
        group.barrier()
    return EXIT_USER if unhealthy else EXIT_DONE
