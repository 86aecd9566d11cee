"""Find parameters of an optimizer by tensor or by name, and set their learning-rate multipliers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.optim.arguments import checked_multipliers
from adept_fast.optim.state import RATES
from adept_fast.settings.validation import shown

Group = dict[str, Any]
NAMES = "param_names"  # torch's key, of groups that were given (name, parameter)


def located(groups: Sequence[Group], param: Tensor | str) -> list[tuple[Group, int]]:
    """Return (group, position) of a parameter, or of all parameters whose names match a pattern. Raises InputError if there is none."""
    if isinstance(param, str):
        named = [(name, group, position) for group in groups for position, name in enumerate(group.get(NAMES, ()))]
        if not named:
            raise InputError(f"param: {shown(param)} is a name, but the parameters have none: give AdamW model.named_parameters()")
        found = [(group, position) for name, group, position in named if fnmatchcase(name, param)]
        if not found:
            near = difflib.get_close_matches(param, [name for name, _, _ in named], 3, 0.0)
            raise InputError(f"param: no parameter's name matches {shown(param)}; names are such as {', '.join(near)}")
        return found
    found = [(group, position) for group in groups for position, each in enumerate(group["params"]) if each is param]
    if not found:
        what = f"shape {tuple(param.shape)}" if isinstance(param, Tensor) else f"{param!r}, not a Tensor"
        raise InputError(f"param: in none of this optimizer's groups ({what}); give the parameter itself, add it with add_param_group")
    return found


def set_rates(groups: Sequence[Group], rates: Mapping[Any, Tensor | float | None], dim: int) -> None:
    """Set or remove multipliers by parameter or pattern, after all of them have been checked."""
    chosen: list[tuple[Group, int, tuple[Tensor, int] | None]] = []
    for param, multipliers in rates.items():
        for group, position in located(groups, param):
            where = f"{group[NAMES][position]}: multipliers" if isinstance(param, str) else "multipliers"
            one = group["params"][position]
            chosen.append((group, position, None if multipliers is None else checked_multipliers(one, multipliers, dim, where)))
    for group, position, given in chosen:
        held = group.get(RATES, {}).get(position)
        if given is None:
            group.get(RATES, {}).pop(position, None)
            if not group.get(RATES, True):
                del group[RATES]
        elif held is not None and (held[0].shape, held[0].device, held[1]) == (given[0].shape, given[0].device, given[1]):
            held[0].copy_(given[0])  # in place, so that a captured or compiled step sees them
        else:
            group.setdefault(RATES, {})[position] = given
