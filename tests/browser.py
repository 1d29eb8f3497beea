"""A headless browser: its report on a page, or a tab that a test uses as a person does."""

import base64
import fcntl
import json
import os
import re
import select
import shutil
import subprocess
import time
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


class Tab:
    """Tab of a browser without a window, which a test controls by Chrome's DevTools protocol over two pipes.

    Attributes:
        messages: Errors and warnings of the console and of the network.
    """

    def __init__(self, folder, size=(1280, 900), is_dark=False):
        self.folder, self.messages = Path(folder), []
        # the browser reads from file descriptor 3 and writes to 4
        (read, self.to_browser), (self.from_browser, write) = (
            [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 50) for end in os.pipe()] for _ in range(2)
        )
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        command = [program(), *options, f"--user-data-dir={folder}/profile", "about:blank"]
        script = f'exec "$@" 3<&{read} 4>&{write} {read}<&- {write}>&-'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command], pass_fds=(read, write), stderr=subprocess.DEVNULL
        )
        os.close(read)
        os.close(write)
        self.waiting, self.number, self.session = b"", 0, None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.send(f"{domain}.enable")
        self.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(self.folder))
        self.look(size, is_dark)

    def close(self):
        """End the browser."""
        self.process.terminate()
        self.process.wait(30)
        os.close(self.to_browser)
        os.close(self.from_browser)

    def send(self, method, **parameters):
        """Send a command, and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.number:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    def _receive(self, seconds=60):
        while b"\0" not in self.waiting:
            assert select.select([self.from_browser], [], [], seconds)[0], "the browser does not answer"
            part = os.read(self.from_browser, 2**16)
            assert part, "the browser has ended"
            self.waiting += part
        message, _, self.waiting = self.waiting.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        parameters = event.get("params", {})
        if event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.messages.append(parameters["entry"]["text"])
        if event.get("method") == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.messages.append(str(parameters["args"]))
        if event.get("method") == "Runtime.exceptionThrown":
            self.messages.append(str(parameters["exceptionDetails"]))

    def look(self, size, is_dark=False):
        """Set the size of the window, and the colours that the reader prefers."""
        width, height = size
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def visit(self, address):
        """Open a page, and wait until it is loaded."""
        self.send("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def ask(self, expression):
        """Return the value of an expression of JavaScript."""
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression, seconds=60):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.ask(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.05)

    def place(self, selector):
        """Return the middle of an element, scrolled into view."""
        found = json.dumps(selector)
        return self.ask(
            f"(() => {{ const it = document.querySelector({found}); it.scrollIntoView({{block: 'nearest'}}); "
            "const box = it.getClientRects()[0]; return [box.x + box.width / 2, box.y + box.height / 2] })()"
        )

    def click(self, selector):
        """Click on an element with the mouse."""
        x, y = self.place(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def point(self, selector):
        """Move the mouse to an element."""
        x, y = self.place(selector)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def write(self, selector, text):
        """Insert a text into a field, as a paste does."""
        self.ask(f"document.querySelector({json.dumps(selector)}).focus()")
        self.send("Input.insertText", text=text)

    def press(self, key, code=0, modifiers=0):
        """Press a key; modifiers: 2 is Ctrl, 8 is Shift."""
        given = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.send("Input.dispatchKeyEvent", type="rawKeyDown", **given)
        self.send("Input.dispatchKeyEvent", type="keyUp", **given)

    def choose_file(self, selector, path):
        """Choose a file in a field for files."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def photograph(self, path):
        """Write a screenshot as PNG."""
        Path(path).write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
