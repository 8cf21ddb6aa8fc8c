"""Measure the gallery in Chromium: `.ci/measure_gallery.py [COUNT …]`, 3, 300, 10,000 and 100,000.

An album of each size is made of small pictures over twenty years; its index is written, not
scanned. One line a size: bytes and requests to the first picture, seconds until the page answers,
frames that were missing while it was scrolled, and the tab's memory at its end. `--screenshots
FOLDER` keeps a look at each; `--lighthouse` runs Lighthouse (by npx) over the pages instead.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import mediaserver as ms  # noqa: E402
from test_mediaserver import OWNER, Browser, Server, png  # noqa: E402

COUNTS = (3, 300, 10_000, 100_000)
SHAPES = ((60, 40), (40, 60), (64, 36), (48, 48), (96, 40))
FIRST, LAST = 1_100_000_000, 1_760_000_000  # Unix seconds of the oldest and the newest picture
MAX_STOPS = 300  # at which the page rests on its way to the end
SCROLLED = 6.0  # seconds, at three pixels a millisecond

# Before the page's own script: when the first tile and picture are there, and what keeps it busy.
WATCH = """
window.seen = {tile: 0, picture: 0, busy: 0};
new MutationObserver(() => {
  if (!seen.tile && document.querySelector(".tile")) seen.tile = performance.now();
}).observe(document, {childList: true, subtree: true});
document.addEventListener("load", (event) => {
  if (seen.picture || !event.target.matches(".tile img")) return;
  const loaded = performance.getEntries().filter((each) => each.transferSize !== undefined);
  seen.picture = performance.now();
  seen.requests = loaded.length;
  seen.bytes = loaded.reduce((sum, each) => sum + each.transferSize, 0);
}, true);
new PerformanceObserver((list) => {
  for (const each of list.getEntries()) seen.busy = each.startTime + each.duration;
}).observe({type: "longtask", buffered: true});
"""
SCROLL = """
const [milliseconds, done] = arguments, times = [];
const begun = performance.now();
function step(now) {
  times.push(now);
  window.scrollTo(0, 3 * (now - begun));
  if (now - begun < milliseconds) requestAnimationFrame(step);
  else done(times);
}
requestAnimationFrame(step);
"""


def make_album(folder: Path, count: int) -> None:
    """Write so many pictures, and the index that a scan of them would make."""
    (folder / ".mediaserver").mkdir(parents=True)
    index = ms.open_index(folder / ".mediaserver" / "index.sqlite3")
    bases = [png(*shape) for shape in SHAPES]
    found = []
    for number in range(count):
        moment = FIRST + (LAST - FIRST) * number // count
        shape, content = SHAPES[number % 5], bases[number % 5] + number.to_bytes(4, "big")
        path = f"{time.gmtime(moment).tm_year}/{number // 200:04}/DSC_{number:06}.png"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
        os.utime(folder / path, (moment, moment))
        size, mtime_ns, ctime = ms.state_of(os.stat(folder / path))
        sha256 = hashlib.sha256(content).hexdigest()
        facts = ms.Facts("image", "image/png", "png", *shape, created=float(moment))
        file = ms.File("library", path, sha256, size, mtime_ns, ctime, float(moment))
        found.append((file, ms.Asset(sha256, size, facts, thumbnail=1)))
    index.write(lambda db: [index.files.put(db, *each) for each in found])
    index.close()


def devtools(browser: Browser, command: str, **parameters: Any) -> Any:
    """Give a command of the Chrome DevTools Protocol."""
    value = {"cmd": command, "params": parameters}
    return browser.ask("POST", f"{browser.session}/goog/cdp/execute", value)


def memory_of_tab() -> int:
    """Return the bytes of memory that this script's largest renderer has to itself."""
    sizes = [0]
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if b"--type=renderer" in (place / "cmdline").read_bytes() and is_ours(place):
                rollup = (place / "smaps_rollup").read_text()
                sizes.append(int(rollup.partition("Pss:")[2].split()[0]) * 1024)
        except OSError:
            continue
    return max(sizes)


def is_ours(place: Path) -> bool:
    """Tell whether a process descends from this one."""
    while place.name not in {"0", "1"}:
        parent = (place / "stat").read_text().rpartition(")")[2].split()[1]
        if int(parent) == os.getpid():
            return True
        place = place.parent / parent
    return False


def open_page(browser: Browser, url: str) -> dict[str, float]:
    """Open the gallery and wait until it has shown a picture and been idle for a second."""
    devtools(browser, "Network.clearBrowserCache")
    browser.open(url)
    browser.see("seen.picture && performance.now() > Math.max(seen.busy, seen.picture) + 1000")
    return dict(browser.run("return seen"))


def missed_frames(browser: Browser) -> tuple[int, int]:
    """Scroll steadily; return how many frames there should have been and how many were missing."""
    value = {"script": SCROLL, "args": [1000 * SCROLLED]}
    times = browser.ask("POST", f"{browser.session}/execute/async", value)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return round(SCROLLED * 60), sum(max(0, round(gap * 0.06) - 1) for gap in gaps)


def scroll_to_end(browser: Browser) -> None:
    """Go to the end in steps that give the page time to load what is in view."""
    height = browser.run("return document.documentElement.scrollHeight")
    stops = min(MAX_STOPS, height // 800 + 1)
    for stop in range(1, stops + 1):
        browser.run("window.scrollTo(0, arguments[0])", height * stop // stops)
        browser.see("document.querySelector('.tile img.ready, .tile .words')")
        time.sleep(0.15)  # what is passed quickly is not loaded: the page waits 120 ms


def measure(browser: Browser, count: int, screenshots: Path | None) -> str:
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home, "Family pictures")
        make_album(folder, count)
        with Server(folder) as server:
            server.scanned()
            seen = open_page(browser, f"{server.url}/gallery")
            before = memory_of_tab()
            frames, missed = missed_frames(browser) if count > COUNTS[0] else (0, 0)
            if screenshots:
                browser.run("window.scrollTo(0, 0)")
                time.sleep(1)
                shot = browser.ask("GET", f"{browser.session}/screenshot")
                (screenshots / f"gallery-{count}.png").write_bytes(base64.b64decode(shot))
            scroll_to_end(browser)
            devtools(browser, "HeapProfiler.collectGarbage")
            tiles = browser.run("return document.querySelectorAll('.tile').length")
            after = memory_of_tab()
    interactive = max(seen["tile"], seen["busy"]) / 1000
    return (
        f"| {count:,} | {seen['requests']:.0f} | {seen['bytes'] / 1000:.0f} KB"
        f" | {seen['picture'] / 1000:.2f} s | {interactive:.2f} s | {missed} of {frames}"
        f" | {before >> 20} MB | {after >> 20} MB | {tiles} |"
    )


def run_lighthouse() -> int:
    """Run Lighthouse over the pages; return 1 where a score is below 95."""
    worst = 100.0
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home, "Family pictures")
        make_album(folder, 60)
        closed = Server(folder.with_name("private"), READ_AUTH_ENABLED="true")
        with Server(folder) as server, closed:
            server.scanned()
            shared = {"kind": "folder", "target": "2004", "title": "2004", "upload": True}
            _, link = server.call("POST", "/shares", shared, OWNER)
            pages = [f"{server.url}/gallery", f"{server.url}/docs", link["url"]]
            for page in (*pages, f"{closed.url}/gallery"):
                command = [
                    "npx", "--yes", "lighthouse", page, "--quiet", "--output=json",
                    "--only-categories=accessibility,best-practices",
                    "--chrome-flags=--headless=new --no-sandbox",
                ]  # fmt: skip
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=home)
                report = json.loads(done.stdout)
                for name, found in report["categories"].items():
                    score = 100 * found["score"]
                    worst = min(worst, score)
                    print(f"{page} {name}: {score:.0f}", flush=True)
                for name, audit in report["audits"].items():
                    if audit["score"] is not None and audit["score"] < 1:
                        print(f"  {name}: {audit['title']}")
    return int(worst < 95)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("counts", nargs="*", type=int, default=COUNTS, metavar="COUNT")
    parser.add_argument("--screenshots", type=Path, metavar="FOLDER")
    parser.add_argument("--lighthouse", action="store_true")
    options = parser.parse_args()
    if options.lighthouse:
        return run_lighthouse()
    print("| pictures | requests | bytes | first picture | interactive | frames missed"
          " | memory | at the end | tiles |\n|--:|--:|--:|--:|--:|--:|--:|--:|--:|")  # fmt: skip
    for count in options.counts:
        browser = Browser("--window-size=1280,900")
        try:
            devtools(browser, "Page.addScriptToEvaluateOnNewDocument", source=WATCH)
            print(measure(browser, count, options.screenshots), flush=True)
        finally:
            browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
