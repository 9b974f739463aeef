import jax
import jax.numpy as jnp
import pytest

from ssl_jax.plan.hlo import CompiledText, part_of
from ssl_jax.spmd import AXIS, make_spmd


def test_collectives_count_for_every_loop_iteration_and_have_their_bytes():
    def per_device(x):
        gathered = jax.lax.all_gather(x, AXIS, tiled=True)

        def body(carry, _):
            return jax.lax.psum(carry * 1.5, AXIS), None

        looped, _ = jax.lax.scan(body, x, None, length=5)
        swapped = jax.lax.all_to_all(looped, AXIS, 0, 0)
        return swapped.sum() + gathered.sum()

    mapped = make_spmd().map(per_device, ("sharded",), "replicated")
    text = mapped.lower(jax.ShapeDtypeStruct((64, 3), jnp.float32)).compile().as_text()
    found = {c.kind: (c.count, c.bytes) for c in CompiledText(text).collectives()}
    assert found == {
        "all-gather": (1, 64 * 3 * 4),
        "all-reduce": (5, 5 * 8 * 3 * 4),
        "all-to-all": (1, 8 * 3 * 4),
    }


def test_asynchronous_collectives_count_once_with_their_results_only():
    text = """ENTRY %main (p: bf16[4]) -> bf16[32] {
  %s = (bf16[4]{0:T(8)S(1)}, bf16[32]{0:T(8)}) all-gather-start(%p), dimensions={0}
  %d = bf16[32]{0} all-gather-done(%s)
  %r = (f32[2,3]{1,0}, f32[]) all-reduce-start(%a, %b), to_apply=%add
}
"""
    found = {c.kind: (c.count, c.bytes) for c in CompiledText(text).collectives()}
    assert found == {"all-gather": (1, 64), "all-reduce": (1, 28)}


def test_branch_with_the_most_collectives_counts():
    def per_device(x):
        def many(x):
            return jax.lax.psum(jax.lax.psum(x, AXIS) * 2, AXIS)

        return jax.lax.cond(x.sum() > 0, many, lambda x: jax.lax.psum(x, AXIS), x)

    mapped = make_spmd().map(per_device, ("sharded",), "sharded")
    text = mapped.lower(jax.ShapeDtypeStruct((64,), jnp.float32)).compile().as_text()
    assert [(c.kind, c.count) for c in CompiledText(text).collectives()] == [("all-reduce", 2)]
    text = """ENTRY %main (p: f32[4]) -> f32[4] {
  %c = f32[4] conditional(%q, %a, %b), true_computation=%yes, false_computation=%no
}
%yes (p: f32[4]) -> f32[4] {
  %r = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%p)
}
%no (p: f32[4]) -> f32[4] {
  %s = f32[4] copy(%p)
}
"""
    assert [(c.kind, c.count, c.bytes) for c in CompiledText(text).collectives()] == [
        ("collective-permute", 1, 16)
    ]


# Like a TPU program: a fusion, a prefetch to the chip, a loop that reads slices.
TPU = """%slicing (p0: bf16[10,100], p1: s32[]) -> bf16[1,100] {
  %p0 = bf16[10,100]{1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  ROOT %ds = bf16[1,100]{1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,100}
}
%updating (p0: f32[10,100], p1: f32[1,100]) -> f32[10,100] {
  %p0 = f32[10,100]{1,0} parameter(0)
  %p1 = f32[1,100]{1,0} parameter(1)
  ROOT %dus = f32[10,100]{1,0} dynamic-update-slice(%p0, %p1, %i)
}
%body (s: (bf16[10,100])) -> (bf16[10,100]) {
  %s = (bf16[10,100]{1,0}) parameter(0)
  %g = bf16[10,100]{1,0} get-tuple-element(%s), index=0
  %f = bf16[1,100]{1,0} fusion(%g, %i), kind=kLoop, calls=%slicing, backend_config={"estimated_cycles":"7"}
}
ENTRY %main (a: bf16[10,100]) -> f32[10,100] {
  %a = bf16[10,100]{1,0:T(8,128)(2,1)} parameter(0)
  %c = (bf16[10,100]{1,0:T(8,128)S(1)}, bf16[10,100]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %d = bf16[10,100]{1,0:T(8,128)S(1)} copy-done(%c)
  %n = f32[10,100]{1,0} negate(%d), metadata={op_name="jit(f)/transpose(jvp(forward))/neg"}, backend_config={"estimated_cycles":"30"}
  %w = (bf16[10,100]{1,0}) while(%t), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %r = f32[1,100]{1,0} add(%x, %y), metadata={op_name="jit(f)/augment/add"}, backend_config={"estimated_cycles":"20"}
  ROOT %u = f32[10,100]{1,0} fusion(%n, %r), kind=kLoop, calls=%updating
}
"""  # noqa: E501


def test_traffic_excludes_on_chip_arrays_and_what_slices_do_not_touch():
    prefetch, negate, loop, add = 2000, 4000, 5 * (200 + 200), 400
    update = 400 + 400  # reads the new row, writes it in place
    assert CompiledText(TPU).traffic() == prefetch + negate + loop + add + update


def test_cycles_are_summed_by_part_over_all_loop_iterations():
    assert CompiledText(TPU).cycles() == {"backward": 30, "other": 35, "augment": 20}
    assert CompiledText("ENTRY %m () -> f32[] {\n}\n").cycles() == {}


def test_loop_without_annotation_takes_its_trip_count_from_the_condition():
    text = TPU.replace(', backend_config={"known_trip_count":{"n":"5"}}', ", condition=%condition")
    condition = """%condition (s: (bf16[10,100])) -> pred[] {
  %n = s32[]{:T(128)} constant(9)
  %g = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{:T(512)} compare(%g, %n), direction=LT
}
"""
    assert CompiledText(condition + text).cycles()["other"] == 9 * 7
    assert CompiledText(text).cycles()["other"] == 7


def test_float32_arrays_lists_large_float32_results_in_memory():
    found = CompiledText(TPU).float32_arrays(4000)
    assert found == [("f32[10,100]", "jit(f)/transpose(jvp(forward))/neg"), ("f32[10,100]", "")]
    assert CompiledText(TPU).float32_arrays(4001) == []


def test_traffic_of_a_real_program_is_at_least_its_arguments_and_results():
    def double(x):
        return jnp.sort(x) * 2

    text = jax.jit(double).lower(jnp.zeros((1000,))).compile().as_text()
    assert 2 * 4000 <= CompiledText(text).traffic() <= 8 * 4000


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        ("jit(train_step)/shard_map/augment/add", "augment"),
        ("jit(train_step)/jvp(forward)/ResNet/stem/conv1/conv", "forward"),
        ("jit(train_step)/transpose(jvp(forward))/ResNet/stem/bn1/mul", "backward"),
        ("jit(train_step)/transpose(jvp(loss))/dot_general", "loss"),
        ("jit(train_step)/optimizer/add", "optimizer"),
        ("jit(train_step)/convert_element_type", "other"),
    ],
)
def test_part_is_the_name_scope_of_the_step(op_name, part):
    assert part_of(op_name) == part
