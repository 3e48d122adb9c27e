"""The page: a well-formed document that shows every row and trusts no word in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from agentiad.v1 import trajectory_pb2 as pb
from services.agent import protocol
from services.cli.cards import WHOLE
from services.cli.page import Result, Row, Summary, write_page
from tests.cli.inspections import NORMAL, Script, make_truth, make_verdict

ATTACK = "\"'><script>alert(1)</script>{{ 7 * 7 }}<img src=x onerror=alert(1)>"
VOID = {"meta", "img", "input", "br"}


@dataclass
class Page(HTMLParser):
    """Tags with their attributes; the text; every article's classes and text."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    articles: list[tuple[list[str], str]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "article":
            self.articles.append(((dict(attrs)["class"] or "").split(), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "article" in self.open:
            kinds, text = self.articles[-1]
            self.articles[-1] = (kinds, text + data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def make_page(folder: Path, rows: list[Row], summary: Summary | None = None) -> Page:
    path = folder / "index.html"
    write_page(path, rows, summary)
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


def test_a_row_tells_the_whole_story(tmp_path: Path) -> None:
    script = Script()
    script.say("what is this?")
    script.crop("a dark smudge", (0.1, 0.1, 0.5, 0.5))
    script.query("what is normal?", WHOLE)
    done = script.answer("sharp edges", make_verdict("dent", (0.2, 0.2, 0.3, 0.3), "a round hollow"), 0.912)
    truth = make_truth("scratch", (0.2, 0.2, 0.3, 0.3))
    page = make_page(tmp_path, [Row("a/part.png", done, None, truth, "evidence/0.png", "traces/0.json")])
    [(kinds, text)] = page.articles
    assert kinds == ["reject"]
    for words in (
        "a/part.png", "bolt", "what is this?", "a dark smudge", "crop_image_normalized", "[0.10,0.10,0.50,0.50]",
        "what is normal?", "query_image", "aligned (confidence 0.90)", "sharp edges", "a round hollow", "dent",
        "scratch", "0.912", "0.15 s", "answered", "v1",
    ):  # fmt: skip
        assert words in text, words
    assert [image["src"] for image in page.all("img")] == ["./evidence/0.png"]
    assert [link["href"] for link in page.all("a")] == ["./evidence/0.png", "./traces/0.json"]


def test_kinds_of_rows_can_be_filtered(tmp_path: Path) -> None:
    dent = make_verdict("dent", (0.2, 0.2, 0.3, 0.3))
    rows = [
        Row("1", Script().answer("", dent, 0.9), None, pb.GroundTruth()),
        Row("2", Script().answer("", NORMAL, 0.1), None, pb.GroundTruth()),
        Row("3", Script(known=False).answer("", NORMAL, 0.1)),
        Row("4", Script().inspection()),
        Row("5", error="not a picture"),
    ]
    page = make_page(tmp_path, rows)
    assert [kinds for kinds, _ in page.articles] == [
        ["reject", "wrong"], ["pass"], ["pass", "unknown"], ["review"], ["error"],
    ]  # fmt: skip
    shown = {str(label["for"]) for label in page.all("label")}
    assert shown == {"show-" + kind for kind in ("all", "reject", "review", "pass", "error", "wrong", "unknown")}
    assert shown == {str(box["id"]) for box in page.all("input")}
    assert "category unknown to this policy" in page.articles[2][1]
    assert "not a picture" in page.articles[4][1]


def test_hostile_names_and_words_are_only_words(tmp_path: Path) -> None:
    script = Script(category=ATTACK, known=False, name=ATTACK.replace("/", "_"))
    script.say(ATTACK)
    script.say(protocol.crop_reply(ATTACK, (0.1, 0.1, 0.5, 0.5), target_image=9))
    done = script.answer(ATTACK, make_verdict(ATTACK, (0.2, 0.2, 0.3, 0.3), ATTACK), 0.9)
    done.policy_version = ATTACK
    hostile = "javascript:alert(1)//?#" + ATTACK + "\udcff"
    rows = [
        Row(ATTACK + "\udcff", done, ATTACK, make_truth(ATTACK, WHOLE), hostile, hostile),
        Row(ATTACK, error=ATTACK),
    ]
    page = make_page(tmp_path, rows, Summary(ATTACK, ATTACK, (Result(ATTACK, 1, 1.0, 0.5),)))
    assert page.all("script") == []
    assert page.text.count("<script>alert(1)</script>{{ 7 * 7 }}") >= 12
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    for attributes in (*page.all("a"), *page.all("img")):
        address = attributes.get("href") or attributes.get("src") or ""
        assert address.startswith("./javascript%3A")
        assert not set("?#<>\"' ") & set(address)


def test_nothing_is_fetched_from_elsewhere(tmp_path: Path) -> None:
    make_page(tmp_path, [Row("1", Script().answer("", NORMAL, 0.1), evidence="1.png")])
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_the_summary_counts_and_compares(tmp_path: Path) -> None:
    summary = Summary(
        "Demo", "on a laptop", (Result("bolt", 24, 1.0, 0.625),), Result("all", 24, 0.958, 0.625)
    )  # fmt: skip
    page = make_page(tmp_path, [Row("1", error="gone"), Row("2", error="gone")], summary)
    for words in ("Demo", "on a laptop", "95.8 %", "62.5 %", "0.958", "0.625", "bolt"):
        assert words in page.text, words
    tiles = [line.split() for line in page.text.splitlines() if "images" in line or "no inspection" in line]
    assert ["2images"] in tiles


def test_no_rows_at_all(tmp_path: Path) -> None:
    assert make_page(tmp_path, []).articles == []
