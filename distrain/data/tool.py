"""`python -m distrain shards`: getting data into the form that training reads."""

import argparse
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from distrain.data import cifar10, index
from distrain.data.scan import scan
from distrain.errors import EXIT_DONE

_SHARD_SAMPLES = 5_000


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Make, fetch and index shards: plain WebDataset tars plus one Parquet index per split."
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    fetch = commands.add_parser(
        "fetch",
        help="download a public data set as shards",
        description="Download a public data set and write DIR/train.parquet, DIR/val.parquet and their shards. "
        "What is already there is kept.",
    )
    fetch.add_argument("dataset", choices=["cifar10"], help="60,000 photographs of 32 x 32 pixels in 10 classes")
    fetch.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for shards and index")
    fetch.set_defaults(run=_fetch)

    indexed = commands.add_parser(
        "index",
        help="index shards you already have",
        description="Read WebDataset shards (NAME.jpg or .png beside NAME.cls, an integer) and write their index.",
    )
    indexed.add_argument("shards", nargs="+", type=Path, help="tar files, all in the index's folder or below it")
    indexed.add_argument("--out", type=Path, required=True, metavar="FILE", help="index to write, a .parquet file")
    indexed.add_argument(
        "--classes", type=Path, required=True, metavar="FILE", help="text file with one class name per line"
    )
    indexed.set_defaults(run=_index)


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
        shards = _write_shards(out, split, images.pixels[part], images.labels[part])
        index.save(scan(str(out), shards, cifar10.CLASSES), out / f"{split}.parquet")
        console.print(f"{out / split}.parquet: {part.stop - part.start:,} images in {len(shards)} shards")


def _fetch(args: argparse.Namespace) -> int:
    fetch_cifar10(args.out)
    return EXIT_DONE


def _index(args: argparse.Namespace) -> int:
    out: Path = args.out
    root = out.parent
    classes = args.classes.read_text().split("\n")
    shards = sorted(str(shard.resolve().relative_to(root.resolve())) for shard in args.shards)
    built = scan(str(root), shards, [name for name in classes if name.strip()])
    index.save(built, out)
    print(f"{out}: {len(built):,} images, {len(built.classes)} classes, {len(shards)} shards")
    return EXIT_DONE


def _write_shards(out: Path, split: str, pixels: NDArray[np.uint8], labels: NDArray[np.uint8]) -> list[str]:
    """Write images as PNG; equal input gives equal bytes."""
    from PIL import Image
    from webdataset import TarWriter

    names = []
    for start in track(range(0, len(pixels), _SHARD_SAMPLES), description=f"writing {split}"):
        name = f"{split}-{start // _SHARD_SAMPLES:06d}.tar"
        draft = out / (name + ".tmp")
        with TarWriter(str(draft), mtime=0, user="", group="") as writer:
            for number in range(start, min(start + _SHARD_SAMPLES, len(pixels))):
                png = BytesIO()
                Image.fromarray(pixels[number]).save(png, "PNG")
                writer.write({"__key__": f"{number:06d}", "png": png.getvalue(), "cls": int(labels[number])})
        draft.replace(out / name)
        names.append(name)
    return names
