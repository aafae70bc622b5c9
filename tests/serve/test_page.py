"""The page of ``zinit chat --web``: its routes, what a browser lets it do, and the page itself in Chromium."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.test_http import call, listening
from tests.serve.world import ask, folders, limits, models, png
from zinit.errors import ConfigError
from zinit.serve import command
from zinit.serve.engine import Engine
from zinit.serve.http import make_app
from zinit.serve.page import Page, add_page

CHROMIUM = shutil.which("chromium")
SAMPLING = {"temperature": 0, "top_p": 0.75, "max_tokens": 12, "system": "", "seed": 0}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine(models(), limits()).start()
    made.load("adapted", str(folders()["eyes"]))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def app(engine: Engine) -> Any:
    gates = engine._models.get("adapted").gates
    made = make_app(engine, hosts=frozenset({"localhost", "127.0.0.1"}))
    add_page(made, Page(title="eyes <b>", about="tiny", sees=True, most=400, gates=gates, sampling=SAMPLING))
    return made


def test_the_page_is_whole_and_may_do_little(app: Any, engine: Engine) -> None:
    sent: dict[str, str] = {}
    status, body = call(app, "GET", "/", seen=sent)
    page = body.decode()
    assert (status, sent["content-type"]) == (200, "text/html; charset=utf-8")
    rules = dict(rule.split(" ", 1) for rule in sent["content-security-policy"].split("; "))
    assert rules["default-src"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert (rules["connect-src"], rules["img-src"]) == ("'self'", "data:")
    assert "unsafe" not in str(rules)
    assert re.fullmatch("'sha256-[A-Za-z0-9+/=]{44}'", rules["script-src"])
    assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacent|document\.write|\bon[a-z]+=| src=", page)
    assert call(app, "GET", "/", host="evil.example")[0] == 421
    assert call(make_app(engine), "GET", "/")[0] == 404, "zinit serve has no page"


def test_the_page_learns_gates_and_settings(app: Any, engine: Engine) -> None:
    status, body = call(app, "GET", "/page/facts")
    facts = json.loads(body)
    handle: Any = engine._models.get("adapted").handle
    assert status == 200
    assert {each["name"]: each["values"] for each in facts["gates"]} == {
        k: g.tolist() for k, g in handle.gates().items()
    }
    assert (facts["title"], facts["sees"], facts["sampling"]) == ("eyes <b>", True, SAMPLING)
    gate = next(iter(handle.prefixes.values())).gate
    before = gate.detach().clone()
    gate.data.fill_(float("nan"))
    try:
        assert None in json.loads(call(app, "GET", "/page/facts")[1])["gates"][0]["values"]
    finally:
        gate.data.copy_(before)


def test_the_command_serves_a_run_beside_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    served: dict[str, Any] = {}
    monkeypatch.setattr(command, "listen", lambda engine, listener, **more: served.update(more, engine=engine))
    command.serve_page(str(folders()["anna"]), **SAMPLING)
    made: Engine = served["engine"]
    assert served["hosts"] == command.LOOPBACK_NAMES
    assert [info.id for info in made.models()] == ["base", "adapted"]
    page: Page = served["page"]
    assert (page.title, page.sees, page.sampling["max_tokens"]) == ("anna", False, 12)
    answers = {ask(made, name, "Say red.").wait()[0].answer for name in ("base", "adapted")}
    made.stop()
    assert len(answers) == 2


def test_the_page_takes_no_options_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from zinit.cli import chat

    monkeypatch.setattr("zinit.cli.serve_page", lambda *_, **__: None)
    with pytest.raises(ConfigError, match=r"--image, --frozen is for the terminal: .*Leave it out"):
        chat(str(folders()["anna"]), image=["x.png"], frozen=True, web=True)


def test_the_page_starts_with_what_its_server_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    from zinit.cli import chat

    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("zinit.cli.serve_page", lambda _, **sampling: shown.append(sampling))
    run = str(folders()["anna"])
    for wrong, says in (
        ({"temperature": 3.0}, "--temperature is 3.0, and .* takes a value that is less than or equal to 2"),
        ({"temperature": float("nan")}, "--temperature is nan, and .* takes a value that is a finite number"),
        ({"top_p": 0.0}, "--top-p is 0.0, and .* takes a value that is greater than 0"),
        ({"seed": -1}, "--seed is -1, and .* takes a value that is greater than or equal to 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0, and .* takes a value that is greater than or equal to 1"),
    ):
        with pytest.raises(ConfigError, match=says):
            chat(run, web=True, **wrong)  # pyright: ignore[reportArgumentType]
    assert not shown
    chat(run, web=True, temperature=2.0, top_p=1.0, seed=2**63 - 1)
    assert shown == [{"system": "", "temperature": 2.0, "top_p": 1.0, "max_tokens": 256, "seed": 2**63 - 1}]


@pytest.mark.integration
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
def test_a_browser_shows_both_answers(app: Any, engine: Engine, tmp_path: Path) -> None:
    browsers = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")

    for colour in itertools.product((0, 250), repeat=3):
        (expected,) = ask(engine, "adapted", "Name it", images=[png(colour)], max_tokens=12).wait()
        if expected.answer:
            (tmp_path / "image.png").write_bytes(png(colour))
            break
    (plain,) = ask(engine, "base", "Name it", max_tokens=12).wait()
    said: list[str] = []
    with listening(app) as address, browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme, width in itertools.product(("light", "dark"), (1400, 420)):
            tab = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.goto(address)
            tab.wait_for_selector("#heat td", state="attached")
            assert tab.text_content("#title") == "eyes <b>"
            assert tab.locator("#heat tr").count() == 3
            tab.set_input_files("#file", str(tmp_path / "image.png"))
            tab.wait_for_selector("#shown img")
            tab.fill("#question", "Name it")
            tab.press("#question", "Enter")
            tab.wait_for_selector("#send:visible")
            tab.wait_for_selector("#stop", state="hidden")
            answers = {side: tab.text_content(f".{side} .text").strip() for side in ("adapted", "base")}
            assert answers == {"adapted": expected.answer, "base": plain.answer}
            boxes = [tab.locator(f".{side}").bounding_box() for side in ("adapted", "base")]
            assert (boxes[0]["y"] == boxes[1]["y"]) == (width == 1400), "side by side where there is room"
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            tab.screenshot(path=tmp_path / f"{scheme}.png")
        browser.close()
    assert not said
