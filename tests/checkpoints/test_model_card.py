"""A card states what is recorded, in metadata that the hub reads, and is never written over what somebody edited."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from adept_fast.checkpoints.adept_config import AdeptConfig, Inserted
from adept_fast.checkpoints.checkpoint import ModelFolder
from adept_fast.checkpoints.digest import fingerprint
from adept_fast.checkpoints.model_card import FILE, Training, data_of, is_edited, licence, model_card, with_scores, write_card
from adept_fast.expansion.expand_checkpoint import expand_checkpoint
from adept_fast.expansion.remove import remove_copies
from tests.support import tiny_models

RECORD = AdeptConfig(
    (Inserted(2, 1),),
    {"name_or_path": "/home/jo/models/base", "num_hidden_layers": 4, "identity": "xxh3_128:0a"},
    {"method": "masking", "loss": "kl", "placement": "lowest", "notes": ["few items"]},
    {"total": 1000, "trainable": 200},
    {"torch": "2.13.0"},
    {"method": "adept", "domain": "d1", "tune.learning_rate": 0.001, "tune.units": "tensor", "tune.rate_map": "rank"},
)
TRAINING = Training(["`law.jsonl`", "`owner/texts`"], ["owner/texts"], 60, 30720)


@pytest.fixture
def origin(tmp_path: Path) -> ModelFolder:
    (tmp_path / "config.json").write_text("{}")
    return ModelFolder(tmp_path)


def test_the_card_of_a_tuned_model_has_what_was_done_and_no_path(origin: ModelFolder) -> None:
    unscored = model_card("/home/jo/models/base", origin, RECORD, TRAINING)
    text = with_scores(unscored, ["| general | 1.0 |"])
    assert "not evaluated" in unscored and with_scores(with_scores(unscored, ["| other |"]), ["| general | 1.0 |"]) == text
    card = ModelCard(text)
    data = card.data
    assert (data.base_model, data.library_name, data.datasets) == ("base", "transformers", ["owner/texts"]) and "license" not in text
    assert "continual pretraining on `law.jsonl`, `owner/texts`" in text and "/home" not in text
    for row in ("layers copied | 1", "data | `law.jsonl`; `owner/texts`", "documents | d1", "training | 60 steps, 30,720 tokens"):
        assert f"{row} |" in text
    assert "## Scores\n\n| general | 1.0 |\n\n## Load it" in text and "not evaluated" not in text
    assert "few items" in text and "copies remove source=." in text


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (None, "# base, restored"),
        (replace(RECORD, inputs={}), "They are silent"),
        (replace(RECORD, inputs={}, initialisation="small_random"), "were inserted. Every tensor"),
        (replace(RECORD, inserted=(Inserted(2, 1), Inserted(4, 2, 1))), "of 1 of its 4 layers were inserted on top of 1"),
        (replace(RECORD, selection={"alpha": 0.5}), "with 0.5 of the strength"),
        (replace(RECORD, selection={"merged": {"how": "stack", "of": ["/a/tuned", "/b/tuned"]}}), "one set after the other"),
        ({"method": "full", "inputs": {"method": "full"}, "versions": {}, "trained": 1000}, "every parameter was trained"),
    ],
)
def test_each_kind_of_checkpoint_has_its_own_words(origin: ModelFolder, record: AdeptConfig | dict | None, expected: str) -> None:
    text = model_card("owner/base", origin, record)
    assert expected in text and "It was not evaluated yet." in text and "/a/" not in text
    assert ModelCard(text).data.base_model == "owner/base"


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        ("---\nlicense: mit\n---\nBase", "{}", {"license": "mit"}),
        ("---\nlicense: other\nlicense_name: own\nlanguage: en\n---", "{}", {"license": "other", "license_name": "own"}),
        ("no metadata", '{"license": "apache-2.0"}', {"license": "apache-2.0"}),
        ("---\nlicense: [unclosed\n---\n", "{}", {}),
        ("---\n- a list\n---\n", "{}", {}),
    ],
)  # fmt: skip
def test_the_licence_is_the_stated_one(tmp_path: Path, card: str, config: str, expected: dict[str, str]) -> None:
    (tmp_path / FILE).write_text(card)
    (tmp_path / "config.json").write_text(config)
    assert licence(ModelFolder(tmp_path)) == expected


def test_an_edited_card_stays_and_another_is_renewed(tmp_path: Path, origin: ModelFolder) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    new.mkdir()
    old.mkdir()
    first = model_card("base", origin, RECORD)
    second = with_scores(first, ["| 1 |"])
    assert write_card(old, first) and not is_edited(old / FILE) and write_card(old, second)
    assert (old / FILE).read_text() == second and write_card(new, first, old) and (new / FILE).read_text() == first
    (old / FILE).write_text(second.replace("adapted", "adapted by me"))
    assert is_edited(old / FILE) and not write_card(old, first) and "by me" in (old / FILE).read_text()
    assert not write_card(new, first, old) and "by me" in (new / FILE).read_text()
    (old / FILE).unlink()
    (old / FILE).mkdir()
    assert not write_card(old, first)


def test_a_whole_model_that_is_written_has_a_card_outside_its_digest(tmp_path: Path) -> None:
    source = tiny_models.checkpoint(tmp_path / "base")
    (source / FILE).write_text("---\nlicense: mit\n---\nThe base's own card")
    expand_checkpoint(source, tmp_path / "expanded", [1], verify=False)
    remove_copies(tmp_path / "expanded", tmp_path / "plain", verify=False)
    before = fingerprint(tmp_path / "expanded")
    for name in ("expanded", "plain"):
        card = ModelCard.load(tmp_path / name / FILE)
        assert (card.data.base_model, card.data.license) == ("base", "mit") and "own card" not in card.text
    assert write_card(tmp_path / "expanded", "other") and fingerprint(tmp_path / "expanded") == before


def test_the_data_stays_named_while_trained_copies_stay(tmp_path: Path) -> None:
    expanded, one, none = [tmp_path / name for name in ("expanded", "one", "none")]
    expand_checkpoint(tiny_models.checkpoint(tmp_path / "base"), expanded, [0, 2], verify=False)
    record = replace(AdeptConfig.load(expanded), inputs=RECORD.inputs)
    record.save(expanded)
    write_card(expanded, model_card("base", ModelFolder(expanded), record, TRAINING))
    remove_copies(expanded, one, record.copies[:1], verify=False)
    remove_copies(expanded, none, verify=False)
    assert data_of(one) == replace(TRAINING, steps=None, tokens=None) and data_of(none) is None
    (one / FILE).write_text((one / FILE).read_text() + "a word of the user\n")
    assert data_of(one) is None, "edited"
