"""What the ablations share: hybrid 7:1, DeepNorm, MoE, small enough for one GPU; every other file changes one thing.

Length, batch (480 sequences), constant rate, and weight decay are those of the report's scaling experiments (section
2.2; arXiv 2406.16690, Table 7), width and heads those of its 160M model; they train on up to 300B tokens, this on 10B.
"""

from mmx_jax.config import CheckpointConfig, Config, ModelConfig, MonitoringConfig, RuntimeConfig, TrainingConfig


def get_config() -> Config:
    model = ModelConfig(
        vocab_size=32768,
        hidden_size=768,
        num_layers=16,
        num_heads=6,
        num_kv_heads=6,
        head_dim=128,
        rotary_dim=64,
        rope_theta=10_000.0,
        max_position_embeddings=32_768,
        mlp_dim=1024,
        num_experts=8,
        experts_per_token=2,
        router_aux_loss_coef=0.01,
    )
    training = TrainingConfig(
        total_tokens=10_000_000_000,
        sequence_length=8192,
        batch_tokens=480 * 8192,
        microbatch_rows=8,
        learning_rate=3e-4,
    )
    return Config(
        name="ablation_base",
        model=model,
        runtime=RuntimeConfig(remat="full", loss_chunk=2048),
        training=training,
        checkpoint=CheckpointConfig(save_every_steps=250),
        monitoring=MonitoringConfig(eval_every_steps=250),
    )
