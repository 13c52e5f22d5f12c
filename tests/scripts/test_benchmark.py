"""scripts/benchmark.py at small sizes; what it measures there says nothing."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import benchmark  # noqa: E402

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
SMALL = ["--batch=2", "--length=8", "--vocabulary=3000", "--width=16", "--chunk-size=1000", "--repeats=1"]


def _in_this_process(*arguments):
    result = CliRunner().invoke(benchmark.app, [*arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_token_log_probs_prints_a_row_for_every_case(monkeypatch):
    monkeypatch.setattr(benchmark, "_in_own_process", lambda *arguments: json.loads(_in_this_process(*arguments)))
    table = _in_this_process("token-log-probs", *SMALL).splitlines()
    assert "2 x 8 tokens, 3000 in the vocabulary, width 16, chunks of 1000" in table[0]
    assert [line.split()[0] for line in table[-len(benchmark.CASES) :]] == list(benchmark.CASES)
    rows = json.loads(_in_this_process("token-log-probs", *SMALL, "--json"))
    for case, (naive, chunked) in rows.items():
        assert min(naive["mib"], naive["seconds"], chunked["mib"], chunked["seconds"]) > 0
        assert chunked["value"] < 1e-5
        assert chunked["gradient"] < (5e-3 if case.startswith("bfloat16") else 1e-4)


def test_each_form_has_its_own_process():
    row = benchmark._in_own_process("token-log-probs", "--only=chunked:hidden-states-backward", *SMALL)
    assert row.keys() == {"mib", "seconds", "value", "gradient"}
