"""The text of compiled programs: loops, collectives, and the time they should take."""

import pytest

from r1re_jax.launch.prediction import Prediction, Rates
from r1re_jax.launch.program import Text

# A cycle is a second here, and so is a byte of memory, of the links, or an operation.
RATES = Rates(clock=1.0, flops=1.0, bandwidth=1.0, links=1.0)
CYCLES = 'backend_config={{"estimated_cycles":"{}"}}'


def text(*lines: str, others: str = "") -> Text:
    """Make a program of some lines."""
    body = "\n".join(f"  {line}" for line in lines)
    return Text.of(f"{others}\nENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}\n")


def fusion(name: str, cycles: int) -> str:
    """Make a line of an operation."""
    return f"%{name} = f32[4]{{0}} fusion(%p), kind=kLoop, {CYCLES.format(cycles)}"


def test_operations_take_their_cycles() -> None:
    found = text("%p = f32[4]{0} parameter(0)", fusion("a", 5), fusion("b", 7)).predicted(RATES)
    assert found == Prediction(compute=12.0)


def test_a_loop_takes_as_many_rounds_as_its_counter() -> None:
    others = """
%cond (c: (s32[])) -> pred[] {
  %n = s32[]{:T(128)} constant(28)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (c: (s32[])) -> (s32[]) {
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %work = f32[4]{0} fusion(%i), kind=kLoop, backend_config={"estimated_cycles":"3"}
  ROOT %t = (s32[]) tuple(%next)
}
"""
    loop = "%w = (s32[]) while(%t), condition=%cond, body=%body"
    assert text(loop, others=others).predicted(RATES).compute == 14 * 3
    said = loop + ', backend_config={"known_trip_count":{"n":"5"}}'
    assert text(said, others=others).predicted(RATES).compute == 5 * 3
    unknown = others.replace("direction=LT", "direction=NE")
    assert text(loop, others=unknown).predicted(RATES, rounds=[9]).compute == 9 * 3
    assert text(loop, others=unknown).predicted(RATES).compute == 3


def test_loops_of_unknown_rounds_share_them_out_by_depth() -> None:
    others = """
%cond (c: (s32[])) -> pred[] {
  ROOT %ne = pred[] compare(%a, %b), direction=NE
}

%inner (c: (s32[])) -> (s32[]) {
  %x = f32[4]{0} fusion(%i), kind=kLoop, backend_config={"estimated_cycles":"1"}
}

%outer (c: (s32[])) -> (s32[]) {
  %y = f32[4]{0} fusion(%i), kind=kLoop, backend_config={"estimated_cycles":"100"}
  %v = (s32[]) while(%t), condition=%cond, body=%inner
}
"""
    loop = "%w = (s32[]) while(%t), condition=%cond, body=%outer"
    assert text(loop, others=others).predicted(RATES, rounds=[8, 4]).compute == 8 * (100 + 4)


GATHER = "%g = f32[8]{0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}"


def test_a_collective_takes_what_arrives_over_the_links() -> None:
    program = text(GATHER)
    # Of 32 bytes on four devices, a quarter was there before.
    assert program.predicted(RATES) == Prediction(waiting=24.0)
    assert program.collectives() == {"all-gather": {"count": 1, "bytes": 32, "largest": 32}}
    reduced = text(GATHER.replace("all-gather", "all-reduce"))
    assert reduced.predicted(RATES).waiting == 2 * 24
    mesh = GATHER.replace("{{0,1,2,3}}", "mesh['axis_0'=2,'axis_1'=8] {'axis_0'}")
    assert text(mesh).predicted(RATES).waiting == 32 / 2


@pytest.mark.parametrize(("between", "waiting"), [(10, 14.0), (24, 0.0), (50, 0.0)])
def test_a_collective_hides_behind_what_is_between_its_start_and_done(
    between: int, waiting: float
) -> None:
    start = "%s = (f32[2]{0}, f32[8]{0}) all-gather-start(%p), channel_id=1"
    start += ", replica_groups={{0,1,2,3}}, dimensions={0}"
    done = "%d = f32[8]{0} all-gather-done(%s)"
    found = text(fusion("a", 90), start, fusion("b", between), done, fusion("c", 90))
    assert found.predicted(RATES) == Prediction(compute=180.0 + between, waiting=waiting)


def test_parts_of_one_collective_are_one() -> None:
    """The compiler fuses a collective's pieces into what runs beside it; they share a channel."""
    others = "".join(
        f"\n%f{n} (p: f32[2]) -> f32[8] {{\n  {GATHER.replace('%g', f'%g{n}')}\n}}\n" for n in "123"
    )
    first = "%async-collective-start = f32[8]{0} fusion(%p), kind=kCustom, calls=%f1"
    middle = f"%b = f32[8]{{0}} fusion(%p), kind=kOutput, calls=%f2, {CYCLES.format(20)}"
    last = "%async-collective-done = f32[8]{0} fusion(%p), kind=kCustom, calls=%f3"
    program = text(first, middle, last, others=others)
    assert program.collectives()["all-gather"]["count"] == 1
    assert program.predicted(RATES) == Prediction(compute=20.0, waiting=4.0)


def test_collectives_wait_for_each_other() -> None:
    other = GATHER.replace("%g", "%h").replace("channel_id=1", "channel_id=2")
    assert text(GATHER, other).predicted(RATES).waiting == 48


def test_a_kernel_takes_its_roofline() -> None:
    cost = '"cost_estimate":{"flops":"30","transcendentals":"1","bytes_accessed":"60"}'
    line = '%k = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call", '
    found = text(f"{line}backend_config={{{cost}}}").predicted(RATES)
    assert found == Prediction(compute=100.0, kernels=100.0)


def test_what_has_no_cost_is_listed_and_not_free() -> None:
    on_chip = "%r = f32[4]{0:T(128)S(1)} negate(%p)"
    found = text("%s = f32[4]{0} sort(%p)", on_chip).predicted(RATES)
    assert found.compute == 16.0 and dict(found.uncosted) == {"sort": 1}
    put = "%u = f32[100]{0} dynamic-update-slice(%all, %new, %at)"
    found = text("%new = f32[4]{0} parameter(0)", put).predicted(RATES)
    assert found.compute == 16.0, "in place: what is put"


def test_copies_go_on_beside_what_is_computed() -> None:
    start = "%s = (f32[4]{0:S(1)}, f32[4]{0}, u32[]) copy-start(%p)"
    done = "%d = f32[4]{0:S(1)} copy-done(%s)"
    found = text(start, fusion("a", 10), done).predicted(RATES)
    assert found == Prediction(compute=10.0, waiting=6.0)
