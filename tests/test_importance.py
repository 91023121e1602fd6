"""calibrate, static scales, clipping, wanda, obs and 2:4: against plain computations, and by what they gain."""

import copy
import logging

import pytest
import torch
from models import Mlp, TinyLm, assert_unchanged, state_of
from torch import nn

import engine
from engine import Prune, Quantize, Recipe
from engine.compress import importance
from engine.compress.calibrate import InputStatistics


def correlated(rows, columns, seed=0):
    """Inputs as networks have them: few directions, channels of very different size."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, columns // 8, generator=g) @ torch.randn(columns // 8, columns, generator=g)
    return (mixed + 0.5 * torch.randn(rows, columns, generator=g)) * torch.rand(columns, generator=g).mul(2).exp() / 4


def output_error(model, x, before):
    return ((model(x) - before).norm() / before.norm()).item()


def test_statistics_are_those_of_all_rows_at_once():
    model = Mlp().train()
    x = correlated(60, 256)
    before = state_of(model)
    batches = iter([x[:10], (x[10:40],), {"x": x[40:]}])
    seen = engine.calibrate(model, batches, second_moment=True, progress=False)
    assert_unchanged(model, before)
    first = seen.layers["first"]
    assert seen.batches == 3 and set(seen.layers) == {"first", "second", "head"} and first.rows == 60
    assert torch.equal(first.channel_amax, x.abs().amax(0)) and first.amax == x.abs().max().item()
    torch.testing.assert_close(first.channel_mean_square, x.square().mean(0))
    torch.testing.assert_close(first.second_moment, x.t() @ x / 60)
    assert first.counts.sum() == x.numel()
    assert seen.input_scales()["first"] == pytest.approx(x.abs().max().item() / 127)


def test_scales_of_a_heavy_tail():
    x = torch.randn(200, 500)
    x[3, 4] = 60.0
    statistics = InputStatistics.empty(500, x.device, False)
    for rows in x.split(7):
        statistics.see(rows)
    percentile = statistics.input_scale("percentile", 99.0) * 127
    assert percentile == pytest.approx(x.abs().flatten().quantile(0.99).item(), rel=0.1)

    def loss(scale):
        return ((x / scale).round().clamp(-127, 127) * scale - x).square().sum().item()

    best = statistics.input_scale("least_squares")
    tried = [60 / 127 * f for f in torch.linspace(0.2, 1, 41).tolist()]
    assert loss(best) <= 1.02 * min(map(loss, tried)) and loss(best) < loss(60 / 127)
    with pytest.raises(ValueError, match="method: expected one of"):
        statistics.input_scale("best")
    with pytest.raises(ValueError, match="was not gathered"):
        _ = statistics.second_moment


def test_inputs_of_zeros_and_none():
    statistics = InputStatistics.empty(4, torch.device("cpu"), False)
    statistics.see(torch.zeros(3, 4))
    statistics.see(torch.zeros(0, 4))
    assert statistics.rows == 3 and all(statistics.input_scale(m) > 0 for m in ("amax", "percentile", "least_squares"))
    statistics.see(torch.ones(1, 4))
    assert statistics.counts.sum() == 16 and statistics.counts[0] == 12


def test_calibrate_refuses():
    model = Mlp()
    with pytest.raises(ValueError, match="expected at least one"):
        engine.calibrate(model, [])
    with pytest.raises(ValueError, match="first: its input holds a NaN"):
        engine.calibrate(model, [torch.full((2, 256), torch.nan)])
    assert not any(m._forward_hooks for m in model.modules())


def test_tied_weights_share_their_statistics():
    model = TinyLm()
    seen = engine.calibrate(model, [torch.randint(0, 100, (2, 7))], targets=("Linear", "Embedding"), progress=False)
    assert seen.layers["embed"] is seen.layers["lm_head"] and seen.layers["lm_head"].rows == 14


@pytest.mark.parametrize("method", ["amax", "percentile", "least_squares"])
def test_static_scales_reach_the_kernels(method):
    model, x = Mlp(), correlated(64, 256)
    seen = engine.calibrate(model, x.split(16), progress=False)
    recipe = Recipe(quantize=Quantize("static", input_scale=method), guard="none")
    with torch.no_grad():
        before = model(x)
        engine.compress_(model, recipe, calibration=seen)
        assert model.first.input_scale.item() == pytest.approx(seen.layers["first"].input_scale(method))
        assert output_error(model, x, before) < 0.2


def with_outliers(rows, columns):
    """Inputs of which a few channels are a hundred times as large as the others."""
    x = torch.randn(rows, columns)
    x[:, :: columns // 3] *= 100
    return x


@pytest.mark.parametrize("smooth", [0.5, "least_squares"])
@pytest.mark.parametrize(
    "prune", [None, Prune(sparsity=0.5), Prune(sparsity=0.5, importance="obs"), Prune(0.5, pattern="2:4")]
)
@pytest.mark.parametrize("clip", [None, "least_squares"])
def test_smoothing_saves_what_outliers_cost(smooth, prune, clip):
    model, x = Mlp(), with_outliers(256, 256)
    seen = engine.calibrate(model, x.split(64), second_moment=True, progress=False)
    errors = []
    with torch.no_grad():
        pruned = copy.deepcopy(model)
        if prune is not None:
            engine.prune_(pruned, prune, calibration=seen)
        before = pruned.first(x)
        for way in (None, smooth):
            small = copy.deepcopy(model)
            quantize = Quantize("static", smooth=way, weight_clip=clip)
            engine.compress_(small, Recipe(prune, quantize, guard="none"), calibration=seen)
            errors.append((small.first(x) - before).norm())
        assert small.first.input_scale.shape == (256,)
        # obs makes good its rounding in other weights, so that its result is not the pruned layer's with noise
        assert errors[1] < (0.9 if prune is not None and prune.importance == "obs" else 0.5) * errors[0]


def test_channel_scales():
    """The weight takes over exactly what the input is divided by, and nothing that was seen is clipped."""
    weight, x = torch.randn(12, 64), with_outliers(99, 64)
    x[:, 5] = 0  # never seen: some scale that can be divided by
    seen = InputStatistics.empty(64, torch.device("cpu"), False)
    seen.see(x)
    for smooth in (0.0, 0.5, 0.9, 1.0, "least_squares"):
        scales = seen.channel_scales(weight, smooth)
        assert scales.isfinite().all() and (scales > 0).all()
        assert ((x / scales).abs() <= 127 * (1 + 1e-5)).all()
    flat = seen.channel_scales(torch.ones(2, 64), 0.0)  # weights that are alike, and nothing of the input moves
    torch.testing.assert_close(flat, torch.full((64,), seen.amax / 127))
    losses = {s: seen._expected_loss(weight, seen.channel_scales(weight, s)) for s in (0.0, 0.5, "least_squares")}
    assert losses["least_squares"] <= min(losses.values()) and losses["least_squares"] < 0.1 * losses[0.0]


def test_expected_loss_is_what_comes():
    """The estimate that chooses a layer's smoothing, against the error itself."""
    weight, x = torch.randn(48, 64), with_outliers(500, 64)
    seen = InputStatistics.empty(64, torch.device("cpu"), False)
    seen.see(x)
    want = x.double() @ weight.double().t()
    for smooth in (0.5, 0.7, 0.9):
        scales = seen.channel_scales(weight, smooth)
        y = engine.formats.DenseInt8.from_dense(weight, "static", scales).linear(x)
        assert seen._expected_loss(weight, scales) == pytest.approx((y - want).square().sum(1).mean().item(), rel=0.3)


@pytest.mark.parametrize(
    "how",
    [
        {"activation": "dynamic", "smooth": 0.5},
        {"activation": "static", "input_scale": "percentile", "smooth": 0.5},
        {"activation": "static", "smooth": 1.5},
        {"activation": "static", "smooth": "best"},
        {"activation": "static", "smooth": True},
    ],
)
def test_smoothing_refuses(how):
    with pytest.raises(ValueError, match="smooth"):
        Quantize(**how)


def test_smoothed_models_are_saved_and_loaded(tmp_path):
    model, x = Mlp(), with_outliers(32, 256)
    engine.compress_(model, Recipe(None, Quantize("static", smooth="least_squares"), guard="none"), x)
    engine.save(model, tmp_path / "m.safetensors")
    again = engine.load_(Mlp(), tmp_path / "m.safetensors")
    assert torch.equal(again(x), model(x)) and again.first.input_scale.shape == (256,)
    other = Mlp()
    engine.compress_(other, Recipe(None, Quantize("static"), guard="none"), x)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_clipping_gains_where_a_row_has_an_outlier():
    weight = torch.randn(20, 300)
    weight[:, 7] = 6.0
    plain = engine.formats.DenseInt8.from_dense(weight)
    scale = importance.clip_scales(weight)
    clipped = engine.formats.DenseInt8.from_dense(weight, scale=scale)
    flat = torch.full((2, 8), 1.0)  # nothing to gain: amax stays
    torch.testing.assert_close(importance.clip_scales(flat), torch.full((2,), 1 / 127))
    assert importance.clip_scales(torch.zeros(1, 4)).tolist() == [1.0]
    losses = [(f.to_dense() - weight).norm() for f in (clipped, plain)]
    assert losses[0] <= losses[1]
    ignored = torch.ones(300)
    ignored[7] = 0  # an input that is always 0 may be clipped as hard as one likes
    weighted = engine.formats.DenseInt8.from_dense(weight, scale=importance.clip_scales(weight, ignored))
    assert ((weighted.to_dense() - weight) * ignored).norm() < 0.8 * ((plain.to_dense() - weight) * ignored).norm()


@pytest.mark.parametrize("by_row", [False, True])
def test_ties_are_spread_in_steps_as_at_once(by_row, monkeypatch):
    score = torch.randint(-2, 3, (30, 70)).float()
    score[5] = torch.rand(70) + 3  # no ties
    (at_once,) = importance.thresholds([score], 0.7, by_row)
    monkeypatch.setattr(importance, "AT_ONCE", 200)
    (in_steps,) = importance.thresholds([score], 0.7, by_row)
    assert torch.equal(at_once, in_steps) and at_once.shape == score.shape
    kept = (score.abs() > at_once).sum(1)
    assert (kept == 21).all() if by_row else kept.sum() == 630


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_wanda_keeps_by_weight_times_norm(scope):
    model, x = Mlp(), correlated(40, 256)
    x[:, 5] = 0
    weight = model.first.weight.detach().clone()
    recipe = Recipe(prune=Prune(sparsity=0.6, scope=scope, importance="wanda"), guard="none")
    engine.compress_(model, recipe, x)
    kept = model.first.weight != 0
    score = weight.abs() * x.square().mean(0).sqrt()
    assert not kept[:, 5].any() and model.first.format.sparsity == pytest.approx(0.6, abs=2e-3)
    limits = [(score[i][kept[i]].min(), score[i][~kept[i]].max()) for i in range(3)]
    if scope == "layer":
        limits = [(score[kept].min(), score[~kept].max())]
    assert all(least >= most * (1 - 1e-5) for least, most in limits)
    assert torch.equal(model.first.weight, torch.where(kept, weight, 0.0))


@pytest.mark.parametrize("quantize", [None, Quantize(), Quantize("static", weight_clip="least_squares")])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_obs_loses_at_most_half_of_what_magnitude_does(pattern, quantize):
    x, held_out = correlated(900, 256).split([600, 300])
    errors = {}
    for kind in ("magnitude", "obs"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 96))
        with torch.no_grad():
            before = model(held_out)
            recipe = Recipe(Prune(sparsity=0.5, pattern=pattern, importance=kind), quantize, guard="none")
            engine.compress_(model, recipe, x)
            errors[kind] = output_error(model, held_out, before)
        assert model[0].format.sparsity == pytest.approx(0.5, abs=5e-3)
        if pattern == "2:4":
            assert ((model[0].weight.view(96, 64, 4) != 0).sum(-1) <= 2).all()
    assert errors["obs"] <= 0.5 * errors["magnitude"]


def test_obs_without_pruning_rounds_to_the_scales():
    weight, x = torch.randn(30, 70), correlated(200, 70)
    scale = importance.clip_scales(weight)
    rounded = importance.obs_prune(weight, x.t() @ x, None, scale=scale)
    plain = (weight / scale[:, None]).round().clamp(-127, 127) * scale[:, None]
    steps = rounded / scale[:, None]
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert ((rounded - weight) @ x.t()).norm() < 0.9 * ((plain - weight) @ x.t()).norm()


def test_obs_with_dead_columns_and_a_singular_moment(caplog):
    weight, x = torch.randn(16, 40), correlated(3, 40)
    x[:, 11] = 0
    pruned = importance.obs_prune(weight, x.t() @ x, 0.5)
    assert pruned.isfinite().all() and (pruned[:, 11] == 0).all()
    assert importance.obs_prune(weight, torch.zeros(40, 40), 0.5).count_nonzero() == 320
    bad = x.t() @ x
    bad[0, 1] = bad[1, 0] = bad.diagonal().mean() * 3  # no moment of anything: only much damping helps
    with caplog.at_level(logging.WARNING, "engine"):
        assert importance.obs_prune(weight, bad, 0.5, name="deep.layer").isfinite().all()
    assert "deep.layer: its second moment can't be inverted with damping 0.01" in caplog.text
    with pytest.raises(ValueError, match="NaN or an infinity"):
        importance.obs_prune(weight, torch.full((40, 40), torch.nan), 0.5)


BY_INPUTS = [("wanda", "unstructured"), ("wanda", "block"), ("wanda", "2:4"), ("obs", "unstructured"), ("obs", "2:4")]


@pytest.mark.parametrize(("kind", "pattern"), BY_INPUTS)
@pytest.mark.parametrize("dead", [0.3, 0.7])
@pytest.mark.parametrize("scope", ["row", "layer"])
def test_what_was_never_seen_goes_first_but_no_more_than_asked(kind, pattern, dead, scope):
    x = torch.randn(300, 320)
    x[:, : round(320 * dead)] = 0
    model = nn.Sequential(nn.Linear(320, 96))
    weight = model[0].weight.detach().clone()
    recipe = Recipe(Prune(0.5, pattern=pattern, importance=kind, scope=scope), guard="none")
    report = engine.compress_(model, recipe, x)
    assert report.layers[0].sparsity == pytest.approx(0.5, abs=1e-3)
    unseen, mine = (w[:, : round(320 * dead)] for w in (weight, model[0].weight))
    kept = mine != 0
    torch.testing.assert_close(mine, torch.where(kept, unseen, 0.0))  # nothing was there to correct them by
    if pattern == "unstructured" and kind == "wanda":
        assert kept.any() == (dead == 0.7)
        if dead == 0.7 and scope == "layer":  # of those the largest stay
            assert unseen[kept].abs().min() >= unseen[~kept].abs().max()


@pytest.mark.parametrize(("kind", "pattern"), BY_INPUTS)
def test_a_layer_whose_inputs_were_all_zero_is_left_alone(kind, pattern, caplog):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    nn.init.constant_(model[0].bias, -100.0)
    prune, x = Prune(0.5, pattern=pattern, importance=kind), torch.randn(50, 64)
    seen = engine.calibrate(model, [x], second_moment=True, progress=False)
    before = model[2].weight.clone()
    assert engine.prune_(copy.deepcopy(model), prune, calibration=seen).keys() == {"0"}
    assert "2: left alone: its inputs were all zero" in caplog.text
    report = engine.compress_(model, Recipe(prune, guard="none"), calibration=seen)
    assert [row.name for row in report.layers] == ["0"] and torch.equal(model[2].weight, before)
    assert report.left_alone == {"2": "its inputs were all zero, so that no importance can be told"}


@pytest.mark.parametrize("size", [1e-36, 1e-24, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("kind", ["wanda", "obs"])
def test_inputs_of_any_size_are_told_apart(size, kind):
    x = correlated(300, 64)
    masks = []
    for factor in (1.0, size):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        batches = [torch.zeros(2, 64), *(x * factor).split(100)]
        seen = engine.calibrate(model, batches, second_moment=True, progress=False)
        engine.compress_(model, Recipe(Prune(sparsity=0.5, importance=kind), guard="none"), calibration=seen)
        masks.append(model[0].weight != 0)
    assert (masks[0] != masks[1]).float().mean() < 0.01
    growing = InputStatistics.empty(64, x.device, True)
    for factor in (1e-7, 1.0, 1e7):
        growing.see(x * (size * 1e-2 * factor))
    moment = growing.moment_sum.double() * growing.unit**2 / (size * 1e5) ** 2
    torch.testing.assert_close(moment.float(), x.t() @ x, rtol=1e-4, atol=1e-3)
    mean = (growing.moment_sum.double() * growing.unit**2 / growing.rows).float()  # infinite where float32 ends
    torch.testing.assert_close(growing.second_moment, mean)


def test_a_moment_far_below_the_largest():
    seen = InputStatistics.empty(2, torch.device("cpu"), True)
    seen.see(torch.tensor([[1e25, 0.0], [0.0, 1e10]]))
    assert torch.equal(seen.second_moment.isinf(), torch.tensor([[True, False], [False, False]]))
    torch.testing.assert_close(seen.second_moment[1], torch.tensor([0.0, 0.5e20]))


def test_a_moment_without_an_inverse_leaves_its_layer_alone(monkeypatch):
    model, x = Mlp(), correlated(40, 256)
    seen = engine.calibrate(model, [x], second_moment=True, progress=False)
    moment = seen.layers["second"].moment_sum
    moment.fill_(1.0).fill_diagonal_(1e-9)
    report = engine.compress_(model, Recipe(Prune(sparsity=0.5, importance="obs"), guard="none"), calibration=seen)
    assert report.left_alone == {"second": "the second moment of its input can't be inverted"}
    assert [row.name for row in report.layers] == ["first", "head"]


def test_a_calibration_of_another_model_is_refused():
    model, other = Mlp(), Mlp(width=16)
    seen = engine.calibrate(other, [torch.randn(9, 16)], second_moment=True, progress=False)
    message = "second: the calibration is of another model: it saw inputs of 32 channels there, the layer takes 512"
    only = {"targets": ("second",), "guard": "none"}
    for kind in ("wanda", "obs"):
        with pytest.raises(ValueError, match=message):
            engine.compress_(model, Recipe(Prune(sparsity=0.5, importance=kind), **only), calibration=seen)
        with pytest.raises(ValueError, match=message):
            engine.prune_(model, Prune(sparsity=0.5, importance=kind), targets=("second",), calibration=seen)
    with pytest.raises(ValueError, match=message):
        engine.compress_(model, Recipe(quantize=Quantize("static"), **only), calibration=seen)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype):
    x = correlated(100, 256)
    recipe = Recipe(Prune(sparsity=0.5, importance="obs"), Quantize("static", smooth="least_squares"), guard="none")
    weights = []
    for default in (torch.float32, dtype):
        torch.manual_seed(0)
        model = Mlp()
        torch.set_default_dtype(default)
        try:
            seen = engine.calibrate(model, [x], second_moment=True, progress=False)
            engine.compress_(model, recipe, calibration=seen)
        finally:
            torch.set_default_dtype(torch.float32)
        weights.append(model.second.weight)
    assert torch.equal(*weights)


def test_autocast_is_for_the_model_alone():
    x = with_outliers(100, 256)
    recipe = Recipe(None, Quantize("static", smooth="least_squares", weight_clip="least_squares"), guard="none")
    seen = engine.calibrate(Mlp(), [x], progress=False)
    weights = []
    for on in (False, True):
        torch.manual_seed(0)
        model = Mlp()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            engine.compress_(model, recipe, calibration=seen)
        weights.append(model.second.weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize("columns", [1, 3, 128, 131])
def test_obs_of_any_width(columns):
    weight, x = torch.randn(5, columns), torch.randn(300, columns)
    for pattern in ("unstructured", "2:4"):
        pruned = importance.obs_prune(weight, x.t() @ x, 0.5, pattern=pattern, scale=torch.full((5,), 0.05))
        assert pruned.shape == weight.shape and pruned.isfinite().all()


def test_prune_by_importance():
    model, x = Mlp(), correlated(40, 256)
    with pytest.raises(ValueError, match=r"first: importance 'wanda' looks at inputs: give calibration="):
        engine.prune_(model, Prune(sparsity=0.5, importance="wanda"))
    seen = engine.calibrate(model, [x], second_moment=True, progress=False)
    shares = engine.prune_(model, Prune(sparsity=0.5, importance="obs"), calibration=seen)
    assert all(share == pytest.approx(0.5, abs=5e-3) for share in shares.values())
    model = Mlp()
    shares = engine.prune_(model, Prune(sparsity=0.5, pattern="2:4"))
    assert shares.keys() == {"first", "second", "head"}
    for name, share in shares.items():
        kept = (model.get_submodule(name).weight != 0).unflatten(1, (-1, 4)).sum(-1)
        assert share == 0.5 and (kept == 2).all()


def test_bad_choices():
    for how, message in [
        ({"threshold": 0.1, "importance": "obs"}, "needs a sparsity"),
        ({"sparsity": 0.5, "importance": "wanda", "scope": "model"}, "not 'model'"),
        ({"sparsity": 0.6, "pattern": "2:4"}, "has sparsity 0.5, got 0.6"),
        ({"sparsity": 0.6, "importance": "luck"}, "importance: expected one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            Prune(**how)
    with pytest.raises(ValueError, match="calibrated on example inputs"):
        engine.compress_(Mlp(), Recipe(prune=Prune(sparsity=0.5, importance="obs"), guard="none"))
    with pytest.raises(ValueError, match="weight_clip: expected one of"):
        Quantize(weight_clip="hard")
