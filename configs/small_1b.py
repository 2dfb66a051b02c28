"""`small_1b`: 2.66 billion parameters, of which 0.87 billion work on a token, embedding and head left out; for one GPU.

Two hybrid blocks of 7 lightning layers and 1 softmax layer, sequences of 8192. The whole stack is one block here: a
scan over two would copy every parameter, gradient and kept activation into and out of stacks, a fifth of the memory
traffic of a training step and almost half of the time of a decoding step on one H200.

A step takes 73 GiB on an H100 and 78 GiB on an H200 with nothing recomputed, 61 GiB with `runtime.remat=dots`, and
GiB with `attention_out` or `full`. jax takes 75 % of a card: 105 GiB of an H200, but 59 GiB of an H100, where neither
this file as it stands nor `dots` fits. There add `--set runtime.remat=attention_out`; or set
`XLA_PYTHON_CLIENT_MEM_FRACTION=0.95`, which makes room for both. `train.py --plan --topology=h100` says the like of
other settings.
"""

from mmx_jax.config import (
    CheckpointConfig,
    Config,
    LearningRatePhase,
    ModelConfig,
    MonitoringConfig,
    RuntimeConfig,
    TrainingConfig,
)

LAYERS = 16


def get_config() -> Config:
    model = ModelConfig(
        vocab_size=32768,
        hidden_size=2048,
        num_layers=LAYERS,
        layer_pattern=(("lightning",) * 7 + ("softmax",)) * (LAYERS // 8),
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        rotary_dim=64,
        rope_theta=10_000.0,
        max_position_embeddings=131_072,
        mlp_dim=2816,
        num_experts=8,
        experts_per_token=2,
        router_aux_loss_coef=0.01,
    )
    batch_tokens = 2 * 8192
    training = TrainingConfig(
        total_tokens=10_000 * batch_tokens,
        sequence_length=8192,
        batch_tokens=batch_tokens,
        learning_rate=2e-4,
        learning_rate_phases=(
            LearningRatePhase(shape="linear", share=0.05, start=0.0, end=1.0),
            LearningRatePhase(shape="cosine", start=1.0, end=0.1),  # the rest of the run
        ),
    )
    return Config(
        name="small_1b",
        model=model,
        runtime=RuntimeConfig(loss_chunk=2048),
        training=training,
        checkpoint=CheckpointConfig(save_every_steps=500),
        monitoring=MonitoringConfig(eval_every_steps=500, log_every_steps=10),
    )
