"""docs/reference/families.md, from the types themselves: `python tests/support/families_table.py > docs/reference/families.md`."""

from __future__ import annotations

from collections.abc import Iterable

from adept_fast.models.decoder_layers import text_config
from adept_fast.models.layer_config import expanded_config
from adept_fast.models.silent_copies import describe
from tests.support import tiny_families

HEADING = """# Model families

`tests/models/test_families.py` tests these types on tiny random models, with copies of the first, the third and the last layer.
The copies leave the logits and greedy decoding bit-equal, and a copy that is not silenced changes them. One AdamW step at lr 1e-5
changes a copy's relative output by less than 1e-3. Within three steps every silent tensor moves and every branch adds something.
The units cover each copy once. A type that is refused for a layer's index is refused for copies of these layers. `python
tests/support/families_table.py > docs/reference/families.md` writes this page.

Units: the fused projections of state-space layers and of linear attention are one unit under `tensor` and `head`. Experts are split by row
where rows are their neurons (gate and up projections of most), otherwise by expert. Flash attention, for which packed documents are
flattened, is untested on a GPU: the tests replace its kernels by plain torch. A model with PEFT adapters is refused: merge them first
(`merge_and_unload()`).
"""


def supported_rows(types: Iterable[str]) -> list[str]:
    rows = []
    for model_type in types:
        model = tiny_families.model(model_type)
        family, config = describe(model), text_config(model)
        fills = dict.fromkeys(f"{name} = {value:g}" for silent in family.silent for name, value in silent.items())
        changed = expanded_config(model.config, [0, 2, 3]).get_text_config(decoder=True).to_dict()
        fields = [key for key, value in config.to_dict().items() if changed.get(key) != value]
        rows.append(f"| {model_type} | {family.layers} | {', '.join(fills)} | {', '.join(fields)} |")
    return rows


def table(supported: Iterable[str], refused: dict[str, str]) -> str:
    return "\n".join(
        [
            HEADING,
            "| type | layers | filled in a copy | config fields changed |",
            "|---|---|---|---|",
            *supported_rows(supported),
            "",
            "Refused:",
            "",
            "| type | reason |",
            "|---|---|",
            *(f"| {model_type} | {reason} |" for model_type, reason in refused.items()),
            "",
        ]
    )


if __name__ == "__main__":
    from tests.models import test_families

    print(table(test_families.SUPPORTED, {**test_families.REFUSED, **test_families.NOT_A_MODEL_OF_ITS_OWN}), end="")
