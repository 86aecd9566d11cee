"""Proofs look: at the originals beside extracted copies, at what a record says, at each value that is written."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from adept_fast.checkpoints import checkpoint
from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.errors import ExpansionError, InputError
from adept_fast.expansion.delta import apply_copies, extract_copies
from adept_fast.expansion.dial import dial
from adept_fast.expansion.expand_checkpoint import expand_checkpoint
from adept_fast.expansion.expand_model import expand_model
from adept_fast.expansion.export import export_tuned
from adept_fast.expansion.merge import merge_copies
from adept_fast.expansion.remove import remove_copies
from tests.support import tiny_models

COPY, ORIGINAL = "model.layers.1.mlp.down_proj.weight", "model.layers.3.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base; tuned, with copies of layers 0 and 2 whose weights are not silent any more."""
    folder = tmp_path_factory.mktemp("proofs")
    tiny_models.checkpoint(folder / "base", "qwen3")
    expand_checkpoint(folder / "base", folder / "tuned", [0, 2], verify=False)
    change(folder / "tuned", COPY, 0.25)
    return folder


def change(folder: Path, name: str, value: float, file: str = "model.safetensors") -> Path:
    tensors = load_file(folder / file)
    tensors[name][2, 3] = value
    save_file(tensors, folder / file, {"format": "pt"})
    return folder


def changed(made: Path, tmp_path: Path, name: str, value: float) -> Path:
    return change(shutil.copytree(made / "tuned", tmp_path / "changed"), name, value)


WAYS = {
    "extract": lambda source, target, made: extract_copies(source, target),
    "remove": lambda source, target, made: remove_copies(source, target, [1]),
    "dial": lambda source, target, made: dial(source, target, 0.5),
    "dial at 1": lambda source, target, made: dial(source, target, 1),
    "average": lambda source, target, made: merge_copies(made / "tuned", source, target),
    "stack": lambda source, target, made: merge_copies(source, made / "tuned", target, how="stack"),
}


@pytest.mark.parametrize("way", WAYS)
def test_whatever_takes_copies_out_looks_at_originals_and_copies(made: Path, tmp_path: Path, way: str) -> None:
    with pytest.raises(ExpansionError, match="changed: its originals are not those of .*base, bit for bit: they were trained"):
        WAYS[way](changed(made, tmp_path, ORIGINAL, 0.5), tmp_path / "out", made)
    shutil.rmtree(tmp_path / "changed")
    for value in (math.nan, math.inf):
        with pytest.raises(InputError, match=f"changed/model.safetensors: {COPY} holds NaN or infinity: its training went wrong"):
            WAYS[way](changed(made, tmp_path, COPY, value), tmp_path / "out", made)
        shutil.rmtree(tmp_path / "changed")
    assert not (tmp_path / "out").exists()


def test_without_a_proof_copies_of_a_model_trained_whole_are_taken_out(made: Path, tmp_path: Path) -> None:
    record = remove_copies(changed(made, tmp_path, ORIGINAL, 0.5), tmp_path / "out", [1], verify=False)
    assert record.proof == {"note": "not compared (verify=False)"}


def test_a_delta_is_proven_to_hold_what_was_extracted(made: Path, tmp_path: Path) -> None:
    extract_copies(made / "tuned", tmp_path / "delta")
    assert apply_copies(made / "base", tmp_path / "delta", tmp_path / "again").proof["source_tensors"]
    change(tmp_path / "delta", COPY, 0.26, "adept_copies.safetensors")
    with pytest.raises(InputError, match="adept_copies.safetensors: corrupt: not the bytes that were extracted"):
        apply_copies(made / "base", tmp_path / "delta", tmp_path / "no")
    record = json.loads((tmp_path / "delta" / "adept_config.json").read_text())
    (tmp_path / "delta" / "adept_config.json").write_text(json.dumps({**record, "proof": {}}))  # as an earlier version wrote it
    change(tmp_path / "delta", COPY, math.nan, "adept_copies.safetensors")
    with pytest.raises(InputError, match=f"adept_copies.safetensors: {COPY} holds NaN or infinity"):
        apply_copies(made / "base", tmp_path / "delta", tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_base_with_a_nan_is_not_expanded(tmp_path: Path, name: str, verify: bool) -> None:
    source = change(tiny_models.checkpoint(tmp_path / "base"), name, math.nan)
    with pytest.raises((InputError, ExpansionError), match=f"{name} holds NaN or infinity: .*fetch the model again"):
        expand_checkpoint(source, tmp_path / "expanded", [1], verify=verify)
    assert not (tmp_path / "expanded").exists()


def test_a_model_with_a_copy_that_is_no_number_is_not_expanded_again(made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{COPY} holds NaN or infinity: train the copies again"):
        expand_checkpoint(changed(made, tmp_path, COPY, math.nan), tmp_path / "no", [2], verify=False)


@pytest.mark.slow
def test_no_value_from_memory_is_written_that_is_no_number(made: Path, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in checkpoint.load_model(made / "tuned").state_dict().items()}
    state[COPY][1, 1] = math.nan
    with pytest.raises(InputError, match=f"{COPY} would hold NaN or infinity as F32"):
        export_tuned(made / "tuned", tmp_path / "no", state)
    with pytest.raises(InputError, match="self_attn.o_proj.weight|down_proj.weight would hold NaN or infinity as F32"):
        dial(made / "tuned", tmp_path / "no", 1e40)
    half = tiny_models.checkpoint(tmp_path / "half", "qwen3", dtype=torch.float16)
    expand_checkpoint(half, tmp_path / "expanded", [0, 2], verify=False)
    state[COPY][1, 1] = 70_000.0  # a number in fp32, in which it was trained
    with pytest.raises(InputError, match=f"{COPY} would hold NaN or infinity as F16"):
        export_tuned(tmp_path / "expanded", tmp_path / "no", {name: state[name] for name in state if ".1." in name or ".4." in name})
    assert not (tmp_path / "no").exists()


def test_buffers_and_tensors_that_are_not_read_may_be_infinite(tmp_path: Path) -> None:
    source = tiny_models.checkpoint(tmp_path / "base")
    tensors = load_file(source / "model.safetensors") | {"model.layers.0.self_attn.masked_bias": torch.tensor(-math.inf)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    expand_checkpoint(source, tmp_path / "expanded", [1], verify=False)


def test_a_config_with_an_infinity_is_written_as_json_and_read_again(tmp_path: Path) -> None:
    source = tiny_models.checkpoint(tmp_path / "base")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "time_step_limit": [0.0, math.inf]}))  # as a Mamba's was written once
    expand_checkpoint(source, tmp_path / "expanded", [1], verify=False)
    for name in ("config.json", "adept_config.json"):
        json.loads((tmp_path / "expanded" / name).read_text(), parse_constant=pytest.fail)
    assert AutoConfig.from_pretrained(tmp_path / "expanded").time_step_limit == [0.0, math.inf]
    assert AdeptConfig.load(tmp_path / "expanded").source["config"]["time_step_limit"] == [0.0, math.inf]
    remove_copies(tmp_path / "expanded", tmp_path / "plain")
    assert AutoConfig.from_pretrained(tmp_path / "plain").time_step_limit == [0.0, math.inf]


def entry(**changes: Any) -> list[dict[str, Any]]:
    made = {"layer": 1, "copied_from": 0, "round": 0} | changes
    return [{key: value for key, value in made.items() if value != "absent"}, {"layer": 4, "copied_from": 2, "round": 0}]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inserted": entry(copied_from=-0.5)}, "copied_from of a copy is -0.5, no index"),
        ({"inserted": entry(copied_from="0")}, "copied_from of a copy is '0', no index"),
        ({"inserted": entry(copied_from=False)}, "copied_from of a copy is False"),
        ({"inserted": entry(copied_from="absent")}, "copied_from"),
        ({"inserted": entry(copied_from=1)}, "layer 1 cannot be a copy of the source's layer 1"),
        ({"inserted": entry(layer=2)}, "layer 2 cannot be a copy of the source's layer 0"),
        ({"inserted": entry(layer=1.0)}, "layer of a copy is 1.0"),
        ({"inserted": entry(layer=4)}, "not ascending"),
        ({"inserted": entry()[::-1]}, "not ascending"),
        ({"inserted": entry(round=-1)}, "round of a copy is -1"),
        ({"inserted": entry(of=3)}, "of"),
        ({"inserted": []}, "names no copy"),
        ({"initialisation": "magic"}, "initialisation 'magic' is none of zero_output"),
        ({"parameters": 3}, "parameters is no table"),
        ({"parameters": {"total": [3]}}, "parameters.total is .3., no number"),
        ({"versions": {"torch": 2}}, "versions.torch is 2, no text"),
        ({"proof": None}, "proof is no table"),
        ({"selection": {"alpha": "0.5"}}, "selection.alpha is '0.5', no share"),
        ({"selection": {"alpha": -1}}, "selection.alpha is -1, no share"),
        ({"num_hidden_layers": 2}, "a source of 2 layers has no layer 2"),
        ({"num_hidden_layers": "4"}, "a source of '4' layers"),
        ({"num_hidden_layers": 5}, "6 layers, but its record has 2 copies, up to layer 4, in a source of 5"),
        ({"config": "llama"}, "source.config is no table"),
        ({"tensors_digest": 5}, "source.tensors_digest is 5, no digest that begins with xxh3_128:"),
        ({"proof": {"copies_digest": "md5:0"}}, "proof.copies_digest is 'md5:0', no digest that begins with xxh3_128:"),
    ],
)
def test_fields_of_a_record_are_checked_against_each_other(made: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = shutil.copytree(made / "tuned", tmp_path / "tuned")
    record = json.loads((folder / "adept_config.json").read_text())
    record |= {key: value for key, value in changes.items() if key in record}
    record["source"] |= {key: value for key, value in changes.items() if key not in record}
    (folder / "adept_config.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=said):
        checkpoint.load_model(folder)
    with pytest.raises(InputError, match=said):
        extract_copies(folder, tmp_path / "no")
    (folder / "adept_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "adept_config": record}))
    with pytest.raises(InputError, match=said):
        expand_model(AutoModelForCausalLM.from_pretrained(folder), [0])
