"""What the pages quote of bench/results/adamw-cpu.json: `python -m bench.adamw_pages` writes it there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench.adamw_setups import SETUPS

ROOT = Path(__file__).parents[1]
STORED = ROOT / "bench" / "results" / "adamw-cpu.json"
README, OPTIMIZER = ROOT / "README.md", ROOT / "docs" / "how-to" / "optimizer.md"
COLUMNS = {
    "ours": ("ours",),
    "ours, 465 units": ("units",),
    "ours, a rate per row, per column": ("rows", "columns"),
    "torch fused": ("torch_fused",),
    "torch fused, 465 groups": ("torch_group_per_unit",),
    "ours, clipping": ("clipped",),
    "torch, clipping and fused": ("torch_clip_and_fused",),
    "torch foreach": ("torch_foreach",),
}
DTYPES = ("fp32", "bf16")


def written(stored: dict[str, Any]) -> dict[Path, str]:
    """Return the pages with the figures of a stored result."""
    machine, result = stored["machine"], stored["result"]
    fp32, bf16 = (result[dtype] for dtype in DTYPES)
    date, cpu = machine["date"][:10], re.sub(r"\((R|TM)\)| Processor", "", machine["cpu"]).strip()
    about = (
        f"`python -m bench adamw`: the parameters of a model of 1 billion, widths divided by {result['scale']} ({fp32['tensors']} tensors, "
        f"{fp32['elements'] / 1e6:.0f} million\nparameters), median ms of interleaved steps; {date}, {machine['cores']} cores of an {cpu}, "
        f"torch {machine['torch'].partition('+')[0]}; [whole result](../../bench/results/adamw-cpu.json):"
    )
    speed = _table(["dtype", *COLUMNS], [[dtype, *_times(result[dtype])] for dtype in DTYPES])
    section = "\n\n".join(["## What a step costs", about, speed, *_beside_others(result)]) + "\n\n"
    optimizer = re.sub(r"^## What a step costs\n.*?(?=^## )", lambda _: section, _text(OPTIMIZER), flags=re.MULTILINE | re.DOTALL)
    costs = [100 * (entry["ratios"][f"{way}/ours"] - 1) for entry in (fp32, bf16) for way in ("units", "rows", "columns")]
    cost = f"rates cost {max(min(costs), 0):.0f} to {max(*costs, 0):.0f} % of a step"
    row = (
        f"| AdamW step, {bf16['elements'] / 1e6:.0f} M parameters in bf16 | {_ms(bf16, 'ours')} ms; with {result['units']} units "
        f"{_ms(bf16, 'units')} ms | torch's fused: {_ms(bf16, 'torch_fused')} ms; with {result['units']} groups "
        f"{_ms(bf16, 'torch_group_per_unit')} ms | `python -m bench adamw`, {'X' if 'Xeon' in cpu else 'A'}, {date} |"
    )
    return {
        OPTIMIZER: re.sub(r"rates cost \d+ to \d+ % of a step", cost, optimizer),
        README: re.sub(r"^\| AdamW step, .*$", lambda _: row, _text(README), flags=re.MULTILINE),
    }


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _times(entry: dict[str, Any]) -> list[str]:
    return [", ".join(_ms(entry, way) for way in ways) for ways in COLUMNS.values()]


def _ms(entry: dict[str, Any], way: str) -> str:
    return f"{entry[way]['ms']:.0f}"


def _beside_others(result: dict[str, Any]) -> list[str]:
    """Return a table of all set-ups, where it was measured."""
    rows = []
    for name in SETUPS:
        entry = result.get(name, {})
        for way in ("ours", *(way for way in entry if not way.startswith("ours") and way.partition("_")[0] in result["packages"])):
            found = entry.get(way, {})
            if "state_bytes" in found and way != "torch_group_per_unit":
                distances = f"{100 * found['distance']:.2g}, {100 * found['spread']:.2g}"
                rows.append([name, way, _ms(entry, way), f"{found['state_bytes']:.1f}", str(found["python_calls"]), distances])
    if not rows:
        return []
    versions = ", ".join(f"{package} {version}" for package, version in result["packages"].items() if package != "torch")
    about = (
        "All set-ups, and other packages on the same tensors and in the same rounds"
        + f" ({versions})" * bool(versions)
        + ". Bytes: what each stores beside parameter and gradient, measured after a step.\nCalls: of Python and C functions in a step. "
        "Distance: from fp64 after 20 steps, in per cent of the way that weights moved; the second where gradients of neighbours differ\n"
        "in size by e^z, z normal, which is hard on formats that share a scale."
    )
    return [about, _table(["parameters and moments", "optimizer", "ms", "bytes", "calls", "distance, %"], rows)]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


if __name__ == "__main__":
    for page, text in written(json.loads(STORED.read_text())).items():
        page.write_text(text, encoding="utf-8")
