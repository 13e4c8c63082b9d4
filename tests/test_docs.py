"""The code of the documentation is run, and its printed results are compared."""

from __future__ import annotations

import ast
import doctest
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import commgraph as cg
from commgraph import cli, layout
from commgraph.testing import spmd
from tests.processes import Processes, outputs

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```(python|text)\n(.*?)```", re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / page).read_text())


def test_the_prompts_of_the_tutorial_answer_as_printed() -> None:
    text = "\n".join(code for kind, code in blocks("docs/tutorial/first_steps.md") if kind == "python" and code.startswith(">>>"))
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    result = runner.run(parser.get_doctest(text, {}, "first_steps", None, None))
    assert result.attempted > 5
    assert result.failed == 0


def test_the_programs_of_the_tutorial_print_what_the_page_says() -> None:
    found = blocks("docs/tutorial/first_steps.md")
    names: dict[str, Any] = {}
    compared = 0
    for (kind, code), (next_kind, output) in zip(found, [*found[1:], ("", "")], strict=True):
        if kind != "python" or code.startswith(">>>") or "from_env" in code:
            continue
        printed = io.StringIO()
        if "# raises" in code:
            with pytest.raises((ValueError, TypeError)):
                exec(code, names)
        else:
            with redirect_stdout(printed):
                exec(code, names)
        if next_kind == "text":
            assert printed.getvalue() == output
            compared += 1
    assert compared >= 3


def test_the_programs_of_the_elastic_page_run(tmp_path: Path, processes: Processes) -> None:
    """Each in a world of one, which grows by two processes."""
    lose, _, grow, newcomer = (code for kind, code in blocks("docs/how-to/elastic.md") if kind == "python")
    (tmp_path / "newcomer.py").write_text(newcomer)
    programs = (f"{lose}\nprint(steps)", f"{grow}\nprint(context.world_size)")
    assert outputs([processes.start("-c", text, cwd=tmp_path) for text in programs]) == ["100\n", "3\n"]


def test_the_tests_of_the_spmd_page_pass() -> None:
    names: dict[str, Any] = {}
    for kind, code in blocks("docs/how-to/test-with-spmd.md"):
        if kind == "python":
            exec(code, names)
    tests = {name: value for name, value in names.items() if name.startswith("test_")}
    assert len(tests) >= 4
    for test in tests.values():
        test()


def test_the_code_of_the_page_on_checkpoints_runs() -> None:
    names: dict[str, Any] = {}
    with warnings.catch_warnings():  # the page hides one
        for kind, code in blocks("docs/how-to/checkpoints.md"):
            if kind == "python":
                exec(code, names)
    one, half = names["one"], names["half"]
    assert half[1] < one[1]  # what torch's own function sees


def test_the_ten_lines_of_the_readme_run_under_torchrun(tmp_path: Path) -> None:
    (code,) = (code for kind, code in blocks("README.md") if kind == "python")
    app = tmp_path / "app.py"
    app.write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(app)]
    done = subprocess.run(launcher, capture_output=True, text=True, timeout=100, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, done.stderr
    # Four processes write to one pipe: a line's end may come after the next one's beginning.
    lines = sorted(re.findall(r"rank \d: .*?draft tp \d", done.stdout))
    assert len(lines) == 4
    assert lines[2] == "rank 2: stage 1, tp ranks (2, 3), sum [2.0, 2.0, 2.0, 2.0], draft tp 1"


def test_the_picture_of_the_readme_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    (picture,) = (text for kind, text in blocks("README.md") if kind == "text")
    command, _, printed = picture.partition("\n")
    assert cli.main(command.split()[2:]) == 0
    assert capsys.readouterr().out == printed


def test_the_numbers_of_the_readme_are_in_the_benchmarks() -> None:
    def rows(page: str) -> list[list[str]]:
        lines = [line.replace("*", "").strip("| ").split("|") for line in (ROOT / page).read_text().splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in line] for line in lines]

    heads, _, *numbers = rows("README.md")
    names, _, *measured = rows("docs/benchmarks.md")[:5]
    columns = [next(place for place, name in enumerate(names) if name.startswith(head)) for head in heads[1:]]
    assert numbers == [[row[0], *(row[column] for column in columns)] for row in measured]


def test_the_table_from_vllm_names_only_what_exists() -> None:
    text = (ROOT / "docs/how-to/coming-from-vllm.md").read_text()
    owners = {"ctx": cg.ParallelContext, "world": cg.World, "group": cg.GroupCoordinator, "World": cg.World}
    checked = 0
    for row in text.splitlines():
        if not row.startswith("|"):
            continue
        for owner, attribute in re.findall(r"`(ctx|world|group|World)\.([a-z_]+)", row):
            # `group` and `store` of a World are set when it is made.
            assert hasattr(owners[owner], attribute) or attribute in str(cg.World.__doc__), row
            checked += 1
    assert checked > 30


def test_the_reference_lists_every_member_of_a_coordinator() -> None:
    listed = re.findall(
        r"^\.\. auto(?:method|property):: GroupCoordinator\.(\w+)$", (ROOT / "docs/reference/coordinator.md").read_text(), re.MULTILINE
    )
    assert sorted(listed) == [name for name in dir(cg.GroupCoordinator) if not name.startswith("_")]


def test_the_commands_of_the_page_on_layouts_answer_as_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    compared = 0
    for _, text in blocks("docs/how-to/layouts.md"):
        command, _, printed = text.partition("\n")
        argv = shlex.split(command.replace("layout.svg", str(tmp_path / "layout.svg")))
        assert argv[:3] == ["$", "commgraph", "layout"]
        assert cli.main(argv[2:]) == 0
        shown = capsys.readouterr().out
        # The page folds long lines and leaves out pictures.
        for part in printed.split("...\n"):
            assert " ".join(part.split()) in " ".join(shown.split())
            compared += bool(part)
    assert compared == 2
    assert (tmp_path / "layout.svg").read_text() == (ROOT / "docs/pictures/layout.svg").read_text()


def colon_of(text: str) -> bool:
    """Whether napoleon would take what stands before a colon in the first line for a type."""
    line = re.sub(r"``.*?``|`.*?`", "", text.strip().partition("\n")[0])
    return bool(re.search(r":\s", line) or line.endswith(":"))


def docstrings_with_a_type(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
            if any("property" in ast.unparse(decorator) for decorator in node.decorator_list) and colon_of(doc):
                yield node.name
            if (found := re.search(r"^(?:Returns|Yields):\n\s*(.*)", doc, re.MULTILINE)) and colon_of(found[1]):
                yield node.name
        if isinstance(node, ast.ClassDef | ast.Module):
            for before, after in itertools.pairwise(node.body):
                said = after.value if isinstance(before, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr) else None
                if isinstance(said, ast.Constant) and colon_of(str(said.value)):
                    yield ast.unparse(before).partition(" ")[0]


def test_no_docstring_begins_with_what_sphinx_takes_for_a_type() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} {name}"
        for path in sorted((ROOT / "commgraph").rglob("*.py"))
        for name in docstrings_with_a_type(ast.parse(path.read_text()))
    ]
    assert not wrong, "\n".join(wrong)
    sample = """
class A:
    x = 1
    "One: two."
    @property
    def y(self):
        "Three: four."
    def z(self):
        "S.\\n\\nReturns:\\n    Five: six."
"""
    assert list(docstrings_with_a_type(ast.parse(sample))) == ["x", "y", "z"]


PICTURES = {
    "eight.svg": "8 --tp 2 --pp 2 --nodes 2",
    "hierarchical.svg": "8 --axes host=2,position=4 --nodes 2",
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_what_the_command_draws(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["layout", *PICTURES[name].split(), "--svg", str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_text() == (ROOT / "docs/pictures" / name).read_text()
    shown = [page for page in (ROOT / "docs").rglob("*.md") if f"pictures/{name}" in page.read_text()]
    assert shown


@pytest.mark.parametrize(
    ("page", "ranks"),
    [("coming-from-megatron", 8), ("coming-from-sglang", 8), ("coming-from-devicemesh", 8), ("coming-from-mpi4py", 8), ("train", 4)],
)
def test_the_program_of_a_page_runs(page: str, ranks: int) -> None:
    names: dict[str, Any] = {}
    for kind, code in blocks(f"docs/how-to/{page}.md"):
        if kind == "python":
            exec(code, names)
    found = spmd(names["program"], ranks)
    expected = {
        "coming-from-megatron": ([2.0] * 4, (3, 7)),
        "coming-from-sglang": (10, 1, 8),
        "coming-from-devicemesh": ([2.0] * 3, (2, 3, 6, 7), 1, {"pp": 1, "dp": 1, "tp": 1}),
        "coming-from-mpi4py": ([22.0, 22.0], {"a": 7}, [6.0, 6.0]),
        "train": found[0],  # every rank returns the same losses
    }
    assert found[-1] == expected[page]


@pytest.mark.long  # FSDP over meshes of two contexts is in the suite
def test_the_program_of_the_page_on_torch_groups_runs(tmp_path: Path) -> None:
    (code,) = (code for kind, code in blocks("docs/how-to/torch-groups.md") if kind == "python")
    app = tmp_path / "fsdp.py"
    app.write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(app)]
    done = subprocess.run(launcher, capture_output=True, text=True, timeout=100, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, done.stderr
    assert "every rank holds half of (16, 8), all agree: True" in done.stdout


def test_every_environment_variable_is_in_the_reference_and_the_other_way_round() -> None:
    pattern = re.compile(r"\bCOMMGRAPH_[A-Z][A-Z_]*[A-Z]\b")
    read = {name for path in (ROOT / "commgraph").rglob("*.py") for name in pattern.findall(path.read_text())}
    native = {name for path in (ROOT / "commgraph").rglob("*.c") for name in re.findall(r'getenv\("(\w+)"\)', path.read_text())}
    page = (ROOT / "docs/reference/environment.md").read_text()
    assert set(pattern.findall(page)) == read | {name for name in native if name.startswith("COMMGRAPH_")}
    assert "COMMGRAPH_ADDRESS" in read


def test_every_how_to_links_its_reference() -> None:
    pages = sorted((ROOT / "docs/how-to").glob("*.md"))
    assert len(pages) > 15
    assert not [page.name for page in pages if not re.search(r"^Reference: \[", page.read_text(), re.MULTILINE)]


def test_every_page_is_in_a_table_of_contents() -> None:
    listed = (ROOT / "docs/index.md").read_text() + (ROOT / "docs/reference/index.md").read_text()
    pages = [str(page.relative_to(ROOT / "docs").with_suffix("")) for page in (ROOT / "docs").rglob("*.md")]
    assert not [
        page for page in pages if page != "index" and f"\n{page.removeprefix('reference/')}\n" not in listed and f"\n{page}\n" not in listed
    ]


def test_the_reference_lists_every_member_of_a_layout() -> None:
    page = (ROOT / "docs/reference/layout.md").read_text()
    listed = re.findall(r"^\.\. auto(?:method|property):: Layout\.(\w+)$", page, re.MULTILINE)
    assert sorted([*listed, "first_rank", "world_size"]) == [name for name in dir(cg.Layout) if not name.startswith("_")]
    assert set(re.findall(r"^\.\. auto(?:class|function):: (\w+)$", page, re.MULTILINE)) == set(layout.__all__) - {"GroupSpec"}
