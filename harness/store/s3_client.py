"""S3 through s3fs: one request a method, and nothing is tried again here.

s3fs gives the connection, the credentials of the standard environment, and the loop that requests run in. Its own reading, writing and
listing are not used: it caches listings, commits a file that was left by an exception, reads a torn file when a key is overwritten,
and answers a missing bucket like an empty one.
"""

from __future__ import annotations

import base64
import datetime
import email.utils
import hashlib
import zlib
from typing import Any

import fsspec.asyn
import s3fs

from harness.errors import ChangedError
from harness.retry import answer, is_expired, is_transient
from harness.store.bucket import Found, MissingError, Part, TakenError, Unfinished

CONNECT_S, READ_S = 5.0, 20.0
FIRST_PART_BYTES = 8 << 20
CRC = "CRC32"
REFUSED = (400, 501)  # by a server that knows nothing of such checksums
ENCRYPTED = ("aws:kms", "aws:kms:dsse")  # then an ETag is no MD5


class S3Client:
    """A bucket, and a prefix in it."""

    parallel = 8
    tells_tags = True

    def __init__(self, url: str) -> None:
        self.name, _, prefix = url.partition("://")[2].partition("/")
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.fs = s3fs.S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs={
                "connect_timeout": CONNECT_S,
                "read_timeout": READ_S,
                "retries": {"mode": "standard", "total_max_attempts": 1},
                "max_pool_connections": 32,
                # Every body has a checksum of ours in a header that is signed: to sign the body itself is another pass over it.
                "s3": {"payload_signing_enabled": False},
                "parameter_validation": False,  # it refuses a view of bytes, of which less is copied on the way to the socket
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            },
        )
        self.fs.retries = 1
        self._knows_crc = True  # until the server shows that it does not
        self._with_crc: set[str] = set()  # uploads for which it has said that it compares

    def _call(self, limit_s: float, method: str, **arguments: Any) -> dict[str, Any]:
        async def call() -> dict[str, Any]:
            reply: dict[str, Any] = await self.fs._call_s3(method, Bucket=self.name, **arguments)
            if "Body" in reply:
                async with reply["Body"] as body:
                    reply["Body"] = await body.read()
            return reply

        try:
            return fsspec.asyn.sync(self.fs.loop, call, timeout=limit_s)  # type: ignore[no-any-return]
        except OSError as error:
            status, code = answer(error)
            if status == 404 and code != "NoSuchBucket" and method != "head_bucket":
                raise MissingError(str(error)) from error
            if status == 412:
                raise TakenError(str(error)) from error
            raise

    def renew(self) -> None:
        """Read the credentials again."""
        self.fs.connect(refresh=True)

    def now(self, limit_s: float) -> datetime.datetime:
        """The server's clock."""
        headers = self._call(limit_s, "head_bucket")["ResponseMetadata"]["HTTPHeaders"]
        return email.utils.parsedate_to_datetime(headers["date"])

    def list_page(self, folder: str, token: str | None, limit_s: float) -> tuple[list[Found], str | None]:
        """One page of what lies directly in `folder`, and how to ask for the next one. A missing bucket is an error."""
        more = {"ContinuationToken": token} if token else {}
        reply = self._call(limit_s, "list_objects_v2", Prefix=f"{self.prefix}{folder}/", Delimiter="/", **more)
        found = [Found(o["Key"][len(self.prefix) :], o["Size"], o["ETag"].strip('"')) for o in reply.get("Contents", [])]
        if not found and token is None:
            self._call(limit_s, "head_bucket")  # not every server tells a missing bucket from an empty folder when listing
        return found, reply.get("NextContinuationToken") if reply.get("IsTruncated") else None

    def head(self, key: str, limit_s: float) -> Found | None:
        try:
            reply = self._call(limit_s, "head_object", Key=self.prefix + key)
        except MissingError:  # a 404 without a body: the object, or the whole bucket?
            self._call(limit_s, "head_bucket")
            return None
        etag = "" if _is_opaque(reply) else reply["ETag"].strip('"')
        return Found(key, reply["ContentLength"], etag, reply.get("ETag", ""))

    def get(self, key: str, start: int, end: int | None, limit_s: float, version: str = "") -> bytes:
        """The bytes from `start` to before `end`, or all from `start` on. Raises ChangedError if the object is not this `version` any
        more."""
        span = {} if start == 0 and end is None else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        condition = {"IfMatch": version} if version else {}
        try:
            reply = self._call(limit_s, "get_object", Key=self.prefix + key, **span, **condition)
        except TakenError:  # 412: what a condition asks for is not so
            raise ChangedError(f"s3://{self.name}/{self.prefix}{key}") from None
        if version and reply.get("ETag", version) != version:  # of a server that knows no such condition
            raise ChangedError(f"s3://{self.name}/{self.prefix}{key}")
        return bytes(reply["Body"])

    def check_version(self, key: str, version: str, limit_s: float) -> None:
        """Nothing is left to ask: `get` asks for it with the bytes."""

    def put(self, key: str, data: bytes, exclusive: bool, limit_s: float) -> str:
        """Raises TakenError when `exclusive` and the key exists; returns the ETag that the object ought to have."""
        condition = {"IfNoneMatch": "*"} if exclusive else {}
        self._call(limit_s, "put_object", Key=self.prefix + key, Body=data, ContentMD5=_md5(data)[1], **condition)
        return _md5(data)[0].hex()

    def delete(self, key: str, limit_s: float) -> None:
        self._call(limit_s, "delete_object", Key=self.prefix + key)

    def begin(self, key: str, limit_s: float) -> str:
        """Begin an upload in parts; returns its id."""
        if self._knows_crc:
            try:
                reply = self._call(limit_s, "create_multipart_upload", Key=self.prefix + key, ChecksumAlgorithm=CRC)
            except OSError as error:
                if answer(error)[0] not in REFUSED or is_transient(error) or is_expired(error):
                    raise
                self._knows_crc = False
            else:
                if reply.get("ChecksumAlgorithm") == CRC:
                    self._with_crc.add(reply["UploadId"])
                return str(reply["UploadId"])
        return str(self._call(limit_s, "create_multipart_upload", Key=self.prefix + key)["UploadId"])

    def part_bytes(self, number: int) -> int:
        """How large part `number` is: growing, so that ten thousand parts hold any checkpoint without much memory for a small one."""
        return FIRST_PART_BYTES << number // 2000

    def part(self, key: str, upload: str, number: int, data: bytes, limit_s: float) -> Part:
        """Send a part, with a checksum that the server compares: a CRC-32, which costs a tenth of an MD5, if it has said that it does."""
        crc = _crc(data) if upload in self._with_crc else ""
        sent = {"ChecksumCRC32": crc} if crc else {"ContentMD5": _md5(data)[1]}
        reply = self._call(limit_s, "upload_part", Key=self.prefix + key, UploadId=upload, PartNumber=number, Body=memoryview(data), **sent)
        digest = _tagged(reply["ETag"]) if crc and reply.get("ChecksumCRC32") == crc else _md5(data)[0]
        return Part(number, reply["ETag"], digest, crc)

    def complete(self, key: str, upload: str, parts: list[Part], limit_s: float) -> str:
        """Let the object appear; returns the ETag that it ought to have. Raises MissingError if the upload is gone: done, or aborted."""
        named = [
            {"PartNumber": part.number, "ETag": part.tag} | ({"ChecksumCRC32": part.checksum} if part.checksum else {}) for part in parts
        ]
        self._call(limit_s, "complete_multipart_upload", Key=self.prefix + key, UploadId=upload, MultipartUpload={"Parts": named})
        self._with_crc.discard(upload)
        return self.tag_of(parts)

    def tag_of(self, parts: list[Part]) -> str:
        """The ETag of an object that was uploaded in these parts."""
        return f"{hashlib.md5(b''.join(part.digest for part in parts), usedforsecurity=False).hexdigest()}-{len(parts)}"

    def abort(self, key: str, upload: str, limit_s: float) -> None:
        self._with_crc.discard(upload)
        self._call(limit_s, "abort_multipart_upload", Key=self.prefix + key, UploadId=upload)

    def unfinished(self, limit_s: float) -> list[Unfinished]:
        """The uploads in parts under this prefix, and no others, that were never completed."""
        found, marks = list[Unfinished](), dict[str, str]()
        while True:
            reply = self._call(limit_s, "list_multipart_uploads", Prefix=self.prefix, **marks)
            found += [
                Unfinished(upload["Key"][len(self.prefix) :], upload["UploadId"], upload["Initiated"])
                for upload in reply.get("Uploads", [])
                if upload["Key"].startswith(self.prefix)  # a server that ignores the prefix must not cost anybody an upload
            ]
            if not reply.get("IsTruncated"):
                return found
            marks = {"KeyMarker": reply["NextKeyMarker"], "UploadIdMarker": reply["NextUploadIdMarker"]}


def _crc(data: bytes) -> str:
    """As S3 spells it."""
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


def _tagged(tag: str) -> bytes:
    """The MD5 that the server has made of a part, which its ETag spells; of an encrypted one it is no MD5, and compared with nothing."""
    try:
        return bytes.fromhex(tag.strip('"'))
    except ValueError:
        return b""


def _md5(data: bytes) -> tuple[bytes, str]:
    digest = hashlib.md5(data, usedforsecurity=False).digest()
    return digest, base64.b64encode(digest).decode()


def _is_opaque(reply: dict[str, Any]) -> bool:
    """Whether an object's ETag is no MD5: encrypted with a key of the user's. The server has checked each part's MD5 all the same."""
    return reply.get("ServerSideEncryption") in ENCRYPTED or "SSECustomerAlgorithm" in reply
