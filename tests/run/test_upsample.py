"""The last upsampling: the trained network's offset at any stride."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_seg import build_model
from sparse_seg.ops.upsample import upsample_classes, upsample_logits
from sparse_seg.run.exits import auxiliary_logits
from sparse_seg.run.way import Way

LENGTHS = st.integers(32, 200)
STRIDES = st.sampled_from([(8, 8), (16, 8), (8, 16), (32, 16), (4, 32)])


@settings(max_examples=40)
@given(size=st.tuples(LENGTHS, LENGTHS), strides=STRIDES, align_corners=st.booleans(), smooth=st.booleans())
def test_places_are_those_of_the_trained_grid_and_classes_those_of_the_logits(
    size: tuple[int, int], strides: tuple[int, int], align_corners: bool, smooth: bool
) -> None:
    """As `F.grid_sample` reads there: pixel q reads q * (n - 1) / (H - 1) of the n trained cells, or
    (q + 1/2) * n / H - 1/2; and at every fourth pixel the one in the middle of 4x4. Classes in large areas of
    one class as well as in noise; in float64 no two logits of a pixel are equal."""
    (stride, trained_stride), rule = strides, (size, *strides, align_corners)
    torch.manual_seed(0)
    logits = torch.randn(2, 5, -(-size[0] // stride), -(-size[1] // stride), dtype=torch.float64)
    if smooth:
        logits = F.avg_pool2d(F.pad(logits, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    places = []
    for length, cells in zip(size, logits.shape[2:], strict=True):
        trained, pixel = -(-length // trained_stride), torch.arange(length, dtype=torch.float64)
        aligned, centred = pixel * (trained - 1) / (length - 1), (pixel + 0.5) * trained / length - 0.5
        place = (aligned if align_corners else centred) * trained_stride / stride
        places.append(place.clamp(0, cells - 1) / max(cells - 1, 1) * 2 - 1)
    y, x = torch.meshgrid(*places, indexing="ij")
    grid = torch.stack((x, y), -1).expand(2, -1, -1, -1)
    expected = F.grid_sample(logits, grid, align_corners=True)
    found = upsample_logits(logits, *rule)
    assert torch.allclose(found, expected)
    assert torch.allclose(upsample_logits(logits.float(), *rule), expected.float(), atol=1e-5)
    ys, xs = ([min(4 * i + 2, length - 1) for i in range(-(-length // 4))] for length in size)
    assert torch.allclose(upsample_logits(logits, *rule, every=4), expected[:, :, ys][:, :, :, xs])
    classes = found.argmax(1)
    for layout in (logits, logits.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(upsample_classes(layout, *rule), classes)
    assert torch.equal(upsample_classes(logits[:, :1], *rule), torch.zeros_like(classes)), "one class"


def test_logits_stay_float32_under_autocast() -> None:
    model = build_model({"width": 0.125, "auxiliary": True}).train()
    for dtype, output_stride in ((torch.bfloat16, 8), (torch.float16, 16), (torch.bfloat16, 32)):
        with torch.autocast("cpu", dtype):
            run = model.start(torch.randn(2, 3, 64, 64)).follow(Way.dense(output_stride))
            logits, auxiliary = run.logits(), auxiliary_logits(run)
        assert auxiliary is not None
        assert logits.dtype == auxiliary.dtype == torch.float32


def test_classes_at_any_size_a_few_places_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole grid, whose size no stride divides into that of the image."""
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 9, 11, dtype=torch.float64)
    expected = F.interpolate(logits, (47, 101), mode="bilinear").argmax(1)
    for values in (1, 2**12, 2**26):
        monkeypatch.setattr("sparse_seg.ops.upsample.MOST_VALUES", values)
        assert torch.equal(upsample_classes(logits, (47, 101), 1, 1), expected)


def test_classes_in_float32_are_those_of_the_logits_but_where_two_are_equal() -> None:
    torch.manual_seed(0)
    logits = F.avg_pool2d(torch.randn(2, 11, 30, 40), 5, stride=1, padding=2)
    whole = upsample_logits(logits, (237, 317), 8, 8)
    first, second = whole.topk(2, 1).values.unbind(1)
    clear = first - second > 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal(upsample_classes(logits, (237, 317), 8, 8)[clear], whole.argmax(1)[clear])


def test_what_is_kept_from_one_call_serves_the_next() -> None:
    """Tables made under inference mode or on another device serve training on the CPU."""
    size = (203, 211)  # of no other test
    with torch.device("meta"), torch.inference_mode():
        upsample_logits(torch.zeros(1, 2, 13, 14), size, 16, 8)
        upsample_classes(torch.zeros(1, 2, 13, 14, device="cpu"), size, 16, 8)
    logits = torch.randn(1, 2, 13, 14, dtype=torch.float64, requires_grad=True)
    upsample_logits(logits, size, 16, 8).sum().backward()
    assert logits.grad is not None
    assert torch.equal(upsample_classes(logits, size, 16, 8), upsample_logits(logits, size, 16, 8).argmax(1))


@pytest.mark.slow
def test_classify_gives_the_classes_of_every_way_to_run() -> None:
    model = (
        build_model({"width": 0.125, "mask": {"policy": "confidence", "fine_fraction": 0.3}}).double().eval()
    )
    images = torch.randn(2, 3, 100, 132, dtype=torch.float64)
    run = model.start(images).follow()
    classes, fine_blocks = model.classify(images)
    assert torch.equal(classes, run.logits().argmax(1))
    assert fine_blocks is not None
    assert run.mask is not None
    assert torch.equal(fine_blocks, run.mask)
    for output_stride in (8, 16):
        classes, fine_blocks = model.classify(images, output_stride)
        assert torch.equal(classes, model.dense(images, output_stride).argmax(1))
        assert fine_blocks is None
    mask = torch.rand(2, 7, 9) < 0.4
    assert torch.equal(model.classify(images, fine_blocks=mask)[0], model(images, mask).argmax(1))
