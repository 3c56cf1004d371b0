"""What README, docs and headers say holds: links and files exist, commands parse, public names and keys are described.

Nothing is run or built here; `make docs` builds the pages, and a name that it cannot find there is an error.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import stocha_hf
from stocha_hf.spec import ACTIVATIONS, StochaConfig

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
HEADERS = sorted([*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("benchmarks/*.yaml")])
VERBS = sorted(path.stem for path in ROOT.glob("stocha_hf/cli/*.py") if not path.stem.startswith("_"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The ids that GitHub and mkdocs make of headings."""
    headings = re.findall(r"^#+ (.*)", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"\w+:", target):
            file, _, anchor = target.partition("#")
            linked = (page.parent / file).resolve() if file else page
            assert linked.exists(), f"{name(page)} links to {target}"
            in_site = ROOT / "docs" not in page.parents or ROOT / "docs" in linked.parents
            assert in_site, f"{name(page)} links to {target}, which the site of docs/ does not have: name it as `code`"
            assert not anchor or anchor in anchors(linked), f"{name(page)} links to {target}: no such heading"


@pytest.mark.parametrize("page", [*PAGES, *HEADERS], ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    for file in re.findall(r"\b((?:benchmarks|docs|model_cards|recipes|tests)/[\w./-]+\.\w+)", text):
        assert (ROOT / file).exists(), f"{name(page)} names {file}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tests_that_are_named_exist(page: Path) -> None:
    for file, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", page.read_text()):
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_every_file_of_results_is_read_by_a_page_and_every_page_of_docs_is_in_the_navigation() -> None:
    pages = "".join(page.read_text() for page in PAGES)
    for path in ROOT.glob("benchmarks/results/*"):
        assert path.name in pages, f"no page says what {name(path)} shows"
    navigation = (ROOT / "mkdocs.yml").read_text()
    for path in ROOT.glob("docs/**/*.md"):
        assert str(path.relative_to(ROOT / "docs")) in navigation, f"mkdocs.yml does not list {name(path)}"


def test_public_names_are_in_the_reference() -> None:
    reference = (ROOT / "docs" / "reference" / "api.md").read_text()
    for public in stocha_hf.__all__:
        assert f"stocha_hf.{public}" in reference, f"docs/reference/api.md does not describe stocha_hf.{public}"


def test_every_key_and_activation_is_described() -> None:
    config, convert = ((ROOT / "docs" / file).read_text() for file in ("reference/config.md", "guides/convert.md"))
    for field in dataclasses.fields(StochaConfig):
        assert f"`{field.name}`" in config, f"docs/reference/config.md does not describe {field.name}"
    for activation in ACTIVATIONS:
        assert f"`{activation}`" in convert, f"docs/guides/convert.md does not describe {activation}"


def test_training_keys_are_described() -> None:
    from trl import SFTConfig

    from stocha_hf.training.arguments import StochaArguments

    guide = (ROOT / "docs" / "guides" / "train.md").read_text()
    own = {field.name for field in dataclasses.fields(StochaArguments)}
    for key in own - {field.name for field in dataclasses.fields(SFTConfig)}:
        assert key in guide, f"docs/guides/train.md does not describe {key}"


def commands(text: str) -> Iterator[list[str]]:
    """The stocha- command lines of a text, in code blocks, in `code` and in comments; without redirections."""
    joined = re.sub(r" *\\\n[ #]*", " ", text)
    lines = [line.strip(" #") for line in joined.splitlines()]
    codes = re.findall(r"`(stocha-\w+ [^`]+)`", joined.replace("\n", " "))
    for line in [*lines, *codes]:
        match = re.match(r"(?:(?:then|before): *)?(stocha-(\w+) [^`(>|]*)", line)
        if match and match[2] in VERBS:
            yield shlex.split(match[1], comments=True)


@pytest.mark.parametrize("page", [*PAGES, *HEADERS], ids=name)
def test_commands_parse(page: Path) -> None:
    for command, *words in commands(page.read_text()):
        check(command, words)


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_of_help_parse(verb: str) -> None:
    examples = list(commands(import_module(f"stocha_hf.cli.{verb}").__doc__))
    assert examples
    for command, *words in examples:
        check(command, words)


def check(command: str, words: list[str]) -> None:
    verb = command.removeprefix("stocha-")
    try:
        import_module(f"stocha_hf.cli.{verb}").parser().parse_args(words)
    except SystemExit:
        pytest.fail(f"{shlex.join([command, *words])} does not parse")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_that_are_named_exist(page: Path) -> None:
    """In prose; those of whole command lines are parsed above."""
    options = {option for verb in VERBS for option in parser_options(verb)}
    scripts = "".join(path.read_text() for path in ROOT.glob("benchmarks/*.py"))
    known = options | set(re.findall(r'"(--[\w-]+)"', scripts)) | {"--help", "--no-deps", "--config_file", "--config"}
    known.add("--trust-remote-code")  # of transformers, vLLM and MLX-LM
    for code in re.findall(r"`([^`]+)`", prose(page)):
        if not re.match(r"(?:pip|accelerate|git|lm_eval|trl|vllm|transformers|mlx_lm|llama-cli)\b", code):
            unknown = set(re.findall(r"(?<!\S)--[\w-]+", code)) - known
            assert not unknown, f"{name(page)} names {' '.join(unknown)}, which no command has"


def parser_options(verb: str) -> Iterator[str]:
    for action in import_module(f"stocha_hf.cli.{verb}").parser()._actions:
        yield from action.option_strings


def test_the_readme_is_one_screen_and_a_half() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_versions_that_are_written_twice_agree() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["rev"] for repo in hooks["repos"]] == [f"v{pins['ruff']}"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == stocha_hf.__version__


def test_every_command_is_installed_and_every_file_of_the_package_ships() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert sorted(re.findall(r'^stocha-\w+ = "stocha_hf\.cli\.(\w+):main"', project, flags=re.MULTILINE)) == VERBS
    shipped = re.findall(r'"([\w/*.]+)"', re.findall(r"package-data = .*", project)[0])
    for path in (ROOT / "stocha_hf").rglob("*.*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            assert any(path.relative_to(ROOT / "stocha_hf").match(pattern) for pattern in shipped), name(path)
