"""Test that texts from data and libraries become one line without credentials.

The line goes to terminals, logs and receipts.
"""

import io
import json
from contextlib import redirect_stderr, redirect_stdout

import pytest

from semiscale.cli.measure import format_measurement_row
from semiscale.cli.watch import render
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.common.text import MAX_LINE_CHARS, has_credentials, redact_credentials, to_single_line, truncated_repr
from semiscale.observability import progress
from semiscale.observability.status_reporter import _final_fields
from semiscale.runtime.entrypoints import run_with_exit_code
from tests.support.run_statuses import running_task

HOSTILE = "cat\x1b[2J\x1b]0;owned\x07\r\nrefused: all is lost\u202e\x9b1m\u2028\ud800"


@pytest.mark.parametrize("log", ["plain", "json"])
def test_a_key_begins_no_line_and_moves_no_cursor(log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(progress.LOG_FORMAT_ENV, log)
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        progress.log_info("score", HOSTILE)
        progress.log_fatal(HOSTILE, 1)
    for output in (out.getvalue(), err.getvalue()):
        (line,) = output.splitlines()
        text = json.loads(line)["message"] if log == "json" else line
        assert text.isprintable()
        assert "refused: all is lost" in text
        assert progress.parse_failure(line) is None, "a key must not be parsed as a failure"


def test_hostile_texts_of_a_task_are_displayed_on_one_line() -> None:
    screen = render(
        "birds",
        [running_task("merge", state="failed", reason=HOSTILE), running_task("score-0", done=1, detail=HOSTILE)],
        0,
        400,
    )
    assert len(screen.split("\n")) == 4
    assert screen.replace("\n", "").isprintable()
    assert str(_final_fields(SemiscaleError("SEMI-E000", HOSTILE), "")["reason"]).isprintable()


def test_a_class_name_in_a_table_moves_no_cursor() -> None:
    assert format_measurement_row(f"  {HOSTILE}", 0.5, (0.4, 0.6)).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "s3://AKIA:SECRET@bucket/key: refused",
        "s3://AKIA:SEC/RET+@bucket/key",
        "s3://SECRET@bucket",
        'Invalid bucket name in "s3://AKIA:SECRET@bucket"',
        "http://user:SECRET@proxy:3128/: no route",
        "https://b.example/k?X-Amz-Credential=SECRET%2F2026&X-Amz-Signature=SECRET",
        "https://b.example/k?X-Goog-Signature=SECRET&x=1",
        "https://b.example/k?sv=1&sig=SECRET",
    ],
)
def test_credentials_in_a_uri_are_never_printed(text: str) -> None:
    def work() -> None:
        raise InvalidInputError("SEMI-E000", text)

    with redirect_stderr(io.StringIO()) as err:
        assert run_with_exit_code(work) == 2
    for output in (
        redact_credentials(text),
        err.getvalue(),
        str(_final_fields(InvalidInputError("SEMI-E000", text), "")["reason"]),
    ):
        assert "SECRET" not in output
    assert "SEC/RET" not in redact_credentials(text)


@pytest.mark.parametrize(
    "uri", ["s3://bucket/a@b.jpg", "gs://bucket/user:name@x/k", "http://minio:9000/bucket/a@b", "/data/a@b:c", "a@b"]
)
def test_names_with_at_signs_and_colons_are_not_credentials(uri: str) -> None:
    assert not has_credentials(uri)
    assert redact_credentials(uri) == to_single_line(uri) == uri


def test_long_and_nested_values_are_truncated() -> None:
    assert len(to_single_line("x" * 10_000_000)) == MAX_LINE_CHARS + 1
    bomb: list[object] = ["lol"]
    for _ in range(60):
        bomb = [bomb] * 9
    assert len(truncated_repr(bomb)) < 500
    assert len(truncated_repr("x" * 10_000_000)) < 500
    assert "SECRET" not in truncated_repr({"key": ["s3://a:SECRET@b"]})
