"""benchmarks/tables.py: ctgan.py beside the package ctgan."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PEER = ROOT / "build" / "ctgan-0.12.1"


def tables_written():
    return {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks").glob("*.md")}


@pytest.mark.skipif(not PEER.exists(), reason="benchmarks/tables.py has not installed ctgan here")
def test_every_figure_of_both_is_there_and_nothing_is_written():
    command, before = (
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--smoke"],
        tables_written(),
    )
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tables_written() == before
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line[:1] == "|"]
    figures = {tuple(row[:2]): row[2:] for row in rows}
    for model in ("ctgan", "tvae"):
        for what in ("set-up", "update", "whole fit, 2 epochs", "10,000 rows sampled"):
            this, peer, ratio = map(float, figures[model, what][:3])
            assert ratio == pytest.approx(peer / this, rel=0.02)
        for contestant in (0, 1):  # of 600 rows an epoch is one update
            update, whole = (
                float(figures[model, what][contestant])
                for what in ("update", "whole fit, 2 epochs")
            )
            assert whole > 1.98 * update > 0
        for measure in ("column_shapes", "pair_trends", "rare_categories_kept", "f1_mean"):
            assert all(0 < float(x) <= 1 for x in figures[model, measure])
    assert all(0 < float(x) < 1 for x in figures["ctgan", "condition_obeyed"][:2])
    (memory,) = (row for row in rows if row[0] == "600")
    assert float(memory[3]) == pytest.approx(float(memory[2]) / float(memory[1]), rel=0.1)
