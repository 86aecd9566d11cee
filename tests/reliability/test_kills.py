"""A few kills and failing disks of each stage; `make nightly` makes many."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.reliability.campaign import campaign
from tests.reliability.disk_faults import Fault
from tests.reliability.stages import NAMES, Stages

pytestmark = [pytest.mark.slow, pytest.mark.nightly]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    with Stages(tmp_path_factory.mktemp("stages")) as made:
        yield made


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_that_is_killed_or_whose_disk_fails_ends_in_the_same_bits(stages: Stages, name: str) -> None:
    hits, wrong = campaign(stages, [name], kills=1, faults=1, seed=3)
    assert not wrong, "\n".join(wrong)
    assert hits == {f"{name} kills": 1, f"{name} faults": 1}


def test_a_fault_is_seen(stages: Stages) -> None:
    """What the others find nothing wrong with is not nothing: a lost file, another bit, half a file are found."""
    stage = stages.all["report"]
    stages.begin(stage)
    log = stages.out / "trainer_log.jsonl"
    log.write_text(log.read_text().replace('"event": "step"', '"event": "stop"', 1))
    (stages.out / "eval.json").write_text((stages.out / "eval.json").read_text()[:-9])
    (stages.out / "scores.png").unlink()
    weights = stages.out / "tuned" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert sorted(stages.torn(stage)) == ["eval.json", "scores.png", "trainer_log.jsonl", "tuned/model.safetensors"]
    code, said = stages.run(stage.commands[0], **Fault(str(stages.out), call=2).request())
    assert code == -9, said
