"""distill: the pattern stays, training helps, a resume ends in the same bits, and a failure changes nothing."""

import copy
import datetime
import functools
import json

import pytest
import torch
from models import ConvNet, TinyLm, assert_unchanged, state_of
from torch import nn

import engine
from engine import Prune, Quantize, Recipe
from engine.compress.trainable import TrainableLinear, trainable
from engine.formats import Bitmap, Csr, DenseInt8
from engine.nn import CompressedConv2d, CompressedEmbedding, CompressedLinear

HOW = {"guard": "none"}
BOTH = Recipe(Prune(sparsity=0.7), Quantize(), **HOW)


def small():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.LayerNorm(48), nn.Linear(48, 12)).eval()
    return model, [torch.randn(24, 32) for _ in range(5)]


def error(model, teacher, batches):
    with torch.no_grad():
        return sum((model(x) - teacher(x)).square().mean().item() for x in batches)


@pytest.mark.parametrize(
    "recipe",
    [
        BOTH,
        Recipe(Prune(sparsity=0.7), **HOW),
        Recipe(Prune(sparsity=0.5, pattern="2:4", importance="wanda"), Quantize("static"), **HOW),
        Recipe(None, Quantize("static", input_scale="percentile"), **HOW),
        Recipe(None, Quantize("none"), **HOW),
        Recipe(Prune(sparsity=0.5), Quantize("static", smooth=0.5), **HOW),
        Recipe(Prune(sparsity=0.6, importance="obs"), Quantize(), **HOW),
    ],
)
def test_trains_the_compressed_model_itself(recipe):
    teacher, batches = small()
    student, at_once = copy.deepcopy(teacher), copy.deepcopy(teacher)
    engine.compress_(at_once, recipe, batches[0])
    done = engine.distill(
        student, teacher, batches, steps=40, recipe=recipe, learning_rate=5e-3 if recipe.prune else 1e-4
    )
    assert len(done.losses) == 40 and all(isinstance(student[i], CompressedLinear) for i in (0, 3))
    for i in (0, 3):
        assert student[i].format.label == at_once[i].format.label
        if recipe.prune is not None:  # the same places, and obs's own
            places = "metadata" if recipe.prune.pattern == "2:4" else "bitmask"
            assert torch.equal(getattr(student[i], places), getattr(at_once[i], places))
            assert done.sparsity[str(i)] == pytest.approx(student[i].format.sparsity, abs=1e-6)
    assert error(student, teacher, batches) < (0.8 if recipe.prune else 1.05) * error(at_once, teacher, batches)
    assert type(student[2]) is nn.LayerNorm


def test_what_trains_is_what_comes_out():
    """The layer in training and the compressed one give the same, but for the order of float sums."""
    linear, x = nn.Linear(40, 30), torch.randn(9, 40)
    for format in (
        Bitmap.from_dense(linear.weight, 0.08, torch.int8),
        Bitmap.from_dense(linear.weight, 0.08),
        Csr.from_dense(linear.weight, 0.08),
        DenseInt8.from_dense(linear.weight),
        DenseInt8.from_dense(linear.weight, "static", 0.03),
        DenseInt8.from_dense(linear.weight, "none"),
        Bitmap.from_dense(linear.weight, 0.08, torch.int8, 0.03),
        Bitmap.from_dense(linear.weight, 0.08, torch.int8, torch.linspace(0.02, 0.05, 40)),
        DenseInt8.from_dense(linear.weight, "static", torch.linspace(0.02, 0.05, 40)),
    ):
        compressed = CompressedLinear(format, linear.bias)
        trainable = TrainableLinear(compressed)
        torch.testing.assert_close(trainable(x), compressed(x), rtol=1e-5, atol=1e-5)
        again = trainable.compressed()
        for name in format.TENSORS:
            mine, theirs = getattr(again.format, name), getattr(format, name)
            same = mine is theirs if mine is None else torch.allclose(mine.float(), theirs.float(), rtol=1e-6)
            assert same, name


def test_a_convolution_that_trains_is_what_comes_out():
    dense, x = nn.Conv2d(5, 8, 3, stride=2, padding=1), torch.randn(2, 5, 9, 7)
    for format_type, how in (
        (Bitmap, {"threshold": 0.08, "values": torch.int8}),
        (DenseInt8, {}),
        (Csr, {"threshold": 0.08}),
    ):
        compressed = CompressedConv2d.from_dense(dense, format_type, **how)
        layer = trainable(compressed)
        torch.testing.assert_close(layer(x), compressed(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer(x[0]), compressed(x[0]), rtol=1e-5, atol=1e-5)
        for order in (torch.contiguous_format, torch.channels_last):  # as of nn.Conv2d: models take views
            assert layer(x.contiguous(memory_format=order)).is_contiguous(memory_format=order)
        again = layer.compressed()
        assert repr(again) == repr(compressed) and torch.allclose(again.weight, compressed.weight)


@pytest.mark.parametrize("gradual", [0, 15])
def test_convolutions_are_trained(gradual):
    torch.manual_seed(3)
    teacher, batches = ConvNet().eval(), [torch.randn(4, 3, 11, 11) for _ in range(3)]
    student, at_once = copy.deepcopy(teacher), copy.deepcopy(teacher)
    engine.compress_(at_once, BOTH)
    done = engine.distill(
        student, teacher, batches, steps=30, recipe=BOTH, learning_rate=5e-3, gradual=gradual, progress=False
    )
    assert set(done.sparsity) == {"stem", "wide", "point", "head"}
    assert type(student.wide) is CompressedConv2d and type(student.grouped) is nn.Conv2d
    assert student.wide.format.label == "bitmap int8" and student.wide.format.sparsity == pytest.approx(0.7, abs=1e-3)
    assert error(student, teacher, batches) < 0.8 * error(at_once, teacher, batches)
    trained = error(student, teacher, batches)
    engine.distill(student, teacher, batches, steps=10, learning_rate=1e-3, progress=False)
    assert error(student, teacher, batches) < 1.05 * trained


def test_kept_places_are_kept_even_at_zero():
    compressed = CompressedLinear(Bitmap.from_dense(torch.randn(6, 20), 0.5, torch.int8))
    trainable = TrainableLinear(compressed)
    with torch.no_grad():
        trainable.weight.zero_()
    assert torch.equal(trainable.compressed().bitmask, compressed.bitmask)


def test_a_compressed_student_trains_on():
    teacher, batches = small()
    student = copy.deepcopy(teacher)
    engine.compress_(student, BOTH)
    masks = [student[i].bitmask.clone() for i in (0, 3)]
    before = error(student, teacher, batches)
    engine.distill(student, teacher, batches, steps=40, learning_rate=3e-3, match_hidden=["2"])
    assert error(student, teacher, batches) < before
    assert all(torch.equal(student[i].bitmask, mask) for i, mask in zip((0, 3), masks, strict=True))


def test_gradual_pruning_ends_at_the_recipe():
    teacher, batches = small()
    for gradual in (20, 30):
        student = copy.deepcopy(teacher)
        done = engine.distill(student, teacher, batches, steps=30, recipe=BOTH, gradual=gradual)
        assert all(share == pytest.approx(0.7, abs=0.01) for share in done.sparsity.values())


@pytest.mark.parametrize("gradual", [0, 10])
def test_a_recipe_for_each_layer(gradual):
    teacher, batches = small()
    student, at_once = copy.deepcopy(teacher), copy.deepcopy(teacher)
    recipes = {
        "3": Recipe(Prune(sparsity=0.5), Quantize(), **HOW),
        "0": Recipe(Prune(sparsity=0.8, importance="magnitude" if gradual else "obs"), **HOW),
    }
    engine.compress_(at_once, recipes, batches[0])
    done = engine.distill(student, teacher, batches, steps=20, recipe=recipes, gradual=gradual, learning_rate=3e-3)
    assert [student[i].format.label for i in (0, 3)] == ["bitmap float32", "bitmap int8"]
    assert done.sparsity == pytest.approx({"0": 0.8, "3": 0.5}, abs=0.01)
    if not gradual:
        assert all(torch.equal(student[i].bitmask, at_once[i].bitmask) for i in (0, 3))
    only = copy.deepcopy(teacher)
    engine.distill(only, teacher, batches, steps=2, recipe={"3": recipes["3"]})
    assert type(only[0]) is nn.Linear and isinstance(only[3], CompressedLinear)


def test_the_task_alone_without_a_teacher():
    x = torch.randn(200, 16)
    target = (x @ torch.randn(16, 4)).argmax(-1)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    batches = [(x[i : i + 50],) for i in range(0, 200, 50)]
    answers = {id(b): target[i * 50 : i * 50 + 50] for i, b in enumerate(batches)}
    done = engine.distill(
        model,
        None,
        batches,
        steps=100,
        recipe=Recipe(Prune(sparsity=0.5), Quantize(), **HOW),
        learning_rate=2e-2,
        loss=lambda output, batch: nn.functional.cross_entropy(output, answers[id(batch)]),
    )
    assert done.losses[-1] < 0.5 * done.losses[0]
    assert (model(x).argmax(-1) == target).float().mean() > 0.8


def test_embeddings_and_their_ties_are_quantised_at_once():
    teacher = TinyLm().eval()
    student, tokens = copy.deepcopy(teacher), [torch.randint(0, 100, (2, 7)) for _ in range(3)]
    engine.distill(student, teacher, tokens, steps=3, recipe=BOTH, loss="kl", temperature=2.0)
    assert isinstance(student.embed, CompressedEmbedding) and student.embed.values is student.lm_head.values
    assert student.block[0].format.label == "bitmap int8"
    engine.distill(student, teacher, tokens, steps=2, loss="kl")
    assert student.embed.values is student.lm_head.values


class Stop(Exception):
    pass


class Shuffled:
    """Batches drawn anew at every epoch by torch's generator."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter([self.batches[i] for i in torch.randperm(len(self.batches))])


@pytest.mark.parametrize("how", [{}, {"gradual": 10}, {"accumulate": 2, "dtype": torch.bfloat16}])
def test_a_resume_ends_in_the_same_bits(tmp_path, how):
    teacher, batches = small()
    start = nn.Sequential(*teacher, nn.Dropout(0.2)).train()
    how = {"steps": 17, "recipe": BOTH, "checkpoint_every": 4, **how}

    def train(student, stop_after=None, checkpoint=None):
        torch.manual_seed(11)
        data = Shuffled(batches)
        if stop_after is not None:
            step = torch.optim.AdamW.step
            calls = [0]

            class Dying(torch.optim.AdamW):
                def step(self):
                    calls[0] += 1
                    if calls[0] > stop_after:
                        raise Stop
                    return step(self)

            Dying.__name__ = "AdamW"
            return engine.distill(
                student, teacher, data, optimizer=lambda p: Dying(p, 1e-3), checkpoint=checkpoint, **how
            )
        return engine.distill(
            student, teacher, data, optimizer=lambda p: torch.optim.AdamW(p, 1e-3), checkpoint=checkpoint, **how
        )

    whole, broken = copy.deepcopy(start), copy.deepcopy(start)
    done = train(whole)
    file = tmp_path / "train.pt"
    with pytest.raises(Stop):
        train(broken, 10, file)
    broken = copy.deepcopy(start)
    torch.manual_seed(99)
    resumed = train(broken, None, file)
    assert resumed.resumed_from == 8 and resumed.losses == done.losses
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, broken.state_dict()[name]), name
    with pytest.raises(ValueError, match="is of another run"):
        engine.distill(copy.deepcopy(start), teacher, batches, checkpoint=file, steps=18, recipe=BOTH)
    other = copy.deepcopy(start)
    other[0].weight.data[0, 0] += 1
    for differing in ({"student": other}, {"teacher": other}, {"loss": "kl"}):
        given = {"student": copy.deepcopy(start), "teacher": teacher, "loss": "mse", **differing}
        with pytest.raises(ValueError, match="is of another run"):
            engine.distill(batches=batches, checkpoint=file, **given, **how)
    for damaged in (file.read_bytes()[:500], b"", b"not a pickle, and no archive either"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="is no checkpoint of a distillation"):
            train(copy.deepcopy(start), None, file)


@pytest.mark.parametrize("shared", ["all", "a layer"])
def test_a_student_that_is_the_teacher_is_refused(shared):
    teacher, batches = small()
    student = teacher
    if shared == "a layer":
        student = copy.deepcopy(teacher)
        student[0] = teacher[0]
    before = state_of(student)
    with pytest.raises(ValueError, match="shares parameters with the teacher"):
        engine.distill(student, teacher, batches, steps=2, recipe=BOTH)
    assert_unchanged(student, before)


def test_clipped_weights_are_refused():
    teacher, batches = small()
    recipe = engine.Recipe(quantize=engine.Quantize(weight_clip="least_squares"), guard="none")
    with pytest.raises(ValueError, match="weight_clip"):
        engine.distill(copy.deepcopy(teacher), teacher, batches, steps=2, recipe=recipe)


def test_a_loss_that_is_no_number_stops(tmp_path):
    teacher, batches = small()
    student = copy.deepcopy(teacher).train()
    before = state_of(student)
    file = tmp_path / "good.pt"
    calls = [0]

    def loss(output, target, batch):
        calls[0] += 1
        return (output - target).square().mean() * (torch.nan if calls[0] == 8 else 1.0)

    with pytest.raises(
        FloatingPointError, match=r"step 8: the loss is nan; the last good checkpoint: .*good.pt, of step 6"
    ):
        engine.distill(student, teacher, batches, steps=20, recipe=BOTH, loss=loss, checkpoint=file, checkpoint_every=3)
    assert_unchanged(student, before)
    assert len(torch.load(file, weights_only=True)["losses"]) == 6
    done = engine.distill(
        student, teacher, batches, steps=20, recipe=BOTH, loss=loss, checkpoint=file, checkpoint_every=3
    )
    assert done.resumed_from == 6


@pytest.mark.parametrize("loss", ["mse", lambda output, target, batch: (output - target).square().mean()])
def test_a_teacher_is_asked_once_for_each_batch_that_is_kept(loss):
    """With room for three of five batches the teacher runs twice in each later epoch, and training is the same."""
    teacher, batches = small()
    room = 3 * 24 * (12 + 48) * 4  # what it says of a batch, and its LayerNorm's output
    calls = [0]
    teacher.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    runs = []
    for cache in (0, room, 2 * room):
        student = copy.deepcopy(teacher)
        calls[0] = 0
        how = {"loss": loss, "match_hidden": ["2"], "teacher_cache": cache, "progress": False}
        torch.manual_seed(5)
        done = engine.distill(student, teacher, Shuffled(batches), steps=20, recipe=BOTH, **how)
        runs.append((calls[0], done.losses, student.state_dict()))
    students = 20  # the copies carry the hook, and run once a step
    assert [run[0] - students for run in runs] == [20, 5 + 3 * 2, 5]
    for _, losses, state in runs[1:]:
        assert losses == runs[0][1]
        assert all(torch.equal(tensor, runs[0][2][name]) for name, tensor in state.items())


def test_padding_is_left_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x, attention_mask):
            return {"last_hidden_state": self.inner(x)}

    teacher = Model().eval()
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    losses = []
    for filler in (0.0, 1.0):
        x[0, 3:] = filler
        student = copy.deepcopy(teacher)
        batch = {"x": x.clone(), "attention_mask": mask}
        losses.append(
            engine.distill(student, teacher, [batch], steps=1, recipe=BOTH, match_hidden={"inner": "inner"}).losses
        )
    assert losses[0] == losses[1]


def test_bad_arguments(tmp_path):
    teacher, batches = small()
    for how, message in [
        ({"recipe": None}, "give a recipe for a dense student"),
        ({"steps": 0}, "at least 1"),
        ({"dtype": torch.float16}, "expected None or torch.bfloat16"),
        ({"loss": "l1"}, "expected 'mse', 'kl' or a callable"),
        ({"temperature": 0.0}, "temperature: expected a number above 0"),
        ({"match_hidden": ["nowhere"]}, "match_hidden: .*nowhere"),
        ({"teacher_cache": -1}, "teacher_cache: expected bytes"),
        ({"gradual": 99}, "gradual: expected 0 to steps"),
        ({"gradual": 2, "recipe": Recipe(None, Quantize(), **HOW)}, "needs a recipe with an unstructured sparsity"),
        ({"recipe": {}}, "names no layer"),
        ({"recipe": {"nowhere": BOTH}}, "nowhere"),
        ({"gradual": 2, "recipe": {"0": BOTH, "3": Recipe(Prune(threshold=0.1), **HOW)}}, "an unstructured sparsity"),
        ({"batches": []}, "gave none"),
        ({"batches": iter(batches[:2]), "steps": 5}, "ran out"),
    ]:
        student = copy.deepcopy(teacher)
        before = state_of(student)
        arguments = {"batches": batches, "steps": 5, "recipe": BOTH, **how}
        with pytest.raises(ValueError, match=message):
            engine.distill(student, teacher, **arguments)
        assert_unchanged(student, before)
    with pytest.raises(TypeError, match=r"distill: recipe: expected engine\.Recipe, got str"):
        engine.distill(copy.deepcopy(teacher), teacher, batches, steps=1, recipe={"0": "int8"})
    with pytest.raises(ValueError, match="as there is no teacher"):
        engine.distill(copy.deepcopy(teacher), None, batches, steps=1, recipe=BOTH)


def test_saving_what_was_done(tmp_path):
    teacher, batches = small()
    done = engine.distill(copy.deepcopy(teacher), teacher, batches, steps=4, recipe=BOTH, progress=False)
    done.save(tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())["losses"] == done.losses
    done.save(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"\.json or \.png"):
        done.save(tmp_path / "run.txt")


def _train_in_parallel(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    teacher, batches = small()
    student = copy.deepcopy(teacher)
    engine.distill(
        student,
        teacher,
        batches[rank::world],
        steps=6,
        recipe=BOTH,
        accumulate=2,
        wrap=nn.parallel.DistributedDataParallel,
        checkpoint=f"{folder}/train.pt",
    )
    torch.save(student.state_dict(), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def _train_apart(rank, world, folder):
    """Each rank is a group of its own, and trains for longer than the one before."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=20)
    )
    groups = [torch.distributed.new_group([i]) for i in range(world)]
    teacher, batches = small()
    wrap = functools.partial(nn.parallel.DistributedDataParallel, process_group=groups[rank])
    engine.distill(copy.deepcopy(teacher), teacher, batches, steps=2 + 2 * rank, recipe=BOTH, wrap=wrap)
    torch.distributed.destroy_process_group()


def test_inside_ddp_of_a_subgroup(tmp_path):
    torch.multiprocessing.spawn(_train_apart, (2, str(tmp_path)), 2)


def test_inside_ddp(tmp_path):
    torch.multiprocessing.spawn(_train_in_parallel, (2, str(tmp_path)), 2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "train.pt").exists() and (tmp_path / "train.pt.rank1").exists()
