import re

import pytest

from placesearch.cli.tree import modules_of, short_count, tree_lines
from placesearch.models.sites import Site
from placesearch.records import Cost
from placesearch.reporting.tables import sites_frame

RESNET = [f"layer{stage}.{block}{end}" for stage in range(1, 5) for block in range(2) for end in (".bn2", "")]
DENSENET = [
    "features.relu0",
    *(f"features.denseblock1.denselayer{n}.{end}" for n in (1, 2) for end in ("relu2", "conv2")),
]
MOBILENET = ["features.3.block.2.1", "features.3", "features.12.2"]
NETWORKS = [RESNET, DENSENET, MOBILENET, ["conv1"], ["a.b.c"], ["features", "features.0"]]


def frame(names, blocks=("se", "cbam"), macs=1_230_336):
    sites = [Site(name, frozenset({"stage", "block"}), 64, 56, 56) for name in names]
    return sites_frame(sites, {block: [Cost(macs + n, macs, 500 + n) for n in range(len(names))] for block in blocks})


def named(lines):
    """Put the names of the sites together again, as a reader would: the way to each line with a map."""
    way, found = [], []
    for line in lines[2:]:
        guides, label, rest = re.fullmatch(r"((?:[│├└|` ][─ -] )*)(\S+)(.*)", line).groups()
        way[len(guides) // 3 :] = [label]
        if "64x56x56" in rest:
            found.append(".".join(way))
    return found


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("names", NETWORKS)
def test_each_site_is_a_line_and_the_way_to_it_is_its_name(names, ascii_only):
    lines = tree_lines(frame(names), 200, ascii_only=ascii_only)
    assert sorted(named(lines)) == sorted(names)
    assert "\n".join(lines).isascii() == (ascii_only or len(lines) <= 3)


def test_modules_stand_in_the_order_of_the_data_and_lonely_ones_share_a_line():
    labels = [re.sub("^[│├└─ ]*", "", line).split()[0] for line in tree_lines(frame(DENSENET), 200)[2:]]
    assert labels == [
        "features",
        "relu0",
        "denseblock1",
        "denselayer1",
        "relu2",
        "conv2",
        "denselayer2",
        "relu2",
        "conv2",
    ]
    labels = [re.sub("^[│├└─ ]*", "", line).split()[0] for line in tree_lines(frame(MOBILENET), 200)[2:]]
    assert labels == ["features", "3", "block.2.1", "12.2"]
    assert [part.label for part in modules_of(["a.b.c"]).parts.values()] == ["a.b.c"]


def test_a_site_has_kinds_map_and_the_costs_of_each_block():
    lines = tree_lines(frame(["stem", "layer1"], ("se", "eca"), 2048), 80)
    assert lines[0].split() == ["se", "eca"]
    assert lines[1].split() == ["site", "kinds", "map", "macs/params", "macs/params"]
    assert lines[2].split() == ["stem", "block", "stage", "64x56x56", "2,048/500", "2,048/500"]
    assert lines[3].split() == ["layer1", "block", "stage", "64x56x56", "2,049/501", "2,049/501"]


def test_costs_are_rounded_where_exact_ones_do_not_fit():
    names = ["features.1.0.block.6", "features.1.0", "features.1.1"]
    wide = tree_lines(frame(names), 200)
    width = max(map(len, wide)) - 1
    narrow = tree_lines(frame(names), width)
    assert "1,230,336/500" in "\n".join(wide)
    assert "1.23M/500" in "\n".join(narrow)
    assert max(map(len, narrow)) <= width
    assert named(narrow) == named(wide)
    assert tree_lines(frame(names), 10) == narrow  # nothing is ever cut


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00K"),
        (9_999, "10.0K"),
        (999_400, "999K"),
        (999_999, "1.00M"),
        (12_345_678_901, "12.3G"),
    ],
)
def test_rounded_counts_have_three_digits(count, text):
    assert short_count(count) == text
