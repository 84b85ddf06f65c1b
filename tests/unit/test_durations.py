# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Durations as people write them."""

from __future__ import annotations

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import durations
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import InvalidInput
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 7200),
        (120, 7200),
        (120.0, 7200),
        ("90s", 90),
        ("30m", 1800),
        ("2h", 7200),
        ("7d", 604800),
        ("1d12h", 129600),
        ("1h30m15s", 5415),
        (" 2h ", 7200),
        ("0120", 7200),
        ("1", 60),
        ("3650d", 315360000),
        ("4 h", 14400),
        ("1 d 12 h", 129600),
        ("1h 30m", 5400),
        ("5\tm", 300),
        # Durations of Go, as upstream's command line takes them; a fraction of a second is rounded up.
        ("1.5h", 5400),
        (".5h", 1800),
        ("2.h", 7200),
        ("1h30.5m", 5430),
        ("0.1d", 8640),
        ("1500ms", 2),
        ("1.0000001s", 2),
        ("1h0.000000001s", 3601),
        ("1.1m", 66),
        # A no-break space of a page of the web, within and around.
        ("\u00a02\u00a0h\u00a0", 7200),
        ("1.5 h", 5400),
    ],
)
def test_accepted(text: object, seconds: int) -> None:
    assert durations.parse(text, "ttl") == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "abc",
        "-5",
        "-5m",
        "+5",
        "5x",
        "m5",
        "1h2d",
        "1h1h",
        "1.5",
        "1.5.5h",
        "1 .5h",
        ".h",
        "1,5h",
        "1,5",
        "2H",
        "90 min",
        "5 5m",
        "1 2",
        "1e3",
        "0x10",
        "10minutes",
        "nan",
        "inf",
        "None",
        "\u0661\u0662",
        "\u00b2h",
        "1h\n2m",
        "1h;rm -rf /",
        "9999999999",
        "4000d",
        "99999999h",
        True,
        False,
        1.5,
        float("nan"),
        float("inf"),
        None,
        [],
        {},
        b"1h",
    ],
)
def test_refused_by_name(text: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        durations.parse(text, "the_option")
    assert caught.value.message.startswith("the_option: ")
    assert caught.value.detail["option"] == "the_option"


@pytest.mark.parametrize("text", ["0", 0, "0s", "0m", "0d0h", 0.0, "0.0h", "0ms"])
def test_zero_is_refused_unless_it_means_something(text: object) -> None:
    with pytest.raises(InvalidInput, match="is zero"):
        durations.parse(text, "ttl")
    assert durations.parse(text, "older_than", zero=True) == 0


def test_a_duration_over_its_maximum_is_refused() -> None:
    assert durations.parse("2h", "ttl", maximum=7200) == 7200
    with pytest.raises(InvalidInput, match="ttl: '7201s' is longer than the maximum of 2h"):
        durations.parse("7201s", "ttl", maximum=7200)


@given(st.integers(min_value=1, max_value=durations.MAX_SECONDS))
def test_what_is_shown_reads_back(seconds: int) -> None:
    assert durations.parse(durations.show(seconds), "ttl") == seconds


@given(
    st.one_of(
        st.text(max_size=40),
        st.integers(),
        st.floats(),
        st.booleans(),
        st.none(),
        st.from_regex(r"\A(\d{1,12}[dhms]?){1,5}\Z"),
    )
)
def test_anything_is_read_or_refused(value: object) -> None:
    try:
        found = durations.parse(value, "ttl")
    except InvalidInput as error:
        assert error.message.startswith("ttl: ")
    else:
        assert isinstance(found, int) and 0 < found <= durations.MAX_SECONDS


@given(st.integers(max_value=0))
def test_show_of_nothing(seconds: int) -> None:
    assert durations.show(seconds) == "0s"
