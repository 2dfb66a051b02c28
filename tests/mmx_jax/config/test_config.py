"""Configuration: what a config refuses, and that every way in and out of one agrees."""

import dataclasses
import difflib
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx_jax import config as config_lib
from mmx_jax.config import (
    BatchRampStep,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    LearningRatePhase,
    MeshConfig,
    ModelConfig,
    MonitoringConfig,
    ReadingConfig,
    RuntimeConfig,
    SourceConfig,
    StageConfig,
    TrainingConfig,
)
from mmx_jax.config import base as config_base
from mmx_jax.config.io import apply_overrides, config_from_json, config_to_json, format_config, load_config
from mmx_jax.training import schedule
from tests.support.paths import REPOSITORY

CONFIG_FILES = sorted((REPOSITORY / "configs").rglob("*.py"))

BASE = Config(
    training=TrainingConfig(
        stages=(StageConfig(tokens=100, sequence_length=256),), batch_tokens=1024, sequence_length=512
    ),
    data=DataConfig(sources=(SourceConfig(path="/a"), SourceConfig(path="/b", weight=2.0))),
)


def schedule_ends(config):
    """The learning rate behind the last step."""
    return schedule.learning_rate(config.training, schedule.total_tokens(config.training))


def get(config, path: str):
    for part in path.split("."):
        config = config[int(part)] if part.isdigit() else getattr(config, part)
    return config


# Random configs, from every kind of field: scalars, optional, tuples of scalars, tuples of dataclasses.

positive = st.integers(1, 2**60)
rate = st.floats(1e-12, 1e3)
name = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=8)
optional_id = st.none() | st.integers(0, 10**6)


@st.composite
def models(draw):
    pattern = tuple(draw(st.lists(st.sampled_from(config_lib.LAYER_KINDS), min_size=1, max_size=5)))
    kv_heads, group, half_rotary = draw(st.tuples(st.integers(1, 8), st.integers(1, 4), st.integers(0, 32)))
    experts = draw(st.integers(1, 64))
    return ModelConfig(
        num_layers=len(pattern) * draw(st.integers(1, 9)),
        layer_pattern=pattern,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=64,
        rotary_dim=2 * half_rotary,
        rope_theta=draw(st.floats(1, 1e9)),
        num_experts=experts,
        experts_per_token=draw(st.integers(1, experts)),
        capacity_factor=draw(st.none() | rate),
        postnorm=draw(st.booleans()),
        mlp_alpha=draw(st.none() | st.floats(allow_nan=False, allow_infinity=False)),
        bos_token_id=draw(optional_id),
        eos_token_id=draw(optional_id),
        dtype=draw(st.sampled_from(config_lib.FLOAT_DTYPES)),
    )


@st.composite
def configs(draw):
    length = draw(st.integers(1, 4096))
    sources = draw(st.lists(st.builds(SourceConfig, path=name, weight=rate, text_field=name), max_size=3))
    weights = st.lists(rate, min_size=max(1, len(sources)), max_size=max(1, len(sources)))
    stage = st.builds(
        StageConfig,
        tokens=st.integers(1, 2**50),
        sequence_length=st.just(length),
        rope_theta=st.none() | rate,
        source_weights=st.just(()) | weights,
    )
    ramp = sorted(draw(st.sets(positive, max_size=3)))
    shares = draw(st.lists(st.floats(0.01, 0.3), max_size=3))
    rates = [LearningRatePhase(shape="linear", share=share, start=draw(rate), end=draw(rate)) for share in shares]
    stages = draw(st.lists(stage, max_size=3))
    training = TrainingConfig(
        total_tokens=sum(stage.tokens for stage in stages) or draw(st.integers(10, 2**60)),
        sequence_length=length,
        batch_tokens=length * draw(st.integers(1, 9)),
        batch_ramp=[BatchRampStep(from_tokens=at, batch_tokens=length * draw(st.integers(1, 9))) for at in ramp],
        stages=stages,
        learning_rate=draw(rate),
        learning_rate_phases=[*rates, LearningRatePhase(shape="cosine", start=draw(rate), end=draw(rate))],
    )
    return Config(
        name=draw(name),
        model=draw(models()),
        mesh=MeshConfig(data=draw(st.integers(1, 64)), fsdp=-1),
        data=DataConfig(sources=sources, tokenizer=draw(name)),
        training=training,
        checkpoint=CheckpointConfig(asynchronous=draw(st.booleans())),
    )


def as_overrides(value, path: str = "") -> list[str]:
    """Override strings that set everything in `value`: scalars as a user types them, tuples as JSON."""
    if dataclasses.is_dataclass(value):
        return [
            text
            for field in dataclasses.fields(value)
            for text in as_overrides(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))
        ]
    if isinstance(value, tuple):
        entries = [dataclasses.asdict(entry) if dataclasses.is_dataclass(entry) else entry for entry in value]
        return [f"{path}={json.dumps(entries)}"]
    return [f"{path}={value}"]


@settings(max_examples=60, deadline=None)
@given(configs())
def test_json_round_trip_is_identity(config):
    text = config_to_json(config)
    assert config_from_json(text) == config
    assert json.loads(text)["model"]["layer_pattern"] == list(config.model.layer_pattern)


@settings(max_examples=30, deadline=None)
@given(configs(), configs())
def test_overrides_can_turn_any_config_into_any_other(source, target):
    assert apply_overrides(source, as_overrides(target)) == target


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20))
def test_a_malformed_number_is_a_config_error_and_nothing_else(text):
    for path in ("model.num_layers", "model.rope_theta", "model.layer_pattern", "training.stages", "model.postnorm"):
        try:
            apply_overrides(BASE, [f"{path}={text}"])
        except ConfigError as error:
            # A value of the right type may still be refused by its section.
            assert path in str(error) or path.split(".")[0] in str(error)


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: str(path.relative_to(REPOSITORY / "configs")))
def test_every_config_file_loads_and_round_trips(path):
    config = load_config(path)
    assert config_from_json(config_to_json(config)) == config
    for branch in ("lightning", "softmax", "mlp"):
        alpha = (2 * config.model.num_layers) ** 0.25 if config.model.postnorm else 1.0
        assert config.model.residual_scales(branch) == pytest.approx((alpha, 1.0), rel=1e-12)
    end = config.training.learning_rate_phases[-1].end * config.training.learning_rate
    assert schedule_ends(config) == pytest.approx(end, rel=1e-12)


def test_ablations_differ_from_their_base_only_in_the_model():
    folder = REPOSITORY / "configs/ablations"
    base = load_config(folder / "base.py")
    for path in set(folder.glob("*.py")) - {folder / "base.py"}:
        config = load_config(path)
        assert config.name == f"ablation_{path.stem}"
        assert config.model != base.model
        assert dataclasses.replace(config, name=base.name, model=base.model) == base


def test_recipe_of_the_report():
    config = load_config(REPOSITORY / "configs/minimax_text_01.py")
    training = config.training
    assert dataclasses.replace(config.model, router_aux_loss_coef=0.001) == ModelConfig()
    assert [step.batch_tokens // 2**20 for step in training.batch_ramp] == [32, 64, 128]
    assert [(stage.sequence_length, stage.rope_theta) for stage in training.stages] == [
        (8192, 1e4),
        (131072, 5e6),
        (524288, 1e7),
        (1048576, 1e7),
    ]
    rates = [training.learning_rate * phase.end for phase in training.learning_rate_phases]
    assert rates == pytest.approx([2e-4, 2e-4, 1.3e-4, 3e-5, 3e-5])
    assert sum(phase.tokens for phase in training.learning_rate_phases) == training.stages[0].tokens == 11_400 * 10**9


@pytest.mark.parametrize(
    "path, text, expected",
    [
        ("training.seed", "1_000", 1000),
        ("training.seed", "1e6", 1_000_000),
        ("training.seed", "1.5e3", 1500),
        ("training.seed", "9007199254740993", 2**53 + 1),  # not a float64
        ("model.rope_theta", "10000", 10000.0),
        ("training.learning_rate", "3e-4", 3e-4),
        ("model.capacity_factor", "1.25", 1.25),
        ("model.capacity_factor", "None", None),
        ("model.eos_token_id", "none", None),
        ("model.postnorm", "False", False),
        ("checkpoint.asynchronous", "true", True),
        ("name", "a=b", "a=b"),
        ("name", "none", "none"),
        ("model.layer_pattern", "lightning, softmax", ("lightning", "softmax")),
        ("model.layer_pattern", '["softmax"]', ("softmax",)),
        ("training.stages", "", ()),
        ("training.stages.0.tokens", "2e3", 2000),
        ("training.stages.0.source_weights", "1,2.5", (1.0, 2.5)),
        ("training.stages.0.source_weights.0", None, None),
        ("training.stages", '[{"tokens": 5, "sequence_length": 512}]', (StageConfig(tokens=5, sequence_length=512),)),
        ("data.sources.1.path", "/c", "/c"),
    ],
)
def test_typed_override(path, text, expected):
    if text is None:  # an entry of a tuple inside an entry of a tuple; only 2 weights fit the 2 sources
        got = apply_overrides(BASE, ["training.stages.0.source_weights=1,2", f"{path}=7"])
        assert got.training.stages[0].source_weights == (7.0, 2.0)
        return
    got = get(apply_overrides(BASE, [f"{path}={text}"]), path)
    assert got == expected and type(got) is type(expected)


def test_an_index_one_past_the_end_appends():
    got = apply_overrides(Config(), ["data.sources.0.path=/x", "data.sources.0.weight=2", "data.sources.1.path=/y"])
    assert got.data.sources == (SourceConfig(path="/x", weight=2.0), SourceConfig(path="/y"))


def test_a_mesh_axis_named_twice_is_an_error():
    with pytest.raises(ConfigError, match="mesh.fsdp is named twice, with 2 and with 4: give each axis once"):
        apply_overrides(Config(), ["mesh.fsdp=2", "mesh.data=1", "mesh.fsdp=4"])


def test_overrides_are_checked_together_and_the_last_one_wins():
    # Neither is possible alone: 8192 does not divide 1536 and 131072 is no multiple of 768.
    got = apply_overrides(
        Config(), ["training.batch_tokens=1536", "training.sequence_length=1024", "training.sequence_length=768"]
    )
    assert (got.training.batch_tokens, got.training.sequence_length) == (1536, 768)


@pytest.mark.parametrize(
    "override, message",
    [
        ("training.lerning_rate=1", "no field 'training.lerning_rate'; the nearest is 'training.learning_rate'"),
        ("learning_rate=1", "nearest is 'training.learning_rate'"),
        ("training.hidden_size=1", "nearest is 'model.hidden_size'"),
        ("model.num_layer=1", "nearest is 'model.num_layers'"),
        ("trianing.seed=1", "nearest is 'training.seed'"),
        ("training.stages.0.token=1", "nearest is 'training.stages.0.tokens'"),
        ("training.stages.2.tokens=1", "training.stages has 1 entries"),
        ("training.stages.-1.tokens=1", "training.stages has 1 entries"),
        ("training.stages.x.tokens=1", "training.stages has 1 entries"),
        ("training.seed.x=1", "training.seed is a single value, int"),
        ("model=1", "model is a group of fields"),
        ("training.stages.0=1", "training.stages.0 is a group of fields: set one of them, training.stages.0.tokens"),
        ("training.seed", "not of the form path.to.field=value"),
        ("model.num_layers=8.5", "model.num_layers='8.5': expected int"),
        ("model.num_layers=true", "model.num_layers='true': expected int"),
        ("model.num_layers=1e999999999", "expected int"),
        ("training.learning_rate=fast", "training.learning_rate='fast': expected float"),
        ("training.learning_rate=nan", "training.learning_rate=nan is not finite"),
        ("model.postnorm=1", "model.postnorm='1': expected bool"),
        ("model.eos_token_id=x", "model.eos_token_id='x': expected int"),
        ("training.stages=3", "training.stages='3': expected a JSON list of objects with the fields tokens"),
        ("training.stages=[", "is not a JSON list"),
        ('training.stages=[{"tokens": 1}]', "training.stages.0: missing sequence_length"),
        ('training.stages=[{"tokens": 1, "lenght": 2}]', "training.stages.0: unknown field 'lenght', nearest is"),
        ('training.stages=[{"tokens": "1", "sequence_length": 1}]', "training.stages.0.tokens='1': expected int"),
        ('model.layer_pattern=["softmax", 1]', "model.layer_pattern.1=1: expected str"),
        ("data.sources.2.weight=1", "data.sources.2: missing path"),
        ("model.num_layers=9", "model: num_layers=9 is not a multiple"),
        ("training.stages.0.tokens=0", "training.stages.0: tokens=0 must be positive"),
        ("model.max_position_embeddings=10", "config: sequence_length=256 exceeds max_position_embeddings=10"),
    ],
)
def test_a_bad_override_names_the_field_and_the_remedy(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        apply_overrides(BASE, [override])


def edited_json(edit) -> str:
    plain = json.loads(config_to_json(BASE))
    edit(plain)
    return json.dumps(plain)


@pytest.mark.parametrize(
    "text, message",
    [
        (edited_json(lambda c: c["model"].pop("head_dim")), "model: missing head_dim"),
        (edited_json(lambda c: c["training"]["stages"][0].pop("rope_theta")), "training.stages.0: missing rope_theta"),
        (edited_json(lambda c: c["model"].update(hidden=3)), "model: unknown field 'hidden', nearest is 'hidden_size'"),
        (edited_json(lambda c: c.pop("mesh")), "config: missing mesh"),
        (edited_json(lambda c: c["model"].update(num_layers=80.0)), "model.num_layers=80.0: expected int"),
        (edited_json(lambda c: c["model"].update(num_layers=True)), "model.num_layers=True: expected int"),
        (edited_json(lambda c: c["model"].update(head_dim=None)), "model.head_dim=None: expected int"),
        (edited_json(lambda c: c["model"].update(rope_theta=10**400)), "expected float"),
        (edited_json(lambda c: c["model"].update(rope_theta=math.inf)), "Infinity, which is no JSON number"),
        (edited_json(lambda c: c["model"].update(layer_pattern="softmax")), "expected a list of str"),
        (edited_json(lambda c: c["model"].update(num_kv_heads=7)), "model: num_heads=64 is not a multiple"),
        (edited_json(lambda c: c.update(data=[])), "data=[]: expected DataConfig"),
        ("[]", "expected Config"),
        ("{", "not JSON"),
        ('{"name": "a", "name": "b"}', "the key 'name' occurs twice"),
    ],
)
def test_json_is_strict(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_from_json(text)


def test_load_config_checks_types_and_names_the_file(tmp_path):
    header = "from mmx_jax.config import Config, ModelConfig\n"
    cases = {
        "wrong_type.py": "def get_config(): return Config(model=ModelConfig(rope_theta='x'))",
        "float_layers.py": "def get_config(): return Config(model=ModelConfig(num_layers=80.0))",
        "impossible.py": "def get_config(): return Config(model=ModelConfig(num_layers=81))",
        "no_function.py": "config = Config()",
        "wrong_return.py": "def get_config(): return 3",
        "syntax.py": "def get_config(: return 3",
        "fails.py": "def get_config(): return 1 / 0",
    }
    for file, body in cases.items():
        (tmp_path / file).write_text(header + body)
        with pytest.raises(ConfigError, match=file):
            load_config(tmp_path / file)
    with pytest.raises(FileNotFoundError, match="get_config"):
        load_config(tmp_path / "absent.py")


# Every section, with every tuple filled, so that each kind of field is met.
PHASE, STAGE = LearningRatePhase(), StageConfig(tokens=1, sequence_length=8, rope_theta=1e4, source_weights=(1.0, 2.0))
RAMP = BatchRampStep(from_tokens=0, batch_tokens=8)
SECTIONS = (
    ModelConfig(capacity_factor=1.0, expert_buffer=1.0),
    RuntimeConfig(lightning_chunk=64),
    MonitoringConfig(),
    ReadingConfig(),
    MeshConfig(),
    SourceConfig(path="/a"),
    DataConfig(sources=(SourceConfig(path="/a"),)),
    PHASE,
    RAMP,
    STAGE,
    TrainingConfig(sequence_length=8, batch_tokens=8, stages=(STAGE,), batch_ramp=(RAMP,)),
    CheckpointConfig(),
    Config(),
)
WRONG = {
    float: (math.nan, math.inf, -math.inf, True, "1.0", 10**400, [1.0]),
    int: (1.0, True, math.nan, "1", 2**63, -(2**63) - 1, 10**5000),
    bool: (1, 0, 1.0, "true", None),
    str: (3, b"a", None, "half \ud800"),
}


def wrong_values(kind):
    """Values that a field with the annotation `kind` must not take."""
    if inner := config_base.optional_kind(kind):
        return [value for value in wrong_values(inner) if value is not None]
    if entry := config_base.entry_kind(kind):
        return ["ab", 3, None, *([value] for value in wrong_values(entry))]
    return WRONG.get(kind, ({}, None, 3))


def field_cases():
    for section in SECTIONS:
        for field, kind in config_base.field_kinds(type(section)).items():
            yield pytest.param(section, field, kind, id=f"{type(section).__name__}.{field}")


def test_the_sections_are_all():
    assert {type(section) for section in SECTIONS} == set(config_base.Section.__subclasses__())


@pytest.mark.parametrize("section, field, kind", list(field_cases()))
def test_no_field_takes_a_number_that_is_not_finite_or_another_type(section, field, kind):
    for value in wrong_values(kind):
        with pytest.raises(ConfigError, match=rf"^{field}[.=0-9]"):
            dataclasses.replace(section, **{field: value})


def test_numbers_are_what_their_annotations_say():
    training = TrainingConfig(weight_decay=0, learning_rate=np.float64(1e-3))
    assert type(training.weight_decay) is float and type(training.learning_rate) is float
    assert StageConfig(tokens=1, sequence_length=1, source_weights=[1, 2]).source_weights == (1.0, 2.0)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: ModelConfig(vocab_size=2**31), "vocab_size=2147483648 is larger than any array"),
        (lambda: ModelConfig(num_layers=8 * 10**9), "num_layers=8000000000 is larger than any array"),
        (lambda: ModelConfig(num_layers=8 * 10**8), "num_layers=800000000 is more than 100,000"),
        (lambda: RuntimeConfig(lightning_chunk=2**40), "lightning_chunk=1099511627776"),
        (lambda: TrainingConfig(sequence_length=2**40, batch_tokens=2**40), "sequence_length=1099511627776 is larger"),
        (lambda: TrainingConfig(adam_eps=1e-50), "adam_eps=1e-50 is zero in float32"),
        (lambda: ModelConfig(router_aux_loss_coef=-1.0), "router_aux_loss_coef=-1.0 must not be negative"),
        (lambda: MeshConfig(data=2**40), "must be positive"),
        (lambda: StageConfig(tokens=1, sequence_length=1, source_weights=(1.0, 0.0)), "must be positive"),
        (lambda: LearningRatePhase(tokens=1, share=0.5), "tokens=1 and share=0.5: give one of them"),
        (lambda: LearningRatePhase(share=1.5), "share=1.5 of a learning-rate phase must lie in"),
    ],
)
def test_sizes_beyond_reason_are_refused(build, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build()


def test_a_depth_that_the_pattern_does_not_divide_names_those_that_it_does():
    with pytest.raises(ConfigError, match="num_layers=81 is not a multiple of the 8 layers of .*, 80 and 88"):
        ModelConfig(num_layers=81)
    with pytest.raises(ConfigError, match="num_layers=3 is not a multiple of the 8 layers of layer_pattern, 8 is"):
        ModelConfig(num_layers=3)


# -- what follows from other fields -----------------------------------------------------------------------------------

BRANCHES = ("lightning", "softmax", "mlp")


def alphas(model):
    return [model.residual_scales(branch)[0] for branch in BRANCHES]


def test_residual_scales_follow_the_depth_unless_given():
    assert alphas(ModelConfig()) == [160**0.25] * 3
    assert alphas(dataclasses.replace(ModelConfig(), num_layers=64)) == [128**0.25] * 3
    for file in ("debug.py", "ablations/base.py"):
        deep = apply_overrides(load_config(REPOSITORY / "configs" / file), ["model.num_layers=64"])
        assert alphas(deep.model) == [128**0.25] * 3
        again = config_from_json(config_to_json(deep))
        assert alphas(dataclasses.replace(again.model, num_layers=128)) == [4.0] * 3
    assert alphas(ModelConfig(num_layers=64, mlp_alpha=1.5)) == [128**0.25, 128**0.25, 1.5]
    assert alphas(ModelConfig(postnorm=False)) == [1.0] * 3
    assert alphas(ModelConfig(postnorm=False, softmax_alpha=2.0)) == [1.0, 2.0, 1.0]


@pytest.mark.parametrize("file", ["debug.py", "small_1b.py", "ablations/base.py"])
@pytest.mark.parametrize("total", [200_000, 983_040, 10**12])
def test_a_schedule_follows_the_length_of_the_run(file, total):
    base = load_config(REPOSITORY / "configs" / file)
    peak, last = base.training.learning_rate, base.training.learning_rate_phases[-1].end
    changed = apply_overrides(base, [f"training.total_tokens={total}"])
    assert schedule_ends(changed) == pytest.approx(last * peak, rel=1e-12)
    if len(base.training.learning_rate_phases) == 2:  # a warm-up, then a cosine
        warm = base.training.learning_rate_phases[0].share
        for part in (0.25, 0.5, 1.0):
            rate = schedule.learning_rate(changed.training, round(part * warm * total))
            assert rate == pytest.approx(part * peak, rel=1e-3)
        middle = schedule.learning_rate(changed.training, round((1 + warm) / 2 * total))
        assert middle == pytest.approx((1 + last) / 2 * peak, rel=1e-3)


def test_the_schedule_in_shares_is_that_in_tokens_of_before():
    training = load_config(REPOSITORY / "configs/small_1b.py").training
    assert (training.batch_tokens, training.run_tokens) == (16384, 10_000 * 16384)
    assert training.phase_ends == (500 * 16384, 10_000 * 16384)


def phases(*given):
    return tuple(LearningRatePhase(shape="linear", **phase) for phase in given)


@pytest.mark.parametrize(
    "given, message",
    [
        ([{"tokens": 300}, {}], "take 300 tokens before the last one, and the run has 200: give lengths as shares"),
        ([{"tokens": 200}, {}], "take 200 tokens before the last one, and the run has 200"),
        ([{"tokens": 100}, {"tokens": 101}], "take 201 tokens, and the run has 200"),
        ([{"share": 0.6}, {"share": 0.6}], "take 240 tokens, and the run has 200"),
        ([{"tokens": 150}], "end after 150 of the 200 tokens of the run: .*; or add a constant phase without a length"),
        ([{"share": 0.5}, {"tokens": 50}], "end after 150 of the 200 tokens"),
        ([{}, {"tokens": 50}], "only the last of learning_rate_phases may have neither tokens nor share"),
    ],
)
def test_a_schedule_that_does_not_end_with_the_run_is_an_error(given, message, tmp_path):
    text = json.dumps([{"shape": "linear", **phase} for phase in given])
    overrides = ["training.stages=", "training.total_tokens=200", f"training.learning_rate_phases={text}"]
    with pytest.raises(ConfigError, match=rf"^training: learning_rate_phases {message}|^training: {message}"):
        apply_overrides(BASE, overrides)
    file = tmp_path / "c.py"
    entries = ", ".join(f"LearningRatePhase(shape='linear', **{phase})" for phase in given)
    file.write_text(
        "from mmx_jax.config import *\ndef get_config(): return Config(training=TrainingConfig(total_tokens=200, "
        f"learning_rate_phases=({entries},)))"
    )
    with pytest.raises(ConfigError, match=f"c.py: .*{message}"):
        load_config(file)


@pytest.mark.parametrize("names", [[f"k{i}" for i in range(200_000)], ["k" * 10**7]], ids=["many", "long"])
def test_unknown_fields_are_refused_in_bounded_work(names):
    """Compared with every field, each of them would take minutes in all."""
    text = edited_json(lambda c: c["model"].update(dict.fromkeys(names, 0)))
    compared = []
    with pytest.MonkeyPatch.context() as patch:
        ratio = difflib.SequenceMatcher.ratio
        patch.setattr(
            difflib.SequenceMatcher,
            "ratio",
            lambda self: compared.append(len(self.a) * len(self.b)) or ratio(self),
        )
        with pytest.raises(ConfigError, match="model: unknown field 'k") as error:
            config_from_json(text)
    assert 0 < sum(compared) < 100_000 and len(str(error.value)) < 1000
    assert ("and 199992 more" in str(error.value)) == (len(names) > 1)


SHARES = (0.7, 0.2, 0.1)  # in this order not quite 1


@pytest.mark.parametrize("total", [10, 983_040, 10**13 + 1, 2**60 + 1])
def test_shares_that_add_up_to_1_end_with_the_run(total):
    training = TrainingConfig(total_tokens=total, learning_rate_phases=phases(*({"share": s} for s in SHARES)))
    training.check_schedule()
    a, b, c = SHARES
    assert training.phase_ends[-1] == total and a + b + c < 1  # sum() of Python 3.12 rounds less


def test_a_length_that_the_stages_overrule_is_an_error():
    text_01 = load_config(REPOSITORY / "configs/minimax_text_01.py")
    with pytest.raises(ConfigError, match="total_tokens=200,000, and the stages have 11,758,000,000,000 tokens"):
        apply_overrides(text_01, ["training.total_tokens=2e5"])
    with pytest.raises(ConfigError, match="take 2,500,000,000,000 tokens before|take 7,500,000,000,000 tokens, and"):
        apply_overrides(load_config(REPOSITORY / "configs/minimax_m1.py"), ["training.total_tokens=2e5"])


def test_what_earlier_versions_wrote_is_read():
    """Without the field `share`, with every alpha, and with a schedule that ended behind the run."""
    plain = json.loads(config_to_json(load_config(REPOSITORY / "configs/debug.py")))
    plain["training"] |= {"total_tokens": 200_000, "learning_rate_phases": []}
    for shape, tokens, start, end in (("linear", 81_920, 0.0, 1.0), ("cosine", 901_120, 1.0, 0.1)):
        plain["training"]["learning_rate_phases"].append(dict(shape=shape, tokens=tokens, start=start, end=end))
    plain["model"] |= dict.fromkeys(("lightning_alpha", "softmax_alpha", "mlp_alpha"), 8**0.25)
    old = config_from_json(json.dumps(plain))
    assert alphas(old.model) == [8**0.25] * 3 and old.training.learning_rate_phases[0].share == 0
    with pytest.raises(ConfigError, match="take 983,040 tokens, and the run has 200,000"):
        old.training.check_schedule()


def test_load_config_makes_whole_numbers_floats_where_the_field_is_a_float(tmp_path):
    file = tmp_path / "c.py"
    file.write_text(
        "from mmx_jax.config import *\n"
        "def get_config(): return Config(training=TrainingConfig(weight_decay=0, stages=[]))"
    )
    config = load_config(file)
    assert isinstance(config.training.weight_decay, float) and config.training.stages == ()


def test_listing_shows_what_differs_and_reads_back():
    head, *lines, foot = format_config(BASE).splitlines()
    values = {line.split()[0]: line for line in lines}
    assert "training.batch_tokens" in values and "training.seed" not in values
    assert len({len(re.match(r" +\S+ +(?=\S)", line)[0]) for line in lines if len(line.split()) > 1}) == 1  # aligned
    assert apply_overrides(Config(), [f"{path}={' '.join(line.split()[1:])}" for path, line in values.items()]) == BASE
    fields = len(format_config(Config()).splitlines()), len(list(config_io_rows(Config())))
    assert fields[0] == 2 and f"({fields[1]} other fields" in format_config(Config())
    assert "differs" in head and "other fields have their default" in foot


def config_io_rows(value):
    """Every leaf of a Config, a tuple of dataclasses by its entries."""
    for field in dataclasses.fields(value):
        entry = getattr(value, field.name)
        if dataclasses.is_dataclass(entry):
            yield from config_io_rows(entry)
        elif isinstance(entry, tuple) and entry and dataclasses.is_dataclass(entry[0]):
            for member in entry:
                yield from config_io_rows(member)
        else:
            yield entry


def test_a_config_costs_no_jax_import():
    code = "import sys, mmx_jax.config.io; print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
