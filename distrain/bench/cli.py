"""`python -m distrain bench`: benchmarks against other libraries and upper bounds on the same machine."""

import argparse
import json
import os
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from distrain.arguments import AnyOrder, check_writable
from distrain.bench import checkpoint, models, step_cli
from distrain.bench.gpu import cli as gpu
from distrain.bench.loader import DALI, DECODE, WEBDATASET, bench_loaders
from distrain.bench.rounds import ratio
from distrain.config import DataConfig
from distrain.data.storage.index_file import load_index
from distrain.errors import EXIT_DONE, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands loader, step, models, checkpoint and gpu."""
    parser.description = (
        "Compare distrain with other libraries and upper bounds, interleaved in one run. Ratios are reproducible on "
        "similar machines; absolute rates depend on the machine and its load."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=AnyOrder)
    loader = commands.add_parser(
        "loader",
        help="measure images per second of data loaders on your shards",
        description="Decode, crop and resize images of an index with each loader, with webdataset and a "
        "DataLoader, with DALI's WebDataset reader and, as an upper bound, by decoding only.",
    )
    loader.add_argument("index", help="index of local shards, a .parquet file")
    loader.add_argument("--images", type=int, default=1000, help="images per round (default 1000)")
    loader.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    loader.add_argument("--batch", type=int, default=32, help="batch size (default 32)")
    loader.add_argument("--size", type=int, default=224, help="output image size, pixels (default 224)")
    loader.add_argument("--threads", type=int, default=os.cpu_count(), help="threads per loader (default: all cores)")
    loader.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    loader.set_defaults(run=_loader)
    step_cli.add_command(commands)
    models.describe(commands.add_parser("models", help="compare networks with torchvision's and timm's"))
    checkpoint.add_command(commands)
    gpu.add_command(commands)


def _loader(args: argparse.Namespace) -> int:
    for name in ("images", "rounds", "batch", "size", "threads"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if args.json:
        check_writable(args.json)
    torch.set_num_threads(1)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    data = DataConfig(
        train=args.index, val=args.index, image_size=args.size, val_resize=args.size, threads=args.threads
    )
    rates, stages = bench_loaders(load_index(args.index), data, args.images, args.batch, args.rounds, device)

    table = Table(title=f"{args.threads} threads or workers, {args.rounds} rounds of {args.images} images")
    for heading in ("", "images/s, median (range)", f"vs {DECODE}", f"vs {WEBDATASET}"):
        table.add_column(heading, justify="right" if heading else "left")
    for rate in rates:
        spread = f"{rate.median:,.0f} ({min(rate.rounds):,.0f}-{max(rate.rounds):,.0f})"
        ratios = (f"{ratio(rates, rate.name, baseline):.2f}" for baseline in (DECODE, WEBDATASET))
        table.add_row(rate.name, spread, *ratios)
    console = Console()
    console.print(table)
    console.print(
        "single-thread microseconds per image: " + ", ".join(f"{name} {time:.0f}" for name, time in stages.items())
    )
    if DALI not in {rate.name for rate in rates}:
        console.print(f"{DALI} is not measured: it cannot skip unreadable images, and the index has some")
    if args.json:
        results = {"rounds": {rate.name: rate.rounds for rate in rates}, "microseconds": stages}
        args.json.write_text(json.dumps(results, indent=1))
    return EXIT_DONE
