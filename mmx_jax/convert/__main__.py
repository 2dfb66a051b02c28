"""`python -m mmx_jax.convert`: the command of mmx_jax/cli/convert.py."""

from mmx_jax.cli.convert import run_main

if __name__ == "__main__":
    run_main()
