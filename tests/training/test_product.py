"""The folder that a run leaves: whole, verified, and put in the place of the one before.

One worked case: step 4 is saved with threshold 1.5, then step 8 with 2.5; `restore` gives (8, 2.5) and the weights of step 8.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from qa.errors import UserError
from qa.files import damages
from qa.settings import DEFAULTS
from qa.training.distributed import Runtime
from qa.training.product import Product


@pytest.fixture
def make(tmp_path):
    def make_product(run: str = "run") -> Product:
        folder = tmp_path / run
        folder.mkdir(exist_ok=True)
        (folder / "options.json").write_text(json.dumps({"name": run}))
        product = Product(folder / "model", lambda to, _: (to / "weights.safetensors").write_text(str(product.weights)),
                          lambda saved: setattr(product, "weights", int((saved / "weights.safetensors").read_text())),
                          lambda step, chosen, metrics: f"card of {step}: {chosen.get('na_threshold')}, {metrics}",
                          DEFAULTS["bert"], Runtime(0, 1, torch.device("cpu")))
        return product

    return make_product


def save(product: Product, step: int, threshold: float | None = None) -> None:
    product.weights = step
    product.save(step, {"na_threshold": threshold}, {"f1": step})


def test_worked_case(make):
    product = make()
    save(product, 4, 1.5)
    save(product, 8, 2.5)
    product.weights = 99
    assert product.restore() == (8, {"na_threshold": 2.5, "temperature": None}) and product.weights == 8
    assert {path.name for path in product.folder.iterdir()} == {"weights.safetensors", "qa.json", "README.md", "manifest.json"}
    assert (product.folder / "README.md").read_text() == "card of 8: 2.5, {'f1': 8}" and damages(product.folder) == []
    assert (product.folder / "weights.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", ["weights.safetensors", "qa.json", "manifest.json"])
@pytest.mark.parametrize("change", ["flip", "cut", "delete"])
def test_a_damaged_product_stops_a_resume_at_its_start(name, change, make):
    product = make()
    save(product, 8)
    path = product.folder / name
    content = path.read_bytes()
    path.unlink()
    if change != "delete":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:] if change == "flip" else content[:-1])
    with pytest.raises(UserError, match="^--resume: the best model so far is damaged") as error:
        product.check(8)
    assert "\n" not in str(error.value)
    product.check(None)  # a run that will not restore it


def test_another_runs_product_or_an_older_one_is_told_from_the_best(make):
    product, other = make(), make("other")
    save(product, 8)
    product.check(8)
    product.check(4)  # a later one than the checkpoint knows of: the run was killed before its next checkpoint
    with pytest.raises(UserError, match="or not the best of this run, those of step 12"):
        product.check(12)
    save(other, 8)
    shutil.rmtree(product.folder)
    shutil.copytree(other.folder, product.folder)
    with pytest.raises(UserError, match="holds another run's weights"):
        product.check(8)


@pytest.mark.parametrize("instant", ["between the renames", "after them"])
def test_a_half_done_replacement_is_finished(instant, make):
    product = make()
    save(product, 8)
    aside = product.folder.with_name(".model.old")
    if instant == "after them":
        shutil.copytree(product.folder, aside)
    else:
        product.folder.rename(aside)
    product.check(8)
    assert not aside.exists() and product.restore()[0] == 8
