"""Copies can be removed, carried, merged and dialled; whatever is made of them holds the base, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adept_fast.checkpoints import checkpoint
from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.data.documents import Documents, WeightedDocuments
from adept_fast.errors import ExpansionError, InputError
from adept_fast.expansion.delta import apply_copies, extract_copies
from adept_fast.expansion.dial import dial, dialled, dialled_model
from adept_fast.expansion.expand_checkpoint import expand_checkpoint
from adept_fast.expansion.export import export_tuned
from adept_fast.expansion.merge import merge_copies
from adept_fast.expansion.remove import remove_copies
from adept_fast.tuning.training_plan import plan
from adept_fast.tuning.training_run import RunFiles
from adept_fast.tuning.tune_checkpoint import tune_checkpoint
from adept_fast.tuning.tuning_settings import TuningSettings
from tests.support import tiny_models

IDS = torch.arange(3, 40)[None] % tiny_models.VOCABULARY


def train(expanded: Path, seed: int) -> dict[str, torch.Tensor]:
    """Give the copies other weights, as training does; returns all tensors."""
    tensors = load_file(expanded / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for layer in AdeptConfig.load(expanded).copies:
        for name in sorted(tensors):
            if name.startswith(f"model.layers.{layer}."):
                tensors[name] += 0.05 * torch.randn(tensors[name].shape, generator=generator).to(tensors[name].dtype)
    save_file(tensors, expanded / "model.safetensors", {"format": "pt"})
    return tensors


def logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits.detach()


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base; a and b with trained copies of layers 0 and 2; c with one of 2."""
    folder = tmp_path_factory.mktemp("copies")
    tiny_models.checkpoint(folder / "base", "qwen3", dtype=request.param)
    for seed, (name, layers) in enumerate({"a": [0, 2], "b": [0, 2], "c": [2]}.items()):
        expand_checkpoint(folder / "base", folder / name, layers, verify=False)
        train(folder / name, seed)
    tiny_models.checkpoint(folder / "other", "qwen3", seed=5, dtype=request.param)
    return folder


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].view(torch.uint8).equal(other[name].view(torch.uint8)) for name in one)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_removing_all_copies_gives_back_the_original(made: Path, tmp_path: Path) -> None:
    assert remove_copies(made / "a", tmp_path / "plain") is None
    assert same(tensors(tmp_path / "plain"), tensors(made / "base"))
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == json.loads((made / "base" / "config.json").read_text())
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {"README.md", *(path.name for path in (made / "base").iterdir())}
    assert AdeptConfig.find(tmp_path / "plain") is None and logits(tmp_path / "plain").equal(logits(made / "base"))


def test_removing_one_copy_leaves_the_other(made: Path, tmp_path: Path) -> None:
    record = remove_copies(made / "a", tmp_path / "one", [1])
    assert [(entry.layer, entry.copied_from) for entry in record.inserted] == [(3, 2)] and record == AdeptConfig.load(tmp_path / "one")
    before, after = tensors(made / "a"), tensors(tmp_path / "one")
    assert after["model.layers.3.mlp.up_proj.weight"].equal(before["model.layers.4.mlp.up_proj.weight"])
    assert checkpoint.load_model(tmp_path / "one").config.layer_types == ["full_attention"] * 5
    with pytest.raises(InputError, match=r"among the layers \[1, 4\]"):
        remove_copies(made / "a", tmp_path / "none", [2])


def test_a_changed_original_is_found_out(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "a", tmp_path / "touched")
    changed = tensors(folder)
    changed["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    for number, way in enumerate((remove_copies, lambda *paths: dial(*paths, 0.5))):
        with pytest.raises(ExpansionError, match="bit for bit"):
            way(folder, tmp_path / f"out{number}")
        assert not (tmp_path / f"out{number}").exists()


def test_extracted_copies_applied_to_the_base_are_the_tuned_model(made: Path, tmp_path: Path) -> None:
    extract_copies(made / "a", tmp_path / "delta")
    assert {path.name for path in (tmp_path / "delta").iterdir()} == {"adept_copies.safetensors", "adept_config.json"}
    assert (tmp_path / "delta" / "adept_copies.safetensors").stat().st_size < 0.4 * (made / "a" / "model.safetensors").stat().st_size
    apply_copies(made / "base", tmp_path / "delta", tmp_path / "again")
    assert same(tensors(tmp_path / "again"), tensors(made / "a"))
    config = [json.loads((folder / "config.json").read_text()) for folder in (made / "a", tmp_path / "again")]
    assert all(table.pop("adept_config") for table in config) and config[0] == config[1]
    with pytest.raises(InputError, match=f"not the base of .*made on {made / 'base'}"):
        apply_copies(made / "other", tmp_path / "delta", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.slow
def test_averaged_copies(made: Path, tmp_path: Path) -> None:
    merge_copies(made / "a", made / "b", tmp_path / "merged", (0.3, 0.7))
    one, two, merged = (tensors(folder) for folder in (made / "a", made / "b", tmp_path / "merged"))
    for name, tensor in merged.items():
        expected = (0.3 * one[name].double() + 0.7 * two[name].double()).to(tensor.dtype)
        assert tensor.equal(expected if name.startswith(("model.layers.1.", "model.layers.4.")) else one[name]), name
    with pytest.raises(InputError, match="cannot be averaged: stack"):
        merge_copies(made / "a", made / "c", tmp_path / "no")
    with pytest.raises(InputError, match="sum to 1"):
        merge_copies(made / "a", made / "b", tmp_path / "no", (1, 1))


@pytest.mark.slow
def test_stacked_copies(made: Path, tmp_path: Path) -> None:
    record = merge_copies(made / "a", made / "c", tmp_path / "stack", how="stack")
    assert [(entry.layer, entry.copied_from) for entry in record.inserted] == [(1, 0), (4, 2), (5, 2)]
    one, two, stack = (tensors(folder) for folder in (made / "a", made / "c", tmp_path / "stack"))
    assert stack["model.layers.4.mlp.up_proj.weight"].equal(one["model.layers.4.mlp.up_proj.weight"])
    assert stack["model.layers.5.mlp.up_proj.weight"].equal(two["model.layers.3.mlp.up_proj.weight"])
    remove_copies(tmp_path / "stack", tmp_path / "back")
    assert same(tensors(tmp_path / "back"), tensors(made / "base"))
    remove_copies(tmp_path / "stack", tmp_path / "a again", [5])
    assert same(tensors(tmp_path / "a again"), one)


@pytest.mark.slow
def test_a_silent_copy_stacked_changes_nothing(made: Path, tmp_path: Path) -> None:
    expand_checkpoint(made / "base", tmp_path / "silent", [1, 2], verify=False)
    merge_copies(made / "a", tmp_path / "silent", tmp_path / "stack", how="stack")
    assert logits(tmp_path / "stack").equal(logits(made / "a"))


def test_copies_of_other_bases_are_not_merged(made: Path, tmp_path: Path) -> None:
    expand_checkpoint(made / "other", tmp_path / "other", [0, 2], verify=False)
    with pytest.raises(InputError, match="different bases"):
        merge_copies(made / "a", tmp_path / "other", tmp_path / "no")


def test_a_share_lies_between_the_silent_value_and_the_tuned_one() -> None:
    tuned = torch.tensor([0.5, -1.0, 2.0]).bfloat16()
    for silent, quarter in ((-1.0, [-0.625, -1.0, -0.25]), (0.0, [0.125, -0.25, 0.5])):
        found = [dialled(tuned, silent, alpha).tolist() for alpha in (0, 0.25, 1)]
        assert found == [[silent] * 3, quarter, tuned.tolist()]


@pytest.mark.slow
def test_the_dial(made: Path, tmp_path: Path) -> None:
    base, tuned = logits(made / "base"), logits(made / "a")
    model = checkpoint.load_model(made / "a")
    for alpha in (0, 0.25, 1):
        record = dial(made / "a", tmp_path / str(alpha), alpha)
        assert record.selection["alpha"] == alpha
        found = logits(tmp_path / str(alpha))
        with dialled_model(model, alpha):
            assert model(IDS).logits.equal(found)
        assert {0: base.equal(found), 1: tuned.equal(found)}.get(alpha, not base.equal(found) and not tuned.equal(found))
    assert model(IDS).logits.equal(tuned)
    weight = tensors(tmp_path / "0.25")["model.layers.1.self_attn.o_proj.weight"]
    assert weight.equal(0.25 * tensors(made / "a")["model.layers.1.self_attn.o_proj.weight"])
    for alpha in (-0.1, float("nan"), True):
        with pytest.raises(InputError, match="alpha must"):
            dial(made / "a", tmp_path / "no", alpha)


def test_a_checkpoint_without_copies_is_refused(made: Path, tmp_path: Path) -> None:
    for way in (remove_copies, extract_copies, lambda *paths: dial(*paths, 0.5)):
        with pytest.raises(InputError, match="not an expanded model"):
            way(made / "base", tmp_path / "no")


@pytest.mark.parametrize("key", ["source", "selection", "inputs"])
def test_a_record_without_its_tables_is_refused(made: Path, tmp_path: Path, key: str) -> None:
    record = json.loads((made / "a" / "adept_config.json").read_text())
    (tmp_path / "adept_config.json").write_text(json.dumps({**record, key: None}))
    with pytest.raises(InputError, match="adept_config.json: not a record of an expansion"):
        AdeptConfig.load(tmp_path)


@pytest.mark.parametrize("changes", [{"intermediate_size": 56}, {"num_hidden_layers": 3}, {"num_attention_heads": 3}])
def test_a_record_whose_config_contradicts_the_tensors_is_named(made: Path, tmp_path: Path, changes: dict[str, int]) -> None:
    folder = shutil.copytree(made / "a", tmp_path / "a")
    record = json.loads((folder / "adept_config.json").read_text())
    record["source"]["config"] |= changes
    (folder / "adept_config.json").write_text(json.dumps(record))
    for number, way in enumerate((remove_copies, lambda *paths: dial(*paths, 0.5))):
        with pytest.raises(InputError) as refusal:
            way(folder, tmp_path / f"out{number}")
        assert str(folder / "adept_config.json") in str(refusal.value) and ".partial" not in str(refusal.value)
        assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.slow
def test_a_record_of_another_schema_is_refused(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "a", tmp_path / "old")
    record = json.loads((folder / "adept_config.json").read_text())
    (folder / "adept_config.json").write_text(json.dumps({**record, "schema": 1}))
    with pytest.raises(InputError, match="adept_config.json: schema 1 is not 2: use the version of adept_fast that wrote it"):
        remove_copies(folder, tmp_path / "plain")


def tune(expanded: Path, target: Path, **loading: object) -> None:
    ids = np.random.default_rng(1).integers(3, tiny_models.VOCABULARY, 600).astype(np.int32)
    documents = WeightedDocuments(Documents(ids, np.array([0, 20, 90, 100, 250, 600])), np.ones(5))
    training = {"max_steps": 3, "learning_rate": 1e-2, "weight_decay": 0.1, "per_device_train_batch_size": 2}
    settings = TuningSettings(refresh_steps=2, block_size=24, training=training)
    files = RunFiles(target.parent / "work", target.parent / "log.jsonl")
    text = plan(documents, tiny_models.tokenizer(), settings, 128)
    tune_checkpoint(expanded, target, text, tiny_models.items(2), {}, files, **loading)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), [("mixtral", "bfloat16"), ("llama", None)])
def test_a_tuned_model_keeps_its_source_and_its_copies_travel(family: str, dtype: str | None, tmp_path: Path) -> None:
    """expand -> tune -> remove gives the original's tensors, whatever dtype was trained in; extract -> apply gives the tuned ones. Experts
    are one parameter in memory and one tensor each on disk; a tied head that is stored twice stays so."""
    source = tiny_models.checkpoint(tmp_path / "base", family, tie_word_embeddings=family == "llama")
    if family == "llama":
        before = tensors(source)
        save_file(before | {"lm_head.weight": before["model.embed_tokens.weight"].clone()}, source / "model.safetensors", {"format": "pt"})
    expand_checkpoint(source, tmp_path / "expanded", [0, 2], steering=tiny_models.items(2))
    tune(tmp_path / "expanded", tmp_path / "tuned", dtype=dtype)
    before, expanded, tuned = (tensors(tmp_path / name) for name in ("base", "expanded", "tuned"))
    assert tuned.keys() == expanded.keys() and {t.dtype for t in tuned.values()} == {torch.float32}
    trained = {name for name in tuned if name.startswith(("model.layers.1.", "model.layers.4."))}
    moved = {name for name, tensor in tuned.items() if not tensor.equal(expanded[name])}
    assert moved <= trained and len(moved) > 0.9 * len(trained)
    assert all(tuned[name].equal(tuned[name].bfloat16().float()) for name in trained) == bool(dtype)
    model = checkpoint.load_model(tmp_path / "tuned")
    assert model.adept_config.proof["source_tensors"] and bool(model(IDS).logits.isfinite().all())
    remove_copies(tmp_path / "tuned", tmp_path / "plain")
    assert same(tensors(tmp_path / "plain"), before)
    extract_copies(tmp_path / "tuned", tmp_path / "delta")
    apply_copies(source, tmp_path / "delta", tmp_path / "again")
    assert same(tensors(tmp_path / "again"), tuned)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.layers.3.self_attn.q_proj.weight"] += 1
    with pytest.raises(ExpansionError, match="training changed model.layers.3.self_attn.q_proj.weight"):
        export_tuned(tmp_path / "expanded", tmp_path / "no", state)
    copies = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(("model.layers.1.", "model.layers.4."))}
    export_tuned(tmp_path / "expanded", tmp_path / "copies alone", copies)
    assert same(tensors(tmp_path / "copies alone"), tuned)
    with pytest.raises(InputError, match="not among the trained tensors"):
        export_tuned(tmp_path / "expanded", tmp_path / "no", dict([*copies.items()][:-1]))
    assert not (tmp_path / "no").exists()
