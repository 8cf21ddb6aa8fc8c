"""Compare `probe` with exiftool, and lengths with ffprobe, over folders of samples.

python compare_facts.py [--make FOLDER] [--table] [--speed] [--fuzz N] FOLDER...

--make writes some hundred samples of its own with ffmpeg, Pillow and exiftool: every format, with
dates in every field, with and without zones, and lengths with and without an index.
"""

from __future__ import annotations

import argparse
import calendar
import collections
import io
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mediaserver as ms

os.environ["TZ"] = "Europe/Berlin"
time.tzset()
FIELDS = (
    "type",
    "mime_type",
    "width",
    "height",
    "orientation",
    "duration",
    "created",
    "make",
    "model",
    "latitude",
)


DAY = "2019:05:04 03:02:01"
WRITTEN = {  # exiftool's tags; `+` stands for a date
    "original": ["EXIF:DateTimeOriginal"], "digitized": ["EXIF:CreateDate"],
    "own-zone": ["EXIF:DateTimeOriginal", "EXIF:OffsetTimeOriginal=+05:30"],
    "other-zone": ["EXIF:DateTimeOriginal", "EXIF:OffsetTime=-03:00"],
    "fraction": ["EXIF:DateTimeOriginal", "EXIF:SubSecTimeOriginal=25"],
    "edit-too": ["EXIF:ModifyDate=2021:01:01 00:00:00", "XMP-exif:DateTimeOriginal"],
    "xmp": ["XMP-photoshop:DateCreated"],
    "xmp-zone": [f"XMP-xmp:CreateDate={DAY}+02:00"],
    "place": ["EXIF:Make=Acme", "EXIF:Model=Box 1", "EXIF:GPSLatitude=33.5", "EXIF:Orientation=6",
              "EXIF:GPSLatitudeRef=S", "EXIF:GPSLongitude=151.25", "EXIF:GPSLongitudeRef=E"],
    "iptc": ["IPTC:DateCreated=2019:05:04", "IPTC:TimeCreated=14:32:05+02:00"],
    "chunk": ["PNG:CreationTime"],
}  # fmt: skip
ENCODED = {  # a file's name and ffmpeg's options for it
    "a.mp4": "", "b.mp4": "-movflags +faststart", "c.mp4": "-movflags frag_keyframe+empty_moov",
    "d.mp4": "-movflags +dash+delay_moov+global_sidx", "a.mov": "-c:a pcm_s16le", "a.m4v": "",
    "a.3gp": "-c:v h264 -c:a aac -ar 44100", "a.3g2": "-c:v h264 -c:a aac", "a.m4a": "-vn",
    "a.mkv": "", "b.mkv": "-c:v mpeg4 -c:a flac", "a.webm": "-c:v libvpx -c:a libvorbis",
    "b.webm": "-vn -c:a libopus", "a.mka": "-vn -c:a libopus", "a.avi": "-c:v mpeg4 -c:a mp3",
    "b.avi": "-c:v mjpeg -c:a pcm_s16le", "a.ts": "-c:v mpeg2video -c:a mp2", "b.ts": "",
    "a.m2ts": "-f mpegts -mpegts_m2ts_mode 1", "a.mpg": "-c:v mpeg2video -c:a mp2 -r 25",
    "b.mpg": "-c:v mpeg1video -c:a mp2 -r 25", "a.vob": "-c:v mpeg2video -c:a ac3 -r 25",
    "a.flv": "-c:v flv -c:a mp3", "a.wmv": "-c:v wmv2 -c:a wmav2", "a.wma": "-vn -c:a wmav2",
    "a.ogv": "-c:v libtheora -c:a libvorbis", "a.ogg": "-vn -c:a libvorbis", "a.opus": "-vn",
    "a.oga": "-vn -c:a flac", "a.mp3": "-vn -b:a 64k", "b.mp3": "-vn -q:a 4",
    "c.mp3": "-vn -write_xing 0 -b:a 64k", "d.mp3": "-vn -write_xing 0 -q:a 4 -id3v2_version 0",
    "e.mp3": "-vn -ar 22050 -write_id3v1 1", "a.aac": "-vn", "a.flac": "-vn", "a.wav": "-vn",
    "b.wav": "-vn -c:a adpcm_ima_wav", "c.wav": "-vn -c:a pcm_f32le -rf64 always",
    "a.aiff": "-vn", "b.aiff": "-vn -c:a pcm_s24be",
}  # fmt: skip
LENGTHS = (0.6, 2, 7.3, 31, 130)  # seconds


def make_samples(folder: Path) -> None:
    """Write pictures with dates in every field, and recordings of several lengths."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.linear_gradient("L").resize((80, 60)).convert("RGB")
    for extension in ("jpg", "png", "webp", "tif", "gif", "jp2", "avif"):
        for name, tags in WRITTEN.items():
            path = folder / f"{name}.{extension}"
            picture.save(path)
            words = [f"-{tag}" if "=" in tag else f"-{tag}={DAY}" for tag in tags]
            command = ["exiftool", "-q", "-q", "-overwrite_original", "-n", *words, str(path)]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                path.unlink()  # which has no place for that
    for name, options in ENCODED.items():
        for seconds in LENGTHS:
            path = folder / f"{seconds:g}-{name}"
            sources = [f"testsrc2=d={seconds}:s=64x48:r=10", f"sine=d={seconds}:r=44100"]
            inputs = [word for source in sources for word in ("-f", "lavfi", "-i", source)]
            command = ["ffmpeg", "-v", "error", "-y", *inputs, "-metadata"]
            command += ["creation_time=2019-05-04T01:02:01Z", *options.split(), str(path)]
            subprocess.run(command, check=True)


SAME_TYPES = {  # exiftool's name and ours
    ("audio/x-matroska", "audio/webm"),  # what has sound only, to browsers
    ("video/mpeg", "video/mp2t"), ("video/m2ts", "video/mp2t"),  # RFC 3555
}  # fmt: skip


def samples_in(folder: Path) -> list[Path]:
    paths = sorted(folder.rglob("*"))
    return [p for p in paths if p.is_file() and p.suffix not in (".json", ".md")]


def exiftool(paths: list[Path], *options: str) -> dict[str, dict]:
    run = subprocess.run(
        ["exiftool", "-n", "-json", "-api", "largefilesupport=1", *options, "-@", "-"],
        input="\n".join(map(str, paths)),
        text=True,
        capture_output=True,
        check=False,
    )
    return {entry["SourceFile"]: entry for entry in json.loads(run.stdout)}


def expected_time(entry: dict, kind: str) -> float | None:
    names = [
        ("DateTimeOriginal", "OffsetTimeOriginal", "SubSecTimeOriginal"),
        ("CreateDate", "OffsetTimeDigitized", "SubSecTimeDigitized"),
        ("DateCreated", "", ""),
        ("DateTimeCreated", "", ""),
        ("CreationTime", "", ""),
    ]
    if kind != "image":
        names = [
            ("CreationDate", "", ""),
            ("DateTimeOriginal", "", ""),
            ("CreateDate", "", ""),
            ("CreationDate", "", ""),
        ]
    for name, zone, _ in names:
        if written := entry.get(name):
            written = str(written)
            match = re.match(r"(\d+):(\d+):(\d+) (\d+):(\d+):(\d+)(\.\d+)?(Z|[-+].*)?$", written)
            if not match or match[1] == "0000":
                continue
            fields = tuple(int(match[i]) for i in range(1, 7))
            zones = (zone, "OffsetTimeOriginal", "OffsetTimeDigitized", "OffsetTime")
            offset = match[8] or next((str(entry[z]) for z in zones if z in entry), "")
            # QuickTime's and Matroska's times are UTC; what XMP writes without a zone is local.
            utc = kind != "image" and entry.get("FileType") not in ("WAV", "AVI")
            utc = utc and entry["XMP"].get(name) != written
            if not offset and utc:
                offset = "Z"
            try:
                seconds = calendar.timegm(fields) if offset else time.mktime((*fields, 0, 0, -1))
            except (ValueError, OverflowError):
                continue
            if re.match(r"[-+]\d\d:\d\d", offset):
                sign = -1 if offset[0] == "+" else 1
                seconds += sign * (int(offset[1:3]) * 3600 + int(offset[4:6]) * 60)
            return seconds
    return None


def ask_ffprobe(path: Path, *entries: str) -> tuple[list[list[float]], str]:
    """The numbers of the entries, a list for each line, and what ffprobe said beside them."""
    command = ["ffprobe", "-v", "warning", "-show_entries", *entries, "-of", "csv=p=0"]
    run = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    lines = (re.findall(r"-?\d+\.\d+", line) for line in run.stdout.splitlines())
    return [list(map(float, numbers)) for numbers in lines if numbers], run.stderr


def ffprobe_duration(path: Path) -> float | None:
    """Seconds; those of all packets where ffprobe only estimates by the first ones' bit rate."""
    rows, said = ask_ffprobe(path, "format=duration")
    if "Estimating duration" in said:
        packets, _ = ask_ffprobe(path, "packet=duration_time")
        rows = [[sum(row[0] for row in packets)]]
    return rows[0][0] if rows else None


def is_close(want: float | None, have: float | None) -> bool:
    return want is not None and have is not None and abs(want - have) <= max(0.1, 0.02 * want)


def compare(path: Path, entry: dict, got: ms.Facts | None) -> dict[str, tuple]:
    """field -> (expected, got, verdict); only fields on which exiftool says something."""
    if (
        "MIMEType" not in entry
        or "Error" in entry
        or entry["MIMEType"].split("/")[0]
        not in (
            "image",
            "video",
            "audio",
        )
    ):
        is_media = path.suffix == ".aac" and ffprobe_duration(path)  # exiftool knows no ADTS
        return {"type": (None, got and got.mime_type, (got is None) != bool(is_media))}
    if got is None:
        return {"type": (entry["MIMEType"], None, False)}
    rows: dict[str, tuple] = {"type": (entry["MIMEType"], got.mime_type, True)}
    names = (entry["MIMEType"], got.mime_type)
    rows["mime_type"] = (*names, names[0] == names[1] or names in SAME_TYPES)
    for field, name in (
        ("width", "ImageWidth"),
        ("height", "ImageHeight"),
        ("make", "Make"),
        ("model", "Model"),
        ("latitude", "GPSLatitude"),
    ):
        want, have = entry.get(name), getattr(got, field)
        if isinstance(want, str) and field in ("make", "model"):
            want = want.strip() or None
        if isinstance(want, str) and field in ("width", "height"):
            number = re.match(r"[\d.]+", want)
            want = round(float(number[0])) if number else None
        if want not in (None, "", 0):
            same = abs(want - have) < 1e-4 if isinstance(want, float) and have else want == have
            rows[field] = (want, have, same)
    if (want := entry.get("Orientation")) and got.kind == "image" and "HandlerType" not in entry:
        rows["orientation"] = (want, got.orientation, want == got.orientation)
    elif "Rotation" in entry and got.kind == "video":
        want = {0: 1, 90: 6, 180: 3, 270: 8}.get(entry["Rotation"])
        rows["orientation"] = (want, got.orientation, want == got.orientation)
    if got.kind != "image" and (want := ffprobe_duration(path)):
        rows["duration"] = (want, got.duration, is_close(want, got.duration))
    if (want := expected_time(entry, entry["MIMEType"].split("/")[0])) is not None:
        have = got.created
        rows["created"] = (want, have, have is not None and abs(want - have) < 1)
    return rows


def measure(folder: Path, by_format: dict[tuple[str, str], collections.Counter]) -> None:
    paths = samples_in(folder)
    said, xmp = exiftool(paths), exiftool(paths, "-XMP:all")
    for name, entry in said.items():
        entry["XMP"] = xmp.get(name, {})
    totals: dict[str, collections.Counter] = {f: collections.Counter() for f in FIELDS}
    for path in paths:
        with path.open("rb") as file:
            got = ms.probe(file)
            file.seek(0)
            head = ms.probe(io.BytesIO(file.read(ms.HEAD_BYTES)))
        if (head and head.kind) != (got and got.kind):
            print("  head", path, head, got and got.mime_type)
        for field, (want, have, same) in compare(path, said.get(str(path), {}), got).items():
            totals[field][same] += 1
            key = (path.suffix.lower().lstrip("."), field)
            by_format.setdefault(key, collections.Counter())[same] += 1
            if not same:
                print(f"  {field}: {path.relative_to(folder)}: exiftool {want!r}, facts {have!r}")
    print(f"{folder}: {len(paths)} files")
    for field, count in totals.items():
        if total := sum(count.values()):
            print(f"  {field:20} {count[True]:5} of {total:5}  {100 * count[True] / total:6.2f} %")


def print_table(by_format: dict[tuple[str, str], collections.Counter]) -> None:
    """A Markdown table: formats down, fields across, agreeing / compared."""
    suffixes = sorted({suffix for suffix, _ in by_format})
    print("| format |", " | ".join(FIELDS), "|")
    print("|---" * (len(FIELDS) + 1) + "|")
    for suffix in [*suffixes, None]:
        cells = []
        for field in FIELDS:
            counts = [n for (s, f), n in by_format.items() if f == field and suffix in (s, None)]
            good, total = sum(n[True] for n in counts), sum(sum(n.values()) for n in counts)
            cells.append(f"{good}/{total}" if total else "")
        print("|", suffix or "**all**", "|", " | ".join(cells), "|")


def speed(folder: Path) -> None:
    paths = samples_in(folder)
    exiftool(paths, "-fast2")
    start = time.perf_counter()
    exiftool(paths, "-fast2")
    theirs = time.perf_counter() - start
    best = 1e9
    for _ in range(3):
        start = time.perf_counter()
        for path in paths:
            with path.open("rb") as file:
                ms.probe(file)
        best = min(best, time.perf_counter() - start)
    print(
        f"{len(paths)} files: exiftool -fast2 {len(paths) / theirs:.0f}/s, "
        f"facts {len(paths) / best:.0f}/s, {theirs / best:.0f} times"
    )


def mutate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        damage = rng.randrange(6)
        # most of what is parsed lies at the start and the end
        at = min(len(made) - 1, int(rng.expovariate(1 / 300))) if made else 0
        at = len(made) - 1 - at if rng.random() < 0.2 else at
        at = max(at, 0)
        if not made:
            break
        if damage == 0:
            made[at] ^= 1 << rng.randrange(8)
        elif damage == 1:
            del made[at + 1 :]
        elif damage == 2:
            value = rng.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 255, 8, len(made)))
            made[at : at + 4] = value.to_bytes(4, rng.choice(("big", "little")))
        elif damage == 3:
            cut = rng.randrange(len(other) + 1)
            made[at : at + rng.randrange(64)] = other[cut : cut + rng.randrange(64)]
        elif damage == 4:
            made[at] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
        else:
            made[at:at] = made[at : at + rng.randrange(200)]
    return bytes(made)


def fuzz(folders: list[Path], rounds: int, seed: int = 1) -> None:
    rng = random.Random(seed)
    paths = [path for folder in folders for path in samples_in(folder)]
    samples = [p.read_bytes()[: 1 << 17] for p in paths]
    slowest, where, typed, start = 0.0, None, 0, time.perf_counter()
    memory = []
    for i in range(rounds):
        n = rng.randrange(len(samples))
        data = mutate(samples[n], samples[rng.randrange(len(samples))], rng)
        before = time.perf_counter()
        try:
            typed += ms.probe(io.BytesIO(data)) is not None
        except BaseException:
            Path("fuzz_failure").write_bytes(data)
            print("failure in", paths[n], "round", i)
            raise
        took = time.perf_counter() - before
        if took > slowest:
            slowest, where = took, paths[n]
            Path("fuzz_slowest").write_bytes(data)
        if i % max(1, rounds // 5) == 0:
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    print(
        f"{rounds} mutated probes, {typed} typed, slowest {1000 * slowest:.1f} ms ({where}), "
        f"memory {memory} MB, {rounds / (time.perf_counter() - start):.0f}/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--make", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--fuzz", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.make:
        make_samples(options.make)
        options.folders.append(options.make)
    if options.fuzz:
        return fuzz(options.folders, options.fuzz, options.seed)
    by_format: dict[tuple[str, str], collections.Counter] = {}
    for folder in options.folders:
        if options.speed:
            speed(folder)
        else:
            measure(folder, by_format)
    if options.table:
        print_table(by_format)


if __name__ == "__main__":
    sys.exit(main())
