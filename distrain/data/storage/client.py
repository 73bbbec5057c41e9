"""Read URLs through fsspec: one place for timeouts, proxies and the errors of every remote file system."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CHUNK = 16 * 2**20  # bytes per request, where a server supports ranges

# By name, because botocore is imported only when s3 is used.
_CREDENTIAL_ERRORS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
)


class RequestRejectedError(OSError):
    """The server or the file system rejected the request itself, so that a retry cannot help."""


def read_chunks(url: str, timeout: float, limit: int = sys.maxsize) -> Iterator[bytes]:
    """Yield a file from its start, to its end or a little beyond `limit` bytes. Never retries.

    A server may be silent for `timeout` seconds. Raises OSError only: FileNotFoundError, PermissionError (also for
    missing credentials) and RequestRejectedError are final, TimeoutError and others may be temporary.
    """
    import fsspec

    http = url.startswith(("http://", "https://"))
    with _translated_errors(timeout):
        files, path = fsspec.url_to_fs(url, **_options(url, http, timeout))
        if http:  # one stream, because not every server supports ranges
            with files.open(path, block_size=0, size=limit) as stream:  # a given size saves a HEAD request
                while chunk := stream.read(_CHUNK):
                    yield chunk
            return
        files.retries = 1  # s3fs would make five attempts of its own and log none
        for start in range(0, limit, _CHUNK):
            end = limit + 1 if start + _CHUNK >= limit else start + _CHUNK
            try:
                chunk = files.cat_file(path, start=start, end=end)
            except Exception as error:
                if _starts_past_end(error):
                    return
                raise
            yield chunk
            if len(chunk) < end - start:
                return


def list_urls(pattern: str) -> list[str]:
    """Return the URLs that match a pattern with * or ?, sorted. Raises OSError."""
    import fsspec

    with _translated_errors():
        files, path = fsspec.url_to_fs(pattern)
        return sorted(files.unstrip_protocol(name) for name in files.glob(path))


def error_reason(error: Exception) -> str:
    """Return what went wrong with a file, in one line and without its name."""
    if isinstance(error, FileNotFoundError):
        return "file not found"
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(reason.split())


def _options(url: str, http: bool, timeout: float) -> dict[str, Any]:
    if http:
        from aiohttp import ClientTimeout

        limits = ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        # trust_env: use the proxy named by the environment
        return {"client_kwargs": {"timeout": limits, "read_bufsize": 2**20, "trust_env": True}}
    if url.startswith(("s3://", "s3a://")):
        once = {"mode": "standard", "total_max_attempts": 1}
        return {"config_kwargs": {"connect_timeout": timeout, "read_timeout": timeout, "retries": once}}
    return {}


@contextmanager
def _translated_errors(timeout: float | None = None) -> Iterator[None]:
    """Raise every error as the kind of OSError that tells whether a retry can help."""
    try:
        yield
    except Exception as error:  # aiohttp, botocore and others raise classes of their own
        raise _to_os_error(error, timeout) from error


def _to_os_error(error: Exception, timeout: float | None) -> OSError:
    status = getattr(error, "status", 0)
    reason = error_reason(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError(reason)
    if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ in _CREDENTIAL_ERRORS:
        return PermissionError(f"access denied ({reason})")
    if isinstance(error, TimeoutError):
        return TimeoutError("read timed out" + (f" after {timeout:g} s" if timeout else ""))
    rejected = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    if rejected or isinstance(error, (ImportError, ValueError)) or getattr(error, "errno", 0) == errno.EINVAL:
        return RequestRejectedError(f"request rejected ({reason})")
    return OSError(reason)


def _starts_past_end(error: Exception) -> bool:
    """Whether a range was rejected because the file ends before it."""
    response = getattr(error.__cause__, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    codes = (code, *(getattr(error, name, None) for name in ("code", "status", "status_code")))
    return any(str(code) in ("InvalidRange", "416") for code in codes)
