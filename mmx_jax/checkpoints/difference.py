"""How far two tensors of one shape are apart."""

import numpy as np

_PIECE = 2**20  # elements that are held in float64 at a time


def difference(first: np.ndarray, second: np.ndarray) -> str:
    """One line on the values that differ: how many, the largest absolute and the largest relative difference.

    The relative difference is |a - b| / max(|a|, |b|). Two NaN are alike; a NaN or an infinity on one side is counted
    apart, so that it does not hide the rest.
    """
    first, second = first.reshape(-1), second.reshape(-1)
    differing = one_sided = 0
    absolute = relative = 0.0
    for start in range(0, first.size, _PIECE):
        a, b = (side[start : start + _PIECE].astype(np.float64) for side in (first, second))
        unlike = (a != b) & ~(np.isnan(a) & np.isnan(b))
        finite = unlike & np.isfinite(a) & np.isfinite(b)
        a, b = a[finite], b[finite]
        differing += int(unlike.sum())
        one_sided += int(unlike.sum()) - a.size
        if a.size:
            gap = np.abs(a - b)
            absolute = max(absolute, float(gap.max()))
            relative = max(relative, float((gap / np.maximum(np.abs(a), np.abs(b))).max()))
    if not differing:
        return "the values are equal, their bytes are not"
    out = f"{differing:,} of {first.size:,} values differ"
    if differing > one_sided:
        out += f", by at most {absolute:.3g} (relative {relative:.3g})"
    return out + (f", {one_sided:,} of them not finite" if one_sided else "")
