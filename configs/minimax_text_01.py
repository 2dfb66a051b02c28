"""MiniMax-Text-01: the released shapes and the pre-training recipe of the report (arXiv 2501.08313, section 4).

Where the report is silent we choose, and say so here: token counts of batches are read as multiples of 2^20 (whole
sequences at every length of Table 6), the 500 warm-up steps are part of the first 7.2T tokens, the three
learning-rate phases follow one another (11.4T tokens), the long-context stages stay at the last rate,
and routing is dropless because no capacity factor is printed.
"""

from mmx_jax.config import (
    BatchRampStep,
    CheckpointConfig,
    Config,
    DataConfig,
    LearningRatePhase,
    MeshConfig,
    ModelConfig,
    MonitoringConfig,
    RuntimeConfig,
    StageConfig,
    TrainingConfig,
)

BILLION = 10**9
MEBI = 2**20

BATCH = 16 * MEBI
WARMUP = 500 * BATCH
PRETRAINING = 11_400 * BILLION
STAGES = (
    StageConfig(tokens=PRETRAINING, sequence_length=8192, rope_theta=1e4),
    # Table 6. The mixtures by document length are `source_weights`, given with the sources.
    StageConfig(tokens=300 * BILLION, sequence_length=128 * 1024, rope_theta=5e6),
    StageConfig(tokens=32 * BILLION, sequence_length=512 * 1024, rope_theta=1e7),
    StageConfig(tokens=26 * BILLION, sequence_length=1024 * 1024, rope_theta=1e7),
)


def get_config() -> Config:
    training = TrainingConfig(
        total_tokens=sum(stage.tokens for stage in STAGES),
        sequence_length=8192,
        batch_tokens=BATCH,
        batch_ramp=(
            BatchRampStep(from_tokens=69 * BILLION, batch_tokens=32 * MEBI),
            BatchRampStep(from_tokens=790 * BILLION, batch_tokens=64 * MEBI),
            BatchRampStep(from_tokens=4_700 * BILLION, batch_tokens=128 * MEBI),
        ),
        stages=STAGES,
        learning_rate=2e-4,
        learning_rate_phases=(
            LearningRatePhase(shape="linear", tokens=WARMUP, start=0.0, end=1.0),
            LearningRatePhase(shape="constant", tokens=7_200 * BILLION - WARMUP),
            LearningRatePhase(shape="constant", tokens=3_200 * BILLION, start=0.65, end=0.65),  # 1.3e-4
            LearningRatePhase(shape="exponential", tokens=1_000 * BILLION, start=0.65, end=0.15),  # to 3e-5
            LearningRatePhase(shape="constant", start=0.15, end=0.15),
        ),
        aux_loss_form="report",
    )
    return Config(
        name="minimax_text_01",
        # 0.01 is the coefficient of the report, for its own form of the loss; the released config.json says 0.001.
        model=ModelConfig(
            router_aux_loss_coef=0.01,
        ),
        runtime=RuntimeConfig(remat="full", loss_chunk=4096),
        mesh=MeshConfig(data=1, fsdp=-1),
        # Of a batch, a shard gives 8 rows of 8k, and of 1M tokens 16 take turns with one row, each with its open ones.
        data=DataConfig(shards=256),
        training=training,
        checkpoint=CheckpointConfig(save_every_steps=250),
        monitoring=MonitoringConfig(eval_every_steps=1000),
    )
