"""What is predicted of each run, behind all that the scheduler served before."""

from __future__ import annotations

from pathlib import Path

from bench.live import predict
from bench.live.cluster import Shape
from bench.live.predict import PredictSpec
from bench.live.workload import Lengths
from simulation.sizing.closed_form import Split
from tests.simulation.replay.models import cluster_model

SPEC = PredictSpec(workers=2, requests=12, repeats=2)
SHAPE = Shape(prefill=1, decode=1, settings={}, model=Path("none"))


def test_each_run_has_its_own_outcomes_and_not_those_of_the_warm_up() -> None:
    lengths = Lengths(prompt_tokens=150, output_tokens=20)
    model = cluster_model(block_size_tokens=32)
    runs = [
        run
        for name in ("prompts", "outputs")
        for run in predict._runs(SPEC, Split(prefill=1, decode=1), model, name, lengths)
    ]
    assert [run.workload for run in runs] == ["prompts", "prompts", "outputs", "outputs"]
    assert runs[0].trace == runs[1].trace
    assert runs[0].seed != runs[1].seed
    simulated = predict._simulated(SPEC, model, runs, SHAPE)
    for run, outcomes in zip(runs, simulated, strict=True):
        assert [each.output_tokens for each in outcomes] == [each.output_tokens for each in run.trace.arrivals]
        assert all(each.end == "finished" for each in outcomes)
