"""What documentation, comments and messages name is there: files, commands with their options, recipe keys.

A rename that forgets a sentence fails here, with the place of the sentence. Lists that can be read off the code are compared
with it, and nothing that grows is counted in prose.
"""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

import slimqwen
from slimqwen.cli import app
from slimqwen.families import FAMILIES
from slimqwen.recipe import PretrainRecipe, Recipe
from slimqwen.recipe.file import describe
from slimqwen.runs.stage import Stage
from slimqwen.study.catalogue import STUDIES

ROOT = Path(__file__).parents[1]
FOLDERS = ("slimqwen", "tests", "docs", "recipes", "benchmarks", ".ci")
FILES = sorted(
    [file.name for file in ROOT.iterdir() if file.is_file()]
    + [
        file.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    ]
)
GROUP: Any = typer.main.get_command(app)
PROGRAM = {option for parameter in GROUP.params for option in parameter.opts} | {"--help"}
OPTIONS: dict[str, set[str]] = {
    name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for name, command in GROUP.commands.items()
}

NOT_OURS = {
    "README.md",  # any data set's or checkpoint's
    "utils.py",  # what no file of ours is called
    "helpers.py",
    "common.py",
    "cache_utils.py",  # Transformers
    "modeling_layers.py",
    "modeling_qwen3_next.py",
    "config/speculative.py",  # vLLM
    "layers/fused_moe/routed_experts.py",
    "srt/arg_groups/speculative_hook.py",  # SGLang
    "convert_hf_to_gguf.py",  # llama.cpp
    "megatron/core/datasets/indexed_dataset.py",
    "json/decoder.py",  # Python
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
    "SLURM_RESTART_COUNT",
}


@dataclass(frozen=True)
class Passage:
    """Some prose: where it stands, and whether it is a line of a block of code."""

    file: str
    line: int
    text: str
    is_code: bool = False

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    def spans(self) -> list[str]:
        """What stands between backticks."""
        return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", self.text)


@cache
def passages() -> list[Passage]:
    """All prose that is kept true: documents line by line, comments, docstrings and other strings of slimqwen."""
    found = []
    for name in FILES:
        if name in ("CHANGELOG.md", "slimqwen/recipe/renamed.py", "slimqwen/cli/old_spellings.py"):  # of what was
            continue
        if name.endswith(".md"):
            found += of_document(name, (ROOT / name).read_text(encoding="utf-8"))
        elif name.startswith(("slimqwen/", "benchmarks/")) and name.endswith(".py"):
            found += of_python(name, (ROOT / name).read_text(encoding="utf-8"))
        elif name.endswith((".yaml", ".j2")) or name in ("Makefile", "pyproject.toml", "constraints.txt"):
            lines = enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), start=1)
            found += [Passage(name, number, line) for number, line in lines]
    return found


def of_document(name: str, text: str) -> Iterator[Passage]:
    """The lines of a document; a command that is continued over some is one."""
    is_fenced, begun, first = False, "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            is_fenced = not is_fenced
        is_code = is_fenced or line.startswith("    ")
        if is_code and line.endswith("\\"):
            begun, first = begun + line[:-1], first or number
            continue
        yield Passage(name, first or number, begun + line, is_code)
        begun, first = "", 0


def of_python(name: str, source: str) -> Iterator[Passage]:
    """The comments of a module, and its strings, an f-string without what it is filled with."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Passage(name, token.start[0], token.string)
    joined = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            joined |= {id(part) for part in node.values}
            yield Passage(name, node.lineno, "".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in joined:
            yield Passage(name, node.lineno, node.value)


def told(problems: list[str]) -> str:
    return "\n".join(sorted(set(problems)))


# --- files ------------------------------------------------------------------------------------------------------------


def is_there(name: str, beside: str = "") -> bool:
    """Whether a file or folder is called so: from the root, from a document's folder, or by the end of its path."""
    name = name.rstrip("/")
    if (ROOT / beside).parent.joinpath(name).exists() or (ROOT / name).exists():
        return True
    return any(f"/{file}".endswith(f"/{name}") for file in FILES)


def missing_files(prose: list[Passage]) -> list[str]:
    """Modules, documents and anything below one of our folders."""
    problems = []
    named = re.compile(r"(?<![\w/.~$}>*-])((?:[\w.-]+/)*[\w-]+\.(?:py|md))\b(?![\w/-])")
    for passage in prose:
        for name in named.findall(passage.text):
            if name not in NOT_OURS and not is_there(name, passage.file):
                problems.append(f"{passage.place}: {name}")
        for span in passage.spans():
            path = span.split(":")[0].split(" ")[0]
            path = re.sub(r"<\w+>", "*", path)  # slimqwen/families/<model_type>.py
            if path.startswith(tuple(f"{folder}/" for folder in FOLDERS)) and not list(ROOT.glob(path.rstrip("/"))):
                problems.append(f"{passage.place}: {path}")
    return problems


def missing_names(prose: list[Passage]) -> list[str]:
    """Of documents and docstrings: constants, and functions and classes that are named with their file (`loss.py: align`)."""
    problems = []
    code = "\n".join(source(name) for name in FILES if name.endswith(".py") and name != "tests/test_prose.py")
    for passage in prose:
        for span in passage.spans():
            place = re.fullmatch(r"([\w/]+\.py): (\w+)", span)
            if place:
                files = [name for name in FILES if f"/{name}".endswith(f"/{place[1]}")]
                if not any(
                    re.search(rf"^\s*(def|class) {place[2]}\b|^{place[2]}\b", source(f), flags=re.M) for f in files
                ):
                    problems.append(f"{passage.place}: {span}")
            elif (
                re.fullmatch(r"[A-Z]+(_[A-Z]+)+", span) and span not in NOT_OURS and not re.search(rf"\b{span}\b", code)
            ):
                problems.append(f"{passage.place}: {span}")
    return problems


@cache
def source(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_name_named_with_its_file_is_there() -> None:
    assert not (problems := missing_names(passages())), told(problems)


def test_every_file_named_is_there() -> None:
    assert not (problems := missing_files(passages())), told(problems)


def test_every_link_leads_somewhere() -> None:
    """Of every document: to a file, and where it has an anchor to one of its headings."""
    problems = []
    for name in FILES:
        if not name.endswith(".md"):
            continue
        for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text(encoding="utf-8")):
            if target.startswith(("http://", "https://")):
                continue
            path, _, anchor = target.partition("#")
            file = (ROOT / name).parent / path if path else ROOT / name
            if not file.exists() or (anchor and anchor not in anchors(file)):
                problems.append(f"{name}: {target}")
    assert not problems, told(problems)


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*)$", document.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- commands ---------------------------------------------------------------------------------------------------------


def commands_in(passage: Passage) -> Iterator[str]:
    """What stands there as a command line: between backticks, or in a block of code."""
    yield from (span[span.index("slimqwen ") :] for span in passage.spans() if "slimqwen " in span)
    if passage.is_code:
        yield from re.findall(r"(?:^\s*|-m |&& )(slimqwen [a-z][a-z-]* .*)$", passage.text)


def wrong_commands(prose: list[Passage]) -> list[str]:
    """Commands that are none, and options that they do not have."""
    problems = []
    for passage in prose:
        for line in commands_in(passage):
            problems += [f"{passage.place}: {problem}" for problem in unknown(line.split("#")[0].split()[1:])]
        for span in passage.spans():  # `prune --plan`
            command, words = command_of(span.split())
            if command in OPTIONS and words and words[0].startswith("--"):
                problems += [f"{passage.place}: {problem}" for problem in unknown(span.split())]
    return problems


def test_every_command_named_is_one_and_has_its_options() -> None:
    assert not (problems := wrong_commands(passages())), told(problems)


def command_of(words: list[str]) -> tuple[str, list[str]]:
    """A command's name, which may have two words, and what follows it."""
    length = 2 if " ".join(words[:2]) in OPTIONS else 1
    return " ".join(words[:length]), words[length:]


def unknown(line: list[str]) -> list[str]:
    """What of a command line slimqwen does not have."""
    command, words = command_of(line)
    if command.startswith("--"):  # `slimqwen --version`
        return [] if command in PROGRAM else [f"slimqwen {command}"]
    if command not in OPTIONS:
        return [f"slimqwen {command}"]
    given = [re.split(r"[=,.;:)]", word)[0] for word in words if word.startswith("--")]
    return [f"slimqwen {command} {option}" for option in given if option not in OPTIONS[command] | {"--help"}]


# --- recipe keys ------------------------------------------------------------------------------------------------------


KEYS = {
    key: line
    for model in (Recipe, PretrainRecipe)
    for line in describe(model).splitlines()
    if (key := line.split(":")[0]) and not line.startswith(" ")
}
SECTIONS = {key.split(".")[0] for key in KEYS if "." in key}
LEAVES = {key.split(".")[-1] for key in KEYS}


def is_key(key: str) -> bool:
    """Whether a dotted name is a field of a recipe (a list's by number, N or nothing), or begins one."""
    key = re.sub(r"\.\d+(?=\.|$)", ".N", key)
    return (
        key in KEYS
        or key in {known.replace(".N", "") for known in KEYS}
        or any(known.startswith(f"{key}.") or known.endswith(f".{key}") for known in KEYS)
    )


def is_attribute(name: str) -> bool:
    """Whether a dotted name is a module of slimqwen, or something in one: `data.packed`, `pruning.Cut`."""
    *path, last = name.split(".")
    for module, attribute in ((f"slimqwen.{name}", None), (".".join(["slimqwen", *path]), last)):
        try:
            found = import_module(module)
        except ImportError:
            continue
        if attribute is None or hasattr(found, attribute):
            return True
    return False


def wrong_keys(prose: list[Passage]) -> list[str]:
    """`distil.learning_rate` anywhere, and what is given to `--set`."""
    problems = []
    dotted = re.compile(rf"(?<![\w./$-])((?:{'|'.join(sorted(SECTIONS))})\.[a-z_]+(?:\.[a-z_\d]+)*)\b(?![/(*])")
    for passage in prose:
        for name in dotted.findall(passage.text):
            is_file = name.endswith((".yaml", ".json", ".jsonl", ".md"))
            if not (is_file or is_key(name) or is_attribute(name)):
                problems.append(f"{passage.place}: {name}")
        for name in re.findall(r"--set '?([\w.]+)=", passage.text):
            if not is_key(name) and name != "key":
                problems.append(f"{passage.place}: --set {name}")
    return problems


def test_every_recipe_key_named_is_one() -> None:
    assert not (problems := wrong_keys(passages())), told(problems)


def impossible_settings(prose: list[Passage]) -> list[str]:
    """Of `key: value` between backticks, where key is a recipe's and has words to choose from: that value is one of them."""
    problems = []
    choices = {
        key.split(".")[-1]: set(re.findall(r"[\w-]+", line.split(":", 1)[1].split(",")[0]))
        for key, line in KEYS.items()
        if " | " in line
    }
    for passage in prose:
        for span in passage.spans():
            setting = re.fullmatch(r"(?:\w+\.)*(\w+): ([a-z][\w-]*)", span)
            if setting and setting[1] in choices and setting[2] not in choices[setting[1]]:
                problems.append(f"{passage.place}: {span}, one of {sorted(choices[setting[1]])}")
    return problems


def test_every_setting_quoted_can_be_made() -> None:
    assert not (problems := impossible_settings(passages())), told(problems)


# --- words ------------------------------------------------------------------------------------------------------------


def test_every_word_of_the_glossary_has_a_meaning_and_a_place() -> None:
    """One line for each word, in order; the place is a file, a command or a recipe key, each of which is there."""
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (.+) \| `([^|`]+)` \|$", text[: text.index("## Words")], flags=re.M)
    assert len(rows) == text[: text.index("## Words")].count("\n| ") - 1  # the heading
    words = [word.split(",")[0].lower() for word, _, _ in rows]
    assert words == sorted(set(words)), [
        pair for pair in zip(words, sorted(set(words)), strict=False) if pair[0] != pair[1]
    ]
    for word, meaning, place in rows:
        if place.startswith("slimqwen "):
            assert not unknown(place.split()[1:]), word
        else:
            assert (ROOT / place).exists() if "/" in place else is_key(place), (word, place)
        assert len(meaning.split()) > 3, word
    for document in ("README.md", "CONTRIBUTING.md"):
        assert "(docs/glossary.md)" in source(document), document


# --- lists ------------------------------------------------------------------------------------------------------------


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_lists_every_command_with_the_first_sentence_of_its_help() -> None:
    (table,) = re.findall(r"^\| command \|.*\n\|.*\n((?:\|.*\n)+)", README, flags=re.M)
    rows = [f"| `{name}` | {first_sentence(command.help)} |" for name, command in GROUP.commands.items()]
    assert table.splitlines() == rows, "README's table should be\n" + "\n".join(rows)


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.:])\s", " ".join(text.split()))[0].rstrip(".:")


def test_readme_lists_every_family() -> None:
    (listed,) = re.findall(r"of a supported family:\s(.*?)\. Text is", README, flags=re.S)
    assert set(re.findall(r"`(\w+)`", listed)) == set(FAMILIES)


def test_studies_are_listed_where_they_are_named() -> None:
    names = list(STUDIES)
    assert f"slimqwen study {'|'.join(names)}" in README
    argument = next(parameter for parameter in GROUP.commands["study"].params if parameter.name == "name")
    assert argument.help == f"{', '.join(names[:-1])} or {names[-1]}."


def test_readme_lists_every_room_of_the_code_and_every_function_of_the_library() -> None:
    table = README[README.index("## The code") :]
    rooms = {file.split("/")[1] for file in FILES if re.fullmatch(r"slimqwen/\w+/__init__\.py", file)}
    listed = set(re.findall(r"`(?:slimqwen/)?(\w+)/`", table)) - {"recipes", "docs", "tests"}
    assert listed == rooms
    functions = {name for name in slimqwen.__all__ if name.islower()} - {"load_recipe", "run"}
    (sentence,) = re.findall(r"The stages are functions too: (.*?)\n\n", README, flags=re.S)
    assert set(re.findall(r"`(?:slimqwen\.)?(\w+)`", sentence)) == functions


def counts(prose: list[Passage]) -> list[str]:
    """Who adds a study, a family or a command would have to know where they are counted."""
    number = r"two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fifteen|sixteen|twenty|\d+"
    growing = r"studies|(?:model )?families|commands|criteria|divergences|recipe fields|file formats|engines|loggers"
    counted = re.compile(rf"\b(?:{number}) (?:\w+ )?(?:{growing})\b", flags=re.I)
    return [f"{passage.place}: {found}" for passage in prose for found in counted.findall(passage.text)]


def test_the_stages_of_a_run_are_listed_with_who_makes_them() -> None:
    """docs/multi-device.md: each stage in one row, and the first rank's are those that are not shared."""
    modules = [import_module(f"slimqwen.runs.{name}") for name in ("stages", "training_stages", "recipe_run")]
    classes = {found for module in modules for found in vars(module).values() if isinstance(found, type)}
    of_all = {
        Path(found.file).stem: found.is_shared
        for found in classes
        if issubclass(found, Stage) and hasattr(found, "file")
    }
    text = (ROOT / "docs" / "multi-device.md").read_text(encoding="utf-8")
    table = text.partition("| stage | made by |\n|---|---|\n")[2].partition("\n\n")[0]
    rows = [row.strip("| ").split(" | ", 1) for row in table.splitlines()]
    listed = [(name, not by.startswith("the first rank")) for names, by in rows for name in names.split(", ")]
    assert sorted(listed) == sorted([*of_all.items(), ("report", False)])


def test_nothing_that_grows_is_counted_in_prose() -> None:
    assert not (problems := counts(passages())), told(problems)


# --- it can fail ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "false", "true"),
    [
        (missing_files, "see docs/recipes.md", "see docs/refit.md"),
        (missing_files, "in `slimqwen/planing/`", "in `slimqwen/planning/`"),
        (missing_files, "as `prunning.py` has it", "as `prune.py` has it"),
        (missing_names, "see `losses/loss.py: aligned`", "see `losses/loss.py: align`"),
        (missing_names, "add it to `FAMILIES_FOREIGN`", "add it to `FAMILIES_NATIVE`"),
        (wrong_commands, "run `slimqwen distill student`", "run `slimqwen distil student`"),
        (wrong_commands, "run `slimqwen prune --layers 3`", "run `slimqwen prune --layout fused`"),
        (wrong_commands, "run `slimqwen plan fit x --tokens y`", "run `slimqwen plan search x --tokens y`"),
        (wrong_commands, "`calibrate --stream` does", "`calibrate --streaming` does"),
        (wrong_commands, "    torchrun -m slimqwen distil a --token b", "    torchrun -m slimqwen distil a --tokens b"),
        (wrong_keys, "set distil.lr", "set distil.learning_rate"),
        (wrong_keys, "`data.paked`", "`data.packed`"),
        (wrong_keys, "slimqwen run x --set target.layers=3", "slimqwen run x --set target.num_hidden_layers=3"),
        (impossible_settings, "with `pruning.depth: first`", "with `pruning.depth: last`"),
        (impossible_settings, "with `at_cut: kept`", "with `at_cut: carry`"),
        (counts, "the eight studies", "the studies"),
    ],
)
def test_a_false_statement_is_found(check: Callable[[list[Passage]], list[str]], false: str, true: str) -> None:
    assert check(list(of_document("docs/invented.md", false)))
    assert not check(list(of_document("docs/invented.md", true)))


def test_all_that_is_written_is_read() -> None:
    """A comment, a docstring, a message and a command over several lines; where there are none the checks see nothing."""
    source = '# a comment\n\n\ndef f(x):\n    """A docstring."""\n    raise ValueError(f\'{x} is a message\')\n'
    assert {passage.text for passage in of_python("m.py", source)} == {"# a comment", "A docstring.", "{} is a message"}
    (command,) = of_document("d.md", "    slimqwen prune a \\\n        --plan b\n")
    assert command.is_code and command.text.split() == ["slimqwen", "prune", "a", "--plan", "b"]
    read = {passage.file for passage in passages()}
    assert {
        "README.md",
        "docs/method.md",
        "docs/study/README.md",
        "slimqwen/runs/stages.py",
        "recipes/README.md",
    } <= read
    lines = [line for passage in passages() for line in commands_in(passage)]
    assert {command_of(line.split()[1:])[0] for line in lines} >= set(OPTIONS)
