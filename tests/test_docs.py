"""The code of the documentation is run, and its printed results are compared."""

from __future__ import annotations

import doctest
import io
import os
import re
import shlex
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import commgraph as cg
from commgraph import cli

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


def test_the_programs_of_the_elastic_page_run(tmp_path: Path) -> None:
    """Each in a world of one, which grows by two processes."""
    lose, _, grow, newcomer = (code for kind, code in blocks("docs/how-to/elastic.md") if kind == "python")
    (tmp_path / "newcomer.py").write_text(newcomer)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for code, then in ((lose, "print(steps)"), (grow, "print(context.world_size)")):
        done = subprocess.run(
            [sys.executable, "-c", f"{code}\n{then}"], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=90, check=True
        )
        assert done.stdout.strip() in ("100", "3"), done.stderr


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
