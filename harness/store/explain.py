"""Convert errors of a remote store to StorageError, with a remedy and without credentials."""

from __future__ import annotations

import datetime
import email.utils

from harness.errors import RefusedError, StorageError
from harness.retry import answer, causes, is_transient
from harness.store.urls import redacted

CREDENTIALS = (
    "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role."
)
REMEDIES = {
    "NoSuchBucket": (
        "Create the bucket, or fix the name in run.remote. Is AWS_ENDPOINT_URL the right server?"
    ),
    "AccessDenied": (
        "Ask for the rights to list, get, put and delete objects under this prefix, "
        "and to abort uploads."
    ),
    "InvalidAccessKeyId": CREDENTIALS,
    "SignatureDoesNotMatch": CREDENTIALS,
    "NoCredentialsError": CREDENTIALS,
    "PartialCredentialsError": CREDENTIALS,
    "ProfileNotFound": CREDENTIALS,
    "ExpiredToken": "Renew the credentials: the ones in the environment are too old.",
    "ExpiredTokenException": "Renew the credentials: the ones in the environment are too old.",
    "RequestTimeTooSkewed": "Set this machine's clock: it is too far from the server's.",
    "InvalidBucketName": "Fix the name in run.remote: s3://bucket/prefix.",
    "NotImplemented": (
        "A run needs a server that can create an object exclusively (If-None-Match: * on a PUT): "
        "use a newer server, or another store."
    ),
    "ParamValidationError": "Fix the name in run.remote: s3://bucket/prefix.",
}


def explained(failure: str, error: BaseException) -> StorageError:
    """Convert an error to a StorageError, or to a RefusedError if a retry would not help.

    A RefusedError is returned for every error that has a remedy in `REMEDIES`, and for status 400,
    401 and 403 unless the error is transient. A 404 without a specific code means a missing bucket,
    since a missing object is handled before. A 501 is that of a server without conditional writes.

    Args:
        failure: The failed operation and its object, for the message.
        error: The error of the client library.
    """
    status, code = answer(error)
    if status == 404 and code in ("404", "", "NoSuchBucket"):
        code = "NoSuchBucket"
    elif status == 403 and code in ("403", ""):
        code = "AccessDenied"
    elif status == 501:
        code = "NotImplemented"
    kinds = [type(cause).__name__ for cause in causes(error)]
    name = code or next((kind for kind in kinds if kind in REMEDIES), kinds[0])
    text = _text(error) or ("no answer in time" if "Timeout" in name else "no error message")
    details = f"found: {name}" + (f" ({status})" if status else "") + f", {redacted(text)}"
    remedy = REMEDIES.get(
        name, "Is the server up, and reachable from here?" if is_transient(error) else ""
    )
    if name == "RequestTimeTooSkewed":
        details += _skew(error)
    if name == "NoSuchBucket":
        failure = f"{failure}: there is no such bucket"
    refused = name in REMEDIES or (status in (400, 401, 403) and not is_transient(error))
    return (RefusedError if refused else StorageError)(redacted(failure), details, remedy)


def _skew(error: BaseException) -> str:
    """Return a sentence on this machine's clock offset, computed from the response date, or ""."""
    for cause in causes(error):
        response = getattr(cause, "response", None) or {}
        date = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
        if date:
            server = email.utils.parsedate_to_datetime(date)
            return (
                " It is "
                f"{(datetime.datetime.now(datetime.timezone.utc) - server).total_seconds():+.0f}"
                " s here against the server."
            )
    return ""


def _text(error: BaseException) -> str:
    """Return the first line of the error's message, at most 300 characters of it."""
    lines = str(error).splitlines() or [""]
    return lines[0][:300]
