"""Hooks of the site's build: pages from outside docs/, links that leave docs/, and references made from the code.

The documents' links are those that work on the repository's pages. Here a link to a document outside docs/ leads to its page, and
one to another file of the repository to a copy of that file.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from reference import commands, functions, pretrain_recipe, recipe, rooms

OUTSIDE = {"recipes/README.md": "recipes.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
COPIES = "repository"  # folder of the site that holds the files outside docs/ that a page links to
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(?=(?:#[^)\s]*)?\))")
GENERATED = {
    "recipe": recipe,
    "pretrain-recipe": pretrain_recipe,
    "commands": commands,
    "functions": functions,
    "rooms": rooms,
}
MARK = re.compile(r"^<!-- generated: (\S+) -->$", flags=re.M)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, and copies of the files outside it that a page links to."""
    root = Path(config.config_file_path).parent
    for path, page in OUTSIDE.items():
        if (root / path).is_file():
            files.append(File.generated(config, page, abs_src_path=str(root / path)))
    copied = set()
    for file in list(files.documentation_pages()):
        for target in targets(file.content_string, path_in_repository(file.src_uri)):
            if site_path(target) == f"{COPIES}/{target}" and (root / target).is_file() and target not in copied:
                files.append(File.generated(config, site_path(target), abs_src_path=str(root / target)))
                copied.add(target)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is generated, and make each link to a file one to its place in the site."""
    here = page.file.src_uri
    at = posixpath.dirname(path_in_repository(here))

    def in_site(link: re.Match[str]) -> str:
        target = site_path(posixpath.normpath(posixpath.join(at, link[1])))
        return posixpath.relpath(target, posixpath.dirname(here) or ".")

    return MARK.sub(lambda mark: GENERATED[mark[1]](), LINK.sub(in_site, markdown))


def targets(markdown: str, path: str) -> Iterator[str]:
    """Yield the paths in the repository that a document at `path` links to."""
    for link in LINK.findall(markdown):
        yield posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def path_in_repository(src_uri: str) -> str:
    """Return where a page of the site lies in the repository."""
    return next((path for path, page in OUTSIDE.items() if page == src_uri), f"docs/{src_uri}")


def site_path(path: str) -> str:
    """Return where a file of the repository lies in the site."""
    return OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"{COPIES}/{path}")
