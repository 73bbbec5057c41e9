"""Where MLflow reports go, checked before a run starts."""

import os
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import urlsplit

from distrain.config import NO_MLFLOW, Config
from distrain.errors import UserError
from distrain.files import resolve

SQLITE = "sqlite:///"
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_SERVERS = ("http", "https")
_OTHERS = ("file", "databricks")


def tracking_uri(config: Config) -> str:
    """The configured server, the environment's, or a database beside the runs.

    Raises UserError for what MLflow can never use, so that reports are not promised for later.
    """
    if config.track.uri:
        return _checked("track.uri", config.track.uri)
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return _checked("MLFLOW_TRACKING_URI", uri)
    folder = str(resolve(config.run.dir))
    if "?" in folder or "%" in folder:  # which end or escape a path in a database's URI
        raise UserError(
            f"run.dir={config.run.dir}: MLflow's database cannot be in a folder with '?' or '%' in its path: rename "
            "it, or set track.uri=none"
        )
    return f"{SQLITE}{folder}/mlflow.db"


def _names_database(uri: str) -> bool:
    """Whether a database's URI has a file or a host: without a file SQLite keeps everything in memory."""
    kind, _, rest = uri.partition("://")
    path, _, options = rest.partition("?")
    if options and not all("=" in option for option in options.split("&")):  # a ? within the file's name
        return False
    if kind.startswith("sqlite"):
        return path.startswith("/") and path[1:] not in ("", ":memory:")
    return bool(path)


def _checked(key: str, uri: str) -> str:
    """Return `uri` if MLflow may be able to use it."""
    if uri == NO_MLFLOW:
        return uri
    scheme = uri.partition(":")[0].lower()
    plugins = {point.name for point in entry_points(group="mlflow.tracking_store")}
    database = uri.partition(":")[0].partition("+")[0] in _DATABASES  # only so does SQLAlchemy know them
    if scheme not in (*_SERVERS, *_OTHERS, *plugins) and not database:
        raise UserError(
            f"{key}={uri} is not a tracking URI: write http://HOST:PORT, sqlite:///FILE or {NO_MLFLOW}"
            + (f" (or track.uri={NO_MLFLOW})" if key != "track.uri" else "")
        )
    if scheme == "file" and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("true", "1"):
        raise UserError(
            f"{key}={uri}: MLflow keeps no more runs in folders: write sqlite:///FILE, or "
            "set MLFLOW_ALLOW_FILE_STORE=true"
        )
    if database and not _names_database(uri):
        raise UserError(f"{key}={uri} names no database that outlasts the run: write sqlite:///FILE or NAME://HOST/DB")
    try:
        parts = urlsplit(uri)
        valid = scheme not in _SERVERS or bool(parts.hostname and parts.port != 0 and " " not in parts.hostname)
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"{key}={uri} is not a valid URL: write http://HOST:PORT")
    if uri.startswith(f"{SQLITE}~/"):
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).expanduser()}"
    return uri
