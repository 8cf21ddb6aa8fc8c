#!/usr/bin/env python3
"""CPU that uploads and pages of lists take, of this program and of another revision in turn.

    python3 .ci/bench_requests.py [--against 29347ff] [--rounds 5] [--work DIR] [ROW ...]

CPU is that of a server's whole process tree: what others do on the machine moves it less than the
rate. Each round measures every row at every server, so all meet the same neighbours.
"""

from __future__ import annotations

import argparse
import functools
import os
import secrets
import shutil
import socket
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
KEY, BOUNDARY = "k" * 40, "frontier"
LISTED = 10_000  # records, and entities, in the lists
OWNER = f"Authorization: Bearer {KEY}\r\n"


def jpeg(size: int) -> bytes:
    """A JPEG as far as its headers go, unlike all others."""
    frame = struct.pack(">HHBHHB", 0xFFC0, 11, 8, 480, 640, 1) + b"\1\x11\0"
    comment = b"\xff\xfe" + struct.pack(">H", 34) + secrets.token_hex(16).encode()
    head = b"\xff\xd8" + comment + frame + b"\xff\xda\0\x08\1\1\0\0\x3f\0"
    return head + os.urandom(size - len(head))


def upload(method: str, path: str, size: int, **texts: str) -> bytes:
    parts = [(f'name="{name}"', text.encode()) for name, text in texts.items()]
    field = "image" if path == "/entity/" else "file"
    parts.append((f'name="{field}"; filename="{secrets.token_hex(8)}.jpg"', jpeg(size)))
    body = b"".join(
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; {name}\r\n\r\n".encode()
        + content
        + b"\r\n"
        for name, content in parts
    )
    body += f"--{BOUNDARY}--\r\n".encode()
    fields = f"{OWNER}Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\n{fields}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def get(path: str, fields: str = OWNER) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n{fields}\r\n".encode()


class Server:
    """A program that serves a fresh folder."""

    def __init__(self, program: Path, work: str | None) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=work))
        (self.folder / "pictures").mkdir()
        self.log = self.folder / "log"
        secret = {"MEDIA_SERVER_SECRET": KEY, "AUTH_TOKEN": KEY, "JWT_SIGNING_KEY": KEY}
        command = [sys.executable, program, "--storage_dir", self.folder / "pictures"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--port", "0"], env={**os.environ, **secret}, stderr=log
            )
        while "listening on" not in (text := self.log.read_text()):
            time.sleep(0.05)
        self.port = int(text.partition("listening on http://")[2].split()[0].rpartition(":")[2])
        time.sleep(1)  # its first scan

    def cpu(self) -> float:
        """Seconds that its processes have run."""
        return sum(
            int(path.read_text().split()[0]) / 1e9
            for process in tree(self.process.pid)
            for path in Path(f"/proc/{process}/task").glob("*/schedstat")
        )

    def fill(self) -> None:
        """Put records and collections into its index, of the user 1."""
        path = self.folder / "pictures/.mediaserver/index.sqlite3"
        db, now = sqlite3.connect(path), time.time()
        for number in range(LISTED):
            add(db, "media", id=str(uuid.uuid4()), user_id=1, name=f"{number}", type="image",
                size=5, created_at=now - number, updated_at=now - number)  # fmt: skip
            for table in ("entity", "entity_version"):
                add(db, table, id=number + 1, version=1, transaction_id=number, is_collection=1,
                    label=f"{number}", is_deleted=0, added=now, updated=now)  # fmt: skip
        db.commit()
        db.close()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder)


def tree(process: int) -> list[int]:
    found = [process]
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        found += [each for child in path.read_text().split() for each in tree(int(child))]
    return found


def add(db: sqlite3.Connection, table: str, **values: object) -> None:
    """Insert a row; the text for searches has had other names."""
    columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
    search = next(name for name in columns if name in {"folded", "search", "search_text"})
    values = {**values, search: ""}
    into = f"{table} ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})"
    db.execute(f"INSERT INTO {into}", list(values.values()))


def ask(port: int, requests: list[bytes]) -> None:
    """Send requests on one connection; each has to be answered well."""
    with socket.create_connection(("127.0.0.1", port), 30) as sock:
        for request in requests:
            sock.sendall(request)
            data = b""
            while b"\r\n\r\n" not in data:
                data += sock.recv(1 << 20)
            head, _, body = data.partition(b"\r\n\r\n")
            assert head[9:12] in {b"200", b"201"}, data
            length = int(head.lower().partition(b"content-length: ")[2].split()[0])
            while len(body) < length:
                body += sock.recv(1 << 20)


def measure(server: Server, connections: int, requests: list[bytes]) -> float:
    """Milliseconds of CPU a request."""
    before = server.cpu()
    with ThreadPoolExecutor(connections) as pool:
        shares = (requests[number::connections] for number in range(connections))
        list(pool.map(functools.partial(ask, server.port), shares))
    return (server.cpu() - before) / len(requests) * 1e3


def make_rows() -> dict[str, tuple[int, int, Callable[[], bytes]]]:
    """Name, connections, requests a round, and what makes one."""
    sys.path.insert(0, str(HERE))
    import mediaserver

    claims = {"user_id": 1, "token_type": "access", "exp": time.time() + 86400}
    records = f"Authorization: Bearer {mediaserver.sign_jwt(claims, KEY)}\r\n"
    return {
        "upload-20k": (1, 200, lambda: upload("POST", "/upload", 20_000)),
        "upload-200k": (1, 150, lambda: upload("POST", "/upload", 200_000)),
        "upload-200k-8": (8, 240, lambda: upload("POST", "/upload", 200_000)),
        "entity-200k": (1, 100, lambda: upload("POST", "/entity/", 200_000, is_collection="0")),
        "upload-9.5M": (1, 15, lambda: upload("POST", "/upload", 9_500_000)),
        "upload-9.5M-4": (4, 20, lambda: upload("POST", "/upload", 9_500_000)),
        "records-10": (1, 200, lambda: get("/api/media/media/", records)),
        "entities-100": (1, 200, lambda: get("/entity/?page_size=100")),
        # The last one: thumbnails of what came are made later.
        "image-200k": (1, 150, lambda: upload("PUT", f"/image/{uuid.uuid4()}.jpg", 200_000)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", default="29347ff", metavar="REVISION")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", help="folder for what they store, as /dev/shm")
    rows = make_rows()
    parser.add_argument("row", nargs="*", choices=[*rows, []], default=[])
    options = parser.parse_args()
    other = Path(tempfile.mkdtemp()) / "mediaserver.py"
    shown = ["git", "-C", HERE, "show", f"{options.against}:mediaserver.py"]
    other.write_bytes(subprocess.run(shown, check=True, capture_output=True).stdout)
    servers = {name: Server(path, options.work) for name, path in (
        (options.against, other), ("now", HERE / "mediaserver.py"))}  # fmt: skip
    try:
        for server in servers.values():
            server.fill()
        for row in options.row or rows:
            connections, count, make = rows[row]
            found: dict[str, list[float]] = {name: [] for name in servers}
            for turn in range(options.rounds + 1):
                # Who comes second takes 5 % more, of the same program: they change places.
                for name, server in [*servers.items()][:: 1 - turn % 2 * 2]:
                    requests = [make() for _ in range(count)]
                    found[name].append(measure(server, connections, requests))
            best = {name: (statistics.median(v[1:]), min(v[1:])) for name, v in found.items()}
            texts = [
                f"{name} {median:.3f} (min {low:.3f}) ms" for name, (median, low) in best.items()
            ]
            (before, _), (now, _) = best.values()
            print(f"{row:14} " + ", ".join(texts) + f"   x {now / before:.2f}", flush=True)
    finally:
        for server in servers.values():
            server.close()
        shutil.rmtree(other.parent)


if __name__ == "__main__":
    main()
