"""The web page of `cfg-parallel serve`, in a real browser."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from cfg_parallel.demo import NEGATIVE_PROMPT, PROMPT, demo_photo
from helpers_demo import demo_model

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_QUIET = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync"""
_SCREENSHOT = os.environ.get("CFG_PARALLEL_SCREENSHOT")
# For the documentation enough work that a second device is worth it.
_SIDE, _STEPS = (512, 20) if _SCREENSHOT else (64, 4)
_WAIT_MS = 120_000

pytestmark = [
    pytest.mark.skipif(_CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.timeout(240),
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a server on two CPU processes."""
    command = [sys.executable, "-m", "cfg_parallel.cli", "serve", str(demo_model()), "--port", "0"]
    command += ["--devices", "cpu,cpu", "--served-model-name", "demo"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    try:
        told = (re.search(r"demo is ready at (http://\S+)", line) for line in server.stdout)
        found = next(filter(None, told), None)
        assert found is not None, f"the server ended with {server.wait()}"
        # Nobody may leave the pipe full.
        threading.Thread(target=server.stdout.read, daemon=True).start()
        yield found[1]
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=_CHROMIUM, args=_QUIET.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """With the model known, so that the button can be pressed."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.problems = []
    page.on("console", lambda said: page.problems.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.hosts = set()
    page.on("request", lambda request: page.hosts.add(urlsplit(request.url).netloc))
    page.goto(address)
    expect(_button(page, "Edit")).to_be_enabled(timeout=_WAIT_MS)
    yield page
    context.close()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.open(demo_photo()).convert("RGB").resize((256, 256)).save(path)
    return path


def _button(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def _fill(page: Any, photo: Path, steps: int) -> None:
    page.locator("#image").set_input_files(photo)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Negative prompt").fill(NEGATIVE_PROMPT)
    page.get_by_label("Steps").fill(str(steps))
    page.get_by_label("Size").fill(f"{_SIDE}x{_SIDE}")
    page.get_by_label("Seed").fill("3")


def _record(page: Any, name: str) -> None:
    """Every text of the element, in window.told."""
    page.evaluate(
        """(name) => {
            window.told = [];
            const shown = document.getElementById(name);
            new MutationObserver(() => window.told.push(shown.textContent)).observe(shown, {childList: true});
        }""",
        name,
    )


def _health(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{address}/health", timeout=10) as answer:
        health: dict[str, Any] = json.load(answer)
    return health


def _comes(what: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if what():
            return True
        time.sleep(0.1)
    return False


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def _edit(address: str, photo: Path, steps: int = _STEPS, stream: bool = False) -> Any:
    """As the page asks, from OpenAI's client."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    return client.images.edit(
        model="demo",
        image=photo,
        prompt=PROMPT,
        size=f"{_SIDE}x{_SIDE}",
        stream=stream,
        extra_body={"negative_prompt": NEGATIVE_PROMPT, "seed": 3, "num_inference_steps": steps},
    )


def test_edit(page: Any, address: str, photo: Path, tmp_path: Path) -> None:
    _fill(page, photo, _STEPS)
    page.get_by_label("Compare with one device").check()
    _record(page, "now")
    _button(page, "Edit").click()
    expect(_button(page, "Edit")).to_be_disabled()
    expect(_button(page, "Stop")).to_be_enabled()
    expect(page.get_by_role("link", name="Download")).to_be_visible(timeout=_WAIT_MS)

    told = page.evaluate("window.told")
    steps = [f"step {step} of {_STEPS}" for step in range(1, _STEPS + 1)]
    assert [text for text in told if text in steps] == steps
    assert f"on one device, to compare: {steps[-1]}" in told

    for name in ("Original: photo.png", "Result"):
        assert page.get_by_role("img", name=name, exact=True).is_visible()
    picture = page.get_by_role("img", name="Result", exact=True)
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == _SIDE
    assert picture.evaluate("image => !image.classList.contains('partial')")

    facts = dict(zip(page.locator("dt").all_text_contents(), page.locator("dd").all_text_contents(), strict=True))
    assert re.match(rf"\d+\.\d\d s, \d+\.\d\d s of it for {_STEPS} steps, on cpu and cpu$", facts["Time"])
    assert facts["Guidance"].startswith("in parallel: ")
    assert re.match(r"\d+\.\d\d s; \d+\.\d\d times as fast on 2 devices$", facts["One device"])
    assert facts["Pictures"] == "equal, bit for bit"

    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "cfg-parallel-3.png"
    got = Path(download.value.path()).read_bytes()
    (expected,) = _edit(address, photo).data
    np.testing.assert_array_equal(_pixels(got), _pixels(base64.b64decode(expected.b64_json)))

    expect(page.get_by_role("alert")).to_have_text("")
    assert page.problems == []
    assert page.hosts <= {urlsplit(address).netloc, ""}  # blob: and data: have no host
    page.mouse.move(0, 0)
    expect(page.locator("#health")).to_contain_text("0 running", timeout=_WAIT_MS)
    page.screenshot(path=tmp_path / "page.png")
    if _SCREENSHOT:
        shutil.copy(tmp_path / "page.png", _SCREENSHOT)


def test_an_error_is_shown_and_the_next_try_works(page: Any, photo: Path, tmp_path: Path) -> None:
    _fill(page, photo, 100_000)
    _button(page, "Edit").click()
    expect(page.get_by_role("alert")).to_contain_text("num_inference_steps: at most 200 steps, but got 100000.")

    broken = tmp_path / "text.png"
    broken.write_text("not a picture")
    _fill(page, broken, 2)
    _button(page, "Edit").click()
    expect(page.get_by_role("alert")).to_contain_text("image: expected a picture (PNG,")

    _fill(page, photo, 4)
    _record(page, "caption")
    _button(page, "Edit").click()
    expect(page.get_by_role("link", name="Download")).to_be_visible(timeout=_WAIT_MS)
    assert page.evaluate("window.told") == ["Result", "On its way", "On its way", "Result, seed 3"]
    expect(page.get_by_role("alert")).to_have_text("")


def test_a_photo_is_dropped(page: Any, photo: Path) -> None:
    box = page.locator("#drop").bounding_box()
    data = {"items": [], "files": [str(photo)], "dragOperationsMask": 1}
    at = {"x": box["x"] + 20, "y": box["y"] + 20, "data": data}
    devtools = page.context.new_cdp_session(page)
    for event in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": event, **at})
    expect(page.get_by_role("img", name="Original: photo.png")).to_be_visible()
    _button(page, "Remove").click()
    expect(page.get_by_text("Choose a photo")).to_be_visible()


def test_what_others_answer_is_shown(page: Any, photo: Path) -> None:
    """A full queue, and a key that is needed."""
    _fill(page, photo, 2)
    edits = "**/v1/images/edits"
    page.route(edits, lambda route: route.fulfill(status=429, headers={"Retry-After": "7"}, json={}))
    _button(page, "Edit").click()
    expect(page.get_by_role("alert")).to_have_text("Busy, try again in 7 s.")
    page.unroute(edits)

    def needs_key(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer secret":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "The API key is missing or wrong."}})

    key = page.get_by_label("API key")
    page.route("**/v1/**", needs_key)
    expect(key).to_be_hidden()
    page.reload()
    expect(page.get_by_role("alert")).to_have_text("The API key is missing or wrong.")
    key.fill("secret")
    key.press("Enter")
    expect(_button(page, "Edit")).to_be_enabled()
    expect(page.get_by_role("alert")).to_have_text("")
    _fill(page, photo, 2)
    _button(page, "Edit").click()
    expect(page.get_by_role("link", name="Download")).to_be_visible(timeout=_WAIT_MS)


@pytest.mark.parametrize("takes_image", [False, True])
def test_it_asks_for_what_the_pipeline_takes(page: Any, photo: Path, takes_image: bool) -> None:
    facts = {"pipeline": "OtherPipeline", "takes_image": takes_image, "needs_image": False, "several_images": False}
    facts |= {"takes_negative_prompt": False, "scales": ["guidance_scale"], "partial_images": False}
    sent: list[tuple[str, Any]] = []

    def note(route: Any) -> None:
        sent.append((urlsplit(route.request.url).path, route.request))
        route.fulfill(
            content_type="text/event-stream", body='data: {"type": "error", "error": {"message": "<b>no"}}\n\n'
        )

    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "other", "pipeline": facts}]}))
    page.route("**/v1/images/*", note)
    page.reload()
    expect(_button(page, "Generate")).to_be_enabled()
    expect(page.locator("#original")).to_be_visible(visible=takes_image)
    expect(page.get_by_label("Negative prompt")).to_be_hidden()
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Guidance scale").fill("3.5")
    _button(page, "Generate").click()
    expect(page.get_by_role("alert")).to_have_text("<b>no")
    path, request = sent.pop()
    assert path == "/v1/images/generations"
    assert request.post_data_json == {"prompt": PROMPT, "guidance_scale": "3.5", "stream": "true"}
    if takes_image:
        page.locator("#image").set_input_files(photo)
        _button(page, "Edit").click()
        expect(_button(page, "Edit")).to_be_enabled()
        assert sent.pop()[0] == "/v1/images/edits"
        _button(page, "Remove").click()
        expect(_button(page, "Generate")).to_be_visible()


def test_stop_ends_the_generation(page: Any, address: str, photo: Path) -> None:
    _fill(page, photo, 150)
    _button(page, "Edit").click()
    expect(page.locator("#now")).to_have_text(re.compile(r"step \d+ of 150"), timeout=_WAIT_MS)
    assert _health(address)["running"] == 1
    _button(page, "Stop").click()
    expect(page.locator("#now")).to_have_text("Stopped.")
    expect(_button(page, "Edit")).to_be_enabled()
    assert _comes(lambda: _health(address)["running"] == 0, 10)
    assert page.problems == []


def test_it_waits_in_the_queue(page: Any, address: str, photo: Path) -> None:
    with contextlib.closing(_edit(address, photo, steps=150, stream=True)):
        assert _comes(lambda: _health(address)["running"] == 1, 30)
        _fill(page, photo, 2)
        _button(page, "Edit").click()
        expect(page.locator("#now")).to_have_text("waiting in the queue", timeout=30_000)
        _button(page, "Stop").click()
        assert _comes(lambda: _health(address)["waiting"] == 0, 10)
    assert _comes(lambda: _health(address)["running"] == 0, 10)
