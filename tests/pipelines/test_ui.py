"""The web UI as a user sees it: the real server, a real browser, and runs by GraphQL."""

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import numpy as np
import psutil
import pytest

from colorfilter.evaluation.examples import Example
from colorfilter.evaluation.html import Section, html
from resources.artifacts import ArtifactStore
from resources.home import Home
from tests.pipelines.server import Server, serving, wait_for
from tests.program import REPOSITORY, colorfilter

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHROMIUM.exists(), reason=f"no browser at {CHROMIUM}: apt-get install chromium"
    ),
]

SCREENSHOTS = REPOSITORY / ".screenshots"
TINY = REPOSITORY / "tests" / "tiny.yaml"
GROUPS = ["corpus", "auxiliary", "scores", "filtered", "evaluated"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, browser: "Browser") -> Iterator[Server]:
    """The web UI over a home that was empty when it was started, and then filled by clicks."""
    with serving(TINY, tmp_path_factory.mktemp("ui") / "home") as server:
        page = browser.new_page(base_url=server.address)
        page.goto("/jobs")
        page.get_by_text("everything", exact=True).click()
        page.get_by_role("button", name="Materialize all").first.click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_role("button", name="All", exact=True).click()
        dialog.get_by_role("button", name="Launch backfill").click()
        wait_for("run", lambda: server.runs() or None, 90)
        page.close()  # which would be drawn again and again while the run is at work
        server.new_run_succeeds({}, 300)
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Watch:
    """What a browser context complains about, and whom it calls besides the server."""

    server: Server
    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def attach(self, context: "BrowserContext") -> None:
        context.on("console", self._console)
        context.on("weberror", lambda e: self.errors.append(str(e.error)))
        context.on("request", self._request)
        context.on("page", lambda p: p.on("websocket", lambda w: self._address(w.url)))

    def _console(self, message: "ConsoleMessage") -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def _request(self, request: "Request") -> None:
        self._address(request.url)

    def _address(self, url: str) -> None:
        own = re.compile(rf"(http|ws)://127\.0\.0\.1:{self.server.port}/|data:|blob:")
        if not own.match(url):
            self.elsewhere.append(url)


@pytest.fixture
def page(server: Server, browser: "Browser", request: pytest.FixtureRequest) -> Iterator["Page"]:
    """A fresh page; no test may leave an error in its console or call another host.

    What it shows in the end is kept in SCREENSHOTS.
    """
    context = browser.new_context(base_url=server.address, viewport={"width": 1600, "height": 1000})
    watch = Watch(server)
    watch.attach(context)
    context.set_default_timeout(30_000)
    page = context.new_page()
    yield page
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{request.node.name}.png")
    context.close()
    assert watch.errors == []
    assert watch.elsewhere == []


def see(page: "Page", text: str | re.Pattern[str]) -> None:
    """A text is to be seen on the page, within the time that a busy machine needs."""
    sync_api.expect(page.get_by_text(text).filter(visible=True).first).to_be_visible(timeout=30_000)


def sees_picture(page: "Page", name: str) -> None:
    """Open the picture that metadata of this name shows, which the browser must be able to draw."""
    page.get_by_role("row").filter(has_text=name).get_by_text("Show Markdown").first.click()
    picture = page.locator("[role=dialog] img")
    sync_api.expect(picture).to_be_visible()
    width, height = picture.evaluate("i => [i.naturalWidth, i.naturalHeight]")
    assert width >= 400
    assert height >= 200


def test_the_graph_shows_the_stages(page: "Page") -> None:
    page.goto("/asset-groups")
    for group in GROUPS:
        node = page.locator("svg foreignObject").get_by_text(group, exact=True)
        sync_api.expect(node).to_be_visible(timeout=30_000)


def test_what_the_command_line_runs_is_seen(page: "Page", server: Server) -> None:
    """It finds everything standing that the web UI's run has made."""
    known, kernels = server.runs(), Home(server.home).kernel_runs.read_text()
    done = colorfilter("run", "--recipe", str(TINY), "--home", str(server.home))
    assert done.returncode == 0, done.stdout + done.stderr
    assert Home(server.home).kernel_runs.read_text() == kernels
    run = server.new_run_succeeds(known, 10)
    assert run["jobName"] == "everything"
    page.goto(f"/runs/{run['runId']}")
    for fact in ("everything", "Success", "reference__report"):
        see(page, fact)


def test_score_tables_show_what_they_are_and_how_color_is_distributed(
    page: "Page", server: Server
) -> None:
    page.goto("/assets/score_tables")
    see(page, "The losses joined with sequences, spans and documents")
    for key in ("documents", "spans", "sequences", "losses", "fingerprint"):
        sync_api.expect(page.get_by_role("cell", name=key, exact=True)).to_be_visible()
    see(page, str(server.home / "scores.duckdb"))
    for fact in ("Latest materialization", "pretraining-data", "DuckDB"):
        see(page, fact)
    sees_picture(page, "color of the corpus for reference")


def test_a_target_model_shows_its_learning_curve(page: "Page") -> None:
    page.goto("/assets/reference/color_tau8/target_model")
    see(page, "one new model per seed")
    sees_picture(page, "learning curve")


def test_the_report_compares_the_arms(page: "Page") -> None:
    page.goto("/assets/reference/report")
    for fact in ("color_tau8", "random", "loss by seed", "report.html"):
        see(page, fact)


def test_the_report_opens_offline(server: Server, browser: "Browser") -> None:
    """From the disk, in a browser that can reach nothing, by day and by night."""
    folder = ArtifactStore(home=str(server.home)).current("reference/report").path
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme, offline=True)
        complaints: list[str] = []
        asked: list[str] = []
        context.on("console", lambda message, to=complaints: to.append(message.text))
        context.on("request", lambda request, to=asked: to.append(request.url))
        page = context.new_page()
        page.goto((folder / "report.html").as_uri())
        sync_api.expect(page.get_by_role("cell", name="color_tau8", exact=True)).not_to_have_count(
            0
        )
        pictures = page.evaluate("[...document.images].map(i => [i.currentSrc, i.naturalWidth])")
        assert len(pictures) == 3
        assert all(source.startswith("data:") and width > 100 for source, width in pictures)
        assert [url for url in asked if not url.startswith("data:")] == [page.url]
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 29)"}[scheme]
        colour = "getComputedStyle(document.querySelector('div.tokens .lower8')).backgroundColor"
        assert page.evaluate(colour) == "rgba(37, 99, 235, 0.8)"
        assert complaints == []
        context.close()


def test_the_report_shows_untrusted_text_as_it_is(browser: "Browser", tmp_path: Path) -> None:
    texts = ["<script>document.title = 'run'</script>", "\r\n", "\t<b>", " & \u202e\u65e5", "&lt;"]
    losses = np.ones(len(texts), dtype=np.float32)
    example = Example("best", "a", 0, -1.0, [], texts, losses, losses)
    written = html("books", [Section("What was selected", "", examples=[example])])
    (tmp_path / "report.html").write_text(written, encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("document.querySelector('div.tokens').textContent") == "".join(texts)
    assert page.title() == "books"
    page.close()


def test_every_shard_is_a_partition_that_stands(page: "Page", server: Server) -> None:
    shards = [shard.name for shard in ArtifactStore(home=str(server.home)).at.shards()]
    page.goto("/assets/raw_corpus?view=partitions")
    for shard in (*shards, "_probe_reference"):
        see(page, shard)
    see(page, f"Materialized ({len(shards) + 1})")


def test_the_checks_are_seen_to_have_passed(page: "Page") -> None:
    page.goto("/assets/score_tables?view=checks")
    for fact in ("reference_below_corpus", "scores_complete", "mean color", "Passed"):
        see(page, fact)


def test_an_asset_is_materialized_by_a_click(page: "Page", server: Server) -> None:
    known = server.runs()
    page.goto("/assets/reference/report")
    page.get_by_role("button", name="Materialize").first.click()
    run = server.new_run_succeeds(known, 60)
    assert run["assetSelection"] == [{"path": ["reference", "report"]}]
    reused = page.get_by_role("cell", name="reused", exact=True)
    row = page.get_by_role("row").filter(has=reused)
    sync_api.expect(row.get_by_role("cell").last).to_have_text("1", timeout=30_000)


def test_all_shards_are_materialized_in_one_run_and_a_lost_one_is_made_again(
    page: "Page", server: Server
) -> None:
    """The run is a process that the server started, and starts processes that read the shards."""
    artifacts = ArtifactStore(home=str(server.home))
    first = artifacts.at.shards()[0].name
    lost = artifacts.current("raw_corpus", first)
    shutil.rmtree(lost.path)
    known = server.runs()
    page.goto("/assets/raw_corpus")
    page.get_by_role("button", name="Materialize").first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="All", exact=True).click()
    dialog.get_by_role("button", name="Launch backfill").click()
    run = server.new_run_succeeds(known, 120)  # the daemon looks for backfills every 30 s
    assert run["assetSelection"] == [{"path": ["raw_corpus"]}]
    again = artifacts.current("raw_corpus", first)
    assert (again.path, again.fingerprint) == (lost.path, lost.fingerprint)


def test_the_sensors_are_on_and_the_schedule_is_switched_on_by_a_click(
    page: "Page", server: Server
) -> None:
    page.goto("/automation")
    for name in ("arrivals", "refresh", "cut_off_runs"):
        see(page, name)
    switches = page.locator("label[class*=Switch]")  # they stand in order of name
    for place, on in enumerate((True, True, False)):
        sync_api.expect(switches.nth(place).locator("input")).to_be_checked(checked=on)
    switches.last.click()
    sync_api.expect(switches.last.locator("input")).to_be_checked()
    wait_for("tick", lambda: server.ticks("arrivals") or None, 60)


def test_another_tau_is_selected_from_the_launchpad(page: "Page", server: Server) -> None:
    known, kernels = server.runs(), Home(server.home).kernel_runs.read_text()
    page.goto("/jobs")
    page.get_by_text("select", exact=True).click()
    page.get_by_role("tab", name="Launchpad").click()
    editor = page.locator(".CodeMirror").first
    editor.click()
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.insert_text("ops: {select_once: {config: {domain: reference, tau: 5}}}")
    page.get_by_role("button", name="Launch Run").click()
    run = server.new_run_succeeds(known, 60)
    assert run["jobName"] == "select"
    assert Home(server.home).kernel_runs.read_text() == kernels
    with duckdb.connect(str(Home(server.home).selections), read_only=True) as selected:
        versions = "SELECT arm FROM selection_versions WHERE current ORDER BY arm"
        assert ("color_tau5",) in selected.execute(versions).fetchall()
    page.goto(f"/runs/{run['runId']}")
    see(page, re.compile("arm color_tau5, selected .* overlap"))
    stored = (Home(server.home).dagster / "storage").rglob("*")
    assert all("compute_logs" in file.parts for file in stored if file.is_file())  # no pickles


def test_only_this_machine_can_reach_the_server(server: Server) -> None:
    listening = set()
    for process in server.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    listening.add((connection.laddr.ip, connection.laddr.port))
    assert ("127.0.0.1", server.port) in listening
    assert all(ip_address(ip).is_loopback for ip, _ in listening)
