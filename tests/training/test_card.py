"""The model card: what was trained on, how, and what came of it.

One worked case: 3 questions trained on for 2 epochs at lr 3e-5: "3 questions trained on", "2 epochs", "lr 3e-05".
"""

from __future__ import annotations

from qa.options import BertOptions
from qa.training.card import model_card
from qa.training.precision import Precision


def test_model_card_says_base_data_recipe_and_scores():
    options = BertOptions(model="some-base", train_data="train.json", dev_data="dev.json", seed=7, clip=0.5)
    chosen = {"na_threshold": -1.25, "temperature": 2.0}
    card = model_card(options, 3, Precision("bf16", "cpu"), "windows of 384", 120, chosen, {"f1": 66.904, "total": 3})
    for part in ("# An encoder", "some-base", "train.json, 3 questions trained on", "2 epochs", "batch 16", "lr 3e-05",
                 "seed 7", "bf16", "clip 0.5", "windows of 384", "step 120", "dev.json", "above -1.25", "temperature 2",
                 "threads", "torch 2.", "| f1 | 66.9 |", "| total | 3 |"):
        assert part in card, part
    assert "not scored on development data" in model_card(BertOptions(), 1, Precision("fp32", "cpu"), "", 1, {}, {})


def test_the_hubs_head_is_yaml_that_names_base_data_and_task():
    import yaml

    options = BertOptions(model="C:\\my models: \"a\"", train_data="squad_v2")
    card = model_card(options, 3, Precision("fp32", "cpu"), "", 1, {}, {})
    head = yaml.safe_load(card.split("---\n")[1])
    assert card.startswith("---\n") and head["base_model"] == options.model and head["datasets"] == ["rajpurkar/squad_v2"]
    assert head["pipeline_tag"] == "question-answering" and head["library_name"] == "transformers"
