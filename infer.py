"""Generates text: python infer.py --checkpoint=runs/demo/export --prompt='def main('.

Or tells what it would take: python infer.py --config=configs/small_1b.py --dry_run --topology=v5e:2x2 --dtype=bfloat16.
"""

from mmx_jax.cli.infer import run_main

if __name__ == "__main__":
    run_main()
