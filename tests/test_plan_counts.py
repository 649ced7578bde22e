"""What is counted in programs and models: FLOPs, collectives and loops against arithmetic, and what is refused."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from mmkd_jax.batch import TextBatch
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.planning import count, flops, hlo
from mmkd_jax.planning.count import Collective
from mmkd_jax.specs import ImageTower, ModelSpec, Preprocess, ResNetTower, SwinTower, TextTower, TokenizerSpec

TEXT = TextTower(width=64, layers=2, heads=2, mlp_width=96, vocab_size=50, positions=24, context=24)
IMAGES = {
    "vit": ImageTower(width=64, layers=3, heads=2, patch=8, image_size=32, mlp_width=100),
    "modified_resnet": ResNetTower(width=16, stages=(2, 3, 1, 2), heads=4, image_size=64),
    "resnet": ResNetTower(kind="resnet", width=16, stages=(2, 3, 1, 2), heads=0, image_size=64),
    "swin": SwinTower(width=24, image_size=56, stages=(2, 4), heads=2),
}
TEXTS = {
    "bert": TEXT,
    "clip": dataclasses.replace(TEXT, kind="clip", projection="linear"),
    "pooler": dataclasses.replace(TEXT, pooling="pooler"),
}
LAYERS, WIDTH, ROWS = 5, 16, 24


def products(jaxpr) -> int:
    """FLOPs of all products in a traced function, loops by their length: another way than the closed form."""
    total = 0
    for one in jaxpr.eqns:
        out = math.prod(one.outvars[0].aval.shape) if one.outvars else 0
        if one.primitive.name == "dot_general":
            (contracted, _), _ = one.params["dimension_numbers"]
            total += 2 * out * math.prod(one.invars[0].aval.shape[d] for d in contracted)
        elif one.primitive.name == "conv_general_dilated":
            kernel = one.invars[1].aval.shape
            total += 2 * out * math.prod(kernel) // kernel[one.params["dimension_numbers"].rhs_spec[0]]
        else:
            times = one.params["length"] if one.primitive.name == "scan" else 1
            for value in one.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    total += times * products(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("kind", IMAGES)
def test_flops_of_image_towers_are_those_of_the_traced_program(kind):
    tower, n = IMAGES[kind], 3
    model = DualEncoder(ModelSpec(image=tower, text=TEXT, embed=40, preprocess=Preprocess(tower.image_size)))
    pictures = jax.ShapeDtypeStruct((n, tower.image_size, tower.image_size, 3), jnp.float32)
    encode = lambda params, x: model.encode_image(params, x).sum()  # noqa: E731
    forward = products(jax.make_jaxpr(encode)(model.shapes(), pictures).jaxpr) / n
    found = flops.image_flops(tower, 40)
    if kind == "resnet":  # gradients of strided convolutions are traced as if gaps were work
        first = 2 * 49 * 32**2 * 3 * 16
        assert found == 3 * forward - first
        return
    both = products(jax.make_jaxpr(jax.grad(encode))(model.shapes(), pictures).jaxpr) / n
    assert found == both
    assert forward < found < 3 * forward  # pictures get no gradient


@pytest.mark.parametrize("kind", TEXTS)
def test_flops_of_text_towers_are_those_of_the_traced_program(kind):
    tower, n = TEXTS[kind], 3
    tokenizer = TokenizerSpec(kind="bpe" if tower.kind == "clip" else "wordpiece")
    model = DualEncoder(ModelSpec(text=tower, embed=40, tokenizer=tokenizer))
    text = TextBatch(*[jax.ShapeDtypeStruct((n, 24), jnp.int32)] * 4)
    encode = lambda params, x: model.encode_text(params, x).sum()  # noqa: E731
    both = products(jax.make_jaxpr(jax.grad(encode))(model.shapes(), text).jaxpr) / n
    assert flops.text_flops(tower, 40) == flops.text_flops(tower, 40, 24) == both
    assert flops.text_flops(tower, 40, 12) < both / 2 + 1e6


def stack(scanned: bool, x, weights):
    """Layers one after another, each with a product and a sum over devices."""

    def layer(x, w):
        return jnp.tanh(jax.lax.psum(x @ w, "data")), None

    if scanned:
        return jax.lax.scan(layer, x, weights)[0]
    for number in range(LAYERS):
        x = layer(x, weights[number])[0]
    return x


@pytest.fixture(scope="module")
def texts():
    """The same small program scanned and unrolled, compiled for eight devices."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    spec = PartitionSpec()
    made = {}
    for scanned in (True, False):
        body = jax.shard_map(
            lambda x, w, scanned=scanned: stack(scanned, x, w), mesh=mesh, in_specs=(spec, spec), out_specs=spec,
            check_vma=False,
        )  # fmt: skip
        shapes = jnp.zeros((ROWS, WIDTH)), jnp.zeros((LAYERS, WIDTH, WIDTH))
        made[scanned] = jax.jit(body).lower(*shapes).compile().as_text()
    return made


def test_scanned_and_unrolled_programs_count_alike(texts):
    scanned, unrolled = (count.count(texts[one], {"data": 4, "fsdp": 2}) for one in (True, False))
    assert scanned.flops == unrolled.flops == LAYERS * 2 * ROWS * WIDTH * WIDTH
    arrays = Collective("all-reduce", ("data",), "f32", (ROWS, WIDTH), True, False)
    assert scanned.collectives == {arrays: LAYERS}
    assert unrolled.collectives == {dataclasses.replace(arrays, looped=False): LAYERS}
    assert " while(" in texts[True]
    assert " while(" not in texts[False]


def test_a_count_is_read_from_the_loop_where_the_compiler_does_not_say_it(texts):
    silent = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", texts[True])
    assert silent != texts[True]
    assert count.count(silent, {"data": 4, "fsdp": 2}).flops == LAYERS * 2 * ROWS * WIDTH * WIDTH


LOOP = """HloModule small

%body (p: (s32[], f32[4,4], s32[])) -> (s32[], f32[4,4], s32[]) {
  %p = (s32[], f32[4,4]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,4]{1,0} get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %step = s32[] constant(STEP)
  %next = s32[] add(%i, %step)
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[4,4]{1,0}, s32[]) tuple(%next, %y, %n)
}

%cond (q: (s32[], f32[4,4], s32[])) -> pred[] {
  %q = (s32[], f32[4,4]{1,0}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %m = s32[] get-tuple-element(%q), index=2
  %end = s32[] constant(12)
  ROOT %less = pred[] compare(LEFT, RIGHT), direction=LT
}

ENTRY %main (a: f32[4,4], b: s32[]) -> f32[4,4] {
  %a = f32[4,4]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %zero = s32[] constant(START)
  %seven = s32[] constant(7)
  %start = (s32[], f32[4,4]{1,0}, s32[]) tuple(%zero, %a, LIMIT)
  %loop = (s32[], f32[4,4]{1,0}, s32[]) while(%start), condition=%cond, body=%body
  ROOT %out = f32[4,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def loop(step=1, start=0, left="%j", right="%end", limit="%b"):
    words = {"STEP": step, "START": start, "LEFT": left, "RIGHT": right, "LIMIT": limit}
    text = LOOP
    for word, value in words.items():
        text = text.replace(word, str(value))
    return text


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        ({}, 12),
        ({"start": 2}, 10),
        ({"step": 5}, 3),
        ({"start": 20}, 0),
        ({"right": "%m", "limit": "%seven"}, 7),  # the limit is carried along
    ],
)
def test_loops_run_as_often_as_their_counter_says(changes, times):
    assert count.count(loop(**changes), {"data": 1}).flops == times * 2 * 4 * 4 * 4


@pytest.mark.parametrize(
    "changes", [{"right": "%m"}, {"step": -1}, {"left": "%end", "right": "%m"}, {"step": 0}, {"left": "%m"}]
)
def test_a_count_that_cannot_be_read_is_not_guessed(changes):
    with pytest.raises(hlo.HloError, match=r"cannot read how often the loop loop runs"):
        count.count(loop(**changes), {"data": 1})


def test_a_loop_that_data_ends_is_refused():
    halve = lambda x: jax.lax.while_loop(lambda x: x.sum() > 1.0, lambda x: x @ x, x)  # noqa: E731
    text = jax.jit(halve).lower(jnp.ones((4, 4))).compile().as_text()
    with pytest.raises(hlo.HloError, match="cannot read how often"):
        count.count(text, {"data": 1})


ASYNC = """HloModule beside

%started (p: f32[2,4]) -> (f32[2,4], f32[16,4]) {
  %p = f32[2,4]{1,0} parameter(0)
  %g = f32[16,4]{1,0} all-gather(%p), channel_id=1, replica_groups=GROUPS, dimensions={0}, AGAIN
  ROOT %c = (f32[2,4]{1,0}, f32[16,4]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%beside (p: f32[2,4]) -> f32[16,4] {
  %p = f32[2,4]{1,0} parameter(0)
  ROOT %g = f32[16,4]{1,0} all-gather(%p), channel_id=1, replica_groups=GROUPS, dimensions={0}, AGAIN
}

%done (p: f32[2,4]) -> f32[16,4] {
  %p = f32[2,4]{1,0} parameter(0)
  %g = f32[16,4]{1,0} all-gather(%p), channel_id=1, replica_groups=GROUPS, dimensions={0}, AGAIN
  ROOT %c = f32[16,4]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[2,4]) -> f32[16,4] {
  %a = f32[2,4]{1,0} parameter(0)
  %s = (f32[2,4]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[16,4]{1,0}) fusion(%a), kind=kCustom, calls=%started
  %b = f32[16,4]{1,0} fusion(%a), kind=kCustom, calls=%beside, backend_config={"estimated_cycles":"70"}
  %k = f32[16,4]{1,0} custom-call(%b), custom_call_target="tpu_custom_call", backend_config="{ }"
  ROOT %d = f32[16,4]{1,0} fusion(%a), kind=kCustom, calls=%done
}
"""


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("data",)),
        ("mesh['axis_0'=8] {'axis_0'}", ("data", "fsdp")),
        ("mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_2'}", ("data",)),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", ("fsdp",)),
        ("{{0,1},{2,3},{4,5},{6,7}}", ("fsdp",)),
        ("[2,4]<=[4,2]T(1,0)", ("data",)),
        ("[4,2]<=[8]", ("fsdp",)),
        ("{}", ("data", "fsdp")),
        ("unheard_of", ("?",)),
    ],
)
def test_a_gather_beside_other_work_counts_once_and_by_its_axes(groups, axes):
    chained = 'frontend_attributes={chain_id="0"}'
    found = count.count(ASYNC.replace("AGAIN", chained).replace("GROUPS", groups), {"data": 4, "fsdp": 2})
    assert found.collectives == {Collective("all-gather", axes, "f32", (16, 4), False, True): 1}
    assert found.cycles == 70
    assert found.hidden == {"tpu_custom_call": 1}


def of_convolution(window: str, labels: str, left: str, kernel: str, out: str) -> int:
    text = f"""HloModule one

ENTRY %main (a: f32[{left}], b: f32[{kernel}]) -> f32[{out}] {{
  %a = f32[{left}] parameter(0)
  %b = f32[{kernel}] parameter(1)
  ROOT %c = f32[{out}] convolution(%a, %b), {window}dim_labels={labels}
}}
"""
    return count.count(text, {"data": 1}).flops


def test_convolutions_count_what_meets_an_input():
    assert of_convolution("", "bf_io->bf", "8,32", "32,64", "8,64") == 2 * 8 * 32 * 64
    # A product for each of eight heads, written as a convolution over them in which all but one place is a gap.
    batched = of_convolution("window={size=8 stride=7 lhs_dilate=8}, ", "0fb_0oi->0bf", "8,32,5", "8,6,32", "8,5,6")
    assert batched == 8 * 2 * 5 * 6 * 32
    # 3 x 3 on 5 x 5 with padding of 1: the corners see four places, edges six, the middle nine.
    places = 4 * 4 + 12 * 6 + 9 * 9
    padded = of_convolution("window={size=3x3 pad=1_1x1_1}, ", "b01f_01io->b01f", "2,5,5,3", "3,3,3,7", "2,5,5,7")
    assert padded == 2 * 2 * 3 * 7 * places


def test_text_that_is_cut_off_is_refused():
    with pytest.raises(hlo.HloError, match="no entry"):
        hlo.parse("HloModule nothing\n")
    with pytest.raises(hlo.HloError, match="cut off"):
        hlo.parse("ENTRY %main (a: f32[2]) -> f32[2] {\n  ROOT %b = f32[2] add(%a, %a\n}\n")
