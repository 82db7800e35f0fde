"""The figure of accuracy over MACs: every method is named whole, however many and long the names are."""

import pytest

from dyntune.core.timing import Throughput
from dyntune.studies.compare import Row
from dyntune.studies.pictures.accuracy_macs import tradeoff_figure
from dyntune.training.evaluate import Evaluation


def row(method, macs, accuracy):
    test = Evaluation(10, {"accuracy": accuracy, "loss": 0.1}, 1.0, {}, macs)
    return Row(method, test, 5, 20, 100_000_000, Throughput(1.0, 1.0, 1.0, 1.0), 1.0)


@pytest.mark.parametrize("names", [("linear", "lora", "dyt"), tuple(f"dyt:rate=0.{'1' * 60}{n}" for n in range(14))])
def test_every_name_is_in_the_legend_and_on_the_page(names):
    figure = tradeoff_figure([row(name, 5e7 + 1e6 * n, 0.5 + n / 100) for n, name in enumerate(names)])
    figure.canvas.draw()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*names, "MACs of the untouched backbone"]
    page = figure.bbox
    for text in legend.get_texts():
        box = text.get_window_extent()
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    (axes,) = figure.axes
    points = [tuple(points.get_offsets()[0]) for points in axes.collections]
    assert points == [pytest.approx((50 + n, 50 + n)) for n in range(len(names))]
    assert axes.bbox.height > 0.4 * page.height or len(names) > 6
