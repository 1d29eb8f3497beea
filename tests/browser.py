"""A headless browser and its report on a page."""

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
    """Return the path of an installed browser, or None."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


def install():
    """Install a browser if there is none.

    Returns:
        The reason why this machine cannot have one; None if it has one.
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
    """Report of a browser on a page.

    Attributes:
        html: Page after loading.
        console: Lines of the console.
        requests: Addresses requested over the network.
        picture: Screenshot by row, column and colour.
    """

    html: str
    console: list[str]
    requests: list[str]
    picture: object


def look_at(page, folder, is_dark=False, size=(1000, 1400)):
    """Open a page.

    Args:
        page: HTML file.
        folder: Folder for the screenshot and the browser's files.
        is_dark: True if the reader prefers dark pages.
        size: Width and height of the window.
    """
    shot, log = Path(folder, "shot.png"), Path(folder, "network.json")
    command = [
        program(),
        "--headless",
        # the sandbox does not work for root
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
