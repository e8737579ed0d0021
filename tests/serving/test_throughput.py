"""Answers that are written together take far less time than one after the other."""

from tests.model_folder import REPOSITORY, write_tiny_model
from tests.serving.conftest import serving


def test_sixteen_at_once_are_answered_faster(tmp_path, monkeypatch):
    """benchmarks/serving.py measures it on a larger model; what is asked for here leaves room for a busy machine."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import serving as benchmark

    # Deep and narrow: a step of 16 rows costs little more than one of a single row, as on a GPU.
    write_tiny_model(tmp_path, num_layers=16)
    with serving(tmp_path, "--served_model_name", "base", key=None) as running:
        benchmark.measure(running.port, "base", requests=2, tokens=4)
        ratios = []
        while len(ratios) < 3 and max(ratios, default=0) <= 3:
            ratios.append(benchmark.measure(running.port, "base", requests=16, tokens=24).ratio)
    print("ratios:", *(f"{ratio:.2f}" for ratio in ratios))
    assert max(ratios) > 3
