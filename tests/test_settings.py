"""Where a setting comes from: typed, else the checkpoint, else the family's default.

One worked case: --overlap 40 is typed, the checkpoint says overlap 64 and max_length 256, BERT's answers have 30 tokens at
most: overlap 40, max_length 256, max_answer_length 30.
"""

from __future__ import annotations

import dataclasses
import json

import pytest

from qa.errors import UserError
from qa.settings import DEFAULTS, ReadSettings, read_settings, resolve


def test_worked_case():
    settings, sources = resolve("bert", {"overlap": 40, "data": "x"}, {"overlap": 64, "max_length": 256, "step": 7})
    assert (settings.overlap, settings.max_length, settings.max_answer_length) == (40, 256, 30)
    assert (sources["overlap"], sources["max_length"], sources["max_answer_length"]) == ("typed", "saved", "default")


@pytest.mark.parametrize("family", DEFAULTS)
def test_none_is_not_given(family):
    nothing = dict.fromkeys((field.name for field in dataclasses.fields(ReadSettings)), None)
    settings, sources = resolve(family, nothing, nothing)
    assert settings == DEFAULTS[family] and set(sources.values()) == {"default"}


@pytest.mark.parametrize("family", DEFAULTS)
def test_saved_settings_come_back_as_they_are(family, tmp_path):
    settings = dataclasses.replace(DEFAULTS[family], max_length=99, na_threshold=-0.5, prompt={"kind": "plain"}, decode="exact",
                                   is_v2=True)
    (tmp_path / "qa.json").write_text(json.dumps({**dataclasses.asdict(settings), "step": 12}))
    saved = read_settings(tmp_path)
    assert saved["step"] == 12 and resolve(family, {}, saved)[0] == settings


def test_settings_of_a_product_are_read_and_damage_is_said(tmp_path):
    assert read_settings(tmp_path) == {}
    (tmp_path / "qa.json").write_text('{"max_length": 64, "na_threshold": null}')
    assert read_settings(tmp_path) == {"max_length": 64, "na_threshold": None}
    for content in ("{", "5", "[1]", ""):
        (tmp_path / "qa.json").write_text(content)
        with pytest.raises(UserError) as error:
            read_settings(tmp_path)
        assert f"{tmp_path}/qa.json" in str(error.value) and "\n" not in str(error.value)


