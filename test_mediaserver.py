"""What mediaserver does, section by section in the program's order.

Most tests speak HTTP with the real program, started as a user starts it; parsers are fed directly.
A test whose tool (Pillow, nginx, ...) is missing is skipped, and fails where CI is set.
"""

from __future__ import annotations

import ast
import base64
import calendar
import contextlib
import errno
import fcntl
import functools
import gzip
import hashlib
import hmac
import http.client
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import mmap
import os
import py_compile
import queue
import random
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
import types
import unicodedata
import urllib.error
import urllib.request
import uuid
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import quote, urlencode, urljoin, urlsplit

import pytest

import mediaserver as ms

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "mediaserver.py"
# What the program goes on as, by itself: to begin there saves a compilation each time.
BYTECODE = py_compile.compile(str(PROGRAM), doraise=True)
DEADLINE = 120.0  # seconds that anything awaited may take: some of it runs when nobody else does
RUN_SECONDS = 900.0  # that a program which ends by itself may run, on a machine that is busy
PROGRAMS = {
    "aria2c", "caddy", "cc", "chromedriver", "chromium", "curl", "exiftool", "faketime", "ffmpeg",
    "haproxy", "litestream", "nginx", "node", "openapi-python-client", "openssl", "promtool",
    "rclone", "rsync", "schemathesis", "setfacl", "shellcheck", "systemd-analyze", "unshare",
    "varnishd", "wget",
}  # fmt: skip


def need(tool: str) -> Any:
    """Skip where a program or module is missing; fail where CI is set. Returns path or module."""
    if tool in PROGRAMS:
        own = Path(sys.executable).parent  # of what pip installs
        found: Any = shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:{own}")
    else:
        try:
            found = importlib.import_module(tool)
        except ImportError:
            found = None
    return miss(tool) if found is None else found


def node_package(name: str) -> Path:
    """Return the folder of an npm package; skip where it is missing, fail where CI is set."""
    places = os.environ.get("NODE_PATH") or "/usr/lib/node_modules:/usr/local/lib/node_modules"
    found = [Path(place, name) for place in places.split(":") if Path(place, name).is_dir()]
    return found[0] if found else miss(name)


def once() -> None:
    """Skip what no Python under test has a part in, where .ci/run tests it with another one."""
    if os.environ.get("TEST_ONCE") == "elsewhere":
        pytest.skip("tested with another Python")


@pytest.fixture(autouse=True)
def with_workers(request: pytest.FixtureRequest) -> None:
    """Skip what has no use for several workers where every server has them."""
    if WORKERS and not {"tmp_path", "tmp_path_factory"} & {*request.fixturenames}:
        pytest.skip("starts no server, which alone has workers")


def miss(tool: str) -> NoReturn:
    """Skip a test without its tool; fail where CI is set."""
    if os.environ.get("CI"):
        pytest.fail(f"{tool} is not installed")
    pytest.skip(f"{tool} is not installed")


def wait_until(condition: Callable[[], Any], what: str = "") -> Any:
    """The first true value of `condition`; fails when it does not come in time."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    pytest.fail(f"waited in vain for {what or condition}")


def left_arriving(storage: Path) -> set[Path]:
    """The files of uploads that have not come to an end; what a decoder writes is none of them."""
    found = {*storage.rglob(".incoming/*")}
    return {path for path in found if path.is_file() and ".thumbnails" not in path.parts}


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(0)` … `work(count - 1)` return, all begun at the same moment."""
    barrier = threading.Barrier(count)

    def run(number: int) -> Any:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


# -- Sample media, made by hand ---------------------------------------------------------

SERIAL = itertools.count(time.time_ns())


def unique() -> bytes:
    """Bytes that no other sample has."""
    return str(next(SERIAL)).encode()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(
    *chunks: tuple[bytes, bytes], size: tuple[int, int] = (40, 30), depth: int = 8, colour: int = 2
) -> bytes:
    """A PNG of these chunks behind its header: bits a channel, and the type of colour."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    whole = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in whole)


def png(width: int = 3, height: int = 2, padding: int = 0) -> bytes:
    """A PNG unlike all others; `padding` adds so many bytes."""
    text = b"Comment\0" + unique() + bytes(padding)
    rows = zlib.compress((b"\0" + b"\x20\x80\xe0" * width) * height)
    return png_with((b"tEXt", text), (b"IDAT", rows), size=(width, height))


def png_of(size: int) -> bytes:
    """A PNG of exactly this many bytes."""
    return png(padding=size - len(png()))


def gif() -> bytes:
    note = unique()
    return (
        b"GIF89a\x01\0\x01\0\x80\0\0\xff\xff\xff\0\0\0"
        b"\x21\xfe" + bytes([len(note)]) + note + b"\0"
        b"\x2c\0\0\0\0\x01\0\x01\0\0\x02\x02\x44\x01\0\x3b"
    )


def bmp() -> bytes:
    pixel = struct.pack("<I", next(SERIAL) % 0xFFFFFF)
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", 58, 0, 54, 40, 1, 1, 1, 24, *[0] * 6) + pixel


def webp() -> bytes:
    lossless = bytes.fromhex("5650384c0d0000002f00000010071011118888fe0700")
    note = unique()
    extra = b"NOTE" + struct.pack("<I", len(note)) + note + b"\0" * (len(note) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(lossless) + len(extra)) + b"WEBP" + lossless + extra


def svg(content: str = "") -> bytes:
    text = f'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">{content}</svg>'
    return b'<?xml version="1.0"?>\n<!-- ' + unique() + b" -->\n" + text.encode()


def exif(date: str = "", orientation: int = 1) -> bytes:
    """An Exif block: orientation, and DateTimeOriginal if there is a date (EXIF 2.32, 4.6)."""
    entry = struct.Struct("<HHII")
    main = [entry.pack(0x0112, 3, 1, orientation)]
    detail = b""
    if date:
        main.append(entry.pack(0x8769, 4, 1, 8 + 2 + 24 + 4))
        detail = struct.pack("<H", 1) + entry.pack(0x9003, 2, 20, 38 + 18) + bytes(4)
        detail += date.encode() + b"\0"
    directory = struct.pack("<H", len(main)) + b"".join(main) + bytes(4)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory + detail


def jpeg_segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def jpeg(width: int = 16, height: int = 8, **tags: Any) -> bytes:
    """A grey baseline JPEG, with Exif if `date` or `orientation` is given."""
    one_code = bytes([1, *[0] * 15, 0])  # a single Huffman code, "0", for the symbol 0
    blocks = -(-width // 8) * -(-height // 8)
    bits = "00" * blocks  # of each block: no difference, end of block
    bits += "1" * (-len(bits) % 8)
    return b"".join(
        [
            b"\xff\xd8",
            jpeg_segment(0xE1, exif(**tags)) if tags else b"",
            jpeg_segment(0xFE, unique()),
            jpeg_segment(0xDB, b"\0" + b"\x01" * 64),
            jpeg_segment(0xC0, struct.pack(">BHHBBBB", 8, height, width, 1, 1, 0x11, 0)),
            jpeg_segment(0xC4, b"\x00" + one_code + b"\x10" + one_code),
            jpeg_segment(0xDA, b"\x01\x01\x00\x00\x3f\x00"),
            int(bits, 2).to_bytes(len(bits) // 8, "big"),
            b"\xff\xd9",
        ]
    )


def mp4() -> bytes:
    brand = b"isom\0\0\x02\0isomiso2mp41"
    note = unique()
    return b"".join(
        struct.pack(">I", 8 + len(data)) + kind + data
        for kind, data in ((b"ftyp", brand), (b"free", note), (b"mdat", bytes(8)))
    )


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# -- The program, and how to speak with it -----------------------------------------------

OWNER_KEY, UPLOAD_SECRET, JWT_KEY = "owner's key", "upload secret", "jwt key " * 4
OWNER = {"Authorization": f"Bearer {OWNER_KEY}"}
SECRETS = {
    "AUTH_TOKEN": OWNER_KEY,
    "MEDIA_SERVER_SECRET": UPLOAD_SECRET,
    "JWT_SIGNING_KEY": JWT_KEY,
}
SETTING_NAMES = {name.upper() for name in ms.SETTINGS}
BARE_ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in SETTING_NAMES}


def bearer(**claims: Any) -> dict[str, str]:
    """The header of an access token with these claims, of an account that is not here."""
    full = {"token_type": "access", "exp": time.time() + 86400, "user_id": 10**9 + 7, **claims}
    return {"Authorization": f"Bearer {ms.sign_jwt(full, JWT_KEY)}"}


def upload_token(age: float = 0, secret: str = UPLOAD_SECRET) -> str:
    ts = str(int(time.time() - age))
    return f"{ts}.{hmac.new(secret.encode(), ts.encode(), hashlib.sha256).hexdigest()}"


READER = bearer(permissions=["media_store_read"])
WRITER = bearer(permissions=["media_store_write"])


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def form(
    filename: str | None, content: bytes | None, field: str = "file", **texts: object
) -> tuple[bytes, str]:
    """A multipart body of text fields and (unless `content` is None) a file; its Content-Type."""
    parts = [(f'name="{name}"', str(text).encode()) for name, text in texts.items()]
    if content is not None:
        named = "" if filename is None else f'; filename="{filename}"'
        parts.append((f'name="{field}"{named}', content))
    body = b"".join(
        f"--frontier\r\nContent-Disposition: form-data; {name}\r\n\r\n".encode() + value + b"\r\n"
        for name, value in parts
    )
    return body + b"--frontier--\r\n", "multipart/form-data; boundary=frontier"


# TEST_WORKERS=2 pytest: the same tests, with two processes behind every port.
WORKERS = ["--workers", os.environ["TEST_WORKERS"]] if "TEST_WORKERS" in os.environ else []


FORK = """
import fcntl, importlib.util, json, os, signal, subprocess, sys, time
spec = importlib.util.spec_from_file_location("mediaserver", sys.argv[1])
sys.modules["mediaserver"] = program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
for line in sys.stdin:
    what, *words = json.loads(line)
    if what == "poll":
        ended, status = os.waitpid(words[0], os.WNOHANG)
        print(os.waitstatus_to_exitcode(status) if ended else None, flush=True)
    elif child := os.fork():
        print(child, flush=True)
    else:
        sys.argv[1:], environment, folder, log, constants = words
        vars(program).update(constants)
        null = os.open(os.devnull, os.O_RDWR)
        for number, file in enumerate((null, null, os.open(log, os.O_WRONLY))):
            os.dup2(file, number)
        os.closerange(3, 100)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        time.tzset()
        signal.pthread_sigmask(signal.SIG_BLOCK, program.SIGNALS - {signal.SIGCHLD})
        sys.exit(program.main())
"""


class Forked:
    """A server as Popen has it, forked where the program has been loaded: 0.02 s, not 0.1."""

    parent: subprocess.Popen[str] | None = None
    lock = threading.Lock()

    def __init__(self, *words: Any) -> None:
        self.returncode: int | None = None
        self.pid: int = self.ask("start", *words)

    @classmethod
    def ask(cls, *words: Any) -> Any:
        with cls.lock:
            if cls.parent is None:
                pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
                command = [sys.executable, "-c", FORK, BYTECODE]
                cls.parent = subprocess.Popen(command, env=BARE_ENVIRONMENT, **pipes)
            assert cls.parent.stdin and cls.parent.stdout
            print(json.dumps(words), file=cls.parent.stdin, flush=True)
            return json.loads(cls.parent.stdout.readline().replace("None", "null"))

    @classmethod
    def end(cls) -> None:
        if cls.parent is not None:
            cls.parent.communicate()
            cls.parent = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.ask("poll", self.pid)
        return self.returncode

    def wait(self, timeout: float = DEADLINE) -> int:
        if self.returncode is None:
            descriptor = os.pidfd_open(self.pid)
            select.select([descriptor], [], [], timeout)
            os.close(descriptor)
            assert self.poll() is not None, "it does not end"
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """A running mediaserver; stopping it checks that it ends as it should."""

    def __init__(
        self,
        storage: Path,
        /,
        *options: str,
        is_forked: bool = False,
        constants: Mapping[str, float] | None = None,
        **environment: str,
    ) -> None:
        """Start it; `constants` are the program's that have other values, if it is forked."""
        self.storage = storage
        self.data = storage / ".mediaserver"
        home = Path(environment.pop("cwd", storage.parent))
        home.mkdir(parents=True, exist_ok=True)
        self.log_file = home / f"{unique().decode()}.log"
        words = ["--storage_dir", str(storage), "--port", "0", *WORKERS, *options]
        environment = {**BARE_ENVIRONMENT, **SECRETS, **environment}
        self.log_file.touch()
        self.process: Any
        if is_forked:
            self.process = Forked(
                words, environment, str(home), str(self.log_file), constants or {}
            )
        else:
            with self.log_file.open("w") as log:
                self.process = subprocess.Popen(
                    [sys.executable, BYTECODE, *words], env=environment, cwd=home,
                    stdin=subprocess.DEVNULL, stderr=log,
                )  # fmt: skip
        self.port = int(wait_until(self._find_port, "the line that says the server is ready"))

    @property
    def log(self) -> str:
        """What it has said on standard error."""
        return self.log_file.read_text("utf-8")

    def _find_port(self) -> str:
        ended = self.process.poll() is not None
        if found := re.search(r"^mediaserver: listening on http://\S+:(\d+)\n", self.log, re.M):
            return found[1]
        if ended:
            pytest.fail(f"the server ended: {self.log}")
        return ""

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(DEADLINE) == 0, self.log
        assert "Traceback" not in self.log

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, source: str) -> http.client.HTTPConnection:
        address = ("127.0.0.1", self.port)
        return http.client.HTTPConnection(*address, DEADLINE, (source, 0))

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        source: str = "127.0.0.1",
    ) -> Answer:
        connection = self.connect(source)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.request(
            "GET", path, headers={k.replace("_", "-"): headers[k] for k in headers}
        )

    def call(
        self, method: str, path: str, value: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and JSON (or None) of the answer to a request with a JSON body."""
        body, fields = None, dict(headers or {})
        if value is not None:
            body, fields["Content-Type"] = json.dumps(value), "application/json"
        answer = self.request(method, path, body, fields)
        return answer.status, answer.json if answer.body else None

    def send_file(
        self,
        method: str,
        path: str,
        content: bytes | None,
        filename: str | None = "a.png",
        headers: Mapping[str, str] = OWNER,
        *,
        field: str = "file",
        **texts: object,
    ) -> Answer:
        """The answer to a form with a file, if there is content, and with texts."""
        body, content_type = form(filename, content, field, **texts)
        return self.request(method, path, body, {"Content-Type": content_type, **headers})

    @contextlib.contextmanager
    def index(self) -> Iterator[sqlite3.Connection]:
        """Its index, open; what is changed there is committed at the end."""
        index = sqlite3.connect(self.data / "index.sqlite3", timeout=DEADLINE)
        with contextlib.closing(index), index:
            yield index

    def upload(self, content: bytes, filename: str | None = "a.png") -> Answer:
        return self.send_file("POST", "/upload", content, filename)

    def put(self, path: str, content: bytes, filename: str | None = "form.png") -> Answer:
        return self.send_file("PUT", path, content, filename)

    def store(self, content: bytes, filename: str | None = "a.png") -> Answer:
        return self.send_file("POST", "/upload-image", content, filename)

    def listed(self) -> dict[str, Any]:
        return dict(self.get("/list", **OWNER).json)

    def scanned(self, after: float | None = None) -> Any:
        """Wait for the end of a scan that ended later than `after`; its health answer."""

        def finished() -> Any:
            health = self.get("/health").json
            scan = health["scan"]
            return (
                health if not scan["running"] and scan["finished_at"] not in {None, after} else 0
            )

        return wait_until(finished, "the end of a scan")

    def rescan(self) -> Any:
        before = self.scanned()["scan"]["finished_at"]
        self.process.send_signal(signal.SIGHUP)
        return self.scanned(before)


class Raw:
    """A connection on which exactly the given bytes are sent."""

    def __init__(self, server: Server) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), DEADLINE)
        self.received = b""

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def _more(self) -> None:
        data = self.socket.recv(65536)
        assert data, f"the connection was closed after {self.received!r}"
        self.received += data

    def _take(self, count: int) -> bytes:
        while len(self.received) < count:
            self._more()
        data, self.received = self.received[:count], self.received[count:]
        return data

    def _take_to(self, mark: bytes) -> bytes:
        while mark not in self.received:
            self._more()
        return self._take(self.received.index(mark) + len(mark))

    def answer(self, method: str = "GET") -> Answer:
        """The next answer; it must have a length."""
        line, _, block = self._take_to(b"\r\n\r\n").partition(b"\r\n")
        status = int(line.split()[1])
        headers = http.client.parse_headers(io.BytesIO(block))
        length = 0 if method == "HEAD" or status < 200 or status in {204, 304} else None
        if length is None:
            length = int(headers["Content-Length"])
        return Answer(status, headers, self._take(length))

    def is_closed(self) -> bool:
        """Whether the other side closes, without another byte."""
        try:
            return self.received == b"" and self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that leave no more behind than files of their own."""
    with Server(tmp_path_factory.mktemp("shared") / "pictures") as running:
        running.scanned()
        yield running


@pytest.fixture(scope="session")
def forks() -> Iterator[None]:
    yield
    Forked.end()


@pytest.fixture
def start(tmp_path: Path, forks: None) -> Iterator[Callable[..., Server]]:
    """Start servers of this test's own: `start(setting="value", ...)`, all on one folder."""
    running: list[Server] = []

    def start_server(
        *options: str,
        is_forked: bool = True,
        constants: Mapping[str, float] | None = None,
        **environment: str,
    ) -> Server:
        environment = {k if k == "cwd" else k.upper(): v for k, v in environment.items()}
        storage = Path(environment.pop("STORAGE", tmp_path / "pictures"))
        is_forked = is_forked and not {"LD_PRELOAD", "PYTHONPATH"} & {*environment}
        more: Any = {"is_forked": is_forked, "constants": constants}
        running.append(Server(storage, *options, **more, **environment))
        return running[-1]

    yield start_server
    for item in running:
        item.__exit__()


def run_program(*arguments: object, cwd: Path, stdin: str = "", **environment: str) -> Any:
    """Run the program to its end; it must end by itself."""
    return subprocess.run(
        [sys.executable, BYTECODE, *map(str, arguments)],
        env={**BARE_ENVIRONMENT, **environment},
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )


# ======================================================================================
# 1. Settings
# ======================================================================================


@pytest.fixture
def settings_of(tmp_path, monkeypatch):
    """The settings of a command line, an environment and a `.env`, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in SETTING_NAMES:
        monkeypatch.delenv(name, raising=False)

    def load(*options: str, dotenv: str = "", **environment: str) -> ms.Settings:
        (tmp_path / ".env").write_text(dotenv, "utf-8")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return ms.parse_command_line(list(options))[1]

    return load


def test_the_command_line_wins_over_the_environment_over_dotenv_over_the_default(settings_of):
    storage = ["--storage_dir", "x"]
    assert settings_of(*storage).max_upload_bytes == 10485760
    assert settings_of(*storage, dotenv="MAX_UPLOAD_BYTES=1").max_upload_bytes == 1
    layers = {"dotenv": "MAX_UPLOAD_BYTES=1", "MAX_UPLOAD_BYTES": "2"}
    assert settings_of(*storage, **layers).max_upload_bytes == 2
    assert settings_of(*storage, "--max_upload_bytes", "3", **layers).max_upload_bytes == 3


def test_the_storage_folder_may_come_from_the_environment_and_places_follow_it(settings_of):
    settings = settings_of(STORAGE_DIR="/a/b")
    assert settings.storage_dir == Path("/a/b")
    assert settings.database_dir == Path("/a/b/.mediaserver")
    assert settings.upload_dir == Path("/a/b/.mediaserver/images")
    assert settings.media_storage_dir == Path("/a/b/.mediaserver/entities")
    assert settings_of("--storage-dir=/c", STORAGE_DIR="/a/b").storage_dir == Path("/c")
    assert settings_of("--database_dir=/d").upload_dir == Path("/d/images")


SAMPLE_SETTINGS = {
    "database_url": "sqlite:////x", "public_url": "http://x", "public_key_path": "/x",
    "cors_allow_origins": "http://x", "upload_tokens": "Scoped", "reserve_bytes": "7",
    "log_format": "JSON", "media_dir": "s3://family/photos",
    "aws_endpoint_url": "http://127.0.0.1:9000", "read_only": "http://127.0.0.1:9000",
}  # fmt: skip
SAMPLE_TEXTS = {
    bool: "true", int: "7", float: "7", str: "127.0.0.1", Path: "/x", tuple: "10.0.0.1",
}  # fmt: skip


@pytest.mark.parametrize(("name", "spec"), ms.SETTINGS.items(), ids=ms.SETTINGS)
def test_every_setting_but_the_secrets_is_a_long_option_with_either_stroke(
    settings_of, name, spec
):
    fitting = [text for kind, text in SAMPLE_TEXTS.items() if isinstance(spec.default, kind)]
    text = SAMPLE_SETTINGS.get(name) or fitting[0]
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    for spelled in {name, name.replace("_", "-"), name.replace("_", "-", 1)}:
        arguments = ["--storage_dir", "/s", f"--{spelled}", text]
        if spec.secret:
            with pytest.raises(SystemExit, match=r"^2$"):
                settings_of(*arguments)
        else:
            assert getattr(settings_of(*arguments, **keys), name) == spec.parse(text), spelled


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("1", True), ("YES", True), ("On", True), ("", False)]
    + [(text, False) for text in ("false", "0", "No", "OFF")],
)
def test_booleans_are_read_in_any_case_and_empty_counts_as_not_given(settings_of, text, value):
    assert settings_of("--storage_dir", "x", SLUGIFY_FILENAMES=text).slugify_filenames is value


def test_an_empty_value_lets_the_next_layer_speak(settings_of):
    settings = settings_of(
        "--storage_dir", "x", MAX_UPLOAD_BYTES="", dotenv="MAX_UPLOAD_BYTES=5\nPUBLIC_URL="
    )
    assert settings.max_upload_bytes == 5
    assert settings.public_url == ""
    assert settings_of("--storage_dir", "x", CORS_ALLOW_ORIGINS="").cors_allow_origins == ()


DOTENV_TABLE = [
    ("A=1", {"A": "1"}), ("A = 1 ", {"A": "1"}), ("export A=1", {"A": "1"}),
    ("# A=1\n\nB=2", {"B": "2"}), ("A=1 # one", {"A": "1"}), ("A=1#one", {"A": "1#one"}),
    ("A='1 # one' # two", {"A": "1 # one"}), ('A="x\\ny\\"z"', {"A": 'x\ny"z'}),
    ("A='x\\ny\\'z'", {"A": "x\\ny'z"}), ('A="x\ny"\nB=2', {"A": "x\ny", "B": "2"}),
    ("A=x y  z", {"A": "x y  z"}), ("A=", {"A": ""}), ("A=b=c", {"A": "b=c"}),
    ("A=1\nA=2", {"A": "2"}), ("A=1\nB=${A}2", {"A": "1", "B": "12"}),
    ("B=${NONE:-x}${NONE}", {"B": "x"}), ("B=$A", {"B": "$A"}),
    ("A=1\r\nB=2\r\n", {"A": "1", "B": "2"}), ("A=é", {"A": "é"}), ("'A'=1", {"A": "1"}),
    ("A= # one\nB=\t#", {"A": "", "B": ""}), ("A='x\\\\'\nB='y'", {"A": "x\\", "B": "y"}),
    ("'A=1\nB=2", {"B": "2"}), ("export =1", {}), ("A=#1", {"A": "#1"}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "values"), DOTENV_TABLE)
def test_dotenv_is_read(text, values):
    assert ms.parse_dotenv(text, {}) == values


@pytest.mark.parametrize("text", [text for text, _ in DOTENV_TABLE])
def test_python_dotenv_reads_dotenv_like_us(text):
    theirs = need("dotenv").dotenv_values(stream=io.StringIO(text), interpolate=True)
    assert ms.parse_dotenv(text, os.environ) == {k: v for k, v in theirs.items() if v is not None}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "x"), ("PORT", "65536"), ("PORT", "-1"), ("RESCAN_INTERVAL", "-1"),
        ("RESCAN_INTERVAL", "nan"), ("WORKERS", "0"), ("UPLOAD_TOKENS", "none"),
        ("TOKEN_EXPIRY_SECONDS", "1.5"),
        ("TOKEN_EXPIRY_SECONDS", "0"), ("MAX_UPLOAD_BYTES", "10 MB"), ("MAX_MEDIA_BYTES", "-5"),
        ("MAX_MEDIA_BYTES", "9" * 5000), ("JWT_ACCESS_TOKEN_LIFETIME_MINUTES", "\u0663"),
        ("JWT_REFRESH_TOKEN_LIFETIME_DAYS", "one"), ("SLUGIFY_FILENAMES", "maybe"),
        ("AUTH_DISABLED", "2"), ("READ_AUTH_ENABLED", "ja"), ("ALLOW_REGISTRATION", "t"),
        ("DATABASE_URL", "postgresql://localhost/media"),
        ("DATABASE_URL", "mysql+pymysql://localhost/media"), ("DATABASE_URL", "index.sqlite3"),
        ("DATABASE_DIR", "S3://family/data"), ("UPLOAD_DIR", "s3://a/b"),
        ("DATABASE_URL", "sqlite://"), ("PUBLIC_URL", "photos.example.org"),
        ("PUBLIC_URL", "http://x/\r\nX: y"), ("TRUSTED_PROXIES", "nginx"),
        ("PUBLIC_URL", "https://中.example"), ("PUBLIC_URL", "https://me@photos.example"),
        ("CORS_ALLOW_ORIGINS", "https://a.example/path"), ("AUTH_TOKEN", ""),
        ("MEDIA_SERVER_SECRET", " "), ("JWT_SIGNING_KEY", "\t"),
    ],
)  # fmt: skip
def test_a_bad_value_stops_the_start_with_its_name_and_exit_2(
    settings_of, capsys, monkeypatch, name, value
):
    options = ["--storage_dir", "x"]
    if name in {"PORT", "RESCAN_INTERVAL", "WORKERS"}:
        options.append(f"--{name.lower()}={value}")
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        sys.exit(ms.main(options))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert name in error
    assert "Traceback" not in error
    if "://" in value and name == "DATABASE_URL":
        assert value.partition(":")[0] in error
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "usage"), ("--storage_dir", "usage"), ("--storage_dir x --colour red", "--colour"),
        ("--storage_dir x --auth_token x", "--auth_token"), ("dance --storage_dir x", "dance"),
        ("--storage_dir x --max_upload 5", "--max_upload"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_exits_2_and_says_why(settings_of, capsys, arguments, said):
    with pytest.raises(SystemExit) as caught:
        sys.exit(ms.main(arguments.split()))
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ([], {}, "usage"), (["--storage_dir", PROGRAM], {}, "STORAGE_DIR"),
        (["--storage_dir", "x", "--host", "203.0.113.1"], {}, "HOST"),
        (["--storage_dir", "x", "--port", "0"], {"DATABASE_URL": "sqlite:///."}, "DATABASE_URL"),
        *(
            (["--storage_dir", "x", "--port", "0"], {"PUBLIC_KEY_PATH": name}, "PUBLIC_KEY_PATH")
            for name in ("missing.pem", str(PROGRAM))
        ),
    ],
)  # fmt: skip
def test_what_cannot_start_exits_2_and_says_why(tmp_path, arguments, environment, said):
    ended = run_program(*arguments, cwd=tmp_path, **environment)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [("secrets.env", "secrets.env: cannot be read"), ("own.db", "the index cannot be opened")],
)
def test_a_pipe_in_the_place_of_the_secrets_or_the_index_stops_the_start(tmp_path, name, said):
    data = tmp_path / "pictures" / ".mediaserver"
    data.mkdir(parents=True)
    os.mkfifo(data / name)
    url = f"sqlite:///{data / 'own.db'}"
    at = ["--storage_dir", data.parent, "--database_url", url, "--port", "0"]
    ended = run_program(*at, cwd=tmp_path)
    assert (ended.returncode, said in ended.stderr) == (2, True)


@pytest.mark.parametrize("is_pipe", [True, False])
@pytest.mark.parametrize(("name", "said"), [(".env", ".env"), ("key.pem", "PUBLIC_KEY_PATH")])
def test_a_pipe_or_a_device_in_a_file_s_place_holds_up_no_start(tmp_path, name, said, is_pipe):
    if is_pipe:
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    ended = run_program(
        "--storage_dir", "x", "--port", "0", cwd=tmp_path,
        **({"PUBLIC_KEY_PATH": name} if name == "key.pem" else {}),
    )  # fmt: skip
    assert (ended.returncode, said in ended.stderr) == (2, True)
    assert "no regular file" in ended.stderr


@pytest.mark.parametrize(("command", "version"), [("serve", 0), ("serve", 3), ("trash empty", 0)])
def test_another_program_s_database_is_no_index_and_stays_as_it_is(tmp_path, command, version):
    theirs = tmp_path / "theirs.sqlite3"
    (tmp_path / "x").mkdir()
    make_database(theirs, {"user": [{"id": 1, "name": "x"}], "django_migrations": [{"id": 1}]})
    with contextlib.closing(sqlite3.connect(theirs)) as db:
        db.execute(f"PRAGMA user_version = {version}")
    before = theirs.read_bytes()
    words = (*command.split(), "--storage_dir", "x", *(["--port", "0"] * (command == "serve")))
    ended = run_program(*words, cwd=tmp_path, DATABASE_URL=f"sqlite:///{theirs}")
    assert (ended.returncode, "another program's" in ended.stderr) == (2, True)
    assert theirs.read_bytes() == before
    assert not {path.name for path in tmp_path.iterdir()} - {"x", theirs.name}


@pytest.mark.parametrize("content", [b"some notes\n" * 100, b"x", bytes(range(1, 256)) * 80])
def test_a_file_that_was_never_an_index_stays_as_it_is(tmp_path, content):
    theirs = tmp_path / "notes.txt"
    theirs.write_bytes(content)
    (tmp_path / "x").mkdir()
    url = f"sqlite:///{theirs}"
    ended = run_program("--storage_dir", "x", "--port", "0", cwd=tmp_path, DATABASE_URL=url)
    assert (ended.returncode, "was never an index" in ended.stderr) == (2, True), ended.stderr
    assert theirs.read_bytes() == content
    assert {path.name for path in tmp_path.iterdir()} == {"x", theirs.name}


def test_an_index_of_another_name_is_rebuilt_when_it_is_damaged(start, tmp_path):
    place = tmp_path / "elsewhere.db"
    running = start(database_url=f"sqlite:///{place}")
    running.stop()
    place.write_bytes(b"not what it was" * 1000)
    assert start(database_url=f"sqlite:///{place}").get("/health").status == 200
    assert [*tmp_path.glob("elsewhere.db.damaged-*")]


def test_a_folder_that_knows_no_locks_is_not_told_as_another_server(tmp_path, monkeypatch):
    settings = ms.load_settings({"storage_dir": str(tmp_path)}, {}, {})
    ms.make_folders(settings)
    monkeypatch.setattr(ms.fcntl, "flock", failing(ms.fcntl.flock, OSError(errno.ENOLCK, "none")))
    with pytest.raises(ms.SettingError, match="cannot be used: none"), ms.usable_places(settings):
        ms.lock_data_dir(settings)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_server_that_is_told_to_stop_says_so_in_one_line(start, workers):
    running = start(workers=workers)
    assert "stopped" not in running.log
    running.stop()
    assert running.log.endswith("\nmediaserver: stopped, as it was told to\n")


def test_a_line_of_a_dotenv_that_cannot_be_read_is_told_once(tmp_path):
    (tmp_path / ".env").write_text("QUIET=false\n=x\n")
    environment = {**BARE_ENVIRONMENT, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, PROGRAM, "--storage_dir", "x", "--port", "0"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        said = ""
        while "upload a picture" not in said:
            said += process.stderr.readline()
        process.terminate()
    assert said.count("mediaserver: .env: cannot read the line that begins at '=x'") == 1


def test_a_folder_may_stand_alone(settings_of, capsys, monkeypatch):
    Path("Pictures").mkdir()
    assert settings_of("Pictures").storage_dir == Path("Pictures").absolute()
    assert settings_of("Pictures", "--port", "0").port == 0
    monkeypatch.setenv("HOME", os.getcwd())
    assert settings_of("~/Pictures").storage_dir == Path("Pictures").absolute()
    with pytest.raises(SystemExit):
        settings_of("Pictures", "Pictures")
    assert "one folder too many" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["user", "disable", "--", "-jane"], "-jane"),
        (["user", "disable", "jane", "--"], "jane"),
        (["--", "user", "disable", "jane"], "jane"),
    ],
)
def test_what_follows_two_dashes_is_a_word(settings_of, words, name):
    run, _ = ms.parse_command_line(["--storage_dir", "x", *words])
    assert run.keywords == {"name": name}


def test_two_dashes_keep_a_folder_from_being_the_value_of_a_flag(settings_of):
    Path("Pictures").mkdir()
    settings = settings_of("--slugify_filenames", "--", "Pictures")
    assert settings.slugify_filenames
    assert settings.storage_dir == Path("Pictures").absolute()


@pytest.mark.parametrize("words", [["Picture"], ["user"], ["usr", "list"]], ids=" ".join)
def test_words_that_are_neither_folder_nor_command_are_told_the_commands(
    settings_of, capsys, words
):
    with pytest.raises(SystemExit) as caught:
        settings_of(*words)
    assert (caught.value.code, "token" in capsys.readouterr().err) == (2, True)


def test_what_was_meant_as_a_setting_but_has_no_effect_gets_a_warning(settings_of, capsys):
    settings_of("--storage_dir", "x", dotenv="AUTH_TOKN=secret\nPORT=1\nEDITOR=vi", HOST="::")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert "AUTH_TOKN" in said[0]
    assert "AUTH_TOKEN" in said[0]
    assert "PORT" in said[1]
    assert "HOST in the environment" in said[2]
    assert "secret" not in "".join(said)
    settings_of("--storage_dir", "x", "--host", "::1", dotenv="MAX_UPLOAD_BYTES=5", HOST="::")
    assert "HOST in the environment" in capsys.readouterr().err
    settings_of("--storage_dir", "x", dotenv="MAX_UPLOAD_BYTES=5", HOST="")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "words", [["token"], ["user", "list"], ["user", "grant", "a", "media_store_read"]]
)
def test_a_command_on_a_folder_that_is_not_there_says_so_and_makes_nothing(tmp_path, words):
    ended = run_program(*words, "--storage_dir", tmp_path / "Pictrues", cwd=tmp_path)
    assert ended.returncode == 2
    assert "STORAGE_DIR" in ended.stderr
    assert "not there" in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "in_the_way"),
    [
        ("DATABASE_DIR", "lock/x"), ("DATABASE_URL", "index.sqlite3/x"),
        ("UPLOAD_DIR", "images/.incoming"), ("MEDIA_STORAGE_DIR", "entities"),
    ],
)  # fmt: skip
def test_a_place_that_cannot_be_used_stops_the_start_with_its_setting(
    tmp_path, setting, in_the_way
):
    pictures, data = tmp_path / "pictures", tmp_path / "data"
    fill(data, {in_the_way: b"no folder, or one that should be a file"})
    at = ["--storage_dir", pictures, "--database_dir", data, "--port", 0]
    ended = run_program(*at, cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert f"mediaserver: {setting}: " in ended.stderr
    assert "Traceback" not in ended.stderr


def test_no_process_of_the_server_shows_a_secret_in_its_environment(start):
    running = start(is_forked=False)
    wait_until(lambda: "scanning" in running.log)
    group = [running.process.pid]
    for task in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = task.read_text().rpartition(")")[2].split()
            if int(fields[1]) in group:
                group.append(int(task.parent.name))
    for process in group:
        shown = Path(f"/proc/{process}/environ").read_bytes()
        assert b"AUTH_TOKEN=" in shown  # it was given that way
        assert [name for name, value in SECRETS.items() if value.encode() in shown] == []


def test_a_python_that_is_too_old_is_told_which_one_is_needed(tmp_path):
    old = sorted(Path.home().glob(".pyenv/versions/3.[89].*/bin/python3"))
    if not old:
        pytest.skip("there is no Python 3.8 or 3.9")
    for python in old:
        code, said = said_by(python, PROGRAM, tmp_path / "new")
        assert code == 2
        assert said.startswith("mediaserver: Python 3.10 or later is needed; this is 3.")
        assert said.count("\n") == 1


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7"])
def test_a_python_that_cannot_read_the_file_shows_the_line_that_says_so(tmp_path, version):
    old = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    if not old:
        pytest.skip(f"there is no Python {version}")
    code, said = said_by(old[0], PROGRAM, tmp_path / "new")
    assert (code, "Python 3.10 or later is needed" in said) == (1, True)


def test_the_addresses_to_open_are_those_that_reach_the_server():
    assert ms.addresses("127.0.0.1", 80) == ["http://127.0.0.1:80/"]
    assert ms.addresses("::1", 80) == ["http://[::1]:80/"]
    assert ms.addresses("0.0.0.0", 80)[0] == "http://localhost:80/"


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full"])
def test_standard_error_may_be_closed_or_full(tmp_path, redirect):
    server = object.__new__(Server)
    server.port = free_port()
    at = ["--storage_dir", tmp_path / "x", "--port", str(server.port)]
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, PROGRAM, *at]
    with subprocess.Popen(command, env=BARE_ENVIRONMENT) as running:
        try:
            wait_until(lambda: accepts(server.port), "the server")
            wait_until(lambda: server.get("/health").json["scan"]["finished_at"])
        finally:
            running.terminate()
    assert running.returncode == 0


def test_help_explains_every_setting_and_command(tmp_path):
    ended = run_program("--help", cwd=tmp_path)
    assert ended.returncode == 0
    words = " ".join(ended.stdout.split())
    for name, setting in ms.SETTINGS.items():
        told = [name.upper()] if setting.secret else [f"--{name}", setting.help]
        assert [each for each in told if each not in words] == []
    assert [name for name in ms.COMMANDS if name not in words] == []


@pytest.mark.parametrize("name", ms.COMMANDS)
def test_the_help_of_a_command_is_of_its_own_words_and_options(capsys, name):
    with pytest.raises(SystemExit) as ended:
        ms.parse_command_line([*name.split(), "--help"])
    told = capsys.readouterr().out
    assert (ended.value.code, ms.COMMANDS[name].usage in " ".join(told.split())) == (0, True)
    assert "--port" not in told


def test_a_secret_that_somebody_has_blanked_stops_the_start(tmp_path):
    fill(tmp_path / "pictures/.mediaserver", {"secrets.env": b"AUTH_TOKEN=\n"})
    ended = run_program("--storage_dir", tmp_path / "pictures", cwd=tmp_path)
    assert (ended.returncode, "AUTH_TOKEN: is blank in" in ended.stderr) == (2, True)
    assert (tmp_path / "pictures/.mediaserver/secrets.env").read_text() == "AUTH_TOKEN=\n"


def test_generated_secrets_are_kept_for_their_owner_only_and_used_again(tmp_path, monkeypatch):
    for name in ("AUTH_TOKEN", "MEDIA_SERVER_SECRET"):
        monkeypatch.delitem(SECRETS, name)
    kept = []
    for _ in range(2):
        with Server(tmp_path / "pictures") as running:
            file = running.data / "secrets.env"
            kept.append(ms.parse_dotenv(file.read_text(), {}))
            owner = {"Authorization": f"Bearer {kept[-1]['AUTH_TOKEN']}"}
            assert running.request("GET", "/image/a.png", headers=owner).status == 404
            wait_until(lambda server=running: "same secret" in server.log)
            assert f"{file} " in running.log
            private = (file, running.data / "lock", running.data / "index.sqlite3-spare")
            assert [path.stat().st_mode & 0o777 for path in private] == [0o600] * 3
            assert [value for value in kept[-1].values() if value in running.log] == []
    assert kept[0] == kept[1]
    assert set(kept[0]) == {"AUTH_TOKEN", "MEDIA_SERVER_SECRET"}
    assert min(map(len, kept[0].values())) >= 32


def test_secrets_that_cannot_be_written_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(os.fsync, OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        ms.write_secrets(tmp_path / "secrets.env", {"AUTH_TOKEN": "x"})
    assert not files_below(tmp_path)


def test_a_new_storage_folder_is_made_and_a_dotenv_in_the_working_directory_is_read(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / ".env").write_text("MAX_UPLOAD_BYTES=200 # small\nexport AUTH_TOKEN='not this'\n")
    with Server(tmp_path / "new" / "pictures", cwd=str(home)) as running:
        assert running.storage.is_dir()
        assert running.upload(png_of(201)).status == 413
        assert running.upload(png_of(200)).status == 201


def test_a_second_server_on_the_same_data_exits_2_and_a_crash_blocks_no_start(start, tmp_path):
    first = start()
    second = run_program("--storage_dir", first.storage, "--port", 0, cwd=tmp_path, **SECRETS)
    assert second.returncode == 2
    assert f"another mediaserver is running on {first.data}" in second.stderr
    assert f"kill {first.process.pid}\n" in second.stderr
    assert "listening" not in second.stderr
    content = png()
    url = first.upload(content).json["url"]
    first.kill()
    again = start()
    assert again.get(urlsplit(url).path).body == content


@pytest.mark.parametrize("workers", ["1", "2"])
def test_signals_have_their_meaning_as_soon_as_the_server_is_ready(start, workers):
    running = start("--workers", workers)
    running.process.send_signal(signal.SIGHUP)
    assert running.get("/health").status == 200
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(DEADLINE) == 0


@contextlib.contextmanager
def begun(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A process in which the program has begun: Python itself has, and it has read the file."""
    command = [sys.executable, PROGRAM, *options]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        if not status.exists():
            pytest.skip("needs /proc")
        hangup = re.compile(r"Sig(?:Blk|Cgt):\s+\w+[13579bdf]\n")  # is blocked, or caught already
        wait_until(lambda: hangup.search(status.read_text()), "the program to begin")
        yield process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_ends_a_server_well(tmp_path, number):
    with begun(tmp_path, "serve", "--storage_dir", ".", "--port", "0") as process:
        process.send_signal(number)
        assert process.wait(DEADLINE) == 0
        assert "Traceback" not in process.stderr.read()


PENDING = """import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [number := int(sys.argv[1])])
signal.signal(number, signal.SIG_DFL)  # tests in a shell's background have SIGINT ignored
os.kill(os.getpid(), number)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)]
)
def test_a_signal_from_before_its_start_ends_a_command_as_signals_do(tmp_path, number, code):
    command = [PROGRAM, "verify", "--storage_dir", "."]
    found = said_by(sys.executable, "-c", PENDING, f"{number:d}", *command, cwd=tmp_path)
    assert found == (code, "")


def test_sighup_ends_no_service_while_python_begins():
    unit = (HERE / "mediaserver.service").read_text()
    before = re.search("^ExecStart=(.*)/usr/bin/python3 ", unit, re.MULTILINE)[1].split()
    assert said_by(*before, "sh", "-c", "kill -HUP $$; echo alive") == (0, "alive\n")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sighup_ends_nothing_at_any_moment_and_a_flood_of_it_is_cheap(tmp_path, workers):
    with begun(tmp_path, str(tmp_path), "--port", "0", "--workers", workers) as process:
        flood = threading.Event()

        def send() -> None:
            while process.poll() is None and not flood.wait(0.002):
                process.send_signal(signal.SIGHUP)

        sender = threading.Thread(target=send)
        sender.start()
        try:
            port = next(int(m[1]) for line in process.stderr if (m := re.search(r":(\d+)$", line)))
            for _ in range(20):
                connection = http.client.HTTPConnection("127.0.0.1", port, DEADLINE)
                connection.request("GET", "/health")
                assert connection.getresponse().read()
                connection.close()
            process.terminate()
            assert process.wait(DEADLINE) == 0
        finally:
            flood.set()
            sender.join()
            process.kill()


# ======================================================================================
# 3. Credentials
# ======================================================================================

NOW = 1_700_000_000.0
KEYS_SECRET = "jwt-signing-key-of-at-least-32-bytes"
PRIVATE_KEY = 0xC0FFEE0123456789ABCDEF0123456789ABCDEF0123456789ABCDEF0123456789

P = 2**256 - 2**224 + 2**192 + 2**96 - 1
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
G = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)
Point = tuple[int, int] | None


def add_points(a: Point, b: Point) -> Point:
    """The schoolbook's addition: slow, and no kin of what it tests."""
    if a is None or b is None:
        return a or b
    if a[0] == b[0] and (a[1] + b[1]) % P == 0:
        return None
    if a == b:
        slope = (3 * a[0] ** 2 - 3) * pow(2 * a[1], -1, P)
    else:
        slope = (b[1] - a[1]) * pow(b[0] - a[0], -1, P)
    x = (slope**2 - a[0] - b[0]) % P
    return x, (slope * (a[0] - x) - a[1]) % P


def multiply(scalar: int, point: Point) -> tuple[int, int]:
    total: Point = None
    for bit in f"{scalar:b}":
        total = add_points(total, total)
        if bit == "1":
            total = add_points(total, point)
    assert total
    return total


def sign_es256(message: bytes, private_key: int = PRIVATE_KEY) -> bytes:
    e = int.from_bytes(hashlib.sha256(message).digest(), "big")
    k = (e ^ 0x5A5A) % N
    r = multiply(k, G)[0] % N
    s = pow(k, -1, N) * (e + r * private_key) % N
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def der_point(point: tuple[int, int], compressed: bool = False) -> bytes:
    x = point[0].to_bytes(32, "big")
    if compressed:
        return bytes([2 + point[1] % 2]) + x
    return b"\x04" + x + point[1].to_bytes(32, "big")


SPKI = bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107")


def pem_of(der: bytes, label: str = "PUBLIC KEY") -> str:
    body = base64.encodebytes(der).decode()
    return f"-----BEGIN {label}-----\n{body}-----END {label}-----\n"


def spki(point: bytes) -> bytes:
    bits = b"\x03" + bytes([len(point) + 1]) + b"\x00" + point
    return b"\x30" + bytes([len(SPKI) + len(bits)]) + SPKI + bits


PUBLIC_POINT = multiply(PRIVATE_KEY, G)
PEM = pem_of(spki(der_point(PUBLIC_POINT)))


def auth_config(
    owners_key: str = "owner's key", jwt_key: str = KEYS_SECRET, *, upload: str = "upload secret",
    public_key: ms.PublicKey | None = None, **options: str,
) -> ms.AuthConfig:  # fmt: skip
    secrets = {
        "auth_token": owners_key, "jwt_signing_key": jwt_key, "media_server_secret": upload,
    }  # fmt: skip
    settings = ms.load_settings({"storage_dir": "x", **options}, {}, {})
    return ms.AuthConfig(settings._replace(**secrets), public_key)


KEYS = auth_config(public_key=ms.parse_public_key(PEM))

ACCESS: dict[str, object] = {"token_type": "access", "exp": NOW + 60, "user_id": 7}
FOREIGN: dict[str, object] = {"sub": "user123", "exp": NOW + 60}


def jws(header: bytes | Mapping[str, object], payload: bytes | Mapping[str, object]) -> str:
    """Sign anything: with the key of the header's algorithm, else with HS256's."""
    parts = [p if isinstance(p, bytes) else json.dumps(p).encode() for p in (header, payload)]
    signed = ".".join(ms.encode_base64url(part) for part in parts)
    if b"ES256" in parts[0]:
        signature = sign_es256(signed.encode())
    else:
        signature = ms._hmac_sha256(KEYS_SECRET.encode(), signed.encode())
    return f"{signed}.{ms.encode_base64url(signature)}"


def hs256(claims: bytes | Mapping[str, object]) -> str:
    return jws({"alg": "HS256", "typ": "JWT"}, claims)


def es256(claims: Mapping[str, object]) -> str:
    return jws({"alg": "ES256"}, claims)


def verify(token: str, token_type: str = "access") -> Mapping[str, object]:
    return ms.verify_jwt(
        token,
        hs256_key=KEYS_SECRET,
        es256_key=KEYS.public_key,
        now=NOW,
        token_type=token_type,
    )


def find(bearer: str | None = None, upload: str | None = None) -> ms.Principal:
    authorization = None if bearer is None else f"Bearer {bearer}"
    return ms.find_principal(authorization, upload, KEYS, NOW)


# --- Upload tokens and signed URLs


def test_an_upload_token_is_what_the_django_snippet_makes() -> None:
    ts = "1700000000"
    sig = hmac.new(b"s3cret", ts.encode(), hashlib.sha256).hexdigest()
    assert ms.sign_upload_token("s3cret", 1700000000.9) == f"{ts}.{sig}"


@pytest.mark.parametrize(
    ("age", "good"), [(0, True), (900, True), (901, False), (-60, True), (-61, False)]
)
def test_an_upload_token_is_good_for_its_lifetime_and_a_minute_early(age: int, good: bool) -> None:
    token = ms.sign_upload_token("secret", NOW - age)
    if good:
        ms.verify_upload_token(token, "secret", NOW, 900)
    else:
        with pytest.raises(ms.TokenError):
            ms.verify_upload_token(token, "secret", NOW, 900)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda ts, sig: "", lambda ts, sig: ts, lambda ts, sig: f"{ts}.",
        lambda ts, sig: f".{sig}", lambda ts, sig: f"{ts}.{sig}\n", lambda ts, sig: f" {ts}.{sig}",
        lambda ts, sig: f"+{ts}.{sig}", lambda ts, sig: f"{ts}.0.{sig}",
        lambda ts, sig: f"{ts}.{sig[:-1]}", lambda ts, sig: f"{ts}.{sig[::-1]}",
        lambda ts, sig: f"{ts}1.{sig}", lambda ts, sig: f"{int(ts) + 1}.{sig}",
        lambda ts, sig: f"{'9' * 5000}.{sig}", lambda ts, sig: f"\u0661700000000.{sig}",
        lambda ts, sig: f"{ts}.{'é' * 64}", lambda ts, sig: f"{ts}.\ud800",
    ],
)  # fmt: skip
def test_an_upload_token_that_was_touched_is_refused(spoil: Callable[[str, str], str]) -> None:
    token = spoil(*ms.sign_upload_token("secret", NOW).split("."))
    with pytest.raises(ms.TokenError):
        ms.verify_upload_token(token, "secret", NOW, 900)


def test_a_file_signature_is_bound_to_its_record_time_and_purpose() -> None:
    key = ms.derive_key("secret", "file url")
    signature, expires = ms.sign_until(key, "a-b", int(NOW)), str(int(NOW))
    assert ms.verify_until(key, "a-b", (expires, signature), NOW)
    assert not ms.verify_until(key, "a-b", (expires, signature), NOW + 1)
    assert not ms.verify_until(key, "a-c", (expires, signature), NOW)
    assert not ms.verify_until(key, "a-b", (str(int(NOW) + 9), signature), NOW)
    assert not ms.verify_until(key, "a-b", ("1e99", signature), NOW)
    assert not ms.verify_until(key, "a-b", (expires, "é\ud800"), NOW)
    other = ms.derive_key("secret", "page url")
    assert not ms.verify_until(other, "a-b", (expires, signature), NOW)


# --- Passwords


def test_a_password_fits_its_own_hash_only() -> None:
    stored = ms.hash_password("pässwörd ☃")
    assert ms.verify_password("pässwörd ☃", stored)
    assert not ms.verify_password("passwörd ☃", stored)
    assert stored != ms.hash_password("pässwörd ☃")
    assert not ms.verify_password("anything", ms.DUMMY_PASSWORD_HASH)
    assert not ms.verify_password("!", "!")


def test_a_stored_hash_keeps_its_own_parameters() -> None:
    # RFC 7914, section 12, third vector, cut to 32 bytes: N=16384, r=8, p=1
    digest = bytes.fromhex("7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2")
    salt = ms.encode_base64url(b"SodiumChloride")
    stored = f"scrypt$16384$8$1${salt}${ms.encode_base64url(digest)}"
    assert ms.verify_password("pleaseletmein", stored)


def test_a_hash_of_django_is_verified() -> None:
    # RFC 7914, section 11, first vector of PBKDF2-HMAC-SHA-256, cut to 32 bytes
    stored = "pbkdf2_sha256$1$salt$VawEblbjCJ/sFpHCJUS2BflBhSFt3gRl5oudV8INrLw="
    assert ms.verify_password("passwd", stored)
    assert not ms.verify_password("password", stored)


# --- ES256

# From C2SP/wycheproof (Apache-2.0), ecdsa_secp256r1_sha256_p1363_test.json
WYCHEPROOF_POINT = (
    "042927b10512bae3eddcfe467828128bad2903269919f7086069c8c4df6c732838"
    "c7787964eaac00e5921fb1498a60f4606766b3d9685001558d1a974e7341513e"
)
WYCHEPROOF_R = "2ba3a8be6b94d5ec80a6d9d1190a436effe50d85a1eee859b8cc6af9bd5c2e18"
WYCHEPROOF_S = "4cd60b855d442f5b3c7b11eb6c4e0ae7525fe710fab9aa7c77a67f79e6fadd76"
FIVE = (
    "04264d796a0dab9b376d34eea6fe297dde1c7b73e53944bc96c8f1e8a6850bb6c9"
    "cf5308020eed460c649ddae61d4ef8bb79958113f106befaf4f18876d12a5e64"
)
THREE = (
    "04ce24c99032d52ac6ead23c0ae3ec68ef41e51a281fd457808c83136d7dcce90e"
    "8f7a154b551e9f39c59279357aa491b2a62bdebc2bb78613883fc72936c057e0"
)
N_3 = "ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc63254e"


@pytest.mark.parametrize(
    ("point", "message", "signature", "good"),
    [
        (WYCHEPROOF_POINT, b"123400", WYCHEPROOF_R + WYCHEPROOF_S, True),
        (WYCHEPROOF_POINT, b"123401", WYCHEPROOF_R + WYCHEPROOF_S, False),
        (WYCHEPROOF_POINT, b"123400", WYCHEPROOF_S + WYCHEPROOF_R, False),
        (WYCHEPROOF_POINT, b"123400", WYCHEPROOF_R + WYCHEPROOF_S[:-2], False),
        (WYCHEPROOF_POINT, b"123400", WYCHEPROOF_R + WYCHEPROOF_S + "00", False),
        (WYCHEPROOF_POINT, b"123400", "00" * 64, False),
        (WYCHEPROOF_POINT, b"123400", "00" * 31 + "01" + f"{N:064x}", False),
        (WYCHEPROOF_POINT, b"123400", f"{N:064x}" + "00" * 31 + "01", False),
        (FIVE, b"hello, world", f"{5:064x}" + N_3, True),
        (FIVE, b"hello, world", f"{5 + N:064x}" + N_3, False),
        (THREE, b"hello, world", f"{3:064x}" + N_3, True),  # x = n + 3
    ],
)
def test_es256_agrees_with_wycheproof(
    point: str, message: bytes, signature: str, good: bool
) -> None:
    pem = pem_of(spki(bytes.fromhex(point)))
    assert ms.verify_es256(pem, message, bytes.fromhex(signature)) is good
    assert ms.verify_es256(pem.encode(), message, bytes.fromhex(signature)) is good


@pytest.mark.parametrize(
    ("u1", "u2"), [(1, 1), (2, N - 1), (N - 1, 1), (2**192 + 3, 5), (0, 7), (5, N - 5)]
)
@pytest.mark.parametrize("scalar", [1, 2, N - 1, N - 2, 2**64, N - 2**64, 1 + 2**64])
def test_keys_that_are_small_multiples_of_g_meet_equal_and_opposite_points(
    scalar: int, u1: int, u2: int
) -> None:
    key = ms.PublicKey(*multiply(scalar, G))
    total = (u1 + u2 * scalar) % N
    point = ms._multiply_and_add(u1, u2, key)
    if total == 0:
        assert point[2] == 0
    else:
        assert ms._affine(point) == ms.PublicKey(*multiply(total, G))


def test_a_public_key_is_read_with_any_line_ending() -> None:
    assert ms.parse_public_key("\n" + PEM.replace("\n", "\r\n")) == KEYS.public_key


@pytest.mark.parametrize("is_compressed", [False, True])
@pytest.mark.parametrize("is_even", [False, True])
def test_a_public_key_is_read_in_both_forms(is_even: bool, is_compressed: bool) -> None:
    x, y = PUBLIC_POINT
    point = (x, y if (y % 2 == 0) is is_even else P - y)
    key = ms.parse_public_key(pem_of(spki(der_point(point, is_compressed))))
    assert key == ms.PublicKey(*point)


X, Y = PUBLIC_POINT
B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
Y5 = pow(5**3 - 15 + B, (P + 1) // 4, P)  # of the point whose x is 5
GOOD = spki(der_point(PUBLIC_POINT))


@pytest.mark.parametrize(
    "pem",
    [
        "", "x" * 100_000, b"\xff\xfe", PEM.replace("PUBLIC", "EC PUBLIC"),
        pem_of(GOOD, "CERTIFICATE"), PEM + PEM, PEM.replace("=", ""), pem_of(GOOD + b"\x00"),
        pem_of(GOOD[:-1]), pem_of(GOOD.replace(b"\x03\x42\x00", b"\x03\x42\x01")),  # unused bits
        pem_of(b"\x30\x81" + GOOD[1:]),  # a length that is not minimal
        pem_of(GOOD.replace(b"\x03\x01\x07", b"\x03\x01\x06")),  # another curve
        pem_of(spki(b"\x06" + der_point(PUBLIC_POINT)[1:])),  # hybrid form
        pem_of(spki(b"\x00")),  # infinity
        pem_of(spki(der_point((X, Y + 1)))), pem_of(spki(der_point((0, 0)))),
        pem_of(spki(der_point((P + 5, Y5)))),  # a point, but for one p too many
        pem_of(spki(b"\x02" + (P + 5).to_bytes(32, "big"))),
        pem_of(spki(b"\x02" + (1).to_bytes(32, "big"))),  # no point has this x
        pem_of(spki(b"\x05" + X.to_bytes(32, "big"))),
    ],
)  # fmt: skip
def test_a_public_key_that_is_not_exactly_one_p256_point_is_refused(pem: str | bytes) -> None:
    with pytest.raises(ValueError, match="the public key is not"):
        ms.parse_public_key(pem)


# --- JSON Web Tokens


@pytest.mark.parametrize("length", range(5))
def test_base64url_is_read_back(length) -> None:
    data = hashlib.sha512(bytes([length])).digest()[:length]
    assert ms.decode_base64url(ms.encode_base64url(data)) == data


@pytest.mark.parametrize(
    "text", ["A", "AB", "AAB", "AA==", "AA=", "+_", "A A", "AA\n", "ÄÄ", "\ud800", "AAAA="]
)
def test_base64url_has_one_spelling(text) -> None:
    with pytest.raises(ms.TokenError):
        ms.decode_base64url(text)


def test_hs256_is_what_rfc_7515_appendix_a1_shows() -> None:
    key = ms.decode_base64url(
        "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow"
    )
    token = (
        "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9."
        "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFt"
        "cGxlLmNvbS9pc19yb290Ijp0cnVlfQ.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
    )
    algorithm, payload = ms.verify_jws(token, key, None)
    assert algorithm == "HS256"
    assert json.loads(payload)["iss"] == "joe"


def test_tokens_of_both_algorithms_are_read() -> None:
    assert verify(ms.sign_jwt(ACCESS, KEYS_SECRET)) == ACCESS
    assert verify(es256(FOREIGN)) == FOREIGN
    refresh = ACCESS | {"token_type": "refresh"}
    assert verify(hs256(refresh), "refresh") == refresh


@pytest.mark.parametrize(
    "change",
    [
        {"exp": NOW - 29}, {"exp": NOW + 0.5}, {"exp": 10**400},
        {"nbf": NOW + 30, "iat": NOW + 30}, {"iat": 0, "nbf": -1},
        {"nested": [[{"a": None}]], "name": "Jürgen ☃"},
    ],
)  # fmt: skip
def test_claims_hold_within_the_leeway(change: dict[str, object]) -> None:
    assert verify(hs256(ACCESS | change)) == ACCESS | change


@pytest.mark.parametrize(
    "claims",
    [
        {**ACCESS, "exp": NOW - 30}, {**ACCESS, "exp": True}, {**ACCESS, "exp": str(NOW + 60)},
        {**ACCESS, "exp": None}, {**ACCESS, "exp": float("inf")}, {**ACCESS, "exp": float("nan")},
        {k: v for k, v in ACCESS.items() if k != "exp"}, {**ACCESS, "nbf": NOW + 31},
        {**ACCESS, "iat": NOW + 31}, {**ACCESS, "nbf": None}, {**ACCESS, "iat": "now"},
        {**ACCESS, "token_type": "refresh"}, {**ACCESS, "token_type": ["access"]},
        {k: v for k, v in ACCESS.items() if k != "token_type"}, b"", b"[]", b"null",
        b'{"exp": 1e999, "token_type": "access"}',
        b'{"exp": ' + b"9" * 5000 + b'.0, "token_type": "access"}',
        b'{"exp": 2e9, "exp": 3e9, "token_type": "access"}',
        b'{"exp": 2e9, "token_type": "access", "x": "\\ud800"}',
        b'{"exp": 2e9, "token_type": "access", "x": "\xff"}',
        b'\xef\xbb\xbf{"exp": 2e9, "token_type": "access"}',
        '{"exp": 2e9, "token_type": "access"}'.encode("utf-16"), b"[" * 6000,
    ],
)  # fmt: skip
def test_claims_that_do_not_hold_are_refused(claims: bytes | Mapping[str, object]) -> None:
    with pytest.raises(ms.TokenError):
        verify(hs256(claims))


@pytest.mark.parametrize("depth", [10, 900, 1100, 2900])
def test_deep_nesting_is_read_or_refused_and_never_overflows(depth) -> None:
    nested = b"[" * depth + b"]" * depth
    try:
        verify(hs256(b'{"exp": 2e9, "token_type": "access", "x": ' + nested + b"}"))
    except ms.TokenError:  # how deep is too deep is the interpreter's to say
        assert depth > 10


@pytest.mark.parametrize(
    "header",
    [
        {"alg": "none"}, {"alg": "None"}, {"alg": "hs256"}, {"alg": "HS512"}, {"alg": "RS256"},
        {"alg": ["HS256"]}, {"alg": None}, {}, {"alg": "HS256", "crit": ["exp"]},
        {"alg": "HS256", "crit": []}, {"alg": "HS256", "b64": True}, {"alg": "HS256", "typ": 1},
        b'{"alg": "none", "alg": "HS256"}', b'["HS256"]', b'"HS256"', b"",
    ],
)  # fmt: skip
def test_headers_that_ask_for_more_are_refused(header: bytes | Mapping[str, object]) -> None:
    with pytest.raises(ms.TokenError):
        verify(jws(header, ACCESS))


def test_the_public_key_is_no_hmac_secret() -> None:
    signed = ".".join(
        ms.encode_base64url(json.dumps(part).encode()) for part in ({"alg": "HS256"}, ACCESS)
    )
    forged = ms.encode_base64url(ms._hmac_sha256(PEM.encode(), signed.encode()))
    with pytest.raises(ms.TokenError):
        verify(f"{signed}.{forged}")


def test_each_algorithm_takes_its_own_key_and_type_only() -> None:
    with pytest.raises(ms.TokenError):
        verify(es256(FOREIGN | {"token_type": "access"}))
    with pytest.raises(ms.TokenError):
        verify(es256(FOREIGN).replace(".", ".A", 1))
    with pytest.raises(ms.TokenError):
        verify(es256(FOREIGN), "refresh")
    with pytest.raises(ms.TokenError):
        ms.verify_jwt(es256(FOREIGN), hs256_key=KEYS_SECRET, es256_key=None, now=NOW)


def test_a_token_with_any_character_changed_is_refused() -> None:
    token = hs256(ACCESS)
    for end in ("=", "A" * 9000, "A" * 9000 + "="):
        with pytest.raises(ms.TokenError):
            verify(token + end)
    for i, character in enumerate(token):
        for other in ("A" if character != "A" else "B", "", character + ".", "é"):
            with pytest.raises(ms.TokenError):
                verify(token[:i] + other + token[i + 1 :])


def test_pyjwt_and_we_read_each_other() -> None:
    jwt = need("jwt")
    claims = {"exp": 4e9, "token_type": "access", "name": "Jürgen"}
    assert jwt.decode(ms.sign_jwt(claims, KEYS_SECRET), KEYS_SECRET, ["HS256"]) == claims
    assert verify(jwt.encode(claims, KEYS_SECRET, "HS256")) == claims


def test_pyjwt_and_we_agree_on_es256() -> None:
    jwt = need("jwt")
    ec = need("cryptography.hazmat.primitives.asymmetric.ec")
    from cryptography.hazmat.primitives import serialization

    private = ec.generate_private_key(ec.SECP256R1())
    pem = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    key = ms.parse_public_key(pem)
    for i in range(20):
        token = jwt.encode({"exp": 4e9, "i": i}, private, "ES256")
        claims = ms.verify_jwt(token, hs256_key=KEYS_SECRET, es256_key=key, now=NOW)
        assert claims["i"] == i
    assert jwt.decode(es256({"exp": 4e9}), PEM, ["ES256"]) == {"exp": 4e9}


def configured_simplejwt() -> Any:
    """SimpleJWT's tokens, in a Django that has the servers' key."""
    need("rest_framework_simplejwt")
    settings = need("django.conf").settings
    if not settings.configured:
        apps = ["django.contrib.auth", "django.contrib.contenttypes", "rest_framework_simplejwt"]
        jwt = {"SIGNING_KEY": JWT_KEY}
        settings.configure(SECRET_KEY="x", INSTALLED_APPS=apps, SIMPLE_JWT=jwt, USE_TZ=True)
        need("django").setup()
    return need("rest_framework_simplejwt.tokens")


def test_simplejwt_and_we_read_each_other() -> None:
    configured_simplejwt()
    backends = need("rest_framework_simplejwt.backends")
    backend = backends.TokenBackend("HS256", KEYS_SECRET)
    claims = {"token_type": "access", "exp": 4_000_000_000, "jti": "a" * 32, "user_id": "7"}
    assert verify(backend.encode(claims)) == claims
    assert backend.decode(ms.sign_jwt(claims, KEYS_SECRET)) == claims
    assert find(backend.encode(claims)).user_id == 7


# --- Principals


@pytest.mark.parametrize(
    ("authorization", "upload", "kind"),
    [
        (None, None, "anonymous"), ("", None, "anonymous"), ("Basic eDp5", None, "anonymous"),
        ("Basic eDp5", "good", "uploader"), (None, "good", "uploader"),
        ("Bearer owner's key", None, "owner"), ("bEARER   owner's key ", "good", "owner"),
        ("Bearer owner's key", "bad", None), ("Bearer wrong", "good", None),
        ("Bearer", None, None), ("Bearer ", None, None), ("Bearer owner's key☃", None, None),
        ("Bearer \ud800", None, None), ("Bearer " + "a" * 100_000, None, None), (None, "", None),
    ],
)  # fmt: skip
def test_a_principal_is_found_in_the_contracts_order(
    authorization: str | None, upload: str | None, kind: str | None
) -> None:
    token = ms.sign_upload_token("upload secret", NOW) if upload == "good" else upload
    if kind:
        assert ms.find_principal(authorization, token, KEYS, NOW).kind == kind
    else:
        with pytest.raises(ms.HTTPError) as caught:
            ms.find_principal(authorization, token, KEYS, NOW)
        assert caught.value.status == 401
        assert caught.value.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'


def test_demo_mode_looks_at_no_credential() -> None:
    demo = auth_config(auth_disabled="true")
    assert ms.find_principal("Bearer wrong", "wrong", demo, NOW) == ms.DEMO


@pytest.mark.parametrize("text", ["schlüssel", "schlüssel".encode().decode("latin-1")])
def test_a_non_ascii_owners_key_is_known_in_both_encodings(text: str) -> None:
    keys = auth_config("schlüssel")
    assert ms.find_principal(f"Bearer {text}", None, keys, NOW) == ms.OWNER


@pytest.mark.parametrize("secrets", [("", "b", "c"), ("a", " ", "c"), ("a", "b", "")])
def test_blank_secrets_make_no_keys(secrets: tuple[str, str, str]) -> None:
    with pytest.raises(ValueError, match="blank"):
        auth_config(secrets[0], secrets[1], upload=secrets[2])


def test_no_secret_is_in_the_repr_of_keys() -> None:
    assert "owner's key" not in repr(KEYS)
    assert KEYS_SECRET not in repr(KEYS)


def test_an_accounts_hash_is_in_no_log():
    user = ms.User(7, "a@example.org", None, None, "", "", "scrypt$hash", "", True)
    assert "hash" not in repr(user)


@pytest.mark.parametrize(
    ("change", "user_id"),
    [
        ({}, 7), ({"user_id": "42"}, 42), ({"user_id": 2**63 - 1}, 2**63 - 1),
        ({"user_id": 2**63}, None), ({"user_id": "9" * 4000}, None),
        ({"user_id": 0}, None),  # the demo user's
        ({"user_id": -1}, None), ({"user_id": True}, None), ({"user_id": 7.0}, None),
        ({"user_id": "07"}, None), ({"user_id": "\u0667"}, None), ({"user_id": None}, None),
        ({"user_id": [7]}, None), ({"permissions": "media_store_write"}, None),
        ({"permissions": {"media_store_write": 1}}, None),
        ({"permissions": ["media_store_write", 1]}, None), ({"permissions": None}, 7),
        ({"permissions": False}, None),
    ],
)  # fmt: skip
def test_the_claims_of_an_account_are_taken_at_their_exact_type(
    change: dict[str, object], user_id: int | None
) -> None:
    if user_id:
        assert find(hs256(ACCESS | change)).user_id == user_id
    else:
        with pytest.raises(ms.HTTPError) as caught:
            find(hs256(ACCESS | change))
        assert caught.value.status == 401


def test_a_foreign_token_has_a_subject_and_no_user() -> None:
    claims = FOREIGN | {"user_id": 7, "permissions": ["media_store_read"], "is_admin": "true"}
    assert find(es256(claims)) == ms.Principal(
        "token", None, "user123", frozenset({"media_store_read"}), False
    )
    assert find(es256(FOREIGN | {"is_admin": True})).is_admin
    with pytest.raises(ms.HTTPError):
        find(es256(FOREIGN | {"sub": 123}))


READER_PRINCIPAL = ms.Principal("token", permissions=frozenset({"media_store_read"}))
WRITER_PRINCIPAL = ms.Principal("token", permissions=frozenset({"media_store_write"}))
USER_PRINCIPAL = ms.Principal("token", user_id=7)
PRINCIPALS = {
    "anonymous": ms.ANONYMOUS, "uploader": ms.UPLOADER, "reader": READER_PRINCIPAL,
    "writer": WRITER_PRINCIPAL, "user": USER_PRINCIPAL, "owner": ms.OWNER, "demo": ms.DEMO,
}  # fmt: skip


@pytest.mark.parametrize(
    ("access", "allowed"),
    [
        (ms.Access.OPEN, "anonymous uploader reader writer user owner demo"),
        (ms.Access.READ, "reader owner demo"), (ms.Access.PRIVATE_READ, "reader owner demo"),
        (ms.Access.UPLOAD, "uploader writer owner demo"), (ms.Access.WRITE, "writer owner demo"),
        (ms.Access.USER, "user demo"), (ms.Access.BEARER, "reader writer user owner demo"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", PRINCIPALS)
def test_access_is_the_contracts_table(access: ms.Access, allowed: str, name: str) -> None:
    principal, is_allowed = PRINCIPALS[name], name in allowed.split()
    assert ms.allows(access, principal, True) is is_allowed
    assert ms.allows(access, principal, False) is (is_allowed or access is ms.Access.READ)
    if not is_allowed:
        refused = ms.refusal(access, principal)
        assert refused.status == (401 if name == "anonymous" else 403)


@pytest.mark.parametrize(
    ("principal", "seen"),
    [
        (ms.OWNER, ms.Principal("view", permissions=READER_PRINCIPAL.permissions)),
        (READER_PRINCIPAL, ms.Principal("view", permissions=READER_PRINCIPAL.permissions)),
        (WRITER_PRINCIPAL, ms.Principal("view")), (USER_PRINCIPAL, ms.Principal("view", 7)),
        (ms.Principal("token", None, "sub", is_admin=True),
         ms.Principal("view", None, "sub", READER_PRINCIPAL.permissions)),
    ],
)  # fmt: skip
def test_a_view_cookie_gives_its_holders_reads_for_twelve_hours(principal, seen) -> None:
    value = ms.sign_view(principal, KEYS.view_key, NOW)

    def found(cookies: str, now: float = NOW, keys: ms.AuthConfig = KEYS) -> ms.Principal:
        return ms.find_principal(None, None, keys, now, cookies=cookies)

    good = f"a=b; mediaserver_view={value}; c=d"
    seen = seen._replace(issued=NOW, cookie=value.partition(".")[2])
    assert found(good) == found(good, NOW + 12 * 3600 - 1) == seen
    assert found(f"mediaserver_view=old.one; {good}") == seen  # of another path or port
    assert found(good, NOW + 12 * 3600) == ms.ANONYMOUS
    assert found(good, keys=auth_config("changed", KEYS_SECRET)) == ms.ANONYMOUS
    assert found(good, keys=auth_config("owner's key", "changed")) == ms.ANONYMOUS
    token = ms.sign_upload_token("upload secret", NOW)
    assert ms.find_principal(None, token, KEYS, NOW, cookies=good) == ms.UPLOADER
    assert ms.find_principal("Bearer owner's key", None, KEYS, NOW, cookies=good) == ms.OWNER


@pytest.mark.parametrize(
    "value", ["", ".", "a.b", "a", "bnVsbA.", "é.é", "W10.W10", "{0}x", "x{0}"]
)
def test_a_bad_view_cookie_counts_as_none(value: str) -> None:
    cookies = "mediaserver_view=" + value.format(ms.sign_view(ms.OWNER, KEYS.view_key, NOW))
    assert ms.find_principal(None, None, KEYS, NOW, cookies=cookies) == ms.ANONYMOUS


def test_a_verified_token_is_remembered_until_it_expires() -> None:
    keys, token = auth_config(public_key=KEYS.public_key), f"Bearer {es256(FOREIGN)}"
    principal = ms.find_principal(token, None, keys, NOW)
    keys.public_key = None
    assert ms.find_principal(token, None, keys, NOW + 59) == principal
    with pytest.raises(ms.HTTPError):
        ms.find_principal(token, None, keys, NOW + 60)


def test_what_is_recalled_is_what_was_found_and_never_an_account() -> None:
    fresh = auth_config(public_key=KEYS.public_key)
    tokens = {
        name: f"Bearer {text}"
        for name, text in {
            "owner": KEYS.settings.auth_token, "foreign": es256(FOREIGN), "account": hs256(ACCESS),
            "wrong": "x", "none": "",
        }.items()
    }  # fmt: skip
    tokens["basic"] = "Basic eDp5"

    def recall(name: str, now: float = NOW, keys: ms.AuthConfig = fresh) -> ms.Principal | None:
        return ms.recall_principal(tokens.get(name), "", keys, now)

    assert recall("foreign") is None  # not seen yet
    given = {name: ms.find_principal(tokens[name], None, fresh, NOW)
             for name in ("foreign", "account", "owner")}  # fmt: skip
    assert (recall("foreign"), recall("owner")) == (given["foreign"], given["owner"])
    assert recall("nobody") == ms.ANONYMOUS
    assert [recall(name) for name in ("account", "wrong", "none", "basic")] == [None] * 4
    assert recall("foreign", NOW + 60) is None
    view = f"mediaserver_view={ms.sign_view(ms.OWNER, KEYS.view_key, NOW)}"
    assert ms.recall_principal(None, view, fresh, NOW) is None  # it may have been ended
    demo = auth_config(auth_disabled="true")
    assert recall("wrong", keys=demo) == ms.DEMO


def test_the_cache_forgets_the_least_recently_used_and_stands_many_threads(monkeypatch) -> None:
    monkeypatch.setattr(ms, "MAX_CACHED_TOKENS", 2)
    cache = ms.TokenCache()
    cache.put("a", USER_PRINCIPAL, NOW)
    cache.put("b", READER_PRINCIPAL, NOW)
    assert cache.get("a", NOW - 1) == USER_PRINCIPAL
    cache.put("c", WRITER_PRINCIPAL, NOW)
    assert [cache.get(t, NOW - 1) for t in "abc"] == [USER_PRINCIPAL, None, WRITER_PRINCIPAL]

    def use(_: int) -> None:
        for i in range(500):
            cache.put(str(i % 7), USER_PRINCIPAL, NOW + i)
            cache.get(str(i % 5), NOW)

    together(4, use)
    assert len(cache._entries) <= 2


# --- Who may do what, over HTTP


def test_the_token_command_and_curl_upload_the_first_picture(start, tmp_path):
    curl, running = need("curl"), start()
    (tmp_path / "photo.jpg").write_bytes(jpeg())
    token = run_program("token", "--storage_dir", running.storage, cwd=tmp_path, **SECRETS)
    assert (token.returncode, token.stderr) == (0, "")
    url = f"{running.url}/upload?token={token.stdout.strip()}"
    command = [curl, "-sS", "-F", f"file=@{tmp_path}/photo.jpg", url]
    made = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert running.get(urlsplit(made["url"]).path).body == (tmp_path / "photo.jpg").read_bytes()


@pytest.mark.parametrize("where", ["generated", "environment", "dotenv"])
def test_the_command_that_the_start_prints_uploads_from_any_other_shell(
    tmp_path, monkeypatch, where
):
    home, elsewhere = tmp_path / "it's home", tmp_path / "else where"
    for folder in (home, elsewhere):
        folder.mkdir()
    (elsewhere / "photo.jpg").write_bytes(jpeg())
    secret = SECRETS["MEDIA_SERVER_SECRET"]
    if where != "environment":
        monkeypatch.delitem(SECRETS, "MEDIA_SERVER_SECRET")
    if where == "dotenv":
        (home / ".env").write_text(f"MEDIA_SERVER_SECRET='{secret}'\nUPLOAD_DIR=box\n")
    options = ["--database_dir", str(home / "$data"), "--database_url", "sqlite:///of index.db"]
    with Server(tmp_path / "pictures", *options, cwd=str(home)) as running:
        pattern = re.compile("^mediaserver: upload a picture: (.*)\n", re.M)
        command = wait_until(lambda: pattern.search(running.log), "the first upload")[1]
        needs = [line for line in running.log.splitlines() if "another shell" in line]
        other = dict(BARE_ENVIRONMENT)
        if where == "environment":
            assert "MEDIA_SERVER_SECRET" in needs.pop()
            other["MEDIA_SERVER_SECRET"] = secret
        assert not needs
        need("curl")
        done = subprocess.run(
            ["sh", "-c", command], cwd=elsewhere, env=other, capture_output=True, check=True
        )
        assert json.loads(done.stdout)["content_type"] == "image/jpeg"
        made = {path.name for path in running.data.parent.iterdir()}
        assert made == {"media", ".incoming"}, "the command made no folder of its own"


@pytest.mark.parametrize(
    "words", [["token"], ["import", "old", "--dry_run"]], ids=["a line", "more than is held back"]
)
def test_a_command_whose_reader_has_gone_ends_without_a_word(tmp_path, words):
    """As in `media-server user list | true`."""
    fill(tmp_path, {f"old/a/{number:0100}.txt": b"" for number in range(200)})
    (tmp_path / "pictures").mkdir()
    environment = {**BARE_ENVIRONMENT, **SECRETS, "PYTHONUNBUFFERED": ""}
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, BYTECODE, *words, "--storage_dir", "pictures"], cwd=tmp_path,
        env=environment, stdout=write, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def run_copy(program: Path, *arguments: str) -> str:
    """What a copy of the program prints, run as a user runs it, bytecode and all."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, str(program), *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_bytecode_is_kept_and_made_anew_where_it_is_cut_short_or_of_another_source(tmp_path):
    copy = tmp_path / "mediaserver.py"
    beginning = PROGRAM.read_text("utf-8").partition("\nimport argparse\n")[0]  # all of it
    copy.write_text(f'{beginning}\nprint("a version", __file__)\n', "utf-8")
    run_copy(copy, "--version")
    (cached,) = (tmp_path / "__pycache__").iterdir()
    assert run_copy(copy, "--version") == f"a version {cached}\n"
    whole = cached.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 16, 0):
        cached.write_bytes(whole[:length])
        assert run_copy(copy, "--version") == f"a version {cached}\n"
        assert cached.read_bytes() == whole
    copy.write_text(f'{beginning}\nprint("another version", __file__)\n', "utf-8")
    assert run_copy(copy, "--version") == f"another version {cached}\n"


def test_what_costs_much_and_can_be_spared_is_not_imported():
    dear = {"concurrent.futures", "dataclasses", "inspect", "logging"}
    program = "import sys; old = {*sys.modules}; import mediaserver; print(*{*sys.modules} - old)"
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True, check=True
    ).stdout
    assert "mediaserver" in said.split()
    assert dear & {*said.split()} == set()


def test_a_folder_that_takes_no_bytecode_is_no_hindrance(tmp_path):
    copy = tmp_path / "mediaserver.py"
    copy.write_text(PROGRAM.read_text("utf-8"), "utf-8")
    (tmp_path / "__pycache__").write_text("")
    assert ms.__version__ in run_copy(copy, "--version")


def test_the_token_command_makes_the_secret_that_the_server_then_uses(tmp_path, monkeypatch):
    storage = tmp_path / "pictures"
    storage.mkdir()
    token = run_program("token", "--storage_dir", storage, cwd=tmp_path).stdout.strip()
    monkeypatch.delitem(SECRETS, "MEDIA_SERVER_SECRET")
    with Server(storage) as running:
        made = running.send_file("POST", f"/upload?token={token}", png(), headers={})
        assert made.status == 201


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("POST", "/upload", ["AUTH_TOKEN", "media_store_write", "?token="]),
        ("POST", "/upload-image", ["AUTH_TOKEN", "media_store_write"]),
        ("GET", "/metrics", ["AUTH_TOKEN", "media_store_read"]),
        ("GET", "/api/auth/profile/", ["access token", "/api/auth/login/"]),
        ("POST", "/session", ["AUTH_TOKEN", "access token"]),
    ],
)
def test_who_has_no_credential_is_told_which_is_needed_and_how_it_is_sent(
    server, method, path, words
):
    answer = server.request(method, path)
    assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    said = answer.json["detail"]
    assert [word for word in (*words, "Authorization: Bearer") if word not in said] == []


@pytest.mark.parametrize(
    ("method", "path", "permission"),
    [
        ("POST", "/upload", "media_store_write"), ("POST", "/upload-image", "media_store_write"),
        ("GET", "/metrics", "media_store_read"),
    ],
)  # fmt: skip
def test_who_may_not_is_told_which_permission_is_missing(server, method, path, permission):
    refused = server.request(method, path, headers=bearer())
    assert (refused.status, permission in refused.json["detail"]) == (403, True)


REFUSED = [
    ("POST", "/upload?token=1.x", {}, "127.0.0.1 anonymous POST /upload: 401 ", True),
    ("GET", "/expired", {"Authorization": "Bearer x"}, "anonymous GET /expired: 401 ", True),
    ("GET", "/list?x=secret", bearer(exp=1), "anonymous GET /list: 401 ", False),  # expired
    ("GET", "/metrics", bearer(), "127.0.0.1 user:1000000007 GET /metrics: 403 ", False),
    ("POST", "/session?token={}", {}, "uploader POST /session: 403 ", False),
    ("POST", "/api/auth/login/", {}, "anonymous POST /api/auth/login/: 401 ", True),
    ("GET", "/%1b[2Jx", {"Authorization": "Bearer y"}, "anonymous GET /%1b[2Jx: 401", True),
]


@pytest.mark.parametrize(("method", "path", "headers", "line", "counted"), REFUSED)
def test_refused_credentials_are_lines_of_the_log_as_the_readme_s_filter_counts_them(
    server, method, path, headers, line, counted
):
    readme, length = (HERE / "README.md").read_text("utf-8"), len(server.log)
    rules = re.findall(r"^ +(failregex|ignoreregex) = (.*)$", readme, re.M)
    count, ignore = (re.compile(rule.replace("<HOST>", r"127\.0\.0\.1")) for _, rule in rules)
    if "login" in path:
        server.call(method, path, {"username": "eve", "password": "pass"})
    else:
        target = path.format(token := upload_token())  # which is soon too old
        fields = [f"{name}: {value}" for name, value in headers.items()]
        with Raw(server) as raw:
            raw.send(get_line(target, *fields, method=method))
            raw.answer()
        assert token[-64:] not in server.log
    (said,) = [each for each in server.log[length:].splitlines() if "refused " in each]
    assert said.startswith("mediaserver: refused ") and line in said
    assert said.isprintable()
    assert [secret for secret in ("?", "x=secret", "1.x", "eyJ") if secret in said] == []
    assert bool(count.search(said) and not ignore.search(said)) == counted


def test_who_brings_no_credential_is_no_line_of_the_log(server):
    length = len(server.log)
    assert server.get("/metrics").status == 401
    assert "refused" not in server.log[length:]


def test_a_log_that_nobody_reads_stops_nothing(monkeypatch):
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        for _ in range(20):
            ms.warn("x" * 10_000)
        settings = types.SimpleNamespace(log_format="json", trusted_proxies=())
        for _ in range(1000):
            ms.log_request(None, "192.0.2.1", ms.Response(), 0.1, settings=settings)
        assert not select.select([], [writer], [], 0)[1], "there was more than the pipe holds"


@pytest.mark.parametrize(("method", "path"), [("POST", "/upload"), ("GET", "/health")])
@pytest.mark.parametrize(
    "make",
    [
        lambda: upload_token(age=905), lambda: upload_token(age=-120),
        lambda: upload_token(secret="x"), lambda: "", lambda: "a" * 9000, lambda: "%00",
        lambda: "%ED%A0%80",
    ],
    ids=["old", "of the future", "another secret's", "empty", "long", "NUL", "no UTF-8"],
)  # fmt: skip
def test_a_wrong_upload_token_is_401_even_where_none_is_needed(server, method, path, make):
    answer = server.send_file(method, f"{path}?token={make()}", png(), headers={})
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert set(answer.json) == {"detail"}


SCOPED_KEY = ms.derive_key(UPLOAD_SECRET, "scoped tokens").hex()


def scoped(*scopes: str, seconds: float = 900, key: str = SCOPED_KEY, **limits: Any) -> str:
    """The query of a scoped token, as another program with the secret makes it, too."""
    limits = {"jti": "" if "uses" not in limits else uuid.uuid4().hex, **limits}
    exp = int(time.time() + seconds)
    claims = {"token_type": "scoped", "scope": " ".join(scopes), "exp": exp, **limits}
    return f"?token={ms.sign_jwt(claims, key)}"


def test_a_scoped_token_lets_do_what_it_says_where_it_says_and_nothing_else(start, server):
    running = start(read_auth_enabled="true")
    url = running.upload(png()).json["url"]
    path = local(url)

    def status(method: str, path: str, token: str, content: bytes | None = None) -> int:
        if content is None:
            return running.request(method, path + token).status
        return running.send_file(method, path + token, content, headers={}).status

    assert status("POST", "/upload", scoped("upload"), png()) == 201
    assert status("POST", "/upload", scoped("upload", path="/upload"), png()) == 201
    assert status("PUT", "/image/a.png", scoped("upload", path="/image"), png()) == 201
    assert status("POST", "/upload", scoped("upload", path="/image"), png()) == 403
    assert status("POST", "/upload", scoped("upload", path="/up"), png()) == 403
    assert status("POST", "/upload", scoped("read", "delete"), png()) == 403
    assert status("POST", "/upload-image", scoped("upload", "read", "delete"), png()) == 403
    allowed = (scoped("read"), scoped("read", path="/media"), scoped("read", path=path))
    assert [status("GET", path, token) for token in allowed] == [200] * 3
    refused = (scoped("upload"), scoped("read", path=f"{path}x"), scoped("delete"))
    methods = itertools.product(("GET", "HEAD"), refused)
    assert [status(method, path, token) for method, token in methods] == [403] * 6
    page = running.get(f"/{scoped('read', path='/media')}", accept="text/html")
    assert (page.status, page.body.count(b"<img")) == (200, 0)
    assert status("GET", "/list", scoped("read", path="/media")) == 403
    assert status("GET", "/metrics", scoped("read")) == 200
    assert status("POST", "/session", scoped("read")) == 403
    assert status("GET", "/api/media/media/", scoped("read")) == 403
    assert status("DELETE", path, scoped("upload", "read")) == 403
    assert status("DELETE", path, scoped("delete", path="/upload")) == 403
    detail = running.request("DELETE", path + scoped("upload", path="/x")).json["detail"]
    assert "only lets upload at /x and below" in detail
    assert status("DELETE", path, scoped("delete", path="/media")) == 200


@pytest.mark.parametrize(
    "token",
    [
        scoped("upload", seconds=-1), scoped("upload", key="x"), scoped("upload", key=JWT_KEY),
        scoped("upload", key=UPLOAD_SECRET), scoped("fly"), scoped(), scoped("upload", path="x"),
        scoped("upload", path=1), scoped("upload", max_bytes=0), scoped("upload", max_bytes="9"),
        scoped("upload", uses=True), scoped("upload", uses=1, jti=""), scoped("upload", exp=None),
        scoped("upload", token_type="access"), scoped("upload", uses=1, jti=5), "?token=a.b.c",
        scoped("upload") + "&token=" + upload_token(), scoped("upload")[:-2],
        scoped("upload")[:-43] + scoped("upload", path="/x")[-43:],  # another's signature
    ],
)  # fmt: skip
@pytest.mark.parametrize(("method", "path"), [("POST", "/upload"), ("GET", "/health")])
def test_a_scoped_token_that_is_none_is_401_everywhere(server, token, method, path):
    answer = server.send_file(method, f"{path}{token}", png(), headers={})
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_a_scoped_token_bounds_the_size_and_the_number_of_uploads(start):
    running = start()
    few, small = scoped("upload", uses=2), scoped("upload", max_bytes=2000)

    def send(token: str, content: bytes, name: str = "a.png") -> Answer:
        return running.send_file("POST", f"/upload{token}", content, name, headers={})

    assert send(small, png_of(2000)).status == 201
    answer = send(small, png_of(2001))
    assert (answer.status, "2000 bytes that its token" in answer.json["detail"]) == (413, True)
    assert [send(few, b"no picture").status for _ in range(3)] == [400] * 3, "none was used"
    with Raw(running) as raw:  # one that ends in the middle is not used either
        head = f"POST /upload{few} HTTP/1.1\r\nHost: a\r\nContent-Length: 999\r\n"
        raw.send(f"{head}Content-Type: multipart/form-data; boundary=frontier\r\n\r\n".encode())
        raw.send(form("a.png", png())[0][:50])
    assert send(few, png()).status == 201
    wait_until(lambda: send(few, png()).status == 201, "the use that was given back")
    assert send(few, png()).status == 401
    running.kill()
    running = start()
    assert send(few, png()).status == 401, "uses are counted for good"
    once = scoped("upload", uses=1)
    statuses = together(6, lambda number: send(once, png_of(300 + number)).status)
    assert sorted(statuses) == [201, *[401] * 5]
    assert running.get(f"/health{once}").status == 200, "what is open takes no use"


def test_a_use_of_a_token_is_given_back_where_too_many_wait(settings_of, tmp_path, monkeypatch):
    settings = settings_of(f"--storage_dir={tmp_path}", "--read_auth_enabled=true")
    ms.make_folders(settings)
    with ms.opened_app(settings) as app:
        once = scoped("read", uses=1, key=app.auth.scoped_key)
        application = ms.Dispatcher(app, ms.ROUTES)
        running = ms.Server(ms.open_listener("127.0.0.1", 0), application)
        running.port = running.socket.getsockname()[1]
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        statuses = []
        for most in (0, ms.MAX_DEFERRED, ms.MAX_DEFERRED):
            monkeypatch.setattr(ms, "MAX_DEFERRED", most)
            with Raw(running) as raw:
                raw.send(get_line(f"/list{once}"))
                statuses.append(raw.answer().status)
        running.stop()
        running.wake()
        thread.join()
        close_bare(running)
    assert statuses == [503, 200, 401]


SCOPED_COMMANDS = [
    (["--scope", "upload", "--path", "/upload", "--max-bytes", "500", "--uses", "1"],
     {"scope": "upload", "path": "/upload", "max_bytes": 500, "uses": 1}, 900),
    (["--scope", "read,delete", "--expires", "7d"], {"scope": "delete read", "path": "/"}, 604800),
    (["--expires=30m"], {"scope": "upload", "path": "/"}, 1800),
    (["--upload_tokens", "scoped"], {"scope": "upload", "path": "/"}, 900),
]  # fmt: skip


@pytest.mark.parametrize(("options", "claims", "seconds"), SCOPED_COMMANDS)
def test_the_token_command_makes_scoped_tokens(server, tmp_path, options, claims, seconds):
    command = ["token", *options, "--storage_dir", server.storage]
    token = run_program(*command, cwd=tmp_path, **SECRETS).stdout.strip()
    made = claims_of(token)
    assert 0 <= time.time() + seconds - made.pop("exp") < DEADLINE
    assert len(made.pop("jti")) == 16
    assert made == {"token_type": "scoped", **claims}
    assert server.get(f"/health?token={token}").status == 200
    derived = hmac.new(UPLOAD_SECRET.encode(), b"mediaserver key: scoped tokens", hashlib.sha256)
    decoded = need("jwt").decode(token, derived.hexdigest(), algorithms=["HS256"])
    assert decoded["scope"] == claims["scope"], "as the README says"


@pytest.mark.parametrize(
    ("option", "value"),
    [("scope", "fly"), ("scope", ""), ("path", "upload"), ("max-bytes", "0"), ("uses", "x"),
     ("expires", "0"), ("expires", "1y"), ("json", None)],
)  # fmt: skip
def test_what_no_token_can_be_limited_to_exits_2(tmp_path, option, value):
    words = [f"--{option}"] + ([value] if value is not None else [])
    done = run_program("token", *words, "--storage_dir", tmp_path, cwd=tmp_path, **SECRETS)
    assert (done.returncode, done.stdout) == (2, "")
    assert option.replace("-", "_") in done.stderr.splitlines()[-1]


def test_tokens_without_a_scope_can_be_turned_off(start, tmp_path):
    running = start(upload_tokens="scoped")
    wait_until(lambda: " token --scope upload " in running.log, "the first upload")
    plain = f"/upload?token={upload_token()}"
    answer = running.send_file("POST", plain, png(), headers={})
    assert (answer.status, "UPLOAD_TOKENS" in answer.json["detail"]) == (401, True)
    path = f"/upload{scoped('upload')}"
    assert running.send_file("POST", path, png(), headers={}).status == 201


def test_an_upload_token_is_good_for_as_long_as_the_setting_says(start):
    running = start(token_expiry_seconds="1000")
    tokens = (upload_token(900), upload_token(1001))
    assert [
        running.send_file("POST", f"/upload?token={token}", png(), headers={}).status
        for token in tokens
    ] == [201, 401]


CREDENTIALS: dict[str, dict[str, str]] = {
    "anonymous": {},
    "basic": {"Authorization": "Basic eDp5"},
    "user": bearer(),
    "reader": READER,
    "writer": WRITER,
    "admin": bearer(is_admin=True),
    "owner": OWNER,
    "owner in another case": {"Authorization": f"bEARER  {OWNER_KEY}"},
}
CLOSED = {"anonymous": 401, "basic": 401}  # all others: 403
ENDPOINTS = [  # access, method, path, the status of those who may, and who may
    ("open", "GET", "/health", 200, "everyone"),
    ("read", "GET", "/list", 200, "everyone"),
    ("read", "GET", "/media", 200, "everyone"),
    ("read", "GET", f"/image/{'0' * 64}", 404, "everyone"),
    ("read", "GET", f"/thumbnail/{'0' * 64}", 404, "everyone"),
    ("read", "GET", f"/preview/{'0' * 64}?size=320", 404, "everyone"),
    ("read", "GET", f"/exists?sha256={'0' * 64}", 200, "everyone"),
    ("read", "GET", "/gallery/items", 200, "everyone"),
    ("private read", "GET", "/image/none.png", 404, "reader"),
    ("upload", "POST", "/upload", 400, "writer"),
    ("upload", "DELETE", "/media/none.png", 404, "writer"),
    ("upload", "PUT", "/image/none.png", 400, "writer"),
    ("write", "POST", "/upload-image", 400, "writer"),
    ("private read", "GET", "/metrics", 200, "reader"),
    ("user", "GET", "/api/auth/profile/", 404, "user"),
    ("user", "GET", "/api/media/media/", 200, "user"),
    ("user", "POST", "/api/media/collections/", 400, "user"),
    ("read", "GET", "/entity/", 200, "everyone"),
    ("read", "GET", "/entity/987654321", 404, "everyone"),
    ("read", "GET", "/entity/987654321/file", 404, "everyone"),
    ("read", "GET", "/entity/987654321/versions", 404, "everyone"),
    ("write", "POST", "/entity/", 400, "writer"),
    ("write", "PUT", "/entity/987654321", 404, "writer"),
    ("write", "PATCH", "/entity/987654321", 404, "writer"),
    ("write", "DELETE", "/entity/987654321", 404, "writer"),
]


@pytest.fixture(scope="module")
def read_closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    storage = tmp_path_factory.mktemp("closed") / "pictures"
    with Server(storage, READ_AUTH_ENABLED="true") as running:
        yield running


@pytest.mark.parametrize("closed_reads", [False, True])
@pytest.mark.parametrize(("access", "method", "path", "good", "who"), ENDPOINTS)
def test_access_is_the_contracts_table_over_http(
    server, read_closed, closed_reads, access, method, path, good, who
):
    running = read_closed if closed_reads else server
    is_open = access == "open" or (access == "read" and not closed_reads)
    allowed = {"owner", "owner in another case", "admin", "reader" if access == "read" else who}
    if is_open:
        allowed = set(CREDENTIALS)
    elif who == "user":  # the owner's key is none
        allowed = {"user", "reader", "writer", "admin"}
    answers = {
        name: running.request(method, path, headers=headers)
        for name, headers in CREDENTIALS.items()
    }
    expected = {name: good if name in allowed else CLOSED.get(name, 403) for name in CREDENTIALS}
    assert {name: answer.status for name, answer in answers.items()} == expected
    assert {answer.headers["WWW-Authenticate"] for answer in answers.values()
            if answer.status == 401} <= {"Bearer"}  # fmt: skip
    wrong = running.request(method, path, headers={"Authorization": "Bearer wrong"})
    assert wrong.status == 401
    sign = "&" if "?" in path else "?"
    uploader = running.request(method, f"{path}{sign}token={upload_token()}")
    assert uploader.status == (good if is_open or access == "upload" else 403)


@pytest.mark.parametrize(
    ("secret", "headers", "status"),
    [
        (UPLOAD_SECRET, {"Authorization": "Bearer wrong"}, 401), ("another", OWNER, 401),
        (UPLOAD_SECRET, READER, 403), (UPLOAD_SECRET, bearer(exp=time.time() - 60), 401),
        (UPLOAD_SECRET, bearer(token_type="refresh"), 401), (UPLOAD_SECRET, OWNER, 201),
        (UPLOAD_SECRET, {"Authorization": "Basic eDp5"}, 201),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_two_credentials_must_both_be_good_and_the_bearer_decides(server, secret, headers, status):
    path = f"/upload?token={upload_token(secret=secret)}"
    assert server.send_file("POST", path, png(), headers=headers).status == status


def test_es256_tokens_of_the_public_key_are_read_and_none_without_one(start, server):
    claims = {"sub": "me", "exp": time.time() + 60, "permissions": ["media_store_read"]}
    token = {"Authorization": f"Bearer {es256(claims)}"}
    assert server.request("GET", "/health", headers=token).status == 401
    running = start(public_key_path=write_pem(server.storage.parent / "key.pem"))
    assert running.request("GET", "/image/none.png", headers=token).status == 404
    assert running.request("POST", "/upload-image", headers=token).status == 403


def write_pem(path: Path) -> str:
    path.write_text(PEM)
    return str(path)


# What a bearer's GET /entity/ and POST /entity/ answer with reads open, and with reads closed.
ENTITY_RIGHTS: dict[str, tuple[dict[str, object], tuple[int, int], tuple[int, int]]] = {
    "read": ({"permissions": ["media_store_read"]}, (200, 403), (200, 403)),
    "write": ({"permissions": ["media_store_write"]}, (200, 201), (403, 201)),
    "both": ({"permissions": ["media_store_read", "media_store_write"]}, (200, 201), (200, 201)),
    "admin": ({"is_admin": True}, (200, 201), (200, 201)),
    "bare": ({"permissions": ["another"]}, (200, 403), (403, 403)),
    "expired": ({"is_admin": True, "exp": 1}, (401, 401), (401, 401)),
    "foreign key": ({"is_admin": True, "foreign": True}, (401, 401), (401, 401)),
}


@pytest.mark.parametrize("mode", ["normal", "read-auth", "demo"])
def test_es256_permissions_and_modes_decide_over_entities(start, tmp_path, mode):
    settings = {"public_key_path": write_pem(tmp_path / "key.pem")}
    settings |= {"read_auth_enabled": "true"} if mode != "normal" else {}
    running = start(**settings, **({"auth_disabled": "true"} if mode == "demo" else {}))

    def answers(headers: dict[str, str]) -> tuple[int, int]:
        texts = {"is_collection": "true", "label": "x"}
        return (
            running.request("GET", "/entity/", headers=headers).status,
            running.send_file("POST", "/entity/", None, headers=headers, **texts).status,
        )

    free, none = (200, 201), {"normal": (200, 401), "read-auth": (401, 401)}
    assert answers({}) == none.get(mode, free)
    for who, (rights, normal, closed) in ENTITY_RIGHTS.items():
        claims = {"sub": "user123", "exp": time.time() + 600, **rights}
        token = es256(claims)
        if "foreign" in rights:
            signed = token.rpartition(".")[0]
            signature = sign_es256(signed.encode(), PRIVATE_KEY + 1)
            token = f"{signed}.{ms.encode_base64url(signature)}"
        expected = {"normal": normal, "read-auth": closed}.get(mode, free)
        assert answers({"Authorization": f"Bearer {token}"}) == expected, (mode, who)


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
def test_in_demo_mode_everyone_may_do_everything_whatever_they_carry(start, headers):
    running = start(auth_disabled="yes")
    assert running.send_file("PUT", "/image/a.jpg", png(), headers=headers).status == 201
    assert running.send_file("POST", "/upload-image", png(), headers=headers).status == 201
    assert running.request("GET", "/image/a.png?token=x", headers=headers).status == 200
    status, made = running.call("POST", MEDIA, {"name": "n", "type": "image"}, headers)
    assert (status, made["user"]) == (201, 0)
    assert running.call("GET", "/api/auth/profile/", None, headers)[0] == 200
    made = running.send_file("POST", "/entity/", None, headers=headers, is_collection="true")
    assert made.status == 201


# ======================================================================================
# 4. Media facts
# ======================================================================================

# Samples are built here by the formats' own rules, each as small as it can be.

MADE = 1556938921.0  # 2019-05-04 03:02:01 UTC


def box(kind: bytes, *body: bytes) -> bytes:
    content = b"".join(body)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def chunk(kind: bytes, *body: bytes, order: str = "<") -> bytes:
    content = b"".join(body)
    return struct.pack(order + "4sI", kind, len(content)) + content + bytes(len(content) & 1)


def element(name: int, *body: bytes) -> bytes:
    content = b"".join(body)
    size = (len(content) | 1 << 28).to_bytes(4, "big")
    return name.to_bytes((name.bit_length() + 7) // 8, "big") + size + content


def tiff(*directories: dict[int, object], order: str = "<", following: bool = False) -> bytes:
    """Directories in a row. An int is a LONG, bytes are ASCII, lists RATIONALs of `n / 100`."""
    start, out = 8, b""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    for number, tags in enumerate(directories):
        values_start = start + 2 + 12 * len(tags) + 4
        entries, values = b"", b""
        for tag, value in sorted(tags.items()):
            if isinstance(value, int):
                entries += struct.pack(order + "HHII", tag, 4, 1, value)
                continue
            if isinstance(value, bytes):
                kind, count, raw = 2, len(value) + 1, value + b"\0"
            else:
                kind, count = 5, len(value)
                raw = b"".join(struct.pack(order + "II", round(v * 100), 100) for v in value)
            if len(raw) <= 4:
                entries += struct.pack(order + "HHI4s", tag, kind, count, raw.ljust(4, b"\0"))
            else:
                where = values_start + len(values)
                entries += struct.pack(order + "HHII", tag, kind, count, where)
                values += raw
        last = number + 1 == len(directories) or not following
        after = 0 if last else values_start + len(values)
        out += struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", after)
        out += values
        start = values_start + len(values)
    return head + out


def exif_tiff(order: str = "<", **changes: bytes) -> bytes:
    """IFD0, EXIF and GPS directories; the offsets are found by building twice."""
    main = {0x10F: b"Acme", 0x110: b"Box 1", 0x112: 6, 0x132: b"2020:01:01 00:00:00"}
    detail = {0x9003: b"2019:05:04 05:02:01", 0x9011: b"+02:00", 0x9291: b"25"}
    detail |= {int(k[1:], 16): v for k, v in changes.items()}
    place = {1: b"S", 2: [33, 30, 0], 3: b"E", 4: [151, 15, 0], 6: [58]}
    first = tiff(main | {0x8769: 0, 0x8825: 0}, order=order)
    second = tiff(detail, order=order)
    offsets = {0x8769: len(first), 0x8825: len(first) + len(second) - 8}
    return tiff(main | offsets, detail, place, order=order)


def jpeg_of(*segments: tuple[int, bytes], frame: int = 0xC0) -> bytes:
    segments = (*segments, (frame, struct.pack(">BHHB", 8, 30, 40, 3) + bytes(9)))
    return b"\xff\xd8" + b"".join(jpeg_segment(*each) for each in segments) + b"\xff\xda"


def full(version: int, *body: bytes) -> bytes:
    return bytes([version, 0, 0, 0]) + b"".join(body)


MATRIX = {1: (1, 0, 0, 1), 3: (-1, 0, 0, -1), 6: (0, 1, -1, 0), 8: (0, -1, 1, 0)}


def moov(turn: int = 1, units: int = 3000, version: int = 0, *more: bytes) -> bytes:
    made = int(MADE) + 2082844800
    clock = struct.pack(">QQIQ" if version else ">IIII", made, made, 1000, units)
    a, b, c, d = (value * 65536 for value in MATRIX[turn])
    head = struct.pack(">9iII", a, b, 0, c, d, 0, 0, 0, 1 << 30, 640 << 16, 360 << 16)
    numbers = struct.pack(">QQIIQ" if version else ">IIIII", 0, 0, 1, 0, 0)
    track = box(
        b"trak",
        box(b"tkhd", full(version, numbers, bytes(16), head)),
        box(b"mdia", box(b"mdhd", full(version, clock)), box(b"hdlr", full(0, bytes(4), b"vide"))),
    )
    return box(b"moov", box(b"mvhd", full(version, clock)), track, *more)


def mp4_of(brand: bytes = b"isom", movie: bytes | None = None) -> bytes:
    movie_box = moov() if movie is None else movie
    return box(b"ftyp", brand, bytes(4), b"mp42") + box(b"mdat", bytes(99)) + movie_box


def quicktime() -> bytes:
    pairs = {
        b"com.apple.quicktime.creationdate": b"2019-05-04T05:02:01+0200",
        b"com.apple.quicktime.location.ISO6709": b"-33.5000+151.2500+058.000/",
        b"com.apple.quicktime.make": b"Acme",
    }
    keys = b"".join(box(b"mdta", name) for name in pairs)
    values = b"".join(
        box(struct.pack(">I", i), box(b"data", bytes(8), value))
        for i, value in enumerate(pairs.values(), 1)
    )
    handler = box(b"hdlr", full(0, bytes(4), b"mdta"))
    meta = box(
        b"meta", handler, box(b"keys", full(0, struct.pack(">I", 3), keys)), box(b"ilst", values)
    )
    return mp4_of(b"qt  ", moov(6, 3000, 1, meta))


def fragmented() -> bytes:
    def fragment(at: int) -> bytes:
        header = box(b"tfhd", full(0, struct.pack(">I", 1)))
        time = box(b"tfdt", full(1, struct.pack(">Q", at)))
        run = box(b"trun", struct.pack(">III", 0x100, 2, 500) + struct.pack(">I", 500))
        return box(b"moof", box(b"traf", header, time, run)) + box(b"mdat", b"x")

    return mp4_of(b"iso5", moov(1, 0)) + b"".join(fragment(at) for at in (0, 1000, 2000))


def heif(turn: bytes = b"", brand: bytes = b"heic") -> bytes:
    block = struct.pack(">I", 0) + exif_tiff()
    properties = [box(b"ispe", full(0, struct.pack(">II", 40, 30)))]
    properties += [box(turn[:4], turn[4:])] if turn else []
    links = bytes([len(properties), *range(1, len(properties) + 1)])

    def meta(where: int) -> bytes:
        items = b"".join(
            box(b"infe", full(2, struct.pack(">HH4s", number, 0, kind)))
            for number, kind in ((1, b"hvc1"), (2, b"Exif"))
        )
        place = struct.pack(">HHHHHII", 0x4400, 1, 2, 0, 1, where, len(block))
        return box(
            b"meta",
            full(0),
            box(b"pitm", full(0, struct.pack(">H", 1))),
            box(b"iinf", full(0, struct.pack(">H", 2), items)),
            box(
                b"iprp",
                box(b"ipco", *properties),
                box(b"ipma", full(0, struct.pack(">IH", 1, 1), links)),
            ),
            box(b"iloc", full(0, place)),
        )

    start = box(b"ftyp", brand, bytes(4), brand)
    return start + meta(len(start) + len(meta(0)) + 8) + box(b"mdat", block)


def matroska(doc_type: bytes, kind: int = 1) -> bytes:
    nanoseconds = (int(MADE) - 978307200) * 10**9
    info = element(
        0x1549A966,
        element(0x2AD7B1, (10**6).to_bytes(3, "big")),
        element(0x4489, struct.pack(">d", 3000)),
        element(0x4461, nanoseconds.to_bytes(8, "big")),
    )
    video = element(0xE0, element(0xB0, b"\x02\x80"), element(0xBA, b"\x01\x68"))
    tracks = element(
        0x1654AE6B, element(0xAE, element(0x83, bytes([kind])), video if kind == 1 else b"")
    )
    return element(0x1A45DFA3, element(0x4282, doc_type)) + element(0x18538067, info, tracks)


def matroska_from_behind() -> bytes:
    """Its seek head leads past a cluster to the tracks."""
    file = matroska(b"matroska")
    tracks = file.index(bytes.fromhex("1654ae6b"))
    info = file[file.index(bytes.fromhex("1549a966")) : tracks]
    cluster = element(0x1F43B675, bytes(50))

    def seek(at: int) -> bytes:
        entry = element(0x53AB, b"\x16\x54\xae\x6b"), element(0x53AC, at.to_bytes(4, "big"))
        return element(0x114D9B74, element(0x4DBB, *entry))

    at = len(seek(0)) + len(info) + len(cluster)
    ebml = file[: file.index(bytes.fromhex("18538067"))]
    return ebml + element(0x18538067, seek(at), info, cluster, file[tracks:])


def avi() -> bytes:
    main = struct.pack("<10I", 40000, 0, 0, 0, 75, 0, 1, 0, 640, 360)
    stream = chunk(b"strh", b"vids", bytes(16), struct.pack("<IIII", 1, 25, 0, 75))
    header = chunk(
        b"LIST",
        b"hdrl",
        chunk(b"avih", main),
        chunk(b"LIST", b"strl", stream),
        chunk(b"IDIT", b"2019"),
        chunk(b"IDIT", b"Sat May  4 03:02:01 2019\n"),
    )
    return chunk(b"RIFF", b"AVI ", header)


def wav(kind: bytes = b"RIFF") -> bytes:
    form = struct.pack("<HHIIHH", 1, 1, 8000, 8000, 1, 8)
    sizes = chunk(b"ds64", struct.pack("<QQQ", 0, 24000, 0)) if kind == b"RF64" else b""
    data = chunk(b"data", bytes(24000))
    data = data[:4] + b"\xff\xff\xff\xff" + data[8:] if sizes else data
    return kind + bytes(4) + b"WAVE" + sizes + chunk(b"fmt ", form) + data


def ogg_page(flags: int, granule: int, *packets: bytes) -> bytes:
    head = struct.pack("<4sBBqIIIB", b"OggS", 0, flags, granule, 7, 0, 0, len(packets))
    return head + bytes(map(len, packets)) + b"".join(packets)


def ogg(first: bytes, granule: int, *pages: bytes) -> bytes:
    """An Ogg stream whose last page, behind those given, ends at `granule`."""
    return ogg_page(2, 0, first) + b"".join(pages) + ogg_page(4, granule, b"xx")


MP3_FRAME = b"\xff\xfb\x90\x00" + bytes(413)  # MPEG 1 layer III, 128 kbit/s, 44,100 Hz
ADTS_FRAME = b"\xff\xf1\x50\x80\x01\x9f\xfc" + bytes(5)  # 12 bytes, 44,100 Hz
VORBIS = b"\1vorbis" + bytes(5) + struct.pack("<I12xB", 44100, 0xB8) + b"\1"
OPUS = b"OpusHead\1\2" + struct.pack("<HI", 312, 44100)
THEORA = (
    b"\x80theora\3\2\1"
    + bytes(4)
    + b"\0\2\x80\0\1\x68"
    + bytes(2)
    + struct.pack(">II", 25, 1)
    + bytes(10)
    + b"\0\xc0"
)  # keyframe shift 6
FLAC = b"fLaC\0\0\0\x22" + bytes(10) + (44100 << 44 | 132300).to_bytes(8, "big") + bytes(16)
APE = bytes(32 + 9000) + b"APETAGEX" + struct.pack("<IIII", 2000, 9032, 0, 1 << 31) + bytes(8)
ID3 = b"ID3\4\0\0\0\0\0\x0a" + bytes(10)


def pes(clock: int, payload: bytes = b"", stream: int = 0xE0) -> bytes:
    """A packet of a video with its presentation time (ISO 13818-1, section 2.4.3.6)."""
    time = bytes([0x21 | clock >> 29 & 14]) + struct.pack(
        ">HH", clock >> 14 & 0xFFFE | 1, clock << 1 & 0xFFFE | 1
    )
    return b"\0\0\1" + bytes([stream]) + b"\0\0\x80\x80\5" + time + payload


def ts_packet(payload: bytes) -> bytes:
    filling = 183 - len(payload)
    return b"\x47\1\0\x30" + bytes([filling]) + bytes(filling) + payload


def transport(first: bytes = b"", prefix: bytes = b"") -> bytes:
    """Four frames of a second each behind an hour, the last two in the wrong order."""
    clocks = [3600 * 90_000 + 90_000 * n for n in (0, 1, 3, 2)]
    frames = [first, b"", b"", b""]
    return b"".join(prefix + ts_packet(pes(*each)) for each in zip(clocks, frames, strict=True))


H264_SIZE = bytes.fromhex("0000000167640028acd940780227e5c044")  # 1920 x 1080, cropped from 1088
HEVC_SIZE = bytes.fromhex(  # 638 x 358, cropped from 640 x 368
    "000000014201010408000003009e08" "00000300003f9000a0402e3b8bcb2b2a"
)  # fmt: skip
AVCHD_TIME = (
    b"\0\0\1\6\5\x27" + bytes.fromhex("17ee8c60f84d11d98cd60800200c9a66") + b"MDPM\2"
    + bytes.fromhex("1804201905" "1904050201")
)  # fmt: skip  # +02:00, 2019-05, the 4th at 05:02:01
MPEG2_SIZE = b"\0\0\1\xb3\x28\x01\x68"  # 640 x 360
PS = b"\0\0\1\xba\x44\0\4\0\4" + bytes(5)


def asf_object(name: str, *body: bytes) -> bytes:
    content = b"".join(body)
    return bytes.fromhex(name) + struct.pack("<Q", 24 + len(content)) + content


def asf(*objects: bytes, comment: int = 9) -> bytes:
    """A header with a comment, the length of 3 s behind a preroll of 1 s, and more."""
    made = (int(MADE) + 11_644_473_600) * 10**7
    length = struct.pack("<QQQQQQ", 0, made, 0, 40_000_000, 0, 1000)
    note = asf_object("3326b2758e66cf11a6d900aa0062ce6c", bytes(comment))
    file = asf_object("a1dcab8c47a9cf118ee400c00c205365", bytes(16), length)
    header = struct.pack("<IH", 2 + len(objects), 0x201) + note + file + b"".join(objects)
    return asf_object("3026b2758e66cf11a6d900aa0062ce6c", header)


ASF_VIDEO = asf_object(
    "9107dcb7b7a9cf118ee600c00c205365", bytes.fromhex("c0ef19bc4d5bcf11a8fd00805f5c442b"),
    bytes(38), struct.pack("<II", 640, 360))  # fmt: skip


def flv(**numbers: float) -> bytes:
    notes = b"".join(
        struct.pack(">H", len(name)) + name.encode() + b"\0" + struct.pack(">d", number)
        for name, number in numbers.items()
    )
    body = b"\2\0\x0aonMetaData\x08" + struct.pack(">I", len(numbers)) + notes + b"\0\0\x09"
    tag = b"\x12" + len(body).to_bytes(3, "big") + bytes(7) + body
    last = b"\x09\0\0\1\0\x0b\xb8\0\0\0\0x"  # a picture at 3,000 ms
    sized = b"".join(each + struct.pack(">I", len(each)) for each in (tag, last))
    return b"FLV\1\5\0\0\0\x09" + bytes(4) + sized


def big_tiff(order: str) -> bytes:
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HHHQQ", 43, 8, 0, 16, 2)
    sides = ((256, 40), (257, 30))
    entries = [struct.pack(order + "HHQQ", tag, 16, 1, side) for tag, side in sides]
    return head + b"".join(entries) + bytes(8)


def many_fragments(index: str = "") -> bytes:
    """8,000 fragments of a second each."""

    def fragment(second: int) -> bytes:
        header = box(b"tfhd", full(0, struct.pack(">I", 1)))
        run = box(b"trun", full(0, struct.pack(">I", 1)))
        time = box(b"tfdt", full(1, struct.pack(">Q", 1000 * second)))
        return box(b"moof", box(b"traf", header, time, run)) + box(b"mdat", b"x" * 9)

    usual = box(b"mvex", box(b"trex", full(0, struct.pack(">IIIII", 1, 1, 1000, 0, 0))))
    start, pieces = mp4_of(b"iso5", moov(1, 0, 0, usual)), [fragment(n) for n in range(8000)]
    if index == "sidx":
        entries = struct.pack(">III", len(pieces[0]), 1000, 0) * 8000
        start += box(b"sidx", full(0, struct.pack(">IIIIHH", 1, 1000, 0, 0, 0, 8000), entries))
    video = start + b"".join(pieces)
    if index == "mfra":
        entry = struct.pack(">IIBBB", 0, len(video) - len(pieces[-1]), 1, 1, 1)
        table = box(b"tfra", full(0, struct.pack(">III", 1, 0, 1), entry))
        video += box(b"mfra", table, box(b"mfro", full(0, struct.pack(">I", len(table) + 24))))
    return video + (b"" if index != "none" else box(b"free", bytes(99)))


CAMERA = {
    "created": MADE + 0.25, "created_source": "exif", "orientation": 6, "make": "Acme",
    "model": "Box 1", "latitude": -33.5, "longitude": 151.25, "altitude": 58.0,
}  # fmt: skip
SMALL = {"width": 40, "height": 30}
VIDEO = {"width": 640, "height": 360, "duration": 3.0}
DATED_VIDEO = VIDEO | {"created": MADE, "created_source": "container"}
XMP = b'<rdf:Description xmp:CreateDate="2019-05-04T05:02:01+02:00"/>'
XMP_MADE = {"created": MADE, "created_source": "xmp"}
PROFILE = b"\nexif\n%8d\n%b\n" % (len(exif_tiff()) + 6, (b"Exif\0\0" + exif_tiff()).hex().encode())
SVG_PROLOG = b'<?xml version="1.0"?><!-- <html> --><!DOCTYPE svg PUBLIC "x" [<!ENTITY a "b">]>\n'

SAMPLES: dict[str, tuple[bytes, str, dict[str, object]]] = {
    "JPEG": (jpeg_of((0xE0, b"JFIF\0"), (0xE1, b"Exif\0\0" + exif_tiff())), "image/jpeg",
             SMALL | CAMERA),
    "JPEG, big-endian EXIF, progressive":
        (jpeg_of((0xE1, b"Exif\0\0" + exif_tiff(">")), frame=0xC2), "image/jpeg", SMALL | CAMERA),
    "JPEG, XMP only": (jpeg_of((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)), "image/jpeg",
                       SMALL | XMP_MADE),
    "JPEG, broken EXIF": (jpeg_of((0xE1, b"Exif\0\0II*\0\xff\xff\0\0")), "image/jpeg", SMALL),
    "JPEG, stray bytes": (jpeg_of((0xE0, b"")).replace(b"\xff\xc0", b"zz\xff\xff\xff\xc0"),
                          "image/jpeg", SMALL),
    "PNG, edited": (png_with((b"tIME", b"\x07\xe3\5\4\3\2\1")), "image/png",
                    SMALL | {"created": None}),
    "PNG, eXIf after the pixels":
        (png_with((b"IDAT", b""), (b"eXIf", exif_tiff())), "image/png", SMALL | CAMERA),
    "PNG, raw profile":
        (png_with((b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(PROFILE))),
         "image/png", SMALL | CAMERA),
    "PNG, packed XMP": (png_with((b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP))),
                        "image/png", SMALL | XMP_MADE),
    "PNG, wordy time": (png_with((b"tEXt", b"Creation Time\0Sat, 04 May 2019 03:02:01 GMT")),
                        "image/png", {"created": MADE, "created_source": "png"}),
    "APNG": (png_with((b"acTL", bytes(8))), "image/apng", SMALL),
    "GIF": (b"GIF89a" + struct.pack("<HHBBB", 40, 30, 0, 0, 0) + b";", "image/gif", SMALL),
    "GIF, animated": (
        b"GIF89a" + struct.pack("<HHBBB", 40, 30, 0x80, 0, 0) + bytes(6)
        + 3 * (b"!\xf9\4\0" + struct.pack("<H", 50) + b"\0\0," + bytes(9) + b"\2\1\0\0") + b";",
        "image/gif", SMALL | {"duration": 1.5}),
    "WebP, lossy": (chunk(b"RIFF", b"WEBP", chunk(b"VP8 ", bytes(3), b"\x9d\1\x2a",
                                                  struct.pack("<HH", 40, 30))),
                    "image/webp", SMALL),
    "WebP, lossless": (chunk(b"RIFF", b"WEBP", chunk(b"VP8L", b"\x2f",
                                                     struct.pack("<I", 39 | 29 << 14))),
                       "image/webp", SMALL),
    "WebP, extended": (chunk(b"RIFF", b"WEBP", chunk(b"VP8X", b"\x08\0\0\0\x27\0\0\x1d\0\0"),
                             chunk(b"EXIF", exif_tiff())), "image/webp", SMALL | CAMERA),
    "BMP": (b"BM" + bytes(12) + struct.pack("<IiiHH", 40, 40, -30, 1, 24) + bytes(24),
            "image/bmp", SMALL),
    "BMP, OS/2": (b"BM" + bytes(12) + struct.pack("<IHHHH", 12, 40, 30, 1, 24), "image/bmp",
                  SMALL),
    "TIFF": (tiff({0x100: 40, 0x101: 30}), "image/tiff", SMALL),
    "TIFF, thumbnail first": (tiff({0xFE: 1, 0x100: 4, 0x101: 3}, {0xFE: 0, 0x100: 40, 0x101: 30},
                                   order=">", following=True), "image/tiff", SMALL),
    "DNG": (tiff({0xC612: 1, 0x100: 40, 0x101: 30}), "image/x-adobe-dng", SMALL),
    "NEF": (tiff({0xFE: 1, 0x10F: b"NIKON CORPORATION", 0x14A: 8 + 2 + 36 + 4 + 18},
                 {0xFE: 0, 0x100: 40, 0x101: 30}), "image/x-nikon-nef", SMALL),
    "BigTIFF": (big_tiff("<"), "image/tiff", SMALL),
    "BigTIFF, big-endian": (big_tiff(">"), "image/tiff", SMALL),
    "RW2": (tiff({4: 2, 5: 4, 6: 32, 7: 44}).replace(b"II*", b"IIU"), "image/x-panasonic-rw2",
            SMALL),
    "JPEG 2000, bare": (b"\xff\x4f\xff\x51\0\x29\0\0" + struct.pack(">IIII", 44, 32, 4, 2),
                        "image/x-j2c", SMALL),
    "HEIC": (heif(), "image/heic", SMALL | CAMERA | {"orientation": 1}),
    "HEIC, turned left": (heif(b"irot\1"), "image/heic", SMALL | {"orientation": 8}),
    "HEIC, turned and told by EXIF": (heif(b"irot\2"), "image/heic", {"orientation": 3}),
    "AVIF, mirrored": (heif(b"imir\1", b"avif"), "image/avif", SMALL | {"orientation": 2}),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="40px" height="30"/>',
            "image/svg+xml", SMALL),
    "SVG, long prolog": (b"\xef\xbb\xbf" + SVG_PROLOG
                         + b"<svg:svg viewBox='0 0 40 30' width='100%'>", "image/svg+xml", SMALL),
    "SVG, UTF-16": ("\ufeff<svg width='30pt' height='22.5pt'>".encode("utf-16-le"),
                    "image/svg+xml", SMALL),
    "ICO": (b"\0\0\1\0\1\0\x28\x1e\0\0\1\0\x20\0" + bytes(8), "image/x-icon", SMALL),
    "JPEG XL": (b"\xff\x0a" + (0 | 0 << 1 | 29 << 3 | 0 << 12 | 0 << 15 | 39 << 17
                               | 0 << 26 | 1 << 27 | 5 << 28).to_bytes(8, "little"), "image/jxl",
                SMALL | {"orientation": 6}),
    "JPEG 2000": (box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 ", bytes(4))
                  + box(b"jp2h", box(b"ihdr", struct.pack(">II", 30, 40))), "image/jp2", SMALL),
    "MP4": (mp4_of(), "video/mp4", DATED_VIDEO | {"orientation": 1}),
    "MP4, turned": (mp4_of(movie=moov(8)), "video/mp4", DATED_VIDEO | {"orientation": 8}),
    "MP4, fragmented": (fragmented(), "video/mp4", VIDEO),
    "M4V": (mp4_of(b"M4V "), "video/x-m4v", DATED_VIDEO),
    "3GP": (mp4_of(b"3gp5"), "video/3gpp", DATED_VIDEO),
    "MOV": (quicktime(), "video/quicktime",
            DATED_VIDEO | {"orientation": 6, "make": "Acme", "latitude": -33.5, "altitude": 58.0}),
    "MOV without ftyp": (box(b"wide") + moov(), "video/quicktime", DATED_VIDEO),
    "Matroska": (matroska(b"matroska"), "video/x-matroska", DATED_VIDEO),
    "WebM": (matroska(b"webm"), "video/webm", DATED_VIDEO),
    "Matroska, tracks behind the clusters":
        (matroska_from_behind(), "video/x-matroska", DATED_VIDEO),
    "Matroska, audio": (matroska(b"matroska", 2), "audio/x-matroska", {"duration": 3.0}),
    "WebM, audio": (matroska(b"webm", 2), "audio/webm", {"duration": 3.0, "extension": "webm"}),
    "AVI": (avi(), "video/x-msvideo",
            VIDEO | {"created": time.mktime((2019, 5, 4, 3, 2, 1, 0, 0, -1))}),
    "Ogg Theora": (ogg(THEORA, 74 << 6 | 1), "video/ogg", VIDEO),
    "MPEG-TS": (transport(MPEG2_SIZE), "video/mp2t", VIDEO | {"duration": 4.0, "created": None}),
    "HEVC": (transport(HEVC_SIZE), "video/mp2t", {"width": 638, "height": 358}),
    "AVCHD": (transport(AVCHD_TIME + H264_SIZE, bytes(4)), "video/mp2t",
              DATED_VIDEO | {"width": 1920, "height": 1080, "duration": 4.0, "extension": "m2ts"}),
    "MPEG-PS": (PS + pes(0, MPEG2_SIZE) + PS + pes(90_000) + PS + pes(180_000), "video/mpeg",
                VIDEO),
    "MPEG-PS, a start by chance": (
        PS + pes(0, MPEG2_SIZE) + PS + pes(180_000)
        + bytes.fromhex("000001C0 0123 8080 05 2F FFFF FFFF") + bytes(999), "video/mpeg",
        VIDEO | {"duration": 4.0}),
    "WMV": (asf(ASF_VIDEO), "video/x-ms-wmv", DATED_VIDEO),
    "WMA": (asf(), "audio/x-ms-wma", {"duration": 3.0, "kind": "audio"}),
    "FLV": (flv(duration=3, width=640, height=360), "video/x-flv", VIDEO),
    "FLV, live": (flv(), "video/x-flv", {"duration": 3.0}),
    "MP4, indexed fragments": (many_fragments("mfra"), "video/mp4", VIDEO | {"duration": 8000.0}),
    "MP4, listed fragments": (many_fragments("sidx"), "video/mp4", VIDEO | {"duration": 8000.0}),
    "MP4, many fragments": (many_fragments(), "video/mp4", VIDEO | {"duration": 8000.0}),
    "AMR": (b"#!AMR\n" + (b"\x3c" + bytes(31)) * 150, "audio/amr", {"duration": 3.0}),
    "AMR, wideband": (b"#!AMR-WB\n" + (b"\x44" + bytes(60)) * 150, "audio/amr",
                      {"duration": 3.0}),
    "WAV": (wav(), "audio/x-wav", {"duration": 3.0}),
    "WAV, packed": (chunk(b"RIFF", b"WAVE",
                          chunk(b"fmt ", struct.pack("<HHIIHH", 85, 1, 8000, 0, 1, 0)),
                          chunk(b"fact", struct.pack("<I", 24000)), chunk(b"LIST", b"INFO"),
                          chunk(b"data", bytes(99))), "audio/x-wav", {"duration": 3.0}),
    "RF64": (wav(b"RF64"), "audio/x-wav", {"duration": 3.0}),
    "AIFF": (chunk(b"FORM", b"AIFF", chunk(b"COMM", b"\0\1" + struct.pack(">IHHQ", 24000, 16, 16383
             + 12, 8000 << 51), order=">"), order=">"), "audio/x-aiff", {"duration": 3.0}),
    "FLAC": (FLAC, "audio/flac", {"duration": 3.0}),
    "FLAC behind ID3": (ID3 + FLAC, "audio/flac", {"duration": 3.0}),
    "MP3": (ID3 + MP3_FRAME * 115, "audio/mpeg", {"duration": pytest.approx(3.0, abs=0.01)}),
    "MP3, Xing": (MP3_FRAME[:36] + b"Xing\0\0\0\1" + struct.pack(">I", 1000) + MP3_FRAME[48:]
                  + MP3_FRAME, "audio/mpeg", {"duration": pytest.approx(26.122, abs=0.001)}),
    "MP3, VBRI": (MP3_FRAME[:36] + b"VBRI" + bytes(10) + struct.pack(">I", 1000) + MP3_FRAME[54:]
                  + MP3_FRAME, "audio/mpeg", {"duration": pytest.approx(26.122, abs=0.001)}),
    "MP3, padded": (ID3 + bytes(20_000) + MP3_FRAME * 115, "audio/mpeg",
                    {"duration": pytest.approx(3.0, abs=0.01)}),
    "MP3, ID3v2 behind": (MP3_FRAME * 115 + bytes(10_010) + b"3DI\4\0\x10\0\0\x4e\x10",
                          "audio/mpeg", {"duration": pytest.approx(3.0, abs=0.01)}),
    "MP3, tags behind": (MP3_FRAME * 115 + APE + b"TAG" + bytes(125), "audio/mpeg",
                         {"duration": pytest.approx(3.0, abs=0.01)}),
    "AAC": (ADTS_FRAME * 129, "audio/aac", {"duration": pytest.approx(3.0, abs=0.01)}),
    "Vorbis": (ogg(VORBIS, 132300), "audio/ogg", {"duration": 3.0}),
    "Vorbis that begins later": (ogg(VORBIS, 441024, ogg_page(0, 310772, b"a", b"b")),
                                 "audio/ogg", {"duration": 3.0}),
    "Vorbis, cut within a page": (ogg(VORBIS, 441000, ogg_page(0, 1024, b"a"),
                                      ogg_page(0, 132300, b"a"))[:-1], "audio/ogg",
                                  {"duration": 3.0}),
    "Opus": (ogg(OPUS, 144312), "audio/ogg", {"duration": 3.0}),
    "Opus that begins later": (ogg(OPUS, 192000, ogg_page(0, 48960, b"\x78a", b"\x78b",
                                                          b"\x78c")), "audio/ogg",
                               {"duration": pytest.approx(3.04)}),
    "Opus of many frames a packet": (ogg(OPUS, 192000, ogg_page(0, 53760, b"\x7b\6")),
                                     "audio/ogg", {"duration": 3.0}),
}  # fmt: skip


def probe(data: bytes) -> ms.Facts | None:
    return ms.probe(io.BytesIO(data))


@pytest.mark.parametrize("name", SAMPLES)
def test_a_file_is_known_by_its_bytes(name: str) -> None:
    data, mime_type, expected = SAMPLES[name]
    got = probe(data)
    assert got is not None and got.mime_type == mime_type
    assert {field: getattr(got, field) for field in expected} == expected
    head = probe(data[: ms.HEAD_BYTES])
    assert head is not None and (head.kind, head.mime_type) == (got.kind, got.mime_type)


def test_an_svg_is_known_behind_a_licence_that_is_longer_than_a_head():
    licence = b"<!--" + b"x" * 60_000 + b"-->"
    got = probe(licence + b"<svg width='40' height='30'/>")
    assert got == ms.Facts("image", "image/svg+xml", "svg", width=40, height=30)
    assert probe(licence + b"<html><svg/></html>") is None


@pytest.mark.parametrize(
    "head",
    [
        b"", b"\0" * 4096, b"hello, world\n" * 300, b"BM is a text that begins so, and goes on",
        b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + MP3_FRAME * 3, b"PK\3\4" + bytes(30) + MP3_FRAME * 2,
        b"\x7fELF\2\1\1" + bytes(60), b"<!DOCTYPE html><svg><script>", b"<html><svg></svg></html>",
        b"<?xml version='1.0'?><rss/>", b"<svgfoo/>", b"x<svg/>", b"<!-- <svg> --><p>",
        b"G" * 4096,
        b"The free mdat of moov", MP3_FRAME, MP3_FRAME + b"x" + MP3_FRAME, ADTS_FRAME,
        b"\xff\xfe" + "notes in UTF-16".encode("utf-16-le") * 50, b"\x1f\x8b\x08" + bytes(50),
        b"RIFF\x10\0\0\0ACON", b"#!/bin/sh\n", b"{}", b"\xff\xd8", b"\0\1\0\0\0\x10",
        b"FORM....ILBM",
    ],
)  # fmt: skip
def test_what_is_no_image_video_or_audio_is_nothing(head: bytes) -> None:
    assert probe(head) is None


@pytest.mark.parametrize(
    ("text", "zone", "seconds"),
    [
        (b"2019:05:04 05:02:01", b"+02:00", MADE), (b"2019:05:04 03:02:01", b"Z", MADE),
        (b"2019-05-04T05:02:01+0200", b"", MADE), (b"2019:05:03 22:02:01", b"-05:00", MADE),
        (b"2019:05:04 05:02:01", b"", "local"), (b"2019:05:04 05:02:01\0", b"   :  ", "local"),
        (b"0000:00:00 00:00:00", b"", None), (b"    :  :     :  :  ", b"", None),
        (b"\0 2019:05:04 05:02:01\0junk", b"+2:00\0", MADE),
        (b"2019/ 5/ 4  5:02:01AM", b"+02", MADE), (b"2019/5/4 3:02:01 UTC", b"+02:00", MADE),
        (b"2019-05-04 05:02:01+99:00", b"+02:00", MADE),
        (b"Sat May 04 03:02:01 2019\n\0", b"Z", MADE),
        (b"2019:05:04 5:02:01PM", b"+14:00", MADE), (b"2019:05:04 05:02:01", b"+15:01", "local"),
        (b"2019:05:04 05:02:01", b"-18:00", "local"), (b"2019:05:04 5:02:01AM", b"", "local"),
        (b"Sat May  4 05:02:01 2019\0\0", b"", "local"),
        (b"2019:13:04 05:02:01", b"Z", None), (b"2019:02:30 05:02:01", b"Z", None),
        (b"2019:05:04 25:02:01", b"Z", None), (b"yesterday", b"", None), (b"", b"", None),
    ],
)  # fmt: skip
def test_a_time_without_a_zone_is_local_and_an_impossible_one_none(
    text: bytes, zone: bytes, seconds: float | str | None
) -> None:
    if seconds == "local":
        seconds = time.mktime((2019, 5, 4, 5, 2, 1, 0, 0, -1))
    assert ms.parse_time(text, zone) == seconds


EDITED = b'<x xmlns:e="http://ns.adobe.com/exif/1.0/" xmp:CreateDate="2020-01-01T00:00:00Z"'
IPTC = b"\x1c\2\x37\0\x0820190504\x1c\2\x3c\0\x0b050201+0200"
RESOURCES = b"8BIM\4\2\0\0\0\0\0\1x\0" + b"8BIM\4\4\0\0" + struct.pack(">I", len(IPTC)) + IPTC
PACKET = EDITED + b"><e:DateTimeOriginal>\n2019-05-04T03:02:01Z</e:DateTimeOriginal></x>"
DATED = EDITED + b' photoshop:DateCreated="2019-05-04T03:02:01Z"/>'
NO_TIME = {"x9003": b"0000:00:00 00:00:00"}


@pytest.mark.parametrize(
    ("tags", "others", "source"),
    [
        ({"x9011": b"+02:00"}, b"", "exif"),
        ({"x9011": b"", "x9010": b"+02:00"}, b"", "exif"),  # the offset of another time
        ({"x9011": b"+77:00", "x9012": b"+2:00"}, b"", "exif"),
        ({"x9003": b"    :  :     :  :  ", "x9004": b"2019:05:04 03:02:01", "x9012": b"Z"},
         b"", "exif"),
        ({"x9003": b"1815:06:18 11:00:00", "x9004": b"2019:05:04 03:02:01", "x9012": b"Z"},
         PACKET, "exif"),
        (NO_TIME, PACKET, "xmp"),  # its original, not its making; nor EXIF's edit
        (NO_TIME, DATED, "xmp"),  # Photoshop's time before its making
        (NO_TIME, b"Photoshop 3.0\0" + RESOURCES, "iptc"),
        (NO_TIME, b"", None),
    ],
)  # fmt: skip
def test_a_picture_was_taken_when_its_best_time_says_and_never_when_it_was_edited(
    tags: dict[str, bytes], others: bytes, source: str | None
) -> None:
    block = b"Exif\0\0" + exif_tiff(**{"x9291": b"", **tags})
    got = probe(jpeg_of((0xED if b"8BIM" in others else 0xE1, others), (0xE1, block)))
    assert got and (got.created, got.created_source) == (MADE if source else None, source)


@pytest.mark.parametrize(
    ("told", "source"), [(("PNG", "IPTC", "XMP"), "xmp"), (("IPTC", "PNG"), "iptc")]
)
def test_xmp_is_asked_before_iptc_and_iptc_before_the_time_of_a_png(told, source) -> None:
    iptc = b"\niptc\n%8d\n%b\n" % (len(RESOURCES), RESOURCES.hex().encode())
    later = PACKET.replace(b"2019-05", b"2018-05")
    chunks = [{
        "PNG": (b"tEXt", b"Creation Time\x002021-01-01T00:00:00Z"),
        "IPTC": (b"tEXt", b"Raw profile type iptc\0" + iptc),
        "XMP": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + later),
    }[name] for name in told]  # fmt: skip
    got = probe(png_with(*chunks, *reversed(chunks)))
    assert got and got.created_source == source
    assert (got.created == MADE) is (source == "iptc")


def made_at(seconds: int, movie: int = 0, track: int = 0, media: int = 0) -> bytes:
    """A video with times in its three kinds of headers, in seconds since 1904."""
    name = struct.pack(">I", seconds)
    movie_head, media_head = (
        box(kind, full(0, name * flag or bytes(4), bytes(4), struct.pack(">II", 1000, 3000)))
        for kind, flag in ((b"mvhd", movie), (b"mdhd", media))
    )
    track_head = box(b"tkhd", full(0, name * track or bytes(4), bytes(76)))
    handler = box(b"hdlr", full(0, bytes(4), b"vide"))
    return movie_head + box(b"trak", track_head, box(b"mdia", media_head, handler))


def noted(kind: bytes, text: bytes, seconds: int = 1 << 31) -> bytes:
    """A video with a note in its user data, and another time in its header."""
    return made_at(seconds, 1) + box(b"udta", box(kind, text))


WHEN, ZERO_1970 = int(MADE) + 2082844800, 2082844800
ITEM = box(b"\xa9day", box(b"data", bytes(8), b"2019-05-04T05:02:01+0200"))
RECORDED = b"2019-05-04 05:02:01+02:00"
LATER = b"\0\x19\0\0" + b"2020-01-01 00:00:00Z"
KEYED = box(b"meta", box(b"hdlr", full(0, bytes(4), b"mdta")), box(
    b"keys", full(0, struct.pack(">I", 1), box(b"mdta", b"com.apple.quicktime.creationdate"))
), box(b"ilst", box(b"\0\0\0\1", box(b"data", bytes(8), RECORDED))))  # fmt: skip
TAGS = element(0x1254C367, element(0x7373, element(
    0x67C8, element(0x45A3, b"DATE_RECORDED"), element(0x4487, RECORDED))))  # fmt: skip


@pytest.mark.parametrize(
    ("video", "expected"),
    [
        (mp4_of(movie=box(b"moov", made_at(WHEN, 1))), MADE),
        (mp4_of(movie=box(b"moov", made_at(WHEN, 0, 1))), MADE),
        (mp4_of(movie=box(b"moov", made_at(WHEN, 0, 0, 1))), MADE),
        (mp4_of(movie=box(b"moov", made_at(0))), None),
        (mp4_of(movie=box(b"moov", made_at(ZERO_1970, 1, 1, 1))), None),
        (mp4_of(movie=box(b"moov", noted(b"\xa9day", LATER, 0), KEYED)), MADE),
        (mp4_of(movie=box(b"moov", box(b"mvhd", full(0, WHEN.to_bytes(4, "big"), bytes(12))),
                          made_at(1 << 31, 0, 1, 1))), MADE),
        (mp4_of(movie=box(b"moov", noted(b"date", RECORDED))), MADE),
        (mp4_of(movie=box(b"moov", noted(b"\xa9day", b"\0\x19\0\0" + RECORDED))), MADE),
        (mp4_of(movie=box(b"moov", noted(b"meta", bytes(4) + box(b"ilst", ITEM)))), MADE),
        (mp4_of(movie=box(b"moov", noted(b"XMP_", PACKET, 0))), MADE),
        (element(0x1A45DFA3, element(0x4282, b"matroska")) + element(0x18538067, TAGS), MADE),
        (element(0x1A45DFA3, element(0x4282, b"matroska"))
         + element(0x18538067, element(0x1549A966, element(0x4461, bytes(8))), TAGS), MADE),
        (chunk(b"RIFF", b"AVI ", chunk(b"LIST", b"hdrl", chunk(b"IDIT", b"2019/ 5/ 4  5:02AM\0"))),
         "local"),
        (chunk(b"RIFF", b"AVI ", chunk(b"LIST", b"hdrl"), chunk(b"_PMX", PACKET)), MADE),
    ],
)  # fmt: skip
def test_a_video_was_made_when_its_best_time_says(video: bytes, expected: Any) -> None:
    if expected == "local":
        expected = time.mktime((2019, 5, 4, 5, 2, 0, 0, 0, -1))
    got = probe(video)
    assert got and got.kind == "video" and got.created == expected


class LargeVideo(io.RawIOBase):
    """A 4 GiB video with its index at the end, of which nothing but the ends exists."""

    def __init__(self) -> None:
        self.index, self.at, self.bytes_read = moov(), 0, 0
        self.start = box(b"ftyp", b"isom", bytes(4)) + struct.pack(">I4sQ", 1, b"mdat", 4 << 30)
        self.size = 16 + (4 << 30) + len(self.index)

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = self.size + offset if whence else offset
        return self.at

    def read(self, count: int = -1) -> bytes:
        tail = self.size - len(self.index)
        part = self.start[self.at :] if self.at < tail else self.index[self.at - tail :]
        data = part[:count].ljust(min(count, max(0, tail - self.at)), b"\0")
        self.bytes_read += len(data)
        return data


def test_a_video_of_four_gigabytes_costs_kilobytes() -> None:
    video = LargeVideo()
    got = ms.probe(video)  # type: ignore[arg-type]
    assert got is not None and (got.width, got.duration) == (640, 3.0)
    assert video.bytes_read < 20_000


def test_of_fragments_without_an_index_the_last_one_within_reach_counts() -> None:
    got = probe(many_fragments("none"))
    assert got is not None and got.duration is not None and 1000 < got.duration < 8000


def test_a_long_comment_makes_no_audio_of_a_video() -> None:
    got = probe(asf(ASF_VIDEO, comment=50_000))
    assert got is not None and (got.kind, got.width) == ("video", 640)


def test_frames_of_changing_size_are_counted_all_over_the_file() -> None:
    quiet = b"\xff\xfb\x10\x00" + bytes(100)  # 32 kbit/s
    got = probe(quiet * 20_000 + MP3_FRAME * 20_000)
    assert got is not None and got.duration == pytest.approx(40_000 * 1152 / 44100, rel=0.02)


def test_what_a_broken_file_still_says_is_kept() -> None:
    data = jpeg_of((0xE1, b"Exif\0\0" + exif_tiff()))
    got = probe(data[:-30])
    assert got is not None and (got.make, got.width) == ("Acme", None)


HOSTILE = {
    "a compressed text that unpacks to 64 MiB": png_with(
        *[(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(1 << 26), 9))] * 20
    ),
    "a thousand EXIF blocks of full directories": jpeg_of(
        *[(0xE1, b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 512) + bytes(12 * 512))] * 1000
    ),
    "a directory that follows itself": b"II*\0\x08\0\0\0\1\0" + bytes(12) + b"\x08\0\0\0",
    "a sub-directory list of all the file": b"II*\0\x08\0\0\0\1\0" + struct.pack(
        "<HHII", 0x14A, 4, 1 << 15, 8) + bytes(1 << 18),
    "boxes of no length": mp4_of() + box(b"free") * 100_000,
    "nested boxes": mp4_of(movie=b"".join(
        struct.pack(">I4s", 8 * (5000 - i), b"moov") for i in range(5000))),
    "audio that is all sync": ID3 + b"\xff" * 200_000,
    "audio that is all sync behind its start": MP3_FRAME * 3 + b"\xff" * 1_500_000,
    "audio of frames that none follows": MP3_FRAME * 3 + b"\xff\xfb\x90\x01" * 400_000,
    "frames of seven bytes": ID3 + b"\xff\xf1\x50\x80\0\xff\xfc" * 30_000,
    "pages without end": b"OggS\0" * 40_000,
    "a length of 2^64": struct.pack(">I4sQ", 1, b"ftyp", (1 << 64) - 1) + bytes(64),
    "an SVG of comments": b"<!---->" * 600 + b"<svg " + b"a='" * 30_000,
    "a prolog without end": b"<?a?>" * 100_000,
    "DTDs without end": b"<!DOCTYPE svg [" * 7000,
    "letters behind a tag": b"<svg " + b"a" * 65_000,
    "attributes without end": b"<svg " + b"a=''" * 16_000,
    "many compressed texts": png_with(
        *[(b"zTXt", b"Creation Time\0\0" + zlib.compress(bytes(1 << 18), 9))] * 4000),
    "many times that are none": png_with(
        *[(b"tEXt", b"Creation Time\0Mon, 10 Mar 20031 15:04:43 GMT")] * 14_000),
    "chunks of EXIF": chunk(b"RIFF", b"WEBP", chunk(b"EXIF", exif_tiff()) * 10_000),
    "chunks of XMP": chunk(b"RIFF", b"WEBP", chunk(b"XMP ", XMP * 4000) * 10),
    "XMP that is all names": chunk(
        b"RIFF", b"WEBP", chunk(b"XMP ", b"<" + b"xmp:CreateDate" * 18_000) * 10),
    "an animation without frames": SAMPLES["GIF"][0][:-1] + b"!\xf9\0" * 400_000,
    "sub-blocks of one byte": SAMPLES["GIF"][0][:-1] + b"!\xf9" + b"\1a" * 600_000,
    "an AVI of dates": chunk(b"RIFF", b"AVI ", chunk(
        b"LIST", b"hdrl", chunk(b"IDIT", b"Sat May  4 03:02:01 2019x") * 20_000)),
    "tracks without end": element(0x1A45DFA3, element(0x4282, b"webm")) + element(
        0x18538067, element(0x1654AE6B, element(0xAE, element(0x83, b"\1")) * 20_000)),
    "a run of samples": mp4_of(b"iso5", moov(1, 0)) + box(b"moof", box(
        b"traf", box(b"tfhd", full(0, struct.pack(">I", 1))),
        box(b"tfdt", full(1, struct.pack(">Q", 9))),
        box(b"trun", struct.pack(">III", 0x100, 480_000, 1), bytes(1_920_000)))),
    "notes without end": box(b"ftyp", b"qt  ", bytes(4)) + box(b"moov", box(
        b"udta", box(b"\xa9day", bytes(4), b"2019:00:00:00 aaaa:") * 30_000)),
    "times of packets": PS + pes(0) * 40_000,
    "a transport stream of times": ts_packet(pes(0) * 13) * 4000,
    "resources of Photoshop": jpeg_of(*[(0xED, b"8BIM\1\1\0\0\0\0\0\0" * 5000)] * 9),
    "data sets of IPTC": jpeg_of(*[
        (0xED, b"8BIM\4\4\0\0\0\0\xea\x60" + b"\x1c\2\5\0\0" * 12_000)] * 9),
    "speech of one byte": b"#!AMR\n" + b"\x7c" * 400_000,
    "objects without end": asf()[:16] + struct.pack("<QIH", 1 << 30, 9, 9) + ASF_VIDEO * 9000,
    "segments without end": b"\xff\xd8" + b"\xff\xe0\0\2" * 100_000,
}  # fmt: skip


def takes_less(seconds: float, work: Callable[[], object]) -> bool:
    """Whether one of three calls takes less CPU: others' garbage may be collected in one."""
    for _ in range(3):
        start = time.thread_time()
        work()
        if time.thread_time() - start < seconds:
            return True
    return False


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_costs_little_time_and_memory(name: str) -> None:
    assert takes_less(0.3, lambda: probe(HOSTILE[name]))  # 0.04 at the most, where this was made
    tracemalloc.start()
    try:
        probe(HOSTILE[name])
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def used_patterns() -> Iterator[tuple[str, str, re.Pattern[Any]]]:
    """Place, way of use and pattern, of all that others' bytes are matched with.

    Not `.env`'s: that is the owner's own, and its grammar python-dotenv's.
    """
    statements = ast.parse(PROGRAM.read_text()).body
    others = [each for each in statements if "dotenv" not in ast.unparse(each)[:40].lower()]
    for node in itertools.chain.from_iterable(map(ast.walk, others)):
        match node:
            case ast.Call(ast.Attribute(ast.Name("re"), way), [form, *_]) if way not in (
                "compile",  # what is compiled is looked at where it is used
                "escape",
            ):
                with contextlib.suppress(NameError):  # a local variable
                    form = eval(ast.unparse(form), vars(ms))
                    yield f"line {node.lineno}", way, re.compile(form)
            case ast.Attribute(ast.Name(name), way) if isinstance(
                pattern := getattr(ms, name, None), re.Pattern
            ):
                yield name, way, pattern
    for each in ms.FORMATS.values():
        if each.start:
            yield f"the start of {each.extension}", "match", re.compile(each.start, re.DOTALL)


def is_in(character: str, items: list[Any]) -> bool:
    """Whether a set of a parsed pattern has a character."""
    found = False
    for operator, value in items:
        match str(operator), value:
            case "LITERAL", code:
                found |= code == ord(character)
            case "RANGE", (lowest, highest):
                found |= lowest <= ord(character) <= highest
            case "CATEGORY", category:
                _, *negated, kind = str(category).split("_")
                holds = {"DIGIT": str.isdigit, "SPACE": str.isspace}.get(kind, str.isalnum)
                found |= holds(character) != bool(negated)
    return found != (str(items[0][0]) == "NEGATE")


def shortest_match(parsed: Any, favourite: str) -> str:
    text, characters = "", favourite + "a0 " + "".join(map(chr, range(256)))
    for operator, value in parsed:
        match str(operator), value:
            case "LITERAL", code:
                text += chr(code)
            case ("ANY" | "NOT_LITERAL" | "IN") as kind, _:
                items = {"ANY": [("NEGATE", None)], "IN": value}.get(kind)
                items = items or [("NEGATE", None), ("LITERAL", value)]
                text += next(c for c in characters if is_in(c, items))
            case "BRANCH", (_, options):
                text += shortest_match(options[0], favourite)
            case "SUBPATTERN", (*_, inner):
                text += shortest_match(inner, favourite)
            case (("MAX_REPEAT" | "MIN_REPEAT"), (lowest, _, inner)):
                text += shortest_match(inner, favourite) * lowest
    return text


def repetitions(parsed: Any, favourite: str, before: str = "") -> Iterator[tuple[str, str]]:
    """What a text needs to get to each repetition of a pattern, and what is repeated there."""
    for operator, value in parsed:
        match str(operator), value:
            case (("MAX_REPEAT" | "MIN_REPEAT"), (_, most, inner)):
                if most > 9:
                    yield before, shortest_match(inner, favourite) or favourite
                yield from repetitions(inner, favourite, before)
            case "BRANCH", (_, options):
                for option in options:
                    yield from repetitions(option, favourite, before)
            case (("SUBPATTERN" | "ASSERT" | "ASSERT_NOT"), (*_, inner)):
                yield from repetitions(inner, favourite, before)
        before += shortest_match([(operator, value)], favourite)


def attacks(pattern: re.Pattern[Any], size: int) -> Iterator[Any]:
    """Long texts that nearly match: each repetition, and what leads there, many times over."""
    parser = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
    form = (
        pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode("latin-1")
    )
    parsed = parser.parse(form, pattern.flags & ~re.UNICODE)
    for favourite in ' a0"':
        for before, unit in {*repetitions(parsed, favourite)}:
            for start, again in ((before, unit), ("", before + unit), (before, unit + favourite)):
                for end in ("", "\n!", '"'):
                    text = start + again * (size // len(again)) + end
                    yield text.encode("latin-1") if isinstance(pattern.pattern, bytes) else text


def test_every_pattern_is_linear() -> None:
    """A quadratic one holds the GIL for seconds where a head or a tag of 64 KiB comes in."""
    found = {(pattern, way): place for place, way, pattern in used_patterns()}
    assert len(found) > 60
    slow = []
    for (pattern, way), place in found.items():
        run = getattr(pattern, way) if way in ("match", "fullmatch") else pattern.findall
        for text in {*attacks(pattern, 1 << 12)}:
            if not takes_less(0.03, functools.partial(run, text)):  # it takes 0.001 at the most
                slow.append((place, way, text[:40]))
    assert slow == []


def test_no_cut_and_no_mutation_raises() -> None:
    rng = random.Random(4)
    samples = [data[:6000] for data, _, _ in SAMPLES.values()]
    for data in samples:
        for end in range(0, min(len(data), 400), 3):
            probe(data[:end])
    for _ in range(15_000):
        data, other = bytearray(rng.choice(samples)), rng.choice(samples)
        for _ in range(rng.choice((1, 2, 5))):
            at = min(int(rng.expovariate(0.01)), len(data) - 1)
            cut = rng.randrange(len(other))
            data[at : at + rng.choice((1, 4))] = rng.choice(
                (b"\0", b"\xff\xff\xff\xff", b"\x7f\xff", bytes([rng.randrange(256)]),
                 other[cut : cut + 8])
            )  # fmt: skip
        probe(bytes(data))


# ======================================================================================
# 5. Index
# ======================================================================================


@pytest.mark.parametrize("others", [0, 1])
def test_a_write_that_fails_takes_nothing_else_with_it(tmp_path, others):
    """Alone in its transaction, or with one that waits for the same commit."""

    def fail(db: sqlite3.Connection) -> None:
        db.execute("REPLACE INTO meta VALUES ('failed', '1')")
        raise ValueError("the one that fails")

    with contextlib.closing(ms.open_index(tmp_path / "index")) as index:
        waiting = [
            ms.Change(lambda db: db.execute("REPLACE INTO meta VALUES ('other', '1')"), True)
        ]
        index._waiting.extend(waiting[:others])
        with pytest.raises(ValueError, match="the one that fails"):
            index.write(fail)
        index.set_meta("later", "1")
        found = [index.get_meta(key) for key in ("failed", "other", "later")]
        assert found == [None, "1" if others else None, "1"]
        assert [change.error for change in waiting] == [None]


def test_all_that_wait_for_one_commit_are_written_once_a_full_disk_has_room(tmp_path):
    with contextlib.closing(ms.open_index(tmp_path / "index")) as index:
        pages = index._writer.execute("PRAGMA page_count").fetchone()[0]
        index._writer.execute(f"PRAGMA max_page_count = {pages}")
        index.spare.release = lambda: index._writer.execute("PRAGMA max_page_count = 100000")
        insert = "REPLACE INTO meta VALUES (?, ?)"
        values = [("first", "1"), ("large", "0" * 100_000), ("last", "1")]
        changes = [
            ms.Change(functools.partial(lambda value, db: db.execute(insert, value), value), True)
            for value in values
        ]
        index._waiting.extend(changes)
        index._commit_waiting()
        assert [change.error for change in changes] == [None] * 3
        assert [(key, index.get_meta(key)) for key, _ in values] == values


@pytest.fixture
def index(tmp_path: Path) -> Iterator[ms.Index]:
    with contextlib.closing(ms.open_index(tmp_path / "index")) as opened:
        yield opened


def test_a_threads_connection_is_closed_when_the_thread_ends(index):
    """Each look at the folder for /health is a thread: descriptors ran out before garbage did."""
    used: list[sqlite3.Connection] = []
    thread = threading.Thread(target=lambda: used.append(index.read("SELECT 1").connection))
    thread.start()
    thread.join()

    def is_closed() -> bool:
        with contextlib.suppress(sqlite3.ProgrammingError):
            used[0].execute("SELECT 1")
            return False
        return True

    wait_until(is_closed)


def plans(index: ms.Index, ask: Callable[[], object]) -> list[str]:
    """How SQLite goes about each SELECT that `ask` has the index run."""
    run, read = [], index.read
    index.read = lambda sql, *values, db=None: run.append((sql, values)) or read(sql, *values)
    ask()
    del index.read
    selects = [(sql, values) for sql, values in run if sql.startswith("SELECT")]
    rows = [read(f"EXPLAIN QUERY PLAN {sql}", *values) for sql, values in selects]
    return [" ".join(row[3] for row in found) for found in rows]


@pytest.mark.parametrize("beside", [False, True])
def test_whether_files_are_known_in_a_folder_or_beside_it_is_looked_up(index, beside):
    """Health asks it each time where media/ is a bucket's and nothing else is on disk."""
    (found,) = plans(index, lambda: index.files.is_empty("library", "media/", beside=beside))
    keyed = found.count("USING PRIMARY KEY (root=? AND path")
    assert (keyed, found.count("SEARCH")) == (1 + beside, 1 + beside)


@pytest.mark.parametrize("kind", [(), (("type", "image"),)], ids=["all", "of a type"])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("order", ["created_at", "name", "size"])
def test_lists_of_accounts_go_by_indexes(index, order, descending, kind):
    query = ms.Query(1, kind, order=((order, descending),))
    (count,) = plans(index, lambda: index.media.count(query))
    assert "USING COVERING INDEX media_by_" in count
    (found,) = plans(index, lambda: list(index.media.each(query, 10)))
    assert "USING INDEX media_by_" in found
    assert "TEMP B-TREE" not in found


@pytest.mark.parametrize(
    ("filters", "by"),
    [
        ({"kind": "image"}, "entity_by_kind"), ({"parent_id": 5}, "entity_by_parent"),
        ({"mime_type": "x"}, "entity_by_mime_type"), ({"extension": "x"}, "entity_by_extension"),
        ({"is_collection": True}, "entity_collection"), ({"is_deleted": True}, "entity_deleted"),
    ],
)  # fmt: skip
def test_lists_of_entities_go_by_indexes(index, filters, by):
    count, page = plans(index, lambda: index.entities.page(None, filters, "", limit=10, offset=0))
    assert by in count
    assert by in page
    assert "TEMP B-TREE" not in page
    (found,) = plans(index, lambda: index.entities.get_many([1, 2], None))
    assert "SEARCH entity USING INTEGER PRIMARY KEY" in found
    assert "SEARCH asset USING PRIMARY KEY" in found


@pytest.mark.parametrize("version", range(3, len(ms.MIGRATIONS) + 1))
def test_an_index_of_an_earlier_program_is_upgraded_with_everything_in_it(tmp_path, version):
    """From the third step on there were programs that people ran."""
    path, sha = tmp_path / "index", "0" * 64
    rows = {
        "asset": {"sha256": sha, "size": 9, "kind": "image", "mime_type": "image/png",
                  "extension": "png", "orientation": 1, "md5": "5" * 32},
        "file": {"root": "entities", "path": b"a.png", "sha256": sha, "size": 9, "mtime_ns": 1,
                 "ctime": 1.0, "added": 1.0},
        "user": {"id": 7, "email": "A@x.org", "email_key": "a@x.org", "username": "ann",
                 "first_name": "A", "last_name": "B", "password": "hash", "created_at": 2.0,
                 "permissions": ms.READ_PERMISSION},
        "session": {"id": "s", "user_id": 7, "jti": "j", "rotated_at": 3.0, "expires_at": 9e9,
                    **({"created_at": 3.0} if version > 3 else {})},
        "media": {"id": "m", "user_id": 7, "name": "mine", "type": "image", "folded": "mine",
                  "created_at": 4.0, "updated_at": 4.0},
        "entity": (entity := {
            "id": 5, "version": 1, "transaction_id": 1, "is_collection": 0, "label": "sea",
            "is_deleted": 0, "added": 5.0, "updated": 5.0, "path": "a.png", "sha256": sha,
            "kind": "image", "mime_type": "image/png", "extension": "png", "search": "sea",
        }),
        "entity_version": entity,
    }  # fmt: skip
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for step in ms.MIGRATIONS[:version]:
            db.executescript(step)
        db.execute(f"PRAGMA user_version = {version}")
        for table, row in rows.items():
            marks = ", ".join("?" * len(row))
            db.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", [*row.values()])
    with contextlib.closing(ms.open_index(path)) as index:
        assert index.value("PRAGMA user_version") == len(ms.MIGRATIONS)
        assert index.users.find("ann") == ms.User(
            7, "A@x.org", "ann", None, "A", "B", "hash", ms.READ_PERMISSION, True
        )
        (session,) = index.sessions.of_user(7, 10.0)
        assert (session.id, session.jti, session.created_at) == ("s", "j", 3.0)
        assert index.media.get(7, "m").name == "mine"
        (found,) = index.entities.versions(5)
        assert found == index.entities.get(5)
        assert (found.label, found.asset.facts.kind, found.asset.md5) == ("sea", "image", "5" * 32)
        assert index.files.get("entities", "a.png")[0].sha256 == sha
        assert index.files.library_version()
    assert not [*tmp_path.glob("*damaged*")]


def test_an_index_of_a_newer_program_is_left_as_it_is(index, tmp_path):
    index.write(lambda db: db.execute(f"PRAGMA user_version = {len(ms.MIGRATIONS) + 1}"))
    index.close()
    before = index.path.read_bytes()
    with pytest.raises(ms.SettingError, match="newer mediaserver"):
        ms.open_index(index.path)
    assert index.path.read_bytes() == before


def test_an_account_has_at_most_so_many_sessions_and_those_that_end_last_stay(index, monkeypatch):
    monkeypatch.setattr(ms, "MAX_SESSIONS", 2)
    users = [index.write(lambda db: index.users.add(db, an_account(), 0.0)) for _ in range(2)]
    for name, user, expires_at in (
        ("a", 0, 9e9), ("b", 0, 7e9), ("of another", 1, 5e9), ("c", 0, 8e9), ("late", 0, 6e9),
    ):  # fmt: skip
        session = ms.Session(name, users[user].id, name, 1e9, expires_at, 1e9)
        opened = functools.partial(index.sessions.open, user=users[user], session=session)
        assert index.write(opened)
    found = index.read("SELECT id FROM session ORDER BY id").fetchall()
    assert found == [("a",), ("c",), ("of another",)]


@pytest.mark.parametrize(
    ("root", "size", "mtime_ns", "ctime", "links", "same"),
    [
        ("library", 3, 2_000_000_001, 4.0, 1, True), ("library", 4, 2_000_000_001, 4.0, 1, False),
        ("library", 3, 2_000_000_000, 4.0, 1, False), ("library", 3, 2_000_000_001, 5.0, 1, False),
        ("images", 3, 2_000_000_001, 5.0, 1, False), ("images", 3, 2_000_000_001, 5.0, 2, True),
        ("images", 4, 2_000_000_001, 4.0, 2, False), ("users", 3, 2_000_000_001, 5.0, 1, True),
        ("users", 3, 3_000_000_001, 5.0, 1, False), ("images", 3, 2_000_000_000, 5.0, 0, True),
        ("images", 3, 3_000_000_000, 5.0, 0, False),  # an object, whose store keeps no parts
    ],
)  # fmt: skip
def test_a_file_is_the_same_by_what_its_folder_leaves_as_it_is(
    root, size, mtime_ns, ctime, links, same
):
    status = types.SimpleNamespace(
        st_size=size, st_mtime_ns=mtime_ns, st_ctime=ctime, st_nlink=links
    )
    assert ms.is_same(root, (3, 2_000_000_001, 4.0), status) is same


def test_a_count_is_kept_until_something_is_written(index, monkeypatch):
    counted: list[str] = []
    read = index.read
    monkeypatch.setattr(
        index, "read", lambda *given, **db: counted.append(given[0]) or read(*given, **db)
    )
    assert [index.count("meta WHERE key = ?", "x") for _ in range(3)] == [0, 0, 0]
    assert len([sql for sql in counted if "count(*)" in sql]) == 1
    index.set_meta("x", "1")
    assert [index.count("meta WHERE key = ?", "x") for _ in range(2)] == [1, 1]
    monkeypatch.setattr(ms, "MAX_COUNTS", 1)
    assert [index.count("meta WHERE key = ?", key) for key in "yx"] == [0, 1]
    assert len([sql for sql in counted if "count(*)" in sql]) == 4  # it was not known any more


def test_the_index_is_written_ahead_and_waits_for_the_disk_where_it_must(index):
    assert index.read("PRAGMA journal_mode").fetchone() == ("wal",)
    modes = [
        index.write(lambda db: db.execute("PRAGMA synchronous").fetchone()[0], durable=durable)
        for durable in (True, False, True)
    ]
    assert modes == [2, 1, 2]  # FULL, NORMAL


def test_an_account_gets_no_id_under_which_another_programs_user_has_records(index):
    for table, user_id in (("collection", 1), ("media", 2)):
        row = {"id": f"{user_id}", "user_id": user_id, "name": "n", "folded": "n"}
        row |= {
            "created_at": 0,
            "updated_at": 0,
            **({"type": "image"} if table == "media" else {}),
        }
        names, marks = ", ".join(row), ", ".join(f":{name}" for name in row)
        sql = f"INSERT INTO {table} ({names}) VALUES ({marks})"
        index.write(lambda db, sql=sql, row=row: db.execute(sql, row))
    assert index.write(lambda db: index.users.add(db, an_account(), 0.0)).id == 3


def test_space_that_is_kept_for_the_index_is_given_up_and_taken_again_after_a_while(
    tmp_path, monkeypatch
):
    spare = ms.SpareSpace(tmp_path / "index")
    held = tmp_path / "index-spare"
    spare.hold()
    assert (held.stat().st_size, spare.missed_at) == (ms.SPARE_BYTES, None)
    assert spare.release()
    assert (held.exists(), spare.missed_at is None, spare.release()) == (False, False, False)
    spare.hold()
    assert (held.exists(), spare.missed_at is None) == (False, False)
    monkeypatch.setattr(ms, "SPARE_SECONDS", -1.0)
    spare.hold()
    assert (held.exists(), spare.missed_at) == (True, None)


@pytest.mark.parametrize("call", ["statvfs", "posix_fallocate"])
def test_of_a_disk_that_has_hardly_any_space_none_is_kept(tmp_path, monkeypatch, call):
    def answer(*_: Any) -> Any:
        if call == "statvfs":
            return types.SimpleNamespace(f_bavail=ms.SPARE_BYTES - 1, f_frsize=1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ms.os, call, answer)
    spare = ms.SpareSpace(tmp_path / "index")
    spare.hold()
    assert (spare.missed_at is not None, [*tmp_path.iterdir()]) == (True, [])


def test_where_sqlite_can_make_no_file_is_named_as_a_setting_that_is_wrong(tmp_path):
    (tmp_path / f"{ms.INDEX_NAME}-wal").mkdir()
    with pytest.raises(ms.SettingError, match="the index cannot be opened"):
        ms.open_index(tmp_path / ms.INDEX_NAME)


def test_an_index_and_its_copies_are_for_their_owner_alone(index, tmp_path):
    index.copy_to(tmp_path / "copy")
    index.write(lambda db: index.users.add(db, an_account(), 0.0))
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    names = ("copy", "index", "index-wal", "index-shm", "index-spare")
    assert modes == dict.fromkeys(names, 0o600)


@pytest.mark.parametrize("is_suspect", [False, True])
def test_an_index_in_which_damage_was_met_is_compared_with_its_own_indexes(
    index, capsys, is_suspect
):
    schema = "FROM sqlite_schema WHERE name = 'login_failure_by_time'"
    index.close()
    with contextlib.closing(sqlite3.connect(index.path, isolation_level=None)) as db:
        row = db.execute(f"SELECT * {schema}").fetchone()
        db.execute("PRAGMA writable_schema = ON")
        db.execute(f"DELETE {schema}")
    with contextlib.closing(sqlite3.connect(index.path, isolation_level=None)) as db:
        db.execute("INSERT INTO login_failure VALUES ('a', 1, 'b', 1)")  # in the table alone
        db.execute("PRAGMA writable_schema = ON")
        db.execute("INSERT INTO sqlite_schema VALUES (?, ?, ?, ?, ?)", row)
    if is_suspect:
        ms.damage_mark(index.path).touch()
    ms.open_index(index.path).close()
    assert ("the index is damaged" in capsys.readouterr().err) is is_suspect


@pytest.mark.parametrize("is_harmed", [False, True])
def test_an_index_that_is_too_large_to_check_at_its_opening_is_checked_later(
    index, monkeypatch, is_harmed
):
    index.close()
    if is_harmed:
        overwrite_pages(index.path, 1000)
    monkeypatch.setattr(ms, "CHECK_BYTES", 0)
    with contextlib.closing(ms.open_index(index.path)) as opened:
        said: list[str] = []
        opened.on_damage = said.append
        opened.check()
    assert (len(said), ms.damage_mark(index.path).exists()) == (is_harmed, is_harmed)


def test_links_that_have_expired_are_forgotten_when_another_is_made(index):
    share = ms.Share("a", None, "file", "library", "b", expires_at=10.0)
    index.shares.add(share, 5.0)
    index.shares.add(share._replace(id="c", expires_at=None), 15.0)
    assert [kept.id for kept in index.shares.all(5.0, None, True)] == ["c"]


def test_uses_of_a_token_are_forgotten_once_it_has_expired(index):
    first = ms.Grant(frozenset(), 10.0, uses=1, id="a")
    second = ms.Grant(frozenset(), 20.0, uses=2, id="b")
    uses = [(first, 5.0), (first, 6.0), (second, 7.0), (second, 15.0), (second, 16.0)]
    taken = [index.token_uses.consume(grant, now) for grant, now in uses]
    assert taken == [True, False, True, True, False]
    assert [index.token_uses.is_used(id) for id in "ab"] == [False, True]


@pytest.mark.parametrize("active", [True, False])
def test_an_account_that_is_disabled_has_no_sessions_and_links_any_more(index, active):
    user = index.write(lambda db: index.users.add(db, an_account(), 0.0))
    session = ms.Session("a", user.id, "b", 1e9, 9e9, 1e9)
    assert index.write(functools.partial(index.sessions.open, user=user, session=session))
    index.shares.add(ms.Share("c", user.id, "media", "users", "d"), 0.0)
    index.write(functools.partial(index.users.set_active, user=user, active=active))
    found = index.value("SELECT count(*) FROM session"), len(index.shares.all(0.0, user.id, False))
    assert found == (active, active)


def test_a_content_is_nowhere_once_the_last_of_its_files_has_another(index):
    def put(path: str, letter: str) -> Any:
        asset = ms.Asset(letter * 64, 1, ms.Facts("image", "image/png", "png"))
        file = ms.File("library", path, asset.sha256, 1, 2, 3.0, 4.0)
        return index.write(functools.partial(index.files.put, file=file, asset=asset))

    found = [put("1.png", "a"), put("2.png", "a"), put("1.png", "b"), put("1.png", "b")]
    assert found == [None] * 4
    assert put("2.png", "b") == "a" * 64
    assert index.read("SELECT sha256 FROM asset").fetchall() == [("b" * 64,)]


def test_thumbnails_that_failed_are_tried_again_and_others_are_not(index):
    for name, made in (("a", True), ("b", False), ("c", None)):
        asset = ms.Asset(name * 64, 1, ms.Facts("image", "image/png", "png"))
        file = ms.File("library", f"{name}.png", asset.sha256, 1, 2, 3.0, 4.0)
        index.write(functools.partial(index.files.put, file=file, asset=asset))
        if made is not None:
            index.assets.set_thumbnail(asset.sha256, made=made)

    def waiting() -> list[str]:
        found = index.assets.without_thumbnail(["image"], 9, "")
        return [asset.sha256[0] for _, asset in found]

    assert waiting() == ["c"]
    index.assets.retry_thumbnails()
    assert waiting() == ["b", "c"]


# ======================================================================================
# 6. Store
# ======================================================================================

SIZES = (0, 1, 4095, 4096, 65536, 65537, 200_001, 1 << 20, (1 << 20) + 5, (3 << 20) + 70_001)


def in_pieces(content: bytes) -> Iterator[memoryview]:
    """As bodies come: of many lengths, each in memory that is used again for the next."""
    buffer = bytearray(300_000)
    lengths = itertools.cycle((1, 70_000, 4096, 300_000, 13))
    at = 0
    while at < len(content):
        piece = content[at : at + next(lengths)]
        buffer[: len(piece)] = piece
        yield memoryview(buffer)[: len(piece)]
        at += len(piece)


def refuse_direct(error: int) -> Callable[..., Any]:
    """A FileIO as on file systems that take the flag, and then no such write."""

    class Refusing(io.FileIO):
        def write(self, data: Any) -> int:
            if fcntl.fcntl(self, fcntl.F_GETFL) & ms.O_DIRECT:
                raise OSError(error, "no direct I/O")
            return super().write(data)

    return Refusing


def test_an_error_is_told_even_where_what_was_begun_cannot_be_undone():
    with pytest.raises(ValueError, match="why"), ms.undoing(os.close, -1):
        raise ValueError("why")


@pytest.mark.parametrize("fault", ["", "pauses", "short buffers", errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("size", SIZES)
def test_what_is_received_is_on_disk_byte_for_byte(tmp_path, monkeypatch, size, fault):
    if fault == "short buffers":
        monkeypatch.setattr(ms, "MAX_WRITE_BUFFERS", 0)
    elif fault and fault != "pauses":
        monkeypatch.setattr(ms.io, "FileIO", refuse_direct(fault))
    buffers = ms.WriteBuffers()
    folder = ms.Folder("images", tmp_path, make=True, buffers=buffers)
    content = (png_of(200) + random.Random(size).randbytes(size))[:size]
    receiving = folder.begin(ms.Limit(size, ""), md5=True)
    for piece in in_pieces(content):
        receiving.feed(piece)
        if fault == "pauses":
            receiving.pause()
            assert len(buffers._spare) == buffers._made
    incoming = receiving.finish()
    assert (tmp_path / incoming.name).read_bytes() == content
    assert (incoming.size, incoming.sha256) == (size, sha256(content))
    assert incoming.md5 == hashlib.md5(content).hexdigest()
    assert (incoming.facts is not None) == (size >= 200)
    assert len(buffers._spare) == buffers._made
    incoming.discard()
    assert not files_below(tmp_path)


def test_an_upload_needs_no_thread_of_its_own(tmp_path, monkeypatch):
    folder = ms.Folder("images", tmp_path, make=True, buffers=ms.WriteBuffers())
    start = failing(threading.Thread.start, RuntimeError("can't start new thread"))
    monkeypatch.setattr(threading.Thread, "start", start)
    content = random.Random(9).randbytes(3 << 20)
    incoming = arrive(folder, content)
    assert (tmp_path / incoming.name).read_bytes() == content
    assert incoming.sha256 == sha256(content)
    incoming.discard()


@pytest.mark.parametrize("size", [100_000, 3 << 20])
@pytest.mark.parametrize("wrong", ["limit", "disk", "client"])
def test_an_upload_that_fails_leaves_no_file_and_gives_its_buffer_back(
    tmp_path, monkeypatch, size, wrong
):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    if wrong == "disk":
        monkeypatch.setattr(ms, "write_block", fail)
    buffers = ms.WriteBuffers()
    folder = ms.Folder("images", tmp_path, make=True, buffers=buffers)
    limit = size - 1 if wrong == "limit" else size
    receiving = folder.begin(ms.Limit(limit, ""))
    with pytest.raises(ms.TooLarge if wrong == "limit" else OSError):
        for piece in in_pieces(bytes(size)):
            receiving.feed(piece)
        if wrong == "client":
            raise ConnectionAbortedError
        receiving.finish()
    receiving.discard()
    assert not files_below(tmp_path)
    assert len(buffers._spare) == buffers._made == 1


@pytest.mark.parametrize(("error", "works"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_folder_that_cannot_be_synced_takes_files_a_disk_that_fails_does_not(
    tmp_path, monkeypatch, error, works
):
    folder = ms.Folder("images", tmp_path, make=True, buffers=ms.WriteBuffers())
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(error, "no")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with contextlib.nullcontext() if works else pytest.raises(OSError):
        receiving = folder.begin(ms.Limit(3, ""))
        receiving.feed(memoryview(b"abc"))
        incoming = receiving.finish()
        folder.keep(incoming, ["sub/a.png"])
        incoming.discard(undo=False)
        assert files_below(tmp_path) == {"sub/a.png"}


def note_synced(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The inodes that are made durable from now on."""
    synced, real = set[int](), os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    return synced


def arrive(folder: ms.Folder, content: bytes, md5: bool = False) -> ms.Incoming:
    """A file of a folder that has come whole."""
    receiving = folder.begin(ms.Limit(len(content), ""), md5)
    receiving.feed(memoryview(content))
    return receiving.finish()


@pytest.mark.parametrize("name", ["library", "images", "entities"])
def test_a_start_after_a_crash_removes_uploads_that_the_index_does_not_know_where_it_is_the_truth(
    tmp_path, name
):
    folder = ms.Folder(name, tmp_path, make=True, buffers=ms.WriteBuffers())
    fill(tmp_path, {"a/own.png": b"own"})
    known, unknown = arrive(folder, b"known"), arrive(folder, b"unknown")
    assert folder.keep(known, ["a/own.png", "a/known.png"]) == "a/known.png"
    assert folder.keep(unknown, ["a/unknown.png"]) == "a/unknown.png"
    folder.recover(lambda path: path == "a/known.png")
    for incoming in (known, unknown):
        incoming.discard(undo=False)  # which finds nothing any more
    unanswered = set() if name == "entities" else {"a/unknown.png"}
    assert files_below(tmp_path) == {"a/known.png", "a/own.png"} | unanswered


def test_a_start_leaves_what_another_server_receives_in_a_folder_of_this_one(tmp_path):
    folder = ms.Folder("library", tmp_path, make=True, buffers=ms.WriteBuffers())
    other = ms.Folder("library", tmp_path / "a", make=True, buffers=ms.WriteBuffers())
    fill(tmp_path, {ms.inner_name("a/b.png", "ab" * 16): b"of this one"})
    incoming = arrive(other, b"content")
    folder.recover(lambda path: False)
    assert files_below(tmp_path) == {f"a/{incoming.name}"}
    incoming.discard()


def test_a_mark_of_what_is_deleted_already_takes_no_later_file_of_that_name(tmp_path):
    folder = ms.Folder("library", tmp_path, make=True, buffers=ms.WriteBuffers())
    mark = f".incoming/{'ab' * 16}.{ms.mark_of('a.png')}"
    fill(tmp_path, {mark: b"what was deleted", "a.png": b"the owner's"})
    folder.recover(lambda path: False)
    assert files_below(tmp_path) == {"a.png"}


def test_what_cannot_be_deleted_after_the_index_forgot_it_is_deleted_at_the_next_start(
    tmp_path, monkeypatch
):
    folder = ms.Folder("images", tmp_path, make=True, buffers=ms.WriteBuffers())
    names = ["a.png", "b.png", "c.png"]
    fill(tmp_path, dict.fromkeys(names, b"content"))
    with pytest.raises(ValueError), folder.removing(names):
        raise ValueError("of the commit")
    assert files_below(tmp_path) == set(names)  # and no mark

    def unlink(place: ms.Place) -> None:
        raise OSError(errno.EIO, "no")

    with monkeypatch.context() as patched, pytest.raises(OSError), folder.removing(names):
        patched.setattr(ms.Place, "unlink", unlink)
    assert len(files_below(tmp_path)) == 2 * len(names)
    folder.recover(lambda path: False)
    assert files_below(tmp_path) == set()


def test_links_are_listed_and_folders_are_not(tmp_path):
    folder = ms.Folder("images", tmp_path, make=True, buffers=ms.WriteBuffers())
    fill(tmp_path, {"in/a.png": b"a", "in/below/b.png": b"b"})
    (tmp_path / "in/dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "in/folder").symlink_to(tmp_path)
    names = {name for name, _ in folder.files_in("in")}
    assert names == {"a.png", "dangling", "folder"}


def test_a_file_gets_another_name_or_it_is_said_why_not(tmp_path):
    folder = ms.Folder("images", tmp_path, make=True, buffers=ms.WriteBuffers())
    fill(tmp_path, {"a.png": b"a", "b.png": b"b"})
    assert folder.link_in("c/d.png", folder, "a.png") == 0
    assert (tmp_path / "c/d.png").samefile(tmp_path / "a.png")
    assert folder.link_in("e.png", folder, "nothing.png") == errno.ENOENT
    assert folder.link_in("b.png", folder, "a.png") == errno.EEXIST
    assert (tmp_path / "b.png").read_bytes() == b"b"


def test_a_link_that_gets_another_name_is_a_link_there(tmp_path):
    folder = ms.Folder("images", tmp_path, make=True, buffers=ms.WriteBuffers())
    (tmp_path / "a.png").symlink_to("/etc/passwd")
    assert folder.link_in("b.png", folder, "a.png") == 0
    assert (tmp_path / "b.png").is_symlink()


@pytest.mark.parametrize(
    ("error", "name"),
    [(errno.EIO, "a.png"), (errno.EIO, "in/a.png"), (errno.EXDEV, "a.png")],
)
def test_a_disk_that_does_not_take_a_name_is_an_error_and_the_name_is_free(
    tmp_path, monkeypatch, error, name
):
    folder = ms.Folder("images", tmp_path, make=True, buffers=ms.WriteBuffers())

    def link(place: ms.Place, target: ms.Place) -> None:
        raise OSError(error, os.strerror(error))

    incoming = arrive(folder, b"content")
    monkeypatch.setattr(ms.Place, "link", link)
    with pytest.raises(OSError, match=os.strerror(error)):
        folder.keep(incoming, [name])
    incoming.discard()
    assert files_below(tmp_path) == set()
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_links_takes_files_and_lets_go_of_them(tmp_path, monkeypatch, error):
    folder = ms.Folder("images", tmp_path, make=True, buffers=ms.WriteBuffers())

    def link(place: ms.Place, target: ms.Place) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(ms.Place, "link", link)
    fill(tmp_path, {"a.png": b"another"})
    kept, undone, put_back = (arrive(folder, b"content") for _ in range(3))
    assert folder.keep(kept, ["a.png", "b.png"]) == "b.png"
    kept.discard(undo=False)
    assert (tmp_path / "a.png").read_bytes() == b"another"
    assert (tmp_path / "b.png").read_bytes() == b"content"
    folder.keep(undone, ["c.png"], "b.png")
    undone.discard()
    folder.keep(put_back, ["c.png"])
    assert put_back.put_back()
    assert files_below(tmp_path) == {"a.png", "b.png", put_back.name}
    with folder.removing(["b.png"]):
        pass
    assert files_below(tmp_path) == {"a.png", put_back.name}


def test_files_come_to_another_disk_below_the_root_and_go_from_there(tmp_path, monkeypatch):
    """No link leads into `usb`, which has a disk of its own."""
    folder = ms.Folder("library", tmp_path, make=True, buffers=ms.WriteBuffers())
    (tmp_path / "usb").mkdir()
    real = ms.Place.link

    def link(place: ms.Place, target: ms.Place) -> None:
        paths = [os.readlink(f"/proc/self/fd/{each.folder}") for each in (place, target)]
        if len({Path(path).is_relative_to(tmp_path / "usb") for path in paths}) == 2:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(place, target)

    monkeypatch.setattr(ms.Place, "link", link)
    synced = note_synced(monkeypatch)
    content = random.Random(1).randbytes(300_000)
    incoming = arrive(folder, content)
    assert folder.keep(incoming, ["usb/a.png"]) == "usb/a.png"
    assert (tmp_path / "usb/a.png").stat().st_ino in synced
    incoming.discard(undo=False)
    assert files_below(tmp_path) == {"usb/a.png"}
    assert (tmp_path / "usb/a.png").read_bytes() == content
    with pytest.raises(ValueError, match="commit"), folder.removing(["usb/a.png"]):
        assert len(files_below(tmp_path / "usb")) == 2, "its mark is on the same disk"
        raise ValueError("of the commit")
    assert files_below(tmp_path) == {"usb/a.png"}
    with folder.removing(["usb/a.png"]):
        pass
    assert files_below(tmp_path) == set()


@pytest.mark.parametrize(
    ("blocks", "size", "has_room"), [(100, 7, True), (100, 8, False), (0, 8, True)]
)
def test_a_file_has_room_where_the_reserve_stays_free_or_nothing_is_told_of_the_disk(
    monkeypatch, blocks, size, has_room
):
    disk = types.SimpleNamespace(f_blocks=blocks, f_frsize=1, f_bavail=10)
    monkeypatch.setattr(os, "fstatvfs", lambda descriptor: disk)
    with contextlib.nullcontext() if has_room else pytest.raises(OSError, match="No space left"):
        ms.need_room(0, size, 3)


def test_a_system_without_proc_tells_of_no_mount_points(monkeypatch):
    def read_bytes(path: Path) -> bytes:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    assert ms.mounts_below("/")
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert ms.mounts_below("/") == frozenset()


def test_a_folder_that_is_another_one_now_takes_no_file_before_its_root_is_known(tmp_path):
    root = tmp_path / "images"
    folder = ms.Folder("images", root, make=True, buffers=ms.WriteBuffers(), is_new=lambda: False)
    (root / ".incoming").mkdir(parents=True)
    with folder.resolve("in/a.png", make=True):
        root.rename(tmp_path / "away")
    (root / "in").mkdir(parents=True)
    with pytest.raises(OSError, match=os.strerror(errno.ENODEV)):
        folder.resolve("in/b.png", make=True)


@pytest.mark.parametrize("shares", [{b"proc"}, {b"nfs4"}])
def test_a_share_is_told_by_the_type_of_its_file_system(monkeypatch, shares):
    monkeypatch.setattr(ms, "REMOTE_FILE_SYSTEMS", shares)
    is_remote = ms.is_remote.__wrapped__(os.stat("/proc").st_dev)
    assert is_remote is (b"proc" in shares)


def test_two_requests_cannot_go_on_with_one_file(tmp_path):
    folder = ms.Folder("images", tmp_path, make=True, buffers=ms.WriteBuffers())
    fill(tmp_path, {".incoming/a": b"abc"})
    first = folder.resume(".incoming/a", ms.Limit(10, ""))
    with pytest.raises(BlockingIOError):
        folder.resume(".incoming/a", ms.Limit(10, ""))
    first.pause()
    first.discard()


def test_a_file_that_goes_away_meanwhile_is_only_not_listed(tmp_path, monkeypatch):
    folder = ms.Folder("images", tmp_path, make=True, buffers=ms.WriteBuffers())
    fill(tmp_path, {"in/a.png": b"a", "in/b.png": b"b", "in/c.png": b"c"})
    scandir = os.scandir

    @contextlib.contextmanager
    def scan_slowly(path: Any) -> Iterator[list[os.DirEntry[str]]]:
        with scandir(path) as entries:
            found = list(entries)
        (tmp_path / "in/b.png").unlink(missing_ok=True)
        yield found

    monkeypatch.setattr(os, "scandir", scan_slowly)
    assert sorted(name for name, _ in folder.files_in("in")) == ["a.png", "c.png"]


def opened_below(path: Path, process: int | str = "self") -> list[str]:
    """What of a folder a process has open, itself included."""
    found = []
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            found.append(os.readlink(descriptor))
    return [name for name in found if Path(name).is_relative_to(path)]


def test_a_folder_in_the_place_of_a_file_is_none_and_is_not_kept_open(tmp_path):
    folder = ms.Folder("images", tmp_path, make=True, buffers=ms.WriteBuffers())
    (tmp_path / "a.png").mkdir()
    with pytest.raises(FileNotFoundError):
        folder.open("a.png")
    assert opened_below(tmp_path) == []


def test_a_pipe_in_the_way_of_what_is_written_is_an_error_and_holds_nobody(tmp_path):
    folder = ms.Folder("data", tmp_path, make=True, buffers=ms.WriteBuffers())
    (tmp_path / "locks").mkdir()
    os.mkfifo(tmp_path / "locks/ab")
    with pytest.raises(OSError, match=os.strerror(errno.ENXIO)), folder.content_lock("ab" * 32):
        raise AssertionError("it is no lock")
    assert opened_below(tmp_path) == []


def test_an_upload_keeps_no_folder_open_and_is_let_go_of_once(tmp_path):
    folder = ms.Folder("images", tmp_path, make=True, buffers=ms.WriteBuffers())
    first, equal = arrive(folder, b"abc"), arrive(folder, b"abc")
    assert (tmp_path / ".incoming").stat().st_mode & 0o777 == 0o700, "it is nobody else's yet"
    folder.keep(first, ["a.png"])
    status = os.fstat(first.file.fileno())
    assert status.st_nlink == 1  # nothing is left to change its ctime
    first.discard(undo=False)
    first.discard()  # undoes nothing any more
    folder.keep(equal, ["b.png"], "a.png")
    assert os.fstat(equal.file.fileno()).st_ino == status.st_ino
    assert not equal.put_back()
    equal.discard()
    refused = arrive(folder, b"abcd")
    folder.keep(refused, ["c.png"])
    assert refused.put_back()
    assert files_below(tmp_path) == {"a.png", refused.name}
    assert opened_below(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "error"),
    [("a/b/c.png", FileNotFoundError), ("a/b.png/c.png", NotADirectoryError),
     ("a/\udbff/c.png", UnicodeEncodeError)],
)  # fmt: skip
def test_a_way_that_ends_nowhere_leaves_no_folder_open(tmp_path, name, error):
    fill(tmp_path, {"a/b.png": b"abc"})
    folder = ms.Folder("library", tmp_path, make=False, buffers=ms.WriteBuffers())

    def opened() -> list[str]:
        paths = []
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # one of another thread
                paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        return [path for path in paths if path.startswith(str(tmp_path))]

    with folder.resolve("a/b.png"):
        assert opened() == [f"{tmp_path}/a"]
    with pytest.raises(error) as refused:
        folder.resolve(name)
    assert getattr(refused.value, "filename", f"{tmp_path}/{name}") == f"{tmp_path}/{name}"
    assert opened() == []


def test_a_content_is_locked_for_every_process_by_a_file_that_stays(tmp_path):
    folder = ms.Folder("data", tmp_path, make=True, buffers=ms.WriteBuffers())
    now = fcntl.LOCK_EX | fcntl.LOCK_NB
    with folder.content_lock("ab" * 32):
        inode = (tmp_path / "locks/ab").stat().st_ino
        with (tmp_path / "locks/ab").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, now)
        with folder.content_lock("cd" * 32):
            pass  # another content is stored meanwhile
    with folder.content_lock("ab" * 32), (tmp_path / "locks/cd").open() as lock:
        assert (tmp_path / "locks/ab").stat().st_ino == inode
        fcntl.flock(lock, now)


# -- S3

S3_KEYS = ("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
DOCUMENTED_KEYS = ("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
# AWS's aws-sig-v4-test-suite: its names, requests and signatures.
SIGV4_SUITE = {
    "get-vanilla": (
        "GET", "/", {},
        "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
    ),
    "get-vanilla-query-order-key-case": (
        "GET", "/?Param2=value2&Param1=value1", {},
        "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
    ),
    "get-utf8": (
        "GET", "/%E1%88%B4", {},
        "8318018e0b0f223aa2bbf98705b62bb787dc9c0e678f255a891fd03141be5d85",
    ),
    "get-header-value-trim": (
        "GET", "/", {"my-header1": " value1", "my-header2": ' "a   b   c"'},
        "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736",
    ),
    "post-vanilla": (
        "POST", "/", {},
        "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b",
    ),
    "post-sts-header-before": (
        "POST", "/", {"x-amz-security-token": (
            "AQoDYXdzEPT//////////wEXAMPLEtc764bNrC9SAPBSM22wDOk4x4HIZ8j4FZTwdQWLWsKWHGBuFqwAeMic"
            "RXmxfpSPfIeoIYRqTflfKD8YUuwthAx7mSEI/qkPpKPi/kMcGdQrmGdeehM4IC1NtBmUpp2wUE8phUZampKs"
            "burEDy0KPkyQDYwT7WZ0wq5VSXDvp75YU9HFvlRd8Tx6q6fE8YQcHNVXAkiY9q6d+xo0rKwT38xVqr7ZD0u0"
            "iPPkUL64lIZbqBAz+scqKmlzm8FDrypNC9Yjc8fPOLn9FX9KSYvKTr4rvx3iSIlTJabIQwj2ICCR/oLxBA=="
        )},
        "85d96828115b5dc0cfc3bd16ad9e210dd772bbebba041836c64533a82be05ead",
    ),
}  # fmt: skip
# Amazon S3's documentation, "Examples: Signature Calculations".
SIGV4_DOCUMENTED = {
    "get-object": (
        "GET", "/test.txt", {"range": "bytes=0-9"}, b"",
        "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
    ),
    "put-object": (
        "PUT", "/test%24file.text",
        {"date": "Fri, 24 May 2013 00:00:00 GMT", "x-amz-storage-class": "REDUCED_REDUNDANCY"},
        b"Welcome to Amazon S3.",
        "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
    ),
    "get-bucket-lifecycle": (
        "GET", "/?lifecycle", {}, b"",
        "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
    ),
    "list-objects": (
        "GET", "/?max-keys=2&prefix=J", {}, b"",
        "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGV4_SUITE)
def test_requests_are_signed_as_in_the_test_suite_of_aws(name):
    method, target, headers, signature = SIGV4_SUITE[name]
    given = {"host": "example.amazonaws.com", "x-amz-date": "20150830T123600Z", **headers}
    signer = ms.Signer(*S3_KEYS, "us-east-1", "service")
    found = signer.authorize(method, target, given, ms.EMPTY_SHA256)
    assert found == (
        "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request,"
        f" SignedHeaders={';'.join(sorted(given))}, Signature={signature}"
    )


@pytest.mark.parametrize("name", SIGV4_DOCUMENTED)
def test_requests_are_signed_as_in_the_documentation_of_amazon_s3(name):
    method, target, headers, body, signature = SIGV4_DOCUMENTED[name]
    given = {
        "host": "examplebucket.s3.amazonaws.com", "x-amz-date": "20130524T000000Z",
        "x-amz-content-sha256": sha256(body), **headers,
    }  # fmt: skip
    signer = ms.Signer(*DOCUMENTED_KEYS, "us-east-1")
    found = signer.authorize(method, target, given, sha256(body))
    assert found.endswith(f", Signature={signature}")


def test_urls_are_signed_as_in_the_documentation_of_amazon_s3():
    signer = ms.Signer(*DOCUMENTED_KEYS, "us-east-1")
    host = "examplebucket.s3.amazonaws.com"
    assert signer.presign(host, "/test.txt", 86400, "20130524T000000Z") == (
        "/test.txt?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F"
        "20130524%2Fus-east-1%2Fs3%2Faws4_request&X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400"
        "&X-Amz-SignedHeaders=host&X-Amz-Signature="
        "aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"
    )


class FakeStore:
    """An object store's end of connections; `script` has one step for each: bytes, or a fault."""

    def __init__(self, *script: object) -> None:
        self.asked: list[bytes] = []
        self._script = iter(script)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._held: list[socket.socket] = []
        self.client = ms.S3Client(self.endpoint, ms.Signer(*S3_KEYS, "us-east-1"))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for step in self._script:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # it is over
                return
            self._held.append(connection)
            self.asked.append(connection.recv(65536))
            if isinstance(step, bytes):
                connection.sendall(step)
                if b"Connection: close" in step:
                    connection.shutdown(socket.SHUT_WR)
            elif step == "reset":
                connection.close()

    def __enter__(self) -> FakeStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for connection in self._held:
            connection.close()


S3_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
S3_BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
S3_GET = ms.S3Request("GET", "bucket", "a b/ä.png")


@pytest.fixture
def no_waits(monkeypatch):
    monkeypatch.setattr(ms, "S3_RETRIES", (1e-9, 1e-9))


def s3_answer(status: str, *fields: str, body: str = "") -> bytes:
    """An answer of a store, behind which it hangs up."""
    head = "\r\n".join((f"HTTP/1.1 {status}", "Connection: close", *fields))
    return f"{head}\r\n\r\n{body}".encode()


S3_CONFLICT = s3_answer("409 Conflict", body="<Error><Code>OperationAborted</Code></Error>")


@pytest.mark.parametrize(
    "passing",
    [
        (), (S3_BUSY,), ("reset", "reset"), (S3_BUSY, "reset"), (S3_CONFLICT, S3_CONFLICT),
        (s3_answer("200 OK", "Content-Length: 9", body="short"),),
        (s3_answer("500 Server Error", body="<Error/>"), b"\0 no HTTP\r\nConnection: close"),
        (s3_answer("429 Too Many Requests", "Retry-After: 0"),),
    ],
)  # fmt: skip
def test_a_request_to_a_store_is_tried_again_after_what_passes(no_waits, passing):
    with FakeStore(*passing, S3_OK) as store:
        assert store.client.call(S3_GET).body == b"ok"
        assert len(store.asked) == len(passing) + 1
        assert store.asked[-1].startswith(b"GET /bucket/a%20b/%C3%A4.png HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("answer", "error", "told"),
    [
        (s3_answer("403 Forbidden"), PermissionError, "403"),
        (s3_answer("404 Not Found"), FileNotFoundError, ""),
        (s3_answer("412 Precondition Failed"), FileExistsError, ""),
        (s3_answer("301 Moved", "x-amz-bucket-region: eu-south-2"), OSError, "is in eu-south-2"),
        (s3_answer("307 Elsewhere", "Location: http://127.0.0.1:1/"), OSError, "307"),
        (s3_answer("501 Not Implemented", body="<Code>NotImplemented</Code>"), OSError,
         "501 NotImplemented"),
        (s3_answer("200 OK", body="<Error><Code>InternalError</Code></Error>"), OSError,
         "InternalError"),
    ],
)  # fmt: skip
def test_what_a_store_refuses_is_not_tried_again_and_the_log_says_why(
    no_waits, capsys, answer, error, told
):
    with FakeStore(answer, S3_OK) as store:
        with pytest.raises(error) as raised:
            store.client.call(S3_GET)
        assert not isinstance(raised.value, ms.Unavailable)
        assert len(store.asked) == 1
        assert store.client.call(S3_GET).body == b"ok"  # the circuit is closed
    assert told in capsys.readouterr().err


def test_two_who_write_to_one_object_leave_the_store_in_use(no_waits):
    with FakeStore(*[S3_CONFLICT] * 3, S3_OK) as store:
        with pytest.raises(OSError, match="Input/output"):
            store.client.call(S3_GET)
        assert store.client.call(S3_GET).body == b"ok"


def test_a_store_is_left_alone_for_as_long_as_it_asks(no_waits):
    with FakeStore(s3_answer("503 Slow Down", "Retry-After: 20"), S3_OK) as store:
        begun = time.monotonic()
        with pytest.raises(ms.Unavailable):
            store.client.call(S3_GET)
        assert len(store.asked) == 1
        assert begun + 20 <= store.client._retry_at <= time.monotonic() + 20


def test_a_store_whose_clock_is_another_is_asked_by_its_clock(no_waits):
    ahead = ms.format_date(time.time() + 3600)
    with FakeStore(s3_answer("403 Forbidden", f"Date: {ahead}"), S3_OK, S3_OK) as store:
        assert [store.client.call(S3_GET).body for _ in range(2)] == [b"ok", b"ok"]
        dates = [re.search(rb"(?i)x-amz-date: (\w+)", asked)[1].decode() for asked in store.asked]
    early, late, again = [datetime.strptime(date, "%Y%m%dT%H%M%SZ") for date in dates]
    assert 3590 < (late - early).total_seconds() < 3700
    assert late <= again


def test_a_store_that_knows_no_conditions_is_asked_without_them(no_waits):
    request = S3_GET._replace(method="PUT", headers={"if-none-match": "*"})
    with FakeStore(s3_answer("501 Not Implemented"), S3_OK, S3_OK) as store:
        assert [store.client.call(request).body for _ in range(2)] == [b"ok", b"ok"]
        conditional = [b"if-none-match: *" in asked.lower() for asked in store.asked]
    assert conditional == [True, False, False]


def test_an_object_is_sent_with_its_hash_and_on_the_condition_that_there_is_none(
    no_waits, tmp_path
):
    (tmp_path / ".incoming").mkdir()
    with FakeStore(s3_answer("404 Not Found"), S3_OK) as store:
        bucket, content = fake_bucket(tmp_path, store), b"some bytes"
        incoming = arrive(bucket, content)
        assert bucket.keep(incoming, ["a.png"]) == "a.png"
        incoming.discard(undo=False)
        head = store.asked[1].partition(b"\r\n\r\n")[0].decode().lower().split("\r\n")
    assert head[0] == "put /bucket/a.png http/1.1"
    assert f"x-amz-content-sha256: {sha256(content)}" in head
    assert "if-none-match: *" in head


def test_those_who_try_again_do_not_all_come_at_once(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(ms.time, "sleep", waits.append)
    with FakeStore(*[S3_BUSY, S3_OK] * 9) as store:
        for _ in range(9):
            store.client.call(S3_GET)
    assert 0 <= min(waits) < max(waits) <= ms.S3_RETRIES[0]
    assert len(waits) == 9
    assert len(set(waits)) > 3


def test_a_store_without_an_endpoint_is_that_of_aws_in_the_region(tmp_path):
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "eu-south-2"}
    given = {"storage_dir": str(tmp_path), "upload_dir": "s3://bucket"}
    images: Any = ms.open_folders(ms.load_settings(given, keys, {}), None)["images"]
    url = images.client.presign(images.request("GET", "a.png"), 60)
    assert url.startswith("https://s3.eu-south-2.amazonaws.com/bucket/a.png?")
    assert "%2Feu-south-2%2Fs3%2Faws4_request&" in url


def test_an_answer_may_follow_a_100(no_waits):
    with FakeStore(b"HTTP/1.1 100 Continue\r\n\r\n" + S3_OK) as store:
        assert store.client.call(S3_GET._replace(method="PUT")).body == b"ok"


def test_the_token_of_a_session_goes_along_and_is_signed(no_waits):
    with FakeStore(S3_OK) as store:
        client = ms.S3Client(store.endpoint, ms.Signer(*S3_KEYS, "us-east-1", token="a+b"))
        assert client.call(S3_GET).body == b"ok"
        assert b"x-amz-security-token: a+b\r\n" in store.asked[0].lower()
        assert re.search(rb"SignedHeaders=[^,]*;x-amz-security-token,", store.asked[0])
        assert "&X-Amz-Security-Token=a%2Bb&" in client.presign(S3_GET, 60)
        client.close()


def fake_bucket(folder: Path, store: FakeStore) -> Any:
    place = ms.S3Place("bucket", "")
    return ms.Bucket("images", folder, place, store.client, buffers=ms.WriteBuffers(), make=True)


def test_a_store_that_ends_a_connection_while_it_is_made_is_away(no_waits, monkeypatch):
    def connect(connection: http.client.HTTPConnection) -> None:
        raise ConnectionResetError

    monkeypatch.setattr(http.client.HTTPConnection, "connect", connect)
    client = ms.S3Client("http://127.0.0.1:9", ms.Signer(*S3_KEYS, "us-east-1"))
    with pytest.raises(ms.Unavailable):
        client.call(S3_GET)


def test_an_object_is_sent_when_its_note_is_durable(no_waits, tmp_path, monkeypatch):
    synced, sent = note_synced(monkeypatch), list[str]()

    def send(incoming: ms.Incoming, name: str, *_: object) -> None:
        notes = [path for path in tmp_path.rglob("*") if path.name.endswith(ms.NOTE)]
        assert [path.stat().st_ino in synced for path in notes] == [True]
        sent.append(name)

    with FakeStore(s3_answer("404 Not Found")) as store:
        bucket = fake_bucket(tmp_path, store)
        monkeypatch.setattr(bucket, "_send", send)
        incoming = arrive(bucket, b"content")
        assert bucket.keep(incoming, ["a.png"]) == "a.png"
        incoming.discard(undo=False)
    assert sent == ["a.png"]


def test_a_whole_object_in_a_ranges_place_is_not_taken_for_it(no_waits, tmp_path):
    with FakeStore(s3_answer("200 OK", "Content-Length: 10", body="0123456789")) as store:
        bucket = fake_bucket(tmp_path, store)
        reader = ms.ObjectReader(bucket, "a.png", (10, 0))
        with contextlib.closing(reader), pytest.raises(ms.Unavailable):
            reader.read_at(2, 3)


def test_a_store_may_lie_below_a_path_of_its_host(no_waits):
    with FakeStore(S3_OK) as store:
        client = ms.S3Client(f"{store.endpoint}/storage/s3", ms.Signer(*S3_KEYS, "us-east-1"))
        assert client.call(S3_GET).body == b"ok"
        assert store.asked[0].startswith(b"GET /storage/s3/bucket/a%20b/%C3%A4.png HTTP/1.1\r\n")
        assert "/storage/s3/bucket/a%20b/%C3%A4.png?X-Amz-" in client.presign(S3_GET, 60)
        client.close()


@pytest.mark.parametrize("fault", [("hangs",), (S3_BUSY,) * 3, ("reset",) * 3])
def test_a_store_that_is_away_is_asked_again_only_after_a_while(no_waits, monkeypatch, fault):
    monkeypatch.setattr(ms, "S3_SECONDS", 0.1 if "hangs" in fault else DEADLINE)
    with FakeStore(*fault, S3_OK, S3_OK) as store:
        client = store.client
        for _ in range(3):  # the circuit is open after the first
            with pytest.raises(ms.Unavailable):
                client.call(S3_GET)
        wait_until(lambda: len(store.asked) == len(fault))
        monkeypatch.setattr(ms, "S3_SECONDS", DEADLINE)
        client._retry_at = time.monotonic()
        assert [client.call(S3_GET).body for _ in range(2)] == [b"ok", b"ok"]


def test_a_kept_connection_that_has_ended_costs_another_try_and_no_error(no_waits):
    kept = S3_OK.replace(b"Connection: close\r\n", b"")
    with FakeStore(kept, kept) as store:
        client = store.client
        assert client.call(S3_GET).body == b"ok"
        store._held[0].close()
        assert client.call(S3_GET).body == b"ok"


def test_an_object_that_breaks_off_is_read_on_from_there(no_waits, tmp_path):
    def part(first: int, data: bytes) -> bytes:
        about = f"Content-Range: bytes {first}-9/10\r\nContent-Length: {10 - first}\r\n"
        return f"HTTP/1.1 206 Partial\r\n{about}Connection: close\r\n\r\n".encode() + data

    with FakeStore(part(0, b"0123"), part(4, b"456789")) as store:
        bucket = fake_bucket(tmp_path, store)
        found = b""
        with contextlib.closing(ms.ObjectReader(bucket, "a.png", (10, 0))) as reader:
            while len(found) < 10:
                found += reader.read_at(len(found), 10 - len(found))
        assert found == b"0123456789"
        assert b"range: bytes=4-9\r\n" in store.asked[1].lower()


class ObjectStore:
    """`rclone serve s3` on a folder; bucket `family`, one key."""

    prefix = ""  # of a test's objects

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "family"
        self.folder.mkdir(parents=True)
        self._log = folder.with_suffix(".log")
        self._port = free_port()  # it is started again on the same one
        self.start()

    def start(self) -> None:
        command = [need("rclone"), "serve", "s3", "--config", ""]
        command += ["--auth-key", ",".join(S3_KEYS), "--addr", f"127.0.0.1:{self._port}"]
        with self._log.open("w") as log:
            self.process = subprocess.Popen([*command, self.folder.parent], stderr=log)
        wait_until(self._is_ready, "rclone")

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self._log.read_text()
        return accepts(self._port)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        """The settings of a server that keeps all private files here."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": S3_KEYS[0], "AWS_SECRET_ACCESS_KEY": S3_KEYS[1],
            "UPLOAD_DIR": f"s3://family/{self.prefix}images",
            "USERS_DIR": f"s3://family/{self.prefix}users",
            "MEDIA_STORAGE_DIR": f"s3://family/{self.prefix}all/entities",
            "MEDIA_DIR": f"s3://family/{self.prefix}public",
        }  # fmt: skip

    def put(self, name: str, content: bytes) -> None:
        """Store an object as another program does."""
        body = ms.ObjectBody(len(content), sha256(content), lambda: [content])
        request = ms.S3Request("PUT", "family", self.prefix + name, body=body)
        client = ms.S3Client(self.endpoint, ms.Signer(*S3_KEYS, "us-east-1"))
        with contextlib.closing(client):
            client.call(request)

    def names(self) -> set[str]:
        """The objects of this test: the files behind them."""
        return files_below(self.folder / self.prefix)


@pytest.fixture(scope="module")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    made = ObjectStore(tmp_path_factory.mktemp("rclone") / "store")
    yield made
    made.stop()


@pytest.fixture
def store(object_store) -> ObjectStore:
    """An object store, of which a test has a prefix of its own."""
    object_store.prefix = f"{unique().decode()}/"
    if object_store.process.poll() is not None:  # as another test has left it
        object_store.start()
    return object_store


@pytest.fixture
def bucket(store, tmp_path) -> Iterator[Any]:
    """An empty bucket, whose files on their way are in `tmp_path`."""
    client = ms.S3Client(store.endpoint, ms.Signer(*S3_KEYS, "us-east-1"))
    place = ms.S3Place("family", store.prefix)
    made = ms.Bucket("images", tmp_path, place, client, buffers=ms.WriteBuffers(), make=True)
    made.recover(bool)
    yield made
    client.close()


def read_from(folder: Any, name: str) -> bytes:
    with folder.open(name) as file:
        return bytes(file.readall())


@pytest.mark.parametrize("size", [0, 1, 100_000, 250_000])
def test_a_bucket_gives_back_what_was_sent_whole_and_in_parts(bucket, tmp_path, monkeypatch, size):
    monkeypatch.setattr(ms, "S3_PART_BYTES", 100_000)
    content, name = random.Random(size).randbytes(size), "a/ö &+%20 b.png"
    incoming = arrive(bucket, content)
    mtime_ns = os.fstat(incoming.file.fileno()).st_mtime_ns
    assert bucket.keep(incoming, [name]) == name
    incoming.discard(undo=False)
    assert not files_below(tmp_path)
    status = bucket.stat(name)
    assert (status.st_size, status.st_mtime_ns) == (size, mtime_ns)
    with bucket.open(name) as copy:
        assert copy.read() == content
        assert os.fstat(copy.fileno()).st_mtime_ns == mtime_ns
    assert [(path, found.st_size) for path, found in bucket.walk_stored(bool, [])] == [
        (name.encode(), size)
    ]
    bucket.unlink(name)
    assert bucket.is_gone(name)
    assert not bucket.holds_files()


OBJECT_NAMES = (
    "a b", "a+b", "a%20b", "%", "ü", "家.png", "a.", " a ", "~", "a?b#c", "a'b\"c",
    "a&lt;b>", "(*)!", "\\", "a;b=c,d:@$", "a\tb", "a/b/c.d", "\U0001f600",
)  # fmt: skip


def test_any_name_leads_to_its_own_object(bucket, store):
    for name in OBJECT_NAMES:
        incoming = arrive(bucket, name.encode())
        assert bucket.keep(incoming, [name]) == name
        incoming.discard(undo=False)
    listed = [os.fsdecode(path) for path, _ in bucket.walk_stored(bool, [])]
    assert sorted(listed) == sorted(OBJECT_NAMES)
    for name in OBJECT_NAMES:
        assert read_from(bucket, name) == name.encode()
        url = bucket.client.presign(bucket.request("GET", name), 60)
        with urllib.request.urlopen(url) as found:
            assert found.read() == name.encode()
        bucket.unlink(name)
        bucket.unlink(name)  # it is gone
    assert not bucket.holds_objects()


@pytest.mark.parametrize("name", ["", "/a", "a//b", "a/../b", "./a", "a/"])
def test_what_is_no_name_is_asked_of_no_bucket(bucket, name):
    with pytest.raises(ValueError, match="no file name"):
        bucket.stat(name)


def test_whether_there_are_files_is_asked_of_the_disk_where_only_some_are_objects(
    bucket, tmp_path
):
    place, client, root = bucket.place, bucket.client, tmp_path / "pictures"
    options: Any = {"below": "media/", "make": False, "buffers": ms.WriteBuffers()}
    library = ms.Bucket("library", root, place, client, **options)
    assert not bucket.holds_files()
    incoming = arrive(bucket, b"content")
    bucket.keep(incoming, ["a.png"])
    incoming.discard(undo=False)
    assert (bucket.holds_files(), library.holds_files()) == (True, False)
    fill(root, {"a.png": b"content"})
    assert library.holds_files()


def test_a_bucket_never_overwrites_an_object(bucket, tmp_path):
    kept = []
    for content in (b"one", b"two", b"three"):
        incoming = arrive(bucket, content)
        kept.append(bucket.keep(incoming, ms.numbered_names("a.png")))
        incoming.discard(undo=False)
    assert kept == ["a.png", "a_1.png", "a_2.png"]
    assert [read_from(bucket, name) for name in kept] == [b"one", b"two", b"three"]
    assert not files_below(tmp_path)


def test_a_list_of_a_bucket_has_all_pages_in_the_order_of_the_bytes(store, bucket, monkeypatch):
    names = sorted([f"{number % 3}/{number}.png".encode() for number in range(7)] + [b"0.png"])
    for name in names:
        store.put(name.decode(), b"x")
    monkeypatch.setattr(ms, "MAX_KEYS", 3)
    assert [path for path, _ in bucket.walk_stored(bool, [])] == names


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("moment", ["sent", "noted", "removing", "in parts"])
def test_what_a_crash_leaves_of_an_object_is_found_at_the_next_start(
    store, bucket, tmp_path, monkeypatch, moment, known
):
    incoming = arrive(bucket, b"some bytes")
    if moment == "noted":
        monkeypatch.setattr(bucket, "_send", lambda *_: None)
    elif moment == "in parts":
        monkeypatch.setattr(ms, "S3_PART_BYTES", 4)
        monkeypatch.setattr(ms, "hash_range", crash)
        monkeypatch.setattr(bucket.client, "call", no_delete(bucket.client.call))
    with contextlib.suppress(Crash):
        bucket.keep(incoming, ["a.png"])
    if moment == "removing":
        incoming.discard(undo=False)
        removal = bucket.removing(["a.png"])
        removal.__enter__()
    incoming.file.close()
    monkeypatch.undo()
    assert has_parts(bucket) is (moment == "in parts")
    assert files_below(tmp_path)
    bucket.recover(lambda name: known and name == "a.png")
    assert not files_below(tmp_path)
    is_stored = known and moment in {"sent", "removing"}
    assert bucket.is_gone("a.png") is not is_stored
    assert has_parts(bucket) is (known and moment == "in parts")


def test_what_is_restored_into_a_bucket_leaves_nothing_on_disk(bucket, tmp_path):
    (tmp_path / "kept").write_bytes(b"some bytes")
    status = os.stat(tmp_path / "kept")
    (tmp_path / "kept").unlink()
    bucket.copy_in("a.png", status, [memoryview(b"some "), memoryview(b"bytes")])
    assert read_from(bucket, "a.png") == b"some bytes"
    assert not files_below(tmp_path)


@pytest.mark.parametrize(
    ("headers", "size", "mtime_ns"),
    [
        ({}, 0, 0), ({"content-length": "7", "x-amz-meta-mtime": "12.5"}, 7, 12_500_000_000),
        ({"x-amz-meta-mtime": "12"}, 0, 12_000_000_000), ({"x-amz-meta-mtime": "?"}, 0, 0),
        ({"last-modified": "Thu, 01 Jan 1970 00:01:00 GMT"}, 0, 60_000_000_000),
        ({"last-modified": "long ago"}, 0, 0),
        ({"x-amz-meta-mtime": "-1000000000000.5"}, 0, -ms.MAX_BYTES),
        ({"x-amz-meta-mtime": "9" * 400}, 0, ms.MAX_BYTES),
    ],
)  # fmt: skip
def test_an_object_s_headers_tell_its_size_and_mtime(headers, size, mtime_ns):
    status = ms.object_status(headers)
    assert (status.st_size, status.st_mtime_ns) == (size, mtime_ns)
    assert status.st_mtime == status.st_ctime == mtime_ns / 1e9


def test_an_object_gets_no_other_name(bucket):
    assert bucket.link_in("b.png", bucket, "a.png") == errno.EPERM


@pytest.mark.parametrize(
    ("code", "body", "error"),
    [
        (200, b"<Error>late</Error>", errno.EIO), (300, b"", errno.EIO), (307, b"", errno.EIO),
        (403, b"", errno.EACCES), (404, b"", errno.ENOENT), (412, b"", errno.EEXIST),
        (503, b"", errno.EIO),
    ],
)  # fmt: skip
def test_an_answer_of_a_store_stands_for_an_error_or_none(code, body, error):
    request, answer = ms.S3Request("GET", "family", "a.png"), ms.S3Answer(200, {}, b"", None, None)
    for fine in (200, 206):
        ms.check_answer(request, answer._replace(code=fine))
    with pytest.raises(OSError) as caught:
        ms.check_answer(request, answer._replace(code=code, body=body))
    assert caught.value.errno == error


def test_an_object_that_the_index_could_not_forget_stays(bucket, tmp_path):
    incoming = arrive(bucket, b"some bytes")
    assert bucket.keep(incoming, ["a.png"]) == "a.png"
    incoming.discard(undo=False)
    with pytest.raises(Crash), bucket.removing(["a.png"]):
        raise Crash
    assert read_from(bucket, "a.png") == b"some bytes"
    assert not files_below(tmp_path)  # no note to remove it


def test_objects_that_cannot_all_be_noted_are_not_noted_at_all(bucket, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "full")
    monkeypatch.setattr(bucket, "_write_note", failing(bucket._write_note, full, "b.png"))
    with pytest.raises(OSError, match="full"), bucket.removing(["a.png", "b.png"]):
        raise AssertionError("the index forgets nothing")
    assert not files_below(tmp_path)


def has_parts(bucket: Any) -> bool:
    """Whether there are parts of objects that are none yet."""
    query = {"prefix": bucket.place.prefix, "uploads": ""}
    try:
        answer = bucket.client.call(ms.S3Request("GET", "family", query=query))
    except FileNotFoundError:  # as rclone says it
        return False
    return bool(answer.elements("Upload"))


class Crash(BaseException):
    """The end of a process, as far as what it leaves is concerned."""


def crash(*_: object) -> Any:
    raise Crash


def no_delete(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def forward(request: Any) -> Any:
        if request.method == "DELETE":
            raise Crash
        return call(request)

    return forward


def test_an_object_of_another_program_survives_a_note_about_its_name(store, bucket, tmp_path):
    store.put("a.png", b"theirs")
    bucket._write_note("a.png", 7)
    bucket.recover(lambda name: False)
    assert read_from(bucket, "a.png") == b"theirs"
    assert not files_below(tmp_path)


def test_an_object_that_cannot_be_removed_now_is_removed_at_the_next_start(
    store, bucket, tmp_path, monkeypatch
):
    incoming = arrive(bucket, b"some bytes")
    bucket.keep(incoming, ["a.png"])
    monkeypatch.setattr(bucket.client, "_retry_at", time.monotonic() + DEADLINE)
    incoming.discard()
    assert len(files_below(tmp_path)) == 1
    monkeypatch.undo()
    assert not bucket.is_gone("a.png")
    bucket.recover(lambda name: False)
    assert bucket.is_gone("a.png")
    assert not files_below(tmp_path)


# ======================================================================================
# 7. Thumbnails
# ======================================================================================

SHA = "ab" * 32


@pytest.fixture
def pillow():
    need("PIL")
    return importlib.import_module("PIL.Image")


@pytest.fixture
def ffmpeg():
    once()
    return need("ffmpeg")


def start_host(thumbnails):
    """Start the process that forks the decoders; its id."""
    forked, fork = [], os.fork
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fork", lambda: forked.append(fork()) or forked[-1])
        patch.setattr(os, "nice", lambda _: 0)  # what the host has of it stays so
        thumbnails.start()
    return forked[0]


def stop_host(thumbnails, host):
    thumbnails.stop()
    assert os.waitpid(host, 0)[1] == 0  # it ends by itself once its socket is closed


def thumbnails_in(path, processes=None, kind=ms.Thumbnails):
    """Thumbnails whose two caches lie in one folder."""
    path.mkdir(exist_ok=True)
    made = kind(processes)
    folder = ms.Folder("library", path, make=True, buffers=ms.WriteBuffers())
    cache = ms.PreviewCache(folder, "previews/", 1 << 30, made.preview_bytes)
    made.set_caches(ms.ImageCache(folder, "public/"), ms.ImageCache(folder, "private/"), cache)
    return made


@pytest.fixture
def thumbnails(tmp_path, pillow):
    made = thumbnails_in(tmp_path / "%d thumbs", processes=2)
    host = start_host(made)
    yield made
    stop_host(made, host)


def make(thumbnails, source, kind="image", duration=None, sha256=SHA):
    """The thumbnail as a loaded Pillow image, or None."""
    from PIL import Image

    thumbnails.remove(sha256)
    if try_thumbnail(thumbnails, source, kind, duration, sha256) is not ms.Outcome.MADE:
        return None
    return Image.open(io.BytesIO(thumbnails.caches[0].read(sha256)))


def try_thumbnail(
    thumbnails, source, kind="image", duration=None, sha256=SHA, root="library", ahead=False
):
    folder = ms.Folder(root, source.parent, make=False, buffers=ms.WriteBuffers())
    with folder.open(source.name) as file:
        facts = ms.probe(file) or ms.Facts(kind, f"{kind}/x", "x")
        known = ms.File(root, source.name, sha256, *ms.state_of(os.fstat(file.fileno())), 0)
    asset = ms.Asset(sha256, known.size, facts._replace(kind=kind, duration=duration))
    return thumbnails.make(folder, known, asset, ahead=ahead)


def near(*colours):
    """Colours as an encoder may have them."""
    return [pytest.approx(colour, abs=39) for colour in colours]


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quadrants(pillow, size=(800, 400)):
    """Red and green above blue and white."""
    picture = pillow.new("RGB", size)
    width, height = size[0] // 2, size[1] // 2
    for colour, corner in zip(
        (RED, GREEN, BLUE, WHITE),
        ((0, 0), (width, 0), (0, height), (width, height)),
        strict=True,
    ):
        picture.paste(colour, (*corner, corner[0] + width, corner[1] + height))
    return picture


def corners(picture):
    picture = picture.convert("RGB")
    right, low = picture.width - 4, picture.height - 4
    return [picture.getpixel(place) for place in ((4, 4), (right, 4), (4, low), (right, low))]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((800, 400), (256, 128)), ((400, 800), (128, 256)), ((256, 256), (256, 256)),
        ((40, 20), (40, 20)), ((1, 1), (1, 1)), ((5000, 2), (256, 1)),
    ],
)  # fmt: skip
def test_a_thumbnail_fits_256_pixels_and_is_neither_padded_nor_enlarged(
    thumbnails, tmp_path, pillow, size, expected
):
    pillow.new("RGB", size, RED).save(tmp_path / "a.jpg")
    assert make(thumbnails, tmp_path / "a.jpg").size == expected


@pytest.mark.parametrize("extension", ["jpg", "png", "tif", "webp"])
def test_every_exif_orientation_comes_out_upright(thumbnails, tmp_path, pillow, extension):
    upright = quadrants(pillow)
    stored_as = {  # EXIF 2.32 §4.6.4: how the camera turned what is upright
        1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
        6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270", 99: None,
    }  # fmt: skip
    turns, shown = getattr(pillow, "Transpose", pillow), {}
    for orientation, turn in stored_as.items():
        stored = upright.transpose(getattr(turns, turn)) if turn else upright
        exif = pillow.Exif()
        exif[ms.EXIF_ORIENTATION] = orientation
        stored.save(tmp_path / f"a.{extension}", exif=exif)
        made = make(thumbnails, tmp_path / f"a.{extension}")
        shown[orientation] = made.size, corners(made)
    upright = (256, 128), near(RED, GREEN, BLUE, WHITE)
    assert shown == dict.fromkeys(stored_as, upright)


MODES = [
    # mode, extension, colour as stored, mode of the thumbnail, its colour
    ("1", "png", 1, "L", (255,)), ("L", "png", 200, "L", (200,)),
    ("LA", "png", (200, 128), "RGBA", (200, 200, 200, 128)), ("P", "gif", 7, "RGB", None),
    ("RGB", "bmp", RED, "RGB", RED), ("RGBA", "png", (255, 0, 0, 128), "RGBA", (255, 0, 0, 128)),
    ("RGBA", "webp", (255, 0, 0, 0), "RGBA", None),
    ("RGBA", "ico", (255, 0, 0, 128), "RGBA", (255, 0, 0, 128)),
    ("RGBA", "avif", (255, 0, 0, 128), "RGBA", None),
    ("RGBA", "heic", (255, 0, 0, 128), "RGBA", None), ("RGB", "jp2", RED, "RGB", RED),
    ("CMYK", "jpg", (0, 255, 255, 0), "RGB", RED), ("CMYK", "tif", (0, 255, 255, 0), "RGB", RED),
    ("YCbCr", "jpg", (76, 85, 255), "RGB", RED), ("I;16", "png", 65535 // 2, "L", (127,)),
    ("I;16", "tif", 65535 // 2, "L", (127,)), ("F", "tif", 0.5, "L", (127,)),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "extension", "colour", "mode_made", "colour_made"), MODES)
def test_every_mode_and_format_gives_a_png_that_browsers_show(
    thumbnails, tmp_path, pillow, mode, extension, colour, mode_made, colour_made
):
    source = tmp_path / f"a.{extension}"
    if extension == "heic":
        need("pillow_heif").register_heif_opener()
    try:
        pillow.new(mode, (600, 300) if extension != "ico" else (64, 32), colour).save(source)
    except (OSError, KeyError, ValueError) as error:
        pytest.skip(f"this Pillow cannot write {mode} as {extension}: {error}")
    made = make(thumbnails, source)
    assert (made.format, made.mode) == ("PNG", mode_made)
    assert made.width == 2 * made.height
    if colour_made is not None:
        pixel = made.getpixel((made.width // 2, made.height // 2))
        pixel = pixel if isinstance(pixel, tuple) else (pixel,)
        assert pixel == pytest.approx(colour_made, abs=6)


def swapped_profile():
    """An sRGB profile whose red is blue, whose green is red and whose blue is green."""
    cms = importlib.import_module("PIL.ImageCms")
    profile = cms.ImageCmsProfile(cms.createProfile("sRGB")).tobytes()
    head, tags, rest = profile[:132], profile[132:360], profile[360:]
    names = {b"rXYZ": b"gXYZ", b"gXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}
    return head + re.sub(rb"[rgb]XYZ", lambda match: names[match[0]], tags) + rest


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif", "avif"])
def test_colour_profiles_are_applied_and_bad_ones_are_passed_over(
    thumbnails, tmp_path, pillow, extension
):
    source = tmp_path / f"a.{extension}"
    good, given = swapped_profile(), (220, 60, 40)
    shown = []
    for profile in (good, good[:200], b"none"):
        try:
            pillow.new("RGB", (600, 300), given).save(source, icc_profile=profile)
        except (OSError, KeyError, ValueError) as error:
            pytest.skip(f"this Pillow cannot write that: {error}")
        shown.append(make(thumbnails, source).getpixel((99, 99)))
    assert shown == [pytest.approx(pixel, abs=6) for pixel in ((60, 40, 220), given, given)]


def icc(kind: bytes, colours: bytes, connection: bytes, tag: bytes, value: bytes) -> bytes:
    """An ICC profile with one tag beside its white (ICC.1:2001-04)."""
    white = struct.pack(">4s4x3i", b"XYZ ", 63190, 65536, 54061)
    size = 128 + 4 + 24 + len(white) + len(value)
    head = struct.pack(">I4x4s4s4s4s", size, b"\2\x40\0\0", kind, colours, connection)
    head = (head.ljust(36, b"\0") + b"acsp").ljust(68, b"\0") + white[8:]
    tags = struct.pack(">I4sII4sII", 2, b"wtpt", 156, 20, tag, 176, len(value))
    return head.ljust(128, b"\0") + tags + white + value


LINEAR_GREY = icc(b"mntr", b"GRAY", b"XYZ ", b"kTRC", b"curv" + bytes(8))
# Of two points an ink: full cyan alone is red, all else white (Lab in 8 bits).
SAME = bytes(range(256))
NO_INK, RED_INK = b"\xff\x80\x80", bytes((136, 208, 195))
SHAPE = struct.pack(">4B9i", 4, 3, 2, 0, *(65536 * (place % 4 == 0) for place in range(9)))
INKS = SAME * 4 + NO_INK * 8 + RED_INK + NO_INK * 7 + SAME * 3
PRESS = icc(b"prtr", b"CMYK", b"Lab ", b"A2B0", b"mft1" + bytes(4) + SHAPE + INKS)


@pytest.mark.parametrize(
    ("extension", "mode", "colour", "profile", "expected"),
    [
        ("jpg", "L", 100, LINEAR_GREY, (168, 168, 168, 255)),
        ("png", "L", 100, LINEAR_GREY, (168, 168, 168, 255)),
        ("png", "LA", (100, 128), LINEAR_GREY, (168, 168, 168, 128)),
        ("jpg", "CMYK", (255, 0, 0, 0), PRESS, (251, 0, 8, 255)),
        ("tif", "CMYK", (255, 0, 0, 0), PRESS, (251, 0, 8, 255)),
        ("jpg", "CMYK", (255, 0, 0, 0), PRESS[:900], (0, 255, 255, 255)),
    ],
)  # fmt: skip
def test_profiles_of_grey_and_of_a_press_are_applied(
    thumbnails, tmp_path, pillow, extension, mode, colour, profile, expected
):
    source = tmp_path / f"a.{extension}"
    pillow.new(mode, (600, 300), colour).save(source, icc_profile=profile)
    pixel = make(thumbnails, source).convert("RGBA").getpixel((99, 99))
    assert pixel == pytest.approx(expected, abs=6)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"), [("L", 200, 200), ("CMYK", (0, 255, 255, 0), 255)]
)
def test_a_profile_for_other_colours_than_the_picture_has_is_passed_over(
    thumbnails, tmp_path, pillow, mode, colour, expected
):
    picture = pillow.new(mode, (600, 300), colour)
    picture.save(tmp_path / "a.jpg", icc_profile=swapped_profile())
    made = make(thumbnails, tmp_path / "a.jpg").convert("RGB")
    assert abs(made.getpixel((99, 99))[0] - expected) <= 6, mode


@pytest.mark.parametrize(
    ("extension", "found", "coded", "given", "expected"),
    [
        ("png", b"", b"gAMA" + struct.pack(">I", 100_000), 100, 168),  # linear
        ("png", b"", b"gAMA" + struct.pack(">I", 45_455), 100, 100),
        ("png", b"", b"cICP\x0c\x0d\0\1", 100, 100),  # Display P3, with the curve of sRGB
        ("png", b"", b"cICP\x09\x10\0\1", 148, 249),  # graphics white of PQ and HLG
        ("png", b"", b"cICP\x09\x12\0\1", 191, 249),
        ("png", b"", b"cICP\x09\x12\0\1", 128, 153),
        ("avif", b"colrnclx\0\1\0\x0d", b"colrnclx\0\x09\0\x10", 148, 249),
        ("heic", b"colrnclx\0\1\0\x0d", b"colrnclx\0\x09\0\x12", 191, 249),
    ],
)  # fmt: skip
def test_values_mean_what_a_picture_without_a_profile_says(
    thumbnails, tmp_path, pillow, extension, found, coded, given, expected
):
    if extension == "heic":
        need("pillow_heif").register_heif_opener()
    saved, formats = io.BytesIO(), pillow.registered_extensions()
    if f".{extension}" not in formats:
        pytest.skip(f"this Pillow cannot write {extension}")
    pillow.new("RGB", (64, 64), (given,) * 3).save(saved, formats[f".{extension}"])
    content = saved.getvalue()
    if found and found not in content:
        pytest.skip("this encoder says nothing of colours")
    changed = content.replace(found, coded) if found else content[:33] + png_chunk(
        coded[:4], coded[4:]) + content[33:]  # fmt: skip
    (tmp_path / "a").write_bytes(changed)
    pixel = make(thumbnails, tmp_path / "a").convert("RGB").getpixel((32, 32))
    assert pixel == pytest.approx((expected,) * 3, abs=6)


@pytest.fixture
def small_memory(tmp_path, monkeypatch, pillow):
    """Thumbnails of decoders that have memory for nothing larger."""
    real = ms.shrink

    def shrink(picture, size):
        if size > ms.THUMBNAIL_SIZE:
            raise MemoryError
        return real(picture, size)

    monkeypatch.setattr(ms, "shrink", shrink)
    thumbnails = thumbnails_in(tmp_path / "made", processes=1)
    host = start_host(thumbnails)
    yield thumbnails
    stop_host(thumbnails, host)


def test_a_picture_that_is_too_large_for_a_preview_is_shown_smaller(
    small_memory, tmp_path, pillow
):
    pillow.new("RGB", (900, 600), RED).save(tmp_path / "a.jpg")
    assert make(small_memory, tmp_path / "a.jpg").size == (256, 171)


@pytest.mark.parametrize(("sizes", "is_shown"), [([260], True), ([], False)])
def test_of_a_heic_picture_that_is_too_large_the_small_one_in_it_is_shown(
    small_memory, tmp_path, pillow, sizes, is_shown
):
    need("pillow_heif").register_heif_opener()
    noise = pillow.frombytes("L", (480, 320), random.Random(8).randbytes(480 * 320)).convert("RGB")
    noise.save(tmp_path / "a.heic", thumbnails=sizes, quality=60)
    content = bytearray((tmp_path / "a.heic").read_bytes())
    start = content.index(b"mdat") + 500
    content[start : start + 9000] = bytes(9000)  # of the large one
    (tmp_path / "a.heic").write_bytes(content)
    made = make(small_memory, tmp_path / "a.heic")
    average = made and made.resize((1, 1), pillow.BOX).getpixel((0, 0))
    assert (average == pytest.approx((128,) * 3, abs=39)) is is_shown, average


@pytest.mark.parametrize("name", ["a.gif", "b.png"])
def test_transparent_colours_of_palettes_stay_transparent(thumbnails, tmp_path, pillow, name):
    pillow.new("P", (600, 300), 3).save(tmp_path / "a.gif", transparency=3)
    pillow.new("RGB", (600, 300), RED).save(tmp_path / "b.png", transparency=RED)
    made = make(thumbnails, tmp_path / name)
    assert made.mode == "RGBA"
    assert made.getpixel((9, 9))[3] == 0


def sixteen_bits(colour_type, *values, key=b""):
    """A PNG of 64 x 64 equal pixels of 16 bits a channel."""
    row = b"\0" + struct.pack(f">{len(values)}H", *values) * 64
    chunks = [(b"tRNS", key)] if key else []
    pixels = (b"IDAT", zlib.compress(row * 64))
    return png_with(*chunks, pixels, size=(64, 64), depth=16, colour=colour_type)


def white_is_zero(value):
    """A TIFF of 64 x 64 pixels of 16 bits, of which 0 is white."""
    tags = {0x100: 64, 0x101: 64, 0x102: 16, 0x103: 1, 0x106: 0, 0x115: 1, 0x116: 64}
    tags |= {0x111: 0, 0x117: 64 * 64 * 2}
    tags[0x111] = len(tiff(tags))
    return tiff(tags) + struct.pack("<H", value) * 64 * 64


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (sixteen_bits(0, 0x6000), (96, 96, 96, 255)),
        (sixteen_bits(0, 0x6000, key=b"\x60\0"), (96, 96, 96, 0)),
        (sixteen_bits(0, 0x6000, key=b"\x60\1"), (96, 96, 96, 255)),
        (sixteen_bits(4, 0x6000, 0x8000), (96, 96, 96, 128)),
        (sixteen_bits(2, 0x6000, 0xC000, 0x1000), (96, 192, 16, 255)),
        (sixteen_bits(6, 0x6000, 0xC000, 0x1000, 0x8000), (96, 192, 16, 128)),
        (white_is_zero(0x6000), (159, 159, 159, 255)),
    ],
)  # fmt: skip
def test_sixteen_bits_are_scaled_to_eight(thumbnails, tmp_path, pillow, content, expected):
    (tmp_path / "a.png").write_bytes(content)
    pixel = make(thumbnails, tmp_path / "a.png").convert("RGBA").getpixel((32, 32))
    assert pixel[3] == expected[3]
    if expected[3]:  # what cannot be seen may have any colour
        assert pixel == pytest.approx(expected, abs=2)


def bmp_of(bits: int, packing: int, *masks: int, version: int = 108) -> bytes:
    """The start of a BMP of 2 by 2 pixels, whose rows are of four bytes or eight."""
    about = struct.pack("<IiiHHI20x4I", version, 2, 2, 1, bits, packing, *(*masks, 0, 0, 0, 0)[:4])
    return b"BM" + struct.pack("<8xI", 14 + version) + about[:version].ljust(version, b"\0")


PALE = b"\0\0\xff\x80" * 4  # red, half transparent


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (bmp_of(32, 0) + PALE, (255, 0, 0, 128)),
        (bmp_of(32, 0) + b"\0\0\xff\0" * 4, (255, 0, 0, 255)),
        (bmp_of(32, 0, version=40) + PALE, (255, 0, 0, 255)),
        (bmp_of(32, 3, 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + PALE, (255, 0, 0, 128)),
        (bmp_of(16, 3, 0x7C00, 0x3E0, 0x1F, 0x8000) + b"\0\x7c" * 4, (0, 0, 0, 0)),
        (bmp_of(16, 3, 0x7C00, 0x3E0, 0x1F, 0x8000) + b"\x10\x80" * 4, (0, 0, 131, 255)),
        (bmp_of(16, 3, 0xFF, 0xFF00) + b"\x20\x40" * 4, (32, 64, 0, 255)),
        (bmp_of(32, 3, 0x3FF00000, 0xFFC00, 0x3FF) + b"\xff\x03\0\x20" * 4, (128, 0, 255, 255)),
        (bmp_of(2, 0, version=40) + b"\0\0\xff\0" * 2, (255, 0, 0, 255)),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else str(value),
)  # fmt: skip
def test_masks_and_alpha_of_a_bmp_count(thumbnails, tmp_path, pillow, content, expected):
    (tmp_path / "a.bmp").write_bytes(content)
    made = make(thumbnails, tmp_path / "a.bmp")
    assert (made.size, made.convert("RGBA").getpixel((1, 1))) == ((2, 2), expected)


def test_around_a_first_frame_that_is_smaller_than_its_animation_there_is_nothing(
    thumbnails, tmp_path, pillow
):
    (tmp_path / "a.gif").write_bytes(
        b"GIF89a\2\0\1\0\x80\1\0\xff\0\0\0\0\xff" + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;"
    )
    made = make(thumbnails, tmp_path / "a.gif").convert("RGBA")
    assert [made.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0, 255), (0, 0, 0, 0)]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_an_animation_is_shown_by_its_first_frame(thumbnails, tmp_path, pillow, name):
    frames = [pillow.new("RGB", (300, 300), colour) for colour in (RED, GREEN, BLUE)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    made = make(thumbnails, tmp_path / name).convert("RGB")
    assert [made.getpixel((99, 99))] == near(RED)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_nothing_but_pixels_is_in_a_thumbnail(thumbnails, tmp_path, pillow, name):
    exif = pillow.Exif()
    exif[0x010F] = "Camera"
    exif.get_ifd(0x8825)[1] = "N"
    secret = {"exif": exif, "icc_profile": b"secret profile", "dpi": (300, 300), "comment": b"me"}
    quadrants(pillow).save(tmp_path / name, **secret)
    assert make(thumbnails, tmp_path / name) is not None
    png = thumbnails.caches[0].read(SHA)
    kinds, at = set(), 8
    while at < len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        kinds.add(kind)
        at += length + 12
    assert kinds == {b"IHDR", b"IDAT", b"IEND"}, name


@pytest.mark.filterwarnings("ignore")  # Pillow warns, as it may
def test_damaged_exif_costs_the_orientation_only(thumbnails, tmp_path, pillow):
    once()
    valid = pillow.Exif()
    valid[ms.EXIF_ORIENTATION], valid[0x010F] = 6, "Camera"
    valid = valid.tobytes()
    impossible = []
    for exif in (
        b"Exif\0\0nonsense",
        b"Exif\0\0",
        *(valid[:end] for end in range(7, len(valid), 3)),
        *(valid[:at] + b"\xff\xff" + valid[at + 2 :] for at in range(6, len(valid) - 2, 2)),
    ):
        quadrants(pillow).save(tmp_path / "a.jpg", exif=exif)
        if make(thumbnails, tmp_path / "a.jpg") is None:
            impossible.append(exif)
    assert impossible == []


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "lossless.webp", "gif", "tif"])
def test_a_picture_that_is_cut_short_is_shown_as_far_as_it_goes(
    thumbnails, tmp_path, pillow, extension
):
    once()
    picture = quadrants(pillow)
    noise = pillow.frombytes("RGB", (800, 40), random.Random(6).randbytes(800 * 40 * 3))
    picture.paste(noise, (0, 360))  # so that most of the file is of the last lines
    whole = tmp_path / f"whole.{extension}"
    picture.save(whole, **({"lossless": True} if "lossless" in extension else {}))
    (tmp_path / "a").write_bytes(whole.read_bytes()[:-2])
    assert corners(make(thumbnails, tmp_path / "a"))[:2] == near(RED, GREEN)
    (tmp_path / "a").write_bytes(whole.read_bytes()[: whole.stat().st_size * 7 // 10])
    made = make(thumbnails, tmp_path / "a")
    assert made.size == (256, 128)
    assert corners(made)[:2] == near(RED, GREEN)


@pytest.mark.parametrize(
    ("bits", "packing", "table", "pixels"),
    [
        (2, 0, (0xFF0000, 0xFF00, 0xFF, 0xFFFFFF), (0, 1, 2, 3)),
        (16, 3, (0x30, 0x0E, 1, 0), (0x30, 0x0E, 1, 0x3F)),
        (32, 3, (0x7FF << 21, 0x7FF << 10, 0x3FF, 0), (0x7FF << 21, 0x7FF << 10, 0x3FF, ~0)),
        (32, 6, (0xFF << 24, 0xFF << 8, 0xFF << 16, 0xFF), (0xFF0000FF, 0xFFFF, 0xFF00FF, ~0)),
    ],
)
def test_a_bmp_of_unusual_pixels_is_shown(
    thumbnails, tmp_path, pillow, bits, packing, table, pixels
):
    """Red and green above blue and white; the lines stand from the lowest to the highest."""
    places = range(0, 32, bits)
    words = [sum(pixel << place for place in places) & 0xFFFFFFFF for pixel in pixels]
    lines = [
        struct.pack("<16I", *[left] * 8, *[right] * 8) for left, right in (words[2:], words[:2])
    ]
    shape = 16 * len(places), 16
    head = struct.pack("<2s8xIIiiHHI20x4I", b"BM", 70, 40, *shape, 1, bits, packing, *table)
    (tmp_path / "a.bmp").write_bytes(head + lines[0] * 8 + lines[1] * 8)
    made = make(thumbnails, tmp_path / "a.bmp")
    assert made.size == shape
    assert corners(made) == near(RED, GREEN, BLUE, WHITE)


@pytest.mark.parametrize(
    ("kind", "head"),
    [(b"zTXt", b"Comment\0\0"), (b"iTXt", b"Comment\0\1\0\0\0"), (b"iCCP", b"long\0\0")],
)
def test_a_png_with_long_texts_or_a_long_profile_is_shown(
    thumbnails, tmp_path, pillow, kind, head
):
    saved = io.BytesIO()
    quadrants(pillow).save(saved, "PNG")
    start, rest = saved.getvalue()[:33], saved.getvalue()[33:]
    long = png_chunk(kind, head + zlib.compress(b"history" * 300_000))
    (tmp_path / "a.png").write_bytes(start + long * 2 + rest)
    assert corners(make(thumbnails, tmp_path / "a.png"))[:2] == near(RED, GREEN)


def test_large_pictures_are_limited_by_memory_and_not_by_pixels(thumbnails, tmp_path, pillow):
    once()
    pillow.new("L", (20_000, 11_000), 90).save(tmp_path / "a.jpg")
    assert make(thumbnails, tmp_path / "a.jpg").getpixel((9, 9)) == 90
    pillow.new("L", (12_000, 9_000), 90).save(tmp_path / "a.png", compress_level=1)
    assert make(thumbnails, tmp_path / "a.png").getpixel((9, 9)) == 90


RAWS = {  # what their first bytes are
    "RAF": b"FUJIFILMCCD-RAW 0201" + bytes(64) + struct.pack(">II", 96, 9999),
    "CR3": b"\0\0\0\x18ftypcrx \0\0\0\1crx isom",
    "CR2": b"II*\0\x10\0\0\0CR\2\0",
    "RW2": b"IIU\0\x18\0\0\0\x88\xe7\x74\xd8",
    "ORF": b"IIRO\x08\0\0\0",
    "DNG": tiff({0xC612: 1, 0x100: 40, 0x101: 30}),
    "NEF": tiff({0x10F: b"NIKON CORPORATION", 0x14A: 0x7FFF}),
    "ARW": tiff({0x10F: b"SONY", 0x14A: 0x7FFF}),
}


@pytest.mark.parametrize("raw", RAWS)
def test_of_a_raw_picture_the_largest_jpeg_in_it_is_shown(thumbnails, tmp_path, pillow, raw):
    within = []
    for size, colour in (((160, 120), RED), ((800, 400), GREEN), ((300, 200), BLUE)):
        within.append(io.BytesIO())
        pillow.new("RGB", size, colour).save(within[-1], "JPEG")
    lossless = b"\xff\xd8\xff\xc3\0\x0b\x0e\x20\0\x20\0\1\0\x11\0"  # the raw pixels
    pixels = random.Random(7).randbytes(999)
    parts = [jpeg.getvalue() + pixels for jpeg in within]
    source = tmp_path / "a"
    source.write_bytes(RAWS[raw].ljust(999, b"\0") + b"".join(parts) + lossless + bytes(999))
    made = make(thumbnails, source)
    assert made.size == (256, 128)
    assert [made.getpixel((9, 9))] == near(GREEN)


@pytest.mark.parametrize(("size", "expected"), [((160, 80), (80, 160)), ((160, 120), None)])
def test_the_small_picture_in_exif_stands_in_only_if_it_has_the_shape_of_the_picture(
    thumbnails, tmp_path, pillow, size, expected
):
    small = io.BytesIO()
    pillow.new("RGB", size, GREEN).save(small, "JPEG")
    pillow.new("RGB", (800, 400), RED).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    exif = b"Exif\0\0" + exif_tiff() + small.getvalue()
    app1 = jpeg_segment(0xE1, exif)
    (tmp_path / "a.jpg").write_bytes(whole[:2] + app1 + whole[2:])
    assert [make(thumbnails, tmp_path / "a.jpg").getpixel((9, 9))] == near(RED)
    (tmp_path / "a.jpg").write_bytes(whole[:2] + app1 + whole[2:200])  # no pixel is left
    made = make(thumbnails, tmp_path / "a.jpg")
    assert (made and made.size) == expected


def png_header(width, height):
    """A PNG that claims a size, with a little data: a bomb as Pillow sees it."""
    return png_with((b"IDAT", zlib.compress(bytes(1 << 20))), size=(width, height))


def test_bombs_and_broken_files_have_no_thumbnail_and_the_next_one_has(
    thumbnails, tmp_path, pillow
):
    whole = io.BytesIO()
    quadrants(pillow).save(whole, "JPEG")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    script = b"ffconcat version 1.0\nfile good.jpg\n"
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:good.jpg\n#EXT-X-ENDLIST\n"
    naming = [eps, script, playlist]  # programs and other files
    broken = [png_header(60000, 60000), *naming]
    broken += [b"", b"GIF89a", random.Random(5).randbytes(5000), whole.getvalue()[:400]]
    (tmp_path / "good.jpg").write_bytes(whole.getvalue())
    for number, content in enumerate(broken):
        (tmp_path / "bad.jpg").write_bytes(content)
        for kind in ("image", "video") if content in naming else ("image",):
            assert make(thumbnails, tmp_path / "bad.jpg", kind) is None, number
    assert make(thumbnails, tmp_path / "good.jpg") is not None
    assert [file.name for file in tmp_path.rglob("*.png")] == [f"{SHA}.png"]


def abort(*_):
    os.abort()


def spin(*_):
    """Compute for ever; the limit of CPU that should be set comes sooner here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (min(1, soft), hard))
    while True:
        pass


def block(*_):
    """Wait for ever; the alarm that should be set comes sooner here."""
    signal.alarm(min(1, signal.alarm(0)))
    signal.pause()


def grow(*_):
    return b"a" * (ms.DECODE_MEMORY + 1)


def chatter(_, target, *__):
    target.write(b"\x89PNG\r\n\x1a\n")
    while True:
        target.write(bytes(1 << 16))


def cut(_, target, *__):
    target.write(ms.FRAME_LENGTH.pack(1000) + b"\x89PNG\r\n\x1a\nand no end")


SPILLED = Path(tempfile.gettempdir()) / f"{unique().decode()}.spill"


def spill(*_):
    with SPILLED.open("wb", buffering=0) as file:
        file.write(b"a")


@pytest.mark.parametrize("crash", [abort, spin, block, grow, chatter, cut, spill])
def test_a_decoder_that_goes_wrong_costs_one_thumbnail(
    tmp_path, monkeypatch, pillow, crash, request
):
    real = ms.write_renditions

    def write_renditions(source, *others):
        wrong = source.read().endswith(b"crash")
        source.seek(0)
        if wrong:
            os.mkdir(tmp_path / "begun")
        return (crash if wrong else real)(source, *others)

    request.addfinalizer(lambda: SPILLED.unlink(missing_ok=True))
    monkeypatch.setattr(ms, "write_renditions", write_renditions)
    thumbnails = thumbnails_in(tmp_path / "made", processes=1)
    host = start_host(thumbnails)
    quadrants(pillow).save(tmp_path / "good.jpg")
    (tmp_path / "bad.jpg").write_bytes((tmp_path / "good.jpg").read_bytes() + b"crash")
    assert make(thumbnails, tmp_path / "bad.jpg") is None
    assert (tmp_path / "begun").exists()
    assert make(thumbnails, tmp_path / "good.jpg", sha256="cd" * 32) is not None
    assert [path.stat().st_size for path in (SPILLED,) if path.exists()] == [0] * (crash is spill)
    stop_host(thumbnails, host)


def test_a_server_with_less_memory_than_a_decoder_may_take_makes_thumbnails(tmp_path, pillow):
    if not hasattr(resource, "prlimit"):
        pytest.skip("needs prlimit")
    quadrants(pillow).save(tmp_path / "a.jpg")
    thumbnails = thumbnails_in(tmp_path / "made", processes=1)
    host = start_host(thumbnails)
    resource.prlimit(host, resource.RLIMIT_AS, (ms.DECODE_MEMORY, ms.DECODE_MEMORY))
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(make, thumbnails, tmp_path / "a.jpg")
        try:
            assert made.result(DEADLINE) is not None
        finally:  # a decoder that ends before it has taken its job would be forked for ever
            thumbnails.is_over = True
    stop_host(thumbnails, host)


def test_a_decoder_that_cannot_be_started_gives_no_verdict_on_a_video(tmp_path):
    thumbnails = thumbnails_in(tmp_path / "made", processes=1)
    thumbnails.ffmpeg = str(tmp_path / "ffmpeg")  # while it is being replaced
    (tmp_path / "a.mp4").write_bytes(b"content")
    host = start_host(thumbnails)
    assert try_thumbnail(thumbnails, tmp_path / "a.mp4", "video") is ms.Outcome.FAILED
    stop_host(thumbnails, host)


def test_threads_that_want_one_thumbnail_decode_it_once(tmp_path, pillow):
    quadrants(pillow).save(tmp_path / "a.jpg")

    class Counting(ms.Thumbnails):
        decoded = 0

        def _decode(self, source, job):
            self.decoded += 1
            return super()._decode(source, job)

    thumbnails = thumbnails_in(tmp_path / "made", kind=Counting)
    host = start_host(thumbnails)
    answers = together(8, lambda _: try_thumbnail(thumbnails, tmp_path / "a.jpg"))
    assert answers == [ms.Outcome.MADE] * 8
    assert thumbnails.decoded == 1
    stop_host(thumbnails, host)


def test_what_somebody_waits_for_is_made_beside_what_is_made_ahead(tmp_path, monkeypatch, pillow):
    go = tmp_path / "go"

    def tell(source, target, job, decoders):
        while job.ahead and not go.exists():
            time.sleep(0.01)
        told = b"%d" % os.sched_getscheduler(0)
        target.write(ms.FRAME_LENGTH.pack(len(told)) + told)

    monkeypatch.setattr(ms, "write_renditions", tell)
    quadrants(pillow).save(tmp_path / "a.jpg")
    thumbnails = thumbnails_in(tmp_path / "made", processes=1)
    host = start_host(thumbnails)

    def told(*, ahead: bool) -> int:
        thumbnails.remove(SHA)
        assert try_thumbnail(thumbnails, tmp_path / "a.jpg", ahead=ahead) is ms.Outcome.MADE
        return int(thumbnails.caches[0].read(SHA))

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(told, ahead=True)
        wait_until(lambda: thumbnails._making)
        assert told(ahead=False) == os.SCHED_OTHER
        thumbnails.remove(SHA)
        go.touch()
        assert slow.result(DEADLINE) == os.SCHED_IDLE
    assert [told(ahead=ahead) for ahead in (True, False, True)] == [
        os.SCHED_IDLE, os.SCHED_OTHER, os.SCHED_IDLE]  # fmt: skip
    stop_host(thumbnails, host)


def test_a_dead_host_is_started_again_and_said(tmp_path, pillow, capsys):
    quadrants(pillow).save(tmp_path / "a.jpg")
    thumbnails = thumbnails_in(tmp_path / "made")
    assert try_thumbnail(thumbnails, tmp_path / "a.jpg") is ms.Outcome.FAILED  # not started
    host = start_host(thumbnails)
    assert make(thumbnails, tmp_path / "a.jpg") is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are for the server
        os.kill(host, number)
    assert make(thumbnails, tmp_path / "a.jpg") is not None
    os.kill(host, signal.SIGKILL)
    os.waitpid(host, 0)
    thumbnails._crashes.clear()
    # Its decoders end first
    wait_until(lambda: thumbnails.ensure_host() and thumbnails.restarts[0])
    wait_until(lambda: make(thumbnails, tmp_path / "a.jpg"))
    assert thumbnails.restarts[0] == 1
    assert "started again" in capsys.readouterr().err
    thumbnails.stop()


def test_processes_forked_later_share_the_host_and_it_outlives_none_of_them(tmp_path, pillow):
    quadrants(pillow).save(tmp_path / "a.jpg")
    thumbnails = thumbnails_in(tmp_path / "made", processes=1)
    host = start_host(thumbnails)
    workers = []
    for number in range(3):
        if (worker := os.fork()) == 0:
            made = try_thumbnail(thumbnails, tmp_path / "a.jpg", sha256=f"{number:064x}")
            os._exit(0 if made is ms.Outcome.MADE else 1)
        workers.append(worker)
    assert [os.waitpid(worker, 0)[1] for worker in workers] == [0, 0, 0]
    assert [thumbnails.caches[0].exists(f"{number:064x}") for number in range(3)] == [True] * 3
    stop_host(thumbnails, host)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_png_has_all_pixels_of_its_picture(pillow, mode):
    bands = [pillow.effect_noise((31, 17), 90) for _ in mode]
    picture = pillow.merge(mode, bands)
    written = pillow.open(io.BytesIO(ms.encode_png(picture)), formats=["PNG"])
    assert (written.mode, written.size) == (mode, (31, 17))
    assert written.tobytes() == picture.tobytes()


def test_what_cannot_be_decoded_here_is_said_before_it_is_tried(thumbnails, tmp_path, monkeypatch):
    assert not thumbnails.can_make("image", "image/svg+xml")
    assert not thumbnails.can_make("audio", "audio/mpeg")
    assert thumbnails.can_make("video", "video/mp4") == bool(shutil.which("ffmpeg"))
    monkeypatch.setattr(ms, "find_pillow", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    bare = ms.Thumbnails()
    bare.start()
    assert bare.description.startswith("none; for images install Pillow")
    assert not bare.can_make("image", "image/jpeg")
    assert not bare.ensure_host()


def test_pillow_is_found_but_not_imported_by_the_server():
    need("PIL")
    program = (
        "import sys, mediaserver as ms;print(ms.Thumbnails().description, 'PIL' in sys.modules)"
    )
    import PIL

    said = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    ).stdout
    assert said.startswith(f"Pillow {PIL.__version__}")
    assert said.endswith("False\n")


def test_an_empty_file_is_no_thumbnail_and_what_a_crash_left_is_removed(tmp_path):
    thumbnails = thumbnails_in(tmp_path)
    fill(tmp_path / "public", {".incoming/left.png": b"", f"{SHA}.png": b""})
    thumbnails.recover()
    assert not thumbnails.caches[0].exists(SHA)
    assert not list((tmp_path / "public" / ".incoming").iterdir())
    thumbnails.remove(SHA)
    thumbnails.remove(SHA)
    assert not files_below(tmp_path)


def test_of_previews_the_least_recently_used_go(tmp_path):
    folder = ms.Folder("data", tmp_path, make=True, buffers=ms.WriteBuffers())
    cache = ms.PreviewCache(folder, "previews/", 1000, memoryview(bytearray(8)).cast("Q"))
    small, large = ms.PREVIEWS[0], ms.PREVIEWS[-1]
    for number in range(9):
        cache.store(f"{number:064x}", small, bytes(100))
        os.utime(tmp_path / cache.name(f"{number:064x}", small), (number, number))
    assert cache.read(f"{0:064x}", small) == bytes(100)
    cache.store(SHA, large, bytes(201))
    kept = {
        number for number in range(9) if (tmp_path / cache.name(f"{number:064x}", small)).exists()
    }
    assert kept == {0, 3, 4, 5, 6, 7, 8}
    assert cache.read(SHA, large) == bytes(201)
    cache.store(SHA, small, bytes(1001))
    cache.remove(SHA, *ms.PREVIEWS)
    folder.reserve = 1 << 62
    cache.store(SHA, small, b"a")  # what is left of the disk is for uploads
    for rendition in (small, large):
        with pytest.raises(FileNotFoundError):
            cache.read(SHA, rendition)


def make_video(path, source, *options):
    command = ["ffmpeg", "-nostdin", "-v", "error", "-y", "-f", "lavfi", "-i", source]
    subprocess.run([*command, *options, str(path)], check=True)
    return path


RED_THEN_BLUE = "color=red:s=640x320:d=0.9:r=10[a];color=blue:s=640x320:d=4:r=10[b];[a][b]concat"


def test_a_video_is_shown_at_one_second_or_a_third_of_it(thumbnails, tmp_path, pillow, ffmpeg):
    source = make_video(tmp_path / "-%03d:video.mp4", RED_THEN_BLUE, "-c:v", "mpeg4")
    shown = [make(thumbnails, source, "video", duration) for duration in (None, 1.5, 4.9)]
    assert [made.size for made in shown] == [(256, 128)] * 3
    assert [made.convert("RGB").getpixel((9, 9)) for made in shown] == near(RED, RED, BLUE)
    assert make(thumbnails, source, "image") is None


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_a_video_that_ends_before_the_second_asked_for_is_shown_by_its_first_frame(
    thumbnails, tmp_path, pillow, ffmpeg, name
):
    options = ("-frames:v", "1", "-c:v", "mpeg4")
    short = make_video(tmp_path / name, "color=blue:s=64x32:r=10", *options)
    pixel = make(thumbnails, short, "video", 17.0).convert("RGB").getpixel((9, 9))
    assert [pixel] == near(BLUE)


def test_a_video_whose_download_was_cut_short_is_shown_by_what_has_come(
    thumbnails, tmp_path, pillow, ffmpeg
):
    options = ("-t", "9", "-c:v", "mpeg4", "-g", "5", "-movflags", "+faststart")
    whole = make_video(tmp_path / "a.mp4", "color=blue:s=640x320:r=10,noise=alls=9", *options)
    content = whole.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    whole.write_bytes(content[: content.index(b"mdat") + 40_000])
    pixel = make(thumbnails, whole, "video", 9.0).convert("RGB").getpixel((9, 9))
    assert [pixel] == near(BLUE)


@pytest.mark.parametrize(("transfer", "white"), [("smpte2084", 0x94), ("arib-std-b67", 0xBF)])
def test_graphics_white_of_an_hdr_video_is_white(
    thumbnails, tmp_path, pillow, ffmpeg, transfer, white
):
    known = subprocess.run(["ffmpeg", "-filters"], capture_output=True, check=True).stdout
    if b" zscale " not in known:
        pytest.skip("this ffmpeg was built without zscale")
    tags = ["-color_trc", transfer, "-color_primaries", "bt2020", "-colorspace", "bt2020nc"]
    grey = f"color=0x{white:02x}{white:02x}{white:02x}:s=64x32:d=1,format=yuv420p"
    source = make_video(tmp_path / "a.mkv", grey, *tags, "-c:v", "mpeg4", "-qscale:v", "2")
    pixel = make(thumbnails, source, "video").convert("RGB").getpixel((9, 9))
    assert min(pixel) >= 240
    plain = []
    for tags in ((), ("-color_trc", "bt709", "-color_primaries", "bt709")):
        source = make_video(tmp_path / "b.mkv", grey, *tags, "-c:v", "mpeg4", "-qscale:v", "2")
        plain.append(make(thumbnails, source, "video").convert("RGB").getpixel((9, 9))[0])
    assert plain == pytest.approx([white] * 2, abs=4)


@pytest.mark.parametrize(("height", "matrix"), [(716, "bt601"), (720, "bt709")])
def test_a_video_that_names_no_colours_has_those_of_its_height(
    thumbnails, tmp_path, pillow, ffmpeg, height, matrix
):
    red = f"color=0xdc3c28:s=64x{height}:d=1,format=rgb24,scale=out_color_matrix={matrix}"
    source = make_video(
        tmp_path / "a.mkv", f"{red},format=yuv420p", "-c:v", "mpeg4", "-qscale:v", "2"
    )
    pixel = make(thumbnails, source, "video").convert("RGB").getpixel((2, 9))
    assert pixel == pytest.approx((0xDC, 0x3C, 0x28), abs=5)


def test_a_video_is_upright_with_square_pixels_and_not_enlarged(
    thumbnails, tmp_path, pillow, ffmpeg
):
    wide = make_video(
        tmp_path / "a.mp4", "color=red:s=320x320:d=1", "-aspect", "2:1", "-c:v", "mpeg4"
    )
    assert make(thumbnails, wide, "video").size == (256, 128)
    small = make_video(tmp_path / "b.avi", "color=red:s=64x32:d=1", "-c:v", "mpeg4")
    assert make(thumbnails, small, "video").size == (64, 32)
    turn = ["-c", "copy", "-metadata:s:v", "rotate=90"]
    turned = tmp_path / "c.mov"
    options = ["ffmpeg", "-v", "error", "-display_rotation", "90", "-i", str(wide), *turn]
    if subprocess.run([*options, str(turned)], check=False).returncode:
        options = ["ffmpeg", "-v", "error", "-y", "-i", str(wide), *turn]  # before ffmpeg 6
        subprocess.run([*options, str(turned)], check=True)
    assert make(thumbnails, turned, "video").size == (128, 256)


def fails_at_jpegs(*arguments, open_picture=ms.open_picture):
    if "JPEG" in arguments[1]:
        raise MemoryError
    return open_picture(*arguments)


@pytest.mark.parametrize(
    ("name", "replaced"), [("load_pillow", list), ("open_picture", fails_at_jpegs)]
)
def test_ffmpeg_stands_in_for_pillow(tmp_path, monkeypatch, pillow, ffmpeg, name, replaced):
    monkeypatch.setattr(ms, name, replaced)
    exif = pillow.Exif()
    exif[ms.EXIF_ORIENTATION] = 6
    pillow.new("RGB", (800, 400), RED).save(tmp_path / "a.jpg", exif=exif)
    pillow.new("RGBA", (800, 400), (255, 0, 0, 128)).save(tmp_path / "b.png")
    thumbnails = thumbnails_in(tmp_path / "made")
    host = start_host(thumbnails)
    assert make(thumbnails, tmp_path / "a.jpg").size == (128, 256)
    assert make(thumbnails, tmp_path / "b.png").mode == "RGBA"
    (tmp_path / "c.jpg").write_bytes(png_header(60000, 60000))
    assert make(thumbnails, tmp_path / "c.jpg") is None
    stop_host(thumbnails, host)


# ======================================================================================
# 8. Scanner
# ======================================================================================


class Scanning(NamedTuple):
    """A scanner of one folder that runs when told to, in this process."""

    index: Any
    folder: Any
    thumbnails: Any
    renditions: Any
    scanner: Any
    path: Path

    def states(self) -> dict[str, int | None]:
        rows = self.index.read("SELECT path, thumbnail FROM file JOIN asset USING (sha256)")
        return {os.fsdecode(path): thumbnail for path, thumbnail in rows}

    def try_thumbnail(self, name: str) -> Any:
        file, asset = self.index.files.get("library", name)
        return self.renditions.ensure_thumbnail(file, asset)

    @property
    def unreadable(self) -> int:
        return int(self.scanner.progress.get().unreadable)


@pytest.fixture
def scanning(tmp_path) -> Iterator[Scanning]:
    path = tmp_path / "pictures"
    path.mkdir()
    index = ms.open_index(tmp_path / "index.sqlite3")
    is_new = functools.partial(index.files.is_empty, "library")
    folder = ms.Folder("library", path, make=False, buffers=ms.WriteBuffers(), is_new=is_new)
    thumbnails = ms.Thumbnails(1)
    caches = [ms.ImageCache(folder, f".thumbnails/{name}") for name in ("", "private/")]
    thumbnails.set_caches(
        *caches, ms.PreviewCache(folder, "previews/", 0, thumbnails.preview_bytes)
    )
    renditions = ms.Renditions(index, [folder], thumbnails)
    scanner = ms.Scanner(index, [folder], renditions, ms.SharedProgress())
    yield Scanning(index, folder, thumbnails, renditions, scanner, path)
    scanner.stop()
    index.close()


@pytest.fixture
def decoding(scanning, pillow) -> Iterator[Scanning]:
    host = start_host(scanning.thumbnails)
    fill(scanning.path, {"a.png": png(30, 20), "b.png": png(20, 30)})
    assert scanning.scanner.scan()
    yield scanning
    stop_host(scanning.thumbnails, host)


def after(call: Callable[..., Any], then: Callable[[], object]) -> Callable[..., Any]:
    """A function that does something else, once, before it returns."""
    todo = [then]

    def both(*arguments: Any) -> Any:
        result = call(*arguments)
        while todo:
            todo.pop()()
        return result

    return both


def failing(call: Callable[..., Any], error: Exception, *when: Any) -> Callable[..., Any]:
    """A function that fails where its first argument is one of these; once where there is none."""
    left = [error]

    def fail(first: Any, *rest: Any, **more: Any) -> Any:
        if first in when or (not when and left):
            left.clear()
            raise error
        return call(first, *rest, **more)

    return fail


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("renamed", None), ("pipe", FileNotFoundError), ("link", OSError),
        ("folder", FileNotFoundError),
    ],
)  # fmt: skip
def test_no_file_gets_the_thumbnail_of_what_took_its_place(decoding, tmp_path, change, error):
    path = decoding.path
    if change == "renamed":
        (path / "b.png").rename(path / "a.png")
    else:
        (path / "a.png").rename(tmp_path / "outside.png")
        if change == "pipe":
            os.mkfifo(path / "a.png")
        elif change == "link":
            (path / "a.png").symlink_to(tmp_path / "outside.png")
        else:
            (path / "a.png").mkdir()
    if error:
        with pytest.raises(error):
            decoding.try_thumbnail("a.png")
    else:
        assert decoding.try_thumbnail("a.png") is ms.Outcome.FAILED
    assert decoding.states()["a.png"] is None
    assert not list(path.glob(".thumbnails/*.png"))


def test_what_is_written_while_it_is_decoded_gets_no_thumbnail(decoding, monkeypatch):
    file = decoding.path / "a.png"
    change = functools.partial(file.write_bytes, png(9, 9))
    decode = after(decoding.thumbnails._decode, change)
    monkeypatch.setattr(decoding.thumbnails, "_decode", decode)
    assert decoding.try_thumbnail("a.png") is ms.Outcome.FAILED
    assert decoding.states()["a.png"] is None
    assert decoding.scanner.scan()
    assert decoding.try_thumbnail("a.png") is ms.Outcome.MADE


def test_what_is_deleted_while_its_thumbnail_is_made_leaves_none(decoding, monkeypatch):
    files, thumbnails = decoding.index.files, decoding.thumbnails

    def delete() -> None:
        (digest, _) = decoding.index.write(lambda db: files.remove(db, "library", "a.png"))
        thumbnails.remove(digest)

    monkeypatch.setattr(thumbnails, "_may_try", after(thumbnails._may_try, delete))
    decoding.try_thumbnail("a.png")
    assert decoding.try_thumbnail("b.png") is ms.Outcome.MADE
    kept = [path.stem for path in (decoding.path / ".thumbnails").rglob("*.png")]
    assert kept == [files.get("library", "b.png")[0].sha256]


def test_only_a_decoders_own_verdict_is_remembered(decoding, monkeypatch):
    fill(decoding.path, {"broken.png": png()[:60]})
    assert decoding.scanner.scan()
    assert decoding.try_thumbnail("broken.png") is ms.Outcome.IMPOSSIBLE
    full = failing(ms.write_all, OSError(errno.ENOSPC, "full"))
    with monkeypatch.context() as patch:
        patch.setattr(ms, "write_all", full)
        with pytest.raises(OSError):
            decoding.try_thumbnail("a.png")
    with monkeypatch.context() as patch:  # killed, as by a kernel without memory
        patch.setattr(decoding.thumbnails, "_decode", lambda *_: None)
        assert decoding.try_thumbnail("b.png") is ms.Outcome.FAILED
    assert decoding.states() == {"a.png": None, "b.png": None, "broken.png": 0}
    assert not list((decoding.path / ".thumbnails").rglob("*.png"))
    decoding.thumbnails._crashes.clear()
    assert decoding.renditions.make_all()
    assert decoding.states() == {"a.png": 1, "b.png": 1, "broken.png": 0}


def test_a_picture_that_cannot_be_read_keeps_no_other_one_from_its_thumbnail(
    decoding, monkeypatch
):
    fill(decoding.path, {f"{size}.png": png(size, 9) for size in range(20, 26)})
    assert decoding.scanner.scan()
    unreadable = decoding.index.assets.without_thumbnail(["image"], 1, "")[0][0]
    ensure = failing(decoding.renditions.ensure_thumbnail, OSError(errno.EIO, "no"), unreadable)
    monkeypatch.setattr(decoding.renditions, "ensure_thumbnail", ensure)
    assert not decoding.renditions.make_all()
    missing = [name for name, thumbnail in decoding.states().items() if thumbnail is None]
    assert missing == [unreadable.path]


def test_a_picture_of_which_decoders_die_again_and_again_has_no_thumbnail(decoding, monkeypatch):
    monkeypatch.setattr(ms, "TRY_AGAIN_SECONDS", 0)
    monkeypatch.setattr(decoding.thumbnails, "_decode", lambda *_: None)
    outcomes = [decoding.try_thumbnail("a.png") for _ in range(ms.MAX_DECODER_CRASHES)]
    assert outcomes[-2:] == [ms.Outcome.FAILED, ms.Outcome.IMPOSSIBLE]
    assert decoding.states()["a.png"] == 0


def test_a_file_that_is_written_while_it_is_read_is_read_again(scanning, monkeypatch, capsys):
    content = png()
    fill(scanning.path, {"a.png": png(), "b.png": png()})
    change = functools.partial((scanning.path / "a.png").write_bytes, content)
    with monkeypatch.context() as patch:
        patch.setattr(ms, "HASH_THREADS", 1)
        patch.setattr(ms, "probe", after(ms.probe, change))
        assert not scanning.scanner.scan()
    assert (set(scanning.states()), scanning.unreadable) == ({"b.png"}, 1)
    said = capsys.readouterr().err
    assert f"cannot read in {scanning.path}: a.png\n" in said
    assert re.search(r"scanned 2 files in [\d.]+ s, 1 files or folders cannot be read\n", said)
    assert scanning.scanner.scan()
    assert scanning.unreadable == 0
    assert re.search(r"scanned 2 files in [\d.]+ s\n$", capsys.readouterr().err)
    assert scanning.index.files.get("library", "a.png")[0].sha256 == sha256(content)


@pytest.mark.parametrize(
    ("reader", "moment"), [("GET", "forgotten"), ("GET", "deleted"), ("scan", "deleted")]
)
def test_what_is_deleted_while_it_is_read_does_not_come_back(
    scanning, monkeypatch, reader, moment
):
    fill(scanning.path, {"a.png": png(), "b.png": png()})
    assert scanning.scanner.scan()
    found = scanning.index.files.get("library", "a.png")
    os.utime(scanning.path / "a.png", ns=(0, found[0].mtime_ns))  # a new ctime: it is read again
    files, deleting = scanning.index.files, contextlib.ExitStack()

    def delete() -> None:  # as far as it has come once the reader goes on
        deleting.enter_context(scanning.folder.removing(["a.png"]))
        scanning.index.write(lambda db: files.remove(db, "library", "a.png"))
        if moment == "deleted":
            deleting.close()

    with monkeypatch.context() as patch:
        patch.setattr(ms, "describe", after(ms.describe, delete))
        if reader == "GET":
            assert scanning.scanner.current(found) is None
        else:
            scanning.scanner.scan()
    deleting.close()
    assert set(scanning.states()) == {"b.png"}
    assert not (scanning.path / "a.png").exists()


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_read_keeps_its_entries_and_costs_no_others(
    scanning, monkeypatch, error, capsys
):
    fill(scanning.path, {"a.png": png(), "closed/b.png": png(), "z/c.png": png()})
    assert scanning.scanner.scan()
    (scanning.path / "z" / "c.png").unlink()
    fill(scanning.path, {"z/d.png": png()})
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing(os.open, OSError(error, "no"), "closed"))
        assert not scanning.scanner.scan()
    assert set(scanning.states()) == {"a.png", "closed/b.png", "z/d.png"}
    assert scanning.unreadable == 1
    assert f"cannot read in {scanning.path}: closed/\n" in capsys.readouterr().err
    assert scanning.scanner.scan()


def test_a_root_that_becomes_another_one_during_a_scan_loses_nothing(
    scanning, monkeypatch, tmp_path, capsys
):
    fill(scanning.path, {"a.png": png(), "b.png": png()})
    assert scanning.scanner.scan()
    fill(tmp_path / "other", {"c.png": png()})

    def swap() -> None:
        scanning.path.rename(tmp_path / "away")
        (tmp_path / "other").rename(scanning.path)

    with monkeypatch.context() as patch:
        patch.setattr(scanning.index.files, "in_order", after(scanning.index.files.in_order, swap))
        assert not scanning.scanner.scan()
    assert set(scanning.states()) == {"a.png", "b.png", "c.png"}
    assert f"{scanning.path} is another folder" in capsys.readouterr().err
    assert scanning.scanner.scan()
    assert set(scanning.states()) == {"c.png"}


def test_an_unfinished_scan_is_taken_up_again_by_itself(scanning, monkeypatch, capsys):
    fill(scanning.path, {f"{i}.png": png() for i in range(5)})
    monkeypatch.setattr(ms, "TRY_AGAIN_SECONDS", 0.02)
    monkeypatch.setattr(ms, "SCAN_BATCH", 2)
    locked = failing(scanning.index.write, sqlite3.OperationalError("database is locked"))
    monkeypatch.setattr(scanning.index, "write", locked)
    monkeypatch.setattr(scanning.scanner, "_renew_facts", lambda: None)  # which writes, too
    scanning.scanner.start(0)
    wait_until(lambda: len(scanning.states()) == 5)
    assert "2 files are not in the index yet" in capsys.readouterr().err


def forget_time(scanning: Any, asset: Any) -> None:
    """Have an older program's facts in the index."""
    wrong = asset._replace(facts=asset.facts._replace(created=None, created_source=None))
    change = functools.partial(scanning.index.assets.set_facts, asset=wrong)
    scanning.index.write(change, durable=False)
    scanning.index.set_meta("facts version", "1")


def test_what_another_version_has_read_of_files_is_read_again(scanning):
    dated, other = jpeg(date="2019:05:04 05:02:01"), png()
    fill(scanning.path, {"a.jpg": dated, "b.png": other})
    scanning.scanner.scan()
    files = scanning.index.files
    known = {name: files.get("library", name) for name in ("a.jpg", "b.png")}
    forget_time(scanning, known["a.jpg"][1])
    assert files.get("library", "a.jpg") != known["a.jpg"]
    lists = int(scanning.index.get_meta("library_version"))
    scanning.scanner.start(0)
    wait_until(lambda: scanning.index.get_meta("facts version") == ms.FACTS_VERSION)
    assert {name: files.get("library", name) for name in known} == known
    assert int(scanning.index.get_meta("library_version")) == lists + 1  # for the one alone


def test_a_file_that_could_not_be_read_again_is_read_by_the_scan_alone(scanning, monkeypatch):
    fill(scanning.path, {"a.jpg": jpeg(date="2019:05:04 05:02:01"), "b.png": png()})
    assert scanning.scanner.scan()
    known = scanning.index.files.get("library", "a.jpg")
    forget_time(scanning, known[1])
    asked, real = list[str](), ms.probe_again

    def probe_again(folder: Any, file: Any) -> Any:
        asked.append(file.path)
        if file.path == "a.jpg":
            raise OSError(errno.EIO, "Input/output error")
        return real(folder, file)

    monkeypatch.setattr(ms, "probe_again", probe_again)
    for _ in range(2):  # starts, of which the second has nothing to do
        scanning.scanner._renew_facts()
    assert asked == ["a.jpg", "b.png"]
    assert scanning.scanner.scan()
    assert scanning.index.files.get("library", "a.jpg") == known


@pytest.mark.parametrize("problem", ["away", "goes away", "one is gone"])
def test_files_are_not_taken_for_read_again_while_their_disk_is_away(
    scanning, monkeypatch, problem
):
    fill(scanning.path, {"a.png": png(), "b.png": png()})
    assert scanning.scanner.scan()
    scanning.index.set_meta("facts version", "1")
    aside, real = scanning.path.with_name("aside"), ms.probe_again

    def probe_again(folder: Any, file: Any) -> Any:
        if problem == "goes away" and not aside.exists():
            scanning.path.rename(aside)
            scanning.path.mkdir()
        return real(folder, file)

    monkeypatch.setattr(ms, "probe_again", probe_again)
    if problem == "away":
        scanning.path.rename(aside)
        scanning.path.mkdir()
    elif problem == "one is gone":
        (scanning.path / "a.png").unlink()
    scanning.scanner._renew_facts()
    noted = scanning.index.get_meta("facts version")
    assert noted == (ms.FACTS_VERSION if problem == "one is gone" else "1")


def test_a_folder_that_was_never_there_has_no_files_to_be_read_again(scanning):
    scanning.path.rmdir()
    scanning.scanner._renew_facts()
    assert scanning.index.get_meta("facts version") == ms.FACTS_VERSION


@pytest.mark.parametrize("look", [ms.Folder.is_there, lambda folder: not folder.is_missing()])
def test_a_root_is_there_where_another_process_stores_its_first_file_meanwhile(tmp_path, look):
    def is_new() -> bool:
        fill(tmp_path, {"a.png": png()})  # it has come, and is in the index
        return False

    buffers = ms.WriteBuffers()
    assert look(ms.Folder("library", tmp_path, make=False, buffers=buffers, is_new=is_new))


def test_a_folder_that_is_away_is_named_where_files_were_in_it(scanning, capsys):
    scanning.path.rmdir()
    assert scanning.scanner.scan()  # it was never there
    assert "is its disk mounted?" not in capsys.readouterr().err
    fill(scanning.path, {"a.png": png()})
    assert scanning.scanner.scan()
    shutil.rmtree(scanning.path)
    assert not scanning.scanner.scan()
    assert f"nothing is in {scanning.path}: is its disk mounted?" in capsys.readouterr().err
    assert set(scanning.states()) == {"a.png"}


def test_every_worker_knows_what_was_mounted_below_and_is_away(scanning, monkeypatch):
    other = ms.Mounts(scanning.index, scanning.scanner.progress)
    assert other.absent(scanning.folder) == []
    fill(scanning.path, {"a.png": png(), "usb/b.png": png()})
    with monkeypatch.context() as patch:
        patch.setattr(ms, "mounts_below", lambda path: frozenset({("usb", "1")}))
        assert scanning.scanner.scan()
        assert other.absent(scanning.folder) == []
    shutil.rmtree(scanning.path / "usb")
    assert other.absent(scanning.folder) == ["usb"]
    scanning.scanner.scan()
    assert set(scanning.states()) == {"a.png", "usb/b.png"}


def test_a_scan_reads_what_is_new_or_changed_and_nothing_else(scanning, monkeypatch):
    read, real = list[str](), ms.describe

    def describe(folder: Any, path: str, now: float) -> Any:
        read.append(path)
        return real(folder, path, now)

    monkeypatch.setattr(ms, "describe", describe)
    fill(scanning.path, {"a.png": png(), "b/c.png": png(), "d.png": png()})
    assert scanning.scanner.scan()
    assert sorted(read) == ["a.png", "b/c.png", "d.png"]
    read.clear()
    fill(scanning.path, {"b/c.png": png(9, 9), "e.png": png()})
    assert scanning.scanner.scan()
    assert sorted(read) == ["b/c.png", "e.png"]


def test_a_value_that_the_index_cannot_hold_costs_one_file(scanning, monkeypatch):
    fill(scanning.path, {"a.png": png(), "b.png": png(), "c.png": png()})
    real = scanning.index.files.put

    def put(db: Any, file: Any, asset: Any) -> Any:
        return real(db, file._replace(size=1 << 70) if file.path == "b.png" else file, asset)

    monkeypatch.setattr(scanning.index.files, "put", put)
    assert not scanning.scanner.scan()
    assert (set(scanning.states()), scanning.unreadable) == ({"a.png", "c.png"}, 1)


def test_threads_are_at_most_a_batch_in_front_of_what_is_asked_for(monkeypatch):
    monkeypatch.setattr(ms, "SCAN_BATCH", 3)
    taken = list[int]()
    squares = ms.in_threads(lambda n: n * n, (taken.append(n) or n for n in range(10)), 2)
    assert next(squares) == 0
    assert taken == [0, 1, 2, 3]
    assert list(squares) == [n * n for n in range(1, 10)]


@pytest.mark.parametrize(("pause", "waits"), [
    (float("inf"), [float("inf"), 5, 10, float("inf"), 5, 10]),
    (7, [7, 5, 7, 7, 5, 7]),
])  # fmt: skip
def test_work_that_was_not_whole_is_tried_again_later_each_time(capsys, pause, waits):
    results = [False, ValueError("broken"), True, False, False]
    waited: list[float] = []

    def work() -> bool:
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if not results:
            results.append(True)

    ms.repeat("the work", work, wait, lambda: len(waited) == 6, pause=pause)
    assert waited == waits
    assert capsys.readouterr().err == "mediaserver: the work stopped: ValueError: broken\n"


def test_a_backoff_ends_at_an_hour():
    waited: list[float] = []
    ms.repeat("the work", lambda: False, waited.append, lambda: len(waited) == 13)
    assert waited[-3:] == [2560, 3600, 3600]


@pytest.mark.parametrize(("decoders", "thumbnail"), [("those of today", 0), ("others", None)])
def test_failed_thumbnails_are_tried_again_once_there_are_other_decoders(
    settings_of, tmp_path, decoders, thumbnail
):
    settings = settings_of(f"--storage_dir={tmp_path}")
    ms.make_folders(settings)
    with ms.opened_app(settings) as app:
        today, index = app.thumbnails.description, app.index
        asset = ms.Asset("a" * 64, 1, ms.Facts("image", "image/png", "png"))
        file = ms.File("library", "a.png", asset.sha256, 1, 2, 3.0, 4.0)
        index.write(functools.partial(index.files.put, file=file, asset=asset))
        index.assets.set_thumbnail(asset.sha256, made=False)
        index.set_meta("decoders", today if decoders == "those of today" else decoders)
        ms.recover_files(app)
        assert index.files.get("library", "a.png")[1].thumbnail == thumbnail
        assert index.get_meta("decoders") == today


def test_what_is_known_to_have_no_thumbnail_is_not_tried_and_what_changed_is_later(decoding):
    file, asset = decoding.index.files.get("library", "a.png")
    decoding.index.assets.set_thumbnail(asset.sha256, made=False)
    assert decoding.try_thumbnail("a.png") is ms.Outcome.IMPOSSIBLE
    assert decoding.renditions.ensure_thumbnail(file, asset) is ms.Outcome.MADE
    fill(decoding.path, {"b.png": png(9, 9)})
    assert decoding.try_thumbnail("b.png") is ms.Outcome.FAILED
    assert decoding.states() == {"a.png": 1, "b.png": None}


def test_there_are_no_thumbnails_of_audio(scanning):
    facts = ms.Facts("audio", "audio/mpeg", "mp3")
    asset = ms.Asset("ab" * 32, 1, facts)
    file = ms.File("library", "a.mp3", asset.sha256, 1, 2, 3.0, 4.0)
    assert scanning.renditions.ensure_thumbnail(file, asset) is ms.Outcome.IMPOSSIBLE


def test_thumbnails_that_an_unreadable_disk_delays_are_made_once_it_is_read(decoding, monkeypatch):
    def refuse(*_: Any) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(decoding.folder, "open", refuse)
        assert not decoding.renditions.make_all()
    assert decoding.states() == {"a.png": None, "b.png": None}
    assert decoding.renditions.make_all()
    assert decoding.states() == {"a.png": 1, "b.png": 1}


@pytest.mark.parametrize("gone", ["a.png", ""])
def test_a_picture_that_is_gone_is_the_next_scans_affair_unless_all_are_gone(decoding, gone):
    lost = decoding.path / gone
    lost.rename(lost.with_name("away"))
    assert decoding.renditions.make_all() == bool(gone)
    assert decoding.states() == {"a.png": None, "b.png": 1 if gone else None}


def test_who_looks_at_the_storage_folder_waits_for_the_look_but_no_longer_than_it_may_take(
    scanning, monkeypatch
):
    watcher, go, begun = ms.Watcher(scanning.folder, [], scanning.scanner), threading.Event(), []

    def is_missing() -> bool:
        begun.append(go.wait(DEADLINE))
        return True

    monkeypatch.setattr(scanning.folder, "is_missing", is_missing)
    monkeypatch.setattr(ms, "LOOK_SECONDS", 0.05)
    assert watcher.look() == ms.FolderStatus(hangs=True)
    monkeypatch.setattr(ms, "LOOK_SECONDS", DEADLINE)
    threading.Timer(0.05, go.set).start()
    assert watcher.look() == ms.FolderStatus(missing=True)
    assert begun == [True], "both have had the same look"


def test_a_look_for_which_no_thread_is_to_be_had_is_taken_the_next_time(scanning, monkeypatch):
    watcher = ms.Watcher(scanning.folder, [], scanning.scanner)
    monkeypatch.setattr(ms, "LOOK_SECONDS", DEADLINE)
    monkeypatch.setattr(scanning.folder, "is_missing", lambda: True)
    with monkeypatch.context() as patch:
        none = RuntimeError("can't start new thread")
        patch.setattr(threading.Thread, "start", failing(threading.Thread.start, none))
        assert watcher.look() == ms.FolderStatus()
    assert watcher.look() == ms.FolderStatus(missing=True)


def test_a_scan_that_failed_is_not_running_any_more(scanning, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(scanning.scanner, "_scan_folder", lambda _: 1 / 0)
        scanning.scanner.scan()
    assert not scanning.scanner.progress.get().running
    assert scanning.scanner.scan()


def test_a_scan_waits_as_long_as_it_is_told_or_until_it_is_wanted(scanning):
    begun = time.monotonic()
    scanning.scanner._wait(0.1)
    assert 0.1 <= time.monotonic() - begun < DEADLINE
    scanning.scanner.request()
    scanning.scanner._wait(float("inf"))
    assert not scanning.scanner._wanted.is_set(), "what is wanted once is done once"


def test_thumbnails_that_are_wanted_once_are_made_once(scanning):
    scanning.renditions.wanted.set()
    scanning.renditions._wait(float("inf"))
    assert not scanning.renditions.wanted.is_set()


@pytest.mark.parametrize("away", ["folder", "disk below"])
def test_a_scan_waits_no_longer_when_a_disk_is_back(scanning, monkeypatch, away):
    scanner, looks = scanning.scanner, iter([True, True, False])
    monkeypatch.setattr(ms, "AWAY_SECONDS", 0.01)
    if away == "folder":
        monkeypatch.setattr(scanning.folder, "is_missing", lambda: next(looks))
    else:
        monkeypatch.setattr(scanner.mounts, "absent", lambda _: ["usb"] * next(looks))
    begun = time.monotonic()
    scanner._wait(DEADLINE)
    assert time.monotonic() < begun + DEADLINE / 2


@pytest.mark.parametrize(
    ("quiet", "begun", "pauses"),
    [(0.25, [], [0.25]), (0.25, [0.125], [0.25, 0.125]), (9, [], [2]), (0, [], [])],
)
def test_thumbnails_are_made_ahead_when_no_more_uploads_come(monkeypatch, quiet, begun, pauses):
    """Uploads begin at 100 s, and when so many more have passed."""
    now, slept = [100.0], list[float]()
    thumbnails = ms.Thumbnails()
    renditions, other_worker = (ms.Renditions(None, [], thumbnails) for _ in range(2))

    def sleep(pause: float) -> None:
        slept.append(pause)
        for at in begun[: len(slept)]:
            thumbnails.upload_at[0] = 100 + at
        now[0] += pause

    clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    monkeypatch.setattr(ms, "time", clock)
    monkeypatch.setattr(ms, "QUIET_SECONDS", quiet)
    other_worker.note_upload()
    renditions._let_uploads_pass()
    assert slept == pauses


def test_what_is_to_be_made_ahead_is_looked_for_when_no_more_uploads_come(monkeypatch):
    renditions, waited = ms.Renditions(None, [], ms.Thumbnails()), list[bool]()
    monkeypatch.setattr(
        renditions, "_let_uploads_pass", lambda: waited.append(renditions.wanted.is_set())
    )
    renditions.wanted.set()
    renditions._wait(ms.math.inf)
    assert waited == [True]


@pytest.mark.parametrize(
    "path", ["/upload", "/image/a.png", "/upload-image", "/entity/", "/files"]
)
def test_thumbnails_made_ahead_wait_for_uploads_of_every_family(settings_of, tmp_path, path):
    """From their head on, resumable ones too."""
    settings = settings_of(f"--storage_dir={tmp_path}", "--auth_disabled=true")
    ms.make_folders(settings)
    fields = {"Content-Type": form("a.png", png())[1]}
    if path == "/files":
        fields = {**TUS_CONTENT, "Upload-Length": "9", **about("media")}
    lines = [f"{name}: {value}" for name, value in fields.items()]
    head = post(path, 9, *lines).removesuffix(b"\r\n\r\n")
    head = head.replace(b"POST", b"PUT", 1) if "/image/" in path else head
    with ms.opened_app(settings) as app:
        assert not app.thumbnails.upload_at[0]
        begun = ms.Dispatcher(app, ms.ROUTES)(ms.parse_request_head(head), "127.0.0.1")
        assert isinstance(begun, ms.Exchange)
        begun.abandon()
        assert app.thumbnails.upload_at[0]


# ======================================================================================
# 9. HTTP messages
# ======================================================================================


def every_split(data: bytes) -> Iterator[list[bytes]]:
    """Whole, in two pieces at each point, and byte by byte."""
    yield [data]
    for point in range(1, len(data)):
        yield [data[:point], data[point:]]
    yield [data[i : i + 1] for i in range(len(data))]


def random_pieces(rng: random.Random, data: bytes) -> list[bytes]:
    points = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(12)))
    return [data[a:b] for a, b in zip([0, *points], [*points, len(data)], strict=True)]


def status_of(call: Callable[..., object], *arguments: object) -> int:
    with pytest.raises(ms.HTTPError) as caught:
        call(*arguments)
    assert caught.value.detail.endswith(".")
    return caught.value.status


def headers(**fields: str) -> ms.Headers:
    return {name.replace("_", "-"): value for name, value in fields.items()}


# -- Heads


def test_fields_are_found_by_lower_case_name_and_joined_in_order() -> None:
    fields = ms.parse_fields(b"Accept:a\r\nX-Empty:\r\nACCEPT: \t b \t\r\nName: caf\xc3\xa9")
    assert fields == {"accept": "a, b", "x-empty": "", "name": "caf\xc3\xa9"}
    assert list(fields) == ["accept", "x-empty", "name"]
    assert ms.parse_fields(b"") == {}


@pytest.mark.parametrize(
    "block",
    [
        b"Name : value",  # space before the colon
        b"Name\t: value", b" Name: value", b"A: b\r\n folded",  # obs-fold
        b"A: b\r\n\tfolded", b"A: b\nB: c",  # bare LF
        b"A: b\rB: c",  # bare CR
        b"A: b\r\r\nB: c", b"A: b\r\n\r\nB: c", b"A: b\r\n", b"\r\nA: b", b"A: b\0", b"A: b\x0b",
        b"A: \x7f", b"A\0: b", b"A(b): c", b"A\xc3\xa9: b", b": value", b"no colon",
    ],
)  # fmt: skip
def test_a_malformed_field_is_400(block: bytes) -> None:
    assert status_of(ms.parse_fields, block) == 400
    assert status_of(ms.parse_fields, b"Ok: yes\r\n" + block) == 400


def test_a_hundred_fields_are_taken_and_one_more_is_431() -> None:
    assert ms.parse_fields(b"\r\n".join([b"A: b"] * 100)) == {"a": ", ".join("b" * 100)}
    assert status_of(ms.parse_fields, b"\r\n".join([b"A: b"] * 101)) == 431


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"GET /a/b%20c?x=1&y=?z HTTP/1.1", ("GET", "/a/b%20c", "x=1&y=?z", (1, 1), "h:1")),
        (b"GET / HTTP/1.0", ("GET", "/", "", (1, 0), "h:1")),
        (b"GET //evil/ HTTP/1.1", ("GET", "//evil/", "", (1, 1), "h:1")),
        (b"GET /? HTTP/1.7", ("GET", "/", "", (1, 1), "h:1")),
        (b"get /a|b{c} HTTP/1.1", ("get", "/a|b{c}", "", (1, 1), "h:1")),
        (b"OPTIONS * HTTP/1.1", ("OPTIONS", "*", "", (1, 1), "h:1")),
        (b"GET http://Other:80/a?b HTTP/1.1", ("GET", "/a", "b", (1, 1), "Other:80")),
        (b"GET HTTPS://[::1]:80?b HTTP/1.1", ("GET", "/", "b", (1, 1), "[::1]:80")),
        (b"GET http://other HTTP/1.1", ("GET", "/", "", (1, 1), "other")),
    ],
)
def test_a_request_line_is_read(line: bytes, expected: tuple[object, ...]) -> None:
    head = ms.parse_request_head(line + b"\r\nHost: h:1")
    assert (head.method, head.path, head.query, head.version, head.host) == expected
    assert head.target.encode() == line.split(b" ")[1]


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET / HTTP/2.0", 505), (b"PRI * HTTP/2.0", 505), (b"GET / HTTP/0.9", 505),
        (b"GET /", 400), (b"", 400), (b"GET  / HTTP/1.1", 400), (b"GET /  HTTP/1.1", 400),
        (b"GET / HTTP/1.1 ", 400), (b" GET / HTTP/1.1", 400), (b"GET\t/ HTTP/1.1", 400),
        (b"GET / HTTP/1.10", 400), (b"GET / http/1.1", 400), (b"GET / HTTP/1.\xb2", 400),
        (b"G(T / HTTP/1.1", 400), (b"GET /a b HTTP/1.1", 400), (b"GET /a#b HTTP/1.1", 400),
        (b"GET /\xc3\xa9 HTTP/1.1", 400), (b"GET /\0 HTTP/1.1", 400), (b"GET /\x7f HTTP/1.1", 400),
        (b"GET / HTTP/1.1\n", 400), (b"GET /\rX: y HTTP/1.1", 400), (b"GET path HTTP/1.1", 400),
        (b"GET * HTTP/1.1", 400), (b"GET ftp://h/ HTTP/1.1", 400),
        (b"GET http:///a HTTP/1.1", 400), (b"GET http://user@h/ HTTP/1.1", 400),
        (b"CONNECT h:443 HTTP/1.1", 400), (b"CONNECT / HTTP/1.1", 400),
        (b"\x16\x03\x01\x02\x00", 400), (b"GET /" + b"a" * ms.MAX_HEAD_BYTES + b" HTTP/1.1", 414),
    ],
)  # fmt: skip
def test_a_bad_request_line_is_refused(line: bytes, status: int) -> None:
    assert status_of(ms.parse_request_head, line + b"\r\nHost: h") == status


@pytest.mark.parametrize(
    ("block", "version", "expected"),
    [
        # expected: keep_alive, content_length, chunked, expects_continue
        (b"Host: h", b"1", (True, None, False, False)),
        (b"Host: h", b"0", (False, None, False, False)),
        (b"Connection: Keep-Alive", b"0", (True, None, False, False)),
        (b"Connection: keep-alive, close", b"0", (False, None, False, False)),
        (b"Host: h\r\nConnection: x\r\nconnection: CLOSE", b"1", (False, None, False, False)),
        (b"Host: h\r\nContent-Length: 0", b"1", (True, 0, False, False)),
        (b"Host: h\r\nContent-Length: 007", b"1", (True, 7, False, False)),
        (b"Host: h\r\nContent-Length: 5, 5", b"1", (True, 5, False, False)),
        (b"Host: h\r\nContent-Length: 5\r\nContent-Length: 5", b"1", (True, 5, False, False)),
        (b"Host: h\r\nContent-Length: 9223372036854775807", b"1", (True, 2**63 - 1, False, False)),
        (b"Host: h\r\nTransfer-Encoding: \tChunked ", b"1", (True, None, True, False)),
        (b"Host: h\r\nExpect: 100-Continue", b"1", (True, None, False, True)),
        (b"Expect: 100-continue", b"0", (False, None, False, False)),
    ],
)
def test_the_fields_say_how_body_and_connection_go_on(
    block: bytes, version: bytes, expected: tuple[object, ...]
) -> None:
    for _ in range(2):  # the second time from memory
        head = ms.parse_request_head(b"PUT / HTTP/1." + version + b"\r\n" + block)
        found = (head.keep_alive, head.content_length, head.chunked, head.expects_continue)
        assert found == expected


@pytest.mark.parametrize(
    ("block", "status"),
    [
        (b"Content-Length: 5\r\nTransfer-Encoding: chunked", 400),  # CL.TE
        (b"Transfer-Encoding: chunked\r\nContent-Length: 5", 400),  # TE.CL
        (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", 400),
        (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", 400),
        (b"Transfer-Encoding: chunked, gzip", 400), (b"Transfer-Encoding: chunked,", 400),
        (b"Transfer-Encoding: , chunked", 400), (b"Transfer-Encoding:", 400),
        (b"Transfer-Encoding: xchunked", 501), (b"Transfer-Encoding: chunked;q=1", 501),
        (b"Transfer-Encoding: 'chunked'", 501), (b"Transfer-Encoding: identity", 501),
        (b"Transfer-Encoding: gzip, chunked", 501), (b"Transfer-Encoding: \x0bchunked", 400),
        (b"Transfer-Encoding : chunked", 400), (b"Transfer-Encoding\t: chunked", 400),
        (b"Transfer-Encoding:\r\n chunked", 400), (b" Transfer-Encoding: chunked", 400),
        (b"X: y\nTransfer-Encoding: chunked", 400), (b"X: y\rTransfer-Encoding: chunked", 400),
        (b"Transfer-Encoding: chunked\0", 400), (b"Content-Length: 5\r\nContent-Length: 6", 400),
        (b"Content-Length: 5, 05", 400), (b"Content-Length: 5,", 400),
        (b"Content-Length: +5", 400), (b"Content-Length: -1", 400), (b"Content-Length: 5 5", 400),
        (b"Content-Length: 0x5", 400), (b"Content-Length: 5_0", 400),
        (b"Content-Length: 5.0", 400), (b"Content-Length: \xb2", 400), (b"Content-Length:", 400),
        (b"Content-Length: 9223372036854775808", 400), (b"Content-Length: " + b"9" * 60_000, 400),
        (b"Host: h", 400),  # a second one
        (b"Expect: 200-ok", 417), (b"X: " + b"y" * ms.MAX_HEAD_BYTES, 431),
    ],
)  # fmt: skip
def test_a_head_that_could_smuggle_is_refused(block: bytes, status: int) -> None:
    head = b"POST / HTTP/1.1\r\nHost: h\r\n" + block
    assert status_of(ms.parse_request_head, head) == status


@pytest.mark.parametrize(
    "block",
    [b"X: y", b"Host:", b"Host: a b", b"Host: a/b", b"Host: u@h", b"Host: a, b", b"Host: a:b",
     b"Host: h:123456", b"Host: [::1", b"Host: h\xe9", b"Host: %zz", b"Host: a\r\nHost: a"],
)  # fmt: skip
def test_http_1_1_needs_one_valid_host(block: bytes) -> None:
    assert status_of(ms.parse_request_head, b"GET http://a/ HTTP/1.1\r\n" + block) == 400


@pytest.mark.parametrize(
    ("fields", "version", "plain"),
    [
        (b"Host: h", b"1", True), (b"Host: h", b"0", False), (b"Host: h\r\nX: y", b"1", True),
        *((b"Host: h\r\n" + field + b": x", b"1", False) for field in (
            b"Range", b"If-None-Match", b"If-Range", b"Origin")),
    ],
)  # fmt: skip
def test_a_plain_request_asks_for_the_whole_thing_on_a_connection_that_goes_on(
    fields: bytes, version: bytes, plain: bool
) -> None:
    head = ms.parse_request_head(b"GET / HTTP/1." + version + b"\r\n" + fields)
    assert head.is_plain == plain


def test_transfer_encoding_in_http_1_0_is_400() -> None:
    head = b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked"
    assert status_of(ms.parse_request_head, head) == 400


# -- Chunked bodies

CHUNKED = b'4\r\nWiki\r\n5;a="b"\r\npedia\r\n00E ; x\r\n in\r\n\r\nchunks.\r\n'
CHUNKED_END = b"0\r\nExpires: never\r\nX:\r\n\r\n"


def decode(pieces: list[bytes]) -> tuple[bytes, bytes, bool]:
    decoder = ms.ChunkedDecoder()
    content = b"".join(bytes(data) for piece in pieces for data in decoder.feed(piece))
    return content, decoder.rest, decoder.finished


@pytest.mark.parametrize("end", [b"0\r\n\r\n", b"000;x\r\n\r\n", CHUNKED_END])
def test_a_chunked_body_is_decoded_however_it_is_split(end: bytes) -> None:
    for pieces in every_split(CHUNKED + end + b"GET /\n\r\n\r\n"):
        assert decode(pieces) == (b"Wikipedia in\r\n\r\nchunks.", b"GET /\n\r\n\r\n", True)
    for length in range(len(CHUNKED + end)):
        assert not decode([(CHUNKED + end)[:length]])[2]


@pytest.mark.parametrize("size", [b"9", b"0A", b"f", b"10", b"aB", b"00FFf"])
def test_the_size_of_a_chunk_is_hexadecimal(size: bytes) -> None:
    content = bytes(int(size, 16))
    assert decode([size + b"\r\n" + content + b"\r\n0\r\n\r\n"]) == (content, b"", True)


def test_chunk_content_is_not_copied() -> None:
    buffer = memoryview(bytearray(b"5\r\nhello\r\n"))
    (data,) = ms.ChunkedDecoder().feed(buffer)
    buffer[3] = ord("j")
    assert bytes(data) == b"jello"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"5\nhello\r\n0\r\n\r\n", 400),  # bare LF
        (b"5\r\nhello\n0\r\n\r\n", 400), (b"5\r\nhelloXX0\r\n\r\n", 400),
        (b"5\r\nhello0\r\n\r\n", 400), (b"5\r\rhello", 400), (b"0x5\r\nhello", 400),
        (b"+5\r\nhello", 400), (b"-5\r\nhello", 400), (b"5_0\r\nhello", 400),
        (b" 5\r\nhello", 400), (b"5 \r\nhello", 400), (b"\r\n", 400), (b";a\r\n", 400),
        (b"g\r\n", 400), (b"\xef\xbc\x95\r\n", 400), (b"5;a\0\r\nhello", 400),
        (b"5;a\nb\r\nhello", 400), (b"0" * 17 + b"\r\n", 400),
        (b"5;" + b"a" * ms.MAX_CHUNK_LINE_BYTES + b"\r\nhello", 400),
        ((b"1;" + b"a" * 200 + b"\r\nx\r\n") * 100, 400), (b"0\r\n\n", 400),
        (b"0\r\nA: b\n\r\n\r\n", 400), (b"0\r\nA : b\r\n\r\n", 400),
        (b"0\r\n folded\r\n\r\n", 400),
        (b"0\r\nA: " + b"b" * ms.MAX_TRAILER_BYTES + b"\r\n\r\n", 431),
        (b"0\r\n" + b"A:\r\n" * 101 + b"\r\n", 431),
    ],
)  # fmt: skip
def test_a_malformed_chunked_body_is_refused(body: bytes, status: int) -> None:
    assert status_of(decode, [body]) == status
    assert status_of(decode, [body[i : i + 1] for i in range(len(body))]) == status


@pytest.mark.parametrize("size", range(-2, 3))
@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize(
    ("before", "room", "after", "status"),
    [
        (b"1;", ms.MAX_CHUNK_LINE_BYTES - 6, b"\r\nx\r\n0\r\n\r\n", 400),
        (b"0\r\nA:", ms.MAX_TRAILER_BYTES - 8, b"\r\n\r\n", 431),
    ],
    ids=["line", "trailer"],
)
def test_the_limits_of_a_chunked_body_do_not_depend_on_its_pieces(
    size: int, before: bytes, room: int, after: bytes, status: int, is_whole: bool
) -> None:
    body = before + b"a" * (room + size) + after
    pieces = [body] if is_whole else [body[i : i + 1] for i in range(len(body))]
    if size <= 0:
        assert decode(pieces)[2]
    else:
        assert status_of(decode, pieces) == status


# -- Multipart bodies

Parts = list[tuple[str, "str | None", bytes]]


def parse_form(boundary: bytes, pieces: list[bytes]) -> Parts:
    parser = ms.MultipartParser(boundary)
    parts: Parts = []
    for piece in pieces:
        for event in parser.feed(memoryview(piece)):
            if isinstance(event, ms.Part):
                parts.append((event.name, event.filename, b""))
            else:
                assert len(event) > 0
                parts[-1] = (*parts[-1][:2], parts[-1][2] + event)
    parser.finish()
    return parts


DISPOSITION = b'Content-Disposition: form-data; name="a"'
LOOKALIKES = (
    b"\r\n--AaB03\r\n--AaB03xy\r\n--AaB03x-\r\n--AaB03x \r\r"
    b"\r\n-\r--AaB03x--\n--AaB03x\r\r\n--AaB0"
)
FORM = (
    b'--AaB03x\r\ncontent-disposition: form-data; name="field1"\r\n\r\nJoe\r\n'
    b"--AaB03x \t\r\n"
    b'Content-Disposition: form-data; name="pics"; filename="file1.gif"\r\n'
    b"Content-Type: image/gif\r\nContent-Transfer-Encoding: BINARY\r\n\r\n" + LOOKALIKES + b"\r\n"
    b"--AaB03x\r\n" + DISPOSITION + b"\r\n\r\n\r\n"
    b"--AaB03x--"
)
FORM_PARTS: Parts = [
    ("field1", None, b"Joe"),
    ("pics", "file1.gif", LOOKALIKES),
    ("a", None, b""),
]


@pytest.mark.parametrize("before", [b"", b"\r\n", b"This is\r\n--AaB03 a preamble.\r\n"])
@pytest.mark.parametrize("after", [b"", b"\r\n", b" \r\nEpilogue\r\n--AaB03x\r\n"])
def test_a_form_is_parsed_however_it_is_split(before: bytes, after: bytes) -> None:
    for pieces in every_split(before + FORM + after):
        assert parse_form(b"AaB03x", pieces) == FORM_PARTS


def test_random_forms_come_back_as_they_were() -> None:
    rng = random.Random(2046)
    for _ in range(300):
        boundary = bytes(rng.choices(b"ab-'", k=rng.randrange(1, 9))) + b"x"
        words = [b"\r", b"\n", b"-", b"--", b"\r\n--", b"\r\n--" + boundary[:-1], boundary, b"q"]
        parts: Parts = []
        body = b""
        for number in range(rng.randrange(4)):
            content = b"".join(rng.choices(words, k=rng.randrange(30)))
            while re.search(rb"\r\n--%s(--|[ \t]*\r\n)" % re.escape(boundary), content + b"\r\n"):
                content = content.replace(boundary, b"", 1)
            parts.append((f"n{number}", None, content))
            body += b"--%s\r\nContent-Disposition: form-data; name=n%d\r\n\r\n%s\r\n" % (
                boundary, number, content,
            )  # fmt: skip
        body += b"--" + boundary + b"--\r\n"
        for _ in range(5):
            assert parse_form(boundary, random_pieces(rng, body)) == parts


@pytest.mark.parametrize("behind", [0, 3, 4])
@pytest.mark.parametrize("length", [ms.MAX_PART_HEADER_BYTES, ms.MAX_PART_HEADER_BYTES + 1])
def test_the_headers_of_a_part_have_a_bound_however_they_come(length: int, behind: int) -> None:
    body = b"--b\r\n" + (DISPOSITION + b"\r\nX: ").ljust(length, b"y") + b"\r\n\r\nx"
    cut = 5 + length + behind

    def kinds_of(pieces: list[bytes], feed: Any) -> list[type]:
        return [type(event) for piece in pieces for event in feed(piece)]

    pieces, feed = [body[:cut], body[cut:]], ms.MultipartParser(b"b").feed
    if length == ms.MAX_PART_HEADER_BYTES:
        assert kinds_of(pieces, feed) == [ms.Part, memoryview]
    else:
        assert status_of(kinds_of, pieces, feed) == 413


def test_only_what_may_begin_a_delimiter_is_held_back() -> None:
    parser = ms.MultipartParser(b"b")
    parser.feed(b"--b\r\n" + DISPOSITION + b"\r\n\r\n")
    for piece, passed in [(b"x\r\n-", [b"x"]), (b"-a\r", [b"\r\n--a"]), (b"\r\n--", [b"\r"])]:
        assert [bytes(event) for event in parser.feed(piece)] == passed


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"--b", 400),
        (b"--b\r\n" + DISPOSITION + b"\r\n\r\nx\r\n--b", 400),
        (b"--b\r\n" + DISPOSITION + b"\r\n\r\nx\r\n--c--", 400),
        (b"--b\r\n" + DISPOSITION + b"\r\n--b--\r\n\r\n", 400),
        (b"--b\r\n\r\nno headers\r\n\r\n--b--", 400),
        (b"--b\r\nContent-Type: a/b\r\n\r\nx\r\n--b--", 400),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--", 400),
        (b"--b\r\n" + DISPOSITION + b"\r\n" + DISPOSITION + b"\r\n\r\nx\r\n--b--", 400),
        (
            b"--b\r\n" + DISPOSITION + b"\r\nContent-Transfer-Encoding: base64\r\n\r\nx\r\n--b--",
            400,
        ),
        (b"--b\r\n" + DISPOSITION + b"\nX: y\r\n\r\nx\r\n--b--", 400),
        (b"x" * (ms.MAX_PREAMBLE_BYTES + 1) + b"\r\n--b--", 400),
        (b"--b\r\n" + DISPOSITION + b"\r\nX: " + b"y" * 16384 + b"\r\n\r\nx\r\n--b--", 413),
        (b"--b\r\n" + DISPOSITION + b"\r\nX: " + b"y" * 17000, 413),
        ((b"--b\r\n" + DISPOSITION + b"\r\n\r\n\r\n") * 1001 + b"--b--", 413),
        (b"--b\r\n" + DISPOSITION + b"\r\n" + b"X: y\r\n" * 100 + b"\r\n\r\n--b--", 431),
    ],
)
def test_a_malformed_form_is_refused(body: bytes, status: int) -> None:
    assert status_of(parse_form, b"b", [body]) == status


def test_a_thousand_parts_and_16_kib_of_headers_are_taken() -> None:
    padding = b"\r\nX: " + b"y" * (16 * 1024 - len(DISPOSITION) - 5)
    body = b"--b\r\n" + DISPOSITION + padding + b"\r\n\r\n\r\n"
    body += (b"--b\r\n" + DISPOSITION + b"\r\n\r\n\r\n") * 999 + b"--b--"
    assert len(parse_form(b"b", [body])) == 1000


@pytest.mark.parametrize("boundary", [b"", b"a" * 71, b"a ", b"a\r\nb", b'a"', b"\xff", b"a\x7f"])
def test_a_boundary_that_is_no_printable_text_is_400(boundary: bytes) -> None:
    assert status_of(ms.MultipartParser, boundary) == 400


@pytest.mark.parametrize("boundary", [b"*****", b"a&b", b"a;b", b"{[<a>]}", b"a b", b"#" * 70])
def test_a_boundary_may_have_any_printable_character_but_a_quote(boundary: bytes) -> None:
    body = b"--" + boundary + b"\r\n" + DISPOSITION + b"\r\n\r\nx\r\n--" + boundary + b"--"
    assert parse_form(boundary, [body]) == parse_form(b"b", [body.replace(boundary, b"b")])
    value = f'multipart/form-data; boundary="{boundary.decode()}"'
    assert ms.parse_content_type(value)[1] == {"boundary": boundary.decode()}


# -- Values


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", ("", {})),
        ("Image/JPEG", ("image/jpeg", {})),
        ('text/plain;Charset="UTF\\"8" ; ;a=b;', ("text/plain", {"charset": 'UTF"8', "a": "b"})),
        ('multipart/form-data; boundary="a;b c"', ("multipart/form-data", {"boundary": "a;b c"})),
        ("multipart/form-data;boundary=a=b/c", ("multipart/form-data", {"boundary": "a=b/c"})),
    ],
)
def test_a_content_type_is_parsed(value: str, expected: object) -> None:
    assert ms.parse_content_type(value) == expected


@pytest.mark.parametrize("value", ['a/b; c="d', "a/b; =c", 'a/b; c=d"e'])
def test_malformed_parameters_are_400(value: str) -> None:
    assert status_of(ms.parse_content_type, value) == 400
    assert status_of(ms.parse_content_disposition, value) == 400


def test_a_parameter_that_comes_twice_is_400_in_a_content_type() -> None:
    assert status_of(ms.parse_content_type, "a/b; c=1; C=2") == 400


@pytest.mark.parametrize(
    ("parameter", "filename"),
    [
        (b'filename="a.jpg"', "a.jpg"),
        (b"filename=a.jpg", "a.jpg"),
        (b"filename=my photo.jpg ", "my photo.jpg"),
        (b'filename=""', ""),
        (b'filename="a;b=c.jpg"', "a;b=c.jpg"),
        (b'filename="caf\xc3\xa9.jpg"', "café.jpg"),
        (b'filename="caf\xe9.jpg"', "café.jpg"),
        (b'filename="%22a%22%0D%0A100%25%0a.jpg"', '"a"\r\n100%25%0a.jpg'),
        (rb'filename="say \"hi\" \\ \o/.jpg"', 'say "hi" \\ \\o/.jpg'),
        (rb'filename="C:\Users\me\a.jpg"', "a.jpg"),
        (rb'filename="C:\\Users\\me\\a.jpg"', "a.jpg"),
        (b'filename="../../etc/a.jpg"', "../../etc/a.jpg"),
        (b"filename*=UTF-8''%e2%82%ac%20rates.jpg", "€ rates.jpg"),
        (b"filename*=iso-8859-1'en'%A3.jpg; filename=b.jpg", "£.jpg"),
        (b"filename=b.jpg; filename*=utf-8''a.jpg", "a.jpg"),
        (b'filename = "a.jpg"', "a.jpg"),
        (b"filename=a.jpg; filename=b.jpg", "b.jpg"),
        (b'filename*0="a b"; filename*1=c.jpg', "a bc.jpg"),
        (b"filename*0*=utf-8''a%20; filename*1=b%.jpg; filename*2*=%e2%82%ac", "a b%.jpg€"),
        (b"filename*1=b.jpg; filename*0=a", "ab.jpg"),
        (b"filename*1=b.jpg", None),
        (b'x; filename="a.jpg"; y', "a.jpg"),
        (b"x=y", None),
    ],
)
def test_a_file_name_is_what_the_client_meant(parameter: bytes, filename: str | None) -> None:
    value = b'Form-Data; name="f%22"; ' + parameter
    expected = ms.ContentDisposition("form-data", 'f"', filename)
    assert ms.parse_content_disposition(value.decode("latin-1")) == expected


@pytest.mark.parametrize("value", ["UTF-8''%ff", "UTF-8''a b", "utf-16''a", "UTF-8'a", "%41"])
def test_an_extended_file_name_that_cannot_be_read_gives_way_to_the_plain_one(value: str) -> None:
    about = f"form-data; name=a; filename*={value}"
    assert ms.parse_content_disposition(about).filename is None
    assert ms.parse_content_disposition(f"{about}; filename=b.jpg").filename == "b.jpg"


@pytest.mark.parametrize(
    "field",
    [
        b"Content-Disposition: form-data;\r\n name=a",
        b"Content-Disposition: attachment; name=a",
        b"Content-Disposition: form-data; name=a\r\nX: y\r\n\tz",
        b"Content-Disposition: form-data; name =a",
    ],
)
def test_a_part_is_known_by_its_name_however_its_header_is_written(field: bytes) -> None:
    events = ms.MultipartParser(b"b").feed(b"--b\r\n" + field + b"\r\n\r\nx\r\n--b--")
    assert isinstance(events[0], ms.Part)
    assert events[0].name == "a"


@pytest.mark.parametrize(
    "name",
    ["a.jpg", 'a"b\\c.jpg', "café €.jpg", "100%41.jpg", "a\r\nb", "😀", "a;b=c'd", "\udcff"],
)
def test_an_attachment_keeps_its_name_and_adds_no_field(name: str) -> None:
    value = ms.content_disposition_attachment(name)
    assert value.isascii() and value.isprintable()
    parsed = ms.parse_content_disposition(value)
    assert (parsed.type, parsed.filename) == ("attachment", name.replace("\udcff", "?"))


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("", []), ("a=1&b=2&a=3", [("a", "1"), ("b", "2"), ("a", "3")]),
        ("&a&&=b&c==&", [("a", ""), ("", "b"), ("c", "=")]), ("a+b=c%2Bd+%26", [("a b", "c+d &")]),
        ("n=%E2%82%AC€;x", [("n", "€€;x")]), ("n=100%&m=%zz", [("n", "100%"), ("m", "%zz")]),
    ],
)  # fmt: skip
def test_a_query_is_parsed_as_browsers_write_it(text: str, fields: list[tuple[str, str]]) -> None:
    assert ms.parse_query(text) == fields


def test_a_query_of_too_many_fields_is_400() -> None:
    assert status_of(ms.parse_query, "&" * 1000) == 400
    assert ms.parse_query("&" * 999) == []


@pytest.mark.parametrize("text", ["a=%ff", "%C3=a", "a=%ED%A0%80"])
def test_what_is_no_utf_8_in_a_query_becomes_surrogates(text) -> None:
    ((name, value),) = ms.parse_query(text)
    with pytest.raises(UnicodeEncodeError):
        (name + value).encode()


# -- Ranges and conditions


@pytest.mark.parametrize(
    ("value", "ranges"),
    [
        ("bytes=0-499", [(0, 499)]), ("bytes=500-999", [(500, 999)]),
        ("bytes=-500", [(9500, 9999)]), ("bytes=9500-", [(9500, 9999)]),
        ("Bytes=0-0,-1", [(0, 0), (9999, 9999)]),
        ("bytes= 0-999, 4500-5499,, -1000", [(0, 999), (4500, 5499), (9000, 9999)]),
        ("bytes=500-700,601-999", [(500, 700), (601, 999)]), ("bytes=9999-20000", [(9999, 9999)]),
        ("bytes=-99999", [(0, 9999)]), ("bytes=10000-,0-0", [(0, 0)]), ("bytes=0-1,0-1,0-1", None),
        ("bytes=" + ",".join(f"{i * 10}-{i * 10}" for i in range(65)), None), ("bytes=2-1", None),
        ("bytes=0-0,2-1", None), ("bytes=-", None), ("bytes=", None), ("bytes=,", None),
        ("bytes=a-b", None), ("bytes=1-2-3", None), ("bytes=0 - 1", None), ("bytes=+1-2", None),
        ("bytes=\xb2-", None), ("bytes=" + "9" * 5000 + "-", None), ("bytes 0-1", None),
        ("lines=0-1", None), ("", None),
    ],
)  # fmt: skip
def test_a_range_is_parsed_or_ignored(value: str, ranges: list[tuple[int, int]] | None) -> None:
    assert ms.parse_range(value, 10000) == ranges


@pytest.mark.parametrize(("value", "size"), [("bytes=10-", 10), ("bytes=-0", 10), ("bytes=0-", 0)])
def test_a_range_outside_the_file_is_416_with_its_size(value: str, size: int) -> None:
    with pytest.raises(ms.HTTPError) as caught:
        ms.parse_range(value, size)
    assert (caught.value.status, caught.value.headers) == (
        416,
        {"Content-Range": f"bytes */{size}"},
    )


def test_the_last_bytes_of_an_empty_file_are_all_of_it() -> None:
    assert ms.parse_range("bytes=-5", 0) is None


@pytest.mark.parametrize(
    ("header", "etag", "strong", "weak"),
    [
        ('W/"1"', 'W/"1"', False, True),  # the table of RFC 9110 §8.8.3.2
        ('W/"1"', 'W/"2"', False, False), ('W/"1"', '"1"', False, True),
        ('"1"', '"1"', True, True), ('"1"', 'W/"1"', False, True), ("*", '"1"', True, True),
        ('"x", "1","y"', '"1"', True, True), ('"x,1", "y"', '"1"', False, False),
        ("1", '"1"', False, False), ("", '"1"', False, False),
    ],
)  # fmt: skip
def test_entity_tags_are_compared(header: str, etag: str, strong: bool, weak: bool) -> None:
    assert ms.etag_matches(header, etag, weak=False) is strong
    assert ms.etag_matches(header, etag, weak=True) is weak


DATE = "Sun, 06 Nov 1994 08:49:37 GMT"
BEFORE = "Sun, 06 Nov 1994 08:49:36 GMT"


@pytest.mark.parametrize(
    ("fields", "unchanged", "failed", "ranged"),
    [
        ({}, False, False, True),
        ({"if_none_match": 'W/"e"'}, True, False, True),
        ({"if_none_match": '"x"', "if_modified_since": DATE}, False, False, True),
        ({"if_modified_since": DATE}, True, False, True),
        ({"if_modified_since": BEFORE}, False, False, True),
        ({"if_modified_since": "yesterday"}, False, False, True),
        ({"if_match": '"e"', "if_unmodified_since": BEFORE}, False, False, True),
        ({"if_match": 'W/"e"'}, False, True, True),
        ({"if_match": "*"}, False, False, True),
        ({"if_unmodified_since": DATE}, False, False, True),
        ({"if_unmodified_since": BEFORE}, False, True, True),
        ({"if_range": '"e"'}, False, False, True),
        ({"if_range": 'W/"e"'}, False, False, False),
        ({"if_range": '"x"'}, False, False, False),
        ({"if_range": "*"}, False, False, False),
        ({"if_range": DATE}, False, False, True),
        ({"if_range": "Sun, 06 Nov 1994 08:49:38 GMT"}, False, False, False),
    ],
)
def test_conditions_hold_as_rfc_9110_says(
    fields: dict[str, str], unchanged: bool, failed: bool, ranged: bool
) -> None:
    request, file = headers(**fields), ('"e"', 784111777.9)
    assert ms.not_modified(request, *file) is unchanged
    assert ms.precondition_failed(request, *file) is failed
    assert ms.if_range_holds(request, *file) is ranged


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (DATE, 784111777), ("Sunday, 06-Nov-94 08:49:37 GMT", 784111777),
        ("Sun Nov  6 08:49:37 1994", 784111777),
        ("Wednesday, 01-Jan-75 00:00:00 GMT", 3313526400),  # 50 years ahead of 2025
        ("Thursday, 01-Jan-76 00:00:00 GMT", 189302400),
        ("Sat, 31 Dec 2016 23:59:60 GMT", 1483228799), ("Sat, 29 Feb 2025 00:00:00 GMT", None),
        ("Sun, 06 Nov 1994 24:00:00 GMT", None), ("Sun, 06 Nov 1994 08:49:61 GMT", None),
        ("Sun, 06 Nov 0000 08:49:37 GMT", None), ("Sun, 06 Nov 1994 08:49:37 UTC", None),
        ("sun, 06 nov 1994 08:49:37 gmt", None), ("Sun, 6 Nov 1994 08:49:37 GMT", None),
        ("Sun, 0\u0666 Nov 1994 08:49:37 GMT", None), ("0", None), ("", None),
    ],
)  # fmt: skip
def test_a_date_is_read_in_its_three_forms(value: str, seconds: int | None) -> None:
    assert ms.parse_date(value, now=1750000000) == seconds


@pytest.mark.parametrize("part", [0, 0.5, 0.999])
@pytest.mark.parametrize("second", [0, 951782400, 784111777, 4102444799, -1, -9223372037])
def test_what_was_changed_in_a_second_was_not_changed_after_it(second: int, part: float) -> None:
    date = ms.format_date(second + part)
    assert ms.parse_date(date) == second
    assert ms.not_modified(headers(if_modified_since=date), '"e"', second + part)
    assert ms.if_range_holds(headers(if_range=date), '"e"', second + part)


@pytest.mark.parametrize(
    ("value", "accepted"),
    [
        ("gzip", True), ("deflate, GZIP;q=0.5, br", True), ("x-gzip", True), ("*", True),
        ("br;q=1, *;q=0.1", True), ("gzip;q=0", False), ("gzip ; q=0.000", False),
        ("gzip;q=0.001", True), ("gzip;q=0, *", False), ("*;q=0", False), ("identity", False),
        ("", False),
    ],
)  # fmt: skip
def test_gzip_is_taken_where_its_weight_is_not_zero(value: str, accepted: bool) -> None:
    assert ms.accepts_gzip(headers(accept_encoding=value)) is accepted
    assert not ms.accepts_gzip(headers())


# -- Answers


def test_a_head_is_formatted() -> None:
    head = ms.format_head(404, {"Content-Length": "0", "X-Name": "caf\xe9"})
    assert head == b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nX-Name: caf\xe9\r\n\r\n"
    assert ms.format_head(299, {}) == b"HTTP/1.1 299 \r\n\r\n"


@pytest.mark.parametrize("text", ["a\r\nSet-Cookie: b", "a\nb", "a\rb", "a\0b", "a\r", "\n", "€"])
@pytest.mark.parametrize("where", ["name", "value"])
def test_an_answer_cannot_be_split(text: str, where: str) -> None:
    field = {"X": text} if where == "value" else {text: "x"}
    with pytest.raises(ValueError):
        ms.format_head(200, {"A": "b", **field, "C": "d"})


# ======================================================================================
# 10. Server
# ======================================================================================


def get_line(path: str, *fields: str, version: str = "1.1", method: str = "GET") -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: here", *fields]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def upload_request(content: bytes, *fields: str, path: str = "") -> tuple[bytes, bytes]:
    """Head and body of an upload by the owner, with a length unless `fields` has a coding."""
    body, content_type = form("a.png", content)
    given = " ".join(fields).lower()
    length = [] if "transfer-encoding" in given else [f"Content-Length: {len(body)}"]
    credential = [] if "authorization" in given else [f"Authorization: {OWNER['Authorization']}"]
    fields = (f"Content-Type: {content_type}", *length, *credential, *fields)
    return get_line(path or "/upload", *fields, method="POST"), body


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    coded = [f"{len(piece):x};x=y\r\n".encode() + piece + b"\r\n" for piece in pieces]
    return b"".join(coded) + b"0\r\nTrailer: x\r\n\r\n"


def test_a_connection_is_kept_for_one_request_after_another(server):
    name = server.upload(png()).json["filename"]
    with Raw(server) as raw:
        for path in ("/health", f"/media/{name}", f"/media/{name}", "/nothing", "/list", "/media"):
            raw.send(get_line(path))
            answer = raw.answer()
            assert answer.status == (404 if path == "/nothing" else 200)
            assert answer.headers["Connection"] is None
        head, body = upload_request(png())
        raw.send(head + body)
        assert raw.answer().status == 201
        raw.send(get_line("/health", "Connection: close"))
        assert raw.answer().headers["Connection"] == "close"
        assert raw.is_closed()


def test_requests_sent_at_once_are_answered_in_their_order(server):
    content = png()
    head, body = upload_request(content)
    with Raw(server) as raw:
        wanted = get_line("/health") + head + body + get_line(f"/image/{sha256(content)}")
        raw.send(wanted + get_line("/nothing") + get_line("/media", method="HEAD"))
        assert [raw.answer().status for _ in range(2)] == [200, 201]
        assert raw.answer().body == content
        assert raw.answer().status == 404
        assert raw.answer("HEAD").status == 200


def test_http_1_0_is_answered_and_closed_unless_it_asks_otherwise(server):
    with Raw(server) as raw:
        raw.send(get_line("/health", "Connection: keep-alive", version="1.0"))
        assert raw.answer().headers["Connection"].lower() == "keep-alive"
        raw.send(b"GET /health HTTP/1.0\r\n\r\n")
        assert raw.answer().status == 200
        assert raw.is_closed()


@pytest.mark.parametrize("path", ["/upload", "/upload-image"])
def test_continue_is_sent_once_the_head_is_accepted(server, path):
    head, body = upload_request(png(), "Expect: 100-continue", path=path)
    with Raw(server) as raw:
        raw.send(head)
        assert raw.answer().status == 100
        raw.send(body)
        assert raw.answer().status == 201


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        ("/upload", ["Authorization: Basic eDp5"], 401),
        ("/upload", ["Authorization: Bearer wrong"], 401),
        ("/upload", [f"Authorization: {READER['Authorization']}"], 403),
        ("/nothing", [], 404),
        ("/media", [], 405),
        ("/upload", ["Content-Length: 99999999999"], 413),
        ("/upload", ["Expect: 200-maybe"], 417),
        ("/upload", ["Content-Type: application/json"], 415),
    ],
)
def test_a_refusal_comes_before_the_body_is_sent(server, path, fields, status):
    names = {field.partition(":")[0] for field in fields}
    head, _ = upload_request(png(), *fields, path=path)
    kept = [
        line for line in head.decode().split("\r\n")
        if line.partition(":")[0] not in names or line in fields
    ]  # fmt: skip
    if "Expect" not in names:
        kept.insert(2, "Expect: 100-continue")
    with Raw(server) as raw:
        raw.send("\r\n".join(kept).encode())
        assert raw.answer().status == status


@pytest.mark.parametrize("size", [1, 7, 1000, 10**9])
def test_a_chunked_upload_is_taken(server, size):
    content = png(padding=2000)
    head, body = upload_request(content, "Transfer-Encoding: chunked")
    with Raw(server) as raw:
        raw.send(head + chunked(body, size) + get_line("/health"))
        made = raw.answer()
        assert (made.status, made.json["sha256"]) == (201, sha256(content))
        assert raw.answer().status == 200


def test_a_request_that_comes_byte_by_byte_is_answered(server):
    content = png()
    head, body = upload_request(content)
    with Raw(server) as raw:
        raw.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in head + body:
            raw.send(bytes([byte]))
        assert raw.answer().json["sha256"] == sha256(content)


SMUGGLED = b"GET /list HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("fields", "body", "status"),
    [
        ("Content-Length: 4\r\nTransfer-Encoding: chunked", b"0\r\n\r\n", 400),
        ("Content-Length: 0\r\nContent-Length: 5", b"hello", 400),
        ("Content-Length: +5", b"hello", 400),
        ("Transfer-Encoding : chunked", b"0\r\n\r\n", 400),
        ("Transfer-Encoding: xchunked", b"0\r\n\r\n", 501),
        ("X: y\nTransfer-Encoding: chunked", b"0\r\n\r\n", 400),
        ("X\0: y", b"", 400),
        ("Host: other", b"", 400),
    ],
)
@pytest.mark.parametrize("path", ["/upload", "/health"])
def test_a_message_of_two_meanings_is_refused_and_the_connection_ends(
    server, fields, body, status, path
):
    with Raw(server) as raw:
        raw.send(get_line(path, fields, method="POST") + body + SMUGGLED)
        answer = raw.answer()
        assert answer.status == status
        assert set(answer.json) == {"detail"}
        assert answer.headers["Connection"] == "close"
        assert raw.is_closed()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /\r\n\r\n", 400), (b"\x16\x03\x01\x02\0\x01\0\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505), (get_line("/" + "a" * 70_000), 414),
        (get_line("/", "X: " + "a" * 70_000), 431), (get_line("/", *["X: y"] * 100), 431),
        (get_line("/a b"), 400), (get_line("/\xe9"), 400),
        (b"CONNECT here:80 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ],
)  # fmt: skip
def test_a_head_that_is_none_is_refused(server, data, status):
    with Raw(server) as raw:
        raw.send(data)
        assert raw.answer().status == status
        assert raw.is_closed()


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\0\x01\0",  # a TLS hello
        b"\0", b" GET / HTTP/1.1\r\n", b"\xe9", b"hello\r\n", b"hello\n", b"GET / HTTP/1.1\n",
        b"GET /a b HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: x\n", b"\r\n" * 6, b"\n", b"\rGET",
    ],
)  # fmt: skip
def test_what_cannot_become_a_request_is_400_at_once(server, data):
    with Raw(server) as raw:
        raw.send(data)  # and no more: waiting for the rest would end with 408, much later
        assert raw.answer().status == 400
        assert raw.is_closed()


@pytest.mark.parametrize("lines", [1, 2])
def test_empty_lines_before_a_request_are_passed_over_however_they_come(server, lines):
    with Raw(server) as raw:
        raw.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"\r\n" * lines + get_line("/health"):
            raw.send(bytes([byte]))
        assert raw.answer().status == 200


def test_the_end_of_a_head_is_found_however_it_is_split() -> None:
    head = b"GET / HTTP/1.1\r\nHost: x\r\nA: b"
    data = head + b"\r\n\r\nrest"
    for places in itertools.combinations_with_replacement(range(1, len(data)), 2):
        known, end = 0, -1
        for place in (*places, len(data)):
            if end < 0:
                known, end = place, ms.find_head_end(data[:place], known)
        assert end == len(head), places


@pytest.mark.parametrize("target", ["/list", "http://{}/list"])
@pytest.mark.parametrize(("size", "status"), [(255, 200), (256, 400)])
def test_a_host_has_at_most_255_bytes(server, target, size, status):
    host = "a" * (size - 2) + ":1"
    line = f"GET {target.format(host)} HTTP/1.1\r\nHost: {'x' if '{' in target else host}"
    with Raw(server) as raw:
        raw.send(line.encode() + b"\r\n\r\n")
        assert raw.answer().status == status


@pytest.mark.parametrize("size", [b"ffffffffffffffff", b"8000000000000000", b"f" * 17, b"-1"])
def test_a_chunk_of_an_absurd_size_is_400(server, size):
    head, _ = upload_request(png(), "Transfer-Encoding: chunked")
    with Raw(server) as raw:
        raw.send(head + size + b"\r\n")
        assert raw.answer().status == 400


PAGE = ("Origin: https://page.example",)
NO_ROUTE = get_line("/nothing/here", *PAGE)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (NO_ROUTE, 404), (get_line("/health", *PAGE, method="PUT"), 405),
        (get_line("/metrics", *PAGE), 401), (get_line("/image/x", *PAGE), 400),
        (get_line("/", "Host: again", *PAGE), 400), (get_line("/a b", *PAGE), 400),
        (get_line("/" + "a" * 70_000, *PAGE), 414), (get_line("/", *PAGE, "Expect: tea"), 417),
        (get_line("/", *PAGE, *["X: y"] * 100), 431), (b"hello\r\n", 400),
        (get_line("/", *PAGE, "Transfer-Encoding: gzip, chunked"), 501),
        (get_line("/", *PAGE).replace(b"1.1", b"2.0"), 505),
        (upload_request(png(), *PAGE, "Content-Encoding: gzip")[0], 415),
    ],
)  # fmt: skip
def test_every_error_may_be_read_by_a_page_and_is_kept_by_no_cache(server, data, status):
    with Raw(server) as raw:
        raw.send(data)
        answer = raw.answer()
    assert answer.status == status
    assert set(answer.json) == {"detail"}
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert answer.headers.get_all("X-Content-Type-Options") == ["nosniff"]
    assert answer.headers.get_all("Cache-Control") == ["no-store"]


@pytest.mark.parametrize("origin", ["https://page.example", "https://other.example"])
def test_a_head_that_is_none_is_answered_to_the_pages_that_may_read(start, origin):
    running = start(cors_allow_origins="https://page.example")
    with Raw(running) as raw:
        raw.send(get_line("/a b", f"Origin: {origin}"))
        allowed = raw.answer().headers["Access-Control-Allow-Origin"]
    assert allowed == ("https://page.example" if "page" in origin else None)


def test_a_preflight_is_answered_on_unknown_paths(server):
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "PUT"}
    answer = server.request("OPTIONS", "/nothing/here", headers=asked)
    assert answer.status == 204
    assert "PUT" in answer.headers["Access-Control-Allow-Methods"]
    assert server.request("OPTIONS", "/nothing/here").status == 404


@pytest.mark.parametrize("path", ["/", "/health", "/entity/", "/api/media/media/"])
def test_json_that_is_no_list_with_an_etag_is_kept_by_no_cache(server, jane, path):
    answer = server.get(path, **jane.headers)
    assert answer.status == 200
    assert answer.headers.get_all("Cache-Control") == ["no-store"]
    assert answer.headers.get_all("X-Content-Type-Options") == ["nosniff"]


@pytest.mark.parametrize("coding", ["", "identity", "UTF-8"])
def test_a_content_encoding_that_changes_nothing_is_taken(server, coding):
    answer = server.send_file(
        "POST", "/upload", png(), headers={**OWNER, "Content-Encoding": coding}
    )
    assert answer.status == 201


@pytest.mark.parametrize("path", ["/upload", "/image/part.png"])
def test_a_part_of_a_file_is_not_stored_as_a_whole_one(server, path):
    content = png(padding=2000)
    sent = {**OWNER, "Content-Range": f"bytes 0-{len(content) - 1}/{len(content) + 9}"}
    answer = server.send_file("PUT", path, content, headers=sent)
    assert (answer.status, "/files" in answer.json["detail"]) == (400, True)
    raw = {**sent, "Content-Type": "image/png"}  # as curl -C - -T goes on
    assert server.request("PUT", path, content, raw).status == 400
    assert sha256(content) not in server.listed()


def test_a_refused_body_is_read_up_to_16_mib(server):
    head, _ = upload_request(b"", "Authorization: Bearer wrong")
    head = re.sub(rb"Content-Length: \d+", b"Content-Length: 5000000000", head)
    sent = 0
    with Raw(server) as raw:
        raw.send(head)
        with pytest.raises(OSError):
            while sent < 100 << 20:
                raw.send(bytes(1 << 20))
                sent += 1 << 20
        assert raw.answer().status == 401
    assert sent >= 16 << 20


def test_a_hundred_headers_and_64_kib_are_taken(server):
    with Raw(server) as raw:
        raw.send(get_line("/health", *["X: y"] * 99))
        assert raw.answer().status == 200
        raw.send(get_line("/health", "X: " + "a" * 65_000))
        assert raw.answer().status == 200


@pytest.mark.parametrize(
    ("length", "headers", "status"),
    [(10_000_000, {}, 401), (14_000_000, OWNER, 413), (10_000_000, READER, 403)],
)
def test_a_client_that_sends_all_before_it_reads_still_gets_the_refusal(
    server, length, headers, status
):
    answer = server.send_file("POST", "/upload", bytes(length), headers=headers)
    assert answer.status == status


def test_a_file_found_too_large_on_its_way_is_413_and_leaves_nothing(small):
    head, body = upload_request(bytes(3_000_000), "Transfer-Encoding: chunked")
    before = files_below(small.storage)
    with Raw(small) as raw:
        raw.send(head + chunked(body, 100_000))
        assert raw.answer().status == 413
    assert files_below(small.storage) == before


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_client_that_goes_away_leaves_nothing(server, is_reset):
    folder = server.storage / ".incoming"
    before = {*folder.glob("*")}  # what other tests have begun
    head, body = upload_request(png_of(500_000))
    with Raw(server) as raw:
        raw.send(head + body[:300_000])
        wait_until(lambda: {*folder.glob("*")} - before, "the upload to begin")
        if is_reset:
            linger = struct.pack("ii", 1, 0)
            raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    wait_until(lambda: not {*folder.glob("*")} - before, "the upload to be given up")


def test_hundreds_of_idle_connections_disturb_nobody(server):
    idle = [Raw(server) for _ in range(300)]
    try:
        for raw in idle[::2]:
            raw.send(b"GET /health HTT")
        assert server.upload(png()).status == 201
        assert server.get("/health").status == 200
        for raw in idle[:20:2]:
            raw.send(b"P/1.1\r\nHost: x\r\n\r\n")
            assert raw.answer().status == 200
    finally:
        for raw in idle:
            raw.socket.close()


def test_a_client_that_reads_slowly_gets_all_of_it(server):
    content = png_of(9_000_000)
    path = f"/media/{server.upload(content).json['filename']}"
    with Raw(server) as raw:
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        raw.send(get_line(path) * 2)  # more than the kernel's buffers hold
        assert server.get("/health").status == 200
        assert raw.answer().body == content
        assert raw.answer().body == content


class Echo:
    """An Exchange that answers with the path and the body."""

    interim = ()

    def __init__(self, path: str) -> None:
        self.content = path.encode()

    def feed(self, piece):
        self.content += piece

    def pause(self):
        return None

    def finish(self):
        return ms.Response(200, {}, self.content)

    def refuse(self, error):
        return ms.Response(error.status, error.headers, b"refused")

    def abandon(self):
        pass


def set_patience(monkeypatch, seconds: float) -> None:
    """Set how long a Server waits for what a client is to send or read, from its next step on."""
    for state, wait in ms.WAITS.items():
        monkeypatch.setitem(ms.WAITS, state, wait._replace(seconds=seconds))
    monkeypatch.setattr(ms, "HEAD_SECONDS", 2 * seconds)


class EchoService:
    """Answers with the path and the body; `going_on` lets go what waits."""

    def __init__(self):
        self.accepted = []
        self.going_on = threading.Event()
        self.path, self.size = Path(os.devnull), 0  # of /file

    def __call__(self, head, peer):
        self.accepted.append(head.path)
        if head.path == "/wait":
            self.going_on.wait(2 * DEADLINE)  # longer than a client waits
        echo = Echo(head.path)
        if head.path.startswith("/deferred"):
            answer = echo.finish()
            deferred = ms.Deferred("decoder", lambda: self.going_on.wait(2 * DEADLINE) and answer)
            if not head.has_body:
                return deferred
            echo.finish = lambda: deferred
        if head.path == "/broken":
            echo.abandon = lambda: 1 / 0
        if head.path == "/file":
            source = io.FileIO(self.path)
            body = [ms.FileSlice(source, 0, self.size)]
            return ms.Response(200, {}, body, source)
        return echo if head.has_body else echo.finish()

    def inline(self, head, iteration):
        return None

    def is_prompt(self, head):
        return head.path == "/prompt"

    def client_of(self, head, peer):
        return head.headers.get("x-client", peer)

    def on_error(self, error, origin):
        return ms.Response(error.status, error.headers, b"refused")

    def on_answered(self, head, peer, response, seconds):
        pass

    def on_flight(self, count):
        pass


def close_bare(server: ms.Server) -> None:
    for connection in server.connections.in_states(*ms.WAITS):
        server.connections.enter(connection, ms.State.CLOSED)
    for item in (server._alarm, server.wakeup, server._selector):
        item.close()


@pytest.fixture
def bare_server(request, monkeypatch):
    """A patient Server in this process, around an EchoService; its parameter is how patient."""
    set_patience(monkeypatch, DEADLINE)
    for name, value in {"MAX_IN_FLIGHT": 2, "LAST_REQUEST_SECONDS": 0.1}.items():
        monkeypatch.setattr(ms, name, value)
    bare = ms.Server(ms.open_listener("127.0.0.1", 0), EchoService())
    bare.port = bare.socket.getsockname()[1]
    poll_interval = getattr(request, "param", 0.05)
    thread = threading.Thread(target=bare.serve_forever, args=(poll_interval,))
    thread.start()
    yield bare
    bare.service.going_on.set()
    bare.stop()
    bare.wake()
    thread.join(DEADLINE)
    assert not thread.is_alive()
    close_bare(bare)
    counts = bare.connections
    assert not counts.held
    assert counts.descriptors == counts.in_flight == bare.bodies._all == bare.downloads._all == 0


def test_a_wakeup_without_data_is_no_error(monkeypatch):
    """select(2): a descriptor may be reported as ready although nothing can be read."""
    ours, theirs = socket.socketpair()
    wakeups = itertools.count()

    def wait_readable(connection: ms.Connection, seconds: float) -> bool:
        if next(wakeups) == 2:
            theirs.send(b"abc")
        return True

    monkeypatch.setattr(ms.Connection, "_wait_readable", wait_readable)
    buffer = memoryview(bytearray(10))
    with ours, theirs:
        ours.setblocking(False)
        connection = ms.Connection(ours, "peer", None)
        assert [connection.receive(buffer, 1) for _ in range(2)] == [None, None]
        assert bytes(connection.receive(buffer, 1)) == b"abc"
    assert next(wakeups) == 3


def test_a_client_that_posts_on_and_on_keeps_no_thread_from_others(bare_server, monkeypatch):
    monkeypatch.setattr(ms, "SOON_SECONDS", DEADLINE)  # it would be waited for
    bare_server.runner.pools["body"]._limit = 1
    post = b"POST /%d HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"
    with Raw(bare_server) as busy, Raw(bare_server) as other:
        busy.send(b"POST /wait HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx")
        wait_until(lambda: bare_server.connections.in_flight == 1)
        other.send(post % 2)
        wait_until(lambda: bare_server.runner.pools["body"].waiting)
        bare_server.service.going_on.set()
        assert busy.answer().body == b"/waitx"
        assert other.answer().body == b"/2x"


def post(path: str, length: int, *fields: str) -> bytes:
    return get_line(path, f"Content-Length: {length}", *fields, method="POST")


def states(server: ms.Server) -> Counter[ms.State]:
    return Counter(connection.state for connection in server.connections.in_states(*ms.WAITS))


def join(server: ms.Server) -> Raw:
    """A connection that the server has taken in: the deadlines that it has are patient ones."""
    before = server.connections.descriptors
    raw = Raw(server)
    wait_until(lambda: server.connections.descriptors > before)
    return raw


def look_at_deadlines(server: ms.Server) -> None:
    """Wait until the server has ended all connections whose deadline is over now."""
    for _ in range(2):  # it sets `turned_at` before it looks
        before = server.turned_at
        wait_until(lambda before=before: server.turned_at > before)


@pytest.mark.parametrize("coding", ["length", "chunked"])
@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_a_request_is_accepted_once_however_its_body_comes(bare_server, size, coding):
    body = bytes(range(256)) * 4
    head = post("/a", len(body))
    if coding == "chunked":
        head = get_line("/a", "Transfer-Encoding: chunked", method="POST")
    sent = head + (chunked(body, 7) if coding == "chunked" else body) + get_line("/b")
    with Raw(bare_server) as raw:
        raw.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(sent), size):
            raw.send(sent[start : start + size])
        assert raw.answer().body == b"/a" + body
        assert raw.answer().body == b"/b"
    assert bare_server.service.accepted == ["/a", "/b"]


@pytest.mark.parametrize("split", [0, 1, 70_000])
def test_a_body_that_stops_holds_no_thread_and_goes_on_where_it_was(bare_server, split):
    body = random.Random(1).randbytes(200_000)
    with Raw(bare_server) as raw, Raw(bare_server) as other:
        raw.send(post("/a", len(body)) + body[:split])
        wait_until(lambda: states(bare_server)[ms.State.BODY] == 1)
        wait_until(lambda: bare_server.connections.in_flight == 0)
        other.send(post("/b", 1) + b"x")
        assert other.answer().body == b"/bx"
        raw.send(body[split : split + 10])  # stays with the selector
        raw.send(body[split + 10 :])
        assert raw.answer().body == b"/a" + body
    assert bare_server.service.accepted == ["/a", "/b"]


@pytest.mark.parametrize(
    ("data", "soon"),
    [(post("/a", 100_000), 0), (post("/a", 100_000), DEADLINE), (b"GET / HTTP/1.1\r\nX: ", 0)],
)
def test_what_comes_slower_than_the_least_rate_ends_with_408(bare_server, monkeypatch, data, soon):
    monkeypatch.setattr(ms, "BODY_SECONDS", soon)  # that a thread waits itself
    monkeypatch.setattr(ms, "MIN_RATE", 1000)
    with Raw(bare_server) as raw:
        raw.send(post("/quick", 50_000) + bytes(50_000))  # which earns no time for the next
        assert raw.answer().status == 200
        monkeypatch.setattr(ms, "GRACE_SECONDS", 0.2)
        raw.send(data)

        def is_answered() -> bool:
            raw.send(b"a")
            return bool(select.select([raw.socket], [], [], 0.02)[0])

        wait_until(is_answered, "an end")
        assert raw.answer().status == 408


@pytest.mark.parametrize(("error", "is_said"), [(ZeroDivisionError, True), (TimeoutError, False)])
def test_what_goes_wrong_with_an_answer_ends_its_connection_and_is_said_unless_the_client_went(
    bare_server, monkeypatch, capsys, error, is_said
):
    def send(*_: Any, **__: Any) -> NoReturn:
        raise error

    with Raw(bare_server) as raw, monkeypatch.context() as patch:
        patch.setattr(ms.Connection, "send", send)
        raw.send(get_line("/a"))
        assert raw.is_closed()
    with Raw(bare_server) as raw:
        raw.send(get_line("/b"))
        assert raw.answer().body == b"/b"
    said = "mediaserver: a connection was dropped: ZeroDivisionError: "
    assert (said in capsys.readouterr().err) is is_said


def test_what_comes_behind_a_refused_head_is_read_lest_the_answer_is_lost(bare_server):
    with Raw(bare_server) as raw:
        raw.send(b"nonsense\r\n\r\n")
        assert raw.answer().status == 400
        wait_until(lambda: states(bare_server)[ms.State.LINGERING] == 1)
        raw.send(b"x" * 10_000)
    wait_until(lambda: not bare_server.connections.descriptors)


def test_a_request_that_is_worked_on_has_no_deadline(bare_server):
    with join(bare_server) as raw:
        (connection,) = bare_server.connections.in_states(ms.State.HEAD)
        raw.send(get_line("/wait"))
        wait_until(lambda: bare_server.connections.in_flight == 1)
        connection.deadline = 0.0  # that of the head
        look_at_deadlines(bare_server)
        bare_server.service.going_on.set()
        assert raw.answer().status == 200


def test_a_request_that_is_held_up_keeps_no_other_waiting(bare_server):
    with Raw(bare_server) as held_up, Raw(bare_server) as other:
        held_up.send(get_line("/wait"))
        wait_until(lambda: bare_server.connections.in_flight == 1)
        other.send(get_line("/a"))
        assert other.answer().body == b"/a"
        bare_server.service.going_on.set()
        assert held_up.answer().body == b"/wait"


@pytest.mark.parametrize("bare_server", [2 * DEADLINE], indirect=True)
def test_what_follows_a_body_waits_behind_none_that_is_held_up(bare_server):
    with Raw(bare_server) as held_up, Raw(bare_server) as other:
        held_up.send(get_line("/wait"))
        wait_until(lambda: bare_server.connections.in_flight == 1)
        other.send(post("/a", 1) + b"x" + get_line("/b"))
        assert [other.answer().body for _ in range(2)] == [b"/ax", b"/b"]
        bare_server.service.going_on.set()
        assert held_up.answer().body == b"/wait"


def test_a_request_that_cannot_be_given_up_costs_nothing_else(bare_server, capsys):
    with Raw(bare_server) as raw:
        raw.send(post("/broken", 2) + b"a")
        wait_until(lambda: states(bare_server)[ms.State.BODY] == 1)
    wait_until(lambda: not bare_server.connections.descriptors, "the end of the connection")
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_what_comes_of_a_body_earns_time_for_the_rest(bare_server, monkeypatch):
    monkeypatch.setattr(ms, "MIN_RATE", 10 / DEADLINE)
    with Raw(bare_server) as raw:
        raw.send(post("/a", 20))
        (body,) = wait_until(lambda: bare_server.connections.in_states(ms.State.BODY))
        due = body.due
        raw.send(bytes(10))
        assert wait_until(lambda: body.due - due) == pytest.approx(DEADLINE)
        raw.send(bytes(10))
        assert raw.answer().status == 200


def test_a_body_that_is_on_its_way_at_a_stop_is_taken_and_answered(bare_server, monkeypatch):
    monkeypatch.setattr(ms, "LAST_REQUEST_SECONDS", 0)
    with Raw(bare_server) as raw:
        raw.send(post("/a", 5) + b"he")
        wait_until(lambda: states(bare_server)[ms.State.BODY] == 1)
        bare_server.stop()
        bare_server.wake()
        wait_until(lambda: bare_server.socket.fileno() < 0)
        raw.send(b"llo")
        assert raw.answer().body == b"/ahello"


@pytest.mark.parametrize("count", [2, 5])
def test_who_sends_a_body_at_once_is_not_told_to_go_on(bare_server, count):
    with Raw(bare_server) as raw:
        raw.send(post("/a", 5, "Expect: 100-continue") + b"hello"[:count])
        raw.send(b"hello"[count:])
        answer = raw.answer()
        assert (answer.status, answer.body) == (200, b"/ahello")


@pytest.mark.parametrize("most", ["client", "all"])
def test_unfinished_bodies_are_bounded_and_others_go_on(bare_server, monkeypatch, most):
    monkeypatch.setattr(ms, "MAX_IN_FLIGHT", 100)
    bare_server.bodies._each = 3 if most == "client" else 100
    bare_server.bodies._most = 3 if most == "all" else 100
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(Raw(bare_server)) for _ in range(3)]
        for raw in slow:
            raw.send(post("/slow", 5) + b"abc")
        wait_until(lambda: states(bare_server)[ms.State.BODY] == 3)
        with Raw(bare_server) as raw:
            raw.send(post("/more", 5, "Expect: 100-continue"))
            refused = raw.answer()  # before the body, and without 100 Continue
            assert refused.status == (429 if most == "client" else 503)
            assert int(refused.headers["Retry-After"]) > 0
        with Raw(bare_server) as raw:
            raw.send(post("/more", 5) + b"a")  # and never the rest
            assert raw.answer().status == refused.status
        with Raw(bare_server) as raw:
            raw.send(get_line("/get") + post("/whole", 1) + b"x")
            assert [raw.answer().status for _ in range(2)] == [200, 200]
        slow[0].send(b"de")
        assert slow[0].answer().body == b"/slowabcde"
        with Raw(bare_server) as raw:
            raw.send(post("/more", 5) + b"a")
            wait_until(lambda: states(bare_server)[ms.State.BODY] == 3)
            raw.send(b"bcde")
            assert raw.answer().status == 200


def test_what_waits_for_a_decoder_or_a_password_keeps_nothing_from_others(
    bare_server, monkeypatch
):
    monkeypatch.setattr(ms, "MAX_IN_FLIGHT", 1000)
    monkeypatch.setattr(ms, "MAX_DEFERRED", 92)
    most = ms.MAX_DEFERRED + ms.THREADS["decoder"]
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(Raw(bare_server)) for _ in range(most)]
        for number, raw in enumerate(slow):
            if number % 2:
                raw.send(post(f"/deferred{number}", 1) + b"x")
            else:
                raw.send(get_line(f"/deferred{number}"))
        wait_until(lambda: bare_server.runner.pools["decoder"].waiting == ms.MAX_DEFERRED)
        with Raw(bare_server) as raw:
            raw.send(get_line("/get") + post("/whole", 1) + b"x" + get_line("/deferred"))
            assert [raw.answer().status for _ in range(3)] == [200, 200, 503]
        bare_server.service.going_on.set()
        assert {raw.answer().status for raw in slow} == {200}


def test_what_is_bounded_is_counted_for_each_client_and_forgotten_with_the_last():
    limit = ms.ClientLimit("things", 3, 2)

    def refused(client: str) -> int:
        with pytest.raises(ms.HTTPError) as error:
            limit.acquire(client)
        return error.value.status

    for client in "aab":
        limit.acquire(client)
    assert [refused("a"), refused("b"), refused("c")] == [429, 503, 503]
    limit.release("a")
    limit.acquire("a")
    assert refused("a") == 429
    for client in "aab":
        limit.release(client)
    assert (limit._all, limit._clients) == (0, {})


def test_what_is_prompt_is_answered_while_all_other_threads_wait(bare_server, monkeypatch):
    monkeypatch.setattr(ms, "MAX_IN_FLIGHT", 12)
    pools = bare_server.runner.pools
    pools["relief"]._limit = pools["body"]._limit = 2
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(Raw(bare_server)) for _ in range(12)]
        for number, raw in enumerate(slow):
            raw.send(get_line("/wait") if number % 2 else post("/wait", 1) + b"x")
        wait_until(lambda: bare_server.connections.in_flight == 12)
        with Raw(bare_server) as raw:
            raw.send(get_line("/prompt") * 2)
            assert [raw.answer().status for _ in range(2)] == [200, 200]
            raw.send(get_line("/other"))
            assert raw.answer().status == 503
        bare_server.service.going_on.set()
        assert {raw.answer().status for raw in slow} == {200}


def test_downloads_leave_descriptors_to_others_and_one_clients_leave_some_to_all(
    bare_server, monkeypatch, tmp_path
):
    monkeypatch.setattr(ms, "MAX_IN_FLIGHT", 100)
    service = bare_server.service
    service.path, service.size = tmp_path / "large", 64 << 20
    with open(service.path, "wb") as file:
        file.truncate(service.size)
    assert 2 * bare_server.downloads._most < bare_server.connections.most_descriptors
    bare_server.downloads._most, bare_server.downloads._each = 3, 2
    with contextlib.ExitStack() as stack:

        def begin(client: str) -> Raw:
            raw = stack.enter_context(Raw(bare_server))
            raw.send(get_line("/file", f"X-Client: {client}"))
            return raw

        slow = [begin(client) for client in ("one", "one", "other")]
        wait_until(lambda: states(bare_server)[ms.State.SENDING] == 3)
        assert (bare_server.downloads._all, bare_server.connections.descriptors) == (3, 6)
        refused = [begin("one").answer(), begin("third").answer()]
        assert [(each.status, each.headers["Retry-After"]) for each in refused] == [
            (429, "1"), (503, "1")
        ]  # fmt: skip
        with Raw(bare_server) as raw:
            raw.send(get_line("/file") + get_line("/get"))  # and the connection goes on
            assert [raw.answer().status for _ in range(2)] == [503, 200]
        slow[0].socket.close()
        wait_until(lambda: bare_server.downloads._all == 2)
        raw = stack.enter_context(Raw(bare_server))
        raw.send(get_line("/file", method="HEAD"))
        assert raw.answer("HEAD").status == 200


def test_a_file_may_be_larger_than_what_the_machine_addresses(bare_server):
    """Where addresses have 32 bits, as on many a Raspberry Pi, that is 2 GiB: a video has more."""
    bare_server.service.size = sys.maxsize + 1
    with Raw(bare_server) as raw:
        raw.send(get_line("/file", method="HEAD"))
        answer = raw.answer("HEAD")
    assert (answer.status, answer.headers["Content-Length"]) == (200, str(sys.maxsize + 1))


def test_the_longest_idle_connection_gives_way_to_a_new_one(bare_server):
    bare_server.connections.most_descriptors = 3
    with contextlib.ExitStack() as stack:
        body, *idle = [stack.enter_context(Raw(bare_server)) for _ in range(2)]
        body.send(post("/slow", 2) + b"a")  # it counts twice, for a file
        wait_until(lambda: bare_server.connections.descriptors == 3)
        new = stack.enter_context(Raw(bare_server))
        new.send(get_line("/new"))
        assert new.answer().status == 200
        assert idle[0].is_closed()
        body.send(b"b")
        assert body.answer().status == 200


def test_what_is_remembered_of_a_file_counts_with_its_name():
    scanner = types.SimpleNamespace(progress=ms.SharedProgress())
    app = types.SimpleNamespace(hot={}, hot_bytes=0, scanner=scanner)
    content = ms.Content(bytes(100), 100, "", "", None, "")
    hot = ms.HotFile("", "", os.stat("."), content, access=ms.OPEN, route=0)
    for number in range(1000):
        ms.App.remember(app, f"/{number:060000}", hot)
    assert ms.HOT_BYTES / 2 < len(app.hot) * 60_000 < ms.HOT_BYTES
    before = app.hot_bytes
    hot = ms.HotFile("", "", os.stat("."), content, access=ms.OPEN, route=0)
    ms.App.remember(app, f"/{999:060000}", hot)
    assert app.hot_bytes == before


def test_a_connection_whose_request_was_there_before_it_was_taken_in_is_kept(
    bare_server, monkeypatch
):
    begun, going_on = threading.Event(), threading.Event()

    def inline(head: ms.RequestHead, iteration: int) -> ms.Response:
        begun.set()
        assert head.path != "/wait" or going_on.wait(DEADLINE)
        return ms.Response()

    monkeypatch.setattr(bare_server.service, "inline", inline)
    with Raw(bare_server) as other:
        other.send(get_line("/wait"))
        assert begun.wait(DEADLINE)
        with Raw(bare_server) as raw:
            raw.send(get_line("/a"))
            going_on.set()
            wait_until(lambda: states(bare_server)[ms.State.IDLE] == 2)
            for _ in range(2):
                assert raw.answer().status == 200
                raw.send(get_line("/a"))


def test_who_gives_way_is_who_can_be_missed_best_and_of_those_who_waits_longest(bare_server):
    with contextlib.ExitStack() as stack:
        body, head, *idle = [stack.enter_context(Raw(bare_server)) for _ in range(4)]
        body.send(post("/slow", 2) + b"a")
        head.send(b"GET /")
        for number, raw in enumerate(reversed(idle), 1):
            raw.send(get_line("/a"))
            assert raw.answer().status == 200
            wait_until(lambda number=number: states(bare_server)[ms.State.IDLE] == number)
        wait_until(lambda: states(bare_server)[ms.State.BODY] == 1)
        assert states(bare_server) == {ms.State.BODY: 1, ms.State.HEAD: 1, ms.State.IDLE: 2}
        for raw in (*reversed(idle), head, body):
            assert bare_server.connections.make_room()
            assert raw.is_closed()
        assert not bare_server.connections.make_room()


@pytest.mark.parametrize(
    ("error", "left"), [(errno.EMFILE, 0), (errno.ENFILE, 0), (errno.ECONNABORTED, 1)]
)
def test_only_want_of_descriptors_closes_a_connection_for_another(
    bare_server, monkeypatch, error, left
):
    def accept():
        raise OSError(error, "")

    with Raw(bare_server) as idle, monkeypatch.context() as patch:
        idle.send(get_line("/a"))
        assert idle.answer().status == 200
        wait_until(lambda: states(bare_server) == {ms.State.IDLE: 1})
        patch.setattr(bare_server, "socket", types.SimpleNamespace(accept=accept))
        bare_server._accept()
        assert states(bare_server).total() == left


def test_what_waits_behind_a_short_job_that_is_held_up_is_done_by_others(monkeypatch):
    workers, others = ms.Workers("test", 1), ms.Workers("others", 1)
    begun, go_on, second, third = (threading.Event() for _ in range(4))
    monkeypatch.setattr(ms, "PATIENCE_SECONDS", DEADLINE)
    workers.submit(lambda: begun.set() or go_on.wait(2 * DEADLINE))
    assert begun.wait(DEADLINE)
    workers.submit(second.set)
    workers.relieve(others)
    assert workers.waiting == 1
    monkeypatch.setattr(ms, "PATIENCE_SECONDS", -1)
    workers.relieve(others)
    assert second.wait(DEADLINE)
    go_on.set()
    workers.submit(third.set)
    assert third.wait(DEADLINE)


def test_a_new_connection_is_503_where_nothing_can_give_way(bare_server):
    bare_server.connections.most_descriptors = 0
    with Raw(bare_server) as raw:
        assert raw.answer().status == 503
        assert raw.is_closed()


def test_hundreds_of_slow_bodies_hold_up_nobody(server):
    """Uploads, forms and logins that stop in the middle: none of them keeps a thread."""
    body, content_type = form("a.png", png_of(300_000))
    upload, login = f"Content-Type: {content_type}", "Content-Type: application/json"
    with contextlib.ExitStack() as stack:
        for number in range(240):
            raw = stack.enter_context(Raw(server))
            client = f"X-Forwarded-For: 10.0.0.{number % 8}"
            if number % 2:
                raw.send(post("/api/auth/login", 100_000, login, client) + b'{"email":')
            else:
                owner = f"Authorization: {OWNER['Authorization']}"
                raw.send(post("/upload", len(body), upload, client, owner) + body[:100_000])
        assert server.upload(png()).status == 201
        assert server.get("/health").status == 200
        assert server.call("POST", "/api/auth/login", {"email": "x", "password": "y"})[0] == 401


def test_one_client_has_64_unfinished_bodies_and_a_proxy_as_many_as_its_clients(start):
    server = start("--workers", "1")  # each has a count of its own
    login = "Content-Type: application/json"
    with contextlib.ExitStack() as stack:

        def begin(client: str) -> Raw:
            raw = stack.enter_context(Raw(server))
            fields = (login, f"X-Forwarded-For: {client}", "Expect: 100-continue")
            raw.send(post("/api/auth/login", 50, *fields))
            return raw

        clients = [f"2001:db8:0:1::{number:x}" for number in range(64)]
        assert {begin(client).answer().status for client in clients} == {100}
        refused = begin("2001:db8:0:1:f::1").answer()  # a /64 is one client
        assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
        assert "64" in refused.json["detail"]
        assert begin("2001:db8:0:2::1").answer().status == 100
        assert begin("192.0.2.1").answer().status == 100


def test_empty_lines_keep_no_connection_open(bare_server, monkeypatch):
    set_patience(monkeypatch, 0.3)
    with Raw(bare_server) as raw:
        with contextlib.suppress(OSError):
            while not select.select([raw.socket], [], [], 0.02)[0]:
                raw.send(b"\r\n")
        assert raw.is_closed()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HT", 408), (post("/", 5) + b"hel", 408), (get_line("/a"), 200),
        (b"nonsense\r\n", 400),
    ],
)  # fmt: skip
def test_what_stops_moving_ends_and_an_idle_connection_is_closed(
    bare_server, monkeypatch, data, status
):
    with join(bare_server) as raw:
        set_patience(monkeypatch, 0.1)
        raw.send(data)
        assert raw.answer().status == status
        assert raw.is_closed()
        wait_until(lambda: not bare_server.connections.descriptors)


def test_a_connection_without_a_request_is_closed(bare_server, monkeypatch):
    set_patience(monkeypatch, 0.1)
    with Raw(bare_server) as raw:
        assert raw.is_closed()


def test_a_file_is_sent_by_threads_alone_whose_waiting_for_the_disk_is_nobody_elses(
    bare_server, monkeypatch, tmp_path
):
    service, real, senders = bare_server.service, ms.Connection._send_slice, set[str]()
    service.path, service.size = tmp_path / "large", 16 << 20
    with open(service.path, "wb") as file:
        file.truncate(service.size)

    def send_slice(connection: ms.Connection, segment: ms.FileSlice) -> ms.FileSlice | None:
        senders.add(threading.current_thread().name.partition("-")[0])
        return real(connection, segment)

    monkeypatch.setattr(ms.Connection, "_send_slice", send_slice)
    with Raw(bare_server) as raw:
        raw.send(get_line("/file"))
        wait_until(lambda: states(bare_server)[ms.State.SENDING] == 1)
        raw._take_to(b"\r\n\r\n")
        left = service.size - len(raw.received)
        while left:
            left -= len(raw.socket.recv(1 << 20))
    assert senders == {"short", "answer"}


def test_an_answer_that_is_not_read_ends(bare_server, monkeypatch, tmp_path):
    service = bare_server.service
    service.path, service.size = tmp_path / "large", 64 << 20
    with open(service.path, "wb") as file:
        file.truncate(service.size)
    unread = socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT
    assert bare_server.socket.getsockopt(*unread) == ms.UNREAD_SECONDS * 1000
    bare_server.socket.setsockopt(*unread, 300)
    with Raw(bare_server) as raw:
        raw.send(get_line("/file"))
        raw._more()
        wait_until(lambda: bare_server.connections.descriptors == 0)
        with pytest.raises((AssertionError, OSError)):
            raw._take(service.size)


def test_a_head_that_drips_for_too_long_ends(bare_server, monkeypatch):
    with Raw(bare_server) as raw:
        raw.send(get_line("/a"))
        assert raw.answer().status == 200
        monkeypatch.setattr(ms, "HEAD_SECONDS", 0.3)
        raw.send(b"GET / HTTP/1.1\r\nX: ")
        while not select.select([raw.socket], [], [], 0.02)[0]:
            raw.send(b"a")
        assert raw.answer().status == 408


def test_too_many_requests_in_flight_are_503_with_retry_after(bare_server):
    waiting = [Raw(bare_server) for _ in range(3)]
    for raw in waiting[:2]:
        raw.send(get_line("/wait"))
    wait_until(lambda: bare_server.connections.in_flight == 2)
    waiting[2].send(get_line("/wait"))
    refused = waiting[2].answer()
    assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
    bare_server.service.going_on.set()
    assert [raw.answer().body for raw in waiting[:2]] == [b"/wait"] * 2
    for raw in waiting:
        raw.socket.close()


# -- Several workers


def worker_ids(server: Server) -> list[int]:
    """The children that are as nice as their parent; the decoders' host is nicer."""

    def niceness(pid: int) -> int | None:
        with contextlib.suppress(ProcessLookupError):  # it has ended since it was listed
            return os.getpriority(os.PRIO_PROCESS, pid)
        return None

    parent = server.process.pid
    children = Path(f"/proc/{parent}/task/{parent}/children")
    if not children.exists():
        pytest.skip("needs /proc")
    pids = [int(pid) for pid in children.read_text().split()]
    return [pid for pid in pids if niceness(pid) == niceness(parent)]


def test_workers_know_what_any_of_them_took_in(start):
    running = start("--workers", "3")
    running.scanned()
    contents = [png() for _ in range(12)]
    made = together(12, lambda i: running.upload(contents[i]))
    assert [answer.body for answer in made if answer.status != 201] == []
    paths = [f"/media/{answer.json['filename']}" for answer in made]
    for _ in range(4):
        assert [running.get(path).body for path in paths] == contents
    assert running.get("/media").json["count"] == 12
    assert running.request("DELETE", paths[0], headers=OWNER).status == 200
    assert {running.get(paths[0]).status for _ in range(8)} == {404}
    late = png()
    fill(running.storage, {"late.png": late})
    running.rescan()
    assert {running.get(f"/image/{sha256(late)}").status for _ in range(8)} == {200}


def test_a_worker_that_dies_is_replaced_and_none_outlives_the_supervisor(start):
    running = start("--workers", "2")
    running.scanned()
    before = worker_ids(running)
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: len(worker_ids(running)) == 2 and worker_ids(running) != before, "another")
    assert wait_until(lambda: running.get("/health").status == 200)
    last = worker_ids(running)
    running.kill()
    wait_until(lambda: not any(Path(f"/proc/{process}").exists() for process in last), "the end")
    assert start().get("/health").status == 200


def test_orphans_leave_the_port_at_once_and_answer_what_they_have_begun(start):
    running = start("--workers", "2")

    def is_free() -> bool:
        with contextlib.suppress(OSError), contextlib.closing(socket.socket()) as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", running.port))
            other.listen()
            return True
        return False

    with Raw(running) as raw:
        fields = ("Content-Type: application/json", "Expect: 100-continue")
        raw.send(post("/api/auth/login", 50, *fields))
        assert raw.answer().status == 100
        running.kill()
        wait_until(is_free, "the port")
        raw.send(bytes(50))
        assert raw.answer().status == 400


def test_a_worker_that_fails_says_why(capfd):
    process = ms.fork_worker([], lambda: {}["nothing"])
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 1
    assert "KeyError: 'nothing'" in capfd.readouterr().err


# -- What a crash, a stop or a large file does


def test_sigterm_lets_an_upload_finish_and_takes_no_new_one(start):
    running = start()
    content = png_of(400_000)
    head, body = upload_request(content)
    with Raw(running) as raw, Raw(running) as idle:
        raw.send(head + body[:200_000])
        incoming = running.storage / ".incoming"
        wait_until(lambda: incoming.exists() and list(incoming.iterdir()), "the upload to begin")
        running.process.send_signal(signal.SIGTERM)
        assert idle.is_closed()
        with pytest.raises(OSError):
            Raw(running)
        raw.send(body[200_000:])
        answer = raw.answer()
        assert (answer.status, answer.headers["Connection"]) == (201, "close")
    assert running.process.wait(DEADLINE) == 0
    assert (running.storage / "media" / answer.json["filename"]).read_bytes() == content


def test_a_stop_waits_for_no_thumbnail_that_is_made_ahead(start, pillow):
    running = start("--workers", "1")
    children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children")
    if not children.exists():
        pytest.skip("needs /proc")
    (host,) = map(int, children.read_text().split())
    running.scanned()
    descriptors = Path(f"/proc/{running.process.pid}/fd")

    def count_pipes() -> int:
        count = 0
        for link in descriptors.iterdir():
            with contextlib.suppress(FileNotFoundError):
                count += os.readlink(link).startswith("pipe:")
        return count

    before = count_pipes()
    os.kill(host, signal.SIGSTOP)  # its decoders will never be done
    try:
        (running.storage / "a.png").write_bytes(png())
        running.process.send_signal(signal.SIGHUP)
        wait_until(lambda: count_pipes() > before, "the wait for a decoder")
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(DEADLINE) == 0
    finally:
        os.kill(host, signal.SIGCONT)


def test_sigterm_answers_every_request_that_came_before_it(start):
    running = start()
    path = f"/media/{running.upload(png()).json['filename']}"
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Raw(running)) for _ in range(100)]
        for raw in clients:
            raw.send(get_line(path))
        running.process.send_signal(signal.SIGTERM)
        assert {raw.answer().status for raw in clients} == {200}
    assert running.process.wait(DEADLINE) == 0


def test_a_crash_during_uploads_loses_nothing_answered_and_leaves_nothing_half_done(start):
    running = start()
    answered: list[tuple[str, bytes]] = []
    enough = threading.Event()

    def work(number: int) -> None:
        for i in range(1000):
            content = png_of(30_000 + number)
            try:
                if number % 2:
                    made = running.upload(content).json["url"]
                else:
                    made = running.store(content, f"{number}-{i}.png").json["image_url"]
            except (OSError, http.client.HTTPException):
                return
            answered.append((urlsplit(made).path, content))
            if len(answered) > 25:
                enough.set()

    half = Raw(running)
    head, body = upload_request(png_of(500_000))
    half.send(head + body[:400_000])
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    assert enough.wait(DEADLINE)
    running.kill()
    for thread in threads:
        thread.join()
    half.socket.close()
    again = start()
    again.scanned()
    for path, content in answered:
        assert again.get(path, **OWNER).body == content
    assert not left_arriving(again.storage)
    files = list((again.storage / "media").iterdir())
    assert {file.read_bytes()[-12:] for file in files} == {png()[-12:]}
    assert again.get("/media").json["count"] == len(files)


@pytest.mark.parametrize("damage", [b"this is no database " * 500, b""], ids=["text", "torn"])
def test_a_damaged_index_is_put_aside_and_rebuilt_from_disk(start, damage):
    running = start()
    public, private, own = png(), png(), png()
    made = running.upload(public).json
    running.store(private, "box.png")
    fill(running.storage, {"own.png": own})
    running.rescan()
    running.stop()
    index = running.data / "index.sqlite3"
    for name in ("-wal", "-shm"):
        index.with_name(index.name + name).unlink(missing_ok=True)
    content = index.read_bytes()
    index.write_bytes(damage or content[:100] + b"\xff" * (len(content) - 100))
    again = start()
    again.scanned()
    assert [p for p in running.data.iterdir() if "damaged" in p.name]
    assert set(again.listed()) == {sha256(public), sha256(own)}
    assert again.get(f"/media/{made['filename']}").body == public
    assert again.get("/image/box.png", **READER).body == private
    assert again.get(f"/image/{sha256(private)}").status == 404


def test_a_worker_that_meets_a_damaged_index_does_not_take_it_from_the_others(tmp_path):
    path = tmp_path / "index.sqlite3"
    damaged = b"this is no database " * 500
    path.write_bytes(damaged)
    settings = ms.Settings()._replace(database_url=path)
    assert ms.run_server(ms.Shared(settings, None, None, None, ms.Meter(1, 1), None))
    assert path.read_bytes() == damaged
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, f"{path.name}-suspect"}
    ms.open_index(path).close()
    assert list(tmp_path.glob("*.damaged-*Z"))


@pytest.mark.parametrize("content", [b"this is no database " * 500, b""], ids=["text", "emptied"])
def test_a_start_with_a_new_index_removes_no_file_of_which_a_crash_left_a_name(start, content):
    running = start()
    user = User(running)
    assert user.upload(png())[0] == 201
    running.stop()
    [stored] = user.files()
    os.link(stored, running.data / "users/.incoming" / ("ab" * 16))
    index = running.data / "index.sqlite3"
    for name in ("-wal", "-shm"):
        index.with_name(index.name + name).unlink(missing_ok=True)
    index.write_bytes(content)
    start()
    assert stored.stat().st_nlink == 1


def with_large_index(running: Server, rows: int) -> Path:
    """Give an index so many rows that no check at start and no cache holds it whole."""
    with running.index() as db:
        values = ((b"%032x" % number, "0" * 64) for number in range(rows))
        db.execute(f"INSERT INTO asset (sha256, size) VALUES ('{'0' * 64}', 1)")
        db.executemany("INSERT INTO file VALUES ('users', ?, ?, 1, 1, 1, 1)", values)
    return running.data / "index.sqlite3"


def overwrite_pages(index: Path, every: int) -> None:
    with index.open("r+b") as file:
        for page in range(1, index.stat().st_size // 4096, every):
            os.pwrite(file.fileno(), b"\xee" * 4096, page * 4096)


@pytest.mark.parametrize(
    ("damage", "workers"), [("pages", "2"), ("emptied", "1"), ("at rest", "1")]
)
def test_an_index_that_is_damaged_at_any_time_comes_back_by_itself(start, damage, workers):
    running = start("--workers", workers)
    contents = {name: png() for name in ("a.png", "b/c.png", "b/d.png")}
    fill(running.storage, contents)
    stored = running.upload(png()).json
    user = User(running)
    assert user.upload(own := png())[0] == 201
    running.rescan()
    if damage == "at rest":
        running.stop()
    index = with_large_index(running, 40_000 if damage == "at rest" else 10_000)
    if damage == "emptied":
        os.truncate(index, 0)
    else:
        overwrite_pages(index, 40 if damage == "at rest" else 1)
    if damage == "at rest":
        running = start("--workers", workers)
    expected = {stored["sha256"], *map(sha256, contents.values())}

    def is_back() -> bool:  # 503 is for as long as the damage has not been met, or is being mended
        answers = [running.get("/list"), running.upload(png())]
        assert {answer.status for answer in answers} <= {200, 201, 503}
        return answers[0].status == 200 and set(answers[0].json) >= expected

    wait_until(is_back, "the index")
    assert len(list(running.data.glob("index.sqlite3.damaged-*[0-9]Z"))) == 1
    assert running.get(stored["url"]).body
    assert [path.read_bytes() for path in user.files()] == [own]
    assert User(running).id > user.id
    running.stop()
    assert "Traceback" not in running.log


def test_damage_that_is_met_while_a_start_puts_things_in_order_sets_the_index_aside(
    settings_of, tmp_path, monkeypatch
):
    monkeypatch.setattr(ms, "CHECK_BYTES", 0)  # as a large one, which is not checked before
    settings = settings_of(f"--storage_dir={tmp_path}")
    ms.make_folders(settings)
    settings, _ = ms.with_secrets(settings)
    with contextlib.closing(ms.open_index(settings.database_url)) as index:
        page = index.value("SELECT rootpage FROM sqlite_master WHERE name = 'meta'")
    with settings.database_url.open("r+b") as file:
        os.pwrite(file.fileno(), b"\xee" * 4096, (page - 1) * 4096)
    ms.recover(settings, ms.Thumbnails())
    assert len(list(settings.database_dir.glob("index.sqlite3.damaged-*Z"))) == 1
    with contextlib.closing(ms.open_index(settings.database_url)) as index:
        assert index.get_meta("recovered") == "1"


def an_account() -> dict[str, str]:
    return {"email": f"{unique().decode()}@example.org", "password": "long enough"}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_copy_of_the_index_of_a_stopped_server_has_everything(start, tmp_path, workers):
    running = start("--workers", workers)
    answers = together(3, lambda _: running.call("POST", REGISTER, an_account()))
    assert {status for status, _ in answers} == {201}
    running.stop()
    left = {path.name for path in running.data.glob("index.*")}
    assert left == {"index.sqlite3", "index.sqlite3-spare"}
    copy = shutil.copy(running.data / "index.sqlite3", tmp_path)
    with contextlib.closing(sqlite3.connect(copy)) as index:
        assert index.execute("SELECT count(*) FROM user").fetchone() == (3,)


def test_a_wal_that_its_processes_left_to_each_other_is_folded_in(tmp_path):
    left = tmp_path / "left"
    left.mkdir()
    with contextlib.closing(ms.open_index(tmp_path / "index")) as index:
        index.set_meta("key", "value")
        for part in tmp_path.glob("index*"):
            shutil.copy(part, left)
    assert (left / "index-wal").stat().st_size
    ms.checkpoint_index(left / "index")
    assert not (left / "index-wal").exists()
    with contextlib.closing(ms.Index(left / "index", query_only=True)) as index:
        assert index.get_meta("key") == "value"
    ms.checkpoint_index(tmp_path / "none" / "index")  # as after a disk that went


def test_lists_are_made_anew_for_what_they_show_and_for_nothing_else(tmp_path):
    with contextlib.closing(ms.apply_migrations(ms.Index(tmp_path / "index"))) as index:
        facts = ms.Facts("image", "image/png", "png")
        asset = ms.Asset("0" * 64, 1, facts)
        own = ms.File("library", "a.png", asset.sha256, 1, 2, 3.0, 4.0)
        seen = [index.files.library_version()]

        def changes(apply: Callable[[ms.Database], Any]) -> bool:
            index.write(apply)
            seen.append(index.files.library_version())
            return seen[-1] != seen[-2]

        assert changes(lambda db: index.files.put(db, own, asset))
        assert changes(lambda db: index.files.put(db, own._replace(mtime_ns=9), asset))
        assert not changes(lambda db: index.files.put(db, own._replace(root="images"), asset))
        index.login_failures.begin("attempt", {"name": 5}, 0.0)
        index.assets.set_thumbnail(asset.sha256, made=True)
        assert not changes(lambda db: index.users.add(db, an_account(), 0.0))
        assert changes(lambda db: index.files.remove(db, "library", own.path))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # unclosed files
def test_the_lists_that_are_asked_for_most_are_kept_whoever_asks_for_others(tmp_path):
    made = Counter()
    with contextlib.closing(ms.apply_migrations(ms.Index(tmp_path / "index"))) as index:
        listing = ms.Listing(tmp_path)

        def ask(key: str) -> None:
            def pieces() -> Iterator[str]:
                made[key] += 1
                yield f'"{key}"'

            content = listing.find(index, key) or listing.make(index, key, pieces, zipped=False)
            assert os.pread(content.source.fileno(), 99, 0).decode() == f'"{key}"'
            content.source.close()

        for number in range(100):
            for key in ("http://nas/media", "https://photos.example/media", f"http://{number}"):
                ask(key)
        assert made["http://nas/media"] < 5
        assert made["https://photos.example/media"] < 5
        for _ in range(2 * ms.MAX_VOTES):  # and who is no more asked for gives way
            for key in "abcd":
                ask(key)
        assert max(made[key] for key in "abcd") < 2 * ms.MAX_VOTES
        assert len(listing._made) <= ms.MAX_LISTINGS
        for _, content in listing._made.values():
            content.source.close()


def test_rows_of_a_clock_that_was_wrong_close_no_account(tmp_path):
    with contextlib.closing(ms.apply_migrations(ms.Index(tmp_path / "index"))) as index:
        failures, limits, later, now = index.login_failures, {"name": 2}, 2e9, 1e9
        for number in range(2):
            assert failures.begin(f"{number}", limits, later)
            failures.end(f"{number}", None)
        assert failures.retry_after(limits, later)
        assert not failures.retry_after(limits, now)
        assert failures.begin("now", limits, now)
        failures.end("now", None)
        assert not failures.retry_after(limits, now + 1)


def test_what_a_clock_that_was_wrong_has_written_keeps_no_file_and_nobody_out(start, tmp_path):
    need("faketime")
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    wrong = {"LD_PRELOAD": str(library), "FAKETIME": "+2y", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    fill(tmp_path / "pictures", {"old.png": png(), "kept.png": (kept := png())})
    running = start(**wrong)
    running.scanned()
    assert time.time() + 1e7 < running.get("/health").json["scan"]["finished_at"]
    user = User(running)
    assert owner_says(running, "user", "disable", user.email, **wrong).returncode == 0
    running.stop()
    (running.storage / "old.png").unlink()
    again = start()
    again.scanned()
    assert set(again.listed()) == {sha256(kept)}
    assert owner_says(again, "user", "enable", user.email).returncode == 0
    user.headers = {"Authorization": f"Bearer {user.on(again).login()[1]['access']}"}
    assert user.call("GET", "/api/auth/profile/")[0] == 200


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("folder", [".", "gone"])
def test_a_list_lies_in_its_folder_or_in_memory(tmp_path, folder, zipped):
    pieces = ["[", *(f'"{number}",' for number in range(9999)), "0]"]
    content = ms.write_listing(lambda: iter(pieces), tmp_path / folder, zipped=zipped)
    with content.source as file:
        data = os.pread(file.fileno(), content.size, 0)
    assert (gzip.decompress(data) if zipped else data) == "".join(pieces).encode()
    assert content.sha256 == sha256(data)


def test_without_a_temporary_folder_lists_are_answered_all_the_same(start, tmp_path):
    with ms.write_listing(lambda: iter(["[]"]), tmp_path / "gone", zipped=True).source as file:
        assert os.pread(file.fileno(), 99, 0) == b"[]"
    running = start(tmpdir="/nowhere")
    running.upload(png())
    assert running.get("/media").json["count"] == len(running.listed()) == 1


def test_a_lost_index_is_rebuilt_from_disk(start):
    running = start()
    content = png()
    name = running.upload(content).json["filename"]
    running.stop()
    for file in running.data.glob("index.sqlite3*"):
        file.unlink()
    again = start()
    again.scanned()
    assert again.get(f"/media/{name}").body == content
    assert again.get("/media").json["count"] == 1


def memory(pid: int, name: str) -> int:
    """Bytes of a process in memory: now (VmRSS) or at most until now (VmHWM; proc(5))."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        pytest.skip("needs /proc")
    return int(re.search(name + r":\s+(\d+) kB", status.read_text())[1]) * 1024


def test_memory_does_not_grow_with_the_size_of_a_file(start):
    running = start(max_upload_bytes="300000000")
    running.scanned()
    running.upload(png())
    before = memory(running.process.pid, "VmHWM")
    size = 200_000_000
    beginning = png()
    head, body = upload_request(beginning)
    start_of_body, end_of_body = body.split(beginning)
    head = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % (len(body) + size), head)
    block = bytes(1_000_000)
    with Raw(running) as raw:
        raw.send(head + start_of_body + beginning)
        for _ in range(size // len(block)):
            raw.send(block)
        raw.send(end_of_body)
        made = raw.answer()
        assert (made.status, made.json["size"]) == (201, len(beginning) + size)
        raw.send(get_line(f"/media/{made.json['filename']}"))
        assert b" 200 " in raw._take_to(b"\r\n\r\n")
        left = made.json["size"] - len(raw.received)
        while left > 0:
            left -= len(raw.socket.recv(1 << 20))
    assert memory(running.process.pid, "VmHWM") - before < 32 * 2**20


# ======================================================================================
# 11. Routing
# ======================================================================================


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/upload", "OPTIONS, POST, PUT"),
        ("PUT", "/media", "GET, HEAD, OPTIONS"),
        ("POST", "/media/a.png", "DELETE, GET, HEAD, OPTIONS"),
        ("DELETE", "/image/a.png", "GET, HEAD, OPTIONS, PUT"),
        ("POST", f"/image/{'0' * 64}", "GET, HEAD, OPTIONS, PUT"),
        ("PATCH", "/list", "GET, HEAD, OPTIONS"),
        ("DELETE", "/entity/", "GET, HEAD, OPTIONS, POST"),
        ("BREW", "/health", "GET, HEAD, OPTIONS"),
        ("get", "/health", "GET, HEAD, OPTIONS"),
    ],
)
def test_a_method_that_is_not_possible_is_405_with_those_that_are(server, method, path, allow):
    answer = server.request(method, path)
    assert answer.status == 405
    assert ", ".join(sorted(answer.headers["Allow"].split(", "))) == allow
    assert set(answer.json) == {"detail"}


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/health/", 200), ("/media/", 200), ("/list/", 200), ("/%68ealth", 200),
        ("/health?x=y", 200), ("/health?", 200), ("http://elsewhere:99/health", 200),
        ("/health//", 404), ("//health", 404), ("/Health", 404), ("/nothing", 404),
        ("/nothing/at/all", 404), ("/health%00", 404), ("/health%2F", 404), ("/%ff", 400),
        ("/image/%ED%A0%80.png", 400), ("/health?token=%ff", 401), ("/media?page=%ff", 400),
        ("/media/" + "a" * 5000, 404),
        ("/../health", 404), ("/%2e%2e/%2e%2e/etc/passwd", 404),
        ("/image/a%2Fb.png", 404),  # no name has a separator
    ],
)  # fmt: skip
def test_a_path_is_found_as_it_is_meant(server, path, status):
    with Raw(server) as raw:
        raw.send(get_line(path))
        assert raw.answer().status == status


@pytest.mark.parametrize(
    ("name", "status"), [("a%00.png", 404), ("%ff.png", 400), ("%ED%A0%80.png", 400)]
)
def test_put_with_nul_or_a_broken_name_stores_nothing(server, name, status):
    before = files_below(server.storage)
    assert server.put(f"/image/{name}", png()).status == status
    assert files_below(server.storage) <= before


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"{}", "application/json", 415),
        (b"a=b", "application/x-www-form-urlencoded", 415),
        (b"\x89PNG", "image/png", 415),
        (b"x", "", 415),
        (None, "multipart/form-data; boundary=frontier", 400),
        (b"", "", 400),
        (b"no boundary", "multipart/form-data", 400),
        (b"x", f"multipart/form-data; boundary={'b' * 71}", 400),
        (form("a.png", b"x", "other")[0], form("", b"")[1], 400),
        (form("a.png", png())[0][:-20], form("", b"")[1], 400),
        (form("a\0.png", png())[0], form("", b"")[1], 400),
        (form("", b"")[0], form("", b"")[1], 400),
        (form(None, png())[0], form("", b"")[1], 400),
        (form("a.png", png())[0][:-14] + form("b.png", png())[0], form("", b"")[1], 400),
        (form(None, bytes(1 << 20) + b"x", "note")[0], form("", b"")[1], 413),
        (form(None, b"", "note")[0][:-14] * 1001 + b"--frontier--", form("", b"")[1], 413),
    ],
)
@pytest.mark.parametrize("path", ["/upload", "/upload-image"])
def test_a_body_that_is_no_upload_is_refused_and_leaves_nothing(
    server, body, content_type, status, path
):
    before = files_below(server.storage)
    headers = {**OWNER, **({"Content-Type": content_type} if content_type else {})}
    answer = server.request("POST", path, body, headers)
    assert answer.status == status, answer.body
    assert set(answer.json) == {"detail"}
    assert files_below(server.storage) <= before


@pytest.mark.parametrize(
    ("path", "stored"),
    [
        ("/image/", "photo of you.png"),  # to which curl adds the file's name
        ("/image/named.png", "named.png"), ("/image/named", "named.png"),
        ("/image/named.tiff", "named.tiff.png"), ("/image?x=/y", "image.png"),
        ("/upload", "[0-9a-f]{32}.png"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "header", ["X: y", "Transfer-Encoding: chunked", "Content-Type: image/png"]
)
def test_a_body_that_is_the_file_itself_is_stored_as_curl_sends_it(
    server, tmp_path, path, stored, header
):
    photo = tmp_path / "photo of you.png"
    photo.write_bytes(png_of(20_000))
    url = f"{server.url}{path}{'&' if '?' in path else '?'}token={upload_token()}"
    command = [need("curl"), "-sS", "-H", header, "-T", photo, url]
    made = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    stem, extension = os.path.splitext(stored)
    assert re.fullmatch(rf"{stem}(_\d+)?\{extension}", made["filename"])
    assert made["sha256"] == sha256(photo.read_bytes())


@pytest.mark.parametrize("path", ["/image/a.png", "/upload"])
@pytest.mark.parametrize(
    ("body", "chunked", "status", "words"),
    [
        (b"", False, 400, 'field "file" or the file itself'), (b"", True, 400, "file is empty"),
        *((b"no picture", chunked, 400, "none of: ") for chunked in (False, True)),
        *((png_of(30_001), chunked, 413, "30000 bytes (MAX_UPLOAD_") for chunked in (False, True)),
    ],
)  # fmt: skip
def test_a_body_that_is_no_picture_or_too_large_is_refused_and_leaves_nothing(
    small, path, body, chunked, status, words
):
    before = files_below(small.storage)
    sent = iter([body]) if chunked else body
    answer = small.request("PUT", f"{path}?token={upload_token()}", sent)
    assert (answer.status, words in answer.json["detail"]) == (status, True), answer.json
    assert files_below(small.storage) == before


def test_a_body_without_a_form_needs_a_credential_as_well(small):
    assert small.request("PUT", "/image/a.png", png()).status == 401


@pytest.mark.parametrize("query", ["", f"&version={10**30}", f"&filter_param=parent_id={10**30}"])
def test_a_page_far_beyond_the_last_is_empty_and_told_as_it_was_asked(server, query):
    answer = server.get(f"/entity/?page={10**30}{query}").json
    assert (answer["items"], answer["pagination"]["page"]) == ([], 10**30)


def test_a_page_of_media_far_beyond_the_last_is_empty(server):
    assert server.get(f"/media?page={10**30}").json["files"] == []


@pytest.mark.parametrize("name", ["1e999", "-1e999"])
def test_a_number_without_an_end_is_no_name(server, jane, name):
    body = f'{{"name": {name}, "type": "image"}}'.encode()
    headers = {**jane.headers, "Content-Type": "application/json"}
    answer = server.request("POST", MEDIA, body, headers)
    assert (answer.status, set(answer.json)) == (400, {"name"})


@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded"])
def test_a_text_is_no_file_in_any_kind_of_body(server, jane, kind):
    values = {"name": "a", "type": "image", "file": "x"}
    body = (json.dumps if "json" in kind else urlencode)(values).encode()
    answer = server.request("POST", MEDIA, body, {**jane.headers, "Content-Type": kind})
    assert (answer.status, set(answer.json)) == (400, {"file"})


@pytest.mark.parametrize("chosen_first", [True, False])
def test_a_part_in_which_no_file_was_chosen_is_none(server, chosen_first):
    parts = [form("a.png", png(12, 9)), form("", b"")]
    first, second = (body for body, _ in (parts if chosen_first else parts[::-1]))
    body = first.removesuffix(b"--frontier--\r\n") + second
    answer = server.request("POST", "/upload", body, {**OWNER, "Content-Type": parts[0][1]})
    assert (answer.status, answer.json["size"]) == (201, len(png(12, 9)))


MESSAGES = [  # what is wrong: method, path, type and body, and words of what is to be done
    ("POST", "/upload", "application/json", b"{}", 415, ["application/json", 'field "file"']),
    ("POST", "/upload", "text/plain", b"x", 415, ["text/plain", "multipart/form-data"]),
    ("PUT", "/upload", "text/plain", b"x", 415, ["multipart/form-data", "itself as the body"]),
    ("POST", "/upload", None, None, 411, ['field "file"', "Content-Length"]),
    ("POST", "/upload-image", "multipart/form-data; boundary=frontier", form("x", None)[0], 400,
     ["file", "is required", "multipart/form-data"]),
    ("POST", "/upload", "multipart/form-data; boundary=frontier", form("a.png", b"")[0], 400,
     ["is empty"]),
    ("POST", "/upload", "multipart/form-data; boundary=frontier", form("a.heic", b"x")[0], 400,
     ["must end in one of", "/api/media/media/"]),
    ("POST", "/entity/", "multipart/form-data; boundary=frontier",
     form("a.png", b"", "image")[0], 400, ["is empty"]),
    ("GET", "/entity/999", None, None, 404, ["There is no entity 999."]),
    ("GET", "/entity/999?version=2", None, None, 404, ["no entity 999 with a version 2."]),
    ("GET", f"/entity/999?version={10**30}", None, None, 404, [f"a version 1{'0' * 30}."]),
    ("GET", f"/entity/999?version=-{10**30}", None, None, 404, [f"a version -1{'0' * 30}."]),
    *[("POST", "/shares", "application/json", text, 400, [f"not {kind}"])
      for text, kind in ((b"[]", "a list"), (b"null", "null"), (b"1.5", "a number"))],
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "kind", "body", "status", "words"), MESSAGES)
def test_what_is_refused_is_told_what_to_do(server, method, path, kind, body, status, words):
    headers = {**OWNER, **({"Content-Type": kind} if kind else {})}
    with Raw(server) as raw:
        length = {} if body is None else {"Content-Length": str(len(body))}
        fields = "".join(f"{k}: {v}\r\n" for k, v in {**headers, **length}.items())
        raw.send(f"{method} {path} HTTP/1.1\r\nHost: a\r\n{fields}\r\n".encode() + (body or b""))
        answer = raw.answer()
    assert answer.status == status
    assert [word for word in words if word not in answer.json["detail"]] == [], answer.json


@pytest.mark.parametrize(
    ("path", "field", "bound"),
    [
        ("/upload", "file", "3 MB (MAX_UPLOAD_BYTES)"),
        ("/entity/", "image", "2.5 MB (MAX_MEDIA_BYTES)"),
    ],
)
def test_what_is_too_large_is_told_the_bound_in_megabytes_and_its_setting(
    start, path, field, bound
):
    running = start(max_upload_bytes=str(3 << 20), max_media_bytes=str(5 << 19))
    body, content_type = form("a.png", png_of(4 << 20), field)
    headers = {**OWNER, "Content-Type": content_type}
    sent = (body, iter([body]))  # with a length, and chunked
    answers = [running.request("POST", path, each, headers) for each in sent]
    assert [(answer.status, bound in answer.json["detail"]) for answer in answers] == [
        (413, True)] * 2  # fmt: skip


def test_other_fields_beside_the_file_are_passed_over(server):
    note = form(None, b"about it", "note")[0][:-14]
    body, content_type = form("a.png", png())
    answer = server.request(
        "POST", "/upload", note + body, {"Content-Type": content_type, **OWNER}
    )
    assert answer.status == 201


def test_options_says_what_is_possible_and_lets_a_browser_in(server):
    answer = server.request("OPTIONS", "/image/a.png")
    assert answer.status == 204
    assert answer.headers["Allow"] == "GET, HEAD, OPTIONS, PUT"
    asked = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "PUT",
        "Access-Control-Request-Headers": "authorization, x-own",
    }
    answer = server.request("OPTIONS", "/image/a.png", headers=asked)
    assert answer.status == 204
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert "PUT" in answer.headers["Access-Control-Allow-Methods"]
    assert "authorization" in answer.headers["Access-Control-Allow-Headers"].lower()
    assert "x-own" in answer.headers["Access-Control-Allow-Headers"]
    assert server.request("OPTIONS", "/nothing").status == 404
    with Raw(server) as raw:
        raw.send(get_line("*", method="OPTIONS"))
        assert raw.answer("HEAD").status == 204


@pytest.mark.parametrize("path", ["/health", "/nothing", f"/image/{'0' * 64}"])
def test_a_browser_may_show_any_answer_to_any_page(server, path):
    answer = server.get(path, Origin="https://app.example")
    assert answer.headers["Access-Control-Allow-Origin"] == "*"


def test_origins_can_be_named_or_turned_off(start, tmp_path):
    asked = {"Access_Control_Request_Method": "PUT"}
    named = start(cors_allow_origins="https://A.example, https://b.example")
    path = f"/media/{named.upload(png()).json['filename']}"
    origins = ["https://a.example", "https://c.example"] * 2
    answers = [named.get(path, Origin=origin).headers for origin in origins]
    assert [each["Access-Control-Allow-Origin"] for each in answers] == [origins[0], None] * 2
    assert [each["Vary"] for each in answers if "Origin" not in each["Vary"]] == []
    off = start(cors_allow_origins="", storage=str(tmp_path / "off"))
    asked["Origin"] = "https://a.example"
    ways = (("GET", "/health"), ("GET", "/nothing"), ("OPTIONS", "/media"))
    answers = [off.request(*way, headers=asked) for way in ways]
    names = {name for answer in answers for name in answer.headers}
    assert [name for name in names if name.startswith("Access-Control")] == []


def test_long_json_is_gzipped_for_those_who_take_it_and_nothing_else(server):
    made = [server.upload(png_of(3000)).json for _ in range(12)].pop()
    plain = server.get("/media?page_size=12&page=1")
    assert plain.headers["Content-Encoding"] is None
    assert "Accept-Encoding" in plain.headers["Vary"]
    packed = server.get("/media?page_size=12&page=1", Accept_Encoding="br, gzip")
    assert packed.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed.body) == plain.body
    assert len(packed.body) < len(plain.body)
    plain = [("/health", "gzip"), (f"/media/{made['filename']}", "gzip"), ("/list", "gzip;q=0")]
    answers = [server.get(path, Accept_Encoding=accepted) for path, accepted in plain]
    assert [answer.headers["Content-Encoding"] for answer in answers] == [None] * 3


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/nothing", {}), ("GET", "/image/x", {}), ("GET", "/media/..%2f..%2fx.png", {}),
        ("POST", "/upload", {}), ("POST", "/upload?token=bad", {}), ("GET", "/media?page=x", {}),
    ],
)  # fmt: skip
def test_answers_are_utf_8_json_with_a_sentence_for_an_error_and_no_secret(
    server, method, path, headers
):
    answer = server.request(method, path, headers=headers)
    assert answer.headers["Content-Type"].startswith("application/json")
    detail = answer.json["detail"]
    assert isinstance(detail, str) and detail != ""
    secrets = (OWNER_KEY, UPLOAD_SECRET, JWT_KEY, str(server.storage))
    assert [secret for secret in secrets if secret in answer.body.decode()] == []


FORWARDED = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "photos.example"}


def test_urls_are_as_the_client_reaches_the_server(start, server, tmp_path):
    untrusting = start(trusted_proxies="10.0.0.0/8")
    fixed = start(public_url="https://p.example/pics/", storage=str(tmp_path / "fixed"))

    def bases(running: Server, headers: Mapping[str, str]) -> set[str]:
        fields = {**OWNER, **headers}
        media = running.send_file("POST", "/upload", png(), headers=fields)
        url, location = media.json["url"], media.headers["Location"]
        image = running.send_file("POST", "/upload-image", png(), headers=fields).json["image_url"]
        listed = running.request("GET", "/media", headers=headers).json["files"][0]["url"]
        base = url.partition("/media/")[0]
        assert urljoin(f"{base}/upload", location) == url
        return {base, image.partition("/image/")[0], listed.partition("/media/")[0]}

    assert bases(server, {"Host": "nas:8000"}) == {"http://nas:8000"}
    assert bases(server, FORWARDED) == {"https://photos.example"}
    odd = {"X-Forwarded-Proto": "javascript", "Host": "nas"}
    assert bases(server, odd) == {"http://nas"}
    assert bases(untrusting, {**FORWARDED, "Host": "nas"}) == {"http://nas"}
    assert bases(fixed, FORWARDED) == {"https://p.example/pics"}


def test_the_main_ways_go_through_no_more_functions_than_the_file_says_at_its_head(
    settings_of, tmp_path
):
    """From the head to the answer; comprehensions are functions before Python 3.12."""
    drawing = Path(ms.__file__).read_text("utf-8").partition("\nfrom ")[0].partition("\n# ")[2]
    most = {name: int(count) for name, count in re.findall(r"(\w[\w ]*), (\d+)", drawing)}
    assert drawing.count("\n#") < 15
    settings = settings_of(f"--storage_dir={tmp_path}", "--auth_disabled=true")
    ms.make_folders(settings)
    with ms.opened_app(settings) as app:
        application = ms.Dispatcher(app, ms.ROUTES)
        calls: Counter[str] = Counter()

        def count(frame: Any, event: str, _: object) -> None:
            name = frame.f_code.co_name
            if event == "call" and frame.f_code.co_filename == ms.__file__ and "comp>" not in name:
                calls[name] += 1

        def run(message: bytes, status: int) -> int:
            head, _, body = message.partition(b"\r\n\r\n")
            request = ms.parse_request_head(head)
            calls.clear()
            sys.setprofile(count)
            try:
                exchange = application(request, "127.0.0.1")
                if body:
                    exchange.feed(memoryview(body))
                    exchange = exchange.finish()
            finally:
                sys.setprofile(None)
            assert exchange.status == status
            return calls.total()

        def send(path: str, field: str, **texts: str) -> bytes:
            body, content_type = form("a.png", png(), field, **texts)
            return post(path, len(body), f"Content-Type: {content_type}") + body

        def cold(path: str) -> bytes:
            app.hot.clear()
            return get_line(path)

        fill(tmp_path, {"media/a.png": png()})
        app.scanner.refresh(app.library, "media/a.png")
        ways = {
            "file": (200, lambda: cold("/media/a.png")),
            "hot file": (200, lambda: get_line("/media/a.png")),
            "upload": (201, lambda: send("/upload", "file")),
            "entity": (201, lambda: send("/entity/", "image", is_collection="false")),
            "accounts": (200, lambda: get_line("/api/media/media/")),
        }
        found = {
            name: min(run(make(), status) for _ in range(4))  # garbage may be collected in one
            for name, (status, make) in ways.items()
        }
    assert found.keys() == most.keys()
    assert {name: count for name, count in found.items() if count > most[name]} == {}


# ======================================================================================
# 12. Families
# ======================================================================================
# -- media: public image host ------------------------------------------------------------

MEDIA_SAMPLES = [
    ("jpg", jpeg, "image/jpeg"), ("jpeg", jpeg, "image/jpeg"), ("png", png, "image/png"),
    ("gif", gif, "image/gif"), ("webp", webp, "image/webp"), ("svg", svg, "image/svg+xml"),
    ("bmp", bmp, "image/bmp"), ("PNG", png, "image/png"),
    ("jpg", png, "image/png"),  # the name only has to be allowed
    ("svg", gif, "image/gif"),
]  # fmt: skip


@pytest.mark.parametrize(("extension", "make", "mime_type"), MEDIA_SAMPLES)
def test_an_upload_is_served_as_what_its_content_is(server, extension, make, mime_type):
    content = make()
    made = server.upload(content, f"my photo.{extension}")
    assert made.status == 201
    value = made.json
    assert re.fullmatch(rf"[0-9a-f]{{32}}\.{extension.lower()}", value["filename"])
    assert value == {
        "url": f"{server.url}/media/{value['filename']}",
        "filename": value["filename"],
        "size": len(content),
        "content_type": mime_type,
        "sha256": sha256(content),
    }
    answer = server.get(f"/media/{value['filename']}")
    assert (answer.status, answer.body) == (200, content)
    headers = answer.headers
    assert headers["Content-Type"] == mime_type
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["ETag"] == f'"{sha256(content)}"'
    assert headers["Accept-Ranges"] == "bytes"
    assert headers["Cache-Control"] == "public, max-age=3600"
    assert abs(ms.parse_date(headers["Last-Modified"]) - time.time()) < DEADLINE
    assert (server.storage / "media" / value["filename"]).read_bytes() == content
    by_hash = server.get(f"/image/{sha256(content)}")  # part of the library, too
    assert by_hash.body == content
    assert by_hash.headers["Cache-Control"] == "public, max-age=31536000, immutable"


@pytest.mark.parametrize(
    ("filename", "content"),
    [
        ("a.txt", png), ("a.png.exe", png), ("a.mp4", png), ("a", png), ("png", png),
        (".png", b"no image"), ("a.png", b""), ("a.png", b"hello"), ("a.jpg", mp4),
        ("a.svg", b"<html><script>alert(1)</script></html>"),
        ("a.svg", b"<!doctype html><svg></svg>"), ("a.png", b"II*\0\x08\0\0\0\0\0\0\0\0\0"),
        ("a.png", b"%PDF-1.7"), ("a.png", b"MZ" + bytes(100)),
    ],
)  # fmt: skip
def test_what_is_no_image_by_name_or_content_is_400_and_leaves_nothing(server, filename, content):
    before = files_below(server.storage)
    answer = server.upload(content() if callable(content) else content, filename)
    assert answer.status == 400
    assert set(answer.json) == {"detail"}
    assert files_below(server.storage) <= before


def seconds_of(text: str) -> float:
    """Unix seconds of a time in JSON."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def files_below(folder: Path) -> set[str]:
    """Every file but those of the server itself and thumbnails, also those on their way in.

    Of a server that others use, too, what they have begun may go at any time: compare by `<=`.
    """
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and not {".mediaserver", ".thumbnails"} & set(path.parts)
    }


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/upload"), ("PUT", "/image/a.png"), ("POST", "/upload-image")]
)
def test_the_size_limit_counts_the_file_and_not_the_request(small, method, path):
    assert small.send_file(method, path, png_of(30_000)).status == 201
    before = files_below(small.storage)
    answer = small.send_file(method, path, png_of(30_001))
    assert (answer.status, "30000" in answer.json["detail"]) == (413, True)
    assert files_below(small.storage) == before


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes 30,000 bytes at most."""
    with Server(tmp_path_factory.mktemp("small") / "p", MAX_UPLOAD_BYTES="30000") as running:
        yield running


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, list[str]]]:
    """A server with five public uploads, and their names, the newest first."""
    with Server(tmp_path_factory.mktemp("five") / "pictures") as running:
        names = [running.upload(png()).json["filename"] for _ in range(5)]
        yield running, names[::-1]


def test_the_list_is_newest_first(five):
    running, names = five
    listed = running.get("/media").json
    assert set(listed) == {"count", "files"}
    assert [item["filename"] for item in listed["files"]] == names
    first = listed["files"][0]
    assert set(first) == {"filename", "url", "size", "content_type", "uploaded_at"}
    assert first["url"] == f"{running.url}/media/{names[0]}"
    assert first["content_type"] == "image/png"
    stored = (running.storage / "media" / names[0]).stat().st_mtime
    assert abs(first["uploaded_at"] - stored) < DEADLINE


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("page=1&page_size=2", slice(2)), ("page=2&page_size=2", slice(2, 4)),
        ("page=3&page_size=2", slice(4, 5)), ("page=4&page_size=2", slice(0)),
        ("page=999999999999999999", slice(0)), ("page_size=5000", slice(5)),
        ("page_size=3", slice(3)), ("page=1", slice(5)),
    ],
)  # fmt: skip
def test_the_list_is_paged(five, query, shown):
    running, names = five
    value = running.get(f"/media?{query}").json
    assert value["count"] == 5
    assert [item["filename"] for item in value["files"]] == names[shown]


@pytest.mark.parametrize("query", ["page=x", "page=", "page_size=1.5", "page=0", "page_size=-1"])
def test_a_page_of_the_list_that_cannot_be_is_400(server, query):
    assert server.get(f"/media?{query}").status == 400


def test_nothing_is_changed_that_is_not_what_the_request_is_about(start):
    running, long_ago = start(auth_disabled="true"), "Thu, 01 Jan 1970 00:00:00 GMT"
    image = running.upload(png()).json
    tag = f'"{image["sha256"]}"'
    things = {f"/media/{image['filename']}": ["DELETE"]}
    made = running.send_file("POST", "/entity/", b"", None, is_collection="true").json
    things[f"/entity/{made['id']}"] = ["PUT", "PATCH", "DELETE"]
    for path in ("/api/media/media/", "/api/media/collections/"):
        _, made = running.call("POST", path, {"name": "a", "type": "image"})
        things[f"{path}{made['id']}/"] = ["PUT", "PATCH", "DELETE"]
    for path, methods in things.items():
        is_file = path.startswith("/media/")
        wrong = [
            {"If-Match": '"0"'}, {"If-Match": f'W/{tag}, "0"'}, {"If-Unmodified-Since": long_ago},
            {"If-None-Match": "*"}, {"If-Match": "*", "If-None-Match": "*"},
            *([{"If-None-Match": f'"0", W/{tag}'}] if is_file else []),
        ]  # fmt: skip
        asked = {path: 412, f"{path.rstrip('/')}0/": 404}
        for target, method, condition in itertools.product(asked, methods, wrong):
            status = running.request(method, target, headers=condition).status
            assert status == asked[target], (method, target, condition)
        shown = running.get(path)
        assert (shown.status, shown.headers["ETag"]) == (200, tag if is_file else None)
        right = {"If-Match": tag if is_file else "*", "If-None-Match": '"0"',
                 "If-Unmodified-Since": long_ago}  # fmt: skip
        gone = [running.request("DELETE", path, headers=right).status for _ in range(2)]
        assert gone == [204 if path.startswith("/api/") else 200, 404]


def test_a_deleted_image_is_gone_from_everywhere(server):
    content = png()
    name = server.upload(content).json["filename"]
    assert server.get(f"/media/{name}").status == 200
    assert server.request("DELETE", f"/media/{name}").status == 401
    assert server.request("DELETE", f"/media/{name}", headers=READER).status == 403
    answer = server.request("DELETE", f"/media/{name}?token={upload_token()}")
    assert (answer.status, answer.json) == (200, {"deleted": name})
    asked = {method: server.request(method, f"/media/{name}", headers=OWNER).status
             for method in ("DELETE", "GET", "HEAD")}  # fmt: skip
    assert asked == {"DELETE": 404, "GET": 404, "HEAD": 404}
    assert server.get(f"/image/{sha256(content)}").status == 404
    assert not (server.storage / "media" / name).exists()
    assert name not in str(server.get("/media").json)


@pytest.mark.parametrize(
    "name",
    ["..%2fsecret.png", "%2e%2e%2fsecret.png", "..", "%2e%2e", "a%00.png", ".incoming", "%5c"],
)
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_no_name_leads_out_of_the_media_folder(server, method, name):
    (server.storage / "secret.png").write_bytes(png())
    assert server.request(method, f"/media/{name}", headers=OWNER).status == 404
    assert (server.storage / "secret.png").exists()


def test_two_uploads_of_one_content_have_two_names_and_die_separately(server):
    content = png()
    first, second = (server.upload(content).json["filename"] for _ in range(2))
    assert first != second
    server.request("DELETE", f"/media/{first}", headers=OWNER)
    assert server.get(f"/media/{second}").body == content
    assert server.get(f"/image/{sha256(content)}").body == content


@pytest.fixture(scope="module", params=[1000, 300_000], ids=["small", "large"])
def served(request: pytest.FixtureRequest, server: Server) -> tuple[str, bytes]:
    """The path and content of a file; small ones are answered from memory the second time."""
    content = png_of(request.param)
    path = f"/media/{server.upload(content).json['filename']}"
    server.get(path)
    return path, content


@pytest.mark.parametrize(
    ("value", "first", "last"),
    [
        ("bytes=0-0", 0, 0), ("bytes=10-19", 10, 19), ("bytes=900-", 900, -1),
        ("bytes=-7", -7, -1), ("bytes=-9999999", 0, -1), ("BYTES=1-2", 1, 2),
        ("bytes=5-9999999", 5, -1),
    ],
)  # fmt: skip
def test_one_range_is_206(server, served, value, first, last):
    path, content = served
    size = len(content)
    first, last = first % size, last % size
    answer = server.get(path, Range=value)
    assert (answer.status, answer.body) == (206, content[first : last + 1])
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/{size}"
    head = server.request("HEAD", path, headers={"Range": value})
    assert (head.status, head.body) == (200, b"")  # RFC 9110, 14.2: of GET only


@pytest.mark.parametrize("value", ["bytes=9999999-", "bytes=-0", "bytes=9999999-,8888888-"])
def test_a_range_of_nothing_is_416(server, served, value):
    answer = server.get(served[0], Range=value)
    assert answer.status == 416
    assert answer.headers["Content-Range"] == f"bytes */{len(served[1])}"


@pytest.mark.parametrize("value", ["bytes=5-2", "bytes=a-b", "lines=1-2", "bytes"])
def test_what_is_no_range_is_passed_over(server, served, value):
    answer = server.get(served[0], Range=value)
    assert (answer.status, answer.body) == (200, served[1])


def test_several_ranges_are_one_multipart_answer(server, served):
    path, content = served
    answer = server.get(path, Range="bytes=0-4,100-109,-3")
    assert answer.status == 206
    kind, _, boundary = answer.headers["Content-Type"].partition("; boundary=")
    assert kind == "multipart/byteranges"
    parts = answer.body.split(b"--" + boundary.encode())[1:]
    assert parts.pop().strip() == b"--"
    seen = []
    for part in parts:
        head, _, data = part.partition(b"\r\n\r\n")
        assert b"Content-Type: image/png" in head
        seen.append((re.search(rb"bytes (\d+-\d+)/", head)[1], data.removesuffix(b"\r\n")))
    size = len(content)
    assert seen == [
        (b"0-4", content[:5]),
        (b"100-109", content[100:110]),
        (f"{size - 3}-{size - 1}".encode(), content[-3:]),
    ]


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (304, {"If_None_Match": "{etag}"}),
        (304, {"If_None_Match": '"x", W/{etag}'}),
        (304, {"If_None_Match": "*"}),
        (200, {"If_None_Match": '"x"'}),
        (200, {"If_None_Match": '"x"', "If_Modified_Since": "{modified}"}),
        (304, {"If_Modified_Since": "{modified}"}),
        (200, {"If_Modified_Since": "{before}"}),
        (200, {"If_Modified_Since": "yesterday"}),
        (412, {"If_Match": '"x"'}),
        (200, {"If_Match": "{etag}"}),
        (412, {"If_Unmodified_Since": "{before}"}),
        (206, {"Range": "bytes=0-1", "If_Range": "{etag}"}),
        (206, {"Range": "bytes=0-1", "If_Range": "{modified}"}),
        (200, {"Range": "bytes=0-1", "If_Range": '"x"'}),
        (200, {"Range": "bytes=0-1", "If_Range": "W/{etag}"}),
        (200, {"Range": "bytes=0-1", "If_Range": "{before}"}),
        (304, {"Range": "bytes=0-1", "If_None_Match": "{etag}"}),
        (200, {"Range": "bytes=9999999-", "If_Range": '"x"'}),
    ],
)
def test_conditions_are_kept_as_rfc_9110_says(server, served, status, headers):
    path, content = served
    etag, modified = f'"{sha256(content)}"', server.get(path).headers["Last-Modified"]
    before = ms.format_date(ms.parse_date(modified) - 10)
    known = {"etag": etag, "modified": modified, "before": before}
    headers = {name: value.format(**known) for name, value in headers.items()}
    answer = server.get(path, **headers)
    assert answer.status == status
    if status == 304:
        assert answer.body == b""
        assert answer.headers["ETag"] == etag
        assert answer.headers["Cache-Control"]
        assert answer.headers["Content-Type"] is None


def test_no_file_was_modified_after_its_answer_was_sent(start, tmp_path, pillow):
    content = png()
    fill(tmp_path / "pictures", {"future.png": content})
    os.utime(tmp_path / "pictures" / "future.png", (4e9, 4e9))
    running = start()
    running.scanned()
    for path in ("image", "thumbnail"):
        headers = running.get(f"/{path}/{sha256(content)}").headers
        assert ms.parse_date(headers["Last-Modified"]) <= ms.parse_date(headers["Date"])


@pytest.mark.parametrize("path", ["NAME", "/image/HASH", "/media", "/list", "/health", "/"])
def test_head_says_what_get_says_without_the_body(server, served, path):
    path = path.replace("NAME", served[0]).replace("HASH", sha256(served[1]))
    get, head = server.get(path), server.request("HEAD", path)
    assert (head.status, head.body) == (get.status, b"")
    varying = {"Date", "Content-Length"} if path in {"/health", "/"} else {"Date"}
    assert {k: v for k, v in head.headers.items() if k not in varying} == {
        k: v for k, v in get.headers.items() if k not in varying
    }


def test_an_svg_is_served_so_that_no_script_in_it_runs(server):
    content = svg("<script>document.documentElement.setAttribute('ran', 'yes')</script>")
    made = server.upload(content, "a.svg").json
    paths = (f"/media/{made['filename']}", f"/image/{made['sha256']}")
    (policy,) = {server.get(path).headers["Content-Security-Policy"] for path in paths}
    assert "default-src 'none'" in policy
    assert "sandbox" in policy
    assert "script-src" not in policy
    assert "allow-scripts" not in policy


def dump_page(url: str, home: Path) -> str:
    """The document that Chromium has when a page's scripts have run."""
    command = [
        need("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
        "--virtual-time-budget=5000", f"--user-data-dir={home}/profile", url,
    ]  # fmt: skip
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=RUN_SECONDS
    ).stdout


def test_chromium_runs_no_script_of_an_svg(server, tmp_path):
    script = "<script>document.documentElement.setAttribute('ran', 'yes')</script>"
    control = tmp_path / "control.svg"
    control.write_bytes(svg(script))
    made = server.upload(svg(script), "a.svg").json
    seen = [dump_page(url, tmp_path) for url in (control.as_uri(), made["url"])]
    assert ['ran="yes"' in page for page in seen] == [True, False]
    assert "<svg" in seen[1]


# -- library: scanned photo folder -------------------------------------------------------


def fill(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def names(server: Server) -> set[str]:
    """The paths of all entries below the folder."""
    return {
        str(Path(v["file_path"]).relative_to(server.storage)) for v in server.listed().values()
    }


def test_the_list_has_the_documents_fields(start, tmp_path):
    storage = tmp_path / "pictures"
    dated, plain = jpeg(date="2020:05:17 10:20:30"), jpeg()
    fill(storage, {"a.jpg": dated, "sub/ü b.jpg": plain, "film.insv": mp4(), "notes.txt": b"x"})
    described = jpeg_of((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + PACKET))
    fill(storage, {"xmp.insp": described})  # Insta360's names for an MP4 and a JPEG
    os.utime(storage / "a.jpg", (1e9, 1e9 + 0.25))
    running = start(tz="EST5")  # EXIF has the local time
    running.scanned()
    listed = running.listed()
    assert len(listed) == 4
    assert listed[sha256(described)]["original_creation_date"] == MADE
    assert listed[sha256(dated)] == {
        "filename": "a.jpg",
        "last_modified": 1e9 + 0.25,
        "file_path": str(storage / "a.jpg"),
        "original_creation_date": calendar.timegm((2020, 5, 17, 15, 20, 30)),
    }
    other = listed[sha256(plain)]
    status = (storage / "sub/ü b.jpg").stat()
    assert (other["filename"], other["file_path"]) == ("ü b.jpg", str(storage / "sub/ü b.jpg"))
    assert other["original_creation_date"] == pytest.approx(status.st_ctime)
    assert other["last_modified"] == pytest.approx(status.st_mtime)


def test_new_changed_moved_and_deleted_files_show_after_the_next_scan(start, tmp_path):
    storage, content = tmp_path / "pictures", {name: png() for name in "abcd"}
    fill(storage, {f"{name}.png": content[name] for name in "abc"})
    running = start()
    running.scanned()
    assert names(running) == {"a.png", "b.png", "c.png"}
    (storage / "a.png").write_bytes(content["d"])
    (storage / "later").mkdir()
    (storage / "b.png").rename(storage / "later" / "b2.png")
    (storage / "c.png").unlink()
    new = png()
    fill(storage, {"new.png": new})
    assert running.get(f"/image/{sha256(content['a'])}").status == 404  # changed: not the old one
    assert running.get(f"/image/{sha256(content['c'])}").status == 404
    running.rescan()
    assert names(running) == {"a.png", "later/b2.png", "new.png"}
    assert set(running.listed()) == {sha256(c) for c in (content["d"], content["b"], new)}
    assert running.get(f"/image/{sha256(content['b'])}").body == content["b"]
    gone = [running.get(f"/image/{sha256(content[name])}").status for name in "ac"]
    assert gone == [404, 404]


def test_an_edit_that_keeps_size_and_time_is_found_by_ctime(start, tmp_path):
    storage, first, second = tmp_path / "pictures", png(), png()
    fill(storage, {"a.png": first})
    running = start()
    running.scanned()
    status = (storage / "a.png").stat()
    (storage / "a.png").write_bytes(second)
    os.utime(storage / "a.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert running.get(f"/image/{sha256(first)}").status == 404
    running.rescan()
    assert set(running.listed()) == {sha256(second)}
    (storage / "a.png").chmod(0o640)  # ctime changes, the content does not
    assert running.get(f"/image/{sha256(second)}").body == second


def test_what_was_uploaded_is_not_read_again(start):
    running = start()
    name = running.upload(png()).json["filename"]
    with running.index() as db:
        ctime = db.execute("SELECT ctime FROM file").fetchone()[0]
    assert ctime == (running.storage / "media" / name).stat().st_ctime


def test_the_interval_rescans_by_itself(start):
    running = start("--rescan_interval", "0.2")
    running.scanned()
    fill(running.storage, {"late.png": png()})
    wait_until(lambda: names(running) == {"late.png"}, "the file to be found")


def test_equal_files_are_one_entry_under_the_path_whose_bytes_sort_first(start, tmp_path):
    storage, content = tmp_path / "pictures", png()
    fill(storage, dict.fromkeys(["b.png", "a/z.png", "a.png", "Z.png", "é.png"], content))
    running = start()
    for first in ("Z.png", "a.png", "a/z.png", "b.png", "é.png"):
        running.rescan()
        assert names(running) == {first}
        assert running.get(f"/image/{sha256(content)}").body == content
        (storage / first).unlink()
    fill(storage, {"other.png": png()})
    running.rescan()
    assert names(running) == {"other.png"}


@pytest.mark.parametrize("make_other", [os.mkdir, os.mkfifo])
def test_what_takes_the_place_of_a_file_that_is_read_often_is_not_opened_for_it(start, make_other):
    running = start()
    path = urlsplit(running.upload(png_of(2 * ms.HOT_FILE_BYTES)).json["url"]).path
    assert [running.get(path).status for _ in range(2)] == [200, 200]
    file = running.storage / "media" / path.rpartition("/")[2]
    file.unlink()
    make_other(file)
    assert [running.get(path).status for _ in range(2)] == [404, 404]
    assert opened_below(file, running.process.pid) == []


def test_hidden_files_excluded_folders_and_links_that_lead_out_are_passed_over(start, tmp_path):
    storage, outside = tmp_path / "pictures", tmp_path / "outside"
    fill(outside, {"secret.png": png()})
    inside = ["yes.png", "sub/yes.PNG", "uploads/yes.gif", "film/yes.mkv", "a.b/yes.flac"]
    hidden = [".no.png", ".git/no.png", "sub/.no/no.png", "no.txt", "no", "png", "no.png~"]
    apart = ["box/no.png", "ent/no.png", "db/no.png"]
    fill(storage, {name: png() for name in [*inside, *hidden, *apart]})
    (storage / "link.png").symlink_to(outside / "secret.png")
    (storage / "linked").symlink_to(outside)
    (storage / "loop").symlink_to(storage)
    os.mkfifo(storage / "pipe.png")
    running = start(
        upload_dir=str(storage / "box"),
        media_storage_dir=str(storage / "ent"),
        database_dir=str(storage / "db"),
    )
    running.scanned()
    assert names(running) == set(inside)
    assert running.get(f"/image/{sha256((outside / 'secret.png').read_bytes())}").status == 404


def test_names_that_are_no_utf_8_are_found_and_have_urls_that_work(start, tmp_path):
    media, content = tmp_path / "pictures" / "media", png()
    media.mkdir(parents=True)
    try:
        Path(os.fsdecode(os.fsencode(media) + b"/caf\xe9.png")).write_bytes(content)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    running = start()
    running.scanned()
    assert running.listed()[sha256(content)]["filename"] == "caf\ufffd.png"
    assert running.get(f"/image/{sha256(content)}").body == content
    (shown,) = running.get("/media").json["files"]
    assert running.get(urlsplit(shown["url"]).path).body == content


def test_names_of_files_are_utf_8_in_any_locale(start, tmp_path):
    fill(tmp_path / "pictures", {"日本.png": png()})
    locale = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    running = start(**locale)
    running.scanned()
    assert names(running) == {"日本.png"}
    content = png()
    answer = running.put("/image/%E6%97%A5.png", content)
    assert (answer.status, answer.json["filename"]) == (201, "日.png")
    assert running.store(content, "ü.png").status == 201
    assert running.get("/image/%C3%BC.png", **READER).body == content


@pytest.mark.parametrize("name", ["images", "users", "entities"])
def test_a_folder_of_the_servers_own_that_is_gone_is_degraded_until_it_is_back(start, name):
    running = start()
    running.scanned()
    assert running.store(png()).status == 201
    folder, away = running.data / name, running.data / "away"
    folder.rename(away)
    health = running.get("/health").json
    assert health["status"] == "degraded"
    assert health["problems"] == [f"Folders of the server that are not there: {name}."]
    assert not folder.exists()
    away.rename(folder)
    wait_until(lambda: running.get("/health").json["status"] == "ok")


def test_a_folder_that_is_empty_or_gone_keeps_the_index_and_is_degraded(start, tmp_path):
    storage, aside = tmp_path / "pictures", tmp_path / "aside"
    content = png()
    fill(storage, {"a.png": content})
    data = {"database_dir": str(tmp_path / "data")}
    running = start(**data)
    running.scanned()
    wait_until(lambda: running.get("/health").json["status"] == "ok")
    running.stop()
    shutil.rmtree(storage)
    storage.mkdir()
    running = start(**data)  # its disk is not mounted
    assert running.scanned()["status"] == "degraded"
    assert running.rescan()["status"] == "degraded"
    assert set(running.listed()) == {sha256(content)}
    running.stop()
    storage.rmdir()
    running = start(**data)
    assert running.scanned()["status"] == "degraded"
    assert set(running.listed()) == {sha256(content)}
    assert not storage.exists()
    fill(aside, {"a.png": content})
    aside.rename(storage)
    running.rescan()
    wait_until(lambda: running.get("/health").json["status"] == "ok")
    assert running.get(f"/image/{sha256(content)}").body == content


@pytest.mark.parametrize("apart", [True, False], ids=["data elsewhere", "data inside"])
def test_while_the_folder_is_gone_uploads_are_503_and_it_is_not_made(start, tmp_path, apart):
    running = start(**({"database_dir": str(tmp_path / "data")} if apart else {}))
    running.scanned()
    kept = f"/media/{running.upload(png_of(900)).json['filename']}"
    running.storage.rename(tmp_path / "away")
    assert running.request("DELETE", kept, headers=OWNER).status == 503
    answers = [running.upload(png()), running.put("/image/a.png", png())]
    assert [(answer.status, "Retry-After" in answer.headers) for answer in answers] == [
        (503, True)] * 2  # fmt: skip
    assert str(tmp_path) not in str([answer.json for answer in answers])
    assert not running.storage.exists()
    assert running.get("/health").json["status"] == "degraded"
    (tmp_path / "away").rename(running.storage)
    assert running.upload(png()).status == 201
    wait_until(lambda: running.get("/health").json["status"] == "ok")
    assert running.get(kept).status == 200
    assert running.request("DELETE", kept, headers=OWNER).status == 200


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    path = tmp_path / "no folder"
    path.touch()
    with path.open("rb") as file, pytest.raises(OSError) as caught, ms.opened(file.fileno()):
        pytest.fail("it is none")
    assert caught.value.filename == str(path)


def test_a_read_only_folder_is_503(start, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    running = start(database_dir=str(tmp_path / "data"))
    running.scanned()
    running.storage.chmod(0o500)
    try:
        assert running.upload(png()).status == 503
    finally:
        running.storage.chmod(0o700)


def test_a_full_disk_is_507_and_leaves_nothing(start, tmp_path):
    running = start(max_upload_bytes="50000000")
    running.scanned()
    limit = resource.RLIMIT_FSIZE  # the kernel then says EFBIG, much like ENOSPC
    if not hasattr(resource, "prlimit"):
        pytest.skip("needs prlimit")
    before = files_below(running.storage)
    for process in (running.process.pid, *worker_ids(running)):
        resource.prlimit(process, limit, (4_000_000, 4_000_000))
    large = png_of(5_000_000)
    answers = running.upload(large), running.put("/image/a.png", large), running.store(large)
    assert [answer.status for answer in answers] == [507] * 3
    assert files_below(running.storage) == before
    assert running.upload(png()).status == 201


# Disks that come and go, links, and folders of every kind


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[..., Path]]:
    """`mount(place)`: a tmpfs there; `mount(place, source)`: a bind mount. Root only."""
    if os.geteuid() != 0 or subprocess.run(["mount", "--version"], check=False).returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("only root may mount")
    mounted: list[Path] = []

    def make_mount(place: Path, source: Path | None = None) -> Path:
        place.mkdir(parents=True, exist_ok=True)
        options = ["--bind", source] if source else ["-t", "tmpfs", "-o", "size=16m", "tmpfs"]
        done = subprocess.run(["mount", *options, place], capture_output=True, check=False)
        if done.returncode:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(done.stderr.decode())
        mounted.append(place)
        return place

    yield make_mount
    for place in reversed(mounted):
        subprocess.run(["umount", "-l", place], capture_output=True, check=False)


@contextlib.contextmanager
def hanging(place: Path) -> Iterator[None]:
    """A file system whose server has stopped: all that looks at it waits, until this ends."""
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("only root may mount, and needs FUSE")
    channel = os.open("/dev/fuse", os.O_RDWR)
    try:
        options = f"fd={channel},rootmode=40000,user_id=0,group_id=0"
        command = ["mount", "-i", "-t", "fuse", "-o", options, "hangs", place]
        done = subprocess.run(command, pass_fds=[channel], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(done.stderr.decode())
        yield
    finally:
        os.close(channel)
        subprocess.run(["umount", "-l", place], capture_output=True, check=False)


def test_a_disk_that_hangs_holds_up_neither_health_nor_accounts(start, tmp_path):
    running = start(database_dir=str(tmp_path / "data"))
    sha256 = running.upload(png()).json["sha256"]
    upload = b"".join(upload_request(png()))
    wait_until(lambda: running.get("/health").json["status"] == "ok")
    with contextlib.ExitStack() as stack:
        stack.enter_context(hanging(running.storage))
        for number in range(120):
            raw = stack.enter_context(Raw(running))
            kinds = (get_line(f"/image/{sha256}"), get_line(f"/thumbnail/{sha256}"), upload)
            raw.send(kinds[number % 3])
        for _ in range(2):
            health = running.get("/health")
            assert (health.status, health.json["status"]) == (200, "degraded")
            assert "The storage folder does not answer." in health.json["problems"]
        assert running.call("POST", "/api/auth/login", {"email": "x", "password": "y"})[0] == 401
    wait_until(lambda: running.get("/health").json["status"] == "ok")


def unmount(place: Path) -> None:
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_goes_takes_nothing_with_it_and_is_taken_up_again(start, tmp_path, mount):
    disk, content = tmp_path / "disk", {f"{i}.png": png(300, 200) for i in range(20)}
    fill(disk, content)
    place = mount(tmp_path / "pictures", disk)
    running = start(database_dir=str(tmp_path / "data"))
    wait_until(lambda: list(disk.glob(".thumbnails/*.png")), "a thumbnail")
    unmount(place)
    health = running.rescan()
    assert health["status"] == "degraded"
    assert health["problems"]
    assert running.upload(png()).status == running.put("/image/a.png", png()).status == 503
    assert running.get(f"/thumbnail/{sha256(png())}").status == 404
    assert list(place.iterdir()) == []
    assert len(running.listed()) == 20
    other = mount(tmp_path / "other device")  # the same files under another device number
    shutil.copytree(disk, other, dirs_exist_ok=True)
    before = health["scan"]["finished_at"]
    mount(place, other)
    wait_until(lambda: running.get("/health").json["status"] == "ok")
    running.scanned(before)
    assert names(running) == set(content)
    assert running.get(f"/image/{sha256(content['3.png'])}").body == content["3.png"]
    assert running.upload(png()).status == 201


UPLOADS = (
    ("POST", "/upload", "file"),
    ("PUT", "/image/a.png", "file"),
    ("POST", "/upload-image", "file"),
    ("POST", "/api/media/media/", "file"),
    ("POST", "/entity/", "image"),
)


def send_everywhere(running: Server, content: bytes, user: Mapping[str, str]) -> set[int]:
    """The statuses of one file's upload to every family."""
    found = set()
    for method, path, field in UPLOADS:
        who = user if path == MEDIA else OWNER
        sent = running.send_file(method, path, content, field=field, headers=who, name="a")
        found.add(sent.status)
    return found


def fill_up(folder: Path) -> Path:
    """Take all that is left of a disk, to the last byte."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size):
                    pass
    return ballast


def test_the_reserve_keeps_uploads_from_the_last_of_the_disk(start, tmp_path, mount):
    place = mount(tmp_path / "pictures")
    free = shutil.disk_usage(place).free
    running = start(reserve_bytes=str(free - 5_000_000))
    user = User(running)
    assert send_everywhere(running, png(), user.headers) == {201, 200}  # what /image/ knows by now
    before = files_below(place)
    assert send_everywhere(running, png_of(6_000_000), user.headers) == {507}
    assert files_below(place) == before
    assert b"RESERVE_BYTES" in running.upload(png_of(6_000_000)).body


def test_on_a_full_disk_everything_but_uploads_goes_on(start, tmp_path, mount):
    place = mount(tmp_path / "pictures")
    running = start(reserve_bytes="0")
    user, stored = User(running), running.upload(png()).json
    key = user.upload(png())[1]["id"]
    entity, trashed = (Entities(running).create()["id"] for _ in range(2))
    running.scanned()
    ballast = fill_up(place)
    assert send_everywhere(running, png_of(500_000), user.headers) == {507}
    assert {user.login()[0] for _ in range(5)} == {200}
    for label in range(50):  # more than fits into what SQLite has already
        Entities(running).patch(entity, label=f"{label}" * 2000)
    assert running.get("/media").json["count"] == len(running.listed()) == 1
    assert running.get(f"/image/{stored['sha256']}").status == 200
    assert user.call("DELETE", f"{MEDIA}{key}/")[0] == 204
    Entities(running).patch(trashed, is_deleted=True)
    assert user.call("DELETE", f"/trash/{key}")[0] == 204
    assert running.request("DELETE", f"/trash/{trashed}", headers=OWNER).status == 204
    assert running.request("DELETE", f"/entity/{entity}", headers=OWNER).status == 200
    assert not [*user.files(), *(running.data / "entities").rglob("*.png")]
    assert running.request("DELETE", f"/media/{stored['filename']}", headers=OWNER).status == 200
    assert not list(place.glob("media/*.png"))
    running.stop()
    ballast.unlink()
    start().stop()  # it takes its reserve again
    fill_up(place)
    running = start()
    assert user.on(running).login()[0] == 200
    assert running.get("/media").json["count"] == 0


def test_on_a_full_disk_renditions_are_made_for_who_asks(start, tmp_path, mount, pillow):
    place = mount(tmp_path / "pictures")
    running = start(reserve_bytes="0")
    sha256 = running.upload(png(300, 200)).json["sha256"]
    paths = (f"/thumbnail/{sha256}", f"/preview/{sha256}?size=320")
    before = [running.get(path).body for path in paths]
    shutil.rmtree(place / ".thumbnails")
    shutil.rmtree(running.data / "previews")
    fill_up(place)
    assert [(running.get(path).status, running.get(path).body) for path in paths] == [
        (200, body) for body in before
    ]


# Faults of the disk

FAULTS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static struct { volatile int countdown, error; } *plan;
static const char *root;

__attribute__((constructor)) static void begin(void)
{
    int file = open(getenv("FAULTS"), O_RDWR);
    root = getenv("FAULTS_BELOW");
    plan = mmap(NULL, sizeof *plan, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
}

/* Whether this call, of a file or a path below the root, is the one to fail. */
static int fails(int file, const char *path)
{
    char link[64], target[4096] = "";
    if (plan->countdown <= 0)
        return 0;
    if (path == NULL || path[0] != '/') {
        snprintf(link, sizeof link, "/proc/self/fd/%d", file);
        if (readlink(link, target, sizeof target - 1) < 0)
            return 0;
        path = target;
    }
    if (strncmp(path, root, strlen(root)) || __sync_sub_and_fetch(&plan->countdown, 1))
        return 0;
    errno = plan->error;
    return 1;
}

#define CALL(result, name, types, names, file, path) \
    result failing_##name types __asm__(#name); \
    result failing_##name types \
    { \
        static result (*real) types; \
        if (real == NULL) \
            real = dlsym(RTLD_NEXT, #name); \
        return fails(file, path) ? -1 : real names; \
    }

CALL(ssize_t, write, (int f, const void *b, size_t n), (f, b, n), f, NULL)
CALL(ssize_t, pwrite64, (int f, const void *b, size_t n, off_t o), (f, b, n, o), f, NULL)
CALL(int, fsync, (int f), (f), f, NULL)
CALL(int, fdatasync, (int f), (f), f, NULL)
CALL(int, ftruncate64, (int f, off_t n), (f, n), f, NULL)
CALL(int, openat64, (int d, const char *p, int g, mode_t m), (d, p, g, m), d, p)
CALL(int, open64, (const char *p, int g, mode_t m), (p, g, m), -1, p)
CALL(int, mkdirat, (int d, const char *p, mode_t m), (d, p, m), d, p)
CALL(int, unlinkat, (int d, const char *p, int g), (d, p, g), d, p)
CALL(int, unlink, (const char *p), (p), -1, p)
CALL(int, linkat, (int d, const char *p, int e, const char *q, int g), (d, p, e, q, g), d, p)
CALL(int, renameat, (int d, const char *p, int e, const char *q), (d, p, e, q), d, p)
"""


class Faults:
    """A server whose disk fails at a call of choice."""

    def __init__(self, folder: Path, start: Callable[..., Server]) -> None:
        compiler = need("cc")
        source, library, plan = folder / "faults.c", folder / "faults.so", folder / "plan"
        source.write_text(FAULTS)
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"]
        subprocess.run(command, check=True)
        plan.write_bytes(bytes(8))
        self._ways = 0
        with plan.open("r+b") as file:
            self._plan = memoryview(mmap.mmap(file.fileno(), 8)).cast("i")
        self.server = start(
            ld_preload=str(library), faults=str(plan), faults_below=str(folder / "pictures")
        )
        self.server.scanned()

    def at_each_call(self, prepare: Callable[[], Any], work: Callable[..., object]) -> None:
        """Do `work` again and again; one time its first call fails, then its second, ..."""
        self._ways += 1
        for call in itertools.count(1 + self._ways % FAULTS_STEP, FAULTS_STEP):
            prepared = prepare()
            self._plan[0], self._plan[1] = call, [*ERRORS][call % len(ERRORS)]
            self.answered = {503, ERRORS[self._plan[1]]}
            work(prepared)
            if self._plan[0] > 0:  # there were not so many
                self._plan[0] = 0
                return


# EVERY_FAULT=1 pytest: each family alone meets all of them, not all families together.
FAULTS_STEP = 1 if "EVERY_FAULT" in os.environ else 3
# What is answered where a call fails so, unless the index says 503 or it goes another way.
ERRORS = {errno.EIO: 503, errno.ENOSPC: 507, errno.EINVAL: 500, errno.EXDEV: 500}
FILED = {  # where the answer to an upload says that the file is
    "/upload": lambda found: found["url"],
    "/image/a.png": lambda found: found["file_path"],
    "/upload-image": lambda found: found["image_url"],
    "/api/media/media/": lambda found: f"/api/media/media/{found['id']}/file/",
    "/entity/": lambda found: f"/entity/{found['id']}/file",
}


def test_whichever_call_fails_what_was_answered_is_there_and_nothing_else(start, tmp_path):
    faults = Faults(tmp_path, start)
    running, user = faults.server, User(faults.server)
    kept: dict[str, bytes] = {}  # by URL
    unsure: set[str] = set()  # hashes of what a failed deletion left or not
    refused: set[int] = set()

    def upload(way: tuple[str, str, str]) -> str | None:
        (method, path, field), content, name = way, png(), f"{unique().decode()}.png"
        who = user.headers if path == MEDIA else OWNER
        path_now = path.replace("a.png", name)
        texts = {"field": field, "name": "a"}
        answer = running.send_file(method, path_now, content, name, who, **texts)
        if answer.status != 201:
            assert answer.status in faults.answered, answer.body
            refused.add(answer.status)
            return None
        place = f"/image/{sha256(content)}" if method == "PUT" else FILED[path](answer.json)
        kept[place] = content
        return place

    def delete(place: str) -> None:
        path = local(place).removesuffix("/file")
        status = running.request("DELETE", path, headers=OWNER).status
        content = kept.pop(place)
        if status != 200:
            assert status in faults.answered
            refused.add(status)
            unsure.add(sha256(content))

    for way in UPLOADS:
        faults.at_each_call(functools.partial(tuple, way), upload)
    for way in (UPLOADS[0], UPLOADS[-1]):
        faults.at_each_call(functools.partial(upload, way), delete)
    assert refused == {*ERRORS.values()}
    running.kill()
    again = start()
    again.scanned()
    for place, content in kept.items():
        headers = user.headers if MEDIA in place else OWNER
        assert again.request("GET", local(place), headers=headers).body == content
    files = [path for path in again.storage.rglob("*.png") if "thumbnails" not in str(path)]
    found = {sha256(path.read_bytes()) for path in files}
    assert found - unsure == set(map(sha256, kept.values())) - unsure
    public = {path for path in files if path.parts[-2] == "media" or "uploads/2" in str(path)}
    public = {path for path in public if ".mediaserver" not in path.parts}
    assert set(again.listed()) == {sha256(path.read_bytes()) for path in public}
    assert not left_arriving(again.storage)


def test_a_disk_below_that_is_gone_keeps_its_entries_and_is_no_place_for_uploads(
    start, tmp_path, mount
):
    storage, usb = tmp_path / "pictures", tmp_path / "usb"
    fill(storage, {"own.png": png()})
    fill(usb, {"a/b.png": png(), "c.png": png()})
    place = mount(storage / "usb", usb)
    uploads = mount(storage / "media")
    running = start()
    running.scanned()
    uploaded = running.upload(png())
    assert uploaded.status == 201
    known = running.listed()
    assert len(known) == 4
    unmount(place)
    unmount(uploads)
    health = running.rescan()
    assert health["status"] == "degraded"
    assert "2" in health["problems"][0]
    assert running.listed() == known
    assert running.upload(png()).status == 503
    deleted = running.request("DELETE", f"/media/{uploaded.json['filename']}", headers=OWNER)
    assert deleted.status == 503  # the file would be back with its disk
    assert running.request("PUT", "/image/a.png", png(), OWNER).status == 503  # as curl -T
    assert list(uploads.iterdir()) == []
    running.stop()
    running = start()  # it is remembered
    assert running.scanned()["status"] == "degraded"
    assert running.listed() == known
    mount(storage / "usb", usb)
    fill(uploads, {"now a plain folder.png": png()})
    wait_until(lambda: running.get("/health").json["status"] == "ok")
    running.rescan()
    assert len(running.listed()) == 4
    assert running.upload(png()).status == 201


def test_folders_of_other_file_systems_take_uploads_and_deletes(start, tmp_path, mount):
    storage = tmp_path / "pictures"
    for name in ("media", "uploads"):
        mount(storage / name)
    running = start()
    content = [png(), png_of(300_000)]
    for each in content:
        made = running.upload(each)
        assert made.status == 201, made.body
        assert running.get(f"/media/{made.json['filename']}").body == each
    assert running.put("/image/a.png", content[0]).status == 200
    assert running.put("/image/a.png", png()).status == 201
    assert (
        running.request("DELETE", f"/media/{made.json['filename']}", headers=OWNER).status == 200
    )
    running.rescan()
    assert len(running.listed()) == 2
    assert not left_arriving(storage)


def test_no_link_on_the_way_is_followed_by_anything(start, tmp_path):
    running = start()
    secret, public = png(), png()
    running.store(secret, "secret.png")
    name = running.upload(public).json["filename"]
    images, media = running.data / "images", running.storage / "media"
    fill(images, {name: running.storage.joinpath("media", name).read_bytes()})
    for _ in range(2):
        assert running.get(f"/media/{name}").status == 200  # twice: it is at hand now
    media.rename(tmp_path / "media")
    media.symlink_to(images)
    fill(images, {"new.png": png()})
    for path in (f"/media/{name}", "/media/secret.png", f"/image/{sha256(public)}"):
        wait_until(lambda path=path: running.get(path).status == 404)  # in memory for a moment
    refused = running.upload(png())
    assert (refused.status, "A link or a file stands" in refused.json["detail"]) == (503, True)
    assert running.request("DELETE", f"/media/{name}", headers=OWNER).status == 503
    assert running.rescan()["status"] == "degraded"  # nothing else is in the folder
    assert (images / name).exists()
    assert running.listed().keys() == {sha256(public)}
    media.unlink()
    (tmp_path / "media").rename(media)
    running.rescan()
    assert running.get(f"/media/{name}").body == public


def test_a_thumbnail_that_is_a_link_is_not_served(start, tmp_path):
    need("PIL")
    running = start()
    digest = running.upload(png(30, 20)).json["sha256"]
    assert running.get(f"/thumbnail/{digest}").status == 200
    thumbnail = running.storage / ".thumbnails" / f"{digest}.png"
    thumbnail.unlink()
    thumbnail.symlink_to(running.data / "index.sqlite3")
    answer = running.get(f"/thumbnail/{digest}?")
    assert (answer.status, answer.body[:4], thumbnail.is_symlink()) == (200, b"\x89PNG", False)


def test_a_power_cut_loses_no_answered_upload_that_the_index_has_lost(start):
    running, content = start(), png()
    filename = running.upload(content).json["filename"]
    running.kill()
    stored = running.storage / "media" / filename
    os.link(stored, running.storage / ".incoming" / ("ab" * 16))
    with running.index() as db:
        db.execute("DELETE FROM file")
    running = start()
    running.scanned()
    assert running.get(f"/media/{filename}").body == content
    assert not list((running.storage / ".incoming").iterdir())


def test_what_lies_in_incoming_neither_stops_a_start_nor_removes_a_picture(start, tmp_path):
    running = start()
    running.upload(png())
    running.store(png(), "a.png")
    running.stop()
    data, storage = running.data, running.storage
    fill(storage, {"own.png": png()})
    os.link(storage / "own.png", storage / ".incoming" / "copy")
    (storage / ".incoming" / "folder").mkdir()
    outside = tmp_path / "outside"
    fill(outside, {"kept.png": png()})
    shutil.rmtree(data / "images" / ".incoming")
    (data / "images" / ".incoming").symlink_to(outside)
    running = start()
    running.scanned()
    assert (storage / "own.png").exists()
    assert not (storage / ".incoming" / "copy").exists()
    assert (outside / "kept.png").exists()
    assert running.store(png(), "b.png").status == 503
    assert len(list(outside.iterdir())) == 1


def test_one_bad_file_or_folder_costs_only_itself(start, tmp_path):
    storage = tmp_path / "pictures"
    fill(storage, {"a.png": png(), "z.png": png(), "future.png": png(), "past.png": png()})
    with contextlib.suppress(OSError):  # what the file system cannot say
        os.utime(storage / "future.png", (1.1e10, 1.1e10))
        os.utime(storage / "past.png", (-2e9, -2e9))
    deep, descriptor = png(), os.open(storage, os.O_RDONLY)
    for _ in range(600):  # a path longer than PATH_MAX
        os.mkdir("deeper", dir_fd=descriptor)
        inner = os.open("deeper", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    with open(os.open("deep.png", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor), "wb") as file:
        file.write(deep)
    os.close(descriptor)
    running = start()
    running.scanned()
    wait_until(lambda: running.get("/health").json["status"] == "ok")
    assert len(running.listed()) == 5
    assert running.get(f"/image/{sha256(deep)}").body == deep
    assert "stopped" not in running.log
    subprocess.run(["rm", "-rf", storage / "deeper"], check=True)


@pytest.fixture
def strange_times(tmp_path: Path) -> Iterator[Path]:
    """A folder of pictures with times that no calendar has, as far as a file system keeps them."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path  # tmpfs keeps 64 bits
    with tempfile.TemporaryDirectory(dir=memory) as place:
        folder = Path(place) / "pictures"
        for seconds in (-(2**62), -(10**12), -62135596801, -1, 0, 2**33, 10**12, 2**62):
            fill(folder, {f"{seconds}.png": png()})
            with contextlib.suppress(OSError):
                os.utime(folder / f"{seconds}.png", ns=(seconds * 10**9 + 5, seconds * 10**9 + 5))
        yield folder


def test_a_file_is_served_whatever_its_time(strange_times, start, pillow):
    running = start(storage=str(strange_times))
    running.scanned()
    contents = {path.name: path.read_bytes() for path in strange_times.glob("*.png")}
    listed = {item["filename"]: digest for digest, item in running.listed().items()}
    assert listed == {name: sha256(content) for name, content in contents.items()}
    for digest in listed.values():
        path = f"/image/{digest}"
        date = running.get(path).headers["Last-Modified"]
        assert ms.parse_date(date) is not None
        future = running.listed()[digest]["last_modified"] > time.time()
        answer = running.get(path, **{"If-Modified-Since": date})
        assert answer.status == (200 if future else 304)
        assert running.get(f"/thumbnail/{digest}").status == 200
    groups = running.get("/gallery/items").json["groups"]
    assert sum(count for _, count, *_ in groups) == len(contents)
    for month, count, *_ in groups:
        assert len(running.get(f"/gallery/items?group={month}").json["items"]) == count
    assert zipped(running.get("/gallery/zip")) == contents


def test_a_second_backup_has_nothing_to_copy_whatever_the_times(strange_times, start):
    running, place = start(storage=str(strange_times)), strange_times.parent / "backups"
    running.scanned()
    make_backup(running, place)
    again = json.loads(run_here("backup", place, "--json", "--storage_dir", running.storage))
    assert (again["files"], again["copied"]) == (8, 0)


def test_what_nas_systems_keep_for_themselves_is_passed_over(start, tmp_path):
    storage = tmp_path / "pictures"
    passed = ("@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "System Volume Information")
    fill(storage, {f"sub/{name}/no.png": png() for name in passed})
    fill(storage, {"@eaDir/no.png": png(), "quiet/.nomedia": b"", "quiet/below/no.png": png()})
    fill(storage, {"sub/yes.png": png()})
    running = start()
    running.scanned()
    assert names(running) == {"sub/yes.png"}


def test_what_nomedia_hides_is_hidden_though_nothing_else_is_there(start, tmp_path):
    fill(tmp_path / "pictures", {"quiet/a.png": png()})
    running = start()
    running.scanned()
    assert names(running) == {"quiet/a.png"}
    (running.storage / "quiet/.nomedia").touch()
    assert running.rescan()["status"] == "ok"
    assert names(running) == set()


def test_nomedia_in_the_storage_folder_itself_hides_nothing(start, tmp_path):
    fill(tmp_path / "pictures", {".nomedia": b"", "a.png": png()})
    running = start()
    running.scanned()
    made = running.upload(png()).json["filename"]
    assert running.rescan()["status"] == "ok"
    assert names(running) == {"a.png", f"media/{made}"}


def test_thumbnails_of_private_pictures_lie_apart(start):
    need("PIL")
    running = start()
    private, public = png(30, 20), running.upload(png(20, 30)).json["sha256"]
    running.store(private, "a.png")
    path = f"/thumbnail/{sha256(private)}"
    assert running.get(path, **READER).status == 200
    assert running.get(path).status == 404
    assert running.get(f"/thumbnail/{public}").status == 200
    thumbnails = running.storage / ".thumbnails"
    assert [p.stem for p in thumbnails.glob("*.png")] == [public]
    running.stop()
    (thumbnails / f"{sha256(private)}.png").write_bytes(b"public, as it was before")
    running = start()
    assert [p.stem for p in thumbnails.glob("*.png")] == [public]
    assert running.get(path, **READER).status == 200


def png_size(content: bytes) -> tuple[int, int]:
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (png(100, 50), (100, 50)), (jpeg(1024, 512, orientation=6), (128, 256)), (gif(), (1, 1)),
        (bmp(), (1, 1)), (webp(), (1, 1)),
    ],
    ids=["PNG", "JPEG, turned", "GIF", "BMP", "WebP"],
)  # fmt: skip
def test_a_thumbnail_is_a_png_that_fits_256_and_stands_upright(server, content, size):
    need("PIL")
    digest = server.upload(content).json["sha256"]
    answer = server.get(f"/thumbnail/{digest.upper()}")
    assert answer.status == 200
    assert png_size(answer.body) == size
    assert answer.headers["Content-Type"] == "image/png"
    assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    etag = answer.headers["ETag"]
    assert server.get(f"/thumbnail/{digest}", If_None_Match=etag).status == 304


def test_the_scanner_makes_thumbnails_ahead_and_they_go_with_their_file(start, tmp_path):
    need("PIL")
    storage, content = tmp_path / "pictures", png(600, 300)
    fill(storage, {"a.png": content, "b.png": png()})
    running = start()
    thumbnail = storage / ".thumbnails" / f"{sha256(content)}.png"
    wait_until(thumbnail.exists, "the thumbnail")
    running.scanned()
    (storage / "a.png").unlink()
    running.rescan()
    assert not thumbnail.exists()


@pytest.fixture(scope="module")
def turned(server: Server) -> str:
    """The hash of a picture that is upright when it is turned."""
    return str(server.upload(jpeg(1600, 800, orientation=6)).json["sha256"])


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("image/avif,image/webp,*/*;q=0.8", "WEBP"), ("*/*", "JPEG"), ("image/webp;q=0", "JPEG"),
        ("image/webp;q=0.2, image/*", "JPEG"), ("", "JPEG"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("size", "expected"),
    [(1440, (720, 1440)), (2160, (800, 1600)), (320, (160, 320)), (720, (360, 720))],
)
def test_a_preview_is_upright_within_its_size_and_of_the_type_that_is_accepted(
    server, turned, pillow, size, expected, accept, kind
):
    path = f"/preview/{turned}?size={size}"
    answer = server.get(path.replace(turned, turned.upper()), Accept=accept)
    assert answer.status == 200
    picture = pillow.open(io.BytesIO(answer.body))
    assert (picture.size, picture.format) == (expected, kind)
    assert answer.headers["Content-Type"] == f"image/{kind.lower()}"
    assert "Accept" in answer.headers["Vary"]
    assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    etag = answer.headers["ETag"]
    assert server.get(path, Accept=accept, If_None_Match=etag).status == 304
    head = server.request("HEAD", path, headers={"Accept": accept})
    assert (head.status, head.headers["ETag"]) == (200, etag)


@pytest.mark.parametrize(
    "query", ["", "?size=", "?size=321", "?size=-320", "?size=0320", "?size=x"]
)
def test_a_size_that_no_preview_has_is_400(server, turned, query):
    assert server.get(f"/preview/{turned}{query}").status == 400


def test_a_preview_is_public_where_everyone_may_read_the_file(server):
    need("PIL")
    entity, private = png_of(907), png_of(908)
    made = server.send_file("POST", "/entity/", entity, field="image")
    stored = server.store(private, f"{unique().decode()}.png")
    assert (made.status, stored.status) == (201, 201)
    shown = [server.get(f"/preview/{sha256(content)}?size=320", **READER)
             for content in (entity, private)]  # fmt: skip
    assert [(answer.status, answer.headers["Cache-Control"]) for answer in shown] == [
        (200, "public, max-age=31536000, immutable"), (200, "private, max-age=31536000, immutable")
    ]  # fmt: skip


def test_there_are_previews_of_videos_and_none_of_audio_drawings_and_unknown_hashes(
    server, tmp_path
):
    need("PIL")
    need("ffmpeg")
    source = make_video(tmp_path / "a.mp4", "color=red:s=640x320:d=2", "-c:v", "mpeg4")
    fill(server.storage, {"a/film.mp4": source.read_bytes()})
    server.rescan()
    answer = server.get(f"/preview/{sha256(source.read_bytes())}?size=720", Accept="image/webp")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "image/webp")
    digest = server.upload(svg(), "a.svg").json["sha256"]
    asked = [server.get(f"/preview/{each}?size=320").status for each in (digest, "0" * 64, "x")]
    assert asked == [404, 404, 400]


def test_previews_are_private_where_their_pictures_are(start):
    need("PIL")
    running = start(read_auth_enabled="true")
    private, public = png(30, 20), running.upload(png(20, 30)).json["sha256"]
    running.store(private, "a.png")
    paths = [f"/preview/{digest}?size=320" for digest in (sha256(private), public)]
    answers = [running.get(path, **READER) for path in paths]
    assert [(answer.status, answer.headers["Cache-Control"]) for answer in answers] == [
        (200, "private, max-age=31536000, immutable")] * 2  # fmt: skip
    assert [running.get(path).status for path in paths] == [401] * 2


def test_which_contents_are_stored_is_told_of_what_one_may_read(server, jane, django, entities):
    public, private, own, entity, unknown = png(), png(), png(), png(), sha256(unique())
    server.upload(public)
    server.store(private, f"{unique().decode()}.png")
    record = jane.upload(own)[1]
    entities.create(entity)
    asked = [*map(sha256, (entity, public, private, own)), unknown, sha256(public).upper()]

    def stored(headers: dict[str, str]) -> set[bytes]:
        answer = server.request("POST", "/exists", json.dumps(asked).encode(), {
            **headers, "Content-Type": "application/json"})  # fmt: skip
        assert answer.status == 200 and list(answer.json) == ["stored"], answer.body
        found = answer.json["stored"]
        assert found == [each for each in asked if each in found]  # once, in their order
        one_by_one = [server.get(f"/exists?sha256={each}", **headers) for each in asked[:5]]
        assert [each.json["stored"] for each in one_by_one] == [
            [each] if each in found else [] for each in asked[:5]]  # fmt: skip
        query = urlencode([("sha256", each) for each in asked])
        assert server.get(f"/exists?{query}", **headers).json["stored"] == found
        return {content for content in (public, private, own, entity) if sha256(content) in found}

    assert stored({}) == stored(django.headers) == {public, entity}
    assert stored(READER) == stored(OWNER) == {public, private, entity}
    assert stored(jane.headers) == {public, entity, own}
    jane.call("DELETE", f"{MEDIA}{record['id']}/")
    assert stored(jane.headers) == {public, entity}


def test_a_content_that_was_changed_on_disk_is_not_stored(start, tmp_path):
    running, content = start(), png()
    fill(tmp_path / "pictures", {"a.png": content})
    running.rescan()
    path = f"/exists?sha256={sha256(content).upper()}"
    assert running.get(path).json == {"stored": [sha256(content)]}
    (tmp_path / "pictures/a.png").write_bytes(png())
    assert running.get(path).json == {"stored": []}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[]", 200), (b"{}", 400), (b"null", 400), (b'"x"', 400), (b"[1]", 400), (b"[null]", 400),
        (b'["x"]', 400), (b"[", 400), (b'[["a"]]', 400), (b"", 400),
        (json.dumps(["5e" * 32] * 1000).encode(), 200),
        (json.dumps(["5e" * 32] * 1001).encode(), 400),
        (json.dumps([b"\0".hex() * 31 + "\u0660\u0660"]).encode(), 400),
    ],
)  # fmt: skip
def test_what_is_no_list_of_hashes_is_refused(server, body, status):
    headers = {"Content-Type": "application/json"}
    answer = server.request("POST", "/exists", body, headers)
    assert (answer.status, [*answer.json]) == (status, ["stored" if status == 200 else "detail"])


def test_what_is_stored_is_told_to_readers_only_where_reading_is_not_open(start):
    running, content = start(read_auth_enabled="true"), png()
    running.upload(content)
    path = f"/exists?sha256={sha256(content)}"
    assert running.get(path).status == 401
    assert running.get(path, **WRITER).status == 403
    assert running.get(path, **READER).json == {"stored": [sha256(content)]}
    assert [running.get(f"/exists{query}", **READER).status for query in ("", "?sha256=x")] == [
        400, 400]  # fmt: skip


def test_the_scanner_makes_previews_ahead_and_they_go_with_their_file(start, tmp_path):
    need("PIL")
    storage, content = tmp_path / "pictures", png(1600, 300)
    fill(storage, {"a.png": content, "b.png": png()})
    running = start()
    running.scanned()
    folder = running.data / "previews"
    digest = sha256(content)
    wait_until(lambda: list(folder.glob(f"{digest}-320.*")), "the preview")
    assert running.get(f"/preview/{digest}?size=720").status == 200
    assert len(list(folder.glob(f"{digest}*"))) == 2
    (storage / "a.png").unlink()
    running.rescan()
    assert not list(folder.glob(f"{digest}*"))
    assert running.get(f"/preview/{digest}?size=720").status == 404


def test_without_space_for_previews_they_are_made_for_each_request(start):
    need("PIL")
    running = start(preview_cache_bytes="0")
    digest = running.upload(png()).json["sha256"]
    for _ in range(2):
        assert running.get(f"/preview/{digest}?size=320").status == 200
    assert not list((running.data / "previews").rglob("*.*"))


@pytest.mark.parametrize(
    ("digest", "status"),
    [("0" * 64, 404), ("x", 400), ("0" * 63, 400), ("0" * 65, 400), ("g" * 64, 400),
     ("%00" + "0" * 63, 404), (sha256(b""), 404)],
)  # fmt: skip
@pytest.mark.parametrize("route", ["image", "thumbnail"])
def test_a_thumbnail_or_image_of_no_known_hash_is_404_and_no_hash_is_400(
    server, route, digest, status
):
    assert server.get(f"/{route}/{digest}").status == status


@pytest.mark.parametrize(
    ("content", "name"), [(svg(), "a.svg"), (png()[:40], "a.png")], ids=["SVG", "cut short"]
)
def test_what_cannot_be_drawn_has_no_thumbnail(server, content, name):
    made = server.upload(content, name)
    assert made.status == 201
    assert server.get(f"/thumbnail/{made.json['sha256']}").status == 404


def test_threads_that_want_the_same_rendition_all_get_the_verdict_of_the_first():
    thumbnails, asked, go = ms.Thumbnails(), threading.Semaphore(0), threading.Event()
    calls = []

    def make() -> ms.Outcome:
        calls.append(1)
        asked.release()
        go.wait(DEADLINE)
        return ms.Outcome.IMPOSSIBLE

    with ThreadPoolExecutor(4) as pool:
        made = [pool.submit(thumbnails._make_once, "a", make)]
        asked.acquire()
        made += [pool.submit(thumbnails._make_once, "a", make) for _ in range(3)]
        wait_until(lambda: len(thumbnails._making["a"].done._cond._waiters) == 3)
        go.set()
        assert [future.result() for future in made] == [ms.Outcome.IMPOSSIBLE] * 4
    assert calls == [1]


def test_without_pillow_all_but_thumbnails_works_and_the_start_says_so(start, tmp_path):
    fill(tmp_path / "bare" / "PIL", {"__init__.py": b"raise ImportError"})
    running = start(pythonpath=str(tmp_path / "bare"), path=str(tmp_path / "bare"))
    digest = running.upload(png()).json["sha256"]
    assert running.get(f"/thumbnail/{digest}").status == 404
    assert running.get(f"/image/{digest}").status == 200
    assert wait_until(lambda: re.search(r"thumbnails: .*Pillow", running.log))


def test_put_stores_new_content_under_the_day_and_known_content_once(server):
    content, day = jpeg(), time.strftime("%Y%m%d", time.gmtime())
    answer = server.put("/image/my%20caf%C3%A9%20%E2%98%83.jpg", content)
    name = "my café ☃.jpg"
    assert (answer.status, answer.json) == (
        201,
        {
            "message": "Image uploaded successfully.",
            "sha256": sha256(content),
            "filename": name,
            "file_path": f"uploads/{day}/{name}",
            "thumbnail_file": f"{sha256(content)}.png"
            if importlib.util.find_spec("PIL")
            else None,
        },
    )
    assert (server.storage / answer.json["file_path"]).read_bytes() == content
    again = server.put("/image/other.jpg", content)
    assert (again.status, again.json) == (
        200,
        {
            "message": "Image content already exists.",
            "sha256": sha256(content),
            "filename": name,
            "file_path": f"uploads/{day}/{name}",
        },
    )
    (server.storage / answer.json["file_path"]).unlink()
    assert server.put("/image/other.jpg", content).status == 201  # it was gone from disk


def test_names_that_clash_are_numbered(server):
    stem = unique().decode()
    made = [server.put(f"/image/{stem}.png", png()).json["filename"] for _ in range(3)]
    assert made == [f"{stem}.png", f"{stem}_1.png", f"{stem}_2.png"]


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("C%3A%5CUsers%5Cme%5Cpic.png", "pic.png"), ("...hidden.png", "hidden.png"),
        ("be%07ll%0D%0A.png", "bell.png"), ("nul.png", None), ("COM1.png", None),
        ("lpt%C2%B9.png", None), ("aux.tar.png", None), ("%20%20spaced.png%20", None),
        ("a" * 300 + ".png", None), ("%E2%98%83" * 100 + ".png", None),
        ("%F0%9F%90%B1 ナ.png".replace(" ", "%20").replace("ナ", "%E3%83%8A"), "🐱 ナ.png"),
        ("UPPER.PNG", "UPPER.PNG"), ("two.dots.png", "two.dots.png"),
    ],
)  # fmt: skip
def test_the_name_of_an_upload_is_made_safe_and_otherwise_kept(start, server, given, stored):
    answer = server.put(f"/image/{given}", png())
    assert answer.status == 201, answer.body
    name = answer.json["filename"]
    if stored:
        stem, extension = os.path.splitext(stored)
        assert re.fullmatch(rf"{re.escape(stem)}(_\d+)?{re.escape(extension)}", name)
    assert len(name.encode()) <= 255
    assert not set(name) & set("/\\\0\r\n\x07")
    assert not name.startswith((".", " "))
    assert name.lower().endswith(".png")
    assert not re.match(r"(?i)(con|prn|aux|nul|com\d|lpt[\d¹])(\.|$)", name)
    assert (server.storage / answer.json["file_path"]).is_file()
    assert set(answer.json["file_path"].split("/")) & {".."} == set()


@pytest.mark.parametrize(
    ("url_name", "form_name", "content", "status", "extension"),
    [
        ("plain", "b.png", png, 201, "png"), ("photo.webp", "b.jpg", jpeg, 201, "jpg"),
        ("x.jpeg", "b.png", png, 201, "jpeg"), ("x.GIF", None, gif, 400, ""),
        ("plain", "plain", png, 400, ""), ("x.webp", "x.webp", webp, 400, ""),
        ("x.png", "x.png", webp, 400, ""), ("x.png", "x.png", svg, 400, ""),
        ("x.png", "x.png", bmp, 400, ""), ("x.png", "x.png", mp4, 400, ""),
        ("x.png", "", png, 400, ""),
    ],
)  # fmt: skip
def test_put_takes_the_urls_name_or_the_forms_and_only_its_types(
    server, url_name, form_name, content, status, extension
):
    answer = server.put(f"/image/{url_name}", content(), form_name)
    assert answer.status == status, answer.body
    if status == 201:
        assert answer.json["filename"].endswith(f".{extension}")


def test_puts_of_one_content_at_once_store_it_once(server):
    content = png()
    made = together(10, lambda i: server.put(f"/image/race{i}.png", content))
    assert sorted(answer.status for answer in made) == [200] * 9 + [201]
    assert len({answer.json["file_path"] for answer in made}) == 1
    stored = [p for p in server.storage.rglob("race*.png") if p.read_bytes() == content]
    assert len(stored) == 1


def test_puts_of_one_name_at_once_overwrite_nothing(server):
    contents = [png() for _ in range(10)]
    stem = unique().decode()
    made = together(10, lambda i: server.put(f"/image/{stem}.png", contents[i]))
    assert {answer.status for answer in made} == {201}
    for answer, content in zip(made, contents, strict=True):
        assert (server.storage / answer.json["file_path"]).read_bytes() == content


def test_a_list_may_be_kept_by_who_asks_with_its_etag_and_other_json_by_nobody(server):
    kept, other = server.get("/list"), server.get("/health")
    assert "no-store" not in str(kept.headers["Cache-Control"])
    assert server.get("/list", If_None_Match=kept.headers["ETag"]).status == 304
    assert other.headers["Cache-Control"] == "no-store"


def test_closed_reads_are_answered_for_no_shared_cache(read_closed):
    made = read_closed.upload(png()).json
    assert read_closed.get(f"/image/{made['sha256']}").status == 401
    paths = [f"/image/{made['sha256']}", f"/media/{made['filename']}"]
    answers = [read_closed.get(path, **READER) for path in paths * 2]
    assert [(each.status, each.headers["Cache-Control"].split(",")[0]) for each in answers] == [
        (200, "private")] * 4  # fmt: skip
    assert [read_closed.get(path).status for path in paths] == [401] * 2


# -- images: private image box -----------------------------------------------------------


def test_an_image_is_stored_under_its_own_name_and_read_with_permission_only(server):
    content, stem = webp(), unique().decode()
    made = server.store(content, f"Größe {stem}.webp")
    name = f"Größe {stem}.webp"
    assert (made.status, made.json) == (
        201,
        {
            "stored_as": name,
            "bytes": len(content),
            "image_url": f"{server.url}/image/{quote(name)}",
        },
    )
    path = urlsplit(made.json["image_url"]).path
    answer = server.get(path, **READER)
    assert (answer.status, answer.body) == (200, content)
    assert answer.headers["Content-Type"] == "image/webp"
    assert answer.headers["Cache-Control"] == "private, no-cache"
    assert server.get(path, **READER, If_None_Match=answer.headers["ETag"]).status == 304
    assert server.get(path).status == 401
    assert server.get(path, **WRITER).status == 403
    assert server.request("GET", f"{path}?token={upload_token()}").status == 403


def test_a_clash_adds_the_time_and_never_overwrites(server):
    first, second, stem = png(), png(), unique().decode()
    assert server.store(first, f"{stem}.png").json["stored_as"] == f"{stem}.png"
    name = server.store(second, f"{stem}.png").json["stored_as"]
    assert re.fullmatch(rf"{stem}_\d{{8}}T\d{{12}}Z\.png", name)
    stamp = time.strptime(name.split("_")[1][:15], "%Y%m%dT%H%M%S")
    assert abs(calendar.timegm(stamp) - time.time()) < DEADLINE
    assert server.get(f"/image/{stem}.png", **OWNER).body == first
    assert server.get(f"/image/{name}", **OWNER).body == second


def test_twenty_uploads_of_one_name_at_once_overwrite_nothing(server):
    stem, contents = unique().decode(), [png() for _ in range(20)]
    made = together(20, lambda i: server.store(contents[i], f"{stem}.png"))
    assert {answer.status for answer in made} == {201}
    stored = [answer.json["stored_as"] for answer in made]
    assert len(set(stored)) == 20
    assert f"{stem}.png" in stored
    for name, content in zip(stored, contents, strict=True):
        assert server.get(f"/image/{name}", **OWNER).body == content


@pytest.mark.parametrize(
    ("filename", "content", "status"),
    [
        ("a.jpg", jpeg, 201), ("a.jpeg", jpeg, 201), ("a.PNG", png, 201), ("a.gif", gif, 201),
        ("a.webp", webp, 201), ("a.bmp", bmp, 201), ("a.svg", svg, 400), ("a.png", svg, 400),
        ("a.png", mp4, 400), ("a.txt", png, 400), ("a.png", lambda: b"", 400), (None, png, 400),
        ("", png, 400),
    ],
)  # fmt: skip
def test_images_takes_its_five_types(server, filename, content, status):
    made = server.store(content(), filename)
    assert made.status == status, made.body
    if status == 201:
        path = urlsplit(made.json["image_url"]).path
        assert server.get(path, **READER).status == 200


@pytest.mark.parametrize(
    "filename",
    ["../../../evil.png", "..%5C%5Cevil.png", ".hidden.png", "nul.png", "x" * 300 + ".png"],
)
def test_the_name_of_a_private_image_stays_in_its_folder(server, filename):
    made = server.store(png(), filename)
    assert made.status == 201
    assert (server.data / "images" / made.json["stored_as"]).is_file()
    assert server.get(urlsplit(made.json["image_url"]).path, **READER).status == 200


ODD_NAMES = (
    ".", " ", "..", "...", ".png", "..png", " .PNG ", "png", ". . .png", "...a.png", "a..png",
    "a.png/", "/", "a b?.png", "a%23#.png", "%2e%2e.png", "家族.png", "👪", "a;b&c=d+e.png",
    "x.jpeg.GIF", "\u202egnp.png", "-rf.png", "con", "'\".png", "e\u0301.png", "\u2028.png", "00",
)  # fmt: skip


@pytest.mark.parametrize("slugs", ["false", "true"])
def test_what_is_stored_under_any_name_is_served_under_the_url_that_was_answered(start, slugs):
    running = start(slugify_filenames=slugs)
    for name in ODD_NAMES:
        content = png()
        made = running.store(content, name.replace('"', "%22"))
        assert made.status == 201, name
        assert running.get(local(made.json["image_url"]), **READER).body == content, name


def test_slugs_are_stored_where_the_setting_says_so(start):
    running = start(slugify_filenames="true")
    given = ("Größe & Maß (1).PNG", "Семья.png", ".png", "☃.png", "家族.png", "grosse-mass-1.png")
    names = [running.store(png(), name).json["stored_as"] for name in given]
    assert names[:3] == ["grosse-mass-1.png", "semia.png", "file.png"]
    assert [*map(re.compile(r"[0-9a-f]{16}\.png").fullmatch, names[3:5])].count(None) == 0
    assert re.fullmatch(r"grosse-mass-1_\d{8}T\d{12}Z\.png", names[5])


@pytest.mark.parametrize(
    ("method", "path", "filename", "content", "is_told"),
    [
        ("POST", "/upload", "a.heic", png(), True), ("POST", "/upload", "a.png", mp4(), True),
        ("PUT", "/image/a.tiff", "a.tif", png(), True),
        ("POST", "/upload-image", "a.MP4", png(), True),
        ("POST", "/upload-image", "a.png", mp4(), True),
        ("POST", "/upload", "a.txt", b"no media", False),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_a_refused_type_is_told_where_it_is_taken(
    server, method, path, filename, content, is_told
):
    detail = server.send_file(method, path, content, filename).json["detail"]
    assert ("/api/media/media/" in detail, "/entity/" in detail) == (is_told, is_told)


def test_a_file_that_a_scan_has_hidden_is_not_remembered(start):
    running, content = start(), png()
    fill(running.storage, {"quiet/a.png": content, "b.png": png()})
    running.rescan()
    path = f"/image/{sha256(content)}"
    assert [running.get(path).status for _ in range(3)] == [200] * 3
    (running.storage / "quiet/.nomedia").touch()
    running.rescan()
    assert running.get(path).status == 404


@pytest.mark.parametrize("size", [5000, 200_000])
def test_a_remembered_file_is_not_served_through_a_link_in_its_folders_place(server, size):
    """The same file, so that nothing but the way to it tells."""
    content = png_of(size)
    path = urlsplit(server.upload(content).json["url"]).path
    assert [server.get(path).body for _ in range(2)] == [content] * 2
    media, away = server.storage / "media", server.storage.parent / f"away-{size}"
    media.rename(away)
    media.symlink_to(away)
    try:
        wait_until(lambda: server.get(path).status == 404)
    finally:
        media.unlink()
        away.rename(media)
    assert server.get(path).body == content


def test_who_may_read_a_file_is_judged_each_time_though_the_file_is_remembered(start):
    running = start(read_auth_enabled="true", log_format="json")
    running.scanned()
    running.store(png(), "mine.png")
    shown = running.upload(png()).json
    view = cookie_of(open_session(running))
    asked = [
        (OWNER, 200), ({}, 401), (WRITER, 403), (bearer(), 403), (READER, 200), (view, 200),
        ({"Authorization": "Bearer x"}, 401), ({"Authorization": "Basic eDp5"}, 401),
        ({"Cookie": view["Cookie"] + "x"}, 401), (bearer(exp=1), 401),
    ]  # fmt: skip
    paths = ("/image/mine.png", f"/media/{shown['filename']}", f"/image/{shown['sha256']}")
    for path, method, _ in itertools.product(paths, ("GET", "HEAD"), range(2)):
        found = [running.request(method, path, headers=headers).status for headers, _ in asked]
        assert found == [status for _, status in asked], (method, path)

    def shown_to() -> Counter[str]:
        lines = [json.loads(line) for line in running.log.splitlines() if line.startswith("{")]
        shown = [line for line in lines if line["status"] == 200 and line["path"] in paths]
        return Counter(line["principal"] for line in shown)

    wait_until(lambda: shown_to().total() == 36, "the lines of the log, which follow the answers")
    assert shown_to() == {"owner": 12, "token 1000000007": 12, "view": 12}
    content = png()
    (running.data / "images/mine.png").write_bytes(content)
    assert running.get("/image/mine.png", **OWNER).body == content


def test_a_connection_that_comes_with_its_request_is_kept_for_the_next(server):
    path = f"/media/{server.upload(png()).json['filename']}"
    assert [server.get(path).status for _ in range(2)] == [200, 200]  # it is at hand now
    for _ in range(50):
        with Raw(server) as raw:
            for _ in range(2):
                raw.send(get_line(path))
                assert raw.answer().status == 200


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("size", [5000, 200_000])
def test_a_remembered_file_is_answered_as_it_is_at_first(server, size, private):
    content = png_of(size)
    (server.store if private else server.upload)(content)
    digest = sha256(content)
    etag, date = f'"{digest}"', server.get(f"/image/{digest}", **OWNER).headers["Last-Modified"]
    after = "Thu, 01 Jan 2099 00:00:00 GMT"
    fields = [
        {}, {"If-None-Match": etag}, {"If-None-Match": f"W/{etag}, x"}, {"If-None-Match": '"x"'},
        {"If-None-Match": "*"}, {"If-Modified-Since": date}, {"If-Modified-Since": "never"},
        {"If-Modified-Since": "Thu, 01 Jan 1970 00:00:00 GMT"}, {"If-Match": etag},
        {"If-Match": '"x"', "If-None-Match": etag}, {"If-Unmodified-Since": date},
        {"If-Unmodified-Since": "Thu, 01 Jan 1970 00:00:00 GMT", "If-None-Match": etag},
        {"Range": "bytes=5-99"}, {"Range": "bytes=-7"}, {"Range": "bytes=5-"}, {"Range": "x"},
        {"Range": "bytes=0-1,9-"}, {"Range": f"bytes={size}-"},
        {"Range": "bytes=5-9", "If-Range": etag}, {"Range": "bytes=5-9", "If-Range": '"x"'},
        {"Range": "bytes=5-9", "If-None-Match": etag}, {"Range": "bytes=5-9", "Origin": "http://x"},
        {"Origin": "http://x"}, {"Origin": "http://x", "If-None-Match": etag},
        {"If-Modified-Since": after, "Connection": "close"}, {"Connection": "close"},
    ]  # fmt: skip

    def answer(method: str, path: str, headers: Mapping[str, str]) -> tuple[int, Any, bytes]:
        found = server.request(method, path, headers={**OWNER, **headers})
        boundary = found.headers.get_boundary() or "no boundary"
        text = re.sub(r"Date: .*\n", "", str(found.headers)).replace(boundary, "")
        return found.status, sorted(text.splitlines()), found.body.replace(boundary.encode(), b"")

    letters = [place for place, digit in enumerate(digest) if digit.isalpha()]
    for number, (method, headers) in enumerate(itertools.product(("GET", "HEAD"), fields)):
        spelt = [*digest]  # in a way that nobody has asked for yet
        for place in (place for bit, place in enumerate(letters) if number + 1 >> bit & 1):
            spelt[place] = spelt[place].upper()
        path = f"/image/{''.join(spelt)}"
        first = answer(method, path, headers)
        assert [answer(method, path, headers) for _ in range(2)] == [first] * 2, headers


def test_private_content_is_known_to_nobody_without_private_read(start):
    running = start()
    content = png(300, 200)
    name = running.store(content, "secret.png").json["stored_as"]
    running.upload(png())  # so that the lists have something
    digest, draws = sha256(content), importlib.util.find_spec("PIL") is not None
    running.rescan()

    def ask(family: str) -> list[tuple[int, bool]]:
        answers = [running.request("GET", f"/{family}/{digest}", headers=headers)
                   for headers in ({}, WRITER, READER, OWNER)]  # fmt: skip
        return [(each.status, "private" in each.headers["Cache-Control"]) for each in answers]

    shown, unknown = [(200, True)] * 2, [(404, False)] * 2
    assert ask("image") == unknown + shown
    assert ask("thumbnail") == unknown + (shown if draws else unknown)
    text = str([running.get(path, **OWNER).json for path in ("/list", "/media")])
    assert [each for each in (digest, name) if each in text] == []
    ((key, *_),) = running.get("/gallery/items").json["groups"]
    assert digest not in running.get(f"/gallery/items?group={key}").body.decode()
    known = running.put("/image/mine.png", content)  # new content as far as anyone may know
    assert known.status == 201
    assert "secret" not in str(known.json)
    assert running.get(f"/image/{digest}").status == 200  # public now, by another's own upload


def test_an_upload_folder_elsewhere_is_used_and_found_again(start, tmp_path):
    running = start(upload_dir=str(tmp_path / "box" / "of images"))
    content = png()
    running.store(content, "a.png")
    assert (tmp_path / "box" / "of images" / "a.png").read_bytes() == content
    fill(tmp_path / "box" / "of images", {"put by hand.png": content})
    running.rescan()
    assert running.get("/image/put%20by%20hand.png", **READER).body == content


def test_what_an_earlier_program_left_in_the_upload_folder_is_served_and_kept(start, tmp_path):
    box, old = tmp_path / "box", png()
    fill(box, {"My photo.JPG": old, "ü.png": old, ".hidden.png": old})
    running = start(upload_dir=str(box))
    paths = ["/image/My%20photo.JPG", "/image/%C3%BC.png"]
    assert [running.get(path, **READER).body for path in paths] == [old, old]
    assert [running.get(path).status for path in paths] == [401, 401]
    assert running.get("/image/.hidden.png", **READER).status == 404
    new = png()
    stored = running.store(new, "ü.png").json["stored_as"]
    assert stored != "ü.png"
    assert (box / "ü.png").read_bytes() == old
    assert running.get(f"/image/{quote(stored)}", **READER).body == new


# -- accounts: users, their media and collections -----------------------------------------

REGISTER, LOGIN = "/api/auth/register/", "/api/auth/login/"
MEDIA, SHELVES = "/api/media/media/", "/api/media/collections/"


class User:
    """An account of the server, or (with an id) a user of a Django backend with the same key."""

    def __init__(self, server: Server, user_id: int | None = None) -> None:
        self.server = server
        self.name = f"u{unique().decode()}"
        self.email, self.password = f"{self.name}@example.com", "correct horse"
        if user_id is None:
            fields = {"email": self.email, "username": self.name, "password": self.password}
            status, value = server.call("POST", REGISTER, fields)
            assert status == 201, value
            user_id = value["id"]
        self.id = user_id
        self.headers = bearer(user_id=user_id)  # as good as a login's, and cheaper
        self.folder = server.data / "users" / str(user_id)

    def on(self, server: Server) -> User:
        """The same account after a restart."""
        self.server = server
        return self

    def call(self, method: str, path: str, value: Any = None) -> tuple[int, Any]:
        return self.server.call(method, path, value, self.headers)

    def login(self, **fields: str) -> tuple[int, Any]:
        fields = {"password": self.password, **(fields or {"username": self.name})}
        return self.server.call("POST", LOGIN, fields, {"X-Forwarded-For": f"of {self.name}"})

    def refresh(self, token: str) -> tuple[int, Any]:
        return self.server.call("POST", "/api/auth/token/refresh/", {"refresh": token})

    def upload(
        self,
        content: bytes,
        filename: str = "a.png",
        method: str = "POST",
        path: str = MEDIA,
        **texts: object,
    ) -> tuple[int, Any]:
        texts = {"name": "a picture", **texts}
        answer = self.server.send_file(
            method, path, content, filename, headers=self.headers, **texts
        )
        return answer.status, answer.json

    def record(self, **fields: Any) -> Any:
        status, value = self.call("POST", MEDIA, {"name": "a", "type": "image", **fields})
        assert status == 201, value
        return value

    def shelf(self) -> Any:
        return self.call("POST", SHELVES, {"name": "c"})[1]

    def listed(self, query: str = "") -> Any:
        return self.call("GET", f"{MEDIA}?{query}")[1]

    def files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def jane(server: Server) -> User:
    return User(server)


@pytest.fixture
def django(server: Server) -> User:
    """A user of a Django backend, without an account here."""
    return User(server, next(SERIAL))


def local(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.path}?{parts.query}" if parts.query else parts.path


def claims_of(token: str) -> Any:
    return json.loads(ms.decode_base64url(token.split(".")[1]))


def test_the_documents_examples_of_accounts_work_as_printed(server, readme, tmp_path):
    need("curl")
    photo = tmp_path / "my-photo.jpg"
    photo.write_bytes(jpeg())
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", readme, re.DOTALL))
    examples = [e for e in re.split(r"\n(?=curl )", "\n" + blocks) if "/api/" in e]
    known, answers = {"/path/to/my-photo.jpg": str(photo)}, []
    for example in examples:
        command = re.sub(r"localhost:800\d", f"127.0.0.1:{server.port}", example)
        command = command.replace("curl", "curl -sw '\\n%{http_code}'", 1).partition("\n\n")[0]
        for placeholder, value in known.items():
            command = command.replace(placeholder, value)
        run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        body, _, status = run.stdout.rpartition("\n")
        answers.append(int(status))
        made = json.loads(body) if body else {}
        known |= {f"<{k}_token>": v for k, v in made.items() if k in {"access", "refresh"}}
    assert answers == [201, 200, 200, 200, 201, 200, 201, 205]


def test_a_registered_user_is_answered_without_password_and_logs_in(server):
    name = f"jo{unique().decode()}"
    profile = {"first_name": "Jo", "last_name": "Ü", "email": f"{name}.Ü@Example.com"}
    profile |= {"username": name, "phone_number": f"49{name[-10:]}"}
    given = {**profile, "first_name": " Jo ", "username": f"  {name}  ", "is_admin": True}
    given |= {"id": 77, "password": "  12345678  ", "phone_number": int(profile["phone_number"])}
    status, value = server.call("POST", REGISTER.rstrip("/"), given)
    assert (status, value) == (201, {"id": value["id"], **profile})
    login = {"email": f"{name}.ü@EXAMPLE.COM", "password": "  12345678  "}
    status, tokens = server.call("POST", LOGIN, login)
    assert (status, claims_of(tokens["access"])["is_admin"]) == (200, False)
    headers = {"Authorization": f"Bearer {tokens['access']}"}
    assert server.call("GET", "/api/auth/profile/", headers=headers) == (200, value)
    assert server.call("POST", LOGIN, {**login, "password": "12345678"})[0] == 401


GOOD_ACCOUNT = {"email": "good@example.org", "password": "12345678"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"email": None}, "This field may not be null."),
        ({"email": "   "}, "This field may not be blank."),
        ({"email": ...}, "This field is required."),
        ({"email": "nobody"}, "Enter a valid email address."),
        ({"email": "a@b"}, "Enter a valid email address."),
        ({"email": "a@-b.com"}, "Enter a valid email address."),
        ({"email": "a@192.0.2.1"}, "Enter a valid email address."),
        ({"email": "a@b_c.com"}, "Enter a valid email address."),
        ({"email": ["a@b.de"]}, "Not a valid string."),
        ({"email": "a@b.de\0"}, "Null characters are not allowed."),
        ({"email": "\ud800@b.de"}, "Surrogate characters are not allowed."),
        ({"email": "x" * 250 + "@b.de"}, "Ensure this field has no more than 254 characters."),
        ({"password": "1234567"}, "Ensure this field has at least 8 characters."),
        ({"password": ""}, "This field may not be blank."),
        ({"password": "x" * 5000}, "Ensure this field has no more than 1024 characters."),
        ({"last_name": "x" * 151}, "Ensure this field has no more than 150 characters."),
        ({"username": True}, "Not a valid string."),
    ],
)
def test_a_registration_that_is_wrong_is_refused_with_a_field_map(server, change, message):
    body = {k: v for k, v in {**GOOD_ACCOUNT, **change}.items() if v is not ...}
    assert server.call("POST", REGISTER, body) == (400, {next(iter(change)): [message]})


def test_all_that_is_wrong_with_a_form_is_told_at_once(server, jane, django):
    body = {"email": "nobody", "password": "short", "username": jane.name, "first_name": None}
    status, value = server.call("POST", REGISTER, body)
    assert (status, set(value)) == (400, set(body))
    status, value = server.call("POST", REGISTER, {"email": jane.email, "password": "short"})
    assert (status, set(value)) == (400, {"email", "password"})
    status, value = django.upload(b"no picture", name="  ", type="film", size="x")
    assert (status, set(value)) == (400, {"file", "name", "type", "size"})
    assert django.files() == []


def test_unique_fields_are_unique_only_the_email_in_any_case_and_blank_is_none(server, jane):
    def register(**fields: str) -> tuple[int, Any]:
        email = f"{unique().decode()}@x.org"
        return server.call("POST", REGISTER, {"email": email, "password": "12345678", **fields})

    phone = unique().decode()
    for _ in range(2):
        status, value = register(username=" ", phone_number="")
        assert (status, value["username"], value["phone_number"]) == (201, None, None)
    assert register(phone_number=phone)[0] == 201
    taken = [
        ("email", jane.email.upper()), ("username", jane.name), ("phone_number", phone),
        ("username", jane.email.upper()),  # a login takes either
    ]  # fmt: skip
    assert [register(**{field: value}) for field, value in taken] == [
        (400, {field: [f"user with this {field.replace('_', ' ')} already exists."]})
        for field, _ in taken
    ]
    name = f"{unique().decode()}@x.org"
    assert register(username=name)[0] == register(username=name.upper())[0] == 201
    assert register(email=name.title())[1] == {"email": ["user with this email already exists."]}
    assert set(server.call("POST", REGISTER, {})[1]) == {"email", "password"}
    email = f"{unique().decode()}@x.org"
    assert sorted(together(3, lambda _: register(email=email)[0])) == [201, 400, 400]


def test_a_login_may_come_in_any_form_by_name_or_email(server, jane):
    fields = {"username": jane.email.upper(), "password": jane.password}
    forms = (urlencode(fields), "application/x-www-form-urlencoded"), form(None, None, **fields)
    answers = [server.request("POST", LOGIN, body, {"Content-Type": of_type})
               for body, of_type in forms]  # fmt: skip
    assert [(answer.status, set(answer.json)) for answer in answers] == [
        (200, {"access", "refresh"})] * 2  # fmt: skip
    assert jane.login(email=jane.email)[0] == 200
    needed = ["This field is required."]
    assert server.call("POST", LOGIN, {"password": "x"}) == (400, {"username": needed})
    assert server.call("POST", LOGIN, {"username": "x"}) == (400, {"password": needed})
    both = {"username": needed, "password": needed}
    assert server.call("POST", LOGIN, {}) == (400, both)


def test_wrong_password_and_unknown_user_are_told_alike(jane):
    wrong, unknown = jane.login(password="wrong", email=jane.email), jane.login(username="nobody")
    detail = {"detail": "No active account found with the given credentials"}
    assert wrong == unknown == (401, detail)
    jane.login()  # clears the count


def test_tokens_carry_the_claims_of_simplejwt_which_reads_them(server, jane):
    tokens = jane.login()[1]
    access, refresh = claims_of(tokens["access"]), claims_of(tokens["refresh"])
    assert " ".join(sorted(access)) == (
        "email exp first_name iat is_admin jti last_name permissions session token_type user_id"
    )
    assert (access["token_type"], refresh["token_type"]) == ("access", "refresh")
    assert access["user_id"] == refresh["user_id"] == jane.id
    assert access["exp"] - access["iat"] == 30 * 60
    assert refresh["exp"] - refresh["iat"] == 7 * 86400
    assert (access["email"], access["permissions"]) == (jane.email, [])
    assert access["jti"] != refresh["jti"]
    simplejwt = configured_simplejwt()
    assert simplejwt.AccessToken(tokens["access"])["email"] == jane.email
    assert simplejwt.RefreshToken(tokens["refresh"])["user_id"] == jane.id
    made = simplejwt.AccessToken()
    made["user_id"] = jane.id
    headers = {"Authorization": f"Bearer {made}"}
    assert server.call("GET", "/api/auth/profile/", headers=headers)[1]["email"] == jane.email


def test_a_django_backends_user_owns_records_and_has_no_profile(server):
    record = {"name": "d", "type": "audio"}
    made = [server.call("POST", MEDIA, record, bearer(user_id=id_)) for id_ in (4711, "4711")]
    assert [(status, value["user"]) for status, value in made] == [(201, 4711)] * 2
    headers = bearer(user_id=4711)
    assert server.call("GET", "/api/auth/profile/", headers=headers)[0] == 404
    change = {"old_password": "x", "new_password": "12345678"}
    assert server.call("POST", "/api/auth/password/", change, headers)[0] == 404


def test_a_new_account_gets_no_id_under_which_another_programs_user_has_records(start):
    running = start()
    last = User(running).id
    for foreign in (last + 1, last + 2):
        User(running, foreign).record()
    made = User(running)
    assert made.id == last + 3
    assert made.call("GET", MEDIA)[1]["count"] == 0


def age_session(server: Server, refresh: str, seconds: float) -> None:
    """Have a session's last refresh lie so much longer ago."""
    with server.index() as db:
        sql = "UPDATE session SET rotated_at = rotated_at - ? WHERE id = ?"
        assert db.execute(sql, (seconds, claims_of(refresh)["session"])).rowcount == 1


def test_a_spent_refresh_token_gives_its_successor_again_for_ten_seconds(server, jane):
    first, other = jane.login()[1]["refresh"], jane.login()[1]["refresh"]
    second = jane.refresh(first)[1]["refresh"]
    age_session(server, first, 8)  # the answer was lost, or another tab was later
    status, again = jane.refresh(first)
    assert status == 200
    assert claims_of(again["refresh"])["jti"] == claims_of(second)["jti"]
    headers = {"Authorization": f"Bearer {again['access']}"}
    assert server.call("GET", "/api/auth/profile/", headers=headers)[0] == 200
    third = jane.refresh(again["refresh"])[1]["refresh"]
    assert claims_of(third)["jti"] != claims_of(second)["jti"]
    assert claims_of(jane.refresh(second)[1]["refresh"])["jti"] == claims_of(third)["jti"]
    age_session(server, first, 11)
    assert jane.refresh(second)[0] == 401  # too late: it was stolen
    assert jane.refresh(third)[0] == 401  # and the session is over
    assert jane.refresh(other)[0] == 200


def test_a_refresh_token_that_was_spent_two_rotations_ago_ends_its_session_at_once(jane):
    first = jane.login()[1]["refresh"]
    third = jane.refresh(jane.refresh(first)[1]["refresh"])[1]["refresh"]
    assert jane.refresh(first)[0] == 401
    assert jane.refresh(third)[0] == 401


@pytest.mark.parametrize("workers", ["1", "2"])
def test_tabs_that_refresh_at_once_all_get_the_one_successor(start, workers):
    running = start("--workers", workers)
    user = User(running)
    for _ in range(3):
        token = user.login()[1]["refresh"]
        answers = together(6, lambda _, token=token: user.refresh(token))
        assert [status for status, _ in answers] == [200] * 6
        assert len({claims_of(value["refresh"])["jti"] for _, value in answers}) == 1
    assert user.refresh(answers[0][1]["refresh"])[0] == 200


def drf_answer(method: str, view: Any, body: Any = None, **headers: str) -> tuple[int, Any]:
    """What a view of Django REST Framework answers."""
    factory = need("rest_framework.test").APIRequestFactory()
    request = getattr(factory, method.lower())("/", body, format="json", **headers)
    answer = view(request)
    answer.render()
    return answer.status_code, json.loads(answer.content)


def shape(value: Any) -> Any:
    """A JSON value without its sentences: those are each program's own."""
    if isinstance(value, dict):
        texts = {"detail", "message"}
        return {k: "" if k in texts else shape(v) for k, v in value.items()}
    return [shape(each) for each in value] if isinstance(value, list) else value


BAD_VALUES = [
    None,
    "",
    "   ",
    1.5,
    True,
    [],
    {},
    ["x"],
    "x" * 11000,
    "a\0b and so on",
    "\u00e9" * 256,
]
BAD_VALUES_OF: dict[str, list[Any]] = {  # where Django says two things of one value
    "email": [None, "", " ", 1, "x", "@", "a@", "@b.de", "a b@c.de", "a@b..de", "a@-b.de", "a@b"],
    "type": [None, "", "film", "Image", 1.5, True, [], {}, ["x"], "a\0b"],
    "size": [-1, "-1", "x", "1.5", 1.5, True, [], {}, "image"],
}
BAD_FORMS: dict[str, tuple[dict[str, Any], list[Any]]] = {  # what is right, and what is no form
    "/api/auth/register/": (
        {"email": "a@refused.example", "password": "longenough"},
        [{}, [], "x", 1, {"email": "x"}, {"password": "short"}, {"email": "a@b", "password": "1"}],
    ),
    "/api/media/media/": (
        {"name": "n", "type": "image"},
        [{}, [], {"name": ""}, {"type": "film"}, {"size": -1}, {"size": "x", "type": ""}],
    ),
    "/api/media/collections/": ({"name": "n"}, [{}, [], {"description": []}]),
    "/api/auth/token/refresh/": ({"refresh": "x"}, [{}, [], {"x": 1}]),
}


def serializers() -> dict[str, Any]:
    """The forms of document 002 as Django REST Framework declares them."""
    of = need("rest_framework.serializers")

    def text(longest: int | None, **more: Any) -> Any:
        return of.CharField(max_length=longest, **more)

    maybe = {"required": False, "allow_blank": True}
    null = {**maybe, "allow_null": True}
    kinds = of.ChoiceField(choices=["image", "video", "audio"])
    size = of.IntegerField(min_value=0, required=False, allow_null=True)
    fields = {
        "/api/auth/register/": {
            "first_name": text(150, **maybe), "last_name": text(150, **maybe),
            "email": of.EmailField(max_length=254), "username": text(150, **null),
            "phone_number": text(32, **null),
            "password": text(1024, min_length=8, trim_whitespace=False),
        },
        "/api/media/media/": {
            "name": text(255), "type": kinds, "size": size, "storage_path": text(1024, **null),
            "description": text(10000, **null),
        },
        "/api/media/collections/": {"name": text(255), "description": text(10000, **null)},
        "/api/auth/token/refresh/": {"refresh": text(8192)},
    }  # fmt: skip
    return {path: type("Form", (of.Serializer,), declared) for path, declared in fields.items()}


def test_what_django_rest_framework_refuses_is_refused_in_the_same_words(server):
    configured_simplejwt()
    views, count = need("rest_framework.views"), 0
    for path, form_class in serializers().items():

        class View(views.APIView):  # type: ignore[misc]
            authentication_classes = permission_classes = ()
            serializer = form_class

            def post(self, request: Any) -> Any:
                self.serializer(data=request.data).is_valid(raise_exception=True)
                return need("rest_framework.response").Response({})

        good, bad = BAD_FORMS[path]
        for name in form_class().fields:
            bad = [*bad, *({**good, name: each} for each in BAD_VALUES_OF.get(name, BAD_VALUES))]
        theirs = [drf_answer("POST", View.as_view(), value) for value in bad]
        asked = [(value, said) for value, said in zip(bad, theirs, strict=True) if said[0] == 400]
        ours = [server.call("POST", path, value, bearer()) for value, _ in asked]
        assert ours == [said for _, said in asked], path
        count += len(asked)
    assert count >= 100


def test_tokens_are_refused_with_the_members_and_codes_of_simplejwt(server, jane):
    simplejwt = configured_simplejwt()
    views, api = need("rest_framework_simplejwt.views"), need("rest_framework.views")
    authentication = need("rest_framework_simplejwt.authentication")

    class Profile(api.APIView):  # type: ignore[misc]
        authentication_classes = (authentication.JWTStatelessUserAuthentication,)

        def get(self, request: Any) -> None:
            raise AssertionError("a bad token was accepted")

    tokens = jane.login()[1]
    expired = simplejwt.AccessToken()
    expired["user_id"] = jane.id
    expired.set_exp(lifetime=datetime.min - datetime(1, 1, 1, 1))
    spoilt = tokens["access"][:-4] + "AAAA"
    bad = [
        "Bearer x", "Bearer a.b.c", f"Bearer {expired}", f"Bearer {spoilt}", "Bearer",
        f"Bearer {tokens['refresh']}", f"Bearer {tokens['access']} x",
    ]  # fmt: skip
    theirs = [drf_answer("GET", Profile.as_view(), HTTP_AUTHORIZATION=header) for header in bad]
    answers = [server.get("/api/auth/profile/", Authorization=header) for header in bad]
    assert [(answer.status, shape(answer.json)) for answer in answers] == [
        (status, shape(value)) for status, value in theirs
    ]
    assert [each.json for each in answers if not each.json["detail"]] == []
    assert {answer.headers["WWW-Authenticate"].split()[0] for answer in answers} == {"Bearer"}
    refresh = simplejwt.RefreshToken()
    refresh.set_exp(lifetime=datetime.min - datetime(1, 1, 1, 1))
    bad, view = ["x", "a.b.c", tokens["access"], str(refresh), spoilt], views.TokenRefreshView
    ours = [jane.refresh(token) for token in bad]
    theirs = [drf_answer("POST", view.as_view(), {"refresh": token}) for token in bad]
    assert [(status, shape(value)) for status, value in ours] == [
        (status, shape(value)) for status, value in theirs
    ]
    jane.call("POST", "/api/auth/logout/", {"refresh": tokens["refresh"]})
    spent = jane.refresh(tokens["refresh"])[1]
    assert (set(spent), spent["code"]) == ({"detail", "code"}, "token_not_valid")
    elsewhere = server.get("/media", Authorization="Bearer x")
    assert (elsewhere.status, set(elsewhere.json)) == (401, {"detail"})


def test_a_user_sees_and_ends_sessions_and_nobody_elses(server, jane):
    user = User(server)
    agent = "Mozilla/5.0 (Phone) " + "x" * 200
    headers = {"X-Forwarded-For": "2001:db8::7", "User-Agent": agent}
    login = {"username": user.name, "password": user.password}
    phone = server.call("POST", LOGIN, login, headers)[1]["refresh"]
    laptop = user.login()[1]["refresh"]
    age_session(server, phone, 60)
    path = "/api/auth/sessions/"
    assert server.call("GET", path)[0] == 401
    status, sessions = user.call("GET", path)
    assert (status, len(sessions)) == (200, 2)
    assert list(sessions[1]) == ["id", "created_at", "last_used_at", "address", "user_agent"]
    assert (sessions[1]["address"], sessions[1]["user_agent"]) == ("2001:db8::7", agent[:120])
    assert sessions[1]["last_used_at"] < sessions[1]["created_at"] <= sessions[0]["created_at"]
    assert [each["id"] for each in jane.call("GET", path)[1]] != [s["id"] for s in sessions]
    one = f"{path}{sessions[1]['id']}/"
    assert jane.call("DELETE", one)[0] == 404
    assert user.call("DELETE", one) == (204, None)
    assert user.call("DELETE", one)[0] == 404
    assert (user.refresh(phone)[0], user.refresh(laptop)[0]) == (401, 200)


def test_logout_of_all_ends_every_session_of_the_caller(server, jane):
    user, path = User(server), "/api/auth/logout/"
    sessions = [user.login()[1]["refresh"] for _ in range(3)]
    kept = jane.login()[1]["refresh"]
    needed = 400, {"refresh": ["This field is required."]}
    bodies = ({}, {"all": False}, {"all": "false"})
    assert [user.call("POST", path, body) for body in bodies] == [needed] * 3
    assert "all" in user.call("POST", path, {"all": "maybe"})[1]
    assert user.call("POST", path, {"all": True}) == (205, None)
    assert [user.refresh(session)[0] for session in sessions] == [401] * 3
    assert user.call("GET", "/api/auth/sessions/") == (200, [])
    assert jane.refresh(kept)[0] == 200


def test_what_is_no_refresh_token_of_ours_is_refused(jane):
    access = jane.headers["Authorization"].removeprefix("Bearer ")
    foreign = bearer(user_id=jane.id, token_type="refresh", jti="0" * 32)["Authorization"][7:]
    assert [jane.refresh(token)[0] for token in ("", "x" * 9000)] == [400, 400]
    assert [jane.refresh(token)[0] for token in ("x", "a.b.c", access, foreign)] == [401] * 4


def test_logout_spends_the_callers_token_and_says_so_once(server, jane, django):
    tokens = jane.login()[1]
    path, body = "/api/auth/logout/", {"refresh": tokens["refresh"]}
    assert server.call("POST", path, body)[0] == 401
    status, value = django.call("POST", path, body)
    assert (status, set(value)) == (400, {"error"})
    headers = {"Authorization": f"Bearer {tokens['access']}"}
    assert server.call("POST", path, body, headers) == (205, None)
    assert jane.refresh(tokens["refresh"])[0] == 401
    again = [jane.call("POST", path, each) for each in (body, {"refresh": "nonsense"})]
    assert [(status, [*value]) for status, value in again] == [(400, ["error"])] * 2


def test_a_new_password_ends_every_session(server):
    user, path = User(server), "/api/auth/password/"
    session = user.login()[1]["refresh"]
    change = {"old_password": "wrong", "new_password": " new password "}
    status, value = user.call("POST", path, change)
    assert (status, set(value)) == (400, {"old_password"})
    status, value = user.call("POST", path, {**change, "new_password": "short"})
    assert (status, set(value)) == (400, {"old_password", "new_password"})
    change["old_password"] = user.password
    status, value = user.call("POST", path, {**change, "new_password": "short"})
    assert (status, set(value)) == (400, {"new_password"})
    assert user.call("POST", path, change) == (204, None)
    assert user.refresh(session)[0] == 401
    assert user.login()[0] == 401
    assert user.login(password=" new password ", email=user.email)[0] == 200


def failures(
    server: Server, name: str, addresses: list[str], field: str = "username"
) -> list[int]:
    """The statuses of logins with a wrong password, one from each address."""
    body = {field: name, "password": "wrong"}
    return [
        server.call("POST", LOGIN, body, {"X-Forwarded-For": address})[0] for address in addresses
    ]


def test_five_failures_close_an_account_under_all_its_names_and_unknown_ones_alike(server):
    user = User(server)
    for name, email, mark in (
        (user.name, user.email.upper(), "a"), ("ghost@x.org", "GHOST@X.org", "b"),
    ):  # fmt: skip
        assert failures(server, name, [f"{mark}1", f"{mark}2", f"{mark}3"]) == [401] * 3
        assert failures(server, email, [f"{mark}4", f"{mark}5", f"{mark}6"], "email") == [
            401, 401, 429,
        ]  # fmt: skip
    body = json.dumps({"email": user.email, "password": user.password})
    answer = server.request("POST", LOGIN, body, {"Content-Type": "application/json"})
    assert answer.status == 429
    assert 0 < int(answer.headers["Retry-After"]) <= 900


def test_twenty_failures_close_an_address_for_everyone(server, jane):
    statuses = together(20, lambda number: failures(server, f"name{number}", ["closed"])[0])
    assert statuses == [401] * 20
    body = {"username": jane.name, "password": jane.password}
    assert server.call("POST", LOGIN, body, {"X-Forwarded-For": "closed"})[0] == 429
    assert server.call("POST", LOGIN, body, {"X-Forwarded-For": "elsewhere"})[0] == 200
    headers = {"X-Forwarded-For": "closed", "Content-Type": "application/json"}
    answer = server.request("POST", LOGIN, json.dumps(body), headers, source="127.0.0.2")
    assert answer.status == 200  # no proxy of ours: its own address counts


def test_a_success_clears_the_count_and_guesses_at_once_get_no_further_than_five(server):
    user = User(server)
    assert failures(server, user.name, [f"s{number}" for number in range(4)]) == [401] * 4
    assert together(4, lambda _: user.login()[0]) == [200] * 4
    statuses = together(9, lambda number: failures(server, user.name, [f"r{number}"])[0])
    assert sorted(statuses) == [401] * 5 + [429] * 4


def test_a_login_that_nothing_was_found_out_of_does_not_count(settings_of, tmp_path, monkeypatch):
    """There was no memory for scrypt, as often as an account may fail."""
    settings = settings_of(f"--storage_dir={tmp_path}")
    ms.make_folders(settings)
    stored = ms.hash_password("correct horse")
    with ms.opened_app(settings) as app:
        request = ms.Request(app, ms.parse_request_head(get_line("/")[:-4]), "192.0.2.1")

        def log_in() -> bool:
            return ms.check_login(request, "account 1", "correct horse", stored)

        def fail(*_: str) -> bool:
            raise MemoryError

        with monkeypatch.context() as short:
            short.setattr(ms, "verify_password", fail)
            for _ in range(ms.MAX_ACCOUNT_FAILURES):
                with pytest.raises(MemoryError):
                    log_in()
        assert app.index.value("SELECT count(*) FROM login_failure") == 0
        assert log_in()


def processor_seconds(pid: int) -> float:
    """What a process has used (proc(5), utime and stime)."""
    status = Path(f"/proc/{pid}/stat")
    if not status.exists():
        pytest.skip("needs /proc")
    return sum(map(int, status.read_text().rsplit(")")[1].split()[11:13])) / os.sysconf(
        "SC_CLK_TCK"
    )


def test_a_throttled_login_costs_no_scrypt_and_outlives_a_crash(start):
    running = start()
    assert failures(running, "ghost", ["x"] * 5) == [401] * 5
    running.kill()
    running = start()
    running.scanned()
    begun = time.thread_time()
    ms.hash_password("x" * 8)
    one, before = time.thread_time() - begun, processor_seconds(running.process.pid)
    assert failures(running, "ghost", ["y"] * 20) == [429] * 20
    assert processor_seconds(running.process.pid) - before < 10 * one
    database = sqlite3.connect(running.data / "index.sqlite3", isolation_level=None)
    database.execute("UPDATE login_failure SET failed_at = failed_at - 901")
    assert failures(running, "ghost", ["y"]) == [401]
    (left,) = database.execute("SELECT count(*) FROM login_failure").fetchone()
    database.close()
    assert left == 2  # those of this one; what is older than the window is gone


def owner_says(server: Server, *words: str, stdin: str = "", **environment: str) -> Any:
    """Run a command of the owner on the folder of a running server."""
    storage = ("--storage_dir", server.storage)
    environment = {**SECRETS, **environment}
    return run_program(*words, *storage, cwd=server.storage.parent, stdin=stdin, **environment)


def test_a_folder_of_another_program_is_imported_once_with_its_names_and_times(start, tmp_path):
    running, source = start(), tmp_path / "old"
    content = {"2019/ü a.png": png(), "b.gif": gif(), ".thumbnails/x.png": png(), "note.txt": b"x"}
    fill(source, {**content, "2019/fake.jpg": b"no picture"})
    os.utime(source / "2019/ü a.png", (1e9, 1e9 + 0.25))
    (source / "link.png").symlink_to(source / "2019/ü a.png")

    def imported(*options: str) -> dict[str, list[str]]:
        run = owner_says(running, "import", source, *options)
        assert run.returncode == 0, run.stderr
        outcomes: dict[str, list[str]] = {}
        told = "after its next scan" in run.stderr
        for outcome, path, detail in (line.split("\t") for line in run.stdout.splitlines()):
            outcomes.setdefault(outcome, []).append(path)
            assert (detail == f"imported/old/{path}") is (outcome != "left")
        assert told == ("new" in outcomes and not options)
        return outcomes

    all_in = ["2019/ü a.png", "b.gif"]
    left = ["2019/fake.jpg", "note.txt", ".thumbnails/", "link.png"]
    assert imported("--dry-run") == {"new": all_in, "left": left}
    assert not (running.storage / "imported").exists()
    assert imported() == {"new": all_in, "left": left}
    assert imported() == imported("--dry-run") == {"here": all_in, "left": left}
    for name in all_in:
        copy = running.storage / "imported/old" / name
        assert copy.read_bytes() == content[name] == (source / name).read_bytes()
        assert copy.stat().st_mtime_ns == (source / name).stat().st_mtime_ns
    running.rescan()
    assert running.get(f"/image/{sha256(content['b.gif'])}").body == content["b.gif"]


def test_a_file_browser_s_root_is_imported_with_its_database_left(start, tmp_path):
    running, source = start(), tmp_path / "srv"
    kept = {"Photos/2024/a b.png": png(), "Videos/c.mp4": mp4(), "d.wav": wav() + unique()}
    bolt = bytes(16) + b"\xed\xda\x0c\xed" + bytes(4076)  # its first page
    others = {"filebrowser.db": bolt, ".filebrowser.json": b"{}", "Notes/e.txt": b"x"}
    fill(source, kept | others)
    before = everything_in(source)
    outcomes = [
        {tuple(line.split("\t")[:2]) for line in owner_says(running, "import", source, *options)
         .stdout.splitlines()} for options in (["--dry-run"], [], [])
    ]  # fmt: skip
    left = {("left", name) for name in others}
    new, here = ({(word, name) for name in kept} for word in ("new", "here"))
    assert outcomes == [new | left, new | left, here | left]
    assert everything_in(source) == before
    copies = {name: (running.storage / "imported/srv" / name).read_bytes() for name in kept}
    assert copies == kept


ACCOUNT = {"id": 3, "email": "x@example.com", "password": "pbkdf2_sha256$1$a$b"}
ITEM = {"model": "media_handler.media", "pk": 1}


@pytest.mark.parametrize(
    ("more", "status", "told"),
    [
        ({"auth_user": [ACCOUNT]}, 1, "failed\ttable auth_user of other.db\taccounts"),
        ({"people_person": [ACCOUNT, {**ACCOUNT, "id": 4}]}, 1, "failed\ttable people_person of"),
        ([{"model": "auth.user", "pk": 3, "fields": ACCOUNT}], 1, "failed\ttable auth_user"),
        ([{**ITEM, "fields": {"name": "x"}}], 1, "failed\tmedia 1\tits row is not understood"),
        ([{"model": "media_handler.media", "fields": {}}], 1, "failed\tmedia None"),
        ([ITEM], 1, "failed\tmedia 1\tits row is not understood"),
        ([{**ITEM, "fields": ["x"]}], 1, "failed\tmedia 1\tits row is not understood"),
        ([{"model": "auth.group", "pk": 3, "fields": {}}], 0, "left\ttable auth_group"),
        ({"django_migrations": [{"id": 1}], "empty_ones": []}, 0, "left\ttable django_m"),
        (b"", 0, "left\tother.png\tno record names it"),
        (b'{"kind": "no dump"}', 0, "7 taken in, 0 are here already, 0 left, 0 failed"),
        (b'[{"model": "auth.user", ' + b" " * 2000, 1, "looks like a dump, but cannot be read"),
    ],
)  # fmt: skip
def test_an_import_from_a_database_says_what_it_leaves_out_and_why(
    tmp_path, capsys, more, status, told
):
    source = tmp_path / "old"
    media_handler(source, "databases")
    if isinstance(more, dict):
        tables = {name: rows for name, rows in more.items() if rows}
        make_database(source / "other.db", tables)
    elif more:
        text = more if isinstance(more, bytes) else json.dumps(more).encode()
        (source / "other.json").write_bytes(text)
    else:
        (source / "other.png").write_bytes(png())
        fill(source, {"static/a/b.svg": b"<svg/>", "static/c.svg": b"<svg/>", "x/y.py": b"x"})
    (tmp_path / "new").mkdir()
    said = run_here("import", source, "--storage_dir", tmp_path / "new", status=status)
    said += capsys.readouterr().err
    assert told in said, said
    assert ("static/\t2 files, no record names it" in said) == (more == b"")
    assert "\tx/" not in said


@pytest.mark.parametrize("into", [(), ("--into", "entities")])
def test_a_folder_with_accounts_of_another_kind_is_made_public_by_no_guess(tmp_path, into):
    fill(tmp_path, {"old/a/b.png": png(), "new/c.png": png()})
    make_database(tmp_path / "old/DB.SQLITE3", {"auth_user": [ACCOUNT]})
    run = run_program("import", "old", *into, "--storage_dir", "new", cwd=tmp_path)
    assert (run.returncode, run.stdout) == (1, "")
    assert "table auth_user of DB.SQLITE3 has accounts" in run.stderr


def test_an_import_tells_what_it_cannot_read(scanning, monkeypatch, tmp_path):
    fill(tmp_path / "old", {"a.png": png(), "closed/b.png": png()})
    origin = ms.Folder("source", tmp_path / "old", make=False, buffers=ms.WriteBuffers())
    closed = failing(os.open, OSError(errno.EACCES, "no"), "closed")
    library = ms.DESTINATIONS["library"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", closed)
        told = dict(ms.import_files(origin, scanning.folder, library, is_trial=True))
    assert (told["a.png"].word, told["closed/"]) == ("new", ("failed", "it cannot be read"))


def test_an_import_overwrites_nothing_and_finds_its_copy_again(start, tmp_path):
    running, source, mine = start(), tmp_path / "old", png()
    fill(running.storage, {"imported/old/a.png": mine})
    fill(source, {"a.png": png(), "sub/b.png": png()})
    for outcome in ("new", "here"):
        run = owner_says(running, "import", source)
        assert f"{outcome}\ta.png\timported/old/a_1.png" in run.stdout
    assert (running.storage / "imported/old/a.png").read_bytes() == mine
    assert not left_arriving(running.storage)


@pytest.mark.parametrize(
    ("family", "path"), [("media", "/media/a.png"), ("images", "/image/a.png")]
)
def test_an_imported_picture_keeps_its_address_and_stays_private_where_it_was(
    start, tmp_path, family, path
):
    running, source, content = start(), tmp_path / "old", png()
    fill(source, {"a.png": content, "film.mp4": mp4()})
    run = owner_says(running, "import", source)
    assert run.returncode == 1
    assert "--into images" in run.stderr  # rather than publish what may be private
    run = owner_says(running, "import", source, "--into", family)
    assert run.returncode == 0
    assert "left\tfilm.mp4\tits content is video/mp4" in run.stdout
    running.rescan()
    assert running.get(path, **READER).body == content
    assert running.get(path).status == (200 if family == "media" else 401)
    if family == "images":
        assert running.get(f"/image/{sha256(content)}").status == 404


def make_database(path: Path, tables: Mapping[str, list[dict[str, Any]]]) -> None:
    """A database as another program leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for table, rows in tables.items():
            names = ", ".join(rows[0])
            db.execute(f'CREATE TABLE "{table}" ({names})')
            marks = ", ".join("?" * len(rows[0]))
            db.executemany(
                f'INSERT INTO "{table}" VALUES ({marks})', [[*row.values()] for row in rows]
            )


def django_hash(password: str) -> str:
    key = hashlib.pbkdf2_hmac("sha256", password.encode(), b"NaCl", 1000)
    return f"pbkdf2_sha256$1000$NaCl${base64.b64encode(key).decode()}"


SHOWN, HIDDEN = png_of(300), png_of(400)


def media_handler(source: Path, form: str) -> dict[str, str]:
    """What media_handler leaves: its two databases, or dumps of them; the ids of its things."""
    ids = {name: str(uuid.uuid4()) for name in ("shelf", "shown", "hidden", "lost", "note")}
    day = "2025-09-16 06:59:00.123456"
    mary = {
        "id": 7, "password": django_hash("correct horse"), "first_name": "Mary", "last_name": "Ä",
        "email": "Mary@example.com", "username": "mary", "phone_number": None, "is_active": 1,
        "is_staff": 0, "is_superuser": 0, "last_login": None, "date_joined": day,
    }  # fmt: skip
    ann = {**mary, "id": 9, "email": "ann@example.com", "username": None, "password": "bcrypt$x",
           "is_active": 0}  # fmt: skip
    row = {"created_at": day, "updated_at": day}
    shelf = {"id": ids["shelf"], "user": 7, "name": "Summer", "description": None, **row}

    def record(name: str, file: str | None, **more: Any) -> dict[str, Any]:
        return {"id": ids[name], "user": 7, "name": name, "type": "image", "size": 5, "file": file,
                "storage_path": file, "description": "d", "is_deleted": 0, "collection_id": None,
                **row, **more}  # fmt: skip

    records = [
        record("shown", "image/a.png", collection_id=ids["shelf"]),
        record("hidden", "image/b.png", is_deleted=1), record("lost", "image/gone.png", user=9),
        record("note", None, storage_path="image/b.png"),
    ]  # fmt: skip
    tables = {"accounts_customuser": [mary, ann], "media_handler_collection": [shelf],
              "media_handler_media": records}  # fmt: skip
    fill(source / "backend_server/media", {"image/a.png": SHOWN, "image/b.png": HIDDEN})
    if form == "dump":
        items = []
        for table, rows in tables.items():
            for row in rows:
                fields = {name: value for name, value in row.items() if name != "id"}
                if "collection_id" in fields:
                    fields["collection"] = fields.pop("collection_id")
                app, _, model = table.rpartition("_")
                items.append({"model": f"{app}.{model}", "pk": row["id"], "fields": fields})
        (source / "dump.json").write_text(json.dumps(items))
        (source / "package.json").write_text("{}")
        return ids
    for row in (shelf, *records):  # SQLite has no UUIDs
        row["id"] = row["id"].replace("-", "")
        if row.get("collection_id"):
            row["collection_id"] = row["collection_id"].replace("-", "")
    make_database(
        source / "auth_server/db.sqlite3", {"accounts_customuser": tables["accounts_customuser"]}
    )
    del tables["accounts_customuser"]
    make_database(source / "backend_server/db.sqlite3", tables)
    return ids


@pytest.mark.parametrize("form", ["databases", "dump"])
def test_what_media_handler_knows_is_taken_in_once_with_its_ids_and_passwords(
    start, tmp_path, form
):
    running, source = start(), tmp_path / "media_handler"
    ids = media_handler(source, form)
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}

    def imported(*options: str) -> Counter[str]:
        run = owner_says(running, "import", source, *options)
        assert run.returncode == 0, run.stdout + run.stderr
        return Counter(line.split("\t")[0] for line in run.stdout.splitlines())

    assert imported("--dry-run") == {"new": 7}
    assert running.call("POST", LOGIN, {"username": "mary", "password": "correct horse"})[0] == 401
    assert imported() == {"new": 7}
    assert imported() == imported("--dry-run") == {"here": 7}
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    status, tokens = running.call("POST", LOGIN, {"username": "mary", "password": "correct horse"})
    assert (status, claims_of(tokens["access"])["user_id"]) == (200, 7)
    headers = {"Authorization": f"Bearer {tokens['access']}"}
    profile = running.call("GET", "/api/auth/profile/", headers=headers)[1]
    assert (profile["email"], profile["last_name"]) == ("Mary@example.com", "Ä")
    shown = running.call("GET", f"{MEDIA}{ids['shown']}/", headers=headers)[1]
    assert running.get(local(shown["file"])).body == SHOWN
    assert (shown["storage_path"], shown["size"]) == ("image/a.png", 300)
    assert shown["created_at"].startswith("2025-09-16T06:59:00.123")
    shelf = running.call("GET", f"{SHELVES}{ids['shelf']}/", headers=headers)[1]
    assert [each["id"] for each in shelf["media"]] == [ids["shown"]]
    note = running.call("GET", f"{MEDIA}{ids['note']}/", headers=headers)[1]
    assert (note["file"], note["storage_path"]) == (None, "image/b.png"), "a note is no file"
    assert running.call("GET", f"{MEDIA}{ids['hidden']}/", headers=headers)[0] == 404
    assert owner_says(running, "trash", "restore", ids["hidden"]).returncode == 0
    hidden = running.call("GET", f"{MEDIA}{ids['hidden']}/", headers=headers)[1]
    assert running.get(local(hidden["file"])).body == HIDDEN
    users = owner_says(running, "user", "list").stdout
    assert "9\tann@example.com\t-\tdisabled" in users
    assert owner_says(running, "verify").returncode == 0


def test_records_are_given_to_nobody_who_may_be_another(start, tmp_path):
    running, source = start(), tmp_path / "media_handler"
    media_handler(source, "databases")
    (source / "auth_server/db.sqlite3").unlink()
    with running.index() as db:
        db.execute("INSERT INTO sqlite_sequence VALUES ('user', 6)")
    assert User(running).id == 7
    run = owner_says(running, "import", source)
    outcomes = [line.split("\t")[0] for line in run.stdout.splitlines()]
    assert (run.returncode, sorted(outcomes)) == (1, ["failed"] * 4 + ["new"])


def test_who_registered_with_another_s_address_is_given_nothing_of_theirs(start, tmp_path):
    running, source = start(), tmp_path / "media_handler"
    media_handler(source, "databases")
    fields = {"email": "mary@EXAMPLE.com", "password": "12345678"}
    assert running.call("POST", REGISTER, fields)[0] == 201
    run = owner_says(running, "import", source)
    outcomes = Counter(line.split("\t")[0] for line in run.stdout.splitlines())
    assert (run.returncode, outcomes) == (1, {"failed": 5, "new": 2})  # ann's are new
    assert "another account has its email" in run.stdout
    for _ in range(2):  # the owner knows who it is
        run = owner_says(running, "import", source, "--join")
        assert (run.returncode, "here\tuser 7" in run.stdout) == (0, True), run.stdout
    mary = running.call("POST", LOGIN, fields)[1]["access"]
    listed = running.call("GET", MEDIA, headers={"Authorization": f"Bearer {mary}"})[1]
    assert {item["name"] for item in listed["results"]} == {"shown", "note"}


def colan(source: Path) -> None:
    """What CoLAN's media store leaves, with an entity that was changed twice."""
    blank = dict.fromkeys(
        (
            "create_date",
            "file_size",
            "height",
            "width",
            "duration",
            "mime_type",
            "type",
            "extension",
        )
    )
    content = SHOWN
    path = f"2025/11/24/{md5(content)}.png"
    shelf = {"id": 3, "is_collection": 1, "label": "Shelf", "description": None, "parent_id": None,
             "added_date": 1763980000123, "updated_date": 1763980000123, **blank, "md5": None,
             "file_path": None, "is_deleted": None}  # fmt: skip
    picture = {**shelf, "id": 4, "is_collection": 0, "label": "now", "parent_id": 3,
               "added_date": "1763980000123",  # the first versions have a column of texts
               "updated_date": 1763980002000, "md5": md5(content), "file_path": path,
               "is_deleted": 0}  # fmt: skip
    gone = {**picture, "id": 5, "parent_id": None, "is_deleted": 1, "md5": "0" * 32,
            "file_path": "2025/11/24/gone.png"}  # fmt: skip
    old = {**picture, "label": "then", "updated_date": 1763980000123, "md5": "1" * 32,
           "file_path": "2025/11/24/old.png"}  # fmt: skip
    states = [
        (old, 2, 0),
        ({**old, "label": "later"}, 5, 1),
        (picture, 6, 1),
        ({**gone, "id": 6}, 7, 2),
    ]
    versions = [{**row, "transaction_id": number, "end_transaction_id": None,
                 "operation_type": kind} for row, number, kind in states]  # fmt: skip
    make_database(
        source / "media_store.db",
        {"entities": [shelf, picture, gone], "entities_version": versions},
    )
    fill(source / "media_store", {path: content})


def test_what_colan_s_media_store_knows_is_taken_in_once_with_its_versions(start, tmp_path):
    running, source = start(), tmp_path / "data"
    colan(source)
    assert owner_says(running, "import", source, "--dry-run").stdout.count("new\tentity") == 3
    first, again = (owner_says(running, "import", source) for _ in range(2))
    assert (first.returncode, first.stdout.count("new\t")) == (0, 3), first.stdout + first.stderr
    assert "its file 2025/11/24/gone.png is gone" in first.stdout
    assert "left\tentity 6\tit was deleted there" in first.stdout
    assert "versions: 3, of older ones 2025/11/24/old.png is gone" in first.stdout
    assert (again.returncode, again.stdout.count("here\t")) == (0, 3)
    entities = Entities(running)
    item = entities.get(4)
    assert (item["label"], item["parent_id"], item["md5"]) == ("now", 3, md5(SHOWN))
    assert (item["added_date"], item["file_path"]) == (
        "2025-11-24T10:26:40.123000Z", f"2025/11/24/{md5(SHOWN)}.png",
    )  # fmt: skip
    assert entities.content(4) == SHOWN
    assert [each["label"] for each in entities.get("4/versions")] == ["then", "later", "now"]
    assert entities.get(5)["is_deleted"] is True
    assert entities.create(png())["id"] == 6
    assert owner_says(running, "verify").returncode == 0


def test_an_entity_s_id_that_is_taken_is_told(start, tmp_path):
    running, source = start(), tmp_path / "data"
    colan(source)
    for _ in range(4):
        mine = Entities(running).create(png())
    run = owner_says(running, "import", source)
    assert run.returncode == 1
    assert "failed\tentity 4\tanother entity has its id here" in run.stdout
    assert Entities(running).get(4) == mine


def test_a_folder_without_a_database_is_no_source_of_records(start, tmp_path):
    running = start()
    fill(tmp_path / "old", {"a.sqlite3": b"SQLite format 3\0" + bytes(100), "sub/a.png": png()})
    run = owner_says(running, "import", tmp_path / "old")
    assert (run.returncode, "a.sqlite3 cannot be read" in run.stderr) == (1, True)
    (tmp_path / "old/a.sqlite3").write_bytes(b"x")
    run = owner_says(running, "import", tmp_path / "old", "--into", "entities")
    assert (run.returncode, "there is no database" in run.stderr) == (1, True)


@pytest.mark.parametrize("dump", ['[{"model": "media_handler.media", "pk"', "[" * 100_000])
def test_a_dump_that_is_cut_off_publishes_no_file_of_an_account(tmp_path, dump):
    fill(tmp_path, {"old/a.png": png(), "old/dump.json": dump.encode(), "new/b.png": png()})
    run = run_program("import", "old", "--dry-run", "--storage_dir", "new", cwd=tmp_path)
    assert (run.returncode, "looks like a dump" in run.stderr) == (1, "model" in dump)
    assert "Traceback" not in run.stderr


def test_an_import_of_what_is_served_already_or_is_no_folder_is_refused(start, tmp_path):
    running = start()
    fill(running.storage, {"sub/sub/a.png": png()})
    sources = (running.storage, running.storage / "sub", tmp_path / "none", PROGRAM)
    runs = [owner_says(running, "import", source) for source in sources]
    assert [(run.returncode, run.stdout) for run in runs] == [(1, "")] * 4
    assert owner_says(running, "import", tmp_path, "--into", "x").returncode == 2


def test_the_owner_grants_and_revokes_while_the_server_runs(server):
    user, granted = User(server), ["media_store_read", "media_store_write"]
    first = user.login()[1]
    assert owner_says(server, "user", "grant", user.email.upper(), *granted).returncode == 0
    assert claims_of(first["access"])["permissions"] == []
    second = user.refresh(first["refresh"])[1]
    assert claims_of(second["access"])["permissions"] == granted
    headers = {"Authorization": f"Bearer {second['access']}"}
    assert server.request("GET", "/image/none.png", headers=headers).status == 404
    assert owner_says(server, "user", "revoke", user.name, *granted).returncode == 0
    assert claims_of(user.login()[1]["access"])["permissions"] == []
    line = f"{user.id}\t{user.email}\t{user.name}\tactive"
    assert line in owner_says(server, "user", "list").stdout


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("user grant nobody media_store_read", 1, "no account 'nobody'"),
        ("user grant nobody root", 1, "no permission 'root'"), ("user grant nobody", 2, "usage"),
        ("user", 2, "usage"), ("user passwd a password", 2, "usage"),
        ("user disable nobody", 1, "no account"),
    ],
)  # fmt: skip
def test_what_the_owner_gets_wrong_is_said(server, capsys, monkeypatch, words, status, message):
    monkeypatch.chdir(server.storage.parent)
    with pytest.raises(SystemExit) as caught:
        sys.exit(ms.main([*words.split(), "--storage_dir", str(server.storage)]))
    assert caught.value.code == status
    assert message in capsys.readouterr().err


def test_a_disabled_account_is_out_at_once_and_back_when_enabled(server):
    user = User(server)
    refresh, record = user.login()[1]["refresh"], user.upload(png())[1]
    assert owner_says(server, "user", "disable", user.name).returncode == 0
    asked = [user.call("GET", path)[0] for path in ("/api/auth/profile/", MEDIA, "/health")]
    assert asked == [401] * 3
    assert user.refresh(refresh)[0] == user.login()[0] == 401
    assert server.get(local(record["file"])).status == 401
    assert owner_says(server, "user", "enable", user.email).returncode == 0
    assert user.call("GET", "/api/auth/profile/")[0] == user.refresh(refresh)[0] == 401
    tokens = user.login()[1]
    headers = {"Authorization": f"Bearer {tokens['access']}"}
    assert server.call("GET", "/api/auth/profile/", headers=headers)[0] == 200
    old = bearer(user_id=user.id, iat=time.time() - 60)
    assert server.call("GET", "/api/auth/profile/", headers=old)[0] == 401


def test_the_owner_sees_and_ends_an_accounts_sessions(server):
    user = User(server)
    refresh = user.login()[1]["refresh"]
    listed = owner_says(server, "user", "sessions", user.name).stdout
    assert re.fullmatch(rf"\w+\t[\dT:.Z-]+\t[\dT:.Z-]+\tof {user.name}\t[^\t]+\n", listed)
    assert "1 session" in owner_says(server, "user", "logout", user.email).stdout
    assert user.refresh(refresh)[0] == 401
    assert owner_says(server, "user", "sessions", user.name).stdout == ""


def test_the_owner_sets_a_password_from_standard_input(server):
    user = User(server)
    refresh = user.login()[1]["refresh"]
    assert failures(server, user.name, [f"p{number}" for number in range(5)]) == [401] * 5
    words = ("user", "passwd", user.name)
    assert owner_says(server, *words, stdin="short\n").returncode == 1
    assert owner_says(server, *words, stdin="given by hand\n").returncode == 0
    assert user.refresh(refresh)[0] == 401
    assert user.login(password="given by hand", username=user.name)[0] == 200


def test_a_record_has_the_fields_of_the_contract_and_a_note_is_never_opened(django):
    note = "../../../../../../etc/passwd"
    kept = {"type": "image", "size": 12345, "storage_path": note, "description": "  kept  "}
    forged = {"id": "mine", "user": 1, "created_at": "x", "nonsense": 1}
    status, value = django.call("POST", MEDIA, {"name": "  my-photo.jpg ", **kept, **forged})
    assert status == 201
    path = f"{MEDIA}{uuid.UUID(value['id'])}/"
    stamp = value["created_at"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", stamp)
    made = {"id": value["id"], "created_at": stamp, "updated_at": stamp, "user": django.id}
    assert value == {**made, **kept, "name": "my-photo.jpg", "file": None, "collection": None}
    assert django.call("GET", path) == (200, value)
    assert django.call("GET", f"{path}file/")[0] == 404


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ...}, "This field is required."),
        ({"name": "  "}, "This field may not be blank."),
        ({"name": None}, "This field may not be null."),
        ({"name": "x" * 256}, "Ensure this field has no more than 255 characters."),
        ({"name": "a\0b"}, "Null characters are not allowed."),
        ({"type": ...}, "This field is required."),
        ({"type": "IMAGE"}, '"IMAGE" is not a valid choice.'),
        ({"size": -1}, "Ensure this value is greater than or equal to 0."),
        ({"size": "a"}, "A valid integer is required."),
        ({"size": 2**63}, "A valid integer is required."),
        ({"description": {}}, "Not a valid string."),
        ({"description": "x" * 10001}, "Ensure this field has no more than 10000 characters."),
        ({"collection": "x"}, 'Invalid pk "x" - object does not exist.'),
    ],
)
def test_a_wrong_record_is_refused_with_a_field_map(django, change, message):
    body = {"name": "n", "type": "image", **change}
    body = {k: v for k, v in body.items() if v is not ...}
    answers = [django.call("POST", MEDIA, body),
               django.call("PUT", f"{MEDIA}{django.record()['id']}/", body)]  # fmt: skip
    assert answers == [(400, {next(iter(change)): [message]})] * 2


def test_put_needs_its_fields_and_patch_none(django):
    record = django.record(description="d", size=3)
    path = f"{MEDIA}{record['id']}/"
    assert django.call("PATCH", path, {})[0] == 200
    assert django.call("PUT", path, {"name": "b"})[0] == 400
    status, value = django.call("PATCH", path, {"name": "c", "description": None})
    assert (status, value["name"], value["description"], value["size"]) == (200, "c", None, 3)
    assert value["updated_at"] > record["updated_at"]
    assert value["created_at"] == record["created_at"]
    status, value = django.call("PUT", path, {"name": "d", "type": "video"})
    assert (status, value["type"], value["size"]) == (200, "video", 3)


def test_a_deleted_record_is_gone_from_everywhere(django):
    record, shelf = django.upload(png())[1], django.shelf()
    path, add = f"{MEDIA}{record['id']}/", {"collection_id": shelf["id"]}
    assert django.call("POST", f"{path}add-to-collection/", add)[0] == 200
    assert django.call("DELETE", path) == (204, None)
    requests = [
        ("GET", ""), ("PUT", ""), ("PATCH", ""), ("DELETE", ""), ("GET", "file/"),
        ("POST", "remove-from-collection/"), ("POST", "add-to-collection/"),
    ]  # fmt: skip
    body = {"name": "n", "type": "image", **add}
    assert [
        (*each, django.call(each[0], path + each[1], None if each[0] == "GET" else body)[0])
        for each in requests
    ] == [(*each, 404) for each in requests]
    assert django.server.get(local(record["file"])).status == 404
    assert django.listed()["count"] == 0
    assert django.call("GET", f"{SHELVES}{shelf['id']}/")[1]["media"] == []


@pytest.mark.parametrize("base", ["/api/media/", "/api/media/media"])
def test_a_record_has_two_addresses(django, base):
    assert django.call("POST", base, {"name": "n", "type": "audio"})[0] == 201
    status, value = django.call("GET", base)
    assert (status, value["count"]) == (200, 1)
    path = f"{base.rstrip('/')}/{value['results'][0]['id']}"
    assert django.call("GET", path)[0] == 200
    assert django.call("POST", f"{path}/remove-from-collection/")[0] == 200
    assert django.call("GET", f"{path}/file")[0] == 404
    assert django.call("DELETE", f"{path}/")[0] == 204


@pytest.mark.parametrize("base", ["/api/media/collection", "/api/media/collections"])
def test_collection_and_collections_are_one_and_no_record(django, base):
    assert django.call("POST", "/api/media/collection/", {"name": "n"})[0] == 201
    key = django.call("GET", base)[1]["results"][0]["id"]
    assert "media" in django.call("GET", f"{base}/{key}/")[1]
    answer = django.server.request("DELETE", base, headers=django.headers)
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD, OPTIONS, POST")


def test_a_list_is_paged_as_in_django_and_its_links_work(django):
    empty = {"count": 0, "next": None, "previous": None, "results": []}
    queries = ("", "page=1", "page=last", "search=x")
    assert [django.listed(query) for query in queries] == [empty] * 4
    for number in range(13):
        django.record(name=f"n{number}", description="a b")
    page = django.listed("page_size=5&search=a&type=image")
    names, urls = [], []
    while True:
        names += [item["name"] for item in page["results"]]
        assert page["count"] == 13
        if not page["next"]:
            break
        urls.append(page["next"])
        page = django.call("GET", local(page["next"]))[1]
    assert names == [f"n{number}" for number in reversed(range(13))]
    assert urls[0].startswith(f"{django.server.url}{MEDIA}?")
    assert {"search=a", "type=image", "page_size=5"} <= {*urlsplit(urls[0]).query.split("&")}
    while page["previous"]:
        page = django.call("GET", local(page["previous"]))[1]
    assert [item["name"] for item in page["results"]] == names[:5]
    assert django.listed("page=last&page_size=5")["next"] is None


@pytest.fixture(scope="module")
def twelve(server: Server) -> User:
    """A user of twelve collections."""
    user = User(server, next(SERIAL))
    for _ in range(12):
        user.shelf()
    return user


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ("", 10), ("page_size=3", 3), ("page_size=0", 10), ("page_size=-4", 10),
        ("page_size=x", 10), ("page_size=", 10), ("page_size=100000000000000000000", 12),
        ("page_size=1000", 12), ("page=2", 2), ("page=last", 2), ("page=", 10),
    ],
)  # fmt: skip
def test_page_and_page_size_are_read_as_django_reads_them(twelve, query, count):
    status, value = twelve.call("GET", f"{SHELVES}?{query}")
    assert (status, len(value["results"])) == (200, count)


@pytest.mark.parametrize("page", ["3", "0", "-1", "x", "9999999999999999999999"])
def test_a_page_that_is_not_there_is_404_as_in_django(twelve, page):
    answer = twelve.call("GET", f"{SHELVES}?page={page}")
    assert answer == (404, {"detail": "Invalid page."})


def test_a_page_has_at_most_a_hundred_records(django):
    together(10, lambda _: [django.record() for _ in range(11)])
    page = django.listed("page_size=101")
    assert (len(page["results"]), page["next"] is not None) == (100, True)


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("straße", "a"), ("STRASSE", "a"), ("ÉTÉ", "b"), ("été  100%", "b"), ("100%", "b"),
        ("%", "b"), ("_", "c"), ("10_", ""), ("ΟΔΟΣ", "c"), ("a\\", ""), ("weg c_", "c"),
        ("weg c_ nichts", ""), ("'", ""),
    ],
)  # fmt: skip
def test_a_search_takes_every_word_in_any_case_and_no_wildcards(django, search, found):
    django.record(name="Große Straße", description="a")
    django.record(name="L'Été"[2:], description="b 100%")
    django.record(name="C_Weg", description="c οδός οδος")
    page = django.listed(urlencode({"search": search}))
    assert "".join(item["description"][0] for item in page["results"]) == found


@pytest.mark.parametrize("search", ["a%00b", "+".join(map(str, range(99)))], ids=["NUL", "long"])
def test_what_cannot_be_searched_for_is_400(django, search):
    assert django.call("GET", f"{MEDIA}?search={search}")[0] == 400


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("ordering=name", "abc"), ("ordering=-name", "cba"), ("ordering=size", "bca"),
        ("ordering=-size", "acb"), ("ordering=created_at", "cab"), ("ordering=-created_at", "bac"),
        ("ordering=nonsense", "bac"), ("ordering=-id", "bac"), ("ordering=", "bac"),
        ("ordering=nonsense,name", "abc"), ("ordering=--name", "bac"), ("type=video", "a"),
        ("type=", "bac"),
    ],
)  # fmt: skip
def test_a_list_is_ordered_as_asked_and_can_be_of_one_type(django, query, names):
    for name, size, kind in (("c", 2, "image"), ("a", 3, "video"), ("b", 1, "audio")):
        django.record(name=name, size=size, type=kind)
    page = django.listed(query)
    assert "".join(item["name"] for item in page["results"]) == names


def test_a_type_that_is_none_cannot_be_listed(django):
    assert django.listed("type=pdf") == {"type": ['"pdf" is not a valid choice.']}


@pytest.mark.parametrize("ordering", ["name", "-size"])
def test_equal_records_keep_their_order_over_pages(django, ordering):
    keys = sorted(django.record(name="same", size=1)["id"] for _ in range(5))
    queries = [f"ordering={ordering}&page_size=2&page={page}" for page in (1, 2, 3)]
    listed = [item["id"] for query in queries for item in django.listed(query)["results"]]
    assert listed == keys[:: -1 if ordering.startswith("-") else 1]


def test_an_upload_lies_in_the_users_folder_and_is_served_to_those_who_may(server, django):
    content = png()
    status, record = django.upload(content, "Meer & Ü.png", storage_path="x", size=9)
    assert status == 201
    assert re.fullmatch(r"uploads/\d{4}/\d\d/\d\d/Meer & Ü\.png", record["storage_path"])
    assert (record["type"], record["size"]) == ("image", len(content))
    assert (django.folder / record["storage_path"]).read_bytes() == content
    for path, headers in (
        (local(record["file"]), {}), (f"{MEDIA}{record['id']}/file/", django.headers),
    ):  # fmt: skip
        answer = server.request("GET", path, headers=headers)
        assert (answer.status, answer.body) == (200, content)
        assert answer.headers["Content-Type"] == "image/png"
        assert answer.headers["Cache-Control"].startswith("private")
        assert answer.headers["ETag"] == f'"{sha256(content)}"'
        answer = server.request("GET", path, headers={**headers, "Range": "bytes=1-3"})
        assert (answer.status, answer.body) == (206, b"PNG")
    names = [django.upload(png(), "../x/same.png")[1]["storage_path"][19:] for _ in range(3)]
    assert names == ["same.png", "same_1.png", "same_2.png"]
    assert django.upload(wav(), "x.png")[1]["type"] == "audio"  # the content says so


@pytest.mark.parametrize("name", [".", "..", "/", "a/", " ", "\x85", "%0A", "." * 300])
def test_a_file_whose_name_leaves_nothing_has_one(server, jane, name):
    sent = server.send_file("POST", "/api/media/media/", png(), name, jane.headers)
    assert (sent.status, sent.json["name"]) == (201, "file"), sent.json
    assert re.fullmatch(r"uploads/\d{4}/\d\d/\d\d/file(_\d+)?", sent.json["storage_path"])
    assert re.match(r"file.*\.png$", server.store(png(), name).json["stored_as"])


@pytest.mark.parametrize(
    ("content", "texts", "field"),
    [
        (b"plain text", {}, "file"), (b"", {}, "file"), (b"%PDF-1.7 ", {"type": "image"}, "file"),
        (png(), {"type": "video"}, "type"), (wav(), {"type": "image"}, "type"),
        (png(), {"name": ""}, "name"), (png(), {"collection": "x"}, "collection"),
        (None, {"type": "image", "file": "a text"}, "file"),
    ],
)  # fmt: skip
def test_a_refused_upload_leaves_nothing_behind(django, content, texts, field):
    before = left_arriving(django.server.storage)
    status, value = django.upload(content, **texts)
    assert (status, set(value)) == (400, {field})
    assert django.files() == []
    assert left_arriving(django.server.storage) <= before
    assert django.listed()["count"] == 0


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
def test_a_new_file_replaces_the_old_one(server, django, method):
    old, audio = django.upload(png())[1], wav()
    path = f"{MEDIA}{old['id']}/"
    status, new = django.upload(audio, "b.wav", method, path)
    assert (status, new["id"], new["type"], new["size"]) == (200, old["id"], "audio", len(audio))
    assert [file.name for file in django.files()] == ["b.wav"]
    assert django.call("PATCH", path, {"type": "image"})[0] == 400
    status, value = django.call("PUT", path, {"name": "z", "size": 1, "storage_path": "s"})
    assert (status, value["size"], value["storage_path"]) == (200, len(audio), new["storage_path"])
    assert django.upload(b"text", "c.png", method, path)[0] == 400
    assert server.get(local(new["file"])).body == audio


def test_replacements_at_once_leave_one_file(server, django):
    path = f"{MEDIA}{django.upload(png())[1]['id']}/"
    statuses = together(6, lambda n: django.upload(png(), f"r{n}.png", "PUT", path)[0])
    assert statuses == [200] * 6
    (left,) = django.files()
    record = django.call("GET", path)[1]
    assert record["storage_path"].endswith(left.name)
    assert server.get(local(record["file"])).body == left.read_bytes()


def test_an_account_stores_no_more_than_its_quota_and_the_owner_sees_how_much(start):
    running = start(user_quota_bytes="3000000")
    user, other = User(running), User(running, next(SERIAL))
    status, first = user.upload(png_of(2_000_000))
    assert status == 201
    refused = [user.upload(png_of(size)) for size in (1_000_001, 1_500_000, 5_000_000)]
    assert [status for status, _ in refused] == [413] * 3
    (told,) = {answer["detail"] for _, answer in refused}
    assert "USER_QUOTA_BYTES" in told and "1000000 of them are left" in told
    assert user.record(size=9_000_000)["size"] == 9_000_000  # a note of what lies elsewhere
    assert other.upload(png_of(3_000_000))[0] == 201
    path = f"{MEDIA}{first['id']}/"
    assert user.upload(png_of(2_900_000), method="PUT", path=path, type="image")[0] == 200
    assert user.upload(png_of(100_001))[0] == 413
    assert user.call("DELETE", path)[0] == 204  # softly: its file stays
    assert user.upload(png_of(100_001))[0] == 413
    assert user.upload(png_of(100_000))[0] == 201
    assert len(user.files()) == 2
    assert "\tactive\t2.861 MB" in owner_says(running, "user", "list").stdout


def test_uploads_at_once_exceed_no_quota(start):
    running = start("--workers", "2", user_quota_bytes="3000000")
    user = User(running)
    answers = together(8, lambda _: user.upload(png_of(1_000_000))[0])
    assert sorted(answers) == [201] * 3 + [413] * 5
    assert sum(path.stat().st_size for path in user.files()) == 3_000_000


def test_a_signature_is_good_for_one_record_one_hour_and_nothing_else(server, django):
    one, other = django.upload(png())[1], django.upload(png())[1]
    url = urlsplit(one["file"])
    assert f"{url.scheme}://{url.netloc}" == server.url
    query = dict(part.split("=") for part in url.query.split("&"))
    assert abs(int(query["expires"]) - time.time() - 3600) < DEADLINE
    bad = [
        (url.path, {**query, "expires": str(int(query["expires"]) + 1)}),
        (url.path, {**query, "signature": query["signature"][::-1]}),
        (url.path, {"expires": query["expires"]}), (url.path, {"signature": query["signature"]}),
        (url.path, {**query, "expires": "1"}), (url.path, {}),
        (f"{MEDIA}{other['id']}/file/", query), (f"{MEDIA}{uuid.uuid4()}/file/", query),
        (f"{MEDIA}{one['id']}/", query),
    ]  # fmt: skip
    assert [
        each for each in bad if server.get(f"{each[0]}?{urlencode(each[1])}").status != 401
    ] == []
    assert server.request("DELETE", f"{MEDIA}{one['id']}/?{url.query}").status == 401
    assert server.get(local(one["file"])).status == 200


def test_what_is_anothers_is_404_at_every_endpoint(server, jane, django):
    def endpoints(record: Any, shelf: Any) -> list[tuple[str, str, Any]]:
        media, own_shelf = f"{MEDIA}{record}/", f"{SHELVES}{shelf}/"
        change = {"name": "stolen", "type": "image"}
        return [
            ("GET", media, None),
            ("PUT", media, change),
            ("PATCH", media, change),
            ("DELETE", media, None),
            ("GET", f"{media}file/", None),
            ("POST", f"{media}add-to-collection/", {"collection_id": shelf}),
            ("POST", f"{media}remove-from-collection/", None),
            ("GET", own_shelf, None),
            ("PUT", own_shelf, change),
            ("PATCH", own_shelf, change),
            ("DELETE", own_shelf, None),
        ]

    unknown = str(uuid.uuid4())
    for owner, thief in ((jane, django), (django, jane)):
        record, shelf = owner.upload(png())[1], owner.shelf()["id"]
        for (method, path, body), (_, nowhere, nothing) in zip(
            endpoints(record["id"], shelf), endpoints(unknown, unknown), strict=True
        ):
            answer = thief.call(method, path, body)
            assert answer[0] == 404, (method, path)
            assert thief.call(method, nowhere, nothing) == answer  # as what does not exist
            assert server.call(method, path, body)[0] == 401
            assert server.call(method, path, body, OWNER)[0] == 403
        path = f"{MEDIA}{thief.record()['id']}/"
        foreign = {"collection_id": shelf}
        assert thief.call("POST", f"{path}add-to-collection/", foreign)[0] == 404
        status, value = thief.call("PATCH", path, {"collection": shelf})
        assert (status, [*value]) == (400, ["collection"])
        status, value = thief.upload(png(), collection=shelf)
        assert (status, [*value]) == (400, ["collection"])
        for base in (MEDIA, SHELVES):
            thief.shelf()
            listed = thief.call("GET", f"{base}?page_size=100")[1]["results"]
            assert {item["user"] for item in listed} == {thief.id}
        kept = owner.call("GET", f"{MEDIA}{record['id']}/")[1]
        assert {**kept, "file": 0} == {**record, "file": 0}
        own = [each for each in endpoints(record["id"], shelf)
               if each[0] != "DELETE" and "file/" not in each[1]]  # fmt: skip
        assert [owner.call(*each)[0] for each in own] == [200] * 8


def test_an_accounts_file_is_reachable_by_no_hash_and_in_no_listing(server, django, jane):
    content = png()
    record = django.upload(content, "secret-name.png")[1]
    duplicate = jane.upload(content)[1]
    who, tails = ({}, OWNER, django.headers), ("image", "thumbnail")
    assert [
        server.request("GET", f"/{tail}/{sha256(content)}", headers=headers).status
        for headers, tail in itertools.product(who, tails)
    ] == [404] * 6
    groups = [f"?group={key}" for key, *_ in server.get("/gallery/items").json["groups"]]
    paths = ["/list", "/media", *(f"/gallery/items{query}" for query in ("", *groups))]
    text = str([server.get(path).json for path in paths])
    assert [each for each in (sha256(content), "secret-name") if each in text] == []
    assert server.put("/image/new.png", content).status == 201  # not "known"
    assert jane.call("DELETE", f"{MEDIA}{duplicate['id']}/")[0] == 204
    assert server.get(local(record["file"])).body == content


def test_records_go_into_collections_and_outlive_them(django):
    status, shelf = django.call("POST", SHELVES, {"name": " t ", "description": "d", "user": 1})
    fields = {"id", "user", "name", "description", "created_at", "updated_at"}
    assert (status, set(shelf), shelf["name"], shelf["user"]) == (201, fields, "t", django.id)
    assert django.call("POST", SHELVES, {})[1] == {"name": ["This field is required."]}
    own, record = f"{SHELVES}{shelf['id']}/", django.record()
    assert django.call("PATCH", own, {"description": ""})[1]["description"] == ""
    assert django.call("PUT", own, {})[0] == 400
    assert django.call("PUT", own, {"name": "x"})[1]["name"] == "x"
    path = f"{MEDIA}{record['id']}/"
    assert django.call("POST", f"{path}add-to-collection/", {"collection_id": "x"})[0] == 404
    status, value = django.call("POST", f"{path}add-to-collection/", {})
    assert (status, set(value)) == (400, {"collection_id"})
    add = {"collection_id": shelf["id"]}
    status, value = django.call("POST", f"{path}add-to-collection/", add)
    assert (status, value["id"], value["collection"]) == (200, record["id"], shelf["id"])
    assert [item["id"] for item in django.call("GET", own)[1]["media"]] == [record["id"]]
    assert django.call("POST", f"{path}remove-from-collection/")[0] == 200
    assert django.call("GET", own)[1]["media"] == []
    assert django.call("PATCH", path, {"collection": shelf["id"].upper()})[0] == 200
    assert django.call("DELETE", own) == (204, None)
    assert django.call("GET", path)[1]["collection"] is None
    assert django.call("GET", own)[0] == 404


def add_pictures(user: User, collection: str, *contents: bytes) -> int:
    """The status of showing the library's pictures in a collection."""
    value = {"sha256": [sha256(content) for content in contents]}
    return user.call("POST", f"{SHELVES}{collection}/add/", value)[0]


def test_a_collection_shows_pictures_of_the_library_without_a_copy(start):
    server = start(READ_AUTH_ENABLED="true")
    content, of_entity = png(), png()
    server.put("/image/beach.png", content)
    Entities(server).create(of_entity)
    user, other = User(server), User(server)
    user.headers = bearer(user_id=user.id, permissions=["media_store_read"])
    run_here("user", "grant", user.name, ms.READ_PERMISSION, "--storage_dir", server.storage)
    key = user.call("POST", SHELVES, {"name": "Summer"})[1]["id"]
    for _ in range(2):  # what is there already stays one
        assert add_pictures(user, key, content, of_entity, content) == 204
    assert add_pictures(user, key, png()) == 404
    assert add_pictures(other, key, content) == 404
    theirs = other.call("POST", SHELVES, {"name": "Winter"})[1]["id"]
    assert add_pictures(other, theirs, content) == 403

    records = user.call("GET", f"{SHELVES}{key}/")[1]["media"]
    files = [local(record["file"]) for record in records]
    assert {server.get(path).body for path in files} == {content, of_entity}
    assert [record["storage_path"] for record in records] == [None, None]
    assert user.files() == []  # nothing of the quota is used up
    share = user.call("POST", "/shares", {"kind": "collection", "target": key})[1]
    assert len(server.get(local(share["url"])).json["files"]) == 2
    stranger = bearer(user_id=user.id)  # one without leave to read the library
    listed = server.get(f"{SHELVES}{key}/", **stranger).json["media"]
    assert [record["file"] for record in listed] == [None, None]
    assert server.get(f"{MEDIA}{records[0]['id']}/file/", **stranger).status == 404

    path = f"{MEDIA}{records[0]['id']}/"
    assert user.call("POST", f"{path}remove-from-collection/")[0] == 200
    assert user.call("GET", path)[0] == 404
    own, path = png(), f"{MEDIA}{records[1]['id']}/"
    record = user.upload(own, method="PUT", path=path, type="image", collection=key)[1]
    assert server.get(local(record["file"])).body == own
    assert add_pictures(user, key, content) == 204
    assert user.call("DELETE", f"{SHELVES}{key}/")[0] == 204
    assert user.call("GET", MEDIA)[1]["count"] == 1  # what has a file of its own stays


@pytest.mark.parametrize("way", ["restored", "moved"])
def test_a_collection_shows_a_picture_once_whatever_was_deleted_restored_or_moved(server, way):
    user, content = User(server), png()
    server.upload(content)
    key, other = (user.call("POST", SHELVES, {"name": name})[1]["id"] for name in "ab")

    def shown() -> list[str]:
        return [record["id"] for record in user.call("GET", f"{SHELVES}{key}/")[1]["media"]]

    assert add_pictures(user, key, content) == 204
    (first,) = shown()
    if way == "restored":
        assert user.call("DELETE", f"{MEDIA}{first}/")[0] == 204
    else:
        assert user.call("PATCH", f"{MEDIA}{first}/", {"collection": other})[0] == 200
    assert shown() == []
    assert add_pictures(user, key, content) == 204
    if way == "restored":
        assert user.call("POST", f"/trash/{first}/restore")[0] == 404, "it is there already"
    else:
        assert user.call("PATCH", f"{MEDIA}{first}/", {"collection": key})[0] == 200
        assert shown() == [first]
    assert len(shown()) == 1
    (last,) = shown()
    assert user.call("DELETE", f"{MEDIA}{last}/")[0] == 204
    assert user.call("POST", f"/trash/{last}/restore")[0] == 204
    assert shown() == [last]


def test_a_collection_of_many_records_is_never_in_memory_as_a_whole(start):
    running = start()
    user = User(running, 1)
    shelf, record = user.call("POST", SHELVES, {"name": "s"})[1]["id"], user.record(name="n")
    assert user.call("PATCH", f"{MEDIA}{record['id']}/", {"collection": shelf})[0] == 200
    count = 8_000
    with running.index() as db:
        columns = [row[1] for row in db.execute("PRAGMA table_info(media)")]
        values = ", ".join({"id": "hex(randomblob(16))"}.get(name, name) for name in columns)
        numbers = "WITH RECURSIVE n(i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
        into = f"INSERT INTO media ({', '.join(columns)})"
        db.execute(f"{numbers} {into} SELECT {values} FROM media, n", (count,))
    own = f"{SHELVES}{shelf}/"
    before = memory(running.process.pid, "VmHWM")
    status, value = user.call("GET", own)
    assert (status, value["name"], len(value["media"])) == (200, "s", count)
    assert memory(running.process.pid, "VmHWM") - before < 8 * 2**20


def test_the_settings_of_accounts_are_kept(start):
    running = start(
        allow_registration="false", public_url="https://x.example/base", max_media_bytes="500"
    )
    assert running.call("POST", REGISTER, GOOD_ACCOUNT)[0] == 403
    user = User(running, 5)
    made = user.upload(png())[1]
    assert made["file"].startswith(f"https://x.example/base{MEDIA}")
    user.record()
    assert (
        user.listed("page_size=1")["next"] == f"https://x.example/base{MEDIA}?page_size=1&page=2"
    )
    assert user.upload(png_of(600))[0] == 413


def test_an_accounts_upload_that_was_answered_survives_a_kill_and_the_rest_is_gone(start):
    running, kept = start(), []
    user = User(running)
    refresh = user.login()[1]["refresh"]

    def upload(number: int) -> None:
        try:
            while True:
                kept.append(user.upload(png(), f"{number}.png")[1]["id"])
                if len(kept) >= 25:
                    running.process.kill()
                user.upload(png(), f"{number}.png", "PUT", f"{MEDIA}{kept[-1]}/")
        except (OSError, http.client.HTTPException):
            pass

    together(3, upload)
    running.kill()
    user.server = running = start()
    for key in kept:
        record = user.call("GET", f"{MEDIA}{key}/")[1]
        content = running.get(local(record["file"])).body
        assert content.startswith(b"\x89PNG")
        assert len(content) == record["size"]
    assert len(kept) <= user.listed()["count"] == len(user.files())
    assert list((user.folder.parent / ".incoming").glob("*")) == []
    assert user.refresh(refresh)[0] == 200


# -- entities: versioned media entities ----------------------------------------------------


class Entities:
    """The family as its client sees it: every call checks the status and returns the JSON."""

    def __init__(self, server: Server) -> None:
        self.server, self.folder = server, server.data / "entities"

    def send(
        self, method: str, path: str, image: bytes | None = None, expect: int = 0, **texts: object
    ) -> Any:
        """Send a form, or JSON for PATCH."""
        path = f"/entity/{path}"
        if method == "PATCH":
            headers = {**OWNER, "Content-Type": "application/json"}
            answer = self.server.request(method, path, json.dumps(texts), headers)
        else:
            answer = self.server.send_file(method, path, image, field="image", **texts)
        assert answer.status == (expect or (201 if method == "POST" else 200)), answer.body
        return answer.json

    def create(self, image: bytes | None = None, expect: int = 201, **texts: object) -> Any:
        return self.send("POST", "", png() if image is None else image, expect, **texts)

    def collection(self, **texts: object) -> Any:
        return self.send("POST", "", is_collection="true", **texts)

    def patch(self, key: int, **fields: object) -> Any:
        return self.send("PATCH", f"{key}", **fields)

    def get(self, path: object, expect: int = 200) -> Any:
        answer = self.server.get(f"/entity/{path}", **OWNER)
        assert answer.status == expect, answer.body
        return answer.json

    def delete(self, key: int, expect: int = 200) -> Any:
        answer = self.server.request("DELETE", f"/entity/{key}", headers=OWNER)
        assert answer.status == expect, answer.body
        return answer.json

    def content(self, key: int, query: str = "", expect: int = 200) -> bytes:
        answer = self.server.get(f"/entity/{key}/file{query}")
        assert answer.status == expect
        return answer.body

    def versions(self, key: int) -> Any:
        return self.get(f"{key}/versions")

    def listed(self, **query: object) -> Any:
        return self.get(f"?{urlencode(query)}")

    def keys(self, **query: object) -> list[int]:
        return [item["id"] for item in self.listed(page_size=100, **query)["items"]]

    def files(self) -> list[str]:
        """What lies in the folder, also on its way in."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.folder)) for path in found)


@pytest.fixture(scope="module")
def entities(server: Server) -> Entities:
    return Entities(server)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def test_a_created_entity_has_every_field_of_the_document(entities):
    image, before = png(7, 5), time.time()
    item = entities.create(image, label="My Image", description="A test image")
    added = datetime.fromisoformat(item["added_date"].replace("Z", "+00:00"))
    assert before - 0.001 <= added.timestamp() <= time.time()
    file = {"file_size": len(image), "height": 5, "width": 7, "duration": None}
    file |= {"mime_type": "image/png", "type": "image", "extension": "png", "md5": md5(image)}
    file |= {"create_date": None, "file_path": f"{added:%Y/%m/%d}/{md5(image)}.png"}
    record = {"id": item["id"], "is_collection": False, "parent_id": None, "is_deleted": False}
    record |= {"added_date": item["added_date"], "updated_date": item["added_date"]}
    assert item == {**record, **file, "label": "My Image", "description": "A test image"}
    assert (entities.folder / item["file_path"]).read_bytes() == image
    shelf = entities.collection(label="Holidays")
    assert (shelf["is_collection"], shelf["label"]) == (True, "Holidays")
    assert {shelf[name] for name in file} == {None}
    entities.content(shelf["id"], expect=404)


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (
            lambda: jpeg_of((0xE1, exif(date="2023:01:01 12:00:01")), (0xFE, unique())),
            {"create_date": "local", "width": 40, "height": 30, "extension": "jpg"},
        ),
        (
            lambda: jpeg_of((0xE1, b"Exif\0\0" + exif_tiff()), (0xFE, unique())),
            {"create_date": "2019-05-04T03:02:01.250000Z", "mime_type": "image/jpeg"},
        ),
        (
            lambda: jpeg(date="0000:00:00 00:00:00", orientation=6),
            {"create_date": None, "width": 16, "height": 8},  # as stored, before rotation
        ),
        (
            lambda: png_with((b"tEXt", b"Creation Time\0" + RECORDED), (b"tEXt", unique())),
            {"create_date": "2019-05-04T03:02:01Z", "type": "image"},
        ),
        (
            lambda: mp4_of() + box(b"free", unique()),
            {"create_date": "2019-05-04T03:02:01Z", "type": "video", "duration": 3.0},
        ),
    ],
    ids=["local time", "with an offset", "no time", "no EXIF", "video"],
)
def test_facts_are_taken_from_the_content(entities, make, fields):
    if fields["create_date"] == "local":
        moment = datetime(2023, 1, 1, 12, 0, 1).astimezone(timezone.utc)
        fields = {**fields, "create_date": f"{moment:%Y-%m-%dT%H:%M:%SZ}"}
    item = entities.create(make())
    assert {name: item[name] for name in fields} == fields
    assert item["file_path"].endswith(f"/{item['md5']}.{item['extension']}")


@pytest.mark.parametrize("word", ["TRUE", "1", "yes", "t", "y"])
def test_fastapis_words_for_true_make_a_collection(entities, word):
    assert entities.send("POST", "", is_collection=word)["is_collection"] is True


@pytest.mark.parametrize("word", ["false", "0", "off", "no", "f", "n", ""])
def test_fastapis_words_for_false_make_an_image(entities, word):
    assert entities.create(is_collection=word)["is_collection"] is False


def test_forms_may_be_urlencoded_and_text_is_kept_exactly(entities):
    body = urlencode({"is_collection": "on", "label": "Ü & co", "parent_id": ""})
    headers = {**OWNER, "Content-Type": "application/x-www-form-urlencoded"}
    answer = entities.server.request("POST", "/entity", body, headers)
    item = answer.json
    assert (answer.status, item["label"], item["parent_id"]) == (201, "Ü & co", None)
    assert answer.headers["Location"] == f"/entity/{item['id']}"
    label, description = " Łódź 🐈‍⬛ e\u0301 ", "two\r\nlines\t"
    item = entities.create(label=label, description=description)
    assert (item["label"], item["description"]) == (label, description)
    assert entities.get(item["id"]) == item


def test_an_entitys_file_is_answered_with_revalidation_and_is_in_no_other_family(entities):
    server, image = entities.server, png()
    path = f"/entity/{entities.create(image)['id']}/file"
    answer = server.get(path)
    assert (answer.body, answer.headers["Content-Type"]) == (image, "image/png")
    assert "no-cache" in answer.headers["Cache-Control"]
    assert "immutable" not in answer.headers["Cache-Control"]
    assert server.get(path, If_None_Match=f'"{sha256(image)}"').status == 304
    assert server.get(path, Range="bytes=2-5").body == image[2:6]
    other = [server.get(f"/{family}/{sha256(image)}", **OWNER).status
             for family in ("image", "thumbnail")]  # fmt: skip
    assert other == [404, 404]
    assert sha256(image) not in server.listed()
    assert server.put("/image/a.png", image).status == 201


def test_every_change_makes_a_version_and_all_are_kept(entities):
    first, second = png(), png(9, 9)
    item = entities.create(first, label="one")
    key, folder = item["id"], entities.collection()["id"]
    states = [
        item, entities.patch(key, body={"label": "two"}), entities.patch(key, parent_id=folder),
        entities.send("PUT", key, second, label="four"), entities.patch(key, is_deleted=True),
        entities.patch(key, is_deleted=False, label=None),
    ]  # fmt: skip
    found = entities.versions(key)
    assert [version.pop("version") for version in found] == [1, 2, 3, 4, 5, 6]
    transactions = [version.pop("transaction_id") for version in found]
    assert transactions == sorted(set(transactions))
    assert found == states == [entities.get(f"{key}?version={n}") for n in range(1, 7)]
    assert [state["label"] for state in states] == ["one", "two", "two", "four", "four", None]
    assert [state["parent_id"] for state in states] == [None, None, folder, None, None, None]
    assert len({state["updated_date"] for state in states}) == 6
    assert len({state["added_date"] for state in states}) == 1
    assert entities.get(key) == states[-1]
    assert entities.content(key, "?version=3") == first
    assert entities.content(key) == entities.content(key, "?version=6") == second
    for n in (0, 7, -1):
        entities.get(f"{key}?version={n}", 404)
        entities.content(key, f"?version={n}", 404)


def test_a_change_that_changes_nothing_makes_no_version(entities):
    image = png()
    item = entities.create(image, label="same")
    key = item["id"]
    assert entities.patch(key) == entities.patch(key, body={}) == item
    assert entities.patch(key, body={"label": "same", "is_deleted": False}) == item
    assert entities.send("PUT", key, label="same") == item
    assert entities.send("PUT", key, image, label="same") == item
    assert len(entities.versions(key)) == 1


def test_put_replaces_and_keeps_what_it_must(entities):
    folder = entities.collection()["id"]
    item = entities.create(label="l", description="d", parent_id=folder)
    replaced = entities.send("PUT", item["id"], label="", parent_id="")
    assert (replaced["label"], replaced["description"], replaced["parent_id"]) == (None,) * 3
    assert (replaced["md5"], replaced["is_collection"]) == (item["md5"], False)
    assert entities.send("PUT", folder, label="x", is_collection="1")["label"] == "x"
    headers = {**OWNER, "Content-Type": "application/x-www-form-urlencoded"}
    answer = entities.server.request("PUT", f"/entity/{folder}/", "description=y", headers)
    assert (answer.status, answer.json["description"]) == (200, "y")


def test_an_own_older_content_comes_back_without_a_second_file(entities):
    contents = [png(), png()]
    item = entities.create(contents[0])
    entities.send("PUT", item["id"], contents[1])
    back = entities.send("PUT", item["id"], contents[0])
    assert back["file_path"] == item["file_path"]
    hashes = [version["md5"] for version in entities.versions(item["id"])]
    assert hashes == [md5(content) for content in (*contents, contents[0])]
    assert entities.content(item["id"]) == contents[0]


def test_other_facts_of_a_content_are_those_of_its_entities_and_their_versions(entities):
    older, newer = png(), png()
    item = entities.create(older)
    entities.send("PUT", item["id"], newer)
    facts = probe(newer)
    with contextlib.closing(ms.open_index(entities.server.data / "index.sqlite3")) as index:

        def set_facts(facts: Any) -> None:
            for content in (older, newer):
                asset = ms.Asset(sha256(content), len(content), facts)
                index.write(lambda db, it=asset: index.assets.set_facts(db, it))

        set_facts(facts._replace(mime_type="image/changed", extension="changed"))
        filters = {"mime_type": "image/changed", "extension": "changed"}
        pages = [
            index.entities.page(version, filters, "", limit=10, offset=0)
            for version in (None, 1, 2)
        ]
        assert [([key for key, _ in chosen], count) for chosen, count in pages] == [
            ([item["id"]], 1)] * 3  # fmt: skip
        set_facts(facts)
        assert index.entities.page(None, filters, "", limit=10, offset=0) == ([], 0)


def test_the_same_content_is_a_conflict_that_names_md5_and_entity(entities):
    image = png()
    first, other = entities.create(image), entities.create()
    for _ in range(2):
        answers = [entities.create(image, 409, label="another"),
                   entities.send("PUT", other["id"], image, 409)]  # fmt: skip
        named = [re.findall(r"\b(?:[0-9a-f]{32}|\d+)\b", each["detail"]) for each in answers]
        assert [sorted(each) for each in named] == [sorted((first["md5"], str(first["id"])))] * 2
        entities.patch(first["id"], is_deleted=True)  # it still counts
    assert len(entities.versions(other["id"])) == 1
    entities.delete(first["id"])
    assert entities.create(image)["id"] > other["id"]


def test_what_is_learnt_of_a_content_makes_no_version(tmp_path):
    asset = ms.Asset("0" * 64, 1, None)
    with contextlib.closing(ms.open_index(tmp_path / "index")) as index:

        def put(entity: ms.Entity) -> ms.Entity:
            return index.write(lambda db: index.entities.put(db, entity, NOW))

        first = put(ms.Entity(path="a.png", asset=asset))
        assert put(first._replace(asset=asset._replace(thumbnail=1))).version == first.version
        assert put(first._replace(path="b.png")).version == first.version + 1


def test_deleting_removes_record_versions_and_files_and_no_id_is_used_again(start):
    running = start()
    entities = Entities(running)
    image, other = png(), entities.create()
    first = entities.create(image)
    entities.send("PUT", first["id"], png())
    second = entities.create(image)  # an older version of another entity is no duplicate
    assert re.fullmatch(r"\d{4}/\d\d/\d\d/[0-9a-f]{32}\.png", second["file_path"])
    entities.send("PUT", first["id"], image, 409)
    last = entities.patch(first["id"], label="y")
    assert entities.delete(first["id"]) == last
    assert entities.content(second["id"]) == image
    entities.delete(second["id"])
    assert entities.files() == [other["file_path"]]
    tails = ("", "/versions", "/file", "?version=1", "/file?version=1")
    assert [running.get(f"/entity/{first['id']}{tail}").status for tail in tails] == [404] * 5
    entities.delete(first["id"], 404)
    running.stop()
    assert Entities(start()).create()["id"] > second["id"]


def test_one_content_at_once_makes_one_entity_and_one_file(start):
    entities, image = Entities(start("--workers", "2")), png()

    def send(number: int, method: str = "POST", key: object = "") -> int:
        path, texts = f"/entity/{key}", {"field": "image", "label": number}
        return entities.server.send_file(method, path, image, **texts).status

    assert sorted(together(20, send)) == [201] + [409] * 19
    (item,) = entities.listed()["items"]
    assert entities.files() == [item["file_path"]]
    assert item["file_path"].endswith(f"/{md5(image)}.png")
    image = png()
    keys = [entities.create()["id"] for _ in range(8)]
    assert sorted(together(8, lambda n: send(n, "PUT", keys[n]))) == [200] + [409] * 7


def test_two_contents_with_one_md5_are_both_stored(entities):
    image = png()
    place = entities.folder / f"{datetime.now(timezone.utc):%Y/%m/%d}" / f"{md5(image)}.png"
    fill(place.parent, {place.name: png()})  # as if this had the same MD5
    item = entities.create(image)
    assert item["md5"] == md5(image)
    assert item["file_path"].endswith(f"/{md5(image)}_1.png")
    assert entities.content(item["id"]) == image
    entities.delete(item["id"])
    assert place.exists()
    place.unlink()


def test_a_parent_must_be_a_collection_that_is_not_below(entities):
    a = entities.collection()["id"]
    b = entities.collection(parent_id=a)["id"]
    c = entities.collection(parent_id=b)["id"]
    leaf = entities.create(parent_id=c)["id"]
    for key, parent in ((a, a), (a, b), (a, c), (b, c), (b, leaf), (leaf, leaf), (c, 10**12)):
        entities.send("PATCH", key, expect=400, body={"parent_id": parent})
        entities.send("PUT", key, expect=400, parent_id=parent)
    for parent in (leaf, 10**12):
        entities.create(expect=400, parent_id=parent)
    assert entities.get(a)["parent_id"] is None
    assert entities.patch(c, body={"parent_id": a})["parent_id"] == a
    assert entities.patch(b, body={"parent_id": str(c)})["parent_id"] == c
    entities.patch(c, is_deleted=True)  # softly deleted, it stays a parent
    assert entities.create(parent_id=c)["parent_id"] == c


def test_moves_at_once_make_no_circle(entities):
    for _ in range(5):
        pair = [entities.collection()["id"] for _ in range(2)]

        def move(number: int, pair: list[int] = pair) -> int:
            change = {"parent_id": pair[1 - number]}
            return entities.server.call("PATCH", f"/entity/{pair[number]}", change, OWNER)[0]

        assert sorted(together(2, move)) == [200, 400]


def test_deleting_a_collection_leaves_its_children_at_the_root(entities):
    top = entities.collection()["id"]
    folder = entities.collection(parent_id=top)["id"]
    item = entities.create(parent_id=folder, label="kept")
    below = entities.collection(parent_id=folder)["id"]
    inside = entities.create(parent_id=below)
    assert entities.delete(folder)["parent_id"] == top
    entities.get(folder, 404)
    found = entities.versions(item["id"])
    assert [version["parent_id"] for version in found] == [folder, None]
    assert found[1]["transaction_id"] == entities.versions(below)[1]["transaction_id"]
    assert (found[1]["label"], found[1]["md5"]) == ("kept", item["md5"])
    assert found[1]["updated_date"] > item["updated_date"]
    assert entities.get(inside["id"]) == inside
    entities.create(expect=400, parent_id=folder)


def test_an_entity_that_was_answered_survives_a_kill_and_nothing_else_stays(start):
    running = start()
    entities = Entities(running)
    doomed = [entities.create()["id"] for _ in range(8)]
    made, gone, enough = {}, [], threading.Event()

    def work(number: int) -> None:
        try:
            while True:
                item = entities.create()
                made[item["id"]] = item["file_path"]
                if len(made) > 12:
                    enough.set()
                if number == 0 and doomed:
                    entities.delete(doomed[-1])
                    gone.append(doomed.pop())
        except (OSError, http.client.HTTPException):
            pass

    with ThreadPoolExecutor(4) as pool:
        for number in range(4):
            pool.submit(work, number)
        assert enough.wait(DEADLINE)
        running.kill()
    entities = Entities(start())
    pages = entities.listed(page_size=100)["pagination"]["total_pages"]
    found = {
        item["id"]: item
        for page in range(1, pages + 1)
        for item in entities.listed(page=page, page_size=100)["items"]
    }
    assert set(made) <= set(found)
    assert not set(gone) & set(found)
    assert entities.files() == sorted(item["file_path"] for item in found.values())
    for key, item in found.items():
        assert md5(entities.content(key)) == item["md5"]


def test_a_file_between_its_name_and_the_index_is_settled_at_start(start):
    running = start()
    entities = Entities(running)
    item, lost = entities.create(), entities.folder / "2020/01/02/lost.png"
    running.stop()
    # a file that never got into the index, or a deleted one that is still there
    fill(lost.parent, {lost.name: png()})
    os.link(lost, entities.folder / ".incoming/before")
    # one that the index knows: only the mark goes
    os.link(entities.folder / item["file_path"], entities.folder / ".incoming/after")
    entities = Entities(start())
    assert entities.files() == [item["file_path"]]
    entities.content(item["id"])


def test_an_entity_whose_content_went_meanwhile_has_its_file_after_a_full_disk_too(
    settings_of, tmp_path, monkeypatch
):
    settings = settings_of(f"--storage_dir={tmp_path}")
    ms.make_folders(settings)
    draft, image = ms.Entity(is_collection=False), png()
    with ms.opened_app(settings) as app:
        first, second = (arrive(app.entities, image, md5=True) for _ in range(2))
        with monkeypatch.context() as earlier:
            earlier.setattr(ms.time, "gmtime", lambda *_: time.struct_time((2020, *[1] * 8)))
            ms.save_entity(app, first, lambda db: draft)
        newer = arrive(app.entities, png(), md5=True)
        ms.save_entity(app, newer, lambda db: ms.find_entity(app, 1, db=db))
        for incoming in (first, newer):
            incoming.discard(undo=False)
        put, find, problems = app.index.entities.put, ms.find_duplicate, ["is full"]

        def find_and_delete(*about: Any) -> Any:
            found = find(*about)
            forget = lambda db: (None, app.index.entities.remove(db, 1, 1.0))  # noqa: E731
            ms.remove_for_good(app, app.entities, forget)
            return found

        def put_on_a_full_disk(*values: Any) -> Any:
            if problems:
                raise sqlite3.OperationalError(problems.pop())
            return put(*values)

        monkeypatch.setattr(ms, "find_duplicate", find_and_delete)
        app.index.entities.put = put_on_a_full_disk
        entity = ms.save_entity(app, second, lambda db: draft)
        second.discard(undo=False)
        assert (Path(app.entities.path) / entity.path).read_bytes() == image


def test_races_of_deleting_and_creating_one_content_lose_nothing(entities):
    before, image = entities.files(), png()
    for _ in range(10):
        old = entities.create(image)["id"]
        entities.send("PUT", old, png())
        _, made = together(
            2, lambda n, old=old: entities.create(image) if n else entities.delete(old)
        )
        assert entities.content(made["id"]) == image
        entities.delete(made["id"])
    assert entities.files() == before


@pytest.mark.parametrize(
    ("image", "texts"),
    [
        (None, {}), (None, {"label": "x", "is_collection": "false"}), (b"just text", {}),
        (png(), {"is_collection": "true"}), (b"", {}), (b"%PDF-1.7\n", {}),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_a_new_entity_that_cannot_be_is_400_and_leaves_nothing(entities, image, texts):
    before = entities.files()
    assert isinstance(entities.send("POST", "", image, 400, **texts)["detail"], str)
    assert entities.files() == before


def test_an_entity_becomes_no_collection_and_a_collection_gets_no_content(entities):
    item, folder = entities.create(), entities.collection()
    before = entities.files()
    entities.send("PUT", item["id"], expect=400, is_collection="true")
    entities.send("PUT", folder["id"], expect=400, is_collection="false")
    entities.send("PUT", folder["id"], png(), 400)
    entities.send("PUT", item["id"], b"no picture", 400)
    assert entities.files() == before


@pytest.mark.parametrize("tail", ["", "/file", "/versions"])
def test_an_unknown_entity_is_404(entities, tail):
    assert isinstance(entities.get(f"987654321{tail}", 404)["detail"], str)


def test_an_unknown_entity_is_404_whatever_is_sent(entities):
    entities.send("PUT", "987654321", expect=404, label="x")
    entities.send("PUT", "987654321", b"no picture", 404)
    entities.send("PATCH", "987654321", expect=404)
    entities.delete(987654321, 404)


INTEGER = "Input should be a valid integer, unable to parse string as an integer"
BOOLEAN = "Input should be a valid boolean, unable to interpret input"


def problem(where: str, field: str, message: str, kind: str) -> Any:
    return {"detail": [{"loc": [where, field], "msg": message, "type": kind}]}


@pytest.mark.parametrize(
    ("query", "kind", "message"),
    [
        ("page=x", "int_parsing", INTEGER),
        ("page=", "int_parsing", INTEGER),
        ("page=1.5", "int_parsing", INTEGER),
        ("version=one", "int_parsing", INTEGER),
        ("page=0", "greater_than_equal", "Input should be greater than or equal to 1"),
        ("page_size=0", "greater_than_equal", "Input should be greater than or equal to 1"),
        ("page_size=101", "less_than_equal", "Input should be less than or equal to 100"),
    ],
)
def test_a_query_that_does_not_parse_is_422_as_fastapi_words_it(entities, query, kind, message):
    field = query.partition("=")[0]
    assert entities.get(f"?{query}", 422) == problem("query", field, message, kind)


@pytest.mark.parametrize("tail", ["", "/versions", "/file"])
def test_an_id_that_does_not_parse_is_422_as_fastapi_words_it(entities, tail):
    expected = problem("path", "id", INTEGER, "int_parsing")
    assert [entities.get(f"{id}{tail}", 422) for id in ("abc", "1%00")] == [expected] * 2


@pytest.mark.parametrize(
    ("texts", "kind", "message"),
    [
        ({"parent_id": "x"}, "int_parsing", INTEGER),
        ({"is_collection": "maybe"}, "bool_parsing", BOOLEAN),
    ],
)
def test_a_form_that_does_not_parse_is_422_as_fastapi_words_it(entities, texts, kind, message):
    expected = problem("body", next(iter(texts)), message, kind)
    assert entities.create(expect=422, **texts) == expected


def test_all_that_does_not_parse_is_told_at_once(entities):
    detail = entities.get("?page=x&page_size=1000&version=y", 422)["detail"]
    assert [item["loc"][1] for item in detail] == ["page", "page_size", "version"]


@pytest.mark.parametrize(
    "text",
    [
        "color=red", "type", "type=image,type=video", "=x", "is_deleted=maybe", "parent_id=x",
        "parent_id=1.5", "is_collection=null", "id=1", "type=image,,x",
    ],
)  # fmt: skip
def test_a_filter_that_does_not_parse_is_422(entities, text):
    (item,) = entities.get(f"?filter_param={quote(text)}", 422)["detail"]
    assert item["loc"] == ["query", "filter_param"]


@pytest.mark.parametrize("raw", [b"a\0b", b"\xff", b"\xed\xa0\x80"])
def test_a_label_that_is_no_text_is_422(entities, raw):
    body, content_type = form("a.png", png(), "image", label="LABEL")
    headers = {**OWNER, "Content-Type": content_type}
    answer = entities.server.request("POST", "/entity/", body.replace(b"LABEL", raw), headers)
    assert (answer.status, answer.json["detail"][0]["loc"]) == (422, ["body", "label"])


@pytest.mark.parametrize(
    ("digits", "one", "version", "page"),
    [
        (2**63 - 1, 404, 200, 200), (2**63, 422, 200, 200), (10**30, 422, 200, 200),
        ("9" * 5000, 422, 422, 422), (-1, 404, 200, 422), (0, 404, 200, 422),
        (-(2**63), 422, 200, 422),
    ],
    ids=["largest", "too large", "10**30", "5000 digits", "-1", "0", "smallest"],
)  # fmt: skip
def test_a_number_beyond_all_ids_is_no_mistake_of_the_server(server, digits, one, version, page):
    tails = ("", "?version=1", "/file", "/versions")
    statuses = {tail: server.get(f"/entity/{digits}{tail}").status for tail in tails}
    assert statuses == dict.fromkeys(tails, one)
    assert server.get(f"/entity/?version={digits}").status == version
    assert server.get(f"/entity/?page={digits}").status == page


# The declarations of document 004 as its own program has them
FASTAPI_PROGRAM = """
from fastapi import Body, FastAPI, File, Form, Query, UploadFile
from pydantic import BaseModel

class Patch(BaseModel):
    label: str | None = None
    description: str | None = None
    parent_id: int | None = None
    is_deleted: bool = False

app = FastAPI()

@app.get("/entity/")
def page(page: int = Query(1, ge=1), page_size: int = Query(20, ge=1, le=100),
         version: int | None = None): ...

@app.get("/entity/{id}")
def get(id: int, version: int | None = None): ...

@app.get("/entity/{id}/versions")
def versions(id: int): ...

@app.delete("/entity/{id}")
def delete(id: int): ...

@app.patch("/entity/{id}")
def patch(id: int, body: Patch = Body(embed=True)): ...

@app.post("/entity/")
@app.put("/entity/{id}")
def write(id: int = 0, image: UploadFile | None = File(None), is_collection: bool = Form(False),
          label: str | None = Form(None), parent_id: int | None = Form(None)): ...
"""
NO_NUMBERS = ["x", "", "1.5", "1e3", "\u0663", "0x1", "null", "true", "- 1", "1 2", "1,0"]
NO_JSON_FIELDS: dict[str, list[Any]] = {
    "label": [1, [], {}, True],
    "description": [1.5],
    "parent_id": ["x", 1.5, [], "", {}],
    "is_deleted": ["x", None, 2, [], 1.5, "", 2.0, " true"],
}
NO_FORMS = [
    "parent_id=x", "parent_id=1.5", "is_collection=maybe", "is_collection=2", "parent_id=1e3",
    "parent_id=x&is_collection=y", "is_collection=&parent_id=x", "is_collection=-1",
    "is_collection=+true", "is_collection=false%0A",
]  # fmt: skip


def bad_entity_requests(key: int) -> Iterator[tuple[str, str, str | None, str | None]]:
    """Method, path, body and its type of requests that FastAPI refuses with 422."""
    for number in map(quote, NO_NUMBERS):
        for name in ("page", "page_size", "version"):
            yield "GET", f"/entity/?{name}={number}", None, None
        if number:
            yield "DELETE", f"/entity/{number}", None, None
            yield "GET", f"/entity/{number}/versions", None, None
            yield "GET", f"/entity/{number}?version=x", None, None
    for query in ("page=0", "page=-1", "page_size=101", "page=0&page_size=0&version=z"):
        yield "GET", f"/entity/?{query}", None, None
    bodies = [{"body": {name: value}} for name, bad in NO_JSON_FIELDS.items() for value in bad]
    everything = {name: values[0] for name, values in NO_JSON_FIELDS.items()}
    for body in (*bodies, {"body": everything}, {"body": []}, {"body": None}, {"body": 1}):
        yield "PATCH", f"/entity/{key}", json.dumps(body), "application/json"
    yield "PATCH", f"/entity/{key}", None, None
    for text in NO_FORMS:
        yield "POST", "/entity/", text, "application/x-www-form-urlencoded"
        yield "PUT", f"/entity/{key}", text, "application/x-www-form-urlencoded"


@pytest.mark.filterwarnings("ignore")
def test_what_fastapi_refuses_is_refused_in_the_same_words(entities):
    need("multipart")
    program: dict[str, Any] = {}
    need("fastapi")
    exec(FASTAPI_PROGRAM, program)
    theirs = need("fastapi.testclient").TestClient(program["app"])
    requests = list(bad_entity_requests(entities.collection()["id"]))
    for method, path, body, content_type in requests:
        headers = {"Content-Type": content_type} if content_type else {}
        expected = theirs.request(method, path, content=body, headers=headers)
        assert expected.status_code == 422, (path, body)
        names = ("loc", "msg", "type")
        problems = [{name: item[name] for name in names} for item in expected.json()["detail"]]
        answer = entities.server.request(method, path, body, {**headers, **OWNER})
        assert (answer.status, answer.json) == (422, {"detail": problems}), (path, body)
    assert len(requests) >= 100


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"is_deleted": null}', "bool_type"), ('{"is_deleted": "perhaps"}', "bool_parsing"),
        ('{"is_deleted": []}', "bool_type"), ('{"parent_id": "x"}', "int_parsing"),
        ('{"parent_id": 1.5}', "int_from_float"), ('{"parent_id": 1e999}', "int_from_float"),
        ('{"parent_id": {}}', "int_type"),
        ('{"parent_id": 99999999999999999999}', "int_parsing_size"),
        ('{"label": 5}', "string_type"), ('{"label": "\\u0000"}', "string_unicode"),
        ('{"label": "\\ud800"}', "string_unicode"), ('{"description": ["x"]}', "string_type"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("whole", "place"), [("{}", ["body"]), ('{{"body": {}}}', ["body", "body"])]
)
def test_json_that_does_not_fit_is_422(entities, text, kind, whole, place):
    key = entities.collection()["id"]
    headers = {**OWNER, "Content-Type": "application/json"}
    answer = entities.server.request("PATCH", f"/entity/{key}", whole.format(text), headers)
    (item,) = answer.json["detail"]
    field = text.split('"')[1]
    assert (answer.status, item["loc"], item["type"]) == (422, [*place, field], kind)
    said = "Unable to parse" if kind == "int_parsing_size" else "Input should be "
    assert item["msg"].startswith(said)


@pytest.mark.parametrize(
    ("method", "content_type", "body", "status"),
    [
        ("PATCH", "application/json", "{", 400),
        ("PATCH", "application/json", '{"label": NaN}', 400),
        ("PATCH", "application/json", "[" * 100_000, 400),
        ("PATCH", "application/json", '{"label": "x"}'.encode("utf-16"), 400),
        ("PATCH", "application/json", '{"body": 5}', 422),
        ("PATCH", "application/json", '{"is_deleted": 0.0}', 200),
        ("PATCH", "application/x-www-form-urlencoded", "label=x", 415),
        ("PATCH", "text/plain", "{}", 415),
        ("PATCH", "application/json; charset=utf-8", '{"unknown": 1, "id": 5, "md5": "x"}', 200),
        ("PUT", "application/json", '{"label": "x"}', 415),
    ],
)
def test_patch_reads_json_only_and_put_no_json(entities, method, content_type, body, status):
    key = entities.collection()["id"]
    headers = {**OWNER, "Content-Type": content_type}
    answer = entities.server.request(method, f"/entity/{key}", body, headers)
    assert answer.status == status
    assert len(entities.versions(key)) == 1


def test_the_settings_of_entities_are_kept(start, tmp_path):
    kept = tmp_path / "pictures" / "kept"
    running = start("--media_storage_dir", str(kept), "--max_media_bytes", "1000")
    entities = Entities(running)
    for size in (1001, 3_000_000):
        entities.create(png_of(size), 413)
    item = entities.create(png_of(1000))
    files = [path for path in kept.rglob("*") if path.is_file()]
    assert files == [kept / item["file_path"]]
    fill(running.storage, {"a.png": png()})
    running.rescan()
    assert names(running) == {"a.png"}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Entities]:
    """Entities with known ids, 1 to 7."""
    with Server(tmp_path_factory.mktemp("stock") / "pictures") as running:
        entities = Entities(running)
        entities.collection(label="Straße", description="Folder")  # 1
        entities.collection(label="inner", parent_id=1)  # 2
        entities.create(label="100% cat", parent_id=1)  # 3
        entities.create(label="ÄRGER", description="snake_case", parent_id=2)  # 4
        entities.create(jpeg(), label="old", description="one\ntwo")  # 5
        entities.create(mp4_of(), label="film")  # 6
        entities.create(label="gone")  # 7
        entities.patch(7, is_deleted=True)
        entities.patch(5, label="new", parent_id=1)
        entities.patch(5, label="newest")
        yield entities


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", [1, 2, 3, 4, 5, 6, 7]), ("type=image", [3, 4, 5, 7]), ("type=video", [6]),
        ("type=null", [1, 2]), ("type=nonsense", []), ("mime_type=image/jpeg", [5]),
        ("extension=png", [3, 4, 7]), ("parent_id=1", [2, 3, 5]), ("parent_id=null", [1, 6, 7]),
        ("is_collection=true", [1, 2]), ("is_collection=0", [3, 4, 5, 6, 7]),
        ("is_deleted=yes", [7]), ("is_deleted=false,type=image,parent_id=1", [3, 5]),
        (" type = image , extension = jpg ,", [5]),
    ],
)  # fmt: skip
def test_filters_find_what_they_say(stock, text, found):
    assert stock.keys(filter_param=text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("strasse", [1]), ("STRASSE", [1]), ("straße", [1]), ("ärger", [4]), ("%", [3]),
        ("_", [4]), ("100% CAT", [3]), ("ONE\nTWO", [5]), ("newestone", []), ("er", [1, 2, 4]),
        ("*", []), ("' OR 1=1 --", []),
    ],
)  # fmt: skip
def test_a_search_finds_what_it_says(stock, text, found):
    assert stock.keys(search_query=text) == found


def test_a_search_within_a_filter_is_paged(stock):
    page = stock.listed(search_query="e", filter_param="type=image", page_size=1, page=2)
    assert page["pagination"]["total_items"] == 3
    assert [item["id"] for item in page["items"]] == [5]


@pytest.mark.parametrize(
    ("query", "items", "rest"),
    [
        ({}, 7, (1, 20, 7, 1, False, False)),
        ({"page_size": 3}, 3, (1, 3, 7, 3, True, False)),
        ({"page_size": 3, "page": 2}, 3, (2, 3, 7, 3, True, True)),
        ({"page_size": 3, "page": 3}, 1, (3, 3, 7, 3, False, True)),
        ({"page_size": 3, "page": 4}, 0, (4, 3, 7, 3, False, True)),
        ({"page_size": 7}, 7, (1, 7, 7, 1, False, False)),
        ({"page": 10**17}, 0, (10**17, 20, 7, 1, False, True)),
        ({"search_query": "nothing"}, 0, (1, 20, 0, 0, False, False)),
    ],
)
def test_pagination_is_exact(stock, query, items, rest):
    fields = ["page", "page_size", "total_items", "total_pages", "has_next", "has_prev"]
    page = stock.listed(**query)
    assert len(page["items"]) == items
    assert page["pagination"] == dict(zip(fields, rest, strict=True))


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({"version": 1}, [1, 2, 3, 4, 5, 6, 7]),
        ({"version": 2}, [5, 7]),
        ({"version": 1, "search_query": "old"}, [1, 5]),
        ({"version": 2, "search_query": "old"}, []),
        ({"version": 1, "filter_param": "is_deleted=true"}, []),
        ({"version": 2, "filter_param": "is_deleted=true"}, [7]),
        ({"version": 2, "filter_param": "parent_id=1"}, [5]),
    ],
)
def test_a_version_of_the_list_has_what_was_then(stock, query, found):
    assert stock.keys(**query) == found


def test_a_version_of_the_list_has_whole_entities_and_pages(stock):
    page = stock.listed(version=3)
    assert page["items"] == [stock.get(5)]
    assert page["pagination"]["total_items"] == 1
    assert stock.listed(version=4)["pagination"]["total_pages"] == 0


# -- files: uploads that can be resumed ---------------------------------------------------

TUS = {"Tus-Resumable": "1.0.0"}
TUS_CONTENT = {**TUS, "Content-Type": "application/offset+octet-stream"}


def metadata(**texts: str) -> dict[str, str]:
    pairs = [f"{key} {base64.b64encode(text.encode()).decode()}" for key, text in texts.items()]
    return {"Upload-Metadata": ",".join(pairs)}


def about(target: str) -> dict[str, str]:
    filename = f"{unique().decode()}.png"
    return metadata(target=target, filename=filename, name="a picture", label="x")


class Resumable:
    """An upload that is sent in parts with tus 1.0."""

    def __init__(self, server: Server, url: str, headers: Mapping[str, str]) -> None:
        self.server, self.path, self.headers = server, local(url), headers
        self.name = urlsplit(url).path.rpartition("/")[2]

    def send(self, offset: int, content: bytes, **fields: str) -> Answer:
        fields = {**self.headers, **TUS_CONTENT, "Upload-Offset": str(offset), **fields}
        return self.server.request("PATCH", self.path, content, fields)

    def head(self) -> Answer:
        return self.server.request("HEAD", self.path, headers={**self.headers, **TUS})

    def offset(self) -> int:
        return int(self.head().headers["Upload-Offset"])

    def get(self) -> Any:
        return self.server.get(self.path, **self.headers).json

    def begin_to_send(self, offset: int, length: int, content: bytes) -> Raw:
        """A connection on which the beginning of some content has been sent."""
        raw = Raw(self.server)
        fields = {**self.headers, **TUS_CONTENT, "Upload-Offset": str(offset)}
        lines = [f"PATCH {self.path} HTTP/1.1", "Host: x", f"Content-Length: {length}"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        raw.send("\r\n".join([*lines, "", ""]).encode() + content)
        return raw


def begin(
    server: Server, length: int, target: str = "entities", headers: Mapping[str, str] = OWNER,
) -> Resumable:  # fmt: skip
    fields = {**headers, **TUS, **about(target), "Upload-Length": str(length)}
    answer = server.request("POST", "/files/", headers=fields)
    assert answer.status == 201, answer.body
    return Resumable(server, answer.headers["Location"], headers)


@pytest.mark.parametrize("family", ["media", "library", "images", "accounts", "entities"])
def test_every_family_takes_a_file_in_parts_as_it_takes_a_whole_one(server, jane, family):
    fields = {"name": "a picture", "label": "x"}  # each family takes its own
    name, who = "image" if family == "entities" else "file", OWNER
    method, path = {
        "media": ("POST", "/upload"), "library": ("PUT", f"/image/{unique().decode()}.png"),
        "images": ("POST", "/upload-image"), "accounts": ("POST", MEDIA),
        "entities": ("POST", "/entity/"),
    }[family]  # fmt: skip
    if family == "accounts":
        who = jane.headers
    filename = f"{unique().decode()}.png"
    whole = server.send_file(method, path, png(), filename, who, field=name, **fields)
    assert whole.status == 201
    content = png(padding=5000)
    upload = begin(server, len(content), family, headers=who)
    for start, end in ((0, 1000), (1000, 1000), (1000, 4097), (4097, len(content))):
        answer = upload.send(start, content[start:end])
        assert (answer.status, answer.body) == (204, b"")
        assert answer.headers["Upload-Offset"] == str(end)
        assert upload.offset() == end
    assert answer.headers["Upload-Complete"] == "?1"
    stored = upload.get()
    assert (stored["target"], stored["length"]) == (family, len(content))
    assert kinds(stored["answer"]) == kinds(whole.json)
    folder = {"media": "media", "library": "uploads"}.get(family, f".mediaserver/{family}")
    folder = folder.replace("accounts", "users")
    found = [path.read_bytes() for path in (server.storage / folder).rglob("*") if path.is_file()]
    assert content in found
    assert [*server.storage.rglob(f".incoming/{upload.name}")] == []


def kinds(value: Mapping[str, Any]) -> dict[str, type]:
    return {name: type(member) for name, member in value.items()}


@pytest.mark.parametrize("path", ["/files", "/files/", "/files/0"])
def test_options_say_what_is_possible(server, path):
    answer = server.request("OPTIONS", path)
    assert (answer.status, answer.headers["Tus-Resumable"]) == (204, "1.0.0")
    assert answer.headers["Tus-Version"] == "1.0.0"
    assert set(answer.headers["Tus-Extension"].split(",")) == {
        "creation", "creation-defer-length", "creation-with-upload", "expiration", "checksum",
        "termination",
    }  # fmt: skip
    assert "sha1" in answer.headers["Tus-Checksum-Algorithm"].split(",")
    assert answer.headers["Tus-Max-Size"] == "1073741824"
    assert "application/partial-upload" in answer.headers["Accept-Patch"]


NO_CREDENTIAL = {"Authorization": "Basic eDp5"}


@pytest.mark.parametrize(
    ("status", "changes"),
    [
        (412, {"Tus-Resumable": None}),
        (412, {"Tus-Resumable": "0.2.2"}),
        (400, {"Upload-Length": None}),
        (400, {"Upload-Length": "-1"}),
        (400, {"Upload-Length": "1e3"}),
        (400, {"Upload-Defer-Length": "1"}),
        (400, {"Upload-Length": "hello"}),
        *[(400, {"Upload-Length": None, "Upload-Defer-Length": n}) for n in ("2", "0", "-1", "x")],
        (501, {"Upload-Concat": "partial"}),
        (501, {"Upload-Concat": "PARTIAL"}),
        (412, {"Tus-Resumable": "0.1.0"}),
        (413, {"Upload-Length": "10485761"}),
        (413, {"Upload-Length": "9" * 30}),
        (413, {"Upload-Length": "2000000000", **about("entities")}),
        (400, {"Upload-Metadata": None}),
        (400, {"Upload-Metadata": ""}),
        (400, {"Upload-Length": "0"}),  # no family takes an empty file
        (400, {"Upload-Metadata": "target"}),
        (400, {"Upload-Metadata": "target bWVkaWE"}),
        (400, {"Upload-Metadata": "target bWVkaWE=,,"}),
        (400, {"Upload-Metadata": "target bWVkaWE=,target bWVkaWE="}),
        (400, metadata(target="videos", filename="a.png")),
        (400, metadata(target="media", filename="a.txt")),
        (400, metadata(target="media")),
        (400, metadata(target="library", filename="a.mp4")),
        (400, metadata(target="library", filename="png")),
        (400, metadata(target="library", filename="")),
        (400, metadata(target="library")),
        (400, metadata(target="images", filename="a.svg")),
        (422, metadata(target="entities", parent_id="x")),
        (400, metadata(target="entities", filename="a.png", parent_id="999999999")),
        (400, metadata(target="entities", filename="a.png", is_collection="true")),
        (400, metadata(target="accounts", name="a", collection="x") | bearer(user_id=79)),
        (400, metadata(target="accounts", type="picture") | bearer(user_id=79)),
        (413, about("accounts") | bearer(user_id=79) | {"Upload-Length": str(20 << 30)}),
        (401, NO_CREDENTIAL),
        (401, {"Authorization": "Bearer x.y.z"}),
        (403, READER),
        (403, about("accounts")),
    ],
)
def test_a_beginning_that_is_refused_leaves_nothing(server, status, changes):
    before = left_arriving(server.storage)
    fields = {**OWNER, **TUS, "Upload-Length": "10", **about("media"), **changes}
    fields = {name: value for name, value in fields.items() if value is not None}
    answer = server.request("POST", "/files/", headers=fields)
    assert answer.status == status, answer.body
    assert answer.headers["Tus-Resumable"] == "1.0.0"
    assert answer.headers["Location"] is None
    if status == 412:
        assert answer.headers["Tus-Version"] == "1.0.0"
    assert left_arriving(server.storage) <= before


@pytest.mark.parametrize(
    ("status", "changes"),
    [
        (412, {"Tus-Resumable": None}),
        (412, {"Tus-Resumable": "2"}),
        (415, {"Content-Type": "image/png"}),
        (400, {"Upload-Offset": None}),
        (400, {"Upload-Offset": "-5"}),
        (400, {"Upload-Offset": "hello"}),
        (415, {"Content-Type": "application/json"}),
        (415, {"Content-Type": None}),
        (409, {"Upload-Offset": "4"}),
        (409, {"Upload-Offset": "6"}),
        (409, {"Upload-Offset": "9" * 30}),
        (400, {"Upload-Length": "11"}),
        (400, {"Upload-Checksum": "crc99 AAAA"}),
        (400, {"Upload-Checksum": "sha1 ?"}),
        (460, {"Upload-Checksum": "sha1 AAAA"}),
        (413, {"content": b"x" * 6}),
        (413, {"content": iter([b"x" * 6])}),
        (401, NO_CREDENTIAL),
        (403, READER),
    ],
)
def test_content_that_is_refused_changes_nothing(server, status, changes):
    upload = begin(server, 10)
    assert upload.send(0, b"01234").status == 204
    fields = {**OWNER, **TUS_CONTENT, "Upload-Offset": "5", **changes}
    content = fields.pop("content", b"56")
    fields = {name: value for name, value in fields.items() if value is not None}
    answer = server.request("PATCH", upload.path, content, fields)
    assert answer.status == status, answer.body
    assert answer.headers["Tus-Resumable"] == "1.0.0"
    if status == 409:
        assert answer.headers["Upload-Offset"] == "5"
    assert upload.offset() == 5


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("file/name dGVzdC5tcDQ=,size OTYwMjQ0,type! dmlkZW8vbXA0,video,withWhitespace ",
         {"file/name": "test.mp4", "size": "960244", "type!": "video/mp4", "video": "",
          "withWhitespace": ""}),
        ("hello d29ybGQ=, tus cnVsZXM=", {"hello": "world", "tus": "rules"}),
        ("filename d29ybGRfZG9taW5hdGlvbl9wbGFuLnBkZg==,is_confidential",
         {"filename": "world_domination_plan.pdf", "is_confidential": ""}),
        ("filename dGVzdC5tcDQ=, filename cGFja2FnZS5qc29u", None),
        ("video ,video dHJ1ZQ==", None), ("size,size ", None), ("\t\n", None), ("€¢ß", None),
        ("test, te st ", None),
        ("test,,test", None), ("key ZW1vamk", None), ("key invalid-base64==", None),
        ("key =ZW1vamk", None), ("key  ", None), ("too-many   spaces", None),
    ],
)  # fmt: skip
def test_metadata_are_read_as_by_the_cases_of_tus_server(text, values):
    if values is None:
        assert status_of(ms.parse_upload_metadata, text) == 400
    else:
        assert ms.parse_upload_metadata(text) == values


def test_the_other_cases_of_tus_server_pass(server):
    """Those of its Post, Patch, Head, Delete and Server that no other test here has."""
    forwarded = {"X-Forwarded-Host": "foo.com", "X-Forwarded-Proto": "https"}
    for more, start in (
        (forwarded, "https://foo.com"),
        ({"X-Forwarded-Proto": "foo"}, server.url),
    ):
        fields = {**OWNER, **TUS, **about("entities"), "Upload-Length": "10", **more}
        begun = server.request("POST", "/files", headers={**fields, "Content-Type": "a/false"})
        assert begun.status == 201, "a type without content is no matter"
        assert begun.headers["Location"].startswith(f"{start}/files/")
    assert server.request("DELETE", "/files/123", headers={**OWNER, **TUS}).status == 404
    fields = {**OWNER, **TUS, **metadata(target="entities"), "Upload-Defer-Length": "1"}
    begun = server.request("POST", "/files", headers=fields)
    upload = Resumable(server, begun.headers["Location"], OWNER)
    assert upload.head().headers["Upload-Length"] is None
    assert upload.send(0, b"01234", **{"Upload-Length": "2000000000"}).status == 413
    assert upload.send(0, b"01234", **{"Upload-Length": "10"}).status == 204
    assert upload.head().headers["Upload-Length"] == "10"
    assert upload.head().headers["Upload-Defer-Length"] is None
    assert upload.send(5, b"5", **{"Upload-Length": "20"}).status == 400


def test_nothing_more_for_a_complete_upload_is_taken(server):
    content = png()
    upload = begin(server, len(content), "media")
    assert upload.send(0, content).status == 204
    answer = upload.send(len(content), b"")
    assert (answer.status, answer.headers["Upload-Offset"]) == (204, str(len(content)))
    assert answer.headers["Upload-Complete"] == "?1"
    assert [upload.send(*each).status for each in ((len(content), b"x"), (0, b""))] == [409, 409]
    assert upload.get()["answer"]["sha256"] == sha256(content)


def test_who_asks_behind_a_broken_connection_is_told_all_that_has_come(tmp_path):
    index = ms.open_index(tmp_path / "index")
    folder = ms.Folder("images", tmp_path, make=True, buffers=ms.WriteBuffers())
    uploads = ms.ResumableUploads(index, {"images": folder}, 60)
    fields = headers(tus_resumable="1.0.0", upload_length="500", upload_offset="0")
    head = ms.parse_upload_head(fields)
    begun = uploads.add("x", "images", ms.UploadSpec("images", "max_upload_bytes"), head)
    transfer = ms.Transfer(uploads, begun, head, ms.Limit(500, ""), md5=False)
    transfer.feed(memoryview(bytes(300)))
    transfer.pause()  # what has come is not much, and so not saved yet
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(uploads.wait_until_saved, begun)
        transfer.discard()
        assert asking.result().received == 300
    index.close()


def test_a_request_whose_upload_was_ended_meanwhile_is_told_so(server):
    upload = begin(server, 3_000_000)
    with upload.begin_to_send(0, 3_000_000, bytes(2_000_000)) as stalled:
        wait_until(upload.offset, "a pause in what comes")
        wait_until(lambda: server.request("DELETE", upload.path, headers={**OWNER, **TUS}).status
                   in {204, 404})  # fmt: skip
        stalled.send(bytes(1_000_000))
        assert stalled.answer().status == 404


def test_an_upload_is_its_beginner_s_alone(server, jane, django):
    upload = begin(server, 10, "accounts", headers=jane.headers)

    def ask(who: Mapping[str, str]) -> list[int]:
        fields = {**TUS_CONTENT, "Upload-Offset": "0", **who}
        return [server.request(method, upload.path, b"", fields).status
                for method in ("HEAD", "PATCH", "DELETE")]  # fmt: skip

    assert (ask(django.headers), ask(NO_CREDENTIAL)) == ([404] * 3, [401] * 3)
    assert ask(OWNER) == [403] * 3
    assert upload.offset() == 0
    unknown = ("/files/0", f"/files/{uuid.uuid4().hex}")
    asked = itertools.product(unknown, ({**OWNER, **TUS}, TUS))
    found = [server.request("HEAD", path, headers=headers).status for path, headers in asked]
    assert found == [404, 401] * 2


def test_an_upload_goes_on_with_the_token_that_began_it(server):
    fields = {**TUS, **about("media"), "Upload-Length": str(len(png()))}
    path = f"/files?token={upload_token()}"
    assert server.request("POST", "/files", headers=fields).status == 401
    begun = server.request("POST", path, headers=fields)
    assert begun.status == 201
    upload = Resumable(server, begun.headers["Location"], {})
    assert upload.send(0, png()[:10]).status == 204
    upload.path = upload.path.partition("?")[0]
    assert upload.send(10, png()[10:]).status == 401


def test_creation_tells_all_that_a_client_needs_to_go_on(server):
    fields = {**OWNER, **TUS, **about("media"), "Upload-Length": "100"}
    begun = server.request("POST", "/files", headers=fields)
    assert begun.headers["Location"].startswith(f"{server.url}/files/")
    expires = ms.parse_date(begun.headers["Upload-Expires"])
    assert abs(expires - time.time() - 86400) < DEADLINE
    head = server.request("HEAD", local(begun.headers["Location"]), headers={**OWNER, **TUS})
    assert (head.status, head.body) == (200, b"")
    assert head.headers["Upload-Metadata"] == fields["Upload-Metadata"]
    assert (head.headers["Upload-Length"], head.headers["Upload-Offset"]) == ("100", "0")
    assert head.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("size", [1000, 3000], ids=["some", "all"])
def test_creation_takes_content_along(server, size):
    content = png(padding=3000)[:size] if size == 1000 else png(padding=3000)
    whole = png(padding=3000) if size == 3000 else content + b"x" * 10
    fields = {**OWNER, **TUS_CONTENT, **about("media"), "Upload-Length": str(len(whole))}
    answer = server.request("POST", "/files", content, fields)
    assert answer.status == 201
    assert answer.headers["Upload-Offset"] == str(len(content))
    if size == 3000:
        assert server.get(local(answer.json["url"])).body == content
    head = server.request("HEAD", local(answer.headers["Location"]), headers={**OWNER, **TUS})
    assert head.headers["Upload-Complete"] == f"?{int(size == 3000)}"
    bad = {**fields, "Content-Type": "image/png"}
    assert server.request("POST", "/files", content, bad).status == 415
    before = left_arriving(server.storage)
    bad = {**fields, "Upload-Checksum": "sha1 AAAA"}
    assert server.request("POST", "/files", content, bad).status == 460
    assert left_arriving(server.storage) <= before


@pytest.mark.parametrize("algorithm", ms.CHECKSUMS)
def test_content_with_a_wrong_checksum_is_dropped(server, algorithm):
    content = png(padding=300_000)
    upload = begin(server, len(content), "media")
    digest = hashlib.new(algorithm, content[:200_000]).digest()
    checksum = {"Upload-Checksum": f"{algorithm} {base64.b64encode(digest).decode()}"}
    assert upload.send(0, content[:199_999] + b"?", **checksum).status == 460
    assert upload.offset() == 0
    assert upload.send(0, content[:200_000], **checksum).status == 204
    assert upload.send(200_000, content[200_000:]).status == 204
    assert upload.get()["answer"]["sha256"] == sha256(content)


def test_a_length_may_be_told_later(server):
    fields = {**OWNER, **TUS, **about("media"), "Upload-Defer-Length": "1"}
    begun = server.request("POST", "/files", headers=fields)
    upload = Resumable(server, begun.headers["Location"], OWNER)
    content = png()
    assert upload.send(0, content[:20]).status == 204
    assert upload.head().headers["Upload-Defer-Length"] == "1"
    assert upload.send(20, content[20:]).status == 204
    assert upload.head().headers["Upload-Complete"] == "?0"
    assert upload.send(len(content), b"", **{"Upload-Length": str(len(content))}).status == 204
    assert upload.get()["answer"]["sha256"] == sha256(content)


def test_an_upload_can_be_ended(server):
    upload = begin(server, 1000)
    assert upload.send(0, b"x" * 500).status == 204
    assert [*server.storage.rglob(f".incoming/{upload.name}")] != []
    assert server.request("DELETE", upload.path, headers={**OWNER, **TUS}).status == 204
    assert upload.head().status == upload.send(500, b"x").status == 404
    assert [*server.storage.rglob(f".incoming/{upload.name}")] == []


def test_ending_a_complete_upload_leaves_its_file(server):
    content = png()
    upload = begin(server, len(content), "media")
    assert upload.send(0, content).status == 204
    path = local(upload.get()["answer"]["url"])
    assert server.request("DELETE", upload.path, headers={**OWNER, **TUS}).status == 204
    assert server.get(path).body == content


def test_the_method_may_be_in_a_header(server):
    content = png()
    upload = begin(server, len(content), "media")
    for method, status in (("OPTIONS", 204), ("HEAD", 200), ("PATCH", 204), ("DELETE", 204)):
        fields = {**OWNER, **TUS_CONTENT, "Upload-Offset": "0", "X-HTTP-Method-Override": method}
        body = content if method == "PATCH" else b""
        assert server.request("POST", upload.path, body, fields).status == status
    assert upload.head().status == 404
    other = begin(server, len(content), "media")  # what only reads stays so
    fields = {**OWNER, **TUS, "X-HTTP-Method-Override": "DELETE"}
    assert server.request("GET", other.path, headers=fields).status == 200


def test_what_the_family_refuses_ends_the_upload(server):
    upload = begin(server, 1000)
    refused = upload.send(0, b"no picture" * 100)
    assert refused.status == 400
    assert "no image, video or audio" in refused.json["detail"]
    assert upload.head().status == 404
    assert [*server.storage.rglob(f".incoming/{upload.name}")] == []


def test_what_fails_for_a_while_can_be_ended_later(start):
    running, content = start(), png(padding=5000)
    upload = begin(running, len(content), "media")
    (running.storage / "media").touch()  # no folder can be made there
    failed = upload.send(0, content)
    assert (failed.status, failed.headers["Retry-After"]) == (503, "60")
    (running.storage / "media").unlink()
    offset = upload.offset()
    assert offset == len(content) - 1  # clients take the end for a file that is stored
    assert upload.send(offset, content[offset:]).status == 204
    assert upload.get()["answer"]["sha256"] == sha256(content)


def test_what_came_before_the_connection_broke_stays(server):
    content = png(padding=3_000_000)
    upload = begin(server, len(content))
    with upload.begin_to_send(0, len(content), content[:2_500_000]):
        pass
    offset = wait_until(upload.offset, "what has come")
    wait_until(lambda: upload.offset() == 2_500_000)
    assert upload.send(offset - 1, content[offset - 1 :]).status == 409
    offset = upload.offset()
    assert upload.send(offset, content[offset:]).status == 204
    assert upload.get()["answer"]["md5"] == md5(content)


def test_a_dead_connection_stands_in_nobody_s_way(server):
    content = png(padding=3_000_000)
    upload = begin(server, len(content))
    with upload.begin_to_send(0, len(content), content[:2_000_000]) as dead:
        offset = wait_until(upload.offset, "a pause in what comes")
        half = offset + 100_000
        answer = wait_until(lambda: busy(upload.send(offset, content[offset:half])))
        assert answer.status == 204
        dead.send(b"?" * 900_000)
        late = dead.answer()
        assert (late.status, "Another request" in late.json["detail"]) == (409, True)
        assert upload.send(half, content[half:]).status == 204
    assert upload.get()["answer"]["md5"] == md5(content)


def busy(answer: Answer) -> Answer | None:
    """None where another request is just adding to an upload."""
    return None if answer.status == 423 else answer


def test_one_request_at_a_time_adds_to_an_upload(server):
    content = png(padding=400_000)
    upload = begin(server, len(content))
    answers = together(8, lambda _: upload.send(0, content))
    statuses = Counter(answer.status for answer in answers)
    # One that comes meanwhile is refused as 423, one that comes later by its offset.
    assert (statuses[204], statuses[409] + statuses[423]) == (1, 7)
    assert upload.get()["answer"]["md5"] == md5(content)


@pytest.mark.parametrize("size", [40 << 20, pytest.param(1 << 30, marks=pytest.mark.bench)])
def test_an_upload_goes_on_after_a_kill(start, size):
    running, content = start(), png_of(size)
    upload, sent = begin(running, len(content)), size // 4 * 3
    with upload.begin_to_send(0, len(content), content[:sent]):
        wait_until(lambda: upload.offset() >= 16 << 20, "a checkpoint")
        running.kill()
    upload.server = running = start()
    offset = upload.offset()
    assert 16 << 20 <= offset <= sent
    assert upload.send(offset, content[offset:]).status == 204
    answer = upload.get()["answer"]
    assert (answer["md5"], answer["file_size"]) == (md5(content), len(content))
    assert Entities(running).content(answer["id"]) == content
    assert not left_arriving(running.storage)


def test_an_upload_that_had_got_its_place_goes_on_after_no_kill(start):
    """Another request would write to the file that is stored."""
    running, content = start(), png()
    stored = running.upload(content).json["filename"]
    upload = begin(running, 1000)
    assert upload.send(0, b"x" * 10).status == 204
    running.kill()
    (incoming,) = running.storage.rglob(f".incoming/{upload.name}")
    incoming.unlink()
    os.link(running.storage / "media" / stored, incoming)
    upload.server = running = start()
    assert upload.head().status == 404
    assert running.get(f"/media/{stored}").body == content
    assert not left_arriving(running.storage)


def test_an_upload_whose_file_was_lost_is_none(start):
    running = start()
    upload, other = begin(running, 1000), begin(running, 1000)
    assert other.send(0, b"x" * 10).status == 204
    running.kill()
    for path in running.storage.rglob(f".incoming/{upload.name}"):
        path.unlink()
    upload.server = other.server = start()
    assert upload.head().status == 404
    assert other.offset() == 10
    for path in running.storage.rglob(f".incoming/{other.name}"):
        path.unlink()
    assert other.send(10, b"x").status == 404


def test_expired_uploads_leave_nothing(start):
    running = start(upload_expiry_seconds="1")
    upload = begin(running, 1000)
    wait_until(lambda: upload.head().status == 404, "the end of a second")
    assert upload.send(0, b"x").status == 404
    running.stop()
    start()
    assert not left_arriving(running.storage)
    with running.index() as db:
        assert db.execute("SELECT count(*) FROM upload").fetchone() == (0,)


def test_what_expires_is_removed_while_the_server_runs(tmp_path, monkeypatch, capsys):
    index = ms.open_index(tmp_path / "index")
    folder = ms.Folder("images", tmp_path, make=True, buffers=ms.WriteBuffers())
    uploads = ms.ResumableUploads(index, {"images": folder}, 0)
    head = ms.parse_upload_head(headers(tus_resumable="1.0.0", upload_length="5"))
    uploads.add("x", "images", ms.UploadSpec("images", "max_upload_bytes"), head)
    monkeypatch.setattr(ms, "TRY_AGAIN_SECONDS", 0.01)
    stopping, faults = threading.Event(), [KeyError("x"), OSError("y")]

    def remove() -> None:
        if faults:
            raise faults.pop()
        uploads.remove_expired()

    watching = ms.start_repeating("old uploads", remove, 0.01, stopping)
    wait_until(lambda: not left_arriving(tmp_path), "the end of the upload")
    assert capsys.readouterr().err.count("mediaserver: old uploads stopped: ") == 2
    stopping.set()
    watching.join(DEADLINE)
    assert uploads.rows.unfinished() == []
    index.close()


@pytest.mark.parametrize("step", ["add", "acquire"])
def test_an_upload_that_cannot_begin_leaves_nothing(settings_of, tmp_path, monkeypatch, step):
    """No file, and none of the uploads that its owner may have open: nobody knows its URL."""
    settings = settings_of(f"--storage_dir={tmp_path}", "--auth_disabled=true")
    ms.make_folders(settings)
    fields = {**TUS, **about("media"), "Upload-Length": "9"}
    head = post("/files", 0, *(f"{name}: {value}" for name, value in fields.items()))[:-4]
    asked = []

    def fail(*values: object) -> None:
        asked.append(values)
        raise sqlite3.OperationalError("the index is locked")

    with ms.opened_app(settings) as app:
        monkeypatch.setattr(app.uploads.rows, step, fail)
        answer = ms.Dispatcher(app, ms.ROUTES)(ms.parse_request_head(head), "127.0.0.1")
        assert (answer.status, len(asked)) == (503, 1)
        assert not left_arriving(tmp_path)
        assert app.uploads.rows.unfinished() == []


def test_open_uploads_have_bounds(start):
    running = start(max_media_bytes=str(1 << 50))
    fields = {**OWNER, **TUS, **about("entities"), "Upload-Length": str(1 << 49)}
    assert running.request("POST", "/files", headers=fields).status == 507
    uploads = [begin(running, 10) for _ in range(ms.MAX_OPEN_UPLOADS)]
    fields["Upload-Length"] = "10"
    answer = running.request("POST", "/files", headers=fields)
    assert (answer.status, answer.headers["Retry-After"]) == (429, "60")
    begin(running, 10, headers=bearer(permissions=["media_store_write"]))
    running.request("DELETE", uploads[0].path, headers={**OWNER, **TUS})
    begin(running, 10)


def test_open_uploads_count_in_the_quota_of_their_account(start):
    running = start(user_quota_bytes="1000")
    jane = User(running)
    fields = {**jane.headers, **TUS, **about("accounts")}

    def status(length: int) -> int:
        more = {"Upload-Length": str(length)}
        return running.request("POST", "/files", headers={**fields, **more}).status

    upload = begin(running, 600, "accounts", jane.headers)
    assert (status(401), status(400), status(1)) == (413, 201, 413)
    assert upload.send(0, b"x" * 500).status == 204
    assert status(1) == 413
    running.request("DELETE", upload.path, headers={**jane.headers, **TUS})
    assert (status(601), status(600)) == (413, 201)


DRAFT = {"Upload-Draft-Interop-Version": "6"}
PARTIAL = {**DRAFT, "Content-Type": "application/partial-upload"}


def send_raw(raw: Raw, method: str, path: str, content: bytes, **fields: str) -> None:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(content)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in {**OWNER, **fields}.items()]
    raw.send("\r\n".join([*lines, "", ""]).encode() + content)


def test_the_ietf_draft_s_client_learns_early_where_it_can_go_on(server):
    content = png(padding=2000)
    with Raw(server) as raw:
        fields = {**DRAFT, **about("entities"), "Upload-Complete": "?1"}
        send_raw(raw, "POST", "/files/", content, **fields)
        early, answer = raw.answer(), raw.answer()
    assert early.status == 104
    assert early.headers["Upload-Draft-Interop-Version"] == "6"
    assert re.match(r"max-size=1073741824, max-age=\d+$", early.headers["Upload-Limit"])
    assert (answer.status, answer.headers["Upload-Complete"]) == (201, "?1")
    assert answer.json["md5"] == md5(content)
    head = server.request("HEAD", local(early.headers["Location"]), headers=OWNER)
    assert (head.headers["Upload-Complete"], head.headers["Upload-Length"]) == (
        "?1",
        str(len(content)),
    )


def test_the_ietf_draft_s_client_goes_on_where_it_was_cut(server):
    content = png(padding=2_000_000)
    with Raw(server) as raw:
        fields = {**OWNER, **DRAFT, **about("entities"), "Upload-Complete": "?1"}
        lines = [f"{name}: {value}" for name, value in fields.items()]
        start = f"POST /files HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
        raw.send((start + "\r\n".join(lines) + "\r\n\r\n").encode() + content[:1_500_000])
        path = local(raw.answer().headers["Location"])
    head = wait_until(lambda: offset_at(server, path, 1_500_000), "what has come")
    assert (head.headers["Upload-Complete"], head.headers["Upload-Length"]) == (
        "?0", str(len(content)),
    )  # fmt: skip
    fields = {**OWNER, **PARTIAL, "Upload-Complete": "?1", "Upload-Offset": "1500000"}
    answer = server.request("PATCH", path, content[1_500_000:], fields)
    assert (answer.status, answer.headers["Upload-Complete"]) == (201, "?1")
    assert answer.json["md5"] == md5(content)


def offset_at(server: Server, path: str, offset: int) -> Answer | None:
    head = server.request("HEAD", path, headers=OWNER)
    return head if head.headers["Upload-Offset"] == str(offset) else None


def test_the_ietf_draft_s_client_may_send_parts(server):
    content = png(padding=2000)
    fields = {**OWNER, **about("entities"), "Upload-Complete": "?0"}
    begun = server.request("POST", "/files", content[:100], fields)
    assert (begun.status, begun.headers["Upload-Complete"]) == (201, "?0")
    assert begun.headers["Upload-Offset"] == "100"
    path = local(begun.headers["Location"])

    def send(offset: int, content: bytes, complete: str, **more: str) -> Answer:
        fields = {**OWNER, **PARTIAL, "Upload-Offset": f"{offset}", "Upload-Complete": complete}
        return server.request("PATCH", path, content, {**fields, **more})

    answer = send(50, b"x", "?0")
    assert (answer.status, answer.headers["Upload-Offset"]) == (409, "100")
    assert send(100, b"x", "?0", **{"Content-Type": "image/png"}).status == 415
    answer = send(100, content[100:], "?0")
    assert (answer.status, answer.headers["Upload-Complete"]) == (204, "?0")
    assert send(len(content), b"x", "?1", **{"Upload-Length": "5"}).status == 400
    answer = send(len(content), b"", "?1")
    assert (answer.status, answer.headers["Upload-Complete"]) == (201, "?1")
    assert answer.json["md5"] == md5(content)
    again = send(len(content), b"", "?1")
    assert (again.status, again.headers["Upload-Complete"]) == (400, "?1")


@pytest.mark.parametrize("first", ["tus", "draft"])
def test_an_upload_that_one_protocol_began_goes_on_in_the_other(server, first):
    content = png(padding=2000)
    upload, half = begin(server, len(content)), 1000
    steps = [(first, 0, half), ({"tus": "draft", "draft": "tus"}[first], half, len(content))]
    for protocol, start, end in steps:
        fields = {**OWNER, **PARTIAL, "Upload-Offset": str(start)}
        fields["Upload-Complete"] = f"?{end == len(content):d}"
        if protocol == "tus":
            answer = upload.send(start, content[start:end])
        else:
            answer = server.request("PATCH", upload.path, content[start:end], fields)
        assert answer.status == (204 if protocol == "tus" or end < len(content) else 201)
        assert upload.offset() == end
    assert upload.get()["answer"]["md5"] == md5(content)


def test_an_error_at_the_end_of_the_ietf_draft_s_upload_is_told_as_the_end(server):
    fields = {**OWNER, **about("entities"), "Upload-Complete": "?1"}
    answer = server.request("POST", "/files", b"no picture", fields)
    assert (answer.status, answer.headers["Upload-Complete"]) == (400, "?1")


TUS_CLIENT = """
const tus = require('tus-js-client'), fs = require('fs')
const [endpoint, file, key] = process.argv.slice(2)
const upload = new tus.Upload(fs.createReadStream(file), {
  endpoint, uploadSize: fs.statSync(file).size, chunkSize: 4 << 20,
  headers: {Authorization: `Bearer ${key}`}, retryDelays: Array(50).fill(100),
  metadata: {target: 'entities', filename: 'a.png', label: 'by tus-js-client'},
  onError: error => { console.error(String(error)); process.exit(1) },
  onProgress: sent => console.log('sent', sent),
  onSuccess: () => console.log('done', upload.url),
})
upload.start()
"""


def test_tus_js_client_gets_through_a_kill(start, tmp_path):
    modules = str(node_package("tus-js-client").parent)
    content, port = png_of(24 << 20), free_port()
    (tmp_path / "a.png").write_bytes(content)
    running = start("--port", f"{port}")
    endpoint = f"http://127.0.0.1:{port}/files/"
    client = subprocess.Popen(
        [need("node"), "-e", TUS_CLIENT, "x", endpoint, tmp_path / "a.png", OWNER_KEY],
        env={**os.environ, "NODE_PATH": modules}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with client:
        assert client.stdout
        next(line for line in client.stdout if int(line.split()[1]) > 9 << 20)
        running.kill()
        running = start("--port", f"{port}")
        said = client.stdout.read()
    assert client.returncode == 0
    assert re.search(r"^done http", said, re.M)
    assert Entities(running).listed()["items"][0]["md5"] == md5(content)


# -- shares: links for who has no account --------------------------------------------------


def share(server: Server, headers: Mapping[str, str] = OWNER, **values: Any) -> Any:
    status, made = server.call("POST", "/shares", values, headers)
    assert status == 201, made
    return made


def shared(server: Server, made: Mapping[str, Any], **headers: str) -> Any:
    answer = server.get(local(made["url"]), **headers)
    return answer.json["files"] if answer.status == 200 else answer.status


@pytest.fixture(scope="module")
def wedding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with closed reads and pictures in folders, whose names are near."""
    storage = tmp_path_factory.mktemp("album") / "pictures"
    names = ("a/1.png", "a/b/2.png", "a/<i>&.png", "ab/3.png", "a.png", "a0/4.png")
    fill(storage, {name: png_of(500 + number) for number, name in enumerate(names)})
    with Server(storage, READ_AUTH_ENABLED="true") as running:
        running.scanned()
        yield running


def test_a_link_shows_a_folder_to_who_has_it_and_nothing_else(wedding):
    made = share(wedding, kind="folder", target="a/", title="Our <b>wedding</b>")
    files = shared(wedding, made)
    assert [file["name"] for file in files] == ["1.png", "<i>&.png", "2.png"]
    for file in files:
        answer = wedding.get(local(file["url"]))
        assert len(answer.body) == file["size"]
        assert answer.headers["Cache-Control"] == "private, no-cache"
        assert local(file["url"]).rpartition("/")[2] == sha256(answer.body)
    other = sha256((wedding.storage / "ab/3.png").read_bytes())
    paths = (f"{local(made['url'])}/{other}", f"/s/{'x' * 22}/{other}", f"/s/{'x' * 22}")
    assert [wedding.get(path).status for path in paths] == [404] * 3
    assert wedding.get("/list").status == 401
    page = wedding.get(local(made["url"]), accept="text/html")
    text = page.body.decode()
    assert "<h1>Our &lt;b&gt;wedding" in text and "<i>" not in text
    assert text.count("<a href=") == 3
    assert "script" not in text and "default-src 'none'" in page.headers["Content-Security-Policy"]
    late = png_of(900)
    fill(wedding.storage, {"a/late.png": late})
    wedding.rescan()
    assert len(shared(wedding, made)) == 4


def test_a_link_s_thumbnails_are_shown(wedding, pillow):
    files = shared(wedding, share(wedding, kind="folder", target="a"))
    assert len(files) >= 3
    for file in files:
        thumbnail = wedding.get(local(file["thumbnail"]))
        assert thumbnail.body.startswith(b"\x89PNG")
        assert thumbnail.headers["Cache-Control"] == "private, no-cache"


def test_links_are_listed_ended_and_end_by_themselves(wedding):
    made = share(wedding, kind="folder", target="a")
    assert abs(seconds_of(made["expires_at"]) - time.time() - 30 * 86400) < DEADLINE
    assert share(wedding, kind="folder", target="a", expires_in=0)["expires_at"] is None
    short = share(wedding, kind="folder", target="a", expires_in=1)
    listed = wedding.call("GET", "/shares", headers=OWNER)[1]
    assert made in listed
    path = local(shared(wedding, made)[0]["url"])
    assert wedding.get(path).status == 200
    assert wedding.call("DELETE", f"/shares/{made['id']}", headers=bearer())[0] == 404
    assert wedding.call("DELETE", f"/shares/{made['id']}", headers=OWNER)[0] == 204
    assert wedding.call("DELETE", f"/shares/{made['id']}", headers=OWNER)[0] == 404
    assert (wedding.get(path).status, shared(wedding, made)) == (404, 404)
    wait_until(lambda: shared(wedding, short) == 404, "the end of a link")
    values = {"kind": "folder", "target": "a"}
    asked = [wedding.call("POST", "/shares", values, who)[0] for who in ({}, bearer())]
    assert asked == [401, 403]
    assert made not in wedding.call("GET", "/shares", headers=bearer())[1]


@pytest.mark.parametrize(("permission", "status"), [("read", 403), ("write", 200)])
def test_a_token_of_no_account_sees_the_owner_s_links_only_if_it_may_write(
    start, tmp_path, permission, status
):
    running = start(public_key_path=write_pem(tmp_path / "key.pem"))
    running.upload(content := png())
    made = share(running, kind="file", target=sha256(content))
    claims = {"exp": time.time() + 60, "permissions": [f"media_store_{permission}"]}
    headers = {"Authorization": f"Bearer {es256(claims)}"}
    assert running.call("GET", "/shares", headers=headers)[0] == status
    ended = running.call("DELETE", f"/shares/{made['id']}", headers=headers)[0]
    assert ended == (204 if status == 200 else 403)
    assert len(running.call("GET", "/shares", headers=OWNER)[1]) == (status != 200)


def test_a_link_to_more_than_it_lists_says_so(start):
    running = start(constants={"MAX_SHARED": 2})
    fill(running.storage, {f"a/{name}.png": png() for name in "123"})
    running.rescan()
    made = share(running, kind="folder", target="a")
    listed = running.get(local(made["url"])).json
    assert (len(listed["files"]), listed["has_more"], listed["left_out"]) == (2, True, 0)
    page = running.get(local(made["url"]), accept="text/html").body.decode()
    assert "these are the first 2." in page and page.count("<li>") == 2


@pytest.mark.parametrize("strip", [False, True])
def test_a_file_of_a_link_is_found_behind_more_than_it_lists(start, strip):
    running = start(constants={"MAX_SHARED": 1})
    fill(running.storage, {"a/2.png": png()})
    running.rescan()
    made = share(running, kind="folder", target="a", strip=strip)
    path = local(shared(running, made)[0]["url"])
    fill(running.storage, {"a/1.png": png()})
    running.rescan()
    assert (running.get(path).status, len(shared(running, made))) == (200, 1)


@pytest.mark.parametrize("filename", ["..", " ", "a/", "a\\ "])
def test_what_is_uploaded_under_no_name_is_named_file(server, filename):
    user = User(server)
    status, record = user.upload(png(), filename)
    assert (status, record["storage_path"].rpartition("/")[2]) == (201, "file")
    shelf = user.call("POST", SHELVES, {"name": "s"})[1]["id"]
    link = share(server, user.headers, kind="collection", target=shelf, upload=True)
    path = f"{local(link['url'])}/upload"
    added = server.send_file("POST", path, png(), filename, {})
    assert (added.status, added.json["name"][:4]) == (201, "file")


def test_an_ended_link_is_not_answered_from_memory(server):
    server.upload(content := png_of(700))
    made = share(server, kind="file", target=sha256(content))
    path = local(shared(server, made)[0]["url"])
    assert [server.get(path).status for _ in range(3)] == [200] * 3
    server.call("DELETE", f"/shares/{made['id']}", headers=OWNER)
    assert server.get(path).status == 404


def test_a_link_s_password_is_asked_for_at_every_file(wedding):
    made = share(wedding, kind="folder", target="a", password="guests")
    assert (made["has_password"], "guests" in str(made)) == (True, False)
    with wedding.index() as db:
        (kept,) = db.execute("SELECT password FROM share WHERE id = ?", (made["id"],)).fetchone()
    assert ms.verify_password("guests", kept) and kept.startswith("scrypt$")
    path, content = local(made["url"]), (wedding.storage / "a/1.png").read_bytes()
    file = f"{path}/{sha256(content)}"
    form_page = wedding.get(path, accept="text/html")
    assert (form_page.status, b'type="password"' in form_page.body) == (401, True)
    assert b"1.png" not in form_page.body
    cookies = ({}, {"cookie": "mediaserver_share=9999999999.AAAA"})
    wanted = itertools.product((path, file, f"{file}?thumbnail=true"), cookies)
    assert [wedding.get(each, **cookie).status for each, cookie in wanted] == [401] * 6

    def unlock(password: str, path: str = path, **fields: str) -> Answer:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        headers |= {name.replace("_", "-"): value for name, value in fields.items()}
        return wedding.request("POST", path, urlencode({"password": password}), headers)

    assert unlock("guest").status == 401
    again = unlock("guest", accept="text/html", accept_language="de")
    assert again.status == 401 and 'type="password"' in again.body.decode()
    assert "Das ist nicht das Passwort." in again.body.decode()
    answer = unlock("guests")
    cookie = answer.headers["Set-Cookie"]
    assert (answer.status, answer.headers["Location"]) == (303, path)
    assert f"Path={path}; Max-Age=43200; HttpOnly; SameSite=Lax" in cookie
    cookie = cookie.partition(";")[0]
    assert wedding.get(file, cookie=cookie).body == content
    assert len(shared(wedding, made, cookie=cookie)) >= 3
    german = {"accept": "text/html", "accept-language": "de-AT, en;q=0.9"}
    assert "Passwort" in wedding.get(path, **german).body.decode()
    assert '<html lang="de">' in wedding.get(path, cookie=cookie, **german).body.decode()
    other = share(wedding, kind="folder", target="a", password="guests")
    assert shared(wedding, other, cookie=cookie) == 401, "a cookie opens one link"
    assert "guests" not in wedding.log


def test_who_guesses_a_link_s_password_is_shut_out_and_nobody_else_unless_many_do(server):
    server.upload(content := png())
    made = share(server, kind="file", target=sha256(content), password="guests")

    def unlock(password: str, address: str) -> int:
        headers = {"X-Forwarded-For": address, "Content-Type": "application/x-www-form-urlencoded"}
        body = urlencode({"password": password})
        return server.request("POST", local(made["url"]), body, headers).status

    def fail(key: str, times: int) -> None:
        rows = [(sha256(key.encode()), time.time(), str(n), 1) for n in range(times)]
        with server.index() as db:
            db.executemany("INSERT INTO login_failure VALUES (?, ?, ?, ?)", rows)

    guesser, guest = (f"2001:db8:{next(SERIAL) % 65535 + 1:x}::1" for _ in range(2))
    fail(f"address {guesser.removesuffix('1')}/64", 19)
    fail(f"share {made['id']}", 19)
    assert [unlock("wrong", guesser) for _ in range(2)] == [401, 429]
    assert unlock("guests", guesser) == 429
    assert unlock("guests", guest) == 303
    fail(f"share {made['id']}", 200)
    assert unlock("guests", guest) == 429


def told_picture(kind: str) -> tuple[bytes, bytes]:
    """A picture that says a lot of its making, and its pixels as they are to be seen."""
    image_module = need("PIL.Image")
    noise = random.Random(60).randbytes(60 * 40)
    picture = image_module.frombytes("L", (60, 40), noise).convert("RGB")
    exif = picture.getexif()
    exif[0x010F], exif[0x0112] = "CameraMaker", 6
    gps = exif.get_ifd(0x8825)
    gps[1], gps[2], gps[3], gps[4] = "N", (48.0, 8.0, 0.0), "E", (11.0, 34.0, 0.0)
    out = io.BytesIO()
    more = {"comment": b"a comment"} if kind == "JPEG" else {}
    profile = need("PIL.ImageCms").ImageCmsProfile(need("PIL.ImageCms").createProfile("sRGB"))
    picture.save(out, kind, exif=exif, icc_profile=profile.tobytes(), lossless=True, **more)
    return out.getvalue() + b"a trailer of the maker", seen_pixels(out.getvalue())


def seen_pixels(content: bytes) -> bytes:
    image = need("PIL.Image").open(io.BytesIO(content))
    return bytes(need("PIL.ImageOps").exif_transpose(image).convert("RGB").tobytes())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_link_can_send_pictures_without_what_they_say_of_their_making(server, kind):
    content, pixels = told_picture(kind)
    facts = ms.probe(io.BytesIO(content))
    assert (facts.latitude, facts.make, facts.orientation) == (48 + 8 / 60, "CameraMaker", 6)
    made = server.store(content, f"a.{facts.extension}").json
    whole = share(server, kind="file", target=sha256(content))
    bare = share(server, kind="file", target=sha256(content), strip=True, password="")
    assert server.get(local(shared(server, whole)[0]["url"])).body == content
    answer = server.get(local(shared(server, bare)[0]["url"]))
    assert (answer.status, answer.headers["Content-Type"]) == (200, facts.mime_type)
    assert (answer.headers["Last-Modified"], made["bytes"]) == (None, len(content))
    left = ms.probe(io.BytesIO(answer.body))
    kept = facts._replace(latitude=None, longitude=None, make=None)
    assert left == kept
    assert seen_pixels(answer.body) == pixels
    assert need("PIL.Image").open(io.BytesIO(answer.body)).info["icc_profile"]
    words = (b"CameraMaker", b"a comment", b"a trailer")
    assert [word for word in words if word in answer.body] == []
    path = local(shared(server, bare)[0]["url"])
    part = server.get(path, Range="bytes=5-24")
    assert (part.status, part.body) == (206, answer.body[5:25])


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_that_leaves_something_out_tells_no_hash_and_no_size_of_what_it_left(start, kind):
    running, content = start(), told_picture("JPEG")[0]
    fill(running.storage, {"a/1.jpg": content, "a/2.png": png()})
    running.rescan()
    target = {"file": sha256(content), "folder": "a"}[kind]
    made = share(running, kind=kind, target=target, strip=True)
    listed = running.get(local(made["url"]))
    sent = running.get(local((file := listed.json["files"][0])["url"]))
    assert (sent.status, file["size"]) == (200, None)
    assert len(sent.body) < len(content)
    said = [listed.body.decode(), *sent.headers.values()]
    said.append(running.get(local(made["url"]), accept="text/html").body.decode())
    assert not [text for text in said if sha256(content) in text or str(len(content)) in text]
    assert running.get(local(file["thumbnail"])).body.startswith(b"\x89PNG")
    assert running.get(f"{local(made['url'])}/{sha256(content)}").status == 404
    other = share(running, kind=kind, target=target, strip=True)
    assert shared(running, other)[0]["url"].rpartition("/")[2] not in file["url"]


def sent_by_a_link(content: bytes) -> bytes:
    """What is sent of a file without what it says of its making."""
    file = io.BytesIO(content)
    patches, size = ms.find_patches(file, len(content), ms.probe(file))
    sent = bytearray(content[:size])
    for patch in patches:
        sent[patch.start : patch.end] = b"".join(patch.cut(patch.start, patch.end))
    return bytes(sent)


def test_a_stripped_jpeg_has_no_thumbnail_and_no_segment_but_for_its_colours():
    image_module, out = need("PIL.Image"), io.BytesIO()
    image_module.effect_noise((60, 40), 50).convert("CMYK").save(out, "JPEG")  # with Adobe's
    content, jfif = out.getvalue(), b"JFIF\0\1\2\1\0H\0H"
    said = jpeg_segment(0xE0, jfif + b"\3\1SECRET..." + b"SECRET")
    said += jpeg_segment(0xE0, b"JFXX\0\x10SECRET") + jpeg_segment(0xFE, b"SECRET")
    said += b"".join(jpeg_segment(marker, b"SECRET" * 9) for marker in range(0xE1, 0xF0))
    told = content[:2] + said + content[2:]
    sent = sent_by_a_link(told + b"SECRET")
    assert b"SECRET" not in sent and b"Adobe" in sent
    assert sent[6:].startswith(jfif + bytes(2))
    assert seen_pixels(sent) == seen_pixels(content)


def test_a_stripped_animation_s_frames_say_nothing():
    image_module, out = need("PIL.Image"), io.BytesIO()
    frames = [image_module.effect_noise((31, 17), 50 + n).convert("RGB") for n in range(3)]
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], duration=[50, 60, 70])
    content, more = out.getvalue(), b"EXIF" + struct.pack("<I", 7) + b"SECRET.\0"
    told, at = bytearray(content[:12]), 12
    while at < len(content):
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        chunk = content[at : at + 8 + size + size % 2]
        if chunk.startswith(b"ANMF"):
            chunk = chunk[:4] + struct.pack("<I", size + len(more)) + chunk[8:] + more
        told += chunk
        at += 8 + size + size % 2
    told[4:8] = struct.pack("<I", len(told) - 8)
    assert told.count(b"SECRET") == 3
    sent = sent_by_a_link(bytes(told) + b"SECRET")
    assert b"SECRET" not in sent
    shown = [image_module.open(io.BytesIO(each)) for each in (content, sent)]
    for number in range(3):
        for image in shown:
            image.seek(number)
        assert shown[0].convert("RGB").tobytes() == shown[1].convert("RGB").tobytes()
        assert shown[0].info["duration"] == shown[1].info["duration"]


def test_a_webp_whose_frames_hold_frames_for_ever_is_patched_all_the_same():
    chunks = b""
    for _ in range(3000):
        chunks = b"ANMF" + struct.pack("<I", len(chunks) + 16) + bytes(16) + chunks
    sent = sent_by_a_link(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks)
    assert sent.count(b"ANMF") == 1


def test_a_webp_of_endless_chunks_is_refused_soon():
    data = b"RIFF" + struct.pack("<I", 4 + 8 * 10**6) + b"WEBP" + (b"JUNK" + bytes(4)) * 10**6
    start, facts = time.thread_time(), ms.Facts("image", "image/webp", "webp")
    with pytest.raises(ValueError, match="a broken file"):
        ms.find_patches(io.BytesIO(data), len(data), facts)
    assert time.thread_time() - start < 2


def table(kind: bytes, *numbers: int) -> bytes:
    return box(kind, full(0), struct.pack(f">{len(numbers)}I", *numbers))


def told_video(shown: bool = True) -> bytes:
    """A video with a track of positions between picture and audio; `shown`: or as it is sent."""
    hide = (lambda data: data) if shown else (lambda data: bytes(len(data)))
    kept = (lambda kind: kind) if shown else (lambda kind: b"free")
    secret, noted = hide(b"SECRET "), kept(b"udta")

    def track(
        handler: bytes, entry: bytes, sizes: tuple[int, ...], chunks: tuple[int, ...]
    ) -> bytes:
        tables = box(
            b"stbl", box(b"stsd", full(0), struct.pack(">I", 1), entry), table(b"stsz", *sizes),
            table(b"stsc", 2, 1, 2, 1, 2, 1, 1), table(b"stco", len(chunks), *chunks),
        )  # fmt: skip
        handler_box = box(b"hdlr", full(0), bytes(4), handler, hide(b"SECRETMAKER.") + secret)
        media = box(b"mdia", table(b"mdhd", *times, 9), handler_box, box(b"minf", tables))
        return box(b"tkhd", full(0), *[struct.pack(">I", n) for n in times]) + media + note

    times = (12345, 12346) if shown else (0, 0)
    note = box(noted, hide(b"SECRET"))
    picture = box(b"avc1", bytes(12), hide(b"GoPr"), bytes(26), hide(b"SECRET".ljust(32)), b"more")
    # Two channels of two bytes each, though the table says that a sample has one.
    audio = box(b"sowt", bytes(8), bytes(4), hide(b"GoPr"), struct.pack(">HH", 2, 16), bytes(8))
    places = struct.pack(">II", 0, 0)
    start = box(b"ftyp", b"qt  ", bytes(4), b"qt  ") + box(kept(b"free"), hide(b"SECRET"))
    # before, picture (2 samples), position, audio (2 of 4 bytes), picture, position, audio, after
    data = [secret, b"PICTURE1", secret, b"AUDIO1 .", b"PICTURE2", secret, b"AUDI", secret]
    at = list(itertools.accumulate((len(each) for each in data), initial=len(start) + 8))
    gps = track(b"meta", box(b"gpmd", places), (0, 3, 3, 4, 7), (at[2], at[5]))
    movie = box(
        b"moov", table(b"mvhd", *times, 600),
        box(b"trak", track(b"vide", picture, (0, 3, 4, 4, 8), (at[1], at[4]))),
        box(b"trak", gps) if shown else box(b"free", bytes(len(gps))),
        box(b"trak", track(b"soun", audio, (1, 3), (at[3], at[6]))),
        note, box(kept(b"meta"), hide(quicktime())),
    )  # fmt: skip
    mark = box(kept(b"uuid"), hide(b"SECRET OF A MAKER")) + hide(b"SEC")
    return start + box(b"mdat", *data) + movie + mark


def test_a_video_is_sent_in_ranges_without_what_it_says_of_its_making(server):
    video, bare = told_video(), told_video(shown=False)
    fill(server.storage, {"told/a.mov": video})
    server.rescan()
    made = share(server, kind="folder", target="told", strip=True)
    path = local(shared(server, made)[0]["url"])
    answer = server.get(path)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "video/quicktime")
    assert answer.headers["ETag"] != f'"{sha256(video)}"'
    assert (answer.body, b"SECRET" in answer.body) == (bare, False)
    ranges = [(0, 40), (39, 39), (50, 80), (200, len(bare) - 1), (0, len(bare) - 1)]
    answers = [server.get(path, Range=f"bytes={first}-{last}") for first, last in ranges]
    assert [(part.status, part.body) for part in answers] == [
        (206, bare[first : last + 1]) for first, last in ranges
    ]
    parts = server.get(path, Range="bytes=5-60,300-500")
    assert bare[5:61] in parts.body and bare[300:501] in parts.body
    assert server.get(path, Range="bytes=0-9", If_Range=answer.headers["ETag"]).status == 206


def test_a_crafted_file_is_refused_or_patched_within_its_bounds():
    chance, refused = random.Random(17), 0
    pictures = [told_picture(kind)[0] for kind in ("JPEG", "PNG", "WEBP")]
    for sample in (told_video(), heif(), quicktime(), *pictures):
        facts = ms.probe(io.BytesIO(sample))
        for _ in range(300):
            data, at = bytearray(sample), chance.randrange(len(sample))
            data[at : at + 4] = chance.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\1\0\0", b""))
            try:
                patches, end = ms.find_patches(io.BytesIO(data), len(data), facts)
            except ValueError:
                refused += 1
                continue
            ends = [0, *(patch.end for patch in patches)]
            for patch, before in zip(patches, ends, strict=False):
                assert before <= patch.start < patch.end <= end <= len(data)
                assert sum(map(len, patch.cut(patch.start, patch.end))) == patch.end - patch.start
    assert 0 < refused < 1800


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_that_lost_its_last_bytes_is_not_sent_as_one_without_its_making(kind):
    content = told_picture(kind)[0].removesuffix(b"a trailer of the maker")
    facts = ms.probe(io.BytesIO(content))
    assert ms.find_patches(io.BytesIO(content), len(content), facts)[1] == len(content)
    for lost in range(1, 9):
        with pytest.raises(ValueError, match=r"broken|cut short"):
            ms.find_patches(io.BytesIO(content[:-lost]), len(content) - lost, facts)


@pytest.mark.parametrize(
    "runs", [[1], [1, 3001] * 900, [1, 1, 2], [2, 1], [0, 1], [1, 3002]], ids=lambda _: ""
)
def test_a_video_that_lists_its_chunks_again_and_again_is_refused_at_once(runs):
    count = struct.pack(">I", 3000)
    tables = box(
        b"stbl", box(b"stsd", bytes(8)), box(b"stco", bytes(4), count, bytes(4 * 3000)),
        box(b"stsz", bytes(4), struct.pack(">II", 1, 3000)),
        box(b"stsc", bytes(4), struct.pack(">I", len(runs)), *(
            struct.pack(">III", first, 1, 1) for first in runs)),
    )  # fmt: skip
    media = box(b"mdia", box(b"hdlr", bytes(8), b"vide", bytes(12)), box(b"minf", tables))
    data = box(b"ftyp", b"qt  ", bytes(4)) + box(b"moov", box(b"trak", media))
    start = time.thread_time()
    broken = pytest.raises(ValueError, match="a broken file")
    with broken if len(runs) > 1 else contextlib.nullcontext():
        ms.find_patches(io.BytesIO(data), len(data), ms.Facts("video", "", "mov"))
    assert time.thread_time() - start < 0.3


@pytest.mark.parametrize(
    "name", ["a.mov", "a.mp4", "fragments.mp4", "a.heic", "a.jpg", "a.png", "a.webp"]
)
def test_exiftool_finds_nothing_in_what_a_link_sends(server, tmp_path, name):
    exiftool, path = need("exiftool"), tmp_path / name
    is_image = name.endswith((".heic", ".jpg", ".png", ".webp"))
    if is_image:
        need("pillow_heif").register_heif_opener()
        need("PIL.Image").effect_noise((64, 48), 50).convert("RGB").save(path)
    else:
        ffmpeg = [need("ffmpeg"), "-v", "error", "-f", "lavfi", "-i", "testsrc2=d=1:s=64x64:r=5"]
        ffmpeg += ["-f", "lavfi", "-i", "sine=d=1", "-metadata", "location=+48.1333+011.5667/"]
        ffmpeg += ["-metadata", "comment=SECRET", *{
            "a.mov": ["-c:a", "pcm_s16le", "-timecode", "10:00:00:00"],
            "fragments.mp4": ["-movflags", "frag_keyframe+empty_moov"],
        }.get(name, [])]  # fmt: skip
        subprocess.run([*ffmpeg, path], check=True)
    told = ["-Make=SECRET", "-Model=SECRET", "-GPSLatitude=48.1", "-GPSLongitude=11.5"]
    told += ["-GPSLatitudeRef=N", "-GPSLongitudeRef=E", "-XMP:Creator=SECRET", "-CreateDate=now"]
    if name != "fragments.mp4":  # those it does not write
        subprocess.run([exiftool, "-q", "-overwrite_original", *told, path], check=True)
    fill(server.storage, {f"exiftool-{name}/{name}": path.read_bytes()})
    server.rescan()
    made = share(server, kind="folder", target=f"exiftool-{name}", strip=True)
    sent = server.get(local(shared(server, made)[0]["url"])).body
    (tmp_path / "sent").write_bytes(sent)
    assert len(sent) == path.stat().st_size
    look = [exiftool, "-a", "-u", "-ee", "-s", "-G1"]
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
    said = [run([*look, each], cwd=tmp_path).stdout for each in (name, "sent")]
    words = ("SECRET", "GPS", "XMP-dc", "[Keys]", "[UserData]")
    assert [word for word in words if word in said[1]] == []
    assert "GPS" in said[0] and "SECRET" in said[0]
    if is_image:
        shown = [seen_pixels(each) for each in (path.read_bytes(), sent)]
    else:
        show = [need("ffmpeg"), "-v", "error", "-i"]
        every = ["-map", "0:v", "-map", "0:a", "-f", "md5", "-"]
        shown = [subprocess.run([*show, each, *every], capture_output=True, check=True)
                 for each in (path, tmp_path / "sent")]  # fmt: skip
        shown = [(each.stdout, each.stderr) for each in shown]
    assert shown[0] == shown[1]


def test_what_cannot_be_sent_without_its_metadata_is_shown_as_a_preview_or_not_at_all(
    start, pillow
):
    running, image_module = start(), need("PIL.Image")
    out, audio = io.BytesIO(), b"RIFF" + (36).to_bytes(4, "little") + b"WAVEfmt " + bytes(24)
    image_module.effect_noise((60, 40), 50).convert("RGB").save(out, "TIFF", description="SECRET")
    cut = told_picture("JPEG")[0][:-60]  # its end is missing
    files = {"a.tiff": out.getvalue(), "b.wav": audio, "c.jpg": cut, "d.mp4": fragmented()}
    fill(running.storage / "f", files)
    running.rescan()
    made = share(running, kind="folder", target="f", strip=True)
    *files, split = shared(running, made)
    assert [file["name"] for file in files] == ["a.tiff", "c.jpg"]
    assert (split["name"], running.get(local(split["url"])).status) == ("d.mp4", 404)
    answers = [running.get(local(file["url"])) for file in files]
    assert [(answer.status, answer.headers["Content-Type"]) for answer in answers] == [
        (200, "image/jpeg")] * 2  # fmt: skip
    sent = b"".join(answer.body for answer in answers)
    assert b"SECRET" not in sent and b"CameraMaker" not in sent
    assert running.get(f"{local(made['url'])}/{sha256(audio)}").status == 404
    assert running.get(local(made["url"])).json["left_out"] == 1
    page = running.get(local(made["url"]), accept="text/html").body
    assert b"1 files of other types are left out" in page
    values = {"kind": "file", "target": sha256(audio)}
    assert running.call("POST", "/shares", {**values, "strip": True}, OWNER)[0] == 400
    assert running.call("POST", "/shares", values, OWNER)[0] == 201


def test_guests_may_add_pictures_to_a_folder_whose_link_says_so(start):
    running = start(max_upload_bytes="5000", read_auth_enabled="true")
    fill(running.storage, {"wedding/1.png": png()})
    running.rescan()
    made = share(running, kind="folder", target="wedding", upload=True, password="guests")
    closed = share(running, kind="folder", target="wedding")
    path = local(made["url"])

    def add(path: str, content: bytes, name: str = "1.png", **headers: str) -> Answer:
        fields = {key.replace("_", "-"): value for key, value in headers.items()}
        return running.send_file("POST", f"{path}/upload", content, name, fields)

    assert add(path, png()).status == 401
    body = urlencode({"password": "guests"})
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    cookie = running.request("POST", path, body, headers).headers["Set-Cookie"].partition(";")[0]
    content = png()
    answer = add(path, content, cookie=cookie)
    assert (answer.status, answer.json["name"]) == (201, "1_1.png")
    assert (running.storage / "wedding/1_1.png").read_bytes() == content
    assert running.get(local(answer.json["url"]), cookie=cookie).body == content
    assert add(path, jpeg(), "../../x", cookie=cookie).json["name"] == "x.jpg"
    back = add(path, png(), cookie=cookie, accept="text/html")
    assert (back.status, back.headers["Location"]) == (303, path)
    page = running.get(path, cookie=cookie, accept="text/html").body.decode()
    assert f'action="{path}/upload"' in page and page.count("<a href=") == 4
    assert add(path, b"no picture", cookie=cookie).status == 400
    assert add(path, png_of(5001), cookie=cookie).status == 413
    assert add(local(closed["url"]), png()).status == 403
    assert "<form" not in running.get(local(closed["url"]), accept="text/html").body.decode()
    running.rescan()
    assert len(shared(running, made, cookie=cookie)) == 4


@pytest.mark.parametrize("kind", ["collection", "entity"])
def test_guests_may_add_pictures_to_a_collection_or_an_entity_that_is_one(start, kind):
    running = start(user_quota_bytes="5000", read_auth_enabled="true")
    jane = User(running)
    if kind == "collection":
        who, target = jane.headers, jane.call("POST", SHELVES, {"name": "s"})[1]["id"]
        other = jane.call("POST", MEDIA, {"name": "n", "type": "image", "size": 1})[1]["id"]
        values = {"kind": "media", "target": other}
    else:
        who, target = OWNER, Entities(running).collection()["id"]
        other = Entities(running).create(png())["id"]
        values = {"kind": "entity", "target": other}
    assert running.call("POST", "/shares", {**values, "upload": True}, who)[0] == 400
    made = share(running, who, kind=kind, target=target, upload=True)
    path = f"{local(made['url'])}/upload"
    content = png(padding=2000)
    added = running.send_file("POST", path, content, "x.png", {})
    assert added.status == 201, added.body
    assert running.get(local(added.json["url"])).body == content
    assert [file["size"] for file in shared(running, made)] == [len(content)]
    again = running.send_file("POST", path, content, "x.png", {})
    if kind == "collection":
        found = jane.call("GET", f"{SHELVES}{target}/")[1]["media"]
        assert [record["name"] for record in found] == ["x.png", "x.png"]
        assert again.status == 201
        assert running.send_file("POST", path, png_of(4000), "y.png", {}).status == 413
        assert jane.call("DELETE", f"{SHELVES}{target}/")[0] == 204
    else:
        entity = Entities(running).get(f"?filter_param=parent_id={target}")["items"][0]
        assert (entity["label"], entity["md5"]) == ("x.png", md5(content))
        assert (again.status, again.json) == (409, {"detail": "This picture is here already."})
        assert running.call("PATCH", f"/entity/{target}", {"is_deleted": True}, OWNER)[0] == 200
    assert running.send_file("POST", path, png(), "z.png", {}).status == 404


def test_every_kind_of_thing_is_shared_by_who_may(start):
    running = start()
    content, private, owned = png_of(601), png_of(602), png_of(603)
    running.upload(content)
    running.store(private)
    mine, other = bearer(user_id=77), bearer(user_id=78)

    def ask(headers: Mapping[str, str], **values: Any) -> int:
        return running.call("POST", "/shares", values, headers)[0]

    for target, headers in ((content, OWNER), (private, OWNER), (content, WRITER)):
        made = share(running, headers, kind="file", target=sha256(target))
        assert running.get(f"{local(made['url'])}/{sha256(target)}").body == target
    assert [
        ask(headers, kind="file", target=sha256(target))
        for headers, target in ((WRITER, private), (mine, content), (OWNER, png_of(9999)))
    ] == [404, 403, 404]
    record = running.send_file("POST", MEDIA, owned, headers=mine, name="a.png").json
    shelf = running.call("POST", SHELVES, {"name": "s"}, mine)[1]
    of_record = share(running, mine, kind="media", target=record["id"])
    of_shelf = share(running, mine, kind="collection", target=shelf["id"])
    assert [file["name"] for file in shared(running, of_record)] == ["a.png"]
    assert shared(running, of_shelf) == []
    running.call("PATCH", f"{MEDIA}{record['id']}/", {"collection": shelf["id"]}, mine)
    assert len(shared(running, of_shelf)) == 1
    for kind, thing in (("media", record), ("collection", shelf)):
        asked = [ask(who, kind=kind, target=thing["id"]) for who in (other, OWNER)]
        assert asked == [404, 403], kind
    running.call("DELETE", f"{MEDIA}{record['id']}/", headers=mine)
    assert (shared(running, of_record), shared(running, of_shelf)) == (404, [])
    assert [each["id"] for each in running.call("GET", "/shares", headers=mine)[1]] == [
        of_shelf["id"], of_record["id"],
    ]  # fmt: skip
    group = Entities(running).collection()
    Entities(running).create(png_of(604), parent_id=group["id"])
    of_group = share(running, kind="entity", target=group["id"])
    assert [file["size"] for file in shared(running, of_group)] == [604]


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({}, 400), ({"kind": "x", "target": "y"}, 400), ({"kind": "file", "target": "y"}, 400),
        ({"kind": "entity", "target": "y"}, 400),
        ({"kind": "folder", "target": "a", "expires_in": -1}, 400),
        *(({"kind": "folder", "target": target}, 404)
          for target in ("nowhere", "/", ".mediaserver", "../pictures", "media/..")),
    ],
)  # fmt: skip
def test_what_is_nothing_that_can_be_shared_is_refused(server, values, status):
    server.upload(png())  # so that there is a folder "media"
    assert server.call("POST", "/shares", values, OWNER)[0] == status


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with closed reads, in one process."""
    storage = tmp_path_factory.mktemp("closed") / "pictures"
    with Server(storage, "--workers", "1", READ_AUTH_ENABLED="true") as running:
        running.scanned()
        yield running


def member(server: Server) -> tuple[User, dict[str, str], Any]:
    """An account that may read and write, with its login's headers and tokens."""
    user = User(server)
    run_here("user", "grant", user.name, ms.READ_PERMISSION, ms.WRITE_PERMISSION,
             "--storage_dir", server.storage)  # fmt: skip
    tokens = user.login()[1]
    return user, {"Authorization": f"Bearer {tokens['access']}"}, tokens


def shareable(server: Server, headers: Mapping[str, str], kind: str) -> tuple[str, str]:
    """Something of a kind that has a picture: its target, and where that lies in the library."""
    content, place = png(), f"shared {unique().decode()}"
    if kind == "folder":
        fill(server.storage, {f"{place}/1.png": content})
        server.rescan()
        return place, place
    if kind == "file":
        return sha256(content), server.upload(content).json["filename"]
    if kind == "entity":
        group = Entities(server).collection()["id"]
        Entities(server).create(content, parent_id=group)
        return str(group), ""
    shelf = server.call("POST", SHELVES, {"name": place}, headers)[1]["id"]
    texts = {"collection": shelf} if kind == "collection" else {}
    record = server.send_file("POST", MEDIA, content, headers=headers, name="a", **texts).json
    return (shelf if kind == "collection" else record["id"]), ""


@pytest.mark.parametrize("lost", ["write", "read", "account"])
@pytest.mark.parametrize("kind", ms.SHARE_KINDS)
def test_a_link_gives_no_more_than_its_maker_may_still_read(closed, kind, lost):
    user, headers, _ = member(closed)
    made = share(closed, headers, kind=kind, target=shareable(closed, headers, kind)[0])
    path = local(shared(closed, made)[0]["url"])
    permission = f"media_store_{lost}"
    command = ("disable", user.name) if lost == "account" else ("revoke", user.name, permission)
    run_here("user", *command, "--storage_dir", closed.storage)
    is_own = kind in {"media", "collection"} and lost != "account"
    wanted = (200, 200) if is_own else (404, 404)
    assert (closed.get(local(made["url"])).status, closed.get(path).status) == wanted


@pytest.mark.parametrize("change", ["disable", "revoke", "passwd"])
def test_a_link_ends_with_its_maker_s_account_and_rests_while_he_may_not_read(closed, change):
    """So it does with what a record's URL is signed for: a disabled account's is over."""
    user, headers, _ = member(closed)
    made = share(closed, headers, kind="file", target=shareable(closed, headers, "file")[0])
    record = closed.send_file("POST", MEDIA, png(), headers=headers, name="a").json
    signed = local(record["file"])
    permissions = (ms.READ_PERMISSION, ms.WRITE_PERMISSION)
    before, after = {
        "disable": (("disable",), ("enable",)), "passwd": (("passwd",), ("passwd",)),
        "revoke": (("revoke", *permissions), ("grant", *permissions)),
    }[change]  # fmt: skip

    def found(command: tuple[str, ...]) -> tuple[int, int]:
        word, *rest = command
        assert owner_says(closed, "user", word, user.name, *rest, stdin="x" * 9).returncode == 0
        opened = closed.get(local(made["url"])).status
        return opened, closed.get(signed).status

    assert found(before) == {"disable": (404, 401), "revoke": (404, 200)}.get(change, (200, 200))
    assert found(after) == ((404, 401) if change == "disable" else (200, 200))
    listed = closed.call("GET", "/shares", headers=OWNER)[1]
    assert (made["id"] in [each["id"] for each in listed]) == (change != "disable")


def test_a_collection_s_link_shows_pictures_of_others_as_long_as_its_maker_may_read_them(closed):
    user, headers, _ = member(closed)
    shelf = shareable(closed, headers, "collection")[0]
    contents = [png(), png()]
    closed.upload(contents[0])
    entity = Entities(closed).create(contents[1])["id"]
    values = {"sha256": list(map(sha256, contents))}
    assert closed.call("POST", f"{SHELVES}{shelf}/add", values, headers)[0] == 204
    made = share(closed, headers, kind="collection", target=shelf)
    assert len(shared(closed, made)) == 3
    Entities(closed).patch(entity, is_deleted=True)
    assert len(shared(closed, made)) == 2
    run_here("user", "revoke", user.name, ms.READ_PERMISSION, "--storage_dir", closed.storage)
    (own,) = shared(closed, made)
    assert local(own["url"]).rpartition("/")[2] not in values["sha256"]


@pytest.mark.parametrize("kind", ms.SHARE_KINDS)
def test_a_link_to_what_is_deleted_shows_and_takes_nothing(closed, kind):
    _, headers, _ = member(closed)
    target, place = shareable(closed, headers, kind)
    upload = kind in {"folder", "collection", "entity"}
    made = share(closed, headers, kind=kind, target=target, upload=upload)
    path = local(shared(closed, made)[0]["url"])
    if kind == "folder":
        shutil.rmtree(closed.storage / place)
    elif kind == "file":
        (closed.storage / "media" / place).unlink()
    elif kind == "entity":
        Entities(closed).patch(int(target), is_deleted=True)
    else:
        base = SHELVES if kind == "collection" else MEDIA
        assert closed.call("DELETE", f"{base}{target}/", headers=headers)[0] == 204
    assert shared(closed, made) == closed.get(path).status == 404
    before = files_below(closed.storage)
    sent = closed.send_file("POST", f"{local(made['url'])}/upload", png(), "x.png", {})
    assert sent.status == 404
    assert files_below(closed.storage) <= before
    assert closed.call("POST", "/shares", {"kind": kind, "target": target}, headers)[0] == 404


def test_a_link_of_demo_mode_ends_with_it(start):
    running = start(auth_disabled="true")
    running.upload(content := png())
    made = share(running, {}, kind="file", target=sha256(content))
    assert len(shared(running, made)) == 1
    running.stop()
    assert shared(start(), made) == 404


# -- object storage ----------------------------------------------------------------------


def store_everywhere(server: Server, content: bytes) -> tuple[dict[str, dict[str, str]], Any]:
    """Send a picture to each private family; the paths to GET with their headers, and the user."""
    name = server.store(content, "a.png").json["stored_as"]
    user = User(server)
    status, record = user.upload(content)
    assert status == 201, record
    item = Entities(server).create(content)["id"]
    return {
        f"/image/{name}": OWNER,
        local(record["file"]): {},
        f"/entity/{item}/file": OWNER,
    }, (user, record["id"], item)


@pytest.fixture
def stored(start, store) -> Iterator[tuple[Server, ObjectStore]]:
    """A server whose private files are all in an empty bucket.

    It is one process: after a kill no worker goes on, and a circuit is the one that is asked.
    """
    quick = {"S3_OPEN_SECONDS": 0.5}
    yield start("--workers", "1", constants=quick, **store.environment), store


def verify_stored(server: Server, store: ObjectStore | Swift) -> Any:
    """What `verify` finds of a server with all private files in a bucket; nothing is wrong."""
    words = ["verify", "--json", "--storage_dir", server.storage]
    ended = run_program(*words, cwd=server.storage.parent, **SECRETS, **store.environment)
    assert ended.returncode == 0, ended.stdout
    return json.loads(ended.stdout)


def test_every_private_family_keeps_its_files_in_a_bucket(stored):
    server, store = stored
    content = png_of(300_000)
    paths, (user, record, item) = store_everywhere(server, content)
    assert len(store.names()) == 3
    assert {name.split("/")[0] for name in store.names()} == {"images", "users", "all"}
    for path, headers in paths.items():
        answer = server.request("GET", path, headers=headers)
        assert (answer.status, answer.body) == (200, content)
        etag = answer.headers["ETag"]
        other = b'{"detail":"What is here is not what the request is about."}'
        assert server.request("HEAD", path, headers=headers).status == 200
        table = [
            ({"Range": "bytes=1000-1999"}, 206, content[1000:2000]),
            ({"Range": "bytes=-5"}, 206, content[-5:]),
            ({"Range": f"bytes={len(content)}-"}, 416, b'{"detail":"No such range."}'),
            ({"If-None-Match": etag}, 304, b""),
            ({"If-Match": '"other"'}, 412, other),
            ({"If-Range": '"other"', "Range": "bytes=0-1"}, 200, content),
        ]
        parts = [server.request("GET", path, headers={**headers, **row[0]}) for row in table]
        assert [(part.status, part.body) for part in parts] == [row[1:] for row in table]
        parts = server.request("GET", path, headers={**headers, "Range": "bytes=0-1,9-10"})
        assert parts.status == 206
        assert content[:2] in parts.body
        assert content[9:11] in parts.body
    assert user.call("DELETE", f"{MEDIA}{record}/")[0] == 204
    assert Entities(server).send("DELETE", str(item))
    wait_until(lambda: len(store.names()) <= 2)
    server.stop()
    assert not [path for path in (server.data / "s3").rglob("*") if path.is_file()]
    assert verify_stored(server, store)["orphaned"] == []


def test_public_uploads_are_in_a_bucket_and_the_rest_of_the_library_is_on_disk(stored, start):
    server, store = stored
    public = f"{store.prefix}public/"
    content = png_of(100_000)
    answer = server.upload(content)
    path = local(answer.json["url"])
    name = answer.json["filename"]
    assert store.names() == {f"public/{name}"}
    assert not (server.storage / "media").exists()
    server.kill()
    again = start("--workers", "1", **store.environment)
    again.scanned()  # in which it is not looked for
    found = again.get(path)
    assert (found.status, found.body) == (200, content)
    assert found.headers["Cache-Control"] == "public, max-age=3600"
    assert again.get(path, Range="bytes=5-9").body == content[5:10]
    assert again.get(f"/image/{sha256(content)}").body == content
    assert again.get("/list").json[sha256(content)]["file_path"] == f"s3://family/{public}{name}"
    assert again.upload(png()).status == 201
    kept = again.put("/image/b.png", beside := png())
    assert kept.status == 201
    again.rescan()
    assert again.get("/media").json["count"] == 2
    assert again.get(f"/image/{sha256(beside)}").body == beside
    assert verify_stored(again, store)["files"] == 3
    assert again.request("DELETE", f"{path}?token={upload_token()}").status == 200
    assert again.get(path).status == 404
    assert len(store.names()) == 1
    assert not left_arriving(again.storage)


def test_the_bucket_of_public_uploads_makes_only_them_503_when_it_is_away(stored):
    once()
    server, store = stored
    path = local(server.upload(png_of(100_000)).json["url"])
    server.put("/image/b.png", beside := png())
    store.stop()
    assert server.get(path).status == 503
    assert server.upload(png()).status == 503
    assert server.get(f"/image/{sha256(beside)}").status == 200
    assert server.put("/image/c.png", png()).status == 201
    words = ["verify", "--json", "--storage_dir", server.storage]
    ended = run_program(*words, cwd=server.storage.parent, **SECRETS, **store.environment)
    assert ended.returncode == 1
    unreadable = json.loads(ended.stdout)["unreadable"]
    assert [each for each in unreadable if f"{store.prefix}public" in each] != []


def test_a_picture_in_a_bucket_has_its_thumbnail(stored, pillow):
    server, _ = stored
    assert server.store(content := png(), "a.png").status == 201
    assert server.get(f"/thumbnail/{sha256(content)}", **OWNER).status == 200
    assert server.upload(public := png()).status == 201
    assert server.get(f"/thumbnail/{sha256(public)}").status == 200


def test_a_file_that_was_changed_in_its_bucket_is_not_served(stored):
    server, store = stored
    paths, _ = store_everywhere(server, png_of(100_000))
    for name in store.names():
        store.put(name, bytes(100_000))
        os.utime(store.folder / store.prefix / name, (1, 1))
    for path, headers in paths.items():
        assert server.request("GET", path, headers=headers).status == 404
        assert server.request("HEAD", path, headers=headers).status == 404


def test_verify_names_what_a_bucket_has_lost_or_changed_and_what_no_index_knows(stored):
    server, store = stored
    names = [server.store(png_of(20_000), f"{n}.png").json["stored_as"] for n in "abc"]
    with contextlib.closing(
        ms.S3Client(store.endpoint, ms.Signer(*S3_KEYS, "us-east-1"))
    ) as other:
        other.call(ms.S3Request("DELETE", "family", f"{store.prefix}images/{names[0]}"))
    rot(store.folder / store.prefix / "images" / names[1])
    store.put("images/other.png", b"theirs")
    words = ["verify", "--json", "--storage_dir", server.storage]
    ended = run_program(*words, cwd=server.storage.parent, **SECRETS, **store.environment)
    told, place = json.loads(ended.stdout), f"s3://family/{store.prefix}images"
    assert ended.returncode == 1
    assert told["missing"] == [f"{place}/{names[0]}"]
    assert told["damaged"] == [f"{place}/{names[1]}"]
    assert f"{place}/other.png" in told["orphaned"] + told["unknown"]


def test_a_bucket_that_is_away_makes_its_own_uploads_and_reads_503_and_nothing_else(stored):
    once()
    server, store = stored
    paths, _ = store_everywhere(server, content := png_of(100_000))
    store.stop()
    for path, headers in paths.items():
        answer = server.request("GET", path, headers=headers)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "60")
    assert server.store(png()).status == 503
    assert server.get("/health").status == 200
    assert server.put("/image/a.png", content).status == 201
    store.start()
    path, headers = next(iter(paths.items()))
    wait_until(lambda: server.request("GET", path, headers=headers).status == 200)
    assert server.store(png()).status == 201


def test_every_upload_that_was_answered_survives_a_kill_and_no_other_stays(stored, start):
    server, store = stored
    answered: list[tuple[str, bytes]] = []

    def send(number: int) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            while len(answered) < 30:
                content = png_of(20_000)
                answer = server.store(content, f"{number}.png")
                answered.append((answer.json["stored_as"], content))

    killer = threading.Thread(
        target=lambda: (wait_until(lambda: len(answered) > 9), server.kill())
    )
    killer.start()
    together(4, send)
    killer.join()
    store.stop()  # so that it is over with what was under way
    store.start()
    again = start(**store.environment)
    for name, content in answered:
        assert again.get(f"/image/{name}", **OWNER).body == content
    assert verify_stored(again, store)["orphaned"] == []
    assert not [path for path in (again.data / "s3").rglob("*") if path.is_file()]


# A node of OpenStack Swift, as one process of Debian's Python; the proxy makes the rings.
SWIFT_NODE = r"""
import os, sys, eventlet
eventlet.monkey_patch()
from eventlet import wsgi
from swift.common.ring import RingBuilder
from swift.common.wsgi import loadapp

home, role, proxy, *ports = sys.argv[1:]
kinds = ("account", "container", "object")
text = f"[DEFAULT]\nswift_dir = {home}\ndevices = {home}\nmount_check = false\n[pipeline:main]\n"
if role == "proxy":
    for kind, *of_kind in zip(kinds, ports[:3], ports[3:]):
        builder = RingBuilder(4, 3, 0)
        first, second = map(int, of_kind)
        for device, (node, port) in enumerate(((1, first), (1, first), (2, second))):
            place = {"ip": "127.0.0.1", "replication_ip": "127.0.0.1", "device": f"disk{device}"}
            numbers = {"port": port, "replication_port": port, "zone": node, "region": 1}
            builder.add_dev({**place, **numbers, "weight": 1, "meta": ""})
        builder.rebalance(seed=1)
        builder.get_ring().save(f"{home}/{kind}.ring.gz")
    text += "pipeline = memcache s3api tempauth slo dlo proxy-server\n"
    text += "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\n"
    for name in ("s3api", "slo", "dlo", "tempauth", "memcache"):
        text += f"[filter:{name}]\nuse = egg:swift#{name}\n"
        text += {
            "memcache": "memcache_servers = 127.0.0.1:1\n",
            "tempauth": f"user_family_{os.environ['KEY_ID']} = {os.environ['KEY']} .admin\n",
        }.get(name, "")
    apps = {proxy: text}
else:
    for device in (0, 1) if role == "node1" else (2,):
        os.mkdir(f"{home}/disk{device}")
    ports = ports[:3] if role == "node1" else ports[3:]
    apps = {
        port: f"{text}pipeline = {kind}\n[app:{kind}]\nuse = egg:swift#{kind}\n"
        for kind, port in zip(kinds, ports)
    }
for port, text in apps.items():
    with open(f"{home}/{port}.conf", "w") as file:
        file.write(text)
    listener = eventlet.listen(("127.0.0.1", int(port)))
    eventlet.spawn(wsgi.server, listener, loadapp(file.name), log_output=False)
eventlet.sleep(600)
"""


class Swift:
    """OpenStack Swift with its S3 interface: a proxy and two storage nodes on loopback."""

    def __init__(self, folder: Path) -> None:
        ports = [free_port() for _ in range(7)]
        words = ["/usr/bin/python3", "-c", SWIFT_NODE, folder]
        keys = {**BARE_ENVIRONMENT, "KEY_ID": S3_KEYS[0], "KEY": S3_KEYS[1]}
        with (folder / "log").open("w") as log:
            self.proxy, self.first, self.second = [
                subprocess.Popen([*words, role, *map(str, ports)], env=keys, stderr=log)
                for role in ("proxy", "node1", "node2")
            ]
        self._ports = ports
        key_id = f"family:{S3_KEYS[0]}"
        self.endpoint = f"http://127.0.0.1:{ports[0]}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint, "UPLOAD_DIR": "s3://family/images",
            "AWS_ACCESS_KEY_ID": key_id, "AWS_SECRET_ACCESS_KEY": S3_KEYS[1],
        }  # fmt: skip
        self._signer = ms.Signer(key_id, S3_KEYS[1], "us-east-1")

    def make_bucket(self) -> None:
        wait_until(lambda: all(map(accepts, self._ports)), "Swift")
        client = ms.S3Client(self.endpoint, self._signer)
        with contextlib.closing(client):
            client.call(ms.S3Request("PUT", "family"))

    def stop(self) -> None:
        for process in (self.proxy, self.first, self.second):
            process.kill()
            process.wait()


@pytest.fixture
def swift(tmp_path) -> Iterator[Swift]:
    once()
    if not os.path.exists("/usr/bin/swift-proxy-server"):
        pytest.skip(
            "needs OpenStack Swift: apt-get install swift-{proxy,account,container,object}"
        )
    (tmp_path / "swift").mkdir()
    made = Swift(tmp_path / "swift")
    try:
        made.make_bucket()
        yield made
    finally:
        made.stop()


def test_uploads_go_on_when_one_of_two_nodes_of_swift_is_killed(start, swift):
    server = start("--workers", "1", **swift.environment)
    answered: list[tuple[str, bytes]] = []

    def send(number: int) -> None:
        while len(answered) < 16:
            content = png_of(20_000)
            answer = server.store(content, f"{number}.png")
            assert answer.status == 201, server.log
            answered.append((answer.json["stored_as"], content))

    killer = threading.Thread(
        target=lambda: (wait_until(lambda: len(answered) > 5), swift.second.kill())
    )
    killer.start()
    together(3, send)
    killer.join()
    assert swift.second.wait() != 0
    assert len(dict(answered)) == len(answered)
    for name, content in answered:
        assert server.get(f"/image/{name}", **OWNER).body == content
    assert verify_stored(server, swift)["orphaned"] == []


def test_reads_of_a_bucket_can_be_redirected_to_it(start, store):
    server = start(**store.environment, S3_REDIRECT="true")
    paths, _ = store_everywhere(server, content := png_of(100_000))
    paths[local(server.upload(content).json["url"])] = {}
    for path, headers in paths.items():
        answer = server.request("GET", path, headers=headers)
        assert answer.status == 307
        scope = "public" if path.startswith(("/entity/", "/media/")) else "private"
        assert answer.headers["Cache-Control"] == f"{scope}, max-age=150"
        url = answer.headers["Location"]
        with urllib.request.urlopen(url) as found:
            assert (found.read(), found.headers["Content-Type"]) == (content, "image/png")
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(url[:-1] + ("0" if url[-1] != "0" else "1"))
        assert server.request("HEAD", path, headers=headers).status == 200


def test_a_bucket_with_another_key_takes_nothing_and_the_log_says_why(start, store):
    server = start(**{**store.environment, "AWS_SECRET_ACCESS_KEY": "wrong"})
    assert server.store(png()).status == 503
    assert f"HEAD s3://family/{store.prefix}images/a.png: 403" in server.log


def run_migrate(server: Server, root: str, to: str, **environment: str) -> str:
    words = ["migrate", root, "--to", to, "--storage_dir", server.storage]
    ended = run_program(*words, cwd=server.storage.parent, **SECRETS, **environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return str(ended.stdout)


def test_a_family_moves_to_a_bucket_and_back_while_the_server_runs(start, store, tmp_path):
    server, keys = start(), store.environment
    names = {"images": "UPLOAD_DIR", "users": "USERS_DIR", "entities": "MEDIA_STORAGE_DIR",
             "media": "MEDIA_DIR"}  # fmt: skip
    places = {name: keys.pop(name) for name in names.values()}
    paths, _ = store_everywhere(server, png_of(100_000))
    paths[local(server.upload(png_of(100_000)).json["url"])] = {}
    for root, name in names.items():
        told = run_migrate(server, root, places[name], **keys)
        assert "1 files of " in told
        assert "stop the server, run this once more" in told
        assert f"start the server with {name}={places[name]}\n" in told
    later = server.store(png_of(50_000), "later.png").json["stored_as"]
    paths[f"/image/{later}"] = OWNER
    server.stop()
    told = run_migrate(server, "images", places["UPLOAD_DIR"], **keys)
    assert "2 files of images, 50000 bytes copied" in told
    assert f"\nstart the server with UPLOAD_DIR={places['UPLOAD_DIR']}\n" in told
    assert len(store.names()) == 5
    shutil.rmtree(server.data / "images")
    shutil.rmtree(server.storage / "media")
    moved = start(**keys, **places)
    asked = [moved.request("GET", path, headers=paths[path]).status for path in paths]
    assert asked == [200] * 5
    moved.stop()
    run_migrate(moved, "images", str(tmp_path / "back"), **keys, **places)
    told = run_migrate(moved, "media", str(moved.storage / "media"), **keys, **places)
    assert "start the server with no MEDIA_DIR" in told
    del places["MEDIA_DIR"]
    back = start(**{**keys, **places, "UPLOAD_DIR": str(tmp_path / "back")})
    back.scanned()
    for path, headers in paths.items():
        answer = back.request("GET", path, headers=headers)
        size = 50_000 if later in path else 100_000
        assert (answer.status, len(answer.body)) == (200, size)


def test_what_is_not_as_it_was_taken_in_is_named_when_it_moves(start, store):
    server, keys = start(), store.environment
    names = [server.store(png_of(20_000), f"{n}.png").json["stored_as"] for n in "ab"]
    rot(server.data / "images" / names[0])
    place = keys.pop("UPLOAD_DIR")
    words = ["migrate", "images", "--to", place, "--json", "--storage_dir", server.storage]
    ended = run_program(*words, cwd=server.storage.parent, **SECRETS, **keys)
    assert ended.returncode == 1
    assert json.loads(ended.stdout)["damaged"] == [str(server.data / "images" / names[0])]
    assert f"images/{names[1]}" in store.names()


def test_a_move_from_bucket_to_bucket_leaves_alone_what_the_server_takes_in(stored):
    server, store = stored
    store_everywhere(server, png_of(100_000))
    arriving = server.data / "s3/images/.incoming" / unique().decode()
    arriving.write_bytes(b"half")
    target = f"s3://family/{unique().decode()}/images"
    assert "1 files of images" in run_migrate(server, "images", target, **store.environment)
    assert arriving.read_bytes() == b"half"
    arriving.unlink()


@pytest.mark.parametrize("family", ["images", "media"])
def test_an_import_into_a_bucket_is_refused_since_no_scan_would_find_it(store, tmp_path, family):
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old/a.png").write_bytes(png())
    words = ["import", tmp_path / "old", "--into", family, "--storage_dir", tmp_path / "new"]
    ended = run_program(*words, cwd=tmp_path, **SECRETS, **store.environment)
    assert ended.returncode == 1
    assert "object store" in ended.stderr
    assert not store.names()


def test_a_backup_of_a_bucket_is_plain_files_and_comes_back_into_a_bucket(stored, tmp_path):
    server, store = stored
    paths, _ = store_everywhere(server, png_of(100_000))
    run = functools.partial(run_program, cwd=tmp_path, **SECRETS)
    made = run(
        "backup", tmp_path / "backups", "--storage_dir", server.storage, **store.environment
    )
    assert made.returncode == 0, made.stderr
    [backup] = (tmp_path / "backups").iterdir()
    assert run("verify", "--storage_dir", backup).returncode == 0
    words = ["restore", backup, "--storage_dir", tmp_path / "again"]
    refused = run(*words, **store.environment)
    assert refused.returncode == 1
    assert "s3://family/" in refused.stderr
    assert "is not empty" in refused.stderr
    store.prefix += "again/"
    assert run(*words, **store.environment).returncode == 0
    assert len(store.names()) == len(paths)


@pytest.fixture
def reader(stored, tmp_path, start) -> Callable[[], Server]:
    """What starts a server that only reads, with a copy of the index of the one that writes."""
    server, store = stored

    def start_reader() -> Server:
        other = tmp_path / "reader"
        (other / ".mediaserver").mkdir(parents=True)
        index = "index.sqlite3"
        known, copy = (sqlite3.connect(p / index) for p in (server.data, other / ".mediaserver"))
        with contextlib.closing(known), contextlib.closing(copy):
            known.backup(copy)
        url = server.url
        made: Server = start("--read-only", url, **store.environment, storage=str(other))
        return made

    return start_reader


def test_a_server_that_only_reads_answers_from_a_copy_of_the_index(stored, reader, pillow):
    server, _ = stored
    content = png()
    paths, _ = store_everywhere(server, content)
    paths[local(server.upload(content).json["url"])] = {}
    reading = reader()
    for path, headers in paths.items():
        answer = reading.request("GET", path, headers=headers)
        assert (answer.status, answer.body) == (200, content)
    assert reading.get(f"/thumbnail/{sha256(content)}").status == 200
    assert reading.request("OPTIONS", "/upload-image").status == 204
    open_session(reading)
    assert reading.call("POST", "/exists", [sha256(content)], OWNER)[0] == 200
    wait_until(lambda: f"reading only ({server.url} writes)" in reading.log)
    assert "scanning" not in reading.log
    assert "upload a picture" not in reading.log


def test_a_server_that_only_reads_opens_links_with_passwords(stored, reader):
    server, _ = stored
    content = png()
    server.upload(content)
    link = local(share(server, kind="folder", target="media", password="open sesame")["url"])
    reading = reader()
    assert reading.get(link).status == 401
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    wrong = reading.request("POST", link, b"password=no", form)
    assert wrong.status == 401
    opened = reading.request("POST", link, b"password=open+sesame", form)
    assert opened.status == 303
    cookie = {"Cookie": opened.headers["Set-Cookie"].partition(";")[0]}
    assert reading.get(f"{link}/{sha256(content)}", **cookie).body == content


def test_a_server_that_only_reads_sends_all_that_write_to_the_one_that_does(stored, reader):
    server, _ = stored
    path = local(server.upload(png()).json["url"])
    reading = reader()
    user = {"email": "a@example.org", "password": "correct horse"}
    tus = {"Tus-Resumable": "1.0.0", "Upload-Length": "5", **OWNER}
    refused = [
        reading.store(png()), reading.upload(png()), reading.put("/image/a.png", png()),
        reading.request("POST", "/api/auth/login/", json.dumps(user).encode(),
                        {"Content-Type": "application/json"}),
        reading.request("POST", "/files", headers=tus),
        reading.request("DELETE", "/trash", headers=OWNER),
        reading.request("POST", "/shares", b"{}", {"Content-Type": "application/json", **OWNER}),
        reading.request("DELETE", "/entity/1", headers=OWNER),
        reading.get(f"{path}{scoped('read', uses=1)}"),  # whose use all servers would count
    ]  # fmt: skip
    assert [
        (answer.status, server.url in answer.json["detail"], "Retry-After" in answer.headers)
        for answer in refused
    ] == [(503, True, True)] * 9


def test_a_lost_machine_is_back_with_its_bucket_and_the_index_that_litestream_kept(
    stored, start, tmp_path, readme
):
    server, store = stored
    index = server.data / "index.sqlite3"
    text = re.search(r"```yaml\n(dbs:.*?)```", readme, re.DOTALL)[1]
    text = text.replace("/var/lib/mediaserver/data/index.sqlite3", str(index))
    text = text.replace("https://s3.example.org", store.endpoint)
    config = tmp_path / "litestream.yml"
    config.write_text(text.replace("path: index\n", f"path: {store.prefix}index\n"))
    environment = {**BARE_ENVIRONMENT, **store.environment}
    environment.pop("AWS_CA_BUNDLE", None)  # which it does not like
    tool = need("litestream")
    replicating = subprocess.Popen(
        [tool, "replicate", "-config", config], env=environment, stdout=subprocess.DEVNULL
    )
    known = {server.store(content := png(), "a.png").json["stored_as"]: content for _ in range(9)}

    def restore(to: Path) -> set[str]:
        """The names of the images that an index has which is made from the bucket now."""
        to.unlink(missing_ok=True)
        words = [tool, "restore", "-config", config, "-o", to, index]
        if subprocess.run(words, env=environment, capture_output=True, check=False).returncode:
            return set()
        with contextlib.closing(sqlite3.connect(to)) as copy:
            return {os.fsdecode(path) for (path,) in copy.execute("SELECT path FROM file")}

    wait_until(lambda: restore(tmp_path / "look.sqlite3") >= set(known), "litestream")
    late: list[int] = []
    sending = threading.Thread(target=lambda: late.extend(send_until_lost(server)))
    sending.start()
    wait_until(lambda: len(store.names()) > len(known) + 3)
    lost = time.monotonic()
    server.kill()
    replicating.kill()
    replicating.wait()
    sending.join()
    shutil.rmtree(server.storage)
    other = tmp_path / "other"
    (other / ".mediaserver").mkdir(parents=True)
    assert restore(other / ".mediaserver/index.sqlite3") >= set(known)
    again = start(**store.environment, storage=str(other))
    for name, content in known.items():
        assert again.get(f"/image/{name}", **OWNER).body == content
    print(f"\nfrom kill -9 to serving elsewhere: {time.monotonic() - lost:.2f} s")
    found = verify_stored(again, store)
    images = [name for name in store.names() if name.startswith("images/")]
    assert found["files"] + len(found["unknown"]) == len(images) >= len(known) + late.count(201)


def send_until_lost(server: Server) -> list[int]:
    """Send images until the server is gone; the statuses of the answers."""
    answers: list[int] = []
    with contextlib.suppress(OSError, http.client.HTTPException):
        while True:
            answers.append(server.store(png(), "late.png").status)
    return answers


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"upload_dir": "s3://a"}, "UPLOAD_DIR"),
        ({"upload_dir": "s3://bucket/../x"}, "UPLOAD_DIR"),
        ({"upload_dir": "s3://bucket//x"}, "UPLOAD_DIR"),
        ({"upload_dir": "s3://bucket"}, "AWS_ACCESS_KEY_ID"),
        ({"upload_dir": "s3://bucket", "aws_access_key_id": "a"}, "AWS_SECRET_ACCESS_KEY"),
        ({"upload_dir": "s3://bucket", "users_dir": "s3://bucket/x"}, "USERS_DIR"),
        ({"upload_dir": "s3://bucket/x/y", "media_storage_dir": "s3://bucket/x"},
         "MEDIA_STORAGE_DIR"),
        ({"upload_dir": "/x", "users_dir": "/x"}, "USERS_DIR"),
    ],
)  # fmt: skip
def test_a_place_in_a_store_that_cannot_be_is_named(tmp_path, settings, culprit):
    with pytest.raises(ms.SettingError, match=f"^{culprit}: "):
        ms.load_settings(
            {"storage_dir": str(tmp_path)}, {n.upper(): v for n, v in settings.items()}, {}
        )


def test_places_in_one_bucket_may_lie_beside_each_other(tmp_path):
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    given = {"storage_dir": str(tmp_path), "upload_dir": "s3://bucket/x/",
             "users_dir": "s3://bucket/xy"}  # fmt: skip
    settings = ms.load_settings(given, keys, {})
    assert settings.upload_dir == ms.S3Place("bucket", "x/")
    assert settings.users_dir == ms.S3Place("bucket", "xy/")


# ======================================================================================
# 13. System and pages
# ======================================================================================


def open_session(server: Server, headers: Mapping[str, str] = OWNER, **more: str) -> Answer:
    """The answer to POST /session; its cookie as a browser keeps it is in `cookie_of`."""
    return server.request("POST", "/session", headers={**headers, **more})


def cookie_of(answer: Answer) -> dict[str, str]:
    assert answer.status == 204
    return {"Cookie": answer.headers["Set-Cookie"].partition(";")[0]}


def test_a_view_cookie_lets_a_page_show_private_pictures_and_do_nothing(start):
    running = start(read_auth_enabled="true")
    running.scanned()
    content = png()
    hidden, shown = running.store(png(), "mine.png").json, running.upload(content).json
    cookie = cookie_of(open_session(running))
    paths = ["/image/mine.png", f"/image/{shown['sha256']}", "/list", "/metrics", "/entity/"]
    assert hidden["stored_as"] == "mine.png"
    ways = [*itertools.product(("GET", "HEAD"), paths)]
    assert [running.request(*way).status for way in ways] == [401] * 10
    assert [running.request(*way, headers=cookie).status for way in ways] == [200] * 10
    assert running.request("GET", "/api/auth/profile/", headers=cookie).status == 403
    media = f"/media/{shown['filename']}"
    answers = [
        running.request("DELETE", media, headers=cookie),
        running.request("DELETE", "/entity/1", headers=cookie),
        running.request("POST", "/session", headers=cookie),
        running.send_file("POST", "/upload", png(), headers=cookie),
        running.send_file("PUT", "/image/a.png", png(), headers=cookie),
    ]
    assert [answer.status for answer in answers] == [401] * 5
    assert running.get(media, **cookie).body == content


def test_a_view_cookie_that_was_ended_is_none_and_others_live_on(start):
    running = start("--workers", "2", read_auth_enabled="true")
    name = running.upload(png()).json["filename"]
    cookies = [cookie_of(open_session(running)) for _ in range(3)]

    def seen() -> list[set[int]]:
        return [
            {running.get(path, **cookie).status for path in (f"/media/{name}", "/list") * 4}
            for cookie in cookies
        ]

    assert seen() == [{200}] * 3
    assert running.request("DELETE", "/session", headers=cookies[1]).status == 204
    assert seen() == [{200}, {401}, {200}]
    assert running.request("DELETE", "/session", headers=cookies[1]).status == 204
    running.stop()
    running = start(read_auth_enabled="true")
    assert seen() == [{200}, {401}, {200}]


def test_a_session_is_for_bearers_and_its_cookie_for_this_server_alone(server):
    answer = open_session(server)
    name, _, rules = answer.headers["Set-Cookie"].partition("=")
    assert name == "mediaserver_view"
    rules = rules.split("; ")[1:]
    assert rules == ["Path=/", "Max-Age=43200", "HttpOnly", "SameSite=Strict"]
    assert "no-store" in answer.headers["Cache-Control"]
    secure = open_session(server, **{"X-Forwarded-Proto": "https"})
    assert secure.headers["Set-Cookie"].endswith("; Secure")
    ended = server.request("DELETE", "/session")
    assert ended.status == 204
    assert ended.headers["Set-Cookie"].startswith("mediaserver_view=; Path=/; Max-Age=0;")
    assert open_session(server, {}).status == 401
    assert server.request("POST", f"/session?token={upload_token()}").status == 403
    assert open_session(server, {"Authorization": "Bearer wrong"}).status == 401


def test_a_view_cookie_shows_an_account_its_own_records_until_it_is_disabled(server):
    user, other = User(server), User(server)
    record = user.call("POST", MEDIA, {"name": "a", "type": "image", "size": 1})[1]
    cookie = cookie_of(open_session(server, user.headers))
    assert server.get(f"{MEDIA}{record['id']}/", **cookie).json["name"] == "a"
    foreign = cookie_of(open_session(server, other.headers))
    assert server.get(f"{MEDIA}{record['id']}/", **foreign).status == 404
    assert owner_says(server, "user", "disable", user.name).returncode == 0
    assert server.get(MEDIA, **cookie).status == 401
    assert server.get("/health", **cookie).status == 200


def test_a_cookie_of_demo_mode_is_good_for_nothing_afterwards(start):
    demo = start(auth_disabled="true")
    cookie = cookie_of(open_session(demo, {}))
    demo.stop()
    assert start().get("/metrics", **cookie).status == 401


@pytest.mark.parametrize(
    ("end", "status"),
    [("logout", 401), ("passwd", 401), ("disable", 401), ("revoke", 403), ("session", 401)],
)
def test_a_view_cookie_ends_with_what_it_came_from(closed, end, status, monkeypatch):
    closed.upload(content := png())
    user, headers, tokens = member(closed)
    cookie = cookie_of(open_session(closed, headers))
    path = f"/image/{sha256(content)}"
    assert closed.get(path, **cookie).body == content
    renewed = user.refresh(tokens["refresh"])[1]
    assert closed.get(path, **cookie).status == 200, "a refresh goes on with the session"
    if end == "logout":
        values = {"refresh": renewed["refresh"]}
        assert closed.call("POST", "/api/auth/logout/", values, headers)[0] == 205
    elif end == "session":
        (session,) = closed.call("GET", "/api/auth/sessions/", headers=headers)[1]
        path_of_it = f"/api/auth/sessions/{session['id']}/"
        assert closed.call("DELETE", path_of_it, headers=headers)[0] == 204
    else:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"another password")))
        more = [ms.READ_PERMISSION] if end == "revoke" else []
        run_here("user", end, user.name, *more, "--storage_dir", closed.storage)
    assert closed.get(path, **cookie).status == status


def test_the_view_cookie_of_a_server_under_a_path_stays_there(start):
    running = start(public_url="https://example.org/album")
    rules = open_session(running).headers["Set-Cookie"].split("; ")
    assert rules[1:] == ["Path=/album/", "Max-Age=43200", "HttpOnly", "SameSite=Strict", "Secure"]


def test_health_says_how_the_server_is(server):
    value = wait_until(lambda: (now := server.get("/health").json)["status"] == "ok" and now)
    assert value["gateway"] is True
    assert value["version"] == ms.__version__
    assert 0 <= value["uptime"] < 3600
    assert set(value["scan"]) == {"running", "done", "total", "finished_at"}
    assert set(value) == {"status", "gateway", "version", "uptime", "scan"}
    assert abs(value["scan"]["finished_at"] - time.time()) < 3600
    assert set(server.get("/").json) == set(value)


def test_a_browser_gets_a_page_that_needs_nothing_from_outside(server):
    server.upload(png())
    answer = server.get("/", Accept="text/html,application/xhtml+xml,*/*;q=0.8")
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "Accept" in answer.headers["Vary"]
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    german = server.get("/gallery", **{"Accept-Language": "de-AT,de;q=0.9,en;q=0.8"})
    assert b'<html lang="de">' in german.body
    assert max(map(len, (answer.body, german.body))) < 70_000
    assert not re.search(rb"""(src|href)=["']?(https?:)?//""", answer.body)


def test_the_gallery_can_be_installed(server):
    answer = server.get("/manifest.webmanifest")
    assert answer.headers["Content-Type"] == "application/manifest+json"
    manifest = answer.json
    assert (manifest["display"], manifest["start_url"]) == ("standalone", "gallery")
    icons = {(icon["type"], icon["sizes"]): icon["src"] for icon in manifest["icons"]}
    assert icons.keys() == {("image/svg+xml", "any"), ("image/png", "192x192")}
    for (mime_type, sizes), place in icons.items():
        answer = server.get(f"/{place}")
        assert answer.headers["Content-Type"] == mime_type
        facts = ms.probe(io.BytesIO(answer.body))
        size = "any" if "svg" in mime_type else f"{facts.width}x{facts.height}"
        assert (facts.mime_type, size) == (mime_type, sizes)


def operations_of(document: Mapping[str, Any]) -> set[tuple[str, str]]:
    return {
        (method.upper(), re.sub(r"\{\w+\}", "{}", path.rstrip("/")))
        for path, operations in document["paths"].items()
        for method in operations
    }


def test_the_openapi_document_is_valid_and_has_every_route(server):
    need("openapi_spec_validator").validate(document := server.get("/openapi.json").json)
    assert document["openapi"].startswith("3.1.")
    paths = {(item.method, re.sub(r"\{.*?\}", "{}", item.path.rstrip("/"))) for item in ms.ROUTES}
    assert operations_of(document) == paths
    operations = [each for methods in document["paths"].values() for each in methods.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    assert not [name for name in names if re.match(r"(get|post|put|patch|delete)_\1|<", name)]
    assert [each for each in operations if not each["summary"]] == []


def test_the_openapi_documents_examples_are_what_its_schemas_take(server):
    validate = need("jsonschema").validate
    document = server.get("/openapi.json").json
    messages = [
        message
        for operations in document["paths"].values()
        for operation in operations.values()
        for message in (operation.get("requestBody", {}), *operation["responses"].values())
    ]
    checked = 0
    for message in (*messages, *document["components"]["responses"].values()):
        for content in message.get("content", {}).values():
            if "example" in content:
                schema = {**content["schema"], "components": document["components"]}
                validate(content["example"], schema)
                checked += 1
    assert checked > 50


def test_schemathesis_gets_no_answer_that_the_openapi_document_does_not_have(start, tmp_path):
    once()
    schemathesis = need("schemathesis")
    server = start(auth_disabled="true")
    document = server.get("/openapi.json").json
    for operations in document["paths"].values():
        for operation in operations.values():
            del operation["responses"]["default"]  # which would allow any error
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    (tmp_path / "binary.py").write_text(
        "from schemathesis import serializer\n"
        "for kind in ('offset+octet-stream', 'partial-upload'):\n"
        "    serializer.alias(f'application/{kind}', 'application/octet-stream')\n"
    )
    checks = ("not_a_server_error,status_code_conformance,content_type_conformance,"
              "response_schema_conformance,response_headers_conformance")  # fmt: skip
    command = [
        schemathesis, "run", "openapi.json", "--url", server.url,
        "--phases", "examples,fuzzing", "--max-examples", "3", "--generation-deterministic",
        "--request-timeout", "30", "--suppress-health-check", "all",
        "--continue-on-failure", "--checks", checks,
    ]  # fmt: skip
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "binary", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    assert " passed" in done.stdout


def test_a_client_that_is_generated_of_the_openapi_document_uploads_and_lists(
    server, tmp_path, monkeypatch
):
    once()
    generate = [need("openapi-python-client"), "generate", "--meta", "none"]
    need("attr")
    need("httpx")
    (tmp_path / "settings.yml").write_text("post_hooks: []")  # no formatting
    generate += ["--url", f"{server.url}/openapi.json", "--config", tmp_path / "settings.yml"]
    generate += ["--output-path", tmp_path / "generated_client"]
    subprocess.run(generate, capture_output=True, check=True)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module
    content = png()
    made = module("generated_client.types").File(io.BytesIO(content), "a.png", "image/png")
    body = module("generated_client.models").UploadMediaBody(file=made)
    media = "generated_client.api.media"
    with module("generated_client").AuthenticatedClient(server.url, OWNER_KEY) as client:
        stored = module(f"{media}.upload_media").sync(client=client, body=body)
        listed = module(f"{media}.list_media").sync(client=client)
    assert stored.sha256 == sha256(content)
    assert [(each.filename, each.size) for each in listed.files][:1] == [
        (stored.filename, stored.size)
    ]


def test_answers_are_as_the_openapi_document_has_them(server, django):
    jsonschema = need("jsonschema")
    document = server.get("/openapi.json").json

    def check(method: str, path: str, template: str, **more: Any) -> Any:
        answer = server.request(method, path, **more)
        responses = document["paths"][template][method.lower()]["responses"]
        about = responses.get(str(answer.status), responses["default"])
        if "$ref" in about:
            about = document["components"]["responses"][about["$ref"].rpartition("/")[2]]
        schema = about["content"]["application/json"]["schema"]
        jsonschema.validate(answer.json, {**schema, "components": document["components"]})
        return answer.json

    def send(method: str, path: str, template: str, field: str = "file") -> Any:
        body, content_type = form("a.png", png(), field)
        headers = {"Content-Type": content_type, **OWNER}
        return check(method, path, template, body=body, headers=headers)

    send("POST", "/upload", "/upload")
    stored = send("PUT", "/image/a.png", "/image/{filename}")
    send("POST", "/upload-image", "/upload-image")
    item = send("POST", "/entity/", "/entity/", "image")
    record = django.upload(png(), "a.png")[1]
    for path, template in (
        ("/", "/"), ("/health", "/health"), ("/media", "/media"), ("/list", "/list"),
        ("/media?page=x", "/media"), (f"/entity/{item['id']}", "/entity/{id}"),
        ("/entity/", "/entity/"), ("/entity/?page=x", "/entity/"),
        ("/entity/9999", "/entity/{id}"), (f"{MEDIA}{record['id']}/", MEDIA + "{id}/"),
        (f"/entity/{item['id']}/versions", "/entity/{id}/versions"),
        ("/api/auth/profile/", "/api/auth/profile/"), (MEDIA, MEDIA), ("/metrics", "/metrics"),
        ("/api/auth/sessions/", "/api/auth/sessions/"),
        (f"/thumbnail/{'0' * 64}", "/thumbnail/{sha256}"),
    ):  # fmt: skip
        check("GET", path, template, headers=django.headers)
    assert stored["sha256"] in server.get("/list").json


def test_the_server_answers_while_it_scans(start, tmp_path):
    fill(tmp_path / "pictures", {f"{i // 100}/{i}.png": png() for i in range(1500)})
    running = start()
    seen = [running.get("/health").json["scan"]]
    while seen[-1]["finished_at"] is None:
        assert running.get("/media").status == 200
        seen.append(running.get("/health").json["scan"])
    assert any(scan["running"] for scan in seen)
    assert (seen[-1]["done"], seen[-1]["total"]) == (1500, 1500)
    assert len(running.listed()) == 1500


def read_samples(server: Server) -> dict[str, float]:
    """The samples of /metrics, after a look at the form of its lines."""
    answer = server.get("/metrics", **OWNER)
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples, types = {}, {}
    for line in answer.body.decode().splitlines():
        if line.startswith("#"):
            _, word, name, rest = line.split(" ", 3)
            types[name] = rest if word == "TYPE" else ""
            continue
        form = re.fullmatch(r"(\w+)(\{(?:\w+=\"[^\"]*\",?)+\})? (\S+)", line)
        assert form, line
        family = re.sub(r"_(bucket|sum|count)$", "", form[1])
        assert types.get(form[1], types.get(family)), line
        samples[form[1] + (form[2] or "")] = float(form[3])
    return samples


def test_promtool_has_nothing_to_say_about_the_metrics(server):
    server.upload(png())
    metrics = server.get("/metrics", **OWNER).body
    checked = subprocess.run(
        [need("promtool"), "check", "metrics"], input=metrics, capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_metrics_tell_how_long_decoders_took(server):
    need("PIL")
    stored = server.upload(png()).json
    assert server.get(f"/thumbnail/{stored['sha256']}").status == 200
    assert server.get(f"/preview/{stored['sha256']}?size=720").status == 200
    samples, name = read_samples(server), "mediaserver_rendition_duration_seconds"
    for kind in ("thumbnail", "preview"):
        assert samples[f'{name}_count{{kind="{kind}"}}'] >= 1
        assert 0 < samples[f'{name}_sum{{kind="{kind}"}}'] < 1000


def test_metrics_count_the_answers_of_all_workers_by_route_and_status(start):
    server = start("--workers", "2")
    stored = server.upload(png(), "a.png").json
    for _ in range(20):  # over several connections, hence workers
        assert server.get(f"/media/{stored['filename']}").status == 200
    server.get("/media/none.png")
    server.get("/no/such/path")
    server.call("POST", LOGIN, {"username": "nobody", "password": "wrong"})
    labels = 'method="GET",route="/media/{filename}"'
    expected = {
        f'http_requests_total{{{labels},code="200"}}': 20,
        f'http_requests_total{{{labels},code="404"}}': 1,
        'http_requests_total{method="",route="",code="404"}': 1,
        f"http_request_duration_seconds_count{{{labels}}}": 21,
        "failed_logins_total": 1,
        'assets{kind="image"}': 1,
        'assets_bytes{kind="image"}': stored["size"],
    }
    expected = {f"mediaserver_{name}": value for name, value in expected.items()}
    # An answer is counted when its client may have read it already
    samples = wait_until(
        lambda: expected.items() <= (found := read_samples(server)).items() and found
    )
    assert samples["mediaserver_upload_bytes_total"] > stored["size"]
    assert samples["mediaserver_scan_duration_seconds"] > 0
    durations = f"mediaserver_http_request_duration_seconds_bucket{{{labels}"
    buckets = [value for name, value in samples.items() if name.startswith(durations)]
    assert buckets == sorted(buckets)
    assert buckets[-1] == 21


def test_the_log_of_requests_tells_who_asked_for_what_and_no_token(start):
    server = start("--log-format", "json")
    token = upload_token()
    server.get(f"/media?page=1&token={token}", **{"X-Forwarded-For": "192.0.2.7"})
    server.get("/entity/%0A1", **OWNER)
    said = wait_until(
        lambda: (found := re.findall(r"^\{.*\}$", server.log, re.MULTILINE))[1:] and found
    )
    lines = {line["path"]: line for line in map(json.loads, said)}
    assert token not in server.log
    assert OWNER_KEY not in server.log
    known = {"status": 200, "method": "GET", "path": "/media", "principal": "uploader",
             "address": "192.0.2.7", "bytes": 22}  # fmt: skip
    assert known.items() <= lines["/media"].items()
    assert (lines["/entity/%0A1"]["principal"], lines["/entity/%0A1"]["status"]) == ("owner", 404)


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_line_of_the_log_lets_its_reader_in(start, form):
    server = start(log_format=form)
    server.upload(content := png())
    link = share(server, kind="file", target=sha256(content), password="guests")["id"]
    upload = server.request("POST", "/files?target=", b"", {**OWNER, "Tus-Resumable": "1.0.0",
        "Upload-Length": "1", "Upload-Metadata": "target bWVkaWE=,filename YS5wbmc="})  # fmt: skip
    opened = upload.headers["Location"].rpartition("/")[2]
    paths = (f"/s/{link}", f"/s/{link}/", f"/s/{link}/{sha256(content)}", f"/%73/{link}",
             f"/s/{link}/x/y", f"//s//{link}", f"/photos/s/{link}%2Fx%20y")  # fmt: skip
    assert [server.get(path).status for path in paths] == [401] * 4 + [404] * 3
    ended = (f"/files/{opened}", f"/shares/{link}", f"/shares/{link}?end")
    told = [server.request("DELETE", path, headers=OWNER).status for path in ended]
    assert told == [204, 204, 404]
    line = re.compile(r'^\{|"[A-Z]+ /.*" \d+ \d+ [\d.]+ s ', re.M)  # which follows its answer
    wait_until(lambda: len(line.findall(server.log)) == 3 + len(paths) + len(ended))
    assert link not in server.log
    assert opened not in server.log
    assert re.search("refused .* GET /s/-/?: 401", server.log)
    assert "/s/-/" + sha256(content) in server.log
    assert server.log.count("/files/-") == 1
    assert "/photos/s/-/x%20y" in server.log


def test_a_quiet_server_tells_only_of_what_is_wrong(tmp_path):
    (tmp_path / "pictures").mkdir()
    port = free_port()
    command = [sys.executable, ms.__file__, tmp_path / "pictures", "--quiet", "--port", str(port)]
    environment = {**BARE_ENVIRONMENT, "AUTH_DISABLED": "true"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as running:
        wait_until(lambda: accepts(port))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=DEADLINE):
            running.terminate()
        said = running.communicate(timeout=DEADLINE)[1]
    assert said == b"mediaserver: AUTH_DISABLED is on: everyone may do everything\n"


def test_requests_are_logged_as_text_if_wanted_and_by_default_not_at_all(start, server):
    other, server = server, start(log_format="text")
    server.get("/health")
    wait_until(lambda: re.search(r'"GET /health" 200 \d+ [\d.]+ s anonymous$', server.log, re.M))
    refused = run_program("--log_format", "xml", cwd=server.storage.parent)
    assert refused.returncode == 2
    assert "LOG_FORMAT" in refused.stderr
    other.get("/health")
    assert '"GET /health"' not in other.log


def test_a_terminal_is_shown_a_link_for_the_owner_and_a_log_is_not(start, tmp_path):
    running = start()
    wait_until(lambda: "upload a picture" in running.log)
    assert "key=" not in running.log
    terminal, own = os.openpty()
    command = [sys.executable, BYTECODE, "--storage_dir", tmp_path / "album", "--port", "0"]
    environment = {**BARE_ENVIRONMENT, **SECRETS}
    with subprocess.Popen(command, stderr=own, env=environment, cwd=tmp_path) as process:
        os.close(own)
        said = b""
        while b"upload a picture" not in said:
            said += os.read(terminal, 4096)
        process.terminate()
    os.close(terminal)
    link = re.search(r"as the owner: http://\S+/gallery#(\S+)", said.decode())
    assert link
    assert link[1] == urlencode({"key": OWNER_KEY})


# -- The gallery -------------------------------------------------------------------------


def shown_items(server: Server, **query: object) -> dict[str, list[str]]:
    """The names that the gallery shows of a choice, by group."""
    asked = urlencode(query)
    listed = server.get(f"/gallery/items?{asked}").json
    shown = {}
    for key, count, ratio, _ in listed["groups"]:
        items = server.get(f"/gallery/items?{urlencode({**query, 'group': key})}").json["items"]
        assert (len(items), sum(item[3] for item in items)) == (count, ratio)
        shown[key] = [item[1].rpartition("/")[2] for item in items]
    return shown


def fill_album(folder: Path) -> None:
    """Write pictures of two months and a recording, in folders."""
    fill(folder, {
        "a/old.png": png(4, 2), "a/b/new.png": png(2, 4), "a/b/Ärger.png": png(), "a0.wav": wav(),
        "c/note.txt": b"no picture",
    })  # fmt: skip
    for name, moment in (("a/old.png", 1_000_000_000), ("a/b/new.png", 1_700_000_000),
                         ("a/b/Ärger.png", 1_700_000_100), ("a0.wav", 1_700_000_050)):  # fmt: skip
        os.utime(folder / name, (moment, moment))


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """A server of these, which tests only look at."""
    folder = tmp_path_factory.mktemp("album") / "pictures"
    fill_album(folder)
    with Server(folder) as running:
        running.scanned()
        yield running


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, {"2023-11": ["Ärger.png", "a0.wav", "new.png"], "2001-09": ["old.png"]}),
        ({"kind": "audio"}, {"2023-11": ["a0.wav"]}),
        ({"kind": "video"}, {}),
        ({"folder": "a"}, {"2023-11": ["Ärger.png", "new.png"], "2001-09": ["old.png"]}),
        ({"folder": "/a/", "below": "false"}, {"2001-09": ["old.png"]}),
        ({"folder": "no such"}, {}),
        ({"q": "ärg"}, {"2023-11": ["Ärger.png"]}),
        ({"q": "none"}, {}),
        ({"q": "B A/ PNG"}, {"2023-11": ["Ärger.png", "new.png"]}),
        ({"order": "name"}, {"": ["a0.wav"], "a": ["old.png"], "a/b": ["new.png", "Ärger.png"]}),
    ],
    ids=str,
)
def test_the_gallery_shows_what_an_address_chooses(album, query, expected):
    assert shown_items(album, **query) == expected


def test_the_gallerys_list_names_folders_and_is_sent_only_when_it_has_changed(start, tmp_path):
    fill_album(tmp_path / "pictures")
    album = start()
    album.scanned()
    answer = album.get("/gallery/items")
    assert answer.json["folders"] == [["", 1], ["a", 1], ["a/b", 2]]
    assert answer.json["name"] == "pictures"
    again = {"If-None-Match": answer.headers["ETag"]}
    assert album.get("/gallery/items", **again).status == 304
    album.put("/image/more.png", png())
    ask = functools.partial(album.get, "/gallery/items", **again)
    wait_until(lambda: ask().status == 200)  # a list that took long to make is good for a while
    changed = ask()
    assert ["uploads", 1] in [[name[:7], count] for name, count in changed.json["folders"]]
    assert album.get("/gallery/items?group=1999-01").status == 404
    assert album.get("/gallery/items?kind=text").status == 400


def test_a_304_for_the_gallerys_list_has_the_fields_of_its_200(start, tmp_path):
    fill(tmp_path / "pictures", {f"{number:0200}/a.png": png() for number in range(6)})
    album = start()
    album.scanned()
    answer = album.get("/gallery/items", **{"Accept-Encoding": "gzip"})
    assert answer.headers["Vary"] == "Accept-Encoding"
    gone = {"Date", "Content-Type", "Content-Length", "Content-Encoding"}
    kept = {name: answer.headers[name] for name in {*answer.headers} - gone}
    for more in ({}, {"Accept-Encoding": "gzip"}):
        known = album.get("/gallery/items", If_None_Match=answer.headers["ETag"], **more)
        assert (known.status, known.body) == (304, b"")
        assert {name: known.headers.get(name) for name in kept} == kept, more


def test_the_gallery_shows_a_camera_and_names_all_there_are(start, tmp_path):
    cameras = {"a.jpg": b"One", "b.jpg": b"Two", "c.jpg": b"Two"}
    fill(tmp_path / "pictures", {
        name: jpeg_of((0xE1, b"Exif\0\0" + tiff({0x110: camera})), (0xFE, unique()))
        for name, camera in cameras.items()
    })  # fmt: skip
    server = start()
    server.scanned()
    listed = server.get("/gallery/items?camera=Two").json
    assert listed["cameras"] == ["One", "Two"]
    assert sum(count for _, count, _, _ in listed["groups"]) == 2


def names_in(server: Server, album: str, headers: Mapping[str, str]) -> list[str]:
    """The names that the gallery shows of an album, after those of the albums in it."""
    listed = server.get(f"/gallery/items?album={album}&order=name", **headers).json
    query = f"/gallery/items?album={album}&order=name&group="
    items = [item for group in listed["groups"]
             for item in server.get(query + group[0], **headers).json["items"]]  # fmt: skip
    for item in items:
        assert server.get(f"/preview/{item[0]}?size=320", **headers).status == 200
    return [f"{name}/" for _, name, _, _ in listed["albums"]] + [item[1] for item in items]


def test_the_gallery_shows_albums_to_those_who_may_see_them(server):
    need("PIL")
    user, entities = User(server), Entities(server)
    private, gone, public = png(), png(), png()
    summer = user.call("POST", SHELVES, {"name": "Summer"})[1]["id"]
    assert user.upload(private, name="mine", collection=summer)[0] == 201
    deleted = user.upload(gone, name="gone")[1]["id"]
    assert user.call("DELETE", f"{MEDIA}{deleted}/")[0] == 204
    tree = str(entities.collection(label="Tree")["id"])
    entities.collection(label="Twig", parent_id=tree)
    entities.create(public, label="leaf", parent_id=tree)
    assert names_in(server, "mine", user.headers) == ["mine"]
    assert names_in(server, summer, user.headers) == ["mine"]
    assert names_in(server, "trash", user.headers) == ["gone"]
    assert names_in(server, "trash", {}) == []
    assert names_in(server, tree, {}) == ["Twig/", "leaf"]
    assert names_in(server, "all", user.headers)[0] == "Summer/"
    assert "Tree/" in names_in(server, "all", {})
    path = server.get(f"/gallery/items?album={tree}").json["path"]
    assert path == [[tree, "Tree"]]
    closed = [server.get(f"/gallery/items?album={album}").status for album in ("mine", summer)]
    assert closed == [401, 401]
    other = User(server)
    assert server.get(f"/gallery/items?album={summer}", **other.headers).status == 404
    seen = [
        server.get(f"/preview/{sha256(content)}?size=320", **headers).status
        for content, headers in itertools.product((private, gone), ({}, OWNER, other.headers))
    ]
    assert seen == [404] * 6


@pytest.mark.parametrize(
    ("headers", "status", "can_upload"),
    [({}, 401, None), (READER, 200, False), (WRITER, 403, None), (OWNER, 200, True)],
    ids=["nobody", "reader", "writer", "owner"],
)
def test_the_gallerys_list_says_what_one_may_do_and_is_read_by_who_may_read(
    read_closed, headers, status, can_upload
):
    answer = read_closed.get("/gallery/items", **headers)
    assert (answer.status, answer.json.get("can_upload")) == (status, can_upload)


def test_the_gallery_itself_is_shown_to_everyone(read_closed):
    assert read_closed.get("/gallery").status == 200


def test_where_reads_need_a_permission_an_account_without_it_reads_nothing_in_the_gallery(start):
    server = start(read_auth_enabled="true")
    user, mine = User(server), png()
    user.upload(mine, name="mine")
    paths = [
        "/gallery/items", "/gallery/items?album=mine", "/gallery/items?album=all",
        "/gallery/items?album=entities", "/gallery/zip?album=mine",
        f"/preview/{sha256(mine)}", f"/exists?sha256={sha256(mine)}",
    ]  # fmt: skip
    assert [server.get(path, **user.headers).status for path in paths] == [403] * 7


def test_albums_count_what_is_in_the_trash_by_itself(start):
    running = start()
    user, entities = User(running), Entities(running)
    records = [user.upload(png(), name="mine")[1] for _ in range(3)]
    items = [entities.create(png()) for _ in range(3)]
    assert user.call("DELETE", f"{MEDIA}{records[0]['id']}/")[0] == 204
    entities.patch(items[0]["id"], is_deleted=True)
    counts = {
        (name, key): size
        for name, headers in (("user", user.headers), ("owner", OWNER))
        for key, _, size, _ in running.get("/gallery/items?album=all", **headers).json["albums"]
    }
    assert counts == {
        ("user", "mine"): 2, ("user", "entities"): 2, ("user", "trash"): 1,
        ("owner", "entities"): 2, ("owner", "trash"): 1,
    }  # fmt: skip


def test_the_list_of_albums_is_sent_only_when_it_has_changed(server):
    user = User(server)
    user.call("POST", SHELVES, {"name": "Summer"})
    path = "/gallery/items?album=all"
    tag = {"If-None-Match": server.get(path, **user.headers).headers["ETag"]}
    assert server.get(path, **user.headers, **tag).status == 304
    user.call("POST", SHELVES, {"name": "Winter"})
    assert server.get(path, **user.headers, **tag).status == 200


class Browser:
    """Chromium, driven by the WebDriver protocol."""

    def __init__(self, *options: str, **capabilities: Any) -> None:
        once()
        need("chromium")
        port = free_port()
        command = [need("chromedriver"), f"--port={port}"]
        self.home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.driver = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "TMPDIR": self.home.name},
        )  # fmt: skip
        self.address = f"http://127.0.0.1:{port}"
        wait_until(lambda: accepts(port), "chromedriver")
        args = ["--headless=new", "--no-sandbox", "--disable-gpu", "--lang=en", *options]
        args.append(f"--host-resolver-rules=MAP {DOMAIN} 127.0.0.1")
        chosen = {"args": args, "prefs": {"intl.accept_languages": "en"}, **capabilities}
        wanted = {"goog:chromeOptions": chosen, "goog:loggingPrefs": {"browser": "ALL"}}
        wanted["acceptInsecureCerts"] = True
        wanted["timeouts"] = {"script": int(DEADLINE * 1000)}
        made = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/session/{made['sessionId']}"

    def ask(self, method: str, path: str, value: Any = None) -> Any:
        body = None if value is None else json.dumps(value).encode()
        request = urllib.request.Request(self.address + path, body, method=method)
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            pytest.fail(json.load(error)["value"]["message"].partition("\n")[0])

    def close(self) -> None:
        """End all of its processes; Chromium takes half a minute for that on a busy machine."""
        os.killpg(self.driver.pid, signal.SIGKILL)
        self.driver.wait()
        self.home.cleanup()

    def open(self, url: str) -> None:
        self.ask("POST", f"{self.session}/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        value = {"script": script, "args": arguments}
        return self.ask("POST", f"{self.session}/execute/sync", value)

    def see(self, expression: str, *arguments: Any) -> Any:
        """Wait until an expression of the page is true, and return it."""
        return wait_until(lambda: self.run(f"return {expression}", *arguments), expression)

    def click(self, selector: str) -> None:
        script = f"const found = document.querySelector({selector!r}); found?.click()"
        wait_until(lambda: self.run(f"{script}; return Boolean(found)"), selector)

    def press(self, key: str) -> None:
        keys = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        actions = [{"type": "key", "id": "keys", "actions": keys}]
        self.ask("POST", f"{self.session}/actions", {"actions": actions})

    def devtools(self, command: str, **parameters: Any) -> Any:
        """Give a command of the Chrome DevTools Protocol."""
        value = {"cmd": command, "params": parameters}
        return self.ask("POST", f"{self.session}/goog/cdp/execute", value)

    def touch(self, *fingers: list[tuple[int, int]]) -> None:
        """Put fingers down at the first of their points, and move them through the others."""
        actions = []
        for number, (first, *others) in enumerate(fingers):
            points = [{"type": "pointerMove", "x": x, "y": y, "duration": 0}
                      for x, y in (first, *others)]  # fmt: skip
            points.insert(1, {"type": "pointerDown", "button": 0})
            points.append({"type": "pointerUp", "button": 0})
            kind = {"type": "pointer", "parameters": {"pointerType": "touch"}}
            actions.append({**kind, "id": f"finger {number}", "actions": points})
        self.ask("POST", f"{self.session}/actions", {"actions": actions})

    def drop(self, *paths: Path) -> None:
        """Drag files and folders over the page, and drop them."""
        data = {"items": [], "files": [*map(str, paths)], "dragOperationsMask": 1}

        def drag(*kinds: str) -> None:
            for kind in kinds:
                self.devtools("Input.dispatchDragEvent", type=kind, x=300, y=300, data=data)

        def is_over() -> bool:
            drag("dragEnter", "dragOver")
            return self.run("return !document.querySelector('#drop').hidden")

        wait_until(is_over, "the page to say where to drop")  # before, it takes nothing
        drag("drop")

    def find_flaws(self, theme: str) -> list[str]:
        """What axe-core finds wrong with the page as it is, in a theme."""
        feature = {"name": "prefers-color-scheme", "value": theme}
        self.devtools("Emulation.setEmulatedMedia", features=[feature])
        if not self.run("return 'axe' in window"):
            self.run((node_package("axe-core") / "axe.min.js").read_text("utf-8"))
        script = "const [done] = arguments; axe.run({resultTypes: ['violations']}).then(done)"
        value = {"script": script, "args": []}
        found = self.ask("POST", f"{self.session}/execute/async", value)["violations"]
        return [
            f"{theme}: {flaw['id']}: {flaw['help']}: {node['html'][:200]} {node['failureSummary']}"
            for flaw in found
            for node in flaw["nodes"]
        ]

    def choose_files(self, selector: str, *paths: Path) -> None:
        self.run(f"document.querySelector({selector!r}).hidden = false")
        using = {"using": "css selector", "value": selector}
        (element,) = self.ask("POST", f"{self.session}/element", using).values()
        text = {"text": "\n".join(map(str, paths))}
        self.ask("POST", f"{self.session}/element/{element}/value", text)

    def complaints(self) -> list[str]:
        """What the page has made the browser complain of, requests that failed apart."""
        logged = self.ask("POST", f"{self.session}/se/log", {"type": "browser"})
        said = [entry["message"] for entry in logged if entry["level"] == "SEVERE"]
        return [message for message in said if "Failed to load resource" not in message]


@pytest.fixture(scope="module")
def chromium():
    browser = Browser("--window-size=1100,800")
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium):
    """A window without anybody's session, whose page must have had nothing to complain of."""
    yield chromium
    assert chromium.complaints() == []
    chromium.run("if (location.host) { sessionStorage.clear(); localStorage.clear(); }")
    chromium.ask("DELETE", f"{chromium.session}/cookie")  # a cookie is every port's
    chromium.open("about:blank")


TITLE_SHOWN = "document.querySelector('#viewer h2')?.textContent === arguments[0]"
RIGHT, ESCAPE, ENTER, TAB = "\ue014", "\ue00c", "\ue007", "\ue004"


def enter_key(browser: Browser, key: str) -> None:
    browser.click("#account")
    browser.run(
        "const form = document.querySelector('#login form');"
        "form.elements.key.value = arguments[0]; form.requestSubmit()",
        key,
    )


def sign_in(browser: Browser, key: str) -> None:
    enter_key(browser, key)
    browser.see("!document.querySelector('#login').open")
    browser.see("list.can_write || list.has_account || list.read_only")


def test_the_page_is_opened_looked_through_and_left_by_keyboard(browser, album):
    browser.open(album.url + "/")
    assert browser.see("document.querySelectorAll('.tile').length === 4")
    headings = "[...document.querySelectorAll('#grid h2')].map((each) => each.innerText).join()"
    assert browser.see(headings) == "November 20233,September 20011"
    browser.run("document.querySelector('.tile a[aria-label*=Ärger]').focus()")
    browser.press(ENTER)
    browser.see(TITLE_SHOWN, "Ärger.png")
    browser.press(RIGHT)
    browser.see(TITLE_SHOWN, "a0.wav")
    browser.click("#viewer [title=Next]")
    browser.see(TITLE_SHOWN, "new.png")
    browser.press("i")
    assert "a/b" in browser.see("document.querySelector('#facts').innerText")
    address = browser.run("return location.href")
    browser.press(ESCAPE)
    browser.see("!document.querySelector('#viewer').open")
    browser.see("document.activeElement.ariaLabel?.includes('new.png')")
    browser.press(RIGHT)
    browser.see("document.activeElement.ariaLabel?.includes('old.png')")
    browser.open(address)
    browser.see(TITLE_SHOWN, "new.png")


def test_the_viewer_goes_on_while_a_new_list_has_come_without_its_items(browser, album):
    item = album.get("/gallery/items?group=2023-11").json["items"][2]
    browser.open(f"{album.url}/gallery?group=2023-11&item={item[0]}")
    browser.see(TITLE_SHOWN, "new.png")
    browser.run("groups = groups.map((group) => ({...group}))")  # as a scan makes them
    browser.press(RIGHT)
    browser.see(TITLE_SHOWN, "old.png")


def test_the_docs_page_has_every_operation_and_tries_one_with_a_token(browser, server, tmp_path):
    answer = server.get("/docs")
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert server.get("/docs", **{"If-None-Match": answer.headers["ETag"]}).status == 304
    browser.open(server.url + "/docs")
    count = len(operations_of(server.get("/openapi.json").json))
    browser.see("document.querySelectorAll('details').length === arguments[0]", count)
    browser.run(
        "document.getElementById('token').value = arguments[0];"
        "window.box = [...document.querySelectorAll('details')]"
        "  .find((each) => each.innerText.startsWith('POST\\n/upload\\n'));"
        "box.open = true",
        OWNER_KEY,
    )
    browser.see("box.querySelector('form')")
    (tmp_path / "it's.png").write_bytes(content := png())
    browser.choose_files("details[open] [name=file]", tmp_path / "it's.png")
    browser.click("details[open] button")
    assert sha256(content) in browser.see("box.querySelector('[role=status]').innerText")
    curl = "curl -X POST -H 'Authorization: Bearer TOKEN' -F 'file=@it'\\''s.png' "
    assert browser.run("return box.querySelector('pre').textContent").startswith(curl + "http")


def test_everything_in_the_page_is_reached_and_named_by_keyboard(browser, album):
    browser.open(album.url + "/gallery")
    browser.see("document.querySelectorAll('.tile').length === 4")
    script = (
        "const {activeElement: at} = document, style = getComputedStyle(at);"
        "const name = at.ariaLabel || at.title || at.innerText || at.dataset.label;"
        "return [at.tagName, name.trim(), style.outlineStyle !== 'none']"
    )
    reached = []
    while len(reached) < 40 and (not reached or reached[-1][0] != "BODY"):
        browser.press(TAB)
        reached.append(browser.run(script))
    names = [name for _, name, _ in reached[:-1]]
    assert {"Search names, folders, cameras", "Folders", "Sign in", "Upload"} <= {*names} - {""}
    assert [each for each in reached[:-1] if not (each[1] and each[2])] == []
    assert [tag for tag, _, _ in reached].count("A") == 6  # home, four items, docs
    browser.run("document.activeElement.blur()")
    for key in (TAB, TAB, *"new", ENTER):
        browser.press(key)
    browser.see("document.querySelectorAll('.tile').length === 1")
    browser.see("location.search === '?q=new'")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    ("page", "shown"),
    [
        ("/gallery", "document.querySelectorAll('.tile img').length === 3"),
        ("/gallery?group=2001-09&item={item}", "document.querySelector('#viewer').open"),
        ("/gallery#sign-in", "document.querySelector('.tile')"),
        ("/docs", "document.querySelector('details')"),
        ("{share}", "document.querySelector('li img')"),
        ("{locked}", "document.querySelector('form')"),
    ],
)
def test_axe_finds_no_flaw_in_the_pages(browser, album, theme, page, shown):
    node_package("axe-core")
    places = {"item": album.get("/gallery/items?group=2001-09").json["items"][0][0]}
    for name, password in (("share", ""), ("locked", "secret 1")):
        made = share(album, kind="folder", target="a", upload=True, password=password)
        places[name] = local(made["url"])
    browser.open("about:blank")
    browser.open(album.url + page.format(**places))
    browser.see(shown)
    if page == "/docs":
        browser.run("for (const each of document.querySelectorAll('details')) each.open = true")
        browser.see("document.querySelectorAll('form').length > 50")
    if "item=" in page:
        browser.press("i")
        browser.see("document.querySelector('#facts')")
    if page.endswith("#sign-in"):
        browser.click("#account")
        browser.see("document.querySelector('#login').open")
    assert browser.find_flaws(theme) == []


def test_axe_finds_no_flaw_in_albums_selection_uploads_and_folders(browser, server, tmp_path):
    node_package("axe-core")
    user = User(server)
    user.upload(png(), "mine.png", name="mine.png")
    user.call("POST", "/api/media/collections/", {"name": "Summer"})
    (tmp_path / "new.png").write_bytes(png())
    browser.open(server.url + "/gallery")
    sign_in(browser, user.headers["Authorization"].removeprefix("Bearer "))
    browser.see("list.has_account")
    browser.click("#albums")
    browser.see("document.querySelector('#cards a')")
    assert [flaw for theme in ("light", "dark") for flaw in browser.find_flaws(theme)] == []
    browser.choose_files("#files", tmp_path / "new.png")
    browser.run("document.querySelector('#files').hidden = true")
    browser.see("document.querySelector('#uploads h2')?.textContent === '1/1 done'")
    browser.open(server.url + "/gallery?album=mine")
    browser.click(".tile .pick")
    browser.click("#folders")
    browser.see("!document.querySelector('#picked').hidden")
    assert [flaw for theme in ("light", "dark") for flaw in browser.find_flaws(theme)] == []


def test_search_kind_and_folder_are_in_the_address_and_back_undoes_them(browser, album):
    browser.open(album.url + "/gallery?q=new")
    shown = "document.querySelectorAll('.tile').length === arguments[0]"
    browser.see(shown, 1)
    browser.click("#home")
    browser.see(shown, 4)
    browser.click("#folders")
    browser.click("#places a[href*='folder=a']")
    browser.see(shown, 3)
    assert browser.run("return location.search") == "?folder=a"
    browser.click("#places input")
    browser.see(shown, 1)
    browser.run("history.back()")
    browser.see(shown, 3)
    browser.run("history.go(-2)")
    browser.see(shown, 1)


def test_what_lies_beside_the_folders_is_shown_by_name_too(browser, album):
    browser.open(album.url + "/gallery?order=name")
    headings = "[...document.querySelectorAll('#grid h2')].map((each) => each.innerText).join()"
    assert browser.see(headings) == "pictures1,a1,a/b2"
    browser.see("document.querySelectorAll('.tile').length === 4")


def test_who_signs_in_may_do_all_at_once_when_the_form_is_gone(browser, server):
    browser.open(server.url + "/gallery")
    browser.see("list")
    browser.run(
        "const get = fetch; window.fetch = (path, options) => !path.includes('/gallery/items') ?"
        " get(path, options) : new Promise((done) => { go = () => done(get(path, options)); });"
        "window.go = null"
    )
    enter_key(browser, OWNER_KEY)
    browser.see("go !== null")  # the list is asked for
    assert browser.run("return document.querySelector('#login').open")
    browser.run("go()")
    browser.see("!document.querySelector('#login').open")
    assert browser.run("return list.can_write")


def test_files_are_uploaded_in_the_page_and_appear_and_can_be_deleted(browser, server, tmp_path):
    known, new, public, text = png(), png(), webp(), b"hello"
    server.put("/image/known.png", known)
    fill(tmp_path, {"known.png": known, "new.png": new, "b.webp": public, "c.txt": text})
    browser.open(server.url + "/gallery")
    sign_in(browser, OWNER_KEY)
    files = [tmp_path / name for name in ("known.png", "new.png", "b.webp", "c.txt")]
    browser.choose_files("#files", *files)
    said = browser.see(
        "document.querySelector('#uploads h2')?.textContent === '4/4 done' &&"
        " document.querySelector('#uploads ul').innerText"
    ).split("\n")
    assert said[0] == "c.txt"
    assert said[1].startswith("Only photos")
    assert said[2:] == ["known.png", "already there", "new.png", "stored", "b.webp", "stored"]
    tile = f"[data-sha='{sha256(public)}'] a"
    browser.click(tile)
    browser.run("window.confirm = () => true")
    browser.click("#viewer [title=Delete]")
    browser.see(f"!document.querySelector({tile!r})")
    assert server.get(f"/image/{sha256(public)}").status == 404
    assert server.get(f"/image/{sha256(new)}").body == new


@pytest.mark.parametrize("readable", [True, False])
def test_a_heic_picture_is_uploaded_in_the_page_and_shown_or_named(
    browser, server, tmp_path, readable
):
    path = tmp_path / f"IMG_{unique().decode()}.heic"
    path.write_bytes(heif() + box(b"free", unique()))  # nobody else stores it
    if readable:
        heif_library, pillow = need("pillow_heif"), need("PIL.Image")
        noise = pillow.frombytes("RGB", (64, 48), os.urandom(64 * 48 * 3))
        heif_library.from_pillow(noise).save(path)
    folder = Entities(server).collection()["id"]  # where nothing else takes the tile out of view
    browser.open(f"{server.url}/gallery?album={folder}")
    sign_in(browser, OWNER_KEY)
    browser.see("list.can_write")
    browser.choose_files("#files", path)
    tile = f"document.querySelector('[data-sha=\"{sha256(path.read_bytes())}\"]')"
    if readable:
        browser.see(f"{tile}?.querySelector('img.ready')?.naturalWidth === 64")
    else:
        assert path.name in browser.see(f"{tile}?.querySelector('.words')?.textContent")


def test_a_folder_that_is_dropped_is_uploaded_with_what_is_below_it(browser, server, tmp_path):
    contents = {"a.png": png(), "b/c.png": png(), "b/d/e.webp": webp()}
    fill(tmp_path / "dropped", {**contents, "note.txt": b"no picture"})
    browser.open(server.url + "/gallery")
    sign_in(browser, OWNER_KEY)
    browser.see("document.querySelector('#account').ariaPressed === 'true'")
    browser.drop(tmp_path / "dropped")
    done = "document.querySelector('#uploads h2')?.textContent.startsWith('4/4')"
    browser.see(done)
    said = browser.run("return document.querySelector('#uploads ul').innerText")
    assert said.count("stored") == 3
    assert "Only photos" in said
    assert {sha256(content) for content in contents.values()} <= server.listed().keys()


@pytest.fixture(scope="module")
def cinema(tmp_path_factory):
    """A server of one video, half a minute long."""
    folder = tmp_path_factory.mktemp("cinema") / "pictures"
    folder.mkdir()
    need("ffmpeg")
    video = ("-c:v", "libvpx", "-deadline", "realtime", "-b:v", "500k", "-g", "5", "-t", "30")
    make_video(folder / "a.webm", "testsrc2=size=160x90:rate=3", *video)
    with Server(folder, LOG_FORMAT="json") as running:
        running.scanned()
        yield running


def test_a_video_plays_and_is_sought_in_ranges(browser, cinema):
    browser.open(cinema.url + "/gallery")
    assert browser.see("document.querySelector('.tile .badge')?.innerText").strip() == "0:30"
    browser.click(".tile a")
    video = "document.querySelector('#view > video')"
    browser.run(f"{video}.muted = true; {video}.play()")
    browser.see(f"{video}.currentTime > 0.2")
    browser.run(f"{video}.currentTime = 25")
    browser.see(f"!{video}.seeking && {video}.currentTime > 25")
    wait_until(lambda: re.search(r'"/image/\w{64}", "status": 206', cinema.log), "a range")
    browser.press(ESCAPE)


def test_a_slideshow_goes_on_until_its_end(browser, start, tmp_path):
    fill(tmp_path / "pictures", {f"{name}.png": png() for name in "abc"})
    for number, name in enumerate("abc"):
        os.utime(tmp_path / "pictures" / f"{name}.png", (1_700_000_000 - number,) * 2)
    server = start()
    server.scanned()
    browser.open(server.url + "/gallery")
    browser.run(
        "const later = window.setInterval;"
        "window.setInterval = (run, milliseconds) => later(run, milliseconds / 40);"
    )
    browser.click("[aria-label$=', a.png']")
    browser.see(TITLE_SHOWN, "a.png")
    browser.press("s")
    browser.see(TITLE_SHOWN, "c.png")
    browser.see("document.querySelector('#viewer [title=Slideshow]')")


def test_what_is_large_goes_on_by_tus_where_it_was_and_what_the_folder_refuses_is_ones_own(
    browser, server, tmp_path
):
    user, large = User(server), png() + unique() * 500_000
    fill(tmp_path, {"large.png": large, "a.wav": (recording := wav() + unique()),
                    "new.png": (fresh := png_of(4_100_000))})  # fmt: skip
    stamp = (tmp_path / "large.png").stat().st_mtime_ns // 1_000_000
    begun = begin(server, len(large), "accounts", user.headers)
    assert begun.send(0, large[:300_000]).status == 204
    browser.open(server.url + "/gallery")
    sign_in(browser, user.headers["Authorization"].removeprefix("Bearer "))
    browser.see("list.has_account")
    browser.run(
        "localStorage.setItem(arguments[0], arguments[1]); setPaused(true)",
        f"upload/accounts/large.png/{len(large)}/{stamp}", begun.path,
    )  # fmt: skip
    browser.choose_files(
        "#files", *(tmp_path / name for name in ("large.png", "a.wav", "new.png"))
    )
    browser.click("#uploads [title='Go on']")
    browser.see("document.querySelector('#uploads h2')?.textContent === '3/3 done'")
    browser.click("#uploads li a")  # there they are
    browser.see("document.querySelectorAll('.tile').length === 3")
    stored = [file.read_bytes() for file in user.files()]
    assert sorted(stored) == sorted([large, recording, fresh])
    with server.index() as db:
        told = "".join(text for (text,) in db.execute("SELECT metadata FROM upload"))
    parts = [base64.b64encode(name).decode() in told for name in (b"new.png", b"a.wav")]
    assert parts == [True, False], "what is small is sent at once"
    assert begun.get()["answer"]["size"] == len(large)


def test_pictures_are_put_into_an_album_and_leave_it_and_the_trash_gives_back(browser, server):
    user, content = User(server), png()
    server.put("/image/beach.png", content)
    mine = user.upload(png(), "mine.png", name="mine.png")[1]["id"]
    browser.open(server.url + "/gallery?q=beach")
    sign_in(browser, user.headers["Authorization"].removeprefix("Bearer "))
    tile, open_tile = f"[data-sha='{sha256(content)}']", "#picked [title='Add to album']"
    browser.see("list.has_account")
    browser.click(f"{tile} .pick")
    browser.click(open_tile)
    browser.see("document.querySelector('#login').open")  # the form of signing in is gone
    browser.run(
        "const {elements} = document.querySelector('#login form');"
        "elements.newAlbum.value = '<b>Sommer';"
        "document.querySelector('#login form').requestSubmit()"
    )
    browser.see("document.querySelector('#notice').textContent === 'Added to <b>Sommer.'")
    browser.click("#albums")
    browser.see("document.querySelector('#cards b')?.textContent === '<b>Sommer'")
    browser.click("#cards a")
    browser.click(f"{tile} a")
    browser.click("#viewer [title='Remove from album']")
    browser.see(f"!document.querySelector({tile!r})")
    assert server.get(f"/image/{sha256(content)}").body == content

    browser.open(server.url + "/gallery?album=mine")
    browser.click(".tile .pick")
    browser.click("#picked [title=Delete]")
    browser.see("!document.querySelector('.tile')")
    assert user.call("GET", f"{MEDIA}{mine}/")[0] == 404
    browser.open(server.url + "/gallery?album=trash")
    browser.click(".tile .pick")
    browser.click("#picked [title=Restore]")
    browser.see("!document.querySelector('.tile')")
    assert user.call("GET", f"{MEDIA}{mine}/")[0] == 200

    assert user.call("DELETE", f"{MEDIA}{mine}/")[0] == 204
    browser.open(server.url + "/gallery?album=trash")
    browser.see("document.querySelector('.tile')")
    browser.run("document.querySelector('.tile a').focus()")  # where it comes back to
    browser.press(ENTER)
    browser.click("#viewer [title=Restore]")
    browser.see("!document.querySelector('.tile') && !document.querySelector('#viewer').open")

    assert user.call("DELETE", f"{MEDIA}{mine}/")[0] == 204
    browser.open(server.url + "/gallery?album=trash")
    browser.see("document.querySelector('.tile')")
    browser.run("window.confirm = () => true")
    browser.click("#places [title='Empty trash']")
    browser.see("!document.querySelector('.tile')")
    assert user.files() == []


def test_what_was_deleted_before_one_is_refused_is_gone_from_the_page(browser, server):
    user = User(server)
    for name in ("a.png", "b.png"):
        user.upload(png(), name, name=name)
    browser.open(server.url + "/gallery")
    sign_in(browser, user.headers["Authorization"].removeprefix("Bearer "))
    browser.open(server.url + "/gallery?album=mine")
    browser.see("document.querySelectorAll('.tile').length === 2")
    browser.run(
        "const ask = window.fetch; let count = 0;"
        "window.fetch = (url, options) => options.method === 'DELETE' && count++"
        " ? Promise.resolve(new Response('{}', {status: 503})) : ask(url, options);"
        "for (const each of document.querySelectorAll('.tile .pick')) each.click()"
    )
    browser.click("#picked [title=Delete]")
    browser.see("document.querySelector('#picked span').textContent === '1 selected'")
    browser.see("document.querySelectorAll('.tile').length === 1")


def test_an_entity_is_shown_in_its_tree_as_it_was_in_each_version(browser, server):
    need("PIL")
    entities = Entities(server)
    tree = str(entities.collection(label="Tree")["id"])
    leaf = entities.create(png(7, 5), label="leaf.png", parent_id=tree)
    content = png(30, 20)
    entities.send("PUT", str(leaf["id"]), content, label="leaf.png", parent_id=tree)
    browser.open(f"{server.url}/gallery?album=entities")
    browser.click(f"#cards a[href$='album={tree}']")
    browser.click(f"[data-sha='{sha256(content)}'] a")  # not one of those outside of the tree
    browser.click("#viewer [title=Details]")
    browser.see("document.querySelector('#view img')?.naturalWidth === 30")
    # What a zoom asks for: the file itself, unless that, or an older one, is shown already.
    browser.run("window.Image = class { set src(url) { window.asked = url; } }")
    zoom = "document.querySelector('#view img').ondblclick({clientX: 1, clientY: 1})"
    asked = f"window.asked = null; {zoom}; return window.asked"
    assert browser.run(asked).endswith(f"/entity/{leaf['id']}/file")
    browser.click("#facts button:last-of-type")
    browser.see("document.querySelector('#view img').naturalWidth === 7")
    assert browser.run(zoom) is None, "back to its size"
    assert browser.run(asked) is None


def test_what_is_selected_is_downloaded_as_one_zip_file(browser, album, tmp_path):
    where = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.devtools("Browser.setDownloadBehavior", **where)
    browser.open(album.url + "/gallery?folder=a")
    browser.see("document.querySelectorAll('.tile').length === 3")
    browser.run("for (const each of document.querySelectorAll('.pick')) each.click()")
    assert browser.run("return document.querySelector('#picked span').textContent") == "3 selected"
    browser.click("#picked [title=Download]")
    wait_until(lambda: [*filter(zipfile.is_zipfile, tmp_path.glob("*.zip"))], "the zip file")
    with zipfile.ZipFile(tmp_path / "pictures.zip") as file:
        assert file.testzip() is None
        assert {*file.namelist()} == {"a/old.png", "a/b/new.png", "a/b/Ärger.png"}
    # What is more than an address can name comes in several
    browser.devtools("Browser.setDownloadBehavior", **{**where, "behavior": "allowAndName"})
    browser.run("downloadAll(Array(201).fill([...picked.values()]).flat())")
    wait_until(lambda: len([*filter(zipfile.is_zipfile, tmp_path.iterdir())]) == 3, "two more")


def zipped(answer: Answer) -> dict[str, bytes]:
    """The files of a zip file, whose length was told before."""
    assert answer.status == 200
    assert answer.headers["Content-Length"] == str(len(answer.body))
    with zipfile.ZipFile(io.BytesIO(answer.body)) as file:
        assert file.testzip() is None
        return {name: file.read(name) for name in file.namelist()}


def test_a_zip_file_has_what_the_gallery_shows_with_paths_and_times(album):
    answer = album.get("/gallery/zip?folder=/a/")
    names = {"a/old.png", "a/b/new.png", "a/b/Ärger.png"}
    assert zipped(answer) == {name: (album.storage / name).read_bytes() for name in names}
    assert answer.headers["Content-Disposition"] == 'attachment; filename="pictures.zip"'
    with zipfile.ZipFile(io.BytesIO(answer.body)) as file:
        assert file.getinfo("a/old.png").date_time[:3] == time.localtime(1_000_000_000)[:3]
    head = album.request("HEAD", "/gallery/zip?folder=a")
    assert (head.headers["Content-Length"], head.body) == (str(len(answer.body)), b"")


@pytest.mark.parametrize("query", ["only={}", "group=2001-09", "q=old&kind=image"])
def test_a_zip_file_may_have_some_pictures_alone(album, query):
    old = sha256((album.storage / "a/old.png").read_bytes())
    answer = album.get(f"/gallery/zip?{query.format(old[:12])}")
    assert [*zipped(answer)] == ["a/old.png"]


@pytest.mark.parametrize(
    "query", ["only=000000000000", "only=", "only=,", "group=1999-01", "q=none"]
)
def test_a_zip_file_of_nothing_is_404(album, query):
    assert album.get(f"/gallery/zip?{query}").status == 404


ZIPPED_NAMES = {  # in the folder, and in the zip file (APPNOTE.TXT, section 4.4.17.1)
    "x\\y.png": "y.png",
    "D:/C:a.png": "D_/C_a.png",
    "a\nb\t\u202e.png": "ab.png",
    "NUL/aux.png": "_NUL/_aux.png",
    "end. /b.png": "end/b.png",
    'q?/s*r"<p>|.png': "q_/s_r__p__.png",
    "same.png": "same.png",
    "sub/a.png": "sub/a.png",
}


def test_names_of_any_bytes_are_in_the_gallery_and_in_its_zip(start, tmp_path):
    folder = tmp_path / "pictures"
    names = [b"\xff.png", b"\xff\xfe.png", b"\xff\xff/a.png", b"\xff" * 250 + b".png", b"a.png"]
    fill(folder, {os.fsdecode(name): png() for name in names})
    server = start()
    server.scanned()
    assert len(server.listed()) == len(zipped(server.get("/gallery/zip"))) == len(names)


def test_names_in_a_zip_file_are_names_on_every_system(start, tmp_path):
    fill(tmp_path / "pictures", {name: png() for name in ZIPPED_NAMES})
    same = ["SAME.png", "Same.png", "e\u0301.png", "\u00e9.png", "SUB/A.png"]
    fill(tmp_path / "pictures", {name: png() for name in same})
    server = start()
    server.scanned()
    found = zipped(server.get("/gallery/zip"))
    assert len(found) == len(ZIPPED_NAMES) + len(same)
    seen = {unicodedata.normalize("NFC", name).casefold() for name in found}
    assert len(seen) == len(found)
    expected = {name.casefold() for name in ZIPPED_NAMES.values()}
    assert expected <= seen, "what is alone has its name"
    assert {name for name in ZIPPED_NAMES.values() if "s" not in name} <= {*found}


def test_a_zip_file_names_what_is_missing_in_it(start, tmp_path):
    contents = {name: png() for name in ("a.png", "gone/b.png", "other.png")}
    fill(tmp_path / "pictures", contents)
    server = start()
    server.scanned()
    (tmp_path / "pictures/gone/b.png").unlink()
    (tmp_path / "pictures/other.png").write_bytes(png())
    found = zipped(server.get("/gallery/zip"))
    note = found.pop("missing.txt").decode().splitlines()
    assert found == {"a.png": contents["a.png"]}
    assert {*note[1:]} == {"gone/b.png", "other.png"}
    assert server.get("/gallery/zip?folder=gone").status == 404


def test_a_zip_file_of_an_album_has_each_name_once_and_none_that_leads_elsewhere(server):
    user, contents = User(server), [png() for _ in range(3)]
    for content in contents:
        user.upload(content, "x.png", name="../a/x.png")
    user.upload(wav(), "b.wav", name="sound")
    for name in (".", "..", "a/.", "\u202e"):
        user.upload(png(), name=name)
    found = zipped(server.get("/gallery/zip?album=mine", **user.headers))
    files = {"file.png", "file_1.png", "file_2.png", "file_3.png"}
    assert {*found} == {"x.png", "x_1.png", "x_2.png", "sound.wav", *files}
    assert {found[name] for name in found if name.startswith("x")} == {*contents}
    assert server.get("/gallery/zip?album=mine").status == 401
    assert server.get("/gallery/zip?album=mine", **User(server).headers).status == 404


def zip_reader(*paths: Path) -> ms.ZipReader:
    app = types.SimpleNamespace(folders={"": types.SimpleNamespace(open=io.FileIO)})
    files = [ms.File("", str(path), "", *ms.state_of(path.stat()), 0.0) for path in paths]
    return ms.ZipReader([
        ms.Zipped(path.name, file.size, -1, functools.partial(ms.open_unchanged, app, file))
        for path, file in zip(paths, files, strict=True)
    ])  # fmt: skip


def read_all(reader: ms.ZipReader) -> bytes:
    made = b""
    while len(made) < reader.size:
        made += reader.read_at(len(made), reader.size - len(made))
    return made


@pytest.mark.parametrize(
    ("large", "most"), [(ms.LARGE_FILE, zipfile.ZIP64_LIMIT), (100, zipfile.ZIP64_LIMIT), (-1, 0)]
)
def test_a_zip_file_is_as_long_as_was_told_before(tmp_path, monkeypatch, large, most):
    monkeypatch.setattr(ms, "LARGE_FILE", large)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", most)  # for its directory
    contents = {"none": b"", "Größe": b"x" * 100, "b": os.urandom(3_000_000)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    made = read_all(zip_reader(*(tmp_path / name for name in contents)))
    with zipfile.ZipFile(io.BytesIO(made)) as file:
        assert {name: file.read(name) for name in file.namelist()} == contents


@pytest.mark.parametrize("content", [b"", b"shorter", b"x" * 3_000_001])
def test_a_zip_file_breaks_off_where_a_file_is_not_what_it_was(tmp_path, content):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    reader = zip_reader(tmp_path / "a")
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ConnectionAbortedError):
        read_all(reader)
    reader.close()


def test_links_are_made_listed_and_ended_in_the_page(browser, server):
    user = User(server)
    album = user.call("POST", SHELVES, {"name": "<b>Sommer"})[1]["id"]
    browser.open(server.url + "/gallery?album=all")
    sign_in(browser, user.headers["Authorization"].removeprefix("Bearer "))
    browser.click(f"#cards a[href$='album={album}']")  # not one of those before signing in
    browser.click("#places [title=Share]")
    browser.see("document.querySelector('#login [name=days]')")
    browser.run(
        "const form = document.querySelector('#login form'), {elements} = form;"
        "elements.days.value = 2; elements.linkPassword.value = 'open sesame';"
        "elements.guests.checked = true; form.requestSubmit()"
    )
    link = browser.see("document.querySelector('#login .list a')?.href")
    (share,) = user.call("GET", "/shares")[1]
    assert share["url"] == link
    assert (share["title"], share["has_password"], share["upload"]) == ("<b>Sommer", True, True)
    assert abs(seconds_of(share["expires_at"]) - time.time() - 2 * 86400) < DEADLINE
    browser.run("window.prompt = (_, url) => { window.copied = url; }")
    browser.run("navigator.clipboard.writeText = async () => { throw new Error(); }")
    browser.click("#login [title='Copy link']")
    assert browser.see("window.copied") == link
    browser.run("navigator.clipboard.writeText = async (url) => { window.copied = url; }")
    browser.click("#login [title='Copy link']")
    browser.see("document.querySelector('#login .error.good')?.textContent.includes('copied')")
    browser.click("#login [title='End this link']")
    browser.see("!document.querySelector('#login .list a')")
    assert user.call("GET", "/shares")[1] == []


def test_what_is_typed_into_a_form_is_no_command_for_the_viewer_behind_it(browser, server):
    server.upload(content := png())
    browser.open(server.url + "/gallery")
    sign_in(browser, OWNER_KEY)
    browser.see("list.can_write")
    browser.click(f"[data-sha='{sha256(content)}'] a")
    browser.click("#viewer [title=Share]")
    browser.see("document.querySelector('#login [name=linkTitle]')")
    browser.run("document.querySelector('#login [name=linkTitle]').select()")
    for key in "sif":
        browser.press(key)
    typed = "document.querySelector('#login [name=linkTitle]').value"
    assert browser.run(f"return {typed}") == "sif"
    assert not browser.run("return document.querySelector('#facts') || slideshow")
    browser.click("#login .row button")
    assert browser.run("return document.querySelector('#viewer').open")


def test_the_page_of_a_server_that_only_reads_offers_no_changes(browser, start, tmp_path):
    with start() as writer:
        writer.scanned()
        writer.put("/image/a.png", png())
        writer.put("/image/b.png", png())
        Entities(writer).create(png(), label="leaf")
    server = start(read_only="http://127.0.0.1:1")
    browser.open(server.url + "/gallery")
    sign_in(browser, OWNER_KEY)
    browser.see("document.querySelectorAll('.tile').length === 2")
    shown = "[...document.querySelectorAll('{} button')].filter((each) => each.checkVisibility())"
    titles = f"return {shown}.map((each) => each.title)"

    def offered() -> Any:
        pick = "for (const each of document.querySelectorAll('.pick[aria-pressed=false]'))"
        browser.run(f"{pick} each.click()")
        return browser.run(titles.format("#picked"))

    # What is selected before the list has come that one sees signed in, is selected no more.
    assert wait_until(offered) == ["Download", "Clear selection"]
    assert "Upload" not in browser.run(titles.format("#bar"))
    browser.click("#picked [title='Clear selection']")
    browser.click(".tile a")
    browser.see("document.querySelector('#viewer').open")
    assert {"Delete", "Share"} & {*browser.run(titles.format("#viewer"))} == set()
    browser.open(server.url + "/gallery?album=all")
    cards = "return [...document.querySelectorAll('#cards b')].map((each) => each.textContent)"
    browser.see("document.querySelector('#cards a')")
    assert browser.run(cards) == ["Archive"]


def test_a_private_album_asks_to_sign_in_and_a_link_with_the_key_does(browser, start):
    need("PIL")
    server = start(READ_AUTH_ENABLED="true")
    server.put("/image/mine.png", content := png(300, 200))
    browser.open(server.url + "/gallery")
    assert "private" in browser.see("document.querySelector('#empty').innerText")
    browser.click("#folders")  # of which nothing is told
    browser.open("about:blank")
    browser.open(f"{server.url}/gallery#{urlencode({'key': OWNER_KEY})}")
    browser.see(f"document.querySelector('[data-sha=\"{sha256(content)}\"] img')?.naturalWidth")
    assert browser.run("return location.hash") == ""
    browser.click("#account")
    assert "private" in browser.see("document.querySelector('#empty').innerText")


def test_who_has_an_upload_link_adds_to_a_private_album(browser, start, tmp_path):
    server = start(READ_AUTH_ENABLED="true")
    (tmp_path / "mine.png").write_bytes(content := png())
    browser.open(f"{server.url}/gallery?token={upload_token()}")
    assert "private" in browser.see("document.querySelector('#empty').innerText")
    assert browser.run("return document.querySelector('#upload').checkVisibility()")
    browser.choose_files("#files", tmp_path / "mine.png")
    browser.see("document.querySelector('#uploads li')?.className === 'stored'")
    assert server.get(f"/image/{sha256(content)}", **OWNER).body == content


def test_an_account_stays_signed_in_over_a_reload_and_is_refreshed_quietly(browser, start):
    server = start(READ_AUTH_ENABLED="true", JWT_ACCESS_TOKEN_LIFETIME_MINUTES="1")
    server.put("/image/mine.png", png())
    user = User(server)
    user.login()
    assert owner_says(server, "user", "grant", user.name, "media_store_read").returncode == 0
    browser.open(server.url + "/gallery")
    browser.click("#account")
    fill_in = (
        "const form = document.querySelector('#login form');"
        "form.elements.name.value = arguments[0]; form.elements.password.value = arguments[1];"
        "form.elements.stay.checked = true; form.requestSubmit()"
    )
    browser.run(fill_in, user.name, "wrong")
    assert browser.see("document.querySelector('#login .error').textContent")
    browser.run(fill_in, user.name, user.password)
    browser.see("document.querySelector('.tile')")
    access = browser.run("return JSON.parse(localStorage.mediaserver).access")
    browser.open(server.url + "/gallery?q=mine")  # less than a minute is left: a new one is taken
    browser.see("document.querySelector('.tile')")
    browser.see("JSON.parse(localStorage.mediaserver).access !== arguments[0]", access)
    browser.click("#account")
    assert "private" in browser.see("document.querySelector('#empty').innerText")
    assert browser.run("return localStorage.mediaserver") is None


def test_hostile_names_are_text_in_the_page_and_keep_its_shape(browser, start, tmp_path):
    names = ['<img src=x onerror="window.hacked=1">\u202e&amp;.png', "תמונה (1).png", "صورة.png",
             "a\nb\t'\"`${window.hacked=1}.png", f"{'w' * 250}.png"]  # fmt: skip
    fill(tmp_path / "pictures" / "<b>קיץ", {name: png() for name in names})
    server = start()
    server.scanned()
    browser.open(server.url + "/gallery?order=name")
    browser.click("#folders")
    browser.see("document.querySelectorAll('.tile').length === 5")
    browser.click(".tile a")
    shown = set()
    for _ in names:
        title = browser.see("document.querySelector('#viewer h2')?.textContent")
        shown.add(title)
        direction = "return getComputedStyle(document.querySelector('#viewer h2')).direction"
        assert browser.run(direction) == ("rtl" if title[0] in "תص" else "ltr")
        if len(shown) < len(names):
            browser.press(RIGHT)
            browser.see("document.querySelector('#viewer h2').textContent !== arguments[0]", title)
    assert shown == set(names)
    assert browser.run("return window.hacked") is None
    assert not browser.run("return document.querySelector('img[src=x], #places b')")
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize(
    ("accept", "page"),
    [
        ("text/html,*/*;q=0.8", True), ("text/html", True), ("*/*", False),
        ("text/html;q=0", False), ("application/json, text/html;q=0.1", False),
        ("application/json;q=0.5,text/html", True),
    ],
)  # fmt: skip
def test_the_page_is_for_those_who_like_it_no_less_than_json(server, accept, page):
    answer = server.get("/", Accept=accept)
    assert answer.headers["Content-Type"].startswith("text/html") is page


@pytest.mark.parametrize("path", ["/list", "/media"])
def test_lists_are_no_downloads(server, path):
    assert "Content-Disposition" not in server.get(path).headers


def test_in_demo_mode_everyone_is_the_demo_user(start):
    running = start(auth_disabled="true")
    profile = running.get("/api/auth/profile/").json
    assert (profile["id"], profile["username"]) == (0, "demo")
    change = {"old_password": "a", "new_password": "long enough 1"}
    assert running.call("POST", "/api/auth/password", change)[0] == 400


def test_a_large_album_has_only_what_is_in_view_in_its_document(browser, start, tmp_path):
    folder = tmp_path / "pictures"
    fill(folder, {f"{number}.png": png() for number in range(600)})
    for number in range(600):
        moment = 1_500_000_000 + number * 400_000
        os.utime(folder / f"{number}.png", (moment, moment))
    server = start()
    server.scanned()
    browser.open(server.url + "/gallery")
    browser.see("document.querySelectorAll('.tile').length > 10")
    assert browser.run("return document.querySelectorAll('.tile').length") < 200
    assert browser.run("return document.documentElement.scrollHeight") > 5000
    browser.run("window.scrollTo(0, 1e9)")
    browser.see("document.querySelector(\"[aria-label$=', 0.png']\")")
    assert browser.run("return document.querySelectorAll('.tile').length") < 200
    assert browser.run("return document.querySelectorAll('#scrubber span').length") > 4
    box = browser.run("return document.querySelector('#scrubber').getBoundingClientRect()")
    x, middle = int(box["x"]) + 20, int(box["y"] + box["height"] / 2)
    browser.touch([(x, middle + 100), (x, middle)])
    share = "window.scrollY / (document.documentElement.scrollHeight - window.innerHeight)"
    assert 0.4 < browser.run(f"return {share}") < 0.6


@contextlib.contextmanager
def under_a_path(server: Server, prefix: str) -> Iterator[str]:
    """The server below a path of another one, which takes the path off."""

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path.startswith(prefix), self.path
            path = self.path.removeprefix(prefix) or "/"
            answer = server.get(path, Accept=self.headers["Accept"])
            self.send_response(answer.status)
            for name in ("Content-Type", "Content-Security-Policy", "Content-Length"):
                if name in answer.headers:
                    self.send_header(name, answer.headers[name])
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{proxy.server_port}{prefix}"
        proxy.shutdown()
        thread.join()


@pytest.mark.parametrize("place", ["", "/", "/gallery"])
def test_the_page_works_under_a_path(browser, server, place):
    server.put("/image/a.png", content := png())
    with under_a_path(server, "/our/album") as url:
        browser.open(url + place)
        browser.click(f"[data-sha='{sha256(content)}'] a")
        browser.see("document.querySelector('#viewer').open")
        docs = browser.run("return document.querySelector('footer a').href")
        assert docs == f"{url}/docs"


@pytest.fixture(scope="module")
def phone():
    """A small window of somebody who touches it and reads German."""
    screen = {"deviceMetrics": {"width": 360, "height": 740, "pixelRatio": 2, "touch": True}}
    browser = Browser(mobileEmulation=screen, prefs={"intl.accept_languages": "de-AT"})
    try:
        yield browser
        assert browser.complaints() == []
    finally:
        browser.close()


def test_the_page_fits_a_phone_and_speaks_german_there(phone, album):
    phone.open(album.url + "/gallery")
    phone.see("document.querySelector('.tile')")
    assert phone.run("return document.documentElement.scrollWidth") <= 360
    assert phone.run("return document.documentElement.lang") == "de"
    assert phone.run("return document.querySelector('#upload').title") == "Hochladen"
    phone.click(".tile a")
    phone.see("document.querySelector('#viewer').open")


def test_fingers_go_on_zoom_and_close_the_viewer(phone, album):
    item = album.get("/gallery/items?group=2023-11").json["items"][2]
    assert item[1] == "a/b/new.png"
    phone.open(f"{album.url}/gallery?group=2023-11&item={item[0]}")
    phone.see(TITLE_SHOWN, "new.png")
    phone.touch([(300, 400), (180, 400), (60, 405)])
    phone.see(TITLE_SHOWN, "old.png")
    phone.touch([(60, 400), (180, 400), (300, 395)])
    phone.see(TITLE_SHOWN, "new.png")
    phone.touch([(170, 400), (140, 400), (80, 400)], [(190, 400), (220, 400), (280, 400)])
    scale = "new DOMMatrix(document.querySelector('#view > img').style.transform).a"
    assert phone.see(f"{scale} > 2 && {scale}") <= 8
    phone.touch([(300, 400), (60, 400)])  # moves what is large
    assert phone.run(f"return {TITLE_SHOWN}", "new.png")
    phone.touch([(180, 380), (170, 380), (60, 380)], [(185, 380), (190, 380), (300, 380)])
    phone.run("document.querySelector('#view > img').ondblclick({clientX: 180, clientY: 400})")
    phone.see(f"{scale} === 1")
    phone.touch([(180, 300), (180, 450), (185, 620)])
    phone.see("!document.querySelector('#viewer').open")


# ======================================================================================
# 14. Command line
# ======================================================================================
# -- verify


def fill_families(server: Server) -> dict[str, Path]:
    """Store a file by every way in; where they lie, by the name of the folder or endpoint."""
    day = server.put("/image/put.png", png()).json["file_path"]
    media = server.upload(png()).json["filename"]
    private = server.store(png(), "private.png").json["stored_as"]
    status, record = User(server).upload(png())
    assert status == 201
    item = Entities(server).create(png())
    fill(server.storage, {"2024/scanned é.png": png(), "2024/same.png": (content := png()),
                          "2025/same.png": content})  # fmt: skip
    server.rescan()
    return {
        "library": server.storage / "2024/scanned é.png",
        "put": server.storage / day,
        "media": server.storage / "media" / media,
        "images": server.data / "images" / private,
        "users": server.data / f"users/{record['user']}" / record["storage_path"],
        "entities": server.data / "entities" / item["file_path"],
    }


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, but for the index and what a server makes by itself."""
    by_itself = re.compile(r"/index\.|thumbnails/|previews/|/lock$|spare$")
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in paths
        if not by_itself.search(str(path))
    }


def everything_in(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file below a folder of no server, but for what SQLite needs while it reads."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in paths
        if not path.name.endswith(("-wal", "-shm"))
    }


def run_here(*words: object, status: int = 0) -> str:
    """Standard output of a command that is run in this process, which saves a start of Python."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert ms.main(list(map(str, words))) == status, output.getvalue()
    return output.getvalue()


def run_verify(folder: Path, *options: str, status: int = 0) -> Any:
    """The JSON answer of the command; nothing is changed by it."""
    before = tree(folder)
    told = run_here("verify", folder, "--json", *options, status=status)
    assert tree(folder) == before
    return json.loads(told)


def rot(path: Path) -> None:
    """Change a byte and nothing that people see of a file."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_verify_finds_all_well_while_the_server_runs_and_names_duplicates(start):
    running = start()
    kept = fill_families(running)
    ended = run_program("verify", "--storage_dir", running.storage, cwd=running.storage.parent)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.search(r"^duplicate: 2024/same.png = 2025/same.png$", ended.stdout, re.M)
    assert re.search(r"^8 files, .* read at .*: all is as it was taken in$", ended.stdout, re.M)
    told = run_verify(running.storage)
    assert (told["ok"], told["files"], told["damaged"]) == (True, 8, [])
    assert told["bytes"] > sum(path.stat().st_size for path in kept.values())


def test_verify_tells_rot_from_edits_and_names_what_is_missing_unknown_and_orphaned(start):
    running = start()
    kept = fill_families(running)
    running.stop()
    kept_sha = sha256(kept["media"].read_bytes())
    for name in ("library", "images", "users", "entities"):
        rot(kept[name])
    kept["put"].write_bytes(png(9, 9))
    kept["media"].unlink()
    stray = running.data / "entities/2020/stray.jpg"
    shown = running.storage / ".thumbnails" / f"{'0' * 64}.png"
    larger = running.data / "previews" / f"{'0' * 64}-720.webp"
    unseen = running.storage / os.fsdecode(b"unseen \xff.jpg")
    known = running.storage / ".thumbnails" / f"{kept_sha}.png"
    fill(Path("/"), {str(path)[1:]: png() for path in (stray, shown, larger, unseen, known)})
    before = everything_in(running.storage)
    told = run_verify(running.storage, status=1)
    assert everything_in(running.storage) == before
    damaged = {str(kept[name]) for name in ("library", "images", "users", "entities")}
    assert (told["ok"], set(told["damaged"]), told["missing"]) == (
        False, damaged, [str(kept["media"])],
    )  # fmt: skip
    assert (told["edited"], told["unknown"]) == ([str(kept["put"])], [str(unseen)])
    assert (told["orphaned"], told["unreadable"]) == ([str(stray), str(shown), str(larger)], [])
    named = run_program("verify", running.storage, cwd=running.storage.parent)
    assert named.returncode == 1
    wrong = {*damaged, *map(str, (kept["media"], kept["put"], stray, shown, larger, unseen))}
    found = re.findall(r"^\w+: (/.*?): ", named.stdout, re.M)
    assert {*found} >= {*map(ms.printable_line, wrong)}


def test_verify_of_late_files_only_looks_at_the_others_and_keeps_to_a_rate(start):
    running = start()
    kept = fill_families(running)
    running.stop()
    rot(kept["entities"])
    kept["library"].unlink()
    told = run_verify(running.storage, "--since", "0", status=1)
    assert (told["bytes"], told["damaged"], told["missing"]) == (0, [], [str(kept["library"])])
    told = run_verify(running.storage, "--since=1", "--limit-rate", "8K", status=1)
    assert told["damaged"] == [str(kept["entities"])]
    assert told["seconds"] > 0.9 * told["bytes"] / 8192 > 0


@pytest.mark.parametrize("is_terminal", [True, False])
def test_verify_tells_how_far_it_is_in_one_line_of_a_terminal_or_in_plain_ones(
    tmp_path, monkeypatch, capsys, is_terminal
):
    fill(tmp_path, {"pictures/a.png": png_of(6000), "pictures/b.png": png_of(2000)})
    with Server(tmp_path / "pictures") as running:
        running.scanned()
    monkeypatch.setattr(ms, "PROGRESS_SECONDS" if is_terminal else "LINE_SECONDS", 0)
    terminal, own = os.openpty()
    with open(own, "w", encoding="utf-8") as screen:
        with contextlib.redirect_stderr(screen if is_terminal else sys.stderr):
            run_here("verify", running.storage)
        said = capsys.readouterr().err
        print("end", file=screen, flush=True)
        while is_terminal and not said.endswith("end\r\n"):
            said += os.read(terminal, 4096).decode()
    os.close(terminal)
    line = r"\d+ % of 8000 bytes, [\d.e+]+ \w+/s, \d+ s left"
    found = [each[0] for each in re.finditer(line, said)]
    assert len(found) == 2, said
    assert found[-1].startswith("100 %") and found[-1].endswith(" 0 s left")
    rest = re.sub(line, "", said)
    shown = "\r\x1b[K" * 3 + "end\r\n"  # drawn over, and cleared for what is found
    assert rest == (shown if is_terminal else "mediaserver: \n" * 2)


def test_a_disk_that_is_away_is_one_thing_that_verify_names(start, tmp_path):
    running = start(database_dir=str(tmp_path / "data"))
    fill(running.storage, {"a.png": png(), "b.png": png()})
    running.rescan()
    running.stop()
    running.storage.rename(tmp_path / "away")
    running.storage.mkdir()
    options = ("--database_dir", str(tmp_path / "data"))
    assert run_verify(running.storage, *options, status=1)["missing"] == [str(running.storage)]


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["verify"], 1, "there is no index"),
        (["verify", "--since", "soon"], 2, "--since: 'soon' is not a number of days"),
        (["verify", "--limit-rate", "0"], 2, "--limit_rate: '0' is no number of bytes a second"),
        (["token", "--json"], 2, "--json: is no option of token"),
        (["--json", "verify"], 2, "a command's own follow its name"),
        (["token", ".", "--json"], 2, "--json: is no option of token"),
        (["verify", "--jso"], 2, "--jso: is no option of verify"),
        (["user", "grant", "x"], 2, "required: PERMISSION"),
        (["migrate", "videos", "--to", "/x"], 2, "invalid choice: 'videos'"),
        (["/"], 2, "/ is one folder too many"),
    ],
)
def test_a_command_says_what_it_cannot_use_and_makes_nothing(tmp_path, words, status, told):
    folder = tmp_path / "pictures"
    folder.mkdir()
    ended = run_program(*words, "--storage_dir", folder, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (status, "")
    assert told in ended.stderr
    assert not list(folder.iterdir())


# -- backup and restore

DIES = """
import os, sys, mediaserver
left, read, unlink = [int(sys.argv[1])], mediaserver.read_blocks, mediaserver.Place.unlink
def count():
    left[0] -= 1
    left[0] or os.kill(os.getpid(), 9)
def blocks(*given):
    for block in read(*given):
        count()
        yield block
def gone(place):
    count()
    unlink(place)
if sys.argv[2] == "trash":
    mediaserver.Place.unlink = gone
else:
    mediaserver.read_blocks = blocks
sys.exit(mediaserver.main(sys.argv[2:]))
"""


def run_killed(blocks: int, *words: object, cwd: Path) -> None:
    """Run a command that is killed at so many blocks that it reads, or files that go."""
    arguments = [sys.executable, "-c", DIES, blocks, *words]
    environment = {**BARE_ENVIRONMENT, "PYTHONPATH": str(HERE)}
    ended = subprocess.run(list(map(str, arguments)), cwd=cwd, env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL


def make_backup(running: Server, place: Path, status: int = 0) -> Path:
    """Back up a folder; the new backup."""
    run_here("backup", place, "--storage_dir", running.storage, status=status)
    return max(place.iterdir())


def answers(running: Server) -> dict[str, Any]:
    """What every family says of its files, and the files."""
    status, tokens = running.call("POST", LOGIN, {"email": EMAIL, "password": "12345678"})
    assert status == 200
    records = running.get(MEDIA, Authorization=f"Bearer {tokens['access']}").json["results"]
    items = running.get("/entity/").json["items"]
    media = running.get("/media").json["files"]
    paths = [f"/image/{digest}" for digest in running.listed()]
    paths += [f"/media/{item['filename']}" for item in media]
    paths += [f"/entity/{item['id']}/file" for item in items]
    paths += ["/image/private.png", *(local(item["file"]) for item in records)]
    contents = {path.partition("?")[0]: running.get(path, **OWNER).body for path in paths}
    return {"contents": contents, "entities": items, "records": [item["id"] for item in records]}


EMAIL = "jane@backup.example"


@pytest.fixture
def filled(start) -> Server:
    """A server with a file of every family."""
    running: Server = start()
    fill_families(running)
    words = {"email": EMAIL, "password": "12345678"}
    status, user = running.call("POST", REGISTER, words)
    assert status == 201
    headers = bearer(user_id=user["id"])
    made = running.send_file("POST", MEDIA, png(), "own.png", headers=headers, name="own")
    assert made.status == 201
    return running


def test_every_command_that_tells_something_tells_it_as_json_too(filled, tmp_path):
    entities = Entities(filled)
    entities.patch(entities.create(png())["id"], is_deleted=True)
    filled.call("POST", LOGIN, {"email": EMAIL, "password": "12345678"})
    fill(tmp_path / "old", {"a/b.png": png(), "c.txt": b"x"})
    backups, new = tmp_path / "backups", tmp_path / "new"
    missing = {}
    for words, expected in {
        ("user", "list"): {"id", "email", "username", "state", "size", "permissions"},
        ("user", "sessions", EMAIL): {"id", "created_at", "last_used_at", "user_agent"},
        ("trash", "list"): {"kind", "id", "deleted_at", "size", "user_id", "name"},
        ("import", tmp_path / "old", "--dry-run"): {"outcome", "name", "detail"},
        ("trash", "empty"): {"removed", "bytes"},
        ("verify",): {"ok", "files", "bytes", "seconds", "duplicates", "damaged", "orphaned"},
        ("backup", backups): {"ok", "files", "bytes", "seconds", "place", "copied", "changed"},
        ("migrate", "images", "--to", tmp_path / "box"): {"ok", "files", "copied", "then"},
        ("restore", backups): {"ok", "files", "bytes", "seconds", "duplicates", "missing"},
    }.items():
        storage = new if words[0] == "restore" else filled.storage
        told = json.loads(run_here(*words, "--json", "--storage_dir", storage))
        missing[words] = expected - set(told[0] if isinstance(told, list) else told)
    assert {words: names for words, names in missing.items() if names} == {}
    assert told["ok"] is True


def test_a_backup_of_a_running_server_can_be_served_and_a_second_one_costs_what_is_new(
    filled, start, tmp_path
):
    told, place = answers(filled), tmp_path / "backups"
    first = make_backup(filled, place)
    fill(filled.storage, {"late.png": png()})
    filled.rescan()
    (filled.storage / "2024/same.png").unlink()
    filled.rescan()
    again = json.loads(run_here("backup", place, "--json", "--storage_dir", filled.storage))
    second = Path(again["place"])
    assert again["copied"] == (filled.storage / "late.png").stat().st_size
    assert sorted(place.iterdir()) == [first, second]
    assert place.stat().st_mode & 0o77 == 0
    hashes = (second / ".mediaserver" / "manifest.sha256").read_bytes()
    checked = subprocess.run(["sha256sum", "-c", "--quiet"], cwd=second, input=hashes, check=True)
    assert checked.returncode == 0
    known = {os.fsdecode(line[66:]) for line in hashes.splitlines()}
    files = {str(path.relative_to(second)) for path in second.rglob("*") if path.is_file()}
    data = {".mediaserver/index.sqlite3", ".mediaserver/manifest.sha256"}
    assert files - known == data
    assert "late.png" in known
    assert "2024/same.png" not in known
    shared = {path.stat().st_ino for path in first.rglob("*")}
    assert {(second / name).stat().st_ino for name in known - {"late.png"}} <= shared
    assert run_verify(second, status=0)["ok"]
    served = start(storage=str(first))
    served.scanned()
    assert answers(served) == told


def test_a_backup_that_was_killed_is_no_backup_and_goes_on(filled, tmp_path, capsys):
    filled.stop()
    place = tmp_path / "backups"
    for blocks in (1, 5):
        run_killed(blocks, "backup", place, filled.storage, cwd=tmp_path)
        (left,) = place.iterdir()
        assert left.name.endswith(".partial")
        assert len(list(left.rglob("*.png"))) == blocks - 1
    run_here("restore", place, "--storage_dir", tmp_path / "new", status=1)
    assert "there is no backup" in capsys.readouterr().err
    lost = next(left.rglob("*.png"))  # what was not on disk yet when power was cut
    lost.write_bytes(bytes(lost.stat().st_size))
    kept = sum(path.stat().st_size for path in left.rglob("*.png") if path != lost)
    told = json.loads(run_here("backup", place, "--json", "--storage_dir", filled.storage))
    (made,) = place.iterdir()
    assert kept > 0 and told["copied"] == told["bytes"] - kept
    assert run_verify(made)["files"] == 9


@pytest.mark.parametrize("blocks", [1, 3, 4, 6])
def test_an_import_that_was_killed_goes_on_and_takes_in_everything_once(tmp_path, blocks):
    source, storage = tmp_path / "old", tmp_path / "pictures"
    storage.mkdir()
    contents = {f"{n}.png": png() for n in range(4)}
    fill(source, {f"sub/{name}": content for name, content in contents.items()})
    run_killed(blocks, "import", source, "--storage_dir", storage, cwd=tmp_path)
    told = run_here("import", source, "--storage_dir", storage)
    outcomes = Counter(line.split("\t")[0] for line in told.splitlines())
    assert outcomes["new"] + outcomes["here"] == len(contents)
    taken = [path.read_bytes() for path in sorted(storage.glob("imported/**/*.png"))]
    assert taken == [*contents.values()]


@pytest.mark.parametrize("files", [1, 2, 3, 5])
def test_a_trash_that_is_emptied_when_it_is_killed_leaves_nothing_and_takes_nothing_else(
    start, tmp_path, files
):
    running = start()
    jane, john, contents = User(running), User(running), [png() for _ in range(3)]
    for content in contents:
        record = jane.upload(content)[1]
        assert jane.call("DELETE", f"{MEDIA}{record['id']}/")[0] == 204
        assert john.upload(content)[0] == 201
    running.stop()
    run_killed(files, "trash", "empty", "--storage_dir", running.storage, cwd=tmp_path)
    run_here("trash", "empty", "--storage_dir", running.storage)
    again = start()
    again.scanned()
    assert jane.files() == []
    assert {path.read_bytes() for path in john.files()} == {*contents}
    assert (run_verify(running.storage)["orphaned"], trash(again, "list")) == ([], "")


def test_a_restore_on_another_machines_paths_goes_on_after_a_kill_and_is_verified(
    filled, start, tmp_path, capsys
):
    told = answers(filled)
    make_backup(filled, tmp_path / "backups")
    filled.stop()
    paths = {name: tmp_path / "machine" / name for name in (
        "storage_dir", "database_dir", "upload_dir", "media_storage_dir")}  # fmt: skip
    options = [word for name, path in paths.items() for word in (f"--{name}", path)]
    storage = str(paths["storage_dir"])
    elsewhere = {name: str(path) for name, path in paths.items() if name != "storage_dir"}
    start(storage=storage, **elsewhere).stop()  # a service that has just been installed
    run_killed(5, "restore", tmp_path / "backups", *options, cwd=tmp_path)
    with contextlib.closing(sqlite3.connect(paths["database_dir"] / "index.sqlite3")) as index:
        assert not index.execute("SELECT * FROM file").fetchall()
    told_by_verify = run_here("restore", tmp_path / "backups", *options)
    assert re.search(r"^9 files, .*: all is as it was taken in$", told_by_verify, re.M)
    run_here("restore", tmp_path / "backups", *options, status=1)
    assert "knows files already" in capsys.readouterr().err
    served = start(storage=storage, **elsewhere)
    with contextlib.closing(sqlite3.connect(paths["database_dir"] / "index.sqlite3")) as index:
        known = index.execute("SELECT path, ctime FROM file WHERE root = 'library'").fetchall()
    served.scanned()  # which reads none again
    assert {(Path(storage) / os.fsdecode(path)).stat().st_ctime for path, _ in known} == {
        ctime for _, ctime in known
    }
    assert answers(served) == told


def test_a_restore_brings_back_the_trash_older_versions_and_links(start, tmp_path):
    running, older, later, shown = start(), png(), png(), png()
    jane, entities = User(running), Entities(running)
    trashed = jane.upload(older)[1]["id"]
    assert jane.call("DELETE", f"{MEDIA}{trashed}/")[0] == 204
    item = entities.create(older)
    entities.send("PUT", f"{item['id']}", later)
    running.upload(shown)
    link = share(running, kind="file", target=sha256(shown), password="guests")
    make_backup(running, tmp_path / "backups")
    run_here("restore", tmp_path / "backups", "--storage_dir", tmp_path / "new")
    again = start(storage=str(tmp_path / "new"))
    again.scanned()
    old = again.get(f"/entity/{item['id']}/file?version=1", **OWNER).body
    assert (old, Entities(again).content(item["id"])) == (older, later)
    trash(again, "restore", trashed)
    record = jane.on(again).call("GET", f"{MEDIA}{trashed}/")[1]
    assert again.get(local(record["file"])).body == older
    assert shared(again, link) == 401
    words = {"Content-Type": "application/x-www-form-urlencoded"}
    opened = again.request("POST", local(link["url"]), "password=guests", words)
    cookie = opened.headers["Set-Cookie"].partition(";")[0]
    (file,) = shared(again, link, cookie=cookie)
    assert again.get(local(file["url"]), cookie=cookie).body == shown


def test_a_backup_has_the_good_copy_of_what_rots_and_the_new_one_of_what_is_edited(
    filled, tmp_path
):
    place, edited = tmp_path / "backups", filled.storage / "2024/same.png"
    scanned = filled.storage / "2024/scanned é.png"
    filled.stop()
    first = make_backup(filled, place)
    good_scan = scanned.read_bytes()
    good = (filled.storage / "2025/same.png").read_bytes()
    edited.write_bytes(png(8, 8))
    rot(scanned)
    with filled.index() as index:
        values = (scanned.stat().st_ctime, "2024/scanned é.png".encode())  # rot changes no ctime
        index.execute("UPDATE file SET ctime = ? WHERE path = ?", values)
    second = make_backup(filled, place)
    assert (second / "2024/same.png").read_bytes() == edited.read_bytes()
    assert (second / "2025/same.png").read_bytes() == good
    assert (first / "2024/same.png").read_bytes() == good
    digest = sha256(edited.read_bytes()).encode()
    manifest = (second / ".mediaserver" / "manifest.sha256").read_bytes()
    assert digest + b"  2024/same.png\n" in manifest
    assert (second / "2024/scanned é.png").read_bytes() == good_scan


def test_what_rotted_before_the_first_backup_is_named_by_each(filled, tmp_path):
    filled.stop()
    rotten = filled.storage / "2024/scanned é.png"
    rot(rotten)
    for _ in range(2):
        made = make_backup(filled, tmp_path / "backups", status=1)
        assert (made / "2024/scanned é.png").read_bytes() == rotten.read_bytes()
        assert run_verify(made)["edited"] == [str(made / "2024/scanned é.png")]


def cut_manifest(backup: Path, at: int) -> None:
    path = backup / ".mediaserver" / ms.MANIFEST
    path.write_bytes(path.read_bytes()[:at])


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def forget(backup: Path) -> None:
    """Have it that a file was gone when it was to be backed up."""
    (backup / "2024/same.png").unlink()
    path = backup / ".mediaserver" / ms.MANIFEST
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if b"2024/same.png" not in line))


NEWLINE = "2024/new\nline\\.png"
DAMAGE: Mapping[str, tuple[Callable[[Path], object], str, str]] = {
    "rotten": (lambda b: rot(b / "2024/same.png"), "damaged", "2024/same.png"),
    "cut": (lambda b: (b / "2024/same.png").write_bytes(b"\x89PNG"), "damaged", "2024/same.png"),
    "rotten name": (lambda b: rot(b / NEWLINE), "damaged", "2024/new?line\\.png"),
    "private": (lambda b: rot(b / ".mediaserver/images/private.png"), "damaged", "private.png"),
    "gone": (lambda b: (b / "2024/same.png").unlink(), "missing", "2024/same.png"),
    "gone before": (forget, "missing", "2024/same.png"),
    "link": (
        lambda b: replace(b / "2024/same.png", lambda p: p.symlink_to("/etc/passwd")),
        "unreadable", "2024/same.png",
    ),
    "fifo": (lambda b: replace(b / "2024/same.png", os.mkfifo), "missing", "2024/same.png"),
    "more": (lambda b: fill(b, {"2024/more.png": png()}), "changed", "2024/more.png"),
    "no manifest": (lambda b: replace(b / ".mediaserver" / ms.MANIFEST, id), "missing", "256"),
    "a FIFO as manifest": (
        lambda b: replace(b / ".mediaserver" / ms.MANIFEST, os.mkfifo), "missing", "256",
    ),
    "half a line": (lambda b: cut_manifest(b, -9), "damaged", "manifest.sha256"),
    "a line less": (lambda b: cut_manifest(b, 0), "damaged", "manifest.sha256"),
}  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backup of a server with files of several families, and a name with a new line."""
    storage = tmp_path_factory.mktemp("kept") / "pictures"
    with Server(storage, "--workers", "1") as running:
        fill_families(running)
        fill(storage, {NEWLINE: png()})
        running.rescan()
        return make_backup(running, storage.parent / "backups")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_restore_names_what_is_not_as_it_was_backed_up(kept, tmp_path, damage):
    backup, (harm, word, name) = tmp_path / "backup", DAMAGE[damage]
    shutil.copytree(kept, backup)
    harm(backup)
    told = run_here("restore", backup, "--storage_dir", tmp_path / "new", status=1)
    assert re.search(rf"^{word}: .*{re.escape(name)}: ", told, re.M), told
    named = re.findall(rf"^(?!duplicate|(missing|{word}): .*{re.escape(name)})\w+: .*", told, re.M)
    assert not named, "and nothing else"
    if word != "missing":
        assert run_verify(tmp_path / "new", status=1 if damage == "link" else 0)


@pytest.mark.parametrize("size", [0, 100, 5000, 40_000])
def test_a_restore_says_that_the_index_of_a_backup_is_damaged(kept, tmp_path, capsys, size):
    shutil.copytree(kept, tmp_path / "backup")
    os.truncate(tmp_path / "backup/.mediaserver/index.sqlite3", size)
    run_here("restore", tmp_path / "backup", "--storage_dir", tmp_path / "new", status=1)
    assert "the index is damaged" in capsys.readouterr().err


def test_a_restore_names_what_the_index_of_a_backup_has_lost(kept, tmp_path):
    shutil.copytree(kept, backup := tmp_path / "backup")
    with contextlib.closing(sqlite3.connect(backup / ".mediaserver/index.sqlite3")) as db, db:
        db.execute("DELETE FROM file WHERE path = ?", (b"2024/same.png",))
    told = run_here("restore", backup, "--storage_dir", tmp_path / "new", status=1)
    assert re.search(r"^damaged: .*/2024/same.png: the index does not have it", told, re.M)


def test_a_copy_of_the_index_knows_nothing_of_one_that_was_there(tmp_path):
    with contextlib.closing(ms.open_index(tmp_path / "index.sqlite3")) as index:
        index.set_meta("word", "old")
        index.copy_to(tmp_path / "copy")
        with contextlib.closing(ms.Index(tmp_path / "copy")) as copy:
            copy.set_meta("word", "of a copy that was killed")
            left = (tmp_path / "copy-wal").read_bytes()
        (tmp_path / "copy-wal").write_bytes(left)
        (tmp_path / "copy.new").write_bytes(b"begun")
        index.copy_to(tmp_path / "copy")
    with contextlib.closing(ms.Index(tmp_path / "copy")) as copy:
        assert copy.get_meta("word") == "old"


def test_what_is_deleted_while_it_is_backed_up_is_no_part_of_the_backup(
    filled, tmp_path, monkeypatch
):
    (item,) = filled.get("/entity/").json["items"]
    gone = Path(item["file_path"]).name

    def delete() -> None:
        assert filled.request("DELETE", f"/entity/{item['id']}", headers=OWNER).status == 200

    monkeypatch.setattr(ms, "read_blocks", after(ms.read_blocks, delete))
    made = make_backup(filled, tmp_path / "backups")
    assert list((tmp_path / "backups").iterdir()) == [made]
    assert not list(made.rglob(gone))
    assert run_verify(made)["files"] == 8


def test_backups_and_restores_that_cannot_be_are_refused_before_anything_is_made(
    filled, tmp_path, capsys
):
    inside = filled.storage / "backups"
    empty, partial = tmp_path / "empty", tmp_path / "2026-01-01T000000Z.partial"
    empty.mkdir()
    fill(partial, {".mediaserver/index.sqlite3": b""})
    fill(filled.data, {"index.sqlite3.partial": b""})  # as a restore that was interrupted left it
    whole = make_backup(filled, tmp_path / "backups")
    table = (
        (["backup", inside, "--storage_dir", filled.storage], "of which it is to be a backup"),
        (["restore", empty, "--storage_dir", tmp_path / "new"], "there is no backup"),
        (["restore", partial, "--storage_dir", tmp_path / "new"], "is not whole"),
        (["restore", whole, "--storage_dir", tmp_path], "is not empty"),
        (["restore", whole, "--storage_dir", filled.storage], "knows files already"),
        (["backup", "/dev/null/x", "--storage_dir", filled.storage], "cannot be used"),
    )
    said = [(run_here(*words, status=1), capsys.readouterr().err) for words, _ in table]
    assert [why for (_, why), (_, err) in zip(table, said, strict=True) if why not in err] == []
    assert not inside.exists()
    assert not (tmp_path / "new").exists()


# -- trash


def trash(running: Server, *words: str, status: int = 0) -> str:
    """What a command says on standard output."""
    return run_here("trash", *words, "--storage_dir", running.storage, status=status)


def test_what_is_trashed_comes_back_as_it_was_or_goes_with_what_nothing_else_needs(start):
    running = start()
    jane, entities, shared, own = User(running), Entities(running), png(), png()
    first, second = (jane.upload(shared)[1] for _ in range(2))
    picture = entities.create(own, label="own")
    older, later = png(), png()
    versioned = entities.create(older)
    entities.send("PUT", f"{versioned['id']}", later)
    heir = entities.create(older)  # which has the file of the other's first version
    assert jane.call("DELETE", f"{MEDIA}{first['id']}/")[0] == 204
    for item in (picture, versioned):
        entities.patch(item["id"], is_deleted=True)
    entities.patch(picture["id"], label="changed in the trash")
    listed = json.loads(trash(running, "list", "--json"))
    ids = [first["id"], str(picture["id"]), str(versioned["id"])]
    assert [(item["kind"], item["id"]) for item in listed] == [
        ("media", ids[0]), ("entity", ids[1]), ("entity", ids[2]),
    ]  # fmt: skip
    assert [item["size"] for item in listed] == [len(shared), len(own), len(later)]
    entities.create(own, expect=409)  # it is still there

    trash(running, "restore", ids[0].upper(), ids[1])
    assert jane.listed()["count"] == 2
    record = jane.call("GET", f"{MEDIA}{first['id']}/")[1]
    assert running.get(local(record["file"])).body == shared
    assert running.get(f"/entity/{picture['id']}/file", **OWNER).body == own
    assert not entities.get(picture["id"])["is_deleted"]
    trash(running, "restore", ids[0], status=1)

    assert jane.call("DELETE", f"{MEDIA}{first['id']}/")[0] == 204
    entities.patch(picture["id"], is_deleted=True)
    assert trash(running, "empty", "--older-than", "1").startswith("0 removed")
    assert trash(running, "empty").startswith("3 removed")
    assert trash(running, "list") == ""
    assert [file.read_bytes() for file in jane.files()] == [shared]
    assert running.get(local(jane.listed()["results"][0]["file"])).body == shared
    left = {path.read_bytes() for path in entities.folder.rglob("*.png")}
    assert left == {older}
    assert running.get(f"/entity/{heir['id']}/file", **OWNER).body == older
    assert second["id"] == jane.listed()["results"][0]["id"]
    entities.create(own)
    assert jane.upload(shared)[0] == 201


ORDERS = [
    order for order in itertools.permutations(("delete", "upload", "restore", "empty", "delete"))
    if order.index("delete") == 0
]  # fmt: skip


@pytest.mark.parametrize("order", sorted(set(ORDERS)), ids="-".join)
def test_what_is_trashed_and_uploaded_again_is_there_in_every_order(server, order):
    """Of two owners, whose files are one by hard links, and of an entity."""
    jane, john, entities, content = User(server), User(server), Entities(server), png()
    mine = [jane.upload(content)[1]["id"]]
    his = john.upload(content)[1]
    item = str(entities.create(content)["id"])
    trashed, gone, is_gone = set[str](), set[str](), False  # of mine; and the entity
    for step in order:
        first = mine[0]
        state = "gone" if first in gone else "trash" if first in trashed else "there"
        if step == "delete":
            status = 204 if state == "there" else 404
            assert jane.call("DELETE", f"{MEDIA}{first}/")[0] == status
            entities.send("PATCH", item, expect=404 if is_gone else 200, is_deleted=True)
            trashed |= {first} - gone
        elif step == "upload":
            mine.append(jane.upload(content)[1]["id"])
            again = entities.create(content, expect=201 if is_gone else 409)
            item, is_gone = (str(again["id"]), False) if is_gone else (item, False)
        elif step == "restore":
            status = 204 if state == "trash" else 404
            assert jane.call("POST", f"/trash/{first}/restore")[0] == status
            server.request("POST", f"/trash/{item}/restore", headers=WRITER)
            trashed.discard(first)
        else:
            in_trash = not is_gone and entities.get(item)["is_deleted"]
            assert jane.call("DELETE", "/trash")[0] == 204
            status = 204 if in_trash else 404
            assert server.request("DELETE", f"/trash/{item}", headers=WRITER).status == status
            gone, trashed, is_gone = gone | trashed, set(), is_gone or in_trash
        for key in mine:
            status, record = jane.call("GET", f"{MEDIA}{key}/")
            assert status == (404 if key in gone | trashed else 200)
            if status == 200:
                assert server.get(local(record["file"])).body == content
        assert [file.read_bytes() for file in jane.files()] == [content] * len({*mine} - gone)
        assert server.get(local(his["file"])).body == content
        if not is_gone:
            assert entities.content(int(item)) == content


def test_everybody_restores_and_removes_what_is_his_in_the_trash(server):
    jane, john, entities = User(server), User(server), Entities(server)
    entity = str(entities.create()["id"])
    entities.patch(int(entity), is_deleted=True)
    mine, mine_too, his = (user.upload(png())[1]["id"] for user in (jane, jane, john))
    for user, key in ((jane, mine), (jane, mine_too), (john, his)):
        assert user.call("DELETE", f"{MEDIA}{key}/")[0] == 204

    def ask(method: str, path: str, headers: Mapping[str, str]) -> int:
        return server.request(method, f"/trash{path}", headers=headers).status

    restore = functools.partial(ask, "POST")
    assert restore(f"/{mine}/restore", {}) == 401
    foreign = ((his, jane.headers), (entity, jane.headers), (mine, OWNER))
    assert [restore(f"/{key}/restore", headers) for key, headers in foreign] == [404] * 3
    assert restore(f"/{mine.upper()}/restore", jane.headers) == 204
    assert restore(f"/{mine}/restore", jane.headers) == 404  # it is in no trash any more
    assert restore(f"/{entity}/restore", WRITER) == 204
    assert jane.call("GET", MEDIA)[1]["count"] == 1
    assert not entities.get(entity)["is_deleted"]

    assert ask("DELETE", f"/{his}", jane.headers) == 404
    assert ask("DELETE", "", jane.headers) == 204
    assert len(jane.files()) == 1
    assert restore(f"/{mine_too}/restore", jane.headers) == 404
    assert ask("DELETE", f"/{his}", john.headers) == 204
    assert john.files() == []


def test_the_trash_empties_itself_after_trash_days(start):
    running = start(trash_days="0")
    jane, entities = User(running), Entities(running)
    records = [jane.upload(png())[1] for _ in range(2)]
    items = [entities.create(), entities.create()]
    for record, item in zip(records, items, strict=True):
        assert jane.call("DELETE", f"{MEDIA}{record['id']}/")[0] == 204
        entities.patch(item["id"], is_deleted=True)
    running.stop()
    with running.index() as index:
        ago = time.time() - 3 * 86400
        index.execute("UPDATE media SET updated_at = ? WHERE id = ?", (ago, records[0]["id"]))
        sql = "UPDATE entity_version SET updated = ? WHERE id = ?"
        index.execute(sql, (ago, items[0]["id"]))
    running = start(trash_days="2")
    wait_until(lambda: len(jane.files()) == 1, "the end of the old record")
    wait_until(lambda: running.get(f"/entity/{items[0]['id']}").status == 404)
    assert running.get(f"/entity/{items[1]['id']}").status == 200
    assert trash(running, "list").count("\n") == 2


def test_a_clock_that_jumps_empties_no_trash_before_it_has_stayed_there(tmp_path):
    index = ms.open_index(tmp_path / "index")
    day = 86400
    steps = (0, 3600, 4000 * day, 4000 * day + 3600, day, day + 3600)
    steady = [index.trash.is_clock_steady(1e9 + step) for step in steps]
    assert steady == [True, True, False, True, False, True]
    index.close()


# ======================================================================================
# Deployment: nginx in front, systemd around, setup.sh
# ======================================================================================

DOMAIN = "photos.example.org"


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    command = [
        need("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
        "-nodes", "-days", "2", "-subj", f"/CN={DOMAIN}", "-keyout", folder / "privkey.pem",
        "-out", folder / "fullchain.pem",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return folder


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """A port below those that the kernel gives to clients, lest one of them takes it first."""
    choose = random.SystemRandom()  # two suites may have the same seed
    while accepts(port := choose.randrange(10_000, 32_000)):
        pass
    return port


AS_CLIENT = "X-Test-Client"  # the address that nginx takes a request for


class Site(Server):
    """nginx with our nginx.conf on free ports, before a server that runs already."""

    def __init__(self, folder: Path, certificate: Path, port: int, pictures: Path) -> None:
        once()
        nginx = need("nginx")
        self.port, self.http, self.acme = free_port(), free_port(), folder / "acme"
        self.storage, self.data = pictures, pictures / ".mediaserver"
        self.config, self.site = folder / "nginx.conf", folder / "site.conf"
        text = (HERE / "nginx.conf").read_text()
        for old, new in {
            f"/etc/letsencrypt/live/{DOMAIN}": str(certificate),
            "127.0.0.1:8000": f"127.0.0.1:{port}",
            "listen 80": f"listen 127.0.0.1:{self.http}",
            "listen 443": f"listen 127.0.0.1:{self.port}",
            "client_max_body_size 1026m": "client_max_body_size 258m",
            "/var/lib/mediaserver/pictures/": f"{pictures}/",
            "/var/lib/mediaserver/data/": f"{pictures}/.mediaserver/",
            "/var/www/mediaserver": str(self.acme),
            "/var/log/nginx/": f"{folder}/",
        }.items():
            assert old in text
            text = text.replace(old, new)
        text = re.sub(r"\n *listen \[::\].*", "", text)  # a container may have no IPv6
        self.site.write_text(re.sub(r"(alias|on) (.*/);", r'\1 "\2";', text))
        paths = "".join(
            f"{name}_temp_path {folder}/{name};\n"
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        user = "user root;" if os.getuid() == 0 else ""  # the tests' folders are 0700
        self.config.write_text(
            f"{user} daemon off; pid {folder}/pid; error_log {folder}/error.log;\n"
            "events { worker_connections 1024; }\n"
            f"http {{ access_log off; set_real_ip_from 127.0.0.1; real_ip_header {AS_CLIENT};\n"
            f"{paths} include {self.site}; }}\n"
        )
        self.command = [nginx, "-e", folder / "error.log", "-c", self.config]

    def __enter__(self) -> Site:
        self.process = subprocess.Popen(self.command)
        wait_until(self._is_ready, "nginx")
        return self

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, (self.config.parent / "error.log").read_text()
        return accepts(self.port)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(DEADLINE)

    def connect(self, source: str) -> http.client.HTTPConnection:
        context = ssl._create_unverified_context()
        return http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=DEADLINE, context=context
        )

    def request(self, method: str, path: str, body: Any = None, headers: Any = None) -> Answer:
        return super().request(method, path, body, {"Host": DOMAIN, **(headers or {})})


BIG = png_of(2 << 20)  # too large to be answered from memory
ODD, ODD_NAME = png_of(120_000), "ü %41 ?#;&'+,$.png"
ACCEL = {"X-Sendfile-Type": "X-Accel-Redirect"}


class Behind(NamedTuple):
    server: Server
    site: Site
    accel: bool


@pytest.fixture(scope="module", params=[False, True], ids=["bytes", "accel"])
def behind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, certificate: Path
) -> Iterator[Behind]:
    once()
    folder = tmp_path_factory.mktemp("behind")
    pictures = folder / "my pictures"
    fill(pictures, {"big.png": BIG, ODD_NAME: ODD})
    settings = {"MAX_UPLOAD_BYTES": str(256 << 20), "CORS_ALLOW_ORIGINS": "https://a.example"}
    with Server(pictures, ACCEL_REDIRECT=str(request.param), **settings) as running:
        running.scanned()
        with Site(folder, certificate, running.port, pictures) as site:
            yield Behind(running, site, request.param)


ETAG_OF_BIG, LONG_AGO = f'"{sha256(BIG)}"', "Sat, 01 Jan 2000 00:00:00 GMT"


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"Range": "bytes=0-99"}, {"Range": "bytes=1000000-"}, {"Range": "bytes=-5"},
        {"Range": "bytes=9999999-"}, {"Range": "bytes=9-0"}, {"If-None-Match": ETAG_OF_BIG},
        {"Range": "bytes=0-9", "If-Range": ETAG_OF_BIG},
        {"Range": "bytes=0-9", "If-Range": '"x"'},
        {"If-None-Match": '"x"'}, {"If-Match": ETAG_OF_BIG}, {"If-Match": '"x"'},
        {"If-Modified-Since": LONG_AGO}, {"If-Unmodified-Since": LONG_AGO},
        {"Origin": "https://a.example"},
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_through_nginx_a_file_is_answered_as_the_server_answers(behind, headers):
    server, site, _ = behind
    path = f"/image/{sha256(BIG)}"
    direct = server.request("GET", path, headers=headers)
    proxied = site.request("GET", path, headers=headers)
    assert (proxied.status, proxied.body) == (direct.status, direct.body)
    names = (
        "Content-Type", "Content-Length", "Content-Range", "ETag", "Last-Modified",
        "Accept-Ranges", "Cache-Control", "Access-Control-Allow-Origin", "Vary",
    )  # fmt: skip
    ours, theirs = ([(name, answer.headers.get_all(name)) for name in names]
                    for answer in (direct, proxied))  # fmt: skip
    assert theirs == ours
    assert proxied.headers.get_all("X-Content-Type-Options") == ["nosniff"]
    assert "X-Accel-Redirect" not in proxied.headers
    heads = [way.request("HEAD", path, headers=headers) for way in (server, site)]
    assert len({(head.status, head.headers["Content-Length"]) for head in heads}) == 1


def test_through_nginx_several_ranges_and_odd_names_are_answered(behind):
    _, site, _ = behind
    several = site.get(f"/image/{sha256(BIG)}", Range="bytes=0-3,100-103")
    assert several.status == 206
    assert several.headers["Content-Type"].startswith("multipart/byteranges")
    assert BIG[100:104] in several.body
    assert site.get(f"/image/{sha256(ODD)}").body == ODD


def test_only_nginx_gets_the_redirect(behind):
    server, path = behind.server, f"/image/{sha256(BIG)}"
    answer = server.request("GET", path, headers=ACCEL)
    if behind.accel:
        assert answer.headers["X-Accel-Redirect"] == "/.accel/library/big.png"
        assert answer.body == b""
        answer = server.request("GET", f"/image/{sha256(ODD)}", headers=ACCEL)
        place = "/.accel/library/%C3%BC%20%2541%20%3F%23%3B%26%27%2B%2C%24.png"
        assert answer.headers["X-Accel-Redirect"] == place
    else:
        assert answer.body == BIG
    for given, source in (({}, "127.0.0.1"), (ACCEL, "127.0.0.2")):  # 127.0.0.2 is no proxy
        answer = server.request("GET", path, headers=given, source=source)
        assert "X-Accel-Redirect" not in answer.headers
        assert answer.body == BIG


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/.accel/library/big.png", 404), ("/.accel/images/private.png", 404),
        ("/.accel/library/../images/private.png", 404),
        ("/.accel/library/.mediaserver/secrets.env", 404), ("/.accel/", 404), ("/health", 200),
    ],
)  # fmt: skip
def test_the_internal_locations_are_closed(behind, path, status):
    answer = behind.site.get(path, X_Accel_Redirect="/.accel/library/big.png")
    assert answer.status == status


def test_private_and_signed_files_pass_through(behind):
    site, content, stem = behind.site, png_of(100_000), unique().decode()
    url = site.store(content, f"{stem}.png").json["image_url"]
    assert url == f"https://{DOMAIN}/image/{stem}.png"
    path = local(url)
    assert site.get(path).status == site.get(path, Authorization="Bearer wrong").status == 401
    answer = site.get(path, **OWNER)
    assert (answer.headers["Cache-Control"], answer.body) == ("private, no-cache", content)
    assert site.get(path, **OWNER, Range="bytes=5-9").body == content[5:10]
    assert site.get(f"/image/{sha256(content)}").status == 404
    assert site.get(f"/image/{sha256(content)}", **OWNER).body == content
    entity = Entities(behind.site).create(content)["id"]
    assert site.get(f"/entity/{entity}/file", Range="bytes=7-19").body == content[7:20]
    url = User(behind.server, 7).upload(content)[1]["file"]
    assert site.get(local(url)).body == content
    assert site.get(urlsplit(url).path).status == 401


def test_what_nginx_cannot_read_the_server_sends(behind, tmp_path, certificate):
    content = png_of(100_000)
    path = local(behind.server.store(content).json["image_url"])
    with Site(tmp_path, certificate, behind.server.port, Path("/nowhere")) as site:
        answer = site.get(path, **OWNER)
    assert (answer.status, answer.body) == (200, content)
    assert answer.headers["ETag"] == f'"{sha256(content)}"'


def test_uploads_reach_the_server_while_they_are_sent(behind):
    site, content, stem = behind.site, png_of(300_000), unique().decode()
    body, content_type = form(f"{stem}.png", content)
    headers = {**OWNER, "Content-Type": content_type}
    pieces = (body[at : at + 7001] for at in range(0, len(body), 7001))
    assert site.request("POST", "/upload-image", pieces, headers).status == 201  # chunked
    assert site.get(f"/image/{stem}.png", **OWNER).body == content
    piece, first = os.urandom(1 << 20), png()
    body, _ = form("large.png", first)
    start, end = body.split(first)
    incoming = behind.server.data / "images/.incoming"

    def arrived() -> bool:
        return any(file.stat().st_size > 10 << 20 for file in incoming.iterdir())

    def large() -> Iterator[bytes]:
        yield start + first
        for number in range(200):
            yield piece
            if number == 30:
                wait_until(arrived, "what nginx keeps")
        yield end

    headers["Content-Length"] = str(len(body) + 200 * len(piece))
    made = site.request("POST", "/upload-image", large(), headers)
    assert (made.status, made.json["bytes"]) == (201, len(first) + 200 * len(piece))
    headers["Content-Length"] = str(259 << 20)
    assert site.request("POST", "/upload-image", None, headers).status == 413


def test_many_logins_are_429_and_many_reads_are_not(behind):
    site = behind.site
    wait_until(lambda: site.request("POST", LOGIN, b"{}").status == 429)
    assert {site.get("/health").status for _ in range(50)} == {200}
    assert 429 not in {site.get("/api/auth/profile/").status for _ in range(50)}


def plain_http(site: Site) -> Server:
    plain = object.__new__(Server)
    plain.port = site.http
    return plain


def test_http_is_sent_to_https_but_for_acme_and_http2_is_spoken(behind):
    site = behind.site
    fill(site.acme, {".well-known/acme-challenge/t": b"proof"})
    plain = plain_http(site)
    assert plain.get("/.well-known/acme-challenge/t", Host=DOMAIN).body == b"proof"
    answer = plain.get("/media?page=1", Host=DOMAIN)
    assert (answer.status, answer.headers["Location"]) == (301, f"https://{DOMAIN}/media?page=1")
    curl = [need("curl"), "-sk", "--http2", "-o", os.devnull, "-w", "%{http_version}"]
    url = f"https://127.0.0.1:{site.port}/health"
    assert said_by(*curl, "-H", f"Host: {DOMAIN}", url) == (0, "2")


def test_the_gallery_keeps_its_policy_and_gets_the_sites_headers(behind):
    answer = behind.site.get("/", Accept="text/html")
    assert answer.status == 200
    policy = ms.gallery_page("en").headers["Content-Security-Policy"]
    assert answer.headers.get_all("Content-Security-Policy") == [policy]
    counts = Counter(answer.headers.keys())
    names = ("Strict-Transport-Security", "X-Content-Type-Options", "Referrer-Policy")
    assert [counts[name] for name in names] == [1, 1, 1]
    assert "Cross-Origin-Resource-Policy" not in answer.headers


def test_the_gallery_shows_and_uploads_behind_nginx(browser, behind, tmp_path):
    browser.open(f"https://{DOMAIN}:{behind.site.port}/")
    browser.see(f"document.querySelector(\"[data-sha='{sha256(BIG)}'] a\")?.firstChild")
    sign_in(browser, OWNER_KEY)
    browser.see("document.querySelector('#account').ariaPressed === 'true'")
    (tmp_path / "new.png").write_bytes(content := png())
    browser.choose_files("#files", tmp_path / "new.png")
    browser.click(f"[data-sha='{sha256(content)}'] a")
    browser.see(TITLE_SHOWN, "new.png")
    browser.see("document.querySelector('#view > img').naturalWidth === 3")


@contextlib.contextmanager
def before_a_listener(
    folder: Path, certificate: Path
) -> Iterator[tuple[Site, list[dict[str, str]]]]:
    """nginx, and the headers of each request that it passes on; the answers are 204."""
    heard = []

    def hear(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # it was shut down
                return
            with connection:
                lines = connection.recv(65536).decode().strip().split("\r\n")[1:]
                fields = [line.partition(": ") for line in lines]
                heard.append({name.lower(): value for name, _, value in fields})
                assert len(heard[-1]) == len(fields)
                connection.sendall(b"HTTP/1.1 204 No\r\nConnection: close\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=hear, args=(listener,))
        thread.start()
        try:
            with Site(folder, certificate, listener.getsockname()[1], folder) as site:
                yield site, heard
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(DEADLINE)


def test_what_a_client_forges_does_not_reach_the_server(tmp_path, certificate):
    forged = {"X-Forwarded-For": "6.6.6.6", "X-Forwarded-Host": "evil.example"}
    forged |= {"X-Forwarded-Proto": "gopher", "X-Sendfile-Type": "X-Sendfile"}
    forged |= {"X-Accel-Redirect": "/.accel/images/private.png"}
    with before_a_listener(tmp_path, certificate) as (site, heard):
        assert site.request("GET", "/health", headers=forged).status == 204
    got = heard[0]
    assert got["x-forwarded-for"] == "127.0.0.1"
    assert got["x-forwarded-host"] == got["host"] == DOMAIN
    assert got["x-forwarded-proto"] == "https"
    assert got["x-sendfile-type"] == "X-Accel-Redirect"
    assert "x-accel-redirect" not in got


@pytest.fixture(scope="module")
def overheard(
    tmp_path_factory: pytest.TempPathFactory, certificate: Path
) -> Iterator[tuple[Site, list[Any]]]:
    with before_a_listener(tmp_path_factory.mktemp("heard"), certificate) as found:
        yield found


WITH_PORT = f"{DOMAIN}:8443"


@pytest.mark.parametrize(
    ("target", "host", "expected"),
    [
        ("/health", DOMAIN, DOMAIN), ("/health", WITH_PORT, WITH_PORT),
        ("/health", WITH_PORT.upper(), WITH_PORT),
        (f"https://{DOMAIN}/health", WITH_PORT, WITH_PORT),
        (f"https://{DOMAIN}/health", "evil.example", DOMAIN),
        (f"https://{DOMAIN}/health", "evil.example:8443", DOMAIN),
        ("/health", f"{DOMAIN}:", DOMAIN),
    ],
)  # fmt: skip
def test_the_server_hears_our_name_with_its_port(overheard, target, host, expected):
    site, heard = overheard
    heard.clear()
    assert site.request("GET", target, headers={"Host": host}).status == 204
    assert [(got["host"], got["x-forwarded-host"]) for got in heard] == [(expected, expected)]


@pytest.mark.parametrize(
    "host", [f"{DOMAIN}:@evil.example", f"{WITH_PORT}@evil.example", f"{WITH_PORT}:8443"]
)
def test_what_is_no_name_is_heard_as_ours_or_refused_as_later_versions_of_nginx_do(
    overheard, host
):
    site, heard = overheard
    heard.clear()
    status = site.request("GET", "/health", headers={"Host": host}).status
    found = status, [(got["host"], got["x-forwarded-host"]) for got in heard]
    assert found in ((204, [(DOMAIN, DOMAIN)]), (400, []))


@pytest.mark.parametrize("tls", [True, False])
@pytest.mark.parametrize(
    ("target", "host"),
    [
        ("/health", "evil.example"), ("/health", f"{DOMAIN}.evil.example"),
        ("/health", f"evil.{DOMAIN}"), ("/health", "127.0.0.1"), ("/health", "localhost:443"),
        ("https://evil.example/health", DOMAIN), ("/health", f"evil.example:{DOMAIN}"),
        ("/.accel/library/a.png", "evil.example"),
    ],
)  # fmt: skip
def test_the_server_hears_no_other_name(overheard, target, host, tls):
    site, heard = overheard
    heard.clear()
    way = site if tls else plain_http(site)
    assert (way.get(target, Host=host).status, heard) == (421, [])


def test_urls_in_answers_have_the_port_that_the_client_came_to(behind):
    answers = [behind.site.send_file("POST", "/upload", png(), headers={**OWNER, "Host": host})
               for host in (WITH_PORT, DOMAIN)]  # fmt: skip
    assert [answer.json["url"].partition("/media/")[0] for answer in answers] == [
        f"https://{WITH_PORT}", f"https://{DOMAIN}"]  # fmt: skip


def test_no_log_has_a_token(tmp_path, certificate):
    secret = f"{unique().decode()}.{unique().decode()}"
    basic = f"Basic {base64.b64encode(f'{secret}:'.encode()).decode()}"  # https://TOKEN@…
    closed = free_port()  # so that each request is an error, too
    with Site(tmp_path, certificate, closed, tmp_path) as site:
        for way in (site, plain_http(site)):
            for target, referrer in (
                (f"/upload?token={secret}", f"https://{DOMAIN}/gallery?token={secret}"),
                (f"https://{DOMAIN}/media?a=b&token={secret}", f"https://{DOMAIN}#{secret}"),
                (f"https://{DOMAIN}?token={secret}", f"https://{DOMAIN}/s/{secret}/1"),
                (f"/s/{secret}", "-"), (f"/.accel/images/?token={secret}", "-"),
                (f"/files/{secret}", "-"), (f"/shares/{secret}", "-"),
            ):  # fmt: skip
                fields = {"Host": DOMAIN, "Referer": referrer, "Authorization": basic}
                assert way.get(target, **fields).status == (502 if way is site else 301)
            assert way.get(f"/?token={secret}", Host="evil.example").status == 421
        log, login = tmp_path / "access.log", f"/api/auth/login/?token={secret}"
        wait_until(lambda: site.request("POST", login).status == 429)
        wait_until(lambda: 'HTTP/1.1" 429 ' in log.read_text(), "the last line of the log")
    assert re.search(r'"GET /upload HTTP/1.1" 502 \d+ "https://.*/gallery" "', log.read_text())
    hidden = {*re.findall(r'"GET /(\w+)/- HTTP/1.1"', log.read_text())}
    assert hidden == {"s", "files", "shares"}
    assert [path for path in tmp_path.glob("*.log") if secret in path.read_text()] == []


def test_thirty_requests_at_a_time_pass_and_three_hundred_that_are_held_do_not(
    behind, tmp_path, certificate
):
    with ThreadPoolExecutor(30) as pool:
        paths = [f"/image/{sha256(BIG)}"] * 30
        assert {answer.status for answer in pool.map(behind.site.get, paths)} == {200}
    with (
        socket.create_server(("127.0.0.1", 0), backlog=512) as silent,
        Site(tmp_path, certificate, silent.getsockname()[1], tmp_path) as site,
        contextlib.ExitStack() as stack,
    ):
        for number in range(300):  # addresses of one customer
            connection = site.connect("127.0.0.1")
            stack.callback(connection.close)
            headers = {"Host": DOMAIN, AS_CLIENT: f"2001:db8:0:1:{number:x}::1"}
            connection.request("GET", "/", headers=headers)
        log = tmp_path / "access.log"
        wait_until(lambda: log.read_text().count('HTTP/1.1" 429 ') == 150, "the refusals")
        with ThreadPoolExecutor(1) as pool:
            other = {"Host": DOMAIN, AS_CLIENT: "2001:db8:0:2::1"}
            answer = pool.submit(site.request, "GET", "/", None, other)
            seen = [silent.accept()[0] for _ in range(151)]
            seen[-1].sendall(b"HTTP/1.1 204 No\r\nConnection: close\r\n\r\n")
            assert answer.result(DEADLINE).status == 204
            for held in seen:
                held.close()


@pytest.mark.parametrize(
    ("limited", "client"),
    [
        (True, "2001:db8:0:1:{0:x}::1"), (True, "2001:db8::{0:x}"), (True, "10.0.0.1"),
        (True, "2001:db8:a0a:a0a:a{0:02x}::a"), (False, "2001:db8:0:{0:x}::1"),
        (False, "2001:db8:{0:x}::1"), (False, "::ffff:10.0.0.{0}"), (False, "10.0.0.{0}"),
    ],
)  # fmt: skip
def test_an_ipv6_client_counts_by_its_64(tmp_path, certificate, limited, client):
    with before_a_listener(tmp_path, certificate) as (site, _):
        numbers = itertools.cycle(range(1, 251))

        def ask() -> int:
            source = {AS_CLIENT: client.format(next(numbers))}
            return site.request("POST", LOGIN, b"{}", source).status

        if limited:
            wait_until(lambda: ask() == 429)
        else:
            assert {ask() for _ in range(40)} == {204}


# -- systemd


class Manager:
    """What systemd hears; it listens all the time, as the kernel keeps ten messages at most."""

    def __init__(self) -> None:
        self.name = f"mediaserver-test-{unique().decode()}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{self.name}")
        self._heard: queue.Queue[str] = queue.Queue()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while message := self._socket.recv(4096).decode():
            self._heard.put(message)

    def close(self) -> None:
        self._socket.sendto(b"", f"\0{self.name}")
        self._thread.join()
        self._socket.close()

    def hear(self, wanted: str, seconds: float = DEADLINE) -> str:
        """The next message that begins like this; only the watchdog may be told before it."""
        while not (message := self._heard.get(timeout=seconds)).startswith(wanted):
            assert message == "WATCHDOG=1"
        return message


@pytest.fixture
def manager() -> Iterator[Manager]:
    with contextlib.closing(Manager()) as made:
        yield made


@pytest.mark.parametrize("workers", ["1", "2"])
def test_systemd_is_told_each_change_of_state(start, manager, workers):
    running = start("--workers", workers, notify_socket=f"@{manager.name}", watchdog_usec="400000")
    manager.hear("READY=1")
    for _ in range(2):
        manager.hear("WATCHDOG=1")
    running.process.send_signal(signal.SIGHUP)
    now = int(manager.hear("RELOADING=1\nMONOTONIC_USEC=").rpartition("=")[2])
    assert abs(now - time.monotonic_ns() // 1000) < DEADLINE * 10**6
    manager.hear("READY=1")
    if workers == "2":  # a worker that hangs silences the watchdog
        workers = worker_ids(running)
        assert len(workers) == 2
        for process in workers:
            os.kill(process, signal.SIGSTOP)
        with pytest.raises(queue.Empty):
            for _ in range(100):
                manager.hear("WATCHDOG=1", 0.8)
        for process in workers:
            os.kill(process, signal.SIGCONT)
    running.process.send_signal(signal.SIGTERM)
    manager.hear("STOPPING=1")
    assert running.process.wait(DEADLINE) == 0


def test_a_hung_accept_loop_is_not_well():
    class Stub:
        turned_at = time.monotonic()

        def get_meta(self, key: str) -> None:
            pass

        @property
        def index(self) -> Stub:
            return self

    stub = Stub()
    assert ms.is_well(stub, stub, 30)
    stub.turned_at -= 31
    assert not ms.is_well(stub, stub, 30)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_restart_on_an_inherited_socket_loses_no_request(tmp_path, workers):
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port, held = listener.getsockname()[1], listener.fileno()
    activate = (  # as systemd does it
        f"import os, sys; os.dup2({held}, 3); "
        "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    serve = [BYTECODE, "--storage_dir", tmp_path, "--port", "1", "--workers", workers]
    command = [sys.executable, "-c", activate, sys.executable, *serve]
    answered, lost, over = [0], [], threading.Event()

    def load(_: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        while not over.is_set():
            try:
                connection.request("GET", "/health")
                answer = connection.getresponse()
                answer.read()
                answered[0] += answer.status == 200
            except Exception as error:
                lost.append(error)
                connection.close()
        connection.close()

    with ThreadPoolExecutor(4) as pool:
        pool.map(load, range(4))
        try:
            for _ in range(3):
                before = answered[0]
                running = subprocess.Popen(
                    command, env=BARE_ENVIRONMENT, pass_fds=[held], stderr=subprocess.DEVNULL
                )
                wait_until(lambda before=before: answered[0] > before + 50 or lost, "answers")
                if _ == 2:
                    over.set()
                    pool.shutdown()
                running.terminate()
                assert running.wait(DEADLINE) == 0
        finally:
            over.set()
            listener.close()
    assert not lost


@pytest.mark.parametrize(("option", "value"), [("--port", None), ("--host", "192.0.2.1")])
def test_an_address_that_cannot_be_listened_on_is_told_what_else_to_give(
    server, tmp_path, option, value
):
    given = server.port if value is None else value
    done = run_program("--storage_dir", tmp_path, option, given, cwd=tmp_path)
    assert done.returncode == 2
    assert re.search(f"cannot listen: .*{option}", done.stderr)


def test_what_is_no_tcp_socket_is_refused(tmp_path):
    command = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3</dev/null'
    shell = ["sh", "-c", command, "sh", sys.executable, PROGRAM, "--storage_dir", tmp_path]
    done = subprocess.run(shell, capture_output=True, text=True, env=BARE_ENVIRONMENT, check=False)
    assert done.returncode == 2
    assert "cannot listen" in done.stderr


# -- The unit and the site as they lie there


def said_by(*command: object, **options: Any) -> tuple[int, str]:
    """The exit status of a program, and all that it says."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        timeout=RUN_SECONDS, **options,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_the_unit_has_no_fault():
    analyze, unit = need("systemd-analyze"), HERE / "mediaserver.service"
    if not Path("/usr/bin/python3").exists():
        pytest.skip("the unit runs /usr/bin/python3")
    assert said_by(analyze, "verify", "--man=no", unit) == (0, "")
    _, text = said_by(analyze, "security", "--offline=true", unit)
    assert float(re.search(r"exposure level for .*: ([0-9.]+)", text)[1]) <= 1.1
    lines = unit.read_text()
    assert "~@resources" not in re.sub(r"^#.*", "", lines, flags=re.MULTILINE)  # decoders need it
    assert "RestartPreventExitStatus=2" in lines


def test_the_readme_s_units_of_every_night_have_no_fault(start, tmp_path):
    text = (HERE / "README.md").read_text(encoding="utf-8")
    for name in ("service", "timer"):
        block = re.search(rf"mediaserver-verify\.{name}`(?:.*\n)+?\n((?:    .*\n|\n)+)", text)
        (tmp_path / f"mediaserver-verify.{name}").write_text(textwrap.dedent(block[1]))
    unit = tmp_path / "mediaserver-verify.service"
    words = re.search(r"^ExecStart=/usr/local/bin/media-server (.*)$", unit.read_text(), re.M)
    running = start()
    fill_families(running)
    told = run_here(*words[1].split(), "--storage_dir", running.storage)
    assert "all is as it was taken in" in told
    unit.write_text(unit.read_text().replace("/usr/local/bin/media-server", "/bin/true"))
    units = (unit, unit.with_suffix(".timer"))
    assert said_by(need("systemd-analyze"), "verify", "--man=no", *units) == (0, "")


def test_nginx_takes_the_site_without_a_word(tmp_path, certificate):
    site = Site(tmp_path, certificate, free_port(), tmp_path)
    assert said_by(*site.command, "-q", "-t") == (0, "")


# -- setup.sh


class Machine:
    """A folder that setup.sh takes for the root, and commands that note how they are called."""

    def __init__(self, folder: Path, bytecode: Path) -> None:
        self.root, self.source, self.calls = folder / "root", folder / "clone", folder / "calls"
        self.broken = folder / "broken"  # while it is there, `nginx -t` fails
        self.version = folder / "version"
        self.source.mkdir()
        for name in ("setup.sh", "mediaserver.py", "mediaserver.service", "nginx.conf"):
            shutil.copy2(HERE / name, self.source)
        shutil.copytree(bytecode, self.source / "__pycache__")
        for name, body in {
            "systemctl": "",
            "nginx": f"case $1 in -v) cat {self.version} >&2 ;; esac\n"
            f"case $* in *-t*) [ ! -e {self.broken} ] ;; esac\n",
        }.items():
            fake = folder / name
            fake.write_text(f'#!/bin/sh\necho {name} "$@" >>{self.calls}\n{body}')
            fake.chmod(0o755)
        commands = {"SYSTEMCTL": f"{folder}/systemctl", "NGINX": f"{folder}/nginx"}
        self.environment = {**BARE_ENVIRONMENT, **commands, "DESTDIR": str(self.root)}
        self.version.write_text("nginx version: nginx/1.22.1\n")

    def setup(self, *options: object, status: int = 0, **more: Any) -> str:
        self.calls.write_text("")
        more = {"env": self.environment, **more}
        code, text = said_by("/bin/sh", self.source / "setup.sh", *options, **more)
        assert code == status, text
        return text

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines()

    def path(self, name: object) -> Path:
        return self.root / str(name).lstrip("/")

    def text(self, name: str) -> str:
        return self.path(name).read_text()

    def mode(self, name: str) -> int:
        return self.path(name).stat().st_mode & 0o777

    @property
    def settings(self) -> dict[str, str]:
        return ms.read_dotenv(self.path("/etc/mediaserver/mediaserver.env"), {})

    @property
    def site(self) -> Path:
        return self.path("/etc/nginx/sites-available/mediaserver")

    def tree(self) -> dict[str, tuple[int, bytes]]:
        return {
            str(path): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
            for path in self.root.rglob("*")
        }


DROPIN = "/etc/systemd/system/mediaserver.service.d/setup.conf"


@pytest.fixture(scope="session")
def bytecode(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program's bytecode for setup.sh's Python: each run would compile it again."""
    copy = Path(shutil.copy2(PROGRAM, tmp_path_factory.mktemp("bytecode")))
    path = re.search("^PATH=(.*)", (HERE / "setup.sh").read_text(), re.MULTILINE)[1]
    subprocess.run(["python3", copy, "--version"], env={"PATH": path}, check=True)
    return copy.parent / "__pycache__"


@pytest.fixture
def machine(tmp_path: Path, bytecode: Path) -> Machine:
    once()
    return Machine(tmp_path, bytecode)


def test_setup_installs_and_doing_it_again_changes_nothing(machine):
    said = machine.setup("--dry-run", "--domain", DOMAIN)
    assert not machine.root.exists()
    assert set(machine.called()) == {"nginx -v"}
    words = ("mediaserver.env", "systemctl restart mediaserver.service", "ln -sfn")
    assert [each for each in words if each not in said] == []
    machine.setup("--domain", DOMAIN)
    assert "systemctl enable mediaserver.socket mediaserver.service" in machine.called()
    assert machine.called()[-2:] == ["nginx -q -t", "systemctl reload-or-restart nginx"]
    modes = {
        "/etc/mediaserver": 0o700,
        "/etc/mediaserver/mediaserver.env": 0o600,
        "/var/lib/mediaserver": 0o700,
        "/etc/mediaserver/tls/privkey.pem": 0o600,
        "/opt/mediaserver/mediaserver.py": 0o755,
    }
    assert {name: machine.mode(name) for name in modes} == modes
    secrets = [machine.settings[name] for name in SECRETS]
    assert len(set(secrets)) == 3
    assert min(map(len, secrets)) >= 40
    before = machine.tree()
    machine.setup()
    assert machine.tree() == before
    assert "systemctl restart mediaserver.service" in machine.called()
    assert "systemctl stop mediaserver.service mediaserver.socket" not in machine.called()
    machine.setup("--dry-run", "--port", "9000", "--uninstall", "--purge")
    assert machine.tree() == before


def test_an_upgrade_keeps_what_was_set_and_what_was_stored(machine):
    machine.setup("--domain", DOMAIN, "--port", "8764", "--upload-limit", "500M")
    env = machine.path("/etc/mediaserver/mediaserver.env")
    env.write_text(env.read_text() + "# mine\nREAD_AUTH_ENABLED=yes\n")
    content = png()
    fill(machine.path("/var/lib/mediaserver/pictures"), {"a.png": content})
    with open(machine.source / "mediaserver.py", "a") as program:
        program.write("\n# newer\n")
    before = machine.settings
    machine.setup()
    assert machine.settings == before
    assert "# mine" in env.read_text()
    assert machine.path("/var/lib/mediaserver/pictures/a.png").read_bytes() == content
    assert machine.text("/opt/mediaserver/mediaserver.py").endswith("# newer\n")
    machine.setup("--port", "9000", "--storage-dir", "/mnt/my disk/photos")
    changed = {"PORT": "9000", "STORAGE_DIR": "/mnt/my disk/photos"}
    assert machine.settings == before | changed
    socket_unit = machine.text("/etc/systemd/system/mediaserver.socket")
    assert "ListenStream=127.0.0.1:9000" in socket_unit
    assert 'ReadWritePaths="-/mnt/my disk/photos"' in machine.text(DROPIN)
    text = machine.site.read_text()
    assert "server 127.0.0.1:9000;" in text
    assert "client_max_body_size 502m;" in text
    assert 'alias "/mnt/my disk/photos/";' in text
    assert "systemctl start mediaserver.socket" in machine.called()


def test_a_server_that_was_started_by_hand_is_taken_over(machine, tmp_path):
    """The layout of the first version: DATA in the folder, secrets in it, settings in .env."""
    pictures, content = tmp_path / "Pictures", png()
    data = machine.path(pictures) / ".mediaserver"
    fill(data, {
        "images/secret.png": content, "index.sqlite3": b"index",
        "secrets.env": b"MEDIA_SERVER_SECRET=old-secret\nJWT_SIGNING_KEY='old key'\n",
    })  # fmt: skip
    (machine.source / ".env").write_text(
        "export AUTH_TOKEN='to\"ken' # mine\nMAX_UPLOAD_BYTES=20000000\nUPLOAD_DIR=boxes\n"
    )
    machine.setup("--storage-dir", pictures)
    expected = {"MEDIA_SERVER_SECRET": "old-secret", "JWT_SIGNING_KEY": "old key"}
    expected |= {"AUTH_TOKEN": 'to"ken', "DATABASE_DIR": str(pictures / ".mediaserver")}
    expected |= {"UPLOAD_DIR": str(machine.source / "boxes"), "MAX_UPLOAD_BYTES": "20000000"}
    assert machine.settings.items() >= expected.items()
    assert (data / "images/secret.png").read_bytes() == content
    before = machine.tree()
    machine.setup()
    assert machine.tree() == before


def test_a_site_that_nginx_refuses_is_rolled_back_and_one_changed_by_hand_stays(machine):
    machine.broken.touch()
    assert "nothing was reloaded" in machine.setup(status=1)
    assert not machine.site.exists()
    assert not machine.path("/etc/nginx/sites-enabled/mediaserver").is_symlink()
    machine.broken.unlink()
    machine.setup("--domain", DOMAIN)
    before = machine.site.read_text()
    machine.broken.touch()
    machine.setup("--domain", "other.example.org", status=1)
    assert machine.site.read_text() == before
    assert [call for call in machine.called() if re.search("systemctl.*nginx", call)] == []
    machine.broken.unlink()
    machine.site.write_text(before + "# mine\n")
    assert "changed by hand" in machine.setup("--port", "9000")
    assert machine.site.read_text().endswith("# mine\n")
    assert "9000" in machine.text("/etc/mediaserver/site.new")


def test_newer_nginx_a_certificate_and_accel_redirect_change_site_and_modes(machine):
    machine.version.write_text("nginx version: nginx/1.26.3\n")
    live = f"/etc/letsencrypt/live/{DOMAIN}"
    fill(machine.path(live), {"fullchain.pem": b""})
    machine.setup("--domain", DOMAIN, "--accel-redirect")
    text = machine.site.read_text()
    assert text.count("http2 on;") == text.count("listen 443 ssl;") == 1
    assert "ssl http2" not in text
    assert f"{live}/fullchain.pem" in text
    assert machine.settings["ACCEL_REDIRECT"] == "true"
    modes = [machine.mode(f"/var/lib/mediaserver{name}") for name in ("", "/pictures", "/data")]
    assert modes == [0o711, 0o750, 0o700]
    assert "StateDirectoryMode=0711\nUMask=0027" in machine.text(DROPIN)


def test_what_setup_installs_is_without_fault_and_a_command(machine, tmp_path):
    machine.setup("--storage-dir", "/home/pi/Pictures")
    # A mount of the folder itself would follow a link that its owner puts in its place, as root
    lines = machine.text(DROPIN).splitlines()
    assert 'BindReadOnlyPaths="-/home/pi"' in lines
    assert 'ReadWritePaths="-/home/pi/Pictures"' in lines
    units = [machine.path("/etc/systemd/system") / f"mediaserver.{kind}"
             for kind in ("service", "socket")]  # fmt: skip
    assert said_by(need("systemd-analyze"), "verify", "--man=no", *units) == (0, "")
    launcher = machine.path("/usr/local/bin/media-server")
    assert said_by(need("shellcheck"), "--shell=sh", HERE / "setup.sh") == (0, "")
    text = launcher.read_text()
    text = text.replace("/opt/", f"{machine.root}/opt/").replace("/etc/", "/nowhere/")
    launcher.write_text(text)
    assert said_by(launcher, "--version", cwd=tmp_path) == (0, f"mediaserver {ms.__version__}\n")
    options = {"cwd": tmp_path, "env": {**BARE_ENVIRONMENT, "MEDIA_SERVER_SECRET": "x"}}
    token = said_by(launcher, "token", "--storage_dir", tmp_path / "media", **options)[1]
    assert re.fullmatch(r"[0-9]+\.[0-9a-f]{64}\n", token)


def test_uninstall_keeps_data_and_secrets_and_purge_does_not(machine, tmp_path):
    machine.setup("--storage-dir", tmp_path / "Pictures")
    fill(machine.path(tmp_path / "Pictures"), {"a.png": png()})
    before = machine.settings
    machine.setup("--uninstall")
    assert "systemctl disable --now mediaserver.service mediaserver.socket" in machine.called()
    assert machine.settings == before
    assert not machine.site.exists()
    gone = ("/opt/mediaserver", "/usr/local/bin/media-server")
    assert [path for path in gone if machine.path(path).exists()] == []
    assert list(machine.path("/etc/systemd/system").rglob("*")) == []
    machine.setup()  # and it is back
    assert machine.settings == before
    machine.setup("--uninstall", "--purge")
    assert not machine.path("/etc/mediaserver").exists()
    assert not machine.path("/var/lib/mediaserver").exists()
    assert (machine.path(tmp_path / "Pictures") / "a.png").exists()
    machine.setup("--uninstall", "--purge")


@pytest.mark.parametrize(
    "options",
    [
        ["--domain", "a b"], ["--domain=x;y"], ["--domain", "a..b"], ["--domain="],
        ["--port", "0"], ["--port", "65536"], ["--port", "080"],
        ["--storage-dir", "/srv/.."], ["--storage-dir", "/srv/../etc"], ["--storage-dir=/usr"],
        ["--storage-dir", "/srv//x"], ["--storage-dir", "/run/lock"], ["--storage-dir", "/mnt/"],
        ["--storage-dir", "../x"], ["--storage-dir", "/etc/x"],
        ["--port", "http"], ["--upload-limit", "lots"], ["--upload-limit", "0"],
        ["--upload-limit", "17179869185G"],
        ["--storage-dir", "/"], ["--storage-dir", "/a$b"], ["--storage-dir", '/a"b'],
        ["--storage-dir", "/a\nb"], ["--storage-dir", "/a\rb"], ["--domain"], ["--purge"],
        ["--unknown"],
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_used_changes_nothing(machine, options):
    assert "usage:" in machine.setup(*options, status=2)
    assert not machine.root.exists()


def test_what_lies_in_data_gives_setup_secrets_and_nothing_else(machine, tmp_path):
    machine.setup()
    data, before = machine.path("/var/lib/mediaserver/data"), machine.settings
    canary, secrets_file = tmp_path / "canary", data / "secrets.env"
    secrets_file.write_text(
        f'UPLOAD_DIR="/x|;1e touch {canary} #"\nPUBLIC_URL="http://evil.example"\nDOMAIN=evil\n'
        f"MAX_MEDIA_BYTES='a[$(touch {canary})]'\nAUTH_TOKEN=evil\nACCEL_REDIRECT=true\n"
    )
    machine.setup()
    assert machine.settings == before
    secrets_file.unlink()
    secrets_file.symlink_to(tmp_path / "calls")
    machine.setup(status=1)
    secrets_file.unlink()
    os.mkfifo(secrets_file)
    machine.setup(status=1)
    assert machine.settings == before
    assert not canary.exists()


def test_neither_the_working_directory_nor_path_has_a_say_in_what_setup_runs(machine, tmp_path):
    here, canary = tmp_path / "here", tmp_path / "canary"
    fill(here, {f"{name}.py": f"open({str(canary)!r}, 'w')".encode() for name in (
        "argparse", "importlib", "os", "pwd", "re", "stat", "urllib", "PIL", "sitecustomize",
    )})  # fmt: skip
    for name in ("sed", "python3", "nginx", "mkdir", "cat", "openssl", "sort", "id"):
        fill(here, {name: f"#!/bin/sh\ntouch {canary}\n".encode()})
        (here / name).chmod(0o755)
    hostile = {"PATH": f"{here}:/usr/bin:/bin", "PYTHONPATH": str(here)}
    machine.setup(cwd=here, env={**machine.environment, **hostile})
    machine.setup("--uninstall", "--purge", cwd=here, env={**machine.environment, **hostile})
    assert not canary.exists()


ODD_SECRETS = {
    "MEDIA_SERVER_SECRET": " a  b=%h$HOME`x`==",
    "AUTH_TOKEN": "'single' and \"double\" and \\n \\\\ #;",
    "JWT_SIGNING_KEY": "${PATH} ü=",
}


def test_secrets_arrive_exactly_in_the_settings_and_in_the_command(machine, tmp_path):
    quoted = {n: v.replace("\\", "\\\\").replace("'", "\\'") for n, v in ODD_SECRETS.items()}
    text = "".join(f"{name}='{value}'\n" for name, value in quoted.items() if "$" not in value)
    (machine.source / ".env").write_text(text)
    machine.setup()
    env = machine.path("/etc/mediaserver/mediaserver.env")
    assert machine.settings["AUTH_TOKEN"] == ODD_SECRETS["AUTH_TOKEN"]
    text = re.sub("(?m)^(MEDIA_SERVER_SECRET|JWT_SIGNING_KEY)=.*\n", "", env.read_text())
    text += 'MEDIA_SERVER_SECRET=" a  b=%h$HOME`x`=="\n' + "JWT_SIGNING_KEY='${PATH} ü='\n"
    env.write_text(text)
    machine.setup("--port", "9001")  # which writes the file anew
    show = tmp_path / "show.py"
    show.write_text("import json, os\nprint(json.dumps(dict(os.environ)))\n")
    text = machine.text("/usr/local/bin/media-server")
    for old, new in {
        "/opt/mediaserver/mediaserver.py": str(show), "/etc/mediaserver": str(env.parent),
        "/var/lib/mediaserver": str(tmp_path), '["setpriv", ': '["env", ',
        '"--reuid=mediaserver", "--regid=mediaserver", "--init-groups", ': "",
        "os.getuid() == 0": "True",
    }.items():  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    show.with_name("command").write_text(text)
    code, said = said_by(sys.executable, show.with_name("command"), env=BARE_ENVIRONMENT)
    assert code == 0, said
    got = json.loads(said)
    assert {name: got[name] for name in ODD_SECRETS} == ODD_SECRETS
    assert got["PORT"] == "9001"


def test_a_dry_run_prints_the_plan_that_the_run_carries_out(machine):
    options = ("--domain=photos.example.org", "--port", "9001", "--accel-redirect")
    said = machine.setup("--dry-run", *options)
    assert not machine.root.exists()
    assert "127.0.0.1:9001" in said
    assert f"the site {DOMAIN}\n" in said
    assert f"/etc/letsencrypt/live/{DOMAIN} yet" in said
    machine.setup(*options)
    planned = set(re.findall(r"^    write (\S+) ", said, re.MULTILINE))
    made = {str(path) for path in machine.root.rglob("*") if path.is_file()}
    keys = {str(machine.path(f"/etc/mediaserver/tls/{n}.pem")) for n in ("privkey", "fullchain")}
    assert planned | keys == made - {str(machine.path("/etc/mediaserver/site.sha256"))}
    assert set(re.findall(r"^    set (\S+) ", said, re.MULTILINE)) == set(machine.settings)
    assert machine.settings["DOMAIN"] == DOMAIN


def test_a_site_that_cannot_be_made_is_an_error_and_leaves_the_old_one(machine):
    machine.setup("--upload-limit", "010M")
    assert machine.settings["MAX_UPLOAD_BYTES"] == "10485760"
    before, example = machine.site.read_text(), machine.source / "nginx.conf"
    example.write_text(example.read_text().replace("client_max_body_size", "client_max_body"))
    assert "nothing was changed" in machine.setup(status=1)
    example.unlink()
    machine.setup(status=1)
    assert machine.site.read_text() == before


def test_nobody_can_register_with_a_new_installation_unless_it_is_told_so(machine):
    assert "--open-registration" in machine.setup("--domain", DOMAIN)
    assert machine.settings["ALLOW_REGISTRATION"] == "false"
    assert machine.settings["PUBLIC_URL"] == f"https://{DOMAIN}"
    machine.setup("--domain", "a.example.org")
    assert machine.settings["PUBLIC_URL"] == "https://a.example.org"
    machine.setup("--open-registration")
    assert machine.settings["ALLOW_REGISTRATION"] == "true"
    env = machine.path("/etc/mediaserver/mediaserver.env")
    text = re.sub("(?m)^(ALLOW_REGISTRATION|PUBLIC_URL)=.*\n", "", env.read_text())
    text += "UPLOAD_DIR=./box\nMEDIA_STORAGE_DIR=/srv//e/./f/\nUSERS_DIR=/srv/people\n"
    env.write_text(text)  # an older one
    machine.setup()
    assert env.read_text() == text
    folders = {"/var/lib/mediaserver/box", "/srv/e/f", "/srv/people"}
    assert folders <= {*re.findall('alias "(.*)/";', machine.site.read_text())}
    env.write_text(text.replace("./box", "s3://family/box").replace("/srv/people", "s3://x/y"))
    machine.setup()
    assert "s3:" not in machine.site.read_text()


def test_no_link_leads_setup_out_of_a_folder(machine, tmp_path):
    (target := tmp_path / "etc").mkdir(0o700)
    machine.path("/srv").mkdir(parents=True)
    machine.path("/srv/link").symlink_to(target)
    said = [machine.setup("--storage-dir", storage, status=1)
            for storage in ("/srv/link", "/srv/link/Pictures")]  # fmt: skip
    assert [each for each in said if "is a link" not in each] == []
    assert list(target.iterdir()) == []
    assert target.stat().st_mode & 0o777 == 0o700
    assert not machine.path("/etc/mediaserver/mediaserver.env").exists()


# A machine of its own for what runs as root: /etc and the rest are layers that go with the mounts
ANOTHER_MACHINE = r"""
W=$1; mount -t tmpfs tmpfs $W || exit 77
for d in etc usr/local; do
    mkdir -p $W/$d/u $W/$d/w
    mount -t overlay overlay -o lowerdir=/$d,upperdir=$W/$d/u,workdir=$W/$d/w /$d || exit 77
done
mkdir -p /var/www
for d in opt var/lib var/www home; do mkdir -p $W/$d; mount --bind $W/$d /$d || exit 77; done
set -eu
no='no() { if "$@"; then echo "this should fail: $*"; exit 1; fi; }'
eval "$no"
as() { setpriv --reuid $1 --regid $1 --init-groups -- sh -euc "$no; $2"; }
useradd --create-home eve
cd /home/eve
mkdir target Pictures Pictures/.incoming; chmod 700 . target
echo x >Pictures/a.jpg; ln -s ../target Pictures/link; ln -s ../target Pictures/.thumbnails
ln -s target Linked; chown -hR eve:eve .; chown root:root target; shift
cat >/usr/local/bin/setfacl <<'END'
#!/bin/sh
if (: </dev/tty) 2>/dev/null || [ -t 1 ] || [ -t 2 ]; then echo terminal >>/home/eve/seen; fi
env >>/home/eve/seen
exec /usr/bin/setfacl "$@"
END
chmod 755 /usr/local/bin/setfacl

no "$@" --storage-dir /home/eve/Linked
no "$@" --storage-dir /home/eve/target
test "$(stat -c '%U %a' target)" = "root 700"
no "$@" --storage-dir /home/eve/Pictures
rm Pictures/.thumbnails
"$@" --storage-dir /home/eve/Pictures
test "$(stat -c '%U %a' target)" = "root 700"
test "$(stat -c '%U' Pictures/.incoming)" = mediaserver
as mediaserver '
    cat Pictures/a.jpg; touch Pictures/new; no ls target; no cat /etc/mediaserver/mediaserver.env'
as eve 'echo y >>Pictures/new; rm Pictures/new'
ROOTS_OWN=1 script -qefc "$*" /dev/null
grep PATH= seen; no grep -e ROOTS_OWN -e terminal seen
media-server token
"$@" --uninstall --purge
no test -e /var/lib/mediaserver; test -e Pictures/a.jpg
id mediaserver  # or another user would get its number, and what it may

mkdir /etc/mediaserver index; echo x >index/i.db; echo mine >index/note; chown -R eve:eve index
for url in sqlite:////home/eve/i.db sqlite:////home/eve/index/i.db; do
    echo "DATABASE_URL=$url" >/etc/mediaserver/mediaserver.env
    no "$@"
    test "$(stat -c %U /home/eve index index/i.db index/note | uniq)" = eve
done
rm index/note; "$@"
test "$(stat -c %U index index/i.db | uniq)" = mediaserver
"$@" --uninstall --purge

usermod -aG mediaserver www-data
"$@"
no sh -c 'id -nG www-data | grep mediaserver'
cd /var/lib/mediaserver; mkdir -p pictures/a pictures/.thumbnails data/images
for f in .thumbnails/t a/roots.jpg; do echo x >pictures/$f; done
chown -R mediaserver:mediaserver pictures data
chown root:root pictures/a/roots.jpg; chmod 600 pictures/a/roots.jpg
"$@" --accel-redirect
as mediaserver '
    umask 027; cd pictures; mkdir -m 700 .incoming; mkdir b
    echo x >.incoming/x; mv .incoming/x b/x.jpg; cp b/x.jpg a/'
as www-data '
    cat pictures/b/x.jpg pictures/a/x.jpg; ls pictures
    for f in data data/images pictures/.thumbnails pictures/.thumbnails/t pictures/.incoming \
        pictures/a/roots.jpg /etc/mediaserver /etc/mediaserver/mediaserver.env; do
        no test -r $f
    done
    no touch pictures/y; no touch pictures/b/y; no ls .'
list() { find . /etc/mediaserver /home ! -type l -printf '%p %m %u:%g\n' | sort; }
list >/var/www/before; "$@"; list >/var/www/after
cmp /var/www/before /var/www/after
sed -i /DATABASE_URL/d /etc/mediaserver/mediaserver.env
cd /; "$@" --uninstall --purge
no id mediaserver; no getent group mediaserver; no getent group mediaserver-pictures
echo all of it
"""


def test_a_folders_owner_gains_nothing_and_loses_nothing_when_root_runs_setup(
    machine, server, tmp_path
):
    if os.getuid() != 0:
        pytest.skip("only root can make users")
    need("setfacl")
    (tmp_path / "layers").mkdir()
    path = f"{os.environ['PATH']}:/usr/local/bin:/usr/sbin"
    environment = {**machine.environment, "DESTDIR": "", "PATH": path}
    code, said = said_by(
        need("unshare"), "--mount", "sh", "-c", ANOTHER_MACHINE, "sh", tmp_path / "layers",
        "sh", machine.source / "setup.sh", "--port", server.port, env=environment,
    )  # fmt: skip
    if code == 77:
        pytest.skip(f"this machine gives no mounts: {said}")
    assert (code, said.splitlines()[-1]) == (0, "all of it"), said
    assert re.search(r"^[0-9]+\.[0-9a-f]{64}$", said, re.MULTILINE)


def test_private_folders_elsewhere_are_writable_and_what_is_private_is_closed_to_nginx(machine):
    pictures = machine.path("/var/lib/mediaserver/pictures")
    (machine.source / ".env").write_text(
        "UPLOAD_DIR=/srv/box\nMEDIA_STORAGE_DIR=/var/lib/mediaserver/pictures/entities\n"
        "DATABASE_URL=sqlite:////srv/index/i.sqlite3\n"
    )
    fill(pictures, {"a/b.png": b"", ".thumbnails/a.png": b"", "entities/a.png": b""})
    for name in ("a/b.png", "a"):
        (pictures / name).chmod(0o700)
    machine.setup("--accel-redirect")
    written = re.findall('ReadWritePaths="-/srv/(.*)"\n', machine.text(DROPIN))
    assert sorted((name, machine.mode(f"/srv/{name}")) for name in written) == [
        ("box", 0o700), ("index", 0o700)]  # fmt: skip
    modes = {path.name: path.stat().st_mode & 0o77 for path in pictures.rglob("*")}
    assert (modes["b.png"], modes["a"]) == (0o40, 0o50)
    assert modes[".thumbnails"] == modes["entities"] == 0
    assert machine.mode("/etc/mediaserver/mediaserver.env") == 0o600


# ======================================================================================
# Clients and proxies as people have them
# ======================================================================================

NODE_UPLOAD = """
const fs = require("fs"), [url, path] = process.argv.slice(-2), form = new FormData()
form.set("file", new Blob([fs.readFileSync(path)]), "photo.png")
fetch(url, {method: "POST", body: form})
  .then(answer => answer.text()).then(text => process.stdout.write(text))
"""
ANDROID_BOUNDARY = "*****"  # of the snippet that half of all apps began with


def body_pieces(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 5000):
        yield data[start : start + 5000]


def multipart_type() -> dict[str, str]:
    return {"Content-Type": form("x", b"")[1]}


def run_client(*words: object) -> bytes:
    done = subprocess.run(
        list(map(str, words)), capture_output=True, timeout=RUN_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    return bytes(done.stdout)


def upload_by_curl(url: str, path: Path, *options: str) -> Any:
    return json.loads(run_client(need("curl"), "-sS", *options, "-F", f"file=@{path}", url))


def upload_by_wget(url: str, path: Path) -> Any:
    body = path.with_suffix(".form")
    body.write_bytes(form(path.name, path.read_bytes())[0])
    header = f"--header=Content-Type: {multipart_type()['Content-Type']}"
    return json.loads(run_client(need("wget"), "-qO-", header, f"--post-file={body}", url))


def upload_by_node(url: str, path: Path) -> Any:
    return json.loads(run_client(need("node"), "-e", NODE_UPLOAD, url, path))


def upload_by_requests(url: str, path: Path) -> Any:
    with path.open("rb") as file:
        return need("requests").post(url, files={"file": file}, timeout=RUN_SECONDS).json()


def upload_by_requests_in_pieces(url: str, path: Path) -> Any:
    pieces = body_pieces(form(path.name, path.read_bytes())[0])
    return (
        need("requests")
        .post(url, data=pieces, headers=multipart_type(), timeout=RUN_SECONDS)
        .json()
    )


def upload_by_httpx(url: str, path: Path) -> Any:
    with path.open("rb") as file:
        return need("httpx").post(url, files={"file": file}).json()


def upload_by_httpx_in_pieces(url: str, path: Path) -> Any:
    pieces = body_pieces(form(path.name, path.read_bytes())[0])
    return need("httpx").post(url, content=pieces, headers=multipart_type()).json()


def upload_by_http_url_connection(url: str, path: Path) -> Any:
    """The bytes that Java's HttpURLConnection sends for the snippet, which asks for odd fields."""
    about, mark = urlsplit(url), f"--{ANDROID_BOUNDARY}"
    disposition = f'Content-Disposition: form-data; name="file";filename="{path.name}"'
    body = f"{mark}\r\n{disposition}\r\n\r\n".encode() + path.read_bytes()
    body += f"\r\n{mark}--\r\n".encode()
    head = (
        f"POST {about.path}?{about.query} HTTP/1.1\r\nConnection: Keep-Alive\r\n"
        f"ENCTYPE: multipart/form-data\r\nuploaded_file: {path.name}\r\n"
        f"Content-Type: multipart/form-data;boundary={ANDROID_BOUNDARY}\r\n"
        f"User-Agent: Dalvik/2.1.0 (Linux; U; Android 14)\r\nHost: {about.netloc}\r\n"
        "Accept-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with socket.create_connection((about.hostname or "", about.port or 80), DEADLINE) as peer:
        peer.sendall(head.encode())
        for piece in body_pieces(body):
            peer.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
        peer.sendall(b"0\r\n\r\n")
        response = http.client.HTTPResponse(peer)
        response.begin()
        return json.loads(response.read())


UPLOADERS: dict[str, Callable[[str, Path], Any]] = {
    "curl": upload_by_curl,
    "curl, chunked": lambda url, path: upload_by_curl(url, path, "-HTransfer-Encoding: chunked"),
    "curl, HTTP/1.0": lambda url, path: upload_by_curl(url, path, "--http1.0"),
    "wget": upload_by_wget,
    "node": upload_by_node,
    "requests": upload_by_requests,
    "requests, a generator": upload_by_requests_in_pieces,
    "httpx": upload_by_httpx,
    "httpx, a generator": upload_by_httpx_in_pieces,
    "HttpURLConnection": upload_by_http_url_connection,
}
DOWNLOADERS = {  # words of a command that writes URL to FILE
    "curl": "curl -sSfo FILE URL",
    "curl, resumed": "curl -sSfC - -o FILE URL",
    "wget": "wget -qO FILE URL",
    "wget, resumed": "wget -qcO FILE URL",
    "aria2c, in four pieces": "aria2c -q -x4 -s4 -k1M --file-allocation=none -d / -o FILE URL",
    "aria2c, resumed": "aria2c -q -c --file-allocation=none -d / -o FILE URL",
}


def download(client: str, url: str, target: Path, content: bytes) -> bytes:
    """What a client makes of a file, of which it has the beginning if it is to resume."""
    if "resumed" in client:
        target.write_bytes(content[: len(content) // 3])
    program, *words = DOWNLOADERS[client].split()
    given = {"URL": url, "FILE": str(target).lstrip("/") if "-d" in words else str(target)}
    run_client(need(program), *(given.get(word, word) for word in words))
    return target.read_bytes()


@pytest.fixture(scope="module")
def large(server: Server) -> tuple[str, bytes]:
    """The URL of a picture of 4 MB, and its bytes."""
    content = png_of(4 << 20)
    return str(server.upload(content).json["url"]), content


@pytest.mark.parametrize("client", UPLOADERS)
def test_clients_upload_what_is_then_there_byte_for_byte(server, tmp_path, client):
    path = tmp_path / "photo.png"
    path.write_bytes(png_of(30_000))
    made = UPLOADERS[client](f"{server.url}/upload?token={upload_token()}", path)
    assert made["sha256"] == sha256(path.read_bytes())
    assert server.get(local(made["url"])).body == path.read_bytes()


@pytest.mark.parametrize("client", DOWNLOADERS)
def test_clients_download_resume_and_split_files(large, tmp_path, client):
    url, content = large
    assert download(client, url, tmp_path / "got.png", content) == content


PROXIES = {  # command and configuration; LISTEN, SERVER and FOLDER stand for what is free
    "haproxy": ("haproxy -f FOLDER/config", """
defaults
  mode http
  option forwardfor
  timeout connect 10s
  timeout client 60s
  timeout server 60s
frontend in
  bind 127.0.0.1:LISTEN
  default_backend out
backend out
  server one 127.0.0.1:SERVER
"""),
    "varnishd": (
        "varnishd -j none -F -a 127.0.0.1:LISTEN -b 127.0.0.1:SERVER -n FOLDER/work -T none", ""
    ),
    "caddy": ("caddy run --adapter caddyfile --config FOLDER/config", """
{
  admin off
  auto_https off
}
http://127.0.0.1:LISTEN {
  reverse_proxy 127.0.0.1:SERVER
}
"""),
}  # fmt: skip


@pytest.fixture(scope="module", params=PROXIES)
def proxied(
    request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The URL of a proxy before the server."""
    folder, port = tmp_path_factory.mktemp(request.param), free_port()
    command, text = PROXIES[request.param]
    need(request.param)
    places = {"LISTEN": str(port), "SERVER": str(server.port), "FOLDER": str(folder)}
    for name, value in places.items():
        command, text = command.replace(name, value), text.replace(name, value)
    (folder / "config").write_text(text)
    environment = {**os.environ, "HOME": str(folder), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command.split(), stdout=log, stderr=log, env=environment)
    try:
        wait_until(lambda: accepts(port), request.param)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(DEADLINE)


def test_through_proxies_files_come_and_go_and_no_error_is_kept(server, proxied, tmp_path):
    content = png_of(3 << 20)
    path, url = tmp_path / "photo.png", f"{proxied}/image/{sha256(content)}"
    path.write_bytes(content)
    with need("httpx").Client() as client:
        assert client.get(url).status_code == 404
        put = f"{proxied}/image/photo.png?token={upload_token()}"
        made = upload_by_curl(put, path, "-XPUT")
        assert made["sha256"] == sha256(content)
        assert client.get(url).content == content, "the 404 was not kept"
        assert client.get(url, headers={"Range": "bytes=5-9"}).content == content[5:10]
        assert download("aria2c, in four pieces", url, tmp_path / "got.png", content) == content
        fresh = client.get(url, headers={"If-None-Match": f'"{sha256(content)}"'})
        assert (fresh.status_code, fresh.content) == (304, b"")
        upload = f"{proxied}/upload?token={upload_token()}"
        assert local(upload_by_requests_in_pieces(upload, path)["url"]).startswith("/media/")
        length = len(server.log)
        client.get(f"{proxied}/list", headers={"Authorization": "Bearer x"})
        assert "refused 127.0.0.1 anonymous GET /list: 401" in server.log[length:]


@pytest.mark.parametrize("cache", ["nginx", "varnishd"])
def test_a_cache_as_in_the_readme_serves_what_is_public_when_the_server_is_gone(
    start, tmp_path, readme, cache
):
    once()
    need(cache)
    server, port, folder = start(), free_port(), tmp_path / "cache"
    folder.mkdir()
    form = (
        r"```\n(proxy_cache_path .*?)(location .*?)```"
        if cache == "nginx"
        else r"```\n(vcl .*?)```"
    )
    text = re.search(form, readme, re.DOTALL)
    assert text
    if cache == "nginx":
        parts = (part.replace("/var/cache/nginx", str(folder)) for part in text.groups())
        config = (
            "user root; daemon off; error_log stderr; pid {0}/pid; events {{}}"
            " http {{ access_log off; proxy_temp_path {0}/t; client_body_temp_path {0}/b; {1}"
            " server {{ listen 127.0.0.1:{3}; {2} }} }}"
        ).format(folder, *parts, port)
        command = f"nginx -e stderr -p {folder} -c {folder}/config"
    else:
        config = text[1]
        command = (
            f"varnishd -j none -F -a 127.0.0.1:{port} -f {folder}/config -n {folder}/w -T none"
        )
    config = config.replace("8000", str(server.port))
    (folder / "config").write_text(config)
    public, private = png(), png()
    shown, hidden = local(server.upload(public).json["url"]), server.store(private).json
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command.split(), stdout=log, stderr=log, env=environment)
    try:
        wait_until(lambda: accepts(port), cache)
        with need("httpx").Client(base_url=f"http://127.0.0.1:{port}") as client:
            kept_back = f"/image/{hidden['stored_as']}"
            assert client.get(shown).content == public
            assert client.get(kept_back, headers=OWNER).content == private
            server.stop()
            assert client.get(shown).content == public
            assert client.get(kept_back).status_code >= 500
    finally:
        process.terminate()
        process.wait(DEADLINE)


# ======================================================================================
# The file, its documents, and its speed
# ======================================================================================


@functools.cache
def read_sections() -> tuple[ast.Module, list[tuple[int, int, str]]]:
    """The program's tree, and first line, number and title of each section."""
    text = PROGRAM.read_text("utf-8")
    banner = re.compile(r"^# ={20,}\n# (\d+)\. (.+)\n# ={20,}\n", re.MULTILINE)
    found = [(text.count("\n", 0, m.start()) + 1, int(m[1]), m[2]) for m in banner.finditer(text)]
    return ast.parse(text), found


def defined_names(node: ast.stmt) -> set[str]:
    """The names that a statement at the top level gives to the module."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    return {
        item.id
        for item in ast.walk(node)
        if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store)
    }


class FreeNames(ast.NodeVisitor):
    """The names that are read in a statement and belong to none of its functions."""

    def __init__(self) -> None:
        self.scopes: list[set[str]] = []
        self.found: set[str] = set()

    def visit_Name(self, node: ast.Name) -> None:
        if not any(node.id in scope for scope in self.scopes):
            self.found.add(node.id)

    def visit_FunctionDef(self, node: Any) -> None:
        body = node.body if isinstance(node.body, list) else [node.body]
        arguments = node.args
        for outside in (
            *getattr(node, "decorator_list", []), *arguments.defaults,
            *filter(None, arguments.kw_defaults), getattr(node, "returns", None),
            *(a.annotation for a in ast.walk(arguments) if isinstance(a, ast.arg)),
        ):  # fmt: skip
            if outside is not None:
                self.visit(outside)
        local = {a.arg for a in ast.walk(arguments) if isinstance(a, ast.arg)}
        for item in body:
            for inner in ast.walk(item):
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                    local.add(inner.id)
                elif isinstance(inner, (ast.FunctionDef, ast.ClassDef)) or (
                    isinstance(inner, ast.ExceptHandler) and inner.name
                ):
                    local.add(inner.name)
                elif isinstance(inner, ast.alias):
                    local.add(inner.asname or inner.name)
        self.scopes.append(local)
        for item in body:
            self.visit(item)
        self.scopes.pop()

    visit_Lambda = visit_FunctionDef


def test_each_section_uses_only_the_sections_above_it():
    tree, sections = read_sections()
    numbers = [number for _, number, _ in sections]
    assert numbers == list(range(1, 15))

    def section_of(node: ast.stmt) -> int:
        return max((n for line, n, _ in sections if line < node.lineno), default=0)

    home = {name: section_of(node) for node in reversed(tree.body) for name in defined_names(node)}
    wrong = []
    for node in tree.body:
        used = FreeNames()
        used.visit(node)
        wrong += [
            f"line {node.lineno}, section {section_of(node)} uses {name} of section {home[name]}"
            for name in sorted(used.found)
            if home.get(name, 0) > section_of(node)
        ]
    assert wrong == []
    assert home["main"] == 14
    assert home["Route"] > home["Response"] > home["Scanner"]


def test_the_banners_of_sections_and_of_their_parts_have_one_form_each():
    lines = PROGRAM.read_text("utf-8").splitlines()
    banners = [line for line in lines if line.startswith(("# --", "# =="))]
    assert {len(line) for line in banners} == {88, 90}
    form = re.compile("# ={86}|# -- [A-Zf].*[^- ] -{3,}")
    assert [line for line in banners if not form.fullmatch(line)] == []


def undocumented(owner: Any, body: list[ast.stmt]) -> Iterator[str]:
    """The public classes and functions that say nothing; a method may have its base's words."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            item, is_class = getattr(owner, node.name), isinstance(node, ast.ClassDef)
            text = ast.get_docstring(node) if is_class else inspect.getdoc(item)
            if not text or text.startswith(">>>"):
                yield f"line {node.lineno}: {node.name}"
            yield from undocumented(item, node.body) if is_class else ()


def test_every_public_function_class_and_method_has_a_docstring():
    assert list(undocumented(ms, read_sections()[0].body)) == []


def test_no_exception_is_swallowed_whole_but_in_few_places():
    handlers = [
        node for node in ast.walk(read_sections()[0]) if isinstance(node, ast.ExceptHandler)
    ]
    assert not [node.lineno for node in handlers if node.type is None]
    whole = [n for n in handlers if isinstance(n.type, ast.Name) and n.type.id == "Exception"]
    assert len(whole) <= 7  # loops of threads, a request, a connection's end


@pytest.fixture(scope="module")
def readme() -> str:
    return (HERE / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", ms.SETTINGS)
def test_every_setting_is_in_the_readme(readme, name):
    assert re.search(rf"`({name.upper()}|--{name})`", readme)


@pytest.mark.parametrize("route", ms.ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_every_route_is_in_the_readme(readme, route):
    # A parameter may have another name there
    path = re.sub(r"\\\{\w+\\\}", r"\\{\\w+\\}", re.escape(route.path))
    assert re.search(rf"\b{route.method}\b[^\n|]*?(?<![\w/}}]){path}(?![\w{{]|/[\w{{])", readme)


@pytest.mark.parametrize("name", [name for name in ms.COMMANDS if name != "serve"])
def test_every_command_is_in_the_readme(readme, name):
    assert re.search(rf"mediaserver\.py {name}\b", readme)


def test_the_example_of_a_dotenv_names_real_settings_with_values_that_parse():
    text = (HERE / ".env.example").read_text("utf-8")
    named = set(re.findall(r"^#? ?([A-Z_]+)=", text, re.MULTILINE))
    table = {name.upper(): setting for name, setting in ms.SETTINGS.items()}
    assert named
    assert {name for name in named if not table[name].environment} == set()
    assert named >= {"MEDIA_SERVER_SECRET", "AUTH_TOKEN", "STORAGE_DIR"}
    for name, value in ms.parse_dotenv(text, {}).items():
        if value:
            table[name].parse(value)


# -- Speed: run with `pytest -m bench -s`

ASGI_APP = '''
import os

async def app(scope, receive, send):
    """What a person writes first: files from the folder, ranges, conditions, uploads."""
    if scope["type"] != "http":
        return
    fields = dict(scope["headers"])
    status, headers, body = 200, [(b"etag", b'"x"'), (b"content-type", b"image/png")], b""
    if scope["method"] == "POST":
        with open("upload", "wb") as file:
            more = True
            while more:
                message = await receive()
                file.write(message.get("body", b""))
                more = message.get("more_body", False)
            file.flush()
            os.fsync(file.fileno())
        status = 201
    elif b"if-none-match" in fields:
        status = 304
    else:
        with open("." + scope["path"], "rb") as file:
            if b"range" in fields:
                first, last = map(int, fields[b"range"][6:].split(b"-"))
                file.seek(first)
                status, body = 206, file.read(last - first + 1)
            else:
                body = file.read()
    if status != 304:
        headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
'''


def fetch(sock: socket.socket, request: bytes) -> bool:
    """One request that is answered well; whether the connection is still there afterwards."""
    sock.sendall(request)
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    assert head[9:12] in {b"200", b"201", b"206", b"304"}, head
    length = re.search(rb"(?i)content-length: (\d+)", head)
    left = int(length[1]) - len(body) if length else 0
    while left > 0:
        left -= len(sock.recv(65536))
    return head.startswith(b"HTTP/1.1") and b"connection: close" not in head.lower()


def fetch_until(end: float, port: int, request: bytes) -> list[float]:
    """Seconds that each answer took, one after the other, on a kept connection if one is kept."""
    times: list[float] = []
    sock = None
    while (begun := time.monotonic()) < end:
        sock = sock or socket.create_connection(("127.0.0.1", port), DEADLINE)
        if not fetch(sock, request):
            sock.close()
            sock = None
        times.append(time.monotonic() - begun)
    if sock:
        sock.close()
    return times


def load(port: int, request: bytes, seconds: float, connections: int = 8) -> list[float]:
    """Seconds that each answer took, asked for by a process for each connection."""
    end = time.monotonic() + seconds + 0.1  # until all have begun
    with ProcessPoolExecutor(connections, get_context("fork")) as pool:
        asked = [pool.submit(fetch_until, end, port, request) for _ in range(connections)]
        return [each for one in asked for each in one.result()]


def answers_per_second(port: int, request: bytes, seconds: float, connections: int = 8) -> float:
    times = load(port, request, seconds, connections)
    return connections / statistics.mean(times)


@pytest.mark.bench
def test_small_answers_come_faster_than_those_of_http_server_and_uvicorn(start):
    running = start()
    small, large = (running.upload(png_of(size)).json["filename"] for size in (8192, 1_000_000))
    answer = running.get(f"/media/{small}")
    etag, modified = answer.headers["ETag"], answer.headers["Last-Modified"]
    ports = {"http.server": free_port()}
    commands = {"http.server": ["http.server", "--bind", "127.0.0.1"]}
    if importlib.util.find_spec("uvicorn"):
        (running.storage / "stock_app.py").write_text(ASGI_APP)
        ports["uvicorn"] = free_port()
        commands["uvicorn"] = ["uvicorn", "stock_app:app", "--log-level", "error", "--port"]
    stock = [
        subprocess.Popen(
            [sys.executable, "-m", *command, str(ports[name])], cwd=running.storage,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for name, command in commands.items()
    ]  # fmt: skip
    head, body = upload_request(png_of(200_000))
    condition = f"If-None-Match: {etag}"
    rows = {  # request, and what stock servers get instead; http.server knows no range, no POST
        "GET 8 KB": (get_line(f"/media/{small}"), None, "http.server uvicorn"),
        "304": (
            get_line(f"/media/{small}", condition),
            {"http.server": get_line(f"/media/{small}", f"If-Modified-Since: {modified}")},
            "http.server uvicorn",
        ),
        "Range of 1 MB": (get_line(f"/media/{large}", "Range: bytes=5000-5999"), None, "uvicorn"),
        "upload 200 KB": (head + body, None, "uvicorn"),
    }
    ratios = {}
    try:
        for port in ports.values():
            wait_until(lambda port=port: accepts(port), "a stock server")
        print()
        for row, (request, others, names) in rows.items():
            rates = {"mediaserver": []} | {name: [] for name in ports if name in names.split()}
            for _ in range(3):  # in turn, so that all meet the same neighbours
                for name, found in rates.items():
                    port = ports.get(name, running.port)
                    found.append(answers_per_second(port, (others or {}).get(name, request), 0.5))
            rate = {name: statistics.median(found) for name, found in rates.items()}
            ours = rate.pop("mediaserver")
            ratios |= {(row, name): ours / theirs for name, theirs in rate.items()}
            text = [f"{name} {rate[name]:.0f} (x {ratios[row, name]:.1f})" for name in rate]
            print(f"{row:14} mediaserver {ours:.0f}/s, " + ", ".join(text))
    finally:
        for process in stock:
            process.terminate()
            process.wait(DEADLINE)
    assert ratios["GET 8 KB", "http.server"] > 1


def in_turn(rounds: int, measures: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Medians of measures that take turns, so that all meet the same neighbours."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            found[name].append(measure())
    return {name: statistics.median(values) for name, values in found.items()}


@pytest.mark.bench
@pytest.mark.parametrize(("size", "count"), [(20_000, 30), (9_500_000, 6)])
def test_a_bucket_beside_a_folder_and_beside_rclone_copy(start, store, tmp_path, size, count):
    contents = [png_of(size) for _ in range(count)]
    servers = {"folder": start(storage=str(tmp_path / "f")), "bucket": start(**store.environment)}
    latest: dict[str, list[str]] = {}

    def rclone(*words: object) -> float:
        remote = f":s3,provider=Other,endpoint='{store.endpoint}',access_key_id={S3_KEYS[0]}"
        remote += f",secret_access_key='{S3_KEYS[1]}':family/{store.prefix}copy"
        given = [remote if word == "bucket" else word for word in words]
        command = [need("rclone"), "copy", "--config", "", "--transfers", "1", "--checkers", "1"]
        begun = time.monotonic()
        subprocess.run([*command, "--ignore-times", *given], check=True, capture_output=True)
        return count / (time.monotonic() - begun)

    def send(name: str) -> float:
        begun = time.monotonic()
        latest[name] = [servers[name].upload(content).json["url"] for content in contents]
        return count / (time.monotonic() - begun)

    def get(name: str) -> float:
        begun = time.monotonic()
        for url, content in zip(latest[name], contents, strict=True):
            assert len(servers[name].get(local(url)).body) == len(content)
        return count / (time.monotonic() - begun)

    (source := tmp_path / "source").mkdir()
    for number, content in enumerate(contents):
        (source / f"{number}.png").write_bytes(content)
    rates = in_turn(3, {
        **{f"upload {name}": functools.partial(send, name) for name in servers},
        "upload rclone": lambda: rclone(source, "bucket"),
        **{f"GET {name}": functools.partial(get, name) for name in servers},
        "GET rclone": lambda: rclone("bucket", tmp_path / "fetched"),
    })  # fmt: skip
    print(f"\n{count} files of {size / 1e6:.2f} MB, one after the other:")
    for row, rate in rates.items():
        print(f"{row:14} {rate:6.0f}/s {rate * size / 1e6:6.1f} MB/s")


@pytest.mark.bench
def test_others_wait_no_longer_while_their_bucket_hangs(stored):
    server, store = stored
    path = local(server.upload(content := png_of(20_000)).json["url"])
    rows = {"health": get_line("/health"), "library": get_line("/list")}
    over = threading.Event()

    def ask(number: int) -> None:
        while not over.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                server.get(path) if number % 2 else server.upload(content)

    print()
    for state in ("answers", "hangs"):
        over.clear()
        if state == "hangs":
            store.process.send_signal(signal.SIGSTOP)
        with ThreadPoolExecutor(8) as pool:
            for number in range(8):
                pool.submit(ask, number)
            time.sleep(1)  # until they hang, or are refused
            for row, request in rows.items():
                times = sorted(load(server.port, request, 2, 2))
                p50, p99 = (times[len(times) * each // 100] * 1000 for each in (50, 99))
                print(f"{row:8} while the bucket {state}: p50 {p50:.1f} ms, p99 {p99:.1f} ms")
            over.set()
            store.process.send_signal(signal.SIGCONT)


@pytest.mark.bench
def test_two_workers_answer_more_than_one(start, tmp_path):
    servers = {
        number: start("--workers", str(number), storage=str(tmp_path / f"{number}"))
        for number in (1, 2)
    }
    for running in servers.values():
        for number in range(100):
            Entities(running).collection(label=f"{number}")
    request = get_line("/entity/?page_size=100")
    rate = in_turn(5, {
        f"{number}": functools.partial(answers_per_second, running.port, request, 1)
        for number, running in servers.items()
    })  # fmt: skip
    print(f"\nlists of 100: {rate['1']:.0f}/s, with two workers x {rate['2'] / rate['1']:.2f}")


@pytest.mark.bench
def test_a_scan_leaves_others_their_speed(start, tmp_path):
    """What one process beside it costs, which does nothing but compute, is measured as well."""
    need("PIL")
    running = start()
    request = get_line(f"/media/{running.upload(png_of(8192)).json['filename']}")
    measure = functools.partial(answers_per_second, running.port, request, 1)
    quiet = statistics.median(measure() for _ in range(3))
    with subprocess.Popen(["nice", "sh", "-c", "while :; do :; done"]) as spinning:
        try:
            beside = statistics.median(measure() for _ in range(3))
        finally:
            spinning.kill()
    content = jpeg(4000, 3000)
    fill(running.storage, {f"{n}.jpg": content + b"%d" % n for n in range(1000)})
    running.process.send_signal(signal.SIGHUP)
    folder = running.storage / ".thumbnails"
    wait_until(lambda: folder.exists() and len(list(folder.iterdir())) > 5, "thumbnails")
    rates = [measure() for _ in range(3)]
    assert len(list(folder.iterdir())) < 1000, "the scan was over too early"
    scanning = statistics.median(rates)
    print(f"\nGETs during a scan: {scanning / quiet:.2f} of the rate without")
    print(f"beside any other niced process: {beside / quiet:.2f}")


@pytest.mark.bench
def test_a_thousand_idle_connections_cost_others_nothing(start):
    running = start()
    request = get_line(f"/media/{running.upload(png_of(8192)).json['filename']}")

    def p99() -> float:
        return statistics.quantiles(load(running.port, request, 1), n=100)[98]

    before = statistics.median(p99() for _ in range(5))
    at_first = memory(running.process.pid, "VmRSS")
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(socket.create_connection(("127.0.0.1", running.port)))
        after = statistics.median(p99() for _ in range(5))
        grown = memory(running.process.pid, "VmRSS") - at_first
    print(f"\np99 with 1,000 idle connections: x {after / before:.2f}, {grown >> 10} KiB more")
    assert grown < 20 << 20


def p99(port: int, request: bytes, rounds: int = 5, connections: int = 4) -> float:
    """The median of a few rounds' 99th percentiles, in seconds."""
    each = (load(port, request, 1, connections) for _ in range(rounds))
    return statistics.median(statistics.quantiles(one, n=100)[98] for one in each)


@pytest.mark.bench
@pytest.mark.parametrize("way", ["directly", "through nginx, from one address"])
def test_600_slow_bodies_cost_others_next_to_nothing(start, tmp_path, certificate, way):
    running = start()
    account = an_account()
    assert running.call("POST", REGISTER, account)[0] == 201
    login = json.dumps({"email": account["email"], "password": account["password"]}).encode()
    kind = "Content-Type: application/json"
    measured = {
        "GET": get_line("/health"),
        "upload": b"".join(upload_request(png_of(50_000))),
        "login": post("/api/auth/login", len(login), kind) + login,
    }
    before = {name: p99(running.port, request) for name, request in measured.items()}
    at_first = memory(running.process.pid, "VmRSS")
    with contextlib.ExitStack() as stack:
        site = running
        if way != "directly":
            site = stack.enter_context(Site(tmp_path, certificate, running.port, running.storage))
        for number in range(600):
            raw = stack.enter_context(Raw(site))
            if site is not running:
                raw.socket = ssl._create_unverified_context().wrap_socket(raw.socket)
            client = f"X-Forwarded-For: 10.0.{number % 20}.1"
            raw.send(post("/api/auth/login", 100_000, kind, client) + b'{"a')
        after = {name: p99(running.port, request) for name, request in measured.items()}
        grown = memory(running.process.pid, "VmRSS") - at_first
    ratios = ", ".join(f"{name} x {after[name] / before[name]:.2f}" for name in measured)
    print(f"\np99 with 600 slow bodies {way}: {ratios}; {grown >> 20} MiB more")


@pytest.mark.bench
def test_200_thumbnails_that_are_not_made_yet_cost_others_little(start):
    """What as many processes beside it cost as there are decoders is measured as well."""
    need("PIL")
    running = start()
    running.scanned()
    picture = jpeg(4000, 3000)
    made = [running.upload(picture + b"%d" % number).json for number in range(200)]
    measured = {"/health": get_line("/health"), "GET": get_line(f"/media/{made[0]['filename']}")}
    running.get(f"/media/{made[0]['filename']}")
    before = {name: p99(running.port, request) for name, request in measured.items()}
    spinning = [
        subprocess.Popen(["nice", "-n", "10", "sh", "-c", "while :; do :; done"])
        for _ in range(os.cpu_count() or 1)
    ]
    beside = {name: p99(running.port, request) for name, request in measured.items()}
    for process in spinning:
        process.kill()
        process.wait()
    after: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(Raw(running)) for _ in made]
        for raw, value in zip(waiting, made, strict=True):
            raw.send(get_line(f"/thumbnail/{value['sha256']}"))
        for name, request in measured.items():
            after[name] = p99(running.port, request, rounds=1)
        statuses = Counter(raw.answer().status for raw in waiting)
    for name in measured:
        ratio, others = after[name] / before[name], beside[name] / before[name]
        print(f"\np99 of {name} with 200 cold thumbnails: x {ratio:.2f}", end="")
        print(f"; beside processes that compute x {others:.2f}")
    print(statuses)


@pytest.mark.bench
def test_ten_thousand_chunks_of_one_byte_cost_little(start):
    running = start()
    head, body = upload_request(png_of(10_000), "Transfer-Encoding: chunked")
    ticks = os.sysconf("SC_CLK_TCK")

    def cpu() -> float:
        fields = Path(f"/proc/{running.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / ticks

    with Raw(running) as raw:
        raw.send(head)
        before = cpu()
        for byte in body:
            raw.send(b"1\r\n%c\r\n" % byte)
        raw.send(b"0\r\n\r\n")
        assert raw.answer().status == 201
        print(f"\n{len(body)} chunks of a byte: {cpu() - before:.2f} s of CPU")


def costs(*command: object) -> tuple[float, float]:
    """Seconds of CPU and of the clock that a program takes, with its children."""
    begun = time.monotonic()
    process = os.posix_spawnp(
        str(command[0]), list(map(str, command)), {**os.environ, **SECRETS},
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )  # fmt: skip
    _, status, used = os.wait4(process, 0)
    assert status == 0, command
    return used.ru_utime + used.ru_stime, time.monotonic() - begun


@pytest.mark.bench
def test_the_owner_s_tools_beside_sha256sum_rsync_and_a_plain_upload(start, tmp_path):
    running, places = start(), tmp_path / "backups"
    contents = [png_of(size) for size in [4_000_000] * 30 + [40_000] * 500]
    fill(running.storage, {f"{n % 9}/{n}.png": each for n, each in enumerate(contents)})
    running.rescan()
    files = list(running.storage.glob("?/*.png"))
    size, large = sum(map(len, contents)), png_of(100_000_000)
    program = [sys.executable, ms.__file__]
    storage = ["--storage_dir", running.storage]
    receiver = start(storage=str(tmp_path / "receiver"))
    entities = Entities(receiver)

    def send(tus: bool) -> tuple[float, float]:
        content = large + unique()
        before, begun = processor_seconds(receiver.process.pid), time.monotonic()
        if tus:
            upload = begin(receiver, len(content))
            for at in range(0, len(content), 50_000_000):
                assert upload.send(at, content[at : at + 50_000_000]).status == 204
        else:
            entities.create(content)
        return processor_seconds(receiver.process.pid) - before, time.monotonic() - begun

    def back_up(is_first: bool) -> tuple[float, float]:
        if is_first:
            shutil.rmtree(places, ignore_errors=True)
        return costs(*program, "backup", places, *storage)

    def rsync(is_first: bool) -> tuple[float, float]:
        if is_first:
            shutil.rmtree(tmp_path / "rsync", ignore_errors=True)
        return costs(need("rsync"), "-a", f"{running.storage}/", tmp_path / "rsync")

    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "verify": lambda: costs(*program, "verify", *storage),
        "sha256sum": lambda: costs("sha256sum", *files),
        "first backup": lambda: back_up(True), "first rsync -a": lambda: rsync(True),
        "second backup": lambda: back_up(False), "second rsync -a": lambda: rsync(False),
        "tus": lambda: send(True), "plain upload": lambda: send(False),
    }  # fmt: skip
    rounds = [{name: way() for name, way in ways.items()} for _ in range(3)]
    print(f"\n{len(files)} files of {size / 1e6:.0f} MB; uploads of {len(large) / 1e6:.0f} MB:")
    for name in ways:
        processor, clock = (statistics.median(each[name][n] for each in rounds) for n in (0, 1))
        amount = (len(large) if name in {"tus", "plain upload"} else size) / 1e6
        print(f"{name:16} {processor:5.2f} s of CPU {amount / clock:6.0f} MB/s")
