"""What DATA_PATH and the paths per split name: a pair, a blend of several, or a YAML file with such blends."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from megatron_rocm.config.yaml_file import read_yaml
from megatron_rocm.errors import UsageError

# Weight and prefix of each source. No weights: every token as often as any other.
Blend = Sequence[tuple["float | None", str]]
# A blend that SPLIT cuts into the splits, or the blend of each split by its name.
Paths = Blend | Mapping[str, Blend]

SPLITS = ("train", "valid", "test")
OWN_PATHS = {"train": "TRAIN_DATA_PATH", "valid": "VALID_DATA_PATH", "test": "TEST_DATA_PATH"}
PATH_VARIABLES = ("DATA_PATH", *OWN_PATHS.values())
SMALLEST_SHARE = 1e-5  # of a blend's weights; less than that is a slip of the pen, and would hardly ever be drawn
WAY_OUT = "give one prefix, or a weight before each: {key}='0.7 first/prefix 0.3 second/prefix'"
FILE_WAY_OUT = "write `prefix: weight` lines, or such lines under train:, valid: and test:"


def parse(text: str, key: str = "DATA_PATH") -> Paths:
    """`key`=`text` as Megatron reads it: one prefix, `weight prefix weight prefix …`, or prefixes alone.

    A name that ends in .yaml or .yml is a file of the same: its blend, or, for DATA_PATH alone, those of the splits by
    name. A prefix may carry its .bin or .idx. Weights are as typed, of any scale. Raises UsageError.
    """
    words = text.split()
    if not words:
        raise UsageError(f"{key} is empty: give the prefix of a .bin/.idx pair, or leave it unset for mock data")
    if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
        return _of_file(words[0], key)
    return _of_words(words, f"{key}={text}", WAY_OUT.format(key=key))


def chosen(values: Mapping[str, Any]) -> Paths:
    """What a run draws from, by the values of PATH_VARIABLES that were said; empty for mock data.

    Raises UsageError where they exclude each other, or say nothing to train on.
    """
    whole: Paths = values.get("DATA_PATH") or ()
    own = {split: values[name] for split, name in OWN_PATHS.items() if values.get(name)}
    if not own:
        return whole
    named = ", ".join(OWN_PATHS[split] for split in own)
    if whole:
        raise UsageError(f"DATA_PATH with {named}: the one is cut by SPLIT, the others are a split each; take one away")
    if "train" not in own:
        raise UsageError(f"{named} without TRAIN_DATA_PATH: there is nothing to train on; give it too")
    return own


def blends(paths: Paths) -> list[Blend]:
    """The one blend, or those of all splits."""
    return list(paths.values()) if isinstance(paths, Mapping) else [paths]


def _of_words(words: Sequence[str], where: str, way_out: str) -> Blend:
    numbers = [_number(word) is not None for word in words]
    if len(words) == 1 or not any(numbers):
        return _checked([(None, word) for word in words], where, way_out)
    if len(words) % 2:
        raise UsageError(f"{where}: {len(words)} words can't be pairs of weight and prefix; {way_out}")
    for word, is_number in zip(words[::2], numbers[::2], strict=True):
        if not is_number:
            raise UsageError(f"{where}: {word!r} stands where a weight must; {way_out}")
    return _checked(
        [(_number(word), prefix) for word, prefix in zip(words[::2], words[1::2], strict=True)], where, way_out
    )


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _checked(pairs: Sequence[tuple[float | None, str]], where: str, way_out: str) -> Blend:
    """The pairs with bare prefixes, none twice, and weights that a blend can be made of."""
    blend = tuple((weight, re.sub(r"\.(bin|idx)$", "", os.path.expanduser(prefix))) for weight, prefix in pairs)
    seen: set[str] = set()
    for weight, prefix in blend:
        if weight is not None and (not math.isfinite(weight) or weight < 0):
            raise UsageError(f"{where}: the weight {weight:g} of {prefix} must be a number from 0 up; {way_out}")
        place = os.path.abspath(prefix)  # `a` and `./a` are one
        if place in seen:
            raise UsageError(f"{where}: {prefix} is named twice; name it once, with the sum of its weights")
        seen.add(place)
    weights = [weight for weight, _ in blend if weight is not None]
    if weights and len(weights) < len(blend):
        raise UsageError(f"{where}: some prefixes have a weight and some have none; {way_out}")
    if weights and math.fsum(weights) <= 0:
        raise UsageError(f"{where}: the weights add up to 0; {way_out}")
    require_shares(weights, [prefix for _, prefix in blend], where)
    return blend


def require_shares(weights: Sequence[float], prefixes: Sequence[str], where: str) -> None:
    """Raise UsageError where a source would hardly ever be drawn."""
    total = math.fsum(weights)
    for weight, prefix in zip(weights, prefixes, strict=False):
        if weight / total < SMALLEST_SHARE:
            raise UsageError(
                f"{where}: the weight of {prefix} is under {SMALLEST_SHARE:g} of the sum; leave it out, or make one "
                "pair of several small sources with `megatron-rocm data concat`"
            )


def _of_file(file: str, key: str) -> Paths:
    where = f"{key}={file}"
    content = read_yaml(file, where)
    if not isinstance(content, Mapping):
        return _of_value(content, where)
    named = {str(name).replace("-", "_"): value for name, value in content.items()}
    if any(re.fullmatch(r"(train|valid|test)_data_(paths|weights)", name) for name in named):
        splits = _of_neox(named, where)
    elif named.keys() & set(SPLITS):
        _only(named, SPLITS, where)
        splits = {name: _of_value(value, f"{where}: {name}") for name, value in named.items() if value is not None}
    else:
        return _of_value(content, where)
    if key != "DATA_PATH":
        raise UsageError(f"{where}: holds paths of all splits; give it as DATA_PATH")
    if "train" not in splits:
        raise UsageError(f"{where}: says nothing to train on; {FILE_WAY_OUT}")
    return splits


def _only(named: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    strange = sorted(set(named) - set(known))
    if strange:
        raise UsageError(f"{where}: {strange[0]} stands beside {', '.join(named.keys() & set(known))}; {FILE_WAY_OUT}")


def _of_neox(named: Mapping[str, Any], where: str) -> dict[str, Blend]:
    """GPT-NeoX's train-data-paths, train-data-weights, …: two lists a split, other keys beside them not looked at.

    Without weights its sources are drawn equally often (gpt-neox, megatron/data/data_utils.py).
    """
    splits = {}
    for split in SPLITS:
        paths = named.get(f"{split}_data_paths")
        if paths is None:
            continue
        weights = named.get(f"{split}_data_weights") or [1.0] * (len(paths) if isinstance(paths, list) else 0)
        if not isinstance(paths, list) or not isinstance(weights, list) or len(paths) != len(weights) or not paths:
            raise UsageError(f"{where}: {split}-data-paths and {split}-data-weights must be lists of one length")
        splits[split] = _of_pairs(list(zip(weights, paths, strict=True)), where)
    return splits


def _of_value(value: Any, where: str) -> Blend:
    """A blend as YAML has it: prefix: weight lines, a list as DATA_PATH has words, or one text."""
    if isinstance(value, Mapping) and value:
        return _of_pairs([(weight, prefix) for prefix, weight in value.items()], where)
    if isinstance(value, str) and value.split():
        return _of_words(value.split(), where, FILE_WAY_OUT)
    if isinstance(value, list) and value and not any(isinstance(word, (list, dict, bool)) for word in value):
        return _of_words([str(word) for word in value], where, FILE_WAY_OUT)
    _refuse(where)


def _of_pairs(pairs: Sequence[tuple[Any, Any]], where: str) -> Blend:
    for weight, prefix in pairs:
        # A text: YAML 1.1 has a point in every float, so that 1e-3 is none.
        said = _number(weight) if isinstance(weight, str) else weight
        if isinstance(said, bool) or not isinstance(said, (int, float)) and weight is not None:
            raise UsageError(f"{where}: the weight {weight!r} of {prefix} must be a number; {FILE_WAY_OUT}")
        if not isinstance(prefix, str) or not prefix:
            _refuse(where)
    return _checked(
        [(None if weight is None else float(weight), prefix) for weight, prefix in pairs], where, FILE_WAY_OUT
    )


def _refuse(where: str) -> NoReturn:
    raise UsageError(f"{where}: is no blend; {FILE_WAY_OUT}")
