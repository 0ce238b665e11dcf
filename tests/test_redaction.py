"""No password, token or signature of a url appears where the url is shown or stored."""

import json
import subprocess
import sys

import pytest
import yaml

from dalle_ds.console import print_error, print_summary
from dalle_ds.errors import ConfigError
from dalle_ds.recipes import Config, dump_recipe
from dalle_ds.redaction import redacted, redacted_message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:hush@host:1/path", "https://host:1/path"),
        ("https://hush@host", "https://host"),
        ("http://u:h@ush@host/a?b=1", "http://host/a?b=1"),
        ("postgresql+psycopg2://u:hush@db:5/m and http://u:hush@b/c", "postgresql+psycopg2://db:5/m and http://b/c"),
        ("API request to http://u:hush@127.0.0.1:5/api failed", "API request to http://127.0.0.1:5/api failed"),
        ("https://s/x?X-Amz-Signature=hush&a=1", "https://s/x?X-Amz-Signature=REDACTED&a=1"),
        ("https://s/x?a=1&access_token=hush#f", "https://s/x?a=1&access_token=REDACTED#f"),
        ("https://s/x?sig=hush&sv=2", "https://s/x?sig=REDACTED&sv=2"),
        ("postgresql://db/m?user=a&password=hush", "postgresql://db/m?user=a&password=REDACTED"),
        (json.dumps({"uri": "http://u:hush@h", "n": 1}), json.dumps({"uri": "http://h", "n": 1})),
        ("s3://bucket/a@b/c?d=e", "s3://bucket/a@b/c?d=e"),
        ("a mail to me@example.org about /data/set@2", "a mail to me@example.org about /data/set@2"),
    ],
)
def test_only_what_is_secret_disappears(text: str, expected: str) -> None:
    assert redacted(text) == expected
    assert redacted_message(text) == expected


@pytest.mark.parametrize(
    "part", ["?", "a:", "passw", "://", "://a@", "(:", "x:y@", "&a", ":", "?key=", "; ", "a@b:", "[", "?token=x&"]
)
@pytest.mark.parametrize("end", ["", "@!", "(@h", "="])
def test_captions_of_any_kind_take_linear_time(part: str, end: str) -> None:
    """Captions are in log lines and summaries. With a quadratic expression, one of these takes an hour."""
    text = "x" + part * (400_000 // len(part)) + end
    assert len(redacted_message(text)) <= len(text) + text.count("token=") * len("REDACTED")


@pytest.mark.parametrize("typed", ["u:hush@host:5000", "tracking.uri = 'u:hush@host'", "http:/u:hush@host/x"])
def test_messages_hide_the_password_of_a_mistyped_url(typed: str) -> None:
    assert "hush" not in redacted_message(typed) and "host" in redacted_message(typed)
    assert "hush" not in str(ConfigError(f"{typed}: expected a url"))


def test_summaries_errors_logs_and_tracebacks_hide_passwords(capsys: pytest.CaptureFixture[str]) -> None:
    url = "http://u:hush@host:1/x"
    for as_json in (False, True):
        print_summary({"server": url, "nested": {"list": [url]}}, as_json)
    print_error(f"error: {url}")
    program = (
        "import logging; from dalle_ds.console import setup_logging; setup_logging()\n"
        f"try: raise ValueError({url!r})\n"
        "except ValueError: logging.getLogger('x').exception('at %s', 'https://hush@h')\n"
        f"raise RuntimeError({url!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    captured = capsys.readouterr()
    assert (
        done.returncode == 1 and "RuntimeError: http://host:1/x" in done.stderr and "ValueError: http://host:1" in done.stderr
    )
    assert captured.out.count("host:1/x") == 4 and "http://host:1/x" in captured.err
    assert "hush" not in captured.out + captured.err + done.stderr.replace(program, "")


class _Inner(Config):
    uris: tuple[str, ...] = ()


class _Outer(Config):
    uri: str | None = None
    inner: _Inner = _Inner()


def test_stored_recipes_hide_passwords() -> None:
    config = _Outer(uri="http://u:hush@host", inner=_Inner(uris=("https://hush@a", "b")))
    assert yaml.safe_load(dump_recipe(config)) == {"uri": "http://host", "inner": {"uris": ["https://a", "b"]}}
    assert config.uri == "http://u:hush@host", "the run itself needs the password"
