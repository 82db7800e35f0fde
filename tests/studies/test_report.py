"""Tables of a report in Markdown and HTML."""

from pathlib import Path

from dyntune import tune
from dyntune.backbones.hosts import create_backbone
from dyntune.data import load_data
from dyntune.studies.report import Table, _page, markdown_table, token_pictures, trained_with
from dyntune.training.settings import TrainSettings

TABLE = Table("On <large> models", ("model", "per image"), [("dyt:rate=0.5,a&b", "9.1 ms")], "Random weights.")


def test_a_table_in_markdown():
    assert markdown_table(TABLE) == "| model | per image |\n| --- | ---: |\n| `dyt:rate=0.5,a&b` | 9.1 ms |"


def test_cells_of_the_page_say_their_column_for_screens_without_room_for_a_head():
    page = _page("Title", "Intro.", (TABLE, TABLE), {"a.png": "A picture."})
    assert page.count('<td data-column="per image"><span>9.1 ms</span></td>') == 2
    assert "dyt:rate=0.5,<wbr>a&amp;b" in page
    assert page.count("<h2>On &lt;large&gt; models</h2>") == 1, "the first table stands under the page's title"
    assert "content: attr(data-column)" in page and page.count("Random weights.") == 2


def test_pictures_say_what_is_seen_and_open_by_themselves():
    page = _page("A & B", "One.", [TABLE], {"tokens.png": "Patches of <one> image."})
    assert '<a href="tokens.png" title="open the picture by itself"><img src="tokens.png" alt="Patches of' in page
    assert 'alt="Patches of &lt;one&gt; image."' in page


def test_the_page_follows_the_readers_choice_of_light_or_dark():
    page = _page("Title", "One.", [TABLE], {})
    assert "color-scheme: light dark" in page and "prefers-color-scheme: dark" in page


def test_a_report_says_what_decided_its_figures_and_not_where_the_weights_lie():
    told = trained_with("digits", "vit_tiny", Path("/somewhere/vit.npz"), TrainSettings(lr=2e-3, workers=3))
    assert (told["data"], told["model"], told["weights"]) == ("digits", "vit_tiny", "vit.npz")
    assert told["settings"]["lr"] == 2e-3 and told["settings"]["seed"] == 0 and "workers" not in told["settings"]


def test_pictures_of_clips_are_of_their_frames():
    data = load_data("motion")
    backbone = create_backbone("frames:vit_mini_patch4_32.dyntune", frames=3, num_classes=len(data.classes))
    model = tune(backbone, "dyt:rate=0.5")
    found = token_pictures("dyt:rate=0.5", model, data.test)
    assert list(found) == ["tokens-dyt-rate-0.5.png"]
    figure, caption = found["tokens-dyt-rate-0.5.png"]
    assert figure.get_size_inches()[0] > 0 and "of each frame the patches" in caption
