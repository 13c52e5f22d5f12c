"""scripts/benchmark.py at small sizes; what it measures there says nothing."""

import json
from pathlib import Path

import benchmark
import pytest
from typer.testing import CliRunner

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


SHORT = ["samples_per_epoch=8", "sample_batch_size=8", "max_completion_length=6", "mixed_precision=no"]


@pytest.mark.parametrize("command", ["grpo", "dpo"])
def test_text_epochs_are_measured_beside_their_bare_passes(command):
    printed = _in_this_process(command, "--epochs=1", "--json", *SHORT).splitlines()  # progress bars too
    row = json.loads(next(line for line in printed if line.startswith("{")))
    assert row["samples"] == 8
    assert 0 < row["low"] == row["ratio"] == row["high"] == pytest.approx(row["epoch"] / row["bare"])
    assert row["tokens_per_second"] > 0


def test_text_epochs_are_printed_as_a_table(capsys):
    row = {"samples": 8, "epoch": 2.0, "bare": 1.6, "ratio": 1.25, "low": 1.2, "high": 1.3}
    benchmark._print_text([row | {"tokens_per_second": 1234.4, "peak_mib": 900}], as_json=False)
    head, line = capsys.readouterr().out.splitlines()
    assert "ratio (median, min-max)  trained tokens/s" in head
    assert line.split() == ["8", "2.00", "1.60", "1.250", "(1.200-1.300)", "1234", "900"]


def test_the_passes_of_a_language_policy_are_all_counted(tmp_path):
    from bare_passes import LanguagePasses, called_before_collecting

    from diffusion_align.pipelines.configuration import read_config
    from diffusion_align.pipelines.run import run

    seen = []
    settings = ["epochs=2", f"output_dir={tmp_path / 'run'}", "grid_every=0", "micro_batch_size=4", "beta=0.1", *SHORT]
    with (
        LanguagePasses() as passes,
        called_before_collecting(
            lambda trainer: (seen.append((list(passes._sampled), list(passes._scored))), passes.clear())
        ),
    ):
        run(read_config("grpo_tiny", settings))
    assert seen[0] == ([], [])
    sampled, scored = seen[1]
    assert [(batch, steps) for batch, _, steps in sampled] == [(8, 6)]
    kinds = [(batch, gradient, reference) for batch, _, _, gradient, reference in scored]
    assert kinds == [(8, False, True), (4, True, False), (4, True, False)]  # the reference once, two updates


def test_what_a_report_costs():
    printed = _in_this_process("report", "epochs=2", "samples_per_epoch=8", "sampler.steps=2", "--many=20", "--json")
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    assert found["times"] >= 2, "at the start and at the end"
    assert 0 < found["seconds"] < found["share"] * 1e3
