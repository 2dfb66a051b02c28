"""The demo: a hybrid lightning-attention MoE that learns Python from the standard library on two CPU cores."""

from mmx_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LearningRatePhase,
    ModelConfig,
    MonitoringConfig,
    RuntimeConfig,
    TrainingConfig,
)


def get_config() -> Config:
    model = ModelConfig(
        vocab_size=2048,
        hidden_size=128,
        num_layers=4,
        layer_pattern=("lightning", "softmax"),  # every kind of layer at the smallest depth
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rotary_dim=16,
        rope_theta=10_000.0,
        max_position_embeddings=8192,
        mlp_dim=256,
        num_experts=4,
        experts_per_token=2,
        router_aux_loss_coef=0.01,
        dtype="float32",
    )
    training = TrainingConfig(
        total_tokens=500 * 4096,
        sequence_length=256,
        batch_tokens=4096,
        learning_rate=5e-3,
        learning_rate_phases=(
            LearningRatePhase(shape="linear", share=0.04, start=0.0, end=1.0),
            LearningRatePhase(shape="cosine", start=1.0, end=0.1),  # the rest of the run
        ),
    )
    return Config(
        name="debug",
        model=model,
        runtime=RuntimeConfig(lightning_chunk=64, softmax_block=128),
        data=DataConfig(packing_bins=16),
        training=training,
        checkpoint=CheckpointConfig(save_every_steps=125, keep=2),
        monitoring=MonitoringConfig(eval_every_steps=125, eval_batches=4),
    )
