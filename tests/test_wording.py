"""What data and libraries say comes to terminals, logs and receipts as one harmless line without credentials."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout

import pytest

from components.shared import progress
from components.shared.errors import Refused, SemiscaleError
from components.shared.stage import guarded
from components.shared.tasks import _ending
from components.shared.wording import LONGEST, brief, has_credentials, masked, one_line
from components.verbs.measure import line
from components.verbs.watch import page
from tests.boards import task

HOSTILE = "cat\x1b[2J\x1b]0;owned\x07\r\nrefused: all is lost\u202e\x9b1m\u2028\ud800"


@pytest.mark.parametrize("log", ["plain", "json"])
def test_a_key_begins_no_line_and_moves_no_cursor(log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(progress.LOG, log)
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        progress.say("score", HOSTILE)
        progress.fail(HOSTILE, 1)
    for said in (out.getvalue(), err.getvalue()):
        (line,) = said.splitlines()
        text = json.loads(line)["message"] if log == "json" else line
        assert text.isprintable()
        assert "refused: all is lost" in text
        assert progress.failure(line) is None, "a key is not taken for the reason of an end"


def test_what_a_task_tells_is_shown_without_what_it_holds_of_its_data() -> None:
    shown = page(
        "birds", [task("merge", state="failed", reason=HOSTILE), task("score-0", done=1, detail=HOSTILE)], 0, 400
    )
    assert len(shown.split("\n")) == 4
    assert shown.replace("\n", "").isprintable()
    assert str(_ending(SemiscaleError(HOSTILE), "")["reason"]).isprintable()


def test_a_class_of_a_table_moves_no_cursor() -> None:
    assert line(f"  {HOSTILE}", 0.5, (0.4, 0.6)).isprintable()


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
def test_credentials_in_a_uri_are_said_nowhere(text: str) -> None:
    def work() -> None:
        raise Refused(text)

    with redirect_stderr(io.StringIO()) as err:
        assert guarded(work) == 2
    for said in (masked(text), err.getvalue(), str(_ending(Refused(text), "")["reason"])):
        assert "SECRET" not in said
    assert "SEC/RET" not in masked(text)


@pytest.mark.parametrize(
    "uri", ["s3://bucket/a@b.jpg", "gs://bucket/user:name@x/k", "http://minio:9000/bucket/a@b", "/data/a@b:c", "a@b"]
)
def test_names_with_signs_are_no_credentials(uri: str) -> None:
    assert not has_credentials(uri)
    assert masked(uri) == one_line(uri) == uri


def test_what_is_long_or_multiplies_is_cut() -> None:
    assert len(one_line("x" * 10_000_000)) == LONGEST + 1
    bomb: list[object] = ["lol"]
    for _ in range(60):
        bomb = [bomb] * 9
    assert len(brief(bomb)) < 500
    assert len(brief("x" * 10_000_000)) < 500
    assert "SECRET" not in brief({"key": ["s3://a:SECRET@b"]})
