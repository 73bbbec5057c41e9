"""Passwords, tokens and keys, replaced wherever a setting or the text of a foreign exception is shown or kept."""

import logging
import os
import re
import sys
import threading
import traceback
import warnings
from types import TracebackType
from urllib.parse import quote, unquote

MASK = "***"
_MIN_LENGTH = 6  # of a value in the environment: masking shorter ones would make texts unreadable

_PASSWORD = r"[\w.%-]*(?:passw(?:or)?d|pwd|secret|token|signature|credential)[\w.%-]*"
_URL_PATTERNS = (
    # user:password@ of a URL. A password that is not percent-encoded may contain any character but a blank.
    (re.compile(r"(?<=://)[^\s/?#]*@"), f"{MASK}@"),
    (re.compile(r"(?<=://)[^\s/?#@:]*:(?!\d+/)[^\s@]*@"), f"{MASK}@"),
    # ?X-Amz-Signature=, &sig=, ?api_key= of a URL
    (
        re.compile(
            r"(?<=[?&;])((?:[\w.%-]*(?:key|auth|access)[\w.%-]*|sig|" + _PASSWORD + r")=)"
            r"[^&\s#'\"<>]+?(?=[:,;.)\]]*(?:[&\s#'\"<>]|$))",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),
    # password=... of a connection string or a log
    (re.compile(r"\b(" + _PASSWORD + r"=)(?!\*\*\*)[^\s&;,'\")\]]+", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"(authorization\W+(?:(?:bearer|basic)\s+)?)[^\s'\",]+", re.IGNORECASE), rf"\1{MASK}"),
)
_SECRET_NAME = re.compile(
    r"(SECRET|TOKEN|PASSWORD|PASSWD|PWD|ACCESS_KEY|API_KEY|APIKEY|KEY_ID|ACCOUNT_KEY|STORAGE_KEY|CONNECTION_STRING)$",
    re.I,
)
_PUBLIC_NAMES = ("PWD", "OLDPWD")
_SECRETS_IN_URL = (
    re.compile(r"://[^\s/?#@:]*:(?!\d+/)([^\s@]+)@"),
    re.compile(rf"[?&](?:{_PASSWORD}|sig|[\w.-]*key)=([^&\s#]+?)(?=[:,;.)\]'\"]*(?:[&\s#]|$))", re.IGNORECASE),
)
_remembered: set[str] = set()  # texts with URLs


def remember_secrets(text: str) -> None:
    """Mask the passwords and tokens of URLs in `text` from now on wherever they occur: libraries report parts."""
    if "://" in text:
        _remembered.add(text)


def mask_secrets(text: str) -> str:
    """Return `text` with *** for the passwords and tokens of URLs in it, on the command line and in the configuration,
    and for the values of environment variables that are named like secrets, such as AWS_SECRET_ACCESS_KEY."""
    for secret in _known_secrets():
        text = text.replace(secret, MASK)
    return mask_urls(text)


def mask_urls(text: str) -> str:
    """Return `text` with *** for the passwords and tokens of URLs in it, whatever the environment is."""
    for pattern, replacement in _URL_PATTERNS:
        text = pattern.sub(replacement, text)
    return text


class MaskingFormatter(logging.Formatter):
    """Masks secrets in log lines, including tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_secrets(super().format(record))


def mask_reports() -> None:
    """Mask secrets in what Python prints of itself: crashes, also of threads and finalizers, warnings, and log lines of
    libraries before logging is set up."""
    plain = warnings.formatwarning
    sys.excepthook = print_masked_traceback
    threading.excepthook = lambda crash: print_masked_traceback(crash.exc_type, crash.exc_value, crash.exc_traceback)
    sys.unraisablehook = lambda crash: print_masked_traceback(crash.exc_type, crash.exc_value, crash.exc_traceback)
    warnings.formatwarning = lambda *args, **options: mask_secrets(plain(*args, **options))
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(MaskingFormatter())


def print_masked_traceback(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """Print a crash as Python does, without passwords and tokens in the texts of libraries."""
    print(mask_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)


def _known_secrets() -> list[str]:
    """The secret values of the environment, the command line and the configuration, as they are and as a URL holds
    them, longest first, so that none is masked in part."""
    found = {v for name, v in os.environ.items() if _SECRET_NAME.search(name) and name not in _PUBLIC_NAMES}
    for text in (*os.environ.values(), *sys.argv, *_remembered):
        if "://" in text:
            found |= {secret for pattern in _SECRETS_IN_URL for secret in pattern.findall(text)}
    found |= {unquote(value) for value in found}
    long = {value for value in found if len(value) >= _MIN_LENGTH}
    return sorted(long | {quote(value, safe) for value in long for safe in ("", "/")}, key=len, reverse=True)
