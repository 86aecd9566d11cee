"""The largest share of the copies that keeps general loss within a limit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adept_fast.checkpoints import checkpoint
from adept_fast.data.items import IGNORE, Item
from adept_fast.errors import InputError
from adept_fast.evaluation.evaluation_corpus import EvaluationCorpus
from adept_fast.evaluation.largest_alpha import largest_alpha
from adept_fast.expansion.dial import dial
from adept_fast.expansion.expand_checkpoint import expand_checkpoint
from adept_fast.expansion.expand_model import copies
from adept_fast.models.losses import corpus_loss
from tests.support import tiny_models

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alpha")
    tiny_models.checkpoint(folder / "base")
    expand_checkpoint(folder / "base", folder / "expanded", [0, 2], verify=False)
    model = checkpoint.load_model(folder / "expanded")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in copies(model):
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "tuned")
    return folder


@pytest.fixture(scope="module")
def general(tuned: Path) -> EvaluationCorpus:
    """What the base itself says, which it finds likelier than any other model does."""
    base = checkpoint.load_model(tuned / "base")
    ids = torch.randint(3, tiny_models.VOCABULARY, (12, 4), generator=torch.Generator().manual_seed(1))
    said = base.generate(ids, max_new_tokens=16, min_new_tokens=16, do_sample=False).tolist()
    return EvaluationCorpus("general", tuple(Item(tuple(row), (IGNORE,) * 4 + tuple(row[4:])) for row in said))


def test_the_largest_share_within_the_limit(tuned: Path, general: EvaluationCorpus, tmp_path: Path) -> None:
    model = checkpoint.load_model(tuned / "tuned")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = corpus_loss(model, general.items)
    base = corpus_loss(checkpoint.load_model(tuned / "base"), general.items)
    found = largest_alpha(model, general, general, 0.4 * (whole.mean - base.mean))
    assert whole.mean > base.mean + 0.1 and 0 < found.alpha < 1
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    tried = {entry.alpha: entry for entry in found.tried}
    assert found.high <= found.limit < tried[found.alpha + 1 / 64].high and found.low < found.rise < found.high
    assert all(tried[step / 8].high > found.limit for step in range(int(found.alpha * 8) + 1, 9))
    dial(tuned / "tuned", tmp_path / "dialled", found.alpha, verify=False)
    written = corpus_loss(checkpoint.load_model(tmp_path / "dialled"), general.items)
    assert (found.loss, found.domain_loss) == (written.mean, written.mean)
    assert found.rise == pytest.approx(written.mean - base.mean, rel=1e-12)


def test_the_ends_of_the_dial(tuned: Path, general: EvaluationCorpus) -> None:
    model = checkpoint.load_model(tuned / "tuned")
    found = largest_alpha(model, general, None, 50.0)
    assert found.alpha == 1 and len(found.tried) == 1 and found.domain_loss is None
    found = largest_alpha(model, general, None, 0.0)
    assert (found.alpha, found.rise, found.high) == (0, 0, 0) and found.tried[1].high > 0
    for limit in (-0.1, float("nan")):
        with pytest.raises(InputError, match="^limit must be"):
            largest_alpha(model, general, None, limit)
