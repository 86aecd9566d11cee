"""Every public entry takes the model out of wrappers that compute the same, and refuses all else with the remedy in one line."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    TextGenerationPipeline,
    TrainingArguments,
)

from adept_fast import (
    AdamW,
    AdeptCallback,
    AdeptTrainer,
    Anchor,
    InputError,
    Units,
    apply_rates,
    compare_scores,
    corpus_conflicts,
    expand_model,
    fast_step,
    freeze_original,
    mask_units,
    score_layers,
    score_units,
    select_layers,
    unit_rates,
    verify_expansion,
)
from adept_fast.evaluation.evaluate_model import evaluate
from adept_fast.expansion.bypass import bypassed
from adept_fast.expansion.dial import dialled_model
from adept_fast.models.unwrap import unwrapped
from adept_fast.scoring.unit_masking import masked_units
from tests.support import tiny_models

LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
BERT = BertConfig(vocab_size=100, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
T5 = T5Config(vocab_size=100, d_model=8, d_kv=4, d_ff=8, num_layers=1)


def entered(context):
    with context:
        pass


def entries(tmp_path):
    """Name -> a call of a public entry with a model."""
    items = tiny_models.items(3)
    expanded = expand_model(tiny_models.model(), [1])
    units, args = Units.of(expanded), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    adept = AdeptCallback(items)
    return {
        "score_layers": lambda model: score_layers(model, items),
        "mask_units": lambda model: mask_units(model, items),
        "masked_units": lambda model: masked_units(model, "tensor"),
        "score_units": lambda model: score_units(model, items, units),
        "expand_model": lambda model: expand_model(model, [0]),
        "freeze_original": freeze_original,
        "verify_expansion": lambda model: verify_expansion(tiny_models.model(), model),
        "verify_expansion of base": lambda model: verify_expansion(model, expanded),
        "fast_step": lambda model: entered(fast_step(model)),
        "Units.of": Units.of,
        "AdeptTrainer": lambda model: AdeptTrainer(model, args, adept=adept, train_dataset=[]),
        "AdeptCallback": lambda model: AdeptCallback(items).on_init_end(args, None, None, model),
        "Anchor": lambda model: Anchor(items, 0.5).backward(model, 4),
        "bypassed": lambda model: entered(bypassed(model)),
        "dialled_model": lambda model: entered(dialled_model(model, 0.5)),
        "evaluate": lambda model: evaluate(model, None, None),
    }


def injected():
    return peft.inject_adapter_in_model(peft.LoraConfig(**LORA), expand_model(tiny_models.model(), [1]))


def prompted():
    return peft.get_peft_model(tiny_models.model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def pipeline():
    return TextGenerationPipeline(tiny_models.model(), tiny_models.tokenizer())


def classifier():
    return AutoModelForSequenceClassification.from_config(tiny_models.model().config)


REFUSED = {
    "None": (lambda: None, "found NoneType: load one by AutoModelForCausalLM.from_pretrained"),
    "folder": (lambda: "models/my-llama", "load it by AutoModelForCausalLM.from_pretrained.'models.my-llama'."),
    "module": (lambda: torch.nn.Linear(2, 2), "found Linear: load one by"),
    "tokenizer": (tiny_models.tokenizer, "found .*Tokenizer.*: load one by"),
    "pipeline": (pipeline, r"found TextGenerationPipeline: pass \w+\.model"),
    "peft": (lambda: peft.get_peft_model(tiny_models.model(), peft.LoraConfig(**LORA)), r"merge_and_unload\(\)"),
    "prompt": (prompted, r"whose prompt no weights can hold: pass \w+\.get_base_model\(\)"),
    "injected": (injected, r"adapters were injected \(model\.layers\.0\.self_attn\.q_proj\): merge"),
    "classifier": (classifier, "LlamaForSequenceClassification has no language-model head"),
    "headless": (lambda: AutoModel.from_config(tiny_models.model().config), "LlamaModel has no language-model head"),
    "masked": (lambda: BertForMaskedLM(BERT), "BertForMaskedLM has no language-model head"),
    "encoder-decoder": (lambda: T5ForConditionalGeneration(T5), "t5: an encoder-decoder"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_every_entry_refuses_in_one_line_with_the_remedy(tmp_path, kind):
    make, message = REFUSED[kind]
    model = make()
    for name, call in entries(tmp_path).items():
        with pytest.raises(InputError, match=message) as refusal:
            call(model)
        assert "\n" not in str(refusal.value), name


def wrappers(model):
    compiled = torch.compile(model, backend="eager")
    return [torch.nn.DataParallel(model), compiled, torch.nn.DataParallel(compiled)]


@pytest.mark.slow
def test_wrappers_that_compute_the_same_are_taken_off(tmp_path):
    items, base = tiny_models.items(3), tiny_models.model()
    expanded = expand_model(base, [1])
    scores, units = score_layers(base, items), Units.of(expanded)
    importance = score_units(expanded, items, units)
    for wrapped, around in zip(wrappers(expanded), wrappers(base), strict=True):
        assert unwrapped(wrapped) is expanded
        assert score_layers(around, items).profiles == scores.profiles
        assert [unit.name for unit in Units.of(wrapped)] == [unit.name for unit in units]
        assert torch.equal(score_units(wrapped, items, units).fisher, importance.fisher)
        assert expand_model(around, [1]).adept_config.inserted == expanded.adept_config.inserted
        verify_expansion(around, wrapped)
        assert freeze_original(wrapped) == freeze_original(expanded)
        with pytest.raises(InputError, match="the Trainer wraps it itself"):
            entries(tmp_path)["AdeptTrainer"](wrapped)


def test_merged_adapters_are_part_of_the_model():
    wrapped = peft.get_peft_model(tiny_models.model(), peft.LoraConfig(**LORA, init_lora_weights=False))
    ids = torch.arange(3, 12)[None]
    adapted = wrapped.eval()(input_ids=ids).logits
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(expand_model(merged, [1])(input_ids=ids).logits, adapted)


@pytest.mark.parametrize("call", [lambda given: select_layers(given, 1), lambda given: compare_scores([given, given])])
def test_what_is_no_scores_is_refused(call):
    with pytest.raises(InputError, match="(scores|several) must be what score_layers returns, found LlamaForCausalLM"):
        call(tiny_models.model())


def test_arguments_of_another_kind_are_refused_with_what_makes_them(tmp_path):
    items, model = tiny_models.items(3), expand_model(tiny_models.model(), [1])
    units, args = Units.of(model), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    adept = AdeptCallback(items)
    calls = {
        "probe must be Iterable": [lambda given: score_layers(model, given), lambda given: score_units(model, given, units)],
        "layers must be Iterable": [lambda given: expand_model(tiny_models.model(), given)],
        "inputs must be Tensor": [lambda given: verify_expansion(tiny_models.model(), model, given)],
        "units must be Units": [
            lambda given: score_units(model, items, given),
            lambda given: apply_rates(AdamW(model.parameters()), model, given, torch.ones(9)),
            lambda given: AdeptCallback(items, given).on_init_end(args, None, None, model),
        ],
        "rates must be Iterable": [lambda given: apply_rates(AdamW(model.parameters()), model, units, given)],
        "importance must be UnitImportance": [unit_rates],
        "several must be Sequence": [compare_scores],
        "scores must be what": [lambda given: corpus_conflicts(given, "answer", "all")],
        "items must be Sequence": [lambda given: Anchor(given, 0.5)],
        "an item of an anchor must be Item": [lambda given: Anchor([given], 0.5), lambda given: Anchor([{"text": "a"}], 0.5)],
        "args must be TrainingArguments": [lambda given: AdeptTrainer(model, given, adept=adept, train_dataset=[])],
        "adept must be AdeptCallback": [lambda given: AdeptTrainer(model, args, adept=given, train_dataset=[])],
    }
    for message, each in calls.items():
        for call in each:
            for given in (None, 3, 1.5):
                if message.startswith("inputs") and given is None:
                    continue
                with pytest.raises(InputError, match=rf"^{message}.*, found \w+: ") as refusal:
                    call(given)
                assert "\n" not in str(refusal.value)
