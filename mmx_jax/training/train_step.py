"""The training step: accumulated gradients, AdamW, a guard against non-finite numbers. Pure and jitted.

The training state is a plain pytree, {"step": int32 scalar, "params": tree, "opt_state": ScaleByAdamState}.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mmx_jax import sharding
from mmx_jax.config import Config
from mmx_jax.data.device_batch import batch_shards
from mmx_jax.models import decoder
from mmx_jax.models import params as model_params
from mmx_jax.training import loss as losses
from mmx_jax.training import optimizer
from pallas_kernels import platform


def state_shardings(config: Config, mesh: jax.sharding.Mesh) -> Any:
    """Shardings of the training state: a moment lies where its parameter lies."""
    params = model_params.param_shardings(config.model, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    return {
        "step": replicated,
        "params": params,
        "opt_state": optax.ScaleByAdamState(count=replicated, mu=params, nu=params),  # pyright: ignore[reportArgumentType]
    }


def abstract_state(config: Config, mesh: jax.sharding.Mesh) -> Any:
    """The training state as jax.ShapeDtypeStruct with shardings; nothing is allocated."""
    params = model_params.abstract_params(config.model)
    state = {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "params": params,
        "opt_state": jax.eval_shape(lambda p: optimizer.init_optimizer(config.training, p), params),
    }
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, state_shardings(config, mesh)
    )


def init_state(config: Config, mesh: jax.sharding.Mesh) -> Any:
    """A new training state, every shard made where it stays."""

    def init(key):
        params = model_params.init_params(config.model, key)
        opt_state = optimizer.init_optimizer(config.training, params)
        return {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": opt_state}

    key = jax.random.key(config.training.seed, impl=config.training.prng_implementation)
    return jax.jit(init, out_shardings=state_shardings(config, mesh))(key)


def microbatch_objective(config: Config, params: Any, batch: Any) -> tuple[jax.Array, Any]:
    """Cross entropy, z-loss and load-balancing loss of one micro-batch, as sums over its tokens.

    The cross entropy and z-loss are sums over tokens, so that accumulation over micro-batches equals one big
    batch. The load-balancing loss is not linear in the batch: as in the report it is that of the
    micro-batch, weighted by the tokens that have a target.

    Returns:
      (objective, sums): float32 scalar, to be divided by the count of the whole batch; dict of float32 sums.
    """
    model, training = config.model, config.training
    inputs = (batch[name] for name in ("tokens", "segment_ids", "positions"))
    out = decoder.Decoder(model, config.runtime).apply({"params": params}, *inputs, logits=False)
    out = cast("decoder.DecoderOutput", out)
    mesh = jax.sharding.get_abstract_mesh()
    axis = sharding.row_axis(batch["tokens"].shape[1])
    entropy = losses.chunked_cross_entropy(
        out.hidden,
        params["lm_head"]["kernel"],
        batch["targets"],
        chunk=config.runtime.loss_chunk,
        z_loss_coef=training.z_loss_coef,
        groups=batch_shards(mesh),
        parts=1 if axis is None else mesh.shape[axis],
    )
    aux, aux_per_layer = losses.load_balancing_loss(
        out.router, form=training.aux_loss_form, pooling=training.aux_loss_pooling
    )
    sums = {
        "nll": entropy.nll,
        "z": entropy.z,
        "correct": entropy.correct,
        "count": entropy.count,
        "aux": aux * entropy.count,
        "aux_per_layer": aux_per_layer * entropy.count,
        "router": out.router,
    }
    return entropy.objective + model.router_aux_loss_coef * aux * entropy.count, jax.lax.stop_gradient(sums)


def accumulate_gradients(
    config: Config, params: Any, batch: Any, microbatches: int, loss_fn: Callable = microbatch_objective
) -> tuple[Any, Any]:
    """Gradients of the mean objective over the whole batch, in float32.

    Args:
      microbatches: number of parts of the batch, one after the other.
      loss_fn: as `make_train_step` takes it.

    Returns:
      (gradients, sums): the tree of `params` and the sums of `loss_fn` over all micro-batches.
    """

    def gradients_of(part):
        value_and_grad = jax.value_and_grad(lambda p: loss_fn(config, p, part), has_aux=True)
        (_, sums), gradients = value_and_grad(params)
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), sums

    if microbatches == 1:
        gradients, sums = gradients_of(batch)
    else:
        # Micro-batch a takes the rows a, a + A, ...: each device's own rows are spread over all micro-batches.
        parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)

        def step(total, part):
            return jax.tree.map(jnp.add, total, gradients_of(part)), None

        shapes = jax.eval_shape(gradients_of, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (gradients, sums), _ = jax.lax.scan(step, zeros, parts)
    # A product, not a quotient: XLA repeats it where the gradient is read rather than writing all of it once more.
    scale = 1.0 / jnp.maximum(sums["count"], 1.0)
    return jax.tree.map(lambda g: g * scale, gradients), sums


def frozen(loss_fn: Callable, trainable: Any) -> Callable:
    """`loss_fn` whose gradient to the leaves that are not `trainable` is 0, and costs nothing."""

    def loss(config, params, batch):
        params = jax.tree.map(lambda p, train: p if train else jax.lax.stop_gradient(p), params, trainable)
        return loss_fn(config, params, batch)

    return loss


def make_train_step(
    config: Config, mesh: jax.sharding.Mesh, loss_fn: Callable = microbatch_objective, trainable: Any = None
) -> Callable:
    """Builds the jitted step.

    Args:
      loss_fn: (config, params, batch) -> (objective, sums), both sums over the tokens of a micro-batch: the objective
        is a float32 scalar, `sums` a dict of float32 with at least those of `microbatch_objective` that `step_metrics`
        reads: "nll" (its mean is the loss), "count" and "router". Any other entry becomes a metric of its name, divided
        by the count.
      trainable: tree of bool like params; False leaves a parameter and its moments as they are. None: all are trained.

    Returns:
      step(state, batch, learning_rate) -> (state, metrics). `state` is donated. `batch`: int32 [rows, T] for each of
      BATCH_KEYS, the rows split into micro-batches of `training.microbatch_rows`. A step whose loss, gradient or
      parameters are not finite changes nothing but the step number; `metrics["finite"]` says so. metrics: float32
      scalars (loss, z_loss, aux_loss, accuracy, gradient_norm, parameter_norm before the step, tokens, finite),
      "router": dict of [L], and "gradient_norms": tree like params, [N] for leaves stacked over blocks.
    """
    loss_fn = loss_fn if trainable is None else frozen(loss_fn, trainable)

    def train_step(state, batch, learning_rate):
        rows = batch["tokens"].shape[0]
        microbatches = rows // (config.training.microbatch_rows or rows)
        gradients, sums = accumulate_gradients(config, state["params"], batch, microbatches, loss_fn)
        squared = optimizer.squared_norms(gradients)
        norm = optimizer.total_norm(squared)
        metrics = step_metrics(config, sums)
        parameter_norm = optimizer.total_norm(optimizer.squared_norms(state["params"]))
        # The guard reads nothing that the update writes, so that the update is one pass, in place.
        finite = jnp.all(jnp.isfinite(jnp.stack([metrics["loss"], metrics["aux_loss"], norm, parameter_norm])))
        old = state["params"], state["opt_state"]
        with jax.named_scope("optimizer"):
            new = optimizer.apply_gradients(config.training, *old, gradients, norm, learning_rate)
            params, opt_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        if trainable is not None:
            params, opt_state = _keep_frozen(trainable, (params, opt_state), old)
        metrics |= {
            "gradient_norm": norm,
            "parameter_norm": parameter_norm,
            "finite": finite.astype(jnp.float32),
            "gradient_norms": jax.tree.map(jnp.sqrt, squared),
        }
        return {"step": state["step"] + 1, "params": params, "opt_state": opt_state}, metrics

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(state_shardings(config, mesh), None),
        compiler_options=platform.compiler_options(),
    )


def _keep_frozen(trainable, new, old):
    """(params, optimizer state) with the old values where `trainable` is False."""

    def choose(new, old):
        return jax.tree.map(lambda train, n, o: n if train else o, trainable, new, old)

    (params, opt_state), (old_params, old_opt_state) = new, old
    moments = {name: choose(getattr(opt_state, name), getattr(old_opt_state, name)) for name in ("mu", "nu")}
    return choose(params, old_params), opt_state._replace(**moments)


def make_eval_step(config: Config) -> Callable:
    """Builds the jitted evaluation: eval_step(params, batch) -> {"nll", "correct", "count"}, float32 sums."""

    def eval_step(params, batch):
        _, sums = microbatch_objective(config, params, batch)
        return {name: sums[name] for name in ("nll", "correct", "count")}

    return jax.jit(eval_step, compiler_options=platform.compiler_options())


# Sums of a loss function -> metrics that are their means over tokens. Others keep their name.
_MEANS = {"nll": "loss", "z": "z_loss", "aux": "aux_loss", "correct": "accuracy"}


def step_metrics(config: Config, sums: Any) -> dict[str, Any]:
    """Means from the sums of a batch. Loads of the router are relative to the uniform one (1 is balanced)."""
    count = jnp.maximum(sums["count"], 1.0)
    router = sums["router"]
    tokens = jnp.maximum(router.tokens, 1.0)
    uniform = tokens * config.model.experts_per_token / config.model.num_experts
    load = router.assignments / uniform[:, None]
    means = {name: sums[name] / count for name in sums if name not in ("count", "router", "aux_per_layer")}
    return {str(_MEANS.get(name, name)): mean for name, mean in means.items()} | {
        "tokens": sums["count"],
        "router": {
            "max_load": load.max(-1),
            "min_load": load.min(-1),
            "entropy": router.entropy / tokens,
            "drop_rate": router.dropped / (tokens * config.model.experts_per_token),
            "aux_loss": sums["aux_per_layer"] / count,
        },
    }


def nonfinite_names(gradient_norms: Any, layers_per_block: int) -> list[str]:
    """Names of the parameters whose gradient is not finite, with the absolute layers concerned.

    Args:
      gradient_norms: `metrics["gradient_norms"]` as NumPy arrays.
      layers_per_block: length of the layer pattern.
    """
    names = []
    for path, norm in jax.tree_util.tree_leaves_with_path(gradient_norms):
        keys = [entry.key for entry in path]
        broken = ~np.isfinite(norm)
        if not broken.any():
            continue
        name = "/".join(keys)
        if norm.ndim:
            position = int(keys[1].removeprefix("layer_"))
            layers = [block * layers_per_block + position for block in range(norm.shape[0]) if broken[block]]
            name += f" (layers {', '.join(map(str, layers))})"
        names.append(name)
    return names
