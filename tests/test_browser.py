"""What a person sees: notebooks run in JupyterLab and the reproduction's index page, in headless Chromium."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from test_card import ODD, full

import frlkit
from frlkit.report import card, claims, pages

NOTEBOOKS = frlkit.PROJECT / "notebooks"
THEORY, COMBINED, OWN = (next(NOTEBOOKS.glob(f"{number}_*.ipynb")) for number in ("02", "05", "06"))
MINUTE = 60_000  # milliseconds, as Playwright counts
ERRORS = '[data-mime-type="application/vnd.jupyter.stderr"]'  # how JupyterLab shows exceptions, and stderr
# Whether every code cell has its number, or one has failed (those after it then wait no longer).
ENDED = """errors => {
    const prompts = [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")].map(p => p.innerText.trim());
    const failed = document.querySelector(errors) !== null && !prompts.includes("[*]:");
    return failed || (prompts.length > 0 && prompts.every(text => /^\\[\\d+\\]:$/.test(text)));
}"""
# The sources of those pictures that have no pixels.
BROKEN = "images => images.filter(image => !(image.complete && image.naturalWidth > 0)).map(image => image.src)"


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: its address with the token, and the folder it shows."""

    address: str
    token: str
    folder: Path

    def page_of(self, name: str) -> str:
        """A notebook in a workspace of its own, so that no other test's notebooks are opened again with it."""
        return f"{self.address}lab/workspaces/{Path(name).stem}/tree/{name}?token={self.token}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"], timeout=3 * MINUTE)
        except sync_api.Error as error:
            pytest.skip(f"{chromium} does not start here: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser: Any) -> Iterator[Any]:
    """One for all pages: JupyterLab's scripts, megabytes of them, stay in its cache."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    context.set_default_timeout(5 * MINUTE)
    yield context
    context.close()


@pytest.fixture
def page(context: Any) -> Iterator[Any]:
    page = context.new_page()
    yield page
    page.close()


@pytest.fixture(scope="module")
def lab(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab on a free port of the loopback interface, with settings of its own; it and its kernels end here."""
    place = tmp_path_factory.mktemp("lab")
    folder, token = place / "work", secrets.token_hex(16)
    settings = place / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    page_config = place / "config" / "labconfig" / "page_config.json"
    contents = {
        settings: {"windowingMode": "none"},  # all cells are on the page, not only those in view
        page_config: {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}},  # asks the network
    }
    for file, content in contents.items():
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content), encoding="utf-8")
    folder.mkdir()
    kinds = {"CONFIG_DIR": "config", "DATA_DIR": "data", "RUNTIME_DIR": "runtime"}
    environment = {
        **os.environ,
        **{f"JUPYTER_{name}": str(place / where) for name, where in kinds.items()},
        "JUPYTERLAB_SETTINGS_DIR": str(place / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(place / "workspaces"),
        "IPYTHONDIR": str(place / "ipython"),
        "JUPYTER_PLATFORM_DIRS": "1",
        "PYTHONPATH": str(frlkit.PROJECT),
        "OMP_NUM_THREADS": "1",
    }
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0"]
    options += [f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={token}"]
    log = place / "log.txt"
    with log.open("w") as file:
        words = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(words, cwd=place, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline, info = time.monotonic() + 300, place / "runtime" / f"jpserver-{server.pid}.json"
        while not info.exists() or not info.read_text(encoding="utf-8").rstrip().endswith("}"):
            assert server.poll() is None, log.read_text(encoding="utf-8")[-3000:]
            assert time.monotonic() < deadline, log.read_text(encoding="utf-8")[-3000:]
            time.sleep(0.1)
        yield Lab(json.loads(info.read_text(encoding="utf-8"))["url"], token, folder)
    finally:
        family = [server]
        if server.poll() is None:
            family += psutil.Process(server.pid).children(recursive=True)  # kernels lead sessions of their own
        for process in family:
            process.kill()
        server.wait(timeout=60)


def prepare(source: Path, target: Path, *words: str) -> int:
    """Copy a notebook with parameters injected and no outputs; returns its number of code cells."""
    papermill = [sys.executable, "-m", "papermill", str(source), str(target), "--prepare-only", *words]
    done = subprocess.run(papermill, cwd=target.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    notebook = nbformat.read(target, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, target)
    return len(code)


def run_all(page: Any, lab: Lab, name: str) -> None:
    """Open a notebook, choose Run > Run All Cells and wait until every cell ran, or one failed."""
    page.goto(lab.page_of(name))
    # Its kernel is connected: to run earlier starts a second one, and the change of kernels drops the cells that wait.
    page.locator("#jp-main-statusbar").get_by_text(re.compile(r"^(?!No Kernel).+ \| Idle$")).wait_for()
    page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
    page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
    page.wait_for_function(ENDED, arg=ERRORS, polling=500, timeout=25 * MINUTE)  # not at every frame


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (THEORY, ["-p", "FIGURES", "figures"]),  # its defaults, except that the project's figures stay as they are
        (COMBINED, ["-f", str(NOTEBOOKS / "profiles" / "smoke.yaml")]),
        (OWN, ["-f", str(NOTEBOOKS / "profiles" / "smoke.yaml")]),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else "",
)
def test_run_all_in_jupyterlab(source: Path, words: list[str], page: Any, lab: Lab, smoke_runs: Path) -> None:
    own = [] if source == THEORY else ["-p", "RUNS", str(smoke_runs)]  # what it trains is tests/test_notebooks.py's
    count = prepare(source, lab.folder / source.name, *words, *own)
    run_all(page, lab, source.name)
    assert page.locator(ERRORS).all_inner_texts() == []
    assert page.locator(".jp-CodeCell").count() == count
    assert page.locator(".jp-CodeCell .jp-InputPrompt").last.inner_text().strip() == f"[{count}]:"
    table = page.locator(".jp-CodeCell .jp-OutputArea-output table").last
    table.scroll_into_view_if_needed()
    assert table.is_visible()
    assert table.locator("th").all_inner_texts() == ["verdict", "claim", "evidence"]
    committed = claims.from_notebook(nbformat.read(source, as_version=4).cells)[0]["claims"]
    verdicts = table.locator("tbody tr td:first-child").all_inner_texts()
    assert len(verdicts) == len(committed)
    assert all(said.startswith(claims.VERDICTS) for said in verdicts)
    figures = page.locator(".jp-OutputArea-output img")
    assert figures.count() >= len(list(lab.folder.rglob(f"{source.name[:2]}_*.png"))) > 0
    assert figures.evaluate_all(BROKEN) == []


def test_an_error_on_the_page_is_seen(page: Any, lab: Lab) -> None:
    """The test above can fail: a parameter that the notebook refuses."""
    prepare(THEORY, lab.folder / "refused.ipynb", "-p", "SAMPLES", "none")
    run_all(page, lab, "refused.ipynb")
    (error,) = page.locator(ERRORS).all_inner_texts()
    assert "ParameterError: parameter SAMPLES = 'none' is not allowed" in error


def notes_of(sources: list[Path], output: Path) -> dict[str, Any]:
    """What a reproduction notes of the committed notebooks, and their figures where it puts them."""
    notes = {}
    for source in sources:
        cells = nbformat.read(source, as_version=4).cells
        notes[source.stem] = {**pages.about(cells), "took": "38 s", "live": True}
        (output / source.stem / "figures").mkdir(parents=True)
        for file in (frlkit.PROJECT / "figures").glob(f"{source.name[:2]}_*fashion_mnist.png"):
            shutil.copyfile(file, output / source.stem / "figures" / file.name)
    return notes


def test_index_shows_every_figure_and_claim(page: Any, tmp_path: Path) -> None:
    sources = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    notes = notes_of(sources, tmp_path)
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "figures").mkdir()
    (tmp_path / "another" / "figures" / "stranger.png").touch()  # of another run
    pages.index(notes, ["06_next"], tmp_path, "fashion_mnist", "torch 1")
    page.goto((tmp_path / "index.html").as_uri(), wait_until="load")
    figures = {file.stem for source in sources for file in (tmp_path / source.stem / "figures").iterdir()}
    assert {image.get_attribute("alt") for image in page.locator("img").all()} == figures
    assert len(figures) >= 7
    assert page.locator("img").evaluate_all(BROKEN) == []
    tables = [table for note in notes.values() for table in note["tables"]]
    assert page.locator("h2").count() == page.locator("table").count() == len(tables) == len(sources)
    assert page.locator("tr:has(td)").count() == sum(len(table["claims"]) for table in tables)
    assert page.locator("thead").first.locator("th").all_inner_texts() == ["verdict", "claim", "evidence"]
    assert page.locator("nav a").all_inner_texts() == [note["title"] for note in notes.values()]
    assert page.locator("nav li").last.inner_text() == "06_next (not run yet)"
    found = [row["verdict"] for table in tables for row in table["claims"]]
    counts = [f"{found.count(verdict)} {verdict}" for verdict in claims.VERDICTS if verdict in found]
    assert page.locator(".counts li").all_inner_texts() == counts


def test_index_by_day_and_by_night_on_a_desk_and_on_a_phone(browser: Any, tmp_path: Path) -> None:
    rows = [{"verdict": verdict, "claim": "c" * 60, "evidence": "e " * 90} for verdict in claims.VERDICTS]
    note = {
        "title": "T",
        "tables": [{"title": "t", "claims": rows}],
        "date": "",
        "commit": "",
        "took": "",
        "live": False,
    }
    pages.index({"01": note}, [], tmp_path, "digits", "torch 1")
    style = "node => [getComputedStyle(node).color, getComputedStyle(document.body).backgroundColor]"
    seen: dict[str, list[tuple[str, str]]] = {}
    for scheme, width in (("light", 1300), ("dark", 390)):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = context.new_page()
        asked: list[str] = []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto((tmp_path / "index.html").as_uri(), wait_until="load")
        assert asked == [(tmp_path / "index.html").as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        badges = page.locator("td.verdict b")
        seen[scheme] = [tuple(badge.evaluate(style)) for badge in badges.all()]
        assert len({colour for colour, _ in seen[scheme]}) >= 4
        for words in seen[scheme]:  # WCAG's contrast of text, AA
            light, dark = sorted((luminance(colour) for colour in words), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5
        context.close()
    assert luminance(seen["dark"][0][1]) < 0.1 < 0.9 < luminance(seen["light"][0][1])


@pytest.mark.parametrize("count", [1, 3])
def test_report_card_by_day_and_by_night_on_a_desk_and_on_a_phone(count: int, browser: Any, tmp_path: Path) -> None:
    """One audit, with odd names, or three side by side; nothing is fetched, and pictures follow the scheme."""
    titles = ("before", "control", "a" * 60)
    audits = [full(class_names=[*ODD, "8", "9", "10"], title=title) for title in titles[:count]]
    address = card.write(audits, tmp_path).as_uri()
    for scheme, width in (("light", 1300), ("dark", 390)):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = context.new_page()
        asked: list[str] = []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(address, wait_until="load")
        page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
        assert [url for url in asked if not url.startswith("data:")] == [address]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("img").count() == 5 * count + (count > 1)
        assert page.locator("img").evaluate_all(BROKEN) == []
        dark = "image => image.currentSrc === image.parentElement.querySelector('source').srcset"
        assert page.locator("img").first.evaluate(dark) is (scheme == "dark")
        assert page.locator("script").count() == 0
        assert "bad" not in page.title()
        shown = page.locator("table.classes").first.locator("td:first-child bdi").all_text_contents()
        assert sorted(shown) == sorted(" ".join(name.split()) or "(no name)" for name in (*ODD, "8", "9", "10"))
        style = "node => [getComputedStyle(node).color, getComputedStyle(document.body).backgroundColor]"
        for words in (page.locator(part).first.evaluate(style) for part in (".lead", ".faint", "figcaption", "th")):
            low, high = sorted(map(luminance, words))
            assert (high + 0.05) / (low + 0.05) >= 4.5
        context.close()


def luminance(colour: str) -> float:
    """WCAG's relative luminance, in [0, 1], of a colour as browsers print it: "rgb(17, 112, 58)"."""
    parts = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_index_shows_any_name_as_it_is(page: Any, tmp_path: Path) -> None:
    name = "$x_1$ \"q\" 'a' <b onclick=x>&amp; \u202e\u05d0\u05d1 </td></table>\n%2e#?"
    name += "<script>document.title = 'bad'</script>"
    folder = "01_a b#c%2e'\"&"
    (tmp_path / folder / "figures").mkdir(parents=True)
    source = next((frlkit.PROJECT / "figures").glob("02_*.png"))
    shutil.copyfile(source, tmp_path / folder / "figures" / "01_$a$ #1%.png")
    row = {"verdict": "confirmed", "claim": name, "evidence": name}
    note = {"title": name, "tables": [{"title": name, "claims": [row]}], "date": name, "commit": "", "took": ""}
    pages.index({folder: {**note, "live": True}}, [name], tmp_path, name, name)
    page.goto((tmp_path / "index.html").as_uri(), wait_until="load")
    assert "bad" not in page.title().split("(")[0]
    assert page.locator("script, td b[onclick]").count() == 0
    assert page.locator("td").all_text_contents()[1:] == [name, name]
    assert page.locator("img").evaluate_all(BROKEN) == []
    for link in page.locator("section p a").all():
        assert re.fullmatch(
            r".*/01_a%20b%23c%252e%27%22%26/01_a%20b%23c%252e%27%22%26\.(html|ipynb)", link.evaluate("a => a.href")
        )
    page.locator("nav a").click()
    assert page.locator("section:target").get_attribute("id") == folder


def test_a_figure_that_is_missing_is_seen(page: Any, tmp_path: Path) -> None:
    """The test above can fail: a picture without a file."""
    (tmp_path / "index.html").write_text('<!doctype html><img src="absent.png" alt="absent">', encoding="utf-8")
    page.goto((tmp_path / "index.html").as_uri(), wait_until="load")
    assert [Path(source).name for source in page.locator("img").evaluate_all(BROKEN)] == ["absent.png"]
