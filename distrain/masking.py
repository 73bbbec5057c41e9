"""Passwords, tokens and keys, replaced wherever a setting or the text of a foreign exception is shown or kept."""

import logging
import os
import re
from urllib.parse import unquote

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
_SECRET_NAME = re.compile(r"(SECRET|TOKEN|PASSWORD|PASSWD|PWD|ACCESS_KEY|API_KEY|APIKEY|KEY_ID|ACCOUNT_KEY)$", re.I)
_PUBLIC_NAMES = ("PWD", "OLDPWD")
_PASSWORD_IN_URL = re.compile(r"://[^\s/?#@:]*:(?!\d+/)([^\s@]+)@")


def mask_secrets(text: str) -> str:
    """Return `text` with *** for the passwords and tokens of URLs in it, and for the values of environment variables
    that are named like secrets, such as AWS_SECRET_ACCESS_KEY."""
    for secret in _environment_secrets():
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


def _environment_secrets() -> list[str]:
    """The secret values of the environment, longest first, so that none is masked in part."""
    found = set()
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and name not in _PUBLIC_NAMES:
            found.add(value)
        if match := _PASSWORD_IN_URL.search(value):
            found |= {match[1], unquote(match[1])}
    return sorted((value for value in found if len(value) >= _MIN_LENGTH), key=len, reverse=True)
