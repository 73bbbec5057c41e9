"""Read URLs through fsspec: one place for timeouts, proxies and the errors of every remote file system."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distrain.errors import Scope, TemporaryError, UserError
from distrain.files import may_pass
from distrain.masking import mask_secrets

_CHUNK = 16 * 2**20  # bytes per request, where a server supports ranges

# By name, because botocore is imported only when s3 is used.
_CREDENTIAL_ERRORS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
)

_CREDENTIALS = {
    "http": "the URL (a signed one, or user:password@host) and ~/.netrc",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, ~/.aws and the role of the machine",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, those of gcloud and the role of the machine",
}


class RequestRejectedError(OSError):
    """The server or the file system rejected the request itself, so that a retry cannot help."""


class GaveUpError(OSError):
    """Retries did not help; the message tells why, how many attempts there were and how long they took."""


def read_chunks(url: str, timeout: float, limit: int = sys.maxsize) -> Iterator[bytes]:
    """Yield a file from its start, to its end or a little beyond `limit` bytes. Never retries.

    A server may be silent for `timeout` seconds. Raises OSError only: FileNotFoundError, PermissionError (also for
    missing credentials) and RequestRejectedError are final, TimeoutError and others may be temporary.
    """
    import fsspec

    http = url.startswith(("http://", "https://"))
    with _translated_errors(url, timeout):
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


def list_urls(pattern: str, timeout: float) -> list[str]:
    """Return the URLs that match a pattern with * or ?, sorted. Never retries. Raises OSError as `read_chunks` does."""
    import fsspec

    with _translated_errors(pattern, timeout):
        files, path = fsspec.url_to_fs(pattern, **_options(pattern, False, timeout))
        files.retries = 1
        return sorted(files.unstrip_protocol(name) for name in files.glob(path))


def explain(where: str, error: OSError, missing: str = "file not found", scope: Scope = "all") -> Exception:
    """Return the UserError or TemporaryError for a file that cannot be read, whose message begins with `where`.

    `missing` is the message if there is no such file.
    """
    reason = error_reason(error)
    if isinstance(error, FileNotFoundError):
        return UserError(f"{where}: {missing}", scope)
    if isinstance(error, RequestRejectedError):
        return UserError(f"{where}: {reason}; correct the URL or the server's settings", scope)
    if is_temporary(error):
        return TemporaryError(f"{where}: {reason}; check the disk or the server and run again", scope)
    return UserError(f"{where}: {reason}", scope)


def is_temporary(error: OSError) -> bool:
    """Whether reading the same file may work later."""
    return isinstance(error, (GaveUpError, TimeoutError)) or may_pass(error)


def error_reason(error: Exception) -> str:
    """Return what went wrong with a file, in one line, without its name and without secrets."""
    if isinstance(error, FileNotFoundError):
        return "file not found"
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return mask_secrets(" ".join(reason.split()))


def _options(url: str, http: bool, timeout: float) -> dict[str, Any]:
    if http:
        from aiohttp import ClientTimeout

        limits = ClientTimeout(total=None, connect=timeout, sock_connect=timeout, sock_read=timeout)
        # trust_env: use the proxy named by the environment
        return {"client_kwargs": {"timeout": limits, "read_bufsize": 2**20, "trust_env": True}}
    if url.startswith(("s3://", "s3a://")):
        once = {"mode": "standard", "total_max_attempts": 1}
        return {"config_kwargs": {"connect_timeout": timeout, "read_timeout": timeout, "retries": once}}
    return {}


@contextmanager
def _translated_errors(url: str, timeout: float) -> Iterator[None]:
    """Raise every error as the kind of OSError that tells whether a retry can help."""
    try:
        yield
    except Exception as error:  # aiohttp, botocore and others raise classes of their own
        raise _to_os_error(_cause(error), url, timeout) from error


def _cause(error: Exception) -> Exception:
    """Return the error that fsspec reports as FileNotFoundError, which it also raises if it could not ask."""
    cause = error.__cause__
    asked = not isinstance(cause, OSError) and getattr(cause, "status", 404) in (404, 410)
    return error if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception) or asked else cause


def _to_os_error(error: Exception, url: str, timeout: float) -> OSError:
    status = getattr(error, "status", 0)
    reason = error_reason(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError(reason)
    if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ in _CREDENTIAL_ERRORS:
        known = _CREDENTIALS.get(url.partition("://")[0].replace("https", "http").replace("s3a", "s3"))
        looked_for = f", which are looked for in {known}" if known else ""
        return PermissionError(f"access denied ({reason}); set or renew the credentials{looked_for}")
    if isinstance(error, TimeoutError):
        return TimeoutError(f"read timed out after {timeout:g} s")
    rejected = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    rejected |= type(error).__name__ == "ParamValidationError"  # botocore's, such as for a bucket name
    if rejected or isinstance(error, (ImportError, ValueError)) or getattr(error, "errno", 0) == errno.EINVAL:
        return RequestRejectedError(f"request rejected ({reason})")
    return OSError(reason)


def _starts_past_end(error: Exception) -> bool:
    """Whether a range was rejected because the file ends before it."""
    response = getattr(error.__cause__, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    codes = (code, *(getattr(error, name, None) for name in ("code", "status", "status_code")))
    return any(str(code) in ("InvalidRange", "416") for code in codes)
