"""Compare thumbnails with how Chromium draws the same pictures at the same size.

python compare_pictures.py [--keep FOLDER] [PICTURE...]

Without pictures it makes 104 of its own: every format that a browser shows, with profiles,
orientations, transparency, 16 bits, gamma and HDR, and cut short; of formats that it does not
show, the PNG of the same picture and profile is drawn. Prints the mean difference of
colour (of 255) of each; ends with 1 if one is above 4 that is not in EXPECTED.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pillow_heif
from PIL import Image, ImageChops, ImageCms, ImageDraw, ImageStat

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mediaserver as ms

SIZE = 800, 600
COLOURS = (
    "#dc3c28", "#2850c8", "#e6c832", "#ffffff", "#e67814", "#000000", "#b4dcf0", "#78c850",
)  # fmt: skip
CELL, COLUMNS = 260, 8
LIMIT = 4.0
EXPECTED = {  # what begins so differs for a reason
    "animated.avif": "Chromium makes colours of sequences stronger than they were written",
    "cut": "what is not there is black, grey or noise here and white in Chromium",
    "dithered": "nothing but edges",
    "turned-webp": "Chromium leaves EXIF's orientation of WebP aside",
    "hdr": "Chromium draws graphics white darker",
}


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def patterns() -> tuple[Image.Image, Image.Image]:
    """Gradients with patches, and the same fading out towards its edges."""
    ramp = Image.linear_gradient("L")
    radial = Image.radial_gradient("L").resize(SIZE)
    picture = Image.merge("RGB", (ramp.resize(SIZE), ramp.rotate(90).resize(SIZE), radial))
    draw = ImageDraw.Draw(picture)
    for left, colour in zip(range(5, 800, 100), COLOURS, strict=True):
        draw.rectangle((left, 50, left + 80, 150), colour)
        draw.ellipse((left, 400, left + 80, 500), colour)
    fading = picture.copy()
    fading.putalpha(ImageChops.invert(radial))
    return picture, fading


def profiles() -> dict[str, bytes]:
    """Display P3, Adobe RGB, linear light, and sRGB with its channels in another order."""
    adobe = 0.60974, 0.31111, 0.01947, 0.20528, 0.62567, 0.06087, 0.14919, 0.06322, 0.74457
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    order = {b"rXYZ": b"gXYZ", b"gXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}
    for name, other in order.items():
        srgb = srgb.replace(name, other.upper(), 1)
    for other in order.values():
        srgb = srgb.replace(other.upper(), other, 1)
    return {
        "p3": ms.make_profile(ms.COLORANTS[12], ms.linear_of_srgb),
        "adobe": ms.make_profile(adobe, lambda value: value**2.19921875),
        "linear": ms.make_profile(ms.COLORANTS[1], float),
        "swapped": srgb,
    }


def png_of_16_bits(picture: Image.Image) -> bytes:
    kind = {"L": 0, "RGB": 2, "LA": 4, "RGBA": 6}[picture.mode]
    width = len(picture.getbands()) * picture.width
    data = bytes(value for byte in picture.tobytes() for value in (byte, byte))
    rows = (b"\0" + data[at : at + 2 * width] for at in range(0, len(data), 2 * width))
    head = struct.pack(">IIBBBBB", *picture.size, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join((
        png_chunk(b"IHDR", head), png_chunk(b"IDAT", zlib.compress(b"".join(rows))),
        png_chunk(b"IEND", b""),
    ))  # fmt: skip


def make_pictures(folder: Path) -> list[Path]:
    pillow_heif.register_heif_opener()
    picture, fading = patterns()
    grey = picture.convert("L")

    def save(name: str, image: Image.Image = picture, **options: object) -> bytes:
        image.save(folder / name, **options)
        return (folder / name).read_bytes()

    for extension in ("jpg", "png", "webp", "avif"):
        save(f"plain.{extension}")
        save(f"grey.{extension}", grey)
        for name, profile in profiles().items():
            save(f"{name}.{extension}", icc_profile=profile)
        for orientation in range(2, 9):
            exif = Image.Exif()
            exif[ms.EXIF_ORIENTATION] = orientation
            save(f"turned-{extension}-{orientation}.{extension}", exif=exif)
        if extension != "jpg":
            save(f"fading.{extension}", fading)
            turned = [picture.rotate(180), picture.rotate(90)]
            save(f"animated.{extension}", save_all=True, append_images=turned, duration=60_000)
    for number, options in enumerate(({"progressive": True}, {"quality": 50, "subsampling": 2})):
        save(f"jpeg-{number}.jpg", **options)
    save("cmyk.jpg", picture.convert("CMYK"))
    save("large.jpg", picture.resize((6000, 4000)))
    save("odd.png", picture.resize((1003, 333)))
    save("small.png", picture.resize((33, 17)))
    save("lossless.webp", lossless=True)
    for name in ("palette.png", "palette.gif", "palette.bmp"):
        save(name, picture.quantize(64))
    for name in ("palette-fading.png", "palette-fading.gif"):
        save(name, fading.quantize(64, method=2))
    save("dithered.png", picture.convert("1"))
    save("keyed.png", transparency=(255, 255, 255))
    save("plain.bmp")
    save("plain.ico", fading.resize((200, 150)), sizes=[(200, 150)])
    for image in (grey, picture, fading.convert("LA"), fading):
        (folder / f"16-{image.mode}.png").write_bytes(png_of_16_bits(image))
    plain = save("plain.png")
    for name, kind, data in (
        ("gamma-1", b"gAMA", struct.pack(">I", 100_000)),
        ("gamma-1.8", b"gAMA", struct.pack(">I", 55_556)),
        ("cicp-p3", b"cICP", bytes((12, 13, 0, 1))),
        ("hdr-pq", b"cICP", bytes((9, 16, 0, 1))),
    ):
        (folder / f"{name}.png").write_bytes(plain[:33] + png_chunk(kind, data) + plain[33:])
    for name in ("plain.jpg", "plain.png", "palette.gif", "plain.webp"):
        whole = (folder / name).read_bytes()
        (folder / f"cut-{name}").write_bytes(whole[: len(whole) * 7 // 10])
    lab = ImageCms.createProfile("LAB")
    srgb = ImageCms.createProfile("sRGB")
    save("plain+lab.tiff", ImageCms.profileToProfile(picture, srgb, lab, outputMode="LAB"))
    save("plain+cmyk.tiff", picture.convert("CMYK"))
    save(
        "grey+16.tiff",
        Image.frombytes("I;16", SIZE, bytes(v for v in grey.tobytes() for _ in "hl")),
    )
    for extension in ("tiff", "heic", "jp2"):
        save(f"plain+.{extension}")
        save(f"grey+.{extension}", grey)
        if extension != "jp2":
            for name, profile in profiles().items():
                save(f"{name}+.{extension}", icc_profile=profile)
    (folder / "no-end.jpg").write_bytes((folder / "plain.jpg").read_bytes()[:-2])
    return sorted(folder.iterdir())


def thumbnails_of(paths: list[Path], folder: Path) -> list[Image.Image | None]:
    thumbnails = ms.Thumbnails()
    place = ms.Folder("data", folder, make=True, buffers=ms.WriteBuffers())
    previews = ms.PreviewCache(place, "previews/", 0, thumbnails.preview_bytes)
    thumbnails.set_caches(
        ms.ImageCache(place, "public/"), ms.ImageCache(place, "private/"), previews
    )
    thumbnails.start()
    made: list[Image.Image | None] = []
    for path in paths:
        sha256 = hashlib.sha256(os.fsencode(path)).hexdigest()
        lies_in = ms.Folder("library", path.parent, make=False, buffers=ms.WriteBuffers())
        with lies_in.open(path.name) as source:
            status = ms.state_of(os.fstat(source.fileno()))
            file = ms.File("library", path.name, sha256, *status, 0)
            asset = ms.Asset(sha256, file.size, ms.probe(source))
        found = thumbnails.make(lies_in, file, asset) is ms.Outcome.MADE
        made.append(Image.open(io.BytesIO(thumbnails.caches[0].read(sha256))) if found else None)
    return made


def shown_for(path: Path) -> Path:
    """The picture that is drawn: where the format is not, the one named as before the `+`."""
    start, plus, _ = path.name.partition("+")
    return path.with_name(f"{start}.png") if plus else path


def draw_in_chromium(cells: list[tuple[Path, tuple[int, int]]], folder: Path) -> Image.Image:
    """One screenshot of all pictures, each in its cell in the size of its thumbnail."""
    style = "position:absolute;left:{}px;top:{}px;width:{}px;height:{}px"
    images = [
        f'<img src="{shown_for(path).resolve().as_uri()}" style="'
        + style.format(number % COLUMNS * CELL, number // COLUMNS * CELL, *size) + '">'
        for number, (path, size) in enumerate(cells)
    ]  # fmt: skip
    (folder / "page.html").write_text("<body style='margin:0'>" + "\n".join(images))
    height = -(-len(cells) // COLUMNS) * CELL
    subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--force-color-profile=srgb", f"--window-size={COLUMNS * CELL},{height}",
            "--virtual-time-budget=20000", f"--screenshot={folder / 'page.png'}",
            (folder / "page.html").as_uri(),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return Image.open(folder / "page.png").convert("RGB")


def compare(paths: list[Path], folder: Path) -> int:
    made = thumbnails_of(paths, folder / "thumbnails")
    drawn = draw_in_chromium(
        [(p, m.size if m else (256, 256)) for p, m in zip(paths, made, strict=True)], folder
    )
    wrong = 0
    for number, (path, thumbnail) in enumerate(zip(paths, made, strict=True)):
        reason = next((why for start, why in EXPECTED.items() if path.name.startswith(start)), "")
        difference = 255.0
        if thumbnail:
            left, top = number % COLUMNS * CELL, number // COLUMNS * CELL
            theirs = drawn.crop((left, top, left + thumbnail.width, top + thumbnail.height))
            ours = Image.new("RGBA", thumbnail.size, "white")
            ours = Image.alpha_composite(ours, thumbnail.convert("RGBA")).convert("RGB")
            difference = sum(ImageStat.Stat(ImageChops.difference(ours, theirs)).mean) / 3
        bad = difference > LIMIT and not reason
        wrong += bad
        mark = "WRONG" if bad else reason if difference > LIMIT else ""
        print(f"{path.name:28} {difference:7.2f}  {mark}")
    print(f"{len(paths)} pictures, {wrong} of them unlike Chromium's")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="where pictures and screenshot stay")
    parser.add_argument("pictures", nargs="*", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        for name in ("pictures", "thumbnails"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        return compare(options.pictures or make_pictures(folder / "pictures"), folder)


if __name__ == "__main__":
    sys.exit(main())
