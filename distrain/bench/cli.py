"""`python -m distrain bench`: how fast we are, next to peers and limits on the same machine."""

import argparse
import json
import os
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from distrain.arguments import AnyOrder, check_writable
from distrain.bench import checkpoint, step_cli
from distrain.bench.loader import DALI, DECODE, WEBDATASET, bench_loaders
from distrain.bench.rounds import ratio
from distrain.config import DataConfig
from distrain.data.storage.index_file import load_index
from distrain.errors import EXIT_DONE, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure ours against peers and limits, alternating in one run. Ratios carry over to other machines of "
        "the kind; absolute rates hold for this one at this hour."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=AnyOrder)
    loader = commands.add_parser(
        "loader",
        help="images per second of the loaders on your shards",
        description="Decode, crop and resize images of an index with each loader, webdataset with a DataLoader, "
        "DALI's own reader and, as the limit, decoding alone.",
    )
    loader.add_argument("index", help="an index of local shards, a .parquet file")
    loader.add_argument("--images", type=int, default=1000, help="in each round (default 1000)")
    loader.add_argument("--rounds", type=int, default=5, help="in which all take turns (default 5)")
    loader.add_argument("--batch", type=int, default=32, help="images in a batch (default 32)")
    loader.add_argument("--size", type=int, default=224, help="side of the images they make, pixels (default 224)")
    loader.add_argument("--threads", type=int, default=os.cpu_count(), help="of each (default: all cores)")
    loader.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    loader.set_defaults(run=_loader)
    step_cli.configure(commands)
    checkpoint.configure(commands)


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
    rates, parts = bench_loaders(load_index(args.index), data, args.images, args.batch, args.rounds, device)

    table = Table(title=f"{args.threads} threads or processes, {args.rounds} rounds of {args.images} images")
    for heading in ("", "images/s, median (range)", f"of {DECODE}", f"of {WEBDATASET}"):
        table.add_column(heading, justify="right" if heading else "left")
    for rate in rates:
        spread = f"{rate.median:,.0f} ({min(rate.rounds):,.0f}-{max(rate.rounds):,.0f})"
        ratios = (f"{ratio(rates, rate.name, to):.2f}" for to in (DECODE, WEBDATASET))
        table.add_row(rate.name, spread, *ratios)
    console = Console()
    console.print(table)
    console.print(
        "microseconds of one thread per image: " + ", ".join(f"{name} {time:.0f}" for name, time in parts.items())
    )
    if DALI not in {rate.name for rate in rates}:
        console.print(f"without {DALI}: it cannot pass over images that cannot be read, which there are")
    if args.json:
        figures = {"rounds": {rate.name: rate.rounds for rate in rates}, "microseconds": parts}
        args.json.write_text(json.dumps(figures, indent=1))
    return EXIT_DONE
