"""Times in turns, and their statistics on numbers made by hand."""

import pytest
import torch

from dyntune.studies.bench.measure import Latency
from dyntune.training.throughput import WARM_UP, Spread, Turns, time_in_turns


@pytest.fixture
def machine(monkeypatch):
    """A clock that moves only when a model runs, and a list of those that ran."""

    class Machine:
        now = 0.0

        def __init__(self):
            self.ran = []

        def model(self, name, seconds):
            def run(images):
                self.ran.append(name)
                self.now += seconds

            return run

    machine = Machine()
    monkeypatch.setattr("dyntune.training.throughput.time.perf_counter", lambda: machine.now)
    return machine


def test_each_round_runs_every_model_in_rotating_order(machine):
    models = {name: machine.model(name, 1) for name in "abc"}
    turns = time_in_turns(models, torch.zeros(2, 3, 4, 4), rounds=4, seconds=0)
    assert "".join(machine.ran) == "a" * WARM_UP + "b" * WARM_UP + "c" * WARM_UP + "abc" + "bca" + "cab" + "abc"
    assert turns["b"] == Turns(((1,), (1,), (1,), (1,)), 2)


def test_a_turn_takes_as_many_calls_as_fill_its_time(machine):
    turns = time_in_turns({"a": machine.model("a", 0.25), "b": machine.model("b", 3)}, torch.zeros(1), seconds=1)
    assert {len(turn) for turn in turns["a"].calls} == {4} and {len(turn) for turn in turns["b"].calls} == {1}
    assert len(turns["a"].calls) == 15


def test_ratios_are_those_of_the_same_round():
    ours = Turns(((1, 3), (4,), (1, 1), (2,), (1,)), images=8)
    dense = Turns(((4,), (8,), (4, 6), (2,), (3,)), images=8)
    # 4 / 2, 8 / 4, 5 / 1, 2 / 2, 3 / 1; quartiles lie within what was seen, also of two rounds
    assert ours.speedup(dense) == Spread(median=2, low=2, high=3)
    assert dense.speedup(dense) == Spread(1, 1, 1)
    assert ours.images_per_second == Spread.of([4, 2, 8, 4, 8])
    assert ours.images_per_second.median == 4


def test_quartiles_of_two_values_lie_between_them():
    assert Spread.of([1.0, 2.0]) == Spread(1.5, 1.25, 1.75)


def test_one_value_is_its_own_spread():
    assert Spread.of([3.0]) == Spread(3, 3, 3)


def test_percentiles_of_single_calls():
    assert Latency.of([float(value) for value in range(100, -1, -1)]) == Latency(50, 90, 99, 101)
    assert Latency.of([1.0, 2.0]) == Latency(1.5, pytest.approx(1.9), pytest.approx(1.99), 2)
    assert Latency.of([2.5]) == Latency(2.5, 2.5, 2.5, 1)
