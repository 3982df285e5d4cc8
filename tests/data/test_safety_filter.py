"""What is refused of the record that a safety filter leaves. With shards: tests/data_tools/test_filter_safety.py."""

import json
from typing import Any

import pytest

from kontext_train.data.safety_filter import FilterRecord, check_filter
from kontext_train.errors import ConfigError

PASSED = {"name": "words", "digest": "0123456789abcdef"}


def test_a_filter_counts_only_if_it_is_known_to_keep_something_out() -> None:
    def check(**more: Any) -> None:
        check_filter("data.train", "/data/safe", PASSED | more, "words@0123")

    check(reports_only=False)
    with pytest.raises(ConfigError, match=r"passed words@0123456789ab, whose rules only report: it kept nothing out"):
        check(reports_only=True)
    earlier = (
        r"data\.train='/data/safe': passed words@0123456789ab in an earlier version, .*index_shards.* filter again"
    )
    for unknown in ({}, {"reports_only": None}, {"reports_only": 0}):  # in an index of then
        with pytest.raises(ConfigError, match=earlier):
            check(**unknown)


@pytest.mark.parametrize("reports_only", [None, 0, "false", []])
def test_a_record_says_whether_its_rules_only_report(reports_only: object) -> None:
    def parse(**more: Any) -> FilterRecord:
        return FilterRecord.parse("safety.json", json.dumps({**PASSED, **more, "shards": {}}).encode())

    assert parse(reports_only=False).passed["reports_only"] is False
    with pytest.raises(ValueError, match=r"safety\.json is damaged, .*reports_only must be true or false.*again"):
        parse(reports_only=reports_only)
    with pytest.raises(ValueError, match=r"safety\.json is damaged, or of an earlier version .*reports_only.*again"):
        parse()
