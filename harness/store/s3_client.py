"""Access S3 through s3fs, with single requests and without retries.

s3fs provides the connection, the credentials of the standard environment, and the event loop that
runs the requests. Its own reading, writing and listing are not used: s3fs caches listings, commits
a file whose block was left by an exception, reads a mix of two versions when a key is overwritten,
and reports a missing bucket as an empty one.
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
from harness.store.bucket import MissingError, ObjectMetadata, Part, TakenError, Unfinished

CONNECT_S, READ_S = 5.0, 20.0
FIRST_PART_BYTES, MOST_PARTS, MIB = 8 << 20, 10_000, 1 << 20
CRC = "CRC32"
# Status codes of a server that does not support these checksums.
REFUSED = (400, 501)
# With these kinds of encryption the ETag is not an MD5.
ENCRYPTED = ("aws:kms", "aws:kms:dsse")


class S3Client:
    """A client for a prefix of an S3 bucket."""

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
                # Each request carries a checksum of its body in a signed header. Signing the body
                # itself would need another pass over it.
                "s3": {"payload_signing_enabled": False},
                # Parameter validation rejects a memoryview, which saves copies of the body.
                "parameter_validation": False,
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            },
        )
        self.fs.retries = 1
        self._knows_crc = True  # set to False once the server rejects CRC-32
        self._with_crc: set[str] = set()  # ids of uploads whose CRC-32 the server verifies

    def _call(self, limit_s: float, method: str, **arguments: Any) -> dict[str, Any]:
        """Perform one S3 request and return the reply, with its body read.

        Raises:
            MissingError: Status 404, except for a missing bucket.
            TakenError: Status 412: a condition of the request is not met.
        """

        async def call() -> dict[str, Any]:
            reply: dict[str, Any] = await self.fs._call_s3(method, Bucket=self.name, **arguments)
            if "Body" in reply:
                async with reply["Body"] as body:
                    reply["Body"] = await body.read()
            return reply

        try:
            return fsspec.asyn.sync(  # type: ignore[no-any-return]
                self.fs.loop, call, timeout=limit_s
            )
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
        """Return the time of the server's clock, from the date of a response."""
        headers = self._call(limit_s, "head_bucket")["ResponseMetadata"]["HTTPHeaders"]
        return email.utils.parsedate_to_datetime(headers["date"])

    def list_page(
        self, folder: str, token: str | None, limit_s: float
    ) -> tuple[list[ObjectMetadata], str | None]:
        """Return one page of what is directly in `folder`, and the token of the next page.

        A missing bucket raises an error.
        """
        more = {"ContinuationToken": token} if token else {}
        reply = self._call(
            limit_s, "list_objects_v2", Prefix=f"{self.prefix}{folder}/", Delimiter="/", **more
        )
        objects = [
            ObjectMetadata(o["Key"][len(self.prefix) :], o["Size"], o["ETag"].strip('"'))
            for o in reply.get("Contents", [])
        ]
        objects += [
            ObjectMetadata(common["Prefix"][len(self.prefix) :], 0, "")
            for common in reply.get("CommonPrefixes", [])
        ]
        if not objects and token is None:
            # Some servers list a missing bucket as an empty folder, so check the bucket.
            self._call(limit_s, "head_bucket")
        return objects, reply.get("NextContinuationToken") if reply.get("IsTruncated") else None

    def head(self, key: str, limit_s: float) -> ObjectMetadata | None:
        """Return the metadata of an object, or None if it does not exist.

        The tag is "" if the ETag is not an MD5. A missing bucket raises an error.
        """
        try:
            reply = self._call(limit_s, "head_object", Key=self.prefix + key)
        except MissingError:
            # The 404 of a HEAD request has no body: the object or the whole bucket is missing.
            self._call(limit_s, "head_bucket")
            return None
        etag = "" if _is_opaque(reply) else reply["ETag"].strip('"')
        return ObjectMetadata(key, reply["ContentLength"], etag, reply.get("ETag", ""))

    def get(
        self, key: str, start: int, end: int | None, limit_s: float, version: str = ""
    ) -> bytes:
        """Return the bytes of an object from `start` up to, excluding, `end`.

        Args:
            key: Key of the object.
            start: First byte offset.
            end: Byte offset after the last byte, or None for the end of the object.
            limit_s: Time limit of the request in seconds.
            version: Expected ETag, or "" for any.

        Raises:
            MissingError: The object does not exist.
            ChangedError: The object is not this `version` any more.
        """
        span = (
            {}
            if start == 0 and end is None
            else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        )
        condition = {"IfMatch": version} if version else {}
        try:
            reply = self._call(limit_s, "get_object", Key=self.prefix + key, **span, **condition)
        except TakenError:  # 412: the ETag does not match
            raise ChangedError(f"s3://{self.name}/{self.prefix}{key}") from None
        # A server that does not support If-Match returns the new object.
        if version and reply.get("ETag", version) != version:
            raise ChangedError(f"s3://{self.name}/{self.prefix}{key}")
        return bytes(reply["Body"])

    def check_version(self, key: str, version: str, limit_s: float) -> None:
        """Do nothing: `get` checks the version in the same request."""

    def put(self, key: str, data: bytes, exclusive: bool, limit_s: float) -> str:
        """Upload an object in one request and return the ETag that it should have.

        Args:
            key: Key of the object.
            data: Content of the object.
            exclusive: Fail if an object exists under the key.
            limit_s: Time limit of the request in seconds.

        Raises:
            TakenError: `exclusive` is set and the key exists.
        """
        condition = {"IfNoneMatch": "*"} if exclusive else {}
        self._call(
            limit_s,
            "put_object",
            Key=self.prefix + key,
            Body=data,
            ContentMD5=_md5(data)[1],
            **condition,
        )
        return _md5(data)[0].hex()

    def delete(self, key: str, limit_s: float) -> None:
        """Delete an object."""
        self._call(limit_s, "delete_object", Key=self.prefix + key)

    def drop_folder(self, folder: str, limit_s: float) -> None:
        """Do nothing: there are no folders."""

    def begin(self, key: str, limit_s: float) -> str:
        """Begin a multipart upload, with CRC-32 if the server supports it, and return its id."""
        if self._knows_crc:
            try:
                reply = self._call(
                    limit_s, "create_multipart_upload", Key=self.prefix + key, ChecksumAlgorithm=CRC
                )
            except OSError as error:
                if answer(error)[0] not in REFUSED or is_transient(error) or is_expired(error):
                    raise
                self._knows_crc = False
            else:
                if reply.get("ChecksumAlgorithm") == CRC:
                    self._with_crc.add(reply["UploadId"])
                return str(reply["UploadId"])
        return str(
            self._call(limit_s, "create_multipart_upload", Key=self.prefix + key)["UploadId"]
        )

    def part_bytes(self, number: int, expected_bytes: int) -> int:
        """Return the size in bytes of part `number`, counted from 1.

        If the size of the file is known, all parts but the last have one size, which Cloudflare R2
        and others demand: 8 MiB, or more where the file would have too many parts.

        Otherwise the size doubles every 2000 parts, from 8 MiB on. Ten thousand parts, the limit of
        S3, therefore hold a large checkpoint (484 GiB), and a small one needs little memory.
        """
        if expected_bytes:
            return max(FIRST_PART_BYTES, -(-expected_bytes // MOST_PARTS // MIB) * MIB)
        return FIRST_PART_BYTES << number // 2000

    def part(self, key: str, upload: str, number: int, data: bytes, limit_s: float) -> Part:
        """Upload one part with a checksum that the server verifies.

        The checksum is a CRC-32, which costs a tenth of an MD5, if the server has confirmed that it
        verifies CRC-32 for this upload; else an MD5.

        Args:
            key: Key of the object.
            upload: Id that `begin` returned.
            number: Number of the part, counted from 1.
            data: Content of the part.
            limit_s: Time limit of the request in seconds.
        """
        crc = _crc(data) if upload in self._with_crc else ""
        sent = {"ChecksumCRC32": crc} if crc else {"ContentMD5": _md5(data)[1]}
        reply = self._call(
            limit_s,
            "upload_part",
            Key=self.prefix + key,
            UploadId=upload,
            PartNumber=number,
            Body=memoryview(data),
            **sent,
        )
        digest = (
            _tagged(reply["ETag"]) if crc and reply.get("ChecksumCRC32") == crc else _md5(data)[0]
        )
        return Part(number, reply["ETag"], digest, crc)

    def complete(self, key: str, upload: str, parts: list[Part], limit_s: float) -> str:
        """Complete a multipart upload, so that the object appears; return the ETag it should have.

        Args:
            key: Key of the object.
            upload: Id that `begin` returned.
            parts: All parts, in order.
            limit_s: Time limit of the request in seconds.

        Raises:
            MissingError: The upload no longer exists: it was completed or aborted.
        """
        named = [
            {"PartNumber": part.number, "ETag": part.tag}
            | ({"ChecksumCRC32": part.checksum} if part.checksum else {})
            for part in parts
        ]
        self._call(
            limit_s,
            "complete_multipart_upload",
            Key=self.prefix + key,
            UploadId=upload,
            MultipartUpload={"Parts": named},
        )
        self._with_crc.discard(upload)
        return self.tag_of(parts)

    def tag_of(self, parts: list[Part]) -> str:
        """Return the ETag of an object that was uploaded in these parts."""
        return f"""{
            hashlib.md5(b"".join(part.digest for part in parts), usedforsecurity=False).hexdigest()
        }-{len(parts)}"""

    def abort(self, key: str, upload: str, limit_s: float) -> None:
        """Abort a multipart upload. Raises MissingError if it no longer exists."""
        self._with_crc.discard(upload)
        self._call(limit_s, "abort_multipart_upload", Key=self.prefix + key, UploadId=upload)

    def unfinished(self, limit_s: float) -> list[Unfinished]:
        """Return the multipart uploads under this prefix that were never completed."""
        uploads, marks = list[Unfinished](), dict[str, str]()
        while True:
            reply = self._call(limit_s, "list_multipart_uploads", Prefix=self.prefix, **marks)
            uploads += [
                Unfinished(
                    upload["Key"][len(self.prefix) :], upload["UploadId"], upload["Initiated"]
                )
                for upload in reply.get("Uploads", [])
                # A server may ignore the prefix. Uploads of others must never be aborted.
                if upload["Key"].startswith(self.prefix)
            ]
            if not reply.get("IsTruncated"):
                return uploads
            marks = {
                "KeyMarker": reply["NextKeyMarker"],
                "UploadIdMarker": reply["NextUploadIdMarker"],
            }


def _crc(data: bytes) -> str:
    """Return the CRC-32 of the data in S3's notation: big-endian, base64."""
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


def _tagged(tag: str) -> bytes:
    """Return the bytes of a part's ETag, which is the MD5 that the server computed, or b"".

    The ETag of an encrypted part is not an MD5. It is not compared with anything in that case.
    """
    try:
        return bytes.fromhex(tag.strip('"'))
    except ValueError:
        return b""


def _md5(data: bytes) -> tuple[bytes, str]:
    """Return the MD5 of the data as bytes and in base64."""
    digest = hashlib.md5(data, usedforsecurity=False).digest()
    return digest, base64.b64encode(digest).decode()


def _is_opaque(reply: dict[str, Any]) -> bool:
    """Return True if the ETag is not an MD5, since the object is encrypted with a user's key.

    The server has verified the checksum of each part all the same.
    """
    return reply.get("ServerSideEncryption") in ENCRYPTED or "SSECustomerAlgorithm" in reply
