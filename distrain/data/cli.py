"""`python -m distrain shards`: build, index, verify and preview the data that training reads."""

import argparse
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress
from rich.table import Table

from distrain.arguments import fraction, natural, positive
from distrain.data.sampling.simulate import Simulation, simulate
from distrain.data.shards import cifar10
from distrain.data.shards.build import Built, build
from distrain.data.shards.holdout import hold_out
from distrain.data.shards.interrupts import stop_on_signals
from distrain.data.shards.labels import read_classes
from distrain.data.shards.patterns import expand, name_below
from distrain.data.shards.preview import draw_sheet, summarize
from distrain.data.shards.report import info, print_contents, print_images, show_progress, summary, writing
from distrain.data.shards.scan import Notes, scan
from distrain.data.shards.source_images import SourceImages
from distrain.data.shards.sources import DEVKIT, find
from distrain.data.shards.verify import verify
from distrain.data.storage.index_file import has_secrets, load_index, save_index
from distrain.errors import EXIT_DONE, EXIT_USER, UserError, printable
from distrain.files import write_atomically
from distrain.masking import mask_secrets

MEGABYTE = 1_000_000
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_BUILD = f"""\
Write DIR/SPLIT-000000.tar, -000001.tar, ... and then their index DIR/SPLIT.parquet. SOURCE is one of

  a folder    with a sub-folder of images per class; classes are the folders' names, sorted; hidden files
              and folders are skipped
  a .csv      with the header `path,label` and a line per image; paths are relative to the file,
  or .tsv     labels are numbers if all of them are, else names, which are numbered in sorted order;
              with --multi-label any number of labels per image, separated by semicolons: dog;outdoor
  ILSVRC2012  the folder with ImageNet's ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and
              {DEVKIT} as downloaded (or one of the .tar files);
              nothing is unpacked, classes are the 1,000 synsets, sorted

Files are stored unchanged, JPEG, PNG or WebP, in a shuffled order. Files that cannot be decoded are
excluded and listed in DIR/SPLIT.unreadable.txt. The output does not depend on --workers.
To resume an interrupted build, run the same command again."""

_INDEX = """\
Index existing WebDataset shards, reading each once. A sample is an image, NAME.jpg, .jpeg, .png or .webp,
and its label: a number (or with --classes a name) in NAME.cls or in NAME.json.
SHARDS are paths or URLs (http, https, s3 and all others that fsspec supports), or patterns:

  python -m distrain shards index 's3://bucket/train-{000000..000146}.tar' --out train.parquet
  python -m distrain shards index 'DIR/train-*.tar' --classes classes.txt --out DIR/train.parquet

With --multi-label a sample has any number of labels: in .json a list in `label` or `labels`, in .cls a list
of names (dog;outdoor) or of numbers (3 17 or 3,17); an empty one says that the image has none.

Labels are names if all of them are class names of --classes, numbers if all are numbers; where they could be
both, --labels decides. Shards in or below the index's folder get relative names, so that all can be moved
together; others get absolute paths or URLs. An image that cannot be decoded is indexed too, and training skips
it. Images that are not indexed are listed in FILE with the ending .skipped.txt; one that belongs to no sample is
an error."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Build, download, index and inspect shards: plain WebDataset tars plus one Parquet index per split."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (_add_fetch, _add_build, _add_index, _add_verify, _add_show, _add_simulate):
        add(commands)


def _add_fetch(commands: _Commands) -> None:
    command = _add_command(
        commands,
        "fetch",
        _fetch,
        "download a public data set as shards",
        "Download a public data set and write DIR/train.parquet, DIR/val.parquet and their shards.\n"
        "A data set that is already in DIR is not downloaded again.",
        "splits that are complete are kept; run the same command again",
    )
    command.add_argument("dataset", choices=["cifar10"], help="cifar10: 60,000 images of 32 x 32 pixels in 10 classes")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards and the index")


def _add_build(commands: _Commands) -> None:
    command = _add_command(
        commands, "build", _build, "build shards from a folder, a list, or ImageNet's original tars", _BUILD,
        "complete shards are kept; run the same command again to continue",
    )  # fmt: skip
    command.add_argument("source", type=Path, metavar="SOURCE", help="folder, .csv, .tsv or .tar to build from")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards and the index")
    command.add_argument(
        "--split", choices=["train", "val"], default="train", help="name of the split (default: train)"
    )
    command.add_argument(
        "--val-fraction", type=fraction, metavar="F", help="also make a val split, of this fraction of every class"
    )
    command.add_argument(
        "--shard-mb", type=positive, default=256, metavar="MB", help="target size of a shard (default: %(default)s)"
    )
    command.add_argument(
        "--shuffle-seed", type=natural, default=0, metavar="N", help="seed of the order of the images (default: 0)"
    )
    command.add_argument(
        "--classes", type=Path, metavar="FILE", help="class names, one per line in the order of their labels"
    )
    command.add_argument(
        "--devkit", type=Path, metavar="FILE", help=f"path of {DEVKIT} (default: in the folder of the tars)"
    )
    command.add_argument(
        "--folders-are-classes",
        action="store_true",
        help="every sub-folder is a class, also one called train, one folder around all others, and Cat next to cat",
    )
    _add_labels(command)
    _add_workers(command)


def _add_index(commands: _Commands) -> None:
    command = _add_command(
        commands, "index", _index, "index existing shards, local or remote", _INDEX,
        "no index was written, one that existed is kept; run the same command again",
    )  # fmt: skip
    command.add_argument("shards", nargs="+", metavar="SHARDS", help="tar files: paths, URLs or patterns")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="index to write, a .parquet file")
    command.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="class names, one per line in the order of their labels (default: 0 to the largest label)",
    )
    command.add_argument(
        "--label-key",
        metavar="KEY",
        help="field of .json that holds the label (default: .cls if there is one, else label or cls in .json)",
    )
    _add_labels(command)
    _add_workers(command)


def _add_verify(commands: _Commands) -> None:
    command = _add_command(
        commands,
        "verify",
        _verify,
        "read all shards again and compare them with their index",
        "Compare sizes and checksums of shards and samples with the index. Prints one line per problem;\n"
        "exits with 0 if there is none, else with 78.",
        "shards not mentioned above may not have been verified; run the same command again",
    )
    command.add_argument("index", metavar="INDEX", help="a .parquet file, path or URL")
    command.add_argument("--decode", action="store_true", help="also decode every image")
    _add_workers(command)


def _add_show(commands: _Commands) -> None:
    command = _add_command(
        commands,
        "show",
        _show,
        "summarize an index and draw samples as the network will see them",
        "Print counts, image sizes, classes and shards. With --sheet also draw the first samples of training,\n"
        "cropped and augmented as configured, with the names of their classes.",
        "no sheet was drawn; run the same command again",
    )
    command.add_argument("index", metavar="INDEX", help="a .parquet file, path or URL")
    command.add_argument("--sheet", type=Path, metavar="FILE", help="PNG to draw samples to")
    command.add_argument(
        "--samples", type=positive, default=24, metavar="N", help="samples on the sheet (default: %(default)s)"
    )
    command.add_argument("--config", metavar="FILE", help="configuration of the run (default: all defaults)")


def _add_simulate(commands: _Commands) -> None:
    command = _add_command(
        commands,
        "simulate",
        _simulate,
        "compute what a cluster of any size would download of this data",
        "Simulate one epoch on NODES x GPUS ranks of one lane each, under both kinds of shuffle, without a cluster.",
        "nothing was written; run the same command again",
    )
    command.add_argument("index", metavar="INDEX", help="a .parquet file, path or URL")
    for option, default, text in (
        ("--nodes", 4, "nodes of the cluster"),
        ("--gpus", 8, "GPUs per node"),
        ("--per-lane", 32, "samples per step in each lane"),
        ("--window-shards", 10, "size of the shuffle window in shards"),
    ):
        command.add_argument(option, type=positive, default=default, metavar="N", help=f"{text} (default: {default})")


def _add_command(
    commands: _Commands, name: str, run: Callable[[argparse.Namespace], int], summary: str, description: str, kept: str
) -> argparse.ArgumentParser:
    """`kept` is what an interrupted command leaves and how to continue."""

    def run_interruptibly(args: argparse.Namespace) -> int:
        with stop_on_signals(kept):
            return run(args)

    command = commands.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.set_defaults(run=run_interruptibly)
    return command


def _add_labels(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--labels",
        choices=["auto", "names", "numbers"],
        default="auto",
        help="whether labels are class names or numbers (default: found out; an error where both are possible)",
    )
    command.add_argument("--multi-label", action="store_true", help="an image has any number of labels, also none")


def _add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers", type=positive, default=_CORES, metavar="N", help="threads (default: all cores, %(default)s)"
    )


def fetch_cifar10(out: Path) -> None:
    """Write CIFAR-10 to `out` as shards with their indexes, unless it is there.

    Raises TemporaryError if no source works, UserError if the shards cannot be written.
    """
    console = Console(soft_wrap=True)
    splits = {"train": slice(0, 50_000), "val": slice(50_000, 60_000)}
    if all((out / f"{split}.parquet").exists() for split in splits):
        console.print(f"{out}: CIFAR-10 is already downloaded")
        return
    images = cifar10.download(info=console.print)
    for split, samples in splits.items():
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            shards = cifar10.write(out, split, cifar10.Images(images.pixels[samples], images.labels[samples]))
            save_index(scan(str(out), shards, cifar10.CLASSES), out / f"{split}.parquet")
        console.print(f"{out / split}.parquet: {samples.stop - samples.start:,} images in {len(shards)} shards")


def _fetch(args: argparse.Namespace) -> int:
    fetch_cifar10(args.out)
    return EXIT_DONE


def _build(args: argparse.Namespace) -> int:
    if args.val_fraction is not None and args.split != "train":
        raise UserError("--val-fraction makes both splits of SOURCE: leave out --split")
    with show_progress() as progress:
        listing = progress.add_task("listing", total=None)
        sources = find(
            args.source, args.split, args.classes and read_classes(args.classes), args.devkit,
            kind=args.labels, insist=args.folders_are_classes, multi_label=args.multi_label, info=info,
        )  # fmt: skip
        progress.update(listing, visible=False)
        splits = {args.split: sources}
        if args.val_fraction is not None:
            splits = dict(zip(("train", "val"), hold_out(sources, args.val_fraction), strict=True))
            if not len(splits["val"]):
                raise UserError(f"{args.source}: no class has two images, of which one could be held out")
        built = {split: _build_split(args, split, images, progress) for split, images in splits.items()}
    for split, found in built.items():
        reused = f" ({found.reused} reused)" if found.reused else ""
        print(f"{summary(args.out / f'{split}.parquet', found.index)}{reused}")
        print_images(
            found.unreadable, f"images could not be decoded and were excluded: {args.out}/{split}.unreadable.txt"
        )
        print_contents(found.index, found.modes)
    return EXIT_DONE


def _build_split(args: argparse.Namespace, split: str, sources: SourceImages, progress: Progress) -> Built:
    task = progress.add_task(f"building {split}", total=len(sources))
    return build(
        sources,
        args.out,
        split,
        shard_bytes=args.shard_mb * MEGABYTE,
        seed=args.shuffle_seed,
        workers=args.workers,
        done=lambda images: progress.advance(task, images),
    )


def _index(args: argparse.Namespace) -> int:
    out: Path = args.out
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: folder not found; create it or correct --out")
    root = str(out.parent)
    shards = [name_below(shard, out.parent) for shard in expand(args.shards)]
    if duplicates := [shard for shard, times in Counter(shards).items() if times > 1]:
        raise UserError(f"{duplicates[0]}: given more than once")
    notes, skipped = Notes(), out.with_suffix(".skipped.txt")
    with show_progress() as progress:
        task = progress.add_task("reading shards", total=len(shards))
        built = scan(
            root,
            shards,
            args.classes and read_classes(args.classes),
            label_key=args.label_key,
            kind=args.labels,
            multi_label=args.multi_label,
            workers=args.workers,
            done=lambda shard: progress.advance(task),
            notes=notes,
        )
    with writing(out):
        if notes.skipped:
            listed = "".join(f"{printable(name)}: {reason}\n" for name, reason in notes.skipped)
            write_atomically(skipped, mask_secrets(listed))
        else:
            skipped.unlink(missing_ok=True)
        save_index(built, out)
    print(summary(out, built))
    if has_secrets(built):
        print(f"{out}: holds the passwords or tokens of its URLs, so that only you can read it")
    print_images(notes.undecodable, "of the images cannot be decoded; training will skip them:")
    print_images(notes.skipped, f"images are not indexed: {skipped}")
    for shard in notes.empty:
        info(f"{shard}: has no samples")
    for first, other in notes.copies:
        info(f"{other}: has the same content as {first}, so its images count twice")
    print_contents(built, notes.modes)
    return EXIT_DONE


def _verify(args: argparse.Namespace) -> int:
    loaded = load_index(args.index)
    count = 0
    with show_progress() as progress:
        task = progress.add_task("verifying", total=len(loaded))
        problems = verify(
            loaded,
            decode=args.decode,
            workers=args.workers,
            done=lambda samples: progress.advance(task, samples),
        )
        for problem in problems:
            info(problem)
            count += 1
    if count:
        info(f"{args.index}: {count:,} problems")
        return EXIT_USER
    info(f"{args.index}: all {len(loaded):,} images in {len(loaded.shards):,} shards match the index")
    return EXIT_DONE


def _show(args: argparse.Namespace) -> int:
    loaded = load_index(args.index)
    print(mask_secrets("\n".join(summarize(loaded))))
    if args.sheet:
        draw_sheet(args.index, loaded, args.sheet, args.config, args.samples)
        print(f"\n{args.sheet}: {min(args.samples, len(loaded))} samples as the network sees them")
    return EXIT_DONE


def _simulate(args: argparse.Namespace) -> int:
    loaded = load_index(args.index)
    window, global_ = (
        simulate(loaded, shuffle, args.nodes, args.gpus, args.per_lane, args.window_shards)
        for shuffle in ("window", "global")
    )
    size = f"{len(loaded):,} images in {len(loaded.shards):,} shards"
    table = Table(title=f"one epoch of {size} on {args.nodes} x {args.gpus} ranks")
    table.add_column("")
    for shuffle in ("window", "global"):
        table.add_column(f"shuffle={shuffle}", justify="right")
    rows: list[tuple[str, Callable[[Simulation], str]]] = [
        ("steps", lambda s: f"{s.steps:,}"),
        ("planning time and memory per rank", lambda s: f"{s.plan_seconds:.2f} s, {decimal(s.plan_bytes)}"),
        ("shards read per node", lambda s: f"{s.node_shards:,}"),
        ("downloaded / used", lambda s: f"{s.node_share:.2f}"),
        ("cache size that avoids repeated downloads", lambda s: decimal(s.cache_bytes)),
        ("pairs in a batch from the same shard", lambda s: f"{s.same_shard:.3%}"),
    ]
    for name, show in rows:
        table.add_row(name, show(window), show(global_))
    Console().print(table)
    return EXIT_DONE
