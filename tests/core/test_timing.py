"""Times in turns, and their statistics on numbers made by hand."""

import pytest
import torch

from dyntune.core.timing import (
    WARM_UP,
    Latency,
    Spread,
    Turns,
    best_of_few,
    measure_throughput,
    time_in_turns,
    time_queued,
)


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
    monkeypatch.setattr("dyntune.core.timing.time.perf_counter", lambda: machine.now)
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


@pytest.mark.parametrize(
    ("taken", "warm", "rounds"),
    [(0.3, WARM_UP, 15), (2, 1, 6), (9, 1, 3), (60, 1, 3)],  # until 2 x 10 s are over, warm after 1 s
)
def test_slow_models_are_timed_in_fewer_rounds(machine, taken, warm, rounds):
    models = {name: machine.model(name, taken) for name in "ab"}
    turns = time_in_turns(models, torch.zeros(1), rounds=15, limit=10)
    assert "".join(machine.ran).startswith("a" * warm + "b" * warm + "ab" + "ba")
    assert {len(own.calls) for own in turns.values()} == {rounds} and len(machine.ran) == 2 * (warm + rounds)
    assert len(time_in_turns(models, torch.zeros(1), rounds=2, limit=0)["a"].calls) == 2


def test_ratios_are_those_of_the_same_round():
    ours = Turns(((1, 3), (4,), (1, 1), (2,), (1,)), images=8)
    dense = Turns(((4,), (8,), (4, 6), (2,), (3,)), images=8)
    # 4 / 2, 8 / 4, 5 / 1, 2 / 2, 3 / 1; quartiles lie within what was seen, also of two rounds
    assert ours.speedup(dense) == Spread(median=2, low=2, high=3)
    assert dense.speedup(dense) == Spread(1, 1, 1)
    assert ours.images_per_second == Spread.of([4, 2, 8, 4, 8])
    assert ours.images_per_second.median == 4


def test_throughput_compares_runs_of_the_same_round(monkeypatch):
    """On a clock that the models themselves move: the machine slows down by half in the middle, the ratio stays."""
    clock = {"now": 0.0, "calls": 0}

    def takes(seconds):
        def run(images):
            clock["calls"] += 1
            clock["now"] += seconds * (1 if clock["calls"] < 60 else 2)

        return run

    monkeypatch.setattr("dyntune.core.timing.time.perf_counter", lambda: clock["now"])
    images = torch.zeros(8, 3, 4, 4)
    models = {"one": takes(0.01), "four": takes(0.04)}
    speeds = measure_throughput(models, images, reference="one", rounds=9, seconds=0.08)
    assert clock["calls"] > 60, "the machine has slowed down on the way"
    assert speeds["one"].speedup == 1
    assert speeds["four"].speedup == pytest.approx(0.25)
    assert speeds["four"].speedup_low == pytest.approx(0.25) and speeds["four"].speedup_high == pytest.approx(0.25)
    assert speeds["one"].images_per_second in (pytest.approx(800), pytest.approx(400))


def test_queued_calls_are_as_many_as_the_last_of_the_warm_up_says(machine):
    """A model that is slow at first: the third call decides, and a turn is the mean of its calls."""
    began = [5, 5]

    def slow_at_first(images):
        machine.model("a", began.pop() if began else 0.25)(images)

    models = {"a": slow_at_first, "b": machine.model("b", 3)}
    turns = time_queued(models, torch.zeros(2, 3, 4, 4), rounds=2, seconds=1)
    assert "".join(machine.ran) == "aaabbb" + "aaaab" + "baaaa"
    assert turns == {"a": Turns(((0.25,), (0.25,)), 2), "b": Turns(((3,), (3,)), 2)}


def test_the_quickest_call_of_each_way_counts(machine):
    taken = {"a": iter([9, 2, 3]), "b": iter([1, 4, 7])}
    ways = {name: lambda x, name=name: machine.model(name, next(taken[name]))(x) for name in taken}
    assert best_of_few(ways, torch.zeros(1), rounds=3) == {"a": 2, "b": 1}
    assert "".join(machine.ran) == "ab" + "ba" + "ab"


def test_quartiles_of_two_values_lie_between_them():
    assert Spread.of([1.0, 2.0]) == Spread(1.5, 1.25, 1.75)


def test_one_value_is_its_own_spread():
    assert Spread.of([3.0]) == Spread(3, 3, 3)


def test_percentiles_of_single_calls():
    assert Latency.of([float(value) for value in range(100, -1, -1)]) == Latency(50, 90, 99, 101)
    assert Latency.of([1.0, 2.0]) == Latency(1.5, pytest.approx(1.9), pytest.approx(1.99), 2)
    assert Turns(((1.0,), (2.0,)), images=8).latency == Latency.of([1.0, 2.0])
    assert Latency.of([2.5]) == Latency(2.5, 2.5, 2.5, 1)
