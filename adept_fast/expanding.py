"""The second stage of a run: expanded/, silent copies of the chosen layers, proven."""

from __future__ import annotations

from typing import Any

from adept_fast import checkpoint
from adept_fast.errors import InputError
from adept_fast.expansion import PRESERVING, expand_checkpoint, largest_difference, verify_expansion
from adept_fast.importance import LayerScores, undecided
from adept_fast.inputs import changed
from adept_fast.record import AdeptConfig
from adept_fast.scoring import Scoring


class Expanding(Scoring):
    """Copies of the layers that scoring chose."""

    def expand(self) -> AdeptConfig:
        if not self.method.copies:
            raise InputError(f"method={self.recipe.method} trains no copies: there is nothing to expand")
        scores = LayerScores.load(self.scores_path) if self.scores_path.exists() else None
        if scores is not None and "model" in changed(scores.inputs, self._score_inputs()):
            self.require_same(self.scores_path, scores.inputs, self._score_inputs())
        layers = self._chosen(scores)
        steering = self.corpora.steering()
        inputs = {**self.base_inputs(), **self.copies_inputs(layers), "steering items": self.corpora.digest(steering)}
        if self.expanded.exists():
            record = AdeptConfig.load(self.expanded)
            self.require_same(self.expanded, record.inputs, inputs)
            self.say(f"{self.expanded}: up to date")
            return record
        record = expand_checkpoint(
            self.source,
            self.expanded,
            layers,
            name=self.recipe.model_name_or_path,
            selection=self._selection(layers, scores),
            steering=self.items(steering),
            initialisation=self.recipe.expand.initialisation,
            inputs=inputs,
            quiet=self.quiet,
            **self.loading,
        )
        for note in record.selection["notes"]:
            self.say(note)
        trainable, total = record.parameters["trainable"], record.parameters["total"]
        share = f"{trainable:,} of {total:,} parameters ({trainable / total:.1%})"
        self.say(f"{self.expanded}: copies of layers {layers}; {_equality(record)}; {share} will train")
        return record

    def _selection(self, layers: list[int], scores: LayerScores | None) -> dict[str, Any]:
        """How the layers were chosen, for the record."""
        placement = self.recipe.expand.placement
        if self.recipe.expand.layers is not None or scores is None or self.method.uniform:
            return {"placement": "uniform" if self.method.uniform else "given", "k": len(layers), "notes": []}
        copies = self.earlier.copies if self.earlier else ()
        rivals = [layer for layer in undecided(scores, layers, placement) if layer not in copies]
        names = ", ".join(map(str, rivals))
        selection: dict[str, Any] = {
            "placement": placement,
            "k": len(layers),
            "notes": [f"the intervals do not part the chosen layers from {names}: more probe items might"] if rivals else [],
            "method": scores.method,
            "loss": scores.loss,
            "scores": [scores.values[layer] for layer in layers],
        }
        if scores.costs is not None:
            selection["next"] = self._following(scores, layers)
            selection["shares"] = scores.costs.shares(layers)
            self.say("shares of full training: parameters {parameters:.1%}, time {time:.0%} (modelled)".format(**selection["shares"]))
        return selection

    def verify(self) -> None:
        """Fresh loads of base and expanded: bit-equal logits, or how far they differ where the initialisation is to change them."""
        self.need(self.expanded, "expand")
        record = self.require_ours(self.expanded)
        base, expanded = (checkpoint.load_model(folder, **self.loading) for folder in (self.source, self.expanded))
        if not PRESERVING[record.initialisation]:
            far = f"by up to {largest_difference(base, expanded):.3g} from those of {self.recipe.model_name_or_path}"
            self.say(f"{self.expanded}: {_equality(record)}: logits differ {far}")
            return
        verify_expansion(base, expanded)
        dtype = self.recipe.dtype or "its own dtype"
        self.say(f"{self.expanded}: logits bit-equal to {self.recipe.model_name_or_path} in {dtype}, cached decoding too")


def _equality(record: AdeptConfig) -> str:
    if PRESERVING[record.initialisation]:
        return "logits bit-equal"
    return f"{record.initialisation} changes what the model computes"
