"""Check the addresses of stores, and remove secrets from texts about them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from harness.errors import UsageError

DEFAULT_WAIT_S = 300.0  # retry limit of a request in seconds
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")


def expanded(path: str | Path) -> Path:
    """Return the absolute path of a directory; a leading ~ stands for a home directory.

    Raises UsageError if there is no such home.
    """
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise UsageError(f"{path} is not a place for a run", f"found: {error}") from None


def is_url(text: str) -> bool:
    """Return True if the text is a URL, not a path."""
    return "://" in text


def check_url(url: str) -> str | None:
    """Return the form that a store's URL should have if it is invalid, else None.

    The returned text contains nothing of the URL and is safe to print.
    """
    parts = urlsplit(url)
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*", parts.scheme) or not is_url(url):
        return "a URL like s3://bucket/prefix"
    has_password = "@" in parts.netloc + parts.path or (
        ":" in parts.netloc and parts.scheme in ("s3", "s3a")
    )
    if has_password or parts.query or parts.fragment:
        return (
            "a URL without credentials or options: those come from the environment "
            "(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL …)"
        )
    if not parts.netloc and parts.scheme not in ("file", "local", "memory"):
        return "a URL with a bucket: s3://bucket/prefix"
    if any(part in (".", "..") for part in parts.path.split("/")):
        return "a URL without '..'"
    return None


def redacted(text: str) -> str:
    """Replace secrets in the text with ***.

    The secrets are the values of the environment variables in `SECRETS`, if they have at least four
    characters, and in URLs the part before the @ and the query string or fragment.
    """
    for name in SECRETS:
        if len(value := os.environ.get(name, "")) >= 4:
            text = text.replace(value, "***")
    text = re.sub(r"(://)[^\s'\"?#]*@", r"\1***@", text)
    return re.sub(r"(://[^\s?#'\"]*)[?#][^\s'\"]*", r"\1?***", text)
