"""Phases of the work are told through logging."""

import logging

import pytest

from dnal_nni.progress import phase


def test_a_phase_says_that_it_begins_and_how_long_it_took(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dnal_nni"), phase("thinking"):
        assert [record.getMessage() for record in caplog.records] == ["thinking ..."]
    assert [(record.name, record.getMessage()) for record in caplog.records][1] == ("dnal_nni", "thinking: 0.0 s")


def test_one_that_fails_does_not_say_that_it_is_done(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dnal_nni"), pytest.raises(ValueError), phase("thinking"):
        raise ValueError
    assert len(caplog.records) == 1
