"""`python -m mmx_jax.convert`, or `mmx-convert` of an installation: import SRC DST, export SRC DST, verify A B."""

import argparse
import os
import re
import sys

from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.checkpoints.hf_config import NAMINGS

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MiB" or "1000000"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB, 500MiB or 1000000")
    return size


def parser() -> argparse.ArgumentParser:
    name = os.path.basename(sys.argv[0])
    prog = name if name.startswith("mmx-") else "python -m mmx_jax.convert"
    out = argparse.ArgumentParser(prog=prog, description=__doc__)
    overwrite = "replace DST, or an unfinished DST.partial of something else"
    commands = out.add_subparsers(dest="command", required=True)
    add = commands.add_parser("import", help="safetensors folder -> checkpoint of ours")
    add.add_argument("source", metavar="SRC")
    add.add_argument("destination", metavar="DST")
    add.add_argument("--overwrite", action="store_true", help=overwrite)
    add = commands.add_parser("export", help="any checkpoint or training run -> safetensors folder, names as released")
    add.add_argument("source", metavar="SRC")
    add.add_argument("destination", metavar="DST")
    add.add_argument("--naming", choices=NAMINGS, default="original", help="of config.json")
    add.add_argument(
        "--shard_size", type=parse_size, help="such as 5GB; default: the shards it was imported from, else 5GB"
    )
    add.add_argument("--dtype", choices=("keep", "float32", "bfloat16"), default="keep", help="of all but the routers")
    add.add_argument("--overwrite", action="store_true", help=overwrite)
    add = commands.add_parser("verify", help="compare two checkpoints of any kind; exit status 1 where they differ")
    add.add_argument("first", metavar="A")
    add.add_argument("second", metavar="B")
    add.add_argument("--all", action="store_true", help="print a row for every tensor, not only where they differ")
    return out


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from absl import logging

    from mmx_jax.checkpoints import export_hf  # after the arguments: it loads jax and orbax
    from mmx_jax.convert import import_hf, verify

    logging.set_verbosity(logging.ERROR)  # orbax warns of metadata that the params of a training run do not need
    try:
        if args.command == "import":
            print(import_hf.import_checkpoint(args.source, args.destination, overwrite=args.overwrite))
        elif args.command == "export":
            report = export_hf.export_checkpoint(
                args.source,
                args.destination,
                naming=args.naming,
                shard_size=args.shard_size,
                dtype=args.dtype,
                overwrite=args.overwrite,
            )
            print(report)
        else:
            return 0 if verify.verify_checkpoints(args.first, args.second, show_all=args.all) else 1
    except (ConversionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
