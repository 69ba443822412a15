"""A page in headless Chromium: what a script finds there."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom")
OPTIONS += ("--window-size=1280,900",)
BEFORE = "<head><script>const errors = []; addEventListener('error', (event) => errors.push(event.message));</script>"
BEHIND = """<script>
const pause = () => new Promise((then) => setTimeout(then, 200)); // the page may answer
const texts = (what) => [...document.querySelectorAll(what)].map((one) => one.innerText);
const click = (what, at = 0) => document.querySelectorAll(what)[at].click();
const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const enter = (what, value) => {
  const field = document.querySelector(what);
  field.value = value;
  for (const type of ["input", "change"]) field.dispatchEvent(new Event(type));
};
const look = (what, name, part) => getComputedStyle(document.querySelector(what), part)[name];
(async () => { SCRIPT })().catch((error) => void errors.push(error.stack)).then((found) => {
  const requests = performance.getEntriesByType("resource").map((one) => one.name);
  document.documentElement.dataset.found = encodeURIComponent(JSON.stringify({ found, errors, requests }));
});
</script>"""


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def visit(page: Path, script: str, *options: str, fragment: str = "") -> dict[str, Any]:
    """{"found": what the script returns, "errors": of all scripts, "requests": addresses that were asked for}.

    Args:
        script: the body of an asynchronous JavaScript function, which runs once the page is there.
        options: of the browser; it has a profile of its own.
        fragment: is put behind the page's address.
    """
    copy = page.with_suffix(".visited.html")
    copy.write_text(page.read_text("utf-8").replace("<head>", BEFORE, 1) + BEHIND.replace("SCRIPT", script), "utf-8")
    command = [find_browser(), *OPTIONS, f"--user-data-dir={page.parent / 'profile'}", *options]
    done = subprocess.run([*command, copy.as_uri() + fragment], capture_output=True, text=True, check=True)
    return json.loads(unquote(re.search('data-found="(.*?)"', done.stdout)[1]))
