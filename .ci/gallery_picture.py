"""Make the picture at the head of README.md: the gallery with generated landscapes.

`.ci/gallery_picture.py` writes `.github/gallery.webp`. It needs Pillow and Chromium.
"""

from __future__ import annotations

import colorsys
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta
from pathlib import Path

from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
RATIOS = (1.5, 1.5, 1.333, 1.333, 0.75, 0.667, 1.0, 1.78, 2.4)
PLACES = ("Alps", "Birthday", "Coast of Brittany", "Grandma's garden", "Lisbon", "Winter walk")
LAYERS = 4  # of hills


def colour(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return int(255 * red), int(255 * green), int(255 * blue)


def draw_landscape(rng: random.Random, width: int, height: int) -> Image.Image:
    """Hills behind hills under a low sun, in colours of one mood."""
    hue = rng.choice((0.03, 0.08, 0.52, 0.56, 0.6, 0.75))
    top, low = colour(hue, 0.45, 0.6 + 0.35 * rng.random()), colour(hue + 0.06, 0.2, 0.98)
    sky = Image.new("RGB", (1, 2))
    sky.putdata([top, low])
    image = sky.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    radius = height * (0.03 + 0.05 * rng.random())
    x, y = width * rng.random(), height * (0.2 + 0.25 * rng.random())
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 250, 228))
    for layer in range(LAYERS):
        waves = [(rng.uniform(0.5, 3), rng.uniform(0, 6.3), rng.random()) for _ in range(4)]
        base, swing = height * (0.48 + 0.14 * layer), height * 0.06 * (1 - 0.15 * layer)
        ridge = [
            (at, base - swing * sum(k * math.sin(6.3 * at / width * n + p) for n, p, k in waves))
            for at in range(0, width + 8, 4)
        ]
        shade = colour(hue + 0.5 + 0.04 * layer, 0.2 + 0.14 * layer, 0.62 - 0.13 * layer)
        draw.polygon([(0, height), *ridge, (width, height)], fill=shade)
    return image


def fill(folder: Path, count: int) -> None:
    """Write landscapes with capture dates of some years."""
    rng, when = random.Random(3), datetime(2023, 2, 4, 9)
    for number in range(count):
        when += timedelta(hours=rng.choice((1, 2, 3, 20, 90, 200)))
        ratio = rng.choice(RATIOS)
        size = (720, int(720 / ratio)) if ratio >= 1 else (int(720 * ratio), 720)
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9003] = when.strftime("%Y:%m:%d %H:%M:%S")  # DateTimeOriginal
        place = folder / str(when.year) / PLACES[number // 12 % len(PLACES)]
        place.mkdir(parents=True, exist_ok=True)
        draw_landscape(rng, *size).save(place / f"DSC_{number:04}.jpg", quality=88, exif=exif)


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home, "Family pictures")
        fill(folder, 120)
        command = [sys.executable, HERE.parent / "mediaserver.py", folder, "--port", "0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=home) as server:
            assert server.stderr
            lines = iter(server.stderr.readline, "")
            port = next(m[1] for line in lines if (m := re.search(r"listening on .*:(\d+)", line)))
            time.sleep(15)  # the scan, and its previews
            subprocess.run(
                ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                 "--force-prefers-reduced-motion",
                 "--window-size=1280,800", "--virtual-time-budget=15000",
                 f"--user-data-dir={home}/profile", f"--screenshot={home}/page.png",
                 f"http://127.0.0.1:{port}/gallery"],
                check=True, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            server.terminate()
        target = HERE.parent / ".github" / "gallery.webp"
        target.parent.mkdir(exist_ok=True)
        Image.open(f"{home}/page.png").convert("RGB").save(target, quality=86, method=6)
        print(target, target.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
