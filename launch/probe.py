"""What a job has to rely on, measured on all its hosts at once: `python -m launch doctor`, and before a job starts.

Runs as the ranks of a job do, with the same arguments, instead of training.
"""

import hashlib
import os
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from distrain import config
from distrain.config import Config
from distrain.data.loading.setup import load_indexes
from distrain.data.storage.remote import cache_folder
from distrain.errors import EXIT_DONE, EXIT_USER, UserError
from distrain.parallel.group import Group
from launch.node import NAME

_WRITTEN = 64 << 20  # bytes
_LEAST_FREE_GB = 1.0
_LARGEST_SKEW_S = 0.5
_LEAST_LINK_GBPS = 0.05  # 10^9 bytes per second, less than half of gigabit Ethernet
_LEAST_DISK_GBPS = 0.01
_SLOW = 0.5  # share of the median speed of all hosts' GPUs

Facts = dict[str, Any]


def examine(settings: Config, group: Group) -> list[Facts]:
    """The facts of every host, on every rank: its own, and how it reaches the others."""
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    ranks = gather(group, (os.environ.get("GROUP_RANK", "0"), local_rank, measure_processor(group.device)))
    mine = examine_host(settings) if local_rank == 0 else {}
    hosts = [facts for facts in gather(group, mine) if facts]
    leaders = list(range(0, group.world, local_world))
    for number, facts in enumerate(hosts):
        speeds = [speed for node, _, speed in ranks if int(node) == number]
        facts["gflops"] = min(speeds)
        facts["ranks"] = len(speeds)
    measure_clocks(group, hosts, leaders)
    measure_links(group, hosts, leaders)
    all_reduce = measure_all_reduce(group)
    for facts in hosts:
        facts["all_reduce_gbps"] = all_reduce
    return hosts


def gather(group: Group, value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    found: list[Any] = [None] * group.world
    dist.all_gather_object(found, value, group=group.control)
    return found


def examine_host(settings: Config) -> Facts:
    """What one host knows of itself. What it cannot do is said in `errors`."""
    facts: Facts = {"host": os.environ.get(NAME, socket.gethostname()), "errors": []}

    def attempt(name: str, find: Callable[[], Any]) -> None:
        try:
            facts[name] = find()
        except (OSError, UserError) as error:
            facts["errors"].append(f"{name}: {error}")

    attempt("code", digest_code)
    attempt("config", lambda: hashlib.sha256(config.to_yaml(settings).encode()).hexdigest()[:12])
    attempt("data", lambda: " ".join(index.digest[:12] for index in load_indexes(settings)))
    folders = {"run": settings.run.folder, "cache": cache_folder(settings.download)}
    for name, folder in folders.items():
        attempt(f"{name}_free_gb", partial(free_gb, folder))
        attempt(f"{name}_write_gbps", partial(measure_writing, folder))
    facts["torch"] = torch.__version__
    if torch.cuda.is_available():
        facts["gpus"] = torch.cuda.device_count()
        facts["gpu"] = torch.cuda.get_device_name()
        attempt("driver", lambda: Path("/sys/module/nvidia/version").read_text().strip())
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        free = [torch.cuda.mem_get_info(device) for device in range(facts["gpus"])]
        facts["gpu_used"] = max(1 - left / whole for left, whole in free)
    return facts


def digest_code() -> str:
    """Of the Python files of this checkout."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted([*(root / "distrain").rglob("*.py"), *(root / "launch").glob("*.py")]):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def free_gb(folder: Path) -> float:
    folder.mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(folder).free / 1e9


def measure_writing(folder: Path) -> float:
    """10^9 bytes per second, down to the disk."""
    with tempfile.TemporaryFile(dir=folder) as file:
        data = os.urandom(1 << 20) * (_WRITTEN >> 20)
        began = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return _WRITTEN / (time.perf_counter() - began) / 1e9


def measure_processor(device: torch.device) -> float:
    """10^9 multiply-adds per second of a matrix product."""
    on_gpu = device.type == "cuda"
    side = 4096 if on_gpu else 384
    matrix = torch.ones(side, side, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        matrix @ matrix
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return side**3 / best / 1e9


def measure_clocks(group: Group, hosts: Sequence[Facts], leaders: Sequence[int]) -> None:
    """Add to each host how far its clock is ahead of the first one's, seconds."""
    skews = {0: 0.0}
    for number, leader in enumerate(leaders[1:], start=1):
        best = float("inf")
        for _ in range(5):
            moment = torch.zeros(1, dtype=torch.float64)
            if group.rank == 0:
                asked = time.time()
                dist.send(moment, leader, group=group.control)
                dist.recv(moment, leader, group=group.control)
                answered = time.time()
                if answered - asked < best:
                    best = answered - asked
                    skews[number] = moment.item() - (asked + answered) / 2
            elif group.rank == leader:
                dist.recv(moment, 0, group=group.control)
                moment.fill_(time.time())
                dist.send(moment, 0, group=group.control)
    for number, skew in group.broadcast(skews).items():
        hosts[number]["clock_s"] = skew


def measure_links(group: Group, hosts: Sequence[Facts], leaders: Sequence[int]) -> None:
    """Add to each host the speed of its better link to the two hosts beside it, 10^9 bytes per second.

    Of its better one, because a slow host spoils both of its own and only one of its neighbour's.
    """
    count = len(leaders)
    pairs = [(number, (number + 1) % count) for number in range(count if count > 2 else count - 1)]
    speeds: dict[int, float] = {}
    for one, other in pairs:
        speed = group.max(exchange(group, leaders[one], leaders[other]))
        for number in (one, other):
            speeds[number] = max(speed, speeds.get(number, 0.0))
    for number, speed in speeds.items():
        hosts[number]["link_gbps"] = speed


def exchange(group: Group, one: int, other: int) -> float:
    """Send something from one rank to another and back; 10^9 bytes per second, 0 on all other ranks."""
    if group.rank not in (one, other):
        return 0.0
    peer = other if group.rank == one else one
    speed = 0.0
    for size in (1 << 18, 1 << 24):
        data = torch.empty(size, dtype=torch.uint8)
        began = time.perf_counter()
        for sender in (one, other):
            (dist.send if group.rank == sender else dist.recv)(data, peer, group=group.control)
        seconds = time.perf_counter() - began
        speed = 2 * size / seconds / 1e9
        slow = torch.tensor(float(seconds > 0.1))
        (dist.send if group.rank == one else dist.recv)(slow, peer, group=group.control)
        if slow:  # a slow link needs no more to be known
            break
    return speed


def measure_all_reduce(group: Group) -> float:
    """10^9 bytes per second over each rank's link, in a ring of all of them."""
    if group.world == 1:
        return 0.0
    data = torch.zeros(1 << 26 if group.device.type == "cuda" else 1 << 20, device=group.device)
    best = float("inf")
    for _ in range(3):
        group.barrier()
        began = time.perf_counter()
        dist.all_reduce(data)
        if group.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * (group.world - 1) / group.world * data.nbytes / best / 1e9


def judge(hosts: Sequence[Facts]) -> dict[str, list[str]]:
    """For each unfit host why it is."""
    found: dict[str, list[str]] = {facts["host"]: list(facts["errors"]) for facts in hosts}

    def note(facts: Facts, text: str) -> None:
        found[facts["host"]].append(text)

    for name in ("code", "config", "data", "torch", "driver", "nccl", "gpu", "gpus", "ranks"):
        usual = Counter(facts[name] for facts in hosts if name in facts).most_common(1)
        for facts in hosts:
            if name in facts and facts[name] != usual[0][0]:
                note(facts, f"other {name}: {facts[name]}, and elsewhere {usual[0][0]}")
    speeds = [facts["gflops"] for facts in hosts if "gpu" in facts]
    for facts in hosts:
        if "gpu" in facts and facts["gflops"] < _SLOW * median(speeds):
            note(facts, f"slow GPU, {facts['gflops']:,.0f} Gmul/s, and elsewhere {median(speeds):,.0f}")
    for facts in hosts:
        for name in ("run", "cache"):
            if facts.get(f"{name}_write_gbps", _LEAST_DISK_GBPS) < _LEAST_DISK_GBPS:
                note(facts, f"slow disk, {name} folder takes {1000 * facts[f'{name}_write_gbps']:.3g} MB/s")
            if facts.get(f"{name}_free_gb", _LEAST_FREE_GB) < _LEAST_FREE_GB:
                note(facts, f"{name} folder has {facts[f'{name}_free_gb']:.2f} GB left")
        if abs(facts["clock_s"]) > _LARGEST_SKEW_S:
            note(facts, f"clock is {facts['clock_s']:+.1f} s off")
        if facts.get("link_gbps", _LEAST_LINK_GBPS) < _LEAST_LINK_GBPS:
            note(facts, f"slow network, {1000 * facts['link_gbps']:.3g} MB/s")
        if facts.get("gpu_used", 0.0) > 0.1:
            note(facts, f"{facts['gpu_used']:.0%} of a GPU's memory is taken by others")
    return {host: reasons for host, reasons in found.items() if reasons}


def tabulate(hosts: Sequence[Facts]) -> Table:
    """A row per host."""
    table = Table(title="hosts")
    columns: dict[str, Callable[[Facts], str]] = {
        "host": lambda facts: facts["host"],
        "ranks": lambda facts: str(facts["ranks"]),
        "GPU": lambda facts: f"{facts['gpus']} {facts['gpu']}" if "gpu" in facts else "none",
        "Gmul/s": lambda facts: f"{facts['gflops']:,.0f}",
        "link GB/s": lambda facts: f"{facts['link_gbps']:.2f}" if "link_gbps" in facts else "",
        "all-reduce GB/s": lambda facts: f"{facts['all_reduce_gbps']:.2f}",
        "clock s": lambda facts: f"{facts['clock_s']:+.3f}",
        "run GB free, GB/s": lambda facts: disk(facts, "run"),
        "cache GB free, GB/s": lambda facts: disk(facts, "cache"),
        "code": lambda facts: facts.get("code", "")[:7],
    }
    for name in columns:
        table.add_column(name, justify="left" if name in ("host", "GPU", "code") else "right")
    for facts in hosts:
        table.add_row(*(show(facts) for show in columns.values()))
    return table


def disk(facts: Facts, name: str) -> str:
    if f"{name}_write_gbps" not in facts:
        return "?"
    return f"{facts[f'{name}_free_gb']:,.0f}, {facts[f'{name}_write_gbps']:.2f}"


def main() -> int:
    path = sys.argv[sys.argv.index("--config") + 1] if "--config" in sys.argv else None
    settings = config.load(path, [word for word in sys.argv[1:] if "=" in word])
    with Group() as group:
        hosts = examine(settings, group)
        unfit = judge(hosts)
        if group.is_main:
            Console(width=None if sys.stdout.isatty() else 140).print(tabulate(hosts))
            for host, reasons in unfit.items():
                for reason in reasons:
                    print(f"unfit: {host}: {reason}", flush=True)
            if not unfit:
                print(f"all {len(hosts)} hosts are fit", flush=True)
        group.barrier()
    return EXIT_USER if unfit else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
