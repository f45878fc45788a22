"""A report page as a picture: python docs/screenshot.py runs/demo/report.html docs/report.png. Needs chromium."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT = 1280, 1500
MOST_BYTES = 400_000
BROWSER = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=5000",
)


def main(report: Path, picture: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        sys.exit("chromium is not installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.png"
        options = [f"--user-data-dir={folder}", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={whole}"]
        subprocess.run([browser, *BROWSER, *options, report.resolve().as_uri()], check=True, capture_output=True)
        # A palette takes a third of the bytes and is not told from the original at this size.
        Image.open(whole).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(picture, optimize=True)
    if picture.stat().st_size >= MOST_BYTES:
        sys.exit(f"{picture} has {picture.stat().st_size} bytes; lower HEIGHT until there are fewer than {MOST_BYTES}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
