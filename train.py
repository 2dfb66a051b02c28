"""Trains a model: python train.py --config=configs/debug.py --workdir=runs/debug --set training.learning_rate=3e-4."""

from mmx_jax.cli.train import run_main

if __name__ == "__main__":
    run_main()
