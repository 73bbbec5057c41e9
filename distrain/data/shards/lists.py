"""A list of images and labels, a .csv or .tsv file, as a source of shards."""

import csv
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from distrain.data.shards.interrupts import Poll, map_threads
from distrain.data.shards.labels import Kind, read_column, read_sets
from distrain.data.shards.source_images import LISTING_THREADS, FoundImage, Info, SourceImages, collect, find_same_files
from distrain.data.storage.client import error_reason, explain
from distrain.errors import UserError

_Row = tuple[str, str, str]  # where it is, path, label


def read_csv(
    file: Path,
    classes: Sequence[str] | None,
    kind: Kind,
    info: Info = lambda line: None,
    multi_label: bool = False,
) -> SourceImages:
    """Read a list: a header with `path` and `label`, then a line per image; paths are relative to the file's folder.

    Columns are separated by commas, in a .tsv by tabs. Labels are numbers or names, by `kind`. Names are sorted unless
    `classes` defines their order. With `multi_label` the column, `label` or `labels`, lists any number of labels,
    separated by semicolons. `info` gets a line about what may not be as intended. Raises UserError naming the line.
    """
    rows = _read_rows(file, multi_label)
    texts = [(where, text) for where, _, text in rows]
    label, names, remark = (read_sets if multi_label else read_column)(texts, classes, kind, str(file))
    if not multi_label and (listed := [(where, text) for where, text in texts if ";" in text]):
        where, text = listed[0]
        info(f"{where} has label {text!r}, which is one class; pass --multi-label if it lists several")
    if remark:
        info(f"{remark}; pass --labels numbers or --labels names to say what they are")

    def find_image(numbered: tuple[int, _Row], poll: Poll) -> FoundImage:
        number, (where, path, _) = numbered
        location = os.path.join(file.parent, path)  # noqa: PTH118, a million Paths would be slow
        try:
            status = os.stat(location)  # noqa: PTH116
        except (OSError, ValueError) as error:  # ValueError: a NUL character
            failure = error if isinstance(error, OSError) else OSError(str(error))
            raise explain(f"{where}: {path if path == path.strip() else repr(path)}", failure) from error
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{where}: {path}: not a regular file")
        own = tuple(label[number].tolist()) if multi_label else int(label[number])
        return FoundImage(path, location, 0, status.st_size, own, status.st_ctime_ns, status.st_dev, status.st_ino)

    images = list(map_threads(find_image, enumerate(rows), LISTING_THREADS))
    _check_repeated(rows, images, info)
    return collect(images, names)


def _read_rows(file: Path, multi_label: bool) -> list[_Row]:
    rows = []
    delimiter = "\t" if file.suffix == ".tsv" else ","
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, strict=True, delimiter=delimiter)  # strict: an unclosed quote is an error
            header = list(reader.fieldnames or ())
            label = "labels" if multi_label and "labels" in header else "label"
            _check_header(file, header, label)
            for row in reader:
                where = f"{file}: line {reader.line_num}"
                if not row["path"] or row[label] is None or not (row[label] or multi_label):
                    raise UserError(f"{where} needs a path and a label")
                if None in row:
                    raise UserError(f"{where} has more columns than the header; quote a path that contains a comma")
                rows.append((where, row["path"], row[label]))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except csv.Error as error:
        reason = error_reason(error).replace("unexpected end of data", "a quote is not closed")
        raise UserError(f"{file}: line {reader.line_num + 1}: {reason}") from error
    except OSError as error:
        raise explain(f"{file}: cannot be read", error) from error
    if not rows:
        raise UserError(f"{file}: lists no images")
    return rows


def _check_header(file: Path, header: list[str], label: str) -> None:
    for column in ("path", label):
        if header.count(column) != 1:
            problem = "missing" if column not in header else "there twice"
            found = f"; found {','.join(header)!r}" if header else ""
            cure = "; pass --multi-label to read labels" if column == "label" and "labels" in header else ""
            raise UserError(
                f"{file}: line 1 must be a header with the columns path,label ({column} is {problem}{found}){cure}"
            )


def _check_repeated(rows: list[_Row], images: list[FoundImage], info: Info) -> None:
    """Report images that are listed more than once. Raises UserError if their labels differ."""
    repeated = find_same_files(images)
    for first, other in repeated:
        if images[first].label != images[other].label:
            line = rows[first][0].rpartition(": ")[2]
            raise UserError(
                f"{rows[other][0]} has label {rows[other][2]} for {images[other].name}, but {line} has label "
                f"{rows[first][2]}; delete one"
            )
    if repeated:
        where, path, _ = rows[repeated[0][1]]
        info(f"{where}: {path} is listed again; {len(repeated):,} lines repeat an image, which is used as often")
