"""Models that read ahead are refused, by whatever loads or scores them, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adept_fast import mask_units, score_layers
from adept_fast.checkpoints.checkpoint import load_model
from adept_fast.cli.main import main
from adept_fast.errors import UnsupportedFamilyError
from adept_fast.models.causality import require_causal
from tests.support import tiny_families, tiny_models

ENCODERS = ("bert", "roberta", "electra", "rembert", "xlm-roberta", "megatron-bert", "roberta-prelayernorm", "xlm-roberta-xl")


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_is_refused_until_it_is_told_to_decode(family: str) -> None:
    model = tiny_families.model(family, is_decoder=False)
    with pytest.raises(UnsupportedFamilyError, match=f"^{family}: reads ahead: .*: set is_decoder to true in its config.json$"):
        require_causal(model)
    require_causal(tiny_families.model(family, is_decoder=True))


def test_a_bidirectional_gemma_is_refused() -> None:
    with pytest.raises(UnsupportedFamilyError, match="^gemma3_text: reads ahead: .* adept_fast is for causal models$"):
        require_causal(tiny_families.model("gemma3_text", use_bidirectional_attention=True))


@pytest.mark.parametrize(
    "family", ["mixtral", "granitemoe", "gpt_oss", "deepseek_v3", "deepseek_v32", "llama4_text", "mamba2", "qwen3_next"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_sparse_attention_and_states_in_half_precision_pass(family: str, dtype: torch.dtype) -> None:
    require_causal(tiny_families.model(family).to(dtype))


@pytest.mark.parametrize("scale", [0.05, 30.0])
def test_weights_of_any_size_decide_nothing(scale: float) -> None:
    for decodes in (True, False):
        model = tiny_families.model("roberta-prelayernorm", is_decoder=decodes)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale if parameter.ndim > 1 else 1)
        if decodes:
            require_causal(model)
        else:
            with pytest.raises(UnsupportedFamilyError, match="reads ahead"):
                require_causal(model)


def test_a_model_is_left_as_it_was() -> None:
    model = tiny_models.model().train()
    model.model.layers[1].eval()
    model.model.embed_tokens.requires_grad_(False)
    modes, wanted = (
        [getattr(part, name) for part in parts]
        for name, parts in (("training", [*model.modules()]), ("requires_grad", [*model.parameters()]))
    )
    with torch.no_grad():
        require_causal(model)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters()) and not model.model.embed_tokens._forward_hooks


def test_neither_scored_nor_loaded(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    encoder = tiny_families.model("roberta-prelayernorm", is_decoder=False, vocab_size=tiny_models.VOCABULARY)
    encoder.save_pretrained("model")
    tiny_models.tokenizer().save_pretrained("model")
    for refused in (lambda: score_layers(encoder, tiny_models.items(2)), lambda: mask_units(encoder, tiny_models.items(2))):
        with pytest.raises(UnsupportedFamilyError, match="reads ahead"):
            refused()
    with pytest.raises(UnsupportedFamilyError, match="reads ahead"):
        load_model(tmp_path / "model")
    capsys.readouterr()
    assert main(["score", "model_name_or_path=model", "output_dir=out", "expand.k=2"]) == 2
    assert capsys.readouterr().err.startswith("adept-fast: roberta-prelayernorm: reads ahead: ") and not Path("out").exists()
