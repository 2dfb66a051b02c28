"""Every link, anchor, path and command in the repository's Markdown files leads somewhere."""

import os
import re
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

# Comments in the code refer to these by name, as in: docs/model.md, "Residuals".
MODEL_HEADINGS = (
    "Embedding and head",
    "Residuals",
    "Lightning attention",
    "Softmax attention",
    "Mixture of experts",
    "Losses",
    "Packed rows",
    "Initialization",
    "Parameters",
)
HISTORY = "CHANGELOG.md"  # old entries name files that have moved since
LEFT_OUT = ("build", "dist", "runs", "shared")

_FENCE = re.compile(r"^ *(```|~~~)")
_HEADING = re.compile(r"^#{1,6} +(.+?)(?: +#+)?$")
_LINK = re.compile(r"\[[^\]]*\]\(<?([^)>\s]+)>?(?: \"[^\"]*\")?\)")
_SPAN = re.compile(r"`([^`\n]+)`")
_FILE = re.compile(
    r"(?<![\w./~-])((?:mmx_jax|pallas_kernels|tests|configs|benchmarks|docs|launch)/"
    r"(?:[\w.*-]+/)*(?:[\w.*-]+\.(?:py|md|json|png|yaml|sbatch|npz)\b)?)"
)
_CITATION = re.compile(r"([\w/]+\.md),\s+(?:#\s+)?\"([^\"]+)\"")  # in Python: docs/model.md, "Losses"


def visible_files(root: Path, suffix: str) -> list[Path]:
    """Files below `root` that are part of the project: none of an environment, a run or a build."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in LEFT_OUT]
        found += [Path(folder) / name for name in names if name.endswith(suffix)]
    return sorted(found)


def prose_and_code(text: str) -> tuple[list[str], list[str]]:
    """The lines of a page outside and inside of fenced code blocks."""
    lines = ([], [])
    inside = False
    for line in text.splitlines():
        if _FENCE.match(line):
            inside = not inside
        else:
            lines[inside].append(line)
    return lines


def heading_texts(text: str) -> list[str]:
    return [match[1] for line in prose_and_code(text)[0] if (match := _HEADING.match(line))]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page: lower case, spaces as hyphens, no punctuation."""
    found: dict[str, int] = {}
    result = set()
    for heading in heading_texts(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        count = found.get(anchor, 0)
        found[anchor] = count + 1
        result.add(f"{anchor}-{count}" if count else anchor)
    return result


def broken_links(page: Path) -> list[str]:
    """Relative links of a page whose file or anchor does not exist."""
    text = page.read_text()
    prose = _SPAN.sub("", "\n".join(prose_and_code(text)[0]))
    broken = []
    for target in _LINK.findall(prose):
        if re.match(r"[a-z][a-z+.-]*:", target):
            continue  # another site
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists():
            broken.append(target)
        elif anchor and (file.suffix != ".md" or anchor not in anchors(file.read_text())):
            broken.append(target)
    return broken


def missing_paths(page: Path, root: Path) -> list[str]:
    """Paths in backticks or code blocks of a page that look like files of the repository and are not there."""
    prose, code = ("\n".join(lines) for lines in prose_and_code(page.read_text()))
    names = [name for piece in (*_SPAN.findall(prose), code) for name in _FILE.findall(piece)]
    return [name for name in names if not (any(root.glob(name.rstrip("/"))) if "*" in name else (root / name).exists())]


def home_files(page: Path) -> list[str]:
    """The last column of the glossary's tables."""
    rows = [line.strip().strip("|").split("|") for line in page.read_text().splitlines() if line.startswith("|")]
    return [name for cells in rows for name in _SPAN.findall(cells[-1])]


PAGES = visible_files(REPOSITORY, ".md")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def test_the_pages_are_found():
    names = {str(page.relative_to(REPOSITORY)) for page in PAGES}
    assert {"README.md", "BUILD.md", "docs/model.md", "docs/architecture.md", "docs/glossary.md"} <= names


@pages
def test_links_and_anchors_resolve(page):
    assert broken_links(page) == []


@pages
def test_named_files_exist(page):
    if page.name != HISTORY:
        assert missing_paths(page, REPOSITORY) == []


@pages
def test_commands_exist(page):
    """Flags of train.py and infer.py, and targets of make, in the code blocks of a page."""
    if page.name == HISTORY:
        return
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    defined = {
        name: set(re.findall(r"flags\.DEFINE_\w+\(\s*\"(\w+)\"", (REPOSITORY / f"mmx_jax/cli/{name}.py").read_text()))
        for name in ("train", "infer")
    }
    code = "\n".join(prose_and_code(page.read_text())[1])
    for command in re.sub(r"\\\n", " ", code).splitlines():
        command = command.split("  #")[0]
        assert set(re.findall(r"(?<![\w/.-])make ([a-z]+)\b", command)) <= targets, command
        for name, flags in defined.items():
            if f"{name}.py" in command:
                given = re.findall(r"\s--(?:no)?(\w+)", command.split(f"{name}.py", 1)[1])
                assert set(given) <= flags | {"help", "helpfull"}, command


def test_headings_that_the_code_refers_to_exist():
    headings = heading_texts((REPOSITORY / "docs/model.md").read_text())
    assert [name for name in MODEL_HEADINGS if name not in headings] == []


def test_citations_in_the_code_resolve():
    """A comment that says `docs/model.md, "Losses"` names a page and a heading of it."""
    for folder in ("mmx_jax", "pallas_kernels", "configs", "benchmarks"):
        for path in visible_files(REPOSITORY / folder, ".py"):
            for name, heading in _CITATION.findall(path.read_text()):
                page = REPOSITORY / name
                assert page.exists() and heading in heading_texts(page.read_text()), f"{path}: {name}, {heading!r}"


def test_glossary_is_alphabetical_and_its_home_files_exist():
    page = REPOSITORY / "docs/glossary.md"
    names = home_files(page)
    assert len(names) >= 60
    assert [name for name in names if not (REPOSITORY / name).exists()] == []
    terms = re.findall(r"^\| \*\*(.+?)\*\*", page.read_text(), re.MULTILINE)
    assert terms == sorted(terms, key=lambda term: re.sub(r"[^a-z0-9 ]", "", term.lower()))


def test_the_checks_see_what_is_broken(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/there.md").write_text("# One: two `three`\n\n## Twice\n\n## Twice\n\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Own\n[a](docs/there.md) [b](docs/there.md#one-two-three) [c](docs/there.md#twice-1) [d](#own)\n"
        "[site](https://example.org/x#y) `[code](nowhere.md)`\n"
        "[e](docs/gone.md) [f](docs/there.md#no-heading) [g](#missing)\n"
        "`docs/there.md` `docs/gone.md` `docs/*.md` `python tests/gone.py -x` `docs/` `other/file.py`\n"
        "```bash\npython benchmarks/gone.py\n```\n"
    )
    assert broken_links(page) == ["docs/gone.md", "docs/there.md#no-heading", "#missing"]
    assert missing_paths(page, tmp_path) == ["docs/gone.md", "tests/gone.py", "benchmarks/gone.py"]
    page.write_text("| **term** | meaning | `docs/there.md`, `docs/gone.md` |\n")
    assert home_files(page) == ["docs/there.md", "docs/gone.md"]


def test_citation_has_the_version_of_the_package():
    version = re.search(r'^version = "(.+)"$', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    assert version and f"\nversion: {version[1]}\n" in (REPOSITORY / "CITATION.cff").read_text()
