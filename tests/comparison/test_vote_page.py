"""The page to vote on, driven in a real browser: Chromium or Chrome, where the machine has one."""

import json
import re

import pytest
from playwright.sync_api import Browser, Page, expect

from comparison.files import Comparison, write_comparison
from comparison.generation import Answer
from comparison.verdicts import Verdicts
from metrics.intervals import Estimate

EVIL = '<script>document.title = "hacked"</script><img src=x onerror="document.title = \'hacked\'"> & </article>'
NAMES = ["base", "sft", "dpo"]  # not in alphabetical order, as a page that sorts them would show


def comparison(questions: int = 3, names: list[str] = NAMES) -> Comparison:
    texts = {name: [f"{name} says {number}" for number in range(questions)] for name in names}
    texts[names[0]][0] = EVIL
    return Comparison(
        sources={name: f"/models/{name}" for name in names},
        questions=[[{"role": "user", "content": f"Question {number}? {EVIL}"}] for number in range(questions)],
        preferred=["The preferred answer.", *[None] * (questions - 1)],
        answers={name: [Answer(text, 3, True) for text in of] for name, of in texts.items()},
        figures={name: {"preference_accuracy": Estimate(0.625, 0.5, 0.75, 8)} for name in names},
        reference=names[0],
        settings="Settings & such.",
        verdicts=Verdicts([f"{names[-1]} is better. {EVIL}"], [], None),
    )


@pytest.fixture
def write(tmp_path):
    def write(of: Comparison) -> str:
        write_comparison(of, tmp_path / "page.html")
        return (tmp_path / "page.html").as_uri()

    return write


@pytest.fixture
def visit(browser: Browser, write):
    """Open a comparison's page, with what goes wrong in it, and what it asks of a network, as mistakes."""
    contexts, wrong = [], []

    def open_page(of: Comparison | None = None, **settings) -> Page:
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.on(
            "request", lambda request: None if request.url.startswith(("file:", "blob:")) else wrong.append(request.url)
        )
        page.goto(write(of or comparison()))
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def shown(page: Page) -> list[str]:
    """The answers of the question in view, from left to right."""
    return page.locator("article.current .answer:visible .text").all_inner_texts()


def pick(page: Page, name: str) -> None:
    """Vote for the answer of a model, as one who knows it by its words."""
    page.locator("article.current .answer:visible", has_text=re.compile(f"{name} says")).locator(".pick").click()


def move_on(page: Page, number: int) -> None:
    expect(page.locator("article.current h2")).to_contain_text(f"Question {number}")


def vote_all(page: Page) -> None:
    """dpo for the first question, a tie for the second, sft for the third."""
    pick(page, "dpo")
    move_on(page, 2)
    page.locator("#tie").click()
    move_on(page, 3)
    pick(page, "sft")


def test_names_are_hidden_until_the_end(visit):
    page = visit()
    expect(page.locator("article:visible")).to_have_count(1)
    for number in (1, 2, 3):
        move_on(page, number)
        visible = page.locator("body").inner_text()
        assert "/models/" not in visible
        assert "preferred" not in visible
        assert "62.5%" not in visible
        assert "is better" not in visible
        assert page.locator("article.current h3").all_inner_texts()[:3] == ["Answer 1", "Answer 2", "Answer 3"]
        page.keyboard.press("ArrowRight")
    expect(page.locator("#result")).to_be_hidden()


def test_the_order_changes_from_question_to_question_and_from_page_to_page(visit):
    """24 questions in 6 orders: all alike once in 6**23."""
    of = comparison(24)
    of.answers["base"][0] = Answer("base says 0", 3, True)
    page = visit(of)
    orders = []
    for number in range(24):
        move_on(page, number + 1)
        orders.append(tuple(text.split()[0] for text in shown(page)))
        page.keyboard.press("ArrowRight")
    assert len(set(orders)) > 1
    assert {frozenset(order) for order in orders} == {frozenset(NAMES)}


def test_votes_survive_a_reload_and_the_names_are_revealed(visit):
    page = visit()
    orders = shown(page)
    pick(page, "dpo")
    move_on(page, 2)
    page.locator("#tie").click()
    move_on(page, 3)
    page.reload()
    move_on(page, 3)
    expect(page.locator("#count")).to_have_text("2 of 3 voted")
    page.locator("#back").click()
    expect(page.locator("#tie")).to_have_attribute("aria-pressed", "true")
    page.locator("#back").click()
    assert shown(page) == orders
    expect(page.locator("article.current .best .text")).to_have_text("dpo says 0")
    page.locator("#next").click()
    page.locator("#next").click()
    pick(page, "sft")
    expect(page.locator("#reveal")).to_be_focused()
    expect(page.locator("#reveal")).to_have_text("Show the names")
    page.locator("#reveal").click()

    expect(page.locator("#verdict")).to_have_text(
        "You liked sft and dpo best: 1 of 3 votes each, 1 tie. Too few to be sure"
    )
    wins = [row.split("\t") for row in page.locator("#wins").inner_text().splitlines()]
    assert [row[:3] for row in wins] == [["base", "0", "0%"], ["sft", "1", "33%"], ["dpo", "1", "33%"]]
    # sft against base: one vote and one tie, 75%; Wilson's interval of 1.5 of 2.
    expect(page.locator("#pairs tr", has_text="sft").locator("td").nth(0)).to_have_text("75%20% to 97%")
    expect(page.locator("#pairs tr", has_text="sft").locator("td").nth(1)).not_to_contain_text("%")
    expect(page.locator("#pairs tr", has_text="sft").locator("td").nth(2)).to_have_text("50%13% to 87%")
    # Side by side, in the order given, with the preferred answer and the vote.
    expect(page.locator("article:visible")).to_have_count(3)
    assert page.locator("article").nth(0).locator("h3:visible").all_inner_texts() == [*NAMES, "preferred answer"]
    expect(page.locator("article").nth(0).locator(".mark:visible")).to_have_text("your vote")
    expect(page.locator("article").nth(1).locator(".mark:visible")).to_have_text(["a tie"] * 3)
    expect(page.locator("#result")).to_contain_text("62.5%")
    assert page.locator("#result h2").first.inner_text() == "What the preference pairs say"  # first of all
    expect(page.locator("#result li")).to_have_text(f"dpo is better. {EVIL}")
    page.reload()
    expect(page.locator("#verdict")).to_be_visible()


def test_votes_are_saved_as_json(visit, tmp_path):
    page = visit()
    first = shown(page)
    vote_all(page)
    page.locator("#reveal").click()
    with page.expect_download() as download:
        page.locator("#save").click()
    assert download.value.suggested_filename == "votes.json"
    download.value.save_as(tmp_path / "votes.json")
    saved = json.loads((tmp_path / "votes.json").read_text())
    assert saved["models"] == {name: f"/models/{name}" for name in NAMES}
    assert [(vote["best"], vote["tie"]) for vote in saved["votes"]] == [
        (["dpo"], False),
        (None, True),
        (["sft"], False),
    ]
    spoken = {"base": EVIL, "sft": "sft says 0", "dpo": "dpo says 0"}
    assert [spoken[name] for name in saved["votes"][0]["shown"]] == first
    assert saved["votes"][1]["question"] == f"Question 1? {EVIL}"
    assert (saved["counted"], saved["ties"], saved["wins"]) == (3, 1, {"base": 0, "sft": 1, "dpo": 1})
    (pair,) = (pair for pair in saved["pairs"] if (pair["model"], pair["against"]) == ("base", "dpo"))
    assert (pair["wins"], pair["losses"], pair["ties"], pair["rate"]) == (0, 1, 1, 0.25)


def test_by_keyboard_alone(visit):
    page = visit()
    order = [text.split()[0] for text in shown(page)]
    page.keyboard.press("2")
    move_on(page, 2)
    page.keyboard.press("4")  # there is no fourth answer
    page.keyboard.press("0")
    move_on(page, 3)
    page.keyboard.press("ArrowLeft")
    move_on(page, 2)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("1")
    expect(page.locator("#reveal")).to_be_focused()
    page.keyboard.press("Enter")
    winner = order[1] if order[1] in NAMES else "base"
    expect(page.locator("article").nth(0).locator(".answer.best .name")).to_have_text(winner)


def test_a_key_held_down_is_one_vote(visit):
    page = visit(comparison(4, [f"model{number}" for number in range(12)]))
    page.keyboard.down("9")
    for _ in range(5):
        page.keyboard.down("9")  # held down
    page.keyboard.up("9")
    move_on(page, 2)
    expect(page.locator("#count")).to_have_text("1 of 4 voted")
    page.keyboard.press("1")
    page.keyboard.press("ArrowLeft")  # before the page has moved on
    page.wait_for_timeout(400)
    move_on(page, 1)


def test_a_single_model_is_shown_without_voting(visit):
    page = visit(comparison(names=["dpo"]))
    expect(page.locator("article:visible")).to_have_count(3)
    expect(page.locator("#again")).to_be_hidden()
    expect(page.locator("#result")).to_contain_text("62.5%")


@pytest.mark.parametrize("stored", ["x", "[]", "1", '{"orders": []}', "null"])
def test_unreadable_stored_votes_are_ignored(visit, stored):
    page = visit()
    page.evaluate("stored => localStorage.setItem(localStorage.key(0), stored)", stored)
    page.reload()
    expect(page.locator("#count")).to_have_text("0 of 3 voted")


def test_markup_that_models_write_is_shown_as_text(visit):
    page = visit()
    assert EVIL in shown(page)
    page.locator("#reveal").click()
    assert page.locator("article").nth(0).locator(".text").nth(0).inner_text() == EVIL
    assert page.locator("img, article script").count() == 0
    assert page.title() == "Which answer is best?"


def test_models_with_the_same_answer_share_a_column_and_a_vote(visit):
    of = comparison()
    of.answers["dpo"][0] = of.answers["sft"][0]
    of.answers["dpo"][1] = of.answers["sft"][1] = of.answers["base"][1]
    page = visit(of)
    assert sorted(shown(page)) == sorted([EVIL, "sft says 0"])
    expect(page.locator(".alike:visible")).to_contain_text("the same answer")
    pick(page, "sft")
    move_on(page, 2)
    assert shown(page) == ["base says 1"]
    page.keyboard.press("1")
    move_on(page, 3)
    page.once("dialog", lambda dialog: dialog.accept())
    page.locator("#reveal").click()
    verdict = "You liked sft and dpo best: 1 of 2 votes each, 1 tie. Too few to be sure"
    expect(page.locator("#verdict")).to_have_text(verdict)
    expect(page.locator("#pairs tr", has_text="sft").locator("td").nth(2)).to_contain_text("50%")


def test_a_clear_winner_is_reported_without_a_doubt(visit):
    page = visit(comparison(8))
    for number in range(8):
        move_on(page, number + 1)
        pick(page, "dpo")
    page.locator("#reveal").click()
    expect(page.locator("#verdict")).to_have_text("You liked dpo best: 8 of 8 votes")


def test_revealing_names_before_all_votes_asks_first(visit):
    page = visit()
    pick(page, "dpo")
    move_on(page, 2)
    said = []
    page.once("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.locator("#reveal").click()
    assert said == ["Show the names now? 2 questions have no vote."]
    expect(page.locator("#result")).to_be_hidden()
    expect(page.locator("#count")).to_have_text("1 of 3 voted")


def test_starting_over_asks_first(visit):
    page = visit()
    vote_all(page)
    page.locator("#reveal").click()
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.locator("#again").click()
    expect(page.locator("#verdict")).to_be_visible()
    page.once("dialog", lambda dialog: dialog.accept())
    page.locator("#again").click()
    expect(page.locator("#count")).to_have_text("0 of 3 voted")


def test_another_comparison_starts_without_votes(visit, write):
    page = visit()
    vote_all(page)
    page.goto(write(comparison(4)))
    expect(page.locator("#count")).to_have_text("0 of 4 voted")


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_the_screen_and_has_contrast(visit, width, scheme):
    of = comparison(names=[*NAMES, "a-model-with-quite-a-long-name-of-its-own"])
    of.verdicts.lines.append("word" * 100 + " many words" * 30)
    of.answers["sft"][0] = Answer("word" * 200 + "\n" + "many words " * 100, 3, True)
    page = visit(of, viewport={"width": width, "height": 800}, color_scheme=scheme)
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    page.locator("article.current .pick").first.click()
    page.once("dialog", lambda dialog: dialog.accept())
    page.locator("#reveal").click()
    assert page.evaluate(fits)
    heads = page.locator("#result th.text:visible").all()
    assert heads
    assert all(head.bounding_box()["height"] < 250 for head in heads)  # no letter a line
    paper, ink = page.evaluate(
        "(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))"
    )
    lightness = [sum(map(float, re.findall(r"[\d.]+", color)[:3])) for color in (paper, ink)]
    assert (lightness[0] > lightness[1]) == (scheme == "light")
    assert abs(lightness[0] - lightness[1]) > 450


def test_readable_without_scripts_or_memory(visit, browser, write):
    page = visit(java_script_enabled=False)
    expect(page.locator("article:visible")).to_have_count(3)
    assert page.locator("article").nth(0).locator("h3:visible").all_inner_texts() == [*NAMES, "preferred answer"]
    expect(page.locator(".pick").first).to_be_hidden()
    expect(page.locator("#result")).to_contain_text("62.5%")

    context = browser.new_context()
    context.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new Error('no'); } })")
    page = context.new_page()
    page.goto(write(comparison()))
    vote_all(page)
    expect(page.locator("#count")).to_have_text("3 of 3 voted")
    expect(page.locator("#forgets")).to_be_visible()
    context.close()
