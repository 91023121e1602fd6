"""The cost model's arithmetic: by hand, in the limits, and that a fit finds the costs that points were made with."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch.distributed as dist

from engine.bench import cost_model
from engine.bench.cost_model import Case, Point, seconds, wire_bytes, work_of
from engine.ops.ring_codec import wire_bytes as codec_bytes

COSTS = {
    "memory.wait": 5e-6,
    "memory.byte": 1e-10,
    "gloo.message": 1e-4,
    "gloo.byte": 4e-10,
    "engine.message": 5e-5,
    "engine.byte": 3e-10,
    "int8.byte": 2e-10,
}
MIB = 1 << 20


def test_by_hand():
    assert work_of(Case("memory", 4096, 1, 4), cores=4) == {"memory.wait": 3, "memory.byte": 2 * 3 / 4 * 4096}
    assert work_of(Case("memory", 4096, 1, 4), cores=2) == {"memory.wait": 6, "memory.byte": 4 * 3 / 4 * 4096}
    assert work_of(Case("gloo", 4096, 4), cores=1) == {"gloo.message": 6, "gloo.byte": 6 / 4 * 4096}
    # 16 MiB among 2 go in windows of 1 MiB: 8 of them, each way
    assert work_of(Case("engine", 16 * MIB, 2), cores=1) == {"engine.message": 16, "engine.byte": 16 * MIB}
    hierarchical = work_of(Case("engine", 4 * MIB, 2, 4, "int8"), cores=4)
    assert hierarchical == {
        "memory.wait": 6,
        "memory.byte": 2 * 2 * 3 / 4 * 4 * MIB,
        "engine.message": 2,
        "engine.byte": MIB * (1 + 4 / 256) / 4,
        "int8.byte": MIB,
    }
    # a gigabit a second: the wire is what takes the time; without a wire, the processors
    case = Case("engine", 4 * MIB, 2)
    assert seconds(case, COSTS, 1, 125e6) == pytest.approx(4 * 5e-5 + 4 * MIB / 125e6)
    assert seconds(case, COSTS, 1) == pytest.approx(4 * 5e-5 + 4 * MIB * 3e-10)
    assert seconds(Case("memory", MIB, 1, 1), COSTS, 1) == seconds(Case("gloo", MIB, 1), COSTS, 1) == 0


def test_limits():
    assert wire_bytes(Case("gloo", MIB, 1, 8)) == 0
    assert wire_bytes(Case("engine", MIB, 4096)) == pytest.approx(2 * MIB, rel=1e-3)
    # a host sends each byte once, though eight ranks have it; a flat ring of all ranks sends more
    assert wire_bytes(Case("engine", MIB, 2, 8)) == MIB < wire_bytes(Case("gloo", MIB, 2, 8))
    for codec, most in (("bf16", 2), ("int8", 3.94), ("bitmap", 75.29)):
        plain, encoded = (wire_bytes(Case("engine", MIB, 4, 2, c)) for c in (None, codec))
        assert plain / encoded == pytest.approx(most, rel=1e-3)
        assert codec_bytes(codec, 1 << 20) / (4 << 20) == pytest.approx(cost_model.WIRE_RATIO[codec], rel=2e-3)
    # more ranks are never faster, and the limit for many is twice the tensor's time on the wire, and the messages
    times = [seconds(Case("engine", 256 * MIB, hosts), COSTS, 1, 1.25e9) for hosts in (2, 8, 64, 512, 4096)]
    assert times == sorted(times)
    assert times[2] == pytest.approx(2 * 63 / 64 * 256 * MIB / 1.25e9 + 2 * 63 * 4 * 5e-5)


def test_a_fit_finds_the_costs():
    cases = [Case("memory", size, 1, p) for size in cost_model.SIZES for p in (2, 4)]
    cases += [Case(way, size, p) for way in ("gloo", "engine") for size in cost_model.SIZES for p in (2, 3)]
    cases += [dataclasses.replace(case, codec="int8") for case in cases if case.way == "engine"]
    points = [Point(case, seconds(case, COSTS, 2), 2) for case in cases]
    fitted, held_out = cost_model.split(points)
    assert len(fitted) + len(held_out) == len(points)
    fitted_sizes, held_out_sizes = ({p.case.size for p in some} for some in (fitted, held_out))
    assert fitted_sizes | held_out_sizes == set(cost_model.SIZES) and not fitted_sizes & held_out_sizes
    assert fitted_sizes and held_out_sizes
    costs = cost_model.fit(fitted)
    assert costs == pytest.approx(COSTS, rel=1e-6)
    assert max(abs(error) for _, error in cost_model.errors(held_out, costs)) < 1e-6
    # a wrong point is an error, of its size
    doubled = [dataclasses.replace(held_out[0], seconds=2 * held_out[0].seconds)]
    assert cost_model.errors(doubled, costs)[0][1] == pytest.approx(-0.5)


def test_no_cost_is_negative():
    """Points that fall with size, as noise may have it."""
    points = [Point(Case("gloo", size, 2), 1e-3 / math.log2(size), 1) for size in cost_model.SIZES]
    costs = cost_model.fit(points)
    assert all(cost >= 0 for cost in costs.values()) and any(costs.values())


def test_table(tmp_path, capsys):
    points = [Point(Case("memory", size, 1, 2), 1e-5 + size * 1e-10, 2) for size in cost_model.SIZES]
    points += [Point(Case("gloo", size, 2), 1e-4 + size * 1e-9, 1) for size in cost_model.SIZES]
    cost_model.save(points, tmp_path / "points.json")
    assert cost_model.load(tmp_path / "points.json") == points
    assert len(json.loads((tmp_path / "points.json").read_text())) == len(points)
    costs = cost_model.fit(points)
    cost_model.print_table(costs, 64 << 20, 8, 8, 10)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[3:]] == [
        ["2", "1"],
        ["8", "1"],
        ["64", "8"],
        ["512", "64"],
        ["4096", "512"],
    ]
    want = seconds(Case("memory", 64 << 20, 1, 2), costs, 8) * 1e3
    assert float(lines[3].split()[2]) == pytest.approx(want, abs=0.01) and want > 1


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo")
def test_measured():
    text = subprocess.run([sys.executable, cost_model.__file__], check=True, capture_output=True, text=True).stdout
    assert "held out" in text and "4096" in text
