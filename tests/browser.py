"""Pages as a browser shows them: a few calls of a headless Chromium.

Each call is a process of its own with a profile that is thrown away, takes about a second, and is ended with all that
it started if it does not end by itself.
"""

import html
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["dump_dom", "evaluate", "find", "overflow", "screenshot"]

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 30.0  # after which a call is given up
NARROWEST = 500  # pixels: no window of Chromium is narrower, so that a phone is a frame in it


def find() -> str | None:
    """The browser on PATH, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def dump_dom(path_or_url: str | Path) -> str:
    """The page as the browser has parsed it."""
    return _run("--dump-dom", _url(path_or_url))


def screenshot(path_or_url: str | Path, png: str | Path, width: int, height: int, dark: bool = False) -> None:
    """A picture of the top of a page in a window, or on a phone, of that size in pixels."""
    options = ["--blink-settings=preferredColorScheme=0"] if dark else []
    if width >= NARROWEST:
        _run(*options, f"--screenshot={png}", f"--window-size={width},{height}", _url(path_or_url))
        return
    with tempfile.TemporaryDirectory() as folder:
        frame = _framed(path_or_url, Path(folder), width, height)
        _run(*options, f"--screenshot={png}", f"--window-size={NARROWEST},{height}", _url(frame))
    from PIL import Image  # comes with matplotlib

    with Image.open(png) as whole:
        part = whole.crop((0, 0, width, height))
    part.save(png)


def evaluate(path_or_url: str | Path, width: int, expression: str) -> Any:
    """The value of a JavaScript expression on a screen of ``width`` pixels, where ``page`` is the document."""
    with tempfile.TemporaryDirectory() as folder:
        dom = dump_dom(_framed(path_or_url, Path(folder), width, 900, expression))
    found = re.search(r'data-value="([^"]*)"', dom)
    if found is None:
        raise RuntimeError(f"{path_or_url}: the browser has measured nothing: {dom[:500]}")
    return json.loads(html.unescape(found[1]))


def overflow(path_or_url: str | Path, width: int) -> int:
    """By how many pixels a page is wider than a screen of ``width``; 0 where it does not scroll sideways."""
    return int(evaluate(path_or_url, width, f"page.documentElement.scrollWidth - {width}"))


def _framed(path_or_url: str | Path, folder: Path, width: int, height: int, expression: str = "null") -> Path:
    """A page that shows another one in a frame of that size, and notes the value of an expression."""
    page, style = folder / "frame.html", f"width:{width}px;height:{height}px;border:0;display:block"
    page.write_text(
        f"""<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe src="{html.escape(_url(path_or_url))}" style="{style}"></iframe>
<script>addEventListener("load", () => {{
const page = document.querySelector("iframe").contentDocument;
document.body.dataset.value = JSON.stringify({expression});
}})</script></body>""",
        encoding="utf-8",
    )
    return page


def _url(path_or_url: str | Path) -> str:
    text = str(path_or_url)
    return text if re.match(r"\w+://", text) else Path(text).resolve().as_uri()


def _run(*arguments: str) -> str:
    """What the browser writes; a call that hangs is an error, and nothing of it is left."""
    browser = find()
    if browser is None:
        raise RuntimeError(f"none of {NAMES} is on PATH")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # A page may read another file in its frame, which is how `evaluate` sees it.
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
        command = [browser, *options, "--no-first-run", f"--user-data-dir={profile}", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, **pipes, encoding="utf-8", start_new_session=True) as process:
            try:
                out, _ = process.communicate(timeout=SECONDS)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # it is the head of a group of its own
    if process.returncode:
        raise RuntimeError(f"{browser} ended with {process.returncode}")
    return out
