"""A reader at the browser: JupyterLab as `run_all.sh lab` starts it, and headless Chromium that clicks and types.

Screenshots are left in test-artifacts/.
"""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import nbformat
import pytest
from safetensors import safe_open

from sidae_lib import experiments

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ARTIFACTS = ROOT / "test-artifacts"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
SETTINGS = {  # every cell is in the page, seen or not, and nothing is fetched from elsewhere
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A reader's folder: notebooks, an empty store and settings of its own."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(ROOT / "notebooks", home / "notebooks", ignore=shutil.ignore_patterns(".*"))
    shutil.copytree(ROOT / "figures", home / "figures")
    for name, settings in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    return home


@pytest.fixture(scope="module")
def lab(home) -> Iterator[str]:
    """The address of a JupyterLab on the loopback interface, behind a token."""
    token = secrets.token_hex(16)
    env = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "TQDM_DISABLE", "SIDAE_DATA")} | {
        "HOME": str(home), "PYTHONPATH": str(ROOT), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"), "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "share"), "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        **{f"SIDAE_{n.upper()}": str(home / n) for n in ("runs", "records", "figures")}}  # fmt: skip
    with (home / "lab.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0",
             f"--ServerApp.root_dir={home}", f"--IdentityProvider.token={token}"],
            env=env, cwd=home, stdout=log, stderr=log)  # fmt: skip
        try:
            yield f"{address(home, process)}lab/tree/notebooks/{{}}?token={token}&reset"
        finally:
            process.send_signal(signal.SIGTERM)  # it takes its kernels with it
            process.wait(30)


def address(home: Path, process: subprocess.Popen) -> str:
    for _ in range(600):
        for file in (home / "runtime").glob("jpserver-*.json"):
            try:
                url = json.loads(file.read_text())["url"]
                urlopen(f"{url}api", timeout=5).close()
                return url
            except (OSError, json.JSONDecodeError):  # it does not answer yet, or the file is not yet written in full
                pass
        assert process.poll() is None, (home / "lab.log").read_text()
        time.sleep(0.1)
    raise AssertionError(f"JupyterLab did not start: {(home / 'lab.log').read_text()}")


@pytest.fixture(scope="module")
def browser(home):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        context = p.chromium.launch_persistent_context(home / "chromium", executable_path=CHROMIUM, headless=True, args=FLAGS,
                                                       viewport={"width": 1300, "height": 1000})  # fmt: skip
        context.set_default_timeout(60_000)
        yield context
        context.close()


class Notebook:
    """One notebook in a tab, with what its console said."""

    def __init__(self, browser, url: str) -> None:
        self.page, self.errors = browser.new_page(), []
        self.page.on("console", lambda m: self.errors.append(f"{m.text} {m.location}") if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.goto(url)
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell", state="attached")
        self.page.get_by_text(re.compile(r"Python 3.*\| Idle")).first.wait_for()  # a kernel, and it waits

    def menu(self, top: str, item: str) -> None:
        self.page.get_by_role("menuitem", name=top, exact=True).click()
        self.page.locator(".lm-Menu .lm-Menu-item").filter(has_text=re.compile(f"^{item}")).first.click()

    def cell(self, text: str):
        return self.page.locator(".jp-Notebook .jp-CodeCell").filter(has=self.page.locator(".cm-content", has_text=text)).first

    def edit(self, old: str, new: str) -> None:
        """Types into the parameters, as a reader does: the end of the line that begins so."""
        line = self.cell("scale: str").locator(".cm-line", has_text=old).first
        line.click()
        self.page.keyboard.press("Home")
        self.page.keyboard.press("Shift+End")
        self.page.keyboard.type(new)

    def finished(self, cell, timeout: float = 120_000) -> None:
        """Waits until a cell has run: its prompt is a number."""
        prompt = cell.locator(".jp-InputPrompt")
        self.page.wait_for_function("e => /\\[\\d+\\]/.test(e.textContent)", arg=prompt.element_handle(), timeout=timeout)

    def screenshot(self, name: str) -> None:
        ARTIFACTS.mkdir(exist_ok=True)
        self.page.screenshot(path=ARTIFACTS / f"{name}.png")


@pytest.fixture
def notebook(browser, lab):
    opened = []

    def opener(name: str) -> Notebook:
        opened.append(Notebook(browser, lab.format(name)))
        return opened[-1]

    yield opener
    for nb in opened:
        nb.screenshot("last_seen")
        nb.page.close(run_before_unload=False)


@slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_notebook_opens_whole(path, notebook):
    nb = notebook(path.name)
    cells = nbformat.read(path, as_version=4).cells
    pictures = sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", []))
    images = nb.page.locator(".jp-Notebook .jp-OutputArea img, .jp-Notebook .jp-RenderedMarkdown img")
    nb.page.wait_for_function("n => document.querySelectorAll('.jp-OutputArea img').length == n", arg=pictures)
    assert nb.page.locator(".jp-Notebook .jp-Cell").count() == len(cells)
    for i in range(images.count()):
        assert images.nth(i).evaluate("e => e.decode().then(() => e.naturalWidth)") > 0
    nb.screenshot(path.stem)
    assert nb.errors == []


def test_run_all_change_run_again(notebook):
    """The figure of notebook 01 appears, and is another one after a parameter was changed; its menus change a picture."""
    nb = notebook("01_accuracy_vs_epochs.ipynb")
    nb.edit("scale: str", 'scale: str = "smoke"')
    nb.edit("datasets: list", 'datasets: list = ["digits"]')
    saved = '"accuracy_vs_epochs", scale, frames.summary'
    last, figure = nb.cell(saved).locator(".jp-InputPrompt"), []
    for seed in (0, 7):
        nb.edit("seeds: list", f"seeds: list = [{seed}]")
        nb.menu("Edit", "Clear Outputs of All Cells")
        nb.menu("Run", "Run All Cells")
        cell = nb.cell(saved)
        cell.locator(".jp-OutputArea img").wait_for(timeout=180_000)
        figure.append(cell.locator(".jp-OutputArea img").get_attribute("src"))
        nb.finished(nb.page.locator(".jp-Notebook .jp-CodeCell").last, 180_000)
        assert nb.page.locator(".jp-OutputArea [data-mime-type='application/vnd.jupyter.error']").count() == 0
    touched = nb.cell("@figures.touch")
    touched.locator("select").last.scroll_into_view_if_needed()
    before = touched.locator("img").get_attribute("src")
    touched.locator("select").last.select_option(index=1)
    nb.page.wait_for_function("([e, was]) => e.isConnected && e.querySelector('img') && e.querySelector('img').src != was",
                              arg=[touched.element_handle(), before], timeout=60_000)  # fmt: skip
    nb.screenshot("touched")
    last.scroll_into_view_if_needed()
    nb.screenshot("changed_figure")
    assert figure[0].startswith("data:image/png") and figure[0] != figure[1]
    assert nb.errors == []


@slow
def test_the_stop_button_and_on(home, notebook):
    """Stopped in the middle, a training cell leaves a checkpoint; run again, it goes on from there and ends."""
    config = experiments.run("simsiam", "digits", "quick", batch=256, epochs=20)
    source = ['scale: str = "quick"', "from sidae_lib import experiments, runs",
              'run = experiments.run("simsiam", "digits", scale, batch=256, epochs=20)\n(record,) = runs.fetch_all([run])',
              'print(record["steps"], "steps done")']  # fmt: skip
    cells = [nbformat.v4.new_code_cell(s) for s in source]
    metadata = nbformat.read(NOTEBOOKS[0], as_version=4).metadata
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), home / "notebooks" / "stop.ipynb")
    nb = notebook("stop.ipynb")
    nb.menu("Run", "Run All Cells")
    training = nb.cell("runs.fetch_all")
    training.get_by_text(re.compile(r"simsiam\s\w{6}:\s*\d+%")).first.wait_for()  # its progress shows
    nb.screenshot("progress")
    time.sleep(2)
    nb.page.locator("[data-command='notebook:interrupt-kernel'], [data-jp-item-name='interrupt']").first.click()
    stopped = training.get_by_text("the same call goes on from there")
    stopped.first.wait_for()
    folder = home / "runs" / config.key()
    with safe_open(folder / "checkpoint.safetensors", "pt") as f:
        step = json.loads(f.metadata()["sidae"])["step"]
    assert 0 < step < 20 * 5 and not (folder / "record.json").exists()
    nb.screenshot("stopped")
    nb.menu("Run", "Run All Cells")
    nb.cell("steps done").locator(".jp-OutputArea").get_by_text("100 steps done").wait_for(timeout=120_000)
    record = json.loads((folder / "record.json").read_text())
    assert len(record["epochs"]) == 20 and not (folder / "checkpoint.safetensors").exists()
    assert nb.errors == []
