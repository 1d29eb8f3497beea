"""A real browser without a window, and what it tells of a page."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image

PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")
PACKAGE = "chromium-headless-shell"


def program():
    """The browser that there is."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


def install():
    """Install a browser if there is none.

    Returns:
        Why this machine can have none; None if it can.
    """
    if program():
        return None
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "there is no chromium, and only root installs it, by apt-get"
    options = {"capture_output": True, "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}}
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", PACKAGE]):
        if subprocess.run(["apt-get", *command], check=False, timeout=240, **options).returncode:
            return f"apt-get cannot install {PACKAGE}"
    return None


@dataclass
class Seen:
    """What a browser shows of a page.

    Attributes:
        html: The page as it stands after it was loaded.
        console: Lines of the console.
        requests: Addresses that were asked for over the network.
        picture: What is to be seen, by row, column and colour.
    """

    html: str
    console: list[str]
    requests: list[str]
    picture: object


def look_at(page, folder, is_dark=False, size=(1000, 1400)):
    """Open a page.

    Args:
        page: The HTML file.
        folder: Where to put the screenshot and what the browser leaves.
        is_dark: Whether the reader prefers dark pages.
        size: Width and height of the window.
    """
    shot, log = Path(folder, "shot.png"), Path(folder, "network.json")
    command = [
        program(),
        "--headless",
        # root has none
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder}/profile",
        f"--blink-settings=preferredColorScheme={0 if is_dark else 1}",
        "--window-size={},{}".format(*size),
        "--enable-logging=stderr",
        f"--log-net-log={log}",
        f"--screenshot={shot}",
        "--dump-dom",
        Path(page).absolute().as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return Seen(
        html=done.stdout,
        console=re.findall(r":CONSOLE[^\]]*\] (.*)", done.stderr),
        requests=_requests(json.loads(log.read_text())),
        picture=matplotlib.image.imread(shot),
    )


def _requests(log):
    number = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    started = [event["params"] for event in log["events"] if event["type"] == number and "params" in event]
    return [parameters["url"] for parameters in started if "url" in parameters]
