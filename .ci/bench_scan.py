"""Measure a start on a folder of pictures: first answer, all listed, all with thumbnails.

python bench_scan.py [--pictures 2000] [--rounds 3] [--previews] [--against REVISION]

Makes JPEGs of 1280 by 960 pixels with Pillow, and starts this program, in turn with that of
another revision, on a folder of them. CPU is of all processes of the program; where the machine
does other work, too, it says more than time.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image, ImageDraw

PROGRAM = Path(__file__).resolve().parent.parent / "mediaserver.py"
LONGEST = 600.0  # seconds


def make_pictures(folder: Path, count: int) -> None:
    """Noise over a gradient, in about 150 KB a picture."""
    noise = Image.effect_noise((1280, 960), 50)
    base = Image.merge("RGB", (Image.linear_gradient("L").resize(noise.size), noise, noise))
    for number in range(count):
        picture = base.copy()
        place = number * 7 % 1200, number * 3 % 900
        ImageDraw.Draw(picture).text(place, f"{number}", "white")
        exif = Image.Exif()
        exif[0x010F] = "Bench"
        exif.get_ifd(0x8769)[0x9003] = f"2019:05:04 05:{number // 60 % 60:02}:{number % 60:02}"
        picture.save(folder / f"{number:05}.jpg", quality=30, exif=exif)


def cpu_seconds(group: int) -> float:
    """What the processes of a group have used, and those that they have waited for."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def ask(port: int, path: str) -> bytes | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return bytes(answer.read())
    except OSError:
        return None


def measure(program: Path, pictures: Path, with_previews: bool) -> list[float]:
    """Milliseconds to an answer, seconds until all are listed and drawn, and seconds of CPU."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        names = [picture.name for picture in pictures.iterdir()]
        for name in names:
            os.link(pictures / name, Path(folder) / name)
        settings = {} if with_previews else {"PREVIEW_CACHE_BYTES": "0"}
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        command = [sys.executable, str(program), "--storage_dir", folder, "--port", str(port)]
        begun = time.perf_counter()
        server = subprocess.Popen(
            command, env=kept | settings, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            times = []
            for is_done in (
                lambda: ask(port, "/health"),
                lambda: len(json.loads(ask(port, "/list") or b"{}")) >= len(names),
                lambda: len([*Path(folder).glob(".thumbnails/*.png")]) >= len(names),
            ):
                while not is_done():
                    time.sleep(0.005 if not times else 0.05)
                    if time.perf_counter() - begun > LONGEST:
                        raise TimeoutError(f"{program}: not done in {LONGEST:.0f} s")
                times.append(time.perf_counter() - begun)
            return [1000 * times[0], *times[1:], cpu_seconds(server.pid)]
        finally:
            server.terminate()
            server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--previews", action="store_true", help="of 320 pixels, too")
    parser.add_argument("--against", help="a revision, such as 29347ff")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        pictures, programs = Path(temporary) / "pictures", {"this": PROGRAM}
        pictures.mkdir()
        make_pictures(pictures, options.pictures)
        if options.against:
            other = Path(temporary) / "mediaserver.py"
            show = ["git", "-C", str(PROGRAM.parent), "show", f"{options.against}:mediaserver.py"]
            other.write_bytes(subprocess.run(show, check=True, capture_output=True).stdout)
            programs[options.against] = other
        found: dict[str, list[list[float]]] = {name: [] for name in programs}
        for _ in range(options.rounds):
            for name, program in programs.items():
                found[name].append(measure(program, pictures, options.previews))
    for name, rows in found.items():
        first, listed, thumbnails, cpu = map(statistics.median, zip(*rows, strict=True))
        print(
            f"{name}: first answer {first:.0f} ms, listed {listed:.2f} s,"
            f" thumbnails {thumbnails:.1f} s, CPU {cpu:.1f} s"
        )


if __name__ == "__main__":
    sys.exit(main())
