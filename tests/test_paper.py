"""The zoo of examples/studies/paper and what is measured on it; the studies themselves take hours."""

import importlib
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lightning_sensitivity import compare_models

FOLDER = Path(__file__).parents[1] / "examples" / "studies" / "paper"


@pytest.fixture(scope="module")
def paper() -> Any:
    """Its modules, which import each other as scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield {name: importlib.import_module(name) for name in ("zoo", "measure", "peers")}


@pytest.mark.long
def test_networks_are_measured_as_the_package_does(paper: Any, tmp_path: Path) -> None:
    zoo, measure, peers = paper["zoo"], paper["measure"], paper["peers"]
    specs = [zoo.Spec(1, 16), zoo.Spec(1, 32, init="normal"), zoo.Spec(2, 16)]
    args = Namespace(data=None, out=tmp_path, max_epochs=120, processes=1)
    table = peers.add_consensus(measure.measure(specs, "digits", args), specs, args).set_index("network")
    models = {spec.name: zoo.checkpoints(spec, "digits", tmp_path).trained for spec in specs}
    models["untrained"] = zoo.checkpoints(specs[0], "digits", tmp_path).untrained  # that of N(0, 1) would vote
    models = {name: partial(zoo.Network.load_from_checkpoint, path) for name, path in models.items()}
    images = zoo.Images("digits")
    images.setup("validate")
    result = {row.name: row for row in compare_models(models, images.val_dataloader())}
    for spec in specs:
        row, scores = table.loc[spec.name], result[spec.name]
        assert not row["converged"]
        assert scores.consensus_error == pytest.approx(row["consensus_error"], rel=1e-5, abs=1e-6)
        assert scores.sensitivity == pytest.approx(row["sensitivity"], abs=5 * scores.sensitivity_stderr)
    assert result["untrained"].note.startswith("undecided")
