"""Choosing by budget, and how sure a choice is: against the definitions, on scores made for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from adept_fast import compare_scores, corpus_conflicts, expand_model, freeze_original, score_layers, select_layers, selection_stability
from adept_fast.checkpoints import checkpoint
from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.errors import InputError
from adept_fast.pipeline.recipe import load
from adept_fast.pipeline.run import STAGES
from adept_fast.pipeline.run_directory import RunDirectory
from adept_fast.scoring.profile import Profile
from adept_fast.scoring.scores import ItemScores, LayerScores, UnitScores, mean_rank
from adept_fast.scoring.select_layers import next_layer, undecided
from tests.support import tiny_models
from tests.support.news import heard

CHANGES = {"num_hidden_layers": 6, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def scored() -> tuple[torch.nn.Module, LayerScores]:
    model = tiny_models.model(**CHANGES)
    domain = tiny_models.items(7, seed=5)
    return model, score_layers(model, tiny_models.items(20), loss="kl", domain=domain)


def made(sums: torch.Tensor, method: str = "masking", loss: str = "answer", other: torch.Tensor | None = None) -> LayerScores:
    """Scores whose items are given, [items, layers], each of one token."""
    per_item = {loss: ItemScores(sums, torch.ones(len(sums), dtype=torch.float64))}
    if other is not None:
        per_item["domain"] = ItemScores(other, torch.ones(len(other), dtype=torch.float64))
    profiles = {name: scores.profile(method) for name, scores in per_item.items()}
    made = {"method": method, "loss": loss, "profiles": profiles, "items": len(sums), "tokens": len(sums), "seconds": 1.0}
    return LayerScores(**made, per_item=per_item)


def test_parameter_share_is_what_trains(scored: tuple) -> None:
    model, scores = scored
    expanded = expand_model(model, [1, 4])
    trained = freeze_original(expanded).trainable
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert scores.costs.shares([1, 4])["parameters"] == trained / whole


@pytest.mark.slow
def test_time_share_counts_the_products_of_a_step(scored: tuple) -> None:
    """Against FLOPs that torch counts in one step each, on sequences so short that attention's own products hardly count."""
    from torch.utils.flop_counter import FlopCounterMode

    _, scores = scored
    ids = torch.randint(3, tiny_models.VOCABULARY, (16, 2))

    def flops(trained: torch.nn.Module) -> int:
        counter = FlopCounterMode(display=False)
        with counter:
            trained(input_ids=ids, labels=ids).loss.backward()
        trained.zero_grad()
        return counter.get_total_flops()

    whole = flops(tiny_models.model(**CHANGES))
    for layers in ([1, 4], [3, 4, 5], [5]):
        expanded = expand_model(tiny_models.model(**CHANGES), layers)
        freeze_original(expanded)
        assert scores.costs.shares(layers)["time"] == pytest.approx(flops(expanded) / whole, rel=0.03)


@pytest.mark.slow
def test_budget_of_a_model_with_copies_counts_it_as_it_is() -> None:
    """The second of two expansions: what trains of what the first one made, copied among the layers that are no copies."""
    from torch.utils.flop_counter import FlopCounterMode

    first = expand_model(tiny_models.model(**CHANGES), [1, 4])
    scores = score_layers(first, tiny_models.items(8))
    assert scores.copies == (2, 6) and scores.candidates == [0, 1, 3, 4, 5, 7]
    ids = torch.randint(3, tiny_models.VOCABULARY, (16, 2))

    def flops(trained: torch.nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            trained(input_ids=ids, labels=ids).loss.backward()
        return counter.get_total_flops()

    whole, parameters = flops(first.requires_grad_(True)), sum(parameter.numel() for parameter in first.parameters())
    for k in (1, 2, 3):
        layers = select_layers(scores, k, "lowest_per_band")
        shares = scores.costs.shares(layers)
        assert select_layers(scores, placement="lowest_per_band", budget=shares) == layers
        second = expand_model(first, layers)
        assert shares["parameters"] == freeze_original(second).trainable / parameters
        assert shares["time"] == pytest.approx(flops(second) / whole, rel=0.03)


def test_budget_takes_as_many_layers_as_it_allows(scored: tuple) -> None:
    _, scores = scored
    for placement in ("lowest", "lowest_per_band", "uniform"):
        for name, share in (("parameters", 0.4), ("time", 0.75)):
            layers = select_layers(scores, placement=placement, budget={name: share})
            assert scores.costs.shares(layers)[name] <= share
            more = [select_layers(scores, k, placement) for k in range(len(layers) + 1, 7)]
            assert all(scores.costs.shares(choice)[name] > share for choice in more)
    both = select_layers(scores, budget={"parameters": 0.4, "time": 0.6})
    assert len(both) <= min(len(select_layers(scores, budget={name: share})) for name, share in (("parameters", 0.4), ("time", 0.6)))
    following = next_layer(scores, both)
    assert following["layers"] == select_layers(scores, len(both) + 1) and following["joins"] == sorted({*following["layers"]} - {*both})
    assert following["shares"]["parameters"] > scores.costs.shares(both)["parameters"]
    assert next_layer(scores, list(range(6))) is None
    with pytest.raises(InputError, match="allows no copy: that of one layer takes"):
        select_layers(scores, budget={"parameters": 0.01})
    rising = dataclasses.replace(made(torch.arange(6.0).double().expand(8, 6)), costs=scores.costs)  # the lowest takes most time
    with pytest.raises(InputError, match="allows no copy: the cheapest choice takes"):
        select_layers(rising, budget={"time": 0.99 * scores.costs.shares([0])["time"]})
    with pytest.raises(InputError, match="above 0 and at most 1"):
        select_layers(scores, budget={"time": 1.5})
    with pytest.raises(InputError, match="takes parameters and time"):
        select_layers(scores, budget={"memory": 0.5})
    with pytest.raises(InputError, match="chooses k itself"):
        select_layers(scores, 2, budget={"time": 0.5})


def test_domain_is_a_profile_of_its_own_items(scored: tuple, tmp_path) -> None:
    model, scores = scored
    alone = score_layers(model, tiny_models.items(7, seed=5), loss="all")
    torch.testing.assert_close(torch.tensor(scores.profiles["domain"].values), torch.tensor(alone.values), atol=1e-6, rtol=0)
    assert scores.profiles["domain"].base_loss == pytest.approx(alone.base_loss)
    scores.save(tmp_path / "scores.json")
    assert LayerScores.load(tmp_path / "scores.json") == scores
    cheap = score_layers(model, tiny_models.items(3), "block_influence", domain=tiny_models.items(2, seed=5))
    assert set(cheap.profiles) == {"hidden", "domain"}


def test_methods_that_are_no_plain_means_are_resampled_by_their_own_statistic() -> None:
    several = [score_layers(tiny_models.model(**CHANGES), tiny_models.items(6), method) for method in ("rank", "cumulative")]
    found = compare_scores(several)
    assert 0 < found["low"][0][1] <= found["spearman"][0][1] <= found["high"][0][1] <= 1
    means = torch.tensor([[100.0, 1.0], [1.0, 2.0], [2.0, 3.0]]).double()  # by their mean layers 1 and 2 are the lowest
    found = selection_stability(made(means.expand(20, 3, 2), "rank"), [0, 1])
    assert [entry["same"] for entry in found["sizes"]] == [1, 1]


def test_a_kind_that_a_layer_lacks_takes_no_part_in_its_mean_rank() -> None:
    lacking = float("nan")
    found = mean_rank(torch.tensor([[[3.0, lacking], [1.0, 0.0], [2.0, 7.0]]]).double())
    assert found.tolist() == [pytest.approx([1 - 1 / 3, 1 - (3 + 2) / 2 / 3, 1 - (2 + 1) / 2 / 3])]


def test_undecided_are_those_whose_interval_reaches_below_the_highest_end_of_the_chosen() -> None:
    profile = Profile((1.0, 2.0, 3.6, 5.0, 3.7), (0.5, 1.8, 3.4, 3.5, 3.6), (3.5, 2.2, 3.8, 6.0, 3.8), None)
    scores = LayerScores(method="masking", loss="answer", profiles={"answer": profile}, items=9, tokens=9, seconds=1.0)
    assert undecided(scores, [0, 1]) == [2] and undecided(scores, [0, 1], "uniform") == []
    assert undecided(dataclasses.replace(scores, copies=(2,)), [0, 1]) == []


def test_stability_is_the_share_of_random_probes_that_choose_alike() -> None:
    """Two layers tie but for a coin per item: of n items the first is lower with the probability of more heads than tails."""
    generator = torch.Generator().manual_seed(0)
    coins = torch.cat([torch.ones(40), -torch.ones(40)])[torch.randperm(80, generator=generator)].double()
    sums = torch.stack([coins, torch.zeros(80), torch.full((80,), 5.0), -torch.full((80,), 5.0)], 1).double()
    sums[0, 0] -= 0.5  # without ties
    found = selection_stability(made(sums), [0, 3])
    assert [entry["items"] for entry in found["sizes"]] == [16, 64, 80]
    for entry in found["sizes"]:
        frequency = entry["frequency"]
        assert frequency[3] == 1 and frequency[2] == 0 and frequency[0] + frequency[1] == 1 and entry["same"] == frequency[0]
        # more heads than tails, of n draws: half of what is no tie, and ties where the first item, half a coin lower, is among them
        assert frequency[0] == pytest.approx(0.5, abs=0.12)
    sure = selection_stability(made(torch.arange(5.0).double().expand(20, 5)), [0, 2], "lowest_per_band")
    assert all(entry["same"] == 1 for entry in sure["sizes"]) and [entry["items"] for entry in sure["sizes"]] == [16, 20]
    with pytest.raises(InputError, match=r"keep scores\.items\.safetensors"):
        selection_stability(dataclasses.replace(made(sums), per_item={}), [0, 3])


def test_of_a_race_the_items_count_that_all_layers_were_measured_on() -> None:
    generator = torch.Generator().manual_seed(4)
    levels = torch.arange(5.0, dtype=torch.float64)
    noise = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    other = levels[[4, 1, 2, 3, 0]] + noise[:30] / 20
    whole, cheap = (levels + noise)[torch.randperm(60, generator=generator)], made(levels + 2 * noise, "gate")
    before = torch.arange(60) % 3 > 0
    dropped = whole.clone()
    dropped[~before, 4] = torch.nan
    dropped[55:, 1] = torch.nan
    before[55:] = False
    raced = dataclasses.replace(made(dropped, other=other), certificate={"k": 2})
    part = made(whole[before], other=other)
    assert selection_stability(raced, [0, 1]) == selection_stability(part, [0, 1]) and int(before.sum()) == 36
    assert corpus_conflicts(raced, "answer", "domain") == corpus_conflicts(part, "answer", "domain")
    assert compare_scores([raced, cheap]) == compare_scores([part, made(cheap.per_item["answer"].sums[before], "gate")])


def test_conflicts_are_ranks_whose_intervals_do_not_meet() -> None:
    generator = torch.Generator().manual_seed(1)
    levels = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    noise = torch.randn(50, 5, generator=generator, dtype=torch.float64) * 0.05
    swapped = levels[[4, 1, 2, 3, 0]]
    found = corpus_conflicts(made(levels + noise, other=swapped + noise[:30]), "answer", "domain")
    assert sorted(found["layers"]) == [0, 4] and found["ranks"]["domain"][0] == [4, 4, 4]
    assert found["spearman"] == pytest.approx(1 - 6 * (16 + 16) / (5 * 24))
    loud = torch.randn(50, 5, generator=generator, dtype=torch.float64) * 100
    assert corpus_conflicts(made(levels + loud, other=swapped + loud), "answer", "domain")["layers"] == []


def test_comparison_gives_spearman_and_covers_it() -> None:
    generator = torch.Generator().manual_seed(2)
    levels = torch.arange(8.0, dtype=torch.float64)
    one = levels + torch.randn(60, 8, generator=generator, dtype=torch.float64)
    two = levels[[1, 0, 2, 3, 4, 5, 7, 6]] + torch.randn(60, 8, generator=generator, dtype=torch.float64)
    found = compare_scores([made(one), made(two, "gate"), made(-one, "fisher")])
    assert found["names"] == ["masking, answer", "gate, answer", "fisher, answer"]
    assert found["spearman"][0][1] == pytest.approx(1 - 6 * 4 / (8 * 63)) and found["spearman"][0][2] == pytest.approx(-1)
    assert found["low"][0][1] <= found["spearman"][0][1] <= found["high"][0][1] < 1
    assert found["low"][0][2] == pytest.approx(-1) and found["high"][0][2] == pytest.approx(-1), "the same items were not drawn for both"
    json.dumps(found)
    for wrong in ([made(one)], [made(one), made(one[:30])], [made(one), made(one[:, :5])]):
        with pytest.raises(InputError, match="comparison needs two|of one model and one probe"):
            compare_scores(wrong)


@pytest.mark.slow
def test_score_draws_how_sure_the_choice_is_and_expand_keeps_to_the_budget(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_models.checkpoint(tmp_path / "model", **CHANGES)
    rows = [{"instruction": f"The fox counts {number} and", "output": f" {number + 1} stones"} for number in range(40)]
    (tmp_path / "probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "domain.txt").write_text("\n\n".join(tiny_models.SENTENCES))
    given = ["model_name_or_path=model", "output_dir=out", "probe=probe.jsonl", "domain=domain.txt", "score.domain_items=6"]
    given += ["score.compare=[gate, block_influence]", "expand.budget.parameters=0.3", "score.units=tensor"]
    given += ["score.unit_layers=[2, 5]"]
    loaded, load_model = [], checkpoint.load_model
    monkeypatch.setattr(checkpoint, "load_model", lambda *given, **how: loaded.append(given) or load_model(*given, **how))
    recipe, directory = load(None, given), RunDirectory(Path("out"))
    with directory.held(), heard() as said:
        scores = STAGES["score"](recipe, directory)
        assert len(loaded) == 1, "layers, two cheap methods and units are measured on one model"
        record, _ = STAGES["expand"](recipe, directory), STAGES["report"](recipe, directory)
    layers = select_layers(LayerScores.load(tmp_path / "out" / "scores.json"), budget={"parameters": 0.3})
    assert [entry.copied_from for entry in record.inserted] == layers and len(layers) == 2
    assert record.selection["shares"]["parameters"] <= 0.3 and record.selection["next"]["joins"]
    assert set(scores.profiles) == {"answer", "kl", "all", "domain"}
    analysis = json.loads((tmp_path / "out" / "scores.json").read_text())["analysis"]
    assert analysis["stability"]["layers"] == layers and len(analysis["stability"]["sizes"][-1]["frequency"]) == 6
    assert analysis["comparison"]["names"] == ["masking, answer", "gate, answer", "block_influence"]
    units = UnitScores.load(tmp_path / "out" / "unit_scores.json")
    assert units.layers == (2,) * 7 + (5,) * 7 and any("masking 14 units on" in line and "about 7 forwards" in line for line in said)
    for name in ("scores", "unit_scores", "scores.stability", "scores.conflicts", "scores.comparison"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
    page = (tmp_path / "out" / "report.html").read_text()
    assert "How often each layer would be chosen" in page and "With one more copy" in page and page.count('<div class="chart"') == 5
    before = (tmp_path / "out" / "scores.json").stat().st_mtime_ns
    with directory.held():
        STAGES["score"](recipe, directory)
    assert (tmp_path / "out" / "scores.json").stat().st_mtime_ns == before, "written again although nothing is new"
    with pytest.raises(InputError, match="a race is for a given number of layers"):
        STAGES["score"](load(None, [*given, "score.regret=0.04", "output_dir=other"]), RunDirectory(Path("other")))


@pytest.mark.slow
def test_a_run_names_what_was_measured_and_refuses_a_race_for_all_layers_before_it_begins(tmp_path: Path) -> None:
    tiny_models.checkpoint(tmp_path / "model", **CHANGES)
    rows = [{"instruction": f"The fox counts {number} and", "output": f" {number + 1} stones"} for number in range(9)]
    (tmp_path / "probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"model_name_or_path={tmp_path / 'model'}", f"output_dir={tmp_path / 'out'}", f"probe={tmp_path / 'probe.jsonl'}"]
    directory = RunDirectory(tmp_path / "out")

    def stages(*names: str, choice: tuple[str, ...]) -> list[str]:
        """What is said."""
        recipe = load(None, [*given, *choice], ("model_name_or_path",))
        with directory.held(), heard() as said:
            for name in names:
                STAGES[name](recipe, directory)
        return said

    with pytest.raises(InputError, match="^expand.k must be a whole number from 1 to 5"):
        stages("score", choice=("expand.k=6", "score.regret=0.1"))
    assert not (tmp_path / "out").exists(), "something was measured first"
    said: list[str] = []
    for choice in (("expand.k=6",), ("expand.k=2", "expand.placement=uniform")):
        said += stages("score", choice=("score.method=fisher", *choice))
        assert not any("choose the same" in line for line in said), "nothing else could have been chosen"
    said += stages("score", "expand", "report", choice=("score.method=fisher", "expand.k=2"))
    assert any(line.endswith("would choose the same layers") for line in said)
    assert any(line.endswith("probe items by fisher") for line in said)
    assert any(line.startswith("chosen layers (fisher, sum of squared gradients): ") for line in said)
    assert "Score (fisher, sum of squared gradients)" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["method=adept", "method=uniform"])
def test_a_second_expansion_copies_layers_that_are_no_copies(tmp_path: Path, how: str) -> None:
    tiny_models.checkpoint(tmp_path / "model", **CHANGES)
    (tmp_path / "probe.jsonl").write_text("".join(json.dumps({"text": f"The fox counts {number} stones"}) + "\n" for number in range(9)))
    given = [f"probe={tmp_path / 'probe.jsonl'}", "score.method=fisher", "score.loss=all", "expand.placement=lowest_per_band"]

    def expanded(model: str, output: str, *more: str) -> tuple[AdeptConfig, list[str]]:
        places = [f"model_name_or_path={tmp_path / model}", f"output_dir={tmp_path / output}"]
        recipe, directory = load(None, [*given, *places, *more], ("model_name_or_path",)), RunDirectory(tmp_path / output)
        with directory.held(), heard() as said:
            STAGES["score"](recipe, directory)
            return STAGES["expand"](recipe, directory), said

    expanded("model", "first", "expand.layers=[1,4]")
    record, said = expanded("first/expanded", "second", "expand.k=6", how)
    assert [entry.copied_from for entry in record.inserted if entry.round] == [0, 1, 2, 3, 4, 5]
    assert any("chosen layers" in line for line in said) and not any("would choose the same" in line for line in said)
    with pytest.raises(InputError, match="from 1 to 6, the number of layers"):
        expanded("first/expanded", "third", "expand.k=7", how)
