"""pix2pix.py: networks, sizes and channels, the measures, drawn facades, other people's pairs."""

import copy
import gzip
import json
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error_of, refused_by, same, weights, write_images, write_pairs
from PIL import Image
from torch import nn

import pix2pix

QUICK = ["--width", "2", "--max-steps", "2", "--device", "cpu", "--out", "run"]


def networks(inputs=3, outputs=3, width=4, depth=5, patch=16, **kinds):
    torch.manual_seed(0)
    generator = pix2pix.Generator(inputs, outputs, width, depth, **kinds)
    return generator, pix2pix.Discriminator(inputs, outputs, width, patch)


def run(*flags):
    pix2pix.main([*QUICK, *map(str, flags)])


def summary(folder="run"):
    return json.loads(Path(folder, "summary.json").read_text())


def load(*flags):
    args = pix2pix.arguments().parse_args(list(map(str, flags)))
    return pix2pix.load_data(args, torch.device("cpu"))


def error(capsys, *flags):
    """The message of a run that must not begin."""
    return refused_by(pix2pix, capsys, *QUICK, *flags)


def save(path, values, mode=None):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values), mode).save(path)


def noise_of(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ------------------------------------------------------------------ networks
def test_networks_are_the_papers():
    """Weights of the authors' layers; norm has a gain and a bias a map."""
    with torch.device("meta"):
        unet, chain = pix2pix.Generator(), pix2pix.Generator(skips=False)
        patches = {patch: pix2pix.Discriminator(patch=patch) for patch in pix2pix.HALVINGS}
    shapes = [tuple(p.shape[:2]) for p in unet.parameters() if p.ndim == 4]
    down = [(64, 3), (128, 64), (256, 128), *[(512, 256)], *[(512, 512)] * 4]
    up = [(512, 512), *[(1024, 512)] * 3, (1024, 256), (512, 128), (256, 64), (128, 3)]
    assert shapes == down + up
    shapes = [tuple(p.shape[:2]) for p in chain.parameters() if p.ndim == 4]
    assert shapes[8:] == [*[(512, 512)] * 4, (512, 256), (256, 128), (128, 64), (64, 3)]
    shapes = {
        k: [tuple(p.shape) for p in d.parameters() if p.ndim == 4] for k, d in patches.items()
    }
    assert shapes[70] == [
        (64, 6, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)
    ]  # fmt: skip
    assert shapes[1] == [(64, 6, 1, 1), (128, 64, 1, 1), (1, 128, 1, 1)]
    norms = [i for i, layer in enumerate(unet.encoder) if isinstance(layer[-1], nn.GroupNorm)]
    assert norms == [1, 2, 3, 4, 5, 6]  # not in the first layer, nor in the bottleneck


@pytest.mark.parametrize("patch", pix2pix.HALVINGS)
def test_score_sees_a_patch(patch):
    """The gradient of one score by its input, through layers without norm, is as wide."""
    _, d = networks(patch=patch)
    for layer in d.layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 0.01)
    plain = nn.Sequential(*(x for x in d.layers if not isinstance(x, nn.GroupNorm)))
    side = 512 if patch == 286 else 128
    x = torch.ones(1, 6, side, side, requires_grad=True)
    scores = plain(x)
    middle = scores.shape[-1] // 2
    scores[0, 0, middle, middle].backward()
    touched = x.grad[0, 0].nonzero()
    assert (touched.amax(dim=0) - touched.amin(dim=0) + 1).tolist() == [patch, patch]


def test_without_the_input_the_score_follows_from_y_alone():
    d = pix2pix.Discriminator(3, 3, 4, 16, sees_input=False)
    x, y = torch.rand(2, 2, 3, 32, 32)
    assert torch.equal(d(x, y), d(-x, y)) and not torch.equal(d(x, y), d(x, -y))
    _, d = networks()
    assert not torch.allclose(d(x, y), d(-x, y))


def test_reflection_continues_a_picture_without_repeating_its_edge():
    row = torch.arange(3.0).view(1, 1, 3)
    assert pix2pix.reflected(row, 1, 11).flatten().tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2]
    assert pix2pix.reflected(row[..., :1], 2, 3).flatten().tolist() == [0] * 6
    assert pix2pix.reflected(row, 1, 2) is row
    x = torch.rand(2, 3, 5, 7)
    assert torch.equal(pix2pix.cut(pix2pix.reflected(x, 16, 8), 5, 7), x)


@pytest.mark.parametrize("size", [(32, 32), (250, 333), (7, 90), (1, 1), (33, 64)])
@pytest.mark.parametrize("channels", [(1, 3), (3, 1)])
def test_any_size_and_channels(size, channels):
    g, _ = networks(*channels)
    (y,) = pix2pix.translate(g, [torch.rand(channels[0], *size)])
    assert y.shape == (channels[1], *size) and y.isfinite().all() and 0 <= y.min() <= y.max() <= 1


# ------------------------------------------------------------------ noise
def test_a_picture_is_translated_alike_alone_and_among_others():
    g, _ = networks()
    small, large = torch.rand(5, 3, 40, 33), torch.rand(2, 3, 64, 64)
    together = pix2pix.translate(g, [*small[:3], *large, *small[3:]], batch=4)
    alone = [pix2pix.translate(g, [x])[0] for x in [*small[:3], *large, *small[3:]]]
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)
    for again in (g.train(), g.eval()):  # no mode changes what comes out
        assert torch.equal(pix2pix.translate(again, [small[0]])[0], alone[0])


def test_noise_follows_from_the_seed_and_can_be_left_out():
    g, _ = networks()
    first, again, other = (
        pix2pix.translate(g, [torch.ones(3, 32, 32)], seed=s)[0] for s in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.allclose(first, other)
    state = torch.get_rng_state()
    plain = pix2pix.translate(g, [torch.ones(3, 32, 32)], noise=False)[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(plain, first)
    masks = g.draw(torch.empty(3, 3, 32, 64))
    assert [tuple(z.shape) for z in masks] == [(3, 32, 2, 4), (3, 16, 4, 8), (3, 8, 8, 16)]
    assert all(set(z.unique().tolist()) == {0, 2} for z in masks)
    assert not torch.equal(masks[0][0], masks[0][1])  # in training each picture has its own


def test_wrong_channels_are_said():
    g, _ = networks(1, 3)
    with pytest.raises(ValueError, match=r"channels \(1,\) are wanted"):
        pix2pix.translate(g, [torch.rand(3, 32, 32)])


# ------------------------------------------------------------------ the training step
@pytest.mark.parametrize("loss", pix2pix.LOSSES)
def test_losses(loss):
    """Against the equations, from the same weights and noise; without D in its loss D stays."""
    data = load("--dataset", "drawn")
    args = pix2pix.arguments().parse_args(["--loss", loss, "--width", "4", "--l1-weight", "10"])
    pix2pix.suit(args, data)
    torch.manual_seed(0)
    model = pix2pix.Model(args, data)
    x, y = model.batch(data, torch.arange(4))
    d_before = [p.clone() for p in model.discriminator.parameters()]
    g_before = [p.clone() for p in model.generator.parameters()]
    before = copy.deepcopy(model.generator)
    torch.manual_seed(1)
    fake = model.generator(x, model.generator.draw(x)).detach()
    real_d, fake_d = (torch.sigmoid(model.discriminator(x, z)) for z in (y, fake))
    loss_d = -(real_d.log().mean() + (1 - fake_d).log().mean()) / 2
    torch.manual_seed(1)
    losses = pix2pix.train_step(model, x, y)
    assert torch.allclose(losses["loss_l1"], (y - fake).abs().mean())
    assert losses.keys() == {"loss_l1", *(("loss_d", "loss_g") if "gan" in loss else ())}
    moved = not any(map(torch.equal, d_before, model.discriminator.parameters()))
    assert moved == ("gan" in loss)
    assert not any(map(torch.equal, g_before, model.generator.parameters()))
    if "gan" in loss:
        assert torch.allclose(losses["loss_d"], loss_d, rtol=1e-5)
        after = torch.sigmoid(model.discriminator(x, fake)).log().mean()  # D has had its step
        assert torch.allclose(losses["loss_g"], -after, rtol=1e-4)
    # G's gradient has the L1 term exactly where the loss names it, and D's as it is after its step
    torch.manual_seed(1)
    fake = before(x, before.draw(x))
    wanted = 10 * (y - fake).abs().mean() if "l1" in loss else 0
    if "gan" in loss:
        wanted = wanted - torch.sigmoid(model.discriminator(x, fake)).log().mean()
    for p, g in zip(
        model.generator.parameters(), torch.autograd.grad(wanted, [*before.parameters()])
    ):
        assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-6)
    assert model.discriminator.sees_input == ("cgan" in loss)


def test_crops_are_the_pictures_enlarged_cut_and_mirrored():
    args = pix2pix.arguments().parse_args(["--image-size", "16", "--no-jitter", "--no-mirror"])
    pair = torch.arange(40 * 30).remainder(251).byte().view(1, 40, 30).expand(6, -1, -1)
    whole = {tuple(pair[0, i : i + 16, j].tolist()) for i in range(25) for j in range(30)}
    for i in range(20):
        torch.manual_seed(i)
        crop = pix2pix.random_crop(pair, args)
        assert crop.shape == (6, 16, 16) and tuple(crop[0, :, 0].byte().tolist()) in whole
        torch.manual_seed(i)
        args.no_mirror = False
        other = pix2pix.random_crop(pair, args)
        args.no_mirror = True
        assert torch.equal(other, crop) or torch.equal(other.flip(-1), crop)
    args.no_jitter = False
    flat = torch.full((6, 16, 16), 7, dtype=torch.uint8)
    assert torch.equal(pix2pix.random_crop(flat, args), torch.full((6, 16, 16), 7.0))
    small = pix2pix.random_crop(pair[:, :5, :3], args)  # smaller than the crop
    assert small.shape == (6, 16, 16) and small.max() <= 250


def test_crops_are_enlarged_at_any_place_and_mirrored_as_often_as_not():
    """A picture whose values are its places: x in one channel, y in the next."""
    args = pix2pix.arguments().parse_args(["--image-size", "16"])
    y, x = torch.meshgrid(torch.arange(40), torch.arange(30), indexing="ij")
    pair = torch.stack([x, y] * 3).byte()
    torch.manual_seed(0)
    crops = torch.stack([pix2pix.random_crop(pair, args) for _ in range(200)])
    across = crops[:, 0, 8, 8] - crops[:, 0, 8, 7]
    down = crops[:, 1, 8, 8] - crops[:, 1, 7, 8]
    assert torch.allclose(across.abs(), torch.tensor(14 / 16))
    assert torch.allclose(down, torch.tensor(14 / 16))
    assert 70 < (across < 0).sum() < 130
    lefts, tops = crops[:, 0].amin(dim=(1, 2)), crops[:, 1].amin(dim=(1, 2))
    assert len(lefts.unique()) == 30 - 14 + 1 and len(tops.unique()) == 40 - 14 + 1


# ------------------------------------------------------------------ colours
def test_lab_of_known_colours_and_back():
    known = {
        (255, 255, 255): (100, 0, 0), (0, 0, 0): (0, 0, 0), (255, 0, 0): (53.24, 80.09, 67.20),
        (0, 255, 0): (87.73, -86.18, 83.18), (0, 0, 255): (32.30, 79.19, -107.86),
        (119, 119, 119): (50.03, 0, 0),
    }  # fmt: skip
    rgb = torch.tensor([*known]).T.reshape(1, 3, -1, 1) / 255
    lab = pix2pix.lab(rgb)
    assert torch.allclose(lab[0, :, :, 0].T, torch.tensor([*known.values()]).float(), atol=0.05)
    colours = torch.rand(2, 3, 9, 9)
    assert torch.allclose(pix2pix.rgb(pix2pix.lab(colours)), colours, atol=2e-3)
    grey = torch.rand(1, 1, 4, 4)
    assert pix2pix.lab(grey)[:, 1:].abs().max() < 0.05
    x, y = pix2pix.lightness_and_colour(colours)
    assert torch.allclose(pix2pix.picture(x, y, True), colours, atol=2e-3)


# ------------------------------------------------------------------ measures
def test_equal_pictures_are_alike_in_every_measure():
    truths = [*torch.rand(3, 3, 20, 30)]
    found = pix2pix.compare(truths, truths)
    assert found == {
        "l1": 0, "histogram_l": pytest.approx(1), "histogram_a": pytest.approx(1),
        "histogram_b": pytest.approx(1), "sharpness": 1, "diversity": 1,
    }  # fmt: skip


def test_measures_of_outputs_that_are_wrong_in_a_known_way():
    truths = [*torch.rand(3, 3, 32, 32)]
    grey = [x.mean(dim=(1, 2), keepdim=True).mean().expand(3, 32, 32) for x in truths]
    found = pix2pix.compare(grey, truths)
    assert found["sharpness"] == 0 and found["histogram_a"] < 0.1
    one = pix2pix.compare([truths[0]] * 3, truths)
    assert one["diversity"] == 0 and one["sharpness"] == pytest.approx(1, abs=0.1)
    darker = pix2pix.compare([x - 0.25 for x in truths], truths)
    assert darker["l1"] == pytest.approx(0.25) and darker["diversity"] == pytest.approx(1)
    half = pix2pix.compare([x / 2 for x in truths], truths)
    assert half["sharpness"] == pytest.approx(0.25) and half["diversity"] == pytest.approx(0.5)
    assert "histogram_a" not in pix2pix.compare([x[:1] for x in truths], [x[:1] for x in truths])


def test_histograms_overlap_by_the_share_of_equal_colours():
    red, blue = torch.zeros(2, 3, 8, 8)
    red[0], blue[2] = 1, 1
    mixed = red.clone()
    mixed[:, :2] = blue[:, :2]  # a quarter
    found = pix2pix.compare([mixed], [red])
    assert found["histogram_l"] == found["histogram_b"] == pytest.approx(0.75)
    assert "diversity" not in found


def test_accuracies_of_a_known_confusion():
    palette = torch.tensor([[0, 0, 0], [255, 0, 0], [0, 0, 255]])
    truth = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]])
    found = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 0]])
    image = palette[found].permute(2, 0, 1) / 255 + 0.1
    assert torch.equal(pix2pix.nearest(image, palette), found)
    count = pix2pix.confusion(found, truth, 3)
    assert count.tolist() == [[5, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert pix2pix.accuracies(count) == pytest.approx(
        {"pixel_accuracy": 6 / 8, "class_accuracy": (5 / 6 + 1 / 2) / 2, "iou": (5 / 7 + 1 / 3) / 2}
    )


# ------------------------------------------------------------------ facades whose answers are known
def test_drawn_pairs_follow_from_their_numbers():
    first = pix2pix.Drawn()
    assert torch.equal(first[3], pix2pix.Drawn()[3]) and not torch.equal(first[3], first[4])
    assert not torch.equal(first[3], first[-3])  # those to test with are others
    walls = []
    for i in range(300):
        label = pix2pix.nearest(first[i][:3] / 255, torch.tensor(pix2pix.LABELS))
        assert set(label.unique().tolist()) == {0, 1, 2, 3}
        colours = first[i][3:, label == 1].unique(dim=1)
        walls.append(tuple(colours[:, 0].tolist()))
        assert colours.shape[1] == 1  # all of a wall
    shares = [walls.count(colour) / 300 for colour in pix2pix.WALLS]
    assert sum(shares) == pytest.approx(1)
    assert np.allclose(shares, pix2pix.SHARES, atol=0.1)


def test_median_colour_is_that_of_the_shares_and_of_no_wall():
    for channel in range(3):
        levels = sorted(zip((wall[channel] for wall in pix2pix.WALLS), pix2pix.SHARES))
        below = np.cumsum([share for _, share in levels])
        assert levels[int(np.argmax(below >= 0.5))][0] == pix2pix.MEDIAN[channel]
    assert pix2pix.MEDIAN not in pix2pix.WALLS


def trained(loss, updates, *flags):
    """What `drawn_figures` and `compare` say after so many updates."""
    data = load("--dataset", "drawn")
    options = ["--dataset", "drawn", "--width", "8", "--no-jitter", "--loss", loss, *flags]
    args = pix2pix.arguments().parse_args(options)
    pix2pix.suit(args, data)
    torch.manual_seed(0)
    model = pix2pix.Model(args, data)
    for i in range(updates):
        torch.manual_seed(i)
        index = torch.arange(i * args.batch_size, (i + 1) * args.batch_size)
        pix2pix.train_step(model, *model.batch(data, index))
    inputs, outputs, truths = pix2pix.shown(model.generator, data.test, data.about)
    return pix2pix.drawn_figures(inputs, outputs) | pix2pix.compare(outputs, truths)


def test_l1_alone_paints_walls_in_the_median_colour_which_no_wall_has():
    found = trained("l1", 300, "--lr", "2e-3")
    assert found["wall_from_median"] < 0.1 and found["wall_from_nearest"] > 0.2
    assert found["layout"] > 0.9 > 0.7 > found["layout_of_others"]


def test_cgan_paints_walls_in_a_colour_that_walls_have():
    found = trained("cgan", 250, "--lr", "1e-3")
    assert found["wall_from_nearest"] < 0.1 and found["wall_from_median"] > 0.2
    assert found["layout"] > found["layout_of_others"] + 0.2


def test_gan_without_condition_and_skips_ignores_its_input():
    found = trained("gan", 150, "--lr", "1e-3", "--network", "encoder-decoder")
    assert found["layout"] == pytest.approx(found["layout_of_others"], abs=0.02)
    assert found["diversity"] < 0.1


def test_measures_and_pictures_are_of_held_out_pairs(monkeypatch, tmp_path):
    data, seen, shown = load("--dataset", "drawn"), [], pix2pix.shown
    data = data._replace(test=data.test[:5])
    args = pix2pix.arguments().parse_args(["--dataset", "drawn", "--width", "2"])
    pix2pix.suit(args, data)
    model = pix2pix.Model(args, data)

    def recorded(generator, pairs, *others, **named):
        seen.append(pairs)
        return shown(generator, pairs, *others, **named)

    trained = pix2pix.trained_segmenter
    monkeypatch.setattr(pix2pix, "shown", recorded)
    monkeypatch.setattr(pix2pix, "trained_segmenter", lambda *given: trained(*given, updates=5))
    monkeypatch.setattr(pix2pix, "save_curves", lambda *_: None)
    pix2pix.evaluate(model, data)
    found = pix2pix.finish(model, data, tmp_path, [])
    pix2pix.save_samples(model, tmp_path / "a")
    assert len(seen) == 4
    for pairs in seen:
        assert all(torch.equal(*both) for both in zip(pairs, data.test, strict=True))
    assert found["noise"] > 0
    assert found["seen_pixel_accuracy"] != found["seen_pixel_accuracy_of_truth"]


def test_segmenter_is_trained_once_and_kept(tmp_path, monkeypatch):
    data = load("--dataset", "drawn")
    args = pix2pix.arguments().parse_args(["--dataset", "drawn"])
    pix2pix.suit(args, data)
    torch.manual_seed(5)
    before, path = torch.get_rng_state(), tmp_path / "segmenter.pt"
    segmenter = pix2pix.trained_segmenter(data, args, path, updates=150)
    assert torch.equal(torch.get_rng_state(), before)
    inputs, _, truths = pix2pix.shown(networks()[0], data.test[:20], data.about)
    found = pix2pix.segmentation(segmenter, inputs, truths, data.about)
    assert found["seen_pixel_accuracy"] > 0.85 and found["seen_iou"] > 0.5
    wrong = pix2pix.segmentation(segmenter, inputs, truths[::-1], data.about)
    assert wrong["seen_pixel_accuracy"] < 0.8
    again = pix2pix.trained_segmenter(data, args, path, updates=10**9)
    assert same(again.state_dict(), segmenter.state_dict())


# ------------------------------------------------------------------ pairs of pictures
def test_pairs_side_by_side_and_in_two_folders_are_the_same():
    write_pairs("one", n=10)
    for i, path in enumerate(sorted(Path("one").iterdir())):
        both = np.asarray(Image.open(path))
        save(f"two/A/{i:03}.png", both[:, :16])
        save(f"two/B/{i:03}.bmp", both[:, 16:])
    one, two = (load("--data-dir", name) for name in ("one", "two"))
    assert len(one.pairs) == 8 and len(one.test) == 2 and one.train.tolist() == [[16, 16]] * 8
    assert same([one.pairs, one.test, one.about], [two.pairs, two.test, two.about])
    x, y = pix2pix.normalise(one.pairs[0][None], one.about)
    assert torch.allclose(x, -y, atol=1e-6)
    turned = load("--data-dir", "one", "--direction", "BtoA")
    assert same(pix2pix.normalise(turned.pairs[0][None], turned.about), (y, x))


def test_parts_of_a_data_set_and_facades():
    for part, n in (("train", 4), ("val", 2), ("test", 3)):
        write_pairs(f"{part}", n=n)
    data = load("--data-dir", ".")
    assert len(data.pairs) == 4 and len(data.test) == 2 and data.about["labels"] == ""


def test_pairs_in_train_alone_and_other_forms(capsys):
    for i in range(5):
        for side in "AB":
            save(f"pairs/train/{side}/{i}.png", noise_of(16, 32, 3))
            save(f"others/train{side}/{i}.png", noise_of(16, 32, 3))
            save(f"inside/{side}/train/{i}.png", noise_of(16, 32, 3))
    data = load("--data-dir", "pairs")
    assert len(data.pairs) == 4 and len(data.test) == 1 and data.train.tolist() == [[16, 32]] * 4
    assert "its trainA/ is to be train/A/" in error(capsys, "--data-dir", "others")
    assert "its A/train/ is to be train/A/" in error(capsys, "--data-dir", "inside")
    save("mixed/0.png", noise_of(16, 32, 3))
    save("mixed/test/1.png", noise_of(16, 32, 3))
    assert "beside test/ the other pairs are to be in train/" in error(
        capsys, "--data-dir", "mixed"
    )
    assert "is --data-dir" in error(capsys, "--data-dir", "pairs", "--out", "pairs/.")
    save("pairs/train/A/4.bmp", noise_of(16, 32, 3))
    assert "differ in their suffix only" in error(capsys, "--data-dir", "pairs")


def test_facades_that_are_there(monkeypatch, capsys):
    monkeypatch.setattr(pix2pix, "download_and_extract_archive", None)
    for part, n in (("train", 400), ("val", 100), ("test", 106)):
        Path("data/facades").mkdir(parents=True, exist_ok=True)
        write_pairs(f"data/facades/{part}", n=n, size=(2, 2))
    photograph, labels = (
        load("--dataset", "facades"),
        load("--dataset", "facades", "--direction", "BtoA"),
    )
    assert photograph.about["labels"] == "output" and labels.about["labels"] == "input"
    assert (
        len(labels.pairs) == 400 and len(labels.test) == 100 and len(labels.about["palette"]) == 13
    )
    Path("data/facades/val/000.png").unlink()
    assert "not 400, 100 and 106; delete it" in error(capsys, "--dataset", "facades")


def test_facades_that_can_not_be_had(capsys):
    said = error_of(pix2pix, capsys, *QUICK, "--dataset", "facades")
    assert "can not be downloaded to --data-dir" in said and not Path("run").exists()


def test_facades_whose_download_was_cut_short(monkeypatch, capsys):
    """The archive that is left would never be downloaded again."""

    def cut(url, folder):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "facades.tar.gz").write_bytes(gzip.compress(bytes(2000))[:-20])
        with tarfile.open(Path(folder, "facades.tar.gz")) as archive:
            archive.extractall(folder, filter="data")

    monkeypatch.setattr(pix2pix, "download_and_extract_archive", cut)
    for _ in range(2):
        assert "can not be downloaded" in error_of(pix2pix, capsys, *QUICK, "--dataset", "facades")
        assert not Path("data/facades.tar.gz").exists()


def test_grey_pairs_stay_grey():
    for i in range(3):
        save(f"pairs/A/{i}.png", noise_of(20, 30, seed=i))
        save(f"pairs/B/{i}.png", noise_of(20, 30, 3, seed=i))
    run("--data-dir", "pairs", "--direction", "BtoA", "--image-size", 16)
    assert load("--data-dir", "pairs").about["input"] == 1
    save("photo.png", noise_of(17, 23, 3))
    pix2pix.main(["--translate", "run/checkpoint.pt", "--input", "photo.png", "--out", "grey.png"])
    with Image.open("grey.png") as image:
        assert image.mode == "L" and image.size == (23, 17)


def test_sixteen_bits_are_scaled_and_transparency_is_white():
    levels = np.array([[0, 300, 65535, 32768]], dtype=np.uint16)
    save("sixteen.png", levels)
    assert pix2pix.read_picture("sixteen.png").flatten().tolist() == [0, 1, 255, 128]
    save("clear.png", np.array([[[9, 8, 7, 255], [0, 0, 0, 0]]], dtype=np.uint8))
    assert pix2pix.read_picture("clear.png")[:, 0].T.tolist() == [[9, 8, 7], [255, 255, 255]]
    save("float.tiff", np.ones((2, 2), dtype=np.float32))
    save("long.tiff", np.full((2, 2), 200, dtype=np.int32))  # and would become black
    save("short.tiff", np.full((2, 2), 200, dtype=np.uint16))
    for name in ("long.tiff", "short.tiff"):
        with pytest.raises(pix2pix.UsageError, match="values that are not of 16 bits"):
            pix2pix.read_picture(name)
    with pytest.raises(pix2pix.UsageError, match="floating-point"):
        pix2pix.read_picture("float.tiff")
    Path("broken.png").write_bytes(b"no picture")
    with pytest.raises(pix2pix.UsageError, match="broken"):
        pix2pix.read_picture("broken.png")
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)
    assert pix2pix.with_channels(red, 1).item() == 76
    assert pix2pix.with_channels(red[:1], 3).flatten().tolist() == [255] * 3


def test_pictures_of_different_sizes_train_together():
    for i, size in enumerate([(40, 30), (16, 90), (10, 10), (33, 33)]):
        save(f"pairs/{i}.png", noise_of(size[0], 2 * size[1], 3))
    run("--data-dir", "pairs", "--batch-size", 2, "--image-size", 32)
    assert summary()["image_size"] == 32 and summary()["pairs"] == 1


@pytest.mark.parametrize("size, chosen", [(100, 128), (16, 16), (5, 16), (250, 256), (700, 256)])
def test_crops_suit_the_pictures(size, chosen):
    args = pix2pix.arguments().parse_args([])
    pix2pix.suit(args, pix2pix.Data("folder", {}, torch.full((3, 2), size), None, None))
    assert args.image_size == chosen and args.patch == (70 if chosen > 16 else 16)


def test_pairs_that_are_none(capsys):
    write_pairs("odd", n=3)
    save("odd/odd.png", noise_of(4, 7, 3))
    assert "odd.png is 7x4: no two equal halves" in error(capsys, "--data-dir", "odd")
    for i in range(3):
        save(f"ab/A/{i}.png", noise_of(4, 6, 3))
        save(f"ab/B/{i}.png", noise_of(4, 6, 3))
    save("ab/A/more.png", noise_of(4, 6, 3))
    assert "ab: more is not in both A/ and B/" in error(capsys, "--data-dir", "ab")
    save("ab/B/more.png", noise_of(4, 8, 3))
    assert "more in A/ and B/ are 6x4 and 8x4" in error(capsys, "--data-dir", "ab")
    Path("none").mkdir()
    assert "none has no pictures" in error(capsys, "--data-dir", "none")
    write_pairs("single", n=1)
    assert "two pictures or pairs are the least" in error(capsys, "--data-dir", "single")
    assert "nowhere" in error(capsys, "--data-dir", "nowhere")


def test_other_mistakes(capsys):
    write_pairs()
    say = partial(error, capsys, "--data-dir", "data")
    assert "--patch 286 needs an --image-size of 96" in say("--patch", "286", "--image-size", "64")
    assert "--translate" in say("--input", "data")
    assert "--translate" in say("--no-noise")
    assert "one of photographs, facades, drawn, folder" in say("--dataset", "maps")
    assert "give --data-dir FOLDER alone" in error(capsys, "--task", "colour")
    assert "give --data-dir FOLDER alone" in error(capsys, "--dataset", "folder")
    assert "no other direction" in error(capsys, "--direction", "BtoA")


def test_hidden_files_runs_and_links(monkeypatch):
    write_pairs("data", n=4)
    save("data/.hidden.png", noise_of(4, 7, 3))
    save("data/run/samples/1.png", noise_of(4, 7, 3))
    Path("data/run/metrics.csv").write_text("step")
    Path("data/again").symlink_to(Path("data").resolve())
    assert len(pix2pix.pictures_in("data")) == 4


# ------------------------------------------------------------------ use after training
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    write_pairs(folder / "data", n=6)
    pix2pix.main([*QUICK, "--data-dir", str(folder / "data"), "--out", str(folder / "run")])
    return folder / "run" / "checkpoint.pt"


def test_translate_one_picture_without_its_pair(checkpoint):
    save("photo.jpg", noise_of(25, 33, 3))
    flags = ["--translate", str(checkpoint), "--input", "photo.jpg"]
    pix2pix.main(flags)
    pix2pix.main([*flags, "--out", "new/again.png"])
    pix2pix.main([*flags, "--out", "other", "--seed", "1"])
    pix2pix.main([*flags, "--out", "plain.png", "--no-noise"])
    first, again, other, plain = (
        np.asarray(Image.open(p))
        for p in ("translated.png", "new/again.png", "other.png", "plain.png")
    )
    assert first.shape == (25, 33, 3) and np.array_equal(first, again)
    assert not np.array_equal(first, other) and not np.array_equal(first, plain)
    g = pix2pix.load_generator(checkpoint)
    (y,) = pix2pix.translate(g, [pix2pix.read_picture("photo.jpg") / 255])
    assert np.array_equal(np.asarray(pix2pix.to_image(y)), first)


def test_translate_a_folder(checkpoint):
    for name, size in (("a.jpg", (20, 20)), ("b/c.png", (31, 8)), ("b/d.png", (20, 20))):
        save(f"photos/{name}", noise_of(*size, 3))
    pix2pix.main(["--translate", str(checkpoint), "--input", "photos", "--out", "done"])
    found = {str(p.relative_to("done")): Image.open(p).size for p in Path("done").rglob("*.png")}
    assert found == {"a.png": (20, 20), "b/c.png": (8, 31), "b/d.png": (20, 20)}


def test_translate_one_picture_into_a_folder(checkpoint):
    save("photo.jpg", noise_of(16, 16, 3))
    Path("done").mkdir()
    pix2pix.main(["--translate", str(checkpoint), "--input", "photo.jpg", "--out", "done/"])
    assert [path.name for path in Path("done").iterdir()] == ["photo.png"]


def test_large_pictures_go_by_few_and_are_measured_by_few():
    """Or a photograph's maps, eight times, are more than memory has."""
    sizes = [len(some) for some in pix2pix.batches([torch.zeros(6, 256, 256)] * 10)]
    assert sizes == [8, 2]  # the paper's size
    large = torch.zeros(1).expand(6, 3000, 4000)
    assert len(pix2pix.measured([large] * 9)) == 2
    assert len(pix2pix.measured([large[:, :8]] * 9)) == 9
    assert {len(some) for some in pix2pix.batches([torch.zeros(6, 1000, 1000)] * 2)} == {1}


def test_translate_overwrites_no_picture(checkpoint, capsys):
    for name in ("a.png", "b.png"):
        save(f"photos/{name}", noise_of(16, 16, 3))
    say = partial(refused_by, pix2pix, capsys, "--translate", checkpoint)
    assert "would be overwritten" in say("--input", "photos", "--out", "photos")
    assert "would be overwritten" in say("--input", "photos/a.png", "--out", "photos/a.png")
    save("photos/sub/a.png", noise_of(16, 16, 3))  # of which a.png's translation has the name
    assert "would be overwritten" in say("--input", "photos", "--out", "photos/sub")
    save("photos/a.jpg", noise_of(16, 16, 3))
    assert "differ in their suffix only" in say("--input", "photos", "--out", "done")
    assert "a.blp: " in say("--input", "photos/b.png", "--out", "a.blp")
    assert ".png or .jpg is" in say("--input", "photos/a.png", "--out", "a.foo")
    assert "--input" in say()
    assert "nowhere" in say("--input", "nowhere.png", "--out", "x.png")


# ------------------------------------------------------------------ colour
def test_default_colours_two_photographs(monkeypatch, capsys):
    run("--image-size", 32)
    found = summary()
    assert found["dataset"] == "photographs" and found["pairs"] == 2
    assert {"l1", "histogram_a", "histogram_b", "sharpness", "noise"} <= found.keys()
    data = load()
    assert data.about | {"input": 1, "output": 2, "colour": True} == data.about
    whole = [np.asarray(x) for x in pix2pix.load_sample_images().images]
    for image, train, test in zip(whole, data.pairs, data.test):
        assert np.array_equal(train.permute(1, 2, 0).numpy(), image[:, :384])
        assert np.array_equal(test.permute(1, 2, 0).numpy(), image[:, 400:])


def test_colour_of_a_folder_keeps_the_lightness():
    write_images("photos", n=6)
    run("--task", "colour", "--data-dir", "photos", "--image-size", 16)
    save("grey.png", noise_of(20, 30))
    pix2pix.main(["--translate", "run/checkpoint.pt", "--input", "grey.png", "--out", "colour.png"])
    with Image.open("colour.png") as image:
        assert image.mode == "RGB" and image.size == (30, 20)
    g = pix2pix.load_generator("run/checkpoint.pt")
    grey = torch.full((1, 16, 16), 0.5)
    (y,) = pix2pix.translate(g, [grey])
    assert torch.allclose(pix2pix.lab(y[None])[:, 0], pix2pix.lab(grey[None])[:, 0], atol=1.5)


def test_run_of_labels_has_what_a_segmenter_sees(monkeypatch):
    training = pix2pix.trained_segmenter
    monkeypatch.setattr(pix2pix, "trained_segmenter", lambda *args: training(*args, updates=5))
    run("--dataset", "drawn")
    found = summary()
    assert {"seen_iou", "seen_iou_of_truth", "layout", "wall_from_median"} <= found.keys()
    run("--dataset", "drawn", "--direction", "BtoA", "--out", "labels")
    found = summary("labels")
    assert {"pixel_accuracy", "class_accuracy", "iou"} <= found.keys()
    assert "layout" not in found and "wall_from_median" not in found  # of facades that are painted


def test_segmenter_that_can_not_be_kept_costs_no_run(monkeypatch):
    training = pix2pix.trained_segmenter
    nowhere = Path("no/such/folder/segmenter.pt")
    monkeypatch.setattr(
        pix2pix, "trained_segmenter", lambda data, args, _: training(data, args, nowhere, updates=2)
    )
    run("--dataset", "drawn")
    assert "seen_iou" in summary() and not nowhere.exists()


def test_resume_has_the_optimizers_state(capsys):
    write_pairs(n=8)
    run("--data-dir", "data", "--max-steps", 6)
    run("--data-dir", "data", "--max-steps", 3, "--out", "half")
    pix2pix.main(["--resume", "half/checkpoint.pt", "--max-steps", "6"])
    assert same(weights("run"), weights("half")) and len(weights("run")[1][0]) > 0
    write_pairs(n=9)
    more = ("--resume", "half/checkpoint.pt", "--max-steps", "7")
    assert "not the run's data" in error_of(pix2pix, capsys, *more)
