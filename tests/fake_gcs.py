"""Google Cloud Storage in memory, behind the JSON API on a local port.

gcsfs, tensorstore and google-cloud-storage work against it, as `FakeGCS.environment` tells them. It
knows what they ask for: buckets that are there from the start, objects with generations and
preconditions, uploads in one piece, two parts or resumable ones, lists by prefix and page. It has
no batches, access control, versions or encryption.
"""

import base64
import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

# When every object was made: nothing here depends on the clock.
TIME = "2026-01-01T00:00:00.000Z"
# Most entries of a page, so that the clients have to turn pages.
PAGE = 50
OBJECT = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)(?P<action>/.*)?")
BUCKET = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)(?P<list>/o)?")
UPLOAD = re.compile(r"/(?:resumable/)?upload/storage/v1/b/(?P<bucket>[^/]+)/o")


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str):
        """Refuse with an HTTP status and what Google's answer would say."""
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Blob:
    """An object: its bytes, and the number of the write that made it."""

    data: bytes
    generation: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a client asks."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


@dataclasses.dataclass
class Answer:
    """What it is told."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, content: Any) -> "Answer":
        """JSON."""
        return cls(200, json.dumps(content).encode(), {"Content-Type": "application/json"})


@dataclasses.dataclass
class Upload:
    """A resumable upload that is not finished."""

    bucket: str
    name: str
    query: Mapping[str, str]
    data: bytes = b""


class FakeGCS:
    """The store.

    Attributes:
        buckets: name -> its objects by name; may be looked at and changed.
        requests: method and path of all that was asked, in order.
        fail: method, or "WRITE" for an object, and a part of the path -> status and message with
            which that is refused.
        url: where it listens.
    """

    def __init__(self, *buckets: str):
        """Hold some empty buckets."""
        self.buckets: dict[str, dict[str, Blob]] = {name: {} for name in buckets}
        self.requests: list[tuple[str, str]] = []
        self.fail: dict[tuple[str, str], tuple[int, str]] = {}
        self.url = ""
        self._uploads: dict[str, Upload] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which the clients find it, and look for no credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "of a test",  # tensorstore's
            "NO_GCE_CHECK": "true",  # gcsfs's
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # that asks by gRPC
        }

    def read(self, path: str) -> bytes:
        """The bytes at gs://BUCKET/NAME."""
        bucket, name = path.removeprefix("gs://").split("/", 1)
        return self.buckets[bucket][name].data

    def put(self, path: str, data: bytes) -> None:
        """Write what another process would."""
        bucket, name = path.removeprefix("gs://").split("/", 1)
        self.buckets[bucket][name] = Blob(data, next(self._numbers))

    def names(self, folder: str) -> list[str]:
        """Names of all objects below gs://BUCKET/NAME, relative to it."""
        bucket, _, prefix = folder.removeprefix("gs://").partition("/")
        start = f"{prefix.rstrip('/')}/" if prefix else ""
        return sorted(n.removeprefix(start) for n in self.buckets[bucket] if n.startswith(start))

    @contextlib.contextmanager
    def serving(self) -> Iterator["FakeGCS"]:
        """Answer on a free local port."""
        store = self

        class Handler(_Handler):
            gcs = store

        server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def answer(self, request: Request) -> Answer:
        """Answer a request; every one sees all those before it."""
        with self._lock:
            self.requests.append((request.method, request.path))
            try:
                self._refuse(request.method, unquote(request.path))
                return self._answer(request)
            except Refused as error:
                content = {"error": {"code": error.status, "message": str(error)}}
                return dataclasses.replace(Answer.of(content), status=error.status)

    def _answer(self, request: Request) -> Answer:
        path = request.path.removeprefix("/download")
        if found := UPLOAD.fullmatch(path):
            return self._upload(unquote(found["bucket"]), request)
        if found := OBJECT.fullmatch(path):
            bucket, name = unquote(found["bucket"]), unquote(found["name"])
            if found["action"]:
                return self._act(bucket, name, found["action"], request)
            return self._object(bucket, name, request)
        if found := BUCKET.fullmatch(path):
            bucket = unquote(found["bucket"])
            self._bucket(bucket)
            if found["list"]:
                return self._list(bucket, request.query)
            return Answer.of({"kind": "storage#bucket", "id": bucket, "name": bucket})
        raise Refused(404, f"{request.method} {request.path} is nothing that the fake knows")

    def _refuse(self, method: str, what: str) -> None:
        for (of, part), (status, message) in self.fail.items():
            if of == method and part in what:
                raise Refused(status, message)

    def _bucket(self, name: str) -> dict[str, Blob]:
        if name not in self.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        return self.buckets[name]

    def _blob(self, bucket: str, name: str) -> Blob:
        found = self._bucket(bucket).get(name)
        if found is None:
            raise Refused(404, f"No such object: {bucket}/{name}")
        return found

    def _write(self, bucket: str, name: str, data: bytes, query: Mapping[str, str]) -> Answer:
        blobs = self._bucket(bucket)
        self._refuse("WRITE", f"{bucket}/{name}")
        _check(query, blobs.get(name))
        blobs[name] = Blob(data, next(self._numbers))
        return Answer.of(_resource(bucket, name, blobs[name]))

    def _object(self, bucket: str, name: str, request: Request) -> Answer:
        """Read, describe or remove an object."""
        blob = self._blob(bucket, name)
        _check(request.query, blob)
        if request.method == "DELETE":
            del self.buckets[bucket][name]
            return Answer(204)
        if request.query.get("alt") != "media":
            return Answer.of(_resource(bucket, name, blob))
        return _media(blob, request.headers.get("Range", ""))

    def _act(self, bucket: str, name: str, action: str, request: Request) -> Answer:
        """Copy, move or compose."""
        kind, *target = (unquote(part) for part in action.strip("/").split("/"))
        if kind == "compose":
            sources = json.loads(request.body)["sourceObjects"]
            data = b"".join(self._blob(bucket, one["name"]).data for one in sources)
            return self._write(bucket, name, data, request.query)
        data = self._blob(bucket, name).data
        if kind == "moveTo":
            done = self._write(bucket, target[1], data, request.query)
            del self.buckets[bucket][name]
            return done
        done = self._write(target[1], target[3], data, request.query)
        if kind != "rewriteTo":
            return done
        said = {"done": True, "resource": json.loads(done.body), "objectSize": str(len(data))}
        return Answer.of({"kind": "storage#rewriteResponse", **said})

    def _list(self, bucket: str, query: Mapping[str, str]) -> Answer:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start, end = query.get("startOffset", ""), query.get("endOffset", "")
        entries: dict[str, Blob | None] = {}
        for name, blob in sorted(self._bucket(bucket).items()):
            if name.startswith(prefix) and name >= start and not (end and name >= end):
                head, found, _ = name.removeprefix(prefix).partition(delimiter or "\0")
                entries[prefix + head + found] = None if found else blob
        most = min(PAGE, int(query.get("maxResults", PAGE)))
        names = [name for name in entries if name > query.get("pageToken", "")]
        page = names[:most]
        content: dict[str, Any] = {"kind": "storage#objects"}
        content["prefixes"] = [name for name in page if entries[name] is None]
        found = ((name, entries[name]) for name in page)
        content["items"] = [_resource(bucket, name, blob) for name, blob in found if blob]
        if len(names) > most:
            content["nextPageToken"] = page[-1]
        return Answer.of(content)

    def _upload(self, bucket: str, request: Request) -> Answer:
        query = request.query
        if "upload_id" in query:
            return self._go_on(query["upload_id"], request)
        self._bucket(bucket)
        kind = query.get("uploadType")
        if kind == "media":
            return self._write(bucket, query["name"], request.body, query)
        if kind == "multipart":
            said, data = _two_parts(request)
            return self._write(bucket, json.loads(said)["name"], data, query)
        name = query.get("name") or json.loads(request.body)["name"]
        number = str(next(self._numbers))
        self._uploads[number] = Upload(bucket, name, query)
        where = f"{self.url}{request.path}?uploadType=resumable&upload_id={number}"
        return Answer(200, b"", {"Location": where})

    def _go_on(self, number: str, request: Request) -> Answer:
        """Take a part of a resumable upload: `bytes 0-9/*`, or `bytes 10-19/20` for the last."""
        upload = self._uploads.get(number)
        if upload is None:
            raise Refused(410, "the upload is gone")
        if request.method == "DELETE":
            del self._uploads[number]
            return Answer(499)
        told = request.headers.get("Content-Range", "").removeprefix("bytes ")
        span, _, total = told.partition("/")
        if span and span != "*" and int(span.split("-")[0]) != len(upload.data):
            raise Refused(400, f"expected bytes from {len(upload.data)} on, found {span}")
        upload.data += request.body
        if span and total in ("*", "") or total.isdigit() and len(upload.data) < int(total):
            known = {"Range": f"bytes=0-{len(upload.data) - 1}"} if upload.data else {}
            return Answer(308, b"", known)
        del self._uploads[number]
        return self._write(upload.bucket, upload.name, upload.data, upload.query)


def _check(query: Mapping[str, str], blob: Blob | None) -> None:
    """Heed preconditions."""
    generation = 0 if blob is None else blob.generation
    wanted = query.get("ifGenerationMatch") or query.get("generation")
    if wanted is not None and int(wanted) != generation:
        raise Refused(412, f"the generation is {generation}, not {wanted}")
    if query.get("ifGenerationNotMatch") == str(generation):
        raise Refused(304, "it is of that generation")


def _resource(bucket: str, name: str, blob: Blob) -> dict[str, Any]:
    """What Google says of an object."""
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{blob.generation}",
        "name": name,
        "bucket": bucket,
        "generation": str(blob.generation),
        "metageneration": "1",
        "contentType": "application/octet-stream",
        "size": str(len(blob.data)),
        "md5Hash": base64.b64encode(hashlib.md5(blob.data).digest()).decode(),
        "timeCreated": TIME,
        "updated": TIME,
    }


def _media(blob: Blob, span: str) -> Answer:
    """The bytes, or those of a `Range`."""
    headers = {"X-Goog-Generation": str(blob.generation)}
    if not span:
        return Answer(200, blob.data, headers)
    size, (first, last) = len(blob.data), span.removeprefix("bytes=").split("-")
    begin = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if begin >= size:
        raise Refused(416, "The requested range cannot be satisfied: not satisfiable.")
    headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
    return Answer(206, blob.data[begin:end], headers)


def _two_parts(request: Request) -> tuple[bytes, bytes]:
    """Split a multipart/related body into what is said of the object and its bytes."""
    boundary = request.headers["Content-Type"].partition("boundary=")[2].strip("\"'").encode()
    _, said, data, _ = request.body.split(b"--" + boundary)
    line = b"\r\n" if b"\r\n\r\n" in said else b"\n"
    said, data = (part.partition(line * 2)[2].removesuffix(line) for part in (said, data))
    return said, data


class _Server(ThreadingHTTPServer):
    """A server whose clients may go."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell of what went wrong here alone."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """HTTP around a store."""

    protocol_version = "HTTP/1.1"  # connections stay open
    disable_nagle_algorithm = True  # else every answer waits for 40 ms
    gcs: FakeGCS

    def _serve(self) -> None:
        url = urlsplit(self.path)
        body = self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else b""
        body = body or self.rfile.read(int(self.headers.get("Content-Length") or 0))
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        request = Request(
            method=self.command, path=url.path, query=query, headers=self.headers, body=body
        )
        answer = self.gcs.answer(request)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if answer.status not in (204, 304):
            self.wfile.write(answer.body)

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
