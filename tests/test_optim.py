"""Compares optimizers and schedules with their formulas in float64; parameter labels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from flax.traverse_util import flatten_dict

from ssl_jax import optim
from ssl_jax.config import Schedule, default_config
from ssl_jax.errors import UserError

NAMES = optim.OPTIMIZERS
# 0, as at the start of a warmup; `lars_clipped` clips the trust at .01 but not at .5.
RATES = [0.0, 0.5, 0.01, 0.9, 0.3]
MOMENTUM = 0.8


def schedule(step):
    return jnp.asarray(RATES)[step]


def some_params():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "conv": {"kernel": normal(3, 3, 2, 4)},
        "bn": {"scale": normal(4), "bias": normal(4)},
        "dense": {"kernel": normal(4, 5), "bias": normal(5)},
        "zero": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)},
        "still": {"kernel": normal(3, 2), "scale": normal(3)},
    }


def some_gradients(params, steps):
    """One tree per step; gradients of `still` are 0, and so are those of `zero` in step 0."""
    rng = np.random.default_rng(1)

    def leaf(path, x, step):
        if path[0].key == "still" or (path[0].key == "zero" and step == 0):
            return jnp.zeros_like(x)
        return jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    return [
        jax.tree_util.tree_map_with_path(lambda p, x, step=step: leaf(p, x, step), params)
        for step in range(steps)
    ]


def run(optimizer, params, gradients):
    """Returns the params after each step, without jit, because compiling would take longer."""
    state, trajectory = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory


def run_compiled(optimizer, params, gradients):
    """Returns the params after each step, under jit with the state donated as in training."""

    def update(state, params, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return state, optax.apply_updates(params, updates)

    update = jax.jit(update, donate_argnums=(0,))
    state, trajectory = optimizer.init(params), []
    for gradient in gradients:
        state, params = update(state, params, gradient)
        trajectory.append(params)
    return trajectory


def make_config(name, **changes):
    config = default_config().optim
    config.update(name=name, momentum=MOMENTUM, trust_coefficient=0.02, **changes)
    return config


def direct(name, weight_decay):
    """Builds the optimizer by its own function."""
    options = {"momentum": MOMENTUM, "weight_decay": weight_decay}
    if name == "sgd":
        return optim.sgd(schedule, mask=optim.weight_mask, **options)
    return getattr(optim, name)(schedule, trust_coefficient=0.02, **options)


# The oracles: one tensor's trajectory, in float64.


def by_step(decays, rates):
    return np.broadcast_to(decays, len(rates))


def norm(x):
    return np.sqrt((x * x).sum())


def lars_oracle(w, gradients, rates, decays, adapt, lr_inside, eta=0.02):
    v, out = 0 * w, []
    for g, lr, wd in zip(gradients, rates, by_step(decays, rates), strict=True):
        trust = 1.0
        if adapt:
            g = g + wd * w
            trust = eta * norm(w) / norm(g) if norm(w) > 0 and norm(g) > 0 else 1.0
        if lr_inside:
            v = MOMENTUM * v + lr * trust * g
            w = w - v
        else:
            v = MOMENTUM * v + trust * g
            w = w - lr * v
        out.append(w)
    return out


def larc_oracle(w, gradients, rates, decays, adapt, clip, eta=0.02):
    v, out = 0 * w, []
    for g, lr, wd in zip(gradients, rates, by_step(decays, rates), strict=True):
        if adapt and norm(w) > 0 and norm(g) > 0:
            rate = eta * norm(w) / (norm(g) + wd * norm(w) + 1e-8)
            if clip:  # the tensor's own rate, lr·trust, is min(rate, lr)
                rate = min(rate, lr) / lr if lr > 0 else 1.0
            g = rate * (g + wd * w)
        v = MOMENTUM * v + g
        w = w - lr * v
        out.append(w)
    return out


def sgd_oracle(w, gradients, rates, decays, adapt, nesterov=False):
    v, out = 0 * w, []
    for g, lr, wd in zip(gradients, rates, by_step(decays, rates), strict=True):
        g = g + wd * w if adapt else g
        v = MOMENTUM * v + g
        w = w - lr * (g + MOMENTUM * v if nesterov else v)
        out.append(w)
    return out


def adamw_oracle(w, gradients, rates, decays, adapt):
    first, second, out = 0 * w, 0 * w, []
    steps = zip(gradients, rates, by_step(decays, rates), strict=True)
    for t, (g, lr, wd) in enumerate(steps, start=1):
        first = MOMENTUM * first + (1 - MOMENTUM) * g
        second = 0.999 * second + 0.001 * g * g
        step = (first / (1 - MOMENTUM**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        w = w - lr * (step + (wd * w if adapt else 0))
        out.append(w)
    return out


def adam_oracle(w, gradients, rates, decays, adapt):
    first, second, out = 0 * w, 0 * w, []
    steps = zip(gradients, rates, by_step(decays, rates), strict=True)
    for t, (g, lr, wd) in enumerate(steps, start=1):
        g = g + wd * w if adapt else g
        first = MOMENTUM * first + (1 - MOMENTUM) * g
        second = 0.999 * second + 0.001 * g * g
        w = w - lr * (first / (1 - MOMENTUM**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        out.append(w)
    return out


def oracle(name, w, gradients, rates, wd, adapt):
    w = np.asarray(w, np.float64)
    gradients = [np.asarray(g, np.float64) for g in gradients]
    if name in ("lars", "lars_byol"):
        return lars_oracle(w, gradients, rates, wd, adapt, lr_inside=name == "lars")
    if name in ("larc", "lars_clipped"):
        adapt = adapt or name == "larc"
        return larc_oracle(w, gradients, rates, wd, adapt, clip=name == "lars_clipped")
    oracles = {"sgd": sgd_oracle, "adam": adam_oracle, "adamw": adamw_oracle}
    return oracles[name](w, gradients, rates, wd, adapt)


def assert_follows(trajectory, path, expected, name=""):
    """Checks that leaf `path` of a trajectory of params follows the oracle."""
    # 1 - 0.999^t, Adam's bias correction, loses three digits in float32.
    atol = 2e-5 if name in ("adam", "adamw") else 2e-6
    for step, (params, value) in enumerate(zip(trajectory, expected, strict=True)):
        ours = params[path[0]][path[1]]
        np.testing.assert_allclose(ours, value, rtol=2e-5, atol=atol, err_msg=f"{path} {step}")


def leaf_paths(params):
    return [(module, leaf) for module in params for leaf in params[module]]


def assert_formula(name, optimizer, weight_decay):
    """Checks that every tensor follows its oracle; only kernels are adapted and decayed."""
    params = some_params()
    gradients = some_gradients(params, len(RATES))
    trajectory = run(optimizer, params, gradients)
    for module, leaf in leaf_paths(params):
        tensor = [g[module][leaf] for g in gradients]
        adapt = leaf == "kernel"
        expected = oracle(name, params[module][leaf], tensor, RATES, weight_decay, adapt)
        assert_follows(trajectory, (module, leaf), expected, name)
        assert np.isfinite(trajectory[-1][module][leaf]).all()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["lars", "lars_byol", "lars_clipped", "larc", "sgd"])
def test_optimizers_follow_their_formulas(name, weight_decay):
    assert_formula(name, direct(name, weight_decay), weight_decay)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", NAMES)
def test_make_optimizer_builds_the_named_optimizer(name, weight_decay):
    config = make_config(name, weight_decay=weight_decay)
    labels = optim.role_labels(some_params())
    assert_formula(name, optim.make_optimizer(config, labels, schedule), weight_decay)


def test_nesterov_sgd_equals_torch_formula():
    params = some_params()
    gradients = some_gradients(params, len(RATES))
    config = make_config("sgd", nesterov=True, weight_decay=0.1)
    optimizer = optim.make_optimizer(config, optim.role_labels(params), schedule)
    kernels = [np.asarray(g["dense"]["kernel"], np.float64) for g in gradients]
    start = np.asarray(params["dense"]["kernel"], np.float64)
    expected = sgd_oracle(start, kernels, RATES, 0.1, True, nesterov=True)
    assert_follows(run(optimizer, params, gradients), ("dense", "kernel"), expected)


@pytest.mark.parametrize("name", ["larc", "lars", "lars_byol"])
def test_optimizers_accept_a_scalar_learning_rate(name):
    params = some_params()
    gradients = some_gradients(params, 3)
    make = getattr(optim, name)
    scalar = run(make(0.3, weight_decay=0.1), params, gradients)
    by_step = run(make(lambda step: 0.3, weight_decay=0.1), params, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), scalar, by_step)


def test_lars_clipped_accepts_a_scalar_learning_rate():
    params = some_params()
    gradients = some_gradients(params, 3)
    trajectory = run(optim.lars_clipped(0.3, momentum=MOMENTUM), params, gradients)
    tensor = [g["dense"]["kernel"] for g in gradients]
    expected = oracle("lars_clipped", params["dense"]["kernel"], tensor, [0.3] * 3, 0.0, True)
    assert_follows(trajectory, ("dense", "kernel"), expected)


def test_lars_equals_optax_lars_with_the_same_masks():
    params = some_params()
    gradients = some_gradients(params, len(RATES))
    mask = {m: {k: k == "kernel" for k in leaves} for m, leaves in params.items()}
    theirs = optax.lars(
        schedule, weight_decay=0.1, weight_decay_mask=mask, trust_ratio_mask=mask, momentum=0.9
    )
    ours = optim.lars(schedule, weight_decay=0.1)
    a, b = run(ours, params, gradients), run(theirs, params, gradients)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Labels.


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=True, name="norm_without_telling_name")(x)
        return nn.GroupNorm(2)(x)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), use_bias=False, name="scale")(x)
        x = Block()(Block(name="bias_block")(x))
        x = nn.LayerNorm()(x.mean((1, 2)))
        x = nn.RMSNorm()(nn.Dense(6)(x))
        x = nn.WeightNorm(nn.Dense(6))(x)
        x = nn.Embed(3, 6)(jnp.zeros(1, jnp.int32)) + x
        return nn.MultiHeadDotProductAttention(2, normalize_qk=True, name="attention")(x)


def network_params():
    shapes = jax.eval_shape(Network().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    return shapes["params"]


def test_role_labels_on_a_nested_network():
    params = network_params()
    labels = flatten_dict(optim.role_labels(params), sep=".")
    weights = {path for path, label in labels.items() if label == "weight"}
    attention = {f"attention.{part}.kernel" for part in ("query", "key", "value", "out")}
    assert weights == attention | {
        "scale.kernel",
        "bias_block.Conv_0.kernel",
        "Block_0.Conv_0.kernel",
        "Dense_0.kernel",
        "Dense_1.kernel",
        "Embed_0.embedding",
    }
    assert set(labels.values()) == {"weight", "norm_bias"}
    # Only normalization parameters and biases are one-dimensional.
    flat = flatten_dict(params, sep=".")
    kernels = {path for path, x in flat.items() if x.ndim > 1 and not path.startswith("attention")}
    assert kernels == weights - attention


def test_role_labels_on_boxed_and_flattened_params():
    params = network_params()
    by_path = flatten_dict(optim.role_labels(params))
    assert flatten_dict(optim.role_labels(freeze(params)).unfreeze()) == by_path
    assert optim.role_labels(flatten_dict(params)) == by_path
    joined = optim.role_labels(flatten_dict(params, sep="/"))
    assert joined == {"/".join(path): label for path, label in by_path.items()}

    boxed = nn.Dense(
        2,
        kernel_init=nn.with_partitioning(nn.initializers.ones, ("in", "out")),
        bias_init=nn.with_partitioning(nn.initializers.zeros, ("out",)),
    ).init(jax.random.key(0), jnp.ones((1, 3)))
    assert jax.tree.leaves(optim.role_labels(boxed)) == ["norm_bias", "weight"]

    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    assert jax.tree.leaves(optim.role_labels(state)) == ["norm_bias", "weight"]


def test_weight_mask_marks_the_weights():
    params = network_params()
    mask, labels = optim.weight_mask(params), optim.role_labels(params)
    assert jax.tree.map(lambda label: label == "weight", labels) == mask


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("decay_norm_bias", [False, True])
def test_norm_and_bias_decay_only_if_configured(name, decay_norm_bias):
    params = some_params()
    gradients = some_gradients(params, len(RATES))
    config = make_config(name, weight_decay=0.1, decay_norm_bias=decay_norm_bias)
    optimizer = optim.make_optimizer(config, optim.role_labels(params), schedule)
    tensor = [g["bn"]["scale"] for g in gradients]
    expected = oracle(name, params["bn"]["scale"], tensor, RATES, 0.1, decay_norm_bias)
    assert_follows(run(optimizer, params, gradients), ("bn", "scale"), expected, name)


@pytest.mark.parametrize("name", NAMES)
def test_labels_override_roles_by_path(name):
    """A kernel labeled norm_bias (SimCLR's supervised head) has neither decay nor trust."""
    params = some_params()
    gradients = some_gradients(params, len(RATES))
    labels = optim.role_labels(params)
    labels["dense"] = {"kernel": "norm_bias", "bias": "weight"}
    optimizer = optim.make_optimizer(make_config(name, weight_decay=0.1), labels, schedule)
    trajectory = run(optimizer, params, gradients)
    for leaf, adapt in (("kernel", False), ("bias", True)):
        tensor = [g["dense"][leaf] for g in gradients]
        expected = oracle(name, params["dense"][leaf], tensor, RATES, 0.1, adapt)
        assert_follows(trajectory, ("dense", leaf), expected, name)


@pytest.mark.parametrize("name", NAMES)
def test_constant_lr_changes_only_the_schedule(name):
    params = some_params()
    gradients = some_gradients(params, len(RATES))
    labels = optim.role_labels(params) | {"dense": "constant_lr"}
    config = make_config(name, weight_decay=0.1)
    optimizer = optim.make_optimizer(config, labels, schedule, peak=0.4)
    trajectory = run(optimizer, params, gradients)
    for module, leaf in (("dense", "kernel"), ("dense", "bias"), ("conv", "kernel")):
        rates = [0.4] * len(RATES) if module == "dense" else RATES
        tensor = [g[module][leaf] for g in gradients]
        adapt = leaf == "kernel"
        expected = oracle(name, params[module][leaf], tensor, rates, 0.1, adapt)
        assert_follows(trajectory, (module, leaf), expected, name)


@pytest.mark.parametrize("name", ["lars_byol", "adamw"])
def test_norm_bias_lr_scales_the_schedule_of_biases_and_norms_only(name):
    params = some_params()
    gradients = some_gradients(params, len(RATES))
    config = make_config(name, weight_decay=0.1)
    config.update(lr=0.2, norm_bias_lr=0.0048)
    optimizer = optim.make_optimizer(config, optim.role_labels(params), schedule)
    trajectory = run(optimizer, params, gradients)
    for module, leaf in (("dense", "kernel"), ("dense", "bias"), ("bn", "scale")):
        rates = RATES if leaf == "kernel" else [0.024 * rate for rate in RATES]
        tensor = [g[module][leaf] for g in gradients]
        expected = oracle(name, params[module][leaf], tensor, rates, 0.1, leaf == "kernel")
        assert_follows(trajectory, (module, leaf), expected, name)


@pytest.mark.parametrize("label", ["norm_bias", "constant_lr"])
def test_norm_bias_lr_goes_by_the_parameters_path_whatever_its_label(label):
    params = some_params()
    (gradients,) = some_gradients(params, 1)
    labels = jax.tree.map(lambda _: label, params)
    rate = optax.constant_schedule(0.2)

    def step(**changes):
        config = make_config("lars")
        config.update(lr=0.2, **changes)
        optimizer = optim.make_optimizer(config, labels, rate, 0.2)
        return optimizer.update(gradients, optimizer.init(params), params)[0]["dense"]

    one_rate, two_rates = step(), step(norm_bias_lr=0.02)
    np.testing.assert_array_equal(two_rates["kernel"], one_rate["kernel"])
    np.testing.assert_allclose(two_rates["bias"], 0.1 * one_rate["bias"], rtol=1e-6)
    assert np.abs(one_rate["bias"]).min() > 0


def test_constant_lr_needs_a_peak():
    labels = {"predictor": "constant_lr"}
    with pytest.raises(ValueError, match="peak"):
        optim.make_optimizer(make_config("sgd"), labels, schedule)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_never_moves_and_has_no_state(name):
    params = some_params()
    gradients = some_gradients(params, len(RATES))
    labels = optim.role_labels(params)
    labels["conv"]["kernel"] = "frozen"
    optimizer = optim.make_optimizer(make_config(name, weight_decay=0.1), labels, schedule)
    for after in run(optimizer, params, gradients):
        np.testing.assert_array_equal(after["conv"]["kernel"], params["conv"]["kernel"])
    shapes = {x.shape for x in jax.tree.leaves(optimizer.init(params))}
    assert params["conv"]["kernel"].shape not in shapes
    assert params["dense"]["kernel"].shape in shapes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frozen_steps", [0, 1, 3])
def test_frozen_until_starts_with_fresh_momentum_at_its_step(name, frozen_steps):
    params = some_params()
    gradients = some_gradients(params, len(RATES))
    labels = optim.role_labels(params) | {"dense": "frozen_until"}
    config = make_config(name, weight_decay=0.1, frozen_steps=frozen_steps)
    optimizer = optim.make_optimizer(config, labels, schedule)
    trajectory = run(optimizer, params, gradients)
    for leaf in ("kernel", "bias"):
        start = params["dense"][leaf]
        for after in trajectory[:frozen_steps]:
            np.testing.assert_array_equal(after["dense"][leaf], start)
        # From then on: fresh momentum, but the learning rate of the run's own step.
        tensor = [g["dense"][leaf] for g in gradients[frozen_steps:]]
        rates = RATES[frozen_steps:]
        expected = oracle(name, start, tensor, rates, 0.1, leaf == "kernel")
        assert_follows(trajectory[frozen_steps:], ("dense", leaf), expected, name)
    tensor = [g["conv"]["kernel"] for g in gradients]
    expected = oracle(name, params["conv"]["kernel"], tensor, RATES, 0.1, True)
    assert_follows(trajectory, ("conv", "kernel"), expected, name)


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_follows_its_cosine_and_each_tensor_is_clipped(name):
    params, frozen_steps, limit = some_params(), 2, 1.5
    gradients = some_gradients(params, len(RATES))
    config = make_config(name, weight_decay=0.1, weight_decay_end=0.5, frozen_steps=frozen_steps)
    config.clip_norm_per_tensor = limit
    decay = optim.weight_decay_schedule(config, Schedule(1, 4))  # ends a step before the last
    labels = optim.role_labels(params) | {"dense": "frozen_until"}
    optimizer = optim.make_optimizer(config, labels, schedule, weight_decay=decay)
    trajectory = run(optimizer, params, gradients)
    decays = 0.5 + (0.1 - 0.5) * (1 + np.cos(np.pi * np.minimum(np.arange(5) / 4, 1))) / 2
    np.testing.assert_allclose([decay(step) for step in range(5)], decays, rtol=1e-6)
    clipped = 0
    for path in leaf_paths(params):
        module, leaf = path
        tensor = [np.float64(g[module][leaf]) for g in gradients]
        clipped += sum(norm(g) > limit for g in tensor)
        tensor = [g * min(1, limit / (norm(g) + 1e-6)) for g in tensor]
        first = frozen_steps if module == "dense" else 0
        rest = (tensor[first:], RATES[first:], decays[first:], leaf == "kernel")
        expected = oracle(name, params[module][leaf], *rest)
        assert_follows(trajectory[first:], path, expected, name)
    assert 0 < clipped < len(gradients) * len(leaf_paths(params))


def test_weight_decay_is_constant_without_an_end():
    for end in (0.0, 0.1):
        config = make_config("sgd", weight_decay=0.1, weight_decay_end=end)
        assert optim.weight_decay_schedule(config, Schedule(1, 4)) is None


def all_labels(params):
    return optim.role_labels(params) | {
        "dense": "frozen_until",
        "zero": "constant_lr",
        "still": "frozen",
    }


@pytest.mark.parametrize("name", NAMES)
def test_restored_state_continues_the_compiled_run(name):
    """Saving and restoring after every step, including frozen steps, changes nothing."""
    params = some_params()
    gradients = some_gradients(params, len(RATES))
    config = make_config(name, weight_decay=0.1, frozen_steps=2)

    def make():
        return optim.make_optimizer(config, all_labels(params), schedule, peak=0.4)

    whole = run_compiled(make(), params, gradients)
    state = make().init(params)
    structure = jax.tree.structure(state)
    for gradient, expected in zip(gradients, whole, strict=True):
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
        saved = [np.asarray(x) for x in jax.tree.leaves(state)]
        state = jax.tree.unflatten(structure, map(jnp.asarray, saved))
        updates, state = make().update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, expected
        )


def test_state_keeps_its_structure_and_types():
    params = some_params()
    gradient = some_gradients(params, 2)[1]
    for name in NAMES:
        config = make_config(name, weight_decay=0.1, frozen_steps=1)
        optimizer = optim.make_optimizer(config, all_labels(params), schedule, peak=0.4)
        before = jax.eval_shape(optimizer.init, params)
        updates, after = jax.eval_shape(optimizer.update, gradient, before, params)
        assert after == before
        assert jax.tree.map(lambda x: (x.shape, x.dtype), updates) == jax.tree.map(
            lambda x: (x.shape, x.dtype), params
        )


# Schedules.


def schedule_config(**changes):
    config = default_config().optim
    defaults = {"warmup_epochs": 0.0, "lr_scaling": "linear"}
    config.update(defaults | changes)
    return config


def assert_schedule(ours, steps, expected, peak):
    for step, value in zip(steps, expected, strict=True):
        np.testing.assert_allclose(ours(step), value, rtol=2e-6, atol=2e-7 * peak)
        np.testing.assert_allclose(jax.jit(ours)(jnp.int32(step)), ours(step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lr, scaling", [(0.3, "linear"), (0.075, "sqrt"), (4.8, "none")])
def test_simclr_schedule_equals_its_formula(lr, scaling):
    """Linear from 0 over 10 epochs to 4.8 at batch 4096, then cosine to 0; 100 epochs."""
    config = schedule_config(lr=lr, lr_scaling=scaling, warmup_epochs=10.0)
    np.testing.assert_allclose(optim.peak_learning_rate(config, 4096), 4.8, rtol=1e-12)
    per_epoch, total = 312, 1281167 * 100 // 4096 + 1
    warmup = 10 * per_epoch

    def formula(step):
        if step < warmup:
            return step / warmup * 4.8
        return 4.8 * 0.5 * (1 + np.cos(np.pi * (step - warmup) / (total - warmup)))

    middle = (warmup + total) // 2
    steps = [0, 1, warmup // 2, warmup - 1, warmup, warmup + 1, middle, total - 1, total]
    ours = optim.learning_rate_schedule(config, 4096, Schedule(per_epoch, total))
    assert_schedule(ours, steps, [formula(s) for s in steps], 4.8)
    assert ours(0) == 0
    np.testing.assert_allclose([ours(warmup // 2), ours(warmup)], [2.4, 4.8], rtol=1e-6)


def test_moco_v1_schedule_drops_at_step_epochs():
    config = schedule_config(
        lr=0.03, schedule="step", step_epochs=(120, 160), step_gamma=0.1, per_epoch=True
    )
    ours = optim.learning_rate_schedule(config, 256, Schedule(5004, 200 * 5004))
    first, second = 120 * 5004, 160 * 5004
    steps = [0, first - 1, first, second - 1, second, 200 * 5004 - 1]
    assert_schedule(ours, steps, [0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003], 0.03)


def test_step_epochs_count_from_the_runs_start_with_a_warmup():
    config = schedule_config(
        lr=1.0, lr_scaling="none", schedule="step", step_epochs=(3, 5), warmup_epochs=2.0
    )
    ours = optim.learning_rate_schedule(config, 256, Schedule(10, 60))
    steps = [0, 10, 19, 20, 29, 30, 49, 50, 59]
    assert_schedule(ours, steps, [0, 0.5, 0.95, 1, 1, 0.1, 0.1, 0.01, 0.01], 1.0)


@pytest.mark.parametrize("lr, batch, epochs", [(0.03, 256, 200), (0.05, 512, 100)])
def test_moco_v2_and_simsiam_cosine_is_per_epoch(lr, batch, epochs):
    config = schedule_config(lr=lr, per_epoch=True)
    ours = optim.learning_rate_schedule(config, batch, Schedule(7, epochs * 7))
    peak = lr * batch / 256
    rates = np.array(jax.jit(jax.vmap(ours))(jnp.arange(epochs * 7))).reshape(epochs, 7)
    assert (rates == rates[:, :1]).all()
    expected = peak * 0.5 * (1 + np.cos(np.pi * np.arange(epochs) / epochs))
    np.testing.assert_allclose(rates[:, 0], expected, rtol=2e-6, atol=2e-7 * peak)


@pytest.mark.parametrize("scaling, lr", [("none", 4.8), ("linear", 0.3)])
@pytest.mark.parametrize("inclusive", [False, True])
def test_swav_schedule_equals_its_formula(scaling, lr, inclusive):
    """From .3 to 4.8 in 10 epochs, then to .0048: start and end are not scaled by the batch."""
    config = schedule_config(
        lr=lr, lr_scaling=scaling, warmup_epochs=10.0, warmup_start=0.3, final_lr=0.0048
    )
    config.warmup_inclusive = inclusive
    warmup, total = 10 * 312, 100 * 312

    def formula(step):
        if step < warmup:
            return 0.3 + (4.8 - 0.3) * step / (warmup - inclusive)
        cosine = np.cos(np.pi * (step - warmup) / (total - warmup))
        return 0.0048 + 0.5 * (4.8 - 0.0048) * (1 + cosine)

    steps = [0, 1, warmup // 2, warmup - 1, warmup, (warmup + total) // 2, total - 1, total]
    ours = optim.learning_rate_schedule(config, 4096, Schedule(312, total))
    assert_schedule(ours, steps, [formula(s) for s in steps], 4.8)
    ends = [ours(0), ours(warmup), ours(total), ours(total + 500)]
    np.testing.assert_allclose(ends, [0.3, 4.8, 0.0048, 0.0048], rtol=2e-6)


def test_inclusive_warmup_of_one_step_is_its_start():
    config = schedule_config(lr=1.0, warmup_epochs=1.0, warmup_start=0.25, warmup_inclusive=True)
    ours = optim.learning_rate_schedule(config, 256, Schedule(1, 9))
    assert_schedule(ours, [0, 1, 9], [0.25, 1.0, 0.0], 1.0)


def test_constant_schedule_after_a_per_epoch_warmup():
    config = schedule_config(
        lr=1.0,
        lr_scaling="none",
        schedule="constant",
        warmup_epochs=2.0,
        warmup_start=0.5,
        per_epoch=True,
    )
    ours = optim.learning_rate_schedule(config, 256, Schedule(10, 40))
    steps = [0, 9, 10, 19, 20, 39]
    assert_schedule(ours, steps, [0.5, 0.5, 0.75, 0.75, 1.0, 1.0], 1.0)


def test_run_shorter_than_its_warmup_never_reaches_the_peak():
    config = schedule_config(lr=1.0, lr_scaling="none", warmup_epochs=10.0)
    ours = optim.learning_rate_schedule(config, 256, Schedule(10, 5))
    assert_schedule(ours, [0, 2, 4], [0, 0.02, 0.04], 1.0)


def test_zero_learning_rate_stays_zero():
    config = schedule_config(lr=0.0, warmup_epochs=1.0)
    ours = optim.learning_rate_schedule(config, 256, Schedule(10, 40))
    assert_schedule(ours, [0, 5, 10, 39], [0, 0, 0, 0], 1.0)


# Errors.


@pytest.mark.parametrize(
    "change, match",
    [
        ({"name": "lasr"}, "config.optim.name is 'lasr'. Did you mean 'lars'"),
        ({"name": "larc", "nesterov": True}, "config.optim.nesterov needs sgd"),
        ({"name": "lars", "decay_norm_bias": True}, "config.optim.decay_norm_bias"),
        ({"lr": 0.0, "norm_bias_lr": 0.1}, "config.optim.norm_bias_lr is 0.1, but .* Set config"),
    ],
)
def test_inapplicable_optimizer_options_are_refused(change, match):
    config = default_config().optim
    config.update(change)
    with pytest.raises(UserError, match=match):
        optim.make_optimizer(config, {"w": "weight"}, schedule)


def test_unknown_labels_are_refused_by_name():
    with pytest.raises(UserError, match="'frozn'. Did you mean 'frozen'"):
        optim.make_optimizer(make_config("sgd"), {"w": "frozn"}, schedule)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"schedule": "cosin"}, "config.optim.schedule is 'cosin'. Did you mean 'cosine'"),
        ({"lr_scaling": "liner"}, "config.optim.lr_scaling is 'liner'. Did you mean 'linear'"),
        ({"per_epoch": True, "warmup_epochs": 5.0}, "config.optim.per_epoch"),
    ],
)
def test_invalid_schedule_options_are_refused(change, match):
    with pytest.raises(UserError, match=match):
        optim.learning_rate_schedule(schedule_config(**change), 256, Schedule(10, 100))
