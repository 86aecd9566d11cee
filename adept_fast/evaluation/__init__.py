"""Measure what a model gained and what it lost."""

from adept_fast.evaluation.evaluate_model import evaluate
from adept_fast.evaluation.evaluation_corpus import EvaluationCorpus, corpus
from adept_fast.evaluation.largest_alpha import largest_alpha

__all__ = ["EvaluationCorpus", "corpus", "evaluate", "largest_alpha"]
