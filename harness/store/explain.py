"""What a remote store's refusal means, in words; never with anything secret in it."""

from __future__ import annotations

import datetime
import email.utils
import os
import re

from harness.errors import RefusedError, StorageError
from harness.retry import answer, causes, is_transient

SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
CREDENTIALS = "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role."
REMEDIES = {
    "NoSuchBucket": "Create the bucket, or mend the name in run.remote. Is AWS_ENDPOINT_URL the right server?",
    "AccessDenied": "Ask for the rights to list, get, put and delete objects under this prefix, and to abort uploads.",
    "InvalidAccessKeyId": CREDENTIALS,
    "SignatureDoesNotMatch": CREDENTIALS,
    "NoCredentialsError": CREDENTIALS,
    "PartialCredentialsError": CREDENTIALS,
    "ProfileNotFound": CREDENTIALS,
    "ExpiredToken": "Renew the credentials: the ones in the environment are too old.",
    "ExpiredTokenException": "Renew the credentials: the ones in the environment are too old.",
    "RequestTimeTooSkewed": "Set this machine's clock: it is too far from the server's.",
    "InvalidBucketName": "Mend the name in run.remote: s3://bucket/prefix.",
    "ParamValidationError": "Mend the name in run.remote: s3://bucket/prefix.",
}


def explained(what: str, error: BaseException) -> StorageError:
    """A StorageError, or a RefusedError if trying again would not help."""
    status, code = answer(error)
    if status == 404 and code in ("404", "", "NoSuchBucket"):
        code = "NoSuchBucket"
    elif status == 403 and code in ("403", ""):
        code = "AccessDenied"
    kinds = [type(cause).__name__ for cause in causes(error)]
    name = code or next((kind for kind in kinds if kind in REMEDIES), kinds[0])
    text = _text(error) or ("no answer in time" if "Timeout" in name else "no words about it")
    said = f"found: {name}" + (f" ({status})" if status else "") + f", {redacted(text)}"
    remedy = REMEDIES.get(name, "Is the server up, and reachable from here?" if is_transient(error) else "")
    if name == "RequestTimeTooSkewed":
        said += _skew(error)
    if name == "NoSuchBucket":
        what = f"{what}: there is no such bucket"
    refused = name in REMEDIES or (status in (400, 401, 403) and not is_transient(error))
    return (RefusedError if refused else StorageError)(redacted(what), said, remedy)


def _skew(error: BaseException) -> str:
    """How far this machine's clock is off, by the date of the server's answer."""
    for cause in causes(error):
        response = getattr(cause, "response", None) or {}
        date = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
        if date:
            server = email.utils.parsedate_to_datetime(date)
            return f" It is {(datetime.datetime.now(datetime.timezone.utc) - server).total_seconds():+.0f} s here against the server."
    return ""


def _text(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return lines[0][:300]


def redacted(text: str) -> str:
    """The text without the values of credentials, and without what stands before the @ of a URL or after its question mark."""
    for name in SECRETS:
        if len(value := os.environ.get(name, "")) >= 4:
            text = text.replace(value, "***")
    text = re.sub(r"(://)[^\s'\"?#]*@", r"\1***@", text)
    return re.sub(r"(://[^\s?#'\"]*)[?#][^\s'\"]*", r"\1?***", text)
