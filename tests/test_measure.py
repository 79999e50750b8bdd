"""What the benches share: a child that trains and what it took, turns, medians and tables."""

import pytest

from scripts.bench.lora import main as bench_lora
from scripts.bench.measure import in_turns, median, print_table, run_child


def test_variants_take_turns_and_the_median_is_over_all_their_steps(capsys):
    order = []
    found = in_turns(2, {name: lambda name=name: order.append(name) or len(order) for name in "ab"})
    assert order == ["a", "b", "a", "b"] and found == {"a": [1, 3], "b": [2, 4]}
    assert median([{"x": [1, 9]}, {"x": [2, 3, 4]}], "x") == 3 and median([{"x": 5}, {"x": 7}], "x") == 6
    print_table(("a", "b"), [(1, "x")])
    assert capsys.readouterr().out == "| a | b |\n|---|---|\n| 1 | x |\n"


def test_a_child_tells_its_peak_memory_or_why_it_failed():
    assert run_child(["-c", "block = b'1' * (100 << 20)"], threads=1) > 100 << 20
    with pytest.raises(RuntimeError, match="failed:(.|\n)*ZeroDivisionError"):
        run_child(["-c", "1 / 0"])


@pytest.mark.slow
def test_a_bench_measures_what_the_trainer_took(capsys):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    numbers = {"steps": 3, "rounds": 1, "max_seq_len": 64, "threads": 1, **shape}
    assert bench_lora([f"--{name}={value}" for name, value in numbers.items()]) == 0
    _, _, columns, _, *rows = capsys.readouterr().out.splitlines()
    assert columns.startswith("| trained | s/step | CPU seconds/step |") and len(rows) == 3
    sizes = [float(row.split("|")[-2].removesuffix("MB ")) for row in rows]
    assert sizes[0] > sizes[1] >= sizes[2]
