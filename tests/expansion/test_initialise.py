"""What a copy starts from: silent and able to learn, or labelled as not silent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.checkpoints.settings import PRESERVING
from adept_fast.cli.main import main
from adept_fast.errors import ExpansionError, InputError, UnsupportedFamilyError
from adept_fast.expansion.dial import dial
from adept_fast.expansion.expand_checkpoint import expand_checkpoint
from adept_fast.expansion.expand_model import copies, expand_model, freeze_original
from adept_fast.expansion.verify import verify_expansion
from adept_fast.optim import AdamW
from tests.support import tiny_models

IDS = torch.arange(3, 40)[None] % tiny_models.VOCABULARY


def test_zero_gate_up_is_silent_and_every_branch_learns() -> None:
    base = tiny_models.model("llama", mlp_bias=False)
    model = expand_model(base, [0, 2], "zero_gate_up")
    verify_expansion(base, model)
    source, copy = base.model.layers[2], copies(model)[1]
    assert copy.mlp.down_proj.weight.equal(source.mlp.down_proj.weight) and copy.mlp.gate_proj.weight.equal(source.mlp.gate_proj.weight)
    assert not copy.mlp.up_proj.weight.any() and not copy.self_attn.o_proj.weight.any()
    freeze_original(model)
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3, weight_decay=0.1)
    before = {name: parameter.clone() for name, parameter in copy.named_parameters()}
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    gradual = {name for name, parameter in copy.named_parameters() if not name.endswith("norm.weight") and parameter.equal(before[name])}
    assert not gradual and copy.mlp.up_proj.weight.any() and copy.self_attn.o_proj.weight.any()


@pytest.mark.parametrize(("family", "reason"), [("gpt2", "no MLP with an up_proj"), ("olmo2", "a norm comes behind")])
def test_zero_gate_up_is_refused_where_it_cannot_be(family: str, reason: str) -> None:
    changes = {"n_layer": 4, "n_embd": 32, "n_head": 4} if family == "gpt2" else {}
    with pytest.raises(UnsupportedFamilyError, match=f"^{family}: cannot be expanded by zero_gate_up: .*{reason}"):
        expand_model(tiny_models.model(family, **changes), [1], "zero_gate_up")


@pytest.mark.parametrize("how", PRESERVING)
def test_on_disk_as_in_memory(how: str, tmp_path: Path) -> None:
    source = tiny_models.checkpoint(tmp_path / "base", "qwen3")
    record = expand_checkpoint(source, tmp_path / "expanded", [1], initialisation=how)
    assert record.initialisation == how == AdeptConfig.load(tmp_path / "expanded").initialisation
    assert (record.proof.get("logits") == "bit-equal") == PRESERVING[how] and (how in record.proof.get("note", "")) != PRESERVING[how]
    base, written = load_file(source / "model.safetensors"), load_file(tmp_path / "expanded" / "model.safetensors")
    plain, expanded = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "expanded"))
    assert plain(IDS).logits.equal(expanded(IDS).logits) == PRESERVING[how]
    if not PRESERVING[how]:
        with pytest.raises(ExpansionError, match="largest logit difference"):
            verify_expansion(plain, expanded)
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        original, copy = base[f"model.layers.1.{part}.weight"], written[f"model.layers.2.{part}.weight"]
        if how == "scaled_source":
            assert copy.equal((0.1 * original.double()).float())
        if how == "small_random":
            scale = float(copy.double().std() / original.double().square().mean().sqrt())
            assert scale == pytest.approx(0.02, rel=0.05) and abs(float(copy.mean())) < 0.1 * float(copy.std())
    dial(tmp_path / "expanded", tmp_path / "closed", 0, verify=False)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "closed")(IDS).logits.equal(plain(IDS).logits)


def test_an_unknown_one_is_refused() -> None:
    with pytest.raises(InputError, match="^initialisation must be one of zero_output"):
        expand_model(tiny_models.model(), [1], "ones")


@pytest.mark.slow
def test_the_command_says_that_the_function_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("ADEPT_FAST_CACHE", str(tmp_path / "cache"))
    tiny_models.checkpoint(tmp_path / "base")
    given = [f"model_name_or_path={tmp_path / 'base'}", f"output_dir={tmp_path / 'out'}", "expand.layers=[1]", "eval.max_items=4"]
    given += ["tune.max_items=4", "expand.initialisation=scaled_source"]
    for command in ("expand", "verify", "eval"):
        assert main([command, *given]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert said.count("scaled_source changes what the model computes") == 2 and "logits differ by up to" in said
    models = json.loads((tmp_path / "out" / "eval.json").read_text())["models"]
    assert models["expanded"]["general"]["loss"] != models["base"]["general"]["loss"]
    assert main(["expand", *given[:-1]]) == 2 and "expand.initialisation" in capsys.readouterr().err
