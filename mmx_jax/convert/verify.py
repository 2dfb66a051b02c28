"""Two checkpoints compared tensor by tensor."""

import os
from collections.abc import Callable

from mmx_jax.checkpoints.bounded_map import bounded_map
from mmx_jax.checkpoints.difference import difference
from mmx_jax.checkpoints.manifest import sha256
from mmx_jax.checkpoints.open import open_tensors, resolve
from mmx_jax.progress import ConversionProgress


def verify_checkpoints(
    first: str | os.PathLike,
    second: str | os.PathLike,
    print_line: Callable[[str], object] = print,
    *,
    show_all: bool = False,
) -> bool:
    """Compares two checkpoints of any kind tensor by tensor, and returns whether all are equal.

    Derived buffers do not count. Tensors are equal when dtype, shape and every byte are. A row is printed for each
    tensor that differs, or for every one (`show_all`), and a summary at the end.
    """
    sides = [open_tensors(resolve(path)) for path in (first, second)]
    names = list(dict.fromkeys(name for side in sides for name in side.specs))
    by_name = [{mapping.hf: mapping for mapping in side.mappings} for side in sides]
    width = max(map(len, names))
    header = f"{'tensor':{width}}  {'shape':16} {'dtype':19} {'sha256 A':10} {'sha256 B':10} equal"

    def compare(name):
        specs = [side.specs.get(name) for side in sides]
        reads = [side.read if name in own else None for side, own in zip(sides, by_name, strict=True)]
        digests = [sha256(read(own[name])) if read else "-" for read, own in zip(reads, by_name, strict=True)]
        a, b = specs
        if a is None or b is None:
            return digests, "only in one"
        if a.shape != b.shape:
            return digests, "shapes differ"
        if a.dtype == b.dtype and digests[0] == digests[1]:
            return digests, None
        return digests, difference(*(side.read(own[name]) for side, own in zip(sides, by_name, strict=True)))

    def size(name):
        return max(side.specs[name].nbytes for side in sides if name in side.specs)

    unequal = 0
    with (
        ConversionProgress("verify", sum(map(size, names))) as progress,
        bounded_map(compare, names, size, max(map(size, names))) as results,
    ):
        for name, (digests, differs) in results:
            if header and (show_all or differs):
                print_line(header)
                header = None
            if show_all or differs:
                specs = [side.specs.get(name) for side in sides]
                shape = _both(specs, lambda spec: "x".join(map(str, spec.shape)))
                dtype = _both(specs, lambda spec: spec.dtype.name)
                row = f"{name:{width}}  {shape:16} {dtype:19} {digests[0][:10]:10} {digests[1][:10]:10}"
                print_line(f"{row} NO: {differs}" if differs else f"{row} yes")
            unequal += differs is not None
            progress.advance(size(name))
    for side in sides:
        if side.checksums is not None:
            side.checksums.check(side.mappings)
    print_line(f"{len(names) - unequal} of {len(names)} tensors are equal" + (f"; {unequal} differ" if unequal else ""))
    return not unequal


def _both(specs, text):
    values = [text(spec) if spec else "-" for spec in specs]
    return values[0] if values[0] == values[1] else " / ".join(values)
