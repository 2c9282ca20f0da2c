"""P4: coarse first and refined later equals the one-shot pass; nothing is paid twice.

Several steps, against a slow reference: `tests/graph/test_random_networks.py`.
"""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparse_seg import build_model
from sparse_seg.masks import ConfidencePolicy, top_blocks
from sparse_seg.run import refinement
from sparse_seg.run.passes import Pass
from sparse_seg.run.way import Way
from sparse_seg.sites.level import Level
from tests.reference import NUM_CLASSES, block_mask, random_model, randomise, relative_error
from tests.run.test_levels import block_levels, random_images

STRIDES = [(8, 16), (8, 16, 32), (4, 8, 16)]
CONFIGS = [pytest.param("resnet18", "lite", marks=pytest.mark.slow), ("resnet50", "deeplabv3")]


def rising_levels(images: Tensor, strides: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Levels of two steps: some blocks refined once, some twice, some in the second step only."""
    top = len(strides) - 1
    first, second = (block_levels("random", images, strides[-1], seed + i).clamp_max(top) for i in (0, 1))
    first[torch.rand(first.shape, generator=torch.Generator().manual_seed(seed)) < 0.5] = 0
    return [first, first.maximum(second)]


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("strides", STRIDES, ids=str)
@pytest.mark.parametrize(("backbone", "head"), CONFIGS)
def test_one_step_is_the_one_shot_pass(
    backbone: str, head: str, strides: tuple[int, ...], fast: bool
) -> None:
    for dtype, size, tolerance in ((torch.float64, (33, 47), 1e-12), (torch.float32, (70, 101), 1e-5)):
        model = random_model(backbone, head, dtype=dtype, strides=strides)
        images = random_images(size).to(dtype)
        levels = rising_levels(images, strides)[1]
        everywhere = torch.full_like(levels, len(strides) - 1)
        run = (model.for_inference() if fast else model).start(images).start_coarse()
        assert relative_error(run.logits(), model.dense(images, strides[-1])) < tolerance, "the coarse one"
        run.take(levels)
        with torch.no_grad():
            expected = model(images, levels)
        assert relative_error(run.logits(), expected) < tolerance
        assert run.levels.equal(levels)
        assert relative_error(run.take(levels).logits(), expected) < tolerance, "a step without new sites"
        run = (model.for_inference() if fast else model).start(images).start_coarse()
        run.take(torch.zeros_like(levels)).take(everywhere)
        assert relative_error(run.logits(), model.dense(images, strides[0])) < tolerance


def kept_bytes(run: Pass) -> int:
    assert run.memory is not None
    return run.memory


@torch.no_grad()
def test_half_precision_storage() -> None:
    model, images = random_model("resnet50", "deeplabv3"), random_images((65, 97)).float()
    levels = rising_levels(images, (8, 16))[0]
    exact, half = model.start(images).start_coarse(), model.start(images).start_coarse(torch.float16)
    whole = 4 * 2 * (256 + 3 * 16 + NUM_CLASSES * 5 * 7)  # pooled vectors and logits are kept as they are
    assert kept_bytes(half) - whole == (kept_bytes(exact) - whole) / 2
    for run in (exact, half):
        run.take(levels)
    assert half.grid_logits().dtype == torch.float32
    assert 1e-6 < relative_error(half.logits(), exact.logits()) < 1e-2


@torch.no_grad()
def test_memory_counts_shared_rows_once() -> None:
    """Kept are what each 3x3 convolution, the shortcuts and the head read, ASPP's three once; what its
    projection reads, which a new mean changes everywhere; the pooled vectors; and the logits."""
    model, images = random_model("resnet50", "deeplabv3"), random_images((64, 96)).float()
    run = model.start(images).start_coarse()
    eighth, coarse = 2 * 8 * 12, 2 * 4 * 6
    stage3 = [eighth * 32, eighth * 64, coarse * 32]  # first 3x3, shortcut, one more 3x3
    stage4 = [coarse * 64] * 2  # its sites are layer3's: no shortcut strides
    head = [coarse * 256, *[coarse * 16] * 4, 2 * (256 + 3 * 16), coarse * NUM_CLASSES]
    assert kept_bytes(run) == 4 * sum(stage3 + stage4 + head)


@pytest.mark.slow
@pytest.mark.parametrize("strides", STRIDES, ids=str)
@torch.no_grad()
def test_multiply_adds(strides: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """On rows the steps together cost what one shot costs. The head after densify runs once a result,
    at the coarse stride for the first: with it, coarse pass and one step cost what one shot costs, to 1%."""
    torch.manual_seed(0)
    config = {"backbone": "resnet50", "head": "deeplabv3", "width": 0.25, "head_channels": 64}
    config["aspp_rates"] = [4, 8, 12]  # each tap reads inside the images somewhere: else it is not computed
    # folded: the pooled vector is added behind the projection, so that this is kept, too
    model = build_model(config | {"strides": list(strides)}).eval().for_inference()
    images = torch.randn(1, 3, 128, 256)
    steps = [block_levels(kind, images, strides[-1]) for kind in ("coarse", "one", "random")]
    steps = [levels.clamp_max(len(strides) - 1) for levels in itertools.accumulate(steps, torch.maximum)]

    def split(counts: dict[str, int]) -> dict[str, int]:
        return {"grid": counts["late"], "rows": counts["early"] + counts["rows"]}

    interpolate, interpolated = Level.ghosts, list[int]()

    def interpolating(*arguments: Any) -> Tensor:
        with FlopCounterMode(display=False) as counter:
            result = interpolate(*arguments)
        interpolated.append(counter.get_total_flops())
        return result

    monkeypatch.setattr(Level, "ghosts", interpolating)

    def counts(levels: list[Tensor]) -> dict[str, int]:
        interpolated.clear()
        with FlopCounterMode(display=False) as counter:
            run = model.start(images).start_coarse()
            for step in levels:
                run.take(step).grid_logits()
        found = split(run.macs())
        done = counter.get_total_flops() - sum(interpolated)
        assert 2 * sum(found.values()) == done, "what the pass says is what it does"
        return found

    once = split(model.start(images).take(steps[-1]).macs())
    pooled = 64 * 64 + 1024 // 2 * 64  # per further result: the pooled vector's own layers
    for levels in (steps[-1:], steps):
        found = counts(levels)
        assert 0 <= found["rows"] - once["rows"] <= len(levels) * pooled
    coarse = split(model.start(images).follow(Way.dense(strides[-1])).macs())["grid"]
    assert found["grid"] == coarse + 3 * once["grid"]
    assert sum(counts(steps[-1:]).values()) == pytest.approx(sum(once.values()), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("strides", STRIDES, ids=str)
@torch.no_grad()
def test_refine_by_fractions(strides: tuple[int, ...], fast: bool) -> None:
    """A result per fraction: first the coarse network, then growing masks of one ranking."""
    mask = {"policy": "confidence", "fine_fraction": 0.4, "middle_fraction": 0.3}
    model = copy.deepcopy(random_model(strides=strides))
    model.policy = build_model({"width": 0.125, "strides": list(strides), "mask": mask}).policy
    images = random_images((96, 130)).float()
    run = model.start(images).start_coarse()
    assert isinstance(model.policy, ConfidencePolicy)
    scores = model.policy.scores(run)
    results = list((model.for_inference() if fast else model).refine(images, fractions=[0, 0.1, 0.4]))
    assert relative_error(results[0], model.dense(images, strides[-1])) < 1e-5
    for fraction, logits in zip((0.1, 0.4), results[1:], strict=True):
        run.take(top_blocks(scores, fraction, model.policy.middle_fraction))
        assert relative_error(logits, run.logits()) < 1e-5
    assert relative_error(next(model.refine(images, fractions=[0.4])), model(images)) < 1e-5
    run = model.start(images).follow()
    logits, chosen = run.logits(), run.mask
    assert chosen is not None
    assert torch.equal(chosen, model.policy.cut(scores))
    assert relative_error(logits, model(images, chosen)) < 1e-5


def test_refine_takes_any_model_in_eval_mode() -> None:
    model, images = random_model(), torch.zeros(1, 3, 64, 64)
    for fractions in ([0, 0.5], torch.tensor([0, 0.5]), iter([0, 0.5])):
        assert len(list(model.refine(images, fractions))) == 2, "an edge policy ranks nothing here"
    for wrong, message in (
        ({}, "either fractions or milliseconds"),
        ({"fractions": [0.1], "milliseconds": 3}, "either fractions or milliseconds"),
        ({"fractions": [0.2, 0.1]}, "fractions must rise"),
        ({"fractions": []}, r"must rise, and be one or more, not \[\]"),
        ({"fractions": 0.2}, "must be a list of numbers in 0..1, not 0.2"),
        ({"fractions": ["edge"]}, r"must be a list of numbers in 0..1, not \['edge'\]"),
        ({"fractions": [0.2, 1.1]}, "lie in 0..1, not 1.1"),
        ({"milliseconds": float("inf")}, "must be a finite number, not inf"),
        ({"milliseconds": "5"}, "must be a finite number, not '5'"),
    ):
        with pytest.raises(ValueError, match=message):
            next(model.refine(images, **wrong))
    with pytest.raises(ValueError, match=r"call model\.eval\(\) before refining"):
        next(build_model({"width": 0.125}).train().refine(images, fractions=[0]))
    run = model.start(images).start_coarse()
    run.take(torch.ones(1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="can only refine"):
        run.take(torch.zeros(1, 4, 4, dtype=torch.bool))


class FakeClock:
    """The coarse pass takes 100 ms, a step 10 ms and 1 ms a block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.steps = 5.0, list[int]()
        self._take, self._start = Pass.take, Pass.start_coarse
        monkeypatch.setattr(refinement, "now", lambda device: self.seconds)
        monkeypatch.setattr(Pass, "start_coarse", lambda run, *arguments: self.start(run, *arguments))
        monkeypatch.setattr(Pass, "take", lambda run, levels: self.take(run, levels))

    def start(self, run: Pass, *arguments: Any) -> Pass:
        self.seconds += 0.1
        return self._start(run, *arguments)

    def take(self, run: Pass, levels: Tensor) -> Pass:
        self.steps.append(int((levels > run.levels).sum()))
        self.seconds += 0.01 + 0.001 * self.steps[-1]
        return self._take(run, levels)


@pytest.mark.parametrize("milliseconds", [0, 50, 120, 150, 200, 400, 1000])
def test_refine_within_a_time_budget(milliseconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coarse result comes whatever the budget; steps grow, fill the budget and keep within it."""
    model, images = random_model(), random_images((160, 320)).float()  # 200 blocks
    clock = FakeClock(monkeypatch)
    count = sum(1 for _ in model.refine(images[:1], milliseconds=milliseconds))
    took = round(1000 * (clock.seconds - 5.0))
    assert count == 1 + len(clock.steps)
    assert took <= max(milliseconds, 100)
    assert all(second <= 2 * first for first, second in itertools.pairwise(clock.steps))
    if milliseconds == 1000:
        assert sum(clock.steps) == 200, "all blocks, then it ends"
    elif milliseconds >= 150:
        assert took > 0.8 * milliseconds, "time was left"


@pytest.mark.parametrize("uncertainty", ["margin", "entropy", "boundary"])
@pytest.mark.parametrize("size", [(64, 96), (33, 50)], ids=str)
@torch.no_grad()
def test_scores(size: tuple[int, int], uncertainty: str) -> None:
    """Against loops over blocks and the full-size logits' pixels in the middle of 4x4."""
    model, images = random_model(), random_images(size).float()
    run = model.start(images).start_coarse()
    height, width = size
    ys, xs = ([min(4 * i + 2, length - 1) for i in range(-(-length // 4))] for length in size)
    probabilities = model.dense(images, 16).softmax(1)[:, :, ys][:, :, :, xs]
    ordered = probabilities.sort(1).values
    values = 1 - (ordered[:, -1] - ordered[:, -2])
    if uncertainty == "entropy":
        values = -(probabilities * probabilities.log()).sum(1) / torch.tensor(5.0).log()
    elif uncertainty == "boundary":
        classes = probabilities.argmax(1)
        padded = torch.nn.functional.pad(classes.float()[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
        values = torch.zeros_like(values)
        for dy, dx in ((0, 1), (2, 1), (1, 0), (1, 2)):
            moved = padded[:, dy : dy + len(ys), dx : dx + len(xs)]
            values = values.maximum((moved != classes).float())
    for reduce in ("max", "mean"):
        blocks = torch.zeros(2, -(-height // 16), -(-width // 16))
        around = torch.zeros_like(blocks)
        for b, y, x in itertools.product(*map(range, blocks.shape)):
            inside = values[b, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
            blocks[b, y, x] = inside.max() if reduce == "max" else inside.mean()
        for b, y, x in itertools.product(*map(range, blocks.shape)):
            around[b, y, x] = blocks[b, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].max()
        for neighbours, expected in ((False, blocks), (True, around)):
            policy = ConfidencePolicy(0.1, uncertainty=uncertainty, reduce=reduce, neighbours=neighbours)
            assert torch.allclose(policy.scores(run), expected, atol=1e-5), (reduce, neighbours)


def test_training_under_a_confidence_mask() -> None:
    """The mask comes from a pass in eval mode that leaves statistics and modes alone; gradients flow."""
    torch.manual_seed(0)
    model = build_model({"width": 0.125, "num_classes": 5, "mask": {"policy": "confidence"}})
    randomise(model)
    model.train()
    model.module.backbone.conv1.eval()
    images = random_images((64, 96)).float()
    expected = copy.deepcopy(model).eval().start(images).follow().mask
    reference = copy.deepcopy(model)
    torch.manual_seed(1)  # dropout
    run = model.start(images).follow()
    logits, chosen = run.logits(), run.mask
    assert chosen is not None
    assert expected is not None
    assert torch.equal(chosen, expected)
    assert not model.module.backbone.conv1.training
    assert model.module.head.training
    logits.sum().backward()
    torch.manual_seed(1)
    reference(images, chosen).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or (theirs.grad is not None and torch.allclose(ours.grad, theirs.grad)), name
    for buffer, other in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(buffer, other)


@torch.no_grad()
def test_masks_may_lie_on_the_cpu(device: str) -> None:
    model = build_model({"backbone": "resnet18", "width": 0.125, "num_classes": 5}).eval().to(device)
    mask = block_mask("random", (1, 4, 6))
    run = model.start(torch.randn(1, 3, 64, 96, device=device)).start_coarse()
    once = run.take(mask).logits()
    assert run.mask is not None
    assert run.mask.device == once.device
    again = run.take(mask | block_mask("full", (1, 4, 6))).logits()
    assert again.shape == once.shape


@torch.no_grad()
@pytest.mark.parametrize("merge", ["whole", "patch"])
def test_a_pass_keeps_what_is_chosen(merge: str) -> None:
    """The coarse logits do not take its place, nor does the caller's mask when it is used anew."""
    model, images = random_model(), random_images((64, 96)).float()
    way, mask = Way(merge=merge), torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[:, :2] = True
    kept = mask.clone()
    run, coarse = model.start(images), model.dense(images, 16)
    for choose, expected in (
        (lambda: run.follow(Way.dense(8)), model.dense(images, 8)),
        (lambda: run.take(mask, way), model.start(images).take(kept, way).logits()),
        (lambda: run.follow(Way.dense(8)), model.dense(images, 8)),
        (lambda: run.follow(way), model.start(images).follow(way).logits()),
    ):
        choose()
        assert relative_error(run.coarse_logits(), coarse) < 1e-5
        assert relative_error(run.logits(), expected) < 1e-5
    run = model.start(images).start_coarse().take(mask, way)
    mask.copy_(~mask)
    assert torch.equal(run.levels, kept.long())
    with pytest.raises(ValueError, match="a step can only refine"):
        run.take(mask, way)
