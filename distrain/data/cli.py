"""`python -m distrain shards`: getting data into the form that training reads, and looking at it."""

import argparse
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from distrain.data.index import Index
from distrain.data.sampling.simulate import Simulation, simulate
from distrain.data.shards import cifar10
from distrain.data.shards.build import build
from distrain.data.shards.preview import describe, draw_sheet, human_bytes
from distrain.data.shards.scan import expand, name_below, scan
from distrain.data.shards.sources import DEVKIT, find
from distrain.data.shards.verify import verify
from distrain.data.storage.index_file import load_index, save_index
from distrain.data.storage.sequential import error_reason
from distrain.errors import EXIT_DONE, EXIT_USER, UserError

MEGABYTE = 1_000_000
_LISTED = 10  # unreadable images named on the console; the file beside the index names all
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

_BUILD = f"""\
Write DIR/SPLIT-000000.tar, -000001.tar, ... and then their index DIR/SPLIT.parquet. SOURCE is one of

  a folder    with a sub-folder of images per class; classes are the folders' names, sorted
  a .csv      with the header `path,label` and a line per image; paths are relative to the file,
              labels are numbers, or names that are numbered in sorted order
  ILSVRC2012  the folder that holds ImageNet's ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and
              {DEVKIT} as they were downloaded (or one of the .tar files);
              nothing is unpacked, classes are the 1,000 synsets, sorted

Files are stored as they are, JPEG, PNG or WebP, in a shuffled order. Those that cannot be decoded are
kept out and listed in DIR/SPLIT.unreadable.txt. The same source gives the same bytes whatever --workers.
A build that was stopped goes on where it was when the same command is given again."""

_INDEX = """\
Read WebDataset shards that somebody else wrote, once, and write their index. A sample is an image, NAME.jpg,
.jpeg, .png or .webp, and its label: a number (or with --classes a name) in NAME.cls or in NAME.json.
SHARDS are paths or URLs (http, https, s3 and what else fsspec knows), with patterns if you like:

  python -m distrain shards index 's3://bucket/train-{000000..000146}.tar' --out train.parquet
  python -m distrain shards index 'DIR/train-*.tar' --classes classes.txt --out DIR/train.parquet

Shards in the index's folder or below it may move together with the index; others are named by their whole
path or URL. An image that cannot be decoded is indexed all the same, and training passes over it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make, fetch, index and look at shards: plain WebDataset tars plus one Parquet index per split."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run: object, summary: str, description: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(
            name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.set_defaults(run=run)
        return command

    def add_workers(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--workers", type=_positive, default=_CORES, metavar="N", help="threads (default: all cores, %(default)s)"
        )

    fetch = add(
        "fetch",
        _fetch,
        "download a public data set as shards",
        "Download a public data set and write DIR/train.parquet, DIR/val.parquet and their shards.\n"
        "What is already there is kept.",
    )
    fetch.add_argument("dataset", choices=["cifar10"], help="60,000 photographs of 32 x 32 pixels in 10 classes")
    fetch.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for shards and index")

    made = add("build", _build, "make shards from images: a folder, a list, or ImageNet's own tars", _BUILD)
    made.add_argument("source", type=Path, metavar="SOURCE", help="what to build from, see above")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for shards and index")
    made.add_argument("--split", choices=["train", "val"], default="train", help="name of the split (default: train)")
    made.add_argument(
        "--shard-mb", type=_positive, default=256, metavar="MB", help="size to aim at (default: %(default)s)"
    )
    made.add_argument(
        "--shuffle-seed", type=_natural, default=0, metavar="N", help="another order of the images (default: 0)"
    )
    made.add_argument(
        "--classes", type=Path, metavar="FILE", help="class names, one per line in the order of their labels"
    )
    made.add_argument("--devkit", type=Path, metavar="FILE", help=f"{DEVKIT}, unless it lies beside the tars")
    add_workers(made)

    indexed = add("index", _index, "index shards you already have, here or behind a URL", _INDEX)
    indexed.add_argument("shards", nargs="+", metavar="SHARDS", help="tar files: paths, URLs or patterns of them")
    indexed.add_argument("--out", type=Path, required=True, metavar="FILE", help="index to write, a .parquet file")
    indexed.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="class names, one per line in the order of their labels (default: the numbers that occur)",
    )
    indexed.add_argument(
        "--label-key", metavar="KEY", help="field of .json that holds the label (default: .cls, else label or cls)"
    )
    add_workers(indexed)

    verified = add(
        "verify",
        _verify,
        "read all shards again and compare them with their index",
        "Compare sizes and checksums of shards and samples with the index. Prints a line per problem;\n"
        "exits 0 if there is none, 78 otherwise.",
    )
    verified.add_argument("index", metavar="INDEX", help="a .parquet file, path or URL")
    verified.add_argument("--decode", action="store_true", help="also decode every image")
    add_workers(verified)

    shown = add(
        "show",
        _show,
        "what an index holds, and what the network will see of it",
        "Print counts, image sizes, classes and shards. With --sheet also draw the first samples of training,\n"
        "cropped and changed as the configuration says, with the names of their classes.",
    )
    shown.add_argument("index", metavar="INDEX", help="a .parquet file, path or URL")
    shown.add_argument("--sheet", type=Path, metavar="FILE", help="PNG to draw")
    shown.add_argument("--samples", type=_positive, default=24, metavar="N", help="images on it (default: %(default)s)")
    shown.add_argument("--config", metavar="FILE", help="configuration of the run (default: the defaults)")

    simulated = add(
        "simulate",
        _simulate,
        "what a cluster of any size would do with this data",
        "Follow one epoch on NODES x GPUS ranks of one lane each, under both shuffles, without a cluster.",
    )
    simulated.add_argument("index", metavar="INDEX", help="a .parquet file, path or URL")
    simulated.add_argument("--nodes", type=_positive, default=4, metavar="N", help="(default: %(default)s)")
    simulated.add_argument("--gpus", type=_positive, default=8, metavar="N", help="per node (default: %(default)s)")
    simulated.add_argument("--per-lane", type=_positive, default=32, metavar="N", help="(default: %(default)s)")
    simulated.add_argument("--window-shards", type=_positive, default=10, metavar="N", help="(default: %(default)s)")


def fetch_cifar10(out: Path) -> None:
    """Make `out` hold all of CIFAR-10 as shards with their indexes. Raises UserError if no source answers."""
    console = Console(soft_wrap=True)
    splits = {"train": slice(0, 50_000), "val": slice(50_000, 60_000)}
    if all((out / f"{split}.parquet").exists() for split in splits):
        console.print(f"{out}: CIFAR-10 is already there")
        return
    images = cifar10.download(report=console.print)
    out.mkdir(parents=True, exist_ok=True)
    for split, part in splits.items():
        shards = cifar10.write(out, split, cifar10.Images(images.pixels[part], images.labels[part]))
        save_index(scan(str(out), shards, cifar10.CLASSES), out / f"{split}.parquet")
        console.print(f"{out / split}.parquet: {part.stop - part.start:,} images in {len(shards)} shards")


def _fetch(args: argparse.Namespace) -> int:
    fetch_cifar10(args.out)
    return EXIT_DONE


def _build(args: argparse.Namespace) -> int:
    out: Path = args.out
    with _progress() as progress:
        listing = progress.add_task("listing", total=None)
        sources = find(args.source, args.split, _read_classes(args.classes), args.devkit)
        progress.update(listing, visible=False)
        building = progress.add_task(f"building {args.split}", total=len(sources))
        built = build(
            sources,
            out,
            args.split,
            shard_bytes=args.shard_mb * MEGABYTE,
            seed=args.shuffle_seed,
            workers=args.workers,
            done=lambda images: progress.advance(building, images),
        )
    kept = f" ({built.reused} were there)" if built.reused else ""
    print(f"{_summary(out / f'{args.split}.parquet', built.whole)}{kept}")
    if built.unreadable:
        print(f"{len(built.unreadable):,} images could not be read and are kept out: {out}/{args.split}.unreadable.txt")
        for name, reason in built.unreadable[:_LISTED]:
            print(f"  {name}: {reason}")
    return EXIT_DONE


def _index(args: argparse.Namespace) -> int:
    out: Path = args.out
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder to write the index to")
    root = str(out.parent)
    shards = [name_below(shard, out.parent) for shard in expand(args.shards)]
    if twice := [shard for shard, times in Counter(shards).items() if times > 1]:
        raise UserError(f"{twice[0]}: given more than once")
    with _progress() as progress:
        task = progress.add_task("reading shards", total=len(shards))
        built = scan(
            root,
            shards,
            _read_classes(args.classes),
            label_key=args.label_key,
            workers=args.workers,
            done=lambda shard: progress.advance(task),
        )
    try:
        save_index(built, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error_reason(error)}") from error
    print(_summary(out, built))
    if unreadable := int((built.width == 0).sum()):
        print(f"{unreadable:,} of the images cannot be decoded; training will pass over them")
    return EXIT_DONE


def _verify(args: argparse.Namespace) -> int:
    loaded = load_index(args.index)
    count = 0
    with _progress() as progress:
        task = progress.add_task("verifying", total=len(loaded))
        problems = verify(
            loaded,
            decode=args.decode,
            workers=args.workers,
            done=lambda samples: progress.advance(task, samples),
        )
        for problem in problems:
            print(problem, flush=True)
            count += 1
    if count:
        print(f"{args.index}: {count:,} problems")
        return EXIT_USER
    print(f"{args.index}: all {len(loaded):,} images in {len(loaded.shards):,} shards are as they were indexed")
    return EXIT_DONE


def _show(args: argparse.Namespace) -> int:
    loaded = load_index(args.index)
    print("\n".join(describe(loaded)))
    if args.sheet:
        draw_sheet(args.index, loaded, args.sheet, args.config, args.samples)
        print(f"\n{args.sheet}: {min(args.samples, len(loaded))} samples as training sees them")
    return EXIT_DONE


def _simulate(args: argparse.Namespace) -> int:
    loaded = load_index(args.index)
    window, mixed = (
        simulate(loaded, shuffle, args.nodes, args.gpus, args.per_lane, args.window_shards)
        for shuffle in ("window", "global")
    )
    what = f"{len(loaded):,} images in {len(loaded.shards):,} shards"
    table = Table(title=f"one epoch of {what} on {args.nodes} x {args.gpus} ranks")
    table.add_column("")
    for shuffle in ("window", "global"):
        table.add_column(f"shuffle={shuffle}", justify="right")
    rows: list[tuple[str, Callable[[Simulation], str]]] = [
        ("steps", lambda s: f"{s.steps:,}"),
        ("each rank plans it in", lambda s: f"{s.plan_seconds:.2f} s, {human_bytes(s.plan_bytes)}"),
        ("shards a node reads", lambda s: f"{s.node_shards:,}"),
        ("downloaded / used", lambda s: f"{s.node_share:.2f}"),
        ("cache for no second download", lambda s: human_bytes(s.cache_bytes)),
        ("pairs in a batch from one shard", lambda s: f"{s.same_shard:.3%}"),
    ]
    for name, show in rows:
        table.add_row(name, show(window), show(mixed))
    Console().print(table)
    return EXIT_DONE


def _read_classes(file: Path | None) -> list[str] | None:
    if file is None:
        return None
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error_reason(error)}") from error
    if not names:
        raise UserError(f"{file}: names no classes; write one per line")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{file}: class {twice[0]} is there more than once")
    return names


def _summary(path: Path, built: Index) -> str:
    size = human_bytes(sum(shard.size for shard in built.shards))
    return f"{path}: {len(built):,} images, {len(built.classes):,} classes, {len(built.shards):,} shards, {size}"


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal, on standard error so that what is printed can be kept; silent where there is none."""
    warnings.filterwarnings("ignore", module="PIL")  # what is odd about a file that decodes is no news here
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, redirect_stdout=True) as progress:
        yield progress


def _positive(text: str) -> int:
    return _at_least(1, text)


def _natural(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)
