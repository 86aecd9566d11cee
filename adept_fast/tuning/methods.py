"""The methods that a recipe may name: ADEPT, its ablations, and the baselines that it is compared with on the same data and tokens.

| method    | copies          | trained                     | unit rates |
|-----------|-----------------|-----------------------------|------------|
| adept     | by expand.*     | copies                      | yes        |
| no_stage1 | evenly spaced   | copies                      | yes        |
| no_stage2 | by expand.*     | copies                      | no: all 1  |
| uniform   | evenly spaced   | copies (LLaMA Pro)          | no: all 1  |
| full      | none            | every parameter             | no         |
| replay    | none            | every parameter, tune.replay mixed in | no |
| lora      | none            | LoRA of all linear layers, merged at the end | no |
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """copies: train copies of layers. uniform: evenly spaced ones. rates: each unit at its own rate."""

    copies: bool = True
    uniform: bool = False
    rates: bool = False


METHODS = {
    "adept": Method(rates=True),
    "no_stage1": Method(uniform=True, rates=True),
    "no_stage2": Method(),
    "uniform": Method(uniform=True),
    "full": Method(copies=False),
    "replay": Method(copies=False),
    "lora": Method(copies=False),
}
