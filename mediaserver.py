#!/usr/bin/env python3
"""mediaserver: one file that scans, serves and takes in a household's pictures and videos.

    python3 mediaserver.py --storage_dir ~/Pictures

Read it from top to bottom: every section uses only the sections above it, and `main` is last.

 1 Settings      4 Media facts   7 Thumbnails   10 Server      13 System and pages
 2 Errors        5 Index         8 Scanner      11 Routing     14 Command line
 3 Credentials   6 Store         9 HTTP messages 12 Families
"""
# The main ways behind a request's head, and how many functions of this file each takes at most:
#
# file, 47       Dispatcher: inline (hot file, 5), or accept (RouteTable.find, _identify, need)
#                -> get_media -> named_response -> Files.get -> file_response (Tree.open,
#                File.matches, remember_hot, content_response) -> Dispatcher.finish
# upload, 134    accept -> FormBody.feed (MultipartParser, Folder.begin, Incoming.feed, probe) ->
#                Exchange.finish -> upload_media -> store_upload (Folder.keep: durable) ->
#                Index.write (Files.put) -> finish
# entity, 180    as an upload -> create_entity -> save_entity (App.data.content_lock: check_entity,
#                find_duplicate, store_upload, Index.write: Files.put, Entities.put) -> finish
# accounts, 40   accept (collect_declared) -> list_records -> list_owned (parse_ordering,
#                parse_search, OwnedTable.count and each) -> json_response -> finish

from __future__ import annotations

import os
import sys

# A Python before 3.8 cannot read the file: it shows this line as the first that it cannot.
if sys.version_info < (oldest := (3, 10)):  # Python 3.10 or later is needed
    found = ".".join(map(str, sys.version_info[:3]))
    sys.stderr.write("mediaserver: Python 3.10 or later is needed; this is " + found + "\n")
    sys.exit(2)

if __name__ == "__main__":
    import signal

    # SIGHUP means a scan, as soon as there is a scanner: until then it waits, and ends nothing.
    # The others wait until it is known what they are to end.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGTERM, signal.SIGINT})

if __name__ == "__main__" and __file__.endswith(".py"):
    # Python compiles a script at each start, and 38 MB stay with the process for it (measured):
    # so its bytecode is kept, as that of a module is (PEP 552), and run in its place. The mark
    # stands at the end as well, mirrored: what a power cut has left of a file is not run.
    import marshal
    from importlib.util import MAGIC_NUMBER, cache_from_source

    source, cached = os.stat(__file__), cache_from_source(os.path.abspath(__file__))
    header = (0, int(source.st_mtime) & 0xFFFFFFFF, source.st_size & 0xFFFFFFFF)
    mark = MAGIC_NUMBER + b"".join(number.to_bytes(4, "little") for number in header)
    try:
        with open(cached, "rb") as file:
            kept = file.read()
    except OSError:
        kept = b""
    is_whole = kept.startswith(mark) and kept.endswith(mark[::-1])
    if not is_whole and not sys.dont_write_bytecode:
        try:
            os.makedirs(os.path.dirname(cached), exist_ok=True)
            with open(f"{cached}.new", "wb") as new:
                new.write(mark + marshal.dumps(sys._getframe().f_code) + mark[::-1])
            os.replace(f"{cached}.new", cached)
            is_whole = True
        except OSError:  # the folder is not ours to write in
            pass
    flags = sys.orig_argv[1 : -len(sys.argv)]
    if is_whole and sys.executable and "-m" not in flags:
        os.execv(sys.executable, [sys.executable, *flags, cached, *sys.argv[1:]])

import argparse
import base64
import bisect
import contextlib
import copy
import enum
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import html
import http.client
import importlib
import importlib.util
import io
import itertools
import json
import math
import mmap
import posixpath
import queue
import re
import resource
import secrets
import select
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import threading
import time
import unicodedata
import uuid
import warnings
import weakref
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from datetime import datetime, timezone
from email.utils import formatdate, parsedate_to_datetime
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPMessage, HTTPResponse
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, NamedTuple, Protocol, TypeVar
from urllib.parse import quote, unquote, unquote_plus, unquote_to_bytes, urlencode, urlsplit

if TYPE_CHECKING:
    from _hashlib import HASH as Hash
    from concurrent.futures import Future
    from typing import TextIO

    from PIL import Image

T = TypeVar("T")
U = TypeVar("U")
Buffer = bytes | bytearray | memoryview

__version__ = "1.0.0"

# ======================================================================================
# 1. Settings
# ======================================================================================
# One class is the table of all settings: its fields say type, default and help, and `--help`
# and the README's table are made from them. A value comes from the command line, else the
# environment, else `.env`, else the default. Whatever does not parse stops the start with
# the setting's name. Secrets that nobody gave are made once and kept.


class SettingError(Exception):
    """A setting cannot be used; `name` says which, the text says what to do about it."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name}: {problem}")
        self.name = name


WARNING_CHARACTERS = select.PIPE_BUF // 4  # written at once: so many are at most PIPE_BUF bytes


def printable_line(text: str) -> str:
    r"""Return text as one line of a log or a table can carry it.

    >>> printable_line("caf\u00e9\r\n\x1b[2J")
    'café???[2J'
    """
    if text.isprintable():  # as most is
        return text
    return "".join(character if character.isprintable() else "?" for character in text)


def warn(message: str) -> None:
    """Tell the owner, on standard error, if anyone reads it there: it may be closed or full.

    Strangers cause such lines: a pipe that nobody empties must cost them, and not a thread.
    """
    line = f"mediaserver: {message}\n"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        for start in range(0, len(line), WARNING_CHARACTERS):
            if not is_writable(sys.stderr):
                return
            sys.stderr.write(line[start : start + WARNING_CHARACTERS])
            sys.stderr.flush()


def is_writable(stream: TextIO) -> bool:
    """Return whether a pipe or socket has room for PIPE_BUF bytes (pipe(7)); files always have."""
    try:
        return bool(select.select([], [stream], [], 0)[1])
    except (OSError, TypeError, ValueError):  # it has no descriptor
        return True


@contextlib.contextmanager
def undoing(undo: Callable[..., object], *arguments: Any) -> Iterator[None]:
    """Undo what was begun if the block is left by an exception, which is told in any case."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            undo(*arguments)
        raise


def parse_secret(text: str) -> str:
    """Return a secret as it was given; ValueError for a blank one or control characters."""
    if not text.strip():
        raise ValueError("is set but blank; give it a value or remove it")
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ValueError("has a control character, which no request can carry")
    return text


def parse_boolean(text: str) -> bool:
    """Return whether a text says yes; ValueError if it says neither yes nor no.

    >>> parse_boolean("Yes"), parse_boolean("off")
    (True, False)
    """
    word = text.strip().lower()
    if word in {"true", "1", "yes", "on"}:
        return True
    if word in {"false", "0", "no", "off"}:
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of decimal numbers between `low` and `high`, both included."""

    def parse(text: str) -> int:
        digits = text.strip()
        if not re.fullmatch(r"-?[0-9]{1,19}", digits) or not low <= int(digits) <= high:
            raise ValueError(f"{text!r} is not a whole number from {low} to {high}")
        return int(digits)

    return parse


def one_of(*words: str) -> Callable[[str], str]:
    """Return a parser of one of these words, in any case."""

    def parse(text: str) -> str:
        if text.strip().lower() not in words:
            raise ValueError(f"{text!r} is none of {', '.join(words)}")
        return text.strip().lower()

    return parse


def amount_of(unit: str, most: float) -> Callable[[str], float]:
    """Return what parses a number of a unit of time, from 0 to below `most`.

    >>> amount_of("days", 1e6)("1.5")
    1.5
    """

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 <= (amount := float(text)) < most:
                return amount
        raise ValueError(f"{text!r} is not a number of {unit}")

    return parse


def parse_path(text: str) -> Path:
    """Return an absolute path, with `~` filled in; ValueError for what is no path here."""
    if "\0" in text:
        raise ValueError("a path has no NUL in it")
    if text.lower().startswith("s3://"):
        raise ValueError(f"{text!r} is no folder, and this cannot be in an object store")
    return Path(os.path.abspath(os.path.expanduser(text)))


def parse_database_url(text: str) -> Path:
    """Return the file of a SQLAlchemy-style URL: `sqlite:///relative` or `sqlite:////absolute`."""
    scheme, separator, path = text.partition("://")
    if scheme != "sqlite":
        given = scheme if separator else repr(text)
        raise ValueError(f"{given} is not supported, only sqlite:///FILE")
    if len(path) < 2 or path[0] != "/" or path == "/:memory:":
        raise ValueError("the index needs a file: sqlite:///FILE")
    return parse_path(path[1:])


def parse_public_url(text: str) -> str:
    """Return a URL without its last slash; it stands in headers, so in ASCII (RFC 3986 §2)."""
    if not re.fullmatch(r"https?://[\w.~:\[\]%-]+(/[!$-;=@-\[\]_a-z~]*)?", text, re.ASCII):
        problem = "is no http or https URL, written in ASCII (xn--…, %C3%A9) and without a user"
        raise ValueError(f"{text!r} {problem}")
    return text.rstrip("/")


def parse_networks(text: str) -> tuple[str, ...]:
    """Return comma-separated addresses or networks (`10.0.0.0/8`), as written."""
    import ipaddress  # 4 ms, and only where the setting is given

    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        try:
            ipaddress.ip_network(name, strict=False)
        except ValueError:
            raise ValueError(f"{name!r} is neither an IP address nor a network") from None
    return names


def parse_origins(text: str) -> tuple[str, ...]:
    """Return comma-separated origins, or `*`, as browsers send them: in lower case (RFC 6454)."""
    origins = tuple(part.strip().rstrip("/").lower() for part in text.split(",") if part.strip())
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/?#,\"]+|null", origin):
            raise ValueError(f"{origin!r} is no origin like https://photos.example.org")
    return origins


class S3Place(NamedTuple):
    """A place in an object store; `prefix` is empty or ends with a slash."""

    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


def parse_place(text: str) -> Path | S3Place:
    """Return a folder's absolute path, or the place in an object store of `s3://`.

    >>> str(parse_place("s3://family/pictures/"))
    's3://family/pictures'
    """
    return parse_bucket(text) if text.lower().startswith("s3://") else parse_path(text)


def parse_bucket(text: str) -> S3Place:
    """Return the place that `s3://BUCKET/PREFIX` names; ValueError for another text."""
    if not text.lower().startswith("s3://"):
        raise ValueError(f"{text!r} is not s3://BUCKET/PREFIX")
    bucket, *parts = text[5:].rstrip("/").split("/")
    if not re.fullmatch(r"[\w.-]{3,63}", bucket, re.ASCII) or {"", ".", ".."}.intersection(parts):
        rule = "with a bucket of 3 to 63 letters, digits, dots and hyphens"
        raise ValueError(f"{text!r} is not s3://BUCKET/PREFIX, {rule}")
    return S3Place(bucket, "".join(f"{part}/" for part in parts))


class Setting(NamedTuple):
    """How one field of `Settings` is given and shown."""

    default: Any
    help: str
    parse: Callable[[str], Any] = str
    shown: str = ""  # the default as the documentation shows it, where that is not the value
    secret: bool = False  # no option
    is_generated: bool = False  # once, where it is not given
    environment: bool = True  # also read from the environment and .env
    may_be_empty: bool = False  # an empty value means something


setting: Any = Setting  # which stands in the place of a value of another type
flag = functools.partial(setting, parse=parse_boolean)
secret = functools.partial(setting, "", parse=parse_secret, secret=True)
generated = functools.partial(secret, shown="generated", is_generated=True)
folder = functools.partial(setting, Path(), parse=parse_path)  # its default is made of others


def number(default: int, high: int, help: str, low: int = 1, **spec: Any) -> Any:
    """Return a setting that is a whole number from `low` to `high`."""
    return setting(default, help, whole_number(low, high), **spec)


PRIVATE_FOLDERS = ("upload_dir", "database_dir", "media_storage_dir", "users_dir")
PLACES = ("storage_dir", "database_url", *PRIVATE_FOLDERS)
MEDIA_FOLDER = "media"  # of public uploads
SERVED_FOLDERS = (MEDIA_FOLDER, "uploads", ".thumbnails")  # in STORAGE_DIR
MAX_BYTES = 2**63 - 1  # what a file size can be


class Settings(NamedTuple):
    """Everything that can be set, checked and with all defaults in place."""

    # The right sides are no values: they describe the fields, and `load_settings` fills in all.
    storage_dir: Path = folder("the folder to scan, serve and store in", shown="required")
    port: int = number(8000, 65535, "TCP port; 0 takes a free one", 0, environment=False)
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 for all", environment=False)
    rescan_interval: float = setting(
        0, "seconds between scans; 0: only at start and on SIGHUP", amount_of("seconds", 1e9),
        environment=False,
    )  # fmt: skip
    workers: int = number(1, 64, "server processes", environment=False)
    media_server_secret: str = generated(
        "HMAC secret of upload tokens, shared with the app that issues them"
    )
    token_expiry_seconds: int = number(900, 10**9, "how long an upload token is good for")
    upload_tokens: str = setting(
        "all", "which upload tokens are good: all, or scoped: those of token --scope alone",
        one_of("all", "scoped"),
    )  # fmt: skip
    auth_token: str = generated("static bearer token: the owner's key, every permission")
    upload_dir: Path | S3Place = folder(
        "where the images family keeps its files: a folder, or s3://BUCKET/PREFIX",
        shown="DATA/images", parse=parse_place,
    )  # fmt: skip
    slugify_filenames: bool = flag(False, "store images under a slug of their name")
    jwt_signing_key: str = generated("HS256 key of the access and refresh tokens of accounts")
    jwt_access_token_lifetime_minutes: int = number(
        30, 10**7, "how long an access token is good for"
    )
    jwt_refresh_token_lifetime_days: int = number(7, 10**5, "how long a refresh token is good for")
    allow_registration: bool = flag(True, "whether anyone may register an account")
    auth_disabled: bool = flag(False, "demo mode: every request is allowed everything")
    read_auth_enabled: bool = flag(False, "reads need media_store_read too")
    public_key_path: Path | None = setting(
        None, "PEM public key (P-256) for ES256 tokens issued elsewhere", parse_path,
        shown="DATA/public_key.pem",
    )  # fmt: skip
    database_dir: Path = folder(
        "DATA, where the index and generated secrets live", shown="STORAGE_DIR/.mediaserver"
    )
    database_url: Path = setting(
        Path(), "the index; only sqlite:///FILE", parse_database_url,
        shown="sqlite:///DATA/index.sqlite3",
    )  # fmt: skip
    media_storage_dir: Path | S3Place = folder(
        "the same for the entities family", shown="DATA/entities", parse=parse_place
    )
    users_dir: Path | S3Place = folder(
        "the same for the accounts' files", shown="DATA/users", parse=parse_place
    )
    media_dir: S3Place | None = setting(
        None, "where public uploads go: s3://BUCKET/PREFIX", parse_bucket,
        shown="STORAGE_DIR/media",
    )  # fmt: skip
    max_upload_bytes: int = number(
        10485760, MAX_BYTES, "largest file for media, library and images"
    )
    max_media_bytes: int = number(1073741824, MAX_BYTES, "largest file for accounts and entities")
    user_quota_bytes: int = number(
        10737418240, MAX_BYTES,
        "what one account may store, deleted records included; 0: no bound", 0,
    )  # fmt: skip
    reserve_bytes: int | None = setting(
        None, "free disk that uploads leave alone, for deleting, logins and the index",
        whole_number(0, MAX_BYTES), shown="5 % of the disk, 536870912 at most",
    )  # fmt: skip
    trash_days: int = number(
        0, 10**5,
        "soft-deleted records and entities go for good after so many days; 0: never", 0,
    )  # fmt: skip
    upload_expiry_seconds: int = number(
        86400, 10**9, "how long an unfinished resumable upload is kept after its last byte"
    )
    preview_cache_bytes: int = number(
        2147483648, MAX_BYTES, "disk for previews, of which the least recently used go", 0
    )
    public_url: str = setting(
        "", "base of the absolute URLs in answers", parse_public_url, shown="from the request"
    )
    trusted_proxies: tuple[str, ...] = setting(
        ("127.0.0.1", "::1"), "peers whose X-Forwarded-* headers are believed", parse_networks,
        shown="127.0.0.1,::1",
    )  # fmt: skip
    accel_redirect: bool = flag(
        False, "let nginx send the files, by X-Accel-Redirect (see nginx.conf)"
    )
    cors_allow_origins: tuple[str, ...] = setting(
        ("*",), "comma-separated origins; empty turns CORS off", parse_origins, shown="*",
        may_be_empty=True,
    )  # fmt: skip
    log_format: str = setting(
        "none",
        "a line on standard error for each request: none, text or json",
        one_of("none", "text", "json"),
    )
    quiet: bool = flag(False, "tell on standard error only of what is wrong")
    aws_endpoint_url: str = setting(
        "", "the object store of s3:// places", parse_public_url, shown="AWS"
    )
    aws_region: str = setting("us-east-1", "its region")
    aws_access_key_id: str = setting("", "the name of the key for it", shown="none")
    aws_secret_access_key: str = secret("the key for it", shown="none")
    aws_session_token: str = secret("the token of a key that is good for a while", shown="none")
    read_only: str = setting(
        "", "serve from a copy of the index; the URL of the server that writes", parse_public_url,
        shown="off",
    )  # fmt: skip
    s3_redirect: bool = flag(False, "answer reads of objects with signed URLs of the store")

    @property
    def secrets_file(self) -> Path:
        """Return where the generated secrets are kept."""
        return self.database_dir / "secrets.env"


SETTINGS: Mapping[str, Setting] = Settings._field_defaults  # in the documentation's order


# The grammar of python-dotenv: `export` is allowed, quotes may span lines, ` #` begins a comment.
DOTENV_BINDING = re.compile(
    r"""(?:[^\S\r\n]*(?:export[^\S\r\n]+|(?!export[^\S\r\n]))
    (?:'(?P<quoted_key>[^']+)'|(?P<key>(?!')[^=\#\s]+))[^\S\r\n]*
    (?P<equals>=(?:[^\S\r\n]*
        (?:'(?P<single>(?:\\.|[^'\\])*)'|"(?P<double>(?:\\.|[^"\\])*)")
        |(?P<plain>(?![^\S\r\n]*['"])[^\r\n]*)))?
    [^\S\r\n]*(?:\#[^\r\n]*)?(?:\r\n|\n|\r|$)
    |[^\S\r\n]*(?:\#[^\r\n]*)?(?P<unread>[^\r\n]*)(?:\r\n|\n|\r|$))""",
    re.VERBOSE | re.DOTALL,
)
DOTENV_VARIABLE = re.compile(r"\$\{(?P<name>[^}:]*)(?::-(?P<default>[^}]*))?\}")
DOTENV_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


def dotenv_value(binding: re.Match[str]) -> str:
    """Return the value as written, with the escapes of its kind of quotes taken out."""
    double, single = binding["double"], binding["single"]
    if double is not None:
        return re.sub(r"\\([\\'\"abfnrtv])", lambda m: DOTENV_ESCAPES.get(m[1], m[1]), double)
    if single is not None:
        return re.sub(r"\\([\\'])", r"\1", single)
    return re.sub(r"\s+#.*", "", binding["plain"] or "").strip()


def parse_dotenv(
    text: str, environment: Mapping[str, str], tell: Callable[[str], object] = str
) -> dict[str, str]:
    """Return the bindings of a `.env` as python-dotenv reads them; `tell` what it cannot read.

    >>> parse_dotenv("export A=1 # one\\nB='x # y'\\nC=${A}${D:-2}", {})
    {'A': '1', 'B': 'x # y', 'C': '12'}
    """
    values: dict[str, str] = {}

    def expand(variable: re.Match[str]) -> str:
        name = variable["name"]
        return environment.get(name, values.get(name, variable["default"] or ""))

    for binding in DOTENV_BINDING.finditer(text):
        if binding["unread"]:
            tell(f"cannot read the line that begins at {binding['unread'][:12]!r}")
        elif binding["equals"] is not None:
            value = DOTENV_VARIABLE.sub(expand, dotenv_value(binding))
            values[binding["quoted_key"] or binding["key"]] = value
    return values


def read_dotenv(path: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a `.env` says, nothing if it is missing; SettingError if it is no text."""
    try:
        text = regular_file(path).read_text("utf-8-sig")
        return parse_dotenv(text, environment, lambda problem: warn(f"{path.name}: {problem}"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(str(path), f"cannot be read ({error})") from None


def regular_file(path: Path) -> Path:
    """Return a path to be read; OSError for a pipe or a device, which may have no end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file")
    return path


def warn_of_names(environment: Mapping[str, str], dotenv: Mapping[str, str]) -> None:
    """Tell of what was meant as a setting, but is read by nobody."""
    import difflib  # only for names that are no settings

    table = {name.upper(): spec for name, spec in SETTINGS.items()}
    for name in dotenv:
        if name in table and not table[name].environment:
            warn(f".env: {name} has no effect there; give --{name.lower()}")
        elif name not in table and (
            near := difflib.get_close_matches(name.upper(), table, 1, 0.8)
        ):
            warn(f".env: {name} is no setting; did you mean {near[0]}?")
    for name in ("PORT", "HOST"):
        if environment.get(name):
            warn(f"{name} in the environment has no effect; give --{name.lower()}")


def load_settings(
    options: Mapping[str, str], environment: Mapping[str, str], dotenv: Mapping[str, str]
) -> Settings:
    """Return settings: the command line's `options`, else environment, else `.env`, else default.

    Raises SettingError with the setting's name for a value that cannot be used.
    """
    values: dict[str, Any] = {}
    for name, spec in SETTINGS.items():
        label = name.upper()
        layers = [options.get(name)]
        if spec.environment:
            layers += [environment.get(label), dotenv.get(label)]
        given = [
            text for text in layers if text or (text == "" and (spec.secret or spec.may_be_empty))
        ]
        try:
            values[name] = spec.parse(given[0]) if given else spec.default
        except ValueError as error:
            raise SettingError(label, str(error)) from None
    if values["storage_dir"] == Path():
        raise SettingError("STORAGE_DIR", "is required: give --storage_dir DIR")
    if values["database_dir"] == Path():
        values["database_dir"] = values["storage_dir"] / ".mediaserver"
    for name, spec in SETTINGS.items():
        if values[name] == Path():
            values[name] = values["database_dir"] / spec.shown.rpartition("DATA/")[2]
    check_folders(values)
    return Settings(**values)


def check_folders(values: Mapping[str, Any]) -> None:
    """Refuse private folders that would be public, and public ones that would be private."""
    storage = os.path.realpath(values["storage_dir"])
    places = {name: values[name] for name in PRIVATE_FOLDERS}
    for name in [name for name, place in places.items() if isinstance(place, Path)]:
        path = os.path.realpath(places[name])
        if Path(storage).is_relative_to(path) and name != "database_dir":
            problem = "must not be, or hold, STORAGE_DIR: it would be public"
            raise SettingError(name.upper(), problem)
        for used in SERVED_FOLDERS:
            if Path(path).is_relative_to(f"{storage}/{used}"):
                problem = f"must not be in STORAGE_DIR/{used}, which is public"
                raise SettingError(name.upper(), problem)
    for used in SERVED_FOLDERS:
        if os.path.islink(f"{storage}/{used}"):
            raise SettingError("STORAGE_DIR", f"{used} in it must be a folder, not a link")
    del places["database_dir"]
    if values.get("media_dir"):
        places["media_dir"] = values["media_dir"]
    for one, other in itertools.combinations(places, 2):
        if overlap(places[one], places[other]):
            raise SettingError(other.upper(), f"must not be {one.upper()}")
    if any(isinstance(place, S3Place) for place in places.values()):
        for name in ("aws_access_key_id", "aws_secret_access_key"):
            if not values.get(name):
                raise SettingError(name.upper(), "is needed for s3:// places")


def overlap(one: Path | S3Place, other: Path | S3Place) -> bool:
    """Return whether two places are the same; in a store, also whether one lies in the other."""
    if isinstance(one, S3Place) and isinstance(other, S3Place):
        return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")
    return os.path.realpath(str(one)) == os.path.realpath(str(other))


def with_secrets(settings: Settings) -> tuple[Settings, list[str]]:
    """Return settings with every secret in place, and the names of those that were not given."""
    # A secret that is not given is made once and kept in `DATA/secrets.env` (mode 0600).
    names = [name for name, spec in SETTINGS.items() if spec.is_generated]
    missing = [name.upper() for name in names if not getattr(settings, name)]
    kept = read_dotenv(settings.secrets_file, {}) if missing else {}
    for name in missing:
        if name in kept and not kept[name].strip():
            problem = f"is blank in {settings.secrets_file}: give it a value or delete its line"
            raise SettingError(name, problem)
    made = {name: kept.get(name) or secrets.token_urlsafe(32) for name in missing}
    if made.items() - kept.items():
        write_secrets(settings.secrets_file, {**kept, **made})
    values: dict[str, Any] = {name.lower(): value for name, value in made.items()}
    return settings._replace(**values), missing


def forget_secrets() -> None:
    """Take the secrets out of this process's environment, and so out of its children's.

    Linux shows the environment that a process began with (proc_pid_environ(5)), also that of a
    forked one, whatever was unset since: so the values are overwritten where they lie.
    """
    names = [name.upper() for name, spec in SETTINGS.items() if spec.secret]
    given = [name for name in names if os.environ.pop(name, None)]
    if not given:
        return
    with contextlib.suppress(OSError), open("/proc/self/mem", "r+b", buffering=0) as memory:
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        start, end = int(fields[47]), int(fields[48])  # env_start, env_end (proc_pid_stat(5))
        memory.seek(start)
        block = memory.read(end - start)
        for name in given:
            for found in re.finditer(rb"(?:^|\0)%s=([^\0]*)" % name.encode(), block):
                memory.seek(start + found.start(1))
                memory.write(bytes(len(found[1])))


def write_secrets(path: Path, values: Mapping[str, str]) -> None:
    """Write `NAME=value` lines that only their owner can read, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with undoing(temporary.unlink), open(descriptor, "w", encoding="utf-8") as file:
        note = "# made by mediaserver; other programs that issue tokens need the same values\n"
        file.writelines([note, *(f"{name}={value}\n" for name, value in values.items())])
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, path)


# ======================================================================================
# 2. Errors
# ======================================================================================
# Handlers and parsers raise HTTPError; one place in section 11 turns it into an answer.


class HTTPError(Exception):
    """An answer that is an error: status, detail (a sentence for the client) and extra headers."""

    members: Mapping[str, object] = {}  # what else the accounts family's clients look at

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})


class FieldError(NamedTuple):
    """One thing that is wrong with one field; `type` is pydantic's word for it."""

    where: str  # "query", "path" or "body"; "body/member" in the object that is a member of it
    field: str
    message: str  # ends with a full stop where it is the whole sentence for the client
    type: str = "value_error"
    limit: int | None = None  # the bound that a number breaks
    is_null: bool = False  # it is wrong because it is null
    given: str = ""  # the type of what is no object, in Python's word, which Django shows


class ValidationError(HTTPError):
    """Fields that do not parse; each family answers them in its own shape."""

    def __init__(self, *problems: FieldError) -> None:
        texts = (f"{p.field}: {p.message}" if p.field else p.message for p in problems)
        super().__init__(400, "; ".join(texts))
        self.problems = problems


# ======================================================================================
# 3. Credentials
# ======================================================================================
# A credential is text from a stranger: each has one accepted spelling, its signature is checked
# before its content is believed, and whatever is wrong with it is a `TokenError` whose text the
# client may read. Functions are pure and take the time as `now` (Unix seconds). P-256 is plain
# integer arithmetic, which need not run in constant time: only public keys and signatures pass
# through it. Secrets meet nothing but `hmac` and `scrypt`. What a request may do follows from its
# one `Principal` and the `Access` that its route declares.

MAX_TOKEN_LENGTH = 8192  # characters; more does not fit beside the other headers of most servers
LEEWAY = 30  # seconds by which the clock of a JWT's issuer may differ from ours
MAX_UPLOAD_TOKEN_LEAD = 60  # seconds that an upload token's timestamp may lie ahead of our clock
MAX_CACHED_TOKENS = 1024  # verified tokens that are remembered, each by 32 bytes
CHALLENGE = {"WWW-Authenticate": 'Bearer error="invalid_token"'}  # RFC 6750, section 3


class TokenError(ValueError):
    """A credential is present and wrong; the message is a sentence for the client."""

    def __init__(self, message: str, code: str = "token_not_valid") -> None:
        super().__init__(message)
        self.code = code  # SimpleJWT's word for it


class Unauthorized(HTTPError):
    """A 401 for a token, with what the clients of djangorestframework-simplejwt 5.5 look at."""

    def __init__(self, error: TokenError, token_class: str = "AccessToken") -> None:
        super().__init__(401, str(error), CHALLENGE)
        self.members = {"code": error.code}
        if token_class == "AccessToken" and error.code == "token_not_valid":
            about = {"token_class": token_class, "token_type": "access", "message": str(error)}
            self.members["messages"] = [about]


def _utf8(text: str) -> bytes:
    """Return any `str` as bytes: clients' text may hold lone surrogates, and must not raise."""
    return text.encode("utf-8", "surrogatepass")


def _hmac_sha256(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def equals_secret(given: str, secret: str) -> bool:
    """Return whether a client gave the secret; it takes the same time wherever they differ.

    Clients send a non-ASCII secret as Latin-1 or as UTF-8, and header fields are read as either:
    `given` is right if one of its readings is.
    """
    wanted, latin = _utf8(secret), given.encode("latin-1", "backslashreplace")
    return hmac.compare_digest(_utf8(given), wanted) | hmac.compare_digest(latin, wanted)


def encode_base64url(data: bytes) -> str:
    """Encode without padding (RFC 7515, section 2).

    >>> encode_base64url(b"\\xfb\\xff")
    '-_8'
    """
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def decode_base64url(text: str) -> bytes:
    """Decode only what `encode_base64url` writes: no padding, no other characters, no stray bits.

    >>> decode_base64url("-_8")
    b'\\xfb\\xff'
    """
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        data = b""
    if encode_base64url(data) != text:
        raise TokenError("The token is not base64url as RFC 7515 has it.")
    return data


# -- Upload tokens and signed URLs -------------------------------------------------------


def sign_upload_token(secret: str, now: float) -> str:
    """Return `TS.SIG`: decimal Unix seconds and their hex HMAC-SHA256, as the app issues them."""
    timestamp = str(int(now))
    return f"{timestamp}.{_hmac_sha256(_utf8(secret), timestamp.encode()).hex()}"


def verify_upload_token(token: str, secret: str, now: float, lifetime: int) -> None:
    """Raise `TokenError` unless the token is ours and at most `lifetime` seconds old."""
    # The signature is lower-case hex, as every issuer of these tokens writes it.
    match = re.fullmatch(r"([0-9]{1,12})\.([0-9a-f]{64})", token)
    if not match:
        raise TokenError("The upload token is malformed.")
    expected = _hmac_sha256(_utf8(secret), match[1].encode()).hex()
    if not hmac.compare_digest(match[2], expected):
        raise TokenError("The upload token's signature is wrong.")
    age = now - int(match[1])
    if age > lifetime:
        raise TokenError("The upload token has expired.")
    if age < -MAX_UPLOAD_TOKEN_LEAD:
        raise TokenError("The upload token is from the future.")


def derive_key(secret: str, purpose: str) -> bytes:
    """Return a key for one purpose, so that what is signed for one never passes for another."""
    # The space and colon keep the message apart from a JWT's and an upload token's.
    return _hmac_sha256(_utf8(secret), _utf8(f"mediaserver key: {purpose}"))


def sign_until(key: bytes, what: str, expires: int) -> str:
    """Return the signature of a file's URL, or a link, that is open until `expires` (seconds)."""
    return encode_base64url(_hmac_sha256(key, _utf8(f"GET file {expires} {what}")))


def verify_until(key: bytes, what: str, signed: tuple[str, str], now: float) -> bool:
    """Return whether an expiry (as a text) and the signature that came with it are good now."""
    expires, signature = signed
    if not re.fullmatch(r"[0-9]{1,12}", expires):
        return False
    expected = sign_until(key, what, int(expires))
    return hmac.compare_digest(_utf8(signature), _utf8(expected)) and now <= int(expires)


def encrypt_hash(key: bytes, sha256: str, *, back: bool = False) -> str:
    """Return what stands for a hash, or `back` the hash, which nobody finds without the key.

    Four rounds of a Feistel network are a pseudorandom permutation (Luby and Rackoff, 1988).

    >>> encrypt_hash(b"key", encrypt_hash(b"key", "5f" * 32), back=True) == "5f" * 32
    True
    """
    left, right = sha256[:32], sha256[32:]
    for number in (4, 3, 2, 1) if back else (1, 2, 3, 4):
        cover = _hmac_sha256(key, _utf8(f"{number} {right}")).hex()[:32]
        left, right = right, f"{int(left, 16) ^ int(cover, 16):032x}"
    return right + left


# -- Passwords ---------------------------------------------------------------------------

# 16 MiB (128·n·r bytes) at a time, so that four logins at once fit a small board. Three passes (p)
# take 0.09 s on a server; a Raspberry Pi 4, some four to five times as slow, stays below 0.5 s.
SCRYPT_COST = (2**14, 8, 3)  # n, r, p
SCRYPT_MAX_MEMORY = 64 * 2**20  # leaves room for stored hashes with n = 2**15

# No password has this hash. Checking one against it makes an unknown user's login cost the same.
DUMMY_PASSWORD_HASH = f"scrypt${'$'.join(map(str, SCRYPT_COST))}${'A' * 22}${'A' * 43}"


def _scrypt(password: str, salt: bytes, cost: tuple[int, ...]) -> bytes:
    secret, (n, r, p) = _utf8(password), cost
    return hashlib.scrypt(secret, salt=salt, n=n, r=r, p=p, maxmem=SCRYPT_MAX_MEMORY, dklen=32)


def hash_password(password: str) -> str:
    """Return `scrypt$n$r$p$salt$hash` (RFC 7914); the password is taken exactly as given."""
    salt = os.urandom(16)
    digest = _scrypt(password, salt, SCRYPT_COST)
    parts = ("scrypt", *map(str, SCRYPT_COST), encode_base64url(salt), encode_base64url(digest))
    return "$".join(parts)


def verify_password(password: str, stored: str) -> bool:
    """Return whether `stored` is the password's hash; another form of value (`!`) fits none.

    Accounts that were imported have Django's PBKDF2 hashes, `pbkdf2_sha256$rounds$salt$base64`.
    """
    if match := re.fullmatch(r"pbkdf2_sha256\$(\d{1,8})\$([^$]+)\$([\w+/=]+)", stored, re.ASCII):
        key = hashlib.pbkdf2_hmac("sha256", _utf8(password), match[2].encode(), int(match[1]))
        return hmac.compare_digest(base64.b64encode(key).decode(), match[3])
    match = re.fullmatch(r"scrypt\$(\d+)\$(\d+)\$(\d+)\$([\w-]+)\$([\w-]+)", stored, re.ASCII)
    if not match:
        return False
    *cost, salt, digest = match.groups()
    actual = _scrypt(password, decode_base64url(salt), tuple(map(int, cost)))
    return hmac.compare_digest(actual, decode_base64url(digest))


# -- ES256: ECDSA over P-256 with SHA-256 ------------------------------------------------

# SEC 2, section 2.4.2 (secp256r1): field prime, group order, y² = x³ - 3x + b, base point
_P = 2**256 - 2**224 + 2**192 + 2**96 - 1
_N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B

# RFC 5480: DER has one encoding of a P-256 key's SubjectPublicKeyInfo; only the point differs.
_SPKI_P256 = bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107")
_SPKI_UNCOMPRESSED = b"\x30\x59" + _SPKI_P256 + b"\x03\x42\x00\x04"
_SPKI_COMPRESSED = tuple(b"\x30\x39" + _SPKI_P256 + b"\x03\x22\x00" + s for s in (b"\2", b"\3"))
_PEM_PUBLIC_KEY = r"\s*-----BEGIN PUBLIC KEY-----\s([A-Za-z0-9+/=\s]*)-----END PUBLIC KEY-----\s*"

# (x, y, z) stands for the point (x/z², y/z³), or for infinity where z = 0.
Jacobian = tuple[int, int, int]


class PublicKey(NamedTuple):
    """A point of P-256 other than infinity."""

    x: int
    y: int


_G = PublicKey(
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)


def parse_public_key(pem: str | bytes) -> PublicKey:
    """Read a P-256 key from its `PUBLIC KEY` PEM block (RFC 7468); `ValueError` on other text.

    The point may be compressed (SEC 1, section 2.3.4).
    """
    text = pem.decode("latin-1") if isinstance(pem, bytes) else pem
    match = re.fullmatch(_PEM_PUBLIC_KEY, text)
    if not match:
        raise ValueError("the public key is not one PEM block with the label PUBLIC KEY")
    body = "".join(match[1].split())
    try:
        der = base64.b64decode(body)
    except ValueError:
        der = b""
    if not der or base64.b64encode(der).decode("ascii") != body:
        raise ValueError("the public key is not well-formed base64")
    if der.startswith(_SPKI_UNCOMPRESSED) and len(der) == len(_SPKI_UNCOMPRESSED) + 64:
        x, y = int.from_bytes(der[-64:-32], "big"), int.from_bytes(der[-32:], "big")
    elif der.startswith(_SPKI_COMPRESSED) and len(der) == len(_SPKI_COMPRESSED[0]) + 32:
        x = int.from_bytes(der[-32:], "big")
        y = pow(x**3 - 3 * x + _B, (_P + 1) // 4, _P)  # a square root, as p mod 4 is 3
        y = y if y % 2 == der[-33] % 2 else _P - y
    else:
        raise ValueError("the public key is not a P-256 key")
    if not (x < _P and y < _P and (y * y - x**3 + 3 * x - _B) % _P == 0):
        raise ValueError("the public key is not a point of P-256")
    return PublicKey(x, y)


def _double(point: Jacobian) -> Jacobian:
    x, y, z = point
    z2, y2 = z * z % _P, y * y % _P
    slope = 3 * (x - z2) * (x + z2) % _P  # 3x² - 3z⁴: the curve's a is -3
    xy2 = 4 * x * y2 % _P
    x3 = (slope * slope - 2 * xy2) % _P
    return x3, (slope * (xy2 - x3) - 8 * y2 * y2) % _P, 2 * y * z % _P


def _add(point: Jacobian, affine: PublicKey) -> Jacobian:
    x, y, z = point
    if not z:
        return affine.x, affine.y, 1
    z2 = z * z % _P
    dx, dy = (affine.x * z2 - x) % _P, (affine.y * z2 * z - y) % _P
    if not dx:  # the same point, or its negative
        return (1, 1, 0) if dy else _double(point)
    dx2 = dx * dx % _P
    dx3, xdx2 = dx * dx2 % _P, x * dx2 % _P
    x3 = (dy * dy - dx3 - 2 * xdx2) % _P
    return x3, (dy * (xdx2 - x3) - y * dx3) % _P, z * dx % _P


def _affine(point: Jacobian) -> PublicKey:
    x, y, z = point
    inverse = pow(z, -1, _P)
    return PublicKey(x * inverse**2 % _P, y * inverse**3 % _P)


def _multiply_and_add(u1: int, u2: int, key: PublicKey) -> Jacobian:
    """Return u1·G + u2·key; the doublings are shared (Shamir's trick)."""
    point: Jacobian = (1, 1, 0)
    for bit1, bit2 in zip(f"{u1:0256b}", f"{u2:0256b}", strict=True):
        point = _double(point)
        if bit1 == "1":
            point = _add(point, _G)
        if bit2 == "1":
            point = _add(point, key)
    return point


def verify_es256(public_key: PublicKey | str | bytes, message: bytes, signature: bytes) -> bool:
    """Return whether `signature` (r‖s, 64 bytes, RFC 7518 section 3.4) is the key's on `message`.

    The key is PEM or parsed; PEM that does not parse is a `ValueError`. The steps are those of
    FIPS 186-5, section 6.4.2.
    """
    key = public_key if isinstance(public_key, PublicKey) else parse_public_key(public_key)
    if len(signature) != 64:
        return False
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    if not (0 < r < _N and 0 < s < _N):  # step 1
        return False
    e = int.from_bytes(hashlib.sha256(message).digest(), "big")  # steps 2 and 3
    inverse = pow(s, -1, _N)  # step 4
    point = _multiply_and_add(e * inverse % _N, r * inverse % _N, key)  # steps 5 and 6
    return point[2] != 0 and _affine(point).x % _N == r  # steps 7 to 9


# -- JSON Web Tokens ---------------------------------------------------------------------


def _unique_members(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("duplicate member name")
    return members


def _parse_json_object(data: bytes) -> dict[str, object]:
    """Read one JSON object, refusing what two parsers could read in two ways (RFC 8259)."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_members)
        # raises on NaN, infinities and lone surrogates, which loads lets through
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError):  # RecursionError: thousands of open brackets
        value = None
    if not isinstance(value, dict):
        raise TokenError("The token does not hold a JSON object.")
    return value


def sign_jwt(claims: Mapping[str, object], key: str) -> str:
    """Return an HS256 token in compact form (RFC 7515, section 3.1)."""
    parts = (json.dumps(part) for part in ({"alg": "HS256", "typ": "JWT"}, dict(claims)))
    signed = ".".join(encode_base64url(part.encode()) for part in parts)
    return f"{signed}.{encode_base64url(_hmac_sha256(_utf8(key), signed.encode()))}"


def verify_jws(token: str, hs256_key: bytes, es256_key: PublicKey | None) -> tuple[str, bytes]:
    """Return the algorithm and payload of a compact JWS whose signature is right (RFC 7515, 5.2).

    Each algorithm has its own key (RFC 8725, section 3.1). `none`, every other one, and headers
    that change how the token is to be read (`crit`, `b64`) are refused.
    """
    if len(token) > MAX_TOKEN_LENGTH:
        raise TokenError("The token is too long.")
    if token.count(".") != 2:
        raise TokenError("The token is not a JSON Web Token.")
    first, payload, signature = (decode_base64url(part) for part in token.split("."))
    header, message = _parse_json_object(first), token.rpartition(".")[0].encode("ascii")
    if "crit" in header or "b64" in header or not isinstance(header.get("typ", ""), str):
        raise TokenError("The token's header asks for what is not supported.")
    algorithm = header.get("alg")
    if algorithm == "HS256":
        good = hmac.compare_digest(_hmac_sha256(hs256_key, message), signature)
    elif algorithm == "ES256" and es256_key:
        good = verify_es256(es256_key, message, signature)
    elif algorithm == "ES256":
        raise TokenError("No key for ES256 tokens is installed here (PUBLIC_KEY_PATH).")
    else:
        raise TokenError("The token's algorithm is not accepted here.")
    if not good:
        raise TokenError("The token's signature is wrong.")
    return str(algorithm), payload


def _time_claim(claims: Mapping[str, object], name: str) -> int | float | None:
    """Return a NumericDate (RFC 7519, section 2), or None when the claim is absent."""
    if name not in claims:
        return None
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TokenError(f"The token's {name} is not a time.")
    return value


def _number_claim(claims: Mapping[str, object], name: str, *, as_text: bool = False) -> int | None:
    """Return a claim that is a whole number above 0, None where it is absent.

    `as_text` lets it be decimal text, too: SimpleJWT writes an account's id so since 5.5.
    """
    if name not in claims:
        return None
    value = claims[name]
    if as_text and isinstance(value, str) and re.fullmatch(r"[1-9][0-9]{0,18}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_BYTES:
        raise TokenError(f"The token's {name} is no whole number above 0.")
    return value


def verify_jwt(
    token: str, *, hs256_key: str, es256_key: PublicKey | None, now: float,
    leeway: float = LEEWAY, token_type: str = "access",
) -> Mapping[str, object]:  # fmt: skip
    """Return a token's claims if its signature, times and type are right (RFC 7519, section 4.1).

    HS256 tokens name their type; ES256 tokens are access tokens by having none.
    """
    algorithm, payload = verify_jws(token, _utf8(hs256_key), es256_key)
    claims = _parse_json_object(payload)
    expires, not_before, issued = (_time_claim(claims, name) for name in ("exp", "nbf", "iat"))
    if expires is None:
        raise TokenError("The token has no exp.")
    if expires <= now - leeway:
        raise TokenError("The token has expired.")
    if any(since is not None and since > now + leeway for since in (not_before, issued)):
        raise TokenError("The token is not valid yet.")
    if algorithm == "HS256":
        right_type = claims.get("token_type") == token_type
    else:
        right_type = "token_type" not in claims and token_type == "access"
    if not right_type:
        raise TokenError("The token is of the wrong type.")
    return claims


# -- Scoped tokens: JSON Web Tokens of their own key for `?token=` -----------------------

SCOPES = frozenset({"upload", "delete", "read"})


class Grant(NamedTuple):
    """What a scoped token is for: which acts, where, how many bytes or uses, until when."""

    scopes: frozenset[str]
    expires: float  # Unix seconds
    path: str = "/"  # this path of a request, and what is below it
    max_bytes: int | None = None  # of each file
    uses: int | None = None  # requests that succeed
    id: str = ""  # under which its uses are counted

    def covers(self, scope: str, path: str) -> bool:
        """Return whether the token is for this at a path, which is without percent-encoding.

        >>> [Grant(frozenset({"read"}), 0, "/a/").covers("read", p) for p in ("/a/b", "/a", "/ab")]
        [True, True, False]
        """
        return scope in self.scopes and f"{path}/".startswith(f"{self.path.rstrip('/')}/")


def scoped_key(secret: str) -> str:
    """Return the HS256 key of scoped tokens: one that no other token is signed with."""
    return derive_key(secret, "scoped tokens").hex()


def sign_grant(grant: Grant, key: str) -> str:
    """Return a scoped token; the key is what `scoped_key` makes of MEDIA_SERVER_SECRET."""
    scopes = " ".join(sorted(grant.scopes))
    limits = {"max_bytes": grant.max_bytes, "uses": grant.uses}
    given = {name: value for name, value in limits.items() if value is not None}
    about = {"scope": scopes, "path": grant.path, "exp": int(grant.expires), "jti": grant.id}
    return sign_jwt({"token_type": "scoped", **about, **given}, key)


def verify_grant(token: str, key: str, now: float) -> Grant:
    """Return what a scoped token is for, if it is ours and has not expired."""
    claims = verify_jwt(
        token, hs256_key=key, es256_key=None, now=now, leeway=0, token_type="scoped"
    )
    scopes = frozenset(str(claims.get("scope")).split())
    path, id = claims.get("path", "/"), claims.get("jti", "")
    if not scopes or scopes - SCOPES:
        raise TokenError(f"The token's scope is none of {', '.join(sorted(SCOPES))}.")
    if not isinstance(path, str) or not path.startswith("/"):
        raise TokenError("The token's path is no path that begins with a slash.")
    max_bytes, uses = (_number_claim(claims, name) for name in ("max_bytes", "uses"))
    if not isinstance(id, str) or (uses and not id):
        raise TokenError("The token's jti, by which its uses are counted, is no text.")
    return Grant(scopes, _time_claim(claims, "exp") or 0, path, max_bytes, uses, id)


# -- Principals and what they may do -----------------------------------------------------


class Principal(NamedTuple):
    """Who makes a request."""

    kind: str  # anonymous, uploader, scoped, token, owner, demo or view
    user_id: int | None = None  # of an account, from HS256; 0 is the demo user
    subject: str | None = None  # `sub` of an ES256 token, which is no user here
    permissions: frozenset[str] = frozenset()
    is_admin: bool = False
    issued: float = 0.0  # Unix seconds, as the token says
    session: str = ""  # of the account, in which the token was issued
    grant: Grant | None = None  # of a scoped token
    cookie: str = ""  # the signature of a view cookie, under which it may be ended

    def __str__(self) -> str:
        name = self.subject if self.user_id is None else self.user_id
        return self.kind if name is None else f"{self.kind} {name}"


ANONYMOUS = Principal("anonymous")
UPLOADER = Principal("uploader")
OWNER = Principal("owner", is_admin=True)
DEMO = Principal("demo", user_id=0, is_admin=True)

READ_PERMISSION, WRITE_PERMISSION = "media_store_read", "media_store_write"


class Access(enum.Enum):
    """Who may call a route: its name, and the permission that lets a non-administrator in.

    Where that is None, the third value says what lets in.
    """

    OPEN = "open", None
    READ = "read", READ_PERMISSION
    PRIVATE_READ = "private read", READ_PERMISSION
    UPLOAD = "upload", WRITE_PERMISSION
    WRITE = "write", WRITE_PERMISSION
    USER = "user", None, "a user's access token (POST /api/auth/login/)"
    BEARER = "bearer", None, "AUTH_TOKEN or an access token"  # whatever else that lets do
    TARGET = "as the target's upload", None, "AUTH_TOKEN or a token that may upload"  # seen later


OPEN, READ, PRIVATE_READ, UPLOAD, WRITE, USER, BEARER, TARGET = Access


def allows(access: Access, principal: Principal, read_auth_enabled: bool) -> bool:
    """Return whether the principal may call a route of this access."""
    if access is Access.OPEN or (access is Access.READ and not read_auth_enabled):
        return True
    if access is Access.USER:
        return principal.user_id is not None
    if access is Access.TARGET:
        return principal != ANONYMOUS
    if access is Access.BEARER:
        return principal.kind in {"token", "owner", "demo"}
    if access is Access.UPLOAD and principal.kind == "uploader":
        return True
    return principal.is_admin or access.value[1] in principal.permissions


def describe_credential(access: Access) -> str:
    """Return the credential that routes of this access need.

    >>> describe_credential(Access.WRITE)
    'AUTH_TOKEN or a token with the permission media_store_write'
    """
    _, permission, *words = access.value
    return words[0] if words else f"AUTH_TOKEN or a token with the permission {permission}"


class CredentialMissing(HTTPError):
    """A 401 that says which credential is needed and how it is sent."""

    def __init__(self, access: Access) -> None:
        uploads = access in {Access.UPLOAD, Access.TARGET}
        other = ", or an upload token as ?token=…" if uploads else ""
        detail = f"Send {describe_credential(access)} as Authorization: Bearer …{other}."
        super().__init__(401, detail, {"WWW-Authenticate": "Bearer"})


def refusal(access: Access, principal: Principal) -> HTTPError:
    """Return the 401 for a missing credential, or the 403 for one that does not suffice."""
    if principal == ANONYMOUS:
        return CredentialMissing(access)
    if principal.grant:
        scopes, path = ", ".join(sorted(principal.grant.scopes)), principal.grant.path
        return HTTPError(403, f"The token is good, but only lets {scopes} at {path} and below.")
    need = describe_credential(access)
    return HTTPError(403, f"The credential is good, but this needs {need}.")


class TokenCache:
    """Verified tokens, of which the least recently used go; each step is atomic.

    Tokens are held as digests: a memory dump shows none.
    """

    def __init__(self) -> None:
        self._entries: dict[bytes, tuple[float, Principal]] = {}  # that used last is the last

    def get(self, token: str, now: float) -> Principal | None:
        """Return whom a token was good for, if it still is at `now`."""
        digest = hashlib.sha256(_utf8(token)).digest()
        expires, principal = self._entries.pop(digest, (now, None))
        if principal is None or now >= expires:
            return None
        self._entries[digest] = expires, principal
        return principal

    def put(self, token: str, principal: Principal, expires: float) -> None:
        """Remember whom a token is good for until it `expires`; the oldest of too many go."""
        self._entries[hashlib.sha256(_utf8(token)).digest()] = expires, principal
        for digest in [*self._entries][:-MAX_CACHED_TOKENS]:
            self._entries.pop(digest, None)


class AuthConfig:
    """What credentials are checked with; a blank secret would accept forgeries and is refused."""

    # Not a tuple: its repr would show the secrets.
    def __init__(self, settings: Settings, public_key: PublicKey | None) -> None:
        self.settings, self.public_key = settings, public_key
        keys = (settings.auth_token, settings.jwt_signing_key)
        if not all(secret.strip() for secret in (*keys, settings.media_server_secret)):
            raise ValueError("a secret is blank")
        self.scoped_key = scoped_key(settings.media_server_secret)
        # Another secret, or the end of demo mode, ends what either of them let in
        self.view_key = derive_key(json.dumps([settings.auth_disabled, *keys]), "view cookies")
        self.tokens = TokenCache()


def principal_of_claims(claims: Mapping[str, object]) -> Principal:
    """Return whom verified claims speak for."""
    is_ours = "token_type" in claims  # signed with HS256 by who knows the accounts (verify_jwt)
    permissions = [] if (told := claims.get("permissions")) is None else told
    if not isinstance(permissions, list) or not all(isinstance(p, str) for p in permissions):
        raise TokenError("The token's permissions are not a list of strings.")
    subject = None if is_ours else claims.get("sub")
    if subject is not None and not isinstance(subject, str):
        raise TokenError("The token's sub is not a string.")
    user_id = _number_claim(claims, "user_id", as_text=True) if is_ours else None
    if is_ours and user_id is None:
        raise TokenError("The token has no user_id.")
    return Principal(
        kind="token",
        user_id=user_id,
        subject=subject,
        permissions=frozenset(permissions),
        is_admin=claims.get("is_admin") is True,  # the string "false" makes no administrator
        issued=_time_claim(claims, "iat") or 0.0,
        session=str(claims.get("session", "")),
    )


def parse_bearer(authorization: str | None) -> str | None:
    """Return the token of an `Authorization` field, None for no field or another scheme.

    >>> parse_bearer("bearer  abc"), parse_bearer("Basic eDp5")
    ('abc', None)
    """
    scheme, _, token = (authorization or "").strip(" \t").replace("\t", " ").partition(" ")
    if scheme.lower() != "bearer":
        return None
    if not token:
        raise TokenError("The Authorization header has no token.", "bad_authorization_header")
    return token.lstrip(" ")


def _bearer_principal(token: str, auth: AuthConfig, now: float) -> Principal:
    if equals_secret(token, auth.settings.auth_token):
        return OWNER
    if " " in token:
        detail = "The Authorization header has more than one token."
        raise TokenError(detail, "bad_authorization_header")
    if token.count(".") != 2:
        detail = "The bearer is neither the owner's key (AUTH_TOKEN) nor a JSON Web Token."
        raise TokenError(detail)
    principal = auth.tokens.get(token, now)
    if principal is None:
        hs256_key = auth.settings.jwt_signing_key
        claims = verify_jwt(token, hs256_key=hs256_key, es256_key=auth.public_key, now=now)
        principal = principal_of_claims(claims)
        auth.tokens.put(token, principal, _time_claim(claims, "exp") or now)
    return principal


def recall_principal(
    authorization: str | None, cookies: str, auth: AuthConfig, now: float
) -> Principal | None:
    """Return who makes a request if that costs nothing to tell, and is no account; else None.

    A bearer has to be the owner's, or one whose signature was verified before; whether a cookie
    was ended stands in the index.
    """
    if auth.settings.auth_disabled:
        return DEMO
    if authorization is None:
        return None if cookies else ANONYMOUS
    with contextlib.suppress(TokenError):
        if token := parse_bearer(authorization):
            if equals_secret(token, auth.settings.auth_token):
                return OWNER
            principal = auth.tokens.get(token, now)
            return principal if principal and principal.user_id is None else None
    return None


VIEW_COOKIE = "mediaserver_view"
VIEW_SECONDS = 12 * 3600


def sign_view(principal: Principal, key: bytes, now: float) -> str:
    """Return the value of a view cookie: what pictures in a page may be asked for with."""
    reads = principal.is_admin or READ_PERMISSION in principal.permissions
    expires = now + VIEW_SECONDS  # to the microsecond: no two cookies are one
    about = [expires, principal.user_id, principal.subject, reads, principal.session]
    payload = encode_base64url(json.dumps(about).encode())
    return f"{payload}.{encode_base64url(_hmac_sha256(key, payload.encode()))}"


def verify_view(cookies: str, key: bytes, now: float) -> Principal:
    """Return whom the good view cookie in a `Cookie` field speaks for, with reads alone.

    A bad one counts as none: a browser sends what it has, and its user cannot mend it.
    """
    for payload, signature in re.findall(rf"\b{VIEW_COOKIE}=([\w-]+)\.([\w-]+)", cookies, re.A):
        expected = encode_base64url(_hmac_sha256(key, payload.encode()))
        if hmac.compare_digest(signature, expected):
            expires, user_id, subject, reads, *session = json.loads(decode_base64url(payload))
            if now < expires:
                permissions = frozenset({READ_PERMISSION} if reads else ())
                return Principal(
                    "view", user_id, subject, permissions, issued=expires - VIEW_SECONDS,
                    session="".join(session), cookie=signature,
                )  # fmt: skip
    return ANONYMOUS


def _query_token_principal(token: str, auth: AuthConfig, now: float) -> Principal:
    """Return who comes with `?token=`: an uploader, or the bearer of a scoped token."""
    if token.count(".") == 2:
        return Principal("scoped", grant=verify_grant(token, auth.scoped_key, now))
    settings = auth.settings
    verify_upload_token(token, settings.media_server_secret, now, settings.token_expiry_seconds)
    if settings.upload_tokens != "all":
        raise TokenError("Only upload tokens with a scope are good here (UPLOAD_TOKENS).")
    return UPLOADER


def principal_of_grant(grant: Grant, method: str, path: str) -> Principal:
    """Return who comes with a scoped token: an uploader, a reader or neither of this path.

    `path` is without percent-encoding.
    """
    changes = grant.covers("delete" if method == "DELETE" else "upload", path)
    permissions = frozenset({READ_PERMISSION} if grant.covers("read", path) else ())
    return Principal("uploader" if changes else "scoped", permissions=permissions, grant=grant)


def find_principal(
    authorization: str | None, upload_token: str | None, auth: AuthConfig, now: float,
    *, cookies: str = "",
) -> Principal:  # fmt: skip
    """Return who makes a request, from its `Authorization`, `?token=` and `Cookie`.

    Every credential that is present must be right, else 401 (RFC 6750, section 3), but for a view
    cookie, which only counts where there is no other, and which the caller passes for reads only.
    A bearer decides over an upload token. Whether an account is disabled is for the caller to look
    up.
    """
    if auth.settings.auth_disabled:
        return DEMO
    try:
        bearer = parse_bearer(authorization)
        uploader = None
        if upload_token is not None:
            uploader = _query_token_principal(upload_token, auth, now)
        if bearer is not None:
            return _bearer_principal(bearer, auth, now)
    except TokenError as error:
        raise Unauthorized(error) from None
    if uploader is not None:
        return uploader
    return verify_view(cookies, auth.view_key, now) if cookies else ANONYMOUS


# ======================================================================================
# 4. Media facts
# ======================================================================================
# What a file is, from its bytes. `probe` finds the type by the head, and follows the structure to
# size, length, orientation and time of making. Nearly every format is a row of labelled spans,
# often with such rows inside, so one walker serves them all, with a short function for each way to
# write a label and one for each format, which picks what it knows. All reading goes through
# `_Span`, which checks every position, and its `_Source`, which charges it to the file's budget:
# that bounds every loop. Whatever it is in broken bytes that Python objects to ends that parser,
# and `probe` returns what was found until then.

FACTS_VERSION = "2"  # another one wherever a file may tell more, or other facts, than before
HEAD_BYTES = 4096  # which tell the type
SVG_HEAD_BYTES = 65536  # an SVG's, whose programs write comments and a DTD before it
MAX_PROBE_COST = 1 << 21  # bytes and READ_COSTs spent on one file: some 30 ms at the most
READ_COST = 256  # what a read costs beside its bytes
STEP_COST = 40  # of a loop over what was read
MAX_GIF_BYTES = 1 << 20  # of an animation: its length is told only by walking all frames
MAX_IFD_ENTRIES = 1000
MAX_TRIES = 64  # written times looked at in one file, occurrences of a name in a packet
MAX_BLOCK_BYTES = 1 << 18  # looked at of a block of metadata, also when it unpacks to more
MAX_NOTE_BYTES = 256  # of a name, a written time, a list of numbers
MAX_SYNC_BYTES = 8192  # in which audio must begin after its tags
STREAM_SAMPLE_BYTES = 1 << 16  # looked at of the start or end of what has no index
FRAME_SAMPLES = 60  # stretches of audio whose frames are counted where nothing tells their number
FRAME_SAMPLE_BYTES = 1 << 14
EARLIEST_TIME = -4544208000  # 1826, the year of the first photograph, in Unix seconds
LATEST_TIME = 253370764800  # the year 9999, where calendars end

_BROKEN = (ArithmeticError, EOFError, LookupError, ValueError, struct.error, zlib.error)


class Facts(NamedTuple):
    """What is known of a media file; `None` where the file does not say."""

    kind: str  # "image", "video" or "audio"
    mime_type: str
    extension: str  # without the dot; "jpg" for JPEG
    width: int | None = None  # pixels as stored, before any rotation
    height: int | None = None
    orientation: int = 1  # EXIF's 1 to 8, also for rotations that containers keep
    duration: float | None = None  # seconds
    created: float | None = None  # Unix seconds, UTC
    created_source: str | None = None  # "exif", "xmp", "iptc", "png", "container"
    make: str | None = None
    model: str | None = None
    latitude: float | None = None  # degrees, north and east positive
    longitude: float | None = None
    altitude: float | None = None  # metres


class _Source(NamedTuple):
    """A file of which the first bytes are read once, and a budget that everything read costs."""

    head: bytes
    file: BinaryIO
    budget: list[int]  # of one number, which what is packed in the file shares


class _Span:
    """A stretch of a file. Positions count from its start; nothing beyond its end can be read."""

    __slots__ = ("size", "source", "start")

    def __init__(self, source: _Source, start: int, size: int) -> None:
        self.source, self.start, self.size = source, start, size

    def read(self, at: int, length: int) -> bytes:
        """Return so many bytes from a position on; EOFError where there are fewer."""
        if at < 0 or not 0 <= length <= self.size - at:
            raise EOFError
        at, (head, file, budget) = self.start + at, self.source
        budget[0] -= READ_COST + length  # as charge does, without a call for each label of a file
        if budget[0] < 0:
            raise EOFError
        if at + length <= len(head):
            return head[at : at + length]
        file.seek(at)
        data = file.read(length)
        if len(data) < length:  # the file was cut meanwhile
            raise EOFError
        return data

    def charge(self, cost: int) -> None:
        """Take from the file's budget; EOFError when it is spent."""
        budget = self.source.budget
        budget[0] -= cost
        if budget[0] < 0:
            raise EOFError

    def peek(self, at: int, length: int) -> bytes:
        """Return as much as there is of so many bytes."""
        return self.read(at, min(length, self.size - at)) if 0 <= at < self.size else b""

    def unpack(self, layout: str, at: int) -> tuple[Any, ...]:
        return struct.unpack(layout, self.read(at, struct.calcsize(layout)))

    def number(self) -> int:
        """Return the big-endian number that fills it; 0 if it is empty."""
        return int.from_bytes(self.peek(0, 8), "big")

    def read_uint(self, length: int) -> int:
        """Cut a big-endian number off its start."""
        digits = self.read(0, length)
        self.start, self.size = self.start + length, self.size - length
        return int.from_bytes(digits, "big")

    def part(self, start: int, end: int | None = None) -> _Span:
        """Return what there is from a position on, up to another one or to the end."""
        start = min(max(start, 0), self.size)
        end = self.size if end is None else min(end, self.size)
        return _Span(self.source, self.start + start, max(0, end - start))

    def inner(self, data: bytes) -> _Span:
        """Return a file that was packed in this one."""
        return _Span(_Source(data, io.BytesIO(data), self.source.budget), 0, len(data))

    def inflate(self, data: bytes) -> bytes:
        """Unpack MAX_BLOCK_BYTES at most of what zlib packed; what comes out is charged."""
        data = zlib.decompressobj().decompress(data, MAX_BLOCK_BYTES)
        self.charge(len(data))
        return data


# A label, where in the span that it labels starts and ends, and where the next label stands.
_Header = tuple[bytes, int, int, int]


class _Parts:
    """The parts of a span: a walk over all with their labels, or the first one with a label.

    The first label stands at `start`.
    """

    def __init__(
        self, read_header: Callable[[_Span, int], _Header], span: _Span, start: int = 0
    ) -> None:
        self._read_header, self._span, self._start = read_header, span, start

    def __iter__(self) -> Iterator[tuple[bytes, _Span]]:
        span, at = self._span, self._start
        while at < span.size:
            try:
                label, start, end, at = self._read_header(span, at)
            except EOFError:  # padding, or a file that was cut
                return
            size = min(end, span.size) - start
            if size < 0:
                return
            yield label, _Span(span.source, span.start + start, size)

    def __getitem__(self, wanted: bytes) -> _Span:
        """Return the first part with that label, or an empty one."""
        return next((part for label, part in self if label == wanted), _NOTHING)

    def all(self, wanted: bytes) -> list[_Span]:
        return [part for label, part in self if label == wanted]


def _labelled(
    layout: str, *, behind: int = 0, align: int = 1, whole: bool = False
) -> Callable[..., _Parts]:
    """Return what finds parts that each stand behind a label and a size, packed as `layout`.

    The size is the content's, or the `whole` part's; bytes of no interest may be `behind` it.
    """
    header = struct.Struct(layout)

    def read_header(span: _Span, at: int) -> _Header:
        first, second = header.unpack(span.read(at, header.size))
        label, size = (first, second) if isinstance(first, bytes) else (second, first)
        end = at + size + (0 if whole else header.size)
        return label, at + header.size, end, end + -size % align + behind

    return functools.partial(_Parts, read_header)


_NOTHING = _Span(_Source(b"", io.BytesIO(), [0]), 0, 0)
_POSSIBLE = {  # what lies outside comes from a broken header
    "width": (1, 1 << 31), "height": (1, 1 << 31), "orientation": (1, 8),
    "duration": (1e-6, 10 * 366 * 86400), "latitude": (-90, 90), "longitude": (-180, 180),
    "altitude": (-20_000, 1e9),
}  # fmt: skip


class _Draft:
    """Facts while they are being found: of two answers the first one stays, of times the best."""

    def __init__(self, extension: str) -> None:
        self.extension = extension
        self.mime_type: str | None = None  # where it is not the extension's
        self.found: dict[str, Any] = {}
        self._time_rank = 99
        self._tries = MAX_TRIES

    def note(self, **numbers: float) -> None:
        """Keep what was read together, if all of it is possible."""
        for name, number in numbers.items():
            lowest, highest = _POSSIBLE[name]
            if not lowest <= number <= highest:
                return
        self.found = numbers | self.found

    def note_size(self, width: int, height: int) -> None:
        self.note(width=width, height=height)

    def note_name(self, field: str, name: bytes) -> None:
        """Note a maker or model, up to the first zero byte."""
        if text := name.partition(b"\0")[0].decode("utf-8", "replace").strip():
            self.found.setdefault(field, text)

    def note_time(self, rank: int, source: str, seconds: float | None) -> None:
        """Note a time of making, if it is a possible one; the lowest rank is the best."""
        if seconds is None or not EARLIEST_TIME <= seconds < LATEST_TIME:
            return
        if source == "container" and seconds in (0, _QUICKTIME_EPOCH):  # a clock never set
            return
        if rank < self._time_rank:
            self._time_rank = rank
            self.found |= {"created": float(seconds), "created_source": source}

    def note_written_time(self, rank: int, source: str, *texts: bytes) -> None:
        """Note what `parse_time` makes of the texts, unless a better time is known."""
        if rank < self._time_rank and self._tries:
            self._tries -= 1
            self.note_time(rank, source, parse_time(*(text[:MAX_NOTE_BYTES] for text in texts)))


_ZONE = rb"Z|UTC|GMT|[-+]\d\d?(?::?\d\d)?"
_WRITTEN_TIME = re.compile(
    rb"(\d{4})[-:./ ] ?(\d\d?)[-:./ ] ?(\d\d?)(?!\d)"  # date: EXIF's colons, ISO 8601's hyphens
    rb"(?:[T /]{1,2}(\d\d?): ?(\d\d?)(?:: ?(\d\d?)(?:[.,](\d+))?)? ?([AP]M)?)?"  # time of day
    rb" ?(%b)?" % _ZONE,
    re.IGNORECASE,
)
_TIME_ZONE = re.compile(_ZONE, re.IGNORECASE)
MAX_ZONE_SECONDS = 15 * 3600  # the farthest zones are 14 hours ahead


def parse_zone(text: bytes) -> int | None:
    """Parse an offset from UTC into seconds, east positive; `None` for what is none.

    >>> parse_zone(b"+2:00"), parse_zone(b"-0330"), parse_zone(b"Z"), parse_zone(b"-99:59")
    (7200, -12600, 0, None)
    """
    text = text.strip(b"\0 ")
    if not _TIME_ZONE.fullmatch(text):
        return None
    digits = text[1:].replace(b":", b"") if text[:1] in b"+-" else b"0"
    hours, minutes = divmod(int(digits), 100) if len(digits) > 2 else (int(digits), 0)
    seconds = hours * 3600 + minutes * 60
    return (-seconds if text[:1] == b"-" else seconds) if seconds <= MAX_ZONE_SECONDS else None


def parse_time(text: bytes, zone: bytes = b"", fraction: bytes = b"") -> float | None:
    """Parse a written time into Unix seconds; without a zone it is the machine's local time.

    EXIF keeps the zone (`OffsetTime`) and the fraction (`SubSecTime`) apart: those are the other
    arguments. `None` for what is no possible time. EXIF 2.32 section 4.6.5, ISO 8601, XMP part 1.

    >>> parse_time(b"2019:05:04 03:02:01", b"+02:00", b"50")
    1556931721.5
    >>> parse_time(b"2019-05-04T01:02:01.5Z")
    1556931721.5
    >>> parse_time(b"Mon, 10 Mar 2003 15:04:43 GMT")
    1047308683.0
    """
    text = b" ".join(text.lstrip(b"\0 ").partition(b"\0")[0].split())
    try:
        if match := _WRITTEN_TIME.match(text):
            *digits, own_fraction, half, own_zone = match.groups(b"")
            year, month, day, hour, minute, second = (int(each or 0) for each in digits)
            if half:
                hour = hour % 12 + (12 if half.upper() == b"PM" else 0)
            moment = datetime(year, month, day, hour, minute, second)
        else:  # with a month's name: C's `asctime` in videos, RFC 1123's in PNG
            named, own_fraction = parsedate_to_datetime(text.decode("latin-1")), b""
            moment, own_zone = named.replace(tzinfo=None), named.strftime("%z")[:5].encode()
        offsets = (parse_zone(each) for each in (own_zone, zone))
        offset = next((each for each in offsets if each is not None), None)
        if offset is None:
            seconds = moment.timestamp()
        else:
            seconds = moment.replace(tzinfo=timezone.utc).timestamp() - offset
    except (ArithmeticError, LookupError, TypeError, ValueError):  # no such day, no time at all
        return None
    fraction = own_fraction or fraction.strip(b" \0")
    return seconds + (float(b"0." + fraction[:9]) if fraction.isdigit() else 0)


# -- TIFF and EXIF, a small TIFF file inside another file (TIFF 6.0, EXIF 2.32) ----------

_TIFF_VALUES = {
    1: "B", 2: "s", 3: "H", 4: "I", 5: "II", 6: "b", 7: "s", 8: "h", 9: "i", 10: "ii", 11: "f",
    12: "d", 13: "I", 16: "Q", 17: "q", 18: "Q",
}  # fmt: skip
_SUBFILE_TYPE, _WIDTH, _HEIGHT, EXIF_ORIENTATION = 0xFE, 0x100, 0x101, 0x112
_MAKE, _MODEL = 0x10F, 0x110
_JPEG_FROM_RAW, _IPTC_RECORD, _PHOTOSHOP_BLOCK = 0x2E, 0x83BB, 0x8649
_SUB_IFDS, _XMP_PACKET, _EXIF_IFD, _GPS_IFD, _DNG_VERSION = 0x14A, 0x2BC, 0x8769, 0x8825, 0xC612
# Tags of a time, of its zone or else that of another time, and of its fraction; best first: when
# it was taken, when it was digitized.
_EXIF_TIMES = (
    (0x9003, 0x9011, 0x9012, 0x9010, 0x9291),
    (0x9004, 0x9012, 0x9011, 0x9010, 0x9292),
)
_RAW_BY_MAKER = {b"NIKON": "nef", b"SONY": "arw", b"PENTAX": "pef"}


class _Ifd:
    """One TIFF directory: values by tag. What is missing or cannot be read is empty."""

    def __init__(self, tiff: _Span, order: str, start: int, wide: bool = False) -> None:
        self._tiff, self._order, self._wide = tiff, order, wide  # wide: BigTIFF
        self.entries: dict[int, tuple[int, int, bytes]] = {}
        self.next = 0
        if start < 8:  # in the header: there is none
            return
        counter, entry, self._offset = (
            order + each for each in (("Q", "HHQ8s", "Q") if wide else ("H", "HHI4s", "I"))
        )
        first, size = start + struct.calcsize(counter), struct.calcsize(entry)
        with contextlib.suppress(*_BROKEN):
            (count,) = tiff.unpack(counter, start)
            table = tiff.peek(first, size * min(count, MAX_IFD_ENTRIES))
            entries = [*struct.iter_unpack(entry, table[: len(table) // size * size])]
            tiff.charge(STEP_COST * len(entries))
            self.entries = {tag: (*value,) for tag, *value in reversed(entries)}
            (self.next,) = tiff.unpack(self._offset, first + size * count)

    def at(self, start: int) -> _Ifd:
        return _Ifd(self._tiff, self._order, start, self._wide)

    def sub_ifd(self, tag: int) -> _Ifd:
        """Return the directory that a tag points to, or this one: Canon's videos lack the tag."""
        return self.at(self.number(tag)) if tag in self.entries else self

    def raw(self, tag: int) -> bytes:
        """Return the bytes of a value, MAX_BLOCK_BYTES at most."""
        kind, count, inline = self.entries.get(tag, (0, 0, b""))
        length = count * struct.calcsize("=" + _TIFF_VALUES.get(kind, ""))
        if length <= len(inline):
            return inline[:length]
        (start,) = struct.unpack(self._offset, inline)
        return self._tiff.part(start, start + length).peek(0, MAX_BLOCK_BYTES)

    def numbers(self, tag: int) -> list[float]:
        """Return the numbers of a value, fractions divided; none of a text."""
        layout = _TIFF_VALUES.get(self.entries.get(tag, (0,))[0], "s")
        if layout == "s":
            return []
        layout, raw = self._order + layout, self.raw(tag)[:MAX_NOTE_BYTES]
        width = struct.calcsize(layout)
        values = struct.iter_unpack(layout, raw[: len(raw) // width * width])
        return [value[0] if len(value) == 1 else value[0] / value[1] for value in values]

    def number(self, tag: int) -> int:
        return int(next(iter(self.numbers(tag)), 0))


def _exif(tiff: _Span, draft: _Draft) -> _Ifd:
    """Note time, maker, place and orientation; return the main directory."""
    order = "<" if tiff.read(0, 2) == b"II" else ">"
    wide = tiff.unpack(order + "H", 2) == (43,)
    (start,) = tiff.unpack(order + "Q", 8) if wide else tiff.unpack(order + "I", 4)
    main = _Ifd(tiff, order, start, wide)
    draft.note(orientation=main.number(EXIF_ORIENTATION))
    draft.note_name("make", main.raw(_MAKE)[:MAX_NOTE_BYTES])
    draft.note_name("model", main.raw(_MODEL)[:MAX_NOTE_BYTES])
    detail = main.sub_ifd(_EXIF_IFD)
    for rank, tags in enumerate(_EXIF_TIMES):
        written, *zones, fraction = (detail.raw(tag) or main.raw(tag) for tag in tags)
        zone = next((z for z in zones if parse_zone(z) is not None), b"")
        draft.note_written_time(rank, "exif", written, zone, fraction)
    _exif_place(main.sub_ifd(_GPS_IFD), draft)
    return main


def _exif_place(gps: _Ifd, draft: _Draft) -> None:
    """Note latitude, longitude and altitude: tags 1 to 6, reference and value of each."""
    places = [gps.numbers(tag) for tag in (2, 4)]
    if all(len(place) == 3 for place in places):
        latitude, longitude = (d + m / 60 + s / 3600 for d, m, s in places)
        latitude *= -1 if gps.raw(1)[:1] == b"S" else 1
        longitude *= -1 if gps.raw(3)[:1] == b"W" else 1
        draft.note(latitude=latitude, longitude=longitude)
        for height in gps.numbers(6)[:1]:
            draft.note(altitude=-height if gps.number(5) == 1 else height)


def _tiff(tiff: _Span, draft: _Draft) -> None:
    """Note the size of the first full-size picture, in TIFF and the raw formats that are TIFF."""
    main = _exif(tiff, draft)
    if draft.extension == "rw2":  # the sensor within its borders
        top, left, bottom, right = map(main.number, (4, 5, 6, 7))
        draft.note_size(right - left, bottom - top)
        _jpeg(tiff.inner(main.raw(_JPEG_FROM_RAW)), draft)  # it has the dates
    pictures = [main, *map(main.at, map(int, main.numbers(_SUB_IFDS))), main.at(main.next)]
    full = next((p for p in pictures if p.numbers(_SUBFILE_TYPE) == [0]), main)
    draft.note_size(full.number(_WIDTH), full.number(_HEIGHT))
    _xmp(main.raw(_XMP_PACKET), draft)
    _iptc(tiff.inner(main.raw(_IPTC_RECORD)), draft)
    _metadata(tiff.inner(main.raw(_PHOTOSHOP_BLOCK)), draft)
    if _DNG_VERSION in main.entries:
        draft.extension = "dng"
    elif draft.extension == "tiff" and main.number(_SUBFILE_TYPE) == 1:
        maker = re.split(rb"[ \0]", main.raw(_MAKE).upper())[0]
        draft.extension = _RAW_BY_MAKER.get(maker, "tiff")


_XMP_TIMES = (  # namespace, its usual prefix, name; best first (XMP parts 1 and 2)
    (b"http://ns.adobe.com/exif/1.0/", b"exif", b"DateTimeOriginal"),
    (b"http://ns.adobe.com/photoshop/1.0/", b"photoshop", b"DateCreated"),
    (b"http://ns.adobe.com/xap/1.0/", b"xmp", b"CreateDate"),
)
_XMP_PREFIX = re.compile(rb"([\w.-]+)\s*=\s*(?:\"([^\"]{,99})\"|'([^']{,99})')")
_XMP_VALUE = re.compile(rb"\s*(?:=\s*[\"']|>)\s*([^\"'<>]{10,40})")  # of attribute or element


def _xmp(packet: bytes, draft: _Draft) -> None:
    """Note times of capture in an XMP packet, whatever prefixes it gives their namespaces."""
    names = [_XMP_PREFIX.match(rest) for rest in packet.split(b"xmlns:", MAX_TRIES)[1:]]
    prefixes = {name[2] or name[3]: name[1] for name in names if name}
    for rank, (namespace, usual, name) in enumerate(_XMP_TIMES, 10):
        full_name = prefixes.get(namespace, usual) + b":" + name
        for rest in packet.split(full_name, MAX_TRIES)[1:]:
            if value := _XMP_VALUE.match(rest):
                draft.note_written_time(rank, "xmp", value[1])


_IPTC_DATE, _IPTC_TIME = b"\x1c\2\x37", b"\x1c\2\x3c"  # date and time created: 2:55 and 2:60
_datasets = _labelled(">3sH")  # number and size (IIM 4.2, section 1.5)


def _resource_header(block: _Span, at: int) -> _Header:
    """Read an image resource of Photoshop: `8BIM`, number, name and size, padded to even."""
    signature, number, name_size = block.unpack(">4s2sB", at)
    if signature != b"8BIM":
        raise EOFError
    at += 6 + (name_size + 2 & ~1)
    (size,) = block.unpack(">I", at)
    return number, at + 4, at + 4 + size, at + 4 + (size + 1 & ~1)


_resources = functools.partial(_Parts, _resource_header)


def _iptc(record: _Span, draft: _Draft) -> None:
    """Note the date and time created, `20180603` and `143205+0200` (IIM 4.2, section 6)."""
    date = _datasets(record)[_IPTC_DATE].peek(0, 8)
    clock = _datasets(record)[_IPTC_TIME].peek(0, 11)
    written = b"%b-%b-%b " % (date[:4], date[4:6], date[6:])
    written += b"%b:%b:%b" % (clock[:2], clock[2:4], clock[4:6]) if len(clock) >= 6 else b""
    draft.note_written_time(15, "iptc", written, clock[6:])


def _metadata(block: _Span, draft: _Draft) -> None:
    """Note EXIF, XMP or IPTC, with whatever prefix its container gives it."""
    start = re.search(rb"II\*\0|MM\0\*|8BIM|\x1c\x02|<", block.peek(0, 64))
    if start and start[0] == b"8BIM":
        _iptc(_resources(block.part(start.start()))[b"\4\4"], draft)
    elif start and start[0] == b"\x1c\2":
        _iptc(block.part(start.start()), draft)
    elif start and start[0] == b"<":
        _xmp(block.peek(0, MAX_BLOCK_BYTES), draft)
    elif start:
        with contextlib.suppress(*_BROKEN):  # broken EXIF leaves the picture's size to be read
            _exif(block.part(start.start()), draft)


# -- Pictures ----------------------------------------------------------------------------

_JPEG_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])(..)", re.DOTALL)
_JPEG_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})


def _jpeg_header(jpeg: _Span, at: int) -> _Header:
    """Read a marker and its segment (ITU-T T.81, B.1); stray bytes before it are skipped."""
    marker = _JPEG_MARKER.search(jpeg.read(at, min(512, jpeg.size - at)))
    if marker is None:
        raise EOFError
    start = at + marker.end()
    end = start - 2 + int.from_bytes(marker[2], "big")
    return marker[1], start, end, end


def _jpeg(jpeg: _Span, draft: _Draft) -> None:
    """Note segments up to the frame header; EXIF and XMP are in APP1, IPTC in APP13."""
    for marker, segment in _Parts(_jpeg_header, jpeg, 2):
        if marker in (b"\xe1", b"\xed"):
            _metadata(segment, draft)
        elif marker[0] in _JPEG_FRAMES:
            height, width = segment.unpack(">HH", 1)
            return draft.note_size(width, height)
        elif marker in (b"\xd9", b"\xda"):  # the end, the pixels
            return


_png_chunks = _labelled(">I4s", behind=4)  # a CRC (PNG third edition, section 5.3)


def _png(png: _Span, draft: _Draft) -> None:
    """Note all chunks, those after the pixels too."""
    for kind, chunk in _png_chunks(png, 8):
        if kind == b"IHDR":
            draft.note_size(*chunk.unpack(">II", 0))
        elif kind == b"acTL":
            draft.extension = "apng"
        elif kind == b"eXIf":
            _metadata(chunk, draft)
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            with contextlib.suppress(*_BROKEN):
                _png_text(kind, chunk, draft)


_PNG_TIMES = (b"Creation Time", b"create-date")
_PNG_PROFILES = (
    b"XML:com.adobe.xmp", b"Raw profile type exif", b"Raw profile type APP1",
    b"Raw profile type xmp", b"Raw profile type iptc", b"Raw profile type 8bim",
)  # fmt: skip


def _png_text(kind: bytes, chunk: _Span, draft: _Draft) -> None:
    """Note times and packed EXIF, XMP or IPTC among the texts (PNG third edition, 11.3.3)."""
    keyword, _, value = chunk.peek(0, MAX_BLOCK_BYTES).partition(b"\0")
    if keyword not in _PNG_TIMES + _PNG_PROFILES:
        return
    deflated = kind == b"zTXt" or (kind == b"iTXt" and value[:1] == b"\1")
    if kind == b"iTXt":  # flag, method, language, keyword in that language
        value = value[2:].split(b"\0", 2)[-1]
    elif kind == b"zTXt":
        value = value[1:]
    if deflated:
        value = chunk.inflate(value)
    if keyword in _PNG_TIMES:
        return draft.note_written_time(20, "png", value)
    if keyword.startswith(b"Raw"):  # ImageMagick's: name, length, hex
        value = bytes.fromhex(b"".join(value.split()[2:]).decode())
    _metadata(chunk.inner(value), draft)


def _gif(gif: _Span, draft: _Draft) -> None:
    """Note the screen's size, and the sum of the frames' delays if all of it is within reach."""
    width, height, flags = gif.unpack("<HHB", 6)
    draft.note_size(width, height)
    data, at = gif.peek(0, MAX_GIF_BYTES), 13 + _gif_colours(flags)
    delays = frames = 0
    while data[at] in b"!,":
        if data[at] == ord("!"):
            if data[at + 1] == 0xF9:
                delays += int.from_bytes(data[at + 4 : at + 6], "little")
            if data[at + 2 : at + 14] == b"\x0bXMP DataXMP":  # as it is, not in sub-blocks
                _xmp(gif.peek(at + 14, MAX_BLOCK_BYTES), draft)
            at += 2
        else:
            frames += 1
            at += 11 + _gif_colours(data[at + 9])
        while data[at]:  # sub-blocks, each behind its length
            gif.charge(STEP_COST)
            at += 1 + data[at]
        gif.charge(STEP_COST)
        at += 1
    if frames > 1:
        draft.note(duration=delays / 100)


def _gif_colours(flags: int) -> int:
    """Return the bytes of a table of colours, if there is one."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _bmp(bmp: _Span, draft: _Draft) -> None:
    """Note the size; core headers (12 bytes) have 16 bits, a negative height is from the top."""
    (header,) = bmp.unpack("<I", 14)
    width, height = bmp.unpack("<HH" if header == 12 else "<ii", 18)
    draft.note_size(width, abs(height))


def _ico(ico: _Span, draft: _Draft) -> None:
    """Note the size of the first picture of an icon; 0 stands for 256."""
    width, height = ico.unpack("<BB", 6)
    draft.note_size(width or 256, height or 256)


_SVG_UNITS = {b"": 1, b"px": 1, b"pt": 4 / 3, b"in": 96, b"cm": 96 / 2.54, b"mm": 96 / 25.4}
_SVG_PROLOG = re.compile(
    rb"\s+|<\?.*?\?>|<!--.*?-->|<!DOCTYPE\s+(?:[\w.-]+:)?svg\b[^\[>]*(?:\[.*?\]\s*)?>",
    re.DOTALL | re.IGNORECASE,
)
_SVG_ROOT = re.compile(rb"<(?:[\w.-]+:)?svg(?=[\s/>])")
_SVG_ATTRIBUTE = re.compile(rb"\s*([\w.:-]+)\s*=\s*(?:\"([^\"<]*)\"|'([^'<]*)')")
_SVG_SIDES = (b"width", b"height", b"viewBox")
_SVG_LENGTH = re.compile(rb"\s*(\d{1,9}(?:\.\d*)?|\.\d+)([a-z]*)\s*")


def _svg_root(head: bytes) -> re.Match[bytes] | None:
    """Return the svg tag, if an SVG document starts here: only a prolog may come before it."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        head = head[: len(head) & ~1].decode("utf-16", "replace").encode()
    at = 3 if head.startswith(b"\xef\xbb\xbf") else 0
    while match := _SVG_PROLOG.match(head, at):
        at = match.end()
    return _SVG_ROOT.match(head, at)


def _svg(svg: _Span, draft: _Draft) -> None:
    """Note width and height in CSS pixels; where one is relative or missing, the viewBox's."""
    attributes: dict[bytes, bytes] = {}
    attribute = _svg_root(svg.peek(0, SVG_HEAD_BYTES))
    while attribute := attribute and _SVG_ATTRIBUTE.match(attribute.string, attribute.end()):
        name, double, single = attribute.groups(b"")
        if name in _SVG_SIDES:
            attributes.setdefault(name, double or single)
    box = attributes.get(b"viewBox", b"").replace(b",", b" ").split()
    sides = []
    for written in ((attributes.get(b"width"), *box[2:3]), (attributes.get(b"height"), *box[3:4])):
        lengths = [match for text in written if (match := _SVG_LENGTH.fullmatch(text or b""))]
        known = [float(m[1]) * _SVG_UNITS[m[2]] for m in lengths if m[2] in _SVG_UNITS]
        sides.append(round((*known, 0)[0]))
    draft.note_size(sides[0], sides[1])


_JXL_RATIOS = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def _jxl_codestream(head: bytes, draft: _Draft) -> None:
    """Note SizeHeader and orientation of a JPEG XL codestream (ISO 18181-1 annexes D.2, D.3)."""
    bits = int.from_bytes(head[2:], "little")

    def read_uint(count: int) -> int:
        nonlocal bits
        value, bits = bits & (1 << count) - 1, bits >> count
        return value

    def side(small: int) -> int:
        return 8 * (1 + read_uint(5)) if small else 1 + read_uint((9, 13, 18, 30)[read_uint(2)])

    small = read_uint(1)
    height = side(small)
    over, under = _JXL_RATIOS[read_uint(3)]
    draft.note_size(height * over // under if over else side(small), height)
    # unless the metadata are the default, or have no extra fields
    draft.note(orientation=1 + read_uint(3) if not read_uint(1) and read_uint(1) else 1)


def _jxl(jxl: _Span, draft: _Draft) -> None:
    """Note what a bare codestream says, or boxes: `jxlc` is one, `jxlp` a numbered piece."""
    if jxl.read(0, 2) == b"\xff\x0a":
        return _jxl_codestream(jxl.peek(0, 32), draft)
    for kind, box in _boxes(jxl):
        if kind in (b"jxlc", b"jxlp"):
            _jxl_codestream(box.peek(0 if kind == b"jxlc" else 4, 32), draft)
        elif kind in (b"Exif", b"xml "):
            _metadata(box, draft)


def _jp2(jp2: _Span, draft: _Draft) -> None:
    for kind, box in _boxes(jp2):
        if kind == b"ftyp" and box.peek(0, 4) == b"jpx ":
            draft.extension = "jpx"
        elif kind == b"jp2h":
            height, width = _boxes(box)[b"ihdr"].unpack(">II", 0)
            draft.note_size(width, height)
        elif kind == b"uuid":
            _metadata(box, draft)


def _j2c(j2c: _Span, draft: _Draft) -> None:
    """Note the size in a bare JPEG 2000 codestream: SIZ has the grid and what of it is shown."""
    right, bottom, left, top = j2c.unpack(">IIII", 8)
    draft.note_size(right - left, bottom - top)


def _raf(raf: _Span, draft: _Draft) -> None:
    """Note what the JPEG within Fujifilm's raw file says, which is all that is known."""
    start, length = raf.unpack(">II", 84)
    _jpeg(raf.part(start, start + length), draft)


# -- ISO base media: MP4, QuickTime, HEIF, AVIF, CR3 (ISO 14496-12, 23008-12) ------------

_BRANDS = {  # major brand, or its first characters, and the extension
    b"qt  ": "mov", b"M4A ": "m4a", b"M4B ": "m4b", b"M4P ": "m4a", b"F4A ": "m4a",
    b"F4B ": "m4a", b"M4V": "m4v", b"3g2": "3g2", b"3gp": "3gp", b"3ge": "3gp", b"3gs": "3gp",
    b"heic": "heic", b"heim": "heic", b"heis": "heic", b"hevc": "heics", b"hevx": "heics",
    b"heix": "heif", b"mif1": "heif", b"msf1": "heifs", b"mif2": "heif", b"avif": "avif",
    b"avis": "avif", b"crx ": "cr3", b"mqt ": "mov",
}  # fmt: skip
_QUICKTIME_EPOCH = -2082844800  # 1904, in Unix seconds
_ORIENTATION_OF = {  # a, b, c, d, which take (x, y), y downwards, to (ax + cy, bx + dy)
    (1, 0, 0, 1): 1, (-1, 0, 0, 1): 2, (-1, 0, 0, -1): 3, (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5, (0, 1, -1, 0): 6, (0, -1, -1, 0): 7, (0, -1, 1, 0): 8,
}  # fmt: skip
_TURNED_LEFT = (0, 8, 5, 6, 7, 4, 1, 2, 3)  # by orientation: the one a quarter turn on
_UPSIDE_DOWN, _LEFT_TO_RIGHT = (0, 4, 3, 2, 1, 8, 7, 6, 5), (0, 2, 1, 4, 3, 6, 5, 8, 7)


def _box_header(span: _Span, at: int) -> _Header:
    """Read size and kind; 1 stands for a size of 64 bits behind the kind, 0 for all there is."""
    size, kind = span.unpack(">I4s", at)
    start = at + 8
    if size == 1:
        (size,) = span.unpack(">Q", start)
        start += 8
    end = at + size if size else span.size
    return kind, start, end, end


_boxes = functools.partial(_Parts, _box_header)


def _isobmff(file: _Span, draft: _Draft) -> None:
    if draft.extension == "mp4":  # there is a brand
        brand = file.read(8, 4)
        draft.extension = _BRANDS.get(brand) or _BRANDS.get(brand[:3], "mp4")
    image = FORMATS[draft.extension].mime_type.startswith("image")
    movie, fragments, ends = _NOTHING, list[_Span](), [0.0]
    for kind, box in _boxes(file):
        if kind == b"moov":
            movie = box
            handlers = _movie(box, draft)
            if handlers & {b"vide", b"soun"} == {b"soun"} and file.read(8, 3) in (b"iso", b"das"):
                draft.extension = "m4a"  # of these brands only, as exiftool has it
        elif kind == b"meta" and image:
            _heif(file, box, draft)
        elif kind == b"uuid":
            _metadata(box, draft)
        elif kind == b"sidx":
            ends.append(_segment_index_end(box))
        elif kind == b"moof":
            indexed: list[_Span] = []
            with contextlib.suppress(*_BROKEN):
                indexed = [] if fragments else _last_fragments(file)
            fragments = indexed or [box]
            if indexed or file.source.budget[0] < MAX_PROBE_COST // 2:  # there may be thousands
                break
    if fragments:  # the movie's own length may be that of its first fragment
        known = draft.found.pop("duration", 0.0)
        ends += [_fragments_end(movie, fragment) for fragment in fragments]
        draft.note(duration=max(known, *ends))


def _movie(moov: _Span, draft: _Draft) -> set[bytes]:
    """Note what the index of a video says; return its tracks' handlers: `vide`, `soun`, ..."""
    handlers = set()
    for kind, box in _boxes(moov):
        if kind == b"mvhd":
            made, scale, units = _clock(box)
            _note_clock(6, made, draft)
            draft.note(duration=units / scale)
        elif kind == b"trak":
            handlers.add(_track(box, draft))
        elif kind == b"udta":
            for name, note in _boxes(box):  # length, language, text; but of `date` the text only
                _quicktime_note(name, note.peek(4 * (name != b"date"), MAX_NOTE_BYTES), draft)
            _metadata(_boxes(box)[b"XMP_"], draft)
            _quicktime_keys(_boxes(box)[b"meta"], draft)
        elif kind == b"meta":
            _quicktime_keys(box, draft)
        elif kind == b"uuid" and draft.extension == "cr3":
            for _, piece in _boxes(box, 16):  # EXIF in four pieces, each a TIFF
                if piece.peek(0, 4) in (b"II*\0", b"MM\0*"):
                    _tiff(piece, draft)
    return handlers


def _clock(box: _Span) -> tuple[int, int, int]:
    """Return time of making, units a second, length in units (`mvhd`, `mdhd`: 14496-12, 8.2.2)."""
    wide = box.read(0, 1) == b"\1"  # version 1 of a box has wider times than version 0
    made, _, scale, units = box.unpack(">QQIQ" if wide else ">IIII", 4)
    return made, scale, 0 if units == (1 << (64 if wide else 32)) - 1 else units


def _note_clock(rank: int, made: int, draft: _Draft) -> None:
    """Note a time since 1904; but some writers put Unix time, which would be before 1970.

    Not of an image: that tells the time of capture, and this is only when its file was made.
    """
    if not FORMATS[draft.extension].mime_type.startswith("image"):
        epoch = _QUICKTIME_EPOCH if made >= -_QUICKTIME_EPOCH else 0
        draft.note_time(rank, "container", made + epoch)


def _track(trak: _Span, draft: _Draft) -> bytes:
    boxes = _boxes(trak)
    media = _boxes(boxes[b"mdia"])
    handler = media[b"hdlr"].peek(8, 4)
    if handler == b"vide" and "width" not in draft.found:
        wide = boxes[b"tkhd"].read(0, 1) == b"\1"
        *matrix, width, height = boxes[b"tkhd"].unpack(">9iII", 52 if wide else 40)
        draft.note_size(width >> 16, height >> 16)  # 16.16 fixed point
        a, b, c, d = ((cell > 0) - (cell < 0) for cell in (*matrix[0:2], *matrix[3:5]))
        draft.note(orientation=_ORIENTATION_OF.get((a, b, c, d), 1))
    made, scale, units = _clock(media[b"mdhd"])
    for track_made in [_clock(header)[0] for header in boxes.all(b"tkhd")] + [made]:
        _note_clock(7, track_made, draft)
    draft.note(duration=units / scale)  # where the movie's is unknown
    return handler


_QUICKTIME_NOTES = {
    b"com.apple.quicktime.creationdate": "created", b"\xa9day": "created", b"date": "created",
    b"com.apple.quicktime.location.ISO6709": "place", b"\xa9xyz": "place",
    b"com.apple.quicktime.make": "make", b"\xa9mak": "make", b"com.android.manufacturer": "make",
    b"com.apple.quicktime.model": "model", b"\xa9mod": "model", b"com.android.model": "model",
}  # fmt: skip
_ISO6709 = re.compile(rb"([-+]\d\d(?:\.\d+)?)([-+]\d\d\d(?:\.\d+)?)([-+]\d+(?:\.\d+)?)?")


def _quicktime_note(name: bytes, value: bytes, draft: _Draft) -> None:
    subject = _QUICKTIME_NOTES.get(name)
    if subject == "created" and b":" in value:  # a bare year is an album's
        draft.note_written_time(4 if len(name) == 4 else 3, "container", value)
    elif subject == "place" and (match := _ISO6709.match(value)):
        draft.note(latitude=float(match[1]), longitude=float(match[2]))
        draft.note(altitude=float(match[3] or "nan"))
    elif subject in ("make", "model"):
        draft.note_name(subject, value)


def _quicktime_keys(meta: _Span, draft: _Draft) -> None:
    """Note values in `ilst` by four letters, or by a number in `keys` (QuickTime, Metadata)."""
    bare = meta.peek(4, 4) == b"hdlr"  # ISO's has a version before it, Apple's not
    boxes = _boxes(meta if bare else meta.part(4))
    # each key has the form of a box, with its namespace as the name
    names = [key.peek(0, MAX_NOTE_BYTES) for _, key in _boxes(boxes[b"keys"], 8)]
    for label, item in _boxes(boxes[b"ilst"]):
        value = _boxes(item)[b"data"].peek(8, MAX_NOTE_BYTES)
        number = int.from_bytes(label, "big")
        name = names[number - 1] if 0 < number <= len(names) else label
        _quicktime_note(name, value, draft)


def _fragments_end(moov: _Span, moof: _Span) -> float:
    """Return when the longest track of the last fragment ends (ISO 14496-12, section 8.8)."""
    scales = {}
    for track in map(_boxes, _boxes(moov).all(b"trak")):
        (number,) = track[b"tkhd"].unpack(">I", 20 if track[b"tkhd"].read(0, 1) == b"\1" else 12)
        _, scales[number], _ = _clock(_boxes(track[b"mdia"])[b"mdhd"])
    extends = [trex.unpack(">III", 4) for trex in _boxes(_boxes(moov)[b"mvex"]).all(b"trex")]
    usual = {number: units for number, _, units in extends}  # of a sample that does not say
    ends = [0.0]
    for track in map(_boxes, _boxes(moof).all(b"traf")):
        header, start = track[b"tfhd"], track[b"tfdt"].part(4).number()
        flags, number = header.unpack(">II", 0)
        units = usual.get(number, 0)
        if flags & 8:  # after an optional offset and an optional description index
            (units,) = header.unpack(">I", 8 + 8 * (flags & 1) + 2 * (flags & 2))
        units = start + sum(_run_units(run, units) for run in track.all(b"trun"))
        ends.append(units / scales[number])
    return max(ends)


def _last_fragments(file: _Span) -> list[_Span]:
    """Find each track's last `moof` by the index at the file's end (ISO 14496-12, 8.8.9 to 11)."""
    kind, size = file.unpack(">4s4xI", file.size - 12)
    index = _boxes(file.part(file.size - size))[b"mfra"] if kind == b"mfro" else _NOTHING
    starts = set()
    for table in _boxes(index).all(b"tfra"):
        sizes, count = table.unpack(">II", 8)
        wide = 8 if table.read(0, 1) == b"\1" else 4
        entry = 2 * wide + sum((sizes >> shift & 3) + 1 for shift in (0, 2, 4))
        if count:
            starts.add(table.part(16 + entry * (count - 1) + wide).read_uint(wide))
    if not starts:  # no index, but the last fragment may be short
        before = max(0, file.size - STREAM_SAMPLE_BYTES)
        start = before + file.peek(before, STREAM_SAMPLE_BYTES).rfind(b"moof") - 4
        label, _, _, after = _box_header(file, start)
        _, _, _, end = _box_header(file, after)
        starts = {start} if label == b"moof" and end == file.size else starts
    boxes = (next(iter(_boxes(file, start)), (b"", _NOTHING)) for start in starts)
    return [box for kind, box in boxes if kind == b"moof"]


def _segment_index_end(sidx: _Span) -> float:
    """Find when the segments that an index names end, in seconds (ISO 14496-12, 8.16.3)."""
    wide = sidx.read(0, 1) == b"\1"
    scale, start = sidx.unpack(">IQ" if wide else ">II", 8)
    entries = 28 if wide else 20
    (count,) = sidx.unpack(">H", entries + 2)
    segments = struct.iter_unpack(">4xI4x", sidx.read(entries + 4, 12 * count))
    return float((start + sum(units for (units,) in segments)) / scale)


def _run_units(trun: _Span, usual: int) -> int:
    """Return the length of a run of samples: each says its own or all have the usual one."""
    flags, count = trun.unpack(">II", 0)
    if not flags & 0x100:
        return int(count * usual)
    start = 8 + 4 * (flags & 1) + (flags & 4)
    width = (flags >> 8 & 15).bit_count()  # numbers a sample, of which the first one is wanted
    samples = struct.iter_unpack(f">I{4 * width - 4}x", trun.read(start, 4 * width * count))
    return sum(units for (units,) in samples)


def _heif(file: _Span, meta: _Span, draft: _Draft) -> None:
    """Note the primary item's size and turns from its properties; EXIF from the Exif item."""
    boxes = _boxes(meta, 4)
    primary = boxes[b"pitm"].part(4).number()
    properties = _boxes(boxes[b"iprp"])
    shared = [*_boxes(properties[b"ipco"])]
    orientation = 1
    for link in _heif_links(properties[b"ipma"], primary):
        kind, box = shared[link - 1]
        if kind == b"ispe":
            draft.note_size(*box.unpack(">II", 4))
        elif kind == b"irot":
            for _ in range(box.number() & 3):
                orientation = _TURNED_LEFT[orientation]
        elif kind == b"imir":
            orientation = (_UPSIDE_DOWN, _LEFT_TO_RIGHT)[box.number() & 1][orientation]
    # Turns are properties here; what EXIF says of them is only a memory (23008-12, A.2.4).
    draft.note(orientation=orientation)
    wanted = [item for item, kind in _heif_kinds(boxes[b"iinf"]) if kind in (b"Exif", b"mime")]
    for item, extents in _heif_extents(file, boxes) if wanted else ():
        if item in wanted and extents:
            _metadata(extents[0], draft)


def _heif_kinds(iinf: _Span) -> Iterator[tuple[int, bytes]]:
    """Yield number and type of each item (ISO 14496-12, 8.11.6)."""
    for _, entry in _boxes(iinf, 6 if iinf.read(0, 1) == b"\0" else 8):
        yield entry.unpack(">I2x4s" if entry.read(0, 1) >= b"\3" else ">H2x4s", 4)


def _heif_links(ipma: _Span, item: int) -> list[int]:
    """Return the numbers, from 1 on, of an item's properties (ISO 23008-12, section 9.3)."""
    version, flags = ipma.unpack(">B2xB", 0)
    table, wide = ipma.part(4), flags & 1
    for _ in range(table.read_uint(4)):
        number = table.read_uint(4 if version else 2)
        links = [table.read_uint(1 + wide) for _ in range(table.read_uint(1))]
        if number == item:
            return [link & (0x7FFF if wide else 0x7F) for link in links]  # without "essential"
    return []


def _heif_extents(file: _Span, boxes: _Parts) -> Iterator[tuple[int, list[_Span]]]:
    """Yield each item's number and where its bytes are (`iloc`, ISO 14496-12, 8.11.3)."""
    iloc = boxes[b"iloc"]
    version, sizes = iloc.unpack(">B3xH", 0)
    offset_size, length_size, base_size, index_size = (sizes >> s & 15 for s in (12, 8, 4, 0))
    fields_of_extent = (index_size if version else 0, offset_size, length_size)
    table, wide = iloc.part(6), 4 if version == 2 else 2
    for _ in range(table.read_uint(wide)):
        number, method = table.read_uint(wide), table.read_uint(2 if version else 0) & 15
        _, base, count = table.read_uint(2), table.read_uint(base_size), table.read_uint(2)
        source = (file, boxes[b"idat"], _NOTHING)[min(method, 2)]  # 2: in another item
        extents = []
        for _ in range(count):
            _, start, length = (table.read_uint(size) for size in fields_of_extent)
            extents.append(source.part(base + start, base + start + length))
        yield number, extents


# -- Matroska and WebM (RFC 8794, RFC 9559) ----------------------------------------------

_EBML, _DOC_TYPE, _SEGMENT, _CLUSTER, _SEEK_HEAD, _SEEK_ID, _SEEK_POSITION = map(bytes.fromhex, (
    "1A45DFA3", "4282", "18538067", "1F43B675", "114D9B74", "53AB", "53AC"))  # fmt: skip
_INFO, _TIMESTAMP_SCALE, _DURATION, _DATE_UTC = map(bytes.fromhex, (
    "1549A966", "2AD7B1", "4489", "4461"))  # fmt: skip
_TRACKS, _TRACK_ENTRY, _TRACK_TYPE, _VIDEO, _PIXEL_WIDTH, _PIXEL_HEIGHT = map(bytes.fromhex, (
    "1654AE6B", "AE", "83", "E0", "B0", "BA"))  # fmt: skip
_TAGS, _TAG, _SIMPLE_TAG, _TAG_NAME, _TAG_STRING = map(bytes.fromhex, (
    "1254C367", "7373", "67C8", "45A3", "4487"))  # fmt: skip
_MATROSKA_EPOCH = 978307200  # 2001, in Unix seconds


def _element_header(span: _Span, at: int) -> _Header:
    """Read id and size, each as long as the zero bits it starts with say (RFC 8794, section 4)."""
    label = span.read(at, 9 - span.read(at, 1)[0].bit_length())
    if label == _CLUSTER:  # audio and video from here on
        raise EOFError
    at += len(label)
    raw = span.read(at, 9 - span.read(at, 1)[0].bit_length())
    start, unknown = at + len(raw), (1 << 7 * len(raw)) - 1
    size = int.from_bytes(raw, "big") & unknown
    end = span.size if size == unknown else start + size
    return label, start, end, end


_elements = functools.partial(_Parts, _element_header)


def _matroska(file: _Span, draft: _Draft) -> None:
    top = _elements(file)
    webm = _elements(top[_EBML])[_DOC_TYPE].peek(0, 4) == b"webm"
    draft.extension = "webm" if webm else "mkv"
    tracks = [_elements(track) for track in _elements(_master(top, _TRACKS)).all(_TRACK_ENTRY)]
    for track in tracks:
        video = _elements(track[_VIDEO])
        draft.note_size(video[_PIXEL_WIDTH].number(), video[_PIXEL_HEIGHT].number())
    if tracks and all(track[_TRACK_TYPE].number() != 1 for track in tracks):
        draft.extension, draft.mime_type = ("webm", "audio/webm") if webm else ("mka", None)
    for tag in map(_elements, _elements(_master(top, _TAGS)).all(_TAG)):
        for simple in map(_elements, tag.all(_SIMPLE_TAG)):
            if simple[_TAG_NAME].peek(0, 16) == b"DATE_RECORDED":
                value = simple[_TAG_STRING].peek(0, MAX_NOTE_BYTES)
                draft.note_written_time(5, "container", value)
    info = _elements(_master(top, _INFO))
    if made := info[_DATE_UTC].peek(0, 8):
        nanoseconds = int.from_bytes(made, "big", signed=True)
        draft.note_time(6, "container", _MATROSKA_EPOCH + nanoseconds / 1e9)
    length = info[_DURATION]
    (units,) = length.unpack(">d" if length.size == 8 else ">f", 0)
    draft.note(duration=units * (info[_TIMESTAMP_SCALE].number() or 1_000_000) / 1e9)


def _master(top: _Parts, label: bytes) -> _Span:
    """Return an element of the segment, which is before the clusters or in the seek head."""
    segment = top[_SEGMENT]
    for _, seek in _elements(_elements(segment)[_SEEK_HEAD]):
        entry = _elements(seek)
        if entry[_SEEK_ID].peek(0, 4) == label:
            segment = segment.part(entry[_SEEK_POSITION].number())
    return _elements(segment)[label]


# -- RIFF and IFF: WebP, AVI, WAV, AIFF --------------------------------------------------

_chunks = _labelled("<4sI", align=2)
_iff_chunks = _labelled(">4sI", align=2)


def _webp(webp: _Span, draft: _Draft) -> None:
    """Note the canvas of VP8X, else the frame header's size (RFC 9649)."""
    milliseconds = 0
    for kind, chunk in _chunks(webp, 12):
        if kind == b"VP8X":
            width, width_high, height, height_high = chunk.unpack("<HBHB", 4)
            draft.note_size(1 + width + (width_high << 16), 1 + height + (height_high << 16))
        elif kind == b"VP8 ":
            width, height = chunk.unpack("<HH", 6)
            draft.note_size(width & 0x3FFF, height & 0x3FFF)
        elif kind == b"VP8L":
            (bits,) = chunk.unpack("<I", 1)
            draft.note_size(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
        elif kind == b"ANMF":
            milliseconds += chunk.unpack("<I", 12)[0] & 0xFFFFFF
        elif kind in (b"EXIF", b"XMP "):
            _metadata(chunk, draft)
    draft.note(duration=milliseconds / 1000)


def _avi(avi: _Span, draft: _Draft) -> None:
    """Note size by `avih`, length by the first video stream's `strh`, time by IDIT."""
    frame_time = frames = 0
    for kind, chunk in _chunks(_chunks(avi, 12)[b"LIST"], 4):  # `hdrl` is the first
        if kind == b"avih":
            frame_time, frames, width, height = chunk.unpack("<I12xI12xII", 0)
            draft.note_size(width, height)
        elif kind == b"LIST" and chunk.peek(12, 4) == b"vids":
            scale, rate, _, length = chunk.unpack("<IIII", 32)
            draft.note(duration=length * scale / rate)
        elif kind == b"IDIT":
            draft.note_written_time(6, "container", chunk.peek(0, MAX_NOTE_BYTES))
    draft.note(duration=frame_time * frames / 1e6)
    _metadata(_chunks(avi, 12)[b"_PMX"], draft)  # XMP, by its letters from the back


def _wav(wav: _Span, draft: _Draft) -> None:
    """Note the length: bytes over bytes a second, or samples over their rate where these are told.

    In RF64 the real length is in `ds64` (EBU Tech 3306).
    """
    packed, rate, samples, samples_rate, real_length = False, 0, 0, 0, 0
    for kind, chunk in _chunks(wav, 12):
        if kind == b"fmt ":
            packed = chunk.unpack("<H", 0)[0] not in (1, 3, 0xFFFE)  # PCM, floats, either
            samples_rate, rate = chunk.unpack("<II", 4)
        elif kind == b"fact":
            (samples,) = chunk.unpack("<I", 0)
        elif kind == b"ds64":
            (real_length,) = chunk.unpack("<Q", 8)
        elif kind == b"bext":
            day, clock = chunk.unpack("10s8s", 320)
            draft.note_written_time(6, "container", day + b" " + clock)
        elif kind == b"_PMX":
            _metadata(chunk, draft)
        elif kind == b"data" and packed and samples:
            draft.note(duration=samples / samples_rate)
        elif kind == b"data":
            draft.note(duration=min(real_length or chunk.size, wav.size) / rate)


def _aiff(aiff: _Span, draft: _Draft) -> None:
    """Note frames over the rate, which is an 80-bit float (Audio Interchange File Format 1.3)."""
    common = _iff_chunks(aiff, 12)[b"COMM"]
    frames, exponent, mantissa = common.unpack(">I2xHQ", 2)
    draft.note(duration=frames / math.ldexp(mantissa, exponent - 16383 - 63))


# -- Ogg (RFC 3533) ----------------------------------------------------------------------

_OGG_PAGE = re.compile(rb"(?s)OggS\0(.)(.{8})(.{4}).{8}(.)")  # flags, granules, stream, segments


class _OggPage(NamedTuple):
    stream: bytes
    is_first: bool  # of its stream
    is_last: bool
    granules: int  # played at its end; -1 where no packet ends
    packets: int  # that end in it
    data: bytes


class _OggStream(NamedTuple):
    """How a stream counts time."""

    rate: float  # granules a second
    packet: int  # granules of a packet at most; 0 for Opus, whose packets say it
    skipped: int = 0  # granules before the first that is heard
    shift: int = 0  # bits of the second part of a granule position, which are to be added


def _ogg(ogg: _Span, draft: _Draft) -> None:
    """Note codecs and beginnings from the first pages, the ends from the last whole ones."""
    streams, starts, ends = dict[bytes, _OggStream | None](), dict[bytes, float](), [0.0]
    head = ogg.peek(0, STREAM_SAMPLE_BYTES)
    tail = ogg.part(ogg.size - STREAM_SAMPLE_BYTES).peek(0, STREAM_SAMPLE_BYTES)
    for page in _ogg_pages(head):
        stream = streams.get(page.stream)
        if page.is_first:
            streams[page.stream] = _ogg_stream(page.data.ljust(80, b"\0"), draft)
        elif stream and page.granules > 0 and page.stream not in starts:
            longest = page.packets * (stream.packet or _opus_packet(page.data)) / stream.rate
            start = 0.0 if page.is_last else _ogg_time(stream, page) - longest
            starts[page.stream] = max(0.0, start)
    for page in _ogg_pages(tail):
        if (stream := streams.get(page.stream)) and page.granules > 0:
            ends.append(_ogg_time(stream, page))
    draft.note(duration=max(ends) - min(starts.values(), default=0.0))


def _ogg_pages(data: bytes) -> Iterator[_OggPage]:
    for match in _OGG_PAGE.finditer(data):
        flags, granules, stream, segments = match.groups()
        sizes = data[match.end() : match.end() + segments[0]]
        start = match.end() + segments[0]
        end = start + sum(sizes)
        if end <= len(data):
            first, last = bool(flags[0] & 2), bool(flags[0] & 4)
            position = int.from_bytes(granules, "little", signed=True)
            packets = len(sizes) - sizes.count(255)
            yield _OggPage(stream, first, last, position, packets, data[start:end])


def _ogg_time(stream: _OggStream, page: _OggPage) -> float:
    """Return seconds from a stream's zero to the end of a page."""
    second = page.granules & (1 << stream.shift) - 1
    return ((page.granules >> stream.shift) + second - stream.skipped) / stream.rate


def _ogg_stream(head: bytes, draft: _Draft) -> _OggStream | None:
    """Read a stream's first packet; `None` for one without a known clock."""
    if head.startswith(b"\1vorbis"):
        return _OggStream(struct.unpack_from("<I", head, 12)[0], 1 << (head[28] >> 4) >> 1)
    if head.startswith(b"OpusHead"):
        draft.extension = "opus" if draft.extension == "ogg" else draft.extension
        return _OggStream(48000, 0, struct.unpack_from("<H", head, 10)[0])
    if head.startswith(b"Speex   "):
        rate, frame, _, frames = struct.unpack_from("<I16xIII", head, 36)
        return _OggStream(rate, frame * frames)
    if head.startswith(b"\x7fFLAC"):
        return _OggStream(int.from_bytes(head[27:30], "big") >> 4, head[19] << 8 | head[20])
    if head.startswith(b"\x80theora"):
        draft.extension = "ogv"
        size = int.from_bytes(head[14:20], "big")
        draft.note_size(size >> 24, size & 0xFFFFFF)
        frames, seconds = struct.unpack_from(">II", head, 22)
        return _OggStream(frames / seconds, 1, 0, int.from_bytes(head[40:42], "big") >> 5 & 31)
    return None


def _opus_packet(packet: bytes) -> int:
    """Return the samples of an Opus packet at 48 kHz (RFC 6716, section 3.1)."""
    mode, code = packet[0] >> 3, packet[0] & 3
    if mode < 12:
        frame = (480, 960, 1920, 2880)[mode & 3]
    else:
        frame = 480 << (mode & 1) if mode < 16 else 120 << (mode & 3)
    return frame * (packet[1] & 63 if code == 3 else (code + 3) // 2)


# -- Audio: FLAC, and MPEG audio (MP3, AAC) with ID3 tags before it ----------------------


def _flac(flac: _Span, draft: _Draft) -> None:
    """Note the length: STREAMINFO has 20 bits of rate, 36 of samples (RFC 9639, section 8.2)."""
    (bits,) = flac.unpack(">Q", 18)
    draft.note(duration=(bits & (1 << 36) - 1) / (bits >> 44))


class _Frame(NamedTuple):
    """A frame of MPEG audio."""

    extension: str
    length: int  # bytes
    samples: int
    rate: int  # samples a second
    kind: int  # the header bits that all frames of a stream share


_MPEG1_LAYER3_KBITS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MPEG1_LAYER2_KBITS = (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384)
_MPEG2_KBITS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_FRAME_COUNT = re.compile(rb"(?s)(?:Xing|Info)\0\0\0[\1\3\5\7\t\x0b\r\x0f](.{4})|VBRI.{10}(.{4})")
_ADTS_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025,
               8000, 7350)  # fmt: skip


def _frame(data: bytes, at: int) -> _Frame | None:
    """Return an MPEG audio header, layers II and III (ISO 11172-3, section 2.4.1.3)."""
    header = int.from_bytes(data[at : at + 4], "big")
    version, layer = header >> 19 & 3, 4 - (header >> 17 & 3)
    bitrate, rate = header >> 12 & 15, header >> 10 & 3
    if layer == 4:
        return _adts_frame(data[at : at + 7])
    if header >> 21 != 0x7FF or version == 1 or layer == 1 or bitrate in (0, 15) or rate == 3:
        return None
    mpeg1 = version == 3
    rates = (_MPEG1_LAYER2_KBITS if layer == 2 else _MPEG1_LAYER3_KBITS) if mpeg1 else _MPEG2_KBITS
    hertz = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    samples = 1152 if mpeg1 or layer == 2 else 576
    length = samples // 8 * rates[bitrate - 1] * 1000 // hertz + (header >> 9 & 1)
    return _Frame("mp3", length, samples, hertz, header & 0xFFFE0C00)


def _adts_frame(head: bytes) -> _Frame | None:
    """Return an ADTS header of AAC (ISO 14496-3, section 1.A.2.2)."""
    header = int.from_bytes(head.ljust(7, b"\0"), "big")
    length, rate = header >> 13 & 0x1FFF, header >> 34 & 15
    if header >> 44 != 0xFFF or rate >= len(_ADTS_RATES) or length < 7:
        return None
    return _Frame("aac", length, 1024, _ADTS_RATES[rate], header >> 34)


def _first_frame(data: bytes, audio: _Span | None = None) -> tuple[int, _Frame] | None:
    """Return the first frame that another of its kind follows: one alone may be an accident."""
    for match in re.finditer(rb"\xff(?=[\xe0-\xff])", data[:MAX_SYNC_BYTES]):
        if audio:
            audio.charge(4 * STEP_COST)
        frame = _frame(data, match.start())
        after = frame and _frame(data, match.start() + frame.length)
        if frame and after and after.kind == frame.kind:
            return match.start(), frame
    return None


def _mpeg_audio(file: _Span, draft: _Draft) -> None:
    """Note the length by the count of a Xing or VBRI tag, else by the mean size of some frames."""
    audio = _behind_id3(file)
    if audio.peek(0, 4) == b"fLaC":
        draft.extension = "flac"
        return _flac(audio, draft)
    padding = audio.peek(0, STREAM_SAMPLE_BYTES)
    audio = audio.part(len(padding) - len(padding.lstrip(b"\0")))
    data = audio.peek(0, STREAM_SAMPLE_BYTES)
    if not (found := _first_frame(data, audio)):
        return
    at, frame = found
    draft.extension = frame.extension
    counted = _FRAME_COUNT.search(data[at : at + frame.length])
    frames: float = int.from_bytes(counted[1] or counted[2], "big") if counted else 0
    if not frames:
        frames = _count_frames(audio.part(at, audio.size - _tags_behind(file)))
    draft.note(duration=frames * frame.samples / frame.rate)


def _count_frames(audio: _Span) -> float:
    """Count all frames, or those of FRAME_SAMPLES stretches and infer the others."""
    walked = count = 0
    step = max(FRAME_SAMPLE_BYTES, audio.size // FRAME_SAMPLES)
    with contextlib.suppress(EOFError):  # the budget is spent: what was counted until then
        for start in range((step - FRAME_SAMPLE_BYTES) // 2, audio.size, step):
            data = audio.peek(start, FRAME_SAMPLE_BYTES)
            found = _first_frame(data, audio)
            at = found[0] if found else len(data)
            while frame := _frame(data, at):
                audio.charge(4 * STEP_COST)
                at, count, walked = at + frame.length, count + 1, walked + frame.length
    return audio.size * count / walked


def _tags_behind(file: _Span) -> int:
    """Return the bytes that an ID3v1 tag, and an APEv2 or ID3v2 one before it, take at the end."""
    size = 128 if file.part(file.size - 128).peek(0, 3) == b"TAG" else 0
    footer = file.part(file.size - size - 10, file.size - size).peek(0, 10)
    if footer[:3] == b"3DI":  # ID3v2.4, section 3.4: a tag with a footer has a header as well
        return size + 20 + _id3_size(footer)
    footer = file.part(file.size - size - 32, file.size - size).peek(0, 32)
    if footer[:8] == b"APETAGEX":
        length, _, flags = struct.unpack_from("<III", footer, 12)
        size += length + (32 if flags >> 31 else 0)
    return size


def _behind_id3(file: _Span) -> _Span:
    """Return what ID3v2 tags leave (ID3v2.4 section 3.1)."""
    while file.peek(0, 3) == b"ID3":
        header = file.read(0, 10)
        file = file.part(10 + _id3_size(header) + (10 if header[5] & 0x10 else 0))
    return file


def _id3_size(header: bytes) -> int:
    """Return the size in a tag's header or footer, of which each byte has 7 bits."""
    a, b, c, d = header[6:10]
    return a << 21 | b << 14 | c << 7 | d


_AMR_FRAMES = (13, 14, 16, 18, 20, 21, 27, 32, 6) + 7 * (1,)  # bytes, by the frame's type
_AMR_WIDE_FRAMES = (18, 24, 33, 37, 41, 47, 51, 59, 61, 6) + 6 * (1,)


def _amr(amr: _Span, draft: _Draft) -> None:
    """Note the length: frames of 20 ms, each as long as its type says (RFC 4867, section 5)."""
    wide = amr.read(5, 1) == b"-"
    audio, sizes = amr.part(9 if wide else 6), _AMR_WIDE_FRAMES if wide else _AMR_FRAMES
    data, at, count = audio.peek(0, STREAM_SAMPLE_BYTES), 0, 0
    while at < len(data):
        at, count = at + sizes[data[at] >> 3 & 15], count + 1
    draft.note(duration=audio.size / at * count / 50)


# -- MPEG program and transport streams (ISO 13818-1), MPEG-2, H.264, HEVC ---------------

_PES_TIME = re.compile(  # stream, packet's length, a PTS of 5 bytes as MPEG-2 or MPEG-1 puts it
    rb"\0\0\x01([\xbd\xc0-\xef])(..)(?:[\x80-\xbf][\x80-\xff].([\x21-\x3f].{4})"
    rb"|\xff{0,16}(?:[\x40-\x7f].)?([\x21-\x3f].{4}))",
    re.DOTALL,
)
_VIDEO_START = re.compile(rb"\0\0\x01(?:(\xb3)|[\x27\x47\x67]|(\x42\x01))")  # MPEG-2, H.264, HEVC
_AVCHD_NOTES = bytes.fromhex("17EE8C60F84D11D98CD60800200C9A66") + b"MDPM"
_AVCHD_TIME = re.compile(rb"(?s)\x18(.)(..)(.)\x19(.)(.)(.)(.)")  # zone, BCD year to second
_TS_PACKET = 188


def _mpeg_ps(file: _Span, draft: _Draft) -> None:
    head, tail = (
        file.part(at).peek(0, MAX_BLOCK_BYTES) for at in (0, file.size - MAX_BLOCK_BYTES)
    )
    _mpeg_streams(head, tail, draft)


def _mpeg_ts(file: _Span, draft: _Draft) -> None:
    size = _TS_PACKET + 4 * (draft.extension == "m2ts")  # a time code before each packet
    length = MAX_BLOCK_BYTES // size * size
    last = max(0, file.size - length) // size * size
    head, tail = (_ts_payload(file, start, length, size) for start in (0, last))
    _mpeg_streams(head, tail, draft)


def _ts_payload(file: _Span, start: int, length: int, size: int) -> bytes:
    """Return the payload of a stretch of whole packets, stream after stream (section 2.4.3)."""
    data = file.peek(start, length)
    file.charge(STEP_COST * len(data) // size)
    streams: dict[int, bytearray] = {}
    for at in range(size - _TS_PACKET, len(data) - _TS_PACKET + 1, size):
        flags, skipped = data[at + 3], 1 + data[at + 4]
        if data[at] == 0x47 and flags & 0x10:
            payload = data[at + 4 + (skipped if flags & 0x20 else 0) : at + _TS_PACKET]
            number = int.from_bytes(data[at + 1 : at + 3], "big") & 0x1FFF
            streams.setdefault(number, bytearray()).extend(payload)
    return b"\0\0\1".join(streams.values())


def _mpeg_streams(head: bytes, tail: bytes, draft: _Draft) -> None:
    """Note size and date from the start, the length from the times at both ends."""
    if start := _VIDEO_START.search(head):
        _mpeg_video(start, head[start.end() : start.end() + 256], draft)
    _avchd_time(head, draft)
    times = [_pes_times(data) for data in (head, tail)]
    starts = [min(clocks) for clocks in times[0].values()]
    videos = {stream for stream in times[1] if stream >= b"\xe0"}
    ends = [  # a packet of audio has many frames, so its gap says nothing where video does
        max(clocks) + (_frame_gap(clocks) if stream in videos or not videos else 0)
        for stream, clocks in times[1].items()
    ]
    draft.note(duration=((max(ends) - min(starts)) % (1 << 33)) / 90_000)


def _pes_times(data: bytes) -> dict[bytes, list[int]]:
    """Return presentation times in units of 1/90,000 s, by stream."""
    times: dict[bytes, list[int]] = {}
    for match in _PES_TIME.finditer(data):
        stream, length, new, old = match.groups()
        end = match.start() + 6 + int.from_bytes(length, "big")
        if any(length) and data[end : end + 3] not in (b"\0\0\1", b""):  # chance, in a payload
            continue
        a, b, c = struct.unpack(">BHH", new or old)
        times.setdefault(stream, []).append((a >> 1 & 7) << 30 | b >> 1 << 15 | c >> 1)
    return times


def _frame_gap(clocks: list[int]) -> int:
    """Return how long the last frame stays: as long as the shortest one before it."""
    clocks = sorted(clocks)
    return min((b - a for a, b in itertools.pairwise(clocks) if b > a), default=0)


def _mpeg_video(start: re.Match[bytes], data: bytes, draft: _Draft) -> None:
    """Note size from MPEG-2's sequence header, or H.264's or HEVC's sequence parameter set."""
    mpeg2, hevc = start.groups()
    if mpeg2:
        sides = int.from_bytes(data[:3], "big")
        return draft.note_size(sides >> 12, sides & 0xFFF)
    read_size = _hevc_size if hevc else _h264_size
    draft.note_size(*read_size(data.replace(b"\0\0\3", b"\0\0")))


class _Bits:
    """Bits from the highest on, as H.264 writes them (section 7.2)."""

    def __init__(self, data: bytes) -> None:
        self._left, self._bits = 8 * len(data), int.from_bytes(data, "big")

    def read_uint(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise EOFError
        return self._bits >> self._left & (1 << count) - 1

    def golomb(self) -> int:
        """Return an Exp-Golomb number (section 9.1)."""
        zeros = 0
        while not self.read_uint(1):
            zeros += 1
        return (1 << zeros) - 1 + self.read_uint(zeros)

    def signed(self) -> int:
        number = self.golomb()
        return number // 2 + 1 if number & 1 else -(number // 2)


def _h264_size(data: bytes) -> tuple[int, int]:
    """Return width and height of a sequence parameter set (H.264, section 7.3.2.1.1)."""
    profile, bits = data[0], _Bits(data[3:])
    bits.golomb()
    chroma, separate = 1, 0
    if profile in (100, 110, 122, 244, 44, 83, 86, 118, 128):
        chroma = bits.golomb()
        separate = bits.read_uint(1) if chroma == 3 else 0
        bits.golomb(), bits.golomb(), bits.read_uint(1)
        if bits.read_uint(1):
            for i in range(12 if chroma == 3 else 8):
                _skip_scaling_list(bits, 16 if i < 6 else 64)
    bits.golomb()
    order = bits.golomb()
    if order == 0:
        bits.golomb()
    elif order == 1:
        bits.read_uint(1), bits.golomb(), bits.golomb()
        for _ in range(bits.golomb() & 0xFF):
            bits.golomb()
    bits.golomb(), bits.read_uint(1)
    width, height = 16 * (1 + bits.golomb()), 1 + bits.golomb()
    frames = bits.read_uint(1)
    if not frames:
        bits.read_uint(1)
    bits.read_uint(1)
    across, down = _crop(bits, 0 if separate else chroma)
    return width - across, (16 * height - down) * (2 - frames)


def _hevc_size(data: bytes) -> tuple[int, int]:
    """Return width and height of a sequence parameter set (H.265, section 7.3.2.2.1)."""
    bits = _Bits(data)
    bits.read_uint(4)
    layers = bits.read_uint(3)
    bits.read_uint(1 + 96)
    present = [(bits.read_uint(1), bits.read_uint(1)) for _ in range(layers)]
    bits.read_uint(2 * (8 - layers) if layers else 0)
    for profile, level in present:
        bits.read_uint(88 * profile + 8 * level)
    bits.golomb()
    chroma = bits.golomb()
    separate = bits.read_uint(1) if chroma == 3 else 0
    width, height = bits.golomb(), bits.golomb()
    across, down = _crop(bits, 0 if separate else chroma)
    return width - across, height - down


def _crop(bits: _Bits, chroma: int) -> tuple[int, int]:
    """Return width and height of what is not shown; it counts in the coarser chroma samples."""
    left, right, top, bottom = (bits.golomb() for _ in range(4)) if bits.read_uint(1) else [0] * 4
    return (left + right) * (1 + (chroma in (1, 2))), (top + bottom) * (1 + (chroma == 1))


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size * bits.read_uint(1)):
        if following:
            following = (last + bits.signed()) % 256
        last = following or last


def _avchd_time(head: bytes, draft: _Draft) -> None:
    """Note the time of a camcorder's recording in a user message of H.264 (AVCHD, MDPM)."""
    _, found, notes = head.replace(b"\0\0\3", b"\0\0").partition(_AVCHD_NOTES)
    if found and (match := _AVCHD_TIME.search(notes[:MAX_NOTE_BYTES])):
        zone = match[1][0]
        offset = b"%b%02d:%02d" % (b"-" if zone & 32 else b"+", zone >> 1 & 15, zone % 2 * 30)
        parts = (part.hex().encode() for part in match.groups()[1:])
        draft.note_written_time(5, "container", b"%b-%b-%b %b:%b:%b" % (*parts,), offset)


# -- ASF and Flash video -----------------------------------------------------------------

_ASF = bytes.fromhex("3026B2758E66CF11A6D900AA0062CE6C")
_ASF_FILE = bytes.fromhex("A1DCAB8C47A9CF118EE400C00C205365")
_ASF_STREAM = bytes.fromhex("9107DCB7B7A9CF118EE600C00C205365")
_ASF_VIDEO = bytes.fromhex("C0EF19BC4D5BCF11A8FD00805F5C442B")
_ASF_EPOCH = -11_644_473_600  # 1601, in Unix seconds
_objects = _labelled("<16sQ", whole=True)  # by their GUID (ASF specification 1.20, section 2.1)


def _asf(asf: _Span, draft: _Draft) -> None:
    """Note the header object's parts: a file with a video stream is WMV, else WMA."""
    for name, part in _objects(_objects(asf)[_ASF], 6):
        if name == _ASF_FILE:
            made, units, preroll = part.unpack("<Q8xQ8xQ", 24)
            draft.note_time(6, "container", made / 1e7 + _ASF_EPOCH)
            draft.note(duration=units / 1e7 - preroll / 1e3)
        elif name == _ASF_STREAM and part.peek(0, 16) == _ASF_VIDEO:
            draft.extension = "wmv"
            draft.note_size(*part.unpack("<II", 54))


_FLV_NUMBER = re.compile(rb"(?s)\0[\x05\x06\x08](width|height|duration)\0(.{8})")
_FLV_DATE = re.compile(rb"(?s)\0\x0ccreationdate\x02\0.(.{10,40})")


def _flv(flv: _Span, draft: _Draft) -> None:
    """Note numbers of `onMetaData`, a tag near the start, else the time of the last tag."""
    notes = flv.peek(0, STREAM_SAMPLE_BYTES)
    found = {
        name.decode(): struct.unpack(">d", raw)[0] for name, raw in _FLV_NUMBER.findall(notes)
    }
    for date in _FLV_DATE.findall(notes)[:1]:
        draft.note_written_time(6, "container", date)
    if {"width", "height"} <= found.keys():
        draft.note_size(int(found["width"]), int(found["height"]))
    draft.note(duration=found.get("duration", 0.0))
    (size,) = flv.unpack(">I", flv.size - 4)
    low, high = flv.unpack(">3sB", flv.size - size)  # 4 bytes into the tag before that number
    draft.note(duration=(high << 24 | int.from_bytes(low, "big")) / 1000)


# -- Media without what they say of their making -----------------------------------------
# What shows a picture or a video stays as it is and where it is, its colours and how it stands
# too. Everything else, known here or not, is overwritten with zeros as it is sent, so that ranges
# of it can be read; what follows the end of a picture is left out.

STRIP_BLOCK = 1 << 16
PNG_SHOWN = frozenset(
    b"IHDR PLTE IDAT IEND tRNS cHRM gAMA iCCP sBIT sRGB cICP mDCV cLLI bKGD hIST pHYs acTL fcTL"
    b" fdAT".split()
)
JPEG_SHOWN = {b"\xe2": b"ICC_PROFILE\0", b"\xee": b"Adobe"}  # by marker: which colours
WEBP_SHOWN = frozenset({b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ICCP"})
WEBP_EXIF, WEBP_XMP = 8, 4  # flags of VP8X
MAX_PATCHING_COST = 32 << 20  # bytes and READ_COSTs of a file's tables
MAX_PATCHING_STEPS = 10**6  # through boxes and chunks, also where there is no box
MAX_PATCHING_CHUNKS = 300_000  # of all tracks: 40 MB of memory
_ZEROS = memoryview(bytes(STRIP_BLOCK))
_JPEG_MARKER_START = re.compile(rb"\xff(?=[^\0\xff\xd0-\xd7])")  # as T.81 has it in B.1.1.2


class Patch(NamedTuple):
    """A stretch of a file that is sent as `content`, and zeros behind it."""

    start: int
    end: int
    content: bytes = b""

    def cut(self, start: int, end: int) -> Iterator[bytes | memoryview]:
        """Yield what is sent for the part between two positions in the file."""
        content = self.content[start - self.start : end - self.start]
        if content:
            yield content
        for at in range(start + len(content), end, STRIP_BLOCK):
            yield _ZEROS[: end - at]


_Patches = tuple[list[Patch], int]  # in order, and where the file ends then


def find_patches(file: BinaryIO, size: int, facts: Facts) -> _Patches:
    """Return what makes a file say nothing of its making, in order, and where it then ends.

    ValueError for one that is not understood.
    """
    # All of a JPEG is read: only its end tells where that is.
    budget = MAX_PATCHING_COST + (size if facts.kind == "image" else 0)
    try:
        exif = [_bare_exif(facts.orientation)] if facts.orientation != 1 else []
        span = _Span(_Source(b"", file, [budget]), 0, size)
        patches, end = PATCHERS[facts.extension](span, exif)
    except _BROKEN as error:
        raise ValueError("a broken file") from error
    if end > size:
        raise ValueError("a file that is cut short")
    return patches, end


def _fitting(exif: list[bytes], size: int) -> bytes:
    """Take the EXIF, which is written once, if there is room for it; else return nothing."""
    return exif.pop() if exif and len(exif[0]) <= size else b""


def _bare_exif(orientation: int) -> bytes:
    """Return EXIF that says how a picture stands, and nothing else."""
    entry = struct.pack(">HHIHxx", EXIF_ORIENTATION, 3, 1, orientation)
    return b"MM\0*" + struct.pack(">IH", 8, 1) + entry + bytes(4)


def _jpeg_patches(jpeg: _Span, exif: list[bytes]) -> _Patches:
    """Overwrite EXIF, XMP, IPTC, comments and makers' segments, up to the picture's end."""
    patches, marker, at = list[Patch](), b"", 2
    exif = [b"Exif\0\0" + each for each in exif]
    while True:
        in_scan, start = marker == b"\xda", at
        at = _find_marker(jpeg, at, STRIP_BLOCK if in_scan else 16)
        if not in_scan and jpeg.read(start, at - start).strip(b"\xff"):  # which may fill
            raise ValueError("no marker")
        marker = jpeg.read(at + 1, 1)
        if marker == b"\xd9":
            return patches, at + 2
        start, at = at + 4, at + 2 + jpeg.unpack(">H", at + 2)[0]
        head = jpeg.peek(start, 12)
        start += 12 * (marker == b"\xe0" and head.startswith(b"JFIF\0"))  # before its thumbnail
        is_shown = b"\xc0" <= marker <= b"\xdf" or head.startswith(JPEG_SHOWN.get(marker, ()))
        if start < at and not is_shown:
            content = _fitting(exif, at - start) if marker == b"\xe1" else b""
            patches.append(Patch(start, at, content))


def _find_marker(jpeg: _Span, at: int, length: int) -> int:
    """Find the next marker, in stretches of so many bytes; EOFError if there is none."""
    while len(block := jpeg.peek(at, length)) > 1:
        if found := _JPEG_MARKER_START.search(block):
            return at + found.start()
        at += length - 1
    raise EOFError


def _png_patches(png: _Span, exif: list[bytes]) -> _Patches:
    """Overwrite all chunks that do not show the picture."""
    patches = list[Patch]()
    for kind, chunk in _png_chunks(png, 8):
        end = chunk.start + chunk.size
        if kind == b"IEND":
            return patches, end + 4
        if kind not in PNG_SHOWN:
            content = _fitting(exif, chunk.size)
            content = (b"eXIf" if content else b"noNe") + content
            check, zeros = zlib.crc32(content), chunk.size + 4 - len(content)
            for at in range(0, zeros, STRIP_BLOCK):
                check = zlib.crc32(_ZEROS[: zeros - at], check)
            patches.append(Patch(chunk.start - 4, end, content))
            patches.append(Patch(end, end + 4, struct.pack(">I", check)))
    raise ValueError("the picture has no end")


def _webp_patches(webp: _Span, exif: list[bytes]) -> _Patches:
    """Overwrite all chunks that do not show the picture, and the flags that tell of them."""
    (size,) = webp.unpack("<I", 4)
    chunks = _hide_chunks(webp.part(12, 8 + size), exif, {b"ANMF"})
    return list(chunks), min(webp.size, 8 + size)


def _hide_chunks(
    span: _Span, exif: list[bytes], frames: Set[bytes] = frozenset()
) -> Iterator[Patch]:
    """Make unknown chunks of those in a WebP, or in one of its frames, that do not show it."""
    end = span.start
    for kind, chunk in _chunks(span):
        start, end = chunk.start, chunk.start + chunk.size
        if kind == b"VP8X":
            flags = chunk.read(0, 1)[0] & ~(WEBP_EXIF | WEBP_XMP) | WEBP_EXIF * bool(exif)
            yield Patch(start, start + 1, bytes([flags]))
        elif kind in frames:
            yield from _hide_chunks(chunk.part(16), [])
        elif kind not in WEBP_SHOWN:
            content = _fitting(exif, chunk.size)
            yield Patch(start - 8, start - 4, b"EXIF" if content else b"none")
            if chunk.size:
                yield Patch(start, end, content)
    if end + end % 2 < span.start + span.size:  # the walk was given up
        raise EOFError


# In ISO base media files what is not shown becomes a box of the type `free`.
_SHOWN_BOXES: Mapping[bytes, frozenset[bytes]] = {  # of a file or box (14496-12, 23008-12)
    box: frozenset(names.split()) for box, names in {
        b"file": b"ftyp styp mdat meta moov moof sidx mfra",
        b"moov": b"mvhd iods mvex trak", b"trak": b"tkhd tref edts tapt mdia",
        b"mdia": b"mdhd hdlr elng minf", b"minf": b"vmhd smhd nmhd gmhd hdlr dinf stbl",
        b"stbl": b"stsd stts ctts cslg stsc stsz stco co64 stss stps stsh sdtp sbgp sgpd subs"
                 b" saiz saio",
        b"moof": b"mfhd traf", b"traf": b"tfhd tfdt trun sbgp sgpd subs saiz saio",
        b"meta": b"hdlr pitm iloc iinf iprp iref idat dinf grpl", b"iprp": b"ipco ipma",
    }.items()
}  # fmt: skip
_SHOWN_TRACKS = {b"vide", b"pict", b"auxv", b"soun"}  # others have positions, subtitles too
_SHOWN_ITEMS = frozenset(
    b"hvc1 hev1 lhv1 vvc1 av01 avc1 j2k1 jpeg unci grid iovl iden tmap mski".split()
)
_TELLING_PROPERTIES = frozenset({b"udes", b"altt", b"crtt", b"mdft", b"uuid"})
_BARE_ITEMS = {  # by type: what says nothing
    b"Exif": bytes(4) + _bare_exif(1), b"mime": b'<x:xmpmeta xmlns:x="adobe:ns:meta/"/>',
}  # fmt: skip
_PCM = frozenset({
    b"raw ", b"twos", b"sowt", b"in24", b"in32", b"fl32", b"fl64", b"lpcm", b"NONE",
})  # fmt: skip


class _PatchFinder:
    """Collects what to overwrite in an ISO base media file, and which of its data are shown."""

    def __init__(self, file: _Span) -> None:
        self._file = file
        self._patches: list[Patch] = []
        self._data: list[_Span] = []  # boxes of samples, and of items
        self._shown: list[tuple[int, int]] = []  # where what is shown of them starts and ends
        self._kinds: set[tuple[bytes, bool]] = set()  # of boxes, and whether they are shown

    def run(self) -> _Patches:
        self._walk(b"file", self._file)
        if (b"moof", True) in self._kinds:  # the samples of all tracks are in each fragment
            if (b"trak", False) in self._kinds:
                raise ValueError("samples of a track that is not shown are not found")
            self._data.clear()
        if len(self._data) * len(self._shown) > MAX_PATCHING_STEPS:
            raise ValueError("too many boxes")
        self._shown.sort()
        for box in self._data:
            at = 0
            for start, end in self._shown:
                self._blank(box, at, start - box.start)
                at = max(at, end - box.start)
            self._blank(box, at)
        return sort_patches(self._patches), self._file.size

    def _blank(self, span: _Span, start: int = 0, end: int | None = None) -> None:
        part = span.part(start, end)
        if part.size:
            self._patches.append(Patch(part.start, part.start + part.size))

    def _hide(self, box: _Span, header: int) -> None:
        """Make a free box of one whose header stands so many bytes before it."""
        type_at = box.start - header + 4
        self._patches.append(Patch(type_at, type_at + 4, b"free"))
        self._blank(box)

    def _boxes(self, span: _Span) -> Iterator[tuple[bytes, _Span, int]]:
        """Yield type, content and size of the header of each box; overwrite what is none."""
        at = span.start
        for kind, box in _boxes(span):
            header, at = box.start - at, box.start + box.size
            yield kind, box, header
        self._blank(span, at - span.start)

    def _walk(self, kind: bytes, span: _Span) -> None:
        """Go through the boxes of a file or box, and hide what is not shown."""
        for child, box, header in self._boxes(span):
            is_shown = child in _SHOWN_BOXES[kind] and self._is_shown(child, box)
            self._kinds.add((child, is_shown))
            if is_shown:
                self._keep(child, box)
            else:
                self._hide(box, header)

    @staticmethod
    def _is_shown(kind: bytes, box: _Span) -> bool:
        if kind == b"trak":
            return _boxes(_boxes(box)[b"mdia"])[b"hdlr"].peek(8, 4) in _SHOWN_TRACKS
        return kind != b"meta" or _boxes(box, 4)[b"hdlr"].peek(8, 4) == b"pict"

    def _keep(self, kind: bytes, box: _Span) -> None:
        """Overwrite what a box that is shown tells, and those in it."""
        if kind in {b"mvhd", b"tkhd", b"mdhd"}:  # times of making and change
            self._blank(box, 4, 20 if box.read(0, 1) == b"\1" else 12)
        elif kind == b"hdlr":  # a name
            self._blank(box, 12)
        elif kind in {b"mdat", b"idat"}:
            self._data.append(box)
        elif kind == b"ipco":
            for name, content, header in self._boxes(box):
                if name in _TELLING_PROPERTIES:
                    self._hide(content, header)
        elif kind in _SHOWN_BOXES:
            self._walk(kind, box.part(4) if kind == b"meta" else box)
        if kind == b"meta":
            self._keep_items(_boxes(box, 4))
        elif kind == b"trak":
            self._keep_samples(_boxes(_boxes(box)[b"mdia"]))

    def _keep_samples(self, media: _Parts) -> None:
        """Note where a track's samples are, and overwrite who made its codec."""
        tables, unit = _boxes(_boxes(media[b"minf"])[b"stbl"]), 0.0
        for kind, entry in _boxes(tables[b"stsd"], 8):
            self._blank(entry, 12, 16)  # vendor
            if media[b"hdlr"].read(8, 4) != b"soun":
                self._blank(entry, 42, 74)  # the codec's name
            else:
                unit = max(unit, _audio_unit(kind, entry))
        self._shown += _track_chunks(tables, unit, MAX_PATCHING_CHUNKS - len(self._shown))

    def _keep_items(self, boxes: _Parts) -> None:
        """Note where the items of a picture are, and overwrite those that do not show it."""
        kinds = dict(_heif_kinds(boxes[b"iinf"]))
        for item, extents in _heif_extents(self._file, boxes):
            kind = kinds.get(item, b"")
            content = _BARE_ITEMS.get(kind, b"")
            for extent in extents:
                start, end = extent.start, extent.start + extent.size
                if start == end:
                    raise ValueError("an item that is elsewhere")
                self._shown.append((start, end))
                if kind not in _SHOWN_ITEMS:
                    self._patches.append(Patch(start, end, content[: extent.size]))
                    content = b""


def sort_patches(patches: Iterable[Patch]) -> list[Patch]:
    """Sort patches; where a crafted file makes them overlap, the first one stays.

    >>> sort_patches([Patch(8, 12, b"abcd"), Patch(4, 10)])
    [Patch(start=4, end=10, content=b''), Patch(start=10, end=12, content=b'cd')]
    """
    ordered, at = list[Patch](), 0
    for patch in sorted(patches):
        if patch.end > at:
            start = max(patch.start, at)
            ordered.append(Patch(start, patch.end, patch.content[start - patch.start :]))
            at = patch.end
    return ordered


def _audio_unit(kind: bytes, entry: _Span) -> float:
    """Return a sample's bytes by its description, or 0: cameras write 1 for longer ones."""
    version, channels, bits = entry.unpack(">H6xHH", 8)
    if version == 0 and kind in _PCM:
        return float(channels * -(-bits // 8))
    samples, frame = entry.unpack(">I4xI", 28) if version == 1 else (0, 0)
    return float(frame / samples) if samples else 0.0


def _numbers(table: _Span, layout: str, count: int) -> Iterator[tuple[int, ...]]:
    """Read so many rows of big-endian numbers, in pieces."""
    width = struct.calcsize(layout)
    for at in range(0, count * width, STRIP_BLOCK // width * width):
        piece = min(STRIP_BLOCK // width, count - at // width)
        yield from struct.iter_unpack(layout, table.read(at, piece * width))


def _track_chunks(tables: _Parts, unit: float, limit: int) -> Iterator[tuple[int, int]]:
    """Yield where a track's chunks start and end (14496-12, 8.7); `unit`: what 1 stands for.

    ValueError for more than `limit` of them, before the first one.
    """
    wide, sizes, runs = tables[b"co64"], tables[b"stsz"].part(4), tables[b"stsc"].part(4)
    places = (wide if wide.size else tables[b"stco"]).part(4)
    total, size = places.read_uint(4), sizes.read_uint(4)
    if total > limit:
        raise ValueError("too many chunks")
    equal = unit if size == 1 and unit else float(size)  # 0: samples have sizes of their own
    starts = _numbers(places, ">Q" if wide.size else ">I", total)
    lengths = _numbers(sizes, ">I", sizes.read_uint(4))
    entries = itertools.chain(_numbers(runs, ">II4x", runs.read_uint(4)), [(total + 1, 0)])
    at = 1
    for (first, count), (after, _) in itertools.pairwise(entries):
        if not at <= first < after:
            raise ValueError("chunks that are listed again")  # and again
        for (start,) in itertools.islice(starts, first - at, after - at):
            samples = () if equal else itertools.islice(lengths, count)
            length = math.ceil(count * equal) if equal else sum(each for (each,) in samples)
            yield start, start + length
        at = after


_ISO_EXTENSIONS = (
    "3g2", "3gp", "avif", "heic", "heics", "heif", "heifs", "m4a", "m4b", "m4v", "mov", "mp4",
)  # fmt: skip
PATCHERS: Mapping[str, Callable[[_Span, list[bytes]], _Patches]] = {  # by extension
    "jpg": _jpeg_patches, "png": _png_patches, "apng": _png_patches, "webp": _webp_patches,
    **dict.fromkeys(_ISO_EXTENSIONS, lambda file, _: _PatchFinder(file).run()),
}  # fmt: skip


# -- What starts how ---------------------------------------------------------------------

_TRANSPORT_PACKET = rb"\x47[\0-\x7f].[^\0-\x0f@-O\x80-\x8f\xc0-\xcf].{184}"
_BMP_HEADER = rb"(?:\x0c\0\0\0.{4}|[\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0.{8})\x01\0"


class Format(NamedTuple):
    """A format: what its files are called, who takes uploads of it, and how they begin."""

    extension: str
    mime_type: str
    others: str = ""  # extensions of such files
    uses: str = ""  # families of endpoints that take it; `raw`: a camera's, to be developed
    start: bytes = b""  # a pattern; none where `sniff` has another way, or the parser tells
    parse: Callable[[_Span, _Draft], None] = lambda file, draft: None


FORMATS = {each[0]: Format(*each) for each in (
    ("3g2", "video/3gpp2"),
    ("3gp", "video/3gpp"),
    ("aac", "audio/aac", "", "", b"", _mpeg_audio),
    ("aiff", "audio/x-aiff", "aif aifc", "", rb"FORM....AIF[FC]", _aiff),
    ("amr", "audio/amr", "awb", "", rb"#!AMR(?:-WB)?\n", _amr),
    ("apng", "image/apng"),
    ("arw", "image/x-sony-arw", "srf sr2", "raw"),
    ("avi", "video/x-msvideo", "", "", rb"RIFF....AVI ", _avi),
    ("avif", "image/avif", "avifs"),
    ("bmp", "image/bmp", "dib", "media images", rb"BM.{12}" + _BMP_HEADER, _bmp),
    ("cr2", "image/x-canon-cr2", "", "raw", rb"(?:II\*\0|MM\0\*)....CR\x02\0", _tiff),
    ("cr3", "image/x-canon-cr3", "", "raw"),
    ("dng", "image/x-adobe-dng", "", "raw"),
    ("flac", "audio/flac", "", "", rb"fLaC", _flac),
    ("flv", "video/x-flv", "", "", rb"FLV\x01[\0\x01\x04\x05]\0\0\0\x09", _flv),
    ("gif", "image/gif", "", "media library images", rb"GIF8[79]a", _gif),
    ("heic", "image/heic"),
    ("heics", "image/heic-sequence"),
    ("heif", "image/heif", "hif"),
    ("heifs", "image/heif-sequence"),
    ("ico", "image/x-icon", "", "", rb"\0\0\x01\0[^\0]\0...[\0\xff][\0\x01]\0", _ico),
    ("j2c", "image/x-j2c", "j2k jpc", "", rb"\xff\x4f\xff\x51\0", _j2c),
    ("jp2", "image/jp2", "", "", rb"\0\0\0\x0cjP  \r\n\x87\n", _jp2),
    ("jpg", "image/jpeg", "jpeg jpe jfif insp", "media library images", rb"\xff\xd8\xff", _jpeg),
    ("jpx", "image/jpx", "jpf"),
    ("jxl", "image/jxl", "", "", rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", _jxl),
    ("m2ts", "video/mp2t", "mts", "", rb"(?:.{4}" + _TRANSPORT_PACKET + rb"){4}", _mpeg_ts),
    ("m4a", "audio/mp4"),
    ("m4b", "audio/mp4"),
    ("m4v", "video/x-m4v"),
    ("mka", "audio/x-matroska"),
    ("mkv", "video/x-matroska", "", "", rb"\x1a\x45\xdf\xa3", _matroska),
    ("mov", "video/quicktime", "qt", "",
     rb"\0...(?:moov|wide|free|skip|pnot)|[\0-\x08]...mdat", _isobmff),
    ("mp3", "audio/mpeg", "", "", rb"ID3[\x02-\x04]", _mpeg_audio),
    ("mp4", "video/mp4", "insv", "", rb"\0...ftyp", _isobmff),
    ("mpg", "video/mpeg", "mpeg m2v vob", "",
     rb"\0\0\x01(?:\xba[\x21\x31\x44-\x7f]|\xb3.{3}[\x11-\xe8])", _mpeg_ps),
    ("nef", "image/x-nikon-nef", "", "raw"),
    ("ogg", "audio/ogg", "oga", "", rb"OggS\0", _ogg),
    ("ogv", "video/ogg"),
    ("opus", "audio/ogg"),
    ("orf", "image/x-olympus-orf", "", "raw", rb"IIR[OS]|MMOR", _tiff),
    ("pef", "image/x-pentax-pef", "", "raw"),
    ("png", "image/png", "", "media library images", rb"\x89PNG\r\n\x1a\n", _png),
    ("raf", "image/x-fujifilm-raf", "", "raw", rb"FUJIFILMCCD-RAW ", _raf),
    ("rw2", "image/x-panasonic-rw2", "", "raw", rb"IIU\0", _tiff),
    ("srw", "image/x-samsung-srw", "", "raw"),
    ("svg", "image/svg+xml", "", "media", b"", _svg),
    ("tiff", "image/tiff", "tif", "",  # and BigTIFF
     rb"II\*\0|MM\0\*|II\+\0\x08\0\0\0|MM\0\+\0\x08\0\0", _tiff),
    ("ts", "video/mp2t", "", "", rb"(?:" + _TRANSPORT_PACKET + rb"){4}", _mpeg_ts),
    ("wav", "audio/x-wav", "", "", rb"(?:RIFF|RF64|BW64)....WAVE", _wav),
    ("webm", "video/webm", "weba"),
    ("webp", "image/webp", "", "media images", rb"RIFF....WEBP", _webp),
    ("wma", "audio/x-ms-wma", "", "", re.escape(_ASF), _asf),
    ("wmv", "video/x-ms-wmv", "asf"),
)}  # fmt: skip
MEDIA_EXTENSIONS = frozenset(
    os.fsencode(name)
    for each in FORMATS.values()
    for name in (each.extension, *each.others.split())
)
_KNOWN_STARTS = [each for each in FORMATS.values() if each.start]
_START = re.compile(b"|".join(b"(%b)" % each.start for each in _KNOWN_STARTS), re.DOTALL)


def formats_for(use: str) -> frozenset[str]:
    """Return the extensions of the formats that have a use."""
    return frozenset(each.extension for each in FORMATS.values() if use in each.uses.split())


def sniff(head: bytes) -> Format | None:
    """Return the format of the file that starts so."""
    if match := _START.match(head):
        return _KNOWN_STARTS[(match.lastindex or 0) - 1]
    if _svg_root(head):
        return FORMATS["svg"]
    first = _first_frame(head.lstrip(b"\0"))  # some encoders pad before it
    return FORMATS[first[1].extension] if first and first[0] == 0 else None


def probe(file: BinaryIO, head: bytes = b"") -> Facts | None:
    """Return what a seekable file is and says of itself; `None` if it is no image, video, audio.

    Reads some kilobytes wherever they lie, of a file of any size; its first bytes not at all if
    they are given as `head`. Broken content gives fewer facts, never an exception; an `OSError`
    of the medium passes.

    >>> probe(io.BytesIO(b"GIF89a")).mime_type
    'image/gif'
    >>> probe(io.BytesIO(b"%PDF-1.7")) is None
    True
    """
    size = file.seek(0, io.SEEK_END)
    if not head:
        file.seek(0)
        head = file.read(HEAD_BYTES)
    known = sniff(head[:HEAD_BYTES])
    if known is None:
        file.seek(0)
        if not _svg_root(file.read(SVG_HEAD_BYTES)):
            return None
        known = FORMATS["svg"]
    draft = _Draft(known.extension)
    with contextlib.suppress(*_BROKEN):  # what was found until then is in the draft
        known.parse(_Span(_Source(head, file, [MAX_PROBE_COST]), 0, size), draft)
    mime_type = draft.mime_type or FORMATS[draft.extension].mime_type
    return Facts(mime_type.partition("/")[0], mime_type, draft.extension, **draft.found)


# ======================================================================================
# 5. Index
# ======================================================================================
# SQLite in WAL mode. `asset` says what is true of some content, `file` where it lies; one class
# per subject has its SQL beside it, and there is no SQL elsewhere. Each thread reads through
# a connection of its own. Writers queue up; whoever gets the lock commits for all who wait
# (group commit), so that many small writes share one transaction and one fsync.

IN_MEDIA = """root = 'library' AND path > x'6d656469612f' AND path < x'6d6564696130'
    AND instr(substr(path, 7), x'2f') = 0"""  # files directly in media/
SCHEMA = f"""
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE asset (                -- what is true of some content, wherever it lies
    sha256 TEXT PRIMARY KEY,        -- 64 lower-case hex digits
    size INTEGER NOT NULL,          -- bytes
    kind TEXT,                      -- image, video, audio; null: none of these
    mime_type TEXT,
    extension TEXT,                 -- by content, without the dot
    width INTEGER,                  -- pixels as stored, before rotation
    height INTEGER,
    orientation INTEGER,            -- EXIF, 1 to 8
    duration REAL,                  -- seconds
    created REAL,                   -- capture time, Unix seconds
    created_source TEXT,            -- where it stood: exif, xmp, ...
    make TEXT,                      -- of the camera
    model TEXT,
    latitude REAL,                  -- degrees, north and east positive
    longitude REAL,
    altitude REAL,                  -- metres
    md5 TEXT,                       -- of contents that are or were an entity's
    thumbnail INTEGER               -- 1: there is one, 0: none can be made, null: not tried yet
) WITHOUT ROWID;

CREATE TABLE file (                 -- where content lies
    root TEXT NOT NULL,             -- the folder's name in the program: library, images, ...
    path BLOB NOT NULL,             -- below that folder, the file system's bytes
    sha256 TEXT NOT NULL REFERENCES asset,
    size INTEGER NOT NULL,          -- bytes, mtime_ns and ctime: as stat said when it was read
    mtime_ns INTEGER NOT NULL,
    ctime REAL NOT NULL,
    added REAL NOT NULL,            -- Unix seconds
    PRIMARY KEY (root, path)
) WITHOUT ROWID;
CREATE INDEX file_by_content ON file (sha256, root, path);
CREATE INDEX file_of_media ON file (added, path) WHERE {IN_MEDIA};
CREATE INDEX asset_without_thumbnail ON asset (sha256) WHERE thumbnail IS NULL;
"""

ACCOUNTS_SCHEMA = """
CREATE TABLE user (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- an id is never used again: tokens carry it
    email TEXT NOT NULL,            -- as given
    email_key TEXT NOT NULL UNIQUE, -- case-folded
    username TEXT UNIQUE,
    phone_number TEXT UNIQUE,
    first_name TEXT NOT NULL,
    last_name TEXT NOT NULL,
    password TEXT NOT NULL,         -- scrypt$n$r$p$salt$hash
    permissions TEXT NOT NULL DEFAULT '',  -- words that the owner granted
    is_active INTEGER NOT NULL DEFAULT 1,
    created_at REAL NOT NULL        -- Unix seconds, as all times
);

CREATE TABLE session (              -- a login and the refresh tokens that followed from it
    id TEXT PRIMARY KEY,            -- the tokens' claim `session`
    user_id INTEGER NOT NULL REFERENCES user,
    jti TEXT NOT NULL,              -- of its one refresh token that is not spent
    rotated_at REAL NOT NULL,       -- when the one before was spent
    expires_at REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX session_of_user ON session (user_id, expires_at);
CREATE INDEX session_by_expiry ON session (expires_at);

CREATE TABLE login_failure (
    key TEXT NOT NULL,              -- digest of an account's or unknown name, or of an address
    failed_at REAL NOT NULL,
    attempt TEXT NOT NULL,          -- random
    is_certain INTEGER NOT NULL,    -- 0 while the password is being checked
    PRIMARY KEY (key, failed_at, attempt)
) WITHOUT ROWID;
CREATE INDEX login_failure_by_time ON login_failure (failed_at);
CREATE INDEX login_failure_by_attempt ON login_failure (attempt);

CREATE TABLE collection (
    id TEXT PRIMARY KEY,            -- UUID
    user_id INTEGER NOT NULL,       -- no reference: it may be another program's user
    name TEXT NOT NULL,
    description TEXT,
    folded TEXT NOT NULL,           -- name and description, case-folded, for the search
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL
);
CREATE INDEX collection_by_time ON collection (user_id, created_at, id);
CREATE INDEX collection_by_name ON collection (user_id, name, id);

CREATE TABLE media (
    id TEXT PRIMARY KEY,            -- UUID
    user_id INTEGER NOT NULL,
    name TEXT NOT NULL,
    type TEXT NOT NULL,             -- image, video, audio
    size INTEGER,                   -- bytes; as the client says where there is no file
    path TEXT UNIQUE,               -- of its file in the folder `users`; null: there is none
    note TEXT,                      -- what the client gave as storage_path
    description TEXT,
    collection_id TEXT REFERENCES collection,
    folded TEXT NOT NULL,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    is_deleted INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX media_by_time ON media (user_id, is_deleted, created_at, id);
CREATE INDEX media_by_type ON media (user_id, is_deleted, type, created_at, id);
CREATE INDEX media_by_name ON media (user_id, is_deleted, name, id);
CREATE INDEX media_by_size ON media (user_id, is_deleted, size, id);
CREATE INDEX media_of_collection ON media (collection_id, user_id, is_deleted, created_at, id);
"""

ENTITY_STATE = """
    version INTEGER NOT NULL,           -- from 1
    transaction_id INTEGER NOT NULL,    -- of the write that made it
    is_collection INTEGER NOT NULL,     -- 0 or 1, for ever
    label TEXT,
    description TEXT,
    parent_id INTEGER,                  -- the collection it is in
    is_deleted INTEGER NOT NULL,        -- softly, 0 or 1
    added REAL NOT NULL,                -- Unix seconds: of version 1
    updated REAL NOT NULL,              -- and of this one
    path TEXT,                          -- of its content in the entities folder
    sha256 TEXT REFERENCES asset,       -- null: a collection
    kind TEXT,                          -- these three are the asset's, for the indexes
    mime_type TEXT,
    extension TEXT,
    search TEXT NOT NULL                -- label and description, folded
"""
ENTITY_SCHEMA = f"""
CREATE TABLE entity (                   -- the current version of each
    id INTEGER PRIMARY KEY AUTOINCREMENT, {ENTITY_STATE});
CREATE UNIQUE INDEX entity_by_content ON entity (sha256);
CREATE INDEX entity_by_parent ON entity (parent_id);
CREATE INDEX entity_by_kind ON entity (kind);
CREATE INDEX entity_by_mime_type ON entity (mime_type);
CREATE INDEX entity_by_extension ON entity (extension);
CREATE INDEX entity_collection ON entity (id) WHERE is_collection = 1;
CREATE INDEX entity_deleted ON entity (id) WHERE is_deleted = 1;

CREATE TABLE entity_version (           -- every version, the current one too
    id INTEGER NOT NULL, {ENTITY_STATE}, PRIMARY KEY (version, id)
) WITHOUT ROWID;
CREATE INDEX entity_version_by_id ON entity_version (id, version);
CREATE INDEX entity_version_by_path ON entity_version (path, id);
"""

SESSIONS_SCHEMA = """
ALTER TABLE user ADD COLUMN tokens_from INTEGER NOT NULL DEFAULT 0;  -- older ones are refused
ALTER TABLE session ADD COLUMN previous_jti TEXT;  -- spent for the good one at rotated_at
ALTER TABLE session ADD COLUMN created_at REAL;
ALTER TABLE session ADD COLUMN address TEXT NOT NULL DEFAULT '';    -- of the login
ALTER TABLE session ADD COLUMN user_agent TEXT NOT NULL DEFAULT '';  -- its beginning
UPDATE session SET created_at = rotated_at;
"""

# Lists are made anew when this number changes, and nothing else: a login costs them nothing. It
# begins anywhere, so that the index after a damaged one does not pass for it.
LIBRARY_VERSION_SCHEMA = "INSERT INTO meta VALUES ('library_version', random() >> 16);" + "".join(
    f"CREATE TRIGGER library_version_{number} AFTER {change} BEGIN"
    " UPDATE meta SET value = value + 1 WHERE key = 'library_version'; END;"
    for number, change in enumerate(
        (
            "INSERT ON file WHEN new.root = 'library'",
            "DELETE ON file WHEN old.root = 'library'",
            "UPDATE ON file WHEN new.root = 'library'",
            "UPDATE OF kind, mime_type, created, created_source ON asset",
        )
    )
)

TOKENS_SCHEMA = """
CREATE TABLE token_use (    -- of scoped tokens that are good for some uses only
    id TEXT PRIMARY KEY,    -- the token's jti
    used INTEGER NOT NULL,  -- requests that succeeded, and those under way
    expires_at REAL NOT NULL
) WITHOUT ROWID;
"""

STORED_MEDIA_SCHEMA = """
CREATE INDEX media_with_file ON media (user_id, size) WHERE path IS NOT NULL;
"""

UPLOADS_SCHEMA = """
CREATE TABLE upload (               -- one that may be resumed, or has been completed lately
    id TEXT PRIMARY KEY,            -- random: the end of its URL, and its name in `.incoming/`
    owner TEXT NOT NULL,            -- who may go on with it, and in whose number it counts
    target TEXT NOT NULL,           -- the family that gets the file
    root TEXT NOT NULL,             -- the folder where it arrives
    metadata TEXT NOT NULL,         -- Upload-Metadata, as sent
    length INTEGER,                 -- bytes; null: not known yet
    received INTEGER NOT NULL,      -- bytes that are on disk for good
    writer TEXT NOT NULL,           -- the request that may add more
    expires_at REAL NOT NULL,
    answer TEXT                     -- the family's, as JSON; null: it is not complete
) WITHOUT ROWID;
CREATE INDEX upload_by_expiry ON upload (expires_at);
CREATE INDEX upload_of_owner ON upload (owner) WHERE answer IS NULL;
"""

SHARES_SCHEMA = """
CREATE TABLE share (
    id TEXT PRIMARY KEY,    -- random; who knows it may see what is shared
    owner INTEGER,          -- user id; null: whoever may write here
    kind TEXT NOT NULL,     -- file, folder, entity, media, collection
    root TEXT NOT NULL,     -- the folder where the files lie
    target TEXT NOT NULL,   -- SHA-256, path, or id
    title TEXT NOT NULL,
    strips INTEGER NOT NULL,  -- 1: pictures are sent without what they say of their making
    takes INTEGER NOT NULL, -- 1: guests may add pictures to the folder
    password TEXT,          -- scrypt
    created_at REAL NOT NULL,
    expires_at REAL         -- null: never
) WITHOUT ROWID;
"""

ALBUMS_SCHEMA = """
ALTER TABLE media ADD COLUMN sha256 TEXT;  -- of the library's picture that is shown without a file
"""

# number n brings an index from user_version n to n + 1
MIGRATIONS = (
    SCHEMA, ACCOUNTS_SCHEMA, ENTITY_SCHEMA, SESSIONS_SCHEMA, LIBRARY_VERSION_SCHEMA,
    STORED_MEDIA_SCHEMA, UPLOADS_SCHEMA, TOKENS_SCHEMA, SHARES_SCHEMA, ALBUMS_SCHEMA,
)  # fmt: skip

# Python 3.12.0 to 3.12.3 take the `?1` of SQL for a name, and say so (python/cpython#117995).
warnings.filterwarnings("ignore", "Binding [0-9]+ ", DeprecationWarning)

Database = sqlite3.Connection  # a parameter of what runs in a transaction
Located = tuple["File", "Asset"]


class Asset(NamedTuple):
    """What is true of some content; `facts` is None where it is no image, video or audio."""

    sha256: str
    size: int
    facts: Facts | None
    md5: str | None = None
    thumbnail: int | None = None

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Asset:
        """Return the asset of the columns of ASSET_COLUMNS."""
        facts = Facts(*row[4:]) if row[4] else None
        return cls(row[0], row[1], facts, row[2], row[3])

    @property
    def mime_type(self) -> str:
        """Return the type of the content, as answers name it."""
        return self.facts.mime_type if self.facts else "application/octet-stream"


class File(NamedTuple):
    """A file as it was when it was read; `path` is below the folder `root`, in Python's form."""

    root: str
    path: str
    sha256: str
    size: int
    mtime_ns: int
    ctime: float
    added: float

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> File:
        """Return the file of the columns of FILE_COLUMNS."""
        return cls(row[0], os.fsdecode(row[1]), *row[2:])

    def matches(self, status: os.stat_result) -> bool:
        """Return whether the file on disk is still the one that was read."""
        return is_same(self.root, (self.size, self.mtime_ns, self.ctime), status)


SERVER_ONLY = frozenset({"users", "entities"})  # roots that nobody else writes to
FileState = tuple[int, int, float]  # of a file: size, mtime_ns, ctime


def state_of(status: os.stat_result) -> FileState:
    """Return size, mtime_ns and ctime of a file; another state is another content.

    Some file systems keep times that no calendar has: of those it is the nearest that SQLite can
    keep, in the years 1677 and 2262.
    """
    mtime_ns = max(-MAX_BYTES, min(status.st_mtime_ns, MAX_BYTES))  # `clamp` is one call more
    return status.st_size, mtime_ns, status.st_ctime


def is_same(root: str, known: FileState, status: os.stat_result) -> bool:
    """Return whether a file is as it was.

    Some edits keep size and mtime (`exiftool -P`): ctime, which nobody can set, tells those. It
    also changes with owner, permissions, name and links, and then the file is read once more.
    The server itself links equal files in its own folders, so there it tells nothing. Neither
    does it of an object, or its copy without a name; and some stores keep no parts of seconds.
    """
    size, mtime_ns, ctime = state_of(status)
    links = status.st_nlink
    linked = not links or root in SERVER_ONLY or (root == "images" and links > 1)
    unit = 1 if links else 10**9
    same = size == known[0] and mtime_ns // unit == known[1] // unit
    return same and (linked or ctime == known[2])


ASSET_NAMES = ("sha256", "size", "md5", "thumbnail", *Facts._fields)
ASSET_COLUMNS = ", ".join(f"asset.{name}" for name in ASSET_NAMES)
FILE_COLUMNS = ", ".join(f"file.{name}" for name in File._fields)
FILE_WIDTH = len(File._fields)
SELECT_LOCATED = f"SELECT {FILE_COLUMNS}, {ASSET_COLUMNS} FROM file JOIN asset USING (sha256)"


def located(row: Sequence[Any]) -> Located:
    """Return the file and the asset that a row of SELECT_LOCATED has."""
    return File.from_row(row[:FILE_WIDTH]), Asset.from_row(row[FILE_WIDTH:])


class Entity(NamedTuple):
    """One version of an entity; what has the id 0 is in no index yet."""

    id: int = 0
    version: int = 0
    transaction_id: int = 0
    is_collection: bool = False
    label: str | None = None
    description: str | None = None
    parent_id: int | None = None
    is_deleted: bool = False
    added: float = 0.0
    updated: float = 0.0
    path: str | None = None
    asset: Asset | None = None

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Entity:
        """Return the entity of the columns of ENTITY_COLUMNS and ASSET_COLUMNS."""
        asset = Asset.from_row(row[ENTITY_WIDTH:]) if row[ENTITY_WIDTH] else None
        found = cls._make((*row[:ENTITY_WIDTH], asset))
        is_collection, is_deleted = bool(found.is_collection), bool(found.is_deleted)
        return found._replace(is_collection=is_collection, is_deleted=is_deleted)

    def is_same(self, other: Entity) -> bool:
        """Return whether two versions say the same; `path` stands for the asset."""
        return self[:-1] == other[:-1]


ENTITY_COLUMNS = Entity._fields[:-1]
ENTITY_WIDTH = len(ENTITY_COLUMNS)
ENTITY_STORED = (*ENTITY_COLUMNS, "sha256", "kind", "mime_type", "extension", "search")


class Table:
    """What is in the index about one kind of thing."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def _change(self, sql: str, *values: Any, durable: bool = True) -> bool:
        """Run one statement in a transaction of its own; return whether it changed a row."""
        return self._index.write(lambda db: db.execute(sql, values).rowcount > 0, durable=durable)


class Rows(Table, Generic[T]):
    """Things of one kind, whose fields are the columns that are read of a table."""

    def __init__(self, index: Index, kind: Any, table: str) -> None:
        super().__init__(index)
        self._make: Callable[[Sequence[Any]], T] = kind._make
        self._table, self._columns = table, ", ".join(kind._fields)
        self._rows = f"SELECT {self._columns} FROM {table}"

    def _all(self, rest: str, *values: Any, db: Database | None = None) -> list[T]:
        """Return those that the rest of the SELECT finds."""
        return [*map(self._make, self._index.read(f"{self._rows} {rest}", *values, db=db))]

    def _first(self, rest: str, *values: Any, db: Database | None = None) -> T | None:
        """Return the first of them, if there is one."""
        row = self._index.read(f"{self._rows} {rest}", *values, db=db).fetchone()
        return self._make(row) if row else None


def where_clause(*conditions: tuple[str, Any]) -> tuple[str, list[Any]]:
    """Return what follows a table of which rows are wanted, and the conditions' values."""
    words = " AND ".join([condition for condition, _ in conditions]) or "1"
    return f"WHERE {words}", [value for words, value in conditions if "?" in words]


def is_damage(error: sqlite3.Error) -> bool:
    """Return whether it is the index's file that is not what it should be."""
    # SQLITE_CORRUPT and SQLITE_NOTADB have no class of their own; an emptied file has no tables.
    return type(error) is sqlite3.DatabaseError or str(error).startswith("no such table")


def reporting(method: Callable[..., T]) -> Callable[..., T]:
    """Return a method of a cursor that tells of damage whenever it meets some."""

    @functools.wraps(method)
    def call(cursor: IndexCursor, *values: Any) -> T:
        try:
            return method(cursor, *values)
        except sqlite3.DatabaseError as error:
            if is_damage(error):
                cursor.connection.on_damage(str(error))
            raise

    return call


class IndexCursor(sqlite3.Cursor):
    """What all reading of the index goes through."""

    connection: IndexConnection
    execute = reporting(sqlite3.Cursor.execute)
    executemany = reporting(sqlite3.Cursor.executemany)
    fetchone = reporting(sqlite3.Cursor.fetchone)
    fetchmany = reporting(sqlite3.Cursor.fetchmany)
    fetchall = reporting(sqlite3.Cursor.fetchall)
    __next__ = reporting(sqlite3.Cursor.__next__)


class IndexConnection(sqlite3.Connection):
    """A connection that tells of damage, and is closed when nothing needs it."""

    on_damage: Callable[[str], None]

    def __del__(self) -> None:
        with contextlib.suppress(sqlite3.ProgrammingError):  # it could not be opened
            self.close()


class ThreadConnection:
    """Holds a thread's own connection, which is closed when the thread ends.

    Alone it would stay open until garbage is collected: its cache of statements refers to it.
    """

    def __init__(self, connection: IndexConnection) -> None:
        self.connection = connection
        self.counts: dict[Any, tuple[int, int]] = {}

    def __del__(self) -> None:
        self.connection.close()


SPARE_BYTES = 8 << 20  # twice what the WAL grows to before a checkpoint
SPARE_SHARE = 8  # at most this part of what is free
SPARE_SECONDS = 10.0  # between two tries to have the space again


def open_private(path: str, flags: int) -> int:
    """Open a file as `open` does; a new one can be read by its owner alone."""
    return os.open(path, flags, 0o600)


class SpareSpace:
    """Disk that a file holds for the index, which is written to on a full disk, too."""

    def __init__(self, index: Path) -> None:
        self._path = index.with_name(f"{index.name}-spare")
        self.missed_at: float | None = None  # when it was released, or was not to be had

    def hold(self) -> None:
        """Take the space, unless it is held, there is too little, or was a moment ago."""
        now = time.monotonic()
        if self.missed_at is not None and now <= self.missed_at + SPARE_SECONDS:
            return
        self.missed_at = now
        with contextlib.suppress(OSError):
            if not self.is_held():
                self._allocate()
            self.missed_at = None

    def is_held(self) -> bool:
        """Return whether the space is there, which only an index of this program has."""
        return self._path.exists()

    def _allocate(self) -> None:
        """Make the file; OSError where there is no room for it."""
        disk = os.statvfs(self._path.parent)
        size = min(SPARE_BYTES, disk.f_bavail * disk.f_frsize // SPARE_SHARE)
        if size < SPARE_BYTES // SPARE_SHARE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(self._path, "xb", 0, opener=open_private) as file, undoing(self._path.unlink):
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            elif file.write(bytes(size)) < size:  # macOS
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def release(self) -> bool:
        """Let the index have the space; return whether it was held."""
        self.missed_at = time.monotonic()
        try:
            self._path.unlink()
        except OSError:
            return False
        return True


class Change:
    """A write that waits for its commit."""

    done = False
    result: Any = None
    error: BaseException | None = None

    def __init__(self, apply: Callable[[Database], Any], durable: bool) -> None:
        self.apply, self.durable = apply, durable


MAX_COUNTS = 100  # kept by a thread


class Index:
    """The SQLite file and the subjects in it."""

    def __init__(self, path: Path, *, query_only: bool = False) -> None:
        self.path = path
        self._query_only = query_only
        if not query_only:  # SQLite would let others read it
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._local = threading.local()
        self._lock = threading.Lock()
        self._waiting: deque[Change] = deque()
        self._connections = weakref.WeakSet[IndexConnection]()
        self.spare = SpareSpace(path)
        self.on_damage: Callable[[str], object] = lambda problem: None  # comes in any thread
        self._writer = self._connect(cache_kib=4096)
        self._durable = True
        self.assets = Assets(self)
        self.files = Files(self)
        self.users = Users(self, User, "user")
        self.sessions = Sessions(self, Session, "session")
        self.login_failures = LoginFailures(self)
        self.token_uses = TokenUses(self)
        self.shares = ShareLinks(self, Share, "share")
        self.collections = Collections(self, Collection, "collection")
        self.media = MediaRecords(self, MediaRecord, "media")
        self.entities = Entities(self)
        self.trash = Trash(self, Trashed, f"({TRASHED})")
        self.albums = Albums(self)
        self.uploads = Uploads(self, OpenUpload, "upload")

    def _connect(self, cache_kib: int) -> IndexConnection:
        options: Any = {"timeout": 30, "isolation_level": None, "check_same_thread": False}
        connection = sqlite3.connect(self.path, factory=IndexConnection, **options)
        connection.on_damage = self.report_damage
        self._connections.add(connection)
        cursor = IndexCursor(connection)  # a damaged file may be met here already
        cursor.execute(f"PRAGMA query_only = {self._query_only:d}")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA temp_store = MEMORY")  # /tmp may be full, or not there
        cursor.execute(f"PRAGMA cache_size = -{cache_kib}")
        return connection

    def read(self, sql: str, *values: Any, db: Database | None = None) -> sqlite3.Cursor:
        """Run a SELECT inside the transaction of `db`, or on this thread's own connection."""
        if db is not None:
            return db.execute(sql, values)
        own: ThreadConnection | None = getattr(self._local, "own", None)
        if own is None:
            own = self._local.own = ThreadConnection(self._connect(cache_kib=1024))
        cursor = IndexCursor(own.connection)
        cursor.execute(sql, values)
        return cursor

    def count(self, rows: str, *values: Any) -> int:
        """Return how many rows there are; they are counted again once anything was written."""
        # https://www.sqlite.org/pragma.html#pragma_data_version: of this thread's own connection
        version = self.value("PRAGMA data_version")
        counts: dict[Any, tuple[int, int]] = self._local.own.counts
        known, count = counts.get((rows, values), (None, 0))
        if known != version:
            count = self.value(f"SELECT count(*) FROM {rows}", *values)
            if len(counts) >= MAX_COUNTS:
                counts.clear()
            counts[rows, values] = version, count
        return count

    def value(self, sql: str, *values: Any, db: Database | None = None) -> Any:
        """Return the first column of the first row of a SELECT; None if there is no row."""
        row = self.read(sql, *values, db=db).fetchone()
        return row[0] if row else None

    def write(self, apply: Callable[[Database], T], *, durable: bool = True) -> T:
        """Run `apply` in a transaction and return its result once that is committed.

        What `apply` raises is raised here, and only its own changes are undone. With
        `durable=False` a power cut may lose the commit: for what the disk can tell again.
        """
        change = Change(apply, durable)
        self._waiting.append(change)
        with self._lock:
            if not change.done:
                self._commit_waiting()
        if change.error is not None:
            if isinstance(change.error, sqlite3.Error) and is_damage(change.error):
                self.report_damage(str(change.error))
            raise change.error
        result: T = change.result
        return result

    def _commit_waiting(self) -> None:
        changes = [self._waiting.popleft() for _ in range(len(self._waiting))]
        self._commit(changes)
        if unwritten := [each for each in changes if each.error and is_full(each.error)]:
            self.spare.release()
            self._checkpoint()
            self._commit(unwritten)
        if self.spare.missed_at is not None:
            self._checkpoint()
            self.spare.hold()

    def _checkpoint(self) -> None:
        """Bring what is in the WAL into the file, so that it begins anew and does not grow."""
        with contextlib.suppress(sqlite3.OperationalError):
            self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def _commit(self, changes: Sequence[Change]) -> None:
        for change in changes:
            change.error = None
        try:
            durable = True in [change.durable for change in changes]
            if durable != self._durable:
                self._writer.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._durable = durable
            self._writer.execute("BEGIN IMMEDIATE")
            if len(changes) == 1:  # what it raises undoes all there is
                changes[0].result = changes[0].apply(self._writer)
            else:
                for change in changes:
                    self._apply(change)
            self._writer.execute("COMMIT")
        except BaseException as error:  # of the commit: nobody may take his change for kept
            for change in changes:
                change.error = change.error or error
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
        finally:
            for change in changes:
                change.done = True

    def _apply(self, change: Change) -> None:
        self._writer.execute("SAVEPOINT change")
        try:
            change.result = change.apply(self._writer)
        except BaseException as error:  # it is raised again in the thread that asked
            change.error = error
            if not self._writer.in_transaction:  # SQLite has undone all, as on a full disk
                raise
            self._writer.execute("ROLLBACK TO change")
        self._writer.execute("RELEASE change")

    def close(self) -> None:
        """Close every thread's connection: the last one of all processes makes a checkpoint."""
        with self._lock:
            for connection in list(self._connections):
                connection.close()

    def copy_to(self, path: Path) -> None:
        """Write the whole index as it is at this moment to a file, or leave what is there."""
        aside = path.with_name(f"{path.name}.new")
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
        os.close(os.open(aside, os.O_CREAT | os.O_EXCL, 0o600))
        with contextlib.closing(sqlite3.connect(aside)) as target:
            self._writer.backup(target)
        replace_index(aside, path)

    def report_damage(self, problem: str) -> None:
        """Have the index examined when it is opened next, and the program open it anew."""
        with contextlib.suppress(OSError):
            damage_mark(self.path).touch()
        self.on_damage(problem)

    def check(self) -> None:
        """Look for damage in an index that was too large for that at its opening."""
        if self.path.stat().st_size > CHECK_BYTES:
            problem = self.value("PRAGMA quick_check(1)")
            if problem != "ok":
                self.report_damage(problem)

    def count_rows(self) -> tuple[int, ...]:
        """Return how many assets, files, accounts, media records and entities there are."""
        tables = ("asset", "file", "user", "media", "entity")
        counts = ", ".join(f"(SELECT count(*) FROM {table})" for table in tables)
        row: tuple[int, ...] = self.read(f"SELECT {counts}").fetchone()
        return row

    def get_meta(self, key: str) -> str | None:
        """Return what is noted under a key, if anything is."""
        found: str | None = self.value("SELECT value FROM meta WHERE key = ?", key)
        return found

    def set_meta(self, key: str, value: str) -> None:
        """Note something under a key."""
        sql = "REPLACE INTO meta VALUES (?, ?)"
        self.write(lambda db: db.execute(sql, (key, value)), durable=False)


def is_full(error: BaseException | None) -> bool:
    """Return whether it is the disk that had no room (SQLITE_FULL)."""
    return isinstance(error, sqlite3.OperationalError) and "is full" in str(error)


def replace_index(source: Path, target: Path) -> None:
    """Put a closed index in the place of another one, of which nothing may be replayed on it."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{target}-wal")
    os.replace(source, target)


def placeholders(values: Sequence[Any]) -> str:
    """Return a question mark for each of the values, for a list in SQL."""
    return ", ".join("?" * len(values))


INSERT_ASSET = (
    f"INSERT INTO asset ({', '.join(ASSET_NAMES)}) VALUES ({placeholders(ASSET_NAMES)})"
    " ON CONFLICT DO UPDATE SET md5 = coalesce(md5, excluded.md5)"
)


class Assets(Table):
    """What is known of content, wherever it lies."""

    def count_by_kind(self) -> list[tuple[str, int, int]]:
        """Return number and bytes of the assets of each kind."""
        sql = "SELECT coalesce(kind, 'other'), count(*), sum(size) FROM asset GROUP BY kind"
        return self._index.read(sql).fetchall()

    def put(self, db: Database, asset: Asset) -> None:
        """Record an asset, or what is newly known about it."""
        facts = asset.facts or (None,) * len(Facts._fields)
        db.execute(INSERT_ASSET, (asset.sha256, asset.size, asset.md5, asset.thumbnail, *facts))

    def set_facts(self, db: Database, asset: Asset) -> None:
        """Note the facts of an asset, if they are others than before."""
        if (facts := asset.facts) is None:
            return
        names, values = ", ".join(Facts._fields), placeholders(facts)
        sql = f"UPDATE asset SET ({names}) = ({values})"
        sql += f" WHERE sha256 = ? AND ({names}) IS NOT ({values})"
        if not db.execute(sql, (*facts, asset.sha256, *facts)).rowcount:
            return
        sql = "SET (kind, mime_type, extension) = (?, ?, ?) WHERE sha256 = ?"
        copies = (facts.kind, facts.mime_type, facts.extension, asset.sha256)
        db.execute(f"UPDATE entity {sql}", copies)
        # By their paths, of which there is an index: current and older versions.
        paths = "SELECT CAST(path AS TEXT) FROM file WHERE root = 'entities' AND sha256 = ?"
        db.execute(f"UPDATE entity_version {sql} AND path IN ({paths})", (*copies, asset.sha256))

    def is_known(self, sha256: str) -> bool:
        """Return whether there is an asset of this content."""
        return bool(self._index.value("SELECT 1 FROM asset WHERE sha256 = ?", sha256))

    def drop_unused(self, db: Database, sha256: str) -> bool:
        """Forget an asset that no file has; return whether it was forgotten."""
        unused = "NOT EXISTS (SELECT 1 FROM file WHERE file.sha256 = asset.sha256)"
        sql = f"DELETE FROM asset WHERE sha256 = ? AND {unused}"
        return db.execute(sql, (sha256,)).rowcount > 0

    def set_thumbnail(self, sha256: str, *, made: bool) -> bool:
        """Note whether a thumbnail could be made; return whether the asset is still known."""
        sql = "UPDATE asset SET thumbnail = ? WHERE sha256 = ?"
        return self._change(sql, int(made), sha256, durable=False)

    def private_with_thumbnail(self) -> list[str]:
        """Return hashes of what is among the private images alone and has a thumbnail."""
        rows = self._index.read(
            "SELECT DISTINCT sha256 FROM file JOIN asset USING (sha256) WHERE root = 'images'"
            " AND thumbnail = 1 AND NOT EXISTS (SELECT 1 FROM file AS other"
            " WHERE other.sha256 = file.sha256 AND other.root = 'library')"
        )
        return [row[0] for row in rows]

    def retry_thumbnails(self) -> None:
        """Forget failures, after other decoders have been installed."""
        sql = "UPDATE asset SET thumbnail = NULL WHERE thumbnail = 0"
        self._change(sql, durable=False)

    def without_thumbnail(self, kinds: Sequence[str], limit: int, after: str) -> list[Located]:
        """Return some files without a verdict on their thumbnail, by their hashes, `after` one."""
        sql = (
            f"SELECT {FILE_COLUMNS}, {ASSET_COLUMNS} FROM asset JOIN file USING (sha256)"
            f" WHERE thumbnail IS NULL AND asset.sha256 > ? AND kind IN ({placeholders(kinds)})"
            " AND root = 'library' GROUP BY asset.sha256 LIMIT ?"
        )
        rows = self._index.read(sql, after, *kinds, limit)
        return [located(row) for row in rows]


def upsert(db: Database, table: str, columns: tuple[str, ...], row: Sequence[Any]) -> Any:
    """Add a row or change the one with its id, which is the first column; return that id."""
    changes = ", ".join([f"{name} = excluded.{name}" for name in columns[1:]])
    into = f"{table} ({', '.join(columns)}) VALUES ({placeholders(columns)})"
    sql = f"INSERT INTO {into} ON CONFLICT (id) DO UPDATE SET {changes} RETURNING id"
    return db.execute(sql, row).fetchone()[0]


BEHIND_ALL = b"\xff" * 256  # no name is as long, so that all of a folder come before it


class Files(Rows[Located]):
    """Files on disk, by folder and path."""

    def __init__(self, index: Index) -> None:
        super().__init__(index, File, "file")
        self._make, self._rows = located, SELECT_LOCATED  # each with its asset

    def put(self, db: Database, file: File, asset: Asset) -> str | None:
        """Record `file`; return the hash of the content that was there and is now nowhere."""
        self._index.assets.put(db, asset)
        key = (file.root, os.fsencode(file.path))
        state = (file.sha256, file.size, file.mtime_ns, file.ctime)
        sql = "INSERT INTO file VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
        if db.execute(sql, (*key, *state, file.added)).rowcount:
            return None
        this = "WHERE root = ? AND path = ?"
        (old,) = db.execute(f"SELECT sha256 FROM file {this}", key).fetchone()
        changes = "sha256 = ?, size = ?, mtime_ns = ?, ctime = ?"
        db.execute(f"UPDATE file SET {changes} {this}", (*state, *key))
        return old if self._index.assets.drop_unused(db, old) else None

    def remove(
        self, db: Database, root: str, path: str, before: float = math.inf
    ) -> tuple[str, bool] | None:
        """Forget a file added `before`; return its hash, and whether it was the last of it."""
        sql = "DELETE FROM file WHERE root = ? AND path = ? AND added < ? RETURNING sha256"
        row = db.execute(sql, (root, os.fsencode(path), before)).fetchone()
        return (row[0], self._index.assets.drop_unused(db, row[0])) if row else None

    def remove_all(
        self, db: Database, root: str, paths: Iterable[str], before: float = math.inf
    ) -> list[str]:
        """Forget files; return the hashes of those contents that are now nowhere."""
        removed = [self.remove(db, root, path, before) for path in paths]
        return [sha256 for sha256, dropped in filter(None, removed) if dropped]

    def get(self, root: str, path: str) -> Located | None:
        """Return the file at a path of a root, with its asset, if it is known."""
        return self._first("WHERE root = ? AND path = ?", root, os.fsencode(path))

    def with_content(self, sha256: str, *roots: str) -> list[Located]:
        """Return the files of an asset in some folders, or everywhere, by path."""
        which = f"sha256 = ? AND root IN ({placeholders(roots)})" if roots else "sha256 = ?"
        return self._all(f"WHERE {which} ORDER BY root DESC, path", sha256, *roots)

    def readable(
        self, sha256: str, roots: Sequence[str], user_id: int | None, *, trashed: bool = False
    ) -> list[Located]:
        """Return an asset's files in some folders, the library first, or of a user's records."""
        own = (
            "root = 'users' AND EXISTS (SELECT 1 FROM media WHERE user_id = ?"
            " AND media.path = CAST(file.path AS TEXT) AND is_deleted <= ?)"
        )
        condition = f"file.sha256 = ? AND (root IN ({placeholders(roots)}) OR {own})"
        rest = f"WHERE {condition} ORDER BY root != 'library'"
        return self._all(rest, sha256, *roots, user_id, trashed)

    def in_order(self, root: str) -> Iterator[tuple[bytes, int, int, float]]:
        """Yield path and state of every file of a folder in the order of the paths' bytes."""
        return self._rows_in_order("path, size, mtime_ns, ctime", root)

    def of_root(self, root: str) -> Iterator[File]:
        """Yield every file of a folder in the order of the paths' bytes."""
        rows = self._rows_in_order(", ".join(File._fields[1:]), root)
        return (File(root, os.fsdecode(path), *rest) for path, *rest in rows)

    def _rows_in_order(self, columns: str, root: str) -> Iterator[Any]:
        """Yield rows, path first, page by page: a long read would keep the WAL from folding."""
        rows = f"SELECT {columns} FROM file WHERE root = ? AND path > ?"
        sql, last = f"{rows} ORDER BY path LIMIT 2000", b""
        while page := self._index.read(sql, root, last).fetchall():
            yield from page
            last = page[-1][0]

    def duplicates(self) -> list[list[str]]:
        """Return the paths in the library that have the same content, by content."""
        several = "SELECT sha256 FROM file WHERE root = 'library' GROUP BY sha256"
        rows = self._index.read(
            "SELECT sha256, path FROM file WHERE root = 'library' AND sha256 IN"
            f" ({several} HAVING count(*) > 1) ORDER BY sha256, path"
        )
        groups = itertools.groupby(rows, lambda row: row[0])
        return [[os.fsdecode(path) for _, path in group] for _, group in groups]

    def total_size(self, since: float = 0.0) -> int:
        """Return how many bytes the files have that came in or changed `since`."""
        sql = "SELECT coalesce(sum(size), 0) FROM file WHERE max(added, ctime, mtime_ns / 1e9) >="
        return int(self._index.value(f"{sql} ?", since))

    def set_times(self, db: Database, file: File, mtime_ns: int, ctime: float) -> None:
        """Note the times of a file that was copied."""
        sql = "UPDATE file SET mtime_ns = ?, ctime = ? WHERE root = ? AND path = ?"
        db.execute(sql, (mtime_ns, ctime, file.root, os.fsencode(file.path)))

    def is_empty(self, root: str, below: str = "", *, beside: bool = False) -> bool:
        """Return whether no file of a folder is known below, or only `beside`, another in it."""
        first = os.fsencode(below)
        ranges = ("path < ?2", "path >= ?3") if beside else ("path >= ?2 AND path < ?3",)
        # Each is looked up in the table's key; with OR every file of the folder would be read.
        rows = [f"SELECT 1 FROM file WHERE root = ?1 AND {which}" for which in ranges]
        sql = f"{' UNION ALL '.join(rows)} LIMIT 1"
        return self._index.value(sql, root, first, first + BEHIND_ALL) is None

    def library(self) -> Iterator[tuple[str, str, int, float]]:
        """Return sha256, path, mtime_ns and time made of each content, at its first path in order.

        The time is that of capture for an image that tells one, else the file's ctime.
        """
        rows = self._index.read(
            "SELECT sha256, min(path), mtime_ns,"
            " coalesce(CASE WHEN kind = 'image' THEN created END, ctime)"
            " FROM file JOIN asset USING (sha256) WHERE root = 'library' GROUP BY sha256"
        )
        return ((row[0], os.fsdecode(row[1]), row[2], row[3]) for row in rows)

    def known_hash(self, db: Database, file: File) -> str | None:
        """Return the hash under which a file is known by now; None if it is not."""
        sql = "SELECT sha256 FROM file WHERE root = ? AND path = ?"
        found: str | None = self._index.value(sql, file.root, os.fsencode(file.path), db=db)
        return found

    def shown(self, folder: str, *, below: bool) -> Iterator[GalleryItem]:
        """Return the library's media in a folder, and below it if wanted, the newest first."""
        prefix = os.fsencode(f"{folder}/") if folder else b""
        flat = "" if below else "AND instr(substr(path, length(?1) + 1), x'2f') = 0"
        source = (
            "SELECT asset.*, min(path) AS path, coalesce(created, mtime_ns / 1e9) AS moment,"
            " NULL AS id FROM file JOIN asset USING (sha256) WHERE root = 'library'"
            f" AND kind IS NOT NULL AND path >= ?1 AND path < ?2 {flat} GROUP BY sha256"
        )
        return read_gallery(self._index, source, prefix, prefix + BEHIND_ALL)

    def library_version(self) -> str | None:
        """Return what changes with everything that lists of the library show."""
        return self._index.get_meta("library_version")

    def count_media(self) -> int:
        """Return how many files public uploads have."""
        return self._index.count(f"file WHERE {IN_MEDIA}")

    def media(self, limit: int, offset: int) -> Iterator[tuple[str, str, int, str | None, float]]:
        """Yield path, hash, size, MIME type and time added of the public images, newest first."""
        columns = "path, sha256, file.size, mime_type, added FROM file JOIN asset USING (sha256)"
        order = "ORDER BY added DESC, path DESC LIMIT ? OFFSET ?"
        rows = self._index.read(f"SELECT {columns} WHERE {IN_MEDIA} {order}", limit, offset)
        return ((os.fsdecode(row[0]), *row[1:]) for row in rows)


MANY_ROWS = 500  # fetched with one call


class GalleryItem(NamedTuple):
    """An asset as the gallery shows it."""

    sha256: str
    path: bytes
    kind: str
    size: int
    width: int | None  # as stored
    height: int | None
    orientation: int | None
    duration: float | None
    make: str | None
    model: str | None
    latitude: float | None
    longitude: float | None
    altitude: float | None
    created_source: str | None
    taken: str | None  # this place's wall clock, as YYYY-MM and seconds; null: beyond SQLite's
    id: str | None  # of the media record or entity that it is shown as


def read_gallery(index: Index, source: str, *values: Any) -> Iterator[GalleryItem]:
    """Read what is shown, the newest first; `source` gives an asset, its path, moment and id."""
    taken = "strftime('%Y-%m %s', moment, 'unixepoch', 'localtime') AS taken"
    columns = ", ".join(GalleryItem._fields)
    sql = f"SELECT {columns} FROM (SELECT *, {taken} FROM ({source}) ORDER BY moment DESC, path)"
    rows = index.read(sql, *values)
    while batch := rows.fetchmany(MANY_ROWS):
        yield from map(GalleryItem._make, batch)


class User(NamedTuple):
    """An account."""

    id: int
    email: str
    username: str | None
    phone_number: str | None
    first_name: str
    last_name: str
    password: str  # its hash
    permissions: str  # words
    is_active: bool
    tokens_from: int = 0  # when tokens are issued that are good

    def __repr__(self) -> str:
        return f"User(id={self.id}, email={self.email!r})"  # the hash is for no log


class Users(Rows[User]):
    """Accounts."""

    def get(self, user_id: int) -> User | None:
        """Return the account with this id, if there is one."""
        return self._first("WHERE id = ?", user_id)

    def active(self, user_id: int, db: Database) -> User | None:
        """Return the account with this id, unless it is disabled."""
        return self._first("WHERE id = ? AND is_active", user_id, db=db)

    def present(self, principal: Principal) -> Principal | None:
        """Return what a principal may do by now; None if its account is disabled, or was since.

        A token's permissions are good for as long as it is. What lasts longer has those that its
        account still has, and ends with the session that it comes from.
        """
        sql = (
            "SELECT is_active AND tokens_from <= ?1, permissions, ?2 = '' OR EXISTS"
            " (SELECT 1 FROM session WHERE id = ?2 AND user_id = user.id) FROM user WHERE id = ?3"
        )
        about = (principal.issued, principal.session, principal.user_id)
        row = self._index.read(sql, *about).fetchone()
        if row is None or (row[0] and principal.kind == "token"):
            return principal  # another program's account, or none
        kept = principal.permissions.intersection(row[1].split())
        return principal._replace(permissions=kept) if row[0] and row[2] else None

    def find(self, name: str) -> User | None:
        """Return the account with this e-mail in any case, else with this username."""
        rest = "WHERE email_key = ? OR username = ? ORDER BY email_key = ? DESC LIMIT 1"
        return self._first(rest, name.casefold(), name, name.casefold())

    def all(self) -> list[User]:
        """Return all accounts, the oldest first."""
        return self._all("ORDER BY id")

    def created(self, user_id: int) -> float:
        """Return when an account was made, here or in the program that it was imported from."""
        return self._index.value("SELECT created_at FROM user WHERE id = ?", user_id) or 0.0

    def taken(self, values: Mapping[str, Any], db: Database | None = None) -> list[str]:
        """Return the unique fields that another account has; a login takes e-mail and username."""
        email, username = values.get("email", ""), values.get("username")
        as_email = username and username.casefold()
        unique: dict[str, tuple[Any, ...]] = {
            "email": ("email_key = ?1 OR username IN (?1, ?2)", email.casefold(), email),
            "username": ("email_key = ?1 OR username = ?2", as_email, username),
            "phone_number": ("phone_number = ?", values.get("phone_number")),
        }
        find, sql = functools.partial(self._index.value, db=db), "SELECT 1 FROM user WHERE"
        return [name for name, (which, *v) in unique.items() if find(f"{sql} {which}", *v)]

    def add(self, db: Database, values: Mapping[str, Any], now: float) -> User:
        """Write a new account; an `id` among the values is that of another program."""
        row = {"id": self._free_id(db), "first_name": "", "last_name": "", **values}
        row |= {"email_key": values["email"].casefold(), "created_at": now}
        into = f"user ({', '.join(row)}) VALUES ({placeholders([*row])})"
        sql = f"INSERT INTO {into} RETURNING {self._columns}"
        return User(*db.execute(sql, [*row.values()]).fetchone())

    def _free_id(self, db: Database) -> int:
        """Return the next id, but none under which another program's user has records here."""
        value = functools.partial(self._index.value, db=db)
        last = value("SELECT seq FROM sqlite_sequence WHERE name = 'user'") or 0
        used = "SELECT 1 FROM {} WHERE user_id = ?"
        owners = " UNION ALL ".join(used.format(table) for table in ("media", "collection"))
        return next(id for id in itertools.count(last + 1) if not value(owners, id, id))

    def set_password(self, db: Database, user: User, password: str) -> bool:
        """Change the hash, unless another request was faster, and end all sessions."""
        sql = "UPDATE user SET password = ? WHERE id = ? AND password = ?"
        changed = db.execute(sql, (password, user.id, user.password)).rowcount > 0
        if changed:
            self._index.sessions.end_all(db, user.id)
        return changed

    def set_active(self, db: Database, user: User, *, active: bool) -> None:
        """Let an account in, or keep it out for good with all tokens and links that it has."""
        # A clock that was wrong at its disabling must not keep out the tokens of later logins.
        sql = "UPDATE user SET is_active = ?, tokens_from = iif(?, min(tokens_from, ?), ?)"
        soon = int(time.time()) + 1
        db.execute(f"{sql} WHERE id = ?", (active, active, soon, soon, user.id))
        if not active:
            self._index.sessions.end_all(db, user.id)
            db.execute("DELETE FROM share WHERE owner = ?", (user.id,))

    def change_permissions(self, db: Database, user: User, add: Set[str], drop: Set[str]) -> None:
        """Add and drop words of an account's permissions."""
        words = self._index.value("SELECT permissions FROM user WHERE id = ?", user.id, db=db)
        words = " ".join(sorted((set(words.split()) | add) - drop))
        db.execute("UPDATE user SET permissions = ? WHERE id = ?", (words, user.id))


class RefreshToken(NamedTuple):
    """What the index knows a refresh token by."""

    session: str
    jti: str
    user_id: int


class Session(NamedTuple):
    """A login and the refresh tokens that followed from it; times in Unix seconds."""

    id: str
    user_id: int
    jti: str  # of its one refresh token that is not spent
    rotated_at: float  # when that one was issued
    expires_at: float
    created_at: float
    previous_jti: str | None = None  # of the token that was spent for it
    address: str = ""
    user_agent: str = ""


MAX_SESSIONS = 1000  # of an account; a further login ends the one that expires first
RETRY_SECONDS = 10  # in which a spent refresh token gives its successor again


class Sessions(Rows[Session]):
    """Logins; each has one refresh token that is not spent."""

    def open(self, db: Database, user: User, session: Session) -> bool:
        """Begin a session, unless the account was disabled or its password changed meanwhile."""
        opened = db.execute(
            f"INSERT INTO session ({self._columns}) SELECT {placeholders(session)} FROM user"
            " WHERE id = ? AND password = ? AND is_active",
            (*session, user.id, user.password),
        ).rowcount
        db.execute("DELETE FROM session WHERE expires_at < ?", (session.created_at - LEEWAY,))
        surplus = "SELECT id FROM session WHERE user_id = ? ORDER BY expires_at DESC LIMIT -1"
        values = (user.id, MAX_SESSIONS)
        db.execute(f"DELETE FROM session WHERE id IN ({surplus} OFFSET ?)", values)
        return opened > 0

    def rotate(
        self, db: Database, token: RefreshToken, jti: str, *, arrived: float, lifetime: int
    ) -> tuple[User, Session] | None:
        """Spend a refresh token for the one with `jti`; None if it is no good any more.

        One that comes back at once is another tab's, or its answer was lost: it gets the same
        successor. Any other spent one was stolen: its session ends.
        """
        session = self._of_token(db, token)
        if session is None:
            return None
        at_once = abs(arrived - session.rotated_at) <= RETRY_SECONDS
        if token.jti == session.jti:
            now = time.time()
            session = session._replace(
                jti=jti, previous_jti=session.jti, rotated_at=now, expires_at=int(now) + lifetime
            )
            upsert(db, "session", Session._fields, session)
        elif token.jti != session.previous_jti or not at_once:
            self.end(db, session.user_id, session.id)
            return None
        user = self._index.users.active(token.user_id, db)
        return (user, session) if user else None

    def spend(self, db: Database, token: RefreshToken) -> bool:
        """End the session of a refresh token; return whether the token was still good."""
        session = self._of_token(db, token)
        good = session is not None and session.jti == token.jti
        return good and self.end(db, token.user_id, token.session)

    def _of_token(self, db: Database, token: RefreshToken) -> Session | None:
        return self._first("WHERE id = ? AND user_id = ?", token.session, token.user_id, db=db)

    def of_user(self, user_id: int, now: float) -> list[Session]:
        """Return the sessions of an account that have not expired, last used first."""
        which = "WHERE user_id = ? AND expires_at > ?"
        return self._all(f"{which} ORDER BY rotated_at DESC, id", user_id, now)

    def end(self, db: Database, user_id: int, id: str) -> bool:
        """End one session of an account; return whether there was one."""
        sql = "DELETE FROM session WHERE id = ? AND user_id = ?"
        return db.execute(sql, (id, user_id)).rowcount > 0

    def end_all(self, db: Database, user_id: int) -> int:
        """End the sessions of an account; return how many there were."""
        return db.execute("DELETE FROM session WHERE user_id = ?", (user_id,)).rowcount


class TokenUses(Table):
    """How often scoped tokens that are good for some uses were used, and ended view cookies."""

    def consume(self, grant: Grant, now: float) -> bool:
        """Count a use; return whether there was one left."""

        def apply(db: Database) -> bool:
            db.execute("DELETE FROM token_use WHERE expires_at < ?", (now,))
            sql = (
                "INSERT INTO token_use VALUES (?, 1, ?)"
                " ON CONFLICT (id) DO UPDATE SET used = used + 1 WHERE used < ?"
            )
            return db.execute(sql, (grant.id, grant.expires, grant.uses)).rowcount == 1

        return self._index.write(apply)

    def is_used(self, id: str) -> bool:
        """Return whether a token was used, or a view cookie ended."""
        return bool(self._index.value("SELECT 1 FROM token_use WHERE id = ?", id))

    def refund(self, grant: Grant) -> None:
        """Count a use less: the request failed."""
        self._change("UPDATE token_use SET used = used - 1 WHERE id = ?", grant.id)


class Share(NamedTuple):
    """A link to files; the fields are the columns of the table."""

    id: str
    owner: int | None
    kind: str
    root: str
    target: str
    title: str = ""
    strips: int = 0
    takes: int = 0
    password: str | None = None
    created_at: float = 0.0
    expires_at: float | None = None


OF_COLLECTION = "FROM media WHERE collection_id = ?2 AND user_id = ?3 AND is_deleted = 0"
SHARED_FILES = {  # what a share of the folder ?1, with the target ?2 of the owner ?3, shows
    "file": "root = ?1 AND file.sha256 = ?2",
    "folder": "root = ?1"
    " AND file.path > CAST(?2 || '/' AS BLOB) AND file.path < CAST(?2 || '0' AS BLOB)",
    "media": "root = ?1 AND file.path = (SELECT CAST(path AS BLOB) FROM media"
    " WHERE id = ?2 AND user_id = ?3 AND is_deleted = 0)",
    "collection": f"(root = ?1 AND file.path IN (SELECT CAST(path AS BLOB) {OF_COLLECTION})"
    " OR ?5 AND (+root = 'library' OR +root = 'entities' AND EXISTS (SELECT 1 FROM entity"
    " WHERE sha256 = file.sha256 AND is_deleted = 0)) AND file.sha256 IN"  # found by that
    f" (SELECT sha256 {OF_COLLECTION})) GROUP BY file.sha256",
    "entity": "root = ?1 AND file.path IN (SELECT CAST(path AS BLOB) FROM entity"
    " WHERE (id = ?2 OR parent_id = ?2) AND is_deleted = 0)",
}


class ShareLinks(Rows[Share]):
    """Links that show files to who has no account."""

    def add(self, share: Share, now: float) -> None:
        """Write a new share; what has expired goes."""

        def apply(db: Database) -> None:
            db.execute("DELETE FROM share WHERE expires_at < ?", (now,))
            db.execute(f"INSERT INTO share VALUES ({placeholders(share)})", share)

        self._index.write(apply)

    def get(self, id: str, now: float) -> Share | None:
        """Return the share of this id, unless it has expired."""
        return self._first("WHERE id = ? AND (expires_at IS NULL OR expires_at > ?)", id, now)

    def all(self, now: float, owner: int | None, everyone: bool) -> list[Share]:
        """Return the shares of an owner, or all; the newest first."""
        good = "(expires_at IS NULL OR expires_at > ?) AND (owner IS ? OR ?)"
        return self._all(f"WHERE {good} ORDER BY created_at DESC, id", now, owner, everyone)

    def remove(self, id: str, owner: int | None, everyone: bool) -> bool:
        """End a share of an owner, or anybody's; return whether there was one."""
        sql = "DELETE FROM share WHERE id = ? AND (owner IS ? OR ?)"
        return self._change(sql, id, owner, everyone)

    def files(
        self, share: Share, *, reads: bool, sha256: str = "", limit: int = -1
    ) -> list[Located]:
        """Return what a share shows, or only what of it has an asset, in the order of the paths.

        `reads`: whether its owner may read what others have as well.
        """
        chosen = f"{'sha256 = ?4 AND ' * bool(sha256)}{SHARED_FILES[share.kind]}"
        sql = f"{SELECT_LOCATED} WHERE {chosen} ORDER BY path LIMIT ?6"
        target = int(share.target) if share.kind == "entity" else share.target
        rows = self._index.read(sql, share.root, target, share.owner, sha256, reads, limit)
        return [located(row) for row in rows]


FAILURE_SECONDS = 15 * 60  # the window in which failed logins are counted
CHECKING_SECONDS = 60  # a check that takes longer was cut off by a crash: it has failed


class LoginFailures(Table):
    """Failed logins of the last minutes, by account and by address.

    A login counts as failed from its beginning until it succeeds, so that many at once, in
    whichever worker, get no further than one after the other.
    """

    def retry_after(self, limits: Mapping[str, int], now: float) -> float:
        """Return seconds until a login may be tried: 0, unless a key has reached its limit."""
        sql = (
            "SELECT failed_at FROM login_failure WHERE key = ? AND failed_at > ? AND failed_at < ?"
            " AND (is_certain OR failed_at < ?) ORDER BY failed_at DESC LIMIT 1 OFFSET ?"
        )
        since, ahead = now - FAILURE_SECONDS, now + CHECKING_SECONDS
        window = (since, ahead, now - CHECKING_SECONDS)
        values = [(self._digest(key), *window, n - 1) for key, n in limits.items()]
        rows = [self._index.read(sql, *value).fetchone() for value in values]
        return max((row[0] - since for row in rows if row), default=0.0)

    def begin(self, attempt: str, limits: Mapping[str, int], now: float) -> bool:
        """Count a login as failed for now, if its keys' limits leave room for one more."""

        def apply(db: Database) -> bool:
            # What is far ahead was counted by a clock that was wrong.
            sql = "DELETE FROM login_failure WHERE failed_at <= ? OR failed_at >= ?"
            db.execute(sql, (now - FAILURE_SECONDS, now + CHECKING_SECONDS))
            for key, limit in limits.items():
                sql = "SELECT count(*) FROM login_failure WHERE key = ?"
                if self._index.value(sql, self._digest(key), db=db) >= limit:
                    return False
            values = [(self._digest(key), now, attempt) for key in limits]
            db.executemany("INSERT INTO login_failure VALUES (?, ?, ?, 0)", values)
            return True

        return self._index.write(apply, durable=False)

    def end(self, attempt: str, succeeded_for: str | None) -> None:
        """Record how a login ended; a success also clears the count of its account."""

        def apply(db: Database) -> None:
            if succeeded_for is None:
                db.execute("UPDATE login_failure SET is_certain = 1 WHERE attempt = ?", (attempt,))
            else:
                sql = "DELETE FROM login_failure WHERE attempt = ? OR (key = ? AND is_certain)"
                db.execute(sql, (attempt, self._digest(succeeded_for)))

        self._index.write(apply, durable=False)

    def withdraw(self, attempt: str) -> None:
        """Forget a login of which nothing was found out."""
        self._change("DELETE FROM login_failure WHERE attempt = ?", attempt, durable=False)

    def clear(self, key: str) -> None:
        """Forget the failures under a key."""
        sql = "DELETE FROM login_failure WHERE key = ?"
        self._change(sql, self._digest(key), durable=False)

    @staticmethod
    def _digest(key: str) -> str:
        """Return the hash of a key: names can be long, and people type passwords there."""
        return hashlib.sha256(_utf8(key)).hexdigest()


class Collection(NamedTuple):
    """A user's collection of media records."""

    id: str
    user_id: int
    name: str
    description: str | None
    created_at: float
    updated_at: float


class MediaRecord(NamedTuple):
    """A user's record of an image, video or audio, with its file or without."""

    id: str
    user_id: int
    name: str
    type: str
    size: int | None
    path: str | None  # of the file in the folder `users`
    note: str | None
    description: str | None
    collection_id: str | None
    created_at: float
    updated_at: float
    sha256: str | None = None  # of the asset that a record without a file of its own shows


def search_text(*texts: str | None) -> str:
    """Return texts as searches compare them, without case; no match reaches into the next one.

    >>> search_text("STRASSE", None, "Ä") == search_text("straße", "", "ä")
    True
    """
    return "\0".join([(text or "").casefold() for text in texts])  # no client's text has a NUL


Record = TypeVar("Record", bound="Collection | MediaRecord")


class Query(NamedTuple):
    """Which of a user's records are asked for; the columns' names are the program's own words."""

    user_id: int
    equal: tuple[tuple[str, str], ...] = ()  # column and value
    terms: tuple[str, ...] = ()  # case-folded; each is in the name or in the description
    order: tuple[tuple[str, bool], ...] = ()  # column, and whether it is descending


class OwnedTable(Rows[Record]):
    """Records of users in one table; every method asks whose, so that nobody meets another's."""

    _condition = "1"  # which of the rows there are for users

    def _where(self, query: Query) -> tuple[str, list[Any]]:
        equal = [(f"{column} = ?", value) for column, value in query.equal]
        terms = [("instr(folded, ?)", term) for term in query.terms]
        own = ("user_id = ?", query.user_id), (self._condition, None)
        return where_clause(*own, *equal, *terms)

    def count(self, query: Query) -> int:
        """Return how many rows fit a query."""
        which, values = self._where(query)
        return self._index.count(f"{self._table} {which}", *values)

    def each(self, query: Query, limit: int = -1, offset: int = 0) -> Iterator[Record]:
        """Return the records that fit, in the query's order, those equal in that by their ids."""
        which, values = self._where(query)
        order = query.order or (("created_at", True),)
        words = [f"{c} {'DESC' if down else 'ASC'}" for c, down in (*order, ("id", order[-1][1]))]
        sql = f"{self._rows} {which} ORDER BY {', '.join(words)} LIMIT ? OFFSET ?"
        return map(self._make, self._index.read(sql, *values, limit, offset))

    def get(self, user_id: int, key: str, db: Database | None = None) -> Record | None:
        """Return one record by its id, in the transaction of `db` where there is one."""
        record = self.of_anyone(key, db)
        return record if record and record.user_id == user_id else None

    def of_anyone(self, key: str, db: Database | None = None) -> Record | None:
        """Return one record by its id, for who has shown leave to read it."""
        return self._first(f"WHERE id = ? AND {self._condition}", key, db=db)

    def put(self, db: Database, record: Record) -> None:
        """Add a record or change the one with its id."""
        row = [*record, search_text(record.name, record.description)]
        upsert(db, self._table, (*record._fields, "folded"), row)

    def is_known(self, key: str) -> bool:
        """Return whether there is something with this id, softly deleted or not."""
        return bool(self._index.value(f"SELECT 1 FROM {self._table} WHERE id = ?", key))


class Collections(OwnedTable[Collection]):
    """Users' collections."""

    def remove(self, user_id: int, key: str) -> bool:
        """Delete a collection and keep its media; return whether there was one."""

        def apply(db: Database) -> int:
            sql = "DELETE FROM collection WHERE id = ? AND user_id = ?"
            removed = db.execute(sql, (key, user_id)).rowcount
            if removed:
                db.execute("DELETE FROM media WHERE collection_id = ? AND sha256 NOTNULL", (key,))
                sql = "UPDATE media SET collection_id = NULL WHERE collection_id = ?"
                db.execute(sql, (key,))
            return removed

        return self._index.write(apply) > 0


class MediaRecords(OwnedTable[MediaRecord]):
    """Users' records of media."""

    _condition = "is_deleted = 0"

    def put(self, db: Database, record: MediaRecord) -> None:
        """Add a record or change the one with its id; a collection shows an asset once."""
        super().put(db, record)
        same = "user_id = ? AND collection_id = ? AND sha256 = ? AND id != ?"  # perhaps deleted
        values = (record.user_id, record.collection_id, record.sha256, record.id)
        db.execute(f"DELETE FROM media WHERE {same}", values)

    def stored_bytes(self, user_id: int, db: Database | None = None) -> int:
        """Return what a user's files take, those of softly deleted records included."""
        sql = "SELECT coalesce(sum(size), 0) FROM media WHERE user_id = ? AND path IS NOT NULL"
        return int(self._index.value(sql, user_id, db=db))

    def release_path(self, db: Database, path: str) -> None:
        """Have no record claim a path that is free on disk: its file was removed by hand."""
        db.execute("UPDATE media SET path = NULL WHERE path = ?", (path,))

    def shown_in(self, db: Database, user_id: int, key: str) -> set[str]:
        """Return the assets that a user's collection shows without a file of their own."""
        where = "collection_id = ? AND user_id = ? AND is_deleted = 0 AND sha256 NOTNULL"
        rows = db.execute(f"SELECT sha256 FROM media WHERE {where}", (key, user_id))
        return {row[0] for row in rows}

    def remove_if_uncollected(self, db: Database, key: str) -> None:
        """Forget a media record that shows an asset in no collection."""
        where = "id = ? AND collection_id IS NULL AND sha256 NOTNULL"
        db.execute(f"DELETE FROM media WHERE {where}", (key,))

    def soft_delete(self, db: Database, user_id: int, key: str, now: float) -> bool:
        """Delete softly, as media records are; return whether there was one."""
        where = "id = ? AND user_id = ? AND is_deleted = 0"
        sql = f"UPDATE media SET is_deleted = 1, updated_at = ? WHERE {where}"
        return db.execute(sql, (now, key, user_id)).rowcount > 0

    def restore(self, key: str, now: float) -> bool:
        """Bring back what was deleted softly; return whether there was such a record."""
        changed = "UPDATE media SET is_deleted = 0, updated_at = ? WHERE id = ? AND is_deleted"
        return self._change(changed, now, key)

    def remove(self, db: Database, key: str) -> list[str]:
        """Forget a record; return the path of its file, if it had one."""
        path = self._index.value("DELETE FROM media WHERE id = ? RETURNING path", key, db=db)
        return [path] if path else []


def clamp(number: int) -> int:
    """Return the nearest number that SQLite can keep and compare with."""
    return max(-MAX_BYTES, min(number, MAX_BYTES))


class Entities(Table):
    """Entities and their versions; what is not told otherwise is about current ones."""

    def get(
        self, id: int, version: int | None = None, db: Database | None = None
    ) -> Entity | None:
        """Return an entity as it is, or as it was in a version; None if there is none."""
        return next(iter(self.get_many([id], version, db)), None)

    def versions(self, id: int) -> list[Entity]:
        """Return all versions of one, the oldest first."""
        select = self._select("entity_version")
        rows = self._index.read(f"{select} WHERE id = ? ORDER BY version", id)
        return [Entity.from_row(row) for row in rows]

    def page(
        self, version: int | None, filters: Mapping[str, Any], text: str,
        *, limit: int, offset: int,
    ) -> tuple[list[tuple[int, int]], int]:  # fmt: skip
        """Return the ids and transactions of some of those that fit, by id, and how many fit.

        Of each its version `version`; `filters` are columns and their values, and `text` is in
        the label or description.
        """
        chosen, values = self._where(version, filters, text)
        count = self._index.count(chosen, *values)
        sql = f"SELECT id, transaction_id FROM {chosen} ORDER BY id LIMIT ? OFFSET ?"
        return self._index.read(sql, *values, limit, offset).fetchall(), count

    def get_many(
        self, ids: Sequence[int], version: int | None, db: Database | None = None
    ) -> list[Entity]:
        """Return those of some entities that are there, by id; of each its version `version`."""
        which = "" if version is None else "AND version = ?"
        select = self._select("entity_version" if which else "entity")
        sql = f"{select} WHERE id IN ({placeholders(ids)}) {which} ORDER BY id"
        values = ids if version is None else (*ids, clamp(version))
        return [Entity.from_row(row) for row in self._index.read(sql, *values, db=db)]

    def _select(self, table: str) -> str:
        """Return all there is to read of an entity."""
        columns = ", ".join(f"entity.{name}" for name in ENTITY_COLUMNS)
        joined = f"{table} AS entity LEFT JOIN asset ON asset.sha256 = entity.sha256"
        return f"SELECT {columns}, {ASSET_COLUMNS} FROM {joined}"

    def _where(
        self, version: int | None, filters: Mapping[str, Any], text: str
    ) -> tuple[str, list[Any]]:
        """Return a table and its condition; booleans are written out for the partial indexes."""
        chosen = [] if version is None else [("version = ?", clamp(version))]
        found = [("instr(search, ?)", search_text(text))] if text else []
        equal = [
            (f"{column} = {value:d}", None) if isinstance(value, bool)
            else (f"{column} IS ?", clamp(value) if isinstance(value, int) else value)
            for column, value in filters.items()
        ]  # fmt: skip
        which, values = where_clause(*chosen, *equal, *found)
        return f"{'entity_version' if chosen else 'entity'} {which}", values

    def with_content(self, sha256: str, db: Database | None = None) -> int | None:
        """Return the entity that has an asset."""
        sql = "SELECT id FROM entity WHERE sha256 = ?"
        id: int | None = self._index.value(sql, sha256, db=db)
        return id

    def is_within(self, id: int, collection: int, db: Database | None = None) -> bool:
        """Return whether an entity is a collection, or in it, however deep."""
        above = "VALUES (?) UNION SELECT parent_id FROM entity JOIN above USING (id)"
        sql = f"WITH RECURSIVE above (id) AS ({above}) SELECT 1 FROM above WHERE id = ?"
        return bool(self._index.value(sql, id, collection, db=db))

    def put(self, db: Database, entity: Entity, now: float) -> Entity:
        """Write an entity as its next version, unless it is the current one."""
        current = self.get(entity.id, db=db) if entity.id else None
        if current and current.is_same(entity):
            return current
        version, added = entity.version + 1, entity.added if entity.id else now
        return self._write(db, entity._replace(version=version, added=added, updated=now))

    def import_versions(self, db: Database, versions: Iterable[Entity]) -> None:
        """Write all versions of an entity of another program, under its id, which is free."""
        for number, entity in enumerate(versions, 1):
            self._write(db, entity._replace(version=number))

    def _write(self, db: Database, entity: Entity) -> Entity:
        entity = entity._replace(transaction_id=self._next_transaction(db))
        asset, facts = entity.asset, entity.asset and entity.asset.facts
        row: list[Any] = [entity.id or None, *entity[1:ENTITY_WIDTH]]
        row += [getattr(asset, "sha256", None)]
        row += [getattr(facts, name, None) for name in ("kind", "mime_type", "extension")]
        row += [search_text(entity.label, entity.description)]
        row[0] = upsert(db, "entity", ENTITY_STORED, row)
        into = f"({', '.join(ENTITY_STORED)}) VALUES ({placeholders(row)})"
        db.execute(f"INSERT INTO entity_version {into}", row)
        return entity._replace(id=row[0])

    def _next_transaction(self, db: Database) -> int:
        sql = "INSERT INTO meta VALUES ('entity_transaction', 1)"
        sql += " ON CONFLICT DO UPDATE SET value = value + 1 RETURNING value"
        return int(db.execute(sql).fetchone()[0])

    def remove(self, db: Database, id: int, now: float) -> list[str]:
        """Forget an entity, with what was in it put at the root; return the paths only it has."""
        self._release(db, id, now)
        owned = "SELECT DISTINCT path FROM entity_version AS own WHERE id = ? AND path IS NOT NULL"
        others = "SELECT 1 FROM entity_version WHERE path = own.path AND id != own.id"
        paths = db.execute(f"{owned} AND NOT EXISTS ({others})", (id,)).fetchall()
        db.execute("DELETE FROM entity WHERE id = ?", (id,))
        db.execute("DELETE FROM entity_version WHERE id = ?", (id,))
        return [row[0] for row in paths]

    def _release(self, db: Database, id: int, now: float) -> None:
        """Put what is in a collection at the root, with one new version each."""
        changes = {"version": "version + 1", "parent_id": "NULL"}
        changes |= {"transaction_id": ":transaction", "updated": ":now"}
        values = {"transaction": self._next_transaction(db), "now": now, "id": id}
        state = ", ".join(changes.get(name, name) for name in ENTITY_STORED)
        columns = ", ".join(ENTITY_STORED)
        rows = f"SELECT {state} FROM entity WHERE parent_id = :id"
        db.execute(f"INSERT INTO entity_version ({columns}) {rows}", values)
        settings = ", ".join(f"{name} = {value}" for name, value in changes.items())
        db.execute(f"UPDATE entity SET {settings} WHERE parent_id = :id", values)


class Trashed(NamedTuple):
    """A media record or an entity that is softly deleted."""

    kind: str  # media, entity
    id: str
    name: str
    size: int  # bytes of its file
    deleted_at: float
    user_id: int | None  # of a media record


TRASHED = """
    SELECT 'media' AS kind, id, name, CASE WHEN path IS NULL THEN 0 ELSE size END AS size,
        updated_at AS deleted_at, user_id
    FROM media WHERE is_deleted = 1
    UNION ALL
    SELECT 'entity', CAST(id AS TEXT), coalesce(label, ''), coalesce(asset.size, 0),
        (SELECT min(updated) FROM entity_version AS own WHERE own.id = entity.id AND version >
            (SELECT coalesce(max(version), 0) FROM entity_version AS other
             WHERE other.id = entity.id AND NOT other.is_deleted)),
        NULL
    FROM entity LEFT JOIN asset USING (sha256) WHERE is_deleted = 1
"""  # an entity may have been changed since it was deleted


MAX_CLOCK_STEP = 86400.0  # seconds between two looks at the trash, by the clock


class Trash(Rows[Trashed]):
    """What is softly deleted, of users and among the entities."""

    def all(self, until: float = math.inf) -> list[Trashed]:
        """Return what was deleted before a time, in that order."""
        return self._all("WHERE deleted_at < ? ORDER BY deleted_at, kind, id", until)

    def get(self, id: str, db: Database | None = None) -> Trashed | None:
        """Return what has an id, which is a UUID for a media record and a number for an entity."""
        return self._first("WHERE id = ?", id, db=db)

    def is_clock_steady(self, now: float) -> bool:
        """Return whether it is about as late as at the last call, perhaps before a restart.

        A clock that is wrong at a start, or was, must not make years of what was just deleted.
        """

        def look(db: Database) -> bool:
            sql = "SELECT value FROM meta WHERE key = 'trash_looked_at'"
            before = float(self._index.value(sql, db=db) or now)
            db.execute("INSERT OR REPLACE INTO meta VALUES ('trash_looked_at', ?)", (str(now),))
            return abs(now - before) < MAX_CLOCK_STEP

        return self._index.write(look)


SHOWN_RECORDS = """
    SELECT asset.*, CAST(name AS BLOB) AS path, coalesce(created, created_at) AS moment, media.id,
        collection_id AS album
    FROM media LEFT JOIN file ON root = 'users' AND file.path = CAST(media.path AS BLOB)
    JOIN asset ON asset.sha256 = coalesce(media.sha256, file.sha256)
    WHERE kind NOTNULL AND user_id = ?1 AND is_deleted = ?2 AND (media.sha256 IS NULL OR EXISTS
        (SELECT 1 FROM file WHERE sha256 = media.sha256 AND root IN ('library', 'entities')))"""
SHOWN_ENTITIES = """
    SELECT asset.*, CAST(coalesce(nullif(label, ''), md5) AS BLOB) AS path,
        coalesce(created, added) AS moment, CAST(entity.id AS TEXT) AS id, parent_id AS album
    FROM entity JOIN asset USING (sha256) WHERE asset.kind NOTNULL AND is_deleted = ?2"""
SHOWN_TRASH = f"{SHOWN_RECORDS} UNION ALL {SHOWN_ENTITIES} AND ?3"


class Album(NamedTuple):
    """A collection of a user or of entities as the gallery shows it."""

    key: str  # its id
    name: str
    size: int = 0  # items
    cover: str | None = None  # the SHA-256 of its newest


class Albums(Table):
    """What the gallery shows besides the library: users' records, entities, and their trash."""

    def records(self, user_id: int, collection: str | None = None) -> Iterator[GalleryItem]:
        """Return a user's records in a collection, or all that have a file of their own."""
        which = "(collection_id = ?3 OR ?3 IS NULL AND media.path NOTNULL)"
        return read_gallery(self._index, f"{SHOWN_RECORDS} AND {which}", user_id, 0, collection)

    def entities(self, parent: int | None) -> Iterator[GalleryItem]:
        """Return the entities in a collection, or at the root."""
        source = f"{SHOWN_ENTITIES} AND parent_id IS ?3"
        return read_gallery(self._index, source, None, 0, parent)

    def trash(self, user_id: int | None, *, with_entities: bool) -> Iterator[GalleryItem]:
        """Return what is softly deleted of a user, and of the entities if wanted."""
        return read_gallery(self._index, SHOWN_TRASH, user_id, 1, with_entities)

    def outside(self, user_id: int | None, *, with_entities: bool) -> list[Album]:
        """Return what there is besides collections, by the words that the gallery has for it."""
        mine = f"{SHOWN_RECORDS} AND media.path NOTNULL"
        found = [] if user_id is None else [self._count("mine", mine, user_id, 0)]
        entities = self._count("entities", f"{SHOWN_ENTITIES} AND parent_id IS NULL", None, 0)
        found += [entities] if entities.size or with_entities else []
        if user_id is not None or with_entities:
            trash = self._count("trash", SHOWN_TRASH, user_id, 1, with_entities)
            found.append(trash._replace(cover=None))
        return found

    def _count(self, key: str, source: str, *values: Any) -> Album:
        sql = f"SELECT count(*), sha256, max(moment) FROM ({source})"
        return Album(key, key, *self._index.read(sql, *values).fetchone()[:2])

    def of_user(self, user_id: int) -> list[Album]:
        """Return a user's collections by name."""
        sql = "SELECT id, name FROM collection WHERE user_id = ? ORDER BY folded, id"
        return self._with_counts(self._index.read(sql, user_id), SHOWN_RECORDS, user_id)

    def of_entities(self, parent: int | None) -> list[Album]:
        """Return the collections of entities in another one, or at the root, by label."""
        sql = (
            "SELECT id, coalesce(nullif(label, ''), '#' || id) FROM entity"
            " WHERE is_collection = 1 AND is_deleted = 0 AND parent_id IS ? ORDER BY search, id"
        )
        return self._with_counts(self._index.read(sql, parent), SHOWN_ENTITIES)

    def _with_counts(
        self, rows: Iterable[tuple[Any, str]], source: str, user_id: int | None = None
    ) -> list[Album]:
        sql = f"SELECT album, count(*), sha256, max(moment) FROM ({source}) GROUP BY album"
        counts = {row[0]: row[1:3] for row in self._index.read(sql, user_id, 0)}
        return [Album(str(key), name, *counts.get(key, ())) for key, name in rows]


class OpenUpload(NamedTuple):
    """An upload that comes in several requests, as it was when it was read."""

    id: str
    owner: str
    target: str
    root: str
    metadata: str
    length: int | None
    received: int
    writer: str
    expires_at: float
    answer: str | None = None


class Uploads(Rows[OpenUpload]):
    """Uploads that may be resumed; whoever takes one is the only one who can add to it."""

    def add(self, upload: OpenUpload, most: int) -> bool:
        """Record a new upload, unless its owner has `most` that are not complete."""
        begun = "(SELECT count(*) FROM upload WHERE owner = ? AND answer IS NULL)"
        sql = f"INSERT INTO upload SELECT {placeholders(upload)} WHERE {begun} < ?"
        return self._change(sql, *upload, upload.owner, most)

    def get(self, id: str, now: float) -> OpenUpload | None:
        """Return an upload that has not expired."""
        return self._first("WHERE id = ? AND expires_at > ?", id, now)

    def acquire(self, id: str, writer: str) -> OpenUpload | None:
        """Make `writer` the only one who may go on; None if it is complete or gone."""
        sql = "UPDATE upload SET writer = ? WHERE id = ? AND answer IS NULL RETURNING *"
        row = self._index.write(lambda db: db.execute(sql, (writer, id)).fetchone(), durable=False)
        return OpenUpload(*row) if row else None

    def is_writer(self, id: str, writer: str) -> bool:
        """Return whether this request is the one that an upload is written by."""
        sql = "SELECT 1 FROM upload WHERE id = ? AND writer = ?"
        return bool(self._index.value(sql, id, writer))

    def advance(self, upload: OpenUpload) -> bool:
        """Record how far an upload has come; return whether its writer is still the one."""
        sql = (
            "UPDATE upload SET length = ?, received = ?, expires_at = ?"
            " WHERE id = ? AND writer = ?"
        )
        values = (upload.length, upload.received, upload.expires_at, upload.id, upload.writer)
        return self._change(sql, *values)

    def complete(self, upload: OpenUpload) -> None:
        """Record the answer of an upload, which is complete."""
        sql = "UPDATE upload SET length = ?, received = ?, answer = ? WHERE id = ?"
        self._change(sql, upload.length, upload.received, upload.answer, upload.id)

    def remove(self, id: str) -> None:
        """Forget an upload."""
        self._change("DELETE FROM upload WHERE id = ?", id)

    def expired(self, now: float) -> list[OpenUpload]:
        """Return the uploads whose time has come."""
        return self._all("WHERE expires_at <= ?", now)

    def unfinished(self) -> list[OpenUpload]:
        """Return the uploads that have not been answered."""
        return self._all("WHERE answer IS NULL")

    def missing_bytes(self, root: str) -> int:
        """Return how many bytes the uploads of a known length have yet to bring to a folder."""
        sql = "SELECT total(length - received) FROM upload WHERE root = ? AND answer IS NULL"
        return int(self._index.value(sql, root))

    def promised_bytes(self, owner: str, target: str, but: str) -> int:
        """Return how large the uploads of an owner for a family are or will be, one left out."""
        sql = (
            "SELECT total(coalesce(length, received)) FROM upload"
            " WHERE owner = ? AND target = ? AND id != ? AND answer IS NULL"
        )
        return int(self._index.value(sql, owner, target, but))


CHECK_BYTES = 8 << 20  # up to this size it is checked before it is used (20 ms), else meanwhile
INDEX_NAME = "index.sqlite3"  # in DATA; elsewhere it has the name that DATABASE_URL gives


def damage_mark(index: Path) -> Path:
    """Return the file that says that damage was met in an index."""
    return index.with_name(f"{index.name}-suspect")


def open_index(path: Path) -> Index:
    """Return the index at `path`, made or migrated where needed.

    A damaged one is renamed aside and a new one made: what lies on disk is found again by
    the next scan. Only for who has it alone: others would go on with the old file. Raises
    SettingError where SQLite cannot use the place at all.
    """
    try:
        return open_sound_index(path)
    except sqlite3.DatabaseError as error:
        moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        aside = path.with_name(f"{path.name}.damaged-{moment}")
        warn(f"the index is damaged ({error}); it is kept as {aside.name} and rebuilt")
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{path}{suffix}", f"{aside}{suffix}")
        damage_mark(path).unlink(missing_ok=True)
        fresh = apply_migrations(Index(path))
        # Ids go on behind all that the lost one can have given out: tokens and links carry them.
        ids = [(table, int(time.time())) for table in ("user", "entity")]
        fresh.write(lambda db: db.executemany("INSERT INTO sqlite_sequence VALUES (?, ?)", ids))
        return fresh


def refuse_other_file(path: Path) -> None:
    """Raise SettingError for a file that is no damaged index, but was never one."""
    if path.name == INDEX_NAME or SpareSpace(path).is_held():
        return
    with contextlib.suppress(OSError), open(regular_file(path), "rb") as file:  # SQLite tells it
        if file.read(16) not in (b"", b"SQLite format 3\0"):
            raise SettingError("DATABASE_URL", f"{path} was never an index of this program")


def open_sound_index(path: Path) -> Index:
    """Return the index at `path`; raises sqlite3.DatabaseError, and marks it, if it is damaged."""
    refuse_other_file(path)
    try:
        try:
            index = apply_migrations(Index(path))
        except sqlite3.OperationalError:  # on a full disk it needs the space kept for it
            if not SpareSpace(path).release():
                raise
            index = apply_migrations(Index(path))
        index.spare.hold()
        return index
    except sqlite3.OperationalError as error:
        raise SettingError("DATABASE_URL", f"the index cannot be opened: {error}") from None
    except sqlite3.DatabaseError:
        with contextlib.suppress(OSError):
            damage_mark(path).touch()
        raise


def checkpoint_index(path: Path) -> None:
    """Bring the WAL into an index that is closed: where processes close it at once, none does."""
    with contextlib.suppress(sqlite3.DatabaseError):
        index = Index(path, query_only=True)
        with contextlib.closing(index):
            index.get_meta("decoders")  # what was not read is closed as it is


def apply_migrations(index: Index) -> Index:
    """Bring an index to this program's schema; raises sqlite3.DatabaseError if it is damaged."""
    db = index._writer
    version = db.execute("PRAGMA user_version").fetchone()[0]
    tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if tables and "asset" not in tables:
        problem = f"{index.path} is another program's database: it has the table {min(tables)!r}"
        raise SettingError("DATABASE_URL", problem)
    if version > len(MIGRATIONS):
        raise SettingError("DATABASE_URL", "the index was made by a newer mediaserver")
    examine(index, version)
    db.execute("PRAGMA journal_mode = WAL")
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        db.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;")
    db.execute("SELECT 1 FROM asset, file LIMIT 1").fetchone()
    return index


def examine(index: Index, version: int) -> None:
    """Raise sqlite3.DatabaseError for what is damaged, if that can be told in little time."""
    mark = damage_mark(index.path)
    suspect = mark.exists()
    if suspect and not version:
        raise sqlite3.DatabaseError("there is nothing in it")
    if suspect or index.path.stat().st_size <= CHECK_BYTES:
        check = "integrity_check" if suspect else "quick_check"
        problem = index._writer.execute(f"PRAGMA {check}(1)").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)
    mark.unlink(missing_ok=True)


# ======================================================================================
# 6. Store
# ======================================================================================
# Folders of plain files. A file on its way in lies in `.incoming/` of the same tree, is
# hashed while it is written, made durable, and linked into place, which never overwrites.
# Its name in `.incoming/` goes only when the index knows the other one, and a file that is
# deleted gets such a name first: so the next start finds what a crash left half done, and
# removes the names that the index does not know. `Tree.resolve` is the only place where a
# name becomes a file: from the root down, part by part, following no link. A root is known
# by its inode; in another one (the bare mount point of a disk that is away) nothing is made.
# The store knows no HTTP and no users.

INCOMING = ".incoming"
LOCKS = "locks"  # a folder
INNER = ".inner"  # ends the names in `.incoming/` of a folder on another disk than the root
BUFFER_BYTES = 1 << 20  # of file read at once; hashing lets other threads run meanwhile
PIECE_BYTES = 256 << 10  # copied at once, from or to an object store too
WRITE_BYTES = 1 << 20  # of an upload written at once
MAX_WRITE_BUFFERS = 16  # of that size, which stay; when all are in use, uploads get short ones
SHORT_WRITE_BYTES = 64 << 10
DIRECT_BYTES = 128 << 10  # what is shorter is faster through the page cache
BLOCK_BYTES = 4096  # direct writes begin and end at multiples of it, in memory and in the file
KEPT_BYTES = 64 << 10  # of an upload's head, in memory until its facts are known
MAX_NAME_BYTES = 255  # what file systems allow
MAX_EXTENSION_BYTES = 16  # what is longer behind a dot is part of the stem
WINDOWS_RESERVED = r"(?i)(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(\.|$)"
# Recycle bins, thumbnails and repairs of NAS systems, Windows and ext4, in any case
PASSED_OVER = frozenset(
    {b"@eadir", b"#recycle", b"$recycle.bin", b"lost+found", b"system volume information"}
)
NO_MEDIA = ".nomedia"  # a file that says: nothing in this folder is to be shown (Android)
OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
PASS_FOLDER = OPEN_FOLDER | getattr(os, "O_PATH", 0)  # needs no leave to list; not on macOS
OPEN_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # of files: a FIFO would block
REMOTE_FILE_SYSTEMS = frozenset(
    b"9p afs ceph cifs fuse fuseblk glusterfs nfs nfs4 smb3 smbfs sshfs virtiofs".split()
)


class TooLarge(Exception):
    """A file has more bytes than it may have; the text is a sentence for the client."""


class Limit(NamedTuple):
    """How many bytes a file may have, and what to tell who sends more."""

    size: int
    sentence: str


RESERVE_SHARE = 20  # where nothing is set, this part of the disk is kept
MAX_RESERVE_BYTES = 512 << 20  # or this, of a large one


def need_room(descriptor: int, size: int, reserve: int | None) -> None:
    """Raise ENOSPC where so many more bytes would leave less than `reserve` of the disk free.

    None is a share of the disk. Disks that do not tell (some FUSE) have room until they are full.
    """
    disk = os.fstatvfs(descriptor)
    if reserve is None:
        reserve = min(disk.f_blocks * disk.f_frsize // RESERVE_SHARE, MAX_RESERVE_BYTES)
    if disk.f_blocks and disk.f_bavail * disk.f_frsize - size < reserve:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Place(NamedTuple):
    """Where a name is: an open folder, which the end of a `with` closes, and the name in it."""

    folder: int  # descriptor
    name: str

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.folder)

    def open(self, flags: int, mode: int = 0o666) -> int:
        """Open what has the name, unless it is a link; return its descriptor."""
        return os.open(self.name, flags | OPEN_FLAGS, mode, dir_fd=self.folder)

    def stat(self) -> os.stat_result:
        """Return what the file system says of the name itself, not of what it links to."""
        return os.stat(self.name, dir_fd=self.folder, follow_symlinks=False)

    def exists(self) -> bool:
        """Return whether anything has the name."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def unlink(self) -> None:
        """Remove the name."""
        os.unlink(self.name, dir_fd=self.folder)

    def link(self, target: Place) -> None:
        """Give the file a second name; FileExistsError where that is taken."""
        folders = {"src_dir_fd": self.folder, "dst_dir_fd": target.folder}
        os.link(self.name, target.name, follow_symlinks=False, **folders)

    def replace(self, target: Place) -> None:
        """Take the name of `target`, in one step, from what has it."""
        os.replace(self.name, target.name, src_dir_fd=self.folder, dst_dir_fd=target.folder)


class Tree:
    """What is below one root on disk; names are relative paths with `/`."""

    def __init__(
        self, name: str, path: Path, *, make: bool, buffers: WriteBuffers,
        reserve: int | None = 0, is_new: Callable[[], bool] = lambda: True,
        excluded: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.name = name
        self.path = os.path.realpath(path)  # the root may be a link; below it none is followed
        self.make = make  # the owner's folder is never made anew once it is gone
        self.buffers = buffers
        self.reserve = reserve  # bytes of its disk that stay free; None: a share of it
        self.is_new = is_new  # whether nothing is known to be in it
        self.excluded = excluded  # folders that are no part of it wherever they lie
        self._identity: tuple[int, int] | None = None
        self._inner: dict[str, tuple[int, int]] = {}  # folders of the root to which files came

    def is_local(self, name: str) -> bool:
        """Return whether a name is on this machine's disks, where others may change its file."""
        return True

    def show(self, name: str = "") -> str:
        """Return where a name is, for the owner."""
        return f"{self.path}/{name}".rstrip("/")

    def walk_stored(
        self, wanted: Callable[[bytes], bool], unreadable: list[bytes]
    ) -> Iterator[tuple[bytes, os.stat_result]]:
        """Return path and status of every wanted file, wherever it is stored, as `walk` does."""
        return self.walk(wanted, unreadable)

    # The root

    def is_there(self) -> bool:
        """Return whether the root is the known one, and not the place of a disk that is away."""
        try:
            with self.resolve("_", make=True):
                return True
        except OSError:
            return False

    def is_missing(self) -> bool:
        """Return whether the root is not there, or holds no file though some are known."""
        return not (self.is_there() and self._holds_what_is_known())

    def _holds_what_is_known(self) -> bool:
        """Return whether there is any file, where some are known."""
        # In this order: what another process stores is here before it is known.
        return self.is_new() or self.holds_files()

    def identity(self) -> object:
        """Return what is equal before and after a scan of one tree; None where it is missing."""
        if self.is_missing():
            return None
        return self._identity, mounts_below(self.path)

    def _check_root(self, descriptor: int) -> None:
        """Take another root for the known one once there is something in it; ENODEV before."""
        # A disk that is back may have another number. Only the owner's folder could have got
        # `.incoming/` while its disk was away: from a version that did not look.
        served = self.make and Place(descriptor, INCOMING).exists()
        if not (served or self._holds_what_is_known()):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        self._identity = inode(os.fstat(descriptor))

    # Names

    def resolve(self, name: str, *, make: bool = False) -> Place:
        """Open the folder that a name is in, and follow no link on the way.

        With `make`, what is missing on the way is made, durably, unless the root is not the one
        that is known (ENODEV). ValueError for what is no relative name; OSError where some part
        is not there or no folder.
        """
        *parts, last = split_name(name)
        if make and len(parts) == 1 and (known := self._inner.get(parts[0])):
            # Two steps instead of four. Threads change at each when many upload: measured, 8
            # connections take 7 % less CPU.
            with contextlib.suppress(OSError):
                folder = os.open(f"{self.path}/{parts[0]}", OPEN_FOLDER)
                if inode(os.fstat(folder)) == known:
                    return Place(folder, last)
                os.close(folder)
        folder, place = os.open(self.path, PASS_FOLDER), None
        try:
            if make and inode(os.fstat(folder)) != self._identity:
                self._check_root(folder)
            for part in parts:
                outer, folder = folder, open_folder(part, folder, make=make)
                os.close(outer)
            place = Place(folder, last)
        except OSError as error:
            error.filename = f"{self.path}/{name}"
            raise
        finally:
            if place is None:
                os.close(folder)
        if make and len(parts) == 1:
            self._inner[parts[0]] = inode(os.fstat(folder))
        return place

    def open(self, name: str, *, write: bool = False) -> io.FileIO:
        """Open the file for reading; OSError where there is none, or none that is regular."""
        with self.resolve(name) as place:
            descriptor = place.open(os.O_RDWR if write else os.O_RDONLY)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # a FileIO would not close a folder
            os.close(descriptor)
            raise FileNotFoundError(errno.ENOENT, "no regular file")
        return io.FileIO(descriptor, "r+b" if write else "rb")

    def stat(self, name: str) -> os.stat_result:
        """Return what the file system says of a name."""
        with self.resolve(name) as place:
            return place.stat()

    def is_gone(self, name: str) -> bool:
        """Return whether nothing has that name any more."""
        return self.count_links(name) == 0

    def count_links(self, name: str) -> int:
        """Count the names of a file: 0 where this one is gone, 1 where that cannot be told."""
        try:
            return self.stat(name).st_nlink or 1  # of an object
        except (FileNotFoundError, NotADirectoryError):
            return 0
        except OSError:
            return 1

    def unlink(self, name: str) -> None:
        """Remove a file, unless it is gone already."""
        with contextlib.suppress(FileNotFoundError), self.resolve(name) as place:
            place.unlink()

    def has(self, file: File) -> bool:
        """Return whether a file is there with its size and mtime; ctime changes as uploads end."""
        try:
            status = self.stat(file.path)
        except (OSError, ValueError):
            return False
        return file._replace(ctime=status.st_ctime).matches(status)

    # What is there

    def files_in(self, folder: str) -> list[tuple[str, os.stat_result]]:
        """Return name and lstat of what is in a folder, but for folders."""
        with self.resolve(f"{folder}/_") as place, opened(place.folder) as inner:
            found = []
            with os.scandir(inner) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # it went away meanwhile
                        found.append((entry.name, entry.stat(follow_symlinks=False)))
        return [(name, status) for name, status in found if not stat.S_ISDIR(status.st_mode)]

    def holds_files(self, below: str = "") -> bool:
        """Return whether anything but folders is there, of what `walk` goes through or hides."""
        folders, excluded = [os.fsencode(below)], self._excluded()
        while folders:
            with contextlib.suppress(OSError):
                for path in self._entries(folders.pop(), excluded, hidden=True):
                    if not path.endswith(b"/"):
                        return True
                    folders.append(path)
        return False

    def walk(
        self, wanted: Callable[[bytes], bool], unreadable: list[bytes]
    ) -> Iterator[tuple[bytes, os.stat_result]]:
        """Yield path and lstat of every wanted file in the order of the paths' bytes.

        Passed over are hidden names, links, `excluded` folders and those of PASSED_OVER. The
        paths of what cannot be read are added to `unreadable`; those of folders end with `/`.
        """
        excluded = self._excluded()
        runs = [[b""]]  # of files of one folder, or one folder; the next one last
        while runs:
            run = runs.pop()
            try:
                if run[0] and not run[0].endswith(b"/"):
                    yield from self._stat_all(run, unreadable)
                    continue
                found = self._entries(run[0], excluded)
                paths = sorted(path for path in found if path.endswith(b"/") or wanted(path))
            except (FileNotFoundError, NotADirectoryError):
                continue  # it went away meanwhile
            except OSError:
                unreadable += run
                continue
            alone = itertools.groupby(paths, lambda path: path if path.endswith(b"/") else b"")
            runs += reversed([list(group) for _, group in alone])

    def _stat_all(
        self, paths: Sequence[bytes], unreadable: list[bytes]
    ) -> Iterator[tuple[bytes, os.stat_result]]:
        """Yield the lstat of those files of one folder that are regular."""
        with self.resolve(os.fsdecode(paths[0])) as place:
            for path in paths:
                try:
                    status = Place(place.folder, os.fsdecode(path.rpartition(b"/")[2])).stat()
                except FileNotFoundError:  # it went away meanwhile
                    continue
                except OSError:
                    unreadable.append(path)
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield path, status

    def _entries(
        self, path: bytes, excluded: Set[tuple[int, int]], *, hidden: bool = False
    ) -> Iterator[bytes]:
        """Yield the paths in a folder that may be shown; those of folders end with `/`.

        Nothing where NO_MEDIA lies, unless `hidden` or in the root, which somebody asked for.
        """
        with self.resolve(os.fsdecode(path + b"_")) as place, opened(place.folder) as folder:
            is_shown = hidden or not path or not Place(folder, NO_MEDIA).exists()
            if not is_shown or inode(os.fstat(folder)) in excluded:
                return
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    if name.startswith(b".") or name.lower() in PASSED_OVER:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        yield path + name + b"/"
                    elif not entry.is_symlink():
                        yield path + name

    def _excluded(self) -> set[tuple[int, int]]:
        found = set()
        for path in self.excluded:
            with contextlib.suppress(OSError):
                found.add(inode(os.stat(path)))
        return found


class Folder(Tree):
    """A tree to which files come, by way of its `.incoming/`, and from which they go."""

    def recover(self, is_known: Callable[[str], object], resumed: Set[str] = frozenset()) -> None:
        """Undo what a crash left half done: what lies in `.incoming/`, and its unknown names.

        What may be `resumed` stays, by its name there. A whole upload that was not answered may
        stay, too, where others write: the index may have lost one that was, and reads it again.
        """
        if self.make:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
        if not Tree.is_there(self):  # the disk, in any case
            return
        inner = [os.fsdecode(path) for path in self._entries(b"", set()) if path.endswith(b"/")]
        for prefix, suffix in (("", ""), *((folder, INNER) for folder in inner)):
            incoming = prefix + INCOMING
            with contextlib.suppress(FileNotFoundError, PermissionError):
                mode = self.stat(incoming).st_mode
                # A link is no way in; but a file in the way of the root's own is an error
                if stat.S_ISDIR(mode) or not (prefix or stat.S_ISLNK(mode)):
                    left = [item for item in self.files_in(incoming) if item[0] not in resumed]
                    ours = [item for item in left if item[0].endswith(suffix)]
                    self._recover(incoming, ours, is_known)

    def _recover(
        self, incoming: str, left: Sequence[tuple[str, os.stat_result]],
        is_known: Callable[[str], object],
    ) -> None:  # fmt: skip
        linked = [(name, status) for name, status in left if status.st_nlink > 1]
        # A mark tells the place: what else people link from here is not ours to remove.
        marks = {mark for name, _ in linked for mark in name.split(".")[1:2]}
        arrived = {inode(status) for _, status in linked if self.name in SERVER_ONLY}
        for path, status in self.walk(lambda name: True, []) if linked else ():
            name = os.fsdecode(path)
            ours = mark_of(name) in marks or inode(status) in arrived
            if ours and not is_known(name):
                self.unlink(name)
        for name, _ in left:
            self.unlink(f"{incoming}/{name}")

    def begin(self, limit: Limit, md5: bool = False, size: int = 0) -> Incoming:
        """Return what takes in a fresh file; ENOSPC if there is no room for `size` bytes."""
        name = f"{INCOMING}/{secrets.token_hex(16)}"
        place = self.resolve(name, make=True)
        with undoing(os.close, place.folder):
            file = self._create(place, size)
        hashes = new_hashes(md5=md5)
        return Incoming(self, name, file, limit, hashes=hashes, place=place, has_room=size)

    def need_room(self, size: int) -> None:
        """Raise ENOSPC where so many more bytes would take from the reserve."""
        with self.resolve(f"{INCOMING}/_", make=True) as place:
            need_room(place.folder, size, self.reserve)

    def _create(self, place: Place, size: int = 0) -> io.FileIO:
        """Make a file to write and read, for which there is room."""
        need_room(place.folder, size, self.reserve)
        return io.FileIO(place.open(os.O_RDWR | os.O_CREAT | os.O_EXCL), "r+b")

    def make_file(self, name: str) -> None:
        """Make an empty file, durably."""
        with self.resolve(name, make=True) as place:
            self._create(place).close()
            sync_folder(place.folder)

    def resume(self, name: str, limit: Limit) -> Incoming:
        """Return what goes on with a file; BlockingIOError while another request does."""
        file = self.open(name, write=True)
        with undoing(file.close):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return Incoming(self, name, file, limit)

    @contextlib.contextmanager
    def content_lock(self, sha256: str) -> Iterator[None]:
        """Have those who store equal content do it one after the other, whatever their process.

        So the later ones find what the first one has stored. The files that are locked are for a
        share of all contents each, and stay: to make one for each upload, and remove it, takes
        ext4 0.2 ms of CPU.
        """
        place, flags = self.resolve(f"{LOCKS}/{sha256[:2]}", make=True), os.O_WRONLY | os.O_CREAT
        with place, io.FileIO(place.open(flags, 0o600), "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def keep(self, incoming: Incoming, names: Iterable[str], duplicate: str | None = None) -> str:
        """Put a file in place under the first of `names` that is free; return that name.

        The file is stored for good when this returns. Of `duplicate`, the name of a file with
        the same content, a link is made instead if one can be.
        """
        self._prepare(incoming, duplicate)
        for name in names:
            with contextlib.suppress(FileExistsError):
                self._place(incoming, name)
                return name
        raise FileExistsError(f"no free name in {self.name}")

    def _prepare(self, incoming: Incoming, duplicate: str | None) -> None:
        """Make a file that has arrived durable, or one more link of an equal one that is."""
        if duplicate is not None:
            link = f"{INCOMING}/{secrets.token_hex(16)}"
            if not self.link_in(link, self, duplicate):
                incoming.replace(link, self.open(link))
                return
        os.fsync(incoming.file.fileno())

    def _place(self, incoming: Incoming, name: str) -> None:
        """Give a file that has arrived its place, for good; FileExistsError where it is taken."""
        with self.resolve(name, make=True) as target:
            try:
                self._link(incoming, name, target)
            except OSError as error:
                if error.errno != errno.EXDEV or "/" not in name:
                    raise
                self._copy(incoming, inner_name(name, secrets.token_hex(16)))
                self._link(incoming, name, target)
            sync_folder(target.folder)

    def _link(self, incoming: Incoming, name: str, target: Place) -> None:
        """Give a file its name; FileExistsError where that is taken."""
        source = incoming.place()
        try:
            source.link(target)
        except OSError as error:
            if error.errno not in {errno.EPERM, errno.EOPNOTSUPP}:
                raise
            # Where a file system has no links (exFAT), the name is taken first and then filled.
            os.close(target.open(os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
            source.replace(target)
            incoming.kept, incoming.is_moved = name, True
            return
        incoming.kept = name
        if self.name not in SERVER_ONLY:  # its ctime counts, and a start leaves it where it is
            source.unlink()
            incoming.is_moved = True

    def _copy(self, incoming: Incoming, name: str) -> None:
        """Bring a file that has arrived to another file system of this tree, durably."""
        with self.resolve(name, make=True) as place:
            copy = self._create(place, incoming.size)
        with undoing(self.unlink, name), undoing(copy.close):
            for piece in read_range(incoming.file, 0, incoming.size):
                write_all(copy, memoryview(piece))
            os.fsync(copy.fileno())
            incoming.replace(name, copy)

    def link_in(self, name: str, folder: Folder, other: str) -> int:
        """Give a folder's file a name here, too; return 0, or why it is gone or can have none."""
        try:
            with folder.resolve(other) as source, self.resolve(name, make=True) as target:
                source.link(target)
        except OSError as error:
            if error.errno in NO_LINK:
                return error.errno or errno.EIO
            raise
        return 0

    def _mark_removed(self, name: str) -> str:
        """Return a name in `.incoming/` for a file that is going; empty where none can be.

        OSError where a folder on the way is none now: what is behind it is not gone.
        """
        mark = f"{secrets.token_hex(16)}.{mark_of(name)}"
        incoming = f"{INCOMING}/{mark}"
        error = self.link_in(incoming, self, name)
        if error == errno.EXDEV:
            incoming = inner_name(name, mark)
            error = self.link_in(incoming, self, name)
        if error == errno.ENOTDIR:
            raise OSError(error, os.strerror(error))
        return "" if error else incoming

    def copy_in(self, name: str, status: os.stat_result, blocks: Iterable[memoryview]) -> None:
        """Write blocks to a file with the mode and mtime of `status`, in the place of an old one.

        It is on disk for good after `os.sync`: many are written at once.
        """
        incoming = f"{INCOMING}/{secrets.token_hex(16)}"
        with undoing(self.unlink, incoming), self.resolve(incoming, make=True) as place:
            with self._create(place) as file:
                for block in blocks:
                    write_all(file, block)
                os.fchmod(file.fileno(), status.st_mode & 0o777)
                os.utime(file.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))
            with self.resolve(name, make=True) as target:
                place.replace(target)

    @contextlib.contextmanager
    def removing(self, names: Sequence[str]) -> Iterator[None]:
        """Delete files once the block, which has the index forget them, is left without error.

        What can then not be deleted keeps its mark, for the next start. OSError where the root is
        gone: its files would be back with it.
        """
        marks: list[str] = []
        if names:
            with self.resolve(INCOMING, make=True):
                pass
        with undoing(self._unmark, marks):
            for name in names:
                marks.append(self._mark_removed(name))
            yield
        for name in names:
            with contextlib.suppress(FileNotFoundError), self.resolve(name) as place:
                place.unlink()
                sync_folder(place.folder)
        self._unmark(marks)

    def _unmark(self, marks: Iterable[str]) -> None:
        for mark in filter(None, marks):
            self.unlink(mark)


def new_hashes(*, md5: bool) -> Sequence[Hash]:
    """Return SHA-256 and, if it is wanted, MD5, of nothing yet."""
    return [hashlib.sha256(), hashlib.md5(usedforsecurity=False)][: 1 + md5]


class Incoming:
    """A file that arrives, or has: written and hashed in large blocks of what it is fed.

    Whoever begins one ends it with `close` or `discard`. After `pause` it holds a descriptor and
    no memory to speak of, until it is fed again.
    """

    size = 0
    sha256 = ""
    md5 = ""  # where it was asked for
    facts: Facts | None = None
    filename = ""  # as the client named it
    kept: str | None = None  # its place once it has one
    note = ""  # the name of what tells the next start of it, which goes with it
    is_moved = False  # `kept` is its only name
    is_replaced = False
    _buffer: memoryview | None = None
    _filled = 0  # bytes of it
    _head: bytes | None = None  # of the file; b"" where it has to be read again

    def __init__(
        self, folder: Folder, name: str, file: io.FileIO, limit: Limit, *,
        hashes: Sequence[Hash] = (), place: Place | None = None, has_room: int = 0,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.name = name  # in `.incoming/`
        self.file = file
        self.hashes = hashes
        self._limit = limit
        self._place = place
        self._has_room = has_room  # for so many bytes, seen just now

    def rewind(self, size: int, hashes: Sequence[Hash]) -> None:
        """Forget all of the file but its first `size` bytes, which have `hashes`."""
        self.file.truncate(size)
        self.file.seek(size)
        self.size, self.hashes = size, hashes
        self._head = b"" if size else None

    def feed(self, piece: Buffer) -> None:
        """Take in the next bytes; TooLarge if they are too many."""
        self.size += len(piece)
        if self.size > self._limit.size:
            raise TooLarge(self._limit.sentence)
        used = 0
        while used < len(piece):
            buffer = self._buffer = self._buffer or self.folder.buffers.acquire()
            filled = self._filled
            count = min(len(piece) - used, len(buffer) - filled)
            buffer[filled : filled + count] = piece[used : used + count]
            self._filled, used = filled + count, used + count
            if self._filled == len(buffer):
                self._write()

    def _write(self) -> None:
        """Write what is in the buffer, and hash it meanwhile."""
        if self._buffer is None or not self._filled:
            return
        block, self._filled = self._buffer[: self._filled], 0
        if self._head is None:
            self._head = bytes(block[:KEPT_BYTES])
        if self.size > self._has_room:
            need_room(self.file.fileno(), len(block), self.folder.reserve)
        self._has_room = 0  # others write meanwhile
        # For a short one a thread would take longer to begin.
        long = len(block) == WRITE_BYTES
        writing = Background(write_block, self.file, block) if long else None
        try:
            for digest in self.hashes:
                digest.update(block)
        finally:
            if writing:
                writing.finish()
        if not long:
            write_block(self.file, block)

    def sync(self) -> int:
        """Make what has come durable; return how many bytes of the file are."""
        self._write()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def finish(self) -> Incoming:
        """Return the file, which is complete, with its facts and hashes."""
        self._write()
        self._let_go(but_place=True)
        self.facts = probe(self.file, self._head or b"")
        self.sha256, *rest = [digest.hexdigest() for digest in self.hashes]
        self.md5 = "".join(rest)
        return self

    def hash_again(self, hashes: Sequence[Hash]) -> None:
        """Hash the file from its beginning, which other requests have brought."""
        self._write()
        for piece in read_range(self.file, 0, self.size):
            for digest in hashes:
                digest.update(piece)
        self.hashes = hashes

    def place(self) -> Place:
        """Return where it lies in `.incoming/`, which stays open until `pause` or `close`."""
        self._place = self._place or self.folder.resolve(self.name)
        return self._place

    def replace(self, name: str, file: io.FileIO) -> None:
        """Take an equal file in the place of this one, which is deleted."""
        with undoing(file.close):
            self.place().unlink()
        self.close()
        self.name, self.file, self.is_replaced = name, file, True

    def pause(self) -> None:
        """Hold no more than the file itself while no more comes."""
        self._write()
        self._head = b""
        self._let_go()

    def close(self) -> None:
        """Let go of the file, which stays."""
        self._let_go()
        self.file.close()

    def _let_go(self, *, but_place: bool = False) -> None:
        """Hold no more than the file itself, and its place where that is wanted soon."""
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self.folder.buffers.release(buffer)
        if self._place is not None and not but_place:
            place, self._place = self._place, None
            os.close(place.folder)

    def discard(self, *, undo: bool = True) -> None:
        """Let go of the name in `.incoming/`; `undo` takes back the place first."""
        if self.file.closed:
            return
        with contextlib.closing(self), contextlib.suppress(OSError):
            if undo and self.kept:
                self.folder.unlink(self.kept)  # if not, the next start finds the mark
            if not self.is_moved:
                self.place().unlink()
            if self.note:
                self.folder.unlink(self.note)

    def put_back(self) -> bool:
        """Take back its place, and leave it in `.incoming/` for another request, if it is there.

        It is not where an equal file was taken instead.
        """
        if self.is_replaced:
            return False
        with contextlib.closing(self):
            if self.is_moved and self.kept:
                with self.folder.resolve(self.kept) as kept:
                    kept.replace(self.place())
            elif self.kept:
                self.folder.unlink(self.kept)
        return True


class WriteBuffers:
    """Memory in which pieces of files become large blocks; each begins at a page for O_DIRECT."""

    def __init__(self) -> None:
        self._spare: list[memoryview] = []
        self._made = 0
        self._lock = threading.Lock()

    def acquire(self) -> memoryview:
        """Return a free buffer; a short one when those of full length are all in use."""
        with self._lock:
            if self._spare:
                return self._spare.pop()
            size = WRITE_BYTES if self._made < MAX_WRITE_BUFFERS else SHORT_WRITE_BYTES
            buffer = memoryview(mmap.mmap(-1, size))
            self._made += size == WRITE_BYTES
        return buffer

    def release(self, buffer: memoryview) -> None:
        """Keep a buffer for the next one who asks."""
        if len(buffer) == WRITE_BYTES:
            with self._lock:
                self._spare.append(buffer)


class Background:
    """Runs `work(*arguments)` in a thread that no exit waits for; at once if there can be none."""

    def __init__(self, work: Callable[..., object], *arguments: object) -> None:
        self._call = functools.partial(work, *arguments)
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._run()

    def _run(self) -> None:
        try:
            self._call()
        except OSError as error:
            self._error = error

    def finish(self) -> None:
        """Wait for the end; raises the OSError that it ended with, if any."""
        if self._thread.ident:  # it was started
            self._thread.join()
        if self._error is not None:
            raise self._error


def write_block(file: io.FileIO, block: memoryview) -> None:
    """Write a block, of which only the file's last may have any length."""
    whole = len(block) - len(block) % BLOCK_BYTES
    written = write_direct(file, block[:whole]) if whole >= DIRECT_BYTES else 0
    while written < len(block):
        written += file.write(block[written:])


O_DIRECT = getattr(os, "O_DIRECT", 0)  # not on macOS


def write_direct(file: io.FileIO, block: memoryview) -> int:
    """Write past the page cache (open(2), O_DIRECT); 0 bytes where the file system cannot.

    The disk must have them anyway before the upload is answered, copies would push out what is
    read often, and finding pages for them costs more than all else: for 9.5 MB, 3 ms of CPU
    instead of 1, and 28 in a virtual machine that gives free memory back.
    """
    if not O_DIRECT:
        return 0
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, O_DIRECT)
        return file.write(block)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
            raise
        return 0
    finally:
        fcntl.fcntl(file, fcntl.F_SETFL, 0)


# What says that a file can have no other name there now, or is gone
NO_LINK = frozenset({
    errno.ENOENT, errno.ENOTDIR, errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK,
    errno.ENOSPC, errno.EDQUOT, errno.EEXIST,
})  # fmt: skip
NO_SYNC = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})


def split_name(name: str) -> list[str]:
    """Return the parts of a relative path; ValueError for one that would leave its folder."""
    parts = name.split("/")
    if not {"", ".", ".."}.isdisjoint(parts) or "\0" in name:
        raise ValueError(f"no file name: {name!r}")
    return parts


def inner_name(name: str, mark: str) -> str:
    """Return a name in the `.incoming/` of the top folder that a file is in: a disk of its own.

    Another server may have that folder as its root, and names of its own there.
    """
    return f"{name.partition('/')[0]}/{INCOMING}/{mark}{INNER}"


def mark_of(name: str) -> str:
    """Return the name that the mark of a name has."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:32]


def inode(status: os.stat_result) -> tuple[int, int]:
    """Return what tells a file from all others: its device and number there."""
    return status.st_dev, status.st_ino


def open_folder(name: str, parent: int, *, make: bool) -> int:
    """Open a folder in an open one, and `make` it durably where it is missing."""
    flags = OPEN_FOLDER if make else PASS_FOLDER  # what comes there is to be synced
    try:
        return os.open(name, flags, dir_fd=parent)
    except FileNotFoundError:
        if not make:
            raise
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700 if name == INCOMING else 0o777, dir_fd=parent)
    sync_folder(parent)
    return os.open(name, flags, dir_fd=parent)


@contextlib.contextmanager
def opened(folder: int) -> Iterator[int]:
    """Yield a folder that can be listed and synced; places' descriptors may only be passed on."""
    try:
        descriptor = os.open(".", OPEN_FOLDER, dir_fd=folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            error.filename = os.readlink(f"/proc/self/fd/{folder}")  # so that it can be told
        raise
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync_folder(folder: int) -> None:
    """Make names in a folder durable (fsync(2): the file's own fsync does not)."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno == errno.EBADF:  # it may only be passed
            with opened(folder) as descriptor:
                sync_folder(descriptor)
        elif error.errno not in NO_SYNC:  # as SMB says, which has no more to offer
            raise


def read_blocks(file: io.FileIO | io.BytesIO, size: int) -> Iterator[memoryview]:
    """Yield the bytes of a file of about this size, in blocks that are good until the next one."""
    buffer = memoryview(bytearray(min(BUFFER_BYTES, size + 1)))
    while count := file.readinto(buffer):
        yield buffer[:count]


def read_range(file: io.FileIO, offset: int, count: int) -> Iterator[bytes]:
    """Yield the bytes of a part of a file, in pieces; they end where the file does."""
    end = offset + count
    while piece := os.pread(file.fileno(), min(PIECE_BYTES, end - offset), offset):
        offset += len(piece)
        yield piece


def write_all(file: io.FileIO, data: memoryview) -> None:
    """Write all bytes; a disk that becomes full takes some of them at first."""
    written = 0
    while written < len(data):
        written += file.write(data[written:])


def mounts_below(path: str) -> frozenset[tuple[str, str]]:
    """Return mount points below a folder: relative paths and ids (proc(5), mountinfo)."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:  # not on macOS
        return frozenset()
    found, prefix = [], path.rstrip("/") + "/"
    for line in lines:
        number, _, _, _, place, *_ = line.split()
        escaped = re.sub(rb"\\(\d{3})", lambda octal: bytes([int(octal[1], 8)]), place)
        found.append((os.fsdecode(escaped), number.decode()))
    return frozenset((p[len(prefix) :], id) for p, id in found if p.startswith(prefix))


@functools.lru_cache(maxsize=256)
def is_remote(device: int) -> bool:
    """Return whether a device number is that of a share or FUSE, which can stop to answer."""
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as lines:
        for line in lines:
            about, _, rest = line.partition(b" - ")
            major, _, minor = about.split()[2].partition(b":")
            if os.makedev(int(major), int(minor)) == device:
                return rest.split()[0].partition(b".")[0].lower() in REMOTE_FILE_SYSTEMS
    return False


def safe_name(name: str) -> str:
    """Return a file name as it was given, less what file systems or people trip over.

    >>> names = "../C:\\\\x\\\\my photo.jpg", "..hidden\\x07.png", ".png", "NUL.gif", ".."
    >>> [safe_name(name) for name in names]
    ['my photo.jpg', 'hidden.png', 'file.png', '_NUL.gif', 'file']
    """
    name = name.replace("\\", "/").rpartition("/")[2]
    name = re.sub("[\0-\x1f\x7f-\x9f\ud800-\udfff]", "", name)  # controls, lone surrogates
    hidden, name = name.strip(), name.strip().lstrip(". ")
    if name and name != hidden and "." not in name:
        name = f"file.{name}"  # it was nothing but an extension
    if re.match(WINDOWS_RESERVED, name):
        name = f"_{name}"
    return fit_name(name or "file")


def fit_name(name: str, suffix: str = "") -> str:
    """Return a name with `suffix` behind its stem, which is shortened to what file systems allow.

    >>> fit_name("é" * 200 + ".png", "_1") == "é" * 124 + "_1.png"
    True
    """
    stem, extension = os.path.splitext(name)
    if len(extension.encode()) > MAX_EXTENSION_BYTES:
        stem, extension = name, ""
    room = MAX_NAME_BYTES - len((suffix + extension).encode())
    return stem.encode()[:room].decode("utf-8", "ignore") + suffix + extension


def numbered_names(name: str) -> Iterator[str]:
    """Yield `a.jpg`, `a_1.jpg`, `a_2.jpg`, ..."""
    yield name
    for number in itertools.count(1):
        yield with_suffix(name, f"_{number}")


def with_suffix(name: str, suffix: str) -> str:
    """Return a name with more behind its stem, before its extension.

    >>> with_suffix("2026/a.jpg", "_1")
    '2026/a_1.jpg'
    """
    folder, separator, base = name.rpartition("/")
    return f"{folder}{separator}{fit_name(base, suffix)}"


SLUG_LETTERS: dict[int, int | str] = {
    **str.maketrans("αβγδεζηικλμνξοπρσςτυω", "abgdezeiklmnxoprsstuo"),
    **str.maketrans("абвгдезийклмнопрстуфыэіґ", "abvgdeziiklmnoprstufyeig"),
    **{ord(letter): latin for letter, latin in {
        "ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th",
        "ı": "i", "θ": "th", "φ": "ph", "χ": "kh", "ψ": "ps", "ё": "io", "ж": "zh", "х": "kh",
        "ц": "ts", "ч": "ch", "ш": "sh", "щ": "shch", "ъ": "", "ь": "", "ю": "iu", "я": "ia",
        "є": "ie",
    }.items()},
}  # fmt: skip
# Unicode's names of these say how they are read
SLUG_SYLLABLE = re.compile(r"(?:HIRAGANA|KATAKANA) LETTER (?:SMALL )?(\w+)|HANGUL SYLLABLE (\w+)")


def slugify(text: str) -> str:
    """Return lower-case ASCII words joined by hyphens, as python-slugify does; "" where it cannot.

    >>> [slugify(name) for name in ("Größe & Maß (1)", "Семья в Афинах", "かぞく 가족", "家族")]
    ['grosse-mass-1', 'semia-v-afinakh', 'kazoku-gajog', '']
    """
    text = unicodedata.normalize("NFC", text.lower()).translate(SLUG_LETTERS)
    plain = unicodedata.normalize("NFKD", "".join(map(read_syllable, text)))
    plain = plain.translate(SLUG_LETTERS)  # what has lost its accent
    words = re.findall(r"[a-z0-9]+", plain.encode("ascii", "ignore").decode().lower())
    return "-".join(words)


def read_syllable(character: str) -> str:
    """Return a syllable in Latin letters if Unicode's name spells it, else the character."""
    syllable = SLUG_SYLLABLE.fullmatch(unicodedata.name(character, ""))
    return (syllable[1] or syllable[2]).lower() if syllable else character


# -- S3 ----------------------------------------------------------------------------------
# As much of the protocol of object stores as a Bucket needs. Requests are signed (AWS, Signature
# Version 4) and connections kept. What fails is tried again; what fails then, too, or takes too
# long, opens the circuit: until it closes, requests fail at once, and one from time to time
# finds out whether the store is back. So one that is away keeps few threads, and no other work.

S3_SECONDS = 30.0  # that a store may take to go on with a request
S3_SLOTS = 32  # requests at once
S3_SLOT_SECONDS = 0.5  # that one waits for a slot among them
S3_RETRIES = (0.2, 1.0)  # seconds before another try, at most: a random part of them
S3_OPEN_SECONDS = 5.0  # between two tries while the circuit is open
S3_SKEW_SECONDS = 60.0  # that clocks may differ; AWS refuses (403) from 15 minutes on
S3_IDLE_SECONDS = 4.0  # that a connection is kept unused: stores close them after 5 and more
S3_PASSING = frozenset({408, 409, 429, 500, 502, 503, 504})  # what another try may change
EMPTY_SHA256 = hashlib.sha256().hexdigest()
UNSIGNED_PAYLOAD = "UNSIGNED-PAYLOAD"


class Unavailable(OSError):
    """A store that does not answer, or only with errors that pass."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.EHOSTUNREACH, reason)


class Signer(NamedTuple):
    """Signs requests by AWS's Signature Version 4.

    Targets are paths with queries, percent-encoded but for the unreserved characters (RFC 3986).
    """

    key_id: str
    secret: str
    region: str
    service: str = "s3"
    token: str = ""  # of a session, which goes with its key

    def authorize(self, method: str, target: str, headers: Mapping[str, str], payload: str) -> str:
        """Return the value of Authorization; `payload` is the SHA-256 of the body.

        All `headers`, whose names are in lower case, are signed; x-amz-date is among them.
        """
        at = headers["x-amz-date"]
        names, signature = self._sign(method, target, headers, payload, at=at)
        about = f"Credential={self.key_id}/{self._scope(at)}, SignedHeaders={names}"
        return f"AWS4-HMAC-SHA256 {about}, Signature={signature}"

    def presign(self, host: str, path: str, seconds: int, at: str) -> str:
        """Return the target that anyone may GET for so many seconds from `at` (ISO 8601 basic)."""
        query = urlencode({
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "X-Amz-Credential": f"{self.key_id}/{self._scope(at)}",
            "X-Amz-Date": at, "X-Amz-Expires": seconds, "X-Amz-SignedHeaders": "host",
            **({"X-Amz-Security-Token": self.token} if self.token else {}),
        })  # fmt: skip
        target = f"{path}?{query}"
        signature = self._sign("GET", target, {"host": host}, UNSIGNED_PAYLOAD, at=at)[1]
        return f"{target}&X-Amz-Signature={signature}"

    def _scope(self, at: str) -> str:
        return f"{at[:8]}/{self.region}/{self.service}/aws4_request"

    def _sign(
        self, method: str, target: str, headers: Mapping[str, str], payload: str, *, at: str
    ) -> tuple[str, str]:
        """Return the names of the signed headers and the signature."""
        path, _, query = target.partition("?")
        pairs = sorted(pair.partition("=")[::2] for pair in filter(None, query.split("&")))
        query = "&".join(f"{name}={value}" for name, value in pairs)
        fields = "".join(f"{name}:{' '.join(headers[name].split())}\n" for name in sorted(headers))
        names = ";".join(sorted(headers))
        request = "\n".join((method, path, query, fields, names, payload))
        digest = hashlib.sha256(request.encode()).hexdigest()
        key = f"AWS4{self.secret}".encode()
        for part in self._scope(at).split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        text = f"AWS4-HMAC-SHA256\n{at}\n{self._scope(at)}\n{digest}"
        return names, hmac.digest(key, text.encode(), "sha256").hex()


class ObjectBody(NamedTuple):
    """The content of a request; `pieces` gives it anew for each try."""

    size: int = 0
    sha256: str = EMPTY_SHA256
    pieces: Callable[[], Iterable[bytes]] = tuple


class S3Request(NamedTuple):
    """A request to a bucket, or with a key to an object in it; header names in lower case."""

    method: str
    bucket: str
    key: str = ""
    query: Mapping[str, str] = {}
    headers: Mapping[str, str] = {}
    body: ObjectBody = ObjectBody()

    @property
    def target(self) -> str:
        """Return the path and query, encoded as they are signed (Signature Version 4)."""
        path = f"/{self.bucket}/{self.key}".rstrip("/")
        query = urlencode(self.query, quote_via=quote, safe="-_.~")
        return f"{quote(os.fsencode(path), safe='/-_.~')}?{query}".rstrip("?")


class S3Answer(NamedTuple):
    """An answer of a store."""

    code: int
    headers: HTTPMessage  # which finds names in any case
    body: bytes  # empty where it is to be read from the response
    connection: HTTPConnection
    response: HTTPResponse

    def retry_after(self) -> float:
        """Return the seconds that the store wants to be left alone for."""
        seconds = self.headers.get("retry-after", "")
        return float(seconds) if re.fullmatch(r"[0-9]{1,5}", seconds) else 0.0

    def clock_skew(self) -> float:
        """Return the seconds that the store's clock is ahead of this one."""
        with contextlib.suppress(ValueError):
            return parsedate_to_datetime(self.headers.get("date", "")).timestamp() - time.time()
        return 0.0

    def elements(self, name: str) -> list[str]:
        """Return the XML elements of a name."""
        text = self.body.decode("utf-8", "replace")
        return re.findall(f"<{name}>.*?</{name}>", text, re.DOTALL)

    def text(self, name: str) -> str:
        """Return the content of an element of an XML answer."""
        return xml_text(self.body.decode("utf-8", "replace"), name)


def xml_text(xml: str, name: str) -> str:
    """Return the text of the first XML element of a name; empty where there is none."""
    found = re.search(f"<{name}>([^<]*)</{name}>", xml)
    return html.unescape(found[1]) if found else ""


class S3Client:
    """Speaks with an object store for all who use it in this process."""

    def __init__(self, endpoint: str, signer: Signer) -> None:
        """Without an endpoint it is AWS's. Buckets are paths, which every store understands."""
        self._signer = signer
        self._endpoint = urlsplit(endpoint or f"https://s3.{signer.region}.amazonaws.com")
        self._slots = threading.BoundedSemaphore(S3_SLOTS)
        self._idle: deque[tuple[float, HTTPConnection]] = deque()
        self._retry_at = 0.0  # monotonic; 0: the circuit is closed
        self._is_conditional = True  # whether the store may know If-None-Match
        self._clock_skew = 0.0  # seconds that its clock is ahead of this one
        self._lock = threading.Lock()

    def _now(self) -> str:
        """Return the time as the store has it."""
        return format_amz_date(time.time() + self._clock_skew)

    def presign(self, request: S3Request, seconds: int) -> str:
        """Return a URL under which anyone may GET an object for so many seconds."""
        host, path = self._endpoint.netloc, self._endpoint.path + request.target
        target = self._signer.presign(host, path, seconds, self._now())
        return f"{self._endpoint.scheme}://{host}{target}"

    def call(self, request: S3Request) -> S3Answer:
        """Return the whole answer to a request; an OSError where it is refused."""
        with self.slot():
            return self.open(request, is_whole=True)

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Take a slot among the requests that are under way; Unavailable if none gets free."""
        patience = 0.0 if self._retry_at else S3_SLOT_SECONDS
        if not self._slots.acquire(timeout=patience):
            raise Unavailable("too many requests are under way")
        try:
            yield
        finally:
            self._slots.release()

    def open(self, request: S3Request, *, is_whole: bool = False) -> S3Answer:
        """Send a request, if need be again; an OSError where it is refused.

        The body is to be read from the answer's response, unless it `is_whole`.
        """
        self._pass_circuit()
        for wait in (*S3_RETRIES, 0.0):
            connection = self._connect()
            try:
                response = self._exchange(connection, request)
                is_read = is_whole or response.status >= 300
                body = response.read() if is_read else b""
                answer = S3Answer(response.status, response.headers, body, connection, response)
                if self._is_final(request, answer, is_last=not wait):
                    break
                problem, pause = f"answers {answer.code}", answer.retry_after()
            except (OSError, HTTPException) as error:
                problem = str(error) or type(error).__name__
                pause = math.inf if isinstance(error, TimeoutError) else 0.0
            connection.close()
            self.close()
            if not wait or pause > wait:
                self._open_circuit(problem, pause)
                raise Unavailable(problem)
            time.sleep(pause or wait * secrets.randbelow(1000) / 1000)
        self._retry_at = 0.0
        if is_read:
            self.keep(connection)
        check_answer(request, answer)
        return answer

    def _is_final(self, request: S3Request, answer: S3Answer, *, is_last: bool) -> bool:
        """Return whether another try would change nothing; note how the store is to be asked."""
        if answer.code == 501 and "if-none-match" in request.headers:
            self._is_conditional = False  # OpenStack Swift; who sends has looked before
            return is_last
        if answer.code == 403 and abs(answer.clock_skew() - self._clock_skew) > S3_SKEW_SECONDS:
            self._clock_skew = answer.clock_skew()
            return False
        # Two who write to one object are no reason to leave the store alone.
        return answer.code not in S3_PASSING or (is_last and answer.code == 409)

    def _pass_circuit(self) -> None:
        """Let requests pass, of those that come while the circuit is open one at a time."""
        with self._lock:
            now = time.monotonic()
            if self._retry_at > now:
                raise Unavailable("it did not answer before")
            if self._retry_at:
                self._retry_at = now + S3_SECONDS

    def _open_circuit(self, problem: str, pause: float) -> None:
        with self._lock:
            if not self._retry_at:
                warn(f"{self._endpoint.netloc} cannot be used: {printable_line(problem)}")
            pause = max(pause, S3_OPEN_SECONDS) if pause < S3_SECONDS else S3_OPEN_SECONDS
            self._retry_at = time.monotonic() + pause

    def close(self) -> None:
        """Close what is kept: where one connection has ended, the others have, too."""
        while connection := self._take_kept():
            connection.close()

    def _take_kept(self) -> HTTPConnection | None:
        with contextlib.suppress(IndexError):
            while True:
                since, connection = self._idle.pop()
                if since > time.monotonic() - S3_IDLE_SECONDS:
                    return connection
                connection.close()
        return None

    def _connect(self) -> HTTPConnection:
        """Take a kept connection, or a new one."""
        if kept := self._take_kept():
            return kept
        secure = self._endpoint.scheme == "https"
        kind = http.client.HTTPSConnection if secure else HTTPConnection
        return kind(self._endpoint.netloc, timeout=S3_SECONDS, blocksize=PIECE_BYTES)

    def keep(self, connection: HTTPConnection) -> None:
        """Keep a connection whose latest answer has been read for the next request."""
        self._idle.append((time.monotonic(), connection))

    def _exchange(self, connection: HTTPConnection, request: S3Request) -> HTTPResponse:
        """Send a request over a connection and return the answer, of which the head is read."""
        method, body = request.method, request.body
        target = self._endpoint.path + request.target
        headers = {
            **request.headers, "host": self._endpoint.netloc,
            "x-amz-content-sha256": body.sha256, "x-amz-date": self._now(),
        }  # fmt: skip
        if self._signer.token:
            headers["x-amz-security-token"] = self._signer.token
        if not self._is_conditional:
            headers.pop("if-none-match", None)
        headers["authorization"] = self._signer.authorize(method, target, headers, body.sha256)
        if method in {"PUT", "POST"}:
            headers["content-length"] = str(body.size)
        if connection.sock is None:
            connection.connect()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have answered
            connection.request(method, target, body.pieces(), headers)
        return connection.getresponse()


def format_amz_date(seconds: float) -> str:
    """Format Unix seconds as Signature Version 4 has them.

    >>> format_amz_date(1369353600)
    '20130524T000000Z'
    """
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(seconds))


def check_answer(request: S3Request, answer: S3Answer) -> None:
    """Raise the OSError that an answer stands for."""
    is_error = b"<Error>" in answer.body[:1000]  # a long CompleteMultipartUpload begins with 200
    if answer.code < 300 and not is_error:
        return
    number = {403: errno.EACCES, 404: errno.ENOENT, 412: errno.EEXIST}.get(answer.code)
    place = f"s3://{request.bucket}/{request.key}"
    if number not in {errno.ENOENT, errno.EEXIST}:
        code = answer.text("Code") or answer.headers.get("x-amz-error-code", "")
        text = f"{request.method} {place}: {answer.code} {code} {answer.text('Message')}"
        if region := answer.headers.get("x-amz-bucket-region"):
            text += f" (its bucket is in {region})"
        warn(printable_line(text))
    number = number or errno.EIO
    raise OSError(number, os.strerror(number), place)


# -- Buckets -----------------------------------------------------------------------------

S3_PART_BYTES = 64 << 20  # a longer file goes up in parts of this size
MAX_KEYS = 1000  # in one page of a list, as the protocol has it
NOTE = ".object"  # ends the name of a note, in `.incoming/`, of an object that comes or goes


class Bucket(Folder):
    """A Folder of which what is `below` a folder are objects; the rest is on disk.

    That is `.incoming/` in any case, and nothing else where `below` is empty. An object keeps
    the mtime of the file that was sent, as rclone writes it: by its seconds and the size it is
    known to be the one that is meant. Before one comes or goes, a note of that lies in
    `.incoming/`, so that the next start finds what a crash has left. Objects have no links:
    equal content is kept as often as it is sent.
    """

    def __init__(
        self, name: str, path: Path, place: S3Place, client: S3Client, *, below: str = "",
        **options: Any,
    ) -> None:  # fmt: skip
        """Files on their way are in `path`; the other options are those of a Folder."""
        super().__init__(name, path, **options)
        self.place = place
        self.client = client
        self.below = below  # "", or a folder's name with `/`

    def is_local(self, name: str) -> bool:
        incoming = f"{name}/".startswith(f"{INCOMING}/")
        return incoming or not name.startswith(self.below)

    def show(self, name: str = "") -> str:
        if name and self.is_local(name):
            return super().show(name)
        return f"{self.place}/{name.removeprefix(self.below)}".rstrip("/")

    def request(self, method: str, name: str, **parts: Any) -> S3Request:
        """Return a request for an object; ValueError for what is no relative name."""
        split_name(name)
        key = f"{self.place.prefix}{name.removeprefix(self.below)}"
        return S3Request(method, self.place.bucket, key, **parts)

    # What is there

    def is_there(self) -> bool:
        """Return whether the bucket answers; where the root has more, whether that is there."""
        if self.below:
            return super().is_there()
        try:
            self._list(1)
        except OSError:
            return False
        return True

    def holds_files(self, below: str = "") -> bool:
        """Return whether anything is in the root, which is the bucket where all is in it."""
        return super().holds_files(below) if self.below else self.holds_objects()

    def holds_objects(self) -> bool:
        """Return whether anything is in the bucket below the prefix."""
        return bool(self._list(1)[0])

    def _list(self, limit: int, token: str = "") -> tuple[list[tuple[bytes, str]], str | None]:
        """Return a page of paths with their sizes, and the token of the next page, if any."""
        query = {
            "encoding-type": "url", "list-type": "2", "max-keys": str(limit),
            "prefix": self.place.prefix,
        }  # fmt: skip
        if token:
            query["continuation-token"] = token
        answer = self.client.call(S3Request("GET", self.place.bucket, query=query))
        decode = unquote_plus if answer.text("EncodingType") == "url" else str
        found = []
        for item in answer.elements("Contents"):
            path = decode(xml_text(item, "Key")).removeprefix(self.place.prefix)
            found.append((os.fsencode(self.below + path), xml_text(item, "Size")))
        return found, answer.text("NextContinuationToken") or None

    def walk_stored(
        self, wanted: Callable[[bytes], bool], unreadable: list[bytes]
    ) -> Iterator[tuple[bytes, os.stat_result]]:
        """Yield files on disk, and path and size of all wanted objects in the bytes' order."""
        yield from super().walk_stored(wanted, unreadable)
        token: str | None = ""
        while token is not None:
            try:
                found, token = self._list(MAX_KEYS, token)
            except OSError:
                unreadable.append(os.fsencode(self.below))
                return
            for path, size in found:
                if wanted(path):
                    yield path, object_status({}, size)

    def stat(self, name: str) -> os.stat_result:
        """Return size and mtime; FileNotFoundError where there is none."""
        if self.is_local(name):
            return super().stat(name)
        return object_status(self.client.call(self.request("HEAD", name)).headers)

    def stream(self, file: File) -> ObjectReader:
        """Return what reads an object while it is sent."""
        return ObjectReader(self, file.path, (file.size, file.mtime_ns))

    def open(self, name: str, *, write: bool = False) -> io.FileIO:
        """Return a copy of an object for what needs a file; it has no name."""
        if self.is_local(name):
            return super().open(name, write=write)
        import tempfile  # 5 ms

        size, mtime_ns, _ = state_of(self.stat(name))
        if self.make:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
        self.need_room(size)  # makes `.incoming/`, too
        copy = tempfile.TemporaryFile(dir=f"{self.path}/{INCOMING}", buffering=0)  # noqa: SIM115
        with undoing(copy.close):
            with contextlib.closing(ObjectReader(self, name, (size, mtime_ns))) as source:
                while (at := copy.tell()) < size:
                    write_all(copy, memoryview(source.read_at(at, size - at)))
            os.utime(copy.fileno(), ns=(mtime_ns, mtime_ns))
            copy.seek(0)
        return copy

    # What comes and goes

    def _prepare(self, incoming: Incoming, duplicate: str | None) -> None:
        """Do nothing where all are objects: these have no links, and are durable once sent."""
        if self.below:
            super()._prepare(incoming, duplicate)

    def _place(self, incoming: Incoming, name: str) -> None:
        """Send a file; FileExistsError where its name is taken."""
        if self.is_local(name):
            return super()._place(incoming, name)
        with contextlib.suppress(FileNotFoundError):  # not all stores know If-None-Match
            self.stat(name)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        _, mtime_ns, _ = state_of(os.fstat(incoming.file.fileno()))
        self._write_note(name, mtime_ns, os.O_EXCL)
        incoming.kept, incoming.note = name, note_of(name)
        try:
            self._send(incoming, name, mtime_ns, {"if-none-match": "*"})
        except FileExistsError:
            # Another program was faster, or it is this one: the answer to a first try was lost.
            if not is_from(self.stat(name), mtime_ns):
                super().unlink(incoming.note)
                incoming.kept, incoming.note = None, ""
                raise

    def _send(
        self, incoming: Incoming, name: str, mtime_ns: int, condition: Mapping[str, str]
    ) -> None:
        """Send a file, of which the store checks the hash."""
        headers = {"x-amz-meta-mtime": format_mtime(mtime_ns)}
        if incoming.facts:
            headers["content-type"] = incoming.facts.mime_type
        if incoming.size > S3_PART_BYTES:
            return self._send_parts(incoming, name, headers, condition)
        pieces = functools.partial(read_range, incoming.file, 0, incoming.size)
        body = ObjectBody(incoming.size, incoming.sha256, pieces)
        self.client.call(self.request("PUT", name, headers={**headers, **condition}, body=body))

    def _send_parts(
        self, incoming: Incoming, name: str, headers: Mapping[str, str],
        condition: Mapping[str, str],
    ) -> None:  # fmt: skip
        """Send a file in parts, which become an object together (multipart upload)."""
        call, request = self.client.call, functools.partial(self.request, name=name)
        begun = call(request("POST", query={"uploads": ""}, headers=headers))
        id, parts = {"uploadId": begun.text("UploadId")}, []
        with undoing(lambda: call(request("DELETE", query=id))):
            for number, at in enumerate(range(0, incoming.size, S3_PART_BYTES), 1):
                body = hash_range(incoming.file, at, min(S3_PART_BYTES, incoming.size - at))
                query = {"partNumber": str(number), **id}
                etag = call(request("PUT", query=query, body=body)).headers["etag"]
                parts.append(f"<PartNumber>{number}</PartNumber><ETag>{html.escape(etag)}</ETag>")
            text = "".join(f"<Part>{part}</Part>" for part in parts)
            data = f"<CompleteMultipartUpload>{text}</CompleteMultipartUpload>".encode()
            body = ObjectBody(len(data), hashlib.sha256(data).hexdigest(), lambda: [data])
            call(request("POST", query=id, headers=condition, body=body))

    def copy_in(self, name: str, status: os.stat_result, blocks: Iterable[memoryview]) -> None:
        """Send blocks as an object with the mtime of `status`, in the place of an old one."""
        if self.is_local(name):
            return super().copy_in(name, status, blocks)
        receiving = self.begin(Limit(MAX_BYTES, ""))
        try:
            for block in blocks:
                receiving.feed(block)
            self._send(receiving.finish(), name, status.st_mtime_ns, {})
        finally:
            receiving.discard()

    def link_in(self, name: str, folder: Folder, other: str) -> int:
        """Give a file on disk another name; objects have none."""
        return super().link_in(name, folder, other) if self.is_local(name) else errno.EPERM

    @contextlib.contextmanager
    def removing(self, names: Sequence[str]) -> Iterator[None]:
        """Remove objects once the block, which has the index forget them, ends without error."""
        objects = [name for name in names if not self.is_local(name)]
        on_disk = [name for name in names if self.is_local(name)]
        with undoing(self._unmark, map(note_of, objects)), super().removing(on_disk):
            for name in objects:
                self._write_note(name, 0)
            yield
        for name in objects:
            self.unlink(name)

    def unlink(self, name: str) -> None:
        """Remove a file or an object, unless it is gone; if need be, at the next start."""
        if self.is_local(name):
            super().unlink(name)
            return
        try:
            with contextlib.suppress(FileNotFoundError):
                self.client.call(self.request("DELETE", name))
            super().unlink(note_of(name))
        except OSError as error:
            warn(f"{printable_line(self.show(name))} is removed at the next start: {error}")
            with contextlib.suppress(FileNotFoundError), self.resolve(note_of(name)) as note:
                note.replace(Place(note.folder, f"{secrets.token_hex(16)}{NOTE}"))

    def _write_note(self, name: str, mtime_ns: int, flags: int = os.O_TRUNC) -> None:
        """Tell the next start of an object, by its mtime if not 0, durably.

        With O_EXCL, FileExistsError where it is told of one of that name.
        """
        with self.resolve(note_of(name), make=True) as place:
            with io.FileIO(place.open(os.O_WRONLY | os.O_CREAT | flags), "w") as file:
                write_all(file, memoryview(json.dumps([name, mtime_ns]).encode()))
                os.fsync(file.fileno())
            sync_folder(place.folder)

    def recover(self, is_known: Callable[[str], object], resumed: Set[str] = frozenset()) -> None:
        """Undo what a crash left half done: what lies in `.incoming/`, and unknown objects."""
        if self.make:
            os.makedirs(f"{self.path}/{INCOMING}", mode=0o700, exist_ok=True)
        left = set()
        with contextlib.suppress(OSError):  # there is none, or no root
            left = {name for name, _ in self.files_in(INCOMING) if name.endswith(NOTE)}
        for name in sorted(left):
            try:
                self._remove_unknown(f"{INCOMING}/{name}", is_known)
                left.remove(name)
            except OSError as error:  # it stays for the next start
                warn(f"{self.show()}: {error}")
        super().recover(is_known, resumed | left)

    def _remove_unknown(self, path: str, is_known: Callable[[str], object]) -> None:
        """Remove what a note is about, if the index does not know it."""
        with super().open(path) as file:
            try:
                name, mtime_ns = json.loads(file.read())
            except ValueError:  # a crash has cut it short: nothing was sent yet
                return
        if is_known(name):
            return
        with contextlib.suppress(FileNotFoundError):  # as some stores say where there is none
            self._abort_parts(name)
        with contextlib.suppress(FileNotFoundError):
            if not mtime_ns or is_from(self.stat(name), mtime_ns):
                self.client.call(self.request("DELETE", name))

    def _abort_parts(self, name: str) -> None:
        """Remove the parts of an upload that did not come to its end."""
        key = self.request("GET", name).key
        query = {"prefix": key, "uploads": ""}
        found = self.client.call(S3Request("GET", self.place.bucket, query=query))
        for item in found.elements("Upload"):
            if xml_text(item, "Key") == key:
                id = {"uploadId": xml_text(item, "UploadId")}
                self.client.call(self.request("DELETE", name, query=id))


class SlowReader(Protocol):
    """What gives bytes only after a while: only a thread that may wait asks it for them."""

    def read_at(self, offset: int, count: int) -> bytes:
        """Return the first of `count` bytes from `offset` on; the rest will be asked for next."""

    def close(self) -> None:
        """Let go of what the bytes come from."""


class ObjectReader(SlowReader):
    """An object's bytes from any offset on; those that are read in a row come by one request."""

    def __init__(self, bucket: Bucket, name: str, state: tuple[int, int]) -> None:
        """FileNotFoundError is raised, when it is read, for one of other size and mtime_ns."""
        self.bucket = bucket
        self.name = name
        self._state = state
        self._answer: S3Answer | None = None  # whose body is being read
        self._at = 0  # as far as here

    def check(self, status: os.stat_result) -> None:
        """Raise FileNotFoundError unless the object is the one that was asked for."""
        size, mtime_ns = self._state
        if status.st_size != size or not is_from(status, mtime_ns):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.name)

    def read_at(self, offset: int, count: int) -> bytes:
        with self.bucket.client.slot():
            for _ in range(2):  # a store may have hung up while the reader was slow
                if self._answer is None or self._at != offset:
                    self.close()
                    self._answer, self._at = self._begin(offset, count), offset
                with contextlib.suppress(OSError, HTTPException):
                    if piece := self._answer.response.read(min(count, PIECE_BYTES)):
                        self._at += len(piece)
                        return piece
                self.close()
        raise Unavailable("an object broke off")

    def _begin(self, offset: int, count: int) -> S3Answer:
        headers = {"range": f"bytes={offset}-{offset + count - 1}"}
        request = self.bucket.request("GET", self.name, headers=headers)
        answer = self.bucket.client.open(request)
        with undoing(answer.connection.close):
            part, _, total = answer.headers.get("content-range", "").rpartition("/")
            if not part.startswith(f"bytes {offset}-"):  # the status is 200 from some stores
                raise Unavailable("a range is answered with another one")
            self.check(object_status(answer.headers, total))
        return answer

    def url(self, seconds: int) -> str:
        """Return a URL under which anyone may GET the object for so many seconds."""
        return self.bucket.client.presign(self.bucket.request("GET", self.name), seconds)

    def close(self) -> None:
        """End the reading; the connection can be used again if the whole answer was read."""
        answer, self._answer = self._answer, None
        if answer and answer.response.isclosed() and not answer.response.length:
            self.bucket.client.keep(answer.connection)
        elif answer:
            answer.connection.close()


def note_of(name: str) -> str:
    """Return the name of the note of an object."""
    return f"{INCOMING}/{mark_of(name)}{NOTE}"


def object_status(headers: HTTPMessage | Mapping[str, str], size: str = "") -> os.stat_result:
    """Return the mtime that headers tell, and the size if none is given, as of a nameless file."""
    mtime_ns = 0
    with contextlib.suppress(ValueError):
        if kept := headers.get("x-amz-meta-mtime"):
            seconds, _, fraction = kept.partition(".")
            mtime_ns = int(seconds) * 10**9 + int(f"{fraction:0<9.9}")
        elif changed := headers.get("last-modified"):  # rclone's server knows it after a restart
            mtime_ns = int(parsedate_to_datetime(changed).timestamp()) * 10**9
    mtime_ns = clamp(mtime_ns)  # as the index has it
    times = {"st_mtime_ns": mtime_ns, "st_mtime": mtime_ns / 1e9, "st_ctime": mtime_ns / 1e9}
    length = int(size or headers.get("content-length") or 0)
    return os.stat_result((stat.S_IFREG | 0o600, 0, 0, 0, 0, 0, length, 0, 0, 0), times)


def is_from(status: os.stat_result, mtime_ns: int) -> bool:
    """Return whether an object has this mtime, as far as stores keep it."""
    return status.st_mtime_ns // 10**9 == mtime_ns // 10**9


def format_mtime(mtime_ns: int) -> str:
    """Format a time as seconds, as rclone writes it: nanoseconds are kept.

    >>> format_mtime(1500000000000000007)
    '1500000000.000000007'
    """
    return f"{mtime_ns // 10**9}.{mtime_ns % 10**9:09}"


def hash_range(file: io.FileIO, offset: int, count: int) -> ObjectBody:
    """Return a part of a file as a body."""
    digest, pieces = hashlib.sha256(), functools.partial(read_range, file, offset, count)
    for piece in pieces():
        digest.update(piece)
    return ObjectBody(count, digest.hexdigest(), pieces)


# ======================================================================================
# 7. Thumbnails
# ======================================================================================
# A decoder is a Unix filter in a process of its own: the picture is its standard input, the
# PNG its standard output, and the kernel's limits bound what it may cost. So a bomb, a hang
# or a crash costs one thumbnail, and decoding never takes the server's GIL. The processes
# are forked by a *decoder host*, itself forked before the server has threads, connections or
# secrets: a job is one datagram with two descriptors (picture, pipe for the result), and the
# job's end is the end of the pipe. The host imports Pillow once; its children share it, and
# each does a few jobs.
# Both decoders are optional: Pillow for images, ffmpeg for videos and what Pillow cannot open.

THUMBNAIL_SIZE = 256  # pixels, the longer side at most
PREVIEW_SIZES = (320, 720, 1440, 2160)  # pixels, likewise
MAX_RESULT_BYTES = 16 << 20  # of one job; the largest preview of noise has 7 MB
FRAME_LENGTH = struct.Struct(">I")  # stands before each rendition
LOOK_UP_SECONDS = 0.2  # between looks whether the server ends, while a decoder works
FRAME_SECONDS = 1.0  # the first frame of a video is often black
DECODER_HOST = "decoder-host"  # the word that makes this program one
AWAITED = b"!"  # begins a job that somebody waits for
DECODER_DONE = b"done\n"  # a decoder's last word: without it, it died
RESTART_SECONDS = 1.0  # between two starts of the decoder host
TRY_AGAIN_SECONDS = 5.0  # after which what failed for a while only is tried again
MAX_DECODER_CRASHES = 3
MAX_CRASHES_KNOWN = 10_000
RAW_FORMATS = formats_for("raw")


def shared_numbers(kind: str, count: int = 1) -> Any:
    """Return zeros of a kind (struct's letter) that this process and all forked from it share."""
    memory: Any = memoryview(mmap.mmap(-1, count * struct.calcsize(kind)))
    return memory.cast(kind)


class Rendition(NamedTuple):
    """A form that a picture is given out in: at most `size` pixels wide and high."""

    format: str  # PNG, WEBP or JPEG
    size: int


THUMBNAIL = Rendition("PNG", THUMBNAIL_SIZE)
PREVIEWS = [*itertools.starmap(Rendition, itertools.product(("WEBP", "JPEG"), PREVIEW_SIZES))]
FIRST_PREVIEW = PREVIEWS[0]  # is made together with the thumbnail


class Job(NamedTuple):
    """What a decoder is to make of which kind of picture."""

    kind: str  # image, raw or video
    renditions: tuple[Rendition, ...]
    seconds: float = 0.0  # of the frame of a video
    orientation: int = 1  # EXIF's, for where the decoder finds none
    width: int = 0  # as stored
    height: int = 0
    ahead: bool = False  # nobody waits for it

    def to_bytes(self) -> bytes:
        """Return the message that tells a decoder host of the job."""
        return (b"-" if self.ahead else AWAITED) + json.dumps(self).encode()

    @classmethod
    def from_bytes(cls, message: bytes) -> Job:
        """Return the job that a message tells of."""
        kind, renditions, *rest = json.loads(message[1:])
        return cls(kind, tuple(Rendition(*each) for each in renditions), *rest)


class Decoders(NamedTuple):
    """What a decoder process can decode with."""

    formats: list[str]  # that Pillow opens; none where it is missing
    ffmpeg: str | None  # its path


class Outcome(enum.Enum):
    """What became of a thumbnail."""

    MADE = 1
    IMPOSSIBLE = 0  # a decoder's own verdict on these bytes
    FAILED = -1  # for another reason: it is to be tried again


class ImageCache:
    """A folder of renditions, which are named by their source's sha256."""

    def __init__(self, folder: Folder, prefix: str) -> None:
        """`prefix` is what their names in `folder` begin with."""
        self.folder = folder
        self.prefix = prefix

    def name(self, sha256: str, rendition: Rendition = THUMBNAIL) -> str:
        """Return the name of a rendition in the folder."""
        if rendition == THUMBNAIL:
            return f"{self.prefix}{sha256}.png"
        return f"{self.prefix}{sha256}-{rendition.size}.{rendition.format.lower()}"

    def exists(self, sha256: str) -> bool:
        """Return whether there is a thumbnail; an empty file is none: they are not synced."""
        try:
            status = self.folder.stat(self.name(sha256))
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size > 0

    def read(self, sha256: str, rendition: Rendition = THUMBNAIL) -> bytes:
        """Return the rendition; OSError where there is none."""
        with self.folder.open(self.name(sha256, rendition)) as file:
            return file.read(MAX_RESULT_BYTES)

    def store(self, sha256: str, rendition: Rendition, data: bytes) -> None:
        """Put a rendition in place; OSError where it cannot be."""
        name = self.name(sha256, rendition)
        last = posixpath.basename(name)
        incoming = f"{self.prefix}{INCOMING}/{os.getpid()}.{threading.get_ident()}.{last}"
        with self.folder.resolve(incoming, make=True) as source, undoing(source.unlink):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            with io.FileIO(source.open(flags, 0o600), "w") as file:
                write_all(file, memoryview(data))
            with self.folder.resolve(name) as target:
                source.replace(target)

    def remove(self, sha256: str, *renditions: Rendition) -> None:
        """Delete those renditions that there are and that can be deleted."""
        for rendition in renditions:
            with contextlib.suppress(OSError):  # nobody is given what the index has forgotten
                self.folder.unlink(self.name(sha256, rendition))

    def recover(self) -> None:
        """Delete what a crash left half-written; only while no other process makes any."""
        with contextlib.suppress(OSError):
            for name, _ in self.folder.files_in(self.prefix + INCOMING):
                self.folder.unlink(f"{self.prefix}{INCOMING}/{name}")


PREVIEWS_PREFIX = "previews/"  # in DATA


class PreviewCache(ImageCache):
    """Previews in a folder of at most `limit` bytes, or none: the least recently used ones go."""

    def __init__(self, folder: Folder, prefix: str, limit: int, used: memoryview) -> None:
        """`used` is shared by all processes: how many bytes lie there, at most."""
        super().__init__(folder, prefix)
        self.limit = limit
        self._used = used
        self._lock = threading.Lock()

    def read(self, sha256: str, rendition: Rendition = FIRST_PREVIEW) -> bytes:
        """Return the preview, and note its use as its time of modification; OSError if none."""
        with self.folder.open(self.name(sha256, rendition)) as file:
            with contextlib.suppress(OSError):  # a disk that can only be read
                os.utime(file.fileno())
            return file.read(MAX_RESULT_BYTES)

    def store(self, sha256: str, rendition: Rendition, data: bytes) -> None:
        """Keep a preview, if it can be: it can be made again."""
        if len(data) > self.limit:
            return
        with contextlib.suppress(OSError):
            self.folder.need_room(len(data))
            with self._lock:
                if self._used[0] + len(data) > self.limit:
                    self._make_room(len(data))
                self._used[0] += len(data)
            super().store(sha256, rendition, data)

    def _make_room(self, size: int) -> None:
        """Count what lies there, and delete of it what leaves an eighth free, and `size` bytes."""
        folder, files = self.prefix.rstrip("/"), []
        with contextlib.suppress(FileNotFoundError):  # it is made with the first preview
            for name, status in self.folder.files_in(folder):
                files.append((status.st_mtime_ns, name, status.st_size))
        used = sum(length for _, _, length in files)
        allowed = min(self.limit * 7 // 8, self.limit - size)
        for _, name, length in sorted(files) if used + size > self.limit else ():
            if used <= allowed:
                break
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                self.folder.unlink(f"{folder}/{name}")
            used -= length
        self._used[0] = used


class Making:
    """What one thread makes and others wait for."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.result: Any = None


class Thumbnails:
    """PNG thumbnails named by their source's sha256, made by decoder processes.

    `start` once, before the program has threads; every process forked later may `make`. Those
    of files that not everyone may read lie apart.
    """

    def __init__(self, processes: int | None = None) -> None:
        """Let at most `processes` decoders work ahead at once; by default one a processor."""
        self.processes = processes or os.cpu_count() or 1
        self.pillow = find_pillow()
        self.ffmpeg = shutil.which("ffmpeg")
        self.restarts = shared_numbers("Q")
        # When an upload began in one of them, monotonic: decoders wait for it and the next
        self.upload_at = shared_numbers("d")
        kinds = ("thumbnail", "preview")
        self.decoding = {kind: shared_numbers("Q", 2) for kind in kinds}  # times, nanoseconds
        self.preview_bytes = shared_numbers("Q")  # as PreviewCache wants it
        self.preview_bytes[0] = MAX_BYTES  # nobody has counted
        self.caches: tuple[ImageCache, ...] = ()  # public, private
        self.previews: PreviewCache
        self._host: socket.socket | None = None
        self._host_id = 0
        self._sockets: list[socket.socket] = []
        self._restart_at = 0.0
        self._lock = threading.Lock()
        self._making: dict[str, Making] = {}
        self._crashes: dict[str, tuple[int, float]] = {}  # of decoders: how many, when the last
        self.is_over = False  # nobody waits for what is being made

    def set_caches(self, public: ImageCache, private: ImageCache, previews: PreviewCache) -> None:
        """Say where thumbnails and previews lie."""
        self.caches = (public, private)
        self.previews = previews

    @property
    def description(self) -> str:
        """Return the decoders found, as the start tells; another one installed changes it."""
        found = [name for name in (self.pillow, "ffmpeg" if self.ffmpeg else None) if name]
        hint = "" if self.pillow else "; for images install Pillow (apt install python3-pil)"
        return (", ".join(found) or "none") + hint

    @property
    def kinds(self) -> list[str]:
        """Return what the decoders found here are for."""
        found = {"image": self.pillow, "video": self.ffmpeg}
        return [kind for kind, decoder in found.items() if decoder]

    def can_make(self, kind: str, mime_type: str) -> bool:
        """Return whether a decoder found here might draw such content; never SVG."""
        return kind in self.kinds and mime_type != "image/svg+xml"

    def ensure_host(self) -> bool:
        """Start the decoder host again if it has ended, after a while; return whether it runs."""
        if self._host is None or is_connected(self._host):
            return self._host is not None
        with self._lock:
            if not is_connected(self._host) and time.monotonic() >= self._restart_at:
                self._restart_at = time.monotonic() + RESTART_SECONDS
                self._restart()
            return is_connected(self._host)

    def start(self) -> None:
        """Fork the decoder host. Nothing is forked where no decoder is installed."""
        if not self.kinds:
            return
        server, host = connected_pair()
        self._host_id = os.fork()
        if self._host_id == 0:
            try:
                become_host(host)
                run_decoder_host(host, self.processes, self.ffmpeg)
            finally:
                os._exit(0)
        host.close()
        self._sockets.append(server)
        self._host = server

    def _restart(self) -> None:
        """Start another host, as a program of its own: this process has threads and secrets."""
        program = run_decoder_host.__code__.co_filename  # also where bytecode is run
        names = ("PATH", "PYTHONPATH", "HOME", "LD_LIBRARY_PATH")  # where decoders are
        environment = {name: os.environ[name] for name in names if name in os.environ}
        server, host = connected_pair()
        with host:
            host.set_inheritable(True)
            words = [DECODER_HOST, str(host.fileno()), str(self.processes), self.ffmpeg or ""]
            try:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(self._host_id, os.WNOHANG)
                command = [sys.executable, program, *words]
                self._host_id = os.posix_spawn(sys.executable, command, environment)
            except OSError:  # no process to be had: later
                server.close()
                return
        self._sockets.append(server)  # one that is in use elsewhere is not closed yet
        self._host = server
        self.restarts[0] += 1
        warn("the decoder host had ended; it is started again")

    def stop(self) -> None:
        """Let go of the host, which exits when every process that shares it has."""
        self._host = None
        while self._sockets:
            self._sockets.pop().close()

    def cache_of(self, file: File) -> ImageCache:
        """Return where the thumbnail of a file lies."""
        return self.caches[file.root != "library"]

    def remove(self, *hashes: str, public_only: bool = False) -> None:
        """Delete those thumbnails and previews that there are and that can be deleted."""
        for sha256 in hashes:
            for cache in self.caches[: 1 if public_only else 2]:
                cache.remove(sha256, THUMBNAIL)
            if not public_only:
                self.previews.remove(sha256, THUMBNAIL, *PREVIEWS)

    def recover(self) -> None:
        """Delete what a crash left half-written; only while no other process makes any."""
        for cache in (*self.caches, self.previews):
            cache.recover()

    def make(self, folder: Folder, file: File, asset: Asset, *, ahead: bool = False) -> Outcome:
        """Make the thumbnail of an image or video, unless there is one.

        Blocks until it is done; threads that ask for the same one wait for the first, but not for
        one that makes it ahead, which may take long where the processors are busy. Raises
        OSError if the file cannot be opened or the thumbnail not stored.
        """
        sha256, cache = asset.sha256, self.cache_of(file)

        def make() -> Outcome:
            if cache.exists(sha256):
                return Outcome.MADE
            renditions = (THUMBNAIL, FIRST_PREVIEW) if self.previews.limit else (THUMBNAIL,)
            made = self._render(folder, file, asset, renditions, ahead=ahead)
            if isinstance(made, Outcome):
                return made
            cache.store(sha256, THUMBNAIL, made[0])
            for preview in made[1:]:  # there is none without Pillow
                self.previews.store(sha256, FIRST_PREVIEW, preview)
            return Outcome.MADE

        return self._make_once(f"{cache.name(sha256)} {ahead}", make)

    def preview(
        self, folder: Folder, file: File, asset: Asset, rendition: Rendition
    ) -> bytes | Outcome:
        """Return the preview of an image or video, made unless at hand; OSError as `make`."""
        sha256 = asset.sha256

        def make() -> bytes | Outcome:
            with contextlib.suppress(OSError):
                return self.previews.read(sha256, rendition)
            made = self._render(folder, file, asset, (rendition,))
            if isinstance(made, Outcome):
                return made
            self.previews.store(sha256, rendition, made[0])
            return made[0]

        return self._make_once(f"{sha256} {rendition}", make)

    def _make_once(self, key: str, make: Callable[[], T]) -> T:
        """Return what `make` does; of threads with one key at once, the first makes it for all."""
        while True:
            with self._lock:
                other = self._making.get(key)
                if other is None:
                    making = self._making[key] = Making()
                    break
            other.done.wait()
            result: T | None = other.result
            if result is not None:  # what it raised is its own affair: the next one tries
                return result
        try:
            made = making.result = make()
            return made
        finally:
            with self._lock:
                del self._making[key]
            making.done.set()

    def _render(
        self, folder: Folder, file: File, asset: Asset, renditions: tuple[Rendition, ...],
        *, ahead: bool = False,
    ) -> list[bytes] | Outcome:  # fmt: skip
        """Return the renditions of a file, or why there are none."""
        facts = asset.facts
        if facts is None or not self._may_try(asset.sha256):
            return Outcome.FAILED
        kind = "raw" if facts.extension in RAW_FORMATS else facts.kind
        seconds = min(FRAME_SECONDS, (facts.duration or 0) / 3) if kind == "video" else 0.0
        size = (facts.width or 0, facts.height or 0)
        job = Job(kind, renditions, seconds, facts.orientation, *size, ahead)
        with folder.open(file.path) as source:
            if not file.matches(os.fstat(source.fileno())):
                return Outcome.FAILED
            began = time.monotonic_ns()
            made = self._decode(source, job)
            unchanged = file.matches(os.fstat(source.fileno()))  # or it was written meanwhile
        counted = self.decoding["thumbnail" if THUMBNAIL in renditions else "preview"]
        with self._lock:
            counted[0] += 1
            counted[1] += time.monotonic_ns() - began
        if not unchanged:
            return Outcome.FAILED
        if made is None:
            return self._count_crash(asset.sha256)
        return made or Outcome.IMPOSSIBLE

    def _may_try(self, sha256: str) -> bool:
        """Return whether enough time has passed since a decoder died of this picture."""
        return time.monotonic() >= self._crashes.get(sha256, (0, -math.inf))[1] + TRY_AGAIN_SECONDS

    def _count_crash(self, sha256: str) -> Outcome:
        """Count a decoder's death: a single one is chance, some make the picture IMPOSSIBLE."""
        if not self.ensure_host():
            return Outcome.FAILED
        with self._lock:
            crashes = self._crashes.pop(sha256, (0, 0.0))[0] + 1
            if crashes >= MAX_DECODER_CRASHES:
                return Outcome.IMPOSSIBLE
            if len(self._crashes) >= MAX_CRASHES_KNOWN:
                self._crashes.clear()
            self._crashes[sha256] = crashes, time.monotonic()
        return Outcome.FAILED

    def _decode(self, source: io.FileIO, job: Job) -> list[bytes] | None:
        """Return the renditions; none where the decoder can make none, None if it died."""
        host = self._host
        end, result = os.pipe()
        with open(end, "rb", buffering=0) as pipe:
            with contextlib.suppress(OSError):  # the host is gone, and with it the pipe's end
                if host is not None:
                    socket.send_fds(host, [job.to_bytes()], [source.fileno(), result])
            os.close(result)
            data = self._read_result(pipe)
        if len(data) > MAX_RESULT_BYTES:
            return []
        frames = data.removesuffix(DECODER_DONE)
        return split_frames(frames) if frames != data else None

    def _read_result(self, pipe: io.FileIO) -> bytes:
        """Read what a decoder writes until it ends; less when the server does."""
        data, poll = bytearray(), select.poll()
        poll.register(pipe, select.POLLIN)
        while len(data) <= MAX_RESULT_BYTES and not self.is_over:
            if poll.poll(LOOK_UP_SECONDS * 1000):
                piece = pipe.read(MAX_RESULT_BYTES)
                if not piece:
                    break
                data += piece
        return bytes(data)


def split_frames(data: bytes) -> list[bytes]:
    """Split what a decoder has written, each after its length; nothing if the last one is cut."""
    frames = []
    while data:
        end = FRAME_LENGTH.size + int.from_bytes(data[: FRAME_LENGTH.size], "big")
        if len(data) < end:
            return []
        frames.append(data[FRAME_LENGTH.size : end])
        data = data[end:]
    return frames


def connected_pair() -> tuple[socket.socket, socket.socket]:
    """Make the sockets for jobs, which are one message each."""
    try:
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError:  # macOS
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)


def is_connected(host: socket.socket | None) -> bool:
    """Return whether the decoder host lives: it says nothing, so only its end is ever read."""
    try:
        return bool(host and host.recv(1, socket.MSG_DONTWAIT))
    except BlockingIOError:
        return True
    except OSError:
        return False


def find_pillow() -> str | None:
    """Return the installed Pillow's name and version, without the 50 ms that importing takes."""
    spec = importlib.util.find_spec("PIL")
    if spec is None or spec.origin is None:
        return None
    version = None
    with contextlib.suppress(OSError):
        text = Path(spec.origin).with_name("_version.py").read_text()
        version = re.search(r"""__version__ = ["']([^"']+)""", text)
    heif = " with HEIF" if importlib.util.find_spec("pillow_heif") else ""
    return f"Pillow {version[1]}{heif}" if version else f"Pillow{heif}"


# -- The decoder host --------------------------------------------------------------------

JOBS_A_DECODER = 32  # then a fresh process: what a decoder leaks is bounded
REAP_SECONDS = 1.0  # after which an idle decoder ends
TAKE_SECONDS = 0.005  # in which a fresh decoder takes the job it was forked for
DECODER_NICE = 10  # leaves nine tenths of a processor to the server
AWAITED_DECODERS = 2  # beside those that work ahead
# Pillow's other plugins are left out: some start programs (EPS), and few are ever fuzzed.
PILLOW_FORMATS = {
    "JPEG": "PIL.JpegImagePlugin",
    "MPO": "PIL.MpoImagePlugin",  # JPEG with a second picture, from phones and 3D cameras
    "PNG": "PIL.PngImagePlugin",
    "GIF": "PIL.GifImagePlugin",
    "WEBP": "PIL.WebPImagePlugin",
    "BMP": "PIL.BmpImagePlugin",
    "TIFF": "PIL.TiffImagePlugin",
    "ICO": "PIL.IcoImagePlugin",
    "JPEG2000": "PIL.Jpeg2KImagePlugin",
    "AVIF": "PIL.AvifImagePlugin",  # since Pillow 11.3
    "HEIF": "pillow_heif",
    "JXL": "pillow_jxl",
}


def become_host(host: socket.socket) -> None:
    """Keep nothing of the server but the socket: no descriptors, no signals, less urgency."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C is for the server; the host ends after it
    for number in (signal.SIGCHLD, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    gc.freeze()  # a server's file that is collected here would close a descriptor of ours
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.closerange(3, host.fileno())
    os.closerange(host.fileno() + 1, 1 << 16)  # SC_OPEN_MAX can be 2**30, closed one by one
    os.nice(DECODER_NICE)


def run_decoder_host(host: socket.socket, processes: int, ffmpeg: str | None) -> None:
    """Fork decoders while there are jobs, at most so many, until the server has closed its end."""
    server = os.getppid()
    silent = host.type != socket.SOCK_SEQPACKET  # datagrams tell no end of file
    decoders: Decoders | None = None
    running, most = 0, processes + AWAITED_DECODERS
    while not silent or os.getppid() == server:
        while running and os.waitpid(-1, 0 if running >= most else os.WNOHANG)[0]:
            running -= 1
        select.select([host], [], [], REAP_SECONDS if running or silent else None)
        with contextlib.suppress(BlockingIOError):  # none came, or a decoder was quicker
            if not host.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                return
            decoders = decoders or Decoders(load_pillow(), ffmpeg)
            with contextlib.suppress(OSError):  # no process to be had: the job waits
                if os.fork() == 0:
                    run_decoder(host, decoders)
                running += 1
            time.sleep(TAKE_SECONDS)


def load_pillow() -> list[str]:
    """Import Pillow and its plugins for PILLOW_FORMATS; return the formats that it can open."""
    # One thread a decoder: jobs are parallel already, and threads count against the limits.
    try:
        from PIL import Image
    except ImportError:
        return []
    for module in (*PILLOW_FORMATS.values(), "PIL.ImageCms"):
        with contextlib.suppress(ImportError):
            plugin: Any = importlib.import_module(module)
            if module == "pillow_heif":
                plugin.register_heif_opener(decode_threads=1)
            elif module == "PIL.AvifImagePlugin":
                plugin.DEFAULT_MAX_THREADS = 1
    Image.preinit()  # what the first `Image.open` would import, in every child again
    return [name for name in PILLOW_FORMATS if name in Image.OPEN]


# -- One job -----------------------------------------------------------------------------

DECODE_WALL_SECONDS = 60  # a disk that spins up, a card that is slow
DECODE_CPU_SECONDS = 20  # a second of 4K video on a Raspberry Pi
DECODE_MEMORY = 768 << 20  # bytes of address space beyond what the host has: fits 1 GB boards
DECODE_FILES = 64  # descriptors; shared libraries need a few at a time


def run_decoder(host: socket.socket, decoders: Decoders) -> None:
    """Do some jobs, until one fails or there are no more; never returns.

    A fork costs as much as a small picture, so it is not made for each. Who has worked ahead
    leaves what somebody waits for to another one: the way back from SCHED_IDLE is not allowed.
    """
    is_idle = False
    try:
        limit_process()
        host.settimeout(REAP_SECONDS)
        for _ in range(JOBS_A_DECODER):
            if is_idle and host.recv(1, socket.MSG_PEEK) == AWAITED:
                break
            message, descriptors, _, _ = socket.recv_fds(host, 1024, 2)
            if not message:
                break
            job = Job.from_bytes(message)
            if job.ahead and not is_idle:
                is_idle = True
                lower_priority()
            run_job(job, descriptors, decoders)
    finally:
        os._exit(0)


def lower_priority() -> None:
    """Work only while nobody else does (sched(7)): whoever wakes up goes first, at once."""
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def run_job(job: Job, descriptors: list[int], decoders: Decoders) -> None:
    """Do a job as a filter from picture (standard input) to renditions (standard output)."""
    for standard, descriptor in enumerate(descriptors):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    signal.alarm(DECODE_WALL_SECONDS)
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + DECODE_CPU_SECONDS, hard))
    try:
        with open(0, "rb", closefd=False) as source, open(1, "wb", closefd=False) as target:
            write_renditions(source, target, job, decoders)
    finally:  # what a decoder raises is its verdict, too
        os.write(1, DECODER_DONE)
        for standard in (0, 1):
            os.dup2(2, standard)  # which is the null device: the pipe's end is the job's end


def limit_process() -> None:
    """Bound memory and files of this process and of what it executes (setrlimit(2))."""
    limits = {
        resource.RLIMIT_FSIZE: 0,  # the result is a pipe: no file can be written
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: DECODE_FILES,
    }
    with contextlib.suppress(OSError):  # no /proc, as on macOS, which has no such limit either
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = mapped + DECODE_MEMORY
    for name, limit in limits.items():  # a lower one, as of a container, stays
        lowest = min({limit, resource.getrlimit(name)[1]} - {resource.RLIM_INFINITY})
        resource.setrlimit(name, (lowest, lowest))


def write_renditions(source: BinaryIO, target: BinaryIO, job: Job, decoders: Decoders) -> None:
    """Write what the job wants, each after its length; nothing where no decoder can.

    Nothing but pixels is written: no EXIF, no place, no colour profile.
    """
    results = []
    if decoders.formats:
        if picture := decode(source, job, decoders):
            results = [encode(picture, rendition) for rendition in job.renditions]
    elif decoders.ffmpeg and job.renditions[0].format == "PNG":
        results = [run_ffmpeg(decoders.ffmpeg, job, job.renditions[0].size)]
    for data in results:
        if data:
            target.write(FRAME_LENGTH.pack(len(data)) + data)


def decode(source: BinaryIO, job: Job, decoders: Decoders) -> Image.Image | None:
    """Decode the picture in the largest size wanted, upright and in sRGB, by the first way.

    One that is too large may have a small form in it, as HEIC has. One that is cut short is shown
    as far as it goes. Of a raw one, and of what cannot be decoded otherwise, the largest JPEG in
    it is the best that there is.
    """
    size = max(rendition.size for rendition in job.renditions)
    from_source = functools.partial(open_picture, source, decoders.formats)
    whole = functools.partial(from_source, size)
    small = functools.partial(from_source, THUMBNAIL_SIZE)
    cut_short = functools.partial(from_source, size, cut_short=True)
    embedded = (
        functools.partial(open_picture, jpeg, ["JPEG"], size, job.orientation)
        for jpeg in embedded_jpegs(source, job)
    )
    frame = functools.partial(open_frame, decoders.ffmpeg, job, size)
    ways: dict[str, Iterable[Callable[[], Image.Image | None]]] = {
        "image": itertools.chain((whole, small, cut_short, frame), embedded),
        "raw": itertools.chain(embedded, (whole, cut_short)),
        "video": (frame,),
    }
    for way in ways[job.kind]:
        with contextlib.suppress(Exception):  # Pillow's plugins raise anything
            if picture := way():
                return picture
    return None


# -- Pillow ------------------------------------------------------------------------------

STRIP_PIXELS = 4_000_000  # are converted at once
MAX_FILLED_BYTES = 64 << 20  # of a WebP that is cut short
LOSSLESS_FILL = b"\x55"  # is a code in nearly all pictures; 0 and 255 often are none
ODD_BMPS = {(2, 0), (32, 0), (16, 3), (32, 3), (16, 6), (32, 6)}  # bits a pixel, compression
PREVIEW_QUALITY = 80  # of WebP and JPEG, up to 100
TIFF_PHOTOMETRIC = 262
BICUBIC: Any = 3  # in all versions of Pillow
TURNS = {  # what an orientation asks for (EXIF 2.32 §4.6.4), of Pillow and of ffmpeg
    2: (0, "hflip"), 3: (3, "hflip,vflip"), 4: (1, "vflip"), 5: (5, "transpose=0"),
    6: (4, "transpose=1"), 7: (6, "transpose=3"), 8: (2, "transpose=2"),
}  # fmt: skip


def open_picture(
    source: BinaryIO, formats: list[str], size: int, orientation: int = 1,
    *, cut_short: bool = False,
) -> Image.Image | None:  # fmt: skip
    """Decode an image within `size` by `size` pixels; `orientation` is for one without its own.

    Raises what Pillow raises. None where it is cut short before its first pixel.
    """
    from PIL import Image, ImageFile, PngImagePlugin

    Image.MAX_IMAGE_PIXELS = None  # the memory of the process is the limit, also for texts
    source.seek(0)
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = DECODE_MEMORY // 4
    ImageFile.LOAD_TRUNCATED_IMAGES = cut_short
    picture: Any = None
    with contextlib.suppress(OSError, ValueError, OverflowError, MemoryError):
        picture = read_odd_bmp(source)
    source.seek(0)
    if picture is None:
        picture = Image.open(fill_up(source) if cut_short else source, formats=formats)
    if picture.format == "GIF" and (place := picture.tile[0][1]) != (0, 0, *picture.size):
        frame, picture = picture.convert("RGBA").crop(place), Image.new("RGBA", picture.size)
        picture.paste(frame, place)  # around the first frame there is nothing
    if profile := find_profile(picture, source):
        picture.info["icc_profile"] = profile
    orientation = read_orientation(picture) or orientation
    if picture.format == "TIFF":  # Pillow turns these as it loads them
        picture.load()
        orientation = 1
    small = shrink(picture, size)
    if cut_short and not small.getbbox():
        return None
    turn: Any = TURNS.get(orientation)
    return small.transpose(turn[0]) if turn else small


def read_odd_bmp(source: BinaryIO) -> Image.Image | None:
    """Decode a BMP of 2 bits a pixel, or with masks: Pillow knows few, and hardly any alpha."""
    from PIL import Image

    magic, start, header, width, height, bits, packing, *masks = struct.unpack(
        "<2s8xIIii2xHI20x4I", source.read(70).ljust(70, b"\0")
    )
    if magic != b"BM" or (bits, packing) not in ODD_BMPS:
        return None
    source.seek(14 + header)
    palette = source.read(16)
    source.seek(start)
    shape, stride, step = (width, abs(height)), (width * bits + 31) // 32 * 4, max(1, bits // 8)
    data = source.read(stride * shape[1])

    def read(data: bytes, mode: str, layout: str) -> Image.Image:
        about = (layout, stride // step, -1 if height > 0 else 1)
        return Image.frombytes(mode, shape, data, "raw", *about)

    if bits == 2:
        picture = read(data, "P", "P;2")
        picture.putpalette(palette, "BGRX")
        return picture
    if packing == 0:  # whose fourth byte is alpha from version 4 on, where it is anything
        masks = [0xFF0000, 0xFF00, 0xFF, 0xFF000000 * (header >= 108 and any(data[3::4]))]
    elif header < 56 and packing != 6:
        masks[3] = 0
    masks = masks[: 4 if masks[3] else 3]
    bands = [read(read_channel(data, mask, step), "L", "L") for mask in masks]
    return Image.merge("RGBA"[: len(masks)], bands)


def read_channel(data: bytes, mask: int, step: int) -> bytes:
    """Scale the bits of a mask to 8, of pixels of `step` bytes."""
    top = mask.bit_length()
    width = min(8, mask.bit_count()) or 1
    most = (1 << width) - 1
    levels = bytes((byte & most) * 255 // most * bool(mask) for byte in range(256))
    shifted = int.from_bytes(data, "little") >> max(0, top - width)
    return shifted.to_bytes(len(data), "little")[::step].translate(levels)


def fill_up(source: BinaryIO) -> BinaryIO:
    """Return a WebP that is cut short in its full length, as libwebp wants it; others as they are.

    A lossless one gets more: what is filled in may take more bits a pixel than what is missing.
    """
    data = bytearray(source.read(MAX_FILLED_BYTES))
    source.seek(0)
    magic, length = struct.unpack("<4sI", data[:8].ljust(8, b"\0"))
    if magic != b"RIFF" or length > MAX_FILLED_BYTES:
        return source
    at = 12
    while data.startswith((b"VP8X", b"ICCP"), at):
        at += 8 + (struct.unpack_from("<I", data, at + 4)[0] + 1 & ~1)
    if not data.startswith(b"VP8L", at):
        return io.BytesIO(data.ljust(length + 8, b"\0"))
    data = data.ljust(MAX_FILLED_BYTES, LOSSLESS_FILL)
    struct.pack_into("<I", data, 4, len(data) - 8)
    struct.pack_into("<I", data, at + 4, len(data) - at - 8)
    return io.BytesIO(data)


def read_orientation(picture: Image.Image) -> int:
    """Return EXIF's orientation of a picture, from 1 to 8; 0 where it has none."""
    with contextlib.suppress(SyntaxError, ValueError, LookupError, OSError, struct.error):
        return int(picture.getexif().get(EXIF_ORIENTATION, 0))
    return 0


def fit(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Return the largest width and height of this shape within `size`, never enlarged."""
    width, height = shape
    scale = min(1.0, size / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def shrink(picture: Image.Image, size: int) -> Image.Image:
    """Return the picture within `size` by `size` pixels in sRGB, as L, RGB or RGBA.

    It is averaged in its own colours and then converted, which is for few pixels; strip by
    strip, so that one picture as large as memory is enough.
    """
    from PIL import Image

    # A JPEG is scaled while it is decoded, down to the next size above: half the time of the
    # default gap, and no difference to the eye.
    picture.draft(None, fit(picture.size, size))
    profile = picture.info.get("icc_profile")
    prepare = find_preparation(picture)
    width, height = picture.size
    fitted = fit(picture.size, size)
    factor = max(1, min(width // fitted[0], height // fitted[1]))
    rows = max(1, STRIP_PIXELS // width // factor) * factor
    reduced: Image.Image | None = None
    for top in range(0, height, rows):
        strip = prepare(picture.crop((0, top, width, min(top + rows, height)))).reduce(factor)
        if reduced is None:
            reduced = Image.new(strip.mode, (strip.width, -(-height // factor)))
        reduced.paste(strip, (0, top // factor))
    assert reduced is not None
    exact = (0, 0, width / factor, height / factor)
    small = reduced.resize(fitted, BICUBIC, exact)
    return convert_to_srgb(small.convert("RGBA") if small.mode == "RGBa" else small, profile)


def find_preparation(picture: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Return what makes of a part of the picture one whose values can be averaged.

    Palettes become colours, transparency is multiplied in, 16 bits are scaled to 8.
    """
    mode, key = picture.mode, picture.info.get("transparency")
    if mode.startswith("I"):
        white_is_zero = getattr(picture, "tag_v2", {}).get(TIFF_PHOTOMETRIC) == 0
        return functools.partial(scale_16_bits, white_is_zero, key)
    if mode == "F":  # TIFF of floats, from 0 to 1
        return lambda part: part.point(lambda value: value * 255.0).convert("L")
    tiles = getattr(picture, "tile", ())
    if isinstance(key, tuple) and any("16" in str(tile[3]) for tile in tiles):
        picture.info["transparency"] = tuple(value >> 8 for value in key)  # as Pillow's pixels
    if key is not None or mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return lambda part: part.convert("RGBA").convert("RGBa")
    plain = {"1": "L", "P": "RGB", "RGBX": "RGB"}.get(mode, mode)
    return lambda part: part.convert(plain)


def scale_16_bits(white_is_zero: bool, key: int | None, part: Image.Image) -> Image.Image:
    """Return grey of 16 bits in 8 bits; the value `key` is transparent."""
    part = part.convert("I")
    levels = [value * 255 // 65535 for value in range(65536)]
    grey = part.point(levels[::-1] if white_is_zero else levels, "L")
    if key is None:
        return grey
    grey.putalpha(part.point([255 * (value != key) for value in range(65536)], "L"))
    return grey.convert("RGBA").convert("RGBa")


def encode(picture: Image.Image, rendition: Rendition) -> bytes:
    """Return the rendition of a picture that is at least as large, or whole."""
    from PIL import Image

    fitted = fit(picture.size, rendition.size)
    if fitted != picture.size:
        picture = picture.resize(fitted, BICUBIC, reducing_gap=1.0)
    if rendition.format == "PNG":
        return encode_png(picture)
    picture.info.clear()
    written = io.BytesIO()
    if rendition.format == "WEBP" and "WEBP" in Image.SAVE:  # else a JPEG is a substitute
        picture.save(written, "WEBP", quality=PREVIEW_QUALITY, method=2)
    else:
        if picture.mode == "RGBA":
            paper = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(paper, picture).convert("RGB")
        picture.save(written, "JPEG", quality=PREVIEW_QUALITY, optimize=True)
    return written.getvalue()


def encode_png(picture: Image.Image) -> bytes:
    """Return a picture in L, RGB or RGBA as PNG (PNG third edition, section 11).

    All rows have one filter, what differs from the pixel before: Pillow tries five on each, and
    takes twice the time for 1 to 8 % fewer bytes.
    """
    from PIL import ImageChops

    before = ImageChops.offset(picture, 1, 0)
    before.paste(0, (0, 0, 1, picture.height))
    data = ImageChops.subtract_modulo(picture, before).tobytes()
    width = len(data) // picture.height
    rows = (b"\1" + data[at : at + width] for at in range(0, len(data), width))
    deflate = zlib.compressobj(1, strategy=zlib.Z_RLE)
    pixels = deflate.compress(b"".join(rows)) + deflate.flush()
    colours = {"L": 0, "RGB": 2, "RGBA": 6}[picture.mode]
    header = struct.pack(">2L5B", *picture.size, 8, colours, 0, 0, 0)
    chunks = (
        struct.pack(">L", len(value)) + kind + value + struct.pack(">L", zlib.crc32(kind + value))
        for kind, value in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# -- What values of pictures mean --------------------------------------------------------

GRAPHICS_WHITE = 203  # cd/m² (ITU-R BT.2408)
HLG_WHITE = 0.265  # of the light of a scene, which is at most 1 (ITU-R BT.2408)
# Code points of ITU-T H.273 in an AVIF's or HEIC's `colr` (ISO 14496-12 §12.1.5) and a PNG's cICP.
CODED_COLOURS = re.compile(rb"(?:colrnclx\0(.)\0|\0{3}\x04cICP(.))(.)", re.DOTALL)
COLOUR_BYTES = 1 << 15  # of a file's head, in which they are
COLORANTS = {  # of their primaries: X, Y, Z of red, green and blue, adapted to D50 as ICC has it
    1: (0.4361, 0.2225, 0.0139, 0.3851, 0.7169, 0.0971, 0.1431, 0.0606, 0.7141),
    9: (0.6735, 0.2790, -0.0019, 0.1657, 0.6753, 0.0300, 0.1251, 0.0456, 0.7972),
    12: (0.5151, 0.2412, -0.0011, 0.2920, 0.6922, 0.0419, 0.1571, 0.0666, 0.7841),
}


def linear_of_srgb(value: float) -> float:
    """Return the light of an sRGB value (IEC 61966-2-1)."""
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def linear_of_pq(value: float) -> float:
    """Return the light of SMPTE ST 2084 in units of graphics white, tone-mapped."""
    power = value ** (1 / 78.84375)
    light = max(0.0, power - 0.8359375) / (18.8515625 - 18.6875 * power)
    return tone_map(light ** (1 / 0.1593017578125) * 10000 / GRAPHICS_WHITE)


def linear_of_hlg(value: float) -> float:
    """Return the light of ITU-R BT.2100's HLG in units of graphics white, 75 %, tone-mapped.

    The display's gamma of 1.2 is for brightness: on each channel it would make colours stronger.
    """
    if value <= 0.5:
        return tone_map(value**2 / 3 / HLG_WHITE)
    return tone_map((math.exp((value - 0.55991) / 0.17883) + 0.28467) / 12 / HLG_WHITE)


def tone_map(light: float, knee: float = 0.9) -> float:
    """Leave what is darker than `knee`, and squeeze in below 1 what is brighter."""
    if light <= knee:
        return light
    return 1 - (1 - knee) ** 2 / (1 - knee + light - knee)


# By the transfer characteristics of ITU-T H.273; all others are near sRGB's.
CURVES: dict[int, Callable[[float], float]] = {8: float, 16: linear_of_pq, 18: linear_of_hlg}


def find_profile(picture: Image.Image, source: BinaryIO) -> bytes | None:
    """Return the ICC profile that says what a picture's values mean, if it is not sRGB."""
    given: bytes | None = picture.info.get("icc_profile")
    at = source.tell()
    source.seek(0)
    head = source.read(COLOUR_BYTES)
    if head[:2] == b"BM" and head[70:74] == b"DEBM":  # in version 5, it counts from the header
        start, length = struct.unpack_from("<2I", head, 126)
        source.seek(14 + start)
        given = source.read(length)
    source.seek(at)
    if given or picture.format not in ("PNG", "AVIF", "HEIF"):
        return given
    coded = CODED_COLOURS.search(head)
    if coded:
        primaries, transfer = (code[0] for code in coded.groups() if code)
        if primaries in COLORANTS and (primaries != 1 or transfer in CURVES):
            return make_profile(COLORANTS[primaries], CURVES.get(transfer, linear_of_srgb))
        return None
    gamma = picture.info.get("gamma")
    if gamma and "srgb" not in picture.info and abs(gamma * 2.2 - 1) > 0.05:  # as libpng has it
        return make_profile(COLORANTS[1], lambda value: value ** (1 / gamma))
    return None


def make_profile(colorants: Sequence[float], curve: Callable[[float], float]) -> bytes:
    """Return an ICC profile of RGB values with a `curve` of light (ICC.1:2001-04, §6.3.1.2)."""

    def xyz(*values: float) -> bytes:
        return struct.pack(">4s4x3i", b"XYZ ", *(round(value * 65536) for value in values))

    table = (round(65535 * min(1.0, curve(value / 255))) for value in range(256))
    light = struct.pack(">4s4xI256H", b"curv", 256, *table)
    white = xyz(0.9642, 1.0, 0.8249)
    names = (b"wtpt", b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC")
    values = [white, *(xyz(*colorants[at : at + 3]) for at in (0, 3, 6)), light, light, light]
    start = 128 + 4 + 12 * len(names)
    places = itertools.accumulate(map(len, values), initial=start)
    tags = [
        struct.pack(">4s2I", *tag) for tag in zip(names, places, map(len, values), strict=False)
    ]
    size = start + sum(map(len, values))
    head = struct.pack(">I4x4s4s4s4s", size, b"\2\x40\0\0", b"mntr", b"RGB ", b"XYZ ")
    head = head.ljust(36, b"\0") + b"acsp"
    head = head.ljust(68, b"\0") + white[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(names)) + b"".join(tags + values)


def convert_to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Return the picture in sRGB; as if it were that already where its profile is bad."""
    if profile:
        if picture.mode == "L" and profile[16:20] == b"RGB ":
            picture = picture.convert("RGB")
        if picture.mode == "RGBA" and profile[16:20] == b"GRAY":
            grey = convert_to_srgb(picture.getchannel("R"), profile).convert("RGBA")
            grey.putalpha(picture.getchannel("A"))
            return grey
        with contextlib.suppress(Exception):  # ImageCms raises anything, or is not there
            converted: Image.Image = find_transform(profile, picture.mode).apply(picture)
            return converted
    return picture if picture.mode in ("L", "RGB", "RGBA") else picture.convert("RGB")


@functools.lru_cache(maxsize=8)
def find_transform(profile: bytes, mode: str) -> Any:
    """Return littleCMS's transform from a profile to sRGB; a phone uses one for all pictures."""
    from PIL import ImageCms

    srgb = ImageCms.createProfile("sRGB")
    given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    target = "RGBA" if mode == "RGBA" else "RGB"
    return ImageCms.buildTransform(given, srgb, mode, target)


# -- JPEGs within pictures ---------------------------------------------------------------

MAX_SEARCHED_BYTES = 256 << 20  # of a raw picture, for the JPEGs in it
MAX_JPEG_STARTS = 1000  # that look like one; chance makes a dozen
MAX_EMBEDDED = 4  # of which are tried, the largest first
MAX_JPEG_SEGMENTS = 64  # before its size
JPEG_START = re.compile(rb"\xff\xd8\xff[\xc0-\xfe]")


def embedded_jpegs(source: BinaryIO, job: Job) -> Iterator[BinaryIO]:
    """Yield the largest JPEGs within a picture; of one that is not raw, those of its shape."""
    source.seek(0)
    data = source.read(MAX_SEARCHED_BYTES)
    found = []
    starts = JPEG_START.finditer(data, 0 if job.kind == "raw" else 1)
    for match in itertools.islice(starts, MAX_JPEG_STARTS):
        width, height = read_jpeg_size(data, match.start())
        alike = abs(width * job.height - height * job.width) <= 0.03 * width * job.height
        if width and (alike or job.kind == "raw"):
            found.append((width * height, match.start()))
    for _, start in sorted(found, reverse=True)[:MAX_EMBEDDED]:
        yield io.BytesIO(data[start:])


def read_jpeg_size(data: bytes, at: int) -> tuple[int, int]:
    """Read width and height of the JPEG that begins there; zeros if browsers show none such."""
    at += 2
    for _ in range(MAX_JPEG_SEGMENTS):
        if len(data) < at + 9 or data[at] != 0xFF:
            break
        marker, length = struct.unpack_from(">xBH", data, at)
        if 0xC0 <= marker <= 0xC2:  # baseline, extended or progressive (ITU-T T.81, table B.1)
            bits, height, width = struct.unpack_from(">BHH", data, at + 4)
            return (width, height) if bits == 8 else (0, 0)
        at += 2 + length
    return 0, 0


# -- ffmpeg ------------------------------------------------------------------------------

# ffmpeg may open nothing that names other files (playlists, concat scripts, `image2` patterns),
# and no HEIF as an image: older versions show one of its tiles.
FFMPEG_DEMUXERS = {
    "image": "jpeg_pipe,png_pipe,webp_pipe,bmp_pipe,tiff_pipe,gif,jpegxl_pipe,j2k_pipe,qoi_pipe",
    "raw": "tiff_pipe",
    "video": "mov,matroska,avi,mpegts,mpeg,mpegvideo,h264,hevc,m4v,asf,flv,ogg,mxf,dv,rm,gif",
}
HD_HEIGHT = 720  # pixels
FFMPEG_BEGINS = b"Stream mapping:"  # is said after the input's description, before decoding
HDR_TRANSFER = re.compile(rb"/(?:smpte2084|arib-std-b67)[,) ]")  # as ffmpeg describes a stream
# Graphics white, 203 cd/m² (ITU-R BT.2408), becomes 1, of which up to 0.9 stays as it is; what is
# brighter, up to five times as much, is squeezed in above. `agamma` would leave HLG too colourful.
HDR_FILTERS = (
    ",zscale=t=linear:npl=203:agamma=0,format=gbrpf32le,zscale=p=bt709"
    ",tonemap=mobius:param=0.9:peak=5:desat=0,zscale=t=iec61966-2-1,format=rgb24"
)


def open_frame(ffmpeg: str | None, job: Job, size: int) -> Image.Image | None:
    """Return the picture as ffmpeg decodes standard input."""
    png = run_ffmpeg(ffmpeg, job, size) if ffmpeg else b""
    return open_picture(io.BytesIO(png), ["PNG"], size) if png else None


def run_ffmpeg(ffmpeg: str, job: Job, size: int) -> bytes:
    """Return the frame at the wanted second, else the first one, as PNG; empty if none."""
    for seconds in dict.fromkeys((job.seconds, 0.0)):
        plain = [ffmpeg, *ffmpeg_arguments(job, size, seconds)]
        png = call_ffmpeg(plain, HDR_TRANSFER)
        if png is None:
            mapped = [ffmpeg, *ffmpeg_arguments(job, size, seconds, HDR_FILTERS)]
            png = call_ffmpeg(mapped) or call_ffmpeg(plain)  # it may lack the filters
        if png:
            return png
    return b""


def call_ffmpeg(command: Sequence[str], unless: re.Pattern[bytes] | None = None) -> bytes | None:
    """Return its standard output; None where its input is what it was not to be asked for.

    It never outlives this process, and what kills it ends this process, too.
    """
    import subprocess  # only where there are videos

    os.lseek(0, 0, os.SEEK_SET)
    left = signal.getitimer(signal.ITIMER_REAL)[0] - 1.0
    try:
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        watch = threading.Timer(max(0.1, left), started.kill)
        watch.start()
    except (OSError, RuntimeError):  # no process or thread to be had, or ffmpeg is being replaced
        os._exit(1)
    with started as ffmpeg:
        assert ffmpeg.stderr
        said = itertools.takewhile(lambda line: not line.startswith(FFMPEG_BEGINS), ffmpeg.stderr)
        refused = unless is not None and any(map(unless.search, said))
        if refused:
            ffmpeg.kill()
        output = ffmpeg.communicate()[0]
        watch.cancel()
    if refused:
        return None
    if ffmpeg.returncode == -signal.SIGKILL:  # for time or memory: no verdict on it either
        os._exit(1)
    return output


def ffmpeg_arguments(job: Job, size: int, seconds: float, filters: str = "") -> list[str]:
    """Return the command that makes standard input's frame at so many seconds a PNG."""
    # ffmpeg sees no file name, so that no extension and no `%d` in one can choose its demuxer.
    # Browsers take the curve of BT.709 for sRGB's; ffmpeg would write it into the PNG.
    fitted = f"min(1,{size}/max(iw*sar,ih))"  # sar: the shape of a pixel
    scale = f"scale=w='max(1,round(iw*sar*{fitted}))':h='max(1,round(ih*{fitted}))',setsar=1"
    filters += ",setparams=color_trc=iec61966-2-1"
    turned = ""
    if job.kind == "image":  # not by some versions only
        turned, turn = "-noautorotate", TURNS.get(job.orientation)
        filters += f",{turn[1]}" if turn else ""
    source = f"-protocol_whitelist file -format_whitelist {FFMPEG_DEMUXERS[job.kind]} -threads 1"
    # What a video says of its colours counts before this; of one that says nothing, ffmpeg takes
    # BT.601's, and browsers from 720 lines on BT.709's.
    colours = "-colorspace bt709" if job.kind == "video" and job.height >= HD_HEIGHT else ""
    target = "-map_metadata -1 -map_chapters -1 -threads 1 -f image2pipe -c:v png pipe:1"
    options = f"-nostdin -hide_banner -filter_threads 1 {source} {turned} {colours}"
    return [
        *f"{options} -ss {seconds:.3f}".split(),
        *f"-i file:/dev/fd/0 -map 0:V:0 -frames:v 1 -vf {scale}{filters} {target}".split(),
    ]


# ======================================================================================
# 8. Scanner
# ======================================================================================
# The folder and the index both come in the order of their paths' bytes, so comparing them
# is a merge: memory stays flat and an unchanged file costs one lstat. Only new and changed
# files are read. A second thread makes thumbnails for what has none; a third reads again what
# all files say of themselves, once after an upgrade that finds more in them.

SCAN_BATCH = 64  # files committed together, while so many more are hashed
HASH_THREADS = 2  # hashing runs outside the GIL; a Pi's disk is busy with two
QUIET_SECONDS = 0.25  # without an upload, after which thumbnails are made ahead
MAX_UPLOADS_SECONDS = 2.0  # that one waits for this
AWAY_SECONDS = 1.0  # between two looks for a disk that is away
MAX_RETRY_SECONDS = 3600.0  # between two tries of what fails all the time
MAX_NAMED, MAX_NAMES_LENGTH = 10, 1000  # files that cannot be read, and characters, in the log
LOOK_SECONDS = 0.5  # a look at a folder that takes longer has met a disk that does not answer
SCANNER_STOP_SECONDS = 5.0  # more than a thumbnail takes, less than systemd waits


def is_media_name(name: bytes) -> bool:
    """Return whether a file name has an extension of an image, a video or audio."""
    return name.rpartition(b".")[2].lower() in MEDIA_EXTENSIONS and b"." in name


def describe(folder: Folder, path: str, added: float) -> Located | None:
    """Read, hash and probe one file; None where it is gone, EAGAIN where it changes meanwhile."""
    try:
        with folder.open(path) as file:
            before = os.fstat(file.fileno())
            digest = hashlib.sha256()
            for block in read_blocks(file, before.st_size):
                digest.update(block)
            facts = probe(file)
            after = os.fstat(file.fileno())
    except (FileNotFoundError, NotADirectoryError):
        return None
    sha256 = digest.hexdigest()
    known = File(folder.name, path, sha256, *state_of(before), added)
    if not known.matches(after):
        raise BlockingIOError(errno.EAGAIN, "it is being written")
    return known, Asset(sha256, known.size, facts)


def probe_again(folder: Folder, file: File) -> Facts | None:
    """Read what a file says of itself; None if it is gone or another one, OSError if it fails."""
    gone = (FileNotFoundError, ValueError)
    with contextlib.suppress(*gone), folder.open(file.path) as source:
        return probe(source) if file.matches(os.fstat(source.fileno())) else None
    return None


def in_threads(work: Callable[[T], U], items: Iterator[T], threads: int) -> Iterator[U]:
    """Yield what threads make of each item, in order; they are at most SCAN_BATCH in front."""
    first = list(itertools.islice(items, 1))
    if not first:
        return
    from concurrent.futures import ThreadPoolExecutor  # 8 ms, only where there is work

    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[U]] = deque()
        for item in itertools.chain(first, items):
            ahead.append(pool.submit(work, item))
            if len(ahead) > SCAN_BATCH:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class ScanProgress(NamedTuple):
    """How far the scan is; `finished_at` is the last end of one in Unix seconds."""

    running: bool = False
    done: int = 0
    total: int = 0
    unreadable: int = 0  # files and folders of the last scan, which are tried again
    seconds: float = 0.0  # that the last whole scan took
    finished_at: float | None = None


class SharedProgress:
    """A ScanProgress that every process forked from this one sees."""

    LAYOUT = struct.Struct("=?QQQdd")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self.LAYOUT.size)
        self.mounts = shared_numbers("Q")  # how often other mount points were noted
        self.forgotten = shared_numbers("Q")  # how often files were

    def get(self) -> ScanProgress:
        """Return the progress as all processes know it."""
        now = ScanProgress(*self.LAYOUT.unpack(self._memory[:]))
        return now._replace(finished_at=now.finished_at or None)

    def set(self, now: ScanProgress) -> None:
        """Tell all processes of the progress."""
        self._memory[:] = self.LAYOUT.pack(*now[:-1], now.finished_at or 0)


def repeat(
    name: str, work: Callable[[], bool | None], wait: Callable[[float], object],
    is_over: Callable[[], bool], *, pause: float = math.inf, first: float | None = None,
) -> None:  # fmt: skip
    """Do some work after each wait of `pause` seconds, or sooner when it was not done wholly.

    `first`: the seconds before the first time, if they are others.
    """
    left, retry = pause if first is None else first, TRY_AGAIN_SECONDS
    while True:
        wait(left)
        if is_over():
            return
        try:
            whole = work() is not False
        except Exception as error:  # one bad time must not be the last one
            warn(f"{name} stopped: {type(error).__name__}: {error}")
            whole = False
        left = pause if whole else min(pause, retry)
        retry = TRY_AGAIN_SECONDS if whole else min(2 * retry, MAX_RETRY_SECONDS)


def start_repeating(
    name: str, work: Callable[[], bool | None], pause: float, over: threading.Event
) -> threading.Thread:
    """Do some work now and every `pause` seconds, in a thread of its own, until it is `over`."""
    loop = functools.partial(repeat, name, work, over.wait, over.is_set, pause=pause, first=0)
    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    return thread


class FolderStatus(NamedTuple):
    """How a folder was when it was last looked at."""

    missing: bool = False
    absent: tuple[str, ...] = ()  # mount points of disks below it that are away
    lost: tuple[str, ...] = ()  # folders of the server's own beside it that are not there
    hangs: bool = False  # a look at it has not come to an end


class Mounts:
    """Where disks are mounted below folders: what is on one that is away is not gone."""

    def __init__(self, index: Index, progress: SharedProgress) -> None:
        self._index = index
        self._changes = progress.mounts
        self._known: dict[str, tuple[int, list[str]]] = {}  # after how many changes

    def absent(self, folder: Folder) -> list[str]:
        """Find places below a folder where a disk with known files was mounted, and is no more."""
        known = self._mount_points(folder)
        mounted = {path for path, _ in mounts_below(folder.path)} if known else set()
        return [
            path for path in known
            if path not in mounted and folder.is_local(f"{path}/")
            and not folder.holds_files(f"{path}/")
            and not self._index.files.is_empty(folder.name, f"{path}/")
        ]  # fmt: skip

    def look(self, folder: Folder) -> FolderStatus:
        """Return whether a folder is there now, and the disks below it."""
        missing = folder.is_missing()
        return FolderStatus(missing, () if missing else tuple(self.absent(folder)))

    def _mount_points(self, folder: Folder) -> list[str]:
        """Return places below a folder where a disk was mounted; kept, as each upload asks."""
        changes, known = self._known.get(folder.name, (-1, []))
        if changes != self._changes[0]:
            changes = self._changes[0]
            known = json.loads(self._index.get_meta(f"mounts {folder.name}") or "[]")
            self._known[folder.name] = changes, known
        return known

    def note(self, folder: Folder) -> list[bytes]:
        """Remember the mount points below a folder; give those that are absent, with `/`."""
        absent = self.absent(folder)
        mounted = {path for path, _ in mounts_below(folder.path)}
        now = sorted(mounted.union(absent))
        if now != self._mount_points(folder):
            self._index.set_meta(f"mounts {folder.name}", json.dumps(now))
            self._changes[0] += 1
        for path in absent:
            warn(f"{folder.path}/{path} is not mounted: what was in it is kept in the index")
        return [os.fsencode(f"{path}/") for path in absent]


class Renditions:
    """Thumbnails and previews of what is in folders, ahead of time and when asked for."""

    def __init__(self, index: Index, folders: Sequence[Folder], thumbnails: Thumbnails) -> None:
        self.folders = {folder.name: folder for folder in folders}
        self.thumbnails = thumbnails
        self.wanted = threading.Event()
        self._index = index

    def run(self) -> None:
        """Make thumbnails whenever they are wanted, until the server stops."""
        repeat("thumbnails", self.make_all, self._wait, lambda: self.thumbnails.is_over)

    def _wait(self, seconds: float) -> None:
        self.wanted.wait(None if seconds == math.inf else seconds)
        self._let_uploads_pass()  # or each would have it look for what is wanted
        self.wanted.clear()

    def note_upload(self) -> None:
        """Have what is made ahead wait for the upload that begins, and a moment for the next."""
        self.thumbnails.upload_at[0] = time.monotonic()

    def _let_uploads_pass(self) -> None:
        """Wait while uploads come one after the other: who sends them waits for them."""
        end = time.monotonic() + MAX_UPLOADS_SECONDS
        while not self.thumbnails.is_over:
            left = min(end, self.thumbnails.upload_at[0] + QUIET_SECONDS) - time.monotonic()
            if left <= 0:
                return
            time.sleep(left)

    def make_all(self) -> bool:
        """Try each of those that have no verdict yet once; return whether all have one now."""
        threads = self.thumbnails.processes
        made = in_threads(self._try_thumbnail, self._without_verdict(), threads)
        return all(list(made))  # a list, so that all are made

    def _without_verdict(self) -> Iterator[Located]:
        kinds, last, pending = self.thumbnails.kinds, "", self._index.assets.without_thumbnail
        while not self.thumbnails.is_over and (found := pending(kinds, SCAN_BATCH, last)):
            yield from found
            last = found[-1][1].sha256

    def _try_thumbnail(self, found: Located) -> bool:
        """Make a thumbnail ahead; return whether there is no need to try again."""
        self._let_uploads_pass()
        if self.thumbnails.is_over:
            return True
        try:
            return self.ensure_thumbnail(*found, ahead=True) is not Outcome.FAILED
        except FileNotFoundError:  # removed since: the next scan will see
            return self.folders[found[0].root].is_there()
        except (OSError, sqlite3.Error):
            return False

    def ensure_thumbnail(self, file: File, asset: Asset, *, ahead: bool = False) -> Outcome:
        """Have the thumbnail of an asset, which is made now if that has not been tried yet.

        `ahead`: nobody waits for it. OSError where the file cannot be opened or the thumbnail not
        stored.
        """
        facts, thumbnails = asset.facts, self.thumbnails
        if asset.thumbnail == 0 or facts is None:
            return Outcome.IMPOSSIBLE
        if asset.thumbnail == 1 and thumbnails.cache_of(file).exists(asset.sha256):
            return Outcome.MADE
        if facts.kind not in thumbnails.kinds:
            return Outcome.IMPOSSIBLE
        if not thumbnails.ensure_host():
            return Outcome.FAILED
        outcome = Outcome.IMPOSSIBLE
        if thumbnails.can_make(facts.kind, facts.mime_type):
            outcome = thumbnails.make(self.folders[file.root], file, asset, ahead=ahead)
        if outcome is not Outcome.FAILED:  # which is not the picture's fault
            made = outcome is Outcome.MADE
            if not self._index.assets.set_thumbnail(asset.sha256, made=made):  # deleted meanwhile
                thumbnails.remove(asset.sha256)
        return outcome

    def ensure(self, file: File, asset: Asset, rendition: Rendition) -> bytes | Outcome:
        """Return a rendition of an asset, made now if it is not at hand, and kept if it can be.

        OSError where the file cannot be opened.
        """
        try:
            outcome = self.ensure_thumbnail(file, asset)  # known: whether there can be any
            if outcome is not Outcome.MADE:
                return outcome
            if rendition == THUMBNAIL:
                return self.thumbnails.cache_of(file).read(asset.sha256)
        except Unavailable:
            raise
        except OSError:  # as on a full disk: the rendition is made for each who asks
            pass
        return self.thumbnails.preview(self.folders[file.root], file, asset, rendition)


class Scanner:
    """Keeps the index in step with the folders, in the background."""

    def __init__(
        self, index: Index, folders: Sequence[Folder], renditions: Renditions,
        progress: SharedProgress, *, quiet: bool = False,
    ) -> None:  # fmt: skip
        self._index = index
        self._folders = {folder.name: folder for folder in folders}
        self._scanned = [folder for folder in folders if folder.is_local("")]
        self._renditions = renditions
        self._wanted = threading.Event()
        self._stopping = False
        self._threads: list[threading.Thread] = []
        self.progress = progress
        self.mounts = Mounts(index, progress)
        self._quiet = quiet

    def start(self, interval: float) -> None:
        """Scan now and every `interval` seconds; 0: only when asked, or when one was not whole."""
        self._renditions.thumbnails.is_over = False
        self._wanted.set()
        self._renditions.wanted.set()
        scan = functools.partial(self._run, interval or math.inf)
        for work in (self._renew_facts, scan, self._renditions.run):
            self._threads.append(threading.Thread(target=work, daemon=True))
            self._threads[-1].start()

    def request(self) -> None:
        """Scan as soon as possible."""
        self._wanted.set()

    def stop(self) -> None:
        """End, and wait a little for the file that is being read: the index closes next."""
        self._stopping = self._renditions.thumbnails.is_over = True
        self._wanted.set()
        self._renditions.wanted.set()
        for thread in self._threads:
            thread.join(SCANNER_STOP_SECONDS)

    def _run(self, interval: float) -> None:
        with contextlib.suppress(OSError, sqlite3.Error):  # which it reports itself
            self._index.check()
        repeat("the scan", self.scan, self._wait, lambda: self._stopping, pause=interval)

    def _renew_facts(self) -> None:
        """Probe all files again whose facts are of a program of another FACTS_VERSION."""
        with contextlib.suppress(sqlite3.Error):  # the next start tries again
            if self._index.get_meta("facts version") == FACTS_VERSION:
                return
            folders = [each for each in self._renditions.folders.values() if each.is_local("")]
            whole = [self._renew_facts_in(folder) for folder in folders]
            if all(whole):
                self._index.set_meta("facts version", FACTS_VERSION)

    def _renew_facts_in(self, folder: Folder) -> bool:
        """Probe all files of a folder again; return whether it was there all the time.

        What cannot be read counts as changed: the scan reads it once it can be.
        """
        before = folder.identity()
        if before is None or self.mounts.absent(folder):
            return folder.is_new()
        files = (f for f in self._index.files.of_root(folder.name) if folder.is_local(f.path))
        while batch := list(itertools.islice(files, SCAN_BATCH)):
            found, unreadable = [], []
            for file in batch:
                if self._stopping:
                    return False
                try:
                    found.append(Asset(file.sha256, file.size, probe_again(folder, file)))
                except OSError:
                    unreadable.append(file)
            if folder.identity() != before:
                return False
            self._put_facts(found, unreadable)
        return True

    def _put_facts(self, found: Sequence[Asset], unreadable: Sequence[File]) -> None:
        def apply(db: Database) -> None:
            for asset in found:
                self._index.assets.set_facts(db, asset)
            for file in unreadable:
                self._index.files.set_times(db, file, -1, -1.0)

        self._index.write(apply, durable=False)

    def _wait(self, seconds: float) -> None:
        """Wait until a scan is wanted, so many seconds have passed, or a disk is back."""
        end, away = time.monotonic() + seconds, self._absent()
        while (left := end - time.monotonic()) > 0:
            step = min(left, AWAY_SECONDS) if away else left
            if self._wanted.wait(None if step == math.inf else step) or away != self._absent():
                break
        self._wanted.clear()

    def _absent(self) -> dict[str, FolderStatus]:
        """Find the folders that are missing, or have mount points below that are."""
        with contextlib.suppress(sqlite3.Error):
            seen = {folder.name: self.mounts.look(folder) for folder in self._scanned}
            return {name: sight for name, sight in seen.items() if sight != FolderStatus()}
        return {}

    def scan(self) -> bool:
        """Bring the index in step with the disk once; return whether everything was seen."""
        before, began = self.progress.get(), time.monotonic()
        self.progress.set(before._replace(running=True, done=0, total=0, unreadable=0))
        with undoing(lambda: self.progress.set(self.progress.get()._replace(running=False))):
            whole = [self._scan_folder(folder) for folder in self._scanned]
        now = self.progress.get()
        problem = f", {now.unreadable} files or folders cannot be read" if now.unreadable else ""
        seconds = time.monotonic() - began
        if problem or not self._quiet:
            warn(f"scanned {now.done} files in {seconds:.1f} s{problem}")
        self.progress.set(now._replace(running=False, seconds=seconds, finished_at=time.time()))
        return all(whole)

    def _scan_folder(self, folder: Folder) -> bool:
        """Bring the index in step with a folder; return whether everything in it was seen."""
        before, started = folder.identity(), time.time()
        if before is None:
            if not folder.is_new():
                warn(f"nothing is in {folder.path}: is its disk mounted? Its index is kept")
            return folder.is_new()
        unreadable: list[bytes] = []
        new, gone, unchanged = self._compare(folder, unreadable)
        self._advance(unchanged, unchanged + len(new), len(unreadable))
        names = [os.fsdecode(path) for path in unreadable]
        failed = self._add(folder, map(os.fsdecode, new), names)
        if self._stopping:
            return True
        if names:
            more = ["…"] if len(names) > MAX_NAMED else []
            listed = ", ".join([*names[:MAX_NAMED], *more])
            warn(f"cannot read in {folder.path}: {printable_line(listed)[:MAX_NAMES_LENGTH]}")
        gone += [path for path in new if folder.is_gone(os.fsdecode(path))]  # while it was read
        if folder.identity() != before:
            warn(f"{folder.path} is another folder than when the scan began: its index is kept")
            return False
        kept = [*unreadable, *self.mounts.note(folder)]  # what lies there is not gone
        gone = [path for path in gone if not path.startswith(tuple(kept))]
        self._forget(folder, gone, started)
        return not (unreadable or failed)

    def _advance(self, done: int, total: int, unreadable: int) -> None:
        now = self.progress.get()
        done, total, unreadable = now.done + done, now.total + total, now.unreadable + unreadable
        self.progress.set(now._replace(done=done, total=total, unreadable=unreadable))

    def _compare(
        self, folder: Folder, unreadable: list[bytes]
    ) -> tuple[list[bytes], list[bytes], int]:
        """Find new or changed paths, paths that are no more, and the number of unchanged ones."""
        known = self._index.files.in_order(folder.name)
        new, gone, unchanged = [], [], 0
        row = next(known, None)
        for path, status in folder.walk(is_media_name, unreadable):
            while row is not None and row[0] < path:
                gone.append(row[0])
                row = next(known, None)
            if row is not None and row[0] == path and is_same(folder.name, row[1:], status):
                unchanged += 1
            else:
                new.append(path)
            if row is not None and row[0] == path:
                row = next(known, None)
        gone += ([row[0]] if row else []) + [path for path, *_ in known]
        return new, [path for path in gone if folder.is_local(os.fsdecode(path))], unchanged

    def _add(self, folder: Folder, paths: Iterable[str], unreadable: list[str]) -> int:
        """Read files and put them into the index; name those that cannot be; return how many."""
        now, missed = time.time(), 0

        def read(path: str) -> Located | str | None:
            try:
                return None if self._stopping else describe(folder, path, now)
            except (OSError, ValueError):
                return path

        wanted = itertools.takewhile(lambda _: not self._stopping, paths)
        found = in_threads(read, wanted, HASH_THREADS)
        while batch := list(itertools.islice(found, SCAN_BATCH)):
            failed = [each for each in batch if isinstance(each, str)]
            unreadable += failed
            refused = self._put_each([each for each in batch if isinstance(each, tuple)])
            missed += len(failed) + refused
            self._advance(len(batch), 0, len(failed) + refused)
            self._renditions.wanted.set()
        return missed

    def _put_each(self, found: Sequence[Located]) -> int:
        """Put files into the index, together if that can be; return how many were refused."""
        try:
            self._put(found)
        except (sqlite3.Error, OSError) as error:  # locked, full: a later scan tries again
            warn(f"{len(found)} files are not in the index yet: {error}")
            return len(found)
        except (ValueError, OverflowError):  # one of them has a value that cannot be stored
            return 1 if len(found) == 1 else sum(self._put_each([each]) for each in found)
        return 0

    def _put(self, found: Sequence[Located], *, only_known: bool = False) -> None:
        files = self._index.files

        def apply(db: Database) -> list[str | None]:
            kept = [each for each in found if not only_known or files.known_hash(db, each[0])]
            for _, asset in kept:
                self._index.assets.set_facts(db, asset)
            return [files.put(db, file, asset) for file, asset in kept]

        if found:
            lost = filter(None, self._index.write(apply, durable=False))
            self._renditions.thumbnails.remove(*lost)

    def _forget(self, folder: Folder, paths: Sequence[bytes], before: float) -> None:
        """Forget files that are gone, or were known `before` the folder was read without them."""

        def apply(db: Database) -> list[str]:
            names = list(map(os.fsdecode, paths))
            gone = [name for name in names if folder.is_gone(name)]  # whatever the clock said
            found = self._index.files.remove_all(db, folder.name, gone)
            return found + self._index.files.remove_all(db, folder.name, names, before)

        if paths:
            self._renditions.thumbnails.remove(*self._index.write(apply, durable=False))
            self.progress.forgotten[0] += 1

    def refresh(self, folder: Folder, path: str, *, is_known: bool = False) -> Located | None:
        """Read one file that changed since it was last read; None where it is gone.

        The row of one that `is_known` does not come back once a DELETE has removed it. OSError
        where the file cannot be read.
        """
        found = describe(folder, path, time.time())
        if found:
            self._put([found], only_known=is_known)
        return found and self._index.files.get(folder.name, path)

    def current(self, found: Located) -> Located | None:
        """Return a file if it still has its content; read it again if only ctime has changed."""
        file, folder = found[0], self._folders.get(found[0].root)
        if folder is None or not folder.is_local(file.path):
            return found
        try:
            if file.matches(folder.stat(file.path)):
                return found
            again = self.refresh(folder, file.path, is_known=True) if folder.has(file) else None
        except (OSError, ValueError):
            return None
        return again if again and again[0].sha256 == file.sha256 else None


class Watcher:
    """Looks at the folders in a thread of its own: a disk that hangs holds up nobody."""

    def __init__(self, folder: Folder, owned: Sequence[Folder], scanner: Scanner) -> None:
        self._folder = folder
        self._owned = [each for each in owned if each.is_local("")]
        self._scanner = scanner
        self._lock = threading.Lock()
        self._seen = FolderStatus()
        self._since = 0.0  # when the latest look began, monotonic
        self._done = threading.Event()  # set at its end
        self._done.set()

    def look(self) -> FolderStatus:
        """Return what is seen now; what was seen last if LOOK_SECONDS pass, or there is no thread.

        Who asks while another one looks, gets what that one sees.
        """
        with self._lock:
            if self._done.is_set():
                done, since = threading.Event(), time.monotonic()
                with contextlib.suppress(RuntimeError):  # no thread to be had
                    threading.Thread(target=self._look, args=(done,), daemon=True).start()
                    self._done, self._since = done, since
            done, since = self._done, self._since
        hangs = not done.wait(max(since + LOOK_SECONDS - time.monotonic(), 0))
        return self._seen._replace(hangs=hangs)

    def _look(self, done: threading.Event) -> None:
        try:
            seen = self._scanner.mounts.look(self._folder)
            lost = [each.name for each in self._owned if not (seen.missing or each.is_there())]
            self._seen = seen._replace(lost=tuple(lost))
        except (OSError, sqlite3.Error) as error:  # the index answers for itself
            warn(f"the storage folder could not be looked at: {error}")
        finally:
            done.set()


# ======================================================================================
# 9. HTTP messages
# ======================================================================================
# Bytes in, facts and events out; nothing here knows a socket or a file. What two parsers could
# read in two ways is refused, not repaired: request smuggling lives on repairs. Patterns quote
# their rule of the grammar. The parsers of bodies take what has arrived, in pieces of any size;
# their state is the method that reads what comes next, and what it cannot judge yet it holds back,
# as few bytes as it can, so that nearly all content passes through uncopied. The header fields,
# which a client repeats byte for byte on each request, are read once and remembered.

MAX_HEAD_BYTES = 64 * 1024  # request line and fields: eight times what browsers are known to send
MAX_HOST_BYTES = 255  # a DNS name with a port; URLs in answers repeat it
MAX_EMPTY_LINES = 4  # before a request line: one is what old clients send
MAX_FIELDS = 100  # as many as Apache takes; browsers send about 20
MAX_REMEMBERED_BYTES = 2048  # of fields, to be remembered: a browser's, not what only fills memory
MAX_CHUNK_LINE_BYTES = 256  # a chunk's size and extensions, which nobody sends and we ignore
MAX_CHUNK_EXTENSION_BYTES = 16 * 1024  # in a whole body, or tiny chunks would carry mostly those
MAX_TRAILER_BYTES = 8 * 1024  # fields after a chunked body, which are checked and ignored
MAX_PREAMBLE_BYTES = 16 * 1024  # before the first boundary: a sentence in mail, nothing in forms
MAX_PARTS = 1000  # more fields than any form has, few enough to keep a record of each
MAX_PART_HEADER_BYTES = 16 * 1024  # of a part: a file name of 255 bytes, escaped, fits
MAX_PADDING_BYTES = 64  # white space after a boundary, which only mail gateways ever added
MAX_RANGES = 64  # more in one request is an attack on the disk, not a reader of PDF
MAX_QUERY_FIELDS = 1000  # as MAX_PARTS

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 §5.6.2
_REASONS = {status.value: status.phrase for status in HTTPStatus}
_REASONS |= {104: "Upload Resumption Supported", 460: "Checksum Mismatch"}

# -- Header fields -----------------------------------------------------------------------

# field-line = field-name ":" OWS field-value OWS (RFC 9112 §5), with no obs-fold. Its
# first and last terms make each match one whole line.
_FIELD_LINE = re.compile(rf"^({_TOKEN}):([\t\x20-\x7e\x80-\xff]*)(?:\r\n|\Z)", re.MULTILINE)


Headers = Mapping[str, str]  # by lower-case name; values are the field's bytes as Latin-1


def parse_fields(block: bytes) -> Headers:
    """Parse field lines with CRLF between, not after, them (RFC 9112 §5); 400 or 431 if refused.

    Those of one name are joined by commas (RFC 9110 §5.3), without the white space around each.
    White space before the colon, folded lines, bare LF, and controls in values are refused.

    >>> parse_fields(b"Accept: a\\r\\nACCEPT: b ")
    {'accept': 'a, b'}
    """
    if not block:
        return {}
    breaks = block.count(b"\n")
    if breaks >= MAX_FIELDS:
        raise HTTPError(431, f"There are more than {MAX_FIELDS} header fields.")
    lines = _FIELD_LINE.findall(block.decode("latin-1"))
    if len(lines) != breaks + 1:
        raise HTTPError(400, "A header field is malformed.")
    fields: dict[str, str] = {}
    for name, text in lines:
        key, value = name.lower(), text.strip(" \t")
        fields[key] = f"{fields[key]}, {value}" if key in fields else value
    return fields


# -- Request heads -----------------------------------------------------------------------

# request-line = method SP request-target SP HTTP-version (RFC 9112 §3). The target may hold what
# browsers send although RFC 3986 would have it escaped, such as "|", but no fragment.
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([!\"$-~]+) HTTP/([0-9])\.([0-9])")
# uri-host [ ":" port ] (RFC 9110 §7.2); http has no empty host (§4.2.1).
_AUTHORITY = r"(?:\[[0-9A-Fa-f:.]+\]|(?:[\w.~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+)(?::[0-9]{0,5})?"
_HOST = re.compile(_AUTHORITY, re.ASCII)
# absolute-form = absolute-URI (RFC 9112 §3.2.2), of the two schemes that lead here.
_ABSOLUTE_FORM = re.compile(rf"(?i:https?)://({_AUTHORITY})(/[^?]*)?(?:\?(.*))?", re.ASCII)
_LENGTH = re.compile(r"[0-9]{1,19}")
_MAX_LENGTH = 2**63 - 1


# What makes the answer to a GET another one than to most.
SELECTING_FIELDS = frozenset((
    "if-match", "if-modified-since", "if-none-match", "if-range", "if-unmodified-since",
    "origin", "range", "x-sendfile-type",
))  # fmt: skip


class RequestHead(NamedTuple):
    """A request before its body; path and query are still percent-encoded."""

    method: str
    target: str  # as sent
    path: str  # "*" for OPTIONS *
    query: str  # without the "?"
    version: tuple[int, int]
    headers: Headers
    host: str  # and port, as the client calls the server; "" only in HTTP/1.0
    keep_alive: bool
    content_length: int | None
    chunked: bool
    has_body: bool
    expects_continue: bool
    authorization: str | None  # the field's value
    is_plain: bool  # nothing in it asks for other than the whole thing

    def body_decoder(self) -> BodyDecoder:
        """Return what decodes the body, by its length or in chunks (RFC 9112 §6.3)."""
        return ChunkedDecoder() if self.chunked else LengthDecoder(self.content_length or 0)


def parse_request_head(head: bytes) -> RequestHead:
    """Parse a request line and its fields, without the empty line that ends them (RFC 9112 §3).

    Raises 400, 414, 417, 431, 501 or 505. After any of these the connection cannot be used again.
    """
    if len(head) > MAX_HEAD_BYTES:
        raise head_too_large(head)
    line, _, block = head.partition(b"\r\n")
    method, target, version = parse_request_line(line)
    parse = _remembered_fields if len(block) <= MAX_REMEMBERED_BYTES else _parse_request_fields
    known = parse(block, version)
    if target[0] == "/" and method != "CONNECT":
        path, _, query = target.partition("?")
    else:
        authority, path, query = _parse_other_target(method, target)
        known = known._replace(host=authority or known.host)
    return tuple.__new__(RequestHead, (method, target, path, query, *known[4:]))


def parse_request_line(line: bytes) -> tuple[str, str, tuple[int, int]]:
    """Return method, target and version; 400 or 505 if refused (RFC 9112 §3, §2.3)."""
    match = _REQUEST_LINE.fullmatch(line.decode("latin-1"))
    if match is None:
        raise HTTPError(400, "The request line is malformed.")
    method, target, major, minor = match.groups()
    if major != "1":
        raise HTTPError(505, "This server speaks HTTP/1.0 and HTTP/1.1.")
    return method, target, (1, 0) if minor == "0" else (1, 1)


_EMPTY_LINES = re.compile(rb"(?:\r\n){0,%d}" % MAX_EMPTY_LINES)
_HEAD_BEGUN = re.compile(rb"\r\Z|%s" % _TOKEN.encode())  # a CR may begin an empty line
_BARE_LF = re.compile(rb"(?<!\r)\n")


def find_head_end(data: bytes, known: int) -> int:
    """Return where the head in `data` ends, or -1 if not yet; its first `known` bytes are no end.

    Raises 400 at once for what cannot become a request (RFC 9112 §2.2, §3): no method's letter
    first, a bare LF, a first line that is no request line.
    """
    since = max(known - 3, 0)
    end = data.find(b"\r\n\r\n", since, MAX_HEAD_BYTES + 4)
    if end >= 0:
        return end
    if not _HEAD_BEGUN.match(data):
        raise HTTPError(400, "This is no HTTP request.")
    if _BARE_LF.search(data, since):
        raise HTTPError(400, "A line of the request ends without CR.")
    line = data.find(b"\r\n", max(known - 1, 0))
    if line >= 0 and b"\r\n" not in data[:known]:  # the first line has ended just now
        parse_request_line(data[:line])
    if len(data) > MAX_HEAD_BYTES:
        raise head_too_large(data)
    return -1


def skip_empty_lines(data: bytes) -> bytes:
    """Leave out a few empty lines before a request (RFC 9112 §2.2); more are no request."""
    match = _EMPTY_LINES.match(data)
    return data[match.end() :] if match else data


def find_origin(head: bytes) -> str:
    """Return the Origin of a head that cannot be parsed, so that a page sees the error."""
    found = re.search(rb"(?i)\r\norigin:[ \t]*([\x21-\x7e]+)", head)
    return found[1].decode() if found else ""


def head_too_large(head: bytes) -> HTTPError:
    """Say which part of a head that passed MAX_HEAD_BYTES is too long: 414 or 431."""
    if b"\n" in head[:MAX_HEAD_BYTES]:
        return HTTPError(431, f"The header is larger than {MAX_HEAD_BYTES} bytes.")
    return HTTPError(414, f"The request line is longer than {MAX_HEAD_BYTES} bytes.")


def _parse_other_target(method: str, target: str) -> tuple[str, str, str]:
    """Return authority, path and query of a target that is no path (RFC 9112 §3.2.2-4)."""
    if target == "*" and method == "OPTIONS":
        return "", "*", ""
    match = _ABSOLUTE_FORM.fullmatch(target)
    if match is None or method == "CONNECT":
        raise HTTPError(400, "The request target is neither a path nor an absolute URL.")
    return _check_host(match[1]), match[2] or "/", match[3] or ""


def _parse_request_fields(block: bytes, version: tuple[int, int]) -> RequestHead:
    """Return a head without its request line, of which only the version counts."""
    headers = parse_fields(block)
    options = {option.strip(" \t") for option in headers.get("connection", "").lower().split(",")}
    expectation = headers.get("expect", "").lower()
    if expectation not in ("", "100-continue"):
        raise HTTPError(417, "The only expectation that can be met is 100-continue.")
    length = _parse_content_length(headers)
    chunked = _parse_transfer_encoding(headers, version)
    return RequestHead(
        "", "", "", "", version, headers, _parse_host(headers, version),
        keep_alive="close" not in options and (version > (1, 0) or "keep-alive" in options),
        content_length=length,
        chunked=chunked,
        has_body=chunked or bool(length),
        expects_continue=expectation != "" and version > (1, 0),
        authorization=headers.get("authorization"),
        is_plain=version > (1, 0) and SELECTING_FIELDS.isdisjoint(headers),
    )  # fmt: skip


_remembered_fields: Callable[[bytes, tuple[int, int]], RequestHead] = functools.lru_cache(256)(
    _parse_request_fields
)


def _parse_host(headers: Headers, version: tuple[int, int]) -> str:
    """Return the Host field; exactly one, valid, is a must in HTTP/1.1 (RFC 9112 §3.2)."""
    host = headers.get("host", "")
    if "host" not in headers and version == (1, 0):
        return ""
    if not _HOST.fullmatch(host):  # two are joined with a blank, which is in none
        raise HTTPError(400, "A request needs one valid Host header.")
    return _check_host(host)


def _check_host(host: str) -> str:
    if len(host) > MAX_HOST_BYTES:
        raise HTTPError(400, f"The host is longer than {MAX_HOST_BYTES} bytes.")
    return host


def _parse_content_length(headers: Headers) -> int | None:
    """Return the length; a list of one repeated number is that number (RFC 9112 §6.3 item 5)."""
    value = headers.get("content-length")
    if value is None:
        return None
    if "," in value:
        value, *others = (element.strip(" \t") for element in value.split(","))
        if any(other != value for other in others):
            raise HTTPError(400, "Content-Length headers disagree.")
    if not _LENGTH.fullmatch(value) or int(value) > _MAX_LENGTH:
        raise HTTPError(400, "Content-Length is not a number of bytes.")
    return int(value)


def _parse_transfer_encoding(headers: Headers, version: tuple[int, int]) -> bool:
    """Return whether the body is chunked, the one transfer coding taken (RFC 9112 §6.1, §6.3)."""
    value = headers.get("transfer-encoding")
    if value is None:
        return False
    if version == (1, 0) or "content-length" in headers:
        raise HTTPError(400, "Transfer-Encoding goes with neither HTTP/1.0 nor Content-Length.")
    codings = [coding.strip(" \t") for coding in value.lower().split(",")]
    if "" in codings or "chunked" in codings[:-1]:
        raise HTTPError(400, "Transfer-Encoding must end with chunked.")
    if codings != ["chunked"]:
        raise HTTPError(501, "The only transfer coding that is understood is chunked.")
    return True


# -- Bodies, by length or in chunks ------------------------------------------------------


class LengthDecoder:
    """Takes a body of a known length off what arrives (RFC 9112 §6.2), as ChunkedDecoder does."""

    def __init__(self, length: int) -> None:
        self.finished = not length
        self.rest = b""
        self._left = length

    def feed(self, data: bytes | memoryview) -> list[memoryview]:
        """Return the content in what has arrived, as slices of it."""
        content = memoryview(data)[: self._left]
        self._left -= len(content)
        self.finished = not self._left
        if len(content) < len(data):
            self.rest += data[len(content) :]
        return [content] if content else []


# The CRLF that ends the chunk before, then chunk-size [ chunk-ext ] CRLF (RFC 9112 §7.1).
_CHUNK_LINE = re.compile(rb"\r\n([0-9A-Fa-f]{1,16})([ \t]*;[\t\x20-\x7e\x80-\xff]*)?\r\n")
_CHUNK_LINE_BEGUN = re.compile(
    rb"\r?|\r\n(?:[0-9A-Fa-f]{1,16}[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?\r?)?"
)


class ChunkedDecoder:
    """Takes the chunks out of a chunked body (RFC 9112 §7.1); extensions and trailers are ignored.

    When `finished`, `rest` is what came after the body: the next request on the connection.
    """

    def __init__(self) -> None:
        self.finished = False
        self.rest = b""
        self._read = ChunkedDecoder._read_size
        self._held = b"\r\n"  # the first size is read as if a chunk had ended before it
        self._left = 0  # bytes of this chunk that are yet to come
        self._extension_bytes = 0

    def feed(self, data: bytes | memoryview) -> list[memoryview]:
        """Return the content in what has arrived, as slices of it; 400 or 431 if malformed."""
        view = memoryview(data)
        content: list[memoryview] = []
        position = 0
        while position < len(view) and not self.finished:
            position = self._read(self, view, position, content)
        self.rest += view[position:]
        return content

    def _read_size(self, view: memoryview, position: int, content: list[memoryview]) -> int:
        line = self._held + view[position : position + MAX_CHUNK_LINE_BYTES - len(self._held)]
        match = _CHUNK_LINE.match(line)
        if match is None:
            if len(line) == MAX_CHUNK_LINE_BYTES or not _CHUNK_LINE_BEGUN.fullmatch(line):
                raise HTTPError(400, "A chunk of the body is malformed.")
            self._held = line
            return len(view)
        self._extension_bytes += len(match[2] or b"")
        if self._extension_bytes > MAX_CHUNK_EXTENSION_BYTES:
            raise HTTPError(400, "The chunk extensions are too long.")
        self._left = int(match[1], 16)
        if self._left > _MAX_LENGTH:
            raise HTTPError(400, "A chunk is larger than any file can be.")
        self._read = ChunkedDecoder._read_data if self._left else ChunkedDecoder._read_trailer
        position += match.end() - len(self._held)
        self._held = b"" if self._left else b"\r\n"
        return position

    def _read_data(self, view: memoryview, position: int, content: list[memoryview]) -> int:
        piece = view[position : position + self._left]
        content.append(piece)
        self._left -= len(piece)
        if not self._left:
            self._read = ChunkedDecoder._read_size
        return position + len(piece)

    def _read_trailer(self, view: memoryview, position: int, content: list[memoryview]) -> int:
        block = self._held + view[position : position + MAX_TRAILER_BYTES - len(self._held)]
        end = block.find(b"\r\n\r\n")
        if _BARE_LF.search(block, len(self._held), end if end >= 0 else len(block)):
            raise HTTPError(400, "A trailer field is malformed.")
        if end < 0:
            if len(block) == MAX_TRAILER_BYTES:
                raise HTTPError(431, "The trailer fields are too long.")
            self._held = block
            return len(view)
        parse_fields(block[2:end])
        self.finished = True
        return position + end + 4 - len(self._held)


BodyDecoder = LengthDecoder | ChunkedDecoder


# -- Multipart bodies --------------------------------------------------------------------

# boundary := 0*69<bchars> bcharsnospace (RFC 2046 §5.1.1). More characters than the RFC's: there
# are clients that send them, and other servers take them.
_BOUNDARY = re.compile(rb"[ !#-~]{0,69}[!#-~]")
# After a delimiter: "--" if it closes the body, else transport-padding CRLF. A line that merely
# begins like a delimiter is content, as it is to Go's and Werkzeug's parsers.
_DELIMITER_END = re.compile(rb"--|[ \t]{0,%d}\r\n" % MAX_PADDING_BYTES)
_DELIMITER_END_BEGUN = re.compile(rb"-?|[ \t]{0,%d}\r?" % MAX_PADDING_BYTES)
_FOLD = re.compile(rb"\r\n[ \t]+")  # a long field of a part may go on in the next line (RFC 5322)


class Part(NamedTuple):
    """A part begins; `filename` is None unless it is a file, "" if none was chosen (RFC 7578)."""

    name: str
    filename: str | None


class MultipartParser:
    """Takes the parts out of a multipart/form-data body (RFC 7578, RFC 2046 §5.1.1).

    What the body says before its first and after its last boundary is ignored.

    >>> parser = MultipartParser(b"x")
    >>> form = b'--x\\r\\nContent-Disposition: form-data; name="a"\\r\\n\\r\\n1\\r\\n--x--'
    >>> [event if isinstance(event, Part) else bytes(event) for event in parser.feed(form)]
    [Part(name='a', filename=None), b'1']
    """

    def __init__(self, boundary: bytes) -> None:
        if not _BOUNDARY.fullmatch(boundary):
            raise HTTPError(400, "The multipart boundary is missing or malformed.")
        self.finished = False
        self._delimiter = b"\r\n--" + boundary
        self._held = b"\r\n"  # a boundary at the very start needs no line break before it
        self._preamble_bytes = 0
        self._parts = 0

    def feed(self, data: bytes | memoryview) -> list[Part | memoryview]:
        """Return the parts that begin in what has arrived, and their content; 400, 413 or 431.

        The content is in views that are good until the parser is fed again; that of a part ends
        where another one begins.
        """
        if self.finished:
            return []
        # A memoryview cannot be searched, but is copied at five times the speed of the search.
        if self._held or not isinstance(data, bytes):
            data = b"".join((self._held, data))
        events: list[Part | memoryview] = []
        position: int | None = 0
        while position is not None:
            end, delimiter = self._find_delimiter(data, position)
            if not self._parts:
                self._preamble_bytes += end
                if self._preamble_bytes > MAX_PREAMBLE_BYTES:
                    raise HTTPError(400, "The multipart body does not begin with its boundary.")
            elif end > position:
                events.append(memoryview(data)[position:end])
            if delimiter and delimiter[0] == b"--":
                self.finished = True
                return events
            position = self._begin_part(data, delimiter.end(), events) if delimiter else None
        self._held = data[end:]
        return events

    def finish(self) -> None:
        """Check that the body may end here; 400 if its last boundary has not come."""
        if not self.finished:
            raise HTTPError(400, "The multipart body ended early.")

    def _begin_part(self, data: bytes, start: int, events: list[Part | memoryview]) -> int | None:
        """Read a part's headers; return where its content begins, None while more are to come."""
        end = data.find(b"\r\n\r\n", start, start + MAX_PART_HEADER_BYTES + 4)
        if end < 0:
            if len(data) - start > MAX_PART_HEADER_BYTES + 3:
                raise HTTPError(413, "The headers of a part are too long.")
            return None
        if self._parts == MAX_PARTS:
            raise HTTPError(413, f"The form has more than {MAX_PARTS} parts.")
        self._parts += 1
        headers = parse_fields(_FOLD.sub(b" ", data[start:end]))
        disposition = parse_content_disposition(headers.get("content-disposition", ""))
        if disposition.type not in {"form-data", "attachment"} or disposition.name is None:
            raise HTTPError(400, "A part has no Content-Disposition: form-data with a name.")
        encoding = headers.get("content-transfer-encoding", "binary").lower()
        if encoding not in ("7bit", "8bit", "binary"):
            raise HTTPError(400, "A part is encoded for mail; send it as it is.")
        events.append(Part(disposition.name, disposition.filename))
        return end + 4

    def _find_delimiter(self, data: bytes, position: int) -> tuple[int, re.Match[bytes] | None]:
        """Return where content ends for certain, and the delimiter's end that ends it, if any."""
        # The whole delimiter is searched for: its first four bytes alone take four times as long.
        start = data.find(self._delimiter, position)
        while start >= 0:
            after = start + len(self._delimiter)
            match = _DELIMITER_END.match(data, after)
            if match or _DELIMITER_END_BEGUN.fullmatch(data, after):
                return start, match
            start = data.find(self._delimiter, after)
        # CR stands only at a delimiter's start, so the last one alone can have begun another.
        start = data.rfind(b"\r", max(position, len(data) - len(self._delimiter) + 1))
        if start >= 0 and self._delimiter.startswith(data[start:]):
            return start, None
        return len(data), None


# -- Values with parameters --------------------------------------------------------------

# parameters = *( OWS ";" OWS [ parameter-name "=" ( token / quoted-string ) ] ) (RFC 9110 §5.6.6).
# Without quotes we take any text: old clients send file names like that. A name without "=" says
# nothing, as to Django, Starlette and Werkzeug.
_PARAMETER = re.compile(
    rf"""[ \t]*;[ \t]*(?:({_TOKEN})[ \t]*(?:=[ \t]*(?:"([^"\\]*(?:\\.[^"\\]*)*)"|([^";]*)))?)?"""
)
_QUOTED_PAIR = re.compile(r'\\(["\\])')
# ext-value = charset "'" [ language ] "'" value-chars (RFC 8187 §3.2.1)
_EXTENDED_VALUE = re.compile(
    r"(?i:(UTF-8|ISO-8859-1))'[\w-]*'((?:%[0-9A-Fa-f]{2}|[\w!#$&+.^`|~-])*)", re.ASCII
)
_WINDOWS_FOLDER = re.compile(r"\A[A-Za-z]:\\(?:.*\\)?", re.DOTALL)


class ContentDisposition(NamedTuple):
    """What Content-Disposition says of a part or a file."""

    type: str
    name: str | None
    filename: str | None


def parse_content_type(value: str) -> tuple[str, dict[str, str]]:
    """Return the media type and its parameters (RFC 9110 §8.3.1); 400 if those are malformed.

    >>> parse_content_type('Text/HTML; Charset="utf-8"')
    ('text/html', {'charset': 'utf-8'})
    """
    media_type, pairs = _parse_parameters(value)
    parameters = dict(pairs)
    if len(parameters) < len(pairs):
        raise HTTPError(400, "The parameters of a header are malformed.")
    return media_type, parameters


def parse_content_disposition(value: str) -> ContentDisposition:
    """Return type, name and file name (RFC 7578 §4.2, RFC 6266 §4); 400 if malformed.

    Takes the value as Latin-1 and returns the text that was meant: UTF-8 where it is that, with
    the three characters that browsers escape. `filename*` goes before `filename`, if it can be
    read (RFC 6266 §4.3), and of several parameters of one name the last counts. Of the full path
    that old browsers on Windows send, the last component stays.

    >>> parse_content_disposition('form-data; name="f"; filename="a%22b.jpg"').filename
    'a"b.jpg'
    """
    disposition, pairs = _parse_parameters(value)
    parameters = dict(pairs)
    extended = None
    if "*" in value:
        parameters = _join_continuations(parameters)
        extended = _parse_extended_value(parameters.get("filename*", ""))
    name, filename = parameters.get("name"), parameters.get("filename")
    if not value.isascii() or "%" in value:
        name, filename = name and _form_text(name), filename and _form_text(filename)
    if filename is not None:
        filename = _WINDOWS_FOLDER.sub("", filename)
    return ContentDisposition(disposition, name, filename if extended is None else extended)


def _join_continuations(parameters: dict[str, str]) -> dict[str, str]:
    """Put together what stands in pieces `filename*0`, `filename*1*`, … (RFC 2231 §3, §4.1).

    >>> _join_continuations({"filename*0*": "utf-8''a%20", "filename*1": "b.jpg"})
    {'filename*': "utf-8''a%20b.jpg"}
    """
    pieces: list[str] = []
    extended = "filename*0*" in parameters
    for number in range(len(parameters)):
        plain, coded = (parameters.pop(f"filename*{number}{star}", None) for star in ("", "*"))
        if plain is None and coded is None:
            break
        pieces.append(
            coded or (quote(plain or "", encoding="latin-1") if extended else plain or "")
        )
    if pieces:
        parameters.setdefault("filename*" if extended else "filename", "".join(pieces))
    return parameters


def _parse_parameters(value: str) -> tuple[str, list[tuple[str, str]]]:
    """Return what stands before the parameters, in lower case, and these with lower-case names."""
    # In quotes a backslash escapes only a quote or itself: in C:\x\y.jpg it is one.
    first, semicolon, rest = value.partition(";")
    text = (semicolon + rest).rstrip(" \t")
    parameters: list[tuple[str, str]] = []
    position = 0
    while position < len(text):
        match = _PARAMETER.match(text, position)
        if match is None:
            raise HTTPError(400, "The parameters of a header are malformed.")
        name = (match[1] or "").lower()
        if match[2] is not None:
            parameters.append((name, _QUOTED_PAIR.sub(r"\1", match[2])))
        elif match[3] is not None:
            parameters.append((name, match[3].rstrip(" \t")))
        position = match.end()
    return first.strip(" \t").lower(), parameters


def _form_text(value: str) -> str:
    """Decode a name as the HTML Standard encodes it (4.10.21.8, multipart/form-data encoding)."""
    with contextlib.suppress(UnicodeDecodeError):  # by an old client, which meant Latin-1
        # A surrogate, which is no text, is let through for the families to refuse.
        value = value.encode("latin-1").decode("utf-8", "surrogatepass")
    return value.replace("%22", '"').replace("%0D", "\r").replace("%0A", "\n")


def _parse_extended_value(value: str) -> str | None:
    match = _EXTENDED_VALUE.fullmatch(value)
    with contextlib.suppress(UnicodeDecodeError):
        if match:
            return unquote_to_bytes(match[2]).decode(match[1])
    return None


def content_disposition_attachment(filename: str) -> str:
    """Return the value that has a browser save the file under that name (RFC 6266 §4.3).

    >>> content_disposition_attachment("caf\u00e9.jpg")
    'attachment; filename="caf_.jpg"; filename*=UTF-8\\'\\'caf%C3%A9.jpg'
    """
    plain = re.sub(r"[^ !#$&-\[\]-~]", "_", filename)
    if plain == filename:
        return f'attachment; filename="{filename}"'
    extended = quote(filename, safe="!#$&+-.^_`|~", errors="replace")
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{extended}"


def parse_query(text: str) -> list[tuple[str, str]]:
    """Parse application/x-www-form-urlencoded text, in order; 400 if it is too much.

    Bytes that are no UTF-8 become lone surrogates, which the fields' parsers refuse.

    >>> parse_query("a=1+2&b=%C3%A9&c=%FF")
    [('a', '1 2'), ('b', 'é'), ('c', '\\udcff')]
    """
    if text.count("&") >= MAX_QUERY_FIELDS:
        raise HTTPError(400, f"There are more than {MAX_QUERY_FIELDS} fields.")
    fields = (field.partition("=") for field in text.replace("+", " ").split("&") if field)
    decode = functools.partial(unquote, errors="surrogateescape")
    return [(decode(name), decode(value)) for name, _, value in fields]


# -- Ranges and conditions ---------------------------------------------------------------

_RANGE = re.compile(r"([0-9]{0,999})-([0-9]{0,999})")  # past any size, yet cheap to read
_ETAG = re.compile(r'(?:W/)?"[!\x23-\x7e\x80-\xff]*"')  # entity-tag (RFC 9110 §8.8.3)
_WEIGHT = re.compile(r"q=([01](?:\.[0-9]{0,3})?)")


def parse_range(value: str, size: int) -> list[tuple[int, int]] | None:
    """Return the first and last position of each range asked for (RFC 9110 §14.1.2, §14.2).

    None means to send everything: another unit, bad syntax, or ranges that only an attacker wants.
    416 if no range lies within `size` bytes.

    >>> parse_range("bytes=0-1, -2", 10)
    [(0, 1), (8, 9)]
    """
    unit, _, text = value.partition("=")
    elements = [element.strip(" \t") for element in text.split(",", MAX_RANGES)]
    matches = [_RANGE.fullmatch(element) for element in elements if element]
    if unit.lower() != "bytes" or not matches or len(elements) > MAX_RANGES:
        return None
    ranges = []
    for match in matches:
        if match is None or match[0] == "-":
            return None
        if match[1] and match[2] and int(match[1]) > int(match[2]):
            return None
        if match[1]:
            first, last = int(match[1]), min(int(match[2] or size), size - 1)
        else:
            first, last = max(size - int(match[2]), 0), size - 1
        if not size and not match[1] and int(match[2]):
            return None  # the last bytes of nothing are all of it
        if first <= last:
            ranges.append((first, last))
    if not ranges:
        raise HTTPError(416, "No such range.", {"Content-Range": f"bytes */{size}"})
    return None if _overlap_often(ranges) else ranges


def _overlap_often(ranges: list[tuple[int, int]]) -> bool:
    """Return whether more than two ranges overlap, which no reader needs (RFC 9110 §14.2)."""
    if len(ranges) < 3:
        return False
    overlaps, end = 0, -1
    for first, last in sorted(ranges):
        overlaps += first <= end
        end = max(end, last)
    return overlaps > 1


def etag_matches(header: str, etag: str, *, weak: bool) -> bool:
    """Return whether a list of entity tags, or "*", has this one (RFC 9110 §8.8.3.2, §13.1).

    Weak comparison is for If-None-Match, strong for If-Match. `etag` has its quotes.

    >>> etag_matches('W/"a", "b"', '"a"', weak=True), etag_matches('W/"a"', '"a"', weak=False)
    (True, False)
    """
    if header == "*":
        return True
    tags = _ETAG.findall(header)
    if weak:
        return etag.removeprefix("W/") in [tag.removeprefix("W/") for tag in tags]
    return not etag.startswith("W/") and etag in tags


def not_modified(headers: Headers, etag: str, last_modified: float | None) -> bool:
    """Return whether 304 answers a GET or HEAD; a tag goes before a date (RFC 9110 §13.2.2)."""
    if (tags := headers.get("if-none-match")) is not None:
        return etag_matches(tags, etag, weak=True)
    return was_changed(headers.get("if-modified-since"), last_modified) is False


def precondition_failed(headers: Headers, etag: str, last_modified: float | None) -> bool:
    """Return whether If-Match or If-Unmodified-Since make the answer 412 (RFC 9110 §13.2.2)."""
    if (tags := headers.get("if-match")) is not None:
        return not etag_matches(tags, etag, weak=False)
    return was_changed(headers.get("if-unmodified-since"), last_modified) is True


def was_changed(date: str | None, last_modified: float | None) -> bool | None:
    """Return whether a file was changed after an HTTP date; None if it cannot be compared."""
    since = parse_date(date) if date and last_modified is not None else None
    return None if since is None or last_modified is None else math.floor(last_modified) > since


def check_preconditions(
    headers: Headers, etag: str, last_modified: float | None, *, changes: bool = False
) -> None:
    """Raise 412 where the request is about another version of a thing than there is.

    To what `changes` it, If-None-Match is a condition, too (RFC 9110 §13.1.2).
    """
    excluded = headers.get("if-none-match", "") if changes else ""
    is_excluded = etag_matches(excluded, etag, weak=True)
    if is_excluded or precondition_failed(headers, etag, last_modified):
        raise HTTPError(412, "What is here is not what the request is about.")


def if_range_holds(headers: Headers, etag: str, last_modified: float | None) -> bool:
    """Return whether Range counts: If-Range is absent or names this version (RFC 9110 §13.1.5)."""
    validator = headers.get("if-range")
    if validator is None:
        return True
    if validator.endswith('"'):
        return validator == etag and not etag.startswith("W/")
    return last_modified is not None and parse_date(validator) == math.floor(last_modified)


def accepts_gzip(headers: Headers) -> bool:
    """Return whether the client takes gzip (RFC 9110 §12.5.3); if it says nothing, it does not."""
    weights = parse_weights(headers.get("accept-encoding", ""))
    return weights.get("gzip", weights.get("x-gzip", weights.get("*", 0.0))) > 0


def parse_weights(value: str) -> dict[str, float]:
    """Return how much each element of a list is liked, 1 by default (RFC 9110 §12.4.2).

    >>> parse_weights("gzip;q=0.5, *;q=0, br")
    {'gzip': 0.5, '*': 0.0, 'br': 1.0}
    """
    weights: dict[str, float] = {}
    for element in value.lower().split(","):
        named, *parameters = element.replace("\t", "").replace(" ", "").split(";")
        found = [_WEIGHT.fullmatch(parameter) for parameter in parameters]
        weights[named] = min([float(weight[1]) for weight in found if weight], default=1.0)
    return weights


def choose_language(headers: Headers, known: Mapping[str, object]) -> str:
    """Return the known language that the client likes most, else English (RFC 9110 §12.5.4).

    >>> choose_language({"accept-language": "fr, de-AT;q=0.8, en;q=0.5"}, {"en": 0, "de": 0})
    'de'
    """
    weights = parse_weights(headers.get("accept-language", ""))
    liked = [(weight, tag.partition("-")[0]) for tag, weight in weights.items()]
    liked = [each for each in liked if each[1] in known]
    return max(liked, key=lambda each: each[0], default=(0.0, "en"))[1]


def prefers(headers: Headers, media_type: str, usual: str) -> bool:
    """Return whether the client names a type and likes it no less than another (RFC 9110 §12.5.1).

    >>> prefers({"accept": "image/webp, */*;q=0.8"}, "image/webp", "image/jpeg")
    True
    >>> prefers({"accept": "image/webp;q=0.5, image/*"}, "image/webp", "image/jpeg")
    False
    """
    weights = parse_weights(headers.get("accept", ""))
    group = f"{usual.partition('/')[0]}/*"
    general = (weights[name] for name in (usual, group, "*/*") if name in weights)
    return weights.get(media_type, 0.0) >= max(next(general, 0.0), 0.001)


# -- Resumable uploads -------------------------------------------------------------------
# tus 1.0 (https://tus.io/protocols/resumable-upload), and draft-ietf-httpbis-resumable-upload,
# whose requests are told by `Upload-Complete`.

TUS_VERSION = "1.0.0"
DRAFT_VERSIONS = frozenset("45678")  # Upload-Draft-Interop-Version, with Upload-Complete
CHECKSUMS = ("sha1", "md5", "sha256")  # the first one is a must
_METADATA_KEY = re.compile(r"[!-+\--~]+")  # neither spaces nor commas
_UPLOAD_BYTES = re.compile(r"[0-9]{1,99}")  # what is beyond all limits is no other mistake


class UploadHead(NamedTuple):
    """What the header of a request says about an upload that can be resumed."""

    is_tus: bool
    metadata: str  # as sent
    length: int | None  # bytes of the whole; None: not told
    is_deferred: bool  # tus: the length is told later
    offset: int | None  # where the content begins
    completes: bool  # draft: the content is the rest
    checksum: tuple[str, bytes] | None  # tus: algorithm and digest of the content
    draft: str  # the version of it that the client speaks, if it is one we do


def check_tus_version(headers: Headers, *, needed: bool) -> None:
    """Raise 412 for another version of tus than ours, or none where one is `needed`."""
    if headers.get("tus-resumable", "" if needed else TUS_VERSION) != TUS_VERSION:
        detail = f"Send Tus-Resumable: {TUS_VERSION}, or Upload-Complete as the IETF draft has it."
        raise HTTPError(412, detail, {"Tus-Version": TUS_VERSION})


def parse_upload_head(headers: Headers) -> UploadHead:
    """Read the fields of both protocols; 400 for what is malformed, 412 where it is neither."""
    completes = {"?1": True, "?0": False}.get(headers.get("upload-complete", ""))
    is_tus = "tus-resumable" in headers or completes is None
    check_tus_version(headers, needed=is_tus)
    if "upload-concat" in headers:  # an extension that is not offered
        raise HTTPError(501, "Uploads cannot be put together of others.")
    defers = headers.get("upload-defer-length")
    if defers not in {None, "1"}:
        raise HTTPError(400, "Upload-Defer-Length can only be 1.")
    draft = headers.get("upload-draft-interop-version", "")
    return UploadHead(
        is_tus=is_tus,
        metadata=headers.get("upload-metadata", ""),
        length=_parse_bytes(headers, "upload-length"),
        is_deferred=defers is not None,
        offset=_parse_bytes(headers, "upload-offset"),
        completes=not is_tus and bool(completes),
        checksum=_parse_checksum(headers.get("upload-checksum")) if is_tus else None,
        draft=draft if draft in DRAFT_VERSIONS else "",
    )


def _parse_bytes(headers: Headers, name: str) -> int | None:
    value = headers.get(name)
    if value is not None and not _UPLOAD_BYTES.fullmatch(value):
        raise HTTPError(400, f"{name.title()} is not a number of bytes.")
    return int(value) if value else None


def _parse_checksum(value: str | None) -> tuple[str, bytes] | None:
    if value is None:
        return None
    algorithm, _, text = value.partition(" ")
    if algorithm not in CHECKSUMS:
        known = ", ".join(CHECKSUMS)
        raise HTTPError(400, f"Upload-Checksum must be one of {known}, and a digest.")
    return algorithm, _decode_base64(text, "Upload-Checksum")


def parse_upload_metadata(value: str) -> dict[str, str]:
    """Return the texts of Upload-Metadata: `key base64` with commas; 400 if it is malformed.

    >>> parse_upload_metadata("target bWVkaWE=, is_public")
    {'target': 'media', 'is_public': ''}
    """
    texts: dict[str, str] = {}
    for pair in value.split(",") if value else ():
        key, _, text = pair.lstrip(" ").partition(" ")
        if not _METADATA_KEY.fullmatch(key) or key in texts:
            raise HTTPError(400, "Upload-Metadata is no list of keys, each once, with values.")
        try:
            texts[key] = _decode_base64(text, "Upload-Metadata").decode()
        except UnicodeDecodeError:
            raise HTTPError(400, f"{key} in Upload-Metadata is not UTF-8.") from None
    return texts


def _decode_base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise HTTPError(400, f"{where} has a value that is not base64.") from None


# -- Dates and answers -------------------------------------------------------------------

_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
_CLOCK_TIME = r"(?P<hour>\d\d):(?P<minute>\d\d):(?P<second>\d\d)"
_DAY = "(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)"
_MONTH = rf"(?P<month>{'|'.join(_MONTHS)})"
# IMF-fixdate, rfc850-date and asctime-date (RFC 9110 §5.6.7). The day's name adds nothing.
_DATES = (
    rf"{_DAY}, (?P<day>\d\d) {_MONTH} (?P<year>\d{{4}}) {_CLOCK_TIME} GMT",
    rf"{_DAY}[a-z]*day, (?P<day>\d\d)-{_MONTH}-(?P<year>\d\d) {_CLOCK_TIME} GMT",
    rf"{_DAY} {_MONTH} (?P<day>[\d ]\d) {_CLOCK_TIME} (?P<year>\d{{4}})",
)


def format_date(seconds: float) -> str:
    """Format Unix seconds as an IMF-fixdate (RFC 9110 §5.6.7), whatever the locale.

    >>> format_date(784111777)
    'Sun, 06 Nov 1994 08:49:37 GMT'
    """
    return formatdate(math.floor(seconds), usegmt=True)


def parse_date(value: str, now: float | None = None) -> int | None:
    """Return the Unix seconds of an HTTP date in any of its three forms; None if it is none.

    A year of two digits that is more than 50 years ahead of `now` is one in the past.
    """
    match = next(filter(None, (re.fullmatch(form, value, re.ASCII) for form in _DATES)), None)
    if match is None:
        return None
    year = int(match["year"])
    if len(match["year"]) == 2:
        this_year = time.gmtime(now).tm_year
        year += this_year - this_year % 100
        year -= 100 if year > this_year + 50 else 0
    month = _MONTHS.index(match["month"]) + 1
    day, hour, minute, second = map(int, match.group("day", "hour", "minute", "second"))
    second -= second == 60  # a leap second, which Unix time does not count
    try:
        date = datetime(year, month, day, hour, minute, second, tzinfo=timezone.utc)
    except ValueError:
        return None
    return int(date.timestamp())


def format_head(status: int, headers: Mapping[str, str]) -> bytes:
    """Format the status line, the fields and the empty line after them (RFC 9112 §4).

    Raises ValueError if a CR, LF or NUL would make other fields, or another answer, of a value.
    """
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, '')}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join(lines)
    if not len(lines) - 1 == head.count("\r") == head.count("\n") or "\0" in head:
        raise ValueError("a header field must not contain CR, LF or NUL")
    return (head + "\r\n\r\n").encode("latin-1")


# ======================================================================================
# 10. Server
# ======================================================================================
# `ThreadingHTTPServer`, but with a thread only while there is work for one. The selector of
# `serve_forever` holds idle connections, heads and bodies that are still arriving, and answers
# that wait for a slow reader; cheap hot GETs it answers where it stands (passing the GIL to a
# thread costs more than such an answer), everything else goes to a thread. A head is accepted
# once; then its body is fed to the request, by a thread while bytes come, and it is answered. So
# ten thousand slow clients cost memory and descriptors, not threads. Each kind of work has
# threads of its own: decoders, passwords and long lists keep none from short requests, and what
# needs no disk is answered while one hangs. A connection is always in one state of a table,
# which `Connections` alone changes; whatever is done with one, by the selector's thread
# (`Server`) or another (`Runner`), says the state that it is in then. `Service` is what all of
# this is around. Media are unknown here.

RECEIVE_BYTES = 64 * 1024  # read at once while a head is expected
BODY_BUFFER_BYTES = 256 * 1024  # read at once from a body; more gains nothing
COLLECT_BYTES = 64 * 1024  # of a body that comes slowly, before a thread is spent on it
SEND_BYTES = 1 << 20  # sent of a file at once
SOON_SECONDS = 0.002  # in which a client that sends many files begins the next
PATIENCE_SECONDS = 0.005  # that requests without a body wait for each other
BODY_SECONDS = 0.05  # that a thread waits for more of a body, if no other body waits for a thread
MAX_THREADS = 64  # of each kind of work that waits for a disk or a client
MAX_IN_FLIGHT = 512  # requests worked on or waiting for a thread; more are answered 503
MAX_DESCRIPTORS = 16384  # connections and the files in them
MAX_DEFERRED = 128  # requests that wait for one kind of work; more are answered 503
MAX_CLIENT_BODIES = 64  # requests of one client whose bodies are on their way
HEAD_SECONDS = 60.0  # a head must be complete by then
STALL_SECONDS = 30.0  # a head or body without a byte
GRACE_SECONDS = 30.0  # after which a head or body has come at MIN_RATE on average
MIN_RATE = 1024  # bytes a second
UNREAD_SECONDS = 120.0  # an answer of which the client's side acknowledges nothing
IDLE_SECONDS = 75.0  # a kept connection without a request, as nginx has it
LISTEN_BACKLOG = 1024  # connections that wait for accept
LINGER_SECONDS = 30.0  # how long a refused body is read so that the client sees the answer
LINGER_BYTES = 16 << 20  # of it; then the connection is closed
STOP_SECONDS = 60.0  # what is in flight may take after SIGTERM
LAST_REQUEST_SECONDS = 0.5  # and idle connections may still begin a request; it is their last

# Threads for each kind of work, so that none keeps those of another waiting. Short requests have
# one: threads that pass the GIL around slow each other down (measured, short GETs a second on 16
# connections: one thread 6,100, two 4,100, many 2,500). What waits behind one that a disk holds
# up is relieved.
THREADS = {
    "prompt": 2,  # requests that wait for nothing
    "short": 1,  # without a body
    "relief": MAX_THREADS,
    "body": MAX_THREADS,  # with one
    "answer": MAX_THREADS,  # the rest of long answers
    "decoder": 8,  # deferred work, as the others
    "list": 2,
    "password": 4,  # by the memory of scrypt, of which a thread keeps what it has freed
    "registration": 1,  # so that it never delays logins
}

NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}  # accept(2)
HTTP_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
RETRY_SOON = {"Retry-After": "1"}
TOO_SLOW = "The request took too long to arrive."
MSG_MORE = getattr(socket, "MSG_MORE", 0)  # Linux only
format_this_second = functools.lru_cache(maxsize=1)(format_date)


class FileSlice:
    """`count` bytes of an open file from `offset`, sent without passing through Python.

    What goes `before` them shares their first packet (send(2), MSG_MORE); so do a slow reader's.
    """

    __slots__ = ("before", "count", "file", "offset")

    def __init__(
        self, file: io.FileIO | SlowReader, offset: int, count: int,
        before: bytes | memoryview = b"",
    ) -> None:  # fmt: skip
        self.file = file
        self.offset = offset
        self.count = count
        self.before = before

    def fetch(self, source: SlowReader) -> None:
        """Put the next bytes of a slow source behind what goes before."""
        piece = source.read_at(self.offset, self.count)
        self.offset, self.count = self.offset + len(piece), self.count - len(piece)
        self.before = b"".join((self.before, piece))

    def read_at_hand(self) -> bytes | None:
        """Return all of it, if it is in the page cache."""
        assert isinstance(self.file, io.FileIO)
        data = bytearray(self.count)
        try:
            count = os.preadv(self.file.fileno(), [data], self.offset, os.RWF_NOWAIT)
        except (AttributeError, OSError):  # not on Linux; EAGAIN; the file system cannot tell
            return None
        return b"".join((self.before, data)) if count == self.count else None


Segment = bytes | memoryview | FileSlice


def length_of(segment: Segment) -> int:
    """Return the bytes of a segment: len() has 2 GiB at most where addresses have 32 bits."""
    if isinstance(segment, FileSlice):
        return len(segment.before) + segment.count
    return len(segment)


class Response:
    """An answer; `body` is bytes, or segments."""

    __slots__ = (
        "body", "headers", "length", "prepared", "principal", "resource", "route", "status",
    )  # fmt: skip

    def __init__(
        self,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        body: bytes | Sequence[Segment] = b"",
        resource: io.FileIO | SlowReader | None = None,
    ) -> None:
        self.status = status
        self.headers = dict(headers or {})
        self.body = body
        self.length = len(body) if isinstance(body, bytes) else sum(map(length_of, body))
        self.resource = resource  # closed when the answer is over
        # What is before and behind the date in the head, where it is often sent
        self.prepared: tuple[bytes, bytes] | None = None
        self.route = 0  # the number of what has made it, and for whom: for figures and the log
        self.principal: object = ""

    def prepare(self) -> Response:
        """Put the head together once, for HTTP/1.1."""
        message = b"".join(self.to_segments(None, "", keep_alive=True))  # type: ignore[arg-type]
        start, _, rest = message.removesuffix(self.body).partition(b"Date: ")  # type: ignore[arg-type]
        self.prepared = start + b"Date: ", rest
        return self

    def copy_for(self, principal: object) -> Response:
        """Return a prepared answer for somebody else."""
        response = Response(self.status, None, self.body)
        response.prepared, response.route = self.prepared, self.route
        response.principal = principal
        return response

    def close(self) -> None:
        """Let go of the file or the generator of the body."""
        if self.resource is not None:
            self.resource.close()

    def to_segments(
        self, head: RequestHead | None, date: str, *, keep_alive: bool
    ) -> Iterator[Segment]:
        """Yield the bytes of the message (RFC 9112 §2.1): head, and body unless it has none."""
        if self.prepared:
            start, rest = self.prepared
            fields = date if keep_alive else f"{date}\r\nConnection: close"
            return iter((b"".join((start, fields.encode(), rest, self.body)),))  # type: ignore[arg-type]
        headers = {"Date": date, **self.headers}
        bodiless = self.status in {204, 304}
        if bodiless:
            headers.pop("Content-Type", None)
        else:
            headers["Content-Length"] = str(self.length)
        if not keep_alive:
            headers["Connection"] = "close"
        elif head is not None and head.version == (1, 0):
            headers["Connection"] = "keep-alive"
        block = format_head(self.status, headers)
        if bodiless or (head is not None and head.method == "HEAD"):
            return iter((block,))
        if isinstance(self.body, bytes):
            return iter((block + self.body,))
        segments = iter(self.body)
        first = next(segments, b"")
        if isinstance(first, FileSlice):  # the head shares a packet with it
            first.before = block + first.before
        else:
            first = b"".join((block, first))
        return itertools.chain((first,), segments)


class Deferred(NamedTuple):
    """An answer that takes a while: `work` gives it in a thread for this kind of work."""

    kind: str  # of THREADS
    work: Callable[[], Answer]
    refuse: Callable[[HTTPError], Response] | None = None  # where too many wait


Answer = Response | Deferred


class Exchange(NamedTuple):
    """A request whose head was accepted: it takes its body in pieces and is answered once.

    What returns an answer has ended it. Nothing of it is called by two threads at once.
    """

    interim: Mapping[str, str]  # the fields of a 104 before the body; none: no 104
    feed: Callable[[memoryview], Answer | None]  # takes content, which is good until it returns
    pause: Callable[[], Answer | None]  # lets go of what is not needed while no more comes
    finish: Callable[[], Answer]  # the body is complete
    refuse: Callable[[HTTPError], Response]  # the body is none, or too slow
    abandon: Callable[[], None]  # the client has gone away


class Buffers(threading.local):
    """One receive buffer a thread: fresh pages for each request would cost more than reading."""

    def __init__(self) -> None:
        self.body = memoryview(bytearray(BODY_BUFFER_BYTES))


class State(enum.IntEnum):
    """Where a connection is; see WAITS."""

    NEW = enum.auto()  # nothing was read, and the selector does not wait for it yet
    IDLE = enum.auto()  # no request has begun
    HEAD = enum.auto()  # some of a head is here
    BODY = enum.auto()  # the head is accepted, some of the body is not here
    WORKING = enum.auto()  # a thread has the connection, or it waits for one
    SENDING = enum.auto()  # some of an answer is not sent
    LINGERING = enum.auto()  # the answer is sent, the rest of a refused body is read and dropped
    CLOSED = enum.auto()


NEW, IDLE, HEAD, BODY, WORKING, SENDING, LINGERING, CLOSED = State


class Wait(NamedTuple):
    """What the selector waits for on a connection, and how long: see `Server._expire`."""

    event: int
    seconds: float


WAITS: dict[State, Wait] = {
    IDLE: Wait(selectors.EVENT_READ, IDLE_SECONDS),
    HEAD: Wait(selectors.EVENT_READ, STALL_SECONDS),
    BODY: Wait(selectors.EVENT_READ, STALL_SECONDS),
    SENDING: Wait(selectors.EVENT_WRITE, math.inf),  # the kernel knows whether it is read
    LINGERING: Wait(selectors.EVENT_READ, LINGER_SECONDS),
}
# Who gives way first when descriptors run out; an answer that is being sent does not.
GIVING_WAY = (LINGERING, IDLE, HEAD, BODY)


class Connection:
    """A client's connection, owned by the selector's thread or by another one, never by both."""

    __slots__ = (
        "after", "began", "body", "collected", "counted", "deadline", "deferred", "descriptor",
        "dropped", "due", "event", "exchange", "failure", "head", "latest", "limits", "peer",
        "pending", "received", "response", "scanned", "segments", "server", "socket", "state",
    )  # fmt: skip

    def __init__(self, sock: socket.socket, peer: str, server: Server) -> None:
        self.socket = sock
        self.descriptor = sock.fileno()
        self.peer = peer  # the other end's address
        self.server = server
        self.state = NEW
        self.event = 0  # that the selector waits for
        self.deadline = 0.0  # of the state; this and the others are monotonic seconds
        self.due = self.latest = 0.0  # when more of a head or body must be here, and all of a head
        self.began = time.monotonic()  # when the last of the latest head had come
        self.counted = 0  # descriptors
        self.received = b""  # and not used yet
        self.scanned = 0  # bytes of it in which no head ends
        self.head: RequestHead | None = None
        self.body: BodyDecoder | None = None
        self.exchange: Exchange | None = None
        self.deferred: Deferred | None = None  # what gives the answer
        self.limits: dict[ClientLimit, str] = {}  # in which it counts, for which client
        self.collected = bytearray()  # content that the exchange has not been fed yet
        self.failure: HTTPError | None = None  # that ended the body
        self.response: Response | None = None
        self.segments: Iterator[Segment] = iter(())
        self.pending: Segment | None = None  # the segment that is being sent
        self.after = IDLE  # the state when all of it is sent
        self.dropped = 0  # bytes while it lingers

    def set_deadline(self, state: State) -> None:
        """Note how long a state that begins, or in which something has come, may last."""
        now = time.monotonic()
        if state is HEAD is not self.state:
            self.await_bytes(now + HEAD_SECONDS)
        if wait := WAITS.get(state):
            self.deadline = now + wait.seconds
        if state in (HEAD, BODY):
            self.deadline = min(self.deadline, self.due, self.latest)

    def await_bytes(self, latest: float) -> None:
        """Begin to wait for a head or body, which has to come at MIN_RATE after a while."""
        self.due, self.latest = time.monotonic() + GRACE_SECONDS, latest

    def count_descriptors(self) -> int:
        """Count what it has while it is open: socket, file that is sent, one that arrives."""
        sends = self.response is not None and self.response.resource is not None
        return 1 + sends + (self.exchange is not None)

    # -- reading

    def parse_head(self) -> bool:
        """Parse a head; return whether it is here whole, or is none and refused."""
        data = self.received
        if data.startswith(b"\r"):
            self.received = data = skip_empty_lines(data)
        if not data:
            return False
        self.began = time.monotonic()
        try:
            end = find_head_end(data, self.scanned)
            if end < 0:
                self.scanned = len(data)
                return False
            self.head = head = parse_request_head(data[:end])
        except HTTPError as error:
            self.refuse(error)
            return True
        self.received, self.scanned = data[end + 4 :], 0
        if head.has_body:
            self.body = head.body_decoder()
        return True

    def decode_body(self) -> bool:
        """Decode and keep what was received; return whether that is all. Raises HTTPError."""
        for piece in self.decode_pieces():
            self.collected += piece
        return self.body is None or self.body.finished

    def decode_pieces(self, data: bytes | memoryview = b"") -> list[memoryview]:
        """Decode what there is of a body, `data` last; raises HTTPError if it is none."""
        pieces = []
        if self.collected:
            pieces.append(memoryview(self.collected))
            self.collected = bytearray()
        if self.body is not None and not self.body.finished:
            data, self.received = data or self.received, b""
            pieces += self.body.feed(data)
            self.received = self.body.rest
        return pieces

    def skip_body(self) -> bool:
        """Pass over the rest of a body if all of it is here; return whether it was."""
        try:
            return self.decode_body()
        except HTTPError:
            return False

    def receive(self, buffer: memoryview, seconds: float) -> memoryview | None:
        """Return what comes into the buffer within so short a time, if any; empty: the end."""
        for patience in (seconds, 0):
            try:
                return buffer[: self.socket.recv_into(buffer)]
            except BlockingIOError:
                if not patience or not self._wait_readable(patience):
                    break
        return None

    def receive_body(self, buffer: memoryview, seconds: float) -> memoryview | None:
        """Return some of a body, if it comes within so short a time.

        Raises ConnectionAbortedError if the client closes the connection, and 408 if it has
        been slower than MIN_RATE for too long.
        """
        data = self.receive(buffer, seconds)
        if data is not None:
            if not data:
                raise ConnectionAbortedError("the client closed the connection within a body")
            self.due += len(data) / MIN_RATE
            if self.due < time.monotonic():
                raise HTTPError(408, TOO_SLOW)
        return data

    def _wait_readable(self, seconds: float) -> bool:
        """Wait for bytes, or the end, from the client; return whether they have come."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    # -- answering

    def send_interim(self, headers: Mapping[str, str]) -> None:
        """Tell the client what it may need before the answer (RFC 9110 §15.2)."""
        if headers and self.head is not None and self.head.version > (1, 0):
            self.socket.send(format_head(104, headers))  # as short as it is alone

    def begin(self, response: Response, *, whole: bool = True) -> None:
        """Set out to answer a request; one that is not here `whole` is the connection's last."""
        if response.resource is not None:
            try:
                self.acquire(self.server.downloads)
            except HTTPError as error:
                response.close()
                response = self.error(error)
        head, server = self.head, self.server
        goes_on = whole and head is not None and head.keep_alive and not server.stopping
        self.after = IDLE if goes_on else CLOSED if whole else LINGERING
        self.response = response
        date = format_this_second(int(time.time()))
        self.segments = response.to_segments(head, date, keep_alive=goes_on)

    def refuse(self, error: HTTPError) -> None:
        """Set out to answer an error that concerns the connection, and to end it."""
        self.begin(self.error(error), whole=False)

    def error(self, error: HTTPError) -> Response:
        """Return the answer to what is refused before the service has a request."""
        origin = self.head.headers.get("origin", "") if self.head else find_origin(self.received)
        return self.server.service.on_error(error, origin)

    def send(self, *, may_wait: bool) -> State:
        """Send what the client takes; return the state that the connection is in then.

        Unless it `may_wait`, it leaves what is not in memory to a thread (WORKING). Whether a
        file is in the page cache is not asked: threads send as fast, and side by side.
        """
        assert self.response is not None
        if not (may_wait or isinstance(self.response.body, bytes)):
            return WORKING
        try:
            while (pending := self.pending or next(self.segments, None)) is not None:
                self.pending = pending
                if isinstance(pending, FileSlice):
                    self.pending = self._send_slice(pending)
                else:
                    sent = self.socket.send(pending)
                    self.pending = memoryview(pending)[sent:] if sent < len(pending) else None
        except BlockingIOError:
            return SENDING
        self.pending = None  # and what it is a view of
        self.finish()
        if self.after is LINGERING:
            # RFC 9112 §9.6: closing with bytes unread would reset the connection, perhaps
            # before the client has read the answer.
            self.received = b""
            self.socket.shutdown(socket.SHUT_WR)
        return self.after

    def _send_slice(self, segment: FileSlice) -> FileSlice | None:
        """Send some of a file and return the rest of it."""
        file = segment.file
        if not isinstance(file, io.FileIO) and not segment.before:
            segment.fetch(file)
        if segment.before:
            sent = self.socket.send(segment.before, MSG_MORE if segment.count else 0)
            segment.before = memoryview(segment.before)[sent:]
        if isinstance(file, io.FileIO) and segment.count and not segment.before:
            count = min(segment.count, SEND_BYTES)
            sent = os.sendfile(self.descriptor, file.fileno(), segment.offset, count)
            if not sent:
                raise ConnectionAbortedError("the file became shorter while it was sent")
            segment.offset += sent
            segment.count -= sent
        return segment if segment.count or segment.before else None

    def acquire(self, limit: ClientLimit) -> None:
        """Count for its client until it is given back; 429 or 503 where there are too many."""
        if limit not in self.limits and self.head is not None:
            client = self.server.service.client_of(self.head, self.peer)
            limit.acquire(client)
            self.limits[limit] = client

    def release_all(self) -> None:
        """Count no more for the client."""
        while self.limits:
            limit, client = self.limits.popitem()
            limit.release(client)

    def finish(self) -> None:
        """Forget the request, which has been answered or whose client is gone."""
        response, exchange = self.response, self.exchange
        if response is not None:
            seconds = time.monotonic() - self.began
            self.server.service.on_answered(self.head, self.peer, response, seconds)
            response.close()
        self.response = self.head = self.body = self.exchange = self.deferred = None
        if self.collected:
            self.collected = bytearray()
        if self.limits:
            self.release_all()
        if exchange is not None:
            exchange.abandon()

    def close(self) -> None:
        """Let go of all; what goes wrong with that is no other connection's affair."""
        for let_go in (self.finish, self.socket.close):
            try:
                let_go()
            except Exception as error:
                warn(f"a connection's end: {type(error).__name__}: {error}")


class Connections:
    """All connections, each in its state: what the selector holds, and what threads do."""

    def __init__(
        self, selector: selectors.BaseSelector, most: int, on_flight: Callable[[int], None]
    ) -> None:
        self.held: dict[int, Connection] = {}  # by descriptor: those that no thread has
        self.in_flight = 0  # those that threads have
        self.descriptors = 0  # of all
        self.most_descriptors = most
        self.returned_at = -math.inf  # idle ones may begin a request for a while after this
        self._selector = selector
        self._on_flight = on_flight
        self._lock = threading.Lock()

    def enter(self, connection: Connection, state: State) -> None:
        """Put a connection into a state: the only writer of states, selector and counters.

        Any thread may, for a connection that it owns; epoll and kqueue allow it.
        """
        connection.set_deadline(state)
        if state is connection.state:
            return
        if state is CLOSED:
            with self._lock:  # before its descriptor is another's
                self.held.pop(connection.descriptor, None)
                self._select(connection, 0)
            connection.close()
        with self._lock:
            self._move(connection, state)

    def _move(self, connection: Connection, state: State) -> None:
        wait = WAITS.get(state)
        if wait:
            self.held[connection.descriptor] = connection
            self._select(connection, wait.event)
        elif state is WORKING:
            self.held.pop(connection.descriptor, None)
            # While a GET is worked on nothing more comes as a rule, and `rest` is rarely needed.
            if connection.body is not None or connection.event != selectors.EVENT_READ:
                self._select(connection, 0)
        count = connection.count_descriptors() if state is not CLOSED else 0
        self.descriptors += count - connection.counted
        connection.counted = count
        if WORKING in (state, connection.state):
            if wait:
                self.returned_at = time.monotonic()
            self.in_flight += 1 if state is WORKING else -1
            self._on_flight(self.in_flight)
        connection.state = state  # from here on it is another thread's

    def _select(self, connection: Connection, event: int) -> None:
        if event and connection.event:
            if event != connection.event:
                self._selector.modify(connection.descriptor, event, connection)
        elif event:
            self._selector.register(connection.descriptor, event, connection)
        elif connection.event:
            self._selector.unregister(connection.descriptor)
        connection.event = event

    def unregister(self, connection: Connection) -> None:
        """Have the selector wait for nothing on a connection that a thread has."""
        with self._lock:
            if connection.state is WORKING:
                self._select(connection, 0)

    def count(self) -> tuple[int, list[Connection]]:
        """Return how many threads have, and those that the selector holds, at one moment."""
        with self._lock:
            return self.in_flight, list(self.held.values())

    def in_states(self, *states: State) -> list[Connection]:
        """Return those that the selector holds in these states."""
        return [c for c in list(self.held.values()) if c.state in states]

    def make_room(self) -> bool:
        """Close the connection that can be missed best; return whether there was one."""
        for state in GIVING_WAY:
            if held := self.in_states(state):
                self.enter(min(held, key=lambda connection: connection.deadline), CLOSED)
                return True
        return False


class Workers:
    """Threads for one kind of work: they come with it and stay for more, at most `limit`."""

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._unfinished = 0  # jobs
        self._threads = 0
        self._lock = threading.Lock()
        self._began = math.inf  # the latest job

    @property
    def waiting(self) -> int:
        """Return how many jobs wait for a thread."""
        return self._jobs.qsize()

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` in some thread."""
        with self._lock:
            self._unfinished += 1
            if self._threads < min(self._unfinished, self._limit):
                name = f"{self._name}-{self._threads + 1}"
                try:
                    threading.Thread(target=self._work, daemon=True, name=name).start()
                    self._threads += 1
                except RuntimeError:  # no thread to be had: the others do it, if there are any
                    if not self._threads:
                        raise
        self._jobs.put(job)

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            self._began = time.monotonic()
            job()
            self._began = math.inf
            with self._lock:
                self._unfinished -= 1

    def relieve(self, others: Workers) -> None:
        """Have others do what waits behind a job that holds the one thread up."""
        while self.waiting and time.monotonic() - self._began > PATIENCE_SECONDS:
            with contextlib.suppress(queue.Empty):
                others.submit(self._jobs.get_nowait())


class ClientLimit:
    """Bounds what takes long: of one client, and of all together."""

    def __init__(self, what: str, most: int, each: int) -> None:
        self._what = what
        self._most = most
        self._each = each
        self._lock = threading.Lock()
        self._all = 0
        self._clients: Counter[str] = Counter()

    def acquire(self, client: str) -> None:
        """Count one more; 429 or 503 where there are too many."""
        with self._lock:
            if self._clients[client] >= self._each:
                detail = f"More than {self._each} of your {self._what}."
                raise HTTPError(429, detail, RETRY_SOON)
            if self._all >= self._most:
                raise HTTPError(503, f"Too many {self._what}.", RETRY_SOON)
            self._clients[client] += 1
            self._all += 1

    def release(self, client: str) -> None:
        """Count one less for a client."""
        with self._lock:
            self._all -= 1
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]


class Service(Protocol):
    """What a Server is around."""

    def __call__(self, head: RequestHead, peer: str) -> Answer | Exchange:
        """Answer a request in a thread, or accept it to be fed its body."""

    def inline(self, head: RequestHead, iteration: int) -> Response | None:
        """Answer a cheap request without a body in an iteration of the selector; never block."""

    def is_prompt(self, head: RequestHead) -> bool:
        """Return whether a request needs neither disk nor index, and waits for none that does."""

    def client_of(self, head: RequestHead, peer: str) -> str:
        """Return whose share of what is bounded a request takes."""

    def on_error(self, error: HTTPError, origin: str) -> Response:
        """Return the answer to a message that is no request."""

    def on_answered(
        self, head: RequestHead | None, peer: str, response: Response, seconds: float
    ) -> None:
        """Take note of an answer that is over."""

    def on_flight(self, count: int) -> None:
        """Take note of how many requests are worked on."""


class Runner:
    """Has requests answered, by threads or in the selector's, and sends the answers."""

    def __init__(self, server: Server, connections: Connections) -> None:
        self.pools = {kind: Workers(kind, limit) for kind, limit in THREADS.items()}
        self._server = server
        self._service = server.service
        self._connections = connections
        self._buffers = Buffers()

    def step(self, connection: Connection, react: Callable[[Connection], State | None]) -> None:
        """Do something with a connection and put it into the state that it is in then, if any.

        What goes wrong with that ends the connection, and neither a thread nor the loop.
        """
        try:
            state = react(connection)
            if state is WORKING:
                self._hand_over(connection)
            elif state is not None:
                self._connections.enter(connection, state)
        except Exception as error:
            if not isinstance(error, OSError):  # the client is gone
                warn(f"a connection was dropped: {type(error).__name__}: {error}")
            self._connections.enter(connection, CLOSED)

    def _hand_over(self, connection: Connection) -> None:
        """Have a thread go on with a connection."""
        workers, handed_on = self._choose_workers(connection), connection.state is WORKING
        self._connections.enter(connection, WORKING)
        proceed = functools.partial(self.proceed, workers=workers)
        workers.submit(functools.partial(self.step, connection, proceed))
        if handed_on:
            self._server.wake()  # to see whether the thread for short requests is held up

    def _choose_workers(self, connection: Connection) -> Workers:
        if connection.response is not None:
            return self.pools["answer"]
        if connection.deferred is not None:
            return self.pools[connection.deferred.kind]
        if connection.body is not None:
            return self.pools["body"]
        assert connection.head is not None
        return self.pools["prompt" if self._service.is_prompt(connection.head) else "short"]

    def proceed(self, connection: Connection, workers: Workers | None = None) -> State | None:
        """Do what can be done by these workers, or the selector's thread; return the state then.

        None if nothing has come but empty lines, which do not lengthen a wait.
        """
        answered = False
        while connection.head or connection.response or connection.parse_head():
            if connection.response is None:
                wait = self._answer(connection, workers) if workers else self._inline(connection)
                if wait:
                    return wait
            state = connection.send(may_wait=workers is not None)
            if state is not IDLE:
                return state
            answered = True
            if workers and workers is self.pools["body"]:
                self._receive_next(connection)
        if connection.received:
            return HEAD
        return IDLE if answered else None

    def _receive_next(self, connection: Connection) -> None:
        """Take in what comes at once behind a request with a body.

        A client that sends one file after the other keeps its thread, unless others wait for
        one: to give the connection back and take it again is a tenth of a small upload's time.
        """
        if not (connection.received or self.pools["body"].waiting or self._server.stopping):
            buffer = self._buffers.body[:RECEIVE_BYTES]  # what comes with the head is copied
            connection.received += connection.receive(buffer, SOON_SECONDS) or b""

    def _answer(self, connection: Connection, workers: Workers) -> State | None:
        """Have a request answered; return the state in which more, or another one, is awaited."""
        if self._choose_workers(connection) is not workers:
            return WORKING
        answer = self._call_service(connection)
        if answer is None:
            return BODY
        if isinstance(answer, Deferred):
            if self.pools[answer.kind].waiting < MAX_DEFERRED:
                connection.deferred = answer
                return WORKING
            busy = HTTPError(503, "Too many requests wait for this.", RETRY_SOON)
            answer = (answer.refuse or connection.error)(busy)
        connection.begin(answer, whole=connection.skip_body())
        return None

    def _inline(self, connection: Connection) -> State | None:
        """Spare a thread what is cheap, or too much; return WORKING where one is needed."""
        head = connection.head
        assert head is not None
        response = None if head.has_body else self._service.inline(head, self._server.iteration)
        if response is not None:
            connection.begin(response)
        elif self._connections.in_flight >= MAX_IN_FLIGHT and not self._service.is_prompt(head):
            connection.refuse(HTTPError(503, "Too many requests are in flight.", RETRY_SOON))
        else:
            return WORKING
        return None

    def _call_service(self, connection: Connection) -> Answer | None:
        """Return the service's answer; None if nothing more comes of a body for now."""
        if connection.deferred is not None:
            return connection.deferred.work()
        if connection.exchange is None:
            assert connection.head is not None
            accepted = self._service(connection.head, connection.peer)
            if isinstance(accepted, Answer):
                return accepted
            connection.exchange = accepted
            connection.await_bytes(math.inf)
            connection.send_interim(accepted.interim)
        try:
            answer = self._receive(connection, connection.exchange)
        except HTTPError as error:
            answer = connection.exchange.refuse(error)
        if answer is not None:
            connection.exchange = None
        return answer

    def _receive(self, connection: Connection, exchange: Exchange) -> Answer | None:
        """Feed what has come of a body; return the answer, None if no more comes for now."""
        body = connection.body
        assert body is not None
        if connection.failure is not None:
            raise connection.failure
        head, is_begun = connection.head, connection.received or connection.limits
        if head is not None and head.expects_continue and not (is_begun or body.finished):
            connection.acquire(self._server.bodies)  # RFC 9110 §10.1.1
            connection.socket.send(HTTP_CONTINUE)  # 25 bytes always fit: nothing is being sent
        data: bytes | memoryview | None = b""
        while data is not None:
            for piece in connection.decode_pieces(data):
                if response := exchange.feed(piece):
                    return response
            if body.finished:
                connection.release_all()
                return exchange.finish()
            patience = SOON_SECONDS if self.pools["body"].waiting else BODY_SECONDS
            data = connection.receive_body(self._buffers.body, patience)
        connection.acquire(self._server.bodies)
        return exchange.pause()


class Server(ThreadingHTTPServer):
    """HTTP/1.1 with keep-alive, deadlines and limits around a service."""

    parent: socket.socket | None = None  # readable when the supervisor is gone
    on_hangup: Callable[[], None]
    on_orphaned: Callable[[], None]

    def __init__(
        self, listener: socket.socket, service: Service, most: int = MAX_DESCRIPTORS
    ) -> None:
        # Our connections are no BaseHTTPRequestHandlers: they outlive one request's thread.
        super().__init__(listener.getsockname()[:2], Connection, bind_and_activate=False)  # type: ignore[arg-type]
        self.socket.close()
        self.socket = listener
        self.service = service
        self._selector = selectors.DefaultSelector()
        self.connections = Connections(self._selector, most, service.on_flight)
        self.runner = Runner(self, self.connections)
        self.iteration = 0  # how often the selector has woken up
        self.stopping = False
        self._stop_at = 0.0
        self.turned_at = time.monotonic()  # when the selector's loop last looked at deadlines
        # A byte that is written to one of these ends the wait; it may be a signal's number.
        self._alarm, self.wakeup = socket.socketpair()
        for end in (self._alarm, self.wakeup):
            end.setblocking(False)
        # Each has a file, too: half of all descriptors are for bodies, two thirds for downloads.
        self.bodies = ClientLimit("requests have not arrived yet", most // 4, MAX_CLIENT_BODIES)
        self.downloads = ClientLimit("downloads are not over yet", most // 3, most // 6)

    def serve_forever(self, poll_interval: float = 1.0) -> None:
        """Serve until `stop`; deadlines are looked at every `poll_interval` seconds."""
        short, relief = self.runner.pools["short"], self.runner.pools["relief"]
        self._selector.register(self.socket, selectors.EVENT_READ, self._accept)
        self._selector.register(self._alarm, selectors.EVENT_READ, self._drain_alarm)
        if self.parent is not None:
            self._selector.register(self.parent, selectors.EVENT_READ, self.on_orphaned)
        while not self._is_over():
            patience = LAST_REQUEST_SECONDS / 5 if self.stopping else poll_interval
            ready = self._selector.select(PATIENCE_SECONDS if short.waiting else patience)
            self.iteration += 1
            for key, _ in ready:
                if not isinstance(key.data, Connection):
                    key.data()
                elif key.data.state is WORKING:
                    self.connections.unregister(key.data)
                else:
                    self.runner.step(key.data, self._on_ready)
            short.relieve(relief)
            now = time.monotonic()
            if now >= self.turned_at + poll_interval:
                self.turned_at = now
                for connection in self.connections.in_states(*WAITS):
                    if connection.deadline < now:
                        self.runner.step(connection, self._expire)

    def wake(self) -> None:
        """End the selector's wait."""
        with contextlib.suppress(OSError):  # it is awake, or over
            self.wakeup.send(b"\0")

    def _drain_alarm(self) -> None:
        with contextlib.suppress(BlockingIOError):
            if signal.SIGHUP in self._alarm.recv(4096):
                self.on_hangup()

    # -- connections on which something has happened

    def _on_ready(self, connection: Connection) -> State | None:
        """Take in what has come, or send more of an answer."""
        state = connection.state
        if state is SENDING:
            return self.runner.proceed(connection)
        try:
            data = connection.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        connection.due += len(data) / MIN_RATE
        connection.received += data
        if state is BODY:
            return self._collect(connection, is_over=not data)
        if not data:
            return CLOSED
        if state is LINGERING:
            connection.received = b""
            connection.dropped += len(data)
            return CLOSED if connection.dropped > LINGER_BYTES else None
        return self.runner.proceed(connection)

    def _collect(self, connection: Connection, *, is_over: bool) -> State:
        """Decode some of a body; a thread goes on when there is enough for one, or an end."""
        try:
            is_over = connection.decode_body() or is_over
        except HTTPError as error:
            connection.failure, is_over = error, True
        return WORKING if is_over or len(connection.collected) >= COLLECT_BYTES else BODY

    def _expire(self, connection: Connection) -> State | None:
        """End a connection that made no progress; 408 if a request had begun."""
        late = HTTPError(408, TOO_SLOW)
        if connection.state is BODY:
            connection.failure = late
            return WORKING
        if connection.state is HEAD and connection.received:
            connection.refuse(late)
            return self.runner.proceed(connection)
        return CLOSED

    # -- beginning and end

    def _accept(self, most: int = 64) -> None:
        """Take in who has come."""
        for _ in range(most):
            try:
                sock, address = self.socket.accept()
            except OSError as error:  # nobody is there, or is gone already
                if error.errno in NO_DESCRIPTORS:
                    self.connections.make_room()
                return
            sock.setblocking(False)
            self.runner.step(Connection(sock, address[0], self), self._welcome)

    def _welcome(self, connection: Connection) -> State | None:
        """Take the request on a new connection, or wait for it; 503 where there is no room."""
        connections = self.connections
        if connections.descriptors < connections.most_descriptors or connections.make_room():
            return self._on_ready(connection) or HEAD  # it is here already, as a rule
        connection.refuse(HTTPError(503, "Too many connections are open.", RETRY_SOON))
        return self.runner.proceed(connection)

    def stop(self) -> None:
        """Take no more requests; `serve_forever` returns when those in flight are answered."""
        if not self.stopping:
            self._stop_at = time.monotonic() + STOP_SECONDS
            self.stopping = True

    def _is_over(self) -> bool:
        """Return whether a stop is complete: nothing is in flight; close what is idle."""
        if not self.stopping:
            return False
        now, connections = time.monotonic(), self.connections
        if self.socket.fileno() >= 0:
            self._accept(LISTEN_BACKLOG)  # who came before the stop is answered, too
            self._selector.unregister(self.socket)
            self.socket.close()
            connections.returned_at = now
        in_flight, held = connections.count()
        # A request that is on its way while its connection is closed would be lost to a client
        # that the next process, on the same inherited socket, could have served.
        if (in_flight or held) and now < connections.returned_at + LAST_REQUEST_SECONDS:
            return False
        for connection in held:
            if connection.state in (IDLE, HEAD):
                connections.enter(connection, CLOSED)
        busy = in_flight or any(c.state in (BODY, SENDING) for c in held)
        return not busy or now > self._stop_at


# ======================================================================================
# 11. Routing
# ======================================================================================
# One declaration gives a route, who may call it, which fields it reads and what it answers;
# the fields are parsed and checked, and an uploaded file is received, before its handler
# runs. `Dispatcher` turns a request into an answer: route, principal, access, fields,
# handler. It is also the one place where an exception becomes an answer.

MAX_TEXT_BYTES = 1 << 20  # JSON, a form, or the text fields of a multipart form together
FORM_SLACK_BYTES = 2 << 20  # what a form may have beside its file: text, headers, boundaries
GZIP_BYTES = 1024  # JSON above this is compressed for those who accept it
GZIP_LEVEL = 5  # 1.5 times as fast as 6, 2 % larger
HOT_FILE_BYTES = 64 * 1024  # a public file up to this size is remembered once it was asked for
HOT_BYTES = 8 << 20  # all of these together
FOLDERS_SECONDS = 0.01  # between looks at the folders of one: 2 µs, an eighth of its answer
MAX_CATALOGUES = 4  # choices of the gallery that are kept
CATALOGUE_REST = 3  # a catalogue is good for this many times what it took to make
MAX_HASHES = 1000  # asked for at once
MAX_LISTINGS = 4  # lists that are kept: of several hosts, pages, codings
MAX_VOTES = 100  # for one of them, so that another may take its place some time
LISTING_BATCH = 1000  # rows written together
JSON_TYPE = "application/json"
HTML_TYPE = "text/html; charset=utf-8"
TEXT_TYPES = {JSON_TYPE, HTML_TYPE}  # of answers that are compressed
DISK_PLACES = MAX_THREADS // 2  # requests that use one root's disk at once
HOT_ENTRY_BYTES = 4096  # what is remembered of a file beside its bytes
CORS_EXPOSED = (
    "Accept-Ranges, Content-Disposition, Content-Range, ETag, Location, Retry-After,"
    " WWW-Authenticate, Tus-Checksum-Algorithm, Tus-Extension, Tus-Max-Size, Tus-Resumable,"
    " Tus-Version, Upload-Complete, Upload-Defer-Length, Upload-Expires, Upload-Length,"
    " Upload-Limit, Upload-Metadata, Upload-Offset"
)
CORS_MAX_AGE = "86400"  # seconds a browser may remember a preflight
RETRY_LATER = {"Retry-After": "60"}  # for what the owner has to mend

SHA256 = re.compile(r"[0-9a-fA-F]{64}")
SEGMENT = r"[^/\0]+"  # a parameter of a path: %2F and %00 are in none

# -- Declarations ------------------------------------------------------------------------


CHANGING_METHODS = frozenset({"PUT", "PATCH", "DELETE"})  # of what is there; POST adds to it


class Field(NamedTuple):
    """A value that a request may carry in its query or its body."""

    name: str
    type: str = "string"  # string, sha256, text (a string or a number), integer, boolean, hashes
    required: bool = False
    or_upload: bool = False  # if it is required, a file in the body stands for it
    default: Any = None
    minimum: int | None = None  # of an integer
    maximum: int | None = None
    shortest: int = 0  # characters of a text
    longest: int | None = None
    choices: tuple[str, ...] = ()
    nullable: bool = True  # null is a value
    blank: str = "kept"  # what an empty text is: "kept", "null", "refused" or "not sent"
    trim: bool = False  # take white space off its ends, as Django does
    help: str = ""


class UploadSpec(NamedTuple):
    """The file of a multipart form, and what of it is checked before it is received whole."""

    folder: str  # of App.folders, where it arrives
    limit: str  # the setting that bounds it
    name: str = "file"
    required: bool = True
    md5: bool = False  # hash it with MD5 too
    check_name: Callable[[Request, str], object] | None = None  # raises HTTPError


class BodySpec(NamedTuple):
    """What a body may be and carry."""

    kinds: tuple[str, ...]  # of BODY_TYPES; "file": the file itself; "tus", "draft": some of it
    fields: tuple[Field, ...] = ()
    upload: UploadSpec | None = None
    wrapper: str = ""  # the member of a JSON object that may hold the fields
    list_field: str = ""  # the field that a JSON list is
    check: Callable[[Request, Mapping[str, Any]], Iterable[FieldError]] | None = None  # the rest
    reader: Callable[..., BodyReader | None] | None = None  # `reader(request, **parameters)`


class Route(NamedTuple):
    """One method on one path, as CONTRACT.md's tables have it."""

    method: str
    path: str
    access: Access
    family: Family
    summary: str
    answers: Mapping[int, str]
    handler: Callable[..., Answer]
    parameters: tuple[Field, ...] = ()  # those of the path that are no plain text
    patterns: Mapping[str, str] = {}  # those of the path that are not any SEGMENT
    query: tuple[Field, ...] = ()
    body: BodySpec | None = None
    # Raises what goes before errors in the fields; what it returns is there, and to be changed
    before: Callable[..., object] | None = None
    prompt: bool = False  # it needs neither disk nor index
    reads: bool = False  # it changes nothing that is kept, whatever its method
    aliases: tuple[str, ...] = ()  # other paths of the same thing
    number: int = 0  # from 1, for figures
    is_target: bool = False  # of resumable uploads for its family
    name: str = ""  # in the documentation, where it is another one than the handler's
    header_fields: tuple[Field, ...] = ()  # those that the handler reads, for the documentation


ROUTES: list[Route] = []
Handler = TypeVar("Handler", bound=Callable[..., Answer])


def summary_of(function: Callable[..., Any]) -> str:
    """Return the first sentence of a docstring, without its full stop."""
    return (function.__doc__ or "").partition(".\n")[0].rstrip(".")


class Family(NamedTuple):
    """Routes that belong together, as the contract has them."""

    name: str  # which tells the shape of their errors
    headers: Mapping[str, str] = {}  # of every answer, errors too

    def route(
        self, method: str, path: str | Sequence[str], access: Access, answers: Mapping[int, str],
        *, summary: str = "", **more: Any,
    ) -> Callable[[Handler], Handler]:  # fmt: skip
        """Declare the decorated function, `handler(app, request, **path parameters)`, as a route.

        Its docstring begins with the summary, where another one is not given.
        """
        # Of several paths the first is the one that the documentation shows.
        path, *others = [path] if isinstance(path, str) else path

        def declare(handler: Handler) -> Handler:
            said = summary or summary_of(handler)
            declared = Route(method, path, access, self, said, answers, handler, **more)
            number = len(ROUTES) + 1
            ROUTES.append(declared._replace(aliases=tuple(others), number=number))
            return handler

        return declare


def deferred(kind: str) -> Callable[[Callable[..., Response]], Callable[..., Deferred]]:
    """Have the decorated handler run in a thread for a kind of work that takes a while."""

    def declare(handler: Callable[..., Response]) -> Callable[..., Deferred]:
        @functools.wraps(handler)
        def defer(*arguments: Any, **parameters: Any) -> Deferred:
            return Deferred(kind, functools.partial(handler, *arguments, **parameters))

        return defer

    return declare


Choice = dict[str, tuple[Route, dict[str, str]]]  # by method, with the path's parameters
# Of a route's path: which segments are parameters, and what matches it
PathKey = tuple[tuple[bool, ...], re.Pattern[str]]


def compile_path(path: str, patterns: Mapping[str, str]) -> re.Pattern[str]:
    r"""Return the pattern of a route's path when it is decoded, without its first slash.

    >>> compile_path("/image/{name}", {"name": r"\w+\.png"}).fullmatch("image/a.png")["name"]
    'a.png'
    """

    def name_group(found: re.Match[str]) -> str:
        return f"(?P<{found[1]}>{patterns.get(found[1], SEGMENT)})"

    return re.compile(re.sub(r"\\{(\w+)\\}", name_group, re.escape(path.strip("/"))))


class RouteTable:
    """Routes by their number of segments and first segment, specific ones first."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._table: dict[tuple[int, str], dict[PathKey, dict[str, Route]]] = {}
        self._literal: dict[str, Choice] = {}
        for item in routes:
            for path in (item.path, *item.aliases):
                segments = path.strip("/").split("/")
                shape = tuple(segment.startswith("{") for segment in segments)
                alike = self._table.setdefault((len(segments), segments[0]), {})
                typed = {field.name: "[^/]+" for field in item.parameters}  # which are parsed
                pattern = compile_path(path, {**typed, **item.patterns})
                methods = alike.setdefault((shape, pattern), {})
                methods.setdefault(item.method, item)
                if not any(shape):
                    choice = self._literal.setdefault(path.removesuffix("/"), {})
                    choice.setdefault(item.method, (item, {}))
        for start, alike in self._table.items():
            self._table[start] = dict(sorted(alike.items(), key=lambda each: each[0][0]))

    def find(self, path: str) -> Choice:
        """Return the routes of a percent-encoded path.

        A segment that is named literally wins over a parameter, the first one that differs
        deciding. A trailing slash is optional. Raises 400 for a path that is not UTF-8.
        """
        path = path.removesuffix("/")
        if literal := self._literal.get(path):  # most are, and cost no search
            return literal
        try:
            text = unquote(path[1:], errors="strict")
        except UnicodeDecodeError:
            raise HTTPError(400, "The path is not UTF-8.") from None
        found: Choice = {}
        first: tuple[bool, ...] = ()  # that matches; only what is as specific counts, too
        start = path.count("/", 1) + 1, text.partition("/")[0]
        for (shape, pattern), methods in self._table.get(start, {}).items():
            if found and shape != first:
                break
            if match := pattern.fullmatch(text):
                first = shape
                for method, item in methods.items():
                    found.setdefault(method, (item, match.groupdict()))
        return found


def format_allow(found: Mapping[str, Any]) -> str:
    """Return the value of Allow for a path's routes (RFC 9110 §10.2.1)."""
    methods = {*found, "OPTIONS"} | ({"HEAD"} if "GET" in found else set())
    return ", ".join(sorted(methods))


def choose_route(found: Choice, method: str) -> tuple[Route, dict[str, str]]:
    """Return the route of a method, of those of a path; 404 or 405."""
    if not found:
        raise HTTPError(404, "There is nothing at this path.")
    if method == "HEAD":
        method = "GET"
    if method not in found:
        raise HTTPError(405, f"{method} is not possible here.", {"Allow": format_allow(found)})
    return found[method]


# -- What handlers work with -------------------------------------------------------------


class Listing:
    """A long JSON answer, kept in an unlinked file as long as the index does not change.

    So it is made once a change, sent by sendfile, and never in this process's memory as a whole.
    Kept are those that are asked for most: who asks for a thousand pages, or by a thousand
    names of the server, has each made for himself.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._made: dict[str, tuple[str | None, Content]] = {}
        self._votes: dict[str, int] = {}  # of those that are kept
        self._vote_lock = threading.Lock()

    def find(self, index: Index, key: str) -> Content | None:
        """Return the list called `key` if it is there and current; the caller closes it."""
        self._vote(key)
        return self._current(index, key)

    def make(
        self, index: Index, key: str, pieces: Callable[[], Iterator[str]], *, zipped: bool
    ) -> Content:
        """Return the list called `key`, made of `pieces` if need be; the caller closes it."""
        with self._lock:
            content = self._current(index, key)
            if content is None:
                # Before it is read: a change meanwhile makes it stale
                version = index.files.library_version()
                content = write_listing(pieces, self._folder, zipped=zipped)
                if key in self._votes:
                    self._made[key] = version, content
                    return reopened(content)
            return content

    def _current(self, index: Index, key: str) -> Content | None:
        version, content = self._made.get(key, ("", None))
        if content is None or version != index.files.library_version():
            return None
        return reopened(content)

    def _vote(self, key: str) -> None:
        """Count how often lists are asked for, where few do for many (Misra and Gries, 1982)."""
        with self._vote_lock:
            if key in self._votes or len(self._votes) < MAX_LISTINGS:
                self._votes[key] = min(self._votes.get(key, 0) + 1, MAX_VOTES)
                return
            self._votes = {other: votes - 1 for other, votes in self._votes.items() if votes > 1}
            for gone in self._made.keys() - self._votes.keys():
                self._made.pop(gone, None)


def reopened(content: Content) -> Content:
    """Return the same Content with a file of its own, which is closed apart from the other."""
    return content._replace(source=io.FileIO(os.dup(content.source.fileno()), "rb"))  # type: ignore[union-attr]


def write_listing(pieces: Callable[[], Iterator[str]], folder: Path, *, zipped: bool) -> Content:
    """Write JSON text to a nameless file, on disk or else in memory; compressed if worth it."""
    import tempfile  # 6 ms, and only where lists are asked for

    try:
        return write_json(tempfile.TemporaryFile(buffering=0, dir=folder), pieces, zipped=zipped)
    except OSError as error:  # the disk is full, or away: what is known of it can still be told
        if not hasattr(os, "memfd_create") or error.errno not in DISK_ERRORS:
            raise
        file = io.FileIO(os.memfd_create("list", os.MFD_CLOEXEC), "r+b")
        return write_json(file, pieces, zipped=zipped)


def write_json(file: io.FileIO, pieces: Callable[[], Iterator[str]], *, zipped: bool) -> Content:
    """Write JSON text to an empty file, which is closed on an error."""
    with undoing(file.close):
        digest, plain_size = hashlib.sha256(), 0
        compressor = zlib.compressobj(GZIP_LEVEL, wbits=31) if zipped else None

        def write(data: bytes) -> None:
            digest.update(data)
            write_all(file, memoryview(data))

        texts = pieces()
        while text := "".join(itertools.islice(texts, LISTING_BATCH)):
            data = text.encode("utf-8", "replace")
            plain_size += len(data)
            write(compressor.compress(data) if compressor else data)
        if compressor and plain_size <= GZIP_BYTES:
            file.seek(0)
            file.truncate()
            content = write_json(file, pieces, zipped=False)
        else:
            write(compressor.flush() if compressor else b"")
            content = Content(
                file, file.tell(), JSON_TYPE, digest.hexdigest(), None, "no-cache",
                encoding="gzip" if compressor else "",
            )  # fmt: skip
    return content


class Catalogue(NamedTuple):
    """What the gallery shows of one choice: its groups in their order, and what each has."""

    groups: dict[str, bytes]  # compressed JSON of the items
    summary: dict[str, Any]


class Catalogues:
    """Keeps the catalogues that were asked for last, made anew when the library has changed.

    Each is made by one thread for all, and while a scan changes the library all the time, no
    more than a part of the time goes into them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Each with the library's version, and until when it is good though that has changed
        self._kept: dict[tuple[Any, ...], tuple[Catalogue, str | None, float]] = {}

    def get(self, index: Index, key: tuple[Any, ...], make: Callable[[], Catalogue]) -> Catalogue:
        """Return the catalogue of a choice, made by `make` if need be."""
        with self._lock:
            now, version = time.monotonic(), index.files.library_version()
            catalogue, known, good_until = self._kept.pop(key, (None, None, 0.0))
            if catalogue is None or (known != version and now > good_until):
                catalogue, known, ended = make(), version, time.monotonic()
                good_until = ended + CATALOGUE_REST * (ended - now)
            while len(self._kept) >= MAX_CATALOGUES:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = catalogue, known, good_until
            return catalogue


class HotFile:
    """A file that was asked for, good as long as its path is the same file in this state.

    The bytes of a small one are in `content`; the usual answers are put together once.
    """

    def __init__(
        self, root: str, name: str, status: os.stat_result, content: Content, *,
        access: Access, route: int,
    ) -> None:  # fmt: skip
        self.path = f"{root}/{name}"
        above = itertools.accumulate(name.split("/")[:-1], "{}/{}".format, initial=root)
        self._folders = [*above][1:]  # below the root, where no link is followed
        self._looked_at = -math.inf  # when they were, monotonic
        self.state = hot_state(status)
        self.content = content
        self.is_small = bool(content.source)
        self.fields = content.headers()
        self.access = access
        self.route = route
        self.prepared: dict[int, Response] = {}  # by status
        self.forgotten = 0  # SharedProgress's count: it may have been hidden by a scan since
        self.seen = 0  # the iteration in which `is_current` was last true

    def is_current(self, status: os.stat_result) -> bool:
        """Return whether what is at its path is the same file, and no link has led to it."""
        if self.state != hot_state(status):
            return False
        now = time.monotonic()
        if now > self._looked_at + FOLDERS_SECONDS:
            if not all(stat.S_ISDIR(os.lstat(folder).st_mode) for folder in self._folders):
                return False
            self._looked_at = now
        return True

    def choose(self, head: RequestHead) -> int:
        """Return the status of an answer that can be put together once; 0: it has to be made."""
        if head.is_plain:
            return 200 if head.method == "GET" and self.is_small else 0
        headers, etag, modified = head.headers, self.content.etag, self.content.last_modified
        if "range" in headers or "origin" in headers or head.version == (1, 0):
            return 0
        if precondition_failed(headers, etag, modified):
            return 0
        return 304 if not_modified(headers, etag, modified) else 0


def hot_state(status: os.stat_result) -> tuple[int, ...]:
    """Return what tells a file, and that nobody has written to it."""
    size, modified, changed = status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return status.st_dev, status.st_ino, size, modified, changed


@functools.lru_cache(maxsize=1024)
def network_of(address: str) -> str:
    """Return what stands for one client: an IPv6 address's /64, which one household has.

    >>> network_of("192.0.2.7"), network_of("2001:db8::7"), network_of("::ffff:192.0.2.7")
    ('192.0.2.7', '2001:db8::/64', '192.0.2.7')
    """
    import ipaddress  # as in parse_networks

    with contextlib.suppress(ValueError):
        parsed = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(parsed, ipaddress.IPv6Address):
            mapped = parsed.ipv4_mapped
            return str(mapped or ipaddress.ip_network((parsed, 64), strict=False))
    return address


def open_folders(settings: Settings, index: Index | None) -> dict[str, Folder]:
    """Return the roots that files lie in, by the names that the index has for them.

    Without an index nothing is known to be there: they are about to be filled.
    """
    places = {
        "library": settings.storage_dir,
        "images": settings.upload_dir,
        "users": settings.users_dir,
        "entities": settings.media_storage_dir,
    }
    excluded = [str(settings.database_dir), *map(str, list(places.values())[1:])]
    signer = Signer(
        settings.aws_access_key_id, settings.aws_secret_access_key, settings.aws_region,
        token=settings.aws_session_token,
    )  # fmt: skip
    store = S3Client(settings.aws_endpoint_url, signer)
    buffers, folders = WriteBuffers(), dict[str, Folder]()
    for name, place in places.items():
        options: Any = {
            "buffers": buffers, "reserve": settings.reserve_bytes, "make": name != "library",
            "is_new": functools.partial(index.files.is_empty, name) if index else lambda: True,
        }  # fmt: skip
        if isinstance(place, S3Place):
            incoming = settings.database_dir / "s3" / name
            folders[name] = Bucket(name, incoming, place, store, **options)
        elif name == "library" and settings.media_dir:
            below = f"{MEDIA_FOLDER}/"
            options["excluded"] = [*excluded, f"{place}/{MEDIA_FOLDER}"]
            if index:
                options["is_new"] = functools.partial(
                    index.files.is_empty, name, below, beside=True
                )
            folders[name] = Bucket(name, place, settings.media_dir, store, below=below, **options)
        else:
            options["excluded"] = excluded if name == "library" else ()
            folders[name] = Folder(name, place, **options)
    return folders


def thumbnail_caches(settings: Settings, library: Folder) -> tuple[ImageCache, ImageCache]:
    """Return where thumbnails lie: public ones beside pictures where that can be, private ones."""
    data = Folder("data", settings.database_dir, make=True, buffers=library.buffers,
                  reserve=settings.reserve_bytes)  # fmt: skip
    beside = os.access(settings.storage_dir, os.W_OK) or not settings.storage_dir.exists()
    public = ImageCache(library, ".thumbnails/") if beside else ImageCache(data, "thumbnails/")
    return public, ImageCache(data, "thumbnails/private/")


CHECKPOINT_BYTES = 16 << 20  # of an upload, after which it is made durable how far it has come
PAUSE_BYTES = 1 << 20  # the same where the client makes a pause, perhaps for ever
MAX_OPEN_UPLOADS = 100  # of one account or address that are not complete
MAX_KNOWN_HASHES = 1000  # of uploads between two requests; others are read again at their end
LOCK_SECONDS = 0.5  # that a request waits for one whose client has just gone away
EXPIRY_SECONDS = 60.0  # between two looks for what has expired
NO_UPLOAD = "There is no such upload, or it has expired."
BUSY_UPLOAD = "Another request is going on with this upload."


class ResumableUploads:
    """Uploads that come in several requests: files in `.incoming/` that the index knows."""

    def __init__(self, index: Index, folders: Mapping[str, Folder], lifetime: int) -> None:
        self.rows = index.uploads
        self._folders = folders
        self._lifetime = lifetime  # seconds behind the last byte
        self._hashes: dict[str, tuple[int, Sequence[Hash]]] = {}  # of so many bytes

    def expiry(self) -> float:
        """Return when what comes now will have expired."""
        return time.time() + self._lifetime

    def get(self, id: str) -> OpenUpload | None:
        """Return an upload that has not expired."""
        return self.rows.get(id, time.time())

    def wait_until_saved(self, upload: OpenUpload) -> OpenUpload:
        """Return an upload once all that has come of it is noted, or after LOCK_SECONDS.

        Who asks has perhaps lost a connection whose last bytes are still being saved.
        """
        end = time.monotonic() + LOCK_SECONDS
        while self._has_more(upload) and time.monotonic() < end:
            time.sleep(LOCK_SECONDS / 50)
            upload = self.get(upload.id) or upload
        return upload

    def _has_more(self, upload: OpenUpload) -> bool:
        """Return whether the file has more than is noted but for a byte that `_save` keeps."""
        with contextlib.suppress(OSError):
            size = self._folders[upload.root].stat(self._name(upload)).st_size
            return size > upload.received + 1
        return False

    def refusal(self, id: str) -> HTTPError:
        """Return why a request cannot go on with an upload: 404 where it is gone, else 409."""
        return HTTPError(409, BUSY_UPLOAD) if self.get(id) else HTTPError(404, NO_UPLOAD)

    def add(self, owner: str, target: str, upload: UploadSpec, head: UploadHead) -> OpenUpload:
        """Make an empty upload for a family; 429 or 507 where there is no room for it."""
        folder, id = self._folders[upload.folder], secrets.token_hex(16)
        folder.need_room(self.rows.missing_bytes(folder.name) + (head.length or 0))
        opened = OpenUpload(
            id, owner, target, folder.name, head.metadata, head.length, 0, "", self.expiry()
        )
        folder.make_file(self._name(opened))
        with undoing(folder.unlink, self._name(opened)):
            if not self.rows.add(opened, MAX_OPEN_UPLOADS):
                detail = f"More than {MAX_OPEN_UPLOADS} uploads are open: complete or delete some."
                raise HTTPError(429, detail, RETRY_LATER)
        return opened

    def _name(self, upload: OpenUpload) -> str:
        return f"{INCOMING}/{upload.id}"

    def acquire(
        self, upload: OpenUpload, limit: Limit, *, md5: bool
    ) -> tuple[OpenUpload, Incoming]:
        """Let one more request, and no other, go on with an upload; 404, 409 or 423."""
        receiving = self._resume(upload, limit)
        with undoing(receiving.close):
            taken = self.rows.acquire(upload.id, secrets.token_hex(8))
            if taken is None or taken.received != upload.received:
                raise self.refusal(upload.id)
            start: Sequence[Hash] = () if taken.received else new_hashes(md5=md5)
            size, hashes = self._hashes.pop(upload.id, (0, start))
            receiving.rewind(taken.received, hashes if size == taken.received else start)
        return taken._replace(length=upload.length), receiving

    def _resume(self, upload: OpenUpload, limit: Limit) -> Incoming:
        """Take the file of an upload; 404 where it is gone, 423 while another request has it."""
        # Another one may just be letting go of it, or handing it over to its family.
        folder, end = self._folders[upload.root], time.monotonic() + LOCK_SECONDS
        while True:
            try:
                return folder.resume(self._name(upload), limit)
            except BlockingIOError:
                refusal = HTTPError(423, BUSY_UPLOAD, RETRY_SOON)
            except FileNotFoundError:
                if not folder.is_there():
                    raise
                refusal = HTTPError(404, NO_UPLOAD)
            now = self.get(upload.id)
            if now is None or now.received != upload.received:
                raise self.refusal(upload.id)
            if time.monotonic() > end:
                raise refusal
            time.sleep(LOCK_SECONDS / 10)

    def release(self, upload: OpenUpload, receiving: Incoming) -> None:
        """Let go of an upload until another request goes on with it."""
        while len(self._hashes) >= MAX_KNOWN_HASHES:
            self._hashes.pop(next(iter(self._hashes)), None)
        if receiving.hashes and receiving.size == upload.received:
            self._hashes[upload.id] = (upload.received, receiving.hashes)

    def refuse(self, upload: OpenUpload, incoming: Incoming, *, passing: bool) -> None:
        """End an upload that its family does not take; keep it if that is `passing`."""
        if not (passing and incoming.put_back()):
            incoming.discard()
            self.rows.remove(upload.id)

    def complete(self, upload: OpenUpload, answer: bytes) -> OpenUpload:
        """Keep the answer for a client that has lost it; return the upload as it is then."""
        done = upload._replace(received=upload.length or 0, answer=answer.decode())
        with contextlib.suppress(sqlite3.Error):  # the file is stored: that is what counts
            self.rows.complete(done)
        return done

    def remove(self, upload: OpenUpload) -> None:
        """Forget an upload, and what has come of one that is not complete."""
        self._hashes.pop(upload.id, None)
        self._folders[upload.root].unlink(self._name(upload))
        self.rows.remove(upload.id)

    def recover(self) -> frozenset[str]:
        """Forget what has expired or was lost in a crash; return the ids of what stays."""
        self.remove_expired()
        kept = []
        for upload in self.rows.unfinished():
            folder = self._folders[upload.root]
            # What has a second name was about to get its place: nobody may add to it.
            if folder.is_there() and folder.count_links(self._name(upload)) != 1:
                self.rows.remove(upload.id)
            else:
                kept.append(upload.id)
        return frozenset(kept)

    def remove_expired(self) -> None:
        """Remove the uploads whose time has come, with their files."""
        for upload in self.rows.expired(time.time()):
            with contextlib.suppress(OSError):  # its disk is away: the next time
                self.remove(upload)


class Transfer:
    """The content of one request on its way into an upload: a BodyReader.

    It holds the upload's file only while content comes. So a client whose connection has died
    unnoticed can go on with another request, after which this one adds nothing more.
    """

    def __init__(
        self, uploads: ResumableUploads, upload: OpenUpload, head: UploadHead, limit: Limit,
        *, md5: bool,
    ) -> None:  # fmt: skip
        self.is_tus = head.is_tus
        self._uploads = uploads
        self._head = head
        self._md5 = md5
        self._digest: Any = None  # of the content, where it has a checksum
        if head.checksum:
            self._digest = hashlib.new(head.checksum[0], usedforsecurity=False)
        self.is_known = head.offset is not None or bool(head.draft)  # to the client, by its URL
        self.upload, self._receiving = uploads.acquire(upload, limit, md5=md5)
        self._is_held = True
        self._saved = self.upload.received

    @property
    def size(self) -> int:
        """Return the size of the file, these bytes among them."""
        return self._receiving.size

    @property
    def is_whole(self) -> bool:
        """Return whether nothing is missing, once this content is here."""
        return self._head.completes or (self.is_tus and self.size == self.upload.length)

    def feed(self, piece: memoryview) -> None:
        """Write the next bytes, and note now and then how many are safe."""
        self._hold()
        self._receiving.feed(piece)
        if self._digest:
            self._digest.update(piece)
        self._save_beyond(CHECKPOINT_BYTES)

    def pause(self) -> None:
        """Save what has come, and let other requests have the file."""
        self._receiving.pause()
        self._save_beyond(PAUSE_BYTES)
        self._is_held = False
        fcntl.flock(self._receiving.file, fcntl.LOCK_UN)

    def _hold(self) -> None:
        """Take the file again after a pause; 409 if another request has, 404 if it has ended."""
        if self._is_held:
            return
        try:
            fcntl.flock(self._receiving.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HTTPError(409, BUSY_UPLOAD) from None
        if not self._uploads.rows.is_writer(self.upload.id, self.upload.writer):
            raise self._uploads.refusal(self.upload.id)
        self._is_held = True

    def _save_beyond(self, count: int) -> None:
        """Save once so many bytes have come; but what has a checksum is saved whole or not."""
        if self._digest is None and self.size - self._saved >= count:
            self._save()

    def _save(self) -> None:
        """Make what has come durable, and note how far that is."""
        self._saved = received = self._receiving.sync()
        if self.is_tus and received == self.upload.length:
            received -= received > 0  # clients of tus take an offset at the end for a stored file
        expiry = self._uploads.expiry()
        self.upload = self.upload._replace(received=received, expires_at=expiry)
        if not self._uploads.rows.advance(self.upload):
            raise self._uploads.refusal(self.upload.id)

    def finish(self) -> Mapping[str, Any]:
        """Save all; 460 where it is not what its checksum says, 400 where some is missing."""
        if self._digest and self._head.checksum != (self._digest.name, self._digest.digest()):
            raise HTTPError(460, "The content has another checksum.")
        self._hold()
        self._digest = None
        self._save()
        if not self.is_whole:
            self.close()
        elif self.upload.length not in {None, self.size}:
            raise HTTPError(400, f"The upload ends before its {self.upload.length} bytes.")
        else:
            self.upload = self.upload._replace(length=self.size)
        return {}

    def whole(self) -> Incoming:
        """Return the file, which is complete."""
        if not self._receiving.hashes:
            self._receiving.hash_again(new_hashes(md5=self._md5))
        return self._receiving.finish()

    def close(self) -> None:
        """Let go of the upload, which another request may go on with."""
        if not self._receiving.file.closed:
            self._uploads.release(self.upload, self._receiving)
            self._receiving.close()

    def discard(self) -> None:
        """Keep what has come, unless nobody can know of it."""
        if self._receiving.file.closed:
            return
        try:
            with contextlib.suppress(HTTPError):
                self._hold()
                self._save_beyond(1)
        finally:
            self.close()
        if not self.is_known:
            self._uploads.remove(self.upload)


DURATIONS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)  # seconds
DURATIONS_AT = 600  # in a route's numbers, behind its answers by status
ROUTE_NUMBERS = DURATIONS_AT + len(DURATIONS) + 1  # the last: beyond all of these


class Meter:
    """Counts answers in memory that all workers share; each writes to a part of its own.

    A route's numbers are the nanoseconds of its answers, how many had each status, and how many
    took how long: the first of DURATIONS that they are not above.
    """

    def __init__(self, workers: int, routes: int) -> None:
        self.worker = 0  # whose part this process writes to
        self._part = 3 + routes * ROUTE_NUMBERS
        self._numbers = shared_numbers("Q", self._part * workers)
        self._lock = threading.Lock()

    def count(self, head: RequestHead | None, response: Response, seconds: float) -> None:
        """Count an answer, how long it took, and the bytes of bodies that it took in and sent."""
        numbers, own = self._numbers, self.worker * self._part
        first = own + 3 + response.route * ROUTE_NUMBERS
        duration = bisect.bisect_left(DURATIONS, seconds) if seconds > DURATIONS[0] else 0
        with self._lock:
            numbers[first] += int(seconds * 1e9)
            numbers[first + response.status] += 1
            numbers[first + DURATIONS_AT + duration] += 1
            if head is not None and head.method != "HEAD":
                numbers[own + 1] += response.length
                if head.has_body and response.status < 300:
                    numbers[own] += head.content_length or 0

    def set_in_flight(self, count: int) -> None:
        """Note how many requests this worker works on."""
        self._numbers[self.worker * self._part + 2] = count

    def totals(self) -> list[int]:
        """Return the bytes taken in and sent, and requests in flight, of all workers."""
        return self._sum(0, 3)

    def answers(self, route: int) -> dict[int, int]:
        """Count a route's answers by their status."""
        numbers = self._sum(3 + route * ROUTE_NUMBERS, ROUTE_NUMBERS)
        return {status: numbers[status] for status in range(1, DURATIONS_AT) if numbers[status]}

    def durations(self, route: int) -> tuple[list[int], float]:
        """Count a route's answers that took at most each of DURATIONS, and all; their seconds."""
        numbers = self._sum(3 + route * ROUTE_NUMBERS, ROUTE_NUMBERS)
        return list(itertools.accumulate(numbers[DURATIONS_AT:])), numbers[0] / 1e9

    def _sum(self, place: int, count: int) -> list[int]:
        """Return so many numbers from a place in each worker's part on, added up."""
        starts = range(place, len(self._numbers), self._part)
        return [*map(sum, zip(*(self._numbers[at : at + count] for at in starts), strict=True))]


class App:
    """What handlers need, built in one place."""

    def __init__(
        self, settings: Settings, index: Index, thumbnails: Thumbnails, progress: SharedProgress,
        *, meter: Meter | None = None,
    ) -> None:  # fmt: skip
        self.settings = settings
        self.meter = meter or Meter(1, len(ROUTES) + 1)
        self.log: Callable[[RequestHead | None, str, Response, float], None] | None = None
        self.index = index
        self.thumbnails = thumbnails
        self.folders = open_folders(settings, index)
        self.library, *owned = self.folders.values()
        self.images, self.users, self.entities = owned
        public, private = thumbnail_caches(settings, self.library)
        self.data = private.folder
        limit, used = settings.preview_cache_bytes, thumbnails.preview_bytes
        previews = PreviewCache(private.folder, PREVIEWS_PREFIX, limit, used)
        thumbnails.set_caches(public, private, previews)
        self.renditions = Renditions(index, list(self.folders.values()), thumbnails)
        scanned = [self.library, self.images]
        self.scanner = Scanner(index, scanned, self.renditions, progress, quiet=settings.quiet)
        self.watcher = Watcher(self.library, owned, self.scanner)
        self._disk_places = {name: filled_queue(DISK_PLACES) for name in self.folders}
        self.auth = AuthConfig(settings, read_public_key(settings))
        self.file_key = derive_key(settings.jwt_signing_key, "file URLs")
        self.share_key = derive_key(settings.jwt_signing_key, "share cookies")
        lifetime = settings.upload_expiry_seconds
        self.uploads = ResumableUploads(index, self.folders, lifetime)
        self.hot: dict[str, HotFile] = {}  # by request target
        self.hot_bytes = 0
        self.listing = Listing(settings.database_dir)
        self.catalogues = Catalogues()
        self.entity_texts: dict[tuple[int, int], str] = {}  # by id and transaction
        self.started = time.monotonic()

    def problems(self, folder: FolderStatus) -> list[str]:
        """Return what is not as it should be, in sentences without paths."""
        unreadable = self.scanner.progress.get().unreadable
        restarts = self.thumbnails.restarts[0]
        return [
            sentence.format(count)
            for count, sentence in (
                (folder.hangs, "The storage folder does not answer."),
                (folder.missing, "The storage folder is not there, or there is nothing in it."),
                (len(folder.absent), "Disks below the storage folder that are not mounted: {}."),
                (", ".join(folder.lost), "Folders of the server that are not there: {}."),
                (unreadable, "Files or folders that could not be read: {}; the log says more."),
                (restarts, "Times that the decoder host had to be started again: {}."),
            )
            if count
        ]

    @contextlib.contextmanager
    def disk(self, root: str) -> Iterator[None]:
        """Take a place among those who use a root's disk; 503 where it does not answer."""
        # One that hangs keeps no more threads than these.
        places = self._disk_places[root]
        try:
            place = places.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            raise HTTPError(503, "The disk does not answer.", RETRY_LATER) from None
        try:
            yield
        finally:
            places.put(place)

    def remember(self, target: str, hot: HotFile) -> None:
        """Keep a public file at hand; when there are too many, all make room."""
        hot.forgotten = self.scanner.progress.forgotten[0]
        old = self.hot.get(target)
        if old and (old.state, old.forgotten) == (hot.state, hot.forgotten):
            return
        size = HOT_ENTRY_BYTES + len(target) + (hot.content.size if hot.is_small else 0)
        self.hot_bytes += size
        if self.hot_bytes > HOT_BYTES:
            self.hot.clear()
            self.hot_bytes = size
        self.hot[target] = hot


def filled_queue(count: int) -> queue.SimpleQueue[int]:
    """Return `count` places to get and to put back, at a tenth of what a semaphore takes."""
    places: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(count):
        places.put(number)
    return places


def read_public_key(settings: Settings) -> PublicKey | None:
    """Return the key of ES256 tokens; None where there is no file at the default place."""
    path = settings.public_key_path or settings.database_dir / "public_key.pem"
    try:
        return parse_public_key(regular_file(path).read_bytes())
    except (OSError, ValueError) as error:
        if settings.public_key_path is None and isinstance(error, FileNotFoundError):
            return None
        problem = f"{path} is no usable P-256 public key: {error}"
        raise SettingError("PUBLIC_KEY_PATH", problem) from None


class Request:
    """A request on its way to its handler; all of it has been checked when it gets there."""

    def __init__(self, app: App, head: RequestHead, peer: str) -> None:
        self.app = app
        self.head = head
        self.is_read = head.method in {"GET", "HEAD"}  # as sent, whatever a field says
        self.headers = head.headers
        self.peer = peer
        self.family = ""  # whose shape errors have
        self.principal = ANONYMOUS
        self.route = 0  # its number, from 1
        self.pairs: list[tuple[str, str]] = []  # of the query
        self.query: dict[str, Any] = {}  # declared fields of the query, by name
        self.fields: dict[str, Any] = {}  # and of the body; those not sent are left out
        self.room = MAX_BYTES  # what the caller may store yet
        self.body: BodyReader | None = None  # until it has been read, or forgotten
        self.upload: Incoming | None = None
        self.has_upload = False  # or it is still to come, for an upload that can be resumed
        self.counted: Grant | None = None  # the scoped token of which a use was taken
        self.transfer: Transfer | None = None  # for an upload that can be resumed
        self.interim: Mapping[str, str] = {}  # fields of a 104
        self.answer_headers: Mapping[str, str] = {}  # whatever the answer is

    def may(self, access: Access) -> bool:
        """Return whether its principal has this access."""
        return allows(access, self.principal, self.app.settings.read_auth_enabled)

    def need(self, access: Access) -> None:
        """Refuse it where its principal has not this access: 401 or 403."""
        if not allows(access, self.principal, self.app.settings.read_auth_enabled):
            raise refusal(access, self.principal)

    @property
    def behind_proxy(self) -> bool:
        """Return whether the client speaks through a proxy that is trusted."""
        return is_trusted(self.peer, self.app.settings.trusted_proxies)

    @property
    def is_for_browser(self) -> bool:
        """Return whether a page is asked for rather than JSON, as browsers do."""
        return prefers(self.headers, "text/html", JSON_TYPE)

    @property
    def client(self) -> str:
        """Return the client's address, as a trusted proxy tells it or else its own."""
        return client_address(self.headers, self.peer, self.app.settings.trusted_proxies)

    def url(self, path: str) -> str:
        """Return the absolute URL of a path here, as the client reaches it."""
        if self.app.settings.public_url:
            return self.reference(path)
        scheme, host = "http", self.head.host
        if self.behind_proxy:
            scheme = forwarded(self.headers, "x-forwarded-proto", r"https?") or scheme
            host = forwarded(self.headers, "x-forwarded-host", r"[\w.:\[\]-]+") or host
        return f"{scheme}://{host or 'localhost'}{path}"

    def reference(self, path: str) -> str:
        """Return where a path here is for `Location` and pages: below PUBLIC_URL, if it is set."""
        return self.app.settings.public_url + path


def client_address(headers: Headers, peer: str, trusted: tuple[str, ...]) -> str:
    """Return the client's address: the last in X-Forwarded-For that is no trusted proxy."""
    chain = headers.get("x-forwarded-for", "").split(",")
    address = peer
    while chain and is_trusted(address, trusted):  # a proxy that names no client is it
        address = parse_address(chain.pop()) or address
    return address


def parse_address(text: str) -> str:
    """Return an element of X-Forwarded-For without the port that some proxies add.

    >>> parse_address(" 5.5.5.5:1000"), parse_address("[2001:db8::1]:80"), parse_address("::1")
    ('5.5.5.5', '2001:db8::1', '::1')
    """
    match = re.fullmatch(r"\[([^\]]*)\](?::\d+)?|([\d.]+):\d+", text.strip())
    return (match[1] or match[2]) if match else text.strip()


def forwarded(headers: Headers, name: str, pattern: str) -> str:
    """Return the value that the nearest proxy has set, if it is a sane one."""
    value = headers.get(name, "").rpartition(",")[2].strip()
    return value if value and re.fullmatch(pattern, value, re.ASCII) else ""


@functools.lru_cache(maxsize=1024)
def is_trusted(address: str, networks: tuple[str, ...]) -> bool:
    """Return whether a peer's address is one of the trusted proxies'."""
    if address in networks:
        return True
    import ipaddress  # as in parse_networks

    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None) or parsed
    return any(mapped in ipaddress.ip_network(name, strict=False) for name in networks)


# -- Reading fields ----------------------------------------------------------------------


MAX_SHOWN_CHARACTERS = 500  # of a value that is refused


class BadValue(Exception):
    """A value is not what its field takes; its arguments are a FieldError's from `message` on."""


def parse_value(item: Field, value: Any, where: str) -> Any:
    """Return a field's value from text (path, query, form) or JSON; raises ValidationError."""
    if isinstance(value, str) and item.trim:
        value = value.strip()
    if value == "" and item.blank == "null":
        value = None
    if value is None and item.nullable:
        return None
    try:
        if item.choices and value not in item.choices and value is not None:
            shown = str(value)[:MAX_SHOWN_CHARACTERS]
            raise BadValue(f'"{shown}" is not a valid choice', "choice")
        if item.type == "boolean":
            return parse_flag(value)
        if item.type == "integer":
            return check_bounds(item, parse_integer(value), where)
        if item.type == "hashes":
            return parse_hashes(value)
        return parse_text(item, value)
    except BadValue as error:
        problem = FieldError(where, item.name, *error.args)
        raise ValidationError(problem._replace(is_null=value is None)) from None


def parse_hashes(value: Any) -> list[str]:
    """Parse a list of hashes; they come out in lower case, each once, in their order."""
    if not isinstance(value, list) or len(value) > MAX_HASHES:
        raise BadValue(f"must be a list of at most {MAX_HASHES} hashes", "list_type")
    for each in value:
        if not isinstance(each, str) or not SHA256.fullmatch(each):
            raise BadValue("has an item that is no SHA-256: 64 hexadecimal digits", "sha256")
    return list(dict.fromkeys(each.lower() for each in value))


def parse_text(item: Field, value: Any) -> str:
    """Return the text of a field; BadValue for what is none, is blank, or too long or too short.

    Where it may be one, a number counts as its digits, as in Django: people send phone numbers so.
    """
    if item.type == "text" and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = value if abs(value) == math.inf else str(value)  # JSON's 1e999
    if not isinstance(value, str):
        raise BadValue("must be a string", "string_type")
    if refused := re.search("[\0\ud800-\udfff]", value):
        name = "Null" if refused[0] == "\0" else "Surrogate"
        raise BadValue(f"{name} characters are not allowed.", "string_unicode")
    shortest, longest = item.shortest, item.longest
    if not value and item.blank == "refused":
        raise BadValue("may not be blank", "blank")
    if longest is not None and len(value) > longest:
        raise BadValue(f"must have at most {longest} characters", "string_too_long", longest)
    if len(value) < shortest:
        raise BadValue(f"must have at least {shortest} characters", "string_too_short", shortest)
    return value


def parse_integer(value: Any) -> int:
    """Return the integer that a value of JSON or of a form is; BadValue for another one."""
    problem = "int_type"
    if isinstance(value, str):
        problem = "int_parsing"
        if match := re.fullmatch(r"\s*([+-]?[0-9]{1,999})(?:\.0*)?\s*", value, re.ASCII):
            return int(match[1])
    elif isinstance(value, float):
        problem = "int_from_float"
        if value.is_integer():
            return int(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        return value
    raise BadValue("must be a whole number", problem)


def check_bounds(item: Field, number: int, where: str) -> int:
    """Return a number within its field's bounds; BadValue for one outside."""
    low, high = item.minimum, item.maximum
    if abs(number) > MAX_BYTES and where != "query":  # there it is past any page or version
        raise BadValue("is too large", "int_parsing_size")
    if low is not None and number < low:
        raise BadValue(f"must be at least {low}", "greater_than_equal", low)
    if high is not None and number > high:
        raise BadValue(f"must be at most {high}", "less_than_equal", high)
    return number


FLAGS = dict.fromkeys(("true", "t", "1", "on", "yes", "y"), True)
FLAGS |= dict.fromkeys(("false", "f", "0", "off", "no", "n"), False)


def parse_flag(value: Any) -> bool:
    """Parse a boolean as pydantic does: no white space, but 1.0 for 1."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int)):
        raise BadValue("must be true or false", "bool_type")
    parsed = value if isinstance(value, bool) else FLAGS.get(str(value).lower())
    if parsed is None:
        raise BadValue("must be true or false", "bool_parsing")
    return parsed


def collect_declared(
    declared: Sequence[Field], values: Mapping[str, Any], where: str, problems: list[FieldError],
    *, has_upload: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Return the declared fields in `values` that are right; add the others to `problems`.

    What is not sent has its default if there is one.
    """
    parsed: dict[str, Any] = {}
    for item in declared:
        try:
            if item.name in values and (item.blank != "not sent" or values[item.name] != ""):
                parsed[item.name] = parse_value(item, values[item.name], where)
            elif item.required and not (item.or_upload and has_upload):
                problems.append(FieldError(where, item.name, "is required", "missing"))
            elif item.default is not None:
                parsed[item.name] = item.default
        except ValidationError as error:
            problems += error.problems
    return parsed


def parse_declared(request: Request, item: Route, parameters: Mapping[str, str]) -> dict[str, Any]:
    """Parse what a route reads of the query, and of the path: return the path's parameters."""
    problems: list[FieldError] = []
    parsed = collect_declared(item.parameters, parameters, "path", problems)
    request.query = collect_declared(item.query, dict(request.pairs), "query", problems)
    if problems:
        raise ValidationError(*problems)
    return {**parameters, **parsed}


BODY_TYPES = {
    "json": JSON_TYPE,
    "form": "application/x-www-form-urlencoded",
    "multipart": "multipart/form-data",
}
# What clients say of a body that is a file: nothing (`curl -T`), or a type, which is not believed
FILE_TYPES = re.compile(r"|(application|binary)/octet-stream|(image|video|audio)/.*")
UNCODED = {"", "identity", "utf-8"}  # Content-Encoding of a body that is sent as it is
JSON_WORDS = {type(None): "null", bool: "a boolean", str: "a string", list: "a list"}


class BodyReader(Protocol):
    """Takes in the content of a body, piece by piece, whatever the pieces."""

    def feed(self, piece: memoryview) -> None:
        """Take in what comes next; raises HTTPError or TooLarge if it is refused."""

    def pause(self) -> None:
        """Let go of what is not needed while no more comes."""
        return None  # of a text, all of it is

    def finish(self) -> Mapping[str, Any]:
        """Return the values of the fields in a body that is complete; 400 if it is malformed."""

    def discard(self) -> None:
        """Forget what has come, beside the request's upload."""
        return None


def open_body(
    request: Request, spec: BodySpec, parameters: Mapping[str, Any]
) -> BodyReader | None:
    """Return what reads the body that a head declares, if any; 400, 411, 413 or 415."""
    head, headers = request.head, request.headers
    unsized = head.content_length is None and not head.chunked
    if unsized and not spec.reader and (spec.upload or "content-type" in headers):
        framing = "with Content-Length or Transfer-Encoding: chunked"
        raise HTTPError(411, f"Send {body_in_words(spec)}, {framing}.")
    if headers.get("content-encoding", "").lower() not in UNCODED:
        wanted = {"Accept-Encoding": "identity"}
        raise HTTPError(415, "Send the body without Content-Encoding.", wanted)
    if "content-range" in headers:  # a part must not be taken for the whole (RFC 9110 §14.5)
        raise HTTPError(400, "Send the whole body at once; POST /files takes files in parts.")
    if spec.upload or spec.reader:
        request.app.renditions.note_upload()
    if spec.reader is not None:  # an empty body says something, too
        return spec.reader(request, **parameters)
    media_type, options = parse_content_type(headers.get("content-type", ""))
    is_json = media_type == "application/json" or media_type.endswith("+json")
    if not head.has_body:  # whatever its type would have been
        return None
    if media_type == "multipart/form-data" and "multipart" in spec.kinds:
        return FormBody(request, spec, options.get("boundary", ""))
    if media_type == "application/x-www-form-urlencoded" and "form" in spec.kinds:
        return TextBody(
            head, lambda text: dict(parse_query(text.decode(errors="surrogateescape")))
        )
    if is_json and "json" in spec.kinds:
        return TextBody(head, lambda text: parse_json(text, spec))
    if spec.upload and "file" in spec.kinds and FILE_TYPES.fullmatch(media_type):
        return FileBody(request, spec.upload)
    what = media_type or "a body without Content-Type"
    raise HTTPError(415, f"This endpoint does not read {what}. Send {body_in_words(spec)}.")


def body_in_words(spec: BodySpec) -> str:
    """Return what an endpoint reads, in words.

    >>> body_in_words(BodySpec(("multipart", "file"), upload=UploadSpec("library", "")))
    'multipart/form-data with the file in its field "file" or the file itself as the body'
    """
    kinds = [BODY_TYPES.get(kind, "the file itself as the body") for kind in spec.kinds]
    if spec.upload:
        kinds[spec.kinds.index("multipart")] += f' with the file in its field "{spec.upload.name}"'
    return " or ".join(kinds)


class TextBody(BodyReader):
    """A body that is parsed when all of it is here."""

    def __init__(self, head: RequestHead, parse: Callable[[bytes], Mapping[str, Any]]) -> None:
        self._parse = parse
        self._content = bytearray()
        self._check(head.content_length or 0)

    def _check(self, length: int) -> None:
        if length > MAX_TEXT_BYTES:
            raise HTTPError(413, f"The body is larger than {format_size(MAX_TEXT_BYTES)}.")

    def feed(self, piece: memoryview) -> None:
        self._content += piece
        self._check(len(self._content))

    def finish(self) -> Mapping[str, Any]:
        return self._parse(bytes(self._content))


def parse_form(request: Request, spec: BodySpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a form; raises ValidationError with all that is wrong with it."""
    problems: list[FieldError] = []
    has_upload = request.has_upload or request.upload is not None
    if spec.upload and not has_upload:
        name = spec.upload.name
        if values.get(name):
            problems.append(FieldError("body", name, "must be a file, not a text", "file"))
        elif spec.upload.required:
            message = f"is required: send {body_in_words(spec)}"
            problems.append(FieldError("body", name, message, "missing"))
    where, wrapper = "body", spec.wrapper
    if wrapper and wrapper in values:
        values, where = values[wrapper], f"body/{wrapper}"
        if not isinstance(values, dict):
            message = "must be an object"
            raise ValidationError(FieldError("body", wrapper, message, "model_attributes_type"))
    fields = collect_declared(spec.fields, values, where, problems, has_upload=has_upload)
    if spec.check:
        known = {problem.field for problem in problems}
        problems += [each for each in spec.check(request, fields) if each.field not in known]
    if problems:
        raise ValidationError(*problems)
    return fields


def parse_json(text: bytes, spec: BodySpec) -> dict[str, Any]:
    """Return the members of a JSON object (RFC 8259), or the one field that a list is; 400."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        # A surrogate, which is no text, is let through for the families to refuse
        value = json.loads(text.decode("utf-8-sig", "surrogatepass"), parse_constant=refuse)
    except (ValueError, RecursionError):
        raise HTTPError(400, "The body is no valid JSON.") from None
    if isinstance(value, list) and spec.list_field:
        return {spec.list_field: value}
    if not isinstance(value, dict):
        if spec.list_field:
            raise HTTPError(400, f"Send a JSON list, or an object with it as {spec.list_field}.")
        message = f"The body must be a JSON object, not {JSON_WORDS.get(type(value), 'a number')}."
        given = type(value).__name__
        raise ValidationError(FieldError("body", "", message, "dict_type", given=given))
    return value


class FormBody(BodyReader):
    """A multipart form: its declared text fields are kept, its file goes to its folder.

    The file is in `request.upload` from its part's beginning.
    """

    def __init__(self, request: Request, spec: BodySpec, boundary: str) -> None:
        self._request = request
        self._upload = spec.upload
        self._declared = {item.name for item in spec.fields}
        self._limit = upload_limit(request, spec.upload)
        if (request.head.content_length or 0) > self._limit.size + FORM_SLACK_BYTES:
            raise HTTPError(413, self._limit.sentence)
        self._parser = MultipartParser(boundary.encode("latin-1", "replace"))
        self._receiving: Incoming | None = None  # where the part's content goes if it is the file
        self._text = bytearray()  # its content if it is not
        self._text_bytes = 0  # of all parts
        self._texts: dict[str, bytearray] = {}  # by name, the last of each

    def feed(self, piece: memoryview) -> None:
        for event in self._parser.feed(piece):
            if isinstance(event, Part):
                self._begin(event)
            elif self._receiving is not None:
                self._receiving.feed(event)
            else:
                self._add_text(event)

    def _begin(self, part: Part) -> None:
        request, upload, self._receiving = self._request, self._upload, None
        is_upload = upload is not None and part.name == upload.name
        if upload and is_upload and part.filename:
            self._receiving = begin_upload(request, upload, part.filename, self._limit)
            self._receiving.filename = part.filename
            request.upload = self._receiving
            return
        if part.filename and part.name in self._declared:
            raise ValidationError(FieldError("body", part.name, "must be a text", "string_type"))
        self._text = bytearray()
        if is_upload or (part.filename is None and part.name in self._declared):
            self._texts[part.name] = self._text

    def _add_text(self, data: memoryview) -> None:
        self._text_bytes += len(data)
        if self._text_bytes > MAX_TEXT_BYTES:
            detail = f"The text fields are larger than {format_size(MAX_TEXT_BYTES)} together."
            raise HTTPError(413, detail)
        self._text += data

    def pause(self) -> None:
        if self._request.upload is not None:
            self._request.upload.pause()

    def finish(self) -> Mapping[str, Any]:
        self._parser.finish()
        if self._request.upload is not None:
            self._request.upload.finish()
        return {name: decode_field(name, text) for name, text in self._texts.items()}


class FileBody(BodyReader):
    """A body that is the file itself, as `curl -T` sends it.

    Its name is the last of the URL's path, with the extension of its content.
    """

    def __init__(self, request: Request, upload: UploadSpec) -> None:
        limit = upload_limit(request, upload)
        if (request.head.content_length or 0) > limit.size:
            raise HTTPError(413, limit.sentence)
        self._path = request.head.path
        self._receiving = request.upload = begin_upload(request, upload, "", limit)

    def feed(self, piece: memoryview) -> None:
        self._receiving.feed(piece)

    def pause(self) -> None:
        self._receiving.pause()

    def finish(self) -> Mapping[str, Any]:
        facts = self._receiving.finish().facts
        extension = facts.extension if facts else "bin"
        self._receiving.filename = f"{last_segment(self._path)}.{extension}"
        return {}


def last_segment(path: str) -> str:
    """Return the name at the end of a URL's path.

    >>> last_segment("/image/a%20b.png/")
    'a b.png'
    """
    return unquote(path.rstrip("/").rpartition("/")[2])


def upload_limit(request: Request, upload: UploadSpec | None) -> Limit:
    """Return what a body's file may have: by its setting, its token and the room there is."""
    settings, grant = request.app.settings, request.principal.grant
    size: int = getattr(settings, upload.limit) if upload else 0
    limits = [setting_limit(upload.limit if upload else "", size)]
    if grant and grant.max_bytes:
        lets = f"the {format_size(grant.max_bytes)} that its token lets upload"
        limits.append(Limit(grant.max_bytes, f"The file is larger than {lets}."))
    if request.room < size:
        limits.append(Limit(request.room, quota_sentence(settings, request.room)))
    return min(limits)


@functools.cache
def setting_limit(name: str, size: int) -> Limit:
    """Return the limit of a setting, with its name in the sentence."""
    return Limit(size, f"The file is larger than {format_size(size)} ({name.upper()}).")


def quota_sentence(settings: Settings, room: int) -> str:
    """Return what an answer says where an account's quota leaves too little room."""
    quota = f"Your account may store {settings.user_quota_bytes} bytes (USER_QUOTA_BYTES)"
    return f"{quota}; {room} of them are left."


def format_size(size: float) -> str:
    """Return bytes in words for a person.

    >>> format_size(10485760), format_size(1000), format_size(5 << 40)
    ('10 MB', '1000 bytes', '5 TB')
    """
    power = min(int(math.log2(max(size, 1)) / 10), 4) if size >= 1 << 20 else 0
    return f"{size / (1 << 10 * power):.4g} {' kMGT'[power]}B" if power else f"{size:.0f} bytes"


def decode_field(name: str, text: bytes | bytearray) -> str:
    """Return a field's text; ValidationError if it is not UTF-8."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise ValidationError(FieldError("body", name, "is not UTF-8", "string_unicode")) from None


def begin_upload(request: Request, upload: UploadSpec, filename: str, limit: Limit) -> Incoming:
    """Open a file for what comes; an error if the file's name alone refuses it."""
    if request.upload is not None:
        raise HTTPError(400, "Send one file a request.")
    check_upload(request, upload, filename or None)
    folder = request.app.folders[upload.folder]
    with request.app.disk(upload.folder):
        return folder.begin(limit, upload.md5, request.head.content_length or 0)


def check_upload(request: Request, upload: UploadSpec, filename: str | None) -> None:
    """Refuse a file whose name, if it has one, or place refuses it."""
    if filename is not None:
        parse_value(Field(upload.name), filename, "body")
        if upload.check_name:
            upload.check_name(request, filename)
    if not request.app.folders[upload.folder].make:
        need_mounts(request.app)


def need_mounts(app: App) -> None:
    """Refuse to change what lies on disks below the storage folder while one of them is gone."""
    absent = app.scanner.mounts.absent(app.library)
    if [path for path in absent if f"{path}/".startswith(("media/", "uploads/"))]:
        raise HTTPError(503, "The storage folder is not mounted.", RETRY_LATER)


# -- Answers -----------------------------------------------------------------------------


to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
NO_STORE = {"Cache-Control": "no-store"}
SVG_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an answer in JSON."""
    return text_response(to_json(value), status, headers)


def text_response(
    text: str, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Answer with the text of a JSON value."""
    fields = {"Content-Type": JSON_TYPE, **(headers or {})}
    return Response(status, fields, text.encode("utf-8", "replace"))


def format_cookie(url: str, pair: str, seconds: int, same_site: str) -> str:
    """Return Set-Cookie's value for a URL and those below (RFC 6265, section 4.1)."""
    base = urlsplit(url)
    secure = "; Secure" if base.scheme == "https" else ""
    rules = f"Path={base.path}; Max-Age={seconds}; HttpOnly; SameSite={same_site}{secure}"
    return f"{pair}; {rules}"


def format_time(seconds: float, timespec: str = "microseconds") -> str:
    """Write ISO 8601 in UTC as Django REST Framework does; pydantic does with the timespec "auto".

    >>> format_time(1.5), format_time(0), format_time(0, "auto")
    ('1970-01-01T00:00:01.500000Z', '1970-01-01T00:00:00.000000Z', '1970-01-01T00:00:00Z')
    """
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat(timespec=timespec).replace("+00:00", "Z")


def listing_response(
    app: App, request: Request, name: str, pieces: Callable[[], Iterator[str]]
) -> Answer:
    """Answer with a long list, `pieces` of JSON text that are asked for only if it has changed."""
    zipped = accepts_gzip(request.headers)
    key = f"{name} {zipped}"
    content = app.listing.find(app.index, key)
    if content is not None:
        return long_response(request, content)
    make = functools.partial(app.listing.make, app.index, key, pieces, zipped=zipped)
    return Deferred("list", lambda: long_response(request, make()))


def long_response(request: Request, content: Content) -> Response:
    """Answer with what lies in a file, which is closed with the answer."""
    with undoing(close_source, content):
        return content_response(request.head, content)


def printable(path: str) -> str:
    """Return a path as JSON can carry it: bytes that are no UTF-8 are shown as U+FFFD."""
    return os.fsencode(path).decode("utf-8", "replace")


class Content(NamedTuple):
    """What a file answer needs to know; `source` is the bytes, or the open file."""

    source: bytes | io.FileIO | ObjectReader
    size: int
    mime_type: str
    sha256: str  # empty where it is another one every second
    last_modified: float | None
    cache_control: str
    filename: str = ""  # under which a browser saves it
    internal: str = ""  # where the proxy finds the file itself
    encoding: str = ""  # what its bytes are in, where that is a choice
    vary: str = ""  # the request's field that it depends on
    patches: Sequence[Patch] = ()  # of the file as it is sent

    @property
    def etag(self) -> str:
        """Return the strong entity tag, the quoted hash (RFC 9110 §8.8.3); "" if there is none."""
        return self.sha256 and f'"{self.sha256}"'

    def headers(self) -> dict[str, str]:
        """Return the header fields of an answer with the content."""
        headers = {"Content-Type": self.mime_type, "Cache-Control": self.cache_control}
        if self.sha256:
            headers |= {"ETag": self.etag, "Accept-Ranges": "bytes"}
        if self.last_modified is not None:
            modified = min(self.last_modified, time.time())  # never after Date (§8.8.2.1)
            headers["Last-Modified"] = format_date(modified)
        if self.vary or self.mime_type == JSON_TYPE:
            headers["Vary"] = self.vary or "Accept-Encoding"
        if self.mime_type == "image/svg+xml":
            headers["Content-Security-Policy"] = SVG_POLICY
        elif self.filename and self.mime_type.partition("/")[0] not in {"image", "video", "audio"}:
            name = printable(self.filename)
            headers["Content-Disposition"] = content_disposition_attachment(name)
        if self.encoding:
            headers["Content-Encoding"] = self.encoding
        return headers

    def cut(self, first: int, last: int, before: bytes = b"") -> Iterator[Segment]:
        """Yield `before` and the bytes from `first` to `last`, both included."""
        if isinstance(self.source, bytes):
            yield before + self.source[first : last + 1]
            return
        if self.patches and before:
            yield before
            before = b""
        at, end = first, last + 1
        number = bisect.bisect(self.patches, first, key=lambda patch: patch.end)
        for patch in itertools.takewhile(lambda patch: patch.start < end, self.patches[number:]):
            if at < patch.start:
                yield FileSlice(self.source, at, patch.start - at)
            start, at = max(at, patch.start), min(patch.end, end)
            yield from patch.cut(start, at)
        if at < end:
            yield FileSlice(self.source, at, end - at, before)


def content_response(
    head: RequestHead, content: Content, known: Mapping[str, str] | None = None
) -> Response:
    """Answer a GET with a file as RFC 9110 §13.2.2 orders it: preconditions, then ranges.

    `known` are the content's header fields, where they are put together already.
    """
    headers, fields, ranges = head.headers, dict(known or content.headers()), None
    held = None if isinstance(content.source, bytes) else content.source
    if not head.is_plain:
        etag, modified = content.etag, content.last_modified
        check_preconditions(headers, etag, modified)
        if not_modified(headers, etag, modified):
            return Response(304, fields, resource=held)
        # Ranges are defined for GET alone (§14.2).
        is_part = "range" in headers and head.method == "GET"
        if is_part and if_range_holds(headers, etag, modified):
            ranges = parse_range(headers.get("range", ""), content.size)
    if content.internal and (len(ranges) == 1 if ranges else "range" not in headers):
        if ranges is None:
            del fields["Accept-Ranges"]  # nginx adds its own to a whole file
        return Response(200, {**fields, "X-Accel-Redirect": content.internal}, resource=held)
    if ranges is None and isinstance(content.source, bytes):
        return Response(200, fields, content.source)
    if ranges is None:
        body = [*content.cut(0, content.size - 1)] if content.size else []
        return Response(200, fields, body, held)
    if len(ranges) > 1:
        boundary = secrets.token_hex(16)
        fields["Content-Type"] = f"multipart/byteranges; boundary={boundary}"
        return Response(206, fields, join_ranges(content, ranges, boundary), held)
    first, last = ranges[0]
    fields["Content-Range"] = f"bytes {first}-{last}/{content.size}"
    return Response(206, fields, [*content.cut(first, last)], held)


def join_ranges(
    content: Content, ranges: Iterable[tuple[int, int]], boundary: str
) -> list[Segment]:
    """Return several ranges as multipart/byteranges (RFC 9110 §14.6)."""
    parts: list[Segment] = []
    for first, last in ranges:
        about = f"Content-Type: {content.mime_type}\r\n"
        about += f"Content-Range: bytes {first}-{last}/{content.size}\r\n"
        parts += content.cut(first, last, f"\r\n--{boundary}\r\n{about}\r\n".encode())
    return [*parts, f"\r\n--{boundary}--\r\n".encode()]


# -- The application ---------------------------------------------------------------------

DISK_ERRORS: Mapping[int | None, tuple[int, str]] = {
    number: (status, detail)
    for status, detail, *numbers in (
        (507, "The disk is full, but for what RESERVE_BYTES keeps.", errno.ENOSPC),
        (507, "The disk quota is used up.", errno.EDQUOT),
        (507, "The file system takes no file of this size.", errno.EFBIG),
        (503, "The storage folder cannot be written to.", errno.EROFS, errno.EACCES, errno.EPERM),
        (503, "The storage folder is not there.", errno.ENOENT, errno.ENODEV, errno.ESTALE,
         errno.ENOTCONN),  # FUSE without its program
        (503, "A link or a file stands where a folder of the storage was.",
         errno.ENOTDIR, errno.ELOOP),
        (503, "The disk does not answer.", errno.EIO, errno.ETIMEDOUT, errno.EHOSTDOWN),
        (503, "The object store does not answer.", errno.EHOSTUNREACH),
        (503, "Too many files are open.", errno.EMFILE, errno.ENFILE),
    )
    for number in numbers
}  # fmt: skip


def add_vary(headers: dict[str, str], name: str) -> None:
    """Name a field of the request that an answer depends on, too (RFC 9110 §12.5.5)."""
    headers["Vary"] = f"{headers['Vary']}, {name}" if "Vary" in headers else name


def complete_headers(response: Response, origins: Sequence[str], origin: str) -> None:
    """Add CORS and what keeps browsers from guessing types, and caches what may change."""
    headers = response.headers
    allowed = "*" if "*" in origins else origin if origin in origins else ""
    if allowed:  # which pages may read the answer (Fetch Standard, CORS)
        headers["Access-Control-Allow-Origin"] = allowed
        if origin:
            headers["Access-Control-Expose-Headers"] = CORS_EXPOSED
    if origins and "*" not in origins:
        add_vary(headers, "Origin")
    headers["X-Content-Type-Options"] = "nosniff"
    changing = response.status >= 400 or headers.get("Content-Type") == JSON_TYPE
    if changing and headers.keys().isdisjoint(("Cache-Control", "ETag")):
        headers |= NO_STORE


REFUSALS = frozenset({401, 403, 429})
MAX_LOGGED_PATH = 200  # characters
SECRET_PATHS = re.compile(r"/(s|shares|files)/+[^/]+")  # links and uploads


def loggable_path(path: str) -> str:
    """Return a path as a log may have it, without what lets in whoever knows it.

    >>> loggable_path("/s/TOKEN/5f0c"), loggable_path("/image/a%20b.jpg")
    ('/s/-/5f0c', '/image/a%20b.jpg')
    """
    hidden, count = SECRET_PATHS.subn(r"/\1/-", unquote(path))
    return quote(hidden) if count else path


def log_refusal(request: Request, error: HTTPError) -> None:
    """Tell the owner of a credential or a login that is refused: README.md's filter counts them.

    No credential is no attack, and what a query holds is no log's business.
    """
    if error.status not in REFUSALS or isinstance(error, CredentialMissing):
        return
    principal, path = request.principal, loggable_path(request.head.path)[:MAX_LOGGED_PATH]
    who = principal.kind if principal.user_id is None else f"user:{principal.user_id}"
    about = f"{request.client} {who} {request.head.method} {path}: {error.status} {error.detail}"
    warn(f"refused {printable_line(about)}")


class Dispatcher(Service):
    """Requests in, answers out."""

    def __init__(self, app: App, routes: Sequence[Route]) -> None:
        self.app = app
        self.routes = RouteTable(routes)
        self._prompt = {item.path for item in routes if item.prompt}

    def __call__(self, head: RequestHead, peer: str) -> Answer | Exchange:
        """Answer a request, or accept it and say what takes in its body."""
        hot = None if head.has_body else self.inline(head, iteration=0)
        if hot is not None:
            return hot
        request = Request(self.app, head, peer)
        answer = self._attempt(request, self.accept, request)
        # What reads an empty body, too, has it whole.
        return answer if isinstance(answer, Answer) or head.has_body else answer.finish()

    def _attempt(self, request: Request, step: Callable[..., T], *given: Any) -> T | Answer:
        """Take a step towards an answer, and complete it; what the step raises is answered."""
        try:
            outcome = step(*given)
        except Exception as error:
            return self._refuse(request, error)
        if isinstance(outcome, Response):
            self.finish(request.head, outcome, request)
        elif isinstance(outcome, Deferred):
            work = functools.partial(self._attempt, request, outcome.work)
            refuse = functools.partial(self._refuse, request)
            return outcome._replace(work=work, refuse=refuse)
        return outcome

    def _refuse(self, request: Request, error: Exception) -> Response:
        """Answer an error, and forget what has come of the request."""
        self._abandon(request)
        problem = as_http_error(error)
        log_refusal(request, problem)
        response = error_response(problem, request.family)
        self.finish(request.head, response, request)
        return response

    def _abandon(self, request: Request) -> None:
        """Forget what has come of a request that comes to nothing; count no use of its token."""
        counted, body, request.counted, request.body = request.counted, request.body, None, None
        with contextlib.suppress(sqlite3.Error):
            if counted:
                self.app.index.token_uses.refund(counted)
        # What stays in `.incoming/` goes at the next start
        with contextlib.suppress(OSError, sqlite3.Error):
            if body is not None:
                body.discard()
            if request.upload is not None:
                request.upload.discard()

    def _need_writer(self) -> None:
        """Refuse what a server that only reads cannot do (503)."""
        if writer := self.app.settings.read_only:
            raise HTTPError(503, f"This server only reads; {writer} writes.", RETRY_LATER)

    def _consume_use(self, request: Request, grant: Grant, item: Route) -> None:
        """Count a use of a scoped token that is good for so many requests; 401 after them."""
        goes_on = item.access is Access.TARGET and item.method != "POST"
        if grant.uses and item.access is not Access.OPEN and not goes_on:
            self._need_writer()  # which counts for all
            if not self.app.index.token_uses.consume(grant, time.time()):
                raise Unauthorized(TokenError("The token was used as often as it may be."))
            request.counted = grant

    def accept(self, request: Request) -> Answer | Exchange:
        """Judge a request by its head alone; if it has no body to be read, answer it, too."""
        head = request.head
        found = self.routes.find(head.path)
        for item, _ in found.values():  # an error before the choice is this family's
            request.family, request.answer_headers = item.family
            break
        if (request.family, head.method) == ("files", "POST"):  # tus: instead of PATCH
            method = head.headers.get("x-http-method-override") or head.method
            request.head = head = head._replace(method=method)
        if head.method == "OPTIONS":
            preflight = "access-control-request-method" in head.headers
            if found or head.path == "*" or preflight:
                return self._answer_options(request, found)
        self._identify(request)  # a wrong credential is refused on every path
        item, parameters = choose_route(found, head.method)
        if not (item.reads or head.method in {"GET", "HEAD"}):
            self._need_writer()
        request.family, request.answer_headers = item.family
        request.route = item.number
        request.need(item.access)
        if request.principal.grant:
            self._consume_use(request, request.principal.grant, item)
        if item.parameters or item.query:
            parameters = parse_declared(request, item, parameters)
        there = item.before and item.before(self.app, request, **parameters)
        if there and head.method in CHANGING_METHODS:
            check_preconditions(head.headers, *validators_of(there), changes=True)
        if item.body is not None:
            request.body = open_body(request, item.body, parameters)
            if request.body is not None:
                return self._exchange(request, request.body, item, parameters)
            if item.body.wrapper:
                raise ValidationError(
                    FieldError("body", item.body.wrapper, "is required", "missing")
                )
            request.fields = parse_form(request, item.body, {})
        return item.handler(self.app, request, **parameters)

    def _exchange(
        self, request: Request, body: BodyReader, item: Route, parameters: Mapping[str, Any]
    ) -> Exchange:
        """Return the steps by which an accepted request takes in its body; each may answer it."""
        attempt = functools.partial(self._attempt, request)
        return Exchange(
            interim=request.interim,
            feed=functools.partial(attempt, body.feed),
            pause=functools.partial(attempt, body.pause),
            finish=functools.partial(attempt, self._answer, request, body, item, parameters),
            refuse=functools.partial(self._refuse, request),
            abandon=functools.partial(self._abandon, request),
        )

    def _answer(
        self, request: Request, body: BodyReader, item: Route, parameters: Mapping[str, Any]
    ) -> Answer:
        """Answer a request whose body is complete."""
        assert item.body is not None
        request.fields = parse_form(request, item.body, body.finish())
        response = item.handler(self.app, request, **parameters)
        upload, request.upload, request.body = request.upload, None, None
        if upload is not None:
            with contextlib.suppress(OSError):  # its place is another one by now
                upload.discard(undo=False)
        request.counted = None  # it was worth its use
        return response

    def _identify(self, request: Request) -> None:
        """Find who makes a request; 401 for a wrong credential or a disabled account."""
        app, query = self.app, request.head.query
        request.pairs = parse_query(query) if query else []
        tokens = [value for name, value in request.pairs if name == "token"]
        token = ",".join(tokens) if tokens else None  # two are one malformed one
        # A foreign page can send a cookie with what changes something, but not with a bearer
        cookies = request.headers.get("cookie", "") if request.is_read else ""
        principal = find_principal(
            request.head.authorization, token, app.auth, time.time(), cookies=cookies
        )
        if principal.user_id:
            known = app.index.users.present(principal)
            if known is None and principal.kind == "token":
                detail = "The account is disabled, or was since; log in again."
                raise Unauthorized(TokenError(detail))
            principal = known or ANONYMOUS
        if principal.cookie and app.index.token_uses.is_used(principal.cookie):
            principal = ANONYMOUS
        if principal.grant:
            path = unquote(request.head.path)
            principal = principal_of_grant(principal.grant, request.head.method, path)
        request.principal = principal

    def _answer_options(self, request: Request, found: Choice) -> Response:
        """Say what is possible; to a browser's preflight also that it may (Fetch Standard)."""
        head = request.head
        allow = format_allow(found) if found else "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
        headers = {"Allow": allow}
        asked = "access-control-request-method" in head.headers
        if asked and self.app.settings.cors_allow_origins:
            wanted = head.headers.get("access-control-request-headers")
            headers |= {
                "Access-Control-Allow-Methods": allow,
                "Access-Control-Allow-Headers": wanted or "Authorization, Content-Type",
                "Access-Control-Max-Age": CORS_MAX_AGE,
            }
        if "OPTIONS" in found:  # what a protocol of its own has to say
            item, parameters = found["OPTIONS"]
            said = item.handler(self.app, request, **parameters)
            assert isinstance(said, Response)
            headers |= said.headers
        return Response(204, headers)

    def finish(
        self, head: RequestHead, response: Response, request: Request | None = None
    ) -> None:
        """Add what every answer has: CORS, nosniff, no-store, and compression for texts."""
        if request is not None:
            response.headers |= request.answer_headers
            response.route, response.principal = request.route, request.principal
        origins = self.app.settings.cors_allow_origins
        complete_headers(response, origins, head.headers.get("origin", ""))
        body, headers = response.body, response.headers
        if not isinstance(body, bytes) or headers.get("Content-Type") not in TEXT_TYPES:
            return
        if is_long := len(body) > GZIP_BYTES:
            add_vary(headers, "Accept-Encoding")
        if "ETag" in headers and not_modified(head.headers, headers["ETag"], None):
            # With the fields of the 200 that it stands for (RFC 9110 §15.4.5)
            response.status, response.body, response.length = 304, b"", 0
        elif is_long and accepts_gzip(head.headers):
            response.body = gzip_bytes(body)
            response.length = len(response.body)
            headers["Content-Encoding"] = "gzip"

    def on_error(self, error: HTTPError, origin: str) -> Response:
        response = error_response(error, "")
        complete_headers(response, self.app.settings.cors_allow_origins, origin)
        return response

    def on_answered(
        self, head: RequestHead | None, peer: str, response: Response, seconds: float
    ) -> None:
        self.app.meter.count(head, response, seconds)
        if self.app.log:
            self.app.log(head, peer, response, seconds)

    def on_flight(self, count: int) -> None:
        self.app.meter.set_in_flight(count)

    def client_of(self, head: RequestHead, peer: str) -> str:
        return network_of(client_address(head.headers, peer, self.app.settings.trusted_proxies))

    def is_prompt(self, head: RequestHead) -> bool:
        """Return whether a request needs neither disk nor index; a credential may need them."""
        anonymous = head.authorization is None and "cookie" not in head.headers
        return head.target in self._prompt and anonymous and not head.has_body

    def inline(self, head: RequestHead, iteration: int) -> Response | None:
        """Return the answer to a GET of a hot file by who is known to be let; None for all else.

        Within one iteration a file on disk is looked at once. In 0, which is a thread's, the
        disk may be waited for; in others that gives None.
        """
        app, hot = self.app, self.app.hot.get(head.target)
        if hot is None or hot.forgotten != app.scanner.progress.forgotten[0]:
            return None
        if head.method not in {"GET", "HEAD"} or (iteration and is_remote(hot.state[0])):
            return None
        is_open = head.authorization is None and hot.access is OPEN
        principal = ANONYMOUS if is_open else self._recall(head, hot.access)
        if principal is None:
            return None
        status = hot.choose(head)
        try:
            if not (status or hot.is_small):
                content = open_hot(hot)
            elif (iteration and hot.seen == iteration) or hot.is_current(os.lstat(hot.path)):
                content, hot.seen = hot.content, iteration
            else:
                return None
        except OSError:
            return None
        if status:
            prepared = hot.prepared.get(status) or self._prepare(hot, status)
            return prepared if principal is ANONYMOUS else prepared.copy_for(principal)
        try:
            response = content_response(head, content, hot.fields)
        except HTTPError as error:
            close_source(content)
            response = error_response(error, "")
        response.route, response.principal = hot.route, principal
        if iteration and response.resource and not is_ready(head, response):
            response.close()
            return None
        self.finish(head, response)
        return response

    def _prepare(self, hot: HotFile, status: int) -> Response:
        """Put an answer with a hot file together that is the same whoever asks."""
        body = b"" if status == 304 else hot.content.source
        response = Response(status, hot.fields, body)  # type: ignore[arg-type]
        complete_headers(response, self.app.settings.cors_allow_origins, "")
        response.route, response.principal = hot.route, ANONYMOUS
        hot.prepared[status] = response.prepare()
        return response

    def _recall(self, head: RequestHead, access: Access) -> Principal | None:
        """Return who makes a request, if that is remembered and has the access."""
        app, cookies = self.app, head.headers.get("cookie", "")
        known = recall_principal(head.authorization, cookies, app.auth, time.time())
        if known is None or not allows(access, known, app.settings.read_auth_enabled):
            return None
        return known


def validators_of(thing: object) -> tuple[str, float | None]:
    """Return entity tag and time of change of what is in the index; only files have a tag."""
    if isinstance(thing, File):
        return f'"{thing.sha256}"', thing.mtime_ns / 1e9
    return "", getattr(thing, "updated_at", getattr(thing, "updated", None))


def open_hot(hot: HotFile) -> Content:
    """Open the content of a large hot file; FileNotFoundError if it is another one now."""
    descriptor = os.open(hot.path, os.O_RDONLY | OPEN_FLAGS)
    with undoing(os.close, descriptor):
        if not hot.is_current(os.fstat(descriptor)):
            raise FileNotFoundError(hot.path)
    return hot.content._replace(source=io.FileIO(descriptor, "rb"))


def close_source(content: Content) -> None:
    """Close the file of a Content, if it has one."""
    if not isinstance(content.source, bytes):
        content.source.close()


def is_ready(head: RequestHead, response: Response) -> bool:
    """Return whether the selector's thread can begin a file's answer; a short one is read."""
    if response.status == 304 or head.method == "HEAD" or response.length > HOT_FILE_BYTES:
        return True
    segments: list[bytes | FileSlice] = list(response.body)  # type: ignore[arg-type]
    pieces = [each if isinstance(each, bytes) else each.read_at_hand() for each in segments]
    if None in pieces:
        return False
    response.body = b"".join(pieces)  # type: ignore[arg-type]  # one system call sends it
    response.close()
    response.resource = None
    return True


def gzip_bytes(body: bytes) -> bytes:
    """Return a body compressed (RFC 1952)."""
    compressor = zlib.compressobj(GZIP_LEVEL, wbits=31)
    return compressor.compress(body) + compressor.flush()


def as_http_error(error: Exception) -> HTTPError:
    """Return what a client is told of an exception: never a path, a stack or a secret."""
    if isinstance(error, HTTPError):
        return error
    if isinstance(error, TooLarge):
        return HTTPError(413, str(error))
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        status, detail = DISK_ERRORS[error.errno]
        return HTTPError(status, detail, RETRY_LATER if status == 503 else None)
    if isinstance(error, sqlite3.DatabaseError):
        warn(f"the index: {error}")
        if is_full(error):
            return HTTPError(507, "The disk is full.")
        return HTTPError(503, "The index cannot be used now.", RETRY_LATER)
    import traceback  # only where something is wrong with the program

    warn("".join(traceback.format_exception(error)).rstrip())
    return HTTPError(500, "The server made a mistake; its log says more.")


FASTAPI_MESSAGES = {
    "missing": "Field required",
    "int_parsing": "Input should be a valid integer, unable to parse string as an integer",
    "int_parsing_size": "Unable to parse input string as an integer, exceeded maximum size",
    "int_from_float": "Input should be a valid integer, got a number with a fractional part",
    "int_type": "Input should be a valid integer",
    "bool_parsing": "Input should be a valid boolean, unable to interpret input",
    "bool_type": "Input should be a valid boolean",
    "string_type": "Input should be a valid string",
    "string_unicode": "Input should be a valid string,"
    " unable to parse raw data as a unicode string",
    "dict_type": "Input should be a valid dictionary",
    "model_attributes_type": "Input should be a valid dictionary or object to extract fields from",
    "greater_than_equal": "Input should be greater than or equal to {0}",
    "less_than_equal": "Input should be less than or equal to {0}",
    "value_error": "Value error, {1}",
}
DJANGO_MESSAGES = {
    "dict_type": "Invalid data. Expected a dictionary, but got {}.",
    "missing": "This field is required.",
    **dict.fromkeys(
        ("int_parsing", "int_parsing_size", "int_from_float", "int_type"),
        "A valid integer is required.",
    ),
    **dict.fromkeys(("bool_parsing", "bool_type"), "Must be a valid boolean."),
    "string_type": "Not a valid string.",
    "null": "This field may not be null.",
    "blank": "This field may not be blank.",
    "string_too_long": "Ensure this field has no more than {} characters.",
    "string_too_short": "Ensure this field has at least {} characters.",
    "greater_than_equal": "Ensure this value is greater than or equal to {}.",
    "less_than_equal": "Ensure this value is less than or equal to {}.",
}


def error_response(error: HTTPError, family: str) -> Response:
    """Return an error in the shape of its family (CONTRACT.md, section 3)."""
    status, value = error.status, dict[str, Any](detail=error.detail)
    if family == "accounts":
        value |= error.members
    if isinstance(error, ValidationError) and family == "entities":
        status, value = 422, {"detail": [fastapi_error(problem) for problem in error.problems]}
    elif isinstance(error, ValidationError) and family == "accounts":
        value = {}
        for problem in error.problems:
            name = problem.field or "non_field_errors"
            value.setdefault(name, []).append(django_message(problem))
    return json_response(value, status, error.headers)


def fastapi_error(problem: FieldError) -> dict[str, Any]:
    """Return a problem as FastAPI names it."""
    sentence = FASTAPI_MESSAGES.get(problem.type, "{1}")
    message = sentence.format(problem.limit, problem.message)
    location = [*problem.where.split("/"), problem.field]
    return {"loc": [name for name in location if name], "msg": message, "type": problem.type}


def django_message(problem: FieldError) -> str:
    """Return the sentence of a problem as Django REST Framework says it."""
    kind = "null" if problem.is_null else problem.type
    if kind in DJANGO_MESSAGES:
        return DJANGO_MESSAGES[kind].format(problem.given or problem.limit)
    if problem.message.endswith("."):
        return problem.message
    return f"{problem.message[:1].upper()}{problem.message[1:]}."


# ======================================================================================
# 12. Families
# ======================================================================================
# A handler reads like its row in CONTRACT.md. What the families share comes first: finding
# an asset that may be shown, and answering with it.

MEDIA, LIBRARY, IMAGES = Family("media"), Family("library"), Family("images")
ACCOUNTS, ENTITIES = Family("accounts"), Family("entities")
SHARES, TRASH, SYSTEM = Family("shares"), Family("trash"), Family("system")
FILES = Family("files", headers={"Tus-Resumable": TUS_VERSION})


HASHES = Field("sha256", "hashes", required=True, nullable=False)


def check_sha256(text: str) -> str:
    """Return a SHA-256 in lower case; 400 for another text."""
    if not SHA256.fullmatch(text):
        raise HTTPError(400, "That is not a SHA-256: 64 hexadecimal digits.")
    return text.lower()


NO_FILE = "There is no such file."


def existing(thing: T | None, otherwise: str = "Not found.") -> T:
    """Return what was looked for; 404 where it is not there, or another's."""
    if not thing:
        raise HTTPError(404, otherwise)
    return thing


def find_duplicate(app: App, sha256: str, *roots: str) -> Located | None:
    """Return a file of these folders with this content, unchanged on disk."""
    found = app.index.files.with_content(sha256, *roots)
    return next(filter(None, map(app.scanner.current, found)), None)


def find_content(request: Request, sha256: str) -> Located:
    """Return a file with this content that the principal may read and that is there; 404."""
    private = ["images"] if request.may(PRIVATE_READ) else []
    return existing(find_duplicate(request.app, sha256, "library", *private), NO_FILE)


def find_readable(request: Request, sha256: str, *, trashed: bool = False) -> Located | None:
    """Return a file with this content, of any family, that the principal may read."""
    app, private = request.app, ["images"] if request.may(PRIVATE_READ) else []
    roots, user_id = ["library", "entities", *private], request.principal.user_id
    found = app.index.files.readable(sha256, roots, user_id, trashed=trashed)
    return next(filter(None, map(app.scanner.current, found)), None)


S3_URL_SECONDS = 300  # that a URL of an object is good for
FOREVER = "max-age=31536000, immutable"  # for what is addressed by its hash


def caching(app: App, file: File, rule: str) -> str:
    """Return a rule for caches: private ones only, unless everyone may read the file."""
    private = app.settings.read_auth_enabled or file.root not in {"library", "entities"}
    return f"{'private' if private else 'public'}, {rule}"


class FileChanged(HTTPError):
    """What the index says of a file is true no more."""

    def __init__(self) -> None:
        super().__init__(404, NO_FILE)


def named_response(request: Request, folder: Folder, path: str, rule: str) -> Response:
    """Answer with the file of a name, which is read again if it was changed on disk; 404."""
    app = request.app
    try:
        found = app.index.files.get(folder.name, path)
        if found is not None:
            return file_response(request, found, rule)
        # An earlier program's file may not have been scanned yet
        unseen = folder is app.images and folder.is_local(path) and not path.startswith(".")
    except FileChanged:
        unseen = True
    try:
        is_known = found is not None
        found = app.scanner.refresh(folder, path, is_known=is_known) if unseen else None
    except (OSError, ValueError):
        found = None
    return file_response(request, existing(found, NO_FILE), rule)


def file_response(
    request: Request, found: Located, rule: str, *, by_link: bool = False
) -> Response:
    """Answer with a file as it was when it was read; FileChanged if it is that no more.

    What is shared `by_link` is nobody's to keep for others: the link may end.
    """
    app, (file, asset) = request.app, found
    rule = f"private, {rule}" if by_link else caching(app, file, rule)
    folder, modified = app.folders[file.root], file.mtime_ns / 1e9
    if folder.make:  # a link made of an older file has that one's time, maybe another user's
        modified = max(modified, file.added)
    name = posixpath.basename(file.path)
    content = Content(b"", file.size, asset.mime_type, file.sha256, modified, rule, name)
    if isinstance(folder, Bucket) and not folder.is_local(file.path):
        reader = folder.stream(file)
        with app.disk(file.root):
            return object_response(request, content._replace(source=reader), reader)
    try:
        with app.disk(file.root):
            source = folder.open(file.path)
    except (OSError, ValueError):
        raise HTTPError(404, NO_FILE) from None
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(source.close)
        status = os.fstat(source.fileno())
        if not file.matches(status):
            raise FileChanged
        small = file.size <= HOT_FILE_BYTES
        internal = "" if small else internal_location(request, file)
        held = source.read(file.size + 1) if small else source
        content = content._replace(source=held, internal=internal)
        hot = None if by_link else remember_hot(request, file, content, status)
        response = content_response(request.head, content, hot.fields if hot else None)
        if not small:
            cleanup.pop_all()
    return response


def object_response(request: Request, content: Content, source: ObjectReader) -> Response:
    """Answer with an object, of which the first bytes have come by then; 404."""
    response = content_response(request.head, content)
    try:
        if response.status == 304:
            return response
        if request.head.method == "HEAD":
            source.check(source.bucket.stat(source.name))
            return response
        if request.app.settings.s3_redirect:
            scope = content.cache_control.partition(",")[0]
            rule, url = f"{scope}, max-age={S3_URL_SECONDS // 2}", source.url(S3_URL_SECONDS)
            return Response(307, {"Location": url, "Cache-Control": rule})
        first = next(iter(response.body), None)
        if isinstance(first, FileSlice):
            first.fetch(source)
    except FileNotFoundError:
        raise HTTPError(404, NO_FILE) from None
    return response


def internal_location(request: Request, file: File) -> str:
    """Return where nginx finds a file that it may send for us; empty where the bytes have to go.

    Only nginx.conf sets `X-Sendfile-Type`: who connects directly gets the file, and so does a
    request with a precondition on the ETag, which nginx does not know. HEAD has no bytes to send.
    """
    headers = request.headers
    if not request.app.settings.accel_redirect or not request.behind_proxy:
        return ""
    if headers.get("x-sendfile-type") != "X-Accel-Redirect":
        return ""
    if request.head.method == "HEAD" or "if-range" in headers or "if-match" in headers:
        return ""
    return f"/.accel/{file.root}/{quote(os.fsencode(file.path))}"


HOT_ACCESS = {"library": READ, "images": PRIVATE_READ}  # what leads to files of others changes


def remember_hot(
    request: Request, file: File, content: Content, status: os.stat_result
) -> HotFile | None:
    """Have the next GETs of a file, which was found like this, answered without the index."""
    app, access = request.app, HOT_ACCESS.get(file.root)
    if access is None or request.head.query or content.internal:
        return None
    if access is READ and not app.settings.read_auth_enabled:
        access = OPEN
    if not isinstance(content.source, bytes):
        if app.settings.accel_redirect:
            return None
        content = content._replace(source=b"")
    root = app.folders[file.root].path
    hot = HotFile(root, file.path, status, content, access=access, route=request.route)
    app.remember(request.head.target, hot)
    return hot


def store_upload(
    app: App, incoming: Incoming, folder: Folder, names: Iterable[str], *, is_first: bool = False
) -> Located:
    """Put an upload in place; return what the index is to know.

    It is linked to its equal if there is one, unless it is known to be the first of its content.
    """
    may_link = folder.make and not is_first
    duplicate = find_duplicate(app, incoming.sha256, folder.name) if may_link else None
    name = folder.keep(incoming, names, duplicate and duplicate[0].path)
    asset = Asset(incoming.sha256, incoming.size, incoming.facts, incoming.md5 or None)
    status = os.fstat(incoming.file.fileno())
    return File(folder.name, name, asset.sha256, *state_of(status), time.time()), asset


def ingest(app: App, incoming: Incoming, folder: Folder, names: Iterable[str]) -> Located:
    """Put an upload in place and into the index; for good, unless a scan would find it again."""
    file, asset = store_upload(app, incoming, folder, names)
    durable = not folder.is_local(file.path)
    app.index.write(lambda db: app.index.files.put(db, file, asset), durable=durable)
    return file, asset


def remove_for_good(
    app: App, folder: Folder, forget: Callable[[Database], tuple[T, list[str]]]
) -> T:
    """Have the index forget something, and delete the files at the paths that `forget` tells."""
    with contextlib.ExitStack() as files:

        def remove(db: Database) -> tuple[T, list[str]]:
            result, paths = forget(db)
            files.enter_context(folder.removing(paths))  # once this is committed
            return result, app.index.files.remove_all(db, folder.name, paths)

        result, gone = app.index.write(remove)
    app.thumbnails.remove(*gone)
    return result


NOT_MEDIA = "The file is no image, video or audio."
ELSEWHERE = "POST /api/media/media/ and POST /entity/ take every image, video and audio."


def check_type(request: Request, extensions: Set[str]) -> tuple[Incoming, Facts]:
    """Return the upload of a route that needs one, and its facts; 400 for a type not allowed."""
    incoming = request.upload
    assert incoming is not None
    if (facts := incoming.facts) and facts.extension in extensions:
        return incoming, facts
    allowed = ", ".join(sorted(extensions))
    if not incoming.size:
        raise HTTPError(400, "The file is empty.")
    if facts is None:
        raise HTTPError(400, f"The file's content is none of: {allowed}.")
    detail = f"The file's content is {facts.mime_type}, which is none of: {allowed}."
    raise HTTPError(400, f"{detail} {ELSEWHERE}")


def check_extension(name: str, extensions: Set[str]) -> str:
    """Return the extension of a file name if it is one of those, or jpeg, in lower case; 400."""
    base = name.replace("\\", "/").rpartition("/")[2].lower()
    extension = base.rpartition(".")[2] if "." in base else ""
    allowed = {*extensions, "jpeg"}  # which is jpg's other name
    if extension not in allowed:
        detail = f"The file's name must end in one of: {', '.join(sorted(allowed))}."
        hint = f" {ELSEWHERE}" if is_media_name(os.fsencode(base)) else ""
        raise HTTPError(400, f"{detail}{hint}")
    return extension


# -- Media: public image host ------------------------------------------------------------

MEDIA_TYPES = formats_for("media")
MEDIA_UPLOAD = BodySpec(("multipart",), upload=UploadSpec(
    "library", "max_upload_bytes", check_name=lambda _, name: check_extension(name, MEDIA_TYPES)
))  # fmt: skip


@MEDIA.route("POST", "/upload", UPLOAD, {201: "PublicImage"}, body=MEDIA_UPLOAD, is_target=True,
    summary="Upload a public image")  # fmt: skip
@MEDIA.route("PUT", "/upload", UPLOAD, {201: "PublicImage"}, name="put_media",
    body=MEDIA_UPLOAD._replace(kinds=("multipart", "file")))  # fmt: skip
def upload_media(app: App, request: Request) -> Response:
    """Upload a public image, as curl -T does."""
    incoming, facts = check_type(request, MEDIA_TYPES)
    extension = check_extension(incoming.filename, MEDIA_TYPES)
    filename = f"{secrets.token_hex(16)}.{extension}"
    _, asset = ingest(app, incoming, app.library, [f"{MEDIA_FOLDER}/{filename}"])
    value = {
        "url": request.url(f"/media/{filename}"),
        "filename": filename,
        "size": asset.size,
        "content_type": facts.mime_type,
        "sha256": asset.sha256,
    }
    return json_response(value, 201, {"Location": request.reference(f"/media/{filename}")})


@MEDIA.route("GET", "/media/{filename}", READ, {200: "file"})
def get_media(app: App, request: Request, filename: str) -> Response:
    """Get a public image."""
    path = f"{MEDIA_FOLDER}/{filename}"
    return named_response(request, app.library, path, "max-age=3600")


def find_media(app: App, request: Request, filename: str) -> File:
    """Return the file of a public image; 404."""
    return existing(app.index.files.get("library", f"{MEDIA_FOLDER}/{filename}"), NO_FILE)[0]


@MEDIA.route("DELETE", "/media/{filename}", UPLOAD, {200: "Deleted"}, before=find_media)
def delete_media(app: App, request: Request, filename: str) -> Response:
    """Delete a public image."""
    path = f"{MEDIA_FOLDER}/{filename}"
    need_mounts(app)
    with app.library.removing([path]):
        removed = app.index.write(lambda db: app.index.files.remove(db, "library", path))
    sha256, dropped = existing(removed, NO_FILE)  # or gone by another request, meanwhile
    if dropped:
        app.thumbnails.remove(sha256)
    return json_response({"deleted": filename})


MAX_MEDIA_PAGE = 1000
PAGE_SIZE_HELP = f"100 where only a page is given, at most {MAX_MEDIA_PAGE}"
MEDIA_PAGING = (
    Field("page", "integer", minimum=1, help="from 1"),
    Field("page_size", "integer", minimum=1, help=PAGE_SIZE_HELP),
)


@MEDIA.route("GET", "/media", READ, {200: "PublicFiles"}, query=MEDIA_PAGING)
def list_media(app: App, request: Request) -> Answer:
    """List all public images, newest first."""
    size, offset = -1, 0  # SQLite: no limit
    if request.query:
        size = min(request.query.get("page_size", 100), MAX_MEDIA_PAGE)
        offset = (request.query.get("page", 1) - 1) * size
    offset = min(offset, MAX_BYTES)

    def pieces() -> Iterator[str]:
        yield f'{{"count":{app.index.files.count_media()},"files":['
        for number, row in enumerate(app.index.files.media(size, offset)):
            yield "," * (number > 0) + to_json(media_json(request, row))
        yield "]}"

    return listing_response(app, request, f"{request.url('/media')} {size} {offset}", pieces)


def media_json(request: Request, row: tuple[str, str, int, str | None, float]) -> dict[str, Any]:
    """Return a public upload as answers show it."""
    path, sha256, size, mime_type, added = row
    filename = path.partition("/")[2]
    # URLs are UTF-8; where a name is not, the content's own name leads to it
    place = f"/media/{quote(filename)}" if printable(filename) == filename else f"/image/{sha256}"
    return {
        "filename": printable(filename),
        "url": request.url(place),
        "size": size,
        "content_type": mime_type or "application/octet-stream",
        "uploaded_at": added,
    }


# -- Library: scanned photo folder -------------------------------------------------------

LIBRARY_TYPES = formats_for("library")


@LIBRARY.route("GET", "/list", READ, {200: "LibraryFile{}"})
def list_library(app: App, request: Request) -> Answer:
    """List everything in the folder, by SHA-256."""
    return listing_response(app, request, "/list", functools.partial(library_pieces, app))


def library_pieces(app: App) -> Iterator[str]:
    """Yield the JSON of all files of the library, by SHA-256, in pieces."""
    before = "{"
    for sha256, path, mtime_ns, created in app.index.files.library():
        value = {
            "filename": printable(posixpath.basename(path)),
            "last_modified": mtime_ns / 1e9,
            "file_path": printable(app.library.show(path)),
            "original_creation_date": created,
        }
        yield f'{before}"{sha256}":{to_json(value)}'
        before = ","
    yield "{}" if before == "{" else "}"


@LIBRARY.route("GET", "/thumbnail/{sha256}", READ, {200: "thumbnail"})
def get_thumbnail(app: App, request: Request, sha256: str) -> Answer:
    """Get a thumbnail: a PNG that fits 256 × 256."""
    file, asset = find_content(request, check_sha256(sha256))
    work = functools.partial(thumbnail_response, request, file, asset)
    return Deferred("decoder", work) if asset.thumbnail is None else work()


def thumbnail_response(
    request: Request, file: File, asset: Asset, *, by_link: bool = False
) -> Response:
    """Answer with a thumbnail, which is made if need be."""
    app = request.app
    content = rendered_content(app, file, make_rendition(app, file, asset, THUMBNAIL))
    folder = app.folders[file.root]
    if by_link:
        content = content._replace(cache_control="private, no-cache", last_modified=None)
    elif folder.is_local(file.path):
        with contextlib.suppress(OSError, ValueError):
            status = folder.stat(file.path)
            if file.matches(status):
                remember_hot(request, file, content, status)
    return content_response(request.head, content)


def make_rendition(app: App, file: File, asset: Asset, rendition: Rendition) -> bytes:
    """Return a rendition, which is made if need be; 404, or 503 where that may change."""
    try:
        with app.disk(file.root):
            made = app.renditions.ensure(file, asset, rendition)
    except FileNotFoundError:
        raise HTTPError(404, NO_FILE) from None
    thing = "thumbnail" if rendition == THUMBNAIL else "preview"
    if made is Outcome.FAILED:
        raise HTTPError(503, f"The {thing} cannot be made now.", RETRY_LATER)
    if isinstance(made, Outcome):
        raise HTTPError(404, f"There is no {thing} of this file.")
    return made


def rendered_content(app: App, file: File, data: bytes, vary: str = "") -> Content:
    """Return what is answered with a rendition of a file, whose type its first bytes tell."""
    types = {b"\x89": "image/png", b"R": "image/webp"}
    mime_type = types.get(data[:1], "image/jpeg")
    digest, modified = hashlib.sha256(data).hexdigest(), file.mtime_ns / 1e9
    rule = caching(app, file, FOREVER)
    return Content(data, len(data), mime_type, digest, modified, rule, vary=vary)


IMAGE_NAME = r"[^/\0]*\.(?i:jpg|jpeg|png|gif|webp|bmp)"  # of the images family; others are hashes


@IMAGES.route("GET", "/image/{filename}", PRIVATE_READ, {200: "file"},
    patterns={"filename": IMAGE_NAME})  # fmt: skip
def get_private_image(app: App, request: Request, filename: str) -> Response:
    """Get a private image."""
    return named_response(request, app.images, filename, "no-cache")


@LIBRARY.route("GET", "/image/{sha256}", READ, {200: "file"})
def get_image(app: App, request: Request, sha256: str) -> Response:
    """Get a file by its SHA-256."""
    found = find_content(request, check_sha256(sha256))
    return file_response(request, found, FOREVER)


def library_name(request: Request, filename: str) -> str:
    """Return the URL's name; without an allowed extension, the form's; 400 if neither has one."""
    wanted = last_segment(request.head.path)
    for name in map(safe_name, (wanted, filename)):
        if posixpath.splitext(name)[1][1:].lower() in {*LIBRARY_TYPES, "jpeg"}:
            return name
    check_extension(wanted if "." in wanted else filename, LIBRARY_TYPES)
    raise HTTPError(400, "The file needs a name.")


LIBRARY_UPLOAD = BodySpec(
    ("multipart", "file"),
    upload=UploadSpec("library", "max_upload_bytes", check_name=library_name),
)


@LIBRARY.route("PUT", ("/image/{filename}", "/image"), UPLOAD,
    {201: "LibraryImage", 200: "LibraryImage: It was there."},
    body=LIBRARY_UPLOAD, is_target=True)  # fmt: skip
def put_image(app: App, request: Request, filename: str = "") -> Response:
    """Upload an image into the folder."""
    incoming, facts = check_type(request, LIBRARY_TYPES)
    name = library_name(request, incoming.filename)
    readable = request.may(READ)
    with app.data.content_lock(incoming.sha256):
        known = find_duplicate(app, incoming.sha256, "library") if readable else None
        if known is None:
            folder = time.strftime("uploads/%Y%m%d", time.gmtime())
            names = numbered_names(f"{folder}/{name}")
            file, asset = ingest(app, incoming, app.library, names)
    if known is not None:
        incoming.discard()
        file, asset = known
        value = library_json("Image content already exists.", asset.sha256, file.path)
        return json_response(value)
    app.renditions.wanted.set()
    possible = app.thumbnails.can_make(facts.kind, facts.mime_type)
    value = library_json("Image uploaded successfully.", asset.sha256, file.path)
    thumbnail = f"{asset.sha256}.png" if possible else None
    return json_response({**value, "thumbnail_file": thumbnail}, 201)


def library_json(message: str, sha256: str, path: str) -> dict[str, Any]:
    """Return what a library upload is answered."""
    name, path = printable(posixpath.basename(path)), printable(path)
    return {"message": message, "sha256": sha256, "filename": name, "file_path": path}


# -- Images: private image box -----------------------------------------------------------

IMAGE_TYPES = formats_for("images")
SLUG_DIGITS = 16  # of the hash that stands for a name of which no slug can be made
IMAGE_UPLOAD = BodySpec(("multipart",), upload=UploadSpec(
    "images", "max_upload_bytes", check_name=lambda _, name: split_image_name(name)
))  # fmt: skip


def private_names(name: str) -> Iterator[str]:
    """Yield the name itself, then with the time added: `<stem>_<UTC><ext>`."""
    yield name
    while True:
        moment = datetime.now(timezone.utc)
        yield with_suffix(name, moment.strftime("_%Y%m%dT%H%M%S%fZ"))


def split_image_name(filename: str) -> tuple[str, str]:
    """Return the stem of a file name and its extension, which may be missing. 400 for another."""
    stem, extension = posixpath.splitext(safe_name(filename))
    if extension:
        check_extension(f"{stem}{extension}", IMAGE_TYPES)
    return stem, extension


def image_name(settings: Settings, filename: str, facts: Facts) -> str:
    """Return the name for an image, with its content's extension if it has none; 400."""
    stem, extension = split_image_name(filename)
    extension = extension or f".{facts.extension}"
    if settings.slugify_filenames:
        digest = hashlib.sha256(_utf8(stem)).hexdigest()[:SLUG_DIGITS]
        stem, extension = slugify(stem) or digest, extension.lower()
    return safe_name(f"{stem}{extension}")


@IMAGES.route("POST", "/upload-image", WRITE,
    {201: "PrivateImage"}, body=IMAGE_UPLOAD, is_target=True)  # fmt: skip
def upload_private_image(app: App, request: Request) -> Response:
    """Store a private image."""
    incoming, facts = check_type(request, IMAGE_TYPES)
    name = image_name(app.settings, incoming.filename, facts)
    file, _ = ingest(app, incoming, app.images, private_names(name))
    url = request.url(f"/image/{quote(file.path)}")
    return json_response({"stored_as": file.path, "bytes": file.size, "image_url": url}, 201)


# -- Accounts: users, their media and collections ----------------------------------------
# As a Django REST Framework project answers. A refresh token is good while the index has its
# `jti` in a session: rotating, logging out and changing the password all move that one row.

MAX_NAME_LENGTH = 150  # characters of a user's names, as in Django
MAX_TITLE_LENGTH = 255  # of a record's or collection's name
MAX_EMAIL_LENGTH = 254
MAX_PHONE_LENGTH = 32
MIN_PASSWORD_LENGTH, MAX_PASSWORD_LENGTH = 8, 1024
MAX_DESCRIPTION_LENGTH = 10_000
MAX_NOTE_LENGTH = 1024
MAX_USER_AGENT_LENGTH = 120  # of what is kept of it
MAX_SEARCH_TERMS = 32
MAX_ACCOUNT_FAILURES = 5  # failed logins for one account within FAILURE_SECONDS
MAX_ADDRESS_FAILURES = 20  # and from one address
LOOK_AGAIN_SECONDS = 0.02  # for the end of logins of which some may fail
FILE_URL_SECONDS = 3600
PAGE_SIZE, MAX_PAGE_SIZE = 10, 100
KINDS = ("image", "video", "audio")
ANY_BODY = ("json", "form", "multipart")
EMAIL = (
    r"[\w!#$%&'*+/=?^`{|}~-]+(\.[\w!#$%&'*+/=?^`{|}~-]+)*"  # RFC 5322's dot-atom, in any script
    r"@(localhost|([^\W_](([^\W_]|-){0,61}[^\W_])?\.)+[^\W\d_]([^\W_]|-){0,61}[^\W_])"
)
GRANTABLE = frozenset({READ_PERMISSION, WRITE_PERMISSION})


def needed(name: str, type: str = "text", **more: Any) -> Field:
    """Return a text field that is required and not blank."""
    return Field(name, type, required=True, nullable=False, blank="refused", **more)


def name_field(name: str, longest: int, **more: Any) -> Field:
    """Return an optional text field whose outer blanks are dropped."""
    return Field(name, "text", longest=longest, trim=True, **more)


def password_field(name: str, shortest: int = 0) -> Field:
    """Return the field of a password."""
    return needed(name, shortest=shortest, longest=MAX_PASSWORD_LENGTH)


def check_registration_form(request: Request, values: Mapping[str, Any]) -> Iterator[FieldError]:
    """Yield the problems of a registration: its e-mail, and names that are taken."""
    if not re.fullmatch(EMAIL, values.get("email", "")):
        yield FieldError("body", "email", "Enter a valid email address.")
    yield from taken_problems(request.app.index.users.taken(values))


def taken_problems(names: Iterable[str]) -> Iterator[FieldError]:
    """Yield a problem for each of the names that another account has."""
    for name in names:
        message = f"user with this {name.replace('_', ' ')} already exists."
        yield FieldError("body", name, message, "unique")


def one_of_fields(*names: str) -> Callable[[Request, Mapping[str, Any]], list[FieldError]]:
    """Return what checks that a form has one of some fields."""
    missing = [FieldError("body", names[0], "is required", "missing")]
    return lambda _, values: [] if any(map(values.get, names)) else missing


REGISTRATION = BodySpec(ANY_BODY, (
    name_field("first_name", MAX_NAME_LENGTH, nullable=False),
    name_field("last_name", MAX_NAME_LENGTH, nullable=False),
    needed("email", longest=MAX_EMAIL_LENGTH, trim=True),
    name_field("username", MAX_NAME_LENGTH, blank="null"),
    name_field("phone_number", MAX_PHONE_LENGTH, blank="null"),
    password_field("password", MIN_PASSWORD_LENGTH),
), check=check_registration_form)  # fmt: skip
LOGIN = BodySpec(ANY_BODY, (
    name_field("username", MAX_EMAIL_LENGTH, blank="null"),
    name_field("email", MAX_EMAIL_LENGTH, blank="null"),
    password_field("password"),
), check=one_of_fields("username", "email"))  # fmt: skip
REFRESH = BodySpec(ANY_BODY, (needed("refresh", "string", longest=MAX_TOKEN_LENGTH, trim=True),))
NEW_PASSWORD = password_field("new_password", MIN_PASSWORD_LENGTH)
PASSWORD_CHANGE = BodySpec(ANY_BODY, (password_field("old_password"), needed("new_password")))


def unauthorized(detail: str) -> HTTPError:
    """Return the 401 that asks for a bearer token (RFC 6750 §3)."""
    return HTTPError(401, detail, {"WWW-Authenticate": "Bearer"})


def user_id_of(request: Request) -> int:
    """Return the user id of a route whose access is USER."""
    assert request.principal.user_id is not None
    return request.principal.user_id


DEMO_USER = User(0, "", "demo", None, "", "", "", "", is_active=True)


def find_account(app: App, request: Request) -> User:
    """Return the caller's account; 404 for the users of other programs."""
    if request.principal.kind == "demo":
        return DEMO_USER
    return existing(app.index.users.get(user_id_of(request)))


def user_json(user: User) -> dict[str, Any]:
    """Return an account as its owner sees it."""
    names = ("id", "first_name", "last_name", "email", "username", "phone_number")
    return {name: getattr(user, name) for name in names}


def check_registration(app: App, request: Request) -> None:
    """Refuse a registration where they are off: 403."""
    if not app.settings.allow_registration:
        raise HTTPError(403, "Registration is off here.")


@ACCOUNTS.route("POST", "/api/auth/register", OPEN,
    {201: "User", 403: "Error: Registration is off."},
    body=REGISTRATION, before=check_registration)  # fmt: skip
@deferred("registration")
def register(app: App, request: Request) -> Response:
    """Make an account."""
    values = request.fields
    values["password"] = hash_password(values["password"])

    def add(db: Database) -> User:
        if problems := list(taken_problems(app.index.users.taken(values, db))):
            raise ValidationError(*problems)  # by another request meanwhile
        return app.index.users.add(db, values, time.time())

    return json_response(user_json(app.index.write(add)), 201)


def check_login(
    request: Request, account: str, password: str, stored: str, *, most: int = MAX_ACCOUNT_FAILURES
) -> bool:
    """Return whether a password is right; 429 after too many that were not."""
    failures, attempt = request.app.index.login_failures, secrets.token_hex(8)
    limits = {account: most, f"address {network_of(request.client)}": MAX_ADDRESS_FAILURES}
    while True:
        if wait := failures.retry_after(limits, now := time.time()):
            detail = "There were too many failed logins; try again later."
            raise HTTPError(429, detail, {"Retry-After": str(math.ceil(wait))})
        if failures.begin(attempt, limits, now):
            break
        time.sleep(LOOK_AGAIN_SECONDS)  # logins that have not ended are in the way
    with undoing(failures.withdraw, attempt):  # where there is no memory for it
        right = verify_password(password, stored)
    failures.end(attempt, account if right else None)
    return right


def login_key(user: User | None, name: str) -> str:
    """Return what failed logins count under: an account's names are one, in any case."""
    return f"account {user.id}" if user else f"name {name.casefold() if '@' in name else name}"


@ACCOUNTS.route("POST", "/api/auth/login", OPEN, {200: "Tokens"}, body=LOGIN)
@deferred("password")
def login(app: App, request: Request) -> Response:
    """Get an access and a refresh token."""
    name = request.fields.get("username") or request.fields["email"]
    user = app.index.users.find(name)
    stored = user.password if user and user.is_active else DUMMY_PASSWORD_HASH
    password = request.fields["password"]
    right = check_login(request, login_key(user, name), password, stored)
    session = begin_session(app, request, user) if user and right else None
    if user is None or session is None:
        raise unauthorized("No active account found with the given credentials")
    return json_response(sign_tokens(app, user, session))


def begin_session(app: App, request: Request, user: User) -> Session | None:
    """Return a new session of a user; None if the account was disabled or its password changed."""
    now, key, jti = time.time(), secrets.token_hex(16), secrets.token_hex(16)
    agent = printable_line(request.headers.get("user-agent", ""))[:MAX_USER_AGENT_LENGTH]
    end, address = int(now) + refresh_seconds(app), request.client
    session = Session(key, user.id, jti, now, end, now, address=address, user_agent=agent)
    opened = app.index.write(lambda db: app.index.sessions.open(db, user, session))
    return session if opened else None


def refresh_seconds(app: App) -> int:
    """Return how long a refresh token is good for."""
    return app.settings.jwt_refresh_token_lifetime_days * 86400


def sign_tokens(app: App, user: User, session: Session) -> dict[str, str]:
    """Return a new access token and the session's one refresh token, as SimpleJWT has them."""
    now = max(int(time.time()), user.tokens_from)
    about = {
        "user_id": user.id,
        "email": user.email,
        "first_name": user.first_name,
        "last_name": user.last_name,
        "permissions": user.permissions.split(),
        "is_admin": False,
        "session": session.id,
    }
    lifetime = app.settings.jwt_access_token_lifetime_minutes * 60
    access = {"exp": now + lifetime, "iat": now, "jti": secrets.token_hex(16)}
    refresh = {"exp": int(session.expires_at), "iat": int(session.rotated_at), "jti": session.jti}
    key = app.settings.jwt_signing_key
    return {
        "access": sign_jwt({"token_type": "access", **access, **about}, key),
        "refresh": sign_jwt({"token_type": "refresh", **refresh, **about}, key),
    }


def parse_refresh_token(app: App, text: str) -> RefreshToken:
    """Return a refresh token of ours by its looks, spent or not; TokenError."""
    key = app.settings.jwt_signing_key
    claims = verify_jwt(text, hs256_key=key, es256_key=None, now=time.time(), token_type="refresh")
    principal = principal_of_claims(claims)
    return RefreshToken(str(claims.get("session")), str(claims.get("jti")), principal.user_id or 0)


@ACCOUNTS.route("POST", "/api/auth/token/refresh", OPEN, {200: "Tokens"}, body=REFRESH)
def refresh_tokens(app: App, request: Request) -> Response:
    """Spend a refresh token for new tokens."""
    arrived, jti, lifetime = time.time(), secrets.token_hex(16), refresh_seconds(app)
    sessions = app.index.sessions
    try:
        token = parse_refresh_token(app, request.fields["refresh"])
        rotate = functools.partial(sessions.rotate, arrived=arrived, lifetime=lifetime)
        renewed = app.index.write(lambda db: rotate(db, token, jti))
        if renewed is None:
            raise TokenError("The refresh token is spent, or its session has ended; log in again.")
    except TokenError as error:
        raise Unauthorized(error, "RefreshToken") from None
    return json_response(sign_tokens(app, *renewed))


LOGOUT = BodySpec(ANY_BODY, (
    REFRESH.fields[0]._replace(required=False),
    Field("all", "boolean", nullable=False, help="true: end all my sessions"),
), check=one_of_fields("refresh", "all"))  # fmt: skip


@ACCOUNTS.route("POST", "/api/auth/logout", USER, {205: ""}, body=LOGOUT)
def logout(app: App, request: Request) -> Response:
    """Spend a refresh token, which ends its session, or end all my sessions."""
    sessions, user_id = app.index.sessions, user_id_of(request)
    if request.fields.get("all"):
        app.index.write(lambda db: sessions.end_all(db, user_id))
        return Response(205)
    with contextlib.suppress(TokenError):
        token = parse_refresh_token(app, request.fields["refresh"])
        if token.user_id == user_id and app.index.write(lambda db: sessions.spend(db, token)):
            return Response(205)
    return json_response({"error": "The token is not yours, or it is spent already."}, 400)


@ACCOUNTS.route("GET", "/api/auth/sessions", USER, {200: "Session[]"})
def list_sessions(app: App, request: Request) -> Response:
    """List where I am logged in, last used first."""
    found = app.index.sessions.of_user(user_id_of(request), time.time())
    return json_response([session_json(session) for session in found])


def session_json(session: Session) -> dict[str, Any]:
    """Return a login as its owner sees it."""
    return {
        "id": session.id,
        "created_at": format_time(session.created_at),
        "last_used_at": format_time(session.rotated_at),
        "address": session.address,
        "user_agent": session.user_agent,
    }


@ACCOUNTS.route("DELETE", "/api/auth/sessions/{id}", USER, {204: ""})
def end_one_session(app: App, request: Request, id: str) -> Response:
    """End one of my sessions."""
    existing(app.index.write(lambda db: app.index.sessions.end(db, user_id_of(request), id)))
    return Response(204)


@ACCOUNTS.route("GET", "/api/auth/profile", USER, {200: "User"})
def get_profile(app: App, request: Request) -> Response:
    """Tell who I am."""
    return json_response(user_json(find_account(app, request)))


@ACCOUNTS.route("POST", "/api/auth/password", USER, {204: ""}, body=PASSWORD_CHANGE)
@deferred("password")
def change_password(app: App, request: Request) -> Response:
    """Change my password and end all sessions."""
    user, values = find_account(app, request), request.fields
    key = login_key(user, user.email)
    is_right = check_login(request, key, values["old_password"], user.password)
    problems: list[FieldError] = []  # of both are told at once
    collect_declared((NEW_PASSWORD,), values, "body", problems)
    if is_right and not problems:
        password = hash_password(values["new_password"])
        is_right = app.index.write(lambda db: app.index.users.set_password(db, user, password))
    if not is_right:
        problems.append(FieldError("body", "old_password", "Wrong password."))
    if problems:
        raise ValidationError(*problems)
    return Response(204)


# Lists, in the shape of Django REST Framework's PageNumberPagination.

PAGING = (
    Field("search", help="words that name or description have, in any case"),
    Field("ordering", help="created_at, name or size, with - for descending"),
    Field("page", help="from 1; also `last`"),
    Field("page_size", help="10; more than 100 counts as 100"),
)


def read_page(query: Mapping[str, str], count: int) -> tuple[int, int, int]:
    """Return the page asked for, its size and the number of the last one; 404."""
    size = PAGE_SIZE
    if re.fullmatch(r"[0-9]{1,999}", query.get("page_size", ""), re.ASCII):
        size = min(int(query["page_size"]), MAX_PAGE_SIZE) or PAGE_SIZE
    last = max(1, -(-count // size))
    text = query.get("page") or "1"
    if text == "last":
        return last, size, last
    if not re.fullmatch(r"[0-9]{1,18}", text, re.ASCII) or not 1 <= int(text) <= last:
        raise HTTPError(404, "Invalid page.")
    return int(text), size, last


def page_url(request: Request, page: int) -> str:
    """Return the URL of this list at another page; the first needs no number."""
    pairs = [pair for pair in parse_query(request.head.query) if pair[0] != "page"]
    pairs += [("page", str(page))] if page > 1 else []
    query = urlencode(pairs, errors="surrogateescape")
    return request.url(f"{request.head.path}?{query}" if query else request.head.path)


def parse_ordering(text: str, columns: Set[str]) -> tuple[tuple[str, bool], ...]:
    """Return columns and directions; what is unknown is ignored, as Django does.

    >>> parse_ordering("-size, x,name,size", {"name", "size"})
    (('size', True), ('name', False))
    """
    order: dict[str, bool] = {}
    for term in text.split(","):
        column = term.strip().removeprefix("-")
        if column in columns:
            order.setdefault(column, term.strip().startswith("-"))
    return tuple(order.items())


def parse_search(text: str) -> tuple[str, ...]:
    """Return the folded words of a search, each once; ValidationError for too many."""
    terms = tuple(dict.fromkeys(text.casefold().split()))
    if len(terms) > MAX_SEARCH_TERMS:
        raise ValidationError(
            FieldError("query", "search", f"has more than {MAX_SEARCH_TERMS} words")
        )
    return terms


def list_owned(
    request: Request, things: OwnedTable[Record], columns: Set[str],
    show: Callable[[Record], Any], *, equal: tuple[tuple[str, str], ...] = (),
) -> Response:  # fmt: skip
    """Return a page of the caller's own things."""
    query = request.query
    order = parse_ordering(query.get("ordering", ""), columns)
    wanted = Query(user_id_of(request), equal, parse_search(query.get("search", "")), order)
    count = things.count(wanted)
    page, size, last = read_page(query, count)
    value = {
        "count": count,
        "next": page_url(request, page + 1) if page < last else None,
        "previous": page_url(request, page - 1) if page > 1 else None,
        "results": [show(thing) for thing in things.each(wanted, size, (page - 1) * size)],
    }
    return json_response(value)


# Media records.

MEDIA_PATHS = ("/api/media/media", "/api/media")
COLLECTION_PATHS = ("/api/media/collections", "/api/media/collection")
MEDIA_ORDER = frozenset({"created_at", "name", "size"})
MEDIA_FIELDS = (
    needed("name", longest=MAX_TITLE_LENGTH, trim=True, or_upload=True),
    Field("type", "text", or_upload=True, nullable=False, blank="refused", choices=KINDS),
    Field("size", "integer", minimum=0, blank="null"),
    Field("storage_path", "text", longest=MAX_NOTE_LENGTH),
    Field("description", "text", longest=MAX_DESCRIPTION_LENGTH),
    Field("collection", "text", blank="null", longest=MAX_TITLE_LENGTH),
)


def check_media_form(request: Request, values: Mapping[str, Any]) -> Iterator[FieldError]:
    """Yield what is wrong with a record's file, type or collection."""
    user_id, key = request.principal.user_id, (values.get("collection") or "").lower()
    if user_id is not None and key and not request.app.index.collections.get(user_id, key):
        yield unknown_collection(key)
    upload = request.upload
    if upload and upload.facts is None:
        yield FieldError("body", "file", NOT_MEDIA if upload.size else "The file is empty.")
    elif upload and upload.facts:
        yield from kind_problems(values, upload.facts.kind)


def unknown_collection(key: str) -> FieldError:
    """Return the problem of a collection that the account has none of."""
    return FieldError("body", "collection", f'Invalid pk "{key}" - object does not exist.')


def kind_problems(values: Mapping[str, Any], kind: str) -> Iterator[FieldError]:
    """Yield the problem of a file that is of another kind than the fields say."""
    given = values.get("type", kind)
    if given != kind:
        yield FieldError("body", "type", f'The file is of type "{kind}", not "{given}".')


RECORD_UPLOAD = UploadSpec("users", "max_media_bytes", required=False)
MEDIA_BODY = BodySpec(ANY_BODY, MEDIA_FIELDS, RECORD_UPLOAD, check=check_media_form)
NEW_MEDIA_BODY = MEDIA_BODY._replace(
    fields=tuple(item._replace(required=item.required or item.or_upload) for item in MEDIA_FIELDS)
)


def partial(spec: BodySpec) -> BodySpec:
    """Return the body of a PATCH: nothing is required."""
    return spec._replace(fields=tuple(item._replace(required=False) for item in spec.fields))


def subpaths(paths: Sequence[str], rest: str) -> tuple[str, ...]:
    """Return the paths of routes that go on behind these paths."""
    return tuple(f"{path}{rest}" for path in paths)


def record_json(request: Request, record: MediaRecord) -> dict[str, Any]:
    """Return a media record as answers show it."""
    return {
        "id": record.id,
        "user": record.user_id,
        "name": record.name,
        "type": record.type,
        "size": record.size,
        "file": file_url(request, record) if has_file(request, record) else None,
        "storage_path": record.path.partition("/")[2] if record.path else record.note,
        "description": record.description,
        "collection": record.collection_id,
        "created_at": format_time(record.created_at),
        "updated_at": format_time(record.updated_at),
    }


def has_file(request: Request, record: MediaRecord) -> bool:
    """Return whether a record has a file, or shows one that the principal may read."""
    return bool(record.path or (record.sha256 and request.may(READ)))


def file_url(request: Request, record: MediaRecord) -> str:
    """Return a URL that shows a record's file for an hour without a header, as <img> needs it."""
    expires = int(time.time()) + FILE_URL_SECONDS
    signature = sign_until(request.app.file_key, record.id, expires)
    path = f"{MEDIA_PATHS[0]}/{record.id}/file/"
    return request.url(f"{path}?expires={expires}&signature={signature}")


@ACCOUNTS.route("GET", MEDIA_PATHS, USER,
    {200: "Records", 404: "Error: Invalid page."},
    query=(Field("type", choices=KINDS, blank="not sent", help="image, video or audio"),
           *PAGING))  # fmt: skip
def list_records(app: App, request: Request) -> Response:
    """List my media records."""
    show = functools.partial(record_json, request)
    equal = tuple((name, value) for name, value in request.query.items() if name == "type")
    return list_owned(request, app.index.media, MEDIA_ORDER, show, equal=equal)


def place_upload(app: App, user_id: int, upload: Incoming) -> Located:
    """Put an uploaded file into a user's own folder."""
    day = time.strftime("uploads/%Y/%m/%d", time.gmtime())
    names = numbered_names(f"{user_id}/{day}/{safe_name(upload.filename)}")
    return store_upload(app, upload, app.users, names)


def upload_facts(request: Request) -> Facts | None:
    """Return the facts of the file that came with a request, if one did."""
    return request.upload.facts if request.upload else None


def media_changes(request: Request) -> dict[str, Any]:
    """Return the columns of a record that a request sets."""
    columns = {"storage_path": "note", "collection": "collection_id"}
    changes = {columns.get(name, name): value for name, value in request.fields.items()}
    if request.upload and request.head.method != "PATCH":
        changes.setdefault("name", safe_name(request.upload.filename))
    if changes.get("collection_id"):
        changes["collection_id"] = changes["collection_id"].lower()
    return changes


def put_record(app: App, db: Database, record: MediaRecord, placed: Located | None) -> MediaRecord:
    """Write a record, and its file where that is new; 400 for a collection of somebody else."""
    key = record.collection_id
    if key and app.index.collections.get(record.user_id, key, db) is None:
        raise ValidationError(unknown_collection(key))
    if placed:
        app.index.media.release_path(db, placed[0].path)
        app.index.files.put(db, *placed)
    app.index.media.put(db, record)
    if placed and (room := remaining_quota(app, record.user_id, db)) < 0:
        raise HTTPError(413, quota_sentence(app.settings, room + placed[0].size))
    return record


def remaining_quota(app: App, user_id: int, db: Database | None = None) -> int:
    """Return what a user may store yet; below 0 where it is too much already."""
    quota = app.settings.user_quota_bytes
    return quota - app.index.media.stored_bytes(user_id, db) if quota else MAX_BYTES


def check_quota(app: App, request: Request) -> None:
    """Bound the file that is about to come by what its user may store yet."""
    request.room = max(0, remaining_quota(app, user_id_of(request)))


@ACCOUNTS.route("POST", MEDIA_PATHS, USER,
    {201: "Record"}, body=NEW_MEDIA_BODY, before=check_quota, is_target=True)  # fmt: skip
def create_record(app: App, request: Request) -> Response:
    """Make a media record, with a file or without."""
    facts, changes, now = upload_facts(request), media_changes(request), time.time()
    key, user, kind = str(uuid.uuid4()), user_id_of(request), facts.kind if facts else ""
    empty = MediaRecord(
        key, user, "", kind, size=None, path=None, note=None, description=None,
        collection_id=None, created_at=now, updated_at=now,
    )  # fmt: skip
    record = empty._replace(**changes)
    upload = request.upload
    placed = place_upload(app, record.user_id, upload) if upload else None
    if placed:
        record = record._replace(path=placed[0].path, size=placed[0].size)
    record = app.index.write(lambda db: put_record(app, db, record, placed))
    return json_response(record_json(request, record), 201)


def find_record(app: App, request: Request, id: str) -> MediaRecord:
    """Return the caller's record; 404 for another's as for none."""
    return existing(app.index.media.get(user_id_of(request), id.lower()))


def check_record(app: App, request: Request, id: str) -> MediaRecord:
    """Find the record that is about to be changed; a new file takes the place of its old one."""
    record = find_record(app, request, id)
    freed = record.size or 0 if record.path else 0
    request.room = max(0, remaining_quota(app, record.user_id) + freed)
    return record


@ACCOUNTS.route("GET", subpaths(MEDIA_PATHS, "/{id}"), USER, {200: "Record"})
def get_record(app: App, request: Request, id: str) -> Response:
    """Get one of my media records."""
    value = record_json(request, find_record(app, request, id))
    return json_response(value)


class Stale(Exception):
    """Another request replaced the same record's file first."""


@ACCOUNTS.route("PUT", subpaths(MEDIA_PATHS, "/{id}"), USER,
    {200: "Record"}, before=check_record, body=MEDIA_BODY, name="replace_record",
    summary="Change a media record; a file replaces its file")  # fmt: skip
@ACCOUNTS.route("PATCH", subpaths(MEDIA_PATHS, "/{id}"), USER, {200: "Record"},
    before=check_record, body=partial(MEDIA_BODY))  # fmt: skip
def change_record(app: App, request: Request, id: str) -> Response:
    """Change some of a media record; a file replaces its file."""
    record = find_record(app, request, id)
    facts, changes = upload_facts(request), media_changes(request)
    if facts:
        changes["type"] = facts.kind
    elif record.path:
        if problems := list(kind_problems(request.fields, record.type)):
            raise ValidationError(*problems)
    elif request.head.method == "PUT" and "type" not in changes:
        raise ValidationError(FieldError("body", "type", "is required", "missing"))
    if record.path:
        changes.pop("size", None)
    upload = request.upload
    placed = place_upload(app, record.user_id, upload) if upload else None
    while True:
        with contextlib.suppress(Stale):
            record = write_record(app, find_record(app, request, id), changes, placed)
            return json_response(record_json(request, record))


def write_record(
    app: App, seen: MediaRecord, changes: Mapping[str, Any], placed: Located | None
) -> MediaRecord:
    """Change a record, and remove the file it had if it gets another; Stale, 404."""
    replaced = [seen.path] if placed and seen.path else []
    changes = {**changes, "updated_at": time.time()}
    if placed:
        changes |= {"path": placed[0].path, "size": placed[0].size, "sha256": None}
    gone: list[str] = []

    def apply(db: Database) -> MediaRecord:
        record = existing(app.index.media.get(seen.user_id, seen.id, db))
        if record.path != seen.path:
            raise Stale
        gone.extend(app.index.files.remove_all(db, "users", replaced))
        return put_record(app, db, record._replace(**changes), placed)

    with app.users.removing(replaced):
        changed = app.index.write(apply)
    app.thumbnails.remove(*gone)
    return changed


@ACCOUNTS.route("DELETE", subpaths(MEDIA_PATHS, "/{id}"), USER, {204: ""}, before=find_record)
def delete_record(app: App, request: Request, id: str) -> Response:
    """Delete a media record softly: its file stays on disk."""
    user, media, now = user_id_of(request), app.index.media, time.time()
    existing(app.index.write(lambda db: media.soft_delete(db, user, id.lower(), now)))
    return Response(204)


@ACCOUNTS.route("GET", subpaths(MEDIA_PATHS, "/{id}/file"), OPEN,
    {200: "file", 403: "Error: The signature is not good, or no longer."},
    query=(Field("expires"), Field("signature")))  # fmt: skip
def get_record_file(app: App, request: Request, id: str) -> Response:
    """Get the file of a media record, as its owner or by the signature in its URL."""
    if request.query and not app.settings.auth_disabled:
        record = find_signed(app, request, id)
    else:
        request.need(USER)
        record = find_record(app, request, id)
    existing(has_file(request, record))
    if not record.sha256:
        return named_response(request, app.users, existing(record.path), "no-cache")
    found = find_duplicate(app, record.sha256, "library", "entities")
    return file_response(request, existing(found, NO_FILE), "no-cache")


def find_signed(app: App, request: Request, key: str) -> MediaRecord:
    """Return the record that a file URL's signature is good for; 401, 404."""
    expires, signature = (request.query.get(name, "") for name in ("expires", "signature"))
    if not verify_until(app.file_key, key.lower(), (expires, signature), time.time()):
        raise unauthorized("The URL's signature is wrong, or has expired.")
    record = existing(app.index.media.of_anyone(key.lower()))
    request.principal = find_maker(app, record.user_id, int(expires) - FILE_URL_SECONDS)
    return record


def find_maker(app: App, user_id: int | None, made: float = math.inf) -> Principal:
    """Return who made a link or a URL and what he may do by now; 401 if he was kept out since."""
    if user_id is None:
        return OWNER
    if user_id == DEMO.user_id:
        maker = DEMO if app.settings.auth_disabled else None
    else:
        granted = Principal("maker", user_id, None, GRANTABLE, issued=made)
        maker = app.index.users.present(granted)
    if maker is None:
        raise unauthorized("The account is disabled.")
    return maker


MEMBERSHIP = BodySpec(ANY_BODY, (needed("collection_id"),))


@ACCOUNTS.route("POST", subpaths(MEDIA_PATHS, "/{id}/add-to-collection"), USER, {200: "Record"},
    before=find_record, body=MEMBERSHIP)  # fmt: skip
def add_to_collection(app: App, request: Request, id: str) -> Response:
    """Put a media record into a collection."""
    key = request.fields["collection_id"]
    return move_record(app, request, id, find_collection(app, request, key).id)


@ACCOUNTS.route("POST", subpaths(MEDIA_PATHS, "/{id}/remove-from-collection"), USER,
    {200: "Record"})  # fmt: skip
def remove_from_collection(app: App, request: Request, id: str) -> Response:
    """Take a media record out of its collection; one that shows a library file is deleted."""
    answer = move_record(app, request, id, None)
    app.index.write(lambda db: app.index.media.remove_if_uncollected(db, id.lower()))
    return answer


def move_record(app: App, request: Request, id: str, collection_id: str | None) -> Response:
    """Put a media record into a collection, or into none; return the answer."""
    seen = find_record(app, request, id)
    record = write_record(app, seen, {"collection_id": collection_id}, None)
    return json_response(record_json(request, record))


# Collections.

COLLECTION_ORDER = frozenset({"created_at", "name"})
COLLECTION_BODY = BodySpec(ANY_BODY, (
    needed("name", longest=MAX_TITLE_LENGTH, trim=True),
    Field("description", "text", longest=MAX_DESCRIPTION_LENGTH),
))  # fmt: skip


def collection_json(collection: Collection) -> dict[str, Any]:
    """Return a collection as answers show it."""
    return {
        "id": collection.id,
        "user": collection.user_id,
        "name": collection.name,
        "description": collection.description,
        "created_at": format_time(collection.created_at),
        "updated_at": format_time(collection.updated_at),
    }


def find_collection(app: App, request: Request, id: str) -> Collection:
    """Return the caller's collection; 404 for another's as for none."""
    return existing(app.index.collections.get(user_id_of(request), id.lower()))


@ACCOUNTS.route("GET", COLLECTION_PATHS, USER,
    {200: "Collections", 404: "Error: Invalid page."}, query=PAGING)  # fmt: skip
def list_collections(app: App, request: Request) -> Response:
    """List my collections."""
    return list_owned(request, app.index.collections, COLLECTION_ORDER, collection_json)


@ACCOUNTS.route("POST", COLLECTION_PATHS, USER, {201: "Collection"}, body=COLLECTION_BODY)
def create_collection(app: App, request: Request) -> Response:
    """Make a collection."""
    now, key, values = time.time(), str(uuid.uuid4()), request.fields
    name, description = values["name"], values.get("description")
    collection = Collection(key, user_id_of(request), name, description, now, now)
    app.index.write(lambda db: app.index.collections.put(db, collection))
    return json_response(collection_json(collection), 201)


@ACCOUNTS.route("GET", subpaths(COLLECTION_PATHS, "/{id}"), USER, {200: "Collection"})
def get_collection(app: App, request: Request, id: str) -> Response:
    """Get one of my collections and its media."""
    collection = find_collection(app, request, id)
    wanted = Query(collection.user_id, (("collection_id", collection.id),))

    def pieces() -> Iterator[str]:
        yield f'{to_json(collection_json(collection))[:-1]},"media":['
        for number, record in enumerate(app.index.media.each(wanted)):
            yield "," * (number > 0) + to_json(record_json(request, record))
        yield "]}"

    folder, zipped = app.settings.database_dir, accepts_gzip(request.headers)
    content = write_listing(pieces, folder, zipped=zipped)
    return long_response(request, content._replace(sha256="", cache_control="no-store"))


@ACCOUNTS.route("PUT", subpaths(COLLECTION_PATHS, "/{id}"), USER,
    {200: "Collection"}, before=find_collection, body=COLLECTION_BODY,
    name="replace_collection", summary="Change a collection")  # fmt: skip
@ACCOUNTS.route("PATCH", subpaths(COLLECTION_PATHS, "/{id}"), USER,
    {200: "Collection"}, before=find_collection, body=partial(COLLECTION_BODY))  # fmt: skip
def change_collection(app: App, request: Request, id: str) -> Response:
    """Change some of a collection."""
    changes = {**request.fields, "updated_at": time.time()}
    key = find_collection(app, request, id).id

    def apply(db: Database) -> Collection:
        current = existing(app.index.collections.get(user_id_of(request), key, db))
        changed = current._replace(**changes)
        app.index.collections.put(db, changed)
        return changed

    return json_response(collection_json(app.index.write(apply)))


@ACCOUNTS.route("DELETE", subpaths(COLLECTION_PATHS, "/{id}"), USER,
    {204: ""}, before=find_collection)  # fmt: skip
def delete_collection(app: App, request: Request, id: str) -> Response:
    """Delete a collection and keep its media."""
    existing(app.index.collections.remove(user_id_of(request), id.lower()))
    return Response(204)


@ACCOUNTS.route("POST", subpaths(COLLECTION_PATHS, "/{id}/add"), USER,
    {204: ""}, before=find_collection, body=BodySpec(("json",), (HASHES,)))  # fmt: skip
def add_pictures(app: App, request: Request, id: str) -> Response:
    """Add files of the library or the entities to one of my collections, without copies."""
    request.need(READ)
    hashes = request.fields["sha256"]
    found = [find_duplicate(app, sha256, "library", "entities") for sha256 in hashes]
    records = [shown_record(user_id_of(request), id.lower(), *existing(each)) for each in found]

    def apply(db: Database) -> None:
        collection = existing(app.index.collections.get(user_id_of(request), id.lower(), db))
        shown = app.index.media.shown_in(db, collection.user_id, collection.id)
        for record in records:
            if record.sha256 not in shown:
                app.index.media.put(db, record)

    app.index.write(apply)
    return Response(204)


def shown_record(user_id: int, collection_id: str, file: File, asset: Asset) -> MediaRecord:
    """Return a new record that shows a file of the library or the entities."""
    key, now, name = str(uuid.uuid4()), time.time(), printable(posixpath.basename(file.path))
    kind = asset.facts.kind if asset.facts else "image"
    return MediaRecord(
        key, user_id, name[:MAX_TITLE_LENGTH], kind, file.size, path=None, note=None,
        description=None, collection_id=collection_id, created_at=now, updated_at=now,
        sha256=asset.sha256,
    )  # fmt: skip


# -- Entities: versioned media entities --------------------------------------------------

NO_ENTITY = "There is no entity {}."
ENTITY_ID = (Field("id", "integer"),)
ENTITY_VERSION = (Field("version", "integer", help="as it was in this version"),)
ENTITY_TEXTS = (
    Field("label", blank="not sent"),
    Field("description", blank="not sent"),
    Field("parent_id", "integer", blank="not sent", help="a collection"),
)
ENTITY_UPLOAD = UploadSpec("entities", "max_media_bytes", "image", required=False, md5=True)
IS_COLLECTION = Field("is_collection", "boolean", blank="not sent")
ENTITY_REPLACE = BodySpec(("multipart", "form"), (IS_COLLECTION, *ENTITY_TEXTS), ENTITY_UPLOAD)


def check_entity_form(request: Request, values: Mapping[str, Any]) -> Iterable[FieldError]:
    """Refuse what no content could mend: 400."""
    has_upload = request.has_upload or request.upload is not None
    check_place(request.app, Entity(**values), has_upload=has_upload)
    return ()


ENTITY_CREATE = ENTITY_REPLACE._replace(
    fields=(IS_COLLECTION._replace(default=False), *ENTITY_TEXTS), check=check_entity_form
)
ENTITY_PATCH = BodySpec(("json",), (
    Field("label"),
    Field("description"),
    Field("parent_id", "integer", help="a collection"),
    Field("is_deleted", "boolean", nullable=False),
), wrapper="body")  # fmt: skip
ENTITY_LIST = (
    Field("page", "integer", default=1, minimum=1),
    Field("page_size", "integer", default=20, minimum=1, maximum=100),
    Field("version", "integer", help="each entity's version of this number"),
    Field("filter_param", help="key=value pairs with commas"),
    Field("search_query", help="in label or description, any case"),
)
MAX_ENTITY_TEXTS = 4000  # kept, of 1 KB or so
ENTITY_FILTERS = {  # the column and type of each key
    "type": ("kind", "string"),
    "mime_type": ("mime_type", "string"),
    "extension": ("extension", "string"),
    "parent_id": ("parent_id", "integer"),
    "is_collection": ("is_collection", "boolean"),
    "is_deleted": ("is_deleted", "boolean"),
}


@ENTITIES.route("GET", "/entity/", READ, {200: "Items"}, query=ENTITY_LIST)
def list_entities(app: App, request: Request) -> Response:
    """List a page of the entities."""
    query = request.query
    page, size = query["page"], query["page_size"]
    filters = parse_filters(query.get("filter_param", ""))
    text = query.get("search_query", "")
    offset = min((page - 1) * size, MAX_BYTES)
    version = query.get("version")
    rows, count = app.index.entities.page(version, filters, text, limit=size, offset=offset)
    pages = -(-count // size)
    pagination = {
        "page": page,
        "page_size": size,
        "total_items": count,
        "total_pages": pages,
        "has_next": page < pages,
        "has_prev": page > 1,
    }
    items = ",".join(entity_texts(app, rows, version))
    return text_response(f'{{"items":[{items}],"pagination":{to_json(pagination)}}}')


def entity_texts(app: App, rows: Sequence[tuple[int, int]], version: int | None) -> list[str]:
    """Return entities as JSON text by ids and transactions: what one wrote never changes."""
    texts = {row[0]: app.entity_texts.get(row) for row in rows}
    missing = [id for id, text in texts.items() if text is None]
    found = app.index.entities.get_many(missing, version) if missing else []
    texts.update((entity.id, to_json(entity_json(entity))) for entity in found)
    if len(app.entity_texts) + len(found) > MAX_ENTITY_TEXTS:
        app.entity_texts.clear()
    app.entity_texts.update(((e.id, e.transaction_id), texts[e.id] or "") for e in found)
    return list(filter(None, texts.values()))


def parse_filters(text: str) -> dict[str, Any]:
    """Return columns and values of `key=value` pairs with commas; `null` finds what has none."""
    filters: dict[str, Any] = {}
    for pair in filter(str.strip, text.split(",")):
        key, equals, value = (part.strip() for part in pair.partition("="))
        column, kind = ENTITY_FILTERS.get(key, ("", ""))
        if not equals or not column or column in filters:
            message = f"{pair.strip()!r} is not one key=value of {', '.join(ENTITY_FILTERS)}"
            raise ValidationError(FieldError("query", "filter_param", message))
        if value.lower() == "null" and kind != "boolean":
            filters[column] = None
        else:
            filters[column] = parse_value(Field("filter_param", kind), value.lower(), "query")
    return filters


@ENTITIES.route("POST", "/entity/", WRITE,
    {201: "Item", 409: "Error: The same content is stored."},
    body=ENTITY_CREATE, is_target=True)  # fmt: skip
def create_entity(app: App, request: Request) -> Response:
    """Create an entity."""
    draft = Entity(**request.fields)
    entity = save_entity(app, request.upload, lambda db: draft)
    location = request.reference(f"/entity/{entity.id}")
    return json_response(entity_json(entity), 201, {"Location": location})


@ENTITIES.route("GET", "/entity/{id}", READ, {200: "Item"},
    parameters=ENTITY_ID, query=ENTITY_VERSION)  # fmt: skip
def get_entity(app: App, request: Request, id: int) -> Response:
    """Get an entity."""
    return json_response(entity_json(find_entity(app, id, request.query.get("version"))))


def current_entity(app: App, request: Request, id: int) -> Entity:
    """Return the entity that is to be changed; 404."""
    return find_entity(app, id)


@ENTITIES.route("PUT", "/entity/{id}", WRITE,
    {200: "Item", 409: "Error: The same content is stored."},
    parameters=ENTITY_ID, body=ENTITY_REPLACE, before=current_entity)  # fmt: skip
def replace_entity(app: App, request: Request, id: int) -> Response:
    """Replace an entity."""
    fields = request.fields
    texts: dict[str, Any] = {item.name: fields.get(item.name) for item in ENTITY_TEXTS}

    def draft(db: Database | None) -> Entity:
        current = find_entity(app, id, db=db)
        if fields.get("is_collection", current.is_collection) != current.is_collection:
            raise HTTPError(400, "is_collection cannot be changed.")
        return current._replace(**texts)

    return json_response(entity_json(save_entity(app, request.upload, draft)))


@ENTITIES.route("PATCH", "/entity/{id}", WRITE,
    {200: "Item"}, parameters=ENTITY_ID, body=ENTITY_PATCH, before=current_entity)  # fmt: skip
def patch_entity(app: App, request: Request, id: int) -> Response:
    """Change, move, soft-delete or restore an entity."""

    def draft(db: Database | None) -> Entity:
        return find_entity(app, id, db=db)._replace(**request.fields)

    return json_response(entity_json(save_entity(app, None, draft)))


@ENTITIES.route("DELETE", "/entity/{id}", WRITE,
    {200: "Item"}, parameters=ENTITY_ID, before=current_entity)  # fmt: skip
def delete_entity(app: App, request: Request, id: int) -> Response:
    """Delete an entity for good."""

    def forget(db: Database) -> tuple[Entity, list[str]]:
        return find_entity(app, id, db=db), app.index.entities.remove(db, id, time.time())

    return json_response(entity_json(remove_for_good(app, app.entities, forget)))


@ENTITIES.route("GET", "/entity/{id}/versions", READ, {200: "Item[]"}, parameters=ENTITY_ID)
def list_versions(app: App, request: Request, id: int) -> Response:
    """List all versions, the oldest first."""
    versions = existing(app.index.entities.versions(id), NO_ENTITY.format(id))
    names = ("version", "transaction_id")
    return json_response([{n: getattr(e, n) for n in names} | entity_json(e) for e in versions])


@ENTITIES.route("GET", "/entity/{id}/file", READ, {200: "file"},
    parameters=ENTITY_ID, query=ENTITY_VERSION)  # fmt: skip
def get_entity_file(app: App, request: Request, id: int) -> Response:
    """Get an entity's content."""
    entity = find_entity(app, id, request.query.get("version"))
    found = app.index.files.get("entities", entity.path) if entity.path else None
    return file_response(request, existing(found, NO_FILE), "no-cache")


def find_entity(
    app: App, id: int, version: int | None = None, db: Database | None = None
) -> Entity:
    """Return an entity, or one of its versions; 404 if there is none."""
    missing = NO_ENTITY.format(id if version is None else f"{id} with a version {version}")
    return existing(app.index.entities.get(id, version, db), missing)


def save_entity(
    app: App, upload: Incoming | None, draft: Callable[[Database | None], Entity]
) -> Entity:
    """Write what `draft` makes of the current version, with the upload as its content."""
    # It is asked twice: nothing is stored for what will be refused, and the transaction decides.
    content: Located | None = None

    def put(db: Database) -> Entity:
        nonlocal content  # after a full disk this runs again, with what it has stored
        entity = draft(db)
        check_entity(app, entity, upload, db)
        if upload and content:
            file, asset = content
            if not upload.kept and app.index.files.known_hash(db, file) != file.sha256:
                file, asset = content = store_entity_file(app, upload)  # its last has just gone
            app.index.files.put(db, file, asset)
            entity = entity._replace(path=file.path, asset=asset)
        return app.index.entities.put(db, entity, time.time())

    if upload is None:
        return app.index.write(put)
    with app.data.content_lock(upload.sha256):
        check_entity(app, draft(None), upload)
        content = find_duplicate(app, upload.sha256, "entities") or store_entity_file(app, upload)
        return app.index.write(put)


def check_entity(
    app: App, entity: Entity, upload: Incoming | None, db: Database | None = None
) -> None:
    """Refuse a version that cannot be: 400, or 409 for another one's content."""
    check_place(app, entity, db, has_upload=upload is not None)
    if not (entity.is_collection or upload or entity.asset):
        raise HTTPError(400, "An entity that is no collection needs an image.")
    if upload and upload.facts is None:
        raise HTTPError(400, NOT_MEDIA if upload.size else "The file is empty.")
    holder = app.index.entities.with_content(upload.sha256, db) if upload else None
    if upload and holder not in {None, entity.id}:
        raise HTTPError(409, f"Entity {holder} has the same content (md5 {upload.md5}).")


def check_place(app: App, entity: Entity, db: Database | None = None, *, has_upload: bool) -> None:
    """Refuse a collection's image, and a parent that is none or is below its child (400).

    A parent may be softly deleted.
    """
    if entity.is_collection and has_upload:
        raise HTTPError(400, "A collection has no image.")
    id, entities = entity.parent_id, app.index.entities
    if id is None:
        return
    parent = entities.get(id, db=db)
    if parent is None:
        raise HTTPError(400, f"The parent {id} does not exist.")
    if not parent.is_collection:
        raise HTTPError(400, f"The parent {id} is no collection.")
    if entity.is_collection and entities.is_within(id, entity.id, db):
        raise HTTPError(400, f"The parent {id} is in this collection: that would be a circle.")


def store_entity_file(app: App, upload: Incoming) -> Located:
    """Store the file of an entity under its day and MD5; return where it lies."""
    assert upload.facts is not None
    day = time.strftime("%Y/%m/%d", time.gmtime())
    names = numbered_names(f"{day}/{upload.md5}.{upload.facts.extension}")
    return store_upload(app, upload, app.entities, names, is_first=True)


def entity_json(entity: Entity) -> dict[str, Any]:
    """Return the Item of document 004."""
    asset, facts = entity.asset, entity.asset.facts if entity.asset else None
    created = facts.created if facts else None
    return {
        "id": entity.id,
        "is_collection": entity.is_collection,
        "label": entity.label,
        "description": entity.description,
        "parent_id": entity.parent_id,
        "added_date": format_time(entity.added, "auto"),
        "updated_date": format_time(entity.updated, "auto"),
        "create_date": None if created is None else format_time(created, "auto"),
        "file_size": asset.size if asset else None,
        "height": facts.height if facts else None,
        "width": facts.width if facts else None,
        "duration": facts.duration if facts else None,
        "mime_type": facts.mime_type if facts else None,
        "type": facts.kind if facts else None,
        "extension": facts.extension if facts else None,
        "md5": asset.md5 if asset else None,
        "file_path": entity.path,
        "is_deleted": entity.is_deleted,
    }


# -- Shares: links for who has no account ------------------------------------------------
# A link shows files and nothing else. It names what is shared, so what is added to a folder, a
# collection or an entity shows, too. Whether it is good, and its password, are looked at anew
# for every file.

SHARE_SECONDS = 30 * 86400
SHARE_COOKIE = "mediaserver_share"
SHARE_COOKIE_SECONDS = 12 * 3600
MAX_SHARED = 1000  # files that one link lists
MAX_SHARE_FAILURES = 200  # wrong passwords within FAILURE_SECONDS, which takes ten addresses
SHARE_KINDS = ("file", "folder", "entity", "media", "collection")
NEW_SHARE = BodySpec(ANY_BODY, (
    Field("kind", choices=SHARE_KINDS, required=True, nullable=False),
    needed("target", longest=MAX_NOTE_LENGTH,
           help="SHA-256, path below STORAGE_DIR, or id of the record, collection or entity"),
    Field("title", "text", longest=MAX_TITLE_LENGTH),
    Field("password", "text", blank="null", longest=MAX_PASSWORD_LENGTH),
    Field("strip", "boolean", default=False, nullable=False,
          help="send pictures, MP4 and MOV without GPS and camera data, and nothing else"),
    Field("upload", "boolean", default=False, nullable=False,
          help="guests may add pictures and videos to a folder or collection"),
    Field("expires_in", "integer", default=SHARE_SECONDS, minimum=0, maximum=10**9,
          nullable=False, help="seconds; 0: the link has no end"),
))  # fmt: skip
SHARE_PASSWORD = BodySpec(ANY_BODY, (password_field("password"),))
SHARE_TEXTS: Mapping[str, Mapping[str, str]] = {
    "en": {
        "lang": "en", "pictures": "Pictures", "password": "Password", "open": "Open", "add": "Add",
        "file": "Picture or video", "left": "{} files of other types are left out.",
        "more": "There are more: these are the first {}.",
        "wrong": "That is not the link's password.",
    },
    "de": {
        "lang": "de", "pictures": "Bilder", "password": "Passwort", "open": "Öffnen",
        "add": "Hinzufügen", "file": "Bild oder Video",
        "left": "{} Dateien anderer Art werden nicht gezeigt.",
        "more": "Es gibt mehr: das sind die ersten {}.", "wrong": "Das ist nicht das Passwort.",
    },
}  # fmt: skip
SHARE_PAGE = """<!doctype html>
<html lang="{lang}"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="robots" content="noindex"><title>{title}</title><link rel="icon" href="data:,">
<style>
 :root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }}
 body {{ margin: 2rem auto; max-width: 70rem; padding: 0 1rem }}
 ul {{ display: grid; gap: .5rem; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr));
  list-style: none; padding: 0 }}
 a {{ aspect-ratio: 1; display: grid; place-items: center; overflow: hidden; color: inherit;
  border-radius: .5rem; background: #8883; overflow-wrap: anywhere; min-height: 0 }}
 img {{ width: 100%; height: 100%; min-height: 0; object-fit: cover }}
 form {{ display: flex; flex-wrap: wrap; gap: .5rem; align-items: center }}
 input, button {{ font: inherit; padding: .5rem .9rem; border: 1px solid #8888;
  border-radius: 2rem; max-width: 100%; box-sizing: border-box }}
 button {{ background: #0b6b62; color: #fff; border: 0; font-weight: 600 }}
</style>
<header><h1>{title}</h1></header>
<main>{content}</main>
"""
SHARE_PAGE_POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; form-action 'self';"
    " frame-ancestors 'none'"
)
PASSWORD_FORM = """<p role="alert">{said}</p><form method="post"><label>{password}
<input type="password" name="password" required autofocus></label> <button>{open}</button></form>
"""
ADD_FORM = """<form method="post" action="{url}" enctype="multipart/form-data">
<input type="file" name="file" accept="image/*,video/*" aria-label="{file}" required>
<button>{add}</button></form>
"""


def check_target(request: Request, kind: str, target: str) -> Share:
    """Return what is to be shared, if the caller may share it and it is there; 400, 403, 404.

    It `takes` files where there can be more of them.
    """
    app, owner = request.app, request.principal.user_id
    if kind in {"media", "collection"}:
        request.need(USER)
        takes = int(kind == "collection")
        found = (find_collection if takes else find_record)(app, request, target)
        return Share("", owner, kind, "users", found.id, takes=takes)
    request.need(READ)
    request.need(WRITE)
    if kind == "file":
        file, _ = find_content(request, check_sha256(target))
        return Share("", owner, kind, file.root, file.sha256)
    if kind == "folder":
        path = target.strip("/")
        is_empty = app.index.files.is_empty("library", f"{path}/")
        if is_empty or (app.library.is_local(f"{path}/") and app.library.is_gone(path)):
            raise HTTPError(404, "There is nothing in this folder.")
        return Share("", owner, kind, "library", path, takes=1)
    entity = find_entity(
        app, parse_value(Field("target", "integer", nullable=False), target, "body")
    )
    if entity.is_deleted:
        raise HTTPError(404, "This entity is deleted.")
    return Share("", owner, kind, "entities", str(entity.id), takes=int(entity.is_collection))


@SHARES.route("POST", "/shares", BEARER,
    {201: "Share", 404: "Error: There is no such thing to share."}, body=NEW_SHARE)  # fmt: skip
@deferred("password")
def create_share(app: App, request: Request) -> Response:
    """Make a link to files, for who has no account."""
    values, now = request.fields, time.time()
    shared = check_target(request, values["kind"], values["target"])
    if values["upload"] and not shared.takes:
        raise ValidationError(FieldError("body", "upload", "is for folders and collections"))
    if values["strip"] and not shared.takes:
        shared = shared._replace(strips=1)
        if not any(may_show(shared, asset) for _, asset in shared_files(app, shared)):
            reason = "cannot be: only pictures, MP4 and MOV are sent without camera data"
            raise ValidationError(FieldError("body", "strip", reason))
    password, seconds = values.get("password"), values["expires_in"]
    share = shared._replace(
        id=secrets.token_urlsafe(16),
        title=values.get("title") or "",
        strips=int(values["strip"]),
        takes=int(values["upload"]),
        password=hash_password(password) if password else None,
        created_at=now,
        expires_at=now + seconds if seconds else None,
    )
    app.index.shares.add(share, now)
    location = request.reference(f"/s/{share.id}")
    return json_response(share_json(request, share), 201, {"Location": location})


def share_json(request: Request, share: Share) -> dict[str, Any]:
    """Return a share as its owner sees it."""
    return {
        "id": share.id,
        "url": request.url(f"/s/{share.id}"),
        "kind": share.kind,
        "target": share.target,
        "title": share.title,
        "strip": bool(share.strips),
        "upload": bool(share.takes),
        "has_password": share.password is not None,
        "created_at": format_time(share.created_at),
        "expires_at": share.expires_at and format_time(share.expires_at),
    }


def whose_shares(request: Request) -> tuple[int | None, bool]:
    """Return whose links may be listed and ended, None for the owner's; and whether all may."""
    if request.principal.user_id is None:
        request.need(WRITE)
    return request.principal.user_id, request.principal.is_admin


@SHARES.route("GET", "/shares", BEARER, {200: "Share[]"})
def list_shares(app: App, request: Request) -> Response:
    """List my links; an administrator's are all."""
    shares = app.index.shares.all(time.time(), *whose_shares(request))
    return json_response([share_json(request, share) for share in shares])


@SHARES.route("DELETE", "/shares/{id}", BEARER, {204: ""})
def end_share(app: App, request: Request, id: str) -> Response:
    """End a link."""
    existing(app.index.shares.remove(id, *whose_shares(request)))
    return Response(204)


def find_share(request: Request, id: str) -> Share:
    """Return a link that its maker could make now; 404 for one that is over as for none."""
    share, maker = request.app.index.shares.get(id, time.time()), copy.copy(request)
    try:
        found = existing(share)
        maker.principal = find_maker(request.app, found.owner)
        return found._replace(root=check_target(maker, found.kind, found.target).root)
    except HTTPError:
        raise HTTPError(404, "There is nothing at this link.") from None


def knows_password(request: Request, share: Share) -> bool:
    """Return whether the request has the cookie of who told the password, if the link has one."""
    if share.password is None:
        return True
    cookies = request.headers.get("cookie", "")
    found = re.findall(rf"\b{SHARE_COOKIE}=([0-9]+)\.([\w-]+)", cookies, re.ASCII)
    what, now = f"{share.id} {share.password}", time.time()  # another password ends it
    return any(verify_until(request.app.share_key, what, signed, now) for signed in found)


def need_share_password(request: Request, share: Share) -> None:
    """Refuse who has not given the password that a share has: 401."""
    if not knows_password(request, share):
        raise unauthorized("POST the link's password to its URL, as the field password.")


def share_page(
    share: Share, texts: Mapping[str, str], content: str, status: int = 200
) -> Response:
    """Return an answer with a page of a share, which no other site may show or learn of."""
    headers = {
        "Content-Type": HTML_TYPE,
        "Content-Security-Policy": SHARE_PAGE_POLICY,
        "Referrer-Policy": "no-referrer",
        "Vary": "Accept, Accept-Language",
        **NO_STORE,
    }
    title = html.escape(share.title or texts["pictures"])
    page = SHARE_PAGE.format(**texts, title=title, content=content)
    return Response(status, headers, page.encode())


@SHARES.route("GET", "/s/{token}", OPEN, {200: "Shared or page"})
def open_share(app: App, request: Request, token: str) -> Response:
    """Get what a link shows: a page for browsers."""
    share = find_share(request, token)
    texts = SHARE_TEXTS[choose_language(request.headers, SHARE_TEXTS)]
    if request.is_for_browser and not knows_password(request, share):
        return share_page(share, texts, PASSWORD_FORM.format(**texts, said=""), 401)
    need_share_password(request, share)
    found = shared_files(app, share, limit=MAX_SHARED + 1)
    has_more = len(found) > MAX_SHARED
    shown = [each for each in found[:MAX_SHARED] if may_show(share, each[1])]
    files = [shared_json(request, share, *each) for each in shown]
    left = len(found) - has_more - len(files)
    if request.is_for_browser:
        url = request.reference(f"/s/{share.id}/upload")
        form = ADD_FORM.format(**texts, url=url) if share.takes else ""
        notes = f"<p>{texts['left'].format(left)}</p>" if left else ""
        notes += f"<p>{texts['more'].format(MAX_SHARED)}</p>" if has_more else ""
        tiles = "".join(map(shared_html, files))
        return share_page(share, texts, f"{form}<ul>{tiles}</ul>{notes}")
    expires = share.expires_at and format_time(share.expires_at)
    value = {"title": share.title, "expires_at": expires, "files": files, "left_out": left}
    return json_response({**value, "has_more": has_more}, headers={"Vary": "Accept"})


def shared_files(app: App, share: Share, **which: Any) -> list[Located]:
    """Return what a link shows, of what its maker may still read."""
    reads = allows(READ, find_maker(app, share.owner), app.settings.read_auth_enabled)
    return app.index.shares.files(share, reads=reads, **which)


def may_show(share: Share, asset: Asset) -> bool:
    """Return whether a file can be sent as the share promises."""
    facts = asset.facts
    return not share.strips or (
        facts is not None and (facts.kind == "image" or facts.extension in PATCHERS)
    )


def shared_id(app: App, share: Share, sha256: str, *, back: bool = False) -> str:
    """Return a file's name in a link: its hash, which is told of what is sent whole."""
    if not share.strips:
        return sha256
    return encrypt_hash(_hmac_sha256(app.share_key, _utf8(f"files {share.id}")), sha256, back=back)


def shared_json(request: Request, share: Share, file: File, asset: Asset) -> dict[str, Any]:
    """Return a shared file as those with the link see it."""
    app = request.app
    url = request.url(f"/s/{share.id}/{shared_id(app, share, file.sha256)}")
    facts = asset.facts
    has_thumbnail = facts and app.thumbnails.can_make(facts.kind, facts.mime_type)
    return {
        "name": printable(posixpath.basename(file.path)),
        "type": asset.mime_type,
        "size": None if share.strips else file.size,
        "url": url,
        "thumbnail": f"{url}?thumbnail=true" if has_thumbnail else None,
    }


def shared_html(file: Mapping[str, Any]) -> str:
    """Return the HTML link to a file, with its thumbnail or else its name."""
    name, url = html.escape(file["name"]), html.escape(file["url"])
    if file["thumbnail"]:
        name = f'<img src="{html.escape(file["thumbnail"])}" alt="{name}" loading="lazy">'
    return f'<li><a href="{url}">{name}</a></li>'


@SHARES.route("POST", "/s/{token}", OPEN, {303: ""}, body=SHARE_PASSWORD, reads=True)
@deferred("password")
def unlock_share(app: App, request: Request, token: str) -> Response:
    """Open a link that has a password, with it."""
    share = find_share(request, token)
    given, stored = request.fields["password"], share.password or DUMMY_PASSWORD_HASH
    key, most = f"share {share.id}", MAX_SHARE_FAILURES
    texts = SHARE_TEXTS[choose_language(request.headers, SHARE_TEXTS)]
    if not check_login(request, key, given, stored, most=most):
        wrong = unauthorized(SHARE_TEXTS["en"]["wrong"])
        if not request.is_for_browser:
            raise wrong
        log_refusal(request, wrong)
        form = PASSWORD_FORM.format(**texts, said=texts["wrong"])
        return share_page(share, texts, form, 401)
    expires = int(time.time()) + SHARE_COOKIE_SECONDS
    path, what = f"/s/{share.id}", f"{share.id} {share.password}"
    value = f"{SHARE_COOKIE}={expires}.{sign_until(app.share_key, what, expires)}"
    cookie = format_cookie(request.url(path), value, SHARE_COOKIE_SECONDS, "Lax")
    return Response(303, {"Location": request.reference(path), "Set-Cookie": cookie})


def check_guest(app: App, request: Request, token: str) -> Share:
    """Return the link, if who has it may add to its folder; 401, 403, 404."""
    share = find_share(request, token)
    need_share_password(request, share)
    if not share.takes:
        raise HTTPError(403, "This link shows files, but takes none.")
    return share


def open_guest_form(request: Request, token: str) -> BodyReader | None:
    """Read a guest's form, whose file goes where the link's others are; 401, 403, 404, 413."""
    share = check_guest(request.app, request, token)
    if share.kind == "collection" and share.owner is not None:
        request.room = max(0, remaining_quota(request.app, share.owner))
    return open_body(request, BodySpec(("multipart",), upload=GUEST_UPLOADS[share.kind]), {})


GUEST_UPLOADS = {
    "folder": UploadSpec("library", "max_upload_bytes"),
    "collection": RECORD_UPLOAD._replace(required=True),
    "entity": ENTITY_UPLOAD._replace(required=True, name="file"),
}


@SHARES.route("POST", "/s/{token}/upload", OPEN,
    {201: "SharedFile", 303: ""},
    body=BodySpec(("multipart",), upload=GUEST_UPLOADS["folder"],
                  reader=open_guest_form))  # fmt: skip
def add_to_share(app: App, request: Request, token: str) -> Response:
    """Add a picture or video to what a link shows."""
    share, incoming = check_guest(app, request, token), request.upload
    assert incoming is not None
    if incoming.facts is None or incoming.facts.kind == "audio":
        raise HTTPError(400, "The file is no image or video." if incoming.size else "It is empty.")
    add = add_to_folder if share.kind == "folder" else add_for_maker
    file, asset = add(request, share, incoming)
    if request.is_for_browser:
        return Response(303, {"Location": request.reference(f"/s/{share.id}")})
    return json_response(shared_json(request, share, file, asset), 201)


def add_to_folder(request: Request, share: Share, incoming: Incoming) -> Located:
    """Put a guest's file into a folder of the library."""
    app = request.app
    assert incoming.facts is not None
    name = safe_name(incoming.filename)
    if not is_media_name(os.fsencode(name)):
        name = safe_name(f"{name}.{incoming.facts.extension}")  # or no scan would find it
    placed = ingest(app, incoming, app.library, numbered_names(f"{share.target}/{name}"))
    app.renditions.wanted.set()
    return placed


def add_for_maker(request: Request, share: Share, incoming: Incoming) -> Located:
    """Make a record or an entity of a guest's file, as if the link's maker had sent it."""
    app, sent = request.app, copy.copy(request)
    sent.principal = find_maker(app, share.owner)
    try:
        if share.kind == "collection":
            sent.fields = {"collection": share.target}
            create_record(app, sent)
        else:
            sent.fields = {"label": safe_name(incoming.filename), "parent_id": int(share.target)}
            create_entity(app, sent)
    except HTTPError as error:
        if error.status == 409:  # whose it is, is no guest's business
            raise HTTPError(409, "This picture is here already.") from None
        raise
    return existing(next(iter(shared_files(app, share, sha256=incoming.sha256)), None), NO_FILE)


@SHARES.route("GET", "/s/{token}/{n}", OPEN, {200: "file"},
    query=(Field("thumbnail", "boolean", help="a PNG that fits 256 × 256"),))  # fmt: skip
def get_shared(app: App, request: Request, token: str, n: str) -> Answer:
    """Get a file of a link, by its SHA-256 or what the link names it by instead."""
    share, id = find_share(request, token), check_sha256(n)
    need_share_password(request, share)
    found = shared_files(app, share, sha256=shared_id(app, share, id, back=True))
    file, asset = existing(next(filter(None, map(app.scanner.current, found)), None), NO_FILE)
    if not may_show(share, asset):
        raise HTTPError(404, NO_FILE)
    if request.query.get("thumbnail"):
        work = functools.partial(thumbnail_response, request, file, asset, by_link=True)
        return Deferred("decoder", work) if asset.thumbnail is None else work()
    if share.strips:
        return Deferred("decoder", functools.partial(stripped_response, request, file, asset))
    return file_response(request, (file, asset), "no-cache", by_link=True)


def stripped_response(request: Request, file: File, asset: Asset) -> Response:
    """Answer with a file that does not say where, when and with what it was taken; 404, 503."""
    facts = asset.facts
    assert facts is not None  # as may_show has it
    try:
        content = patch_file(request.app, file, facts)
    except ValueError:
        if facts.kind != "image":
            detail = "This file cannot be sent without what it says of its making."
            raise HTTPError(404, detail) from None
        largest = Rendition("JPEG", PREVIEW_SIZES[-1])  # which says nothing either
        preview = make_rendition(request.app, file, asset, largest)
        content = rendered_content(request.app, file, preview)
    content = content._replace(cache_control="private, no-cache", last_modified=None)
    return long_response(request, content)


def patch_file(app: App, file: File, facts: Facts) -> Content:
    """Return a file with patches over what it says of its making; ValueError, 404."""
    with app.disk(file.root):
        try:
            source = app.folders[file.root].open(file.path)
        except Unavailable:
            raise
        except (OSError, ValueError):
            raise HTTPError(404, NO_FILE) from None
        with undoing(source.close):
            patches, end = find_patches(source, file.size, facts)
            if not file.matches(os.fstat(source.fileno())):
                raise FileChanged
    digest = _hmac_sha256(app.share_key, repr((file.sha256, patches)).encode()).hex()
    return Content(source, end, facts.mime_type, digest, None, "", patches=patches)


# -- Trash -------------------------------------------------------------------------------
# What is softly deleted comes back, or goes for good: by the owner's commands, by who may change
# it, and after TRASH_DAYS by itself.

TRASH_SECONDS = 3600.0  # between two looks for what has been there long enough


def restore_trashed(app: App, id: str) -> bool:
    """Bring a media record or an entity back as it was; return whether it was in the trash."""
    trashed = app.index.trash.get(id)
    if trashed is None or trashed.kind == "media":
        return trashed is not None and app.index.media.restore(id, time.time())

    def draft(db: Database | None) -> Entity:
        return find_entity(app, int(id), db=db)._replace(is_deleted=False)

    save_entity(app, None, draft)
    return True


def empty_trash(app: App, until: float) -> list[Trashed]:
    """Remove for good what was deleted before a time; return what went."""
    removed = [remove_trashed(app, trashed, until) for trashed in app.index.trash.all(until)]
    return list(filter(None, removed))


def remove_trashed(app: App, trashed: Trashed, until: float) -> Trashed | None:
    """Remove what is still in the trash, with the files that nothing else needs; return it."""

    def forget(db: Database) -> tuple[Trashed | None, list[str]]:
        now = app.index.trash.get(trashed.id, db)
        if now is None or now.deleted_at >= until:
            return None, []  # it was restored meanwhile
        if now.kind == "media":
            return now, app.index.media.remove(db, now.id)
        return now, app.index.entities.remove(db, int(now.id), time.time())

    folder = app.users if trashed.kind == "media" else app.entities
    return remove_for_good(app, folder, forget)


def empty_old_trash(app: App) -> None:
    """Remove what was deleted TRASH_DAYS ago, unless the clock has just jumped."""
    if app.index.trash.is_clock_steady(now := time.time()):
        empty_trash(app, now - app.settings.trash_days * 86400)


def is_trash_of(request: Request, trashed: Trashed) -> bool:
    """Return whether the caller may change what is in the trash: own records, or entities."""
    if trashed.kind == "media":
        return trashed.user_id == request.principal.user_id
    return request.may(WRITE)


def find_trashed(app: App, request: Request, id: str) -> Trashed:
    """Return what is in the caller's trash under an id; 404 if nothing is."""
    trashed = app.index.trash.get(id.lower())
    return existing(trashed if trashed and is_trash_of(request, trashed) else None)


@TRASH.route("POST", "/trash/{id}/restore", BEARER, {204: ""})
def restore_one(app: App, request: Request, id: str) -> Response:
    """Bring back a media record of mine or an entity."""
    restore_trashed(app, find_trashed(app, request, id).id)
    return Response(204)


@TRASH.route("DELETE", "/trash/{id}", BEARER, {204: ""})
def remove_one(app: App, request: Request, id: str) -> Response:
    """Remove one thing in my trash for good."""
    existing(remove_trashed(app, find_trashed(app, request, id), math.inf))
    return Response(204)


@TRASH.route("DELETE", "/trash", BEARER, {204: ""})
def empty_my_trash(app: App, request: Request) -> Response:
    """Empty my trash: my media records, and the entities if I may change them."""
    for trashed in app.index.trash.all():
        if is_trash_of(request, trashed):
            remove_trashed(app, trashed, math.inf)
    return Response(204)


# -- Files: uploads that can be resumed --------------------------------------------------
# Each family's `is_target` route takes files that come in parts, too: its checks are made at the
# beginning, as far as they need no content, and its handler gets the whole. Both protocols work
# on one kind of upload.

TUS_EXTENSIONS = (
    "creation,creation-defer-length,creation-with-upload,expiration,checksum,termination"
)
TUS_CONTENT, DRAFT_CONTENT = "application/offset+octet-stream", "application/partial-upload"
UPLOAD_FIELDS = (
    Field("Tus-Resumable", choices=(TUS_VERSION,), help="tus; without it, the IETF draft"),
    Field("Upload-Offset", "integer", help="where the content begins"),
    Field("Upload-Length", "integer", help="bytes of the whole file"),
    Field("Upload-Checksum", help="tus: an algorithm and the content's hash in Base64"),
    Field("Upload-Complete", choices=("?0", "?1"), help="the draft: whether this is the end"),
)
NEW_UPLOAD_FIELDS = (
    *UPLOAD_FIELDS,
    Field("Upload-Metadata", help="names with values in Base64: target, filename, fields"),
    Field("Upload-Defer-Length", choices=("1",), help="tus: the length comes later"),
)
TARGETS = {item.family.name: item for item in ROUTES if item.is_target}


def find_target(request: Request, family: str) -> Route:
    """Return the route that a file is for; 403 as there, 400 where there is none."""
    target = TARGETS.get(family)
    if target is None:
        raise HTTPError(400, f"Upload-Metadata must have a target: {', '.join(TARGETS)}.")
    request.family = family
    request.need(target.access)
    return target


def form_of(target: Route) -> tuple[BodySpec, UploadSpec]:
    """Return what the body of an upload's route has, and which of it is the file."""
    assert target.body is not None and target.body.upload is not None
    return target.body, target.body.upload


def max_size(app: App, target: Route) -> int:
    """Return how many bytes a file for a route may have."""
    size: int = getattr(app.settings, form_of(target)[1].limit)
    return size


def owner_of(request: Request) -> str:
    """Return who may go on with what the caller begins, and in whose number it counts."""
    principal = request.principal
    if principal.user_id is not None:
        return f"user {principal.user_id}"
    if principal.subject is not None:
        return f"subject {principal.subject}"
    return f"address {network_of(request.client)}"


def find_upload(app: App, request: Request, id: str) -> OpenUpload:
    """Return an upload of the caller's; 404 for another's as for none, 412 for another tus."""
    check_tus_version(request.headers, needed=False)
    upload = existing(app.uploads.get(id), NO_UPLOAD)
    find_target(request, upload.target)
    anybody = upload.owner.startswith("address ")  # who knows its URL, from wherever
    is_mine = anybody or upload.owner == owner_of(request)
    return existing(upload if is_mine else None, NO_UPLOAD)


def begin_resumable(request: Request) -> Transfer:
    """Accept a new upload; 400, 401, 403, 412, 413, 415, 429 or 507."""
    app, head = request.app, parse_upload_head(request.headers)
    texts = parse_upload_metadata(head.metadata)
    target = find_target(request, texts.get("target", ""))
    if head.is_tus:
        check_content_type(request, TUS_CONTENT)
        if (head.length is None) != head.is_deferred:
            raise HTTPError(400, "Send either Upload-Length or Upload-Defer-Length: 1.")
    spec, file = form_of(target)
    length, limit = bound_upload(request, head, target)
    head = head._replace(length=length, offset=None)
    request.has_upload = True
    parse_form(request, spec, texts)
    check_upload(request, file, texts.get("filename", ""))
    upload = app.uploads.add(owner_of(request), target.family.name, file, head)
    if head.draft:
        request.interim = {
            "Location": upload_url(request, upload),
            "Upload-Limit": format_limit(app, upload),
            "Upload-Draft-Interop-Version": head.draft,
        }
    with undoing(app.uploads.remove, upload):  # whose URL nobody knows yet
        request.transfer = Transfer(app.uploads, upload, head, limit, md5=file.md5)
    return request.transfer


def continue_resumable(request: Request, id: str) -> Transfer | None:
    """Accept more of an upload, None if it is complete and none comes; 400 to 423."""
    app, head = request.app, parse_upload_head(request.headers)
    upload = find_upload(app, request, id)
    check_content_type(request, *([TUS_CONTENT] if head.is_tus else [DRAFT_CONTENT, TUS_CONTENT]))
    if head.offset is None:
        raise HTTPError(400, "Upload-Offset must say where the content begins.")
    state, is_complete = upload_headers(app, upload), upload.answer is not None
    if is_complete and not head.is_tus:
        raise HTTPError(400, "The upload is complete.", state)
    if head.offset != upload.received or (is_complete and request.head.has_body):
        raise HTTPError(409, f"The upload goes on at byte {upload.received}.", state)
    if is_complete:
        return None
    target = TARGETS[upload.target]
    length, limit = bound_upload(request, head, target, upload)
    upload, md5 = upload._replace(length=length), form_of(target)[1].md5
    request.transfer = Transfer(app.uploads, upload, head, limit, md5=md5)
    return request.transfer


def check_content_type(request: Request, *types: str) -> None:
    """Refuse a body of another media type than these: 415."""
    media_type, _ = parse_content_type(request.headers.get("content-type", ""))
    if request.head.has_body and media_type not in types:
        raise HTTPError(415, f"Send the content as {types[0]}.")


def bound_upload(
    request: Request, head: UploadHead, target: Route, upload: OpenUpload | None = None
) -> tuple[int | None, Limit]:
    """Tell the length of a whole upload, if it is known, and how far it may go; 400, 413.

    What other open uploads will need is taken from the room that the caller has.
    """
    id, begun, told = (upload.id, upload.received, upload.length) if upload else ("", 0, None)
    rest = request.head.content_length if request.head.has_body else 0
    ends = begun + rest if head.completes and rest is not None else None
    lengths = {head.length, told, ends} - {None}
    if len(lengths) > 1:
        raise HTTPError(400, "The upload has another length than the request says.")
    length = next(iter(lengths), None)
    if target.before is not None:  # it says what room there is
        target.before(request.app, request)
        rows = request.app.uploads.rows
        request.room -= rows.promised_bytes(owner_of(request), target.family.name, id)
        request.room = max(0, request.room)
    limit = upload_limit(request, form_of(target)[1])
    if (length or 0) > limit.size:
        raise HTTPError(413, limit.sentence, {"Upload-Limit": f"max-size={limit.size}"})
    if length is not None:
        limit = Limit(length, f"The content goes beyond the upload's {length} bytes.")
    if begun + (request.head.content_length or 0) > limit.size:
        raise HTTPError(413, limit.sentence)
    return length, limit


def upload_url(request: Request, upload: OpenUpload) -> str:
    """Return the URL that an upload goes on at, with the token of the query, if there is one."""
    token = [pair for pair in request.pairs if pair[0] == "token"]
    return request.url(f"/files/{upload.id}") + (f"?{urlencode(token)}" if token else "")


def format_limit(app: App, upload: OpenUpload) -> str:
    """Return Upload-Limit for an upload (draft-ietf-httpbis-resumable-upload)."""
    size, age = max_size(app, TARGETS[upload.target]), upload.expires_at - time.time()
    return f"max-size={size}, max-age={max(0, int(age))}"


def upload_headers(app: App, upload: OpenUpload) -> dict[str, str]:
    """Return how far an upload is, in the words of both protocols."""
    length = {} if upload.length is None else {"Upload-Length": str(upload.length)}
    return {
        "Upload-Offset": str(upload.received),
        "Upload-Complete": f"?{upload.answer is not None:d}",
        **(length or {"Upload-Defer-Length": "1"}),
        "Upload-Expires": format_date(upload.expires_at),
        "Upload-Limit": format_limit(app, upload),
        **NO_STORE,
    }


@FILES.route("OPTIONS", ("/files", "/files/{id}"), OPEN, {204: ""})
def describe_uploads(app: App, request: Request, id: str = "") -> Response:
    """Tell what the server can do of tus 1.0."""
    size = max(max_size(app, target) for target in TARGETS.values())
    headers = {
        "Tus-Version": TUS_VERSION,
        "Tus-Extension": TUS_EXTENSIONS,
        "Tus-Max-Size": str(size),
        "Tus-Checksum-Algorithm": ",".join(CHECKSUMS),
        "Accept-Patch": f"{DRAFT_CONTENT}, {TUS_CONTENT}",
        "Upload-Limit": f"max-size={size}",
    }
    return Response(204, headers)


@FILES.route("POST", "/files", TARGET,
    {201: "object: Location says where it goes on; if it is complete, the family's answer.",
     409: "Error", 412: "Error", 460: "Error"},
    body=BodySpec(("tus", "draft", "file"), reader=begin_resumable),
    header_fields=NEW_UPLOAD_FIELDS)  # fmt: skip
def create_upload(app: App, request: Request) -> Response:
    """Begin an upload that can be resumed."""
    transfer = request.transfer
    assert transfer is not None  # begin_resumable has made it
    location = {"Location": upload_url(request, transfer.upload)}
    if not transfer.is_whole:
        return Response(201, location | upload_headers(app, transfer.upload))
    answer = complete_upload(app, request, transfer)
    if transfer.is_tus:
        answer.status = 201
        answer.headers |= location
    return answer


@FILES.route("PATCH", "/files/{id}", TARGET,
    {204: "", 201: "object: The family's answer, at the end of one of the IETF draft.",
     409: "Error", 412: "Error", 423: "Error", 460: "Error"},
    before=find_upload, body=BodySpec(("tus", "draft"), reader=continue_resumable),
    header_fields=UPLOAD_FIELDS)  # fmt: skip
def continue_upload(app: App, request: Request, id: str) -> Response:
    """Go on with an upload."""
    transfer = request.transfer
    if transfer is not None and transfer.is_whole:
        answer = complete_upload(app, request, transfer)
        return Response(204, answer.headers) if transfer.is_tus else answer
    upload = transfer.upload if transfer else find_upload(app, request, id)
    return Response(204, upload_headers(app, upload))


@FILES.route("GET", "/files/{id}", TARGET, {200: "ResumableUpload", 412: "Error"})
def get_upload(app: App, request: Request, id: str) -> Response:
    """Tell how far an upload is."""
    upload = app.uploads.wait_until_saved(find_upload(app, request, id))
    headers = upload_headers(app, upload)
    if upload.metadata:
        headers["Upload-Metadata"] = upload.metadata
    answer = None if upload.answer is None else json.loads(upload.answer)
    value = {"target": upload.target, "offset": upload.received, "length": upload.length}
    return json_response({**value, "answer": answer}, 200, headers)


@FILES.route("DELETE", "/files/{id}", TARGET, {204: "", 412: "Error"}, before=find_upload)
def delete_upload(app: App, request: Request, id: str) -> Response:
    """End an upload; what is complete stays stored."""
    app.uploads.remove(find_upload(app, request, id))
    return Response(204)


def complete_upload(app: App, request: Request, transfer: Transfer) -> Response:
    """Have its family take in a file that is whole, as if it had come in one request."""
    upload = transfer.upload
    target, texts = TARGETS[upload.target], parse_upload_metadata(upload.metadata)
    spec, _ = form_of(target)
    inner = Request(app, request.head._replace(method=target.method), request.peer)
    inner.principal, inner.family = request.principal, target.family.name
    inner.upload = incoming = transfer.whole()
    incoming.filename = texts.get("filename", "")
    answer, passing = None, transfer.is_known
    try:
        inner.fields = parse_form(inner, spec, texts)
        answer = target.handler(app, inner)
    except HTTPError as error:
        if error.status < 500:  # the draft: the end of the upload itself has been reached
            request.answer_headers = {**request.answer_headers, "Upload-Complete": "?1"}
            passing = False
        raise
    finally:
        if answer is None:
            app.uploads.refuse(upload, incoming, passing=passing)
    with contextlib.suppress(OSError):
        incoming.discard(undo=False)
    assert isinstance(answer, Response) and isinstance(answer.body, bytes)  # none is deferred
    done = app.uploads.complete(upload, answer.body)
    answer.headers |= upload_headers(app, done)
    return answer


# ======================================================================================
# 13. System and pages
# ======================================================================================
# Health and metrics for programs, pages for people.


def health_json(app: App) -> dict[str, Any]:
    """Return the health answer; what is wrong is counted or said only where it is so."""
    folder, scan = app.watcher.look(), app.scanner.progress.get()
    problems = app.problems(folder)
    names = ("running", "done", "total", "finished_at", *["unreadable"] * bool(scan.unreadable))
    health = {
        "status": "degraded" if any(folder) else "ok",
        "gateway": True,
        "version": __version__,
        "uptime": round(time.monotonic() - app.started, 3),
        "scan": {name: getattr(scan, name) for name in names},
    }
    return {**health, "problems": problems} if problems else health


@SYSTEM.route("GET", "/health", OPEN, {200: "Health"}, prompt=True)
def get_health(app: App, request: Request) -> Response:
    """Tell how the server is."""
    return json_response(health_json(app))


@SYSTEM.route("POST", "/session", BEARER, {204: ""}, reads=True)
def start_session(app: App, request: Request) -> Response:
    """Let a browser's pages show what the bearer may read."""
    value = sign_view(request.principal, app.auth.view_key, time.time())
    cookie = format_cookie(request.url("/"), f"{VIEW_COOKIE}={value}", VIEW_SECONDS, "Strict")
    return Response(204, {"Set-Cookie": cookie, **NO_STORE})


@SYSTEM.route("DELETE", "/session", OPEN, {204: ""}, reads=True)
def end_session(app: App, request: Request) -> Response:
    """End the browser's session."""
    now, cookies = time.time(), request.headers.get("cookie", "")
    viewer = verify_view(cookies, app.auth.view_key, now)
    if viewer.cookie and not app.settings.read_only:
        end = Grant(frozenset(), viewer.issued + VIEW_SECONDS, uses=1, id=viewer.cookie)
        app.index.token_uses.consume(end, now)
    cookie = format_cookie(request.url("/"), f"{VIEW_COOKIE}=", 0, "Strict")
    return Response(204, {"Set-Cookie": cookie, **NO_STORE})


PREVIEW_QUERY = (
    Field("size", required=True, choices=tuple(map(str, PREVIEW_SIZES)), help="pixels a side"),
)


@SYSTEM.route("GET", "/preview/{sha256}", READ, {200: "preview"}, query=PREVIEW_QUERY)
def get_preview(app: App, request: Request, sha256: str) -> Answer:
    """Get a picture as browsers show it, WebP or JPEG, that fits a square."""
    found = find_readable(request, check_sha256(sha256), trashed=True)
    file, asset = existing(found, NO_FILE)
    webp = prefers(request.headers, "image/webp", "image/jpeg")
    rendition = Rendition("WEBP" if webp else "JPEG", int(request.query["size"]))

    def respond(made: bytes) -> Response:
        return content_response(request.head, rendered_content(app, file, made, "Accept"))

    with contextlib.suppress(OSError):
        return respond(app.thumbnails.previews.read(asset.sha256, rendition))
    return Deferred("decoder", lambda: respond(make_rendition(app, file, asset, rendition)))


def stored_json(request: Request, hashes: Iterable[str]) -> dict[str, Any]:
    """Return which contents are on disk in a file that the principal may read."""
    return {"stored": [sha256 for sha256 in hashes if find_readable(request, sha256)]}


@SYSTEM.route("GET", "/exists", READ, {200: "StoredContents"},
    query=(Field("sha256", "sha256", required=True),))  # fmt: skip
def check_hash(app: App, request: Request) -> Response:
    """Tell whether some content is stored."""
    hashes = [check_sha256(value) for name, value in request.pairs if name == "sha256"]
    return json_response(stored_json(request, dict.fromkeys(hashes)))


@SYSTEM.route("POST", "/exists", READ,
    {200: "StoredContents"}, body=BodySpec(("json",), (HASHES,), list_field="sha256"),
    reads=True)  # fmt: skip
def check_hashes(app: App, request: Request) -> Response:
    """Tell which of up to 1,000 contents are stored, by the list of hashes in the body."""
    return json_response(stored_json(request, request.fields["sha256"]))


# -- Metrics and the log of requests -----------------------------------------------------
# Prometheus' text format 0.0.4; what counts requests is of all workers together.

Samples = Iterable[tuple[str, float]]  # what follows the metric's name, and the value


def read_metrics(app: App) -> list[tuple[str, str, str, float | Samples]]:
    """Return each metric's name, type and help, and its value or samples."""
    scan, meter = app.scanner.progress.get(), app.meter
    _, files, accounts, records, entities = app.index.count_rows()
    kinds = app.index.assets.count_by_kind()
    taken, sent, in_flight = meter.totals()
    logins = [meter.answers(item.number).get(401, 0) for item in ROUTES if item.handler is login]
    build = f'{{version="{__version__}",python="{sys.version.split()[0]}"}}'
    return [
        ("build_info", "gauge", "1, with the versions of program and Python", [(build, 1)]),
        ("uptime_seconds", "gauge", "since this worker's start", time.monotonic() - app.started),
        ("scan_running", "gauge", "1 while the folder is scanned", scan.running),
        ("scan_files_done", "gauge", "files of the last scan that are done", scan.done),
        ("scan_files", "gauge", "files that the last scan found", scan.total),
        ("scan_duration_seconds", "gauge", "what the last whole scan took", scan.seconds),
        ("scan_finished_timestamp_seconds", "gauge", "its end", scan.finished_at or 0),
        ("degraded", "gauge", "1 while the folder, or a disk of it, is away",
         any(app.watcher.look())),
        ("assets", "gauge", "contents known, by kind",
         [(f'{{kind="{kind}"}}', count) for kind, count, _ in kinds]),
        ("assets_bytes", "gauge", "bytes of these",
         [(f'{{kind="{kind}"}}', size) for kind, _, size in kinds]),
        ("files", "gauge", "files known", files),
        ("accounts", "gauge", "accounts", accounts),
        ("media_records", "gauge", "media records of accounts", records),
        ("entities", "gauge", "entities", entities),
        ("hot_files", "gauge", "files that this worker answers without the index", len(app.hot)),
        ("rendition_duration_seconds", "summary", "of decoders, for a thumbnail or a preview",
         count_renditions(app.thumbnails)),
        ("decoder_restarts_total", "counter", "starts of the decoder host but for the first",
         app.thumbnails.restarts[0]),
        ("failed_logins_total", "counter", "logins refused", sum(logins)),
        ("upload_bytes_total", "counter", "bytes of requests' bodies taken in", taken),
        ("sent_bytes_total", "counter", "bytes of answers' bodies, as their heads say", sent),
        ("http_requests_in_flight", "gauge", "requests that are being worked on", in_flight),
        ("http_requests_total", "counter", "answers by method, route and status",
         count_requests(meter)),
        ("http_request_duration_seconds", "histogram", "from the head to the last byte sent",
         count_durations(meter)),
    ]  # fmt: skip


def count_renditions(thumbnails: Thumbnails) -> Samples:
    """Yield the samples of the time that decoders have taken."""
    for kind, (count, nanoseconds) in thumbnails.decoding.items():
        yield f'_sum{{kind="{kind}"}}', nanoseconds / 1e9
        yield f'_count{{kind="{kind}"}}', count


def label_routes() -> Iterator[tuple[int, str]]:
    """Yield each route's number and labels; 0 is all that no route has answered."""
    yield 0, 'method="",route=""'
    for item in ROUTES:
        yield item.number, f'method="{item.method}",route="{item.path}"'


def count_requests(meter: Meter) -> Samples:
    """Yield the samples of the answers by route and status."""
    for number, labels in label_routes():
        for status, count in meter.answers(number).items():
            yield f'{{{labels},code="{status}"}}', count


def count_durations(meter: Meter) -> Samples:
    """Return the histogram's samples of the routes that have been asked for."""
    for number, labels in label_routes():
        counts, seconds = meter.durations(number)
        if not counts[-1]:
            continue
        for bound, count in zip((*DURATIONS, "+Inf"), counts, strict=True):
            yield f'_bucket{{{labels},le="{bound}"}}', count
        yield f"_sum{{{labels}}}", seconds
        yield f"_count{{{labels}}}", counts[-1]


@SYSTEM.route("GET", "/metrics", PRIVATE_READ, {200: "metrics"})
def get_metrics(app: App, request: Request) -> Response:
    """Get figures for Prometheus."""
    lines = []
    for name, kind, help, found in read_metrics(app):
        lines.append(f"# HELP mediaserver_{name} {help}\n# TYPE mediaserver_{name} {kind}\n")
        samples = [("", found)] if isinstance(found, (int, float)) else found
        lines += [f"mediaserver_{name}{rest} {value:.15g}\n" for rest, value in samples]
    headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8", **NO_STORE}
    return Response(200, headers, "".join(lines).encode())


def log_request(
    head: RequestHead | None, peer: str, response: Response, seconds: float, *, settings: Settings
) -> None:
    """Write a line about an answer, with nothing of its query, which may hold a token."""
    entry = {
        "time": format_time(time.time(), "milliseconds"),
        "address": client_address(head.headers, peer, settings.trusted_proxies) if head else peer,
        "method": head.method if head else "",
        "path": loggable_path(head.path) if head else "",
        "status": response.status,
        "bytes": response.length,
        "seconds": round(seconds, 4),
        "principal": str(response.principal or "anonymous"),
    }
    if settings.log_format == "json":
        line = json.dumps(entry)
    else:
        pattern = '{time} {address} "{method} {path}" {status} {bytes} {seconds} s {principal}'
        line = printable_line(pattern.format_map(entry))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if is_writable(sys.stderr):  # or a pipe that nobody empties would hold up everybody
            sys.stderr.write(line + "\n")


# -- OpenAPI -----------------------------------------------------------------------------
# The document is made of the route declarations. An answer's words begin with what its content
# is: a type, or several with `or` between them; a colon and a description may follow. Types are
# those of CONTENTS, or JSON: one of OBJECTS or SCALARS, where `?` says that it may be null,
# `[]` is a list of it, `{}` an object with one at each key and `|` between several. An object's
# shape is its properties, each with its type after a colon (none: a string) and `~` where it may
# be missing.

OBJECTS: Mapping[str, str] = {
    "Error": "detail code~",
    "ValidationError": "detail:FieldError[]",
    "FieldError": "loc:location msg type",
    "Refusal": "error",
    "Health": "status gateway:boolean version uptime:number scan:Scan problems:strings~",
    "Scan": "running:boolean done:integer total:integer finished_at:number? unreadable:integer~",
    "StoredContents": "stored:hashes",
    "Gallery": "groups:rows~ folders:rows~ cameras:strings~ albums:rows~ path:rows~ items:rows~"
    " name~ degraded:boolean~ scanning:integer?~ read_only:boolean~ can_upload:boolean~"
    " can_write:boolean~ has_account:boolean~ max_upload_bytes:integer~ max_media_bytes:integer~",
    "PublicImage": "url:url filename size:integer content_type sha256:sha256",
    "PublicFile": "filename url:url size:integer content_type uploaded_at:number",
    "PublicFiles": "count:integer files:PublicFile[]",
    "Deleted": "deleted",
    "LibraryFile": "filename last_modified:number file_path original_creation_date:number?",
    "LibraryImage": "message sha256:sha256 filename file_path thumbnail_file:string?~",
    "PrivateImage": "stored_as bytes:integer image_url:url",
    "ResumableUpload": "target offset:integer length:integer? answer:object?",
    "Share": "id url:url kind target title strip:boolean upload:boolean has_password:boolean"
    " created_at:date expires_at:date?",
    "Shared": "title expires_at:date? files:SharedFile[] left_out:integer has_more:boolean",
    "SharedFile": "name type size:integer? url:url thumbnail:url?",
    "User": "id:integer first_name last_name email username:string? phone_number:string?",
    "Session": "id created_at:date last_used_at:date address user_agent",
    "Tokens": "access refresh",
    "Record": "id:uuid user:integer name type size:integer? file:url? storage_path:string?"
    " description:string? collection:uuid? created_at:date updated_at:date",
    "Records": "count:integer next:url? previous:url? results:Record[]",
    "Collection": "id:uuid user:integer name description:string? created_at:date"
    " updated_at:date media:Record[]~",
    "Collections": "count:integer next:url? previous:url? results:Collection[]",
    "Item": "id:integer is_collection:boolean label:string? description:string?"
    " parent_id:integer? added_date:date updated_date:date create_date:date? file_size:integer?"
    " height:integer? width:integer? duration:number? mime_type:string? type:string?"
    " extension:string? md5:string? file_path:string? is_deleted:boolean"
    " version:integer~ transaction_id:integer~",
    "Items": "items:Item[] pagination:Pagination",
    "Pagination": "page:integer page_size:integer total_items:integer total_pages:integer"
    " has_next:boolean has_prev:boolean",
}
HASH = {"type": "string", "pattern": f"^{SHA256.pattern}$", "examples": ["5e" * 32]}
SCALARS: Mapping[str, dict[str, Any]] = {
    "string": {"type": "string"},
    "text": {"type": "string"},
    "integer": {"type": "integer", "format": "int64"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "object": {"type": "object"},
    "strings": {"type": "array", "items": {"type": "string"}},
    "location": {"type": "array", "items": {"type": ["string", "integer"]}},
    "rows": {"type": "array", "items": {"type": "array", "items": {}}},
    "url": {"type": "string", "format": "uri", "examples": ["http://localhost:8000/media/a.jpg"]},
    "uuid": {"type": "string", "format": "uuid", "examples": [str(uuid.UUID(int=1 << 78))]},
    "date": {"type": "string", "format": "date-time", "examples": ["2023-10-27T10:00:00Z"]},
    "sha256": HASH,
    "hashes": {"type": "array", "items": HASH, "maxItems": MAX_HASHES},
    "file": {"type": "string", "format": "binary"},
}
EXAMPLES: Mapping[str, Any] = {  # by the name of a property or field
    "access": "eyJhbGciOiJIUzI1NiJ9.eyJ1c2VyX2lkIjoxfQ.c2lnbmF0dXJl", "address": "192.0.2.7",
    "content_type": "image/jpeg", "description": "At the sea", "detail": "There is no such thing.",
    "email": "ada@example.org", "extension": "jpg", "file_path": "2023/10/beach.jpg",
    "filename": "beach.jpg", "filter_param": "type=image,is_deleted=false", "first_name": "Ada",
    "height": 3000, "kind": "folder", "label": "Summer", "last_name": "Lovelace", "md5": "5e" * 16,
    "message": "Image stored.", "mime_type": "image/jpeg", "name": "beach.jpg",
    "new_password": "a long sentence", "old_password": "correct horse", "page": 1, "page_size": 20,
    "password": "correct horse", "phone_number": "+49 30 901820", "size": 2_500_000,
    "status": "ok", "storage_path": "uploads/2023/10/27/beach.jpg", "stored_as": "beach.jpg",
    "target": "2023/10", "title": "Summer", "total_items": 1, "type": "image", "username": "ada",
    "width": 4000,
}  # fmt: skip
CONTENTS: Mapping[str, Mapping[str, str]] = {  # what is no JSON: types by media type
    "file": {"*/*": "file"},
    "thumbnail": {"image/png": "file"},
    "preview": {"image/webp": "file", "image/jpeg": "file"},
    "metrics": {"text/plain": "string"},
    "page": {"text/html": "string"},
    "icon": {"image/svg+xml": "file"},
    "zip": {"application/zip": "file"},
    "manifest": {"application/manifest+json": "object"},
}
RANGED = {"file", "thumbnail", "preview", "LibraryFile{}", "PublicFiles"}  # sent in parts, too
CACHED = {*RANGED, "page", "Gallery"}
SENT_TYPES = {
    **BODY_TYPES, "file": "application/octet-stream", "tus": TUS_CONTENT, "draft": DRAFT_CONTENT,
}  # fmt: skip
COMMON_ERRORS = (
    "400", "401", "403", "404", "411", "412", "413", "415", "416", "429", "503", "507", "default",
)  # fmt: skip
FAMILY_ERRORS: Mapping[str, str] = {  # their types; the others' is Error
    "accounts-400": "strings{}|Error|Refusal",
    "files-400": "Error|strings{}",
    "entities-422": "ValidationError",
    "files-422": "ValidationError",
}
SECURITY_SCHEMES = {
    "bearer": {
        "type": "http", "scheme": "bearer", "bearerFormat": "JWT",
        "description": "an access token, an ES256 token of your authentication service, or the"
        " owner's key",
    },
    "uploadToken": {
        "type": "apiKey", "in": "query", "name": "token",
        "description": "TS.SIG: Unix seconds and their hex HMAC-SHA256",
    },
    "viewCookie": {"type": "apiKey", "in": "cookie", "name": VIEW_COOKIE},
}  # fmt: skip


def reference(kind: str, name: str) -> dict[str, Any]:
    """Return a reference to a component of the OpenAPI document."""
    return {"$ref": f"#/components/{kind}/{name}"}


def parse_type(text: str, name: str = "") -> dict[str, Any]:
    """Return the JSON schema of a type, with the example for a property of this name.

    >>> parse_type("boolean?"), parse_type("Item[]")["items"]
    ({'type': ['boolean', 'null']}, {'$ref': '#/components/schemas/Item'})
    """
    if "|" in text:
        return {"anyOf": [parse_type(each) for each in text.split("|")]}
    if text.endswith("?"):
        return widen(parse_type(text[:-1], name), "null")
    if text.endswith("[]"):
        return {"type": "array", "items": parse_type(text[:-2])}
    if text.endswith("{}"):
        return {"type": "object", "additionalProperties": parse_type(text[:-2])}
    if text in OBJECTS:
        return reference("schemas", text)
    schema, example = dict(SCALARS[text]), EXAMPLES.get(name)
    if schema["type"] == {str: "string", int: "integer"}.get(type(example)):
        schema["examples"] = [example]
    return schema


def widen(schema: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return a schema that takes another type, too."""
    before: list[str] = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    return {**schema, "type": [*before, kind]}


def parse_object(text: str) -> dict[str, Any]:
    """Return the JSON schema of an object as OBJECTS spells it."""
    properties, required = {}, []
    for word in text.split():
        name, _, kind = word.rstrip("~").partition(":")
        properties[name] = parse_type(kind or "string", name)
        if not word.endswith("~"):
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def example_of(schema: Mapping[str, Any]) -> Any:
    """Return a value that a schema of this document takes."""
    if "$ref" in schema:
        schema = parse_object(OBJECTS[schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        schema = schema["anyOf"][0]
    for key in ("examples", "enum"):
        if key in schema:
            return schema[key][0]
    if "default" in schema:
        return schema["default"]
    if "properties" in schema:
        return {name: example_of(value) for name, value in schema["properties"].items()}
    if "additionalProperties" in schema:
        return {"key": example_of(schema["additionalProperties"])}
    if "items" in schema:
        return [example_of(schema["items"])]
    kinds = schema.get("type", "object")
    if "null" in kinds:
        return None
    values = {"string": "text", "integer": 1, "number": 1700000000.5, "boolean": False}
    return values.get(kinds if isinstance(kinds, str) else kinds[0], {})


def field_schema(item: Field, *, in_json: bool = False) -> dict[str, Any]:
    """Return the JSON schema of a declared field."""
    schema = parse_type(item.type, "" if item.choices else item.name)
    bounds = {
        "default": item.default,
        "minimum": item.minimum,
        "maximum": item.maximum,
        "minLength": item.shortest or int(item.blank == "refused") or None,
        "maxLength": item.longest,
        "enum": list(item.choices) or None,
        "description": item.help or None,
    }
    schema |= {name: value for name, value in bounds.items() if value is not None}
    if in_json and item.type == "text" and not item.choices:
        schema = widen(schema, "number")
    return widen(schema, "null") if in_json and item.nullable else schema


def describe_parameters(item: Route) -> Iterator[dict[str, Any]]:
    """Yield what a route reads from its path, its query and header fields of its own."""
    typed = {field.name: field for field in item.parameters}
    for name in re.findall(r"\{(\w+)\}", item.path):
        field = typed.get(name) or Field(name, name if name in SCALARS else "string")
        yield {"name": name, "in": "path", "required": True, "schema": field_schema(field)}
    for place, fields in (("query", item.query), ("header", item.header_fields)):
        for field in fields:
            about = {"name": field.name, "in": place, "required": field.required}
            yield {**about, "schema": field_schema(field)}


def describe_form(spec: BodySpec, kind: str) -> dict[str, Any]:
    """Return the schema of a body's fields in one of its media types."""
    upload = spec.upload if kind == "multipart" else None
    fields = {field.name: field_schema(field, in_json=kind == "json") for field in spec.fields}
    required = [
        field.name for field in spec.fields if field.required and not (field.or_upload and upload)
    ]
    if upload:
        fields[upload.name] = SCALARS["file"]
        required += [upload.name] if upload.required else []
    if spec.list_field:
        return fields[spec.list_field]
    schema: dict[str, Any] = {"type": "object", "properties": fields, "required": required}
    if spec.wrapper:
        wrapped = {"type": "object", "properties": {spec.wrapper: schema}}
        schema = {"anyOf": [{**wrapped, "required": [spec.wrapper]}, schema]}
    return schema


def describe_body(spec: BodySpec) -> dict[str, Any]:
    """Return the body of a route in each media type that it may have."""
    content: dict[str, Any] = {}
    for kind in spec.kinds:
        schema = describe_form(spec, kind) if kind in BODY_TYPES else SCALARS["file"]
        content[SENT_TYPES[kind]] = {"schema": schema}
        if kind == "json":
            content[JSON_TYPE]["example"] = example_of(schema)
    needs_field = any(field.required for field in spec.fields)
    needs_upload = spec.upload is not None and spec.upload.required
    return {"required": bool(needs_field or needs_upload or spec.wrapper), "content": content}


def describe_content(kind: str) -> dict[str, Any]:
    """Return an answer's content of one kind by media type."""
    if kind in CONTENTS:
        return {name: {"schema": SCALARS[each]} for name, each in CONTENTS[kind].items()}
    schema = parse_type(kind)
    return {JSON_TYPE: {"schema": schema, "example": example_of(schema)}}


def describe_answers(item: Route) -> dict[str, Any]:
    """Return what a route answers, errors among it."""
    answers: dict[str, Any] = {}
    kinds: set[str] = set()
    for status, words in item.answers.items():
        names, _, said = words.partition(": ")
        about: dict[str, Any] = {"description": said or _REASONS[status]}
        answers[str(status)] = about
        for name in names.split(" or ") if names else ():
            kinds.add(name)
            about.setdefault("content", {}).update(describe_content(name))
    for key in find_common(item, kinds):
        own = f"{item.family.name}-{key}"
        answers.setdefault(key, reference("responses", own if own in FAMILY_ERRORS else key))
    return answers


def find_common(item: Route, kinds: Set[str]) -> Iterator[str]:
    """Yield the statuses of what routes have in common that one's declaration lets happen."""
    yield from ("400", "401", "503", "default")
    if kinds & CACHED:
        yield "304"
    if item.access is not OPEN:
        yield "403"
    if "{" in item.path:
        yield "404"
    if item.body:
        yield from ("411", "413", "415", "429", "507")
    if kinds & RANGED:
        yield from ("206", "412", "416")
    if item.before and item.method in CHANGING_METHODS:
        yield "412"
    if f"{item.family.name}-422" in FAMILY_ERRORS:
        yield "422"


def describe_common() -> dict[str, Any]:
    """Return the answers that routes have in common."""
    answers: dict[str, Any] = {
        "206": {"description": "The ranges asked for.", "content": describe_content("file")},
        "304": {"description": "It has not changed."},
    }
    for key in (*COMMON_ERRORS, *FAMILY_ERRORS):
        said = _REASONS[int(key[-3:])] if key[-3:].isdigit() else "Anything else that is wrong"
        content = describe_content(FAMILY_ERRORS.get(key, "Error"))
        answers[key] = {"description": said, "content": content}
    return answers


def describe_security(item: Route, settings: Settings) -> list[dict[str, list[str]]]:
    """Return the credentials of which one is needed; an empty one is none."""
    if item.access is OPEN:
        return [{}]
    is_free = settings.auth_disabled or (item.access is READ and not settings.read_auth_enabled)
    schemes: list[dict[str, list[str]]] = [{}] * is_free + [{"bearer": []}]
    if item.method == "GET":
        schemes.append({"viewCookie": []})
    if item.access in {UPLOAD, TARGET}:
        schemes.append({"uploadToken": []})
    return schemes


def describe_route(item: Route, settings: Settings) -> dict[str, Any]:
    """Return the OpenAPI operation of a route."""
    operation: dict[str, Any] = {
        "tags": [item.family.name],
        "summary": item.summary,
        "description": f"Access: {item.access.value[0]}.",
        "operationId": item.name or item.handler.__name__,
        "security": describe_security(item, settings),
        "parameters": list(describe_parameters(item)),
        "responses": describe_answers(item),
    }
    if item.body:
        operation["requestBody"] = describe_body(item.body)
    return operation


def merge_operations(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return one operation for two routes that differ in how a parameter looks, as /image/{…}."""
    security = [each for each in second["security"] if each not in first["security"]]
    return {
        **first,
        "tags": [*first["tags"], *second["tags"]],
        "summary": f"{first['summary']}. Or: {second['summary']}",
        "description": f"{first['description']} Or: {second['description']}",
        "operationId": second["operationId"],
        "security": [*security, *first["security"]],
    }


def describe_paths(settings: Settings) -> dict[str, Any]:
    """Return the operations of all routes by path and method."""
    paths: dict[str, dict[str, Any]] = {}
    spelt: dict[str, str] = {}  # paths that differ in their parameters' names alone are one
    for item in ROUTES:
        slash = "/" if item.family is ACCOUNTS else ""  # Django's paths end with one
        path = item.path + slash
        path = spelt.setdefault(re.sub(r"\{\w+\}", "{}", path), path)
        operation = describe_route(item, settings)
        names = re.findall(r"\{(\w+)\}", path)
        for parameter, name in zip(operation["parameters"], names, strict=False):
            parameter["name"] = name
        operations, method = paths.setdefault(path, {}), item.method.lower()
        if method in operations:
            operation = merge_operations(operations[method], operation)
        operations[method] = operation
    return paths


@SYSTEM.route("GET", "/openapi.json", OPEN, {200: "object"})
def get_openapi(app: App, request: Request) -> Response:
    """Get this interface as OpenAPI 3.1."""
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "mediaserver",
            "version": __version__,
            "description": "A trailing slash is optional on every path, HEAD answers like GET.",
        },
        "servers": [{"url": request.url("")}],
        "tags": [{"name": name} for name in dict.fromkeys(item.family.name for item in ROUTES)],
        "paths": describe_paths(app.settings),
        "components": {
            "schemas": {name: parse_object(text) for name, text in OBJECTS.items()},
            "securitySchemes": SECURITY_SCHEMES,
            "responses": describe_common(),
        },
    }
    return json_response(document)


# -- Pages: what they share --------------------------------------------------------------
# A page is one text with its style and script inside: one request, and a policy that lets just
# these two run, by their hashes. What users can influence is only ever set as text.


class Page(NamedTuple):
    """A page as it is sent; a browser keeps it and asks about it each time."""

    headers: Mapping[str, str]
    body: bytes


def build_page(markup: str, style: str, script: str) -> Page:
    """Put style and script into a page's markup, without what only their readers need."""
    lines = re.compile(r"^ +|^ *//.*\n|^\n|  //.*$", re.MULTILINE)
    texts_or_spaces = re.compile(r'("(?:[^"\\\n]|\\.)*"|`[^`]*`)|\s*([=?:,;{}()<>&|])\s*')
    names = {  # every statement ends with a semicolon or a brace: none needs its line's end
        "style": re.sub(r"(?<=[{};,:])[ \n]| (?=[{}])", "", lines.sub("", style)),
        "script": texts_or_spaces.sub(r"\1\2", lines.sub("", script)),
    }
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in names.items()
    }
    for name, text in names.items():
        markup = markup.replace(f"<{name}></{name}>", f"<{name}>{text}</{name}>")
    policy = (
        f"default-src 'none'; script-src 'sha256-{digests['script']}';"
        f" style-src 'sha256-{digests['style']}'; img-src 'self' blob: data:;"
        " media-src 'self' blob:; connect-src 'self'; manifest-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    body = markup.encode()
    headers = {
        "Content-Type": HTML_TYPE,
        "ETag": f'W/"{hashlib.sha256(body).hexdigest()[:32]}"',  # weak: it may be compressed
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Vary": "Accept, Accept-Language",
    }
    return Page(headers, body)


PAGE_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #faf9f7; --card: #fff; --ink: #1d1c1a; --soft: #66625c; --line: #e3dfd8;
  --tile: #ebe8e2; --accent: #0b6b62; --on-accent: #fff; --bad: #b3261e; --on-bad: #fff;
  --glass: #faf9f7e6; --shadow: 0 .5rem 2rem #0003;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #131312; --card: #1d1d1b; --ink: #edeae4; --soft: #a5a19a; --line: #33322f;
    --tile: #262523; --accent: #6fd0c2; --on-accent: #06302b; --bad: #ff8a80; --on-bad: #3b0906;
    --glass: #131312e6; --shadow: 0 .5rem 2rem #000a;
  }
}
*, ::before, ::after { box-sizing: border-box }
[hidden] { display: none !important }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100% }
a { color: var(--accent) }
button, input, select, textarea { font: inherit; color: inherit }
button { cursor: pointer }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px }
@media (prefers-reduced-motion: reduce) {
  * { animation: none !important; transition: none !important; scroll-behavior: auto !important }
}
"""

PAGE_SCRIPT = r"""
"use strict";

// The server's address: pages may lie under a path, with or without a slash at its end.
const ROOT = location.pathname.replace(/\/(gallery|docs)?\/?$/, "");

// An element with these properties and children; text only ever becomes a text node.
function h(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in element && key !== "list") element[key] = value;
    else if (value !== null) element.setAttribute(key, value);
  }
  element.append(...children.flat(2).filter((child) => child !== null && child !== undefined));
  return element;
}
"""

# -- The docs page -----------------------------------------------------------------------

DOCS_MARKUP = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mediaserver: its interface</title>
<link rel="icon" href="data:,">
<style></style>
</head>
<body>
<header>
  <h1>mediaserver</h1>
  <p id="about">Loading the interface…</p>
  <label>Bearer token, for the calls below
    <input id="token" type="password" autocomplete="new-password" spellcheck="false"></label>
</header>
<main id="main"></main>
<script></script>
</body>
</html>
"""

DOCS_STYLE = """
header, main { max-width: 60rem; margin: 0 auto; padding: 0 1rem }
h1 { font-size: 2rem; font-weight: 650; letter-spacing: -.02em; margin: 2rem 0 0 }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.1rem; text-transform: capitalize }
header p { color: var(--soft); margin: .25rem 0 1rem }
label { display: block; font-size: .9rem; color: var(--soft) }
input, textarea, select {
  display: block; width: 100%; margin: .15rem 0 .6rem; padding: .45rem .6rem; color: var(--ink);
  background: var(--card); border: 1px solid var(--soft); border-radius: .5rem;
}
textarea { min-height: 7rem; font-family: ui-monospace, monospace; font-size: .85rem }
details {
  margin: .5rem 0; background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
}
summary { padding: .6rem .9rem; display: flex; flex-wrap: wrap; gap: 0 .75rem; cursor: pointer }
summary span { color: var(--soft) }
summary code { font-weight: 600; overflow-wrap: anywhere }
.method { font: 700 .75rem/1.5rem ui-monospace, monospace; width: 4rem; color: var(--accent) }
.method.DELETE { color: var(--bad) }
.inside { padding: 0 .9rem .9rem }
.answers { border-collapse: collapse; width: 100%; font-size: .9rem; margin: .5rem 0 }
.answers td { border-top: 1px solid var(--line); padding: .3rem .5rem .3rem 0 }
.answers td { vertical-align: top }
pre {
  background: var(--tile); padding: .7rem; border-radius: .5rem; font-size: .8rem; margin: .5rem 0;
  overflow: auto; max-height: 24rem; white-space: pre-wrap; overflow-wrap: anywhere;
}
.inside button {
  background: var(--accent); color: var(--on-accent); border: 0; border-radius: .5rem;
  padding: .5rem 1.2rem; font-weight: 600;
}
.inside img { max-width: 100%; max-height: 20rem; border-radius: .5rem }
"""

DOCS_SCRIPT = r"""
const MAIN = document.getElementById("main");
const TOKEN = document.getElementById("token");
const MAX_SHOWN = 20000;  // characters of an answer

function resolve(api, thing) {
  return thing.$ref ? thing.$ref.slice(2).split("/").reduce((at, key) => at[key], api) : thing;
}

const typeOf = (schema) => [schema.type].flat().filter((type) => type !== "null").join(" or ");

// Text as it is, which may be longer than its box: so it can be reached to be scrolled.
const text = (value) => h("pre", {tabIndex: 0}, value);

// A field of a form for one value: `place` is path, query, header or body.
function field(place, name, schema, required) {
  const hints = [typeOf(schema), required ? "required" : "", schema.description || ""];
  const choices = schema.enum || (schema.type === "boolean" ? ["true", "false"] : null);
  const input = choices
    ? h("select", {}, h("option", {value: ""}, "–"), choices.map((c) => h("option", {}, c)))
    : h("input", {type: schema.format === "binary" ? "file" : "text"});
  input.name = name;
  input.dataset.place = place;
  const sample = schema.default !== undefined ? schema.default : (schema.examples || [])[0];
  if (sample !== undefined) input.placeholder = String(sample);
  return h("label", {}, `${name} · ${hints.filter(Boolean).join(", ")}`, input);
}

// The fields of a body: a form's, one text for JSON, or a file.
function bodyFields(operation, form) {
  const content = operation.requestBody ? operation.requestBody.content : {};
  const wanted = ["multipart/form-data", "application/json", ...Object.keys(content)];
  const type = wanted.find((each) => content[each]);
  if (!type) return [];
  form.dataset.type = type;
  const {schema, example} = content[type];
  if (example !== undefined) {
    const area = h("textarea", {name: "body", value: JSON.stringify(example, null, 2)});
    area.dataset.place = "body";
    return [h("label", {}, "body, as JSON", area)];
  }
  return Object.entries(schema.properties || {body: schema}).map(([name, each]) =>
    field("body", name, each, (schema.required || []).includes(name)));
}

// What a filled form asks for: fetch's arguments, and the same as a curl command.
function request(method, path, form) {
  const query = new URLSearchParams();
  const {type} = form.dataset;
  const headers = TOKEN.value ? {Authorization: `Bearer ${TOKEN.value}`} : {};
  const parts = type === "multipart/form-data" ? new FormData() : null;
  const words = ["curl", "-X", method];
  let body = parts || undefined;
  if (TOKEN.value) words.push("-H", "Authorization: Bearer TOKEN");
  for (const {name, value, files, dataset: {place}} of form.querySelectorAll("[name]")) {
    const file = files && files[0];
    if (place === "path") {
      path = path.replace(`{${name}}`, encodeURIComponent(value));
    } else if (!value) {
      continue;
    } else if (place === "query") {
      query.append(name, value);
    } else if (place === "header") {
      headers[name] = value;
      words.push("-H", `${name}: ${value}`);
    } else if (parts) {
      parts.append(name, file || value);
      words.push("-F", file ? `${name}=@${file.name}` : `${name}=${value}`);
    } else {
      headers["Content-Type"] = type;
      words.push("-H", `Content-Type: ${type}`, "--data-binary", file ? `@${file.name}` : value);
      body = file || value;
    }
  }
  const url = ROOT + path + (query.size ? `?${query}` : "");
  words.push(location.origin + url);
  const quoted = words.map((word) =>
    /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);
  return {url, options: {method, headers, body}, curl: quoted.join(" ")};
}

async function send(call, out) {
  let lines = "The server cannot be reached.";
  let picture = null;
  try {
    const answer = await fetch(call.url, call.options);
    const type = answer.headers.get("Content-Type") || "";
    lines = `${answer.status} ${answer.statusText}\n`;
    for (const [name, value] of answer.headers) lines += `${name}: ${value}\n`;
    if (type.startsWith("image/")) {
      picture = h("img", {src: URL.createObjectURL(await answer.blob()), alt: "the answer"});
    } else if (/^(text|application\/json)/.test(type)) {
      let content = await answer.text();
      if (type.includes("json")) content = JSON.stringify(JSON.parse(content), null, 2);
      lines += `\n${content.slice(0, MAX_SHOWN)}${content.length > MAX_SHOWN ? "…" : ""}`;
    }
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
  }
  out.replaceChildren(text(lines), ...(picture ? [picture] : []));
}

function drawAnswers(api, operation) {
  const rows = Object.entries(operation.responses).map(([status, answer]) => {
    const about = resolve(api, answer);
    const shown = Object.values(about.content || {}).find((each) => each.example !== undefined);
    const sample = shown ? text(JSON.stringify(shown.example, null, 2)) : null;
    return h("tr", {}, h("td", {}, status), h("td", {}, about.description, sample));
  });
  return h("table", {className: "answers"}, rows);
}

function drawOperation(api, path, method, operation) {
  const form = h("form");
  const out = h("div", {role: "status"});
  const curl = text("");
  const parameters = (operation.parameters || []).map((each) =>
    field(each.in, each.name, each.schema, each.required));
  form.append(...parameters, ...bodyFields(operation, form), curl, h("button", {}, "Send"), out);
  const current = () => request(method, path, form);
  const update = () => { curl.textContent = current().curl; };
  form.addEventListener("input", update);
  TOKEN.addEventListener("input", update);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(current(), out);
  });
  update();
  return h("div", {className: "inside"}, h("p", {}, operation.description), form,
    drawAnswers(api, operation));
}

function draw(api) {
  document.getElementById("about").replaceChildren(
    `Version ${api.info.version}. ${api.info.description} The document behind this page: `,
    h("a", {href: `${ROOT}/openapi.json`}, "openapi.json"), ".");
  for (const {name} of api.tags) {
    MAIN.append(h("h2", {}, name));
    for (const [path, operations] of Object.entries(api.paths)) {
      for (const [key, operation] of Object.entries(operations)) {
        if (operation.tags[0] !== name) continue;
        const method = key.toUpperCase();
        const box = h("details", {}, h("summary", {},
          h("b", {className: `method ${method}`}, method), h("code", {}, path),
          h("span", {}, operation.summary)));
        box.addEventListener("toggle", () =>
          box.append(drawOperation(api, path, method, operation)), {once: true});
        MAIN.append(box);
      }
    }
  }
}

fetch(`${ROOT}/openapi.json`).then((answer) => answer.json()).then(draw);
"""


@functools.lru_cache(maxsize=1)
def docs_page() -> Page:
    """Return the page that shows this interface."""
    return build_page(DOCS_MARKUP, PAGE_STYLE + DOCS_STYLE, PAGE_SCRIPT + DOCS_SCRIPT)


@SYSTEM.route("GET", "/docs", OPEN, {200: "page"})
def get_docs(app: App, request: Request) -> Response:
    """Get this interface as a page, to read and to try."""
    return Response(200, *docs_page())


# -- The gallery: its data ---------------------------------------------------------------
# Groups (months, or folders) of items. A first answer tells each group's size and width, so that
# a page knows its height before it has asked for what comes into view.

MIN_RATIO, MAX_RATIO = 40, 300  # of width to height, in hundredths: panoramas are cut
MAX_SEARCH = 200  # characters
MAX_CAMERAS = 100  # to choose from, the most used ones
GALLERY_QUERY = (
    Field("group", help="a key of `groups`: the answer is its items"),
    Field("q", longest=MAX_SEARCH, help="words of path or camera"),
    Field("kind", choices=KINDS, blank="not sent", help="image, video or audio"),
    Field("camera", blank="not sent", help="one of `cameras`"),
    Field("folder", default="", help="a folder's path"),
    Field("below", "boolean", default=True, help="what is in the folders below it, too"),
    Field("order", choices=("date", "name"), default="date", blank="not sent"),
    Field("album", blank="not sent", help="instead of the library: the id of a collection of"
          " mine or of entities, or `all`, `mine`, `entities` or `trash`"),
)  # fmt: skip


def camera_of(item: GalleryItem) -> str | None:
    """Return the camera's make, unless its model begins with it, and model."""
    model = item.model or ""
    make = "" if model.startswith((item.make or "").split(" ")[0]) else item.make
    return f"{make or ''} {model}".strip() or None


def shown_json(item: GalleryItem) -> list[Any]:
    """Return an item as a list without its last nulls; GALLERY_SCRIPT names the places."""
    width, height = item.width, item.height
    if (item.orientation or 1) > 4:  # it is turned to be seen
        width, height = height, width
    ratio = 100 * width // height if width and height else 100
    ratio = max(MIN_RATIO, min(MAX_RATIO, ratio))
    values: list[Any] = [
        item.sha256, item.path.decode("utf-8", "replace"), item.kind, ratio,
        int(item.taken[8:]) if item.taken else 0, item.created_source, item.size, width, height,
        item.duration, camera_of(item), item.latitude, item.longitude, item.altitude, item.id,
    ]  # fmt: skip
    while values[-1] is None:
        values.pop()
    return values


def matches_search(item: GalleryItem, words: Sequence[str]) -> bool:
    """Return whether an item's path and camera have all these case-folded words."""
    if not words:
        return True
    text = (
        f"{item.path.decode('utf-8', 'replace')} {item.make or ''} {item.model or ''}".casefold()
    )
    return all(word in text for word in words)


def choose_items(
    items: Iterable[GalleryItem], query: Mapping[str, Any], cameras: Counter[str | None]
) -> Iterator[GalleryItem]:
    """Yield what a query asks for; count the cameras, of which one may be asked for."""
    words, kind, wanted = (query.get(name) for name in ("q", "kind", "camera"))
    words = (words or "").casefold().split()
    for item in items:
        if kind in {None, item.kind} and matches_search(item, words):
            camera = camera_of(item)
            cameras[camera] += 1
            if wanted in {None, camera}:
                yield item


def group_items(items: Iterable[GalleryItem], order: str) -> Iterator[tuple[str, GalleryItem]]:
    """Yield the items in order, each with its group's key: the month, or the folder."""
    if order == "date":
        return ((item.taken[:7] if item.taken else "1970-01", item) for item in items)
    named = ((posixpath.split(item.path.decode("utf-8", "replace")), item) for item in items)
    ordered = sorted(named, key=lambda pair: [part.casefold() for part in pair[0]])
    return ((folder, item) for (folder, _), item in ordered)


def make_catalogue(items: Iterable[GalleryItem], query: Mapping[str, Any]) -> Catalogue:
    """Return the JSON of each group of items, and what tells of all of them."""
    groups: dict[str, bytes] = {}
    about: list[list[Any]] = []
    folders, cameras = Counter[str](), Counter[str | None]()
    chosen = group_items(choose_items(items, query, cameras), query["order"])
    for key, pairs in itertools.groupby(chosen, key=lambda pair: pair[0]):
        values = [shown_json(item) for _, item in pairs]
        data = to_json({"items": values}).encode("utf-8", "replace")
        groups[key] = gzip_bytes(data)
        tag = hashlib.sha256(data).hexdigest()[:16]
        about.append([key, len(values), sum(item[3] for item in values), tag])
        folders.update(item[1].rpartition("/")[0] for item in values)
    named = sorted(name for name, _ in cameras.most_common(MAX_CAMERAS) if name)
    summary = {"groups": about, "folders": sorted(folders.items()), "cameras": named}
    return Catalogue(groups, summary)


def open_album(
    app: App, request: Request, key: str
) -> tuple[Iterable[GalleryItem], list[Album], list[list[str]]]:
    """Return an album's items, the albums in it, and ids and names on the way to it; 401, 404."""
    albums, user_id = app.index.albums, request.principal.user_id
    may_write = request.may(WRITE)
    if key == "all":
        mine = [] if user_id is None else albums.of_user(user_id)
        others = [*albums.of_entities(None), *albums.outside(user_id, with_entities=may_write)]
        return (), [*mine, *others], []
    if key == "trash":
        return albums.trash(user_id, with_entities=may_write), [], []
    if key == "entities" or re.fullmatch(r"[0-9]{1,18}", key, re.ASCII):
        above = id = None if key == "entities" else int(key)
        path: list[list[str]] = []
        while above is not None:
            entity = find_entity(app, above)
            path.insert(0, [str(above), entity.label or f"#{above}"])
            above = entity.parent_id
        return albums.entities(id), albums.of_entities(id), path
    request.need(USER)
    if key == "mine":
        return albums.records(user_id_of(request)), [], []
    collection = find_collection(app, request, key)
    about = [[collection.id, collection.name]]
    return albums.records(user_id_of(request), collection.id), [], about


def open_library(app: App, query: Mapping[str, Any]) -> Iterable[GalleryItem]:
    """Return what is in a folder of the library."""
    return app.index.files.shown(query["folder"].strip("/"), below=query["below"])


@SYSTEM.route("GET", "/gallery/items", READ,
    {200: "Gallery", 404: "Error: There is no such group, or album."},
    query=GALLERY_QUERY)  # fmt: skip
@deferred("list")
def list_items(app: App, request: Request) -> Response:
    """Get what the gallery shows: its groups, or the items of one."""
    query = dict(request.query)
    group, album = query.pop("group", None), query.pop("album", None)
    if album is None:
        library = open_library(app, query)
        key, make = tuple(sorted(query.items())), functools.partial(make_catalogue, library, query)
        groups, summary = app.catalogues.get(app.index, key, make)
    else:  # a few items, and nobody knows when they change
        items, albums, path = open_album(app, request, album)
        groups, summary = make_catalogue(items, query)
        summary |= {"albums": albums, "path": path}
    if group is None:
        return tagged_json(to_json({**gallery_state(app, request), **summary}))
    if group not in groups:
        raise HTTPError(404, "There is no such group.")
    return tagged_json(zlib.decompress(groups[group], 31).decode())


def gallery_state(app: App, request: Request) -> dict[str, Any]:
    """Return what the page shows around the items, and what this principal may do there."""
    scan, settings = app.scanner.progress.get(), app.settings
    takes = not settings.read_only
    return {
        "name": gallery_name(app),
        "degraded": any(app.watcher.look()),
        "scanning": scan.done if scan.running else None,
        "read_only": not takes,
        "can_upload": takes and request.may(UPLOAD),
        "can_write": takes and request.may(WRITE),
        "has_account": takes and request.principal.user_id is not None,
        "max_upload_bytes": settings.max_upload_bytes,
        "max_media_bytes": settings.max_media_bytes,
    }


def gallery_name(app: App) -> str:
    """Return the folder's name."""
    return printable(app.settings.storage_dir.name) or "mediaserver"


def tagged_json(text: str) -> Response:
    """Answer with JSON that a browser keeps and asks about each time: it may get a 304."""
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]
    etag = f'W/"{digest}"'  # weak: it may be compressed
    return text_response(text, 200, {"ETag": etag, "Cache-Control": "private, no-cache"})


# What is downloaded as one file is put together while it is sent: nobody has it in memory. Its
# size is known before, from those in the index.

ZIP_QUERY = (*GALLERY_QUERY, Field(
    "only", help="of contents: the first 12 digits of their SHA-256, with commas"
))  # fmt: skip
MAX_ZIPPED = 20_000  # files
MISSING = "missing.txt"  # no media file has such a name
LARGE_FILE = 2_000_000_000  # bytes; the fields for the size of a larger one have eight bytes
MS_DOS = 315532800, 4354819198  # seconds: the times that a zip file can tell


class Zipped(NamedTuple):
    """A file of a zip file, where its name is unique."""

    name: str
    size: int
    taken: int  # wall clock, in seconds
    open: Callable[[], io.FileIO | io.BytesIO]  # OSError if it is not what it was any more

    def info(self) -> zipfile.ZipInfo:
        """Return the entry's name and time, the nearest that a zip file can tell."""
        first, last = MS_DOS
        return zipfile.ZipInfo(self.name, time.gmtime(max(first, min(self.taken, last)))[:6])

    @property
    def is_large(self) -> bool:
        """Return whether its size needs a field of eight bytes (APPNOTE.TXT 4.3.14)."""
        return self.size > LARGE_FILE


class ZipReader:
    """Gives the bytes of a zip file of stored files in a row; zipfile writes them to it."""

    def __init__(self, files: Sequence[Zipped]) -> None:
        self._held: list[bytes] = []  # what is written and not read
        self._place = 0
        with zipfile.ZipFile(self, "w") as archive:  # type: ignore[call-overload]
            for each in files:  # for the directory's size they need not be read
                info = each.info()
                info.header_offset, info.CRC = self._place, 0
                info.file_size = info.compress_size = each.size
                archive.infolist().append(info)
                # What is before and behind a file (APPNOTE.TXT, sections 4.3.7 and 4.3.9)
                around = 30 + 20 + 24 if each.is_large else 30 + 16
                self._place += around + len(each.name.encode()) + each.size
            archive.start_dir = self._place
        self.size, self._place = self._place, 0
        self._held.clear()
        self._pieces = self._pack(files)

    def _pack(self, files: Sequence[Zipped]) -> Generator[bytes, None, None]:
        with zipfile.ZipFile(self, "w") as archive:  # type: ignore[call-overload]
            for each in files:
                with each.open() as source, archive.open(
                    each.info(), "w", force_zip64=each.is_large
                ) as target:  # fmt: skip
                    for block in read_blocks(source, each.size):
                        target.write(block)
                        yield self._take()
        yield self._take()

    def _take(self) -> bytes:
        held = b"".join(self._held)
        self._held.clear()
        return held

    def write(self, data: bytes | memoryview) -> None:
        """Take in bytes of the zip file."""
        self._held.append(bytes(data))
        self._place += len(data)

    def tell(self) -> int:
        """Return where in the zip file the next bytes are written."""
        return self._place

    def flush(self) -> None:
        """Do nothing: what is written waits to be read."""

    def read_at(self, offset: int, count: int) -> bytes:
        """Return the next piece; OSError if a file is not what it was any more."""
        piece = next(self._pieces, b"")
        if not 0 < len(piece) <= count:
            raise ConnectionAbortedError("a file changed before it was sent")
        return piece

    def close(self) -> None:
        """Let go of the file that is open."""
        self._pieces.close()


@SYSTEM.route("GET", "/gallery/zip", READ,
    {200: "zip", 404: "Error: There is nothing to download."}, query=ZIP_QUERY)  # fmt: skip
@deferred("list")
def download_items(app: App, request: Request) -> Response:
    """Get the files of what the gallery shows, or of some of it, in one zip file."""
    reader = ZipReader(existing(choose_files(app, request), "There is nothing to download."))
    headers = {
        "Content-Type": "application/zip",
        "Content-Disposition": content_disposition_attachment(f"{gallery_name(app)}.zip"),
        **NO_STORE,
    }
    return Response(200, headers, [FileSlice(reader, 0, reader.size)], reader)


def choose_files(app: App, request: Request) -> list[Zipped]:
    """Return what is to be downloaded of what the principal may read; 400 if it is too much.

    A text names what is not as the index knows it.
    """
    query, taken = dict(request.query), dict[str, Iterator[str]]()
    group, album, only = (query.pop(name, None) for name in ("group", "album", "only"))
    wanted = None if only is None else set(only.lower().split(","))
    files, missing = list[Zipped](), list[str]()
    items = open_album(app, request, album)[0] if album else open_library(app, query)
    for key, item in group_items(choose_items(items, query, Counter()), query["order"]):
        if group not in {None, key} or (wanted is not None and item.sha256[:12] not in wanted):
            continue
        if len(files) == MAX_ZIPPED:
            raise HTTPError(400, f"These are more than {MAX_ZIPPED} files: choose some of them.")
        found = find_readable(request, item.sha256, trashed=True)
        if not found:
            missing.append(name_in_zip(item, None))
            continue
        file, asset = found
        name, taken_at = name_in_zip(item, asset.facts), int(item.taken[8:]) if item.taken else 0
        opener = functools.partial(open_unchanged, app, file)
        files.append(Zipped(take_name(name, taken), file.size, taken_at, opener))
    if files and missing:
        missing.insert(0, "These files have changed, or gone, since the server looked for them:")
        text = "\n".join(missing).encode()
        files.append(Zipped(MISSING, len(text), int(time.time()), lambda: io.BytesIO(text)))
    return files


def open_unchanged(app: App, file: File) -> io.FileIO:
    """Open a file that is as the index knows it; OSError."""
    source = app.folders[file.root].open(file.path)
    if file.matches(os.fstat(source.fileno())):
        return source
    source.close()
    raise ConnectionAbortedError("a file changed before it was sent")


# What Windows has in no name, and what turns a name's end around (Unicode Standard Annex 9).
UNPORTABLE = str.maketrans(
    '<>:"|?*', "_" * 7, "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)


def portable_name(name: str) -> str:
    """Return a safe name that every system unpacks as it is (APPNOTE.TXT, section 4.4.17.1).

    >>> portable_name("C:a? "), portable_name("..")
    ('C_a_', 'file')
    """
    return safe_name(name.translate(UNPORTABLE)).rstrip(". ")


def name_in_zip(item: GalleryItem, facts: Facts | None) -> str:
    """Return an item's path, or else its name with an extension, as every system takes it."""
    path = item.path.decode("utf-8", "replace")
    if item.id is None:
        return "/".join(map(portable_name, path.split("/")))
    name = portable_name(path)
    return f"{name}.{facts.extension}" if facts and not is_media_name(name.encode()) else name


def take_name(name: str, taken: dict[str, Iterator[str]]) -> str:
    """Take a name that no system takes for one that is taken, with a number if need be."""

    def fold(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()

    free = name
    while fold(free) in taken:
        free = next(taken[fold(name)])
    taken[fold(free)] = itertools.islice(numbered_names(free), 1, None)
    return free


# -- The gallery: its page ---------------------------------------------------------------
# A page for each language; `#` in a text stands for a number or a name. Another language is one
# more table.

TEXTS: Mapping[str, Mapping[str, str]] = {
    "en": {
        "search": "Search names, folders, cameras", "kind": "What to show", "all": "Everything",
        "image": "Photos", "video": "Videos", "audio": "Recordings", "month": "Month",
        "months": "Months", "cameras": "Cameras", "albums": "Albums", "mine": "My uploads",
        "entities": "Archive", "trash": "Trash", "newAlbum": "New album",
        "albumName": "Name of the album", "addTo": "Add to album", "added": "Added to #.",
        "takeOut": "Remove from album", "takenOut": "Removed from the album: #.",
        "rename": "Rename", "removeAlbum": "Delete album",
        "sureAlbum": "Delete the album #? Its pictures stay.", "restore": "Restore",
        "restored": "Restored: #.", "emptyTrash": "Empty trash",
        "sureEmpty": "Delete everything in the trash for good?", "version": "Version #",
        "nothingIn": "Nothing in here",
        "nothingInHow": "Select pictures and add them to an album, or upload some while you "
          "look at it.", "folders": "Folders", "everything": "All folders",
        "below": "with folders below", "byName": "by name", "byDate": "by date",
        "upload": "Upload", "signIn": "Sign in", "signOut": "Sign out",
        "docs": "For developers: the interface", "selection": "Selection", "uploads": "Uploads",
        "viewer": "Viewer", "dropHere": "Drop to upload", "close": "Close", "previous": "Previous",
        "next": "Next", "info": "Details", "download": "Download", "copy": "Copy link",
        "remove": "Delete", "play": "Slideshow", "full": "Full screen", "pick": "Select",
        "picked": "# selected", "clear": "Clear selection", "nothing": "No pictures here yet",
        "nothingHow": "Drop pictures on this page or press Upload. Files that you copy into the "
          "folder appear after its next scan.", "none": "Nothing matches",
        "noneHow": "Try other words, or look at everything.", "showAll": "Show everything",
        "locked": "These pictures are private", "lockedHow": "Sign in to see them.",
        "offline": "The server cannot be reached.",
        "degraded": "The picture folder, or a disk of it, is not there at the moment.",
        "scanning": "Looking through the folder: # files so far.",
        "gone": "This is not here any more.", "copied": "The link is copied.", "link": "The link:",
        "sure": "Delete # for good?", "deleted": "Deleted: #.",
        "denied": "This account may not do that. The owner can allow it.",
        "name": "User name or e-mail", "password": "Password",
        "key": "Or the owner's key, or a token", "useKey": "Use a key instead",
        "stay": "Stay signed in here", "cancel": "Cancel", "wrong": "That did not work.",
        "taken": "Taken", "camera": "Camera", "size": "Size", "length": "Length", "file": "File",
        "folder": "Folder", "place": "Place", "map": "on a map", "waiting": "waiting",
        "sending": "sending", "stored": "stored", "known": "already there",
        "failed": "not uploaded", "retry": "Try again", "pause": "Pause", "resume": "Go on",
        "tooLarge": "Larger than the # that this server takes.",
        "wrongType": "Only photos, videos and recordings can be uploaded.",
        "tooMuch": "Too large, or more than this account may store.",
        "noRoom": "The server's disk is full.",
        "progress": "# done", "byFile": "by the file's date", "share": "Share",
        "linkTitle": "Title", "days": "Days until it ends, 0 for never",
        "linkPassword": "Password, if you like", "strip": "Without place and camera",
        "guests": "Guests may add pictures", "until": "until #", "endLink": "End this link",
    },
    "de": {
        "search": "Namen, Ordner, Kameras suchen", "kind": "Was gezeigt wird", "all": "Alles",
        "image": "Fotos", "video": "Videos", "audio": "Aufnahmen", "month": "Monat",
        "months": "Monate", "cameras": "Kameras", "albums": "Alben", "mine": "Meine Uploads",
        "entities": "Archiv", "trash": "Papierkorb", "newAlbum": "Neues Album",
        "albumName": "Name des Albums", "addTo": "Zu Album hinzufügen",
        "added": "Hinzugefügt zu #.", "takeOut": "Aus dem Album nehmen",
        "takenOut": "Aus dem Album genommen: #.", "rename": "Umbenennen",
        "removeAlbum": "Album löschen", "sureAlbum": "Das Album # löschen? Seine Bilder bleiben.",
        "restore": "Wiederherstellen", "restored": "Wiederhergestellt: #.",
        "emptyTrash": "Papierkorb leeren", "sureEmpty": "Alles im Papierkorb endgültig löschen?",
        "version": "Version #", "nothingIn": "Hier ist noch nichts",
        "nothingInHow": "Wählen Sie Bilder aus und fügen Sie sie einem Album hinzu, oder laden "
          "Sie welche hoch, während Sie es ansehen.", "folders": "Ordner",
        "everything": "Alle Ordner", "below": "mit Unterordnern", "byName": "nach Name",
        "byDate": "nach Datum", "upload": "Hochladen", "signIn": "Anmelden", "signOut": "Abmelden",
        "docs": "Für Entwickler: die Schnittstelle", "selection": "Auswahl",
        "uploads": "Hochgeladenes", "viewer": "Ansicht", "dropHere": "Zum Hochladen loslassen",
        "close": "Schließen", "previous": "Zurück", "next": "Weiter", "info": "Angaben",
        "download": "Herunterladen", "copy": "Link kopieren", "remove": "Löschen",
        "play": "Diaschau", "full": "Vollbild", "pick": "Auswählen", "picked": "# ausgewählt",
        "clear": "Auswahl aufheben", "nothing": "Noch keine Bilder",
        "nothingHow": "Ziehen Sie Bilder auf diese Seite oder drücken Sie „Hochladen“. Dateien, "
          "die Sie in den Ordner kopieren, erscheinen nach der nächsten Suche.",
        "none": "Nichts gefunden",
        "noneHow": "Versuchen Sie andere Wörter, oder sehen Sie alles an.",
        "showAll": "Alles zeigen", "locked": "Diese Bilder sind privat",
        "lockedHow": "Melden Sie sich an, um sie zu sehen.",
        "offline": "Der Server ist nicht erreichbar.",
        "degraded": "Der Bilderordner oder eine Platte davon ist gerade nicht da.",
        "scanning": "Der Ordner wird durchgesehen: bisher # Dateien.",
        "gone": "Das ist nicht mehr hier.", "copied": "Der Link ist kopiert.", "link": "Der Link:",
        "sure": "# endgültig löschen?", "deleted": "Gelöscht: #.",
        "denied": "Dieses Konto darf das nicht. Der Eigentümer kann es erlauben.",
        "name": "Benutzername oder E-Mail", "password": "Passwort",
        "key": "Oder der Schlüssel des Eigentümers, oder ein Token",
        "useKey": "Mit Schlüssel anmelden", "stay": "Hier angemeldet bleiben",
        "cancel": "Abbrechen", "wrong": "Das hat nicht geklappt.", "taken": "Aufgenommen",
        "camera": "Kamera", "size": "Größe", "length": "Länge", "file": "Datei",
        "folder": "Ordner", "place": "Ort", "map": "auf einer Karte", "waiting": "wartet",
        "sending": "wird gesendet", "stored": "gespeichert", "known": "schon da",
        "failed": "nicht hochgeladen", "retry": "Noch einmal", "pause": "Pause",
        "resume": "Weiter", "tooLarge": "Größer als die #, die dieser Server annimmt.",
        "wrongType": "Nur Fotos, Videos und Aufnahmen lassen sich hochladen.",
        "tooMuch": "Zu groß, oder mehr, als dieses Konto speichern darf.",
        "noRoom": "Die Platte des Servers ist voll.",
        "progress": "# fertig", "byFile": "Datum der Datei", "share": "Teilen",
        "linkTitle": "Titel", "days": "Tage bis zum Ende, 0 für keines",
        "linkPassword": "Passwort, wenn Sie mögen", "strip": "Ohne Ort und Kamera",
        "guests": "Gäste dürfen Bilder hinzufügen", "until": "bis #",
        "endLink": "Diesen Link beenden",
    },
}  # fmt: skip

ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 512 512">
<path fill="#0b6b62" d="M0 0h512v512H0z"/><circle cx="340" cy="178" r="46" fill="#ffe3a3"/>
<path fill="#6fd0c2" d="M78 376 208 186l132 190z"/>
<path fill="#d3f5ee" d="M236 376l98-130 100 130z"/>
</svg>
"""
ICON_PNG = base64.b64decode("""
iVBORw0KGgoAAAANSUhEUgAAAMAAAADAAgMAAAAvsoSUAAAADFBMVEX/46PT9e5v0MILa2KzJTG9AAAB6UlEQVR42u2YQW4
DIQxFHWaWkXqVHCFH6VE4So/QG5QjZNklB+iCSl0glYEuMp0EMAYnVVVVnkWYzQv+38bA7BLwHgUCCCCAAAIIIIAAAvwmsO
x2PGAGmDnAOwAsRwZw2n62Z0edKpcZAGAKTJeW8ZA+zsNxGDhlw42JI0WvSctU/2hpLJhNsoD+EfDGBV5uDWkqxhaQwPBmC
ODWtxXcd0MKvBnc9nbIhiZg4HvZ7rPIhhM3dUJKl/+cTKUZAcKVjEOuCQfclU0PVUQ9DaHyeEZMgs0mmNJgLZnxxCWohZJA
4C4g18EaGtI4YJghpR7XSpwbBUIxPnL7ku8Bz7mWyO18PnaAVNhrQdNAqGyyoyGdUV2pVqT9kdFb02pqJIFk6qLSHFttL6R
QyNEA8Do6Q0A1FwBWo5ECTG6TR1QTos2q2baBkQ+dqt1i3BqMbwO55hAx1YSG5LFcK06L6ZXGE1YgijDJYI1AtftwQnOt2o
Vx4fWYBtcVbUaWheprzlW3Q0p4havxzaoCXHuz0yhg2iZZ7jHUY0BhUjL3HHQjBgRqg9cI4KjCsAhgxvbrwcO6r4FEnh1iD
QT6UKPvvz84evXYCuiY5LkhxRIoXPmsCF0A3dVj6ZDcbTd2uYsKIIAAAggggAAC/EXgCxOrmhjFPi/5AAAAAElFTkSuQmCC
""")  # ICON, 192 pixels wide, for phones that take no SVG

GALLERY_MARKUP = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1, viewport-fit=cover">
<meta name="referrer" content="same-origin">
<meta name="theme-color" media="(prefers-color-scheme: light)" content="#faf9f7">
<meta name="theme-color" media="(prefers-color-scheme: dark)" content="#131312">
<title>mediaserver</title>
<style></style>
</head>
<body>
<header id="bar">
  <h1><a id="home" href="gallery"><span id="name">mediaserver</span></a></h1>
  <form id="search" role="search"><input type="search" name="q" enterkeyhint="search"
    data-label="search" maxlength="200" autocomplete="off"></form>
  <div id="filters">
    <select id="kind" data-label="kind" hidden></select>
    <select id="month" data-label="month" hidden></select>
    <select id="camera" data-label="camera" hidden></select>
  </div>
  <button type="button" id="folders" data-icon="folder" data-t="folders" aria-expanded="false">
  </button>
  <button type="button" id="albums" data-icon="albums" data-t="albums"></button>
  <button type="button" id="account" data-icon="person" data-label="signIn"></button>
  <button type="button" id="upload" class="main" data-icon="up" data-t="upload"></button>
</header>
<nav id="places" hidden data-label="folders"></nav>
<p id="state" role="status" hidden></p>
<p id="notice" role="status" hidden></p>
<main id="stage">
  <div id="cards" hidden></div>
  <div id="grid"></div>
  <div id="empty" hidden></div>
</main>
<footer><a href="docs" data-t="docs">docs</a></footer>
<div id="scrubber" aria-hidden="true" hidden><div></div><i></i><b></b></div>
<section id="picked" data-label="selection" hidden></section>
<section id="uploads" data-label="uploads" hidden></section>
<dialog id="viewer" data-label="viewer"></dialog>
<dialog id="login" aria-labelledby="login-title"></dialog>
<input id="files" type="file" multiple hidden accept="image/*,video/*,audio/*,.heic,.heif">
<div id="drop" hidden data-t="dropHere"></div>
<noscript>This page needs JavaScript. Without it, the pictures are listed at /list.</noscript>
<script></script>
</body>
</html>
"""

GALLERY_STYLE = """
#bar {
  position: sticky; top: 0; z-index: 3; display: flex; align-items: center; gap: .5rem;
  padding: .6rem max(1rem, env(safe-area-inset-left)); background: var(--glass);
  backdrop-filter: blur(16px) saturate(1.4);
}
h1 { font-size: 1.15rem; font-weight: 650; letter-spacing: -.01em; margin: 0; min-width: 0 }
h1 a { color: inherit; text-decoration: none; white-space: nowrap }
#search { flex: 1; display: flex; justify-content: center }
input, select {
  min-width: 0; padding: .45rem .8rem; border: 1px solid transparent; border-radius: 1.25rem;
  background: var(--tile); color: inherit; text-overflow: ellipsis;
}
#search input { width: min(26rem, 100%) }
select { max-width: 8.4rem; cursor: pointer }
#filters { display: flex; gap: .35rem }
#home { display: flex; align-items: center; gap: .6rem; overflow: hidden }
#home img { width: 2rem; border-radius: .6rem }
#name, #cards b, #grid h2, .words span, #uploads li > b, #login .list a, .over.top h2 {
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
}
small { color: var(--soft); font-weight: 400 }
button, .button {
  display: inline-flex; align-items: center; justify-content: center; gap: .45rem;
  min-height: 2.5rem; padding: .4rem .7rem; border: 0; border-radius: 1.25rem; background: none;
  color: inherit; font-weight: 550; text-decoration: none; white-space: nowrap;
}
button:hover, .button:hover { background: var(--tile) }
.main, .main:hover { background: var(--accent); color: var(--on-accent); padding: .4rem 1.1rem }
.main:hover { filter: brightness(1.08) }
svg { width: 1.25rem; height: 1.25rem; flex: none; fill: none; stroke: currentColor }
svg { stroke-width: 1.8; stroke-linecap: round; stroke-linejoin: round }
[aria-expanded=true], [aria-pressed=true] { background: var(--tile) }

#places { display: flex; flex-wrap: wrap; gap: .35rem; padding: .2rem 1rem .8rem }
#places a, #places label {
  display: flex; align-items: center; gap: .4rem; padding: .3rem .8rem; border-radius: 1rem;
  background: var(--tile); color: inherit; text-decoration: none; font-size: .9rem;
}
#places a:hover { background: var(--line) }
#places button { min-height: 0; padding: .3rem .8rem; font-size: .9rem; color: var(--soft) }
#places svg { width: 1rem }
#places .here { background: none; color: var(--soft); padding: .3rem .2rem }
.notice { margin: 0 1rem .75rem; padding: .6rem 1rem; border-radius: .75rem }
.notice { background: var(--tile) }
.notice.bad { background: var(--bad); color: var(--on-bad) }

#stage { padding: 0 1rem; min-height: 70vh }
#cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)) }
#cards { padding: .25rem 0 1.25rem }
#cards > * {
  display: grid; grid-template-rows: auto auto; align-content: start; justify-content: stretch;
  gap: .1rem; padding: 0; color: inherit; text-decoration: none; text-align: start;
  border-radius: .9rem; font-weight: 400; background: none;
}
#cards img, #cards svg {
  width: 100%; height: auto; aspect-ratio: 1; object-fit: cover; border-radius: .9rem;
  background: var(--tile); color: var(--soft); transition: filter .2s;
}
#cards svg { padding: 33%; stroke-width: 1.4 }
#cards :hover > img, #cards :hover > svg { filter: brightness(1.06) saturate(1.15) }
#cards b { font-weight: 600; margin-top: .45rem }
#grid { position: relative; overflow: clip }
#grid h2 {
  position: absolute; margin: 0; padding: 1.1rem 0 0; font-size: 1.2rem;
  font-weight: 650; letter-spacing: -.01em;
}
#grid h2 small { font-size: .85rem; margin-inline-start: .5rem }
.tile { position: absolute; overflow: hidden; border-radius: .35rem; background: var(--tile) }
.tile > a { position: absolute; inset: 0; outline-offset: -3px }
.tile img {
  width: 100%; height: 100%; object-fit: cover; opacity: 0;
  transition: opacity .2s, transform .15s;
}
.tile img.ready { opacity: 1 }
.words {
  position: absolute; inset: 0; display: flex; flex-direction: column; gap: .3rem; padding: .5rem;
  align-items: center; justify-content: center; font-size: .75rem; text-align: center;
  color: var(--soft);
}
.words b { font-size: .95rem; color: var(--ink) }
.words b::before { content: attr(data-name) }
.words span { max-width: 100% }
.badge {
  position: absolute; right: .4rem; bottom: .4rem; display: flex; align-items: center; gap: .25rem;
  padding: .05rem .45rem; border-radius: 1rem; background: #000a; color: #fff; font-size: .72rem;
  font-variant-numeric: tabular-nums; pointer-events: none;
}
.badge svg { width: .7rem; height: .7rem; fill: currentColor }
.pick {
  position: absolute; left: .35rem; top: .35rem; min-height: 0; width: 1.75rem; height: 1.75rem;
  padding: 0; border-radius: 50%; color: #fff; background: #0006; opacity: 0;
}
.pick:hover { background: #0009 }
.pick svg { width: 1rem; height: 1rem; stroke-width: 3 }
.tile:hover .pick, .pick:focus-visible, .picking .pick { opacity: 1 }
.tile.on .pick { background: var(--accent); color: var(--on-accent) }
.tile.on img { transform: scale(.86); border-radius: .5rem }

#empty { max-width: 26rem; margin: 14vh auto 0; text-align: center; color: var(--soft) }
#empty svg { width: 3.5rem; height: 3.5rem; stroke-width: 1.2 }
#empty h2 { color: var(--ink); font-size: 1.5rem; letter-spacing: -.02em; margin: .8rem 0 .4rem }
#empty p { margin: 0 0 1.2rem }
footer { padding: 3rem 1rem 1.5rem; text-align: center; font-size: .85rem }
footer a { color: var(--soft) }

#scrubber { position: fixed; right: 0; bottom: 1rem; top: 5rem; width: 2.75rem; z-index: 2 }
#scrubber { touch-action: none; cursor: ns-resize; user-select: none }
#scrubber span {
  position: absolute; right: .5rem; font-size: .7rem; color: var(--soft); translate: 0 -50%;
  padding: 0 .3rem; border-radius: .5rem; opacity: 0; pointer-events: none;
}
#scrubber:hover span, #scrubber.held span { opacity: 1; background: var(--glass) }
#scrubber i { position: absolute; right: 0; width: .9rem; height: 3px; border-radius: 2px }
#scrubber i { background: var(--accent) }
#scrubber > :not(div) { top: var(--at); translate: 0 -50%; pointer-events: none }
#scrubber b {
  position: absolute; right: 2.2rem; padding: .25rem .8rem; border-radius: 1rem; font-weight: 600;
  background: var(--accent); color: var(--on-accent); white-space: nowrap; opacity: 0;
  font-size: .85rem;
}
#scrubber.held b { opacity: 1 }

#picked, #uploads {
  position: fixed; z-index: 4; background: var(--card); border-radius: 1rem;
  inset-inline-end: 1rem; bottom: max(1rem, env(safe-area-inset-bottom));
  box-shadow: var(--shadow);
}
#picked { display: flex; align-items: center; gap: .25rem; padding: .4rem .6rem .4rem 1.2rem }
#picked { inset-inline: 0; margin: 0 auto; width: fit-content; max-width: calc(100vw - 2rem) }
#picked span { margin-inline-end: .5rem; white-space: nowrap }
#uploads { width: min(24rem, calc(100vw - 2rem)); padding: 1rem }
#uploads header { display: flex; align-items: center; gap: .2rem }
#uploads h2 { flex: 1; margin: 0; font-size: 1rem }
#uploads ul { list-style: none; margin: .5rem 0 0; padding: 0; max-height: 40vh; overflow: auto }
#uploads li {
  display: grid; grid-template-columns: 1fr auto; gap: 0 .75rem; padding: .3rem 0;
  font-size: .88rem; align-items: center;
}
#uploads li > b { font-weight: 500 }
#uploads li > span { color: var(--soft); grid-column: 1 / -1 }
#uploads li.failed > span { color: var(--bad) }
#uploads li button { min-height: 0; padding: .1rem .6rem; font-size: .85rem }
progress { width: 100%; height: .3rem; accent-color: var(--accent); grid-column: 1 / -1 }
#drop {
  position: fixed; inset: .75rem; z-index: 9; display: flex; align-items: center; font-weight: 600;
  justify-content: center; border: 3px dashed var(--accent); border-radius: 1.25rem;
  background: var(--glass); backdrop-filter: blur(8px); font-size: 1.4rem; pointer-events: none;
}

dialog { border: 0; color: inherit }
#login { background: var(--card); border-radius: 1.25rem; padding: 1.75rem }
#login { width: min(24rem, calc(100vw - 2rem)); box-shadow: var(--shadow) }
#login::backdrop { background: #0008; backdrop-filter: blur(4px) }
#login h2 { margin: 0 0 1rem; font-size: 1.4rem; letter-spacing: -.02em }
#login label { display: block; margin: .7rem 0; font-size: .9rem; color: var(--soft) }
#login label input:not([type=checkbox]) { display: block; width: 100%; margin-top: .2rem }
#login input { border-radius: .7rem; color: var(--ink); padding: .55rem .8rem }
#login summary { cursor: pointer; color: var(--soft); font-size: .9rem; margin: .5rem 0 }
#login .row { display: flex; justify-content: end; gap: .5rem; margin-top: 1.2rem }
#login .list { display: grid; max-height: 40vh; overflow: auto; margin: 0 -.7rem; padding: 4px }
#login .list > button { justify-content: start; border-radius: .7rem }
#login .list div { display: flex; align-items: center; gap: .2rem; padding: 0 .7rem }
#login .list a { display: grid; flex: 1 }
.error { color: var(--bad); font-size: .9rem; margin: .5rem 0; min-height: 1.4em }
.error.good { color: var(--soft) }

#viewer { position: fixed; inset: 0; width: 100%; height: 100dvh; max-width: none; padding: 0 }
#viewer { max-height: none; background: #0b0b0b; color: var(--ink); overflow: hidden }
#viewer { --ink: #f2f0ec; --soft: #a5a19a; --accent: #6fd0c2; --tile: #fff2 }
#viewer[open] { display: flex }
#view { position: relative; flex: 1; min-width: 0; touch-action: none; overflow: hidden }
#view { outline: 0 }
#view > :not(.over) { position: absolute; inset: 0; margin: auto }
#view > img, #view > video { width: 100%; height: 100%; object-fit: contain }
#view > img { user-select: none; -webkit-user-drag: none }
#view > audio { width: min(30rem, 90%) }
#view > .words b { font-size: 1.4rem }
#view.large { cursor: grab }
.over { position: absolute; z-index: 2; display: flex; align-items: center; gap: .1rem }
.over.top { inset: 0 0 auto; padding: .5rem; background: linear-gradient(#000a, #0000) }
.over.top h2 { flex: 1; min-width: 0; margin: 0 .5rem; font-size: .95rem; font-weight: 500 }
.over.side { top: 50%; translate: 0 -50% }
.over.side button { width: 3rem; height: 3rem; border-radius: 50%; background: #0006 }
.over.left { left: .6rem }
.over.right { right: .6rem }
.idle .over { opacity: 0; transition: opacity .4s }
#facts { width: 20rem; overflow: auto; padding: 1rem 1.25rem; background: #181817; flex: none }
#facts h2 { margin: .2rem 0 1rem; font-size: 1.1rem }
#facts dt { color: var(--soft); font-size: .8rem; margin-top: .8rem }
#facts dd { margin: 0; overflow-wrap: anywhere }
#facts p button { display: grid; justify-content: start; justify-items: start; gap: 0 }
#facts p button { width: calc(100% + 1.4rem); margin: 0 -.7rem; border-radius: .6rem }

@media (max-width: 70rem) {
  #bar { flex-wrap: wrap; gap: .4rem }
  h1 { flex: 1 0 calc(100% - 32rem) }
  #search { order: 5; flex: 1 0 35% }
  #search input { width: 100% }
  #filters { order: 6; max-width: 62%; overflow-x: auto; scrollbar-width: none }
}
@media (max-width: 46rem) {
  #bar { padding: .5rem .75rem }
  h1 { flex: 1 0 calc(100% - 13rem) }
  select { max-width: 7rem; padding: .45rem .6rem; flex: none }
  #cards { grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)) }
  #bar button { padding: .4rem .65rem }
  #bar button span, #picked button span { display: none }
  #stage { padding: 0 .5rem }
  #grid h2 { padding-inline-start: .25rem; font-size: 1.1rem }
  .pick { opacity: 0; pointer-events: none }
  .picking .pick { pointer-events: auto }
  .over.side { display: none }
  #viewer[open] { flex-direction: column }
  #facts { width: auto; max-height: 45vh }
  #places { flex-wrap: nowrap; overflow-x: auto; scrollbar-width: none }
  #places > * { flex: none }
  #scrubber { width: 2rem; top: 7.5rem }
}
"""

GALLERY_SCRIPT = r"""
// -- Words -------------------------------------------------------------------------------
// The texts of the page's language come before; `#` stands for a number or a name.

const LANGUAGE = document.documentElement.lang;
const t = (key, value = "") => TEXTS[key].replace("#", () => value);

// Times are the camera's wall clock, as seconds: what UTC shows is what the clock showed.
const format = (options) => new Intl.DateTimeFormat(LANGUAGE, {timeZone: "UTC", ...options});
const MONTH = format({month: "long", year: "numeric"});
const DAY = format({dateStyle: "long"});
const MOMENT = format({dateStyle: "full", timeStyle: "short"});
const NUMBER = new Intl.NumberFormat(LANGUAGE);

function bytes(count) {
  const power = count < 1000 ? 0 : Math.min(3, Math.floor(Math.log10(count) / 3));
  const options = {maximumFractionDigits: power > 1 ? 1 : 0};
  const number = new Intl.NumberFormat(LANGUAGE, options).format(count / 1000 ** power);
  return `${number} ${["B", "kB", "MB", "GB"][power]}`;
}

function clock(seconds) {
  const parts = [seconds / 3600, seconds / 60 % 60, seconds % 60].map(Math.floor);
  const shown = parts[0] ? parts : parts.slice(1);
  return shown.map((each, place) => place ? String(each).padStart(2, "0") : each).join(":");
}

// -- Pieces of the page ------------------------------------------------------------------

const PATHS = {
  albums: "M8 4h12v12H8zM16 19H5V8M8.5 15l3.5-4 2.5 2.5 2-2L20 15",
  plus: "M12 5v14M5 12h14", undo: "M8 5 4 9l4 4M4.5 9H14a5.5 5.5 0 0 1 0 11h-4",
  folder: "M3 7a2 2 0 0 1 2-2h4l2 2.5h8a2 2 0 0 1 2 2V17a2 2 0 0 1-2 2H5a2 2 0 0 1-2-2z",
  person: "M12 12a4 4 0 1 0 0-8 4 4 0 0 0 0 8zM4.5 20c1-3.6 4-5 7.5-5s6.5 1.4 7.5 5",
  up: "M12 16V5M7.5 9.5 12 5l4.5 4.5M5 19h14", down: "M12 5v11M7.5 11.5 12 16l4.5-4.5M5 19h14",
  close: "M6 6l12 12M18 6 6 18", check: "M5 12.5l4.5 4.5L19 7.5", left: "M15 5l-7 7 7 7",
  right: "M9 5l7 7-7 7", info: "M12 11v5M12 8v.01M12 21a9 9 0 1 0 0-18 9 9 0 0 0 0 18z",
  link: "M10 14a4 4 0 0 0 6 .5l3-3a4 4 0 0 0-6-6l-1 1M14 10a4 4 0 0 0-6-.5l-3 3a4 4 0 0 0 6 6l1-1",
  trash: "M5 7h14M10 7V4.5h4V7M7 7l1 13h8l1-13M10.5 11v5M13.5 11v5", play: "M8 5.5v13l10.5-6.5z",
  pause: "M9 6v12M15 6v12", full: "M4 9V4h5M20 9V4h-5M4 15v5h5M20 15v5h-5",
  share: "M14 5l6 6-6 6v-3.5c-5 0-8 1.5-10 5 .5-6 4-9.5 10-10z",
  pencil: "M4 20l1-4L16 5l3 3L8 19z", picture: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M15.5 9.5v.01",
  lock: "M6 11h12v9H6zM8.5 11V8a3.5 3.5 0 0 1 7 0v3",
  audio: "M9 18V6l10-2v12M9 18a2.5 2.5 0 1 1-5 0 2.5 2.5 0 0 1 5 0zM19 16a2.5 2.5 0 1 1-5 0 2.5"
    + " 2.5 0 0 1 5 0z",
};

function icon(name) {
  const make = (tag) => document.createElementNS("http://www.w3.org/2000/svg", tag);
  const [picture, path] = [make("svg"), make("path")];
  picture.setAttribute("viewBox", "0 0 24 24");
  picture.setAttribute("aria-hidden", "true");
  path.setAttribute("d", PATHS[name]);
  picture.append(path);
  return picture;
}

function button(name, label, run, isNamed = false) {
  const [title, type] = [t(label), "button"];
  return h("button", {type, title, "aria-label": title, onclick: run}, icon(name),
    isNamed ? h("span", {}, title) : "");
}

const $ = (id) => document.getElementById(id);
const instead = (run) => (event) => { event.preventDefault(); return run(event); };
for (const each of document.querySelectorAll("[data-t]")) {
  each.title = t(each.dataset.t);
  each.replaceChildren(each.dataset.icon ? icon(each.dataset.icon) : "",
    h("span", {}, each.title));
}
for (const each of document.querySelectorAll("[data-label]")) {
  each.placeholder = t(each.dataset.label);
  each.setAttribute("aria-label", each.placeholder);
  if (each.dataset.icon) each.append(icon(each.dataset.icon));
}

let shown = null;  // {group, place} of what the viewer shows
let noticeTimer = 0;

// Say what lasts until it is over, in #state, or has just been, in #notice.
function say(id, text, isBad = false) {
  const className = isBad ? "notice bad" : "notice";
  Object.assign($(id), {hidden: !text, textContent: text, className});
}

function notify(text, isBad) {
  const inDialog = document.querySelector("#login[open] .error");
  if (inDialog) {
    Object.assign(inDialog, {textContent: text, className: isBad ? "error" : "error good"});
    return;
  }
  if (shown && text) $("view").querySelector("h2").textContent = text;
  say("notice", text, isBad);
  clearTimeout(noticeTimer);
  noticeTimer = setTimeout(say, isBad ? 8000 : 5000, "notice", "");
}

// What was refused is told wherever nothing else is made of it.
class Refusal extends Error {}

window.addEventListener("unhandledrejection", (event) => {
  if (!(event.reason instanceof Refusal)) return;
  event.preventDefault();
  notify(event.reason.message, true);
});

// -- Who is signed in --------------------------------------------------------------------
// An account has an access token, refreshed quietly; the owner's key is one that lasts. Pictures
// are asked for without a header, so a cookie that only reads goes beside: see POST /session.

const stores = [sessionStorage, localStorage];
let session = JSON.parse(stores.map((each) => each.getItem("mediaserver")).find(Boolean) || "{}");
let uploadToken = "";

function keepSession(value, stay = Boolean(localStorage.getItem("mediaserver"))) {
  session = value;
  for (const each of stores) each.removeItem("mediaserver");
  if (value.access) stores[Number(stay)].setItem("mediaserver", JSON.stringify(value));
  $("account").title = t(value.access ? "signOut" : "signIn");
  $("account").setAttribute("aria-label", $("account").title);
  $("account").setAttribute("aria-pressed", Boolean(value.access));
}

// Seconds until a token's end; tokens that are no JWT last.
function left(token) {
  try {
    const claims = JSON.parse(atob(token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/")));
    return claims.exp - Date.now() / 1000;
  } catch {
    return Infinity;
  }
}

const json = (method, value) => ({
  method, headers: {"Content-Type": "application/json"}, body: JSON.stringify(value),
});

let refreshing = null;

async function refresh() {
  const answer = await reach("/api/auth/token/refresh/", json("POST", {refresh: session.refresh}));
  if (answer.ok) {
    keepSession(await answer.json());
    await startSession();
  } else if (answer.status < 500) {
    keepSession({});
  }
}

async function bearer() {
  if (session.refresh && left(session.access) < 60) {
    refreshing ||= refresh().finally(() => { refreshing = null; });
    await refreshing;
  }
  return session.access ? {Authorization: `Bearer ${session.access}`} : {};
}

const startSession = (access = session.access) =>
  reach("/session", {method: "POST", headers: {Authorization: `Bearer ${access}`}});

setInterval(() => session.access && startSession(), 3600e3);  // a page may stay open for days

const reach = (path, options) =>
  fetch(ROOT + path, options).catch(() => { throw new Refusal(t("offline")); });

const call = async (path, options = {}) =>
  reach(path, {...options, headers: {...options.headers, ...await bearer()}});

// What is wrong by an answer's status and body, in one sentence; `known` are texts by status.
function sentence(status, body, known) {
  const said = {403: "denied", 507: "noRoom", ...known}[status];
  try {
    return said ? t(said) : String(JSON.parse(body).detail || t("wrong"));
  } catch {
    return t("wrong");
  }
}

async function check(answer) {
  if (!answer.ok) throw new Refusal(sentence(answer.status, await answer.text()));
  return answer;
}

// Call, and return what is answered; else a Refusal.
const ask = async (path, options) => check(await call(path, options));
const read = async (path, options) => (await ask(path, options)).json();

async function signOut() {
  if (session.refresh) {
    await call("/api/auth/logout/", json("POST", {refresh: session.refresh}));
  }
  keepSession({});
  await reach("/session", {method: "DELETE"});
  start();
}

// Ask something in the dialog, until `send` does not refuse it.
function showForm(title, fields, send) {
  const error = h("p", {className: "error", role: "alert"});
  const form = h("form", {}, h("h2", {id: "login-title"}, t(title)), fields, error,
    h("div", {className: "row"},
      h("button", {type: "button", onclick: () => $("login").close()}, t("cancel")),
      h("button", {className: "main"}, t(title))));
  form.onsubmit = instead(async () => {
    error.textContent = "";
    await send(form.elements);
    if (form.isConnected) $("login").close();
  });
  $("login").replaceChildren(form);
  if (!$("login").open) $("login").showModal();
}

const field = (name, more) => h("label", {}, t(name), h("input", {name, ...more}));
const tick = (name) => h("label", {}, h("input", {type: "checkbox", name}), " ", t(name));

$("account").onclick = () => session.access ? signOut() : signIn();

function signIn(then = start) {
  const word = {type: "password", autocomplete: "current-password"};
  const fields = [
    field("name", {autocomplete: "username", autocapitalize: "none", spellcheck: false}),
    field("password", word),
    h("details", {}, h("summary", {}, t("useKey")), field("key", {...word, autocomplete: "off"})),
    tick("stay"),
  ];
  showForm("signIn", fields, async ({name, password, key, stay}) => {
    await enter(name.value.trim(), password.value, key.value.trim(), stay.checked);
    await then();  // the form stays until the list says what may be done
  });
}

async function enter(name, password, key, stay) {
  let made = {access: key};
  if (!key) {
    const who = name.includes("@") ? {email: name} : {username: name};
    const answer = await reach("/api/auth/login/", json("POST", {...who, password}));
    made = await (await check(answer)).json();
  }
  await check(await startSession(made.access));
  keepSession(made, stay);
}

// -- What is shown: the page's address ---------------------------------------------------
// These choose; group and item open one in the viewer.

const CHOICES = ["q", "kind", "month", "camera", "folder", "below", "order", "album"];
const NOTHING = Object.fromEntries(CHOICES.map((name) => [name, ""]));
let query = new URLSearchParams();  // of those

function readAddress() {
  const address = new URLSearchParams(location.search);
  const found = new URLSearchParams();
  for (const name of CHOICES) if (address.get(name)) found.set(name, address.get(name));
  const changed = String(found) !== String(query);
  query = found;
  return {changed, group: address.get("group"), item: address.get("item")};
}

function addressOf(changes) {
  const made = new URLSearchParams(query);
  for (const [name, value] of Object.entries(changes)) {
    if (value) made.set(name, value);
    else made.delete(name);
  }
  return made.size ? `?${made}` : location.pathname;
}

function choose(changes) {
  closeViewer();
  if ("album" in changes) clearPicks();  // what can be done with them is the album's affair
  history.pushState(null, "", addressOf(changes));
  start();
}

// A link that changes what is shown, without loading the page again.
function choice(changes, properties, ...children) {
  const link = h("a", {href: addressOf(changes), ...properties}, ...children);
  link.onclick = (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    choose(changes);
  };
  return link;
}

// -- The list: groups (months, or folders) of items --------------------------------------
// The server tells of each group how many items it has and how wide they are together, so the
// whole page's height is known at once; its items are asked for when it comes into view.

const [SHA, PATH, KIND, RATIO, TAKEN, SOURCE, BYTES, WIDTH, HEIGHT, SECONDS, CAMERA, LATITUDE,
  LONGITUDE, ALTITUDE, ID] = Array(15).keys();
const GAP = 4, HEAD = 54, BESIDE = 24, NARROWEST = 205, AHEAD = 900;
const NO_LIST = {name: "mediaserver", groups: [], folders: [], cameras: [], albums: [], path: [],
  read_only: true, max_upload_bytes: Infinity};
let groups = [], list = NO_LIST, listTag = "";

const nameOf = (item) => item[PATH].slice(item[PATH].lastIndexOf("/") + 1);
const folderOf = (item) => item[PATH].slice(0, Math.max(0, item[PATH].lastIndexOf("/")));
const extensionOf = (name) => name.slice(name.lastIndexOf(".") + 1).toLowerCase();
const keyOf = (item) => item[ID] || item[SHA];  // an album may have a picture twice
const isEntity = (item) => /^\d+$/.test(item[ID]);
const record = (item) => `/api/media/media/${item[ID]}/`;
const previewOf = (sha, size) => `${ROOT}/preview/${sha}?size=${size}`;
const preview = (item, size) => previewOf(item[SHA], size);

function original(item) {
  if (isEntity(item)) return `${ROOT}/entity/${item[ID]}/file`;
  return ROOT + (item[ID] ? `${record(item)}file/` : `/image/${item[SHA]}`);
}

// What is looked at: the library (""), a user's collection, a collection of entities, or the
// server's words for the rest.
const album = () => query.get("album") || "";
const isCollection = () => album().includes("-");
const isTree = () => /^(entities|\d+)$/.test(album());

function itemsPath(group = null, form = "items") {
  const asked = new URLSearchParams(query);
  asked.delete("month");  // of the groups that have come
  if (group !== null) asked.set("group", group);
  return `/gallery/${form}${asked.size ? `?${asked}` : ""}`;
}

let starts = 0;

// Load the list as the address chooses it, and draw it; `again`: it may not have changed.
async function start(again = false) {
  const run = ++starts;
  const {group, item} = readAddress();
  const answer = await call(itemsPath()).catch(() => null);
  if (run !== starts) return;
  const status = answer ? answer.status : 0;
  if (status === 401 && session.access) {  // it has expired, or was never good
    keepSession({});
    start(again);
    return;
  }
  if (status === 401 || status === 403) { showLocked(); return; }
  if (status !== 200) {
    say("state", answer ? sentence(status, await answer.text()) : t("offline"), true);
    setTimeout(() => run === starts && start(again), 5000);
    return;
  }
  const tag = answer.headers.get("ETag") + query;
  const value = await answer.json();
  if (run !== starts) return;
  const isScanning = value.scanning !== null;
  const state = isScanning ? t("scanning", NUMBER.format(value.scanning)) : "";
  say("state", value.degraded ? t("degraded") : state, value.degraded);
  setTimeout(() => document.hidden || run !== starts || start(true), isScanning ? 3000 : 30000);
  if (tag !== listTag || !again) takeList(value, again);
  listTag = tag;
  openLinked(group, item);
}

function takeList(value, again) {
  const before = new Map(again ? groups.map((group) => [group.key, group]) : []);
  list = value;
  const month = byName() ? null : query.get("month");
  const chosen = value.groups.filter(([key]) => !month || key === month);
  groups = chosen.map(([key, count, ratio, tag]) => {
    const known = before.get(key);
    if (known?.tag === tag) return known;
    return {key, count, ratio: ratio / 100, tag, items: known?.items, fresh: false, asked: null};
  });
  isNew = true;  // what has the focus may be gone
  if (!again) clearTiles();
  drawHeader();
  layout();
  if (!again) window.scrollTo(0, history.state?.top || 0);
}

const byName = () => query.get("order") === "name";

function titleOf(key) {
  if (byName()) return key || placeName();
  const title = MONTH.format(new Date(`${key}-01T00:00:00Z`));
  return title[0].toUpperCase() + title.slice(1);
}

// Load a group's items, once; the old ones are shown meanwhile.
async function load(group) {
  if (!group.fresh) {
    group.asked ||= read(itemsPath(group.key)).then(({items}) => {
      group.items = items;
      group.count = group.items.length;
      group.ratio = group.items.reduce((sum, item) => sum + item[RATIO], 0) / 100;
      group.fresh = true;
      rearrange(group);
    }).catch(() => setTimeout(() => { group.asked = null; draw(); }, 3000));
    await group.asked;
  }
  return group.items || [];
}

// -- Layout: rows of one width -----------------------------------------------------------

let width = 0, total = 0;
const target = () => Math.max(110, Math.min(230, width / (width < 700 ? 3.2 : 5.2)));

// Rows of a group as [first item, its number of items, top, height], its height, and its width:
// what fits into one row may have others beside it.
function arrange(group) {
  const goal = target();
  const natural = group.ratio * goal + GAP * (group.count - 1);
  group.rows = [];
  group.width = natural < width ? Math.min(width, Math.max(natural, NARROWEST)) : width;
  if (!group.items) {
    group.height = HEAD + Math.max(1, Math.round(group.ratio * goal / width)) * (goal + GAP);
    return;
  }
  let top = HEAD, first = 0, sum = 0;
  group.items.forEach((item, place) => {
    sum += item[RATIO] / 100;
    const room = width - GAP * (place - first);
    const last = place === group.items.length - 1;
    if (sum * goal < room && !last) return;
    const height = Math.min(room / sum, last ? goal : Infinity);
    group.rows.push([first, place + 1 - first, top, height]);
    top += height + GAP;
    [first, sum] = [place + 1, 0];
  });
  group.height = top;
}

function layout() {
  width = $("grid").clientWidth;
  if (!width) return;
  groups.forEach(arrange);
  place();
  draw();
  drawScrubber();
}

function place() {
  let left = 0, line = 0;
  total = 0;
  for (const group of groups) {
    if (left + group.width > width) [total, line, left] = [total + line, 0, 0];
    [group.top, group.left] = [total, left];
    left += group.width + BESIDE;
    line = Math.max(line, group.height);
  }
  total += line;
  $("grid").style.height = `${total}px`;
}

// -- Drawing: only what is in view is in the document ------------------------------------

const tiles = new Map();  // elements by group's key and place in it
const picked = new Map();  // items by their keys
let lastWanted = null, lastTop = 0, nextFrame = 0, drawTimer = 0, keepTimer = 0, isNew = false;

function clearTiles() {
  for (const element of tiles.values()) element.remove();
  tiles.clear();
}

function draw() {
  nextFrame ||= requestAnimationFrame(() => { nextFrame = 0; drawNow(); });
}

function drawNow() {
  const top = window.scrollY - $("grid").offsetTop;
  const [from, to] = [top - AHEAD, top + window.innerHeight + AHEAD];
  const fast = Math.abs(top - lastTop) > window.innerHeight;
  lastTop = top;
  clearTimeout(drawTimer);
  drawTimer = fast ? setTimeout(draw, 120) : 0;
  const wanted = new Set();
  lastWanted = null;
  for (const group of groups) {
    const isInView = group.top < to && group.top + group.height > from;
    if (isInView) drawGroup(group, {from, to, fast, wanted});
  }
  for (const [key, element] of tiles) {
    const hasFocus = !isNew && element.contains(document.activeElement);
    if (wanted.has(key) || hasFocus) continue;
    element.querySelector("img")?.removeAttribute("src");
    element.remove();
    tiles.delete(key);
  }
  isNew = false;
  moveHandle();
  clearTimeout(keepTimer);
  keepTimer = setTimeout(() => shown || history.replaceState({top: window.scrollY}, ""), 400);
}

function drawGroup(group, {from, to, fast, wanted}) {
  const head = want(`${group.key} head ${group.count}`, wanted, () =>
    h("h2", {}, titleOf(group.key), h("small", {}, NUMBER.format(group.count))));
  Object.assign(head.style, {top: `${group.top}px`, insetInlineStart: `${group.left}px`,
    width: `${group.width}px`});
  if (!group.fresh && !fast) load(group);
  for (const [first, count, top, height] of group.rows) {
    if (group.top + top + height < from || group.top + top > to) continue;
    let x = group.left;
    for (let place = first; place < first + count; place++) {
      const item = group.items[place];
      const tile = want(`${group.key}/${keyOf(item)}`, wanted, () => drawTile(group.key, item));
      const wide = height * item[RATIO] / 100;
      Object.assign(tile.style, {
        insetInlineStart: `${x}px`, top: `${group.top + top}px`,
        width: `${wide}px`, height: `${height}px`,
      });
      x += wide + GAP;
      if (!fast) showPicture(tile, item);
    }
  }
}

// The element of this key, made if need be: behind the one before, as Tab goes through them.
function want(key, wanted, make) {
  wanted.add(key);
  if (!tiles.has(key)) {
    tiles.set(key, make());
    if (lastWanted) lastWanted.after(tiles.get(key));
    else $("grid").prepend(tiles.get(key));
  }
  return lastWanted = tiles.get(key);
}

// A group's items have come: what is in view stays where it is.
function rearrange(group) {
  if (!groups.includes(group)) return;
  const above = group.top + group.height < window.scrollY - $("grid").offsetTop;
  const before = group.height;
  arrange(group);
  place();
  if (above) window.scrollBy(0, group.height - before);
  draw();
}

function describe(item) {
  return `${t(item[KIND])}, ${DAY.format(item[TAKEN] * 1000)}, ${nameOf(item)}`;
}

function drawTile(key, item) {
  const open = h("a",
    {href: addressOf({group: key, item: keyOf(item)}), "aria-label": describe(item)});
  const act = (run, ...more) => {  // where the item is by then
    const group = groups.find((each) => each.key === key);
    const place = group.items.findIndex((each) => keyOf(each) === keyOf(item));
    run({group, place}, ...more);
  };
  const pick = button("check", "pick", (event) => act(togglePick, event.shiftKey));
  pick.className = "pick";
  pick.setAttribute("aria-pressed", picked.has(keyOf(item)));
  const tile = h("div", {className: picked.has(keyOf(item)) ? "tile on" : "tile"}, open, pick);
  Object.assign(tile.dataset, {sha: item[SHA], key: keyOf(item)});
  open.onclick = (event) => {
    if (event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    if (picked.size || event.shiftKey) act(togglePick, event.shiftKey);
    else act(openItem);
  };
  open.onkeydown = (event) => act(moveFocus, event);
  holdToPick(open, () => act(togglePick));
  if (item[KIND] === "video") {
    const length = item[SECONDS] ? clock(item[SECONDS]) : "";
    tile.append(h("span", {className: "badge"}, icon("play"), length));
  }
  return tile;
}

function showPicture(tile, item) {
  const link = tile.firstChild;
  if (link.firstChild) return;
  if (item[KIND] === "audio") { link.append(wordsFor(item)); return; }
  const picture = h("img", {alt: "", decoding: "async", draggable: false});
  picture.onload = () => picture.classList.add("ready");
  picture.onerror = () => picture.hasAttribute("src") && picture.replaceWith(wordsFor(item));
  picture.src = preview(item, 320);
  link.append(picture);
}

// What stands where there is no picture to see.
function wordsFor(item) {
  const symbol = {image: "picture", video: "play", audio: "audio"}[item[KIND]];
  return h("span", {className: "words", "aria-hidden": "true"}, icon(symbol),
    h("b", {"data-name": extensionOf(nameOf(item)).toUpperCase()}),
    h("span", {dir: "auto"}, nameOf(item)));
}

// Arrow keys go from tile to tile.
async function moveFocus(from, event) {
  const row = rowOf(from)?.[1] || 1;
  const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -row, ArrowDown: row}[event.key];
  if (!step) return;
  event.preventDefault();
  const there = await neighbour(from, step);
  if (!there) return;
  reveal(there);
  drawNow();
  tiles.get(tileKey(there))?.firstChild.focus();
}

// Where an item is: in which group, and there in which place.
const itemAt = ({group, place}) => group.items[place];
const tileKey = (there) => `${there.group.key}/${keyOf(itemAt(there))}`;
const rowOf = ({group, place}) => group.rows.find(([first, count]) => place < first + count);

// Scroll so that an item is in view.
function reveal(there) {
  const row = rowOf(there);
  if (!row) return;
  const top = $("grid").offsetTop + there.group.top + row[2];
  const covered = $("bar").offsetHeight + 8;
  if (top < window.scrollY + covered) window.scrollTo(0, top - covered - HEAD);
  else if (top + row[3] > window.scrollY + window.innerHeight) {
    window.scrollTo(0, top + row[3] - window.innerHeight + 24);
  }
}

// The item some steps away, its group loaded if need be; a new list may have come meanwhile.
async function neighbour({group, place}, step) {
  let there = place + step, number = groups.findIndex((each) => each.key === group.key);
  if (number < 0) return null;
  while (there < 0 || there >= groups[number].count) {
    if (there < 0) {
      if (number === 0) return null;
      there += groups[--number].count;
    } else {
      there -= groups[number].count;
      if (++number === groups.length) return null;
    }
  }
  const found = groups[number];
  return (await load(found))[there] ? {group: found, place: there} : null;
}

window.addEventListener("scroll", draw, {passive: true});
new ResizeObserver(() => $("grid").clientWidth !== width && layout()).observe($("grid"));

// -- Above the list: search, kinds, months, folders --------------------------------------

function drawHeader() {
  $("name").textContent = list.name;
  document.title = placeName();
  $("home").href = location.pathname;
  document.querySelector("footer a").href = `${ROOT}/docs`;
  const words = $("search").elements.q;
  if (words !== document.activeElement) words.value = query.get("q") || "";
  const kinds = album() === "all" ? [] : ["image", "video", "audio"];
  fill("kind", kinds.map((each) => [each, t(each)]), "all");
  fill("month", byName() ? [] : list.groups.map(([key]) => [key, titleOf(key)]), "months");
  fill("camera", list.cameras.map((name) => [name, name]), "cameras");
  $("folders").hidden = Boolean(album());
  $("albums").setAttribute("aria-pressed", Boolean(album()));
  $("upload").hidden = list.read_only || album() === "trash";
  drawPlaces();
  drawCards();
  drawEmpty();
}

// The choices of a filter, behind one for all; it is there where there is something to choose.
function fill(name, options, all) {
  const choices = [["", t(all)], ...options];
  $(name).replaceChildren(...choices.map(([value, text]) => h("option", {value}, text)));
  $(name).value = query.get(name) || "";
  $(name).hidden = options.length < 2 && !query.get(name);
}

const sortChoice = () =>
  choice({order: byName() ? "" : "name", month: ""}, {}, t(byName() ? "byDate" : "byName"));

function drawPlaces() {
  const here = query.get("folder") || "";
  const open = Boolean(here || album()) || $("folders").getAttribute("aria-expanded") === "true";
  $("places").hidden = !open;
  $("folders").setAttribute("aria-expanded", open && !album());
  const steps = album()
    ? [["all", t("albums")], ...way()].map(([key, name]) => [{...NOTHING, album: key}, name])
    : [["", t("everything")], ...here.split("/").filter(Boolean).map((part, at, parts) =>
      [parts.slice(0, at + 1).join("/"), part])].map(([folder, name]) =>
      [{folder, below: folder && query.get("below")}, name]);
  $("places").replaceChildren(...steps.flatMap(([changes, name], at) => [
    at ? h("span", {className: "here"}, "›") : "", choice(changes, {}, h("bdi", {}, name))]),
    ...album() ? [] : foldersIn(here), groups.length ? sortChoice() : "", ...actsHere());
}

// The folders in this one, and whether what is below it is shown, too.
function foldersIn(here) {
  const inside = new Map();
  for (const [folder, count] of list.folders) {
    const [name] = (here ? folder.slice(here.length + 1) : folder).split("/");
    if (name) inside.set(name, (inside.get(name) || 0) + count);
  }
  const below = [...inside].map(([name, count]) => choice(
    {folder: here ? `${here}/${name}` : name, below: ""}, {}, icon("folder"), name,
    h("small", {}, NUMBER.format(count))));
  const deep = query.get("below") !== "false";
  const deeper = h("input", {type: "checkbox", checked: deep,
    onchange: () => choose({below: deep ? "false" : ""})});
  return [...below, here ? h("label", {}, deeper, t("below")) : ""];
}

// What can be done with a folder, a month or an album as a whole.
function actsHere() {
  const made = [];
  const act = (...about) => made.push(button(...about, true));
  if (groups.length) {
    act("down", "download", () => save(ROOT + itemsPath(query.get("month"), "zip")));
  }
  const name = (query.get("folder") || placeName()).split("/").pop();
  if (shareOf()) act("share", "share", () => share(shareOf(), name));
  if (list.read_only) return made;
  if (isCollection()) {
    act("pencil", "rename", renameAlbum);
    act("trash", "removeAlbum", removeAlbum);
  }
  if (album() === "trash" && groups.length) act("trash", "emptyTrash", emptyTrash);
  return made;
}

// -- Albums ------------------------------------------------------------------------------
// A user's collections, the tree of the entities, and the trash of both.

const openAlbum = (key, ...children) => choice({...NOTHING, album: key}, {}, ...children);

// Each album on the way to what is looked at, as [key, name].
function way() {
  if (!album() || album() === "all") return [];
  if (list.path.length && !isTree()) return list.path;
  return isTree() ? [["entities", t("entities")], ...list.path] : [[album(), t(album())]];
}

const placeName = () => way().at(-1)?.[1] || (album() ? t("albums") : list.name);

function drawCards() {
  const albums = (list.albums || []).filter(([key]) => !list.read_only || key !== "trash");
  const symbols = {mine: "person", entities: "folder", trash: "trash"};
  const cards = albums.map(([key, name, count, cover]) => openAlbum(key,
    cover ? h("img", {src: previewOf(cover, 320), alt: "", loading: "lazy"})
      : icon(symbols[key] || "albums"),
    h("b", {dir: "auto"}, symbols[key] ? t(key) : name),
    h("small", {}, count ? NUMBER.format(count) : "")));
  if (album() === "all" && !list.read_only) {
    cards.push(h("button", {type: "button", onclick: () => needAccount(newAlbum)}, icon("plus"),
      h("b", {}, t("newAlbum")), h("small")));
  }
  $("cards").replaceChildren(...cards);
  $("cards").hidden = !cards.length;
}

const needAccount = (run) => list.has_account ? run() : signIn(() => start().then(run));

const collectionPath = (key) => `/api/media/collections/${key}/`;

// Ask for an album's name in the dialog, below `more`.
function askName(title, label, value, send, more = "") {
  showForm(title, [more, field(label, {value, required: true, maxLength: 255})],
    (elements) => send(elements[label].value));
}

const makeAlbum = async (name) =>
  (await read("/api/media/collections/", json("POST", {name}))).id;

const newAlbum = () => askName("newAlbum", "albumName", "", async (name) =>
  choose({...NOTHING, album: await makeAlbum(name)}));

const renameAlbum = () => askName("rename", "albumName", placeName(), async (name) => {
  await ask(collectionPath(album()), json("PATCH", {name}));
  start(true);
});

async function removeAlbum() {
  if (!window.confirm(t("sureAlbum", placeName()))) return;
  await ask(collectionPath(album()), {method: "DELETE"});
  choose({...NOTHING, album: "all"});
}

async function emptyTrash() {
  if (!window.confirm(t("sureEmpty"))) return;
  await ask("/trash", {method: "DELETE"});
  start(true);
}

async function addToAlbum(items) {
  const {albums} = await read("/gallery/items?album=all");
  const put = async (key, name) => {
    await fillAlbum(key, items);
    $("login").close();
    clearPicks();
    notify(t("added", name));
  };
  const mine = albums.filter(([key]) => key.includes("-")).map(([key, name]) =>
    h("button", {type: "button", onclick: () => put(key, name)}, icon("albums"), name));
  askName("addTo", "newAlbum", "", async (name) => put(await makeAlbum(name), name),
    h("div", {className: "list"}, mine));
}

// Put items into a collection: own records move there, all else is shown there.
async function fillAlbum(key, items) {
  const own = items.filter((item) => item[ID] && !isEntity(item));
  const hashes = items.filter((item) => !own.includes(item)).map((item) => item[SHA]);
  for (const item of own) {
    await ask(`${record(item)}add-to-collection/`, json("POST", {collection_id: key}));
  }
  for (let at = 0; at < hashes.length; at += 1000) {
    const sha256 = hashes.slice(at, at + 1000);
    await ask(`${collectionPath(key)}add/`, json("POST", {sha256}));
  }
}

// -- Links for who has no account --------------------------------------------------------

// What a link to an item, or else to what is looked at, would show; null if one may make none.
function shareOf(item) {
  let [kind, target] = ["folder", query.get("folder")];
  if (item) [kind, target] = item[ID] ? ["media", item[ID]] : ["file", item[SHA]];
  else if (isCollection()) [kind, target] = ["collection", album()];
  if (/^\d+$/.test(item ? item[ID] : album())) [kind, target] = ["entity", item?.[ID] || album()];
  const may = /^(media|collection)$/.test(kind) ? list.has_account : list.can_write;
  return may && target ? {kind, target} : null;
}

// Make a link in the dialog, which lists all that there are.
async function share(shown, title) {
  const links = (await read("/shares")).map(({id, url, title: name, expires_at: end}) => {
    const remove = async () => {
      await ask(`/shares/${id}`, {method: "DELETE"});
      share(shown, title);
    };
    const until = end ? t("until", DAY.format(new Date(end))) : "";
    return h("div", {}, h("a", {href: url, target: "_blank", dir: "auto"}, name || url,
      h("small", {}, until)),
      button("link", "copy", () => copy(url)), button("trash", "endLink", remove));
  });
  const grows = !/^(file|media)$/.test(shown.kind);
  showForm("share", [
    h("div", {className: "list"}, links), field("linkTitle", {value: title, maxLength: 255}),
    field("days", {type: "number", min: 0, value: 30}),
    field("linkPassword", {autocomplete: "off"}), tick("strip"), grows ? tick("guests") : "",
  ], async ({linkTitle, days, linkPassword, strip, guests}) => {
    await ask("/shares", json("POST", {
      ...shown, title: linkTitle.value, password: linkPassword.value || null,
      strip: strip.checked, upload: Boolean(guests?.checked), expires_in: 86400 * days.value,
    }));
    await share(shown, title);
  });
}

function drawEmpty() {
  const bare = query.size === 1 && album();  // nothing is chosen but an album
  $("empty").hidden = groups.length > 0 || bare === "all" || (bare && list.albums.length > 0);
  if ($("empty").hidden) return;
  if (bare) {
    const isTrash = bare === "trash";
    showEmpty(isTrash ? "trash" : "albums", "nothingIn", isTrash ? "" : "nothingInHow");
  } else if (query.size) {
    showEmpty("picture", "none", "noneHow",
      choice(NOTHING, {className: "button main"}, t("showAll")));
  } else {
    const run = () => $("upload").click();
    const upload = h("button", {className: "main", onclick: run}, t("upload"));
    showEmpty("picture", "nothing", "nothingHow", list.read_only ? "" : upload);
  }
}

function showEmpty(symbol, title, hint, action = "") {
  $("empty").hidden = false;
  $("empty").replaceChildren(icon(symbol), h("h2", {}, t(title)), h("p", {}, hint && t(hint)),
    action);
}

function showLocked() {
  listTag = "";
  say("state", "");
  takeList({...NO_LIST, read_only: !uploadToken});
  showEmpty("lock", "locked", "lockedHow",
    h("button", {className: "main", onclick: () => signIn()}, t("signIn")));
}

$("home").onclick = instead(() => choose(NOTHING));
$("search").onsubmit = instead(({target}) =>
  choose({q: target.elements.q.value.trim(), album: album() === "all" ? "" : album()}));
$("search").elements.q.addEventListener("search", (event) => {
  if (!event.target.value && query.get("q")) choose({q: ""});
});
for (const name of ["kind", "month", "camera"]) {
  $(name).onchange = (event) => choose({[name]: event.target.value});
}
$("folders").onclick = () => {
  $("folders").setAttribute("aria-expanded", $("places").hidden);
  if (query.get("folder")) choose({folder: "", below: ""});
  else drawPlaces();
};
$("albums").onclick = () => choose({...NOTHING, album: album() === "all" ? "" : "all"});

// -- The scrubber: years along the right edge --------------------------------------------

const bar = $("scrubber");

function drawScrubber() {
  bar.hidden = total < 3 * window.innerHeight || byName();
  if (bar.hidden) return;
  const marks = [];
  let year = "", lowest = -30;
  for (const group of groups) {
    const top = group.top / total * bar.clientHeight;
    if (group.key.slice(0, 4) === year || top < lowest + 20) continue;
    year = group.key.slice(0, 4);
    lowest = top;
    marks.push(h("span", {}, year));
    marks.at(-1).style.top = `${top}px`;
  }
  bar.firstChild.replaceChildren(...marks);
  moveHandle();
}

function moveHandle() {
  if (bar.hidden) return;
  const scrolled = Math.max(0, window.scrollY - $("grid").offsetTop);
  bar.style.setProperty("--at", `${100 * scrolled / total}%`);
  if (!bar.classList.contains("held")) return;
  bar.lastChild.textContent = titleOf(groups.findLast((group) => group.top <= scrolled).key);
}

function scrub(event) {
  const box = bar.getBoundingClientRect();
  const share = Math.max(0, Math.min(1, (event.clientY - box.top) / box.height));
  window.scrollTo({top: $("grid").offsetTop + share * total - 1, behavior: "instant"});
}

bar.onpointerdown = (event) => {
  bar.setPointerCapture(event.pointerId);
  bar.classList.add("held");
  scrub(event);
};
bar.onpointermove = (event) => bar.classList.contains("held") && scrub(event);
bar.onlostpointercapture = () => bar.classList.remove("held");

// -- Selecting ---------------------------------------------------------------------------

let lastPick = null;

function togglePick({group, place}, range) {
  const on = !picked.has(keyOf(group.items[place]));
  const from = range && lastPick && lastPick.group === group ? lastPick.place : place;
  for (let at = Math.min(from, place); at <= Math.max(from, place); at++) {
    const item = group.items[at];
    if (on) picked.set(keyOf(item), item);
    else picked.delete(keyOf(item));
  }
  lastPick = {group, place};
  drawPicked();
}

function drawPicked() {
  document.body.classList.toggle("picking", picked.size > 0);
  for (const tile of document.querySelectorAll(".tile")) {
    tile.classList.toggle("on", picked.has(tile.dataset.key));
    tile.querySelector(".pick").setAttribute("aria-pressed", picked.has(tile.dataset.key));
  }
  const items = [...picked.values()];
  $("picked").hidden = !items.length;
  const count = h("span", {role: "status"}, t("picked", NUMBER.format(items.length)));
  $("picked").replaceChildren(count,
    button("down", "download", () => downloadAll(items), true),
    list.read_only || album() === "trash" ? ""
      : button("plus", "addTo", () => needAccount(() => addToAlbum(items))),
    ...removeButtons(items), button("close", "clear", clearPicks));
}

function clearPicks() {
  picked.clear();
  drawPicked();
}

// A long press selects, as phones have it.
function holdToPick(link, pick) {
  let timer = 0;
  link.addEventListener("touchstart", () => {
    timer = setTimeout(() => { pick(); timer = -1; }, 450);
  }, {passive: true});
  for (const name of ["touchmove", "touchcancel"]) {
    link.addEventListener(name, () => clearTimeout(timer), {passive: true});
  }
  link.addEventListener("touchend", (event) => {
    clearTimeout(timer);
    if (timer === -1) event.preventDefault();
  });
  link.addEventListener("contextmenu", (event) => timer === -1 && event.preventDefault());
}

// The buttons that bring items back or take them away.
function removeButtons(items) {
  if (!items.every(removal)) return [];
  const label = isCollection() ? "takeOut" : "remove";
  return [
    album() === "trash" ? button("undo", "restore", () => restoreAll(items)) : "",
    button("trash", label, () => deleteAll(items)),
  ];
}

// The call that deletes an item, if one may: of the library only what was uploaded for everybody,
// since all else in the folder is its owner's.
function removal(item) {
  if (list.read_only) return null;
  const path = `/media/${encodeURIComponent(nameOf(item))}`;
  if (!album()) {
    const uploaded = /^media\/[^/]+$/.test(item[PATH]) && list.can_upload;
    return uploaded ? [withToken(path), {method: "DELETE"}] : null;
  }
  if (album() === "trash") return [`/trash/${item[ID]}`, {method: "DELETE"}];
  if (isCollection()) return [`${record(item)}remove-from-collection/`, {method: "POST"}];
  if (!isTree()) return [record(item), {method: "DELETE"}];
  return list.can_write ? [`/entity/${item[ID]}`, json("PATCH", {is_deleted: true})] : null;
}

const nameAll = (items) => items.length === 1 ? nameOf(items[0]) : NUMBER.format(items.length);

// Call for each item; a viewer goes on to the next.
async function callAll(items, callOf, said) {
  const next = shown && (await neighbour(shown, 1) || await neighbour(shown, -1));
  try {
    for (const item of items) {
      const answer = await call(...callOf(item));
      if (answer.status !== 404) await check(answer);
      picked.delete(keyOf(item));
    }
    if (shown) history.replaceState(null, "", addressTo(next));
  } finally {  // one may have been refused
    drawPicked();
    await start(true);
  }
  notify(t(said, nameAll(items)));
}

async function deleteAll(items) {
  const forGood = !album() || album() === "trash";
  if (forGood && !window.confirm(t("sure", nameAll(items)))) return;
  await callAll(items, removal, isCollection() ? "takenOut" : "deleted");
}

const restoreAll = (items) =>
  callAll(items, (item) => [`/trash/${item[ID]}/restore`, {method: "POST"}], "restored");

const MOST_NAMED = 600;  // in an address that every proxy takes

function save(url, name = "") {  // where there is none, the server names the file
  h("a", {href: url, download: name}).click();
}

function downloadAll(items) {
  if (items.length === 1) { save(original(items[0]), nameOf(items[0])); return; }
  for (let at = 0; at < items.length; at += MOST_NAMED) {
    const only = items.slice(at, at + MOST_NAMED).map((item) => item[SHA].slice(0, 12)).join();
    save(`${ROOT}/gallery/zip?${album() && `album=${album()}&`}only=${only}`);
  }
}

// -- The viewer --------------------------------------------------------------------------

const BROWSERS_SHOW = /^(jpe?g|png|gif|webp|avif|svg|bmp)$/;
let pushed = false;  // whether its closing goes back in the history
let factsOpen = false, slideshow = 0, lastShown = "";

// Have the viewer show what the address names, if that is an item.
async function openLinked(key, wanted) {
  if (!wanted) { closeViewer(); return; }
  const isShown = () => shown && keyOf(shown.group.items?.[shown.place] || []) === wanted;
  if (isShown() && groups.includes(shown.group)) return;
  const group = groups.find((each) => each.key === (key || ""));
  const found = group ? await load(group) : [];
  const at = found.findIndex((item) => keyOf(item) === wanted);
  if (at < 0) {
    closeViewer();
    notify(t("gone"), true);
  } else if (isShown()) {
    shown = {group, place: at};
  } else {
    pushed = false;
    show({group, place: at});
  }
}

// The address of an item of a group, or of none.
const addressTo = (there) =>
  addressOf(there ? {group: there.group.key, item: keyOf(itemAt(there))} : {});

function openItem(there) {
  history.pushState(null, "", addressTo(there));
  pushed = true;
  show(there);
}

function show(there) {
  const item = itemAt(there);
  shown = there;
  lastShown = tileKey(there);
  const focused = document.activeElement.title;
  $("viewer").replaceChildren(drawView(item), factsOpen ? drawFacts(item) : "");
  if (!$("viewer").open) $("viewer").showModal();
  const buttons = [...$("viewer").querySelectorAll("button")];
  (buttons.find((each) => each.title === focused) || $("view")).focus();
  document.title = nameOf(item);
  for (const step of [1, -1]) {
    neighbour(there, step).then((next) => {
      const near = next && itemAt(next);
      if (near && near[KIND] === "image") new Image().src = preview(near, viewSize());
    });
  }
}

const viewSize = () =>
  Math.max(window.innerWidth, window.innerHeight) * devicePixelRatio > 1600 ? 2160 : 1440;

function drawView(item) {
  const top = h("div", {className: "over top"}, button("close", "close", closeShown),
    h("h2", {dir: "auto"}, nameOf(item)),
    button(slideshow ? "pause" : "play", "play", toggleSlideshow),
    button("info", "info", toggleFacts),
    button("link", "copy", () => copy(location.href)),
    shareOf(item) ? button("share", "share", () => share(shareOf(item), nameOf(item))) : "",
    button("down", "download", () => save(original(item), nameOf(item))),
    ...removeButtons([item]),
    document.fullscreenEnabled ? button("full", "full", toggleFull) : "");
  const sides = [[-1, "left", "previous"], [1, "right", "next"]].map(([step, symbol, label]) => {
    return h("div", {className: `over side ${symbol}`}, button(symbol, label, () => go(step)));
  });
  return h("div", {id: "view", tabIndex: -1}, drawMedium(item), top, ...sides);
}

function drawMedium(item) {
  const failed = () => medium.replaceWith(wordsFor(item));
  let medium;
  if (item[KIND] === "image") {
    medium = h("img", {alt: describe(item), draggable: false, onerror: () => {
      medium.onerror = failed;
      medium.src = original(item);
    }});
    medium.style.background = `center / contain no-repeat url("${preview(item, 320)}")`;
    medium.onload = () => { medium.style.background = ""; };  // it stood in for the large one
    medium.src = preview(item, viewSize());
    zoomable(medium, item);
  } else {
    medium = h(item[KIND], {controls: true, autoplay: true, playsInline: true, onerror: failed});
    if (item[KIND] === "video") medium.poster = preview(item, 720);
    medium.src = original(item);
    medium.onended = () => slideshow && go(1);
  }
  return medium;
}

function drawFacts(item) {
  const [latitude, longitude] = [item[LATITUDE], item[LONGITUDE]];
  const high = item[ALTITUDE] ? `${NUMBER.format(Math.round(item[ALTITUDE]))} m, ` : "";
  const where = Number.isFinite(latitude) && h("span", {},
    `${high}${latitude.toFixed(5)}, ${longitude.toFixed(5)} `,
    h("a", {target: "_blank", rel: "noreferrer", href: "https://www.openstreetmap.org/?mlat="
      + `${latitude}&mlon=${longitude}#map=15/${latitude}/${longitude}`}, t("map")));
  const pixels = item[WIDTH] ? `${item[WIDTH]} × ${item[HEIGHT]}, ` : "";
  const rows = [
    ["taken", `${MOMENT.format(item[TAKEN] * 1000)} (${item[SOURCE] || t("byFile")})`],
    ["camera", item[CAMERA]],
    ["size", pixels + bytes(item[BYTES])],
    ["length", item[SECONDS] ? clock(item[SECONDS]) : null], ["place", where],
    ["file", nameOf(item)], ["folder", folderOf(item) && choice(
      {...NOTHING, folder: folderOf(item)}, {}, folderOf(item))],
  ].filter(([, value]) => value);
  const versions = h("p");
  if (isEntity(item)) listVersions(item, versions);
  return h("aside", {id: "facts"}, h("h2", {}, t("info")), h("dl", {},
    rows.map(([name, value]) => [h("dt", {}, t(name)), h("dd", {dir: "auto"}, value)])), versions);
}

// The versions of an entity, the newest first; each can be looked at.
async function listVersions(item, place) {
  const answer = await call(`/entity/${item[ID]}/versions`);
  if (!answer.ok) return;
  place.append(...(await answer.json()).reverse().map(({version, label, updated_date: updated}) =>
    h("button", {type: "button", onclick: () => {
      $("view").firstChild.src = `${original(item)}?version=${version}`;
    }}, t("version", version), h("small", {dir: "auto"},
      `${DAY.format(new Date(updated))} ${label || ""}`))));
}

async function go(step) {
  const from = shown;
  const there = await neighbour(from, step);
  if (shown !== from) return;
  if (!there) { stopSlideshow(); return; }
  history.replaceState(null, "", addressTo(there));
  show(there);
}

function closeShown() {
  if (pushed) history.back();
  else {
    history.replaceState(null, "", addressTo(null));
    closeViewer();
  }
}

function closeViewer() {
  if (!shown) return;
  const there = shown;
  shown = null;
  stopSlideshow();
  if (document.fullscreenElement) document.exitFullscreen();
  $("viewer").replaceChildren();
  $("viewer").close();
  document.title = placeName();
  reveal(there);
  drawNow();
  tiles.get(lastShown)?.firstChild.focus({preventScroll: true});
}

function toggleFacts() {
  factsOpen = !factsOpen;
  $("facts")?.remove();
  if (factsOpen) $("viewer").append(drawFacts(itemAt(shown)));
}

function stopSlideshow() {
  clearInterval(slideshow);
  slideshow = 0;
}

function toggleSlideshow() {
  if (slideshow) stopSlideshow();
  else slideshow = setInterval(() => shown && itemAt(shown)[KIND] === "image" && go(1), 4000);
  show(shown);
}

const toggleFull = () =>
  document.fullscreenElement ? document.exitFullscreen() : $("viewer").requestFullscreen();

async function copy(url) {
  try {
    await navigator.clipboard.writeText(url);
    notify(t("copied"));
  } catch {  // there is none over http, or it may not be used
    window.prompt(t("link"), url);
  }
}

$("viewer").addEventListener("cancel", instead(closeShown));
document.addEventListener("keydown", (event) => {
  const elsewhere = !shown || event.target.matches("video, audio, #login *");
  if (elsewhere || event.ctrlKey || event.metaKey || event.altKey) return;
  const run = {
    ArrowRight: () => go(1), ArrowLeft: () => go(-1), i: toggleFacts, f: toggleFull,
    s: toggleSlideshow,
    Delete: () => removal(itemAt(shown)) && deleteAll([itemAt(shown)]),
  }[event.key];
  if (!run) return;
  event.preventDefault();
  run();
});

// Hide what lies over a picture while nobody moves.
let idle = 0;
$("viewer").addEventListener("pointermove", () => {
  $("viewer").classList.remove("idle");
  clearTimeout(idle);
  idle = setTimeout(() => $("viewer").classList.add("idle"), 3000);
});
$("viewer").addEventListener("focusin", () => $("viewer").classList.remove("idle"));

// Wheel, pinch and double click zoom; a drag moves what is large, or else goes on.
function zoomable(picture, item) {
  const fingers = new Map();
  let scale = 1, x = 0, y = 0, begun = null;

  // Where the fingers are together, and how far apart.
  function grip() {
    const [first, second = first] = [...fingers.values()];
    const [dx, dy] = [second.clientX - first.clientX, second.clientY - first.clientY];
    return {x: first.clientX + dx / 2, y: first.clientY + dy / 2, wide: Math.hypot(dx, dy) || 1};
  }

  // Zoom about a point of the window, and move.
  function zoom(factor, at, dx = 0, dy = 0) {
    const view = $("view"), box = view.getBoundingClientRect();
    const wanted = Math.max(1, Math.min(8, scale * factor));
    const put = (value, from, length) => {
      const most = length * (wanted - 1) / 2;
      return Math.max(-most, Math.min(most, from - (from - value) * wanted / scale));
    };
    x = put(x + dx, at.x - box.left - box.width / 2, box.width);
    y = put(y + dy, at.y - box.top - box.height / 2, box.height);
    scale = wanted;
    picture.style.transform = scale === 1 ? "" : `translate(${x}px, ${y}px) scale(${scale})`;
    view.classList.toggle("large", scale > 1);
    const known = BROWSERS_SHOW.test(extensionOf(nameOf(item)));
    if (scale > 1.5 && known && picture.src.includes("/preview/")) {
      const large = new Image();  // shown only once it is there, so that nothing flickers
      large.onload = () => { picture.src = large.src; };
      large.src = original(item);
    }
  }

  picture.onwheel = instead((event) =>
    zoom(Math.exp(-event.deltaY / (event.ctrlKey ? 100 : 400)), event));
  picture.ondblclick = (event) => zoom(scale > 1 ? 0 : 3, event);
  picture.onpointerdown = (event) => {
    picture.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, event);
    begun = fingers.size === 1 ? event : null;
  };
  picture.onpointermove = (event) => {
    if (!fingers.has(event.pointerId)) return;
    const before = grip();
    fingers.set(event.pointerId, event);
    const {x: left, y: top, wide} = grip();
    if (fingers.size === 1 && scale === 1) return;
    zoom(wide / before.wide, {x: left, y: top}, left - before.x, top - before.y);
  };
  picture.onpointerup = picture.onpointercancel = (event) => {
    fingers.delete(event.pointerId);
    if (!begun || event.type === "pointercancel" || scale > 1) return;
    const [dx, dy] = [event.clientX - begun.clientX, event.clientY - begun.clientY];
    begun = null;
    if (Math.abs(dx) > 50 && Math.abs(dx) > 2 * Math.abs(dy)) go(dx < 0 ? 1 : -1);
    else if (dy > 100 && dy > 2 * Math.abs(dx)) closeShown();
  };
}

// -- Uploads -----------------------------------------------------------------------------

const AT_ONCE = 3;
const KEEPS_NAME = /^(jpe?g|png|gif)$/;  // stored under their names; these others as public images
const PUBLIC = /^(webp|bmp|svg)$/;
const LARGE = 4e6, PART = 16e6;  // bytes: what is larger goes in parts, and is resumed
const uploads = [];
let paused = false, refreshTimer = 0;

const withToken = (path) =>
  uploadToken ? `${path}?token=${encodeURIComponent(uploadToken)}` : path;

function addUploads(files) {
  if ($("upload").hidden) return;
  for (const file of files) {
    const upload = {file, state: "waiting", sent: 0, message: "", tries: 0};
    if (!/^((image|video|audio)\/|$)/.test(file.type)) refuse(upload, t("wrongType"), true);
    uploads.push(upload);
  }
  if (!files.length) return;
  $("uploads").hidden = false;
  drawUploads();
  const may = list.can_upload || list.can_write || list.has_account || uploadToken;
  if (!may && uploads.some((each) => each.state === "waiting")) signIn(resumeUploads);
  else pump();
}

// Where a file goes: into what is looked at, else the folder if that takes it, else the account's
// own records or the entities, which take everything.
function routeOf(file) {
  const extension = extensionOf(file.name), fields = {};
  const toFolder = (list.can_upload || uploadToken) && file.size <= list.max_upload_bytes;
  if (toFolder && /^(all)?$/.test(album())) {
    const name = encodeURIComponent(file.name);
    if (KEEPS_NAME.test(extension)) {
      return {target: "library", method: "PUT", path: `/image/${name}`, fields};
    }
    if (PUBLIC.test(extension)) return {target: "media", method: "POST", path: "/upload", fields};
  }
  if (file.size > list.max_media_bytes) return null;
  if (list.can_write && (isTree() || !list.has_account)) {
    fields.label = file.name;
    if (/^\d+$/.test(album())) fields.parent_id = album();
    return {target: "entities", method: "POST", path: "/entity/", field: "image", fields,
      album: isTree() ? album() : "entities"};
  }
  if (!list.has_account) return null;
  if (isCollection()) fields.collection = album();
  return {target: "accounts", method: "POST", path: "/api/media/media/", fields,
    album: isCollection() ? album() : "mine"};
}

function refuse(upload, message, final = false) {
  Object.assign(upload, {state: "failed", message, final});
}

async function resumeUploads() {
  await start(true);
  pump();
}

function pump() {
  const active = uploads.filter((each) => each.state === "sending").length;
  const waiting = paused ? [] : uploads.filter((each) => each.state === "waiting");
  for (const upload of waiting.slice(0, AT_ONCE - active)) sendUpload(upload);
  drawUploads();
}

async function sendUpload(upload) {
  const {file} = upload;
  const route = upload.route = routeOf(file);
  upload.state = "sending";
  if (route) {
    const form = new FormData();
    for (const field of Object.entries(route.fields)) form.append(...field);
    form.append(route.field || "file", file);
    endUpload(upload, file.size > LARGE ? await sendParts(upload)
      : await transmit(upload, route.method, withToken(route.path), form));
  } else {
    const most = list.has_account || list.can_write ? list.max_media_bytes : list.max_upload_bytes;
    refuse(upload, t(file.size > most ? "tooLarge" : "denied", bytes(most)), true);
  }
  pump();
}

// One request of an upload, when it is over; `from` are the bytes before it.
async function transmit(upload, method, path, body = null, headers = {}, from = 0) {
  const request = upload.request = new XMLHttpRequest();
  request.open(method, ROOT + path);
  for (const header of Object.entries({...headers, ...await bearer()})) {
    request.setRequestHeader(...header);
  }
  request.upload.onprogress = (event) => {
    upload.sent = Math.min(1, (from + event.loaded) / upload.file.size);
    drawProgress(upload);
  };
  return new Promise((done) => {
    request.onloadend = () => done(request);
    if (paused) done(request);
    else request.send(body);
  });
}

// Send a file in parts, by the IETF's resumable uploads: it goes on where it was, after a pause, a
// lost connection or a reload. The last request, which has the family's answer if all went well.
async function sendParts(upload) {
  const {file, route} = upload;
  const mark = ["upload", route.target, file.name, file.size, file.lastModified].join("/");
  let path = localStorage.getItem(mark), request = null, offset = 0;
  if (path) {
    request = await transmit(upload, "GET", path);
    if (/^4(01|03|04|10)$/.test(request.status)) path = null;
    else if (request.status !== 200) return request;
    else offset = JSON.parse(request.responseText).offset;
  }
  if (!path) {
    const texts = {target: route.target, filename: file.name, ...route.fields};
    const coded = Object.entries(texts).map(([name, text]) =>
      `${name} ${btoa(String.fromCharCode(...new TextEncoder().encode(text)))}`);
    request = await transmit(upload, "POST", withToken("/files/"), null, {
      "Upload-Complete": "?0", "Upload-Length": file.size, "Upload-Metadata": coded.join()});
    path = request.getResponseHeader("Location")?.match(/\/files\/[^/]*$/)[0];
    if (path) localStorage.setItem(mark, path);
  }
  while (offset < file.size && /^(2|409)/.test(request.status)) {  // 409: it goes on elsewhere
    const end = offset + PART;
    request = await transmit(upload, "PATCH", path, file.slice(offset, end), {
      "Upload-Complete": end < file.size ? "?0" : "?1", "Upload-Offset": offset,
      "Content-Type": "application/partial-upload"}, offset);
    offset = Number(request.getResponseHeader("Upload-Offset") || file.size);
  }
  if (/^(20|4(00|09|13|15|22)$)/.test(request.status)) localStorage.removeItem(mark);
  return request;
}

function endUpload(upload, request) {
  const {status} = request;
  upload.request = null;
  if (paused && status === 0) {
    upload.state = "waiting";
  } else if (status === 200 || status === 201 || status === 409) {
    upload.state = status === 409 || isKnown(upload, request) ? "known" : "stored";
    clearTimeout(refreshTimer);
    refreshTimer = setTimeout(() => start(true), 700);
  } else if (/^(0|423|429|503)$/.test(status) && upload.tries++ < 5) {
    setTimeout(retry, 2000 * upload.tries, upload);
  } else if (status === 401) {
    upload.state = "waiting";
    paused = true;
    signIn(() => { paused = false; resumeUploads(); });
  } else {
    const known = {0: "offline", 400: "wrongType", 413: "tooMuch", 415: "wrongType"};
    refuse(upload, sentence(status, request.responseText, known), /^4(00|13|15|22)$/.test(status));
  }
}

// Whether the folder had the picture: its answer then names no thumbnail.
function isKnown(upload, request) {
  if (upload.route.target !== "library") return false;
  const said = JSON.parse(request.responseText);
  return !("thumbnail_file" in (said.answer || said));
}

function setPaused(value) {
  paused = value;
  if (paused) for (const each of uploads) each.request?.abort();
  pump();
}

function retry(upload) {
  upload.state = "waiting";
  pump();
}

const isOver = (upload) => /^(stored|known|failed)$/.test(upload.state);

function drawUploads() {
  const over = uploads.filter(isOver).length;
  const all = over === uploads.length;
  const [symbol, label] = paused ? ["play", "resume"] : ["pause", "pause"];
  const toggle = all ? "" : button(symbol, label, () => setPaused(!paused));
  const close = button("close", "close", () => {
    for (const each of uploads) each.request?.abort();
    uploads.length = 0;
    paused = false;
    $("uploads").hidden = true;
  });
  const rows = [...uploads].sort((a, b) => rank(a) - rank(b)).slice(0, 200);
  $("uploads").replaceChildren(
    h("header", {}, h("h2", {role: "status"}, t("progress", `${over}/${uploads.length}`)),
      toggle, close),
    h("progress", {max: uploads.length || 1, value: allSent(), "aria-label": t("uploads")}),
    h("ul", {}, rows.map(drawUpload)));
}

const rank = (upload) =>
  ["failed", "sending", "waiting", "known", "stored"].indexOf(upload.state);

function drawUpload(upload) {
  const again = upload.state === "failed" && !upload.final
    ? h("button", {type: "button", onclick: () => retry(upload)}, t("retry")) : "";
  upload.bar = !isOver(upload) && (upload.sent || upload.state === "sending")
    ? h("progress", {max: 1, value: upload.sent, "aria-label": upload.file.name}) : null;
  const to = upload.state === "stored" && (upload.route.album || "");
  const name = to && t(/^(mine|entities)$/.test(to) ? to : "albums");
  const there = name && to !== album() ? [": ", openAlbum(to, name)] : "";
  return h("li", {className: upload.state}, h("b", {dir: "auto"}, upload.file.name), again,
    upload.bar || h("span", {}, upload.message || t(upload.state), there));
}

const allSent = () => uploads.reduce((sum, each) => sum + (isOver(each) ? 1 : each.sent), 0);

function drawProgress(upload) {
  if (upload.bar) upload.bar.value = upload.sent;
  $("uploads").querySelector("progress").value = allSent();
}

$("upload").onclick = () => $("files").click();
$("files").onchange = () => {
  addUploads([...$("files").files]);
  $("files").value = "";
};
window.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) addUploads([...event.clipboardData.files]);
});
window.addEventListener("beforeunload", (event) => {
  if (uploads.some((each) => each.state === "sending")) event.preventDefault();
});

for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  window.addEventListener(name, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    $("drop").hidden = name === "drop" || (name === "dragleave" && !event.relatedTarget);
  });
}
window.addEventListener("drop", async (event) => {
  const entries = [...event.dataTransfer.items].map((each) => each.webkitGetAsEntry());
  const files = await Promise.all(entries.filter(Boolean).map(filesIn));
  addUploads(files.flat().filter((file) => !file.name.startsWith(".")));
});

// The files of a dropped file or folder, however deep.
async function filesIn(entry) {
  const get = (thing, method) => new Promise((done) => { thing[method](done, () => done([])); });
  if (entry.isFile) return [await get(entry, "file")].flat();
  const reader = entry.createReader(), found = [];
  let some;
  while ((some = await get(reader, "readEntries")).length) found.push(...some);  // in parts
  return (await Promise.all(found.map(filesIn))).flat();
}

// -- Beginning ---------------------------------------------------------------------------

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, select");
  if (typing || document.querySelector("dialog[open]")) return;
  if (event.key === "/") {
    event.preventDefault();
    $("search").elements.q.focus();
  } else if (event.key === "Escape" && picked.size) clearPicks();
});
history.scrollRestoration = "manual";  // see takeList
window.addEventListener("popstate", () => {
  const {changed, group, item} = readAddress();
  if (changed || !groups.length) start();
  else openLinked(group, item);
});
document.addEventListener("visibilitychange", () => document.hidden || start(true));

const LINKS = {icon: "icon.svg", "apple-touch-icon": "icon.png", manifest: "manifest.webmanifest"};
for (const [rel, name] of Object.entries(LINKS)) {
  document.head.append(h("link", {rel, href: `${ROOT}/${name}`}));
}
$("home").prepend(h("img", {src: `${ROOT}/icon.svg`, alt: ""}));

// A link may carry the owner's key (behind #, which is sent to nobody) or an upload token.
async function begin() {
  keepSession(session);
  const address = new URLSearchParams(location.search);
  const key = new URLSearchParams(location.hash.slice(1)).get("key");
  uploadToken = address.get("token") || "";
  if (key || uploadToken) {
    address.delete("token");
    history.replaceState(null, "", address.size ? `?${address}` : location.pathname);
  }
  if (key) await enter("", "", key, false).catch(({message}) => notify(message, true));
  else if (session.refresh || session.access) startSession();
  readAddress();
  start();
}

begin();
"""


@functools.lru_cache(maxsize=len(TEXTS))
def gallery_page(language: str) -> Page:
    """Return the gallery in a language of TEXTS; at the start, all would take 18 ms."""
    return build_page(
        GALLERY_MARKUP.replace('lang="en"', f'lang="{language}"'),
        PAGE_STYLE + GALLERY_STYLE,
        f"{PAGE_SCRIPT}const TEXTS = {to_json(TEXTS[language])};\n{GALLERY_SCRIPT}",
    )


@SYSTEM.route("GET", "/icon.svg", OPEN, {200: "icon"})
def get_icon(app: App, request: Request) -> Response:
    """Get the gallery's icon."""
    policy = "default-src 'none'"
    headers = {"Content-Type": "image/svg+xml", "Content-Security-Policy": policy}
    return Response(200, headers, ICON.encode())


@SYSTEM.route("GET", "/icon.png", OPEN, {200: "thumbnail"})
def get_icon_png(app: App, request: Request) -> Response:
    """Get the gallery's icon, for a phone's home screen."""
    return Response(200, {"Content-Type": "image/png"}, ICON_PNG)


@SYSTEM.route("GET", "/manifest.webmanifest", OPEN, {200: "manifest"})
def get_manifest(app: App, request: Request) -> Response:
    """Get what installs the gallery on a phone or desktop (W3C Web Application Manifest)."""
    name = gallery_name(app)
    icons = [
        {"src": "icon.svg", "type": "image/svg+xml", "sizes": "any", "purpose": "any maskable"},
        {"src": "icon.png", "type": "image/png", "sizes": "192x192"},
    ]
    colour = "#0b6b62"
    manifest = {
        "name": name, "short_name": name, "start_url": "gallery", "scope": "./",
        "display": "standalone", "background_color": colour, "theme_color": colour,
        "icons": icons,
    }  # fmt: skip
    headers = {"Content-Type": "application/manifest+json", **NO_STORE}
    return Response(200, headers, to_json(manifest).encode("utf-8", "replace"))


@SYSTEM.route("GET", "/gallery", OPEN, {200: "page"})
def get_gallery(app: App, request: Request) -> Response:
    """Get the gallery page, in the client's language."""
    return Response(200, *gallery_page(choose_language(request.headers, TEXTS)))


@SYSTEM.route("GET", "/", OPEN, {200: "Health or page"})
def get_root(app: App, request: Request) -> Response:
    """Get the gallery page as a browser, health as a program."""
    if request.is_for_browser:
        return get_gallery(app, request)
    return json_response(health_json(app), headers={"Vary": "Accept"})


# ======================================================================================
# 14. Command line
# ======================================================================================
# `serve` is the default command. Whatever is wrong with the settings ends with one line
# that names the setting, and exit status 2.


Argument = tuple[str, dict[str, Any]]  # what argparse's add_argument takes: a name, and the rest


class Command(NamedTuple):
    """Something that the program does by `run(settings, **arguments)`."""

    name: str  # one word or two
    run: Callable[..., int | None]  # an exit status other than 0
    arguments: tuple[Argument, ...]

    @property
    def usage(self) -> str:
        """Return the command as the help shows it: its name, words and options."""
        shown = [self.name]
        for name, more in self.arguments:
            takes = more.get("metavar", "") + "..." * ("nargs" in more)
            text = f"{name} {takes}".strip() if name.startswith("-") else takes
            shown.append(f"[{text}]" if text.startswith("-") and "required" not in more else text)
        return " ".join(shown)

    def parser(self) -> argparse.ArgumentParser:
        """Return the parser of the command's own arguments; without defaults, which `run` has."""
        parser = argparse.ArgumentParser(
            usage=f"python3 mediaserver.py {self.usage} --storage_dir DIR [options]",
            description=f"{summary_of(self.run)}. Other options: python3 mediaserver.py --help",
            prog="mediaserver.py", add_help=False, allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )  # fmt: skip
        for name, more in self.arguments:
            parser.add_argument(name, **more)
        return parser


def option(
    name: str, help: str, takes: str = "", parse: Callable[[str], Any] = str, **more: Any
) -> Argument:
    """Return an option of a command, a flag if it takes nothing.

    The text of a ValueError of `parse` is what is shown for a wrong value.
    """

    def parse_or_tell(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:  # argparse would show its type alone
            raise argparse.ArgumentTypeError(str(error)) from None

    kind = {"metavar": takes, "type": parse_or_tell} if takes else {"action": "store_true"}
    return name, {"help": help, **kind, **more}


ACCOUNT: Argument = "name", {"metavar": "NAME"}
SOURCE: Argument = "source", {"metavar": "SOURCE"}
AS_JSON = option("--json", "print it as JSON", dest="as_json")


def print_rows(rows: Iterable[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print a table as lines with tabs, or as JSON: in ASCII, which carries names of any bytes."""
    if as_json:
        print(json.dumps(list(rows)))
        return
    for row in rows:
        size = {"size": format_size(row["size"])} if row.get("size") else {}
        shown = ["-" if value in (None, "") else str(value) for value in {**row, **size}.values()]
        print("\t".join(map(printable_line, shown)))


COMMANDS: dict[str, Command] = {}
Run = TypeVar("Run", bound=Callable[..., int | None])


def command(name: str, *arguments: Argument) -> Callable[[Run], Run]:
    """Declare the decorated function as a command; its docstring begins with the help."""

    def declare(run: Run) -> Run:
        COMMANDS[name] = Command(name, run, arguments)
        return run

    return declare


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the settings, with a help that has the commands, too."""
    commands = "\n".join(
        f"  {item.usage:32}{'' if len(item.usage) <= 32 else chr(10) + ' ' * 34}"
        f" {summary_of(item.run)}"
        for item in COMMANDS.values()
    )
    hidden = ", ".join(name.upper() for name, spec in SETTINGS.items() if spec.secret)
    parser = argparse.ArgumentParser(
        prog="mediaserver.py",
        usage="python3 mediaserver.py [COMMAND] --storage_dir DIR [options]",
        description="Scans, serves and takes in a household's pictures and videos.",
        epilog=f"commands:\n{commands}\n\n"
        "Each option is also read from the environment and from .env under its name in capitals\n"
        f"(but {', '.join(n for n, spec in SETTINGS.items() if not spec.environment)}),\n"
        f"and so are the secrets {hidden}.\n"
        "A long option is accepted with _ or -. DATA is DATABASE_DIR.\n\n"
        "exit status: 0, it is done; 1, it cannot be, or what is told is not as it should be;\n"
        "2, what was called is not understood; 130, it was interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS, add_help=False,
    )  # fmt: skip
    parser.add_argument("-h", "--help", action="store_true", help="show this, or a COMMAND's help")
    parser.add_argument("--version", action="version", version=f"mediaserver {__version__}")
    for name, spec in SETTINGS.items():
        if not spec.secret:
            text = f"{spec.help} ({spec.shown or str(spec.default).lower()})"
            bare: Any = {"nargs": "?", "const": "true"} if isinstance(spec.default, bool) else {}
            parser.add_argument(f"--{name}", metavar="X", help=text.replace("%", "%%"), **bare)
    return parser


def parse_command_line(
    arguments: Sequence[str],
) -> tuple[functools.partial[int | None], Settings]:
    """Return the command as it was called, and its settings; SystemExit(2) with usage for none.

    The settings are taken out first, wherever they stand; a command's parser reads the rest.
    """
    parser = build_parser()
    spell = functools.partial(re.sub, r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"))
    found, words = parser.parse_known_args([spell(each) for each in arguments])
    options = vars(found)
    words = words[1:] if words[:1] == ["--"] else words
    named = next((count for count in (2, 1) if " ".join(words[:count]) in COMMANDS), 0)
    called = COMMANDS[" ".join(words[:named]) or "serve"]
    if options.pop("help", False):
        (called.parser() if named else parser).print_help()
        parser.exit()
    values, unread = called.parser().parse_known_args(words[named:])
    left = [word for word in unread if word != "--"]
    for word in left:
        if word.startswith("-"):
            whose = f"{called.name} (a command's own follow its name)"
            parser.error(f"{word}: is no option of {whose}; --help lists them")
    if "storage_dir" not in options and left and parse_path(left[-1]).is_dir():
        options["storage_dir"] = left.pop()  # as people type it; a command's name comes first
    if left and "storage_dir" in options and parse_path(left[-1]).is_dir():
        parser.error(f"{left[-1]} is one folder too many: STORAGE_DIR is one")
    if left:
        parser.error(
            f"{' '.join(words)!r} is neither a folder that is there nor a command with the words"
            f" that it takes; commands: {', '.join(COMMANDS)}"
        )
    try:
        dotenv = read_dotenv(Path(".env"), os.environ)
        settings = load_settings(options, os.environ, dotenv)
    except SettingError as error:
        parser.error(str(error))
    forget_secrets()
    warn_of_names(os.environ, dotenv)
    return functools.partial(called.run, settings, **vars(values)), settings


def make_folders(settings: Settings) -> None:
    """Make the server's own folders, and STORAGE_DIR where the index is new."""
    if settings.storage_dir.exists() or not settings.database_url.is_file():
        if make_folder("STORAGE_DIR", settings.storage_dir, 0o755):
            warn(f"made the folder {settings.storage_dir}, which was not there")
    elif settings.database_dir.is_relative_to(settings.storage_dir):
        problem = f"{settings.storage_dir} is gone: is a disk not mounted?"
        raise SettingError("STORAGE_DIR", problem)
    for name in ("database_dir", "database_url", "upload_dir", "media_storage_dir", "users_dir"):
        place = getattr(settings, name)
        if isinstance(place, Path):
            make_folder(name.upper(), place.parent if name == "database_url" else place, 0o700)


def make_folder(setting: str, path: Path, mode: int) -> bool:
    """Make a folder if it is not there; return whether it was made."""
    try:
        made = not path.exists()
        path.mkdir(mode, parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is no folder" if isinstance(error, FileExistsError) else error.strerror
        raise SettingError(setting, f"{path} cannot be used: {reason}") from None
    return made


def need_storage(settings: Settings) -> None:
    """Refuse to work for a server whose folder is not there; a command makes none."""
    if not settings.storage_dir.is_dir():
        problem = f"{settings.storage_dir} is not there: is it spelt right, is a disk not mounted?"
        raise SettingError("STORAGE_DIR", problem)


@contextlib.contextmanager
def usable_places(settings: Settings) -> Iterator[None]:
    """Turn what the disk or SQLite refuses at a start into the setting that names the place."""
    try:
        yield
    except sqlite3.Error as error:
        raise SettingError("DATABASE_URL", f"the index cannot be used: {error}") from None
    except OSError as error:
        if not error.filename:
            raise
        path = Path(os.fsdecode(error.filename))
        places = {name: Path(str(getattr(settings, name))) for name in PLACES}
        inside = {name: place for name, place in places.items() if path.is_relative_to(place)}
        # The innermost folder: DATA lies in STORAGE_DIR, and others in DATA
        name = max(inside, key=lambda name: len(inside[name].parts), default="database_dir")
        problem = f"{path} cannot be used: {error.strerror}"
        raise SettingError(name.upper(), problem) from None


def lock_data_dir(settings: Settings) -> io.FileIO:
    """Hold DATA for this process; the kernel lets go when it ends, however it ends."""
    file = io.FileIO(settings.database_dir / "lock", "a+", opener=open_private)
    with undoing(file.close):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            process = os.pread(file.fileno(), 20, 0).decode("ascii", "replace").strip()
            stop = f"; stop it first: kill {process}" if process.isdecimal() else ""
            problem = f"another mediaserver is running on {settings.database_dir}{stop}"
            raise SettingError("DATABASE_DIR", problem) from None
        except OSError as error:  # a share that knows no locks
            raise OSError(error.errno, error.strerror, str(settings.database_dir)) from None
    with contextlib.suppress(OSError):  # of a full disk: who is refused is told less
        file.truncate(0)
        file.write(b"%d\n" % os.getpid())
    return file


def parse_scopes(text: str) -> frozenset[str]:
    """Return the scopes that a list with commas or blanks names; ValueError for an unknown one."""
    scopes = frozenset(re.split(r"[\s,]+", text.strip()))
    if scopes - SCOPES:
        raise ValueError(f"{text!r} is none of {', '.join(sorted(SCOPES))}, or some with commas")
    return scopes


def parse_url_path(text: str) -> str:
    """Return the path of a URL; ValueError for one without its first slash."""
    if not text.startswith("/"):
        raise ValueError(f"{text!r} is no path of a URL: it begins with a slash")
    return text


def number_with_unit(units: Mapping[str, int], what: str) -> Callable[[str], int]:
    """Return what parses a whole number above 0, with a letter for a unit or with none.

    >>> parse_duration("90"), parse_duration("2h"), parse_rate("20M")
    (90, 7200, 20971520)
    """

    def parse(text: str) -> int:
        match = re.fullmatch(r"([0-9]{1,12})([a-z]?)", text.strip().lower())
        if not match or not int(match[1]) or match[2] not in units:
            raise ValueError(f"{text!r} is no {what}")
        return int(match[1]) * units[match[2]]

    return parse


parse_duration = number_with_unit(
    {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800},
    "time such as 90 (seconds), 30m, 12h, 7d or 2w",
)
parse_rate = number_with_unit(  # as curl and rsync read it
    {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30},
    "number of bytes a second, such as 20M",
)


@command(
    "token",
    option("--scope", "what it is good for (upload)", "upload|delete|read", parse_scopes),
    option("--path", "the only path that it is good for", "PATH", parse_url_path),
    option("--max_bytes", "the largest upload", "N", whole_number(1, MAX_BYTES)),
    option("--uses", "how often it is good", "N", whole_number(1, MAX_BYTES)),
    option("--expires", "for how long: 90 (seconds), 30m, 12h, 7d", "TIME", parse_duration),
)  # fmt: skip
def print_token(
    settings: Settings, *, scope: Set[str] | None = None, expires: int | None = None,
    **limits: Any,
) -> None:  # fmt: skip
    """Print a fresh upload token, or one for less.

    It is `TS.SIG` of the contract; with any option, or if those are off, a scoped token.
    """
    if not settings.media_server_secret:
        need_storage(settings)
        make_folders(settings)
        settings, _ = with_secrets(settings)
    secret, now = settings.media_server_secret, time.time()
    if settings.upload_tokens == "all" and not (scope or expires or limits):
        print(sign_upload_token(secret, now))
        return
    end, id = now + (expires or settings.token_expiry_seconds), secrets.token_urlsafe(12)
    grant = Grant(frozenset(scope or {"upload"}), end, id=id, **limits)
    print(sign_grant(grant, scoped_key(secret)))


class Refusal(Exception):
    """A command cannot do what it was asked; the text says why."""


def opened_index(settings: Settings) -> contextlib.closing[Index]:
    """Return the index for a command, while the server runs, too: SQLite orders the writes."""
    need_storage(settings)
    make_folders(settings)
    return contextlib.closing(apply_migrations(Index(settings.database_url)))


def index_to_read(settings: Settings) -> contextlib.closing[Index]:
    """Return the index for a command that changes nothing: it is neither made nor migrated."""
    need_storage(settings)
    if not settings.database_url.exists():
        raise Refusal(f"there is no index at {settings.database_url}: has the server run here?")
    index = Index(settings.database_url, query_only=True)
    if index.value("PRAGMA user_version") != len(MIGRATIONS):
        index.close()
        raise Refusal("another version of mediaserver made the index: start this one once")
    return contextlib.closing(index)


@contextlib.contextmanager
def opened_user(settings: Settings, name: str) -> Iterator[tuple[Index, User]]:
    """Open the index and find the account with a username or an e-mail; Refusal for none."""
    with opened_index(settings) as index:
        user = index.users.find(name)
        if user is None:
            raise Refusal(f"there is no account {name!r}")
        yield index, user


@command("user list", AS_JSON)
def list_users(settings: Settings, *, as_json: bool = False) -> None:
    """List the accounts, and what their files take."""
    with opened_index(settings) as index:
        rows = [
            {
                "id": user.id,
                "email": user.email,
                "username": user.username,
                "state": "active" if user.is_active else "disabled",
                "size": index.media.stored_bytes(user.id),
                "permissions": user.permissions,
            }
            for user in index.users.all()
        ]
    print_rows(rows, as_json=as_json)


def change_permissions(
    settings: Settings, name: str, *, add: Set[str] = frozenset(), drop: Set[str] = frozenset()
) -> None:
    """Add and drop permissions of an account; Refusal for one that there is not."""
    if unknown := sorted((add | drop) - GRANTABLE):
        known = " and ".join(sorted(GRANTABLE))
        raise Refusal(f"there is no permission {unknown[0]!r}, only {known}")
    with opened_user(settings, name) as (index, user):
        index.write(lambda db: index.users.change_permissions(db, user, add, drop))


@command("user grant", ACCOUNT, ("permissions", {"metavar": "PERMISSION", "nargs": "+"}))
def grant_permissions(settings: Settings, name: str, permissions: Sequence[str]) -> None:
    """Give permissions from the next token on."""
    change_permissions(settings, name, add=set(permissions))


@command("user revoke", ACCOUNT, ("permissions", {"metavar": "PERMISSION", "nargs": "+"}))
def revoke_permissions(settings: Settings, name: str, permissions: Sequence[str]) -> None:
    """Take permissions from the next token on."""
    change_permissions(settings, name, drop=set(permissions))


def read_password() -> str:
    """Return a new password from the terminal, twice, or a line of standard input."""
    if sys.stdin.isatty():
        import getpass  # only here

        password = getpass.getpass("new password: ")
        if getpass.getpass("again: ") != password:
            raise Refusal("the two are not the same")
    else:
        try:
            password = sys.stdin.buffer.readline().decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise Refusal("the password is not UTF-8") from None
    if "\0" in password:
        raise Refusal("a password has no NUL in it")
    if not MIN_PASSWORD_LENGTH <= len(password) <= MAX_PASSWORD_LENGTH:
        raise Refusal(f"a password has {MIN_PASSWORD_LENGTH} to {MAX_PASSWORD_LENGTH} characters")
    return password


@command("user sessions", ACCOUNT, AS_JSON)
def list_user_sessions(settings: Settings, name: str, *, as_json: bool = False) -> None:
    """List where an account is logged in."""
    with opened_user(settings, name) as (index, user):
        found = index.sessions.of_user(user.id, time.time())
        print_rows(map(session_json, found), as_json=as_json)


@command("user logout", ACCOUNT)
def logout_user(settings: Settings, name: str) -> None:
    """End all of an account's sessions."""
    with opened_user(settings, name) as (index, user):
        count = index.write(lambda db: index.sessions.end_all(db, user.id))
    print(f"{count} sessions ended; access tokens that are out expire by themselves")


@command("user passwd", ACCOUNT)
def set_user_password(settings: Settings, name: str) -> None:
    """Set a password and end all sessions."""
    with opened_user(settings, name) as (index, user):
        password = hash_password(read_password())
        if not index.write(lambda db: index.users.set_password(db, user, password)):
            raise Refusal("the password was changed meanwhile; try again")
        index.login_failures.clear(login_key(user, name))


@command("user disable", ACCOUNT)
def disable_user(settings: Settings, name: str) -> None:
    """Refuse an account's logins and tokens, and end its links."""
    with opened_user(settings, name) as (index, user):
        index.write(lambda db: index.users.set_active(db, user, active=False))


@command("user enable", ACCOUNT)
def enable_user(settings: Settings, name: str) -> None:
    """Let a disabled account in again."""
    with opened_user(settings, name) as (index, user):
        index.write(lambda db: index.users.set_active(db, user, active=True))


# -- Verify ------------------------------------------------------------------------------

PROGRESS_SECONDS = 0.5  # between two looks at a terminal
LINE_SECONDS = 60.0  # and between two lines elsewhere


parse_days = amount_of("days", 1e6)


class Progress:
    """Says on standard error how far a long command is, and keeps it to a rate."""

    def __init__(self, total: int, rate: float = math.inf, *, silent: bool) -> None:
        """`total` in bytes, `rate` in bytes a second; `silent` says nothing of single things."""
        self.done = 0
        self.silent = silent
        self._total = total
        self._rate = rate
        self._began = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._pause = PROGRESS_SECONDS if self._terminal else LINE_SECONDS
        self._next = self._began + self._pause

    @property
    def seconds(self) -> float:
        """Return the time since the beginning."""
        return max(time.monotonic() - self._began, 1e-6)

    @property
    def speed(self) -> str:
        """Return the bytes a second so far."""
        return f"{format_size(self.done / self.seconds)}/s"

    def advance(self, count: int) -> None:
        """Note that so many bytes are done; returns when the rate allows more."""
        self.done += count
        if (early := self.done / self._rate - self.seconds) > 0:  # sleep(0) takes 50 µs
            time.sleep(early)
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._pause
            self._show()

    def _show(self) -> None:
        left = (self._total - self.done) / self.done * self.seconds if self.done else 0
        share = min(100 * self.done // max(self._total, 1), 100)
        text = f"{share} % of {format_size(self._total)}, {self.speed}, {left:.0f} s left"
        if not self._redraw(text):
            warn(text)

    def _redraw(self, text: str = "") -> bool:
        """Write over the line that shows the progress; return whether this is a terminal."""
        if self._terminal:
            sys.stderr.write(f"\r{text}\x1b[K")
            sys.stderr.flush()
        return self._terminal

    def say(self, text: str) -> None:
        """Print a line of the result, not behind the line that shows the progress."""
        self._redraw()
        if not self.silent:
            print(printable_line(text), flush=True)


# What verify finds; the exit status is 1 for the first four
PROBLEMS = {
    "damaged": "the bytes are others, though size and time are not",
    "changed": "it was written to by something else than the server",
    "missing": "it is gone",
    "unreadable": "it cannot be read",
}
NOTES = {
    "edited": "it was edited since the last scan",
    "unknown": "no scan has seen it yet",
    "orphaned": "nothing in the index needs it",
}


class Unreadable(OSError):
    """It is the file that is read which makes trouble, not the one that is written."""


class Verifier:
    """Reads every file again and compares it with the index; changes nothing.

    The server may run meanwhile: what seems to be wrong is looked up once more.
    """

    def __init__(
        self, index: Index, folders: Mapping[str, Folder], progress: Progress, since: float = 0.0
    ) -> None:
        """Files that have neither come in nor changed `since` are not read, only looked at."""
        self._index = index
        self._folders = folders
        self._progress = progress
        self._since = since
        self.late = 0  # files that were deleted or changed since they were looked up
        self.found: dict[str, dict[str, str]] = {word: {} for word in (*PROBLEMS, *NOTES)}
        self.expected: dict[tuple[str, str], str] = {}  # hashes that are not the index's
        self.files = 0

    def report(self, what: str, **more: Any) -> int:
        """Say what was done and found, with `more` where as JSON; return the exit status."""
        counts = [f"{len(reasons)} {word}" for word, reasons in self.found.items() if reasons]
        self._progress.say(f"{what}: {', '.join(counts) or 'all is as it was taken in'}")
        is_well = not any(self.found[word] for word in PROBLEMS)
        if self._progress.silent:
            done, seconds = self._progress.done, self._progress.seconds
            figures = {"ok": is_well, "files": self.files, "bytes": done, "seconds": seconds}
            found = {word: list(reasons) for word, reasons in self.found.items()}
            print(json.dumps({**figures, **found, **more}))
        return int(not is_well)

    def run(self, caches: Sequence[ImageCache]) -> None:
        """Check all that is known, and name what is not."""
        problem = self._index.value("PRAGMA quick_check(1)")
        if problem != "ok":
            self._note("damaged", str(self._index.path), problem)
        for folder in self._folders.values():
            if folder.is_missing():
                if not folder.is_new():
                    self._note("missing", folder.show(), "it is not there or empty: a disk?")
                continue
            unknown = self._unknown(folder)
            self.check(self._index.files.of_root(folder.name))
            word = "orphaned" if folder.name in SERVER_ONLY else "unknown"
            for path in unknown:
                if not (self._index.files.get(folder.name, path) or folder.is_gone(path)):
                    self._note(word, folder.show(path))
        for cache in caches:
            self._check_cache(cache)

    def _note(self, word: str, path: str, reason: str = "") -> None:
        if path not in self.found[word]:
            reason = reason or {**PROBLEMS, **NOTES}[word]
            self.found[word][path] = reason
            self._progress.say(f"{word}: {path}: {reason}")

    def _unknown(self, folder: Folder) -> list[str]:
        """Return paths on disk that the index does not know, of what a scan would take in."""
        unreadable: list[bytes] = []
        wanted = is_media_name if folder.name not in SERVER_ONLY else bool
        paths = [os.fsdecode(path) for path, _ in folder.walk_stored(wanted, unreadable)]
        for path in unreadable:
            self._note("unreadable", folder.show(os.fsdecode(path)))
        return [path for path in paths if not self._index.files.get(folder.name, path)]

    def check(self, files: Iterable[File]) -> None:
        """Compare files with the index, and where they differ with what it says now."""
        for file in files:
            self.files += 1
            self._check(file)

    def _check(self, file: File) -> None:
        while (verdict := self._judge(file)) is not None:
            now = self._index.files.get(file.root, file.path)
            if now is not None and now[0] == file:
                path = self._folders[file.root].show(file.path)
                self._note(verdict[0], path, verdict[1])
                break
            self.late += 1
            if now is None:
                break
            file = now[0]

    def _judge(self, file: File) -> tuple[str, str] | None:
        """Return what is wrong with a file, and why; None if nothing is."""
        try:
            with self._folders[file.root].open(file.path) as source:
                status = os.fstat(source.fileno())
                sha256 = self._read(source, file, status)
                status = os.fstat(source.fileno())  # it may have been written meanwhile
        except (FileNotFoundError, NotADirectoryError):
            return "missing", ""
        except OSError as error:
            return "unreadable", error.strerror or ""
        if sha256 == self.expected.get((file.root, file.path), file.sha256):
            return None
        if state_of(status)[:2] == (file.size, file.mtime_ns):
            return "damaged", ""
        return ("changed" if file.root in SERVER_ONLY else "edited"), ""

    def _read(self, source: io.FileIO, file: File, status: os.stat_result) -> str:
        """Return the sha256 of a file, which is taken for known where it is not due."""
        is_due = max(file.added, file.ctime, file.mtime_ns / 1e9) >= self._since
        if not is_due and file.matches(status):
            return file.sha256
        digest = hashlib.sha256()
        for block in self._blocks(source, status):
            digest.update(block)
        return digest.hexdigest()

    def _blocks(self, source: io.FileIO, status: os.stat_result) -> Iterator[memoryview]:
        """Yield what the disk has of a file: memory may hold what was there before."""
        forget_cached(source)
        try:
            for block in read_blocks(source, status.st_size):
                yield block
                self._progress.advance(len(block))
        except OSError as error:
            raise Unreadable(*error.args) from None
        forget_cached(source)  # others need the memory

    def _check_cache(self, cache: ImageCache) -> None:
        """Name the thumbnails or previews of what is not known any more."""
        with contextlib.suppress(FileNotFoundError):
            place = cache.prefix.rstrip("/")
            for name, _ in cache.folder.files_in(place):
                if not self._index.assets.is_known(name[:64]):
                    self._note("orphaned", f"{cache.folder.path}/{place}/{name}")


def forget_cached(file: io.FileIO) -> None:
    """Let the page cache drop what it has of a file (posix_fadvise(2))."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@command(
    "verify", AS_JSON,
    option("--since", "read only what came or changed in so many days", "DAYS", parse_days),
    option("--limit_rate", "read so many bytes a second at most: 20M", "RATE", parse_rate),
)  # fmt: skip
def verify(
    settings: Settings, *, as_json: bool = False, since: float = math.inf,
    limit_rate: float = math.inf, restored: Copier | None = None,
) -> int:  # fmt: skip
    """Read all files again and compare them with the index.

    Returns 1 if something is wrong; what was found wrong as files were `restored` is not told
    again.
    """
    with index_to_read(settings) as index:
        folders, from_time = open_folders(settings, index), time.time() - since * 86400
        progress = Progress(index.files.total_size(from_time), limit_rate, silent=as_json)
        verifier = Verifier(index, folders, progress, from_time)
        if restored is not None:
            verifier.found, verifier.expected = restored.found, restored.others
        public, private = thumbnail_caches(settings, folders["library"])
        verifier.run((public, private, ImageCache(private.folder, PREVIEWS_PREFIX)))
        duplicates = index.files.duplicates()
    for paths in duplicates:
        progress.say(f"duplicate: {' = '.join(paths)}")
    read = f"{format_size(progress.done)} read at {progress.speed}"
    return verifier.report(f"{verifier.files} files, {read}", duplicates=duplicates)


# -- Backup and restore ------------------------------------------------------------------
# A backup is a folder that can be served, with everything in its default place. Its name ends
# with PARTIAL until it is whole, and so does that of an index whose files are being restored:
# one that was interrupted is found by it, and goes on.

PARTIAL = ".partial"
BACKUP_TIME = "%Y-%m-%dT%H%M%SZ"  # no colons: Windows' file systems have none
MANIFEST = "manifest.sha256"  # in DATA, as sha256sum writes and reads it
MAX_ROUNDS = 10  # of a backup beside a server that goes on deleting
SAME_TIME_NS = 2 * 10**9  # what FAT's times are exact to


def backup_settings(settings: Settings, folder: Path) -> Settings:
    """Return the settings with which a backup is served."""
    data = folder / ".mediaserver"
    return settings._replace(
        storage_dir=folder, database_dir=data, database_url=data / INDEX_NAME,
        upload_dir=data / "images", media_storage_dir=data / "entities",
        users_dir=data / "users", media_dir=None, public_key_path=None,
    )  # fmt: skip


class Copier(Verifier):
    """Copies files to other folders while it verifies them; what is there already stays."""

    def __init__(
        self, index: Index, sources: Mapping[str, Folder], targets: Mapping[str, Folder],
        progress: Progress,
    ) -> None:  # fmt: skip
        super().__init__(index, sources, progress)
        self.targets = targets
        self.copied = 0  # bytes
        self.rounds = 0
        self.others: dict[tuple[str, str], str] = {}  # hashes of copies that differ from the index

    def copy_all(self, moment: Index) -> bool:
        """Copy all that an index names; return whether nothing of it changed meanwhile."""
        self.files = self.late = 0
        self.rounds += 1
        for root in self.targets:
            self.check(moment.files.of_root(root))
        return not self.late

    def _read(self, source: io.FileIO, file: File, status: os.stat_result) -> str:
        self.others.pop((file.root, file.path), None)
        if self._keep(file, status):
            self._progress.advance(file.size)
            return file.sha256
        digest, target = hashlib.sha256(), self.targets[file.root]

        def blocks() -> Iterator[memoryview]:
            for block in self._blocks(source, status):
                digest.update(block)
                self.copied += len(block)
                yield block

        with writing_to(target.show(file.path)):
            target.copy_in(file.path, status, blocks())
        sha256 = digest.hexdigest()
        if sha256 != file.sha256:
            self.others[file.root, file.path] = sha256
        return sha256

    def report(self, what: str, **more: Any) -> int:
        """Say what was copied, too."""
        copied = f"{format_size(self.copied)} copied in {self._progress.seconds:.0f} s"
        return super().report(f"{what}, {copied}", copied=self.copied, **more)

    def _keep(self, file: File, status: os.stat_result) -> bool:
        """Return whether the target has the file, byte for byte."""
        target = self.targets[file.root]
        if target.is_gone(file.path):
            return False
        try:
            found = describe(target, file.path, file.added)
        except (OSError, ValueError):
            return False
        return found is not None and found[1].sha256 == file.sha256

    def note_times(self, db: Database, index: Index) -> None:
        """Have an index know the times of the copies, so that the next scan reads none of them."""
        for root, folder in self.targets.items():
            for file in index.files.of_root(root):
                with contextlib.suppress(OSError):
                    _, mtime_ns, ctime = state_of(folder.stat(file.path))
                    index.files.set_times(db, file, mtime_ns, ctime)
        self.disown(db, index)

    def disown(self, db: Database, index: Index) -> None:
        """Have an index know that some copies are not what it says: nothing is served for it."""
        for root, path in self.others:
            if found := index.files.get(root, path):
                index.files.set_times(db, found[0], 0, 0.0)


@contextlib.contextmanager
def writing_to(place: str) -> Iterator[None]:
    """Tell what a disk refuses while a copy is made; what has been copied stays."""
    try:
        yield
    except Unreadable:
        raise
    except (OSError, sqlite3.Error) as error:
        if isinstance(error, sqlite3.Error) and is_damage(error):
            raise Refusal(f"the index is damaged: {error}; nothing can be copied by it") from None
        problem = f"{place} cannot be written: {error}"
        raise Refusal(f"{problem}; another try goes on from here") from None


class BackupCopier(Copier):
    """Copies files beside a server that may run, and links those that an earlier backup has."""

    earlier: tuple[Index, Mapping[str, Folder]] | None = None  # backup: its index and folders

    def _keep(self, file: File, status: os.stat_result) -> bool:
        """Return whether the target has the file or a link to it; not where it was edited."""
        if not file.matches(status):
            return False
        # What the targets have in the first round may be from a run that was interrupted
        is_first, target = self.rounds == 1, self.targets[file.root]
        has = super()._keep(file, status) if is_first else target.has(file)
        return has or self._link(file)

    def _link(self, file: File) -> bool:
        if self.earlier is None:
            return False
        (index, folders), target = self.earlier, self.targets[file.root]
        with contextlib.suppress(OSError, ValueError, sqlite3.Error):
            for other, _ in index.files.with_content(file.sha256):
                size, mtime_ns, _ = state_of(folders[other.root].stat(other.path))
                times = (mtime_ns, file.mtime_ns, other.mtime_ns)
                if size == file.size and max(times) - min(times) < SAME_TIME_NS:
                    target.unlink(file.path)
                    return not target.link_in(file.path, folders[other.root], other.path)
        return False


@contextlib.contextmanager
def held_folder(path: Path) -> Iterator[None]:
    """Hold a folder, made if it is not there: no other backup is made in it meanwhile."""
    with contextlib.ExitStack() as cleanup:
        try:
            path.mkdir(0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            cleanup.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(f"another backup to {path} is under way") from None
        except OSError as error:
            raise Refusal(f"{path} cannot be used: {error.strerror}") from None
        yield


def backups_in(folder: Path, suffix: str = "") -> list[Path]:
    """Return the whole backups in a folder, or those with PARTIAL as suffix, the oldest first."""
    pattern = re.compile(r"\d{4}-\d\d-\d\dT\d{6}Z" + re.escape(suffix))
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))


def new_backup(folder: Path) -> Path:
    """Return the name of a backup made now."""
    while (path := folder / time.strftime(BACKUP_TIME, time.gmtime())).exists():
        time.sleep(0.1)
    return path


def need_outside(place: Path, folders: Mapping[str, Folder], problem: str) -> None:
    """Refuse a place in one of the server's own folders."""
    for folder in folders.values():
        if place.is_relative_to(folder.path):
            raise Refusal(f"{place} is in {folder.path}, {problem}")


def need_disks(*folders: Folder) -> None:
    """Refuse folders whose disk is away."""
    for folder in folders:
        if folder.is_missing() and not folder.is_new():
            raise Refusal(f"{folder.path} is not there or empty: is a disk not mounted?")


def fillable_folders(settings: Settings) -> dict[str, Folder]:
    """Return the folders that files are copied to, rid of what was left half done."""
    folders = open_folders(settings, None)
    for folder in folders.values():
        folder.recover(lambda name: True)
    return folders


def copy_secrets(settings: Settings, target: Settings) -> None:
    """Copy the generated secrets and the public key to the folders of a backup."""
    data = Folder("data", target.database_dir, make=True, buffers=WriteBuffers())
    key = settings.public_key_path or settings.database_dir / "public_key.pem"
    for path, name in ((settings.secrets_file, "secrets.env"), (key, "public_key.pem")):
        if path.is_file():
            with io.FileIO(path) as file:
                status = os.fstat(file.fileno())
                data.copy_in(name, status, read_blocks(file, status.st_size))


@command("backup", ("dest", {"metavar": "DEST"}), AS_JSON)
def backup(settings: Settings, dest: str, *, as_json: bool = False) -> int:
    """Copy everything into a dated folder in DEST, while the server runs.

    Returns 1 if some file is not as it was taken in.
    """
    destination = Path(os.path.realpath(parse_path(dest)))
    with index_to_read(settings) as index, contextlib.ExitStack() as cleanup:
        sources = open_folders(settings, index)
        need_outside(destination, sources, "of which it is to be a backup")
        need_disks(*sources.values())
        cleanup.enter_context(held_folder(destination))
        fresh = Path(f"{new_backup(destination)}{PARTIAL}")
        begun = next(iter(backups_in(destination, PARTIAL)), fresh)
        own = backup_settings(settings, begun)
        own.storage_dir.mkdir(0o700, exist_ok=True)
        own.database_dir.mkdir(0o700, exist_ok=True)
        progress = Progress(index.files.total_size(), silent=as_json)
        copier = BackupCopier(index, sources, fillable_folders(own), progress)
        for last in backups_in(destination)[-1:]:
            before = backup_settings(settings, last)
            kept = contextlib.closing(Index(before.database_url, query_only=True))
            copier.earlier = cleanup.enter_context(kept), open_folders(before, None)
        with writing_to(str(begun)):
            copy_in_rounds(index, copier, own)
            copy_secrets(settings, own)
            os.sync()
            place = begun.rename(new_backup(destination))
            os.sync()
    return copier.report(f"{place}: {copier.files} files", place=str(place))


def copy_in_rounds(index: Index, copier: BackupCopier, own: Settings) -> None:
    """Copy until one moment's index names nothing that was deleted or changed meanwhile."""
    for _ in range(MAX_ROUNDS):
        index.copy_to(own.database_url)
        with contextlib.closing(Index(own.database_url, query_only=True)) as moment:
            if copier.copy_all(moment):
                write_manifest(own, moment, copier)
                break
    else:
        raise Refusal("files are deleted faster than they are copied: try again later")
    with contextlib.closing(Index(own.database_url)) as copy:
        copy.write(lambda db: copier.disown(db, copy))


def write_manifest(own: Settings, moment: Index, copier: Copier) -> None:
    """Write the hashes of a backup as `sha256sum -c` reads them; remove what has none."""
    with open(own.database_dir / MANIFEST, "wb") as manifest:
        for folder in copier.targets.values():
            for path, _ in folder.walk(bool, []):
                name = os.fsdecode(path)
                found = moment.files.get(folder.name, name)
                if found is None:  # left by a run that was interrupted
                    folder.unlink(name)
                    continue
                sha256 = copier.others.get((folder.name, name), found[0].sha256)
                place = os.path.relpath(f"{folder.path}/{name}", own.storage_dir)
                manifest.write(format_hash(sha256, os.fsencode(place)))


def format_hash(sha256: str, name: bytes) -> bytes:
    r"""Return a line of sha256sum.

    >>> format_hash("0a", b"a\nb")
    b'\\0a  a\\nb\n'
    """
    escaped = name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    mark = b"\\" if escaped != name else b""
    return mark + sha256.encode() + b"  " + escaped + b"\n"


class Restorer(Copier):
    """Copies a backup to where it is to be served, and compares it with its manifest."""

    def __init__(
        self, index: Index, own: Settings, targets: Mapping[str, Folder], progress: Progress
    ) -> None:
        super().__init__(index, open_folders(own, index), targets, progress)
        self._base = own.storage_dir
        self._unnamed = 0  # files that the manifest does not have
        self._path, self._manifest = own.database_dir / MANIFEST, dict[str, str]()
        try:
            self._manifest.update(read_manifest(self._path))
        except FileNotFoundError:
            self._note("missing", str(self._path))
        except (OSError, ValueError) as error:
            self._note("damaged", str(self._path), str(error))

    def _judge(self, file: File) -> tuple[str, str] | None:
        verdict, key = super()._judge(file), (file.root, file.path)
        told = self._manifest.get(self._name(*key))
        if verdict and verdict[0] in {"missing", "unreadable"}:
            return verdict  # perhaps as it was backed up
        self._unnamed += told is None
        if told in {None, self.others.get(key, file.sha256)}:
            return verdict
        return "damaged", "its hash is another one than in the manifest"

    def _name(self, root: str, path: str) -> str:
        return os.path.relpath(f"{self._folders[root].path}/{path}", self._base)

    def check_rest(self) -> None:
        """Name what is in the backup and cannot be brought back, and what the manifest lacks."""
        if self._unnamed and self._path.is_file():
            self._note("damaged", str(self._path), f"{self._unnamed} files are not in it")
        for folder in self._folders.values():
            for path in self._unknown(folder):
                is_told = self._name(folder.name, path) in self._manifest
                reason = "the index does not have it: it is not brought back"
                self._note("damaged" if is_told else "changed", folder.show(path), reason)


def read_manifest(path: Path) -> Iterator[tuple[str, str]]:
    """Yield name and hash of each line of sha256sum; ValueError where one is none."""
    if not path.is_file():
        raise FileNotFoundError
    with open(path, "rb") as manifest:
        for line in manifest:
            match = re.fullmatch(rb"(\\?)([0-9a-f]{64})  (.+)\n", line)
            if not match:
                raise ValueError("it is cut, or was changed")
            mark, sha256, name = match.groups()
            name = name.decode("unicode_escape").encode("latin-1") if mark else name
            yield os.fsdecode(name), sha256.decode()


def find_backup(settings: Settings, path: Path) -> Path:
    """Return a backup, or the last one in a folder of them."""
    if path.name.endswith(PARTIAL):
        raise Refusal(f"{path} is not whole: its backup was interrupted")
    if backup_settings(settings, path).database_url.is_file():
        return path
    found = backups_in(path) if path.is_dir() else []
    if not found:
        raise Refusal(f"there is no backup in {path}")
    return found[-1]


def need_empty(settings: Settings, *, resumed: bool) -> None:
    """Refuse what a server has taken something into, and folders with files, unless `resumed`."""
    index = settings.database_url
    if index.exists():
        with contextlib.closing(Index(index, query_only=True)) as known:
            if any(known.count_rows()):
                raise Refusal(
                    f"{index} knows files already; a backup is brought back into a new folder"
                )
    for root in () if resumed else open_folders(settings, None).values():
        if isinstance(root, Bucket) and root.holds_objects():
            raise Refusal(f"{root.show()} is not empty; a backup is brought back into a new place")
    ends = ("", "-wal", "-shm", "-spare", "-suspect")
    own = {"lock", "secrets.env", *(f"{index.name}{end}" for end in ends)}
    locks = str(settings.database_dir / LOCKS)
    for name in () if resumed else PLACES:
        place = Path(str(getattr(settings, name)))
        folder = place.parent if name == "database_url" else place
        found = (files for path, _, files in os.walk(folder) if path != locks)
        if any(set(files) - own for files in found):
            raise Refusal(f"{folder} is not empty; a backup is brought back into a new folder")


@command("restore", SOURCE, AS_JSON)
def restore(settings: Settings, source: str, *, as_json: bool = False) -> int:
    """Bring a backup back into an empty STORAGE_DIR and verify it.

    Returns 1 if some file is not as it should be.
    """
    own = backup_settings(settings, find_backup(settings, parse_path(source)))
    place = settings.database_url.with_name(settings.database_url.name + PARTIAL)
    need_empty(settings, resumed=place.exists())
    make_folders(settings)
    with writing_to(str(place)), lock_data_dir(settings):
        with contextlib.closing(Index(own.database_url, query_only=True)) as kept:
            kept.count_rows()  # or it is none
            kept.copy_to(place)
        with contextlib.closing(apply_migrations(Index(place))) as index:
            progress = Progress(index.files.total_size(), silent=as_json)
            copier = Restorer(index, own, fillable_folders(settings), progress)
            copier.copy_all(index)
            copier.check_rest()
            copy_secrets(own, settings)
            index.write(lambda db: copier.note_times(db, index))
        os.sync()
        replace_index(place, settings.database_url)
    return verify(settings, as_json=as_json, restored=copier)


# -- Migrate -----------------------------------------------------------------------------

# The setting of each, its root in the index, and what its paths there begin with
FAMILY_PLACES = {
    "media": ("media_dir", "library", f"{MEDIA_FOLDER}/"), "images": ("upload_dir", "images", ""),
    "users": ("users_dir", "users", ""), "entities": ("media_storage_dir", "entities", ""),
}  # fmt: skip


class Mover(Copier):
    """Copies files to where they are to be served from; what is there stays.

    The target's list and the index are in one order, so that what is there costs no request.
    """

    def __init__(
        self, index: Index, source: Folder, target: Folder, progress: Progress, *, below: str
    ) -> None:
        """Paths begin with `below`."""
        super().__init__(index, {source.name: source}, {target.name: target}, progress)
        self._target, self._below = target, below

    def check(self, files: Iterable[File]) -> None:
        self._listed = self._target.walk_stored(bool, [])
        self._latest = next(self._listed, None)
        super().check(file for file in files if file.path.startswith(self._below))

    def _judge(self, file: File) -> tuple[str, str] | None:
        path = os.fsencode(file.path)
        while self._latest and self._latest[0] < path:
            self._latest = next(self._listed, None)
        if self._latest and (self._latest[0], self._latest[1].st_size) == (path, file.size):
            self._progress.advance(file.size)
            return None
        return super()._judge(file)


@command(
    "migrate", ("family", {"metavar": "|".join(FAMILY_PLACES), "choices": FAMILY_PLACES}),
    option("--to", "a folder or s3://BUCKET/PREFIX", "PLACE", parse_place, required=True), AS_JSON,
)  # fmt: skip
def migrate(settings: Settings, family: str, *, to: Path | S3Place, as_json: bool = False) -> int:
    """Copy the files of a root to PLACE, while the server runs.

    Returns 1 if one that was copied is not as it was taken in.
    """
    name, root, below = FAMILY_PLACES[family]
    own = moved_settings(settings, name, to)
    with index_to_read(settings) as index, server_is_stopped(settings) as is_stopped:
        source, target = open_folders(settings, index)[root], open_folders(own, None)[root]
        if source.path != target.path:  # else they share the server's own `.incoming/`
            target.recover(lambda name: True)
        files = (file for file in index.files.of_root(root) if file.path.startswith(below))
        progress = Progress(sum(file.size for file in files), silent=as_json)
        mover = Mover(index, source, target, progress, below=below)
        for _ in range(MAX_ROUNDS):
            before = mover.copied
            if mover.copy_all(index) and mover.copied == before:
                break
    os.sync()
    first = "" if is_stopped else "stop the server, run this once more (for what is new), then "
    place = f"{name.upper()}={to}" if getattr(own, name) else f"no {name.upper()}"
    then = f"{first}start the server with {place}"
    status = mover.report(f"{mover.files} files of {family}", then=then)
    progress.say(then)
    return status


def moved_settings(settings: Settings, name: str, to: Path | S3Place) -> Settings:
    """Return settings with another place for the files of a family; Refusal, SettingError."""
    media = settings.storage_dir / MEDIA_FOLDER  # where public uploads are without MEDIA_DIR
    if overlap(getattr(settings, name) or media, to):
        raise Refusal(f"{to} is where they are")
    place: Path | S3Place | None = to
    if name == "media_dir" and not isinstance(to, S3Place):
        if not overlap(media, to):
            raise Refusal(f"public uploads are in {media} or in s3://BUCKET/PREFIX")
        place = None
    changed: dict[str, Any] = {name: place}
    own = settings._replace(**changed)
    check_folders(own._asdict())
    return own


@contextlib.contextmanager
def server_is_stopped(settings: Settings) -> Iterator[bool]:
    """Yield whether no server uses DATA, and none does within the block."""
    try:
        lock = lock_data_dir(settings)
    except SettingError:
        yield False
        return
    with lock:
        yield True


# -- Trash -------------------------------------------------------------------------------


@contextlib.contextmanager
def opened_app(settings: Settings) -> Iterator[App]:
    """Yield what handlers need, for a command that does what they do and signs nothing."""
    names = [name for name, spec in SETTINGS.items() if spec.is_generated]
    blank: dict[str, Any] = {name: secrets.token_urlsafe(32) for name in names}
    with opened_index(settings) as index:
        yield App(settings._replace(**blank), index, Thumbnails(), SharedProgress())


@command("trash list", AS_JSON)
def list_trash(settings: Settings, *, as_json: bool = False) -> None:
    """List what is softly deleted.

    The oldest first: kind, id, time, size, owner, name.
    """
    with index_to_read(settings) as index:
        found = index.trash.all()
    rows = [item._asdict() | {"deleted_at": format_time(item.deleted_at)} for item in found]
    order = ("kind", "id", "deleted_at", "size", "user_id", "name")
    print_rows([{name: row[name] for name in order} for row in rows], as_json=as_json)


@command("trash restore", ("ids", {"metavar": "ID", "nargs": "+"}))
def restore_trash(settings: Settings, ids: Sequence[str]) -> None:
    """Bring back what is softly deleted, by the ids of the list."""
    with opened_app(settings) as app:
        unknown = [id for id in ids if not restore_trashed(app, id.lower())]
    if unknown:
        raise Refusal(f"not in the trash: {', '.join(unknown)}")


@command(
    "trash empty", AS_JSON,
    option("--older_than", "only what was deleted before so many days", "DAYS", parse_days),
)  # fmt: skip
def empty_trash_now(
    settings: Settings, *, older_than: float | None = None, as_json: bool = False
) -> None:
    """Remove for good what is softly deleted."""
    until = math.inf if older_than is None else time.time() - older_than * 86400
    with opened_app(settings) as app:
        removed = empty_trash(app, until)
    size = sum(item.size for item in removed)
    if as_json:
        print(json.dumps({"removed": [item.id for item in removed], "bytes": size}))
    else:
        print(f"{len(removed)} removed, {format_size(size)}")


# -- Import ------------------------------------------------------------------------------


class Destination(NamedTuple):
    """Where the files of another program go, and which of them."""

    root: str
    place: str  # in that root; {} stands for the name of the source
    types: Set[str] | None  # extensions by content; None: of every image, video and audio
    is_tree: bool = False  # the folders of the source are kept


DESTINATIONS = {
    "library": Destination("library", "imported/{}/", None, is_tree=True),
    "media": Destination("library", "media/", MEDIA_TYPES),  # /media/NAME stays what it was
    "images": Destination("images", "", IMAGE_TYPES),  # and so does /image/NAME
}


RECORDS = ("accounts", "entities")  # families that are taken in from databases


class Result(NamedTuple):
    """What has become of something that was to be taken in."""

    word: str  # new, here, left or failed
    detail: str  # where it is, or why


class NotImported(Exception):
    """Something cannot be taken in; the text says why."""


def attempt(what: str, work: Callable[[], Result]) -> Iterator[tuple[str, Result]]:
    """Yield what has become of one thing; Refusal where the others would fail like it."""
    try:
        yield what, work()
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENODEV}:
            raise Refusal(f"stopped at {what}: {error.strerror}") from None
        yield what, Result("failed", error.strerror or str(error))
    except NotImported as error:
        yield what, Result("failed", str(error))
    except (AttributeError, LookupError, TypeError, ValueError, sqlite3.IntegrityError) as error:
        yield what, Result("failed", f"its row is not understood: {error}")


def import_files(
    origin: Folder, folder: Folder, destination: Destination, *, is_trial: bool
) -> Iterator[tuple[str, Result]]:
    """Copy another program's files, and yield what becomes of each; what is here already stays."""
    if not folder.is_local(destination.place):
        raise Refusal(f"{folder.show(destination.place)} is in an object store, of which no scan"
                      " knows: import into a folder, and migrate")  # fmt: skip
    need_disks(folder)
    prefix = destination.place.format(safe_name(os.path.basename(origin.path)))
    unreadable: list[bytes] = []

    def take(path: str) -> Result:
        if not is_media_name(os.fsencode(path)):
            return Result("left", "its name is not that of an image, video or audio")
        found = describe(origin, path, 0.0)
        if found is None:
            return Result("left", "it is gone")
        file, asset = found
        if asset.facts is None:
            return Result("left", "its content is no image, video or audio")
        if destination.types is not None and asset.facts.extension not in destination.types:
            return Result("left", f"its content is {asset.mime_type}")
        names = numbered_names(prefix + (path if destination.is_tree else safe_name(path)))
        kept, free = find_copy(folder, asset.sha256, names)
        if kept:
            return Result("here", kept[0].path)
        if is_trial:
            return Result("new", next(free))
        keep = functools.partial(folder.keep, names=free)
        return Result("new", copy_file(origin, file, folder, keep))

    seen = set[str]()
    for path, _ in origin.walk(bool, unreadable):
        seen.add(name := os.fsdecode(path))
        yield from attempt(name, functools.partial(take, name))
    for name in map(os.fsdecode, unreadable):
        seen.add(name)
        yield name, Result("failed", "it cannot be read")
    why = "passed over: hidden, a link, beside .nomedia, or the server's own"
    yield from report_rest(Path(origin.path), seen, bool, why)


def folders_above(path: str) -> Iterator[str]:
    """Yield the folders that a path is in, the outermost first; each ends with a slash."""
    return (path[: end + 1] for end, character in enumerate(path) if character == "/")


def report_rest(
    source: Path, seen: Set[str], wanted: Callable[[bytes], bool], why: str
) -> Iterator[tuple[str, Result]]:
    """Yield what else is in a source: wanted files, and folders of which nothing was seen."""
    looked_into = set(itertools.chain.from_iterable(map(folders_above, seen)))
    unreadable: list[OSError] = []
    counts: dict[str, int] = {}
    for folder, folders, files in os.walk(source, onerror=unreadable.append):
        links = [name for name in folders if os.path.islink(f"{folder}/{name}")]
        for path in (os.path.relpath(f"{folder}/{name}", source) for name in files + links):
            if path not in seen and wanted(os.fsencode(path)):
                above = folders_above(path)
                place = next((each for each in above if each not in looked_into), path)
                counts[place] = counts.get(place, 0) + 1
    for place, count in sorted(counts.items()):
        yield place, Result("left", f"{count} files, {why}" if place.endswith("/") else why)
    for error in unreadable:
        if (place := os.path.relpath(error.filename, source)) + "/" not in looked_into:
            yield place, Result("failed", "it cannot be read")


def find_copy(
    folder: Folder, sha256: str, names: Iterator[str]
) -> tuple[Located | None, Iterator[str]]:
    """Return a file of some content under one of the names, else None, and the names left."""
    for name in names:
        if folder.is_gone(name):
            return None, itertools.chain([name], names)
        kept = describe(folder, name, time.time())
        if kept and kept[1].sha256 == sha256:
            return kept, names
    raise AssertionError("names have no end")


def copy_file(
    origin: Folder, file: File, folder: Folder, keep: Callable[[Incoming], T], *,
    md5: bool = False,
) -> T:  # fmt: skip
    """Copy a file with its times into a folder, where `keep` puts it; return what that does."""
    with origin.open(file.path) as source:
        status = os.fstat(source.fileno())
        receiving = folder.begin(Limit(sys.maxsize, ""), md5)  # it may have grown
        with undoing(receiving.discard):
            for block in read_blocks(source, file.size):
                receiving.feed(block)
            incoming = receiving.finish()
            if incoming.sha256 != file.sha256:
                raise BlockingIOError(errno.EAGAIN, "it is being written")
            os.utime(incoming.file.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))
            kept = keep(incoming)
    incoming.discard(undo=False)
    return kept


# The tables of media_handler's two services (Django) and of CoLAN's media store (SQLAlchemy, with
# a row for each version). They are read from SQLite files and, as PostgreSQL's cannot be read
# without its driver, from what `manage.py dumpdata` writes.
SOURCE_TABLES = (
    "accounts_customuser", "media_handler_collection", "media_handler_media", "entities",
    "entities_version",
)  # fmt: skip
Row = dict[str, Any]
MAX_DUMP_BYTES = 1 << 28
PLACES_BELOW = 2  # levels of folders that a database's paths may begin in
FILES_ALONE = "--into library takes in a folder's files alone"


def read_tables(source: Path) -> tuple[dict[str, list[Row]], list[tuple[str, Result]]]:
    """Return the rows of SOURCE_TABLES in the databases and dumps below a folder.

    And what is told of their other tables, of which those with passwords are accounts.
    """
    tables: dict[str, list[Row]] = {name: [] for name in SOURCE_TABLES}
    others: Counter[tuple[str, bool]] = Counter()  # rows by table, and whether of accounts
    readers = {".db": read_sqlite, ".sqlite": read_sqlite, ".sqlite3": read_sqlite,
               ".json": read_dump}  # fmt: skip
    for folder, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(folder, name) for name in sorted(files)):
            if (read := readers.get(path.suffix.lower())) and path.is_file():
                try:
                    for table, row in read(path):
                        if table in tables:
                            tables[table].append(row)
                        else:
                            name = f"table {table} of {path.relative_to(source)}"
                            others[name, any("password" in key.lower() for key in row)] += 1
                except (OSError, sqlite3.Error) as error:
                    raise Refusal(f"{path} cannot be read: {error}; {FILES_ALONE}") from None
    told = []
    for (name, is_account), count in others.items():
        result = Result("left", f"rows that have no place here: {count}")
        if is_account:
            result = Result("failed", f"accounts that are none of media_handler's: {count}")
        told.append((name, result))
    return tables, told


def read_sqlite(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield table and row of what a database has, read from a copy: SQLite writes beside it.

    Of tables that are none of SOURCE_TABLES the rows have names only.
    """
    import tempfile

    with open(path, "rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            return
    with tempfile.TemporaryDirectory() as place:
        for suffix in ("", "-wal", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(f"{path}{suffix}", f"{place}/copy{suffix}")
        with contextlib.closing(sqlite3.connect(f"{place}/copy")) as db:
            db.row_factory = sqlite3.Row
            found = "SELECT name FROM sqlite_master WHERE type = 'table'"
            usual = " AND name NOT LIKE 'sqlite!_%' ESCAPE '!' AND sql NOT LIKE 'CREATE VIRTUAL%'"
            for (table,) in db.execute(found + usual).fetchall():
                quoted = '"{}"'.format(table.replace('"', '""'))
                if table in SOURCE_TABLES:
                    order = "transaction_id" if table.endswith("_version") else "id"
                    for row in db.execute(f"SELECT * FROM {quoted} ORDER BY {order}"):
                        yield table, dict(row)
                else:
                    names = [row["name"] for row in db.execute(f"PRAGMA table_info({quoted})")]
                    count = db.execute(f"SELECT count(*) FROM {quoted}").fetchone()[0]
                    yield from itertools.repeat((table, dict.fromkeys(names)), count)


def read_dump(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield table and row of a file that `manage.py dumpdata` has written."""
    with open(path, "rb") as file:
        text = file.read(MAX_DUMP_BYTES + 1)
    try:
        items = json.loads(text if len(text) <= MAX_DUMP_BYTES else b"")
    except (ValueError, RecursionError):
        if b'"model"' not in text[:1000]:
            return
        problem = f"{path} looks like a dump, but cannot be read, or is too large"
        raise Refusal(f"{problem}; {FILES_ALONE}") from None
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict) and "model" in item:
            fields = item.get("fields")
            row = {"id": item.get("pk"), **(fields if isinstance(fields, dict) else {})}
            row["collection_id"] = row.get("collection")
            yield str(item["model"]).replace(".", "_"), row


def read_time(value: object) -> float:
    """Return Unix seconds of a time as those databases have it: milliseconds, or UTC as a text.

    >>> read_time(1700000000000), read_time("2023-11-14 22:13:20"), read_time(None)
    (1700000000.0, 1700000000.0, 0.0)
    >>> read_time(1700000000000000000) == LATEST_TIME  # nanoseconds, in which no calendar is right
    True
    """
    if str(value).isdecimal():  # in a column of texts, too
        return min(int(str(value)), LATEST_TIME * 1000) / 1000
    with contextlib.suppress(ValueError):
        moment = datetime.fromisoformat(re.sub(r"(\.\d{3})\d*|Z$", r"\1", str(value)))
        return moment.replace(tzinfo=moment.tzinfo or timezone.utc).timestamp()
    return 0.0


class RecordImporter:
    """Takes in what another program's database has, under its ids and with its times."""

    def __init__(
        self, app: App, origin: Folder, tables: Mapping[str, Sequence[Row]], *,
        is_trial: bool, joins: bool,
    ) -> None:  # fmt: skip
        """`joins`: who has the same e-mail here is the same person."""
        self._joins = joins
        self._app, self._index, self._origin = app, app.index, origin
        self._tables = tables
        self._is_trial = is_trial
        self._describe = functools.lru_cache(maxsize=2)(functools.partial(describe, origin))
        self._users: dict[int, int] = {}  # ids there and here
        self._histories: dict[int, list[Row]] = {}  # of entities
        for row in tables["entities_version"]:
            self._histories.setdefault(row["id"], []).append(row)
        self._slots = [""]  # below the source, where paths may begin
        for folder, folders, _ in os.walk(origin.path):
            place = os.path.relpath(folder, origin.path)
            self._slots += [f"{place}/"] if place != "." else []
            if place.count("/") + (place != ".") >= PLACES_BELOW:
                folders.clear()

    def run(self) -> Iterator[tuple[str, Result]]:
        """Take in all rows, and yield what becomes of each."""
        need_disks(self._app.users, self._app.entities)
        importers = {
            "user": self._import_user, "collection": self._import_collection,
            "media": self._import_media, "entity": self._import_entity,
        }  # fmt: skip
        for table, (name, import_row) in zip(SOURCE_TABLES, importers.items(), strict=False):
            for row in self._tables[table]:
                yield from attempt(f"{name} {row['id']}", functools.partial(import_row, row))
        for id in self._histories.keys() - {row["id"] for row in self._tables["entities"]}:
            yield f"entity {id}", Result("left", "it was deleted there")
        rows = itertools.chain.from_iterable(self._tables.values())
        named = {self._find(row.get("file") or row.get("file_path")) for row in rows}
        source, found = Path(self._origin.path), set(filter(None, named))
        yield from report_rest(source, found, is_media_name, "no record names it")

    def _import_user(self, row: Row) -> Result:
        users, email = self._index.users, row["email"]
        known, joined = users.find(email), read_time(row["date_joined"])
        if (
            known
            and known.email.casefold() == email.casefold()
            and (self._joins or (known.email == email and users.created(known.id) == joined))
        ):
            self._users[row["id"]] = known.id
            return Result("here", f"{email}: account {known.id}")
        names = ("first_name", "last_name", "email", "username", "phone_number", "password")
        values = {name: row[name] for name in names}
        if taken := users.taken(values):  # anybody may have registered with that e-mail
            hint = " (--join if that is the same person)" if taken == ["email"] else ""
            raise NotImported(f"{email}: another account has its {', '.join(taken)}{hint}")
        if not users.get(row["id"]):
            values["id"] = row["id"]

        def add(db: Database) -> User:
            user = users.add(db, values, joined)
            if not row["is_active"]:
                users.set_active(db, user, active=False)
            return user

        added = self._write(add)
        self._users[row["id"]] = added.id if added else row["id"]
        is_read = str(row["password"]).startswith("pbkdf2_sha256$")
        had_rights = row.get("is_staff") or row.get("is_superuser")
        notes = ["set its password (user passwd)"] * (not is_read)
        notes += ["its staff rights are not taken over (user grant)"] * bool(had_rights)
        return Result("new", ": ".join([email, ", ".join(notes)] if notes else [email]))

    def _write(self, apply: Callable[[Database], T]) -> T | None:
        """Write to the index, unless this is a trial."""
        return None if self._is_trial else self._index.write(apply)

    def _owner(self, id: int) -> int:
        """Return the account of a user there; NotImported where it is not certain who that is."""
        if not (self._tables["accounts_customuser"] or self._index.users.get(id)):
            return id  # accounts are elsewhere, and tokens carry the id
        if id not in self._users:
            problem = "whose it is, is not certain: take in the accounts' database with it"
            raise NotImported(problem)
        return self._users[id]

    def _import_collection(self, row: Row) -> Result:
        id = str(uuid.UUID(row["id"]))
        if self._index.collections.is_known(id):
            return Result("here", row["name"])
        owner, name, description = self._owner(row["user"]), row["name"], row["description"]
        made, changed = read_time(row["created_at"]), read_time(row["updated_at"])
        collection = Collection(id, owner, name, description, made, changed)
        self._write(lambda db: self._index.collections.put(db, collection))
        return Result("new", row["name"])

    def _import_media(self, row: Row) -> Result:
        id = str(uuid.UUID(row["id"]))
        if self._index.media.is_known(id):
            return Result("here", row["name"])
        owner = self._owner(row["user"])
        path, file = self._find(row.get("file")), None
        if not self._is_trial and path:
            names = numbered_names(f"{owner}/{row['file']}")
            free = (name for name in names if not self._index.files.get("users", name))
            file = self._copy(path, self._app.users, free)
        times = read_time(row["created_at"]), read_time(row["updated_at"])
        collection = row["collection_id"] and str(uuid.UUID(row["collection_id"]))
        record = MediaRecord(
            id=id, user_id=owner, name=row["name"], type=row["type"], collection_id=collection,
            size=file[0].size if file else row["size"], path=file[0].path if file else None,
            note=None if file else row["storage_path"], description=row["description"],
            created_at=times[0], updated_at=times[1],
        )  # fmt: skip

        def put(db: Database) -> None:
            if file:
                self._index.files.put(db, *file)
            self._index.media.put(db, record)
            if row["is_deleted"]:
                self._index.media.soft_delete(db, owner, id, times[1])

        self._write(put)
        return Result("new", f"{row['name']}: {self._describe_file(row.get('file'), path)}")

    def _import_entity(self, row: Row) -> Result:
        id, history = row["id"], self._history(row)
        known = self._index.entities.get(id)
        if known and known.added == read_time(row["added_date"]):
            return Result("here", row["label"] or "")
        path = self._find(row["file_path"])
        found = self._describe(path, 0.0) if path else None
        sha256 = found[0].sha256 if found else ""
        self._check_entity(id, sha256)
        files: dict[str | None, Located | None] = {}
        for each in () if self._is_trial else history:
            files[each["file_path"]] = self._import_content(each["file_path"], each["md5"])

        def put(db: Database) -> None:
            self._check_entity(id, sha256, db)  # the server may have been faster
            for file in filter(None, files.values()):
                self._index.files.put(db, *file)
            versions = [entity_of(each, files[each["file_path"]]) for each in history]
            self._index.entities.import_versions(db, versions)

        self._write(put)
        told = f"{self._describe_file(row['file_path'], path)}, versions: {len(history)}"
        older = {each["file_path"] for each in history} - {None, row["file_path"]}
        if gone := sorted(name for name in older if not self._find(name)):
            told += f", of older ones {', '.join(gone)} is gone"
        return Result("new", f"{row['label'] or '-'}: {told}")

    def _history(self, row: Row) -> list[Row]:
        """Return the versions of an entity, the oldest first; the last one is what it is now."""
        told = ("label", "description", "parent_id", "is_deleted", "file_path")
        deleted = 2  # SQLAlchemy-Continuum's operation_type
        versions = [
            v for v in self._histories.get(row["id"], ()) if v["operation_type"] != deleted
        ]
        is_whole = versions and all(versions[-1][name] == row[name] for name in told)
        return versions if is_whole else [*versions, row]

    def _check_entity(self, id: int, sha256: str, db: Database | None = None) -> None:
        if self._index.entities.get(id, db=db):
            raise NotImported("another entity has its id here")
        if sha256 and (holder := self._index.entities.with_content(sha256, db)):
            raise NotImported(f"entity {holder} has the same content")

    def _import_content(self, name: str | None, md5: str | None) -> Located | None:
        """Copy what an entity has or had, unless it is gone."""
        path = self._find(name)
        folder = self._app.entities
        placed = self._copy(path, folder, numbered_names(name or ""), md5=True) if path else None
        return placed and (placed[0], placed[1]._replace(md5=placed[1].md5 or md5))

    def _describe_file(self, name: str | None, path: str | None) -> str:
        return "without a file" if not name else path or f"its file {name} is gone"

    def _find(self, name: str | None) -> str | None:
        """Return the path below the source of a file that a database names; None if it is gone."""
        for place in self._slots if name else ():
            with contextlib.suppress(ValueError):
                if not self._origin.is_gone(f"{place}{name}"):
                    self._slots.remove(place)
                    self._slots.insert(0, place)
                    return f"{place}{name}"
        return None

    def _copy(
        self, path: str, folder: Folder, names: Iterator[str], *, md5: bool = False
    ) -> Located | None:
        """Copy a file; what an import that was interrupted has left there is taken for it."""
        found = self._describe(path, 0.0)
        if found is None:
            return None
        kept, free = find_copy(folder, found[0].sha256, names)
        keep = functools.partial(store_upload, self._app, folder=folder, names=free)
        return kept or copy_file(self._origin, found[0], folder, keep, md5=md5)


def entity_of(row: Row, file: Located | None) -> Entity:
    """Return a version of an entity as CoLAN's media store has it."""
    return Entity(
        id=row["id"], is_collection=bool(row["is_collection"]), label=row["label"],
        description=row["description"], parent_id=row["parent_id"],
        is_deleted=bool(row["is_deleted"]), added=read_time(row["added_date"]),
        updated=read_time(row["updated_date"]),
        path=file[0].path if file else None, asset=file[1] if file else None,
    )  # fmt: skip


def choose_destination(
    source: Path, family: str, others: Iterable[tuple[str, Result]]
) -> Destination:
    """Return where a folder goes; what might be private is not made public by a guess."""
    for what, (word, _) in others:
        if word == "failed":
            raise Refusal(f"{what} has accounts that are none of media_handler's; {FILES_ALONE}")
    if family in RECORDS:
        raise Refusal(f"there is no database of media_handler or CoLAN's media store in {source}")
    with os.scandir(source) as entries:
        is_tree = any(entry.is_dir(follow_symlinks=False) for entry in entries)
    if not family and not is_tree:
        raise Refusal(
            f"{source} has no folders in it: say --into images if its pictures are private,"
            " --into media if they are on the web under their names, else --into library"
        )
    return DESTINATIONS[family or "library"]


@command(
    "import", SOURCE, AS_JSON,
    option("--into", "whose endpoints show them", "FAMILY", one_of(*DESTINATIONS, *RECORDS)),
    option("--dry_run", "only say what would be done"),
    option("--join", "who has the same e-mail here is the same person"),
)  # fmt: skip
def import_source(
    settings: Settings, source: str, into: str = "", *, dry_run: bool = False, join: bool = False,
    as_json: bool = False,
) -> int:  # fmt: skip
    """Copy another program's pictures here, with their names and times.

    Prints what becomes of every file or record, and where it is or why; returns 1 if one failed.
    SOURCE is only read. A second run goes on where the first was interrupted, and does nothing
    if it was not.
    """
    place = Path(os.path.realpath(parse_path(source)))
    if not place.is_dir():
        raise Refusal(f"{place} is no folder")
    tables, others = ({}, []) if into in DESTINATIONS else read_tables(place)
    with opened_app(settings) as app:
        inner = [each.path for each in app.folders.values()]
        origin = Folder(
            "source", place, make=False, buffers=app.library.buffers,
            excluded=[*inner, str(settings.database_dir)],
        )  # fmt: skip
        need_outside(place, app.folders, "where it is served already")
        outcomes: Iterable[tuple[str, Result]]
        if any(tables.values()):
            records = RecordImporter(app, origin, tables, is_trial=dry_run, joins=join)
            outcomes = itertools.chain(others, records.run())
        else:
            destination = choose_destination(place, into, others)
            folder = app.folders[destination.root]
            outcomes = import_files(origin, folder, destination, is_trial=dry_run)
        counts = dict.fromkeys(("new", "here", "left", "failed"), 0)
        print_rows(count_outcomes(outcomes, counts), as_json=as_json)
    would = "would be taken in" if dry_run else "taken in"
    rest = f"{counts['left']} left, {counts['failed']} failed"
    warn(f"{counts['new']} {would}, {counts['here']} are here already, {rest}")
    if counts["new"] and not dry_run and not any(tables.values()):
        warn("the server shows them after its next scan: at its start, or when it gets SIGHUP")
    return 1 if counts["failed"] else 0


def count_outcomes(
    outcomes: Iterable[tuple[str, Result]], counts: dict[str, int]
) -> Iterator[dict[str, str]]:
    """Yield what becomes of each thing as a row, and count it."""
    for what, (word, detail) in outcomes:
        counts[word] += 1
        yield {"outcome": word, "name": what, "detail": detail}


# -- The server's processes --------------------------------------------------------------

# What is told to the process. Until there is somebody to react, all of it waits.
SIGNALS = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGALRM))
RESTART = os.EX_TEMPFAIL  # a worker's exit status where all are to be started anew


def notify(state: str) -> None:
    """Tell systemd a change of state, if it is systemd that runs this program (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # of the abstract namespace (unix(7))
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    with sock, contextlib.suppress(OSError):  # nothing here depends on whether it listens
        sock.sendto(state.encode(), address)


def notify_reload() -> None:
    """Say that a reload has begun and, since a scan goes on in the background, that it is done."""
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    notify("READY=1")


class Watchdog:
    """Tells systemd that every worker is well, or tells nothing, and systemd starts us anew.

    Each worker notes when it was last found well, in memory shared by all.
    """

    def __init__(self, workers: int) -> None:
        given = os.environ.get("WATCHDOG_PID") in {None, str(os.getpid())}
        microseconds = os.environ.get("WATCHDOG_USEC", "") if given else ""
        self.interval = int(microseconds) / 2e6 if microseconds.isdecimal() else 0.0
        self._seen = shared_numbers("d", workers)
        for number in range(workers):
            self._seen[number] = time.monotonic()

    def check(self, number: int, is_well: Callable[[float], bool]) -> None:
        """Note that a worker is well, if it is, and tell systemd."""
        if is_well(self.interval):
            self._seen[number] = time.monotonic()
            self.report()

    def report(self) -> None:
        """Tell systemd that all workers are well, if they have been lately."""
        if min(self._seen) > time.monotonic() - 1.6 * self.interval:
            notify("WATCHDOG=1")


class Shared(NamedTuple):
    """What the workers of a server have in common, made before they are forked."""

    settings: Settings
    listener: socket.socket
    thumbnails: Thumbnails
    progress: SharedProgress
    meter: Meter
    watchdog: Watchdog


class Supervisor:
    """Keeps forked workers running until SIGTERM or SIGINT; SIGHUP goes to the first.

    Their `parent` becomes readable when this process ends, however it ends; so does the lock.
    Signals are waited for, one after the other, as everything else is: no handler can come in
    between.
    """

    def __init__(self, shared: Shared, lock: io.FileIO) -> None:
        self._shared = shared
        self._watchdog = shared.watchdog
        self._held, self._parent = socket.socketpair()
        self._lock = lock
        self._workers: dict[int, int] = {}  # number by process ID
        self._stopping = False
        self._restarting = False

    def run(self) -> None:
        """Start the workers, and react to signals until the last one has ended."""
        signal.setitimer(signal.ITIMER_REAL, self._watchdog.interval, self._watchdog.interval)
        react: Mapping[int, Callable[[], None]] = {
            signal.SIGALRM: self._watchdog.report, signal.SIGCHLD: self._reap,
            signal.SIGHUP: self._scan, signal.SIGTERM: self._stop, signal.SIGINT: self._stop,
        }  # fmt: skip
        while True:
            self._restarting = False
            for number in range(self._shared.settings.workers):
                self._start(number)
            while self._workers:
                react[signal.sigwait(SIGNALS)]()
            if self._stopping or not self._restarting:
                break
            recover(self._shared.settings, self._shared.thumbnails)
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _start(self, number: int) -> None:
        work = functools.partial(run_server, self._shared, number, self._parent)
        self._workers[fork_worker([self._held, self._lock], work)] = number

    def _reap(self) -> None:
        for process in list(self._workers):
            ended, status = os.waitpid(process, os.WNOHANG)
            if not ended:
                continue
            number = self._workers.pop(process)
            if os.waitstatus_to_exitcode(status) == RESTART:
                self._restarting = True
                self._send(signal.SIGTERM, self._workers.values())
            elif not self._stopping and not self._restarting:
                warn(f"worker {number} ended with status {status}; another one takes its place")
                time.sleep(1)  # one that cannot start must not use up the machine
                self._start(number)

    def _scan(self) -> None:
        self._send(signal.SIGHUP, {0})
        notify_reload()

    def _stop(self) -> None:
        self._stopping = True
        notify("STOPPING=1")
        self._shared.listener.close()  # or connections would go on waiting in its backlog
        self._send(signal.SIGTERM, self._workers.values())

    def _send(self, number: int, workers: Iterable[int]) -> None:
        for process, worker in self._workers.items():
            if worker in workers:
                os.kill(process, number)  # it is there until it has been waited for


def fork_worker(ours: Sequence[socket.socket | io.FileIO], work: Callable[[], bool]) -> int:
    """Return the id of a child that runs `work` without `ours`; True ends it with RESTART.

    SIGNALS, which are blocked, wait for it until it unblocks them.
    """
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.environ.pop("NOTIFY_SOCKET", None)  # systemd listens to the supervisor only
        for item in ours:
            item.close()
        status = RESTART if work() else 0
    finally:
        if status == 1:
            sys.excepthook(*sys.exc_info())
        os._exit(status)


def open_listener(host: str, port: int) -> socket.socket:
    """Return a listening socket; HTTPServer's own way looks up the host's name first."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = inherited_listener() or socket.create_server(
        (host, port), family=family, backlog=LISTEN_BACKLOG
    )
    # Accepted ones inherit what is set here (tcp(7)).
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux only
        unread = int(UNREAD_SECONDS * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, unread)
    listener.setblocking(False)
    return listener


def inherited_listener() -> socket.socket | None:
    """Return the listening socket that systemd holds for us (sd_listen_fds(3)), if it does.

    It outlives this process: connections that come during a restart wait in its backlog.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    listener = socket.socket(fileno=3)
    if os.environ.get("LISTEN_FDS") != "1" or listener.family == socket.AF_UNIX:
        raise OSError(errno.EINVAL, "one TCP socket is wanted of socket activation")
    listener.set_inheritable(False)
    return listener


LISTEN_HINTS: Mapping[int | None, str] = {
    errno.EADDRINUSE: "give another --port (0 takes a free one), or stop what listens there",
    errno.EACCES: "ports below 1024 are root's: give another --port",
}


@command("serve")
def serve(settings: Settings) -> None:
    """Run the server, until SIGTERM or SIGINT (the default)."""
    for number in (signal.SIGTERM, signal.SIGINT):  # until it listens there is nothing to finish
        signal.signal(number, lambda number, frame: os._exit(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
    for descriptor in range(3):  # one that was closed would be a file's or a client's
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    make_folders(settings)
    thumbnails = Thumbnails()
    thumbnails.start()  # forks its host: before there is any thread or lock
    lock = lock_data_dir(settings)
    settings, generated = with_secrets(settings)
    try:
        listener = open_listener(settings.host, settings.port)
    except OSError as error:
        hint = LISTEN_HINTS.get(error.errno, "give an address of this machine as --host")
        raise SettingError("HOST, PORT", f"cannot listen: {error.strerror}; {hint}") from None
    recover(settings, thumbnails)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    watchdog, meter = Watchdog(settings.workers), Meter(settings.workers, len(ROUTES) + 1)
    shared = Shared(settings, listener, thumbnails, SharedProgress(), meter, watchdog)
    announce(settings, listener, thumbnails, generated)
    if settings.workers > 1:
        Supervisor(shared, lock).run()
        checkpoint_index(settings.database_url)
    else:
        while run_server(shared):
            recover(settings, thumbnails)
    thumbnails.stop()
    if not settings.quiet:
        warn("stopped, as it was told to")
    lock.close()
    os._exit(0)  # a decoder or a large file that a scan still waits for may take minutes


def recover(settings: Settings, thumbnails: Thumbnails) -> None:
    """Check the settings against what is on disk, and undo what a crash left half done."""
    for _ in range(2):  # an index in which damage is met is put aside when it is opened again
        with contextlib.closing(open_index(settings.database_url)) as index:
            try:
                return recover_files(App(settings, index, thumbnails, SharedProgress()))
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
    raise SettingError("DATABASE_URL", "the index is damaged again and again: does the disk fail?")


def recover_files(app: App) -> None:
    """Undo what a crash left half done on disk."""
    thumbnails = app.thumbnails
    if app.index.get_meta("decoders") != thumbnails.description:
        app.index.assets.retry_thumbnails()
        app.index.set_meta("decoders", thumbnails.description)
    thumbnails.recover()
    thumbnails.remove(*app.index.assets.private_with_thumbnail(), public_only=True)
    if not app.settings.read_only:
        resumed = app.uploads.recover()
        # To one that was just made, or made anew for a lost one, all files are unknown: all stay.
        is_new = app.index.get_meta("recovered") is None
        for folder in app.folders.values():
            find = functools.partial(app.index.files.get, folder.name)
            folder.recover((lambda name: True) if is_new else find, resumed)
        app.index.set_meta("recovered", "1")


def run_server(shared: Shared, number: int = 0, parent: socket.socket | None = None) -> bool:
    """Serve on a listening socket until told to stop; worker 0 also scans.

    True where it was the index that ended it: it is to be opened anew.
    """
    settings, listener, thumbnails, progress, meter, watchdog = shared
    meter.worker = number
    try:
        index = open_sound_index(settings.database_url)
    except sqlite3.DatabaseError as error:  # other workers use it: `recover` puts it aside
        warn(f"the index is damaged: {error}")
        return True
    app = App(settings, index, thumbnails, progress, meter=meter)
    if settings.log_format != "none":
        app.log = functools.partial(log_request, settings=settings)
    server = Server(listener.dup(), Dispatcher(app, ROUTES), limit_descriptors())
    server.parent = parent
    app.index.on_damage = functools.partial(leave_index, server)
    handle_signals(server, app, listener)
    over, threads = threading.Event(), list[threading.Thread]()
    if watchdog.interval:
        check = functools.partial(watchdog.check, number, functools.partial(is_well, server, app))
        threads.append(start_repeating("the watchdog", check, watchdog.interval, over))
    if number == 0 and not settings.read_only:
        app.scanner.start(settings.rescan_interval)
        expire = app.uploads.remove_expired
        threads.append(start_repeating("old uploads", expire, EXPIRY_SECONDS, over))
        if settings.trash_days:
            empty = functools.partial(empty_old_trash, app)
            threads.append(start_repeating("emptying the trash", empty, TRASH_SECONDS, over))
    server.serve_forever()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    over.set()
    app.scanner.stop()
    for thread in threads:  # closing a connection that another thread uses crashes SQLite
        thread.join(SCANNER_STOP_SECONDS)
    app.index.close()
    return listener.fileno() >= 0


SPARE_DESCRIPTORS = 256  # of the open files, kept for what is not a connection


def limit_descriptors() -> int:
    """Raise the limit of open files as far as it goes; return what it leaves for connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_DESCRIPTORS + SPARE_DESCRIPTORS
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_DESCRIPTORS, 64)


def leave_index(server: Server, problem: str) -> None:
    """Stop using a damaged index."""
    if not server.stopping:
        warn(f"the index is damaged: {problem}")
        server.stop()


def is_well(server: Server, app: App, seconds: float) -> bool:
    """Return whether the accept loop has turned within so many seconds, and the index answers."""
    app.index.get_meta("decoders")
    return time.monotonic() - server.turned_at < max(seconds, 3)  # it is noted once a second


def handle_signals(server: Server, app: App, listener: socket.socket) -> None:
    """Have SIGTERM and SIGINT stop for good, a second SIGINT at once; SIGHUP scans."""

    def leave() -> None:
        listener.close()  # so that another server may have the port at once
        server.stop()

    def stop(number: int, frame: object) -> None:
        if server.stopping and number == signal.SIGINT:
            os._exit(130)
        notify("STOPPING=1")
        leave()

    def scan() -> None:
        app.scanner.request()
        notify_reload()

    server.on_hangup, server.on_orphaned = scan, leave
    signal.set_wakeup_fd(server.wakeup.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop if server.parent is None else signal.SIG_IGN)
    # A handler in Python may come in between anything, itself too: this one leaves it to the loop.
    signal.signal(signal.SIGHUP, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def addresses(host: str, port: int) -> list[str]:
    """Return the URLs to open in a browser here, and in the network if that can reach it."""
    if host not in {"0.0.0.0", "::"}:
        return [f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"]
    found = ["localhost"]
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        # Connecting a datagram socket sends nothing; it tells which address would be used.
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((target, 9))
            own = sock.getsockname()[0]
            found.append(f"[{own}]" if ":" in own else own)
    return [f"http://{name}:{port}/" for name in found]


def announce(
    settings: Settings, listener: socket.socket, thumbnails: Thumbnails, generated: Sequence[str]
) -> None:
    """Say that the server is ready, and what to do next."""
    notify("READY=1")
    if settings.auth_disabled:
        warn("AUTH_DISABLED is on: everyone may do everything")
    if settings.quiet:
        return
    address, port = listener.getsockname()[:2]
    url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
    warn(f"listening on {url}")
    places = addresses(address, port)
    warn(f"open {' or '.join(places)}")
    if sys.stderr and sys.stderr.isatty():  # never in a log
        key = urlencode({"key": settings.auth_token})
        warn(f"to do everything there, as the owner: {places[0]}gallery#{key}")
    writer = settings.read_only
    work = f"reading only ({writer} writes)" if writer else f"scanning {settings.storage_dir}"
    warn(f"{work}; thumbnails: {thumbnails.description}")
    if generated:
        warn(f"generated secrets are in {settings.secrets_file} ({', '.join(generated)});")
        warn("another program's tokens are good here only with the same secret")
    if not writer:
        show_upload(settings, generated, places[0])


def show_upload(settings: Settings, generated: Sequence[str], place: str) -> None:
    """Say how a picture is uploaded."""
    if "NOTIFY_SOCKET" in os.environ:  # as setup.sh installs it, with settings of its own
        token = "sudo media-server token"
    else:
        token = token_command(settings)
        known = "MEDIA_SERVER_SECRET" in generated or is_in_dotenv(settings.media_server_secret)
        if not known:
            warn("in another shell, set MEDIA_SERVER_SECRET as it is set here; then")
    warn(f'upload a picture: curl -F file=@photo.jpg "{place}upload?token=$({token})"')


def is_in_dotenv(secret: str) -> bool:
    """Return whether commands in this folder find the secret of upload tokens in its `.env`."""
    with contextlib.suppress(FileNotFoundError):  # the start has read it, and told its faults
        values = parse_dotenv(Path(".env").read_text("utf-8-sig"), {})
        return values.get("MEDIA_SERVER_SECRET") == secret
    return False


def token_command(settings: Settings) -> str:
    """Return the command that prints an upload token, as any shell and any folder can run it."""
    program = os.path.abspath(serve.__code__.co_filename)  # also where bytecode is run
    words = ["python3", program, "token"]
    words += ["--scope", "upload"] if settings.upload_tokens == "scoped" else []
    usual = load_settings({"storage_dir": str(settings.storage_dir)}, {}, {})
    for name in PLACES:
        if name == "storage_dir" or getattr(settings, name) != getattr(usual, name):
            scheme = "sqlite:///" if name == "database_url" else ""
            words += [f"--{name}", f"{scheme}{getattr(settings, name)}"]
    command = shlex.join(words)
    if is_in_dotenv(settings.media_server_secret):
        return f"cd {shlex.quote(os.getcwd())} && {command}"
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == [DECODER_HOST]:
        host = socket.socket(fileno=int(given[1]))
        become_host(host)
        run_decoder_host(host, int(given[2]), given[3] or None)
        return 0
    try:
        run, settings = parse_command_line(given)
        if run.func is not serve:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        with usable_places(settings):
            status = run() or 0
            print(end="", flush=True)
            return status
    except SettingError as error:
        warn(str(error))
        return 2
    except Refusal as error:
        warn(str(error))
        return 1
    except BrokenPipeError:  # who reads what is printed has gone; Python writes at its end, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    if sys.getfilesystemencoding() != "utf-8":  # names of files are bytes, whatever the locale
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    sys.exit(main())
