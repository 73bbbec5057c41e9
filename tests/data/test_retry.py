"""What is temporary, missing or refused is told apart, and a tool gives up within half a minute."""

import errno

import fsspec
import pytest

from distrain.data.storage import retry
from distrain.data.storage.client import GaveUpError, explain, read_chunks
from distrain.data.storage.retry import TOOL_POLICY, RetryPolicy
from distrain.errors import TemporaryError, UserError


def give_up(monkeypatch, seconds):
    """How often and how long a tool tries when every attempt takes these seconds, on a clock that only waits move."""
    now, attempts = [0.0], []
    monkeypatch.setattr(retry.time, "monotonic", lambda: now[0])

    def pass_time(wait):
        now[0] += wait

    def attempt():
        attempts.append(now[0])
        pass_time(seconds)
        raise TimeoutError("read timed out")

    with pytest.raises(GaveUpError, match=r"^read timed out; tried \d+ times in \d+ s$"):
        TOOL_POLICY.call(attempt, pass_time)
    return len(attempts), now[0]


def test_a_tool_gives_up_within_about_half_a_minute(monkeypatch):
    attempts, waited = give_up(monkeypatch, 0)
    assert 4 <= attempts <= 7
    assert 7 < waited <= 30
    attempts, waited = give_up(monkeypatch, retry.TOOL_TIMEOUT)
    assert attempts in (2, 3)
    assert waited < 45


def test_a_large_file_that_breaks_off_is_tried_again(monkeypatch):
    assert give_up(monkeypatch, 600)[0] >= 2


def test_an_attempt_is_repeated_as_often_as_set_after_doubling_waits(monkeypatch):
    monkeypatch.setattr(retry.random.SystemRandom, "uniform", lambda self, low, high: (low + high) / 2)
    waits, lines, failures = [], [], [TimeoutError("read timed out")] * 3

    def attempt():
        if failures:
            raise failures.pop()
        return "content"

    policy = RetryPolicy(retries=3, first_wait=2.0)
    assert policy.call(attempt, waits.append, lines.append) == "content"
    assert waits == [2.0, 4.0, 8.0]
    assert lines[0] == "read timed out; attempt 2 of 4 in 2.0 s"
    failures += [TimeoutError("read timed out")] * 4
    with pytest.raises(GaveUpError, match="tried 4 times"):
        policy.call(attempt, waits.append)
    assert len(waits) == 6


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError("not yours"), ValueError("not of I/O")])
def test_what_a_retry_cannot_fix_is_raised_at_once(error):
    def attempt():
        raise error

    with pytest.raises(type(error), match=str(error)):
        RetryPolicy(retries=3, first_wait=2.0).call(attempt, lambda wait: pytest.fail("waited"))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EIO, "Input/output error"), TemporaryError),
        (OSError(errno.ESTALE, "Stale file handle"), TemporaryError),
        (GaveUpError("503; tried 4 times in 7 s"), TemporaryError),
        (FileNotFoundError(errno.ENOENT, "No such file"), UserError),
        (PermissionError(errno.EACCES, "Permission denied"), UserError),
        (OSError(errno.ELOOP, "Too many levels of symbolic links"), UserError),
    ],
)
def test_an_error_says_whether_it_may_pass(error, kind):
    assert type(explain("x.tar", error)) is kind


@pytest.mark.parametrize(
    ("cause", "reason", "kind"),
    [(ConnectionRefusedError("refused"), "refused", OSError), (None, "file not found", FileNotFoundError)],
)
def test_a_file_that_could_not_be_asked_for_is_not_missing(monkeypatch, cause, reason, kind):
    class FailingFiles:
        def cat_file(self, path, start, end):
            raise FileNotFoundError(path) from cause

    monkeypatch.setattr(fsspec, "url_to_fs", lambda url, **options: (FailingFiles(), url))
    with pytest.raises(OSError, match=reason) as raised:
        list(read_chunks("x://y", 1.0))
    assert raised.type is kind
