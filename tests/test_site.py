"""The documentation site, built without a network: whole, its links resolved, and every key, command and public name on it."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest
import typer
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

import slimqwen
from slimqwen.cli import app
from slimqwen.recipe import DistilFile, PretrainRecipe, PruningRecipe, Recipe, Target
from slimqwen.recipe.file import describe, load_recipe

ROOT = Path(__file__).parents[1]
GROUP: Any = typer.main.get_command(app)
LOADED = {
    "img": "src",
    "script": "src",
    "link": "href",
    "iframe": "src",
    "source": "src",
    "object": "data",
    "use": "href",
}


class Page(HTMLParser):
    """A page's links, what it loads, its anchors, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the tag links to, loads or is an anchor of."""
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in LOADED and LOADED[tag] in values:
            self.loads.append(values[LOADED[tag]])

    def handle_data(self, data: str) -> None:
        """Note the text."""
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as `make docs` does: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {file: Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}


def is_outside(address: str) -> bool:
    return re.match(r"(?:[a-z]+:)?//", address) is not None


def unresolved(pages: dict[Path, Page]) -> Iterator[str]:
    """Yield the links to a file that is not there, or to an anchor that its page does not have."""
    for file, page in pages.items():
        for address in page.links + page.loads:
            if is_outside(address) or address.startswith(("mailto:", "data:", "javascript:")):
                continue
            path, anchor = urldefrag(unquote(address))
            target = (file.parent / path).resolve() if path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].anchors):
                yield f"{file.name}: {address}"


def test_every_document_is_a_page_that_the_navigation_reaches(site: Path, pages: dict[Path, Page]) -> None:
    documents = {file.relative_to(ROOT / "docs").with_suffix(".html") for file in (ROOT / "docs").rglob("*.md")}
    documents = {document.with_name(document.name.replace("README", "index")) for document in documents}
    outside = {Path(name) for name in ("recipes.html", "contributing.html", "changelog.html")}
    home = site / "index.html"
    linked = {(site / urldefrag(address).url).resolve() for address in pages[home].links if not is_outside(address)}
    reached, waiting = {home}, [file for file in linked if file in pages]
    while waiting:
        file = waiting.pop()
        if file not in reached:
            reached.add(file)
            waiting += [
                found for link in pages[file].links if (found := (file.parent / urldefrag(link).url).resolve()) in pages
            ]
    assert {site / document for document in documents | outside} <= reached
    assert set(pages) - reached == {site / "404.html"}


def test_no_link_is_unresolved(pages: dict[Path, Page]) -> None:
    assert not list(unresolved({file: page for file, page in pages.items() if file.name != "404.html"}))


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    """No page or style sheet has an address outside; what the theme's script would fetch has no place on a page."""
    assert not [address for page in pages.values() for address in page.loads if is_outside(address)]
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet
    for file in pages:
        html = file.read_text(encoding="utf-8")
        assert not re.search(r'class="[^"]*\bmermaid\b|data-md-component="source"|url\([\'"]?https?:', html), file


def test_every_recipe_key_is_described(site: Path, pages: dict[Path, Page]) -> None:
    page = pages[site / "reference" / "recipe.html"]
    for model, prefix in ((Recipe, ""), (PretrainRecipe, "pretrain.")):
        entries = re.findall(r"^([\w.]+): .+((?:\n .+)*)", describe(model), flags=re.M)
        assert len(entries) > 10
        for key, description in entries:
            assert prefix + key in page.anchors
            assert shown(description) in page.text, key


def shown(markdown: str) -> str:
    """Return a line of help as a page shows it."""
    return " ".join(re.sub(r"`([^`]*)`", r"\1", markdown).split())


def anchor_of(command: str) -> str:
    """The anchor of a command, whose name may have two words."""
    return command.replace(" ", "-")


def test_every_command_has_its_help_and_options(site: Path, pages: dict[Path, Page]) -> None:
    page = pages[site / "reference" / "commands.html"]
    assert {anchor_of(name) for name in GROUP.commands} <= page.anchors
    html = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for name, command in GROUP.commands.items():
        section = Page(html[html.index(f'<h2 id="{anchor_of(name)}"') :].split("<h2", 2)[1])
        assert shown(command.help) in section.text, name
        for parameter in command.params:
            assert (
                getattr(parameter, "hidden", False)
                or parameter.opts[0] in section.text
                or parameter.metavar in section.text
            )


def test_the_search_finds_keys_and_commands_without_a_service(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    titles = {re.sub(r"<[^>]+>", "", entry["title"]) for entry in index["docs"]}
    assert {"run_dir", "Glossary", *GROUP.commands} <= titles


def test_every_public_name_has_its_docstring(site: Path, pages: dict[Path, Page]) -> None:
    page = pages[site / "reference" / "python.html"]
    for name in slimqwen.__all__:
        assert name.lower() in page.anchors
        first = (getattr(slimqwen, name).__doc__ or "").strip().split("\n\n")[0]
        assert shown(first) in page.text, name


EXAMPLES = [
    pytest.param(block, id=f"{file.relative_to(ROOT)}:{number}")
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for number, block in enumerate(
        re.findall(r"^```yaml\n(.*?)^```", file.read_text(encoding="utf-8"), flags=re.M | re.S)
    )
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_in_yaml_can_be_read(example: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a recipe, or some sections of one, or a target, or a section in a file of its own; without a warning."""
    values = yaml.safe_load(example)
    model = next(
        model for model in (Recipe, Target, DistilFile, PruningRecipe) if set(values) <= set(model.model_fields)
    )
    if model is Recipe:
        values = {"run_dir": "run", "target": {"num_hidden_layers": 2}, "distil": {"tokens": 1_000_000}} | values
    file = tmp_path / "example.yaml"
    file.write_text(yaml.safe_dump(values))
    load_recipe(file, model=model)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("document", "is_right"),
    [
        ("See [it](#a-heading).\n\n## A heading\n", True),
        ("See [it](#another-heading).\n\n## A heading\n", False),
        ("See [it](missing.md).\n", False),
        ("See [it](../mkdocs.yml).\n", False),  # outside of what this little site holds
    ],
)
def test_a_link_that_leads_nowhere_stops_the_build(tmp_path: Path, document: str, is_right: bool) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Home\n\n{document}")
    settings = {"docs_dir": str(tmp_path / "docs"), "site_dir": str(tmp_path / "site"), "nav": ["index.md"]}
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, hooks=[], **settings)
    if is_right:
        build(config)
    else:
        with pytest.raises(Abort):
            build(config)


def test_the_check_of_built_links_finds_what_is_unresolved(tmp_path: Path) -> None:
    here, there = tmp_path / "a.html", tmp_path / "b.html"
    there.write_text("")
    pages = {here: Page('<a href="b.html#x">x</a><a href="c.html">c</a><a href="#y">y</a>'), there: Page('<p id="z">')}
    assert sorted(unresolved(pages)) == ["a.html: #y", "a.html: b.html#x", "a.html: c.html"]
    assert not list(unresolved({here: Page('<a href="b.html#z">'), there: pages[there]}))
